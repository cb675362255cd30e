"""Statistics of the neurons of an SDMLP: frequency, class selectivity, co-activation, and change over tasks.

Counts come from one pass over some samples: the count of a neuron is the number of samples that activate it, its
frequency p is that number over all samples. A dead neuron is never activated. Sets of neurons are int64 vectors of
indices in any order. Equation numbers refer to SSD (arXiv 2512.15267).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.distillation import count_activations, divergence
from ssd_edge.learners.gradient.network import SDMLP
from ssd_edge.learners.gradient.topk import DENSE_ABOVE, Activations

BLOCK = 512  # columns of a table of all neurons in memory at a time
GRAPH_SAMPLES = 1000  # inputs for the co-activation graph of a report
GRAPH_PAIRS = 4_000_000  # a report omits the graph if it may have more edges


# ── frequency ────────────────────────────────────────────────────────────────────────────────────────
def activation_entropy(frequencies: Tensor) -> Tensor:
    """Compute Eq. 1 per neuron, in nats: H = −p ln p − (1 − p) ln(1 − p), with 0 ln 0 = 0."""
    return -(torch.xlogy(frequencies, frequencies) + torch.xlogy(1 - frequencies, 1 - frequencies))


def activation_frequencies(counts: Tensor, samples: int) -> Tensor:
    """Compute p_i = a_i / N, float64 ``(r,)``.

    Args:
        counts: a, ``(r,)``.
        samples: N.

    Raises:
        InputError: N is below 1 or below a count.
    """
    if samples < 1 or int(counts.max()) > samples:
        raise InputError(
            f"{samples} samples cannot activate a neuron {int(counts.max())} times; count both in the same pass"
        )
    return counts.double() / samples


def mean_activation_entropy(frequencies: Tensor, alive_only: bool = False) -> float:
    """Compute the mean over neurons of Eq. 1, in nats.

    Args:
        frequencies: p, ``(r,)``.
        alive_only: average only over neurons with p > 0 (0 without any) rather than over all.
    """
    return _mean(activation_entropy(frequencies[frequencies > 0] if alive_only else frequencies))


def entropy_bound(k: int, neurons: int) -> float:
    """Return the upper bound of the mean of Eq. 1 over all neurons if at most k of r are active: H(k/r), in nats.

    The mean of p is at most k/r and H is concave, so mean H(p) ≤ H(mean p) ≤ H(k/r), and ln 2 above k/r = 1/2. This
    holds for any hard Top-K network, whatever it has learned: 0.0079 for 10 of 10,000.

    Args:
        k: largest number of active neurons.
        neurons: r.
    """
    return float(activation_entropy(torch.tensor(min(k / neurons, 0.5), dtype=torch.float64)))


def dead_share(counts: Tensor) -> float:
    """Return the share of neurons that no sample activated."""
    return _mean((counts == 0).double())


def coverage(counts: Tensor) -> float:
    """Return the share of neurons that some sample activated.

    The paper names "manifold coverage" without an equation; this is the interpretation used here.
    """
    return _mean((counts > 0).double())


def effective_k(counts: Tensor, samples: int) -> float:
    """Compute the mean number of active neurons per sample: Σ_i a_i / N."""
    return float(activation_frequencies(counts, samples).sum())


def mean_gamma(gamma: Tensor | None) -> float:
    """Compute the mean γ over neurons, from −1 (all switches open) to 1; None (all switches closed) counts as 1."""
    return 1.0 if gamma is None else float(gamma.double().mean())


# ── class selectivity ────────────────────────────────────────────────────────────────────────────────
def class_entropy(class_counts: Tensor) -> Tensor:
    """Compute the entropy of the classes that activate a neuron, in nats: −Σ_c q_c ln q_c, float64 ``(r,)``.

    It is 0 for a neuron of a single class or a dead one, and ln C for a neuron that responds to all classes equally.

    Args:
        class_counts: activations by class, ``(r, C)``; q are its rows normalised to sum 1.
    """
    counts = class_counts.double()
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return -torch.xlogy(share, share).sum(1)


def mean_class_entropy(class_counts: Tensor, weighted: bool = False) -> float:
    """Compute the mean of `class_entropy` over neurons that are not dead; 0 without any.

    Args:
        class_counts: ``(r, C)``.
        weighted: weight neurons by their number of activations, as SDMLP's notebook does, rather than equally.
    """
    total = class_counts.double().sum(1)
    weight = total if weighted else (total > 0).double()
    return float((class_entropy(class_counts) * weight).sum() / weight.sum().clamp_min(1))


def last_task_share(predictions: Tensor, last_classes: Tensor) -> float:
    """Return the share of predictions that are a class of the last task, a measure of recency bias.

    Without bias it equals the share of test samples of these classes: 1/T for T tasks of equal size.

    Args:
        predictions: class rows, int64 ``(N,)``.
        last_classes: rows of the last task's classes, int64 ``(c,)``.
    """
    return _mean(torch.isin(predictions, last_classes.to(predictions.device)).double())


# ── sets of neurons ──────────────────────────────────────────────────────────────────────────────────
def top_k_set(counts: Tensor, k: int) -> Tensor:
    """Return the k most frequently active neurons, int64 ``(k,)``, most frequent first; ties go to the lower index.

    Raises:
        InputError: k is not between 1 and r.
    """
    if not 1 <= k <= len(counts):
        raise InputError(f"cannot choose {k} of {len(counts)} neurons; k must be between 1 and {len(counts)}")
    return counts.sort(descending=True, stable=True).indices[:k]


def jaccard(a: Tensor, b: Tensor) -> float:
    """Compute |A ∩ B| / |A ∪ B| of two sets of neurons (Eq. 8); 1 if both are empty."""
    first, second = set(a.tolist()), set(b.tolist())
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def overlap_matrix(sets: Sequence[Tensor]) -> Tensor:
    """Compute the Jaccard index of every pair of sets, float64 ``(T, T)``, e.g. of each task's Top-n neurons."""
    return torch.tensor([[jaccard(a, b) for b in sets] for a in sets], dtype=torch.float64)


