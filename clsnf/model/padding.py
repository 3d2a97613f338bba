"""Convolutions that pad by reflection, fast on CPUs.

On CPUs, ``torch.nn.functional.pad(mode="reflect")`` loses the channels-last format and copies the
whole map several times. That makes it the most expensive operation of a small network
(``benchmarks/cpu_operators.py``). Here the border rows and columns are copied one by one, in the
map's own memory format, and the backward pass costs the same. Other devices use PyTorch's padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ReflectPad(torch.autograd.Function):
    """Reflection padding of (B, C, h, w) by p rows and q columns on each side; p < h, q < w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: int, q: int) -> Tensor:
        ctx.padding = p, q
        b, c, h, w = x.shape
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if nhwc else torch.contiguous_format
        y = torch.empty(
            (b, c, h + 2 * p, w + 2 * q), dtype=x.dtype, device=x.device, memory_format=layout
        )
        y[:, :, p : p + h, q : q + w] = x
        for i in range(1, q + 1):  # the column i steps outside is the column i steps inside
            y[:, :, p : p + h, q - i] = x[:, :, :, i]
            y[:, :, p : p + h, q + w - 1 + i] = x[:, :, :, w - 1 - i]
        for i in range(1, p + 1):  # whole rows, corners with them
            y[:, :, p - i] = y[:, :, p + i]
            y[:, :, p + h - 1 + i] = y[:, :, p + h - 1 - i]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        p, q = ctx.padding
        h, w = grad.shape[2] - 2 * p, grad.shape[3] - 2 * q
        rows = grad[:, :, p : p + h]
        if p:
            rows = rows.clone(memory_format=torch.preserve_format)
        for i in range(1, p + 1):
            rows[:, :, i] += grad[:, :, p - i]
            rows[:, :, h - 1 - i] += grad[:, :, p + h - 1 + i]
        x = rows[:, :, :, q : q + w].clone(memory_format=torch.preserve_format)
        for i in range(1, q + 1):
            x[:, :, :, i] += rows[:, :, :, q - i]
            x[:, :, :, w - 1 - i] += rows[:, :, :, q + w - 1 + i]
        return x, None, None


def reflect_pad(x: Tensor, p: int, q: int) -> Tensor:
    """Pad maps by reflection, as ``numpy.pad(mode="reflect")`` does.

    A map that is smaller than its padding is reflected again and again; a single row or column is
    repeated.

    Args:
        x: (B, C, h, w).
        p: rows to add above and below.
        q: columns to add left and right.
    """
    h, w = x.shape[2:]
    if p >= h or q >= w:
        return _pad_small_map(x, p, q)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.pad(x, (q, q, p, p), mode="reflect")
    padded: Tensor = _ReflectPad.apply(x, p, q)
    return padded


def _pad_small_map(x: Tensor, p: int, q: int) -> Tensor:
    """Pad a map that one reflection does not fill; on every device alike."""
    while p or q:
        h, w = x.shape[2:]
        mode = "reflect" if (h > 1 or not p) and (w > 1 or not q) else "replicate"
        # One row or column has nothing to reflect, so it is repeated; the other axis waits.
        rows = p if h == 1 else 0 if mode == "replicate" else min(p, h - 1)
        columns = q if w == 1 else 0 if mode == "replicate" else min(q, w - 1)
        x = F.pad(x, (columns, columns, rows, rows), mode=mode)
        p, q = p - rows, q - columns
    return x


class ReflectConv2d(nn.Conv2d):
    """``nn.Conv2d`` that pads by reflection; parameters and their names are the same."""

    @classmethod
    def like(cls, layer: nn.Conv2d) -> ReflectConv2d:
        """A convolution of the same shape that shares the layer's parameters."""
        made = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=layer.bias is not None,
            device="meta",  # no parameters of its own: none are allocated, and none drawn
        )
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p, q = (int(v) for v in self.padding)
        if input.device.type != "meta" and torch.is_autocast_enabled(input.device.type):
            # Before the copy: the cast map is smaller.
            input = input.to(torch.get_autocast_dtype(input.device.type))
        x = reflect_pad(input, p, q) if p or q else input
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


def pad_by_reflection(module: nn.Module) -> None:
    """Replace every padded convolution inside `module` by one that pads by reflection.

    The new layers share the old ones' parameters, under the same names. Subclasses of ``nn.Conv2d``
    stay, because they pad in their own way (such as timm's "same" padding).
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if (
                type(layer) is nn.Conv2d
                and layer.padding != (0, 0)
                and not isinstance(layer.padding, str)
            ):
                setattr(parent, name, ReflectConv2d.like(layer))
