"""Backbone packages: what their statistics say is checked before a learner starts from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mutations import FLOATS, SHAPES

from ssd_edge import files
from ssd_edge.backbones import package as packages
from ssd_edge.errors import BundleRefusedError

Arrays = dict[str, np.ndarray]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(packages.SHIPPED, tmp_path / "package"))


def change(package: Path, apply: Callable[[Arrays, dict[str, Any]], object]) -> None:
    """Change the statistics of a package in place."""
    arrays, metadata = files.read_tensors(package / packages.PRIORS)
    apply(arrays, metadata)
    files.write_tensors(package / packages.PRIORS, arrays, metadata)


def test_the_shipped_package_is_loaded(package):
    assert packages.load(package).identity == packages.load().identity


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("mu", "a column less", r"'mu' .* must have the shape \(256,\)"),
        ("sigma", "zero", "'sigma'"),
        ("sigma", "negated", "'sigma'"),
        ("within_covariance", "negated", "indefinite"),
        ("within_covariance", "noise", "not symmetric"),
        ("within_covariance", "a row less", "'within_covariance'"),
        ("keys", "negated", "'keys'"),
        ("keys", "ones", "unit length"),
        ("keys", "a row less", "'counters'"),
        ("counters", "negated", "'counters'"),
    ],
)
def test_wrong_statistics_are_refused(package, name, kind, told):
    def apply(arrays: Arrays, metadata: dict[str, Any]) -> None:
        arrays[name] = {**FLOATS, **SHAPES}[kind](arrays[name])

    change(package, apply)
    with pytest.raises(BundleRefusedError, match=told):
        packages.load(package)


@pytest.mark.parametrize("name", ["counters", "mu"])
def test_statistics_that_belong_together_are_all_needed(package, name):
    change(package, lambda arrays, metadata: arrays.pop(name))
    with pytest.raises(BundleRefusedError, match=rf"missing tensors \['{name}'\]"):
        packages.load(package)


@pytest.mark.parametrize("dim", [20_000, 0, -1, "wide"])
def test_a_wrong_dimension_is_refused(package, dim):
    card = json.loads((package / packages.CARD).read_text())
    files.write_json(package / packages.CARD, {**card, "dim": dim})
    with pytest.raises(BundleRefusedError):
        packages.load(package)
