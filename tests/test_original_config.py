"""What a single file can't contain: the description beside it, and the lines for other tools."""

import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from autoencoder.model import Autoencoder, build_autoencoder
from conditioning.clip import ClipTextEncoder
from conditioning.openclip import published_tokenizer
from conditioning.tokenizer import train_tokenizer
from ldm.errors import UserError
from ldm.formats.file_limits import architecture, limits
from ldm.formats.original_config import describe
from ldm.formats.original_config_reader import guess
from ldm.formats.scheduler_config import Process, name_betas
from ldm.formats.single_file import load_single_file, to_original
from ldm.networks.unet import UNet, widen
from ldm.pipeline import LatentDiffusionPipeline
from ldm.schedule import BetaSchedule, Schedule
from support.commands import run_script
from support.models import PROMPTS, small_clip_model, small_unet, tiny_pipeline
from train.config.data import DataConfig
from train.config.ldm import LdmConfig
from train.stages.ldm_init import Components, load_components

Change = dict[str, Any]

# -- models in the shape of Stable Diffusion, without memory -----------------------------------------------------------

SHAPES: dict[str, dict[str, Change]] = {
    "1": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "2": {
        "unet": {
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return published_tokenizer(77, None)


def config_only(config: Change, defaults: type[nn.Module]) -> Any:
    """Return the configuration of a network, without building it."""
    signature = inspect.signature(defaults.__init__).parameters
    known = {name: value.default for name, value in signature.items() if name != "self"}
    return type("Config", (dict,), {"__getattr__": dict.__getitem__})(known | config)


def stable_diffusion(
    tokenizer: CLIPTokenizer,
    version: str = "1",
    unet: Change | None = None,
    vae: Change | None = None,
    text: Change | None = None,
    padding: int | None = None,
    **process: Any,
) -> Any:
    """Return a model of Stable Diffusion's shape with some changes, as `limits` and `describe` read it."""
    shape = SHAPES[version]
    network = nn.Module()
    network.__class__ = type("Network", (UNet2DConditionModel,), {"config": None})
    network.config = config_only(shape["unet"] | (unet or {}), UNet2DConditionModel)  # type: ignore[assignment]
    kept = {key: process.pop(key) for key in ("target", "variance") if key in process}
    end = tokenizer.eos_token_id
    reader = SimpleNamespace(
        pad_token_id=(0 if version == "2" else end) if padding is None else padding,
        eos_token_id=end,
        get_vocab=tokenizer.get_vocab,
        model_max_length=77,
        __len__=None,
    )
    tokens = type("Tokens", (SimpleNamespace,), {"__len__": lambda self: len(tokenizer)})(**vars(reader))
    encoder = {"hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77} | shape["text"]
    return SimpleNamespace(
        backbone=UNet.wrap(network, 4),
        process=Process(
            schedule=Schedule.build(**{"kind": "scaled_linear"} | process), target=kept.pop("target", "eps"), **kept
        ),
        autoencoder=SimpleNamespace(vae=SimpleNamespace(config=config_only(VAE | (vae or {}), AutoencoderKL))),
        text_encoder=SimpleNamespace(
            model=SimpleNamespace(config=CLIPTextConfig(**encoder | (text or {}))),
            tokenizer=tokens,
            diffusers_limits=lambda: None,
        ),
    )


@pytest.mark.parametrize("version", SHAPES)
def test_stable_diffusion_itself_needs_no_line(clip_tokenizer: CLIPTokenizer, version: str) -> None:
    model = stable_diffusion(clip_tokenizer, version)
    assert limits(model, "model") == []
    params = describe(model, "")["model"]["params"]
    target = params["cond_stage_config"]["target"].rpartition(".")[2]
    assert target == {"1": "FrozenCLIPEmbedder", "2": "FrozenOpenCLIPEmbedder"}[version]
    assert "version" not in params["cond_stage_config"].get("params", {})
    name = {"1": "stable-diffusion-v1", "2": "stable-diffusion-v2-512"}[version]
    assert architecture(model) == name
    assert architecture(stable_diffusion(clip_tokenizer, version, T=500, kind="cosine")) == name
    assert architecture(stable_diffusion(clip_tokenizer, version, unet={"layers_per_block": 3})) == "latent-diffusion"
    v = architecture(stable_diffusion(clip_tokenizer, version, target="v"))
    assert v == {"1": "stable-diffusion-v1", "2": "stable-diffusion-v2-768-v"}[version]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"target": "v"}, "target v .*ModelSamplingDiscrete with v_prediction; .* need model.yaml"),
        ({"target": "x0"}, "target x0 .*ModelSamplingDiscrete with x0"),
        ({"target": "v", "zero_terminal_snr": True}, "zero_terminal_snr True .*zsnr in the node ModelSampling"),
        ({"kind": "cosine"}, "noise schedule squaredcos_cap_v2 differs"),
        ({"kind": "linear"}, "noise schedule linear from 0.00085 to 0.012 differs"),
        ({"kind": "sigmoid"}, "noise schedule sigmoid from 0.00085 to 0.012 differs"),
        ({"beta_end": 0.02}, "noise schedule scaled_linear from 0.00085 to 0.02 differs"),
        ({"T": 500}, "timesteps 500 differs from Stable Diffusion's 1000"),
        ({"kind": "flow", "target": "flow"}, "target flow differs .*can't sample it"),
        ({"variance": "learned", "unet": {"out_channels": 8}}, "variance learned"),
        (
            {"unet": {"attention_head_dim": [5, 10, 20, 20]}},
            r"unet heads \[5, 10, 20, 20\] differs .* \[8, 8, 8, 8\]",
        ),
        ({"version": "2", "unet": {"attention_head_dim": 8}}, r"unet heads \[8, 8, 8, 8\] differs .*\[5, 10, 20, 20\]"),
        (
            {"unet": {"down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3]}},
            r"unet attention \[False, True, True, True\] differs",
        ),
        ({"unet": {"transformer_layers_per_block": 2}}, "unet depth of attention 2 differs"),
        ({"unet": {"layers_per_block": 3}}, "unet layers_per_block 3 differs"),
        ({"unet": {"norm_num_groups": 16}}, "unet norm_num_groups 16 differs"),
        ({"unet": {"resnet_time_scale_shift": "scale_shift"}}, "resnet_time_scale_shift scale_shift differs"),
        (
            {"unet": {"cross_attention_dim": 1024}, "text": SHAPES["2"]["text"], "padding": 0},
            "unet linear projections False differs",
        ),
        ({"unet": {"cross_attention_dim": 512}}, "unet condition width 512 differs"),
        ({"vae": {"latent_channels": 16}}, "vae latent_channels 16 differs"),
        ({"vae": {"block_out_channels": (128, 256, 512)}}, "vae block_out_channels"),
        ({"vae": {"scaling_factor": 0.5}}, "scaling factor 0.5 differs"),
        ({"text": {"vocab_size": 2000}}, "text vocabulary of its own"),
        ({"text": {"max_position_embeddings": 32}}, "text length 32 differs"),
        ({"text": {"num_hidden_layers": 11}}, "text layers 11 differs"),
        ({"text": {"hidden_act": "gelu"}}, "text activation gelu differs"),
        ({"text": {"num_attention_heads": 8}}, "text heads 8 differs"),
        ({"version": "2", "padding": 49407}, "text padding end token differs"),
        ({"padding": 0}, "text padding token 0 differs"),
        ({"unet": {"in_channels": 17}}, "inpainting UNet with 17 input channels"),
    ],
)
def test_each_condition_has_its_line(clip_tokenizer: CLIPTokenizer, change: Change, line: str) -> None:
    lines = limits(stable_diffusion(clip_tokenizer, **change), "model")
    assert any(re.search(line, each) for each in lines), lines
    assert not any("\n" in each for each in lines)


def test_a_vocabulary_as_large_as_clips_is_recognised_as_its_own(clip_tokenizer: CLIPTokenizer) -> None:
    model = stable_diffusion(clip_tokenizer)
    tokens = clip_tokenizer.get_vocab()
    swapped = tokens | {"a</w>": tokens["b</w>"], "b</w>": tokens["a</w>"]}
    model.text_encoder.tokenizer.get_vocab = lambda: swapped
    assert any("text vocabulary of its own" in line for line in limits(model, "model"))


# -- small models ------------------------------------------------------------------------------------------------------


def small(
    heads: tuple[int, ...] = (4, 4, 4), first: bool = False, inpaints: bool = False, groups: int = 32, **process: Any
) -> Any:
    """Return a small pipeline with a text encoder as stage 0 trains it (gelu, its own vocabulary and length)."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, 600, 24)
    target = process.pop("target", "v")
    clip = small_clip_model(tokenizer)
    vae = build_autoencoder(channels=(32, 64), layers=1, latent_channels=4, groups=32)
    unet = small_unet(channels=(32, 64, 64), attention=(first, True, True), heads=heads, groups=groups)
    if inpaints:
        widen(unet, 9)
    for module in (unet, vae, clip):
        for weight in module.parameters():
            weight.data.add_(torch.randn(weight.shape), alpha=0.02)
    return LatentDiffusionPipeline(
        unet.eval().requires_grad_(False),
        Autoencoder(vae),
        ClipTextEncoder(clip.text_model.eval(), tokenizer),
        Process(schedule=Schedule.build(**{"kind": "cosine"} | process), target=target),
    )


def params_of(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.with_suffix(".yaml").read_text())["model"]["params"]


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_the_road_from_stage_0_to_other_programs(tmp_path: Path) -> None:
    """A text encoder of one's own, convert.py, the file with its description, and what reads them."""
    pipe = small()
    pipe.save_pretrained(tmp_path / "folder")
    file = tmp_path / "model.safetensors"
    ended = run_script("convert", "--model", tmp_path / "folder", "--out", file)
    assert ended.status == 0, ended.err
    assert not any(name.startswith("cond_stage_model.model.") for name in load_file(file))  # OpenCLIP's names
    # diffusers' own reader of such descriptions finds the networks' shapes, which were not given to it.
    config, state = yaml.safe_load(file.with_suffix(".yaml").read_text()), load_file(file)
    state["model.diffusion_model.output_blocks.5.0.skip_connection.weight"] = state["betas"]
    theirs = create_unet_diffusers_config_from_ldm(config, state, image_size=16)
    for name in ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim", "layers_per_block"):
        assert [*np.atleast_1d(theirs[name])] == [*np.atleast_1d(pipe.unet.config[name])], name
    assert theirs["attention_head_dim"] == 4
    theirs = create_vae_diffusers_config_from_ldm(config, state, image_size=32)
    for name in ("block_out_channels", "latent_channels", "layers_per_block", "scaling_factor"):
        assert [*np.atleast_1d(theirs[name])] == [*np.atleast_1d(pipe.autoencoder.vae.config[name])], name
    # CompVis' text encoder is made of the folder that the description names, by transformers.
    text = params_of(file)["cond_stage_config"]["params"]
    tokenizer = CLIPTokenizer.from_pretrained(text["version"])
    model = CLIPTextModel.from_pretrained(text["version"])
    ids = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=text["max_length"], return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, pipe.encode(PROMPTS))
    # stock diffusers and this project generate the same images.
    stock = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    images = [
        each(PROMPTS, generator=torch.Generator().manual_seed(0), **how, **more).images
        for each, more in (
            (pipe, {"sampler": "ddim"}),
            (stock, {}),
            (LatentDiffusionPipeline.from_single_file(file), {"sampler": "ddim"}),
        )
    ]
    assert images[0].std() > 0.01
    assert np.abs(images[0] - images[1]).max() <= 2 / 255
    assert np.abs(images[0] - images[2]).max() <= 1e-4


@pytest.mark.filterwarnings("ignore:a prompt has")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"parameterization": "v", "beta_schedule": "cosine"}),
        ({"target": "eps", "kind": "linear"}, {"parameterization": "eps", "beta_schedule": "sqrt_linear"}),
        ({"target": "x0", "kind": "sigmoid", "T": 200}, {"parameterization": "x0", "timesteps": 200}),
        ({"kind": "scaled_linear", "zero_terminal_snr": True}, {"beta_schedule": "linear", "linear_end": 0.012}),
        ({"heads": (1, 2, 2), "first": True}, {"num_head_channels": 32}),
        ({"inpaints": True}, {"conditioning_key": "hybrid", "in_channels": 9}),
    ],
)
def test_a_file_is_read_with_its_description(tmp_path: Path, settings: Change, expected: Change) -> None:
    pipe, file = small(**settings), tmp_path / "model.safetensors"
    pipe.save_single_file(file)
    params = params_of(file)
    found = params | params["unet_config"]["params"]
    assert {name: found[name] for name in expected} == expected
    again = LatentDiffusionPipeline.from_single_file(file)
    for one, other in ((pipe.unet, again.unet), (pipe.autoencoder.vae, again.autoencoder.vae)):
        other = other.state_dict()
        assert all(torch.equal(value, other[name]) for name, value in one.state_dict().items())
    # The numbers of heads and groups don't change the weights' shapes.
    x, time = torch.randn(1, pipe.unet.config.in_channels, 16, 16), torch.tensor([100])
    condition = pipe.encode(PROMPTS[:1])
    assert torch.equal(pipe.unet(x, time, condition).sample, again.unet(x, time, condition).sample)
    assert torch.equal(again.encode(PROMPTS[:1]), condition)
    assert again.process.target == pipe.process.target
    for name in ("spacing", "steps_offset", "set_alpha_to_one", "variance"):
        assert getattr(again.process, name) == getattr(pipe.process, name), name
    torch.testing.assert_close(again.process.schedule.alpha, pipe.process.schedule.alpha, rtol=1e-5, atol=1e-6)
    assert again.model.task == pipe.model.task


