"""Guidance, noise schedule, preconditioning, camera vectors and trajectories against recordings of the reference."""

import parity_folder as folder
import pytest
import torch

from sv4d_ns.diffusion.conditioning import GridCondition, camera_angles, camera_vectors, sinusoid
from sv4d_ns.diffusion.guidance import Guidance, GuidanceKind, guide
from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.unet import MultiViewVideoUNet

SAMPLING, GUIDERS = "sampling.safetensors", "guider_configs.json"
TRAJECTORIES = folder.with_unet([f"traj_{name}" for name in folder.names("traj_", ".safetensors")])


def recorded_condition(recorded: dict[str, torch.Tensor], sigma_dims: int) -> GridCondition:
    given = folder.part(recorded, "c")
    return GridCondition(given["crossattn"], given["concat"], given["vector"], given["cond_view"], sigma_dims)


def sampler(unet: MultiViewVideoUNet, vae: object = None) -> StableVideo4D2Pipeline:
    pipeline = StableVideo4D2Pipeline(vae, None, unet, released_scheduler())  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@folder.needs(SAMPLING, GUIDERS)
def test_guiders():
    recorded = folder.tensors(SAMPLING)
    configs = folder.read_json(GUIDERS)
    assert configs
    for name, config in configs.items():
        linear = config["target"].endswith("LinearPredictionGuider")
        kind = GuidanceKind.LINEAR if linear else GuidanceKind.SPATIOTEMPORAL
        params = config["params"]
        guidance = Guidance(kind, params["max_scale"], params.get("min_scale", 1.0))
        case = folder.part(recorded, f"guider/{name}")
        scales = guidance.scales(*case["scale"].shape)
        folder.assert_within(scales, case["scale"], 1e-6)
        folder.assert_within(guide(*case["in"].chunk(2), scales.flatten()), case["out"], 1e-5, 1e-5)


@folder.needs(SAMPLING)
def test_schedule():
    recorded = folder.tensors(SAMPLING)
    counts = [int(name.split("/")[1]) for name in recorded if name.startswith("sigmas/")]
    assert counts
    for count in counts:
        scheduler = released_scheduler()
        scheduler.set_timesteps(count)
        folder.assert_within(scheduler.sigmas, recorded[f"sigmas/{count}"], 0.0, 1e-5)
        folder.assert_within(scheduler.timesteps, recorded[f"c_noise/{count}"], 1e-5, 1e-5)


@folder.needs(SAMPLING)
def test_preconditioning():
    case = folder.part(folder.tensors(SAMPLING), "precond")
    for i, sigma in enumerate(case["sigma"]):
        scheduler = released_scheduler()
        scheduler.set_timesteps(2)
        # one step from this noise level to none gives the denoised image itself
        scheduler.sigmas = torch.tensor([sigma, 0.0])
        scheduler.timesteps = 0.25 * sigma.log()[None]
        scheduler.set_begin_index(0)
        timestep = scheduler.timesteps[0]
        x = case["x"][i][None]
        scaled = scheduler.scale_model_input(x, timestep)
        folder.assert_within(scaled, x * case["c_in"][i], 1e-6, 1e-5)
        folder.assert_within(timestep, case["c_noise"][i], 1e-6, 1e-5)
        network = torch.tanh(torch.einsum("oc,nchw->nohw", case["W"], scaled) + timestep)
        denoised = scheduler.step(network, timestep, x, return_dict=False)[0]
        folder.assert_within(denoised[0], case["denoised"][i], 1e-5, 1e-5)
        coefficients = case["c_out"][i] * network + case["c_skip"][i] * x
        folder.assert_within(denoised, coefficients, 1e-5, 1e-5)


