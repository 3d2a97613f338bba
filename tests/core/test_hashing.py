"""Content keys, and files and folders that appear whole or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.config import differences
from clsnf.core.errors import OutputError
from clsnf.core.files import atomic_write, write_json
from clsnf.core.hashing import content_key, set_key

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
CONTENT = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def backwards(content: Any) -> Any:
    """The same content with the keys of every mapping in the opposite order."""
    if isinstance(content, dict):
        return {key: backwards(content[key]) for key in reversed(content)}
    return [backwards(value) for value in content] if isinstance(content, list) else content


@given(st.dictionaries(st.text(), CONTENT, max_size=5))
def test_a_key_does_not_depend_on_the_order_of_names(content: dict[str, Any]) -> None:
    assert content_key(content) == content_key(backwards(content))


@given(CONTENT, CONTENT)
def test_different_content_has_different_keys(one: Any, other: Any) -> None:
    assert (content_key(one) == content_key(other)) == (
        json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    )


def test_a_key_is_the_same_on_every_machine() -> None:
    # sha256 of {"a":"\\u00fc","b":[1,2.5,null]}, worked out by sha256sum
    assert (
        content_key({"b": [1, 2.5, None], "a": "ü"}) == "703dceec79c30480a5c3da98f5873d45349c6685"
    )


def test_a_set_s_key_depends_on_its_members_not_on_their_order() -> None:
    assert set_key(["a", "b"]) == set_key(["b", "a"]) != set_key(["a", "c"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_have_no_key_and_no_file(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_key({"a": value})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "facts.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file.txt"
    with atomic_write(path) as draft:
        draft.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_is_replaced_with_all_that_it_held(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with atomic_write(path) as draft:
        draft.mkdir()
        (draft / "new.txt").write_text("new")
        assert names(path) == ["old.txt"]
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["folder"]


def write_half_a_file(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as draft:
        draft.write_text("half")
        raise error


def write_half_a_folder(path: Path) -> None:
    with atomic_write(path) as draft:
        draft.mkdir()
        (draft / "half.txt").write_text("half")
        raise RuntimeError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("there_before", [True, False])
def test_an_error_leaves_no_half_written_file(
    tmp_path: Path, error: type[BaseException], there_before: bool
) -> None:
    path = tmp_path / "file.txt"
    if there_before:
        path.write_text("old")
    with pytest.raises(error):
        write_half_a_file(path, error)
    assert names(tmp_path) == (["file.txt"] if there_before else [])
    assert not there_before or path.read_text() == "old"


@pytest.mark.parametrize("there_before", [True, False])
def test_an_error_leaves_no_half_written_folder(tmp_path: Path, there_before: bool) -> None:
    path = tmp_path / "folder"
    if there_before:
        path.mkdir()
        (path / "old.txt").write_text("old")
    with pytest.raises(RuntimeError):
        write_half_a_folder(path)
    assert names(tmp_path) == (["folder"] if there_before else [])
    assert not there_before or (path / "old.txt").read_text() == "old"


def test_a_folder_whose_successor_can_t_take_its_place_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    rename = Path.rename

    def fail_for_drafts(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("no room")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_drafts)
    with pytest.raises(OSError, match="no room"), atomic_write(path) as draft:
        draft.mkdir()
    assert names(tmp_path) == ["folder"]
    assert (path / "old.txt").read_text() == "old"


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"), atomic_write(path) as draft:
        draft.write_text("text")
    assert path.is_dir()
    assert names(tmp_path) == ["folder"]


def test_json_comes_back_and_ends_with_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"name": "Größe", "values": [1, 0.5]})
    assert json.loads(path.read_text()) == {"name": "Größe", "values": [1, 0.5]}
    assert path.read_bytes().endswith(os.linesep.encode())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no"),
        RuntimeError(f"IoError: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "kept"
    path.write_text("before")

    def write() -> None:
        with atomic_write(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(OutputError, match="the disk is full"):
        write()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_differences_name_what_changed_and_how() -> None:
    before = {
        "seed": 0,
        "flow": {"depth": 2, "start": "data"},
        "data": {"nut": "a" * 64, "bolt": "b" * 64},
        "levels": [1, 2],
    }
    now = {
        "seed": 1,
        "flow": {"depth": 2, "start": "random"},
        "data": {"nut": "c" * 64},
        "levels": [1, 2],
        "new": 3,
    }
    assert list(differences(before, now)) == [
        "seed was 0, is 1",
        "flow.start was 'data', is 'random'",
        "data.nut has changed",
        "data.bolt is gone",
        "new is new",
    ]
    assert list(differences(now, now)) == []