# ── teacher and student ──────────────────────────────────────────────────────────────────────────────
def subnetwork_cosine(
    teacher_keys: Tensor, student_keys: Tensor, indices: Tensor, student_indices: Tensor | None = None
) -> float:
    """Compute the cosine of a subnetwork's keys before and after, all rows as one vector; 0 if either is zero.

    The paper does not say how the two are aligned. Here both use the same neurons, so for keys of unit length this is
    the mean cosine between the keys of a neuron before and after.

    Args:
        teacher_keys: ``(r, D)``.
        student_keys: ``(r, D)``.
        indices: neurons of the subnetwork.
        student_indices: another set for the student; None: the same. Rows outside a network's own set count as zero,
            so that a neuron in only one of the sets lowers the cosine.
    """
    teacher = _only(teacher_keys, indices)
    student = _only(student_keys, indices if student_indices is None else student_indices)
    length = float(teacher.norm() * student.norm())
    return float((teacher * student).sum()) / length if length else 0.0


def teacher_student_divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> float:
    """Compute Eq. 9: the mean over samples of KL(softmax(teacher/T) ‖ softmax(student/T)), in nats, without factor T².

    Args:
        teacher_logits: ``(N, C)``.
        student_logits: ``(N, C)``.
        temperature: T.
    """
    loss, _ = divergence(student_logits.double(), teacher_logits.double(), temperature, "teacher_student")
    return float(loss) / temperature**2


# ── co-activation ────────────────────────────────────────────────────────────────────────────────
def coactivation(activations: Activations, minimum: int = 1) -> Tensor:
    """Return the edges of the graph that connects two neurons if enough samples activate both.

    Args:
        activations: activations of N samples.
        minimum: number of samples required for an edge.

    Returns:
        int64 ``(2, M)``, the lower neuron above the higher one, each pair once.

    Raises:
        InputError: `minimum` is below 1.
    """
    if minimum < 1:
        raise InputError(f"minimum must be at least 1 common sample per edge, but is {minimum}")
    ones = activations.indicator()
    neurons = activations.shape[1]
    frequent = (activations.counts() >= minimum).nonzero().flatten()
    everyone = torch.arange(neurons, device=frequent.device)
    edges = []
    for part in torch.split(frequent, BLOCK):
        slot = torch.full_like(everyone, -1)
        slot[part] = torch.arange(len(part), device=part.device)
        common = ones.transposed_matmul(None, ones.columns(slot, len(part)), everyone, neurons)  # (r, BLOCK)
        higher, column = ((common >= minimum) & (everyone[:, None] > part)).nonzero(as_tuple=True)
        edges.append(torch.stack([part[column], higher]))
    return torch.cat(edges, dim=1)


