"""What answers without PyTorch gives the answers that the learner, its thresholds and its record give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ssd_edge import files
from ssd_edge.answers.graph import HeadGraph, Operator, TooLargeError
from ssd_edge.answers.head import Head, Limits, confidence
from ssd_edge.errors import BundleRefusedError
from ssd_edge.learners.calibration import TEMPERATURES
from ssd_edge.learners.closed_form.sums import ClassStatistics
from ssd_edge.learners.unknown import Rejector

DIM, CLASSES = 20, 4


def vectors(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(count) % CLASSES
    means = 2 * torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    return means[rows] + torch.randn(count, DIM, generator=generator), rows


def test_margins_are_those_of_the_rejector() -> None:
    train, rows = vectors(80, 0)
    statistics = ClassStatistics(DIM)
    statistics.add(train, rows)
    rejector = Rejector.calibrate(statistics, train, rows, *vectors(40, 1))
    assert len(rejector.whitening.axes)
    images, _ = vectors(50, 2)
    images[0] = 0.0  # has no direction
    answered = torch.arange(50) % CLASSES
    limits = Limits.from_state(rejector.state())
    accepted, wanted = rejector.accepts(images, answered)
    found = limits.margins(images.numpy(), answered.numpy())
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    assert ((found >= 0) == accepted.numpy()).all()
    assert len(set(accepted.tolist())) == 2


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_confidence_is_a_softmax_of_the_best_five(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    scores = 300 * torch.randn(30, classes, generator=generator)
    temperatures = TEMPERATURES[torch.randint(20, 50, (classes,), generator=generator)]
    found = confidence(scores.numpy(), temperatures.numpy())
    best = scores.double().topk(min(5, classes), dim=1).values
    wanted = (best / temperatures[scores.argmax(1), None]).softmax(1)[:, 0]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12)
    assert found.max() <= 1.0


def linear_head() -> Head:
    graph = HeadGraph("a learner", CLASSES, 2**20)
    weight = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    scores = graph.affine("embeddings", "output", weight, torch.ones(CLASSES))
    return Head("slda", False, 99, CLASSES, DIM, np.ones(CLASSES)).with_graph(graph, scores)


def test_a_head_survives_its_file() -> None:
    head, images = linear_head(), vectors(5, 3)[0].numpy()
    restored = Head.parse(head.to_bytes())
    assert (restored.score(images) == head.score(images)).all()
    assert restored.to_bytes() == head.to_bytes()
    assert (restored.learner, restored.replay, restored.state_bytes) == ("slda", False, 99)
    assert restored.score(images[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: dataclasses.replace(head, operators=[Operator("Loop", ("embeddings",), (head.scores,), {})]),
        lambda head: dataclasses.replace(head, operators=[Operator("Gemm", ("embeddings",), (head.scores,), {})]),
        lambda head: dataclasses.replace(head, scores="nothing"),
        lambda head: dataclasses.replace(head, classes=CLASSES + 1, temperatures=None),
        lambda head: dataclasses.replace(head, temperatures=np.zeros(CLASSES)),
        lambda head: dataclasses.replace(head, state_bytes=-1),
        lambda head: dataclasses.replace(head, constants={}),
    ],
)
def test_a_damaged_head_is_refused(change: Callable[[Head], Head]) -> None:
    damaged = change(linear_head()).to_bytes()
    with pytest.raises(
        BundleRefusedError, match=r"^(the head of the learner|head\.safetensors).*install the bundle again$"
    ):
        Head.parse(damaged).score(vectors(5, 3)[0].numpy())


def test_a_file_of_something_else_is_refused() -> None:
    for data in (b"", files.tensor_bytes({}), files.tensor_bytes({}, {"operators": 3})):
        with pytest.raises(BundleRefusedError, match=r"head\.safetensors is"):
            Head.parse(data)


def test_a_graph_has_a_size_limit() -> None:
    graph = HeadGraph("a learner", CLASSES, 100)
    with pytest.raises(TooLargeError, match="the head of a learner exceeds 100 bytes"):
        graph.weight("weight", torch.zeros(26))
