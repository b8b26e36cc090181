"""Training data, the trainer's promises (deterministic, resumable, safe), and the model it exports."""

import dataclasses
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusion_fixture import tiny_pipeline
from safetensors.torch import load_file

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.small_components import PooledImageEncoder
from sv4d_ns.diffusion_training import loss as objective
from sv4d_ns.diffusion_training import train as trainer
from sv4d_ns.diffusion_training.checkpoint import checkpoints, trainable
from sv4d_ns.diffusion_training.config import TrainConfig, changes_since, check
from sv4d_ns.diffusion_training.data import BatchShape, draw_cameras, make_batch, to_model_images
from sv4d_ns.diffusion_training.evaluate import (
    EvaluateConfig,
    as_floats,
    evaluate,
    held_out_clip,
    mean_views,
    motion_error,
    score,
)
from sv4d_ns.diffusion_training.learning_rate import highest_sentence, learning_rate
from sv4d_ns.diffusion_training.model import ModelConfig, TrainedParts, bypassed, camera_vectors_of, fit_autoencoder
from sv4d_ns.diffusion_training.sharding import set_up
from sv4d_ns.diffusion_training.train import Trainer, prepare, train
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.training_data.dataset import disk_errors
from sv4d_ns.utils.errors import InputError

MICRO = ModelConfig(
    image_size=16, latent_channels=12, channels=(32, 32), head_dim=16, embedding_dim=8, camera_dims=(4, 8, 8)
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        output_dir=tmp_path / "run",
        seed=5,
        steps_3d=3,
        steps_4d=3,
        objects_3d=2,
        clips=((2, 2),),
        warmup_steps=2,
        decay_steps=2,
        threads=1,
        device="cpu",
        checkpoint_every=2,
        sheet_every=0,
        model=MICRO,
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_batch_depends_on_seed_and_step_alone():
    shape = BatchShape(objects=2, frames=3)
    first, again, other = (make_batch(1, step, shape, 16) for step in (4, 4, 5))
    assert first.inputs.shape == (2, 3, 16, 16, 4) and first.views.shape == (2, 3, 4, 16, 16, 4)
    for name in ("inputs", "views", "azimuths", "elevations"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.views, other.views)


def test_training_cameras_ascend_and_include_the_default_plan():
    rng = np.random.default_rng(0)
    rings = [draw_cameras(rng, 4) for _ in range(500)]
    azimuths = np.stack([ring[1] for ring in rings])
    assert (np.diff(azimuths, axis=1) > 0).all() and azimuths.min() >= 0 and azimuths.max() < 360
    elevations = np.array([ring[0] + ring[2] for ring in rings])
    assert np.abs(elevations).max() <= 50
    for call in (0, 1):
        wanted = np.array(ViewPlan.BUNDLED.azimuths_deg[call::2])
        assert np.abs(azimuths - wanted).max(axis=1).min() < 15


def test_pictures_become_rgb_on_white_and_alpha():
    pictures = np.array([[[[0, 128, 255, 0], [0, 128, 255, 255]]]], dtype=np.uint8)
    image = to_model_images(pictures)[0]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 1.0, 1.0, -1.0]))
    torch.testing.assert_close(image[:, 0, 1], torch.tensor([-1.0, 128 / 127.5 - 1, 1.0, 1.0]))


def test_the_autoencoder_is_near_lossless_and_gives_unit_variance():
    vae, quality = fit_autoencoder(ModelConfig(image_size=32), seed=3)
    batch = make_batch(3, 1, BatchShape(8, 1), 32)
    images = to_model_images(batch.inputs).flatten(0, 1)
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (8, 32, 8, 8)
    error = (vae.decode(latents).sample - images).square().mean()
    assert quality > 30 and 10 * torch.log10(4 / error) > 30, "also on pictures it was not fitted on"
    fitted = make_batch(3, 2**40, BatchShape(64, 1), 32)
    everything = np.concatenate([fitted.inputs[:, :, None], fitted.views], axis=2)
    z = vae.encode(to_model_images(everything).flatten(0, 2)).latent_dist.mode()
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.02)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-2


def test_the_image_encoder_takes_any_size():
    encoder = PooledImageEncoder(embedding_dim=8)
    for size in (16, 64):
        assert encoder(torch.zeros(3, 4, size, size)).image_embeds.shape == (3, 8)


