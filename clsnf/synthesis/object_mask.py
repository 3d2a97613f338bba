"""The object mask: where the product is, if it stands on a plain background, and whether it does.

No list of categories says which products to mask: :func:`decide_mask_mode` decides from the
category's normal images, and says why. It answers "off" as soon as a check fails, because defects
everywhere do little harm, while a mask that cuts off a part of the product blinds the classifier
there. The check that matters most looks at what a mask would leave out: a background is plain, so
edges outside the mask mean that a part of the product lies there. Lengths are shares of the image's
short side. Called by the streams of training defects, and for validation defects.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.core.errors import DataError, nearest

PRODUCT_MODES = ("dark", "bright")
MASK_MODES = ("off", *PRODUCT_MODES)

_BLUR = 1 / 128  # the blur's sigma, as a share of the short side
_KERNEL = 1 / 50  # the opening's and closing's diameter, likewise
_RING = 0.03  # the border's width, likewise
_EMPTY, _FULL = 0.001, 0.95  # an image whose mask's share of it lies outside is used whole

# What an image must show before its mask is trusted.
# Share of the border on the background's side of the threshold; long products may touch the border.
_PURE_RING = 0.85
_AREA = (0.01, 0.8)  # the product's share of the image
_CONTRAST = 12.0  # grey levels between the means of product and background
# Otsu's between-class variance over the total one. A normal distribution gives 0.64, a uniform one
# 0.75.
_SEPARATION = 0.7
_OUTLINE_STEP = 0.3  # the step at a product's outline, in contrasts between product and background
_EDGE_STEP = 0.15  # outside the mask, a step this high (likewise) is an edge
_EDGE_FLOOR = 3.0  # but one below this many grey levels is noise
_EDGES_OUTSIDE = 0.1  # edges outside the mask, in pixels for each pixel of edge along its outline

_AGREEMENT = 0.9  # share of the images that must pass all checks with the same mode
_MOST_IMAGES = 48  # that decide: enough to estimate that share


@dataclass(frozen=True)
class MaskDecision:
    """The mask mode of a category, and why.

    Attributes:
        mode: "off" (defects may lie everywhere), "dark" (a dark product on a bright background) or
            "bright".
        reason: one line for people.
    """

    mode: str
    reason: str


def object_mask(image: NDArray[np.uint8], mask_mode: str) -> NDArray[np.bool_]:
    """Where the product is in one image: uint8 RGB (H, W, 3) -> bool (H, W).

    The steps are: grey, blur, Otsu's threshold, open, close, fill holes.

    Args:
        mask_mode: "dark" or "bright", the product against its background.

    Raises:
        DataError: another mask mode.
    """
    if mask_mode not in PRODUCT_MODES:
        raise DataError(
            f"The mask mode of a product is {mask_mode!r}.{nearest(str(mask_mode), PRODUCT_MODES)}"
        )
    blurred = _blurred_grey(image)
    return _cleaned(_classes(blurred)[0] == (mask_mode == "bright"))


def object_masks(images: Tensor, mask_mode: str) -> Tensor:
    """Where defects may lie in each of N images: uint8 (N, 3, H, W) -> bool (N, H, W).

    Everywhere if ``mask_mode`` is "off". Everywhere also in an image whose mask is implausible:
    next to empty, or above 95 % of the image.
    """
    masks = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)
    if mask_mode == "off":
        return masks
    for index, image in enumerate(_as_arrays(images)):
        mask = object_mask(image, mask_mode)
        if _EMPTY <= mask.mean() <= _FULL:
            masks[index] = torch.from_numpy(mask)
    return masks


def choose_mask_mode(images: Tensor, wanted: str) -> MaskDecision:
    """The mask mode of a category.

    Args:
        images: its normal images, uint8 (N, 3, H, W).
        wanted: the setting ``defects.object_mask``: "auto" decides by :func:`decide_mask_mode`, any
            other mode is taken as it is.
    """
    return decide_mask_mode(images) if wanted == "auto" else MaskDecision(wanted, "set by hand")


def decision_indices(n: int) -> Tensor:
    """Which of N images decide on the mask mode, int64 (K,): at most 48, evenly spread.

    :func:`decide_mask_mode` decides the same from these alone.
    """
    return torch.linspace(0, n - 1, min(n, _MOST_IMAGES)).round().long().unique()


def decide_mask_mode(images: Tensor) -> MaskDecision:
    """Decide from a category's normal images, uint8 (N, 3, H, W), where its defects may lie.

    The mode is "dark" or "bright" if nine of ten images pass all checks with that mode, else "off".
    """
    if not len(images):
        return MaskDecision("off", "there are no normal images to decide from")
    verdicts = [_judge(image) for image in _as_arrays(images[decision_indices(len(images))])]
    of_all = f"of {len(verdicts)} normal images looked at"
    modes = Counter(mode for mode, problem in verdicts if problem is None)
    for mode, agreeing in modes.items():
        if agreeing >= _AGREEMENT * len(verdicts):
            side = "darker" if mode == "dark" else "brighter"
            return MaskDecision(
                mode, f"the product is {side} than a plain background in {agreeing} {of_all}"
            )
    problems = Counter(problem for _, problem in verdicts if problem is not None)
    if not problems:
        return MaskDecision(
            "off",
            f"the product is darker than its background in {modes['dark']} {of_all} and brighter "
            "in the others",
        )
    problem, times = problems.most_common(1)[0]
    return MaskDecision("off", f"{problem} in {times} {of_all}")


def _judge(image: NDArray[np.uint8]) -> tuple[str, str | None]:
    """The mode that one image suggests, and why its mask can't be trusted (None: it can)."""
    grey = _blurred_grey(image)
    above, separation = _classes(grey)
    ring = _ring(grey.shape)
    background_is_bright = bool(above[ring].mean() >= 0.5)
    mode = "dark" if background_is_bright else "bright"
    product = above != background_is_bright
    mask = _cleaned(product)
    contrast = (
        abs(float(grey[product].mean()) - float(grey[~product].mean())) if product.any() else 0.0
    )
    step = _step_heights(grey)
    nearby = _disc(2 * round(4 * _sigma(grey)) + 1)
    outline = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, nearby) > 0
    outside = cv2.dilate(mask.astype(np.uint8), nearby) == 0
    edges = step > max(_EDGE_STEP * contrast, _EDGE_FLOOR)
    checks = (  # ordered so that the problem that says most comes first
        (contrast >= _CONTRAST, "product and background are hardly different"),
        (product[ring].mean() <= 1 - _PURE_RING, "the border is no plain background"),
        (
            _AREA[0] <= mask.mean() <= _AREA[1],
            "the part that differs from the border is too small or too large for a product",
        ),
        (
            _outline_step(step, mask) >= _OUTLINE_STEP * contrast,
            "what differs from the border has no sharp outline, as uneven light has none,",
        ),
        (
            np.sum(edges & outside) <= _EDGES_OUTSIDE * np.sum(edges & outline),
            "a mask by brightness would leave out structure, perhaps of the product,",
        ),
        (separation >= _SEPARATION, "brightness does not fall into two classes"),
    )
    return mode, next((problem for passed, problem in checks if not passed), None)


