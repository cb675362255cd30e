"""Ridge regression on one-hot targets."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ssd_edge.config import setting
from ssd_edge.learners.closed_form.linear import PER_CLASS, LinearLearner
from ssd_edge.learners.closed_form.sums import ridge

STRENGTH = "λ; 0: chosen by generalised cross-validation on the statistics"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of ridge regression."""

    strength: float = setting(0.0, STRENGTH, minimum=0.0)
    per_class: bool = setting(False, PER_CLASS)


class Ridge(LinearLearner):
    """Exact ridge regression: equal to recursive least squares (analytic learning) over the same samples in any order.

    One-hot targets weight classes by their size, so a class with few images is rarely predicted next to large ones; use
    `slda` or `ncm` in that case.
    """

    name: ClassVar[str] = "ridge"
    display: str = "ridge"
    panel = True
    candidate = True
    Settings: ClassVar[type] = Settings

    def solve(self) -> tuple[Tensor, Tensor, dict[str, float]]:
        values, bias, strength = ridge(self.statistics, self.settings.strength)
        return values, bias, {"strength": strength}
