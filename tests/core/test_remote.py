"""Folders on a local file system and in an object store, by the same calls."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.errors import OutputError, SettingsError
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import is_uri, join_uri, refuse_password, uri_name, without_secrets
from clsnf.data.sources import file_system
from tests.support.object_store import bucket


@pytest.fixture(scope="module")
def end() -> Iterator[str]:
    with bucket() as end:
        yield end


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/remote"
    return f"s3://bucket/{tmp_path.name}{request.getfixturevalue('end')}"


def test_what_is_written_is_read_and_what_is_not_there_is_none(uri: str) -> None:
    folder = RemoteFolder(uri)
    assert folder.names() == []
    assert folder.read("a/b.json") is None
    folder.write("a/b.json", b"one")
    folder.write("a/b.json", b"two")
    assert folder.names() == ["a"]
    assert folder.read("a/b.json") == b"two"
    assert folder.below("a").read("b.json") == b"two"
    folder.delete("a")
    assert folder.read("a/b.json") is None
    folder.delete("a/b.json")
    folder.delete("never there")


def test_looking_whether_it_can_be_written_leaves_nothing(uri: str) -> None:
    folder = RemoteFolder(uri)
    folder.check_writable()
    assert folder.names() == []


def test_folders_and_files_travel_there_and_back(uri: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    (local / "deep" / "er").mkdir(parents=True)
    (local / "top.bin").write_bytes(bytes(range(256)))
    (local / "deep" / "er" / "ä.txt").write_text("x" * 100_000)
    folder = RemoteFolder(uri)
    folder.push(local, "copies/first")
    folder.push(local / "top.bin", "copies/alone.bin")
    assert folder.pull("copies/first", tmp_path / "back")
    assert folder.pull("copies/first/deep", tmp_path / "new" / "part")
    assert folder.pull("copies/alone.bin", tmp_path / "new" / "alone.bin")

    def content(root: Path) -> dict[str, bytes]:
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }

    assert content(tmp_path / "back") == content(local)
    assert content(tmp_path / "new") == {
        "part/er/ä.txt": b"x" * 100_000,
        "alone.bin": bytes(range(256)),
    }
    assert not folder.pull("copies/second", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_a_place_that_is_none_is_named_without_its_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in ("s4://bucket/x", f"file://{tmp_path}/file/x"):
        with pytest.raises(OutputError, match="can't be used"):
            RemoteFolder(bad).check_writable()
    with pytest.raises(OutputError) as caught:
        RemoteFolder("s4://somebody@bucket/x")
    assert "bucket/x" in str(caught.value)
    assert "somebody" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_said(end: str) -> None:
    with pytest.raises(OutputError, match="bucket"):
        RemoteFolder(f"s3://nowhere/x{end}").check_writable()


NAMES = st.text(
    st.characters(categories=("L", "N"), include_characters="-_."), min_size=1, max_size=8
).filter(lambda n: set(n) - {"."})


@given(
    st.lists(NAMES, min_size=1, max_size=3), NAMES, st.sampled_from(["", "?region=eu&scheme=http"])
)
def test_uris_are_joined_before_their_query(parts: list[str], name: str, query: str) -> None:
    uri = f"s3://bucket/{'/'.join(parts)}"
    assert join_uri(uri + query, name) == f"{uri}/{name}{query}"
    assert uri_name(uri + "/" + query) == uri_name(uri + query) == parts[-1]
    assert without_secrets(f"s3://user:pass@bucket/{parts[0]}") == f"s3://bucket/{parts[0]}"
    refuse_password(uri + query)
    with pytest.raises(SettingsError, match="password") as refused:
        refuse_password(f"s3://user:pa55@bucket/{parts[0]}{query}")
    assert "pa55" not in str(refused.value)
    assert is_uri(uri)
    assert not is_uri("/".join(parts))
    assert not is_uri(Path("s3:") / name)


@pytest.mark.parametrize("use", [RemoteFolder, file_system], ids=["a study's folder", "a pack"])
def test_a_password_in_a_uri_is_refused_before_anything_is_reached(
    use: Callable[[str], object],
) -> None:
    with pytest.raises(SettingsError, match=r"^s3://bucket/x was given with a password"):
        use("s3://user:pa55@bucket/x")
