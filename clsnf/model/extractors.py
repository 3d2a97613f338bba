"""timm's feature extractors: any architecture that gives feature maps, built for levels and a
canvas.

Questions about levels and sizes are answered on PyTorch's meta device: the network is built and run
without memory for its tensors, in a fraction of a second, however large it is.

Unusual: timm's function that brings weights of other sizes and of the original repositories into
the network's form can't be asked for by name. It is taken where timm hands it to its loader
(:func:`build_for_states`). Called by :mod:`clsnf.model.backbone` and
:mod:`clsnf.model.backbone_weights`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clsnf.core.errors import SettingsError, first_line

Canvas = tuple[int, int]  # (height, width) in pixels
State = dict[str, Tensor]

_STEPS_AWAY = 8  # how far from a canvas sizes_near looks, in steps of the network's stride
_build_lock = threading.RLock()


def build_extractor(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, **arguments: Any
) -> nn.Module:
    """timm's feature extractor with random weights.

    Args:
        architecture: timm's name.
        levels: numbers of its feature maps, shallow to deep.
        canvas: (height, width) of its input in pixels.
        arguments: more of ``timm.create_model``.

    Raises:
        SettingsError: the model gives no feature maps, or not those levels, or does not take that
            canvas.
    """
    try:
        return _create(architecture, levels, canvas, **arguments)
    except Exception as error:  # timm's models raise anything from AssertionError to TypeError
        raise _refusal(architecture, levels, canvas, error) from error


def build_for_states(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, states: Sequence[State]
) -> tuple[nn.Module, list[State]]:
    """timm's feature extractor, and states under the names that it has for them.

    Args:
        architecture, levels, canvas: see :func:`build_extractor`.
        states: each a whole state dict with names of timm or of the model's original repository.

    Returns:
        The extractor, still with random weights, and of each state what the extractor has too:
        tables that depend on the size are resampled as timm does it. A state that timm's converter
        can't read is empty.

    Raises:
        SettingsError: see :func:`build_extractor`.
    """
    try:
        return _create_for_states(architecture, levels, canvas, states)
    except Exception as error:  # see build_extractor
        raise _refusal(architecture, levels, canvas, error) from error


@functools.lru_cache(maxsize=1024)
def takes(architecture: str, levels: tuple[int, ...], canvas: Canvas) -> bool:
    """Whether a model gives these levels for a canvas, with weights that were trained at its own
    size. False too where it has no such levels.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            extractor, (state,) = _create_for_states(
                architecture, levels, canvas, [_pretraining_state(architecture)]
            )
            patch = patch_size(extractor)
            if misfits(extractor, state) or any(c % p for c, p in zip(canvas, patch, strict=True)):
                return False
            if any(isinstance(module, nn.LSTM) for module in extractor.modules()):
                return True  # takes any length, and a forward pass on meta unrolls it for minutes
            return len(extractor(torch.zeros(1, 3, *canvas))) == len(levels)
    except Exception:  # see build_extractor
        return False


def sizes_near(architecture: str, levels: tuple[int, ...], canvas: Canvas) -> tuple[Canvas, ...]:
    """The nearest smaller and the nearest larger canvas that a model takes (:func:`takes`).

    Fewer than two where it takes none near, on one side or on both. The size of its pretraining is
    always looked at.
    """
    own = own_canvas(architecture)
    try:
        with torch.device("meta"):
            step = math.lcm(*_create(architecture, levels, own).feature_info.reduction())  # type: ignore[operator, union-attr]
    except Exception:  # see build_extractor
        return ()
    area = canvas[0] * canvas[1]
    smaller = [_stepped(canvas, step, -k) for k in range(_STEPS_AWAY)]
    larger = [_stepped(canvas, step, k + 1) for k in range(_STEPS_AWAY)]
    found = []
    for candidates in (smaller, larger):
        every = {c for h, w in candidates for c in ((h, w), (h, h), (w, w)) if min(c) >= step}
        if (own[0] * own[1] > area) == (candidates is larger):
            every.add(own)
        nearest_first = sorted(every - {canvas}, key=lambda c: (abs(c[0] * c[1] - area), c))
        found += [c for c in nearest_first if takes(architecture, levels, c)][:1]
    return tuple(found)


def size_error(architecture: str, levels: tuple[int, ...], canvas: Canvas) -> SettingsError:
    """What to say where a model does not take a canvas."""
    near = sizes_near(architecture, levels, canvas)
    asked = _as_text(canvas)
    if near == (own_canvas(architecture),):
        fixed = _as_text(near[0])
        return SettingsError(
            f"Backbone {architecture!r} is fixed to {fixed} pixels, not {asked}: give "
            f"--image-size {_as_option(near[0])}, or choose another --backbone."
        )
    if not near:
        return SettingsError(
            f"Backbone {architecture!r} can't take images of {asked} pixels, nor of sizes near: "
            "choose another --image-size or --backbone."
        )
    sizes = " and ".join(map(_as_text, near))
    options = " or ".join(map(_as_option, near))
    return SettingsError(
        f"Backbone {architecture!r} can't take images of {asked} pixels, the nearest that it can "
        f"are of {sizes}: give --image-size {options}."
    )


def own_canvas(architecture: str) -> Canvas:
    """(height, width) that a model's weights were trained at, as timm's configuration has it."""
    import timm

    configuration = timm.get_pretrained_cfg(architecture)
    height, width = configuration.input_size[1:] if configuration else (224, 224)
    return height, width


