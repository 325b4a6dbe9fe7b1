"""PNG files with the settings that generated the image.

They are in two text chunks: `parameters` in the format of AUTOMATIC1111's web UI, and `ldm`, a JSON object with all
settings.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files import open_regular
from ldm.kinds import Spacing

_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "unipc_b1": "UniPC",
    "unipc_3": "UniPC",
    "unipc_3_b1": "UniPC",
    "lcm": "LCM",
}
"""The web UI's names of samplers. predictor_corrector isn't there. DDPM is only in Forge."""
_SCHEDULES = {"karras": "Karras", "trailing": "Simple", "leading": "DDIM", "linspace": "Uniform"}
"""The web UI's names of spacings, each of which has the same steps if they divide the number of timesteps."""

_FORBIDDEN = re.compile("[\0\ud800-\udfff]")  # not allowed in a text chunk (UTF-8 without NUL)


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any], spacing: Spacing | None = None) -> None:
    """Write an image with its settings; see `png_bytes`."""
    path.write_bytes(png_bytes(image, settings, spacing))


def png_bytes(image: Image.Image, settings: Mapping[str, Any], spacing: Spacing | None = None) -> bytes:
    """Return a PNG file with its settings: prompt, negative_prompt, steps, sampler, guidance_scale, seed, and more.

    The values must have JSON types. `read_png` returns them unchanged, except that surrogate pairs become one
    character. spacing: the model's own, which is used if the settings have none.
    """
    info = PngInfo()
    info.add_itxt("parameters", _FORBIDDEN.sub("\ufffd", parameters(settings, image.size, spacing)))
    text = json.dumps(dict(settings), ensure_ascii=False)
    info.add_itxt("ldm", _FORBIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def read_png(path: Path) -> dict[str, Any]:
    """Read the settings that `save_png` wrote. The pixels aren't decoded.

    Raises ValueError if there are none, OSError if the file can't be opened.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            text = image.info.get("ldm")
    except (SyntaxError, ValueError, Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError("it is not a PNG image") from None
    if not isinstance(text, str):
        raise ValueError("it contains no settings (text chunk 'ldm'); choose an image that this project generated")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its settings (text chunk 'ldm') are not valid JSON") from None
    if not isinstance(settings, dict):
        raise ValueError(f"its settings (text chunk 'ldm') are a {type(settings).__name__}, not a JSON object")
    return settings


def parameters(settings: Mapping[str, Any], size: tuple[int, int], spacing: Spacing | None = None) -> str:
    """Return the web UI's text: the prompt, the negative prompt, and `Name: value` pairs on the last line."""
    lines = [str(settings["prompt"])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    model, sampler = settings.get("sha256", {}).get("model"), settings["sampler"]
    schedule = _SCHEDULES.get(settings.get("spacing") or spacing or "")
    if schedule == "Uniform" and sampler.startswith(("dpmpp_", "unipc")):
        schedule = "SGM Uniform"  # these leave out the lowest of n + 1 levels
    pairs = {
        "Steps": settings["steps"],
        "Sampler": _SAMPLERS.get(sampler, sampler),
        "Schedule type": schedule,
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": model and model[:10],
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength"),
        "Eta DDIM": settings.get("eta") or None,
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def file_name(prompt: str, seed: int) -> str:
    """Return a safe file name: the prompt's first letters and digits, then the seed.

    If these differ from the prompt in more than letter case, a hash distinguishes it from prompts with the same start.
    """
    return f"{slug(prompt)}-{seed}.png"


def slug(text: str) -> str:
    """Return a part of a file name that is valid on every system: 1 to 69 ASCII letters, digits and hyphens."""
    words = re.sub(r"[^a-z0-9]+", "-", text[:200].lower()).strip("-")[:60].rstrip("-")
    if words and words.replace("-", " ") == text.lower():
        return words
    return f"{words or 'image'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _quoted(value: object) -> str:
    """Return a value as text, with quotes if it has a comma, a colon or a line break, as the web UI does."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\x00-\x1f]", text) else text
