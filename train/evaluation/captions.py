"""The CLIP score of images and their captions, and a CLIP's features of captions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.perceptual import load_tower
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import tokenize
from ldm.errors import UserError, one_line
from ldm.formats.hub import model_folder
from train.evaluation.features import ALIASES


class CaptionFeatures(nn.Module):
    """The text side of a CLIP: captions → features (n, d), comparable with those of its image tower.

    Raises UserError if the folder or hub id, or the name of load_features, has no complete CLIP.
    """

    def __init__(self, name: str) -> None:
        from transformers import CLIPTextModelWithProjection

        super().__init__()
        where = str(model_folder(ALIASES.get(name, name)))
        self.tokenizer = ClipTextEncoder.load(where).tokenizer
        try:
            self.tower, missing = load_tower(CLIPTextModelWithProjection, where)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # for a damaged file, transformers may raise any error
            raise UserError(f"features {name!r}: its text tower can't be loaded: {one_line(error)}") from None
        if missing:
            raise UserError(f"features {name!r}: {len(missing)} weights are missing, e.g. {min(missing)}")
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        ids = tokenize(self.tokenizer, captions)
        return self.tower(input_ids=ids.to(self.tower.device)).text_embeds.float()

    def all(self, captions: list[str], batch_size: int) -> Tensor:
        """Return the features of any number of captions, in batches, on the CPU."""
        starts = range(0, len(captions), batch_size)
        return torch.cat([self(captions[first : first + batch_size]).cpu() for first in starts])


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """Return 100 max(cosine, 0) of image and caption features, (n, d) each: (n,). Hessel et al. 2021, arXiv 2104.08718.

    The paper's factor is 2.5; 100 is that of torchmetrics and most tables.
    """
    return 100 * F.cosine_similarity(images.float(), captions.float(), dim=1).clamp_min(0)
