"""Stage 0: train a small CLIP and its tokenizer on the captions and images of the dataset."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from conditioning.contrastive import Contrastive, retrieval_accuracy, save_clip
from conditioning.tokenizer import load_tokenizer, save_tokenizer, tokenize, train_tokenizer
from ldm.errors import UserError
from ldm.libraries import CLIPTokenizer
from train.config.clip import ClipConfig
from train.data.batches.images import ImageDataset, Inputs
from train.data.batches.records import ImageBatch, Record
from train.data.store.atomic import atomic_folder
from train.engine.changes import Saved
from train.engine.checkpoint import Checkpoints
from train.engine.compilation import compile_networks
from train.engine.device import open_accelerator
from train.engine.ema import Ema
from train.engine.loop import fit
from train.engine.model_card import About
from train.engine.open_data import open_inputs, select_images
from train.engine.publish import publisher
from train.engine.run import Run, open_run
from train.engine.stage import Hooks, Phase, StepOutput, Validation
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8
from train.stages.caption_warnings import TruncatedCaptions
from train.stages.cards import about_clip

_TOKENIZER_IMAGES = 1_000_000  # most images whose captions train the tokenizer; spread evenly over the dataset
_VALIDATION = 1000  # most held-out images among whose captions the matching one is searched


@dataclass(frozen=True, eq=False)
class ClipBatch(Record):
    """Images and their tokenised captions."""

    pixels: Tensor
    """Pixels, (b, 3, h, w) in [−1, 1]."""
    input_ids: Tensor
    """Token ids of the captions, (b, n)."""
    caption_ids: Tensor
    """Ids of the captions, (b,), equal for equal captions."""


class ContrastiveLoss(nn.Module):
    """The CLIP and its contrastive loss, the module of the phase that trains it."""

    def __init__(self, contrastive: Contrastive) -> None:
        super().__init__()
        self.contrastive = contrastive

    def forward(self, batch: ClipBatch) -> StepOutput:
        loss, metrics = self.contrastive(batch.pixels, batch.input_ids, batch.caption_ids)
        return StepOutput(loss, metrics, batch)


class ClipStage:
    """Stage 0 for the training loop: batches, loss, validation and export."""

    def __init__(self, run: Run[ClipConfig], inputs: Inputs, tokenizer: CLIPTokenizer) -> None:
        self.run, self.config, self.inputs, self.tokenizer = run, run.config, inputs, tokenizer
        config = run.config
        loss = ContrastiveLoss(config.build(tokenizer).to(run.accelerator.device))
        self.phases = [Phase("clip", loss, config.optimizer.build(loss), config.optimizer.lr)]
        self.ema = Ema(loss.contrastive.clip, config.ema_decay)
        compile_networks(run, [loss.contrastive.clip.text_model, loss.contrastive.clip.vision_model])
        self.truncated = TruncatedCaptions(run.print, "--text.max-length")
        self.training = inputs.images(config.input.framing(), config.seed)
        self.held_out = ImageDataset(inputs.held_out, config.input.center_framing(config.input.resolution), config.seed)

    def tokenised(self, part: ImageBatch) -> ClipBatch:
        """Return the images and their tokenised captions, on the device."""
        with self.truncated.counted():
            ids = tokenize(self.tokenizer, part.captions)
        return ClipBatch(part.pixels, ids, torch.tensor([_id(c) for c in part.captions])).to(
            self.run.accelerator.device
        )

    def batches(self, start: int) -> Iterator[list[ImageBatch]]:
        counter = self.run.damage.counter(self.inputs.source.left_out, self.inputs.count)
        return self.run.feed.batches(self.training, start, counter)

    def prepare(self, step: int, parts: list[ImageBatch]) -> list[ClipBatch]:
        return [self.tokenised(part) for part in parts]

    def finish(self, step: int) -> None:
        pass

    @torch.no_grad()
    def held_out_features(self, count: int) -> tuple[Tensor, Tensor, Tensor, list[ImageBatch]]:
        """Return image features, caption features and caption ids of held-out examples, and their batches."""
        towers, b = Contrastive(self.ema.module), self.config.batch_size
        starts = range(0, count, b)
        raw = [
            self.held_out.__getitems__(list(range(k, min(k + b, count))))
            for k in self.run.print.progress(starts, len(starts), "validating")
        ]
        batches = [self.tokenised(batch) for batch in raw]
        image = torch.cat([towers.image_features(batch.pixels) for batch in batches])
        text = torch.cat([towers.text_features(batch.input_ids) for batch in batches])
        return image, text, torch.cat([batch.caption_ids for batch in batches]), raw

    def validate(self, step: int) -> Validation:
        count = min(len(self.held_out.source), _VALIDATION)
        image, text, ids, _ = self.held_out_features(count)
        accuracy = {name: float(share) for name, share in retrieval_accuracy(image, text, ids).items()}
        shares = ", ".join(f"{name} {share:.3f}" for name, share in accuracy.items())
        self.run.print(f"step {step}: retrieval accuracy among {count} held-out images: {shares}")
        return Validation({f"val_{name}": share for name, share in accuracy.items()})

    def sheet(self, path: Path) -> None:
        """Write a sheet of held-out images, each above the held-out caption with the nearest features."""
        count = min(len(self.held_out.source), _VALIDATION)
        image, text, _, raw = self.held_out_features(count)
        nearest = (nn.functional.normalize(image[:16], dim=-1) @ nn.functional.normalize(text, dim=-1).T).argmax(1)
        captions = [c for batch in raw for c in batch.captions]
        images = to_uint8(torch.cat([batch.pixels for batch in raw])[:16])
        save_sheet(sheet(in_rows(list(images), 4), [captions[k] for k in nearest.tolist()]), path)

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        if self.run.main:
            clip = self.ema.module
            assert isinstance(clip, CLIPModel)
            save_clip(clip, self.tokenizer, folder)
        return {}

    def about(self) -> About:
        return about_clip(self.config, self.ema.module, self.inputs)


def run_tokenizer(run: Run[ClipConfig], inputs: Inputs) -> CLIPTokenizer:
    """Return the tokenizer that was learned when the run was started, because other captions would give other tokens.

    It is in the run's folder; runs of earlier code have it only in model/. Raises UserError if it is missing and the
    captions have changed.
    """
    folder, text = run.folder, run.config.text
    continued = Checkpoints(folder.checkpoints).newest_step() > 0
    places = [path for path in (folder.tokenizer, folder.model) if (path / "tokenizer.json").is_file()]
    if continued and places:
        tokenizer = load_tokenizer(places[0])
    elif continued and Saved.read(folder.settings).earlier_data:
        raise UserError(f"--data: has changed, and {folder.tokenizer} is missing, which the run's captions need")
    else:
        tokenizer = train_tokenizer(inputs.source.captions(_TOKENIZER_IMAGES), text.vocab_size, text.max_length)
    run.accelerator.wait_for_everyone()
    if run.main and not (continued and folder.tokenizer in places):
        with atomic_folder(folder.tokenizer) as new:
            save_tokenizer(tokenizer, new)
    return tokenizer


def _id(caption: str) -> int:
    """Return a 56-bit hash of a caption, so that equal captions have equal ids in all processes."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=7).digest())


def train(config: ClipConfig, hooks: Hooks | None = None, *, with_changes: bool = False) -> None:
    """Train stage 0 into `config.out`, or continue the run in it.

    with_changes: whether the run may continue with other settings, as with --resume-with-changes.
    """
    accelerator = open_accelerator(config)
    inputs = open_inputs(config.data, config.input)
    resolution, patch = config.input.resolution, config.image.patch_size
    if resolution % patch:
        raise UserError(f"input.resolution {resolution}: must be a multiple of image.patch_size {patch}")
    with open_run(config, accelerator, {"data": inputs.fingerprint}, with_changes=with_changes) as run:
        inputs = select_images(inputs, run)
        stage = ClipStage(run, inputs, run_tokenizer(run, inputs))
        fit(run, stage, publisher(run, stage), hooks)
