"""`ssd`, the default learner: SDMLP keys and sparse code, values in closed form.

Trained by gradients to the letter of the paper, one softmax head forgets: every new class pushes down the
rows of the old ones. Here the values are not trained but solved after each task from sufficient statistics
of the Top-K code, which no later task can spoil while the keys stand still. In this version they stay as
pretrained; the Top-n table is kept from the first day, because it says which keys carry the statistics.

The values are a linear discriminant with equal class priors rather than ridge on one-hot targets: as
accurate on balanced classes, and the only one of the two that ever predicts a class taught with twenty
images beside classes taught with thousands (figures: docs/method.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.distillation import TopNTable, select
from ssd_edge.errors import InputError
from ssd_edge.learners.base import Progress, Task, TensorSpec
from ssd_edge.learners.linear import PER_CLASS, LinearLearner
from ssd_edge.priors import Priors
from ssd_edge.sdmlp import prepare, unit_rows
from ssd_edge.statistics import discriminant
from ssd_edge.topk import inhibit


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the default learner."""

    neurons: int = setting(1000, "r, the number of keys; the state grows with r²/2", minimum=4, maximum=20000)
    k: int = setting(0, "active neurons at the read-out; 0: half of r, where accuracy is flat", minimum=0)
    keys: Literal["pretrained", "random"] = setting("pretrained", "random where the backbone brings none of this size")
    skip: bool = setting(True, "the unit embedding beside the code: what is linear in it needs no neurons")
    top_n: int = setting(100, "neurons listed in the Top-n table", minimum=1)
    per_class: bool = setting(False, PER_CLASS)

    def __post_init__(self) -> None:
        """Check what one field says against another."""
        if self.k >= self.neurons:
            raise InputError(f"learner.k must be below learner.neurons, but is {self.k} of {self.neurons}")
        if self.top_n > self.neurons:
            raise InputError(f"learner.top_n must be at most learner.neurons, but is {self.top_n} of {self.neurons}")


class SSD(LinearLearner):
    """Sparse Top-K code of signed unit inputs, and the inputs themselves; values solved in closed form.

    Attributes:
        frequencies: share of the last task's samples that each neuron answered, ``(r,)``. They describe that task
            alone, so removing a class leaves them, and merging takes over none of the other learner's.
    """

    name: ClassVar[str] = "ssd"
    display: str = "SSD"
    Settings: ClassVar[type] = Settings

    def __init__(
        self, dim: int, settings: Any, priors: Priors, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(dim, settings, priors, seed, device)
        pretrained = priors.code_keys
        if settings.keys == "pretrained" and pretrained is not None and pretrained.shape == (settings.neurons, dim):
            keys = torch.from_numpy(pretrained)
        else:
            generator = torch.Generator().manual_seed(seed)
            keys = unit_rows(torch.randn(settings.neurons, dim, generator=generator))
            if settings.keys == "pretrained":
                wanted = f"{settings.neurons:,} pretrained keys of this kind"
                self.note = f"the backbone brings no {wanted}; random ones are used"
        self.keys = keys.to(self.device)
        self.k = settings.k or max(1, settings.neurons // 2)
        self.frequencies = torch.zeros(settings.neurons)

    def feature_count(self) -> int:
        return self.settings.neurons + (self.dim if self.settings.skip else 0)

    def features(self, embeddings: Tensor) -> Tensor:
        """The code ``(N, r)``, with the unit embedding behind it: ``(N, r + D)``."""
        x = prepare(embeddings, None)
        code = inhibit(x @ self.keys.T, self.k).to_dense()
        return torch.cat([code, x], dim=1) if self.settings.skip else code

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        statistics = self.statistics
        freedom = max(statistics.freedom, 1.0)
        covariance = statistics.scatter_within() / freedom
        values, bias = discriminant(statistics.means, statistics.counts, covariance, freedom, unbiased=True)
        return values, bias, {}

    def _learn(self, task: Task, progress: Progress) -> dict[str, float]:
        self.active = torch.zeros(self.settings.neurons, dtype=torch.int64, device=self.device)
        measured = super()._learn(task, progress)
        self.frequencies = (self.active / len(task.labels)).cpu()
        return measured

    def observe(self, features: Tensor) -> None:
        self.active += (features[:, : self.settings.neurons] > 0).sum(0)

    @property
    def top_n(self) -> TopNTable:
        """The neurons that answered most often in the last task."""
        return select(self.frequencies, self.settings.top_n)

    def _common(self) -> dict[str, Any]:
        return {**super()._common(), "the keys": self.keys}

    def schema(self) -> dict[str, TensorSpec]:
        neurons = self.settings.neurons
        return {
            **super().schema(),
            "keys": TensorSpec((neurons, "D"), "float32", "W1, the addresses"),
            "frequencies": TensorSpec((neurons,), "float32", "how often each neuron answered in the last task"),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "keys": self.keys, "frequencies": self.frequencies}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        super()._load(tensors)
        self.keys, self.frequencies = tensors["keys"].to(self.device), tensors["frequencies"]
