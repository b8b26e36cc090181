"""What the model needs in memory and how it keeps within it: work in bounded chunks."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Chunks:
    """Work on consecutive rows, as many at once as fit; fewer from then on where memory ran out.

    Attributes:
        what: unit of the limit in messages, for example "images".
        limit: the most that ever went through at once; infinite until memory runs out.
    """

    def __init__(self, what: str):
        self.what = what
        self.limit = math.inf

    def run(self, function: Callable[[int, int], Tensor], total: int, at_most: int, cost: int = 1) -> Tensor:
        """The results of function(start, stop) for consecutive parts of range(total), joined along the first axis.

        Args:
            function: makes the results of some rows; may be called again for the same rows.
            total: number of rows.
            at_most: what may be worked on at once.
            cost: what one row counts of it; at least one row is taken.

        Raises:
            torch.OutOfMemoryError: where even one row does not fit.
        """
        done, parts, whole = 0, [], None
        while done < total:
            stop = min(done + max(1, int(min(at_most, self.limit) // cost)), total)
            part = self._attempt(function, done, stop, cost)
            if part is None:
                continue
            if stop - done == total:
                return part
            if torch.is_grad_enabled():
                parts.append(part)
            else:  # one copy of the result less than joining the parts at the end
                whole = part.new_empty(total, *part.shape[1:]) if whole is None else whole
                whole[done:stop] = part
            done = stop
        return torch.cat(parts) if whole is None else whole

    def _attempt(self, function: Callable[[int, int], Tensor], start: int, stop: int, cost: int) -> Tensor | None:
        """function(start, stop), or None and a smaller limit where it does not fit into memory."""
        try:
            return function(start, stop)
        except torch.OutOfMemoryError:
            if stop - start == 1:
                raise
        # outside of the handler, because the exception holds on to the tensors of the failed call
        self.limit = (stop - start) // 2 * cost
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"Out of memory: going on with {self.limit} {self.what} at once.", RuntimeWarning, stacklevel=3)
        return None


def feature_bytes_at_once(device: torch.device) -> int:
    """Size of the widest features the transformers make at once: near a CPU's cache, or much of a GPU's free memory."""
    return 4 * 2**20 if device.type == "cpu" else 2**30
