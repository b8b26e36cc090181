"""The nerfstudio pipeline of a run: stage 1 fits the generated views, stage 2 refines the views from the field.

Stage 2 is SDEdit on the whole grid (our reading of SV4D 2.0's "2-stage refinement"; the paper's formula is not
public): the field is rendered at the model's own views and times, the renders are noised to a stated level and
denoised with the input video as condition, and the result replaces the targets. Renders of one field agree with each
other in 3D, so the refined views do so more than the generated ones.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nerfstudio.data.datamanagers.base_datamanager import DataManagerConfig
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import ModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

from sv4d_ns.plugin.datamanager import SV4DDataManager, SV4DDataManagerConfig
from sv4d_ns.plugin.help import first_in_help
from sv4d_ns.plugin.model import SV4DModel, SV4DModelConfig
from sv4d_ns.plugin.quiet import silence_nerfstudio
from sv4d_ns.plugin.viewer import Playback, StartCamera
from sv4d_ns.runs.layout import (
    MOVIE_FOLDER,
    SUMMARY_FILE,
    VIEW_FOLDERS,
    checkpoint_steps,
    read_checkpoint,
    windows_folder,
)
from sv4d_ns.utils.devices import ensure_ffmpeg_on_path
from sv4d_ns.utils.errors import InputError, NotFiniteError, one_sentence_errors
from sv4d_ns.utils.progress import say, say_whole

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda.amp.grad_scaler import GradScaler

    from sv4d_ns.field.images import ResultSheet
    from sv4d_ns.movies.movies import Subject
    from sv4d_ns.plugin.honesty import Unseen
    from sv4d_ns.plugin.trainer import SV4DTrainer
    from sv4d_ns.views.grid import ViewGrid


@first_in_help("datamanager", "refine_steps", "movies")
@dataclass
class SV4DPipelineConfig(VanillaPipelineConfig):
    """The two stages of the 4D optimisation."""

    _target: type = field(default_factory=lambda: SV4DPipeline)
    datamanager: DataManagerConfig = field(default_factory=SV4DDataManagerConfig)
    """The views and how their pixels are drawn."""
    model: ModelConfig = field(default_factory=SV4DModelConfig)
    """The 4D field, its losses and their schedule."""
    visibility_every: int = 10
    """Training steps between updates of the visibility weights, one frame each, once frames move; 0 weights generated
    views by their angle from the input alone."""
    refine_steps: tuple[int, ...] | None = None
    """Training steps at which stage 2 renders, noises and denoises all views; one round each, () for stage 1 alone.
    None is one round at 0.64 of --max-num-iterations (of the run that is continued, if it had one already)."""
    refine_strength: float | None = None
    """Noise level of stage 2 in (0, 1]: the share of the denoising schedule that is run again; None takes what suits
    the model (0.4 for the official one; the paper does not say)."""
    movies: tuple[Literal["orbit", "time", "orbit-time", "side-by-side", "overlay"], ...] = (
        "orbit",
        "time",
        "orbit-time",
        "side-by-side",
        "overlay",
    )
    """Movies made at the end of the run, in its folder `movies`; () for none. `sv4d render` makes larger ones."""
    movie_size: int = 192
    """Pixels along the side of their rendered pictures, even."""


def read_step(losses: "Mapping[str, Tensor]", psnr: "Tensor", step: int) -> float:
    """The PSNR of a step as a number, once all its losses are known to be finite.

    All is read in one go: a GPU's work goes on while nobody asks for results.

    Raises:
        NotFiniteError: naming the first loss that is not finite.
    """
    import torch

    finite = [loss.detach().isfinite().all() for loss in losses.values()]
    *flags, value = torch.stack([*finite, psnr.detach().to(finite[0].device)]).tolist()
    for term, flag in zip(losses, flags, strict=True):
        if not flag:
            raise NotFiniteError(term, step)
    return float(value)


class SV4DPipeline(VanillaPipeline):
    """Wires the view grid, the field and stage 2 together."""

    config: SV4DPipelineConfig
    datamanager: SV4DDataManager

    def __init__(
        self,
        config: SV4DPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: "GradScaler | None" = None,
    ):
        silence_nerfstudio()
        if test_mode != "val":
            ensure_ffmpeg_on_path()
        with one_sentence_errors():
            super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)
            if test_mode != "val":
                self._check_checkpoint()
        from sv4d_ns.plugin.render_outputs import GridWitnesses

        self.resumed_visibility: dict[int, Any] = {}
        """The sampler's visibility of views as it was when the checkpoint was saved that the run goes on from."""
        self.psnr = math.nan
        """Of the last training step's rays, dB."""
        self.start_camera = StartCamera()
        self.playback = Playback(self.sv4d_model, lambda: self.datamanager.grid)
        self.sv4d_model.views = GridWitnesses(lambda: self.datamanager.grid)
        self.datamanager.frame_window = self.sv4d_model.frame_window
        self.datamanager.canonical_frame = self.sv4d_model.canonical_frame
        self.sv4d_model.clip_duration = self.datamanager.grid.num_frames / self.datamanager.grid.fps

    def _check_checkpoint(self) -> None:
        """nerfstudio's commands open the newest checkpoint without looking: look before they do.

        Raises:
            InputError: it is damaged, holds more than tensors, or belongs to another model.
        """
        folder = self._run_dir / "nerfstudio_models"
        for step in checkpoint_steps(folder)[-1:]:
            path = folder / f"step-{step:09d}.ckpt"
            state = read_checkpoint(path)
            try:
                self.load_pipeline(state["pipeline"], step)
            except (RuntimeError, AttributeError, TypeError) as error:
                raise InputError(
                    f"{path} does not fit the run's config.yml ({str(error).splitlines()[0][:120]}): give the config "
                    "it was made with."
                ) from error

    @property
    def sv4d_model(self) -> SV4DModel:
        """The model, typed."""
        assert isinstance(self.model, SV4DModel)
        return self.model

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Stage 2 at its steps and the results at the end, beside the callbacks of data manager and model."""
        trainer: Any = training_callback_attributes.trainer
        self._use_views_of_step(trainer._start_step)
        canonical, frames = self.sv4d_model.canonical_frame, self.sv4d_model.num_frames
        say(f"Canonical frame: {canonical + 1} of {frames}, where the object shows most of itself.")
        callbacks = super().get_training_callbacks(training_callback_attributes)
        saves: list[TrainingCallback] = []
        for number, step in enumerate(self.config.refine_steps or (), start=1):
            # before anything of the next step is done: a kill during the refinement then resumes with the same field
            save = TrainingCallback(
                where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
                func=lambda step: trainer.save_checkpoint(step),
                iters=(step - 1,),
            )
            refine = TrainingCallback(
                where_to_run=[TrainingCallbackLocation.BEFORE_TRAIN_ITERATION],
                func=self._refine_views,
                iters=(step,),
                args=[trainer, number],
            )
            saves.append(save)
            callbacks.append(refine)
        begin = TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], func=trainer.begin_step)
        end = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=trainer.end_step)
        if self.config.visibility_every > 0:
            weigh = TrainingCallback(
                [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION],
                func=self._update_visibility,
                update_every_num_iters=self.config.visibility_every,
            )
            callbacks.append(weigh)
        finish = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], func=lambda step: self.finish(trainer))
        return [begin, *callbacks, *saves, end, finish]

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """nerfstudio's; raises `NotFiniteError` before the loss can spoil the field."""
        outputs, loss_dict, metrics_dict = super().get_train_loss_dict(step)
        self.psnr = read_step(loss_dict, metrics_dict["psnr"], step)
        return outputs, loss_dict, metrics_dict

    def go_back(self, step: int) -> None:
        """Be as before `step`: its views, and other pixels than those that led to a loss that is not finite."""
        self.datamanager.retries += 1
        self._use_views_of_step(step)

    def _update_visibility(self, step: int) -> None:
        window = self.sv4d_model.frame_window(step)
        if len(window) == 1:
            return  # the static phase: the surface is still being found
        frame = window.first + step // self.config.visibility_every % len(window)
        self.datamanager.batch_sampler().update_visibility(self.sv4d_model.field, self.sv4d_model.occupancy, frame)

    def _use_views_of_step(self, step: int) -> None:
        """After a resume: the grid the field was being fitted to at that step."""
        occupied = self.sv4d_model.occupancy.occupied.clone()
        self._use_saved_views(self._refinements_before(step))
        if step > 0:  # carving opens the whole hull; where the field was found empty is in the checkpoint
            self.sv4d_model.occupancy.occupied.copy_(occupied)
        for frame, maps in self.resumed_visibility.items():
            self.datamanager.batch_sampler().use_visibility(frame, maps.to(self.device))

    def _refinements_before(self, step: int) -> int:
        return sum(step > refine_step for refine_step in self.config.refine_steps or ())

    def _use_saved_views(self, number: int) -> None:
        from sv4d_ns.views.grid import ViewGrid

        folder = self._run_dir / VIEW_FOLDERS[number]
        self.datamanager.use_grid(ViewGrid.load(folder), folder)
        self.sv4d_model.carve(self.datamanager.grid)

    @property
    def _run_dir(self) -> Path:
        assert self.datamanager.config.run_dir is not None
        return self.datamanager.config.run_dir

    def _refine_views(self, trainer: "SV4DTrainer", number: int, step: int) -> None:
        """Round `number` of stage 2, before training step `step`."""
        with one_sentence_errors():
            folder = self._run_dir / VIEW_FOLDERS[number]
            trainer.bar.close()
            if not folder.is_dir():
                if number == 1:
                    trainer.keep_stage_1(step - 1)
                with trainer.between_steps():
                    self._make_refined_views(number).save(folder)
            self._use_saved_views(number)

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
            renders = render_grid(self.sv4d_model.field, self.sv4d_model.occupancy, grid, size, progress)
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
                store=windows_folder(self._run_dir, key),
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

    def finish(self, trainer: "SV4DTrainer") -> None:
        """Write what of contact sheet, movies and summary is not there yet, and print what to do next."""
        from sv4d_ns.export.command import installed_command
        from sv4d_ns.plugin.honesty import Unseen
        from sv4d_ns.utils.threads import torch_threads, useful_threads

        self.eval()
        trainer.bar.close()
        with torch_threads(useful_threads()):
            summary = self._results(trainer.total_steps)
        say(
            f"What the camera saw is repeated with PSNR {summary['input_view_psnr']:.1f} dB and silhouette IoU "
            f"{summary['input_view_iou']:.3f}."
        )
        for sentence in Unseen(**summary["unseen"]).sentences(on_cuda=self.device.type == "cuda"):
            say(sentence)
        say(f"Contact sheet: {self._run_dir / 'contact_sheet.png'}")
        say("Finished. Next:")
        for command in next_commands(trainer.base_dir, trainer.config.experiment_name, installed_command()):
            say_whole(f"  {command}")

    def _results(self, steps: int) -> dict[str, Any]:
        """Contact sheet, movies and summary, made where they are not there yet; returns the summary."""
        from sv4d_ns.utils.files import atomic_path

        identity = self._subject().identity()
        summary = self._finished_summary(identity)
        if summary is not None:
            self._make_movies()
            return summary
        made = {"steps": steps, **self._make_sheet(), "field": identity}
        self._make_movies()
        with atomic_path(self._run_dir / SUMMARY_FILE) as path:
            path.write_text(json.dumps(made, indent=2))
        return made

    def _finished_summary(self, identity: str) -> dict[str, Any] | None:
        """The figures of this very field, if they and the contact sheet were made before."""
        try:
            summary = json.loads((self._run_dir / SUMMARY_FILE).read_text())
            same = summary["field"] == identity and {"input_view_psnr", "input_view_iou", "unseen"} <= set(summary)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return summary if same and (self._run_dir / "contact_sheet.png").is_file() else None

    def _make_sheet(self) -> dict[str, Any]:
        """Write the contact sheet; returns its figures."""
        from sv4d_ns.field.images import result_sheet
        from sv4d_ns.utils.files import atomic_path
        from sv4d_ns.utils.progress import bar

        with bar("Rendering the contact sheet") as progress:
            sheet = result_sheet(self.sv4d_model.field, self.sv4d_model.occupancy, self.datamanager.grid, progress)
        with atomic_path(self._run_dir / "contact_sheet.png") as path:
            sheet.picture.save(path, format="PNG")
        return sheet.figures | {"unseen": asdict(self._what_is_unseen(sheet))}

    def _what_is_unseen(self, sheet: "ResultSheet") -> "Unseen":
        from sv4d_ns.plugin.honesty import unseen
        from sv4d_ns.utils.images import resize_rgba
        from sv4d_ns.views.grid import ViewGrid

        # those of stage 1: stage 2's were made from renders of the field and agree with it by their making
        first = ViewGrid.load(self._run_dir / VIEW_FOLDERS[0])
        generated = first.novel_views[sheet.frames][:, [view - 1 for view in sheet.views]]
        generated = resize_rgba(generated, sheet.novel_alpha.shape[-1])[..., 3]
        model = self.sv4d_model
        return unseen(model.field, model.occupancy, first, sheet.novel_alpha, generated)

    def _subject(self) -> "Subject":
        from sv4d_ns.movies.movies import Subject

        model = self.sv4d_model
        time = model.canonical_frame / max(model.num_frames - 1, 1)
        return Subject(model.field, model.occupancy, self.datamanager.grid, time)

    def _make_movies(self) -> None:
        """Write the movies of the run that are not there yet, and say where they are."""
        if not self.config.movies:
            return
        from sv4d_ns.movies.movies import MovieOptions, write_run_movies
        from sv4d_ns.utils.progress import bar

        folder, subject = self._run_dir / MOVIE_FOLDER, self._subject()
        options = MovieOptions(size=self.config.movie_size)
        with one_sentence_errors(), bar("Rendering the movies") as progress:
            files, sentences = write_run_movies(folder, subject, self.config.movies, options, progress)
        for sentence in sentences:
            say(sentence)
        say(f"Movies: {folder} ({', '.join(file.name for file in files)})")


def next_commands(run: Path, name: str | None, export: str) -> list[str]:
    """What can be done with a finished run, as commands that can be pasted into a shell whatever the paths hold.

    Args:
        run: the run's folder.
        name: of the files that are to be made.
        export: the command that reaches the exporters.
    """
    paths = (run / "config.yml", f"renders/{name}.mp4", f"exports/{name}")
    config, movie, folder = (shlex.quote(str(path)) for path in paths)
    return [
        f"ns-viewer --load-config {config}",
        f"ns-render interpolate --load-config {config} --output-path {movie}",
        f"{export} mesh --load-config {config} --output-dir {folder}",
    ]