def test_a_sample_is_the_same_whichever_process_makes_it():
    shape = BatchShape(objects=4, frames=2)
    whole = make_batch(3, 9, shape, 16)
    second = make_batch(3, 9, shape, 16, part=slice(2, 4))
    np.testing.assert_array_equal(second.views, whole.views[2:])
    np.testing.assert_array_equal(second.azimuths, whole.azimuths[2:])


def test_the_target_is_what_the_sampler_undoes(config):
    """One step of the pipeline's own scheduler from any sigma to 0, given the target, must return the clean latents."""
    _, pipeline = prepare(config)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1)
    sigma = scheduler.sigmas[0]
    x, noise = torch.randn(2, 5, 12, 4, 4)
    target = objective.v_target(x, noise, sigma)
    made = scheduler.step(target, scheduler.timesteps[0], x + sigma * noise).prev_sample
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)
    assert scheduler.timesteps[0].item() == pytest.approx(sigma.log().item() / 4, rel=1e-5), "the trainer's c_noise"
    noisy = (x + sigma * noise) / (sigma**2 + 1).sqrt()
    torch.testing.assert_close(objective.denoised(noisy, target, sigma), x, atol=1e-4, rtol=1e-4)


def test_training_and_sampling_tell_the_network_the_same(config):
    batch = make_batch(0, 0, BatchShape(1, 2), 16)
    _, pipeline = prepare(config)
    video = (to_model_images(batch.inputs[0]) + 1) / 2
    condition = pipeline.encode_condition(video, batch.azimuths[0].tolist(), batch.elevations[0].tolist())
    encoded = objective.encode(pipeline, batch, torch.device("cpu"))
    torch.testing.assert_close(condition.cameras[:4], encoded.cameras[0])
    torch.testing.assert_close(condition.cameras[:4], camera_vectors_of(batch, MICRO.camera_dims)[0])
    torch.testing.assert_close(
        condition.latents, encoded.condition[0].repeat_interleave(4, dim=0), atol=1e-5, rtol=1e-5
    )


SHAPE = (2, 4, 12, 4, 4)


def draws(config, step=0, numbers=range(64), objects=64):
    return objective.draw(config, step, SHAPE, numbers, objects, first_sigma=40.0)


def test_references_are_dropped_all_or_none_and_one_by_one(config):
    given = draws(dataclasses.replace(config, reference_drop=0.5)).references
    assert set(given.sum(dim=1).tolist()) == {0, 4} and 0.3 < given[:, 0].float().mean() < 0.7
    single = draws(dataclasses.replace(config, reference_drop=0.0, reference_view_drop=0.25)).references
    assert 0.65 < single.float().mean() < 0.85 and len(set(single.sum(dim=1).tolist())) > 2
    alone = objective.draw(config, 0, (1, *SHAPE[1:]), range(8), 8, 40.0)
    assert not alone.references.any(), "a single moment's references would be the answer"


def test_dropping_the_condition_drops_the_references_too(config):
    some = draws(dataclasses.replace(config, cfg_drop=0.4, reference_drop=0.0, self_conditioning=1.0))
    assert 0.4 < some.known.float().mean() < 0.8
    assert not some.references[~some.known].any() and some.references[some.known].all()
    assert torch.equal(some.own, some.known)


def test_a_samples_draws_depend_on_its_number_alone(config):
    whole, part = draws(config), draws(config, numbers=range(8, 16))
    for name in ("log_sigma", "noise", "references", "own_noise"):
        torch.testing.assert_close(getattr(whole, name)[8:16], getattr(part, name), rtol=0, atol=0)


def test_noise_levels_follow_the_stated_distribution(config):
    def levels(setting, step):
        return torch.cat([draws(setting, step + i, range(4), 4).log_sigma for i in range(0, 1200, 4)])

    still, moving = levels(dataclasses.replace(config, steps_3d=10**6), 0), levels(config, 10)
    assert still.mean().item() == pytest.approx(config.log_sigma_mean, abs=0.05)
    assert still.std().item() == pytest.approx(config.log_sigma_std, rel=0.05)
    assert moving.mean().item() == pytest.approx(config.log_sigma_mean_4d, abs=0.05)
    first = levels(dataclasses.replace(config, first_level_share=1.0), 0)
    assert first.mean().item() == pytest.approx(np.log(40.0), abs=0.03) and first.std().item() < 0.3


