"""Rendering for a viewer's client that stays fluid where rendering is slow.

nerfstudio takes the time of a picture to be proportional to its pixels. Where a picture has a cost of its own (a CPU
at work on other things too) that rule makes ever smaller pictures without getting faster; here the size is found by
trying.
"""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.utils import CameraState

SMALLEST_SIDE = 96.0
"""Of a picture with as many pixels in a square: below it the object cannot be made out any more."""


@dataclass
class SizeControl:
    """The side (square root of the pixels) at which a picture takes 1 / `fps` seconds."""

    fps: float
    side: float = 128.0

    def learn(self, seconds: float, largest: float) -> None:
        """A picture of this side has taken so many seconds: the next is smaller, larger or the same."""
        load = seconds * self.fps
        if not 0.75 < load < 1.2:
            # half way to where the pixels' share would be right; single late pictures do not count for much
            self.side *= min(max(load, 0.25), 4.0) ** -0.25
        self.side = min(max(self.side, SMALLEST_SIDE), max(largest, SMALLEST_SIDE))


SMALLEST_PLAYED_SIDE = 128.0
"""The same for a camera that stands still: pictures of a loop's first round are slower and serve all further ones."""
KEPT_PIXELS = 4_000_000
"""Of all kept pictures together; one takes about 50 bytes."""
LARGE_ENOUGH = 0.8
"""A kept picture of at least this share of the present side is shown again."""


@dataclass
class PlayedPictures:
    """Pictures of the clip from a camera that stands still: a loop's second round need not render them again."""

    seen_from: Hashable = None
    pixels: int = 0
    moments: dict[float, tuple[float, Any]] = field(default_factory=dict)
    """Side and outputs by time."""

    def find(self, moment: float, side: float) -> Any:
        """The picture of a moment, if there is one about this large; None if not."""
        kept = self.moments.get(moment)
        return kept[1] if kept is not None and kept[0] >= LARGE_ENOUGH * side else None

    def keep(self, seen_from: Hashable, moment: float, outputs: Any) -> None:
        """Those of another camera go. Of a long clip the first moments stay, and the others are rendered each time."""
        if seen_from != self.seen_from:
            self.seen_from, self.pixels = seen_from, 0
            self.moments.clear()
        height, width = outputs["rgb"].shape[:2]
        more = height * width
        if moment in self.moments:
            more -= round(self.moments[moment][0] ** 2)
        if self.pixels + more <= KEPT_PIXELS:
            self.moments[moment] = (height * width) ** 0.5, outputs
            self.pixels += more


class FluidRenderer(RenderStateMachine):
    """nerfstudio's renderer of one client, with another rule for the size of moving pictures."""

    def __init__(self, viewer: Any, scale_ratio: float, client: Any, fps: float):
        super().__init__(viewer, scale_ratio, client)
        self.control = SizeControl(fps)
        self.played = PlayedPictures()
        self._side = self.control.side

    def _render_img(self, camera_state: CameraState) -> Any:
        if self.state == "high":
            return super()._render_img(camera_state)
        # meant for the picture at rest, which is over: left standing, it would end the next one and no other would come
        self.interrupt_render_flag = False
        seen_from, moment = self._seen_from(camera_state), self.viewer.control_panel.time
        still = seen_from is not None and seen_from == self.played.seen_from
        self._side = max(self.control.side, SMALLEST_PLAYED_SIDE) if still else self.control.side
        kept = self.played.find(moment, self._side) if still else None
        if kept is not None:
            return kept
        started = time.perf_counter()
        outputs = super()._render_img(camera_state)
        if self._side == self.control.side:
            self.control.learn(time.perf_counter() - started, self.viewer.control_panel.max_res)
        if seen_from is not None:
            self.played.keep(seen_from, moment, outputs)
        return outputs

    def _seen_from(self, camera_state: CameraState) -> Hashable:
        """All that a picture depends on besides its moment; None where the field still changes or time is another."""
        trainer, panel = self.viewer.trainer, self.viewer.control_panel
        if self.viewer.render_tab_state.preview_render or (
            trainer is not None and trainer.training_state != "completed"
        ):
            return None
        box = panel.crop_obb
        crop = (*box.R.flatten().tolist(), *box.T.tolist(), *box.S.tolist(), *panel.background_color)
        camera = (*camera_state.c2w.flatten().tolist(), camera_state.fov, camera_state.aspect)
        return camera, panel.layer_depth, crop if panel.crop_viewport else None

    def _calculate_image_res(self, aspect_ratio: float) -> tuple[int, int]:
        """Height and width, pixels."""
        if self.state == "high":
            return super()._calculate_image_res(aspect_ratio)
        # steps of 8, so that the page does not see a new size with every picture
        height = round(self._side / aspect_ratio**0.5 / 8) * 8
        return height, max(int(height * aspect_ratio), 8)

    def _send_output_to_viewer(self, outputs: Any, static_render: bool = True) -> None:
        # small pictures at nerfstudio's lower quality for motion are hard to read, and cost next to nothing to send
        super()._send_output_to_viewer(outputs, static_render=True)
