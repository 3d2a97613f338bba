"""Reflection padding and convolutions with it are PyTorch's own, values and gradients, in every
memory format.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clsnf.model.padding import ReflectConv2d, pad_by_reflection, reflect_pad

LAYOUTS = [torch.contiguous_format, torch.channels_last]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])


@st.composite
def maps_and_paddings(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    b, c, h, w = (draw(st.integers(1, 4)) for _ in range(4))
    h, w = h + draw(st.integers(0, 6)), w + draw(st.integers(0, 6))
    p, q = draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))
    x = torch.randn(
        b,
        c,
        h,
        w,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
    )
    return x.contiguous(memory_format=draw(st.sampled_from(LAYOUTS))), p, q


@given(maps_and_paddings())
@settings(deadline=None)
def test_padding_and_its_gradient_are_torch_s_own(case: tuple[Tensor, int, int]) -> None:
    x, p, q = case
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    padded, expected = reflect_pad(mine, p, q), F.pad(theirs, (q, q, p, p), mode="reflect")
    assert torch.equal(padded, expected)
    weights = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    padded.backward(weights)
    expected.backward(weights)
    assert mine.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 0), (0, 3), (3, 4)])
@by_layout
def test_the_gradient_is_that_of_finite_differences(
    p: int, q: int, layout: torch.memory_format
) -> None:
    x = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64)
        .contiguous(memory_format=layout)
        .requires_grad_()
    )
    assert torch.autograd.gradcheck(lambda x: reflect_pad(x, p, q), x)


def test_the_gradient_is_right_where_the_one_that_comes_back_is_a_view() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reflect_pad(x, 1, 1).sum(dim=1), x
    )  # an expanded gradient
    assert torch.autograd.gradcheck(lambda x: reflect_pad(x, 1, 1).transpose(2, 3)[..., ::2], x)


def test_a_map_keeps_its_memory_format() -> None:
    x = torch.randn(2, 8, 6, 5)
    assert reflect_pad(x, 1, 2).is_contiguous()
    assert reflect_pad(x.contiguous(memory_format=torch.channels_last), 1, 2).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 5), (4, 4)])
@pytest.mark.parametrize(("p", "q"), [(4, 4), (7, 0), (0, 9), (3, 12)])
def test_a_map_smaller_than_its_padding_is_reflected_again(
    size: tuple[int, int], p: int, q: int
) -> None:
    x = torch.rand(2, 3, *size)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (p, p), (q, q)), mode="reflect")
    assert np.array_equal(reflect_pad(x, p, q).numpy(), expected)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "7x7 without bias": {"kernel_size": 7, "padding": 3, "stride": 2, "bias": False},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 4},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "1x1": {"kernel_size": 1},
    "one axis": {"kernel_size": (1, 5), "padding": (0, 2)},
}


def pair(arguments: dict[str, Any]) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A reflecting convolution and PyTorch's, with the same parameters."""
    mine, theirs = (
        ReflectConv2d(4, 8, **arguments),
        nn.Conv2d(4, 8, **arguments, padding_mode="reflect"),
    )
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@by_layout
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_torch_s_with_reflect_padding(
    name: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    mine, theirs = (c.double() for c in pair(CONVOLUTIONS[name]))
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64).contiguous(memory_format=layout)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = mine(a), theirs(b)
    torch.testing.assert_close(y, z)
    weights = torch.randn_like(y)
    y.backward(weights)
    z.backward(weights)
    torch.testing.assert_close(a.grad, b.grad)
    for mine_p, theirs_p in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine_p.grad, theirs_p.grad)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_mixed_precision_gives_the_type_and_values_of_torch_s(name: str) -> None:
    torch.manual_seed(0)
    mine, theirs = pair(CONVOLUTIONS[name])
    x = torch.randn(2, 4, 9, 11)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, z = mine(a), theirs(b)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    z.float().square().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    torch.testing.assert_close(a.grad, b.grad, rtol=5e-2, atol=5e-2)


def test_only_plain_padded_convolutions_are_replaced_and_their_parameters_stay() -> None:
    class Own(nn.Conv2d):
        """Pads in its own way, as timm's "same" convolutions do."""

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding="same"),
        Own(4, 4, 3, padding=1),
    )
    before = dict(net.named_parameters())
    torch.manual_seed(3)
    pad_by_reflection(net.eval())
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert not any(layer.training for layer in net)
    assert [type(layer) for layer in net] == [ReflectConv2d, nn.Conv2d, nn.Conv2d, Own]
    assert all(after is before[name] for name, after in net.named_parameters())
    pad_by_reflection(net)  # a second time changes nothing
    assert [type(layer) for layer in net] == [ReflectConv2d, nn.Conv2d, nn.Conv2d, Own]
