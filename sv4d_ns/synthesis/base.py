"""Novel-view video synthesis: frames of one view in, a grid of views out.

`ViewSynthesizer` is the only thing the 4D optimisation knows of the diffusion model. Stage 1 calls `generate`,
stage 2 calls `refine` (SDEdit on the whole grid); both return plain uint8 RGBA arrays.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.diffusion.seams import WHITE_EDGES, BoundaryDrift
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import over_white, resize_rgba, smoothstep
from sv4d_ns.utils.progress import Progress

if TYPE_CHECKING:
    from sv4d_ns.diffusion.planner.plan import Offload, Plan
    from sv4d_ns.diffusion.sv4d.grid import GeneratedGrid, GridOptions
    from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline


class ViewSynthesizer(Protocol):
    """What the 4D optimisation needs of a multi-view video model."""

    image_size: int
    """Pixels along the side of the square frames it reads and makes."""
    refine_strength: float
    """The `strength` of stage 2 this model is best at, in (0, 1]."""

    def default_plan(self) -> ViewPlan:
        """The views this model is best at."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain facts for the grid's provenance: model, weights, settings."""
        ...

    def generate(
        self, frames: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, *, seed: int, store: Path, progress: Progress
    ) -> "Views":
        """Novel views of an object video. Finished windows are kept in `store`, so a killed call resumes."""
        ...

    def refine(
        self,
        frames: UInt8[np.ndarray, "t s s 4"],
        renders: UInt8[np.ndarray, "t v s s 4"],
        plan: ViewPlan,
        *,
        strength: float,
        seed: int,
        store: Path,
        progress: Progress,
    ) -> "Views":
        """SDEdit: noise `renders` to the level `strength` in (0, 1] and denoise them given the input video."""
        ...


def to_model_space(rgba: UInt8[np.ndarray, "*batch h w 4"], channels: int) -> Float[Tensor, "*batch c h w"]:
    """Float images in [0, 1] as the model reads them: RGB on white, and alpha if it has a fourth channel."""
    white = over_white(rgba).astype(np.float32) / 255.0
    if channels == 4:
        white = np.concatenate([white, rgba[..., 3:].astype(np.float32) / 255.0], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(white, -1, -3)))


@dataclass(frozen=True, eq=False)
class Views:
    """What a synthesizer made."""

    images: UInt8[np.ndarray, "t v s s 4"]
    """sRGB, straight alpha."""
    confidence: UInt8[np.ndarray, "t v s s"]
    """How sure the model was of each pixel, 0..255."""
    drift: tuple[BoundaryDrift, ...] = ()
    """How far windows disagree about the frames both made, a boundary each."""
    plan: ViewPlan | None = None
    """Their cameras, from a model that knows them only afterwards; None for those that were asked for."""


def from_model_space(images: Float[Tensor, "*batch c h w"]) -> Views:
    """The inverse of `to_model_space`, with silhouettes made definite.

    A model with an alpha channel that samples in few steps predicts a mean: its alpha is the probability that the
    object covers the pixel. The silhouette is cut around one half (smoothstep from 1/4 to 3/4), and the probability
    becomes the confidence, (2 alpha - 1)^2: 1 where the pixel surely is or is not object, 0 on a coin's toss. A model
    without one paints on white: what differs from white by more than the noise of a decoder is foreground (smoothstep
    from 4/255 to 24/255 of the largest channel difference) and all pixels are believed. These curves are our choice.
    """
    values = images.detach().float().cpu().clamp(0, 1).movedim(-3, -1)
    white = values[..., :3]
    if values.shape[-1] == 4:
        coverage = values[..., 3:]
        alpha, confidence = smoothstep(coverage, 0.25, 0.75), (2.0 * coverage - 1.0) ** 2
    else:
        coverage = alpha = smoothstep((1.0 - white).amax(-1, keepdim=True), *WHITE_EDGES)
        confidence = torch.ones_like(alpha)
    # at little coverage the colour is noise divided by nearly nothing
    straight = torch.where(coverage > 0.03, (white - (1.0 - coverage)) / coverage.clamp(min=0.03), 1.0)
    rgba = torch.cat([straight.clamp(0, 1), alpha], dim=-1)
    return Views((rgba * 255).round().byte().numpy(), (confidence[..., 0] * 255).round().byte().numpy())


def refine_sigma(scheduler: Mapping[str, Any], strength: float) -> float:
    """The noise level at which the last `strength` (0..1] of a Karras schedule (rho 7) begins."""
    low, high = scheduler["sigma_min"] ** (1 / 7), scheduler["sigma_max"] ** (1 / 7)
    return (low + strength * (high - low)) ** 7


