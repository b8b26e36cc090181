"""The main job and everything after it, through nerfstudio's own entry points, on a very short schedule."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sv4d_ns.method_configs.sv4d import method

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.plugin import render_outputs as channels
from sv4d_ns.plugin.trainer import STEPS as WHOLE_LENGTH
from sv4d_ns.plugin.trainer import STEPS_OF_BUNDLED, SV4DTrainerConfig
from sv4d_ns.runs.layout import checkpoint_steps, newest_views, release_run
from sv4d_ns.training_data.procedural import creature, render
from sv4d_ns.views.grid import ViewGrid

FRAMES, STEPS = 3, 14
REFINE_AT = 9  # round(0.64 * STEPS): stage 2 by default
SEED = 2**31 + 5


def write_video(path: Path, frames: np.ndarray, fps: int = 10) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def object_frames(count: int = FRAMES, size: int = 96) -> np.ndarray:
    """A moving creature on white, uint8 RGB [count, size, size, 3]."""
    camera = ViewPlan.BUNDLED.c2w()[:1]
    rgba = render(creature(SEED), np.linspace(0, 1, count), camera, size)[:, 0].astype(float) / 255
    return np.round(255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])).astype(np.uint8)


def short_config(output_dir: Path, **changes) -> SV4DTrainerConfig:
    config = yaml.unsafe_load(yaml.dump(method.config))  # nerfstudio mutates the one it is given
    config.experiment_name, config.timestamp = None, "{timestamp}"
    config.pipeline.movies, config.pipeline.movie_size = ("time", "overlay"), 32
    config.pipeline.datamanager.synthesis_steps = 2
    config.pipeline.datamanager.train_num_rays_per_batch = 256
    config.vis = "tensorboard"
    return replace(config, **{"output_dir": output_dir, "max_num_iterations": STEPS, "steps_per_save": 4, **changes})


def run(config: SV4DTrainerConfig) -> Path:
    """`ns-train` after its argument parsing; returns the run folder."""
    from nerfstudio.scripts.train import main

    main(config)
    return config.get_base_dir()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "creature.mp4", object_frames())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, video: Path) -> Path:
    """A finished run."""
    return run(short_config(tmp_path_factory.mktemp("outputs"), data=video))


def test_a_run_leaves_checkpoint_grids_sheet_and_summary(finished: Path) -> None:
    assert finished.parent.parent.name == "creature", "the experiment is named after the video"
    assert checkpoint_steps(finished / "nerfstudio_models") == [STEPS - 1]
    generated, refined = ViewGrid.load(finished / "views"), ViewGrid.load(finished / "views_refined_1")
    assert generated.num_frames == FRAMES and generated.novel_views.shape[1:] == (8, 128, 128, 4)
    assert refined.confidence is not None
    assert (refined.novel_views != generated.novel_views).any(), "stage 2 replaces the targets"
    assert (refined.input_frames == generated.input_frames).all(), "the input video stays what it is"
    assert (finished / "contact_sheet.png").stat().st_size > 0
    assert json.loads((finished / "summary.json").read_text())["input_view_psnr"] > 5


def test_a_longer_run_refines_later_and_a_continued_one_where_it_did(finished: Path, tmp_path: Path) -> None:
    longer = short_config(tmp_path)
    longer.max_num_iterations = 100
    longer._spread_schedules()
    assert longer.pipeline.refine_steps == (64,)
    continued = short_config(tmp_path, load_dir=finished / "nerfstudio_models")
    continued.max_num_iterations = 100
    continued._spread_schedules()
    assert continued.pipeline.refine_steps == (REFINE_AT,)


def test_the_length_follows_from_who_makes_the_views(finished: Path, video: Path, tmp_path: Path) -> None:
    def length(**changes: object) -> int:
        config = short_config(tmp_path, max_num_iterations=0, **changes)
        config.settle()
        return int(config.max_num_iterations)

    assert length(data=video) == STEPS_OF_BUNDLED
    assert length(data=finished / "views") == WHOLE_LENGTH
    assert length(load_dir=finished / "nerfstudio_models") == STEPS
    config = short_config(tmp_path, data=video, max_num_iterations=7)
    config.settle()
    assert config.max_num_iterations == 7


def test_checkpoints_load_with_weights_only(finished: Path) -> None:
    path = finished / "nerfstudio_models" / f"step-{STEPS - 1:09d}.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["step"] == STEPS - 1
    assert any(name.startswith("_model.field.") for name in state["pipeline"])


def test_last_lines_are_the_next_commands(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Continuing a finished run does nothing but finish again: cheap, and the same lines."""
    config = yaml.unsafe_load((finished / "config.yml").read_text())
    run(config)
    lines = capfd.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["ns-viewer", "ns-render", "ns-export"]
    assert all("config.yml" in line for line in lines[-3:])


