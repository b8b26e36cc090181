"""A run's folder without any training: a small grid, a field of random numbers, and the files nerfstudio opens."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sv4d_ns.method_configs.four_diffusion import method as four_diffusion
from sv4d_ns.method_configs.sv4d import method as sv4d

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.views.grid import ViewGrid

METHODS = {"sv4d": sv4d, "4diffusion": four_diffusion}
SIZE = 16


def tiny_grid(frames: int = 3) -> ViewGrid:
    """Squares in the lower three quarters of every picture."""
    pixels = np.full((frames, 9, SIZE, SIZE, 4), 255, np.uint8)
    pixels[:, :, : SIZE // 4, :, 3] = 0
    return ViewGrid(pixels[:, 0], pixels[:, 1:], ViewPlan.BUNDLED, fps=10)


def tiny_config(method: str, folder: Path, **changes: Any) -> Any:
    """The method's own configuration, of a run in `folder`/video/METHOD/now."""
    config = yaml.unsafe_load(yaml.dump(METHODS[method].config))
    config.experiment_name, config.timestamp, config.output_dir = "video", "now", folder
    for name, value in changes.items():
        setattr(config, name, value)
    config.pipeline.datamanager.run_dir = config.get_base_dir()
    return config


def write_tiny_run(method: str, folder: Path) -> Path:
    """Make such a run below `folder`; returns its folder."""
    config = tiny_config(method, folder)
    run = config.get_base_dir()
    tiny_grid().save(run / "views")
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    checkpoints = config.get_checkpoint_dir()
    checkpoints.mkdir(parents=True)
    torch.save({"step": 4, "pipeline": pipeline.state_dict()}, checkpoints / "step-000000004.ckpt")
    (run / "config.yml").write_text(yaml.dump(config), "utf8")
    return run
