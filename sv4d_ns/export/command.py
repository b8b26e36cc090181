"""The `ns-export` superset: nerfstudio's own sub-commands and ours. Also reached as `sv4d export`.

Only the flags are here; heavy packages are imported when a command runs, so that help and wrong paths answer at once.
"""

import ctypes
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args

import tyro

from sv4d_ns.export.folder import no_folder_left, output_folder
from sv4d_ns.runs.open import FinishedRun, check_config_path, load_run
from sv4d_ns.utils.errors import InputError, one_sentence_errors

__all__ = ["FinishedRun", "load_run"]


@dataclass
class _Export:
    """What every export of a run needs."""

    load_config: Path
    """Path to the run's config.yml."""
    output_dir: Path
    """Folder for the files; it is made if needed."""
    overwrite: bool = False
    """Write into an output folder that has files in it; files of the same name are replaced."""
    resolution: int = 128
    """Nodes of the marching-cubes grid along each side of the object's box."""
    max_faces: Annotated[Optional[int], tyro.conf.arg(aliases=["--faces"])] = 20_000  # noqa: UP045 - as in nerfstudio
    """Face budget: the mesh is simplified to it. None keeps every face of the marching cubes."""
    texture: Literal["animated", "film", "field", "views", "none"] = "animated"
    """Where colours come from. film: the input video where it saw a place, the fitted field elsewhere. animated: the
    same, and in .glb and web page each frame also has its own picture of what the video shows then (a viewer without
    KHR_animation_pointer shows film). field: the fitted field alone. views: the input and generated views that see a
    place best. none: as film, kept at the vertices, without a texture."""
    texture_size: Optional[int] = None  # noqa: UP045
    """Texels along the side of the texture. None: 1024, or 2048 for a video of 384 pixels or more."""
    fps: Optional[float] = None  # noqa: UP045
    """Frames per second of the animation. None keeps the input clip's."""
    root_motion: Literal["in-place", "restore"] = "in-place"
    """restore: put the object's way through the source video back, where the crop followed it."""

    def main(self) -> None:
        """Check the flags, load the run, write the files and say what to do with them.

        Raises:
            InputError: the config, the run, the field, a flag or the output folder cannot be used.
        """
        check_config_path(self.load_config)
        self.check()
        with output_folder(self.output_dir, self.overwrite) as folder:
            from sv4d_ns.export.terminal import Terminal
            from sv4d_ns.utils.threads import torch_threads

            run = load_run(self.load_config)
            terminal = Terminal()
            # frames and rays are spread over all cores, where torch's own threads would be in their way
            with torch_threads(1):
                files, advice = self.write(run, folder, terminal)
            for line in [*(_described(file) for file in files), advice]:
                terminal.say(line)

    def check(self) -> None:
        """Refuse flags before anything is loaded."""
        from sv4d_ns.export.limits import check_face_budget, check_resolution, check_texture_size

        check_resolution(self.resolution)
        check_face_budget(self.max_faces)
        if self.texture_size is not None:
            check_texture_size(self.texture_size)
        if self.fps is not None and not self.fps > 0:
            raise InputError(f"--fps {self.fps:g} is not a speed: give a number above 0, or leave it out.")

    def write(self, run: FinishedRun, folder: Path, terminal: Any) -> tuple[list[Path], str]:
        """Make the files; returns them and what to do next."""
        raise NotImplementedError

    def options(self) -> Any:
        """The flags as `make.Options`."""
        from sv4d_ns.export.make import Options

        return Options(
            resolution=self.resolution,
            max_faces=self.max_faces,
            texture=self.texture,
            texture_size=self.texture_size,
            fps=self.fps,
            restore_root_motion=self.root_motion == "restore",
        )


