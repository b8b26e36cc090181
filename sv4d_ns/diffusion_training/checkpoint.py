"""Checkpoints of a run: folders that are whole or absent, with everything needed to go on exactly."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.small_components import PatchAutoencoder
from sv4d_ns.diffusion_training.config import TrainConfig, changes_since
from sv4d_ns.diffusion_training.model import TrainedParts
from sv4d_ns.diffusion_training.sharding import is_sharded, shard_of, whole
from sv4d_ns.training_data.dataset import disk_errors
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_folder, atomic_path

KEPT_CHECKPOINTS = 2
RUN_FILE = "run.json"


@dataclass
class TrainState:
    """Everything that changes while training.

    Attributes:
        parts: the trained modules.
        average: moving average of the trainable parameters, in their order.
        optimizer: AdamW.
        scaler: of the gradients with fp16, else None.
        step: steps made.
        changes: settings changed on the way, with the step from which on they hold.
    """

    parts: TrainedParts
    average: EMAModel
    optimizer: Any
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)


def trainable(parts: nn.Module) -> dict[str, nn.Parameter]:
    """Names and parameters that are trained."""
    return {name: parameter for name, parameter in parts.named_parameters() if parameter.requires_grad}


def averaged(state: TrainState) -> dict[str, Tensor]:
    """The averaged parameters by name."""
    return dict(zip(trainable(state.parts), state.average.shadow_params, strict=True))


def save_checkpoint(
    state: TrainState, pipeline: StableVideo4D2Pipeline, config: TrainConfig, writes: bool = True
) -> Path:
    """Write the whole state as one folder that is either complete or absent; old ones are removed.

    Args:
        state: of the run.
        pipeline: of the same parts.
        config: the run's settings.
        writes: False in the processes that only hand over their shards (see `sharding`).

    Raises:
        InputError: when the disk is full; earlier checkpoints stay.
    """
    folder = config.output_dir / "checkpoints" / f"step_{state.step:07d}"
    if not writes:
        for tensors in (trainable(state.parts), averaged(state)):
            for tensor in tensors.values():
                whole(tensor)
        _whole_optimizer(state.optimizer)
        return folder
    with disk_errors(folder), atomic_folder(folder, "state.json", "a checkpoint") as temporary:
        save_file(_plain(trainable(state.parts)), temporary / "weights.safetensors")
        save_file(_plain(averaged(state)), temporary / "average.safetensors")
        if isinstance(pipeline.vae, PatchAutoencoder):  # fitted by this run, and tiny
            save_file(_plain(pipeline.vae.state_dict()), temporary / "autoencoder.safetensors")
        torch.save(_whole_optimizer(state.optimizer), temporary / "optimizer.pt")
        saved = {
            "step": state.step,
            "average_steps": state.average.optimization_step,
            "settings": config.deciding(),
            "changes": state.changes,
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
        }
        (temporary / "state.json").write_text(json.dumps(saved, indent=1))
    for old in checkpoints(config.output_dir)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return folder


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: whole(tensor).contiguous() for name, tensor in tensors.items()}


def _whole_optimizer(optimizer: Any) -> dict[str, Any]:
    """An optimiser's state dict; sharded moments become whole ones on the CPU."""
    given = optimizer.state_dict()
    moments = {
        index: {name: whole(value) if isinstance(value, DTensor) else value for name, value in values.items()}
        for index, values in given["state"].items()
    }
    return {**given, "state": moments}


def _sharded_optimizer(saved: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The reverse of `_whole_optimizer`, for an optimiser whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: shard_of(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    return {**saved, "state": moments}


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step_*"))


def load_checkpoint(folder: Path, state: TrainState, pipeline: StableVideo4D2Pipeline, config: TrainConfig) -> None:
    """Continue from a checkpoint.

    Raises:
        InputError: when it belongs to other settings (see `changes_since`), another architecture, or is damaged.
    """
    try:
        saved = json.loads((folder / "state.json").read_text())
        changes = changes_since(saved["settings"], config, folder)
        state.changes = [*saved["changes"], *({"step": saved["step"], **change} for change in changes)]
        _fill(trainable(state.parts), load_file(folder / "weights.safetensors"), folder)
        _fill(averaged(state), load_file(folder / "average.safetensors"), folder)
        if isinstance(pipeline.vae, PatchAutoencoder):
            pipeline.vae.load_state_dict(load_file(folder / "autoencoder.safetensors"))
        # for shards, only what this process holds is read
        moments = torch.load(
            folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=is_sharded(state.parts)
        )
        state.optimizer.load_state_dict(_sharded_optimizer(moments, state.optimizer))
        state.average.optimization_step = saved["average_steps"]
        if state.scaler is not None and saved.get("scaler"):  # without one, where the run began on a processor
            state.scaler.load_state_dict(saved["scaler"])
        state.step = saved["step"]
    except InputError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, EOFError) as error:
        raise InputError(
            f"The checkpoint {folder} is damaged ({' '.join(str(error).split())}): delete it to continue from the one "
            "before, or from the start."
        ) from error


def _fill(target: dict[str, Any], saved: dict[str, Tensor], folder: Path) -> None:
    """Copy saved tensors into parameters of the same names and shapes."""
    wrong = sorted(set(target) ^ set(saved)) or [name for name in target if target[name].shape != saved[name].shape]
    if wrong:
        raise InputError(
            f"The checkpoint {folder} belongs to a network of another architecture ({wrong[0]} does not fit): use "
            "another --output-dir."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(shard_of(saved[name], tensor))


def write_run(state: TrainState, config: TrainConfig) -> None:
    """Say in run.json with which settings the run goes on, and which were others before."""
    with disk_errors(config.output_dir), atomic_path(config.output_dir / RUN_FILE) as temporary:
        temporary.write_text(json.dumps({"settings": config.deciding(), "changes": state.changes}, indent=1))
