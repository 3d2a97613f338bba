"""Reads images, and lays them on the network's input; for training, prediction and serving alike.

This is the one place that does either. The canvas is the network's input, (H, W) pixels, on which
an image is placed.

A file's content decides its format (PNG, JPEG, BMP, TIFF, WebP, PNM), not its name. Grey becomes
RGB with equal channels, alpha is dropped, a palette is looked up, CMYK is converted, and an EXIF
orientation is applied (an image is used as viewers show it). 16-bit values are scaled by the type's
full range, 65536 to 256 levels (the high byte): 12-bit data in 16-bit files come out dark, of which
:mod:`clsnf.data.checks` warns. Floating point, 32-bit integers and files of several pictures are
refused: their range, or which picture is meant, would be a guess.

Pillow decodes, not OpenCV, because half a file must never pass and a codec must not print. OpenCV's
codecs write to standard error, and before version 5 return half a picture. Of 5 megapixels, a JPEG
takes 30 ms here and 15 there, a PNG 88 and 74. The other decoder that gives the same bits,
imagecodecs, saves 20 ms of a PNG, takes 80 MB on the disk, and prints as well.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clsnf.core.config import ImageSettings
from clsnf.core.errors import ImageError, OutputError
from clsnf.data.file_integrity import MAX_PIXELS, damage, header_damage, named_kind, sniff
from clsnf.data.portable import (
    PortableHeader,
    portable_header,
    portable_levels,
    portable_rgb,
)
from clsnf.data.region_files import CONFIGURATION, is_bundle, open_bundle
from clsnf.data.sources import Reference, is_packed, read_bytes

# fmt: off
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm", ".pbm",
)
# fmt: on

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# Pillow applies the orientation of a TIFF itself. In the other formats it is hardly ever meant.
_EXIF_FORMATS = ("JPEG", "MPO", "WEBP")
_AGAIN = "copy it again from its source or remove it"
_READ = "png, jpg, bmp, tif, webp and pnm are read"
_CONVERT = "save the image as a PNG of 8 or 16 bit"


# ---- reading ----


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The bytes of an image file as RGB, uint8 (H, W, 3), writable.

    ``name`` stands in messages. Raises ImageError.
    """
    if sniff(data) == "PPM":
        return portable_rgb(data, _portable_header(data, name), name)
    with _opened(data, name) as image:
        return _rgb(image, name)


def read_image(path: Reference) -> np.ndarray:
    """:func:`decode_image` of a file, or of an image in a pack. Raises ImageError."""
    return decode_image(read_bytes(path), os.fspath(path))


def decode_placed(
    data: bytes, name: str, settings: ImageSettings
) -> tuple[torch.Tensor, Placement]:
    """The bytes of an image file on the canvas, as :func:`place` returns it.

    With ``settings.jpeg_draft``, a JPEG that is much larger than the canvas is decoded at a part of
    its size. ``name`` stands in messages. Raises ImageError.
    """
    if not settings.jpeg_draft or sniff(data) != "JPEG":
        return place(decode_image(data, name), settings)
    source = announced_size(data, name)
    with _opened(data, name, settings) as image:
        return place(_rgb(image, name), settings, source)


def read_placed(path: Reference, settings: ImageSettings) -> tuple[torch.Tensor, Placement]:
    """:func:`decode_placed` of a file, or of an image in a pack. Raises ImageError."""
    return decode_placed(read_bytes(path), os.fspath(path), settings)


def image_size(path: Reference) -> tuple[int, int]:
    """(height, width) as :func:`read_image` would return it, from the header alone.

    The pixels are neither read nor checked. Raises ImageError.
    """
    name = os.fspath(path)
    if is_packed(path):
        return announced_size(read_bytes(path), name)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ImageError(_no_image(b"", name))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _announced_size(data, file, name)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist: check the path.") from error
    except OSError as error:
        raise ImageError(
            f"{name} can't be read ({error.strerror}): check the path and its permissions."
        ) from error


def announced_size(data: bytes, name: str) -> tuple[int, int]:
    """:func:`image_size` of a file's bytes, for limits that come before decoding.

    ``name`` stands in messages. Raises ImageError.
    """
    return _announced_size(data, io.BytesIO(data), name)


