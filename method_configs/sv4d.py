"""`ns-train sv4d`: one video to a 4D asset (SV4D 2.0). Imports configuration classes only: every ns-* command pays."""

from nerfstudio.configs.base_config import LoggingConfig, ViewerConfig
from nerfstudio.plugins.types import MethodSpecification

from sv4d_ns.fitting.learning_rates import LEARNING_RATES
from sv4d_ns.plugin.bar_writer import BarWriterConfig
from sv4d_ns.plugin.help import described
from sv4d_ns.plugin.optimizers import DecaySchedulerConfig, FusedAdamConfig
from sv4d_ns.plugin.pipeline import SV4DPipelineConfig
from sv4d_ns.plugin.trainer import SV4DTrainerConfig
from sv4d_ns.utils.terminal import prepare_nerfstudios_command

prepare_nerfstudios_command()

method = MethodSpecification(
    config=SV4DTrainerConfig(
        method_name="sv4d",
        steps_per_save=200,
        # pseudo ground truth is all there is; ns-eval measures it when asked
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        mixed_precision=False,
        pipeline=SV4DPipelineConfig(),
        optimizers={
            name: {"optimizer": FusedAdamConfig(lr=rate), "scheduler": DecaySchedulerConfig()}
            for name, rate in LEARNING_RATES.items()
        },
        # the viewer is up during training, on this machine only, and does not keep a finished run alive
        viewer=ViewerConfig(websocket_host="127.0.0.1", quit_on_train_completion=True),
        # the trainer shows a bar instead
        logging=LoggingConfig(profiler="none", local_writer=BarWriterConfig(enable=False)),
        vis="viewer",
    ),
    description=described(
        "sv4d", "SV4D 2.0: one video of an object becomes an animated, textured 3D model.", tuple(LEARNING_RATES)
    ),
)
