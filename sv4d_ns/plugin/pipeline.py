"""The nerfstudio pipeline of a run: stage 1 fits the generated views, stage 2 refines the views from the field.

Stage 2 is SDEdit on the whole grid (our reading of SV4D 2.0's "2-stage refinement"; the paper's formula is not
public): the field is rendered at the model's own views and times, the renders are noised to a stated level and
denoised with the input video as condition, and the result replaces the targets. Renders of one field agree with each
other in 3D, so the refined views do so more than the generated ones.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import ModelConfig

from sv4d_ns.plugin.base_pipeline import FieldPipeline, FieldPipelineConfig
from sv4d_ns.plugin.help import first_in_help
from sv4d_ns.plugin.model import SV4DModelConfig
from sv4d_ns.runs.layout import VIEW_FOLDERS, windows_folder
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.progress import say

if TYPE_CHECKING:
    from sv4d_ns.plugin.trainer import SV4DTrainer
    from sv4d_ns.views.grid import ViewGrid


@first_in_help("datamanager", "refine_steps", "movies")
@dataclass
class SV4DPipelineConfig(FieldPipelineConfig):
    """The two stages of the 4D optimisation."""

    _target: type = field(default_factory=lambda: SV4DPipeline)
    model: ModelConfig = field(default_factory=SV4DModelConfig)
    """The 4D field, its losses and their schedule."""
    visibility_every: int = 30
    """Training steps between updates of the visibility weights, one frame each, once frames move; 0 weights generated
    views by their angle from the input alone."""
    refine_steps: tuple[int, ...] | None = None
    """Training steps at which stage 2 renders, noises and denoises all views; one round each; no value after the
    flag is stage 1 alone. None is one round at 0.64 of --max-num-iterations (of the run that is continued, if it had
    one already)."""
    refine_strength: float | None = None
    """Noise level of stage 2 in (0, 1]: the share of the denoising schedule that is run again; None takes what suits
    the model (0.5 for the bundled one, 0.4 for the official one; the paper does not say)."""


class SV4DPipeline(FieldPipeline):
    """Stage 1, and stage 2 at its steps."""

    config: SV4DPipelineConfig

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """The base's; the canonical frame is named first."""
        canonical, frames = self.field_model.canonical_frame, self.field_model.num_frames
        say(f"Canonical frame: {canonical + 1} of {frames}, where the object shows most of itself.")
        return super().get_training_callbacks(training_callback_attributes)

    def step_callbacks(self, trainer: "SV4DTrainer") -> list[TrainingCallback]:
        """Rounds of stage 2 and the visibility of views."""
        before, after = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION
        refinements: list[TrainingCallback] = []
        saves: list[TrainingCallback] = []
        for number, step in enumerate(self.config.refine_steps or (), start=1):
            # before anything of the next step is done: a kill during the refinement then resumes with the same field
            saves.append(TrainingCallback([after], func=lambda step: trainer.save_checkpoint(step), iters=(step - 1,)))
            refinements.append(TrainingCallback([before], self._refine_views, iters=(step,), args=[trainer, number]))
        if self.config.visibility_every > 0:
            every = self.config.visibility_every
            refinements.append(TrainingCallback([before], self._update_visibility, update_every_num_iters=every))
        return [*refinements, *saves]

    def grid_number(self, step: int) -> int:
        """How many rounds of stage 2 lie before the step."""
        return sum(step > refine_step for refine_step in self.config.refine_steps or ())

    def _update_visibility(self, step: int) -> None:
        window = self.field_model.frame_window(step)
        if len(window) == 1:
            return  # the static phase: the surface is still being found
        frame = window.in_turn(step // self.config.visibility_every)
        self.datamanager.batch_sampler().update_visibility(self.field_model.field, self.field_model.occupancy, frame)

    def _refine_views(self, trainer: "SV4DTrainer", number: int, step: int) -> None:
        """Round `number` of stage 2, before training step `step`."""
        with one_sentence_errors():
            folder = self.run_dir / VIEW_FOLDERS[number]
            trainer.bar.close()
            if not folder.is_dir():
                if number == 1:
                    trainer.keep_stage_1(step - 1)
                with trainer.between_steps():
                    self._make_refined_views(number).save(folder)
            self.use_saved_views(number)

    def _make_refined_views(self, number: int) -> "ViewGrid":
        from sv4d_ns.diffusion.seams import drift_line
        from sv4d_ns.field.images import render_grid
        from sv4d_ns.utils.files import content_hash
        from sv4d_ns.utils.images import resize_rgba
        from sv4d_ns.utils.progress import bar
        from sv4d_ns.views.grid import ViewGrid

        grid, config = self.datamanager.grid, self.datamanager.config
        size = self.datamanager.synthesizer().image_size
        with bar(f"Stage 2, round {number}: rendering the field") as progress:
            renders = render_grid(self.field_model.field, self.field_model.occupancy, grid, size, progress)
        frames = resize_rgba(grid.input_frames, size)
        seed = config.seed + number
        strength = self.config.refine_strength or self.datamanager.synthesizer().refine_strength
        settings = {"strength": strength, "seed": seed}
        key = content_hash(frames, renders, grid.plan.to_dict(), self.datamanager.synthesizer().describe(), settings)
        with bar(f"Stage 2, round {number}: noising and denoising the renders") as progress:
            refined = self.datamanager.synthesizer().refine(
                frames,
                renders,
                grid.plan,
                strength=strength,
                seed=seed,
                store=windows_folder(self.run_dir, key),
                progress=progress,
            )
        if refined.drift:
            say(drift_line(refined.drift))
        drift = [asdict(boundary) for boundary in refined.drift]
        return ViewGrid(
            input_frames=grid.input_frames,
            novel_views=refined.images,
            plan=grid.plan,
            fps=grid.fps,
            confidence=refined.confidence,
            framing=grid.framing,
            provenance={
                **grid.provenance,
                f"refine_{number}": {**settings, "drift": drift},
            },
        )
