"""Autoencoder, image tower, their key maps, and the two halves of a whole run against recordings of the reference."""

import parity_folder as folder
import pytest
import torch
from test_parity_sampling import assert_unconditional, recorded_condition, sampler
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.sv4d.conditioning import camera_vectors, clip_pixels, embed_images
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.key_maps import clip_config, convert_clip, convert_unet, convert_vae, vae_config

VAES = folder.names("vae_", "_weights.safetensors")
RUNS = [f"e2e_{name}" for name in folder.names("e2e_")]
SCALING = 0.18215


@pytest.mark.parametrize("name", VAES)
def test_autoencoder(name):
    folder.need(f"vae_{name}.safetensors")
    recorded, vae = folder.tensors(f"vae_{name}.safetensors"), folder.load_vae(name)
    pipeline = sampler(
        MultiViewVideoUNet(block_out_channels=(32,), attention_levels=(False,), attention_head_dim=32), vae
    )
    with torch.no_grad():
        posterior = vae.encode(recorded["image"]).latent_dist
        folder.assert_within(posterior.parameters, recorded["moments"], folder.ATOL)
        folder.assert_within(posterior.mode(), recorded["latent_mode"], folder.ATOL)
        decoded = vae.decode(recorded["z"]).sample
        folder.assert_within(decoded, recorded["decoded_first_stage"], folder.ATOL)
        # the layer the released decoder leaves out would show
        assert (decoded - recorded["decoded_with_post_quant_conv"]).abs().max() > 100 * folder.ATOL
        images = ((recorded["image"] + 1) / 2).clamp(0, 1)
        latents = pipeline.encode_images(images, chunk_size=1)
        folder.assert_within(latents, vae.encode(images * 2 - 1).latent_dist.mode(), folder.ATOL)
        decoded = pipeline.decode_latents(recorded["z"] * SCALING, chunk_size=1)
        folder.assert_within(decoded, ((recorded["decoded_first_stage"] + 1) / 2).clamp(0, 1), folder.ATOL)


def test_clip_preprocessing():
    folder.need("clip.safetensors")
    recorded = folder.tensors("clip.safetensors")
    for size in folder.cases(recorded, "image_u8"):
        images = recorded[f"{size}/image_u8"].float() / 127.5 - 1
        folder.assert_within(clip_pixels(images), recorded[f"{size}/preprocessed"], 1e-5)


def test_clip_tower():
    folder.need("clip.safetensors", "clip.json", "clip_tiny_weights.safetensors")
    described, recorded = folder.read_json("clip.json"), folder.tensors("clip.safetensors")
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_config(described["tiny_open_clip_cfg"]))).eval()
    load_strictly(tower, convert_clip(folder.weights("clip_tiny_weights.safetensors")))
    with torch.no_grad():
        embeds = tower(recorded[described["tower_input"]]).image_embeds
        folder.assert_within(embeds, recorded["tiny_tower/image_embeds"], folder.ATOL)
        images = recorded[described["tower_input"].replace("preprocessed", "image_u8")].float() / 127.5 - 1
        folder.assert_within(embed_images(tower, images), recorded["tiny_tower/image_embeds"], folder.ATOL)


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = {name for name in model.state_dict() if not name.endswith("position_ids")}
    assert set(state) == expected
    model.load_state_dict(state, strict=False)


def recorded_images(eight_bit: Tensor, seed: int) -> Tensor:
    """The images in [-1, 1] of which a recording keeps 8-bit copies.

    The recordings' images are smooth noise, tanh of seeded normal values on a grid of 8 pixels, in steps of 1/127.5
    *including zero* (the levels of v = k/127.5, integer k from -127 to 127). Their copies are (v + 1) * 127.5 = k +
    127.5 rounded to 8 bits: half a level off, and where float32 holds the half exactly (k from -62 to 63) rounded to
    even, so that two k share a byte and the copy alone no longer tells them apart. They are drawn again here; the
    caller may trust them because every byte of their own 8-bit copy is the recorded one. Where it is not, the copies
    are taken at their word: v = byte/127.5 - 1.
    """
    n, channels, height, width = eight_bit.shape
    coarse = torch.randn(n, channels, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(seed))
    smooth = torch.tanh(F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True))
    drawn = (smooth * 127.5).round() / 127.5
    if torch.equal(((drawn + 1) * 127.5).round(), eight_bit.float()):
        return drawn
    return eight_bit / 127.5 - 1


