"""`ns-train 4diffusion` from a video to an export, on a very short schedule, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sv4d_ns.method_configs.four_diffusion import method
from test_run import object_frames, write_video

from sv4d_ns.distillation import text_to_video as generation
from sv4d_ns.plugin.distillation_trainer import (
    CPU_STEPS,
    FOURDM_STEPS,
    FourDiffusionTrainer,
    FourDiffusionTrainerConfig,
)
from sv4d_ns.runs.layout import checkpoint_steps
from sv4d_ns.synthesis.fourdm import load_fourdm_synthesizer
from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid

FRAMES, STEPS = 3, 6


def short_config(output_dir: Path, **changes) -> FourDiffusionTrainerConfig:
    config = yaml.unsafe_load(yaml.dump(method.config))  # nerfstudio mutates the one it is given
    config.experiment_name, config.timestamp = None, "{timestamp}"
    config.pipeline.frames_per_step, config.pipeline.anchor_size, config.pipeline.movies = 2, 32, ()
    config.pipeline.model.train_samples = 48
    config.pipeline.datamanager.train_num_rays_per_batch = 256
    config.vis = "tensorboard"
    return replace(config, **{"output_dir": output_dir, "max_num_iterations": STEPS, "steps_per_save": 2, **changes})


def run(config: FourDiffusionTrainerConfig) -> Path:
    from nerfstudio.scripts.train import main

    main(config)
    return config.get_base_dir()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "creature.mp4", object_frames(FRAMES))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, video: Path) -> Path:
    return run(short_config(tmp_path_factory.mktemp("outputs"), data=video))


def test_a_run_leaves_views_checkpoint_sheet_and_summary(finished):
    assert finished.parts[-2] == "4diffusion"
    assert checkpoint_steps(finished / "nerfstudio_models") == [STEPS - 1]
    assert ViewGrid.load(finished / "views").num_frames == FRAMES
    assert (finished / "contact_sheet.png").is_file()
    assert json.loads((finished / "summary.json").read_text())["steps"] == STEPS


def test_a_run_goes_on_from_its_checkpoint_and_starts_from_a_grid(finished, tmp_path):
    config = short_config(tmp_path, load_dir=finished / "nerfstudio_models", max_num_iterations=STEPS + 2)
    config.pipeline.datamanager.data = finished / "views"
    config.pipeline.warm_up = 0.5
    folder = run(config)
    assert checkpoint_steps(folder / "nerfstudio_models") == [STEPS + 1]
    state = torch.load(folder / "nerfstudio_models" / f"step-{STEPS + 1:09d}.ckpt", weights_only=True)
    assert any(name.endswith("field.space_time.table") for name in state["pipeline"])
    assert not any("unet" in name for name in state["pipeline"]), "the prior is not part of a checkpoint"


def test_a_finished_run_can_be_rendered_and_exported(finished):
    from sv4d_ns.export.surface.extraction import canonical_mesh, follow_vertices, opacity_grid
    from sv4d_ns.field.images import render_rgba
    from sv4d_ns.runs.open import load_run

    loaded = load_run(finished / "config.yml")
    plan = loaded.views.plan
    picture = render_rgba(loaded.field, loaded.occupancy, plan.c2w()[2], plan.focal_px(24), 24, 0.5)
    assert picture[..., 3].max() > 100
    rest = loaded.field.config.canonical_time
    grid = opacity_grid(loaded.field, 24, lambda x: loaded.occupancy.is_occupied(x, torch.full_like(x[:, :1], rest)))
    surface = canonical_mesh(grid, 500)
    tracks = follow_vertices(loaded.field, surface, loaded.views.times)
    assert tracks.positions.shape == (FRAMES, len(surface.vertices), 3) and np.isfinite(tracks.positions).all()


def refused(config: FourDiffusionTrainerConfig, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        config.set_timestamp()
        config.save_config()
    return str(stopped.value)


def test_a_picture_or_a_sentence_needs_a_model(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    assert "--image needs --image-to-video-model MODEL" in refused(short_config(tmp_path, image=picture), capsys)
    message = refused(short_config(tmp_path, prompt="a fox"), capsys)
    assert "needs --text-to-image-model MODEL" in message and "--data" in message
    message = refused(short_config(tmp_path, prompt="a fox", text_to_image_model="x"), capsys)
    assert "--image-to-video-model" in message
    assert "--data is missing" in refused(short_config(tmp_path), capsys)


def test_4dm_needs_its_checkpoint(tmp_path):
    with pytest.raises(InputError, match="fourdm-checkpoint PATH: download"):
        load_fourdm_synthesizer(None, "x/y", "", "cpu", None)
    with pytest.raises(InputError, match=r"missing\.ckpt does not exist"):
        load_fourdm_synthesizer(tmp_path / "missing.ckpt", "x/y", "", "cpu", None)


def test_length_and_model_follow_from_what_is_given(tmp_path, video):
    config = short_config(tmp_path, max_num_iterations=0)
    config.pipeline.datamanager.data = video
    config.set_timestamp()
    assert config.max_num_iterations == CPU_STEPS
    assert config.optimizers["encoding"]["scheduler"].max_steps == CPU_STEPS
    config = short_config(tmp_path, max_num_iterations=0)
    config.pipeline.datamanager.data = video
    config.pipeline.datamanager.fourdm_checkpoint = tmp_path / "4dm.ckpt"
    config.set_timestamp()
    assert config.pipeline.datamanager.synthesis == "fourdm" and config.max_num_iterations == FOURDM_STEPS
    assert config.optimizers["encoding"]["scheduler"] is None


def test_only_distilling_takes_all_threads(tmp_path, monkeypatch):
    """A step of the warm-up took ten times as long with two of them beside another program."""
    trainer = object.__new__(FourDiffusionTrainer)
    trainer.config, trainer.total_steps = short_config(tmp_path), STEPS
    monkeypatch.setattr("sv4d_ns.plugin.distillation_trainer.useful_threads", lambda: 4)
    assert [trainer.threads_of(step) for step in range(STEPS)] == [1, 1, 1, 4, 4, 4]


def test_a_sentence_becomes_a_picture_and_a_video_once(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def to(self, device):
            return self

        def __call__(self, **arguments):
            calls.append(sorted(arguments))
            if "prompt" in arguments:
                return SimpleNamespace(images=[Image.new("RGB", (32, 32), (200, 30, 30))])
            return SimpleNamespace(frames=[[arguments["image"]] * 4])

    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *a, **k: Fake())
    for _ in range(2):
        picture = generation.text_to_image("a fox", "some/model", tmp_path, "cpu")
        made = generation.image_to_video(picture, "other/model", tmp_path, "cpu")
    assert len(calls) == 2 and picture.suffix == ".png"
    import av

    with av.open(str(made)) as container:
        assert len(list(container.decode(video=0))) == 4
    with pytest.raises(InputError, match=r"--image .*nothing\.png cannot be read"):
        generation.image_to_video(tmp_path / "nothing.png", "other/model", tmp_path, "cpu")
