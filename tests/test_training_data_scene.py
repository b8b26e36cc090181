"""GLBs read and posed: node animation, skins, morph targets, odd accessors, and files that cannot be used."""

import json
import struct

import numpy as np
import pygltflib
import pytest
from glb_fixture import BOX_FACES, Glb, box, solid, waving

from sv4d_ns.training_data import gltf_scene
from sv4d_ns.training_data.blender import AssetError
from sv4d_ns.training_data.gltf_scene import Scene, load_scene, pose

HALF = np.sqrt(0.5)


def z_up(points):
    """(x, y, z) of glTF is (x, -z, y) here."""
    points = np.asarray(points, dtype=float)
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def corners(scene, clip, time):
    """Posed corners in the order of the faces, so that it does not matter whether the reader split them."""
    return pose(scene, clip, time).positions[scene.faces]


def test_nodes_move_by_all_three_interpolations(tmp_path):
    glb = Glb()
    points, faces = box()
    parent = glb.node(translation=[0.0, 5.0, 0.0], scale=[2.0, 2.0, 2.0], children=[1])
    child = glb.node(root=False, mesh=glb.mesh(glb.primitive(points, faces)))
    glb.clip("line", (child, "rotation", "LINEAR", [0, 2], [[0, 0, 0, 1], [0, 0, HALF, HALF]]))
    glb.clip("step", (parent, "translation", "STEP", [0, 1], [[0, 0, 0], [7, 0, 0]]))
    spline = [[[0, 0, 0], [0, 0, 0], [3, 0, 0]], [[-3, 0, 0], [4, 0, 0], [0, 0, 0]]]
    glb.clip("spline", (child, "translation", "CUBICSPLINE", [1, 3], np.array(spline).reshape(6, 3)))
    scene = load_scene(glb.save(tmp_path / "a.glb"))
    rest = points[scene_faces(scene, points)]
    np.testing.assert_allclose(corners(scene, None, 0.0), z_up(2 * rest + [0, 5, 0]), atol=1e-6)
    # half way of 90 degrees about z is 45 degrees, not the mean of the quaternions
    turn = np.array([[HALF, -HALF, 0], [HALF, HALF, 0], [0, 0, 1]])
    np.testing.assert_allclose(corners(scene, 0, 1.0), z_up(2 * rest @ turn.T + [0, 5, 0]), atol=1e-6)
    for time, x in ((-1.0, 0.0), (0.99, 0.0), (1.0, 7.0), (5.0, 7.0)):
        np.testing.assert_allclose(corners(scene, 1, time), z_up(2 * rest + [x, 0, 0]), atol=1e-6)
    # Hermite at t = 1/2 over 2 s: (4 / 2) + 2 * (3 / 8) - 2 * (-3 / 8)
    np.testing.assert_allclose(
        corners(scene, 2, 2.0), z_up(2 * (rest + np.array([2 + 2 * 3 / 8 + 2 * 3 / 8, 0, 0])) + [0, 5, 0]), atol=1e-6
    )
    assert scene.clip("step") == 1 and scene.clip(2) == 2
    np.testing.assert_allclose(scene.clip_spans, [[0, 2], [0, 1], [1, 3]])
    with pytest.raises(AssetError, match=r"no clip 'run' \(it has line, step, spline\)"):
        scene.clip("run")


def scene_faces(scene, points):
    """For each posed corner, the source point it came from."""
    distance = np.linalg.norm(scene.positions[:, None] - points[None], axis=-1)
    assert distance.min(axis=1).max() < 1e-6
    return distance.argmin(axis=1)[scene.faces]


def test_a_skin_bends_as_its_matrices_say(tmp_path):
    glb = Glb()
    points, faces = box((0.5, 1.0, 0.5), (0.0, 1.0, 0.0))
    share = np.clip(points[:, 1] - 0.5, 0.0, 1.0)  # 0 at the foot, 1 at the head
    share[points[:, 0] > 0] *= 0.5  # corners with two bones
    weights = np.stack([1 - share, share, 0 * share, 0 * share], axis=1)
    joints = np.tile([0, 1, 0, 0], (8, 1))
    root = glb.node(children=[1])
    tip = glb.node(root=False, translation=[0.0, 1.0, 0.0])
    binds = np.stack([np.eye(4), np.eye(4)])
    binds[1, 1, 3] = -1.0
    matrices = glb.array(binds.transpose(0, 2, 1).reshape(2, 16))
    glb.document.skins.append(pygltflib.Skin(joints=[root, tip], inverseBindMatrices=matrices))
    mesh = glb.mesh(glb.primitive(points, faces, JOINTS_0=joints, WEIGHTS_0=weights))
    glb.node(mesh=mesh, skin=0, translation=[9.0, 9.0, 9.0])  # a skinned mesh's own node does not count
    glb.clip("bend", (tip, "rotation", "LINEAR", [0, 1], [[0, 0, 0, 1], [HALF, 0, 0, HALF]]))
    scene = load_scene(glb.save(tmp_path / "a.glb"))
    which = scene_faces(scene, points)
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # 90 degrees about x
    bent = (points - [0, 1, 0]) @ turn.T + [0, 1, 0]
    expected = (1 - share)[:, None] * points + share[:, None] * bent
    np.testing.assert_allclose(corners(scene, None, 0.0), z_up(points)[which], atol=1e-6)
    np.testing.assert_allclose(corners(scene, 0, 1.0), z_up(expected)[which], atol=1e-6)
    normals = pose(scene, 0, 1.0).normals
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, atol=1e-6)


