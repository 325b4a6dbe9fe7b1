"""A command imports only what it uses, and what ldm.libraries leaves out is there for those who need it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.imports import packages_distributions
from ldm.networks.text_tower import TextTower
from support import ROOT
from support.models import tiny_pipeline

SCRIPT = """
import json, sys
from importlib import import_module

def heavy(*modules):
    for module in modules:
        import_module(module)
    names = ("torch", "pandas", "datasets", "matplotlib", "open_clip", "scipy.stats._stats_py", "sympy",
             "torch._dynamo", "torch.distributed.tensor", "torchmetrics", "torchvision", "transformers.modeling_utils",
             "diffusers.models.transformers.transformer_flux", "diffusers.pipelines.stable_diffusion")
    return [name for name in names if name in sys.modules]

def generate(folder):
    from ldm import LatentDiffusionPipeline
    LatentDiffusionPipeline.from_pretrained(folder)("a red star", num_inference_steps=2)
    return heavy()

def optimize(kind):
    import torch
    from train.config.optimizer import OptimizerConfig
    network = torch.nn.Linear(64, 64)
    optimizer = OptimizerConfig(kind=kind).build(network)
    for _ in range(2):
        network(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    return heavy()

found = {
    "options": heavy("train.commands.cli", "train.commands.make_dataset"),
    "generating": heavy(*(f"train.commands.{c}" for c in ("txt2img", "img2img", "inpaint", "interpolate", "convert"))),
    "an image": generate(sys.argv[1]),
    "data": heavy("train.commands.inspect", "train.commands.inspect_report"),
    "stages 1 and 2": heavy("train.stages.vae", "train.stages.ldm"),
    **{kind: optimize(kind) for kind in ("adamw", "muon", "adamw_8bit")},
    "evaluating": heavy("train.commands.evaluate", "train.commands.evaluate_vae"),
}
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_imports_only_what_it_uses(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    found = json.loads(run(SCRIPT + "print(json.dumps(found))", str(tmp_path)))
    assert found.pop("options") == []
    assert all(modules == ["torch"] for modules in found.values()), found


def test_what_was_left_out_is_imported_when_it_is_used() -> None:
    """Each stand-in behaves as the module or class for which it stands, also for other users in the process."""
    run(
        dedent("""
        import importlib.metadata
        distributions = importlib.metadata.packages_distributions
        import ldm.libraries
        import gc, sys
        assert gc.isenabled() and importlib.metadata.packages_distributions is distributions
        assert "torch._dynamo" not in sys.modules

        import diffusers.loaders.lora_base as lora
        stand_in = lora.PreTrainedModel
        from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel
        assert stand_in is not PreTrainedModel is sys.modules["transformers.modeling_utils"].PreTrainedModel
        tower = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                             num_attention_heads=2, vocab_size=9))
        assert isinstance(tower, stand_in) and not isinstance(3, stand_in)
        assert issubclass(CLIPTextModel, (int, stand_in)) and not issubclass(int, stand_in)
        class Model(stand_in): pass
        assert PreTrainedModel in Model.__mro__
        assert stand_in | None == None | stand_in == PreTrainedModel | None
        assert stand_in.from_pretrained == PreTrainedModel.from_pretrained

        from diffusers.models.transformers import DiTTransformer2DModel
        from diffusers import LMSDiscreteScheduler, StableDiffusionPipeline
        import diffusers.schedulers.scheduling_lms_discrete as lms
        import scipy.stats
        assert scipy.stats.norm.cdf(0) == 0.5 and lms.scipy.stats.norm is scipy.stats.norm
        assert lms.integrate.quad(lambda x: x, 0, 1)[0] == 0.5
        try:
            from scipy.stats import no_such_name
        except ImportError as error:
            assert "no_such_name" in str(error)
        else:
            raise AssertionError
        import torch
        assert torch._dynamo.allow_in_graph(len) is len
        """)
    )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_tower_computes_what_transformers_does(activation: str, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPTextConfig(**sizes, vocab_size=60, max_position_embeddings=20, hidden_act=activation)
    torch.manual_seed(0)
    theirs = CLIPTextModel(config).to(dtype).eval()
    tower = getattr(theirs, "text_model", theirs)
    ours = TextTower(config).to(dtype).eval()
    ours.load_state_dict(tower.state_dict(), strict=True)
    for length in (20, 7, 1):
        ids = torch.randint(60, (5, length))
        with torch.no_grad():
            assert torch.equal(ours(ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)


def test_packages_are_those_of_the_standard_library() -> None:
    ours, theirs = packages_distributions(), importlib.metadata.packages_distributions()
    assert ours.keys() == theirs.keys()
    assert all(sorted(ours[package]) == sorted(theirs[package]) for package in theirs)
    assert ours["torch"] == ["torch"]


@pytest.mark.slow
def test_the_page_starts_without_pandas_which_works_when_it_is_used() -> None:
    run(
        dedent("""
        import sys
        from pathlib import Path
        from train.page.isolation import isolate
        isolate(Path("out"))
        import train.page.app
        assert not [name for name in sys.modules if name.startswith("pandas.")]
        import pandas
        assert pandas.DataFrame({"x": [1, 2]}).x.sum() == 3
        import gradio as gr
        assert gr.Dataframe().postprocess(pandas.DataFrame({"x": [1]})).data == [[1]]
        """)
    )
