"""Score distillation, cameras, schedules and losses against recordings of 4Diffusion's reference."""

import folder_4dm as folder
import numpy as np
import pytest
import torch

from sv4d_ns.diffusion.fourdm import guidance
from sv4d_ns.diffusion.fourdm.conditioning import FourDMCondition, composite, flat_cameras, network_rows
from sv4d_ns.diffusion.fourdm.frame import DISTANCE, FIELD_OF_VIEW
from sv4d_ns.diffusion.fourdm.pipeline import spread_frames, view_cameras
from sv4d_ns.distillation.anchor import anchor_target
from sv4d_ns.distillation.cameras import FRAMES, HIGHEST_ELEVATION_DEG
from sv4d_ns.distillation.schedules import REFERENCE_NOISE, LossRamps, render_size
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.geometry.rays import pixel_rays, project
from sv4d_ns.metrics.images import gaussian_window, padded_ssim

LOSS_RTOL, GRADIENT_ATOL, CAMERA_ATOL = 1e-5, 1e-6, 1e-6
SCALING_FACTOR = 0.18215
SETTINGS = {"default": 0.2, "rescale0.5": 0.5, "rescale0": 0.0, "sds": None}


def recording(name: str) -> dict[str, torch.Tensor]:
    return folder.tensors(f"sds_{name}.safetensors")


@pytest.mark.parametrize("name", folder.names("sds_"))
@pytest.mark.parametrize("setting", SETTINGS)
def test_distillation_from_the_recorded_noise(name, setting):
    recorded, scale = recording(name), float(folder.metadata(f"sds_{name}.safetensors")["guidance_scale"])
    alpha = guidance.alphas_cumprod()[int(recorded["t"])].item()
    folder.assert_within(torch.tensor(alpha), recorded["alphas_cumprod_t"], 1e-7)
    noisy = guidance.add_noise(recorded["latents"], recorded["noise"], alpha)
    eps = (recorded["eps_uncond"], recorded["eps_text"])
    share = SETTINGS[setting]
    if share is None:
        # DreamFusion's form, weighted by 1 - alpha_bar: its `sds_loss` has the gradient of plain SDS
        target = recorded["latents"] - (1 - alpha) * (guidance.guided(*eps, scale) - recorded["noise"])
    else:
        target = guidance.reconstruction_target(noisy, *eps, alpha, scale, share)
    if setting == "default":
        folder.assert_within(target, recorded["x0_target"], 1e-5 * recorded["x0_target"].abs().max().item())
    latents = recorded["latents"].clone().requires_grad_()
    loss = guidance.sds_loss(latents, target)
    loss.backward()
    folder.assert_within(loss.detach(), recorded[f"{setting}.loss"], 0.0, LOSS_RTOL)
    folder.assert_within(latents.grad, recorded[f"{setting}.grad"], GRADIENT_ATOL)
    # the plain form's recorded norm is of the gradient before its division by the number of images
    norm = latents.grad.norm() * (len(latents) if share is None else 1)
    folder.assert_within(norm, recorded[f"{setting}.grad_norm"], 0.0, LOSS_RTOL)


@pytest.mark.parametrize("name", folder.names("sds_"))
def test_arguments_of_the_network(name):
    """The 80 rows of one call; the reference puts the conditional half first, this package last."""
    recorded = recording(name)
    frames = folder.FRAMES
    # tokens that say which frame they are of
    marks = torch.arange(1.0, frames + 1)[:, None, None]
    condition = FourDMCondition(
        recorded["text_embedding"][0],
        recorded["negative_embedding"][0],
        marks,
        torch.zeros(1, 1),
        recorded["vae_latent_of_images"] * SCALING_FACTOR,
    )
    rows = network_rows(condition, flat_cameras(recorded["c2w"]))

    def conditional_first(values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values.chunk(2)[::-1])

    folder.assert_within(rows.cameras, recorded["unet.camera"], CAMERA_ATOL)
    folder.assert_within(conditional_first(rows.image_latents), recorded["unet.ip_img"], 1e-6)
    frame = conditional_first(rows.image_tokens)[:, 0, 0].long() - 1
    assert torch.equal(frame, recorded["unet.ip_frame_index"])
    is_text = (conditional_first(rows.text) == condition.text).all(-1).all(-1)
    assert torch.equal(is_text, recorded["unet.context_row_is_text"])
    alpha = guidance.alphas_cumprod()[int(recorded["t"])].item()
    noisy = guidance.add_noise(recorded["latents"], recorded["noise"], alpha)
    sample = folder.real_views(recorded["unet.x_before_ip_img"]).chunk(2)
    folder.assert_within(noisy, sample[0], 1e-6)
    assert torch.equal(sample[0], sample[1])
    assert bool((recorded["unet.t"] == recorded["t"]).all())


