"""Movies of a field: what they show, where the overlay lies, and that a finished one is not made again."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest

from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.movies import movies
from sv4d_ns.movies.movies import (
    MovieOptions,
    Preset,
    Subject,
    caption_height,
    movie,
    paste_in_source,
    planned_movies,
    shots,
    write_movies,
)
from sv4d_ns.utils.errors import InputError
from sv4d_ns.video import Framing, StabilisedFraming
from sv4d_ns.views.grid import ViewGrid

FOUR_VIEWS = ViewPlan.ring((60.0, 120.0, 180.0, 240.0))

FRAMES, SIZE = 3, 16
OPTIONS = MovieOptions(size=SIZE, seconds=0.5)
PRESETS = get_args(Preset)


def view_grid(**changes) -> ViewGrid:
    frames = np.full((FRAMES, SIZE, SIZE, 4), 255, np.uint8)
    views = np.full((FRAMES, 4, SIZE, SIZE, 4), 255, np.uint8)
    return replace(ViewGrid(frames, views, FOUR_VIEWS, fps=10.0), **changes)


def subject(grid: ViewGrid | None = None) -> Subject:
    field = DeformableField(DeformableFieldConfig(levels=2, log2_table_size=8, hidden_width=8))
    return Subject(field, OccupancyGrid(FRAMES, resolution=8), grid or view_grid(), 0.5)


def write_source(path: Path, count: int = FRAMES, width: int = 40, height: int = 30) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for level in range(count):
            picture = np.full((height, width, 3), 60 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_run_movies(folder, subject, presets, options, progress):
    """As a run does it."""
    plan = planned_movies(folder, subject, presets, options)
    write_movies(plan, options.size, progress)
    return plan.files, plan.sentences


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_an_orbit_goes_once_around_at_one_moment() -> None:
    taken, fps = shots("orbit", subject(), MovieOptions(seconds=2.0, fps=4.0))
    azimuths = [math.degrees(math.atan2(shot.c2w[1, 3], shot.c2w[0, 3])) % 360 for shot in taken]
    assert fps == 4.0 and np.allclose(azimuths, np.arange(8) * 45.0)
    assert {shot.time for shot in taken} == {0.5}, "the canonical moment"


def test_time_passes_at_the_clips_own_speed_at_any_rate() -> None:
    taken, fps = shots("time", subject(), OPTIONS)
    assert fps == 10.0 and [shot.time for shot in taken] == [0.0, 0.5, 1.0]
    finer, fps = shots("time", subject(), replace(OPTIONS, fps=20.0))
    assert fps == 20.0 and np.allclose([shot.time for shot in finer], [0, 0.25, 0.5, 0.75, 1.0])
    assert all((shot.c2w == finer[0].c2w).all() for shot in finer)


@pytest.mark.parametrize("fps", [4.0, 10.0, 40.0])
def test_a_movie_beside_or_over_the_input_keeps_its_speed_at_any_rate(tmp_path: Path, fps: float) -> None:
    """Frames repeat or are left out: the last one is reached as late as in the clip."""
    framing = Framing(20.0, 15.0, 20.0, 40, 30, SIZE).to_dict()
    source = write_source(tmp_path / "source.mp4")
    one = subject(view_grid(framing=framing, provenance={"source": str(source)}))
    frames = {4.0: [0, 2], 10.0: [0, 1, 2], 40.0: [0, 0, 0, 1, 1, 1, 2, 2, 2]}[fps]
    for preset in ("side-by-side", "overlay"):
        made = movie(preset, one, replace(OPTIONS, fps=fps))
        assert made.fps == fps and made.input_views is not None
        assert [frame for frame, _ in made.input_views] == frames and made.count == len(list(made.pictures()))
    assert len(one._input_views) <= FRAMES, "what repeats is rendered once"
    cost = made.cost(SIZE, set())
    assert sum(value == movies.KEPT_COST for value in cost) == len(frames) - len(set(frames))


def test_orbit_time_moves_both() -> None:
    taken, _ = shots("orbit-time", subject(), replace(OPTIONS, loops=2))
    assert [shot.time for shot in taken] == [0.0, 0.5, 1.0] * 2
    assert len({shot.c2w.tobytes() for shot in taken}) == 6


def test_an_input_from_below_keeps_the_orbit_clear_of_the_pole() -> None:
    grid = view_grid(plan=replace(FOUR_VIEWS, input_elevation_deg=85.0))
    taken, _ = shots("orbit", subject(grid), OPTIONS)
    assert all(np.isfinite(shot.c2w).all() for shot in taken)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_overlay_lies_where_the_framing_says(scale: float) -> None:
    """A dot of the crop lands at `to_source` of its place, within half a source pixel."""
    square = Framing(center_x=63.3, center_y=41.7, side=50.0, source_width=120, source_height=90, size=256)
    side = int(50 * scale)  # as many pixels as it is shown with
    picture = np.zeros((side, side, 4), np.uint8)
    part = side // 25
    picture[5 * part : 7 * part, 15 * part : 17 * part] = (255, 0, 0, 255)
    background = np.zeros((int(90 * scale), int(120 * scale), 3), np.uint8)
    made = paste_in_source(background, picture, square, scale)
    rows, columns = np.mgrid[: made.shape[0], : made.shape[1]] + 0.5
    weight = made[..., 0].astype(float)
    found = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum() / scale
    expected = square.to_source(np.array([16.0, 6.0]) / 25 * 256)
    assert np.abs(found - expected).max() < 0.5
    assert not made[..., 1:].any() and made[0, 0].sum() == 0


def test_a_runs_movies_show_its_mesh_and_the_field_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from sv4d_ns.export import make
    from sv4d_ns.export.formats.asset import AnimatedMesh
    from sv4d_ns.plugin import mesh_subject

    monkeypatch.setattr(mesh_subject, "FIELD_SIZE", SIZE // 2)
    of_field = subject()
    one = mesh_subject.MeshSubject(of_field.field, of_field.occupancy, of_field.grid, of_field.canonical_time)
    assert one.identity() != of_field.identity(), "movies of the field are made again"
    (shot,) = shots("time", one, OPTIONS)[0][:1]
    assert one.render(shot, SIZE).shape == (SIZE, SIZE, 4)
    assert one.name == of_field.name, "the caption is of what is drawn"

    plate = np.array([[0, -0.2, -0.2], [0.1, 0.2, -0.2], [0, 0.2, 0.2], [0.1, -0.2, 0.2]], np.float32)
    moving = np.stack([plate + np.array([0, 0, rise], np.float32) for rise in (0, 0.1, 0.2)])
    faces, colors = np.array([[0, 1, 2], [0, 2, 3]]), np.full((4, 3), (200, 0, 0), np.uint8)
    mesh = AnimatedMesh(moving, faces, colors, np.zeros_like(moving), 10.0, np.ones(4))
    done: list[tuple[int, int]] = []

    def make_asset(run: Any, options: Any, terminal: Any) -> AnimatedMesh:
        with terminal.bar("sampling the field", 7) as advance:
            advance()
        terminal.say("a finding")
        return mesh

    monkeypatch.setattr(make, "make_asset", make_asset)
    one.prepare(lambda *counts: done.append(counts))
    assert one.name == "4D asset (mesh)"
    assert done == [(1, mesh_subject.STAGES), (mesh_subject.STAGES, mesh_subject.STAGES)]
    first, later = (one.render(replace(shot, time=time), 64) for time in (0.0, 0.25))
    assert (first[first[..., 3] > 0][:, :3] == (200, 0, 0)).all()
    rows = [np.nonzero(picture[..., 3])[0].mean() for picture in (first, later)]
    assert 0.2 < rows[0] - rows[1] < 3, "half a frame's way up"


def test_the_bar_counts_what_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not pictures: the overlay shows again what the side-by-side movie has rendered, and went by in no time."""
    source = write_source(tmp_path / "source.mp4")
    framing = Framing(20.0, 15.0, 20.0, 40, 30, SIZE).to_dict()
    one = subject(view_grid(framing=framing, provenance={"source": str(source)}))
    rendered, shown = 0, []
    render = Subject.render

    def counted(*arguments: Any) -> Any:
        nonlocal rendered
        rendered += 1
        return render(*arguments)

    monkeypatch.setattr(Subject, "render", counted)
    options = replace(OPTIONS, size=16)
    write_run_movies(tmp_path / "out", one, PRESETS, options, lambda *done: shown.append((rendered, *done)))
    share = np.array([(count / rendered, done / total) for count, done, total in shown])
    assert len(shown) > rendered, "some pictures need no render"
    assert np.abs(share[:, 0] - share[:, 1]).max() < 0.1


