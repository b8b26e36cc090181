"""Where things run: one place that chooses the device and says so, and the tools the machine may lack."""

import atexit
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sv4d_ns.utils.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]


def choose_device(choice: DeviceChoice) -> tuple[Literal["cpu", "cuda"], str]:
    """The torch device type, and one sentence saying what was chosen and why.

    Raises:
        InputError: `cuda` was asked for and this machine (or its torch build) has none.
    """
    import torch

    from sv4d_ns.utils.threads import workers

    if choice == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda is not None
        remedy = "no CUDA device is visible" if built else "this torch build has no CUDA support"
        raise InputError(f"--device cuda cannot be used because {remedy}: use --device cpu, or --device auto.")
    if choice != "cpu" and torch.cuda.is_available():
        return "cuda", f"Device: cuda ({torch.cuda.get_device_name(0)}), because {_asked(choice, 'CUDA is available')}."
    cores = f"{platform.machine()}, {workers()} threads"
    return "cpu", f"Device: cpu ({cores}), because {_asked(choice, 'no CUDA device is available')}."


def _asked(choice: DeviceChoice, otherwise: str) -> str:
    return otherwise if choice == "auto" else f"--device {choice} asks for it"


def upload(values: "np.ndarray | torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """Values of this process's memory on a device, without waiting for the work that is queued there.

    PyTorch waits unless it is told not to. Of memory that is not pinned CUDA has taken the values when the call
    returns, so they may change afterwards.
    """
    import torch

    return torch.as_tensor(values).to(device, non_blocking=True)


def ensure_ffmpeg_on_path() -> None:
    """Let `ns-render` find an ffmpeg: nerfstudio and mediapy call the executable by name.

    A machine's own ffmpeg is left alone. Without one, the binary of the imageio-ffmpeg wheel is put on this process's
    PATH under the name they look for.
    """
    if shutil.which("ffmpeg") is not None:
        return
    import imageio_ffmpeg

    folder = Path(tempfile.mkdtemp(prefix="sv4d-ffmpeg-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{folder}"
