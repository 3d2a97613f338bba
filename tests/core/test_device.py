"""Devices: the choice, errors for those that do not exist, and the type for training."""

import warnings

import pytest
import torch

from clsnf.core.device import autocast, choose_device, training_dtype
from clsnf.core.errors import SettingsError

CPU = torch.device("cpu")


def test_a_device_that_is_there_is_given_and_auto_gives_one_that_works() -> None:
    assert choose_device("cpu") == CPU
    assert torch.ones(2, device=choose_device("auto")).sum() == 2


@pytest.mark.parametrize("name", ["cpux", "", "cuda:99", "gpu", "cuda:-1"])
def test_a_device_that_does_not_exist_is_refused_with_those_that_may(name: str) -> None:
    with pytest.raises(SettingsError, match="choose auto, cpu, cuda") as caught:
        choose_device(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_an_absent_gpu_is_refused() -> None:
    with pytest.raises(SettingsError, match="no device 'cuda'"):
        choose_device("cuda")


def test_training_is_in_a_type_with_the_range_of_single_precision() -> None:
    dtype = training_dtype(CPU)
    assert dtype in (torch.bfloat16, torch.float32)
    assert torch.finfo(dtype).max > 1e38


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_is_that_of_the_device_and_warns_of_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clsnf.core.device.training_dtype", lambda device: dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with autocast(CPU):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype
