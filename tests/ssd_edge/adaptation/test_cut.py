"""Cut networks in two, and put them together again."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from helpers.small_graphs import SIZE, Builder, inverted_residuals, residual, transformer

from ssd_edge.adaptation import cut as cutting
from ssd_edge.adaptation.cut import cut, places, tail_onnx, with_weights
from ssd_edge.adaptation.tail import VECTORS, Tail
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import INPUT, compose, open_session, widths
from ssd_edge.errors import InputError

NETWORKS = {"inverted": inverted_residuals, "residual": residual, "transformer": transformer}
PLACES = [
    ("inverted", "8@16"),
    ("inverted", "16@8"),
    ("inverted", "24@4"),
    ("inverted", "block2"),
    ("residual", "8@8"),
    ("residual", "block1"),
    ("transformer", "16@17"),
    ("transformer", "block0"),
    ("transformer", "block1.middle"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose in this process: these graphs are no one else's."""
    monkeypatch.setattr(cutting, "compose_apart", _compose)


def _compose(model, pixels, mean, std, layout, allow_control_flow, levels):
    return compose(model, pixels, mean, std, layout, allow_control_flow=allow_control_flow, levels=levels)


def _images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def _features(graph: NetworkGraph, images: np.ndarray) -> np.ndarray:
    model = _compose(graph.model, graph.pixels, graph.mean, graph.std, graph.layout, False, graph.levels)
    return open_session(model).run(None, {INPUT: images})[0]


def _vectors(trunk: bytes, images: np.ndarray) -> np.ndarray:
    return open_session(trunk).run(None, {INPUT: images})[0]


def _perturb(tail: Tail) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in tail.parameters():
            weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))


def _close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("inverted", ["8@16", "16@8", "24@4", "24@4"]),
        ("residual", ["8@8", "8@8", "16@4"]),
        ("transformer", ["16@17", "16@17", "16@17", "16@17"]),
    ],
)
def test_places_are_the_outputs_of_blocks(name: str, levels: list[str]) -> None:
    found = places(NETWORKS[name]())
    assert [place.level for place in found] == levels
    weights = [place.weights for place in found]
    assert weights == sorted(set(weights), reverse=True)
    assert weights[-1] > 0


