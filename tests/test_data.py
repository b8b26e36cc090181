"""Rendered training data: written, continued, packed, read, and sorted out; assets that cannot be used."""

import dataclasses
import errno
import importlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.training_data import blender, dataset, framing, render
from sv4d_ns.training_data.curate import CurateConfig, Thresholds, curate
from sv4d_ns.training_data.dataset import ObjectRecord, RenderedDataset, composited, finished_names, picture_name, png
from sv4d_ns.training_data.environments import ENVIRONMENTS
from sv4d_ns.training_data.exclusions import OBJAVERSEDY_TEST_IDS, is_test_object
from sv4d_ns.training_data.orbits import Orbit, draw_orbit
from sv4d_ns.training_data.render import RenderConfig, pack_shards, render_dataset
from sv4d_ns.training_data.sources import list_assets
from sv4d_ns.utils.errors import InputError

TEST_ID = "34d16c3882f94a31bde584948883a06a"


def config(folder, source="procedural:5:2", **changes):
    return RenderConfig(source, folder, **{"frames": 3, "views": 4, "size": 24, **changes})


# framing and cameras


def test_the_distance_grows_until_everything_fits():
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.5, 0.5, (500, 3))
    cameras = look_at_cameras(np.arange(0.0, 360.0, 45.0), np.full(8, 25.0), 1.0)
    distance = framing.fitting_distance(points, cameras, FIELD_OF_VIEW_DEG)

    def largest(d):
        seen = np.einsum("vji,nj->vni", cameras[:, :3, :3], points)
        return (np.abs(seen[..., :2]).max(-1) / (d - seen[..., 2])).max() / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)

    assert largest(distance) <= framing.FIT_MARGIN < largest(distance / framing.DISTANCE_GROWTH)
    assert framing.fitting_distance(points * 0.1, cameras, FIELD_OF_VIEW_DEG) == framing.BASE_DISTANCE


def test_the_frame_step_grows_until_frames_differ_enough():
    def shown(moment):  # a square that moves one pixel in four time units
        picture = np.zeros((16, 16, 4))
        left = int(moment // 4)
        picture[4:8, left : left + 4] = 1.0
        return picture

    slow, _ = framing.key_frame_step(shown, 0, 40, 5, 1.0, enough=0.1)
    fast, motion = framing.key_frame_step(shown, 0, 40, 5, 1.0, enough=0.35)
    assert 1.0 <= slow < fast <= 10.0 and motion > 0.35
    assert framing.key_frame_step(shown, 0, 40, 5, 1.0, enough=9.0)[0] == 10.0, "never beyond the animation"
    assert framing.key_frame_step(shown, 0, 2, 5, 1.0, enough=9.0)[0] == 0.5, "a short one is sampled more finely"


def test_rigid_motion_is_told_from_articulation():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(50, 3))
    angles = np.linspace(0, 1, 5)
    turned = np.stack([
        points @ np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) + [a, 0, 0]
        for a in angles
    ])  # fmt: skip
    assert framing.rigid_share(turned) > 0.999
    bent = np.stack([points * [1, 1, 1 + a] for a in angles])
    assert framing.rigid_share(bent) < 0.5
    assert framing.rigid_share(np.stack([points, points])) == 0.0
    assert framing.drift(turned) == pytest.approx(np.linalg.norm(turned[-1].mean(0) - turned[0].mean(0)))
    assert framing.size_change(np.stack([points, points * 0.1])) == pytest.approx(0.1)


def test_orbits_follow_the_published_ranges():
    for seed in range(30):
        static = draw_orbit(np.random.default_rng(seed), Orbit.STATIC, 21)
        assert np.ptp(static.elevations_deg) == 0 and -5 <= static.elevations_deg[0] <= 30
        np.testing.assert_allclose(np.diff(static.azimuths_deg), 360 / 21)
        dynamic = draw_orbit(np.random.default_rng(seed), Orbit.DYNAMIC, 21)
        assert dynamic.azimuths_deg[0] == 0 and (np.diff(dynamic.azimuths_deg) > 0).all()
        assert 0.3 < np.ptp(dynamic.elevations_deg) < 41 and np.abs(dynamic.elevations_deg).max() < 89


