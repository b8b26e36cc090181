"""The nerfstudio data manager of a run: a video goes in, a view grid comes out, rays of its pixels train the field.

Only in training ("val" mode) may views be generated. Evaluation, rendering, viewing and export read the grid the run
keeps on disk, so they never need the diffusion model.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import DataManager, VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader, RandIndicesEvalDataloader

from sv4d_ns.fitting.settings import INPUT_SIZE, frames_taken
from sv4d_ns.plugin.help import first_in_help, without_flags
from sv4d_ns.runs.layout import newest_views, windows_folder
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import say

if TYPE_CHECKING:
    from sv4d_ns.fitting.batch_sampler import Batch, BatchSampler
    from sv4d_ns.fitting.schedule import Window
    from sv4d_ns.fitting.train_views import TrainView
    from sv4d_ns.geometry.cameras import ViewPlan
    from sv4d_ns.synthesis.base import ViewSynthesizer
    from sv4d_ns.video import ObjectVideo
    from sv4d_ns.views.grid import ViewGrid


EVAL_SEED = 2**32
"""Between the seed of the rays trained on and that of the rays a fit is measured on: no seed is as large."""


@dataclass
class GridParserConfig:
    """What `ns-render dataset` sets of a data parser."""

    downscale_factor: float = 1.0
    """How many times smaller the pictures are to be than the input view."""


@first_in_help("max_frames", "fps", "masks", "matting", "crop", "synthesis", "seed")
@without_flags(
    *("train_num_images_to_sample_from", "train_num_times_to_repeat_images", "eval_num_rays_per_batch"),
    *("eval_num_images_to_sample_from", "eval_num_times_to_repeat_images", "eval_image_indices", "collate_fn"),
    *("camera_res_scale_factor", "patch_size", "pixel_sampler", "masks_on_gpu", "images_on_gpu"),
)
@dataclass
class SV4DDataManagerConfig(VanillaDataManagerConfig):
    """Where the views come from and how their pixels are drawn."""

    _target: type = field(default_factory=lambda: SV4DDataManager)
    data: Path | None = None
    """The video (mp4, mov, webm, gif, ...), a folder of images, or a folder holding a view grid (grid.json)."""
    dataparser: tyro.conf.Suppress[Any] = None
    """Cameras and images come from the view grid; nerfstudio's commands set a `GridParserConfig`."""
    run_dir: tyro.conf.Suppress[Path | None] = None
    """The run's own folder, where its view grids are; filled in when the run is created."""
    max_frames: int | None = None
    """Frames taken from the video, evenly in time; shorter videos keep all of theirs. The default is 21, as in the SV4D
    papers (with --pipeline.datamanager.fps: all at that rate). 1 makes a model of the first frame that stands still."""
    fps: float | None = None
    """Take so many frames a second of the video instead of a number of frames. Pictures carry no rate: all are taken,
    and this is theirs."""
    masks: Path | None = None
    """A folder (or pattern, or video) of masks, one for each frame: white, or opaque, is the object."""
    matting: str | None = "u2netp"
    """Model that finds the object where the background is not plain: u2netp comes with this package; isnet-general-use,
    birefnet-general and others of rembg's are better and need the extra `matting`."""
    frame_ratio: float = 0.9
    """Share of the square crop that the object's larger side fills, over all frames (SV4D's image_frame_ratio)."""
    crop: Literal["auto", "fixed", "stabilised", "released"] = "auto"
    """The square shown to the model: auto is the whole picture where it is square and frames the object already, as
    renders do, and else fixed; fixed is centred on the object over all frames; stabilised follows an object that
    travels (ns-export's --root-motion gives the travel back); released is the released script's, around the middle of
    the picture."""
    input_size: int = INPUT_SIZE
    """Pixels along the side of the cropped input view the field is fitted to; generated views have the model's size."""
    synthesis: Annotated[
        Literal["auto", "bundled", "official", "fourdm"], tyro.conf.arg(aliases=["--pipeline.synthesis"])
    ] = "auto"
    """The model that makes the views: auto takes the official weights on CUDA and the bundled ones on a CPU; fourdm
    is 4Diffusion's."""
    fourdm_checkpoint: Path | None = None
    """4Diffusion's 4dm.ckpt, for fourdm."""
    imagedream: str = "ashawkey/imagedream-ipmv-diffusers"
    """Repository or folder of ImageDream's weights and encoders, for fourdm."""
    prompt: str = ""
    """What the video shows, for fourdm; may be left empty."""
    synthesis_steps: int | None = None
    """Denoising steps of that model; None takes its own default."""
    view_azimuths: tuple[float, ...] | None = None
    """Azimuths of the novel views relative to the input view, degrees, any number; None takes the model's own ring."""
    view_elevations: tuple[float, ...] | None = None
    """Elevation of each of them relative to the input view, degrees; None puts all at the input view's."""
    view_references: Literal["independent", "anchored"] | None = None
    """What calls of the model know of each other where there are more views than one call makes: nothing, or the
    nearest finished views; None takes what suits the model."""
    window_stride: Literal["fixed", "released_t", "released_t_minus_1", "released_full_windows"] = "fixed"
    """How far apart the model's windows start in a long video; the released rules fail for some lengths."""
    guidance: Literal["released", "constant"] = "released"
    """Shape of the guidance scale over frames and views: the model's own, or its largest value everywhere."""
    guidance_scale: float | None = None
    """Largest guidance scale; None takes the model's own."""
    camera_attention: Literal["released", "per_view_pixel", "full_3d"] | None = None
    """Which tokens of different views attend to each other; None takes what the model was made with."""
    normals: str | None = None
    """What estimates normals for the normal loss: a folder of normal maps named like the grid's pictures
    (view00_frame0000.png; 8-bit RGB, 0 is -1 and 255 is 1 along the camera's axes: red to the right, green up, blue
    towards the camera), or a diffusers pipeline on this machine (its folder, or its name in the local cache, e.g.
    prs-eth/marigold-normals-v1-1)."""
    leave_out: bool = True
    """Where the silhouettes of all views but a few (one in four) agree, fit the field to those and leave out the rest.
    Views that come with a confidence, as the bundled model's do, are all kept."""
    seed: int = 0
    """Seed of the diffusion noise and of the drawing of pixels."""
    train_num_rays_per_batch: int = 1536
    """Single rays of a training step."""
    patches: int = 4
    """Patches of 16x16 rays in a training step, for the structural loss."""

    def check_data(self) -> "ObjectVideo | None":
        """Read what the user gave as the run will, so that a bad video stops before anything is written.

        Returns:
            The object of the video; None where views were given, which are then looked through as well.

        Raises:
            InputError: naming the file and the remedy.
        """
        if self.data is None:
            raise InputError("--data is missing: give a video file, a folder of images, or a folder with a view grid.")
        view_plan(self)
        if is_grid(self.data):
            from sv4d_ns.views.grid import ViewGrid

            ViewGrid.load(self.data)
            return None
        return read_video(self)

    def model_sentences(self, device: str) -> str:
        """Which model will make the views, why, and how far it reaches.

        Raises:
            InputError: the model cannot run on the device.
        """
        from sv4d_ns.synthesis.choice import MODELS, choose_model

        if self.synthesis == "fourdm":
            return "4DM, because --pipeline.datamanager.synthesis fourdm."
        name, reason = choose_model(self.synthesis, device)
        facts = MODELS[name]
        return f"{facts.name} at {facts.size}x{facts.size} pixels, because {reason}. {facts.reach}"