@pytest.mark.parametrize("name", folder.names("sds_"))
def test_cameras_of_a_distillation_step(name):
    recorded = recording(name)
    made = look_at_cameras(recorded["azimuth"].double().numpy(), recorded["elevation"].double().numpy(), DISTANCE)
    folder.assert_within(torch.from_numpy(made).float(), recorded["c2w"], 2e-6)


@pytest.mark.parametrize("name", folder.names("sds_"))
def test_conditioning_images(name):
    recorded = recording(name)
    pictures = composite(recorded["rgba_frames"].numpy())
    assert np.array_equal(pictures, recorded["composite_on_bg255"].numpy())
    images = torch.from_numpy(pictures).movedim(-1, 1) / 255.0 * 2 - 1
    # recorded in half precision
    assert torch.equal(images.half(), recorded["vae_input_images"].half())


WITH_NETWORK = [
    name
    for name in folder.names("sds_")
    if folder.is_whole(str(folder.metadata(f"sds_{name}.safetensors")["unet_weights"]))
]


@pytest.mark.parametrize("name", WITH_NETWORK)
def test_noise_of_the_network(name):
    recorded = recording(name)
    model = folder.network(folder.metadata(f"sds_{name}.safetensors")["unet_weights"])
    latents = recorded["vae_latent_of_images"] * SCALING_FACTOR
    rows = network_rows(folder.condition(model, recorded, latents), flat_cameras(recorded["c2w"]))
    alpha = guidance.alphas_cumprod()[int(recorded["t"])].item()
    noisy = guidance.add_noise(recorded["latents"], recorded["noise"], alpha)
    unconditional, conditional = guidance.predict_noise(model, noisy, int(recorded["t"]), rows)
    folder.assert_within(unconditional, recorded["eps_uncond"], 1e-4)
    folder.assert_within(conditional, recorded["eps_text"], 1e-4)
    target = guidance.reconstruction_target(noisy, unconditional, conditional, alpha)
    loss = guidance.sds_loss(recorded["latents"], target)
    folder.assert_within(loss, recorded["default.loss"], 0.0, LOSS_RTOL)
    # what the network's own tolerance makes of the gradient
    amplified = 1e-4 * 9 * (1 - alpha) ** 0.5 / alpha**0.5 / len(noisy)
    folder.assert_within((recorded["latents"] - target) / len(noisy), recorded["default.grad"], amplified)


@folder.needs("schedule.safetensors")
def test_diffusion_schedule():
    recorded = folder.tensors("schedule.safetensors")
    alphas = guidance.alphas_cumprod()
    folder.assert_within(alphas.float(), recorded["alphas_cumprod"], 1e-7)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    betas = 1 - alphas / before
    folder.assert_within(betas.float(), recorded["betas"], 1e-6)
    folder.assert_within(before.float(), recorded["alphas_cumprod_prev"], 1e-6)
    folder.assert_within(alphas.sqrt().float(), recorded["sqrt_alphas_cumprod"], 1e-6)
    folder.assert_within((1 - alphas).sqrt().float(), recorded["sqrt_one_minus_alphas_cumprod"], 1e-6)
    folder.assert_within(guidance.ddim_scheduler().alphas_cumprod, recorded["alphas_cumprod"], 1e-6)


