"""What to do next: the rules of docs/reports.md, one by one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from clsnf.reporting.advice import CHECKS, DECISIONS, advise, gain_of, suspects_of
from clsnf.reporting.study_files import Product, StudyFiles, read_study
from clsnf.results import CategoryResult, ImageEvidence, WinnerProvenance, from_plain, to_plain
from tests.support.made_up_study import write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFiles:
    return read_study(write_study(tmp_path_factory.mktemp("runs") / "night", ["alpha"]))


def with_result(study: StudyFiles, **changed: Any) -> Product:
    """The made-up product, which is ready to deploy, with parts of its result changed.

    Names are those in ``summary.json``; a mapping changes entries of one.
    """
    (product,) = study.products
    result = to_plain(product.result)
    for name, value in changed.items():
        result[name] = {**result[name], **value} if isinstance(value, dict) else value
    typed = from_plain(CategoryResult, result, "the changed result")
    return dataclasses.replace(product, result=typed)


def _searching(study: StudyFiles, space: dict[str, Any]) -> StudyFiles:
    """The study with another space."""
    assert study.summary is not None
    return dataclasses.replace(study, summary=dataclasses.replace(study.summary, space=space))


def decision(study: StudyFiles, product: Product) -> str:
    return advise(study, product).decision


def test_a_product_with_all_checks_is_ready_and_has_nothing_to_do(study: StudyFiles) -> None:
    advice = advise(study, study.products[0])
    assert advice.decision == "ready"
    assert advice.next_steps == []
    assert all(check.holds for check in advice.checks)


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_cant_be_made_holds_nothing_against_a_product_and_says_so(
    study: StudyFiles, name: str
) -> None:
    check = CHECKS[name](study, Product("empty"))
    assert check.says
    assert check.decision in DECISIONS
    if name not in ("winner", "tested"):
        assert check.holds is None


def test_without_a_winner_there_is_none_whatever_else_holds(study: StudyFiles) -> None:
    product = dataclasses.replace(study.products[0], result=CategoryResult(error="out of memory"))
    advice = advise(study, product)
    assert advice.decision == "failed"
    assert "out of memory" in advice.checks[0].says


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_no_winner(study: StudyFiles, value: float) -> None:
    figures = {**study.products[0].metrics, "pixel_ap": value}
    assert decision(study, with_result(study, test={"figures": figures})) == "failed"
    assert decision(study, with_result(study, threshold={"value": value})) == "failed"


def test_a_low_end_of_image_auroc_or_a_low_recall_is_not_good_enough(study: StudyFiles) -> None:
    low = {"image_auroc": (0.89, 0.99)}
    assert decision(study, with_result(study, evidence={"intervals": low})) == "weak"
    product = with_result(study, test={"recall": 0.7})
    assert decision(study, product) == "weak"
    few = dataclasses.replace(product, provenance=WinnerProvenance(fit_images=40))
    advice = advise(study, few)
    assert advice.decision == "normals", "fitted on few, and ranking well: more normals come first"
    assert "40" in advice.next_steps[0]


def test_a_winner_significantly_behind_the_baseline_is_not_good_enough(study: StudyFiles) -> None:
    baseline = to_plain(study.products[0].baseline)
    behind = {name: {"low": -0.2, "high": -0.01, "ahead": 0.0} for name in baseline["gain"]}
    assert (
        decision(study, with_result(study, evidence={"baseline": {**baseline, "gain": behind}}))
        == "weak"
    )
    ranks_worse = {**baseline["gain"], "image_auroc": {"low": -0.2, "high": -0.01, "ahead": 0.0}}
    assert (
        decision(
            study, with_result(study, evidence={"baseline": {**baseline, "gain": ranks_worse}})
        )
        == "weak"
    )
    # The search had plain flows in reach: nobody is told to put them there.
    (step,) = advise(
        study, with_result(study, evidence={"baseline": {**baseline, "gain": behind}})
    ).next_steps
    assert step.endswith("what other selection rules pick.")
    without = _searching(study, {"finetune_epochs": {"type": "choice", "values": [4, 8]}})
    (step,) = advise(
        without, with_result(without, evidence={"baseline": {**baseline, "gain": behind}})
    ).next_steps
    assert step.endswith("the baseline in reach (finetune_epochs and fusion_weight 0).")
    unclear = {name: {"low": -0.2, "high": 0.01, "ahead": 0.4} for name in baseline["gain"]}
    product = with_result(study, evidence={"baseline": {**baseline, "gain": unclear}})
    assert decision(study, product) == "ready"
    found = gain_of(product, "pixel_ap")
    assert found is not None
    assert found.verdict == "no clear difference"


def test_a_threshold_that_promises_less_than_was_asked_needs_more_normals_and_says_how_many(
    study: StudyFiles,
) -> None:
    few = {
        "false_reject_rate": 0.01,
        "supported_rate": 0.05,
        "normals": 19,
        "interval": [0.001, 0.17],
    }
    advice = advise(study, with_result(study, threshold=few))
    assert advice.decision == "normals"
    assert "hold out 80 more normals" in advice.next_steps[0]
    assert "99 new ones" in advice.next_steps[0]


def test_more_rejected_test_normals_than_chance_allows_asks_to_check_the_images(
    study: StudyFiles,
) -> None:
    within = with_result(
        study, threshold={"interval": [0.0, 0.05]}, test={"false_reject_rate": 6 / 120}
    )
    assert decision(study, within) == "ready"
    beyond = with_result(
        study, threshold={"interval": [0.0, 0.05]}, test={"false_reject_rate": 24 / 120}
    )
    assert decision(study, beyond) == "images"


def test_a_product_without_labelled_defects_is_to_be_tested_first(study: StudyFiles) -> None:
    assert decision(study, with_result(study, test=None)) == "untested"


def row(split: str, label: int, score: float, verdict: bool, name: str = "x.png") -> ImageEvidence:
    return ImageEvidence(split, name, "dent" if label else "good", label, score, verdict)


def test_images_that_contradict_their_label_by_far_are_named_the_farthest_first() -> None:
    held_out = [row("validation", 0, 0.1 + 0.01 * i, False) for i in range(11)]
    plain = [row("test", 1, 0.8, True) for _ in range(40)] + [
        row("test", 0, 0.15, False) for _ in range(40)
    ]
    assert suspects_of(Product("p", images=held_out + plain)) == []
    odd = [
        row("validation", 0, 0.9, True, "contaminated.png"),
        row("test", 0, 0.85, True, "mislabelled-good.png"),
        row("test", 1, 0.12, False, "mislabelled-defect.png"),
        row("test", 0, 0.3, True, "plain-false-alarm.png"),
        row("test", 1, 0.2, False, "plain-miss.png"),
    ]
    found = [suspect.path for suspect in suspects_of(Product("p", images=held_out + plain + odd))]
    assert found == ["contaminated.png", "mislabelled-good.png", "mislabelled-defect.png"]
    turned = [dataclasses.replace(r, label=1 - r.label) for r in plain]
    found = [suspect.path for suspect in suspects_of(Product("p", images=held_out + turned + odd))]
    assert found == ["contaminated.png"], (
        "no test image is suspected where the detector ranks badly"
    )


def test_the_rules_that_the_documentation_names_are_those_of_the_code() -> None:
    from clsnf.reporting import advice

    text = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    for title in DECISIONS.values():
        assert title in text
    for value in (
        advice.GOOD_AUROC,
        advice.GOOD_RECALL,
        advice.MANY_NORMALS,
        advice.LOST_BY_SEARCH,
        advice.FAR_OUT,
    ):
        assert f"{value:g}" in text
