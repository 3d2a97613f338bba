"""Reading, writing and placing images; the files are made here, in every format that is read."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clsnf.core.config import ImageSettings
from clsnf.core.errors import ImageError, OutputError
from clsnf.data.file_integrity import sniff
from clsnf.data.images import (
    IMAGE_SUFFIXES,
    Placement,
    decode_image,
    image_size,
    load_images,
    place,
    place_mask,
    read_image,
    read_mask,
    restore_map,
    write_image,
    write_mask,
)

HEIGHT, WIDTH = 21, 36  # no padding at the end of a BMP's rows, which a file may lack
RGB = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8),
    (WIDTH, HEIGHT),
    interpolation=cv2.INTER_CUBIC,
)
GREY = RGB[..., 0]
GREY_AS_RGB = np.repeat(GREY[..., None], 3, axis=2)
BINARY = GREY > 128


def encode(picture: Image.Image | np.ndarray, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(
        file, image_format, **options
    )
    return file.getvalue()


def encode16(suffix: str, array: np.ndarray) -> bytes:
    """16-bit files, by OpenCV: Pillow writes none in colour."""
    return cv2.imencode(suffix, array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


def with_alpha(array: np.ndarray, alpha: int) -> np.ndarray:
    return np.dstack([array, np.broadcast_to(np.uint8(alpha), array.shape[:2])])


EXACT = {
    "rgb.png": (encode(RGB, "PNG"), RGB),
    "grey.png": (encode(GREY, "PNG"), GREY_AS_RGB),
    "alpha.png": (encode(with_alpha(RGB, 7), "PNG"), RGB),
    "grey_alpha.png": (encode(Image.fromarray(with_alpha(GREY, 7), "LA"), "PNG"), GREY_AS_RGB),
    "one_bit.png": (encode(BINARY, "PNG"), np.repeat(BINARY[..., None], 3, axis=2) * np.uint8(255)),
    "rgb16.png": (encode16(".png", RGB.astype(np.uint16) * 257), RGB),
    "grey16.png": (encode16(".png", GREY.astype(np.uint16) * 257), GREY_AS_RGB),
    "rgb.bmp": (encode(RGB, "BMP"), RGB),
    "grey.bmp": (encode(GREY, "BMP"), GREY_AS_RGB),
    "rgb.tif": (encode(RGB, "TIFF"), RGB),
    "lzw.tif": (encode(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "deflate.tif": (encode(GREY, "TIFF", compression="tiff_adobe_deflate"), GREY_AS_RGB),
    "big.tif": (encode(RGB, "TIFF", big_tiff=True), RGB),
    "fax.tif": (
        encode(BINARY, "TIFF", compression="group4"),
        np.repeat(BINARY[..., None], 3, axis=2) * np.uint8(255),
    ),
    "rgb16.tif": (encode16(".tif", RGB.astype(np.uint16) * 257), RGB),
    "grey16.tif": (encode16(".tif", GREY.astype(np.uint16) * 257), GREY_AS_RGB),
    "grey16_big_endian.tif": (
        encode(Image.fromarray(GREY.astype(">u2") * 257), "TIFF"),
        GREY_AS_RGB,
    ),
    "lossless.webp": (encode(RGB, "WEBP", lossless=True), RGB),
    "rgb.ppm": (encode(RGB, "PPM"), RGB),
    "grey.pgm": (encode(GREY, "PPM"), GREY_AS_RGB),
    "one_bit.pbm": (encode(BINARY, "PPM"), np.repeat(BINARY[..., None], 3, axis=2) * np.uint8(255)),
    "rgb16.ppm": (
        b"P6\n# a camera's note\n%d %d\n65535\n" % (WIDTH, HEIGHT)
        + (RGB.astype(">u2") * 257).tobytes(),
        RGB,
    ),
    "grey12.pgm": (
        b"P5 %d %d 4095 " % (WIDTH, HEIGHT) + (GREY.astype(np.uint16) * 16).astype(">u2").tobytes(),
        GREY_AS_RGB,
    ),
}
LOSSY = {
    "rgb.jpg": (encode(RGB, "JPEG", quality=95, subsampling=0), RGB),
    "grey.jpg": (encode(GREY, "JPEG", quality=95), GREY_AS_RGB),
    "progressive.jpg": (encode(RGB, "JPEG", quality=95, subsampling=0, progressive=True), RGB),
    "cmyk.jpg": (encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), RGB),
    "palette.png": (
        encode(Image.fromarray(GREY_AS_RGB).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        GREY_AS_RGB,
    ),
    "jpeg.tif": (encode(RGB, "TIFF", compression="jpeg", quality=95), RGB),
    "lossy.webp": (encode(RGB, "WEBP", quality=95), RGB),
}
FILES = EXACT | LOSSY


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_rgb_of_8_bit(name: str) -> None:
    data, expected = FILES[name]
    decoded = decode_image(data, name)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    difference = np.abs(decoded.astype(int) - expected)
    assert difference.max() == 0 if name in EXACT else difference.mean() < 6


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_and_nothing_is_printed(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = FILES[name][0]
    for length in range(len(data)):
        with pytest.raises(ImageError, match=rf"^{name} ") as caught:
            decode_image(data[:length], name)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["rgb.png", "rgb.jpg", "progressive.jpg", "lzw.tif", "deflate.tif"]
)
def test_a_file_whose_second_half_is_zeros_is_refused(name: str) -> None:
    data = FILES[name][0]
    half = len(data) // 2
    with pytest.raises(ImageError, match=rf"^{name} "):
        decode_image(data[:half] + bytes(len(data) - half), name)


def image_or_one_line(data: bytes, name: str) -> None:
    """What any bytes must give."""
    try:
        message = ""
        assert decode_image(data, name).dtype == np.uint8
    except ImageError as error:
        message = str(error)
    assert "\n" not in message


@settings(deadline=None)
@given(
    st.sampled_from([name for name in FILES if not name.endswith("tif")]),
    st.integers(0, 10**6),
    st.integers(0, 255),
)
def test_a_damaged_byte_gives_an_image_or_an_image_error(name: str, place: int, value: int) -> None:
    data = bytearray(FILES[name][0])
    data[place % len(data)] = value
    image_or_one_line(bytes(data), name)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@settings(deadline=None)
@given(
    st.sampled_from(["rgb.tif", "big.tif", "lzw.tif"]), st.integers(-300, 299), st.integers(0, 255)
)
def test_a_damaged_byte_in_a_tiffs_directory_gives_an_image_or_an_image_error(
    name: str, place: int, value: int
) -> None:
    data = bytearray(FILES[name][0])
    data[place] = value  # the directory lies at the start or at the end
    image_or_one_line(bytes(data), name)


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.bmp"
    path.write_bytes(FILES["rgb.png"][0])
    assert np.array_equal(read_image(path), RGB)
    assert image_size(path) == (HEIGHT, WIDTH)


def test_the_orientation_tag_of_a_photograph_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = tmp_path / "phone.jpg"
    path.write_bytes(encode(RGB, "JPEG", quality=95, subsampling=0, exif=exif))
    assert image_size(path) == (WIDTH, HEIGHT)
    assert np.abs(read_image(path).astype(int) - np.rot90(RGB, -1)).mean() < 6


def test_files_that_are_no_images_are_refused_with_the_formats_that_are_read(
    tmp_path: Path,
) -> None:
    for content in (b"", b"a note\n", b"GIF"):
        path = tmp_path / "note.png"
        path.write_bytes(content)
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match=r"note.png .*png, jpg, .* and pnm are read"):
                read(path)
    with pytest.raises(ImageError, match=r"missing.png can't be read .*check the path"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"missing.png does not exist"):
        image_size(tmp_path / "missing.png")


@pytest.mark.parametrize(
    "array",
    [GREY.astype(np.float32), GREY.astype(np.int32), RGB.astype(np.float32)],
    ids=["float", "int32", "rgb"],
)
def test_values_without_a_known_range_are_refused(array: np.ndarray) -> None:
    data = encode16(".tif", array)
    with pytest.raises(
        ImageError,
        match=r"range from black to white is unknown|floating point.*save the image as a PNG",
    ):
        decode_image(data, "f.tif")


def test_a_file_of_several_pictures_is_refused() -> None:
    pages = Image.fromarray(RGB)
    with pytest.raises(ImageError, match="holds 2 pictures: save each as a file"):
        decode_image(encode(pages, "TIFF", save_all=True, append_images=[pages]), "stack.tif")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(9_500, 11_000), (60_000, 60_000)])
def test_absurd_sizes_are_refused_by_the_header(width: int, height: int, tmp_path: Path) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = bytearray(FILES["rgb.png"][0])
    data[12:29] = chunk
    data[29:33] = struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bomb.png announces .* more than the 100 megapixels"):
        read_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=r"bomb.png announces"):
        image_size(tmp_path / "bomb.png")


def test_any_pixel_of_a_mask_that_is_not_zero_is_defect(tmp_path: Path) -> None:
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[3:5, 7:20] = True
    blue = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    blue[expected, 2] = 1
    palette = Image.fromarray(expected.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    kinds = {
        "grey.png": encode(expected.astype(np.uint8), "PNG"),
        "bits.png": encode(expected, "PNG"),
        "labels16.png": encode16(".png", expected.astype(np.uint16)),
        "labels16.pgm": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + expected.astype(">u2").tobytes(),
        "bits.pbm": encode(expected, "PPM"),
        "blue.ppm": encode(blue, "PPM"),
        "blue.bmp": encode(blue, "BMP"),
        "opaque.png": encode(with_alpha(blue, 255), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "float.tif": encode16(".tif", expected.astype(np.float32) / 10),
        "painted_on_transparent_white.png": encode(
            np.dstack([np.full_like(blue, 255), expected * np.uint8(255)]), "PNG"
        ),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
        mask = read_mask(tmp_path / name)
        assert mask.dtype == bool
        assert np.array_equal(mask, expected), name


def test_written_images_and_masks_read_back_and_leave_nothing_beside(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", RGB[:, ::-1])  # a view, not contiguous
    write_mask(tmp_path / "m.png", BINARY)
    assert np.array_equal(read_image(tmp_path / "a.png"), RGB[:, ::-1])
    assert np.array_equal(read_mask(tmp_path / "m.png"), BINARY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "m.png"]
    with pytest.raises(OutputError, match="can't be written"):
        write_image(tmp_path / "no such folder" / "a.png", RGB)


# ---- placement ----

shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))
sizes = st.sampled_from([32, 64, 96])
image_settings = st.builds(ImageSettings, sizes, sizes, st.sampled_from(["squeeze", "fit"]))


@settings(deadline=None)
@given(shapes, image_settings)
def test_the_content_lies_centred_within_the_canvas_and_touches_two_sides(
    source: tuple[int, int], chosen: ImageSettings
) -> None:
    placement = Placement.of(source, chosen)
    canvas_h, canvas_w = chosen.size
    assert placement.height == canvas_h or placement.width == canvas_w
    assert 1 <= placement.height <= canvas_h
    assert 1 <= placement.width <= canvas_w
    assert 0 <= canvas_h - placement.height - 2 * placement.top <= 1
    assert 0 <= canvas_w - placement.width - 2 * placement.left <= 1
    assert placement.padded == (not placement.valid.all())
    assert int(placement.valid.sum()) == placement.height * placement.width
    if chosen.aspect == "squeeze":
        assert not placement.padded


@settings(deadline=None)
@given(shapes, image_settings, st.integers(0, 255))
def test_a_plain_image_stays_plain_and_its_map_comes_back_at_its_size(
    source: tuple[int, int], chosen: ImageSettings, value: int
) -> None:
    canvas, placement = place(np.full((*source, 3), value, np.uint8), chosen)
    assert canvas.shape == (3, *chosen.size)
    assert canvas.dtype == torch.uint8
    assert canvas.is_contiguous()
    assert (canvas == value).all()
    restored = restore_map(placement.valid.float(), placement)
    assert restored.shape == source
    assert restored.dtype == np.float32
    assert np.allclose(restored, 1, atol=1e-5)
    assert torch.equal(place_mask(np.ones(source, bool), placement), placement.valid)


def test_an_image_of_the_canvas_size_is_not_changed() -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    for aspect in ("squeeze", "fit"):
        canvas, _ = place(image, ImageSettings(64, 32, aspect))
        assert np.array_equal(canvas.permute(1, 2, 0).numpy(), image)


def test_shrinking_averages_and_does_not_alias() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 254
    canvas, _ = place(stripes, ImageSettings(32, 32))
    assert (canvas.int() - 127).abs().max() <= 12


def test_padding_repeats_the_border_of_the_content() -> None:
    image = np.zeros((64, 32, 3), np.uint8)
    image[:, :16] = 200
    canvas, placement = place(image, ImageSettings(64, 64, "fit"))
    assert (placement.left, placement.width) == (16, 32)
    assert (canvas[:, :, :16] == 200).all()
    assert (canvas[:, :, 48:] == 0).all()


def test_a_mask_lands_where_its_image_does_and_comes_back() -> None:
    mask = np.zeros((200, 100), bool)
    mask[120:160, 20:60] = True
    _, placement = place(
        np.repeat(mask[..., None], 3, axis=2) * np.uint8(255), ImageSettings(96, 128, "fit")
    )
    restored = restore_map(place_mask(mask, placement).float(), placement) > 0.5
    assert (restored & mask).sum() / (restored | mask).sum() > 0.9
    with pytest.raises(ImageError, match="100x100 pixels"):
        place_mask(mask[:100], placement)


def test_images_load_in_order_with_their_valid_pixels(tmp_path: Path) -> None:
    paths = []
    for value in range(12):
        paths.append(tmp_path / f"{value}.png")
        write_image(paths[-1], np.full((40, 20 + value, 3), value, np.uint8))
    loaded = load_images(paths, ImageSettings(64, 64, "fit"), threads=3)
    assert loaded.images[:, 0, 32, 32].tolist() == list(range(12))
    assert loaded.valid is not None
    assert torch.equal(loaded.valid[3], loaded.placements[3].valid)
    assert load_images(paths, ImageSettings(64, 64), threads=1).valid is None
    assert load_images([], ImageSettings(64, 64)).images.shape == (0, 3, 64, 64)

    paths[5].write_bytes(paths[5].read_bytes()[:-20])
    with pytest.raises(ImageError, match=r"5\.png is cut short"):
        load_images(paths, ImageSettings(64, 64))


def test_every_suffix_has_a_format_that_is_read() -> None:
    read = {sniff(data) for data, _ in FILES.values()}
    assert {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES} == read