def test_evaluation_and_pictures_do_not_need_the_diffusion_model(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nerfstudio.utils.eval_utils import eval_setup

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the diffusion model was loaded")

    monkeypatch.setattr("sv4d_ns.synthesis.choice.load_synthesizer", forbidden)
    _, pipeline, _, step = eval_setup(finished / "config.yml")
    assert step == STEPS - 1
    metrics = pipeline.get_average_eval_image_metrics()
    assert {"psnr", "ssim"} <= set(metrics) and np.isfinite(metrics["psnr"])
    # the exporters' rays: all of the first frame
    bundle, _ = pipeline.datamanager.next_train(0)
    assert (bundle.times == 0).all()


def test_time_moves_in_paths_without_times(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nerfstudio.cameras.camera_paths import get_interpolated_camera_path
    from nerfstudio.utils.eval_utils import eval_setup

    _, pipeline, _, _ = eval_setup(finished / "config.yml")
    cameras = pipeline.datamanager.eval_dataset.cameras
    path = get_interpolated_camera_path(cameras, steps=2, order_poses=False)
    assert path.times is None
    path.rescale_output_resolution(1 / 8)
    asked: list[float] = []
    draw = channels.render_rays_chunked

    def drawn(field, occupancy, origins, directions, times, samples, **options):  # type: ignore[no-untyped-def]
        asked.append(float(times.mean()))
        return draw(field, occupancy, origins, directions, times, samples, **options)

    monkeypatch.setattr(channels, "render_rays_chunked", drawn)
    for index in range(3):
        camera = path[index : index + 1]
        pipeline.model.get_outputs_for_camera(camera)
        assert camera.times is None, "the caller's camera stays as it is"
    duration = FRAMES / 10
    assert asked == pytest.approx([0.0, 1 / 24 / duration, 2 / 24 / duration])


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("stop_at", [2, REFINE_AT, REFINE_AT + 3], ids=["stage 1", "refinement", "stage 2"])
def test_a_killed_run_resumes_where_it_stopped(
    tmp_path: Path, video: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Killed before step `stop_at`; continued by --load-config in place, and by --load-dir in a new folder.

    What comes out is that of the undisturbed run to the last bit: the figures and the hash of the field.
    """
    from sv4d_ns.plugin.trainer import SV4DTrainer
    from sv4d_ns.synthesis.sv4d import DiffusionSynthesizer

    iterate = SV4DTrainer.train_iteration

    def killed(self: SV4DTrainer, step: int):  # type: ignore[no-untyped-def]
        if step == stop_at:
            raise MemoryError("killed")
        return iterate(self, step)

    config = short_config(tmp_path, data=video)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(SV4DTrainer, "train_iteration", killed)
        run(config)
    folder = config.get_base_dir()
    saved = checkpoint_steps(folder / "nerfstudio_models")
    calls: list[str] = []
    for name in ("generate", "refine"):
        original = getattr(DiffusionSynthesizer, name)
        monkeypatch.setattr(
            DiffusionSynthesizer,
            name,
            lambda self, *a, _name=name, _original=original, **k: calls.append(_name) or _original(self, *a, **k),
        )
    if saved:
        elsewhere = short_config(tmp_path / "elsewhere", load_dir=folder / "nerfstudio_models")
        resumed = run(elsewhere)
        assert checkpoint_steps(resumed / "nerfstudio_models") == [STEPS - 1]
        assert newest_views(resumed) == resumed / "views_refined_1"
        assert "generate" not in calls, "views come from the run's grid"
    run(yaml.unsafe_load((folder / "config.yml").read_text()))
    assert checkpoint_steps(folder / "nerfstudio_models") == [STEPS - 1]
    assert "generate" not in calls
    assert figures(folder) == figures(finished)


def test_ctrl_c_twice_saves_a_whole_step(
    tmp_path: Path, video: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from sv4d_ns.plugin.trainer import SV4DTrainer

    iterate, before = SV4DTrainer.train_iteration, signal.getsignal(signal.SIGINT)

    def interrupted(self: SV4DTrainer, step: int):  # type: ignore[no-untyped-def]
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return iterate(self, step)

    config = short_config(tmp_path, data=video)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background have it ignored, as runs may
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(SV4DTrainer, "train_iteration", interrupted)
            run(config)
    finally:
        signal.signal(signal.SIGINT, before)
    folder = config.get_base_dir()
    assert ended.value.code == 130
    assert f"Stopped after 6 of {STEPS} steps. Go on with the same command" in capfd.readouterr().err
    assert checkpoint_steps(folder / "nerfstudio_models") == [5]
    release_run(folder)
    assert run(short_config(tmp_path, data=video)) == folder
    assert figures(folder) == figures(finished)


def test_a_setting_of_stage_2_keeps_stage_1(
    finished: Path, video: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another strength of stage 2 begins where stage 1 ended; other movies are made for the run that is there."""
    from sv4d_ns.plugin.trainer import SV4DTrainer

    iterate, steps = SV4DTrainer.train_iteration, []
    monkeypatch.setattr(SV4DTrainer, "train_iteration", lambda self, step: steps.append(step) or iterate(self, step))
    other = short_config(finished.parents[2], data=video)
    other.pipeline.refine_strength, other.pipeline.movies = 0.8, ()
    folder = run(other)
    said = capfd.readouterr().out.replace("\n", " ")
    assert folder != finished and steps == list(range(REFINE_AT, STEPS))
    assert "Stage 1 is taken from a run that differs in stage 2 only." in said
    assert figures(folder)["field"] != figures(finished)["field"]
    assert ViewGrid.load(folder / "views").content_id == ViewGrid.load(finished / "views").content_id
    again = short_config(finished.parents[2], data=video)
    again.pipeline.movies = ("time",)
    assert run(again) == finished and steps == list(range(REFINE_AT, STEPS))


@pytest.mark.parametrize("harm", ["code", "other model", "cut"])
def test_nerfstudios_commands_refuse_a_checkpoint_that_is_none(finished: Path, tmp_path: Path, harm: str) -> None:
    """ns-viewer, ns-eval and ns-render open checkpoints by `eval_setup`."""
    from nerfstudio.utils.eval_utils import eval_setup

    path = finished / "nerfstudio_models" / f"step-{STEPS - 1:09d}.ckpt"
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    try:
        if harm == "code":
            torch.save({**state, "more": Path("/a/path/is/no/tensor")}, path)
        elif harm == "other model":
            name = next(name for name, value in state["pipeline"].items() if value.ndim == 2)
            state["pipeline"][name] = state["pipeline"][name][:-1]
            torch.save(state, path)
        else:
            path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SystemExit, match=rf"^Error: .*{path.name} (holds more|does not fit|cannot be read)"):
            eval_setup(finished / "config.yml")
    finally:
        path.write_bytes(whole)


def test_the_same_command_finds_its_run_again(
    finished: Path, video: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "config.yml").stat().st_size
    again = short_config(finished.parents[2], data=video)
    assert run(again) == finished
    assert "finished: nothing is made again" in capfd.readouterr().out.replace("\n", " ")
    assert checkpoint_steps(finished / "nerfstudio_models") == [STEPS - 1]
    assert abs((finished / "config.yml").stat().st_size - before) < 200


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "always"])
def test_a_loss_that_is_not_finite_goes_back_once(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], lasting: bool
) -> None:
    from sv4d_ns.plugin.model import SV4DModel

    get_loss_dict, spoiled = SV4DModel.get_loss_dict, []

    def spoil(self, outputs, batch, metrics_dict=None):  # type: ignore[no-untyped-def]
        losses = get_loss_dict(self, outputs, batch, metrics_dict)
        spoiled.append(next(iter(losses)))
        if len(spoiled) >= 7 and (lasting or len(spoiled) == 7):
            losses[spoiled[0]] = losses[spoiled[0]] * float("nan")
        return losses

    monkeypatch.setattr(SV4DModel, "get_loss_dict", spoil)
    config = short_config(tmp_path, data=finished / "views")
    config.pipeline.refine_steps = ()
    if lasting:
        with pytest.raises(SystemExit) as ended:
            run(config)
        assert f"The loss term '{spoiled[0]}' is again not a finite number at step" in str(ended.value.code)
    else:
        run(config)
        assert json.loads((config.get_base_dir() / "summary.json").read_text())["input_view_psnr"] > 5
    said = " ".join(capfd.readouterr().out.split())
    assert f"The loss term '{spoiled[0]}' is not a finite number at step 6: going back to step 4" in said
