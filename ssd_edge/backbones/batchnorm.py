"""Batch normalisation with the statistics of a batch that several processes share, on any device.

PyTorch's own, `torch.nn.SyncBatchNorm`, needs a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssd_edge.errors import InputError


@contextlib.contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Let the batch normalisation of a model use the statistics of all processes while it trains.

    Raises:
        InputError: The model has a kind of batch normalisation that does more, e.g. with its own activation.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        if type(layer).forward is not _BatchNorm.forward:
            raise InputError(
                f"the network has {type(layer).__name__}, which cannot be synchronised between processes; train it in "
                "one process"
            )
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: _BatchNorm, inputs: Tensor) -> Tensor:
    if not layer.training:
        return _BatchNorm.forward(layer, inputs)
    # not annotated in torch
    outputs, count, mean, var = _Normalise.apply(inputs, layer.weight, layer.bias, layer.eps)  # type: ignore[no-untyped-call]
    if layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        rate = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.lerp_(mean, rate)
        layer.running_var.lerp_(var * (count / (count - 1)), rate)
    result: Tensor = outputs
    return result


class _Normalise(torch.autograd.Function):
    """Function from a part of a batch to its normalised values, and the statistics of the whole batch.

    With x̂ = (x − m)/s, where mean m and deviation s are of the whole batch of n values per channel, and g the gradient
    of the output: the gradient of x is w/s · (g − Σg/n − x̂·Σ(g·x̂)/n), where the sums, too, are over all processes.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        axes = [0, *range(2, inputs.ndim)]
        precision = torch.promote_types(inputs.dtype, torch.float32)
        var, mean = (part.double() for part in torch.var_mean(inputs.to(precision), axes, correction=0))
        count = torch.full_like(mean, inputs.numel() // inputs.shape[1])
        sums = torch.stack([count, count * mean, count * (var + mean.square())])
        dist.all_reduce(sums)
        count, mean = sums[0], sums[1] / sums[0]
        var = (sums[2] / count - mean.square()).clamp_(min=0.0)
        count, mean, var = count.to(precision), mean.to(precision), var.to(precision)
        ctx.save_for_backward(inputs, weight, count, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(count, mean, var)
        return F.batch_norm(inputs, mean, var, weight, bias, training=False, eps=eps), count, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, count, mean, var = ctx.saved_tensors
        # as if the statistics were constants, in one pass; of weight and bias it is Σ(g·x̂) and Σg of this process
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], inputs, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight.double(), of_bias.double()])
        dist.all_reduce(sums)
        inverse = (var + ctx.eps).rsqrt()
        scale = inverse / count if weight is None else weight * inverse / count
        slope = scale * inverse * sums[0].to(scale.dtype)
        offset = scale * sums[1].to(scale.dtype) - slope * mean
        shape = [1, -1, *[1] * (inputs.ndim - 2)]
        offset, slope = (part.to(direct.dtype).view(shape) for part in (offset, slope))
        result = direct.sub_(offset).addcmul_(inputs, slope, value=-1)
        return result, (None if weight is None else of_weight), (None if weight is None else of_bias), None
