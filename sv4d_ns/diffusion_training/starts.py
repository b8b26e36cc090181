"""Where a run's weights come from: nothing, the shipped model, SV4D 2.0, Stable Video Diffusion, a saved pipeline."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from sv4d_ns.diffusion.sv4d.attention import CameraAttention, MultiViewTransformer
from sv4d_ns.diffusion.sv4d.conditioning import sinusoid
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.sv4d.pipeline import RELEASED_CAMERA_DIMS, StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion_training.model import ModelConfig, SamplingConfig, TrainedParts, build_pipeline, fit_autoencoder
from sv4d_ns.utils.errors import InputError

SVD_FPS_ID, SVD_MOTION_BUCKET = 6, 127
"""What SVD is told about a video where our network is told the cameras: its pipeline's defaults (fps 7 less 1)."""


def open_start(start: str, model: ModelConfig, sampling: SamplingConfig, seed: int) -> StableVideo4D2Pipeline:
    """The pipeline whose network a run trains, float32 on the CPU.

    Args:
        start: `TrainConfig.start`.
        model: size of a model from scratch.
        sampling: how a model from scratch or from SVD samples.
        seed: of new weights.

    Raises:
        InputError: when the start is unknown or its files cannot be used.
    """
    kind, _, where = start.partition(":")
    if start == "scratch":
        return _scratch(model, sampling, seed)
    if kind == "official" and where:
        return StableVideo4D2Pipeline.from_official(where, "cpu", torch.float32)
    if kind == "svd" and where:
        return from_svd(Path(where), sampling, seed)
    folder = Path(start)
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"--start {start} is none of scratch, official:FILE, svd:FOLDER, and no folder of a saved "
            "pipeline (no model_index.json): give one of these."
        )
    try:
        return StableVideo4D2Pipeline.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"--start {folder} is not a pipeline of this package ({' '.join(str(error).split())}): give a folder that "
            "'sv4d train' or StableVideo4D2Pipeline.save_pretrained wrote."
        ) from error


def _scratch(model: ModelConfig, sampling: SamplingConfig, seed: int) -> StableVideo4D2Pipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            parts = TrainedParts.new(model)
        except ValueError as error:
            raise InputError(
                f"--model describes no network that can be built ({error}): give --model.channels in multiples of 32, "
                "and of --model.head-dim where a level attends."
            ) from error
    vae, _ = fit_autoencoder(model, seed)
    return build_pipeline(parts, vae, model, sampling)


def from_svd(folder: Path, sampling: SamplingConfig, seed: int) -> StableVideo4D2Pipeline:
    """A network of SVD's size that starts with its weights; true (view, height, width) camera attention.

    Raises:
        InputError: when the folder is not Stable Video Diffusion in diffusers' layout.
    """
    try:
        svd = UNetSpatioTemporalConditionModel.from_pretrained(folder, subfolder="unet")
        decoder = AutoencoderKLTemporalDecoder.from_pretrained(folder, subfolder="vae")
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"--start svd:{folder} is not Stable Video Diffusion in diffusers' layout (unet, vae, image_encoder): "
            f"{' '.join(str(error).split())}."
        ) from error
    return StableVideo4D2Pipeline(
        image_autoencoder(decoder),
        encoder,
        network_from_svd(svd, seed),
        released_scheduler(),
        num_frames=sampling.frames,
        num_views=sampling.views,
        image_size=8 * svd.config["sample_size"],
        num_inference_steps=50,
        guidance=Guidance(GuidanceKind.CONSTANT, 2.0).to_config(),
        camera_dims=camera_dims_of(svd),
    )


def camera_dims_of(svd: UNetSpatioTemporalConditionModel) -> list[int]:
    """Sizes of the camera vector's parts: the noise level as in SVD, both angles twice that (the released sizes)."""
    part = svd.config["addition_time_embed_dim"]
    return list(RELEASED_CAMERA_DIMS) if part == RELEASED_CAMERA_DIMS[0] else [part, 2 * part, 2 * part]


