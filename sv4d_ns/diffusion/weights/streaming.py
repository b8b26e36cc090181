"""Safetensors files tensor by tensor, so that a file of any size is read and written in little memory.

`safetensors.torch.save_file` wants all tensors of a file at once; the writer here takes them one after the other.
Format: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sv4d_ns.utils.errors import InputError

MAPPED_BYTES = 128 * 2**20
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type (safetensors' name of it) of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        bits = re.search(r"\d+", self.dtype)  # as in "BF16" or "F8_E4M3"; "BOOL" takes a byte
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read a file into a sentence.

    Raises:
        InputError: for any `OSError` inside the block.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}): check that it exists and may be read."
        ) from error


def layout(path: Path) -> dict[str, TensorInfo]:
    """What a file says it holds; its size is checked against it.

    Raises:
        SafetensorError: for a file that is cut off or something else.
        OSError: when it cannot be opened.
    """
    with safe_open(path, framework="pt") as file:
        slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - not a mapping
        return {name: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for name, part in slices}


def read_tensors(path: Path, names: Iterable[str]) -> Iterator[Tensor]:
    """The tensors of these names, in this order; each should be dropped before the next is asked for.

    Tensors are views of the mapped file, whose pages count as this process' memory once touched. The file is mapped
    anew after every `MAPPED_BYTES`, which gives them back.

    Raises:
        SafetensorError: see `layout`.
        OSError: see `layout`.
    """
    waiting = iter(names)
    done = False
    while not done:
        with safe_open(path, framework="pt") as file:
            mapped = 0
            done = True
            for name in waiting:
                tensor = file.get_tensor(name)
                mapped += tensor.nbytes
                yield tensor
                del tensor
                if mapped >= MAPPED_BYTES:
                    done = False
                    break


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Write a safetensors file while its tensors arrive; on disk when this returns.

    Args:
        path: replaced if it exists.
        shapes: of every tensor by name, in the order in which they arrive.
        dtype: of every tensor; one of `DTYPE_NAMES`.
        tensors: one for each name; a wrong number, shape or type is an error of the caller (ValueError).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
                raise ValueError(f"expected {dtype} {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