def test_the_default_is_the_first_of_the_smallest_maps_or_what_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = inverted_residuals()
    early, late = places(graph)[-2:]
    assert cut(graph).place == early
    monkeypatch.setattr(cutting, "LARGEST", early.weights - 1)
    assert cut(graph).place == late
    monkeypatch.setattr(cutting, "LARGEST", 0)
    assert cut(graph).place == late


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_trunk_and_tail_are_the_network_also_with_trained_weights(name: str, at: str) -> None:
    graph = NETWORKS[name]()
    images = _images()
    made = cut(graph, at)
    vectors = _vectors(made.trunk, images)
    assert vectors.shape == (5, sum(made.tail.description.sizes))
    assert widths(open_session(made.trunk)) == made.tail.description.sizes
    tail = Tail(made.tail)
    before = tail(torch.from_numpy(vectors)).detach().numpy()
    _close(before, _features(graph, images))

    _perturb(tail)
    adapted = with_weights(graph, tail)
    found = tail(torch.from_numpy(vectors)).detach().numpy()
    assert np.abs(found - before).max() > 1e-2 * np.abs(before).max()
    _close(found, _features(adapted, images))
    _close(open_session(tail_onnx(tail.state())).run(None, {VECTORS: vectors})[0], found)
    assert adapted.identity != graph.identity
    assert adapted.card["adapted"]["from"] == graph.identity
    np.testing.assert_array_equal(_vectors(cut(adapted, at).trunk, images), vectors)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_trainable_is_trained_and_counted(name: str) -> None:
    made = cut(NETWORKS[name](), places(NETWORKS[name]())[0].level)
    tail = Tail(made.tail)
    tail(torch.from_numpy(_vectors(made.trunk, _images()))).square().sum().backward()
    for label, weight in zip(made.tail.description.trainable, tail.trained, strict=True):
        assert weight.grad is not None, label
        assert weight.grad.abs().max() > 0, label
    matrices = sum(array.size for label, array in made.tail.tensors.items() if label.endswith((".weight", ".bias")))
    assert made.place.weights <= matrices <= sum(weight.numel() for weight in tail.trained)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("inverted", {"block0.wide": 48, "block1.gated": 96, "block2.gated": 144}),
        ("residual", {"block0.inner": 8, "block1.inner": 16, "block2.inner": 16}),
        ("transformer", {"block0.gelu": 32, "block1.gelu": 32}),
    ],
)
def test_hidden_layers(name: str, hidden: dict[str, int]) -> None:
    """A callback gets each with its channels on axis 1, and what it returns is used."""
    made = cut(NETWORKS[name](), places(NETWORKS[name]())[0].level)
    tail = Tail(made.tail)
    assert {label.removeprefix("backbone/"): width for label, width in tail.hidden.items()} == hidden
    vectors = torch.from_numpy(_vectors(made.trunk, _images()))
    seen: dict[str, int] = {}

    def watch(label: str, value: torch.Tensor) -> torch.Tensor:
        seen[label] = value.shape[1]
        assert len(value) == 5
        return value

    with torch.inference_mode():
        plain = tail(vectors)
        assert torch.equal(tail(vectors, hidden=watch), plain)
        assert seen == tail.hidden
        last = list(tail.hidden)[-1]
        # Without its hidden layer the last block adds only the bias of its last product.
        for product in tail.description.trainable:
            if product.endswith(("block2.project.weight", "block1.narrow.weight", "block2.1.weight")):
                tail.trained[tail.description.trainable.index(product)].zero_()
        silent = tail(vectors)
        gated = Tail(made.tail)(vectors, hidden=lambda label, value: value * 0 if label == last else value)
    torch.testing.assert_close(gated, silent)
    assert not torch.allclose(gated, plain, rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_products(name: str) -> None:
    """A callback gets the input of every product with weights, with its channels on axis 1."""
    made = cut(NETWORKS[name](), places(NETWORKS[name]())[0].level)
    tail = Tail(made.tail)
    seen: dict[str, int] = {}
    with torch.inference_mode():
        tail(
            torch.from_numpy(_vectors(made.trunk, _images())), inputs=lambda label, x: seen.update({label: x.shape[1]})
        )
    products = [node for node in made.tail.description.nodes if node.operator in ("Conv", "MatMul")]
    weights = {label for node in products for label in node.inputs[1:2] if label in made.tail.tensors}
    assert set(seen) == weights
    for label, channels in seen.items():
        shape = made.tail.tensors[label].shape
        assert channels == (shape[1] if shape[1:2] != (1,) else shape[0]) if len(shape) == 4 else channels == shape[0]


def test_where_a_network_cannot_be_cut() -> None:
    with pytest.raises(InputError, match=r"cannot be cut at 'relu_9'; its places are .*\(8@16, 0\.\d\d M weights"):
        cut(inverted_residuals(), "relu_9")
    with pytest.raises(InputError, match=r"cannot be cut at '24@5'"):
        cut(inverted_residuals(), "24@5")


def _plain(operator: str = "", batch: int = 0) -> NetworkGraph:
    """Return two convolutions with an operator between the second and the mean."""
    b = Builder()
    x = b("Relu", b.conv("pixels", "first", 3, 8, 3, 4))
    x = b.conv(x, "second", 8, 8)
    if operator:
        x = b(operator, x)
    if batch:
        x = b("Reshape", x, b.constant([batch, 8, 8, 8]))
    return b.graph(b("Flatten", b("GlobalAveragePool", x)), 8)


def test_networks_that_cannot_be_adapted() -> None:
    with pytest.raises(InputError, match=r"the operator Sin behind it .* can be used without adaptation"):
        cut(_plain("Sin"))
    with pytest.raises(InputError, match=r"takes only one image at a time .* without adaptation"):
        cut(_plain(batch=1))
    b = Builder()
    flat = b("Flatten", "pixels")
    with pytest.raises(InputError, match=r"has no map or tokens .* without adaptation"):
        cut(b.graph(b("MatMul", flat, b.weight("only", 3 * SIZE * SIZE, 8)), 8))


def test_weights_that_the_trunk_uses_too_stay_and_turned_ones_are_trained() -> None:
    b = Builder()
    bias = b.weight("shared", 8)
    x = b("Conv", "pixels", b.weight("first", 8, 3, 4, 4), bias, strides=[4, 4], name="cut here")
    x = b("Conv", x, b.weight("second", 8, 8, 1, 1), bias)
    x = b(
        "MatMul",
        b("ReduceMean", x, b.constant([2, 3]), keepdims=0),
        b("Transpose", b.weight("third", 4, 8), perm=[1, 0]),
    )
    graph = b.graph(x, 4, "last")
    made = cut(graph, "8@8")
    assert made.tail.description.trainable == ("backbone/second", "backbone/third")
    tail = Tail(made.tail)
    _perturb(tail)
    found = tail(torch.from_numpy(_vectors(made.trunk, _images()))).detach().numpy()
    _close(found, _features(with_weights(graph, tail), _images()))


def test_a_float16_network_is_trained_in_float32() -> None:
    graph = inverted_residuals(np.float16)
    made = cut(graph)
    tail = Tail(made.tail)
    _perturb(tail)
    adapted = with_weights(graph, tail)
    assert {tensor.data_type for tensor in onnx.load_from_string(adapted.model).graph.initializer} == {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    }
    found = tail(torch.from_numpy(_vectors(made.trunk, _images()))).detach().numpy()
    _close(found, _features(adapted, _images()), 1e-2)


def test_a_tail_is_written_only_into_its_own_network() -> None:
    tail = Tail(cut(inverted_residuals()).tail)
    with pytest.raises(InputError, match=r"'block2.expand.weight' .* has no such tensor; take the network"):
        with_weights(residual(), tail)
    b = Builder()
    other = b.graph(b("Flatten", b.conv("pixels", "head", 3, 2, 32, 32)), 2)
    state = dataclasses.replace(
        tail.state(), description=dataclasses.replace(tail.description, trainable=("backbone/head.weight",))
    )
    with pytest.raises(InputError, match=r"of shape \(48, 24, 1, 1\), but .* has one of shape \(2, 3, 32, 32\)"):
        with_weights(other, state)


def test_trained_weights_are_given_to_a_session_without_onnx() -> None:
    made = cut(inverted_residuals())
    session, tail = open_session(tail_onnx(made.tail, changeable=True)), Tail(made.tail)
    vectors = _vectors(made.trunk, _images())
    _close(session.run(None, {VECTORS: vectors})[0], tail(torch.from_numpy(vectors)).detach().numpy())
    _perturb(tail)
    weights = {name: tail.state().tensors[name] for name in tail.description.trainable}
    _close(session.run(None, {VECTORS: vectors, **weights})[0], tail(torch.from_numpy(vectors)).detach().numpy())
