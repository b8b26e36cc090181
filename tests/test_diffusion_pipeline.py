"""The pipeline: diffusers conventions, guidance, partial denoising, saved and loaded, offloaded."""

import doctest
import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from diffusion_fixture import CAMERA_DIMS, FRAMES, SIZE, VIEWS, small_pipeline, tiny_pipeline, tiny_unet, tiny_video

from sv4d_ns.diffusion import lora
from sv4d_ns.diffusion.sv4d.conditioning import CLIP_MEAN, CLIP_STD, camera_angles, clip_pixels
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.small_components import PatchAutoencoder
from sv4d_ns.utils.errors import InputError

AZIMUTHS, ELEVATIONS = [90.0, 200.0], [0.0, -10.0]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def run(pipeline, seed=0, video=None, **arguments):
    video = tiny_video() if video is None else video
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(video, AZIMUTHS, ELEVATIONS, generator=generator, **arguments).frames


def test_frames(pipeline):
    frames = run(pipeline)
    assert frames.shape == (FRAMES, VIEWS, 3, SIZE, SIZE)
    assert frames.min() >= 0 and frames.max() <= 1 and frames.std() > 0.01


def test_the_generator_decides(pipeline):
    assert torch.equal(run(pipeline, seed=1), run(pipeline, seed=1))
    assert not torch.equal(run(pipeline, seed=1), run(pipeline, seed=2))


def test_given_noise_is_used(pipeline):
    noise = torch.randn(FRAMES * VIEWS, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(1))
    given = pipeline(tiny_video(), AZIMUTHS, ELEVATIONS, latents=noise.unflatten(0, (FRAMES, VIEWS))).frames
    assert torch.equal(given, run(pipeline, seed=1))


def test_output_types(pipeline):
    images = run(pipeline)
    array = run(pipeline, output_type="np")
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, images.permute(0, 1, 3, 4, 2).numpy())
    latents = run(pipeline, output_type="latent")
    assert latents.shape == (FRAMES, VIEWS, 4, 8, 8)
    assert torch.equal(pipeline.decode_latents(latents.flatten(0, 1)).unflatten(0, (FRAMES, VIEWS)), images)
    pair = pipeline(
        tiny_video(), AZIMUTHS, ELEVATIONS, generator=torch.Generator("cpu").manual_seed(0), return_dict=False
    )
    assert isinstance(pair, tuple) and torch.equal(pair[0], images)


def test_chunks_do_not_matter(pipeline):
    torch.testing.assert_close(run(pipeline, decode_chunk_size=1), run(pipeline), atol=1e-5, rtol=0)


