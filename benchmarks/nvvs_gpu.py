"""The full-size network on a GPU: time per step and phase, memory of each way of offloading, back ends, precision.

    python benchmarks/nvvs_gpu.py --write docs/performance.md

Random weights, bf16, 12 frames x 4 views at 576x576 pixels, with guidance. Without a GPU, `--tiny` runs the same code
on the CPU at a small size, so that it does not rot; its figures mean nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.planner.plan import matrix_rate
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.official import Architecture

START, END = "<!-- nvvs_gpu: start -->", "<!-- nvvs_gpu: end -->"
BACKENDS = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math")


@dataclass(frozen=True)
class GpuConfig:
    """What to measure."""

    tiny: bool = False
    """A small network on the CPU: exercises the code only."""
    steps: int = 3
    """Denoising steps measured."""
    write: Path | None = None
    """Put the table between the marks of this file."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    frames: int
    views: int
    size: int
    steps: int
    unet: dict[str, Any]


def setting(config: GpuConfig) -> Setting:
    """Full size on the GPU, or tiny on the CPU."""
    if config.tiny:
        small = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_levels": (True, True)}
        return Setting("cpu", 2, 2, 64, 1, {**small, "attention_head_dim": 32})
    if not torch.cuda.is_available():
        raise SystemExit("Error: no GPU here; use --tiny to exercise the code on the CPU.")
    return Setting("cuda", 12, 4, 576, config.steps, {})


def build(chosen: Setting, dtype: torch.dtype = torch.bfloat16) -> StableVideo4D2Pipeline:
    """A pipeline of random weights, nowhere zero, on the CPU."""
    torch.manual_seed(0)
    parts = Architecture()
    clip = dict(parts.image_encoder) | ({"num_hidden_layers": 1} if chosen.device == "cpu" else {})
    unet = MultiViewVideoUNet(**chosen.unet)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    pipeline = StableVideo4D2Pipeline(
        AutoencoderKL(**parts.vae),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**clip)),
        unet.to(dtype),
        released_scheduler(),
        image_size=chosen.size,
    )
    pipeline.image_encoder.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timed(chosen: Setting, run: Callable[[], Any]) -> tuple[float, float, Any]:
    """(seconds, peak GiB, result) of a call; memory is that of the GPU."""
    cuda = chosen.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0, result


def offloaded(chosen: Setting, kind: str) -> StableVideo4D2Pipeline:
    """A fresh pipeline with one way of offloading."""
    pipeline = build(chosen)
    if kind == "none":
        return pipeline.to(chosen.device)
    if kind == "fp8 storage":
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        return pipeline.to(chosen.device)
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=chosen.device)
    elif kind == "sequential":
        pipeline.enable_sequential_cpu_offload(device=chosen.device)
    else:
        pipeline.unet.enable_group_offload(
            torch.device(chosen.device), offload_type="leaf_level", use_stream=chosen.device == "cuda"
        )
        pipeline.vae.to(chosen.device)
        pipeline.image_encoder.to(chosen.device)
    return pipeline


def window(chosen: Setting, pipeline: StableVideo4D2Pipeline, steps: int) -> torch.Tensor:
    """Denoise one window."""
    video = torch.rand(chosen.frames, 3, chosen.size, chosen.size, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator("cpu").manual_seed(0)
    azimuths = [360.0 * view / (chosen.views + 1) for view in range(1, chosen.views + 1)]
    return pipeline(
        video, azimuths, [0.0] * chosen.views, num_inference_steps=steps, generator=generator, output_type="latent"
    ).frames


def network_inputs(chosen: Setting, pipeline: StableVideo4D2Pipeline, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Inputs of one guided step."""
    draw, latent = torch.Generator().manual_seed(1), chosen.size // 8
    n = 2 * chosen.frames * chosen.views
    shapes = (
        (n, 8, latent, latent),
        (n,),
        (2, chosen.frames, 1024),
        (n, 1280),
        (2 * chosen.views, 4, latent, latent),
    )
    return tuple(torch.randn(*shape, generator=draw).to(chosen.device, dtype) for shape in shapes)


@torch.no_grad()
def main(config: GpuConfig) -> None:
    """Measure and print, or write, the table."""
    chosen = setting(config)
    rate = matrix_rate(chosen.device, torch.bfloat16, 256 if config.tiny else 8192)
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU (tiny: the figures mean nothing)"
    lines = [f"{name}, measured bf16 matrix rate {rate / 1e12:.1f} TFLOP/s.", ""]

    lines += ["| offload | seconds per step | peak GiB |", "|---|---|---|"]
    kinds = ["none", "fp8 storage", "model", "group"] + (["sequential"] if chosen.device == "cuda" else [])
    for kind in kinds:
        pipeline = offloaded(chosen, kind)
        window(chosen, pipeline, 1)
        seconds, peak, _ = timed(chosen, lambda p=pipeline: window(chosen, p, chosen.steps))
        lines.append(f"| {kind} | {seconds / chosen.steps:.2f} | {peak:.1f} |")
        del pipeline
        if chosen.device == "cuda":
            torch.cuda.empty_cache()

    pipeline = offloaded(chosen, "none")
    given = network_inputs(chosen, pipeline, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        pipeline.unet(*given)
    flops = counter.get_total_flops()
    lines += ["", "| network, one guided step | seconds | share of the matrix rate |", "|---|---|---|"]
    for backend in BACKENDS:
        try:
            pipeline.unet.set_attention_backend(backend)
            pipeline.unet(*given)
            seconds, _, _ = timed(chosen, lambda: pipeline.unet(*given))
            lines.append(f"| {backend} | {seconds:.3f} | {flops / seconds / rate:.0%} |")
        except (RuntimeError, ValueError) as error:
            lines.append(f"| {backend} | not here: {str(error).splitlines()[0][:60]} | |")
    pipeline.unet.reset_attention_backend()
    pipeline.unet.set_attention_backend("native")
    if chosen.device == "cuda":
        pipeline.unet.compile_repeated_blocks()
        pipeline.unet(*given)
        seconds, _, _ = timed(chosen, lambda: pipeline.unet(*given))
        lines.append(f"| native, torch.compile of the repeated blocks | {seconds:.3f} | {flops / seconds / rate:.0%} |")

    pictures = torch.rand(chosen.frames, 3, chosen.size, chosen.size)
    latents = torch.randn(chosen.frames * chosen.views, 4, chosen.size // 8, chosen.size // 8, device=chosen.device)
    encode, _, _ = timed(chosen, lambda: pipeline.encode_images(pictures))
    decode, _, _ = timed(chosen, lambda: pipeline.decode_latents(latents))
    lines += ["", "| phase | seconds |", "|---|---|", f"| encode frames | {encode:.2f} |", f"| decode | {decode:.2f} |"]

    tiny = setting(GpuConfig(tiny=True))
    exact, rough = (build(tiny, dtype).unet.to(chosen.device) for dtype in (torch.float32, torch.bfloat16))
    given = tuple(value.to(chosen.device) for value in network_inputs(tiny, pipeline, torch.float32))
    wanted = exact(*given).sample
    error = (rough(*(value.bfloat16() for value in given)).sample.float() - wanted).abs().mean() / wanted.abs().mean()
    lines += ["", f"bf16 against float32 on a tiny network: mean relative difference {error:.2%}."]
    text = "\n".join(lines)
    print(text)
    if config.write is not None:
        page = config.write.read_text()
        head, _, rest = page.partition(START)
        config.write.write_text(f"{head}{START}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(tyro.cli(GpuConfig, description=__doc__))
