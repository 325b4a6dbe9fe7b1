"""Pictures that carry their story: PNG files with the settings they were painted with.

Two text chunks: `parameters` in the form that AUTOMATIC1111's web UI reads, and `ldm`, a JSON object with everything.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # a text chunk is UTF-8 without NUL; JSON has escapes for both


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write the picture; settings hold prompt, negative_prompt, steps, sampler, guidance_scale, seed, and more.

    They have to be JSON's kinds of values, and come back as they are (but a character in two halves as a whole one).
    """
    info = PngInfo()
    info.add_itxt("parameters", _UNWRITABLE.sub("\ufffd", parameters(settings, image.size)))
    text = json.dumps(dict(settings), ensure_ascii=False)
    info.add_itxt("ldm", _UNWRITABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
    image.save(path, "PNG", pnginfo=info)


def read_png(path: Path) -> dict[str, Any]:
    """The settings that `save_png` wrote; they stand before the pixels, which aren't decoded.

    Raises ValueError when there are none, OSError when the file can't be opened.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("ldm")
    except (SyntaxError, ValueError, Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError("it is no PNG picture") from None
    if not isinstance(text, str):
        raise ValueError("it carries no settings of ours")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its settings are no JSON") from None
    if not isinstance(settings, dict):
        raise ValueError(f"its settings are a {type(settings).__name__}, not a JSON object")
    return settings


def parameters(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The prompt, its negative, then `Name: value` pairs, always on the last line."""
    lines = [str(settings["prompt"])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    model = settings.get("sha256", {}).get("model")
    pairs = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": model and model[:10],
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength"),
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def file_name(prompt: str, seed: int) -> str:
    """A safe file name: the prompt's first letters and digits, then the seed.

    Where letter case is not all they leave out of the prompt, a hash tells it from others that begin alike.
    """
    return f"{slug(prompt)}-{seed}.png"


def slug(text: str) -> str:
    """A part of a file name that is one in every system: letters, digits and hyphens of ASCII, 1 to 69 of them."""
    words = re.sub(r"[^a-z0-9]+", "-", text[:200].lower()).strip("-")[:60].rstrip("-")
    if words and words.replace("-", " ") == text.lower():
        return words
    return f"{words or 'picture'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _quoted(value: object) -> str:
    """Return a value as the web UI writes one that holds a comma, a colon or a line break."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\x00-\x1f]", text) else text
