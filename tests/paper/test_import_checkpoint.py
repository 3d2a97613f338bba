"""Import of the authors' checkpoints: the maps of a plain reference, thresholds, bad files."""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.cli import main
from clsnf.core.errors import CheckpointError, SettingsError
from clsnf.data.images import ImageSettings, place, read_image
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.detector import Detector, Provenance
from clsnf.paper import import_checkpoint
from clsnf.paper.checkpoint_file import Checkpoint, read_checkpoint
from clsnf.paper.import_checkpoint import (
    Imported,
    build_imported,
    calibrate_imported,
    level_constants,
)
from clsnf.training.prepare import place_rows, rows_of
from tests.support.authors_reference import Reference
from tests.support.small_data import write_category

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _leave_nothing(tmp_path: Path) -> Iterator[None]:
    """A checkpoint is large, and pytest keeps the folders of the last runs."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_category(
        tmp_path_factory.mktemp("data") / "screw", train=8, good=2, defective=2
    ).parent


@pytest.fixture(scope="module")
def table(data: Path) -> pa.Table:
    return assign_splits(read_category(data, "screw"), 0.4, seed=0)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(depth=2)


@pytest.fixture(scope="module")
def checkpoint(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = saved(reference.checkpoint(), tmp_path_factory.mktemp("ck") / "all.pt")
    yield path
    path.unlink()


def saved(content: Any, path: Path, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def read_in_memory(content: dict[str, Any]) -> Checkpoint:
    """What reading a file with this content gives, without the hundred megabytes on the disk."""
    parts = [
        content[name] for name in ("encoder_state_dict", "decoder_state_dict", "nf_state_dict")
    ]
    return Checkpoint(parts[0], parts[1], tuple(parts[2]), dict(vars(content["args"])), {})


SMALL: dict[str, Any] = {  # all that reading alone asks for
    "encoder_state_dict": {"a": torch.arange(3.0)},
    "decoder_state_dict": {"b": torch.arange(4.0)},
    "nf_state_dict": [{"c": torch.arange(5.0)}],
}


def tensors_of(table: pa.Table, split: str, size: tuple[int, int]) -> torch.Tensor:
    """Images of a split as the network sees them, (N, 3, H, W) in [0, 1]."""
    placed = [
        place(read_image(path), ImageSettings(*size))[0]
        for path in rows_of(table, split)["path"].to_pylist()
    ]
    return torch.stack(placed).float() / 255


def assert_agrees(reference: Reference, detector: Detector, table: pa.Table, weight: float) -> None:
    """Constants and all three maps are those of the reference's own forward pass."""
    size = detector.settings.image.size
    constants = [
        float(level.max()) for level in reference.log_likelihoods(tensors_of(table, "fit", size))
    ]
    assert [scale.constant for scale in detector.network.scales] == pytest.approx(
        constants, abs=1e-4
    )
    assert all(scale.steepness == 1 for scale in detector.network.scales)
    test = rows_of(table, "test")
    images = tensors_of(table, "test", size)
    density, classifier, fused = reference.maps(images, constants, weight)
    with torch.inference_mode():
        found_density, found_classifier = detector.network(images)
    for name, found, expected in (
        ("density", found_density, density),
        ("classifier", found_classifier, classifier),
        ("fused", torch.from_numpy(detector.predict(test["path"].to_pylist()).maps), fused),
    ):
        assert expected.std() > 0.002, f"the reference's {name} map says nothing"
        assert float((found - expected).abs().max()) < 1e-4, name


def imported(path: Path | list[Path], table: pa.Table, **how: Any) -> Detector:
    files = path if isinstance(path, list) else [path]
    return calibrate_imported(build_imported(read_checkpoint(files), **how), table, CPU)


# ---- the same maps ----


