"""All views of all frames of a video, window by window and call by call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.diffusion.seams import BoundaryDrift, boundary_drift
from sv4d_ns.diffusion.sv4d.attention import CameraAttention, MultiViewTransformer
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceRule
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.windows import Call, ViewReferences, Window, WindowStride, plan_calls, plan_windows
from sv4d_ns.diffusion.window_store import WindowStore, code_fingerprint, weights_fingerprint
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import content_hash


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
            typed: dict[str, Any] = {
                name: kinds[name](value) if name in kinds else value for name, value in given.items()
            }
            return cls(**typed)
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
