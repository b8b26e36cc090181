"""The bundled model goes on learning from a folder of GLBs, and shows what it makes of them afterwards.

    python examples/04_train_on_my_assets.py my_assets runs/mine

Every clip of every file is used: textures, skins and morph targets are drawn without Blender. The same command goes on
after an interrupt. `sv4d train --config recipes/bundled.yaml --help` lists all settings.
"""

from pathlib import Path

import tyro

from sv4d_ns.diffusion_training.bundled.config import BundledTrainConfig
from sv4d_ns.diffusion_training.bundled.train import Trainer
from sv4d_ns.utils.errors import one_sentence_errors


def main(assets: Path, output: Path, /, steps: int = 500, moments: int = 8, threads: int = 1) -> None:
    """Train on a folder of GLBs.

    Args:
        assets: searched for GLB files.
        output: checkpoints, losses, sample pictures and the model go here.
        steps: training steps.
        moments: object moments in a batch.
        threads: CPU threads.
    """
    config = BundledTrainConfig(
        output_dir=output,
        start="bundled",
        # procedural creatures beside them, so that what is known is not forgotten
        data=((str(assets), 0.7), ("creatures", 0.3)),
        steps=steps,
        decay_steps=max(steps // 2, 1),
        steps_3d=0,
        learning_rate=3e-4,
        moments=moments,
        threads=threads,
    )
    model = Trainer(config).run()
    print(f"{model}: a diffusers folder; pictures of what it makes are in {output / 'sheets'}")


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