@dataclass
class DiffusionSynthesizer:
    """`ViewSynthesizer` around a `StableVideo4D2Pipeline` (official weights, or a model of `sv4d train`)."""

    pipeline: "StableVideo4D2Pipeline"
    name: str
    image_size: int
    plan: ViewPlan
    num_inference_steps: int | None = None
    """Denoising steps of `generate`; None takes the pipeline's own default."""
    refine_inference_steps: int | None = None
    """Denoising steps of `refine` from its noise level down; None takes the pipeline's own step size."""
    refine_strength: float = 0.4
    """Noise level of `refine` where the user names none (our choice; the paper does not say)."""
    options: "GridOptions | None" = None
    """How grids are generated; the defaults where None."""

    @property
    def _options(self) -> "GridOptions":
        from sv4d_ns.diffusion.sv4d.grid import GridOptions

        return self.options or GridOptions()

    @cached_property
    def weights(self) -> str:
        """Hash of the weights."""
        from sv4d_ns.diffusion.window_store import weights_fingerprint

        return weights_fingerprint(self.pipeline.unet, self.pipeline.vae, self.pipeline.image_encoder)

    def default_plan(self) -> ViewPlan:
        return self.plan

    def describe(self) -> dict[str, Any]:
        from sv4d_ns import __version__

        config = {key: value for key, value in self.pipeline.config.items() if not key.startswith("_")}
        scalars = {key: value for key, value in config.items() if isinstance(value, int | float | str | bool)}
        return {
            "model": self.name,
            "weights": self.weights,
            "code": __version__,
            "num_inference_steps": self.num_inference_steps,
            "refine_inference_steps": self.refine_inference_steps,
            "options": asdict(self._options),
            "pipeline": scalars,
        }

    def generate(
        self, frames: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, *, seed: int, store: Path, progress: Progress
    ) -> Views:
        grid = self._run(frames, plan, self.num_inference_steps, seed=seed, store=store, progress=progress)
        return replace(from_model_space(grid.images), drift=grid.drift)

    def refine(
        self,
        frames: UInt8[np.ndarray, "t s s 4"],
        renders: UInt8[np.ndarray, "t v s s 4"],
        plan: ViewPlan,
        *,
        strength: float,
        seed: int,
        store: Path,
        progress: Progress,
    ) -> Views:
        steps = self.refine_inference_steps or self.pipeline.steps_to_run(self.num_inference_steps, strength)
        full_schedule = self.pipeline.scheduler
        # the schedule from the noise level of `strength` down, in as many steps as we like
        self.pipeline.scheduler = type(full_schedule).from_config(
            full_schedule.config, sigma_max=refine_sigma(full_schedule.config, strength)
        )
        try:
            grid = self._run(
                frames, plan, steps, seed=seed, store=store, progress=progress, initial_views=renders
            )  # fmt: skip
        finally:
            self.pipeline.scheduler = full_schedule
        return replace(from_model_space(grid.images), drift=grid.drift)

    def _run(
        self,
        frames: UInt8[np.ndarray, "t s s 4"],
        plan: ViewPlan,
        num_inference_steps: int | None,
        *,
        seed: int,
        store: Path,
        progress: Progress,
        initial_views: UInt8[np.ndarray, "t v s s 4"] | None = None,
    ) -> "GeneratedGrid":
        from sv4d_ns.diffusion.sv4d.grid import generate_grid
        from sv4d_ns.diffusion.sv4d.windows import ViewReferences
        from sv4d_ns.diffusion.window_store import WindowStore

        channels = self.pipeline.vae.config.in_channels
        initial, options = None, self._options
        if initial_views is not None:
            initial = to_model_space(resize_rgba(initial_views, self.image_size), channels)
            # renders of one field agree with each other already
            options = replace(options, references=ViewReferences.INDEPENDENT)
        return generate_grid(
            self.pipeline,
            to_model_space(resize_rgba(frames, self.image_size), channels),
            plan.azimuths_deg,
            plan.elevations_deg,
            seed=seed,
            store=WindowStore(store),
            on_progress=progress,
            initial_views=initial,
            options=replace(options, num_inference_steps=num_inference_steps),
        )


