"""The GLB as another program reads it: by hand and by trimesh."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from export_fixture import SwingingLimb, exported
from export_reader import read_glb

from sv4d_ns.export.colour.texture import Atlas
from sv4d_ns.export.formats.asset import AnimatedMesh, Flipbook, RootMotion, Texture, with_texture
from sv4d_ns.export.formats.gltf import from_gltf_axes, linear_from_srgb, to_gltf_axes, write_animated_glb
from sv4d_ns.export.formats.sequence import stills, write_sequence
from sv4d_ns.export.rig import decompose
from sv4d_ns.export.surface.extraction import vertex_normals
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.utils.errors import InputError

FPS = 12.5


@pytest.fixture(scope="module")
def mesh() -> AnimatedMesh:
    return exported(SwingingLimb(), np.linspace(0, 1, 5), FPS, resolution=40, max_faces=1500)


@pytest.fixture(scope="module")
def glb(mesh, tmp_path_factory):
    path = tmp_path_factory.mktemp("glb") / "limb.glb"
    write_animated_glb(mesh, path, "limb", {"copyright": "CC0", "sv4d": {"seed": 3}})
    return path


def test_every_frame_reads_back(mesh, glb):
    seconds, positions = read_glb(glb).posed("POSITION")
    np.testing.assert_allclose(seconds, np.arange(5) / FPS, atol=1e-6)
    np.testing.assert_allclose(from_gltf_axes(positions), mesh.positions, atol=1e-6)
    _, normals = read_glb(glb).posed("NORMAL")
    np.testing.assert_allclose(from_gltf_axes(normals), mesh.normals, atol=1e-6)


def test_trimesh_reads_frame_zero_with_faces_and_linear_colours(mesh, glb):
    read = trimesh.load(glb, process=False, force="mesh")
    np.testing.assert_allclose(from_gltf_axes(read.vertices), mesh.positions[0], atol=1e-6)
    np.testing.assert_array_equal(read.faces, mesh.faces)
    assert read.volume > 0
    raw = read_glb(glb)
    colors = raw.attribute("COLOR_0") / 65535
    np.testing.assert_allclose(colors[:, :3], linear_from_srgb(mesh.colors), atol=1e-5)
    np.testing.assert_array_equal(colors[:, 3], 1)


def test_normals_are_those_of_every_frames_surface(mesh, glb):
    _, positions = read_glb(glb).posed("POSITION")
    _, normals = read_glb(glb).posed("NORMAL")
    for frame in range(5):
        np.testing.assert_allclose(normals[frame], vertex_normals(positions[frame], mesh.faces), atol=2e-3)


def test_confidence_is_an_attribute(mesh, glb):
    np.testing.assert_array_equal(read_glb(glb).attribute("_CONFIDENCE")[:, 0], mesh.confidence)
    assert set(np.unique(mesh.confidence)) == {0, 0.5, 1}


@pytest.fixture(scope="module")
def textured(mesh):
    """Every face its own chart in a picture of gradients: all vertices are doubled, as along seams."""
    cut = mesh.faces.ravel()
    uv = np.random.default_rng(0).random((len(cut), 2)).astype(np.float32)
    image = np.stack(np.meshgrid(*[np.linspace(0, 255, 64)] * 2), -1)
    image = np.concatenate([image, np.full((64, 64, 1), 90)], -1).astype(np.uint8)
    return with_texture(mesh, Atlas(cut, np.arange(len(cut)).reshape(-1, 3), uv, 64), Texture(uv, image))


def test_texture_reads_back(mesh, textured, tmp_path):
    write_animated_glb(textured, tmp_path / "t.glb", "limb", {})
    raw = read_glb(tmp_path / "t.glb")
    np.testing.assert_array_equal(raw.attribute("TEXCOORD_0"), textured.texture.uv)
    assert "COLOR_0" not in raw.primitive["attributes"]  # it would tint the texture
    texture = raw.json["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["index"]
    assert raw.json["textures"][texture]["source"] == 0
    np.testing.assert_allclose(raw.image().astype(int), textured.texture.image, atol=4)
    _, positions = raw.posed("POSITION")
    np.testing.assert_allclose(from_gltf_axes(positions)[:, raw.accessor(raw.primitive["indices"])[:, 0]],
                               mesh.positions[:, mesh.faces.ravel()], atol=1e-6)  # fmt: skip
    read = trimesh.load(tmp_path / "t.glb", process=False, force="mesh")
    uv = np.asarray(read.visual.uv)  # trimesh's v runs up
    np.testing.assert_allclose(uv * [1, -1] + [0, 1], textured.texture.uv, atol=1e-6)


@pytest.mark.parametrize("skinned", [False, True])
def test_a_texture_of_each_frame_is_moved_into_sight(textured, tmp_path, skinned):
    moments = np.stack([np.full((32, 32, 3), 40 * number, np.uint8) for number in range(4)])
    shown = np.array([0, 0, 1, 2, 3])
    flipping = replace(textured, texture=replace(textured.texture, moments=Flipbook(moments, shown)))
    skin = decompose(textured.positions, 0.01, 4) if skinned else None
    write_animated_glb(flipping, tmp_path / "t.glb", "limb", {}, skin)
    raw = read_glb(tmp_path / "t.glb")
    assert set(raw.json["extensionsUsed"]) == {"KHR_texture_transform", "KHR_animation_pointer"}
    assert "extensionsRequired" not in raw.json, "a viewer that knows neither shows the whole clip's picture"
    image, uv = raw.image(), raw.attribute("TEXCOORD_0")
    assert image.shape == (96, 96, 3)  # two by two cells of 32 for the whole clip, five more around them
    np.testing.assert_allclose(image[:64, :64].astype(int), textured.texture.image, atol=4)
    np.testing.assert_allclose(uv * 96, textured.texture.uv * 64, atol=1e-4)
    offsets, scales = raw.texture_moves()
    for frame, (offset, scale) in enumerate(zip(offsets, scales, strict=True)):
        at = (96 * (offset + scale * np.array([1 / 3, 1 / 3]))).astype(int)  # the middle of the picture
        np.testing.assert_allclose(image[at[1], at[0]], 40 * shown[frame], atol=4)
    seconds = raw.skinned()[0] if skinned else raw.posed("POSITION")[0]
    assert len(offsets) == len(seconds) == 5


@pytest.mark.parametrize("skinned", [False, True])
def test_root_motion_moves_the_node(mesh, tmp_path, skinned):
    way = np.stack([np.linspace(0, 1, 5), np.zeros(5), np.linspace(0, -0.5, 5)], -1)
    moving = replace(mesh, root=RootMotion(way))
    skin = decompose(mesh.positions, 0.01, 4) if skinned else None
    write_animated_glb(moving, tmp_path / "root.glb", "limb", {}, skin)
    raw = read_glb(tmp_path / "root.glb")
    node = raw.json["skins"][0]["skeleton"] if skinned else 0
    np.testing.assert_allclose(from_gltf_axes(raw.channels()[node, "translation"][1]), way, atol=1e-6)
    if skinned:
        np.testing.assert_allclose(from_gltf_axes(raw.skinned()[1]), skin.posed(mesh.positions[0]) + way[:, None],
                                   atol=1e-5)  # fmt: skip
    np.testing.assert_allclose([frame.positions for frame in stills(moving)], mesh.positions + way[:, None], atol=1e-6)


def test_material_clip_and_provenance(glb):
    raw = read_glb(glb).json
    (material,) = raw["materials"]
    assert raw["meshes"][0]["primitives"][0]["material"] == 0
    assert material["doubleSided"]
    pbr = material["pbrMetallicRoughness"]
    assert (pbr["baseColorFactor"], pbr["metallicFactor"], pbr["roughnessFactor"]) == ([1, 1, 1, 1], 0, 1)
    (clip,) = raw["animations"]
    assert clip["name"] == "limb"
    assert raw["asset"]["extras"]["sv4d"] == {"seed": 3}
    assert raw["asset"]["copyright"] == "CC0"
    assert raw["asset"]["generator"].startswith("sv4d_ns ")


def test_stated_bounds_are_the_data(glb):
    raw = read_glb(glb)
    bounded = [i for i, entry in enumerate(raw.json["accessors"]) if "min" in entry]
    assert len(bounded) == 1 + 4 + 1  # base positions, four targets, key times
    for index in bounded:
        np.testing.assert_array_equal(raw.accessor(index).min(axis=0), raw.json["accessors"][index]["min"])
        np.testing.assert_array_equal(raw.accessor(index).max(axis=0), raw.json["accessors"][index]["max"])


def test_the_side_the_input_camera_saw_faces_plus_z():
    camera = look_at_cameras(np.array([0.0]), np.array([0.0]))[0]
    right, up, back = to_gltf_axes(camera[:3, :3].T)
    np.testing.assert_allclose(np.stack([right, up, back]), np.eye(3), atol=1e-12)
    assert np.linalg.det(to_gltf_axes(np.eye(3))) == pytest.approx(1)


def test_srgb_decoding():
    np.testing.assert_allclose(
        linear_from_srgb(np.array([[0, 10, 128], [188, 255, 1]], np.uint8)),
        [[0, 0.003035, 0.215861], [0.502886, 1, 0.000304]],
        atol=1e-6,
    )


def test_a_still_is_a_plain_mesh(mesh, tmp_path):
    still = replace(mesh, positions=mesh.positions[:1], normals=mesh.normals[:1])
    write_animated_glb(still, tmp_path / "still.glb", "still", {})
    raw = read_glb(tmp_path / "still.glb").json
    assert "animations" not in raw or raw["animations"] == []
    assert not raw["meshes"][0]["primitives"][0].get("targets")


def test_failed_write_leaves_the_old_file(mesh, tmp_path):
    path = tmp_path / "limb.glb"
    path.write_bytes(b"before")
    with pytest.raises(TypeError):
        write_animated_glb(mesh, path, "limb", {"not json": object()})
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file_format", ["obj", "ply"])
def test_sequence_reads_back_in_trimesh(mesh, tmp_path, file_format):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "frame_9999.obj").touch()  # of a longer export before
    files = write_sequence(stills(mesh), tmp_path / "frames", file_format, FPS)
    assert [file.name for file in files] == [f"frame_{i:04d}.{file_format}" for i in range(5)]
    assert sorted((tmp_path / "frames").iterdir()) == files
    assert list(tmp_path.iterdir()) == [tmp_path / "frames"]
    for index in (0, 3):
        read = trimesh.load(files[index], process=False, maintain_order=True)
        np.testing.assert_allclose(from_gltf_axes(read.vertices), mesh.positions[index], atol=2e-6)
        np.testing.assert_array_equal(read.faces, mesh.faces)
        np.testing.assert_allclose(np.asarray(read.visual.vertex_colors)[:, :3], mesh.colors, atol=1)
        np.testing.assert_allclose(from_gltf_axes(read.vertex_normals), mesh.normals[index], atol=1e-3)


def test_a_sequence_leaves_what_else_lies_in_its_folder(mesh, tmp_path):
    folder = tmp_path / "frames"
    (folder / "of mine").mkdir(parents=True)
    for name in ("scan.ply", "of mine/frame_0000.ply"):
        (folder / name).write_text(name)
    (folder / "frame_0007.ply").write_text("of a longer export before")
    files = write_sequence(stills(mesh), folder, "ply", FPS)
    assert (folder / "scan.ply").read_text() == "scan.ply"
    assert (folder / "of mine" / "frame_0000.ply").read_text() == "of mine/frame_0000.ply"
    assert sorted(folder.glob("frame_*")) == files and list(tmp_path.iterdir()) == [folder]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is a file: move it away"):
        write_sequence(stills(mesh), tmp_path / "file", "ply", FPS)
    assert (tmp_path / "file").read_text() == "mine"


def test_textured_obj_names_its_image(textured, tmp_path):
    files = write_sequence(stills(textured), tmp_path / "frames", "obj", FPS)
    read = trimesh.load(files[2], process=False, maintain_order=True)
    np.testing.assert_allclose(np.asarray(read.visual.uv) * [1, -1] + [0, 1], textured.texture.uv, atol=2e-6)
    np.testing.assert_allclose(np.asarray(read.visual.material.image).astype(int), textured.texture.image, atol=4)
    np.testing.assert_allclose(from_gltf_axes(read.vertices), textured.positions[2], atol=2e-6)
