"""Long and short videos, any number of views, and runs that were killed."""

import pytest
import torch
from diffusion_fixture import FRAMES, SIZE, VIEWS, tiny_pipeline, tiny_video

from sv4d_ns.diffusion.windows import WindowStore, WindowStride, generate_grid, plan_calls, plan_windows
from sv4d_ns.errors import InputError


@pytest.mark.parametrize("window", [2, 3, 5, 12])
def test_fixed_windows_cover_every_frame_once_anchored(window):
    for n in range(1, 40):
        windows = plan_windows(n, window)
        assert {frame for w in windows for frame in w.frames} == set(range(n))
        assert all(len(w.frames) == window for w in windows)
        assert len({w.start for w in windows}) == len(windows)
        assert windows[0].start == 0 and windows[0].anchor is None
        assert windows[-1].frames[-1] == n - 1
        for index, w in enumerate(windows[1:], start=1):
            assert w.anchor == index - 1
            assert w.start in windows[w.anchor].frames
        assert len(windows) == max(1, -(-(n - 1) // (window - 1)))


def test_a_short_video_repeats_its_last_frame():
    assert plan_windows(3, 5)[0].frames == (0, 1, 2, 2, 2)


def test_released_windows():
    assert [w.start for w in plan_windows(21, 12, WindowStride.RELEASED_T)] == [0, 9]
    assert [w.start for w in plan_windows(12, 12, WindowStride.RELEASED_T_MINUS_1)] == [0, 0]
    assert plan_windows(20, 5, WindowStride.RELEASED_FULL_WINDOWS)[-1].frames[-1] == 16
    with pytest.raises(InputError, match="frame 12 of 24"):
        plan_windows(24, 12, WindowStride.RELEASED_T)
    with pytest.raises(InputError, match="at least 12"):
        plan_windows(11, 12, WindowStride.RELEASED_T_MINUS_1)
    with pytest.raises(InputError):
        plan_windows(0, 12)


def test_calls_interleave_views():
    assert plan_calls(4, 4) == [[0, 1, 2, 3]]
    assert plan_calls(8, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan_calls(5, 4) == [[0, 2, 4, 0], [1, 3, 1, 3]]
    assert plan_calls(1, 4) == [[0, 0, 0, 0]]
    with pytest.raises(InputError):
        plan_calls(0, 4)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(num_inference_steps=2)


def grid_of(pipeline, video, views=VIEWS, store=None, on_progress=lambda done, total: None, seed=7, **arguments):
    azimuths, elevations = [360 / (views + 1) * (i + 1) for i in range(views)], [5.0 * i for i in range(views)]
    return generate_grid(
        pipeline, video, azimuths, elevations, seed=seed, store=store, on_progress=on_progress, **arguments
    )


@pytest.mark.parametrize(("frames", "views", "runs"), [(1, 2, 1), (2, 1, 1), (3, 2, 1), (4, 3, 4), (7, 2, 3)])
def test_any_size(pipeline, frames, views, runs):
    reports = []
    grid = grid_of(pipeline, tiny_video(frames), views, on_progress=lambda *report: reports.append(report))
    assert grid.shape == (frames, views, 3, SIZE, SIZE)
    assert all(grid[f, v].std() > 0.01 for f in range(frames) for v in range(views))
    assert reports[0] == (0, 2 * runs) and reports[-1] == (2 * runs, 2 * runs)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert {done for done, _ in reports} == set(range(2 * runs + 1))


def test_one_window_is_one_call_of_the_pipeline(pipeline, monkeypatch):
    calls = record_calls(pipeline, monkeypatch)
    video = tiny_video(5)
    grid = grid_of(pipeline, video)
    assert len(calls) == 2
    first, second = calls
    assert torch.equal(first["video"], video[:3]) and torch.equal(second["video"], video[2:])
    assert first["reference_views"] is None
    assert torch.equal(second["reference_views"], first["output"][2])
    assert torch.equal(grid[:2], first["output"][:2]) and torch.equal(grid[2:], second["output"])
    assert first["azimuths_deg"] == [120.0, 240.0]


def record_calls(pipeline, monkeypatch) -> list[dict]:
    calls = []
    original = type(pipeline).__call__

    def recording(self, **arguments):
        output = original(self, **arguments)
        calls.append({**arguments, "output": output[0]})
        return output

    monkeypatch.setattr(type(pipeline), "__call__", recording)
    return calls


def test_calls_of_many_views_land_in_their_columns(pipeline, monkeypatch):
    calls = record_calls(pipeline, monkeypatch)
    grid = grid_of(pipeline, tiny_video(), views=3)
    assert [call["elevations_deg"] for call in calls] == [[0.0, 10.0], [5.0, 5.0]]
    assert torch.equal(grid[:, 0], calls[0]["output"][:, 0])
    assert torch.equal(grid[:, 2], calls[0]["output"][:, 1])
    assert torch.equal(grid[:, 1], calls[1]["output"][:, 0])


def test_seeds_decide(pipeline):
    video = tiny_video()
    assert torch.equal(grid_of(pipeline, video, seed=1), grid_of(pipeline, video, seed=1))
    assert not torch.equal(grid_of(pipeline, video, seed=1), grid_of(pipeline, video, seed=2))


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(pipeline, tmp_path, monkeypatch):
    video = tiny_video(7)
    whole = grid_of(pipeline, video)

    def kill_in_second_window(done, total):
        if done == 3:
            raise Killed

    store = WindowStore(tmp_path)
    with pytest.raises(Killed):
        grid_of(pipeline, video, store=store, on_progress=kill_in_second_window)
    assert [path.name for path in tmp_path.iterdir()] == ["window000_call00.safetensors"]

    calls = record_calls(pipeline, monkeypatch)
    reports = []
    resumed = grid_of(pipeline, video, store=store, on_progress=lambda *report: reports.append(report))
    assert torch.equal(resumed, whole)
    assert len(calls) == 2 and reports[1] == (2, 6)
    again = grid_of(pipeline, video, store=store)
    assert torch.equal(again, whole) and len(calls) == 2


def test_damaged_files_are_made_again(pipeline, tmp_path, capsys):
    video, store = tiny_video(), WindowStore(tmp_path)
    whole = grid_of(pipeline, video, store=store)
    path = tmp_path / "window000_call00.safetensors"
    good = path.read_bytes()
    flipped = good[:-10] + bytes([good[-10] ^ 1]) + good[-9:]
    for damaged, sentence in (
        (good[: len(good) // 2], "cannot be read"),
        (b"", "cannot be read"),
        (flipped, "damaged"),
    ):
        path.write_bytes(damaged)
        assert torch.equal(grid_of(pipeline, video, store=store), whole)
        assert sentence in capsys.readouterr().out
    assert torch.equal(grid_of(pipeline, video, store=store), whole)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("change", ["video", "seed", "strength", "model"])
def test_files_of_other_inputs_are_made_again(pipeline, tmp_path, capsys, change):
    store = WindowStore(tmp_path)
    grid_of(pipeline, tiny_video(), store=store)
    arguments = {"seed": 8} if change == "seed" else {}
    if change == "strength":
        arguments |= {"strength": 0.5, "initial_views": torch.rand(FRAMES, VIEWS, 3, SIZE, SIZE)}
    other = tiny_pipeline(num_inference_steps=2, conditioning_sigma=0.1) if change == "model" else pipeline
    video = tiny_video(seed=6 if change == "video" else 0)
    remade = grid_of(other, video, store=store, **arguments)
    assert "other inputs" in capsys.readouterr().out
    assert torch.equal(remade, grid_of(other, video, **arguments))


def test_refining_starts_from_the_given_views(pipeline, monkeypatch):
    start = torch.rand(4, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    calls = record_calls(pipeline, monkeypatch)
    reports = []
    refined = grid_of(
        pipeline, tiny_video(4), views=3, initial_views=start, strength=0.5, num_inference_steps=4,
        on_progress=lambda *report: reports.append(report),
    )  # fmt: skip
    assert refined.shape == start.shape and reports[-1] == (8, 8)
    assert torch.equal(calls[0]["initial_views"], start[:3, [0, 2]])
    assert torch.equal(calls[3]["initial_views"], start[1:, [1, 1]])
