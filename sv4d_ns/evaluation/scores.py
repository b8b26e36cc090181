"""All metrics of picture matrices: the library behind `sv4d evaluate`.

`Pictures` are the views of one object, made and true; `picture_figures` measures every picture, `summarise` makes the
table with what each figure rests on, `video_figures` the Fréchet distances over all objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.evaluation.backbones import Clip, RandomVideoFeatures, VideoFeatures
from sv4d_ns.evaluation.frechet import Estimate, frechet_distance, frechet_with_interval, mean_with_interval
from sv4d_ns.evaluation.protocols import Protocol
from sv4d_ns.evaluation.videos import ORDERS, frame_similarity, paired_similarity, videos
from sv4d_ns.metrics.consistency import flicker, hull_agreement
from sv4d_ns.metrics.images import on_white, opaque_box, psnr, silhouette_iou, ssim
from sv4d_ns.metrics.lpips import BackboneMissing, Identity, Lpips, lpips_at_hand
from sv4d_ns.utils.callbacks import Progress


@dataclass(frozen=True, eq=False)
class Pictures:
    """The novel views of one object at one size, sRGB with straight alpha; `truth` is None where there is none."""

    name: str
    made: UInt8[np.ndarray, "t v s s 4"]
    truth: UInt8[np.ndarray, "t v s s 4"] | None
    view_names: tuple[str, ...]
    azimuths_deg: Float[np.ndarray, " v"]
    """Relative to the input view."""
    elevations_deg: Float[np.ndarray, " v"]
    """Relative to the input view."""
    times: Float[np.ndarray, " t"]
    c2w: Float[np.ndarray, "*t v 4 4"]
    """Cameras that see the made views, in the world whose box is [-0.57, 0.57]^3; of each frame where they move."""
    focal_px: float
    """At this size."""

    def columns(self, index: Sequence[int]) -> "Pictures":
        """Some views."""
        chosen = list(index)
        return replace(
            self,
            made=self.made[:, chosen],
            truth=None if self.truth is None else self.truth[:, chosen],
            view_names=tuple(self.view_names[view] for view in chosen),
            azimuths_deg=self.azimuths_deg[chosen],
            elevations_deg=self.elevations_deg[chosen],
            c2w=self.c2w[..., chosen, :, :],
        )

    @property
    def ring(self) -> list[int]:
        """The views at the input's elevation, by azimuth: the columns of the image matrix."""
        level = np.flatnonzero(np.abs(self.elevations_deg) < 0.5)
        return [int(view) for view in level[np.argsort(self.azimuths_deg[level] % 360.0)]]


@dataclass
class Backbones:
    """The networks at hand; `missing` says, metric by metric, why one is not."""

    lpips: dict[str, Lpips] = field(default_factory=dict)
    clip: Clip | None = None
    videos: list[VideoFeatures] = field(default_factory=lambda: [RandomVideoFeatures()])
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def identities(self) -> list[Identity]:
        """What was looked through."""
        networks: list[Lpips | Clip | VideoFeatures] = [*self.lpips.values(), *self.videos]
        networks += [self.clip] if self.clip else []
        return [network.identity for network in networks]


def load_backbones(
    protocol: Protocol, fetch: bool = False, i3d: Path | None = None, i3d_sha256: str | None = None
) -> Backbones:
    """The networks of a protocol that are on this machine (or fetched); the others are noted, not fatal.

    Raises:
        InputError: a file is there but is damaged or not the trusted one.
    """
    from sv4d_ns.evaluation.backbones import load_clip, load_i3d
    from sv4d_ns.metrics.lpips import load_lpips

    found = Backbones()
    for net in protocol.lpips:
        try:
            found.lpips[net] = load_lpips(net, fetch)
        except BackboneMissing as error:
            found.missing[f"lpips_{net}"] = str(error)
    try:
        found.clip = load_clip(fetch)
    except BackboneMissing as error:
        found.missing["clip_s, clip_c"] = str(error)
    try:
        found.videos.insert(0, load_i3d(i3d, i3d_sha256, fetch))
    except BackboneMissing as error:
        found.missing["fvd_f, fvd_v, fvd_diag, fvd_4d"] = str(error)
    return found


