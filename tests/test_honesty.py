"""What a run says of the sides its camera did not see, on shapes whose answer is known."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.plugin.honesty import Unseen, seen_share, unseen
from sv4d_ns.views.grid import ViewGrid

RADIUS = 0.35


@dataclass(frozen=True)
class Config:
    canonical_time: float = 0.0


class Ball:
    """A ball at the origin that turns about the z axis, once around while the clip passes times `turns`."""

    def __init__(self, turns: float = 0.0, there: bool = True):
        self.aabb = torch.tensor([[-0.57] * 3, [0.57] * 3])
        self.config, self.turns, self.there = Config(), turns, there

    def deformation(self, x: Tensor, t: Tensor) -> Tensor:
        angle = -2 * math.pi * self.turns * t[:, 0]
        turned = [x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos(), x[:, 2]]
        return torch.stack(turned, -1) - x


def grid(model: str | None = "small", frames: int = 9) -> ViewGrid:
    opaque = np.full((frames, 8, 8, 4), 255, np.uint8)
    provenance = {} if model is None else {"model": model}
    return ViewGrid(opaque, opaque[:, None], ViewPlan.ring((180.0,)), fps=8.0, provenance=provenance)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ball's surface found exactly, in the place of the volume renderer (which needs a whole field)."""
    from sv4d_ns.field.visibility import SurfaceMap
    from sv4d_ns.geometry.rays import pixel_rays

    def surface_map(field: Ball, occupancy: Any, camera: Tensor, focal: float, size: int, time: float) -> SurfaceMap:
        axis = torch.arange(size) + 0.5
        xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        count = len(xy)
        shape = xy.new_full((count, 2), float(size))
        origins, directions = pixel_rays(xy, camera.expand(count, 4, 4), xy.new_full((count,), focal), shape)
        b = (origins * directions).sum(-1)
        root = b**2 - (origins.square().sum(-1) - RADIUS**2)
        depth = -b - root.clamp(min=0).sqrt()
        hit = (root > 0) & field.there
        points = origins + depth[:, None] * directions
        return SurfaceMap(hit.float().reshape(size, size), depth.reshape(size, size), points)

    monkeypatch.setattr("sv4d_ns.plugin.honesty.surface_map", surface_map)


@pytest.mark.usefixtures("rendered")
def test_a_camera_sees_less_than_half_of_a_ball_and_more_when_it_turns() -> None:
    occupancy: Any = None
    still, turning = seen_share(Ball(), occupancy, grid()), seen_share(Ball(turns=1.0), occupancy, grid())
    # of a ball a camera at distance 2 sees (1 - r / 2) / 2 of the surface; cells and tolerance add a rim
    assert still == pytest.approx((1 - RADIUS / 2) / 2, abs=0.06)
    assert turning is not None and turning > 0.85
    assert seen_share(Ball(there=False), occupancy, grid()) is None


@pytest.mark.usefixtures("rendered")
def test_views_that_contradict_each_other_lower_the_confidence() -> None:
    alpha = np.zeros((2, 1, 16, 16), np.uint8)
    alpha[..., 4:12, 4:12] = 255
    same, half = unseen(Ball(), None, grid(), alpha, alpha), unseen(Ball(), None, grid(), alpha, alpha // 255 * 0)  # type: ignore[arg-type]
    assert same.agreement == 1.0 and same.confidence == "fair"
    assert half.agreement == 0.0 and half.confidence == "low"
    guess = unseen(Ball(), None, grid(model="sv4d_ns bundled"), alpha, alpha)  # type: ignore[arg-type]
    assert guess.agreement == 1.0 and guess.confidence == "low", "one volume's pictures always agree"
    given = unseen(Ball(), None, grid(model=None), alpha, alpha)  # type: ignore[arg-type]
    assert not given.made and given.confidence == "good"


def test_the_sentences_name_what_was_not_seen_and_what_would_help() -> None:
    low = " ".join(Unseen(0.42, 0.6, True).sentences(on_cuda=False))
    assert "58% of the surface" in low and "IoU 0.60" in low
    assert "Confidence in the sides not seen: low. The far side is a guess." in low
    assert "the object turns" in low and "CUDA" in low
    assert "CUDA" not in " ".join(Unseen(0.42, 0.6, True).sentences(on_cuda=True))
    good = " ".join(Unseen(0.8, 0.9, True).sentences(on_cuda=False))
    assert "good" in good and "guess" not in good
    guessed = " ".join(Unseen(0.6, 0.9, True, bundled=True).sentences(on_cuda=False))
    assert "sides not seen: low" in guessed and "had silhouettes of IoU 0.65" in guessed and "0.90" not in guessed
    assert "from the views given" in " ".join(Unseen(0.4, 0.9, False).sentences(on_cuda=False))
    assert "no surface" in " ".join(Unseen(None, None, True).sentences(on_cuda=False))