def test_the_imported_detector_gives_the_reference_s_maps(
    reference: Reference, checkpoint: Path, table: pa.Table, tmp_path: Path
) -> None:
    detector = imported(checkpoint, table)
    assert detector.fusion_weight == 0.25  # w_fe 1 on three levels
    assert_agrees(reference, detector, table, 0.25)
    detector.save(tmp_path / "model")
    assert_agrees(reference, Detector.load(tmp_path / "model", "cpu"), table, 0.25)


@pytest.mark.parametrize(
    ("made", "size"),
    [
        ({"depth": 1, "soft": False, "clamp": 1.2}, (64, 64)),
        ({"depth": 1, "stages": (3, 4)}, (64, 96)),
        ({"depth": 1, "stages": (2, 4)}, (64, 64)),
        ({"depth": 1, "stages": (4,)}, (128, 128)),
        (
            {"depth": 1, "stages": (4, 2, 3), "seed": 3},
            (96, 64),
        ),  # the authors' pool_layers may have any order
    ],
)
def test_other_flows_levels_and_image_sizes_agree_too(
    made: dict[str, Any], size: tuple[int, int], table: pa.Table, tmp_path: Path
) -> None:
    known = Reference(**made)
    detector = imported(
        saved(known.checkpoint(), tmp_path / "c.pt"), table, image_size=size, fusion_weight=0.5
    )
    assert detector.settings.flow.permutation == ("hard" if made.get("soft") is False else "soft")
    assert detector.settings.flow.clamp == made.get("clamp", 1.9)
    assert detector.settings.backbone.levels == tuple(sorted(made.get("stages", (2, 3, 4))))
    order = sorted(range(len(known.stages)), key=lambda i: known.stages[i])
    known.stages, known.flows = [known.stages[i] for i in order], [known.flows[i] for i in order]
    assert_agrees(known, detector, table, 0.5)


@pytest.mark.slow
def test_a_wide_resnet_50_2_gives_the_reference_s_maps(table: pa.Table, tmp_path: Path) -> None:
    known = Reference("wide_resnet50_2", depth=1, soft=False)
    detector = imported(saved(known.checkpoint(), tmp_path / "wide.pt"), table)
    assert detector.provenance.architecture == "wide_resnet50_2"
    assert_agrees(known, detector, table, 0.25)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_level_s_constant_is_the_largest_over_all_batches(
    reference: Reference, table: pa.Table, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    found = build_imported(read_in_memory(reference.checkpoint()))
    placed = place_rows(rows_of(table, "fit"), found.settings)
    whole = level_constants(found.backbone, found.flows, placed, CPU)
    monkeypatch.setattr(import_checkpoint, "_BATCH", 1)
    turned = dataclasses.replace(
        placed, images=placed.images.flip(0) if backwards else placed.images
    )
    assert level_constants(found.backbone, found.flows, turned, CPU) == pytest.approx(
        whole, abs=1e-5
    )


# ---- forms of files ----


def test_the_two_files_of_the_authors_program_give_what_one_file_gives(
    reference: Reference, checkpoint: Path, table: pa.Table, tmp_path: Path
) -> None:
    whole = reference.checkpoint()
    first = saved(
        {name: whole[name] for name in ("encoder_state_dict", "decoder_state_dict", "args")},
        tmp_path / "fe_only.pt",
    )
    second = saved(
        {name: whole[name] for name in ("encoder_state_dict", "nf_state_dict", "args")},
        tmp_path / "nf_only.pt",
    )
    expected = imported(checkpoint, table)
    for order in ([first, second], [second, first]):
        detector = imported(order, table)
        state = detector.network.state_dict()
        assert all(
            torch.equal(value, state[name]) for name, value in expected.network.state_dict().items()
        )
        assert detector.provenance.imported == {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (first, second)
        }


def test_the_options_of_the_flows_run_go_before_the_decoder_s_in_any_order(tmp_path: Path) -> None:
    decoder = {name: SMALL[name] for name in ("encoder_state_dict", "decoder_state_dict")}
    flows = {name: SMALL[name] for name in ("encoder_state_dict", "nf_state_dict")}
    first = saved(
        decoder | {"args": argparse.Namespace(clamp_alpha=1.9, repeat_num=5)}, tmp_path / "a.pt"
    )
    second = saved(flows | {"args": argparse.Namespace(clamp_alpha=1.2)}, tmp_path / "b.pt")
    for order in ([first, second], [second, first]):
        assert read_checkpoint(order).arguments == {"clamp_alpha": 1.2, "repeat_num": 5}


def same_state(one: Checkpoint, other: Checkpoint) -> bool:
    pairs = zip(
        (one.encoder, one.decoder, *one.flows),
        (other.encoder, other.decoder, *other.flows),
        strict=True,
    )
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)


