"""The runner: selection and order of cells, and error handling."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from ssd_edge.report.terminal import Console
from ssd_edge.reproduction import cells, runner
from ssd_edge.reproduction.runner import Request, wanted
from ssd_edge.reproduction.sources import Sources
from ssd_edge.reproduction.specs import chosen, streams

pytestmark = pytest.mark.usefixtures("one_thread")


def request_for(*ids: str, budget: str | None = "smoke", orders: int | None = None, out: Path = Path("out")) -> Request:
    return Request(chosen(ids), budget, orders, 1, out)


def test_each_cell_runs_once_and_the_first_order_runs_first() -> None:
    setups = wanted(request_for("T1", "T2", "T3", budget="reduced"))
    keys = [setup.key() for setup in setups]
    assert len(set(keys)) == len(keys)
    assert [setup.order for setup in setups] == sorted(setup.order for setup in setups)
    names = [setup.learner["name"] for setup in setups if setup.stream == "cifar10" and setup.order == 0]
    # the six systems of T1 (four are also in T2), four more of T2, and one shared upper bound
    assert sorted(names) == ["finetune"] * 2 + ["joint"] + ["sdmlp"] * 4 + ["ssd"] * 4


def test_rows_of_the_paper_run_with_the_published_schedule_unless_it_takes_days() -> None:
    setups = wanted(request_for("T1", "controls", budget=None))
    lengths = {(setup.learner["name"], setup.learner.get("neurons")): setup.learner.get("epochs") for setup in setups}
    assert (lengths["ssd", 10_000], lengths["ssd", 1000], lengths["finetune", 1000]) == (2000, 40, 40)
    orders = {setup.order for setup in setups if setup.learner.get("epochs") == 2000}
    assert len(orders) == 5


def test_sizes_share_their_upper_bound() -> None:
    setups = wanted(request_for("T1", "T2", budget="full", orders=1))
    bounds = [setup.learner["neurons"] for setup in setups if setup.learner["name"] == "joint"]
    assert bounds == [1000] * 3  # on three streams


def run(request: Request) -> tuple[object, str]:
    stream = io.StringIO()
    error = runner.run(request, Console(stream))
    return error, stream.getvalue()


@pytest.mark.parametrize(("codes", "worst"), [((0, 2, 0), 2), ((5, 2, 0), 5), ((5, 1, 2), 1)])
def test_a_failed_cell_does_not_stop_the_others(codes: tuple, worst: int, tmp_path: Path, monkeypatch) -> None:
    left = iter(codes)
    monkeypatch.setattr(runner, "attempt", lambda job: runner.Outcome(next(left), "a message", 1.0))
    error, output = run(request_for("T3", out=tmp_path))
    assert error.exit_code == worst
    failed = sum(code > 0 for code in codes)
    assert str(error) == f"{failed} of 3 cells failed, see above; all others are stored"
    assert output.count("FAILED, a message") == failed
    assert "[3/3]" in output


def test_cells_without_their_backbone_are_skipped_with_a_message(tmp_path: Path, monkeypatch) -> None:
    stream = streams()["tiny-imagenet"]
    (tmp_path / stream.data).write_bytes(b"never read")
    monkeypatch.setenv("SSD_EDGE_DATA", str(tmp_path))
    error, output = run(request_for("A1", out=tmp_path))
    assert error is None
    assert "tiny-imagenet: skipped, because it needs a backbone that has not seen its classes" in output
    assert "0 cells" in output
    (tmp_path / "backbones" / "tiny-100").mkdir(parents=True)
    sources = Sources(torch.device("cpu"), Console(io.StringIO()))
    assert sources.tiny_backbone == tmp_path / "backbones" / "tiny-100"


def test_counts_are_of_stored_cells(tmp_path: Path) -> None:
    (experiment,) = chosen(("T3",))
    setup = cells.setups(experiment, experiment.systems[0], "cifar10", "reduced")[1]
    made = cells.spec(setup, cells.Provenance("data", "backbone"))
    cells.write(tmp_path / cells.file_name(made), {"spec": made, "stand_in": False})
    store = cells.Store(tmp_path)
    assert cells.counts(experiment, "reduced", store) == (1, 6)
    assert cells.counts(experiment, "full", store) == (0, 10)
