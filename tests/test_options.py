"""The choices of the command line are those of the rooms that make them."""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tyro

from sv4d_ns.cli.doctor import Doctor
from sv4d_ns.diffusion.sv4d.attention import CameraAttention
from sv4d_ns.diffusion.sv4d.grid import GridOptions
from sv4d_ns.diffusion.sv4d.guidance import GuidanceRule
from sv4d_ns.diffusion.sv4d.windows import ViewReferences, WindowStride
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig, view_plan
from sv4d_ns.utils.errors import InputError
from sv4d_ns.video import CropRule

ENUMS = {
    "crop": CropRule,
    "view_references": ViewReferences,
    "window_stride": WindowStride,
    "guidance": GuidanceRule,
    "camera_attention": CameraAttention,
}


def choices(annotation: Any) -> set[str]:
    """The texts of a Literal, alone or in a union with None."""
    return {text for part in get_args(annotation) for text in (get_args(part) or (part,)) if isinstance(text, str)}


@pytest.mark.parametrize("name", ENUMS)
def test_the_config_offers_every_value_of_the_enum(name: str) -> None:
    annotation = SV4DDataManagerConfig.__annotations__[name]
    if isinstance(annotation, str):
        annotation = get_type_hints(SV4DDataManagerConfig)[name]
    assert choices(annotation) == {value.value for value in ENUMS[name]}


def test_defaults_are_fixed_input_and_the_models_own_network() -> None:
    config = SV4DDataManagerConfig()
    assert (config.crop, config.window_stride, config.guidance) == ("auto", "fixed", "released")
    assert config.camera_attention is config.view_references is config.guidance_scale is None
    assert GridOptions.from_values({"stride": config.window_stride, "guidance": config.guidance}) == GridOptions()


def test_the_doctor_frames_a_video_as_a_run_does() -> None:
    doctor, run = Doctor(Path("film.mp4")), SV4DDataManagerConfig()
    for name in ("max_frames", "fps", "masks", "matting", "crop"):
        assert getattr(doctor, name) == getattr(run, name), name
    assert choices(get_type_hints(Doctor)["crop"]) == {rule.value for rule in CropRule}


def test_the_users_views_become_a_plan() -> None:
    assert view_plan(SV4DDataManagerConfig()) is None
    assert view_plan(SV4DDataManagerConfig(view_azimuths=(20.0, -30.0))) == ViewPlan.ring((20.0, -30.0))
    plan = view_plan(SV4DDataManagerConfig(view_azimuths=(20.0,), view_elevations=(35.0,)))
    assert plan == ViewPlan((20.0,), (35.0,))
    for wrong in (
        {"view_elevations": (3.0,)},
        {"view_azimuths": (3.0,), "view_elevations": (1.0, 2.0)},
        {"view_azimuths": (3.0,), "view_elevations": (90.0,)},
    ):
        with pytest.raises(InputError):
            view_plan(SV4DDataManagerConfig(**wrong))


@pytest.mark.parametrize(
    "flag",
    [
        "datamanager.eval-num-rays-per-batch",
        "datamanager.pixel-sampler.num-rays-per-batch",
        "model.collider-params.near-plane",
    ],
)
def test_what_nothing_reads_is_no_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sv4d_ns.method_configs.sv4d import method

    with pytest.raises(SystemExit):
        tyro.cli(type(method.config), default=method.config, args=[f"--pipeline.{flag}", "7"])
    assert flag in capsys.readouterr().err
    assert method.config.pipeline.datamanager.eval_num_rays_per_batch, "nerfstudio's commands may set it"


@pytest.mark.parametrize("method", ["sv4d", "4diffusion"])
def test_the_prompt_reaches_the_model_that_makes_the_views(tmp_path: Path, method: str) -> None:
    from tiny_run import tiny_config, tiny_grid

    config = tiny_config(method, tmp_path)
    tiny_grid().save(config.get_base_dir() / "views")
    config.pipeline.model.prompt = "a fox"  # where nerfstudio puts --prompt
    config.pipeline.setup(device="cpu", test_mode="val")
    assert config.pipeline.datamanager.prompt == "a fox"


def own_settings(config: Any, prefix: str = "") -> list[str]:
    """Settings that this package adds to nerfstudio's, by their path."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found += own_settings(value, f"{prefix}{field.name}.")
        elif field.name != "_target" and any(
            "Fixed" not in str(vars(kind).get("__annotations__", {}).get(field.name, "Fixed"))
            for kind in type(config).__mro__
            if kind.__module__.startswith("sv4d_ns")
        ):
            found.append(prefix + field.name)
    return found


def test_an_sv4d_run_has_at_most_sixty_settings_of_its_own() -> None:
    from sv4d_ns.method_configs.sv4d import method

    names = own_settings(method.config)
    assert "pipeline.model.losses.mask" in names and "pipeline.datamanager.crop" in names
    assert len(names) <= 60, names
