"""Training data, the trainer's promises (deterministic, resumable, safe), and the model it exports."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from sv4d_ns.cameras import ViewPlan
from sv4d_ns.diffusion.embedded import embedded_folder, load_embedded_pipeline
from sv4d_ns.diffusion.embedded.modules import PatchAutoencoder, PooledImageEncoder
from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline
from sv4d_ns.errors import InputError
from sv4d_ns.training import train as trainer
from sv4d_ns.training.data import HELD_OUT_SEEDS, TRAINING_SEEDS, BatchShape, draw_cameras, make_batch, to_model_images
from sv4d_ns.training.evaluate import (
    EvaluateConfig,
    evaluate,
    held_out_clip,
    mean_views,
    psnr,
    silhouette_iou,
)
from sv4d_ns.training.model import ModelConfig, TrainedParts, camera_vectors_of, fit_autoencoder
from sv4d_ns.training.train import TrainConfig, checkpoints, prepare, train

MICRO = ModelConfig(
    image_size=16, latent_channels=12, channels=(32, 32), head_dim=16, embedding_dim=8, camera_dims=(4, 8, 8)
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        output_dir=tmp_path / "run",
        seed=5,
        steps_3d=3,
        steps_4d=3,
        objects_3d=2,
        clips=((1, 2),),
        warmup_steps=2,
        decay_steps=2,
        threads=1,
        bfloat16=False,
        checkpoint_every=2,
        sheet_every=100,
        model=MICRO,
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_batch_depends_on_seed_and_step_alone():
    shape = BatchShape(objects=2, frames=3)
    first, again, other = (make_batch(1, step, shape, 16) for step in (4, 4, 5))
    assert first.inputs.shape == (2, 3, 16, 16, 4) and first.views.shape == (2, 3, 4, 16, 16, 4)
    for name in ("inputs", "views", "azimuths", "elevations"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.views, other.views)


def test_training_cameras_ascend_and_include_the_default_plan():
    rng = np.random.default_rng(0)
    rings = [draw_cameras(rng, 4) for _ in range(500)]
    azimuths = np.stack([ring[1] for ring in rings])
    assert (np.diff(azimuths, axis=1) > 0).all() and azimuths.min() >= 0 and azimuths.max() < 360
    elevations = np.array([ring[0] + ring[2] for ring in rings])
    assert np.abs(elevations).max() <= 50
    for call in (0, 1):
        wanted = np.array(ViewPlan.EMBEDDED.azimuths_deg[call::2])
        assert np.abs(azimuths - wanted).max(axis=1).min() < 15


def test_held_out_seeds_are_disjoint():
    assert TRAINING_SEEDS.stop <= HELD_OUT_SEEDS.start


def test_pictures_become_rgb_on_white_and_alpha():
    pictures = np.array([[[[0, 128, 255, 0], [0, 128, 255, 255]]]], dtype=np.uint8)
    image = to_model_images(pictures)[0]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 1.0, 1.0, -1.0]))
    torch.testing.assert_close(image[:, 0, 1], torch.tensor([-1.0, 128 / 127.5 - 1, 1.0, 1.0]))


def test_the_autoencoder_is_near_lossless_and_gives_unit_variance():
    vae, quality = fit_autoencoder(ModelConfig(image_size=32), seed=3)
    batch = make_batch(3, 1, BatchShape(8, 1), 32)
    images = to_model_images(batch.inputs).flatten(0, 1)
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (8, 32, 8, 8)
    error = (vae.decode(latents).sample - images).square().mean()
    assert quality > 30 and 10 * torch.log10(4 / error) > 30, "also on pictures it was not fitted on"
    fitted = make_batch(3, 2**40, BatchShape(64, 1), 32)
    everything = np.concatenate([fitted.inputs[:, :, None], fitted.views], axis=2)
    z = vae.encode(to_model_images(everything).flatten(0, 2)).latent_dist.mode()
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.02)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-2


def test_the_image_encoder_takes_any_size():
    encoder = PooledImageEncoder(embedding_dim=8)
    for size in (16, 64):
        assert encoder(torch.zeros(3, 4, size, size)).image_embeds.shape == (3, 8)


def test_the_target_is_what_the_sampler_undoes(config):
    """One step of the pipeline's own scheduler from any sigma to 0, given the target, must return the clean latents."""
    pipeline = prepared_pipeline(config)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1)
    sigma = scheduler.sigmas[0]
    x, noise = torch.randn(2, 5, 12, 4, 4)
    made = scheduler.step(trainer.v_target(x, noise, sigma), scheduler.timesteps[0], x + sigma * noise).prev_sample
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)
    assert scheduler.timesteps[0].item() == pytest.approx(sigma.log().item() / 4, rel=1e-5), "the trainer's c_noise"


def prepared_pipeline(config):
    state, vae = prepare(config)
    return trainer_pipeline(state.parts, vae, config)


