"""What would run on a GPU, without one: the released network in sizes, devices and types; steps with real values.

The first half uses PyTorch's fake tensors (sizes, no values: a network of 2 billion parameters costs nothing), the
second the stand-in of `pretend_card.py` (values, so that compaction and gradients work). Both raise where CUDA would
find tensors of two devices in one operation.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusion_fixture import FRAMES, VIEWS, tiny_pipeline, tiny_video
from pretend_card import CUDA, Card
from test_bundled_training import small_config
from test_four_diffusion import creature_grid, small_field
from test_training import MICRO
from tiny_run import tiny_config, tiny_grid
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.official import RELEASES, Architecture, Release
from sv4d_ns.distillation.motion import motion_loss
from sv4d_ns.distillation.objective import Objective, ObjectiveConfig, make_anchor
from sv4d_ns.distillation.priors import BundledPrior
from sv4d_ns.distillation.rendering import RenderSettings
from sv4d_ns.field.occupancy import OccupancyGrid

SMALL_VOLUMES = {
    "image_size": 16, "encoder_widths": (8, 8, 16, 16), "widths": (16, 16, 8), "view_channels": 8, "depth": 1
}  # fmt: skip


# ------------------------------------------------------------------------------ released sizes, without values


class Levels:
    """Stands for diffusers' sampler, whose own builds tensors from lists of numbers: fakes have none."""

    init_noise_sigma = 700.0
    config: ClassVar[dict[str, Any]] = {}

    def set_timesteps(self, steps: int) -> None:
        self.sigmas, self.timesteps = torch.ones(steps + 1), torch.ones(steps)

    def set_begin_index(self, begin: int) -> None:
        pass

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents / 2

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents - prediction,)


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def released(release: Release, device: str, dtype: torch.dtype) -> StableVideo4D2Pipeline:
    """A pipeline of the released sizes whose tensors are fake."""
    parts = Architecture()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = MultiViewVideoUNet(**parts.unet, camera_attention=release.camera_attention.value)
            encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**parts.image_encoder))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device(device):
        vae = AutoencoderKL(**parts.vae)
    pipeline = StableVideo4D2Pipeline(
        vae, encoder, unet, SCHEDULER, num_frames=release.num_frames, num_views=release.num_views,
        guidance=release.guidance.to_config(),
    )  # fmt: skip
    pipeline.scheduler = Levels()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.check_inputs = lambda *_: None  # it looks at values
    return pipeline


SCHEDULER = released_scheduler()


@pytest.mark.parametrize(
    ("release", "dtype"), zip(RELEASES.values(), (torch.float16, torch.bfloat16), strict=True), ids=["12x4", "5x8"]
)
def test_the_released_models_run_through_on_cuda(fake: FakeTensorMode, release: Release, dtype: torch.dtype) -> None:
    frames, views = release.num_frames, release.num_views
    pipeline = released(release, "cuda", dtype)
    video = torch.rand(frames, 3, 576, 576)
    seen = []
    given = {"reference_views": torch.rand(views, 3, 576, 576), "reference_known": [True] * (views - 1) + [False]}
    made = pipeline(
        video, [360.0 * v / (views + 1) for v in range(1, views + 1)], [0.0] * views, num_inference_steps=1,
        generator=torch.Generator("cpu"), callback_on_step_end=lambda *step: seen.append(step[3]["latents"]) or {},
        **given,
    ).frames  # fmt: skip
    assert made.shape == (frames, views, 3, 576, 576) and made.device == CUDA and made.dtype == torch.float32
    assert [latents.dtype for latents in seen] == [torch.float32]
    start = pipeline(
        video, [90.0] * views, [0.0] * views, num_inference_steps=2, strength=0.5, output_type="latent",
        initial_views=torch.rand(frames, views, 3, 576, 576), generator=torch.Generator("cpu"),
    ).frames  # fmt: skip
    assert start.shape == (frames, views, 4, 72, 72)


# ------------------------------------------------------------------------------------------- steps, with values


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr("sv4d_ns.field.volume_rendering.nerfacc_works", lambda: False)
    yield Card()


def test_sampling_on_the_card_gives_the_pictures_of_the_cpu(card: Card) -> None:
    """Whole on the card, with a component there at a time, and with weights stored in eight bits."""
    references = tiny_video(VIEWS, seed=1)

    def pictures(pipeline: StableVideo4D2Pipeline) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(tiny_video(), [90.0] * VIEWS, [0.0] * VIEWS, references, generator=generator).frames

    here, (there, parted, small) = pictures(tiny_pipeline()), [tiny_pipeline() for _ in range(3)]
    with card:
        there.to("cuda")
        parted.enable_model_cpu_offload(device="cuda")
        small.to("cuda")
        small.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        made = [pictures(pipeline) for pipeline in (there, parted, small)]
        assert {frames.device for frames in made} == {CUDA}
        assert {part.device.type for part in (parted.unet, parted.vae, parted.image_encoder)} == {"cpu"}
        made = [frames.cpu() for frames in made]
    assert here.shape == (FRAMES, VIEWS, 3, 16, 16)
    assert torch.allclose(here, made[0], atol=1e-5) and torch.allclose(here, made[1], atol=1e-5)
    assert (here - made[2]).abs().mean() < 0.1


