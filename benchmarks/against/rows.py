"""The rows of `peers.py`: what is compared, and who takes part."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from against.contest import Contestant, Row
from against.models import SHAPES, pipeline_folder
from against.options import Options
from against.sampling import PROMPT
from against.training_rows import training_rows


def sampling(o: Options, name: str, shape: str, what: str, batch: int, steps: int) -> Row:
    """Return a row of images generated, decoded or encoded by each program."""
    gpu, text = torch.cuda.is_available(), f"{shape}, {batch} images"
    shape = "tiny" if o.tiny else shape
    folder = o.model if o.model and shape == "demo" else str(pipeline_folder(shape, Path(o.work)))
    side, factor = SHAPES[shape].side, SHAPES[shape].factor
    if shape == "sd15":
        side = (o.size or (512 if gpu else 256)) // factor
    spec = {"folder": folder, "what": what, "batch": batch, "steps": steps, "side": side, "factor": factor}
    spec |= {"threads": torch.get_num_threads(), "dtype": o.precision}

    def contestant(name: str, who: str, how: str = "", *, exact: bool = True) -> Contestant:
        return Contestant(name, "sampling.py", spec | {"who": who, "how": how}, exact=exact)

    found = [contestant("diffusers", "diffusers"), contestant("ldm", "ldm")]
    if what == "generate":
        found.append(contestant("ldm, guidance on an interval", "ldm", "interval", exact=False))
    if not gpu:
        found.append(contestant("ldm, optimize: openvino", "ldm", "openvino"))
    if o.openvino_python and what == "generate":
        exported = spec | {
            "who": "optimum",
            "exported": str(Path(o.caches or o.work) / "optimum" / f"{name}-{o.precision}"),
        }
        found.append(Contestant("OpenVINO by optimum", "sampling.py", exported, o.openvino_python))
    found.append(contestant("ldm, optimize: compile", "ldm", "compile"))  # those that compile longest come last
    if gpu:
        found.append(contestant("diffusers, regional compilation", "diffusers", "channels_last regional"))
        found.append(contestant("diffusers, compiled", "diffusers", "fused channels_last compiled"))
        found.append(contestant("diffusers, compiled, cuDNN", "diffusers", "cudnn fused channels_last compiled"))
        found.append(contestant("diffusers, documented best", "diffusers", "fused channels_last compiled autotuned"))
    elif shape == "sd15":
        found.append(contestant("diffusers, documented best", "diffusers", "fused channels_last compiled"))
    else:
        found.append(contestant("diffusers, compiled", "diffusers", "compiled"))
    reference = Contestant(
        "reference", "sampling.py", spec | {"who": "diffusers", "how": "", "dtype": "fp32", "count": True}
    )
    title = {
        "generate": f"{text} × {steps} steps" if steps > 1 else f"{text}, one guided step and a decode",
        "decode": f"{text} decoded",
        "encode": f"{text} encoded",
    }[what]
    return Row(name, f"{title}, {side * factor} pixels", found, reference=reference)


_FIRST_IMAGE = """
import sys
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe(sys.argv[2], num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0].save(sys.argv[3])
"""


def starts(o: Options, name: str) -> Row:
    """Return a row of whole commands: `--help`, or the first image of a small model."""
    help_only, work = name == "help", Path(o.work)
    folder = o.model or str(pipeline_folder("tiny" if o.tiny else "demo", work))
    script, out = "scripts/txt2img.py", str(work / "first")
    ldm, stock = [script, "--model", folder, "--prompt", PROMPT, "--num-images", "1", "--out", out], []
    if help_only:
        ldm, stock = [script, "--help"], ["-c", "from diffusers import StableDiffusionPipeline"]
    else:
        stock = ["-c", _FIRST_IMAGE, folder, PROMPT, f"{out}.png"]
    found = [
        Contestant(program, "start.py", {"command": [sys.executable, *command]})
        for program, command in (("diffusers", stock), ("ldm", ldm))
    ]
    what = "txt2img.py --help; diffusers: its import" if help_only else "from the start to the first image, fp32"
    return Row(name, what, found)


def rows(o: Options) -> dict[str, Callable[[], Row]]:
    """Return the rows that this machine can measure, the most important first."""
    gpu = torch.cuda.is_available()
    found: dict[str, Callable[[], Row]] = {}

    def add(name: str, *arguments: object) -> None:
        found[name] = partial(sampling, o, name, *arguments)  # type: ignore[arg-type]

    if gpu:
        add("sd15-1", "sd15", "generate", 1, 20)
        add("sd15-16", "sd15", "generate", 16, 20)
        add("sd15-decode", "sd15", "decode", 1, 1)
        add("sd15-encode", "sd15", "encode", 1, 1)
    add("sample-1", "demo", "generate", 1, 25)
    add("sample-16", "demo", "generate", 16, 25)
    add("decode", "demo", "decode", 16, 1)
    add("encode", "demo", "encode", 16, 1)
    if not gpu:
        add("sd15-step", "sd15", "generate", 1, 1)
    found |= training_rows(o)
    return found | {name: partial(starts, o, name) for name in ("help", "first")}
