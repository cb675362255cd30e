"""What a device knows: everything in a generation but the backbone, read and written together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from device_runtime.learning.unknown import Rejector
from ssd_edge import files, learners
from ssd_edge.classes import ClassRegistry
from ssd_edge.errors import BundleRefusedError, GateRefusedError
from ssd_edge.learners.closed_form.sums import ClassStatistics


@dataclasses.dataclass(frozen=True)
class DeviceState:
    """The parts of one state; they speak of the same classes, in the same rows.

    Attributes:
        registry: the classes.
        learner: that answers. To be taught only where it is nobody else's.
        statistics: of the embeddings of the classes.
        rejector: tells what is none of them.
        facts: device.json: what the bundle said besides tensors.
        probe: bytes of the bundle's probe, see `selftest`.
        card: bytes of the bundle's model card.
    """

    registry: ClassRegistry
    learner: learners.Learner
    statistics: ClassStatistics
    rejector: Rejector
    facts: dict[str, Any]
    probe: bytes
    card: bytes

    def check(self) -> None:
        """Refuse parts that do not belong together.

        Raises:
            BundleRefusedError: with the numbers that disagree.
        """
        rows = len(self.registry)
        learned, counted = len(self.learner.seen), len(self.statistics.counts)
        if (learned, counted, len(self.rejector.thresholds)) != (rows, rows, rows):
            raise BundleRefusedError(
                f"the registry names {rows} classes, but the learner knows {learned}, the statistics {counted} and the "
                f"thresholds for 'unknown' {len(self.rejector.thresholds)}; deploy the bundle again"
            )

    def contents(self) -> dict[str, bytes]:
        """File name → bytes, for `Generations.commit`; `read` is the inverse, bit for bit."""
        arrays = {name: tensor.numpy() for name, tensor in self.statistics.state().items()}
        return {
            "learner.safetensors": files.tensor_bytes(*learners.pack(self.learner)),
            "statistics.safetensors": files.tensor_bytes(arrays),
            "unknown.safetensors": files.tensor_bytes(self.rejector.state()),
            "classes.json": files.json_bytes(self.registry.to_json()),
            "device.json": files.json_bytes(self.facts),
            "probe.safetensors": self.probe,
            "MODEL_CARD.md": self.card,
        }

    def replace(self, **parts: Any) -> DeviceState:
        """With other parts in place of some."""
        return dataclasses.replace(self, **parts)

    @classmethod
    def read(cls, read: Callable[[str], bytes]) -> DeviceState:
        """The inverse of `contents`, with a learner and statistics of its own.

        Args:
            read: file name → bytes, such as `Generation.read`.

        Raises:
            BundleRefusedError: a file is damaged, or they do not belong together.
        """

        def tensors(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            return files.parse_tensors(read(name), name)

        found = cls(
            ClassRegistry.from_json(files.parse_json(read("classes.json"), "classes.json")),
            learners.restore(*tensors("learner.safetensors")),
            restore_statistics(tensors("statistics.safetensors")[0]),
            Rejector.from_state(tensors("unknown.safetensors")[0]),
            files.parse_json(read("device.json"), "device.json"),
            read("probe.safetensors"),
            read("MODEL_CARD.md"),
        )
        found.check()
        return found

    def verified_contents(self) -> tuple[dict[str, bytes], DeviceState]:
        """`contents`, and what a restart will read from them: the same answers, or they must not be committed.

        Raises:
            GateRefusedError: they are not.
        """
        contents = self.contents()
        again = DeviceState.read(contents.__getitem__)
        arrays, _ = files.parse_tensors(self.probe, "probe.safetensors")
        vectors = torch.from_numpy(arrays["embeddings"])
        if len(self.registry) and not torch.equal(self.learner.scores(vectors), again.learner.scores(vectors)):
            raise GateRefusedError(
                "after a restart the learner would answer otherwise than now, or with what is no number; nothing was "
                "changed. This is a defect of ssd-edge; please report it"
            )
        return contents, again


def restore_statistics(arrays: Mapping[str, np.ndarray]) -> ClassStatistics:
    """The statistics of a bundle or generation.

    Raises:
        BundleRefusedError: they are damaged.
    """
    try:
        return ClassStatistics.from_state({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    except (KeyError, RuntimeError, IndexError) as error:
        raise BundleRefusedError(f"the class statistics are damaged ({error}); deploy the bundle again") from error
