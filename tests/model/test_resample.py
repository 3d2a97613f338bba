"""Resampling by matrices is PyTorch's interpolation with aligned corners, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.model.resample import _matrix, resample

SIDES = st.integers(1, 17)
MODES = st.sampled_from(["bicubic", "bilinear"])
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


@given(st.integers(1, 3), st.integers(1, 3), SIDES, SIDES, SIDES, SIDES, MODES, LAYOUTS)
@settings(deadline=None)
def test_values_and_gradients_are_interpolate_s(
    b: int, c: int, h: int, w: int, tall: int, wide: int, mode: str, layout: torch.memory_format
) -> None:
    x = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(h * 31 + w)).contiguous(
        memory_format=layout
    )
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = resample(mine, (tall, wide), mode)
    z = F.interpolate(theirs, size=(tall, wide), mode=mode, align_corners=True)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    y.backward(weights)
    z.backward(weights)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(8, 6), (3, 9), (7, 2)])
def test_the_gradient_is_that_of_finite_differences(mode: str, size: tuple[int, int]) -> None:
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resample(x, size, mode), x)


@given(SIDES, SIDES, MODES)
@settings(deadline=None)
def test_a_constant_stays_constant_and_corners_stay_put(h: int, tall: int, mode: str) -> None:
    torch.testing.assert_close(
        resample(torch.full((1, 1, h, h), 0.7), (tall, tall), mode),
        torch.full((1, 1, tall, tall), 0.7),
    )
    if h > 1 and tall > 1:
        x = torch.rand(1, 1, h, h)
        y = resample(x, (tall, tall), mode)
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            torch.testing.assert_close(y[0, 0][corner], x[0, 0][corner], rtol=1e-4, atol=1e-5)


def test_bilinear_values_stay_within_those_of_the_map() -> None:
    x = torch.rand(3, 1, 5, 7)
    y = resample(x, (31, 64), "bilinear")
    assert x.amin() - 1e-6 <= y.amin()
    assert y.amax() <= x.amax() + 1e-6


def test_a_map_of_the_wanted_size_is_left_alone() -> None:
    x = torch.rand(1, 2, 4, 6)
    assert resample(x, (4, 6)) is x


def test_mixed_precision_gives_the_region_s_type() -> None:
    x = torch.randn(2, 3, 8, 6)
    expected = F.interpolate(x, size=(16, 12), mode="bicubic", align_corners=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = resample(x, (16, 12))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=3e-2)


def test_matrices_first_made_for_prediction_serve_training_too() -> None:
    _matrix.cache_clear()
    with torch.inference_mode():
        resample(torch.rand(1, 1, 3, 3), (6, 6))
    x = torch.rand(1, 1, 3, 3, requires_grad=True)
    resample(x, (6, 6)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.sum(), torch.tensor(36.0))


def test_matrices_first_made_while_a_program_is_exported_serve_afterwards() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return resample(x, (6, 5))

    _matrix.cache_clear()
    x = torch.rand(2, 3, 4, 4)
    program = torch.export.export(Net(), (x,), strict=False)
    expected = F.interpolate(x, size=(6, 5), mode="bicubic", align_corners=True)
    torch.testing.assert_close(resample(x, (6, 5)), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(program.module()(x), resample(x, (6, 5)))
