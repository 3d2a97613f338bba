"""The parts of serving by themselves: batches, models in memory, thresholds, tensors, settings."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.core.errors import ClsnfError, ModelError, SettingsError
from clsnf.core.files import write_json
from clsnf.detector import Detector
from clsnf.serving.batching import Batcher
from clsnf.serving.catalogue import read_catalogue
from clsnf.serving.errors import (
    BadRequest,
    Busy,
    Late,
    RequestError,
    TooLarge,
    Unavailable,
    WrongParameters,
)
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings
from clsnf.serving.store import ModelStore, load_detector
from clsnf.serving.tensors import OUTPUTS, read_question, write_answer
from clsnf.serving.thresholds import Thresholds
from clsnf.serving.tokens import read_token
from tests.support.small_server import encoded, picture, small_settings

# ---- batches ----


class Recorder:
    """Doubles numbers, notes its batches, and computes only while the gate is open."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, key: str, items: Sequence[int]) -> list[int]:
        self.entered.release()
        assert self.gate.wait(60)
        self.batches.append((key, list(items)))
        if 13 in items:
            raise ClsnfError("thirteen")
        return [2 * item for item in items]


def batched(
    work: Callable[[Batcher[str, int, int], Recorder], Any], size: int = 4, wait: float = 0.0
) -> Recorder:
    run = Recorder()

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher: Batcher[str, int, int] = Batcher(run, executor, size, wait)
            try:
                await work(batcher, run)
            finally:
                run.gate.set()
                await batcher.close()

    asyncio.run(main())
    return run


def test_what_waits_while_the_network_is_busy_goes_together_and_models_take_turns() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.to_thread(run.entered.acquire)
        rest = [
            asyncio.create_task(batcher.submit(key, [i]))
            for i, key in enumerate("abababbaaaa", start=2)
        ]
        await asyncio.sleep(0)
        run.gate.set()
        assert list(await first) == [2]
        assert [list(r) for r in await asyncio.gather(*rest)] == [[2 * i] for i in range(2, 13)]

    run = batched(work)
    assert run.batches == [
        ("a", [1]),
        ("a", [2, 4, 6, 9]),
        ("b", [3, 5, 7, 8]),
        ("a", [10, 11, 12]),
    ]


def test_a_requests_images_stay_together_and_one_that_fails_hurts_its_batch_alone() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        groups = [[1, 2, 3], [4, 5], [13], [6], [21, 22, 23, 24, 25, 26]]
        tasks = [asyncio.create_task(batcher.submit("a", group)) for group in groups]
        run.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert list(found[0]) == [2, 4, 6]  # type: ignore[arg-type]
        assert all(isinstance(result, ClsnfError) for result in found[1:4])
        # more than a batch holds
        assert list(found[4]) == [42, 44, 46, 48, 50, 52]  # type: ignore[arg-type]
        assert list(await batcher.submit("a", [7])) == [14]

    run = batched(work)
    assert [items for _, items in run.batches] == [
        [1, 2, 3],
        [4, 5, 13, 6],
        [21, 22, 23, 24, 25, 26],
        [7],
    ]


