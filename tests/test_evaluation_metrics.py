"""Every metric against a known answer and against a second implementation."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.metrics import peak_signal_noise_ratio

from sv4d_ns.evaluation import backbones, geometry, videos
from sv4d_ns.evaluation.alignment import Alignment, Similarity
from sv4d_ns.evaluation.cases import Geometry
from sv4d_ns.evaluation.command import text_table
from sv4d_ns.evaluation.frechet import bootstrap, frechet_distance, frechet_with_interval, mean_with_interval
from sv4d_ns.evaluation.report import geometry_table
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.metrics import images, lpips
from sv4d_ns.metrics.consistency import flicker, hull_agreement
from sv4d_ns.utils.errors import InputError


def pictures(seed: int, count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, 3, size, size))).float()


# ------------------------------------------------------------------------------------------------------------- pictures


def test_psnr_of_a_constant_shift_and_of_identical_pictures() -> None:
    a = torch.full((2, 3, 16, 16), 0.5)
    assert images.psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert images.psnr(a, a) == pytest.approx(images.IDENTICAL_DB)


def second_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 by scipy's Gaussian filter on mirrored borders, meaned over pixels and channels."""

    def local(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, (0, 1.5, 1.5), truncate=3.5, mode="mirror")

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    both = local(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return float((luminance * (2 * both + 9e-4) / (var_a + var_b + 9e-4)).mean())


def test_psnr_and_ssim_agree_with_other_implementations() -> None:
    a, b = pictures(0), pictures(1) * 0.3 + pictures(0) * 0.7
    for i in range(len(a)):
        first, second = a[i].double().numpy(), b[i].double().numpy()
        assert images.psnr(a, b)[i] == pytest.approx(peak_signal_noise_ratio(first, second, data_range=1), abs=1e-3)
        assert images.ssim(a, b)[i] == pytest.approx(second_ssim(first, second), abs=1e-4)
    assert images.ssim(a, a) == pytest.approx(1.0)


def test_silhouette_overlap_of_shifted_squares_and_of_nothing() -> None:
    a, b = np.zeros((2, 10, 10), np.uint8), np.zeros((2, 10, 10), np.uint8)
    a[0, 2:6, 2:6], b[0, 2:6, 4:8] = 255, 128
    assert images.silhouette_iou(a, b).tolist() == [8 / 24, 1.0]
    b[1, 0, 0] = 255
    assert images.silhouette_iou(a, b)[1] == 0.0
    assert images.silhouette_iou(np.full_like(a, 127), a)[0] == 0.0, "below one half is outside"


def test_the_box_holds_the_object_of_all_frames_and_fits_the_window_of_ssim() -> None:
    alpha = np.zeros((2, 40, 40), np.uint8)
    alpha[0, 10:12, 20], alpha[1, 14, 30] = 255, 255
    rows, columns = images.opaque_box(alpha, margin=0)
    assert rows.start <= 10 and rows.stop >= 15 and rows.stop - rows.start >= 11
    assert (columns.start, columns.stop) == (20, 31)
    assert images.opaque_box(np.zeros_like(alpha)) == (slice(0, 40), slice(0, 40))
    corner = np.zeros((1, 40, 40), np.uint8)
    corner[0, 0, 39] = 255
    box = images.opaque_box(corner)
    a, b = (pictures(seed, size=40)[..., box[0], box[1]] for seed in (4, 5))
    assert a.shape[-2:] == (6, 6) and images.ssim(a, b) == pytest.approx(images.ssim(b, a))


# --------------------------------------------------------------------------------------------------------------- videos


def labelled(frames: int, views: int) -> np.ndarray:
    """A matrix whose images say where they stand: 100 * frame + view."""
    return 100 * np.arange(frames)[:, None] + np.arange(views)


def test_which_images_form_which_video() -> None:
    matrix = labelled(3, 4)
    assert videos.videos(matrix, "f").tolist() == [[0, 100, 200], [1, 101, 201], [2, 102, 202], [3, 103, 203]]
    assert videos.videos(matrix, "v").tolist() == [[0, 1, 2, 3], [100, 101, 102, 103], [200, 201, 202, 203]]
    assert videos.videos(matrix, "diag").tolist() == [[0, 101, 202], [1, 102, 203], [2, 103, 200], [3, 100, 201]]
    assert videos.videos(matrix, "4d").tolist() == [[0, 100, 200, 201, 101, 1, 2, 102, 202, 203, 103, 3]]


@pytest.mark.parametrize(("frames", "views"), [(21, 8), (5, 21), (1, 3), (4, 1)])
def test_every_order_visits_the_matrix_evenly_and_zig_zag_moves_one_step_at_a_time(frames: int, views: int) -> None:
    matrix = labelled(frames, views)
    for order in videos.ORDERS:
        seen = videos.videos(matrix, order)
        expected = frames * views if order != "diag" else views * frames
        assert seen.size == expected and len(np.unique(seen)) == expected
    walk = videos.zig_zag(frames, views)[0]
    assert (np.abs(np.diff(walk, axis=0)).sum(-1) == 1).all()


def test_similarity_of_embeddings() -> None:
    turned = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert videos.paired_similarity(turned, np.array([[2.0, 0.0]] * 3)) == pytest.approx([1.0, 0.0, np.sqrt(0.5)])
    sequence = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[:, None]
    assert videos.frame_similarity(sequence) == pytest.approx([np.sqrt(0.5)])
    assert videos.frame_similarity(sequence[:1]).tolist() == [1.0]
    other = torch.nn.functional.cosine_similarity(torch.tensor(sequence[1:, 0]), torch.tensor(sequence[:-1, 0]))
    assert videos.frame_similarity(sequence)[0] == pytest.approx(float(other.mean()))


# -------------------------------------------------------------------------------------------------------------- Fréchet


def second_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the matrix square root of scipy, as FID and FVD are usually written."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(first @ second)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * np.real(root)))


def third_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By symmetric eigenvalues: tr (C1 C2)^(1/2) = sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2)."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    between = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * between)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 8), (200, 300, 16), (7, 9, 20)])
def test_the_frechet_distance_agrees_with_two_other_implementations(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, d)), rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 0.3
    assert frechet_distance(a, b) == pytest.approx(third_frechet(a, b), rel=1e-6)
    if min(n, m) > d:  # the matrix root of a singular product is not defined well enough to compare with
        assert frechet_distance(a, b) == pytest.approx(second_frechet(a, b), rel=1e-6)


