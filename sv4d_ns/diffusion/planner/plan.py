"""`sv4d plan`: what a run needs in memory and time, before any weight is loaded.

Every component runs once on PyTorch's meta device, where tensors have sizes and no content: the live ones are summed
(peak memory) and the products counted (time). Nothing is downloaded, and no GPU is needed.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sv4d_ns.utils.errors import InputError

GIB = 2**30
META = torch.device("meta")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
USABLE = 0.92
"""Share of a card's memory a plan may fill; the rest is CUDA's context and the allocator's gaps."""
EFFICIENCY = 0.3
"""Share of a device's matrix rate that the network reaches: a step of 12 frames x 4 views on an H100."""
BUS_BYTES_PER_SECOND = 12e9
"""From main memory to a card (PCIe 4, 16 lanes, in practice about half); an assumption."""

RAN_ON: tuple[str, ...] = ("NVIDIA H100 80GB HBM3",)
"""Cards on which `benchmarks/gpu.py` has run a released model at full size with random weights; its tables are in
docs/performance.md."""

ModelName = Literal["official4", "official8"]


class Offload(str, Enum):
    """What of the model is on the device at a time.

    NONE: everything. MODEL: one component (`enable_model_cpu_offload`). GROUP: one block of the network
    (`enable_group_offload`). SEQUENTIAL: one layer (`enable_sequential_cpu_offload`).
    """

    NONE = "none"
    MODEL = "model"
    GROUP = "group"
    SEQUENTIAL = "sequential"


@dataclass(frozen=True)
class Card:
    """A device's memory in bytes, and its dense half-precision and float32 matrix rates in FLOP/s."""

    memory: float
    half: float
    single: float


# vendors' data sheets: dense tensor rates with float32 accumulation
CARDS = {
    "t4": Card(16 * GIB, 65e12, 8e12),
    "rtx-3060": Card(12 * GIB, 25e12, 13e12),
    "rtx-3090": Card(24 * GIB, 71e12, 36e12),
    "rtx-4060-ti-16gb": Card(16 * GIB, 44e12, 22e12),
    "rtx-4090": Card(24 * GIB, 165e12, 83e12),
    "l40s": Card(48 * GIB, 362e12, 92e12),
    "a100-40gb": Card(40 * GIB, 312e12, 20e12),
    "a100-80gb": Card(80 * GIB, 312e12, 20e12),
    "h100": Card(80 * GIB, 989e12, 67e12),
    "h200": Card(141 * GIB, 989e12, 67e12),
}


@dataclass(frozen=True)
class Component:
    """One part of the pipeline.

    Attributes:
        name: as in `pipeline.components`.
        weights: bytes of its parameters as stored.
        block: bytes of its largest block (half of the network's live group, the next one being fetched meanwhile).
        layer: bytes of its largest single layer.
        activations: peak bytes of live features of one forward pass, inputs included.
        flops: of one window: all its forward passes.
        passes: forward passes of one window.
    """

    name: str
    weights: int
    block: int
    layer: int
    activations: int
    flops: float
    passes: int


@dataclass(frozen=True)
class Plan:
    """Expected needs of one window.

    Attributes:
        components: in the order in which they run.
        bytes_by_offload: peak bytes on the device for every way of offloading.
        seconds_by_offload: expected time of a window on the device.
    """

    components: tuple[Component, ...]
    bytes_by_offload: Mapping[Offload, float]
    seconds_by_offload: Mapping[Offload, float]

    def recommended(self, memory: float) -> Offload | None:
        """The fastest way that fits into a device's memory, or None."""
        fitting = [kind for kind in Offload if self.bytes_by_offload[kind] <= USABLE * memory]
        return min(fitting, key=lambda kind: self.seconds_by_offload[kind], default=None)


