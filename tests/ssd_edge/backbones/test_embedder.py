"""Tests of the standardisation of raw features."""

from __future__ import annotations

import numpy as np
import pytest

from ssd_edge.backbones.embedder import standardisation

RNG = np.random.default_rng(0)


def test_every_level_has_the_same_share_of_the_squared_length():
    widths = (4, 16, 100)
    scale = np.repeat([100.0, 1.0, 0.01], widths) * RNG.uniform(0.5, 2, 120)
    features = RNG.standard_normal((1000, 120)) * scale + 3
    mu, sigma = standardisation(features, widths)
    squares = (((features - mu) / sigma) ** 2).mean(0)
    shares = [part.sum() for part in np.split(squares, np.cumsum(widths)[:-1])]
    np.testing.assert_allclose(shares, 40)
    assert squares.mean() == pytest.approx(1)


def test_one_level_is_standardised_as_it_is():
    features = RNG.standard_normal((50, 7)) * 3
    for widths in ((), (7,)):
        mu, sigma = standardisation(features, widths)
        np.testing.assert_allclose(mu, features.mean(0))
        np.testing.assert_allclose(sigma, features.std(0))


def test_constant_features_stay_finite_in_the_units_of_their_level():
    features = np.concatenate([RNG.standard_normal((50, 3)) * 1000, RNG.standard_normal((50, 3)) * 0.1], 1)
    features[:, [2, 5]] = 1.0
    _, sigma = standardisation(features, (3, 3))
    assert sigma[2] == pytest.approx(1e-3 * sigma[:2].max())
    assert sigma[5] == pytest.approx(1e-3 * sigma[3:5].max())
