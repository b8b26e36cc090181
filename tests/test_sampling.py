"""Schedules and draws: deterministic in (seed, step), and shaped as described."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sv4d_ns.fitting.batch_sampler import PixelSampler, orthogonal_views, sample_frames
from sv4d_ns.fitting.frame_order import FrameOrder
from sv4d_ns.fitting.registration import Admission
from sv4d_ns.fitting.schedule import ScheduleConfig, Window, admissions, frame_window
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.randomness import generator, uniform

CONFIG = ScheduleConfig()


def span(first: int, last: int, *newest: int) -> Window:
    return Window(tuple(range(first, last + 1)), newest)


def test_admitted_frames_start_from_the_one_before_them() -> None:
    outward = FrameOrder.outward(10, 5)
    admitted = admissions(span(2, 7), {4, 5, 6}, outward)
    assert admitted == [Admission(3, 4), Admission(7, 6), Admission(2, 3)]
    assert admissions(span(4, 6), {5}, outward) == [Admission(4, 5), Admission(6, 5)]
    assert admissions(span(0, 9), range(10), outward) == []
    loop = FrameOrder((0, 0, 1, 4, 0))
    assert admissions(Window.whole(5), {0}, loop) == [
        Admission(1, 0), Admission(4, 0), Admission(2, 1), Admission(3, 4),
    ]  # fmt: skip


@given(n=st.integers(1, 60), data=st.data())
@settings(max_examples=60, deadline=None)
def test_window_grows_from_the_canonical_frame_to_the_whole_clip(n: int, data: st.DataObject) -> None:
    canonical = data.draw(st.integers(0, n - 1))
    order = FrameOrder.outward(n, canonical)
    windows = [frame_window(f, order, CONFIG) for f in np.linspace(0, 1, 101)]
    assert windows[0] == Window((canonical,))
    assert windows[-1] == Window.whole(n)
    for a, b in pairwise(windows):
        assert set(a.frames) <= set(b.frames)
    full = next(f for f, w in zip(np.linspace(0, 1, 101), windows, strict=True) if len(w) == n)
    assert full <= CONFIG.full_window_at + 0.011
    for fraction, window in zip(np.linspace(0, 1, 101), windows, strict=True):
        assert set(window.newest) <= {window.frames[0], window.frames[-1]} - {canonical}
        growing = CONFIG.static_fraction <= fraction < CONFIG.full_window_at
        assert bool(window.newest) == (growing and n > 1)


@given(parents=st.lists(st.integers(0, 40), min_size=1, max_size=40))
def test_a_window_holds_each_frame_together_with_the_one_it_starts_from(parents: list[int]) -> None:
    order = FrameOrder((0, *(min(parent, frame) for frame, parent in enumerate(parents))))
    for fraction in np.linspace(0, 1, 31):
        frames = frame_window(fraction, order, CONFIG).frames
        assert {order.parents[frame] for frame in frames} <= set(frames)
    assert frame_window(1.0, order, CONFIG) == Window.whole(len(order.parents))


def test_a_side_that_waits_for_the_other_has_no_newest_frame() -> None:
    early = replace(CONFIG, static_fraction=0.0, full_window_at=1.0)
    order = FrameOrder.outward(11, 2)
    assert frame_window(0.3, order, early) == span(0, 5, 5)
    assert frame_window(0.1, order, early) == span(1, 3, 1, 3)


def test_canonical_frame_outside_the_clip_is_refused() -> None:
    with pytest.raises(InputError):
        FrameOrder.outward(5, 5)


def test_frames_are_in_the_window_and_favour_the_newest_and_the_canonical_one() -> None:
    window = span(0, 12, 12)
    draws = np.stack([sample_frames(generator(7, step), 4, window, 0, CONFIG) for step in range(2000)])
    assert draws.min() >= 0 and draws.max() <= 12
    share = np.stack([(draws == f).any(1) for f in range(13)]).mean(1)
    assert share[0] > 1.2 * share[5] and share[12] > 1.5 * share[5] and share[1:12].min() > 0.2
    whole = np.stack([sample_frames(generator(7, step), 4, span(0, 12), 6, CONFIG) for step in range(2000)])
    share = np.stack([(whole == f).any(1) for f in range(13) if f != 6]).mean(1)
    assert share.max() < 1.2 * share.min()  # nothing is new: all frames alike, the clip's ends too
    alone = sample_frames(generator(7, 0), 4, span(3, 3), 3, CONFIG)
    assert alone.tolist() == [3, 3, 3, 3]


def test_both_newest_frames_are_drawn_together_and_the_canonical_one_beside_them() -> None:
    always = replace(CONFIG, frontier_probability=1.0, canonical_probability=1.0)
    for step in range(20):
        chosen = sample_frames(generator(0, step), 4, span(3, 9, 3, 9), 6, always)
        assert {3, 6, 9} <= set(chosen.tolist())
        assert set(sample_frames(generator(0, step), 1, span(3, 9, 3, 9), 6, always).tolist()) == {6}
        assert {0, 9} <= set(sample_frames(generator(0, step), 3, span(0, 9, 9), 0, always).tolist())


def test_more_newest_frames_than_a_step_takes_are_drawn_by_chance() -> None:
    always = replace(CONFIG, frontier_probability=1.0, canonical_probability=0.0)
    window = span(0, 20, *range(10, 18))
    draws = [sample_frames(generator(0, step), 4, window, 0, always).tolist() for step in range(40)]
    assert all(len(set(chosen)) == 4 and set(chosen) <= set(window.newest) for chosen in draws)
    assert {frame for chosen in draws for frame in chosen} == set(window.newest)


def test_same_seed_and_step_give_the_same_draw_and_others_do_not() -> None:
    assert torch.equal(uniform(1, 5, (100,), 2), uniform(1, 5, (100,), 2))
    for other in ((2, 5, 2), (1, 6, 2), (1, 5, 3)):
        assert not torch.equal(uniform(1, 5, (100,), 2), uniform(other[0], other[1], (100,), other[2]))
    values = uniform(0, 0, (10000,), 0)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.02)


def test_orthogonal_views_cover_the_circle() -> None:
    azimuths = [0, 30, 75, 120, 165, 210, 255, 300, 330]
    assert orthogonal_views(azimuths, 0) == [0, 2, 4, 6]  # nearest to 90, 180, 270: 75, 165, 255
    assert orthogonal_views([0, 60, 120, 180, 240], 4) == [4, 0, 1, 2]  # 330 -> 0, 60 -> 60, 150 -> 120 or 180
    assert orthogonal_views([0.0], 0) == [0]
    assert sorted(orthogonal_views([0, 0, 0], 1)) == [0, 1, 2]


@given(st.lists(st.floats(-720, 720), min_size=1, max_size=12), st.data())
@settings(max_examples=50, deadline=None)
def test_orthogonal_views_are_distinct(azimuths: list[float], data: st.DataObject) -> None:
    base = data.draw(st.integers(0, len(azimuths) - 1))
    views = orthogonal_views(azimuths, base)
    assert views[0] == base and len(set(views)) == len(views) == min(4, len(azimuths))


def disc(size: int, radius: float) -> torch.Tensor:
    axis = torch.arange(size) + 0.5 - size / 2
    return ((axis[:, None] ** 2 + axis[None] ** 2) < radius**2).float()


def test_pixels_are_drawn_near_the_mask() -> None:
    alpha = torch.stack([disc(64, 10), torch.zeros(64, 64), torch.ones(64, 64)])
    sampler = PixelSampler(alpha, margin=0.05, outside_fraction=0.1)
    rows, columns = sampler.draw(generator(0, 0), np.zeros(5000, np.int64))
    near = torch.nn.functional.max_pool2d(alpha[:1, None], 7, 1, 3)[0, 0] > 0
    share = near[rows, columns].float().mean().item()
    assert share == pytest.approx(0.9, abs=0.02)
    covered = torch.zeros(64, 64, dtype=torch.bool)
    covered[rows, columns] = True
    assert covered[near].float().mean() > 0.99
    for image in (1, 2):  # an empty and a full image have only one kind of pixel
        rows, columns = sampler.draw(generator(0, image), np.full(4000, image))
        assert len(np.unique(rows * 64 + columns)) > 2000


def test_patches_lie_inside_the_image_and_on_the_object() -> None:
    alpha = torch.zeros(2, 40, 48)
    alpha[0, :5, :5] = 1  # in the corner: the patch must be pushed inside
    alpha[1, 20:30, 20:30] = 1
    sampler = PixelSampler(alpha, outside_fraction=0.0)
    rows, columns = sampler.draw_patches(generator(0, 0), np.array([0, 1] * 50), 16)
    assert rows.shape == columns.shape == (100, 16, 16)
    assert rows.min() >= 0 and rows.max() < 40 and columns.min() >= 0 and columns.max() < 48
    assert (np.diff(rows[:, :, 0], axis=1) == 1).all() and (np.diff(columns[:, 0], axis=1) == 1).all()
    image = np.array([0, 1] * 50)[:, None, None]
    assert (alpha.numpy()[image, rows, columns].max((1, 2)) > 0).all()


def test_impossible_patches_and_empty_sets_are_refused() -> None:
    with pytest.raises(InputError):
        PixelSampler(torch.zeros(1, 8, 8)).draw_patches(generator(0, 0), np.array([0]), 16)
    with pytest.raises(InputError):
        PixelSampler(torch.zeros(0, 8, 8))
