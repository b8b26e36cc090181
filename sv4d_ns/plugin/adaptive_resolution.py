"""Rendering for a viewer's client that stays fluid where rendering is slow.

nerfstudio takes the time of a picture to be proportional to its pixels. Where a picture has a cost of its own (a CPU
at work on other things too) that rule makes ever smaller pictures without getting faster; here the size is found by
trying.
"""

import time
from dataclasses import dataclass
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


class FluidRenderer(RenderStateMachine):
    """nerfstudio's renderer of one client, with another rule for the size of moving pictures."""

    def __init__(self, viewer: Any, scale_ratio: float, client: Any, fps: float):
        super().__init__(viewer, scale_ratio, client)
        self.control = SizeControl(fps)

    def _render_img(self, camera_state: CameraState) -> Any:
        started = time.perf_counter()
        outputs = super()._render_img(camera_state)
        if self.state != "high":
            self.control.learn(time.perf_counter() - started, self.viewer.control_panel.max_res)
        return outputs

    def _calculate_image_res(self, aspect_ratio: float) -> tuple[int, int]:
        """Height and width, pixels."""
        if self.state == "high":
            return super()._calculate_image_res(aspect_ratio)
        # steps of 8, so that the page does not see a new size with every picture
        height = round(self.control.side / aspect_ratio**0.5 / 8) * 8
        return height, max(int(height * aspect_ratio), 8)

    def _send_output_to_viewer(self, outputs: Any, static_render: bool = True) -> None:
        # small pictures at nerfstudio's lower quality for motion are hard to read, and cost next to nothing to send
        super()._send_output_to_viewer(outputs, static_render=True)
