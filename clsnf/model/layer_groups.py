"""A backbone's parameters layer by layer, for learning rates that depend on depth.

timm knows how each of its networks divides into layers: the stem, then a transformer's blocks, or a
ResNet's. A feature extractor renames them and drops those behind its deepest level; or keeps them,
without using them. So which parameters decide the feature maps, and in which order they are used,
is read off the graph that autograd records of one forward pass.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from clsnf.model.backbone import Backbone

_WITH_THE_LAYER_BEFORE = (99999,)  # timm's mark of a pattern that begins no layer of its own
_UNGROUPED = "~"  # the name of a parameter that no pattern of timm's matches
_TENSORS = 12  # in a layer of a network whose layers timm does not know: the number that timm takes


def network_layers(backbone: Backbone, images: Tensor) -> list[list[nn.Parameter]]:
    """The parameters that decide the feature maps, layer by layer, shallow to deep.

    What timm puts into no layer, such as a transformer's register tokens, belongs to the layer that
    is used before it.

    Args:
        backbone: on the device of `images`.
        images: (B, 3, H, W) in [0, 1], as the backbone takes them; one is enough.
    """
    used = _parameters_by_use(backbone, images)
    numbers = _layer_numbers(backbone.info.architecture)
    if not numbers:
        parameters = [parameter for _, parameter in used]
        return [parameters[n : n + _TENSORS] for n in range(0, len(parameters), _TENSORS)]
    layers: dict[int, list[nn.Parameter]] = {}
    number = min(numbers.values())
    for name, parameter in used:
        inside = name.partition(".")[2]  # without "model" or "body", in extractors that wrap
        number = numbers.get(_canonical(name), numbers.get(_canonical(inside), number))
        layers.setdefault(number, []).append(parameter)
    return [layers[number] for number in sorted(layers)]


def _canonical(name: str) -> str:
    return name.replace(".", "_")  # timm's extractors flatten "blocks.0" to "blocks_0"


@lru_cache(maxsize=8)
def _layer_numbers(architecture: str) -> dict[str, int]:
    """Canonical names of an architecture's parameters -> the number of their layer.

    Parameters that begin no layer are left out. Empty where timm does not know the layers.
    """
    import timm
    from timm.models import group_parameters

    with torch.device("meta"):
        network: Any = timm.create_model(architecture)
        if not hasattr(network, "group_matcher"):
            return {}
        network.register_parameter(_UNGROUPED, nn.Parameter(torch.empty(0)))
    matcher = _without_followers(network.group_matcher(coarse=False))
    numbers = group_parameters(network, matcher, reverse=True)
    ungrouped = numbers[_UNGROUPED]
    return {_canonical(name): n for name, n in numbers.items() if n != ungrouped}


def _without_followers(matcher: Any) -> Any:
    """A matcher of timm's without the patterns whose parameters join the layer before.

    timm means the layer before by number, which may be the last one: CLIP's first norm is there.
    """
    if not isinstance(matcher, dict):
        return matcher
    return {
        group: [pattern for pattern in patterns if pattern[1] != _WITH_THE_LAYER_BEFORE]
        if isinstance(patterns, (list, tuple))
        else patterns
        for group, patterns in matcher.items()
    }


def _parameters_by_use(backbone: Backbone, images: Tensor) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the feature maps depend on, by their first use, with their names."""
    parameters = list(backbone.extractor.named_parameters())
    before = [parameter.requires_grad for _, parameter in parameters]
    for _, parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            first_uses = _first_uses(backbone(images))
    finally:
        for (_, parameter), value in zip(parameters, before, strict=True):
            parameter.requires_grad_(value)
    used = [(name, parameter) for name, parameter in parameters if parameter in first_uses]
    return sorted(used, key=lambda pair: first_uses[pair[1]])


def _first_uses(outputs: list[Tensor]) -> dict[Tensor, int]:
    """Each leaf of the graph behind the outputs -> the number of the first operation with it."""
    first: dict[Tensor, int] = {}
    waiting: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for behind, _ in node.next_functions:
            if hasattr(behind, "variable"):
                use = node._sequence_nr()
                first[behind.variable] = min(use, first.get(behind.variable, use))
            elif behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return first