class Spy(torch.nn.Module):
    """Stands for the network and keeps what it was given."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, *arguments):
        self.seen = arguments
        return self.inner(*arguments)


def test_what_is_dropped_does_not_reach_the_network(config):
    state, pipeline = prepare(config)
    batch = make_batch(0, 0, BatchShape(2, 2), 16)
    encoded = objective.encode(pipeline, batch, torch.device("cpu"))
    shape = tuple(encoded.targets.shape[1:])
    drawn = objective.draw(dataclasses.replace(config, reference_drop=0.0), 0, shape, range(2), 2, 40.0)
    drawn = dataclasses.replace(drawn, known=torch.tensor([True, False]))
    drawn.references[1] = False
    spy = Spy(state.parts)
    objective.losses(spy, pipeline, encoded, drawn, config)
    _, _, known, sample, timestep, cameras, references = spy.seen
    condition = sample[:, 12:].unflatten(0, (2, 2, 4))
    assert known.tolist() == [True, False] and condition[0].any() and not condition[1].any()
    torch.testing.assert_close(references.unflatten(0, (2, 4))[0], encoded.views[0, 0])
    assert not references.unflatten(0, (2, 4))[1].any()
    cameras = cameras.unflatten(0, (2, 8))
    assert not cameras[1, :, :4].any() and cameras[0, :, :4].any() and cameras[1, :, 4:].any()
    levels = timestep.unflatten(0, (2, -1))
    assert (levels == levels[:, :1]).all() and levels[0, 0] != levels[1, 0], "one noise level a sample"


def test_self_conditioning_is_what_one_sampling_step_gives(config):
    _, pipeline = prepare(config)
    torch.nn.init.normal_(pipeline.unet.conv_out.weight, std=0.1)
    batch = make_batch(0, 0, BatchShape(1, 2), 16)
    encoded = objective.encode(pipeline, batch, torch.device("cpu"))
    drawn = draws(config, numbers=range(1), objects=1)
    parts = TrainedParts(pipeline.unet, pipeline.image_encoder)
    made = objective.self_conditioning(parts, pipeline, encoded, drawn, 40.0)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        (to_model_images(batch.inputs[0, :1]) + 1) / 2, batch.azimuths[0].tolist(), batch.elevations[0].tolist(),
        latents=drawn.own_noise, num_inference_steps=1,
    ).frames  # fmt: skip
    again = objective.encode_pictures(pipeline, frames[0] * 2 - 1)
    torch.testing.assert_close(made[0], again, atol=2e-2, rtol=2e-2)


def test_a_branch_can_be_blended_out(config):
    _, pipeline = prepare(config)
    for parameter in pipeline.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    arguments = (torch.randn(8, 24, 4, 4), torch.zeros(8), torch.randn(1, 2, 8), torch.randn(8, 20))

    def output(references):
        with torch.no_grad():
            return pipeline.unet(*arguments, references, return_dict=False)[0]

    first, second = torch.randn(2, 4, 12, 4, 4)
    assert not torch.equal(output(first), output(second))
    with bypassed(pipeline.unet, "frame"):
        torch.testing.assert_close(output(first), output(second), rtol=0, atol=0)
    assert not torch.equal(output(first), output(second))


def test_stages_and_learning_rate(config):
    long = dataclasses.replace(config, steps_3d=50, steps_4d=200, warmup_steps=10, decay_steps=100)
    frames = [trainer.batch_shape(long, step).frames for step in range(250)]
    assert set(frames[:50]) == {1} and set(frames[50:]) == {1, 2}
    assert np.mean(np.array(frames[50:]) == 1) == pytest.approx(long.still_share, abs=0.1)
    rates = [learning_rate(long.learning_rate, step, 250, 10, 100) for step in range(250)]
    assert max(rates) == rates[100] == long.learning_rate and rates[0] < rates[5] < rates[9]
    assert all(np.diff(rates[150:]) < 0) and rates[-1] < 0.03 * long.learning_rate


def test_a_killed_run_continues_exactly(config, monkeypatch):
    train(config)
    whole = losses(config.output_dir)
    assert len(whole) == 6 and len(set(whole)) == 6

    broken = dataclasses.replace(config, output_dir=config.output_dir.with_name("killed"))
    real = Trainer.step

    def dies_at_step_5(self, batch):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Trainer, "step", dies_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    with (broken.output_dir / "losses.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the kill came while writing
    assert checkpoints(broken.output_dir)[-1].name == "step_0000004"
    monkeypatch.setattr(Trainer, "step", real)
    train(broken)
    assert losses(broken.output_dir) == whole
    for name in ("weights", "average"):
        first, second = (
            (checkpoints(folder)[-1] / f"{name}.safetensors").read_bytes()
            for folder in (config.output_dir, broken.output_dir)
        )
        assert first == second


def test_settings_change_on_the_way_only_when_named(config):
    train(dataclasses.replace(config, steps_4d=0))
    longer = dataclasses.replace(config, learning_rate=1e-4)
    with pytest.raises(InputError, match=r"learning_rate 0.0007 -> 0.0001.*--changed steps_4d learning_rate"):
        prepare(longer)
    with pytest.raises(InputError, match="another --seed"):
        prepare(dataclasses.replace(config, seed=6, changed=("seed",)))
    train(dataclasses.replace(longer, changed=("steps_4d", "learning-rate")))
    assert len(losses(config.output_dir)) == 6
    changes = json.loads((config.output_dir / "run.json").read_text())["changes"]
    assert {(c["step"], c["name"], c["new"]) for c in changes} == {(3, "steps_4d", 3), (3, "learning_rate", 1e-4)}
    prepare(longer)  # the new values are the run's own now


def test_settings_are_known_by_the_names_of_older_runs(config):
    own = dataclasses.replace(config, self_conditioning=0.5)
    saved = own.deciding()
    saved["own_references"] = saved.pop("self_conditioning")
    assert changes_since(saved, own, Path("run")) == []
    with pytest.raises(InputError, match=r"self_conditioning 0.5 -> 0.0"):
        changes_since(saved, config, Path("run"))


def test_a_checkpoint_of_another_network_or_a_damaged_one_says_so(config):
    train(dataclasses.replace(config, steps_3d=1, steps_4d=0))
    folder = checkpoints(config.output_dir)[-1]
    state = json.loads((folder / "state.json").read_text())
    wider = dataclasses.replace(MICRO, embedding_dim=16)
    same = dataclasses.replace(config, steps_3d=1, steps_4d=0)
    state["settings"]["model"]["embedding_dim"] = 16
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="another architecture"):
        prepare(dataclasses.replace(same, model=wider))
    state["settings"]["model"]["embedding_dim"] = 8
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="damaged"):
        prepare(same)


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_at_last(config, monkeypatch):
    run = Trainer(config)
    before = {name: value.clone() for name, value in run.state.parts.state_dict().items()}
    real = objective.losses
    monkeypatch.setattr(objective, "losses", lambda *a: {k: v * float("nan") for k, v in real(*a).items()})
    batch = make_batch(0, 0, BatchShape(2, 1), 16)
    entry = run.step(batch)
    assert entry["skipped"] and run.state.step == 1
    for name, value in run.state.parts.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    run.skipped = trainer.MAX_SKIPPED
    with pytest.raises(InputError, match="not finite for 21 steps"):
        run.step(batch)


def test_the_loss_falls_on_one_batch(config):
    run = Trainer(dataclasses.replace(config, steps_3d=200, learning_rate=3e-3))
    batch = make_batch(0, 0, BatchShape(2, 1), 16)
    encoded = objective.encode(run.pipeline, batch, torch.device("cpu"))
    drawn = draws(config, numbers=range(2), objects=2)
    drawn = dataclasses.replace(drawn, noise=drawn.noise[:, :1], log_sigma=torch.ones(2))
    optimizer = torch.optim.Adam(run.state.parts.parameters(), lr=3e-3)
    values = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = objective.losses(run.state.parts, run.pipeline, encoded, drawn, config)["loss"]
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-10:]) < 0.35 * np.mean(values[:3])


def test_parts_of_a_batch_add_up_to_the_whole(config):
    rich = dataclasses.replace(
        config, steps_3d=1, steps_4d=2, self_conditioning=0.5, reference_drop=0.2, picture_loss=1.0
    )
    train(rich)
    parts = dataclasses.replace(
        rich, accumulation=2, gradient_checkpointing=True, output_dir=config.output_dir.with_name("parts")
    )
    train(parts)
    np.testing.assert_allclose(losses(parts.output_dir), losses(rich.output_dir), rtol=1e-5)


def _one_of_two(rank, port, config, more):
    """A process of two: what `accelerate launch` sets, then the same call."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", **more,
    )  # fmt: skip
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    train(config)


