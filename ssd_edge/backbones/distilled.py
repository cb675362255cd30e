"""Distil a student backbone from teachers (`ssd-edge distill`), on photographs without labels.

The student learns to predict what its teachers say: their features, through a linear map, and the softened class scores
of those that have some (Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015). Their answers to
each photograph and to its mirror image are computed before, so that only the student runs while it is trained.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_edge.backbones import names, torch_onnx
from ssd_edge.backbones import package as packages
from ssd_edge.backbones.embedder import network as package_network
from ssd_edge.backbones.graph import Network, NetworkGraph
from ssd_edge.backbones.networks import PIXEL_MEAN, PIXEL_STD
from ssd_edge.backbones.pretrain import as_tensor
from ssd_edge.backbones.supervised import Loss, Report, fit
from ssd_edge.config import BackboneConfig, DistillationConfig
from ssd_edge.data import Images
from ssd_edge.errors import InputError
from ssd_edge.images import Pixels

RESNET9, SIZE = "resnet9", 64  # the bundled network, and its side: at its own 32 pixels it sees little of a photograph
FEWEST = 16  # photographs
MOST_EPOCHS = 1000  # that minutes are turned into
_NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of teachers to photographs (first) and their mirror images (second).

    Attributes:
        features: Standardised features of each teacher, float16 ``(2, N, D)``.
        scores: Logarithms of class probabilities, float16 ``(2, N, C)``; None if no teacher has classes.
        teachers: What each teacher is, for the card.
    """

    features: tuple[np.ndarray, ...]
    scores: np.ndarray | None
    teachers: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A distilled student.

    Attributes:
        graph: The student as a backbone.
        epochs: Passes over the photographs.
        loss: Mean loss of the last one. Of features alone, it is about 1 for a student that sees nothing.
    """

    graph: NetworkGraph
    epochs: int
    loss: float


def open_student(config: DistillationConfig, say: names.Say) -> Network:
    """Return the network that is to be trained, with the weights that it starts from and its final pixels.

    Args:
        config: Its name, size and weights.
        say: Receives what takes long, such as a download.

    Raises:
        InputError: The name is unknown, or names a network that PyTorch cannot train.
        EnvironmentUnfitError: A package is missing, or a download fails.
    """
    name = config.student
    own = BackboneConfig(names.TINY if name == RESNET9 else name, weights=config.weights)
    if (folder := names.package_folder(own)) is not None:
        found = from_package(packages.load(folder), SIZE if name == RESNET9 else 0)
    elif (module := names.module(own, say)) is not None:
        found = module
    else:
        raise InputError(
            f"'{name}' is no network that can be trained here; students: {RESNET9}, lite0, lite2, "
            f"{', '.join(f'{library}NAME' for library in names.LIBRARIES)}, and package:FOLDER of ssd-edge pretrain"
        )
    pixels = names.pixels_of(found.pixels, BackboneConfig(name, size=config.size))
    return dataclasses.replace(found, pixels=pixels)


def from_package(package: packages.BackbonePackage, size: int) -> Network:
    """Return the network of a package of `ssd-edge pretrain`."""
    own = Pixels.from_dict(package.card)
    kept = {str(key): package.card[key] for key in ("arch", "data", "terms") if key in package.card}
    return Network(
        arch=package.card["arch"],
        weights=package.identity,
        build=lambda: package_network(package).body,
        pixels=dataclasses.replace(own, size=size or own.size),
        mean=PIXEL_MEAN,
        std=PIXEL_STD,
        card={**kept, "source": f"backbone package {package.identity}"},
    )


def distil(
    network: Network,
    photographs: Images,
    answers: Answers,
    config: DistillationConfig,
    device: torch.device,
    say: names.Say,
    report: Report,
) -> Distilled:
    """Train a student to predict its teachers' answers, and return it as a backbone.

    Args:
        network: The student.
        photographs: What the teachers were asked about.
        answers: What they said.
        config: Schedule and loss.
        device: Training device.
        say: Receives what takes long.
        report: Called after each epoch.

    Raises:
        InputError: Nothing is to be matched, or the loss is not finite.
    """
    if not (config.features or (config.scores and answers.scores is not None)):
        raise InputError(
            "train.features is 0 and no teacher has classes, so nothing is matched; add a run as a teacher"
        )
    torch.manual_seed(config.seed)
    images = as_tensor(photographs.load(np.arange(len(photographs)), network.pixels))
    body = network.build()
    side = network.pixels.size
    with torch.inference_mode():
        width = body.eval()(torch.zeros(1, 3, side, side)).shape[1]
    widths = [part.shape[2] for part in answers.features]
    classes = 0 if answers.scores is None else answers.scores.shape[2]
    model = nn.Sequential(body, nn.Linear(width, sum(widths) + classes))
    loss, last = loss_of(answers, config, device), [0.0]

    def train(trained: nn.Module, on: Tensor, schedule: DistillationConfig, told: Report) -> None:
        torch.manual_seed(config.seed)  # of dropout
        fit(trained, on, loss, schedule, "adamw", device, told, network.mean, network.std)

    if config.minutes:
        seconds: list[float] = []
        probe = dataclasses.replace(config, epochs=2)
        few = images[: 2 * config.batch]
        train(copy.deepcopy(model), few, probe, lambda epoch, epochs, missed, passed: seconds.append(passed))
        steps = max(1, len(images) // config.batch) / max(1, len(few) // config.batch)
        epochs = max(1, int(60 * config.minutes / max(1e-6, steps * (seconds[1] - seconds[0]))))
        config = dataclasses.replace(config, epochs=min(epochs, MOST_EPOCHS))
        say(f"{config.epochs} epochs of {steps * (seconds[1] - seconds[0]):,.0f} s fit into {config.minutes:g} minutes")

    def told(epoch: int, epochs: int, missed: float, passed: float) -> None:
        last[0] = missed
        report(epoch, epochs, missed, passed)

    train(model, images, config, told)
    card = _card(network, photographs, answers, config, last[0])
    return Distilled(as_graph(network, body, card), config.epochs, last[0])


def as_graph(network: Network, body: nn.Module, card: Mapping[str, Any]) -> NetworkGraph:
    """Return a student, trained or not, as a backbone whose levels are joined."""
    model = torch_onnx.export(body.eval(), network.pixels.size)
    return NetworkGraph(network.arch, model, network.pixels, network.mean, network.std, levels="auto", card=card)


def loss_of(answers: Answers, config: DistillationConfig, device: torch.device) -> Loss:
    """Return the loss of a student: mean squared error of each teacher's features, and T²·KL of the class scores."""
    features = [torch.from_numpy(part).to(device) for part in answers.features]
    scores = None if answers.scores is None else torch.from_numpy(answers.scores).to(device)
    widths = [part.shape[2] for part in features] + ([] if scores is None else [scores.shape[2]])
    t = config.temperature

    def loss(output: Tensor, index: Tensor, flipped: Tensor) -> Tensor:
        parts, view = torch.split(output, widths, 1), flipped.long()
        missed = [F.mse_loss(part, known[view, index].float()) for part, known in zip(parts, features, strict=False)]
        total = config.features * torch.stack(missed).mean() if missed else output.new_zeros(())
        if scores is not None:
            wanted = (scores[view, index].float() / t).log_softmax(1)
            divergence = F.kl_div((parts[-1] / t).log_softmax(1), wanted, reduction="batchmean", log_target=True)
            total = total + config.scores * t**2 * divergence
        return total

    return loss


def _card(
    network: Network, photographs: Images, answers: Answers, config: DistillationConfig, loss: float
) -> dict[str, Any]:
    """Return where a student comes from. Its licence names those of its start and of all teachers."""
    sources = [("start", network.card), *((str(card["name"]), card) for card in answers.teachers)]
    terms = [f"{source}: {card.get('terms') or _NOT_STATED}" for source, card in sources]
    return {
        "arch": network.card.get("arch", network.arch),
        "source": f"ssd-edge distill, on {len(photographs):,} photographs without labels",
        "photographs": photographs.digest().hex(),
        "data": f"that of its start ({network.card.get('data', _NOT_STATED)}), its teachers', and these photographs",
        "terms": "; ".join(dict.fromkeys(terms)),
        "start": {**network.card, "weights": network.weights},
        "teachers": [dict(card) for card in answers.teachers],
        "config": {
            **dataclasses.asdict(config),
            "student": names.public(config.student),
            "weights": Path(config.weights).name if config.weights else "",
        },
        "loss": round(loss, 6),
        "versions": torch_onnx.require_exporter(),
    }
