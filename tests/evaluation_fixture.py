"""A small case in the benchmark's format: a textured ball that moves and grows, with exact pictures and geometry."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras

FRAMES, SIZE = 5, 48
RING = (36.0, 72.0, 108.0, 144.0, 180.0, 216.0, 252.0, 288.0, 324.0)
RADIUS = 2.0
FOCAL = 0.5 * SIZE / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)


def centre(time: float) -> np.ndarray:
    return np.array([0.05, -0.12, 0.1]) * time


def ball_radius(time: float) -> float:
    return 0.3 + 0.06 * time


def picture(c2w: np.ndarray, time: float, size: int = SIZE, samples: int = 3) -> np.ndarray:
    """RGBA of the ball; its colour follows the direction from its centre."""
    fine = size * samples
    focal = FOCAL * samples * size / SIZE
    xy = (np.stack(np.meshgrid(np.arange(fine), np.arange(fine)), -1) + 0.5 - fine / 2) / focal
    rays = np.stack([xy[..., 0], -xy[..., 1], -np.ones((fine, fine))], -1)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True) @ c2w[:3, :3].T
    offset = c2w[:3, 3] - centre(time)
    b, c = rays @ offset, offset @ offset - ball_radius(time) ** 2
    hit = b * b - c > 0
    distance = -b - np.sqrt(np.maximum(b * b - c, 0))
    normal = (offset + distance[..., None] * rays) / ball_radius(time)
    rgba = np.concatenate([0.5 + 0.45 * normal, np.ones((fine, fine, 1))], -1) * hit[..., None]
    mean = rgba.reshape(size, samples, size, samples, 4).mean((1, 3))
    colour = np.where(mean[..., 3:] > 0, mean[..., :3] / np.maximum(mean[..., 3:], 1e-9), 1.0)
    return np.round(255 * np.concatenate([colour, mean[..., 3:]], -1)).clip(0, 255).astype(np.uint8)


def write_case(folder: Path, elevation: float = 0.0) -> Path:
    """The case: the input view, a ring of nine with the role nv8, and one view from above with the role elev."""
    places = [(0.0, elevation, "input"), *[(a, elevation, "nv8") for a in RING], (45.0, 30.0, "elev")]
    times = np.linspace(0, 1, FRAMES)
    views = []
    for azimuth, height, role in places:
        c2w = look_at_cameras(np.array([azimuth]), np.array([height]))[0]
        name = f"az{azimuth:03.0f}_el{height:+03.0f}"
        files = [f"{'input' if role == 'input' else f'views/{name}'}/{i:03d}.webp" for i in range(FRAMES)]
        for file, time in zip(files, times, strict=True):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(c2w, time)).save(path, lossless=True, exact=True)
        views.append(
            {
                "id": name,
                "roles": [role],
                "azimuth_deg": azimuth,
                "elevation_deg": height,
                "c2w": c2w.tolist(),
                "frames": files,
            }
        )
    description = {
        "w": SIZE,
        "h": SIZE,
        "fl_x": FOCAL,
        "fov_x_deg": FIELD_OF_VIEW_DEG,
        "radius": RADIUS,
        "input_elevation_deg": elevation,
        "times": times.tolist(),
        "views": views,
    }
    (folder / "cameras.json").write_text(json.dumps(description))
    write_geometry(folder, times[[0, 2, 4]])
    return folder


def write_geometry(folder: Path, times: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(len(times), 500, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    points = np.stack([centre(t) + ball_radius(t) * n for t, n in zip(times, normals, strict=True)])
    tracks = np.stack([centre(t) + ball_radius(t) * normals[0, :64] for t in times])
    np.savez(
        folder / "geometry.npz",
        frame_indices=np.round(times * (FRAMES - 1)).astype(int),
        times=times,
        points=points.astype(np.float32),
        normals=np.round(127 * normals).astype(np.int8),
        tracks=tracks.astype(np.float32),
    )
