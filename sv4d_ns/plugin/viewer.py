"""The viewer of a run: where it starts, what plays, and how it stays fluid.

nerfstudio finds `ViewerControl`s on the pipeline and sets them up, in training and in `ns-viewer` alike. Nothing here
needs the diffusion model.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.viewer.viewer_elements import (
    ViewerButton,
    ViewerCheckbox,
    ViewerControl,
    ViewerNumber,
)

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, framing_camera

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from nerfstudio.viewer.viewer import Viewer

    from sv4d_ns.field.occupancy import OccupancyGrid
    from sv4d_ns.plugin.base_model import FieldModel
    from sv4d_ns.views.grid import ViewGrid

AZIMUTH_DEG, ELEVATION_DEG = 30.0, 15.0
"""A little beside and above the input camera, so that the first look shows that the object is not flat."""

FLUID_FPS = 15.0
"""Pictures per second on a CPU while something moves; they are as large as the machine can make them in that time.
nerfstudio's own 30 leave a CPU too few pixels to see the object by."""

SMOOTH_FPS = 15.0
"""A clip slower than this plays moments between its frames."""

STEP_SECONDS = 0.5
"""Between two changes of the step that is shown in training."""

THUMBNAIL_SIZE = 100
"""Pixels along the side of the pictures on the cameras (as nerfstudio's own)."""
THUMBNAILS_KEPT = 64
"""Frames whose thumbnails are kept."""
FRUSTUM_SCALE = 1.5
"""Size of the cameras in the scene, in viser's units (a tenth of the world's). nerfstudio's default is for scenes with
hundreds of cameras; these are few, and their pictures are to be seen."""


def object_points(occupancy: "OccupancyGrid", moment: float | None = None) -> Float[np.ndarray, "n 3"]:
    """Where there may be something, world units: at a moment in [0, 1], or at any of the clip.

    Known from the first training step on, when it is the hull of the silhouettes.
    """
    bins = occupancy.occupied
    cells = bins.any(0) if moment is None else bins[round(moment * (len(bins) - 1))]
    return occupancy.cell_centers()[cells.reshape(-1)].double().cpu().numpy()


class StartCamera(ViewerControl):
    """Puts a new client's camera where the object fills the window; found by nerfstudio on the pipeline."""

    def _setup(self, viewer: "Viewer") -> None:
        super()._setup(viewer)
        viewer.viser_server.on_client_connect(self._place)

    def _place(self, client: Any) -> None:
        from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO

        model: Any = self.viewer.get_model()
        occupancy: OccupancyGrid = model.occupancy
        clip, now = object_points(occupancy), object_points(occupancy, self.viewer.control_panel.time)
        if not len(clip):  # nothing has grown yet, or all of it has gone
            clip = occupancy.cell_centers().double().cpu().numpy()
        # the lens of the run's own cameras: the browser's wide one bends what is near
        lens = FIELD_OF_VIEW_DEG, client.camera.aspect
        place = framing_camera(clip, now if len(now) else clip, AZIMUTH_DEG, ELEVATION_DEG, *lens)
        position, target = (tuple(VISER_NERFSTUDIO_SCALE_RATIO * point) for point in place)
        with together(client):
            client.camera.fov = math.radians(FIELD_OF_VIEW_DEG)
            client.camera.position = position
            client.camera.look_at = target
        if self.viewer.get_model().device.type == "cpu":
            self._make_fluid(client)

    def _make_fluid(self, client: Any) -> None:
        from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO

        from sv4d_ns.plugin.adaptive_resolution import FluidRenderer

        # nerfstudio has started the client's renderer before, in the order of registration
        renderers = self.viewer.render_statemachines
        renderers[client.client_id].running = False
        renderer = FluidRenderer(self.viewer, VISER_NERFSTUDIO_SCALE_RATIO, client, FLUID_FPS)
        renderers[client.client_id] = renderer
        renderer.start()