def test_the_older_format_of_torch_is_read_as_well(
    reference: Reference, checkpoint: Path, tmp_path: Path
) -> None:
    older = saved(reference.checkpoint(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(older)
    one, other = read_checkpoint([older]), read_checkpoint([checkpoint])
    assert same_state(one, other)
    assert one.arguments == other.arguments


def test_what_several_gpus_half_precision_and_unused_layers_leave_is_no_trouble(
    reference: Reference, tmp_path: Path
) -> None:
    whole = reference.checkpoint()
    encoder = {
        f"module.{name}": value.half() for name, value in whole["encoder_state_dict"].items()
    }
    encoder |= {"module.fc.weight": torch.zeros(1000, 512), "module.fc.bias": torch.zeros(1000)}
    encoder = {
        name: value for name, value in encoder.items() if not name.endswith("num_batches_tracked")
    }
    path = saved(whole | {"encoder_state_dict": encoder}, tmp_path / "c.pt")
    found = build_imported(read_checkpoint([path])).backbone.extractor.state_dict()[
        "layer4.1.conv2.weight"
    ]
    torch.testing.assert_close(
        found, whole["encoder_state_dict"]["layer4.1.conv2.weight"], rtol=1e-3, atol=1e-4
    )


# ---- arguments ----


def built(reference: Reference, tmp_path: Path, arguments: Any, **how: Any) -> Imported:
    """A checkpoint whose arguments went through a file."""
    read = read_checkpoint([saved(SMALL | {"args": arguments}, tmp_path / "c.pt")])
    return build_imported(
        dataclasses.replace(read_in_memory(reference.checkpoint()), arguments=read.arguments), **how
    )


@pytest.mark.parametrize(
    ("w_fe", "weight"),
    [
        (1.0, 0.25),
        (0.3, 0.3 / 3.3),
        (1, 0.25),
        (0, 0.25),
        (0.0, 0.25),
        (-1, 0.25),
        (float("nan"), 0.25),
        ("1", 0.25),
    ],
)
def test_the_fusion_weight_is_the_file_s_where_it_says_one(
    reference: Reference, tmp_path: Path, w_fe: Any, weight: float
) -> None:
    found = built(reference, tmp_path, reference.arguments(w_fe=w_fe))
    assert found.settings.fusion_weight == pytest.approx(weight)
    said = [note for note in found.notes if note.startswith("fusion weight")]
    assert len(said) == 1
    assert ("because" in said[0]) == (w_fe not in (1.0, 0.3, 1))


def test_a_weight_that_is_given_goes_before_the_file_s(
    reference: Reference, tmp_path: Path
) -> None:
    found = built(reference, tmp_path, reference.arguments(), fusion_weight=0.0)
    assert found.settings.fusion_weight == 0
    assert found.notes == []
    with pytest.raises(SettingsError, match="fusion_weight"):
        built(reference, tmp_path, reference.arguments(), fusion_weight=1.5)


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        "text",
        argparse.Namespace(),
        {},
        [1, 2],
        argparse.Namespace(input_size="big", clamp_alpha=None),
    ],
)
def test_without_sensible_arguments_the_defaults_are_taken_with_a_note(
    reference: Reference, tmp_path: Path, arguments: Any
) -> None:
    found = built(reference, tmp_path, arguments)
    assert (found.settings.image.size, found.settings.flow.clamp, found.settings.fusion_weight) == (
        (256, 256),
        1.9,
        0.25,
    )
    assert [note.split("(")[1].split(")")[0] for note in found.notes] == [
        "input_size",
        "clamp_alpha",
        "or give --fusion-weight",
    ]


