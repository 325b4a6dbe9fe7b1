"""Images that are generated for an evaluation, kept as files so that an interrupted evaluation continues."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import open_regular
from ldm.formats.hub import model_folder
from ldm.pipeline import LatentDiffusionPipeline
from train.data.store.atomic import plain_errors, write_text
from train.evaluation.diffusion import generate_batch

_ABOUT = "about.json"


class GeneratedImages:
    """One image for each caption, as NAME.png in a folder, generated where the file doesn't exist yet.

    seed + k seeds the noise of image k, whatever the batch size. metadata.jsonl beside the images contains the
    captions, so the folder is a dataset, which other programs can measure too.
    """

    def __init__(
        self,
        folder: Path,
        pipe: LatentDiffusionPipeline,
        captions: Sequence[str],
        about: Mapping[str, Any],
        *,
        batch_size: int,
        seed: int,
        **sampling: Any,
    ) -> None:
        """about: everything else that the images depend on. Images that were made with other settings are replaced.

        Raises UserError if the folder contains something else.
        """
        self.folder, self.pipe, self.captions = folder, pipe, captions
        self.batch_size, self.seed, self.sampling = batch_size, seed, sampling
        settings = json.dumps({**about, **sampling, "seed": seed}, sort_keys=True, indent=2) + "\n"
        stored = folder / _ABOUT
        if folder.is_dir() and any(folder.iterdir()) and not stored.is_file():
            raise UserError(f"{folder}: contains files that no evaluation made; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        if not stored.is_file() or stored.read_bytes() != settings.encode():
            for file in folder.glob("*.png"):
                file.unlink()
            write_text(stored, settings)
        rows = ({"file_name": self.path(k).name, "text": text} for k, text in enumerate(captions))
        write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def __len__(self) -> int:
        return len(self.captions)

    def path(self, k: int) -> Path:
        return self.folder / f"{k:06d}.png"

    def __getitem__(self, k: int) -> NDArray[np.uint8]:
        """Return image k (h, w, 3). Raises OSError if it wasn't generated completely."""
        try:
            with open_regular(self.path(k)) as file, Image.open(file, formats=["PNG"]) as image:
                return np.asarray(image.convert("RGB"))
        except (SyntaxError, ValueError) as error:
            raise OSError(f"{self.path(k)}: {error}") from error

    def batches(self) -> Iterator[Tensor]:
        """Yield all images in order, as batches (b, 3, h, w) in [−1, 1]."""
        starts = range(0, len(self), self.batch_size)
        for first in tqdm(starts, desc="generating", unit="batch", dynamic_ncols=True):
            numbers = range(first, min(first + self.batch_size, len(self)))
            try:
                images = np.stack([self[k] for k in numbers])
            except (OSError, ValueError):  # a file is missing or was interrupted
                images = self._generate(numbers)
            yield torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _generate(self, numbers: range) -> NDArray[np.uint8]:
        seeds = [self.seed + k for k in numbers]
        images = generate_batch(self.pipe, [self.captions[k] for k in numbers], seeds, **self.sampling)
        for k, image in zip(numbers, images, strict=True):
            with plain_errors(self.path(k)):
                Image.fromarray(image).save(self.path(k), "PNG")
        return images


def identity(model: str) -> dict[str, Any]:
    """Return a model's name and, for a folder, the sizes and times of its weights, which change with them."""
    folder = Path(model_folder(model))
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else [folder] if folder.is_file() else []
    return {"model": model, "weights": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]}
