"""One moment of a view grid as a nerfstudio data set: `ns-train splatfacto --data RUN/views sv4d-moment --frame 10`.

nerfstudio's own parser reads a grid too, but all of its moments at once, which ghosts in a method that knows no time.

nerfstudio loads its plugins' data parsers before anything else of theirs, and before the modules of its own that warn
when they are imported: the known warnings are silenced from here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from sv4d_ns.plugin.quiet import silence_known_warnings
from sv4d_ns.utils.errors import InputError, one_sentence_errors

silence_known_warnings()


@dataclass
class MomentDataParserConfig(DataParserConfig):
    """Which moment of which grid."""

    _target: type = field(default_factory=lambda: Moment)
    data: Path = Path()
    """The folder of a view grid (grid.json): a run's `views`, for one."""
    frame: int = 0
    """The moment, counted from 0."""


class Moment(DataParser):
    """All views of a grid at one moment, for training and evaluation alike."""

    config: MomentDataParserConfig

    def _generate_dataparser_outputs(self, split: str = "train", **_: Any) -> DataparserOutputs:
        """Cameras and files.

        Raises:
            SystemExit: the folder is no grid, or has no such moment.
        """
        from nerfstudio.cameras.cameras import Cameras, CameraType
        from nerfstudio.data.scene_box import SceneBox

        from sv4d_ns.geometry.cameras import OBJECT_BOX
        from sv4d_ns.views.grid import ViewGrid, image_name

        with one_sentence_errors():
            grid, frame = ViewGrid.load(self.config.data), self.config.frame
            if not 0 <= frame < grid.num_frames:
                raise InputError(f"--frame {frame} is not in {self.config.data}: give 0 to {grid.num_frames - 1}.")
        views = range(grid.num_views + 1)
        sizes = [grid.input_frames.shape[1], *[grid.novel_views.shape[2]] * grid.num_views]
        size = torch.tensor(sizes)[:, None]
        focal = torch.tensor([grid.plan.focal_px(pixels) for pixels in sizes])[:, None]
        return DataparserOutputs(
            image_filenames=[self.config.data / image_name("images", view, frame) for view in views],
            cameras=Cameras(
                camera_to_worlds=torch.from_numpy(grid.plan.c2w()[:, :3]).float(),
                fx=focal,
                fy=focal,
                cx=size / 2,
                cy=size / 2,
                width=size,
                height=size,
                camera_type=CameraType.PERSPECTIVE,
            ),
            alpha_color=torch.ones(3),
            scene_box=SceneBox(aabb=torch.tensor([[-OBJECT_BOX] * 3, [OBJECT_BOX] * 3])),
        )


specification = DataParserSpecification(
    config=MomentDataParserConfig(), description="One moment of a view grid of sv4d_ns."
)