def image_autoencoder(video: AutoencoderKLTemporalDecoder) -> AutoencoderKL:
    """An image autoencoder with SVD's encoder and the spatial half of its decoder.

    SVD's decoder blends every residual block with one along time; an image has no time, so only the spatial halves,
    which are Stable Diffusion's, are taken.
    """
    config = video.config
    image = AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        latent_channels=config["latent_channels"],
        block_out_channels=config["block_out_channels"],
        down_block_types=config["down_block_types"],
        up_block_types=["UpDecoderBlock2D"] * len(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        scaling_factor=config["scaling_factor"],
        use_post_quant_conv=False,
    )
    state = {name.replace(".spatial_res_block.", "."): tensor for name, tensor in video.state_dict().items()}
    image.load_state_dict({name: state[name] for name in image.state_dict()})
    return image


def network_from_svd(svd: UNetSpatioTemporalConditionModel, seed: int) -> MultiViewVideoUNet:
    """Our network with SVD's weights where names and shapes agree, and otherwise set so that its output stays SVD's.

    - SVD's attention along time becomes the frame attention. Its cross-attention to the image embedding has no place
      there (ours is to the reference latents) and starts at zero.
    - SVD is told frame rate and amount of motion where ours is told the cameras: their contribution at SVD's defaults
      goes into a bias, the angles start without weight.
    - The camera attention is new: its branch starts as the identity, whatever the blend.

    So at step 0 the network makes of one view what SVD, without the image embedding in its temporal blocks, makes of a
    video, whatever the cameras and references. (With several views, the residual blocks' convolution along the
    flattened (frame, view) axis has other neighbours than in SVD: that is the released design.)
    """
    config = svd.config
    heads = config["num_attention_heads"]
    widths = config["block_out_channels"]
    per_level = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    sizes = {width // count for width, count, has in zip(widths, per_level, attends, strict=True) if has}
    if len(sizes) != 1:
        raise InputError(f"This video diffusion network has heads of several sizes {sorted(sizes)}; SVD has one.")
    part = config["addition_time_embed_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = MultiViewVideoUNet(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            block_out_channels=widths,
            layers_per_block=config["layers_per_block"],
            attention_levels=attends,
            attention_head_dim=sizes.pop(),
            cross_attention_dim=config["cross_attention_dim"],
            reference_channels=config["out_channels"],
            projection_class_embeddings_input_dim=sum(camera_dims_of(svd)),
            camera_attention=CameraAttention.FULL_3D.value,
        )
    state = unet.state_dict()
    for name, tensor in svd.state_dict().items():
        ours = _our_name(name)
        if ours in state and state[ours].shape == tensor.shape:
            state[ours] = tensor.clone()
    _set_camera_input(state, svd.state_dict(), part)
    unet.load_state_dict(state)
    for layer in unet.modules():
        if isinstance(layer, MultiViewTransformer):
            _start_as_identity(layer)
    return unet


def _our_name(name: str) -> str:
    """The place of a tensor of SVD's network; the embeddings of its temporal cross-attention have none."""
    return (
        name.replace(".temporal_transformer_blocks.", ".frame_transformer_blocks.")
        .replace(".time_pos_embed.", ".frame_embed.")
        .replace(".time_mixer.", ".frame_mixer." if ".attentions." in name else ".time_mixer.")
    )


def _set_camera_input(state: dict[str, Tensor], svd: dict[str, Tensor], part: int) -> None:
    """The first layer of the camera embedding: SVD's columns of the noise level, its other inputs as a bias."""
    weight, bias = svd["add_embedding.linear_1.weight"], svd["add_embedding.linear_1.bias"]
    constants = sinusoid(torch.tensor([SVD_FPS_ID, SVD_MOTION_BUCKET]), part).flatten()
    ours = torch.zeros_like(state["add_embedding.linear_1.weight"])
    ours[:, :part] = weight[:, 2 * part :]
    state["add_embedding.linear_1.weight"] = ours
    state["add_embedding.linear_1.bias"] = bias + weight[:, : 2 * part] @ constants


def _start_as_identity(layer: Any) -> None:
    """Let the camera branch return what comes in, and the frame branch ignore the references."""
    view, frame = layer.view_transformer_blocks[0], layer.frame_transformer_blocks[0]
    closed = [layer.view_embed.linear_2, view.ff_in.net[2], view.attn1.to_out[0], view.attn2.to_out[0], view.ff.net[2]]
    for module in (*closed, frame.attn2.to_v):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
