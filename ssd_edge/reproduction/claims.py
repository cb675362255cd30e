"""The paper's claims, each a difference of two rows, and what the stored results say about it.

A claim *holds* if the difference has the paper's sign, a paired t-test over class orders gives p < 0.05, and it is at
least half as large as in the paper; it holds *in direction* if it is smaller than that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from ssd_edge.config import read_yaml
from ssd_edge.report.wording import points
from ssd_edge.reproduction.rows import Comparison, Row, compare, mean
from ssd_edge.reproduction.specs import FOLDER, build, experiments

LEVEL = 0.05
SAME_SIZE = 0.5  # share of the paper's difference above which a claim holds
NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper: the first row is better than the second.

    Attributes:
        text: The claim.
        experiment: Experiment with both rows.
        stream: Name in streams.yaml.
        rows: Names of the two systems.
        measure: ``accuracy`` or ``backward_transfer``.
        paper: Published difference; None for a control that the paper leaves out.
    """

    text: str
    experiment: str
    stream: str
    rows: tuple[str, str]
    paper: float | None = None
    measure: str = "accuracy"


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Return the claims in claims.yaml, in order."""
    listed = read_yaml(FOLDER / "claims.yaml")["claims"]
    return tuple(build(Claim, {**values, "rows": tuple(values["rows"])}, "claims.yaml") for values in listed)


def verdict(comparison: Comparison, paper: float | None) -> str:
    """Return in a few words what a comparison says about a published difference."""
    differences = comparison.differences
    if not differences:
        return NOT_RUN
    if len(differences) == 1:
        return "one order proves nothing"
    if comparison.p is None or comparison.p >= LEVEL:
        return "no difference shown"
    found = mean(differences) or 0.0
    if paper is None:
        return "better" if found > 0 else "worse"
    if found * paper < 0:
        return "**the opposite**"
    return "**holds**" if abs(found) >= SAME_SIZE * abs(paper) else "holds in direction"


def line(claim: Claim, by_budget: Mapping[str, list[Row]]) -> list[str]:
    """Return the cells of a claim: its text, the paper's and our difference, class orders and budget, p, the verdict.

    Args:
        claim: The claim.
        by_budget: Rows of its experiment on its stream, longest budget first; the first with both rows counts.
    """
    names = [system.name for system in experiments()[claim.experiment].systems]
    first, second = (names.index(name) for name in claim.rows)
    paper = points(claim.paper, signed=True)
    found: dict[str, Comparison] = {}
    for budget, table in by_budget.items():
        comparison = compare(table[first], table[second], claim.measure)
        if comparison.differences and budget != "smoke":
            found[budget] = comparison
    # a single order counts only if there is nothing better
    best = next((name for name, one in found.items() if len(one.differences) > 1), next(iter(found), None))
    if best is None:
        return [claim.text, paper, "–", "–", "–", NOT_RUN]
    chosen = found[best]
    p = "–" if chosen.p is None else "< 0.001" if chosen.p < 0.001 else f"{chosen.p:.3f}"
    ours = points(mean(chosen.differences), signed=True)
    return [claim.text, paper, ours, f"{len(chosen.differences)}, {best}", p, verdict(chosen, claim.paper)]
