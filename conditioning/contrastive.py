"""Contrastive training of a small CLIP on captioned pictures (Radford et al. 2021, arXiv 2103.00020, fig. 3).

Procedural and product captions repeat, so a batch holds the same caption more than once. Equal captions share the
target evenly (UniCL, arXiv 2204.03610): none is another's negative. While the text tower gives them equal features
the loss is that of plain InfoNCE, which can't tell them apart either; its least value is the entropy of the
targets, not 0.

Captions are trained as the diffusion later uses them: padded, with no attention mask. The causal mask already
hides the padding from the end token, which alone enters this loss, so a mask would change nothing here; it
would change the hidden states of the padding itself, which the UNet reads.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from conditioning.token_tasks import TokenTasks
from conditioning.tokenizer import save_tokenizer
from ldm.errors import UserError

MAX_LOGIT_SCALE = math.log(100)  # sec. 2.5
_TOKEN_STD = 1.0  # of the first token embeddings; transformers' 0.02 is drowned by what the layers add
MEAN = STD = 0.5  # of the vision tower's input: pictures in [-1, 1] go in as they are


def build_clip(
    tokenizer: CLIPTokenizer,
    *,
    text_width: int,
    text_layers: int,
    text_heads: int,
    vision_width: int,
    vision_layers: int,
    vision_heads: int,
    patch_size: int,
    image_size: int,
    projection_dim: int,
    hidden_act: str = "gelu",
) -> CLIPModel:
    """A CLIPModel from random weights (torch's default generator); vocabulary, ids and length are the tokenizer's.

    Raises UserError when the numbers don't fit one another.
    """
    for tower, width, heads in (("text", text_width, text_heads), ("vision", vision_width, vision_heads)):
        if width % heads:
            raise UserError(f"{tower} width {width} isn't divisible by {heads} heads")
    if image_size % patch_size:
        raise UserError(f"pictures of {image_size} a side can't be cut into patches of {patch_size}")
    clip = CLIPModel(
        CLIPConfig(
            text_config={
                "hidden_size": text_width,
                "intermediate_size": 4 * text_width,
                "num_hidden_layers": text_layers,
                "num_attention_heads": text_heads,
                "hidden_act": hidden_act,
                "projection_dim": projection_dim,
                "max_position_embeddings": tokenizer.model_max_length,
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "hidden_size": vision_width,
                "intermediate_size": 4 * vision_width,
                "num_hidden_layers": vision_layers,
                "num_attention_heads": vision_heads,
                "hidden_act": hidden_act,
                "projection_dim": projection_dim,
                "patch_size": patch_size,
                "image_size": image_size,
            },
            projection_dim=projection_dim,
        )
    )
    # The loss sees the end token alone, but the UNet reads every token: let each say its own word loudly from the start.
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=_TOKEN_STD)
    nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=_TOKEN_STD / 2)
    return clip


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    caption_ids: Tensor,
    *,
    gather: bool = True,
) -> Tensor:
    """Symmetric cross-entropy between pictures and captions of a batch, in nats.

    image_features, text_features (b, d), of any length; logit_scale () the log of the inverse temperature, at
    most ln 100; caption_ids (b,) int64, equal for equal captions. Features are compared in fp32 or better.

    With `gather` and several processes, the batch is that of all of them: each has the same b, each gets the
    same loss, and the gradient averaged over processes (as DistributedDataParallel does) is the whole
    batch's.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = (
            F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            for x in (image_features, text_features)
        )
        if gather and distributed.is_available() and distributed.is_initialized():
            image, text, caption_ids = (_Gather.apply(x) for x in (image, text, caption_ids))
        # The excess is taken off as a constant: clamp's gradient is 0 at the limit already, with no way back.
        scale = logit_scale - (logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        logits = scale.exp() * image @ text.T  # (n pictures, n captions)
        same = (caption_ids[:, None] == caption_ids).to(logits.dtype)  # (n, n), symmetric
        targets = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class _Gather(torch.autograd.Function):
    """The rows of all processes, in the order of their ranks.

    Every process computes the whole loss, so each already holds the gradient of its own rows. It is
    multiplied by the number of processes because averaging over them divides by it, and a row sends its
    gradient from one only.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first = distributed.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows] * distributed.get_world_size()


class Contrastive(nn.Module):
    """A CLIP and its losses as one module, so that DistributedDataParallel can wrap them."""

    def __init__(self, clip: CLIPModel, tasks: TokenTasks | None = None) -> None:
        super().__init__()
        self.clip, self.tasks = clip, tasks

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        caption_ids: Tensor,
        *,
        gather: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels (b, 3, h, w) in [-1, 1], input_ids (b, n), caption_ids (b,) → loss () and detached metrics.

        The retrieval metrics are over this process's rows: chance is about 1/b.
        """
        with torch.no_grad():  # the weight itself too, lest it drift on beyond the limit and be long in returning
            self.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        read = self.clip.text_model(input_ids=input_ids)
        image, text = self.image_features(pixels), self.clip.text_projection(read.pooler_output)
        loss = contrastive_loss(image, text, self.clip.logit_scale, caption_ids, gather=gather)
        metrics = retrieval_accuracy(image.detach(), text.detach(), caption_ids, ranks=(1,))
        metrics["logit_scale"] = self.clip.logit_scale.detach().exp()
        if self.tasks is not None:
            end = self.clip.text_model.config.eos_token_id
            more, figures = self.tasks(read.last_hidden_state, input_ids, end, pixels)
            loss, metrics = loss + more, metrics | figures
        return loss, metrics

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (b, 3, h, w) in [-1, 1] → (b, projection_dim), not normalised."""
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """input_ids (b, n) → (b, projection_dim), not normalised."""
        return self.clip.text_projection(self.clip.text_model(input_ids=input_ids).pooler_output)


def retrieval_accuracy(
    image_features: Tensor, text_features: Tensor, caption_ids: Tensor, *, ranks: tuple[int, ...] = (1, 5)
) -> dict[str, Tensor]:
    """Share of pictures whose caption is among the k captions nearest to them, and the reverse.

    image_features, text_features (n, d); caption_ids (n,). Any picture or caption with an equal caption is
    right, and equal captions stand once among the k. Ranks beyond n are left out. Values are () tensors.
    """
    image, text = (F.normalize(x.float(), dim=-1) for x in (image_features, text_features))
    similarity = image @ text.T  # (n pictures, n captions)
    same = caption_ids[:, None] == caption_ids  # (n, n), symmetric
    repeated = same.tril(-1).any(1)  # (n,): has an equal caption before it
    found = {}
    for k in (k for k in ranks if k <= len(same)):
        captions = similarity.masked_fill(repeated, -math.inf).topk(k, dim=1).indices  # (n, k)
        pictures = similarity.T.topk(k, dim=1).indices  # (n, k)
        for name, nearest in (("image_to_text", captions), ("text_to_image", pictures)):
            found[f"{name}@{k}"] = same.gather(1, nearest).any(1).float().mean()
    return found


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Writes a whole CLIP: what CLIPModel, CLIPProcessor and ClipTextEncoder.load read."""
    folder = Path(folder)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = ["CLIPModel"], model.dtype
    config.save_pretrained(folder)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)
    side = model.vision_model.config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    text = json.dumps(preprocessor, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
