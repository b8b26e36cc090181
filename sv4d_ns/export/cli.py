"""The `ns-export` superset: nerfstudio's own sub-commands and `mesh`. Also reached as `sv4d export`.

Heavy packages are imported inside functions, so that help and wrong paths answer at once.
"""

import ctypes
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union, get_args

import tyro

from sv4d_ns.errors import InputError, one_sentence_errors
from sv4d_ns.runs import checkpoint_steps

if TYPE_CHECKING:
    from rich.progress import Progress

    from sv4d_ns.export.mesh import AnimatedField, AnimatedMesh
    from sv4d_ns.views import ViewGrid

GLB_NAME = "mesh.glb"

INPUT_IMPORTANCE = 3.0
"""Weight of the input camera against each generated view's when vertices are coloured: its pixels are real."""


@dataclass
class ExportMesh:
    """Export a trained run as one animated, coloured .glb (and, on request, one .obj or .ply per frame)."""

    load_config: Path
    """Path to the run's config.yml."""
    output_dir: Path
    """Folder for the files; it is made if needed, and files of the same name in it are replaced."""
    resolution: int = 128
    """Nodes of the marching-cubes grid along each side of the object's box."""
    max_faces: Optional[int] = 20_000  # noqa: UP045 - tyro shows it as in nerfstudio
    """Face budget: the mesh is simplified to it. None keeps every face of the marching cubes."""
    sequence: Literal["none", "obj", "ply"] = "none"
    """Also write one coloured mesh per frame in this format."""
    fps: Optional[float] = None  # noqa: UP045
    """Frames per second of the animation. None keeps the input clip's."""

    def main(self) -> None:
        """Load the run, make the mesh, write the files and say what to do with them.

        Raises:
            InputError: the config, the run, the field or the output folder cannot be used.
        """
        _check_config_path(self.load_config)
        if self.fps is not None and not self.fps > 0:
            raise InputError(f"--fps {self.fps:g} is not a speed: give a number above 0, or leave it out.")
        with _output_folder(self.output_dir), ExitStack() as stack:
            run = load_run(self.load_config)
            progress = stack.enter_context(_progress())
            mesh = make_mesh(run, self.fps or run.views.fps, self.resolution, self.max_faces, progress)
            files = write_files(mesh, self.output_dir, self.sequence, run.name, run.extras, progress)
        _say_next(files, mesh)


# --------------------------------------------------------------------------------------------------- loading a run


@dataclass(frozen=True)
class FinishedRun:
    """What an export needs of a finished run."""

    field: "AnimatedField"
    possible: Callable[[Any], Any]
    """Whether canonical points [n, 3] may hold the object, as the run's renderer sees it (bool [n])."""
    occupancy: Any
    """The renderer's empty-space grid; `renders.render_rgba` takes it beside the field."""
    views: "ViewGrid"
    """What the field was fitted to: times, frame rate, cameras, provenance."""
    name: str
    extras: dict[str, Any]
    """Licence and provenance for the file's `asset.extras`."""


def load_run(load_config: Path) -> FinishedRun:
    """Open a run through nerfstudio; views are read from the run's grid, no diffusion weights are needed.

    Raises:
        InputError: no such file, not a nerfstudio config, another method's run, or no checkpoint yet.
    """
    _check_config_path(load_config)
    import yaml
    from nerfstudio.utils.eval_utils import eval_setup

    config: Any  # the plugin's own classes, not the base classes nerfstudio declares
    pipeline: Any
    try:
        config, pipeline, _, step = eval_setup(
            load_config, test_mode="inference", update_config_callback=lambda config: _checked(config, load_config)
        )
    except (yaml.YAMLError, UnicodeDecodeError, AssertionError) as error:
        raise InputError(f"{load_config} is not a nerfstudio config.yml: give the one in the run's folder.") from error
    grid = pipeline.datamanager.grid
    return FinishedRun(
        field=pipeline.model.field,
        possible=lambda x: _occupied_at_rest(pipeline.model, x),
        occupancy=pipeline.model.occupancy,
        views=grid,
        name=config.experiment_name or config.method_name,
        extras=_extras(grid.provenance, config.method_name, step),
    )


