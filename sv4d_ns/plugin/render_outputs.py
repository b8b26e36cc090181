"""What a picture of the field can show besides its colours: where its surface is, moves, and who has seen it.

A picture's channels are made when they are first asked for: the viewer shows one at a time, and some need the field
seen from every camera of the view grid.
"""

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from sv4d_ns.field.images import render_rgba
from sv4d_ns.field.visibility import VisibilityConfig, soft_visibility, surface_map, surface_normals, unoccluded
from sv4d_ns.field.volume_rendering import Bounds, render_rays_chunked
from sv4d_ns.geometry.rays import project, sample_picture
from sv4d_ns.utils.images import GENERATED_COLOR, OBSERVED_COLOR, UNSEEN_COLOR, over_white
from sv4d_ns.views.grid import ViewGrid

if TYPE_CHECKING:
    from nerfstudio.cameras.rays import RayBundle

    from sv4d_ns.plugin.base_model import FieldModel

DISTANCE_RANGE = 0.8
"""World units in front of and behind the origin over which the channel `distance` goes through its colours."""
DEFORMATION_RANGE = 0.2
"""World units along an axis at which the channel `deformation` is saturated."""
DEPTH_MAP_SIZE = 64
"""Pixels along the side of the depth maps that say what a camera of the grid sees of the surface."""

BLANK = 0.85
"""Grey of surface that the view in question does not see."""

LEGENDS = {
    "rgb": "The field as it looks, on white.",
    "accumulation": "Opacity of each ray.",
    "depth": "Distance along the ray, world units; without a surface 1000. `distance` shows the same in colours.",
    "motion": "Length of the deformation, world units.",
    "normals": "Surface normal: red, green, blue are x, y, z; grey is 0.",
    "distance": f"Distance from the camera: blue is near, red is far (±{DISTANCE_RANGE} around the origin).",
    "visibility": "How frontally the best placed camera sees the surface: purple not at all, yellow well.",
    "confidence": "Blue: seen by the input video. Orange: by generated views only. Grey: by none.",
    "deformation": (
        f"Where the surface is relative to the canonical frame: red, green, blue are x, y, z, ±{DEFORMATION_RANGE} "
        "world units; grey has not moved."
    ),
    "side_by_side": "Left: the nearest view the field was fitted to. Right: the field from that camera.",
    "model_view": "The nearest view the field was fitted to, laid on the field's surface; grey where it sees nothing.",
}
"""What each channel means, in a sentence."""


