"""Settings in a PNG as AUTOMATIC1111's web UI names them, and the noise levels that it makes of these names."""

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from ldm.formats.png import parameters, save_png
from ldm.kinds import Spacing
from ldm.samplers import SamplerKind, make_sampler
from ldm.schedule import Schedule
from ldm.spacing import make_plan
from support.commands import run_script
from support.models import tiny_pipeline

T = 1000
SAMPLERS = {"DDPM", "DDIM", "Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M SDE", "UniPC", "LCM"}
LEVELS = {  # the web UI's schedules: indices of noise levels for n steps, from its sd_schedulers.py
    "Simple": lambda n: [T - 1 - int(k * T / n) for k in range(n)],
    "DDIM": lambda n: [*range(1, T, T // n)][:n][::-1],
    "Uniform": lambda n: [*np.linspace(T - 1, 0, n)],
    "SGM Uniform": lambda n: [*np.linspace(T - 1, 0, n + 1)[:-1]],
}


def fields(**settings: Any) -> dict[str, str]:
    shared = {"prompt": "x", "steps": 20, "sampler": "dpmpp_2m", "guidance_scale": 3.0, "seed": 1}
    spacing = settings.pop("model_spacing", None)
    last = parameters(shared | settings, (8, 8), spacing).split("\n")[-1]
    return dict(re.findall(r"(\w[\w ]+): ([^,]*)(?:, |$)", last))


def test_samplers_have_the_web_uis_names() -> None:
    names = {kind: fields(sampler=kind)["Sampler"] for kind in get_args(SamplerKind)}
    assert names.pop("predictor_corrector") == "predictor_corrector"  # which the web UI doesn't have
    assert set(names.values()) == SAMPLERS


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_a_schedule_type_has_the_same_noise_levels(sampler: SamplerKind, spacing: Spacing) -> None:
    """20 steps divide 1000 timesteps; the last of linspace's levels differs by rounding at most."""
    name = fields(sampler=sampler, spacing=spacing)["Schedule type"]
    plan = make_plan(Schedule.build("scaled_linear"), make_sampler(sampler).grid, 20, spacing)
    ours = np.array([pair.now.model_time for pair in plan.pairs])
    if (sampler, spacing) == ("dpmpp_2m", "leading"):  # leaves out the lowest of 21 levels, which the web UI can't
        assert name == "DDIM"
        return
    assert np.abs(ours - LEVELS[name](20)).max() <= (0.5 if spacing == "linspace" else 0)


def test_karras_and_the_models_own_spacing() -> None:
    assert fields(spacing="karras")["Schedule type"] == "Karras"
    assert fields(spacing=None, model_spacing="leading")["Schedule type"] == "DDIM"
    assert fields(spacing="karras", model_spacing="leading")["Schedule type"] == "Karras"
    assert "Schedule type" not in fields()


def test_the_noise_of_ddim_is_written() -> None:
    assert fields(sampler="ddim", eta=0.5)["Eta DDIM"] == "0.5"
    assert "Eta DDIM" not in fields(sampler="ddim", eta=0.0)


def test_a_command_writes_the_models_own_spacing(tmp_path: Path) -> None:
    tiny_pipeline(spacing="leading").save_pretrained(tmp_path / "model")
    ended = run_script(
        *("txt2img", "--model", tmp_path / "model", "--out", tmp_path, "--steps", "2", "--sampler", "euler", "--grid")
    )
    for path in ended.paths:
        text = Image.open(path).info["parameters"]
        assert "Sampler: Euler, Schedule type: DDIM, CFG scale: 3.0" in text


def test_saving_takes_the_models_spacing(tmp_path: Path) -> None:
    settings = {"prompt": "x", "steps": 2, "sampler": "euler", "guidance_scale": 1.0, "seed": 0}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings, "trailing")
    assert "Schedule type: Simple" in Image.open(tmp_path / "a.png").info["parameters"]