def _occupied_at_rest(model: Any, x: Any) -> Any:
    """The renderer's own empty-space test at the time whose shape is the canonical one."""
    return model.occupancy.is_occupied(x, x.new_full((len(x), 1), model.field.config.canonical_time))


def _check_config_path(load_config: Path) -> None:
    if not load_config.is_file():
        raise InputError(f"{load_config} does not exist: give --load-config the config.yml in the run's folder.")


def _checked(config: Any, load_config: Path) -> Any:
    """Refuse what cannot be exported before anything heavy is built; find the checkpoints beside a moved config."""
    target = config.pipeline.model._target
    if not any(base.__module__.partition(".")[0] == "sv4d_ns" for base in target.__mro__):
        raise InputError(
            f"{load_config} is a run of {config.method_name}, which has no deformable field to animate: "
            "'mesh' exports runs of sv4d; nerfstudio's own sub-commands export the others."
        )
    run_dir = load_config.absolute().parent
    if not config.get_checkpoint_dir().is_dir():
        # the run was moved, or its relative path is meant from another folder: everything lies beside config.yml
        config.relative_model_dir = run_dir / config.relative_model_dir
        config.pipeline.datamanager.run_dir = run_dir
    if not checkpoint_steps(config.get_checkpoint_dir()):
        raise InputError(
            f"{load_config} belongs to an unfinished run, {config.get_checkpoint_dir()} holds no checkpoint: "
            "let ns-train finish, or resume it."
        )
    return config


def _extras(provenance: dict[str, Any], method: str, step: int) -> dict[str, Any]:
    return {"sv4d": {"method": method, "step": step, "provenance": provenance}}


# ------------------------------------------------------------------------------------------- making and writing it


def make_mesh(
    run: FinishedRun, fps: float, resolution: int, max_faces: int | None, progress: "Progress"
) -> "AnimatedMesh":
    """Canonical mesh, vertex tracks and colours, with progress bars and a line for each finding."""
    import numpy as np

    from sv4d_ns.export.mesh import animate, canonical_mesh, follow_vertices, opacity_grid, surface_colors

    sampling = progress.add_task("sampling the field", total=resolution)
    grid = opacity_grid(run.field, resolution, run.possible, advance=lambda: progress.advance(sampling))
    canonical = canonical_mesh(grid, max_faces)
    following = progress.add_task("following the vertices", total=run.views.num_frames)
    tracks = follow_vertices(run.field, canonical, run.views.times, advance=lambda: progress.advance(following))
    _say(
        f"{len(canonical.vertices)} vertices, {len(canonical.faces)} faces, {run.views.num_frames} frames; "
        f"{canonical.dropped_parts} floating parts dropped"
    )
    _say(tracks.summary())
    importance = np.full(run.views.num_views + 1, 1.0)
    importance[0] = INPUT_IMPORTANCE
    colors = surface_colors(run.field, canonical, grid, run.views.plan.c2w()[:, :3, 3], importance)
    return animate(canonical, tracks, colors, fps)


def write_files(
    mesh: "AnimatedMesh",
    output_dir: Path,
    sequence: Literal["none", "obj", "ply"],
    name: str,
    extras: dict[str, Any],
    progress: "Progress",
) -> list[Path]:
    """Write the GLB and the sequence; returns the GLB and, for a sequence, its folder."""
    from sv4d_ns.export.gltf import write_animated_glb
    from sv4d_ns.export.sequence import write_sequence

    files = []
    if sequence != "none":
        folder = output_dir / f"frames_{sequence}"
        writing = progress.add_task(f"writing .{sequence} frames", total=len(mesh.positions))
        write_sequence(mesh, folder, sequence, advance=lambda: progress.advance(writing))
        files.append(folder)
    write_animated_glb(mesh, output_dir / GLB_NAME, name, extras)
    return [output_dir / GLB_NAME, *files]


