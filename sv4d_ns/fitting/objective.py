"""What a step asks of its rays: every loss that is switched on, times its weight. Pure torch; the nerfstudio model and
`benchmarks/field_fit.py` both call `loss_terms`.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sv4d_ns.field.compositing import spread, transmittance
from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import RenderOutput
from sv4d_ns.fitting import losses
from sv4d_ns.fitting.batch_sampler import Batch
from sv4d_ns.fitting.registration import FLOW_POINTS, NEIGHBOUR_SCALE, Admission, band_losses, draw_band, flow_loss
from sv4d_ns.fitting.scene_flow import SceneFlow
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.metrics.lpips import Perceptual
from sv4d_ns.utils import randomness
from sv4d_ns.utils.devices import upload

REGULARISED_POINTS = 384
"""Surface points a step's smoothness terms look at."""
BESIDE = 0.025
"""Half a frame of a 21-frame clip. The motion grids so far beside a step's frames get a gradient of zero, so that Adam
moves them on by what it remembers; without it the motion learns about 1.7 times slower than its rate was meant for."""
TURNS = (("normal", "bilateral_normal"), ("normal_smoothness", "registration", "band_rigidity"))
"""Terms that look at the field beside the step's own samples, which costs as much as these do: each group is asked
every other step, twice as much ("lazy regularisation", Karras et al. 2020, StyleGAN2, appendix B)."""
RIGIDITY_BESIDE_FLOW = 0.3
"""Share of rigidity's weights where followed points say how matter moves: all of it blurs thin limbs, and without any
the motion follows bodies less well."""


def loss_terms(
    field: DeformableField,
    occupancy: OccupancyGrid,
    flow: SceneFlow | None,
    rendered: RenderOutput,
    batch: Batch,
    weights: LossWeights,
    seed: int,
    step: int,
    perceptual: Perceptual | None = None,
) -> dict[str, Tensor]:
    """Every loss that is switched on, times its weight; their sum is what a step minimises.

    Args:
        perceptual: LPIPS, where it is at hand.
    """
    if flow is not None:
        weights = replace(
            weights,
            deformation_rigidity=RIGIDITY_BESIDE_FLOW * weights.deformation_rigidity,
            band_rigidity=RIGIDITY_BESIDE_FLOW * weights.band_rigidity,
        )
    weights = _in_turn(weights, step)
    terms = {
        "photometric": losses.photometric(rendered.rgb, batch.rgb, batch.weight),
        "mask": losses.mask(rendered.alpha, batch.alpha, batch.weight),
    }
    if batch.patches:
        terms.update(_patch_terms(field, rendered, batch, weights, perceptual))
    if weights.sparsity and not batch.agreeing:
        terms["sparsity"] = _sparsity(field, rendered, batch)
    if weights.distortion:
        terms["distortion"] = spread(rendered.weights, rendered.samples)
    if weights.density_residual and rendered.residual is not None:
        terms["density_residual"] = losses.density_residual(rendered.residual)
    terms.update(_surface_terms(field, rendered, batch, weights, seed, step))
    terms.update(_band_terms(field, occupancy, batch, weights, seed, step))
    if flow is not None and weights.scene_flow:
        terms.update(_flow_terms(field, occupancy, flow, batch, seed, step))
    return {name: getattr(weights, name) * value for name, value in terms.items()}


def _in_turn(weights: LossWeights, step: int) -> LossWeights:
    """The weights of this step: one group of `TURNS` rests."""
    asked, resting = TURNS[step % 2], TURNS[1 - step % 2]
    doubled = {name: 2 * getattr(weights, name) for name in asked}
    return replace(weights, **doubled, **dict.fromkeys(resting, 0.0))


def _sparsity(field: DeformableField, rendered: RenderOutput, batch: Batch) -> Tensor:
    """What the object owes for matter that the batch's rays see.

    Only what a view sees is asked to go, so that something can object: from sides that no view sees (between the legs,
    under the belly) a body would be eaten up to its shell.
    """
    n_rays = (batch.alpha > 0.5).sum()  # stays on the device: reading it would wait for all work before it
    step = rendered.samples.step
    opened = transmittance(rendered.density.detach() * step, rendered.samples)
    owed = losses.sparsity(rendered.density, opened, step, n_rays.clamp(min=1), field.config.max_density)
    return owed * (n_rays > 0)