def _announced_size(data: bytes | mmap.mmap, file: IO[bytes], name: str) -> tuple[int, int]:
    image_format = sniff(data)
    if image_format == "PPM":
        header = _portable_header(data, name)
        return header.height, header.width
    if image_format is None:
        raise ImageError(_no_image(data, name))
    _refuse(header_damage(data, image_format), name)
    with _header(file, name) as image:
        return _upright_size(image)


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """The bytes of a mask file as bool (H, W).

    A pixel is True if a colour channel is not zero and, where there is an alpha channel, the pixel
    is not transparent; of several regions, if it lies in one. ``name`` stands in messages. Raises
    ImageError.
    """
    if is_bundle(data):
        return union_of(decode_regions(data, name))
    if sniff(data) == "PPM":
        levels = portable_levels(data, _portable_header(data, name), name)
        return levels != 0 if levels.ndim == 2 else np.any(levels != 0, axis=-1)
    with _opened(data, name) as image:
        # Label numbers below 256 must not vanish in the high byte.
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return np.asarray(image) != 0
        mode = "RGBA" if image.has_transparency_data else "RGB"
        pixels = np.asarray(_converted(image, mode, name))
        return np.any(pixels[..., :3] > 0, axis=-1) & np.all(pixels[..., 3:] > 0, axis=-1)


def read_mask(path: Reference) -> np.ndarray:
    """:func:`decode_mask` of a file, or of a mask in a pack. Raises ImageError."""
    return decode_mask(read_bytes(path), os.fspath(path))


@dataclass(frozen=True, eq=False)
class MaskRegion:
    """One of several annotated regions of an image.

    Attributes:
        mask: (H, W) bool, with one True pixel or more.
        saturation: how many of its pixels are enough, from 1 to all.
    """

    mask: np.ndarray
    saturation: int


def read_regions(path: Reference) -> tuple[MaskRegion, ...]:
    """The regions that a reference of several names, one or more of one size. Raises ImageError."""
    return decode_regions(read_bytes(path), os.fspath(path))


def union_of(regions: tuple[MaskRegion, ...]) -> np.ndarray:
    """The pixels that lie in a region, bool (H, W)."""
    return np.logical_or.reduce([region.mask for region in regions])


def decode_regions(data: bytes, name: str) -> tuple[MaskRegion, ...]:
    """:func:`read_regions` of the bytes. ``name`` stands in messages. Raises ImageError."""
    found = open_bundle(data, name)
    regions: list[MaskRegion] = []
    for member, mask_bytes in found.masks:
        place = f"{name}/{member}"
        with _opened(mask_bytes, place) as image:
            values = np.asarray(image)
        kinds = np.unique(values[values != 0]).tolist() if values.ndim == 2 else []
        if len(kinds) != 1 or kinds[0] not in found.saturations:
            listed = ", ".join(map(str, sorted(found.saturations)))
            raise ImageError(
                f"{place} marks no pixel, or not with one grey value of {CONFIGURATION} "
                f"({listed}), which names the defect's type: take the mask from the release."
            )
        mask = values != 0
        if regions and regions[0].mask.shape != mask.shape:
            raise ImageError(
                f"{place} has another size than the masks beside it: take its release's."
            )
        regions.append(MaskRegion(mask, found.saturations[kinds[0]].pixels(int(mask.sum()))))
    if not regions:
        raise ImageError(f"{name} holds no mask: add one, or move the image to the good ones.")
    return tuple(regions)


@contextlib.contextmanager
def _opened(data: bytes, name: str, draft: ImageSettings | None = None) -> Iterator[Image.Image]:
    """The decoded picture, upright, after all checks that do not depend on what it is used for.

    ``draft``: the canvas for which a JPEG may be decoded at a part of its size; None for all of it.
    """
    image_format = sniff(data)
    if image_format is None:
        raise ImageError(_no_image(data, name))
    _refuse(damage(data, image_format), name)

    with _header(io.BytesIO(data), name) as image:
        # A phone's MPO is one photograph with extras such as a preview. In other formats, more
        # frames are more pictures.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{name} holds {frames} pictures: save each as a file of its own.")
        if draft is not None:
            _shrink(image, draft)
        image.load()
        yield ImageOps.exif_transpose(image) if image.format in _EXIF_FORMATS else image


