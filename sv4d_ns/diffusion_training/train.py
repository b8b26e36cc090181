"""`sv4d train`: train a multi-view video model, first on still moments (3D), then on clips (4D).

Everything random in a step depends on (seed, step, number of the sample) only, and the learning rate on the step only:
a run killed at any moment and started again makes the same losses as one that was never killed, and several processes
make those of one.
"""

import contextlib
import copy
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.small_components import PatchAutoencoder
from sv4d_ns.diffusion_training import loss as objective
from sv4d_ns.diffusion_training.checkpoint import (
    TrainState,
    averaged,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    trainable,
    write_run,
)
from sv4d_ns.diffusion_training.config import TrainConfig, check, shapes
from sv4d_ns.diffusion_training.data import Batch, BatchShape, RenderedSource, Source, make_batch, open_sources
from sv4d_ns.diffusion_training.latent_cache import LatentCache
from sv4d_ns.diffusion_training.learning_rate import highest_sentence, learning_rate
from sv4d_ns.diffusion_training.model import TrainedParts, bypassed, export, with_components
from sv4d_ns.diffusion_training.recipe import read_recipe, with_settings
from sv4d_ns.diffusion_training.report import loss_curve, sample_sheet
from sv4d_ns.diffusion_training.sharding import set_up, whole, without_weights
from sv4d_ns.diffusion_training.starts import open_start
from sv4d_ns.diffusion_training.told import step_sentence
from sv4d_ns.training_data.dataset import disk_errors
from sv4d_ns.utils.devices import choose_device
from sv4d_ns.utils.errors import InputError, install_extra, one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.progress import bar

ADAM_BETAS = (0.9, 0.99)
MAX_SKIPPED = 20
"""So many steps in a row without a finite loss end the run."""
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_WEIGHTS, LORA_FILE = "lora", "pytorch_lora_weights.safetensors"
"""Folder and file of exported adapters; `unet.load_lora_adapter` reads them with `prefix=None`."""


def batch_shape(config: TrainConfig, step: int) -> BatchShape:
    """What the batch of a step holds: single moments first, later mostly clips."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    draw, which = torch.rand(2, generator=generator).tolist()
    if step < config.steps_3d or draw < config.still_share:
        return BatchShape(config.objects_3d, 1, config.views_3d)
    objects, frames = config.clips[int(which * len(config.clips))]
    return BatchShape(objects, frames, config.views)


def fresh_state(config: TrainConfig, pipeline: StableVideo4D2Pipeline) -> TrainState:
    """The start's networks, ready to train; new adapters depend on the seed alone."""
    pipeline.vae.requires_grad_(False).eval()
    parts = TrainedParts(pipeline.unet, pipeline.image_encoder)
    parts.unet.train().requires_grad_(True)
    parts.image_encoder.requires_grad_(not parts.encoder_is_frozen)
    if parts.encoder_is_frozen:
        parts.image_encoder.eval()
    if config.lora_rank:
        _add_adapters(parts, config)
    if config.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
    parameters = list(trainable(parts).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=ADAM_BETAS, weight_decay=config.weight_decay
    )
    return TrainState(parts, EMAModel(parameters, decay=config.ema_decay), optimizer)


def _add_adapters(parts: TrainedParts, config: TrainConfig) -> None:
    """Freeze everything and put low-rank adapters beside the attention layers."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"--lora-rank needs the peft package: {install_extra('lora')}.") from error
    parts.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        parts.unet.add_adapter(
            LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=list(LORA_TARGETS))
        )


def prepare(config: TrainConfig) -> tuple[TrainState, StableVideo4D2Pipeline]:
    """State and pipeline to go on with: from the newest checkpoint of the run, or from its start.

    Raises:
        InputError: when the checkpoint or the start cannot be used.
    """
    pipeline = open_start(config.start, config.model, config.sampling, config.seed)
    state = fresh_state(config, pipeline)
    _resume(state, pipeline, config)
    return state, pipeline


def _resume(state: TrainState, pipeline: StableVideo4D2Pipeline, config: TrainConfig) -> None:
    """Go on with the newest checkpoint of the run, if it has one."""
    found = checkpoints(config.output_dir)
    if found:
        load_checkpoint(found[-1], state, pipeline, config)


def batches(
    config: TrainConfig, sources: Sequence[Source], size: int, first: int, process: int, processes: int
) -> Iterator[Batch]:
    """This process's part of the batches from step `first` on, each made while the one before is used."""

    def make(step: int) -> Batch:
        shape = batch_shape(config, step)
        share = shape.objects // processes
        part = slice(process * share, (process + 1) * share)
        dynamic = config.dynamic_share if step >= config.steps_3d else 0.0
        return make_batch(config.seed, step, shape, size, sources, dynamic, part)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, first)
        for step in range(first, config.total_steps):
            ready = coming.result()
            if step + 1 < config.total_steps:
                coming = pool.submit(make, step + 1)
            yield ready