def is_grid(data: Path) -> bool:
    """Whether `data` is a view grid made earlier (its views are then used as they are), or what is left of one."""
    return any((data / name).is_file() for name in ("grid.json", "transforms.json"))


def read_video(config: SV4DDataManagerConfig) -> "ObjectVideo":
    """The object of the user's video, cut out and cropped to squares of `input_size`."""
    from sv4d_ns.video import CropRule, load_object_video

    assert config.data is not None
    return load_object_video(
        config.data,
        config.input_size,
        frames_taken(config.max_frames, config.fps),
        config.frame_ratio,
        config.fps,
        config.masks,
        config.matting,
        CropRule(config.crop),
    )


def view_plan(config: SV4DDataManagerConfig) -> "ViewPlan | None":
    """The views the user asked for, if any.

    Raises:
        InputError: no camera can be built from them.
    """
    from sv4d_ns.geometry.cameras import ViewPlan

    if config.view_azimuths is None:
        if config.view_elevations is not None:
            raise InputError("--pipeline.datamanager.view-elevations needs --pipeline.datamanager.view-azimuths.")
        return None
    elevations = config.view_elevations or (0.0,) * len(config.view_azimuths)
    return ViewPlan(config.view_azimuths, elevations)


def grid_dataset(
    grid: "ViewGrid", folder: Path, views_and_frames: list[tuple[int, int]], downscale_factor: float = 1.0
) -> InputDataset:
    """Some images of a saved grid as a nerfstudio dataset on white, in the given order.

    Args:
        views_and_frames: (view, frame) pairs; view 0 is the input.
        downscale_factor: how many times smaller than the input view the pictures are.
    """
    from sv4d_ns.fitting.train_views import largest_silhouette
    from sv4d_ns.views.grid import image_name

    c2w = torch.from_numpy(grid.plan.c2w()[:, :3]).float()
    views = torch.tensor([view for view, _ in views_and_frames])
    frames = torch.tensor([frame for _, frame in views_and_frames])
    size = max(round(grid.input_frames.shape[1] / downscale_factor), 1)
    cameras = Cameras(
        camera_to_worlds=c2w[views],
        fx=grid.plan.focal_px(size),
        fy=grid.plan.focal_px(size),
        cx=size / 2,
        cy=size / 2,
        width=size,
        height=size,
        camera_type=CameraType.PERSPECTIVE,
        times=torch.from_numpy(grid.times).float()[frames][:, None],
    )
    outputs = DataparserOutputs(
        image_filenames=[folder / image_name("images", view, frame) for view, frame in views_and_frames],
        cameras=cameras,
        alpha_color=torch.ones(3),
        scene_box=object_box(),
        metadata={
            "num_frames": grid.num_frames,
            "num_views": grid.num_views,
            "canonical_frame": largest_silhouette(grid),
        },
    )
    return GridImages(outputs)


