"""Fitting the views of a grid pixel by pixel: the warm-up, and what distillation is compared with."""

from torch import Tensor

from sv4d_ns.field.volume_rendering import RenderOutput
from sv4d_ns.fitting import losses
from sv4d_ns.fitting.batch_sampler import Batch
from sv4d_ns.fitting.settings import LossWeights

SCALE = 1000.0
"""Brings the mean squared errors to the size of the other terms, for optimisers with a memory."""


def view_losses(rendered: RenderOutput, batch: Batch) -> dict[str, Tensor]:
    """Photometric and mask losses of a batch of rays, weighted."""
    weights = LossWeights()
    terms = {
        "photometric": weights.photometric * losses.photometric(rendered.rgb, batch.rgb, batch.weight),
        "mask": weights.mask * losses.mask(rendered.alpha, batch.alpha, batch.weight),
    }
    return {name: SCALE * value for name, value in terms.items()}
