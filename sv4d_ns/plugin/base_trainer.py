"""nerfstudio's trainer with the manners of a long job, of both methods: checks first, whole checkpoints, resume, next
commands."""

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread

from sv4d_ns.fitting.settings import DEFAULT_FRAMES
from sv4d_ns.plugin.bar_writer import show_behind
from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig
from sv4d_ns.plugin.estimate import Remaining, Work, time_sentence
from sv4d_ns.plugin.nerfstudio_commands import expect_unreadable_configs, opening, prepare
from sv4d_ns.plugin.optimizers import DecaySchedulerConfig
from sv4d_ns.plugin.quiet import silence_nerfstudio
from sv4d_ns.plugin.validation import check_settings
from sv4d_ns.plugin.viewer import local_unless_asked
from sv4d_ns.runs.layout import (
    PARTIAL_CHECKPOINT,
    SUMMARY_FILE,
    VIEW_FOLDERS,
    checkpoint_steps,
    claim_run,
    fingerprint,
    free_name,
    read_checkpoint,
    record_run,
)
from sv4d_ns.runs.safe_config import open_paths_of_other_systems
from sv4d_ns.utils.devices import DeviceChoice, choose_device
from sv4d_ns.utils.errors import InputError, NotFiniteError, interrupts_handled_by, leave, one_sentence_errors
from sv4d_ns.utils.files import TEMPORARY
from sv4d_ns.utils.progress import TrainingBar, say
from sv4d_ns.utils.threads import at_most, torch_threads, useful_threads
from sv4d_ns.video.sources import local_path, source_name

if TYPE_CHECKING:
    from sv4d_ns.video import ObjectVideo

# nerfstudio imports this file before it reads any config.yml
open_paths_of_other_systems()
expect_unreadable_configs()

LOOK_EVERY = 50
"""Steps after which a run looks again whether other programs keep cores busy."""
DEFAULT_VIEWS = 8
"""Novel views of every model's own ring, for the estimate of a run's time."""

FIRST_IN_HELP = (
    *("data", "output_dir", "max_num_iterations", "device", "vis", "load_config", "timestamp", "show_config"),
    "pipeline",
)


@dataclass
class AutoMachineConfig(MachineConfig):
    """nerfstudio's, whose device may be left to --device."""

    device_type: Literal["auto", "cpu", "cuda"] = "auto"  # type: ignore[assignment]
    """The same as --device."""


