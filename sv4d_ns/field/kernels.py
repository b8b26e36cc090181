"""Compiled loops where numba can be imported, torch where it cannot.

Every kernel of the field and of the ray marcher has a torch twin that works everywhere and is slower; which of the two
runs is decided in `fused`. numba comes with wheels for all usual platforms, so no compiler is needed; where it is
missing, or refuses the installed numpy, one warning says so and everything still works.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from sv4d_ns.utils.compiled import njit

    AVAILABLE = True
except ImportError as error:
    AVAILABLE = False
    warnings.warn(
        f"numba cannot be imported ({error}), so the field's plain torch path is used: the same results, several times "
        "slower on a CPU. `pip install --upgrade numba` brings the fast path back.",
        stacklevel=2,
    )

    def njit(*_: Any, **__: Any) -> Callable[[Any], Any]:  # type: ignore[no-redef,misc]
        """Leaves the function as it is; nothing calls it then."""
        return lambda function: function


def fused(backend: str, x: Tensor) -> bool:
    """Whether the compiled kernel takes these points: it was asked for, is there, and can read their memory."""
    return backend != "torch" and AVAILABLE and x.device.type == "cpu"


__all__ = ["AVAILABLE", "fused", "njit"]
