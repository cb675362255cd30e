"""Training of a backbone on labels or towards teachers, with a one-cycle schedule and bfloat16 autocast.

The whole dataset is kept in memory as uint8 and augmented on the training device, without loader processes. The recipe
and its throughput are in docs/backbone.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_edge.backbones.checkpoint import Checkpoint, State
from ssd_edge.backbones.networks import ARCHITECTURES, FEATURES, PIXEL_MEAN, PIXEL_STD
from ssd_edge.backbones.ranks import Ranks
from ssd_edge.config import PretrainingConfig, ScheduleConfig
from ssd_edge.errors import InputError

Report = Callable[[int, int, float, float], None]  # epoch, epochs, loss, seconds so far
# Of the network's output (N, …), the positions of the images, and which of them were flipped.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
ALONE = Ranks()


def normalise(images: Tensor, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD) -> Tensor:
    """Normalise uint8 images ``(N, 3, H, W)`` to float32, as `EmbeddingNetwork` does."""
    shift, scale = (torch.tensor(part, device=images.device).view(1, 3, 1, 1) for part in (mean, std))
    return (images.float() / 255.0 - shift) / scale


class Moves(NamedTuple):
    """Random choices of the augmentation of N images, int64 or bool ``(N,)``: they are those of a sample in an epoch.

    Attributes:
        top: First row of the crop.
        left: First column of the crop.
        flip: True for a horizontal flip.
        y: Row of the centre of the square.
        x: Column of it.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    y: Tensor
    x: Tensor


def draw(count: int, side: tuple[int, int], crop: int, cutout: int, generator: torch.Generator) -> Moves:
    """Draw how images of height and width `side` are augmented; the other arguments are those of `augment`.

    Args:
        count: Number of images, of all processes.
        side: Height and width.
        crop: Padding in pixels.
        cutout: Side of the square in pixels.
        generator: Generator on the CPU, so that a seed gives the same augmentation on every device.
    """

    def below(limit: int) -> Tensor:
        return torch.randint(0, limit, (count,), generator=generator)

    top, left = below(2 * crop + 1), below(2 * crop + 1)
    flip = torch.rand(count, generator=generator) < 0.5
    y, x = (below(side[0]), below(side[1])) if cutout else (top, left)
    return Moves(top, left, flip, y, x)


def augment(images: Tensor, crop: int, cutout: int, moves: Moves) -> Tensor:
    """Apply a crop of the reflect-padded image, a horizontal flip and an optional grey square (cutout).

    Args:
        images: float ``(N, 3, H, W)``.
        crop: Padding in pixels. 0: no crop.
        cutout: Side of the square in pixels. 0: no square.
        moves: What was drawn for these images.
    """
    count, _, height, width = images.shape
    device = images.device
    top, left, flip, y, x = (part.to(device).view(count, 1, 1) for part in moves)
    rows = torch.arange(height, device=device).view(1, height, 1)
    columns = torch.arange(width, device=device).view(1, 1, width)
    padded = F.pad(images, (crop,) * 4, mode="reflect") if crop else images
    turned = torch.where(flip, width - 1 - columns, columns)
    sample = torch.arange(count, device=device).view(count, 1, 1)
    images = padded.permute(0, 2, 3, 1)[sample, rows + top, turned + left].permute(0, 3, 1, 2)
    if cutout:
        hole = ((rows - y).abs() <= cutout // 2) & ((columns - x).abs() <= cutout // 2)
        images = images.masked_fill(hole[:, None], 0.0)
    return images


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Return True unless bfloat16 is emulated: on a CPU without AVX-512 training is 17 times slower than in float32."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def train_backbone(
    images: Tensor | None,
    labels: Tensor | None,
    config: PretrainingConfig,
    device: torch.device,
    report: Report,
    ranks: Ranks = ALONE,
    checkpoint: Checkpoint | None = None,
) -> tuple[nn.Module, nn.Linear]:
    """Train a body and a linear head from scratch.

    Args:
        images: uint8 ``(N, 3, H, W)``, moved to `device` as a whole. None on all processes but that of rank 0.
        labels: int64 ``(N,)``; each class has at least one image. None as for `images`.
        config: Schedule.
        device: Training device.
        report: Called after each epoch.
        ranks: The processes that train together.
        checkpoint: Where the training is continued, and its state is kept after each epoch; None on the other ranks.

    Returns:
        The trained body and head in eval mode on the CPU.

    Raises:
        InputError: The loss is no longer finite, e.g. because the learning rate is too high.
    """
    images, truth = ranks.share(images), ranks.share(labels).to(device)
    torch.manual_seed(config.seed)
    body = ARCHITECTURES[config.arch]()
    head = nn.Linear(FEATURES, int(truth.max()) + 1)

    def loss(logits: Tensor, index: Tensor, flipped: Tensor) -> Tensor:
        return F.cross_entropy(logits, truth[index], label_smoothing=config.label_smoothing)

    kind = "sgd" if config.arch == "resnet9" else "adamw"
    fit(nn.Sequential(body, head), images, loss, config, kind, device, report, ranks=ranks, checkpoint=checkpoint)
    return body, head