@dataclass
class FieldTrainerConfig(TrainerConfig):
    """`TrainerConfig` whose schedule has a fixed length and whose run knows its own folder."""

    data: Path | None = None
    """The video (mp4, mov, webm, gif, ...), a folder of images, or a folder holding a view grid (grid.json)."""
    device: DeviceChoice = "auto"
    """Where to run: auto takes CUDA when there is one. The choice is printed."""
    machine: MachineConfig = field(default_factory=AutoMachineConfig)
    """Machine configuration."""
    show_config: bool = False
    """Print every setting before the run begins. They are in config.yml in the run's folder, too."""

    def __post_init__(self) -> None:
        """Take --data for what it stands for; nerfstudio would say so in a line of its own."""
        if self.data is not None:
            self.pipeline.datamanager.data, self.data = self.data, None

    def __setattr__(self, name: str, value: Any) -> None:
        """`ns-viewer` puts its own viewer settings in the place of the run's; it too is to be local unless asked."""
        if name == "viewer" and "viewer" in vars(self):
            value = local_unless_asked(value)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read from a config.yml: the run may have been moved, and the command may ask what cannot be done."""
        self.__dict__.update(state)
        opened = opening()
        if opened is not None:
            with one_sentence_errors():
                prepare(self, opened)

    def __getstate__(self) -> dict[str, Any]:
        """Without where the run happens to lie on this machine, and how this command came to its name."""
        return {name: value for name, value in vars(self).items() if name not in ("_moved_to", "_named_here")}

    def move_to(self, folder: Path) -> None:
        """Say where the run lies, where that is not what output folder and names make of it."""
        if folder != self.get_base_dir().absolute():
            self.__dict__["_moved_to"] = folder
        self.pipeline.datamanager.run_dir = folder  # type: ignore[attr-defined]

    def get_base_dir(self) -> Path:
        """The run's folder."""
        moved_to: Path | None = vars(self).get("_moved_to")
        return super().get_base_dir() if moved_to is None else moved_to

    def set_experiment_name(self) -> None:
        """Name the experiment after the video (nerfstudio would take the folder it lies in)."""
        datamanager = self.pipeline.datamanager
        with one_sentence_errors():
            if datamanager.data is not None:
                datamanager.data = local_path(datamanager.data)
        if self.experiment_name is None and datamanager.data is not None:
            self.experiment_name = source_name(datamanager.data)
        elif self.experiment_name is None and self.load_dir is not None:
            # <output>/<experiment>/<method>/<timestamp>/nerfstudio_models
            self.experiment_name = self.load_dir.resolve().parents[2].name
        super().set_experiment_name()

    def set_timestamp(self) -> None:
        """Find the run this command is about: one it made before, or a new one named after the time."""
        silence_nerfstudio()
        new = self.timestamp == "{timestamp}"
        with one_sentence_errors():
            self.settle()
        super().set_timestamp()
        if not new:
            return
        with one_sentence_errors():
            check_settings(self)
            name, sentence = claim_run(self.get_base_dir().parent, self.timestamp, self._fingerprint())
        self.timestamp = name
        self.__dict__["_named_here"] = True
        if sentence:
            say(sentence)

    def settle(self) -> None:
        """Choose what was left open and decides the result, before the run is given its name: it is written into
        config.yml, for another machine must build the same field."""

    def print_to_terminal(self) -> None:
        """Print every setting, if that was asked for."""
        if self.show_config:
            super().print_to_terminal()

    def chosen_device(self) -> DeviceChoice:
        """What was asked for by --device, or by nerfstudio's own flag for it.

        Raises:
            InputError: the two contradict each other.
        """
        machine = self.machine
        asked = machine.device_type if isinstance(machine, AutoMachineConfig) else "auto"
        if "auto" not in (asked, self.device) and asked != self.device:
            raise InputError(
                f"--device {self.device} contradicts --machine.device-type {asked}: leave out one of them."
            )
        return self.device if asked == "auto" else asked

    def _fingerprint(self, without: frozenset[str] = frozenset()) -> str | None:
        """What decides the result of the run; None where it continues another one or has no data (an error later)."""
        datamanager = self.pipeline.datamanager
        assert isinstance(datamanager, SV4DDataManagerConfig)
        if self.source_run() is not None or datamanager.data is None:
            return None
        self._spread_schedules()  # a config that is read back has them spread already
        device, _ = choose_device(self.chosen_device())
        settings = [
            self.method_name,
            self.pipeline,
            self.optimizers,
            self.max_num_iterations,
            self.machine.seed,
            device,
            self.mixed_precision,
        ]
        try:
            return fingerprint(settings, datamanager.data, datamanager.masks, without=without)
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from error

    def save_config(self) -> None:
        """Check everything the user gave, then write config.yml: nerfstudio calls this before it starts a run."""
        with one_sentence_errors():
            check_settings(self)
            self.settle()
            device, sentence = choose_device(self.chosen_device())
            identity = self._fingerprint()  # before the run fills in its own settings
            self._check_resume()
            datamanager = self.pipeline.datamanager
            assert isinstance(datamanager, SV4DDataManagerConfig)
            self._spread_schedules()  # also where a run is continued
            video = None if self._has_views() else datamanager.check_data()
            self._make_folder(identity)
            datamanager.run_dir = self.get_base_dir()
            super().save_config()
            # not written down: another machine goes on with what it has
            self.machine.device_type = device  # type: ignore[assignment]
            self._announce(sentence, video)

    def _announce(self, device: str, video: "ObjectVideo | None") -> None:
        """What a user wants to know first: where it runs, with what, of what, for how long, and where to."""
        datamanager = self.pipeline.datamanager
        assert isinstance(datamanager, SV4DDataManagerConfig)
        say(device)
        if video is None:
            say("Views: those made before are used." if self._has_views() else f"Views: those in {datamanager.data}.")
        else:
            say(f"Model: {datamanager.model_sentences(self.machine.device_type)}")
            say(f"Object: {len(video.frames)} frames at {video.fps:g} per second. {' '.join(video.messages)}")
        frames = DEFAULT_FRAMES if video is None else len(video.frames)
        known = self.machine.device_type == "cpu" and datamanager.synthesis != "fourdm"
        if self.steps_done() < self.max_num_iterations:
            say(f"Time: {time_sentence(self._seconds_left(frames) if known else None)}")
        say(f"Run: {self.get_base_dir()} (every setting is in its config.yml)")
        for finding in () if video is None else video.findings:
            say(f"Note: {finding.sentence}")

    def _seconds_left(self, frames: int) -> float:
        """What the run takes from now on, on the reference machine: of one that goes on, what is not done yet."""
        work = self.work(frames, DEFAULT_VIEWS)
        return work.start + (0 if self._has_views() else work.views) + work.after(self.steps_done())

    def steps_done(self) -> int:
        """By the checkpoint that is gone on from, of this run or another one.

        Raises:
            InputError: it has another name than nerfstudio gives, and cannot be read.
        """
        if self.resumes_itself() or (self.load_dir is None and self.load_checkpoint is None):
            return max(checkpoint_steps(self.get_checkpoint_dir()), default=-1) + 1
        if self.load_dir is not None:
            return (checkpoint_steps(self.load_dir)[-1] if self.load_step is None else self.load_step) + 1
        assert self.load_checkpoint is not None
        named = re.search(r"step-(\d+)", self.load_checkpoint.name)
        return int(named[1] if named else read_checkpoint(self.load_checkpoint)["step"]) + 1

    def work(self, frames: int, views: int) -> Work:
        """What the run consists of, for the estimate of its time."""
        raise NotImplementedError

    def _spread_schedules(self) -> None:
        """Every schedule of the field is in shares of the run's length: tell them how long it is."""
        for group in self.optimizers.values():
            if isinstance(group.get("scheduler"), DecaySchedulerConfig):
                group["scheduler"].max_steps = self.max_num_iterations

    def is_found_again(self) -> bool:
        """Whether the same command goes on with this run: one that continues another run makes a new one each time,
        unless the user names it."""
        return self.source_run() is None or "_named_here" not in vars(self)

    def resumes_itself(self) -> bool:
        """Whether the run goes on from its newest checkpoint, also where it once began from another run's: that one is
        still named by its config.yml. A checkpoint of its own can be asked for by name."""
        own = self.source_run() == self.get_base_dir().resolve()
        return not own and bool(checkpoint_steps(self.get_checkpoint_dir()))

    def _check_resume(self) -> None:
        if self.resumes_itself():
            return
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

    def rounds(self) -> tuple[int, ...]:
        """Steps before which the views are made anew."""
        return ()

    def _has_views(self) -> bool:
        source = self.source_run()
        folders = [self.get_base_dir()] + ([source] if source is not None else [])
        return any((folder / VIEW_FOLDERS[0]).is_dir() for folder in folders)

    def _make_folder(self, identity: str | None) -> None:
        try:
            while True:
                try:
                    return record_run(self.get_base_dir(), identity, self.rounds())
                except RuntimeError:
                    if "_named_here" not in vars(self):
                        raise
                    # another command of the same second was quicker
                    self.timestamp = free_name(self.get_base_dir().parent, self.timestamp)
        except OSError as error:
            raise InputError(
                f"--output-dir {self.output_dir} cannot be written ({error.strerror}): choose a folder you "
                "may write to, on a disk with free space."
            ) from error
        except RuntimeError as error:
            raise InputError(
                f"{error}: wait for it, or start another run (--timestamp NAME, without --load-config)."
            ) from error


