"""One epoch of SSD (distilling task), touched rows against dense autograd, side by side in one run.

Usage: python benchmarks/epoch.py [--neurons 1000 10000] [--samples 10000] [--repeats 3] [--json FILE]

Both start from the same state, see the same batches and the same cached teacher targets, and minimise the same
loss (alpha 0.7, lambda 0.1, T 8, Top-n); D = 256, 10 classes, k = 10, batch 128, GABA closed. Inputs are random
embeddings, so that no data is needed. Printed: median seconds of an epoch with its spread, the ratio, and how
far the two end states differ (float32 rounding, plus samples whose Top-K flips on it).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ssd_edge import learners
from ssd_edge.priors import Priors
from ssd_edge.runs import environment

DIM, CLASSES, BATCH = 256, 10, 128


def dense_epoch(learner: learners.Learner, inputs: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> tuple:
    """What the usual PyTorch code does: every neuron through forward, backward, clip, step, clamp and norm."""
    settings, targets, table = learner.settings, learner.targets, learner.tables[0].indices
    keys = learner.net.keys.clone().requires_grad_(True)
    values = learner.net.values.clone().requires_grad_(True)
    optimiser = torch.optim.SGD([keys, values], settings.lr)
    alpha, lam, temperature = settings.ce_weight, settings.hidden_weight, settings.temperature

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")

    for index in order.split(BATCH):
        u = F.relu(inputs[index] @ keys.T)
        inhibition = u.topk(settings.k + 1, dim=1).values[:, -1:].detach()
        a = F.relu(u - inhibition)
        logits = a @ values
        hidden = divergence(a[:, table], targets.hidden[0].table(index))
        logit = divergence(logits, targets.logits[index])
        loss = alpha * F.cross_entropy(logits, labels[index]) + (1 - alpha) * (lam * hidden + (1 - lam) * logit)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([keys, values], settings.clip)
        optimiser.step()
        with torch.no_grad():
            values.clamp_(min=0)
            keys.clamp_(min=0)
            keys.div_(keys.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return keys.detach(), values.detach()


def touched_epoch(learner: learners.Learner, inputs: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> tuple:
    """The learner's own step, as `SDMLPLearner._learn` runs it."""
    net = learner.net
    for index in order.split(BATCH):
        state = net.forward(inputs[index])
        net.count(state)
        logits = state.top.matmul(net.values)
        components = learner._components(index, inputs[index], labels[index], logits, state)
        learner._step(components, state, logits, labels[index])
    return learner.net.keys, learner.net.values


def prepare(neurons: int, samples: int) -> tuple:
    """A learner with one task behind it and the teacher's targets of the next in hand."""
    generator = torch.Generator().manual_seed(0)
    top_n = min(neurons, 1000) if neurons > 1000 else 10
    options = {"name": "ssd-paper", "neurons": neurons, "epochs": 1, "switch": 1.0, "top_n": str(top_n)}
    learner = learners.build(options, DIM, Priors())
    learner.expect(CLASSES)
    first = learners.Task(torch.randn(samples, DIM, generator=generator), torch.arange(samples) % 2)
    learner.learn(first)
    second = torch.randn(samples, DIM, generator=generator)
    inputs, labels = learner.prepared(second), torch.arange(samples) % 2 + 2
    learner._begin(inputs, labels)
    learner.moved = learner._moved()
    order = torch.randperm(samples, generator=generator)
    return learner, inputs, labels, order


def measure(neurons: int, samples: int, repeats: int, threads: int) -> dict:
    """Median seconds of both, alternating, each repeat from the same state."""
    torch.set_num_threads(threads)
    learner, inputs, labels, order = prepare(neurons, samples)
    start = learner.net
    seconds: dict[str, list[float]] = {"dense": [], "touched": []}
    ends = {}
    for repeat in range(repeats + 1):
        for name, epoch in (("dense", dense_epoch), ("touched", touched_epoch)):
            learner.net = start.copy()
            began = time.perf_counter()
            ends[name] = epoch(learner, inputs, labels, order if repeat else order[: 4 * BATCH])
            if repeat:  # the first round only warms up
                seconds[name].append(time.perf_counter() - began)
    dense, touched = (statistics.median(seconds[name]) for name in ("dense", "touched"))
    drift = max(float((a - b).abs().max()) for a, b in zip(ends["dense"], ends["touched"], strict=True))
    return {
        "neurons": neurons,
        "samples": samples,
        "threads": threads,
        "dense_seconds": dense,
        "touched_seconds": touched,
        "spread": {name: [min(times), max(times)] for name, times in seconds.items()},
        "ratio": dense / touched,
        "largest_difference": drift,
    }


def main() -> None:
    """Print the table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    cores = torch.get_num_threads()
    rows = []
    print(f"torch {torch.__version__}; median of {words.repeats} epochs of {words.samples:,} samples")
    print(f"{'neurons':>8} {'threads':>8} {'dense s':>9} {'touched s':>10} {'ratio':>7} {'difference':>11}")
    for neurons in words.neurons:
        for threads in sorted({1, cores}):
            row = measure(neurons, words.samples, words.repeats, threads)
            rows.append(row)
            print(
                f"{neurons:8,} {threads:8} {row['dense_seconds']:9.2f} {row['touched_seconds']:10.2f} "
                f"{row['ratio']:6.1f}x {row['largest_difference']:11.1e}",
                flush=True,
            )
    if words.json:
        result = {"command": f"python benchmarks/epoch.py --samples {words.samples} --repeats {words.repeats}"}
        words.json.write_text(json.dumps({**result, **environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