def test_callback_sees_and_replaces_latents(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = run(pipeline, output_type="latent", callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [time for _, time, _ in seen] == sorted((time for _, time, _ in seen), reverse=True)
    assert seen[0][1] == pytest.approx(0.25 * math.log(700), rel=1e-4)
    assert seen[0][2] == (FRAMES * VIEWS, 4, 8, 8)
    assert not latents.any()


def test_conditions_matter(pipeline):
    base = run(pipeline, output_type="latent")
    other_video = run(pipeline, video=tiny_video(seed=5), output_type="latent")
    with_views = run(pipeline, reference_views=tiny_video(VIEWS, seed=3), output_type="latent")
    generator = torch.Generator("cpu").manual_seed(0)
    other_angles = pipeline(tiny_video(), [10.0, 200.0], ELEVATIONS, generator=generator, output_type="latent").frames
    for other in (other_video, with_views, other_angles):
        assert (other - base).abs().max() > 1e-3


def count_batches(pipeline, monkeypatch) -> list[int]:
    sizes = []
    forward = pipeline.unet.forward

    def counting(sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipeline.unet, "forward", counting)
    return sizes


def test_guidance_of_one_is_one_forward(pipeline, monkeypatch):
    sizes = count_batches(pipeline, monkeypatch)
    alone = run(pipeline, guidance=Guidance(GuidanceKind.CONSTANT, 1.0), output_type="latent")
    assert sizes == [FRAMES * VIEWS] * 3
    both = run(pipeline, guidance=Guidance(GuidanceKind.LINEAR, 1.0, 1.0), output_type="latent")
    assert sizes[3:] == [2 * FRAMES * VIEWS] * 3
    torch.testing.assert_close(alone, both, atol=1e-4, rtol=1e-4)


def test_guidance_extrapolates(pipeline):
    """With one step the result is affine in the scale."""
    one, two, three = (
        run(pipeline, guidance=Guidance(GuidanceKind.CONSTANT, s), num_inference_steps=1, output_type="latent")
        for s in (1.0, 2.0, 3.0)
    )
    torch.testing.assert_close(three - two, two - one, atol=1e-2, rtol=1e-3)
    assert (two - one).abs().max() > 0.1


def test_guidance_scales():
    ramp = Guidance(GuidanceKind.LINEAR, 2.0).scales(12, 4)
    assert ramp[0, 0] == 1 and ramp[-1, -1] == 2 and torch.all(ramp.flatten().diff() > 0)
    both = Guidance(GuidanceKind.SPATIOTEMPORAL, 2.5, 1.5).scales(5, 8)
    assert both.max() == pytest.approx(1.5 + 0.5 * (1 + 6 / 7), abs=1e-6)
    assert Guidance(GuidanceKind.SPATIOTEMPORAL, 2.5, 1.5).scales(1, 1).item() == 1.5
    assert Guidance(GuidanceKind.LINEAR, 2.0).scales(1, 1).item() == 1.0
    with pytest.raises(InputError, match="kind"):
        Guidance.from_config({"kind": "stronger", "scale": 2, "min_scale": 1})
    config = Guidance(GuidanceKind.SPATIOTEMPORAL, 2.5, 1.5).to_config()
    assert Guidance.from_config(config) == Guidance(GuidanceKind.SPATIOTEMPORAL, 2.5, 1.5)


def test_strength_runs_the_end_of_the_schedule(pipeline, monkeypatch):
    start = torch.rand(FRAMES, VIEWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    clean = pipeline.encode_images(start.flatten(0, 1)) * pipeline.vae.config.scaling_factor
    distances = []
    for strength, steps in ((0.1, 1), (0.5, 5), (1.0, 10)):
        assert pipeline.steps_to_run(10, strength) == steps
        sizes = count_batches(pipeline, monkeypatch)
        latents = run(
            pipeline, initial_views=start, strength=strength, num_inference_steps=10, output_type="latent",
            guidance=Guidance(GuidanceKind.CONSTANT, 1.0),
        )  # fmt: skip
        assert len(sizes) == steps
        monkeypatch.undo()
        distances.append((latents.flatten(0, 1) - clean).abs().mean().item())
    assert distances[0] < 0.02 < distances[1] < distances[2]


def test_sampler_recovers_a_known_image(pipeline, monkeypatch):
    """With a network that knows the answer, every start and strength ends at it."""
    answer = torch.randn(FRAMES * VIEWS, 4, 8, 8, generator=torch.Generator().manual_seed(9))

    def perfect(sample, timestep, *args, **kwargs):
        sigma = torch.exp(4 * timestep)
        noisy = sample[:, :4] * (sigma**2 + 1).sqrt()
        return ((noisy / (sigma**2 + 1) - answer) * (sigma**2 + 1).sqrt() / sigma,)

    monkeypatch.setattr(pipeline.unet, "forward", perfect)
    start = torch.rand(FRAMES, VIEWS, 3, SIZE, SIZE)
    plain = Guidance(GuidanceKind.CONSTANT, 1.0)
    for arguments in ({}, {"initial_views": start, "strength": 0.6}):
        latents = run(pipeline, num_inference_steps=5, guidance=plain, output_type="latent", **arguments)
        torch.testing.assert_close(latents.flatten(0, 1), answer, atol=1e-3, rtol=1e-3)


def test_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = StableVideo4D2Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert dict(loaded.config).items() >= {"camera_dims": CAMERA_DIMS, "num_frames": FRAMES}.items()
    assert set(loaded.components) == {"vae", "image_encoder", "unet", "scheduler"}
    assert torch.equal(run(loaded), run(pipeline))


def test_saved_before_the_modules_moved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"][0] == "sv4d_ns.diffusion.sv4d.unet"
    (tmp_path / "model_index.json").write_text(
        json.dumps({**index, "unet": ["sv4d_ns.diffusion.unet", *index["unet"][1:]]})
    )
    assert type(StableVideo4D2Pipeline.from_pretrained(tmp_path).unet) is type(pipeline.unet)


def test_components_of_this_package_saved_and_loaded(tmp_path, monkeypatch):
    pipeline = small_pipeline()
    video = tiny_video(channels=4)
    frames = run(pipeline, video=video)
    assert frames.shape == (FRAMES, VIEWS, 4, SIZE, SIZE)
    pipeline.save_pretrained(tmp_path)
    # as in a process that has not imported these components
    monkeypatch.delitem(sys.modules, PatchAutoencoder.__module__)
    loaded = StableVideo4D2Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae).__name__ == "PatchAutoencoder"
    assert type(loaded.image_encoder).__name__ == "PooledImageEncoder"
    assert torch.equal(run(loaded, video=video), frames)


def test_pictures(pipeline):
    array = run(pipeline, output_type="np")
    pictures = run(pipeline, output_type="pil")
    assert len(pictures) == FRAMES and len(pictures[0]) == VIEWS and pictures[0][0].size == (SIZE, SIZE)
    assert np.abs(np.asarray(pictures[1][0]) / 255 - array[1, 0]).max() <= 0.51 / 255


def test_one_generator_an_image(pipeline):
    def generators(seeds):
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    n = FRAMES * VIEWS
    made = pipeline(tiny_video(), AZIMUTHS, ELEVATIONS, generator=generators(range(n)), output_type="latent").frames
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators(range(n))])
    given = noise.unflatten(0, (FRAMES, VIEWS))
    again = pipeline(tiny_video(), AZIMUTHS, ELEVATIONS, latents=given, output_type="latent").frames
    assert torch.equal(made, again)
    with pytest.raises(InputError, match="generator has 2"):
        pipeline(tiny_video(), AZIMUTHS, ELEVATIONS, generator=generators(range(2)))


