"""Which model makes the views of a run."""

from collections.abc import Mapping
from typing import Any, Literal

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.synthesis.base import ViewSynthesizer
from sv4d_ns.synthesis.sv4d import DiffusionSynthesizer, apply_offload, fitting_offload
from sv4d_ns.utils.errors import InputError

SynthesisChoice = Literal["auto", "bundled", "official"]
OFFICIAL_OPTIONS = ("references", "guidance_scale", "camera_attention")
"""Of these the bundled model has none."""


def load_synthesizer(
    choice: SynthesisChoice,
    device: str,
    *,
    num_inference_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[ViewSynthesizer, str]:
    """The synthesizer for a machine, and one sentence saying what was chosen and why.

    Args:
        choice: `auto` takes the official SV4D 2.0 weights on a CUDA device (2 billion parameters are out of reach of
            a CPU) and the bundled model elsewhere; the other values say it outright.
        device: torch device string.
        num_inference_steps: denoising steps; None takes the model's own default.
        options: values of `GridOptions` by name; None, for any of them, takes what suits the model.

    Raises:
        InputError: an option is unknown, or the official weights are not at hand (the sentence says how to get them,
            or how to go without).
    """
    from sv4d_ns.diffusion.sv4d.grid import GridOptions
    from sv4d_ns.diffusion.sv4d.windows import ViewReferences

    on_cuda = device.startswith("cuda")
    official = choice == "official" or (choice == "auto" and on_cuda)
    if official and not on_cuda and choice == "official":
        raise InputError(
            "--pipeline.datamanager.synthesis official needs a CUDA device (12 GB of weights, hours on a CPU): "
            "use --pipeline.datamanager.synthesis bundled on this machine."
        )
    reason = f"--pipeline.datamanager.synthesis {choice}" if choice != "auto" else f"the device is {device}"
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if not official:
        from sv4d_ns.synthesis.bundled import NAME, load_bundled_synthesizer

        for option in OFFICIAL_OPTIONS:
            if option in given:
                flag = "view-references" if option == "references" else option.replace("_", "-")
                raise InputError(
                    f"--pipeline.datamanager.{flag} is a setting of the official model, and the bundled one is used: "
                    "leave it out."
                )
        bundled = load_bundled_synthesizer(device, num_inference_steps)
        size = bundled.image_size
        return bundled, f"Views come from the {NAME} model at {size}x{size}, because {reason}."
    from sv4d_ns.diffusion.planner.plan import Offload, plan_memory, this_device
    from sv4d_ns.diffusion.weights.official import load_official_pipeline

    _, card = this_device("cuda")
    offload, memory = fitting_offload(plan_memory("official8", card), card.memory)
    print(memory)
    # the 8-view model: its views close the ring around the object in one call, so they agree with each other
    place = device if offload is Offload.NONE else "cpu"
    pipeline, name = load_official_pipeline(place, "sv4d2_8views.safetensors"), "stabilityai/sv4d2.0 (8 views)"
    apply_offload(pipeline, offload, device)
    plan, size, references = ViewPlan.OFFICIAL_8, 576, ViewReferences.ANCHORED
    grid_options = GridOptions.from_values({"references": references, **given})
    synthesizer = DiffusionSynthesizer(pipeline, name, size, plan, num_inference_steps, options=grid_options)
    return synthesizer, f"Views come from the {name} model at {size}x{size}, because {reason}."
