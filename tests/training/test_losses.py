"""Losses: a contract that every one of the registry keeps, and each one's numbers by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsnf.core.config import FinetuneSettings
from clsnf.synthesis.training_defects import DefectBatch
from clsnf.training.losses import LOSSES, soft_targets

SIZE = (4, 5)
# the logit of sigmoid(5 d) for a full change, d = 1: what every loss wants of a white defect on
# black
SURE = 5.0
every_loss = pytest.mark.parametrize("name", LOSSES)


def bold(images: int = 2) -> DefectBatch:
    """White defects on black: changed as much as can be, so that all losses agree on the answer.
    The last image has none.
    """
    regions = torch.zeros(images, *SIZE, dtype=torch.bool)
    regions[:-1, 1:3, 1:4] = True
    clean = torch.zeros(images, 3, *SIZE)
    return DefectBatch(torch.where(regions[:, None], 1.0, clean), regions, clean)


def value(
    name: str, logits: Tensor, batch: DefectBatch, inside: Tensor | None = None, **changes: Any
) -> Tensor:
    return LOSSES[name](logits, batch, inside, FinetuneSettings(loss=name, **changes))


def right(batch: DefectBatch) -> Tensor:
    return torch.where(batch.regions, SURE, -SURE)


def some_logits(seed: int, scale: float = 1.0, images: int = 2) -> Tensor:
    return scale * torch.randn(images, *SIZE, generator=torch.Generator().manual_seed(seed))


# ---- the contract ----


def test_every_loss_can_be_chosen_and_every_choice_is_there() -> None:
    field = next(f for f in FinetuneSettings.__dataclass_fields__.values() if f.name == "loss")
    assert tuple(LOSSES) == field.metadata["choices"]


@every_loss
def test_a_loss_says_what_it_is(name: str) -> None:
    assert LOSSES[name].__doc__


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("defects", ["none", "some", "all"])
def test_a_loss_is_one_finite_number_with_finite_gradients(
    name: str, scale: float, defects: str
) -> None:
    batch = bold()
    batch.regions[:] = {
        "none": torch.tensor(False),
        "some": batch.regions,
        "all": torch.tensor(True),
    }[defects]
    logits = some_logits(0, scale).requires_grad_()
    loss = value(name, logits, batch)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert 0 <= loss.item() < math.inf
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@every_loss
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 5), share=st.floats(0, 1))
@settings(deadline=None)
def test_no_answer_beats_the_right_one(name: str, seed: int, scale: float, share: float) -> None:
    """Of all answers as sure as it, or less; some differ from it in a few pixels, some in all."""
    batch = bold()
    changed = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(seed)) < share
    other = torch.where(changed, some_logits(seed, scale).clamp(-SURE, SURE), right(batch))
    assert value(name, right(batch), batch) <= value(name, other, batch) + 1e-6


@every_loss
def test_the_right_answer_costs_next_to_nothing_beside_the_wrong_one(name: str) -> None:
    batch = bold()
    assert value(name, right(batch), batch) < 0.1 * value(name, -right(batch), batch)


@every_loss
@pytest.mark.parametrize("start", [-3.0, 0.0, 3.0])
def test_gradients_raise_defects_and_lower_normal_pixels(name: str, start: float) -> None:
    batch = bold()
    logits = torch.full((2, *SIZE), start, requires_grad=True)
    value(name, logits, batch).backward()
    assert logits.grad is not None
    assert (logits.grad[batch.regions] < 0).all()
    assert (logits.grad[~batch.regions] > 0).all()


@every_loss
def test_padding_moves_neither_a_loss_nor_its_gradient(name: str) -> None:
    batch = bold()
    inside = torch.zeros(2, *SIZE, dtype=torch.bool)
    inside[:, 1:, 1:] = True
    logits = some_logits(1).requires_grad_()
    padded = value(name, logits, batch, inside)
    padded.backward()
    assert logits.grad is not None
    assert (logits.grad[~inside] == 0).all()
    assert (logits.grad[inside] != 0).all()
    cut = DefectBatch(batch.images[..., 1:, 1:], batch.regions[:, 1:, 1:], batch.clean[..., 1:, 1:])
    torch.testing.assert_close(padded, value(name, logits[:, 1:, 1:], cut))
    torch.testing.assert_close(
        value(name, logits, batch, torch.ones_like(inside)), value(name, logits, batch)
    )


@every_loss
def test_a_batch_that_is_padding_alone_gives_a_number(name: str) -> None:
    assert value(name, some_logits(2), bold(), torch.zeros(2, *SIZE, dtype=torch.bool)).isfinite()


@every_loss
def test_the_order_of_images_makes_no_difference(name: str) -> None:
    batch, logits = bold(3), some_logits(3, images=3)
    turned = DefectBatch(batch.images.flip(0), batch.regions.flip(0), batch.clean.flip(0))
    torch.testing.assert_close(value(name, logits, batch), value(name, logits.flip(0), turned))


# ---- soft ----


def two_defects() -> DefectBatch:
    """A region of two pixels, one darker and one brighter, and an image without a region."""
    clean = torch.full((2, 3, 2, 2), 0.5)
    images = clean.clone()
    images[0, :, 0, 0] = torch.tensor([0.2, 0.5, 0.2])  # d = -0.2
    images[0, :, 0, 1] = torch.tensor([0.6, 0.7, 0.8])  # d = +0.2
    images[0, :, 1, 0] = 0.8  # outside the region: counts for nothing
    regions = torch.zeros(2, 2, 2, dtype=torch.bool)
    regions[0, 0] = True
    return DefectBatch(images, regions, clean)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "level"), [("absolute", sigmoid(1.0)), ("signed", (sigmoid(-1.0) + sigmoid(1.0)) / 2)]
)
def test_a_region_s_target_is_the_mean_over_its_pixels(kind: str, level: float) -> None:
    targets = soft_targets(two_defects(), kind)
    expected = torch.zeros(2, 2, 2)
    expected[0, 0] = level
    torch.testing.assert_close(targets, expected)


def test_a_dark_defect_counts_as_much_as_a_bright_one_unless_the_difference_is_signed() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    images = torch.stack([clean[0] - 0.3, clean[1] + 0.3])
    batch = DefectBatch(images, torch.ones(2, 4, 4, dtype=torch.bool), clean)
    dark, bright = soft_targets(batch, "absolute").amax(dim=(1, 2))
    assert dark == pytest.approx(float(bright))
    assert dark > 0.5
    dark, bright = soft_targets(batch, "signed").amax(dim=(1, 2))
    assert dark < 0.5 < bright


def test_soft_is_the_cross_entropy_against_the_targets() -> None:
    batch, logits = (
        two_defects(),
        torch.tensor([[[1.0, -2.0], [0.5, 0.0]], [[0.0, 1.0], [2.0, -1.0]]]),
    )
    for kind in ("absolute", "signed"):
        targets, maps = soft_targets(batch, kind), torch.sigmoid(logits)
        expected = -(targets * maps.log() + (1 - targets) * (1 - maps).log()).mean()
        torch.testing.assert_close(value("soft", logits, batch, target=kind), expected)


# ---- the others, by hand ----


def test_hard_is_the_weighted_cross_entropy_of_two_classes() -> None:
    batch, logits = bold(), some_logits(4)
    two = torch.stack([torch.zeros_like(logits), logits], dim=1)  # (B, 2, H, W): normal, defect
    expected = F.cross_entropy(two, batch.regions.long(), weight=torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(value("hard", logits, batch), expected)


def test_regression_is_the_distance_from_how_much_a_pixel_was_changed() -> None:
    batch = (
        two_defects()
    )  # in the region changes of 0.2 and 0.2; a change outside it counts for nothing
    change = torch.zeros(2, 2, 2)
    change[0, 0] = 0.2
    torch.testing.assert_close(
        value("regression", torch.zeros(2, 2, 2), batch), (0.5 - change).mean()
    )
    perfect = torch.logit(change, eps=1e-6)
    assert value("regression", perfect, batch) == pytest.approx(0, abs=1e-5)


def test_regression_takes_colours_that_change_against_each_other_for_a_change() -> None:
    clean = torch.full((1, 3, 1, 1), 0.5)
    images = clean + torch.tensor([0.3, -0.3, 0.0]).view(1, 3, 1, 1)
    batch = DefectBatch(images, torch.ones(1, 1, 1, dtype=torch.bool), clean)
    assert value("regression", torch.full((1, 1, 1), -50.0), batch) == pytest.approx(0.2)


def test_focal_of_one_pixel_each() -> None:
    clean = torch.zeros(1, 3, 1, 2)
    batch = DefectBatch(clean, torch.tensor([[[True, False]]]), clean)
    logits = torch.logit(torch.tensor([[[0.9, 0.2]]]))
    expected = (0.25 * 0.1**2 * -math.log(0.9) + 0.75 * 0.2**2 * -math.log(0.8)) / 2
    assert value("focal", logits, batch) == pytest.approx(expected, rel=1e-4)


def test_focal_cares_less_than_cross_entropy_about_what_is_right_already() -> None:
    batch = bold()
    doubt, sure = (torch.where(batch.regions, level, -level) for level in (0.5, 3.0))

    def gain(name: str) -> float:
        return float(value(name, sure, batch) / value(name, doubt, batch))

    assert gain("focal") < gain("hard") / 5


def test_dice_of_one_image() -> None:
    clean = torch.zeros(1, 3, 1, 3)
    batch = DefectBatch(clean, torch.tensor([[[True, True, False]]]), clean)
    maps = torch.tensor([[[0.9, 0.5, 0.2]]])
    overlap = (2 * 1.4 + 1) / (0.81 + 0.25 + 0.04 + 2 + 1)
    entropy = -(math.log(0.9) + math.log(0.5) + math.log(0.8)) / 3
    assert value("dice", torch.logit(maps), batch) == pytest.approx(1 - overlap + entropy, rel=1e-4)
