"""Stage one: runs of every length share the stable phase bit for bit, and nothing is lost or done
twice.
"""

import copy
import dataclasses
import itertools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsnf.core.config import (
    DefectSettings,
    DetectorSettings,
    FinetuneSettings,
    FlowSettings,
    ImageSettings,
)
from clsnf.core.errors import TrainingError
from clsnf.core.hashing import content_key
from clsnf.data.images import write_image
from clsnf.model.backbone import Backbone, empty_backbone, fingerprint
from clsnf.model.network import build_decoder
from clsnf.model.score_maps import density_map
from clsnf.streams.stream import DefectRecipe, LocalStream, MemoryStream
from clsnf.synthesis.training_defects import DefectBatch, DefectMaker, sample_key
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.density import level_likelihoods
from clsnf.training.finetune import (
    RESUME_EVERY,
    Finetuner,
    cosine_scale,
    decay_start,
    stable_phase_content,
    train_stable_phase,
)
from clsnf.training.losses import soft_targets
from clsnf.training.pipeline import (
    CategoryPipeline,
    FeatureCache,
    Images,
    PlacedImages,
    StreamedImages,
    TrainingData,
    donor_indices,
)
from tests.support.backbones import backbone_settings

CPU = torch.device("cpu")
SIZE = (64, 32)
N = 6
SETTINGS = DetectorSettings(
    image=ImageSettings(*SIZE, interpolation="bilinear"),
    backbone=backbone_settings("resnet18", (1, 2)),
    finetune=FinetuneSettings(
        frozen_epochs=1, joint_epochs=1, decay_epochs=1, batch_size=4, decoder_width=16
    ),
    flow=FlowSettings(depth=0),
)


def pictures(n: int, seed: int) -> Tensor:
    """(n, 3, H, W) uint8: soft blobs."""
    noise = torch.rand(n, 3, 8, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=SIZE, mode="bilinear") * 255).to(torch.uint8)


IMAGES, TEXTURES = pictures(N, 0), pictures(5, 1)


@pytest.fixture(scope="module")
def pretrained() -> Backbone:
    torch.manual_seed(0)
    return empty_backbone(backbone_settings("resnet18", (1, 2)), SIZE)


def finetuner(
    pretrained: Backbone,
    settings: FinetuneSettings = SETTINGS.finetune,
    valid: Tensor | None = None,
    maker: DefectMaker | None = None,
) -> Finetuner:
    decoder = build_decoder(pretrained.info, SETTINGS.image, settings, seed=1)
    maker = maker or DefectMaker(SETTINGS.defects, TEXTURES, IMAGES)
    return Finetuner(
        copy.deepcopy(pretrained),
        decoder,
        MemoryStream(IMAGES, valid),
        DefectRecipe(maker),
        settings,
        3,
        CPU,
    )


def data_of(fit: Images) -> TrainingData:
    return TrainingData(fit, "off", TEXTURES, "five blobs")


def pipeline(
    pretrained: Backbone, root: Path, valid: Tensor | None = None, **changes: Any
) -> CategoryPipeline:
    settings = dataclasses.replace(
        SETTINGS, finetune=dataclasses.replace(SETTINGS.finetune, **changes)
    )
    fit = PlacedImages(IMAGES, valid, "six blobs")
    return CategoryPipeline(settings, pretrained, data_of(fit), ArtifactStore(root), CPU)


# ---- what an epoch shows ----


class Noting(DefectMaker):
    """Notes the keys of the samples that it makes."""

    keys: list[int]

    def make(self, images: Tensor, object_masks: Tensor | None, keys: Tensor) -> DefectBatch:
        self.keys += keys.tolist()
        return super().make(images, object_masks, keys)


