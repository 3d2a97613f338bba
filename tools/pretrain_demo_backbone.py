"""Pretrain the small backbone that ships with clsnf, from scratch, on pictures drawn by code.

    python tools/pretrain_demo_backbone.py --out clsnf/assets/demo_backbone.safetensors          # about 12 minutes on one core
    python tools/pretrain_demo_backbone.py --out /tmp/tiny.safetensors --steps 20                 # does it run?

The task is dense: every picture is made of one to four textures (``tools/textures.py``) that meet along curved borders or lie on each
other as shapes with shadows. At every position of the feature maps the network says which texture it sees, at what angle, at what scale
and of what colour; so the deepest map keeps what a plain classifier would throw away, and a defect is. Writes the weights as float16
under timm's ``features_only`` names, and beside them a ``.json`` that says how they were made.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from textures import RULES, Texture, draw_texture
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

CLASSES = list(RULES)
LEVELS = (1, 2, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as for every other backbone
SIDE = 96  # pixels of a training picture
TILE = 136  # pixels of a texture, so that it can be turned and scaled before it is cut to SIDE
REDRAW = 1.0
GRID = SIDE // 8  # positions at which a picture is labelled, in each direction


@dataclass(frozen=True)
class Batch:
    """B pictures. Labels stand for the cells of a GRID x GRID raster."""

    images: Tensor  # (B, 3, SIDE, SIDE) float32, normalised
    classes: Tensor  # (B, GRID, GRID) int64
    traits: Tensor  # (B, 3, GRID, GRID) float32: cos and sin of twice the angle, log of the period
    clean: Tensor  # (B, 3, SIDE, SIDE) float32, normalised: the images before blur and noise


# ---- pictures ----


def texture_bank(rng: np.random.Generator, each: int) -> list[tuple[int, Texture]]:
    """``each`` fresh textures of every class, as (class, texture)."""
    return [(k, draw_texture(rng, name, TILE)) for k, name in enumerate(CLASSES) for _ in range(each)]


def _placed(rng: np.random.Generator, texture: Texture) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The texture turned, scaled and cut to (SIDE, SIDE, 3), with its traits (3,): cos and sin of twice the angle, log period."""
    turn, zoom = rng.uniform(0, 2 * np.pi), float(np.exp(rng.uniform(np.log(0.8), np.log(1.4))))
    matrix = cv2.getRotationMatrix2D((TILE / 2, TILE / 2), -np.rad2deg(turn), zoom)
    matrix[:, 2] += (SIDE - TILE) / 2 + rng.uniform(-8, 8, 2)
    image = cv2.warpAffine(texture.image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    angle = texture.angle + turn
    return image, np.array([np.cos(2 * angle), np.sin(2 * angle), np.log(texture.period * zoom / 12)], np.float32)


def _regions(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Which of ``count`` textures shows where, (SIDE, SIDE): areas with curved borders, or shapes on a ground."""
    if rng.random() < 0.5:
        cells = int(rng.integers(1, 3)) + 2
        fields = [cv2.resize(rng.standard_normal((cells, cells), dtype=np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
                  for _ in range(count)]  # fmt: skip
        return np.argmax(fields, 0).astype(np.uint8)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    for k in range(1, count):
        x, y = rng.integers(12, SIDE - 12, 2)
        size, corners = rng.uniform(12, 34), int(rng.choice([3, 4, 5, 6, 24]))
        turn = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        reach = size * (rng.uniform(0.6, 1.2, corners) if corners < 24 else np.ones(corners))
        cv2.fillPoly(owner, [np.stack([x + reach * np.cos(turn), y + reach * np.sin(turn)], 1).astype(np.int32)], k)
        if rng.random() < 0.4:  # a hole
            cv2.circle(owner, (int(x), int(y)), int(size * rng.uniform(0.2, 0.45)), 0, -1)
    return owner


def picture(rng: np.random.Generator, bank: list[tuple[int, Texture]]) -> tuple[NDArray[np.uint8], NDArray, NDArray]:
    """One picture (SIDE, SIDE, 3), its classes (GRID, GRID) and the textures' traits (3, GRID, GRID)."""
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    chosen = [bank[int(k)] for k in rng.integers(0, len(bank), count)]
    placed = [_placed(rng, texture) for _, texture in chosen]
    owner = _regions(rng, count) if count > 1 else np.zeros((SIDE, SIDE), np.uint8)
    image = placed[0][0].copy()
    for k in range(1, count):
        image[owner == k] = placed[k][0][owner == k]
    if count > 1 and rng.random() < 0.5:  # a shadow along the borders
        shadow = cv2.GaussianBlur(np.roll(owner > 0, rng.integers(-4, 5, 2), (0, 1)).astype(np.float32), (0, 0), rng.uniform(1, 3))
        shade = 1 - np.float32(rng.uniform(0.2, 0.6)) * shadow * (owner == 0)
        image = (image * shade[..., None]).astype(np.uint8)
    cell = owner[4::8, 4::8]  # the middle of each cell
    classes = np.array([k for k, _ in chosen])[cell]
    return image, classes, np.stack([t for _, t in placed])[cell].transpose(2, 0, 1)


def batch(rng: np.random.Generator, bank: list[tuple[int, Texture]], size: int) -> Batch:
    """``size`` pictures under their own light and camera: exposure, colour cast, a slope of light, blur, noise."""
    images, classes, traits = zip(*(picture(rng, bank) for _ in range(size)), strict=True)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    g = torch.Generator().manual_seed(int(rng.integers(2**31)))
    gain = torch.empty(size, 3, 1, 1).uniform_(0.85, 1.15, generator=g) * torch.empty(size, 1, 1, 1).uniform_(
        0.6, 1.25, generator=g
    )
    axis = torch.linspace(-0.5, 0.5, SIDE)
    slope = torch.randn(size, 2, 1, 1, generator=g) * 0.25
    light = 1 + slope[:, :1] * axis + slope[:, 1:] * axis[:, None]
    x = (x - 0.5) * torch.empty(size, 1, 1, 1).uniform_(0.6, 1.1, generator=g) + 0.5
    x = clean = (x * gain * light).clamp(0, 1)
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.lerp(x, soft, torch.rand(size, 1, 1, 1, generator=g))
    x = x + torch.randn(x.shape, generator=g) * torch.empty(size, 1, 1, 1).uniform_(0, 0.03, generator=g)
    x = x.clamp(0, 1)
    x, clean = ((v - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1) for v in (x, clean))
    labels = torch.from_numpy(np.stack(classes)).long()
    return Batch(x.contiguous(memory_format=torch.channels_last), labels, torch.from_numpy(np.stack(traits)), clean)


# ---- training ----


class Pretrained(nn.Module):
    """The backbone with, on each of its levels, a linear head for the class and, on the deepest, one for the traits."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(arch, features_only=True, out_indices=LEVELS, pretrained=False)
        channels = self.backbone.feature_info.channels()
        self.heads = nn.ModuleList(nn.Conv2d(c, len(CLASSES), 1) for c in channels)
        self.traits = nn.Conv2d(channels[-1], 3, 1)
        self.redraw = nn.ModuleList(nn.Conv2d(c, 48, 1) for c in channels[1:])

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Logits of the class at each level's positions, the deepest level's traits, and the levels' redrawn patches."""
        features = self.backbone(images)[1:]
        logits = [head(f) for head, f in zip(self.heads[1:], features, strict=True)]
        return logits, self.traits(features[-1]), [head(f) for head, f in zip(self.redraw, features, strict=True)]


def _at(labels: Tensor, size: int) -> Tensor:
    """The raster of labels (..., GRID, GRID) at ``size`` positions: the cell just past each position's middle."""
    stride = GRID // size
    return labels[..., stride // 2 :: stride, stride // 2 :: stride]


def loss_of(model: Pretrained, data: Batch) -> tuple[Tensor, Tensor]:
    """The training loss, and the share of positions that the deepest level classifies correctly."""
    logits, traits, patches = model(data.images)
    losses = [
        w * F.cross_entropy(y.float(), _at(data.classes, y.shape[-1]), label_smoothing=0.05)
        for w, y in zip((0.3, 1), logits, strict=True)
    ]
    losses.append(F.smooth_l1_loss(traits.float(), F.adaptive_avg_pool2d(data.traits, traits.shape[-1])))
    for y in patches:
        target = F.pixel_unshuffle(F.adaptive_avg_pool2d(data.clean, y.shape[-1] * 4), 4)
        losses.append(REDRAW * F.smooth_l1_loss(y.float(), target))
    correct = (logits[-1].argmax(1) == _at(data.classes, logits[-1].shape[-1])).float().mean()
    return torch.stack(losses).sum(), correct


def train(arch: str, steps: int, batch_size: int, lr: float, seed: int) -> Pretrained:
    """Train from scratch; every 100 steps with textures drawn afresh."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 0])
    model = Pretrained(arch).to(memory_format=torch.channels_last).train()
    optimiser = create_optimizer_v2(model, opt="nmuon", lr=lr, weight_decay=0.02)  # learns twice as fast as AdamW here
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    start = time.monotonic()
    seen: list[float] = []
    for step in range(steps):
        if step % 100 == 0:
            bank = texture_bank(rng, each=24)
        with torch.autocast("cpu", torch.bfloat16):
            loss, correct = loss_of(model, batch(rng, bank, batch_size))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        seen.append(correct.item())
        if (step + 1) % 50 == 0 or step == steps - 1:
            print(
                f"step {step + 1}: accuracy {np.mean(seen[-50:]):.3f}, {time.monotonic() - start:.0f} s, cpu {time.process_time():.0f}",
                flush=True,
            )
    return model


@torch.no_grad()
def accuracy(model: Pretrained, seed: int) -> float:
    """Share of positions classified correctly by the deepest level on 1,024 pictures of textures never trained on."""
    rng = np.random.default_rng([seed, 1])
    bank = texture_bank(rng, each=8)
    model.eval()
    return float(np.mean([loss_of(model, batch(rng, bank, 64))[1].item() for _ in range(16)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the weights' file, .safetensors; its .json goes beside it")
    parser.add_argument("--arch", default="resnet10t", help="a timm model with features_only")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.04)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    start = time.monotonic()
    model = train(args.arch, args.steps, args.batch_size, args.lr, args.seed)
    weights = {
        k: v.to(torch.float16).contiguous() for k, v in model.backbone.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    print(f"accuracy on new textures: {(final := accuracy(model, args.seed)):.3f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out)
    facts = {
        "architecture": args.arch,
        "levels": LEVELS,
        "channels": model.backbone.feature_info.channels(),
        "mean": MEAN,
        "std": STD,
        "dtype": "float16",
        "made_by": "tools/pretrain_demo_backbone.py, on pictures drawn by tools/textures.py; no photograph was used",
        "classes": len(CLASSES),
        "picture_side": SIDE,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "accuracy": round(final, 4),
        "minutes_on_one_core": round((time.monotonic() - start) / 60, 1),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
