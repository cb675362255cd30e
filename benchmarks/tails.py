"""Training of the tail of a backbone on what its trunk gives for images, as adapt.py and tail.py need it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ssd_edge.adaptation.cut import LARGEST, Cut, cut, places
from ssd_edge.adaptation.tail import Tail, TailState
from ssd_edge.backbones.embedder import level_standardisation
from ssd_edge.backbones.graph import NetworkGraph
from ssd_edge.backbones.onnx import open_session, run
from ssd_edge.data import Images

MOST_NUMBERS = 32_768  # in the map of one image at which a network is cut
LEAST = 0.6  # of each side, in a random crop
LARGEST_HALF = float(np.finfo(np.float16).max)
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Schedule of a tail.

    Attributes:
        steps: Number of steps, whatever the number of images.
        batch: Images per step.
        rate: Peak of the one-cycle schedule, as a share of the size of each tensor: exporters fold batch normalisation
            into convolutions, whose weights then differ in size a thousandfold.
        head_rate: As well, of the linear layer.
        smoothing: Label smoothing.
        hold: Weight of the mean squared distance from the features of the original network, all of deviation 1.
    """

    steps: int = 200
    batch: int = 32
    rate: float = 5e-3
    head_rate: float = 1e-3
    smoothing: float = 0.1
    hold: float = 0.0


def earliest(graph: NetworkGraph) -> Cut:
    """Cut a network at the earliest place with a tail and a map that are not too large."""
    found = places(graph)
    fitting = [place for place in found if place.weights <= LARGEST and math.prod(place.shape) <= MOST_NUMBERS]
    return cut(graph, (fitting or found[-1:])[0].value)


def random_crops(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of each image, of 60 to 100 % of each side and not mirrored, enlarged to its size.

    Args:
        images: uint8 ``(N, size, size, 3)``.
        rng: Draws the squares.
    """
    size = images.shape[1]
    views = np.empty_like(images)
    for view, image in zip(views, images, strict=True):
        side = max(1, round(size * rng.uniform(LEAST, 1)))
        top, left = rng.integers(0, size - side + 1, 2)
        square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
        view[:] = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return views


def vectors_of(parts: Cut, graph: NetworkGraph, images: Images, views: int) -> np.ndarray:
    """Return what the trunk gives for each image and for random crops of it, float16 ``(views, N, T)``."""
    session, rng = open_session(parts.trunk), np.random.default_rng(0)
    found = []
    for pixels in images.batches(graph.pixels, BATCH):
        seen = [pixels, *(random_crops(pixels, rng) for _ in range(views - 1))]
        vectors = [np.clip(run(session, view), -LARGEST_HALF, LARGEST_HALF) for view in seen]
        found.append(np.stack(vectors).astype(np.float16))
    return np.concatenate(found, axis=1)


def train(
    state: TailState, vectors: np.ndarray, chosen: np.ndarray, labels: np.ndarray, widths: tuple[int, ...],
    schedule: Schedule,
) -> TailState:  # fmt: skip
    """Train a tail to tell classes apart, and return it.

    Args:
        state: The tail to start from.
        vectors: What the trunk gives for several views of each image, ``(V, N, T)``.
        chosen: Positions of the images to train on, ``(M,)``.
        labels: Class of each of these, ``(M,)``.
        widths: Widths of the levels of its features; a linear layer tells those of the last one apart.
        schedule: Schedule.
    """
    torch.manual_seed(0)
    rng, last = np.random.default_rng(0), widths[-1]
    _, rows = np.unique(labels, return_inverse=True)
    tail, original = Tail(state), Tail(state)
    moments = level_standardisation(features(original, vectors[0, chosen]), widths)
    mu, sigma = (torch.from_numpy(part[-last:].astype(np.float32)) for part in moments)
    head = nn.Linear(last, int(rows.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    batch = min(schedule.batch, len(chosen))
    optimiser, course = optimiser_of(tail, head, schedule, schedule.steps)
    truth, order = torch.from_numpy(rows), np.zeros(0, np.int64)
    for _ in range(schedule.steps):
        if len(order) < batch:
            order = rng.permutation(len(chosen))
        index, order = order[:batch], order[batch:]
        view = rng.integers(0, len(vectors), batch)
        inputs = torch.from_numpy(vectors[view, chosen[index]].astype(np.float32))
        seen = (tail(inputs)[:, -last:] - mu) / sigma
        loss = F.cross_entropy(head(seen), truth[index], label_smoothing=schedule.smoothing)
        if schedule.hold:
            with torch.no_grad():
                held = (original(inputs)[:, -last:] - mu) / sigma
            loss = loss + schedule.hold * F.mse_loss(seen, held)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # not annotated in torch
        nn.utils.clip_grad_norm_(tail.trained, 1.0)
        optimiser.step()
        course.step()
    return tail.state()


def optimiser_of(
    tail: Tail, head: nn.Module, schedule: Schedule, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return Adam for a tail and the layer on its features, and the course of its rates over some steps."""
    groups = [
        {"params": [tensor], "lr": schedule.rate * float(tensor.detach().square().mean().sqrt())}
        for tensor in tail.trained
    ]
    optimiser = torch.optim.Adam([*groups, {"params": list(head.parameters()), "lr": schedule.head_rate}])
    peaks = [group["lr"] for group in optimiser.param_groups]
    course = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peaks, total_steps=steps + 1, pct_start=0.2, cycle_momentum=False
    )
    return optimiser, course


@torch.inference_mode()
def features(tail: Tail, vectors: np.ndarray) -> np.ndarray:
    """Return the raw features ``(N, D)``, float32, of vectors ``(N, T)``."""
    parts = []
    for start in range(0, len(vectors), BATCH):
        part = np.ascontiguousarray(vectors[start : start + BATCH], np.float32)
        parts.append(tail(torch.from_numpy(part)).numpy())
    return np.concatenate(parts)
