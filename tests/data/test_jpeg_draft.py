"""JPEGs that are decoded at a part of their size: when, and by how much the input changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from clsnf.core.config import DetectorSettings, ImageSettings, key_content
from clsnf.data.image_statistics import statistics_of_normals
from clsnf.data.images import decode_placed, load_images, read_placed
from clsnf.serving.body_forms import Item
from clsnf.serving.preprocess import decode_item, place_item
from clsnf.streams.stream import load_timed
from tests.data.test_images import encode

FULL, DRAFT = ImageSettings(64, 64), ImageSettings(64, 64, jpeg_draft=True)


def drawn(height: int, width: int) -> np.ndarray:
    """A picture with edges and texture, RGB uint8."""
    rng = np.random.default_rng(3)
    picture = cv2.resize(
        rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    picture[height // 4 : height // 2, width // 3 : width // 2] = (200, 30, 60)
    noise = rng.normal(0, 4, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def decoded_sizes(data: bytes, chosen: ImageSettings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(height, width) that came out of the decoder."""
    sizes = []
    load = Image.Image.tobytes

    def watch(image: Image.Image, *args: Any) -> bytes:
        sizes.append((image.height, image.width))
        return load(image, *args)

    monkeypatch.setattr(Image.Image, "tobytes", watch)
    decode_placed(data, "p.jpg", chosen)
    monkeypatch.undo()
    return sizes[-1]


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((1024, 1024), (128, 128)),
        ((1024, 512), (256, 128)),  # not below twice the canvas in either direction
        ((256, 1024), (128, 512)),
        ((248, 1024), (248, 1024)),
        ((1028, 1024), (257, 256)),  # a scale that divides both sides
        ((1022, 1022), (511, 511)),
        ((1021, 1024), (1021, 1024)),
        ((64, 64), (64, 64)),
    ],
)
def test_a_jpeg_keeps_twice_the_size_that_it_has_on_the_canvas(
    size: tuple[int, int], decoded: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(drawn(*size), "JPEG")
    assert decoded_sizes(data, DRAFT, monkeypatch) == decoded
    assert decoded_sizes(data, FULL, monkeypatch) == size
    assert decode_placed(data, "p.jpg", DRAFT)[1] == decode_placed(data, "p.jpg", FULL)[1]


def test_a_turned_photograph_and_a_padded_one_lie_where_they_did() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(drawn(1024, 512), "JPEG", exif=exif, quality=95)
    for aspect in ("squeeze", "fit"):
        full, placement = decode_placed(data, "p", ImageSettings(64, 64, aspect))
        draft, same = decode_placed(data, "p", ImageSettings(64, 64, aspect, jpeg_draft=True))
        assert placement == same
        assert placement.source == (512, 1024)
        assert (full.int() - draft.int()).abs().max() <= 16


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("quality", [75, 90, 98])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_the_input_changes_by_a_few_levels(quality: int, subsampling: int, scale: int) -> None:
    data = encode(drawn(128 * scale, 128 * scale), "JPEG", quality=quality, subsampling=subsampling)
    full, draft = (decode_placed(data, "p", chosen)[0].int() for chosen in (FULL, DRAFT))
    difference = (full - draft).abs().float()
    assert not torch.equal(full, draft)
    assert difference.max() <= 16
    assert difference.mean() <= 4  # the texture is as fine as a pixel of the canvas: the worst case


def test_other_formats_and_half_a_file_are_treated_as_ever() -> None:
    picture = drawn(512, 512)
    for image_format in ("PNG", "BMP", "TIFF"):
        data = encode(picture, image_format)
        full, draft = (decode_placed(data, "p", chosen)[0] for chosen in (FULL, DRAFT))
        assert torch.equal(full, draft)
    data = encode(picture, "JPEG")
    with pytest.raises(Exception, match="cut short"):
        decode_placed(data[:-100], "p", DRAFT)


def test_training_streams_statistics_and_serving_read_the_same_input(tmp_path: Path) -> None:
    path = tmp_path / "p.jpg"
    path.write_bytes(encode(drawn(512, 512), "JPEG"))
    inputs = {}
    for chosen in (FULL, DRAFT):
        expected = read_placed(path, chosen)[0]
        data = memoryview(path.read_bytes())
        item = Item("p", 0, len(data))
        served, _, statistics = place_item(data, item, chosen, 10)
        assert torch.equal(load_images([path], chosen).images[0], expected)
        assert torch.equal(load_timed(path, chosen)[0], expected)
        assert torch.equal(served, expected)
        assert decode_item(data, item).shape == (512, 512, 3)
        mean = statistics_of_normals([path], chosen)["brightness"][0]
        assert mean == pytest.approx(float(statistics[0]))
        inputs[chosen.jpeg_draft] = expected
    assert not torch.equal(inputs[True], inputs[False])


def test_the_setting_is_part_of_the_keys_only_where_it_is_on() -> None:
    # These are the contents of keys before the setting was there.
    full, draft = (replace(image, interpolation="bilinear") for image in (FULL, DRAFT))
    assert key_content(full) == {"height": 64, "width": 64, "aspect": "squeeze"}
    assert key_content(DetectorSettings())["image"] == key_content(ImageSettings())
    assert key_content(draft) == key_content(full) | {"jpeg_draft": True}
