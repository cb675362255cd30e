"""Export a generation as a bundle; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from device_runtime.install.answering import Answering
from device_runtime.results import describe
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge import files
from ssd_edge.bundle import card
from ssd_edge.system import utc_now


def export(
    store: Generations,
    generation: Generation,
    answering: Answering,
    score: Callable[[np.ndarray], np.ndarray],
    name: str,
    key: str | Path | None,
    history: bool = True,
) -> tuple[bytes, bundles.Bundle]:
    """Return a generation as the bytes of a bundle, and what they hold; errors as `Device.export`.

    Args:
        store: The store of the generation.
        generation: The generation.
        answering: What it answers with.
        score: Returns the scores ``(N, C)`` of embeddings ``(N, D)``.
        name: Name of the bundle.
        key: As for `Device.export`.
        history: As for `Device.export`.
    """
    sign = None
    if key is not None:
        from ssd_edge.bundle import signing

        sign = signing.signer(Path(key))
    backbone = files.read_bytes(store.backbone_path(generation.backbone))
    changes = changes_since_install(store, generation)
    if changes and not history:
        changes = ["not listed, because it was exported without history"]
    registry, bundle = answering.registry, answering.bundle
    roles = {role: name for role, name in bundles.ROLES.items() if name in generation.files}
    entries = {role: generation.read(name) for role, name in roles.items()}
    _, learner = files.parse_tensors(entries["learner"], roles["learner"])
    manifest = {
        **bundle.manifest,
        "name": name[: bundles.MAX_TITLE_LENGTH],
        "created": utc_now(),
        "learner": {"name": learner["learner"], "settings": learner["settings"]},
        "classes": registry.names,
        "device": {
            "generation": generation.number if history else 1,
            "installation": bundle.installation,
            "merged": list(bundle.merged),
            "bundle_sha256": bundle.bundle_sha256,
        },
    }
    if changes:
        manifest["metrics"] = {}  # they were measured before the changes
        entries["card"] = card.amend(entries["card"].decode(), registry, changes).encode()
    entries |= {"backbone": backbone, "probe": answered_probe(answering.probe, len(registry), score)}
    packed = bundles.pack(manifest, {bundles.ROLES[role]: (role, data) for role, data in entries.items()}, sign)
    return packed, bundles.parse(packed, allow_control_flow=True)  # what is installed has been allowed


def answered_probe(probe: bytes, classes: int, score: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Return a bundle's probe with the answers of another state.

    Args:
        probe: Bytes of the probe.
        classes: Number of classes of the state.
        score: Returns its scores ``(N, C)`` of embeddings ``(N, D)``.
    """
    arrays, limits = files.parse_tensors(probe, "probe.safetensors")
    rows = np.full(len(arrays["images"]), -1)
    if classes:
        rows = score(arrays["embeddings"]).argmax(1)
    return files.tensor_bytes({**arrays, "rows": rows}, limits)


def changes_since_install(store: Generations, generation: Generation) -> list[str]:
    """Return the changes between the installed generation and this one, oldest first, as far as the journal goes."""
    journal = store.journal()
    events = lineage(journal, generation)
    changes = [describe(event.get("info") or {}) for event in events]
    first = events[-1].get("parent") if events else generation.parent
    installed = {event["generation"] for event in journal if event.get("event") == "install"}
    if generation.parent is not None and first not in installed:
        changes.append("earlier changes, which the journal no longer lists")
    return changes[::-1]


def lineage(journal: Iterable[Mapping[str, Any]], generation: Generation) -> list[Mapping[str, Any]]:
    """Return the events of a journal that led to a generation, newest first, as far as it goes."""
    learned = {event["generation"]: event for event in journal if event.get("event") == "learn"}
    events: list[Mapping[str, Any]] = []
    number: int | None = generation.number
    while number in learned:
        events.append(learned.pop(number))
        number = events[-1].get("parent")
    return events
