"""The trainer of SV4D runs: their steps are in shares of the schedule, and stage 1 is shared by runs that differ in
stage 2 only."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sv4d_ns.plugin.base_trainer import (
    FIRST_IN_HELP,
    AutoMachineConfig,
    FieldTrainer,
    FieldTrainerConfig,
)
from sv4d_ns.plugin.datamanager import is_grid
from sv4d_ns.plugin.estimate import Work, sv4d_work
from sv4d_ns.plugin.help import first_in_help
from sv4d_ns.plugin.model import SV4DModelConfig
from sv4d_ns.plugin.pipeline import SV4DPipelineConfig
from sv4d_ns.runs.layout import STAGE_2, checkpoint_steps, keep_stage, recorded_rounds, stage_folder
from sv4d_ns.utils.devices import choose_device
from sv4d_ns.utils.files import check_zip
from sv4d_ns.utils.progress import say

__all__ = ["AutoMachineConfig", "SV4DTrainer", "SV4DTrainerConfig"]  # older runs' config.yml names all three here

STEPS = 2400
"""Length of a run's schedule."""
STEPS_OF_BUNDLED = 2000
"""The same with the bundled model's views, which have less to tell (benchmarks/results/fit_steps.md)."""
REFINE_AT = 0.64
"""Share of the schedule after which stage 2 begins: every frame has just had its time in the growing window."""


@first_in_help(*FIRST_IN_HELP)
@dataclass
class SV4DTrainerConfig(FieldTrainerConfig):
    """`FieldTrainerConfig` of a run with stages."""

    _target: type = field(default_factory=lambda: SV4DTrainer)
    max_num_iterations: int = 0
    """Steps of the whole optimisation; 0 takes 2400, or 2000 where the bundled model makes the views, or as many as the
    run had that is continued."""

    def settle(self) -> None:
        """Choose the run's length, and who evaluates the hash grid, which decides what its table means: a run that goes
        on from another has that one's."""
        if self.max_num_iterations == 0:
            self.max_num_iterations = self._default_steps()
        model: Any = self.pipeline.model
        if model.encoding != "auto":
            return
        source = self.source_run()
        if source is not None:
            from sv4d_ns.runs.open import recorded_setting

            recorded = recorded_setting(source, "pipeline", "model", "encoding")
            model.encoding = "numba" if recorded in (None, "auto") else recorded
            return
        on_gpu = choose_device(self.chosen_device())[0] == "cuda"
        if on_gpu:
            from sv4d_ns.field.hash_grid import tinycudann_works

            on_gpu = tinycudann_works()
        model.encoding = "tinycudann" if on_gpu else "numba"

    def _default_steps(self) -> int:
        source = self.source_run()
        if source is not None:
            from sv4d_ns.runs.open import recorded_setting

            recorded = recorded_setting(source, "max_num_iterations")
            return recorded if isinstance(recorded, int) else STEPS
        datamanager: Any = self.pipeline.datamanager
        if datamanager.data is None or is_grid(datamanager.data):
            return STEPS
        from sv4d_ns.synthesis.choice import choose_model

        model, _ = choose_model(datamanager.synthesis, choose_device(self.chosen_device())[0])
        return STEPS_OF_BUNDLED if model == "bundled" else STEPS

    def stage_1(self) -> Path | None:
        """Where the end of stage 1 is shared with runs that differ in stage 2 only; None where nobody can share it.

        Raises:
            InputError: the data cannot be read any more.
        """
        key = self._fingerprint(STAGE_2)
        return None if key is None else stage_folder(self.get_base_dir(), key)

    def work(self, frames: int, views: int) -> Work:
        """Steps, and rounds of stage 2 between them."""
        pipeline: Any = self.pipeline
        return sv4d_work(self.max_num_iterations, frames, views, self.rounds(), len(pipeline.movies))

    def rounds(self) -> tuple[int, ...]:
        """Steps before which stage 2 refines the views."""
        pipeline: Any = self.pipeline
        return tuple(pipeline.refine_steps or ())

    def _spread_schedules(self) -> None:
        super()._spread_schedules()
        pipeline = self.pipeline
        assert isinstance(pipeline, SV4DPipelineConfig) and isinstance(pipeline.model, SV4DModelConfig)
        pipeline.model.schedule_steps = self.max_num_iterations
        if pipeline.refine_steps is None:
            source = self.source_run()
            earlier = None if source is None else recorded_rounds(source)
            pipeline.refine_steps = self._default_rounds() if earlier is None else earlier

    def _default_rounds(self) -> tuple[int, ...]:
        step = max(1, round(REFINE_AT * self.max_num_iterations))
        return (step,) if step < self.max_num_iterations else ()


class SV4DTrainer(FieldTrainer):
    """Trainer of a run with stages."""

    config: SV4DTrainerConfig

    def _resume_in_place(self) -> None:
        """Go on from the run's own newest checkpoint, or from a stage 1 another run has finished."""
        self._stage_1 = shared = self.config.stage_1()
        super()._resume_in_place()
        if self._continues() or shared is None:
            return
        first_round = min(self.config.rounds(), default=self.total_steps)
        usable = [step for step in checkpoint_steps(shared) if step < first_round]
        if not usable:
            return
        try:
            check_zip(shared / f"step-{usable[-1]:09d}.ckpt")
        except (ValueError, OSError) as error:
            say(f"The stage 1 kept in {shared} cannot be used ({error}); it is fitted again.")
            return
        self.config.load_dir, self.config.load_step = shared, usable[-1]
        say("Stage 1 is taken from a run that differs in stage 2 only.")

    def keep_stage_1(self, step: int) -> None:
        """Before stage 2: let runs with another stage 2 begin where stage 1 ended, after this step."""
        checkpoint = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        if self._stage_1 is not None and checkpoint.is_file():
            keep_stage(checkpoint, self._stage_1)
