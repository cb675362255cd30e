"""Training of a backbone on labels or towards teachers, with a one-cycle schedule and bfloat16 autocast.

The whole dataset is kept in memory as uint8 and augmented on the training device, without loader processes. The recipe
and its throughput are in docs/backbone.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_edge.backbones.networks import ARCHITECTURES, FEATURES, PIXEL_MEAN, PIXEL_STD
from ssd_edge.config import PretrainingConfig, ScheduleConfig
from ssd_edge.errors import InputError

Report = Callable[[int, int, float, float], None]  # epoch, epochs, loss, seconds so far
# Of the network's output (N, …), the positions of the images, and which of them were flipped.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def normalise(images: Tensor, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD) -> Tensor:
    """Normalise uint8 images ``(N, 3, H, W)`` to float32, as `EmbeddingNetwork` does."""
    shift, scale = (torch.tensor(part, device=images.device).view(1, 3, 1, 1) for part in (mean, std))
    return (images.float() / 255.0 - shift) / scale


def augment(images: Tensor, crop: int, cutout: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Apply a random crop of the reflect-padded image, a horizontal flip and an optional grey square (cutout).

    Args:
        images: float ``(N, 3, H, W)``.
        crop: Padding in pixels. 0: no crop.
        cutout: Side of the square in pixels. 0: no square.
        generator: Generator on the CPU, so that a seed gives the same augmentation on every device.

    Returns:
        The images, and which of them were flipped, bool ``(N,)``.
    """
    count, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).view(1, height, 1)
    columns = torch.arange(width, device=device).view(1, 1, width)
    top = torch.randint(0, 2 * crop + 1, (count, 1, 1), generator=generator).to(device)
    left = torch.randint(0, 2 * crop + 1, (count, 1, 1), generator=generator).to(device)
    flip = (torch.rand(count, 1, 1, generator=generator) < 0.5).to(device)
    padded = F.pad(images, (crop,) * 4, mode="reflect") if crop else images
    columns = torch.where(flip, width - 1 - columns, columns)
    sample = torch.arange(count, device=device).view(count, 1, 1)
    images = padded.permute(0, 2, 3, 1)[sample, rows + top, columns + left].permute(0, 3, 1, 2)
    if cutout:
        y = torch.randint(0, height, (count, 1, 1), generator=generator).to(device)
        x = torch.randint(0, width, (count, 1, 1), generator=generator).to(device)
        columns = torch.arange(width, device=device).view(1, 1, width)
        hole = ((rows - y).abs() <= cutout // 2) & ((columns - x).abs() <= cutout // 2)
        images = images.masked_fill(hole[:, None], 0.0)
    return images, flip.flatten()


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Return True unless bfloat16 is emulated: on a CPU without AVX-512 training is 17 times slower than in float32."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def train_backbone(
    images: Tensor, labels: Tensor, classes: int, config: PretrainingConfig, device: torch.device, report: Report
) -> tuple[nn.Module, nn.Linear]:
    """Train a body and a linear head from scratch.

    Args:
        images: uint8 ``(N, 3, H, W)``, moved to `device` as a whole.
        labels: int64 ``(N,)``, below `classes`.
        classes: Number of classes.
        config: Schedule.
        device: Training device.
        report: Called after each epoch.

    Returns:
        The trained body and head in eval mode on the CPU.

    Raises:
        InputError: The loss is no longer finite, e.g. because the learning rate is too high.
    """
    torch.manual_seed(config.seed)
    body = ARCHITECTURES[config.arch]()
    head = nn.Linear(FEATURES, classes)
    truth = labels.to(device)

    def loss(logits: Tensor, index: Tensor, flipped: Tensor) -> Tensor:
        return F.cross_entropy(logits, truth[index], label_smoothing=config.label_smoothing)

    kind = "sgd" if config.arch == "resnet9" else "adamw"
    fit(nn.Sequential(body, head), images, loss, config, kind, device, report)
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
) -> None:
    """Train a network in place; it is left in eval mode on the CPU.

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

    Raises:
        InputError: The loss is no longer finite, e.g. because the learning rate is too high.
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
    started = time.monotonic()
    for epoch in range(config.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator).to(device)
        total = torch.zeros((), device=device)
        for step in range(steps_per_epoch):
            index = order[step * batch : (step + 1) * batch]
            inputs, flipped = augment(normalise(images[index], mean, std), config.crop, config.cutout, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp and _has_fast_bfloat16(device)):
                output = model(inputs.contiguous(memory_format=torch.channels_last))
            missed = loss(output.float(), index, flipped)
            optimiser.zero_grad(set_to_none=True)
            missed.backward()  # type: ignore[no-untyped-call]  # not annotated in torch
            if kind == "adamw":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += missed.detach()
        mean_loss = float(total) / steps_per_epoch
        if not math.isfinite(mean_loss):
            raise InputError(f"the loss became {mean_loss} in epoch {epoch + 1}; lower train.lr (now {peak})")
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
