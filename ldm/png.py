"""Pictures that carry their story: PNG files with the settings they were painted with.

Two text chunks: `parameters` in the form that AUTOMATIC1111's web UI reads, and `ldm`, a JSON object with everything.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write the picture; settings hold prompt, negative_prompt, steps, sampler, guidance_scale, seed, and more."""
    info = PngInfo()
    info.add_itxt("parameters", parameters(settings, image.size))
    info.add_itxt("ldm", json.dumps(dict(settings), ensure_ascii=False))
    image.save(path, pnginfo=info)


def read_png(path: Path) -> dict[str, Any]:
    """The settings that `save_png` wrote. Raises ValueError when there are none."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        text = image.info.get("ldm")
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no settings of ours")
    return json.loads(text)


def parameters(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The prompt, its negative, then `Name: value` pairs on one line."""
    lines = [str(settings["prompt"])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{size[0]}x{size[1]}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


def file_name(prompt: str, seed: int) -> str:
    """A safe file name: the prompt's first letters and digits, then the seed."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", prompt[:200]).strip("-").lower()[:60].rstrip("-")
    return f"{words or 'picture'}-{seed}.png"
