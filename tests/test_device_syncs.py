"""A training step asks the device for few results: each one waits for all work that was queued before it."""

from pathlib import Path

import pytest
import torch
from pretend_card import Card
from test_fake_cuda import step_of

from sv4d_ns.plugin.base_pipeline import read_step
from sv4d_ns.utils.errors import NotFiniteError


@pytest.mark.parametrize(("step", "waits"), [(0, 3), (40, 3)], ids=["static phase", "moving"])
def test_a_step_waits_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, waits: int) -> None:
    """Once to read all losses, and to find samples, surface points and surface pixels, whose number is not known; the
    times of a batch are, so which keyframes it uses need not be asked."""
    monkeypatch.setattr("sv4d_ns.field.volume_rendering.nerfacc_works", lambda: False)
    with Card() as card:
        losses, _, (_, (counts, places)) = step_of("sv4d", tmp_path, "cuda", step, card)
    assert {"photometric", "mask", "structure"} <= set(losses)
    assert counts == {"reads": 1, "compactions": waits}, places


def test_what_is_not_finite_is_named() -> None:
    losses = {"mask": torch.tensor(1.0), "structure": torch.tensor(float("nan"))}
    with pytest.raises(NotFiniteError, match="'structure' is not finite at step 3"):
        read_step(losses, torch.tensor(20.0), 3)
    assert read_step({"mask": losses["mask"]}, torch.tensor(20.5), 3) == 20.5
