"""The trainer of 4Diffusion runs, and the ways to start one from a picture or a sentence."""

from dataclasses import dataclass, field
from pathlib import Path

from sv4d_ns.plugin.base_trainer import FIRST_IN_HELP, FieldTrainer, FieldTrainerConfig
from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig
from sv4d_ns.plugin.distillation_model import FourDiffusionModelConfig
from sv4d_ns.plugin.distillation_pipeline import FourDiffusionPipelineConfig
from sv4d_ns.plugin.estimate import Work, distillation_work
from sv4d_ns.plugin.help import first_in_help
from sv4d_ns.plugin.optimizers import DecaySchedulerConfig
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import say
from sv4d_ns.utils.threads import useful_threads

CPU_STEPS = 500
"""Steps of a run with an SV4D model behind distillation: within 15 minutes on two CPU cores, by a step's CPU time."""
FOURDM_STEPS = 35_000


@first_in_help(*FIRST_IN_HELP, "prompt", "image", "image_to_video_model", "text_to_image_model")
@dataclass
class FourDiffusionTrainerConfig(FieldTrainerConfig):
    """`FieldTrainerConfig` that also starts from a picture or a sentence."""

    _target: type = field(default_factory=lambda: FourDiffusionTrainer)
    max_num_iterations: int = 0
    """Steps of the whole optimisation; 0 takes the reference's 35,000 with 4DM and 500 with an SV4D model."""
    image: Path | None = None
    """A picture to start from instead of a video; needs --image-to-video-model."""
    image_to_video_model: str | None = None
    """Repository or folder of a diffusers image-to-video pipeline (for example Stable Video Diffusion)."""
    text_to_image_model: str | None = None
    """Repository or folder of a diffusers text-to-image pipeline, for --prompt without --data and --image."""
    generated_size: int | None = None
    """Pixels along the side of what these models make (of a square of the same area, for a picture that is not one);
    None takes their own size."""

    def settle(self) -> None:
        """Choose the model's field, the run's length and its schedule, and make the video where there is none."""
        datamanager = self.pipeline.datamanager
        assert isinstance(datamanager, SV4DDataManagerConfig)
        if datamanager.synthesis == "auto" and datamanager.fourdm_checkpoint is not None:
            datamanager.synthesis = "fourdm"
        fourdm = datamanager.synthesis == "fourdm"
        if self.max_num_iterations == 0:
            self.max_num_iterations = FOURDM_STEPS if fourdm else CPU_STEPS
        model = self.pipeline.model
        assert isinstance(model, FourDiffusionModelConfig)
        if model.field_size == "auto":
            model.field_size = "reference" if self._device().startswith("cuda") else "small"
        if not fourdm:
            # a run of hundreds of steps has to settle; the reference's of 35,000 goes on at full rate
            for group in self.optimizers.values():
                group["scheduler"] = DecaySchedulerConfig(warmup_steps=0, max_steps=self.max_num_iterations)
        if datamanager.data is None and self.load_config is None and self.source_run() is None:
            datamanager.data = self._make_video()

    def work(self, frames: int, views: int) -> Work:
        """Steps of warm-up, then of distillation."""
        pipeline = self.pipeline
        assert isinstance(pipeline, FourDiffusionPipelineConfig)
        steps = self.max_num_iterations
        return distillation_work(steps, frames, views, pipeline.warm_up_steps(steps), len(pipeline.movies))

    def _make_video(self) -> Path | None:
        """The video of a picture, or of a picture of a sentence; None where neither was given (an error later).

        Raises:
            InputError: a model is not named or cannot be had.
        """
        from sv4d_ns.distillation.text_to_video import image_to_video, text_to_image

        folder = self.output_dir / ".generated"
        image, device = self.image, self._device()
        if image is None and self.prompt:
            if self.text_to_image_model is None:
                raise InputError(
                    "--prompt without --data or --image needs --text-to-image-model MODEL (and --image-to-video-model "
                    "MODEL), diffusers pipelines of your choice: none is built in. Give a video with --data otherwise."
                )
            self._check_video_model("--prompt without --data")
            image = text_to_image(self.prompt, self.text_to_image_model, folder, device, size=self.generated_size)
        if image is None:
            return None
        self._check_video_model("--image")
        assert self.image_to_video_model is not None
        video = image_to_video(image, self.image_to_video_model, folder, device, size=self.generated_size)
        say(f"Video: {video}.")
        return video

    def _check_video_model(self, flag: str) -> None:
        if self.image_to_video_model is None:
            raise InputError(
                f"{flag} needs --image-to-video-model MODEL, a diffusers pipeline of your choice (for example "
                "stabilityai/stable-video-diffusion-img2vid-xt): none is built in. Give a video with --data otherwise."
            )

    def _device(self) -> str:
        from sv4d_ns.utils.devices import choose_device

        return choose_device(self.chosen_device())[0]


class FourDiffusionTrainer(FieldTrainer):
    """Trainer of a 4Diffusion run."""

    config: FourDiffusionTrainerConfig

    def threads_of(self, step: int) -> int:
        """A distilling step is the diffusion model, whose convolutions are large and take all threads that are free; a
        step of the warm-up is like the other method's.

        Asked before each step: with two threads beside another program, a step of 2.5 s took 6.7.
        """
        pipeline = self.config.pipeline
        assert isinstance(pipeline, FourDiffusionPipelineConfig)
        return 1 if step < pipeline.warm_up_steps(self.total_steps) else useful_threads()
