"""Synthetic training defects on one core: the batched maker beside a literal implementation.

    python benchmarks/defects.py                 # batches of 32 at 256 x 256, about half a minute
    python benchmarks/defects.py --batch 8 --size 512 --rounds 3

The literal implementation makes one image at a time by the same recipe. It follows the steps of
DRAEM's paper: an axis-aligned Perlin grid in numpy, turned with OpenCV; three of the nine colour
changes on the whole source; blending over the whole image; stacking to a batch. The changes are
albumentations' transforms (a dependency of this benchmark alone: pip install -e '.[benchmarks]'),
or torchvision's functions on tensors and on Pillow images. The last literal row has faster noise
besides. Ratios are to the row with albumentations.

All rows fill from the same drawn textures and return the defective images, the clean ones and the
regions. Rounds alternate between the rows. A row's numbers are those of its fastest batch, which
other processes disturbed least, in CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

# Otherwise it asks the internet for newer versions.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as album

from clsnf.core.config import DefectSettings
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectMaker, sample_key

Picture = NDArray[np.uint8]  # (side, side, 3)
Noise = Callable[[np.random.Generator, int, tuple[int, int]], NDArray[np.float64]]
Source = Tensor | Image.Image | Picture
Open = Callable[[Picture], Source]
Change = Callable[[Source, np.random.Generator], Source]

CHANGES: tuple[Change, ...] = (
    lambda image, rng: tv.adjust_gamma(image, rng.uniform(0.5, 2)),
    lambda image, rng: tv.adjust_brightness(image, rng.uniform(0.8, 1.2)),
    lambda image, rng: tv.adjust_sharpness(image, rng.uniform(0, 3)),
    lambda image, rng: tv.adjust_saturation(
        tv.adjust_hue(image, rng.uniform(-0.5, 0.5)), rng.uniform(0.25, 2)
    ),
    lambda image, rng: tv.solarize(image, rng.uniform(32, 128)),
    lambda image, rng: tv.posterize(image, int(rng.integers(1, 6))),
    lambda image, rng: tv.invert(image),
    lambda image, rng: tv.autocontrast(image),
    lambda image, rng: tv.equalize(image),
)


def by_albumentations(transform: album.ImageOnlyTransform) -> Change:
    return lambda image, rng: transform(image=image)["image"]


ALBUMENTATIONS: tuple[Change, ...] = tuple(
    map(
        by_albumentations,
        (
            album.RandomGamma((50, 200), p=1),
            album.RandomBrightnessContrast(0.2, 0, p=1),
            album.Sharpen((0, 1), (0, 1), p=1),
            album.HueSaturationValue(90, 100, 0, p=1),
            album.Solarize((0.125, 0.5), p=1),
            album.Posterize((1, 5), p=1),
            album.InvertImg(p=1),
            album.AutoContrast(p=1),
            album.Equalize(p=1),
        ),
    )
)


def as_tensor(picture: Picture) -> Source:
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def as_array(source: Source) -> Picture:
    return source.permute(1, 2, 0).numpy() if isinstance(source, Tensor) else np.asarray(source)


def literal_noise(
    rng: np.random.Generator, side: int, frequency: tuple[int, int]
) -> NDArray[np.float64]:
    """Axis-aligned Perlin noise (side, side).

    For each corner a field of vectors is dotted with its gradients; then they are blended.
    """
    cell = (side // frequency[0], side // frequency[1])
    offset = (
        np.mgrid[0 : frequency[0] : 1 / cell[0], 0 : frequency[1] : 1 / cell[1]].transpose(1, 2, 0)
        % 1
    )  # (side, side, 2)
    angles = 2 * math.pi * rng.random((frequency[0] + 1, frequency[1] + 1))
    gradients = np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    def corner(down: int, right: int) -> NDArray[np.float64]:
        tiled = (
            gradients[down : frequency[0] + down, right : frequency[1] + right]
            .repeat(cell[0], 0)
            .repeat(cell[1], 1)
        )
        return np.asarray((tiled * (offset - np.array([down, right]))).sum(-1))

    weight = 6 * offset**5 - 15 * offset**4 + 10 * offset**3
    upper = corner(0, 0) + weight[..., 1] * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + weight[..., 1] * (corner(1, 1) - corner(1, 0))
    return math.sqrt(2) * (upper + weight[..., 0] * (lower - upper))


def tuned_noise(
    rng: np.random.Generator, side: int, frequency: tuple[int, int]
) -> NDArray[np.float64]:
    """The same by planes, without repeated work: as fast as numpy makes it for one image."""
    cell = (side // frequency[0], side // frequency[1])
    y, x = (np.arange(side)[:, None] / cell[0]) % 1, (np.arange(side)[None] / cell[1]) % 1
    angles = 2 * math.pi * rng.random((frequency[0] + 1, frequency[1] + 1))
    along_y, along_x = np.cos(angles), np.sin(angles)

    def corner(down: int, right: int) -> NDArray[np.float64]:
        corners = (slice(down, frequency[0] + down), slice(right, frequency[1] + right))
        tiled_y, tiled_x = (
            part[corners].repeat(cell[0], 0).repeat(cell[1], 1) for part in (along_y, along_x)
        )
        return np.asarray(tiled_y * (y - down) + tiled_x * (x - right))

    weight_y, weight_x = (t * t * t * (t * (t * 6 - 15) + 10) for t in (y, x))
    n00, n01, n10, n11 = (corner(down, right) for down in (0, 1) for right in (0, 1))
    upper, lower = n00 + weight_x * (n01 - n00), n10 + weight_x * (n11 - n10)
    return np.asarray(math.sqrt(2) * (upper + weight_y * (lower - upper)))


def literal_defect(
    image: Picture,
    sources: tuple[list[Picture], list[Picture]],
    noise: Noise,
    opened: Open,
    changes: tuple[Change, ...],
    rng: np.random.Generator,
) -> tuple[NDArray[np.floating], NDArray[np.bool_], NDArray[np.floating]]:
    """One image (H, H, 3) with a defect, its region and the clean image."""
    side = len(image)
    power_y, power_x = rng.integers(0, 6, 2)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-90, 90), 1)
    region = cv2.warpAffine(noise(rng, side, (2**power_y, 2**power_x)), turn, (side, side)) > 0.5
    chosen = sources[rng.integers(2)]  # textures or donors
    source = opened(chosen[rng.integers(len(chosen))])
    for index in rng.choice(len(changes), 3, replace=False):
        source = changes[index](source, rng)
    transparency = np.float32(rng.uniform(0, 0.8))
    clean = image.astype(np.float32) / 255
    where = region[..., None].astype(np.float32)
    blended = transparency * clean + (1 - transparency) * (
        as_array(source).astype(np.float32) / 255
    )
    return clean * (1 - where) + blended * where, region, clean


def literal_batch(
    images: list[Picture],
    sources: tuple[list[Picture], list[Picture]],
    noise: Noise,
    opened: Open,
    seed: int,
    changes: tuple[Change, ...] = CHANGES,
) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    made = [literal_defect(image, sources, noise, opened, changes, rng) for image in images]
    defective, regions, clean = (
        torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True)
    )
    return (
        defective.permute(0, 3, 1, 2).contiguous(),
        regions,
        clean.permute(0, 3, 1, 2).contiguous(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", type=int, default=256, help="height and width in pixels, a power of two"
    )
    parser.add_argument("--batch", type=int, default=32, help="images a batch")
    parser.add_argument(
        "--rounds", type=int, default=8, help="each times three batches of every row"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    size = (arguments.size, arguments.size)
    textures, donors = draw_textures(64, size, seed=1), draw_textures(64, size, seed=2)
    texture_list, donor_list = (
        list(images.permute(0, 2, 3, 1).contiguous().numpy()) for images in (textures, donors)
    )
    sources = (texture_list, donor_list)
    maker = DefectMaker(DefectSettings(), textures, donors)
    at = np.arange(arguments.batch) % len(donors)
    images, image_list = donors[at], [donor_list[index] for index in at]
    disc = torch.from_numpy(
        cv2.circle(np.zeros(size, np.uint8), (size[0] // 2, size[1] // 2), size[0] // 4, 1, -1)
    ).bool()
    product = disc.expand(arguments.batch, *size)

    def batched(masks: Tensor | None) -> Callable[[int], object]:
        return lambda turn: maker.make(images, masks, torch.from_numpy(sample_key(0, turn, at)))

    rows: dict[str, Callable[[int], object]] = {
        "literal, by albumentations": lambda turn: literal_batch(
            image_list, sources, literal_noise, np.copy, turn, ALBUMENTATIONS
        ),
        "literal, torchvision on tensors": lambda turn: literal_batch(
            image_list, sources, literal_noise, as_tensor, turn
        ),
        "literal, torchvision on Pillow": lambda turn: literal_batch(
            image_list, sources, literal_noise, Image.fromarray, turn
        ),
        "the same, its noise tuned": lambda turn: literal_batch(
            image_list, sources, tuned_noise, Image.fromarray, turn
        ),
        "DefectMaker": batched(None),
        "DefectMaker, object mask (20 %)": batched(product),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(arguments.rounds):
        for name, make in rows.items():
            make(turn)  # warms up, as in training, where one batch follows the other
            for _ in range(3):
                begin = time.process_time()
                make(turn)
                seconds[name].append(time.process_time() - begin)

    print(
        f"one core, {arguments.size} x {arguments.size}, batches of {arguments.batch}, "
        f"{3 * arguments.rounds} of them"
    )
    print(f"{'':34}{'images/s':>10}{'ms/image':>10}{'ratio':>8}")
    literal = min(seconds["literal, by albumentations"])
    for name, times in seconds.items():
        fastest = min(times)
        rate, milliseconds = arguments.batch / fastest, 1000 * fastest / arguments.batch
        print(f"{name:34}{rate:10.0f}{milliseconds:10.2f}{literal / fastest:8.1f}")


if __name__ == "__main__":
    main()
