"""`ViewSynthesizer` around the bundled model, whose views are renders of one volume a moment."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.synthesis.base import BUNDLED, BUNDLED_SIZE, Views, from_model_space
from sv4d_ns.utils.callbacks import Progress

if TYPE_CHECKING:
    from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline

REFINE_STRENGTH = 0.5
"""Noise level of stage 2, as a share of the logarithmic range from sigma_min to sigma_max."""


@dataclass
class BundledSynthesizer:
    """Volumes from the video, and their pictures from the cameras of a plan."""

    pipeline: "BundledVideoPipeline"
    num_inference_steps: int | None = None
    """Denoising steps of `generate`; None takes the pipeline's own."""
    image_size: int = BUNDLED_SIZE
    refine_strength: float = REFINE_STRENGTH

    @cached_property
    def weights(self) -> str:
        """Hash of the weights."""
        from sv4d_ns.diffusion.window_store import weights_fingerprint

        return weights_fingerprint(self.pipeline.denoiser)

    def default_plan(self) -> ViewPlan:
        return ViewPlan.BUNDLED

    def describe(self) -> dict[str, Any]:
        from sv4d_ns import __version__

        config = {key: value for key, value in self.pipeline.config.items() if not key.startswith("_")}
        scalars = {key: value for key, value in config.items() if isinstance(value, int | float | str | bool)}
        return {
            "model": BUNDLED,
            "weights": self.weights,
            "code": __version__,
            "num_inference_steps": self.num_inference_steps,
            "image_size": self.image_size,
            "pipeline": scalars,
        }

    def generate(
        self, frames: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, *, seed: int, store: Path, progress: Progress
    ) -> Views:
        """Novel views. A few seconds' work, so nothing is kept in `store`."""
        return self._run(frames, plan, seed=seed, progress=progress, num_inference_steps=self.num_inference_steps)

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
        return self._run(
            frames, plan, seed=seed, progress=progress, initial_views=renders, strength=strength, num_inference_steps=1
        )

    def _run(
        self, frames: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, *, seed: int, progress: Progress, **options: Any
    ) -> Views:
        steps = options["num_inference_steps"] or self.pipeline.config.num_inference_steps
        self.pipeline.set_progress_bar_config(disable=True)

        # a step is a prediction and its pictures, those of the last one are made after it is told of
        total = 2 * steps

        def on_step(_: Any, step: int, sigma: float, tensors: dict[str, Any]) -> dict[str, Any]:
            progress(min(2 * (step + 1), total - 1), total)
            return tensors

        rgba = self.pipeline(
            frames, plan.azimuths_deg, plan.elevations_deg, plan.input_elevation_deg, size=self.image_size,
            radius=plan.radius, fov_deg=plan.fov_deg, generator=torch.Generator().manual_seed(seed), output_type="pt",
            callback_on_step_end=on_step, return_dict=False, **options,
        )[0]  # fmt: skip
        progress(total, total)
        return from_model_space(torch.cat([on_white(moment), moment[:, 3:]], dim=1) for moment in rgba)


def on_white(rgba: Float[Tensor, "v 4 h w"]) -> Float[Tensor, "v 3 h w"]:
    """Straight colour over white."""
    colour, alpha = rgba.split([3, 1], dim=1)
    return colour * alpha + 1.0 - alpha


def load_bundled_synthesizer(device: str, num_inference_steps: int | None = None) -> BundledSynthesizer:
    """The shipped model.

    Raises:
        InputError: the package was installed without its weights.
    """
    from sv4d_ns.diffusion.bundled import load_bundled_pipeline

    return BundledSynthesizer(load_bundled_pipeline(device), num_inference_steps)