def test_interrupted_by_the_callback(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, list(tensors)))
        pipe.interrupt = True

    frames = run(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen == [(0, [])] and pipeline.num_timesteps == 3
    assert frames.shape == (FRAMES, VIEWS, 3, SIZE, SIZE)
    assert run(pipeline).shape == frames.shape and len(seen) == 1


@pytest.mark.parametrize("own", [False, True], ids=["official components", "own components"])
@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level"])
def test_offloaded_runs_are_the_same(kind, own):
    """Without a GPU the hooks move weights from the CPU to the CPU; accelerate's sequential ones refuse to."""
    pipeline, video = (small_pipeline(), tiny_video(channels=4)) if own else (tiny_pipeline(), tiny_video())
    expected = run(pipeline, video=video)
    if kind == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    else:
        pipeline.unet.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    for _ in range(2):
        torch.testing.assert_close(run(pipeline, video=video), expected, atol=1e-4, rtol=0)


@pytest.fixture
def adapter_folder(tmp_path):
    """A LoRA on attention, feed-forward and convolution layers, as PEFT and diffusers write it."""
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "spatial_res_block.conv1"]
    torch.manual_seed(3)
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=names))
    StableVideo4D2Pipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(unet))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    return tmp_path


def test_adapters_are_loaded_fused_and_unloaded(adapter_folder):
    pipeline = tiny_pipeline()
    plain = run(pipeline, output_type="latent")
    pipeline.load_lora_weights(adapter_folder, adapter_name="style")
    assert pipeline.get_active_adapters() == ["style"]
    adapted = run(pipeline, output_type="latent")
    assert (adapted - plain).abs().max() > 1e-2
    pipeline.set_adapters("style", 0.0)
    torch.testing.assert_close(run(pipeline, output_type="latent"), plain, atol=1e-4, rtol=1e-4)
    pipeline.set_adapters("style", 1.0)
    pipeline.fuse_lora()
    torch.testing.assert_close(run(pipeline, output_type="latent"), adapted, atol=1e-2, rtol=1e-3)
    pipeline.unfuse_lora()
    torch.testing.assert_close(run(pipeline, output_type="latent"), adapted, atol=1e-2, rtol=1e-3)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(run(pipeline, output_type="latent"), plain, atol=1e-4, rtol=1e-4)


