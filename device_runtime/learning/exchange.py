"""Merge what two devices have learned since they installed one bundle.

A merge is A + B − their common bundle, in the sums of a closed-form learner: exactly the state of one device that had
been taught everything. It is refused wherever that does not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from device_runtime.learning.edit import estimate_cost
from device_runtime.learning.export import lineage
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState, copy_learner
from device_runtime.results import MergeResult, TaughtClass
from device_runtime.store.generations import Generations
from device_runtime.store.record import Generation
from ssd_edge import bundle as bundles
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.closed_form.sums import ClassStatistics


@dataclasses.dataclass(frozen=True)
class Origin:
    """Installations that a device's state comes from.

    Attributes:
        installation: Id of the installation.
        merged: Ids of the installations that were merged into it.
        base: SHA-256 of the bundle that was installed.
        backbone: SHA-256 of its backbone.
        generation: Number of the generation; 1 if it is kept back.
    """

    installation: str
    merged: tuple[str, ...]
    base: str
    backbone: str
    generation: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Origin:
        """Return where the state in a bundle that a device has exported comes from.

        Raises:
            InputError: No device has exported it.
            BundleRefusedError: The manifest does not say where the state comes from.
        """
        device = manifest.get("device")
        if not isinstance(device, dict):
            raise InputError("that bundle was not exported by a device; on the other one: ssd-edge device export FILE")
        try:
            merged, backbone = tuple(map(str, device["merged"])), str(manifest["backbone"]["sha256"])
            base, generation = str(device["bundle_sha256"]), int(device["generation"])
            return cls(str(device["installation"]), merged, base, backbone, generation)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleRefusedError(
                f"that bundle does not say where it comes from ({error}); export it again"
            ) from error


def taught_sets(store: Generations, generation: Generation) -> dict[str, str]:
    """Return digest → label of the sets of images that led to a generation, see `teach.digest_of`."""
    events = lineage(store.journal(), generation)
    taught = [one for event in events for one in (event.get("info") or {}).get("taught", ())]
    return {one["digest"]: one["label"] for one in taught if "digest" in one}


def installed_state(store: Generations, state: DeviceState) -> DeviceState:
    """Return the state that was installed from the bundle of `state`.

    Raises:
        InputError: The generation that was installed from it is missing or damaged.
    """
    sha256 = state.bundle.bundle_sha256
    for entry in store.list():
        if entry.origin == "install" and entry.info and entry.info.get("bundle_sha256") == sha256:
            return DeviceState.read(store.get(entry.number).read)
    raise InputError(
        f"a merge needs the generation that was installed from the bundle {sha256[:12]}…, but it is gone or damaged; "
        "install one bundle on both devices"
    )


def merge(
    state: DeviceState, base: DeviceState, other: bundles.Bundle, limits: Limits | None
) -> tuple[DeviceState, MergeResult]:
    """Add what another device has learned; result and errors as `Device.merge`.

    Args:
        state: State of this device.
        base: State of the bundle that both devices installed.
        other: Bundle that the other device has exported.
        limits: Limits on forgetting the classes that this device knows.
    """
    origin = _check_origin(state, other.manifest)
    there = DeviceState.of_bundle(other)
    check_base_classes(base.registry, state.registry, "on this device")
    check_base_classes(base.registry, other.registry, "there")
    registry, base_registry = state.registry, base.registry
    here = {entry.id: row for row, entry in enumerate(registry.entries)}
    rows: list[int] = []
    taught: list[tuple[int, TaughtClass]] = []
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
            taught.append((row, TaughtClass(registry.names[row], images, row >= len(state.registry))))
    if not taught:
        raise InputError("that device has learned nothing since the bundle that both started from; nothing was changed")
    to_here = torch.tensor(rows, dtype=torch.int64)
    base_to_here = torch.tensor([here[entry.id] for entry in base_registry.entries], dtype=torch.int64)
    learner = copy_learner(state.learner)
    learner.merge(there.learner, to_here, base.learner, base_to_here)

    def add(statistics: ClassStatistics) -> None:
        # first: exactly nothing is left of a device that was taught nothing
        statistics.subtract(base.statistics, base_to_here)
        statistics.merge(there.statistics, to_here)

    merged = (*state.bundle.merged, origin.installation, *origin.merged)
    after = state.with_learner(learner, add).replace(
        registry=registry,
        bundle=dataclasses.replace(state.bundle, merged=merged),
    )
    retention, warnings, record = estimate_cost(state, learner, state.statistics, limits)
    after = after.replace(record=record)
    after = _merged_answers(state, base, there, {row: rows.index(row) for row, _ in taught}, after)
    return after, MergeResult(
        merged=origin.installation,
        bundle_sha256=other.sha256,
        taught=[one for _, one in taught],
        old_classes=retention,
        warnings=warnings,
    )


def _merged_answers(
    here: DeviceState, base: DeviceState, there: DeviceState, taught: Mapping[int, int], merged: DeviceState
) -> DeviceState:
    """Add thresholds for ``unknown`` and held-out results of another device; classes taught here only keep theirs.

    Args:
        here: State of this device.
        base: State of the bundle that both installed.
        there: State of the other device.
        taught: Row after the merge → row there, of each class that the other device has taught.
        merged: State after the merge, with the thresholds and held-out results of this device.
    """
    rejector, record, entries = here.rejector, merged.record, here.registry.entries
    at_first = {entry.id: row for row, entry in enumerate(base.registry.entries)}
    for row, other in sorted(taught.items()):
        first = at_first.get(entries[row].id) if row < len(entries) else None
        scores, images = torch.zeros(3, dtype=torch.float64), 0
        earlier = torch.zeros(3, dtype=torch.float64)  # held-out images of the bundle: tested, nearest, right
        promised = there.record.promised[other]
        if first is not None:
            scores, images = base.rejector.scores[first], base.registry.entries[first].images
            earlier, promised = base.record.counts(first), (promised - base.record.promised[first]).clamp_min(0)
        taught_here = row < len(entries) and entries[row].images != images
        rejector = rejector.merged(row, there.rejector, other, scores if taught_here else None, merged.statistics)
        tested, nearest, right = map(int, (there.record.counts(other) - earlier).clamp_min(0).cummin(0).values)
        record = record.measured(
            merged.learner,
            merged.statistics,
            row,
            tested,
            nearest,
            right,
            record.anchors[:0],
            promised.clamp_max(tested),
        )
    return merged.replace(rejector=rejector, record=record)


def check_base_classes(base: ClassRegistry, registry: ClassRegistry, place: str) -> None:
    """Check that a device still has every class of the common bundle.

    Args:
        base: Classes of the bundle.
        registry: Classes of the device.
        place: Which device it is, for the message.

    Raises:
        InputError: It has not.
    """
    ids = {entry.id for entry in registry.entries}
    missing = [entry.name for entry in base.entries if entry.id not in ids]
    if missing:
        raise InputError(
            f"the bundle that both devices started from knows {', '.join(missing)}, which {place} was forgotten or "
            "merged with another class, so that later changes cannot be separated; install one bundle on both first"
        )


def _check_origin(state: DeviceState, manifest: Mapping[str, Any]) -> Origin:
    """Return where another device's state comes from, after checking that a merge counts nothing twice.

    Raises:
        InputError: The devices did not install one bundle, or something would count twice.
        BundleRefusedError: The manifest does not say where the state comes from.
    """
    origin, ours = Origin.of(manifest), state.bundle
    if (origin.base, origin.backbone) != (ours.bundle_sha256, ours.manifest["backbone"]["sha256"]):
        raise InputError(
            f"that device started from the bundle {origin.base[:12]}…, this one from {ours.bundle_sha256[:12]}…; only "
            "changes since one common bundle can be merged. Install one on both first"
        )
    twice = {origin.installation, *origin.merged} & {ours.installation, *ours.merged}
    if twice:
        raise InputError(
            f"what was learned in installation {', '.join(sorted(twice))} is known here already and would count twice; "
            "to go on from the merged state, export it and install it on both"
        )
    return origin