def misfits(extractor: nn.Module, state: State) -> list[str]:
    """What keeps a state with the extractor's names from filling it: missing names, and shapes."""
    problems = []
    for name, tensor in extractor.state_dict().items():
        shown, found = name.removeprefix("model.").removeprefix("body."), state.get(name)
        if found is None:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{shown} {tuple(tensor.shape)} is missing")
        elif found.shape != tensor.shape:
            problems.append(f"{shown} is {tuple(found.shape)}, not {tuple(tensor.shape)}")
    return problems


def patch_size(extractor: nn.Module) -> Canvas:
    """What a canvas must be a multiple of, so that patches cover it; (1, 1) without patches."""
    for module in extractor.modules():
        if hasattr(module, "patch_size") and hasattr(module, "grid_size"):
            size: Any = module.patch_size
            height, width = size if isinstance(size, tuple) else (size, size)
            return height, width
    return 1, 1


def level_count(architecture: str) -> int:
    """How many levels a model has; 0 if it gives no feature maps."""
    import timm

    try:
        with torch.device("meta"):
            info: Any = timm.create_model(architecture).feature_info
            return len(info)
    except Exception:  # see build_extractor
        return 0


def _create(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, **arguments: Any
) -> nn.Module:
    import timm

    arguments |= {"features_only": True, "out_indices": levels}
    try:
        # Transformers are built for one image size.
        return timm.create_model(architecture, img_size=canvas, **arguments)
    except TypeError:
        return timm.create_model(architecture, **arguments)  # it knows no img_size


def _create_for_states(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, states: Sequence[State]
) -> tuple[nn.Module, list[State]]:
    names: dict[int, str] = {}
    converted: list[State] = []
    kept_alive: list[Tensor] = []  # an id belongs to one tensor while that tensor lives

    def take(network: nn.Module, convert: Callable[[State], State]) -> None:
        tensors = network.state_dict(keep_vars=True)
        kept_alive.extend(tensors.values())
        names.update((id(tensor), name) for name, tensor in tensors.items())
        converted.extend(_converted(state, convert) for state in states)

    with _taking_what_timm_would_load(take):
        extractor = _create(architecture, levels, canvas, pretrained=True)
    tensors = extractor.state_dict(keep_vars=True)
    own = {name: names[id(t)] for name, t in tensors.items() if id(t) in names}
    # What timm made anew for the levels (EfficientViM's weights of its heads) decides no map.
    anew = {name: t.detach() for name, t in tensors.items() if id(t) not in names}
    found = [
        anew | {name: state[whole] for name, whole in own.items() if whole in state}
        if state
        else {}
        for state in converted
    ]
    return extractor, found


def _refusal(
    architecture: str, levels: tuple[int, ...], canvas: Canvas, error: Exception
) -> SettingsError:
    """Say which it is: no feature maps at all, not these levels, or not this size."""
    count = level_count(architecture)
    if count and max(levels) < count and canvas != own_canvas(architecture):
        try:
            with torch.device("meta"):
                _create(architecture, levels, own_canvas(architecture))
            return size_error(architecture, levels, canvas)
        except Exception:  # see build_extractor
            pass
    wanted = ",".join(map(str, levels))
    if count and max(levels) >= count:
        reason = f"it has levels 0 to {count - 1}, choose --levels among them"
    else:
        reason = f"{first_line(error)[:160]}; choose another --backbone"
    return SettingsError(
        f"Backbone {architecture!r} gives no feature maps for levels {wanted}: {reason}."
    )


@functools.lru_cache(maxsize=4)
def _pretraining_state(architecture: str) -> State:
    """A state as its file has it: names and shapes, on the meta device."""
    import timm

    with torch.device("meta"):
        return dict(timm.create_model(architecture).state_dict())


@contextmanager
def _taking_what_timm_would_load(
    take: Callable[[nn.Module, Callable[[State], State]], None],
) -> Iterator[None]:
    """Hand each network that this thread builds to `take` in place of timm's loader.

    `take` gets the whole network, before the parts that no level uses are dropped, and timm's
    converter of states for it.
    """
    from timm.models import _builder

    with _build_lock:
        timm_s_own, this_thread = _builder.load_pretrained, threading.get_ident()

        def load(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != this_thread:
                timm_s_own(model, *args, **kwargs)
            else:
                take(model, functools.partial(_filtered, kwargs["filter_fn"], model))

        _builder.load_pretrained = load
        try:
            yield
        finally:
            _builder.load_pretrained = timm_s_own


def _filtered(filter_fn: Callable[..., State] | None, network: nn.Module, state: State) -> State:
    if filter_fn is None:
        return state
    if len(inspect.signature(filter_fn).parameters) == 1:
        return filter_fn(state)
    return filter_fn(state, network)


def _converted(state: State, convert: Callable[[State], State]) -> State:
    """A state in timm's form; empty if it is not of this model."""
    device = next(iter(state.values())).device if state else "cpu"
    try:
        # What a converter makes lies where the state lies, and nothing that it prints is seen.
        with torch.device(device), contextlib.redirect_stdout(io.StringIO()):
            return convert(dict(state))
    except Exception:  # converters index and reshape what they expect to find
        return {}


def _stepped(canvas: Canvas, step: int, steps: int) -> Canvas:
    """The canvas rounded down to multiples of `step`, and `steps` further."""
    height, width = ((edge // step + steps) * step for edge in canvas)
    return height, width


def _as_text(canvas: Canvas) -> str:
    return f"{canvas[0]}x{canvas[1]}"


def _as_option(canvas: Canvas) -> str:
    return str(canvas[0]) if canvas[0] == canvas[1] else _as_text(canvas)
