"""Fitting the views of a grid pixel by pixel: the warm-up, and what distillation is compared with."""

import torch
from torch import Tensor

from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField
from sv4d_ns.field.volume_rendering import render_rays
from sv4d_ns.fitting import losses
from sv4d_ns.fitting.batch_sampler import Batch
from sv4d_ns.fitting.settings import LossWeights

SAMPLES = 128
"""Steps along the box's diagonal."""
SCALE = 1000.0
"""Brings the mean squared errors to the size of the other terms, for optimisers with a memory."""


def view_terms(field: SpaceTimeField, occupancy: OccupancyGrid, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Photometric and mask losses of a batch of rays, weighted, and the batch's PSNR in dB."""
    field_for_rays: torch.nn.Module = field
    rendered = render_rays(
        field_for_rays,  # type: ignore[arg-type]  # it has the methods rendering needs
        occupancy,
        batch.origins,
        batch.directions,
        batch.times,
        SAMPLES,
        background=batch.background,
        jitter=batch.jitter,
        moments=batch.moments,
    )
    weights = LossWeights()
    terms = {
        "photometric": weights.photometric * losses.photometric(rendered.rgb, batch.rgb, batch.weight),
        "mask": weights.mask * losses.mask(rendered.alpha, batch.alpha, batch.weight),
    }
    error = (rendered.rgb.detach() - batch.rgb).square().mean().clamp(min=1e-10)
    return {name: SCALE * value for name, value in terms.items()}, -10 * error.log10()