@dataclass(frozen=True)
class Clock:
    """A clip of `frames` frames that plays from a position, in frames, since a moment, in seconds."""

    frames: int
    position: float
    since: float
    fps: float
    loop: bool

    def position_at(self, now: float) -> tuple[float, bool]:
        """The position in [0, frames - 1] at a moment, and whether the clip goes on.

        Whole frames, or even parts of them where frames last longer than 1 / `SMOOTH_FPS`. In a loop the last frame
        lasts as long as the others.
        """
        parts = self.parts
        passed = math.floor((now - self.since) * self.fps * parts + 1e-6) / parts
        position = self.position + passed
        if self.loop:
            return min(position % self.frames, self.frames - 1.0), True
        return min(position, self.frames - 1.0), position < self.frames - 1

    @property
    def parts(self) -> int:
        """Moments shown in the time of one frame."""
        return max(math.ceil(SMOOTH_FPS / self.fps), 1)

    @property
    def tick(self) -> float:
        """Seconds between two moments."""
        return 1 / (self.fps * self.parts)


_STEPS = ("First frame", "Previous frame", "Next frame", "Last frame")


class Playback(ViewerControl):
    """Plays the clip on nerfstudio's Time slider, and shows on the cameras what the field was fitted to at that time.

    Pictures the machine is too slow for are left out; the clip keeps its speed.
    """

    def __init__(self, model: "FieldModel", grid: "Callable[[], ViewGrid]", steps_done: Callable[[], int]):
        """`grid` gives the view grid in use (stage 2 replaces it), `steps_done` the training steps behind the field."""
        self.model = model
        self.grid = grid
        self.steps_done = steps_done
        self.viewer: Any = None  # until nerfstudio has made one
        self._step_said = -math.inf
        self._clock: Clock | None = None
        self._lock = threading.Lock()
        self._drawing = threading.Lock()
        self._drawn: tuple[int, int] | None = None
        self._thumbnails: dict[tuple[int, int], dict[int, UInt8[np.ndarray, "s s 3"]]] = {}
        self._pictured: ViewGrid | None = None
        """The grid both are of."""
        self._own_times: deque[float] = deque([0.0], maxlen=16)

    def _setup(self, viewer: "Viewer") -> None:
        super()._setup(viewer)
        grid, gui = self.grid(), viewer.viser_server.gui
        self.play = ViewerButton("Play", cb_hook=lambda _: self.start())
        self.pause = ViewerButton("Pause", cb_hook=lambda _: self.stop(), visible=False)
        # single buttons: viser calls a group only when another one of it is pressed than before
        self.steps = {name: ViewerButton(name, cb_hook=lambda button: self._step(button.name)) for name in _STEPS}
        self.fps = ViewerNumber("FPS", float(grid.fps), cb_hook=lambda _: self._restart(), hint="Frames per second")
        self.loop = ViewerCheckbox("Loop", True, cb_hook=lambda _: self._restart())
        # between nerfstudio's header and its tabs, so that it is at hand in each of them
        with gui.add_folder("Playback", order=viewer.stats_markdown.order + 0.5):
            self._status = gui.add_markdown("")
            elements: list[Any] = [self.play, self.pause, *self.steps.values(), self.fps, self.loop]
            for element in elements:
                element.install(viewer.viser_server)
            self._legend = gui.add_markdown("")
        panel = viewer.control_panel
        # One callback a slider: viser runs them in threads and gives all of one element to the last.
        _and_then(panel._time, self._time_changed)
        _and_then(panel._output_render, self._say_legend)
        self.model.shown_channels = self._shown_channels
        self._say_status(0)
        # nerfstudio's own cameras are there by then
        viewer.viser_server.on_client_connect(lambda _: self._draw())
        self._hide_cameras()
        if viewer.trainer is None:
            self.finished()

    def _hide_cameras(self) -> None:
        """Until they are asked for: they stand in front of the object."""
        viewer = self.viewer
        # above nerfstudio's cameras, which come later and are visible themselves
        self._cameras = viewer.viser_server.scene.add_frame("/cameras", show_axes=False, visible=False)
        viewer.hide_images.visible, viewer.show_images.visible = False, True
        viewer.show_images.on_click(lambda _: self._show_cameras(True))
        viewer.hide_images.on_click(lambda _: self._show_cameras(False))
        self._show_cameras(False)

    def _show_cameras(self, visible: bool) -> None:
        self._cameras.visible = visible
        # depth is for what stands in front of the object or behind it; it costs as much to send as the picture
        self.viewer.control_panel._layer_depth.value = visible

    def finished(self) -> None:
        """Nothing trains (any more): its controls go, and the step is the last one."""
        viewer = self.viewer
        if viewer is None:
            return
        viewer.pause_train.visible = viewer.resume_train.visible = False
        for element in (viewer.control_panel._train_speed, viewer.control_panel._train_util):
            element.set_hidden(True)
        viewer.update_step(self.steps_done())

    def say_step(self) -> None:
        """Show how many training steps are behind the field; nerfstudio does so only with some of its pictures."""
        now = time.monotonic()
        if self.viewer is not None and now - self._step_said > STEP_SECONDS:
            self._step_said = now
            self.viewer.update_step(self.steps_done())

    def start(self) -> None:
        """Play from where the Time slider stands; from the beginning if it stands at the end of a clip that is over."""
        position, last = self._position(), self.grid().num_frames - 1
        if position >= last and not self.loop.value:
            position = 0.0
        with self._lock:
            playing = self._clock is not None
            self._clock = self._clock_from(position)
        self._say_playing(True)
        if not playing:
            threading.Thread(target=self._run, daemon=True, name="playback").start()

    def stop(self) -> None:
        """Stand still at the moment that is shown."""
        with self._lock:
            self._clock = None
        self._say_playing(False)

    def show(self, position: float) -> None:
        """Show a moment of the clip, given in frames."""
        moment = position / max(self.grid().num_frames - 1, 1)
        self._own_times.append(moment)
        self.viewer.control_panel.time = moment  # nerfstudio renders it

    def _clock_from(self, position: float) -> Clock:
        fps = min(max(float(self.fps.value), 0.1), 240.0)
        return Clock(self.grid().num_frames, position, time.monotonic(), fps, bool(self.loop.value))

    def _position(self) -> float:
        return self.viewer.control_panel.time * (self.grid().num_frames - 1)

    def _run(self) -> None:
        shown = None
        while (clock := self._clock) is not None:
            position, goes_on = clock.position_at(time.monotonic())
            if position != shown:
                self.show(position)
                shown = position
            if not goes_on:
                self.stop()
                return
            time.sleep(clock.tick)

    def _restart(self) -> None:
        """After a change of speed: on from here."""
        with self._lock:
            if self._clock is not None:
                self._clock = self._clock_from(self._position())

    def _step(self, name: str) -> None:
        self.stop()
        last, position = self.grid().num_frames - 1, self._position()
        # from between two frames to the neighbouring one
        back, forth = math.ceil(position - 1 - 1e-6), math.floor(position + 1 + 1e-6)
        target = dict(zip(_STEPS, (0, max(back, 0), min(forth, last), last), strict=True))[name]
        self.show(float(target))

    def _time_changed(self) -> None:
        """The slider moved, by us or by hand."""
        if self.viewer.control_panel.time not in self._own_times:  # by hand
            self._own_times.append(self.viewer.control_panel.time)
            self._restart()
        self._draw()

    def _draw(self) -> None:
        """Bring what is shown beside the render to the present moment; moments a slow machine misses are left out."""
        while self._drawing.acquire(blocking=False):
            try:
                grid, frame = self.grid(), round(self._position())
                if grid is not self._pictured:
                    self._pictured, self._drawn = grid, None
                    self._thumbnails.clear()
                # made by nerfstudio after the controls are set up, in another thread
                cameras = dict(getattr(self.viewer, "camera_handles", {}))
                if self._drawn == (frame, len(cameras)):
                    return
                self._say_status(frame)
                self._show_thumbnails(grid, frame, cameras)
                self._drawn = frame, len(cameras)
            finally:
                self._drawing.release()

    def _show_thumbnails(self, grid: "ViewGrid", frame: int, cameras: dict[int, Any]) -> None:
        """Put the input frame and the generated views of a frame on their cameras."""
        known = frame, len(cameras)
        pictures = self._thumbnails.get(known) or thumbnails(grid, frame, list(cameras))
        self._thumbnails[known] = pictures
        while len(self._thumbnails) > THUMBNAILS_KEPT:
            del self._thumbnails[next(iter(self._thumbnails))]
        with together(self.viewer.viser_server):
            for view, old in cameras.items():
                new = self.viewer.viser_server.scene.add_camera_frustum(
                    name=f"/cameras/camera_{view:05d}",  # nerfstudio's name: the old one is replaced
                    fov=math.radians(grid.plan.fov_deg),
                    aspect=1.0,
                    scale=FRUSTUM_SCALE,
                    image=pictures[view],
                    wxyz=old.wxyz,
                    position=old.position,
                    visible=old.visible,
                )
                new.on_click(_look_through)
                self.viewer.camera_handles[view] = new

    def _shown_channels(self) -> set[str]:
        panel = self.viewer.control_panel
        return {panel.output_render, panel.split_output_render} if panel.split else {panel.output_render}

    def _say_playing(self, playing: bool) -> None:
        with together(self.viewer.viser_server):
            self.play.set_visible(not playing)
            self.pause.set_visible(playing)

    def _say_status(self, frame: int) -> None:
        grid = self.grid()
        self._status.content = f"Frame {frame + 1} of {grid.num_frames}, {frame / grid.fps:.2f} s"

    def _say_legend(self) -> None:
        from sv4d_ns.plugin.render_outputs import LEGENDS

        self._legend.content = LEGENDS.get(self.viewer.control_panel.output_render, "")


