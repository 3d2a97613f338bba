"""YAML that people write: numbers and words as they mean them, and errors in one line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.errors import SettingsError
from clsnf.core.yaml import parse_yaml, read_yaml_mapping


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E-4", 5e-4),
        ("+2e3", 2e3),
        ("-.5e1", -5.0),
        ("1.5e-3", 1.5e-3),
        ("3", 3),
        ("0.25", 0.25),
        ("null", None),
        ("true", True),
        ("False", False),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    found = parse_yaml(text, "--set")
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_comes_back_from_its_shortest_form(value: float) -> None:
    assert parse_yaml(repr(value), "--set") == value


@pytest.mark.parametrize("text", ["on", "off", "yes", "No", "y", "e3", "1e", "1e-x", "v1e5", "e-3"])
def test_words_stay_words(text: str) -> None:
    assert parse_yaml(text, "--set") == text


def test_what_is_no_yaml_is_named_on_one_line() -> None:
    with pytest.raises(SettingsError, match=r"^--set flow.passes is no YAML: .*") as caught:
        parse_yaml("[1, 2", "--set flow.passes")
    assert "\n" not in str(caught.value)


def test_a_file_must_map_names_to_values(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("- 1\n- 2\n")
    with pytest.raises(
        SettingsError, match=r"s.yaml holds no names with values: expected lines such as seed: 1\."
    ):
        read_yaml_mapping(file, "seed: 1")
    file.write_text("3: 4\n")
    with pytest.raises(
        SettingsError, match=r"s.yaml: 3 is no name of a setting: expected lines such as seed: 1\."
    ):
        read_yaml_mapping(file, "seed: 1")
    file.write_text("seed: 1e0\n")
    assert read_yaml_mapping(file, "seed: 1") == {"seed": 1.0}


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("seed: 1\nflow: {depth: 2, depth: 3}\n")
    with pytest.raises(SettingsError, match="'depth' stands there twice"):
        read_yaml_mapping(file, "seed: 1")


def test_files_that_are_missing_or_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"none.yaml can't be read \(No such file or directory\): check the path",
    ):
        read_yaml_mapping(tmp_path / "none.yaml", "seed: 1")
    with pytest.raises(SettingsError, match=r"can't be read \(Is a directory\)"):
        read_yaml_mapping(tmp_path, "seed: 1")
    (tmp_path / "b.yaml").write_bytes(b"\x80\xff\x00PNG")
    with pytest.raises(SettingsError, match=r"b.yaml is no YAML: it is no UTF-8 text"):
        read_yaml_mapping(tmp_path / "b.yaml", "seed: 1")