def test_a_run_leaves_movies_that_play_and_are_not_made_again(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.mp4")
    square = Framing(20.0, 15.0, 20.0, 40, 30, SIZE)
    framing = StabilisedFraming((square, replace(square, center_x=22.0), replace(square, center_x=24.0))).to_dict()
    one = subject(view_grid(framing=framing, provenance={"source": str(source)}))
    calls: list[tuple[int, int]] = []
    folder = tmp_path / "movies"
    files, sentences = write_run_movies(folder, one, PRESETS, OPTIONS, lambda *done: calls.append(done))
    assert [file.stem for file in files] == list(PRESETS) and not sentences
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)
    assert len(frames_of(folder / "orbit.mp4")) == 6
    assert frames_of(folder / "side-by-side.mp4")[0].shape == (SIZE + caption_height(SIZE), 2 * SIZE, 3)
    overlay = frames_of(folder / "overlay.mp4")
    assert overlay[0].shape == (30, 40, 3)
    assert [round(float(frame[0, 0].mean()) / 60) for frame in overlay] == [0, 1, 2], "each over its own frame"
    head = (folder / "time.mp4").read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "players can start before the file is whole"

    before = {file: file.stat().st_mtime_ns for file in files}
    (folder / "time.mp4").unlink()
    again: list[tuple[int, int]] = []
    write_run_movies(folder, one, PRESETS, OPTIONS, lambda *done: again.append(done))
    assert again[-1] == (FRAMES, FRAMES), "only the missing one"
    assert all(file.stat().st_mtime_ns == at for file, at in before.items() if file.stem != "time")
    other = subject(one.grid)  # another field: all are old
    write_run_movies(folder, other, ("orbit",), OPTIONS, lambda *_: None)
    assert (folder / "orbit.mp4").stat().st_mtime_ns != before[folder / "orbit.mp4"]