@pytest.mark.parametrize("name", RUNS)
def test_encoding_half(name):
    folder.need(f"{name}.safetensors")
    described, recorded = folder.read_json(f"{name}.json"), folder.tensors(f"{name}.safetensors")
    pipeline = sampler(folder.load_unet(described["unet"]), folder.load_vae())
    frames = recorded_images(recorded["cond_motion_images_u8"], described["seed"])
    views = recorded_images(recorded["cond_view_images_u8"], described["seed"] + 1)
    with torch.no_grad():
        frames, views = (pipeline.encode_images((images + 1) / 2) for images in (frames, views))
    folder.assert_within(frames, recorded["encoded_frames_no_jitter"], folder.ATOL)
    folder.assert_within(views, recorded["encoded_views_no_jitter"], folder.ATOL)
    # the reference adds noise of 1e-5 to every image it encodes
    folder.assert_within(frames.repeat_interleave(described["V"], dim=0), recorded["c/concat"], 5e-4)
    folder.assert_within(frames, recorded["c/cond_motion"], 5e-4)
    if described["cond_mv"]:
        folder.assert_within(views, recorded["c/cond_view"], 5e-4)
    else:
        assert not recorded["c/cond_view"].any()


@pytest.mark.parametrize("name", RUNS)
def test_sampling_half(name):
    folder.need(f"{name}.safetensors")
    described, recorded = folder.read_json(f"{name}.json"), folder.tensors(f"{name}.safetensors")
    pipeline = sampler(folder.load_unet(described["unet"]), folder.load_vae())
    unet_json = folder.read_json(f"unet_{described['unet']}.json")
    dims = list(unet_json["y_dims"].values())
    scales = folder.script_guidance(described["guider_options"]).scales(described["T"], described["V"])
    folder.assert_within(scales, recorded["guidance_scale"], 1e-6)
    condition = recorded_condition(recorded, dims[0])
    cameras = camera_vectors(recorded["polar_rad"], recorded["azimuth_rad"], unet_json["sigma_cond_value"], dims)
    folder.assert_within(cameras, condition.cameras, 1e-6)
    folder.assert_within(condition.embeddings, recorded["clip_embeds"], 1e-6)
    assert_unconditional(condition, recorded)
    with torch.no_grad():
        latents = pipeline.denoise(condition, recorded["noise"], scales.flatten(), described["steps"])
        folder.assert_within(latents, recorded["samples_z"], 5e-4)
        folder.assert_within(pipeline.decode_latents(latents), recorded["samples"], 5e-4)


def test_full_size_key_map():
    """Every tensor of the released files has a place of the same shape, and every place is filled."""
    folder.need("keys_sv4d2.json")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    keys = folder.read_json("keys_sv4d2.json")
    sections = {name.split(" ")[0]: shapes for name, shapes in keys.items() if name != "meta"}
    with torch.device("meta"):
        unet = MultiViewVideoUNet()
        ldm = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "in_channels": 3, "out_ch": 3, "z_channels": 4}
        vae = AutoencoderKL(**vae_config(ldm))
        vision = {"width": 1280, "head_width": 80, "layers": 32, "image_size": 224, "patch_size": 14}
        tower = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**clip_config({"embed_dim": 1024, "vision_cfg": vision}))
        )

    def placeholders(section: str, prefix: str) -> dict[str, torch.Tensor]:
        named = {name.removeprefix(prefix): shape for name, shape in sections[section].items()}
        return {name: torch.empty(shape, device="meta") for name, shape in named.items()}

    def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in state.items() if not name.endswith("position_ids")}

    reference = placeholders("model.diffusion_model", "")
    assert len(reference) == keys["meta"]["summary"]["sv4d2"].get("n_unet_keys", 1924)
    assert shapes(convert_unet(reference, 2)) == shapes(unet.state_dict())
    encoder = placeholders("conditioner.embedders.{1,4,5}", "encoder.")
    assert shapes(convert_vae(encoder, 4)) == shapes(vae.state_dict())
    decoder = convert_vae(placeholders("first_stage_model", "first_stage_model."), 4)
    assert shapes(decoder).items() <= shapes(vae.state_dict()).items()
    assert {name for name in vae.state_dict() if name.startswith("decoder.")} == set(decoder)
    clip = placeholders("conditioner.embedders.0", "conditioner.embedders.0.open_clip.model.")
    assert shapes(convert_clip(clip)) == shapes(tower.state_dict())
