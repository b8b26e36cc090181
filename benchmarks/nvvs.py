"""The network against the released formulation written out literally: CPU time and peak memory, one thread.

    python benchmarks/nvvs.py

Both have the same random weights; both run in fresh processes, one after the other in turns. Time is the process's CPU
time of a forward pass (median). Memory is the growth of the peak resident size over the size with weights and inputs
loaded, after one small pass that loads the libraries' own tables. Bars: time 0.60, memory 0.75.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from literal_unet import LiteralUNet
from torch import Tensor, nn

from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.key_maps import restore_unet, unet_config

SETTINGS = {
    "model_channels": 64,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "num_head_channels": 64,
    "context_dim": 1024,
    "motion_context_dim": 4,
    "adm_in_channels": 256,
    "in_channels": 8,
    "out_channels": 4,
}
FRAMES = VIEWS = 4
LATENT = 16
TIME_BAR, MEMORY_BAR, TOLERANCE = 0.60, 0.75, 1e-4


@dataclass(frozen=True)
class NvvsConfig:
    """What to measure."""

    passes: int = 7
    """Forward passes a process."""
    rounds: int = 2
    """Processes of each kind."""
    only: Literal["ours", "literal"] | None = None
    """(Used by the benchmark itself.) Measure one in this process and print JSON."""
    joint: bool = True
    """(Likewise.) The 4-view model's camera attention; otherwise the 8-view model's."""
    batch: int = 1
    """(Likewise.) Samples at once; 2 is classifier-free guidance."""


def networks(joint: bool, which: str) -> nn.Module:
    """One of the two networks with the same random weights, nowhere zero."""
    settings = {**SETTINGS, "use_3d_attention": joint}
    torch.manual_seed(0)
    ours = MultiViewVideoUNet(**unet_config(settings)).eval()
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    if which == "ours":
        return ours
    literal = LiteralUNet(**settings).eval()
    literal.load_state_dict(restore_unet(ours.state_dict(), ours.config), strict=True)
    return literal


def inputs(batch: int, latent: int = LATENT) -> tuple[Tensor, ...]:
    """Random inputs of a forward pass."""
    draw = torch.Generator().manual_seed(1)
    n = batch * FRAMES * VIEWS
    shapes = ((n, 8, latent, latent), (n,), (batch, FRAMES, 1024), (n, 256), (batch * VIEWS, 4, latent, latent))
    return tuple(torch.randn(*shape, generator=draw) for shape in shapes)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(config: NvvsConfig) -> dict[str, float]:
    """Times and memory of one network in this process."""
    torch.set_num_threads(1)
    network, given = networks(config.joint, str(config.only)), inputs(config.batch)
    with torch.no_grad():
        network(*inputs(1, latent=4))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading freed must not serve the measured passes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _resident()
        times = []
        for _ in range(config.passes):
            began = time.process_time()
            output = network(*given)
            times.append(time.process_time() - began)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    output = output if isinstance(output, Tensor) else output.sample
    return {"seconds": median(times), "bytes": peak - before, "check": output.double().square().sum().item()}


def _spawn(config: NvvsConfig, which: str, joint: bool, batch: int) -> dict[str, float]:
    flags = ["--only", which, "--batch", str(batch), "--passes", str(config.passes)]
    flags.append("--joint" if joint else "--no-joint")
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(joint: bool, batch: int) -> float:
    """Between the outputs of the two."""
    with torch.no_grad():
        ours = networks(joint, "ours")(*inputs(batch)).sample
        return (ours - networks(joint, "literal")(*inputs(batch))).abs().max().item()


def main(config: NvvsConfig) -> None:
    """Measure all four settings, print a table, fail where a bar is missed."""
    if config.only is not None:
        print(json.dumps(measure(config)))
        return
    torch.set_num_threads(1)
    missed = []
    print("| camera attention | B | CPU time | of literal | peak memory | of literal | max difference |")
    print("|---|---|---|---|---|---|---|")
    for joint in (True, False):
        for batch in (1, 2):
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "literal": []}
            for _ in range(config.rounds):
                for which, found in runs.items():
                    found.append(_spawn(config, which, joint, batch))
            seconds, size = (
                {which: median(run[key] for run in found) for which, found in runs.items()}
                for key in ("seconds", "bytes")
            )
            time_ratio, memory_ratio = seconds["ours"] / seconds["literal"], size["ours"] / size["literal"]
            difference = largest_difference(joint, batch)
            name = "released (4 views)" if joint else "per_view_pixel (8 views)"
            print(
                f"| {name} | {batch} | {seconds['ours']:.2f} s | {time_ratio:.2f} | {size['ours'] / 2**20:.0f} MiB "
                f"| {memory_ratio:.2f} | {difference:.1e} |",
                flush=True,
            )
            if time_ratio > TIME_BAR or memory_ratio > MEMORY_BAR or difference > TOLERANCE:
                missed.append(f"{name}, B={batch}")
    if missed:
        raise SystemExit(f"Missed a bar (time {TIME_BAR}, memory {MEMORY_BAR}): {'; '.join(missed)}.")


if __name__ == "__main__":
    main(tyro.cli(NvvsConfig, description=__doc__))