@contextlib.contextmanager
def _header(source: IO[bytes], name: str) -> Iterator[Image.Image]:
    """The opened picture, not yet decoded.

    Whatever Pillow raises on a damaged one, here or in the block, becomes an ImageError.
    """
    try:
        with Image.open(source, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(_too_large(name, f"{image.width}x{image.height} pixels"))
            yield image
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, "far too many pixels")) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name} has a damaged header or is of a kind that can't be read (such as floating "
            f"point): {_CONVERT}."
        ) from error
    # Codecs raise nearly anything on damaged bytes: OSError, ValueError, SyntaxError, struct.error.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} is damaged or cut short ({reason}): {_AGAIN}.") from error


def _portable_header(data: bytes | mmap.mmap, name: str) -> PortableHeader:
    header = portable_header(data, name)
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(_too_large(name, f"{header.width}x{header.height} pixels"))
    return header


def _refuse(problem: str | None, name: str) -> None:
    if problem:
        raise ImageError(f"{name} {problem}.")


def _turned(image: Image.Image) -> bool:
    """Whether the file's rows are the picture's columns."""
    return image.format in _EXIF_FORMATS and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.width, image.height) if _turned(image) else (image.height, image.width)


def _shrink(image: Image.Image, settings: ImageSettings) -> None:
    """Have a JPEG decoded at 1/8, 1/4 or 1/2 where twice the content's size remains.

    Only by a scale that divides its sides, so that the picture does not move on the canvas.
    """
    content = Placement.of(_upright_size(image), settings)
    least = 2 * content.width, 2 * content.height
    if _turned(image):
        least = least[::-1]
    for scale in (8, 4, 2):
        if all(side % scale == 0 for side in image.size) and all(
            side // scale >= floor for side, floor in zip(image.size, least, strict=True)
        ):
            image.draft(None, (image.width // scale, image.height // scale))
            return


def _no_image(data: bytes | mmap.mmap, name: str) -> str:
    if not data:
        return f"{name} is empty (0 bytes): {_READ}; {_AGAIN}."
    kind = named_kind(data)
    if kind is not None:
        return f"{name} is {kind}, a format that is not read: convert it to png or remove it."
    return f"{name} starts like no image ({data[:8]!r}): {_READ}; {_AGAIN}."


def _too_large(name: str, size: str) -> str:
    return (
        f"{name} announces {size}, more than the {MAX_PIXELS // 10**6} megapixels that are read: "
        "crop or scale it, or remove it."
    )


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return _grey_as_rgb((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "32-bit integer"
        raise ImageError(
            f"{name} holds {kind} values, whose range from black to white is unknown: scale them "
            f"and {_CONVERT}."
        )
    if image.mode == "L":
        return _grey_as_rgb(np.asarray(image))
    return np.array(_converted(image, "RGB", name))


def _grey_as_rgb(grey: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise ImageError(
            f"{name} has the colour space {image.mode}, which can't be converted: {_CONVERT}."
        ) from error


# ---- writing ----


def write_image(path: str | os.PathLike[str], rgb: np.ndarray) -> None:
    """Write RGB, uint8 (H, W, 3), as a PNG. Raises OutputError.

    The file appears whole or not at all.
    """
    _write_png(Path(path), Image.fromarray(np.ascontiguousarray(rgb)))


def write_mask(path: str | os.PathLike[str], mask: np.ndarray) -> None:
    """Write a mask, bool (H, W), as a grey PNG of 0 and 255. Raises OutputError.

    The file appears whole or not at all.
    """
    _write_png(Path(path), Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))))


def png_bytes(rgb: np.ndarray) -> bytes:
    """RGB or grey, uint8 (H, W, 3) or (H, W), as a PNG that is compressed little but fast."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _write_png(path: Path, image: Image.Image) -> None:
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            image.save(beside, format="PNG")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} can't be written ({error.strerror}): check that its folder exists and that "
            "the disk is not full."
        ) from error


# ---- the network's canvas ----


@dataclass(frozen=True)
class Placement:
    """Where a source image lies on the canvas.

    All lengths are pixels.

    Attributes:
        source, canvas: sizes as (height, width).
        top, left, height, width: the part of the canvas that shows the image.
    """

    source: tuple[int, int]
    canvas: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, source: tuple[int, int], settings: ImageSettings) -> Placement:
        """The placement of a source of this size, (height, width).

        ``squeeze`` gives every image the settings' height and width; ``fit`` keeps its shape, as
        large as possible within them. It lies in the middle of the canvas.
        """
        canvas_h, canvas_w = settings.size
        height, width = settings.height, settings.width
        if settings.aspect == "fit":
            scale = min(height / source[0], width / source[1])
            height, width = (
                max(1, min(most, round(s * scale)))
                for s, most in zip(source, (height, width), strict=True)
            )
        return cls(
            source, settings.size, (canvas_h - height) // 2, (canvas_w - width) // 2, height, width
        )

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas that show the image."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def padded(self) -> bool:
        """Whether a part of the canvas shows no image."""
        return (self.height, self.width) != self.canvas

    @property
    def valid(self) -> torch.Tensor:
        """bool (H, W): False on padding."""
        valid = torch.zeros(self.canvas, dtype=torch.bool)
        valid[self.box] = True
        return valid


def place(
    image: np.ndarray, settings: ImageSettings, source: tuple[int, int] | None = None
) -> tuple[torch.Tensor, Placement]:
    """Resize an image onto the canvas, with antialiasing.

    Padding repeats the image's border. This was measured: a ResNet-18's features inside the image
    come closer to those with the true surroundings than with the border's mean colour as padding. A
    reflection comes closer still in the deepest level, but would show a defect twice, and can be no
    wider than the image.

    Args:
        image: uint8 (h, w, 3).
        source: the (height, width) of the picture, where the image is one of a part of its size.

    Returns:
        uint8 (3, H, W), and where the image lies in it.
    """
    placement = Placement.of(source or image.shape[:2], settings)
    # (h, w, 3) -> (1, 3, h, w) in channels-last order, for which torch has a fast path in uint8
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    mode = "bicubic" if settings.interpolation == "bicubic" else "bilinear"
    content = F.interpolate(
        pixels, size=(placement.height, placement.width), mode=mode, antialias=True
    )[0]
    if not placement.padded:
        return content.contiguous(), placement
    rows = (torch.arange(placement.canvas[0]) - placement.top).clamp(0, placement.height - 1)
    columns = (torch.arange(placement.canvas[1]) - placement.left).clamp(0, placement.width - 1)
    return content[:, rows][:, :, columns], placement


def place_mask(mask: np.ndarray, placement: Placement) -> torch.Tensor:
    """A mask on the canvas, bool (H, W): by the nearest pixel centre, False on padding.

    Args:
        mask: bool (h, w), of the source's size.

    Raises:
        ImageError: the mask has another size.
    """
    if mask.shape != placement.source:
        have, need = (f"{height}x{width}" for height, width in (mask.shape, placement.source))
        raise ImageError(
            f"A mask has {have} pixels (height x width), its image {need}: draw the mask at the "
            "image's size."
        )
    canvas = torch.zeros(placement.canvas, dtype=torch.bool)
    source = torch.from_numpy(np.ascontiguousarray(mask)).to(torch.uint8)[None, None]
    canvas[placement.box] = F.interpolate(
        source, size=(placement.height, placement.width), mode="nearest-exact"
    )[0, 0].bool()
    return canvas


def restore_map(
    canvas_map: np.ndarray | torch.Tensor,
    placement: Placement,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """A map on the canvas, (H, W), at `size` (height, width), by default the source's: float32.

    The padding is cut off, the rest resized (bilinear with antialiasing).
    """
    content = torch.as_tensor(canvas_map, dtype=torch.float32, device="cpu")[placement.box]
    return F.interpolate(
        content[None, None], size=size or placement.source, mode="bilinear", antialias=True
    )[0, 0].numpy()


# ---- many ----


@dataclass(frozen=True)
class LoadedImages:
    """N images on the canvas.

    Attributes:
        images: uint8 (N, 3, H, W).
        valid: bool (N, H, W), False on padding; None where no image is padded.
        placements: N, where the images lie.
    """

    images: torch.Tensor
    valid: torch.Tensor | None
    placements: list[Placement]


def load_images(
    paths: Sequence[Reference], settings: ImageSettings, threads: int | None = None
) -> LoadedImages:
    """Read and place images, in the order of ``paths``.

    Args:
        threads: how many read; None for Python's default.

    Raises:
        ImageError: an image can't be read; the first of them is named.
    """
    images = torch.empty((len(paths), 3, *settings.size), dtype=torch.uint8)

    def load(index: int) -> Placement:
        images[index], placement = read_placed(paths[index], settings)
        return placement

    with ThreadPoolExecutor(threads) as pool:
        placements = list(pool.map(load, range(len(paths))))
    padded = any(placement.padded for placement in placements)
    valid = torch.stack([placement.valid for placement in placements]) if padded else None
    return LoadedImages(images, valid, placements)
