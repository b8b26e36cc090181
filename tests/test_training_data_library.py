"""Samples straight from assets, and `sv4d data render` of GLBs without Blender."""

import hashlib
import json

import numpy as np
import pytest
from glb_fixture import Glb, box, solid, waving

from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.curate import CurateConfig, curate
from sv4d_ns.training_data.dataset import RenderedDataset
from sv4d_ns.training_data.exclusions import OBJAVERSEDY_TEST_IDS
from sv4d_ns.training_data.library import LARGEST_RADIUS, AssetLibrary, is_held_out
from sv4d_ns.training_data.orbits import Orbit
from sv4d_ns.training_data.render import RenderConfig, render_dataset
from sv4d_ns.utils.errors import InputError


@pytest.fixture
def assets(tmp_path):
    folder = tmp_path / "assets"
    (folder / "animated").mkdir(parents=True)
    (folder / "static").mkdir()
    for name in "abcdef":
        waving(folder / "animated" / f"{name}.glb")
    solid(folder / "static" / "cube.glb", box())
    return folder


def test_the_split_is_by_name_for_ever():
    names = [f"animated/asset{number}" for number in range(2000)]
    held_out = [name for name in names if is_held_out(name, 0.1)]
    assert 150 < len(held_out) < 250
    moved = [name for name in held_out if not is_held_out(name.replace("animated", "static/deeper"), 0.1)]
    assert not moved, "the folder does not count"
    digest = int.from_bytes(hashlib.sha256(b"asset7").digest()[:8], "big") / 2**64
    assert is_held_out("x/asset7", digest + 1e-9) and not is_held_out("x/asset7", digest - 1e-9)


def test_a_sample_is_in_sight_and_repeatable(assets):
    library = AssetLibrary(assets, held_out_share=0.3)
    assert set(library.train).isdisjoint(library.held_out) and len(library.train) + len(library.held_out) == 7
    first, again = (library.sample(np.random.default_rng(3), frames=4, kind="animated") for _ in range(2))
    assert first.name == again.name and first.clip == again.clip and first.name in library.train
    cameras = look_at_cameras(np.array([0.0, 77.0, 190.0]), np.array([0.0, 30.0, -20.0]))
    shown = first.draw(cameras, 32)
    np.testing.assert_array_equal(shown, again.draw(cameras, 32))
    assert shown.shape == (4, 3, 32, 32, 4) and shown.dtype == np.uint8
    border = np.concatenate([shown[..., 0, :, 3], shown[..., -1, :, 3], shown[..., :, 0, 3], shown[..., :, -1, 3]])
    assert not border.any() and (shown[..., 3] > 0).mean() > 0.02
    assert (shown[0] != shown[3]).any(), "it moves"
    radius = max(np.linalg.norm(first.mesh(t).positions, axis=1).max() for t in range(4))
    assert radius <= LARGEST_RADIUS + 1e-9
    volume = first.occupancy(2, cameras[0])
    alpha = shown[2, 0, ..., 3] >= 128
    seen = volume.any(axis=0).reshape(32, 2, 32, 2).mean(axis=(1, 3)) >= 0.5
    assert (seen & alpha).sum() / (seen | alpha).sum() > 0.85


def test_a_cropped_sample_has_its_box_in_the_middle_of_the_input_picture(assets):
    library = AssetLibrary(assets, held_out_share=0.0)
    for elevation in (0.0, 25.0):
        camera = look_at_cameras(np.zeros(1), np.array([elevation]))
        boxes = []
        for share in (0.0, 1.0):
            given = {"kind": "animated", "elevation_deg": elevation, "yaw_deg": 60.0, "longest_window_s": 0.5}
            sample = library.sample(np.random.default_rng(5), 8, cropped_share=share, **given)
            visible = sample.draw(camera, 128)[..., 3].max(axis=(0, 1)) >= 128
            rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
            boxes.append((rows[0], rows[-1], columns[0], columns[-1]))
        top, bottom, left, right = boxes[1]
        assert abs(top + bottom - 127) <= 2 and abs(left + right - 127) <= 2
        assert max(abs(boxes[0][0] + boxes[0][1] - 127), abs(boxes[0][2] + boxes[0][3] - 127)) > 2, "not so before"
        assert max(bottom - top, right - left) >= max(boxes[0][1] - boxes[0][0], boxes[0][3] - boxes[0][2])