@folder.needs("schedule.safetensors")
def test_schedules():
    recorded = folder.tensors("schedule.safetensors")
    ours = {"orient": "orientation", "lpips": "lpips", "ssim": "ssim"}
    # the reference adds both anchor terms twice; this package's weights say what is added
    times = {"lpips": 2, "ssim": 2}
    lambdas = [name.removeprefix("lambda_") for name in recorded if name.startswith("lambda_")]
    assert lambdas
    for i, step in enumerate(recorded["step"].tolist()):
        assert REFERENCE_NOISE.at(step) == (recorded["min_step"][i], recorded["max_step"][i])
        assert render_size(step) == recorded["render_size"][i]
        for name in lambdas:
            weight = LossRamps().at(step)[ours.get(name, name)]
            reference = times.get(name, 1) * recorded[f"lambda_{name}"][i].item()
            assert weight == pytest.approx(reference, rel=1e-6, abs=1e-6), (name, step)


@folder.needs("schedule.safetensors")
def test_frames_taken_of_a_video():
    recorded = folder.tensors("schedule.safetensors")
    for total, frames in zip(recorded["video_total_frames"].tolist(), recorded["selected_frames"], strict=True):
        assert spread_frames(total, len(frames)) == frames.tolist()


CAMERAS = "cameras.safetensors"


def indexed(prefix: str, suffix: str) -> list[str]:
    """The numbered entries of the camera recording that have `suffix`."""
    if not folder.has(CAMERAS):
        return []
    found = {name.partition(".")[0] for name in folder.tensors(CAMERAS) if name.startswith(prefix)}
    return sorted(name for name in found if f"{name}.{suffix}" in folder.tensors(CAMERAS))


