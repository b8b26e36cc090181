"""Hidden places take the colours that are seen: the nearest, and those most like what was guessed."""

from dataclasses import replace

import torch

from sv4d_ns.diffusion.bundled import recolouring
from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.diffusion.bundled.recolouring import in_colours_of_the_input, in_seen_colours
from sv4d_ns.diffusion.bundled.rendering import Volume

RED, BLUE = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.8])


def test_a_guess_decides_between_the_seen_colours() -> None:
    places, both = torch.zeros(2, 3), torch.ones(2, dtype=torch.bool)
    guesses = torch.tensor([[0.6, 0.3, 0.3], [0.3, 0.3, 0.6]])
    found = in_seen_colours(places, guesses, torch.zeros(2, 3), torch.stack([RED, BLUE]), both, torch.tensor(1.0))
    assert (found[0] - RED).norm() < 0.35 * (guesses[0] - RED).norm()
    assert (found[1] - BLUE).norm() < 0.35 * (guesses[1] - BLUE).norm()


def test_what_is_near_decides_where_the_guess_does_not() -> None:
    guesses, both = torch.full((2, 3), 0.4), torch.ones(2, dtype=torch.bool)
    ends = torch.tensor([[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0]])
    found = in_seen_colours(ends, guesses, ends, torch.stack([RED, BLUE]), both, torch.tensor(1.0))
    torch.testing.assert_close(found, torch.stack([RED, BLUE]), atol=1e-3, rtol=0)


def test_far_from_everything_only_what_counts_is_taken() -> None:
    seen, counts = torch.stack([RED, BLUE]), torch.tensor([True, False])
    found = in_seen_colours(
        torch.full((1, 3), 1e3), torch.ones(1, 3), torch.zeros(2, 3), seen, counts, torch.tensor(1.0)
    )
    torch.testing.assert_close(found, RED[None])


def test_many_places_are_compared_in_parts(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    places, guesses, seen = torch.rand(50, 3), torch.rand(50, 3), torch.rand(2, 30, 3)
    rest = (*seen, torch.rand(30) > 0.5, torch.tensor(1.0))
    whole = in_seen_colours(places, guesses, *rest)
    monkeypatch.setattr(recolouring, "AT_ONCE", 7)
    torch.testing.assert_close(in_seen_colours(places, guesses, *rest), whole)


def slab(colour: torch.Tensor, moments: int = 1) -> Volume:
    """A block whose front the input shows in `colour`, guessed grey all through."""
    density = torch.zeros(moments, 16, 16, 16)
    density[:, 5:11, 4:12, 4:12] = 2.0
    gate = torch.zeros(moments, 8, 8, 8)
    gate[:, :3] = 1.0
    image = colour[:, None, None].expand(moments, 3, 20, 20)
    return Volume(density, torch.full((moments, 3, 8, 8, 8), 0.5), gate, image)


def test_the_hidden_side_of_a_volume_takes_the_inputs_colour_and_nothing_else_changes() -> None:
    volumes = slab(RED, 2)
    found = in_colours_of_the_input(volumes, Frustum())
    torch.testing.assert_close(found.colour[:, :, 5, 4, 4], RED.expand(2, 3))
    torch.testing.assert_close(found.colour[:, :, 0, 0, 0], torch.full((2, 3), 0.5))
    for name in ("density", "gate", "image"):
        assert getattr(found, name) is getattr(volumes, name)


def test_a_moment_without_an_object_stays_as_it_is() -> None:
    empty = replace(slab(BLUE), density=torch.zeros(1, 16, 16, 16))
    torch.testing.assert_close(in_colours_of_the_input(empty, Frustum()).colour, empty.colour)
