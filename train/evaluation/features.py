"""Feature networks of Fréchet distances: Inception (Heusel et al. 2017, arXiv 1706.08500), CLIP and DINOv2.

Papers report Inception's distance; DINOv2's agrees best with people (Stein et al. 2023, arXiv 2306.04675). Distances in
different features aren't comparable, nor are distances over different numbers of images.
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, Dinov2Model, PreTrainedConfig
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from autoencoder.perceptual import load_tower, preprocessing
from ldm.errors import UserError, one_line
from ldm.formats.hub import is_hub_id

ALIASES = {"clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-base"}
ACCEPTED = "'inception', 'inception:WEIGHTS.pth', 'dinov2', 'clip', or a folder or hub id of a CLIP or a DINOv2"
_PROJECTION = "visual_projection.weight"


def eight_bits(pixels: Tensor) -> Tensor:
    """Convert images in [−1, 1] to whole numbers in [0, 255], as in a file; float32, clipped."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()


class Features(nn.Module):
    """Network from images (b, 3, H, W) in [−1, 1] to features (b, dim), float32, without gradient.

    Images are rounded to 8 bits first, so that decoded images have the same features as saved ones.
    """

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.name, self.dim = name, dim


class InceptionFeatures(Features):
    """The 2048 features of FID's original Inception, through torch-fidelity.

    Images are resized as in TensorFlow 1, without antialiasing, to give the distance of the literature. Raises
    UserError without torch-fidelity, or if the weights can't be loaded (it downloads them unless given a file).
    """

    def __init__(self, weights: str | None = None) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3  # needs torch-fidelity, which is optional

        super().__init__("inception", 2048)
        try:
            path = weights
            if path is None:
                from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
                path = str(Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name)
            # torch-fidelity loads it as a pickle, which can run any code: only plain weights may reach it.
            torch.load(path, map_location="cpu", weights_only=True)
            network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=path, antialias=False
            )
        except ModuleNotFoundError:
            raise UserError("features 'inception' need torch-fidelity: pip install torch-fidelity") from None
        except pickle.UnpicklingError:  # whose own message advises to trust the file
            raise UserError(f"features 'inception': {path!r} holds something else than tensors") from None
        except (OSError, RuntimeError, EOFError, TypeError) as error:
            source = "its download" if weights is None else repr(weights)
            raise UserError(f"features 'inception' can't be loaded from {source}: {one_line(error)}") from None
        self.network = network
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(eight_bits(pixels.to(next(self.parameters()).device)).to(torch.uint8)).float()


class TowerFeatures(Features):
    """Features of a whole image from a CLIP image tower or a DINOv2, resized to its side (bicubic, antialiased)."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, tower: nn.Module, output: str, dim: int, side: int, processing: dict) -> None:
        """`output` names the field of the tower's output; `processing` has image_mean and image_std, 3 numbers each."""
        super().__init__(name, dim)
        self.tower, self.output, self.side = tower, output, side
        self.register_buffer("mean", torch.tensor(processing["image_mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processing["image_std"]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        x = eight_bits(pixels.to(self.mean.device)) / 255
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        return self.tower(pixel_values=(x - self.mean) / self.std)[self.output]


def load_features(name: str) -> Features:
    """Load a frozen network: inception, inception:WEIGHTS.pth, dinov2, clip, or a folder or hub id of a CLIP or DINOv2.

    A transformers model must have safetensors weights and one of the model_types clip, clip_vision_model (its image
    embedding, or the pooled output if the weights have no projection) or dinov2 (the CLS token). Raises UserError
    otherwise.
    """
    if name == "inception" or name.startswith("inception:"):
        return InceptionFeatures(name.partition(":")[2] or None)
    where = ALIASES.get(name, name)
    if not (name in ALIASES or Path(where).is_dir() or is_hub_id(where)):
        raise UserError(f"no features {name!r}: accepted are {ACCEPTED}")
    try:
        return _load_tower(name, where)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"can't load features {name!r}: {one_line(error)}; accepted are {ACCEPTED}") from None


def _load_tower(name: str, where: str) -> TowerFeatures:
    match PreTrainedConfig.get_config_dict(where)[0].get("model_type"):
        case "clip" | "clip_vision_model":
            tower, missing = load_tower(CLIPVisionModelWithProjection, where)
            config = tower.config
            output, dim, side = "image_embeds", config.projection_dim, config.image_size
            processing = preprocessing(where, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
            if _PROJECTION in missing:
                tower, output, dim = tower.vision_model, "pooler_output", config.hidden_size
                missing.remove(_PROJECTION)
        case "dinov2":
            tower, missing = load_tower(Dinov2Model, where)
            output, dim = "pooler_output", tower.config.hidden_size
            processing = preprocessing(where, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            # Its positions adapt to any side: the published models were trained at 518, and are used at 224.
            crop = processing.get("crop_size", tower.config.image_size)
            side = crop["height"] if isinstance(crop, dict) else crop
        case None:
            raise UserError(f"features {name!r} have no config.json that says a model_type: accepted are {ACCEPTED}")
        case kind:
            raise UserError(
                f"features {name!r} are of model_type {kind!r}: accepted are clip, clip_vision_model, dinov2"
            )
    if missing:
        raise UserError(f"features {name!r} lack weights ({len(missing)}), among them {min(missing)}")
    return TowerFeatures(name, tower, output, dim, side, processing)
