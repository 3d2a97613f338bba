"""The checkpoint files of the method's authors (S. Oh and J. Kim, IEEE Access 2024), read without
running what they hold.

Their program writes two files for each product: ``fe_only_*.pt`` with ``encoder_state_dict`` and
``decoder_state_dict``, and ``nf_only_*.pt`` with ``encoder_state_dict`` again and
``nf_state_dict``, a list with one state dict for each flow; both with ``args``, the options of the
run. One file with everything is read as well.

Unusual: such a file is a pickle, which could run any program. It is read by torch's restricted
    unpickler, which builds tensors and plain
values and refuses everything else by name. The one further thing that these files hold,
``argparse.Namespace``, is not built either: a class of ours that can do nothing but keep a
dictionary stands in for it. And sizes are not believed: storages are slices of the mapped file, so
that a tensor which declares more than the file holds is refused before anything of that size is
made.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsnf.core.errors import CheckpointError
from clsnf.core.hashing import sha256_file

State = dict[str, Tensor]

ENCODER, DECODER, FLOWS, ARGUMENTS = (
    "encoder_state_dict",
    "decoder_state_dict",
    "nf_state_dict",
    "args",
)
_SAID = {ENCODER: "the encoder", DECODER: "the decoder", FLOWS: "the flows"}
_ZIP_START = b"PK\x03\x04"  # what torch takes for its newer format


@dataclass(frozen=True)
class Checkpoint:
    """What the files hold, none of it checked against an architecture yet.

    Attributes:
        encoder, decoder: tensors by name.
        flows: the same for each flow, in the files' order.
        arguments: the options of the authors' program, as far as they are there, of the flows' run
            before the decoder's; of any type, to be taken with care.
        files: the sha256 of each file by its name.
    """

    encoder: State
    decoder: State
    flows: tuple[State, ...]
    arguments: dict[str, Any]
    files: dict[str, str]


class _Arguments:
    """Stands in for ``argparse.Namespace`` while a file is read: keeps a dictionary, does nothing
    else.
    """

    __slots__ = ("values",)

    def __setstate__(self, state: object) -> None:
        self.values = dict(state) if type(state) is dict else {}


def read_checkpoint(paths: Sequence[Path]) -> Checkpoint:
    """Read one file with everything, or the two that the authors' program writes.

    Args:
        paths: in any order; each part must be in one of them, the encoder may be in both, and is
            the same then.

    Raises:
        CheckpointError: a file is missing, damaged, no checkpoint of the authors, or holds objects
            of unknown types; a part is missing or there twice; the encoders differ.
    """
    parts: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    arguments: dict[str, Any] = {}
    for path in paths:
        content = _read_file(path)
        said = _arguments(content.pop(ARGUMENTS, None))
        # Each file holds the options of its own run; those of the flows' run are what the flows
        # need, in whatever order files come.
        arguments = arguments | said if FLOWS in content else said | arguments
        for name in _SAID:
            if name not in content:
                continue
            part: Any = (
                _flows(content[name], path) if name == FLOWS else _state(content[name], name, path)
            )
            if name not in parts:
                parts[name], origin[name] = part, path
            elif name != ENCODER:
                raise CheckpointError(
                    f"{origin[name]} and {path} both hold {name}: give one file for each part."
                )
            elif not _same(part, parts[name]):
                raise CheckpointError(
                    f"{origin[name]} and {path} hold different encoders: decoder and flows must "
                    "share one "
                    "(flows of a run with the pretrained encoder, base-nf_only, do not)."
                )
    missing = [name for name in _SAID if name not in parts]
    if missing:
        raise CheckpointError(
            f"{' and '.join(map(str, paths))}: "
            f"{', '.join(f'{_SAID[name]} ({name})' for name in missing)} not found. The authors' "
            "program "
            "writes the decoder to one file (fe_only_*.pt) and the flows to another "
            "(nf_only_*.pt): give both."
        )
    files = {
        path.name if len({p.name for p in paths}) == len(paths) else str(path): sha256_file(path)
        for path in paths
    }
    return Checkpoint(parts[ENCODER], parts[DECODER], parts[FLOWS], arguments, files)


def _read_file(path: Path) -> dict[str, Any]:
    """A file's dictionary, its tensors on the CPU and part of the mapped file where its format
    allows that.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}: give a checkpoint of the authors' program (.pt)."
        )
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP_START)) == _ZIP_START
        if is_zip:
            _check_zip(path)
        with (
            torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(
                "ignore"
            )  # about old formats: who reads them can do nothing about it
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    # whatever a damaged file makes of the unpickler, MemoryError and RecursionError among it
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} is no checkpoint of the authors: it holds {_a(content)}, not a dictionary."
        )
    if not any(name in content for name in _SAID):
        said = (
            "a plain state dict"
            if content and all(isinstance(v, Tensor) for v in content.values())
            else "a dictionary"
        )
        names = ", ".join(str(name)[:40] for name in list(content)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is no checkpoint of the authors: it is {said} of "
            f"{names}{' ...' if len(content) > 3 else ''}, "
            f"without {ENCODER}, {DECODER} and {FLOWS}."
        )
    return dict(content)


