"""Stage one: decoder and backbone learn to tell synthetic defects from normal pixels.

Unusual: the *trunk*. The learning rate rises, then stays constant, so the state after epoch t does
    not depend on where training will end.
Ending at epoch T means leaving the trunk ``decay_epochs`` earlier and letting the learning rate
fall to nothing on a short branch. Runs of different length therefore share all of their trunk:
stored at each leaving point, resumed by whoever trains longer.

With ``schedule="cosine"``, the authors', the rate falls from the first step on, at a pace that
depends on the end: every length is a run of its own, stored on the way only so that a killed one
can go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clsnf.core.config import FinetuneSettings, key_content
from clsnf.core.device import autocast
from clsnf.core.errors import TrainingError
from clsnf.core.progress import Progress, silent
from clsnf.model.backbone import Backbone
from clsnf.model.decoder import PixelDecoder
from clsnf.streams.stream import DefectRecipe, Stream, TrainingBatch
from clsnf.synthesis.training_defects import sample_key
from clsnf.training.artifacts import Artifact, ArtifactStore
from clsnf.training.losses import LOSSES

_WARMUP_STEPS = 20
RESUME_EVERY = 4  # epochs between points at which a killed run can go on


class Finetuner:
    """Trains a decoder on a backbone, epoch by epoch, along the trunk and its branches.

    Args:
        backbone: with its pretrained weights; changed in place.
        decoder: with its initial weights; changed in place.
        stream: brings the normal images.
        recipe: makes the defects.
        settings: learning rates and batches; the number of epochs is the caller's, except that a
            cosine ends at ``settings.epochs``.
        seed: decides order and defects.
        device: where to train.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: PixelDecoder,
        stream: Stream,
        recipe: DefectRecipe,
        settings: FinetuneSettings,
        seed: int,
        device: torch.device,
    ) -> None:
        self.backbone = backbone.to(device).to(memory_format=torch.channels_last)
        self.decoder = decoder.to(device).to(memory_format=torch.channels_last)
        self.stream, self.recipe = stream, recipe
        self.settings, self.seed, self.device = settings, seed, device
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(decoder.parameters()), "base_lr": settings.learning_rate},
                {
                    "params": list(backbone.parameters()),
                    "base_lr": settings.learning_rate * settings.backbone_factor,
                },
            ],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.epoch = 0
        self.losses: list[float] = []

    def run(
        self,
        until: int,
        decay_from: int | None = None,
        progress: Progress = silent,
        task: str = "finetune",
        before_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        """Train up to the end of epoch `until`; on the trunk, from epoch `decay_from` on the
        learning rate falls to nothing.

        Args:
            before_epoch: called before each epoch with the number of those that are done.

        Raises:
            TrainingError: the loss is not finite.
        """
        while self.epoch < until:
            before_epoch(self.epoch)
            loss = self._train_epoch(decay_from, until)
            self.losses.append(loss)
            self.epoch += 1
            progress(task, self.epoch, until)

    def _train_epoch(self, decay_from: int | None, until: int) -> float:
        settings = self.settings
        joint = self.epoch >= settings.frozen_epochs
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(joint)
        self.decoder.train()
        # Each epoch's order comes from its own generator: a resumed run sees what an undisturbed
        # one sees.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.cat(
            [torch.randperm(len(self.stream), generator=generator) for _ in range(settings.repeats)]
        )
        repeat = torch.arange(settings.repeats).repeat_interleave(len(self.stream))
        keys = torch.from_numpy(sample_key(self.seed, self.epoch, order.numpy(), repeat.numpy()))
        # Batches of nearly the same size: a last one of a single image would have poor batch
        # statistics.
        batches = max(1, math.ceil(len(order) / settings.batch_size))
        total = 0.0
        stream = self.stream.training_batches(
            self.recipe, order.tensor_split(batches), keys.tensor_split(batches), self.device
        )
        for number, batch in enumerate(stream):
            position = self.epoch + number / batches
            self._set_learning_rate(position, self.epoch * batches + number, decay_from, until)
            total += self._step(batch, joint) * len(batch.indices)
        return total / len(order)

    def _set_learning_rate(
        self, position: float, step: int, decay_from: int | None, until: int
    ) -> None:
        if self.settings.schedule == "cosine":
            scale = cosine_scale(position / self.settings.epochs)
        else:
            scale = min(1.0, (step + 1) / _WARMUP_STEPS)
            if decay_from is not None and position >= decay_from:
                scale *= max(1e-3, 1.0 - (position - decay_from) / (until - decay_from))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale

    def _step(self, batch: TrainingBatch, joint: bool) -> float:
        images = batch.defects.images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device):
            with torch.set_grad_enabled(joint):
                features = self.backbone(images)
            logits = self.decoder(features).float()
        loss = LOSSES[self.settings.loss](logits, batch.defects, batch.valid, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"The classifier's loss became {value} in epoch {self.epoch + 1}: lower "
                "finetune.learning_rate "
                f"(now {self.settings.learning_rate})."
            )
        return value

    def stage(self) -> Artifact:
        """Everything that training needs to go on from here."""
        tensors = {f"backbone.{name}": value for name, value in self.backbone.state_dict().items()}
        tensors |= {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()
            }
        return Artifact(tensors, {"epoch": self.epoch, "losses": self.losses})

    def restore(self, stage: Artifact) -> None:
        """Go back to a state that :meth:`stage` gave."""
        self.backbone.load_state_dict(part(stage.tensors, "backbone."))
        self.decoder.load_state_dict(part(stage.tensors, "decoder."))
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in part(stage.tensors, "optimizer.").items():
            index, _, entry = name.partition(".")
            states.setdefault(int(index), {})[entry] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})
        self.epoch = int(stage.facts["epoch"])
        self.losses = list(stage.facts["losses"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def cosine_scale(done: float) -> float:
    """The authors' learning rate as a share of its start: a cosine from 1 at the beginning, `done`
    0, to 1e-3 at the end, `done` 1.
    """
    return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


def decay_start(settings: FinetuneSettings) -> int:
    """The epoch at which a run of ``settings.epochs`` epochs leaves what is stored of it on the
    way.

    On the trunk that is where its rate begins to fall. A cosine shares nothing, so the point serves
    resumption alone: the last few epochs need no copy of their own beside the finished run.
    """
    return max(
        0,
        settings.epochs
        - (RESUME_EVERY if settings.schedule == "cosine" else settings.decay_epochs),
    )


def trunk_content(settings: FinetuneSettings) -> dict[str, object]:
    """What decides the state after an epoch before :func:`decay_start`.

    All settings but those that only say where the trunk is left; of a cosine all, because its rate
    depends on the end from the start.
    """
    content: dict[str, object] = key_content(settings)
    if settings.schedule != "cosine":
        del content["joint_epochs"], content["decay_epochs"]
    return content


def train_trunk(
    make: Callable[[], Finetuner],
    store: ArtifactStore,
    content: Callable[[int], Mapping[str, Any]],
    until: int,
    stops: Collection[int] = (),
    progress: Progress = silent,
) -> Finetuner:
    """A finetuner at trunk epoch `until`, resumed from the latest stored epoch.

    Args:
        make: gives a finetuner at epoch 0.
        store: where trunks lie.
        content: what decides the trunk at an epoch.
        until: where to stop; stored too.
        stops: epochs on the way at which others will want to leave: stored when passed. Runs that
            go on at the same time and know the same stops train each part of the trunk once.
            Between them the trunk is stored every few epochs until the next one is, so that a run
            that is killed loses little.
        progress: told after every epoch.
    """
    finetuner = make()
    for epoch in range(until, 0, -1):
        stage = store.find("trunk", store.key(content(epoch)))
        if stage is not None:
            finetuner.restore(stage)
            break

    def train_to(stop: int) -> Artifact:
        finetuner.run(stop, progress=progress)
        return finetuner.stage()

    start = finetuner.epoch
    kept = {s for s in stops if start < s < until} | {until}
    passing = set(range(start + RESUME_EVERY, until, RESUME_EVERY)) - kept
    last_passing: int | None = None
    for stop in sorted(kept | passing):
        if finetuner.epoch < stop:
            stage = store.get("trunk", content(stop), partial(train_to, stop))
            if finetuner.epoch < stop:  # another process was there first
                finetuner.restore(stage)
        if last_passing is not None:
            store.drop("trunk", content(last_passing))
        last_passing = stop if stop in passing else None
    return finetuner