# rendering


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rendered") / "data"
    summary = render_dataset(config(path, maps=True))
    assert summary.rendered and not summary.skipped
    return path


def test_a_rendered_object_has_everything_it_promises(folder):
    data = RenderedDataset(folder)
    assert [record.name for record in data.records] == ["creature-0000000005", "creature-0000000006"]
    record = data.records[0]
    pictures = data.pictures(record, Orbit.STATIC, [0, 1, 2], [0, 1, 2, 3])
    assert pictures.shape == (3, 4, 24, 24, 4)
    border = np.concatenate([pictures[..., 0, :, 3], pictures[..., -1, :, 3], pictures[..., 0, 3]], axis=None)
    assert not border.any() and (pictures[..., 3] > 0).mean() > 0.02, "in the picture, and large in it"
    assert len(record.times) == 3 and record.licence == "CC0-1.0" and 0 < record.measurements["motion"] < 1
    assert not np.array_equal(pictures[0], pictures[2])
    files = folder / "objects" / record.name
    depth = np.asarray(Image.open(files / picture_name(Orbit.DYNAMIC, 0, 1, "depth"))).astype(float)
    normal = np.asarray(Image.open(files / picture_name(Orbit.DYNAMIC, 0, 1, "normal"))).astype(float)
    solid = data.pictures(record, Orbit.DYNAMIC, [0], [1])[0, 0, ..., 3] == 255
    metric = depth[solid] / 65535 * record.depth_range
    assert solid.sum() > 10 and np.abs(metric - record.distance).max() < 0.9
    lengths = np.linalg.norm(normal[solid] / 255 * 2 - 1, axis=-1)
    assert np.abs(lengths - 1).max() < 0.02
    azimuths, elevations = np.deg2rad(record.cameras(Orbit.DYNAMIC))
    toward = np.array([np.cos(elevations[1]) * np.cos(azimuths[1]), np.cos(elevations[1]) * np.sin(azimuths[1]),
                       np.sin(elevations[1])])  # fmt: skip
    assert ((normal[solid] / 255 * 2 - 1) @ toward).mean() > 0.4, "normals face the camera that sees them"


def test_a_render_continues_and_refuses_other_settings(folder, monkeypatch):
    again = render_dataset(config(folder, source="procedural:5:3", maps=True))
    assert again.rendered == ["creature-0000000007"] and len(again.already) == 2
    with pytest.raises(InputError, match=r"other settings \(size 24 -> 32\)"):
        render_dataset(config(folder, maps=True, size=32))


def test_a_render_without_an_object_may_begin_anew_with_other_settings(tmp_path):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "broken.glb").write_bytes(b"not a GLB")
    for size in (24, 32):
        with pytest.raises(InputError, match=r"Nothing of .* could be rendered .*: it is no GLB, or is cut off"):
            render_dataset(config(tmp_path / "out", source=str(assets), size=size))
        assert json.loads((tmp_path / "out" / "dataset.json").read_text())["settings"]["size"] == size