@pytest.mark.parametrize(
    ("settings", "markers"),
    [
        ({"target": "eps", "kind": "scaled_linear"}, set()),
        ({"target": "v"}, {"v_pred"}),
        ({"target": "x0"}, set()),
        ({"kind": "scaled_linear", "zero_terminal_snr": True}, {"v_pred", "ztsnr"}),
        ({"kind": "flow", "target": "flow"}, set()),
    ],
)
def test_markers_that_other_tools_look_for(settings: Change, markers: set[str]) -> None:
    weights = to_original(small(**settings).model)
    assert {name for name in ("v_pred", "ztsnr") if name in weights} == markers


def test_a_model_that_cannot_be_described_gets_no_description(tmp_path: Path, caplog: Any) -> None:
    for name, pipe, reason in (
        ("groups", tiny_pipeline(), "unet norm_num_groups 16: must be 32"),
        ("flow", small(kind="flow", target="flow"), "a flow"),
        ("heads", small(heads=(1, 2, 4)), r"unet heads [1, 2, 4]: must be equal"),
    ):
        caplog.clear()
        pipe.save_single_file(tmp_path / f"{name}.safetensors")
        assert f"no {name}.yaml is written: it can't describe this model ({reason}" in caplog.text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 3


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"model.yaml': exists already"):
        small().save_single_file(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["cond_stage_config"].update(target="x.FrozenT5Embedder"), "text encoder FrozenT5Embedder"),
        (lambda p: p["cond_stage_config"]["params"].update(version="/none"), "text encoder '/none': no such folder"),
        (lambda p: p["unet_config"]["params"].pop("channel_mult"), "can't be read .KeyError: 'channel_mult'"),
        (lambda p: p.update(beta_schedule="sqrt"), "can't be read"),
        (lambda p: p.update(unet_config=3), "can't be read"),
        (lambda p: p["unet_config"]["params"].update(num_res_blocks=2), "the file has no weight"),
        (lambda p: p["unet_config"]["params"].update(num_res_blocks=10**6), "layers_per_block 1000000: up to"),
        (lambda p: p["unet_config"]["params"].update(num_res_blocks=True), "layers_per_block True: must be int"),
        (
            lambda p: p["unet_config"]["params"].update(context_dim={"a": 1}),
            "cross_attention_dim .* must be one number",
        ),
        (lambda p: p["unet_config"]["params"].update(model_channels=33), "its description can't be read"),
        (lambda p: p.update(scale_factor="big"), "scaling_factor 'big': must be float"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    tmp_path: Path, described: Path, change: Callable[[Change], object], message: str
) -> None:
    file = Path(shutil.copy(described, tmp_path))
    document = yaml.safe_load(described.with_suffix(".yaml").read_text())
    change(document["model"]["params"])
    file.with_suffix(".yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=message) as error:
        load_single_file(file)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("described") / "a/new/folder/model.safetensors"
    small().save_single_file(file)
    return file


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_a_text_encoder_beside_the_file_is_found_after_a_move(described: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(described.parent, moved)
    document = (moved / "model.yaml").read_text().replace(str(described.parent), "/another/machine")
    (moved / "model.yaml").write_text(document)
    assert torch.equal(
        LatentDiffusionPipeline.from_single_file(moved / "model.safetensors").encode(PROMPTS),
        LatentDiffusionPipeline.from_single_file(described).encode(PROMPTS),
    )


def test_metadata_that_is_not_json_is_refused(described: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(described.parent, folder)
    for stored in ("{", "3"):
        save_file(load_file(described), folder / "model.safetensors", {"ldm.sampling": stored})
        with pytest.raises(UserError, match=r"metadata ldm\.sampling isn't a JSON object"):
            load_single_file(folder / "model.safetensors")


def test_code_in_a_description_is_not_run(described: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(described, tmp_path))
    file.with_suffix(".yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/canary']")
    with pytest.raises(UserError, match="isn't plain YAML"):
        load_single_file(file)
    assert not (tmp_path / "canary").exists()


def test_training_starts_from_a_single_file(described: Path, tmp_path: Path) -> None:
    """As from the folder of the same model."""
    LatentDiffusionPipeline.from_single_file(described).save_pretrained(tmp_path / "folder")
    small(target="eps").save_pretrained(tmp_path / "other")

    def start(init: Path, **change: Any) -> Components:
        config = LdmConfig(data="x", out="y", init=str(init), input=DataConfig(resolution=32), **change)
        return load_components(config, config.build_objective(), torch.device("cpu"))

    for change in ({}, {"clip_skip": 1}, {"text_encoder": str(tmp_path / "other"), "vae": str(tmp_path / "other")}):
        one, other = (start(init, **change) for init in (tmp_path / "folder", described))
        assert one.digests == other.digests
        assert one.text_encoder.model.config.num_hidden_layers == 2 - change.get("clip_skip", 0)
        replaced = [str(tmp_path / "folder"), str(described)]
        assert [line.replace(replaced[0], replaced[1]) for line in one.changes] == list(other.changes)
        assert any("predicts v, this run eps" in line for line in other.changes)
        assert all(weight.requires_grad for weight in other.backbone.module.parameters())
    checkpoint = tmp_path / "model.ckpt"
    torch.save(load_file(described), checkpoint)
    with pytest.raises(UserError, match=r"is a pickle, .*ldm-convert"):
        start(checkpoint)


def averages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights as Lightning's module of CompVis' code names them."""
    unet = {name: value for name, value in weights.items() if name.startswith("model.diffusion_model.")}
    return {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in unet.items()}


def test_averaged_weights_are_used(described: Path, tmp_path: Path, caplog: Any) -> None:
    weights = load_file(described)
    extra = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    for name, more, shift, line in (
        ("all", averages(weights), 1, "averaged weights (model_ema), which are used"),
        ("some", dict(list(averages(weights).items())[1:]), 0, "so the trained ones are used"),
        ("none", {}, 0, ""),
    ):
        caplog.clear()
        shutil.copytree(described.parent, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file(weights | more | extra, file)
        unet = load_single_file(file).unet
        torch.testing.assert_close(
            unet.conv_in.weight, weights["model.diffusion_model.input_blocks.0.0.weight"] + shift
        )
        assert line in caplog.text
        assert bool(line) == bool(caplog.text)
    file = tmp_path / "all" / "model.safetensors"
    ended = run_script("convert", "--model", file, "--no-ema", "--out", tmp_path / "trained")
    assert ended.status == 0, ended.err
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "trained")
    assert torch.equal(pipe.unet.conv_in.weight, weights["model.diffusion_model.input_blocks.0.0.weight"])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_written(described: Path, tmp_path: Path, precision: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for out in ("half.safetensors", "half"):
        ended = run_script("convert", "--model", described, "--precision", precision, "--out", tmp_path / out)
        assert ended.status == 0, ended.err
    whole, half = load_file(described), load_file(tmp_path / "half.safetensors")
    assert whole.keys() == half.keys()
    for name, value in whole.items():
        tables = name in ("v_pred", "betas") or "alphas_cumprod" in name or name.startswith("posterior_")
        assert half[name].dtype == (torch.float32 if tables else dtype)
        assert torch.equal(half[name], value.to(half[name].dtype))
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "half")
    assert torch.equal(pipe.unet.conv_in.weight, half["model.diffusion_model.input_blocks.0.0.weight"].float())
    for part in ("unet", "vae"):
        weights = load_file(tmp_path / "half" / part / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {dtype}


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    pipe = small()
    pipe.unet.conv_in.weight.view(-1)[0] = 1e6
    with pytest.raises(UserError, match=r"can't represent; choose bf16"):
        pipe.save_single_file(tmp_path / "model.safetensors", torch.float16)
    pipe.save_pretrained(tmp_path / "folder")
    ended = run_script(*("convert", "--model", tmp_path / "folder", "--precision", "fp16", "--out", tmp_path / "half"))
    assert ended.status == 2
    assert "weight conv_in.weight has larger values; choose bf16" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("version", SHAPES)
def test_stable_diffusion_is_recognised_without_a_description(clip_tokenizer: CLIPTokenizer, version: str) -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SHAPES[version]["unet"]), AutoencoderKL(**VAE)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    state = {
        key: unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight,
        "model.diffusion_model.input_blocks.0.0.weight": unet.conv_in.weight,
    }
    target = {"1": None, "2": "v"}[version]
    configs = guess(state, target)
    for built, config in ((unet, configs.unet), (vae, configs.vae)):
        for name, value in config.items():
            assert [*np.atleast_1d(value)] == [*np.atleast_1d(built.config[name])] or name == "attention_head_dim", name
    text = configs.text_encoder
    assert text["num_hidden_layers"] == SHAPES[version]["text"]["num_hidden_layers"]
    ids = clip_tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    assert [text[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [*ids, {"1": ids[1], "2": 0}[version]]
    assert Process.from_diffusers(configs.scheduler).target == (target or "eps")
    if version == "2":
        with pytest.raises(UserError, match="it isn't a Stable Diffusion 1"):
            guess(state, None)
        assert Process.from_diffusers(guess(state | {"v_pred": torch.empty(0)}, None).scheduler).target == "v"


# -- names of schedules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("linear", {"beta_start": 1e-4, "beta_end": 0.02}, ("linear", 1e-4, 0.02)),
        ("scaled_linear", {}, ("scaled_linear", 0.00085, 0.012)),
        ("quadratic", {"T": 100}, ("scaled_linear", 0.00085, 0.012)),
        ("sigmoid", {}, ("sigmoid", 0.00085, 0.012)),
        ("cosine", {}, ("squaredcos_cap_v2", None, None)),
        ("scaled_linear", {"zero_terminal_snr": True}, ("scaled_linear", 0.00085, 0.012)),
        ("cosine", {"zero_terminal_snr": True}, ("squaredcos_cap_v2", None, None)),
    ],
)
def test_scheduler_config_names_the_schedule(kind: Any, settings: Change, name: tuple[str, Any, Any]) -> None:
    """A reader that ignores trained_betas gets the same schedule from the name."""
    schedule = Schedule.build(kind, **settings)
    config = dict(Process(schedule=schedule, target="v").to_diffusers().config)
    assert config["beta_schedule"] == name[0]
    for key, value in zip(("beta_start", "beta_end"), name[1:], strict=True):
        assert value is None or config[key] == pytest.approx(value, rel=1e-9)
    assert len(config["trained_betas"]) == schedule.T
    named = Schedule.from_diffusers({key: value for key, value in config.items() if key != "trained_betas"})
    torch.testing.assert_close(named.alpha, schedule.alpha, rtol=1e-6, atol=1e-9)


def test_other_betas_have_no_name() -> None:
    assert name_betas(BetaSchedule(torch.linspace(0.01, 0.2, 50) ** 1.5)) is None
