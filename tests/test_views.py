"""The view grid on disk: exact round trips, nerfstudio can read it, damage is named, nothing is left half-written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import over_white
from sv4d_ns.views.grid import ViewGrid

PLAN = ViewPlan.ring((60.0, 180.0), input_elevation_deg=15.0)


def make_grid(seed=0, frames=3, input_size=6, view_size=4, plan=PLAN, confidence=False, **others) -> ViewGrid:
    draw = np.random.default_rng(seed)
    novel = draw.integers(0, 256, (frames, plan.num_views, view_size, view_size, 4), dtype=np.uint8)
    novel[0, 0, 0, 0, 3] = 255
    pictures = draw.integers(0, 256, (frames, input_size, input_size, 4), dtype=np.uint8)
    pictures[0, 0, 0, 3] = 255
    belief = draw.integers(0, 256, novel.shape[:-1], dtype=np.uint8) if confidence else None
    return ViewGrid(pictures, novel, plan, fps=10.0, confidence=belief, **others)


@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 4),
    input_size=st.integers(1, 9),
    view_size=st.integers(1, 9),
    views=st.lists(st.tuples(st.floats(-360, 360), st.floats(-50, 50)), min_size=1, max_size=3),
    confidence=st.booleans(),
    framing=st.none() | st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_round_trip_is_exact(tmp_path_factory, seed, frames, input_size, view_size, views, confidence, framing):
    plan = ViewPlan(tuple(a for a, _ in views), tuple(e for _, e in views), 20.0)
    grid = make_grid(seed, frames, input_size, view_size, plan, confidence, framing=framing, provenance={"seed": seed})
    again = ViewGrid.load(grid.save(tmp_path_factory.mktemp("grids") / "grid"))
    np.testing.assert_array_equal(again.input_frames, grid.input_frames)
    np.testing.assert_array_equal(again.novel_views, grid.novel_views)
    if confidence:
        np.testing.assert_array_equal(again.confidence, grid.confidence)
    else:
        assert again.confidence is None
    assert (again.plan, again.fps, again.framing, again.provenance) == (plan, 10.0, framing, {"seed": seed})
    assert again.content_id == grid.content_id


def test_times_and_content_id():
    assert make_grid(frames=5).times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert make_grid(frames=1).times.tolist() == [0]
    grid = make_grid()
    assert grid.content_id == make_grid(provenance={"model": "x"}).content_id
    changed = grid.novel_views.copy()
    changed[1, 1, 2, 2, 0] ^= 1
    others = [
        make_grid(framing={"side": 3.0}),
        make_grid(confidence=True),
        make_grid(plan=ViewPlan.ring((60.0, 181.0), 15.0)),
        ViewGrid(grid.input_frames, changed, PLAN, 10.0),
        ViewGrid(grid.input_frames, grid.novel_views, PLAN, 12.0),
    ]
    assert len({grid.content_id, *(other.content_id for other in others)}) == 6


def test_nerfstudio_reads_the_folder_as_its_own_dataset(tmp_path):
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
    from nerfstudio.data.datasets.base_dataset import InputDataset

    grid = make_grid(frames=3, input_size=8, view_size=6)
    folder = grid.save(tmp_path / "grid")
    parser = NerfstudioDataParserConfig(
        data=folder, center_method="none", auto_scale_poses=False, eval_mode="all", downscale_factor=1
    ).setup()
    outputs = parser.get_dataparser_outputs("train")
    dataset = InputDataset(outputs)
    assert len(dataset) == 3 * 3
    c2w = PLAN.c2w()[:, :3]
    for index, path in enumerate(outputs.image_filenames):
        view, frame = divmod(index, 3)
        camera = outputs.cameras[index]
        pixels = grid.input_frames[frame] if view == 0 else grid.novel_views[frame, view - 1]
        size = len(pixels)
        np.testing.assert_array_equal(dataset.get_numpy_image(index), pixels, err_msg=str(path))
        np.testing.assert_allclose(camera.camera_to_worlds.numpy(), c2w[view], atol=1e-6)
        assert (int(camera.width), int(camera.height), float(camera.cx)) == (size, size, size / 2)
        assert float(camera.fx) == pytest.approx(PLAN.focal_px(size), rel=1e-6)
    listed = json.loads((folder / "transforms.json").read_text())["frames"]
    assert [frame["time"] for frame in listed[:3]] == [0, 0.5, 1]


def test_saving_replaces_a_grid_but_nothing_else(tmp_path):
    folder = make_grid(frames=4).save(tmp_path / "run" / "grid")
    second = make_grid(seed=1, frames=2)
    second.save(folder)
    assert ViewGrid.load(folder).content_id == second.content_id
    assert not list(folder.glob("images/*frame0003*"))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="precious exists and is not a view grid"):
        second.save(precious)
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["thesis.txt"]
    with pytest.raises(InputError, match="not a view grid"):
        second.save(precious / "thesis.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "run"]


def test_a_failure_while_writing_leaves_the_old_grid(tmp_path, monkeypatch):
    folder = make_grid().save(tmp_path / "grid")
    before = ViewGrid.load(folder).content_id
    saved = []
    original = Image.Image.save

    def disk_full(self, *args, **kwargs):
        saved.append(args)
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        original(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(InputError, match=r"grid \(No space left on device\): choose a writable folder"):
        make_grid(seed=1).save(folder)
    monkeypatch.undo()
    assert ViewGrid.load(folder).content_id == before
    assert [path.name for path in tmp_path.iterdir()] == ["grid"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        make_grid().save(tmp_path / "grid")


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_grid().save(tmp_path / "file" / "grid")


def rewrite(name, change):
    def spoil(folder: Path):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return spoil


def truncate(name):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def flip_pixel(folder):
    path = folder / "images/view01_frame0001.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 255
    Image.fromarray(pixels).save(path)


def wrong_size(folder):
    Image.new("RGBA", (5, 5), (1, 2, 3, 255)).save(folder / "images/view00_frame0000.png")


IMAGE = "images/view01_frame0002.png"
DAMAGE = {
    "no grid.json": (lambda f: (f / "grid.json").unlink(), "has no grid.json"),
    "no transforms.json": (lambda f: (f / "transforms.json").unlink(), "has no transforms.json"),
    "grid.json truncated": (truncate("grid.json"), "grid.json cannot be read"),
    "grid.json a list": (lambda f: (f / "grid.json").write_text("[]"), "JSON object"),
    "grid.json binary": (lambda f: (f / "grid.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "nested without end": (lambda f: (f / "grid.json").write_text("[" * 100_000), "cannot be read"),
    "newer format": (rewrite("grid.json", lambda g: g.update(version=99)), "another format"),
    "key missing": (rewrite("grid.json", lambda g: g.pop("fps")), "fps"),
    "no frames": (rewrite("grid.json", lambda g: g.update(num_frames=0)), "num_frames = '0'"),
    "frames a word": (rewrite("grid.json", lambda g: g.update(num_frames="3")), "num_frames = '3'"),
    "bad fps": (rewrite("grid.json", lambda g: g.update(fps=None)), "grid.json lacks or garbles"),
    "nan fps": (rewrite("grid.json", lambda g: g.update(fps=float("nan"))), "frame rate nan"),
    "no plan": (rewrite("grid.json", lambda g: g.update(plan=None)), "grid.json holds no usable plan"),
    "bad plan": (rewrite("grid.json", lambda g: g["plan"].update(radius=0)), "inside the object's box"),
    "image missing": (lambda f: (f / IMAGE).unlink(), "lacks .*view01_frame0002.png"),
    "image truncated": (truncate(IMAGE), "view01_frame0002.png is damaged"),
    "image is text": (lambda f: (f / IMAGE).write_text("hello"), "view01_frame0002.png is damaged"),
    "image is empty": (lambda f: (f / IMAGE).write_bytes(b""), "view01_frame0002.png is damaged"),
    "image of another size": (wrong_size, "RGBA 5x5, not the RGBA 6x6"),
    "pixel changed": (flip_pixel, "were changed after grid.json was written"),
    "traversal": (
        rewrite("transforms.json", lambda t: t["frames"][0].update(file_path="../../etc/passwd")),
        "transforms.json does not agree",
    ),
    "camera moved": (
        rewrite("transforms.json", lambda t: t["frames"][4]["transform_matrix"][0].__setitem__(3, 9.0)),
        "transforms.json does not agree",
    ),
    "frame dropped": (rewrite("transforms.json", lambda t: t["frames"].pop()), "transforms.json does not agree"),
    "frame without time": (rewrite("transforms.json", lambda t: t["frames"][0].pop("time")), "does not agree"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_sentence(tmp_path, name):
    spoil, says = DAMAGE[name]
    folder = make_grid().save(tmp_path / "grid")
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        ViewGrid.load(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        ViewGrid.load(tmp_path / "nowhere")


def test_arrays_that_do_not_belong_together_are_refused():
    good = make_grid()
    frames, views = good.input_frames, good.novel_views
    clear = np.zeros_like(frames)
    for arguments, says in [
        ((frames[:2], views), "2 input frames but 3 frames of novel"),
        ((frames, views[:, :1]), "1 novel views but its plan has 2"),
        ((frames[:0], views[:0]), "empty"),
        ((frames[:, :4], views), "square"),
        ((frames.astype(np.float32), views), "8-bit RGBA"),
        ((frames[..., :3], views), "8-bit RGBA"),
        ((clear, views), "fully transparent"),
        ((frames, np.zeros_like(views)), "novel_views is fully transparent"),
        ((np.full(frames.shape, np.nan, np.float32), views), "not finite"),
        ((np.array([frames[0], frames[1, :2]], dtype=object), views), "different sizes"),
    ]:
        with pytest.raises(InputError, match=says):
            ViewGrid(*arguments, PLAN, 10.0)
    with pytest.raises(InputError, match="confidence"):
        ViewGrid(frames, views, PLAN, 10.0, confidence=np.zeros((3, 2, 4, 5), np.uint8))
    with pytest.raises(InputError, match="frame rate 0"):
        ViewGrid(frames, views, PLAN, 0.0)


def test_over_white_rounds_to_the_nearest_level():
    rgba = np.random.default_rng(0).integers(0, 256, (500, 4), dtype=np.uint8)
    alpha = rgba[:, 3:] / 255
    expected = rgba[:, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(over_white(rgba) - expected).max() <= 0.5 + 1e-9
