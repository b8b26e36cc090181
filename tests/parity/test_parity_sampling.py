"""Guidance, noise schedule, preconditioning, camera vectors and trajectories against recordings of the reference."""

import parity_folder as folder
import pytest
import torch

from sv4d_ns.diffusion.sv4d.conditioning import GridCondition, camera_vectors, sinusoid
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind, guide
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.official import RELEASES

SAMPLING, GUIDERS, CONDITIONING = "sampling.safetensors", "guider_configs.json", "conditioning.safetensors"
TRAJECTORIES = [f"traj_{name}" for name in folder.names("traj_")]


def recorded_condition(recorded: dict[str, torch.Tensor], sigma_dims: int) -> GridCondition:
    given = folder.part(recorded, "c")
    return GridCondition(given["crossattn"], given["concat"], given["vector"], given["cond_view"], sigma_dims)


def sampler(unet: MultiViewVideoUNet, vae: object = None) -> StableVideo4D2Pipeline:
    pipeline = StableVideo4D2Pipeline(vae, None, unet, released_scheduler())  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def recorded_guidance(name: str) -> Guidance:
    """The guider of `guider_configs.json`, or the released model's of that name where the folder has no such file."""
    if not folder.has(GUIDERS):
        return RELEASES[f"{name}.safetensors"].guidance
    config = folder.read_json(GUIDERS)[name]
    kinds = {
        "LinearPredictionGuider": GuidanceKind.LINEAR,
        "SpatiotemporalPredictionGuider": GuidanceKind.SPATIOTEMPORAL,
    }
    params = config["params"]
    kind = kinds[config["target"].rpartition(".")[2]]
    return Guidance(kind, params["max_scale"], params.get("min_scale", 1.0))


def test_guiders():
    folder.need(SAMPLING)
    recorded = folder.tensors(SAMPLING)
    for name in folder.cases(folder.part(recorded, "guider"), "scale"):
        case = folder.part(recorded, f"guider/{name}")
        scales = recorded_guidance(name).scales(*case["scale"].shape)
        folder.assert_within(scales, case["scale"], 1e-6)
        folder.assert_within(guide(*case["in"].chunk(2), scales.flatten()), case["out"], 1e-5, 1e-5)


def test_schedule():
    folder.need(SAMPLING)
    recorded = folder.tensors(SAMPLING)
    for count in map(int, folder.part(recorded, "sigmas")):
        scheduler = released_scheduler()
        scheduler.set_timesteps(count)
        folder.assert_within(scheduler.sigmas, recorded[f"sigmas/{count}"], 0.0, 1e-5)
        folder.assert_within(scheduler.timesteps, recorded[f"c_noise/{count}"], 1e-5, 1e-5)


def test_preconditioning():
    folder.need(SAMPLING)
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


def test_camera_vectors():
    folder.need(CONDITIONING)
    recorded = folder.tensors(CONDITIONING)
    for name in folder.cases(recorded, "vector_cond"):
        case = folder.part(recorded, name)
        dims = [case[f"{part}_emb"].shape[1] for part in ("sigma", "polar", "azimuth")]
        vectors = camera_vectors(case["polar_rad"], case["azimuth_rad"], 1e-5, dims)
        folder.assert_within(vectors, case["vector_cond"], 1e-6)
        parts = torch.cat([case[f"{part}_emb"] for part in ("sigma", "polar", "azimuth")], dim=1)
        folder.assert_within(vectors, parts, 1e-6)
        condition = GridCondition(torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1), vectors, torch.ones(1, 1, 1, 1), dims[0])
        other = condition.unconditional()
        folder.assert_within(other.cameras, case["vector_uncond"], 1e-6)
        assert not other.embeddings.any() and not other.latents.any() and not other.references.any()


def test_sinusoids_of_several_values():
    folder.need(CONDITIONING)
    recorded = folder.tensors(CONDITIONING)
    for name, values in recorded.items():
        if name.endswith("/in"):
            for output in (key for key in recorded if key.startswith(f"{name.removesuffix('in')}out_")):
                dim = int(output.rpartition("_")[2])
                ours = sinusoid(values.flatten(), dim).view(len(values), -1)
                folder.assert_within(ours, recorded[output], 1e-6)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    folder.need(f"{name}.safetensors")
    described, recorded = folder.read_json(f"{name}.json"), folder.tensors(f"{name}.safetensors")
    pipeline = sampler(folder.load_unet(described["unet"]))
    unet_json = folder.read_json(f"unet_{described['unet']}.json")
    frames, views, dims = unet_json["T"], unet_json["V"], list(unet_json["y_dims"].values())
    guidance = folder.script_guidance(described["guider_options"]).scales(frames, views)
    folder.assert_within(guidance, recorded["guidance_scale"], 1e-6)
    condition = recorded_condition(recorded, dims[0])
    vectors = camera_vectors(
        recorded["polar_rad"][0].double(), recorded["azimuth_rad"][0].double(), unet_json["sigma_cond_value"], dims
    )
    folder.assert_within(vectors.repeat(frames, 1), condition.cameras, 1e-6)
    assert_unconditional(condition, recorded)

    denoised = record_denoised(pipeline)
    steps: list[torch.Tensor] = []

    def keep(_, __, ___, tensors):
        steps.append(tensors["latents"])
        return tensors

    with torch.no_grad():
        pipeline.denoise(condition, recorded["noise"], guidance.flatten(), described["steps"], callback=keep)
    folder.assert_within(pipeline.scheduler.sigmas, recorded["sigmas"], 0.0, 1e-5)
    assert len(steps) == len(denoised) == described["steps"]
    folder.assert_within(recorded["noise"] * pipeline.scheduler.init_noise_sigma, recorded["x_init"], 0.0, 1e-5)
    for i, (latents, clean) in enumerate(zip(steps, denoised, strict=True)):
        folder.assert_relative_to_peak(clean, recorded[f"denoised_{i}"], 1e-4)
        folder.assert_relative_to_peak(latents, recorded[f"x_after_step_{i}"], 1e-4)
    folder.assert_within(steps[-1], recorded[f"x_after_step_{len(steps) - 1}"], 3e-4)


def record_denoised(pipeline: StableVideo4D2Pipeline) -> list[torch.Tensor]:
    """Filled, while the pipeline runs, with the guided denoised images D of every step."""
    found: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def recording(*args, return_dict=True):
        output = step(*args, return_dict=True)
        found.append(output.pred_original_sample)
        return output if return_dict else (output.prev_sample,)

    pipeline.scheduler.step = recording
    return found


def assert_unconditional(condition: GridCondition, recorded: dict[str, torch.Tensor]) -> None:
    """What the reference's second conditioner pass gives."""
    other = condition.unconditional()
    ours = {
        "crossattn": other.embeddings, "concat": other.latents, "vector": other.cameras, "cond_view": other.references
    }  # fmt: skip
    reference = folder.part(recorded, "uc")
    for key, value in ours.items():
        folder.assert_within(value, reference[key], 1e-6)
    assert not reference["cond_motion"].any()  # it has no place here: the network ignores it
