"""What `benchmarks/gpu.py` measures: a function for each part, the parts in order of worth."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.planner.plan import GIB, Offload, matrix_rate
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.official import RELEASES, Architecture
from sv4d_ns.field.hash_grid import tinycudann_works
from sv4d_ns.field.images import render_grid
from sv4d_ns.field.volume_rendering import marcher
from sv4d_ns.synthesis.sv4d import apply_offload

sys.path.insert(0, str(Path(__file__).parent))
from asset_pack import unpack
from field import FieldBenchmark, Ours, fit, seconds_to

ROOT = Path(__file__).parents[1]
BACKENDS = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math")
TARGET_PSNR = 30.0
FP8_STORAGE = "fp8 storage"


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    tiny: bool
    """Small networks and pictures: exercises the code, the figures mean nothing."""
    out: Path
    minutes: float
    """What is left for the part."""
    assets: Path | None
    """A pack of GLB files (`gpu.py pack`), or a folder of them, to train on beside creatures."""
    workers: int
    """Processes that make training data."""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a card to be waited for."""
        return self.device.startswith("cuda")


Note = Callable[[str, dict[str, Any]], None]
"""Takes the name of a row and its figures; what is noted is on disk."""


def timed(setting: Setting, run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and peak GiB of the card of a call."""
    if setting.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run()
    if setting.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() / GIB if setting.on_gpu else 0.0


def clear(setting: Setting) -> None:
    """Give back what nothing holds any more."""
    if setting.on_gpu:
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------- diffusion networks


@dataclass(frozen=True)
class Window:
    """A released model's window, or a small one."""

    frames: int
    views: int
    size: int
    unet: dict[str, Any]
    clip_layers: int

    @classmethod
    def of(cls, setting: Setting, frames: int, views: int) -> Window:
        """So many frames and views at the released size, or two of each at a small one."""
        if not setting.tiny:
            return cls(frames, views, 576, {}, 32)
        small = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_levels": (True, True)}
        return cls(2, 2, 64, {**small, "attention_head_dim": 32}, 1)

    def azimuths(self) -> list[float]:
        """Evenly around the object."""
        return [360.0 * view / (self.views + 1) for view in range(1, self.views + 1)]


def nowhere_zero(module: nn.Module) -> nn.Module:
    """Random numbers where training would start at zero: products of zeros say nothing."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return module.requires_grad_(False).eval()


def network(window: Window, device: str, camera_attention: str = "released") -> MultiViewVideoUNet:
    """Random weights in float32, made on the device: two billion take minutes on a CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = MultiViewVideoUNet(**window.unet, camera_attention=camera_attention)
    return nowhere_zero(unet)  # type: ignore[return-value]


def pipeline_of(window: Window, device: str, camera_attention: str) -> StableVideo4D2Pipeline:
    """A pipeline of random weights, bf16 but for the autoencoder, as `from_official` gives them."""
    parts = Architecture()
    unet = network(window, device, camera_attention).to(torch.bfloat16)
    with torch.device(device):
        vae = AutoencoderKL(**parts.vae).eval()
        clip = CLIPVisionConfig(**{**parts.image_encoder, "num_hidden_layers": window.clip_layers})
        encoder = CLIPVisionModelWithProjection(clip).eval().to(torch.bfloat16)
    pipeline = StableVideo4D2Pipeline(vae, encoder, unet, released_scheduler(), image_size=window.size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def network_inputs(window: Window, device: str) -> tuple[Tensor, ...]:
    """Inputs of one guided step, float32."""
    draw, latent = torch.Generator().manual_seed(1), window.size // 8
    n = 2 * window.frames * window.views
    shapes = ((n, 8, latent, latent), (n,), (2, window.frames, 1024), (n, 1280), (2 * window.views, 4, latent, latent))
    return tuple(torch.randn(*shape, generator=draw).to(device) for shape in shapes)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, which cuDNN's convolutions use unasked."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def precision(setting: Setting, note: Note) -> None:
    """How far half precision and each attention kernel are from float32, on the full-size network."""
    window = Window.of(setting, 2, 4)
    unet, given = network(window, setting.device), network_inputs(window, setting.device)
    with exact_products():
        wanted = unet(*given).sample
    for dtype in (torch.bfloat16, torch.float16):
        half = tuple(value.to(dtype) for value in given)
        unet.to(dtype)
        for backend in BACKENDS:
            note(f"{str(dtype).removeprefix('torch.')}, {backend}", _difference(unet, half, wanted, backend))
        unet.to(torch.float32)


def _difference(unet: MultiViewVideoUNet, given: tuple[Tensor, ...], wanted: Tensor, backend: str) -> dict[str, Any]:
    try:
        unet.set_attention_backend(backend)
        made = unet(*given).sample.float()
    except (RuntimeError, ValueError) as error:
        return {"not here": str(error).splitlines()[0][:60]}
    finally:
        unet.reset_attention_backend()
    return {"mean relative difference": float((made - wanted).abs().mean() / wanted.abs().mean())}


@torch.no_grad()
def nvvs(setting: Setting, note: Note, release: str) -> None:
    """A released model's size with random weights: each way of offloading, each attention kernel, each phase."""
    kind = RELEASES[release]
    window = Window.of(setting, kind.num_frames, kind.num_views)
    rate = matrix_rate(setting.device, torch.bfloat16, 256 if setting.tiny else 8192)
    note("matrix product", {"TFLOP/s": rate / 1e12})
    pipeline = pipeline_of(window, setting.device, kind.camera_attention.value)
    _phases(setting, note, pipeline, window)
    _kernels(setting, note, pipeline.unet, network_inputs(window, setting.device), rate)
    _offloading(setting, note, pipeline, window, 1 if setting.tiny else 3)
    del pipeline
    clear(setting)
    if setting.on_gpu:
        _compiled(setting, note, window, kind.camera_attention.value)


def _compiled(setting: Setting, note: Note, window: Window, camera_attention: str) -> None:
    """One guided step where `torch.compile` has the repeated blocks; it takes minutes to compile."""
    unet: Any = network(window, setting.device, camera_attention).to(torch.bfloat16)
    given = tuple(value.to(torch.bfloat16) for value in network_inputs(window, setting.device))
    unet.compile_repeated_blocks()
    unet(*given)
    seconds, peak = timed(setting, lambda: unet(*given))
    note("step, torch.compile", {"seconds": seconds, "peak GiB": peak})


def _phases(setting: Setting, note: Note, pipeline: StableVideo4D2Pipeline, window: Window) -> None:
    pictures, side = torch.rand(window.frames, 3, window.size, window.size), window.size // 8
    latents = torch.randn(window.frames * window.views, 4, side, side, device=setting.device)
    for name, run in (
        ("encode the frames", lambda: pipeline.encode_images(pictures)),
        ("decode the views", lambda: pipeline.decode_latents(latents)),
    ):
        run()
        seconds, peak = timed(setting, run)
        note(name, {"seconds": seconds, "peak GiB": peak})


def _kernels(setting: Setting, note: Note, unet: Any, given: tuple[Tensor, ...], rate: float) -> None:
    """One guided step of the network."""
    given = tuple(value.to(unet.dtype) for value in given)
    with FlopCounterMode(display=False) as counter:
        unet(*given)
    flops = counter.get_total_flops()

    def step(name: str) -> None:
        unet(*given)
        seconds, peak = timed(setting, lambda: unet(*given))
        note(f"step, {name}", {"seconds": seconds, "share of the rate": flops / seconds / rate, "peak GiB": peak})

    for backend in BACKENDS:
        try:
            unet.set_attention_backend(backend)
            step(backend)
        except (RuntimeError, ValueError) as error:
            note(f"step, {backend}", {"not here": str(error).splitlines()[0][:60]})
    unet.set_attention_backend(BACKENDS[0])  # a reset leaves the last one chosen for the process
    clear(setting)


def _offloading(setting: Setting, note: Note, pipeline: StableVideo4D2Pipeline, window: Window, steps: int) -> None:
    """Every way of offloading, on one pipeline: what is hooked is freed again; the last way cannot be."""
    video = torch.rand(window.frames, 3, window.size, window.size)

    def run() -> None:
        pipeline(
            video, window.azimuths(), [0.0] * window.views, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(0),
        )  # fmt: skip

    for kind in (Offload.NONE, Offload.MODEL, Offload.SEQUENTIAL, Offload.GROUP, FP8_STORAGE):
        try:
            _offload(setting, pipeline, kind)
            run()
            seconds, peak = timed(setting, run)
            note(f"window, {_name(kind)}", {"seconds a step": seconds / steps, "peak GiB": peak})
        except (RuntimeError, ValueError, NotImplementedError) as error:
            note(f"window, {_name(kind)}", {"not here": str(error).splitlines()[0][:60]})
        clear(setting)


def _name(kind: Offload | str) -> str:
    return kind.value if isinstance(kind, Offload) else kind


def _offload(setting: Setting, pipeline: StableVideo4D2Pipeline, kind: Offload | str) -> None:
    pipeline.remove_all_hooks()
    if kind == FP8_STORAGE:
        for part in (pipeline.unet, pipeline.vae, pipeline.image_encoder):
            _without_group_offload(part)
        pipeline.to(setting.device)
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    elif kind is Offload.NONE:
        pipeline.to(setting.device)
    elif setting.on_gpu:
        pipeline.to("cpu")
        apply_offload(pipeline, Offload(kind), setting.device)
    else:
        raise ValueError("offloading needs a card")


def _without_group_offload(module: nn.Module) -> None:
    """diffusers has no way back of its own."""
    from diffusers.hooks.hooks import HookRegistry

    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if isinstance(registry, HookRegistry):
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)


# --------------------------------------------------------------------------------------------------- twins, field


def twins(setting: Setting, note: Note) -> None:
    """The tests that compare what runs on a card with what runs on a CPU."""
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "tests/test_cuda_twins.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    counts = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error)", line)), "")
    note("pytest", {"exit": done.returncode, "result": counts or (done.stdout + done.stderr).strip()[-200:]})
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            note(line[:160], {"exit": done.returncode})