def run_two(config, **more):
    """Train in two processes with more in their environment; their exit codes."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # forked, because starting two more interpreters costs more than the training
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_one_of_two, args=(rank, port, config, more)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


def test_two_processes_make_the_losses_of_one(config):
    train(config)
    two = dataclasses.replace(config, output_dir=config.output_dir.with_name("two"))
    assert run_two(two) == [0, 0]
    np.testing.assert_allclose(losses(two.output_dir), losses(config.output_dir), rtol=2e-5)


def fsdp2():
    """What `accelerate launch --config_file recipes/fsdp2.yaml` puts into the environment of its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    recipe = Path(__file__).parents[1] / "recipes" / "fsdp2.yaml"
    words = ["--config_file", str(recipe), "--num_processes", "2", "-m", "sv4d_ns.diffusion_training.train"]
    asked, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert asked.use_fsdp
    names = ("ACCELERATE_USE_FSDP", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(asked).items() if name.startswith(names)}


def saved(config, name):
    return load_file(checkpoints(config.output_dir)[-1] / f"{name}.safetensors")


def test_a_sharded_run_makes_the_losses_of_one_process_and_goes_on_exactly(config, monkeypatch):
    """FSDP2: weights, average and moments sharded, stopped and continued, then continued by one process."""
    rich = dataclasses.replace(
        config, steps_3d=1, steps_4d=3, self_conditioning=0.5, reference_drop=0.2, picture_loss=1.0, objects_3d=4,
        clips=((4, 2),), accumulation=2, gradient_checkpointing=True, still_share=0.0,
    )  # fmt: skip
    train(rich)
    shards, stopped = (dataclasses.replace(rich, output_dir=config.output_dir.with_name(n)) for n in ("shards", "stop"))
    seen = config.output_dir.with_name("seen")
    seen.mkdir()
    real = Trainer.step

    def notes_what_it_holds(self, batch):
        entry = real(self, batch)
        held = sum(value.to_local().numel() for value in trainable(self.state.parts).values())
        held_average = sum(value.to_local().numel() for value in self.state.average.shadow_params)
        moments = [value["exp_avg"].to_local().numel() for value in self.state.optimizer.state.values()]
        whole = sum(value.numel() for value in self.state.parts.parameters())
        (seen / str(self.process)).write_text(json.dumps([held, held_average, sum(moments), whole]))
        return entry

    monkeypatch.setattr(Trainer, "step", notes_what_it_holds)
    assert run_two(shards, **fsdp2()) == [0, 0]
    held = np.array([json.loads((seen / rank).read_text()) for rank in "01"])
    whole = held[0, 3]
    assert (held[:, :2].sum(0) == whole).all(), "each number is held by one process"
    assert (held[:, :3] < 0.7 * whole).all()
    np.testing.assert_allclose(losses(shards.output_dir), losses(rich.output_dir), rtol=2e-5)
    for name in ("weights", "average"):
        for ours, theirs in zip(saved(shards, name).items(), saved(rich, name).items(), strict=True):
            assert ours[0] == theirs[0]
            torch.testing.assert_close(ours[1], theirs[1], atol=2e-5, rtol=1e-4)
    pipeline = StableVideo4D2Pipeline.from_pretrained(shards.output_dir / "model")
    average = saved(shards, "average")["unet.conv_in.weight"]
    torch.testing.assert_close(pipeline.unet.conv_in.weight.float(), average, atol=1e-3, rtol=1e-3)

    def dies_at_step_4(self, batch):
        if self.state.step == 3:
            os._exit(9)
        return real(self, batch)

    monkeypatch.setattr(Trainer, "step", dies_at_step_4)
    assert run_two(stopped, **fsdp2()) == [9, 9]
    monkeypatch.setattr(Trainer, "step", real)
    one = dataclasses.replace(stopped, output_dir=config.output_dir.with_name("one"))
    shutil.copytree(stopped.output_dir, one.output_dir)
    assert run_two(stopped, **fsdp2()) == [0, 0]
    assert losses(stopped.output_dir) == losses(shards.output_dir)
    for name in ("weights", "average"):
        first, second = (
            (checkpoints(run.output_dir)[-1] / f"{name}.safetensors").read_bytes() for run in (shards, stopped)
        )
        assert first == second
    train(one)  # a checkpoint does not say how many processes made it
    np.testing.assert_allclose(losses(one.output_dir), losses(rich.output_dir), rtol=2e-5)