def test_frechet_distances_with_closed_forms() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 6))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-12), "a set has no order"
    shift = np.arange(6.0)
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-10), "equal covariances"
    centred = a - a.mean(0)
    spread = float(np.cov(centred, rowvar=False).trace())
    # tr(C + 4C - 2 (4 C^2)^(1/2)) = tr C
    assert frechet_distance(centred, 2 * centred) == pytest.approx(spread, rel=1e-10)
    assert frechet_distance(a[:1], a[1:2]) == pytest.approx(((a[0] - a[1]) ** 2).sum()), "one feature a side"
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(a, a[:, :3])


def test_intervals_cover_the_mean_and_say_what_they_rest_on() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(40):
        estimate = mean_with_interval(rng.normal(3.0, 1.0, 30), seed=trial)
        covered += estimate.low <= 3.0 <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high and estimate.units == 30
    assert covered >= 32
    # the bootstrap's standard error of a mean is the sample's over root n
    values = rng.normal(size=100)
    drawn = mean_with_interval(values)
    assert drawn.high - drawn.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    alone = bootstrap(lambda index: 7.0, 1)
    assert (alone.low, alone.value, alone.high) == (7.0, 7.0, 7.0) and "one unit" in alone.note


def test_tiny_samples_of_videos_are_flagged() -> None:
    rng = np.random.default_rng(2)
    few = frechet_with_interval(rng.normal(size=(6, 10)), rng.normal(size=(6, 10)))
    many = frechet_with_interval(rng.normal(size=(60, 10)), rng.normal(size=(60, 10)))
    one = frechet_with_interval(rng.normal(size=(1, 10)), rng.normal(size=(1, 10)))
    assert "tiny sample: 6 videos" in few.note and not many.note and "one video" in one.note
    assert few.value > many.value, "the bias the note speaks of"