def nerfstudio_metrics(made: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"]) -> dict[str, float]:
    """What `ns-eval` averages: psnr, ssim and, where its weights are at hand, lpips of one picture in [0, 1]."""
    a, b = (picture.detach().clamp(0, 1).movedim(-1, 0)[None].cpu() for picture in (made, truth))
    metrics = {"psnr": float(psnr(a, b)[0]), "ssim": float(ssim(a, b)[0])}
    lpips = lpips_at_hand()
    if lpips is not None and lpips.can_judge(a):
        metrics["lpips"] = float(lpips.distance(a, b)[0])
    return metrics


Figures = dict[str, Float[np.ndarray, "t v"]]
"""Metric: its value for every picture; metrics of whole videos are repeated over time."""


def picture_figures(pictures: Pictures, backbones: Backbones, progress: Progress | None = None) -> Figures:
    """Every picture metric that can be had: against truth where there is one, and flicker and hull without.

    `progress` is called with the views compared and their number.
    """
    frames, views = pictures.made.shape[:2]
    figures: Figures = {
        "flicker": np.broadcast_to(flicker(pictures.made), (frames, views)),
        "hull": _hull(pictures, pictures.made),
    }
    if backbones.clip is not None:
        made_embeddings = _embed(backbones.clip, pictures.made)
        figures["clip_c"] = np.broadcast_to(frame_similarity(made_embeddings), (frames, views))
    if pictures.truth is None:
        return figures
    figures["flicker_truth"] = np.broadcast_to(flicker(pictures.truth), (frames, views))
    for view in range(views):
        for name, values in pair_figures(pictures.made[:, view], pictures.truth[:, view], backbones).items():
            figures.setdefault(name, np.empty((frames, views)))[:, view] = values
        if progress is not None:
            progress(view + 1, views)
    if backbones.clip is not None:
        figures["clip_s"] = paired_similarity(made_embeddings, _embed(backbones.clip, pictures.truth))
    return figures


def pair_figures(
    made: UInt8[np.ndarray, "t s s 4"], truth: UInt8[np.ndarray, "t s s 4"], backbones: Backbones
) -> dict[str, Float[np.ndarray, " t"]]:
    """PSNR, SSIM (both also in the box, and the box's D-SSIM), silhouette IoU and LPIPS of one view's pictures."""
    a, b = on_white(made), on_white(truth)
    rows, columns = opaque_box(truth[..., 3])
    a_box, b_box = a[..., rows, columns], b[..., rows, columns]
    in_box = ssim(a_box, b_box)
    figures = {
        "psnr": psnr(a, b),
        "psnr_box": psnr(a_box, b_box),
        "ssim": ssim(a, b),
        "ssim_box": in_box,
        "dssim_box": (1.0 - in_box) / 2.0,
        "iou": silhouette_iou(made[..., 3], truth[..., 3]),
    }
    for net, network in backbones.lpips.items():
        if network.can_judge(a):
            figures[f"lpips_{net}"] = network.distance(a, b)
    return figures


def _hull(pictures: Pictures, rgba: UInt8[np.ndarray, "t v s s 4"]) -> Float[np.ndarray, "t v"]:
    cameras = np.broadcast_to(pictures.c2w, (*rgba.shape[:2], 4, 4))
    moments = zip(rgba, cameras, strict=True)
    return np.stack([hull_agreement(frame[..., 3], c2w, pictures.focal_px) for frame, c2w in moments])


def _embed(clip: Clip, rgba: UInt8[np.ndarray, "t v s s 4"]) -> Float[np.ndarray, "t v d"]:
    flat = clip.embed(on_white(rgba.reshape(-1, *rgba.shape[2:])))
    return flat.reshape(*rgba.shape[:2], -1)


def summarise(figures: Sequence[Figures]) -> dict[str, Estimate]:
    """Each metric's mean over all objects' pictures; a view of an object, meaned over time, is the unit resampled."""
    names = [name for name in figures[0] if all(name in other for other in figures)]
    return {
        name: mean_with_interval(np.concatenate([np.asarray(of[name]).mean(0) for of in figures])) for name in names
    }


def video_figures(objects: Sequence[Pictures], backbones: Backbones, protocol: Protocol) -> dict[str, Estimate]:
    """FVD-F, FVD-V, FVD-Diag and FV4D of the image matrices (`fvd_f`, ..., `fvd_4d`) and their stand-ins (`rfd_*`).

    Metrics whose videos are too short for a network are left out, with the reason in `backbones.missing`.
    """
    results: dict[str, Estimate] = {}
    judged = [one for one in objects if one.truth is not None and one.ring]
    if not judged:
        return results
    for network in backbones.videos:
        for order in ORDERS:
            name = f"{network.prefix}_{order}"
            pairs = [_features_of(one, order, network) for one in judged]
            if any(pair is None for pair in pairs):
                backbones.missing[name] = (
                    f"{name}: its videos are shorter than the {network.min_frames} images {network.identity.name} "
                    "needs: use more frames or views."
                )
                continue
            made = np.concatenate([pair[0] for pair in pairs if pair is not None])
            truth = np.concatenate([pair[1] for pair in pairs if pair is not None])
            results[name] = _distance(made, truth, protocol.fvd_of_each_video)
    return results


def _distance(made: Float[np.ndarray, "n d"], truth: Float[np.ndarray, "n d"], of_each_video: bool) -> Estimate:
    if not of_each_video:
        return frechet_with_interval(made, truth)
    single = np.array([frechet_distance(a[None], b[None]) for a, b in zip(made, truth, strict=True)])
    mean = mean_with_interval(single)
    note = "one video a side at a time: squared distances of features, meaned; no distribution is compared"
    return Estimate(mean.value, mean.low, mean.high, mean.units, note)


def _features_of(
    pictures: Pictures, order: str, network: VideoFeatures
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]] | None:
    """Made and true features of an object's videos in one order, or None if they are too short."""
    assert pictures.truth is not None
    pair = []
    for rgba in (pictures.made, pictures.truth):
        matrix = rgba[:, pictures.ring]
        read = videos(matrix, order)
        if read.shape[1] < network.min_frames:
            return None
        clips = [on_white(video) for video in read]
        pair.append(network.features(torch.stack(clips)))
    return pair[0], pair[1]
