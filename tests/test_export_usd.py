"""USD files read back with Pixar's library."""

import json
from dataclasses import replace

import numpy as np
import pytest
from export_fixture import SwingingLimb, exported

from sv4d_ns.export.colour.texture import Atlas
from sv4d_ns.export.formats.asset import Texture, with_texture
from sv4d_ns.export.formats.gltf import from_gltf_axes, linear_from_srgb
from sv4d_ns.export.formats.sequence import Still, stills
from sv4d_ns.export.formats.usd import write_usd

pytest.importorskip("pxr")
from pxr import Usd, UsdGeom, UsdShade, UsdUtils

FPS, EXTRAS = 12.0, {"sv4d": {"seed": 3, "nothing": None}}


@pytest.fixture(scope="module")
def mesh():
    return exported(SwingingLimb(), np.linspace(0, 1, 4), FPS, resolution=40, max_faces=800)


def opened(path):
    stage = Usd.Stage.Open(str(path))
    (mesh,) = (UsdGeom.Mesh(prim) for prim in stage.Traverse() if prim.IsA(UsdGeom.Mesh))
    return stage, mesh


def surface_color(mesh):
    """The shader that feeds the bound surface's diffuse colour."""
    material, _ = UsdShade.MaterialBindingAPI(mesh).ComputeBoundMaterial()
    surface, _, _ = material.ComputeSurfaceSource()
    return UsdShade.Shader(surface.GetInput("diffuseColor").GetConnectedSources()[0][0].source.GetPrim())


@pytest.mark.parametrize("suffix", ["usdc", "usdz"])
def test_every_frame_reads_back(mesh, tmp_path, suffix):
    (path,) = write_usd(list(stills(mesh)), tmp_path / f"mesh.{suffix}", "my fox!", FPS, EXTRAS)
    stage, read = opened(path)
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    assert (stage.GetStartTimeCode(), stage.GetEndTimeCode(), stage.GetTimeCodesPerSecond()) == (0, 3, FPS)
    assert read.GetPointsAttr().GetTimeSamples() == read.GetNormalsAttr().GetTimeSamples() == [0, 1, 2, 3]
    for frame in range(4):
        points = np.array(read.GetPointsAttr().Get(frame))
        np.testing.assert_allclose(from_gltf_axes(points), mesh.positions[frame], atol=1e-6)
        np.testing.assert_allclose(from_gltf_axes(np.array(read.GetNormalsAttr().Get(frame))), mesh.normals[frame],
                                   atol=1e-6)  # fmt: skip
        np.testing.assert_allclose(np.array(read.GetExtentAttr().Get(frame)), [points.min(0), points.max(0)])
    np.testing.assert_array_equal(np.array(read.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3), mesh.faces)
    assert not read.GetFaceVertexIndicesAttr().GetTimeSamples()
    colors = np.array(read.GetDisplayColorAttr().Get())
    np.testing.assert_allclose(colors, linear_from_srgb(mesh.colors), atol=1e-6)
    np.testing.assert_array_equal(np.array(UsdGeom.PrimvarsAPI(read).GetPrimvar("confidence").Get()), mesh.confidence)
    assert json.loads(stage.GetRootLayer().customLayerData["sv4d"]) == EXTRAS["sv4d"]
    assert surface_color(read).GetIdAttr().Get() == "UsdPrimvarReader_float3"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["usdc", "usdz"])
def test_texture_travels_along(mesh, tmp_path, suffix):
    cut = mesh.faces.ravel()
    uv = np.random.default_rng(0).random((len(cut), 2)).astype(np.float32)
    image = np.full((64, 64, 3), 128, np.uint8)
    textured = with_texture(mesh, Atlas(cut, np.arange(len(cut)).reshape(-1, 3), uv, 64), Texture(uv, image))
    files = write_usd(list(stills(textured)), tmp_path / f"mesh.{suffix}", "fox", FPS, EXTRAS)
    assert sorted(tmp_path.iterdir()) == sorted(files) and len(files) == (1 if suffix == "usdz" else 2)
    _, read = opened(files[0])
    st = np.array(UsdGeom.PrimvarsAPI(read).GetPrimvar("st").Get())
    np.testing.assert_allclose(st * [1, -1] + [0, 1], uv, atol=1e-6)
    texture = surface_color(read)
    assert texture.GetInput("sourceColorSpace").Get() == "sRGB"
    assert texture.GetInput("file").Get().resolvedPath  # found next to the layer or inside the package
    layers, assets, missing = UsdUtils.ComputeAllDependencies(str(files[0]))
    assert len(layers) == 1 and len(assets) == 1 and not missing


def test_root_motion_is_the_prims_own(mesh, tmp_path):
    way = np.stack([np.linspace(0, 1, 4), np.zeros(4), np.linspace(0, 2, 4)], -1)
    (path,) = write_usd(list(stills(mesh)), tmp_path / "mesh.usdc", "fox", FPS, {}, way)
    _, read = opened(path)
    for frame in range(4):
        world = UsdGeom.Xformable(read).ComputeLocalToWorldTransform(frame)
        np.testing.assert_allclose(from_gltf_axes(np.array(world.ExtractTranslation())), way[frame], atol=1e-6)


def test_topology_that_changes_has_time_samples(mesh, tmp_path):
    first = next(stills(mesh))
    frames = [first, Still(first.positions, first.faces[:100], first.normals, first.colors, first.confidence)]
    (path,) = write_usd(frames, tmp_path / "mesh.usdc", "fox", FPS, {})
    _, read = opened(path)
    assert [len(read.GetFaceVertexCountsAttr().Get(frame)) for frame in range(2)] == [len(first.faces), 100]


def test_a_failed_write_leaves_nothing(mesh, tmp_path):
    bad = [replace_positions(frame) for frame in stills(mesh)]
    with pytest.raises((TypeError, ValueError, IndexError)):
        write_usd(bad, tmp_path / "mesh.usdc", "fox", FPS, {})
    assert list(tmp_path.iterdir()) == []


def replace_positions(frame: Still) -> Still:
    return replace(frame, positions=frame.positions[:, :2])
