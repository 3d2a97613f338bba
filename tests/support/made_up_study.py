"""A made-up study for reports: writes every file that a report reads, in a second.

The files are written as plain JSON and Parquet, not through the types of :mod:`clsnf.results`, so
that tests of reports see it when a key changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clsnf.core.config import DetectorSettings, StudySettings, to_dict
from clsnf.evaluation.pictures import heat_map, outline, overlay
from clsnf.metrics import METRICS
from clsnf.training.calibrate import threshold_from_normals

SPACE = {
    "fusion_weight": {"type": "float", "low": 0.0, "high": 1.0},
    "finetune_epochs": {"type": "choice", "values": [0, 4, 8]},
    "flow_depth": {"type": "choice", "values": [0, 2, 4]},
}
FAMILIES = ("crack", "scar", "stain", "warp")
KINDS = ("dent", "hole")
CASES = ("miss", "false_alarm", "borderline", "strange_normal")


def write_study(
    folder: Path,
    products: Sequence[str],
    *,
    trials: int = 6,
    normals: int = 120,
    defects: int = 30,
    cases: int = 2,
    pictures: Sequence[np.ndarray] = (),
    seed: int = 0,
) -> Path:
    """Write a finished study.

    Args:
        folder: made where it is missing.
        products: their names.
        trials: number of trials of each product.
        normals: number of held-out normals of each product, and of its test normals.
        defects: number of test defects of each product.
        cases: number of cases of each kind.
        pictures: (h, w, 3) uint8 to show; random ones where there are none.
        seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    shown = list(pictures) or [rng.integers(60, 180, (32, 32, 3), dtype=np.uint8)]
    results, rows, ledger = {}, [], []
    for name in products:
        own = [_trial(name, number, rng) for number in range(trials)]
        rows += own
        results[name] = _product(folder, name, own, normals, defects, cases, shown, rng)
        ledger.append(
            {
                "at": "2026-01-01T00:00:00+00:00",
                "category": name,
                "opened": "test images",
                "for": "evaluation of the winner",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ledger))
    common = {"settings": to_dict(DetectorSettings()), "space": SPACE}
    put(
        folder / "study.json",
        common
        | {"data": dict.fromkeys(products, "f" * 40), "objectives": ["pixel_ap"], "studies": ""},
    )
    summary = {
        "clsnf": "0.1.0",
        "at": "2026-01-01T00:00:00+00:00",
        "seconds": 100.0,
        "origin": "made up",
    }
    put(
        folder / "summary.json",
        summary | common | {"study": to_dict(StudySettings(trials=trials)), "categories": results},
    )
    return folder


def put(path: Path, content: Any) -> None:
    """Write JSON; numbers that are not finite are allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change(folder: Path, name: str, **changed: Any) -> None:
    """Change a product's part of the summary."""
    summary = json.loads((folder / "summary.json").read_text())
    summary["categories"][name] |= changed
    put(folder / "summary.json", summary)


def _trial(name: str, number: int, rng: np.random.Generator) -> dict[str, Any]:
    weight, epochs, depth = (
        float(rng.uniform()),
        int(rng.choice([0, 4, 8])),
        int(rng.choice([0, 2, 4])),
    )
    objective = 0.4 + 0.3 * weight * (1 - weight) + 0.02 * epochs + float(rng.normal(0, 0.01))
    return {
        "category": name,
        "trial": number,
        "status": "finished",
        "cause": None,
        "objective": objective,
        "seconds": 12.0 if number < 2 else 1.0,
        "wall_seconds": 13.0,
        "config/fusion_weight": weight,
        "config/finetune_epochs": epochs,
        "config/flow_depth": depth,
        "validation_pixel_ap": objective,
        "validation_image_auroc": 0.9 - 0.1 * weight,
        "validation_pixel_auroc": 0.97,
        **{f"family_{family}": objective for family in FAMILIES},
        "seconds_trunk": 8.0 if number < 2 else 0.0,
        "seconds_scoring": 0.5,
        "stages_computed": 5 if number < 2 else 0,
        "stages_reused": 0 if number < 2 else 3,
    }


