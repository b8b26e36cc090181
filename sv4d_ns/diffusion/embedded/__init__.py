"""The small multi-view video model shipped with the package. Its card is `weights/README.md`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline


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
    pipeline = StableVideo4D2Pipeline.from_pretrained(folder).to(device)  # float16 on disk, float32 as loaded
    return pipeline if dtype in (None, torch.float32) else pipeline.to(dtype)