class FieldTrainer(Trainer):
    """Trainer of a run; `max_num_iterations` is the length of the whole schedule, also after a resume."""

    config: FieldTrainerConfig

    def __init__(self, config: FieldTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        super().__init__(config, local_rank, world_size)
        self.bar = TrainingBar()
        self.remaining: Remaining | None = None
        """The time that is left; None until training begins."""
        self.total_steps = config.max_num_iterations
        self._last_step: int | None = None
        self._in_step = False
        self._interrupted = False
        self._threads = ExitStack()
        self._useful: int | None = None
        """Threads that a step may use, as the machine last had them free."""
        self._is_found_again = True

    def train_iteration(self, step: int) -> Any:
        """nerfstudio's; what it returns is only written down, and writers warn of values that ask for gradients."""
        loss, losses, metrics = super().train_iteration(step)
        return loss.detach(), *({name: _detached(x) for name, x in each.items()} for each in (losses, metrics))

    def begin_step(self, step: int) -> None:
        """The first thing done in a step: an interrupt waits for the step's end, for half a step cannot be repeated."""
        self._in_step = True
        self._threads.close()  # of a step that was not finished
        of_torch = self.threads_of(step)  # which may look by itself, at all threads
        if step % LOOK_EVERY == 0 or self._useful is None:
            self._useful = useful_threads()
        self._threads.enter_context(at_most(self._useful))
        self._threads.enter_context(torch_threads(of_torch))

    def end_step(self, step: int) -> None:
        """The last thing done in a step: advance the training bar, and stop here if Ctrl-C was pressed meanwhile."""
        left = None if self.remaining is None else self.remaining.after(step + 1)
        phase, run = (None, None) if left is None else left
        self.bar.update("Fitting the 4D field", step + 1, self.total_steps, f"{self._shown_psnr():.1f} dB", phase, run)
        self._last_step, self._in_step = step, False
        self._threads.close()
        if self._interrupted:
            raise KeyboardInterrupt

    def _shown_psnr(self) -> float:
        pipeline: Any = self.pipeline
        return float(pipeline.psnr)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside a step's callbacks: something long that may be interrupted and is done again from the beginning."""
        self._in_step = False
        if self._interrupted:
            raise KeyboardInterrupt
        with torch_threads(useful_threads()):
            yield
        self._in_step = True

    def threads_of(self, step: int) -> int:
        """A step is a thousand small operations: threads that meet after each of them cost more than they bring."""
        return 1

    def _interrupt(self) -> None:
        again, self._interrupted = self._interrupted, True
        if not again and not self._in_step:
            raise KeyboardInterrupt

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Set up as nerfstudio does, continuing this run (or the one of --load-dir) where it stopped."""
        with one_sentence_errors():
            torch.set_num_threads(useful_threads())
            self._is_found_again = self.config.is_found_again()
            self._adopt_views()
            self._resume_in_place()
            super().setup(test_mode)
            show_behind(self.bar)

    def _adopt_views(self) -> None:
        """Copy the view grids of the run we continue, so that every run folder is complete.

        Only those the checkpoint has behind it: a round of stage 2 that is still to come is this run's own.

        Raises:
            InputError: stage 2 is to lie behind the checkpoint, and the other run has no views of it.
        """
        source = self.config.source_run()
        if source is None or source == self.base_dir.resolve():
            return
        steps = self.config.steps_done()
        rounds = sum(step < steps for step in self.config.rounds())
        if rounds and not any((folder / VIEW_FOLDERS[rounds]).is_dir() for folder in (source, self.base_dir)):
            raise InputError(
                f"--pipeline.refine-steps {self.config.rounds()[rounds - 1]} lies before the checkpoint of {steps} "
                f"steps, and {source} has no {VIEW_FOLDERS[rounds]}: give steps from {steps} on."
            )
        for name in VIEW_FOLDERS[: rounds + 1]:
            if (source / name).is_dir() and not (self.base_dir / name).exists():
                partial = self.base_dir / f"{TEMPORARY}{name}"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source / name, partial)
                partial.rename(self.base_dir / name)

    def _resume_in_place(self) -> None:
        """Go on from the run's own newest checkpoint."""
        if self.config.resumes_itself():
            self.config.load_dir, self.config.load_step = self.checkpoint_dir, None

    def _continues(self) -> bool:
        return self.config.load_dir is not None or self.config.load_checkpoint is not None

    def train(self) -> None:
        """Run what is left of the schedule; an interrupt saves a checkpoint and says how to go on."""
        with one_sentence_errors():
            self._train()

    def _train(self) -> None:
        total = self.total_steps
        remaining = total - self._start_step
        pipeline: Any = self.pipeline
        if remaining <= 0:
            # super().train() would write a checkpoint of step 0 over the finished one
            say(f"Step {self._start_step} of {total}: nothing left; --max-num-iterations sets a longer run.")
            pipeline.finish(self)
            return
        grid = pipeline.datamanager.grid
        self.remaining = Remaining(self.config.work(grid.num_frames, grid.num_views))
        with interrupts_handled_by(self._interrupt):
            try:
                self._train_with_one_way_back(total)
            except KeyboardInterrupt:
                self._stop(total)
            finally:
                self._threads.close()
                self.config.max_num_iterations = total

    def _train_with_one_way_back(self, total: int) -> None:
        """nerfstudio's loop; a loss that is not finite sends it back to the newest checkpoint, once."""
        for last_try in (False, True):
            self.config.max_num_iterations = total - self._start_step
            try:
                return super().train()
            except NotFiniteError as error:
                self.bar.close()
                steps = checkpoint_steps(self.checkpoint_dir)
                if last_try or not steps:
                    again = "again " if last_try else ""
                    raise InputError(
                        f"The loss term '{error.term}' is {again}not a finite number at step {error.step}: lower the "
                        "learning rates (--optimizers...lr), or report the video; what was fitted before is kept."
                    ) from error
                say(
                    f"The loss term '{error.term}' is not a finite number at step {error.step}: going back to step "
                    f"{steps[-1]} and on with other pixels."
                )
                self._go_back(error)

    def _go_back(self, error: NotFiniteError) -> None:
        pipeline: Any = self.pipeline
        self.config.load_dir, self.config.load_step = self.checkpoint_dir, None
        self._load_checkpoint()
        pipeline.go_back(self._start_step)

    def _stop(self, total: int) -> NoReturn:
        """After an interrupt: save what was fitted, say how to go on, end. Further interrupts do not disturb it."""
        self.bar.close()
        if (self.base_dir / SUMMARY_FILE).is_file() and self.training_state == "completed":
            raise SystemExit(0)  # the viewer stays open after the end until Ctrl-C
        if self._last_step is not None and self._last_step not in checkpoint_steps(self.checkpoint_dir):
            say("Stopping; the state is being saved.")
            self.save_checkpoint(self._last_step)
        done = self._start_step if self._last_step is None else self._last_step + 1
        config_file = shlex.quote(str(self.base_dir / "config.yml"))
        how = "the same command, or:" if self._is_found_again else "this command (the same one makes a new run):"
        leave(
            f"Stopped after {done} of {total} steps. Go on with {how}\n"
            f"  ns-train {self.config.method_name} --load-config {config_file}"
        )

    def _load_checkpoint(self) -> None:
        """Load field, optimizers and schedules, reading plain tensors only.

        Raises:
            InputError: the file is damaged, holds more than tensors, or belongs to other settings.
        """
        path = self._checkpoint_to_load()
        if path is None:
            return
        state = read_checkpoint(path)
        pipeline: Any = self.pipeline
        try:
            self._start_step = state["step"] + 1
            pipeline.load_pipeline(state["pipeline"], state["step"])
            pipeline.resumed_visibility = state.get("visibility", {})
            self.optimizers.load_optimizers(state["optimizers"])
            if "schedulers" in state and self.config.load_scheduler:
                self.optimizers.load_schedulers(state["schedulers"])
            self.grad_scaler.load_state_dict(state["scalers"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            raise InputError(
                f"{path} belongs to other settings ({reason}): give the settings it was made with, or delete it and "
                "start again (the views are kept)."
            ) from error
        say(f"Continuing from {path}.")

    def _checkpoint_to_load(self) -> Path | None:
        folder, step = self.config.load_dir, self.config.load_step
        if folder is None:
            return self.config.load_checkpoint
        return folder / f"step-{checkpoint_steps(folder)[-1] if step is None else step:09d}.ckpt"

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Save the whole training state atomically: a kill leaves the previous checkpoint, never half a file.

        nerfstudio reads the numbers of *all* files in the checkpoint folder, so the temporary file lies beside it.
        """
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        partial = self.base_dir / PARTIAL_CHECKPOINT
        pipeline: Any = self.pipeline
        state = {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            "visibility": pipeline.datamanager.batch_sampler().visibility,
        }
        try:
            torch.save(state, partial)
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else "the disk is probably full"
            raise InputError(
                f"{path} cannot be written ({reason}): free some space on the disk "
                "and give the same command again; it goes on from the checkpoint before."
            ) from error
        if self.config.save_only_latest_checkpoint:
            for other in self.checkpoint_dir.glob("step-*.ckpt"):
                if other != path:
                    other.unlink()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
