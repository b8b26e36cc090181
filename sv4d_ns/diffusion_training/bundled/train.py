"""Train the bundled model.

Everything random in a step depends on (seed, step, number of the sample) only, and the learning rate on the step only:
a run killed at any moment and started again makes the same losses as one that was never killed.
"""

import contextlib
import copy
import json
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset

from sv4d_ns.diffusion.bundled import load_bundled_pipeline
from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
from sv4d_ns.diffusion_training.bundled import objective
from sv4d_ns.diffusion_training.bundled.config import BundledTrainConfig, check
from sv4d_ns.diffusion_training.bundled.data import Batch, CreatureSource, Source, make_batch, mirrored
from sv4d_ns.diffusion_training.bundled.report import sample_sheet
from sv4d_ns.diffusion_training.checkpoint import TrainState, checkpoints, load_checkpoint, save_checkpoint, write_run
from sv4d_ns.diffusion_training.learning_rate import highest_sentence, learning_rate
from sv4d_ns.diffusion_training.told import step_sentence
from sv4d_ns.diffusion_training.train import MAX_SKIPPED, read_step, truncate_log
from sv4d_ns.metrics.lpips import BackboneMissing, vgg_distance
from sv4d_ns.utils.devices import choose_device
from sv4d_ns.utils.errors import InputError

CREATURES = "creatures"
ADAM_BETAS = (0.9, 0.99)
_NO_AUTOENCODER = SimpleNamespace(vae=None)
OF_SHAPE = 1
"""Last word of the seed of a batch's shape. Those of its samples end with their numbers, and numpy pads with zeros."""


def open_sources(config: BundledTrainConfig) -> tuple[list[Source], list[float]]:
    """What to draw samples from, and the probability of each.

    Raises:
        InputError: a folder holds no assets.
    """
    total = sum(share for _, share in config.data)
    sources: list[Source] = []
    for name, _ in config.data:
        if name == CREATURES:
            sources.append(CreatureSource())
        else:
            from sv4d_ns.diffusion_training.bundled.assets import AssetSource

            sources.append(AssetSource(Path(name), config.output_dir / "assets"))
    return sources, [share / total for _, share in config.data]


class StepDataset(Dataset[Batch]):
    """The batch of every `uses`th step and the ones after it; a process opens the sources when it makes its first one.

    Args:
        config: the run's settings.
        size: pixels per side.
    """

    def __init__(self, config: BundledTrainConfig, size: int):
        self.config, self.size = config, size

    @cached_property
    def _sources(self) -> tuple[list[Source], list[float]]:
        torch.set_num_threads(1)
        return open_sources(self.config)

    def __getitem__(self, number: int) -> Batch:
        seed = self.config.seed
        draw = float(np.random.default_rng([seed, number, 0, OF_SHAPE]).random())
        shape = self.config.shape(number * self.config.uses, draw)
        return make_batch(seed, number, shape, self.size, *self._sources)


