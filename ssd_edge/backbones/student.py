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

from ssd_edge.backbones.package import BackbonePackage
from ssd_edge.config import StudentConfig
from ssd_edge.errors import InputError
from ssd_edge.sdmlp import SDMLP, Layer, initial_rows, prepare, unit_rows

Say = Callable[[str], None]
BATCH, CLIP = 128, 1.0
# For the code keys, chosen on training images of CIFAR-10 (docs/backbone.md): Adam's rate, passes, the gain on
# activations (logits are tiny without it), and the length of the noise on unit inputs. The backbone knows its own
# training images too well: without the noise, keys that fit them are no better than random ones.
CODE_LR, CODE_EPOCHS, CODE_GAIN, CODE_NOISE = 3e-3, 2, 10.0, 1.0


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


def pretrain_code_keys(
    embeddings: Tensor, labels: Tensor, classes: int, neurons: int, seed: int, say: Say
) -> Tensor:
    """Signed keys for a read-out of k = r/2 active neurons: what the default learner starts from.

    Keys begin as pretraining embeddings (landmarks) and are trained with the same Top-K inhibition, but
    without positivity, to tell the pretraining classes apart; rows stay on the unit sphere.

    Args:
        embeddings: ``(N, D)`` float32, standardised.
        labels: int64 ``(N,)``.
        classes: number of classes.
        neurons: r.
        seed: of landmarks, values and order.
        say: called with a line per epoch.

    Returns:
        Unit rows ``(r, D)``.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, k = prepare(embeddings, None), max(1, neurons // 2)
    noise = CODE_NOISE / inputs.shape[1] ** 0.5
    landmarks = torch.randperm(len(inputs), generator=generator)[:neurons]
    keys = inputs[landmarks].clone()
    if len(keys) < neurons:  # fewer images than keys
        extra = torch.randn(neurons - len(keys), inputs.shape[1], generator=generator)
        keys = torch.cat([keys, unit_rows(extra)])
    values = torch.randn(neurons, classes, generator=generator) * 0.03
    keys.requires_grad_(True)
    values.requires_grad_(True)
    optimiser = torch.optim.Adam([keys, values], CODE_LR)
    started = time.monotonic()
    for epoch in range(CODE_EPOCHS):
        total, steps = 0.0, 0
        for index in torch.randperm(len(inputs), generator=generator).split(512):
            x = unit_rows(inputs[index] + noise * torch.randn(len(index), inputs.shape[1], generator=generator))
            u = (x @ keys.T).clamp_min(0)
            inhibition = u.topk(min(k + 1, neurons), dim=1).values[:, -1:].detach()
            logits = CODE_GAIN * (u - inhibition).clamp_min(0) @ values
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                keys.copy_(unit_rows(keys))
            total, steps = total + float(loss.detach()), steps + 1
        left = (time.monotonic() - started) / (epoch + 1) * (CODE_EPOCHS - epoch - 1)
        say(f"code keys epoch {epoch + 1}/{CODE_EPOCHS}  loss {total / steps:.3f}  {left:.0f} s left")
    return keys.detach()


def with_student(
    package: BackbonePackage, embeddings: np.ndarray, labels: np.ndarray, config: StudentConfig, seed: int, say: Say
) -> BackbonePackage:
    """The package with both kinds of keys, trained on its own pretraining embeddings ``(N, D)``."""
    vectors, truth = torch.from_numpy(embeddings), torch.from_numpy(labels)
    classes = int(truth.max()) + 1
    keys, counters, switch, accuracy = pretrain_student(vectors, truth, classes, config, seed, say)
    code_keys = pretrain_code_keys(vectors, truth, classes, config.neurons, seed, say)
    student = {**dataclasses.asdict(config), "switch": switch, "seed": seed, "training_accuracy": round(accuracy, 4)}
    priors = dataclasses.replace(
        package.priors,
        keys=keys.numpy(),
        counters=counters.numpy(),
        code_keys=code_keys.numpy(),
        student=student,
    )
    return dataclasses.replace(package, priors=priors)
