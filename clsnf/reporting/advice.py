"""What to do next with a category: checks with fixed rules, and the decision that follows.

``CHECKS`` is the registry. A check looks at one thing, says what it saw, and names a decision where
it fails. The gravest decision of all failed checks is the category's. A check that can't be made
(without test images, or without evidence) is not counted against the category, and says so. The
rules are written down in ``docs/reports.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import beta

from clsnf.metrics import METRICS, image_auroc
from clsnf.reporting.formats import gain, is_finite, metric, metric_name, percent
from clsnf.reporting.study_files import Product, Record, StudyFiles
from clsnf.results import ImageEvidence, ThresholdReport

# Key -> title, the gravest first.
DECISIONS = {
    "failed": "No winner",
    "unfinished": "No winner yet",
    "weak": "Not good enough yet",
    "images": "Check these images",
    "normals": "Needs more normals",
    "untested": "Test it on defects first",
    "ready": "Ready to deploy",
}
GOOD_AUROC = 0.9  # lower end of image AUROC's interval
GOOD_RECALL = 0.8  # share of the test defects above the threshold
MANY_NORMALS = 100  # a detector fitted on fewer needs more normals first
LOST_BY_SEARCH = 0.03  # pixel AP that an oracle gains over the chosen trial
FAR_OUT = 6.0  # a held-out normal's score, in robust standard deviations above the median
_FEWEST_NORMALS = 5  # no image is suspected on the scores of fewer held-out normals


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: what should hold.
        holds: None where the check could not be made.
        says: what was seen.
        decision: what follows where it does not hold, a key of :data:`DECISIONS`.
        do: what to do then.
    """

    name: str
    holds: bool | None
    says: str
    decision: str = "ready"
    do: str = ""


@dataclass(frozen=True)
class Suspect:
    """An image to look at, and why."""

    path: str
    why: str


@dataclass(frozen=True)
class Advice:
    """The decision about a category.

    Attributes:
        decision: a key of :data:`DECISIONS`.
        checks: all checks.
        suspects: images to look at.
    """

    decision: str
    checks: list[Check]
    suspects: list[Suspect]

    @property
    def title(self) -> str:
        return DECISIONS[self.decision]

    @property
    def next_steps(self) -> list[str]:
        """What to do, the gravest first."""
        failed = [check for check in self.checks if check.holds is False]
        return [c.do for c in sorted(failed, key=lambda c: list(DECISIONS).index(c.decision))]


def advise(study: StudyFiles, product: Product) -> Advice:
    """Make all checks and decide."""
    checks = [check(study, product) for check in CHECKS.values()]
    if product.winner is None:
        checks[1:] = [
            replace(check, holds=None, says="There is no winner.") for check in checks[1:]
        ]
    failed = [check.decision for check in checks if check.holds is False]
    decision = min(failed, key=list(DECISIONS).index, default="ready")
    return Advice(decision, checks, suspects_of(product))


# ---- the checks ----


def _check_winner(study: StudyFiles, product: Product) -> Check:
    name = "It has a winner with finite metrics"
    winner, error = product.winner, product.result.error if product.result else None
    if winner is None:
        finished = f"{len(product.finished_trials)} of {len(product.trials)} begun trials finished."
        if not study.finished and not error:
            do = "Wait for the study, or continue it: clsnf study --resume with its folder."
            return Check(name, False, finished, "unfinished", do)
        do = "Remove the cause and continue with --resume."
        return Check(name, False, error or finished, "failed", do)
    values = {**product.metrics, "threshold": winner.threshold.value}
    strange = [metric_name(key) for key, value in values.items() if not is_finite(value)]
    if strange:
        says = f"Not finite: {', '.join(strange)}."
        do = "Don't use this winner: train again with lower learning rates."
        return Check(name, False, says, "failed", do)
    return Check(
        name, True, f"Trial {winner.trial}, of {len(product.finished_trials)} that finished."
    )


def _check_detection(study: StudyFiles, product: Product) -> Check:
    name = "It finds the test defects"
    test, auroc = product.test, product.metrics.get("image_auroc")
    if test is None or not is_finite(auroc) or not is_finite(test.recall):
        return Check(name, None, "There are no labelled test images, normal and defective.")
    low = product.intervals.get("image_auroc", (auroc, auroc))[0]
    defects = sum(test.counts.values()) - test.counts.get("good", 0)
    least = _least_share(round(test.recall * defects), defects)
    says = (
        f"Image AUROC {metric(auroc)}, interval from {metric(low)}; {percent(test.recall)} of "
        f"{defects} defects are rejected (with 95 % confidence {percent(least)} or more)."
    )
    if low >= GOOD_AUROC and test.recall >= GOOD_RECALL:
        return Check(name, True, says)
    fitted = product.provenance.fit_images if product.provenance else 0
    if fitted < MANY_NORMALS:
        do = f"Bring more normals first: it was fitted on {fitted}, fewer than {MANY_NORMALS}."
        return Check(name, False, says, "normals" if low >= GOOD_AUROC else "weak", do)
    lost = _lost_by_search(product)
    if is_finite(lost) and lost > LOST_BY_SEARCH:
        do = (
            f"Continue the search (--resume with more --trials): an oracle gains {metric(lost)} "
            "pixel AP."
        )
        return Check(name, False, says, "weak", do)
    do = (
        "Look at the misses below: larger images or another backbone may show what is too small "
        "or faint."
    )
    return Check(name, False, says, "weak", do)