@pytest.mark.parametrize(
    ("more", "precision", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, "no", "version 1 of FSDP: set fsdp_version to 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "no", "give --gradient-checkpointing"),
        ({}, "fp16", "--precision fp16 is not for FSDP: give bf16 or no"),
    ],
)
def test_what_does_not_go_together_with_fsdp_says_so(monkeypatch, more, precision, sentence):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        set_up(SimpleNamespace(num_processes=2), precision)
    assert not set_up(SimpleNamespace(num_processes=1), precision), "one process has everything"


def test_training_writes_a_model_that_loads_samples_and_goes_on(config):
    folder = train(dataclasses.replace(config, steps_3d=1, steps_4d=1, trackers=("tensorboard",)))
    run = folder.parent
    assert (run / "loss_curve.png").is_file() and len(list((run / "sheets").glob("*.png"))) == 1
    assert list((run / "sv4d").glob("events.*"))
    pipeline = StableVideo4D2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(torch.rand(2, 4, 16, 16), [60.0, 150.0, 300.0], [0.0, 10.0, 0.0], num_inference_steps=2).frames
    assert frames.shape == (2, 3, 4, 16, 16) and frames.min() >= 0 and frames.max() <= 1
    average = load_file(checkpoints(run)[-1] / "average.safetensors")["unet.conv_in.weight"]
    torch.testing.assert_close(pipeline.unet.conv_in.weight.float(), average, atol=1e-3, rtol=1e-3)

    adapted = dataclasses.replace(
        config, start=str(folder), lora_rank=2, steps_3d=1, steps_4d=1, output_dir=run.with_name("lora"),
        still_blend="image_only",
    )  # fmt: skip
    adapters = train(adapted)
    pipeline.unet.load_lora_adapter(str(adapters), prefix=None, weight_name=trainer.LORA_FILE, use_safetensors=True)
    with torch.no_grad():
        changed = [name for name, value in pipeline.unet.named_parameters() if "lora_B" in name and value.any()]
    assert changed, "the adapters have learned something, and load into the model they were made for"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps_3d": 0, "steps_4d": 0}, "at least one step"),
        ({"reference_drop": 1.5}, "--reference-drop is 1.5"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0: give a value above 0"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0: give a value from 0 to below 1"),
        ({"accumulation": 3}, "2 objects .1 frames. cannot be split evenly over 1 processes x 3 parts"),
        ({"clips": ()}, "--clips is empty"),
        ({"changed": ("learning-rte",)}, "--changed learning_rte names no setting"),
        ({"objects_3d": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_used_say_so(config, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        check(dataclasses.replace(config, **changes), 1)


def test_a_run_too_short_for_its_learning_rate_says_so():
    assert highest_sentence(1e-3, 3000, 100, 1000) is None
    assert "reaches 1.6e-05 of 1.0e-03 only: 16 steps are few" in highest_sentence(1e-3, 16, 1000, 1)


def test_a_full_disk_is_one_sentence_also_where_torch_tells_of_it(tmp_path):
    with pytest.raises(InputError, match="The disk is full while writing"), disk_errors(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9620672 vs 9620564")
    with pytest.raises(RuntimeError, match="other"), disk_errors(tmp_path):
        raise RuntimeError("other")


def test_a_batch_must_divide_over_the_processes(config):
    check(config, 2)
    with pytest.raises(InputError, match=r"2 objects \(1 frames\) cannot be split evenly over 3 processes"):
        check(config, 3)


def test_a_network_that_cannot_be_built_says_so(config):
    with pytest.raises(InputError, match=r"--model describes no network.*multiples of 32"):
        prepare(
            dataclasses.replace(
                config, model=dataclasses.replace(MICRO, channels=(48, 32), attention_levels=(True, True))
            )
        )


@pytest.mark.parametrize("start", ["nothing-here", "official:missing.safetensors", "svd:{empty}"])
def test_starts_that_cannot_be_used_say_so(config, start, tmp_path):
    start = start.format(empty=tmp_path)
    with pytest.raises(InputError) as caught:
        prepare(dataclasses.replace(config, start=start))
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_used_says_so(config, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no rendered data"):
        Trainer(dataclasses.replace(config, data=(str(tmp_path),)))
    with pytest.raises(InputError, match="names nothing"):
        Trainer(dataclasses.replace(config, data=()))
    with pytest.raises(InputError, match="--clips asks for 22"):
        Trainer(dataclasses.replace(config, clips=((2, 22),)))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="--trackers wandb needs the wandb package"):
            Trainer(dataclasses.replace(config, trackers=("wandb",)))
    with pytest.raises(InputError, match="--cache-latents needs rendered data"):
        Trainer(dataclasses.replace(config, cache_latents=True))


def test_a_model_of_the_released_kind_trains(config, tmp_path, monkeypatch):
    """RGB pictures, a KL autoencoder, a frozen CLIP tower, clips: the official start, at a tiny size."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    small = dataclasses.replace(config, start=str(tmp_path / "tiny"), steps_3d=0, steps_4d=2, still_share=0.0)
    run = Trainer(small)
    frozen = {name: value.clone() for name, value in run.pipeline.image_encoder.state_dict().items()}
    before = run.state.parts.unet.conv_in.weight.clone()
    batch = make_batch(0, 0, BatchShape(2, 2), run.pipeline.config.image_size)
    assert np.isfinite(run.step(batch)["loss"])
    assert not torch.equal(run.state.parts.unet.conv_in.weight, before)
    for name, value in run.pipeline.image_encoder.state_dict().items():
        assert torch.equal(value, frozen[name])
    with pytest.raises(InputError, match="--picture-loss"):
        Trainer(dataclasses.replace(small, picture_loss=1.0))


def test_scores_of_known_pictures():
    clip = held_out_clip(0, 2, 32)
    truth = as_floats(clip.views)
    right = score("right", [truth], [truth], [clip.plan])
    assert right.psnr > 90 and right.ssim > 0.999 and right.iou == 1 and right.motion == 0 and right.hull > 0.99
    assert right.sharpness == pytest.approx(1.0)
    darker = np.concatenate([truth[..., :3] - 0.1, truth[..., 3:]], axis=-1)
    assert score("darker", [darker], [truth], [clip.plan]).psnr == pytest.approx(20.0, abs=0.01)
    assert motion_error(np.broadcast_to(truth[:1], truth.shape), truth) == pytest.approx(1.0)
    other = score("turned", [truth[:, ::-1]], [truth], [clip.plan])
    assert other.iou < 0.9 and other.ssim < right.ssim


def test_evaluation_clips_are_held_out_and_the_mean_view_is_a_picture():
    clip, again = held_out_clip(3, 2, 16), held_out_clip(3, 2, 16)
    assert clip.inputs.shape == (2, 16, 16, 4) and clip.views.shape == (2, 8, 16, 16, 4)
    np.testing.assert_array_equal(clip.views, again.views)
    mean = mean_views(16, objects=6)
    assert mean.shape == (8, 16, 16, 4) and mean.min() >= 0 and mean.max() <= 1 and mean[..., 3].max() > 0.3


@pytest.mark.parametrize("views", [3, 16])
def test_a_model_whose_calls_do_not_make_the_scored_views_is_refused(tmp_path, views):
    tiny_pipeline(num_views=views).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"makes {views} views at once.*1, 2, 4 or 8"):
        evaluate(EvaluateConfig(model=tmp_path, objects=1, frames=1, mean_image_objects=1))


def test_evaluating_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no model"):
        evaluate(EvaluateConfig(model=tmp_path))