class LiveBytes(TorchDispatchMode):
    """Sums the storages of meta tensors that are alive, but for a module's own, and keeps the peak."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        own = [*module.parameters(), *module.buffers()]  # layers make views of them
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as a fused kernel does it: no matrix of scores; its products are counted here."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key = given["query"], given["key"]
        self.flops += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query)


def dry_run(module: nn.Module, run: Callable[[], Any]) -> tuple[int, float]:
    """(peak bytes of live tensors beside the module's weights, FLOPs) of running it on the meta device."""
    attention, counter, live = FusedAttention(), FlopCounterMode(display=False), LiveBytes(module)
    with torch.no_grad(), attention, counter, live:
        run()
    return live.peak, counter.get_total_flops() + attention.flops


def _bytes(modules: Sequence[nn.Module]) -> list[int]:
    return [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]


@dataclass(frozen=True)
class _Model:
    """Networks on the meta device and the settings of their pipeline."""

    unet: Any
    vae: Any
    image_encoder: Any
    frames: int
    views: int
    size: int
    steps: int
    camera_size: int
    guided: bool


@contextmanager
def _on_meta() -> Iterator[None]:
    """Modules made inside have no content (and cost nothing)."""
    with torch.device("meta"):
        yield


def _official(name: ModelName) -> _Model:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from sv4d_ns.diffusion.sv4d.attention import CameraAttention
    from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
    from sv4d_ns.diffusion.weights.official import Architecture

    four = name == "official4"
    kind = CameraAttention.RELEASED if four else CameraAttention.PER_VIEW_PIXEL
    parts = Architecture()
    with _on_meta():
        unet = MultiViewVideoUNet(**parts.unet, camera_attention=kind.value)
        vae = AutoencoderKL(**parts.vae)
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**parts.image_encoder))
    frames, views = (12, 4) if four else (5, 8)
    return _Model(unet, vae, clip, frames, views, parts.image_size, 50, sum(parts.camera_dims), True)


def plan_memory(
    model: ModelName,
    card: Card,
    frames: int | None = None,
    views: int | None = None,
    size: int | None = None,
    steps: int | None = None,
    dtype: torch.dtype = torch.float16,
    fp8_storage: bool = False,
    chunk_size: int = 8,
) -> Plan:
    """Expected memory and time of one window; the model's own numbers where None.

    Args:
        model: "official4" or "official8".
        card: the device it is to run on.
        frames: T of a window.
        views: V of a call.
        size: side of the pictures in pixels, a multiple of 64.
        steps: denoising steps.
        dtype: of the network and the image encoder (the official autoencoder stays float32).
        fp8_storage: the network's weights in one byte each (`enable_layerwise_casting`).
        chunk_size: images the autoencoder takes at once.

    Raises:
        InputError: when a number cannot be used.
    """
    parts = _official(model)
    t, v, side, count = (
        own if given is None else given
        for given, own in ((frames, parts.frames), (views, parts.views), (size, parts.size), (steps, parts.steps))
    )
    for flag, number in (("--frames", t), ("--views", v), ("--steps", count), ("--chunk-size", chunk_size)):
        if number < 1:
            raise InputError(f"{flag} must be at least 1, got {number}.")
    multiple = _size_multiple(parts)
    if side < multiple or side % multiple:
        raise InputError(f"--size must be a multiple of {multiple} for this model, got {side}.")
    vae_dtype = torch.float32
    components = (
        _encoder(parts, t, side, dtype),
        _autoencoder(parts, "vae encode", t, side, vae_dtype, chunk_size),
        _network(parts, t, v, side, count, dtype, fp8_storage),
        _autoencoder(parts, "vae decode", t * v, side, vae_dtype, chunk_size),
    )
    rate = {torch.float32: card.single}
    seconds = sum(
        c.flops / (EFFICIENCY * rate.get(vae_dtype if c.name.startswith("vae") else dtype, card.half))
        for c in components
    )
    moved = {
        Offload.NONE: 0.0,
        Offload.MODEL: sum(c.weights for c in components),
        Offload.GROUP: sum(c.weights * c.passes for c in components),
        Offload.SEQUENTIAL: sum(c.weights * c.passes for c in components),
    }
    return Plan(
        components,
        {kind: _peak(components, kind) for kind in Offload},
        {kind: seconds + moved[kind] / BUS_BYTES_PER_SECOND for kind in Offload},
    )


def _peak(components: Sequence[Component], offload: Offload) -> float:
    if offload is Offload.NONE:
        # the autoencoder appears twice, and is there once
        weights = sum({c.name.split()[0]: c.weights for c in components}.values())
        return weights + max(c.activations for c in components)
    resident = {
        Offload.MODEL: lambda c: c.weights,
        Offload.GROUP: lambda c: min(c.weights, 2 * c.block),
        Offload.SEQUENTIAL: lambda c: c.layer,
    }[offload]
    return max(resident(c) + c.activations for c in components)