def _least_share(count: int, total: int) -> float:
    """The lower end of the 95 % interval of a share (Clopper and Pearson)."""
    return float(beta.ppf(0.025, count, total - count + 1)) if count else 0.0


def _lost_by_search(product: Product) -> float | None:
    """Pixel AP that an oracle gains over the chosen trial; None where it is not known."""
    if product.winner is None or product.winner.regret is None:
        return None
    loss = product.winner.regret.trial.get("pixel_ap")
    return None if loss is None else loss.regret


def _check_baseline(study: StudyFiles, product: Product) -> Check:
    name = "It is not behind the baseline"
    gains = {
        metric_name(key): found
        for key in dict.fromkeys((gain_metric(study, product), "image_auroc"))
        if (found := gain_of(product, key)) is not None
    }
    if not gains:
        return Check(name, None, "The baseline was not evaluated.")
    says = " ".join(
        f"{title} {gain(found.value)} ({gain(found.low)} to {gain(found.high)}): {found.verdict}."
        for title, found in gains.items()
    )
    if any(found.high < 0 for found in gains.values()):
        return Check(name, False, says, "weak", _MISLED + _reach_baseline(study))
    return Check(name, True, says)


_MISLED = (
    "The validation defects chose a winner that does worse than plain flows on real defects. See "
    "the regret, and what other selection rules pick."
)


def _reach_baseline(study: StudyFiles) -> str:
    """Advice to search where plain flows are; nothing where the study did."""
    missing = [
        names[0]
        for names in (("finetune_epochs", "finetune.joint_epochs"), ("fusion_weight",))
        if not any(_has_zero(study.space.get(name, {})) for name in names)
    ]
    if not missing:
        return ""
    return f" Search a space with the baseline in reach ({' and '.join(missing)} 0)."


def _has_zero(given: Record) -> bool:
    """Whether a setting's range in a space has the value 0."""
    return 0 in given.get("values", []) or given.get("low") == 0


def _check_threshold(study: StudyFiles, product: Product) -> Check:
    name = "Its threshold can promise the false-reject rate"
    if product.winner is None:
        return Check(name, None, "There is no threshold.")
    threshold = product.winner.threshold
    low, high = threshold.interval
    says = (
        f"{threshold.normals} held-out normals stand for {percent(threshold.supported_rate)}; with "
        f"95 % confidence it is {percent(low)} to {percent(high)}."
    )
    if threshold.supported_rate <= threshold.false_reject_rate:
        return Check(name, True, says)
    do = _more_normals(threshold, product.winner.settings.validation.fraction)
    return Check(name, False, says, "normals", do)


def _more_normals(threshold: ThresholdReport, fraction: float) -> str:
    """How many normals the false-reject rate needs; `fraction` of good images are held out."""
    total = math.ceil(1 / threshold.false_reject_rate) - 1
    needed = total - threshold.normals
    more = f" (about {math.ceil(needed / fraction)} more good images at this split)"
    return (
        f"For {percent(threshold.false_reject_rate)} hold out {needed} more normals"
        f"{more if fraction else ''}, or give {total} new ones to clsnf calibrate, without "
        f"training. Until then the threshold stands for {percent(threshold.supported_rate)}."
    )


def _check_false_rejects(study: StudyFiles, product: Product) -> Check:
    name = "Test normals look like those it was calibrated on"
    winner, test = product.winner, product.test
    normals = test.counts.get("good", 0) if test is not None else 0
    if winner is None or test is None or not is_finite(test.false_reject_rate) or not normals:
        return Check(name, None, "There are no normal test images.")
    rejected = round(test.false_reject_rate * normals)
    says = (
        f"{rejected} of {normals} normal test images are rejected "
        f"({percent(test.false_reject_rate)})."
    )
    high = winner.threshold.interval[1]
    if _least_share(rejected, normals) <= high:
        return Check(name, True, says)
    says += f" The threshold allows for {percent(high)}."
    return Check(name, False, says, "images", _DRIFT)


