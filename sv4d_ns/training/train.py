"""`sv4d train`: train the embedded model on procedural creatures, first still (3D), then moving (4D).

The loss is the plain mean squared error of the v-prediction, which is the reference's VWeighting. Not published, and
our own choices: the noise level distribution, the learning rate, all step counts, the mixture of stages.

Everything random in a step depends on (seed, step) only, and the learning rate on the step only, so that a run killed
at any moment and started again makes the same losses as one that was never killed.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sv4d_ns.diffusion.embedded.modules import PatchAutoencoder
from sv4d_ns.errors import InputError
from sv4d_ns.files import atomic_path, content_hash
from sv4d_ns.training.data import Batch, BatchShape, make_batch, to_model_images
from sv4d_ns.training.model import (
    ModelConfig,
    SamplingConfig,
    TrainedParts,
    camera_vectors_of,
    export,
    fit_autoencoder,
)
from sv4d_ns.training.report import loss_curve, sample_sheet

KEPT_CHECKPOINTS = 2
PLAN = ("steps_3d", "steps_4d", "decay_steps", "clips", "still_share", "log_sigma_mean_4d")
"""Settings that may change while a run is under way, as long as the steps already made stay the same."""
ADAM_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. A run is continued by the same command with the same settings."""

    output_dir: Path = Path("runs/embedded")
    """Checkpoints, losses, sample sheets and the exported model go here."""
    seed: int = 2026
    """Of weights, data and noise."""
    steps_3d: int = 3000
    """Steps on single moments (T = 1)."""
    steps_4d: int = 1800
    """Steps on clips, mixed with single moments, after the first stage."""
    objects_3d: int = 4
    """Objects in a batch of single moments."""
    clips: tuple[tuple[int, int], ...] = ((4, 2), (2, 4), (1, 8))
    """(objects, frames) of the clip batches, drawn with equal probability."""
    still_share: float = 0.5
    """Probability of a batch of single moments in the second stage."""
    reference_drop: float = 0.5
    """Probability that a clip sample is given no reference views (all or none)."""
    log_sigma_mean: float = 1.0
    """Mean of ln(sigma) in the first stage."""
    log_sigma_mean_4d: float = 2.0
    """Mean of ln(sigma) in the second stage: clips hide less under the same noise, and with few sampling steps the
    prediction from much noise decides."""
    log_sigma_std: float = 1.4
    """Standard deviation of ln(sigma)."""
    learning_rate: float = 7e-4
    """Reached by a linear warm-up, then constant, at the end a half cosine down to 2 percent."""
    warmup_steps: int = 150
    """Steps of the warm-up."""
    decay_steps: int = 1200
    """Steps of the decay at the end."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.998
    """Of the averaged weights, which are the ones exported; smaller in the first steps."""
    threads: int = 2
    """CPU threads of the network; data is made on one more."""
    bfloat16: bool = True
    """Run the network's matrix products in bfloat16 (weights and optimiser stay float32)."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    sheet_every: int = 500
    """Steps between sample sheets, loss curves and exports."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.steps_3d + self.steps_4d

    def fingerprint(self) -> str:
        """Hash of what decides the losses, apart from the `PLAN` (see `same_history`)."""
        free = ("output_dir", "threads", "checkpoint_every", "sheet_every", "sampling", *PLAN)
        return content_hash({name: value for name, value in asdict(self).items() if name not in free})


@dataclass
class TrainState:
    """Everything that changes while training."""

    parts: TrainedParts
    average: TrainedParts
    optimizer: torch.optim.Optimizer
    step: int = 0


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, then half a cosine to 2 percent of the peak over the last steps."""
    rate = config.learning_rate * min((step + 1) / config.warmup_steps, 1.0)
    progress = (step - config.total_steps + config.decay_steps) / config.decay_steps
    return rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))))


def same_history(first: TrainConfig, second: TrainConfig, steps: int) -> bool:
    """Whether two settings that differ in their `PLAN` only make the same first `steps` steps."""

    def settings_of(config: TrainConfig, step: int) -> tuple[float, BatchShape, float]:
        return learning_rate(config, step), batch_shape(config, step), mean_log_sigma(config, step)

    return all(settings_of(first, step) == settings_of(second, step) for step in range(steps))


def mean_log_sigma(config: TrainConfig, step: int) -> float:
    """Centre of the noise levels of a step."""
    return config.log_sigma_mean if step < config.steps_3d else config.log_sigma_mean_4d