def test_every_epoch_shows_each_image_as_often_as_told_each_time_with_a_fresh_defect(
    pretrained: Backbone,
) -> None:
    maker = Noting(SETTINGS.defects, TEXTURES, IMAGES)
    maker.keys = []
    finetuner(pretrained, dataclasses.replace(SETTINGS.finetune, repeats=2), maker=maker).run(2)
    expected = [
        int(sample_key(3, epoch, image, repeat)[0])
        for epoch in range(2)
        for repeat in range(2)
        for image in range(N)
    ]
    assert sorted(maker.keys) == sorted(expected)
    assert len(set(maker.keys)) == len(expected)
    assert maker.keys[:N] != sorted(maker.keys[:N])


def test_training_learns_to_find_defects_that_it_has_not_seen(pretrained: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(122, 135, (N, 3, *SIZE), dtype=torch.uint8, generator=generator)
    speckles = 255 * torch.randint(0, 2, (4, 3, *SIZE), dtype=torch.uint8, generator=generator)
    maker = DefectMaker(DefectSettings(max_transparency=0.0, texture_share=1.0), speckles, plain)
    trained = finetuner(
        pretrained,
        dataclasses.replace(SETTINGS.finetune, learning_rate=5e-3, repeats=8),
        maker=maker,
    )
    trained.stream = MemoryStream(plain)
    trained.run(3)
    fresh = maker.make(plain, None, torch.from_numpy(sample_key(99, 0, range(N))))
    with torch.inference_mode():
        found = torch.sigmoid(trained.decoder.eval()(trained.backbone(fresh.images)))
    assert found[fresh.regions].mean() > 2 * found[~fresh.regions].mean()
    assert len(trained.losses) == 3


def test_the_backbone_trains_in_the_joint_epochs_alone_and_its_statistics_never(
    pretrained: Backbone,
) -> None:
    trained = finetuner(pretrained)
    before = fingerprint(trained.backbone)
    trained.run(1)
    assert fingerprint(trained.backbone) == before
    trained.run(2)
    old, new = pretrained.state_dict(), trained.backbone.state_dict()
    for name in old:
        changed = not torch.equal(old[name], new[name])
        assert changed != ("running" in name or "num_batches" in name), name


@pytest.mark.parametrize("all_valid", [True, False])
def test_padding_counts_for_nothing_in_the_loss(pretrained: Backbone, all_valid: bool) -> None:
    valid = torch.ones(N, *SIZE, dtype=torch.bool)
    if not all_valid:
        valid[:, :20] = False
    settings = dataclasses.replace(SETTINGS.finetune, batch_size=N)
    padded = finetuner(pretrained, settings, valid=valid)
    decoder, backbone = copy.deepcopy(padded.decoder), copy.deepcopy(padded.backbone)
    padded.run(1)

    order = torch.randperm(N, generator=torch.Generator().manual_seed(3 * 1_000_003))
    keys = torch.from_numpy(sample_key(3, 0, order.numpy()))
    batch = DefectMaker(SETTINGS.defects, TEXTURES, IMAGES).make(IMAGES[order], valid[order], keys)
    assert not (batch.regions & ~valid[order]).any()
    with torch.no_grad():
        logits = decoder.train()(backbone(batch.images))
    expected = F.binary_cross_entropy_with_logits(
        logits[valid[order]], soft_targets(batch, "absolute")[valid[order]]
    )
    assert padded.losses[0] == pytest.approx(float(expected), rel=2e-2)  # mixed precision


@pytest.mark.parametrize(("number", "batch_size"), [(6, 5), (6, 1), (2, 16)])
def test_any_number_of_images_makes_batches(
    pretrained: Backbone, number: int, batch_size: int
) -> None:
    settings = dataclasses.replace(SETTINGS.finetune, batch_size=batch_size)
    trained = finetuner(pretrained, settings)
    trained.stream = MemoryStream(IMAGES[:number])
    trained.run(1)
    assert math.isfinite(trained.losses[0])


# ---- the stable phase ----


def states_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


def assert_same_networks(one: CategoryPipeline, other: CategoryPipeline, epochs: int) -> None:
    for mine, theirs in zip(one.finetuned(epochs), other.finetuned(epochs), strict=True):
        assert states_equal(mine.state_dict(), theirs.state_dict())


def test_the_decay_starts_as_many_epochs_before_the_end_as_the_settings_say() -> None:
    settings = FinetuneSettings(frozen_epochs=2, joint_epochs=5, decay_epochs=3)
    assert decay_start(settings) == 4
    assert decay_start(dataclasses.replace(settings, joint_epochs=0)) == 0


def test_the_stable_phase_depends_on_all_settings_but_those_that_say_where_it_ends() -> None:
    def content_with(**changes: Any) -> dict[str, Any]:
        return stable_phase_content(dataclasses.replace(SETTINGS.finetune, **changes), epoch=2)

    content = content_with()
    others: dict[str, Any] = {"joint_epochs": 9, "decay_epochs": 4}
    for name, value in others.items():
        assert content_with(**{name: value}) == content
    others = {
        "frozen_epochs": 9,
        "learning_rate": 1e-4,
        "repeats": 2,
        "batch_size": 5,
        "target": "signed",
    }
    others |= {"loss": "hard", "schedule": "cosine", "skips": False}
    others |= {"layer_decay": 0.75, "trained_layers": 2}
    for name, value in others.items():
        assert content_with(**{name: value}) != content


def test_the_rate_is_constant_in_the_stable_phase_and_falls_to_nothing_in_the_decay(
    pretrained: Backbone,
) -> None:
    settings = dataclasses.replace(SETTINGS.finetune, batch_size=1)
    trained, rates = finetuner(pretrained, settings), []
    step = trained.optimizer.step

    def noting() -> None:
        rates.append([group["lr"] for group in trained.optimizer.param_groups])
        step()

    trained.optimizer.step = noting  # type: ignore[method-assign, assignment]
    trained.run(5)
    trained.run(7, decay_from=5)
    decoder = [rate for rate, _ in rates]
    assert all(
        backbone == pytest.approx(rate * settings.backbone_factor) for rate, backbone in rates
    )
    assert decoder[:20] == pytest.approx([settings.learning_rate * (i + 1) / 20 for i in range(20)])
    assert decoder[20:31] == pytest.approx(
        [settings.learning_rate] * 11
    )  # the first step of the decay is still at full rate
    assert all(later < earlier for earlier, later in itertools.pairwise(decoder[30:]))
    assert decoder[-1] == pytest.approx(settings.learning_rate / 12)


def test_a_run_that_resumes_a_stored_stable_phase_equals_an_undisturbed_one_bit_for_bit(
    pretrained: Backbone, tmp_path: Path
) -> None:
    longer = pipeline(pretrained, tmp_path / "shared")
    longer.finetuned(4, joint_epochs_choices=[2])
    longer.finetuned(2, joint_epochs_choices=[4])
    assert longer.store.computed == {
        "finetuned": 2,
        "trunk": 2,
    }  # at epochs 2 and 4: the shorter run trained its decay alone
    alone = pipeline(pretrained, tmp_path / "alone")
    for epochs in (2, 4):
        assert_same_networks(longer, alone, epochs)
    assert not states_equal(
        longer.finetuned(2)[1].state_dict(), longer.finetuned(4)[1].state_dict()
    )


def test_a_longer_run_resumes_the_stable_phase_that_a_shorter_one_stored(
    pretrained: Backbone, tmp_path: Path
) -> None:
    shared = pipeline(pretrained, tmp_path / "shared")
    shared.finetuned(1)
    shared.finetuned(3)
    assert_same_networks(shared, pipeline(pretrained, tmp_path / "alone"), 3)
    states = [
        shared.store.find("trunk", folder.name)
        for folder in (tmp_path / "shared" / "trunk").iterdir()
    ]
    assert sorted(state.facts["epoch"] for state in states if state is not None) == [1, 3]


class Interruption(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("at", [2, 3, 4])
def test_an_interrupted_run_goes_on_and_ends_as_an_undisturbed_one(
    pretrained: Backbone, tmp_path: Path, at: int
) -> None:
    def interrupt(task: str, done: int, total: int) -> None:
        if done == at:
            raise Interruption

    broken = pipeline(pretrained, tmp_path / "broken")
    broken.progress = interrupt
    with pytest.raises(Interruption):
        broken.finetuned(3, joint_epochs_choices=[1, 2])
    resumed = pipeline(pretrained, tmp_path / "broken")
    seen: list[int] = []
    resumed.progress = lambda task, done, total: seen.append(done)
    resumed.finetuned(3, joint_epochs_choices=[1, 2])
    assert seen[0] == at  # what was stored is not trained again
    assert_same_networks(resumed, pipeline(pretrained, tmp_path / "alone"), 3)


def test_two_runs_at_once_train_their_stable_phase_once(
    pretrained: Backbone, tmp_path: Path
) -> None:
    choices = [1, 2, 3]
    runs = {epochs: pipeline(pretrained, tmp_path / "shared") for epochs in (2, 3)}
    begun = threading.Event()
    runs[3].progress = lambda task, done, total: begun.set()
    longer, shorter = (
        threading.Thread(target=runs[epochs].finetuned, args=(epochs, choices)) for epochs in (3, 2)
    )
    longer.start()
    assert begun.wait(60)  # in the midst of epoch 1, which it is about to store
    shorter.start()
    for thread in (longer, shorter):
        thread.join(60)
    assert (
        sum(run.store.computed.get("trunk", 0) for run in runs.values()) == 3
    )  # epochs 1, 2 and 3
    alone = pipeline(pretrained, tmp_path / "alone")
    for epochs, run in runs.items():
        assert_same_networks(run, alone, epochs)


@pytest.mark.parametrize("layers", [{}, {"layer_decay": 0.5, "trained_layers": 3}])
def test_a_restored_finetuner_is_where_the_stored_one_was(
    pretrained: Backbone, tmp_path: Path, layers: dict[str, Any]
) -> None:
    settings = dataclasses.replace(SETTINGS.finetune, **layers)
    store, first = ArtifactStore(tmp_path), finetuner(pretrained, settings)
    first.run(2)
    store.get("trunk", {}, first.state)
    found = store.find("trunk", store.key({}))
    assert found is not None
    second = finetuner(pretrained, settings)
    second.restore(found)
    assert (second.epoch, second.losses) == (2, first.losses)
    for run in (first, second):
        run.run(4)
    assert first.losses == second.losses
    assert states_equal(first.state().tensors, second.state().tensors)


# ---- layers of the backbone ----


def test_rates_fall_from_the_deepest_layer_to_the_stem(pretrained: Backbone) -> None:
    settings = dataclasses.replace(SETTINGS.finetune, layer_decay=0.5, backbone_factor=0.1)
    decoder, *layers = finetuner(pretrained, settings).optimizer.param_groups
    deepest = settings.learning_rate * 0.1
    assert decoder["base_lr"] == settings.learning_rate
    assert [group["base_lr"] for group in layers] == pytest.approx(
        [deepest * 0.5**n for n in range(5)]  # four blocks and the stem
    )
    assert layers[-1]["params"][0].shape == (64, 3, 7, 7)
    trained = sum(len(group["params"]) for group in layers)
    assert trained == len(list(pretrained.parameters()))


@pytest.mark.parametrize("trained_layers", [0, 1, 3, 99])
def test_the_last_layers_alone_train_and_nothing_moves_the_others(
    pretrained: Backbone, trained_layers: int
) -> None:
    settings = dataclasses.replace(
        SETTINGS.finetune, trained_layers=trained_layers, weight_decay=0.1, learning_rate=1e-2
    )
    made = finetuner(pretrained, settings)
    decoder = copy.deepcopy(made.decoder.state_dict())
    made.run(3)
    order = ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    frozen = tuple(f"extractor.{name}" for name in order[: max(0, 5 - trained_layers)])
    frozen += ("extractor.bn1",) if trained_layers < 5 else ()
    for name, parameter in made.backbone.named_parameters():
        unchanged = torch.equal(parameter, pretrained.get_parameter(name))
        assert unchanged == name.startswith(frozen), name
    assert not states_equal(decoder, dict(made.decoder.state_dict()))


def test_a_transformer_trains_by_layers(tmp_path: Path) -> None:
    backbone = empty_backbone(backbone_settings("vit_tiny_patch16_224", (1, 2)), SIZE)
    settings = dataclasses.replace(SETTINGS.finetune, layer_decay=0.75, trained_layers=2)
    made = finetuner(backbone, settings)
    made.run(2)
    changed = {
        name.split(".")[3]
        for name, parameter in made.backbone.named_parameters()
        if not torch.equal(parameter, backbone.get_parameter(name))
    }
    assert changed == {"1", "2"}


def test_a_backbone_that_trains_no_layer_has_the_flows_of_the_pretrained_one(
    pretrained: Backbone, tmp_path: Path
) -> None:
    run = pipeline(pretrained, tmp_path, trained_layers=0)
    run.network(2, 0)
    run.network(0, 0)
    assert run.store.computed["flows"] == 1
    assert run.store.computed["finetuned"] == 2
    kept = run.finetuned(2)[0].state_dict()
    assert states_equal(dict(kept), dict(pretrained.state_dict()))


def test_runs_that_train_other_layers_share_the_frozen_epochs_alone(
    pretrained: Backbone, tmp_path: Path
) -> None:
    layers: list[dict[str, Any]] = [
        {},
        {"layer_decay": 0.5},
        {"trained_layers": 2},
        {"trained_layers": 0},
    ]
    for changes in layers:
        shared = pipeline(pretrained, tmp_path / "shared", frozen_epochs=2, **changes)
        seen: list[int] = []
        shared.progress = lambda task, done, total, seen=seen: seen.append(done)
        shared.finetuned(2, joint_epochs_choices=[1])
        assert seen[0] == (3 if changes else 1), "the two frozen epochs are there"
        alone = pipeline(pretrained, tmp_path / "alone", frozen_epochs=2, **changes)
        assert_same_networks(shared, alone, 2)
        assert shared.store.computed["finetuned"] == 1
    without = [
        pipeline(pretrained, tmp_path, **changes)._finetuned_content(0) for changes in layers
    ]
    assert without == without[:1] * 4, "without joint epochs no layer trains"


# ---- the authors' cosine ----


def test_a_cosine_falls_from_the_first_step_to_a_thousandth_over_all_epochs(
    pretrained: Backbone,
) -> None:
    settings = dataclasses.replace(
        SETTINGS.finetune, schedule="cosine", frozen_epochs=2, joint_epochs=2, batch_size=3
    )
    trained, rates = finetuner(pretrained, settings), []
    step = trained.optimizer.step

    def noting() -> None:
        rates.append(trained.optimizer.param_groups[0]["lr"] / settings.learning_rate)
        step()

    trained.optimizer.step = noting  # type: ignore[method-assign, assignment]
    trained.run(1)  # as a run that is stored on its way
    trained.run(4, decay_from=1)
    assert rates == pytest.approx(
        [1e-3 + 0.999 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    )
    assert cosine_scale(1.0) == pytest.approx(1e-3)


def test_a_cosine_s_content_says_where_it_ends() -> None:
    settings = dataclasses.replace(SETTINGS.finetune, schedule="cosine")
    contents = [
        stable_phase_content(dataclasses.replace(settings, joint_epochs=e), epoch=1) for e in (1, 2)
    ]
    assert contents[0] != contents[1]


def test_cosines_of_different_length_share_nothing_and_leave_nothing_on_the_way(
    pretrained: Backbone, tmp_path: Path
) -> None:
    both = pipeline(pretrained, tmp_path / "both", schedule="cosine")
    both.finetuned(4, joint_epochs_choices=[1, 4])
    both.finetuned(5, joint_epochs_choices=[1, 4])
    for epochs in (4, 5):
        assert_same_networks(
            both, pipeline(pretrained, tmp_path / str(epochs), schedule="cosine"), epochs
        )
    assert both.store.computed["trunk"] == 2
    assert [
        path for path in (tmp_path / "both" / "trunk").iterdir() if not path.name.startswith(".")
    ] == []


def test_a_cosine_and_a_stable_phase_never_share_an_artifact(
    pretrained: Backbone, tmp_path: Path
) -> None:
    cosine = pipeline(pretrained, tmp_path, schedule="cosine").finetuned(1)
    stable = pipeline(pretrained, tmp_path).finetuned(1)
    assert not states_equal(cosine[1].state_dict(), stable[1].state_dict())


@pytest.mark.parametrize("at", [RESUME_EVERY + 1, 2 * RESUME_EVERY])
def test_a_killed_cosine_goes_on_from_a_stored_point_and_ends_as_an_undisturbed_one(
    pretrained: Backbone, tmp_path: Path, at: int
) -> None:
    def interrupt(task: str, done: int, total: int) -> None:
        if done == at:
            raise Interruption

    joint = 2 * RESUME_EVERY  # and one frozen epoch
    broken = pipeline(pretrained, tmp_path / "broken", schedule="cosine")
    broken.progress = interrupt
    with pytest.raises(Interruption):
        broken.finetuned(joint)
    resumed = pipeline(pretrained, tmp_path / "broken", schedule="cosine")
    seen: list[int] = []
    resumed.progress = lambda task, done, total: seen.append(done)
    resumed.finetuned(joint)
    assert 1 < seen[0] <= at
    assert_same_networks(
        resumed, pipeline(pretrained, tmp_path / "alone", schedule="cosine"), joint
    )


# ---- what the settings choose ----


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "hard"},
        {"loss": "regression"},
        {"loss": "focal"},
        {"loss": "dice"},
        {"skips": False},
        {"target": "signed"},
    ],
)
def test_other_settings_give_other_weights_under_another_name(
    pretrained: Backbone, tmp_path: Path, change: dict[str, Any]
) -> None:
    usual = pipeline(pretrained, tmp_path).finetuned(1)[1].state_dict()
    other = pipeline(pretrained, tmp_path, **change)
    assert not states_equal(other.finetuned(1)[1].state_dict(), usual)
    assert other.store.computed["finetuned"] == 1


