"""Long and short videos, any number of views, and runs that were killed."""

import math

import pytest
import torch
from accelerate import cpu_offload
from diffusion_fixture import FRAMES, SIZE, VIEWS, tiny_pipeline, tiny_unet, tiny_video
from hypothesis import given
from hypothesis import strategies as st

from sv4d_ns.diffusion.seams import boundary_drift, drift_line
from sv4d_ns.diffusion.sv4d.attention import CameraAttention
from sv4d_ns.diffusion.sv4d.grid import GridOptions, generate_grid
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind, GuidanceRule
from sv4d_ns.diffusion.sv4d.windows import ViewReferences, WindowStride, plan_calls, plan_windows
from sv4d_ns.diffusion.window_store import WHOLE, WindowStore, weights_fingerprint
from sv4d_ns.utils.errors import InputError


@given(n=st.integers(1, 200), window=st.integers(2, 16))
def test_fixed_windows_cover_every_frame_and_each_is_anchored(n, window):
    windows = plan_windows(n, window)
    assert {frame for w in windows for frame in w.frames} == set(range(n))
    assert all(len(w.frames) == window for w in windows)
    assert len({w.start for w in windows}) == len(windows)
    assert windows[0].start == 0 and windows[0].anchor is None
    assert windows[-1].frames[-1] == n - 1
    for index, w in enumerate(windows[1:], start=1):
        assert w.anchor == index - 1
        assert w.start in windows[w.anchor].frames
        assert w.frames == tuple(range(w.start, w.start + window))  # only a video shorter than a window is padded
        assert index == len(windows) - 1 or w.start == index * (window - 1)
    assert len(windows) == max(1, -(-(n - 1) // (window - 1)))


@given(n=st.integers(1, 200), window=st.integers(2, 16), rule=st.sampled_from(WindowStride))
def test_a_rule_gives_windows_or_says_which_one_to_take(n, window, rule):
    try:
        windows = plan_windows(n, window, rule)
    except InputError as error:
        assert "'fixed'" in str(error) and rule in (WindowStride.RELEASED_T, WindowStride.RELEASED_T_MINUS_1)
        return
    for index, w in enumerate(windows):
        assert w.anchor is None or (w.anchor < index and w.start in windows[w.anchor].frames)


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


def ring(n):
    return [360 / (n + 1) * (i + 1) for i in range(n)], [0.0] * n


def views_of(calls):
    return [list(call.views) for call in calls]


def test_calls_interleave_views():
    assert views_of(plan_calls(*ring(4), 4)) == [[0, 1, 2, 3]]
    assert views_of(plan_calls(*ring(8), 4)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert views_of(plan_calls(*ring(5), 4)) == [[0, 2, 4, 0], [1, 3, 1, 3]]
    assert views_of(plan_calls(*ring(1), 4)) == [[0, 0, 0, 0]]
    # the order in which the user names the views does not matter
    assert views_of(plan_calls([200, -70, 20, 110], [0, 10, 0, -5], 2)) == [[2, 0], [3, 1]]
    for azimuths, elevations in (([], []), ([10, 20], [0])):
        with pytest.raises(InputError):
            plan_calls(azimuths, elevations, 4)


def test_anchored_calls_have_their_neighbours_beside_them():
    calls = plan_calls(*ring(8), 4, ViewReferences.ANCHORED)
    assert views_of(calls) == [[0, 2, 4, 6], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert [call.given for call in calls] == [set(), {0, 2}, {4, 6}]
    assert calls[1].made == {1: 1, 3: 3}
    assert plan_calls(*ring(4), 4, ViewReferences.ANCHORED) == plan_calls(*ring(4), 4)
    assert plan_calls(*ring(3), 1, ViewReferences.ANCHORED) == plan_calls(*ring(3), 1)


angles = st.lists(st.tuples(st.floats(-400, 400), st.floats(-80, 80)), min_size=1, max_size=20)


@given(views=angles, per_call=st.integers(1, 9), references=st.sampled_from(ViewReferences))
def test_calls_make_every_view_once(views, per_call, references):
    azimuths, elevations = zip(*views, strict=True)
    done = set()
    for call in plan_calls(azimuths, elevations, per_call, references):
        assert len(call.views) == per_call
        assert call.given <= done and call.given <= set(call.views)
        assert set(call.made) and not set(call.made) & done
        assert all(call.views[column] == view for view, column in call.made.items())
        done |= set(call.made)
    assert done == set(range(len(views)))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(num_inference_steps=2)


def generated(pipeline, video, views=VIEWS, store=None, on_progress=lambda done, total: None, seed=7, **arguments):
    azimuths, elevations = [360 / (views + 1) * (i + 1) for i in range(views)], [5.0 * i for i in range(views)]
    return generate_grid(
        pipeline, video, azimuths, elevations, seed=seed, store=store, on_progress=on_progress, **arguments
    )


def grid_of(*arguments, **options):
    return generated(*arguments, **options).images


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


CHANGES = ["video", "seed", "strength", "setting", "schedule", "guidance", "attention", "weight", "encoder"]


def changed_pipeline(change):
    """The pipeline of the tests with one thing changed, or the same."""
    pipeline = tiny_pipeline(num_inference_steps=2, **({"conditioning_sigma": 0.1} if change == "setting" else {}))
    if change == "schedule":
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, sigma_max=9.0)
    if change == "weight":
        pipeline.unet.down_blocks[0].resnets[0].spatial_res_block.conv1.weight.data[3, 2, 1, 0] += 1e-3
    if change == "encoder":
        pipeline.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    return pipeline


@pytest.mark.parametrize("change", CHANGES)
def test_files_of_other_inputs_are_made_again(pipeline, tmp_path, capsys, change):
    store = WindowStore(tmp_path)
    grid_of(pipeline, tiny_video(), store=store)
    arguments = {"seed": 8} if change == "seed" else {}
    if change == "strength":
        arguments |= {"strength": 0.5, "initial_views": torch.rand(FRAMES, VIEWS, 3, SIZE, SIZE)}
    if change == "guidance":
        arguments |= {"options": GridOptions(guidance=GuidanceRule.CONSTANT)}
    if change == "attention":
        arguments |= {"options": GridOptions(camera_attention=CameraAttention.PER_VIEW_PIXEL)}
    other = changed_pipeline(change)
    video = tiny_video(seed=6 if change == "video" else 0)
    remade = grid_of(other, video, store=store, **arguments)
    assert "other inputs" in capsys.readouterr().out
    assert torch.equal(remade, grid_of(other, video, **arguments))


def test_refining_starts_from_the_given_views(pipeline, monkeypatch):
    start = torch.rand(4, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    calls = record_calls(pipeline, monkeypatch)
    reports = []
    refined = grid_of(
        pipeline, tiny_video(4), views=3, initial_views=start, strength=0.5,
        options=GridOptions(num_inference_steps=4), on_progress=lambda *report: reports.append(report),
    )  # fmt: skip
    assert refined.shape == start.shape and reports[-1] == (8, 8)
    assert torch.equal(calls[0]["initial_views"], start[:3, [0, 2]])
    assert torch.equal(calls[3]["initial_views"], start[1:, [1, 1]])


def test_later_calls_are_given_their_finished_neighbours(pipeline, monkeypatch):
    calls = record_calls(pipeline, monkeypatch)
    options = GridOptions(references=ViewReferences.ANCHORED)
    grid = grid_of(pipeline, tiny_video(5), views=4, options=options)
    assert [len(call["azimuths_deg"]) for call in calls] == [VIEWS] * 5
    first, second, third, *later = calls
    assert first["reference_views"] is None and first["reference_known"] is None
    # views 0 and 2 are there; 1 is made beside 0 (or 2), then 3
    for call, new in ((second, 1), (third, 3)):
        known = call["reference_known"].index(True)
        view = round(call["elevations_deg"][known] / 5)
        assert call["reference_known"].count(True) == 1 and view in (0, 2)
        assert torch.equal(call["reference_views"][known], first["output"][0, view // 2])
        assert torch.equal(grid[:2, new], call["output"][:2, 1 - known])
    # the second window has references for all views, so its calls need none of each other
    assert [call["reference_known"] for call in later] == [[True, True]] * 2
    assert torch.equal(later[0]["reference_views"], torch.stack([first["output"][2, 0], first["output"][2, 1]]))


def test_a_view_that_is_not_known_is_masked(pipeline):
    video, angles = tiny_video(), ([60.0, 120.0], [0.0, 0.0])
    views = torch.rand(VIEWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    partly = pipeline.encode_condition(video, *angles, views, reference_known=[True, False]).references
    wholly = pipeline.encode_condition(video, *angles, views).references
    assert torch.equal(partly[0], wholly[0]) and not partly[1].any() and wholly[1].any()
    with pytest.raises(InputError, match="reference_known"):
        pipeline(video, *angles, reference_views=views, reference_known=[True])
    with pytest.raises(InputError, match="reference_known"):
        pipeline(video, *angles, reference_known=[True, False])


def test_strides_of_the_releases_run_where_they_cover_the_video(pipeline, monkeypatch):
    calls = record_calls(pipeline, monkeypatch)
    for stride, starts in (
        (WindowStride.RELEASED_T, [0, 2]),
        (WindowStride.RELEASED_T_MINUS_1, [0, 2, 2]),
        (WindowStride.RELEASED_FULL_WINDOWS, [0, 2]),
    ):
        calls.clear()
        video = tiny_video(5)
        assert grid_of(pipeline, video, options=GridOptions(stride=stride)).shape[0] == 5
        assert [next(i for i in range(5) if torch.equal(call["video"][0], video[i])) for call in calls] == starts
    with pytest.raises(InputError, match="no views of 1 of 6 frames"):
        grid_of(pipeline, tiny_video(6), options=GridOptions(stride=WindowStride.RELEASED_FULL_WINDOWS))


def test_options_reach_the_network_and_leave_no_trace(pipeline, monkeypatch):
    seen = []
    original = type(pipeline).__call__

    def recording(self, **arguments):
        seen.append((self.unet.config.camera_attention, arguments["guidance"]))
        return original(self, **arguments)

    monkeypatch.setattr(type(pipeline), "__call__", recording)
    plain = grid_of(pipeline, tiny_video())
    values = {"camera_attention": "per_view_pixel", "guidance": "constant", "guidance_scale": 3.0, "stride": None}
    changed = grid_of(pipeline, tiny_video(), options=GridOptions.from_values(values))
    own = Guidance.from_config(pipeline.config.guidance)
    assert seen == [("full_3d", own), ("per_view_pixel", Guidance(GuidanceKind.CONSTANT, 3.0, own.min_scale))]
    assert pipeline.unet.config.camera_attention == "full_3d"
    assert not torch.equal(plain, changed) and torch.equal(plain, grid_of(pipeline, tiny_video()))
    for wrong in ({"stride": "half"}, {"colour": 1}):
        with pytest.raises(InputError, match=r"deviations\.md"):
            GridOptions.from_values(wrong)


def test_drift_is_measured_at_every_boundary(pipeline, monkeypatch):
    calls = record_calls(pipeline, monkeypatch)
    made = generated(pipeline, tiny_video(6))
    assert [(boundary.frame, boundary.frames) for boundary in made.drift] == [(2, 1), (3, 2)]
    first, second = calls[0]["output"][2:], calls[1]["output"][:1]
    assert made.drift[0].psnr == pytest.approx(-10 * math.log10((first - second).square().mean().item()), abs=0.01)
    assert not generated(pipeline, tiny_video(3)).drift
    line = drift_line(made.drift)
    assert "2 window boundaries" in line and "frame" in line
    assert drift_line(()) == ""


def test_drift_tells_colour_from_outline():
    still = torch.ones(1, 1, 4, 8, 8)
    still[..., 3, :, :] = 0
    still[..., 2:6, 2:6] = torch.tensor([0.2, 0.4, 0.6, 1.0])[:, None, None]
    same = boundary_drift(7, still, still)
    assert (same.psnr, same.colour_shift, same.iou) == (100.0, 0.0, 1.0)
    warmer = still.clone()
    warmer[:, :, 0, 2:6, 2:6] += 10 / 255
    drift = boundary_drift(7, still, warmer)
    assert drift.colour_shift == pytest.approx(10, abs=0.01) and drift.iou == 1.0 and drift.psnr < 40
    for channels in (4, 3):
        moved = still.roll(1, dims=-1)
        assert boundary_drift(7, still[:, :, :channels], moved[:, :, :channels]).iou == pytest.approx(12 / 20, abs=1e-3)


def test_a_fingerprint_sees_every_weight_wherever_it_is():
    unet = tiny_unet()
    before = weights_fingerprint(unet)
    assert before == weights_fingerprint(tiny_unet())
    large = torch.nn.Linear(WHOLE // 64 + 1, 128)
    whole = weights_fingerprint(large)
    large.weight.data.view(-1)[1] += 1e-6  # not one of the elements that are looked at one by one
    assert weights_fingerprint(large) != whole
    assert weights_fingerprint(unet.half()) != before
    offloaded = tiny_unet()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta and weights_fingerprint(offloaded) == before


def test_the_code_of_windows_is_all_of_the_room_without_its_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    from sv4d_ns.diffusion import window_store

    plain = "def double(x):\n    return 2 * x\n"
    same = 'def double(x):\n    """Twice."""\n    # why\n    return 2  *  x\n'
    assert window_store.statements(plain) == window_store.statements(same)
    assert window_store.statements(plain) != window_store.statements(plain.replace("2", "3"))
    read, rooms = Path.read_text, set()
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: rooms.add(self.parent.name) or read(self, *a, **k))
    window_store.code_fingerprint.cache_clear()
    window_store.code_fingerprint()
    assert {"diffusion", "fourdm", "sv4d", "bundled"} <= rooms
