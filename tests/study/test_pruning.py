"""What running trials report on the way: what they would be worth, on real trials."""

from collections.abc import Mapping

import pytest

from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.evaluation.selection import family_metrics, mean_over_families, scores_at
from clsnf.study.context import StudyContext
from clsnf.study.folder import StudyFolder
from clsnf.study.reports import TrialReport
from clsnf.study.space import apply_config
from clsnf.study.trial import trial_reports
from clsnf.study.worker import WORKBENCHES
from clsnf.training.pipeline import ScoreMaps
from tests.support.small_data import TINY, write_category

STEP, CATEGORY = 4, "nut"
WEIGHTS = (0.0, 0.5, 1.0)
SETTINGS = replaced(
    DetectorSettings(),
    TINY
    | {
        "image.height": 64,
        "image.width": 64,
        "backbone.name": "demo",
        "backbone.levels": [1, 2],
        "finetune.joint_epochs": 4,
        "validation.fraction": 0.3,
    },
)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> StudyContext:
    """A study of one category, ready for trials, that compares them after four epochs."""
    folder = tmp_path_factory.mktemp("study")
    write_category(folder / "data" / CATEGORY)
    table = assign_splits(read_category(folder / "data", CATEGORY), 0.3, SETTINGS.seed)
    study = StudyFolder(str(folder))
    study.write_train_table(CATEGORY, table)
    return StudyContext(
        study, SETTINGS, StudySettings(), (4,), (STEP,), WEIGHTS, None, "cpu", threads=1
    )


def reports(
    context: StudyContext, rate: float, densities: Mapping[str, str]
) -> tuple[list[TrialReport], TrialReport]:
    """Of a trial: those on the way, and the last one."""
    values = {"finetune.learning_rate": rate, "flow_depth": 1}
    *on_the_way, last = trial_reports(context, CATEGORY, values, densities)
    assert last.measured.density is not None
    return on_the_way, last


def test_a_trial_reports_what_it_would_be_worth_with_the_best_known_density(
    context: StudyContext,
) -> None:
    on_the_way, first = reports(context, 2e-3, {})
    assert on_the_way == [], "no density is known"
    known = dict([first.measured.density or ("", "")])
    on_the_way, last = reports(context, 1e-3, known)
    assert [report.step for report in on_the_way] == [STEP]
    assert (last.measured.density or ("", ""))[1] not in known.values()

    settings = apply_config(SETTINGS, {"finetune.learning_rate": 1e-3, "flow_depth": 1})
    bench = WORKBENCHES.get(context, CATEGORY, settings)
    other = apply_config(SETTINGS, {"finetune.learning_rate": 2e-3, "flow_depth": 1})
    density = WORKBENCHES.get(context, CATEGORY, other).maps(4, 1).density
    maps = ScoreMaps(density, bench.pipeline.stable_phase_maps(4, STEP, bench.images))
    worth = [
        mean_over_families(
            family_metrics(scores_at(maps, weight, None), bench.labels, ("pixel_ap",)), "pixel_ap"
        )
        for weight in WEIGHTS
    ]
    assert on_the_way[0].objective == max(worth)


def test_nothing_is_compared_where_the_density_is_not_stored_any_more(
    context: StudyContext,
) -> None:
    images = WORKBENCHES.get(context, CATEGORY, SETTINGS).images
    on_the_way, _ = reports(context, 5e-4, {images.key: "0" * 40})
    assert on_the_way == []


# ---- a whole study ----