# ---- ends of the range, and what goes wrong ----


def test_without_joint_epochs_the_backbone_stays_as_it_is(
    pretrained: Backbone, tmp_path: Path
) -> None:
    run = pipeline(pretrained, tmp_path)
    backbone, decoder = run.finetuned(0)
    assert fingerprint(backbone) == fingerprint(pretrained)
    untrained = build_decoder(pretrained.info, SETTINGS.image, SETTINGS.finetune, SETTINGS.seed)
    assert not states_equal(decoder.state_dict(), untrained.state_dict())


def test_without_any_epoch_nothing_is_trained(pretrained: Backbone, tmp_path: Path) -> None:
    run = pipeline(pretrained, tmp_path, frozen_epochs=0)
    backbone, decoder = run.finetuned(0)
    untrained = build_decoder(pretrained.info, SETTINGS.image, SETTINGS.finetune, SETTINGS.seed)
    assert fingerprint(backbone) == fingerprint(pretrained)
    assert states_equal(decoder.state_dict(), untrained.state_dict())


def test_the_pretrained_backbone_is_never_changed(pretrained: Backbone, tmp_path: Path) -> None:
    before = fingerprint(pretrained)
    pipeline(pretrained, tmp_path, learning_rate=1e-2).finetuned(2)
    assert fingerprint(pretrained) == before


