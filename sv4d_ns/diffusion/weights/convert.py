"""A released SV4D 2.0 file as a folder in diffusers' layout (`sv4d convert`), written as a stream.

The folder is what `save_pretrained` would write: the same names, the same configurations, the same shards. It grows
beside its place under a hidden name and is moved there when it is whole; a killed conversion goes on with the next
weights file.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from sv4d_ns import __version__
from sv4d_ns.diffusion.weights.hub import LICENCE, MODEL_URL, REPOSITORY
from sv4d_ns.diffusion.weights.official import (
    FRAMES,
    Architecture,
    OfficialFile,
    compare_autoencoders,
    open_official,
    report_differences,
    stream,
)
from sv4d_ns.diffusion.weights.streaming import write_tensors
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.progress import bytes_bar

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS_NAMES = {
    "unet": SAFETENSORS_WEIGHTS_NAME,
    "vae": SAFETENSORS_WEIGHTS_NAME,
    "image_encoder": SAFE_WEIGHTS_NAME,
}
RECORD = "conversion.json"
PROGRESS = ".progress.json"
NOTICE = (
    "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. All "
    "Rights Reserved"
)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a released SV4D 2.0 file into a folder that diffusers loads."""

    file: tyro.conf.Positional[str]
    """A local .safetensors file, or sv4d2.safetensors or sv4d2_8views.safetensors to fetch it from the hub, or
    OWNER/REPOSITORY/FILE.safetensors of the hub."""
    output: tyro.conf.Positional[Path]
    """Folder to make; it must not exist, or be empty."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the weights in the folder."""
    variant: str | None = None
    """Word in the names of the weights files, as from_pretrained(variant=...) expects it; usually fp16 or bf16."""
    max_shard_size: str = "5GB"
    """A component larger than this is split into several files."""
    model: Literal["sv4d2", "sv4d2_8views"] | None = None
    """Which of the two models the file is; by default its name says so."""
    sha256: str | None = None
    """Checksum the file must have. A file from the hub's cache is checked by itself."""
    ignore_unknown: bool = False
    """Leave out tensors nobody knows instead of refusing the file."""


@dataclass(frozen=True)
class WeightsFile:
    """A file to write: relative to the folder; shape and source (name in the released file) of each tensor."""

    component: str
    path: str
    shapes: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, str]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of its tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * dtype.itemsize


def convert(
    checkpoint: str | PathLike[str],
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    max_shard_size: int | str = "5GB",
    architecture: Architecture | None = None,
    **opening: Any,
) -> Path:
    """Write a released file as a folder for `StableVideo4D2Pipeline.from_pretrained`; returns the folder.

    Tensors are read, converted and written one by one. Values that are not finite (in the file, or after the cast)
    are reported and kept.

    Args:
        checkpoint: see `hub.locate`.
        output: folder to make; an empty one may exist.
        dtype: of all weights; float32, float16 or bfloat16.
        variant: word in the names of the weights files.
        max_shard_size: bytes (or "5GB") above which a component is split.
        architecture: the released one by default.
        opening: further arguments of `official.open_official`.

    Raises:
        InputError: when the file is refused (see `open_official`), the folder exists, the disk is too small, or
            another conversion writes the same folder. Nothing is left in `output` then.
    """
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise InputError(f"--variant {variant} cannot be part of a file name: use letters and digits, such as fp16.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists: give another folder, or remove it first.")
    official = open_official(checkpoint, architecture=architecture, **opening)
    files, indices = weights_files(official, dtype, variant, max_shard_size)
    with _unwritable(output), _working_folder(output) as folder:
        settings = {"dtype": str(dtype), "files": [file.path for file in files], "code": __version__}
        finished = _resume(folder, {"source": _identity(official), **settings})
        _check_space(folder, sum(file.nbytes(dtype) for file in files if file.path not in finished))
        differences = compare_autoencoders(official.path, official.layout)
        report_differences(differences)
        _write_weights(official, folder, files, dtype, finished)
        problems = [problem for file in files for problem in finished[file.path]]
        _report_problems(problems)
        _write_configurations(official, folder, dtype, indices)
        record = {
            "source": {"file": official.path.name, "sha256": official.sha256, "url": MODEL_URL},
            "licence": LICENCE,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": variant,
            "sv4d_ns": __version__,
            "autoencoder_used": FRAMES,
            "autoencoder_differences": [asdict(difference) for difference in differences],
            "not_finite": problems,
        }
        _write_json(folder / RECORD, record)
        (folder / "NOTICE").write_text(f"{NOTICE}\n")
        (folder / "README.md").write_text(model_card(official, dtype, variant))
    return output


