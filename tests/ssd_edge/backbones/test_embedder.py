"""Tests of the standardisation of raw features."""

from __future__ import annotations

import numpy as np
import pytest

from ssd_edge.backbones.embedder import level_standardisation, standardisation

RNG = np.random.default_rng(0)


def test_every_level_has_the_same_share_of_the_squared_length():
    widths = (4, 16, 100)
    scale = np.repeat([100.0, 1.0, 0.01], widths) * RNG.uniform(0.5, 2, 120)
    features = RNG.standard_normal((1000, 120)) * scale + 3
    mu, sigma = level_standardisation(features, widths)
    squares = (((features - mu) / sigma) ** 2).mean(0)
    shares = [part.sum() for part in np.split(squares, np.cumsum(widths)[:-1])]
    np.testing.assert_allclose(shares, 40)
    assert squares.mean() == pytest.approx(1)


def test_features_of_a_level_keep_their_proportions():
    features = RNG.standard_normal((50, 7)) * np.array([1, 1, 0, 2, 5, 1, 1e-9])
    mu, sigma = level_standardisation(features, (4, 3))
    np.testing.assert_allclose(mu, features.mean(0))
    assert [len(set(part)) for part in np.split(sigma, [4])] == [1, 1]
    _, sigma = level_standardisation(np.zeros((9, 3)), (3,))
    assert np.isfinite(1 / sigma).all()


def test_each_feature_is_standardised():
    features = RNG.standard_normal((50, 7)) * 3
    mu, sigma = standardisation(features)
    np.testing.assert_allclose(mu, features.mean(0))
    np.testing.assert_allclose(sigma, features.std(0))


def test_constant_features_stay_finite():
    features = RNG.standard_normal((50, 3)) * 1000
    features[:, 2] = 1.0
    _, sigma = standardisation(features)
    assert sigma[2] == pytest.approx(1e-3 * sigma[:2].max())
