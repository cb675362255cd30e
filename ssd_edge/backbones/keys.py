"""Pretrain the SDMLP keys of a backbone package on the backbone's own data.

As in the SDMLP and SSD papers, the sparse network first learns the classes that the backbone was trained on. Its keys
and GABA counters are kept, its values dropped. It trains on embeddings, which takes seconds to minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.config import StudentConfig
from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.network import SDMLP, Layer, initial_rows, prepare

Log = Callable[[str], None]
BATCH, CLIP = 128, 1.0


def pretrain_student(
    embeddings: Tensor, labels: Tensor, classes: int, config: StudentConfig, seed: int, log: Log
) -> tuple[Tensor, Tensor, float, float]:
    """Train an SDMLP on standardised embeddings.

    Args:
        embeddings: float32 ``(N, D)``.
        labels: int64 ``(N,)``.
        classes: Number of classes.
        config: Size and schedule.
        seed: Seed of initialisation and order.
        log: Receives one line per epoch.

    Returns:
        Keys ``(r, D)``, counters ``(r,)``, C of the GABA switch, and the training accuracy of the last epoch.

    Raises:
        InputError: k is not below the number of neurons.
    """
    if config.k >= config.neurons:
        raise InputError(f"student.k must be below student.neurons, but is {config.k} of {config.neurons}")
    generator = torch.Generator().manual_seed(seed)
    dim = embeddings.shape[1]
    keys = initial_rows(config.neurons, dim, dim, generator, torch.float32)
    values = initial_rows(config.neurons, classes, config.neurons, generator, torch.float32)
    # C = ½ · samples · epochs: a neuron with an open switch is active for every sample, so every switch can close
    switch = max(1.0, 0.5 * config.epochs * len(embeddings))
    net = SDMLP([Layer(keys, torch.zeros(config.neurons))], values, config.k, switch)
    inputs = prepare(embeddings, config.shift)
    started, accuracy = time.monotonic(), 0.0
    for epoch in range(config.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        correct = 0
        for index in torch.split(order, BATCH):
            x, truth = inputs[index], labels[index]
            state = net.forward(x)
            net.count(state)
            logits = state.top.matmul(net.values)
            gradient = (logits.softmax(1) - F.one_hot(truth, classes)) / len(index)
            correct += int((logits.argmax(1) == truth).sum())
            net.apply(net.gradients(state, gradient), config.lr, CLIP)
        accuracy = correct / len(inputs)
        closed = float((net.counters >= switch).float().mean())
        seconds = time.monotonic() - started
        log(
            f"student epoch {epoch + 1}/{config.epochs}  training accuracy {accuracy:.3f}  "
            f"switches closed {closed:.2f}  {seconds / (epoch + 1) * (config.epochs - epoch - 1):.0f} s left"
        )
    return net.keys, net.counters, switch, accuracy


def with_student(
    package: BackbonePackage, embeddings: np.ndarray, labels: np.ndarray, config: StudentConfig, seed: int, log: Log
) -> BackbonePackage:
    """Return the package with SDMLP keys from its own pretraining embeddings ``(N, D)``."""
    vectors, truth = torch.from_numpy(embeddings), torch.from_numpy(labels)
    classes = int(truth.max()) + 1
    keys, counters, switch, accuracy = pretrain_student(vectors, truth, classes, config, seed, log)
    student = {**dataclasses.asdict(config), "switch": switch, "seed": seed, "training_accuracy": round(accuracy, 4)}
    priors = dataclasses.replace(
        package.priors,
        keys=keys.numpy(),
        counters=counters.numpy(),
        student=student,
    )
    return dataclasses.replace(package, priors=priors)