@dataclass
class ExportMesh(_Export):
    """Export a trained run as one animated, textured .glb (and, on request, USD and one mesh per frame)."""

    mode: Literal["animated", "sequence"] = "animated"
    """animated: one mesh of fixed topology. sequence: a mesh of its own for every frame, for objects that come apart
    or merge, coloured by the field (or by the views, with --texture views), in several times the time; written as
    --sequence says (ply if it is none) and, on request, as USD."""
    animation: Literal["morph", "skin"] = "morph"
    """How the .glb moves: one morph target per frame (exact), or a skeleton with at most four bones per vertex (small,
    what game engines want)."""
    max_bones: int = 64
    """Bones the skeleton may have; they are added until the error is below 0.5 % of the box's diagonal."""
    watertight: bool = False
    """Close the mesh: every edge belongs to exactly two faces."""
    remesh: Literal["none", "triangle", "quad"] = "none"
    """Make the surface anew of even triangles, or of quadrilaterals (each two triangles in a row), for editing; needs
    the extra 'remesh'. A quad mesh may have small holes."""
    ground: bool = True
    """Put the lowest point of the whole clip at height 0; --no-ground keeps the middle of the object's box there."""
    height: Optional[float] = None  # noqa: UP045
    """Metres the object is to be tall, from its lowest to its highest point where it stands tallest (1.8 for a person).
    None keeps the run's scale, in which the object's box is about 1 m wide."""
    usd: Literal["none", "usdc", "usdz"] = "none"
    """Also write the animation as USD (needs the extra 'usd': pip install '.[usd]' in this package's folder)."""
    sequence: Literal["none", "obj", "ply"] = "none"
    """Also write one coloured mesh per frame in this format."""

    def check(self) -> None:
        super().check()
        if not 1 <= self.max_bones <= 255:
            raise InputError(f"--max-bones {self.max_bones} cannot be: give 1 to 255.")
        if self.height is not None and not self.height > 0:
            raise InputError(f"--height {self.height:g} is no size: give metres above 0, or leave it out.")
        if self.mode == "sequence":
            self._check_sequence()
        if self.remesh != "none":
            from sv4d_ns.export.surface.remeshing import require_instant_meshes

            if self.watertight:
                raise InputError("--remesh does not promise a closed surface: leave out --watertight.")
            require_instant_meshes()
        if self.usd != "none":
            from sv4d_ns.export.formats.usd import require_usd

            require_usd()

    def _check_sequence(self) -> None:
        """Refuse what only one mesh that moves can have."""
        given = {
            "--remesh": self.remesh != "none",
            "--animation": self.animation != "morph",
            "--texture-size": self.texture_size is not None,
            f"--texture {self.texture}": self.texture not in ("animated", "field", "views", "none"),
        }
        for flag in (name for name, wrong in given.items() if wrong):
            raise InputError(f"{flag} is for one mesh that moves: leave it out, or leave out --mode sequence.")

    def options(self) -> Any:
        return replace(
            super().options(),
            watertight=self.watertight,
            remesh=self.remesh,
            hide_webs=self.animation == "morph" and not self.watertight and self.remesh == "none",
        )

    def write(self, run: FinishedRun, folder: Path, terminal: Any) -> tuple[list[Path], str]:
        from sv4d_ns.export import files
        from sv4d_ns.export.make import make_asset

        if self.mode == "sequence":
            file_format = "ply" if self.sequence == "none" else self.sequence
            return files.write_frames(
                run, self.options(), folder, file_format, self.usd, terminal, self.ground, self.height
            )
        return files.write_mesh(
            run,
            make_asset(run, self.options(), terminal),
            folder,
            self.animation,
            self.max_bones,
            self.usd,
            self.sequence,
            terminal,
            self.ground,
            self.height,
        )


def _still(options: Any) -> Any:
    """For points, which keep their colours: pictures of each frame would be made for nothing."""
    return replace(options, texture="film") if options.texture == "animated" else options


