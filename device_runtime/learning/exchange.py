"""Between devices: what one knows as a bundle, and what two have learned apart since they left one bundle.

A merge is A + B − their common bundle, in the sums that a closed-form learner keeps: exactly what one device would know
that had been taught both. It is refused where that would not be true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_runtime.learning.edit import describe, estimate_cost
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState, restore_statistics
from device_runtime.learning.teach import copy_learner
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.bundle import card
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.system import utc_now


def export(
    store: Generations, generation: Generation, state: DeviceState, path: Path, key: str | Path | None
) -> dict[str, Any]:
    """Write what a generation knows as a bundle; arguments, report and errors as `Device.export`."""
    sign = None
    if key is not None:
        from ssd_edge.bundle import signing

        sign = signing.signer(Path(key))
    backbone = files.read_bytes(store.backbone_path(generation.backbone))
    packed = pack(state, generation.number, backbone, lineage(store, generation), path.stem, sign)
    opened = bundles.parse(packed)
    bundles.write(path, packed)
    return {
        "bundle": str(path),
        "bytes": len(packed),
        "sha256": opened.sha256,
        "generation": generation.number,
        "classes": state.registry.names,
        "signed_by": opened.signature.key if opened.signature else None,
    }


def lineage(store: Generations, generation: Generation) -> list[str]:
    """What made a generation of the installed one, oldest first, as far as the journal remembers."""
    made = {event["generation"]: event for event in store.journal() if event.get("event") == "learn"}
    told: list[str] = []
    number: int | None = generation.number
    while number in made:
        event = made.pop(number)
        told.append(describe(event.get("info") or {}))
        number = event.get("parent")
    return told[::-1]


def base_of(store: Generations, state: DeviceState) -> DeviceState:
    """What the bundle knew that a state goes back to.

    Raises:
        InputError: the generation that was installed from it is gone or damaged.
    """
    started = state.facts["bundle_sha256"]
    for entry in store.list():
        if entry["intact"] and entry["origin"] == "install" and entry["info"].get("bundle_sha256") == started:
            return DeviceState.read(store.get(entry["number"]).read)
    raise InputError(
        f"the generation that was installed from the bundle {started[:12]}… is needed for a merge, but is gone or "
        "damaged; install one bundle on both devices"
    )


def pack(
    state: DeviceState,
    generation: int,
    backbone: bytes,
    events: Sequence[str],
    name: str,
    sign: Callable[[bytes], bytes] | None,
) -> bytes:
    """The bytes of a bundle of what a device knows.

    Args:
        state: what goes into it.
        generation: that it is.
        backbone: the ONNX file.
        events: what happened since the bundle was deployed, for the card.
        name: of the bundle.
        sign: as for `bundle.pack`.
    """
    manifest = dict(state.facts["manifest"])
    _, learner = learners.pack(state.learner)
    contents = state.contents()
    entries = {role: contents[path] for role, path in bundles.ROLES.items() if path in contents}
    manifest.update(
        name=name[: bundles.MAX_TITLE_LENGTH],
        created=utc_now(),
        learner={"name": learner["learner"], "settings": learner["settings"]},
        classes=state.registry.names,
        device={
            "generation": generation,
            "installation": state.facts["installation"],
            "merged": state.facts["merged"],
            "bundle_sha256": state.facts["bundle_sha256"],
        },
    )
    if events:
        manifest["metrics"] = {}  # they are of what was deployed
        entries["card"] = card.amended(state.card.decode(), state.registry, events).encode()
    entries |= {"backbone": backbone, "probe": _probe(state)}
    packed = {bundles.ROLES[role]: (role, data) for role, data in entries.items()}
    return bundles.pack(manifest, packed, sign)


def _probe(state: DeviceState) -> bytes:
    """The bundle's probe with the decisions of the learner as it is now."""
    arrays, limits = files.parse_tensors(state.probe, "probe.safetensors")
    rows = np.full(len(arrays["images"]), -1)
    if len(state.registry):
        rows = state.learner.predict(torch.from_numpy(arrays["embeddings"])).numpy()
    return files.tensor_bytes({**arrays, "rows": rows}, limits)


