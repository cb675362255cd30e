"""Ridge regression on one-hot targets."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.learners.closed_form.linear import PER_CLASS, LinearLearner
from ssd_edge.learners.closed_form.sums import ridge

STRENGTH = "λ; 0: by generalised cross-validation from the statistics"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of ridge regression."""

    strength: float = setting(0.0, STRENGTH, minimum=0.0)
    per_class: bool = setting(False, PER_CLASS)


class Ridge(LinearLearner):
    """Exact and order-invariant: what recursive least squares (RLS, analytic learning) ends at over the same samples.

    One-hot targets weigh classes by their size, so a class taught with few images beside large ones is hardly
    ever predicted: for that use `landmark`, `slda` or `ncm`.
    """

    name: ClassVar[str] = "ridge"
    display: str = "ridge"
    panel = True
    candidate = True
    Settings: ClassVar[type] = Settings

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        values, bias, strength = ridge(self.statistics, self.settings.strength)
        return values, bias, {"strength": strength}
