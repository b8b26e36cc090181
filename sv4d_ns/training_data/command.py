"""`sv4d data`: render training data, and sort it out."""

from collections.abc import Sequence

import tyro


def command(arguments: Sequence[str]) -> None:
    """`sv4d data render|curate`."""
    from sv4d_ns.training_data import curate, render

    app = tyro.extras.SubcommandApp()

    @app.command(name="render")
    def _render(config: tyro.conf.OmitArgPrefixes[render.RenderConfig]) -> None:
        """Render assets as view-by-frame matrices for training; continues an interrupted render."""
        render.command(config)

    @app.command(name="curate")
    def _curate(config: tyro.conf.OmitArgPrefixes[curate.CurateConfig]) -> None:
        """Decide which rendered objects are good training data, and report why."""
        curate.command(config)

    app.cli(prog="sv4d data", args=list(arguments))
