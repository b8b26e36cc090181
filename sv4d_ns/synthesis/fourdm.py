"""4DM as a `ViewSynthesizer`: its four views become a view grid like any other model's.

4DM places its views around the object's own front, wherever the input camera stood. After sampling, the view that
looks most like the input is taken for the input's direction, and the grid's azimuths are counted from it; its first
view stays 4DM's front, so that later calls know where that is.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from sv4d_ns.diffusion.fourdm.frame import DISTANCE, FIELD_OF_VIEW, WORLD_SCALE
from sv4d_ns.diffusion.sv4d.windows import plan_windows
from sv4d_ns.diffusion.window_store import WindowStore, code_fingerprint
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.metrics.images import padded_ssim
from sv4d_ns.synthesis.base import Views, from_model_space, to_model_space
from sv4d_ns.utils.callbacks import Progress
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import content_hash
from sv4d_ns.utils.images import resize_rgba

if TYPE_CHECKING:
    from sv4d_ns.diffusion.fourdm.pipeline import FourDMPipeline

VIEW_STEP_DEG = 90.0
NUM_VIEWS = 4
COMPARED_SIZE = 32
"""Pixels a side at which views are compared with the input: fine enough for limbs, too coarse for texture."""
KNOWN_POSE = "input_pose_known"
"""Entry of a grid's provenance: false where the input camera's azimuth is only a guess (4DM's own frame)."""


def fourdm_plan(front_deg: float = 0.0) -> ViewPlan:
    """4DM's views, its front first, where the input camera is `front_deg` before the front (multiples of 90)."""
    azimuths = tuple((front_deg + VIEW_STEP_DEG * view) % 360.0 for view in range(NUM_VIEWS))
    return ViewPlan(azimuths, (0.0,) * NUM_VIEWS, 0.0, DISTANCE * WORLD_SCALE, FIELD_OF_VIEW)


@dataclass
class FourDMSynthesizer:
    """`ViewSynthesizer` around a `FourDMPipeline`; windows of a long video share a frame."""

    pipeline: "FourDMPipeline"
    name: str
    prompt: str = ""
    num_inference_steps: int = 100
    refine_strength: float = 0.4
    """Noise level of stage 2 where the user names none (our choice)."""
    image_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.image_size = self.pipeline.config.image_size

    def default_plan(self) -> ViewPlan:
        """Views a quarter turn apart, as if the input camera saw the front; `generate` says what it found."""
        return fourdm_plan()

    @cached_property
    def weights(self) -> str:
        """Hash of the weights: windows of another checkpoint are not to be used again."""
        from sv4d_ns.diffusion.window_store import weights_fingerprint

        return weights_fingerprint(self.pipeline.unet, self.pipeline.vae)

    def describe(self) -> dict[str, Any]:
        """Plain facts for the grid's provenance."""
        from sv4d_ns import __version__

        return {
            "model": self.name,
            "weights": self.weights,
            "code": __version__,
            "num_inference_steps": self.num_inference_steps,
            "prompt": self.prompt,
            KNOWN_POSE: False,
        }

    def generate(
        self, frames: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, *, seed: int, store: Path, progress: Progress
    ) -> Views:
        """Sample all windows, then find the view nearest to the input.

        Raises:
            InputError: a plan 4DM has no views for.
        """
        self._front(plan)
        views = self._run(frames, None, 1.0, seed, WindowStore(store), progress)
        anchor = nearest_view(frames, views.images)
        return Views(views.images, views.confidence, plan=fourdm_plan(-VIEW_STEP_DEG * anchor))

    def refine(
        self,
        frames: UInt8[np.ndarray, "t s s 4"],
        renders: UInt8[np.ndarray, "t v s s 4"],
        plan: ViewPlan,
        *,
        strength: float,
        seed: int,
        store: Path,
        progress: Progress,
    ) -> Views:
        """SDEdit of renders at the plan's views; raises InputError like `generate`."""
        self._front(plan)
        images = to_model_space(resize_rgba(renders, self.image_size), 3)
        return self._run(frames, images, strength, seed, WindowStore(store), progress)

    def _front(self, plan: ViewPlan) -> None:
        wanted = np.asarray(fourdm_plan(plan.azimuths_deg[0]).azimuths_deg)
        same = plan.num_views == NUM_VIEWS and np.allclose(np.asarray(plan.azimuths_deg) % 360.0, wanted)
        if not same or any(plan.elevations_deg):
            raise InputError(
                "4DM makes four views a quarter turn apart at elevation 0, in the order of their azimuths: leave out "
                "--pipeline.datamanager.view-azimuths and --pipeline.datamanager.view-elevations."
            )

    def _run(
        self,
        frames: UInt8[np.ndarray, "t s s 4"],
        start: Float[Tensor, "t v 3 s s"] | None,
        strength: float,
        seed: int,
        store: WindowStore,
        progress: Progress,
    ) -> Views:
        from sv4d_ns.diffusion.fourdm.pipeline import steps_to_run

        windows = plan_windows(len(frames), self.pipeline.config.num_frames)
        per_window = steps_to_run(self.num_inference_steps, strength)
        latents: list[Float[Tensor, "f v c i j"]] = []
        images: Tensor | None = None
        for number, window in enumerate(windows):

            def report(steps: int, before: int = number * per_window) -> None:
                progress(before + steps, len(windows) * per_window)

            report(0)
            numbers = list(window.frames)
            known = None if window.anchor is None else _frame_of(latents, windows, window.anchor, window.start)
            key = content_hash(
                self.describe(), code_fingerprint(), frames[numbers], seed, strength, number, known is None
            )
            name = f"window{number:03d}"
            made = store.load(name, key) if start is None else None
            if made is None:
                made = self._window(frames[numbers], known, start, numbers, strength, (seed, number), report)
                if start is None:
                    store.save(name, key, made)
            latents.append(made)
            report(per_window)
            decoded = self.pipeline.decode_latents(made.flatten(0, 1).to(self.pipeline.device)).cpu()
            decoded = decoded.unflatten(0, made.shape[:2])
            if images is None:
                images = decoded.new_zeros(len(frames), *decoded.shape[1:])
            for row, frame in reversed(list(enumerate(numbers))):
                images[frame] = decoded[row]
        assert images is not None
        return from_model_space(images)

    def _window(
        self,
        frames: UInt8[np.ndarray, "f s s 4"],
        known: Float[Tensor, "v c i j"] | None,
        start: Float[Tensor, "t v 3 s s"] | None,
        numbers: list[int],
        strength: float,
        seed: tuple[int, int],
        report: Any,
    ) -> Float[Tensor, "f v c i j"]:
        """Latents of one window, on the CPU."""
        pipeline = self.pipeline
        generator = torch.Generator().manual_seed(int(content_hash(list(seed))[:15], 16))
        condition = pipeline.condition(frames, self.prompt, generator=generator)
        device = condition.image_latents.device
        clean = None
        if start is not None:
            with torch.no_grad():
                clean = pipeline.encode_images(start[numbers].flatten(0, 1).to(device))
        made = pipeline.sample(
            condition,
            pipeline.noise(condition, generator),
            self.num_inference_steps,
            known=None if known is None else known.to(device),
            start=clean,
            strength=strength,
            on_step=report,
        )
        return made.unflatten(0, (len(numbers), NUM_VIEWS)).float().cpu()


def _frame_of(latents: list[Tensor], windows: list[Any], window: int, frame: int) -> Float[Tensor, "v c i j"]:
    """The latents an earlier window made of a frame."""
    return latents[window][windows[window].frames.index(frame)]


def load_fourdm_synthesizer(
    checkpoint: Path | None, imagedream: str, prompt: str, device: str, num_inference_steps: int | None
) -> tuple[FourDMSynthesizer, str]:
    """The released 4DM as a synthesizer, and a sentence about what was loaded.

    Raises:
        InputError: no checkpoint was given, it does not fit, or ImageDream's files cannot be had.
    """
    from sv4d_ns.diffusion.fourdm import official

    if checkpoint is None:
        raise InputError(
            f"--pipeline.datamanager.synthesis fourdm needs {official.CHECKPOINT_FLAG} PATH: download 4dm.ckpt from "
            f"{official.DRIVE} (its authors state no licence), {official.REMEDY}."
        )
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    pipeline, report = official.load_fourdm_pipeline(checkpoint, device, dtype, imagedream)
    pipeline.set_progress_bar_config(disable=True)
    synthesizer = FourDMSynthesizer(pipeline, "4Diffusion 4DM", prompt)
    if num_inference_steps is not None:
        synthesizer.num_inference_steps = num_inference_steps
    return synthesizer, f"Views come from 4DM at {synthesizer.image_size}x{synthesizer.image_size}: {report.sentence()}"


def nearest_view(frames: UInt8[np.ndarray, "t h w 4"], views: UInt8[np.ndarray, "t v s s 4"]) -> int:
    """Which of the views looks most like the input frames, in structure and outline, whatever its size and place."""
    mine = _normalised(frames)
    likeness = [padded_ssim(mine, _normalised(views[:, view])) for view in range(views.shape[1])]
    return int(torch.stack(likeness).argmax())


def _normalised(rgba: UInt8[np.ndarray, "t h w 4"]) -> Float[Tensor, "t 4 s s"]:
    """Premultiplied colour and alpha, cropped to a square around what is opaque in any frame, small."""
    alpha = rgba[..., 3].max(0) >= 128
    if not alpha.any():
        alpha[:] = True
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    values = torch.from_numpy(rgba).float().movedim(-1, 1) / 255.0
    premultiplied = torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1)
    padded = functional.pad(premultiplied, [int(side)] * 4)
    top = int((rows[0] + rows[-1] + 1 - side) // 2 + side)
    left = int((columns[0] + columns[-1] + 1 - side) // 2 + side)
    crop = padded[:, :, top : top + side, left : left + side]
    return functional.interpolate(crop, (COMPARED_SIZE, COMPARED_SIZE), mode="bilinear", antialias=True)
