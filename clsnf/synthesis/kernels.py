"""Makes training defects on a CPU in machine code: one pass over the pixels.

Everything here exists a second time as the tensor operations of :mod:`clsnf.synthesis.perlin` and
:mod:`clsnf.synthesis.fill`. Those serve all other devices and are the reference: the code here
gives the same bits, several times as fast, because a pixel's numbers never leave the registers.
Numba compiles a function at its first use and keeps the result beside this file or in the user's
cache. The module is imported where it is needed, because Numba takes 0.1 s and 55 MB.

The noise only decides whether a pixel is above the threshold. A loop that the compiler may fuse and
reorder decides where the noise is clearly above or below. The few pixels near the threshold are
evaluated again as torch does it: each operation is rounded in its turn, and those that torch's
vector code fuses (addcmul, lerp) are fused here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from clsnf.synthesis.augment import RECOLOURED, SHARPENED

Function = TypeVar("Function", bound=Callable[..., Any])

# Noise this near to the threshold is evaluated exactly. It is far more than reordering float32
# operations on values below 2 can change, and so little that few pixels are meant.
_UNCLEAR = np.float32(1e-4)


def _compiled(**options: Any) -> Callable[[Function], Function]:
    """A decorator: machine code that releases the interpreter's lock, kept on disk if possible."""

    def compile_it(function: Function) -> Function:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither this folder nor the user's cache can be written
            return njit(nogil=True, error_model="numpy", **options)(function)  # type: ignore[no-any-return]

    return compile_it


@njit(inline="always")
def _fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once: the product of two float32 is exact in float64."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@njit(inline="always")
def _fade(t: Any) -> Any:
    """6t^5 - 15t^4 + 10t^3, rounded after each step."""
    value = np.float32(6) * t
    value = value - np.float32(15)
    value = value * t
    value = value + np.float32(10)
    value = value * t
    value = value * t
    return value * t


@njit(inline="always")
def _lerp(start: Any, end: Any, weight: Any) -> Any:
    """torch.lerp, which starts from the nearer end."""
    if abs(weight) < np.float32(0.5):
        return _fused(weight, end - start, start)
    return _fused(weight - np.float32(1), end - start, end)


@njit(inline="always")
def _vector(gradient: Any) -> Any:
    """The x and y of a gradient, which lie in 32 bits together."""
    return np.int32(gradient).view(np.float32), np.int32(gradient << np.int32(16)).view(np.float32)


@_compiled()
def _exact(line: Any, down: Any, right: Any, side: Any) -> Any:
    """The noise at a position in the lattice, with torch's last bit."""
    one = np.float32(1)
    top, left = np.floor(down), np.floor(right)
    down, right = down - top, right - left
    up, back = down - one, right - one
    node = np.int32(left + top * np.float32(side)) & (side * side - 1)
    x0, y0 = _vector(line[node])
    x1, y1 = _vector(line[node + 1])
    x2, y2 = _vector(line[node + side])
    x3, y3 = _vector(line[node + side + 1])
    dot0, dot1 = _fused(y0, down, x0 * right), _fused(y1, down, x1 * back)
    dot2, dot3 = _fused(y2, up, x2 * right), _fused(y3, up, x3 * back)
    along = _fade(right)
    return _lerp(_lerp(dot0, dot1, along), _lerp(dot2, dot3, along), _fade(down))


@_compiled(fastmath={"contract", "nnan", "ninf", "nsz"})
def _about(
    line: Any, row_down: Any, down: Any, row_right: Any, right: Any, side: Any, noise: Any
) -> None:
    """The noise along a row of the image, except for the last bits.

    It is written so that it becomes vector code: unsigned indices need no test of their sign.
    """
    mask = np.int32(side * side - 1)
    one, six, ten, fifteen = np.float32(1), np.float32(6), np.float32(10), np.float32(15)
    width, beside, below = np.float32(side), np.uintp(1), np.uintp(side)
    for column in range(noise.shape[0]):
        d, r = row_down + down[column], row_right + right[column]
        top, left = np.floor(d), np.floor(r)
        d, r = d - top, r - left
        up, back = d - one, r - one
        node = np.uintp(np.uint32(np.int32(left + top * width) & mask))
        x0, y0 = _vector(line[node])
        x1, y1 = _vector(line[node + beside])
        x2, y2 = _vector(line[node + below])
        x3, y3 = _vector(line[node + below + beside])
        dot0, dot1 = x0 * r + y0 * d, x1 * back + y1 * d
        dot2, dot3 = x2 * r + y2 * up, x3 * back + y3 * up
        along = ((r * six - fifteen) * r + ten) * r * r * r
        upper, lower = dot0 + along * (dot1 - dot0), dot2 + along * (dot3 - dot2)
        noise[column] = upper + ((d * six - fifteen) * d + ten) * d * d * d * (lower - upper)


