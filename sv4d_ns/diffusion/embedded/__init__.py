"""The small multi-view video model shipped with the package. Its card is `weights/README.md`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline


REACH = (
    "Expect outline, colours and motion of the sides the camera does not see, blurred, and wrong in detail: on "
    "creatures it was not trained on its views cover the true ones with IoU 0.57, at 18.1 dB."
)
"""How far the shipped model reaches, for its users; the figures are the model card's."""


def embedded_folder() -> Path:
    """The folder of the shipped model, in diffusers' layout."""
    return Path(__file__).parent / "weights"


def load_embedded_pipeline(
    device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "StableVideo4D2Pipeline":
    """The shipped model, ready to sample; float32 unless told otherwise (the file holds float16).

    Raises:
        InputError: when the package was installed without its weights.
    """
    import torch

    # diffusers loads components only from modules that are imported already
    import sv4d_ns.diffusion.embedded.modules  # noqa: F401
    from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
    from sv4d_ns.utils.errors import InputError

    folder = embedded_folder()
    if not (folder / "model_index.json").is_file():
        raise InputError(f"The embedded model is missing from {folder}: reinstall sv4d-ns or run 'sv4d train'.")
    with _without_bar():
        pipeline = StableVideo4D2Pipeline.from_pretrained(folder).to(device)  # float16 on disk, float32 as loaded
    return pipeline if dtype in (None, torch.float32) else pipeline.to(dtype)


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