# -------------------------------------------------------------------------------------------------------- without truth


def grey_video(levels: list[float], size: int = 8) -> np.ndarray:
    video = np.full((len(levels), 1, size, size, 4), 255, np.uint8)
    video[..., :3] = np.round(255 * np.array(levels)).astype(np.uint8)[:, None, None, None, None]
    return video


def test_flicker_of_still_fading_and_alternating_videos() -> None:
    assert flicker(grey_video([0.4] * 5))[0] == 0.0
    assert flicker(grey_video([0.0, 0.2, 0.4, 0.6]))[0] == pytest.approx(0.0, abs=1e-6), "an even fade does not flicker"
    assert flicker(grey_video([0.2, 0.6] * 3))[0] == pytest.approx(0.4, abs=1e-6)
    assert flicker(grey_video([0.2, 0.6]))[0] == 0.0
    noise = np.random.default_rng(0).integers(0, 255, (4, 2, 6, 6, 4)).astype(np.uint8)
    noise[..., 3] = 255
    second = []  # the same by a plain loop
    for view in range(2):
        frames = noise[:, view, ..., :3].astype(float) / 255
        second.append(np.mean([np.abs(frames[t - 1] - 2 * frames[t] + frames[t + 1]).mean() / 2 for t in (1, 2)]))
    assert flicker(noise) == pytest.approx(second, abs=1e-6)


def ball_silhouettes(centres: np.ndarray, radius: float, c2w: np.ndarray, focal: float, size: int) -> np.ndarray:
    """Exact silhouettes of a ball, one centre a view."""
    out = []
    for centre, matrix in zip(centres, c2w, strict=True):
        xy = (np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1) + 0.5 - size / 2) / focal
        rays = np.stack([xy[..., 0], -xy[..., 1], -np.ones((size, size))], -1)
        rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True) @ matrix[:3, :3].T
        to_centre = centre - matrix[:3, 3]
        miss = np.linalg.norm(np.cross(rays, to_centre), axis=-1)
        out.append(np.where(miss <= radius, 255, 0))
    return np.stack(out).astype(np.uint8)


def test_a_hull_explains_the_silhouettes_of_one_ball_and_not_a_shifted_one() -> None:
    c2w = look_at_cameras(np.array([0.0, 60, 120, 180, 240, 300]), np.zeros(6))
    focal, size = 1.64 * 64, 64
    true = np.zeros((6, 3))
    alike = hull_agreement(ball_silhouettes(true, 0.3, c2w, focal, size), c2w, focal)
    assert alike.min() > 0.99
    shifted = true.copy()
    shifted[2] = [0.0, 0.0, 0.25]  # one view shows the ball higher
    wrong = hull_agreement(ball_silhouettes(shifted, 0.3, c2w, focal, size), c2w, focal)
    # what is left is the part of a disc that a disc a quarter higher leaves uncovered, in all views alike
    assert wrong.max() < 0.75
    empty = np.zeros((6, size, size), np.uint8)
    assert hull_agreement(empty, c2w, focal).tolist() == [1.0] * 6
    # a view without the object leaves nothing for the others, and is none of theirs
    missing = ball_silhouettes(true, 0.3, c2w, focal, size)
    missing[3] = 0
    assert hull_agreement(missing, c2w, focal).tolist() == [0.0] * 6


# ------------------------------------------------------------------------------------------------------------- geometry


def ball(radius: float, count: int, seed: int) -> geometry.Surface:
    normals = np.random.default_rng(seed).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return geometry.Surface(radius * normals, normals)


