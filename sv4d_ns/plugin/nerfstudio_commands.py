"""nerfstudio's commands on our runs: the run is found where it lies now, and what cannot work is said beforehand.

`ns-viewer`, `ns-eval`, `ns-render`, `ns-export` and `ns-train --load-config` read a run's config.yml themselves and
know no way to be told of a plugin's wishes. The trainer's configuration asks here while it is being read
(`FieldTrainerConfig.__setstate__`); which file is read, and for which command, the call stack tells.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any

from sv4d_ns.runs.layout import checkpoint_steps, newest_views
from sv4d_ns.runs.open import config_sentence
from sv4d_ns.utils.errors import InputError, file_sentence

RAW, TRUE = "raw-", "gt-"
"""What `ns-render dataset` lets stand before the name of a picture."""


@dataclass(frozen=True)
class Opening:
    """A config.yml that nerfstudio is reading."""

    path: Path
    command: Any
    """nerfstudio's command, with its flags as attributes; None for a call from Python and for ns-train."""
    training: bool
    """For ns-train, which goes on with unfinished runs, too."""


def opening() -> Opening | None:
    """What nerfstudio reads at this moment, by the functions that are running; None where it reads nothing."""
    path, command, training = None, None, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        place = (frame.f_globals.get("__name__"), frame.f_code.co_name)
        if place == ("nerfstudio.utils.eval_utils", "eval_setup"):
            path = frame.f_locals["config_path"]
        elif place == ("nerfstudio.scripts.train", "main"):
            path, training = frame.f_locals["config"].load_config, True
        elif place[1] == "main" and str(place[0]).startswith("nerfstudio.scripts.") and "self" in frame.f_locals:
            command = frame.f_locals["self"]
        frame = frame.f_back
    return None if path is None else Opening(Path(path), command, training)


def prepare(config: Any, opened: Opening) -> None:
    """Let a trainer's configuration that has just been read point to where its run lies, and check the command.

    Raises:
        InputError: the run is not there or unfinished, or the command cannot do what it was asked for.
    """
    if opened.command is not None:
        sys.excepthook = say_file_errors
        check_command(opened.command, config)
    find_run(config, opened.path, needs_checkpoint=not opened.training)
    if config.pipeline.datamanager.dataparser is None:
        from sv4d_ns.plugin.datamanager import GridParserConfig

        config.pipeline.datamanager.dataparser = GridParserConfig()


def find_run(config: Any, path: Path, needs_checkpoint: bool = True) -> None:
    """Point a configuration to the run beside its file, if one is there; else to where it says the run is.

    So a run can be moved or copied, and opened from any folder.

    Raises:
        InputError: the run is not there, or (with `needs_checkpoint`) has no checkpoint yet.
    """
    beside = path.absolute().parent
    if _is_run_folder(beside, config) or (not needs_checkpoint and (beside / "run.json").is_file()):
        config.move_to(beside)
    if not needs_checkpoint:
        return
    if not _is_run_folder(config.get_base_dir(), config):
        raise InputError(
            f"{path} was moved without its run: neither {beside} nor the folder it names, {config.get_base_dir()}, "
            f"holds {config.relative_model_dir}/ and views/: bring the whole folder, with both beside config.yml."
        )
    if not checkpoint_steps(config.get_checkpoint_dir()):
        raise InputError(
            f"{path} belongs to an unfinished run, {config.get_checkpoint_dir()} holds no checkpoint: "
            f"let it finish ('ns-train {config.method_name} --load-config {path}' goes on with it)."
        )


def _is_run_folder(folder: Path, config: Any) -> bool:
    return (folder / config.relative_model_dir).is_dir() or newest_views(folder) is not None


def say_file_errors(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """For `sys.excepthook`: a sentence instead of a traceback where a file or folder of the user's is at fault, and for
    Ctrl-C, with which a viewer is ended."""
    sentence = file_sentence(error) if isinstance(error, OSError) else None
    if isinstance(error, KeyboardInterrupt):
        print("Stopped.", file=sys.stderr)
    elif sentence is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"Error: {sentence}", file=sys.stderr)


def expect_unreadable_configs() -> None:
    """In nerfstudio's commands: a sentence where --load-config names no config, which they read before we can look."""
    if Path(sys.argv[0]).name.startswith("ns-"):
        sys.excepthook = say_config_errors


CONFIG_READERS = {("eval_utils.py", "eval_setup"), ("train.py", "main")}
"""File and function of nerfstudio's that read --load-config."""
FILE_READERS = ("pathlib", "codecs", "<frozen codecs>")
"""What they read it with, beside yaml."""


