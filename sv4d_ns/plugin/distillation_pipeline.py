"""The nerfstudio pipeline of 4Diffusion: it makes the prior and the anchor of a run and asks the objective."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from nerfstudio.data.datamanagers.base_datamanager import DataManagerConfig
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.models.base_model import ModelConfig
from torch import Tensor

from sv4d_ns.plugin.base_pipeline import FieldPipeline, FieldPipelineConfig, read_step
from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig
from sv4d_ns.plugin.distillation_model import FourDiffusionModel, FourDiffusionModelConfig
from sv4d_ns.plugin.help import first_in_help
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.progress import say

if TYPE_CHECKING:
    from torch.cuda.amp.grad_scaler import GradScaler

    from sv4d_ns.distillation.objective import Objective
    from sv4d_ns.distillation.priors import ViewPrior


@first_in_help("datamanager", "movies", "warm_up")
@dataclass
class FourDiffusionPipelineConfig(FieldPipelineConfig):
    """What the field is optimised for."""

    _target: type = field(default_factory=lambda: FourDiffusionPipeline)
    datamanager: DataManagerConfig = field(
        # no loss of this method looks at patches
        default_factory=lambda: SV4DDataManagerConfig(train_num_rays_per_batch=2048, patches=0)
    )
    """The video and the model behind distillation."""
    model: ModelConfig = field(default_factory=FourDiffusionModelConfig)
    """The space-time field."""
    anchor_view: int | None = None
    """View of the grid that the field is to match (0 the input, then the novel views in order); None takes the input
    itself where its camera is known, else the sampled view that looks most like it."""
    anchor_size: int | None = None
    """Pixels along the side of the anchor's renders; None takes 256, and twice the model's size where that is less."""
    frames_per_step: int | None = None
    """Consecutive frames of a step; None takes the model's window, and half of it on a CPU."""
    warm_up: float | None = None
    """Share of the steps in which the field is first fitted to the grid's views pixel by pixel; distillation then
    starts where the reference is after its first tenth. None takes 0 with 4DM, as the reference, and half with an SV4D
    model."""

    def warm_up_steps(self, total: int) -> int:
        """Of `total` steps, those of the warm-up."""
        assert isinstance(self.datamanager, SV4DDataManagerConfig)
        share = self.warm_up
        if share is None:
            share = 0.0 if self.datamanager.synthesis == "fourdm" else 0.5
        return int(share * total)


class FourDiffusionPipeline(FieldPipeline):
    """Wires the view grid, the field, the model that made the views, and the objective together."""

    config: FourDiffusionPipelineConfig

    def __init__(
        self,
        config: FourDiffusionPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: "GradScaler | None" = None,
    ):
        super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)
        self._objective: Objective | None = None
        self._total_steps = 0  # and so no warm-up, until the trainer says how long the run is

    @property
    def space_model(self) -> FourDiffusionModel:
        """The model, typed."""
        assert isinstance(self.model, FourDiffusionModel)
        return self.model

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """The empty-space grid before each step, the bar after it, the results at the end."""
        trainer: Any = training_callback_attributes.trainer
        self._total_steps = trainer.total_steps
        callbacks = super().get_training_callbacks(training_callback_attributes)
        with one_sentence_errors():
            self._objective = self._make_objective()
        return callbacks

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The terms of a step; raises `NotFiniteError` before one of them can spoil the field."""
        warm_up_steps = self._warm_up_steps()
        if step < warm_up_steps:
            return super().get_train_loss_dict(step)
        assert self._objective is not None
        terms = self._objective.terms(step - warm_up_steps) | {"motion": self._motion(step)}
        self.psnr = read_step(terms, self._objective.anchor_psnr, step)
        return {}, terms, {"psnr": self._objective.anchor_psnr}

    def go_back(self, step: int) -> None:
        """As the other method's, and with other views and noise in distillation, too."""
        super().go_back(step)
        if self._objective is not None:
            self._objective.config = replace(self._objective.config, seed=self._seed())

    def _seed(self) -> int:
        """Of this attempt."""
        return self.datamanager.config.seed + self.datamanager.retries

    def _motion(self, step: int) -> Tensor:
        from sv4d_ns.distillation.motion import motion_loss

        model = self.space_model
        return motion_loss(model.field, model.occupancy, model.num_frames, self._seed(), step)

    def _warm_up_steps(self) -> int:
        return self.config.warm_up_steps(self._total_steps)

    def _is_fourdm(self) -> bool:
        return self.datamanager.config.synthesis == "fourdm"

    def _make_objective(self) -> "Objective":
        from sv4d_ns.distillation.anchor import choose_anchor
        from sv4d_ns.distillation.objective import Objective, ObjectiveConfig, make_anchor
        from sv4d_ns.distillation.schedules import own_weights
        from sv4d_ns.metrics.lpips import anchor_lpips

        grid, model = self.datamanager.grid, self.space_model
        prior = self._make_prior()
        view = choose_anchor(grid, self.config.anchor_view)
        azimuth = (0.0, *grid.plan.azimuths_deg)[view]
        named = "the input video itself" if view == 0 else f"view {view} of the grid, at azimuth {azimuth:g} degrees"
        say(f"Anchor: {named} (--pipeline.anchor-view chooses another).")
        lpips, sentence = anchor_lpips(self.device)
        if lpips is None:
            say(sentence)
        size = self.config.anchor_size or min(2 * prior.image_size, 256)
        frames = self.config.frames_per_step
        if frames is None and str(self.device) == "cpu":
            frames = max(prior.num_frames // 2, 1)
        return Objective(
            model.field,
            model.occupancy,
            prior,
            make_anchor(grid, view, size, self.device),
            grid.num_frames,
            ObjectiveConfig(
                total_steps=self._total_steps - self._warm_up_steps(),
                first_step=WARM_START if self._warm_up_steps() else 0,
                frames_per_step=frames,
                seed=self._seed(),
                weights=own_weights(short_run=not self._is_fourdm(), perceptual=lpips is not None),
                noise=prior.noise,
                render=model.render_settings(),
            ),
            lpips,
        )

    def _make_prior(self) -> "ViewPrior":
        from sv4d_ns.distillation.priors import BundledPrior, FourDMPrior, SV4DPrior
        from sv4d_ns.synthesis.bundled import BundledSynthesizer
        from sv4d_ns.synthesis.fourdm import FourDMSynthesizer

        grid, synthesizer = self.datamanager.grid, self.datamanager.synthesizer()
        if isinstance(synthesizer, FourDMSynthesizer):
            # a grid of another model has no 4DM front: its input view is taken for it
            front = grid.plan.azimuths_deg[0] if grid.provenance.get("model") == synthesizer.name else 0.0
            self.datamanager.release_synthesizer()  # its encoders, half of its memory, are not needed any more
            return FourDMPrior(synthesizer.pipeline, grid.input_frames, synthesizer.prompt, front)
        loaded: Any = synthesizer
        plan = grid.plan
        kind = BundledPrior if isinstance(synthesizer, BundledSynthesizer) else SV4DPrior
        return kind(loaded.pipeline, grid.input_frames, plan.radius, plan.fov_deg, plan.input_elevation_deg)


WARM_START = 3500
"""Step of the reference's run at which distillation starts after a warm-up: noise levels 308 to 469 of 1000 where they
are annealed."""