def step_of(method: str, folder: Path, device: str, step: int, card: Card | None = None) -> tuple[dict, dict, Any]:
    """Losses and gradients of a step, and the pipeline."""
    torch.manual_seed(0)
    config = tiny_config(method, folder / device)
    tiny_grid().save(config.get_base_dir() / "views")
    config.pipeline.model.schedule_steps = 50
    config.pipeline.datamanager.train_num_rays_per_batch, config.pipeline.datamanager.patches = 64, 2
    pipeline = config.pipeline.setup(device=device, test_mode="val")
    with torch.no_grad():
        pipeline.model.field.density_head[-1].bias[0] += 1.5  # matter enough for a surface
    pipeline.model.carve(pipeline.datamanager.grid)
    pipeline.model.before_step(step)
    pipeline.get_train_loss_dict(step)  # the first one sets things up
    if card is not None:
        card.counts.clear(), card.places.clear()
    _, losses, _ = pipeline.get_train_loss_dict(step)
    sum(losses.values()).backward()
    counted = None if card is None else (dict(card.counts), dict(card.places))
    gradients = {n: None if p.grad is None else p.grad.cpu() for n, p in pipeline.model.named_parameters()}
    return {name: float(value.detach()) for name, value in losses.items()}, gradients, (pipeline, counted)


def agree(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-3) -> None:
    """The same tensors (or None), up to rounding."""
    assert {name for name, value in ours.items() if value is None} == {n for n, v in theirs.items() if v is None}
    for name, value in ours.items():
        if value is not None:
            assert (value - theirs[name]).abs().max() <= tolerance * value.abs().max() + 1e-7, name


@pytest.mark.parametrize(
    ("step", "asked"),
    [(40, {"bilateral_normal", "deformation_rigidity", "scene_flow"}), (41, {"normal_smoothness", "band_rigidity"})],
)
def test_a_step_of_both_stages_is_the_same_on_the_card(tmp_path: Path, card: Card, step: int, asked: set[str]) -> None:
    losses, gradients, _ = step_of("sv4d", tmp_path, "cpu", step)
    assert asked <= set(losses)
    with card:
        there, made, (pipeline, (counts, places)) = step_of("sv4d", tmp_path, "cuda", step, card)
        pipeline.config.visibility_every = 1
        pipeline._update_visibility(step)
    assert there == pytest.approx(losses, rel=1e-4, abs=1e-6)
    agree(gradients, made)
    assert counts == {"reads": 1, "compactions": 1}, places


