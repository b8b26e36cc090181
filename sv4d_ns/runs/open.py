"""A finished run, opened for export: its field, what the field was fitted to, and where it all comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sv4d_ns.runs.layout import checkpoint_steps, newest_views, read_checkpoint
from sv4d_ns.runs.safe_config import Outline, check_config, config_outline
from sv4d_ns.utils.errors import InputError

if TYPE_CHECKING:
    import torch

    from sv4d_ns.views.grid import ViewGrid


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What an export needs of a finished run."""

    field: Any
    """A `sv4d_ns.export.surface.extraction.AnimatedField`."""
    occupancy: Any
    """The renderer's empty-space grid; `field.images.render_rgba` takes it beside the field."""
    views: "ViewGrid"
    """What the field was fitted to: times, frame rate, cameras, provenance."""
    name: str
    extras: dict[str, Any]
    """Licence and provenance for the file's `asset.extras`."""

    @property
    def canonical_frame(self) -> int:
        """The frame whose shape is the canonical one."""
        return int(abs(self.views.times - float(self.field.config.canonical_time)).argmin())

    def time(self, frame: int) -> float:
        """Of a frame, in [0, 1]."""
        return float(self.views.times[frame])

    def possible(self, time: float) -> "Callable[[torch.Tensor], torch.Tensor]":
        """Whether points [n, 3] may hold the object at a time, as the run's renderer sees it (bool [n])."""
        return lambda x: self.occupancy.is_occupied(x, x.new_full((len(x), 1), time))


def load_run(load_config: Path) -> FinishedRun:
    """Open a run; views are read from the run's grid, no diffusion weights are needed.

    A whole run of sv4d is opened as it lies, without nerfstudio, whose import takes as long as half an export; all
    others, and what is amiss with any, are nerfstudio's to open.

    Raises:
        InputError: no such file, not a nerfstudio config, another method's run, a config without its run beside it, or
            no checkpoint yet.
    """
    check_config_path(load_config)
    return _open_plainly(load_config) or _open_through_nerfstudio(load_config)


PLAIN_METHODS = {"sv4d_ns.plugin.trainer.SV4DTrainerConfig": "sv4d_ns.plugin.model.SV4DModel"}
"""Trainers' configurations whose runs need nothing of nerfstudio to be opened, and the model they must have."""


def _open_plainly(load_config: Path) -> FinishedRun | None:
    """A run of sv4d with its views and checkpoints beside its config.yml; None for any other."""
    config, folder = config_outline(load_config), load_config.absolute().parent
    model = _setting(config, "pipeline", "model")
    if config is None or model is None or PLAIN_METHODS.get(config.name) != _setting(model, "_target"):
        return None
    views, models = newest_views(folder), folder / "nerfstudio_models"
    if views is None or not checkpoint_steps(models):
        return None
    import torch

    from sv4d_ns.field.clip import clip_field
    from sv4d_ns.fitting.train_views import largest_silhouette
    from sv4d_ns.views.grid import ViewGrid

    step = checkpoint_steps(models)[-1]
    state = read_checkpoint(models / f"step-{step:09d}.ckpt")
    grid = ViewGrid.load(views)
    torch.set_flush_denormal(True)  # as in training
    field, occupancy = clip_field(grid.num_frames, largest_silhouette(grid), _setting(model, "encoding") or "numba")
    try:
        field.load_state_dict(_part(state["pipeline"], "_model.field."))
        occupancy.load_state_dict(_part(state["pipeline"], "_model.occupancy."))
    except (RuntimeError, AttributeError, TypeError):
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = config.settings["method_name"]
    return FinishedRun(
        field=field.to(device).eval(),
        occupancy=occupancy.to(device).eval(),
        views=grid,
        name=config.settings.get("experiment_name") or method,
        extras=provenance_extras(grid.provenance, method, step),
    )


def recorded_setting(folder: Path, *names: str) -> Any:
    """A setting by its path from the config.yml of a run's folder; None where it cannot be told."""
    return _setting(config_outline(folder / "config.yml"), *names)


def _setting(outline: Any, *names: str) -> Any:
    """A setting of a config's outline by its path; None where there is none."""
    for name in names:
        outline = outline.settings.get(name) if isinstance(outline, Outline) else None
    return outline


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _open_through_nerfstudio(load_config: Path) -> FinishedRun:
    check_config(load_config)
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
        occupancy=pipeline.model.occupancy,
        views=grid,
        name=config.experiment_name or config.method_name,
        extras=provenance_extras(grid.provenance, config.method_name, step),
    )


def config_sentence(load_config: Path) -> str | None:
    """What is wrong with a path that should be a run's config.yml; None if it is a file."""
    if load_config.is_file():
        return None
    if (load_config / "config.yml").is_file():
        return f"{load_config} is a folder: give --load-config its file, {load_config / 'config.yml'}."
    what = "is a folder without a config.yml" if load_config.is_dir() else "does not exist"
    return f"{load_config} {what}: give --load-config the config.yml in a run's folder."


def check_config_path(load_config: Path) -> None:
    """Raises `InputError` where there is no such file."""
    sentence = config_sentence(load_config)
    if sentence is not None:
        raise InputError(sentence)


def _checked(config: Any, load_config: Path) -> Any:
    """Refuse what cannot be exported before anything heavy is built."""
    target = config.pipeline.model._target
    if not any(base.__module__.partition(".")[0] == "sv4d_ns" for base in target.__mro__):
        raise InputError(
            f"{load_config} is a run of {config.method_name}, which has no deformable field to animate: "
            "this exports runs of sv4d; nerfstudio's own sub-commands export the others."
        )
    return config


def provenance_extras(provenance: dict[str, Any], method: str, step: int) -> dict[str, Any]:
    """Where an asset comes from and under which licences it was made, for `asset.extras` (JSON values)."""
    described = {
        "method": method,
        "step": step,
        "licences": licences(provenance.get("model")),
        "confidence": {"1": "seen by the input camera", "0.5": "by generated views only", "0": "by none"},
        "provenance": provenance,
    }
    return {"sv4d": described}


def licences(model: str | None) -> dict[str, str]:
    """The licence of everything that took part in making an asset.

    Args:
        model: the view grid's `provenance["model"]`; None where the views came from files.
    """
    found = {
        "input video": "its owner's rights remain",
        "4D optimisation and export": "sv4d_ns, Apache-2.0",
    }
    if model is None:
        return found | {"novel views": "given as files, their owner's rights remain"}
    if model.startswith("stabilityai/"):
        from sv4d_ns.diffusion.weights.hub import LICENCE, MODEL_URL

        return found | {"novel views": f"{model}, {LICENCE}, {MODEL_URL}"}
    if model.startswith("sv4d_ns"):
        return found | {"novel views": f"{model}, Apache-2.0"}
    return found | {"novel views": f"{model}, see its own licence"}