def weights_files(
    official: OfficialFile, dtype: torch.dtype, variant: str | None, max_shard_size: int | str
) -> tuple[list[WeightsFile], dict[str, dict[str, Any]]]:
    """The files to write, and the index (by its relative path) of each component that is split.

    Raises:
        InputError: for a size that cannot be read.
    """
    files, indices = [], {}
    sources = _sources(official)
    for component, module in official.components.items():
        state = module.state_dict()
        stem = WEIGHTS_NAMES[component].removesuffix(".safetensors")
        named = stem if variant is None else f"{stem}.{variant}"
        try:
            split = split_state_dict_into_shards_factory(
                state,
                get_storage_size=lambda tensor: tensor.numel() * dtype.itemsize,
                filename_pattern=f"{named}{{suffix}}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise InputError(f"--max-shard-size {max_shard_size} is not a size: give one such as 5GB.") from error
        for name, keys in split.filename_to_tensors.items():
            shapes = {key: tuple(state[key].shape) for key in keys}
            origins = {key: sources[component, key] for key in keys}
            files.append(WeightsFile(component, f"{component}/{name}", shapes, origins))
        if split.is_sharded:
            metadata = dict(split.metadata)
            if WEIGHTS_NAMES[component] == SAFE_WEIGHTS_NAME:
                metadata["total_parameters"] = module.num_parameters()
            suffix = "json" if variant is None else f"{variant}.json"
            indices[f"{component}/{stem}.safetensors.index.{suffix}"] = {
                "metadata": metadata,
                "weight_map": split.tensor_to_filename,
            }
    return files, indices


def _sources(official: OfficialFile) -> dict[tuple[str, str], str]:
    """The name in the released file of every tensor of the components."""
    return {
        (part.component, key): name
        for part in official.parts
        for name, shape in part.shapes.items()
        for key in part.convert(name, torch.empty(shape, device="meta"))
    }


@contextmanager
def _unwritable(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}): check the free space and the folder's "
            "permissions; the same command then goes on where it stopped."
        ) from error


