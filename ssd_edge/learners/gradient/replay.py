"""The memory of learners with replay: a fixed number of training samples, kept as embeddings.

`icarl` and `pmr` choose samples of each class, `der` a uniform sample of all.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.errors import BundleRefusedError, InputError
from ssd_edge.learners.base import LARGEST_COUNT, TensorSpec
from ssd_edge.learners.gradient import finetune
from ssd_edge.learners.gradient.finetune import FineTune
from ssd_edge.learners.priors import Priors


@dataclasses.dataclass(frozen=True)
class Settings(finetune.Settings):
    """Settings of a learner with replay."""

    memory: int = setting(2000, "total number of embeddings kept, as iCaRL's; REPLAY", minimum=1, maximum=1_000_000)

    def __post_init__(self) -> None:
        """Check fields against each other.

        Raises:
            InputError: a penalty is set.
        """
        if self.penalty != "none":
            raise InputError(
                f"learner.penalty is {self.penalty}, but this learner protects earlier classes by replay; omit it"
            )


class Replay(FineTune):
    """A ReLU MLP with stored samples.

    Attributes:
        exemplars: embeddings that are kept, ``(memory, D)``; unused rows are zero and follow the used ones.
        exemplar_rows: their classes, int64 ``(memory,)``, or -1.
    """

    baseline = False
    replay = True
    settings: Settings
    Settings: ClassVar[type] = Settings

    def _start(self, priors: Priors) -> None:
        super()._start(priors)
        memory = self.settings.memory
        self.exemplars = torch.zeros(memory, self.dim, device=self.device)
        self.exemplar_rows = torch.full((memory,), -1, device=self.device)

    @property
    def kept(self) -> Tensor:
        """Used places of the memory, bool ``(memory,)``."""
        return self.exemplar_rows >= 0

    def _begin(self, inputs: Tensor, labels: Tensor) -> None:
        self.places, self.draws = self.kept.nonzero().flatten(), self.generator(purpose=4)

    def _drawn(self, count: int) -> Tensor:
        """Draw places of stored samples for a step, int64 ``(count,)``; without any, ``(0,)``."""
        if not len(self.places):
            return self.places
        return self.places[torch.randint(len(self.places), (count,), generator=self.draws).to(self.device)]

    def _replayed(self, places: Tensor) -> Tensor:
        """Return the cross-entropy of stored samples."""
        return F.cross_entropy(self._forward(self.exemplars[places]), self.exemplar_rows[places])

    def _keep(self, exemplars: Tensor, rows: Tensor) -> None:
        """Replace the memory by embeddings ``(n, D)`` of the classes in `rows` ``(n,)``; n is at most `memory`."""
        self.exemplars = torch.zeros_like(self.exemplars)
        self.exemplars[: len(exemplars)] = exemplars
        self.exemplar_rows = torch.full_like(self.exemplar_rows, -1)
        self.exemplar_rows[: len(rows)] = rows

    def _drop(self, row: int) -> None:
        """Remove the samples of a class from the memory."""
        others = self.kept & (self.exemplar_rows != row)
        self._keep(self.exemplars[others], self.exemplar_rows[others])

    def _remove(self, row: int, approximately: bool) -> bool:
        if approximately:
            self._drop(row)
        return super()._remove(row, approximately)

    # ── the state ────────────────────────────────────────────────────────────────────────────────────
    def schema(self) -> dict[str, TensorSpec]:
        memory = self.settings.memory
        return {
            **super().schema(),
            "exemplars": TensorSpec((memory, "D"), "float32", "REPLAY: embeddings of training samples"),
            "exemplar_rows": TensorSpec(
                (memory,), "int64", "REPLAY: the class of each, or -1", least=-1, most=LARGEST_COUNT
            ),
        }

    def _check(self, state: dict[str, Tensor]) -> None:
        super()._check(state)
        rows = state["exemplar_rows"]
        kept: set[int] = set(rows[rows >= 0].tolist())
        learned: set[int] = set((state["seen"] == 1).nonzero().flatten().tolist())
        if not self._may_keep(kept, learned):
            raise BundleRefusedError(
                f"there are exemplars of the rows {sorted(kept)[:10]}, but those learned are {sorted(learned)[:10]}; "
                "restore the file"
            )
        if bool(state["exemplars"][rows < 0].any()):
            raise BundleRefusedError("an exemplar belongs to no class; restore the file")

    @staticmethod
    def _may_keep(kept: set[int], learned: set[int]) -> bool:
        """Return True if samples of the classes `kept` may be in memory when those in `learned` have been taught."""
        return kept <= learned

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "exemplars": self.exemplars, "exemplar_rows": self.exemplar_rows}

    def renumber(self, tensors: dict[str, Tensor], rows: Tensor) -> None:
        super().renumber(tensors, rows)
        tensors["exemplar_rows"] -= torch.searchsorted(rows, tensors["exemplar_rows"])  # -1 stays -1

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.exemplars, self.exemplar_rows = (tensors[name].to(self.device) for name in ("exemplars", "exemplar_rows"))
