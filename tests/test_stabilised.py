"""The crop that follows the object: its inverse for each frame, on coordinates and on pictures."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_framing import centroid, disc

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.crop import Framing
from sv4d_ns.video.reader import Region
from sv4d_ns.video.stabilised import StabilisedFraming, stabilised_framing


def travelling(ways, width=200, height=120, radius=14) -> np.ndarray:
    return np.concatenate([disc(width, height, x, y, radius) for x, y in ways])


@settings(max_examples=25, deadline=None)
@given(
    start=st.tuples(st.floats(20, 60), st.floats(20, 100)),
    end=st.tuples(st.floats(120, 180), st.floats(20, 100)),
    count=st.integers(1, 9),
    size=st.integers(32, 96),
)
def test_an_object_on_its_way_stays_in_the_middle_and_comes_back(start, end, count, size):
    ways = np.linspace(start, end, count)
    clip = travelling(ways)
    framing = stabilised_framing(clip[..., 3], size)
    assert StabilisedFraming.from_dict(json.loads(json.dumps(framing.to_dict()))) == framing
    crops = framing.apply(clip)
    assert crops.shape == (count, size, size, 4)
    for index in range(count):
        middle = centroid(crops[index, ..., 3])
        np.testing.assert_allclose(middle, size / 2, atol=0.06 * size)
        np.testing.assert_allclose(framing.squares[index].to_source(middle), ways[index], atol=0.5)


def test_the_object_is_shown_larger_than_by_one_square_for_the_clip():
    clip = travelling(np.linspace((30, 60), (170, 60), 8))
    framing = stabilised_framing(clip[..., 3], 64)
    assert (framing.apply(clip)[..., 3] > 128).mean() > 0.5  # a disc that fills 0.9 of the square covers 0.64
    assert len({square.side for square in framing.squares}) == 1, "it keeps its size"


def test_limbs_do_not_shake_the_square():
    """The box jumps by 10 pixels every other frame; the smoothed way does not follow."""
    clip = travelling([(100, 60)] * 9)
    clip = clip.copy()
    clip[::2, 55:65, 100:134] = (220, 20, 40, 255)
    way = [square.center_x for square in stabilised_framing(clip[..., 3], 64).squares]
    assert np.ptp(way[2:-2]) < 2
    inside = stabilised_framing(clip[..., 3], 64).apply(clip)
    assert inside[:, :, [0, -1], 3].max() == 0, "nothing is cut off"


def test_where_the_object_is_hidden_the_square_goes_on():
    clip = travelling(np.linspace((30, 60), (170, 60), 8)).copy()
    clip[3:5] = 0
    way = [square.center_x for square in stabilised_framing(clip[..., 3], 64).squares]
    np.testing.assert_allclose(way, np.linspace(30, 170, 8), atol=1)


def test_in_the_pixels_of_the_source():
    framing = stabilised_framing(travelling([(60, 60), (80, 60)])[..., 3], 64)
    region = Region(left=10, top=20, width=800, height=480, source_width=900, source_height=600, scale=0.25)
    moved = framing.in_source(region)
    np.testing.assert_allclose(moved.squares[0].to_source(np.array([32.0, 32.0])), [10 + 240, 20 + 240], atol=2)


@pytest.mark.parametrize("values", [{}, {"center_x": 1.0, "center_y": [1.0], "side": [1.0]}])
def test_nonsense_is_refused(values):
    with pytest.raises(InputError, match="framing cannot be read"):
        StabilisedFraming.from_dict(values)
    with pytest.raises(InputError):
        Framing.from_dict(stabilised_framing(travelling([(60, 60)] * 2)[..., 3], 64).to_dict())
    with pytest.raises(InputError, match="nothing to frame"):
        stabilised_framing(np.zeros((2, 8, 8), np.uint8), 64)
