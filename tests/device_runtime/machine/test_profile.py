"""Structure of a profile, its percentiles and its memory estimate; speed is not tested."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_runtime.machine import profile as profiling
from device_runtime.machine.board import Board
from device_runtime.machine.profile import estimate, fits, percentile, profile, timed
from device_runtime.store.generations import Generations
from ssd_edge import bundle as bundles
from ssd_edge import targets
from ssd_edge.errors import BundleRefusedError, EnvironmentUnfitError, InputError
from ssd_edge.learners import retention

ORIN = Board(model="NVIDIA Jetson Orin Nano Developer Kit", l4t="36.4.3", power_mode="15W", cpus=6)


@pytest.fixture(scope="module")
def path(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("profile") / "tiny.ssdedge"
    bundles.write(made, tiny_bundle(target="jetson"))
    return made


@pytest.fixture(scope="module")
def result(path: Path) -> dict[str, Any]:
    """A complete profile, with memory measured in a real process."""
    return profile(path, images_timed=7, warm_up=2, batch=2, root=path.parent / "root", board=ORIN).to_dict()


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measuring process, which takes seconds to import PyTorch."""
    stages = profiling.Footprint(1.0, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(profiling, "_footprint_of_child", lambda path, root: stages)


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([15, 20, 35, 40, 50], 5, 15),
        ([15, 20, 35, 40, 50], 30, 20),
        ([15, 20, 35, 40, 50], 40, 20),
        ([50, 15, 40, 35, 20], 50, 35),
        ([15, 20, 35, 40, 50], 100, 50),
        ([15, 20, 35, 40, 50], 0, 15),
        ([3], 99, 3),
        (list(range(1, 101)), 99, 99),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], q: float, expected: float) -> None:
    assert percentile(values, q) == expected
    assert percentile(values, q) == np.percentile(values, q, method="inverted_cdf")


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1], 101), ([1], -1)])
def test_undefined_percentile_raises(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        percentile(values, q)


def test_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 900_000_000, 0, 1_000_000, 0, 3_000_000, 0, 2_000_000])  # start and end of each call, ns
    monkeypatch.setattr(profiling.time, "perf_counter_ns", lambda: next(clock))
    numbers: list[int] = []
    assert timed(numbers.append, calls=3, warm_up=1) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
    assert numbers == [0, 1, 2, 3]


def test_profile_has_consistent_json_values(result: dict[str, Any], path: Path) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["calls"], result["warm_up"], result["batch"]) == (4, 2, 2)  # seven images, two per call
    assert set(result["latency_ms"]) == {"decode", "backbone", "head"}
    for taken in result["latency_ms"].values():
        assert 0 < taken["p50"] <= taken["p90"] <= taken["p99"]
    assert result["learn"]["images"] == 20
    assert len(result["learn"]["seconds"]) == 3
    assert result["learn"]["median"] == sorted(result["learn"]["seconds"])[1]
    assert result["provider"] == "CPUExecutionProvider"
    assert result["machine"]["power_mode"] == "15W"
    assert "mode 15W" in result["machine"]["title"]
    assert result["versions"]["onnxruntime"]
    assert result["bytes"]["bundle"] == path.stat().st_size
    assert result["bundle"]["sha256"] == bundles.read(path).sha256
    assert (result["bundle"]["target"], result["bundle"]["classes"]) == ("jetson", 3)


def test_memory_stages_are_ordered(result: dict[str, Any]) -> None:
    memory = result["memory_mb"]
    assert 0 < memory["imports"] <= memory["loaded"] <= memory["peak"]
    assert max(memory["predicted"], memory["learned"]) <= memory["peak"]
    assert [row["target"] for row in result["fits"]] == list(targets.targets())
    assert all(row["needed_mb"] == memory["peak"] for row in result["fits"])


def test_profile_leaves_no_files(result: dict[str, Any], path: Path) -> None:
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_root_with_the_installed_backbone_is_used(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_child: None
) -> None:
    roots: list[Path] = []
    load = profiling._load

    def spy(opened: bundles.Bundle, root: Path, say: Any) -> Any:
        roots.append(root)
        return load(opened, root, say)

    monkeypatch.setattr(profiling, "_load", spy)
    store = Generations(tmp_path)
    profile(path, images_timed=1, warm_up=0, root=tmp_path)
    with store.writer():
        store.add_backbone(bundles.read(path).read("backbone"))
    profile(path, images_timed=1, warm_up=0, root=tmp_path)
    assert roots[0] != tmp_path
    assert roots[1] == tmp_path
    assert not roots[0].exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_timed": 0}, "--images must be at least 1, but is 0"),
        ({"warm_up": -1}, "--warm-up must be at least 0, but is -1"),
        ({"batch": 0}, "--batch must be at least 1, but is 0"),
    ],
)
def test_numbers_that_are_too_small(path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        profile(path, **options)


def test_missing_or_damaged_bundle(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        profile(tmp_path / "none.ssdedge")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    (tmp_path / "bad.ssdedge").write_bytes(data)
    with pytest.raises(BundleRefusedError, match="is refused"):
        profile(tmp_path / "bad.ssdedge")


def test_without_onnx_runtime(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentUnfitError, match="onnxruntime"):
        profile(path, images_timed=1, root=tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "code -9 (no output)"),
        ("raise SystemExit('no room')", "code 1 (no room)"),
        ("print('no JSON')", "code 0"),
    ],
)
def test_measuring_process_that_is_killed_or_fails(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    run = subprocess.run
    monkeypatch.setattr(
        profiling.subprocess, "run", lambda command, **options: run([sys.executable, "-S", "-c", code], **options)
    )
    with pytest.raises(EnvironmentUnfitError) as error:
        profile(path, images_timed=1, warm_up=0, root=tmp_path)
    assert message in str(error.value)


def test_fits_compares_with_each_budget() -> None:
    limit = targets.get("cpu").budget_mb
    assert {row.target for row in fits(limit) if not row.fits} == set()
    assert {row.target for row in fits(limit + 0.5) if not row.fits} == {"cpu"}
    assert {row.target for row in fits(1) if not row.note} == {
        "cpu"
    }  # the others have a GPU, whose memory is not counted


def test_estimate_needs_no_torch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundles.read(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    small = estimate(opened)
    parts = {key: value for key, value in dataclasses.asdict(small).items() if key != "total"}
    assert small.total == pytest.approx(sum(parts.values()), abs=0.5)
    assert small.runtime == profiling.RUNTIME_MB
    name = opened.roles["learner"]
    larger = bundles.Bundle(opened.manifest, {**opened.entries, name: bytes(10 * 2**20)}, opened.sha256)
    assert estimate(larger).learner == 10 * profiling.LEARNER_TIMES
    assert estimate(larger).total > small.total + 200


def test_estimate_uses_the_sample_count_of_retention() -> None:
    assert profiling.PSEUDO_SAMPLES == retention.SAMPLES


def test_photo_is_a_jpeg_of_the_stated_size() -> None:
    with Image.open(io.BytesIO(profiling._photo())) as image:
        assert (image.format, image.size) == ("JPEG", profiling.PHOTO)
