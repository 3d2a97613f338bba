"""A detector as one file for other runtimes: ONNX, or a program of ``torch.export``.

The file is checked against the detector before it is kept. The exported network takes pictures on
the canvas, ``images`` (N, 3, H, W) uint8. If the detector keeps the shape of pictures, it also
takes ``valid`` (N, H, W) bool, False on padding. It gives ``maps`` (N, H, W) and ``scores`` (N,),
float32, for any N. The caller reads and resizes pictures and applies the threshold; the file's
metadata say how.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clsnf.core.config import to_dict
from clsnf.core.errors import ModelError, SettingsError
from clsnf.core.files import atomic_write, check_writable
from clsnf.core.pixels import to_floats
from clsnf.data.images import place, read_image
from clsnf.detector import Detector
from clsnf.model.score_maps import fuse_scores

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# Largest difference of maps and scores, which lie in [0, 1]: float32 rounds differently in another
# order of operations.
TOLERANCE = {"onnx": 1e-4, "torch": 1e-4}
_METADATA = "clsnf.json"  # name of the metadata inside a torch program


class Comparison(NamedTuple):
    """How an exported network compares with its detector.

    Attributes:
        pictures: number of pictures compared.
        difference: the largest, of maps and scores.
        lowest: map value of the detector.
        highest: map value of the detector.
    """

    pictures: int
    difference: float
    lowest: float
    highest: float


class ExportedNetwork(nn.Module):
    """What is exported: pictures on the canvas to maps and scores, as in ``score_placed``."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.network = detector.network

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # As ScoreNetwork.score, which chooses a device and ends the graph: neither can be exported.
        density, classifier = self.network(to_floats(images), valid)
        maps, scores = fuse_scores(density, classifier, self.network.fusion, valid)
        return maps, scores  # a plain tuple: torch.export knows no others


def export_detector(
    detector: Detector, file: Path, kind: str, pictures: Sequence[Path] = ()
) -> Comparison:
    """Write a detector's network to a file, if the file gives the detector's maps.

    Args:
        detector: on the CPU.
        file: to write, whole or not at all.
        kind: ``onnx`` or ``torch``.
        pictures: of the product, to compare on, beside some that are drawn by code.

    Raises:
        SettingsError: the packages for ONNX are not installed.
        ModelError: the network can't be expressed in that format, or the result differs from the
            detector.
        ImageError: a picture can't be read.
    """
    check_writable(file, folder=False)
    if kind == "onnx":
        _need_onnx()
    images, valid = _examples(detector, pictures)
    # The detector computes before it is traced: what it keeps between calls (resampling matrices)
    # must hold real numbers, not those of the tracer.
    # All pictures at once, and the first alone: N must not be fixed in the file.
    counts = (len(images), 1)
    expected = [
        detector.score_placed(images[:n], None if valid is None else valid[:n]) for n in counts
    ]
    network = ExportedNetwork(detector).eval()
    program = _program(network, images[:2], None if valid is None else valid[:2])
    metadata = _metadata(detector)
    with atomic_write(file) as draft:
        run = (
            _write_onnx(program, draft, metadata)
            if kind == "onnx"
            else _write_torch(program, draft, metadata)
        )
        comparison = _compare(expected, run, images, valid)
        if not comparison.difference <= TOLERANCE[kind]:
            raise ModelError(
                "The exported network's maps differ from the detector's by "
                f"{comparison.difference:.2g}, more than {TOLERANCE[kind]:g}: "
                f"nothing was written. Report it with the detector's settings."
            )
    return comparison


Run = Callable[[Tensor, "Tensor | None"], tuple[np.ndarray, np.ndarray]]


def _program(
    network: nn.Module, images: Tensor, valid: Tensor | None
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    arguments = (images,) if valid is None else (images, valid)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                network,
                arguments,
                dynamic_shapes=tuple({0: batch} for _ in arguments),
                strict=False,
            )
    except Exception as error:  # the compiler of torch raises errors of its own
        raise ModelError(f"This network can't be exported ({_line(error)}).") from error


def _write_torch(
    program: torch.export.ExportedProgram, file: Path, metadata: dict[str, Any]
) -> Run:
    with file.open("wb") as target:
        torch.export.save(program, target, extra_files={_METADATA: json.dumps(metadata)})
    with file.open("rb") as source:
        loaded = torch.export.load(source).module()

    def run(images: Tensor, valid: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            maps, scores = loaded(images) if valid is None else loaded(images, valid)
        return maps.numpy(), scores.numpy()

    return run


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"{error.name} is not installed: pip install 'clsnf[export]', or take --format torch."
        ) from error


def _write_onnx(program: torch.export.ExportedProgram, file: Path, metadata: dict[str, Any]) -> Run:
    import onnx
    import onnxruntime

    names = ["images", "valid"][: len(program.graph_signature.user_inputs)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=["maps", "scores"]
            )
    except Exception as error:
        raise ModelError(
            f"ONNX can't express this network ({_line(error)}): take --format torch."
        ) from error
    assert written is not None
    model = written.model_proto
    for name, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    file.write_bytes(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor, valid: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        inputs = {"images": images.numpy()} | ({} if valid is None else {"valid": valid.numpy()})
        maps, scores = session.run(["maps", "scores"], inputs)
        return maps, scores

    return run


def _compare(
    expected: Sequence[tuple[np.ndarray, np.ndarray]],
    run: Run,
    images: Tensor,
    valid: Tensor | None,
) -> Comparison:
    worst, lowest, highest = 0.0, 1.0, 0.0
    for maps, scores in expected:
        count = len(maps)
        found_maps, found_scores = run(images[:count], None if valid is None else valid[:count])
        worst = max(
            worst,
            float(np.abs(found_maps - maps).max()),
            float(np.abs(found_scores - scores).max()),
        )
        lowest, highest = min(lowest, float(maps.min())), max(highest, float(maps.max()))
    return Comparison(len(images), worst, lowest, highest)


def _examples(detector: Detector, pictures: Sequence[Path]) -> tuple[Tensor, Tensor | None]:
    """Pictures on the canvas: grey, noise, waves, and those given.

    Beside them the mask of pixels that are not padding, if the detector keeps shapes.
    """
    height, width = detector.settings.image.size
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = 128 + 100 * np.sin(columns / 17) * np.cos(rows / 23)
    drawn = [
        np.full((height, width, 3), 128),
        rng.integers(0, 256, (height, 2 * width, 3)),
        np.repeat(waves[..., None], 3, axis=2),
    ]
    images = [image.astype(np.uint8) for image in drawn] + [read_image(path) for path in pictures]
    placed = [place(image, detector.settings.image) for image in images]
    stacked = torch.stack([image for image, _ in placed])
    if not detector.settings.image.may_pad:
        return stacked, None
    return stacked, torch.stack([placement.valid for _, placement in placed])


def _metadata(detector: Detector) -> dict[str, Any]:
    """What a caller needs to know beside the network."""
    return {
        "category": detector.provenance.category,
        "image": to_dict(detector.settings.image),
        "input": "RGB, 0 to 255, (N, 3, H, W) uint8, resized with antialiasing "
        f"({detector.settings.image.interpolation})",
        "threshold": detector.threshold.value,
        "false_reject_rate": detector.threshold.false_reject_rate,
        "map_threshold": detector.map_threshold,
        "versions": detector.provenance.versions,
    }


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