def merge(
    state: DeviceState, base: DeviceState, other: bundles.Bundle, limits: Limits | None
) -> tuple[DeviceState, dict[str, Any]]:
    """What a device knows once it also knows what another was taught; report and errors as `Device.merge`.

    Args:
        state: of this device.
        base: of the bundle that both have started from.
        other: what the other one has exported.
        limits: of what it may cost the classes that this device knows.
    """
    theirs = _lineage(state, other.manifest)
    registry, base_registry = state.registry, base.registry
    for place, registries in (("on this device", registry), ("there", other.registry)):
        ids = {entry.id for entry in registries.entries}
        gone = [entry.name for entry in base_registry.entries if entry.id not in ids]
        if gone:
            raise InputError(
                f"the bundle that both devices started from knows {', '.join(gone)}, which {place} has been forgotten "
                "or merged with another class, so that what was learned since cannot be told apart; install one "
                "bundle on both first"
            )
    here = {entry.id: row for row, entry in enumerate(registry.entries)}
    rows, taught = [], []
    for entry in other.registry.entries:
        shared = next((old for old in base_registry.entries if old.id == entry.id), None)
        images = entry.images - (shared.images if shared else 0)
        row = here[entry.id] if shared else registry.row(entry.name)
        if row is None:
            registry = registry.add(entry.name, "device", images)
            row = len(registry) - 1
        elif images:
            registry = registry.taught(registry.names[row], images)
        rows.append(row)
        if images:
            taught.append({"label": registry.names[row], "images": images, "new": row >= len(state.registry)})
    if not taught:
        raise InputError("that device has learned nothing since the bundle that both started from; nothing was changed")
    to_here = torch.tensor(rows, dtype=torch.int64)
    base_to_here = torch.tensor([here[entry.id] for entry in base_registry.entries], dtype=torch.int64)
    learner = copy_learner(state.learner)
    learner.merge(learners.restore(*other.tensors("learner")), to_here)
    learner.subtract(base.learner, base_to_here)
    statistics = state.statistics.copy()
    statistics.merge(restore_statistics(other.tensors("statistics")[0]), to_here)
    statistics.subtract(base.statistics, base_to_here)
    rejector = state.rejector
    for row in sorted({registry.row(one["label"]) for one in taught}):
        rejector = rejector.refitted(row, statistics)
    facts = {**state.facts, "merged": [*state.facts["merged"], theirs["installation"], *theirs["merged"]]}
    after = state.replace(registry=registry, learner=learner, statistics=statistics, rejector=rejector, facts=facts)
    report = {"merged": theirs["installation"], "bundle_sha256": other.sha256, "taught": taught}
    return after, {**report, **estimate_cost(state, learner, state.statistics, limits)}


def _lineage(state: DeviceState, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Where another device's state comes from: both must have started from one bundle, and nothing may count twice."""
    theirs, ours = manifest.get("device"), state.facts
    if not isinstance(theirs, dict):
        raise InputError("that bundle was not exported by a device; on the other one: ssd-edge device export FILE")
    try:
        installation, merged, started = str(theirs["installation"]), list(theirs["merged"]), theirs["bundle_sha256"]
    except (KeyError, TypeError) as error:
        raise BundleRefusedError(f"that bundle does not say where it comes from ({error}); export it again") from error
    if started != ours["bundle_sha256"] or manifest["backbone"]["sha256"] != ours["manifest"]["backbone"]["sha256"]:
        raise InputError(
            f"that device started from the bundle {str(started)[:12]}…, this one from {ours['bundle_sha256'][:12]}…; "
            "only what was learned since one common bundle can be merged. Install one on both first"
        )
    twice = {installation, *map(str, merged)} & {ours["installation"], *ours["merged"]}
    if twice:
        raise InputError(
            f"what was learned in installation {', '.join(sorted(twice))} is known here already and would count twice; "
            "to go on from the merged state, export it and install it on both"
        )
    return {"installation": installation, "merged": [str(one) for one in merged]}
