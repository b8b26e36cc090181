"""The layout of a run's folder, in one place.

outputs/<video>/sv4d/<timestamp>/
    config.yml  nerfstudio_models/step-*.ckpt     nerfstudio's own
    views/                                        stage 1's view grid (a nerfstudio dataset, see views.py)
    views_refined_<k>/                            stage 2's grid of round k (from 1)
    contact_sheet.png  summary.json               what came out
outputs/<video>/sv4d/.windows/<content hash>/     finished diffusion windows, shared by runs of the same video
"""

import re
from pathlib import Path

MAX_REFINE_ROUNDS = 8

VIEW_FOLDERS = ("views", *(f"views_refined_{k}" for k in range(1, MAX_REFINE_ROUNDS + 1)))
"""View grids in the order they are made; the last one that exists is the one the field is fitted to."""


def newest_views(run_dir: Path) -> Path | None:
    """The folder of the newest view grid of a run, or None before stage 1 has one."""
    existing = [run_dir / name for name in VIEW_FOLDERS if (run_dir / name).is_dir()]
    return existing[-1] if existing else None


def windows_folder(run_dir: Path, key: str) -> Path:
    """Where finished diffusion windows of the work `key` are kept between runs."""
    return run_dir.parent / ".windows" / key


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a nerfstudio_models folder, ascending (empty if there is no such folder)."""
    names = (re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("step-*.ckpt"))
    return sorted(int(name.group(1)) for name in names if name)
