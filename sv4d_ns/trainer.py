"""nerfstudio's trainer with the manners of a long job: checks first, whole checkpoints, resume, next commands."""

import shlex
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE

from sv4d_ns.datamanager import SV4DDataManagerConfig
from sv4d_ns.devices import DeviceChoice, choose_device
from sv4d_ns.errors import InputError, one_sentence_errors
from sv4d_ns.progress import TrainingBar
from sv4d_ns.runs import VIEW_FOLDERS, checkpoint_steps


@dataclass
class SV4DTrainerConfig(TrainerConfig):
    """`TrainerConfig` whose schedule has a fixed length and whose run knows its own folder."""

    _target: type = field(default_factory=lambda: SV4DTrainer)
    device: DeviceChoice = "auto"
    """Where to run: auto takes CUDA when there is one. The choice is printed."""

    def set_experiment_name(self) -> None:
        """Name the experiment after the video (nerfstudio would take the folder it lies in)."""
        data = self.pipeline.datamanager.data
        if self.experiment_name is None and data is not None:
            self.experiment_name = data.stem
        elif self.experiment_name is None and self.load_dir is not None:
            # <output>/<experiment>/<method>/<timestamp>/nerfstudio_models
            self.experiment_name = self.load_dir.resolve().parents[2].name
        super().set_experiment_name()

    def save_config(self) -> None:
        """Check everything the user gave, then write config.yml: nerfstudio calls this before it starts a run."""
        with one_sentence_errors():
            self.machine.device_type, sentence = choose_device(self.device)
            CONSOLE.print(sentence)
            self._check_resume()
            datamanager = self.pipeline.datamanager
            assert isinstance(datamanager, SV4DDataManagerConfig)
            datamanager.run_dir = self.get_base_dir()
            datamanager.expected_steps = self.max_num_iterations
            if not self._has_views():
                datamanager.check_data()
            self._check_output()
        super().save_config()

    def _check_resume(self) -> None:
        if self.load_dir is not None and not checkpoint_steps(self.load_dir):
            raise InputError(
                f"--load-dir {self.load_dir} holds no checkpoint (step-*.ckpt): give the nerfstudio_models folder of "
                "a run; a run stopped before its first checkpoint is continued by the same command without --load-dir, "
                "and its finished views are used again."
            )
        if self.load_dir is not None and self.load_step is not None:
            steps = checkpoint_steps(self.load_dir)
            if self.load_step not in steps:
                have = ", ".join(map(str, steps))
                raise InputError(f"--load-step {self.load_step} is not in {self.load_dir}: it holds step {have}.")
        if self.load_checkpoint is not None and not self.load_checkpoint.is_file():
            raise InputError(f"--load-checkpoint {self.load_checkpoint} does not exist: give the path of a .ckpt file.")

    def source_run(self) -> Path | None:
        """The folder of the run to continue from, if another one."""
        if self.load_dir is not None:
            return self.load_dir.resolve().parent
        if self.load_checkpoint is not None:
            return self.load_checkpoint.resolve().parent.parent
        return None

    def _has_views(self) -> bool:
        source = self.source_run()
        folders = [self.get_base_dir()] + ([source] if source is not None else [])
        return any((folder / VIEW_FOLDERS[0]).is_dir() for folder in folders)

    def _check_output(self) -> None:
        base_dir = self.get_base_dir()
        try:
            base_dir.mkdir(parents=True, exist_ok=True)
            probe = base_dir / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"--output-dir {self.output_dir} cannot be written ({error.strerror}): choose a folder you "
                "may write to."
            ) from error


class SV4DTrainer(Trainer):
    """Trainer of a run with stages; `max_num_iterations` is the length of the whole schedule, also after a resume."""

    config: SV4DTrainerConfig

    def __init__(self, config: SV4DTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        super().__init__(config, local_rank, world_size)
        self.bar = TrainingBar()
        self.total_steps = config.max_num_iterations

    def show_progress(self, step: int) -> None:
        """Advance the training bar."""
        self.bar.update("Fitting the 4D field", step + 1, self.total_steps, f"{self._psnr:.1f} dB")

    def train_iteration(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """nerfstudio's iteration; its PSNR is shown in the bar."""
        loss, loss_dict, metrics_dict = super().train_iteration(step)
        self._psnr = float(metrics_dict["psnr"].detach())
        return loss, loss_dict, metrics_dict

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Set up as nerfstudio does, continuing this run (or the one of --load-dir) where it stopped."""
        # the deformation takes no step in the static phase, but its schedule runs
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        with one_sentence_errors():
            self._adopt_views()
            self._resume_in_place()
            super().setup(test_mode)

    def _adopt_views(self) -> None:
        """Copy the view grids of the run we continue, so that every run folder is complete."""
        source = self.config.source_run()
        if source is None or source == self.base_dir.resolve():
            return
        for name in VIEW_FOLDERS:
            if (source / name).is_dir() and not (self.base_dir / name).exists():
                partial = self.base_dir / f".{name}-partial"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source / name, partial)
                partial.rename(self.base_dir / name)

    def _resume_in_place(self) -> None:
        """`--load-config RUN/config.yml` names the run itself: go on from its newest checkpoint."""
        fresh = self.config.load_dir is None and self.config.load_checkpoint is None
        if fresh and checkpoint_steps(self.checkpoint_dir):
            self.config.load_dir = self.checkpoint_dir

    def train(self) -> None:
        """Run what is left of the schedule; an interrupt saves a checkpoint and says how to go on."""
        total = self.total_steps
        remaining = total - self._start_step
        pipeline: Any = self.pipeline
        if remaining <= 0:
            # super().train() would write a checkpoint of step 0 over the finished one
            CONSOLE.print(f"Step {self._start_step} of {total}: nothing left; --max-num-iterations sets a longer run.")
            pipeline.finish(self)
            return
        self.config.max_num_iterations = remaining
        try:
            with one_sentence_errors():
                super().train()
        except KeyboardInterrupt:
            self.bar.close()
            if self.step > self._start_step:
                self.save_checkpoint(self.step)
            config_file = shlex.quote(str(self.base_dir / "config.yml"))
            CONSOLE.print(
                f"Stopped at step {self.step} of {total}. Go on with:\n  ns-train sv4d --load-config {config_file}"
            )
            raise SystemExit(130) from None
        finally:
            self.config.max_num_iterations = total

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Save the whole training state atomically: a kill leaves the previous checkpoint, never half a file.

        nerfstudio reads the numbers of *all* files in the checkpoint folder, so the temporary file lies beside it.
        """
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        partial = self.base_dir / "checkpoint.partial"
        state = {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(path)
        if self.config.save_only_latest_checkpoint:
            for other in self.checkpoint_dir.glob("step-*.ckpt"):
                if other != path:
                    other.unlink()
