"""Tests of head.onnx: it gives the scores of the learner and contains only what prediction needs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from exporters.head import MAX_TOP_K, export_head
from ssd_edge.answers.graph import HeadGraph
from ssd_edge.answers.head import Head
from ssd_edge.backbones.onnx import open_session
from ssd_edge.bundle import onnx_scan
from ssd_edge.errors import InputError
from ssd_edge.learners import LEARNERS, Learner, Task, build, pack, restore
from ssd_edge.learners.closed_form.linear import NEVER
from ssd_edge.learners.gradient.sdmlp import SDMLPLearner
from ssd_edge.learners.gradient.topk import inhibit
from ssd_edge.learners.priors import Priors

MODULE = "tensorrt_rtx"
DIM, ROWS, TAUGHT = 12, 7, (0, 1, 2, 3, 6)
NAMES = ["one", "two", "three", "four", "not taught", "nor this", "seven"]
# Tolerance for float32 sums in another order: a few ulp of the largest terms, hence relative to the largest score.
# An error in the graph exceeds it by orders of magnitude.
ROUNDING = 2e-5

PERCEPTRON = {"neurons": 20, "epochs": 3, "batch": 16}
SMALL = {"neurons": 48, "k": 4, "epochs": 3, "batch": 16}
CASES: dict[str, dict[str, Any]] = {
    "ssd": SMALL,
    "ssd, k = 1": {**SMALL, "k": 1},
    "ssd, k = r - 1": {**SMALL, "k": 47},
    "ssd, half-open switch": {**SMALL, "gaba": "keep"},
    "ssd, three layers": {**SMALL, "layers": 3, "gaba": "keep"},
    "sdmlp": SMALL,
    "sdmlp, k = r": {**SMALL, "k": 48, "inhibition": "subtract"},
    "sdmlp, shifted": {**SMALL, "shift": 0.25, "inhibition": "subtract"},
    "sdmlp, masked": {**SMALL, "inhibition": "mask", "layers": 2},
    "finetune": {**PERCEPTRON, "layers": 2},
    "finetune, ewc": {**PERCEPTRON, "penalty": "ewc"},
    "lwf": PERCEPTRON,
    "icarl": {**PERCEPTRON, "memory": 24, "layers": 2},
    "der": {**PERCEPTRON, "memory": 24},
    "pmr": {**PERCEPTRON, "memory": 24},
    "packnet": PERCEPTRON,
    "packnet, by logit": {**PERCEPTRON, "infer": "logit"},
    "piggyback": PERCEPTRON,
    "supsup": PERCEPTRON,
    "ncm": {},
    "slda": {},
    "slda, projected": {"budget_mb": 0.0006, "budget_classes": 4},
    "ridge": {},
    "ranpac": {"features": 30},
    "klda": {"features": 30},
    "fecam": {},
    "fecam, tukey": {"tukey": 0.5},
    "fecam, projected": {"tukey": 0.5, "budget_mb": 0.002, "budget_classes": 4},
    "flymodel": {"neurons": 50, "inputs_per_neuron": 4, "active": 0.1},
    "flymodel, all active": {"neurons": 50, "inputs_per_neuron": 4, "active": 1.0},
}  # fmt: skip
CASES |= {name: {} for name in LEARNERS if name not in CASES}  # a new learner: with its defaults


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(count: int, rows: tuple[int, ...], seed: int = 0) -> Task:
    """Return samples of slightly overlapping Gaussian classes; the mean of a row does not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(rows).repeat(-(-count // len(rows)))[:count]
    means = 1.5 * torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(99))
    return Task(means[labels] + torch.randn(count, DIM, generator=generator), labels)


def trained(name: str, options: dict[str, Any], expected: int = 0) -> Learner:
    """Return a learner after two tasks that leave rows 4 and 5 unused, with `expected` classes announced."""
    rng = np.random.default_rng(0)
    keys = np.abs(rng.normal(size=(48, DIM)))
    mixing = rng.normal(size=(DIM, DIM))
    priors = Priors(
        count=1000,
        within_covariance=(mixing @ mixing.T / DIM).astype(np.float32),
        keys=(keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32),
        counters=rng.integers(0, 200, 48).astype(np.float32),
        student={"switch": 300.0},
    )
    learner = build({"name": name, **options}, DIM, priors)
    if expected:
        learner.expect(expected)
    for rows in ((0, 1), (2, 3, 6)):
        learner.learn(samples(60, rows))
    return learner


@pytest.fixture(scope="module")
def heads() -> dict[str, tuple[Learner, bytes]]:
    """Return a learner and its head for each case."""
    built = {case: trained(case.split(",")[0].split(" ")[0], options) for case, options in CASES.items()}
    return {case: (learner, export_head(learner, NAMES)) for case, learner in built.items()}


def run(head: bytes, embeddings: Tensor) -> np.ndarray:
    return open_session(head).run(["scores"], {"embeddings": embeddings.numpy()})[0]


def compare(learner: Learner, scores: np.ndarray, embeddings: Tensor) -> None:
    """Check that scores and predictions agree within rounding, and that unseen rows never win."""
    known, rows = learner.seen.numpy() == 1, np.arange(len(embeddings))
    expected = learner.scores(embeddings)[:, : len(known)].numpy()
    assert scores.dtype == np.float32
    assert scores.shape == (len(embeddings), len(known))
    largest = np.abs(expected[:, known]).max()
    np.testing.assert_allclose(scores[:, known], expected[:, known], rtol=0, atol=ROUNDING * largest)
    assert (scores[:, ~known] == np.float32(NEVER)).all()
    predicted = learner.predict(embeddings).numpy()
    margin = expected[rows, predicted] - expected[rows, scores.argmax(1)]
    assert (margin <= 2 * ROUNDING * largest).all()


def constants(head: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(head).graph.initializer}


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────
def test_cases_cover_all_learners(heads):
    assert {learner.name for learner, _ in heads.values()} == set(LEARNERS)


@pytest.mark.parametrize("case", CASES)
def test_scores_agree_with_the_learner(heads, case):
    learner, head = heads[case]
    session = open_session(head)
    for count in (1, 7, 300):
        embeddings = samples(count, TAUGHT, seed=count).embeddings
        (scores,) = session.run(None, {"embeddings": embeddings.numpy()})
        compare(learner, scores, embeddings)
    predicted = set(scores.argmax(1).tolist())
    assert predicted <= set(TAUGHT)
    assert len(predicted) > 1  # otherwise the comparison would be trivial
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("case", CASES)
def test_numpy_gives_the_same_scores(heads, case):
    """Devices without PyTorch run the same graph with NumPy, from a file."""
    learner, _ = heads[case]
    graph = HeadGraph(learner.display, ROWS, 2**20)
    with torch.no_grad():
        scores = learner.write_head(graph, "embeddings")
    head = Head(learner.name, learner.replay, learner.memory_bytes(), ROWS, DIM, None).with_graph(graph, scores)
    restored = Head.parse(head.to_bytes())
    known = learner.seen.numpy() == 1
    for embeddings in (samples(150, TAUGHT, seed=3).embeddings, samples(1, TAUGHT).embeddings, torch.zeros(2, DIM)):
        found, expected = restored.score(embeddings.numpy()), learner.scores(embeddings)[:, :ROWS].numpy()
        assert (found == head.score(embeddings.numpy())).all()
        largest = np.abs(expected[:, known]).max()
        np.testing.assert_allclose(found[:, known], expected[:, known], rtol=0, atol=ROUNDING * largest)


@pytest.mark.parametrize("case", CASES)
def test_zero_and_extreme_embeddings(heads, case):
    """Zero embeddings give no NaN, and embeddings of very small or large norm are normalised correctly."""
    learner, head = heads[case]
    embeddings = samples(5, TAUGHT, seed=3).embeddings
    embeddings[1] = 0.0
    embeddings[2] = -1.0  # zero after ReLU, and all values tie
    embeddings[3] *= 1e-9
    embeddings[4] *= 1e6
    scores = run(head, embeddings)
    for row in range(len(embeddings)):  # one by one, because the tolerance is relative to the largest score
        compare(learner, scores[[row]], embeddings[[row]])


@pytest.mark.parametrize("name", ["sdmlp", "flymodel"])
def test_ties_in_the_top_k(name):
    """Duplicate each key, so that the k-th and (k+1)-th values of each sample are equal."""
    learner = trained(name, CASES["flymodel"] if name == "flymodel" else {**SMALL, "k": 5})
    embeddings = samples(50, TAUGHT, seed=4).embeddings
    if isinstance(learner, SDMLPLearner):
        keys = learner.net.layers[0].keys
        keys[1::2] = keys[::2]
        assert (inhibit(learner.prepared(embeddings) @ keys.T, 5).counts().sum()) <= 4 * 50
    else:
        learner.projection[:, 1::2] = learner.projection[:, ::2].clone()
        assert ((learner.code(embeddings) > 0).sum(1) > learner.kept).any()  # ties with the last one are kept
    compare(learner, run(export_head(learner, NAMES), embeddings), embeddings)


def test_half_open_gaba_switch_is_in_the_graph(heads):
    learner, head = heads["ssd, half-open switch"]
    gamma = constants(head)["gamma"]
    assert ((gamma > -1) & (gamma < 1)).any()
    np.testing.assert_array_equal(gamma, learner.net.gamma.numpy())
    assert "gamma" not in constants(heads["ssd"][1])


def test_masked_negative_scores():
    """Use negative keys, which SDMLP does not learn but a loaded state may contain."""
    learner = trained("sdmlp", {**SMALL, "inhibition": "mask"})
    learner.net.layers[0].keys[:46] *= -1  # leaves fewer than k = 4 positive scores
    embeddings = samples(20, TAUGHT, seed=8).embeddings
    compare(learner, run(export_head(learner, NAMES), embeddings), embeddings)


@pytest.mark.parametrize("name", ["finetune", "sdmlp", "icarl"])
def test_announced_classes_are_not_exported(name):
    learner = trained(name, SMALL if name == "sdmlp" else PERCEPTRON, expected=ROWS + 3)
    embeddings = samples(40, TAUGHT, seed=5).embeddings
    assert learner.scores(embeddings).shape == (40, ROWS + 3)
    compare(learner, run(export_head(learner, NAMES), embeddings), embeddings)


@pytest.mark.parametrize("name", ["ncm", "fecam", "flymodel", "slda"])
def test_removed_class_is_never_predicted(name):
    options = {"flymodel": CASES["flymodel"], "slda": {"per_class": True}}.get(name, {})
    learner = trained(name, options)
    embeddings = samples(60, (0, 2), seed=6).embeddings
    assert 2 in run(export_head(learner, NAMES), embeddings).argmax(1)
    learner.remove(2)
    scores = run(export_head(learner, NAMES), embeddings)
    compare(learner, scores, embeddings)
    assert 2 not in scores.argmax(1)


# ── file ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("case", CASES)
def test_model_is_valid_and_annotated(heads, case):
    learner, head = heads[case]
    model = onnx.load_from_string(head)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    facts = onnx_scan.scan(head, "head.onnx")  # the check that a device makes
    (source,), (target,) = facts.inputs, facts.outputs
    assert (source.name, source.dtype, source.shape) == ("embeddings", "float32", ("batch", DIM))
    assert (target.name, target.dtype, target.shape) == ("scores", "float32", ("batch", ROWS))
    assert all(not node.doc_string for node in model.graph.node)
    assert not any((model.doc_string, model.graph.doc_string, model.producer_name, model.graph.value_info))
    kinds = {name: array.dtype.name for name, array in constants(head).items()}
    others = {name for name, kind in kinds.items() if kind != "float32" and not name.startswith("indices")}
    assert others == {"taught"}
    assert open_session(head).get_modelmeta().custom_metadata_map == {
        "schema": "ssd-edge-head/1",
        "learner": learner.name,
        "dim": str(DIM),
        "classes": json.dumps(NAMES),
    }


@pytest.mark.parametrize("case", CASES)
def test_export_is_reproducible(heads, case):
    learner, head = heads[case]
    before = {name: tensor.numpy().tobytes() for name, tensor in learner.state_dict().items()}
    assert export_head(restore(*pack(learner)), NAMES) == head
    assert export_head(learner, NAMES) == head
    assert {name: tensor.numpy().tobytes() for name, tensor in learner.state_dict().items()} == before


def test_head_contains_only_what_prediction_needs(heads):
    """Check that `slda` stores no statistics and `icarl` neither exemplars nor an output layer."""
    matrices = constants(heads["slda"][1]).items()
    assert {name for name, array in matrices if array.ndim == 2 and array.size > ROWS} == {"output_weight"}
    learner, head = heads["ssd, half-open switch"]
    needed = learner.net.keys.numel() + learner.net.values.numel() + len(learner.net.gamma)
    assert sum(array.size for array in constants(head).values()) < needed + 30
    exemplars = heads["icarl"][0].exemplars.numpy()
    rows = np.concatenate([array for array in constants(heads["icarl"][1]).values() if array.shape[1:] == (DIM,)] or
                          [np.zeros((0, DIM), np.float32)])  # fmt: skip
    assert not {row.tobytes() for row in rows} & {row.tobytes() for row in exemplars}
    assert all(len(head) < 30_000 for _, head in heads.values())


def test_class_names_are_stored_unchanged():
    names = ['"quoted"', "<b>&amp;</b>", "日本語 🤖", "back\\slash", "it's", "{}", "Ä"]
    metadata = open_session(export_head(trained("ncm", {}), names)).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == names


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────
def test_wrong_number_of_names_is_refused():
    with pytest.raises(InputError, match="has 7 class rows, but 6 names"):
        export_head(trained("ncm", {}), NAMES[:-1])


def test_learner_without_classes_is_refused():
    with pytest.raises(InputError, match="no class has been learned yet"):
        export_head(build({"name": "slda"}, DIM, Priors()), [])


@pytest.mark.parametrize("name", ["ncm", "finetune", "slda", "fecam"])
def test_nonfinite_weights_are_refused(name):
    learner = trained(name, {"finetune": PERCEPTRON}.get(name, {}))
    if name == "finetune":
        learner.parameters["output_weight"][0, 0] = torch.nan
    elif name == "slda":
        learner.values[0, 0] = torch.inf
    elif name == "ncm":
        learner.sums[0, 0] = torch.nan
    else:
        _, factor = learner.solve(0)
        factor[0, 0] = torch.nan
    with pytest.raises(InputError, match="contain NaN or infinity"):
        export_head(learner, NAMES)


def test_learner_without_a_graph_is_refused(monkeypatch):
    learner = trained("ncm", {})
    monkeypatch.setattr(type(learner), "write_head", lambda self, graph, x: None)
    with pytest.raises(
        InputError, match=r"^the scores of 'ncm' cannot be written as an ONNX graph; leave the head out$"
    ):
        export_head(learner, NAMES)


def test_head_above_the_size_limit_is_refused(monkeypatch):
    learner = trained("fecam", {})
    monkeypatch.setattr("exporters.head.onnx_file.MAX_BYTES", 4000)
    with pytest.raises(InputError, match="exceeds 4,000 bytes"):
        export_head(learner, NAMES)


LARGE = {"neurons": 4000, "epochs": 1, "batch": 60, "pretrained": False}


@pytest.mark.parametrize(
    ("name", "fits", "too_large", "message"),
    [
        ("sdmlp", {**LARGE, "k": 3839}, {**LARGE, "k": 3840}, "3,841 largest of 4,000 .* 3,840; lower learner.k"),
        (
            "sdmlp",
            {**LARGE, "k": 3840, "inhibition": "mask"},
            {**LARGE, "k": 3841, "inhibition": "mask"},
            "3,841 largest of 4,000 .* 3,840; lower learner.k",
        ),
        (
            "flymodel",
            {"neurons": 3840, "inputs_per_neuron": 4, "active": 1.0},
            {"neurons": 3841, "inputs_per_neuron": 4, "active": 1.0},
            "3,841 largest of 3,841 .* 3,840; lower learner.active",
        ),
    ],
)
def test_k_above_the_limit_of_tensorrt_is_refused(name, fits, too_large, message):
    assert MAX_TOP_K == 3840
    learner, embeddings = trained(name, fits), samples(5, TAUGHT).embeddings
    compare(learner, run(export_head(learner, NAMES), embeddings), embeddings)
    with pytest.raises(InputError, match=message):
        export_head(trained(name, too_large), NAMES)


# ── TensorRT ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.skipif(
    importlib.util.find_spec(MODULE) is None,
    reason=f"{MODULE} is not installed (x86-64 Linux only): the gate for heads did NOT run",
)
@pytest.mark.parametrize(
    "case",
    [
        case if case in ("slda", "ssd", "ssd, half-open switch", "sdmlp, masked", "fecam", "ncm", "flymodel")
        else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)  # fmt: skip
def test_tensorrt_builds_every_head(heads, case):
    from device_runtime.backbone.tensorrt.engines import check_graph

    checked = check_graph(heads[case][1], module=MODULE)
    assert checked.bytes > 0
    assert checked.input == "float"