def fitting_offload(plan: "Plan", memory: float) -> tuple["Offload", str]:
    """The fastest way of offloading that fits into `memory` bytes of a device, and a sentence that says why.

    Raises:
        InputError: none fits.
    """
    from sv4d_ns.diffusion.planner.plan import GIB

    offload = plan.recommended(memory)
    if offload is None:
        least = min(plan.bytes_by_offload.values()) / GIB
        raise InputError(
            f"The official model needs {least:.1f} GiB of device memory even where every layer is offloaded, and this "
            f"device has {memory / GIB:.1f} GiB: use --pipeline.datamanager.synthesis bundled."
        )
    peak, seconds = plan.bytes_by_offload[offload] / GIB, plan.seconds_by_offload[offload]
    return offload, (
        f"Offloading '{offload.value}': the fastest way that fits into {memory / GIB:.1f} GiB of device memory "
        f"(expected peak {peak:.1f} GiB, about {seconds:.0f} s a window; sv4d plan compares the ways)."
    )


def apply_offload(pipeline: "StableVideo4D2Pipeline", offload: "Offload", device: str) -> None:
    """Let a pipeline run on `device` with only what `offload` says there at a time."""
    from sv4d_ns.diffusion.planner.plan import Offload

    if offload is Offload.MODEL:
        pipeline.enable_model_cpu_offload(device=device)
    elif offload is Offload.GROUP:
        pipeline.enable_group_offload(
            torch.device(device), offload_type="block_level", num_blocks_per_group=1, use_stream=True
        )
    elif offload is Offload.SEQUENTIAL:
        pipeline.enable_sequential_cpu_offload(device=device)


SynthesisChoice = Literal["auto", "bundled", "official"]
OFFICIAL_OPTIONS = ("references", "guidance_scale", "camera_attention")
"""Of these the bundled model has none."""


def load_synthesizer(
    choice: SynthesisChoice,
    device: str,
    *,
    num_inference_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[ViewSynthesizer, str]:
    """The synthesizer for a machine, and one sentence saying what was chosen and why.

    Args:
        choice: `auto` takes the official SV4D 2.0 weights on a CUDA device (2 billion parameters are out of reach of
            a CPU) and the bundled model elsewhere; the other values say it outright.
        device: torch device string.
        num_inference_steps: denoising steps; None takes the model's own default.
        options: values of `GridOptions` by name; None, for any of them, takes what suits the model.

    Raises:
        InputError: an option is unknown, or the official weights are not at hand (the sentence says how to get them,
            or how to go without).
    """
    from sv4d_ns.diffusion.sv4d.grid import GridOptions
    from sv4d_ns.diffusion.sv4d.windows import ViewReferences

    on_cuda = device.startswith("cuda")
    official = choice == "official" or (choice == "auto" and on_cuda)
    if official and not on_cuda and choice == "official":
        raise InputError(
            "--pipeline.datamanager.synthesis official needs a CUDA device (12 GB of weights, hours on a CPU): "
            "use --pipeline.datamanager.synthesis bundled on this machine."
        )
    reason = f"--pipeline.datamanager.synthesis {choice}" if choice != "auto" else f"the device is {device}"
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if not official:
        from sv4d_ns.synthesis.bundled import NAME, load_bundled_synthesizer

        for option in OFFICIAL_OPTIONS:
            if option in given:
                flag = "view-references" if option == "references" else option.replace("_", "-")
                raise InputError(
                    f"--pipeline.datamanager.{flag} is a setting of the official model, and the bundled one is used: "
                    "leave it out."
                )
        bundled = load_bundled_synthesizer(device, num_inference_steps)
        size = bundled.image_size
        return bundled, f"Views come from the {NAME} model at {size}x{size}, because {reason}."
    from sv4d_ns.diffusion.planner.plan import Offload, plan_memory, this_device
    from sv4d_ns.diffusion.weights.official import load_official_pipeline

    _, card = this_device("cuda")
    offload, memory = fitting_offload(plan_memory("official8", card), card.memory)
    print(memory)
    # the 8-view model: its views close the ring around the object in one call, so they agree with each other
    place = device if offload is Offload.NONE else "cpu"
    pipeline, name = load_official_pipeline(place, "sv4d2_8views.safetensors"), "stabilityai/sv4d2.0 (8 views)"
    apply_offload(pipeline, offload, device)
    plan, size, references = ViewPlan.OFFICIAL_8, 576, ViewReferences.ANCHORED
    grid_options = GridOptions.from_values({"references": references, **given})
    synthesizer = DiffusionSynthesizer(pipeline, name, size, plan, num_inference_steps, options=grid_options)
    return synthesizer, f"Views come from the {name} model at {size}x{size}, because {reason}."
