"""What the input shows and a volume leaves out is put where the rest is, in the input's colours."""

import torch

from sv4d_ns.diffusion.bundled.completing import completed
from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.diffusion.bundled.rendering import Volume

SIDE, FIRST, LAST = 32, 18, 22
"""Cells along each side; the body's layers along the depth axis."""


def body() -> Volume:
    """Two opaque blocks behind the middle of the box, nothing between them."""
    density = torch.zeros(1, SIDE, SIDE, SIDE)
    density[:, FIRST:LAST, 18:24, 8:24] = 3.0
    density[:, FIRST:LAST, 8:11, 8:10] = 3.0
    gate = torch.full((1, 16, 16, 16), 0.1)
    return Volume(density, torch.zeros(1, 3, 16, 16, 16), gate, torch.ones(1, 3, 64, 64))


def shown(volume: Volume) -> torch.Tensor:
    """Opacity of each column."""
    return 1.0 - torch.exp(-volume.density.sum(1))


def film() -> torch.Tensor:
    """Alpha of both blocks and of a rod, one pixel wide, from the one to the other."""
    alpha = (shown(body()) > 0.5).float()
    alpha[:, 11:18, 8] = 1.0
    return alpha


def test_a_rod_that_the_input_shows_is_there_in_its_colours_at_the_depth_of_what_it_hangs_on() -> None:
    volume = body()
    found = completed(volume, film(), Frustum())
    assert bool((shown(found)[:, 11:18, 8] > 0.97).all())
    rod = found.density[0, :, 11:18, 8]
    middle = (rod * (torch.arange(SIDE) + 0.5)[:, None]).sum(0) / rod.sum(0)
    torch.testing.assert_close(middle, torch.full((7,), (FIRST + LAST) / 2), atol=0.5, rtol=0)
    assert bool((rod > 0.01).sum(0).le(3).all())  # as thin as it is wide, give or take a cell
    assert bool((found.gate[0, 10, 6:9, 4] > 0.9).all())


def test_what_the_input_does_not_show_and_what_is_there_already_stay() -> None:
    volume = body()
    found = completed(volume, film(), Frustum())
    rod = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    rod[11:18, 8] = True
    torch.testing.assert_close(found.density[:, :, ~rod], volume.density[:, :, ~rod])
    same = completed(volume, shown(volume).round(), Frustum())
    torch.testing.assert_close(same.density, volume.density)
    torch.testing.assert_close(same.gate, volume.gate)


def test_half_covered_pixels_become_half_opaque() -> None:
    volume = body()
    found = completed(volume, 0.5 * film(), Frustum())
    torch.testing.assert_close(shown(found)[:, 11:18, 8], torch.full((1, 7), 0.5))


def test_an_empty_volume_is_filled_in_the_middle_and_an_empty_picture_fills_nothing() -> None:
    empty = body()
    empty.density = torch.zeros_like(empty.density)
    found = completed(empty, film(), Frustum())
    assert bool((shown(found)[film() > 0.5] > 0.97).all())
    layers = found.density.sum((0, 2, 3)) * (torch.arange(SIDE) + 0.5)
    assert abs(float(layers.sum() / found.density.sum()) - SIDE / 2) < 1
    torch.testing.assert_close(completed(empty, torch.zeros(1, SIDE, SIDE), Frustum()).density, empty.density)
