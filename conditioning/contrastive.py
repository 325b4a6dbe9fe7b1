"""Contrastive training of a small CLIP on captioned images (Radford et al. 2021, arXiv 2103.00020, fig. 3).

Procedural and product captions repeat, so a batch can have the same caption more than once. Equal captions share the
target evenly (UniCL, arXiv 2204.03610), so that none is a negative of another. Since the text tower gives them equal
features, the loss is that of plain InfoNCE, which can't distinguish them either. Its minimum is the entropy of the
targets, not 0.

Captions are used as in the diffusion later: padded, without an attention mask. The loss reads only the end token, and
the causal mask already hides the padding from it. So an attention mask wouldn't change the loss, but it would change
the hidden states of the padding, which the UNet reads.
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
from transformers import AttentionInterface, AttentionMaskInterface, CLIPModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from conditioning.token_tasks import TokenTasks
from conditioning.tokenizer import save_tokenizer
from ldm.errors import UserError
from ldm.libraries import CLIPConfig, CLIPTokenizer
from ldm.networks.attention_precision import needs_fp32

MAX_LOGIT_SCALE = math.log(100)  # sec. 2.5
_TOKEN_STD = 1.0  # of the initial token embeddings; transformers' 0.02 is small against what the layers add
_ATTENTION = "sdpa_fast_backward"  # our name in transformers' registry
MEAN = STD = 0.5  # normalisation of the vision tower's input, which is images in [-1, 1]


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
    """Build a CLIPModel with random weights (torch's default generator) and the tokenizer's vocabulary, ids and length.

    Raises UserError if the numbers don't fit together.
    """
    for tower, width, heads in (("text", text_width, text_heads), ("vision", vision_width, vision_heads)):
        if width % heads:
            raise UserError(f"{tower} width {width} isn't divisible by its {heads} heads")
    if image_size % patch_size:
        raise UserError(f"image size {image_size} isn't a multiple of the patch size {patch_size}")
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
    clip.set_attn_implementation(_ATTENTION)
    # The UNet reads every token, but the loss only the end token: large initial embeddings keep each token's own word.
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=_TOKEN_STD)
    nn.init.normal_(clip.text_model.embeddings.position_embedding.weight, std=_TOKEN_STD / 2)
    return clip


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Compute transformers' sdpa attention, in fp32 where that is faster."""
    if not needs_fp32(q):
        return sdpa_attention_forward(module, q, k, v, attention_mask, **how)
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, q.float(), k.float(), v.float(), attention_mask, **how)
    return out.to(q.dtype), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    caption_ids: Tensor,
    *,
    gather: bool = True,
) -> Tensor:
    """Return the symmetric cross-entropy between the images and captions of a batch, in nats.

    image_features, text_features (b, d), of any length; logit_scale (), the log of the inverse temperature, at
    most ln 100; caption_ids (b,) int64, equal for equal captions. Features are compared in fp32 or better.

    With `gather` and several processes, the batch is that of all processes. Each process has the same b and gets the
    same loss. The gradient averaged over processes (as DistributedDataParallel does) is that of the whole batch.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = (
            F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            for x in (image_features, text_features)
        )
        if gather and distributed.is_available() and distributed.is_initialized():
            image, text, caption_ids = (_Gather.apply(x) for x in (image, text, caption_ids))
        # The excess is subtracted as a constant: clamp's gradient is 0 at the limit, so the scale couldn't return.
        scale = logit_scale - (logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        logits = scale.exp() * image @ text.T  # (n images, n captions)
        same = (caption_ids[:, None] == caption_ids).to(logits.dtype)  # (n, n), symmetric
        targets = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class _Gather(torch.autograd.Function):
    """Function that gathers the rows of all processes, in the order of their ranks.

    Every process computes the whole loss, so each already has the gradient of its own rows. It is multiplied by the
    number of processes, since averaging over processes divides by it and a row's gradient comes from one process only.
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
        """Return the loss () and detached metrics.

        pixels (b, 3, h, w) in [-1, 1], input_ids (b, n), caption_ids (b,).
        The retrieval metrics are over this process's rows; chance is about 1/b.
        """
        with torch.no_grad():  # limit the weight itself too, or it could drift far above and return slowly
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
        """Return the features (b, projection_dim), not normalised, of pixels (b, 3, h, w) in [-1, 1]."""
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Return the features (b, projection_dim), not normalised, of input_ids (b, n)."""
        return self.clip.text_projection(self.clip.text_model(input_ids=input_ids).pooler_output)


def retrieval_accuracy(
    image_features: Tensor, text_features: Tensor, caption_ids: Tensor, *, ranks: tuple[int, ...] = (1, 5)
) -> dict[str, Tensor]:
    """Return the share of images whose caption is among the k captions nearest to them, and the reverse.

    image_features, text_features (n, d); caption_ids (n,). Any image or caption with an equal caption is correct, and
    equal captions count once among the k. Values of k above n are left out. The shares are scalar tensors.
    """
    image, text = (F.normalize(x.float(), dim=-1) for x in (image_features, text_features))
    similarity = image @ text.T  # (n images, n captions)
    same = caption_ids[:, None] == caption_ids  # (n, n), symmetric
    repeated = same.tril(-1).any(1)  # (n,): whether an equal caption comes before
    found = {}
    for k in (k for k in ranks if k <= len(same)):
        captions = similarity.masked_fill(repeated, -math.inf).topk(k, dim=1).indices  # (n, k)
        images = similarity.T.topk(k, dim=1).indices  # (n, k)
        for name, nearest in (("image_to_text", captions), ("text_to_image", images)):
            found[f"{name}@{k}"] = same.gather(1, nearest).any(1).float().mean()
    return found


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write a whole CLIP, which CLIPModel, CLIPProcessor and ClipTextEncoder.load can read."""
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