def say_config_errors(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """For `sys.excepthook`: a sentence for a file of the command line that cannot be read, and for Ctrl-C."""
    if isinstance(error, OSError) and any(str(error.filename) in word for word in sys.argv[1:]):
        sentence = config_sentence(Path(error.filename)) or f"{error.filename} cannot be read ({error.strerror})."
        print(f"Error: {sentence}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        say_file_errors(kind, error, traceback)
    elif (asked := _load_config()) is not None and _reads_a_config(traceback):
        print(f"Error: {asked} is no config.yml of a run: give the one in a run's folder.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _reads_a_config(traceback: TracebackType | None) -> bool:
    """Whether an error is of the lines in which nerfstudio reads --load-config, or of the YAML reader they call."""
    places = [frame.f_code for frame, _ in walk_tb(traceback)]
    files = [Path(place.co_filename) for place in places]
    at = [n for n, place in enumerate(places) if (files[n].name, place.co_name) in CONFIG_READERS]
    return bool(at) and all(file.parent.name == "yaml" or file.stem in FILE_READERS for file in files[at[-1] + 1 :])


def _load_config() -> str | None:
    """What --load-config says on the command line; None where it is not there."""
    for number, word in enumerate(sys.argv):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == "--load-config":
            return value if equals else " ".join(sys.argv[number + 1 : number + 2])
    return None


# ---------------------------------------------------------------------------------------------------------- the checks


def check_command(command: Any, config: Any) -> None:
    """Look at the flags of one of nerfstudio's commands.

    Raises:
        InputError: naming the flag and what to give.
    """
    for kind in type(command).__mro__:
        check = CHECKS.get(kind.__name__)
        if check is not None:
            check(command, config)


def _require(holds: bool, flag: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"--{flag} {value} cannot be used: give {wanted}.")


def _check_render(command: Any, config: Any) -> None:
    factor = command.downscale_factor
    _require(factor is None or (math.isfinite(factor) and factor > 0), "downscale-factor", factor, "a number above 0")
    rays = command.eval_num_rays_per_chunk
    _require(rays is None or rays >= 1, "eval-num-rays-per-chunk", rays, "1 ray or more")
    _require(0 <= command.jpeg_quality <= 100, "jpeg-quality", command.jpeg_quality, "0 to 100")
    path, as_video = command.output_path, getattr(command, "output_format", None) == "video"
    if as_video:
        _require(path.suffix != "", "output-path", path, "the name of a video, ending in .mp4")
        _require(not path.is_dir(), "output-path", path, "the name of a video: this is a folder")
    _require(as_video or not path.is_file(), "output-path", path, "a folder: this is a file")
    _require(_can_be_made_below(path.absolute().parent), "output-path", path, "a place you may write to")
    _check_names(command, config)


def _can_be_made_below(folder: Path) -> bool:
    """Whether files may be written there, once the folders on the way are made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _check_names(command: Any, config: Any) -> None:
    from sv4d_ns.plugin.distillation_model import FourDiffusionModelConfig
    from sv4d_ns.plugin.render_outputs import channel_names

    known = (*channel_names(deforms=not isinstance(config.pipeline.model, FourDiffusionModelConfig)), "rgba")
    if type(command).__name__ == "DatasetRender":
        known = (*known, *(RAW + name for name in known), TRUE + "rgb", RAW + TRUE + "rgb")
    for name in command.rendered_output_names or ():
        if name not in known:
            raise InputError(f"--rendered-output-names {name} is no picture of this method: it has {', '.join(known)}.")


def _check_interpolated(command: Any, config: Any) -> None:
    steps = command.interpolation_steps
    _require(steps >= 1, "interpolation-steps", steps, "1 step or more")
    _require(command.frame_rate >= 1, "frame-rate", command.frame_rate, "1 picture a second or more")


def _check_spiral(command: Any, config: Any) -> None:
    _require(command.frame_rate >= 1, "frame-rate", command.frame_rate, "1 picture a second or more")
    long_enough = math.isfinite(command.seconds) and command.seconds * command.frame_rate >= 1
    _require(long_enough, "seconds", command.seconds, "the length of at least one picture")
    _require(math.isfinite(command.radius), "radius", command.radius, "a length in world units")


def _check_dataset(command: Any, config: Any) -> None:
    if command.data is not None:
        raise InputError(
            f"--data {command.data} cannot be used: a run is rendered at the cameras of its own views; leave it out."
        )


def _check_camera_path(command: Any, config: Any) -> None:
    path = command.camera_path_filename
    remedy = "give a camera path the viewer has saved (its tab Render, Generate Command)."
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"--camera-path-filename {path} does not exist: {remedy}") from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--camera-path-filename {path} cannot be read ({reason}): {remedy}") from error
    flaw = camera_path_flaw(read)
    if flaw is not None:
        raise InputError(f"--camera-path-filename {path} cannot be used, {flaw}: {remedy}")


def camera_path_flaw(read: Any) -> str | None:
    """What keeps nerfstudio from following a camera path that was read from JSON; None where nothing does."""
    if not isinstance(read, dict):
        return "it is no camera path"
    for name in ("render_height", "render_width", "seconds"):
        if not _is_number(read.get(name)) or not read[name] > 0:
            return f"its {name} is not a number above 0"
    cameras = read.get("camera_path")
    if not isinstance(cameras, list) or not cameras:
        return "it has no cameras"
    for number, camera in enumerate(cameras, start=1):
        if not isinstance(camera, dict):
            return f"its camera {number} is none"
        matrix = camera.get("camera_to_world")
        if not isinstance(matrix, list) or len(matrix) != 16 or not all(_is_number(entry) for entry in matrix):
            return f"camera_to_world of its camera {number} is not 16 numbers"
        if not _is_number(camera.get("fov")) or not 0 < camera["fov"] < 180:
            return f"fov of its camera {number} is not an angle between 0 and 180 degrees"
        if "render_time" in camera and not (_is_number(camera["render_time"]) and 0 <= camera["render_time"] <= 1):
            return f"render_time of its camera {number} is not a number from 0 to 1"
    if not isinstance(read.get("camera_type", ""), str):
        return "its camera_type is no name"
    return _crop_flaw(read.get("crop"))


def _crop_flaw(crop: Any) -> str | None:
    if crop is None:
        return None
    colour = crop.get("crop_bg_color") if isinstance(crop, dict) else None
    triples = [crop.get(name) for name in ("crop_center", "crop_scale")] if isinstance(crop, dict) else []
    triples += [crop["crop_rot"]] if isinstance(crop, dict) and "crop_rot" in crop else []
    fit = all(isinstance(t, list) and len(t) == 3 and all(_is_number(entry) for entry in t) for t in triples)
    if not triples or not fit or not isinstance(colour, dict) or not all(_is_number(colour.get(c)) for c in "rgb"):
        return "its crop lacks crop_center, crop_scale (three numbers each) or crop_bg_color (r, g, b)"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_eval(command: Any, config: Any) -> None:
    path, pictures = command.output_path, command.render_output_path
    _require(path.suffix == ".json" and not path.is_dir(), "output-path", path, "the name of a file ending in .json")
    _require(pictures is None or not pictures.is_file(), "render-output-path", pictures, "a folder: this is a file")


def _check_export(command: Any, config: Any) -> None:
    folder = command.output_dir
    _require(not folder.is_file(), "output-dir", folder, "a folder: this is a file")
    for flag in ("num_points", "num_rays_per_batch", "downscale_factor"):
        value = getattr(command, flag, None)
        _require(value is None or value >= 1, flag.replace("_", "-"), value, "1 or more")


def _refuse_gaussians(command: Any, config: Any) -> None:
    raise InputError(
        "gaussian-splat exports runs of splatfacto, and this run has no Gaussians: "
        "'splats' writes one Gaussian-splat .ply per frame of it."
    )


def _refuse_marching_cubes(command: Any, config: Any) -> None:
    raise InputError(
        "marching-cubes exports runs with a signed distance field, and this run has none: 'mesh' writes its surface as "
        "an animated .glb ('mesh --mode sequence --sequence ply' as one mesh per frame)."
    )


def _refuse_tsdf(command: Any, config: Any) -> None:
    raise InputError(
        "tsdf would fuse pictures of this run into the object and slabs of space beside it that no camera sees: 'mesh' "
        "writes the surface alone ('mesh --mode sequence --sequence ply' as one mesh per frame)."
    )


def _check_poisson(command: Any, config: Any) -> None:
    import torch

    if command.texture_method == "nerf" and not torch.cuda.is_available():
        raise InputError(
            "poisson with --texture-method nerf renders millions of rays, for which a CPU takes very long: 'mesh' "
            "writes a textured, animated .glb, and --texture-method point_cloud a mesh without a texture."
        )


CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "BaseRender": _check_render,
    "RenderCameraPath": _check_camera_path,
    "RenderInterpolated": _check_interpolated,
    "SpiralRender": _check_spiral,
    "DatasetRender": _check_dataset,
    "ComputePSNR": _check_eval,
    "Exporter": _check_export,
    "ExportGaussianSplat": _refuse_gaussians,
    "ExportMarchingCubesMesh": _refuse_marching_cubes,
    "ExportTSDFMesh": _refuse_tsdf,
    "ExportPoissonMesh": _check_poisson,
}
"""By the name of nerfstudio's command or of what it is derived from."""
