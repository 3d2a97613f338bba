"""Pictures and weights small enough that whole commands run in tests: drawn here, in seconds, from
a seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clsnf.data.images import write_image, write_mask

# What keeps a whole training within seconds on one core.
TINY: dict[str, Any] = {
    "finetune.frozen_epochs": 1,
    "finetune.joint_epochs": 1,
    "finetune.decay_epochs": 1,
    "finetune.decoder_width": 16,
    "flow.depth": 1,
    "flow.passes": 0.2,
    "flow.condition_dims": 8,
    "flow.memory": 20,
    "flow.permutation": "hard",
    "validation.images_per_family": 2,
}


def tiny_options(weights: Path) -> list[str]:
    """Command-line options for a network of 64 pixels that trains in a moment."""
    options = [
        "--backbone",
        "resnet18",
        "--levels",
        "1,2",
        "--weights",
        str(weights),
        "--image-size",
        "64",
        "--device",
        "cpu",
    ]
    return options + [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]


def draw_normal(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A plate with stripes, (h, w, 3) uint8: no two alike."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    stripes = 110 + 30 * np.sin(columns / 4 + rng.uniform(0, 6)) + 10 * np.cos(rows / 9)
    noisy = stripes[:, :, None] + rng.normal(0, 6, (*size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def draw_defect(
    rng: np.random.Generator, image: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """The image with a spot or a cut in it, and the mask of what changed."""
    h, w = image.shape[:2]
    mask = np.zeros((h, w), np.uint8)
    x, y = int(rng.integers(w // 4, 3 * w // 4)), int(rng.integers(h // 4, 3 * h // 4))
    if kind == "spot":
        cv2.circle(mask, (x, y), max(4, min(h, w) // 8), 1, -1)
    else:
        cv2.line(mask, (x, y), (x + w // 5, y + h // 5), 1, max(3, min(h, w) // 16))
    image = image.copy()
    image[mask > 0] = (240, 235, 60) if kind == "spot" else (15, 10, 20)
    return image, mask > 0


def write_category(
    folder: Path,
    seed: int = 0,
    *,
    train: int = 10,
    good: int = 3,
    defective: int = 3,
    size: tuple[int, int] = (64, 64),
    normal: str = "good",
) -> Path:
    """A category in MVTec AD's layout (BTAD's with ``normal="ok"``); without ``good`` and
    ``defective``, train alone.
    """
    rng = np.random.default_rng(seed)

    def put(place: str, index: int, image: np.ndarray) -> None:
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_image(folder / place / f"{index:03d}.png", image)

    for index in range(train):
        put(f"train/{normal}", index, draw_normal(rng, size))
    for index in range(good):
        put(f"test/{normal}", index, draw_normal(rng, size))
    for kind in ("spot", "cut"):
        for index in range(defective):
            image, mask = draw_defect(rng, draw_normal(rng, size), kind)
            put(f"test/{kind}", index, image)
            (folder / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
            write_mask(folder / "ground_truth" / kind / f"{index:03d}_mask.png", mask)
    return folder


def write_weights(path: Path, architecture: str = "resnet18") -> Path:
    """Seeded random weights in the place of pretrained ones: what is tested is the way, not the
    figures.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model(architecture, pretrained=False).state_dict(), path)
    return path


def write_mvtec2(
    folder: Path, seed: int = 0, *, train: int = 10, size: tuple[int, int] = (64, 64)
) -> Path:
    """A category in MVTec AD 2's layout: 4 validation normals, 3 good and 3 bad public test
    pictures, and 2 in each private folder.
    """
    rng = np.random.default_rng(seed)
    places = {"train/good": train, "validation/good": 4, "test_public/good": 3}
    places |= {"test_private": 2, "test_private_mixed": 2}
    for place, count in places.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_image(folder / place / f"{index:03d}_regular.png", draw_normal(rng, size))
    for place in ("test_public/bad", "test_public/ground_truth/bad"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for index in range(3):
        image, mask = draw_defect(rng, draw_normal(rng, size), "spot")
        name = f"{index:03d}_overexposed"
        write_image(folder / "test_public/bad" / f"{name}.png", image)
        write_mask(folder / "test_public/ground_truth/bad" / f"{name}_mask.png", mask)
    return folder


def draw_regions(path: Path, mask: np.ndarray, value: int) -> None:
    """A mask of MVTec LOCO AD: the pixels' value names the defect's type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), mask.astype(np.uint8) * value)


def write_loco(
    folder: Path, seed: int = 0, *, train: int = 10, size: tuple[int, int] = (64, 64)
) -> Path:
    """A category in MVTec LOCO AD's layout: 4 validation normals, 3 good test pictures, and 2 with
    logical and 2 with structural anomalies, each with two masks.
    """
    rng = np.random.default_rng(seed)
    for place, count in {"train/good": train, "validation/good": 4, "test/good": 3}.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_image(folder / place / f"{index:03d}.png", draw_normal(rng, size))
    for kind in ("logical_anomalies", "structural_anomalies"):
        (folder / "test" / kind).mkdir(parents=True)
        for index in range(2):
            image, spot = draw_defect(rng, draw_normal(rng, size), "spot")
            image, line = draw_defect(rng, image, "cut")
            write_image(folder / "test" / kind / f"{index:03d}.png", image)
            masks = folder / "ground_truth" / kind / f"{index:03d}"
            draw_regions(masks / "000.png", spot, 255)
            draw_regions(masks / "001.png", line, 254)
    entries = [
        {
            "defect_name": "spot",
            "pixel_value": 255,
            "saturation_threshold": 20,
            "relative_saturation": False,
        },
        {
            "defect_name": "cut",
            "pixel_value": 254,
            "saturation_threshold": 0.5,
            "relative_saturation": True,
        },
    ]
    (folder / "defects_config.json").write_text(json.dumps(entries))
    return folder
