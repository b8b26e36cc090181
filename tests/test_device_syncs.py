"""A training step asks the device for few results: each one waits for all work that was queued before it."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config, tiny_grid
from torch.utils._python_dispatch import TorchDispatchMode

from sv4d_ns.plugin.pipeline import read_step
from sv4d_ns.utils.errors import NotFiniteError

READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal")
"""A number is read: `float`, `int`, `bool`, `item`, `tolist` end in these."""
COMPACTIONS = ("aten.nonzero", "aten.masked_select", "aten._unique")
"""The size of the result depends on values."""


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(function)
        reads = name.startswith(READS)
        by_mask = name.startswith("aten.index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if reads or by_mask or name.startswith(COMPACTIONS):
            self.counts["reads" if reads else "compactions"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("step", "reads", "compactions"), [(0, 2, 5), (40, 7, 11)], ids=["static phase", "moving"])
def test_a_step_reads_few_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, reads: int, compactions: int
) -> None:
    """Once frames move, every grid of keyframes asks which of them a batch uses: the others are to get no gradient."""
    config = tiny_config("sv4d", tmp_path)
    tiny_grid().save(config.get_base_dir() / "views")
    config.pipeline.model.schedule_steps = 50
    config.pipeline.datamanager.train_num_rays_per_batch, config.pipeline.datamanager.patches = 64, 2
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    pipeline.model.carve(pipeline.datamanager.grid)
    pipeline.model._before_step(step)
    # as on a GPU: no compiled loops
    for module in [module for name, module in sys.modules.items() if name.startswith("sv4d_ns")]:
        if hasattr(module, "fused"):
            monkeypatch.setattr(module, "fused", lambda *_: False)
    pipeline.get_train_loss_dict(step)  # the first one sets things up
    with Waits() as waits:
        _, losses, _ = pipeline.get_train_loss_dict(step)
        sum(losses.values()).backward()
    assert {"photometric", "mask", "structure"} <= set(losses)
    assert waits.counts["reads"] <= reads
    assert waits.counts["compactions"] <= compactions


def test_what_is_not_finite_is_named() -> None:
    losses = {"mask": torch.tensor(1.0), "structure": torch.tensor(float("nan"))}
    with pytest.raises(NotFiniteError, match="'structure' is not finite at step 3"):
        read_step(losses, torch.tensor(20.0), 3)
    assert read_step({"mask": losses["mask"]}, torch.tensor(20.5), 3) == 20.5