_DRIFT = (
    "Compare the test normals with the training normals (light, camera, lot). Where both are "
    "right, calibrate on new ones."
)


def _check_suspects(study: StudyFiles, product: Product) -> Check:
    name = "No image looks wrongly labelled"
    if not product.images:
        return Check(name, None, "The study left no scores of single images.")
    found = suspects_of(product)
    if not found:
        return Check(name, True, "No held-out or test image contradicts its label by far.")
    count = f"{len(found)} images contradict" if len(found) > 1 else "1 image contradicts"
    label = "their labels" if len(found) > 1 else "its label"
    do = "Look at the listed images: correct labels, or take images out, and study again."
    return Check(name, False, f"{count} {label} by far.", "images", do)


def _check_tested(study: StudyFiles, product: Product) -> Check:
    name = "It was tested on real defects"
    if product.test is None or "image_auroc" not in product.metrics:
        do = "Label a few real defects and run clsnf evaluate before you rely on it."
        return Check(name, False, "No.", "untested", do)
    good = product.test.counts.get("good", 0)
    defective = sum(product.test.counts.values()) - good
    return Check(name, True, f"{defective} defective and {good} normal test images.")


CHECKS: dict[str, Callable[[StudyFiles, Product], Check]] = {
    "winner": _check_winner,
    "finds_defects": _check_detection,
    "baseline": _check_baseline,
    "threshold": _check_threshold,
    "false_rejects": _check_false_rejects,
    "suspects": _check_suspects,
    "tested": _check_tested,
}

# ---- what checks and tables share ----


@dataclass(frozen=True)
class BaselineGain:
    """A metric of the winner minus the baseline's.

    Attributes:
        value: the difference.
        low, high: its 95 % interval, paired on the same images.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out zero, in words."""
        if self.low > 0:
            return "significant"
        return "significantly behind" if self.high < 0 else "no clear difference"


def gain_of(product: Product, name: str) -> BaselineGain | None:
    """The winner's gain on the baseline in a metric; None where one of both is not known."""
    if product.baseline is None:
        return None
    own, other = product.metrics.get(name), product.baseline.metrics.get(name)
    found = product.baseline.gain.get(name)
    if found is None or not is_finite(own) or not is_finite(other):
        return None
    return BaselineGain(own - other, found.low, found.high)


def gain_metric(study: StudyFiles, product: Product) -> str:
    """The metric for gains: the objective, or image AUROC where defects have no masks."""
    objective = study.objective
    return objective if objective in METRICS and objective in product.metrics else "image_auroc"


def suspects_of(product: Product) -> list[Suspect]:
    """Images that contradict their label by far, the farthest first.

    - A held-out normal that scores more than :data:`FAR_OUT` robust standard deviations above the
      median of all held-out normals.
    - A test normal that is rejected and scores above half of the test defects.
    - A test defect that passes and scores below half of the held-out normals.

    Test images are suspected only where image AUROC is :data:`GOOD_AUROC` or more: the scores of a
    detector that ranks badly contradict every other label.
    """
    known = [image for image in product.images if is_finite(image.score)]
    held_out = [image for image in known if image.split == "validation" and not image.label]
    test = [image for image in known if image.split == "test"]
    if len(held_out) < _FEWEST_NORMALS:
        return []
    scores = np.array([image.score for image in held_out])
    median = float(np.median(scores))
    deviation = max(1.4826 * float(np.median(np.abs(scores - median))), 1e-6)
    found = []
    for image in held_out:
        if (image.score - median) / deviation > FAR_OUT:
            why = (
                f"a training normal that was held out; it scores {metric(image.score)}, the "
                f"median is {metric(median)}"
            )
            found.append((image, why))
    found += _suspects_of_test(test, median)
    found.sort(key=lambda pair: -abs(pair[0].score - median) / deviation)
    return [Suspect(image.path, why) for image, why in found]


def _suspects_of_test(test: list[ImageEvidence], median: float) -> list[tuple[ImageEvidence, str]]:
    """Test images that contradict their label, and why; `median` is of the held-out normals."""
    scores, labels = [image.score for image in test], [bool(image.label) for image in test]
    if all(labels) or not any(labels) or image_auroc(scores, labels) < GOOD_AUROC:
        return []
    typical = float(np.median([image.score for image in test if image.label]))
    found = []
    for image in test:
        if not image.label and image.verdict and image.score > typical:
            why = f"a good test image; it scores {metric(image.score)}, above half of the defects"
            found.append((image, why))
        if image.label and not image.verdict and image.score < median:
            why = (
                f"a test image of {image.defect_type}; it scores {metric(image.score)}, below "
                "half of the held-out normals"
            )
            found.append((image, why))
    return found