@folder.needs("conditioning.safetensors")
def test_camera_vectors():
    recorded = folder.tensors("conditioning.safetensors")
    cases = [name.split("/")[0] for name in recorded if name.endswith("/vector_cond")]
    assert cases
    for name in cases:
        case = folder.part(recorded, name)
        dims = [case[f"{part}_emb"].shape[1] for part in ("sigma", "polar", "azimuth")]
        vectors = camera_vectors(case["polar_rad"], case["azimuth_rad"], 1e-5, dims)
        folder.assert_within(vectors, case["vector_cond"], 1e-6)
        condition = GridCondition(torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1), vectors, torch.ones(1, 1, 1, 1), dims[0])
        other = condition.unconditional()
        folder.assert_within(other.cameras, case["vector_uncond"], 1e-6)
        assert not other.embeddings.any() and not other.latents.any() and not other.references.any()


@folder.needs("conditioning.safetensors")
def test_sinusoids_of_several_values():
    recorded = folder.tensors("conditioning.safetensors")
    checked = 0
    for name, values in recorded.items():
        if name.endswith("/in"):
            for output in (key for key in recorded if key.startswith(f"{name.removesuffix('in')}out_")):
                dim = int(output.rpartition("_")[2])
                ours = sinusoid(values.flatten(), dim).view(len(values), -1)
                folder.assert_within(ours, recorded[output], 1e-6)
                checked += 1
    assert checked


@folder.needs("windows_and_cameras.json")
def test_camera_angles():
    recorded = folder.read_json("windows_and_cameras.json")
    azimuths = {"sv4d2": [60, 120, 180, 240], "sv4d2_8views": [30, 75, 120, 165, 210, 255, 300, 330]}
    for name, case in recorded["default_cameras"].items():
        polar, azimuth = camera_angles(azimuths[name], [0] * len(azimuths[name]))
        folder.assert_within(polar, torch.tensor(case["polar_rad"], dtype=torch.float64), 1e-9)
        folder.assert_within(azimuth, torch.tensor(case["azimuth_rad"], dtype=torch.float64), 1e-9)
    case = recorded["custom_cameras"]
    relative = [
        [value - values[0] for value in values[1:]] for values in (case["azimuths_deg"], case["elevations_deg"])
    ]
    polar, azimuth = camera_angles(*relative)
    folder.assert_within(polar, torch.tensor(case["polar_rad"], dtype=torch.float64), 1e-9)
    folder.assert_within(azimuth, torch.tensor(case["azimuth_rad"], dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    described, recorded = folder.read_json(f"{name}.json"), folder.tensors(f"{name}.safetensors")
    unet_json = folder.read_json(f"unet_{described['unet']}.json")
    frames, views, dims = unet_json["T"], unet_json["V"], list(unet_json["y_dims"].values())
    guidance = script_scales(described, frames, views)
    folder.assert_within(guidance, recorded["guidance_scale"], 1e-6)
    condition = recorded_condition(recorded, dims[0])
    vectors = camera_vectors(
        recorded["polar_rad"][0].double(), recorded["azimuth_rad"][0].double(), unet_json["sigma_cond_value"], dims
    )
    folder.assert_within(vectors.repeat(frames, 1), condition.cameras, 1e-6)
    for key, value in folder.part(recorded, "uc").items():
        ours = condition.unconditional()
        matching = {
            "crossattn": ours.embeddings, "concat": ours.latents, "vector": ours.cameras, "cond_view": ours.references
        }  # fmt: skip
        if key in matching:
            folder.assert_within(matching[key], value, 1e-6)

    pipeline = sampler(folder.load_unet(described["unet"]))
    steps: list[torch.Tensor] = []

    def keep(_, __, ___, tensors):
        steps.append(tensors["latents"])
        return tensors

    with torch.no_grad():
        pipeline.denoise(condition, recorded["noise"], guidance.flatten(), described["steps"], callback=keep)
    assert len(steps) == described["steps"]
    folder.assert_within(recorded["noise"] * pipeline.scheduler.init_noise_sigma, recorded["x_init"], 0.0, 1e-5)
    for i, latents in enumerate(steps):
        folder.assert_relative_to_peak(latents, recorded[f"x_after_step_{i}"], 1e-4)
    folder.assert_within(steps[-1], recorded[f"x_after_step_{len(steps) - 1}"], 3e-4)


def script_scales(described: dict, frames: int, views: int) -> torch.Tensor:
    return folder.script_guidance(described["guider_options"]).scales(frames, views)
