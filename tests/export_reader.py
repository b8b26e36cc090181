"""Reads a .glb with struct, json and numpy alone, independently of the writer and its library."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COMPONENTS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
DTYPES = {5123: np.uint16, 5125: np.uint32, 5126: np.float32}


@dataclass(frozen=True)
class GlbFile:
    json: dict[str, Any]
    binary: bytes

    def accessor(self, index: int) -> np.ndarray:
        entry = self.json["accessors"][index]
        view = self.json["bufferViews"][entry["bufferView"]]
        count = entry["count"] * COMPONENTS[entry["type"]]
        flat = np.frombuffer(self.binary, DTYPES[entry["componentType"]], count, view.get("byteOffset", 0))
        return flat.reshape(entry["count"], -1)

    def posed(self, attribute: str) -> tuple[np.ndarray, np.ndarray]:
        """Seconds [t] and the attribute [t, n, 3] with the animation's weights applied at each keyframe."""
        primitive = self.json["meshes"][0]["primitives"][0]
        sampler = self.json["animations"][0]["samplers"][0]
        seconds = self.accessor(sampler["input"])[:, 0]
        weights = self.accessor(sampler["output"]).reshape(len(seconds), -1)
        targets = np.stack([self.accessor(target[attribute]) for target in primitive["targets"]])
        return seconds, self.accessor(primitive["attributes"][attribute]) + np.einsum("tk,kni->tni", weights, targets)


def read_glb(path: Path) -> GlbFile:
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    json_length, json_type = struct.unpack_from("<I4s", data, 12)
    binary_length, binary_type = struct.unpack_from("<I4s", data, 20 + json_length)
    assert (json_type, binary_type) == (b"JSON", b"BIN\0")
    start = 28 + json_length
    return GlbFile(json.loads(data[20 : 20 + json_length]), data[start : start + binary_length])
