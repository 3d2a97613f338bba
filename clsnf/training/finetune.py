"""Stage one: decoder and backbone learn to tell synthetic defects from normal pixels.

The default learning-rate schedule is warm-up, stable, decay (WSD): the rate rises over a few
steps, then stays constant (the stable phase), then falls to 0 over the last ``decay_epochs``
epochs. In the stable phase the state after an epoch does not depend on where training will end.
Runs of different length therefore share the stable phase: it is stored where a run's decay starts,
and a longer run resumes it there.

With ``schedule="cosine"``, the authors', the rate falls from the first step on, at a pace that
depends on the end. Runs of different length share nothing; states on the way are stored only so
that a killed run can resume.
"""

from __future__ import annotations

import dataclasses
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
from clsnf.model.layer_groups import network_layers
from clsnf.model.layers import to_channels_last
from clsnf.model.network import to_network_input
from clsnf.streams.stream import DefectRecipe, Stream, TrainingBatch
from clsnf.synthesis.training_defects import sample_key
from clsnf.training.artifacts import Artifact, ArtifactStore
from clsnf.training.losses import LOSSES

STABLE_PHASE = "trunk"  # the kind of its artifacts: an earlier name, by which stored ones are found
RESUME_EVERY = 4  # epochs between stored states from which a killed run resumes
_WARMUP_STEPS = 20


