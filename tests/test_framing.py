"""The square crop and its inverse, on coordinates and on pictures."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import over_white
from sv4d_ns.video.crop import Framing, fixed_framing, is_framed, released_framing, released_preprocess, whole_framing

pixels = st.floats(-2000, 2000)


@st.composite
def framings(draw) -> Framing:
    width, height = draw(st.integers(1, 500)), draw(st.integers(1, 500))
    centre_x, centre_y = draw(st.floats(0, width)), draw(st.floats(0, height))
    return Framing(centre_x, centre_y, draw(st.floats(1, 800)), width, height, draw(st.integers(1, 600)))


def disc(width, height, x, y, radius, frames=1) -> np.ndarray:
    """Red discs with soft edges, RGBA [t, h, w, 4]."""
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    alpha = 255 * (radius + 0.5 - np.hypot(columns - x, rows - y)).clip(0, 1)
    picture = np.dstack(
        [np.full((height, width), 220), np.full((height, width), 20), np.full((height, width), 40), alpha]
    )
    return np.broadcast_to(picture.round().astype(np.uint8), (frames, height, width, 4))


def centroid(alpha: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]] + 0.5
    weight = alpha / alpha.sum(dtype=float)
    return np.array([(columns * weight).sum(), (rows * weight).sum()])


@given(framings(), st.lists(st.tuples(pixels, pixels), min_size=1, max_size=5))
def test_there_and_back_is_the_identity(framing, points):
    there = np.array(points)
    np.testing.assert_allclose(framing.to_source(framing.to_crop(there)), there, atol=1e-6)
    np.testing.assert_allclose(framing.to_crop(framing.to_source(there)), there, atol=1e-6)
    assert Framing.from_dict(json.loads(json.dumps(framing.to_dict()))) == framing


@given(framings())
def test_the_square_fills_the_crop(framing):
    half = framing.side / 2
    corners = np.array([[framing.center_x - half, framing.center_y - half], [framing.center_x + half] * 2])
    corners[1, 1] = framing.center_y + half
    np.testing.assert_allclose(framing.to_crop(corners), [[0, 0], [framing.size] * 2], atol=1e-6)


@given(
    x=st.floats(20, 60),
    y=st.floats(20, 40),
    radius=st.floats(6, 15),
    size=st.integers(24, 160),
    ratio=st.floats(0.4, 1.0),
)
@settings(max_examples=30, deadline=None)
def test_pictures_land_where_coordinates_say(x, y, radius, size, ratio):
    pictures = disc(80, 60, x, y, radius)
    framing = fixed_framing(pictures[..., 3], size, ratio)
    (crop,) = framing.apply(pictures)
    assert crop.shape == (size, size, 4)
    assert np.abs(framing.to_source(centroid(crop[..., 3])) - (x, y)).max() < 0.5  # half a source pixel
    assert np.abs(centroid(crop[..., 3]) - framing.to_crop(np.array([x, y]))).max() < 0.5 * max(1, framing.scale)
    assert crop[..., 3].sum() / framing.scale**2 == pytest.approx(pictures[..., 3].sum(dtype=float), rel=0.04)
    visible = crop[..., 3] > 20
    assert np.abs(crop[visible][:, :3].astype(int) - (220, 20, 40)).max() <= 3  # nothing bleeds in from outside


@pytest.mark.parametrize(("width", "height"), [(80, 60), (60, 80), (70, 70), (200, 31)])
def test_the_object_is_centred_and_fills_its_share_wherever_it_was(width, height):
    pictures = np.concatenate([disc(width, height, 14, 12, 8), disc(width, height, 30, 16, 8)])
    framing = fixed_framing(pictures[..., 3], 100, 0.8)
    visible = framing.apply(pictures)[..., 3].max(axis=0) > 127
    columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    assert columns[-1] - columns[0] + 1 == pytest.approx(80, abs=4)
    assert columns[-1] + columns[0] + 1 == pytest.approx(100, abs=2)
    assert rows[-1] + rows[0] + 1 == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("picture", "framed"),
    [
        (disc(100, 100, 47, 52, 40), True),
        (disc(100, 100, 50, 50, 20), False),  # small
        (disc(100, 100, 38, 50, 35), False),  # beside the middle
        (disc(100, 100, 50, 50, 49), False),  # cut off, perhaps
        (disc(120, 100, 60, 50, 40), False),  # not square
    ],
)
def test_a_square_film_that_frames_its_object_is_shown_whole(picture, framed):
    assert is_framed(picture[..., 3]) == framed
    if framed:
        framing = whole_framing(picture[..., 3], 50)
        assert (framing.center_x, framing.center_y, framing.side, framing.size) == (50, 50, 100, 50)


def test_an_untouched_picture_when_the_square_is_the_picture():
    pictures = np.random.default_rng(0).integers(1, 256, (2, 16, 16, 4), dtype=np.uint8)
    crops = Framing(8, 8, 16, 16, 16, 16).apply(pictures)
    np.testing.assert_array_equal(crops[..., 3], pictures[..., 3])
    assert np.abs(crops.astype(int) - pictures)[pictures[..., 3] > 0].max() <= 1


def test_outside_the_source_the_crop_is_empty_and_white():
    pictures = np.full((1, 10, 10, 4), 77, np.uint8)
    pictures[..., 3] = 255
    (crop,) = Framing(10, 5, 10, 10, 10, 20).apply(pictures)
    assert (crop[7:13, :4] == (77, 77, 77, 255)).all() and (crop[:, 17:] == (255, 255, 255, 0)).all()
    (away,) = Framing(500, -300, 10, 10, 10, 20).apply(pictures)
    assert (away == (255, 255, 255, 0)).all()


def test_nonsense_is_refused():
    alpha = disc(20, 20, 10, 10, 5)[..., 3]
    with pytest.raises(InputError, match="No frame shows a visible object"):
        fixed_framing(np.zeros_like(alpha), 32)
    with pytest.raises(InputError, match="No frame shows a visible object"):
        whole_framing(np.zeros_like(alpha), 32)
    for ratio in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputError, match="cannot fill"):
            fixed_framing(alpha, 32, ratio)
        with pytest.raises(InputError, match="cannot fill"):
            released_preprocess(disc(20, 20, 10, 10, 5), 32, 32, ratio)
    good = fixed_framing(alpha, 32)
    for change in ({"side": 0.0}, {"side": float("inf")}, {"size": 0}, {"center_x": "left"}, {"tilt": 1}):
        with pytest.raises(InputError, match="framing"):
            Framing.from_dict(good.to_dict() | change)
    with pytest.raises(ValueError, match="30x20"):
        good.apply(np.zeros((1, 20, 30, 4), np.uint8))


def test_the_released_crop_stays_around_the_picture_middle():
    """The difference that `fixed_framing` is for: off centre, the released object is small and off centre."""
    pictures = disc(80, 80, 20, 40, 10)
    released = released_preprocess(pictures, 100, 100)[0]
    dark = (released < 250).any(axis=-1)
    assert np.flatnonzero(dark.any(axis=0)).mean() < 30  # still on the left
    assert dark.any(axis=0).sum() == pytest.approx(22 * 100 / (2 * 31 / 0.9), abs=3)  # the soft rim counts


@pytest.mark.parametrize(("width", "height", "x"), [(40, 40, 14), (45, 45, 22), (60, 40, 8), (40, 61, 20)])
def test_the_released_framing_is_the_released_crop(width, height, x):
    """The same geometry, also where the script cuts the object of a wide picture; levels may differ by rounding."""
    pictures = disc(width, height, x, height / 2 + 3, 6, frames=2)
    framing, kept = released_framing(pictures, 48)
    released = released_preprocess(pictures, 48, 48).astype(int)
    ours = over_white(framing.apply(kept)).astype(int)
    assert np.abs(ours - released).mean() < 1.0
    assert ((ours < 250).any(-1) ^ (released < 250).any(-1)).mean() < 0.02


def test_a_released_crop_that_cannot_hold_the_video_says_so():
    with pytest.raises(InputError, match="ratio"):
        released_preprocess(disc(80, 20, 70, 10, 5), 32, 32, None)
