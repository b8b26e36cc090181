"""Weights of other networks as starting points, and training from rendered data, with cached latents too."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusion_fixture import randomised, tiny_pipeline

from sv4d_ns.diffusion.sv4d.conditioning import camera_vectors
from sv4d_ns.diffusion_training import loss as objective
from sv4d_ns.diffusion_training import train as trainer
from sv4d_ns.diffusion_training.config import TrainConfig
from sv4d_ns.diffusion_training.data import RenderedSource, even_ring, make_batch, open_sources, resized
from sv4d_ns.diffusion_training.model import SamplingConfig
from sv4d_ns.diffusion_training.starts import SVD_FPS_ID, SVD_MOTION_BUCKET, from_svd, network_from_svd
from sv4d_ns.diffusion_training.told import step_sentence
from sv4d_ns.diffusion_training.train import Trainer, train
from sv4d_ns.training_data.orbits import Orbit
from sv4d_ns.training_data.render import RenderConfig, render_dataset
from sv4d_ns.utils.errors import InputError

PART = 8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_svd():
    torch.manual_seed(3)
    svd = UNetSpatioTemporalConditionModel(
        sample_size=2, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=PART, projection_class_embeddings_input_dim=3 * PART, cross_attention_dim=16,
        num_attention_heads=(2, 4),
    )  # fmt: skip
    return randomised(svd, seed=4)


def without_temporal_embedding(svd):
    """SVD with the image embedding taken out of its temporal blocks, which ours has no place for."""
    for name, parameter in svd.named_parameters():
        if "temporal_transformer_blocks" in name and "attn2.to_v" in name:
            torch.nn.init.zeros_(parameter)
    return svd


def test_a_network_that_starts_from_svd_gives_svds_output():
    svd = without_temporal_embedding(tiny_svd())
    ours = network_from_svd(svd, seed=0).eval()
    frames, sigma = 3, 1e-5
    generator = torch.Generator().manual_seed(0)
    noisy, condition = torch.randn(2, 1, frames, 4, 8, 8, generator=generator)
    embedding = torch.randn(1, 16, generator=generator)
    timestep = torch.tensor(0.3)
    told = torch.tensor([[SVD_FPS_ID, SVD_MOTION_BUCKET, sigma]])
    with torch.no_grad():
        sample = torch.cat([noisy, condition], dim=2)
        expected = svd(sample, timestep, embedding[:, None], added_time_ids=told).sample[0]
        for azimuth, references in ((0.0, torch.zeros(1, 4, 8, 8)), (2.0, torch.randn(1, 4, 8, 8))):
            cameras = camera_vectors(torch.ones(1), torch.tensor([azimuth]), sigma, (PART, 2 * PART, 2 * PART))
            made = ours(sample[0], timestep, embedding.expand(1, frames, 16), cameras.expand(frames, -1), references)
            torch.testing.assert_close(made.sample, expected, atol=2e-4, rtol=2e-3)


def test_what_svd_does_not_have_can_be_learned():
    ours = network_from_svd(tiny_svd(), seed=0)
    arguments = [torch.randn(2, 8, 8, 8), torch.zeros(2), torch.randn(1, 1, 16), torch.randn(2, 5 * PART),
                 torch.randn(2, 4, 8, 8)]  # fmt: skip
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        ours(*arguments).sample.square().mean().backward()
        optimizer.step()
    moved = [layer for layer in ours.modules() if hasattr(layer, "view_transformer_blocks")]
    assert moved
    for layer in moved:
        for parameter in (
            layer.view_transformer_blocks[0].attn1.to_out[0].weight,
            layer.view_embed.linear_2.weight,
            layer.frame_transformer_blocks[0].attn2.to_v.weight,
        ):
            assert parameter.any(), "starts at zero, but not without a gradient"


def test_a_folder_of_svd_becomes_a_pipeline(tmp_path):
    source = tiny_pipeline()
    tiny_svd().save_pretrained(tmp_path / "unet")
    torch.manual_seed(0)
    video = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=2
    )
    video.save_pretrained(tmp_path / "vae")
    source.image_encoder.save_pretrained(tmp_path / "image_encoder")
    pipeline = from_svd(tmp_path, SamplingConfig(frames=3, views=2), seed=0)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = video.encode(image).latent_dist.mode()
        torch.testing.assert_close(pipeline.vae.encode(image).latent_dist.mode(), expected)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(torch.rand(3, 3, 16, 16), [60.0, 200.0], [0.0, 0.0], num_inference_steps=1).frames
    assert frames.shape == (3, 2, 3, 16, 16) and torch.isfinite(frames).all()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered") / "data"
    render_dataset(RenderConfig("procedural:20:3", folder, frames=3, views=6, size=32, random_background=1.0))
    return folder


@pytest.fixture
def config(tmp_path, rendered):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    return TrainConfig(
        output_dir=tmp_path / "run", start=str(tmp_path / "tiny"), data=(str(rendered),), seed=5, steps_3d=1,
        steps_4d=2, objects_3d=2, clips=((2, 2),), views=2, views_3d=3, still_share=0.0, warmup_steps=2,
        decay_steps=2, threads=1, device="cpu", checkpoint_every=2, sheet_every=0,
    )  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_rendered_samples_are_the_stored_pictures(rendered):
    source = RenderedSource(rendered, 0)
    sample = source.sample(np.random.default_rng(1), frames=2, views=3, size=32, dynamic=True)
    place = sample.place
    assert place.orbit is Orbit.DYNAMIC and len(set(place.views)) == 4 and place.frames[1] == place.frames[0] + 1
    stored = source.dataset.pictures(place.record, place.orbit, place.frames, place.views)
    np.testing.assert_array_equal(sample.inputs, stored[:, 0])
    np.testing.assert_array_equal(sample.views, stored[:, 1:])
    azimuths, elevations = place.record.cameras(place.orbit)
    first, *others = place.views
    np.testing.assert_allclose(sample.azimuths, (azimuths[others] - azimuths[first]) % 360)
    np.testing.assert_allclose(sample.elevations, elevations[others] - elevations[first])
    assert (np.diff(sample.azimuths) > 0).all()


def test_novel_views_are_about_evenly_spaced():
    relative = 360.0 * np.arange(21) / 21
    for seed in range(20):
        chosen = even_ring(np.random.default_rng(seed), relative, 0, 4)
        gaps = np.diff([*relative[chosen], relative[chosen[0]] + 360])
        assert 0 not in chosen and gaps.min() > 50 and gaps.max() < 130


def test_pictures_shrink_without_dark_edges():
    pictures = np.zeros((1, 1, 32, 32, 4), dtype=np.uint8)
    pictures[..., 8:24, 8:24, :] = (200, 100, 50, 255)
    small = resized(pictures, 12)[0, 0]
    assert small.shape == (12, 12, 4)
    edge = (small[..., 3] > 20) & (small[..., 3] < 235)
    assert edge.any() and np.abs(small[edge][:, :3].astype(int) - [200, 100, 50]).max() < 12


def test_cached_latents_are_those_of_the_pictures(config):
    plain, cached = Trainer(config), Trainer(dataclasses.replace(config, cache_latents=True))
    shape = trainer.batch_shape(config, 1)
    one = make_batch(5, 1, shape, 16, plain.sources)
    other = make_batch(5, 1, shape, 16, cached.sources)
    first = objective.encode(plain.pipeline, one, torch.device("cpu"))
    second = cached.cache.encoded(other, torch.device("cpu"))
    for name in ("targets", "condition", "views", "cameras"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=5e-3, rtol=5e-3)
    embeddings = plain.state.parts.embed(first.images)
    torch.testing.assert_close(embeddings, second.embeddings, atol=5e-3, rtol=5e-3)
    assert np.isfinite(cached.step(other)["loss"])
    files = sorted((config.output_dir / "latents").iterdir())
    assert len(files) == 6  # three objects, two orbits
    files[0].write_bytes(b"torn")
    Trainer(dataclasses.replace(config, cache_latents=True))
    assert files[0].stat().st_size > 100, "a damaged file is made again"


def test_training_from_rendered_data_continues_exactly(config):
    mixed = dataclasses.replace(config, data=(*config.data, "procedural"))
    train(mixed)
    halves = dataclasses.replace(mixed, output_dir=config.output_dir.with_name("halves"))
    run = Trainer(halves)
    run._begin()
    for batch in trainer.batches(halves, run.sources, 16, 0, 0, 1):
        run._log(run.step(batch), halves.output_dir / "losses.jsonl", 1.0)
        if run.state.step == 2:
            trainer.save_checkpoint(run.state, run.pipeline, halves)
            break
    train(halves)
    assert losses(halves.output_dir) == losses(mixed.output_dir) and len(losses(mixed.output_dir)) == 3


def test_rendered_data_that_does_not_suffice_says_so(config, rendered):
    with pytest.raises(InputError, match="clips of 3 frames at most"):
        Trainer(dataclasses.replace(config, clips=((2, 4),)))
    with pytest.raises(InputError, match="more than 9 views"):
        make_batch(0, 0, dataclasses.replace(trainer.batch_shape(config, 0), views=9), 16, open_sources(config.data))


def test_early_steps_say_that_it_works_and_how_long_it_takes() -> None:
    def told(step: int, first: int = 0) -> str | None:
        return step_sentence({"step": step, "loss": 0.5, "seconds": 2.0 * (step - first)}, 200, first)

    assert [step for step in range(1, 101) if told(step)] == [2, 10, 50, 100]
    assert told(32, first=30) == "step 32/200  loss 0.5000  0.50 steps/s, 6 min left"
    assert told(31, first=30) is None