class Finetuner:
    """Trains a decoder and its backbone, epoch by epoch.

    Args:
        backbone: with its pretrained weights; changed in place.
        decoder: with its initial weights; changed in place.
        stream: brings the normal images.
        recipe: makes the defects.
        settings: learning rates and batches. The caller decides the number of epochs, but a cosine
            always ends at ``settings.epochs``.
        seed: decides order and defects.
        device: where to train.

    Attributes:
        epoch: number of epochs done.
        losses: mean loss of each epoch done.
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
        self.backbone = to_channels_last(backbone.to(device))
        self.decoder = to_channels_last(decoder.to(device))
        self.stream, self.recipe = stream, recipe
        self.settings, self.seed, self.device = settings, seed, device
        # The decoder comes first: states of the frozen epochs, which hold nothing of the backbone,
        # then fit every choice of layers.
        groups = [
            {"params": list(decoder.parameters()), "base_lr": settings.learning_rate},
            *self._backbone_groups(),
        ]
        self._trained = [parameter for group in groups[1:] for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(
            groups,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.epoch = 0
        self.losses: list[float] = []

    def _backbone_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of the backbone's parameters, each with its learning rate."""
        settings = self.settings
        rate = settings.learning_rate * settings.backbone_factor
        if settings.trained_layers == 0:
            return []
        if settings.trained_layers is None and settings.layer_decay == 1:
            return [{"params": list(self.backbone.parameters()), "base_lr": rate}]
        image = to_network_input(self.stream.take(torch.tensor([0])), self.device)
        layers = network_layers(self.backbone, image)[::-1][: settings.trained_layers]
        return [
            {"params": layer, "base_lr": rate * settings.layer_decay**n}
            for n, layer in enumerate(layers)
        ]

    def run(
        self,
        until: int,
        decay_from: int | None = None,
        progress: Progress = silent,
        task: str = "finetune",
        before_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        """Train until `until` epochs are done.

        Args:
            until: number of epochs.
            decay_from: the epoch from which the learning rate of WSD falls to 0 at `until`; None
                for a run that ends in the stable phase. A cosine ignores it.
            progress: called after every epoch.
            task: the name of this work in `progress`.
            before_epoch: called before each epoch with the number of epochs done.

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
        joint = self.epoch >= settings.frozen_epochs and bool(self._trained)
        self.backbone.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(joint)
        self.decoder.train()
        # Each epoch's order has a generator of its own, so a resumed run sees the same images.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.cat(
            [torch.randperm(len(self.stream), generator=generator) for _ in range(settings.repeats)]
        )
        repeat = torch.arange(settings.repeats).repeat_interleave(len(self.stream))
        keys = torch.from_numpy(sample_key(self.seed, self.epoch, order.numpy(), repeat.numpy()))
        # Batches of nearly equal size: a last batch of one image would have poor batch statistics.
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
                f"finetune.learning_rate (now {self.settings.learning_rate})."
            )
        return value

    def state(self) -> Artifact:
        """Everything that training needs to resume from here."""
        tensors = {f"backbone.{name}": value for name, value in self.backbone.state_dict().items()}
        tensors |= {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()
            }
        return Artifact(tensors, {"epoch": self.epoch, "losses": self.losses})

    def restore(self, state: Artifact) -> None:
        """Go back to a state that :meth:`state` gave."""
        self.backbone.load_state_dict(without_prefix(state.tensors, "backbone."))
        self.decoder.load_state_dict(without_prefix(state.tensors, "decoder."))
        optimizer: dict[int, dict[str, Tensor]] = {}
        for name, value in without_prefix(state.tensors, "optimizer.").items():
            index, _, entry = name.partition(".")
            optimizer.setdefault(int(index), {})[entry] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        self.epoch = int(state.facts["epoch"])
        self.losses = list(state.facts["losses"])


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, under their names without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def cosine_scale(done: float) -> float:
    """The cosine schedule: the learning rate as a share of its start, from 1 to 1e-3.

    Args:
        done: the share of training that is done, from 0 to 1.
    """
    return 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


def decay_start(settings: FinetuneSettings) -> int:
    """The epoch at which the learning rate of a run of ``settings.epochs`` epochs starts to decay.

    Up to there the run's states are stored. With ``cosine``, which has no such epoch, it is the
    last epoch at which storing a state is worth it: ``RESUME_EVERY`` before the end.
    """
    last = RESUME_EVERY if settings.schedule == "cosine" else settings.decay_epochs
    return max(0, settings.epochs - last)


def stable_phase_content(settings: FinetuneSettings, epoch: int) -> dict[str, Any]:
    """What decides the state after `epoch` epochs of the stable phase, as plain JSON types.

    All settings but those that say where the stable phase ends, and in the frozen epochs without
    the layers that train afterwards. With ``cosine``, all: its rate depends on the end from the
    first step on.
    """
    if settings.schedule == "cosine":
        return key_content(settings)
    joint_epochs = max(0, epoch - settings.frozen_epochs)
    content = key_content(dataclasses.replace(settings, joint_epochs=joint_epochs))
    del content["joint_epochs"], content["decay_epochs"]
    return content


def train_stable_phase(
    make: Callable[[], Finetuner],
    store: ArtifactStore,
    content: Callable[[int], Mapping[str, Any]],
    until: int,
    decay_starts: Collection[int] = (),
    progress: Progress = silent,
) -> Finetuner:
    """A finetuner after `until` epochs of the stable phase, resumed from the latest stored state.

    Between the states that stay, one is stored every ``RESUME_EVERY`` epochs, and dropped when the
    next one is stored, so that a killed run loses little.

    Args:
        make: gives a finetuner at epoch 0.
        store: keeps the states.
        content: what decides the state after an epoch.
        until: number of epochs; the state after them is stored too.
        decay_starts: epochs at which the decay of other runs starts. The states there are stored on
            the way. Runs at the same time that know the same ones train each epoch once.
        progress: called after every epoch.
    """
    finetuner = make()
    for epoch in range(until, 0, -1):
        state = store.find(STABLE_PHASE, store.key(content(epoch)))
        if state is not None:
            finetuner.restore(state)
            break

    def train_to(epoch: int) -> Artifact:
        finetuner.run(epoch, progress=progress)
        return finetuner.state()

    first = finetuner.epoch
    kept = {epoch for epoch in decay_starts if first < epoch < until} | {until}
    passing = set(range(first + RESUME_EVERY, until, RESUME_EVERY)) - kept
    last_passing: int | None = None
    for epoch in sorted(kept | passing):
        if finetuner.epoch < epoch:
            state = store.get(STABLE_PHASE, content(epoch), partial(train_to, epoch))
            if finetuner.epoch < epoch:  # another process was faster
                finetuner.restore(state)
        if last_passing is not None:
            store.drop(STABLE_PHASE, content(last_passing))
        last_passing = epoch if epoch in passing else None
    return finetuner