class GridImages(InputDataset):
    """Images of a grid, all at the size of their camera: ns-render takes one size for a whole path, and the generated
    views are smaller than the input."""

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        from sv4d_ns.utils.images import resize_rgba

        return resize_rgba(super().get_numpy_image(image_idx)[None], int(self.cameras.height[image_idx]))[0]


def object_box() -> SceneBox:
    """The box every object is normalised into."""
    from sv4d_ns.geometry.cameras import OBJECT_BOX

    return SceneBox(aabb=torch.tensor([[-OBJECT_BOX] * 3, [OBJECT_BOX] * 3]))


def every_view_at_first_frame(grid: "ViewGrid") -> list[tuple[int, int]]:
    """What the viewer shows as cameras and nerfstudio's static exporters fuse: one moment, so that nothing ghosts."""
    return [(view, 0) for view in range(grid.num_views + 1)]


def once_around_while_time_passes(grid: "ViewGrid") -> list[tuple[int, int]]:
    """The diagonal of the grid: all T frames, the views in turn along the ring; what ns-eval and ns-render use.

    The ring starts at the view nearest to 90 degrees: nerfstudio's spiral takes the first camera's viewing axis, in
    world coordinates, for the upward direction of its own frame, and only there do the two agree.
    """
    azimuths = (0.0, *grid.plan.azimuths_deg)
    nearest = min(azimuths, key=lambda azimuth: abs((azimuth - 90.0 + 180.0) % 360.0 - 180.0))
    ring = sorted(range(grid.num_views + 1), key=lambda view: (azimuths[view] - nearest) % 360.0)
    return [(ring[frame * len(ring) // grid.num_frames], frame) for frame in range(grid.num_frames)]


class SV4DDataManager(VanillaDataManager):
    """Serves the view grid of a run as nerfstudio datasets and as training rays."""

    config: SV4DDataManagerConfig

    def __init__(
        self,
        config: SV4DDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **_: Any,
    ):
        self.config = config
        self.device = device
        self.test_mode = test_mode
        self.world_size = world_size
        self.local_rank = local_rank
        self.includes_time = True
        self.frame_window: Callable[[int], Window]  # the pipeline sets both from the model's schedule
        self.canonical_frame: int
        self.retries = 0
        """How often the run went back to a checkpoint after a loss that was not finite: it then draws other pixels."""
        self._synthesizer: ViewSynthesizer | None = None
        self._batch_sampler: BatchSampler | None = None
        self._export_sampler: BatchSampler | None = None
        self.grid, folder = self._open_grid()
        self.use_grid(self.grid, folder)
        # skips VanillaDataManager.__init__, which would ask a data parser for what the grid already holds
        DataManager.__init__(self)

    # Methods, not properties: nerfstudio's viewers read every attribute of pipeline, model and data manager.

    def synthesizer(self) -> "ViewSynthesizer":
        """The diffusion model; loaded when it is first needed, which is never outside training."""
        assert self.test_mode == "val", "views are generated in training only"
        if self._synthesizer is None:
            self._synthesizer = self._load_synthesizer()
        return self._synthesizer

    def release_synthesizer(self) -> None:
        """Let go of the diffusion model; it is loaded again if it is asked for."""
        self._synthesizer = None

    def _load_synthesizer(self) -> "ViewSynthesizer":
        from sv4d_ns.synthesis.choice import load_synthesizer

        if self.config.synthesis == "fourdm":
            from sv4d_ns.synthesis.fourdm import load_fourdm_synthesizer

            c = self.config
            synthesizer, sentence = load_fourdm_synthesizer(
                c.fourdm_checkpoint, c.imagedream, c.prompt, str(self.device), c.synthesis_steps
            )
            say(sentence)
            return synthesizer
        return load_synthesizer(
            self.config.synthesis,
            str(self.device),
            num_inference_steps=self.config.synthesis_steps,
            options={
                "stride": self.config.window_stride,
                "references": self.config.view_references,
                "guidance": self.config.guidance,
                "guidance_scale": self.config.guidance_scale,
                "camera_attention": self.config.camera_attention,
            },
        )[0]

    def _open_grid(self) -> tuple["ViewGrid", Path]:
        from sv4d_ns.views.grid import ViewGrid

        assert self.config.run_dir is not None, "the trainer configuration fills in run_dir"
        run_dir = self.config.run_dir
        folder = newest_views(run_dir)
        if folder is not None:
            if self.test_mode == "val":
                say(f"Views: using those in {folder}.")
            return ViewGrid.load(folder), folder
        if self.test_mode != "val":
            raise InputError(
                f"{run_dir} holds no views: bring the folder views/ of the run to it; if the run was stopped before "
                "they were made, give its ns-train command again."
            )
        folder = run_dir / "views"
        assert self.config.data is not None
        # the field starts from random numbers, too: from the same ones whether or not the views had to be made
        with torch.random.fork_rng():
            grid = ViewGrid.load(self.config.data) if is_grid(self.config.data) else self._generate_grid(run_dir)
        grid.save(folder)
        return grid, folder

    def _generate_grid(self, run_dir: Path) -> "ViewGrid":
        from sv4d_ns.diffusion.seams import drift_line
        from sv4d_ns.utils.files import content_hash
        from sv4d_ns.utils.images import resize_rgba
        from sv4d_ns.utils.progress import bar
        from sv4d_ns.views.grid import ViewGrid

        video = read_video(self.config)
        plan = view_plan(self.config) or self.synthesizer().default_plan()
        frames = resize_rgba(video.frames, self.synthesizer().image_size)
        description = self.synthesizer().describe()
        key = content_hash(frames, plan.to_dict(), description, self.config.seed)
        with bar("Stage 1: making novel views") as progress:
            views = self.synthesizer().generate(
                frames, plan, seed=self.config.seed, store=windows_folder(run_dir, key), progress=progress
            )
        if views.drift:
            say(drift_line(views.drift))
        return ViewGrid(
            input_frames=video.frames,
            novel_views=views.images,
            confidence=views.confidence,
            plan=views.plan or plan,
            fps=video.fps,
            framing=video.framing.to_dict(),
            provenance={
                "source": video.source,
                "seed": self.config.seed,
                **description,
                "drift": [asdict(boundary) for boundary in views.drift],
            },
        )

    def use_grid(self, grid: "ViewGrid", folder: Path) -> None:
        """Serve another grid from now on (stage 2 calls this with its refined views)."""
        self.grid = grid
        self._batch_sampler = None  # it belongs to the old grid
        parser: GridParserConfig = self.config.dataparser or GridParserConfig()
        self.train_dataset = grid_dataset(grid, folder, every_view_at_first_frame(grid), parser.downscale_factor)
        self.train_dataset.metadata["leave_out"] = self.config.leave_out
        if self.test_mode == "val":
            self._say_what_is_left_out()
        self.eval_dataset = grid_dataset(grid, folder, once_around_while_time_passes(grid), parser.downscale_factor)
        if hasattr(self, "eval_dataloader"):
            self.setup_eval()  # the loaders hold the dataset
        self.train_dataparser_outputs = self.train_dataset._dataparser_outputs
        self.eval_dataparser_outputs = self.eval_dataset._dataparser_outputs

    def _say_what_is_left_out(self) -> None:
        from sv4d_ns.fitting.train_views import views_to_fit

        azimuths = (0.0, *self.grid.plan.azimuths_deg)
        kept = views_to_fit(self.grid, self.config.leave_out)
        left_out = [f"{azimuth:g}" for view, azimuth in enumerate(azimuths) if view not in kept]
        if left_out:
            say(
                f"The novel views at {', '.join(left_out)} degrees show nothing, or an object that contradicts all "
                "other views: they are left out (--pipeline.datamanager.leave-out False keeps all but empty ones)."
            )

    def get_datapath(self) -> Path:
        """The user's data (nerfstudio's viewer puts camera paths beside it), or the run's folder where that is gone."""
        data = self.config.data
        return data if data is not None and data.exists() else self.config.run_dir or Path.cwd()

    def setup_train(self) -> None:
        """nerfstudio's exporters set the number of rays on this sampler; pixels are drawn by `BatchSampler`."""
        rays = self.config.train_num_rays_per_batch
        self.train_pixel_sampler = PixelSamplerConfig().setup(num_rays_per_batch=rays)

    def setup_eval(self) -> None:
        workers = min(2, os.cpu_count() or 1)
        self.fixed_indices_eval_dataloader = FixedIndicesEvalDataloader(
            input_dataset=self.eval_dataset, device=self.device, num_workers=workers
        )
        self.eval_dataloader = RandIndicesEvalDataloader(
            input_dataset=self.eval_dataset, device=self.device, num_workers=workers
        )

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """Rays of a training step and their targets; for nerfstudio's exporters, rays of the first frame."""
        self.train_count += 1
        if self.test_mode != "val":
            return self._first_frame_rays(), {}
        return _with_targets(self.training_sampler().draw(step, self.frame_window(step), self.canonical_frame))

    def next_eval(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """Rays like those of training, but others, for --steps-per-eval-batch; they disturb no training step."""
        self.eval_count += 1
        sampler = self.batch_sampler().with_seed(self.config.seed + EVAL_SEED)
        return _with_targets(sampler.draw(step, self.frame_window(step), self.canonical_frame))

    def training_sampler(self) -> "BatchSampler":
        """`batch_sampler` with the seed of this attempt."""
        return self.batch_sampler().with_seed(self.config.seed + self.retries)

    def batch_sampler(self) -> "BatchSampler":
        """Draws rays of the grid in use."""
        if self._batch_sampler is None:
            config = self.config
            self._batch_sampler = self._make_sampler(rays=config.train_num_rays_per_batch, patches=config.patches)
        return self._batch_sampler

    def _make_sampler(self, rays: int, patches: int, spread: bool = False) -> "BatchSampler":
        from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
        from sv4d_ns.fitting.schedule import ScheduleConfig
        from sv4d_ns.fitting.train_views import train_views

        config = BatchConfig(rays=rays, patches=patches, spread=spread)
        views = train_views(self.grid, self.device, self.config.leave_out)
        if self.config.normals is not None and self.test_mode == "val":
            views = self._with_normals(views, self.config.normals)
        return BatchSampler(views, config, ScheduleConfig(), self.config.seed)

    def _with_normals(self, views: "list[TrainView]", source: str) -> "list[TrainView]":
        from sv4d_ns.fitting.train_views import with_normals
        from sv4d_ns.utils.progress import bar
        from sv4d_ns.views.normals import estimated_normals

        assert self.config.run_dir is not None
        store = windows_folder(self.config.run_dir, "normals")
        with bar("Estimating normals") as progress:
            normals = estimated_normals(self.grid, source, store, str(self.device), progress)
        return with_normals(views, normals)

    def _first_frame_rays(self) -> RayBundle:
        """What ns-export pointcloud and poisson fuse: one moment, seen from everywhere."""
        from sv4d_ns.fitting.schedule import Window

        assert self.train_pixel_sampler is not None
        rays = self.train_pixel_sampler.num_rays_per_batch
        if self._export_sampler is None or self._export_sampler.config.rays != rays:
            self._export_sampler = self._make_sampler(rays=rays, patches=0, spread=True)
        return _ray_bundle(self._export_sampler.draw(self.train_count, Window.whole(1), 0))


def _with_targets(batch: "Batch") -> tuple[RayBundle, dict[str, Any]]:
    """A batch's rays with all that rendering them takes, and the batch."""
    bundle = _ray_bundle(batch)
    carried: dict[str, Any] = {
        "jitter": batch.jitter[:, None],
        "background": batch.background.expand(len(bundle), 3),
        "view": batch.view[:, None],
        "moments": batch.moments,
    }
    bundle.metadata = carried
    return bundle, {"batch": batch}


def _ray_bundle(batch: "Batch") -> RayBundle:
    pixel_area = torch.ones_like(batch.alpha[:, None])
    return RayBundle(batch.origins, batch.directions, pixel_area, times=batch.times)
