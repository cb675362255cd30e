"""The results page: content for hand-made results, and reproducible output."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ssd_edge.errors import BundleRefusedError
from ssd_edge.reproduction import cells, page
from ssd_edge.reproduction.rows import compare, rows
from ssd_edge.reproduction.specs import Experiment, System, experiments

DOCS = Path(__file__).resolve().parents[3] / "docs"
TABLE = Experiment(
    id="X",
    title="a table",
    place="Table 9",
    streams=("cifar10",),
    systems=(
        System("SDMLP", {"name": "sdmlp"}, reported={"cifar10": 0.71}),
        System("SSD", {"name": "ssd"}, reported={"cifar10": None}, note="a note of the row"),
        System("SLDA", {"name": "slda"}),
    ),
    paired=(("SSD", "SDMLP"),),
)
TRACE = Experiment(
    id="Y",
    title="a trace",
    streams=("cifar10",),
    systems=(System("SSD", {"name": "ssd"}),),
    metric="trace",
    figure="similarity",
    trace=40,
)
ACCURACIES = {"SDMLP": (0.60, 0.62, 0.64), "SSD": (0.65, 0.66, 0.70), "SLDA": (0.75,)}


def result(setup: cells.Setup, accuracy: float, **more: object) -> dict:
    versions = {"python": "3.11", "torch": "2"}
    environment = {"versions": versions, "machine": "a machine", "threads": 1, "git_sha": "abc", "device": "cpu"}
    return {
        "spec": cells.spec(setup, cells.Provenance("data", "backbone")),
        "stand_in": False,
        "accuracy": accuracy,
        "last_task_share": 0.3,
        "metrics": {"backward_transfer": -accuracy / 4, "learning_accuracy": 0.9},
        "notes": ["keys pretrained here"] if setup.learner["name"] == "ssd" else [],
        "environment": environment,
        "seconds": 12.3456,
        **more,
    }


def write_result(folder: Path, record: dict) -> None:
    cells.write(folder / cells.file_name(record["spec"]), record)


def stored(folder: Path) -> cells.Store:
    """Store three class orders of two systems and one of a third, with their upper bounds."""
    for system in TABLE.systems:
        asked = cells.setups(TABLE, system, "cifar10", "reduced")
        for setup, accuracy in zip(asked, ACCURACIES[system.name], strict=False):
            write_result(folder, result(setup, accuracy))
            write_result(folder, result(cells.upper_bound(setup), 0.93, metrics={}, notes=[]))
    return cells.Store(folder)


@pytest.fixture
def one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "experiments", lambda: {"X": TABLE})


@pytest.mark.usefixtures("one_table")
def test_the_table_of_hand_made_results(tmp_path: Path) -> None:
    text, drawn = page.render(stored(tmp_path))
    # 62.0 ± 2.0: (60, 62, 64). 67.0 ± 2.6: √((4 + 1 + 9)/2) = 2.65. 0.62/0.93 = 0.667. BWT −15.5 = −62/4.
    wanted = """## X: a table (Table 9)

| system | paper | ours | joint | ours ÷ joint | BWT | just learned | last task | budget |
|---|---|---|---|---|---|---|---|---|
| SDMLP | 71.0 | 62.0 ± 2.0 (3) | 93.0 | 0.67 | −15.5 | 90.0 | 30.0 | reduced |
| SSD [1, 2] | – | 67.0 ± 2.6 (3) | 93.0 | 0.72 | −16.8 | 90.0 | 30.0 | reduced |
| SLDA | – | 75.0 (1) | 93.0 | 0.81 | −18.8 | 90.0 | 30.0 | any |

- [1] a note of the row
- [2] keys pretrained here

Paired t-test of accuracy over class orders:

