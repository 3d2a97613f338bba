"""What to do with a category next: checks with fixed rules, and the decision that follows from
them.

``CHECKS`` is the registry: a check looks at one thing and says whether it holds, in words that name
the figures it saw. A check that does not hold names a decision; the gravest decision of all checks
is the category's. The rules are written down in ``docs/reports.md``.
Unusual: a check that can't be made (no test pictures, no evidence) holds nothing against the
    category, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import beta

from clsnf.metrics import METRICS, image_auroc
from clsnf.reporting.formats import figure, figure_name, gain, is_finite, percent
from clsnf.reporting.study_files import Product, StudyFiles

# The gravest first.
DECISIONS = {
    "failed": "No winner",
    "unfinished": "No winner yet",
    "weak": "Not good enough yet",
    "images": "Check these images",
    "normals": "Needs more normals",
    "untested": "Test it on defects first",
    "ready": "Ready to deploy",
}
GOOD_AUROC = 0.9  # the lower end of image AUROC's interval
GOOD_RECALL = 0.8  # share of the test defects above the threshold
MANY_NORMALS = 100  # fitted on fewer, more are the first thing to try
LOST_BY_SEARCH = 0.03  # pixel AP that an oracle gains over the chosen trial
FAR_OUT = 6.0  # a held-out normal's score, in robust standard deviations above the median


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: of the check.
        holds: None where it could not be made.
        says: what was seen.
        decision: what it asks for where it does not hold, a key of :data:`DECISIONS`.
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
        checks: all that was looked at.
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
        open_checks = [check for check in self.checks if check.holds is False]
        return [c.do for c in sorted(open_checks, key=lambda c: list(DECISIONS).index(c.decision))]


def advise(study: StudyFiles, product: Product) -> Advice:
    """Look at everything and decide."""
    checks = [check(study, product) for check in CHECKS.values()]
    if "winner" not in product.result:
        checks[1:] = [
            replace(check, holds=None, says="There is no winner to ask.") for check in checks[1:]
        ]
    open_decisions = [check.decision for check in checks if check.holds is False]
    decision = min(open_decisions, key=list(DECISIONS).index, default="ready")
    return Advice(decision, checks, suspects_of(product))


# ---- the checks ----


def _winner(study: StudyFiles, product: Product) -> Check:
    name = "It has a winner with finite figures"
    result = product.result
    if "winner" not in result:
        cause = (
            result.get("error")
            or f"{len(product.finished_trials)} of {len(product.trials)} begun trials finished."
        )
        if not study.finished and not result.get("error"):
            return Check(
                name,
                False,
                cause,
                "unfinished",
                "Wait for the study, or go on with it: the same command with --resume.",
            )
        return Check(name, False, str(cause), "failed", "Mend the cause and go on with --resume.")
    figures = {**product.figures, "threshold": (result.get("threshold") or {}).get("value")}
    strange = [figure_name(key) for key, value in figures.items() if not is_finite(value)]
    if strange:
        says = f"Not finite: {', '.join(strange)}."
        return Check(
            name,
            False,
            says,
            "failed",
            "Don't use this winner: train again with lower learning rates.",
        )
    return Check(
        name, True, f"Trial {result.get('trial')}, of {len(product.finished_trials)} that finished."
    )


def _finds_defects(study: StudyFiles, product: Product) -> Check:
    name = "It finds the test defects"
    test = product.result.get("test") or {}
    auroc, recall = product.figures.get("image_auroc"), test.get("recall")
    if not is_finite(auroc) or not is_finite(recall):
        return Check(
            name, None, "There are no labelled test pictures, normal and defective, to say."
        )
    low = (product.evidence.get("intervals") or {}).get("image_auroc", (auroc, auroc))[0]
    counts = dict(test.get("counts") or {})
    defects = sum(counts.values()) - counts.get("good", 0)
    found = round(recall * defects)
    least = float(beta.ppf(0.025, found, defects - found + 1)) if found else 0.0
    says = (
        f"Image AUROC {figure(auroc)}, interval from {figure(low)}; {percent(recall)} of "
        f"{defects} defects are rejected "
        f"(with 95 % confidence {percent(least)} or more)."
    )
    if low >= GOOD_AUROC and recall >= GOOD_RECALL:
        return Check(name, True, says)
    fitted = product.provenance.get("fit_images") or 0
    lost = (((product.result.get("regret") or {}).get("trial") or {}).get("pixel_ap") or {}).get(
        "regret"
    )
    if fitted < MANY_NORMALS:
        do = (
            f"Bring more normals: it was fitted on {fitted}, and {MANY_NORMALS} or more are where "
            "they stop being the first thing to try."
        )
        return Check(name, False, says, "normals" if low >= GOOD_AUROC else "weak", do)
    if is_finite(lost) and lost > LOST_BY_SEARCH:
        return Check(
            name,
            False,
            says,
            "weak",
            f"Search on (--resume with more --trials): an oracle gains {figure(lost)} pixel AP.",
        )
    return Check(
        name,
        False,
        says,
        "weak",
        "Look at the misses below: larger images or another backbone may show what is too small "
        "or faint.",
    )


def _beats_baseline(study: StudyFiles, product: Product) -> Check:
    name = "It is not behind the baseline"
    names = dict.fromkeys((gain_figure(study, product), "image_auroc"))
    gains = {
        figure_name(name): found for name in names if (found := gain_of(product, name)) is not None
    }
    if not gains:
        return Check(name, None, "The baseline was not judged.")
    says = " ".join(
        f"{title} {gain(found['gain'])} ({gain(found['low'])} to {gain(found['high'])}): "
        f"{found['verdict']}."
        for title, found in gains.items()
    )
    if any(found["high"] < 0 for found in gains.values()):
        return Check(name, False, says, "weak", _MISLED)
    return Check(name, True, says)


_MISLED = (
    "Validation defects chose a winner that does worse than plain flows on real ones: see the "
    "regret and what other selection rules "
    "pick, and search on with the baseline in reach (finetune_epochs 0, fusion_weight 0)."
)


def _threshold(study: StudyFiles, product: Product) -> Check:
    name = "Its threshold can promise the false-reject rate"
    threshold = product.result.get("threshold") or {}
    if not threshold:
        return Check(name, None, "There is no threshold.")
    asked, supported, normals = (
        threshold["false_reject_rate"],
        threshold["supported_rate"],
        threshold["normals"],
    )
    low, high = threshold.get("interval") or (None, None)
    says = (
        f"{normals} held-out normals stand for {percent(supported)}; with 95 % confidence it is "
        f"{percent(low)} to {percent(high)}."
    )
    if supported <= asked:
        return Check(name, True, says)
    needed = math.ceil(1 / asked) - 1 - normals
    fraction = ((product.result.get("settings") or {}).get("validation") or {}).get("fraction")
    more = (
        f" (about {math.ceil(needed / fraction)} more good pictures at this split)"
        if is_finite(fraction) and fraction
        else ""
    )
    do = (
        f"For {percent(asked)} hold out {needed} more normals{more}, or give {needed + normals} "
        "new ones to clsnf calibrate, without "
        f"training. Until then the threshold stands for {percent(supported)}."
    )
    return Check(name, False, says, "normals", do)


def _false_rejects(study: StudyFiles, product: Product) -> Check:
    name = "Test normals look like those it was calibrated on"
    test = product.result.get("test") or {}
    rate, normals = test.get("false_reject_rate"), (test.get("counts") or {}).get("good", 0)
    high = (product.result.get("threshold") or {}).get("interval", (None, None))[1]
    if not is_finite(rate) or not normals or high is None:
        return Check(name, None, "There are no normal test pictures to say.")
    rejected = round(rate * normals)
    least = float(beta.ppf(0.025, rejected, normals - rejected + 1)) if rejected else 0.0
    says = f"{rejected} of {normals} normal test pictures are rejected ({percent(rate)})."
    if least <= high:
        return Check(name, True, says)
    return Check(
        name, False, says + f" The threshold allows for {percent(high)}.", "images", _DRIFT
    )


_DRIFT = (
    "Compare the test normals with the training normals (light, camera, lot): where both are "
    "right, calibrate on new ones."
)


def _suspects(study: StudyFiles, product: Product) -> Check:
    name = "No picture looks wrongly labelled"
    if not product.images:
        return Check(name, None, "The study left no scores of single pictures.")
    found = suspects_of(product)
    if not found:
        return Check(name, True, "None of the held-out and test pictures stands out.")
    count = f"{len(found)} pictures stand" if len(found) > 1 else "1 picture stands"
    return Check(
        name,
        False,
        f"{count} out.",
        "images",
        "Look at the listed pictures: mend labels, or take them out, and study again.",
    )


def _tested(study: StudyFiles, product: Product) -> Check:
    name = "It was tested on real defects"
    if "image_auroc" in product.figures:
        counts = dict((product.result.get("test") or {}).get("counts") or {})
        good = counts.pop("good", 0)
        return Check(
            name, True, f"{sum(counts.values())} defective and {good} normal test pictures."
        )
    return Check(
        name,
        False,
        "No.",
        "untested",
        "Label a few real defects and run clsnf evaluate before you rely on it.",
    )


CHECKS: dict[str, Callable[[StudyFiles, Product], Check]] = {
    "winner": _winner,
    "finds_defects": _finds_defects,
    "baseline": _beats_baseline,
    "threshold": _threshold,
    "false_rejects": _false_rejects,
    "suspects": _suspects,
    "tested": _tested,
}

# ---- what checks and tables share ----


def gain_of(product: Product, name: str) -> dict[str, Any] | None:
    """What the winner is ahead of the baseline by in a figure: ``gain``, ``low``, ``high``,
    ``ahead``, ``verdict``; None without both.
    """
    own, other = product.figures.get(name), (product.baseline.get("figures") or {}).get(name)
    found = (product.baseline.get("gain") or {}).get(name)
    if found is None or not is_finite(own) or not is_finite(other) or own is None:
        return None
    verdict = (
        "significant"
        if found["low"] > 0
        else "significantly behind"
        if found["high"] < 0
        else "no clear difference"
    )
    return {"gain": own - other, **found, "verdict": verdict}


def gain_figure(study: StudyFiles, product: Product) -> str:
    """The figure that gains are told in: the objective, or image AUROC where defects have no masks."""
    return (
        study.objective
        if study.objective in METRICS and study.objective in product.figures
        else "image_auroc"
    )


def suspects_of(product: Product) -> list[Suspect]:
    """Images that contradict their label by far, the plainest first.

    A held-out normal that scores :data:`FAR_OUT` robust standard deviations above the median of
    them; a test normal that is rejected and scores above half of the test defects; a test defect
    that passes and scores below half of the held-out normals. Of test pictures only where image
    AUROC is :data:`GOOD_AUROC` or more: a detector that ranks badly contradicts every other label.
    """
    found: list[tuple[float, Suspect]] = []
    held_out = [
        r
        for r in product.images
        if r["split"] == "validation" and not r["label"] and is_finite(r["score"])
    ]
    test = [r for r in product.images if r["split"] == "test" and is_finite(r["score"])]
    scores = np.array([row["score"] for row in held_out])
    if len(scores) < 5:
        return []
    middle = float(np.median(scores))
    width = max(1.4826 * float(np.median(np.abs(scores - middle))), 1e-6)
    for row in held_out:
        away = (row["score"] - middle) / width
        if away > FAR_OUT:
            why = (
                f"a training normal that was held out; it scores {figure(row['score'])}, the "
                f"middle one {figure(middle)}"
            )
            found.append((away, Suspect(row["path"], why)))
    labels = [bool(row["label"]) for row in test]
    if (
        any(labels)
        and not all(labels)
        and image_auroc([row["score"] for row in test], labels) >= GOOD_AUROC
    ):
        typical = float(np.median([row["score"] for row in test if row["label"]]))
        for row in test:
            away = abs(row["score"] - middle) / width
            if not row["label"] and row["verdict"] and row["score"] > typical:
                why = (
                    f"a good test picture; it scores {figure(row['score'])}, above half of the "
                    "defects"
                )
                found.append((away, Suspect(row["path"], why)))
            if row["label"] and not row["verdict"] and row["score"] < middle:
                why = (
                    f"a test picture of {row['defect_type']}; it scores {figure(row['score'])}, "
                    "below half of the held-out normals"
                )
                found.append((away, Suspect(row["path"], why)))
    return [suspect for _, suspect in sorted(found, key=lambda pair: -pair[0])]
