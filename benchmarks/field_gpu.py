"""Stage 1 on a GPU at full size: 512x512, 21 frames, 9 views.

    python benchmarks/field_gpu.py --out DIR [--device cuda] [--case FOLDER] [--compile]

Fits a procedural creature (or a case) with the package's own steps and writes field_gpu.md: steps per second, time to
30 dB on two elevated views, peak memory, and the share of time of each kernel (torch.profiler). With `--compile` the
heads run through torch.compile. The canonical hash grid is tiny-cuda-nn's where tinycudann can be imported, rays are
walked by nerfacc where its extension works (`volume_rendering.marcher`); the table says which of them ran.
`--encoding numba` and an environment without nerfacc measure the torch paths.

`--device cpu` with small sizes exercises the same code without a GPU.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from sv4d_ns.field.hash_grid import tinycudann_works
from sv4d_ns.field.volume_rendering import marcher
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.files import atomic_path

sys.path.insert(0, str(Path(__file__).parent))
from field import FieldBenchmark, Ours, fit, seconds_to

TARGET_PSNR = 30.0


@dataclass
class FieldOnGpu:
    """Fit, profile and write field_gpu.md."""

    out: Path
    """Folder for the table."""
    device: str = "cuda"
    """torch device."""
    case: Path | None = None
    """A benchmark case; None renders a procedural creature."""
    size: int = 512
    """Pixels along the side."""
    frames: int = 21
    """Frames of the procedural creature."""
    steps: int = 3600
    """Length of the schedule."""
    rays: int = 8192
    """Rays of a step."""
    seconds: float = 180.0
    """Time to fit."""
    encoding: Literal["auto", "numba", "tinycudann"] = "auto"
    """Who evaluates the canonical hash grid; auto takes tinycudann on CUDA where it can be imported. numba means torch
    there."""
    compile: bool = False
    """Compile the heads with torch.compile."""
    profiled_steps: int = 10
    """Steps under the profiler, after the fit."""

    def main(self) -> None:
        """Run and write the table."""
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(
                f"--device {self.device}: torch sees no CUDA device; give --device cpu with a small --size."
            )
        views = FieldBenchmark(out=self.out, case=self.case, size=self.size, frames=self.frames)
        grid, held_out = views.views()
        encoding = self.encoding
        if encoding == "auto":
            encoding = "tinycudann" if self.device.startswith("cuda") and tinycudann_works() else "numba"
        build = Ours(grid, self.rays, self.steps, self.device, encoding)
        if self.compile:
            build.field.density_head = torch.compile(build.field.density_head)
            build.field.color_head = torch.compile(build.field.color_head)
        report = fit(build, held_out, self.seconds)
        reached = seconds_to(report["curve"], TARGET_PSNR)
        on_gpu = self.device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        lines = [
            f"{name}, torch {torch.__version__}, {self.size}x{self.size}, {grid.num_frames} frames, "
            f"{grid.num_views + 1} views, {self.rays} rays a step, torch.compile {'on' if self.compile else 'off'}.",
            f"Canonical hash grid: {'torch' if on_gpu and encoding == 'numba' else encoding}; "
            f"rays walked by {marcher(torch.zeros(1, 3, device=self.device))}.",
            "",
            f"- {1 / report['seconds_per_step']:.1f} steps/s",
            f"- {TARGET_PSNR:g} dB: {'not reached' if reached is None else f'{reached:.0f} s'}",
            "- " + ", ".join(f"{p['psnr']:.1f} dB in {p['seconds']:.0f} s" for p in report["curve"]),
            f"- peak memory {peak:.0f} MB",
            "",
            self._profile(build, on_gpu),
        ]  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.out / "field_gpu.md") as path:
            path.write_text("\n".join(lines) + "\n")
        print("\n".join(lines))

    def _profile(self, build: Ours, on_gpu: bool) -> str:
        """Markdown: the ten kernels that take most of the time."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        begun = time.perf_counter()
        with profile(activities=activities) as profiler:
            for number in range(self.profiled_steps):
                build.step(build.total - 1 - number)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events)
        lines = ["| kernel | share |", "|---|---|"]
        lines += [f"| {event.key[:80]} | {getattr(event, key) / max(total, 1e-9):.1%} |" for event in events[:10]]
        return "\n".join([*lines, "", f"{self.profiled_steps} steps took {time.perf_counter() - begun:.2f} s."])


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(FieldOnGpu, description=__doc__).main()