def test_pictures_and_the_viewers_channels_on_the_card(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nerfstudio.cameras.cameras import Cameras

    from sv4d_ns.field.images import render_rgba

    monkeypatch.setattr("sv4d_ns.plugin.render_outputs.DEPTH_MAP_SIZE", 8)
    with card:
        *_, (pipeline, _) = step_of("sv4d", tmp_path, "cuda", 40)
        model, plan = pipeline.model, pipeline.datamanager.grid.plan
        pose = torch.from_numpy(plan.c2w()[:1, :3]).float()
        camera = Cameras(pose, 13.0, 13.0, 4.0, 4.0, 8, 8, times=torch.zeros(1, 1)).to("cuda")
        channels = model.get_outputs_for_camera(camera)
        pictures = {name: channels[name] for name in channels}
        assert {value.device for value in pictures.values()} == {CUDA}
        assert model.get_rgba_image(pictures).shape == (8, 8, 4)
        picture = render_rgba(model.field, model.occupancy, plan.c2w()[1], plan.focal_px(8), 8, 0.5)
        assert picture.shape == (8, 8, 4) and isinstance(picture, np.ndarray)


def test_stage_2_s_renders_and_an_export_are_the_same_on_the_card(
    tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from sv4d_ns.export import make
    from sv4d_ns.export.terminal import Terminal
    from sv4d_ns.field.images import render_grid
    from sv4d_ns.runs.open import FinishedRun

    monkeypatch.setattr(make, "FIELD_AZIMUTHS", 1)
    monkeypatch.setattr(make, "FIELD_ELEVATIONS_DEG", (0.0,))
    monkeypatch.setattr(make, "FIELD_PICTURE_SIZE", 12)
    found = []
    for device, there in (("cpu", nullcontext()), ("cuda", card)):
        with there:
            *_, (pipeline, _) = step_of("sv4d", tmp_path, device, 40)
            model, grid = pipeline.model, pipeline.datamanager.grid
            renders = render_grid(model.field, model.occupancy, grid, 8, lambda *_: None)
            run = FinishedRun(model.field, model.occupancy, grid, "tiny", {})
            mesh = make.make_asset(run, make.Options(16, 200, texture="none"), Terminal())
        found.append((renders, mesh))
    (renders, mesh), (renders_there, mesh_there) = found
    assert np.abs(renders.astype(int) - renders_there).max() <= 1 and renders[..., 3].mean() > 100
    assert mesh.positions.shape == mesh_there.positions.shape and len(mesh.faces) > 50
    assert np.abs(mesh.positions - mesh_there.positions).max() < 1e-3
    assert np.abs(mesh.colors.astype(int) - mesh_there.colors).mean() < 1


def test_a_step_of_distillation_is_the_same_on_the_card(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, pipeline = creature_grid((90.0,), 0.0, known=True), BundledVideoPipeline(VolumeDenoiser(**SMALL_VOLUMES))
    # a CPU computes the network in bf16, the stand-in in float32
    monkeypatch.setattr(VolumeDenoiser, "dtype", property(lambda _: torch.float64))
    found = []

    def step(device: str) -> None:
        model = copy.deepcopy(pipeline)
        model.denoiser.to(device)
        monkeypatch.setattr(BundledVideoPipeline, "_execution_device", property(lambda _: torch.device(device)))
        field, occupancy = small_field().to(device), OccupancyGrid(3, resolution=16).to(device)
        settings = ObjectiveConfig(total_steps=10, frames_per_step=2, render=RenderSettings(samples=30, normals=64))
        prior = BundledPrior(model, grid.input_frames, 2.0, 33.9, 0.0)
        objective = Objective(field, occupancy, prior, make_anchor(grid, 0, 16, device), 3, settings)
        objective.terms(4)  # the first one sets things up
        card.counts.clear(), card.places.clear()
        terms = {**objective.terms(4), "motion": motion_loss(field, occupancy, 3, 0, 4)}
        sum(terms.values()).backward()
        found.append(dict(card.counts))
        found.append({name: None if p.grad is None else p.grad.cpu() for name, p in field.named_parameters()})

    step("cpu")
    with card:
        step("cuda")
    # all pictures are marched through at once; all else goes on unread
    assert found[2] == {"compactions": 1}, card.places
    agree(found[1], found[3])


def trainer_on(device: str, kind: type, config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer that takes `device` for what the machine has."""
    monkeypatch.setattr(f"{kind.__module__}.choose_device", lambda _: (torch.device(device).type, ""))
    monkeypatch.setattr("accelerate.Accelerator.device", property(lambda _: torch.device(device)))
    return kind(config)


@pytest.mark.parametrize("which", ["bundled", "sv4d"])
def test_a_training_step_is_the_same_on_the_card(
    which: str, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sv4d_ns.diffusion_training import train as sv4d
    from sv4d_ns.diffusion_training.bundled import objective
    from sv4d_ns.diffusion_training.bundled import train as bundled

    if which == "bundled":
        small = VolumeDenoiser(**SMALL_VOLUMES)
        monkeypatch.setattr(bundled, "VolumeDenoiser", lambda depth: copy.deepcopy(small))
        monkeypatch.setattr(objective, "noise_generator", lambda generator, device: generator)
        kind, config = bundled.Trainer, small_config(tmp_path, clip_share=1.0, steps_3d=0)
        batch = bundled.StepDataset(config, 16)[0]
    else:
        kind = sv4d.Trainer
        config = sv4d.TrainConfig(
            tmp_path, steps_3d=0, steps_4d=2, clips=((2, 2),), views=2, still_share=0.0, reference_drop=0.0, threads=1,
            model=MICRO,
        )  # fmt: skip
        batch = next(iter(sv4d.batches(config, sv4d.open_sources(config.data), 16, 0, 0, 1)))
    here = trainer_on("cpu", kind, config, monkeypatch).step(batch)
    with card:
        trainer = trainer_on("cuda", kind, config, monkeypatch)
        batch = batch.to(trainer.device) if which == "bundled" else batch  # `batches` does
        there = trainer.step(batch)  # the first one sets things up
        card.counts.clear(), card.places.clear()
        trainer.step(batch)
    for name in ("loss", "grad_norm"):
        assert there[name] == pytest.approx(here[name], rel=1e-3), name
    assert card.counts["uploads"] == 0 and card.counts["reads"] == 1, card.places
