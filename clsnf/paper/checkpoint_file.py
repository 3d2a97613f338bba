"""Reading checkpoint files of the method's authors (S. Oh and J. Kim, IEEE Access 2024) safely.

Their program writes two files for each product. ``fe_only_*.pt`` holds ``encoder_state_dict`` and
``decoder_state_dict``. ``nf_only_*.pt`` holds ``encoder_state_dict`` again and ``nf_state_dict``, a
list with one state dict for each flow. Both hold ``args``, the options of the run. One file with
everything can be read as well.

Such a file is a pickle, which could run any program. torch's restricted unpickler reads it: it
builds tensors and plain values, and refuses everything else by name. These files also hold an
``argparse.Namespace``; a class that can only keep a dictionary takes its place. Sizes in the file
are not trusted: storages are slices of the mapped file, so that a tensor which declares more values
than the file holds is refused before memory is allocated for it.
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
_PARTS = {ENCODER: "the encoder", DECODER: "the decoder", FLOWS: "the flows"}
_ZIP_START = b"PK\x03\x04"  # of torch's newer format


@dataclass(frozen=True)
class Checkpoint:
    """The content of the files, not yet checked against an architecture.

    Attributes:
        encoder, decoder: tensors by name.
        flows: tensors by name of each flow, in the order of the file.
        arguments: options of the authors' program, if the files hold any. Those of the flows' run
            override those of the decoder's run. Values may have any type.
        files: the sha256 of each file by its name.
    """

    encoder: State
    decoder: State
    flows: tuple[State, ...]
    arguments: dict[str, Any]
    files: dict[str, str]


class _Arguments:
    """Takes the place of ``argparse.Namespace`` while a file is read; only keeps a dictionary."""

    __slots__ = ("values",)

    def __setstate__(self, state: object) -> None:
        self.values = dict(state) if type(state) is dict else {}


def read_checkpoint(paths: Sequence[Path]) -> Checkpoint:
    """Read one file with everything, or the two files that the authors' program writes.

    Args:
        paths: in any order. Each part must be in exactly one file; only the encoder may be in both,
            and must then be the same.

    Raises:
        CheckpointError: a file is missing, damaged, no checkpoint of the authors, or holds objects
            of unknown types; or a part is missing or in two files; or the encoders differ.
    """
    parts: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    arguments: dict[str, Any] = {}
    for path in paths:
        content = _read_file(path)
        options = _arguments(content.pop(ARGUMENTS, None))
        # Each file holds the options of its own run. The flows need those of the flows' run,
        # whatever the order of the files.
        arguments = arguments | options if FLOWS in content else options | arguments
        for name in _PARTS:
            if name not in content:
                continue
            part: Any
            if name == FLOWS:
                part = _flows(content[name], path)
            else:
                part = _state(content, name, path)
            if name not in parts:
                parts[name], origin[name] = part, path
            elif name != ENCODER:
                raise CheckpointError(
                    f"{origin[name]} and {path} both hold {name}: give one file for each part."
                )
            elif not _same(part, parts[name]):
                raise CheckpointError(
                    f"{origin[name]} and {path} hold different encoders: decoder and flows must "
                    "share one (flows of a run with the pretrained encoder, base-nf_only, do not)."
                )
    missing = ", ".join(f"{_PARTS[name]} ({name})" for name in _PARTS if name not in parts)
    if missing:
        raise CheckpointError(
            f"{' and '.join(map(str, paths))}: {missing} not found. The authors' program writes "
            "the decoder to one file (fe_only_*.pt) and the flows to another (nf_only_*.pt): give "
            "both."
        )
    return Checkpoint(parts[ENCODER], parts[DECODER], parts[FLOWS], arguments, _hashes(paths))


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    """The sha256 of each file by its name, or by its path if two files have the same name."""
    different = len({path.name for path in paths}) == len(paths)
    return {path.name if different else str(path): sha256_file(path) for path in paths}


def _read_file(path: Path) -> dict[str, Any]:
    """The dictionary of a file, with tensors on the CPU.

    If the file is an archive, the tensors are parts of the mapped file.
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
            warnings.simplefilter("ignore")  # about old formats, which users can't change
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    # A damaged file can raise anything in the unpickler, MemoryError and RecursionError too.
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} is no checkpoint of the authors: it holds {_a(content)}, not a dictionary."
        )
    if not any(name in content for name in _PARTS):
        tensors = bool(content) and all(isinstance(v, Tensor) for v in content.values())
        kind = "a plain state dict" if tensors else "a dictionary"
        names = ", ".join(str(name)[:40] for name in list(content)[:3]) or "nothing"
        more = " ..." if len(content) > 3 else ""
        raise CheckpointError(
            f"{path} is no checkpoint of the authors: it is {kind} of {names}{more}, without "
            f"{ENCODER}, {DECODER} and {FLOWS}."
        )
    return dict(content)


def _check_zip(path: Path) -> None:
    """Refuse damaged archives, and compressed ones, which can't be mapped."""
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
            f"{path} holds an object of the unknown type {found[1]!r}, which could run code: only "
            "tensors, plain values and argparse.Namespace are read. If you trust the file, save it "
            "again without that object."
        )
    if isinstance(error, (EOFError, zipfile.BadZipFile)):
        return CheckpointError(
            f"{path} is cut short or no torch file: copy it again from its source."
        )
    reason = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    cause = reason[0][:160].rstrip(".") if reason else type(error).__name__
    return CheckpointError(
        f"{path} can't be read ({cause}): it is damaged, or no torch file. Copy it again from its "
        "source."
    )


def _state(parts: Mapping[Any, Any], name: str, path: Path) -> State:
    """The state dict `name`, checked: plain tensors on the CPU whose values are in the file."""
    state = parts[name]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: {name} is {_a(state)}, not a dictionary of tensors.")
    for key, value in state.items():
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
    # Runs on several GPUs put a prefix before all names.
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in state.items()}


def _flows(content: object, path: Path) -> tuple[State, ...]:
    if not isinstance(content, (list, tuple)) or not content:
        raise CheckpointError(
            f"{path}: {FLOWS} is {_a(content)}, not a list with a state dict for each level."
        )
    flows = {f"{FLOWS}[{index}]": flow for index, flow in enumerate(content)}
    return tuple(_state(flows, name, path) for name in flows)


def _arguments(content: object) -> dict[str, Any]:
    """The options by name; empty if they have an unexpected type, because none is required."""
    if isinstance(content, _Arguments):
        content = getattr(content, "values", {})
    elif isinstance(content, argparse.Namespace):
        content = vars(content)
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if type(key) is str}


def _same(one: State, other: State) -> bool:
    def shapes(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (value.shape, value.dtype) for name, value in state.items()}

    return shapes(one) == shapes(other) and all(torch.equal(one[name], other[name]) for name in one)


def _a(value: object) -> str:
    return f"an object of type {type(value).__name__}"
