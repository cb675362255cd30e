"""The two backbones that `ssd-edge pretrain` can train, and the module that adds preprocessing to them.

Both map normalised float images ``(N, 3, H, W)`` to features ``(N, 256)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 256
PIXEL_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, for pixels in 0..1
PIXEL_STD = (0.229, 0.224, 0.225)


class ConvMixer(nn.Module):
    """ConvMixer-256/8 with kernel 5 and patch 2, the feature extractor of the SDMLP and SSD papers.

    Each block is a depthwise convolution with a residual, then a pointwise one, each followed by GELU and
    batch normalisation (Trockman & Kolter, "Patches Are All You Need?", 2022).
    """

    def __init__(self, width: int = FEATURES, depth: int = 8, kernel: int = 5, patch: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, patch, stride=patch, bias=False), nn.GELU(), nn.BatchNorm2d(width)
        )
        self.depthwise = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
                nn.GELU(),
                nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )
        self.pointwise = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.GELU(), nn.BatchNorm2d(width))
            for _ in range(depth)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = pointwise(x + depthwise(x))
        pooled: Tensor = x.mean((2, 3))
        return pooled


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ResNet9(nn.Module):
    """A nine-layer residual net with a stride-2 stem: 2.4 M parameters, trainable on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 64, stride=2), _conv(64, 128), nn.MaxPool2d(2))
        self.residual1 = nn.Sequential(_conv(128, 128), _conv(128, 128))
        self.down = nn.Sequential(_conv(128, FEATURES), nn.MaxPool2d(2))
        self.residual2 = nn.Sequential(_conv(FEATURES, FEATURES), _conv(FEATURES, FEATURES))
        self.last = _conv(FEATURES, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.residual1(x)
        x = self.down(x)
        x = x + self.residual2(x)
        pooled: Tensor = self.last(x).mean((2, 3))
        return pooled


ARCHITECTURES: dict[str, type[nn.Module]] = {"resnet9": ResNet9, "convmixer": ConvMixer}


class EmbeddingNetwork(nn.Module):
    """A backbone with preprocessing and standardisation, as it is exported.

    Maps uint8 RGB ``(N, H, W, 3)`` to z = (f(image) − μ)/σ, float32 ``(N, D)``. Preprocessing and standardisation are
    in fp32.

    Args:
        body: Network from ``(N, 3, H, W)`` to ``(N, D)``.
        mu: Mean of each feature over the pretraining data, ``(D,)``.
        sigma: Standard deviation of each feature, ``(D,)``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    mu: Tensor
    sigma: Tensor

    def __init__(self, body: nn.Module, mu: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD))
        self.register_buffer("mu", mu.float())
        self.register_buffer("sigma", sigma.float())

    def forward(self, images: Tensor) -> Tensor:
        x = (images.to(torch.float32) / 255.0 - self.pixel_mean) / self.pixel_std
        features: Tensor = self.body(x.permute(0, 3, 1, 2))
        return (features.to(torch.float32) - self.mu) / self.sigma