def rays(c2w: torch.Tensor, pixels: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.meshgrid(pixels, pixels, indexing="ij")
    xy = torch.stack([columns, rows], -1).reshape(-1, 2) + 0.5
    focal = 0.5 * size / np.tan(np.radians(FIELD_OF_VIEW) / 2)
    count = len(xy)
    return pixel_rays(xy, c2w.expand(count, 4, 4), torch.full((count,), focal), torch.full((count, 2), size))


@pytest.mark.parametrize("name", indexed("train", "c2w"))
def test_training_cameras(name):
    recorded = folder.tensors(CAMERAS)

    def entry(key: str) -> torch.Tensor:
        return recorded[f"{name}.{key}"]

    assert bool((entry("fovy") == FIELD_OF_VIEW).all())
    distance = entry("camera_distances").double().numpy()
    azimuth, elevation = entry("azimuth").double().numpy(), entry("elevation").double().numpy()
    assert elevation.min() >= 0 and elevation.max() <= HIGHEST_ELEVATION_DEG
    assert np.allclose(np.diff(azimuth), 90.0, atol=1e-4)
    made = np.stack(
        [look_at_cameras(a[None], e[None], d)[0] for a, e, d in zip(azimuth, elevation, distance, strict=True)]
    )
    c2w = torch.from_numpy(made).float()
    folder.assert_within(c2w, entry("c2w"), CAMERA_ATOL)
    folder.assert_within(flat_cameras(c2w), entry("camera_cond"), CAMERA_ATOL)
    folder.assert_within(c2w[:, :3, 3], entry("rays_o"), CAMERA_ATOL)
    size = int(entry("height"))
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
    for view, matrix in enumerate(c2w):
        _, directions = rays(matrix, entry("pix"), size)
        folder.assert_within(
            directions.view_as(entry("rays_d_at_pix")[view]), entry("rays_d_at_pix")[view], CAMERA_ATOL
        )
        # the rasteriser's matrix says the same as our projection
        clip = torch.cat([points, torch.ones(20, 1)], -1) @ entry("mvp_mtx")[view].T
        focal = 0.5 * size / np.tan(np.radians(FIELD_OF_VIEW) / 2)
        pixels, _ = project(points, matrix, float(focal), size, size)
        folder.assert_within(pixels / size * 2 - 1, clip[:, :2] / clip[:, 3:], 1e-5)


def evaluation_path(frames=FRAMES, stops=8):
    """Azimuths (degrees) and times of the reference's test video.

    At each of `stops` azimuths time runs once while the camera stands, and once while it goes on to the next stop.
    """
    times = np.linspace(0.0, 1.0, frames)
    width = 360.0 / stops
    azimuths = [part for stop in range(stops) for part in (np.full(frames, width * stop), width * (stop + times))]
    return np.concatenate(azimuths), np.tile(times, 2 * stops)


@folder.needs(CAMERAS)
@pytest.mark.parametrize("name", ["test", "val"])
def test_evaluation_path(name):
    recorded = folder.tensors(CAMERAS)
    azimuths, times = evaluation_path()
    count = int(recorded[f"{name}.n_views"])
    made = look_at_cameras(azimuths[:count], np.zeros(count), DISTANCE)
    folder.assert_within(torch.from_numpy(made).float(), recorded[f"{name}.c2w"], CAMERA_ATOL)
    folder.assert_within(torch.from_numpy(times[:count]).float(), recorded[f"{name}.frame_times"], CAMERA_ATOL)


@pytest.mark.parametrize(
    "name", sorted(n for n in folder.tensors(CAMERAS) if n.startswith("imagedream_")) if folder.has(CAMERAS) else []
)
def test_sampling_cameras(name):
    elevation, azimuth = (float(part[2:]) for part in name.partition(".")[2].split("_"))
    # ImageDream's azimuth 90 is +x
    views = view_cameras([azimuth - 90.0 + 90.0 * view for view in range(4)], elevation)
    ours = torch.cat([flat_cameras(views), torch.zeros(1, 16)])
    folder.assert_within(ours, folder.tensors(CAMERAS)[name], CAMERA_ATOL)


@pytest.mark.parametrize("name", indexed("anchor", "c2w"))
def test_anchor_camera(name):
    recorded = folder.tensors(CAMERAS)
    azimuth = recorded[f"{name}.azimuth"].double().numpy()
    number = int(name.removeprefix("anchor"))
    assert (azimuth - 90.0 * number) % 360 == 0
    c2w = torch.from_numpy(look_at_cameras(azimuth, np.zeros(1), DISTANCE)).float()
    folder.assert_within(c2w[:, :3], recorded[f"{name}.c2w"], CAMERA_ATOL)
    _, directions = rays(c2w[0], recorded[f"{name}.pix"], 256)
    reference = recorded[f"{name}.rays_d_at_pix"]
    folder.assert_within(directions.view_as(reference), reference, CAMERA_ATOL)


@folder.needs(CAMERAS)
def test_anchor_picture():
    recorded = folder.tensors(CAMERAS)
    target, mask = anchor_target(recorded["anchor_image.rgba_u8"].numpy())
    assert torch.equal(mask[..., None], recorded["anchor_image.mask"])
    folder.assert_within(target, recorded["anchor_image.target_bg_white"], 1e-6)


@folder.needs("anchor_ssim.safetensors")
def test_ssim():
    recorded = folder.tensors("anchor_ssim.safetensors")
    folder.assert_within(gaussian_window(), recorded["gaussian_window_11_sigma1.5"], 1e-7)
    cases = sorted(name.partition(".")[0] for name in recorded if name.endswith(".render"))
    assert cases
    for case in cases:
        render = recorded[f"{case}.render"][None].clone().requires_grad_()
        similarity = padded_ssim(render, recorded[f"{case}.target"][None])
        (1 - similarity).backward()
        folder.assert_within(similarity.detach(), recorded[f"{case}.ssim"], 1e-5)
        folder.assert_within(render.grad[0], recorded[f"{case}.d(1-ssim)_drender"], 1e-6)
        term = LossRamps().ssim.at(0) * (1 - similarity.detach())
        folder.assert_within(term, recorded[f"{case}.effective_ssim_term(2*50*(1-ssim))"], 1e-3)