def fit(
    model: nn.Module,
    images: Tensor,
    loss: Loss,
    config: ScheduleConfig,
    kind: str,
    device: torch.device,
    report: Report,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
    ranks: Ranks = ALONE,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train a network in place; it is left in eval mode on the CPU.

    With several processes, each computes its part of every batch. Samples, augmentation and steps are those of a single
    process, so that the result is, too, up to the order in which numbers are added.

    Args:
        model: From normalised images ``(N, 3, H, W)`` to what `loss` takes.
        images: uint8 ``(N, 3, H, W)``, moved to `device` as a whole.
        loss: See `Loss`; its first argument is float32.
        config: Schedule.
        kind: The optimiser if `config.optimiser` is ``auto``.
        device: Training device.
        report: Called after each epoch.
        mean: Per channel, for pixels in 0..1.
        std: Per channel.
        ranks: The processes that train together.
        checkpoint: Where the training is continued, and its state is kept after each epoch; None on the other ranks.

    Raises:
        BundleRefusedError: The checkpoint is damaged.
        InputError: The checkpoint belongs to another training, the batch is smaller than the number of processes, or
            the loss is no longer finite, e.g. because the learning rate is too high.
    """
    generator = torch.Generator().manual_seed(config.seed)
    # the stubs lack `memory_format`
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(device)
    batch = min(config.batch, len(images))
    steps_per_epoch = max(1, len(images) // batch)
    kind = kind if config.optimiser == "auto" else config.optimiser
    # no weight decay on biases and normalisation
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    decay = config.weight_decay or (5e-4 if kind == "sgd" else 5e-3)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    peak = config.lr or (0.4 if kind == "sgd" else 0.01)
    optimiser: torch.optim.Optimizer
    if kind == "sgd":
        optimiser = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    else:
        optimiser = torch.optim.AdamW(groups, lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peak, total_steps=config.epochs * steps_per_epoch, pct_start=0.2, cycle_momentum=False
    )
    state, done, spent = State(model, optimiser, schedule, generator), 0, 0.0
    if saved := ranks.share_bytes(checkpoint.read() if checkpoint else b""):
        metadata = state.restore(saved)
        done, spent = metadata["epoch"], metadata["seconds"]
    mine = ranks.part(batch)
    share = (mine.stop - mine.start) / batch
    started = time.monotonic() - spent
    with ranks.training(model) as trained:
        for epoch in range(done, config.epochs):
            model.train()
            order = torch.randperm(len(images), generator=generator).to(device)
            total = torch.zeros((), device=device)
            for step in range(steps_per_epoch):
                moves = draw(batch, (images.shape[2], images.shape[3]), config.crop, config.cutout, generator)
                moves = Moves(*(part[mine] for part in moves))
                index = order[step * batch : (step + 1) * batch][mine]
                inputs = augment(normalise(images[index], mean, std), config.crop, config.cutout, moves)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.amp and _has_fast_bfloat16(device)):
                    output = trained(inputs.contiguous(memory_format=torch.channels_last))
                missed = share * loss(output.float(), index, moves.flip.to(device))
                optimiser.zero_grad(set_to_none=True)
                # gradients are averaged over the processes, but those of the parts of a mean add up
                (ranks.count * missed).backward()
                if kind == "adamw":
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                total += missed.detach()
            mean_loss = float(ranks.total(total)) / steps_per_epoch
            if not math.isfinite(mean_loss):
                raise InputError(f"the loss became {mean_loss} in epoch {epoch + 1}; lower train.lr (now {peak})")
            if checkpoint:
                checkpoint.write(state, epoch + 1, time.monotonic() - started)
            report(epoch + 1, config.epochs, mean_loss, time.monotonic() - started)
    model.eval().to("cpu")


@torch.inference_mode()
def top1(body: nn.Module, head: nn.Linear, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Return the top-1 accuracy on uint8 images ``(N, 3, H, W)``."""
    body, head = body.to(device).eval(), head.to(device).eval()
    correct = 0
    for part, truth in zip(torch.split(images, 1000), torch.split(labels, 1000), strict=True):
        correct += int((head(body(normalise(part.to(device)))).argmax(1).cpu() == truth).sum())
    body.cpu()
    head.cpu()
    return correct / max(1, len(labels))
