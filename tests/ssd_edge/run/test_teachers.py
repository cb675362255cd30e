"""What teachers say: ensembles, specialists, and which runs fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_edge.backbones.embedder import open_backbone
from ssd_edge.data import photographs
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels
from ssd_edge.report.events import ignore
from ssd_edge.run import finished
from ssd_edge.run.teachers import Opinion, ask, check_classes, combined

CPU = torch.device("cpu")


def opinion(classes: str, *rows: list[float]) -> Opinion:
    """Return an opinion about photographs, the same of their mirror images."""
    return Opinion(tuple(classes), np.log(np.array([rows, rows])))


def test_an_ensemble_is_the_mean_whatever_the_order_of_classes() -> None:
    found = combined([opinion("abc", [0.7, 0.2, 0.1]), opinion("cab", [0.5, 0.1, 0.4])], [])
    np.testing.assert_allclose(np.exp(found[0, 0].astype(float)), [0.4, 0.3, 0.3], atol=1e-3)
    assert (found.dtype, found.shape) == (np.float16, (2, 1, 3))


def test_a_specialist_answers_within_its_classes_only() -> None:
    general = opinion("abcd", [0.4, 0.1, 0.3, 0.2], [1e-9, 1e-9, 1.0, 1e-9])
    found = combined([general], [opinion("ba", [0.8, 0.2], [0.9, 0.1])])
    np.testing.assert_allclose(np.exp(found[0, 0].astype(float)), [0.1, 0.4, 0.3, 0.2], atol=1e-3)
    np.testing.assert_allclose(np.exp(found[0, 1].astype(float)), [0.0, 0.0, 1.0, 0.0], atol=1e-3)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("generalists", "specialists", "message"),
    [
        ({}, {"s": "ab"}, "no teacher has classes; add a run of all classes"),
        ({"g": "abc", "h": "abd"}, {}, r"g and h differ in their classes \(c, d\)"),
        ({"g": "abc"}, {"s": "ax"}, "the specialist s has classes that g did not learn: x"),
        ({"g": "abc"}, {"s": "a"}, "the specialist s has one class"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(
    generalists: dict[str, str], specialists: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_classes(generalists, specialists)
    check_classes({"g": "abc", "h": "cba"}, {"s": "ab", "t": "bc"})
    check_classes({}, {})


def test_a_run_and_its_backbone_are_asked_once(trained: Path, shapes: Path) -> None:
    _, images, _ = photographs(str(shapes), False)
    images = images.take(np.arange(0, 200, 10))
    said: list[object] = []
    found = ask(["tiny", str(trained)], [], images, CPU, said.append, use_cache=False)
    assert sum("asking" in str(getattr(event, "text", "")) for event in said) == 1  # both have the same backbone
    (features,) = found.features
    assert (features.shape, features.dtype) == ((2, 20, 256), np.float16)
    assert abs(float(np.mean(features[0].astype(float) ** 2)) - 1) < 0.01
    assert np.abs(features[0] - features[1]).max() > 0.1  # mirror images look different
    run = finished.read(trained)
    answer = ask([str(trained)], [str(trained)], images, CPU, ignore, use_cache=False)
    assert found.scores is not None
    assert answer.scores is not None
    np.testing.assert_allclose(found.scores, answer.scores, atol=0.02)  # as its own specialist it changes nothing
    probabilities = np.exp(found.scores.astype(float))
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=0.01)
    pixels = images.load(np.arange(20), Pixels(32))
    embedder = open_backbone(run.config.backbone, CPU)
    nearest = run.learner.predict(torch.from_numpy(embedder.embed(pixels))).numpy()
    assert (found.scores[0].argmax(1) == nearest).mean() > 0.9  # float16 ties
    assert [card["name"] for card in found.teachers] == ["tiny", f"run {trained.name}"]
    assert found.teachers[1]["classes"] == 4


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, shapes: Path) -> None:
    _, images, _ = photographs(str(shapes), False)
    with pytest.raises(InputError, match="is not a run"):
        ask([str(tmp_path)], [], images, CPU, ignore)
