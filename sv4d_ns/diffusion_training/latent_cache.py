"""Latents and image embeddings of rendered data, encoded once and kept in files.

Source: SV4D (arXiv 2407.17470) precomputes both. Only for frozen image encoders; one file for each object and orbit,
whose name carries the autoencoder, the image encoder and the picture size, so that another model makes its own.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion_training.data import Batch, RenderedSource, Source, resized, to_model_images
from sv4d_ns.diffusion_training.loss import ENCODED_AT_ONCE, Encoded, encode_pictures, from_latents
from sv4d_ns.diffusion_training.model import TrainedParts
from sv4d_ns.training_data.dataset import ObjectRecord, RenderedDataset, disk_errors
from sv4d_ns.training_data.orbits import Orbit
from sv4d_ns.utils.files import atomic_path, content_hash


class LatentCache:
    """Cached latents and embeddings of the rendered data of a run.

    Args:
        folder: where the files are.
        pipeline: whose autoencoder and image encoder make them.
        sources: of the run; only rendered ones are cached.
    """

    def __init__(self, folder: Path, pipeline: StableVideo4D2Pipeline, sources: Sequence[Source]):
        self.folder = folder
        self.pipeline = pipeline
        self.sources = sources
        self.key = _models_key(pipeline)

    def fill(self, process: int, processes: int, show: Callable[[int, int], None]) -> None:
        """Encode this process's share of what is not there yet."""
        # shared out before anything is looked for: the other processes write meanwhile
        share = [
            (source, record, Orbit(orbit))
            for source in self.sources
            if isinstance(source, RenderedSource)
            for record in source.dataset.records
            for orbit in record.orbits
        ][process::processes]
        waiting = [one for one in share if not self._usable(self._path(*one))]
        show(0, len(waiting))
        for count, (source, record, orbit) in enumerate(waiting, start=1):
            self._encode(source.dataset, record, orbit, self._path(source, record, orbit))
            show(count, len(waiting))

    def encoded(self, batch: Batch, device: torch.device) -> Encoded:
        """A batch of rendered samples from the files."""
        views, condition, embeddings = [], [], []
        for place in batch.places:
            assert place is not None
            source = self.sources[place.source]
            assert isinstance(source, RenderedSource)
            with safe_open(self._path(source, place.record, place.orbit), "pt") as file:
                latents, vectors = file.get_slice("latents"), file.get_slice("embeddings")
                rows = [latents[frame] for frame in place.frames]
                views.append(torch.stack([row[place.views[1:]] for row in rows]))
                condition.append(torch.stack([row[place.views[0]] for row in rows]))
                embeddings.append(torch.stack([vectors[frame][place.views[0]] for frame in place.frames]))
        stacked = [torch.stack(part).float().to(device) for part in (views, condition, embeddings)]
        return from_latents(self.pipeline, batch, stacked[0], stacked[1], None, stacked[2], None)

    def _path(self, source: RenderedSource, record: ObjectRecord, orbit: Orbit) -> Path:
        name = content_hash(self.key, record.__dict__)[:12]
        return self.folder / f"{record.name}.{orbit.value}.{name}.safetensors"

    @staticmethod
    def _usable(path: Path) -> bool:
        try:
            with safe_open(path, "pt") as file:
                return {"latents", "embeddings"} <= set(file.keys())
        except (SafetensorError, OSError):
            return False

    @torch.no_grad()
    def _encode(self, dataset: RenderedDataset, record: ObjectRecord, orbit: Orbit, path: Path) -> None:
        pipeline, channels = self.pipeline, self.pipeline.vae.config.in_channels
        parts = TrainedParts(pipeline.unet, pipeline.image_encoder)
        device = pipeline.vae.device
        latents, embeddings = [], []
        for frame in range(record.frames):
            pictures = dataset.pictures(record, orbit, [frame], list(range(record.views)))
            shown = resized(pictures, pipeline.config.image_size)[0]
            images = to_model_images(shown, channels, record.background).to(device)
            latents.append(encode_pictures(pipeline, images).half().cpu())
            vectors = [parts.embed(part[None])[0] for part in images.split(ENCODED_AT_ONCE)]
            embeddings.append(torch.cat(vectors).half().cpu())
        with disk_errors(path), atomic_path(path) as temporary:
            tensors = {"latents": torch.stack(latents), "embeddings": torch.stack(embeddings)}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _models_key(pipeline: StableVideo4D2Pipeline) -> str:
    """Tells autoencoders and image encoders apart by a checksum of all their weights."""
    sums = []
    for module in (pipeline.vae, pipeline.image_encoder):
        total = 0
        for tensor in module.state_dict().values():
            total = zlib.crc32(tensor.detach().cpu().float().numpy().tobytes(), total)
        sums.append(total)
    return content_hash(sums, pipeline.config.image_size)
