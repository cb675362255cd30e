"""The state of a device: everything in a generation except the backbone."""

from __future__ import annotations

import copy
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from device_runtime.backbone.interface import BackboneSpec
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError, printable
from ssd_edge.images import Pixels
from ssd_edge.learners.closed_form.linear import restore_statistics
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector

_NOT_KEPT = ("format", "version", "files", "device")  # keys of a bundle's manifest


@dataclasses.dataclass(frozen=True)
class InstalledBundle:
    """Facts about the bundle that was installed, the content of ``device.json``.

    Attributes:
        name: Name of the bundle.
        release: Its release.
        target: The target it was prepared for.
        size: Side of the backbone's input in pixels.
        dim: Number of features of an embedding.
        precision: Precision of the backbone.
        bundle_sha256: SHA-256 of the bundle.
        signed_by: Id of the key that signed it; None if it is unsigned.
        installation: Random id of this installation.
        merged: Ids of the installations that were merged into this one.
        manifest: Manifest of the bundle, without its list of files.
    """

    name: str
    release: int
    target: str
    size: int
    dim: int
    precision: str
    bundle_sha256: str
    signed_by: str | None
    installation: str
    merged: tuple[str, ...]
    manifest: Mapping[str, Any]

    @property
    def pixels(self) -> Pixels:
        """How images become the input of the backbone."""
        return Pixels.from_dict(self.manifest["backbone"])

    def backbone_spec(self, sha256: str) -> BackboneSpec:
        """Return the specification of the backbone with this digest."""
        return BackboneSpec(sha256, self.size, self.dim, self.precision, self.target)

    @classmethod
    def of(cls, opened: bundles.Bundle, signed_by: str | None) -> InstalledBundle:
        """Return what a device keeps about a bundle, with a new installation id."""
        manifest = opened.manifest
        backbone = manifest["backbone"]
        return cls(
            name=manifest["name"],
            release=manifest["release"],
            target=manifest["target"],
            size=backbone["size"],
            dim=backbone["dim"],
            precision=backbone["precision"],
            bundle_sha256=opened.sha256,
            signed_by=signed_by,
            installation=secrets.token_hex(8),
            merged=(),
            manifest={key: value for key, value in manifest.items() if key not in _NOT_KEPT},
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> InstalledBundle:
        """Restore from the content of ``device.json``.

        Raises:
            BundleRefusedError: A field is missing, unknown or wrong.
        """
        try:
            bundle = cls(**{**value, "merged": tuple(value["merged"])})
            if bundle.pixels.size != bundle.size:
                raise ValueError(f"size is {bundle.size!r:.20}, but the manifest says {bundle.pixels.size}")
        except (TypeError, KeyError, ValueError, InputError) as error:
            raise BundleRefusedError(f"device.json is damaged ({error}); install the bundle again") from error
        return bundle

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``device.json``."""
        return {**vars(self), "merged": list(self.merged)}


@dataclasses.dataclass(frozen=True)
class DeviceState:
    """Classes, learner and thresholds of a device. All parts refer to the same classes, in the same rows.

    Attributes:
        registry: The classes.
        learner: The learner. Copy it with `copy_learner` before teaching it.
        counted: Statistics of the embeddings of each class, if the learner does not hold them; see `statistics`.
        rejector: Thresholds for ``unknown``.
        record: Held-out results of each class.
        bundle: The installed bundle.
        probe: Bytes of the bundle's probe, see `selftest`.
        card: Bytes of the bundle's model card.
    """

    registry: ClassRegistry
    learner: learners.Learner
    counted: ClassStatistics | None
    rejector: Rejector
    record: TrackRecord
    bundle: InstalledBundle
    probe: bytes
    card: bytes

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of the embeddings of each class; those of the learner if it holds them."""
        held = self.learner.class_statistics() if self.counted is None else self.counted
        if held is None:
            raise BundleRefusedError(
                f"the learner '{self.learner.name}' needs class statistics beside it, but there are none; deploy the "
                "bundle again"
            )
        return held

    def with_learner(self, learner: learners.Learner, change: Callable[[ClassStatistics], object]) -> DeviceState:
        """Return a copy with another learner.

        Args:
            learner: The learner after a change.
            change: Makes the same change to class statistics that the learner does not hold.
        """
        counted = None if self.counted is None else self.counted.copy()
        if counted is not None:
            change(counted)
        return dataclasses.replace(self, learner=learner, counted=counted)

    def check(self) -> None:
        """Check that all parts are about the same classes and features.

        Raises:
            BundleRefusedError: They are not.
        """
        rows = len(self.registry)
        learned, counted = len(self.learner.seen), len(self.statistics.counts)
        limited, tested = len(self.rejector.thresholds), len(self.record.tested)
        if (learned, counted, limited, tested) != (rows, rows, rows, rows):
            raise BundleRefusedError(
                f"the registry has {rows} classes, but the learner has {learned}, the statistics {counted}, the "
                f"thresholds for 'unknown' {limited} and the held-out results {tested}; deploy the bundle again"
            )
        images, counts = [entry.images for entry in self.registry.entries], self.statistics.counts.tolist()
        if counts != images or 0 in images or not bool(self.learner.seen.all()):
            raise BundleRefusedError(
                f"the registry counts {_short(images)} images, the statistics {_short(counts)}, and the learner has "
                f"learned {int(self.learner.seen.sum())} of {rows} classes; deploy the bundle again"
            )
        dims = [
            self.learner.dim, self.statistics.sums.shape[1], self.rejector.whitening.dim, self.record.anchors.shape[1]
        ]  # fmt: skip
        if dims != [self.bundle.dim] * 4:
            raise BundleRefusedError(
                f"the backbone gives {self.bundle.dim} features, but learner, statistics, thresholds for 'unknown' and "
                f"held-out results have {dims[0]}, {dims[1]}, {dims[2]} and {dims[3]}; deploy the bundle again"
            )

    def contents(self) -> dict[str, bytes]:
        """Return file name → bytes for `Generations.commit`; `read` restores them bit for bit."""
        counted = {}
        if self.counted is not None:
            arrays = {name: tensor.numpy() for name, tensor in self.counted.state().items()}
            counted["statistics.safetensors"] = files.tensor_bytes(arrays)
        return {
            "learner.safetensors": files.tensor_bytes(*learners.pack(self.learner)),
            **counted,
            "unknown.safetensors": files.tensor_bytes(self.rejector.state()),
            "record.safetensors": files.tensor_bytes(self.record.state()),
            "classes.json": files.json_bytes(self.registry.to_json()),
            "device.json": files.json_bytes(self.bundle.to_json()),
            "probe.safetensors": self.probe,
            "MODEL_CARD.md": self.card,
        }

    def replace(self, **parts: Any) -> DeviceState:
        """Return a copy with some parts replaced."""
        return dataclasses.replace(self, **parts)

    @classmethod
    def read(cls, read: Callable[[str], bytes]) -> DeviceState:
        """Restore a state from the files of `contents`.

        Args:
            read: File name → bytes, such as `Generation.read`.

        Raises:
            BundleRefusedError: A file is damaged, or the files do not belong together.
        """

        def tensors(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            return files.parse_tensors(read(name), name)

        bundle = InstalledBundle.from_json(files.parse_json(read("device.json"), "device.json"))
        learner, counted = learners.restore(*tensors("learner.safetensors"), dim=bundle.dim), None
        if learner.class_statistics() is None:
            counted = restore_statistics(tensors("statistics.safetensors")[0], bundle.dim)
        state = cls(
            ClassRegistry.from_json(files.parse_json(read("classes.json"), "classes.json")),
            learner,
            counted,
            Rejector.from_state(tensors("unknown.safetensors")[0]),
            TrackRecord.from_state(tensors("record.safetensors")[0]),
            bundle,
            read("probe.safetensors"),
            read("MODEL_CARD.md"),
        )
        state.check()
        return state

    @classmethod
    def of_bundle(cls, opened: bundles.Bundle, signed_by: str | None = None) -> DeviceState:
        """Return the state in a bundle, as installing it makes it.

        A bundle without thresholds for ``unknown`` or held-out results gets those that follow from its statistics.

        Args:
            opened: The bundle.
            signed_by: Id of the key that signed it.

        Raises:
            BundleRefusedError: Its learner, statistics, thresholds or classes are damaged or do not belong together.
        """
        bundle = InstalledBundle.of(opened, signed_by)
        # First: the number of features, which sizes what a learner draws from its seed, is that of these tensors.
        counted = None
        if "statistics" in opened.roles:
            counted = restore_statistics(opened.tensors("statistics")[0], bundle.dim)
        learner = learners.restore(*opened.tensors("learner"), dim=bundle.dim)
        if learner.name != opened.manifest["learner"]["name"]:
            raise BundleRefusedError(
                f"the bundle contains the learner '{learner.name}', but its manifest says "
                f"'{printable(opened.manifest['learner']['name'])[:40]}'; deploy it again"
            )
        statistics = learner.class_statistics() if counted is None else counted
        if statistics is None or (counted is not None and learner.class_statistics() is not None):
            wrong = "needs class statistics, but the bundle has no" if statistics is None else (
                "holds class statistics, and the bundle has others in"
            )  # fmt: skip
            raise BundleRefusedError(
                f"the learner '{learner.name}' {wrong} {bundles.ROLES['statistics']}; deploy it again"
            )
        if "unknown" in opened.roles:
            rejector = Rejector.from_state(opened.tensors("unknown")[0])
        else:
            rejector = Rejector.fit(statistics)
        if "record" in opened.roles:
            record = TrackRecord.from_state(opened.tensors("record")[0])
        else:
            untested = torch.zeros(len(statistics.counts))
            record = TrackRecord.of(learner, statistics, untested, untested, untested)
        probe, card = opened.read("probe"), opened.read("card")
        state = cls(opened.registry, learner, counted, rejector, record, bundle, probe, card)
        state.check()
        return state

    def verified_contents(self) -> tuple[dict[str, bytes], DeviceState]:
        """Return `contents`, and the state read back from them after checking that it gives identical scores.

        Raises:
            GateRefusedError: It does not.
        """
        contents = self.contents()
        restored = DeviceState.read(contents.__getitem__)
        arrays, _ = files.parse_tensors(self.probe, "probe.safetensors")
        vectors = torch.from_numpy(arrays["embeddings"])
        if len(self.registry) and not torch.equal(self.learner.scores(vectors), restored.learner.scores(vectors)):
            raise GateRefusedError(
                "the learner would give other scores after a restart, or NaN; nothing was changed. This is a bug in "
                "ssd-edge, please report it"
            )
        return contents, restored


def copy_learner(learner: learners.Learner) -> learners.Learner:
    """Return an independent copy of a learner that gives bit-identical scores."""
    return copy.deepcopy(learner)


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:10]) + (", …" if len(values) > 10 else "") or "no"
