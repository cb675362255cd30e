"""SDMLP keys pretrained on the backbone's own data, for a backbone package.

As in the SDMLP and SSD papers, the sparse network first learns the classes that the backbone was trained on;
its keys and GABA counters are kept, its values are dropped. Embeddings only: seconds to minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_edge.backbones.landmarks import make_landmarks
from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.config import StudentConfig
from ssd_edge.errors import InputError
from ssd_edge.learners.gradient.network import SDMLP, Layer, initial_rows, prepare

Say = Callable[[str], None]
BATCH, CLIP = 128, 1.0


def pretrain_student(
    embeddings: Tensor, labels: Tensor, classes: int, config: StudentConfig, seed: int, say: Say
) -> tuple[Tensor, Tensor, float, float]:
    """Train an SDMLP on standardised embeddings.

    Args:
        embeddings: ``(N, D)`` float32.
        labels: int64 ``(N,)``.
        classes: number of classes.
        config: size and schedule.
        seed: of initialisation and order.
        say: called with a line per epoch.

    Returns:
        keys ``(r, D)``, counters ``(r,)``, C of the switch, and the training accuracy of the last epoch.

    Raises:
        InputError: k is not below the number of neurons.
    """
    if config.k >= config.neurons:
        raise InputError(f"student.k must be below student.neurons, but is {config.k} of {config.neurons}")
    generator = torch.Generator().manual_seed(seed)
    dim = embeddings.shape[1]
    keys = initial_rows(config.neurons, dim, dim, generator, torch.float32)
    values = initial_rows(config.neurons, classes, config.neurons, generator, torch.float32)
    # C = ½ · samples · epochs: while a switch is open its neuron answers every sample, so all can close in time
    switch = max(1.0, 0.5 * config.epochs * len(embeddings))
    net = SDMLP([Layer(keys, torch.zeros(config.neurons))], values, config.k, switch)
    inputs = prepare(embeddings, config.shift)
    started, accuracy = time.monotonic(), 0.0
    for epoch in range(config.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        correct = 0
        for index in order.split(BATCH):
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
        say(
            f"student epoch {epoch + 1}/{config.epochs}  training accuracy {accuracy:.3f}  "
            f"switches closed {closed:.2f}  {seconds / (epoch + 1) * (config.epochs - epoch - 1):.0f} s left"
        )
    return net.keys, net.counters, switch, accuracy


def with_student(
    package: BackbonePackage, embeddings: np.ndarray, labels: np.ndarray, config: StudentConfig, seed: int, say: Say
) -> BackbonePackage:
    """The package with SDMLP keys and landmarks, both from its own pretraining embeddings ``(N, D)``."""
    vectors, truth = torch.from_numpy(embeddings), torch.from_numpy(labels)
    classes = int(truth.max()) + 1
    keys, counters, switch, accuracy = pretrain_student(vectors, truth, classes, config, seed, say)
    landmarks = make_landmarks(vectors, truth, classes, config.landmarks, config.directions, seed, say)
    student = {**dataclasses.asdict(config), "switch": switch, "seed": seed, "training_accuracy": round(accuracy, 4)}
    priors = dataclasses.replace(
        package.priors,
        keys=keys.numpy(),
        counters=counters.numpy(),
        landmarks=landmarks,
        student=student,
    )
    return dataclasses.replace(package, priors=priors)
