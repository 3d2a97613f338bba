"""The authors' network written down once more, plainly, with torch, torchvision and FrEIA alone:
what an import must agree with.

Nothing of clsnf is used here. Checkpoints made from these modules have the names, shapes and parts
of the authors' files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Sequence
from typing import Any

import FrEIA.framework as freia_framework
import FrEIA.modules as freia_modules
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

GAUSS = -0.9189385332046727  # -0.5 ln 2 pi


# ---- encoder: torchvision's, padding by reflection, all four stages as output ----


class Encoder(nn.Module):
    def __init__(self, architecture: str) -> None:
        super().__init__()
        whole = getattr(torchvision.models, architecture)(weights=None)
        self.conv1, self.bn1, self.maxpool = whole.conv1, whole.bn1, whole.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            whole.layer1,
            whole.layer2,
            whole.layer3,
            whole.layer4,
        )
        reflect(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        return stages


def reflect(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            layer.padding_mode = "reflect"
            layer._reversed_padding_repeated_twice = [int(layer.padding[0])] * 4


# ---- decoder ----


def conv(a: int, b: int, kernel: int) -> nn.Conv2d:
    if kernel == 1:
        return nn.Conv2d(a, b, 1, bias=False)
    return nn.Conv2d(a, b, 3, padding=1, padding_mode="reflect", bias=False)


class Bottleneck(nn.Module):
    def __init__(self, a: int, planes: int) -> None:
        super().__init__()
        width, out = 2 * planes, 2 * planes
        self.conv1 = conv(a, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(conv(a, out, 1), nn.BatchNorm2d(out)) if a != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Basic(nn.Module):
    def __init__(self, a: int, planes: int) -> None:
        super().__init__()
        self.conv1 = conv(a, planes, 3)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = (
            nn.Sequential(conv(a, planes, 1), nn.BatchNorm2d(planes)) if a != planes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class WideDecoder(nn.Module):
    """For Wide ResNet-50-2, skips from stages 3 and 2."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.nin = nn.Sequential(conv(2048, 1024, 1), nn.ReLU(), conv(1024, 1024, 1), nn.ReLU())
        self.uplayer1 = nn.Sequential(
            Bottleneck(1024 + 1024, 128), *[Bottleneck(256, 128) for _ in range(2)]
        )
        self.uplayer2 = nn.Sequential(
            Bottleneck(256 + 512, 64), *[Bottleneck(128, 64) for _ in range(5)]
        )
        self.uplayer3 = nn.Sequential(Bottleneck(128, 32), *[Bottleneck(64, 32) for _ in range(3)])
        self.uplayer4 = nn.Sequential(Bottleneck(64, 16), *[Bottleneck(32, 16) for _ in range(2)])
        self.conv1 = conv(32, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = conv(8, classes, 3)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        _, x2, x3, x4 = stages
        x = self.uplayer1(torch.cat([x3, bicubic(self.nin(x4))], 1))
        x = self.uplayer2(torch.cat([x2, bicubic(x)], 1))
        x = self.uplayer3(bicubic(x))
        x = self.uplayer4(bicubic(x))
        return torch.sigmoid(self.conv2(torch.relu(self.bn1(self.conv1(bicubic(x))))))


class SmallDecoder(nn.Module):
    """For ResNet-18: basic blocks, bilinear; skips from the named ones of stages 3 and 2."""

    def __init__(self, skips: Collection[int] = (2, 3), classes: int = 1) -> None:
        super().__init__()
        self.skips = set(skips)
        self.nin = nn.Sequential(conv(512, 256, 1), nn.ReLU(), conv(256, 512, 1), nn.ReLU())
        self.uplayer1 = nn.Sequential(Basic(512 + 256 * (3 in self.skips), 256), Basic(256, 256))
        self.uplayer2 = nn.Sequential(Basic(256 + 128 * (2 in self.skips), 128), Basic(128, 128))
        self.uplayer3 = nn.Sequential(Basic(128, 64))
        self.uplayer4 = nn.Sequential(Basic(64, 32))
        self.conv1 = conv(32, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = conv(16, classes, 3)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        _, x2, x3, x4 = stages
        x = bilinear(self.nin(x4))
        x = self.uplayer1(torch.cat([x3, x], 1) if 3 in self.skips else x)
        x = bilinear(x)
        x = self.uplayer2(torch.cat([x2, x], 1) if 2 in self.skips else x)
        x = self.uplayer3(bilinear(x))
        x = self.uplayer4(bilinear(x))
        return torch.sigmoid(self.conv2(torch.relu(self.bn1(self.conv1(bilinear(x))))))


def bicubic(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True)


def bilinear(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


# ---- flows ----


def subnet(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(a, 2 * a), nn.ReLU(), nn.Linear(2 * a, b))


def new_flow(
    channels: int, depth: int, clamp: float, soft: bool, condition: int = 128
) -> nn.Module:
    flow = freia_framework.SequenceINN(channels)
    for _ in range(depth):
        flow.append(
            freia_modules.AllInOneBlock,
            cond=0,
            cond_shape=(condition,),
            subnet_constructor=subnet,
            affine_clamping=clamp,
            global_affine_type="SOFTPLUS",
            permute_soft=False,
        )
    for block in flow.module_list:  # FrEIA's own start is nearly the identity
        block.global_offset.data.normal_(0, 0.3)
        block.global_scale.data.add_(torch.randn_like(block.global_scale))
        block.subnet[2].weight.data.mul_(5)
    if soft:  # FrEIA's own soft permutations take seconds to draw
        for block in flow.module_list:
            rotation = torch.linalg.qr(
                torch.randn(channels, channels, dtype=torch.float64)
            ).Q.float()
            block.w_perm.data, block.w_perm_inv.data = rotation, rotation.t().contiguous()
    return flow


def encoding(dims: int, h: int, w: int) -> Tensor:
    """CFLOW-AD's positional encoding, (dims, h, w), entry by entry."""
    half = dims // 2
    values = torch.zeros(dims, h, w, dtype=torch.float64)
    for i in range(0, half, 2):
        rate = math.exp(i * -(math.log(10000.0) / half))
        for row in range(h):
            for column in range(w):
                values[i, row, column] = math.sin(column * rate)
                values[i + 1, row, column] = math.cos(column * rate)
                values[half + i, row, column] = math.sin(row * rate)
                values[half + i + 1, row, column] = math.cos(row * rate)
    return values.float()


# ---- the whole ----


def liven(network: nn.Module, least: float, most: float) -> None:
    """Random parameters under which the network's answers vary: torch's own start would let a deep
    decoder say nothing.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(least, most)
            module.bias.data.uniform_(-0.1, 0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    if isinstance(network, (WideDecoder, SmallDecoder)):  # logits about zero
        network.conv2.weight.data.sub_(network.conv2.weight.data.mean()).mul_(0.15)


class Reference:
    """All modules with random parameters and batch-norm statistics.

    Args:
        architecture: ``resnet18`` or ``wide_resnet50_2``.
        depth: coupling blocks.
        stages: encoder stages (1 to 4) that have a flow.
        skips: whether the decoder sees stages 3 and 2, as far as they have a flow.
        soft: whether permutations are rotations.
    """

    def __init__(
        self,
        architecture: str = "resnet18",
        depth: int = 2,
        stages: Sequence[int] = (2, 3, 4),
        skips: bool = True,
        soft: bool = True,
        clamp: float = 1.9,
        classes: int = 1,
        seed: int = 0,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.architecture, self.stages, self.clamp, self.depth = (
                architecture,
                list(stages),
                clamp,
                depth,
            )
            self.encoder = Encoder(architecture).eval()
            wide = architecture == "wide_resnet50_2"
            self.decoder = (
                WideDecoder(classes) if wide else SmallDecoder(stages if skips else (), classes)
            ).eval()
            channels = [256, 512, 1024, 2048] if wide else [64, 128, 256, 512]
            self.flows = [new_flow(channels[s - 1], depth, clamp, soft).eval() for s in stages]
            liven(self.encoder, 0.3, 0.6)
            liven(self.decoder, 0.7, 1.2)

    def arguments(self, **changed: Any) -> argparse.Namespace:
        """The options that the authors' program keeps in its files (a part of them)."""
        known = {
            "enc_arch": self.architecture,
            "pool_layers": [stage - 1 for stage in self.stages],
            "coupling_blocks": self.depth,
            "clamp_alpha": self.clamp,
            "condition_vec": 128,
            "input_size": 64,
            "norm_mean": [0.485, 0.456, 0.406],
            "norm_std": [0.229, 0.224, 0.225],
            "loss_type": "smooth_cls",
            "class_name": "screw",
            "w_fe": 1.0,
            "device": torch.device("cuda"),
            "img_size": (64, 64),
            "lr": 2e-4,
            "seed": 1690988702,
            "dec_dims": [[128, 8, 8]],
            "pretrained": True,
        }
        return argparse.Namespace(**(known | changed))

    def checkpoint(self, **changed: Any) -> dict[str, Any]:
        """Everything in one file."""
        return {
            "encoder_state_dict": self.encoder.state_dict(),
            "decoder_state_dict": self.decoder.state_dict(),
            "nf_state_dict": [flow.state_dict() for flow in self.flows],
            "args": self.arguments(**changed),
        }

    @torch.no_grad()
    def pyramid(self, images: Tensor) -> list[Tensor]:
        """RGB images (B, 3, H, W) in [0, 1] to the four stages."""
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        stages: list[Tensor] = self.encoder((images - mean[:, None, None]) / std[:, None, None])
        return stages

    @torch.no_grad()
    def log_likelihoods(self, images: Tensor) -> list[Tensor]:
        """Per dimension, (B, h, w) for each flow."""
        stages, found = self.pyramid(images), []
        for stage, flow in zip(self.stages, self.flows, strict=True):
            e = stages[stage - 1]
            b, c, h, w = e.shape
            place = encoding(128, h, w)
            rows = torch.stack(
                [e[i, :, y, x] for i in range(b) for y in range(h) for x in range(w)]
            )
            places = torch.stack(
                [place[:, y, x] for _ in range(b) for y in range(h) for x in range(w)]
            )
            z, log_det = flow(rows, [places])
            found.append(((c * GAUSS - 0.5 * (z**2).sum(1) + log_det) / c).reshape(b, h, w))
        return found

    @torch.no_grad()
    def maps(
        self, images: Tensor, constants: Sequence[float], weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Density map, classifier's map and fused map, (B, H, W) each; a vector likelier than every
        training vector counts as those.
        """
        size = (images.shape[2], images.shape[3])
        likelihoods = [
            F.interpolate(
                torch.exp(log_p - m).clamp_max(1)[:, None],
                size=size,
                mode="bilinear",
                align_corners=True,
            )[:, 0]
            for log_p, m in zip(self.log_likelihoods(images), constants, strict=True)
        ]
        density = torch.stack([1 - p for p in likelihoods]).mean(0).clamp(0, 1)
        classifier = self.decoder(self.pyramid(images))[:, 0]
        return density, classifier, (1 - weight) * density + weight * classifier