@contextmanager
def _working_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes it when the block ends; it stays for the next time otherwise.

    Raises:
        InputError: when another process is at work there.
    """
    folder = output.parent / f".{output.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"Another conversion is writing {output}: wait for it, or give another folder.") from error
    try:
        yield folder
    except BaseException:
        lock.release()
        if not (folder / PROGRESS).exists():  # nothing to go on with
            shutil.rmtree(folder)
        raise
    for name in (".lock", PROGRESS):
        (folder / name).unlink(missing_ok=True)
    lock.release()
    with suppress(FileNotFoundError):  # filelock may leave its file behind when it lets go
        (folder / ".lock").unlink()
    folder.replace(output)


def _identity(official: OfficialFile) -> dict[str, Any]:
    found = official.path.stat()
    model = official.components["unet"].config.camera_attention
    return {"path": str(official.path.resolve()), "size": found.st_size, "time": found.st_mtime_ns, "model": model}


class _Finished(dict[str, list[str]]):
    """The weights files that are whole, with the problems seen in each; every change is written down at once."""

    def __init__(self, path: Path, job: Mapping[str, Any], known: Mapping[str, list[str]]) -> None:
        super().__init__(known)
        self._path, self._job = path, job

    def add(self, file: str, problems: list[str]) -> None:
        self[file] = problems
        _write_json(self._path, {"job": self._job, "finished": self})


def _resume(folder: Path, job: dict[str, Any]) -> _Finished:
    """What an earlier conversion of the same file with the same settings finished here; all else is removed."""
    progress = folder / PROGRESS
    known: dict[str, list[str]] = {}
    if progress.is_file():
        with suppress(json.JSONDecodeError, KeyError):
            saved = json.loads(progress.read_text())
            known = saved["finished"] if saved["job"] == job else {}
    keep = {folder / ".lock", *([progress] if known else []), *(folder / file for file in known)}
    for path in [path for path in folder.rglob("*") if path.is_file() and path not in keep]:
        path.unlink()
    known = {file: problems for file, problems in known.items() if (folder / file).is_file()}
    if known:
        print(f"Going on with an earlier conversion: {len(known)} weights files are there already.")
    return _Finished(progress, job, known)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are to be written: make room, or "
            "give a folder on another disk."
        )


def _write_weights(
    official: OfficialFile, folder: Path, files: Sequence[WeightsFile], dtype: torch.dtype, finished: _Finished
) -> None:
    total = sum(file.nbytes(dtype) for file in files)
    with bytes_bar(f"Converting {official.path.name}", total) as advance:
        for file in files:
            if file.path in finished:
                advance(file.nbytes(dtype))
                continue
            problems: list[str] = []
            with atomic_path(folder / file.path) as temporary:
                tensors = _told(_converted(official, file, dtype, problems), advance)
                write_tensors(temporary, file.shapes, dtype, tensors)
            finished.add(file.path, problems)


def _told(tensors: Iterator[Tensor], advance: Any) -> Iterator[Tensor]:
    for tensor in tensors:
        yield tensor
        advance(tensor.nbytes)


def _converted(official: OfficialFile, file: WeightsFile, dtype: torch.dtype, problems: list[str]) -> Iterator[Tensor]:
    """The tensors of a weights file one by one; what is not finite is added to `problems`."""
    parts = {name: part for part in official.parts if part.component == file.component for name in part.shapes}
    names = list(file.sources.values())
    for key, name, tensor in zip(file.shapes, names, stream(official.path, names), strict=True):
        value = parts[name].convert(name, tensor)[key].to(dtype)
        if not torch.isfinite(value).all():
            reason = "in the file" if not torch.isfinite(tensor).all() else f"as {dtype}".replace("torch.", "")
            problems.append(f"{name} ({reason})")
        yield value


def _report_problems(problems: Sequence[str]) -> None:
    if problems:
        print(
            f"Warning: {len(problems)} tensors have values that are not finite: {', '.join(problems[:10])}"
            f"{' and more' if len(problems) > 10 else ''}; those that have them in the file speak for a damaged file "
            f"(fetch it again from {MODEL_URL}), the others need --dtype bf16 or fp32. {RECORD} lists all."
        )


def _write_configurations(
    official: OfficialFile, folder: Path, dtype: torch.dtype, indices: Mapping[str, Mapping[str, Any]]
) -> None:
    """What `save_pretrained` writes beside the weights."""
    pipeline = official.pipeline()
    pipeline.unet.save_config(folder / "unet")
    pipeline.vae.save_config(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    configuration = pipeline.image_encoder.config
    configuration.architectures = [type(pipeline.image_encoder).__name__]
    configuration.dtype = str(dtype).removeprefix("torch.")
    configuration.save_pretrained(folder / "image_encoder")
    pipeline.save_config(folder)
    for name, index in indices.items():
        _write_json(folder / name, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def model_card(official: OfficialFile, dtype: torch.dtype, variant: str | None) -> str:
    """README.md of a converted folder."""
    release = official.release
    attention = release.camera_attention.value
    arguments = f"dtype={dtype}" + (f', variant="{variant}"' if variant else "")
    checksum = f" (SHA-256 {official.sha256})" if official.sha256 else ""
    return f"""---
license: other
license_name: stability-ai-community
license_link: {MODEL_URL}
base_model: {REPOSITORY}
library_name: diffusers
tags: [multi-view, video, 4d]
---
# SV4D 2.0 for diffusers

Stability AI's SV4D 2.0, {release.num_frames} frames by {release.num_views} views, converted from
`{official.path.name}`{checksum} of {MODEL_URL} by sv4d_ns {__version__}. The weights are those of that file as
{str(dtype).removeprefix("torch.")}; camera attention: `{attention}` (in `unet/config.json`). `{RECORD}` says what was
compared and left out.

**Licence: {LICENCE}**, see {MODEL_URL}. Powered by Stability AI. {NOTICE}. Whoever passes this folder on passes on the
licence and `NOTICE` with it.

```py
import torch
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline

pipeline = StableVideo4D2Pipeline.from_pretrained("path/to/this/folder", {arguments})
```
"""


def command(arguments: Sequence[str]) -> None:
    """`sv4d convert`: parse the flags and convert."""
    config = tyro.cli(ConvertConfig, prog="sv4d convert", args=list(arguments))
    try:
        output = convert(
            config.file,
            config.output,
            dtype=DTYPES[config.dtype],
            variant=config.variant,
            max_shard_size=config.max_shard_size,
            model=config.model,
            sha256=config.sha256,
            ignore_unknown=config.ignore_unknown,
        )
    except KeyboardInterrupt:
        print("Stopped: the same command goes on with the next weights file.")
        raise SystemExit(130) from None
    variant = f', variant="{config.variant}"' if config.variant else ""
    print(
        f"Wrote {output} under the {LICENCE}. Load it with StableVideo4D2Pipeline.from_pretrained("
        f'"{output}", dtype={DTYPES[config.dtype]}{variant}).'
    )