def field(setting: Setting, note: Note) -> None:
    """Stage 1 at 512 pixels (21 frames, 9 views of a creature) with the package's own steps, its kernels, stage 2."""
    size, frames, rays, seconds = (24, 2, 64, 0.2) if setting.tiny else (512, 21, 8192, 60.0)
    views = FieldBenchmark(out=setting.out, size=size, frames=frames, judged_size=16 if setting.tiny else 64)
    grid, held_out = views.views()
    encoding = "tinycudann" if setting.on_gpu and tinycudann_works() else "numba"
    build = Ours(grid, rays, 20 if setting.tiny else 2400, setting.device, encoding)  # type: ignore[arg-type]
    report: dict[str, Any] = {}
    _, peak = timed(setting, lambda: report.update(fit(build, held_out, seconds, 2 if setting.tiny else 6, 2)))
    reached = seconds_to(report["curve"], TARGET_PSNR)
    note("stage 1", {
        "steps/s": 1 / report["seconds_per_step"], f"seconds to {TARGET_PSNR:g} dB": reached,
        "dB": report["curve"][-1]["psnr"] if report["curve"] else None, "peak GiB": peak,
        "encoding": "torch" if setting.on_gpu and encoding == "numba" else encoding,
        "rays": marcher(torch.zeros(1, 3, device=setting.device)),
    })  # fmt: skip
    for name, share in kernel_shares(build, setting.on_gpu, 2 if setting.tiny else 10):
        note(f"kernel {name}", {"share": share})
    seconds, peak = timed(setting, lambda: _stage_2(setting, build, grid, note))
    note("stage 2 in all", {"seconds": seconds, "peak GiB": peak})


