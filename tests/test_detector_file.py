"""``detector.json`` as anybody may write it: it is used as it stands, or refused in one line."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clsnf.core.errors import ModelError
from clsnf.core.files import write_json
from clsnf.core.hashing import sha256_file
from clsnf.detector import Detector
from clsnf.detector_file import DESCRIPTION, TENSORS, read_description

_ODD: list[Any] = [
    None, True, -1, 0, 2, 0.5, 5.0, -0.5, 10**30, 1e300, "", "x", "hf-hub:timm/resnet18.a1_in1k",
    "\ud800", [], [1], [0.5, 0.5], [None], [[1.0]], {}, {"a": 1}, {"value": 1},
]  # fmt: skip


@pytest.fixture
def saved(winners: Path, tmp_path: Path) -> Path:
    shutil.copytree(winners / "plate", tmp_path / "plate")
    return tmp_path / "plate"


def described(folder: Path) -> Any:
    return json.loads((folder / DESCRIPTION).read_text())


def put(content: Any, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        content = content[section]
    content[last] = value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries, mappings and lists among them."""
    found = [path] if path else []
    items: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    items += list(enumerate(value))[:3] if isinstance(value, list) else []
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("the load asks the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("provenance.architecture", "hf-hub:timm/resnet18.a1_in1k"),
        ("provenance.architecture", "local-dir:/tmp/resnet18"),
        ("provenance.architecture", "/tmp/resnet18"),
        ("provenance.validation_scores", [0.2, 0.1]),
        ("provenance.validation_scores", [0.2, 7.0]),
        ("provenance.validation_scores", []),
        ("provenance.fit_images", -5),
        ("provenance.versions", {"torch": 2}),
        ("provenance.image_statistics", {"brightness": [1.0, 0.0]}),
        ("provenance.image_statistics", {"brightness": "dark"}),
        ("provenance.image_statistics", {"smell": [1.0, 1.0]}),
        ("uses.threshold.value", 5.0),
        ("uses.threshold.false_reject_rate", 9.0),
        ("uses.threshold.supported_rate", 0.0),
        ("uses.threshold.normals", -5),
        ("uses.level_scales", 3),
        ("trained_with.image.height", 10**9),
        ("trained_with.flow.depth", 10**7),
        ("trained_with.flow.memory", 10**12),
        ("tensors_sha256", 7),
    ],
)
def test_a_field_out_of_its_range_is_named(
    saved: Path, no_network: None, name: str, value: Any
) -> None:
    content = described(saved)
    put(content, name, value)
    write_json(saved / DESCRIPTION, content)
    with pytest.raises(ModelError) as refused:
        read_description(saved)
    assert name.rpartition(".")[2] in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError):
        Detector.load(saved, device="cpu")


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 200_000,
        b'{"format": 3, "uses": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"format": 3, "seed": ' + b"9" * 5000 + b"}",
        b'{"format": 3, "uses": NaN}',
        b'{"format": 3, "uses": 1e999}',
        b"\xff\xfe\x00",
        b"[3]",
        b"3",
        b'"format"',
    ],
    ids=["brackets", "deep", "digits", "nan", "infinite", "bytes", "list", "number", "text"],
)
def test_a_description_that_is_none_is_refused_in_one_line(saved: Path, raw: bytes) -> None:
    (saved / DESCRIPTION).write_bytes(raw)
    with pytest.raises(ModelError) as refused:
        read_description(saved)
    assert "\n" not in str(refused.value)


def test_a_huge_description_is_not_read(saved: Path) -> None:
    with (saved / DESCRIPTION).open("r+b") as file:
        file.truncate(2 * 2**30)  # sparse
    with pytest.raises(ModelError, match="64 MiB"):
        read_description(saved)


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (2**64 - 1, b"{}"),
        (2**40, b"{}"),
        (9, b"[" * 9),
        (200_000, b"[" * 200_000),
        (70, b'{"a":{"dtype":"F32","shape":[999999999999],"data_offsets":[0,3]}}    '),
    ],
    ids=["endless", "large", "brackets", "deep", "shape"],
)
def test_a_header_of_tensors_that_lies_is_refused(saved: Path, size: int, header: bytes) -> None:
    (saved / TENSORS).write_bytes(size.to_bytes(8, "little") + header)
    content = described(saved) | {"tensors_sha256": sha256_file(saved / TENSORS)}
    write_json(saved / DESCRIPTION, content)
    with pytest.raises(ModelError):
        Detector.load(saved, device="cpu")


def test_a_giant_backbone_that_is_not_in_the_file_is_refused_before_it_is_built(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = described(saved)
    put(content, "provenance.architecture", "regnety_1280")
    write_json(saved / DESCRIPTION, content)
    monkeypatch.delattr("clsnf.detector.empty_backbone")
    with pytest.raises(ModelError, match="names the backbone 'regnety_1280' of") as caught:
        Detector.load(saved, device="cpu")
    assert "\n" not in str(caught.value)


def test_tensors_of_another_shape_are_refused(saved: Path) -> None:
    tensors = load_file(saved / TENSORS)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3)}, saved / TENSORS)
    content = described(saved) | {"tensors_sha256": sha256_file(saved / TENSORS)}
    write_json(saved / DESCRIPTION, content)
    with pytest.raises(ModelError, match="size mismatch"):
        Detector.load(saved, device="cpu")


@pytest.mark.slow
@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_an_entry_is_the_detector_answers_alike_or_is_refused(
    saved: Path, no_network: None, data: st.DataObject
) -> None:
    original = saved.with_name("original.json")
    if not original.exists():
        shutil.copyfile(saved / DESCRIPTION, original)
    content = json.loads(original.read_text())
    for path in data.draw(st.lists(st.sampled_from(places(content)), min_size=1, max_size=2)):
        inner = content
        try:
            for key in path[:-1]:
                inner = inner[key]
            if data.draw(st.booleans()):
                inner[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(_ODD)))
            else:
                del inner[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    (saved / DESCRIPTION).write_text(json.dumps(content))
    try:
        detector = Detector.load(saved, device="cpu")
    except ModelError:
        return
    black = torch.zeros((1, 3, *detector.settings.image.size), dtype=torch.uint8)
    maps, scores = detector.score_placed(black)
    assert np.isfinite(maps).all()
    assert np.isfinite(scores).all()
    assert detector.verdicts(scores).shape == (1,)