def test_a_killed_object_leaves_nothing(tmp_path, monkeypatch):
    real = dataset.png
    calls = []

    def dies(picture):
        calls.append(0)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(picture)

    monkeypatch.setattr(render, "png", dies)
    with pytest.raises(KeyboardInterrupt):
        render.render_asset(list_assets("procedural:1:1", None, False)[0][0], config(tmp_path), [])
    assert not list((tmp_path / "objects").iterdir())


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    render_dataset(config(tmp_path, format="shards", shard_objects=5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.tarfile.TarFile, "add", full)
    with pytest.raises(InputError, match=r"The disk is full while writing .*000001\.tar"):
        render_dataset(config(tmp_path, source="procedural:5:3", format="shards", shard_objects=5))
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == before
    assert finished_names(tmp_path) == {f"creature-000000000{n}" for n in (5, 6, 7)}
    monkeypatch.undo()
    render_dataset(config(tmp_path, source="procedural:5:3", format="shards", shard_objects=5))
    assert len(list((tmp_path / "shards").iterdir())) == 2 and not list((tmp_path / "objects").iterdir())


def test_shards_hold_the_same_pictures_as_folders(folder, tmp_path):
    import shutil
    import tarfile

    loose = RenderedDataset(folder)
    shutil.copytree(folder, tmp_path / "packed")
    pack_shards(tmp_path / "packed", 2, rest=True)
    packed = RenderedDataset(tmp_path / "packed")
    assert not list((tmp_path / "packed" / "objects").iterdir())
    assert [record.name for record in packed.records] == [record.name for record in loose.records]
    for one, other in zip(loose.records, packed.records, strict=True):
        np.testing.assert_array_equal(
            loose.pictures(one, Orbit.DYNAMIC, [1], [3]), packed.pictures(other, Orbit.DYNAMIC, [1], [3])
        )
    with tarfile.open(tmp_path / "packed" / "shards" / "000000.tar") as tar:
        keys = {name.partition(".")[0] for name in tar.getnames()}
        assert keys == {"creature-0000000005", "creature-0000000006"}, "the keys WebDataset groups by"


def test_damaged_data_says_so(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "bad")
    data = RenderedDataset(tmp_path / "bad")
    target = tmp_path / "bad" / "objects" / data.records[0].name
    (target / picture_name(Orbit.STATIC, 0, 0)).write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"static\.rgba\.00\.00\.png of 'creature-0000000005'.*render it again"):
        data.pictures(data.records[0], Orbit.STATIC, [0], [0])
    (target / "object.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a rendered object"):
        RenderedDataset(tmp_path / "bad")


# on a cluster


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "objects").rglob("*.*"))}


def test_a_worker_killed_in_the_middle_of_an_object_loses_nothing(tmp_path, folder, monkeypatch):
    """The worker dies while it writes an object; another makes it, the same as without a cluster."""
    place, real = str(tmp_path), render.try_asset

    def fatal_once(asset, settings):
        tried = Path(place) / f"{asset.name}.tried"
        if asset.seed == 6 and not tried.exists():
            tried.touch()
            there = importlib.import_module("sv4d_ns.training_data.render")
            calls, plain = [], there.png

            def dies(picture):
                calls.append(0)
                if len(calls) == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(picture)

            there.png = dies
        return real(asset, settings)

    monkeypatch.setattr(render, "try_asset", fatal_once)
    out = tmp_path / "out"
    summary = render_dataset(config(out, source="procedural:5:2", maps=True, cluster="local:2"))
    assert (tmp_path / "creature-0000000006.tried").exists()
    assert sorted(summary.rendered) == ["creature-0000000005", "creature-0000000006"] and not summary.skipped
    alone = tmp_path / "alone"
    monkeypatch.undo()
    render_dataset(config(alone, source="procedural:5:2", maps=True))
    left = [path for path in (out / "objects").iterdir() if path.name.startswith(".")]
    assert left, "what the killed worker had begun"
    assert not render_dataset(config(out, source="procedural:5:2", maps=True, cluster="local:2")).rendered
    assert files_of(out) == files_of(alone), "and the same command again clears it away"


def test_a_full_disk_on_a_worker_ends_the_render_and_keeps_what_is_finished(tmp_path, monkeypatch):
    real = render.try_asset

    def full_at_6(asset, settings):
        with dataset.disk_errors(settings.output / asset.name):
            if asset.seed == 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(asset, settings)

    monkeypatch.setattr(render, "try_asset", full_at_6)
    settings = config(tmp_path / "out", source="procedural:5:3", cluster="local:1")
    with pytest.raises(InputError, match=r"The disk is full while writing .*creature-0000000006.*same command again"):
        render_dataset(settings)
    assert "creature-0000000005" in finished_names(tmp_path / "out")
    monkeypatch.undo()
    assert "creature-0000000006" in render_dataset(settings).rendered


def test_what_a_cluster_cannot_do_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sv4d_ns.runs.cluster.CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=r"tcp://127.0.0.1:9: no Dask scheduler answers there"):
        render_dataset(config(tmp_path / "out", cluster="tcp://127.0.0.1:9"))
    with pytest.raises(InputError, match=r"--workers is for this process: leave it out with --cluster"):
        render_dataset(config(tmp_path / "out", cluster="local:2", workers=2))
    lock = FileLock(tmp_path / "out" / render.LOCK_FILE)
    with lock, pytest.raises(InputError, match="Another 'sv4d data render' works on"):
        render_dataset(config(tmp_path / "out"))


