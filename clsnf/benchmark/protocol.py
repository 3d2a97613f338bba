"""``protocol.json``: everything that produced the numbers of a benchmark."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import clsnf
from clsnf.benchmark.comparison import ORACLE_METRICS
from clsnf.benchmark.request import BenchmarkRequest, category_of
from clsnf.benchmark.selection import OBJECTIVE
from clsnf.benchmark.systems import SYSTEMS, WEIGHTS
from clsnf.core.errors import OutputError
from clsnf.core.files import write_json
from clsnf.core.ledger import now
from clsnf.evaluation.compare import REPLICATES
from clsnf.synthesis.textures import texture_files_key
from clsnf.training.prepare import data_fingerprint

FILE = "protocol.json"
_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "FrEIA",
    "numpy",
    "opencv-python-headless",
    "pillow",
)


def write_protocol(request: BenchmarkRequest, out: Path) -> None:
    """Write the protocol; categories, variants and seeds of earlier runs into the folder stay.

    Raises:
        OutputError: the protocol that is there is damaged.
    """
    path = out / FILE
    before = _read(path)
    textures = request.textures
    content = {
        "clsnf": clsnf.__version__,
        "at": now(),
        "command": sys.argv,
        "origin": request.origin,
        "data": before.get("data", {}) | _data(request),
        "textures": None if textures is None else texture_files_key(textures),
        "seeds": sorted({*before.get("seeds", []), *request.seeds}),
        "recipes": _recipes(request, before.get("recipes", {})),
        "systems": {name: dataclasses.asdict(system) for name, system in SYSTEMS.items()},
        **_rules(),
        "machine": _machine(request.device),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    write_json(path, content)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}): delete it, and it is written anew."
        ) from error


def _data(request: BenchmarkRequest) -> dict[str, Any]:
    return {
        category_of(table): {
            "images": len(table),
            "sha256_of_contents": data_fingerprint(table),
        }
        for table in request.tables
    }


def _recipes(request: BenchmarkRequest, before: dict[str, Any]) -> dict[str, Any]:
    """Variant -> category -> settings, with those of earlier runs."""
    recipes = dict(before)
    for variant, of_variant in request.recipes.items():
        recipes[variant] = recipes.get(variant, {}) | {
            category: dataclasses.asdict(recipe) for category, recipe in of_variant.items()
        }
    return recipes


def _rules() -> dict[str, Any]:
    """How candidates are chosen, and how intervals are made."""
    return {
        "selection": {
            "objective": f"{OBJECTIVE}, mean over the validation defect families",
            "candidates": (
                "joint epochs in which the learning rate falls; flows untrained and trained; "
                "fusion weights"
            ),
            "fusion_weights": WEIGHTS,
        },
        "image_score": (
            "fused systems: of the fusion weight with the best image AUROC, mean over the "
            "validation defect families"
        ),
        "oracle": {
            "figures": ORACLE_METRICS,
            "rule": "the best candidate on the test images, figure by figure",
        },
        "bootstrap": {
            "replicates": REPLICATES,
            "over": "test images, normal and defective apart",
            "interval": "95 %, percentile",
        },
    }


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
