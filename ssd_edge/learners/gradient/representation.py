"""What the neurons of an SDMLP do: how often, for which classes, with which others, and how that changes.

Counts are those of one pass over some samples: a neuron's count is the number of samples that activate it, its
frequency p that number over all samples. A dead neuron is one that no sample activated. Sets of neurons are int64
vectors of indices without an order. Equations are those of SSD (arXiv 2512.15267).
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

BLOCK = 512  # columns of a table of all neurons that are held at once
GRAPH_SAMPLES = 1000  # inputs that a report's co-activation graph is taken from
GRAPH_PAIRS = 4_000_000  # a report leaves out the graph where more pairs may be joined


# ── how often ────────────────────────────────────────────────────────────────────────────────────────
def activation_entropy(frequencies: Tensor) -> Tensor:
    """Eq. 1 per neuron, in nats: H = −p ln p − (1 − p) ln(1 − p), with 0 ln 0 = 0."""
    return -(torch.xlogy(frequencies, frequencies) + torch.xlogy(1 - frequencies, 1 - frequencies))


def activation_frequencies(counts: Tensor, samples: int) -> Tensor:
    """p_i = a_i / N, float64 ``(r,)``.

    Args:
        counts: a, ``(r,)``.
        samples: N.

    Raises:
        InputError: N is below 1 or below a count.
    """
    if samples < 1 or int(counts.max()) > samples:
        raise InputError(
            f"{samples} samples cannot activate a neuron {int(counts.max())} times; give the samples of the same pass"
        )
    return counts.double() / samples


def mean_activation_entropy(frequencies: Tensor, alive_only: bool = False) -> float:
    """Mean over neurons of Eq. 1, in nats.

    Args:
        frequencies: p, ``(r,)``.
        alive_only: over the neurons with p > 0 alone (0 if there is none), rather than over all.
    """
    return _mean(activation_entropy(frequencies[frequencies > 0] if alive_only else frequencies))


def entropy_bound(k: int, neurons: int) -> float:
    """The most that the mean of Eq. 1 over all neurons can be once at most k of r answer a sample: H(k/r), in nats.

    The mean of p is at most k/r and H is concave, so mean H(p) ≤ H(mean p) ≤ H(k/r); above k/r = 1/2, ln 2. It
    holds for any hard Top-K network, whatever it has learned: 0.0079 for 10 of 10,000.

    Args:
        k: neurons that stay active at most.
        neurons: r.
    """
    return float(activation_entropy(torch.tensor(min(k / neurons, 0.5), dtype=torch.float64)))


def dead_share(counts: Tensor) -> float:
    """Share of the neurons that no sample activated."""
    return _mean((counts == 0).double())


def coverage(counts: Tensor) -> float:
    """Share of the neurons that some sample activated.

    The paper names "manifold coverage" without an equation; this is the reading taken.
    """
    return _mean((counts > 0).double())


def effective_k(counts: Tensor, samples: int) -> float:
    """Mean number of active neurons per sample: Σ_i a_i / N."""
    return float(activation_frequencies(counts, samples).sum())


def mean_gamma(gamma: Tensor | None) -> float:
    """Mean γ over neurons, from −1 (all switches open) to 1; None, as a net whose switches are closed has it, is 1."""
    return 1.0 if gamma is None else float(gamma.double().mean())


# ── for which classes ────────────────────────────────────────────────────────────────────────────────
def class_entropy(class_counts: Tensor) -> Tensor:
    """Entropy of the classes that activate a neuron, in nats: −Σ_c q_c ln q_c, float64 ``(r,)``.

    0 is a neuron of a single class, ln C one that answers all alike; a dead neuron has 0 too.

    Args:
        class_counts: activations by class, ``(r, C)``; q are its rows brought to sum 1.
    """
    counts = class_counts.double()
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return -torch.xlogy(share, share).sum(1)


def mean_class_entropy(class_counts: Tensor, weighted: bool = False) -> float:
    """Mean of `class_entropy` over the neurons that are not dead; 0 if there is none.

    Args:
        class_counts: ``(r, C)``.
        weighted: by the activations of each neuron, as SDMLP's notebook does, rather than each the same.
    """
    total = class_counts.double().sum(1)
    weight = total if weighted else (total > 0).double()
    return float((class_entropy(class_counts) * weight).sum() / weight.sum().clamp_min(1))


def last_task_share(predictions: Tensor, last_classes: Tensor) -> float:
    """Share of predictions that name a class of the last task: how much the newest is preferred (recency bias).

    Unbiased is the share of the test samples that are of these classes: 1/T for T tasks of one size.

    Args:
        predictions: class rows, int64 ``(N,)``.
        last_classes: rows of the last task's classes, int64 ``(c,)``.
    """
    return _mean(torch.isin(predictions, last_classes.to(predictions.device)).double())


# ── sets of neurons ──────────────────────────────────────────────────────────────────────────────────
def top_k_set(counts: Tensor, k: int) -> Tensor:
    """The k most frequently active neurons, int64 ``(k,)``, most frequent first; ties go to the lower index.

    Raises:
        InputError: k is not between 1 and r.
    """
    if not 1 <= k <= len(counts):
        raise InputError(f"there is no set of {k} among {len(counts)} neurons; ask for 1 to {len(counts)}")
    return counts.sort(descending=True, stable=True).indices[:k]


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A ∩ B| / |A ∪ B| of two sets of neurons (Eq. 8); 1 if both are empty."""
    first, second = set(a.tolist()), set(b.tolist())
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def overlap_matrix(sets: Sequence[Tensor]) -> Tensor:
    """Jaccard of every two sets, float64 ``(T, T)``; e.g. of each task's Top-n neurons."""
    return torch.tensor([[jaccard(a, b) for b in sets] for a in sets], dtype=torch.float64)


