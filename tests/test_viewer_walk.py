"""nerfstudio's viewers read every attribute of the pipeline and of all modules in it: none may raise or compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.viewer.utils import parse_object
from nerfstudio.viewer.viewer_elements import ViewerControl
from nerfstudio.viewer_legacy.server.gui_utils import parse_object as parse_object_legacy
from sv4d_ns.method_configs.four_diffusion import method as four_diffusion
from sv4d_ns.method_configs.sv4d import method as sv4d
from torch.utils._python_dispatch import TorchDispatchMode

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.views.grid import ViewGrid


class Operations(TorchDispatchMode):
    """Notes every operation torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def make_pipeline(name: str, folder: Path, test_mode: str) -> Any:
    pixels = np.full((3, 9, 16, 16, 4), 255, np.uint8)
    pixels[:, :, :4, :, 3] = 0
    ViewGrid(pixels[:, 0], pixels[:, 1:], ViewPlan.BUNDLED, fps=10).save(folder / "views")
    method = sv4d if name == "sv4d" else four_diffusion
    config = yaml.unsafe_load(yaml.dump(method.config.pipeline))
    config.datamanager.run_dir = folder
    if name == "4diffusion, shared occupancy":
        config.model.occupancy = "shared"
    return config.setup(device="cpu", test_mode=test_mode)


@pytest.mark.parametrize("parse", [parse_object, parse_object_legacy], ids=["viewer", "legacy viewer"])
@pytest.mark.parametrize("test_mode", ["val", "test", "inference"])
@pytest.mark.parametrize("name", ["sv4d", "4diffusion", "4diffusion, shared occupancy"])
def test_the_viewer_can_read_every_attribute(name: str, test_mode: str, parse: Any, tmp_path: Path) -> None:
    """As it does it: in training before the callbacks are set up, and in ns-viewer without any training."""
    pipeline = make_pipeline(name, tmp_path, test_mode)
    with Operations() as operations:
        found = parse(pipeline, ViewerControl, "Custom Elements")
    assert {path.rsplit("/", 1)[1] for path, _ in found} == {"playback", "start_camera"}
    assert not operations.names
    assert pipeline.datamanager._synthesizer is None and pipeline.datamanager._batch_sampler is None
    torch.set_flush_denormal(False)
