"""A card that is not there: tensors that say they are on `cuda:0`, with real values that the CPU computes.

PyTorch's fake tensors have sizes and no values, so what depends on values (compaction, numbers that are read) and
backward passes on "cuda" cannot run with them. Here both can, and what would fail or wait on a GPU shows all the same:
tensors of two devices in one operation raise, a tensor of the card has no NumPy array, and `Card.reads` counts the
operations that would wait for its work.
"""

import sys
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
"""What C++ takes the card for: autograd runs such tensors in the calling thread, as a CPU's."""
ACROSS = (
    "aten.copy_",
    "aten._to_copy",
    "aten.index.Tensor",
    "aten.index_put_",
    "aten.index_put",
    "aten._index_put_impl_",
)
"""Operations that may see both devices on CUDA: copies, and indices that wait on the CPU."""
READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten._linalg_check_errors")
"""A number is read: `float`, `int`, `bool`, `item`, `tolist` end in these, inverses in the last."""
COMPACTIONS = ("aten.nonzero", "aten.masked_select", "aten._unique", "aten.unique")
"""The size of the result depends on values."""


class OnCard(torch.Tensor):
    """A tensor of the card; `value` is what it holds."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> "OnCard":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=META
        )
        made.value = value
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({self.value!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return compute(function, args, kwargs or {})


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of tensors here and there; raises where CUDA would."""
    name = str(function)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    mine = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnCard) and tensor.ndim > 0]
    if mine and elsewhere and not name.startswith(ACROSS):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu.")
    if (
        name.startswith("aten.index")
        and not isinstance(args[0], OnCard)
        and mine
        and not name.startswith("aten.index_put")
    ):
        raise RuntimeError(f"{name}: indices should be on cpu as the indexed tensor is.")
    if name.startswith("aten._fused_sdp_choice"):
        return 0  # the formula: which fused kernel there would be depends on the card
    target = kwargs.get("device")
    there = _is_card(target) if target is not None else bool(mine)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'.")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare = tree_map(lambda leaf: leaf.value if isinstance(leaf, OnCard) else leaf, (args, kwargs))
    made = function(*bare[0], **bare[1])
    operation = name.split(".")[1]
    if operation.endswith("_") and not operation.endswith("__"):  # in place; those of lists return nothing
        return None if made is None else args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda leaf: OnCard(leaf) if isinstance(leaf, torch.Tensor) else leaf, made) if there else made


class _Devices(TorchFunctionMode):
    """Calls that name a CUDA device name the stand-in instead, before PyTorch looks for a driver."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and _is_card(kwargs.get("device")):
            kwargs.pop("device")
            return function(*args, **kwargs).to(META)
        if function is torch.Tensor.new_tensor and isinstance(args[0], OnCard):
            kwargs.setdefault("dtype", args[0].dtype)
            return torch.tensor(args[1], **kwargs).to(META)
        if function is torch.device or function is torch.device.__init__:
            return function(*args, **kwargs)
        if function is torch.Tensor.cuda:
            return args[0].to(META)
        if function is torch.Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].detach().cpu().tolist()
        args = tuple(META if _names_card(value) else value for value in args)
        kwargs = {key: META if key == "device" and _names_card(value) else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


def _names_card(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


def _wait(name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why an operation would wait for the card: `reads`, `compactions`, `uploads`; None if it would not.

    PyTorch waits after a copy from the CPU too, unless it is `non_blocking`; for memory that is not pinned CUDA takes
    the values at once, so such a copy is safe.
    """
    mine = [isinstance(leaf, OnCard) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    if name.startswith(("aten._to_copy", "aten.copy_")):
        source = args[1] if name.startswith("aten.copy_") else args[0]
        target = args[0].device if name.startswith("aten.copy_") else kwargs.get("device")
        across = target is not None and _is_card(target) != isinstance(source, OnCard)
        blocking = not (kwargs.get("non_blocking") or (name.startswith("aten.copy_") and len(args) > 2 and args[2]))
        return None if not across else "reads" if isinstance(source, OnCard) else "uploads" if blocking else None
    if not any(mine):
        return None
    if name.startswith(("aten.index", "aten._index")):
        indices = (
            [index for index in args[1] if isinstance(index, torch.Tensor)] if isinstance(args[1], list | tuple) else []
        )
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            # writing one number where a mask says so is a masked fill
            return "compactions" if name.startswith("aten.index.") or args[2].ndim else None
        return "uploads" if any(not isinstance(index, OnCard) for index in indices) else None
    return "reads" if name.startswith(READS) else "compactions" if name.startswith(COMPACTIONS) else None


def _place() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if "/sv4d_ns/" in file:
            return f"{file.rpartition('/sv4d_ns/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class Card(TorchDispatchMode):
    """With the card in the machine; `counts` says how often a program would have waited for it, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()
        """The same by the line of this package that asked."""
        self._devices = _Devices()

    def __enter__(self) -> "Card":
        self._devices.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._devices.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self._count(str(function), args, kwargs or {})
        return compute(function, args, kwargs or {})

    def _count(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        kind = _wait(name, args, kwargs)
        if kind is not None:
            self.counts[kind] += 1
            self.places[kind, _place()] += 1
