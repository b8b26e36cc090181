"""4DM with encoders, tiny and untrained: from frames and a prompt to views, and to a gradient in renders."""

import pytest
import torch
from fourdm_fixture import fourdm_pipeline
from fourdm_fixture import squares as frames

from sv4d_ns.diffusion.fourdm.pipeline import FourDMPipeline
from sv4d_ns.distillation.cameras import DrawnViews
from sv4d_ns.distillation.priors import FourDMPrior
from sv4d_ns.utils.errors import InputError


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> FourDMPipeline:
    return fourdm_pipeline(tmp_path_factory.mktemp("tokenizer"))


def test_views_of_a_video(pipeline):
    generator = torch.Generator().manual_seed(0)
    views = pipeline(frames(5), "a fox", num_inference_steps=2, generator=generator)
    assert views.shape == (3, 4, 3, 16, 16), "a longer video is thinned"
    assert views.min() >= 0 and views.max() <= 1
    again = pipeline(frames(5), "a fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(views, again)


def test_inputs_that_cannot_be_used(pipeline):
    with pytest.raises(InputError, match="8-bit RGBA"):
        pipeline(frames(2)[..., :3])
    with pytest.raises(InputError, match="prompt is 402 tokens long"):
        pipeline.encode_prompt("a " * 400)


def test_prompt_and_frames_reach_the_condition(pipeline):
    one, other = pipeline.condition(frames(3), "fox"), pipeline.condition(frames(3), "")
    assert (one.text - other.text).abs().max() > 1e-4 and torch.equal(one.image_tokens, other.image_tokens)
    assert (one.image_tokens[0] - one.image_tokens[1]).abs().max() > 1e-5
    assert one.no_image_tokens.abs().max() > 0, "the projection of zeros is not zero"
    assert one.image_latents.shape == (3, 4, 8, 8)


def test_encoding_in_parts_has_the_gradient_of_the_whole(pipeline, monkeypatch):
    results = []
    for chunk in (8, 2):
        monkeypatch.setattr("sv4d_ns.diffusion.fourdm.pipeline.ENCODE_CHUNK", chunk)
        images = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        latents = pipeline.encode_images(images)
        latents.square().sum().backward()
        results.append((latents.detach(), images.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_the_prior_pulls_renders(pipeline):
    prior = FourDMPrior(pipeline, frames(6), "a fox", front_deg=90.0)
    assert prior.pipeline.image_encoder is None and prior.condition.num_frames == 6
    assert pipeline.image_encoder is not None and pipeline.text_encoder is not None, "others' pipeline stays whole"
    renders = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    latents = prior.encode(renders, torch.Generator().manual_seed(3))
    views = DrawnViews((-90.0, 0.0, 90.0, 180.0), 2.0)
    noise = torch.Generator().manual_seed
    targets = [prior.target(latents, numbers, views, 500, noise(4)) for numbers in ([0, 1, 2], [3, 4, 5])]
    assert targets[0].shape == latents.shape and not targets[0].requires_grad
    assert (targets[0] - targets[1]).abs().max() > 1e-5, "other frames, another target"
    turned = prior.target(latents, [0, 1, 2], DrawnViews((0.0, 90.0, 180.0, 270.0), 2.0), 500, noise(4))
    assert (targets[0] - turned).abs().max() > 1e-6, "the cameras count"
    (latents - targets[0]).square().sum().backward()
    assert renders.grad.abs().max() > 0
