"""`ns-train 4diffusion`: one video to a 4D field by score distillation. Imports configuration classes only."""

from nerfstudio.configs.base_config import LoggingConfig, ViewerConfig
from nerfstudio.plugins.types import MethodSpecification

from sv4d_ns.plugin.bar_writer import BarWriterConfig
from sv4d_ns.plugin.distillation_pipeline import FourDiffusionPipelineConfig
from sv4d_ns.plugin.distillation_trainer import FourDiffusionTrainerConfig
from sv4d_ns.plugin.help import described
from sv4d_ns.plugin.optimizers import FusedAdamWConfig
from sv4d_ns.utils.terminal import prepare_nerfstudios_command

prepare_nerfstudios_command()

method = MethodSpecification(
    config=FourDiffusionTrainerConfig(
        method_name="4diffusion",
        steps_per_save=50,
        # pseudo ground truth is all there is; ns-eval measures it when asked
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        mixed_precision=False,
        pipeline=FourDiffusionPipelineConfig(),
        # the reference's rates; it has no schedule
        optimizers={
            "encoding": {"optimizer": FusedAdamWConfig(lr=1e-2), "scheduler": None},
            "heads": {"optimizer": FusedAdamWConfig(lr=1e-3), "scheduler": None},
            # beside the field, for meshes: ours
            "motion": {"optimizer": FusedAdamWConfig(lr=2e-3), "scheduler": None},
        },
        viewer=ViewerConfig(websocket_host="127.0.0.1", quit_on_train_completion=True),
        logging=LoggingConfig(profiler="none", local_writer=BarWriterConfig(enable=False)),
        vis="viewer",
    ),
    description=described(
        "4diffusion",
        "4Diffusion: a 4D field by 4D-aware score distillation and an anchor view.",
        ("encoding", "heads", "motion"),
    ),
)
