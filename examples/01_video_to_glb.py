"""A video becomes an animated GLB, step by step and without nerfstudio: the library's own way of `ns-train sv4d`.

    python examples/01_video_to_glb.py video.mp4 asset.glb

Stage 1 only; `ns-train sv4d` adds stage 2 (render, noise, denoise, fit again), the viewer and resuming.
"""

import tempfile
from pathlib import Path

import tyro

from sv4d_ns.export.formats.asset import grounded, moved_to
from sv4d_ns.export.formats.gltf import write_animated_glb
from sv4d_ns.export.make import Options, make_asset
from sv4d_ns.export.terminal import Terminal
from sv4d_ns.fitting.fit import FitOptions, GridFit
from sv4d_ns.runs.open import FinishedRun, provenance_extras
from sv4d_ns.synthesis.choice import load_synthesizer
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.images import resize_rgba
from sv4d_ns.utils.progress import bar
from sv4d_ns.video import load_object_video
from sv4d_ns.views.grid import ViewGrid


def main(
    video: Path,
    glb: Path,
    /,
    device: str = "cpu",
    frames: int = 21,
    steps: int = 2400,
    resolution: int = 128,
    seed: int = 0,
) -> None:
    """Make an animated GLB from a video.

    Args:
        video: anything with pictures in it: mp4, gif, a folder of images.
        glb: the file to write.
        device: cpu, or cuda for the official model (its weights have to be there).
        frames: at most so many of the video's, evenly spaced.
        steps: of the 4D optimisation.
        resolution: cells along the box that the surface is found in.
        seed: of everything random.
    """
    # 1. the object, cut out and cropped to squares
    clip = load_object_video(video, size=256, max_frames=frames)
    for sentence in clip.messages:
        print(sentence)

    # 2. views from other sides, by a multi-view video diffusion model
    synthesizer, sentence = load_synthesizer("auto", device)
    print(sentence)
    plan = synthesizer.default_plan()
    pictures = resize_rgba(clip.frames, synthesizer.image_size)
    with tempfile.TemporaryDirectory() as store, bar("Novel views") as progress:
        views = synthesizer.generate(pictures, plan, seed=seed, store=Path(store), progress=progress)
    provenance = {"source": clip.source, "seed": seed, **synthesizer.describe()}
    grid = ViewGrid(clip.frames, views.images, plan, clip.fps, views.confidence, provenance=provenance)

    # 3. one deforming field that explains all of them
    fit = GridFit(grid, FitOptions(steps=steps, seed=seed), device)
    with bar("4D optimisation") as progress:
        fit.run(on_step=progress)

    # 4. its surface as a mesh that moves, textured from the film
    extras = provenance_extras(provenance, "sv4d, stage 1", steps)
    run = FinishedRun(fit.field, fit.occupancy, grid, glb.stem, extras)
    mesh = make_asset(run, Options(resolution), Terminal())
    glb.parent.mkdir(parents=True, exist_ok=True)
    write_animated_glb(moved_to(mesh, grounded(mesh, height=None)), glb, glb.stem, run.extras)
    print(f"{glb}: {len(mesh.faces)} triangles, {mesh.num_frames} frames")


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
