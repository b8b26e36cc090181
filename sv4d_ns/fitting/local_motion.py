"""The motion of a cloud of points as one rigid motion around every place, found from matches of which many are wrong.

What moves is mostly a few rigid parts, so what the points around a place agree on says where that place goes, those
that could not be followed included. Procrustes' problem (Kabsch 1976) around nodes, reweighted after Geman and McClure;
points between nodes move as the nearest of them do (embedded deformation, Sumner et al. 2007, without its solver).
"""

import torch
from jaxtyping import Float
from torch import Tensor

NODES = 300
"""Places whose motion is found."""
MOST_MATCHES = 1500
"""Matches that are asked, spread over all of them."""
REACH = 0.07
"""How far around a node matches count in full, world units (standard deviation of a Gaussian)."""
WIDER, WIDER_SHARE, ALL_SHARE = 4.0, 0.02, 1e-5
"""Where few are near: a Gaussian so many times as wide, and all matches alike, count by so little."""
OUTLIER = 0.03
"""Matches that miss the motion of their surroundings by more than this count little, world units."""
ROUNDS = 3
BLENDED = 4
"""Nodes a point's motion is blended from."""
FEWEST = 20
"""Matches without which nothing is said."""


def locally_rigid(
    x: Float[Tensor, "n 3"],
    near: Float[Tensor, "m 3"],
    before: Float[Tensor, "m 3"],
    after: Float[Tensor, "m 3"],
    weight: Float[Tensor, " m"],
) -> Float[Tensor, "n 3"]:
    """Displacements of points, world units, from matches whose points go from `before` to `after`.

    Args:
        near: where each match counts: its `before` to move points of that moment, its `after` to let points of the
            later moment go on as they came.
        weight: how much a match is believed, at least 0; where hardly any is, nothing moves.
    """
    known = (weight > 0.05).nonzero()[:, 0]
    if len(known) < FEWEST or not len(x):
        return torch.zeros_like(x)
    known = known[:: -(-len(known) // MOST_MATCHES)]
    nodes = x[:: -(-len(x) // NODES)]
    squared = torch.cdist(nodes, near[known]).square() / (2 * REACH**2)
    counts = torch.exp(-squared) + WIDER_SHARE * torch.exp(-squared / WIDER**2) + ALL_SHARE
    rotation, origin, target = _rigid(before[known], after[known], weight[known] * counts)
    distance, node = torch.cdist(x, nodes).topk(min(BLENDED, len(nodes)), largest=False)
    share = torch.nn.functional.normalize(1 / (distance + 1e-3), p=1, dim=1)
    moved = torch.einsum("nkij,nkj->nki", rotation[node], x[:, None] - origin[node]) + target[node]
    return (share[..., None] * moved).sum(1) - x


def _rigid(
    before: Float[Tensor, "m 3"], after: Float[Tensor, "m 3"], weight: Float[Tensor, "k m"]
) -> tuple[Float[Tensor, "k 3 3"], Float[Tensor, "k 3"], Float[Tensor, "k 3"]]:
    """k robust rigid motions p -> rotation (p - origin) + target, one for each row of weights."""
    products = (before[:, :, None] * after[:, None, :]).flatten(1)
    current = weight
    for _ in range(ROUNDS):
        share = current / current.sum(1, keepdim=True)
        origin, target = share @ before, share @ after
        covariance = (share @ products).view(-1, 3, 3) - origin[:, :, None] * target[:, None]
        u, _, vh = torch.linalg.svd(covariance)
        mirrored = torch.linalg.det(u @ vh)
        flip = torch.stack([torch.ones_like(mirrored), torch.ones_like(mirrored), mirrored], -1)
        rotation = (vh.mT * flip[:, None]) @ u.mT
        # |R (p - origin) + target - q| for all pairs of motions and matches
        expected = before @ rotation.mT + (target - (rotation @ origin[..., None])[..., 0])[:, None]
        current = weight / (1 + (expected - after).square().sum(-1) / OUTLIER**2) ** 2
    return rotation, origin, target
