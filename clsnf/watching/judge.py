"""One detector judges one picture at a time. What it can't judge is not ok."""

from __future__ import annotations

import math
import os
import time

import numpy as np
from numpy.typing import NDArray

from clsnf import detector_file
from clsnf.core.errors import ImageError
from clsnf.data.images import Placement, restore_map
from clsnf.detector import Detector
from clsnf.training.calibrate import p_value
from clsnf.watching.pictures import FileChangedError, Picture
from clsnf.watching.result import Judgement, Result, now


class ComeAgainError(Exception):
    """The picture's file may still be written to: look at it again later."""


class Judge:
    """A loaded detector with its version.

    Args:
        model: folder of a saved detector.
        device: where to compute.
        with_maps: whether judgements shall have maps, for overlays.

    Attributes:
        detector: the loaded detector.
        failing: why the model failed on the last picture; empty where it did not.

    Raises:
        ModelError: the folder is no detector, is damaged, or was written by a newer version.
    """

    def __init__(self, model: str | os.PathLike[str], device: str, with_maps: bool) -> None:
        self.detector = Detector.load(model, device)
        self._version = detector_file.read_description(model).version
        self._normals = np.asarray(self.detector.provenance.validation_scores)
        self._with_maps = with_maps
        self.failing = ""

    def warm_up(self) -> None:
        """Judge an empty picture, so that the first real one takes no longer than the others."""
        self.detector.predict([np.zeros((*self.detector.settings.image.size, 3), np.uint8)])

    def judge(self, picture: Picture) -> Judgement:
        """Judge a picture; the result has no id yet.

        Raises:
            ComeAgainError: the picture is damaged, and its file may still be written to.
        """
        began = time.perf_counter()
        self.failing = ""
        try:
            image = picture.read()
        except ImageError as error:
            if picture.may_change or isinstance(error, FileChangedError):
                raise ComeAgainError from error
            return Judgement(self._result(picture, began, reason=str(error)))
        except MemoryError:
            return Judgement(self._result(picture, began, reason="no memory to read the picture"))
        try:
            score, score_map = self._score(image)
        # Whatever a network or its device raises: the line goes on, and the product is not ok.
        except Exception as error:
            self.failing = f"the model failed: {' '.join(str(error).split())[:200] or repr(error)}"
            return Judgement(self._result(picture, began, reason=self.failing), image)
        return Judgement(self._result(picture, began, score), image, score_map)

    def _score(self, image: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32] | None]:
        answer = self.detector.predict([image])
        score = float(answer.scores[0])
        if not math.isfinite(score):  # it is above no threshold, and would pass
            raise ArithmeticError(f"its score is {score}")
        if not self._with_maps:
            return score, None
        placement = Placement.of(image.shape[:2], self.detector.settings.image)
        return score, restore_map(answer.maps[0], placement)

    def _result(
        self, picture: Picture, began: float, score: float | None = None, reason: str | None = None
    ) -> Result:
        threshold = self.detector.threshold.value
        size, mtime_ns = picture.version or (None, None)
        return Result(
            id="",
            at=now(),
            source=picture.source,
            frame=picture.frame,
            verdict="ok" if score is not None and score <= threshold else "ng",
            score=score,
            threshold=threshold,
            p_value=None if score is None else p_value(score, self._normals),
            category=self.detector.provenance.category,
            model_version=self._version,
            milliseconds=round(1000 * (time.perf_counter() - began), 2),
            reason=reason,
            size=size,
            mtime_ns=mtime_ns,
        )
