"""Tests of neuron statistics: by hand, and against NumPy loops over samples, neurons and paths."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient import representation
from ssd_edge.learners.gradient.network import SDMLP, Layer, initial_rows, prepare
from ssd_edge.learners.gradient.representation import (
    activation_entropy,
    activation_frequencies,
    class_entropy,
    coactivation,
    coverage,
    dead_share,
    effective_k,
    entropy_bound,
    jaccard,
    last_task_share,
    mean_activation_entropy,
    mean_class_entropy,
    mean_gamma,
    mean_path_length,
    neuron_report,
    overlap_matrix,
    subnetwork_cosine,
    teacher_student_divergence,
    top_k_set,
)
from ssd_edge.learners.gradient.topk import inhibit

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = torch.tensor([5, 0, 2, 5, 0])  # of 10 samples


def binary_entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


# ── frequency ────────────────────────────────────────────────────────────────────────────────────────
def test_frequencies_dead_share_coverage_and_effective_k() -> None:
    assert activation_frequencies(COUNTS, 10).tolist() == [0.5, 0.0, 0.2, 0.5, 0.0]
    assert dead_share(COUNTS) == pytest.approx(0.4)
    assert coverage(COUNTS) == pytest.approx(0.6)
    assert effective_k(COUNTS, 10) == pytest.approx(1.2)  # 12 activations of 10 samples


@pytest.mark.parametrize("samples", [0, 4])
def test_counts_of_another_pass_are_refused(samples: int) -> None:
    with pytest.raises(InputError, match=f"{samples} samples cannot activate a neuron 5 times"):
        activation_frequencies(COUNTS, samples)


def test_activation_entropy() -> None:
    wanted = [0.0, math.log(2), 0.0, -0.1 * math.log(0.1) - 0.9 * math.log(0.9)]
    assert activation_entropy(torch.tensor([0.0, 0.5, 1.0, 0.1]).double()).tolist() == pytest.approx(wanted)


def test_mean_activation_entropy() -> None:
    frequencies = torch.tensor([0.5, 0.0, 0.2, 1.0])
    # H(½) = ln 2 and H(0.2) = 0.2 ln 5 + 0.8 ln 1.25; neurons that are never or always active have none
    total = math.log(2) + 0.2 * math.log(5) + 0.8 * math.log(1.25)
    assert mean_activation_entropy(frequencies) == pytest.approx(total / 4)
    assert mean_activation_entropy(frequencies, alive_only=True) == pytest.approx(total / 3)
    assert mean_activation_entropy(torch.zeros(3), alive_only=True) == 0.0


def test_entropy_bound() -> None:
    assert entropy_bound(10, 10_000) == pytest.approx(0.0079, abs=5e-5)
    assert entropy_bound(10, 1_000) == pytest.approx(0.0560, abs=5e-5)
    assert entropy_bound(3, 4) == entropy_bound(1, 2) == pytest.approx(math.log(2))


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31))
def test_no_hard_top_k_exceeds_the_bound(k: int, neurons: int, samples: int, seed: int) -> None:
    scores = torch.randn(samples, neurons, generator=torch.Generator().manual_seed(seed)) + torch.linspace(
        0, 2, neurons
    )
    counts = inhibit(scores, min(k, neurons), mask=True).counts()
    entropy = mean_activation_entropy(activation_frequencies(counts, samples))
    assert entropy <= entropy_bound(k, neurons) + 1e-12


def test_mean_gamma() -> None:
    assert mean_gamma(torch.tensor([-1.0, 0.5, 1.0, 1.0])) == pytest.approx(0.375)
    assert mean_gamma(None) == 1.0


# ── class selectivity ────────────────────────────────────────────────────────────────────────────────
def test_class_entropy() -> None:
    counts = torch.tensor([[4, 4, 0], [7, 0, 0], [0, 0, 0], [1, 1, 1], [3, 0, 1]])
    wanted = [math.log(2), 0.0, 0.0, math.log(3), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    assert class_entropy(counts).tolist() == pytest.approx(wanted)
    assert mean_class_entropy(counts) == pytest.approx(sum(wanted) / 4)  # one is dead
    weights = [8, 7, 0, 3, 4]
    mean = sum(weight * value for weight, value in zip(weights, wanted, strict=True)) / 22
    assert mean_class_entropy(counts, weighted=True) == pytest.approx(mean)


@pytest.mark.parametrize("weighted", [False, True])
def test_dead_networks_have_no_class_entropy(weighted: bool) -> None:
    assert mean_class_entropy(torch.zeros(4, 3), weighted) == 0.0


def test_last_task_share() -> None:
    predictions = torch.tensor([0, 4, 5, 4, 1, 2, 4, 3])
    assert last_task_share(predictions, torch.tensor([4, 5])) == 0.5
    assert last_task_share(predictions, torch.tensor([6])) == 0.0


# ── sets of neurons ──────────────────────────────────────────────────────────────────────────────────
def test_top_k_set_gives_ties_to_the_lower_index() -> None:
    assert [top_k_set(COUNTS, k).tolist() for k in (1, 2, 4)] == [[0], [0, 3], [0, 3, 2, 1]]
    many = torch.randint(3, (2000,), generator=torch.Generator().manual_seed(0))
    assert top_k_set(many, 1500).tolist() == sorted(range(2000), key=lambda i: (-int(many[i]), i))[:1500]


@pytest.mark.parametrize("k", [0, 6])
def test_a_set_of_too_few_or_too_many_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"cannot choose {k} of 5 neurons"):
        top_k_set(COUNTS, k)


def test_jaccard() -> None:
    a, b = torch.tensor([7, 1, 3]), torch.tensor([3, 4, 1, 9])
    assert jaccard(a, b) == jaccard(b, a) == pytest.approx(2 / 5)
    assert jaccard(a, a.flip(0)) == 1.0
    assert jaccard(a, torch.tensor([2])) == 0.0
    assert jaccard(a[:0], b[:0]) == 1.0


def test_overlap_matrix() -> None:
    sets = [torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    found = overlap_matrix(sets)
    assert found.dtype == torch.float64
    assert found.tolist() == [[1.0, pytest.approx(1 / 3), 0.0], [pytest.approx(1 / 3), 1.0, 0.0], [0.0, 0.0, 1.0]]


# ── teacher and student ──────────────────────────────────────────────────────────────────────────────
def test_subnetwork_cosine_is_of_the_flattened_rows() -> None:
    teacher, student = np.random.default_rng(0).random((2, 6, 4))
    rows = [4, 0, 5]
    t, s = teacher[rows].ravel(), student[rows].ravel()
    wanted = t @ s / np.sqrt(t @ t) / np.sqrt(s @ s)
    found = subnetwork_cosine(torch.from_numpy(teacher), torch.from_numpy(student), torch.tensor(rows))
    assert found == pytest.approx(wanted)


def test_subnetwork_cosine_of_unit_rows_is_their_mean_cosine() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    student = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])
    assert subnetwork_cosine(teacher, student, torch.tensor([0, 1])) == pytest.approx(0.9)  # (0.8 + 1)/2
    assert subnetwork_cosine(teacher, teacher, torch.tensor([2])) == pytest.approx(1.0)


def test_subnetwork_cosine_with_the_students_own_set() -> None:
    """Only neuron 1 is in both sets of two unit rows, and it has not moved: 1/√(2·2)."""
    keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert subnetwork_cosine(keys, keys, torch.tensor([0, 1]), torch.tensor([1, 2])) == pytest.approx(0.5)
    assert subnetwork_cosine(keys, keys, torch.tensor([0]), torch.tensor([2])) == 0.0


def test_subnetwork_cosine_of_dead_keys_is_zero() -> None:
    assert subnetwork_cosine(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1])) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_teacher_student_divergence_has_no_factor(temperature: float) -> None:
    teacher, student = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    wanted = float(F.kl_div(q.log(), p, reduction="batchmean"))
    assert teacher_student_divergence(teacher, student, temperature) == pytest.approx(wanted)


def test_teacher_student_divergence_by_hand() -> None:
    """P = (½, ½), Q = (¾, ¼): ½ ln(⅔) + ½ ln 2 = ½ ln(4/3); the second sample has divergence 0."""
    teacher, student = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    assert teacher_student_divergence(teacher, student, 1.0) == pytest.approx(0.25 * math.log(4 / 3))


# ── co-activation ────────────────────────────────────────────────────────────────────────────────────
def pairs_by_hand(active: np.ndarray, minimum: int) -> set[tuple[int, int]]:
    """Return the pairs of neurons with a Python loop over samples."""
    seen: dict[tuple[int, int], int] = {}
    for row in active:
        neurons = np.flatnonzero(row).tolist()
        for place, low in enumerate(neurons):
            for high in neurons[place + 1 :]:
                seen[low, high] = seen.get((low, high), 0) + 1
    return {pair for pair, count in seen.items() if count >= minimum}


def floyd_warshall(edges: set[tuple[int, int]], count: int) -> float:
    """Return the mean finite distance between different nodes, or 0 without any."""
    distance = np.full((count, count), np.inf)
    for low, high in edges:
        distance[low, high] = distance[high, low] = 1
    for middle in range(count):
        distance = np.minimum(distance, distance[:, middle, None] + distance[None, middle, :])
    finite = distance[np.isfinite(distance) & ~np.eye(count, dtype=bool)]
    return float(finite.mean()) if len(finite) else 0.0


@pytest.mark.parametrize("minimum", [1, 2, 5])
@pytest.mark.parametrize(("k", "dense"), [(2, False), (4, False), (20, True)])
def test_coactivation_is_that_of_a_loop_over_samples(
    monkeypatch: pytest.MonkeyPatch, k: int, dense: bool, minimum: int
) -> None:
    monkeypatch.setattr(representation, "BLOCK", 7)  # more than one block
    scores = torch.randn(30, 40, generator=torch.Generator().manual_seed(k)) + torch.linspace(0, 3, 40)
    scores[3] = -1.0  # a sample that activates no neuron
    activations = inhibit(scores, k)
    assert activations.is_dense == dense
    edges = coactivation(activations, minimum)
    found = list(zip(*edges.tolist(), strict=True))
    wanted = pairs_by_hand(activations.to_dense().numpy() > 0, minimum)
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert bool(wanted) or (k, minimum) == (2, 5)
    assert mean_path_length(edges) == pytest.approx(floyd_warshall(wanted, 40))


def test_a_common_sample_is_needed_for_an_edge() -> None:
    activations = inhibit(torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0]]), 2, mask=True)
    assert coactivation(activations, 2).tolist() == [[0], [1]]
    assert coactivation(activations, 3).shape == (2, 0)
    with pytest.raises(InputError, match="at least 1 common sample per edge, but is 0"):
        coactivation(activations, 0)


def test_mean_path_length_by_hand() -> None:
    """The chain 0-2-5-9 has distances 1, 1, 1, 2, 2, 3 (mean 10/6); with the separate pair 3-4 the mean is 11/7."""
    chain = torch.tensor([[0, 2, 5], [2, 5, 9]])
    assert mean_path_length(chain) == pytest.approx(10 / 6)
    assert mean_path_length(torch.cat([chain, torch.tensor([[3], [4]])], dim=1)) == pytest.approx(11 / 7)
    assert mean_path_length(torch.zeros(2, 0, dtype=torch.int64)) == 0.0


@settings(max_examples=60)
@given(st.sets(st.tuples(st.integers(0, 13), st.integers(0, 13)).filter(lambda pair: pair[0] < pair[1]), max_size=30))
def test_mean_path_length_is_that_of_floyd_and_warshall(edges: set[tuple[int, int]]) -> None:
    table = torch.tensor(sorted(edges), dtype=torch.int64).reshape(-1, 2).T
    assert mean_path_length(table) == pytest.approx(floyd_warshall(edges, 14))


@pytest.mark.parametrize("ring", [5, 40])  # dense and sparse adjacency
def test_mean_path_length_of_a_ring(monkeypatch: pytest.MonkeyPatch, ring: int) -> None:
    """Distances from each node of a ring are 1, 1, 2, 2, … up to half its length."""
    monkeypatch.setattr(representation, "BLOCK", 6)
    nodes = torch.arange(ring)
    distances = [min(step, ring - step) for step in range(1, ring)]
    assert mean_path_length(torch.stack([nodes, (nodes + 1) % ring])) == pytest.approx(sum(distances) / (ring - 1))


# ── report ───────────────────────────────────────────────────────────────────────────────────────────
def network(k: int = 3, counters: float = 10.0, layers: int = 1) -> tuple[SDMLP, Tensor, Tensor]:
    """Return a network, prepared inputs, and labels of 4 classes, the last of which does not occur."""
    generator = torch.Generator().manual_seed(0)
    hidden = [
        Layer(initial_rows(48, width, width, generator, torch.float64), torch.full((48,), counters).double())
        for width in (6, 48, 48)[:layers]
    ]
    net = SDMLP(hidden, initial_rows(48, 4, 48, generator, torch.float64), k, switch=10.0)
    inputs = prepare(torch.randn(50, 6, generator=generator, dtype=torch.float64), 0.0)
    return net, inputs, torch.randint(3, (50,), generator=generator)


def report_by_hand(net: SDMLP, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the report neuron by neuron from the dense activations of the top layer."""
    active = net.activate(inputs).to_dense().numpy() > 0
    neurons = active.shape[1]
    alive = [j for j in range(neurons) if active[:, j].any()]
    entropies = [binary_entropy(float(active[:, j].mean())) for j in range(neurons)]
    by_class = []
    for j in alive:
        shares = np.bincount(labels.numpy()[active[:, j]]) / active[:, j].sum()
        by_class.append(-sum(q * math.log(q) for q in shares.tolist() if q > 0))
    gammas = np.ones(neurons) if net.gamma is None else net.gamma.numpy()
    return {
        "activation_entropy": sum(entropies) / neurons,
        "activation_entropy_alive": sum(entropies[j] for j in alive) / len(alive),
        "activation_entropy_bound": binary_entropy(net.k / neurons),
        "class_entropy": sum(by_class) / len(alive),
        "class_entropy_weighted": float(np.average(by_class, weights=active[:, alive].sum(0))),
        "dead_share": 1 - len(alive) / neurons,
        "coverage": len(alive) / neurons,
        "effective_k": float(active.sum(1).mean()),
        "mean_gamma": float(gammas.mean()),
        "mean_path_length": floyd_warshall(pairs_by_hand(active, 1), neurons),
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_report(layers: int) -> None:
    net, inputs, labels = network(layers=layers)
    before = net.counters.clone()
    report = neuron_report(net, inputs, labels, 4)
    assert report == pytest.approx(report_by_hand(net, inputs, labels))
    assert json.loads(json.dumps(report)) == report
    assert torch.equal(net.counters, before)
    assert report["dead_share"] > 0
    assert report["activation_entropy"] <= report["activation_entropy_bound"]


def test_report_while_the_switch_is_open() -> None:
    """All neurons are active on all samples: entropy 0, path length 1."""
    net, inputs, labels = network(counters=0.0)
    report = neuron_report(net, inputs, labels, 4)
    assert report == pytest.approx(report_by_hand(net, inputs, labels))
    assert (report["effective_k"], report["mean_gamma"], report["mean_path_length"]) == (48.0, -1.0, 1.0)


def test_report_takes_the_graph_from_evenly_spaced_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation, "GRAPH_SAMPLES", 20)
    net, inputs, labels = network()
    wanted = report_by_hand(net, inputs, labels)
    part = report_by_hand(net, inputs[::3], labels[::3])["mean_path_length"]  # 50 inputs: 17 of them
    assert part != wanted["mean_path_length"]
    assert neuron_report(net, inputs, labels, 4) == pytest.approx({**wanted, "mean_path_length": part})


