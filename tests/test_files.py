"""Whole files or none, and names that say what is in them."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sv4d_ns.utils import files
from sv4d_ns.utils.files import atomic_folder, atomic_path, content_hash


def test_the_file_appears_whole_with_the_users_permissions(tmp_path):
    target = tmp_path / "deep" / "er" / "result.glb"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".glb" and temporary.name.startswith(".")
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_an_older_file_is_replaced_only_on_success(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyError("power cut")
    assert target.read_text() == "old"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_where_nothing_can_be_made_is_named_by_the_users_name_for_it():
    target = Path("/proc/picture.png")
    with pytest.raises(OSError) as caught, atomic_path(target):
        pass
    assert caught.value.filename == str(target)


def test_a_kill_inside_the_block_leaves_the_old_file(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    child = os.fork()
    if child == 0:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert target.read_text() == "old"
    assert all(path == target or path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "by two renames"])
def test_a_folder_takes_the_place_of_an_older_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "views", "mark", "a grid") as new:
            (new / "mark").write_text(content)
        assert (tmp_path / "views" / "mark").read_text() == content
        assert list(tmp_path.iterdir()) == [tmp_path / "views"]


@pytest.mark.parametrize("way", ["error", "kill"])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, way):
    """`new` cannot be moved to its place, or the process is killed before it is there."""
    folder = tmp_path / "views"
    folder.mkdir()
    (folder / "mark").write_text("old")
    rename = Path.rename

    def fails(path, target):
        if path.name != "new":
            return rename(path, target)
        if way == "kill":
            os.kill(os.getpid(), 9)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fails)
    if way == "error":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        with pytest.raises(OSError), atomic_folder(folder, "mark", "a grid") as new:
            (new / "mark").write_text("new")
        assert (folder / "mark").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
        return
    child = os.fork()
    if child == 0:
        with atomic_folder(folder, "mark", "a grid") as new:
            (new / "mark").write_text("new")
        os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "mark").read_text() in ("old", "new")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_the_order_of_keys_does_not_matter(value):
    reversed_keys = dict(reversed(value.items()))
    assert content_hash(value) == content_hash(reversed_keys)
    assert len(content_hash(value)) == 32


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=4), elements=st.integers(0, 255)), st.data())
def test_every_byte_of_an_array_matters_but_not_its_memory_layout(array, data):
    assert content_hash(array) == content_hash(np.asfortranarray(array))
    changed = array.copy()
    changed.flat[data.draw(st.integers(0, array.size - 1))] ^= data.draw(st.integers(1, 255))
    assert content_hash(array) != content_hash(changed)


def test_shape_dtype_order_and_number_of_parts_matter():
    array = np.arange(6, dtype=np.uint8)
    variants = [
        (array,),
        (array.reshape(2, 3),),
        (array.reshape(3, 2),),
        (array.view(np.int8),),
        (array, array),
        (array, 1),
        (1, array),
        ("ab",),
        ("a", "b"),
        (1,),
        (1.5,),
        ("1",),
    ]
    assert len({content_hash(*parts) for parts in variants}) == len(variants)
