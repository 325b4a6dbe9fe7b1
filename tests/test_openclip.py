"""OpenCLIP's converted text tower against open_clip itself, and as the condition of diffusers' images."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from conditioning.clip import ClipTextEncoder
from conditioning.openclip import convert, published_tokenizer, tokenizer_of
from conditioning.tokenizer import tokenize
from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from support.models import small_unet, tiny_pipeline
from support.openclip import SMALL, create_model, perturbed, write_model
from train.config.ldm import LdmConfig
from train.stages.ldm_init import _text_encoder

WORDS = ("photograph", "an", "extraordinarily", "small", "teal", "hippopotamus", "riding", "past", "12", "astronauts,")
PROMPTS = [
    *("", " ", "a", "it's 3 o'clock!", "RED  and\nblue", "naïve café, 東京 \U0001f600", "ÅÄÖ ñ ß", "שלום привет мир"),
    *("<|endoftext|> in words", "x" * 300, "\U0001f469\u200d\U0001f680 " * 9, "e\u0301\u0301 & <b>"),
    *(" ".join((WORDS * 9)[k % 7 : k % 7 + 1 + 2 * k // 3]) for k in range(88)),
]  # a hundred prompts, of every length up to truncation


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A small OpenCLIP and its folder."""
    folder, config = tmp_path_factory.mktemp("small"), SMALL | {"quick_gelu": request.param}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(config, folder)
    return model, write_model(model, config, folder)


def compare(model: nn.Module, encoder: ClipTextEncoder, prompts: list[str]) -> None:
    """Assert that ids, last hidden states and pooled features equal open_clip's to 1e-4."""
    ids, ours = open_clip.get_tokenizer("ViT-B-32")(prompts), tokenize(encoder.tokenizer, prompts)
    ends = ids.argmax(1)
    assert torch.equal(ids, ours)  # the padding too
    with torch.no_grad():
        x = model.token_embedding(ids) + model.positional_embedding
        hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        assert (encoder.model(input_ids=ids).last_hidden_state - hidden).abs().max() <= 1e-4
        pooled = encoder.encode(prompts)[torch.arange(len(ids)), ends]
        assert (pooled @ model.text_projection - model.encode_text(ids)).abs().max() <= 1e-4
    assert (encoder.encode(prompts) - hidden).abs().max() <= 1e-4
    assert hidden.std() > 0.5


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_a_hundred_prompts_are_encoded_as_by_open_clip(small) -> None:
    model, folder = small
    assert len(PROMPTS) == len(set(PROMPTS)) == 100
    compare(model, ClipTextEncoder.load(f"openclip:{folder}"), PROMPTS)


