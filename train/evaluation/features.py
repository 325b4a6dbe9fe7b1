"""Feature networks for Fréchet distances: Inception (Heusel et al. 2017, arXiv 1706.08500), CLIP and DINOv2.

Papers usually report the distance in Inception's features; the one in DINOv2's agrees best with human judgement (Stein
et al. 2023, arXiv 2306.04675). Distances in different features, or over different numbers of images, can't be compared.
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ldm.errors import UserError, one_line
from ldm.files import open_regular, read_json
from ldm.formats.hub import is_hub_id, model_folder

ALIASES = {"clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-base"}
ACCEPTED = "'inception', 'inception:WEIGHTS.pth', 'dinov2', 'clip', or the folder or hub id of a CLIP or DINOv2"
_PIXELS = 32  # largest side in which pixels are compared
_PROJECTION = "visual_projection.weight"


def eight_bits(pixels: Tensor) -> Tensor:
    """Convert images in [−1, 1] to the 8-bit values of an image file: whole numbers in [0, 255], float32, clipped."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()


class Features(nn.Module):
    """Network from images (b, 3, H, W) in [−1, 1] to features (b, dim), float32, without gradient.

    Images are rounded to 8 bits first, so that decoded images have the same features as saved ones.
    """

    def __init__(self, name: str, dim: int, resizing: str = "") -> None:
        """resizing: description of the resizing, for reports."""
        super().__init__()
        self.name, self.dim, self.resizing = name, dim, resizing
        self.compares_text = False
        """Whether the features can be compared with a CLIP's features of texts."""


class PixelFeatures(Features):
    """The values of an image's pixels in [0, 1], reduced to at most 32 × 32 by averaging, divided by √dim.

    So the distance of two images is the root of their mean squared difference.
    """

    def __init__(self, side: int) -> None:
        """side: side of the images."""
        self.side = min(side, _PIXELS)
        super().__init__("pixels", 3 * self.side**2, f"{self.side} px, averaged" if side > _PIXELS else "")

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(eight_bits(pixels) / 255, self.side).flatten(1) / self.dim**0.5


class InceptionFeatures(Features):
    """The 2048 features of the original Inception of FID, computed by torch-fidelity.

    Images are resized as in TensorFlow 1, without antialiasing, so that distances can be compared with published ones.
    weights: file of the weights; None: downloaded. Raises UserError if torch-fidelity isn't installed or the weights
    can't be loaded.
    """

    def __init__(self, weights: str | None = None) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3  # needs torch-fidelity, which is optional

        super().__init__("inception", 2048, "299 px, bilinear as in TensorFlow 1, without antialiasing")
        try:
            path = weights
            if path is not None:
                open_regular(path).close()  # raises OSError for a pipe, which might never end
            if path is None:
                from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
                path = str(Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name)
            # torch-fidelity loads the file as a pickle, which can run any code: check that it contains only tensors.
            torch.load(path, map_location="cpu", weights_only=True)
            network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=path, antialias=False
            )
        except ModuleNotFoundError:
            raise UserError("features 'inception' need torch-fidelity: run pip install torch-fidelity") from None
        except pickle.UnpicklingError:  # its own message advises to trust the file
            raise UserError(f"features 'inception': {path!r} contains something other than tensors") from None
        except (OSError, RuntimeError, EOFError, TypeError) as error:
            problem = "can't be downloaded" if weights is None else f"can't be loaded from {weights!r}"
            raise UserError(f"features 'inception' {problem}: {one_line(error)}") from None
        self.network = network
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(eight_bits(pixels.to(next(self.parameters()).device)).to(torch.uint8)).float()


class TowerFeatures(Features):
    """Features from a CLIP image tower or a DINOv2. Images are resized (bicubic, antialiased), not cropped."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, tower: nn.Module, output: str, dim: int, side: int, processing: dict) -> None:
        """Wrap a tower.

        output: name of the output field with the features. side: side of the tower's input images, in pixels.
        processing: mapping with image_mean and image_std.
        """
        super().__init__(name, dim, f"{side} px, bicubic, antialiased")
        self.tower, self.output, self.side = tower, output, side
        self.compares_text = output == "image_embeds"
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

    A transformers model must have safetensors weights and model_type clip, clip_vision_model or dinov2. The features
    are a CLIP's image embedding (its pooled output if it has no projection) or a DINOv2's CLS token. Raises UserError
    for other models.
    """
    if name == "inception" or name.startswith("inception:"):
        return InceptionFeatures(name.partition(":")[2] or None)
    model = str(model_folder(ALIASES.get(name, name)))
    if not (name in ALIASES or Path(model).is_dir() or is_hub_id(model)):
        raise UserError(f"unknown features {name!r}: use {ACCEPTED}")
    try:
        return _load_tower(name, model)
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file, transformers may raise any error
        raise UserError(f"features {name!r} can't be loaded: {one_line(error)}; use {ACCEPTED}") from None


def has_image_tower(folder: str) -> bool:
    """Return whether a local folder, or that of a run, has a CLIP with both towers."""
    try:
        config = read_json(Path(model_folder(folder)) / "config.json") if folder else {}
    except (OSError, ValueError, UserError):
        return False
    return config.get("model_type") == "clip" and "vision_config" in config


def _load_tower(name: str, model: str) -> TowerFeatures:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model, PreTrainedConfig

    from autoencoder.perceptual import load_tower, preprocessing

    match PreTrainedConfig.get_config_dict(model)[0].get("model_type"):
        case "clip" | "clip_vision_model":
            tower, missing = load_tower(CLIPVisionModelWithProjection, model)
            config = tower.config
            output, dim, side = "image_embeds", config.projection_dim, config.image_size
            processing = preprocessing(model, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
            if _PROJECTION in missing:
                tower, output, dim = tower.vision_model, "pooler_output", config.hidden_size
                missing.remove(_PROJECTION)
        case "dinov2":
            tower, missing = load_tower(Dinov2Model, model)
            output, dim = "pooler_output", tower.config.hidden_size
            processing = preprocessing(model, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            # Position embeddings adapt to any side: the published models were trained at 518, and are used at 224.
            crop = processing.get("crop_size", tower.config.image_size)
            side = crop["height"] if isinstance(crop, dict) else crop
        case None:
            raise UserError(f"features {name!r}: no config.json with a model_type; use {ACCEPTED}")
        case kind:
            raise UserError(
                f"features {name!r}: config.json has model_type {kind!r}; must be clip, clip_vision_model or dinov2"
            )
    if missing:
        raise UserError(f"features {name!r}: {len(missing)} weights are missing, e.g. {min(missing)}")
    return TowerFeatures(name, tower, output, dim, side, processing)
