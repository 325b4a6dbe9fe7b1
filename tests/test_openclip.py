"""OpenCLIP's text tower, converted, against open_clip itself, with either activation."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel

from conditioning import ClipTextEncoder
from conditioning.openclip import convert, tokenizer_of
from conditioning.tokenizer import tokenize
from ldm.errors import UserError

PROMPTS = [
    *("", "a photograph of an astronaut riding a horse", "RED  and\nblue!", "naïve café, 東京 \U0001f600", "it's 3 o'clock"),
    *(f"a {size} {colour} {thing} no. {n}" for n, size in enumerate(("small", "large")) for colour in ("red", "teal")
      for thing in ("star", "hippopotamus", "extraordinarily-hyphenated thing")),
    "one word after another " * 30,
]  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def theirs(request: pytest.FixtureRequest):
    config = open_clip.get_model_config("ViT-S-32-alt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.create_model("ViT-S-32-alt", force_quick_gelu=request.param).eval(), config


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_ids_hidden_states_and_pooled_features_are_open_clips(theirs) -> None:
    model, config = theirs
    ids = open_clip.get_tokenizer("ViT-S-32-alt")(PROMPTS)
    end = ids.argmax(1)
    encoder = ClipTextEncoder(convert(model, config).eval(), tokenizer_of(config))
    ours = tokenize(encoder.tokenizer, PROMPTS)
    for row, mine, last in zip(ids, ours, end, strict=True):
        assert row[: last + 1].tolist() == mine[: last + 1].tolist()
    with torch.no_grad():
        out = encoder.model(input_ids=ids)
        x = model.token_embedding(ids) + model.positional_embedding
        hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        pooled = model.encode_text(ids)
    assert (out.last_hidden_state - hidden).abs().max() < 1e-4
    ended = encoder.model(input_ids=ours).pooler_output  # what follows the end makes no difference to it
    assert (ended @ model.text_projection - pooled).abs().max() < 1e-4


def test_a_local_checkpoint_is_read_saved_and_is_then_everybodys(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-S-32-alt")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
    encoder = ClipTextEncoder.load(f"openclip:ViT-S-32-alt/{tmp_path}/clip.safetensors")
    assert not any(p.requires_grad for p in encoder.parameters())
    expected = encoder.encode(PROMPTS[:4])
    encoder.save(tmp_path / "saved")
    stock = CLIPTextModel.from_pretrained(tmp_path / "saved/text_encoder")
    ids = tokenize(encoder.tokenizer, PROMPTS[:4])
    torch.testing.assert_close(stock(input_ids=ids).last_hidden_state, expected)
    again = ClipTextEncoder.load(tmp_path / "saved")
    assert torch.equal(again.encode(PROMPTS[:4]), expected)
    assert again.digest == encoder.digest


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("openclip:ViT-Z-99/none", "ViT-Z-99"),
        ("openclip:ViT-B-32", "laion2b_s34b_b79k"),
        ("openclip:ViT-B-32/pickle.pt", "pickle.pt"),
        ("openclip:roberta-ViT-B-32/laion2b_s12b_b32k", "hf_model_name"),
        ("openclip:MobileCLIP-S1/datacompdr", "no_causal_mask"),
        ("openclip:coca_ViT-B-32/laion2b_s13b_b90k", "embed_cls"),
        ("openclip:ViT-B-16-SigLIP2/webli", "hf_tokenizer_name"),
        ("openclip:ViT-H-14-worldwide/x", "worldwide"),
    ],
)
def test_what_cannot_be_had_is_named(name: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        ClipTextEncoder.load(name)