def test_adapters_that_cannot_be_used(adapter_folder, monkeypatch):
    pipeline = tiny_pipeline()
    with pytest.raises(InputError, match=r"start with 'unet\."):
        pipeline.load_lora_weights({"transformer.x.lora_A.weight": torch.zeros(2, 2)})
    monkeypatch.setattr(lora, "is_peft_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install '\.\[lora\]'"):
        pipeline.load_lora_weights(adapter_folder)


def test_example_of_the_docstring():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    text = inspect.cleandoc(StableVideo4D2Pipeline.__doc__).replace("```py", "").replace("```", "")
    example = parser.get_doctest(text, {}, "StableVideo4D2Pipeline", None, 0)
    assert runner.run(example) == (0, len(example.examples)) and len(example.examples) >= 8


def test_low_precision_is_close(pipeline):
    expected = run(pipeline, output_type="latent")
    low = tiny_pipeline().to(torch.bfloat16)
    latents = run(low, output_type="latent")
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_other_lengths_and_view_counts(pipeline):
    generator = torch.Generator("cpu").manual_seed(0)
    for frames, views in ((1, 1), (5, 3)):
        output = pipeline(tiny_video(frames), [30.0] * views, [0.0] * views, generator=generator).frames
        assert output.shape == (frames, views, 3, SIZE, SIZE)


GOOD = {"video": tiny_video(), "azimuths_deg": AZIMUTHS, "elevations_deg": ELEVATIONS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": tiny_video(channels=4)}, "video must be"),
        ({"video": tiny_video() * 255}, r"video must be in \[0, 1\]"),
        ({"video": tiny_video() * float("nan")}, "NaN"),
        ({"video": tiny_video()[..., :14]}, "multiples of 4"),
        ({"elevations_deg": [0.0]}, "2 and 1"),
        ({"azimuths_deg": [], "elevations_deg": []}, "at least one"),
        ({"reference_views": tiny_video(1)}, "reference_views"),
        ({"initial_views": tiny_video()}, "initial_views"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 0.5}, "initial_views"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"output_type": "gif"}, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback"),
        ({"latents": torch.zeros(1, 2, 4, 8, 8)}, "latents"),
        ({"decode_chunk_size": 0}, "decode_chunk_size"),
    ],
)
def test_bad_arguments(pipeline, change, message):
    with pytest.raises(InputError, match=message):
        pipeline(**{**GOOD, **change})


def test_angles():
    polar, azimuth = camera_angles([-30.0, 390.0], [10.0, -90.0])
    torch.testing.assert_close(azimuth.rad2deg(), torch.tensor([330.0, 30.0], dtype=torch.float64))
    torch.testing.assert_close(polar.rad2deg(), torch.tensor([80.0, 180.0], dtype=torch.float64))


@pytest.mark.parametrize("size", [(576, 576), (320, 260), (500, 200), (64, 64)])
def test_clip_preprocessing_is_that_of_diffusers(size):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if max(size) > 224:
        resized = _resize_with_antialiasing(images, (224, 224))
    else:
        resized = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(clip_pixels(images), ((resized + 1) / 2 - mean) / std, atol=1e-5, rtol=1e-5)