def test_morph_targets_add_up(tmp_path):
    glb = Glb()
    points, faces = box()
    first, second = np.zeros((8, 3)), np.zeros((8, 3))
    first[6], second[:] = (1, 2, 3), (0, 0.5, 0)
    normals = points / np.sqrt(3)
    mesh = glb.mesh(glb.primitive(points, faces, targets=(first, second), NORMAL=normals), weights=[0.0, 1.0])
    node = glb.node(mesh=mesh)
    glb.clip("smile", (node, "weights", "LINEAR", [0, 1], np.array([0.0, 0.0, 2.0, 0.5])))
    scene = load_scene(glb.save(tmp_path / "a.glb"))
    np.testing.assert_allclose(pose(scene, None, 0.0).positions, z_up(points + second), atol=1e-6)
    np.testing.assert_allclose(pose(scene, 0, 0.5).positions, z_up(points + first + 0.25 * second), atol=1e-6)
    # without normals the reader splits the corners, and the target follows them
    flat = Glb()
    node = flat.node(mesh=flat.mesh(flat.primitive(points, faces, targets=(first, second))))
    flat.clip("smile", (node, "weights", "LINEAR", [0, 1], np.array([0.0, 0.0, 2.0, 0.5])))
    split = load_scene(flat.save(tmp_path / "b.glb"))
    assert len(split.positions) == 36
    np.testing.assert_allclose(
        corners(split, 0, 0.5), z_up(points + first + 0.25 * second)[scene_faces(split, points)], atol=1e-6
    )


def test_sparse_normalised_and_strip_data_are_read(tmp_path):
    glb = Glb()
    positions = np.zeros((4, 3))
    positions[:, :2] = [[0, 0], [1, 0], [0, 1], [1, 1]]
    colours = np.array([[255, 0, 0, 255], [0, 51, 0, 255], [0, 0, 255, 255], [255, 255, 255, 255]])
    primitive = glb.primitive(positions, [0, 1, 2, 3], mode=5)
    primitive.attributes.COLOR_0 = glb.array(colours, "uint8", normalized=True)
    accessor = glb.document.accessors[primitive.attributes.POSITION]
    accessor.sparse = pygltflib.Sparse(
        count=1,
        indices=pygltflib.AccessorSparseIndices(bufferView=glb.raw(np.uint16([3]).tobytes()), componentType=5123),
        values=pygltflib.AccessorSparseValues(bufferView=glb.raw(np.float32([1, 1, 5]).tobytes())),
    )
    glb.node(mesh=glb.mesh(primitive))
    scene = load_scene(glb.save(tmp_path / "a.glb"))
    assert scene.faces.shape == (2, 3)
    assert scene.positions.max() == 5.0, "the sparse value replaced the stored one"
    assert np.isclose(scene.colours[:, 1], 0.2).any()
    a, b, c = (scene.positions[scene.faces[:, k]] for k in range(3))
    normals = np.cross(b - a, c - a)
    assert abs(np.sign(normals[:, 2]).sum()) == 2, "every second triangle of a strip is turned round"


def test_a_scene_is_kept_as_arrays(tmp_path):
    scene = load_scene(waving(tmp_path / "a.glb"))
    scene.save(tmp_path / "kept.npz")
    again = Scene.open(tmp_path / "kept.npz")
    np.testing.assert_array_equal(pose(again, 0, 0.3).positions, pose(scene, 0, 0.3).positions)
    assert list(again.clip_names) == ["wave", "bow"] and again.num_bytes == scene.num_bytes


def required(path, name):
    glb = Glb()
    glb.node(mesh=glb.mesh(glb.primitive(*box())))
    glb.document.extensionsRequired = glb.document.extensionsUsed = [name]
    return glb.save(path)


@pytest.mark.parametrize("name", ["KHR_draco_mesh_compression", "EXT_meshopt_compression"])
def test_compressed_meshes_name_a_converter(tmp_path, name):
    with pytest.raises(AssetError, match=r"compressed: unpack it with gltf-transform"):
        load_scene(required(tmp_path / "a.glb", name))


