"""Peak memory of `sv4d convert` on a full-size file of random bytes.

    python benchmarks/convert_memory.py --folder /tmp/convert

The file has the names, shapes and type of the released ones (3204 tensors, 12 GB). Each conversion runs in a process of
its own. Two figures are taken: the largest resident size (`ru_maxrss`, which counts the touched pages of the mapped
input file) and the largest anonymous part of it (`RssAnon`, sampled: what the process would not give back under
pressure). The bar is 1.3 times the largest component, the network, in the type that is written. With `--kill-after`
the last conversion is killed after that many seconds and started again.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from sv4d_ns.diffusion.weights.streaming import write_tensors

LAYOUT = Path(__file__).parents[1] / "tests" / "data" / "sv4d2" / "keys_sv4d2.json.gz"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNET = "model.diffusion_model"
SAMPLES = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
    "conv_out.bias": "out.2.bias",
}


def full_layout() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a released file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for section, tensors in json.loads(gzip.decompress(LAYOUT.read_bytes())).items():
        prefix = section.split(" ")[0]
        prefixes = [""]
        if prefix == UNET:
            prefixes = [f"{UNET}."]
        elif "{1,4,5}" in prefix:
            prefixes = [f"conditioner.embedders.{index}." for index in (1, 4, 5)]
        if section != "meta":
            shapes |= {f"{start}{name}": tuple(shape) for start in prefixes for name, shape in tensors.items()}
    return shapes


def random_tensors(shapes: Sequence[tuple[int, ...]]) -> Iterator[torch.Tensor]:
    generator = np.random.default_rng(0)
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        yield torch.frombuffer(bytearray(generator.bytes(4 * count)), dtype=torch.float32).reshape(shape)


def anonymous_memory(pid: int) -> int:
    """Bytes of `RssAnon` of a process; 0 once it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def run(file: Path, output: Path, dtype: str, kill_after: float | None = None) -> tuple[float, int, int]:
    """Convert in a process of its own: seconds, largest resident and largest anonymous bytes."""
    code = "import sys; from sv4d_ns.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", str(file), str(output), "--dtype", dtype]
    began, anonymous = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, anonymous_memory(process.pid))
        if kill_after is not None and time.monotonic() - began > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode != 0 and kill_after is None:
        sys.exit(text)
    print(text)
    return time.monotonic() - began, 1024 * usage.ru_maxrss, anonymous


def check(file: Path, output: Path, dtype: torch.dtype) -> None:
    """A few tensors of the network arrived bit by bit."""
    found = {}
    for path in (output / "unet").glob("*.safetensors"):
        with safe_open(path, framework="pt") as written:
            found |= {key: written.get_tensor(key).clone() for key in SAMPLES if key in written.keys()}  # noqa: SIM118
    with safe_open(file, framework="pt") as source:
        for key, name in SAMPLES.items():
            expected = source.get_tensor(f"{UNET}.{name}").to(dtype)
            assert torch.equal(found[key].flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where 24 GB are free; emptied afterwards")
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=["fp32", "fp16"])
    parser.add_argument("--kill-after", type=float, help="seconds")
    options = parser.parse_args()
    shapes = full_layout()
    network = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(f"{UNET}."))
    file = options.folder / "sv4d2.safetensors"
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tensors(file, shapes, torch.float32, random_tensors(list(shapes.values())))
    print(f"{file}: {len(shapes)} tensors, {file.stat().st_size / 1e9:.2f} GB")
    rows = []
    for dtype in options.dtypes:
        output = options.folder / dtype
        seconds, resident, anonymous = run(file, output, dtype)
        check(file, output, TYPES[dtype])
        bar = 1.3 * network * TYPES[dtype].itemsize
        rows.append(f"| {dtype} | {bar / 1e9:.2f} | {resident / 1e9:.2f} | {anonymous / 1e9:.2f} | {seconds:.0f} |")
        shutil.rmtree(output)
    if options.kill_after is not None:
        output = options.folder / "killed"
        run(file, output, options.dtypes[-1], options.kill_after)
        print(f"killed after {options.kill_after} s; folder there: {output.exists()}")
        seconds, *_ = run(file, output, options.dtypes[-1])
        check(file, output, TYPES[options.dtypes[-1]])
        print(f"the same command then took {seconds:.0f} s")
        shutil.rmtree(output)
    file.unlink()
    print("| written as | bar, 1.3x network (GB) | peak resident (GB) | of it anonymous (GB) | s |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
