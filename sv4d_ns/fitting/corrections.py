"""What generated views get wrong as a whole, learned along with the field: their cameras, their colours, their worth.

The input view is the anchor: its camera, its colours and its weight stay as they are, so the corrections of the others
cannot drift off together. Known parts: poses refined along with the field (BARF, Lin et al. 2021, without its
annealing), a colour map for each picture (Urban Radiance Fields, Rematas et al. 2022, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sv4d_ns.field.volume_rendering import RenderOutput
from sv4d_ns.fitting.objective import INPUT_VIEW, Batch
from sv4d_ns.fitting.settings import CorrectionConfig

COLOR_RANGE = 0.3
"""Change of a colour by a correction of 1, in each entry of the map."""
MEMORY = 0.98
"""Share of a view's running error that is kept from one step to the next."""
SMALLEST_ERROR = 1e-5
"""Errors up to this one are none (50 dB)."""
UNKNOWN = -1.0
"""Running error of a view that no step has looked at yet."""


class ViewCorrections(nn.Module):
    """Corrections of v views (the input and the generated ones); all are none when new."""

    error: Tensor

    def __init__(self, views: int, config: CorrectionConfig) -> None:
        super().__init__()
        self.config = config
        self.pose = nn.Parameter(torch.zeros(views, 4), requires_grad=config.pose)
        self.color = nn.Parameter(torch.zeros(views, 3, 4), requires_grad=config.color)
        self.register_buffer("error", torch.full((views,), UNKNOWN))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is to be learned, as the group "views"; no group if nothing is switched on."""
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return {"views": learned} if learned else {}

    def rotations(self) -> Float[Tensor, "v 3 3"]:
        """Rotation of each camera about the origin (exponential map); the identity for the input view."""
        x, y, z = (math.radians(self.config.pose_range_deg) * _anchored(self.pose)[:, :3]).unbind(-1)
        zero = torch.zeros_like(x)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
        return torch.linalg.matrix_exp(skew)

    def scales(self) -> Float[Tensor, " v"]:
        """Factor of each camera's distance from the origin; 1 for the input view."""
        return torch.exp(self.config.scale_range * _anchored(self.pose)[:, 3])

    def rays(
        self, origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], view: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
        """Rays of nominal cameras as rays of the corrected ones."""
        if not self.config.pose:
            return origins, directions
        rotation = self.rotations()[view]
        turned = (rotation @ torch.stack([origins, directions], -1)).unbind(-1)
        return self.scales()[view, None] * turned[0], turned[1]

    def recolored(
        self,
        rgb: Float[Tensor, "n 3"],
        alpha: Float[Tensor, " n"],
        background: Float[Tensor, " 3"],
        view: Int[Tensor, " n"],
    ) -> Float[Tensor, "n 3"]:
        """The field's colours as each view would paint them; the background stays."""
        if not self.config.color:
            return rgb
        behind = (1 - alpha[:, None]) * background
        seen = torch.cat([rgb - behind, alpha[:, None]], -1)  # premultiplied, so that the map's offset scales too
        change = COLOR_RANGE * _anchored(self.color)[view]
        return rgb + (change @ seen[..., None])[..., 0]

    def trust(self) -> Float[Tensor, " v"]:
        """Weight of each view from its running error; 1 for the input view and before anything was seen."""
        return robust_weights(self.error, self.config.robust_tolerance)

    def corrected(self, rendered: RenderOutput, batch: Batch) -> tuple[RenderOutput, Batch]:
        """Rendered rays and their targets as the losses are to see them; remembers the views' errors."""
        rgb = self.recolored(rendered.rgb, rendered.alpha, batch.background, batch.view)
        rendered = replace(rendered, rgb=rgb)
        with torch.no_grad():
            origins, directions = self.rays(batch.origins, batch.directions, batch.view)
        batch = replace(batch, origins=origins, directions=directions)
        if not self.config.robust:
            return rendered, batch
        self._remember(rendered, batch)
        return rendered, replace(batch, weight=batch.weight * self.trust()[batch.view])

    def penalties(self) -> dict[str, Tensor]:
        """Weighted mean squares of what is corrected, by name; those of what is switched off are not among them."""
        learned = {"pose": self.pose, "color": self.color}
        return {
            f"{name}_correction": self.config.penalty * _anchored(values).square().mean()
            for name, values in learned.items()
            if values.requires_grad
        }

    @torch.no_grad()
    def _remember(self, rendered: RenderOutput, batch: Batch) -> None:
        error = (rendered.rgb - batch.rgb).square().mean(-1) + (rendered.alpha - batch.alpha).square()
        count = torch.zeros_like(self.error).index_add(0, batch.view, torch.ones_like(error))
        mean = torch.zeros_like(self.error).index_add(0, batch.view, error) / count.clamp(min=1)
        kept = torch.where(self.error >= 0, MEMORY, 0.0)
        self.error.copy_(torch.where(count > 0, kept * self.error + (1 - kept) * mean, self.error))


def robust_weights(error: Float[Tensor, " v"], tolerance: float) -> Float[Tensor, " v"]:
    """Weights of views from their errors: 1 up to `tolerance` times the median of the generated views' errors, then
    falling with the square of the error. The input view (the first) counts in full, and so do views whose error is not
    known (negative)."""
    known = error[INPUT_VIEW + 1 :]
    known = known[known >= 0]
    if not len(known):
        return torch.ones_like(error)
    excess = functional.relu(error / (tolerance * known.median()).clamp(min=SMALLEST_ERROR) - 1)
    weights = (1 + excess).square().reciprocal()
    weights[INPUT_VIEW] = 1
    return weights


def _anchored(values: Tensor) -> Tensor:
    """Corrections with none for the input view, none larger than 1."""
    free = torch.ones(len(values), *[1] * (values.ndim - 1), device=values.device)
    free[INPUT_VIEW] = 0
    return free * torch.tanh(values)