class Trainer:
    """One run in one process (of perhaps several).

    Args:
        config: the run's settings.

    Raises:
        InputError: for unusable settings, data, start or checkpoint.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        on_cpu = choose_device(config.device)[0] == "cpu"
        # the network's unused layers (norms and queries of one-token attention) never have a gradient
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            mixed_precision=config.precision, cpu=on_cpu, log_with=list(config.trackers) or None,
            project_dir=str(config.output_dir), kwargs_handlers=[unused],
        )  # fmt: skip
        self.processes, self.process = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        self.sharded = set_up(self.accelerator, config.precision)
        check(config, self.processes)
        _check_trackers(config)
        torch.set_num_threads(config.threads)
        self.sources = open_sources(config.data, read_pictures=not config.cache_latents)
        _check_data(config, self.sources)
        self.cache: LatentCache | None = None
        self.skipped = 0
        if self.sharded:
            self._begin_sharded()
        else:
            self._begin_whole()

    def _begin_whole(self) -> None:
        """Every process has the whole network, its average and its optimiser."""
        self.state, self.pipeline = prepare(self.config)
        _check_pictures(self.config, self.pipeline, self.state.parts)
        self.pipeline.to(self.device)
        self.state.average.to(self.device)
        self.model, self.state.optimizer = self.accelerator.prepare(self.state.parts, self.state.optimizer)
        if self.config.cache_latents:
            self.cache = self._filled_cache()

    def _begin_sharded(self) -> None:
        """Every process has its shard of them; the whole network never lies on its device."""
        config = self.config
        self.pipeline = open_start(config.start, config.model, config.sampling, config.seed)
        self.state = state = fresh_state(config, self.pipeline)
        _check_pictures(config, self.pipeline, state.parts)
        self.pipeline.vae.to(self.device)
        if config.cache_latents:
            self.pipeline.image_encoder.to(self.device)
            self.cache = self._filled_cache()
        self.skeleton = without_weights(state.parts)
        """What averaged weights are put into for reports."""
        if config.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
            state.parts.forward = autocast(state.parts.forward)  # type: ignore[method-assign]
        self.model, state.optimizer = self.accelerator.prepare(state.parts, state.optimizer)
        state.scaler = self.accelerator.scaler
        state.average = EMAModel(trainable(state.parts).values(), decay=config.ema_decay)
        _resume(state, self.pipeline, config)

    def _filled_cache(self) -> LatentCache:
        cache = LatentCache(self.config.output_dir / "latents", self.pipeline, self.sources)
        with bar("Encoding") as show:
            cache.fill(self.process, self.processes, show)
        self.accelerator.wait_for_everyone()
        return cache

    def losses_of(self, batch: Batch, step: int, part: int = 0) -> dict[str, Float[Tensor, ""]]:
        """Losses of a part of this process's batch, with gradients."""
        config = self.config
        if self.cache is not None:
            encoded = self.cache.encoded(batch, self.device)
        else:
            encoded = objective.encode(self.pipeline, batch, self.device)
        objects = len(batch.inputs)
        first = (self.process * config.accumulation + part) * objects
        draws = objective.draw(
            config, step, tuple(encoded.targets.shape[1:]), range(first, first + objects),
            objects * self.processes * config.accumulation, objective.first_level(self.pipeline),
        )  # fmt: skip
        return objective.losses(self.model, self.pipeline, encoded, draws, config)

    def _blend(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """How a batch passes the frame attention; to be held until its gradients are there, because gradient
        checkpointing computes the network again for them."""
        still = batch.inputs.shape[1] == 1
        if still and self.config.still_blend == "image_only":
            return bypassed(self.state.parts.unet, "frame")
        return contextlib.nullcontext()

    def step(self, batch: Batch) -> dict[str, Any]:
        """One step; returns what is logged.

        A step whose loss or gradient is not finite leaves the weights unchanged.

        Raises:
            InputError: after too many such steps in a row.
        """
        state, config = self.state, self.config
        rate = learning_rate(
            config.learning_rate, state.step, config.total_steps, config.warmup_steps, config.decay_steps
        )
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        pieces = _split(batch, config.accumulation)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model), self._blend(piece):
                parts = self.losses_of(piece, state.step, index)
                self.accelerator.backward(parts["loss"] / len(pieces))
            for name, value in parts.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value.detach() / len(pieces)
        totals = {name: self.accelerator.reduce(value, "mean") for name, value in totals.items()}
        norm = self.accelerator.clip_grad_norm_(list(trainable(state.parts).values()), config.max_grad_norm)
        values, grad_norm, finite = read_step(totals, norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if finite or self.accelerator.scaler is not None:
            state.optimizer.step()  # with fp16, a step that overflows is left out, and the scale lowered, in there
        if finite:
            state.average.step(list(trainable(state.parts).values()))
        self.skipped = 0 if finite else self.skipped + 1
        state.step += 1
        if self.skipped > MAX_SKIPPED:
            raise InputError(
                f"The loss was not finite for {self.skipped} steps in a row (step {state.step}): go on from the last "
                "checkpoint with a lower --learning-rate (named in --changed) or --precision no."
            )
        frames = batch.inputs.shape[1]
        return {
            "step": state.step, **values, "grad_norm": grad_norm, "lr": rate, "frames": frames, "skipped": not finite
        }  # fmt: skip

    def run(self) -> Path:
        """Train to the end; returns the folder of the exported model."""
        config, state = self.config, self.state
        self._begin()
        began, first = time.monotonic(), state.step
        log = config.output_dir / "losses.jsonl"
        size = self.pipeline.config.image_size
        for batch in batches(config, self.sources, size, first, self.process, self.processes):
            entry = self.step(batch)
            entry["seconds"] = round(time.monotonic() - began, 2)
            last, main = state.step == config.total_steps, self.accelerator.is_main_process
            if main:
                self._log(entry, log, first)
            if (main or self.sharded) and (last or state.step % config.checkpoint_every == 0):
                save_checkpoint(state, self.pipeline, config, writes=main)
            if last or (config.sheet_every and state.step % config.sheet_every == 0):
                self.report()
            self.accelerator.log({name: entry[name] for name in ("loss", "grad_norm", "lr")}, step=state.step)
        if first == config.total_steps:
            self.report()  # a finished run: write its model again, perhaps with other sampling settings
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        made = config.output_dir / (LORA_WEIGHTS if config.lora_rank else "model")
        if self.accelerator.is_main_process:
            print(f"Step {state.step} of {config.total_steps}: the weights are in {made}.", flush=True)
        return made

    def _begin(self) -> None:
        """Say what happens, and set the folder right."""
        config, state = self.config, self.state
        if config.trackers:
            flat = {name: value for name, value in config.deciding().items() if isinstance(value, (int, float, str))}
            offline = {"wandb": {"dir": str(config.output_dir)}} if "wandb" in config.trackers else {}
            config.output_dir.mkdir(parents=True, exist_ok=True)
            self.accelerator.init_trackers("sv4d", config=flat, init_kwargs=offline)
        if not self.accelerator.is_main_process:
            return
        count = sum(parameter.numel() for parameter in trainable(state.parts).values())
        where = f"{self.processes} process{'es' if self.processes > 1 else ''} on {self.device.type}"
        where += ", sharded (FSDP2)" if self.sharded else ""
        begin = f"Continuing {config.output_dir} at step {state.step}" if state.step else f"New run {config.output_dir}"
        print(f"{begin}: {config.total_steps} steps, {count:,} trained parameters, {where}.", flush=True)
        short = highest_sentence(config.learning_rate, config.total_steps, config.warmup_steps, config.decay_steps)
        if short is not None:
            print(short, flush=True)
        write_run(state, config)
        truncate_log(config.output_dir / "losses.jsonl", state.step)

    def _log(self, entry: dict[str, Any], log: Path, first: int) -> None:
        with disk_errors(log), log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if entry["skipped"]:
            print(f"Step {entry['step']}: the loss or its gradient is not finite; the step was skipped.")
        told = step_sentence(entry, self.config.total_steps, first)
        if told is not None:
            print(told, flush=True)

    def report(self) -> None:
        """Loss curve, pictures of held-out creatures, and the model so far, from the averaged weights: by the main
        process, to which the others hand their shards."""
        config, state, main = self.config, self.state, self.accelerator.is_main_process
        if not (main or self.sharded):
            return
        with self._averaged() as pipeline:
            if not main:
                return
            loss_curve(config.output_dir / "losses.jsonl", config.output_dir / "loss_curve.png", config.steps_3d)
            if config.lora_rank:
                pipeline.unet.save_lora_adapter(str(config.output_dir / LORA_WEIGHTS), weight_name=LORA_FILE)
            else:
                export(pipeline, config.output_dir / "model")
            sheet = config.output_dir / "sheets" / f"step_{state.step:07d}.png"
            sample_sheet(pipeline, sheet)
        picture = np.asarray(Image.open(sheet))[None]
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": picture}, step=state.step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": list(picture)}, step=state.step)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[StableVideo4D2Pipeline]:
        """The pipeline with averaged weights while the block lasts; of shards, only the main process makes it."""
        state, parameters = self.state, list(trainable(self.state.parts).values())
        if not self.sharded:
            state.average.store(parameters)
            state.average.copy_to(parameters)
            try:
                yield self.pipeline
            finally:
                state.average.restore(parameters)
                state.parts.unet.train()
            return
        values = {**state.parts.state_dict(), **averaged(state)}
        if not self.accelerator.is_main_process:
            for value in values.values():
                whole(value)
            yield self.pipeline
            return
        parts: Any = copy.deepcopy(self.skeleton)
        parts.load_state_dict({name: whole(value) for name, value in values.items()}, assign=True)
        yield with_components(self.pipeline, unet=parts.unet, image_encoder=parts.image_encoder).to(self.device)


