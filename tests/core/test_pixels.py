import torch

from clsnf.core.pixels import to_floats


def test_levels_become_floats_between_zero_and_one() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_floats(levels)
    assert floats.dtype == torch.float32
    assert torch.equal(floats, levels.float() / 255)


def test_the_result_is_contiguous_and_the_images_stay_as_they_were() -> None:
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    assert to_floats(images).is_contiguous()
    assert bool((images == 255).all())