def test_distances_of_concentric_balls() -> None:
    result = geometry.chamfer_and_friends(ball(0.33, 20_000, 0), ball(0.3, 20_000, 1))
    assert result["completeness"] == pytest.approx(0.03, rel=0.05)
    assert result["accuracy"] == pytest.approx(0.03, rel=0.05)
    assert result["chamfer"] == pytest.approx(0.5 * (result["accuracy"] + result["completeness"]))
    assert result["f_score@0.01"] == 0.0 and result["f_score@0.02"] == 0.0
    assert result["normal_consistency"] > 0.99
    same = geometry.chamfer_and_friends(ball(0.3, 20_000, 0), ball(0.3, 4096, 1))
    # a perfect surface is as far from the true samples as these are from each other
    assert same["accuracy"] == pytest.approx(2 * same["chamfer_floor"], rel=0.1)
    assert same["chamfer_floor"] == pytest.approx(0.5 * 0.5 * np.sqrt(4 * np.pi * 0.3**2 / 4096), rel=0.1)
    assert same["f_score@0.02"] > 0.99


def test_no_surface_is_worse_than_any() -> None:
    nothing = geometry.Surface(np.zeros((0, 3)), np.zeros((0, 3)))
    result = geometry.chamfer_and_friends(nothing, ball(0.3, 100, 1))
    assert result["chamfer"] == geometry.EMPTY_DISTANCE and result["f_score@0.02"] == 0 == result["normal_consistency"]


def test_surface_distances_agree_with_all_pairs() -> None:
    rng = np.random.default_rng(3)
    a, b = (geometry.Surface(rng.random((40, 3)), videos.unit(rng.normal(size=(40, 3)))) for _ in range(2))
    result, pairs = geometry.chamfer_and_friends(a, b), cdist(a.points, b.points)
    assert result["accuracy"] == pytest.approx(pairs.min(1).mean())
    assert result["completeness"] == pytest.approx(pairs.min(0).mean())
    precision, recall = (pairs.min(1) <= 0.02).mean(), (pairs.min(0) <= 0.02).mean()
    expected = 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
    assert result["f_score@0.02"] == pytest.approx(expected)
    facing = np.abs((a.normals[:, None] * b.normals[None]).sum(-1))
    to_b = facing[np.arange(40), pairs.argmin(1)].mean()
    to_a = facing[pairs.argmin(0), np.arange(40)].mean()
    assert result["normal_consistency"] == pytest.approx(0.5 * (to_a + to_b))


def test_a_known_similarity_is_found_again() -> None:
    rng = np.random.default_rng(5)
    direction = ball(1.0, 1200, 6).points
    shape = direction * [0.4, 0.25, 0.1] + 0.1 * direction[:, :1] ** 2 * [0.0, 0.5, 1.0]  # no two sides alike
    turn = np.deg2rad(8.0)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]])
    true = Similarity(1.1, rotation, np.array([0.03, -0.02, 0.01]))
    exact = geometry.umeyama(shape, true.points(shape))
    assert exact.scale == pytest.approx(1.1) and exact.rotation == pytest.approx(rotation)
    made = geometry.Surface(shape, direction)
    shuffled = geometry.Surface(true.points(shape)[rng.permutation(len(shape))], direction)
    found = geometry.fitted_similarity([made], [shuffled])
    assert found.scale == pytest.approx(1.1, abs=0.01) and found.rotation == pytest.approx(rotation, abs=0.02)
    assert found.points(shape) == pytest.approx(true.points(shape), abs=0.01)


