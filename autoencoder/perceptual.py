"""Perceptual distances between images in the features of a frozen network, differentiable in the images."""

from importlib.resources import as_file, files
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, assert_never

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ldm.errors import UserError, one_line
from ldm.files import open_regular, read_json, require_plausible
from ldm.formats.hub import model_folder

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

Backbone = Literal["vgg", "alex"]
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # indices of the compared layers in torchvision's network
_SMALLEST = 64  # pixels per side, for which the distance was fitted; smaller images are enlarged to it


class Lpips(nn.Module):
    """LPIPS 0.1 (Zhang et al. 2018, arXiv 1801.03924, eq. 1) with an ImageNet VGG16 or AlexNet.

    (decoded, pixels), images (b, 3, H, W) in [−1, 1] → their mean distance, a scalar. weights: file of torchvision's
    weights of the backbone, .safetensors or a .pth without code; empty: torchvision downloads them. LPIPS's weights of
    the layers come with torchmetrics. Raises UserError if they can't be read.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone = "vgg", weights: str = "") -> None:
        from torchvision.models import alexnet, vgg16

        super().__init__()
        with torch.device("meta"):  # no random weights are allocated
            network = vgg16() if backbone == "vgg" else alexnet()
        taps = _TAPS[backbone]
        try:
            published = _published(backbone)
            state = _read(weights) if weights else published.get_state_dict(check_hash=True, weights_only=True)
            layers = {k.removeprefix("features."): v.float() for k, v in state.items() if k.startswith("features.")}
            network.features.load_state_dict(layers, assign=True)
        except Exception as error:  # a file with other contents can raise anything
            what = f"its weights {weights!r} can't be read" if weights else "its weights can't be downloaded"
            reason = one_line(error, 200)
            if isinstance(error, UnpicklingError):  # its message advises unsafe loading
                reason = "the file contains more than tensors"
            raise UserError(f"LPIPS with {backbone}: {what}: {reason}") from None
        for layer in network.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # in place it would change an activation that is compared
        starts = (0, *(t + 1 for t in taps))
        self.parts = nn.ModuleList(network.features[a : b + 1] for a, b in zip(starts, taps, strict=False))
        with as_file(files("torchmetrics") / "functional" / "image" / "lpips_models" / f"{backbone}.pth") as path:
            fitted = torch.load(path, map_location="cpu", weights_only=True)
        self.fitted = nn.ParameterList(fitted[f"lin{k}.model.1.weight"].flatten() for k in range(len(taps)))  # (c,)
        # ImageNet's statistics for images in [−1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return the activations (b, c, h, w), normalised to unit length over their channels, float32."""
        if (side := min(pixels.shape[-2:])) < _SMALLEST:
            ratio = _SMALLEST / side
            size = [round(s * ratio) for s in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        x, taken = (pixels - self.mean) / self.std, []
        for part in self.parts:
            x = part(x)
            taken.append(_unit(x, dim=1))
        return taken

    def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.features(pixels)
        each = [
            ((a - b).square().mean(dim=(2, 3)) * weight).sum(1)  # (b,); not a matrix product, which autocast rounds
            for a, b, weight in zip(self.features(decoded), target, self.fitted, strict=True)
        ]
        return torch.stack(each).sum(0).mean()


def downloaded_weights(backbone: Backbone) -> Path:
    """Return the file in which torchvision keeps a backbone's weights once it has downloaded them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(_published(backbone).url).name


def _published(backbone: Backbone) -> Any:
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    match backbone:
        case "vgg":
            return VGG16_Weights.IMAGENET1K_V1
        case "alex":
            return AlexNet_Weights.IMAGENET1K_V1
        case _:
            assert_never(backbone)


class ClipPerceptual(nn.Module):
    """Mean squared distance between unit-length features of all layers of a CLIP image tower, after Zhang et al. 2018.

    Without a network connection, the tower can be the one that stage 0 trained on the same images. Images
    (b, 3, H, W) in [−1, 1] are resized to the tower's side; (decoded, pixels) → a scalar. Raises UserError if the
    folder or hub id has no such tower.
    """

    tower: "CLIPVisionModel"
    mean: Tensor
    std: Tensor

    def __init__(self, where: str) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        where = str(model_folder(where))
        try:
            self.tower, missing = load_tower(CLIPVisionModel, where)
        except MemoryError:
            raise
        except Exception as error:  # for a damaged file, transformers may raise any error
            raise UserError(
                f"perceptual.model {where!r} can't be read as a CLIP with an image tower: {one_line(error)}"
            ) from None
        if missing:
            raise UserError(
                f"perceptual.model {where!r} has no weight {min(missing)}: a complete CLIP image tower is needed"
            )
        processing = preprocessing(where, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        self.register_buffer("mean", torch.tensor(processing["image_mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processing["image_std"]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return the hidden states of every layer, (b, tokens, width) each, of unit length, float32."""
        side = self.tower.config.image_size
        assert isinstance(side, int)
        if pixels.shape[-1] != side or pixels.shape[-2] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        hidden = self.tower((pixels / 2 + 0.5 - self.mean) / self.std, output_hidden_states=True).hidden_states
        return [_unit(x, dim=-1) for x in hidden]

    def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.features(pixels)
        each = [(a - b).square().sum(-1).mean() for a, b in zip(self.features(decoded), target, strict=True)]
        return torch.stack(each).mean()


def _unit(x: Tensor, dim: int) -> Tensor:
    """Return x / √(‖x‖² + 1e-8) in float32. The small number inside the root gives zero features a finite gradient."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + 1e-8)


def load_tower(kind: Any, where: str) -> tuple[Any, set[str]]:
    """Load a transformers model of class `kind`, float32, from a folder or hub id, and the names of missing weights.

    transformers would also load an adapter or a quantisation that the folder names, even from the hub: both are
    refused. For a damaged file, it may raise any error.
    """
    config = read_json(str(cached_file(where, "config.json")))
    require_plausible(config)
    if config.get("quantization_config"):
        raise UserError("its weights are quantised: use the original ones")
    if Path(where, "adapter_config.json").exists():
        raise UserError("it is an adapter: merge it into the model")
    model, info = kind.from_pretrained(where, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    return model, set(info["missing_keys"])


def preprocessing(where: str, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Read preprocessor_config.json of a vision model's folder or hub id. `mean` and `std` are the defaults.

    Raises UserError if it isn't a mapping, or if image_mean and image_std aren't three numbers each.
    """
    try:
        stored = read_json(str(cached_file(where, "preprocessor_config.json")))
    except OSError:  # the file is missing
        stored = {}
    except ValueError as error:
        raise UserError(f"preprocessor_config.json of {where!r} can't be read: {one_line(error, 200)}") from None
    found = {"image_mean": mean, "image_std": std} | stored
    for name in ("image_mean", "image_std"):
        value = found[name]
        numbers = isinstance(value, list) and all(isinstance(v, int | float) and abs(v) < 1e6 for v in value)
        if not numbers or len(value) != 3 or (name == "image_std" and not all(value)):
            raise UserError(
                f"preprocessor_config.json of {where!r} has {name} {one_line(value, 80)}: must be three numbers"
                + ", none of them 0" * (name == "image_std")
            )
    return found


def _read(path: str) -> dict[str, Tensor]:
    open_regular(path).close()  # raises OSError for a pipe, which might never end
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
