"""Claims of the paper compared with stored results."""

from __future__ import annotations

import pytest

from ssd_edge.reproduction.claims import NOT_RUN, Claim, claims, line, verdict
from ssd_edge.reproduction.rows import Comparison, Row
from ssd_edge.reproduction.specs import experiments


@pytest.mark.parametrize(
    ("differences", "p", "paper", "words"),
    [
        ([], None, 0.1, NOT_RUN),
        ([0.1], None, 0.1, "one order proves nothing"),
        ([0.1, 0.1], None, 0.1, "no difference shown"),  # no spread, so no test
        ([0.1, 0.0], 0.05, 0.1, "no difference shown"),
        ([0.05, 0.05], 0.01, 0.1, "**holds**"),
        ([0.04, 0.05], 0.01, 0.1, "holds in direction"),
        ([-0.3, -0.3], 0.01, 0.1, "**the opposite**"),
        ([-0.3, -0.3], 0.01, -0.1, "**holds**"),
        ([0.3, 0.3], 0.01, None, "better"),
        ([-0.3, -0.3], 0.01, None, "worse"),
    ],
)
def test_the_verdict(differences: list[float], p: float | None, paper: float | None, words: str) -> None:
    assert verdict(Comparison(differences, 1.0, p), paper) == words


def test_every_claim_names_rows_of_its_experiment() -> None:
    for claim in claims():
        experiment = experiments()[claim.experiment]
        assert claim.stream in experiment.streams
        systems = {system.name: system for system in experiment.systems}
        assert set(claim.rows) <= set(systems)
        values = [systems[name].reported.get(claim.stream) for name in claim.rows]
        if claim.paper is not None and None not in values:  # otherwise the paper has no such difference
            assert claim.paper == pytest.approx(values[0] - values[1], abs=1e-4)


def table(budget: str, accuracies: dict[str, list[float]]) -> list[Row]:
    """Return the rows of T3 with these accuracies, backward transfer being a tenth of them."""
    rows = []
    for system in experiments()["T3"].systems:
        results = {
            order: {"accuracy": value, "notes": [], "metrics": {"backward_transfer": value / 10}}
            for order, value in enumerate(accuracies.get(system.name, []))
        }
        rows.append(Row(system, "cifar10", budget, results, {}))
    return rows


CLAIM = Claim("SSD is better", "T3", "cifar10", ("SSD, k = 10", "SDMLP, k = 10"), 0.1)


def test_the_longest_budget_with_two_orders_counts() -> None:
    several = {"SSD, k = 10": [0.7, 0.72, 0.75], "SDMLP, k = 10": [0.6, 0.61, 0.66]}
    one = {"SSD, k = 10": [0.8], "SDMLP, k = 10": [0.9]}
    by_budget = {"full": table("full", one), "reduced": table("reduced", several)}
    text, paper, ours, where, p, words = line(CLAIM, by_budget)
    assert (text, paper, ours, where, words) == ("SSD is better", "+10.0", "+10.0", "3, reduced", "**holds**")
    assert 0 < float(p) < 0.05
    assert line(CLAIM, {"full": table("full", one)})[2:] == ["−10.0", "1, full", "–", "one order proves nothing"]
    assert line(CLAIM, {"full": table("full", {})})[2:] == ["–", "–", "–", NOT_RUN]


def test_a_claim_about_forgetting_compares_backward_transfer() -> None:
    several = {"SSD, k = 10": [0.7, 0.72, 0.75], "SDMLP, k = 10": [0.6, 0.61, 0.66]}
    claim = Claim("SSD forgets less", "T3", "cifar10", CLAIM.rows, 0.01, "backward_transfer")
    assert line(claim, {"full": table("full", several)})[2] == "+1.0"