def test_who_has_given_up_costs_nothing() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.to_thread(run.entered.acquire)
        gone = asyncio.create_task(batcher.submit("a", [2]))
        kept = asyncio.create_task(batcher.submit("a", [3]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        run.gate.set()
        await asyncio.gather(first, kept)

    assert [items for _, items in batched(work).batches] == [[1], [3]]


def test_a_batch_that_may_wait_fills_up() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        run.gate.set()
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [asyncio.create_task(batcher.submit("a", [i])) for i in (2, 3, 4)]
        await asyncio.gather(first, *rest)

    assert [items for _, items in batched(work, wait=60).batches] == [[1, 2, 3, 4]]


# ---- models ----


def opened(folder: Path, memory: int = 2**30, loads: list[str] | None = None) -> ModelStore:
    def load(entry: Any) -> Detector:
        if loads is not None:
            loads.append(entry.category)
        return load_detector(entry, "cpu")

    store = ModelStore(memory, load)
    store.roll(folder)
    return store


def test_models_load_once_on_their_first_use_and_the_least_recently_used_makes_room(
    winners: Path,
) -> None:
    sizes = {name: entry.size for name, entry in read_catalogue(winners).entries.items()}
    loads: list[str] = []

    async def use(store: ModelStore, *names: str) -> list[str]:
        await asyncio.gather(*(store.get(name) for name in names))
        return [model.entry.category for model in store.loaded]

    roomy = opened(winners, loads=loads)
    assert loads == []
    assert sorted(asyncio.run(use(roomy, "plate", "plate", "sheet", "plate"))) == ["plate", "sheet"]
    assert sorted(loads) == ["plate", "sheet"]
    tight = opened(winners, memory=max(sizes.values()) + 1000)
    assert asyncio.run(use(tight, "plate")) == ["plate"]
    assert asyncio.run(use(tight, "sheet")) == ["sheet"]
    with pytest.raises(SettingsError, match="memory_mb"):
        opened(winners, memory=1000)


def test_preloading_takes_as_many_models_as_fit(winners: Path) -> None:
    largest = max(entry.size for entry in read_catalogue(winners).entries.values())
    for memory, count in ((2**30, 2), (largest + 1000, 1)):
        store = ModelStore(memory, lambda entry: load_detector(entry, "cpu"))
        store.roll(winners, preload=True)
        assert len(store.loaded) == count


def test_new_winners_roll_in_with_what_is_in_use_loaded_and_roll_back(
    winners: Path, tmp_path: Path
) -> None:
    new = tmp_path / "winners"
    shutil.copytree(winners, new)
    better = Detector.load(new / "plate", device="cpu")
    better.calibrate(false_reject_rate=0.4)
    better.save(new / "plate")
    loads: list[str] = []
    store = opened(winners, loads=loads)
    before = asyncio.run(store.get("plate"))
    store.roll(new)
    assert loads == ["plate", "plate"], "what is in use is loaded before the change"
    after = asyncio.run(store.get("plate"))
    assert after.entry.version != before.entry.version
    assert after.detector.threshold == better.threshold
    assert [m.entry.version for m in store.loaded] == [after.entry.version], "the old one goes"
    store.roll(winners)
    assert asyncio.run(store.get("plate")).entry.version == before.entry.version


def test_winners_that_cannot_be_loaded_are_refused_and_those_of_before_serve_on(
    winners: Path, tmp_path: Path
) -> None:
    store = opened(winners)
    asyncio.run(store.get("plate"))
    damaged = tmp_path / "winners"
    shutil.copytree(winners, damaged)
    better = Detector.load(damaged / "plate", device="cpu")
    better.calibrate(
        false_reject_rate=0.4
    )  # another version: one that is loaded already would not be read again
    better.save(damaged / "plate")
    tensors = damaged / "plate" / "detector.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    for folder, words in (
        (damaged, "damaged"),
        (tmp_path / "none", "can't be read"),
        (tmp_path, "no saved detectors"),
    ):
        with pytest.raises(ClsnfError, match=words):
            store.roll(folder)
        assert words in str(store.refused)
        assert store.catalogue.folder == winners
    store.roll(winners)
    assert store.refused is None


def test_a_model_that_is_damaged_later_is_an_answer_not_a_crash(
    winners: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "winners"
    shutil.copytree(winners, copy)
    store = opened(copy)
    (copy / "plate" / "detector.safetensors").write_bytes(b"gone")
    with pytest.raises(Unavailable, match="plate"):
        asyncio.run(store.get("plate"))
    assert asyncio.run(store.get("sheet")).entry.category == "sheet"


def test_a_catalogue_reads_one_detector_or_many_and_no_link_out_of_the_folder(
    winners: Path, tmp_path: Path
) -> None:
    assert read_catalogue(winners / "plate").categories == ["plate"]
    shutil.copytree(winners / "plate", tmp_path / "models" / "plate")
    (tmp_path / "models" / "elsewhere").symlink_to(winners / "sheet")
    assert read_catalogue(tmp_path / "models").categories == ["plate"]
    facts = tmp_path / "models" / "plate" / "detector.json"
    content = json.loads(facts.read_text())
    del content["threshold"]
    write_json(facts, content)
    with pytest.raises(ModelError, match="threshold"):
        read_catalogue(tmp_path / "models")


def test_figures_of_the_study_are_shown_where_its_summary_lies_beside(
    winners: Path, tmp_path: Path
) -> None:
    shutil.copytree(winners, tmp_path / "winners")
    test = {"figures": {"image_auroc": 0.9, "pixel_ap": None}}
    write_json(
        tmp_path / "summary.json",
        {"categories": {"plate": {"test": test}, "sheet": {"test": None}}},
    )
    entries = read_catalogue(tmp_path / "winners").entries
    assert entries["plate"].figures == {"image_auroc": 0.9}
    assert entries["sheet"].figures == {}


# ---- thresholds ----


def test_a_value_holds_for_its_version_a_rate_for_every_one(winners: Path, tmp_path: Path) -> None:
    entry = read_catalogue(winners).entries["plate"]
    detector = Detector.load(entry.folder, device="cpu")
    first, second = Thresholds(tmp_path), Thresholds(tmp_path)
    assert first.in_force(entry, detector).source == "model"
    first.set(entry, value=0.5)
    second.refresh()
    assert (second.in_force(entry, detector).value, second.in_force(entry, detector).source) == (
        0.5,
        "value",
    )
    other = dataclasses.replace(entry, version="another")
    assert second.in_force(other, detector).source == "model", (
        "a value means nothing on another model's scale"
    )
    second.set(entry, false_reject_rate=0.3)
    first.refresh()
    for version in (entry, other):
        assert first.in_force(version, detector).threshold.false_reject_rate == 0.3
    first.set(entry)
    assert Thresholds(tmp_path).in_force(entry, detector).threshold == entry.threshold


def test_thresholds_that_cannot_be_kept_or_read_say_so(winners: Path, tmp_path: Path) -> None:
    entry = read_catalogue(winners).entries["plate"]
    kept = Thresholds(tmp_path / "state")
    (tmp_path / "state").write_text("a file in the folder's place")
    with pytest.raises(Unavailable, match="nothing was changed"):
        kept.set(entry, value=0.5)
    with pytest.raises(WrongParameters):
        Thresholds(tmp_path).set(entry, value=1.5)
    (tmp_path / "thresholds.json").write_text("{")
    with pytest.raises(SettingsError, match="damaged"):
        Thresholds(tmp_path)


# ---- the service ----


def serving(settings_: ServingSettings, work: Callable[[InspectionService], Any]) -> Any:
    async def main() -> Any:
        service = InspectionService(settings_)
        await service.start()
        try:
            return await work(service)
        finally:
            await service.close()

    return asyncio.run(main())


def test_a_full_queue_says_when_to_come_again_and_a_late_answer_is_none(
    winners: Path, tmp_path: Path
) -> None:
    made = small_settings(
        winners, state=str(tmp_path), queue=2, images_per_request=2, deadline_s=0.5
    )
    gate = threading.Event()

    async def work(service: InspectionService) -> None:
        look = service._look

        def slow(model: Any, pictures: Any) -> Any:
            assert gate.wait(60)
            return look(model, pictures)

        service._batcher._run = slow
        image = [("a", encoded(picture()))]
        loop = asyncio.get_running_loop()

        async def late() -> None:
            async with service.before(loop.time() + 0.5):
                await service.inspect("plate", image * 2)

        first = asyncio.create_task(late())
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 images wait") as caught:
            await service.inspect("plate", image)
        assert int(caught.value.headers["Retry-After"]) >= 1
        with pytest.raises(Late, match="within"):
            await first
        gate.set()
        assert len(await service.inspect("plate", image)) == 1, "room is given back"
        with pytest.raises(TooLarge):
            await service.inspect("plate", image * 3)

    serving(made, work)


def test_mixed_precision_stays_close(winners: Path, tmp_path: Path) -> None:
    async def scores(service: InspectionService) -> list[float]:
        images = [(str(i), encoded(picture(i))) for i in range(4)]
        return [a.fields["score"] for a in await service.inspect("plate", images)]

    found = {
        precision: serving(
            small_settings(winners, state=str(tmp_path), precision=precision), scores
        )
        for precision in ("float32", "mixed")
    }
    assert found["mixed"] != found["float32"]
    np.testing.assert_allclose(found["mixed"], found["float32"], atol=0.02)


def test_a_threshold_that_another_replica_was_told_holds_soon(
    winners: Path, tmp_path: Path
) -> None:
    made = small_settings(winners, state=str(tmp_path))

    async def work(service: InspectionService) -> None:
        Thresholds(tmp_path).set(service.store.entry("plate"), value=0.123)
        async with asyncio.timeout(60):
            while "plate" not in service.thresholds.settings:
                await asyncio.sleep(0.05)

    serving(made, work)


# ---- tensors ----


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.booleans())
def test_files_survive_the_way_through_the_protocol(files: list[bytes], binary: bool) -> None:
    packed = b"".join(len(f).to_bytes(4, "little") + f for f in files)
    tensor: dict[str, Any] = {"name": "files", "datatype": "BYTES", "shape": [len(files)]}
    if binary:
        tensor["parameters"] = {"binary_data_size": len(packed)}
    else:
        tensor["data"] = [base64.b64encode(f).decode() for f in files]
    text = json.dumps({"inputs": [tensor]}).encode()
    question = read_question(text + packed if binary else text, str(len(text)) if binary else None)
    assert list(question.images) == files
    assert set(question.outputs) == set(OUTPUTS)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from(["images", "UINT8", "files"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "inputs",
                        "name",
                        "shape",
                        "datatype",
                        "data",
                        "parameters",
                        "outputs",
                        "binary_data_size",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    ),
    st.none() | st.text(max_size=4),
)
@settings(max_examples=300)
def test_what_is_no_question_is_refused_never_a_crash(content: Any, length: str | None) -> None:
    for wrapped in (content, {"inputs": [content]}, {"inputs": content}):
        with pytest.raises(BadRequest):
            read_question(json.dumps(wrapped).encode(), length)


def test_answers_come_as_text_or_binary_as_asked() -> None:
    tensors = {name: np.arange(2) for name in OUTPUTS} | {"map": np.ones((2, 3, 4))}
    body, length = write_answer({"model_name": "x"}, tensors, {"score": False, "map": True})
    assert length is not None
    head = json.loads(body[:length])
    assert head["outputs"][0]["data"] == [0.0, 1.0]
    assert head["outputs"][1]["shape"] == [2, 3, 4]
    np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4"), np.ones(24))


# ---- settings and tokens ----


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch_sise": 3}, "batch_size"),
        ({"queue": 1}, "images_per_request"),
        ({"max_replicas": 0}, "min_replicas"),
        ({"precision": "half"}, "float32"),
        ({"deadline_s": "x"}, "float"),
        ({"models": "/none"}, "no folder of models"),
        ({"models": ""}, "no models"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(
    winners: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        ServingSettings.from_args({"models": str(winners)} | wrong)
    assert "\n" not in str(caught.value)


def test_arguments_of_the_command_line_are_texts(winners: Path) -> None:
    made = small_settings(winners, batch_size="8", preload="true", deadline_s="2.5", device="cpu")
    assert (made.batch_size, made.preload, made.deadline_s) == (8, True, 2.5)
    assert made.state == str(winners.parent / "serving")


def test_the_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLSNF_TOKEN_FILE", raising=False)
    monkeypatch.setenv("CLSNF_TOKEN", "from the environment")
    assert read_token(None) == "from the environment"
    (tmp_path / "token").write_text("from a file of some length\n")
    assert read_token(str(tmp_path / "token")) == "from a file of some length"
    (tmp_path / "token").write_text("short")
    with pytest.raises(SettingsError, match="16"):
        read_token(str(tmp_path / "token"))
    with pytest.raises(SettingsError, match="can't be read"):
        read_token(str(tmp_path / "none"))


def test_all_refusals_have_a_status_of_the_request_or_of_the_moment() -> None:
    import clsnf.serving.errors as module

    kinds = [
        k for k in vars(module).values() if isinstance(k, type) and issubclass(k, RequestError)
    ]
    assert {kind.status for kind in kinds} == {
        400,
        401,
        403,
        404,
        406,
        408,
        413,
        415,
        422,
        429,
        503,
        504,
    }


def test_the_documentation_lists_every_setting_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for field in dataclasses.fields(ServingSettings):
        assert f"| `{field.name}` |" in page
        assert field.metadata["help"] in page


@pytest.mark.parametrize("name", ["config.yaml", "rayservice.yaml"])
def test_the_files_for_deployments_name_settings_that_exist(name: str, winners: Path) -> None:
    content = yaml.safe_load((Path(__file__).parents[2] / "serve" / name).read_text())
    config = yaml.safe_load(content["spec"]["serveConfigV2"]) if "spec" in content else content
    (application,) = config["applications"]
    assert application["import_path"] == "clsnf.serving.deployment:app"
    ServingSettings.from_args(application["args"] | {"models": str(winners)})
    (deployment,) = application["deployments"]
    assert set(deployment["user_config"]) == {"models"}
