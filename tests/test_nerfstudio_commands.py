"""nerfstudio's own commands on our runs: from wherever the run lies, and with one sentence where they cannot work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.scripts.eval import ComputePSNR
from nerfstudio.scripts.render import DatasetRender, RenderCameraPath, RenderInterpolated, SpiralRender
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from tiny_run import tiny_config, write_tiny_run

from sv4d_ns.plugin.nerfstudio_commands import camera_path_flaw, say_config_errors, say_file_errors
from sv4d_ns.plugin.validation import check_settings
from sv4d_ns.runs.safe_config import check_config
from sv4d_ns.utils.errors import InputError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    return {method: write_tiny_run(method, folder) for method in ("sv4d", "4diffusion")}


@pytest.fixture
def run(runs: dict[str, Path]) -> Path:
    return runs["sv4d"]


# ------------------------------------------------------------------------------------------------------ where runs lie


@pytest.mark.parametrize("original_stays", [True, False], ids=["copied", "moved"])
@pytest.mark.parametrize("method", ["sv4d", "4diffusion"])
def test_a_copied_or_moved_run_opens_with_what_lies_beside_its_config(
    runs: dict[str, Path], method: str, original_stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "under another name"
    shutil.copytree(runs[method], moved)
    state = torch.load(next((moved / "nerfstudio_models").iterdir()), weights_only=True)
    for value in state["pipeline"].values():
        value.zero_()
    torch.save({**state, "step": 7}, moved / "nerfstudio_models" / "step-000000007.ckpt")
    monkeypatch.chdir(moved)
    if not original_stays:
        text = (moved / "config.yml").read_text()
        (moved / "config.yml").write_text(text.replace(runs[method].parts[-4], "a folder that is not there"))
    config, pipeline, checkpoint, step = eval_setup(Path("config.yml"))
    assert step == 7 and checkpoint.resolve().parent == moved / "nerfstudio_models"
    assert config.get_base_dir() == moved and pipeline.datamanager.config.run_dir == moved
    assert "_moved_to" not in yaml.dump(config), "where it lies is found again, not written down"
    assert pipeline.datamanager.get_datapath() == moved, "the video is not there: camera paths are kept with the run"


def test_a_config_without_its_run_is_told_so(run: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "config.yml"
    lonely.write_text((run / "config.yml").read_text().replace(run.parts[-4], "gone"))
    with pytest.raises(SystemExit, match=rf"^Error: {lonely} was moved without its run: .*bring the whole folder"):
        eval_setup(lonely)
    (tmp_path / "views").mkdir()
    with pytest.raises(SystemExit, match=r"belongs to an unfinished run.*let it finish"):
        eval_setup(lonely)


def test_a_config_alone_still_leads_to_the_run_it_names(run: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "config.yml"
    shutil.copy(run / "config.yml", lonely)
    assert eval_setup(lonely)[0].get_base_dir() == run


@pytest.mark.parametrize("system", ["Windows", "Posix"])
def test_configs_of_other_systems_open(run: Path, tmp_path: Path, system: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yml"
    text = config.read_text()
    assert "PosixPath" in text or "WindowsPath" in text
    config.write_text(text.replace("PosixPath", f"{system}Path").replace("WindowsPath", f"{system}Path"))
    check_config(config)
    opened, *_ = eval_setup(config)
    assert opened.get_base_dir() == tmp_path / "run"


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_dataset_is_rendered_smaller(run: Path, tmp_path: Path) -> None:
    names = ["rgb", "gt-rgb"]
    config = run / "config.yml"
    DatasetRender(
        config, tmp_path, downscale_factor=2, image_format="png", rendered_output_names=names, split="test"
    ).main()
    pictures = sorted(tmp_path.rglob("*.png"))
    assert len(pictures) == 2 * 3
    assert {np.array(Image.open(path)).shape for path in pictures} == {(8, 8, 3)}


PATH: dict[str, Any] = {
    "render_height": 8,
    "render_width": 8,
    "seconds": 1.0,
    "camera_path": [{"camera_to_world": np.eye(4).flatten().tolist(), "fov": 40.0}],
}


def spoiled(**changes: Any) -> dict[str, Any]:
    return {**PATH, **changes}


@pytest.mark.parametrize(
    ("read", "flaw"),
    [
        (PATH, None),
        (spoiled(crop=None, camera_type="perspective"), None),
        ([], "no camera path"),
        (spoiled(camera_path=[]), "no cameras"),
        (spoiled(seconds=0), "its seconds"),
        (spoiled(render_height="8"), "render_height"),
        (spoiled(camera_path=[{"camera_to_world": [1, 2], "fov": 40}]), "16 numbers"),
        (spoiled(camera_path=[*PATH["camera_path"], {"camera_to_world": [0] * 16}]), "fov of its camera 2"),
        (spoiled(camera_path=[{**PATH["camera_path"][0], "render_time": "late"}]), "render_time"),
        (spoiled(crop={"crop_center": [0, 0]}), "its crop"),
    ],
)
def test_what_is_wrong_with_a_camera_path(read: Any, flaw: str | None) -> None:
    found = camera_path_flaw(read)
    assert found is None if flaw is None else flaw in str(found)


def camera_path(folder: Path, text: str | None) -> Path:
    path = folder / "path.json"
    if text is not None:
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda c, t: RenderCameraPath(c, camera_path_filename=camera_path(t, None)), r"path\.json does not exist"),
        (lambda c, t: RenderCameraPath(c, camera_path_filename=camera_path(t, '{"a')), r"cannot be read \("),
        (
            lambda c, t: RenderCameraPath(c, camera_path_filename=camera_path(t, json.dumps(spoiled(camera_path=[])))),
            "it has no cameras: give a camera path the viewer has saved",
        ),
        (lambda c, t: ComputePSNR(c, output_path=t), "--output-path .* a file ending in .json"),
        (lambda c, t: ComputePSNR(c, output_path=Path("a.txt")), "--output-path a.txt"),
        (lambda c, t: ComputePSNR(c, render_output_path=c), "--render-output-path .* this is a file"),
        (lambda c, t: RenderInterpolated(c, t / "a.mp4", rendered_output_names=["normal"]), "has rgb, .*normals"),
        (lambda c, t: RenderInterpolated(c, t / "a.mp4", interpolation_steps=0), "--interpolation-steps 0"),
        (lambda c, t: RenderInterpolated(c, t / "a.mp4", frame_rate=0), "--frame-rate 0"),
        (lambda c, t: RenderInterpolated(c, t / "a.mp4", downscale_factor=0), "--downscale-factor 0"),
        (lambda c, t: RenderInterpolated(c, t), "--output-path .* ending in .mp4"),
        (lambda c, t: RenderInterpolated(c, c / "new" / "film.mp4"), "--output-path .* a place you may write to"),
        (lambda c, t: RenderInterpolated(c, t / "a.mp4", eval_num_rays_per_chunk=-1), "--eval-num-rays-per-chunk"),
        (lambda c, t: SpiralRender(c, t / "a.mp4", seconds=0.0), "--seconds 0.0"),
        (lambda c, t: DatasetRender(c, t, rendered_output_names=["raw-normal"]), "raw-normals"),
        (lambda c, t: DatasetRender(c, t, data=t), "--data .* leave it out"),
        (lambda c, t: DatasetRender(c, c), "--output-path .* this is a file"),
    ],
)
def test_what_a_command_cannot_do_is_said_before_the_work(
    run: Path, tmp_path: Path, make: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(SystemExit, match=rf"^Error: .*{sentence}"):
        make(run / "config.yml", tmp_path).main()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("gaussian-splat", "'splats' writes"),
        ("marching-cubes", "'mesh' writes"),
        ("tsdf", "'mesh' writes"),
        ("poisson", "--texture-method point_cloud"),
    ],
)
def test_exporters_that_do_not_fit_name_the_one_that_does(
    run: Path, tmp_path: Path, command: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sv4d_ns.export.command import run as export

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^Error: .*{sentence}"):
        export([command, "--load-config", str(run / "config.yml"), "--output-dir", str(tmp_path / "new" / "out")])
    assert not (tmp_path / "new").exists(), "nerfstudio makes the folder first"


def test_files_at_fault_are_named_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        tmp_path.mkdir()
    except FileExistsError as error:
        say_file_errors(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == f"Error: {tmp_path} cannot be used (File exists): choose another path.\n"
    missing = tmp_path / "config.yml"
    monkeypatch.setattr(sys, "argv", ["ns-eval", f"--load-config={missing}"])
    try:
        missing.read_text()
    except FileNotFoundError as error:
        say_config_errors(type(error), error, error.__traceback__)
    assert capsys.readouterr().err.startswith(f"Error: {missing} does not exist: give --load-config the config.yml")
    monkeypatch.setattr(sys, "argv", ["ns-eval", "--load_config", str(tmp_path)])
    try:
        tmp_path.read_text()
    except IsADirectoryError as error:
        say_config_errors(type(error), error, error.__traceback__)
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path} is a folder without a config.yml: give")
    try:
        raise ValueError("not of files")
    except ValueError as error:
        say_file_errors(type(error), error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["a: b: c\n  d", "just words", "!!python/object:nowhere.Nothing {}", "\xff"])
def test_a_file_that_is_no_config_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nerfstudio.utils.eval_utils import eval_setup

    path = tmp_path / "notes.txt"
    path.write_bytes(content.encode("latin-1"))
    monkeypatch.setattr(sys, "argv", ["ns-eval", "--load-config", str(path)])
    with pytest.raises(Exception) as caught:
        eval_setup(path)
    say_config_errors(caught.type, caught.value, caught.value.__traceback__)
    assert capsys.readouterr().err == f"Error: {path} is no config.yml of a run: give the one in a run's folder.\n"


@pytest.mark.parametrize("hook", [say_config_errors, say_file_errors])
def test_a_viewer_that_is_ended_with_ctrl_c_shows_no_traceback(hook: Any, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        hook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == "Stopped.\n"


# ------------------------------------------------------------------------------------------------------ services


def test_services_that_need_a_key_are_asked_for_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for vis, sentence in (("wandb", "'wandb login'"), ("viewer+wandb", "WANDB_MODE=offline"), ("comet", "COMET_API")):
        with pytest.raises(InputError, match=rf"--vis {vis.replace('+', '.')} .*{sentence}"):
            check_settings(tiny_config("sv4d", tmp_path, vis=vis))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COMET_API_KEY", "a key")
    check_settings(tiny_config("sv4d", tmp_path, vis="wandb"))
    check_settings(tiny_config("sv4d", tmp_path, vis="comet"))


# ------------------------------------------------------------------------------------------------------ settings


def test_a_refinement_beyond_the_run_is_refused(tmp_path: Path) -> None:
    config = tiny_config("sv4d", tmp_path, max_num_iterations=10)
    config.pipeline.refine_steps = (3, 10)
    with pytest.raises(InputError, match=r"--pipeline\.refine-steps 10 is not within the run's 10 steps"):
        check_settings(config)
    config.pipeline.refine_steps = None
    for length, rounds in ((10, (6,)), (1, ())):
        config.max_num_iterations, config.pipeline.refine_steps = length, None
        config._spread_schedules()
        check_settings(config)
        assert config.pipeline.refine_steps == rounds


@pytest.mark.parametrize(
    ("device", "machine", "chosen"),
    [("auto", "auto", "auto"), ("cpu", "auto", "cpu"), ("auto", "cpu", "cpu"), ("cpu", "cpu", "cpu")],
)
def test_nerfstudios_flag_for_the_device_is_followed(tmp_path: Path, device: str, machine: str, chosen: str) -> None:
    config = tiny_config("sv4d", tmp_path, device=device)
    config.machine.device_type = machine
    assert config.chosen_device() == chosen
    config.machine.device_type, config.device = "cpu", "cuda"
    with pytest.raises(InputError, match=r"--device cuda contradicts --machine\.device-type cpu"):
        config.chosen_device()


def test_4diffusion_has_no_flags_of_what_it_does_not_do() -> None:
    import tyro
    from sv4d_ns.method_configs.four_diffusion import method

    from sv4d_ns.plugin.distillation_trainer import FourDiffusionTrainerConfig

    flags = tyro.extras.get_parser(FourDiffusionTrainerConfig, default=method.config).format_help()
    for flag in ("--pipeline.refine-", "--pipeline.visibility-every", "--pipeline.model.encoding"):
        assert flag not in flags
    assert "--pipeline.model.occupancy-every" in flags


def test_4diffusion_resumes_with_its_only_views(runs: dict[str, Path]) -> None:
    config = yaml.unsafe_load((runs["4diffusion"] / "config.yml").read_text())
    config.pipeline.refine_steps = (1,)
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    pipeline.use_views_of_step(5)
    assert pipeline.datamanager.grid.num_frames == 3


def test_4diffusion_carves_with_the_views_that_are_not_left_out(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "sv4d_ns.fitting.train_views.train_views", lambda grid, device, leave_out=True: asked.append(leave_out) or []
    )
    for leave_out in (True, False):
        config = yaml.unsafe_load((runs["4diffusion"] / "config.yml").read_text())
        config.pipeline.datamanager.leave_out = leave_out
        pipeline = config.pipeline.setup(device="cpu", test_mode="inference")
        monkeypatch.setattr(pipeline.model.occupancy, "carve", lambda views: None)
        pipeline.model.carve(pipeline.datamanager.grid)
    assert asked == [True, False]


@pytest.mark.parametrize("method", ["sv4d", "4diffusion"])
def test_a_fit_can_be_measured_on_other_rays_while_it_trains(runs: dict[str, Path], method: str) -> None:
    """--steps-per-eval-batch and --steps-per-eval-image; training draws the same rays with and without them."""
    config = yaml.unsafe_load((runs[method] / "config.yml").read_text())
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    pipeline.model.carve(pipeline.datamanager.grid)
    before = pipeline.datamanager.training_sampler().draw(2, pipeline.datamanager.frame_window(2), 0)
    _, losses, metrics = pipeline.get_eval_loss_dict(2)
    assert {"photometric", "mask"} <= set(losses) and all(loss.isfinite() for loss in losses.values())
    assert np.isfinite(float(metrics["psnr"]))
    figures, pictures = pipeline.get_eval_image_metrics_and_images(2)
    assert figures["num_rays"] == 256 and pictures["img"].shape == (16, 32, 3)
    again = pipeline.datamanager.training_sampler().draw(2, pipeline.datamanager.frame_window(2), 0)
    measured = pipeline.datamanager.next_eval(2)[1]["batch"]
    assert torch.equal(before.jitter, again.jitter) and not torch.equal(before.jitter, measured.jitter)


def test_going_back_draws_other_pixels_and_leaves_the_settings(runs: dict[str, Path]) -> None:
    config = yaml.unsafe_load((runs["sv4d"] / "config.yml").read_text())
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    window = pipeline.datamanager.frame_window(2)
    before = pipeline.datamanager.training_sampler().draw(2, window, 0)
    pipeline.go_back(0)
    assert pipeline.datamanager.config.seed == 0
    assert not torch.equal(before.jitter, pipeline.datamanager.training_sampler().draw(2, window, 0).jitter)


def test_an_ffmpeg_that_is_lent_to_a_command_leaves_no_folder_behind() -> None:
    code = (
        "import os, shutil; shutil.which = lambda name: None; import sv4d_ns.utils.devices as devices; "
        "devices.ensure_ffmpeg_on_path(); print(os.environ['PATH'].split(os.pathsep)[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("sv4d-ffmpeg-") and not folder.exists()
