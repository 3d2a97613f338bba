"""The one place that reads an image, and the one that lays it on the network's canvas, for
training, prediction and serving.

The content of a file decides its format (PNG, JPEG, BMP, TIFF, WebP), not its name. Grey becomes
RGB with equal channels, alpha is dropped, a palette is looked up, CMYK is converted, an EXIF
orientation is applied (a picture is used as viewers show it). 16-bit values are scaled by the
type's full range, 65536 to 256 levels (the high byte): 12-bit data in 16-bit files come out dark,
of which :mod:`clsnf.data.checks` warns. Floating point, 32-bit integers and files of several
pictures are refused: their range, or which one is meant, would be a guess.

Unusual: Pillow decodes, not OpenCV, because half a file must never pass and nothing may be printed
    by a codec: OpenCV's write to
standard error, and before version 5 return half a picture. Pillow is nearly as fast (20 against 16
ms for a JPEG of 5 megapixels) and releases the GIL too.
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clsnf.core.config import ImageSettings
from clsnf.core.errors import ImageError, OutputError
from clsnf.data.file_integrity import damage, sniff
from clsnf.data.sources import Reference, is_packed, read_bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000  # by the header: more is a decompression bomb or a mistake

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_EXIF_FORMATS = (
    "JPEG",
    "MPO",
    "WEBP",
)  # Pillow applies a TIFF's orientation itself; the other formats' is hardly ever meant
_AGAIN = "copy it again from its source or remove it"
_CONVERT = "save the image as a PNG of 8 or 16 bit"


# ---- reading ----


def decode_image(data: bytes, name: str) -> np.ndarray:
    """A file's bytes as (H, W, 3) uint8 RGB, writable; ``name`` stands in messages. Raises
    ImageError, with the mend.
    """
    with _opened(data, name) as image:
        return _rgb(image, name)


def read_image(path: Reference) -> np.ndarray:
    """:func:`decode_image` of a file or of a picture in a pack."""
    return decode_image(read_bytes(path), os.fspath(path))


def image_size(path: Reference) -> tuple[int, int]:
    """(height, width) from the picture's header, as :func:`read_image` would return it; the pixels
    are not read nor checked.
    """
    return _size(io.BytesIO(read_bytes(path)) if is_packed(path) else path, os.fspath(path))


def announced_size(data: bytes, name: str) -> tuple[int, int]:
    """:func:`image_size` of a file's bytes, for limits that come before decoding; ``name`` stands
    in messages.
    """
    if sniff(data) is None:
        raise ImageError(_no_image(data, name))
    return _size(io.BytesIO(data), name)


def _size(source: str | os.PathLike[str] | io.BytesIO, name: str) -> tuple[int, int]:
    with _header(source, name) as image:
        turned = image.format in _EXIF_FORMATS and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """A mask's bytes as (H, W) bool: True where a colour channel is not zero and the pixel, with an
    alpha channel, not transparent.
    """
    with _opened(data, name) as image:
        if image.mode in ("I", "F") or image.mode.startswith(
            "I;16"
        ):  # label numbers below 256 must not vanish in the high byte
            return np.asarray(image) != 0
        mode = "RGBA" if image.has_transparency_data else "RGB"
        pixels = np.asarray(_converted(image, mode, name))
        return np.any(pixels[..., :3] > 0, axis=-1) & np.all(pixels[..., 3:] > 0, axis=-1)


def read_mask(path: Reference) -> np.ndarray:
    """:func:`decode_mask` of a file or of a mask in a pack."""
    return decode_mask(read_bytes(path), os.fspath(path))


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The decoded picture, upright, after all checks that do not depend on what it is used for."""
    image_format = sniff(data)
    if image_format is None:
        raise ImageError(_no_image(data, name))
    problem = damage(data, image_format)
    if problem:
        raise ImageError(f"{name} {problem}: {_AGAIN}.")

    with _header(io.BytesIO(data), name) as image:
        # A phone's MPO is one photograph with extras such as a preview; elsewhere more frames are
        # more pictures.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{name} holds {frames} pictures: save each as a file of its own.")
        image.load()
        yield ImageOps.exif_transpose(image) if image.format in _EXIF_FORMATS else image