def _split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts."""
    if parts == 1:
        return [batch]
    share = len(batch.inputs) // parts
    ranges = [slice(index * share, (index + 1) * share) for index in range(parts)]
    return [
        Batch(batch.inputs[part], batch.views[part], batch.azimuths[part], batch.elevations[part],
              batch.backgrounds[part], batch.places[part])
        for part in ranges
    ]  # fmt: skip


def _check_trackers(config: TrainConfig) -> None:
    """accelerate leaves out trackers that are not installed without a word."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--trackers {name} needs the {name} package: pip install {name}, or leave it out.")


def _check_data(config: TrainConfig, sources: Sequence[Source]) -> None:
    """Every source can give every shape; rendered data where latents are to be cached."""
    longest = min(source.longest for source in sources)
    for shape in shapes(config):
        if shape.frames > longest:
            name = next(name for name, source in zip(config.data, sources, strict=True) if source.longest == longest)
            raise InputError(
                f"--data {name} has clips of {longest} frames at most, but --clips asks for {shape.frames}: render "
                "animated assets with more --frames, give smaller --clips, or train the 3D stage alone (--steps-4d 0)."
            )
    if config.cache_latents and not all(isinstance(source, RenderedSource) for source in sources):
        raise InputError("--cache-latents needs rendered data: creatures made on the fly are never seen twice.")


