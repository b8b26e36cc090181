"""Finished windows on disk, and the key that says what a window was made from."""

import ast
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path, content_hash

WHOLE = 65536
"""Tensors of up to so many elements are hashed whole."""

SAMPLES = 4096
"""Elements taken, evenly spaced, from larger ones (beside the sum over all of them)."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Their versions are part of a window's key: they compute it."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WindowStore:
    """Finished windows in a folder, so that a killed run goes on where it stopped.

    Each file carries a key of everything it was made from and a digest of its content; a file that does not match, or
    cannot be read, is made again.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, name: str, key: str) -> Tensor | None:
        """The tensor saved under the name and key, or None; says so where a file has to be made again."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            saved_key, tensor = _read(path)
        except ValueError as error:
            print(f"{error}; it is generated again.")
            return None
        if saved_key != key:
            print(f"{path} was made from other inputs; it is generated again.")
            return None
        return tensor

    def save(self, name: str, key: str, frames: Tensor) -> None:
        """Keep a finished window.

        Raises:
            InputError: there is no space for it.
        """
        frames = frames.contiguous()
        metadata = {"key": key, "digest": content_hash(frames.numpy())}
        try:
            with atomic_path(self._path(name)) as temporary:
                save_file({"frames": frames}, temporary, metadata=metadata)
        except SafetensorError as error:  # how a full disk is reported
            raise InputError(
                f"{self._path(name)} cannot be written ({error}): free some space on the disk; the same command goes "
                "on from what is finished."
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _read(path: Path) -> tuple[str | None, Tensor]:
    """Key and content of a saved window; raises `ValueError` naming a file that is not what was saved."""
    try:
        with safe_open(path, "pt") as file:
            metadata, tensor = file.metadata() or {}, file.get_tensor("frames")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if metadata.get("digest") != content_hash(tensor.numpy()):
        raise ValueError(f"{path} is damaged")
    return metadata.get("key"), tensor


def flaw_of(path: Path) -> str | None:
    """What is wrong with the file of a window and what happens then, or None."""
    try:
        _read(path)
    except ValueError as error:
        return f"{error}; delete it, or leave it: the next run generates it again."
    return None


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Hash of the statements that make a window, and of the versions of the libraries they call.

    Those of the whole package `diffusion`; comments and docstrings do not count.
    """
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return content_hash([version(name) for name in LIBRARIES], *(statements(source.read_text()) for source in sources))


def statements(source: str) -> str:
    """Python source without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def weights_fingerprint(*models: nn.Module) -> str:
    """Hash of the parameters, buffers and active adapters of models, wherever they are.

    Small tensors count whole. Of large ones count evenly spaced elements and the exact sum of all elements' bits taken
    as integers: every change of one value is seen, and 2 billion parameters take seconds, on any device the same.
    """
    found: list[Any] = []
    for index, model in enumerate(models):
        for path, layer in model.named_modules():
            found += [[index, path, _adapters(layer)]]
            for name, tensor in _own_tensors(layer):
                found += [[name, str(tensor.dtype), list(tensor.shape)], *_content(tensor)]
    return content_hash(*found)


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its own parameters and buffers; those that sequential offloading took away from where it put them."""
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.is_meta:
            hook = getattr(layer, "_hf_hook", None)
            hooks = [hook, *getattr(hook, "hooks", ())]
            tensor = next(h.weights_map[name] for h in hooks if getattr(h, "weights_map", None) is not None)
        yield name, tensor


def _adapters(layer: nn.Module) -> list[Any]:
    """Which adapters (LoRA) are at work in a layer and how strongly; their weights are parameters like others."""
    scaling = getattr(layer, "scaling", None)
    return [sorted(scaling.items()), list(getattr(layer, "active_adapters", ()))] if isinstance(scaling, dict) else []


def _content(tensor: Tensor) -> list[Any]:
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    if len(bits) <= WHOLE:
        return [_array(bits)]
    return [_array(bits[:: len(bits) // SAMPLES]), int(bits.sum(dtype=torch.int64))]


def _array(bits: Tensor) -> np.ndarray:
    return bits.cpu().numpy()
