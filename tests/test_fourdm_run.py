"""Whole runs with 4DM in place of SV4D's model, both methods; and starts from a picture or a sentence.

The models are tiny and untrained, but on disk and loaded as the real ones are.
"""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import tyro
import yaml
from fourdm_fixture import fourdm_pipeline, save_image_to_video, save_text_to_image
from PIL import Image
from test_four_diffusion_run import run, short_config
from test_run import object_frames, write_video
from test_run import short_config as short_sv4d_config

from sv4d_ns.diffusion.fourdm.official import load_fourdm_pipeline
from sv4d_ns.distillation import text_to_video as generation
from sv4d_ns.evaluation.command import Evaluate
from sv4d_ns.field import images as renders
from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig
from sv4d_ns.plugin.distillation_pipeline import FourDiffusionPipeline
from sv4d_ns.runs.layout import checkpoint_steps
from sv4d_ns.synthesis.fourdm import KNOWN_POSE, FourDMSynthesizer
from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid

FRAMES = 4
"""One more than the tiny model's window."""
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def small_sheets():
    """Untrained models leave fog, and pictures of fog are dear."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renders, "SHEET_SIZE", 24)
        yield


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "creature.mp4", object_frames(FRAMES))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fourdm")
    fourdm_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


def with_fourdm(config, model: Path, data: Path):
    datamanager = config.pipeline.datamanager
    datamanager.data, datamanager.synthesis, datamanager.fourdm_checkpoint = data, "fourdm", model
    datamanager.synthesis_steps, datamanager.prompt = 2, "a fox"
    return config


def fourdm_config(output_dir: Path, model: Path, data: Path):
    return with_fourdm(short_config(output_dir, max_num_iterations=STEPS, steps_per_save=2), model, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, video: Path) -> Path:
    return run(fourdm_config(tmp_path_factory.mktemp("outputs"), model, video))


def field_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "nerfstudio_models" / f"step-{STEPS - 1:09d}.ckpt", weights_only=True)
    return {name: value for name, value in state["pipeline"].items() if "field." in name}


def test_4dm_makes_the_views_of_an_sv4d_run_from_matted_frames(tmp_path, model, video, monkeypatch):
    seen = []
    generate = FourDMSynthesizer.generate

    def watched(self, frames, plan, **rest):
        seen.append(frames)
        return generate(self, frames, plan, **rest)

    monkeypatch.setattr(FourDMSynthesizer, "generate", watched)
    config = with_fourdm(short_sv4d_config(tmp_path), model, video)
    config.pipeline.refine_steps, config.pipeline.movies = (3,), ()
    config.max_num_iterations, config.steps_per_save = 6, 100
    folder = run(config)
    assert 0 < (seen[0][..., 3] == 0).mean() < 1, "the background is cut away before the model sees the video"
    for name in ("views", "views_refined_1"):
        grid = ViewGrid.load(folder / name)
        assert grid.novel_views.shape[:2] == (FRAMES, 4) and grid.provenance["model"] == "4Diffusion 4DM"
    assert np.allclose(np.diff(grid.plan.azimuths_deg) % 360, 90) and grid.provenance[KNOWN_POSE] is False


def test_4diffusion_with_4dm_matches_one_of_its_views(finished, capfd):
    grid = ViewGrid.load(finished / "views")
    assert grid.provenance["prompt"] == "a fox" and grid.num_frames == FRAMES
    assert json.loads((finished / "summary.json").read_text())["steps"] == STEPS
    changed = field_of(finished)
    assert all(value.isfinite().all() for value in changed.values())


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path, model, video, finished, monkeypatch):
    terms = FourDiffusionPipeline.get_train_loss_dict

    def killed(self, step: int):
        if step == 3:
            raise MemoryError("killed")
        return terms(self, step)

    config = fourdm_config(tmp_path, model, video)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(FourDiffusionPipeline, "get_train_loss_dict", killed)
        run(config)
    folder = config.get_base_dir()
    kept = checkpoint_steps(folder / "nerfstudio_models")
    assert kept and kept[-1] < 3, "saved while it ran"
    monkeypatch.setattr(FourDMSynthesizer, "generate", lambda *a, **k: pytest.fail("the views were there"))
    assert run(yaml.unsafe_load((folder / "config.yml").read_text())) == folder
    for name, value in field_of(finished).items():
        assert torch.allclose(field_of(folder)[name], value, atol=1e-5), name


def test_a_run_is_evaluated(finished, tmp_path):
    Evaluate((finished,), out=tmp_path, size=16).main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert "hull" in report["candidates"][0]["summary"]


def test_a_folder_that_holds_no_pipeline(tmp_path):
    with pytest.raises(InputError, match="holds no 4DM pipeline"):
        load_fourdm_pipeline(tmp_path, "cpu")


def test_a_sentence_becomes_a_video_with_models_from_disk(tmp_path):
    config = short_config(tmp_path / "out", prompt="a fox", generated_size=64)
    config.text_to_image_model = str(save_text_to_image(tmp_path / "text", tmp_path))
    config.image_to_video_model = str(save_image_to_video(tmp_path / "video"))
    config.set_timestamp()
    made = config.pipeline.datamanager.data
    assert made.parent == tmp_path / "out" / ".generated" and config.experiment_name is not None
    with av.open(str(made)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 4 and (frames[0].width, frames[0].height) == (64, 64)
    picture = Image.open(next(made.parent.glob("*.png")))
    assert picture.size == (64, 64)
    with pytest.raises(InputError, match=r"--image-to-video-model .* does not take image"):
        generation.image_to_video(next(made.parent.glob("*.png")), config.text_to_image_model, tmp_path, "cpu", size=64)


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"--text-to-image-model .*nowhere cannot be loaded"):
        generation.text_to_image("a fox", str(tmp_path / "nowhere"), tmp_path, "cpu")


@pytest.mark.parametrize(
    ("picture", "area", "sides"),
    [((1000, 500), 576 * 1024, (512, 1088)), ((300, 300), 64**2, (64, 64)), ((4000, 10), 64**2, (64, 1280))],
)
def test_a_video_keeps_the_proportions_of_its_picture(picture, area, sides):
    found = generation.video_sides(picture, area)
    assert (found["height"], found["width"]) == sides
    assert generation.video_sides(picture, None) == {}


def test_the_short_name_of_the_synthesis_flag():
    chosen = tyro.cli(SV4DDataManagerConfig, args=["--pipeline.synthesis", "fourdm"])
    assert chosen.synthesis == "fourdm"