@dataclass
class ExportPointCloudSequence(_Export):
    """Export a trained run as one coloured point cloud (.ply) per frame; a point keeps its place on the surface."""

    num_points: int = 100_000
    """Points on the surface, spread evenly over it in the first frame."""

    def check(self) -> None:
        super().check()
        if self.num_points < 1:
            raise InputError(f"--num-points {self.num_points} leaves no cloud: give 1 or more.")

    def write(self, run: FinishedRun, folder: Path, terminal: Any) -> tuple[list[Path], str]:
        from sv4d_ns.export import files

        return files.write_point_clouds(run, _still(self.options()), folder, self.num_points, terminal)


@dataclass
class ExportSplats(_Export):
    """Export a trained run as one Gaussian-splat .ply per frame, sampled from the surface."""

    num_splats: int = 60_000
    """Gaussians on the surface."""
    refine: Literal["auto", "never"] = "auto"
    """auto: on a CUDA device, colours, sizes and opacities are refined against the run's views by gsplat."""
    refine_steps: int = 1000
    """Steps of that refinement."""

    def check(self) -> None:
        super().check()
        if self.num_splats < 1:
            raise InputError(f"--num-splats {self.num_splats} leaves nothing to see: give 1 or more.")

    def write(self, run: FinishedRun, folder: Path, terminal: Any) -> tuple[list[Path], str]:
        from sv4d_ns.export import files

        steps = self.refine_steps if self.refine == "auto" else 0
        return files.write_splats(run, _still(self.options()), folder, self.num_splats, steps, terminal)


@dataclass
class ExportWeb(_Export):
    """Export a trained run as one web page that opens from disk: play, scrub and orbit beside the input video."""

    def write(self, run: FinishedRun, folder: Path, terminal: Any) -> tuple[list[Path], str]:
        from sv4d_ns.export import files

        return files.write_web(run, self.options(), folder, terminal)


COMMANDS: dict[str, type[_Export]] = {
    "mesh": ExportMesh,
    "point-cloud-sequence": ExportPointCloudSequence,
    "splats": ExportSplats,
    "web": ExportWeb,
}
"""Our sub-commands; nerfstudio's are its own."""


def _described(path: Path) -> str:
    """A written file or folder with its size."""
    if path.is_dir():
        inside = [file for file in path.iterdir() if file.is_file()]
        return f"{path}/  ({len(inside)} files, {sum(file.stat().st_size for file in inside) / 1e6:.1f} MB)"
    size = path.stat().st_size
    return f"{path}  ({size / 1e6:.1f} MB)" if size >= 1e5 else f"{path}  ({size / 1e3:.0f} kB)"


# ------------------------------------------------------------------------------------------------------ the command


def commands() -> Any:
    """nerfstudio's closed union of exporters plus ours (importing it takes some seconds).

    Raises:
        InputError: nerfstudio's exporters cannot be imported on this machine.
    """
    _provide_libusb()
    try:
        from nerfstudio.scripts import exporter
    except ImportError as error:
        raise InputError(
            f"nerfstudio's own exporters cannot be loaded here ({error}): install what is missing; "
            f"{', '.join(COMMANDS)} work without them."
        ) from error
    union, *_ = get_args(exporter.Commands)
    ours = (Annotated[kind, tyro.conf.subcommand(name=name)] for name, kind in COMMANDS.items())
    return Union.__getitem__((*get_args(union), *ours))


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

    Ours are parsed alone, because importing nerfstudio's exporters for their help would take seconds.

    Raises:
        InputError: see the commands.
        SystemExit: help was asked for, or the arguments do not parse.
    """
    tyro.extras.set_accent_color("bright_yellow")
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        command: Any = tyro.cli(COMMANDS[name], prog=f"{program} {name}", args=list(arguments[1:]))
        command.main()
    else:
        # nerfstudio marks its union the same way: booleans take a value
        command = tyro.cli(commands(), prog=program, args=list(arguments), config=(tyro.conf.FlagConversionOff,))
        check_config_path(command.load_config)  # nerfstudio's do not look
        with no_folder_left(command.output_dir):
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