def _check_zip(path: Path) -> None:
    """Refuse archives that are cut short or damaged, and those that hold compressed entries, which
    can't be mapped.
    """
    with zipfile.ZipFile(path) as archive:
        packed = [
            entry.filename
            for entry in archive.infolist()
            if entry.compress_type != zipfile.ZIP_STORED
        ]
        if packed:
            raise CheckpointError(
                f"{path} was packed anew (its entry {packed[0]!r} is compressed): give the file "
                "as torch saved it."
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path} is damaged: the checksum of {damaged!r} does not fit. Copy it again from "
                "its source."
            )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    found = re.search(r"(?:GLOBAL|unsupported GLOBAL) ([\w.]+)", text) or re.search(
        r"got <class '([\w.]+)'>", text
    )
    if found:
        return CheckpointError(
            f"{path} holds an object of the unknown kind {found[1]!r}, which could run code: only "
            "tensors, plain values and "
            "argparse.Namespace are read. Save it again without that object, where you trust it."
        )
    if isinstance(error, (EOFError, zipfile.BadZipFile)):
        return CheckpointError(
            f"{path} is cut short or no torch file: copy it again from its source."
        )
    reason = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    said = reason[0][:160].rstrip(".") if reason else type(error).__name__
    return CheckpointError(
        f"{path} can't be read ({said}): it is damaged, or no torch file. Copy it again from its "
        "source."
    )


def _state(content: object, name: str, path: Path) -> State:
    """A state dict whose tensors are plain, on the CPU, and no larger than what the file holds of
    them.
    """
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: {name} is {_a(content)}, not a dictionary of tensors.")
    for key, value in content.items():
        if type(key) is not str or type(value) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(
                f"{path}: {name} holds {_a(value)} under {str(key)[:80]!r}, not a tensor."
            )
        plain = (
            value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
        )
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: the values of {name}'s {key} {tuple(value.shape)} are not in the file."
            )
    prefix = (
        "module." if all(key.startswith("module.") for key in content) else ""
    )  # of a run on several GPUs
    return {key.removeprefix(prefix): value.detach() for key, value in content.items()}


def _flows(content: object, path: Path) -> tuple[State, ...]:
    if not isinstance(content, (list, tuple)) or not content:
        raise CheckpointError(
            f"{path}: {FLOWS} is {_a(content)}, not a list with a state dict for each level."
        )
    return tuple(_state(flow, f"{FLOWS}[{index}]", path) for index, flow in enumerate(content))


def _arguments(content: object) -> dict[str, Any]:
    """The options by name; none where they are of an unexpected type, because nothing rests on them
    alone.
    """
    if isinstance(content, _Arguments):
        content = getattr(content, "values", {})
    elif isinstance(content, argparse.Namespace):
        content = vars(content)
    return (
        {key: value for key, value in content.items() if type(key) is str}
        if isinstance(content, dict)
        else {}
    )


def _same(one: State, other: State) -> bool:
    def facts(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (value.shape, value.dtype) for name, value in state.items()}

    return facts(one) == facts(other) and all(torch.equal(one[name], other[name]) for name in one)


def _a(value: object) -> str:
    return f"an object of type {type(value).__name__}"
