"""Fills defects: looks up pixels of a source, changes their colours and blends them into regions.

Only pixels inside the regions are looked up and computed. A source is never turned, shifted or
changed as an image: two small tables for each sample say where its pixels lie
(:class:`SourceView`), and the cost depends on the defect's area. On a CPU
:mod:`clsnf.synthesis.kernels` does the same in one pass, bit for bit. Called by
:mod:`clsnf.synthesis.training_defects`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.synthesis.augment import RECOLOURED, SHARPENED, ColourChanges


@dataclass(frozen=True)
class SourceView:
    """Where n samples, each (H, W), find their sources in T source images (T, 3, H, W).

    The first channel of a sample's pixel (row, column) is at ``rows[row + 1] + columns[column +
    1]`` in the flat sources. Both tables have one more entry at either end, the border repeated,
    for the neighbours of pixels on the border.

    Attributes:
        sources: uint8 (T, 3, H, W).
        rows: int64 (n, H + 2).
        columns: int64 (n, W + 2).
    """

    sources: Tensor
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(sources: Tensor, source: Tensor, transposed: Tensor, shift: Tensor) -> SourceView:
        """The view of sources that are transposed or not, then shifted.

        Beyond its borders a source goes on mirrored, so that there are no seams; a shift by more
        than a side flips it.

        Args:
            sources: uint8 (T, 3, H, W).
            source: int64 (n,), which of the sources.
            transposed: bool (n,).
            shift: int64 (n, 2), rows and columns.
        """
        height, width = sources.shape[2:]
        start = source[:, None] * (3 * height * width)

        def mirrored(position: Tensor, axis: int, side: int) -> Tensor:
            position = (position + shift[:, axis, None]) % (2 * side)
            return torch.minimum(position, 2 * side - 1 - position)

        def along(side: int) -> tuple[Tensor, Tensor]:
            """What a position along a side of the sample adds to the place in the source, as its
            row and its column, (n, side + 2).
            """
            position = torch.arange(-1, side + 1, device=sources.device).clamp_(0, side - 1)
            return mirrored(position, 0, height) * width, mirrored(position, 1, width)

        (row_as_row, row_as_column), (column_as_row, column_as_column) = along(height), along(width)
        return SourceView(
            sources,
            rows=torch.where(transposed[:, None], row_as_column, row_as_row) + start,
            columns=torch.where(transposed[:, None], column_as_row, column_as_column),
        )


def fill(
    images: Tensor,
    regions: Tensor,
    samples: NDArray[np.int64],
    view: SourceView,
    changes: ColourChanges,
    opacity: Tensor,
) -> None:
    """Blend n samples' changed sources into their regions of the images, in place.

    Args:
        images: float32 (B, 3, H, W) in [0, 1], contiguous.
        regions: bool (B, H, W).
        samples: int64 (n,), the samples' places in the batch.
        view, changes: of these n samples.
        opacity: float32 (n,) in [0, 1].
    """
    if images.device.type != "cpu":
        return fill_by_tensors(images, regions, samples, view, changes, opacity)
    from clsnf.synthesis import kernels  # imported here: other devices need not wait for Numba

    tables = (changes.sharpness, changes.levels, changes.colours, opacity)
    places = (view.sources.view(-1).numpy(), view.rows.numpy(), view.columns.numpy())
    kernels.fill(
        images.numpy(),
        regions.numpy(),
        samples,
        *places,
        changes.kinds,
        *(table.numpy() for table in tables),
    )
    return None


def fill_by_tensors(
    images: Tensor,
    regions: Tensor,
    samples: NDArray[np.int64],
    view: SourceView,
    changes: ColourChanges,
    opacity: Tensor,
) -> None:
    """:func:`fill` as tensor operations on any device; samples with the same kind go together."""
    device, (height, width) = images.device, images.shape[2:]
    plane = height * width
    for kind in np.unique(changes.kinds):
        numbers = np.flatnonzero(changes.kinds == kind)
        alike = torch.from_numpy(numbers).to(device)
        at = torch.from_numpy(samples[numbers]).to(device)
        view_of_these = SourceView(view.sources, view.rows[alike], view.columns[alike])
        # each (K,), of these samples
        sample, row, column = regions.index_select(0, at).nonzero(as_tuple=True)
        line = sample * height + row
        colours = changed_colours(
            view_of_these,
            sample,
            line + 2 * sample + 1,
            column + (width + 2) * sample + 1,
            changes.of(numbers),
        )
        target = at[sample] * (3 * plane) + row * width + column
        ground = look_up_channels(images, target)
        blended = colours.sub_(ground).mul_(opacity[alike][sample]).add_(ground).clamp_(0, 1)
        put_channels(images, target, blended)


def changed_colours(
    view: SourceView, sample: Tensor, row: Tensor, column: Tensor, changes: ColourChanges
) -> Tensor:
    """The changed colours of K pixels, float32 (3, K) in [0, 1].

    Args:
        sample: int64 (K,), which of the n samples of the view and the changes.
        row, column: int64 (K,), indices into the view's flat rows and columns.
    """
    values = look_up_channels(view.sources, look_up(view.rows, row) + look_up(view.columns, column))
    if np.any(changes.kinds & SHARPENED):
        centre = values.float()
        # Pillow's SMOOTH filter: weights 1, and 5 in the centre.
        smooth = _sum_of_neighbourhood(view, row, column).add_(centre, alpha=4).div_(13)
        moved = centre.sub_(smooth).mul_(look_up(changes.sharpness, sample)).add_(smooth)
        values = moved.round_().clamp_(0, 255).to(torch.uint8)
    # (3, K): where the table of each pixel's channel begins
    first = sample * 768 + 256 * torch.arange(3, device=sample.device)[:, None]
    levelled = look_up(changes.levels, first.add_(values)).float()
    if np.any(changes.kinds & RECOLOURED):
        own, following, last = (look_up(part, sample) for part in changes.colours.T)  # each (K,)
        levelled = own * levelled + following * levelled.roll(-1, 0) + last * levelled.roll(-2, 0)
        levelled.clamp_(0, 255)
    return levelled.div_(255)


def _sum_of_neighbourhood(view: SourceView, row: Tensor, column: Tensor) -> Tensor:
    """The sum over the 3 x 3 pixels around each of K pixels, float32 (3, K)."""
    total = torch.zeros(3, len(row), dtype=torch.int16, device=row.device)
    columns = [look_up(view.columns, column + right) for right in (-1, 0, 1)]
    for down in (-1, 0, 1):
        start = look_up(view.rows, row + down)
        for from_column in columns:
            total += look_up_channels(view.sources, start + from_column)
    return total.float()


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table.flatten()[index]`` for an index of any shape.

    On a CPU it is three to ten times as fast as indexing with brackets.
    """
    return table.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)