def kernel_shares(build: Ours, on_gpu: bool, steps: int) -> list[tuple[str, float]]:
    """The ten kernels that take most of the time of the last steps, and their shares of it."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for number in range(steps):
            build.step(build.total - 1 - number)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = max(sum(getattr(event, key) for event in events), 1e-9)
    return [(event.key[:80], getattr(event, key) / total) for event in events[:10]]


def _stage_2(setting: Setting, build: Ours, grid: Any, note: Note) -> None:
    """The field rendered at the views, and the renders refined by the bundled model."""
    from sv4d_ns.diffusion.bundled import load_bundled_pipeline
    from sv4d_ns.synthesis.bundled import BundledSynthesizer
    from sv4d_ns.utils.images import resize_rgba

    synthesizer = BundledSynthesizer(load_bundled_pipeline().to(setting.device))
    size = 16 if setting.tiny else synthesizer.image_size
    made: list[np.ndarray] = []
    seconds, _ = timed(
        setting, lambda: made.append(render_grid(build.field, build.occupancy, grid, size, lambda *_: None))
    )
    note("stage 2, rendering", {"seconds": seconds})
    if setting.tiny:
        return
    frames = resize_rgba(grid.input_frames, size)
    seconds, _ = timed(setting, lambda: synthesizer.refine(
        frames, made[0], grid.plan, strength=synthesizer.refine_strength, seed=0, store=setting.out / "windows",
        progress=lambda *_: None,
    ))  # fmt: skip
    note("stage 2, refining", {"seconds": seconds})


# ----------------------------------------------------------------------------------------------------- training

PACE_MINUTES = 1.5
"""Time from which the number of steps that fit is reckoned."""
RESERVED_MINUTES = 1.0
"""Of the time given, what the last checkpoint, pictures and a slower second half may take."""


def training(setting: Setting, note: Note) -> None:
    """The bundled model, as many steps as fit, decay included; goes on from its checkpoint in the next call.

    The first call measures the pace and fixes the number of steps in plan.json: it decides the learning rate.
    """
    ends = time.monotonic() + 60 * (setting.minutes - RESERVED_MINUTES)
    run, trial, plan = setting.out / "bundled", setting.out / "pace", setting.out / "plan.json"
    if not plan.is_file():
        shared = run / "assets"  # decoded once
        for folder in (shared, trial):
            folder.mkdir(parents=True, exist_ok=True)
        if not (trial / "assets").exists():
            (trial / "assets").symlink_to(shared.resolve(), target_is_directory=True)
        _train(setting, trial, 1_000_000, 0.01 if setting.tiny else PACE_MINUTES)
        entries = _log(trial)
        half = len(entries) // 2
        pace = (len(entries) - half) / max(entries[-1]["seconds"] - entries[half - 1]["seconds"] if half else 1.0, 1e-9)
        steps = 2 if setting.tiny else max(int(pace * (ends - time.monotonic())), 100)
        plan.write_text(json.dumps({"steps": steps, "steps/s": pace}))
    steps = json.loads(plan.read_text())["steps"]
    _train(setting, run, steps, max((ends - time.monotonic()) / 60, 0.5))
    entries = _log(run)
    last = [entry["loss"] for entry in entries[-50:]]
    note("training", {
        "steps": entries[-1]["step"], "of": steps, "steps/s": json.loads(plan.read_text())["steps/s"],
        "loss, mean of 50": float(np.mean(last)), "complete": entries[-1]["step"] >= steps,
    })  # fmt: skip


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def _train(setting: Setting, run: Path, steps: int, minutes: float) -> None:
    """`sv4d train` on the recipe's mixture, with a larger batch."""
    from sv4d_ns.diffusion_training.bundled.config import BundledTrainConfig
    from sv4d_ns.diffusion_training.bundled.train import Trainer

    assets = _assets(setting)
    sources = [
        (name, share) for name, share in (("animated", 0.45), ("static", 0.25)) if assets and (assets / name).is_dir()
    ]
    data = (("creatures", 1.0 - sum(share for _, share in sources)), *((str(assets / n), s) for n, s in sources))  # type: ignore[operator]
    shape = {"moments": 2, "clip_frames": 2, "views": 2, "rays": 8} if setting.tiny else {"moments": 96, "uses": 3}
    config = BundledTrainConfig(
        output_dir=run, data=data, start="bundled", steps=steps, steps_3d=0, decay_steps=max(int(0.4 * steps), 1),
        warmup_steps=min(200, steps), most_noise_share=0.6, clip_share=0.3, ema_decay=0.999, minutes=minutes,
        workers=setting.workers, checkpoint_every=500, sheet_every=0,
        precision="no" if setting.tiny else "bf16", device="cuda" if setting.on_gpu else "cpu", **shape,
    )  # fmt: skip
    Trainer(config).run()


def _assets(setting: Setting) -> Path | None:
    """The folder of assets, unpacked once."""
    if setting.assets is None or setting.assets.is_dir():
        return setting.assets
    folder = setting.out / "assets"
    if not folder.is_dir():
        unpack(setting.assets, folder)
    return folder


@dataclass(frozen=True)
class Part:
    """Something that is measured in a process of its own."""

    name: str
    run: Callable[[Setting, Note], None]
    minutes: float
    """It is ended after; a part that goes on in the next call (`resumes`) takes what is left."""
    resumes: bool = False


def _released(name: str) -> Callable[[Setting, Note], None]:
    return lambda setting, note: nvvs(setting, note, name)


PARTS = (
    Part("precision", precision, 4),
    Part("twins", twins, 5),
    Part("field", field, 6),
    *(
        Part(f"nvvs {kind.num_frames}x{kind.num_views}", _released(name), 8)
        for name, kind in RELEASES.items()
    ),
    Part("training", training, 60, resumes=True),
)  # fmt: skip


def slug(name: str) -> str:
    """The part's name in file names."""
    return re.sub(r"\W+", "_", name)