def _patch_terms(
    field: DeformableField,
    rendered: RenderOutput,
    batch: Batch,
    weights: LossWeights,
    perceptual: Perceptual | None,
) -> dict[str, Tensor]:
    """What is asked of the batch's patches: how they look, and how smooth the surface in them is."""
    side = batch.patch_side

    def patches(values: Tensor) -> Tensor:
        return values[batch.rays :].reshape(batch.patches, side, side, *values.shape[1:])

    made, target, per_patch = patches(rendered.rgb), patches(batch.rgb), patches(batch.weight).mean((1, 2))
    terms = {}
    if weights.structure:
        terms["structure"] = losses.dssim(made, target, per_patch)
    if weights.perceptual and perceptual is not None:
        terms["perceptual"] = losses.perceptual(perceptual, made, target, per_patch)
    seen = (patches(rendered.alpha.detach()) > 0.5) & (patches(batch.alpha) > 0.5)
    has_estimate = bool(weights.normal) and batch.normals is not None
    if not (has_estimate or weights.bilateral_normal):
        return terms
    flat = seen.flatten()
    # a CPU looks at the surface alone; a GPU would be waited for to find it, which costs more than to look everywhere
    rows = flat.nonzero()[:, 0] if flat.device.type == "cpu" else torch.arange(len(flat), device=flat.device)
    if not len(rows):
        return terms
    rays, is_surface = batch.rays + rows, flat[rows]
    surface = batch.origins[rays] + rendered.depth.detach()[rays, None] * batch.directions[rays]
    surface = torch.where(is_surface[:, None], surface, 0.0)
    found = field.normals(surface, batch.times[rays], moments=batch.moments) * is_surface[:, None]
    normals = torch.zeros_like(made).view(-1, 3).index_copy(0, rows, found).view_as(made)
    if has_estimate:
        assert batch.normals is not None
        terms["normal"] = losses.normal(found, batch.normals[rays], batch.weight[rays] * is_surface)
    if weights.bilateral_normal:
        terms["bilateral_normal"] = losses.bilateral_normal(normals, target, seen)
    return terms


def _surface_terms(
    field: DeformableField, rendered: RenderOutput, batch: Batch, weights: LossWeights, seed: int, step: int
) -> dict[str, Tensor]:
    """Smoothness of surface and motion at points that are seen in this step."""
    if not len(rendered.weights):
        return {}
    rng = randomness.generator(seed, step, 2)
    pick, any_seen = randomness.draw_true(rendered.weights.detach() > 0.02, REGULARISED_POINTS, rng)
    x, moved = rendered.positions[pick], rendered.deformation[pick]
    t = batch.times[rendered.ray_indices[pick]]
    offset = upload(NEIGHBOUR_SCALE * rng.normal(size=x.shape), x.device).to(x)
    terms = {}
    if weights.normal_smoothness:
        terms["normal_smoothness"] = any_seen * losses.normal_smoothness(field, (x + moved).detach(), 0.5 * offset)
    if not moved.requires_grad:  # the static phase does not evaluate the deformation
        return terms
    if weights.deformation:
        terms["deformation"] = any_seen * losses.deformation_magnitude(rendered.deformation, rendered.weights)
    if weights.deformation_rigidity:
        beside = [moment + shift for moment in batch.moments for shift in (-BESIDE, BESIDE)]
        places = torch.cat([x + 2 * offset, x.new_zeros(len(beside), 3)])
        times = torch.cat([t, upload(np.array(beside, np.float32)[:, None], t.device)])
        neighbour = field.deformation(places, times, [*batch.moments, *beside])[: len(x)]
        terms["deformation_rigidity"] = any_seen * losses.deformation_rigidity(moved, neighbour, 2 * offset)
    return terms


def _band_terms(
    field: DeformableField, occupancy: OccupancyGrid, batch: Batch, weights: LossWeights, seed: int, step: int
) -> dict[str, Tensor]:
    """What the deformation owes around the hulls of the batch's frames, rendered or not."""
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    bins = {frame: occupancy.nearest_bin(frame / max(batch.n_frames - 1, 1)) for frame in batch.frames}
    moving = [frame for frame, k in bins.items() if k != canonical]
    if not weights.registration or not moving:
        return {}
    band = draw_band(occupancy, [bins[frame] for frame in moving], randomness.generator(seed, step, 3))
    if band is None:
        return {}
    residual, rigidity = band_losses(field, occupancy, band)
    return {"registration": residual, "band_rigidity": rigidity}


def _flow_terms(
    field: DeformableField, occupancy: OccupancyGrid, flow: SceneFlow, batch: Batch, seed: int, step: int
) -> dict[str, Tensor]:
    """What the batch's frames owe to the surface's flow from the frames they started from."""
    parents = flow.order.parents
    pairs = [Admission(frame, parents[frame]) for frame in batch.frames if parents[frame] != frame]
    if not pairs:
        return {}
    rng = randomness.generator(seed, step, 7)
    owed = [flow_loss(field, occupancy, flow, pair, FLOW_POINTS // 2, rng) for pair in pairs]
    return {"scene_flow": torch.stack(owed).mean()}
