"""The viewer's playback, pictures and size control, on nerfstudio's own elements and a real viser server."""

import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.base_config import ViewerConfig

from sv4d_ns.field import volume_rendering as rendering
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.visibility import surface_normals
from sv4d_ns.field.volume_rendering import render_rays_chunked
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.geometry.rays import picture_rays, pixel_rays
from sv4d_ns.plugin import adaptive_resolution
from sv4d_ns.plugin.adaptive_resolution import SMALLEST_SIDE, FluidRenderer, PlayedPictures, SizeControl
from sv4d_ns.plugin.render_outputs import LEGENDS, GridVisibility, camera_channels
from sv4d_ns.plugin.viewer import Clock, Playback, StartCamera, local_unless_asked, object_points, thumbnails, together
from sv4d_ns.views.grid import ViewGrid

FOUR_VIEWS = ViewPlan.ring((60.0, 120.0, 180.0, 240.0))

FRAMES, SIZE = 5, 16


def view_grid() -> ViewGrid:
    frames = np.full((FRAMES, SIZE, SIZE, 4), 255, np.uint8)
    frames[..., 0] = 50 * np.arange(FRAMES, dtype=np.uint8)[:, None, None]
    views = np.full((FRAMES, 4, SIZE, SIZE, 4), 255, np.uint8)
    views[..., 2] = 60 * np.arange(4, dtype=np.uint8)[None, :, None, None]
    return ViewGrid(frames, views, FOUR_VIEWS, fps=10.0)


def test_the_clock_keeps_the_clips_speed_and_loops() -> None:
    clock = Clock(frames=5, position=3.0, since=100.0, fps=10.0, loop=True)
    assert [clock.position_at(100 + seconds)[0] for seconds in (0, 0.1, 0.2, 0.55, 10.0)] == [3, 4, 0, 3.5, 3]
    assert all(clock.position_at(100 + seconds)[1] for seconds in (0, 0.2, 50))
    once = replace(clock, loop=False)
    assert once.position_at(100.05) == (3.5, True) and once.position_at(100.1) == (4, False)
    assert once.position_at(120) == (4, False)


def test_slow_clips_play_moments_between_frames() -> None:
    clock = Clock(frames=5, position=0.0, since=0.0, fps=2.0, loop=True)
    assert 1 / clock.tick >= 15, "pictures a second"
    assert [clock.position_at(seconds)[0] for seconds in (0.07, 0.5, 2.4)] == pytest.approx([0.125, 1.0, 4.0])
    assert Clock(1, 0.0, 0.0, 10.0, True).position_at(3.0)[0] == 0, "one frame stays"


def test_thumbnails_are_those_of_the_frame() -> None:
    pictures = thumbnails(view_grid(), 3, [0, 2])
    assert set(pictures) == {0, 2}
    assert (pictures[0] == (150, 255, 255)).all() and (pictures[2] == (255, 255, 60)).all()


def test_cameras_that_arrive_while_pictures_are_put_on_the_others_get_theirs() -> None:
    def handle() -> Any:
        return SimpleNamespace(wxyz=None, position=None, visible=True, on_click=lambda call: None)

    handles, drawn = {0: handle(), 1: handle()}, []

    def add_camera_frustum(name: str, **settings: Any) -> Any:
        drawn.append(name)
        handles.setdefault(2, handle())  # nerfstudio adds them in a thread of its own
        return handle()

    grid = view_grid()
    playback = Playback(SimpleNamespace(), lambda: grid, lambda: 0)  # type: ignore[arg-type]
    playback.viewer = SimpleNamespace(
        camera_handles=handles,
        viser_server=SimpleNamespace(atomic=nullcontext, scene=SimpleNamespace(add_camera_frustum=add_camera_frustum)),
        control_panel=SimpleNamespace(time=0.0),
    )  # type: ignore[assignment]
    playback._say_status = lambda frame: None  # type: ignore[method-assign]
    playback._draw()
    assert set(drawn) == {f"/cameras/camera_{view:05d}" for view in range(3)}