def test_a_loss_that_is_not_finite_ends_training_with_the_mend_and_is_not_stored(
    pretrained: Backbone, tmp_path: Path
) -> None:
    run = pipeline(pretrained, tmp_path, learning_rate=1e30)
    with pytest.raises(
        TrainingError, match=r"epoch \d.*lower finetune\.learning_rate \(now 1e\+30\)"
    ) as caught:
        run.finetuned(3)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_stable_phase_at_no_epoch_is_a_fresh_finetuner(
    pretrained: Backbone, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path)
    fresh = train_stable_phase(
        lambda: finetuner(pretrained), store, lambda epoch: {"epoch": epoch}, 0
    )
    assert fresh.epoch == 0
    assert store.computed == {}


def test_a_killed_run_goes_on_from_the_latest_resume_point(
    pretrained: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clsnf.training.finetune.RESUME_EVERY", 1)
    store = ArtifactStore(tmp_path)

    def content(epoch: int) -> dict[str, int]:
        return {"epoch": epoch}

    def killed_at_three(task: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stable_phase(
            lambda: finetuner(pretrained), store, content, 4, progress=killed_at_three
        )
    assert store.find("trunk", store.key(content(2))) is not None

    epochs: list[int] = []
    train_stable_phase(
        lambda: finetuner(pretrained),
        store,
        content,
        4,
        progress=lambda task, done, total: epochs.append(done),
    )
    assert epochs == [3, 4]

    undisturbed = ArtifactStore(tmp_path / "undisturbed")
    train_stable_phase(lambda: finetuner(pretrained), undisturbed, content, 4)
    assert [
        epoch
        for epoch in range(1, 5)
        if undisturbed.find("trunk", undisturbed.key(content(epoch))) is not None
    ] == [4]


# ---- keys of artifacts, and what stays in memory ----


def test_the_keys_of_stored_artifacts_stay_what_they_are(
    pretrained: Backbone, tmp_path: Path
) -> None:
    """Another key would leave stored work unused."""
    content = pipeline(pretrained, tmp_path)._finetuned_content(1)
    content |= {"backbone": "", "arithmetic": ""}  # the machine's
    assert content["finetune"]["schedule"] == "trunk"
    assert content["polarity"] == "off"
    assert content_key(content) == "b5d7efd45a8056534978cce0895028bffaa7d1cb"


def test_features_of_the_fit_images_are_extracted_once_for_each_backbone_that_is_kept() -> None:
    cache = FeatureCache()
    extracted: list[str] = []
    large = torch.empty(200 << 20, dtype=torch.uint8)  # one set fits into the limit, two do not

    def ask(key: str) -> None:
        def extract() -> list[Tensor]:
            extracted.append(key)
            return [large]

        cache.of_fit_images(key, extract)

    for key in ("a", "a", "b", "a"):
        ask(key)
    assert extracted == ["a", "b", "a"]
    cache.resize(2)
    for key in ("b", "a", "b", "c", "b"):
        ask(key)
    assert extracted[3:] == ["b", "c"], "the one that was used longest ago goes"
    cache.of_other_images("x", list)
    ask("b")
    assert extracted[5:] == []


def test_small_features_of_many_backbones_stay() -> None:
    cache = FeatureCache()
    sets = {key: cache.of_other_images(key, lambda: [torch.empty(10)]) for key in "abcdef"}
    for key, kept in sets.items():
        assert cache.of_other_images(key, list) is kept


@pytest.mark.parametrize("joint_epochs", [0, 1])
def test_one_pass_gives_the_same_bits_as_two(
    pretrained: Backbone, tmp_path: Path, joint_epochs: int
) -> None:
    """Features and classifier together or apart; memory distances shared by depths or not."""
    images = PlacedImages(torch.cat([IMAGES.flip(3)] * 6), None, "others")  # more than one batch
    settings = dataclasses.replace(
        SETTINGS, flow=dataclasses.replace(SETTINGS.flow, memory=8, neighbourhood=3)
    )
    data = data_of(PlacedImages(IMAGES, None, "six blobs"))

    def made(name: str) -> CategoryPipeline:
        return CategoryPipeline(settings, pretrained, data, ArtifactStore(tmp_path / name), CPU)

    apart, together = made("apart"), made("together")
    density = {depth: by_hand(apart, joint_epochs, depth, images) for depth in (0, 1)}
    classifier = apart.classifier_maps(joint_epochs, images)
    for depth in (0, 1):
        maps = together.maps(joint_epochs, depth, images)
        assert torch.equal(maps.density, density[depth])
        assert torch.equal(maps.classifier, classifier)
    assert together.store.computed["classifier_maps"] == 1
    assert together.store.computed["memory_likelihoods"] == 1


def by_hand(made: CategoryPipeline, joint_epochs: int, depth: int, images: PlacedImages) -> Tensor:
    """The density's maps from flows that ask their memory banks themselves."""
    flows, scales = made.flows(joint_epochs, depth)
    features = made.features(joint_epochs, images)
    likelihoods = [
        level_likelihoods(flow, scale, level, CPU)  # type: ignore[arg-type]
        for flow, scale, level in zip(flows, scales, features, strict=True)
    ]
    return density_map(likelihoods, made.settings.image.size, images.valid)


def test_pipelines_of_other_settings_share_the_features_in_memory(
    pretrained: Backbone, tmp_path: Path
) -> None:
    one = pipeline(pretrained, tmp_path)
    other = one.with_settings(dataclasses.replace(SETTINGS, fusion_weight=0.5))
    kept = one.features(0, one.fit)
    assert other.features(0, other.fit) is kept
    seeded = one.with_settings(dataclasses.replace(SETTINGS, seed=5))
    assert seeded.features(0, seeded.fit) is not kept


# ---- streams ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """IMAGES as files of the canvas's size."""
    folder = tmp_path_factory.mktemp("files")
    for number, image in enumerate(IMAGES):
        write_image(folder / f"{number}.png", image.permute(1, 2, 0).numpy())
    return [str(folder / f"{number}.png") for number in range(N)]


def test_training_from_files_finds_the_artifacts_of_training_in_memory_and_computes_the_same(
    pretrained: Backbone, files: list[str], tmp_path: Path
) -> None:
    def trained(fit: Images, root: Path) -> CategoryPipeline:
        made = CategoryPipeline(SETTINGS, pretrained, data_of(fit), ArtifactStore(root), CPU)
        made.network(1, 0)
        return made

    memory = trained(PlacedImages(IMAGES, None, "six blobs"), tmp_path / "memory")
    streamed = trained(
        StreamedImages(LocalStream(files, SETTINGS.image), "six blobs"), tmp_path / "files"
    )
    first, second = (dict(made.network(1, 0).state_dict()) for made in (memory, streamed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = trained(
        StreamedImages(LocalStream(files, SETTINGS.image), "six blobs"), tmp_path / "memory"
    )
    assert again.store.computed == {}


def test_of_very_many_images_some_fill_the_defects_of_others_and_the_key_says_so(
    pretrained: Backbone, tmp_path: Path
) -> None:
    assert torch.equal(donor_indices(1365, (256, 256)), torch.arange(1365))
    chosen = donor_indices(20_000, (256, 256))
    assert len(chosen) == len(chosen.unique()) == 1365
    assert (int(chosen[0]), int(chosen[-1])) == (0, 19_999)
    few = pipeline(pretrained, tmp_path)
    assert "donors" not in few._stable_phase_content(1, 1)
    many = PlacedImages(IMAGES[:1].expand(50_000, -1, -1, -1), None, "many blobs")
    content = CategoryPipeline(
        SETTINGS, pretrained, data_of(many), ArtifactStore(tmp_path), CPU
    )._stable_phase_content(1, 1)
    assert content["donors"] == 256 * 2**20 // (3 * SIZE[0] * SIZE[1])
