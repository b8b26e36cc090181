"""Where the viewer stands when a browser connects."""

from typing import TYPE_CHECKING, Any

import numpy as np
from nerfstudio.viewer.viewer_elements import ViewerControl

from sv4d_ns.cameras import CAMERA_RADIUS, look_at_cameras

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer

AZIMUTH_DEG, ELEVATION_DEG = 30.0, 15.0
"""A little beside and above the input camera, so that the first look shows that the object is not flat."""


class StartCamera(ViewerControl):
    """Puts a new client's camera where the whole object is in view; found by nerfstudio on the pipeline."""

    def _setup(self, viewer: "Viewer") -> None:
        super()._setup(viewer)
        viewer.viser_server.on_client_connect(self._place)

    def _place(self, client: Any) -> None:
        from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO

        camera = look_at_cameras(np.array([AZIMUTH_DEG]), np.array([ELEVATION_DEG]), CAMERA_RADIUS)[0]
        with client.atomic():
            client.camera.position = tuple(VISER_NERFSTUDIO_SCALE_RATIO * camera[:3, 3])
            client.camera.look_at = (0.0, 0.0, 0.0)
