"""Tests of the speed benchmark: its report, its table, and the contestants' common state."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch

from ssd_edge.cli.bench import lines
from ssd_edge.learners.gradient import epoch
from ssd_edge.run import bench

SMALL = bench.Size(cases=(bench.Case(120),), samples=256, epochs=2)


@pytest.fixture(scope="module")
def report() -> bench.Report:
    pytest.importorskip("numba")
    cases = (*SMALL.cases, bench.Case(120, "ewc"), bench.Case(120, open_switches=True))
    return bench.bench(dataclasses.replace(SMALL, cases=cases, curve=(150,), curve_epochs=3))


def test_one_json_object_with_ratios(report: bench.Report) -> None:
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for name in ("cpu_r120", "cpu_r120_all_threads", "cpu_r120_without_numba", "scores_r120"):
        assert read["ratios"][name] > 0
    assert {"memory_mib", "loading_seconds", "features", "machine", "versions", "threads"} <= read.keys()
    rows = dict(zip(("cpu_r120", "cpu_r120_ewc", "cpu_r120_open"), read["rows"], strict=True))
    for name, row in rows.items():
        seconds = row["seconds"]
        assert read["ratios"][name] == row["ratio"]
        assert row["ratio"] == pytest.approx(seconds["dense"]["sum"] / seconds["compiled"]["sum"])
        assert all(part["least"] <= part["median"] <= part["most"] for part in seconds.values())
        assert row["equal_predictions"] >= 0.995
        assert abs(row["accuracy"]["dense"] - row["accuracy"]["compiled"]) <= 0.002
    assert [row["penalty"] for row in read["rows"]] == ["none", "ewc", "none"]
    assert rows["cpu_r120"]["active"] <= 10 < rows["cpu_r120_open"]["active"]
    assert [point["neurons"] for point in read["curve"]] == [150]


def test_the_table_names_the_machine_and_every_ratio(report: bench.Report) -> None:
    table = "\n".join(lines(report))
    assert report.environment["machine"] in table
    assert report.environment["versions"]["torch"] in table
    assert f"{report.rows[0].compiled.ratio:.1f}x with one thread" in table
    assert "\n      150 " in table


def test_memory_is_measured_in_a_separate_process(report: bench.Report) -> None:
    held = report.memory
    if held is None:
        pytest.skip("this system does not report the peak of a process")
    assert held.all_scores == pytest.approx(10_000 * 120 * 4 / 2**20)
    assert 0 < held.on_top < held.peak
    assert "memory: learning a task" in "\n".join(lines(report))


@pytest.mark.slow
def test_a_task_takes_little_memory() -> None:
    pytest.importorskip("numba")
    held = bench.memory(10_000, 10_000)
    if held is None:
        pytest.skip("this system does not report the peak of a process")
    targets = 10_000 * (2 * bench.CLASSES * 4 + 10 * (12 + 8)) / 2**20  # logits, and the same as probabilities
    assert held.on_top < held.inputs + 2 * held.batch_scores + targets + 1  # MiB; pages


def test_without_numba_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "ssd_edge.learners.gradient.kernels", raising=False)
    report = bench.bench(SMALL)
    read = report.to_dict()
    assert read["ratios"]["cpu_r120"] is None
    assert read["ratios"]["cpu_r120_without_numba"] > 0
    assert read["rows"][0]["ratio"] is None
    assert "pip install 'ssd-edge[fast]'" in "\n".join(lines(report))


def test_all_contestants_end_in_the_same_state() -> None:
    first, second, _ = bench.synthetic(256)
    with bench.threads(1):
        race = bench.Race(bench.Case(120), first, second, 2)
        ways = {"dense": race.dense(), "touched": race.touched()}
        if epoch.kernels("auto") is not None:
            ways["compiled"] = race.compiled()
        seconds, ends = bench.timed(ways, 2)
    assert all(len(times) == 2 for times in seconds.values())
    for end in ends.values():
        torch.testing.assert_close(end.learner.net.keys, ends["dense"].learner.net.keys, rtol=0, atol=1e-4)
        assert not torch.equal(end.learner.net.keys, race.start.learner.net.keys)


def test_clustered_embeddings() -> None:
    embeddings, labels = bench.clustered(4000, (2, 5))
    again, other = bench.clustered(4000, (2, 5))[0], bench.clustered(4000, (2, 5), seed=1)[0]
    assert torch.equal(embeddings, again)
    assert not torch.equal(embeddings, other)
    assert labels.unique().tolist() == [2, 5]
    assert float(embeddings.var()) == pytest.approx(1.0, abs=0.1)
    within = torch.cdist(embeddings[labels == 2][:200], embeddings[labels == 2][200:400]).min(1).values
    assert float(within.median()) < 0.85 * math.sqrt(2 * bench.DIM)  # far nearer than two independent samples
