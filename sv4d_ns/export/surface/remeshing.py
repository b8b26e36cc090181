"""Even triangles or quads that an artist can edit, by Instant Meshes (Jakob et al. 2015).

It prints to the terminal and is written in C++, so it works in a process of its own: `python -m` this file.
"""

import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from sv4d_ns.export.surface.extraction import CanonicalMesh, without_floaters, wound_outward
from sv4d_ns.utils.errors import InputError, install_extra

Remesh = Literal["none", "triangle", "quad"]
SYMMETRY = {"triangle": (6, 3), "quad": (4, 4)}
"""Of the field of directions and of the field of places (Instant Meshes' RoSy and PoSy)."""


def require_instant_meshes() -> None:
    """Raises `InputError` where pynanoinstantmeshes is not installed."""
    if importlib.util.find_spec("pynanoinstantmeshes") is None:
        raise InputError(f"--remesh needs pynanoinstantmeshes, which is not installed: {install_extra('remesh')}.")


def remeshed(surface: CanonicalMesh, kind: Literal["triangle", "quad"], max_faces: int) -> CanonicalMesh:
    """The same surface of about `max_faces` even triangles; with "quad" each two of them, one after the other, are a
    quadrilateral (glTF has triangles alone; Blender's Tris to Quads finds them again).

    Raises:
        InputError: Instant Meshes is not there, or fails.
    """
    require_instant_meshes()
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "given.npz", Path(scratch) / "made.npz"
        np.savez(given, vertices=surface.vertices, faces=surface.faces)
        # a quad mesh comes subdivided, of four quadrilaterals for each vertex asked for
        count = max(max_faces // (8 if kind == "quad" else 2), 12)
        command = [sys.executable, "-m", __name__, str(given), str(made), kind, str(count)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not made.is_file():
            why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:160]
            raise InputError(f"--remesh {kind}: Instant Meshes failed ({why}); leave it out, or change --max-faces.")
        with np.load(made) as result:
            vertices, faces = result["vertices"].astype(np.float64), triangles(result["faces"].astype(np.int64))
    vertices, faces, dropped = without_floaters(vertices, faces)
    return replace(
        surface,
        vertices=vertices.astype(np.float32),
        faces=wound_outward(vertices, faces).astype(np.int32),
        dropped_parts=surface.dropped_parts + dropped,
    )


def triangles(polygons: Int[np.ndarray, "p k"]) -> Int[np.ndarray, "f 3"]:
    """Triangles as they are; quadrilaterals as two, one after the other, those without an area left out."""
    if polygons.shape[1] == 3:
        return polygons
    pairs = polygons[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    flat = (pairs == np.roll(pairs, 1, axis=1)).any(axis=1)
    return pairs[~flat]


def _instant_meshes(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], kind: str, count: int
) -> tuple[np.ndarray, np.ndarray]:
    import pynanoinstantmeshes

    rosy, posy = SYMMETRY[kind]
    return pynanoinstantmeshes.remesh(  # type: ignore[no-any-return]
        np.ascontiguousarray(vertices, np.float32), np.ascontiguousarray(faces, np.uint32), count, rosy, posy,
        deterministic=True,
    )  # fmt: skip


if __name__ == "__main__":
    source, target, wanted, number = sys.argv[1:]
    with np.load(source) as mesh:
        found = _instant_meshes(mesh["vertices"], mesh["faces"], wanted, int(number))
    np.savez(target, vertices=found[0], faces=found[1])