@contextmanager
def _output_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and prove that it can be written to; folders made here go again if the block fails."""
    made = []
    try:
        for part in [*reversed(folder.absolute().parents), folder.absolute()]:
            if not part.is_dir():
                part.mkdir()
                made.append(part)
        probe = folder / ".sv4d-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"--output-dir {folder} cannot be written to ({error.strerror}): give a folder you own."
        ) from error
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:  # someone has put a file there meanwhile
            return


def _progress() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:>24}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), transient=False
    )


def _say(line: str) -> None:
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(line, markup=False)


def _say_next(files: Sequence[Path], mesh: "AnimatedMesh") -> None:
    glb = files[0]
    seconds = (len(mesh.positions) - 1) / mesh.fps
    _say(f"{glb}  ({glb.stat().st_size / 1e6:.1f} MB, {len(mesh.positions)} frames, {seconds:.2f} s)")
    for folder in files[1:]:
        _say(f"{folder}{'/'}  ({len(mesh.positions)} frames)")
    _say(
        f"Open {glb.name} in Blender (File > Import > glTF 2.0; set the scene to {mesh.fps:g} fps) or drop it on "
        "https://gltf-viewer.donmccurdy.com; press play."
    )


# ------------------------------------------------------------------------------------------------------ the command


def commands() -> Any:
    """nerfstudio's closed union of exporters plus `mesh` (importing it takes some seconds).

    Raises:
        InputError: nerfstudio's exporters cannot be imported on this machine.
    """
    _provide_libusb()
    try:
        from nerfstudio.scripts import exporter
    except ImportError as error:
        raise InputError(
            f"nerfstudio's own exporters cannot be loaded here ({error}): install what is missing; "
            "the 'mesh' sub-command works without them."
        ) from error
    union, *_ = get_args(exporter.Commands)
    members = (*get_args(union), Annotated[ExportMesh, tyro.conf.subcommand(name="mesh")])
    return Union.__getitem__(members)


def _provide_libusb() -> None:
    """Load the libusb that open3d's Linux wheel links to but does not carry, where the system has none.

    nerfstudio's exporters import open3d at their top; on a bare machine or container that fails. A library already
    in the process under the same name satisfies the later load.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libusb-1.0.so.0")
    except OSError:
        import libusb_package

        ctypes.CDLL(str(libusb_package.get_library_path()))


def run(arguments: Sequence[str], program: str = "sv4d export") -> None:
    """Parse and run one export command.

    `mesh` is parsed alone, because importing nerfstudio's exporters for its help would take seconds.

    Raises:
        InputError: see the commands.
        SystemExit: help was asked for, or the arguments do not parse.
    """
    tyro.extras.set_accent_color("bright_yellow")
    if arguments[:1] == ["mesh"]:
        command = tyro.cli(ExportMesh, prog=f"{program} mesh", args=list(arguments[1:]))
    else:
        # nerfstudio marks its union the same way: booleans take a value
        command = tyro.cli(commands(), prog=program, args=list(arguments), config=(tyro.conf.FlagConversionOff,))
    command.main()


def installed_command() -> str:
    """How to reach the exporters in this environment: "ns-export", or "sv4d export" where nerfstudio's script won.

    Both packages install a script of that name and the last one written stays (docs/export.md).
    """
    script = shutil.which("ns-export", path=sysconfig.get_path("scripts"))
    ours = script is not None and entrypoint.__module__.encode() in Path(script).read_bytes()
    return "ns-export" if ours else "sv4d export"


def entrypoint() -> None:
    """The `ns-export` console script."""
    with one_sentence_errors():
        run(sys.argv[1:], "ns-export")