@contextlib.contextmanager
def _header(source: str | os.PathLike[str] | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """The opened, not yet decoded picture; whatever Pillow raises on a damaged one, here or in the
    body, becomes an ImageError.
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
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist: check the path.") from error
    # codecs raise nearly anything on damaged bytes: OSError, ValueError, SyntaxError, struct.error
    # ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} is damaged or cut short ({reason}): {_AGAIN}.") from error


def _no_image(data: bytes, name: str) -> str:
    what = "is empty (0 bytes)" if not data else f"starts like no image ({data[:8]!r})"
    return f"{name} {what}: png, jpg, bmp, tif and webp are read; {_AGAIN}."


def _too_large(name: str, size: str) -> str:
    return (
        f"{name} announces {size}, more than the {MAX_PIXELS // 10**6} megapixels that are read: "
        "crop or scale it, or remove it."
    )


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "32-bit integer"
        raise ImageError(
            f"{name} holds {kind} values, whose range from black to white is unknown: scale them "
            f"and {_CONVERT}."
        )
    return np.array(_converted(image, "RGB", name))


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise ImageError(
            f"{name} has the colour space {image.mode}, which can't be converted: {_CONVERT}."
        ) from error


# ---- writing ----


def write_image(path: str | os.PathLike[str], rgb: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as PNG, beside its place and renamed. Raises OutputError."""
    _write_png(Path(path), Image.fromarray(np.ascontiguousarray(rgb)))


def write_mask(path: str | os.PathLike[str], mask: np.ndarray) -> None:
    """Write (H, W) bool as a grey PNG of 0 and 255, beside its place and renamed. Raises
    OutputError.
    """
    _write_png(Path(path), Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))))


def png_bytes(rgb: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a PNG's bytes, packed for speed: what a server answers with."""
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
            f"{path} can't be written ({error.strerror}): check that its folder exists and has "
            "room."
        ) from error


# ---- the network's canvas ----


@dataclass(frozen=True)
class Placement:
    """Where a source image lies on the canvas; all in pixels, sizes as (height, width)."""

    source: tuple[int, int]
    canvas: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, source: tuple[int, int], settings: ImageSettings) -> Placement:
        """``squeeze`` fills the canvas; ``fit`` keeps the shape, as large as it goes, in the
        middle.
        """
        canvas_h, canvas_w = settings.size
        height, width = canvas_h, canvas_w
        if settings.aspect == "fit":
            scale = min(canvas_h / source[0], canvas_w / source[1])
            height, width = (
                max(1, min(c, round(s * scale))) for s, c in zip(source, settings.size, strict=True)
            )
        return cls(
            source, settings.size, (canvas_h - height) // 2, (canvas_w - width) // 2, height, width
        )

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas that hold the image."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def padded(self) -> bool:
        return (self.height, self.width) != self.canvas

    @property
    def valid(self) -> torch.Tensor:
        """(H, W) bool: False on padding."""
        valid = torch.zeros(self.canvas, dtype=torch.bool)
        valid[self.box] = True
        return valid


def place(image: np.ndarray, settings: ImageSettings) -> tuple[torch.Tensor, Placement]:
    """Resize (h, w, 3) uint8 onto the canvas: a (3, H, W) uint8 tensor and where the image lies on
    it. Bilinear with antialiasing.

    Padding repeats the image's border. Measured: a ResNet-18's answers inside the image come closer
    to those with the true surroundings than with the border's mean colour as padding. A reflection
    comes closer still in the deepest level, but would show a defect twice and reach no further than
    the image is wide.
    """
    placement = Placement.of(image.shape[:2], settings)
    # (h, w, 3) -> (1, 3, h, w) in channels-last order, for which torch has a fast path in uint8
    source = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    content = F.interpolate(
        source, size=(placement.height, placement.width), mode="bilinear", antialias=True
    )[0]
    if not placement.padded:
        return content.contiguous(), placement
    rows = (torch.arange(placement.canvas[0]) - placement.top).clamp(0, placement.height - 1)
    columns = (torch.arange(placement.canvas[1]) - placement.left).clamp(0, placement.width - 1)
    return content[:, rows][:, :, columns], placement


def place_mask(mask: np.ndarray, placement: Placement) -> torch.Tensor:
    """A mask (h, w) bool at the source's size on the canvas, (H, W) bool: nearest pixel centre,
    False on padding.
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


def restore_map(canvas_map: np.ndarray | torch.Tensor, placement: Placement) -> np.ndarray:
    """A map (H, W) on the canvas at the source's size, (h, w) float32: the padding cut off,
    bilinear.
    """
    content = torch.as_tensor(canvas_map, dtype=torch.float32, device="cpu")[placement.box]
    return F.interpolate(
        content[None, None], size=placement.source, mode="bilinear", antialias=True
    )[0, 0].numpy()


# ---- many ----


@dataclass(frozen=True)
class LoadedImages:
    """``images`` (N, 3, H, W) uint8 on the canvas, ``valid`` (N, H, W) bool or None where nothing
    is padded, N ``placements``.
    """

    images: torch.Tensor
    valid: torch.Tensor | None
    placements: list[Placement]


def load_images(
    paths: Sequence[Reference], settings: ImageSettings, threads: int | None = None
) -> LoadedImages:
    """Read and place images, in the order of ``paths``; the first one that can't be read raises its
    ImageError.
    """
    images = torch.empty((len(paths), 3, *settings.size), dtype=torch.uint8)

    def load(index: int) -> Placement:
        images[index], placement = place(read_image(paths[index]), settings)
        return placement

    with ThreadPoolExecutor(threads) as pool:
        placements = list(pool.map(load, range(len(paths))))
    padded = any(p.padded for p in placements)
    return LoadedImages(
        images, torch.stack([p.valid for p in placements]) if padded else None, placements
    )