def fresh_state(config: BundledTrainConfig) -> TrainState:
    """The start's network: an untrained one depends on the seed alone.

    Raises:
        InputError: the start has more blocks than are asked for.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.start == "bundled":
            shipped = load_bundled_pipeline().denoiser
            if config.depth < shipped.config.depth:
                raise InputError(
                    f"--depth is {config.depth}: the shipped network has {shipped.config.depth}; give that or more."
                )
            model = shipped.deepened(config.depth).train()
        else:
            model = VolumeDenoiser(depth=config.depth)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=ADAM_BETAS, weight_decay=config.weight_decay
    )
    return TrainState(model, EMAModel(parameters, decay=config.ema_decay, foreach=True), optimizer)  # type: ignore[arg-type]


def patch_loss(weight: float, device: torch.device) -> objective.PatchLoss | None:
    """How patches are compared; None where they are not.

    Raises:
        InputError: LPIPS is asked for and its network is not on this machine.
    """
    if weight == 0:
        return None
    try:
        return objective.PatchLoss(weight, vgg_distance(device))
    except BackboneMissing as missing:
        raise InputError(f"--perceptual {weight:g}: {missing}") from missing


class Trainer:
    """One run.

    Args:
        config: the run's settings.

    Raises:
        InputError: for unusable settings, data or checkpoint.
    """

    def __init__(self, config: BundledTrainConfig):
        check(config)
        self.config = config
        torch.set_num_threads(config.threads)
        self.device = torch.device(choose_device(config.device)[0])
        torch.backends.cudnn.benchmark = True  # batches come in two shapes
        open_sources(config)  # bad data is named before anything is written
        self.state = fresh_state(config)
        self.model: VolumeDenoiser = self.state.parts  # type: ignore[assignment]
        torch.nn.Module.to(self.model, self.device)
        self.state.average.to(self.device)
        found = checkpoints(config.output_dir)
        if found:
            load_checkpoint(found[-1], self.state, _NO_AUTOENCODER, config)  # type: ignore[arg-type]
        self.frustum = Frustum()
        self.patches = patch_loss(config.perceptual, self.device)
        self.skipped = 0

    def batches(self) -> Iterator[Batch]:
        """What each step from the present one on is given, made in processes of their own while earlier ones are used.

        They come in the order of their steps, however many processes make them.
        """
        uses, steps = self.config.uses, self.config.steps
        first = self.state.step // uses
        loader = DataLoader(
            StepDataset(self.config, self.model.config.image_size), batch_size=None,
            sampler=range(first, -(-steps // uses)), num_workers=self.config.workers, multiprocessing_context="spawn",
        )  # fmt: skip
        for number, made in enumerate(loader, first):
            batch = made.to(self.device)
            for step in range(max(number * uses, self.state.step), min((number + 1) * uses, steps)):
                yield mirrored(batch) if (step - number * uses) % 2 else batch

    def step(self, batch: Batch) -> dict[str, Any]:
        """One step; returns what is logged. A step whose loss or gradient is not finite leaves the weights unchanged.

        Raises:
            InputError: after too many such steps in a row.
        """
        state, config = self.state, self.config
        rate = learning_rate(config.learning_rate, state.step, config.steps, config.warmup_steps, config.decay_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        shape = tuple(batch.views.shape)
        draws = objective.draw(config.seed, state.step, shape, config.most_noise_share, self.device)
        use_bf16 = config.precision == "bf16"
        context = torch.autocast(self.device.type, torch.bfloat16) if use_bf16 else contextlib.nullcontext()
        with context:
            parts = objective.losses(self.model, batch, draws, self.frustum, self.patches)
        parts["loss"].backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        values, grad_norm, finite = read_step(parts, norm)
        if finite:
            state.optimizer.step()
            state.average.step(parameters)
        self.skipped = 0 if finite else self.skipped + 1
        state.step += 1
        if self.skipped > MAX_SKIPPED:
            raise InputError(
                f"The loss was not finite for {self.skipped} steps in a row (step {state.step}): go on from the last "
                "checkpoint with a lower --learning-rate (named in --changed) or --precision no."
            )
        frames = batch.frames.shape[1]
        return {
            "step": state.step, **values, "grad_norm": grad_norm, "lr": rate, "frames": frames, "skipped": not finite
        }  # fmt: skip

    def run(self) -> Path:
        """Train to the end, or for `minutes`; returns the folder of the exported model."""
        config, state = self.config, self.state
        count = sum(parameter.numel() for parameter in self.model.parameters())
        begin = f"Continuing {config.output_dir} at step {state.step}" if state.step else f"New run {config.output_dir}"
        print(f"{begin}: {config.steps} steps, {count:,} trained parameters on {self.device.type}.", flush=True)
        short = highest_sentence(config.learning_rate, config.steps, config.warmup_steps, config.decay_steps)
        if short is not None:
            print(short, flush=True)
        write_run(state, config)  # type: ignore[arg-type]
        log = config.output_dir / "losses.jsonl"
        truncate_log(log, state.step)
        began, first = time.monotonic(), state.step
        for batch in self.batches():
            entry = self.step(batch)
            entry["seconds"] = round(time.monotonic() - began, 2)
            out_of_time = config.minutes > 0 and entry["seconds"] > 60 * config.minutes
            last = state.step == config.steps or out_of_time
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            told = step_sentence(entry, config.steps, first)
            if told is not None:
                print(told, flush=True)
            if last or state.step % config.checkpoint_every == 0:
                save_checkpoint(state, _NO_AUTOENCODER, config)  # type: ignore[arg-type]
            if last or (config.sheet_every and state.step % config.sheet_every == 0):
                self.report()
            if last:
                break
        if first == config.steps:
            self.report()  # a finished run that was killed before its model was written
        print(f"Step {state.step} of {config.steps}: the model is in {config.output_dir / 'model'}.", flush=True)
        return config.output_dir / "model"

    def report(self) -> None:
        """Write the averaged network in half precision, and pictures of held-out creatures beside the truth."""
        parameters = list(self.model.parameters())
        self.state.average.store(parameters)
        self.state.average.copy_to(parameters)
        try:
            BundledVideoPipeline(copy.deepcopy(self.model).half()).save_pretrained(self.config.output_dir / "model")
            sample_sheet(self.model, self.config.output_dir / "sheets" / f"step_{self.state.step:07d}.png")
        finally:
            self.state.average.restore(parameters)
