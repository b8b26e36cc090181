"""The measuring script itself: a mesh drawn at the input camera must match a volume rendering of its field."""

import sys
from pathlib import Path

import numpy as np
import pytest
from export_fixture import SwingingLimb, drawn, exported

from sv4d_ns.export.formats.asset import AnimatedMesh
from sv4d_ns.export.formats.gltf import write_animated_glb
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.views.grid import ViewGrid

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import export_fidelity

SIZE, TIMES = 96, np.linspace(0, 1, 4)


@pytest.fixture(scope="module")
def grid() -> ViewGrid:
    plan = ViewPlan.ring((90.0,), input_elevation_deg=20.0)
    field = SwingingLimb(density=400.0, edge=0.0015)
    frames = np.stack([drawn(field, plan, 0, float(t), SIZE) for t in TIMES])
    return ViewGrid(frames, frames[:, None], plan, fps=8.0)


@pytest.fixture(scope="module")
def mesh() -> AnimatedMesh:
    return exported(SwingingLimb(density=400.0, edge=0.0015), TIMES, 8.0, resolution=96, max_faces=20_000)


def test_renders_of_the_file_match_the_field(mesh, grid, tmp_path, capsys):
    write_animated_glb(mesh, tmp_path / "limb.glb", "limb", {})
    grid.save(tmp_path / "grid")
    export_fidelity.main(tmp_path / "limb.glb", grid=tmp_path / "grid", out=tmp_path / "sheet.png")
    comparison = export_fidelity.compare(export_fidelity.read_glb(tmp_path / "limb.glb"), grid)
    assert comparison.psnr.min() > 28
    assert comparison.iou.min() > 0.96
    assert f"{comparison.psnr[2]:6.2f} dB" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()


def test_a_wrong_frame_or_axis_scores_worse(mesh, grid, tmp_path):
    write_animated_glb(mesh, tmp_path / "limb.glb", "limb", {})
    glb = export_fidelity.read_glb(tmp_path / "limb.glb")
    right = export_fidelity.compare(glb, grid)
    for positions in (np.roll(glb.positions, 1, axis=0), glb.positions * [-1, 1, 1], glb.positions * [1, 1, -1]):
        wrong = export_fidelity.compare(
            export_fidelity.PlayedGlb(glb.seconds, positions, glb.faces, glb.linear_colors), grid
        )
        assert wrong.psnr.mean() < right.psnr.mean() - 3
