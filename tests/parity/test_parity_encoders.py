"""Autoencoder, image tower, their key maps, and the two halves of a whole run against recordings of the reference."""

import parity_folder as folder
import pytest
import torch
from test_parity_sampling import recorded_condition, sampler
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.checkpoints import clip_config, convert_clip, convert_unet, convert_vae, vae_config
from sv4d_ns.diffusion.conditioning import clip_pixels, embed_images
from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.unet import MultiViewVideoUNet

VAE_FILES = ("vae_tiny_weights.safetensors", "vae_tiny.safetensors")
RUNS = folder.with_unet([f"e2e_{name}" for name in folder.names("e2e_", ".safetensors")])
RUNS = RUNS if folder.has(VAE_FILES[0]) else []
SCALING = 0.18215


@folder.needs(*VAE_FILES)
@pytest.mark.skipif(not folder.names("e2e_"), reason="the autoencoder's configuration is in e2e_*.json")
def test_autoencoder():
    recorded = folder.tensors(VAE_FILES[1])
    vae = folder.load_vae(folder.read_json(f"e2e_{folder.names('e2e_')[0]}.json")["ddconfig"])
    pipeline = sampler(
        MultiViewVideoUNet(block_out_channels=(32,), attention_levels=(False,), attention_head_dim=32), vae
    )
    with torch.no_grad():
        posterior = vae.encode(recorded["image"]).latent_dist
        folder.assert_within(posterior.parameters, recorded["moments"], folder.ATOL)
        folder.assert_within(posterior.mode(), recorded["latent_mode"], folder.ATOL)
        folder.assert_within(vae.decode(recorded["z"]).sample, recorded["decoded_first_stage"], folder.ATOL)
        images = ((recorded["image"] + 1) / 2).clamp(0, 1)
        latents = pipeline.encode_images(images, chunk_size=1)
        folder.assert_within(latents, vae.encode(images * 2 - 1).latent_dist.mode(), folder.ATOL)
        decoded = pipeline.decode_latents(recorded["z"] * SCALING, chunk_size=1)
        folder.assert_within(decoded, ((recorded["decoded_first_stage"] + 1) / 2).clamp(0, 1), folder.ATOL)


@folder.needs("clip.safetensors")
def test_clip_preprocessing():
    recorded = folder.tensors("clip.safetensors")
    sizes = [name.split("/")[0] for name in recorded if name.endswith("/image_u8")]
    assert sizes
    for size in sizes:
        images = recorded[f"{size}/image_u8"].float() / 127.5 - 1
        folder.assert_within(clip_pixels(images), recorded[f"{size}/preprocessed"], 1e-5)


@folder.needs("clip.safetensors", "clip.json", "clip_tiny_weights.safetensors")
def test_clip_tower():
    described, recorded = folder.read_json("clip.json"), folder.tensors("clip.safetensors")
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_config(described["tiny_open_clip_cfg"]))).eval()
    state = {name: value.float() for name, value in folder.tensors("clip_tiny_weights.safetensors").items()}
    load_strictly(tower, convert_clip(state))
    with torch.no_grad():
        embeds = tower(recorded[described["tower_input"]]).image_embeds
        folder.assert_within(embeds, recorded["tiny_tower/image_embeds"], folder.ATOL)
        images = recorded[described["tower_input"].replace("preprocessed", "image_u8")].float() / 127.5 - 1
        folder.assert_within(embed_images(tower, images), recorded["tiny_tower/image_embeds"], folder.ATOL)


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = {name for name in model.state_dict() if not name.endswith("position_ids")}
    assert set(state) == expected
    model.load_state_dict(state, strict=False)


def rounding_tolerance(pipeline: StableVideo4D2Pipeline, images: torch.Tensor) -> float:
    """1.5 times what rounding the images by up to one level changes their latents (0.04; the latents are about 0.5).

    The recorded 8-bit images are not exactly what the reference encoded: the recorded latents differ from those of the
    stored images as uniform rounding noise of this size does (between 64 and 191 only even levels are stored), while
    the same autoencoder agrees to 1e-4 on float recordings (`test_autoencoder`). Where a folder stores the
    images exactly, the difference is far below.
    """
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = (images + noise).clamp(0, 255) / 255
    return 1.5 * (pipeline.encode_images(noisy) - pipeline.encode_images(images / 255)).abs().max().item()


@pytest.mark.parametrize("name", RUNS)
def test_encoding_half(name):
    described, recorded = folder.read_json(f"{name}.json"), folder.tensors(f"{name}.safetensors")
    pipeline = sampler(folder.load_unet(described["unet"]), folder.load_vae(described["ddconfig"]))
    with torch.no_grad():
        tolerance = max(folder.ATOL, rounding_tolerance(pipeline, recorded["cond_motion_images_u8"]))
        video = pipeline.encode_images(recorded["cond_motion_images_u8"] / 255)
        known = pipeline.encode_images(recorded["cond_view_images_u8"] / 255)
    assert tolerance < 0.3 * video.std()
    folder.assert_within(video, recorded["encoded_frames_no_jitter"], tolerance)
    folder.assert_within(known, recorded["encoded_views_no_jitter"], tolerance)
    repeated = recorded["encoded_frames_no_jitter"].repeat_interleave(described["V"], dim=0)
    folder.assert_within(repeated, recorded["c/concat"], 5e-4)
    if described["cond_mv"]:
        folder.assert_within(recorded["encoded_views_no_jitter"], recorded["c/cond_view"], 5e-4)
    else:
        assert not recorded["c/cond_view"].any()


@pytest.mark.parametrize("name", RUNS)
def test_sampling_half(name):
    described, recorded = folder.read_json(f"{name}.json"), folder.tensors(f"{name}.safetensors")
    unet_json = folder.read_json(f"unet_{described['unet']}.json")
    pipeline = sampler(folder.load_unet(described["unet"]), folder.load_vae(described["ddconfig"]))
    scales = folder.script_guidance(described["guider_options"]).scales(described["T"], described["V"])
    folder.assert_within(scales, recorded["guidance_scale"], 1e-6)
    condition = recorded_condition(recorded, unet_json["y_dims"]["sigma_cond"])
    with torch.no_grad():
        latents = pipeline.denoise(condition, recorded["noise"], scales.flatten(), described["steps"])
        folder.assert_within(latents / SCALING, recorded["samples_z"] / SCALING, 5e-4 / SCALING)
        folder.assert_within(pipeline.decode_latents(latents), recorded["samples"], 5e-4)


@pytest.mark.skipif(not (folder.has("keys_sv4d2.json") or folder.has("keys_sv4d2.json.gz")), reason="no key list")
def test_full_size_key_map():
    """Every tensor of the released files has a place of the same shape, and every place is filled."""
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
