"""Videos longer (or shorter) than the network's window, and more views than one call makes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline
from sv4d_ns.errors import InputError
from sv4d_ns.files import atomic_path, content_hash


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
        raise InputError(f"The window stride '{rule.value}' needs at least {window} frames, the video has {n}.")
    stride = window if rule is WindowStride.RELEASED_T else window - 1
    return [min(start, n - window) for start in range(0, n, stride)]


def plan_calls(n_views: int, views_per_call: int) -> list[list[int]]:
    """Which views each call of the network makes.

    The views are interleaved, so that every call sees the object from all around; short calls are padded by repeating
    their own views, and only the first of each repeated view is kept.

    Raises:
        InputError: for fewer than one view.
    """
    if n_views < 1:
        raise InputError("A view plan needs at least one view.")
    calls = -(-n_views // views_per_call)
    plans = [list(range(call, n_views, calls)) for call in range(calls)]
    return [[plan[i % len(plan)] for i in range(views_per_call)] for plan in plans]


class WindowStore:
    """Finished windows in a folder, so that a killed run goes on where it stopped.

    Each file carries a key of everything it was made from and a digest of its content; a file that does not match, or
    cannot be read, is made again.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, name: str, key: str) -> Tensor | None:
        """The tensor saved under the name and key, or None; says so where a file has to be made again."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata, tensor = file.metadata() or {}, file.get_tensor("frames")
        except (SafetensorError, OSError) as error:
            print(f"{path} cannot be read ({error}); it is generated again.")
            return None
        if metadata.get("digest") != content_hash(tensor.numpy()):
            print(f"{path} is damaged; it is generated again.")
            return None
        if metadata.get("key") != key:
            print(f"{path} was made from other inputs; it is generated again.")
            return None
        return tensor

    def save(self, name: str, key: str, frames: Tensor) -> None:
        """Keep a finished window."""
        frames = frames.contiguous()
        metadata = {"key": key, "digest": content_hash(frames.numpy())}
        with atomic_path(self._path(name)) as temporary:
            save_file({"frames": frames}, temporary, metadata=metadata)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@dataclass(frozen=True)
class _Run:
    """What every call of one `generate_grid` has in common."""

    pipeline: StableVideo4D2Pipeline
    seed: int
    strength: float
    steps: int | None
    model: str

    def call(
        self,
        name: str,
        inputs: dict[str, Any],
        store: WindowStore | None,
        on_step: Callable[[int], None],
    ) -> Float[Tensor, "t v c h w"]:
        """One call of the pipeline, from the store where it is there; its noise depends on the seed and name only."""
        key = self._key(name, inputs)
        if store is not None and (kept := store.load(name, key)) is not None:
            return kept
        generator = torch.Generator("cpu").manual_seed(int(content_hash([self.seed, name])[:15], 16))

        def count(_: Any, step: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(step + 1)
            return tensors

        output = self.pipeline(
            **inputs,
            strength=self.strength,
            num_inference_steps=self.steps,
            generator=generator,
            callback_on_step_end=count,
            return_dict=False,
        )
        frames = torch.as_tensor(output[0]).float().cpu()
        if store is not None:
            store.save(name, key, frames)
        return frames

    def _key(self, name: str, inputs: dict[str, Any]) -> str:
        parts = [value.numpy() if isinstance(value, Tensor) else value for value in inputs.values()]
        return content_hash([name, self.seed, self.strength, self.steps, self.model], *parts)


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
    num_inference_steps: int | None = None,
) -> Float[Tensor, "n v c h w"]:
    """All views of all frames, for any number of both.

    Windows follow `plan_windows` with the model's own T, calls `plan_calls` with its V. Windows after the first are
    given their call's earlier views of their first frame. Calls do not see each other's views.

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
        num_inference_steps: the model's own number by default.

    Returns:
        Views in [0, 1] on the CPU, float32.

    Raises:
        InputError: when an argument cannot be used.
    """
    windows = plan_windows(len(video), pipeline.config.num_frames)
    calls = plan_calls(len(azimuths_deg), pipeline.config.num_views)
    per_call = pipeline.steps_to_run(num_inference_steps, strength)
    total, done = per_call * len(windows) * len(calls), 0
    run = _Run(pipeline, seed, strength, num_inference_steps, _model_key(pipeline))
    grid: Tensor | None = None

    def report(before: int, steps: int) -> None:
        on_progress(before + steps, total)

    report(0, 0)
    with _quiet(pipeline):
        for w, window in enumerate(windows):
            frames = list(window.frames)
            for c, call in enumerate(calls):
                inputs = {
                    "video": video[frames],
                    "azimuths_deg": [float(azimuths_deg[v]) for v in call],
                    "elevations_deg": [float(elevations_deg[v]) for v in call],
                    "reference_views": None if window.anchor is None or grid is None else grid[window.start, call],
                    "initial_views": None if initial_views is None else initial_views[frames][:, call],
                }
                made = run.call(f"window{w:03d}_call{c:02d}", inputs, store, partial(report, done))
                done += per_call
                report(done, 0)
                if grid is None:
                    grid = made.new_zeros(len(video), len(azimuths_deg), *made.shape[2:])
                _place(grid, made, frames, call)
    assert grid is not None
    return grid


def _place(grid: Tensor, made: Tensor, frames: Sequence[int], call: Sequence[int]) -> None:
    """Copy a call's images to their places; of repeated frames and views the first counts."""
    columns = {view: call.index(view) for view in call}
    rows = {frame: frames.index(frame) for frame in frames}
    for frame, row in rows.items():
        for view, column in columns.items():
            grid[frame, view] = made[row, column]


def _model_key(pipeline: StableVideo4D2Pipeline) -> str:
    """Tells models apart by their settings and their last layer (hashing all weights would take as long as a step)."""
    settings = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
    weight = pipeline.unet.conv_out.weight.detach().float().cpu().numpy()
    return content_hash(settings, dict(pipeline.unet.config), weight)


@contextmanager
def _quiet(pipeline: StableVideo4D2Pipeline) -> Iterator[None]:
    """Without the pipeline's own bar: progress is reported through `on_progress`."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
