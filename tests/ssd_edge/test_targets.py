"""Tests of the targets."""

from __future__ import annotations

import pytest

from ssd_edge import targets
from ssd_edge.errors import InputError


def test_supported_boards():
    names = list(targets.targets())
    assert names[0] == "jetson"
    assert set(names) == {
        *("jetson", "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "generic-cuda", "cpu")
    }


@pytest.mark.parametrize("alias", ["orin-nano", "orin-nx", "agx-orin", "thor"])
def test_aliases_without_the_jetson_prefix(alias):
    assert targets.get(alias) is targets.get(f"jetson-{alias}")


def test_unknown_target_suggests_the_nearest():
    with pytest.raises(InputError, match=r"unknown target 'jetson-orin-nxt'. Did you mean 'jetson-orin-nx'\?"):
        targets.get("jetson-orin-nxt")


@pytest.mark.parametrize("name", list(targets.targets()))
def test_targets_support_fp32_and_their_default_precision(name):
    target = targets.get(name)
    for precision in ("fp32", target.default_precision):
        targets.check_precision(target, precision)
    assert 0 < target.budget_mb < target.memory_mb


def test_unsupported_precision_and_opset_are_refused():
    with pytest.raises(InputError, match=r"cpu does not support fp16, because ONNX Runtime has no kernels.*int8, fp32"):
        targets.check_precision(targets.get("cpu"), "fp16")
    with pytest.raises(InputError, match=r"opset 23, but the target jetson-thor supports up to 20"):
        targets.check_opset(targets.get("thor"), 23)


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("10.3.0.30", ("10.3", "10.16"), True),
        ("10.16.2.10", ("10.3", "10.16"), True),
        ("10.17.0", ("10.3", "10.16"), False),
        ("8.6.2", ("10.3", None), False),
        ("36.4.3", ("36.4", None), True),
        ("35.6", ("36.4", None), False),
        ("99", None, True),
        ("unknown", ("10.3", None), False),
    ],
)
def test_versions_are_compared_numerically(version, bounds, inside):
    assert targets.within(version, bounds) is inside


def test_inconsistent_target_file_is_refused():
    with pytest.raises(ValueError, match="the target x contradicts itself"):
        targets._target("x", {**raw(), "default_precision": "fp16"})


def raw() -> dict:
    return {
        "title": "x",
        "kind": "cpu",
        "python": ["3.10", "3.13"],
        "opset": 20,
        "memory_mb": 1024,
        "precisions": ["fp32"],
        "default_precision": "fp32",
    }
