"""timm's feature extractors: any architecture that gives feature maps, built for levels and a
canvas.

Built by :mod:`clsnf.model.backbone`, and filled by :mod:`clsnf.model.backbone_weights`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from clsnf.core.errors import SettingsError, first_line


def build_extractor(
    architecture: str, levels: tuple[int, ...], canvas: tuple[int, int], **arguments: Any
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
    import timm

    arguments |= {"features_only": True, "out_indices": levels}
    try:
        # Transformers are built for one image size.
        return timm.create_model(architecture, img_size=canvas, **arguments)
    except TypeError:
        pass  # a convolutional network knows no img_size
    except (AssertionError, IndexError, ValueError, RuntimeError) as error:
        raise _no_levels(architecture, levels, error) from error
    try:
        return timm.create_model(architecture, **arguments)
    except (AssertionError, IndexError, ValueError, RuntimeError) as error:
        raise _no_levels(architecture, levels, error) from error


def _no_levels(architecture: str, levels: tuple[int, ...], error: BaseException) -> SettingsError:
    wanted = ",".join(map(str, levels))
    return SettingsError(
        f"Backbone {architecture!r} gives no feature maps for levels {wanted} "
        f"({first_line(error)}): choose others."
    )
