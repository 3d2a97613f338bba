"""VisA's layout: its split lies in the root, and whatever is wrong with it is one named error."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clsnf.core.errors import DataError
from clsnf.data.images import read_mask
from clsnf.data.layouts import list_categories, read_category
from clsnf.data.visa_split import SPLIT_FILE, read_split

HEADER = "object,split,label,image,mask"
NORMALS, ANOMALIES, MASKS = "Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    lines = [HEADER]
    for category in ("nut10", "nut9"):
        for folder, name in (
            (NORMALS, "10.JPG"),
            (NORMALS, "2.JPG"),
            (NORMALS, "3.JPG"),
            (ANOMALIES, "0.JPG"),
            (MASKS, "0.png"),
        ):
            path = tmp_path / category / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{category}/{name}".encode())
        lines += [f"{category},train,normal,{category}/{NORMALS}/{name}.JPG," for name in (10, 2)]
        lines.append(f"{category},test,normal,{category}/{NORMALS}/3.JPG,")
        lines.append(
            f"{category},test,anomaly,{category}/{ANOMALIES}/0.JPG,{category}/{MASKS}/0.png"
        )
    write(tmp_path, "\n".join(lines) + "\n")
    return tmp_path


def write(root: Path, text: str) -> None:
    (root / SPLIT_FILE).parent.mkdir(exist_ok=True)
    (root / SPLIT_FILE).write_text(text)


def test_the_csv_decides_the_split(visa: Path) -> None:
    assert list_categories(visa) == ["nut9", "nut10"]
    for layout in ("auto", "visa"):
        rows = read_category(visa, "nut9", layout).to_pylist()
        nut = visa / "nut9"
        assert [
            (r["path"], r["split"], r["label"], r["defect_type"], r["mask_path"]) for r in rows
        ] == [
            (str(nut / NORMALS / "2.JPG"), "fit", 0, "good", None),
            (str(nut / NORMALS / "10.JPG"), "fit", 0, "good", None),
            (str(nut / ANOMALIES / "0.JPG"), "test", 1, "anomaly", str(nut / MASKS / "0.png")),
            (str(nut / NORMALS / "3.JPG"), "test", 0, "good", None),
        ]


def test_any_nonzero_pixel_of_a_mask_is_defect(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[False, True, True, True]]


def test_without_the_csv_reading_says_what_is_missing(visa: Path) -> None:
    (visa / SPLIT_FILE).unlink()
    assert list_categories(visa) == ["nut9", "nut10"]
    with pytest.raises(DataError, match=r"1cls\.csv is missing"):
        read_category(visa, "nut9")


def test_a_category_that_the_csv_does_not_know_is_an_error(visa: Path) -> None:
    (visa / "new" / NORMALS).mkdir(parents=True)
    with pytest.raises(DataError, match="no train rows for 'new'"):
        read_category(visa, "new")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"nut9,train,normal,nut9/{NORMALS}/77.JPG,", "77.JPG' is missing"),
        (f"gone,train,normal,gone/{NORMALS}/0.JPG,", "gone/.* is missing"),
        (f"nut9,test,anomaly,nut9/{ANOMALIES}/0.JPG,nut9/7.png", "7.png' is missing"),
        (f"nut9,val,normal,nut9/{NORMALS}/3.JPG,", "'val' is neither train nor test"),
        (f"nut9,test,good,nut9/{NORMALS}/3.JPG,", "'good' is neither normal nor anomaly"),
        (f"nut9,train,anomaly,nut9/{ANOMALIES}/0.JPG,", "anomaly is in train"),
        (f"nut9,train,normal,nut9/{NORMALS}/3.JPG,nut9/{MASKS}/0.png", "has a mask"),
        ("nut9,train,normal,nut9/../../3.JPG,", "leaves the data set's folder"),
        ("nut9,train,normal,..\\3.JPG,", "leaves the data set's folder"),
        ("nut9,train,normal,/etc/hostname,", "leaves the data set's folder"),
        ("nut9,train,normal,C:\\a.JPG,", "leaves the data set's folder"),
        (f"nut9,train,normal,nut9/{NORMALS}/2.JPG,", "listed in line 7 already"),
        (f"nut9,test,normal,nut9/./{NORMALS}//2.JPG,", "listed in line 7 already"),
        ("..,train,normal,nut9/2.JPG,", "is no name of a folder"),
        ("nut9,train", "2 fields"),
    ],
)
def test_a_row_that_is_wrong_is_one_error_with_its_line(
    visa: Path, line: str, message: str
) -> None:
    write(visa, (visa / SPLIT_FILE).read_text() + line + "\n")
    with pytest.raises(DataError, match=f"line 10: .*{message}"):
        read_category(visa, "nut9")


@pytest.mark.parametrize("text", ["", "a,b\n", "image,object,split,label,mask\n", f'{HEADER}\n"a'])
def test_a_file_that_is_no_such_csv_is_an_error(visa: Path, text: str) -> None:
    write(visa, text)
    with pytest.raises(DataError, match=r"1cls\.csv"):
        read_category(visa, "nut9")


words = st.sampled_from(
    [
        "nut9",
        "train",
        "test",
        "normal",
        "anomaly",
        "",
        "..",
        f"nut9/{NORMALS}/2.JPG",
        f"nut9/{MASKS}/0.png",
    ]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.lists(words | st.text(st.characters(codec="utf-8"), max_size=8), max_size=6), max_size=4
    )
)
def test_whatever_stands_in_the_csv_it_is_read_or_a_data_error(
    visa: Path, rows: list[list[str]]
) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([HEADER.split(","), *rows])
    (visa / SPLIT_FILE).write_bytes(text.getvalue().encode())
    message = ""
    read = None
    try:
        read = read_split(visa)
    except DataError as error:
        message = str(error)
    if read is None:
        assert len(message.splitlines()) == 1
        return
    assert [[r.category, r.split, r.label, r.image, r.mask] for r in read] == [
        row for row in rows if row
    ]
    assert all((visa / r.image).resolve().is_relative_to(visa) for r in read)
    assert not any((r.split, r.label) == ("train", "anomaly") for r in read)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_a_data_error(visa: Path, content: bytes) -> None:
    (visa / SPLIT_FILE).write_bytes(HEADER.encode() + b"\n" + content)
    message = "read"
    try:
        read_split(visa)
    except DataError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
