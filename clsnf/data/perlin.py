"""Perlin noise at rotated coordinates, for a batch of samples with their own frequencies, angles and gradients.

Unusual: nothing is drawn axis-aligned and rotated afterwards, which leaves empty corners. Each pixel's coordinates are turned, and
the noise is evaluated there. The lattice's place is random too; else one of its nodes, where the noise is zero, would lie in the
middle of every image and no defect ever would. A lattice is one line of gradients wound up in rows, the end of a row joined to the
next one's beginning and the end of the line to its start: it has no borders, and a node's neighbours are at fixed distances.
Called by :mod:`clsnf.data.defects`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# A gradient is one of 256 directions, stored as a byte: eight of them cost one random word, and a table gives bit-equal vectors
# where a vectorised cosine would depend on the place in the array. The table holds a vector in 32 bits, the upper half of x as a
# float32 and then that of y, so that one look-up finds both; read as a float32, the whole is x to within 1/256.
_ANGLES = (np.arange(256) + 0.5) * (2 * np.pi / 256)
_HALVES = (math.sqrt(2) * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])).astype(np.float32).view(np.uint32) >> 16
_GRADIENTS = torch.from_numpy((_HALVES[0] << 16 | _HALVES[1]).view(np.int32))  # (256,), vectors of length sqrt(2), DRAEM's factor


# Pixels evaluated at once: bounds the memory (about 70 bytes a pixel) and keeps a CPU's work inside its caches.
_PIXELS_AT_ONCE = 2**17
_PIXELS_AT_ONCE_ELSEWHERE = 2**23


def lattice_side(max_frequency_power: int) -> int:
    """Nodes in a row for frequencies up to ``2^max_frequency_power``: a power of two above a square image's diagonal in cells."""
    return 2 ** (max_frequency_power + 1)


def perlin_regions(
    size: tuple[int, int], lattice: Tensor, frequency: Tensor, angle: Tensor, phase: Tensor, threshold: float
) -> Tensor:
    """Where :func:`perlin_noise` of these arguments is above ``threshold``, bool (B, H, W), in bounded memory."""
    height, width = size
    count, device = len(lattice), lattice.device
    at_once = _PIXELS_AT_ONCE if device.type == "cpu" else _PIXELS_AT_ONCE_ELSEWHERE
    step = max(1, min(count, at_once // (height * width)))
    gradients = _along_the_line(lattice)
    rows, columns = _turned_coordinates(size, frequency, angle, phase, device)
    regions = torch.empty(count, height, width, dtype=torch.bool, device=device)
    workspace = _Workspace(step, size, device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        noise = _evaluate(gradients[part], [axis[part] for axis in rows], [axis[part] for axis in columns], workspace)
        torch.gt(noise, threshold, out=regions[part])
    return regions


def perlin_noise(size: tuple[int, int], lattice: Tensor, frequency: Tensor, angle: Tensor, phase: Tensor) -> Tensor:
    """Perlin noise, float32 (B, H, W) in [-1, 1].

    ``size``: (H, W). ``lattice``: uint8 (B, P * P), P rows of gradients' directions in 256ths of a turn, P a power of two; the noise
    is computed on its device. ``frequency``: (B, 2) lattice cells over the image's height and width before turning. ``angle``: (B,)
    in radians, the turn about the image's centre. ``phase``: (B, 2) lattice coordinates (y, x) of that centre. These three are
    float64 on the CPU.

    Each value is sqrt(2) times the blend, with weights 6t^5 - 15t^4 + 10t^3, of the four corners' unit gradients times the offset
    from the corner (Perlin, "Improving Noise", SIGGRAPH 2002; the factor is DRAEM's).
    """
    rows, columns = _turned_coordinates(size, frequency, angle, phase, lattice.device)
    return _evaluate(_along_the_line(lattice), rows, columns, _Workspace(len(lattice), size, lattice.device))


def _turned_coordinates(
    size: tuple[int, int], frequency: Tensor, angle: Tensor, phase: Tensor, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Lattice rows and columns of all pixel centres, each as two parts to be added, float32 (B, H, 1) and (B, 1, W)."""
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
    """A lattice's gradients, (B, P * P) -> int32 (B, P * P + P + 1), its start repeated for the neighbours of its end."""
    line = torch.cat([lattice, lattice[:, : math.isqrt(lattice.shape[1]) + 1]], dim=1)
    return _GRADIENTS.to(lattice.device).index_select(0, line.int().flatten()).view(line.shape)


class _Workspace:
    """Memory of one evaluation, used again by the next: memory from the system costs more than the arithmetic done in it."""

    def __init__(self, count: int, size: tuple[int, int], device: torch.device) -> None:
        pixels = size[0] * size[1]
        self.planes = torch.empty(6, count, *size, device=device)
        self.node = torch.empty(count, pixels, dtype=torch.int64, device=device)
        self.gradients = torch.empty(4, 2, count, pixels, dtype=torch.int32, device=device)


def _evaluate(gradients: Tensor, rows: list[Tensor], columns: list[Tensor], workspace: _Workspace) -> Tensor:
    """The noise (B, H, W) at the sums of the given parts; lies in the workspace."""
    count = len(gradients)
    down, right, up, back, down_weight, right_weight = workspace.planes[:, :count]
    side = math.isqrt(gradients.shape[1])
    nodes = side * side
    torch.add(*rows, out=down)
    torch.add(*columns, out=right)
    top, left = torch.floor(down, out=up), torch.floor(right, out=back)
    down.sub_(top)
    right.sub_(left)
    # exact in float32 while coordinates are below 2^24 / P; the mask closes the line of nodes to a ring
    node = workspace.node[:count].copy_(left.add_(top, alpha=side).view(count, -1)).bitwise_and_(nodes - 1)
    torch.sub(down, 1, out=up)
    torch.sub(right, 1, out=back)
    offsets = ((right, down), (back, down), (right, up), (back, up))
    dots = []
    for distance, found, (along_x, along_y) in zip((0, 1, side, side + 1), workspace.gradients[:, :, :count], offsets, strict=True):
        torch.gather(gradients[:, distance : distance + nodes], 1, node, out=found[0])
        torch.bitwise_left_shift(found[0], 16, out=found[1])
        x, y = found.view(torch.float32).view(2, *down.shape)
        dots.append(x.mul_(along_x).addcmul_(y, along_y))
    _fade(down, out=down_weight)
    _fade(right, out=right_weight)
    upper, lower = dots[0].lerp_(dots[1], right_weight), dots[2].lerp_(dots[3], right_weight)
    return upper.lerp_(lower, down_weight)


def _fade(t: Tensor, out: Tensor) -> None:
    """6t^5 - 15t^4 + 10t^3, t in [0, 1]."""
    torch.mul(t, 6, out=out).sub_(15).mul_(t).add_(10).mul_(t).mul_(t).mul_(t)