def _step_heights(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The height in grey levels (H, W) of the edge whose blur would have each pixel's slope.

    An edge of height h that is blurred with sigma has a slope of at most h / (sigma sqrt(2 pi)).
    The edge of a soft shadow comes out low.
    """
    slope = np.hypot(
        cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=1 / 8),
        cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=1 / 8),
    )
    return np.asarray(slope * (_sigma(grey) * math.sqrt(2 * math.pi)), np.float32)


def _outline_step(step: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """The median step along the mask's outline.

    At each pixel the largest step nearby counts, because opening and closing move the outline a
    little.
    """
    near = cv2.dilate(step, _disc(2 * round(2 * _sigma(step)) + 1))
    outline = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, _disc(3)) > 0
    return float(np.median(near[outline])) if outline.any() else 0.0


def _sigma(image: NDArray[Any]) -> float:
    """The blur's sigma in pixels for an image (H, W, ...)."""
    return max(_BLUR * min(image.shape[:2]), 1.0)


def _blurred_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.GaussianBlur(grey, (0, 0), _sigma(grey)), np.uint8)


def _classes(grey: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], float]:
    """Otsu's two classes, True for the brighter one, and his criterion.

    The criterion is the share, in [0, 1], of the variance that lies between the classes.
    """
    _, above = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    bright = above > 0
    share, variance = float(bright.mean()), float(grey.var())
    if share in (0.0, 1.0) or variance == 0:
        return bright, 0.0
    between = share * (1 - share) * (float(grey[bright].mean()) - float(grey[~bright].mean())) ** 2
    return bright, between / variance


def _cleaned(product: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without specks, with gaps closed and holes filled."""
    disc = _disc(max(3, round(_KERNEL * min(product.shape)) | 1))
    mask = cv2.morphologyEx(product.astype(np.uint8), cv2.MORPH_OPEN, disc)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc)
    # Flood from outside the image: what the flood does not reach is product, or a hole in it.
    flooded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(flooded, None, (0, 0), 2)
    return np.asarray(flooded[1:-1, 1:-1] != 2)


def _ring(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """True along the image's border (H, W)."""
    wide = max(1, round(_RING * min(shape)))
    ring = np.ones(shape, np.bool_)
    ring[wide:-wide, wide:-wide] = False
    return ring


def _disc(diameter: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter)), np.uint8)


def _as_arrays(images: Tensor) -> list[NDArray[np.uint8]]:
    """uint8 (N, 3, H, W) -> N arrays (H, W, 3)."""
    return list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
