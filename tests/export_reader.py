"""Reads a .glb with struct, json and numpy alone, independently of the writer and its library."""

import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
DTYPES = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}


@dataclass(frozen=True)
class GlbFile:
    json: dict[str, Any]
    binary: bytes

    @property
    def primitive(self) -> dict[str, Any]:
        return self.json["meshes"][0]["primitives"][0]

    def view(self, index: int) -> bytes:
        view = self.json["bufferViews"][index]
        start = view.get("byteOffset", 0)
        return self.binary[start : start + view["byteLength"]]

    def accessor(self, index: int) -> np.ndarray:
        entry = self.json["accessors"][index]
        flat = np.frombuffer(self.view(entry["bufferView"]), DTYPES[entry["componentType"]])
        return flat[: entry["count"] * COMPONENTS[entry["type"]]].reshape(entry["count"], -1)

    def attribute(self, name: str) -> np.ndarray:
        return self.accessor(self.primitive["attributes"][name])

    def image(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.view(self.json["images"][0]["bufferView"]))).convert("RGB"))

    def channels(self) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
        """(node, path) to key times [t] and values [t, ...] of the first animation."""
        animation, found = self.json["animations"][0], {}
        for channel in animation["channels"]:
            if "node" not in channel["target"]:  # it moves no node
                continue
            sampler = animation["samplers"][channel["sampler"]]
            seconds, values = self.accessor(sampler["input"])[:, 0], self.accessor(sampler["output"])
            found[channel["target"]["node"], channel["target"]["path"]] = seconds, values.reshape(len(seconds), -1)
        return found

    def texture_moves(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Offset and scale of the texture coordinates at each key time [t, 2] (KHR_animation_pointer, STEP)."""
        animation, found = self.json["animations"][0] if self.json.get("animations") else {"channels": []}, {}
        for channel in animation["channels"]:
            pointer = channel["target"].get("extensions", {}).get("KHR_animation_pointer", {}).get("pointer", "")
            head, _, name = pointer.rpartition("/")
            if head.endswith("/baseColorTexture/extensions/KHR_texture_transform"):
                sampler = animation["samplers"][channel["sampler"]]
                assert sampler["interpolation"] == "STEP" and channel["target"]["path"] == "pointer"
                found[name] = self.accessor(sampler["output"])
        return (found["offset"], found["scale"]) if found else None

    def posed(self, attribute: str) -> tuple[np.ndarray, np.ndarray]:
        """Seconds [t] and the attribute [t, n, 3] with the animation's morph weights applied at each keyframe."""
        seconds, weights = next(value for (_, path), value in self.channels().items() if path == "weights")
        targets = np.stack([self.accessor(target[attribute]) for target in self.primitive["targets"]])
        return seconds, self.attribute(attribute) + np.einsum("tk,kni->tni", weights, targets)

    def skinned(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds [t] and positions [t, n, 3]: joint matrices from the node hierarchy, as the specification says."""
        skin, channels = self.json["skins"][0], self.channels()
        parent = {child: i for i, node in enumerate(self.json["nodes"]) for child in node.get("children", [])}
        seconds = next(iter(channels.values()))[0]
        inverse = self.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).swapaxes(1, 2)
        rest = np.c_[self.attribute("POSITION"), np.ones(len(self.attribute("POSITION")))]
        joints, weights = self.attribute("JOINTS_0"), self.attribute("WEIGHTS_0")
        posed = []
        for t in range(len(seconds)):

            def world(node: int, t: int = t) -> np.ndarray:
                local = self._local(node, channels, t)
                return world(parent[node]) @ local if node in parent else local

            matrices = np.stack([world(node) for node in skin["joints"]]) @ inverse
            posed.append(np.einsum("nk,nkij,nj->ni", weights, matrices[joints], rest)[:, :3])
        return seconds, np.stack(posed)

    def _local(self, node: int, channels: dict, t: int) -> np.ndarray:
        entry, matrix = self.json["nodes"][node], np.eye(4)
        move = channels[node, "translation"][1][t] if (node, "translation") in channels else entry.get("translation")
        turn = channels[node, "rotation"][1][t] if (node, "rotation") in channels else entry.get("rotation")
        if turn is not None:
            x, y, z, w = np.asarray(turn, float) / np.linalg.norm(turn)
            matrix[:3, :3] = [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        if move is not None:
            matrix[:3, 3] = move
        return matrix


def read_glb(path: Path) -> GlbFile:
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    json_length, json_type = struct.unpack_from("<I4s", data, 12)
    binary_length, binary_type = struct.unpack_from("<I4s", data, 20 + json_length)
    assert (json_type, binary_type) == (b"JSON", b"BIN\0")
    start = 28 + json_length
    return GlbFile(json.loads(data[20 : 20 + json_length]), data[start : start + binary_length])