def look_up_channels(images: Tensor, index: Tensor) -> Tensor:
    """The three channels of K pixels of images (N, 3, H, W): (3, K).

    ``index``: int64 (K,), where their first channel is in the flat images.
    """
    flat, plane = images.view(-1), images.shape[2] * images.shape[3]
    found = torch.empty(3, len(index), dtype=images.dtype, device=images.device)
    for channel, into in enumerate(found):
        torch.index_select(flat[channel * plane :], 0, index, out=into)
    return found


def put_channels(images: Tensor, index: Tensor, values: Tensor) -> None:
    """Set what :func:`look_up_channels` looks up, in place; ``values``: (3, K)."""
    flat, plane = images.view(-1), images.shape[2] * images.shape[3]
    for channel, some in enumerate(values):
        flat[channel * plane :].index_copy_(0, index, some)


def places_of(regions: Tensor) -> Tensor:
    """Where the pixels of regions have their first channel in the flat images, int64 (K,).

    The regions are (B, H, W), the images (B, 3, H, W); the places are in order.
    """
    if regions.device.type == "cpu":  # numpy is five times as fast as torch at this on a CPU
        found = torch.from_numpy(np.flatnonzero(regions.numpy()))
    else:
        found = regions.flatten().nonzero().squeeze(1)
    plane = regions.shape[1] * regions.shape[2]
    return found + (found // plane) * (2 * plane)
