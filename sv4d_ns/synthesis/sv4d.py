"""SV4D 2.0 as a `ViewSynthesizer`, and how it is made to fit into a device's memory."""

from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.synthesis.base import Views, from_model_space, to_model_space
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import resize_rgba

if TYPE_CHECKING:
    from sv4d_ns.diffusion.planner.plan import Offload, Plan
    from sv4d_ns.diffusion.sv4d.grid import GeneratedGrid, GridOptions
    from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline


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
        steps = self.pipeline.steps_to_run(self.num_inference_steps, strength)
        full_schedule = self.pipeline.scheduler
        # the schedule from the noise level of `strength` down, in as many steps as we like
        short_schedule = type(full_schedule).from_config(
            full_schedule.config, sigma_max=refine_sigma(full_schedule.config, strength)
        )
        pipeline = copy(self.pipeline)  # the same networks; the pipeline itself may be others' too
        pipeline.scheduler = short_schedule
        grid = replace(self, pipeline=pipeline)._run(
            frames, plan, steps, seed=seed, store=store, progress=progress, initial_views=renders
        )
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