def test_workers_with_another_version_or_none_are_named(tmp_path):
    from distributed import Client, LocalCluster

    def another_version():
        importlib.import_module("sv4d_ns.runs.cluster").__version__ = "0.0.1"

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as there:
        with Client(there, set_as_default=False) as client:
            client.run(another_version)
        with pytest.raises(InputError, match=r"has sv4d-ns 0\.0\.1, and this is .*install the same everywhere"):
            render_dataset(config(tmp_path / "out", cluster=there.scheduler_address))
        there.scale(0)
        with Client(there, set_as_default=False) as client:
            while client.scheduler_info()["workers"]:
                time.sleep(0.1)
        with pytest.raises(InputError, match="the scheduler has no worker; start some with 'dask worker"):
            render_dataset(config(tmp_path / "out", cluster=there.scheduler_address))
    assert not (tmp_path / "out" / "objects").exists()


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("procedural:1", "procedural:SEED:COUNT"),
        ("procedural:1:0", "names no creatures"),
        ("procedural:2147483647:2", "the largest seed .* is 2147483647"),
        ("{empty}", "holds no asset"),
        ("{empty}/nothing", "does not exist"),
        ("objaverse:abc", "holds no Objaverse id"),
    ],
)
def test_sources_that_cannot_be_used_say_so(tmp_path, source, sentence):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=sentence):
        render_dataset(config(tmp_path / "out", source=source.format(empty=tmp_path / "in")))
    assert not (tmp_path / "out").exists()


# assets through Blender, for which a script stands that does what it is told


FAKE = """#!{python} -SE
import json, shutil, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[-1]).read_text())
name = Path(job["asset"]).stem
if name == "crashes":
    print("something terrible"); sys.exit(11)
if name == "hangs":
    time.sleep(60)
result = {{"error": "it has no animation"}} if name == "still" and job["frames"] > 1 else {{
    "times": [1.0 + t for t in range(job["frames"])], "distance": 2.0, "depth_range": 4.0,
    "measurements": {{"motion": 0.1}}}}
if "error" not in result:
    for orbit, cameras in zip(job["orbits"], job["unit_cameras"]):
        for t in range(job["frames"]):
            for v in range(len(cameras)):
                shutil.copy({picture!r}, Path(job["folder"]) / f"{{orbit}}.rgba.{{t:02d}}.{{v:02d}}.png")
Path(job["result"]).write_text(json.dumps(result))
"""


@pytest.fixture
def fake(tmp_path):
    """A stand-in for a Python with bpy."""
    path = tmp_path / "python-with-bpy"
    (tmp_path / "picture.png").write_bytes(png(disc(size=24)))
    path.write_text(FAKE.format(python=sys.executable, picture=str(tmp_path / "picture.png")))
    path.chmod(0o755)
    return path


def test_bad_assets_are_skipped_counted_and_listed(tmp_path, fake):
    assets = tmp_path / "assets"
    (assets / "sub").mkdir(parents=True)
    for name in ("fine.glb", "crashes.fbx", "hangs.blend", "still.gltf", "sub/fine.glb", f"{TEST_ID}.glb"):
        (assets / name).write_bytes(b"asset")
    (assets / "empty.glb").write_bytes(b"")
    (assets / "fine.json").write_text('{"license": "CC-BY-4.0"}')
    out = tmp_path / "out"
    settings = config(
        out, source=str(assets), renderer="blender", blender_python=fake, timeout_s=8.0, licence="own", workers=2
    )
    summary = render_dataset(settings)
    assert sorted(summary.rendered) == ["fine", "sub-fine"]
    reasons = {line["name"]: line["reason"] for line in map(json.loads, (out / "skipped.jsonl").open())}
    assert reasons == summary.skipped and set(reasons) == {"crashes", "hangs", "still", "empty", TEST_ID}
    assert "code 11 (something terrible)" in reasons["crashes"] and "longer than 8 s" in reasons["hangs"]
    assert "no animation" in reasons["still"] and "empty" in reasons["empty"] and "test object" in reasons[TEST_ID]
    records = {record.name: record for record in RenderedDataset(out).records}
    assert records["fine"].licence == "CC-BY-4.0" and records["sub-fine"].licence == "own"
    assert records["fine"].environment in ENVIRONMENTS and len(records["fine"].source["sha256"]) == 64
    assert not [path for path in (out / "objects").iterdir() if path.name.startswith(".")]
    still = render_dataset(dataclasses.replace(settings, output=tmp_path / "still", frames=1, timeout_s=8.0))
    assert "still" in still.rendered, "one frame needs no animation"


