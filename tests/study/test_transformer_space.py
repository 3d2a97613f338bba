"""The space for transformers: its trials run, whatever layers train."""

from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from tests.support.running_study import ROOT, Study
from tests.support.small_data import write_category

SPACE = ROOT / "tune" / "spaces" / "transformer.yaml"
VIT = "vit_tiny_patch16_224"


@pytest.mark.slow
def test_trials_of_the_space_for_transformers_run(tmp_path: Path) -> None:
    weights = tmp_path / f"{VIT}.safetensors"
    save_file(timm.create_model(VIT).state_dict(), weights)
    (tmp_path / "study").mkdir()
    study = Study(tmp_path / "study", weights)
    at = study.options.index("--levels")
    del study.options[at : at + 2]
    study.options[study.options.index("resnet18")] = VIT
    study.options[study.options.index("--space") + 1] = str(SPACE)
    write_category(study.data / "alpha", seed=1)
    code, _, stderr = study.run("--trials", "4", "--no-stop-hopeless")
    assert code == 0, stderr
    assert [row["status"] for row in study.trials()] == ["finished"] * 4
    assert study.summary()["categories"]["alpha"]["winner"]