def mean_path_length(edges: Tensor) -> float:
    """Compute the mean length of the shortest path over all pairs of different nodes connected by a path.

    The result is exact, by breadth-first search from every node. Pairs in different components and neurons without an
    edge do not count; without edges it is 0. The paper names "average path length" without an equation; this is the
    interpretation used here, on the graph of `coactivation`.

    Args:
        edges: int64 ``(2, M)``, undirected.
    """
    nodes, ends = torch.unique(edges, return_inverse=True)
    count = len(nodes)
    both = torch.cat([ends, ends.flip(0)], dim=1)
    ones = torch.ones(both.shape[1], device=edges.device)
    adjacency = torch.sparse_coo_tensor(both, ones, (count, count), check_invariants=False).coalesce()
    if both.shape[1] > DENSE_ABOVE * count**2:
        adjacency = adjacency.to_dense()
    steps = pairs = 0
    for sources in torch.split(torch.arange(count, device=edges.device), BLOCK):
        reached = torch.zeros(count, len(sources), dtype=torch.bool, device=edges.device)
        reached[sources, torch.arange(len(sources), device=edges.device)] = True
        frontier, distance, new = reached, 0, 1
        while new:
            frontier = (adjacency @ frontier.float() > 0) & ~reached
            reached = reached | frontier
            distance, new = distance + 1, int(frontier.sum())
            steps, pairs = steps + distance * new, pairs + new
    return steps / pairs if pairs else 0.0


# ── report ───────────────────────────────────────────────────────────────────────────────────────────
def neuron_report(net: SDMLP, inputs: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Compute statistics of the top layer's neurons on labelled inputs; GABA counters do not change.

    Args:
        net: network.
        inputs: prepared, ``(N, D)``.
        labels: class rows, int64 ``(N,)``.
        classes: C, above every label.

    Returns:
        By name, entropies in nats: ``activation_entropy`` and ``activation_entropy_alive`` (Eq. 1),
        ``activation_entropy_bound`` (with closed switches), ``class_entropy``, ``class_entropy_weighted``,
        ``dead_share``, ``coverage``, ``effective_k``, ``mean_gamma``, and ``mean_path_length`` of the co-activation
        graph on at most 1,000 evenly spaced inputs. The last is omitted if nearly all neurons of a large network are
        active (open switches) and the graph would be too large to search.

    Raises:
        InputError: there is no input, or the labels do not match the inputs or C.
    """
    if not len(inputs) or labels.shape != inputs.shape[:1]:
        raise InputError(
            f"a neuron report needs inputs (N, D) and labels (N,), but has {tuple(inputs.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"labels are {int(labels.min())} to {int(labels.max())}, but a report of {classes} classes requires "
            f"0 to {classes - 1}"
        )
    by_class = count_activations(net, inputs, labels.to(inputs.device), classes)[-1]
    counts, samples = by_class.sum(1), len(inputs)
    frequencies = activation_frequencies(counts, samples)
    report = {
        "activation_entropy": mean_activation_entropy(frequencies),
        "activation_entropy_alive": mean_activation_entropy(frequencies, alive_only=True),
        "activation_entropy_bound": entropy_bound(net.k, len(counts)),
        "class_entropy": mean_class_entropy(by_class),
        "class_entropy_weighted": mean_class_entropy(by_class, weighted=True),
        "dead_share": dead_share(counts),
        "coverage": coverage(counts),
        "effective_k": effective_k(counts, samples),
        "mean_gamma": mean_gamma(net.gamma),
    }
    activations = net.activate(inputs[:: math.ceil(samples / GRAPH_SAMPLES)])
    if _most_edges(activations) <= GRAPH_PAIRS:
        report["mean_path_length"] = mean_path_length(coactivation(activations))
    return report


def _mean(values: Tensor) -> float:
    """Return the mean, or 0 without values."""
    return float(values.double().mean()) if len(values) else 0.0


def _only(keys: Tensor, indices: Tensor) -> Tensor:
    """Return the keys in float64, with zeros in all other rows."""
    masked = torch.zeros_like(keys, dtype=torch.float64)
    masked[indices] = keys[indices].double()
    return masked


def _most_edges(activations: Activations) -> int:
    """Return an upper bound of the edges of the co-activation graph."""
    alive = int((activations.counts() > 0).sum())
    active = activations.per_sample()
    return min(alive * (alive - 1), int((active * (active - 1)).sum())) // 2
