"""A small OpenCLIP model and its files."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


def perturbed(model: nn.Module) -> nn.Module:
    """Add noise to biases and norms, which otherwise are 0 and 1, so that each of them counts."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def create_model(config: dict[str, Any], folder: Path) -> nn.Module:
    """Build a perturbed model; `folder` receives its configuration."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return perturbed(open_clip.create_model(f"local-dir:{folder}"))


def write_model(model: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write a model in the layout of open_clip's own hub repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder
