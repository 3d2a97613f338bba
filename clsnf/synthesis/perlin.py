"""Perlin noise at rotated coordinates, for a batch of samples.

Each sample has its own frequencies, angle, phase and gradients. Noise that is drawn axis-aligned
and rotated afterwards has empty corners. Here each pixel's coordinates are turned, and the noise is
evaluated there. The lattice's position is random too: otherwise one of its nodes, where the noise
is zero, would lie in the middle of every image, and no defect ever would.

A lattice is one line of gradients wound up in rows. The end of a row joins the next row's
beginning, and the end of the line joins its start. So the lattice has no borders, and a node's
neighbours are at fixed distances. Called by :mod:`clsnf.synthesis.training_defects`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# A gradient is one of 256 directions, stored as a byte: eight of them cost one random word. A table
# gives bit-equal vectors, where a vectorised cosine may depend on the place in the array. The table
# holds a vector in 32 bits: the upper half of x as a float32, then that of y. So one look-up finds
# both, and the whole read as a float32 is x to within 1/256.
_ANGLES = (np.arange(256) + 0.5) * (2 * np.pi / 256)
_HALVES = (math.sqrt(2) * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])).astype(np.float32).view(
    np.uint32
) >> 16
# (256,), vectors of length sqrt(2), DRAEM's factor
_GRADIENTS = torch.from_numpy((_HALVES[0] << 16 | _HALVES[1]).view(np.int32))

# Pixels that tensors evaluate at once: bounds their memory, about 70 bytes a pixel.
_PIXELS_AT_ONCE = 2**23


def lattice_side(max_frequency_power: int) -> int:
    """Nodes in a row of the lattice for frequencies up to ``2^max_frequency_power``.

    It is the power of two above the diagonal of a square image in cells.
    """
    return 2 ** (max_frequency_power + 1)


def perlin_regions(
    size: tuple[int, int],
    lattice: Tensor,
    frequency: Tensor,
    angle: Tensor,
    phase: Tensor,
    threshold: float,
) -> Tensor:
    """Where :func:`perlin_noise` of these arguments is above ``threshold``, bool (B, H, W).

    The memory that it needs is bounded. On a CPU the regions do not depend on whether torch fuses
    multiplications and additions there; the last bits of the noise do.
    """
    if lattice.device.type != "cpu":
        return regions_by_tensors(size, lattice, frequency, angle, phase, threshold)
    from clsnf.synthesis import kernels  # imported here: other devices need not wait for Numba

    rows, columns = _turned_coordinates(size, frequency, angle, phase, lattice.device)
    down_rows, down_columns, right_rows, right_columns = (
        part.flatten(1).numpy() for part in (*rows, *columns)
    )
    line, side = _along_the_line(lattice).numpy(), math.isqrt(lattice.shape[1])
    regions = torch.empty(len(lattice), *size, dtype=torch.bool)
    kernels.noise_above(
        line,
        down_rows,
        down_columns,
        right_rows,
        right_columns,
        side,
        np.float32(threshold),
        regions.numpy(),
    )
    return regions


def regions_by_tensors(
    size: tuple[int, int],
    lattice: Tensor,
    frequency: Tensor,
    angle: Tensor,
    phase: Tensor,
    threshold: float,
) -> Tensor:
    """:func:`perlin_regions` as tensor operations on any device."""
    at_once = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    parts = (part.split(at_once) for part in (lattice, frequency, angle, phase))
    return torch.cat([perlin_noise(size, *some) > threshold for some in zip(*parts, strict=True)])


def perlin_noise(
    size: tuple[int, int], lattice: Tensor, frequency: Tensor, angle: Tensor, phase: Tensor
) -> Tensor:
    """Perlin noise, float32 (B, H, W) in [-1, 1], on the lattice's device.

    Each value is sqrt(2) times the blend, with weights 6t^5 - 15t^4 + 10t^3, of the four corners'
    unit gradients times the offset from the corner (Perlin, "Improving Noise", SIGGRAPH 2002; the
    factor is DRAEM's).

    Args:
        size: (H, W).
        lattice: uint8 (B, P * P), P rows of the gradients' directions in 256ths of a turn; P is a
            power of two.
        frequency: float64 (B, 2) on the CPU, lattice cells over the image's height and width before
            turning.
        angle: float64 (B,) on the CPU, in radians: the turn about the image's centre.
        phase: float64 (B, 2) on the CPU, lattice coordinates (y, x) of that centre.
    """
    side, nodes = math.isqrt(lattice.shape[1]), lattice.shape[1]
    gradients = _along_the_line(lattice)
    rows, columns = _turned_coordinates(size, frequency, angle, phase, lattice.device)
    down, right = rows[0] + rows[1], columns[0] + columns[1]
    top, left = down.floor(), right.floor()
    down, right = down.sub_(top), right.sub_(left)
    up, back = down - 1, right - 1
    # Exact in float32 while coordinates are below 2^24 / P. The mask closes the line of nodes to a
    # ring.
    node = left.add_(top, alpha=side).long().bitwise_and_(nodes - 1).flatten(1)
    dots = []
    for distance, along_x, along_y in (
        (0, right, down),
        (1, back, down),
        (side, right, up),
        (side + 1, back, up),
    ):
        found = gradients[:, distance : distance + nodes].gather(1, node).view(down.shape)
        x, y = found.view(torch.float32), (found << 16).view(torch.float32)
        dots.append((x * along_x).addcmul_(y, along_y))
    along = _fade(right)
    upper, lower = dots[0].lerp_(dots[1], along), dots[2].lerp_(dots[3], along)
    return upper.lerp_(lower, _fade(down))


def _turned_coordinates(
    size: tuple[int, int], frequency: Tensor, angle: Tensor, phase: Tensor, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Lattice rows and columns of all pixel centres.

    Each is given as two parts to be added, float32 (B, H, 1) and (B, 1, W).
    """
    height, width = size
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def parts(along_y: Tensor, along_x: Tensor, axis: int) -> list[Tensor]:
        scale, offset = frequency[:, axis, None] / size[axis], phase[:, axis, None]
        by_row, by_column = scale * along_y * y + offset, scale * along_x * x  # (B, H), (B, W)
        return [by_row.float().to(device)[:, :, None], by_column.float().to(device)[:, None, :]]

    return parts(cos, sin, 0), parts(-sin, cos, 1)


def _along_the_line(lattice: Tensor) -> Tensor:
    """A lattice's gradients along its line: (B, P * P) -> int32 (B, P * P + P + 1).

    Its start is repeated at the end, for the neighbours of the last nodes.
    """
    line = torch.cat([lattice, lattice[:, : math.isqrt(lattice.shape[1]) + 1]], dim=1)
    return _GRADIENTS.to(lattice.device).index_select(0, line.int().flatten()).view(line.shape)


def _fade(t: Tensor) -> Tensor:
    """6t^5 - 15t^4 + 10t^3, t in [0, 1]."""
    return (t * 6).sub_(15).mul_(t).add_(10).mul_(t).mul_(t).mul_(t)