def test_arguments_that_are_a_dictionary_count_as_well(
    reference: Reference, tmp_path: Path
) -> None:
    found = built(reference, tmp_path, vars(reference.arguments(clamp_alpha=1.5, input_size=96)))
    assert (found.settings.image.size, found.settings.flow.clamp) == ((96, 96), 1.5)


def test_another_scaling_of_the_images_is_refused(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"norm_mean \[0.5, 0.5, 0.5\]"):
        built(reference, tmp_path, reference.arguments(norm_mean=[0.5, 0.5, 0.5]))


# ---- what is no checkpoint of this architecture ----


def refusal(content: Any, **how: Any) -> str:
    """The one line that tensors which do not fit get."""
    with pytest.raises(CheckpointError) as caught:
        build_imported(read_in_memory(content), **how)
    return one_line(caught.value)


def reading_refusal(content: Any, tmp_path: Path) -> str:
    """The one line that a file with this content gets."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint([saved(content, tmp_path / "c.pt")])
    return one_line(caught.value)


def one_line(error: CheckpointError) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 500
    return text


Change = Callable[[dict[str, Any]], Any]


def changed(
    reference: Reference, part: str, change: Change, flow: int | None = None
) -> dict[str, Any]:
    """A checkpoint with one state dict changed."""
    whole = reference.checkpoint()
    if flow is None:
        whole[part] = dict(whole[part])
        change(whole[part])
    else:
        whole[part] = [dict(state) for state in whole[part]]
        change(whole[part][flow])
    return whole


@pytest.mark.parametrize("backbone", ["resnet34", "wide_resnet50_2", "regnetx_002"])
def test_another_backbone_is_refused_with_the_first_tensor_and_the_right_name(
    reference: Reference, backbone: str
) -> None:
    text = refusal(reference.checkpoint(), backbone=backbone)
    assert text.startswith("The encoder")
    assert f"{backbone} needs (" in text
    assert text.endswith("The encoder is that of resnet18: try --backbone resnet18.")


def test_an_unknown_backbone_is_refused_with_the_nearest_name(
    reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="Did you mean 'resnet18'"):
        built(reference, tmp_path, None, backbone="resnet_18")


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda state: state.update({name: torch.zeros(*shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("part", "flow", "change", "said"),
    [
        (
            "encoder_state_dict",
            None,
            lambda s: s.pop("layer3.1.bn2.weight"),
            "The encoder has no layer3.1.bn2.weight; resnet18 needs (256,)",
        ),
        (
            "encoder_state_dict",
            None,
            tensor("conv1.weight", 64, 1, 7, 7),
            "The encoder's conv1.weight has the shape (64, 1, 7, 7); resnet18 needs (64, 3, 7, 7)",
        ),
        (
            "encoder_state_dict",
            None,
            lambda s: [s.pop(n) for n in list(s) if n[:6] == "layer4"],
            "not those of a ResNet that is known by its shapes",
        ),
        (
            "encoder_state_dict",
            None,
            lambda s: s.update({"bn1.weight": torch.full((64,), torch.nan)}),
            "bn1.weight holds values that are not finite",
        ),
        (
            "encoder_state_dict",
            None,
            tensor("bn1.weight", 64, dtype=torch.int64),
            "The encoder's bn1.weight holds int64",
        ),
        (
            "decoder_state_dict",
            None,
            lambda s: s.pop("nin.2.weight"),
            "The decoder has no nin.2.weight; resnet18 needs (512, 256, 1, 1)",
        ),
        (
            "decoder_state_dict",
            None,
            tensor("uplayer3.0.conv1.weight", 64, 192, 3, 3),
            "The decoder's uplayer3.0.conv1.weight has the shape (64, 192, 3, 3); resnet18 needs "
            "(64, 128, 3, 3)",
        ),
        (
            "decoder_state_dict",
            None,
            tensor("uplayer5.0.conv1.weight", 3),
            "The decoder has uplayer5.0.conv1.weight (3,), which",
        ),
        (
            "decoder_state_dict",
            None,
            tensor("conv2.weight", 2, 16, 3, 3),
            "gives 2 maps (loss_type smooth_cls): only soft targets",
        ),
        (
            "nf_state_dict",
            1,
            lambda s: s.pop("module_list.1.w_perm"),
            "The flow of level 3 has no module_list.1.w_perm",
        ),
        (
            "nf_state_dict",
            0,
            tensor("module_list.0.vk_householder", 2),
            "The flow of level 2 has module_list.0.vk_householder (2,), which",
        ),
        (
            "nf_state_dict",
            0,
            lambda s: s.pop("module_list.0.global_offset"),
            "it is no SequenceINN of FrEIA's (0.2) AllInOneBlock",
        ),
        (
            "nf_state_dict",
            0,
            tensor("module_list.0.global_offset", 1, 96),
            "for vectors of 96 channels, none of the encoder's levels",
        ),
        (
            "nf_state_dict",
            0,
            tensor("module_list.0.global_offset", 1, 256),
            "for vectors of 256 channels, a level that has a flow already",
        ),
        (
            "nf_state_dict",
            0,
            tensor("module_list.0.subnet.0.weight", 384, 100),
            "has the shape (384, 100); resnet18 needs (200, 100)",
        ),
        (
            "nf_state_dict",
            0,
            tensor("module_list.0.subnet.0.weight", 384, 61),
            "leaves -3 dimensions",
        ),
        (
            "nf_state_dict",
            2,
            tensor("module_list.7.w_perm", 1),
            "The flows have 2, 2, 3 coupling blocks",
        ),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(
    reference: Reference, part: str, flow: int | None, change: Change, said: str
) -> None:
    assert said in refusal(changed(reference, part, change, flow))


def test_an_encoder_without_a_level_is_refused_under_any_name(reference: Reference) -> None:
    content = changed(
        reference,
        "encoder_state_dict",
        lambda s: [s.pop(n) for n in list(s) if n.startswith("layer4")],
    )
    assert "not those of a ResNet with four levels" in refusal(content, backbone="resnet18")


def test_a_decoder_without_skips_is_said_to_be_one() -> None:
    assert "without skip connections" in refusal(Reference(skips=False, depth=1).checkpoint())


def test_flows_without_the_deepest_level_are_refused() -> None:
    text = refusal(Reference(stages=(2, 3), depth=1).checkpoint())
    assert "The flows are of levels 2, 3: level 4, which the decoder starts from, has none." in text


@pytest.mark.parametrize("missing", ["encoder_state_dict", "decoder_state_dict", "nf_state_dict"])
def test_a_missing_part_is_named_with_where_it_may_be(tmp_path: Path, missing: str) -> None:
    text = reading_refusal(
        {name: value for name, value in SMALL.items() if name != missing}, tmp_path
    )
    assert f"({missing}) not found" in text
    assert "give both" in text


def test_two_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    whole, other = SMALL, SMALL | {"encoder_state_dict": {"a": torch.ones(3)}}
    first = saved(
        {
            "encoder_state_dict": whole["encoder_state_dict"],
            "decoder_state_dict": whole["decoder_state_dict"],
        },
        tmp_path / "a.pt",
    )
    second = saved(
        {
            "encoder_state_dict": other["encoder_state_dict"],
            "nf_state_dict": other["nf_state_dict"],
        },
        tmp_path / "b.pt",
    )
    with pytest.raises(CheckpointError, match=r"a\.pt and .*b\.pt hold different encoders"):
        read_checkpoint([first, second])
    with pytest.raises(CheckpointError, match="both hold decoder_state_dict"):
        read_checkpoint([first, first])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"conv1.weight": torch.zeros(3)},
            "it is a plain state dict of conv1.weight, without encoder_state_dict",
        ),
        ({"epoch": 3}, "it is a dictionary of epoch, without"),
        ({}, "it is a dictionary of nothing"),
        (torch.zeros(3), "it holds an object of type Tensor, not a dictionary"),
        ([1], "it holds an object of type list"),
        (
            {"encoder_state_dict": 5},
            "encoder_state_dict is an object of type int, not a dictionary of tensors",
        ),
        (
            {"encoder_state_dict": {"a": "text"}},
            "encoder_state_dict holds an object of type str under 'a', not a tensor",
        ),
        (
            {"nf_state_dict": {"a": torch.zeros(3)}},
            "nf_state_dict is an object of type dict, not a list",
        ),
        ({"nf_state_dict": []}, "nf_state_dict is an object of type list, not a list with"),
        (
            {"encoder_state_dict": {"a": torch.zeros(1).expand(10**12)}},
            "the values of encoder_state_dict's a (1000000000000,) are not in the file",
        ),
        (
            {"encoder_state_dict": {"a": torch.eye(3).to_sparse()}},
            "encoder_state_dict's a (3, 3) are not in the file",
        ),
        (
            {"encoder_state_dict": {"a": torch.zeros(3, device="meta")}},
            "encoder_state_dict's a (3,) are not in the file",
        ),
    ],
)
def test_other_contents_are_distinguished(content: Any, said: str, tmp_path: Path) -> None:
    assert said in reading_refusal(content, tmp_path)


# ---- files that would do harm ----


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Stranger:
    """An object of a class of its own."""

    def __init__(self) -> None:
        self.name = "x"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "args", "state"])
def test_a_file_that_would_run_a_command_is_refused_and_runs_nothing(
    tmp_path: Path, place: str, zipped: bool
) -> None:
    (tmp_path / "new").mkdir()
    bad = Runs(f"touch {tmp_path / 'new' / 'ran'}")
    whole = SMALL
    content: Any = {
        "top": bad,
        "args": whole | {"args": argparse.Namespace(w_fe=bad)},
        "state": whole | {"decoder_state_dict": {"nin.0.weight": bad}},
    }[place]
    path = saved(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint([path])
    assert "'posix.system'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_an_unknown_object_inside_the_arguments_is_named(tmp_path: Path, zipped: bool) -> None:
    content = SMALL | {"args": argparse.Namespace(inner=argparse.Namespace(deeper=[Stranger()]))}
    path = saved(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"unknown type '[\w.]*Stranger'"):
        read_checkpoint([path])


def test_a_namespace_cannot_bring_methods_or_a_class_of_its_own(tmp_path: Path) -> None:
    """What the unpickler would call on a real Namespace is at most kept as a value."""
    strange: dict[Any, Any] = {"__setstate__": torch.Size, "__class__": 5, "w_fe": 0.5, 7: "number"}
    space = argparse.Namespace()
    space.__dict__.update(strange)
    found = read_checkpoint([saved(SMALL | {"args": space}, tmp_path / "c.pt")])
    assert found.arguments == {"__setstate__": torch.Size, "__class__": 5, "w_fe": 0.5}


def test_the_list_of_classes_that_torch_may_build_is_as_before(checkpoint: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint([checkpoint])
    assert set(torch.serialization.get_safe_globals()) == before


def rewritten(
    path: Path,
    out: Path,
    change: Callable[[str, bytes], bytes],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A copy of a zip file with its entries changed, their checksums right."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name.partition("/")[2], source.read(name)))
    return out


def test_a_tensor_that_declares_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = saved({"encoder_state_dict": {"a": torch.arange(16.0)}}, tmp_path / "small.pt")

    def swell(name: str, data: bytes) -> bytes:
        if name != "data.pkl":
            return data
        changed = data.replace(b"K\x10t", b"\x8a\x05\x00\x00\x00\x00\x01t").replace(
            b"K\x10\x85", b"\x8a\x05\x00\x00\x00\x00\x01\x85"
        )
        assert changed != data
        return changed  # 2^32 values are declared, 16 are there

    with pytest.raises(CheckpointError) as caught:
        read_checkpoint([rewritten(path, tmp_path / "c.pt", swell)])
    assert "c.pt can't be read" in str(caught.value)


def test_files_that_were_saved_on_a_gpu_are_read_without_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    def elsewhere(name: str, data: bytes) -> bytes:
        return (
            data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            if name == "data.pkl"
            else data
        )

    path = rewritten(checkpoint, tmp_path / "gpu.pt", elsewhere)
    assert b"cuda:0" in path.read_bytes()
    assert same_state(read_checkpoint([path]), read_checkpoint([checkpoint]))


def test_a_flipped_bit_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: the checksum of"):
        read_checkpoint([tmp_path / "c.pt"])


def test_a_file_that_was_packed_anew_is_refused(tmp_path: Path) -> None:
    path = saved({"encoder_state_dict": {"a": torch.zeros(100)}}, tmp_path / "small.pt")
    with pytest.raises(CheckpointError, match="was packed anew"):
        read_checkpoint(
            [rewritten(path, tmp_path / "c.pt", lambda name, data: data, zipfile.ZIP_DEFLATED)]
        )


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match=f"There is no file {path}"):
            read_checkpoint([path])


@pytest.fixture(scope="module")
def small_files() -> list[bytes]:
    """Small checkpoints in both formats, to be damaged."""
    found = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        content = {
            "encoder_state_dict": {"a": torch.arange(30.0), "b": torch.zeros(2, 3)},
            "args": argparse.Namespace(w_fe=1.0, lr=[1e-4]),
        }
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        found.append(buffer.getvalue())
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_is_one_line(
    small_files: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut, changed or foreign bytes: one clear line, or a file that is still whole where it matters
    (then parts are missing).
    """
    content = bytearray(data.draw(st.sampled_from(small_files)))
    kind = data.draw(st.sampled_from(["cut", "change", "foreign"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "change":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    else:
        content = bytearray(data.draw(st.binary(max_size=200)))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", b"PK\x03\x04 and no more", pickle.dumps({"encoder_state_dict": {}}, 4)],
)
def test_files_that_torch_did_not_write_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt") as caught:
        read_checkpoint([tmp_path / "c.pt"])
    assert "\n" not in str(caught.value)


def test_networks_whose_likelihoods_are_not_finite_are_refused(
    table: pa.Table, tmp_path: Path
) -> None:
    known = Reference(depth=1, soft=False)
    content = changed(
        known, "nf_state_dict", lambda s: s["module_list.0.global_offset"].fill_(1e30), flow=2
    )
    with pytest.raises(
        CheckpointError, match="Flow 3 of 3 gives log-likelihoods that are not finite"
    ):
        imported(saved(content, tmp_path / "c.pt"), table)


# ---- the saved detector ----


def test_the_detector_says_that_it_was_imported_and_rests_on_the_normals(
    checkpoint: Path, table: pa.Table, tmp_path: Path
) -> None:
    detector = imported(checkpoint, table, false_reject_rate=0.2, seed=3)
    detector.save(tmp_path / "model")
    said = json.loads((tmp_path / "model" / "detector.json").read_text())["provenance"]
    assert said["imported"] == {"all.pt": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    again = Detector.load(tmp_path / "model", "cpu")
    assert again.provenance == detector.provenance
    assert again.settings == detector.settings
    assert (again.settings.finetune.decoder, again.settings.flow.start, again.settings.seed) == (
        "authors",
        "random",
        3,
    )
    validation = rows_of(table, "validation")["path"].to_pylist()
    assert sorted(again.predict(validation).scores.astype(float)) == pytest.approx(
        again.provenance.validation_scores, abs=1e-6
    )
    assert (again.threshold.normals, again.threshold.false_reject_rate) == (len(validation), 0.2)
    assert again.provenance.fit_images == len(rows_of(table, "fit"))
    fields = {f.name for f in dataclasses.fields(Provenance)}
    assert set(said) == fields


def test_an_older_detector_without_the_field_still_loads(
    checkpoint: Path, table: pa.Table, tmp_path: Path
) -> None:
    imported(checkpoint, table).save(tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "detector.json").read_text())
    del facts["provenance"]["imported"]
    (tmp_path / "model" / "detector.json").write_text(json.dumps(facts))
    assert Detector.load(tmp_path / "model", "cpu").provenance.imported == {}


def test_test_images_decide_nothing(checkpoint: Path, table: pa.Table) -> None:
    without = table.filter(pa.compute.not_equal(table["split"], "test"))
    one, other = imported(checkpoint, table), imported(checkpoint, without)
    assert (one.threshold, one.network.scales) == (other.threshold, other.network.scales)


# ---- the command ----


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["import-checkpoint", *map(str, arguments), "--device", "cpu"])


def test_the_command_saves_a_detector_that_predicts(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    result = run(checkpoint, "--backbone", "resnet18", "--data", data, "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert f"saved {tmp_path / 'model'}: threshold" in result.stdout
    assert "note: fusion weight 0.25: the file's w_fe 1 on 3 levels" in result.stderr
    picture = next((data / "screw" / "test" / "spot").iterdir())
    predicted = CliRunner().invoke(
        main, ["predict", str(tmp_path / "model"), str(picture), "--json", "--device", "cpu"]
    )
    assert predicted.exit_code == 0, predicted.output
    assert np.isfinite(json.loads(predicted.stdout)["score"])


def test_a_bare_folder_of_normals_will_do(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    normals = data / "screw" / "train" / "good"
    result = run(
        checkpoint,
        "--normals",
        normals,
        "--out",
        tmp_path / "model",
        "--image-size",
        "96",
        "--fusion-weight",
        "0",
    )
    assert result.exit_code == 0, result.output
    detector = Detector.load(tmp_path / "model", "cpu")
    assert (detector.fusion_weight, detector.settings.image.size) == (0.0, (96, 96))


def refused(tmp_path: Path, *arguments: object) -> str:
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments, "--out", tmp_path / "model")
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in lines) == 1
    return lines[-1]


def test_without_normals_the_command_says_why_it_needs_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    text = refused(tmp_path, checkpoint)
    assert "its level constants and its threshold are in no checkpoint" in text
    assert "--normals FOLDER, or --data FOLDER --category NAME" in text


def test_bad_input_to_the_command_is_one_line_and_leaves_nothing(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    assert "Give --data or --normals, not both." in refused(
        tmp_path, checkpoint, "--data", data, "--normals", data
    )
    assert "There is no file" in refused(tmp_path, tmp_path / "none.pt", "--data", data)
    assert "holds no category 'bolt'" in refused(
        tmp_path, checkpoint, "--data", data, "--category", "bolt"
    )
    assert "try --backbone resnet18" in refused(
        tmp_path, checkpoint, "--data", data, "--backbone", "wide_resnet50_2"
    )
    assert "from 32 to" in refused(tmp_path, checkpoint, "--data", data, "--image-size", "20")
    assert "fusion_weight" in refused(tmp_path, checkpoint, "--data", data, "--fusion-weight", "2")
    assert "false_reject_rate" in refused(
        tmp_path, checkpoint, "--data", data, "--false-reject-rate", "0"
    )


def test_a_folder_with_other_files_is_left_alone(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    result = run(checkpoint, "--data", data, "--out", tmp_path / "mine")
    assert result.exit_code == 2
    assert "holds other files" in result.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_help_of_the_command_waits_for_no_heavy_library() -> None:
    code = (
        "import sys, io, contextlib\n"
        "from clsnf.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    main(['import-checkpoint', '--help'], standalone_mode=False)\n"
        "assert 'fe_only' in out.getvalue()\n"
        "print([name for name in ('torch', 'ray', 'timm', 'numpy', 'pyarrow') if name in "
        "sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
