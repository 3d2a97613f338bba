"""What several test files share."""

from pathlib import Path

import hypothesis
import pytest
import timm
import torch
from safetensors.torch import save_file

# No test is about time: on a busy machine an example may take long.
hypothesis.settings.register_profile("clsnf", deadline=None)
hypothesis.settings.load_profile("clsnf")

# The networks of the tests are so small that a second thread costs more than it gives, most of all
# beside other work.
torch.set_num_threads(1)


def random_state(architecture: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state of a whole timm classifier with random parameters and batch-norm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = timm.create_model(architecture, pretrained=False).state_dict()
        for name, value in state.items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.ndim == 1:
                value.add_(torch.empty_like(value).uniform_(0.1, 0.3))
    return {name: value.contiguous() for name, value in state.items()}


@pytest.fixture(scope="session")
def resnet18_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights for a whole ResNet-18."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(random_state("resnet18"), path)
    return path


@pytest.fixture(scope="session")
def winners(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path) -> Path:
    """A folder of two saved detectors, plate and sheet, as a study leaves it; sheet keeps the shape
    of pictures. Not to be changed.
    """
    from tests.support.small_server import write_winners

    return write_winners(tmp_path_factory.mktemp("study") / "winners", resnet18_weights)