| stream | difference in points | by class order | mean | t | p, two-sided | budget |
|---|---|---|---|---|---|---|
| Split CIFAR-10 (5 × 2) | SSD − SDMLP | +5.0, +4.0, +6.0 | +5.0 | 8.66 | 0.013 | reduced |
"""
    assert wanted in text
    assert drawn == {}
    assert "SLDA 75.0, best SSD (SSD in X) 67.0; the closed-form head leads by 8.0 points" in text
    assert "| X | 1 of 15 | `ssd-edge reproduce X --budget full` |" in text  # SLDA does not depend on the schedule
    assert "| python 3.11, torch 2 | a machine | cpu | 1 | abc | 10 |" in text
    assert "12.3" not in text  # seconds differ from run to run


@pytest.mark.usefixtures("one_table")
def test_each_budget_has_its_own_row(tmp_path: Path) -> None:
    stored(tmp_path)
    write_result(tmp_path, result(cells.setups(TABLE, TABLE.systems[0], "cifar10", "full")[3], 0.7))
    lines = page.render(cells.Store(tmp_path))[0].splitlines()
    start = lines.index("## X: a table (Table 9)")
    cut = [line.strip("| ").split(" | ") for line in lines[start + 4 : start + 8]]
    shown = [(parts[0], parts[-1]) for parts in cut]
    assert shown == [("SDMLP", "full"), ("SDMLP", "reduced"), ("SSD [1, 2]", "reduced"), ("SLDA", "any")]


@pytest.mark.usefixtures("one_table")
def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    stored(tmp_path / "a" / page.RESULTS)
    page.write(tmp_path / "a")
    first = (tmp_path / "a" / "results.md").read_bytes()
    page.write(tmp_path / "a")
    assert (tmp_path / "a" / "results.md").read_bytes() == first
    assert page.render(cells.Store(tmp_path / "a" / page.RESULTS))[0].encode() == first


@pytest.mark.usefixtures("one_table")
def test_a_lead_of_ssd_is_reported(tmp_path: Path) -> None:
    stored(tmp_path)
    ssd = cells.setups(TABLE, TABLE.systems[1], "cifar10", "reduced")
    for setup in ssd:
        write_result(tmp_path, result(setup, 0.8))
    text, _ = page.render(cells.Store(tmp_path))
    assert "the closed-form head trails by 5.0 points" in text


@pytest.mark.usefixtures("one_table")
def test_a_missing_cell_is_a_dash(tmp_path: Path) -> None:
    text, _ = page.render(cells.Store(tmp_path))
    assert "| SDMLP | 71.0 | – | – | – | – | – | – | – |" in text
    assert "| X | 0 of 15 |" in text
    assert "Paired" not in text
    assert "closed-form head" not in text


@pytest.mark.usefixtures("one_table")
def test_smoke_results_are_shown_only_without_other_budgets(tmp_path: Path) -> None:
    smoke = cells.setups(TABLE, TABLE.systems[0], "cifar10", "smoke")[0]
    record = result(smoke, 0.123, stand_in=True, notes=["digits in place of CIFAR-10"])
    write_result(tmp_path, record)
    text, _ = page.render(cells.Store(tmp_path))
    assert "| SDMLP [1] | 71.0 | 12.3 (1) | – | – | −3.1 | 90.0 | 30.0 | smoke |" in text
    assert "- [1] digits in place of CIFAR-10" in text
    stored(tmp_path)
    assert "12.3" not in page.render(cells.Store(tmp_path))[0]


def test_the_paired_t_test_matches_the_closed_form(tmp_path: Path) -> None:
    table = {row.system.name: row for row in rows(TABLE, "cifar10", "reduced", stored(tmp_path))}
    comparison = compare(table["SSD"], table["SDMLP"])
    assert comparison.differences == pytest.approx([0.05, 0.04, 0.06])
    t = 0.05 / (0.01 / math.sqrt(3))
    assert comparison.t == pytest.approx(t)
    assert comparison.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form for two degrees of freedom
    assert compare(table["SLDA"], table["SDMLP"]).t is None  # only one order in common
    assert compare(table["SSD"], table["SSD"]).p is None  # no spread
    backwards = compare(table["SDMLP"], table["SSD"])
    assert (backwards.t, backwards.p) == (pytest.approx(-t), pytest.approx(comparison.p))


def test_backward_transfer_is_compared_as_the_paper_does(tmp_path: Path, monkeypatch) -> None:
    experiment = experiments()["T3"]
    monkeypatch.setattr(page, "experiments", lambda: {"T3": experiment})
    for system, transfer in zip(experiment.systems, (-0.1828, -0.1234), strict=True):
        setup = cells.setups(experiment, system, "cifar10", "reduced")[0]
        metrics = {"backward_transfer": transfer, "learning_accuracy": 0.9}
        write_result(tmp_path, result(setup, 0.7, metrics=metrics))
    text, _ = page.render(cells.Store(tmp_path))
    assert "| SDMLP, k = 10 | −18.3 | −18.3 (1) | 90.0 | 70.0 (1) | reduced |" in text
    assert "SSD, k = 10 forgets 32.5 % less than SDMLP, k = 10 (reduced budget)" in text


def test_entropies_are_means_over_tasks(tmp_path: Path, monkeypatch) -> None:
    experiment = experiments()["Ent"]
    monkeypatch.setattr(page, "experiments", lambda: {"Ent": experiment})
    setup = cells.setups(experiment, experiment.systems[0], "cifar10", "reduced")[0]
    neurons = {"activation_entropy": [0.01, 0.03], "activation_entropy_bound": [0.056, 0.056], "class_entropy": [0, 0]}
    write_result(tmp_path, result(setup, 0.7, neurons=neurons, neurons_overall={"class_entropy": 1.5}))
    text, _ = page.render(cells.Store(tmp_path))
    assert "| SDMLP, k = 10 | 0.99 | 0.0200 | – | 0.0560 | 1.5000 | – | reduced |" in text
    assert "| SSD, k = 10 | 0.003 | – | – | – | – | – | – |" in text


def test_traces_are_drawn_as_figures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(page, "experiments", lambda: {"Y": TRACE})
    asked = cells.setups(TRACE, TRACE.systems[0], "cifar10", "reduced")[0]
    points = [
        {
            "task": task, "epoch": epoch, "train_accuracy": 0.5 + 0.1 * epoch, "test_accuracy": [0.5, 0.25],
            "top": [3, 1], "jaccard": 0.5 if task else None, "subnetwork_cosine": 0.9 - 0.1 * epoch if task else None,
            "teacher_divergence": 0.1 * epoch if task else None,
        }
        for task in (0, 1) for epoch in (1, 2)
    ]  # fmt: skip
    write_result(tmp_path / page.RESULTS, result(asked, 0.7, trace=points))
    page.write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| SSD [1] | – | 70.0 (1) | 0.700 | 0.500 | 0.200 | 70.0 | reduced |" in text
    names = {path.name for path in (tmp_path / page.FIGURES).iterdir()}
    assert names == {f"y-cifar10-{part}.svg" for part in ("cosine", "jaccard", "divergence")}
    for name in names:
        assert f"(results/figures/{name})" in text
        ElementTree.parse(tmp_path / page.FIGURES / name)


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / page.RESULTS / "cifar10").mkdir(parents=True)
    (tmp_path / page.RESULTS / "cifar10" / "x.json").write_text("{")
    with pytest.raises(BundleRefusedError, match="not valid JSON"):
        page.write(tmp_path)


def test_the_stored_page_is_up_to_date() -> None:
    if not (DOCS / page.RESULTS).is_dir():
        pytest.skip(f"NOT RUN: there is no {DOCS / page.RESULTS}; make it with `ssd-edge reproduce`")
    text, drawn = page.render(cells.Store(DOCS / page.RESULTS))
    assert (DOCS / "results.md").read_text(encoding="utf-8") == text
    for name in drawn:
        assert (DOCS / page.FIGURES / name).is_file()
