"""Videos longer (or shorter) than the network's window, and more views than one call makes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.diffusion.attention import CameraAttention, MultiViewTransformer
from sv4d_ns.diffusion.conditioning import camera_angles
from sv4d_ns.diffusion.drift import BoundaryDrift, boundary_drift
from sv4d_ns.diffusion.guidance import Guidance, GuidanceRule
from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.store import WindowStore, code_fingerprint, weights_fingerprint
from sv4d_ns.errors import InputError
from sv4d_ns.files import content_hash

# the store is used together with `generate_grid`
__all__ = [
    "Call",
    "GeneratedGrid",
    "GridOptions",
    "ViewReferences",
    "Window",
    "WindowStore",
    "WindowStride",
    "generate_grid",
    "plan_calls",
    "plan_windows",
]


class WindowStride(str, Enum):
    """How far apart the windows of a long video start (T frames each).

    FIXED: T-1, so that each window is anchored in the last frame of the one before; the last one is moved back to end
        with the video. No window twice, no frame dropped, videos shorter than T padded.
    RELEASED_T: T, as the first release of the 4-view script; its second window has no anchor from 2T frames on.
    RELEASED_T_MINUS_1: T-1, as the corrected 4-view script; repeats the last window where it already ends with the
        video.
    RELEASED_FULL_WINDOWS: T-1, as the 8-view script; frames after the last full window are not generated.
    """

    FIXED = "fixed"
    RELEASED_T = "released_t"
    RELEASED_T_MINUS_1 = "released_t_minus_1"
    RELEASED_FULL_WINDOWS = "released_full_windows"


@dataclass(frozen=True)
class Window:
    """One run of the network.

    Attributes:
        frames: the video frame of each of its T positions (the last frame repeats where the video is too short).
        anchor: index of the earlier window whose views of `frames[0]` this one is given, or None.
    """

    frames: tuple[int, ...]
    anchor: int | None

    @property
    def start(self) -> int:
        """Its first frame."""
        return self.frames[0]


def plan_windows(n_frames: int, window: int, stride_rule: WindowStride = WindowStride.FIXED) -> list[Window]:
    """The windows that cover a video, in the order in which they run; later ones overwrite earlier ones.

    Args:
        n_frames: of the video, at least 1.
        window: T, at least 2.
        stride_rule: see `WindowStride`.

    Raises:
        InputError: for lengths out of range, and where a released rule cannot process the video.
    """
    if n_frames < 1 or window < 2:
        raise InputError(f"A video of {n_frames} frames cannot be cut into windows of {window}; give 1+ and 2+ frames.")
    windows: list[Window] = []
    for start in _starts_of(n_frames, window, stride_rule):
        frames = tuple(min(frame, n_frames - 1) for frame in range(start, start + window))
        anchor = next((i for i in reversed(range(len(windows))) if start in windows[i].frames), None)
        if start > 0 and anchor is None:
            raise InputError(
                f"The window stride '{stride_rule.value}' leaves frame {start} of {n_frames} without an earlier view; "
                f"use '{WindowStride.FIXED.value}'."
            )
        # the first window is never anchored, not even where a released script runs it twice
        windows.append(Window(frames, anchor if start > 0 else None))
    return windows


def _starts_of(n: int, window: int, rule: WindowStride) -> list[int]:
    if rule is WindowStride.FIXED:
        return [0] if n <= window else [*range(0, n - window, window - 1), n - window]
    if rule is WindowStride.RELEASED_FULL_WINDOWS:
        return list(range(0, n - window + 1, window - 1))
    if n < window:
        raise InputError(
            f"The window stride '{rule.value}' needs at least {window} frames, the video has {n}; "
            f"use '{WindowStride.FIXED.value}'."
        )
    stride = window if rule is WindowStride.RELEASED_T else window - 1
    return [min(start, n - window) for start in range(0, n, stride)]


class ViewReferences(str, Enum):
    """What the calls of the first window know of each other, where a plan has more views than one call makes.

    In later windows every view is given its own picture of the window's first frame, so there is nothing to choose.

    INDEPENDENT: nothing. The views of a call lie all around the object, those of the next call between them.
    ANCHORED: the first call lies all around the object; each later one makes V - V/2 new views, neighbours of each
        other, beside V/2 finished views nearest to them, whose pictures of the first frame it is given as references.
        More calls for as many views.
    """

    INDEPENDENT = "independent"
    ANCHORED = "anchored"


@dataclass(frozen=True)
class Call:
    """One call of the network in a window.

    Attributes:
        views: the view of each of its V columns; a short call repeats its own.
        given: those among them that an earlier call of the window has made; they come as references.
    """

    views: tuple[int, ...]
    given: frozenset[int] = frozenset()

    @property
    def made(self) -> dict[int, int]:
        """The column of each view this call makes; of repeated views the first."""
        return {view: self.views.index(view) for view in self.views if view not in self.given}


def plan_calls(
    azimuths_deg: Sequence[float],
    elevations_deg: Sequence[float],
    views_per_call: int,
    references: ViewReferences = ViewReferences.INDEPENDENT,
) -> list[Call]:
    """Which views each call of the network makes, in the order in which the calls run.

    Inside a call views are in the order of their azimuths, as the models were trained.

    Args:
        azimuths_deg: of all views of the plan, any values.
        elevations_deg: of all views, strictly between -90 and 90.
        views_per_call: V.
        references: see `ViewReferences`; one view a call leaves no room for references.

    Raises:
        InputError: for fewer than one view, or lists of different length.
    """
    n = len(azimuths_deg)
    if n < 1 or n != len(elevations_deg):
        raise InputError("A view plan needs at least one view, and one elevation for each azimuth.")
    ring = sorted(range(n), key=lambda view: (azimuths_deg[view] % 360, elevations_deg[view]))
    count = -(-n // views_per_call)
    if count == 1 or views_per_call == 1 or references is ViewReferences.INDEPENDENT:
        around = [ring[first::count] for first in range(count)]
        return [Call(tuple(views[i % len(views)] for i in range(views_per_call))) for views in around]

    first = [ring[i * n // views_per_call] for i in range(views_per_call)]
    calls, known = [Call(tuple(first))], set(first)
    left = [view for view in ring if view not in known]
    angles = _angles_between(azimuths_deg, elevations_deg)
    new_per_call = views_per_call - views_per_call // 2
    for begin in range(0, len(left), new_per_call):
        new = left[begin : begin + new_per_call]
        anchors = _nearest(angles, new, known, views_per_call - len(new))
        calls.append(Call(tuple(sorted([*new, *anchors], key=ring.index)), frozenset(anchors)))
        known |= set(new)
    return calls


def _nearest(angles: Float[Tensor, "n n"], views: Sequence[int], known: set[int], count: int) -> list[int]:
    """Of the known views, first the nearest of each view in turn, then those nearest to any."""
    free, found = sorted(known), []
    for wanted in [[view] for view in views] + [list(views)] * count:
        if len(found) < count:
            found.append(min(free, key=lambda other: min(angles[view, other].item() for view in wanted)))
            free.remove(found[-1])
    return found


def _angles_between(azimuths_deg: Sequence[float], elevations_deg: Sequence[float]) -> Float[Tensor, "n n"]:
    """Angle at the object between every two views, radians."""
    polar, azimuth = camera_angles(azimuths_deg, elevations_deg)
    level = polar.sin()
    directions = torch.stack([level * azimuth.cos(), level * azimuth.sin(), polar.cos()], dim=-1)
    # rounded, so that of equally near views the first in the plan is taken
    return (directions @ directions.T).clamp(-1, 1).arccos().round(decimals=6)


@dataclass(frozen=True)
class GridOptions:
    """How a grid is generated, apart from what is in it. `docs/deviations.md` says what the releases do."""

    stride: WindowStride = WindowStride.FIXED
    """How far apart the windows of a long video start."""
    references: ViewReferences = ViewReferences.INDEPENDENT
    """What the calls of a window know of each other's views."""
    guidance: GuidanceRule = GuidanceRule.RELEASED
    """The shape of the guidance scale over the grid."""
    guidance_scale: float | None = None
    """The largest guidance scale; the model's own by default."""
    camera_attention: CameraAttention | None = None
    """Which tokens of different views attend to each other; as the model was made by default."""
    num_inference_steps: int | None = None
    """Denoising steps; the model's own number by default."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "GridOptions":
        """From plain values, the enums by their text; None is the default. Raises InputError for an unknown text."""
        kinds: dict[str, type[Enum]] = {
            "stride": WindowStride,
            "references": ViewReferences,
            "guidance": GuidanceRule,
            "camera_attention": CameraAttention,
        }
        given = {name: value for name, value in values.items() if value is not None}
        try:
            return cls(**{name: kinds[name](value) if name in kinds else value for name, value in given.items()})
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The views cannot be generated with {given} ({error}); see docs/deviations.md."
            ) from error


@dataclass(frozen=True, eq=False)
class GeneratedGrid:
    """What `generate_grid` made."""

    images: Float[Tensor, "n v c h w"]
    """In [0, 1] on the CPU, float32."""
    drift: tuple[BoundaryDrift, ...] = field(default=())
    """One for each window after the first that made frames again."""


@dataclass(frozen=True)
class _Run:
    """What every call of one `generate_grid` has in common."""

    pipeline: StableVideo4D2Pipeline
    seed: int
    strength: float
    steps: int | None
    guidance: Guidance
    store: WindowStore | None
    fingerprint: str

    def call(self, name: str, inputs: dict[str, Any], on_step: Callable[[int], None]) -> Float[Tensor, "t v c h w"]:
        """One call of the pipeline, from the store where it is there; its noise depends on the seed and name only."""
        key = self._key(name, inputs)
        if self.store is not None and (kept := self.store.load(name, key)) is not None:
            return kept
        generator = torch.Generator("cpu").manual_seed(int(content_hash([self.seed, name])[:15], 16))

        def count(_: Any, step: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(step + 1)
            return tensors

        output = self.pipeline(
            **inputs,
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance=self.guidance,
            generator=generator,
            callback_on_step_end=count,
            return_dict=False,
        )
        frames = torch.as_tensor(output[0]).float().cpu()
        if self.store is not None:
            self.store.save(name, key, frames)
        return frames

    def _key(self, name: str, inputs: dict[str, Any]) -> str:
        parts = [value.numpy() if isinstance(value, Tensor) else value for value in inputs.values()]
        settings = [name, self.seed, self.strength, self.steps, self.guidance.to_config(), list(inputs)]
        return content_hash(settings, self.fingerprint, *parts)


def generate_grid(
    pipeline: StableVideo4D2Pipeline,
    video: Float[Tensor, "n c h w"],
    azimuths_deg: Sequence[float],
    elevations_deg: Sequence[float],
    *,
    seed: int,
    store: WindowStore | None,
    on_progress: Callable[[int, int], None],
    initial_views: Float[Tensor, "n v c h w"] | None = None,
    strength: float = 1.0,
    options: GridOptions | None = None,
) -> GeneratedGrid:
    """All views of all frames, for any number of both.

    Windows follow `plan_windows` with the model's own T, calls `plan_calls` with its V. Every call of a window after
    the first is given its own views of the window's first frame, as the windows before made them.

    Args:
        pipeline: the model.
        video: frames in [0, 1] on the CPU; channels as the autoencoder has them.
        azimuths_deg: azimuth of each view relative to the input view.
        elevations_deg: elevation of each view relative to the input view.
        seed: of the noise; the result depends on it alone, not on whether windows came from the store.
        store: keeps finished windows, or None.
        on_progress: called as (denoising steps done, total), once at the start and after every step.
        initial_views: images in [0, 1] to start from (see `strength` of the pipeline).
        strength: share of the noise schedule that is run.
        options: the defaults of `GridOptions` where None.

    Raises:
        InputError: when an argument cannot be used, or the stride leaves frames without views.
    """
    options = options or GridOptions()
    windows = plan_windows(len(video), pipeline.config.num_frames, options.stride)
    _check_covered(windows, len(video), options.stride)
    guidance = options.guidance.applied_to(Guidance.from_config(pipeline.config.guidance), options.guidance_scale)
    plan = partial(plan_calls, azimuths_deg, elevations_deg, pipeline.config.num_views)
    # a window with an anchor has references for all its views: its calls need none of each other
    calls = [plan(options.references if window.anchor is None else ViewReferences.INDEPENDENT) for window in windows]
    per_call = pipeline.steps_to_run(options.num_inference_steps, strength)
    total, done = per_call * sum(map(len, calls)), 0
    made_until = 0
    drift: list[BoundaryDrift] = []
    grid: Tensor | None = None

    def report(before: int, steps: int) -> None:
        on_progress(before + steps, total)

    report(0, 0)
    with _quiet(pipeline), _camera_attention(pipeline, options.camera_attention):
        fingerprint = _fingerprint(pipeline) if store is not None else ""
        run = _Run(pipeline, seed, strength, options.num_inference_steps, guidance, store, fingerprint)
        for w, window in enumerate(windows):
            frames = list(window.frames)
            before = None if grid is None else grid[window.start : made_until].clone()
            for c, call in enumerate(calls[w]):
                columns = list(call.views)
                known = [window.anchor is not None or view in call.given for view in columns]
                inputs = {
                    "video": video[frames],
                    "azimuths_deg": [float(azimuths_deg[v]) for v in columns],
                    "elevations_deg": [float(elevations_deg[v]) for v in columns],
                    "reference_views": grid[window.start, columns] if grid is not None and any(known) else None,
                    "reference_known": known if any(known) else None,
                    "initial_views": None if initial_views is None else initial_views[frames][:, columns],
                }
                made = run.call(f"window{w:03d}_call{c:02d}", inputs, partial(report, done))
                done += per_call
                report(done, 0)
                if grid is None:
                    grid = made.new_zeros(len(video), len(azimuths_deg), *made.shape[2:])
                _place(grid, made, frames, call)
            assert grid is not None
            if before is not None and len(before):
                drift.append(boundary_drift(window.start, before, grid[window.start : made_until]))
            made_until = max(made_until, frames[-1] + 1)
    assert grid is not None
    return GeneratedGrid(grid, tuple(drift))


def _check_covered(windows: Sequence[Window], n_frames: int, stride: WindowStride) -> None:
    covered = {frame for window in windows for frame in window.frames}
    missing = sorted(set(range(n_frames)) - covered)
    if missing:
        raise InputError(
            f"The window stride '{stride.value}' makes no views of {len(missing)} of {n_frames} frames (from frame "
            f"{missing[0]}); use '{WindowStride.FIXED.value}', or cut the video there."
        )


def _place(grid: Tensor, made: Tensor, frames: Sequence[int], call: Call) -> None:
    """Copy a call's new images to their places; of repeated frames and views the first counts."""
    rows = {frame: frames.index(frame) for frame in frames}
    for frame, row in rows.items():
        for view, column in call.made.items():
            grid[frame, view] = made[row, column]


