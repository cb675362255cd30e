"""Devices of a fleet without a store: they learn as devices do, from embeddings that are already computed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from helpers.empty_bundle import DIM, empty_bundle

from device_runtime.learning import contribution, teach
from device_runtime.learning.budget import Meter
from device_runtime.learning.contribution import Contribution
from device_runtime.learning.exchange import Origin
from device_runtime.learning.guard import Limits
from device_runtime.learning.state import DeviceState
from exporters.fleet.gateway import Reply
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.bundle import Bundle
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.priors import Priors

ANY = Limits(force=True)
CENTRES = {
    name: np.random.default_rng(number).standard_normal(DIM) * 3
    for number, name in enumerate(("cup", "nut", "screw", "wedge", "bolt", "pin", "cap"))
}


def vectors(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Return embeddings ``(count, DIM)`` of images of a class."""
    rng = np.random.default_rng([seed, list(CENTRES).index(name)])
    return (CENTRES[name] + rng.standard_normal((count, DIM))).astype(np.float32)


class Device:
    """A device that has installed a bundle.

    Attributes:
        state: Its state.
        generation: Number of its generation.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.state, self.base = DeviceState.of_bundle(bundle), DeviceState.of_bundle(bundle)
        installation = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.state = self.state.replace(bundle=dataclasses.replace(self.state.bundle, installation=installation))
        self.name, self.generation = name, 1

    def learn(self, images: Mapping[str, np.ndarray]) -> Device:
        """Learn classes from their embeddings."""
        every = np.concatenate(list(images.values()))
        sources = {name: [np.frombuffer(one.tobytes(), np.uint8) for one in part] for name, part in images.items()}
        self.state, _ = teach.teach(
            self.state, sources, lambda *_: torch.from_numpy(every), self.generation, ANY, Meter(None, None), {}
        )
        self.generation += 1
        return self

    @property
    def sums(self) -> Contribution:
        """What it has learned since its bundle."""
        facts = self.state.bundle
        backbone = facts.manifest["backbone"]["sha256"]
        origin = Origin(facts.installation, facts.merged, facts.bundle_sha256, backbone, self.generation)
        return contribution.since(self.state, self.base, origin)

    def reply(self, **changed: np.ndarray) -> Reply:
        """Return its answer, with some arrays replaced."""
        part = self.sums
        return Reply(self.name, {**part.to_arrays(), **changed}, part.about())


def common_bundle(learner: str = "slda", classes: int = 3, **settings: object) -> Bundle:
    """Return a bundle with some classes of 20 images each."""
    opened = bundles.parse(empty_bundle())
    built = learners.build({"name": learner, **settings}, DIM, Priors())
    entries = {role: opened.read(role) for role in ("backbone", "classes", "probe", "card")}
    entries["learner"] = files.tensor_bytes(*learners.pack(built))
    if built.class_statistics() is None:
        entries["statistics"] = files.tensor_bytes({k: t.numpy() for k, t in ClassStatistics(DIM).state().items()})
    manifest = {**opened.manifest, "learner": {"name": learner, "settings": settings}}
    empty = bundles.parse(bundles.pack(manifest, {bundles.ROLES[r]: (r, data) for r, data in entries.items()}))
    if not classes:
        return empty
    taught = Device(empty, "workstation").learn({name: vectors(name, 20, 99) for name in list(CENTRES)[:classes]})
    return bundles.parse(packed(empty, taught.state))


def packed(base: Bundle, state: DeviceState) -> bytes:
    """Return a state as the bytes of a bundle."""
    contents = state.contents()
    entries = {role: contents[path] for role, path in bundles.ROLES.items() if path in contents}
    entries["backbone"] = base.read("backbone")
    manifest = {**base.manifest, "classes": state.registry.names}
    return bundles.pack(manifest, {bundles.ROLES[role]: (role, data) for role, data in entries.items()})


def write(bundle: Bundle, path: Path, **changed: object) -> Path:
    """Write a bundle, with some keys of its manifest changed."""
    entries = {bundles.ROLES[role]: (role, bundle.read(role)) for role in bundle.roles}
    bundles.write(path, bundles.pack({**bundle.manifest, **changed}, entries))
    return path


def export(device: Device, common: Bundle, folder: Path) -> Path:
    """Write what `device export` would."""
    facts = {"installation": device.state.bundle.installation, "merged": [], "generation": device.generation}
    opened = bundles.parse(packed(common, device.state))
    return write(opened, folder / f"{device.name}.ssdedge", device={**facts, "bundle_sha256": common.sha256})
