"""Surfaces made anew by Instant Meshes: as even as was asked for, of the same shape, and refused in one sentence."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from sv4d_ns.cli.main import main
from sv4d_ns.export.surface.extraction import CanonicalMesh
from sv4d_ns.export.surface.remeshing import remeshed, triangles
from sv4d_ns.utils.errors import InputError


@pytest.fixture(scope="module")
def ball() -> CanonicalMesh:
    """A ball whose triangles become smaller towards one side, and a speck beside it."""
    made = trimesh.creation.icosphere(subdivisions=5, radius=0.4)
    vertices = made.vertices * (1 + 0.4 * made.vertices[:, [2]])
    speck = trimesh.creation.icosphere(subdivisions=3, radius=0.01)
    return CanonicalMesh(
        np.concatenate([vertices, speck.vertices + 0.6]).astype(np.float32),
        np.concatenate([made.faces, speck.faces + len(vertices)]).astype(np.int32),
        dropped_parts=1,
    )


def spread(mesh: CanonicalMesh) -> float:
    length = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).edges_unique_length
    return float(length.std() / length.mean())


def test_triangles_are_even_and_the_shape_stays(ball: CanonicalMesh) -> None:
    even = remeshed(ball, "triangle", 3000)
    assert 2400 < len(even.faces) < 3600 and spread(even) < 0.5 * spread(ball)
    found = trimesh.Trimesh(even.vertices, even.faces, process=False)
    big = trimesh.Trimesh(ball.vertices, ball.faces, process=False).split()[0]
    assert found.is_watertight and found.volume == pytest.approx(abs(big.volume), rel=0.02), "outward, as before"
    assert even.dropped_parts >= 1


def test_quadrilaterals_come_as_pairs_of_triangles(ball: CanonicalMesh) -> None:
    quads = remeshed(ball, "quad", 4000)
    assert 2500 < len(quads.faces) < 5500
    first, second = quads.faces[0::2], quads.faces[1::2]
    shared = [len(set(a) & set(b)) for a, b in zip(first, second, strict=True)]
    assert np.mean(np.array(shared) == 2) > 0.99


def test_quadrilaterals_without_a_fourth_corner_are_one_triangle() -> None:
    assert triangles(np.array([[0, 1, 2, 3], [4, 5, 6, 6]])).tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6]]


def test_what_instant_meshes_cannot_do_is_said(ball: CanonicalMesh) -> None:
    nothing = replace(ball, vertices=np.zeros((0, 3), np.float32), faces=np.zeros((0, 3), np.int32))
    with pytest.raises(InputError, match="--remesh triangle: Instant Meshes failed"):
        remeshed(nothing, "triangle", 100)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--watertight",), "--watertight"),
        (("--mode", "sequence"), "--mode sequence"),
        ((), r"'\.\[remesh\]'"),
    ],
)
def test_refusals(flags: tuple[str, ...], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flags:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "config.yml").write_text("!!python/object:x\n")
    call = ["export", "mesh", "--load-config", str(tmp_path / "config.yml"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=word):
        main([*call, "--remesh", "quad", *flags])
    assert not (tmp_path / "out").exists()
