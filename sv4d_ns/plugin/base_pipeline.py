"""What both methods' nerfstudio pipelines do: open a run, keep its grid of views, step safely, and make the results.

A method adds what it does before and after its steps (`step_callbacks`) and which grid a step is fitted to
(`grid_number`).
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

from sv4d_ns.plugin.base_model import FieldModel, FieldModelConfig
from sv4d_ns.plugin.datamanager import SV4DDataManager, SV4DDataManagerConfig
from sv4d_ns.plugin.quiet import silence_nerfstudio
from sv4d_ns.plugin.viewer import Playback, StartCamera
from sv4d_ns.runs.layout import MOVIE_FOLDER, SUMMARY_FILE, VIEW_FOLDERS, checkpoint_steps, read_checkpoint
from sv4d_ns.utils.devices import ensure_ffmpeg_on_path
from sv4d_ns.utils.errors import InputError, NotFiniteError, one_sentence_errors
from sv4d_ns.utils.progress import say, say_whole

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda.amp.grad_scaler import GradScaler

    from sv4d_ns.field.images import ResultSheet
    from sv4d_ns.plugin.honesty import Unseen
    from sv4d_ns.plugin.mesh_subject import MeshSubject


@dataclass
class FieldPipelineConfig(VanillaPipelineConfig):
    """A field, the views it is fitted to, and what is made of it in the end."""

    _target: type = field(default_factory=lambda: FieldPipeline)
    datamanager: DataManagerConfig = field(default_factory=SV4DDataManagerConfig)
    """The views and how their pixels are drawn."""
    model: ModelConfig = field(default_factory=FieldModelConfig)
    """The 4D field and how it is rendered."""
    movies: tuple[Literal["orbit", "time", "orbit-time", "side-by-side", "overlay"], ...] = (
        "orbit",
        "time",
        "orbit-time",
        "side-by-side",
        "overlay",
    )
    """Movies made at the end of the run, in its folder `movies`, of its mesh; no value after the flag makes none.
    `sv4d render` makes them of the field."""
    movie_size: int = 512
    """Pixels along the side of their pictures, even."""


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


class FieldPipeline(VanillaPipeline):
    """Wires the view grid and the field together."""

    config: FieldPipelineConfig
    datamanager: SV4DDataManager

    def __init__(
        self,
        config: FieldPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: "GradScaler | None" = None,
    ):
        silence_nerfstudio()
        assert isinstance(config.datamanager, SV4DDataManagerConfig)
        if config.model.prompt is not None:  # nerfstudio puts --prompt there
            config.datamanager.prompt = config.model.prompt
        if test_mode != "val":
            ensure_ffmpeg_on_path()
        with one_sentence_errors():
            super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)
            if test_mode != "val":
                self._check_checkpoint()
        from sv4d_ns.plugin.render_outputs import GridVisibility

        self.resumed_visibility: dict[int, Any] = {}
        """The sampler's visibility of views as it was when the checkpoint was saved that the run goes on from."""
        self.psnr = math.nan
        """Of the last training step's rays, dB."""
        self.steps_done = 0
        """Training steps behind the field as it is now."""
        self.start_camera = StartCamera()
        self.playback = Playback(self.field_model, lambda: self.datamanager.grid, lambda: self.steps_done)
        self.field_model.views = GridVisibility(lambda: self.datamanager.grid)
        self.datamanager.frame_window = self.field_model.frame_window
        self.datamanager.canonical_frame = self.field_model.canonical_frame
        self.field_model.clip_duration = self.datamanager.grid.num_frames / self.datamanager.grid.fps

    def _check_checkpoint(self) -> None:
        """nerfstudio's commands open the newest checkpoint without looking: look before they do.

        Raises:
            InputError: it is damaged, holds more than tensors, or belongs to another model.
        """
        folder = self.run_dir / "nerfstudio_models"
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
    def field_model(self) -> FieldModel:
        """The model, typed."""
        assert isinstance(self.model, FieldModel)
        return self.model

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """nerfstudio's; remembers which step it was."""
        super().load_pipeline(loaded_state, step)
        self.steps_done = step + 1

    def _step_done(self, step: int) -> None:
        self.steps_done = step + 1
        self.playback.say_step()

    def step_callbacks(self, trainer: Any) -> list[TrainingCallback]:
        """What the method does before and after its steps."""
        return []

    def grid_number(self, step: int) -> int:
        """Which of the run's grids (`VIEW_FOLDERS`) a step is fitted to."""
        return 0

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """The method's own, beside those of data manager and model; the results at the end."""
        trainer: Any = training_callback_attributes.trainer
        self.use_views_of_step(trainer._start_step)
        callbacks = super().get_training_callbacks(training_callback_attributes)
        begin = TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], func=trainer.begin_step)
        end = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=trainer.end_step)
        shown = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=self._step_done)
        finish = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], func=lambda step: self.finish(trainer))
        return [begin, *callbacks, *self.step_callbacks(trainer), shown, end, finish]

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """nerfstudio's; raises `NotFiniteError` before the loss can spoil the field."""
        outputs, loss_dict, metrics_dict = super().get_train_loss_dict(step)
        self.psnr = read_step(loss_dict, metrics_dict["psnr"], step)
        return outputs, loss_dict, metrics_dict

    def get_eval_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """How well the field fits other rays of the grid's views, rendered as in training."""
        import torch

        with torch.no_grad():
            rays, batch = self.datamanager.next_eval(step)
            outputs = self.model(rays)
            metrics = self.model.get_metrics_dict(outputs, batch)
            return outputs, self.model.get_loss_dict(outputs, batch, metrics), metrics

    def go_back(self, step: int) -> None:
        """Be as before `step`: its views, and other pixels than those that led to a loss that is not finite."""
        self.datamanager.retries += 1
        self.use_views_of_step(step)

    def use_views_of_step(self, step: int) -> None:
        """After a resume: the grid the field was being fitted to at that step."""
        occupied = self.field_model.occupancy.occupied.clone()
        self.use_saved_views(self.grid_number(step))
        if step > 0:  # carving opens the whole hull; where the field was found empty is in the checkpoint
            self.field_model.occupancy.occupied.copy_(occupied)
        for frame, maps in self.resumed_visibility.items():
            self.datamanager.batch_sampler().use_visibility(frame, maps.to(self.device))

    def use_saved_views(self, number: int) -> None:
        """Fit to the run's grid of that number from now on."""
        from sv4d_ns.views.grid import ViewGrid

        folder = self.run_dir / VIEW_FOLDERS[number]
        self.datamanager.use_grid(ViewGrid.load(folder), folder)
        self.field_model.carve(self.datamanager.grid)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        assert self.datamanager.config.run_dir is not None
        return self.datamanager.config.run_dir

    def finish(self, trainer: Any) -> None:
        """Write what of contact sheet, movies and summary is not there yet, and print what to do next."""
        from sv4d_ns.export.command import installed_command
        from sv4d_ns.plugin.honesty import Unseen
        from sv4d_ns.utils.threads import torch_threads

        self.eval()
        self.playback.finished()
        trainer.bar.close()
        with torch_threads(1):  # as an export does
            summary = self._results(trainer.total_steps)
        say(
            f"What the camera saw is repeated with PSNR {summary['input_view_psnr']:.1f} dB and silhouette IoU "
            f"{summary['input_view_iou']:.3f}."
        )
        for sentence in Unseen(**summary["unseen"]).sentences(on_cuda=self.device.type == "cuda"):
            say(sentence)
        say(f"Contact sheet: {self.run_dir / 'contact_sheet.png'}")
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
        with atomic_path(self.run_dir / SUMMARY_FILE) as path:
            path.write_text(json.dumps(made, indent=2))
        return made

    def _finished_summary(self, identity: str) -> dict[str, Any] | None:
        """The figures of this very field, if they and the contact sheet were made before."""
        try:
            summary = json.loads((self.run_dir / SUMMARY_FILE).read_text())
            same = summary["field"] == identity and {"input_view_psnr", "input_view_iou", "unseen"} <= set(summary)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return summary if same and (self.run_dir / "contact_sheet.png").is_file() else None

    def _make_sheet(self) -> dict[str, Any]:
        """Write the contact sheet; returns its figures."""
        from sv4d_ns.field.images import result_sheet
        from sv4d_ns.utils.files import atomic_path
        from sv4d_ns.utils.progress import bar

        with bar("Rendering the contact sheet") as progress:
            sheet = result_sheet(self.field_model.field, self.field_model.occupancy, self.datamanager.grid, progress)
        with atomic_path(self.run_dir / "contact_sheet.png") as path:
            sheet.picture.save(path, format="PNG")
        return sheet.figures | {"unseen": asdict(self._what_is_unseen(sheet))}

    def _what_is_unseen(self, sheet: "ResultSheet") -> "Unseen":
        from sv4d_ns.plugin.honesty import unseen
        from sv4d_ns.utils.images import resize_rgba
        from sv4d_ns.views.grid import ViewGrid

        # those of stage 1: stage 2's were made from renders of the field and agree with it by their making
        first = ViewGrid.load(self.run_dir / VIEW_FOLDERS[0])
        generated = first.novel_views[sheet.frames][:, [view - 1 for view in sheet.views]]
        generated = resize_rgba(generated, sheet.novel_alpha.shape[-1])[..., 3]
        model = self.field_model
        return unseen(model.field, model.occupancy, first, sheet.novel_alpha, generated)

    def _subject(self) -> "MeshSubject":
        from sv4d_ns.plugin.mesh_subject import MeshSubject

        model = self.field_model
        time = model.canonical_frame / max(model.num_frames - 1, 1)
        return MeshSubject(model.field, model.occupancy, self.datamanager.grid, time)

    def _make_movies(self) -> None:
        """Write the movies of the run that are not there yet, and say where they are."""
        if not self.config.movies:
            return
        from sv4d_ns.movies.movies import MovieOptions, planned_movies, write_movies
        from sv4d_ns.utils.progress import bar

        folder, subject = self.run_dir / MOVIE_FOLDER, self._subject()
        options = MovieOptions(size=self.config.movie_size)
        with one_sentence_errors():
            plan = planned_movies(folder, subject, self.config.movies, options)
            if plan.wanted:
                self._prepare(subject)
                with bar("Rendering the movies") as progress:
                    write_movies(plan, options.size, progress)
        for sentence in plan.sentences:
            say(sentence)
        say(f"Movies: {folder} ({', '.join(file.name for file in plan.files)})")

    def _prepare(self, subject: "MeshSubject") -> None:
        from sv4d_ns.utils.progress import bar

        try:
            with bar("Making the mesh that the movies show") as progress:
                subject.prepare(progress)
        except InputError as error:
            say(f"The movies show the field: {error}")


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
