"""The state of a device: everything in a generation except the backbone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from device_runtime.install.installed import InstalledBundle
from ssd_edge import bundle as bundles
from ssd_edge import files, learners
from ssd_edge.answers.graph import EMBEDDINGS, HeadGraph
from ssd_edge.answers.head import MOST_BYTES, NAME, Head
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, GateRefusedError, InputError, printable
from ssd_edge.learners.closed_form.linear import restore_statistics
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.retention import TrackRecord
from ssd_edge.learners.unknown import Rejector

ROUNDING = 1e-4  # of the largest score: sums of float32 in another order


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

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the scores that the learner gives embeddings ``(N, D)``, float32 ``(N, C)``."""
        scores: np.ndarray = self.learner.scores(torch.from_numpy(embeddings))[:, : len(self.registry)].numpy()
        return scores

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

    def head(self) -> Head:
        """Return what answers instead of the learner, where PyTorch is not needed or not installed.

        Raises:
            GateRefusedError: It gives other scores than the learner.
        """
        learner, classes, found = self.learner, len(self.registry), self.record.temperatures()
        temperatures = None if found is None else found.numpy()
        size = learner.memory_bytes()
        head = Head(learner.name, learner.replay, size, classes, learner.dim, temperatures)
        if not classes:
            return head
        graph, scores = HeadGraph(learner.display, classes, MOST_BYTES), None
        try:
            with torch.no_grad():
                scores = learner.write_head(graph, EMBEDDINGS)
        except InputError as error:  # too large, or not finite, which `verified_contents` refuses
            return dataclasses.replace(head, without=str(error))
        if scores is None:
            return dataclasses.replace(head, without=f"the scores of '{learner.name}' cannot be written as a graph")
        head = head.with_graph(graph, scores)
        self._check_head(head)
        return head

    def _check_head(self, head: Head) -> None:
        """Compare the scores of a head with those of the learner on the probe images."""
        vectors = files.parse_tensors(self.probe, "probe.safetensors")[0]["embeddings"]
        wanted, found = self.scores(vectors), head.score(vectors)
        away = np.abs(found - wanted).max(1, initial=0.0) > ROUNDING * np.abs(wanted).max(initial=1.0)
        # Of neurons that are equally active, another may be among the K strongest.
        if bool((away & (found.argmax(1) != wanted.argmax(1))).any()):
            raise GateRefusedError(
                "the learner would answer otherwise without PyTorch; nothing was changed. This is a bug in ssd-edge, "
                "please report it"
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
            NAME: self.head().to_bytes(),
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
