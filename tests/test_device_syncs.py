"""A training step asks the device for few results: each one waits for all work that was queued before it."""

from pathlib import Path

import pytest
import torch
from pretend_card import Card
from test_fake_cuda import step_of

from sv4d_ns.plugin.base_pipeline import read_step
from sv4d_ns.utils import randomness
from sv4d_ns.utils.errors import NotFiniteError


@pytest.mark.parametrize("step", [0, 40], ids=["static phase", "moving"])
def test_a_step_waits_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Once to read all losses, and once for the samples on the rays, whose number nobody knows before."""
    monkeypatch.setattr("sv4d_ns.field.volume_rendering.nerfacc_works", lambda: True)
    with Card() as card:
        losses, _, (_, (counts, places)) = step_of("sv4d", tmp_path, "cuda", step, card)
    assert {"photometric", "mask", "structure"} <= set(losses)
    assert counts == {"reads": 1, "compactions": 1}, places


def test_drawing_from_a_mask_is_drawing_from_its_places() -> None:
    mask = torch.rand(5000, generator=torch.Generator().manual_seed(0)) < 0.3
    first, second = randomness.generator(1, 2), randomness.generator(1, 2)
    places, there = randomness.draw_true(mask, 1000, first)
    wanted = mask.nonzero()[:, 0]
    wanted = wanted[torch.from_numpy(second.integers(0, len(wanted), 1000))]
    assert torch.equal(places, wanted) and there and first.random() == second.random()
    places, there = randomness.draw_true(torch.zeros(7, dtype=torch.bool), 4, first)
    assert not there and ((places >= 0) & (places < 7)).all()


def test_what_is_not_finite_is_named() -> None:
    losses = {"mask": torch.tensor(1.0), "structure": torch.tensor(float("nan"))}
    with pytest.raises(NotFiniteError, match="'structure' is not finite at step 3"):
        read_step(losses, torch.tensor(20.0), 3)
    assert read_step({"mask": losses["mask"]}, torch.tensor(20.5), 3) == 20.5