def test_few_frames_are_evenly_spaced_too(assets):
    library = AssetLibrary(assets, held_out_share=0.0)
    for frames in (2, 4, 8):
        for seed in range(4):
            given = {"kind": "animated", "longest_window_s": 0.4}
            times = library.sample(np.random.default_rng(seed), frames, **given).times
            steps = np.diff(times)
            assert steps.min() > 0 and np.allclose(steps, steps[0])


def test_what_is_drawn_does_not_depend_on_what_failed_before(assets):
    (assets / "animated" / "broken.glb").write_bytes(b"not a GLB")
    library, later = AssetLibrary(assets, held_out_share=0.0), AssetLibrary(assets, held_out_share=0.0)
    for seed in range(30):
        library.sample(np.random.default_rng(seed))
    assert "animated/broken" in library.skipped and not later.skipped
    one, other = (some.sample(np.random.default_rng(40)) for some in (library, later))
    assert one.name == other.name and np.array_equal(one.times, other.times)
    names = [library.sample(np.random.default_rng(seed)).name for seed in range(40, 60)]
    assert names == [
        AssetLibrary(assets, held_out_share=0.0).sample(np.random.default_rng(s)).name for s in range(40, 60)
    ]


def test_published_test_objects_are_never_drawn(assets):
    solid(assets / "animated" / f"{next(iter(OBJAVERSEDY_TEST_IDS))}.glb", box())
    library = AssetLibrary(assets, held_out_share=0.3)
    assert len(library.train) + len(library.held_out) == 7
    (assets / "tested").mkdir()
    solid(assets / "tested" / "ba7b382c.glb", box())
    with pytest.raises(InputError, match="only test objects of published evaluations"):
        AssetLibrary(assets / "tested")


def test_a_stretched_sample_has_other_proportions_and_stays_in_sight(assets):
    library = AssetLibrary(assets, held_out_share=0.0)
    shapes = []
    for seed in range(6):
        sample = library.sample(np.random.default_rng(seed), kind="static", yaw_deg=0.0, largest_stretch=1.25)
        extent = np.ptp(sample.mesh(0).positions, axis=0)
        shapes.append(extent / extent.max())
        assert np.linalg.norm(sample.mesh(0).positions, axis=1).max() <= LARGEST_RADIUS + 1e-9
    assert np.ptp(shapes, axis=0).max() > 0.1 and np.min(shapes) > 1 / 1.25**2 - 1e-6


def test_a_still_sample_has_equal_frames(assets):
    library = AssetLibrary(assets, held_out_share=0.0)
    sample = library.sample(np.random.default_rng(0), frames=3, kind="static", yaw_deg=0.0)
    shown = sample.draw(look_at_cameras(np.zeros(1), np.zeros(1)), 16)
    assert sample.clip is None and len(shown) == 3 and (shown == shown[:1]).all()


def test_the_front_faces_the_input_camera(tmp_path):
    (tmp_path / "assets").mkdir()
    glb = Glb()
    face, back = glb.material((1, 0, 0, 1)), glb.material((0, 0, 1, 1))
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.5, 0.5, 0.1), (0, 0, 0.2)), face)))  # glTF: front is +z
    glb.node(mesh=glb.mesh(glb.primitive(*box((0.5, 0.5, 0.1), (0, 0, -0.2)), back)))
    glb.save(tmp_path / "assets" / "a.glb")
    sample = AssetLibrary(tmp_path / "assets", held_out_share=0.0).sample(np.random.default_rng(0), yaw_deg=0.0)
    front, behind = sample.draw(look_at_cameras(np.array([0.0, 180.0]), np.zeros(2)), 16)[0]
    assert front[8, 8, 0] > 2 * front[8, 8, 2] and behind[8, 8, 2] > 2 * behind[8, 8, 0]


