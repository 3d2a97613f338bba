"""Textures: from folders of any layout, and drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clsnf.core.errors import DataError, ImageError
from clsnf.data.images import write_image
from clsnf.synthesis.textures import STYLES, draw_textures, load_textures


def plain(value: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two subfolders of five images; the grey level is ten times the place in the sorted order."""
    for group in range(2):
        (tmp_path / f"group{group}" / "deep").mkdir(parents=True)
        for index in range(5):
            write_image(
                tmp_path / f"group{group}" / "deep" / f"{index}.PNG",
                plain(10 * (5 * group + index)),
            )
    (tmp_path / "readme.txt").write_text("no texture")
    return tmp_path


def levels(textures: torch.Tensor) -> list[int]:
    return textures.flatten(1).float().mean(1).int().tolist()


def test_all_images_below_a_folder_are_loaded_in_the_order_of_their_paths(folder):
    textures = load_textures(folder, (32, 48), limit=100)
    assert textures.shape == (10, 3, 32, 48)
    assert textures.dtype == torch.uint8
    assert levels(textures) == list(range(0, 100, 10))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, [0]), (2, [0, 90]), (4, [0, 30, 60, 90]), (10, list(range(0, 100, 10)))],
)
def test_at_most_the_limit_is_loaded_from_all_over_the_folder(folder, limit, expected):
    assert levels(load_textures(folder, (32, 32), limit)) == expected


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (64, 16), (200, 96)])
def test_a_texture_covers_the_size_without_being_squeezed(tmp_path, size):
    rows, columns = np.mgrid[:60, :90]
    disc = np.where(np.hypot(rows - 29.5, columns - 44.5) < 12, 255, 0).astype(np.uint8)
    write_image(tmp_path / "disc.png", np.repeat(disc[..., None], 3, axis=2))
    where = load_textures(tmp_path, size, 1)[0, 0].numpy() > 127
    tall, wide = where.any(1).sum(), where.any(0).sum()
    assert min(tall, wide) > 4
    if max(tall, wide) < min(size):  # else it is cut off
        assert abs(int(tall) - int(wide)) <= 2


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_images_is_named(tmp_path, there):
    folder = tmp_path / "textures"
    if there:
        folder.mkdir()
    with pytest.raises(
        DataError,
        match=f"texture folder .*textures {'has no images' if there else 'is no folder'}.*png",
    ):
        load_textures(folder, (32, 32), 10)


def test_a_texture_that_cant_be_read_is_named(folder):
    (folder / "group0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(ImageError, match=r"broken\.png"):
        load_textures(folder, (32, 32), 100)


def test_drawn_textures_depend_on_the_seed_alone_and_not_on_the_count():
    textures = draw_textures(14, (48, 64), seed=7)
    assert textures.shape == (14, 3, 48, 64)
    assert textures.dtype == torch.uint8
    assert torch.equal(textures, draw_textures(14, (48, 64), seed=7))
    assert torch.equal(textures[:3], draw_textures(3, (48, 64), seed=7))
    assert not torch.equal(textures, draw_textures(14, (48, 64), seed=8))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(32, 32), (64, 160)])
def test_every_style_gives_a_finite_field_with_structure(style, size):
    for seed in range(3):
        field = STYLES[style](np.random.default_rng(seed), size)
        assert field.shape == size
        assert np.isfinite(field).all()
        assert field.std() > 0.05


def test_drawn_textures_differ_from_each_other_and_show_something():
    textures = draw_textures(3 * len(STYLES), (48, 48), seed=1).float()
    assert textures.flatten(2).std(2).amax(1).min() > 8
    flat = textures.flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(torch.inf).min() > 20 * flat.shape[1] ** 0.5 / 10
