"""Networks in these tests are small, so activations are lists up to a larger share of active neurons than usual."""

from __future__ import annotations

import pytest

from ssd_edge.learners.gradient import topk


@pytest.fixture(autouse=True)
def _lists_in_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "DENSE_ABOVE", 1 / 8)