def _size_multiple(parts: _Model) -> int:
    halvings = 2 ** (len(parts.unet.config.block_out_channels) - 1)
    return halvings * _pixels_per_latent(parts.vae)


def _pixels_per_latent(vae: Any) -> int:
    if hasattr(vae.config, "patch_size"):
        return int(vae.config.patch_size)
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _component(
    name: str, module: nn.Module, dtype: torch.dtype, passes: int, run: Callable[[], Any], fp8_storage: bool = False
) -> Component:
    nn.Module.to(module, dtype)  # the library's own method warns about layers it would keep in float32
    activations, flops = dry_run(module, run)
    blocks = [child for group in module.modules() if isinstance(group, nn.ModuleList) for child in group]
    leaves = [child for child in module.modules() if not list(child.children())]
    weights, block, layer = _bytes([module])[0], max(_bytes(blocks), default=0), max(_bytes(leaves), default=0)
    if fp8_storage:
        # a layer is widened while it runs
        weights, block = weights // dtype.itemsize + layer, block // dtype.itemsize + layer
    return Component(name, weights, block or weights, layer, activations, flops * passes, passes)


def _encoder(parts: _Model, frames: int, size: int, dtype: torch.dtype) -> Component:
    from transformers import CLIPVisionModelWithProjection

    from sv4d_ns.diffusion.sv4d.conditioning import CLIP_SIZE

    if isinstance(parts.image_encoder, CLIPVisionModelWithProjection):
        images = torch.empty(frames, 3, CLIP_SIZE, CLIP_SIZE, device=META, dtype=dtype)
    else:
        images = torch.empty(frames, parts.vae.config.in_channels, size, size, device=META, dtype=dtype)

    def run() -> Any:
        return parts.image_encoder(images)

    return _component("image_encoder", parts.image_encoder, dtype, 1, run)


def _autoencoder(parts: _Model, name: str, images: int, size: int, dtype: torch.dtype, chunk_size: int) -> Component:
    chunk, vae = min(images, chunk_size), parts.vae
    latent = size // _pixels_per_latent(vae)

    def run() -> Any:
        if name == "vae encode":
            return vae.encode(torch.empty(chunk, vae.config.in_channels, size, size, device=META, dtype=dtype))
        return vae.decode(torch.empty(chunk, parts.unet.config.out_channels, latent, latent, device=META, dtype=dtype))

    return _component(name, vae, dtype, -(-images // chunk), run)


def _network(parts: _Model, t: int, v: int, size: int, steps: int, dtype: torch.dtype, fp8_storage: bool) -> Component:
    unet, batch = parts.unet, 2 if parts.guided else 1
    latent, n = size // _pixels_per_latent(parts.vae), batch * t * v

    def run() -> Any:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device=META, dtype=dtype)

        return unet(
            empty(n, unet.config.in_channels, latent, latent),
            empty(n),
            empty(batch, t, unet.config.cross_attention_dim),
            empty(n, parts.camera_size),
            empty(batch * v, unet.config.reference_channels, latent, latent),
        )

    return _component("unet", unet, dtype, steps, run, fp8_storage)


def this_device(choice: Literal["auto", "cpu", "cuda"]) -> tuple[str, Card]:
    """Name and figures of this machine's device; its rates are measured in about a second."""
    from sv4d_ns.utils.devices import choose_device

    device, _ = choose_device(choice)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        half, single = (matrix_rate(device, kind, 4096) for kind in (torch.bfloat16, torch.float32))
        return properties.name, Card(properties.total_memory, half, single)
    import psutil

    single = matrix_rate(device, torch.float32, 768)
    return "CPU", Card(psutil.virtual_memory().total, matrix_rate(device, torch.bfloat16, 768), single)


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Measured FLOP/s of a square matrix product."""
    a = torch.rand(size, size, device=device).to(dtype)

    def run() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.3 or rounds < 3:
        run()
        rounds += 1
    return rounds * 2 * size**3 / (time.perf_counter() - started)