def _fingerprint(pipeline: StableVideo4D2Pipeline) -> str:
    """Hash of the model, its settings and the code: with the inputs of a call, everything that decides its result."""
    configs = [pipeline.config, pipeline.unet.config, pipeline.vae.config, pipeline.scheduler.config]
    settings = [{name: value for name, value in config.items() if not name.startswith("_")} for config in configs]
    weights = weights_fingerprint(pipeline.unet, pipeline.vae, pipeline.image_encoder)
    return content_hash(settings, weights, code_fingerprint())


@contextmanager
def _camera_attention(pipeline: StableVideo4D2Pipeline, kind: CameraAttention | None) -> Iterator[None]:
    """With another grouping of the network's camera blocks; no parameter depends on it."""
    before = CameraAttention(pipeline.unet.config.camera_attention)
    set_camera_attention(pipeline, kind or before)
    try:
        yield
    finally:
        set_camera_attention(pipeline, before)


def set_camera_attention(pipeline: StableVideo4D2Pipeline, kind: CameraAttention) -> None:
    """Group the tokens of the network's camera blocks as `kind` says, from now on."""
    for module in pipeline.unet.modules():
        if isinstance(module, MultiViewTransformer):
            module.camera_attention = kind
    pipeline.unet.register_to_config(camera_attention=kind.value)


@contextmanager
def _quiet(pipeline: StableVideo4D2Pipeline) -> Iterator[None]:
    """Without the pipeline's own bar: progress is reported through `on_progress`."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