def test_ktx2_textures_name_a_converter(tmp_path):
    glb = Glb()
    texture = glb.texture(np.zeros((2, 2, 3)))
    material = glb.material(texture=texture)
    glb.document.textures[texture] = pygltflib.Texture(extensions={"KHR_texture_basisu": {"source": 0}})
    glb.node(mesh=glb.mesh(glb.primitive(*box(), material, TEXCOORD_0=np.zeros((8, 2)))))
    with pytest.raises(AssetError, match=r"KTX2: turn them into PNG with 'gltf-transform"):
        load_scene(glb.save(tmp_path / "a.glb"))


def test_unusable_files_say_why(tmp_path):
    def reason(path):
        with pytest.raises(AssetError) as caught:
            load_scene(path)
        return str(caught.value)

    empty = Glb()
    empty.node()
    assert "no faces" in reason(empty.save(tmp_path / "empty.glb"))
    points = Glb()
    points.node(mesh=points.mesh(points.primitive(box()[0], [0, 1, 2], mode=0)))
    assert "no faces" in reason(points.save(tmp_path / "points.glb"))
    broken = box()[0]
    broken[3, 1] = np.nan
    assert "not finite" in reason(solid(tmp_path / "nan.glb", (broken, BOX_FACES)))
    assert "a face names a vertex" in reason(solid(tmp_path / "index.glb", (box()[0], BOX_FACES + 5)))
    huge = Glb()
    primitive = huge.primitive(*box())
    huge.document.accessors[primitive.indices] = pygltflib.Accessor(componentType=5125, count=3_000_000, type="SCALAR")
    huge.node(mesh=huge.mesh(primitive))
    assert "1000000 faces" in reason(huge.save(tmp_path / "huge.glb"))
    crowd = Glb()
    crowd.node(mesh=crowd.mesh(crowd.primitive(*box())))
    crowd.document.skins.append(pygltflib.Skin(joints=[0] * 1000))
    assert "1000 joints" in reason(crowd.save(tmp_path / "crowd.glb"))
    loop = Glb()
    loop.node(mesh=loop.mesh(loop.primitive(*box())), children=[0])
    assert "own ancestor" in reason(loop.save(tmp_path / "loop.glb"))
    outside = Glb()
    outside.node(mesh=outside.mesh(outside.primitive(*box(), outside.material(texture=outside.texture([[[9, 9, 9]]])))))
    outside.document.images[0] = pygltflib.Image(uri="skin.png")
    assert "not self-contained: it needs the file skin.png" in reason(outside.save(tmp_path / "outside.glb"))
    whole = solid(tmp_path / "whole.glb", box()).read_bytes()
    for length in (0, 5, 30, len(whole) // 2, len(whole) - 200):
        (tmp_path / "cut.glb").write_bytes(whole[:length])
        assert reason(tmp_path / "cut.glb")


def test_wrong_numbers_of_keys_are_damage(tmp_path):
    glb = Glb()
    node = glb.node(mesh=glb.mesh(glb.primitive(*box())))
    glb.clip("short", (node, "translation", "LINEAR", [0, 1, 2], [[0, 0, 0], [1, 0, 0]]))
    with pytest.raises(AssetError, match="another number of values"):
        load_scene(glb.save(tmp_path / "a.glb"))


def test_faces_are_turned_outward_and_closed_parts_known(tmp_path):
    points, faces = box()
    sheet = np.array([[0, 0, 5], [1, 0, 5], [0, 1, 5.0]]), np.array([[0, 1, 2]])
    scene = load_scene(solid(tmp_path / "a.glb", (points, faces[:, ::-1]), box((0.5,) * 3, (4, 0, 0)), sheet))
    assert scene.face_closed[:24].all() and not scene.face_closed[24]
    assert len(np.unique(scene.face_components)) == 3
    a, b, c = (scene.positions[scene.faces[:12, k]] for k in range(3))
    assert (np.einsum("fk,fk->f", np.cross(b - a, c - a), a) > 0).all(), "the inside-out box faces outward now"


def test_the_limits_are_above_what_games_use():
    assert gltf_scene.LARGEST_FACES >= 300_000 and gltf_scene.LARGEST_SKIN >= 256


def test_glb_fixture_is_valid(tmp_path):
    """The chunk lengths of what the fixture writes add up: a fault there would excuse the reader."""
    raw = waving(tmp_path / "a.glb").read_bytes()
    magic, version, length = struct.unpack_from("<4sII", raw)
    assert (magic, version, length) == (b"glTF", 2, len(raw))
    size = struct.unpack_from("<I", raw, 12)[0]
    assert json.loads(raw[20 : 20 + size])["asset"]["version"] == "2.0"