@pytest.mark.parametrize("fault", ["no framing", "gone", "other length", "other size"])
def test_no_overlay_without_the_source_is_a_sentence(tmp_path: Path, fault: str) -> None:
    square = Framing(20.0, 15.0, 20.0, 40, 30, SIZE)
    source = tmp_path / "source.mp4"
    if fault != "gone":
        count, width = (2 if fault == "other length" else FRAMES), (64 if fault == "other size" else 40)
        write_source(source, count, width)
    framing = None if fault == "no framing" else square.to_dict()
    one = subject(view_grid(framing=framing, provenance={"source": str(source)}))
    files, sentences = write_run_movies(tmp_path / "out", one, ("overlay",), OPTIONS, lambda *_: None)
    assert files == [] and len(sentences) == 1 and sentences[0].startswith("No overlay")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="No overlay"):
        movie("overlay", one, OPTIONS)


def test_a_movie_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        movies.write_movie(tmp_path / "file" / "a.mp4", movie("time", subject(), OPTIONS), "k", lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["orbit", "--load-config", "none.yml", "--output-path", "a.mp4"], "none.yml does not exist"),
        (["time", "--load-config", "HERE", "--output-path", "a.avi"], "does not end in .mp4"),
        (["overlay", "--load-config", "HERE", "--output-path", "a.mp4", "--size", "33"], "--size 33"),
        (["orbit", "--load-config", "HERE", "--output-path", "a.mp4", "--time", "2"], "--time 2"),
        (["orbit", "--load-config", "HERE", "--output-path", "a.mp4", "--seconds", "0"], "--seconds 0"),
        (["orbit-time", "--load-config", "HERE", "--output-path", "a.mp4", "--loops", "0"], "--loops 0"),
        (["side-by-side", "--load-config", "HERE", "--output-path", "a.mp4", "--fps", "0"], "--fps 0"),
    ],
)
def test_bad_flags_of_sv4d_render(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    from sv4d_ns.movies.command import command

    config = tmp_path / "config.yml"
    config.write_text("")
    with pytest.raises(InputError, match=sentence.replace("-", r"\-")):
        command([str(config) if word == "HERE" else word for word in arguments])
    assert list(tmp_path.iterdir()) == [config]
