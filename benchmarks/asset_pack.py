"""GLB files in one small file: what a training run on a machine without a network is given.

    python benchmarks/gpu.py pack ASSETS --out assets.pack [--megabytes 58]

Of each GLB only what training reads is kept: meshes, rigs, clips, and the pictures of base colours, no larger than 256
pixels. Files below `animated/` come first, in each folder the smallest first, as many as fit. A pack is a tar of xz
files; `unpack` writes the folder again, under the names by which a tenth is held out.
"""

import io
import lzma
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pygltflib
import tyro
from PIL import Image

from sv4d_ns.training_data.library import asset_names
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path

FIRST = "animated/"
"""Assets that are packed before others."""
TEXTURE_SIDE = 256
JPEG_QUALITY = 85
SUFFIX = ".glb.xz"
ALIGNMENT = 8
"""Bytes that parts of a GLB's buffer begin at multiples of."""
MARGIN = 16 * 2**10
"""Bytes a tar adds at most after an entry's content."""


@dataclass(frozen=True)
class Pack:
    """Pack a folder of GLB files."""

    assets: tyro.conf.Positional[Path]
    """Folder that holds `animated/` and perhaps others."""
    out: Path = Path("assets.pack")
    """The file to write."""
    megabytes: float = 58.0
    """Size that it may have, in MiB."""

    def main(self) -> None:
        """Write the file and say what is in it."""
        packed, names = pack(self.assets, int(self.megabytes * 2**20))
        with atomic_path(self.out) as path:
            path.write_bytes(packed)
        animated = sum(name.startswith(FIRST) for name in names)
        there = asset_names(self.assets)
        moving = sum(name.startswith(FIRST) for name in there)
        print(
            f"{self.out}: {len(packed) / 2**20:.1f} MiB, {animated} of {moving} animated and {len(names) - animated} "
            f"of {len(there) - moving} other assets."
        )


def pack(folder: Path, most_bytes: int) -> tuple[bytes, list[str]]:
    """The pack, and the names of the assets in it.

    Raises:
        InputError: the folder holds no GLB, or not even one fits.
    """
    sizes = {name: (folder / f"{name}.glb").stat().st_size for name in asset_names(folder)}
    file, names = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(sizes, key=lambda name: (not name.startswith(FIRST), sizes[name])):
            small = lzma.compress(reduced(folder / f"{name}.glb"))
            if file.tell() + len(small) + MARGIN > most_bytes:
                continue
            entry = tarfile.TarInfo(f"{name}{SUFFIX}")
            entry.size = len(small)
            tar.addfile(entry, io.BytesIO(small))
            names.append(name)
    if not names:
        raise InputError(
            f"No GLB below {folder} fits into {most_bytes} bytes: give another folder or more --megabytes."
        )
    return file.getvalue(), names


def unpack(packed: Path, folder: Path) -> None:
    """Write the assets of a pack below a folder."""
    with tarfile.open(packed, mode="r:") as tar:
        for entry in tar:
            content = tar.extractfile(entry)
            assert content is not None
            path = folder / f"{entry.name.removesuffix(SUFFIX)}.glb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.decompress(content.read()))


def reduced(path: Path) -> bytes:
    """A GLB with small pictures of its base colours and none of anything else; unusual files are left as they are."""
    document = pygltflib.GLTF2.load_binary(str(path))
    blob = document.binary_blob()
    plain = blob is not None and len(document.buffers) == 1
    if not plain or any(view.extensions for view in document.bufferViews):
        return path.read_bytes()
    wanted, pictures = _base_colours(document), {}
    for number, image in enumerate(document.images):
        if image.bufferView is not None:
            view = document.bufferViews[image.bufferView]
            start = view.byteOffset or 0
            old = bytes(blob[start : start + view.byteLength])
            image.mimeType, pictures[image.bufferView] = _small_picture(old) if number in wanted else _NO_PICTURE
    parts, offset = [], 0
    for number, view in enumerate(document.bufferViews):
        start = view.byteOffset or 0
        content = pictures.get(number, bytes(blob[start : start + view.byteLength]))
        view.byteOffset, view.byteLength = offset, len(content)
        parts.append(content + b"\0" * (-len(content) % ALIGNMENT))
        offset += len(parts[-1])
    document.buffers[0].byteLength = offset
    document.set_binary_blob(b"".join(parts))
    return b"".join(document.save_to_bytes())


def _base_colours(document: pygltflib.GLTF2) -> set[int]:
    """Numbers of the images that colour a surface."""
    found: set[int] = set()
    for material in document.materials:
        look = material.pbrMetallicRoughness
        if look is not None and look.baseColorTexture is not None:
            texture: Any = document.textures[look.baseColorTexture.index]
            others = (extension.get("source") for extension in (texture.extensions or {}).values())
            found |= {source for source in (texture.source, *others) if source is not None}
    return found


def _small_picture(data: bytes) -> tuple[str, bytes]:
    """Type and bytes of a picture of at most `TEXTURE_SIDE` pixels a side."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    if picture.getextrema()[3][0] == 255:
        picture.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
        return "image/jpeg", file.getvalue()
    picture.save(file, "PNG", optimize=True)
    return "image/png", file.getvalue()


def _empty_picture() -> tuple[str, bytes]:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return "image/png", file.getvalue()


_NO_PICTURE = _empty_picture()