def test_unusable_assets_are_passed_over_and_named(assets):
    (assets / "animated" / "broken.glb").write_bytes(b"not a GLB")
    solid(assets / "animated" / "point.glb", (np.zeros((8, 3)), box()[1]))
    library = AssetLibrary(assets, held_out_share=0.0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        library.sample(rng, kind="animated")
    assert set(library.skipped) == {"animated/broken", "animated/point"}
    assert "no extent" in library.skipped["animated/point"]
    with pytest.raises(InputError, match=r"No asset of .* can be used \(animated/"):
        library.sample(rng, names=["animated/broken", "animated/point"])
    with pytest.raises(InputError, match="does not exist"):
        AssetLibrary(assets / "nowhere")
    (assets / "none").mkdir()
    with pytest.raises(InputError, match="holds no GLB"):
        AssetLibrary(assets / "none")


def test_decoded_assets_are_kept_and_let_go(assets, tmp_path):
    cache = tmp_path / "cache"
    first = AssetLibrary(assets, cache=cache).scene("animated/a")
    (kept,) = cache.glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    again = AssetLibrary(assets, cache=cache).scene("animated/a")
    np.testing.assert_array_equal(first.positions, again.positions)
    assert len(kept.read_bytes()) > 100, "the damaged entry was made again"
    small = AssetLibrary(assets, memory_bytes=1)
    assert small.scene("animated/a") is not small.scene("animated/b")
    assert small.scene("animated/b") is small.scene("animated/b") and len(small._scenes) == 1


def config(source, output, **changes):
    values = {"frames": 3, "views": 2, "size": 16, "orbits": (Orbit.STATIC,), **changes}
    return RenderConfig(str(source), output, **values)


def test_every_clip_of_a_glb_is_rendered_without_blender(tmp_path):
    folder, out = tmp_path / "assets", tmp_path / "out"
    folder.mkdir()
    waving(folder / "two.glb")
    waving(folder / "one.glb", clips=("wave",))
    (folder / "two.json").write_text('{"license": "CC0-1.0"}')
    frozen = Glb()
    node = frozen.node(mesh=frozen.mesh(frozen.primitive(*box())))
    frozen.clip("still", (node, "translation", "LINEAR", [0.5], [[0, 0, 0]]))
    frozen.clip("moves", (node, "translation", "LINEAR", [0, 1], [[0, 0, 0], [1, 0, 0]]))
    frozen.save(folder / "mixed.glb")
    solid(folder / "rock.glb", box())
    (folder / "torn.glb").write_bytes(b"glTF")
    (folder / "empty.glb").write_bytes(b"")
    summary = render_dataset(config(folder, out, maps=True))
    assert sorted(summary.rendered) == ["mixed__01", "one", "two__00", "two__01"]
    reasons = {line["name"]: line["reason"] for line in map(json.loads, (out / "skipped.jsonl").open())}
    assert set(reasons) == {"mixed__00", "rock", "torn", "empty"}
    assert "'still' has no length" in reasons["mixed__00"] and "--frames 1" in reasons["rock"]
    assert "empty" in reasons["empty"] and "GLB" in reasons["torn"]
    dataset = RenderedDataset(out)
    records = {record.name: record for record in dataset.records}
    assert records["two__01"].source["clip"] == "bow" and records["two__01"].licence == "CC0-1.0"
    shown = dataset.pictures(records["two__00"], Orbit.STATIC, [0, 1, 2], [0, 1])
    assert shown.shape == (3, 2, 16, 16, 4) and (shown[0] != shown[1]).any()
    assert records["two__00"].measurements["motion"] > 0 and records["two__00"].times[1] > 0
    assert (out / "objects" / "one" / "static.depth.00.00.png").is_file()
    again = render_dataset(config(folder, out, maps=True))
    assert not again.rendered and sorted(again.already) == sorted(summary.rendered), "a finished render is kept"
    with pytest.raises(InputError, match=r"other settings .clips all -> 1"):
        render_dataset(config(folder, out, maps=True, clips=1))
    verdicts = {verdict.name: verdict.reasons for verdict in curate(CurateConfig(out))}
    assert not any("duplicate of two__00" in reason for reason in verdicts["two__01"]), "another clip is no copy"


def test_clips_and_stills_are_chosen(tmp_path):
    (tmp_path / "assets").mkdir()
    waving(tmp_path / "assets" / "two.glb")
    first = render_dataset(config(tmp_path / "assets", tmp_path / "first", clips=1))
    assert first.rendered == ["two__00"]
    still = render_dataset(config(tmp_path / "assets", tmp_path / "still", frames=1))
    assert still.rendered == ["two"], "one frame needs no clip"
    with pytest.raises(InputError, match="--clips must be at least 1, or all"):
        render_dataset(config(tmp_path / "assets", tmp_path / "x", clips=0))
    for wrong in ({"random_background": 7.0}, {"enough_motion": float("nan")}, {"timeout_s": 0.0}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong)).replace('_', '-')} is .*: give"):
            render_dataset(config(tmp_path / "assets", tmp_path / "x", **wrong))
    with pytest.raises(InputError, match="reads no environment pictures"):
        (tmp_path / "skies").mkdir()
        render_dataset(
            config(tmp_path / "assets", tmp_path / "x", renderer="compiled", environments=tmp_path / "skies")
        )
