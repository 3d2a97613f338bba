"""What reading an image costs: the formats, JPEG's draft, and OpenCV's decoders beside Pillow's.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --megapixels 1 --canvas 256

The picture is drawn. Milliseconds of one core are the least of several runs, taken in turn; the
ratios to the first line of each format count. OpenCV's decoders write a line to standard error for
each damaged file, which is why they are not in use.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image

from clsnf.core.config import ImageSettings
from clsnf.data.images import decode_image, decode_placed, place


def drawn(megapixels: float) -> np.ndarray:
    """A picture of soft shapes with the noise of a camera, RGB uint8."""
    rng = np.random.default_rng(0)
    side = round((megapixels * 1e6) ** 0.5 / 16) * 16
    soft = cv2.resize(
        rng.integers(0, 256, (side // 20, side // 20, 3), dtype=np.uint8),
        (side, side),
        interpolation=cv2.INTER_CUBIC,
    )
    return np.clip(soft + rng.normal(0, 2, soft.shape), 0, 255).astype(np.uint8)


def encoded(picture: np.ndarray, image_format: str) -> bytes:
    """A file's bytes."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, image_format)
    return file.getvalue()


def milliseconds(works: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """The least time of each, run in turn."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(runs):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            least[name] = min(least[name], 1000 * (time.perf_counter() - started))
    return least


def ways(data: bytes, canvas: int) -> dict[str, Callable[[], object]]:
    """Ways to read a file, by name."""
    full, draft = (ImageSettings(canvas, canvas, jpeg_draft=on) for on in (False, True))
    image = decode_image(data, "it")
    return {
        "decode_image": lambda: decode_image(data, "it"),
        "Pillow, numpy.asarray": lambda: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
        "OpenCV": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        "place alone": lambda: place(image, full),
        "decode and place": lambda: decode_placed(data, "it", full),
        "decode and place, jpeg_draft": lambda: decode_placed(data, "it", draft),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megapixels", type=float, default=5.0)
    parser.add_argument("--canvas", type=int, default=256, help="side of the network's input")
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    picture = drawn(given.megapixels)
    for image_format in ("JPEG", "PNG", "PPM", "BMP"):
        data = encoded(picture, image_format)
        works = ways(data, given.canvas)
        if image_format == "PPM":
            del works["OpenCV"], works["Pillow, numpy.asarray"]
        found = milliseconds(works, given.runs)
        print(f"{image_format}, {picture.shape[1]}x{picture.shape[0]}, {len(data) / 1e6:.1f} MB")
        for name, value in found.items():
            print(f"  {name:<30} {value:7.1f} ms   x{value / found['decode_image']:.2f}")


if __name__ == "__main__":
    main()