@contextmanager
def together(sender: Any) -> Iterator[None]:
    """What is sent to clients inside is applied at once: `atomic` of viser's server or client, whose lock is let go
    when something fails inside, too. Sending does once the server or Python ends, and threads of viser that wait for
    the lock would then keep the process from ending."""
    raised = None
    with sender.atomic():
        try:
            yield
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


def _and_then(element: Any, action: Callable[[], None]) -> None:
    """Let a viewer element do one thing more after what it does."""
    before = element.cb_hook

    def both(changed: Any) -> None:
        before(changed)
        action()

    element.cb_hook = both


def _look_through(event: Any) -> None:
    """Click on a camera: the client looks through it (nerfstudio's own behaviour, lost when a camera is replaced)."""
    with together(event.client):
        event.client.camera.position = event.target.position
        event.client.camera.wxyz = event.target.wxyz


def thumbnails(grid: "ViewGrid", frame: int, views: Sequence[int]) -> "dict[int, UInt8[np.ndarray, 's s 3']]":
    """Pictures on white of some views at a frame, by view; 0 is the input."""
    from sv4d_ns.utils.images import over_white, resize_rgba

    pictures = {view: grid.input_frames[frame] if view == 0 else grid.novel_views[frame, view - 1] for view in views}
    return {view: over_white(resize_rgba(picture[None], THUMBNAIL_SIZE)[0]) for view, picture in pictures.items()}


LOCALHOST = "127.0.0.1"


def local_unless_asked(viewer: ViewerConfig, arguments: Sequence[str] | None = None) -> ViewerConfig:
    """Settings of a viewer that listens on this machine only, unless the command line names a host.

    `ns-viewer` replaces a run's viewer settings by its own, whose host 0.0.0.0 lets the whole network in. What it
    replaces them in is the run's trainer config, which asks here (`FieldTrainerConfig.__setattr__`).

    Args:
        viewer: the settings; another host than nerfstudio's default was asked for and stays.
        arguments: of the command; None takes this process's.
    """
    words = [word.partition("=")[0].replace("_", "-") for word in (sys.argv[1:] if arguments is None else arguments)]
    if viewer.websocket_host != ViewerConfig.websocket_host or "--viewer.websocket-host" in words:
        return viewer
    return replace(viewer, websocket_host=LOCALHOST)