@_compiled()
def noise_above(
    lines: NDArray[np.int32],
    down_rows: NDArray[np.float32],
    down_columns: NDArray[np.float32],
    right_rows: NDArray[np.float32],
    right_columns: NDArray[np.float32],
    side: int,
    threshold: np.float32,
    regions: NDArray[np.bool_],
) -> None:
    """Where Perlin noise is above the threshold.

    Args:
        lines: (B, L), the gradients along each sample's line of nodes, x and y in 32 bits together.
        down_rows, down_columns: (B, H) and (B, W); their sum is a pixel's row in the lattice.
        right_rows, right_columns: (B, H) and (B, W); their sum is its column.
        side: nodes in a row of the lattice, a power of two.
        regions: (B, H, W), filled.
    """
    count, height, width = regions.shape
    noise = np.empty(width, np.float32)
    for sample in range(count):
        line, down, right = lines[sample], down_columns[sample], right_columns[sample]
        for row in range(height):
            row_down, row_right = down_rows[sample, row], right_rows[sample, row]
            _about(line, row_down, down, row_right, right, side, noise)
            inside, unclear = regions[sample, row], 0
            for column in range(width):
                inside[column] = noise[column] > threshold
                unclear += abs(noise[column] - threshold) < _UNCLEAR
            if unclear:
                for column in range(width):
                    if abs(noise[column] - threshold) < _UNCLEAR:
                        inside[column] = (
                            _exact(line, row_down + down[column], row_right + right[column], side)
                            > threshold
                        )


@njit(inline="always")
def _within(value: Any, most: Any) -> Any:
    return min(max(value, np.float32(0)), most)


@_compiled()
def fill(
    images: NDArray[np.float32],
    regions: NDArray[np.bool_],
    samples: NDArray[np.int64],
    sources: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    kinds: NDArray[np.int64],
    sharpness: NDArray[np.float32],
    levels: NDArray[np.uint8],
    colours: NDArray[np.float32],
    opacity: NDArray[np.float32],
) -> None:
    """Blend n samples' changed sources into their regions of the images, in place.

    Args:
        images: (B, 3, H, W) in [0, 1].
        regions: (B, H, W).
        samples: (n,), the samples' places in the batch.
        sources: (T * 3 * H * W,), see :class:`clsnf.synthesis.fill.SourceView`.
        rows, columns: (n, H + 2) and (n, W + 2), see there.
        kinds, sharpness, levels, colours: (n,), (n,), (n, 3, 256) and (n, 3), see
            :class:`clsnf.synthesis.augment.ColourChanges`.
        opacity: (n,).
    """
    height, width = images.shape[2], images.shape[3]
    one, white = np.float32(1), np.float32(255)
    levelled = np.empty(3, np.float32)
    for n in range(len(samples)):
        sample, opaque = samples[n], opacity[n]
        sharpened, recoloured = kinds[n] & SHARPENED != 0, kinds[n] & RECOLOURED != 0
        own, following, last = colours[n, 0], colours[n, 1], colours[n, 2]
        for row in range(height):
            inside = regions[sample, row]
            # Pixels of the region that are still to come in this row. Counting them first is vector
            # code, and most rows have none.
            left = 0
            for column in range(width):
                left += inside[column]
            column = -1
            while left > 0:
                column += 1
                if not inside[column]:
                    continue
                left -= 1
                for channel in range(3):
                    start = channel * height * width
                    value = sources[start + rows[n, row + 1] + columns[n, column + 1]]
                    if sharpened:
                        total = 4 * np.int32(value)  # Pillow's SMOOTH filter: centre 5, others 1
                        for down in range(3):
                            for right in range(3):
                                total += np.int32(
                                    sources[
                                        start + rows[n, row + down] + columns[n, column + right]
                                    ]
                                )
                        smooth = np.float32(total) / np.float32(13)
                        moved = (np.float32(value) - smooth) * sharpness[n] + smooth
                        value = np.uint8(_within(np.float32(np.round(moved)), white))
                    levelled[channel] = np.float32(levels[n, channel, value])
                for channel in range(3):
                    colour = levelled[channel]
                    if recoloured:
                        colour = (
                            own * colour
                            + following * levelled[(channel + 1) % 3]
                            + last * levelled[(channel + 2) % 3]
                        )
                        colour = _within(colour, white)
                    ground = images[sample, channel, row, column]
                    images[sample, channel, row, column] = _within(
                        (colour / white - ground) * opaque + ground, one
                    )