def test_what_a_killed_render_through_blender_left_is_cleared_away(tmp_path, fake, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "fine.glb").write_bytes(b"asset")
    settings = config(
        tmp_path / "out", source=str(tmp_path / "assets"), renderer="blender", blender_python=fake, licence="own"
    )
    with monkeypatch.context() as killed:
        killed.setattr(render.shutil, "rmtree", lambda *_, **__: None)
        render_dataset(settings)
    objects = tmp_path / "out" / "objects"
    assert len(list(objects.glob(".*"))) > 0
    render_dataset(settings)
    assert [path.name for path in objects.iterdir()] == ["fine"]


def test_nothing_usable_is_an_error(tmp_path, fake):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "crashes.glb").write_bytes(b"asset")
    with pytest.raises(InputError, match=r"\(1 left out\).*crashes: Blender ended"):
        render_dataset(
            config(tmp_path / "out", source=str(tmp_path / "assets"), renderer="blender", blender_python=fake)
        )


def test_without_blender_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(blender.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(blender.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"'\.\[render\]'.*--blender-python"):
        blender.find_blender(None)
    with pytest.raises(InputError, match="--blender-python nowhere"):
        blender.find_blender(Path("nowhere"))


def test_objaverse_ids_are_fetched_and_test_objects_never(tmp_path, monkeypatch):
    wanted, asked = "0" * 31 + "1", []
    module = types.ModuleType("objaverse")
    module.load_annotations = lambda ids: {uid: {"license": "by"} for uid in ids}
    module.load_objects = lambda ids: asked.extend(ids) or {uid: str(tmp_path / f"{uid}.glb") for uid in ids}
    monkeypatch.setitem(sys.modules, "objaverse", module)
    (tmp_path / "ids.txt").write_text(f"{wanted}\n{TEST_ID}\n")
    assets, held_out = list_assets(f"objaverse:{tmp_path / 'ids.txt'}", None, include_test_objects=False)
    assert [(a.name, a.licence) for a in assets] == [(wanted, "by")] and held_out == [TEST_ID] and asked == [wanted]

    def offline(ids):
        raise ConnectionError("no route")

    module.load_annotations = offline
    with pytest.raises(InputError, match=r"cannot be reached .no route.*folder of assets"):
        list_assets(f"objaverse:{wanted}", None, include_test_objects=False)
    monkeypatch.setitem(sys.modules, "objaverse", None)
    with pytest.raises(InputError, match=r"'\.\[objaverse\]'"):
        list_assets(f"objaverse:{wanted}", None, include_test_objects=False)


def test_the_published_test_objects_are_known():
    assert len(OBJAVERSEDY_TEST_IDS) == 20 and is_test_object(f"glbs-{TEST_ID.upper()}")
    assert is_test_object("ba7b382c1234") and not is_test_object("fox")
    assert (
        is_test_object("000-023-ba7b382c1234")
        and is_test_object("animated/BA7B382C")
        and not is_test_object("1ba7b382c")
    )


# curation: made-up objects, one fault each


def disc(centre=(16, 16), radius=6.0, size=32, colour=(200, 60, 40)):
    rows, columns = np.mgrid[:size, :size]
    picture = np.zeros((size, size, 4), dtype=np.uint8)
    picture[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2] = (*colour, 255)
    return picture


def waving(t, v, colour=(200, 60, 40)):
    """A body with an arm that moves."""
    picture = disc(colour=colour)
    angle = 0.5 * t + v
    row, column = int(16 + 9 * np.sin(angle)), int(16 + 9 * np.cos(angle))
    picture[row - 2 : row + 3, column - 2 : column + 3] = (40, 80, 200, 255)
    return picture


OBJECTS = {
    "good": (waving, {}),
    "green": (lambda t, v: waving(t, v, (30, 190, 60)), {}),
    "static": (lambda t, v: waving(0, v), {}),
    "copy": (waving, {}),
    "leaves": (lambda t, v: disc((16, 16 + 4 * t), 6.0), {}),
    "tiny": (lambda t, v: disc((16, 10 + 2 * t), 1.0), {}),
    "scene": (lambda t, v: np.full((32, 32, 4), (90 + 30 * t, 80, 60, 255), dtype=np.uint8), {}),
    "turntable": (waving, {"rigid_share": 0.999}),
    "travels": (waving, {"drift": 0.8}),
    "vanishes": (lambda t, v: disc(radius=10.0 if t < 3 else 2.0), {}),
    "collapses": (waving, {"size_change": 0.05}),
    "flickers": (lambda t, v: disc(colour=(20, 20, 240)) if t == 2 else waving(t, v), {}),
    "plane": (waving, {"flatness": 0.0}),
    "unfree": (waving, {"licence": "by-nc-nd"}),
    TEST_ID: (waving, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    path = tmp_path_factory.mktemp("objects")
    (path / "dataset.json").write_text(json.dumps({"settings": {}}))
    for name, (picture, about) in OBJECTS.items():
        record = ObjectRecord(
            name=name, source={"kind": "file"}, licence=about.get("licence", "CC0-1.0"), frames=6, size=32,
            orbits={"static": {"azimuths_deg": [0.0, 90.0, 180.0, 270.0], "elevations_deg": [0.0] * 4}},
            fov_deg=33.9, distance=2.0, depth_range=4.0, background=[255] * 3, environment="even",
            times=list(range(6)), measurements={k: v for k, v in about.items() if k != "licence"},
        )  # fmt: skip
        pictures = ((picture_name(Orbit.STATIC, t, v), png(picture(t, v))) for t in range(6) for v in range(4))
        dataset.write_object(path / "objects" / name, record, pictures)
    return path


def test_every_fault_is_found_and_named(objects, tmp_path):
    reasons = {v.name: v.reasons for v in curate(CurateConfig(objects, report=tmp_path))}
    assert reasons["green"] == [] and (reasons["good"], reasons["copy"]) == (["duplicate of copy"], [])
    expected = {
        "static": "static", "leaves": "leaves the picture", "tiny": "barely visible", "scene": "scene-like",
        "turntable": "moves as a whole (rotating camera, turntable)", "travels": "travels",
        "vanishes": "geometry vanishes", "collapses": "geometry vanishes", "flickers": "flickers", "plane": "flat",
        "unfree": "licence", TEST_ID: "test object",
    }  # fmt: skip
    for name, reason in expected.items():
        assert reason in reasons[name], (name, reasons[name])
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in OBJECTS) and "2 of 15 objects kept" in page and "data:image/png" in page
    assert Image.open(tmp_path / "report.png").size[1] > 15 * 32
    kept = RenderedDataset(objects)
    assert {record.name for record in kept.records} == {"copy", "green"}
    saved = json.loads((objects / "curation.json").read_text())
    assert saved["thresholds"]["min_motion"] == Thresholds().min_motion and len(saved["dropped"]) == 13


def test_thresholds_decide(objects, tmp_path):
    lenient = Thresholds(keep_test_objects=True, licences=("cc0-1.0", "by-nc-nd"), min_difference=0.0, min_motion=0.0)
    reasons = {v.name: v.reasons for v in curate(CurateConfig(objects, lenient, tmp_path))}
    for name in ("good", "copy", "unfree", "static", TEST_ID):
        assert reasons[name] == []


def test_creatures_are_good_data_and_none_a_duplicate(tmp_path):
    render_dataset(config(tmp_path, source="procedural:40:12", frames=5, size=32, orbits=(Orbit.STATIC,)))
    verdicts = curate(CurateConfig(tmp_path))
    assert [v.name for v in verdicts if v.reasons] == []


def test_composited_pictures_mix_by_alpha():
    picture = np.array([[[100, 0, 0, 255], [100, 0, 0, 0], [100, 200, 0, 51]]], dtype=np.uint8)
    mixed = composited(picture, [0, 50, 100])[0]
    assert mixed.tolist() == [[100, 0, 0], [0, 50, 100], [20, 80, 80]]