class Channels(MutableMapping[str, Tensor]):
    """Pictures [h, w, c] by name; those not at hand are made, without gradients, when first asked for."""

    def __init__(self, ready: dict[str, Tensor], makers: dict[str, Callable[[], Tensor]]):
        self._ready = ready
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._ready:
            with torch.no_grad():
                self._ready[name] = self._makers[name]()
        return self._ready[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._ready[name] = value

    def __delitem__(self, name: str) -> None:
        self._ready.pop(name, None)
        self._makers.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._ready or name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter({**self._ready, **self._makers})

    def __len__(self) -> int:
        return len({**self._ready, **self._makers})

    def __repr__(self) -> str:
        """The names: nerfstudio prints `keys()` where one is asked for that does not exist."""
        return ", ".join(self)


def channel_names(deforms: bool) -> tuple[str, ...]:
    """All that a picture of a run can show.

    Args:
        deforms: whether the field says where matter moves.
    """
    return tuple(name for name in LEGENDS if deforms or name not in ("motion", "deformation"))


@dataclass(frozen=True)
class FlatRays:
    """n rays of nerfstudio's, for the renderer."""

    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    times: Float[Tensor, "n 1"]
    """In [0, 1]; that of the first frame where the rays have none."""
    bounds: Bounds | None
    """Of the rays that have near and far planes: those are where a box cuts them."""


def flat_rays(bundle: "RayBundle") -> FlatRays:
    """The rays of a bundle of any shape."""
    origins = bundle.origins.reshape(-1, 3)
    return FlatRays(
        origins,
        bundle.directions.reshape(-1, 3),
        torch.zeros_like(origins[:, :1]) if bundle.times is None else bundle.times.reshape(-1, 1),
        None if bundle.nears is None or bundle.fars is None else (bundle.nears.reshape(-1), bundle.fars.reshape(-1)),
    )


def render_flat(model: "FieldModel", rays: FlatRays) -> dict[str, Tensor]:
    """`render_rays_chunked` with a model's settings, on white or the background nerfstudio has set (for a crop)."""
    from nerfstudio.model_components import renderers

    background = renderers.BACKGROUND_COLOR_OVERRIDE
    return render_rays_chunked(
        model.field,
        model.occupancy,
        rays.origins,
        rays.directions,
        rays.times,
        model.config.render_samples,
        background=None if background is None else background.to(rays.origins),
        chunk=model.config.eval_num_rays_per_chunk,
        bounds=rays.bounds,
    )


def camera_channels(model: "FieldModel", rays: "RayBundle") -> Channels:
    """All that a picture of the model can show.

    Args:
        rays: of one camera, [h, w], all of one time; without times the first frame is shown.

    Returns:
        "rgb", "accumulation", "depth" (world units) and, where the field has a deformation, "motion" (its length,
        world units), [h, w, 1 or 3]; "normals" and all other channels, on white, are made on demand. Those about views
        need the model's `views`.
    """
    from sv4d_ns.field.deformable import DeformableField

    shape, flat = rays.origins.shape[:-1], flat_rays(rays)
    out = render_flat(model, flat)
    picture = _Picture(model, flat.origins, flat.directions, flat.times, out, (int(shape[0]), int(shape[1])))
    ready = {"rgb": out["rgb"], "accumulation": out["alpha"][:, None], "depth": out["depth"][:, None]}
    makers = {"normals": picture.normals, "distance": picture.distance}
    if isinstance(model.field, DeformableField):
        ready["motion"] = out["motion"][:, None]
        makers["deformation"] = picture.deformation
    if model.views is not None:
        makers |= {name: getattr(picture, name) for name in ("visibility", "confidence", "side_by_side", "model_view")}
    return Channels({name: value.reshape(*shape, -1) for name, value in ready.items()}, makers)


@dataclass(frozen=True, eq=False)
class _Picture:
    """n = h * w rendered rays of one time."""

    model: "FieldModel"
    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    times: Float[Tensor, "n 1"]
    rendered: dict[str, Tensor]
    shape: tuple[int, int]

    @cached_property
    def _hit(self) -> Tensor:
        return (self.rendered["alpha"] >= 0.5).nonzero()[:, 0]

    @cached_property
    def _ends(self) -> Float[Tensor, "n 3"]:
        return self.origins + self.rendered["depth"][:, None] * self.directions

    @cached_property
    def _points(self) -> Float[Tensor, "m 3"]:
        return self._ends[self._hit]

    @cached_property
    def _all_normals(self) -> Float[Tensor, "n 3"]:
        return surface_normals(self.model.field, self._ends, self.rendered["alpha"], self.times)

    @cached_property
    def _visibility(self) -> "ViewVisibility":
        assert self.model.views is not None  # or no channel that asks for them exists
        return self.model.views.at(self.model.field, self.model.occupancy, float(self.times[0]))

    @cached_property
    def _weights(self) -> Float[Tensor, "m v"]:
        return self._visibility.weights(self._points, self._all_normals[self._hit])

    @property
    def _nearest_view(self) -> int:
        """The camera of the grid whose direction from the origin is nearest to this picture's."""
        cosine = torch.nn.functional.cosine_similarity(self._visibility.cameras[:, :3, 3], self.origins[:1])
        return int(cosine.argmax())

    def _on_white(self, colors: Float[Tensor, "m 3"]) -> Float[Tensor, "h w 3"]:
        alpha = self.rendered["alpha"][self._hit, None].clamp(max=1)
        image = self.origins.new_ones(len(self.origins), 3)
        image[self._hit] = colors.clamp(0, 1) * alpha + (1 - alpha)
        return image.reshape(*self.shape, 3)

    def normals(self) -> Float[Tensor, "h w 3"]:
        """In [0, 1]; grey where there is no surface."""
        return (0.5 + 0.5 * self._all_normals).reshape(*self.shape, 3)

    def distance(self) -> Float[Tensor, "h w 3"]:
        """Depth in colours that stay the same from picture to picture."""
        near = self.origins[:1].norm() - DISTANCE_RANGE
        return self._on_white(_colormap((self.rendered["depth"][self._hit] - near) / (2 * DISTANCE_RANGE), "turbo"))

    def deformation(self) -> Float[Tensor, "h w 3"]:
        """Offset of the surface from where it is in the canonical frame."""
        offset = -self.model.field.deformation(self._points, self.times[self._hit])
        return self._on_white(0.5 + 0.5 * offset / DEFORMATION_RANGE)

    def visibility(self) -> Float[Tensor, "h w 3"]:
        """Soft visibility from the camera of the grid that sees the surface best."""
        return self._on_white(_colormap(self._weights.amax(-1), "viridis"))

    def confidence(self) -> Float[Tensor, "h w 3"]:
        """Who has seen the surface: the input camera, generated views only (as far as they are believed), or none."""
        seen, generated = self._weights[:, :1], self._visibility.trusted(self._points, self._weights)[:, None]
        color = self._points.new_tensor
        by_views = generated * color(GENERATED_COLOR) + (1 - generated) * color(UNSEEN_COLOR)
        return self._on_white(seen * color(OBSERVED_COLOR) + (1 - seen) * by_views)

    def model_view(self) -> Float[Tensor, "h w 3"]:
        """The nearest view's pixels on the surface."""
        view = self._nearest_view
        texture = torch.from_numpy(self._visibility.picture(view)).to(self._points) / 255
        colors = sample_picture(texture, self._visibility.project(self._points, view))
        seen = (self._weights[:, view] > 0)[:, None]
        return self._on_white(torch.where(seen, colors, colors.new_full((1, 3), BLANK)))

    def side_by_side(self) -> Float[Tensor, "h w 3"]:
        """The nearest view beside the field from the same camera."""
        height, width = self.shape
        side = max(min(width // 2, height), 8)
        view, grid = self._nearest_view, self._visibility.grid
        model, time = self.model, float(self.times[0])
        c2w = self._visibility.cameras[view].cpu().numpy()
        made = over_white(render_rgba(model.field, model.occupancy, c2w, grid.plan.focal_px(side), side, time))
        seen = Image.fromarray(self._visibility.picture(view)).resize((side, side))
        canvas = Image.new("RGB", (max(width, 2 * side), max(height, side)), "white")
        left, top = (canvas.width - 2 * side) // 2, (canvas.height - side) // 2
        canvas.paste(seen, (left, top))
        canvas.paste(Image.fromarray(made), (left + side, top))
        draw = ImageDraw.Draw(canvas)
        name = "input video" if view == 0 else f"generated, {grid.plan.azimuths_deg[view - 1]:g} deg"
        draw.text((left + 4, top + side - 14), name, fill=(90, 90, 90))
        draw.text((left + side + 4, top + side - 14), "field", fill=(90, 90, 90))
        return torch.from_numpy(np.array(canvas)[:height, :width]).to(self.origins) / 255


@dataclass(frozen=True, eq=False)
class ViewVisibility:
    """What the v + 1 cameras of a view grid see of the field at one frame; camera 0 is the input's."""

    grid: ViewGrid
    frame: int
    cameras: Float[Tensor, "v 4 4"]
    depth: Float[Tensor, "v s s"]
    """Distance along each camera's rays to the field's surface."""

    def weights(self, points: Float[Tensor, "m 3"], normals: Float[Tensor, "m 3"]) -> Float[Tensor, "m v"]:
        """Soft visibility of surface points in [0, 1] from each camera; 0 where something hides them."""
        config = VisibilityConfig()
        focal = self.grid.plan.focal_px(DEPTH_MAP_SIZE)
        columns = []
        for camera, depth in zip(self.cameras, self.depth, strict=True):
            facing = soft_visibility(points, normals, camera[:3, 3], config.facing_edges)
            # a depth map's pixel covers a piece of surface, which is deep where it is seen at a grazing angle
            tolerance = config.occlusion_tolerance + self.grid.plan.radius / focal
            columns.append(facing * unoccluded(points, depth, camera, focal, tolerance))
        return torch.stack(columns, -1)

    def project(self, points: Float[Tensor, "m 3"], view: int) -> Float[Tensor, "m 2"]:
        """Places of points in a view's square picture, each coordinate in [0, 1]."""
        return project(points, self.cameras[view], self.grid.plan.focal_px(1), 1, 1)[0]

    def picture(self, view: int) -> np.ndarray:
        """A view's picture at this frame on white, uint8 [s, s, 3]."""
        if view == 0:
            return over_white(self.grid.input_frames[self.frame])
        return over_white(self.grid.novel_views[self.frame, view - 1])

    def trusted(self, points: Float[Tensor, "m 3"], weights: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
        """How well the generated views know the points: the best visibility times the view's confidence there."""
        best = torch.zeros_like(weights[:, 0])
        for view in range(1, len(self.cameras)):
            weight = weights[:, view]
            if self.grid.confidence is not None:
                trust = torch.from_numpy(self.grid.confidence[self.frame, view - 1]).to(points)[..., None] / 255
                weight = weight * sample_picture(trust, self.project(points, view))[:, 0]
            best = torch.maximum(best, weight)
        return best


class GridVisibility:
    """What views see of a field's frames; the newest are kept: a clip that plays asks for the same few again."""

    KEPT = 64

    def __init__(self, grid: Callable[[], ViewGrid]):
        """`grid` gives the view grid in use (stage 2 replaces it)."""
        self._grid = grid
        self._known: dict[int, tuple[tuple[int, ...], ViewVisibility]] = {}

    @torch.no_grad()
    def at(self, field: Any, occupancy: Any, time: float) -> ViewVisibility:
        """What the cameras see of a field at the frame nearest to `time` in [0, 1]."""
        grid = self._grid()
        frame = round(time * (grid.num_frames - 1))
        # the counters of in-place changes: a field in training gets new depth maps, a finished one keeps them
        state = tuple(parameter._version for parameter in field.parameters())
        known = self._known.get(frame)
        if known is None or known[0] != state or known[1].grid is not grid:
            cameras = torch.from_numpy(grid.plan.c2w()).to(field.aabb)
            time = float(grid.times[frame])
            focal = grid.plan.focal_px(DEPTH_MAP_SIZE)
            maps = [surface_map(field, occupancy, camera, focal, DEPTH_MAP_SIZE, time).depth for camera in cameras]
            depth = torch.stack(maps)
            known = (state, ViewVisibility(grid, frame, cameras, depth))
            self._known[frame] = known
            while len(self._known) > self.KEPT:
                del self._known[next(iter(self._known))]
        return known[1]


def _colormap(values: Float[Tensor, " m"], name: str) -> Float[Tensor, "m 3"]:
    from nerfstudio.utils.colormaps import apply_float_colormap

    return apply_float_colormap(values[:, None].clamp(0, 1), name)  # type: ignore[arg-type]
