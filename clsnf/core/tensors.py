"""Named tensors in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a ``.safetensors`` file, on any device and in any layout.

    safetensors refuses tensors that share memory, such as the weights of a layer that a network
    uses in two places. Each name gets a copy of its own: loaded into the same network, the copies
    are equal, and the layer is shared again.
    """
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        memory = stored.untyped_storage().data_ptr()
        separate[name] = stored.clone() if memory in seen else stored
        seen.add(memory)
    save_file(separate, file)