@pytest.fixture(scope="module")
def viewer():
    viser = pytest.importorskip("viser")
    from nerfstudio.viewer.control_panel import ControlPanel

    server = viser.ViserServer(host="127.0.0.1", port=0)
    rendered: list[float] = []
    panel = ControlPanel(server, True, 10.0, lambda: rendered.append(panel.time), lambda _: None, lambda _: None)
    panel.update_output_options(["rgb", "confidence", "model_view"])
    header = server.gui.add_markdown("Step: 0")
    names = ("Pause Training", "Resume Training", "Hide Train Cams", "Show Train Cams")
    buttons = [server.gui.add_button(name) for name in names]
    cameras = {
        view: server.scene.add_camera_frustum(f"/cameras/camera_{view:05d}", fov=0.6, aspect=1.0) for view in range(5)
    }
    yield SimpleNamespace(
        viser_server=server,
        control_panel=panel,
        stats_markdown=header,
        pause_train=buttons[0],
        resume_train=buttons[1],
        hide_images=buttons[2],
        show_images=buttons[3],
        update_step=lambda step: setattr(header, "content", f"Step: {step}"),
        trainer=None,
        config=ViewerConfig(),
        camera_handles=cameras,
        rendered=rendered,
    )
    server.stop()


def until(holds, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


def test_an_error_among_what_is_sent_together_lets_go_of_visers_lock(viewer) -> None:
    with pytest.raises(RuntimeError, match="shutdown"), together(viewer.viser_server):
        raise RuntimeError("cannot schedule new futures after shutdown")
    lock = viewer.viser_server._websock_server._atomic_lock
    assert until(lambda: not lock.locked())


def test_playing_stepping_and_the_pictures_on_the_cameras(viewer) -> None:
    grid = view_grid()
    model = SimpleNamespace(shown_channels=None)
    playback = Playback(model, lambda: grid, lambda: 1200)
    cameras = dict(viewer.camera_handles)
    playback._setup(viewer)
    panel = viewer.control_panel

    def press(button: str) -> None:
        playback.steps[button].gui_handle.value = True  # what a click in the browser does

    press("Last frame")
    assert until(lambda: panel.time == 1.0 and "Frame 5 of 5" in playback._status.content)
    press("Previous frame")
    assert until(lambda: panel.time == 0.75 and viewer.rendered[-1] == 0.75), "nerfstudio renders each moment"
    panel.time = 0.3  # by hand, between two frames
    press("Next frame")
    assert until(lambda: panel.time == 0.5)
    press("First frame")
    assert until(lambda: panel.time == 0.0 and "Frame 1 of 5" in playback._status.content)
    assert all(viewer.camera_handles[view] is not cameras[view] for view in cameras), "the pictures were replaced"

    playback.loop.value = False
    playback.fps.value = 60.0
    playback.start()
    assert playback.pause.gui_handle.visible and not playback.play.gui_handle.visible
    assert until(lambda: panel.time == 1.0 and playback.play.gui_handle.visible), "it stops at the end"
    assert until(lambda: not any(thread.name == "playback" for thread in threading.enumerate()))
    playback.loop.value = True
    viewer.rendered.clear()
    playback.start()
    assert until(lambda: len(set(viewer.rendered)) == FRAMES), "in a loop every frame is shown"
    playback.stop()
    assert until(lambda: not any(thread.name == "playback" for thread in threading.enumerate()))
    stood = panel.time
    time.sleep(0.2)
    assert panel.time == stood

    panel._output_render.value = "confidence"
    assert until(lambda: playback._legend.content == LEGENDS["confidence"])
    assert model.shown_channels() == {"confidence"}

    assert not viewer.pause_train.visible and not panel._train_util.gui_handle.visible, "nothing trains"
    assert not panel._train_speed.gui_handle.visible
    assert viewer.stats_markdown.content == "Step: 1200"
    assert not playback._cameras.visible and viewer.show_images.visible and not viewer.hide_images.visible
    assert not panel.layer_depth
    viewer.show_images.value = True  # what a click does
    assert until(lambda: playback._cameras.visible and panel.layer_depth), "cameras stand where they are"


def test_a_finished_training_shows_its_last_step_and_no_controls_of_its_own(viewer, monkeypatch) -> None:
    panel, steps = viewer.control_panel, [7]
    for element in (panel._train_speed, panel._train_util):
        element.set_hidden(False)
    trained = SimpleNamespace(**vars(viewer) | {"trainer": SimpleNamespace(training_state="training")})
    playback = Playback(SimpleNamespace(), view_grid, lambda: steps[0])  # type: ignore[arg-type]
    playback.say_step()  # of a training without a viewer
    playback.finished()
    playback._setup(trained)  # type: ignore[arg-type]
    assert panel._train_util.gui_handle.visible
    playback.say_step()
    assert viewer.stats_markdown.content == "Step: 7"
    steps[0] = 8
    playback.say_step()
    assert viewer.stats_markdown.content == "Step: 7", "not with every step"
    playback.finished()
    assert viewer.stats_markdown.content == "Step: 8" and not panel._train_util.gui_handle.visible


def test_a_new_client_sees_the_whole_object_as_large_as_the_window_allows(viewer) -> None:
    occupancy = OccupancyGrid(FRAMES, resolution=16)
    occupancy.occupied[:] = False
    occupancy.occupied[:, 6:9, 2:5, 1:15] = True  # a pole
    assert len(object_points(occupancy, 0.5)) == 3 * 3 * 14
    model = SimpleNamespace(occupancy=occupancy, device=SimpleNamespace(type="cuda"))
    start = StartCamera()
    start.viewer = SimpleNamespace(get_model=lambda: model, control_panel=viewer.control_panel)  # type: ignore[assignment]
    client = SimpleNamespace(camera=SimpleNamespace(aspect=1.6), atomic=nullcontext)
    start._place(client)
    camera = client.camera
    position, target = np.array(camera.position) / 10, np.array(camera.look_at) / 10
    back = (position - target) / np.linalg.norm(position - target)
    right = np.cross((0, 0, 1), back) / np.linalg.norm(np.cross((0, 0, 1), back))
    seen = object_points(occupancy) - position
    depth = seen @ -back
    height = seen @ np.cross(back, right) / depth / np.tan(camera.fov / 2)
    assert (height.min(), height.max()) == pytest.approx((-1, 1))
    assert abs((seen @ right / depth).mean()) < 0.01, "and in the middle"
    occupancy.occupied[:] = False
    start._place(client)  # nothing there yet


def still_renderer(viewer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[float]]:
    """A client's renderer whose pictures are sizes of a moment, and the moments it has rendered."""
    rendered: list[float] = []

    def render(self: Any, camera_state: Any) -> dict[str, Any]:
        rendered.append(viewer.control_panel.time)
        return {"rgb": torch.zeros(*self._calculate_image_res(camera_state.aspect), 3)}

    monkeypatch.setattr(adaptive_resolution.RenderStateMachine, "_render_img", render)
    monkeypatch.setattr(SizeControl, "learn", lambda *_: None)
    preview = SimpleNamespace(preview_render=False)
    renderer = FluidRenderer(SimpleNamespace(**vars(viewer), render_tab_state=preview), 10.0, None, 15.0)
    return renderer, rendered


def camera_state(place: float) -> Any:
    return SimpleNamespace(c2w=torch.full((3, 4), place), fov=0.6, aspect=1.0)


def test_a_loops_second_round_is_not_rendered_again(viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, rendered = still_renderer(viewer, monkeypatch)
    panel = viewer.control_panel
    for _ in range(3):
        for moment in (0.0, 0.5, 1.0):
            panel.time = moment
            renderer._render_img(camera_state(1.0))
    assert rendered == [0.0, 0.5, 1.0]
    renderer.interrupt_render_flag = True  # as nerfstudio does when something changes at rest
    renderer._render_img(camera_state(1.0))
    assert not renderer.interrupt_render_flag, "the next picture at rest is not to be given up"
    renderer._render_img(camera_state(2.0))
    assert len(rendered) == 4, "another camera"
    renderer.state = "high"
    renderer._render_img(camera_state(2.0))
    assert len(rendered) == 5, "at rest the picture is a larger one"
    renderer.state = "low_move"
    renderer.viewer.trainer = SimpleNamespace(training_state="training")
    renderer._render_img(camera_state(2.0))
    assert len(rendered) == 6, "the field has changed"


def test_played_pictures_are_replaced_by_larger_ones_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_resolution, "KEPT_PIXELS", 250)
    played = PlayedPictures()

    def picture(side: int) -> dict[str, Any]:
        return {"rgb": torch.zeros(side, side, 3)}

    played.keep("here", 0.0, picture(5))
    assert played.find(0.0, 5) is not None and played.find(0.0, 10) is None and played.find(0.5, 5) is None
    for moment in (0.0, 0.5, 1.0):
        played.keep("here", moment, picture(10))
    assert played.find(0.0, 10) is not None and played.find(0.5, 10) is not None
    assert played.find(1.0, 10) is None, "enough"
    played.keep("there", 1.0, picture(10))
    assert played.find(1.0, 10) is not None and played.find(0.0, 5) is None


def model_with_a_ball() -> SimpleNamespace:
    """A field that is solid near the origin, and its views: what `camera_channels` needs of a model."""
    torch.manual_seed(0)
    field = DeformableField(DeformableFieldConfig(levels=2, log2_table_size=8, hidden_width=8))
    features = field.config.geometry_features
    field._canonical = lambda x: (100 * (0.3 - x.norm(dim=-1)), x.new_zeros(len(x), features))  # type: ignore[method-assign]
    occupancy = OccupancyGrid(FRAMES, resolution=16)
    grid = view_grid()
    config = SimpleNamespace(render_samples=64, eval_num_rays_per_chunk=100)
    return SimpleNamespace(field=field, occupancy=occupancy, config=config, views=GridVisibility(lambda: grid))


def test_depths_and_normals_are_those_of_a_whole_picture() -> None:
    model = model_with_a_ball()
    seen = model.views.at(model.field, model.occupancy, 0.5)
    for camera, depth in zip(seen.cameras, seen.depth, strict=True):
        origins, directions = picture_rays(camera, seen.grid.plan.focal_px(len(depth)), len(depth))
        times = torch.full_like(origins[:, :1], float(seen.grid.times[seen.frame]))
        picture = render_rays_chunked(model.field, model.occupancy, origins, directions, times, n_samples=96)
        assert torch.equal(depth.flatten(), picture["depth"])
    points = origins + depth.view(-1, 1) * directions
    normals = surface_normals(model.field, points, picture["alpha"], times)
    hit = picture["alpha"] >= 0.5
    torch.testing.assert_close(normals[hit], points[hit] / points[hit].norm(dim=-1, keepdim=True), atol=3e-2, rtol=0)
    assert hit.any() and not normals[~hit].any()
    assert not surface_normals(model.field, points, 0 * picture["alpha"], times).any(), "a picture of nothing"


def rays(view: int, size: int = 24, when: float = 0.5) -> RayBundle:
    plan = FOUR_VIEWS
    axis = torch.arange(size) + 0.5
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    count = len(xy)
    c2w = torch.from_numpy(plan.c2w()[view]).float().expand(count, 4, 4)
    focal = torch.full((count,), plan.focal_px(size))
    origins, directions = pixel_rays(xy, c2w, focal, torch.full((count, 2), size))
    shape = (size, size)
    return RayBundle(
        origins.reshape(*shape, 3),
        directions.reshape(*shape, 3),
        torch.ones(*shape, 1),
        times=torch.full((*shape, 1), when),
    )


def test_channels_are_made_when_asked_for_and_say_who_saw_the_surface() -> None:
    model = model_with_a_ball()
    front = camera_channels(model, rays(0))  # type: ignore[arg-type]
    assert set(front) == {*LEGENDS} and next(iter(front)) == "rgb" and list(front)[-1] == "model_view"
    assert set(front._ready) == {"rgb", "accumulation", "depth", "motion"}, "nothing else is paid for"
    middle, corner = (12, 12), (0, 0)
    for name in ("distance", "visibility", "confidence", "deformation", "side_by_side", "model_view"):
        assert front[name].shape == (24, 24, 3) and front[name].min() >= 0 and front[name].max() <= 1
    for name in ("distance", "visibility", "confidence", "deformation", "model_view"):
        assert (front[name][corner] == 1).all(), "white where there is nothing"
    blue, orange = front["confidence"][middle], camera_channels(model, rays(3))["confidence"][middle]  # type: ignore[arg-type]
    assert blue[2] > blue[0] and orange[0] > orange[2], "the input saw the front, a generated view the back"
    assert torch.allclose(front["model_view"][middle], torch.tensor([100 / 255, 1.0, 1.0]), atol=0.02), "frame 3 of 5"


def test_a_field_in_training_gets_new_witnesses_and_a_finished_one_keeps_them() -> None:
    model = model_with_a_ball()
    first = model.views.at(model.field, model.occupancy, 0.5)
    assert model.views.at(model.field, model.occupancy, 0.5) is first
    assert model.views.at(model.field, model.occupancy, 0.52) is first, "the nearest frame's"
    with torch.no_grad():
        model.field.density_head[-1].bias[0] -= 1
    assert model.views.at(model.field, model.occupancy, 0.5) is not first


def test_the_size_settles_where_a_picture_takes_its_time() -> None:
    """A machine whose pictures cost 20 ms and 2 microseconds a pixel: (1/10 - 0.02) / 2e-6 = 200 squared."""
    control = SizeControl(fps=10.0)
    for _ in range(60):
        control.learn(0.02 + 2e-6 * control.side**2, largest=512)
    assert 165 < control.side < 225
    for _ in range(60):
        control.learn(1.0, largest=512)
    assert control.side == SMALLEST_SIDE, "never so small that nothing is seen"
    for _ in range(60):
        control.learn(0.001, largest=512)
    assert control.side == 512


def test_viewers_listen_on_this_machine_unless_a_host_is_named() -> None:
    default = ViewerConfig(websocket_port=7123)
    assert local_unless_asked(default, ["--load-config", "c"]) == replace(default, websocket_host="127.0.0.1")
    for words in (["--viewer.websocket-host", "0.0.0.0"], ["--viewer.websocket_host=0.0.0.0"]):
        assert local_unless_asked(default, words) is default
    named = replace(default, websocket_host="10.0.0.3")
    assert local_unless_asked(named, []) is named


def test_ns_viewers_settings_in_a_runs_config_become_local(monkeypatch: pytest.MonkeyPatch) -> None:
    from sv4d_ns.method_configs.sv4d import method

    monkeypatch.setattr("sys.argv", ["ns-viewer", "--load-config", "config.yml"])
    config = replace(method.config)
    config.viewer = ViewerConfig()  # as ns-viewer does
    assert config.viewer.websocket_host == "127.0.0.1"
    monkeypatch.setattr("sys.argv", ["ns-viewer", "--viewer.websocket-host", "0.0.0.0"])
    config.viewer = ViewerConfig()
    assert config.viewer.websocket_host == "0.0.0.0"


def ball_picture(obb: object = None, background: torch.Tensor | None = None) -> tuple[Any, list[int]]:
    """What `get_outputs_for_camera` shows of the ball from the input camera, and how many rays it rendered at once."""
    from nerfstudio.cameras.cameras import Cameras
    from nerfstudio.model_components.renderers import background_color_override_context

    from sv4d_ns.plugin import render_outputs as channels
    from sv4d_ns.plugin.model import SV4DModel

    ball = model_with_a_ball()
    ball.config.eval_num_rays_per_chunk = 50
    ball.shown_channels, ball.device = None, "cpu"
    plan, size = ViewPlan.ring((60.0, 120.0, 180.0, 240.0)), 24
    camera = Cameras(
        torch.from_numpy(plan.c2w()[:1, :3]).float(), plan.focal_px(size), plan.focal_px(size), 12.0, 12.0, size, size,
        times=torch.full((1, 1), 0.5),
    )  # fmt: skip
    counts: list[int] = []
    render = rendering.render_rays

    def counted(field, occupancy, origins, *arguments, **options):  # type: ignore[no-untyped-def]
        counts.append(len(origins))
        return render(field, occupancy, origins, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "render_rays", counted)
        with background_color_override_context(background):  # type: ignore[arg-type]
            outputs = SV4DModel.get_outputs_for_camera(ball, camera, obb)  # type: ignore[arg-type]
    assert isinstance(outputs, channels.Channels)
    return outputs, counts


def test_crop_box_and_background_of_viewer_and_render_are_used() -> None:
    from nerfstudio.data.scene_box import OrientedBox

    whole, counts = ball_picture()
    assert max(counts) == 50, "--eval-num-rays-per-chunk"
    left_half = OrientedBox.from_params(
        (0.0, -1.0, 0.0), (0.0, 0.0, 0.0), (2.0, 2.0, 2.0)
    )  # y below 0: left in the picture
    red = torch.tensor([1.0, 0.0, 0.0])
    cut, _ = ball_picture(left_half, red)
    assert whole["accumulation"][12, 6:18].min() > 0.8
    assert cut["accumulation"][12, 6:11].min() > 0.8 and cut["accumulation"][12, 13:].max() == 0
    assert (cut["rgb"][12, 14] == red).all() and (whole["rgb"][0, 0] == 1).all()