def batch_shape(config: TrainConfig, step: int) -> BatchShape:
    """What the batch of a step holds: single moments first, later mostly clips."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    draw, which = torch.rand(2, generator=generator).tolist()
    if step < config.steps_3d or draw < config.still_share:
        return BatchShape(config.objects_3d, 1)
    objects, frames = config.clips[int(which * len(config.clips))]
    return BatchShape(objects, frames)


def v_target(x: Float[Tensor, "..."], noise: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What the network should predict: (noise - sigma x) / sqrt(sigma^2 + 1)."""
    return (noise - sigma * x) / (sigma.square() + 1).sqrt()


def draw_log_sigma(samples: int, mean: float, std: float, generator: torch.Generator) -> Float[Tensor, " b"]:
    """Normally distributed ln(sigma), one from each of `samples` equally probable slices.

    The slices make a small batch see small and large noise every time, which steadies the gradient.
    """
    quantile = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
    return mean + std * torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4))


def batch_loss(
    parts: TrainedParts, vae: PatchAutoencoder, batch: Batch, config: TrainConfig, step: int
) -> Float[Tensor, ""]:
    """Mean squared error of the v-prediction on a batch; noise and masking depend on (seed, step)."""
    generator = torch.Generator().manual_seed(config.seed * 2_000_003 + step)
    inputs, views = to_model_images(batch.inputs), to_model_images(batch.views)
    b, t, v = views.shape[:3]
    x = vae.encode(views.flatten(0, 2)).latent_dist.mode()
    condition = vae.encode(inputs.flatten(0, 1)).latent_dist.mode().repeat_interleave(v, dim=0)
    cameras = camera_vectors_of(batch, config.model.camera_dims)[:, None].expand(b, t, v, -1).flatten(0, 2)

    # a single moment's references would be the very pictures to predict
    keep = (torch.rand(b, generator=generator) >= config.reference_drop) & torch.tensor(t > 1)
    references = x.unflatten(0, (b, t, v))[:, 0] * keep[:, None, None, None, None]
    mean = mean_log_sigma(config, step)
    log_sigma = draw_log_sigma(b, mean, config.log_sigma_std, generator).repeat_interleave(t * v)
    sigma = log_sigma.exp()[:, None, None, None]
    noise = torch.randn(x.shape, generator=generator)
    noisy = (x + sigma * noise) / (sigma.square() + 1).sqrt()

    with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
        embeddings = parts.image_encoder(inputs.flatten(0, 1)).image_embeds.unflatten(0, (b, t))
        predicted = parts.unet(
            torch.cat([noisy, condition], dim=1), log_sigma / 4, embeddings, cameras, references.flatten(0, 1)
        ).sample
    return (predicted.float() - v_target(x, noise, sigma)).square().mean()


