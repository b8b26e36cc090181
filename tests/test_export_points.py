"""Point clouds and Gaussian splats that ride on the mesh."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from dense_splats import dense_rasterise
from export_fixture import SwingingLimb, exported

from sv4d_ns.export import files
from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.command import ExportMesh
from sv4d_ns.export.formats.gltf import from_gltf_axes
from sv4d_ns.export.formats.points import sample_points
from sv4d_ns.export.formats.sequence import write_point_clouds
from sv4d_ns.export.formats.splats import PROPERTIES, SH_C0, refine, sample_splats, write_splats
from sv4d_ns.export.make import Options
from sv4d_ns.geometry.cameras import ViewPlan

FPS, FRAMES = 12.0, 3


@pytest.fixture(scope="module")
def mesh():
    return exported(SwingingLimb(), np.linspace(0, 1, FRAMES), FPS, resolution=40, max_faces=1500)


def test_points_lie_evenly_on_the_surface(mesh):
    points = sample_points(mesh, 4000)
    for frame in range(FRAMES):
        solid = trimesh.Trimesh(mesh.positions[frame], mesh.faces, process=False)
        distance = np.abs(trimesh.proximity.closest_point(solid, points.positions[frame][::20])[1])
        assert distance.max() < 1e-5
    solid = trimesh.Trimesh(mesh.positions[0], mesh.faces, process=False)
    right = solid.area_faces[solid.triangles_center[:, 0] > 0].sum() / solid.area
    assert (points.positions[0][:, 0] > 0).mean() == pytest.approx(right, abs=0.02)


def test_points_keep_their_place_on_the_surface(mesh):
    points = sample_points(mesh, 500)
    for frame in range(FRAMES):
        np.testing.assert_allclose(points.on.at(mesh.positions[frame], mesh.faces), points.positions[frame], atol=1e-6)


def test_point_clouds_read_back(mesh, tmp_path):
    points = sample_points(mesh, 700)
    files = write_point_clouds(points, tmp_path / "points", FPS)
    assert [file.name for file in files] == [f"frame_{i:04d}.ply" for i in range(FRAMES)]
    for index, file in enumerate(files):
        read = trimesh.load(file)
        np.testing.assert_allclose(from_gltf_axes(read.vertices), points.positions[index], atol=1e-6)
        np.testing.assert_array_equal(read.colors[:, :3], points.colors)
        raw = read.metadata["_ply_raw"]["vertex"]["data"]
        np.testing.assert_array_equal(np.asarray(raw["confidence"]).ravel(), points.confidence)


def test_splats_have_the_standard_layout(mesh, tmp_path):
    splats = sample_splats(mesh, 900)
    files = write_splats(splats, tmp_path / "splats", FPS)
    data = files[1].read_bytes()
    header, body = data.split(b"end_header\n", 1)
    names = [line.split()[-1].decode() for line in header.splitlines() if line.startswith(b"property float")]
    assert tuple(names) == PROPERTIES
    rows = dict(zip(names, np.frombuffer(body, "<f4").reshape(900, -1).T, strict=True))
    np.testing.assert_allclose(
        from_gltf_axes(np.stack([rows["x"], rows["y"], rows["z"]], -1)), splats.positions[1], atol=1e-6
    )
    color = 0.5 + SH_C0 * np.stack([rows[f"f_dc_{i}"] for i in range(3)], -1)
    np.testing.assert_allclose(color, splats.colors, atol=1e-5)
    np.testing.assert_allclose(1 / (1 + np.exp(-rows["opacity"])), 0.95, atol=1e-5)
    np.testing.assert_allclose(np.exp(rows["scale_0"]), splats.scales[:, 0], rtol=1e-5)
    w, x, y, z = (rows[f"rot_{i}"] for i in range(4))
    np.testing.assert_allclose(w * w + x * x + y * y + z * z, 1, atol=1e-5)
    # the thin axis, turned by the quaternion, is the normal
    axis = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)
    np.testing.assert_allclose(axis, np.stack([rows["nx"], rows["ny"], rows["nz"]], -1), atol=1e-4)


def test_refinement_moves_splats_towards_the_pictures(mesh):
    plan, size = ViewPlan.ring((90.0,)), 40
    truth = sample_splats(mesh, 250)
    scene = dict(
        zip(("positions", "scales"), (truth.positions, np.repeat(truth.scales[:, :1] * 1.3, 3, 1)), strict=True)
    )

    def picture(splats, camera, frame):
        view = np.linalg.inv(plan.c2w()[camera] @ np.diag([1.0, -1, -1, 1]))
        focal = plan.focal_px(size)
        k = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]).float()
        as_tensor = lambda values: torch.as_tensor(values).float()  # noqa: E731
        rgb, alpha, _ = dense_rasterise(
            as_tensor(splats.positions[frame]), None, as_tensor(splats.scales), as_tensor(splats.opacities),
            as_tensor(splats.colors), as_tensor(view)[None], k[None], size, size,
        )  # fmt: skip
        straight = torch.cat([rgb[0] / alpha[0].clamp(min=1e-4), alpha[0]], -1)
        return Picture((straight.clamp(0, 1) * 255).byte().numpy(), plan.c2w()[camera], plan.focal_px(1), frame)

    shown = [picture(truth, camera, frame) for camera in (0, 1) for frame in range(FRAMES)]
    assert scene
    grey = type(truth)(truth.positions, truth.rotations, truth.scales, truth.opacities, np.full_like(truth.colors, 0.5))

    def error(splats):
        return np.mean([
            np.abs(picture(splats, camera, frame).rgba.astype(int) - shown[camera * FRAMES + frame].rgba).mean()
            for camera in (0, 1) for frame in range(FRAMES)
        ])  # fmt: skip

    better = refine(grey, shown, 60, dense_rasterise, "cpu")
    assert error(better) < 0.6 * error(grey)
    np.testing.assert_array_equal(better.rotations, grey.rotations)


def test_points_and_splats_are_taken_from_the_whole_surface(monkeypatch, tmp_path):
    asked = []

    def make_asset(run, options, terminal):
        asked.append(options.hide_webs)
        raise StopIteration

    monkeypatch.setattr(files, "make_asset", make_asset)
    with pytest.raises(StopIteration):
        files.write_point_clouds(None, Options(), tmp_path, 10, None)
    with pytest.raises(StopIteration):
        files.write_splats(None, Options(), tmp_path, 10, 0, None)
    assert asked == [False, False]


@pytest.mark.parametrize(
    "flags, hidden",
    [({}, True), ({"animation": "skin"}, False), ({"watertight": True}, False), ({"remesh": "quad"}, False)],
)
def test_webs_are_hidden_where_the_mesh_may_be_cut_for_it(flags, hidden):
    assert ExportMesh(load_config=Path("config.yml"), output_dir=Path("out"), **flags).options().hide_webs is hidden
