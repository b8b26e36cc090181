"""How strongly each image of the grid is pulled towards its condition (classifier-free guidance).

Source: Stability-AI/generative-models, guiders LinearPredictionGuider and SpatiotemporalPredictionGuider.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.utils.errors import InputError


class GuidanceKind(str, Enum):
    """The shape of the guidance scale over the grid.

    LINEAR: a ramp from `min_scale` to `scale` over the flattened (t v) index, as the released 4-view model runs (its
        script leaves `min_scale` at 1, so that the first image is unguided).
    SPATIOTEMPORAL: the mean of a ramp over time and a triangle over views (the released 8-view model).
    CONSTANT: `scale` everywhere; 1 means the conditional prediction alone, at half the cost.
    """

    LINEAR = "linear"
    SPATIOTEMPORAL = "spatiotemporal"
    CONSTANT = "constant"


class GuidanceRule(str, Enum):
    """Whose shape of the guidance scale a run uses.

    RELEASED: the model's own `GuidanceKind`; of the released models the ramp their scripts run.
    CONSTANT: the largest scale for every image, which the ramps reach only at the last frames or the far views.
    """

    RELEASED = "released"
    CONSTANT = "constant"

    def applied_to(self, own: "Guidance", scale: float | None = None) -> "Guidance":
        """The model's own guidance in this shape, and with another largest scale where one is given."""
        kind = own.kind if self is GuidanceRule.RELEASED else GuidanceKind.CONSTANT
        return replace(own, kind=kind, scale=own.scale if scale is None else scale)


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of a grid.

    Attributes:
        kind: see `GuidanceKind`.
        scale: the largest scale, at least 1 to strengthen the condition.
        min_scale: the smallest scale (not used by CONSTANT).
    """

    kind: GuidanceKind
    scale: float
    min_scale: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Guidance":
        """The inverse of `to_config`. Raises InputError for an unknown kind."""
        try:
            return cls(GuidanceKind(config["kind"]), float(config["scale"]), float(config["min_scale"]))
        except (KeyError, ValueError) as error:
            kinds = ", ".join(kind.value for kind in GuidanceKind)
            raise InputError(
                f"The guidance setting {dict(config)} must have a kind ({kinds}), a scale and a min_scale."
            ) from error

    def to_config(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {**asdict(self), "kind": self.kind.value}

    def between(self, min_scale: float | None, scale: float | None) -> "Guidance":
        """The same shape with other ends; None keeps its own."""
        return replace(
            self,
            min_scale=self.min_scale if min_scale is None else min_scale,
            scale=self.scale if scale is None else scale,
        )

    @property
    def needs_unconditional(self) -> bool:
        """Whether any image needs the unconditional prediction."""
        return self.kind is not GuidanceKind.CONSTANT or self.scale != 1.0

    def scales(self, frames: int, views: int) -> Float[Tensor, "t v"]:
        """The scale of every image, float32."""
        if self.kind is GuidanceKind.CONSTANT:
            return torch.full((frames, views), self.scale)
        if self.kind is GuidanceKind.LINEAR:
            return torch.linspace(self.min_scale, self.scale, frames * views).view(frames, views)
        over_time = torch.linspace(0, 1, frames)
        position = torch.linspace(0, 1, views)
        over_views = 2 * (position - (position + 0.5).floor()).abs()
        mean = (over_time[:, None] + over_views[None, :]) / 2
        return self.min_scale + (self.scale - self.min_scale) * mean


def guide(
    unconditional: Float[Tensor, "n c h w"], conditional: Float[Tensor, "n c h w"], scales: Float[Tensor, "n"]
) -> Float[Tensor, "n c h w"]:
    """unconditional + scale * (conditional - unconditional), per image.

    The reference applies this to the denoised images; they are affine in the network output with the same coefficients
    on both sides, so it is equal on network outputs.
    """
    return unconditional + scales[:, None, None, None] * (conditional - unconditional)