@torch.no_grad()
def update_average(average: torch.nn.Module, parts: torch.nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights; the decay grows to its final value over the first steps."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(parts.parameters()), rate)


def fresh_state(config: TrainConfig) -> TrainState:
    """Untrained networks; depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        parts = TrainedParts(config.model)
    optimizer = torch.optim.AdamW(
        parts.parameters(), lr=config.learning_rate, betas=ADAM_BETAS, weight_decay=config.weight_decay
    )
    return TrainState(parts, copy.deepcopy(parts).requires_grad_(False), optimizer)


def train_step(state: TrainState, vae: PatchAutoencoder, batch: Batch, config: TrainConfig) -> dict[str, Any]:
    """One step; returns what is logged. A step whose loss or gradient is not finite leaves the weights unchanged."""
    rate = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    loss = batch_loss(state.parts, vae, batch, config, state.step)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.parts.parameters(), config.max_grad_norm)
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    if finite:
        state.optimizer.step()
        update_average(state.average, state.parts, state.step, config.ema_decay)
    state.step += 1
    frames = batch.inputs.shape[1]
    return {
        "step": state.step, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate, "frames": frames,
        "skipped": not finite,
    }  # fmt: skip


def batches(config: TrainConfig, first: int) -> Iterator[Batch]:
    """Batches of the steps from `first` on, each made while the one before is used."""

    def make(step: int) -> Batch:
        return make_batch(config.seed, step, batch_shape(config, step), config.model.image_size)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, first)
        for step in range(first, config.total_steps):
            ready = coming.result()
            coming = pool.submit(make, step + 1)
            yield ready


def save_checkpoint(state: TrainState, vae: PatchAutoencoder, config: TrainConfig) -> Path:
    """Write the whole state as one folder that is either complete or absent; old ones are removed."""
    folder = config.output_dir / "checkpoints" / f"step_{state.step:07d}"
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(state.parts.state_dict(), temporary / "weights.safetensors")
    save_file(state.average.state_dict(), temporary / "average.safetensors")
    save_file(vae.state_dict(), temporary / "autoencoder.safetensors")
    torch.save(state.optimizer.state_dict(), temporary / "optimizer.pt")
    plan = {name: getattr(config, name) for name in PLAN}
    saved = {"step": state.step, "fingerprint": config.fingerprint(), "plan": plan}
    (temporary / "state.json").write_text(json.dumps(saved))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in checkpoints(config.output_dir)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((output_dir / "checkpoints").glob("step_*"))


def load_checkpoint(folder: Path, state: TrainState, vae: PatchAutoencoder, config: TrainConfig) -> None:
    """Continue from a checkpoint of the same settings.

    Raises:
        InputError: when it belongs to other settings.
    """
    saved = json.loads((folder / "state.json").read_text())
    earlier = replace(config, **{**saved["plan"], "clips": tuple(map(tuple, saved["plan"]["clips"]))})
    if saved["fingerprint"] != config.fingerprint() or not same_history(earlier, config, saved["step"]):
        raise InputError(
            f"The checkpoint {folder} was made with other training settings: "
            "use the same ones, or another --output-dir."
        )
    state.parts.load_state_dict(load_file(folder / "weights.safetensors"))
    state.average.load_state_dict(load_file(folder / "average.safetensors"))
    vae.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    state.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    state.step = saved["step"]


def prepare(config: TrainConfig) -> tuple[TrainState, PatchAutoencoder]:
    """State and autoencoder to go on with: from the newest checkpoint of the run, or fresh."""
    state = fresh_state(config)
    found = checkpoints(config.output_dir)
    if found:
        vae = PatchAutoencoder(latent_channels=config.model.latent_channels)
        load_checkpoint(found[-1], state, vae, config)
        print(f"Continuing {config.output_dir} at step {state.step}.")
        return state, vae
    vae, psnr = fit_autoencoder(config.model, config.seed)
    count = sum(parameter.numel() for parameter in state.parts.parameters())
    print(f"New run in {config.output_dir}: {count:,} parameters; the autoencoder reaches {psnr:.1f} dB.")
    return state, vae


def truncate_log(path: Path, step: int) -> None:
    """Drop entries past the checkpoint from which a run goes on."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def train(config: TrainConfig) -> Path:
    """Train to the end, continuing a run that was interrupted; returns the folder of the exported model.

    Raises:
        InputError: for unusable settings, or a checkpoint of other ones.
    """
    if config.total_steps < 1 or config.objects_3d < 1 or not config.clips:
        raise InputError("The training settings hold nothing to do: give positive steps, objects and clips.")
    torch.set_num_threads(config.threads)
    state, vae = prepare(config)
    log = config.output_dir / "losses.jsonl"
    config.output_dir.mkdir(parents=True, exist_ok=True)
    truncate_log(log, state.step)
    began, first = time.monotonic(), state.step
    for batch in batches(config, state.step):
        entry = train_step(state, vae, batch, config)
        entry["seconds"] = round(time.monotonic() - began, 2)
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if entry["skipped"]:
            print(f"Step {state.step}: the loss or its gradient is not finite; the step was skipped.")
        if state.step % 50 == 0:
            pace = (state.step - first) / entry["seconds"]
            left = f"{pace:.2f} steps/s, {(config.total_steps - state.step) / pace / 60:.0f} min left"
            print(f"step {state.step}/{config.total_steps}  loss {entry['loss']:.4f}  {left}", flush=True)
        last = state.step == config.total_steps
        if last or state.step % config.checkpoint_every == 0:
            save_checkpoint(state, vae, config)
        if last or state.step % config.sheet_every == 0:
            report(state, vae, config)
    if first == config.total_steps:  # a finished run: write its model again, perhaps with other sampling settings
        report(state, vae, config)
    return config.output_dir / "model"


def report(state: TrainState, vae: PatchAutoencoder, config: TrainConfig) -> None:
    """Loss curve, pictures of held-out creatures, and the model so far, from the averaged weights."""
    loss_curve(config.output_dir / "losses.jsonl", config.output_dir / "loss_curve.png", config.steps_3d)
    sheet = config.output_dir / "sheets" / f"step_{state.step:07d}.png"
    sample_sheet(state.average, vae, config.model, config.sampling, sheet)
    export(state.average, vae, config.model, config.sampling, config.output_dir / "model")


def command(arguments: Sequence[str]) -> None:
    """`sv4d train`: parse the flags and train."""
    train(tyro.cli(TrainConfig, prog="sv4d train", args=list(arguments)))
