"""Pretrain the small backbone that ships with clsnf, from scratch, on pictures drawn by code.

    python tools/pretrain_demo_backbone.py --out clsnf/assets/demo_backbone.safetensors
    python tools/pretrain_demo_backbone.py --out /tmp/tiny.safetensors --steps 4    # does it run?

The first command takes 12 minutes of one free core.

The task is matching. A picture (``tools/scenes.py``) is seen twice, turned and moved a little and
under another light. At every level each position must find itself in the other view among a
thousand positions, most of them of other pictures (InfoNCE). So features come to ignore what varies
from one good product to the next, and keep what is particular to a place. Plain classification of
the 77 textures learnt the opposite: the better it got, the worse a density of its features found
defects. What the features know of the classes is reported all the same, by a linear probe that
sends no gradient into the backbone.

The weights are written as float16 under timm's ``features_only`` names. A ``.json`` beside them
says how they were made.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from scenes import CLASSES, NO_CLASS, SIDE, Bank, picture, small_warp, texture_bank
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

LEVELS = (1, 2, 3)
STRIDES = (4, 8, 16)
LEVEL_WEIGHTS = (0.5, 1.0, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as for every other backbone
CROP = 96  # pixels of a view
# Views are cut this far apart, so that the distance to the border does not reveal a position.
SHIFT = SIDE - CROP
TEMPERATURE = 0.1
POSITIONS = 1024  # compared with each other at each level, each step


def photographed(x: Tensor, g: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] under another light and camera, normalised."""
    n = len(x)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(n, channels, 1, 1).uniform_(low, high, generator=g)

    def field(cells: int) -> Tensor:
        return F.interpolate(
            torch.randn(n, 1, cells, cells, generator=g),
            x.shape[-2:],
            mode="bicubic",
            align_corners=True,
        )

    x = x ** uniform(0.6, 1.6)
    mean = x.mean((2, 3), keepdim=True)
    x = (x - mean) * uniform(0.5, 1.1) + mean + uniform(-0.12, 0.12)
    x = x * uniform(0.85, 1.15, 3) * uniform(0.6, 1.3) * (0.3 * uniform(0, 1) * field(3)).exp()
    x = (x + 0.6 * uniform(0, 1) * F.relu(field(4) - 0.8)).clamp(0, 1)  # a reflection
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), uniform(0, 1))
    x = (x + torch.randn(x.shape, generator=g) * uniform(0, 0.03)).clamp(0, 1)
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def two_views(
    rng: np.random.Generator, bank: Bank, count: int
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """``count`` pictures, each seen twice.

    Returns:
        the views (2 count, 3, CROP, CROP), first all first ones; the texture classes of their cells
        (2 count, CROP / 8, CROP / 8); the corner, (row, column), at which each of the two was cut.
    """
    pictures, classes = zip(*(picture(rng, bank) for _ in range(count)), strict=True)
    corners = [(0, 0), (SHIFT, SHIFT)] if rng.random() < 0.5 else [(SHIFT, 0), (0, SHIFT)]
    if rng.random() < 0.5:
        corners.reverse()
    g = torch.Generator().manual_seed(int(rng.integers(2**31)))
    views, labels = [], []
    for (top, left), seen in zip(
        corners, (pictures, [small_warp(rng, p) for p in pictures]), strict=True
    ):
        images = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).float() / 255
        views.append(photographed(images[:, :, top : top + CROP, left : left + CROP], g))
        cells = torch.from_numpy(np.stack(classes))
        labels.append(cells[:, top // 8 : (top + CROP) // 8, left // 8 : (left + CROP) // 8])
    return (
        torch.cat(views).contiguous(memory_format=torch.channels_last),
        torch.cat(labels),
        corners,
    )


class Pretrained(nn.Module):
    """The backbone, and for training a projection of each level and a linear probe.

    The projections are for matching. The probe predicts the classes from the deepest level.
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            arch, features_only=True, out_indices=LEVELS, pretrained=False
        )
        channels = self.backbone.feature_info.channels()
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, 128, 1), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 64, 1)
            )
            for c in channels
        )
        self.probe = nn.Conv2d(channels[-1], len(CLASSES), 1)


def match_loss(
    z: Tensor, corners: list[tuple[int, int]], stride: int, rng: np.random.Generator
) -> Tensor:
    """InfoNCE (van den Oord et al., 2018) between the two views' unit vectors, z (2B, 64, h, w).

    Positions within 16 pixels of the right one are neither right nor wrong: the small warp may have
    moved it there.
    """
    side = (CROP - SHIFT) // stride  # of the part that both views show
    vectors = []
    for half, (top, left), (other_top, other_left) in zip(
        z.chunk(2), corners, reversed(corners), strict=True
    ):
        row, column = max(0, other_top - top) // stride, max(0, other_left - left) // stride
        shared = half[:, :, row : row + side, column : column + side]
        vectors.append(shared.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))  # (B side side, 64)
    chosen = torch.from_numpy(rng.permutation(len(vectors[0]))[:POSITIONS])
    image, row, column = chosen // side**2, chosen // side % side, chosen % side
    logits = vectors[0][chosen] @ vectors[1][chosen].T / TEMPERATURE
    reach = 16 // stride
    near = (
        (image[:, None] == image)
        & ((row[:, None] - row).abs() <= reach)
        & ((column[:, None] - column).abs() <= reach)
    )
    logits = logits.masked_fill(near.fill_diagonal_(False), -1e4)
    return F.cross_entropy(logits, torch.arange(len(chosen)))


def probe_loss(probe: nn.Module, features: Tensor, classes: Tensor) -> tuple[Tensor, float]:
    """The probe's cross-entropy, and its accuracy where a class is known.

    The features (B, C, h, w) get no gradient.
    """
    stride = classes.shape[-1] // features.shape[-1]
    labels = classes[:, stride // 2 :: stride, stride // 2 :: stride]
    logits = probe(features.detach()).float()
    known = labels != NO_CLASS
    return F.cross_entropy(logits, labels, ignore_index=NO_CLASS), float(
        (logits.argmax(1) == labels)[known].float().mean()
    )


def train(arch: str, steps: int, pictures: int, lr: float, seed: int) -> Pretrained:
    """Train from scratch; every 100 steps new textures are drawn."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 0])
    model = Pretrained(arch).to(memory_format=torch.channels_last).train()
    # Muon with Nesterov momentum: in the same time it learnt to distinguish twice as many textures
    # as AdamW or SGD did.
    optimiser = create_optimizer_v2(model, opt="nmuon", lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    start = time.process_time()
    bank: Bank = []
    for step in range(steps):
        if step % 100 == 0:
            bank = texture_bank(rng, each=16)
        views, classes, corners = two_views(rng, bank, pictures)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.backbone(views)
            losses = []
            for project, f, stride, weight in zip(
                model.projections, features, STRIDES, LEVEL_WEIGHTS, strict=True
            ):
                losses.append(
                    weight
                    * match_loss(F.normalize(project(f).float(), dim=1), corners, stride, rng)
                )
            matching = torch.stack(losses).sum()
            probing, accuracy = probe_loss(model.probe, features[-1], classes)
        optimiser.zero_grad()
        (matching + probing).backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.process_time() - start
            print(
                f"step {step + 1}: matching {matching.item():.3f}, probe {accuracy:.3f}, "
                f"{seconds:.0f} s of computing",
                flush=True,
            )
    return model


@torch.no_grad()
def probed_accuracy(model: Pretrained, seed: int) -> float:
    """The probe's mean accuracy on 1,024 views of textures never trained on."""
    rng = np.random.default_rng([seed, 1])
    bank = texture_bank(rng, each=8)
    model.eval()
    found = []
    for _ in range(16):
        views, classes, _ = two_views(rng, bank, 32)
        found.append(probe_loss(model.probe, model.backbone(views)[-1], classes)[1])
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the weights' file, .safetensors; its .json goes beside it",
    )
    parser.add_argument(
        "--arch",
        default="resnet10t",
        help="a timm model with features_only and strides 4, 8, 16 at levels 1, 2, 3",
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument(
        "--pictures", type=int, default=32, help="pictures a step; each is seen twice"
    )
    parser.add_argument("--lr", type=float, default=0.04)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    start = time.process_time()
    model = train(args.arch, args.steps, args.pictures, args.lr, args.seed)
    minutes = (time.process_time() - start) / 60
    accuracy = probed_accuracy(model, args.seed)
    print(f"linear probe on new textures: {accuracy:.3f}")
    state = model.backbone.state_dict()
    weights = {
        name: v.to(torch.float16).contiguous()
        for name, v in state.items()
        if not name.endswith("num_batches_tracked")
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(save(weights))  # save_file would make it readable by its owner alone
    facts = {
        "architecture": args.arch,
        "levels": LEVELS,
        "channels": model.backbone.feature_info.channels(),
        "mean": MEAN,
        "std": STD,
        "dtype": "float16",
        "made_by": (
            "tools/pretrain_demo_backbone.py, on pictures drawn by code; no photograph was used"
        ),
        "task": (
            "dense matching of two views (InfoNCE); the classes are read by a linear probe only"
        ),
        "classes": len(CLASSES),
        "picture_side": CROP,
        "steps": args.steps,
        "pictures_a_step": args.pictures,
        "lr": args.lr,
        "seed": args.seed,
        "probe_accuracy": round(accuracy, 4),
        "minutes_of_one_core": round(minutes, 1),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