def trainer_pipeline(parts, vae, config):
    from sv4d_ns.training.model import build_pipeline

    return build_pipeline(parts, vae, config.model, config.sampling)


def test_training_and_sampling_tell_the_network_the_same_cameras(config):
    batch = make_batch(0, 0, BatchShape(1, 2), 16)
    pipeline = prepared_pipeline(config)
    video = (to_model_images(batch.inputs[0]) + 1) / 2
    condition = pipeline.encode_condition(video, batch.azimuths[0].tolist(), batch.elevations[0].tolist())
    torch.testing.assert_close(condition.cameras[:4], camera_vectors_of(batch, config.model.camera_dims)[0])
    latents = pipeline.vae.encode(to_model_images(batch.inputs[0])).latent_dist.mode()
    torch.testing.assert_close(condition.latents, latents.repeat_interleave(4, dim=0), atol=1e-5, rtol=1e-5)


class Spy(nn.Module):
    """Stands for the network and keeps what it was given."""

    def forward(self, sample, timestep, embeddings, cameras, references):
        self.timestep, self.references = timestep, references
        return type("Output", (), {"sample": sample[:, : sample.shape[1] // 2]})


def test_references_are_all_or_none_and_never_given_to_single_moments(config):
    parts = TrainedParts(MICRO)
    parts.unet = Spy()
    vae, _ = fit_autoencoder(MICRO, 0)
    given = {}
    for frames, drop in ((1, 0.0), (2, 0.0), (2, 1.0)):
        batch = make_batch(0, 0, BatchShape(2, frames), 16)
        trainer.batch_loss(parts, vae, batch, dataclasses.replace(config, reference_drop=drop), 0)
        given[frames, drop] = parts.unet.references
        levels = parts.unet.timestep.unflatten(0, (2, -1))
        assert (levels == levels[:, :1]).all() and levels[0, 0] != levels[1, 0], "one noise level a sample"
    assert not given[1, 0.0].any() and not given[2, 1.0].any()
    first_frame = vae.encode(to_model_images(batch.views[:, 0]).flatten(0, 1)).latent_dist.mode()
    torch.testing.assert_close(given[2, 0.0], first_frame)


def test_noise_levels_follow_the_stated_distribution(config):
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat(
        [trainer.draw_log_sigma(4, config.log_sigma_mean, config.log_sigma_std, generator) for _ in range(2000)]
    )
    assert draws.mean().item() == pytest.approx(config.log_sigma_mean, abs=0.03)
    assert draws.std().item() == pytest.approx(config.log_sigma_std, rel=0.03)


def test_stages_and_learning_rate(config):
    long = dataclasses.replace(config, steps_3d=50, steps_4d=200, warmup_steps=10, decay_steps=100)
    frames = [trainer.batch_shape(long, step).frames for step in range(250)]
    assert set(frames[:50]) == {1} and set(frames[50:]) == {1, 2}
    assert np.mean(np.array(frames[50:]) == 1) == pytest.approx(long.still_share, abs=0.1)
    rates = [trainer.learning_rate(long, step) for step in range(250)]
    assert max(rates) == rates[100] == long.learning_rate and rates[0] < rates[5] < rates[9]
    assert all(np.diff(rates[150:]) < 0) and rates[-1] < 0.03 * long.learning_rate


def test_a_killed_run_continues_exactly(config, monkeypatch):
    train(config)
    whole = losses(config.output_dir)
    assert len(whole) == 6 and len(set(whole)) == 6

    broken = dataclasses.replace(config, output_dir=config.output_dir.with_name("killed"))
    real = trainer.train_step

    def dies_at_step_5(state, *rest):
        if state.step == 5:
            raise KeyboardInterrupt
        return real(state, *rest)

    monkeypatch.setattr(trainer, "train_step", dies_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    assert len(losses(broken.output_dir)) == 5 and checkpoints(broken.output_dir)[-1].name == "step_0000004"
    monkeypatch.setattr(trainer, "train_step", real)
    train(broken)
    assert losses(broken.output_dir) == whole
    for name in ("weights", "average"):
        first, second = (
            (checkpoints(folder)[-1] / f"{name}.safetensors").read_bytes()
            for folder in (config.output_dir, broken.output_dir)
        )
        assert first == second


def test_a_run_may_change_its_length_but_not_its_past(config):
    train(config)
    longer = dataclasses.replace(config, steps_4d=9)
    with pytest.raises(InputError, match="other training settings"):
        prepare(longer)  # the learning rate was already falling
    with pytest.raises(InputError, match="other training settings"):
        prepare(dataclasses.replace(config, seed=6))
    early = checkpoints(config.output_dir)[0]
    assert early.name == "step_0000004"
    state = trainer.fresh_state(config)
    vae = PatchAutoencoder(latent_channels=MICRO.latent_channels)
    trainer.load_checkpoint(early, state, vae, longer)
    assert state.step == 4


def test_a_loss_that_is_not_finite_changes_nothing(config, monkeypatch):
    state, vae = prepare(config)
    before = {name: value.clone() for name, value in state.parts.state_dict().items()}
    real = trainer.batch_loss
    monkeypatch.setattr(trainer, "batch_loss", lambda *arguments: real(*arguments) * float("nan"))
    entry = trainer.train_step(state, vae, make_batch(0, 0, BatchShape(1, 1), 16), config)
    assert entry["skipped"] and state.step == 1
    for name, value in state.parts.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_average_follows_its_formula():
    average, current = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = average.weight.detach() * 0.9 + current.weight.detach() * 0.1
    trainer.update_average(average, current, step=10_000, decay=0.9)
    torch.testing.assert_close(average.weight.detach(), expected)
    trainer.update_average(average, current, step=0, decay=0.9)
    expected = expected * 0.1 + current.weight.detach() * 0.9
    torch.testing.assert_close(average.weight.detach(), expected)


def test_the_loss_falls_on_one_batch(config, monkeypatch):
    config = dataclasses.replace(config, steps_3d=200, learning_rate=3e-3)
    state, vae = prepare(config)
    batch = make_batch(0, 0, BatchShape(1, 1), 16)
    generator = torch.Generator()

    def fixed_noise(samples, mean, std, _):
        return torch.full((samples,), 1.0)

    monkeypatch.setattr(trainer, "draw_log_sigma", fixed_noise)
    generator.manual_seed(0)
    values = [trainer.train_step(state, vae, batch, config)["loss"] for _ in range(60)]
    assert np.mean(values[-10:]) < 0.35 * np.mean(values[:3])


def test_training_writes_a_model_that_loads_and_samples(config):
    folder = train(dataclasses.replace(config, steps_3d=1, steps_4d=1))
    run = folder.parent
    assert (run / "loss_curve.png").is_file() and len(list((run / "sheets").glob("*.png"))) == 1
    pipeline = StableVideo4D2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(torch.rand(2, 4, 16, 16), [60.0, 150.0, 300.0], [0.0, 10.0, 0.0], num_inference_steps=2).frames
    assert frames.shape == (2, 3, 4, 16, 16) and frames.min() >= 0 and frames.max() <= 1
    average = checkpoints(run)[-1] / "average.safetensors"
    from safetensors.torch import load_file

    saved = load_file(average)["unet.conv_in.weight"]
    torch.testing.assert_close(pipeline.unet.conv_in.weight.float(), saved, atol=1e-3, rtol=1e-3)


def test_scores_of_known_pictures():
    truth = np.zeros((2, 4, 4, 3))
    assert psnr(truth + 0.1, truth) == pytest.approx([20.0, 20.0])
    mask = np.zeros((3, 4, 4), dtype=bool)
    mask[0, :2], mask[1, :1] = True, True
    np.testing.assert_allclose(silhouette_iou(mask, np.stack([mask[0], mask[0], mask[2]])), [1.0, 0.5, 1.0])


def test_evaluation_clips_are_held_out_and_the_mean_view_is_a_picture():
    clip, again = held_out_clip(3, 2, 16), held_out_clip(3, 2, 16)
    assert clip.inputs.shape == (2, 16, 16, 4) and clip.views.shape == (2, 8, 16, 16, 4)
    np.testing.assert_array_equal(clip.views, again.views)
    mean = mean_views(16, objects=6)
    assert mean.shape == (8, 16, 16, 4) and mean.min() >= 0 and mean.max() <= 1 and mean[..., 3].max() > 0.3


def test_evaluating_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no model"):
        evaluate(EvaluateConfig(model=tmp_path))


def test_the_embedded_model_fits_and_samples():
    size = sum(path.stat().st_size for path in embedded_folder().rglob("*.safetensors"))
    assert 1e6 < size < 15e6
    pipeline = load_embedded_pipeline("cpu")
    assert pipeline.unet.dtype == torch.float32 and pipeline.config.num_frames >= 8 and pipeline.config.num_views >= 4
    pipeline.set_progress_bar_config(disable=True)
    clip = held_out_clip(0, 2, pipeline.config.image_size)
    video = (to_model_images(clip.inputs) + 1) / 2
    frames = pipeline(video, list(ViewPlan.EMBEDDED.azimuths_deg[::2]), [0.0] * 4).frames
    assert frames.shape == (2, 4, 4, 64, 64) and frames.isfinite().all()
    assert frames.min() >= 0 and frames.max() <= 1


def test_the_embedded_model_beats_both_trivial_answers():
    rows = evaluate(EvaluateConfig(objects=6, frames=1, threads=1, mean_image_objects=60))
    copied, mean, model = rows
    assert model.psnr > max(copied.psnr, mean.psnr)
    assert model.iou > max(copied.iou, mean.iou)
