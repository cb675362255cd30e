"""EfficientNet-Lite 0 and 2: a stem, sixteen (or more) inverted residual blocks without squeeze-and-excitation, a head.

The parameters have the names of the published PyTorch weights, so that these load without a table.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

# Repeats, channels, kernel, stride of the first block, expansion of the seven stages of Lite0.
STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
STEM, HEAD = 32, 1280  # the same in all sizes
EPSILON = 1e-3  # of the batch normalisation


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding: an odd pixel goes to the right and to the bottom.

    The padding is computed from the size of the input in Python, so that it is constant in an exported graph.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = int(self.kernel_size[0]), int(self.stride[0])
        down, across = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[2:])
        if down % 2 or across % 2:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
            return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)
        return F.conv2d(x, self.weight, self.bias, self.stride, (down // 2, across // 2), 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


class Block(nn.Module):
    """Expand by a 1×1 convolution, filter each channel, project back; add the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inputs, wide), nn.BatchNorm2d(wide, EPSILON)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, wide), nn.BatchNorm2d(wide, EPSILON)
        self._project_conv, self._bn2 = _conv(wide, outputs), nn.BatchNorm2d(outputs, EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(images))) if self.expands else images
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        out: Tensor = x + images if self.adds else x
        return out


class EfficientNetLite(nn.Module):
    """From normalised pixels ``(N, 3, H, W)`` to 1,280 pooled features.

    Args:
        width: Factor of the channels, rounded to multiples of 8; stem and head keep theirs.
        depth: Factor of the repeats of all stages but the first and the last.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, STEM, 3, 2), nn.BatchNorm2d(STEM, EPSILON)
        blocks, inputs = [], STEM
        for number, (repeats, channels, kernel, stride, expansion) in enumerate(STAGES):
            outputs = _multiple_of_8(channels * width)
            inner = 0 < number < len(STAGES) - 1
            for repeat in range(math.ceil(repeats * depth) if inner else repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(inputs, HEAD), nn.BatchNorm2d(HEAD, EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        pooled: Tensor = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return pooled


def _multiple_of_8(channels: float) -> int:
    """Round to a multiple of 8, but not by more than a tenth down."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0: 224×224 pixels, 3.4 M parameters without the classifier."""
    return EfficientNetLite()


def lite2() -> nn.Module:
    """Return EfficientNet-Lite2: 260×260 pixels, 4.8 M parameters without the classifier."""
    return EfficientNetLite(1.1, 1.2)