# ── teacher and student ──────────────────────────────────────────────────────────────────────────────
def subnetwork_cosine(
    teacher_keys: Tensor, student_keys: Tensor, indices: Tensor, student_indices: Tensor | None = None
) -> float:
    """Cosine of the keys of a subnetwork, before and after: all its rows as one vector; 0 if one of them is zero.

    The paper does not say how the two are lined up. Taken here: the same neurons in both, so that for keys of
    unit length this is the mean cosine of a neuron with its former self.

    Args:
        teacher_keys: ``(r, D)``.
        student_keys: ``(r, D)``.
        indices: the subnetwork's neurons.
        student_indices: another set for the student. Rows outside a network's own set then count as zero, so
            that a neuron that is in only one of them lowers the cosine.
    """
    teacher = _only(teacher_keys, indices)
    student = _only(student_keys, indices if student_indices is None else student_indices)
    length = float(teacher.norm() * student.norm())
    return float((teacher * student).sum()) / length if length else 0.0


def teacher_student_divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> float:
    """Eq. 9: mean over samples of KL(softmax(teacher/T) ‖ softmax(student/T)), in nats, without the factor T².

    Args:
        teacher_logits: ``(N, C)``.
        student_logits: ``(N, C)``.
        temperature: T.
    """
    loss, _ = divergence(student_logits.double(), teacher_logits.double(), temperature, "teacher_student")
    return float(loss) / temperature**2


# ── with which others ────────────────────────────────────────────────────────────────────────────────
def coactivation(activations: Activations, minimum: int = 1) -> Tensor:
    """Edges of the graph that joins two neurons if enough samples activate both.

    Args:
        activations: of N samples.
        minimum: samples that make an edge.

    Returns:
        int64 ``(2, M)``: the lower neuron above the higher one, each pair once.

    Raises:
        InputError: `minimum` is below 1.
    """
    if minimum < 1:
        raise InputError(f"an edge of the co-activation graph needs at least 1 common sample, not {minimum}")
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
    """Mean number of edges on the shortest path, over all pairs of different nodes that a path joins.

    Exact, by breadth-first search from every node; pairs in different components, and neurons without an edge,
    do not count. 0 if there is no edge. The paper names "average path length" without an equation; this is the
    reading taken, on the graph of `coactivation`.

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
        frontier, distance, found = reached, 0, 1
        while found:
            frontier = (adjacency @ frontier.float() > 0) & ~reached
            reached = reached | frontier
            distance, found = distance + 1, int(frontier.sum())
            steps, pairs = steps + distance * found, pairs + found
    return steps / pairs if pairs else 0.0


# ── all at once ──────────────────────────────────────────────────────────────────────────────────────
def neuron_report(net: SDMLP, inputs: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """What the neurons of the top layer do on some labelled inputs; nothing is counted for the GABA switch.

    Args:
        net: a network.
        inputs: prepared, ``(N, D)``.
        labels: class rows, int64 ``(N,)``.
        classes: C, above every label.

    Returns:
        By name, in nats where entropies: ``activation_entropy`` and ``activation_entropy_alive`` (Eq. 1),
        ``activation_entropy_bound`` (of a closed switch), ``class_entropy``, ``class_entropy_weighted``,
        ``dead_share``, ``coverage``, ``effective_k``, ``mean_gamma``, and ``mean_path_length`` of the graph of
        neurons that are active together, on at most 1,000 of the inputs, evenly spaced. The last is left out where
        a large network is nearly all active (open switch), so that the graph would be too large to search.

    Raises:
        InputError: no input, or labels that do not fit the inputs or C.
    """
    if not len(inputs) or labels.shape != inputs.shape[:1]:
        raise InputError(
            f"a neuron report needs inputs (N, D) and labels (N,), but has {tuple(inputs.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"labels are {int(labels.min())} to {int(labels.max())}, but a report of {classes} classes takes "
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
    """Mean, 0 of nothing."""
    return float(values.double().mean()) if len(values) else 0.0


def _only(keys: Tensor, indices: Tensor) -> Tensor:
    """The keys, float64, with zeros in all rows but these."""
    masked = torch.zeros_like(keys, dtype=torch.float64)
    masked[indices] = keys[indices].double()
    return masked


def _most_edges(activations: Activations) -> int:
    """No co-activation graph of these has more edges: pairs of active neurons, in all or sample by sample."""
    alive = int((activations.counts() > 0).sum())
    active = activations.per_sample()
    return min(alive * (alive - 1), int((active * (active - 1)).sum())) // 2
