"""Which model makes the views of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sv4d_ns.diffusion.bundled import REACH
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.synthesis.base import BUNDLED, BUNDLED_SIZE, ViewSynthesizer
from sv4d_ns.synthesis.sv4d import DiffusionSynthesizer, apply_offload, fitting_offload
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import say

SynthesisChoice = Literal["auto", "bundled", "official"]
OFFICIAL_OPTIONS = ("references", "guidance_scale", "camera_attention")
"""Of these the bundled model has none."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is loaded."""

    name: str
    size: int
    """Pixels along the side of its views."""
    plan: ViewPlan
    reach: str
    """What to expect of the sides the camera does not see."""


MODELS = {
    "bundled": ModelFacts(BUNDLED, BUNDLED_SIZE, ViewPlan.BUNDLED, REACH),
    # the 8-view model: its views close the ring around the object in one call, so they agree with each other
    "official": ModelFacts(
        "stabilityai/sv4d2.0 (8 views)", 576, ViewPlan.OFFICIAL_8, "The sides the camera does not see are its guess."
    ),
}


def choose_model(choice: SynthesisChoice, device: str) -> tuple[Literal["bundled", "official"], str]:
    """Which model makes the views on a device, and why.

    Raises:
        InputError: the model was asked for and the device cannot run it.
    """
    on_cuda = device.startswith("cuda")
    if choice == "official" and not on_cuda:
        raise InputError(
            "--pipeline.datamanager.synthesis official needs a CUDA device (12 GB of weights, hours on a CPU): "
            "use --pipeline.datamanager.synthesis bundled on this machine."
        )
    reason = f"--pipeline.datamanager.synthesis {choice}" if choice != "auto" else f"the device is {device}"
    return "official" if choice == "official" or (choice == "auto" and on_cuda) else "bundled", reason


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

    chosen, reason = choose_model(choice, device)
    facts = MODELS[chosen]
    sentence = f"{facts.name} at {facts.size}x{facts.size} pixels, because {reason}."
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if chosen == "bundled":
        from sv4d_ns.synthesis.bundled import load_bundled_synthesizer

        for option in OFFICIAL_OPTIONS:
            if option in given:
                flag = "view-references" if option == "references" else option.replace("_", "-")
                raise InputError(
                    f"--pipeline.datamanager.{flag} is a setting of the official model, and the bundled one is used: "
                    "leave it out."
                )
        return load_bundled_synthesizer(device, num_inference_steps), sentence
    from sv4d_ns.diffusion.planner.plan import Offload, plan_memory, this_device
    from sv4d_ns.diffusion.weights.official import load_official_pipeline

    _, card = this_device("cuda")
    offload, memory = fitting_offload(plan_memory("official8", card), card.memory)
    say(memory)
    place = device if offload is Offload.NONE else "cpu"
    pipeline = load_official_pipeline(place, "sv4d2_8views.safetensors")
    apply_offload(pipeline, offload, device)
    grid_options = GridOptions.from_values({"references": ViewReferences.ANCHORED, **given})
    synthesizer = DiffusionSynthesizer(
        pipeline, facts.name, facts.size, facts.plan, num_inference_steps, options=grid_options
    )
    return synthesizer, sentence