class StretchingField:
    """A ball of radius 0.3 around a centre that moves and breathes: canonical = (x - shift t) / (1 + t / 2)."""

    def __init__(self) -> None:
        self.aabb = torch.tensor([[-0.57] * 3, [0.57] * 3])
        self.shift = torch.tensor([0.08, -0.05, 0.04])

    def canonical(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x - self.shift * t) / (1 + 0.3 * t)

    def deformation(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.canonical(x, t) - x

    def density(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 150 * torch.sigmoid((0.3 - self.canonical(x, t).norm(dim=-1)) / 0.001)

    def moved(self, canonical: np.ndarray, t: float) -> np.ndarray:
        return canonical * (1 + 0.3 * t) + self.shift.numpy() * t


class Everywhere:
    def is_occupied(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(x), dtype=torch.bool)


def test_surface_and_tracks_of_a_field_with_known_motion() -> None:
    field, times = StretchingField(), np.linspace(0, 1, 6)
    start = ball(0.3, 50, 4)
    tracks = np.stack([field.moved(start.points, t) for t in times])
    carried = geometry.carried_tracks(field, tracks[0], 0.0, times)  # type: ignore[arg-type]
    perfect = geometry.track_error(carried, tracks)
    assert perfect["track"] == pytest.approx(0.0, abs=1e-3)
    late = geometry.carried_tracks(field, tracks[2], times[2], times)  # type: ignore[arg-type]
    assert np.abs(late - tracks).max() < 1e-3, "the start may be at any time"
    astray = geometry.track_error(carried + np.array([0.03, 0.0, 0.04]), tracks)
    assert astray["track"] == pytest.approx(0.05, abs=1e-3)
    assert perfect["track_if_static"] == pytest.approx(
        np.mean([np.linalg.norm(tracks[i] - tracks[0], axis=-1).mean() for i in range(1, 6)])
    )
    surface = geometry.surface_at(field, Everywhere(), 1.0, resolution=64)  # type: ignore[arg-type]
    centred = surface.points - field.shift.numpy()
    # within half a cell of 0.018
    assert np.linalg.norm(centred, axis=-1).mean() == pytest.approx(0.39, abs=0.009)
    assert (videos.unit(centred) * surface.normals).sum(-1).mean() > 0.98


def test_truth_at_a_single_moment_has_no_tracks() -> None:
    field, true = StretchingField(), ball(0.3, 200, 4)
    truth = Geometry(np.zeros(1), (0,), true.points[None], true.normals[None], true.points[None, :5])
    world = Alignment((Similarity(1.0, np.eye(3), np.zeros(3)),))
    figures = geometry.evaluate_geometry(field, Everywhere(), truth, np.linspace(0, 1, 3), world, 32)  # type: ignore[arg-type]
    assert figures["chamfer"] < 0.1 and not [name for name in figures if name.startswith("track")]
    report = {"protocol": "benchmark", "candidates": [{"summary": {}, "geometry": {"a case": figures}}]}
    assert "normal_consistency" in text_table(report) and "track" not in text_table(report)
    assert geometry_table(report).count("<td class='n'>-</td>") == 2


# ------------------------------------------------------------------------------------------------------------- networks


def random_lpips(net: lpips.LpipsNet) -> lpips.Lpips:
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    torch.manual_seed(0)
    return lpips.Lpips(_NoTrainLpips(net=net, pnet_rand=True), lpips.Identity("random", "test", {}))


def test_lpips_of_a_random_backbone_agrees_with_its_formula() -> None:
    lpips = random_lpips("alex")
    a, b = pictures(0, 2, 64), pictures(1, 2, 64)
    assert lpips.distance(a, a) == pytest.approx([0.0, 0.0], abs=1e-6)
    made = lpips.distance(a, b)
    network = lpips.net
    scale, shift = torch.tensor([0.458, 0.448, 0.450]), torch.tensor([-0.030, -0.088, -0.188])
    with torch.no_grad():
        taps = [network.net((2 * x - 1 - shift[:, None, None]) / scale[:, None, None]) for x in (a, b)]
        total = torch.zeros(2)
        for first, second, head in zip(*taps, network.lins, strict=True):
            unit = [x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for x in (first, second)]
            weights = head.model[-1].weight.reshape(-1)
            total += ((unit[0] - unit[1]) ** 2 * weights[:, None, None]).sum(1).mean((1, 2))
    assert made == pytest.approx(total.numpy(), rel=1e-3)


def tiny_clip(folder: Path) -> Path:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=32,
        projection_dim=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def test_clip_embeds_through_the_models_own_preprocessing(tmp_path: Path) -> None:
    clip = backbones.open_clip(tiny_clip(tmp_path), "tiny", "test")
    a = pictures(5, 3, 48)
    embedded = clip.embed(a)
    assert embedded.shape == (3, 8)
    assert clip.identity.files["model.safetensors"] == lpips.sha256(tmp_path / "model.safetensors")
    resized = torch.nn.functional.interpolate((a * 255).round() / 255, (224, 224), mode="bicubic", antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        second = clip.model(pixel_values=(resized.clamp(0, 1) - mean) / std).image_embeds.numpy()
    assert videos.paired_similarity(embedded, second) == pytest.approx([1.0] * 3, abs=1e-3)


class SmallI3D(torch.nn.Module):
    """The call of the TorchScript I3D: flags for rescaling, resizing and features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 12, (3, 8, 8), stride=(2, 8, 8))

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("the package prepares the pictures itself")
        if x.shape[1] != 3 or x.shape[3] != 224 or float(x.min()) < -1.01:
            raise RuntimeError("pictures in [-1, 1] of 224 pixels are expected")
        return self.conv(x).mean(dim=[2, 3, 4])


def saved_i3d(path: Path) -> Path:
    torch.manual_seed(0)
    torch.jit.script(SmallI3D()).save(str(path))
    return path


def test_i3d_is_opened_only_when_its_hash_is_trusted(tmp_path: Path) -> None:
    path = saved_i3d(tmp_path / "i3d.pt")
    digest = lpips.sha256(path)
    with pytest.raises(InputError, match=f"i3d.pt has the sha256 {digest}"):
        backbones.load_i3d(path)
    with pytest.raises(InputError, match="not opened"):
        backbones.load_i3d(path, "0" * 64)
    with pytest.raises(InputError, match=r"nowhere\.pt does not exist") as caught:
        backbones.load_i3d(tmp_path / "nowhere.pt")
    assert not isinstance(caught.value, lpips.BackboneMissing), "a path that was given is not silently left out"
    network = backbones.load_i3d(path, digest.upper())
    video = torch.rand(2, 10, 3, 32, 32)
    features = network.features(video)
    assert features.shape == (2, 12) and network.identity.files == {"i3d.pt": digest}
    assert network.features(video[1:])[0] == pytest.approx(features[1], abs=1e-5), "videos do not see each other"
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a program")
    with pytest.raises(InputError, match="not a TorchScript file"):
        backbones.load_i3d(junk, lpips.sha256(junk))


def test_random_video_features_see_flicker_and_repeat_exactly() -> None:
    torch.manual_seed(3)
    still = torch.rand(1, 1, 3, 32, 32).repeat(1, 6, 1, 1, 1)
    noisy = (still + 0.3 * torch.randn_like(still)).clamp(0, 1)
    slightly = (still + 0.02 * torch.randn_like(still)).clamp(0, 1)
    first, second = backbones.RandomVideoFeatures(), backbones.RandomVideoFeatures()
    features = [first.features(video) for video in (still, slightly, noisy)]
    assert (second.features(still) == features[0]).all()
    assert 0 < frechet_distance(features[0], features[1]) < frechet_distance(features[0], features[2])


def test_missing_networks_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(lpips, "packaged_file", lambda net: None)
    with pytest.raises(
        lpips.BackboneMissing, match=r"LPIPS \(alex\) needs its network: .* downloads alexnet-owt-7be5be79.pth"
    ):
        lpips.load_lpips("alex")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"half a download")
    with pytest.raises(InputError, match="is damaged"):
        lpips.load_lpips("alex")
