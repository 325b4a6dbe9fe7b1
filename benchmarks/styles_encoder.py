"""Measure how well a stage 0 separates the captions of emoji in styles: the retrieval scores of `evaluate.py`.

    python benchmarks/styles_encoder.py runs/styles/clip/model data/styles

The features of a caption take the place of a generated image's. One and a half minutes on one core.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import CLIPModel

from conditioning.contrastive import Contrastive
from conditioning.tokenizer import load_tokenizer, tokenize
from train.config.data import SourceConfig
from train.data.order.permutation import choose
from train.data.synthetic.emoji_styles import SPLITS
from train.evaluation.retrieval import retrieval
from train.evaluation.styles import open_styles

BATCH = 256
CAPTIONS = 1000  # of each split


@torch.no_grad()
def main(folder: str, data: str) -> None:
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), load_tokenizer(Path(folder))
    towers, source = Contrastive(clip), SourceConfig()
    images, labels = open_styles(data, source.columns(True))
    framing = source.center_framing(clip.config.vision_config.image_size)
    features = torch.cat([towers.image_features(pixels) for pixels in images.batches(framing, BATCH)])
    for split in SPLITS:
        members = images.indices(split)
        right = [members[k] for k in choose(min(CAPTIONS, len(members)), len(members), 0)]
        ids = tokenize(tokenizer, [images.caption(k) for k in right])
        made = torch.cat([towers.text_features(part) for part in ids.split(BATCH)])
        scores = retrieval(normalize(made, dim=-1), right, normalize(features, dim=-1), labels, 0)
        print(f"{split}, {len(right)} captions:", *(f"{name} {value:.3f}" for name, value in vars(scores).items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