def _check_pictures(config: TrainConfig, pipeline: StableVideo4D2Pipeline, parts: TrainedParts) -> None:
    """Caching needs a frozen image encoder, the picture loss an autoencoder that decodes at no cost."""
    if config.cache_latents and not parts.encoder_is_frozen:
        raise InputError("--cache-latents needs a frozen image encoder (official or SVD start): this start trains its.")
    if config.picture_loss > 0 and not isinstance(pipeline.vae, PatchAutoencoder):
        raise InputError("--picture-loss needs this package's linear autoencoder: leave it at 0 for this start.")


def read_step(parts: dict[str, Tensor], norm: Tensor) -> tuple[dict[str, float], float, bool]:
    """A step's losses and the norm of its gradient as numbers, and whether loss and norm are finite.

    All is read in one go: a GPU is waited for at each reading.
    """
    *values, grad_norm = torch.stack([*(value.detach() for value in parts.values()), norm]).tolist()
    read = dict(zip(parts, values, strict=True))
    return read, grad_norm, math.isfinite(read["loss"]) and math.isfinite(grad_norm)


def truncate_log(path: Path, step: int) -> None:
    """Drop entries past the checkpoint from which a run goes on."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a log line; a line that a kill left unfinished counts as later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


def train(config: TrainConfig) -> Path:
    """Train to the end, continuing a run that was interrupted; returns the folder of the exported model.

    Raises:
        InputError: for unusable settings, data, start or checkpoint.
    """
    return Trainer(config).run()


def command(arguments: Sequence[str]) -> None:
    """`sv4d train`: parse the flags, on top of a recipe where `--config FILE` names one, and train."""
    recipe, rest = _split_recipe(list(arguments))
    kind, values = ("sv4d", {}) if recipe is None else read_recipe(recipe)
    if kind == "bundled":
        from sv4d_ns.diffusion_training.bundled.config import BundledTrainConfig
        from sv4d_ns.diffusion_training.bundled.train import Trainer as BundledTrainer

        default = with_settings(BundledTrainConfig(), values, str(recipe))
        BundledTrainer(tyro.cli(BundledTrainConfig, prog="sv4d train", default=default, args=rest)).run()
    else:
        default = with_settings(TrainConfig(), values, str(recipe))
        train(tyro.cli(TrainConfig, prog="sv4d train", default=default, args=rest))


def _split_recipe(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file after `--config`, and the other arguments."""
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        if not equals and index + 1 == len(arguments):
            raise InputError("--config needs a recipe file, for example recipes/bundled.yaml.")
        following = index + 1 if equals else index + 2
        return Path(value if equals else arguments[index + 1]), arguments[:index] + arguments[following:]
    return None, arguments


if __name__ == "__main__":
    with one_sentence_errors():
        command(sys.argv[1:])