def _product(
    folder: Path,
    name: str,
    trials: list[dict[str, Any]],
    normals: int,
    defects: int,
    cases: int,
    shown: list[np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Any]:
    best = max(trials, key=lambda trial: trial["objective"])
    held_out = rng.beta(2, 14, normals)
    threshold = threshold_from_normals(held_out, 0.01)
    images = [
        _image(name, "validation", "good", i, s, threshold.value) for i, s in enumerate(held_out)
    ]
    for family in FAMILIES:
        images += [
            _image(name, "validation", family, i, s, threshold.value)
            for i, s in enumerate(rng.beta(5, 4, 8))
        ]
    images += [
        _image(name, "test", "good", i, s, threshold.value)
        for i, s in enumerate(rng.beta(2, 14, normals))
    ]
    for kind in KINDS:
        images += [
            _image(name, "test", kind, i, s, threshold.value)
            for i, s in enumerate(rng.beta(9, 3, defects // 2))
        ]
    evidence = folder / "evidence" / name
    (evidence / "pictures").mkdir(parents=True)
    regions = [_region(row, rng) for row in images if row["split"] == "test" and row["label"]]
    pq.write_table(pa.Table.from_pylist(images), evidence / "images.parquet")
    pq.write_table(pa.Table.from_pylist(regions), evidence / "regions.parquet")
    drawn = [
        _case(evidence / "pictures", kind, i, images, shown[int(rng.integers(len(shown)))], rng)
        for kind in CASES
        for i in range(cases)
    ]
    flows = [list(np.linspace(0.5, 0.4, 50)), list(np.linspace(0.3, 0.2, 50))]
    facts = {
        "shown": "test",
        "pictures": drawn,
        "map_threshold": threshold.value,
        "losses": {"finetuning": list(np.geomspace(0.3, 0.1, 12)), "flows": flows},
        "frozen_epochs": 4,
        "machine": {"system": "made up", "cpus": 2},
        "versions": {"clsnf": "0.1.0"},
    }
    put(evidence / "facts.json", facts)
    hashes = {
        "data_fingerprint": "a" * 40,
        "validation_fingerprint": "b" * 40,
        "backbone_fingerprint": "c" * 40,
    }
    provenance = {
        "fit_images": 4 * normals,
        "architecture": "resnet18",
        "versions": {"clsnf": "0.1.0"},
        **hashes,
    }
    put(folder / "winners" / name / "detector.json", {"provenance": provenance})
    metrics = {metric: round(float(rng.uniform(0.94, 0.99)), 4) for metric in METRICS}
    test = [row for row in images if row["split"] == "test"]
    recall = float(np.mean([row["verdict"] for row in test if row["label"]]))
    rejects = float(np.mean([row["verdict"] for row in test if not row["label"]]))
    config = {
        key.removeprefix("config/"): value
        for key, value in best.items()
        if key.startswith("config/")
    }
    without = {key: value for key, value in config.items() if key != "fusion_weight"}
    weights = [round(0.1 * step, 1) for step in range(11)]
    loss = {"selected": 0.9, "oracle": 0.91, "regret": 0.01, "weight": 0.3}
    return {
        "finished_trials": len(trials),
        "stopped_trials": 0,
        "failed_trials": [],
        "winner": str(folder / "winners" / name),
        "trial": best["trial"],
        "settings": to_dict(DetectorSettings()),
        "chosen": config | {"score_weight": 0.2},
        "validation": {
            "pixel_ap": 0.5,
            "families": {
                f: {"pixel_ap": 0.5, "pixel_auroc": 0.97, "image_auroc": 0.9} for f in FAMILIES
            },
        },
        "threshold": {**vars(threshold), "interval": list(threshold.interval)},
        "object_mask": {"kind": "off", "reason": "made up"},
        "sweeps": [{"config": without, "weights": [(w, 0.4 + 0.3 * w * (1 - w)) for w in weights]}],
        "rules": {"mean": {"config": without, "fusion_weight": config["fusion_weight"]}},
        "test": {
            "figures": metrics,
            "counts": {"good": normals, **dict.fromkeys(KINDS, defects // 2)},
            "false_reject_rate": rejects,
            "recall": recall,
            "scores": [],
        },
        "regret": {
            "fusion_weight": {"pixel_ap": loss},
            "trial": {"pixel_ap": loss | {"trial": 1}},
            "rules": {"mean": {"pixel_ap": 0.9, "image_auroc": 0.97}},
        },
        "evidence": {
            "folder": str(evidence),
            "intervals": {
                metric: (value - 0.02, min(1.0, value + 0.02)) for metric, value in metrics.items()
            },
            "baseline": {
                "depth": 0,
                "figures": {metric: value - 0.1 for metric, value in metrics.items()},
                "intervals": {
                    metric: (value - 0.13, value - 0.07) for metric, value in metrics.items()
                },
                "recall": 0.8,
                "false_reject_rate": 0.02,
                "gain": {metric: {"low": 0.05, "high": 0.15, "ahead": 1.0} for metric in metrics},
            },
        },
        "seconds": 20.0,
    }


def _image(
    product: str, split: str, kind: str, index: int, score: float, threshold: float
) -> dict[str, Any]:
    return {
        "split": split,
        "path": f"/data/{product}/{split}/{kind}/{index:03d}.png",
        "defect_type": kind,
        "label": int(kind != "good"),
        "score": float(score),
        "verdict": bool(score > threshold),
        "baseline_score": float(score) * 0.9,
    }


def _region(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    share = float(rng.uniform(0.001, 0.05))
    found = {
        "overlap": float(rng.uniform()),
        "found": bool(rng.uniform() < 0.9),
        "rejected": row["verdict"],
    }
    shape = {"pixels": int(share * 65536), "share": share, "contrast": float(rng.uniform(0, 0.4))}
    return {"path": row["path"], "defect_type": row["defect_type"], **shape, **found}


def _case(
    folder: Path,
    kind: str,
    number: int,
    images: list[dict[str, Any]],
    picture: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, Any]:
    wanted = [
        row for row in images if row["split"] == "test" and (kind == "miss") == bool(row["label"])
    ]
    row = wanted[number % len(wanted)]
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]] / max(picture.shape)
    blob = np.exp(-((rows - rng.uniform()) ** 2 + (columns - rng.uniform()) ** 2) * 60).astype(
        np.float32
    )
    maps = {"density": heat_map(blob, 0.1, 1), "classifier": heat_map(blob**3, 0.1, 1)}
    layers = {"input": picture, **maps, "fused": overlay(picture, blob, 0.1, 0.6)}
    if row["label"]:
        layers["truth"] = outline(picture, blob > 0.7, (0, 220, 0))
    files = {}
    for layer, drawn in layers.items():
        files[layer] = f"{kind}-{number}-{layer}.webp"
        Image.fromarray(drawn).save(folder / files[layer], quality=72)
    return {
        "kind": kind,
        **{key: row[key] for key in ("path", "defect_type", "label", "score")},
        "files": files,
    }