@pytest.mark.parametrize("small", [False], ids=["gelu"], indirect=True)
def test_a_run_that_padded_with_the_end_token_continues_with_it(small, tmp_path: Path) -> None:
    """As runs did before OpenCLIP's own padding was used."""
    name = f"openclip:{small[1]}"
    encoder = ClipTextEncoder.load(name)
    earlier = ClipTextEncoder(encoder.model, published_tokenizer(77))
    assert (encoder.tokenizer.pad_token_id, earlier.tokenizer.pad_token_id) == (0, 49407)
    for recorded, padding in ((earlier.digest, 49407), (encoder.digest, 0), ("of another", 0), (None, 0)):
        out = tmp_path / str(recorded)[:9]
        out.mkdir(exist_ok=True)
        if recorded:
            settings = {"steps": 1, "about": {"inputs": {"text_encoder": recorded}}}
            (out / "config.yaml").write_text(yaml.safe_dump(settings))
        read = _text_encoder(LdmConfig(data="x", out=str(out), vae="v", text_encoder=name), None)
        assert read.tokenizer.pad_token_id == padding
        assert read.digest == (earlier.digest if padding else encoder.digest)


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_a_tower_of_full_size_encodes_as_open_clip() -> None:
    config = open_clip.get_model_config("ViT-B-32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = perturbed(open_clip.CLIP(config["embed_dim"], SMALL["vision_cfg"], config["text_cfg"]))
    encoder = ClipTextEncoder(convert(model.state_dict(), config).eval(), tokenizer_of(config))
    assert (encoder.width, encoder.model.config.num_hidden_layers) == (512, 12)
    compare(model, encoder, PROMPTS[::25])


@pytest.mark.parametrize("small", [False], ids=["gelu"], indirect=True)
def test_every_notation_loads_the_same_encoder(small, tmp_path: Path, monkeypatch) -> None:
    model, folder = small
    digest = ClipTextEncoder.load(f"openclip:{folder}").digest
    assert ClipTextEncoder.load(f"openclip:local-dir:{folder}").digest == digest
    repository = tmp_path / "models--someone--model"
    write_model(
        model, json.loads((folder / "open_clip_config.json").read_text())["model_cfg"], repository / "snapshots/0123"
    )
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("ldm.formats.hub.snapshot_download", partial(snapshot_download, cache_dir=tmp_path))
    assert ClipTextEncoder.load("openclip:hf-hub:someone/model").digest == digest
    # A text tower that is a separate module, from training under DistributedDataParallel.
    text = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    inner = {("text." if k.startswith(text) else "") + k: v for k, v in model.state_dict().items()}
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    weights = {f"module.{k}": v.contiguous() for k, v in inner.items()}
    save_file(weights, tmp_path / "inner/open_clip_model.safetensors")
    assert ClipTextEncoder.load(f"openclip:{tmp_path}/inner").digest == digest
    # open_clip also accepts a file as the name of an architecture.
    (tmp_path / "ldm-small.json").write_text(
        json.dumps(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    )
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "ldm-small.json")
    assert ClipTextEncoder.load(f"openclip:ldm-small/{folder}/open_clip_model.safetensors").digest == digest


def test_a_saved_encoder_loads_in_transformers(small, tmp_path: Path) -> None:
    encoder = ClipTextEncoder.load(f"openclip:{small[1]}")
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training
    expected = encoder.encode(PROMPTS[:4])
    encoder.save(tmp_path)
    stock = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    out = stock(input_ids=tokenize(encoder.tokenizer, PROMPTS[:4]))
    torch.testing.assert_close(out.last_hidden_state, expected)
    again = ClipTextEncoder.load(tmp_path)
    assert torch.equal(again.encode(PROMPTS[:4]), expected)
    assert again.digest == encoder.digest


@pytest.mark.parametrize("skip", [0, 1])
def test_stock_diffusers_generates_the_same_from_it(small, tmp_path: Path, skip: int) -> None:
    """The encoder uses the last layer, or skips it as Stable Diffusion 2 does."""
    encoder = ClipTextEncoder.load(f"openclip:{small[1]}", skip=skip)
    tiny = tiny_pipeline()
    unet = small_unet(text_width=encoder.width)
    pipe = LatentDiffusionPipeline(unet.eval().requires_grad_(False), tiny.autoencoder, encoder, tiny.process)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionPipeline
    stock.set_progress_bar_config(disable=True)
    prompts, how = ["a red star", "naïve café, 東京 \U0001f600"], {"num_inference_steps": 5, "guidance_scale": 5.0}
    ours, theirs = (
        pipeline(
            prompts,
            negative_prompt=["", "a teal hippopotamus"],
            output_type="np",
            generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
            **how,
            **more,
        ).images
        for pipeline, more in ((pipe, {"sampler": "ddim"}), (stock, {}))
    )
    assert np.asarray(ours).std() > 0.01
    assert np.abs(ours - theirs).max() <= 2 / 255
    assert len(stock.text_encoder.encoder.layers) == 3 - skip


def test_the_activation_is_that_of_the_weights(monkeypatch) -> None:
    """OpenAI's weights were trained with QuickGELU; open_clip only warns if the architecture differs."""
    asked = []

    def create_model(architecture: str, *, pretrained: str, force_quick_gelu: bool) -> nn.Module:
        asked.append((architecture, pretrained, force_quick_gelu))
        config = open_clip.get_model_config(architecture)
        return open_clip.CLIP(config["embed_dim"], SMALL["vision_cfg"], config["text_cfg"])

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        encoder = ClipTextEncoder.load(f"openclip:ViT-B-32/{tag}")
        assert asked.pop() == ("ViT-B-32", tag, quick)
        assert encoder.model.config.hidden_act == ("quick_gelu" if quick else "gelu")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.pt", "open_clip_model.safetensors"])
def test_pickles_are_never_opened(small, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((small[1] / "open_clip_config.json").read_bytes())
    torch.save(Canary(tmp_path / "canary"), folder / name)
    for source in (f"openclip:{folder}", f"openclip:ViT-B-32/{folder}/{name}"):
        with pytest.raises(UserError) as caught:
            ClipTextEncoder.load(source)
        assert "\n" not in str(caught.value)
        assert source in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_folder_that_does_not_fit_is_refused(small, tmp_path: Path) -> None:
    model, folder = small
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    text, layer = config["text_cfg"], "transformer.resblocks.1."

    def refused(why: str, changes: dict | None = None, more: dict | None = None, without: str = "-") -> None:
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config | {"text_cfg": text | (changes or {})}})
        )
        kept = {k: v for k, v in weights.items() if k != without} | (more or {})
        save_file(kept, tmp_path / "open_clip_model.safetensors")
        with pytest.raises(UserError, match=why) as caught:
            ClipTextEncoder.load(f"openclip:{tmp_path}")
        assert "\n" not in str(caught.value)

    refused("its text tower sets no_causal_mask: only CLIP's", {"no_causal_mask": True})
    refused("512 tokens: only CLIP's, with 49408", {"vocab_size": 512})
    refused("transformer.resblocks.3.attn.in_proj_weight .* missing", {"layers": 4})
    refused("has the weight transformer.resblocks.2", {"layers": 2})
    refused("size mismatch", {"context_length": 76})
    refused("size mismatch", {"width": 48})
    refused("ln_final.bias .* missing", without="ln_final.bias")
    refused("ls_1.gamma", more={f"{layer}ls_1.gamma": torch.ones(32)})
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        ClipTextEncoder.load(f"openclip:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("openclip:ViT-Z-99/none", "ViT-Z-99"),
        ("openclip:", "no architecture ''"),
        ("openclip:/nowhere/at/all", "'/nowhere/at/all' is not a folder with open_clip_config.json"),
        ("openclip:ViT-B-32", "laion2b_s34b_b79k"),
        ("openclip:ViT-B-32/pickle.pt", "pickle.pt"),
        ("openclip:roberta-ViT-B-32/laion2b_s12b_b32k", "hf_model_name"),
        ("openclip:MobileCLIP-S1/datacompdr", "no_causal_mask"),
        ("openclip:coca_ViT-B-32/laion2b_s13b_b90k", "embed_cls"),
        ("openclip:ViT-B-16-SigLIP2/webli", "hf_tokenizer_name"),
        ("openclip:ViT-H-14-worldwide/x", "worldwide"),
        ("openclip:hf-hub:not a name", "can't be downloaded from the hub"),
    ],
)
def test_unavailable_models_are_named(name: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        ClipTextEncoder.load(name)
    assert name in str(caught.value)