@pytest.mark.parametrize(("counters", "k", "samples"), [(0.0, 3, 50), (10.0, 3, 50), (10.0, 10, 3)])
def test_report_leaves_out_a_graph_that_may_be_too_large(
    monkeypatch: pytest.MonkeyPatch, counters: float, k: int, samples: int
) -> None:
    """The bound uses the number of neurons, active neurons per sample, and the number of samples."""
    net, inputs, labels = network(k, counters)
    inputs, labels = inputs[:samples], labels[:samples]
    active = net.activate(inputs).to_dense().numpy() > 0
    alive, each = int(active.any(0).sum()), active.sum(1)
    most = min(alive * (alive - 1), int((each * (each - 1)).sum())) // 2
    monkeypatch.setattr(representation, "GRAPH_PAIRS", most)
    full = neuron_report(net, inputs, labels, 4)
    monkeypatch.setattr(representation, "GRAPH_PAIRS", most - 1)
    length = full.pop("mean_path_length")
    assert length > 0
    assert neuron_report(net, inputs, labels, 4) == full


def test_report_refuses_what_does_not_fit() -> None:
    net, inputs, labels = network()
    with pytest.raises(InputError, match=r"has \(50, 6\) and \(49,\)"):
        neuron_report(net, inputs, labels[1:], 4)
    with pytest.raises(InputError, match=r"has \(0, 6\) and \(0,\)"):
        neuron_report(net, inputs[:0], labels[:0], 4)
    with pytest.raises(InputError, match="labels are 0 to 2, but a report of 2 classes requires 0 to 1"):
        neuron_report(net, inputs, labels, 2)
