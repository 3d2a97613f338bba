"""Layers of a timm network that PyTorch can't train, or can't lay out, as they are.

**Strided 1x1 convolutions on few channels.** On CPUs, oneDNN's gradient of their weights writes
beyond its workspace: the process dies of a corrupted heap, hangs, or goes on with wrong numbers
(https://github.com/pytorch/pytorch/issues/136348, https://github.com/uxlfoundation/oneDNN/issues/6035).
That holds for channels-last maps of fewer channels than oneDNN's block, 8 with AVX2 and 16 with
AVX-512. The stems of RepVGG, MobileOne and FastViT are such layers. Here they take every s-th row
and column first, and then a convolution of stride 1, which is the same sum.

**Cached attention biases.** LeViT, TinyViT, EfficientFormer and EfficientViT keep the biases of
their attention from the first forward pass on while they are in evaluation mode. A backbone is in
that mode while it trains, too: its second step would go through a graph that is gone, and biases
that were cached before weights were loaded would stay.

**Tensors of rank 5**, such as the kernel of a three-dimensional convolution, have no channels-last
format of the kind that maps have.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_CHANNELS = 16  # oneDNN's largest block; from here on its gradient is right
_Module = TypeVar("_Module", bound=nn.Module)


class SlicingConv2d(nn.Conv2d):
    """A strided 1x1 ``nn.Conv2d``; parameters and their names are the same.

    It cuts the map down to the pixels that its stride visits before it convolves.
    """

    @classmethod
    def like(cls, layer: nn.Conv2d) -> SlicingConv2d:
        """A convolution of the same shape that shares the layer's parameters."""
        made = cls(
            layer.in_channels,
            layer.out_channels,
            (1, 1),
            layer.stride,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            device="meta",  # no parameters of its own: none are allocated, and none drawn
        )
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], weight, bias)


def slice_strided_convolutions(module: nn.Module) -> None:
    """Replace every convolution inside `module` whose gradient oneDNN computes wrongly.

    The new layers share the old ones' parameters, under the same names, and give the same maps.
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and _breaks_onednn(layer):
                setattr(parent, name, SlicingConv2d.like(layer))


def _breaks_onednn(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.padding == (0, 0)
        and layer.groups == 1
        and layer.in_channels < _FEW_CHANNELS
    )


def compute_attention_biases_anew(module: nn.Module) -> None:
    """Have the attention layers inside `module` look their biases up in each pass.

    They do so where their own flag says that they train; nothing else in them depends on it.
    """
    for part in module.modules():
        if hasattr(part, "attention_bias_cache"):
            part.attention_bias_cache = {}  # type: ignore[assignment]
            part.training = True


def to_channels_last(module: _Module) -> _Module:
    """Lay out the parameters and buffers of rank 4 channels last, in place; others stay.

    ``Module.to(memory_format=...)`` raises an error for tensors of rank 5.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.ndim == 4:
                setattr(part, name, buffer.to(memory_format=torch.channels_last))
    return module
