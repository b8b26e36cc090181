"""The small multi-view video diffusion model shipped with the package. Its card is `weights/README.md`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline


REACH = (
    "Expect outline, main colours and motion of the sides the camera does not see, blurred, and wrong in detail: it is "
    "a small model that a CPU can run."
)
"""How far the shipped model reaches, in the words its users read; the figures are in its model card."""


def bundled_folder() -> Path:
    """The folder of the shipped model, in diffusers' layout."""
    return Path(__file__).parent / "weights"


def load_bundled_pipeline(device: str = "cpu", folder: Path | None = None) -> "BundledVideoPipeline":
    """The shipped model, ready to sample in float32 (the file holds float16).

    Args:
        device: torch device string.
        folder: of another saved pipeline, or of a network alone.

    Raises:
        InputError: the folder holds no such model.
    """
    import torch

    # diffusers loads components only from modules that are imported already
    from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
    from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
    from sv4d_ns.utils.errors import InputError

    folder = folder or bundled_folder()
    if (folder / "model_index.json").is_file():
        with _without_bar():
            pipeline = BundledVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    elif (folder / "config.json").is_file():
        pipeline = BundledVideoPipeline(VolumeDenoiser.from_pretrained(folder, dtype=torch.float32))
    else:
        raise InputError(f"The bundled model is missing from {folder}: reinstall sv4d-ns or run 'sv4d train'.")
    pipeline.denoiser.eval()
    return pipeline.to(device)  # type: ignore[no-any-return]


@contextmanager
def _without_bar() -> Iterator[None]:
    """diffusers draws a bar for the loading of components, which takes no time here."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
