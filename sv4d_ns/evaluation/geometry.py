"""Shape and motion of a fitted field against true surface samples and true tracks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from sv4d_ns.evaluation.alignment import Alignment, Similarity
from sv4d_ns.evaluation.cases import Geometry
from sv4d_ns.export.surface.extraction import (
    AnimatedField,
    EmptyField,
    canonical_mesh,
    follow_points,
    frozen,
    opacity_grid,
)
from sv4d_ns.geometry.rotations import nearest_rotation

SURFACE_SAMPLES = 100_000
"""Area-uniform samples of the reconstructed surface: so many that their spacing adds nothing to the distances."""
F_SCORE_DISTANCES = (0.01, 0.02)
"""World units within which a sample counts as right (the object's box is 1.14 wide)."""
SURFACE_RESOLUTION = 128
"""Nodes of the marching-cubes grid along the box's side."""


EMPTY_DISTANCE = 1.14
"""Counted for every distance of a field without a surface: the box's side, so that no mean is better for a failure."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Oriented samples of a surface."""

    points: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    """Unit length."""


def chamfer_and_friends(made: Surface, truth: Surface) -> dict[str, float]:
    """Distances between two sampled surfaces.

    `accuracy` is the mean distance from the samples of `made` to the nearest of `truth`, `completeness` the mean of
    the other direction (both plain distances, not squared, world units); `chamfer` is their mean. `chamfer_floor` is
    what a perfect reconstruction would get: half the mean distance of true samples to their nearest other true
    sample, because truth is known by samples only. `f_score@d` is the harmonic mean of the shares of samples within d,
    either way. `normal_consistency` is the mean of |n . n'| over nearest pairs, averaged over the two directions
    (Mescheder et al. 2019, Occupancy Networks; the absolute value because sheets have no outside). An empty `made`
    counts `EMPTY_DISTANCE` and nothing right.
    """
    true_tree = cKDTree(truth.points)
    spacing = true_tree.query(truth.points, k=2)[0][:, 1] if len(truth.points) > 1 else np.zeros(1)
    if not len(made.points):
        empty = dict.fromkeys(("chamfer", "accuracy", "completeness"), EMPTY_DISTANCE)
        nothing = dict.fromkeys((f"f_score@{distance:g}" for distance in F_SCORE_DISTANCES), 0.0)
        return {**empty, "chamfer_floor": float(0.5 * spacing.mean()), "normal_consistency": 0.0, **nothing}
    made_tree = cKDTree(made.points)
    to_truth, nearest_true = true_tree.query(made.points)
    to_made, nearest_made = made_tree.query(truth.points)
    agreement = [
        np.abs((made.normals * truth.normals[nearest_true]).sum(-1)).mean(),
        np.abs((truth.normals * made.normals[nearest_made]).sum(-1)).mean(),
    ]
    result = {
        "chamfer": 0.5 * (to_truth.mean() + to_made.mean()),
        "accuracy": to_truth.mean(),
        "completeness": to_made.mean(),
        "chamfer_floor": 0.5 * spacing.mean(),
        "normal_consistency": np.mean(agreement),
    }
    for distance in F_SCORE_DISTANCES:
        precision, recall = (to_truth <= distance).mean(), (to_made <= distance).mean()
        result[f"f_score@{distance:g}"] = 2 * precision * recall / max(precision + recall, 1e-12)
    return {name: float(value) for name, value in result.items()}


def sample_surface(
    vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"], count: int = SURFACE_SAMPLES, seed: int = 0
) -> Surface:
    """Area-uniform samples of a mesh with the normals of their faces."""
    import trimesh

    mesh = trimesh.Trimesh(vertices, faces, process=False)
    points, face = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return Surface(np.asarray(points), np.asarray(mesh.face_normals[face]))


def surface_at(field: AnimatedField, occupancy: Any, time: float, resolution: int = SURFACE_RESOLUTION) -> Surface:
    """The field's own surface at a time: marching cubes of what the renderer shows there, as the export cuts it.

    Hollows nobody sees are filled and floaters below 2 % of the surface are dropped, as in the exported mesh. Empty
    where the field shows nothing.
    """

    def possible(x: Any) -> Any:
        return occupancy.is_occupied(x, x.new_full((len(x), 1), time))

    try:
        mesh = canonical_mesh(opacity_grid(frozen(field, time), resolution, possible))
    except EmptyField:
        return Surface(np.zeros((0, 3)), np.zeros((0, 3)))
    return sample_surface(mesh.vertices, mesh.faces)


def carried_tracks(
    field: AnimatedField, start: Float[np.ndarray, "k 3"], start_time: float, times: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "t k 3"]:
    """Where the field's deformation carries surface points from one time to others.

    A point x at `start_time` has the canonical position c = x + deformation(x, start_time); at every other time its
    place is the solution x' of x' + deformation(x', t) = c. The equation is solved by the mesh exporter's own solver,
    each time from its neighbour's solution, outward from `start_time`; where it has no solution the point stays where
    it was at the neighbouring time. `times` should be dense (all frames of the clip); the start is the nearest of them.
    """
    return follow_points(field, start, int(np.abs(times - start_time).argmin()), times).positions


def track_error(
    carried: Float[np.ndarray, "t k 3"], tracks: Float[np.ndarray, "t k 3"]
) -> dict[str, float | list[float]]:
    """Mean distance between carried and true tracks over all frames after the first (world units).

    `track_if_static` is the same for points that never move: what a field without motion gets. `track_p90` is the 90th
    percentile over points and frames, `track_per_frame` has one mean for each frame, the first included.
    """
    error = np.linalg.norm(carried - tracks, axis=-1)
    still = np.linalg.norm(tracks - tracks[:1], axis=-1)
    return {
        "track": float(error[1:].mean()),
        "track_if_static": float(still[1:].mean()),
        "track_p90": float(np.percentile(error[1:], 90)),
        "track_per_frame": [float(value) for value in error.mean(-1)],
    }


def fitted_similarity(made: Sequence[Surface], truth: Sequence[Surface], iterations: int = 40) -> Similarity:
    """The similarity that brings reconstructed surfaces (of all frames together) closest to the true ones.

    Iterated closest points in both directions with the closed form of Umeyama (1991), from the identity. It looks at
    the truth, so figures after it say what a reconstruction would be worth with its pose known, and stand beside the
    others, never in their place.
    """
    found = Similarity(1.0, np.eye(3), np.zeros(3))
    trees = [cKDTree(surface.points) for surface in truth]
    some = [surface.points[:: max(len(surface.points) // 2000, 1)] for surface in made]
    for _ in range(iterations):
        sources, targets = [], []
        for points, true, tree in zip(some, truth, trees, strict=True):
            moved = found.points(points)
            targets += [true.points[tree.query(moved)[1]], true.points]
            sources += [points, points[cKDTree(moved).query(true.points)[1]]]
        found = umeyama(np.concatenate(sources), np.concatenate(targets))
    return found


def umeyama(source: Float[np.ndarray, "n 3"], target: Float[np.ndarray, "n 3"]) -> Similarity:
    """The similarity with the least squared distance between moved source and target points (Umeyama 1991)."""
    a, b = source - source.mean(0), target - target.mean(0)
    product = b.T @ a / len(a)
    rotation = nearest_rotation(product)
    scale = float((rotation * product).sum() / max((a**2).sum() / len(a), 1e-12))
    return Similarity(scale, rotation, target.mean(0) - scale * rotation @ source.mean(0))


def evaluate_geometry(
    field: AnimatedField,
    occupancy: Any,
    truth: Geometry,
    frame_times: Float[np.ndarray, " t"],
    to_source: Alignment,
    resolution: int | None = None,
    align: bool = False,
) -> dict[str, Any]:
    """Everything geometric, per frame and on average, in the case's world units.

    Figures of tracks are left out where the truth is of a single moment.

    Args:
        frame_times: all times of the run's clip, [0, 1]; tracks are followed through them.
        to_source: from the field's world to the case's.
        resolution: nodes of the marching-cubes grid along the box's side; `SURFACE_RESOLUTION` by default.
        align: also give every figure after `fitted_similarity`, as `aligned_...`, unless a surface is empty.
    """
    made = []
    for time in truth.times:
        surface = surface_at(field, occupancy, float(time), resolution or SURFACE_RESOLUTION)
        moment = to_source.at(float(time))
        made.append(Surface(moment.points(surface.points), moment.directions(surface.normals)))
    true = [Surface(points, normals) for points, normals in zip(truth.points, truth.normals, strict=True)]
    dense = np.union1d(np.round(frame_times, 9), np.round(truth.times, 9))
    at = [int(np.abs(dense - time).argmin()) for time in truth.times]

    def figures(extra: Similarity) -> dict[str, Any]:
        moved = [Surface(extra.points(one.points), extra.directions(one.normals)) for one in made]
        per_frame = [chamfer_and_friends(a, b) for a, b in zip(moved, true, strict=True)]
        mean = {name: float(np.mean([frame[name] for frame in per_frame])) for name in per_frame[0]}
        if len(truth.times) < 2:
            return {**mean, "per_frame": per_frame}
        moments = [extra.after(to_source.at(float(time))) for time in truth.times]
        start = moments[0].inverse().points(truth.tracks[0])
        carried = carried_tracks(field, start, float(truth.times[0]), dense)[at]
        moved_tracks = np.stack([moment.points(x) for moment, x in zip(moments, carried, strict=True)])
        return {**mean, **track_error(moved_tracks, truth.tracks), "per_frame": per_frame}

    result = {**figures(Similarity(1.0, np.eye(3), np.zeros(3))), "frame_indices": list(truth.frame_indices)}
    if align and all(len(surface.points) for surface in made):
        fitted = fitted_similarity(made, true)
        result |= {f"aligned_{name}": value for name, value in figures(fitted).items()}
        result["aligned_scale"] = fitted.scale
    return result
