"""The text condition: tokenizer, encoder and contrastive loss.

The tokenizer is compared with CLIP's algorithm, the encoder with transformers and diffusers, and the loss with its
definition, on one process and on two.
"""

import json
import math
import pickle
import re
import unicodedata
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conditioning.clip import ClipTextEncoder
from conditioning.contrastive import Contrastive, contrastive_loss, retrieval_accuracy, save_clip
from conditioning.token_tasks import Echo, Sketch, TokenTasks
from conditioning.tokenizer import load_tokenizer, save_tokenizer, tokenize, train_tokenizer
from ldm.errors import UserError
from support.models import small_clip_model
from support.processes import run_in_processes
from train.stages.caption_warnings import TruncatedCaptions

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
CAPTIONS = [
    f"a {size} {colour} {shape} {where} a {other} square"
    for size in ("small", "large")
    for colour in COLOURS
    for shape in ("circle", "star")
    for where in ("above", "left of")
    for other in COLOURS
]
LENGTH = 24
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def small_clip(tokenizer: CLIPTokenizer, **change: int) -> CLIPModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small_clip_model(tokenizer, **change)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, 555, LENGTH)


@pytest.fixture(scope="module")
def clip(tokenizer) -> CLIPModel:
    return small_clip(tokenizer).eval()


@pytest.fixture
def encoder(clip, tokenizer) -> ClipTextEncoder:
    return ClipTextEncoder(clip.text_model, tokenizer)


# -- tokenizer ------------------------------------------------------------------------------------------------

# Characters whose class, case and composition haven't changed since Unicode 7.
SETTLED = st.characters(max_codepoint=0x52F) | st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5)
TEXTS = st.text(SETTLED | st.sampled_from("aeiou 's!?019\U0001f600\u0301"), max_size=60)


def byte_letters() -> dict[int, str]:
    """OpenAI's alphabet of bytes: printable bytes map to themselves, the others to characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def words(text: str) -> list[str]:
    """Split a text by CLIP's description.

    It is normalised to NFC and lower case, then split into contractions, letters, single digits and runs of anything
    else.
    """
    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))

    def kind(c: str) -> str:
        if c in "\t\n\v\f\r\x85" or unicodedata.category(c)[0] == "Z":
            return " "
        return unicodedata.category(c)[0] if unicodedata.category(c)[0] in "LN" else "other"

    found, i = [], 0
    while i < len(text):
        j = i + 1
        contraction = re.compile("'(s|t|re|ve|m|ll|d)").match(text, i)
        if contraction:
            j = contraction.end()
        elif kind(text[i]) != "N":
            while j < len(text) and kind(text[j]) == kind(text[i]):
                j += 1
        if kind(text[i]) != " ":
            found.append(text[i:j])
        i = j
    return found


def read_slowly(folder: Path, text: str) -> list[int]:
    """Tokenize by the published algorithm over vocab.json and merges.txt, as older readers do."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")
    rank = {tuple(line.split()): i for i, line in enumerate(lines[1 : 49152 - 256 - 2 + 1])}
    letters, ids = byte_letters(), []
    for word in words(text):
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair, math.inf))
            if best not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


def plain_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def test_token_ids_are_numbered_like_openais(tokenizer):
    vocabulary = tokenizer.get_vocab()
    letters = list(byte_letters().values())
    assert [vocabulary[b] for b in letters] == list(range(256))
    assert [vocabulary[b + "</w>"] for b in letters] == list(range(256, 512))
    assert len(tokenizer) == 555
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (553, 554, 554)


def test_frequent_words_become_one_token():
    roomy = train_tokenizer(CAPTIONS, 49408, LENGTH)
    assert roomy.tokenize("a Large yellow star left") == ["a</w>", "large</w>", "yellow</w>", "star</w>", "left</w>"]
    assert len(roomy) < 600  # no pairs are left
    assert (len(roomy) - 1, len(roomy) - 2) == (roomy.eos_token_id, roomy.bos_token_id)


@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_is_kept_byte_for_byte_without_a_special_token(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)  # unknown and padding are the end token too
    byte = {letter: b for b, letter in byte_letters().items()}
    spelled = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("</w>", "")
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert bytes(byte[c] for c in spelled) == "".join(re.findall(r"[^ ]+", normal)).encode()


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>"])
def test_names_of_special_tokens_in_a_prompt_are_text(tokenizer, tmp_path, name):
    save_tokenizer(tokenizer, tmp_path)
    for reader in (tokenizer, load_tokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)):
        ids = reader(f"a red {name} star").input_ids
        assert ids[0] == 553
        assert ids[-1] == 554
        assert not {553, 554} & set(ids[1:-1])
        assert "of" in reader.decode(ids[1:-1]) or "oftext" in reader.decode(ids[1:-1])


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_the_published_algorithm_gives_the_same_ids(tmp_path_factory, tokenizer, text):
    folder = tmp_path_factory.getbasetemp() / "slow"
    if not folder.exists():
        save_tokenizer(tokenizer, folder)
    assert read_slowly(folder, text) == plain_ids(tokenizer, text)


def test_files_round_trip(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "all")
    assert all((tmp_path / "all" / name).is_file() for name in FILES)
    (tmp_path / "halves").mkdir()
    for name in FILES[1:]:
        (tmp_path / "halves" / name).write_bytes((tmp_path / "all" / name).read_bytes())
    texts = [*CAPTIONS[:20], "", "  Crème BRÛLÉE 日本 \U0001f600 it's 42", "<|endoftext|>"]
    for folder in (tmp_path / "all", tmp_path / "halves"):
        again = CLIPTokenizer.from_pretrained(folder)
        assert again(texts).input_ids == tokenizer(texts).input_ids
        assert again.model_max_length == LENGTH
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (553, 554, 554)


def test_same_captions_same_files(tokenizer, tmp_path):
    """Ties are frequent here. They are resolved in the same way for any order of the captions."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 8, (2000, 4), generator=generator)
    captions = [" ".join("".join("abcdefgh"[i] for i in row) for row in part) for part in letters.split(4)]
    for name, order in (("a", captions), ("b", captions), ("c", captions[::-1])):
        save_tokenizer(train_tokenizer(order, 900, LENGTH), tmp_path / name)
    for file in FILES:
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1
    used = train_tokenizer(captions, 900, LENGTH)
    used(["abc", "d"], padding="max_length", truncation=True)
    save_tokenizer(used, tmp_path / "used")
    assert (tmp_path / "used" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("size", "length"), [(513, 16), (49409, 16), (600, 2)])
def test_impossible_sizes_are_refused(size, length):
    with pytest.raises(UserError, match=str(size if length == 16 else length)):
        train_tokenizer(["a"], size, length)


def test_tokens_are_those_of_a_stock_pipeline(tokenizer):
    prompts = ["", "a red star", "Ünïcode 日本 \U0001f600", "word " * 40]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = tokenize(tokenizer, prompts)
    stock = tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    assert torch.equal(ids, stock.input_ids)


def test_tokens_equal_openais_on_openais_vocabulary():
    """OpenAI's merges in our layout give the ids of OpenAI's own tokenizer (as open_clip ships it)."""
    reference = pytest.importorskip("open_clip").SimpleTokenizer()
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.get)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in reference.encoder.items()}
    ours = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, split_special_tokens=True)
    prompts = ["", "A photo of a cat's toy, 1999!", "Crème brûlée — 日本 \U0001f600", "don't stop " * 10]
    ids, theirs = tokenize(ours, prompts), reference(prompts)
    ends = theirs.argmax(1)
    for row, their_row, end in zip(ids, theirs, ends, strict=True):
        assert torch.equal(row[: end + 1], their_row[: end + 1])
        assert (row[end:] == 49407).all()  # padded with the end, where OpenAI pads with 0


@settings(deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["x", "Q", "7", "É", "e\u0301", "İ", "\U0001f600", "\ud800"]), min_size=1),
    spaces=st.lists(st.sampled_from([" ", "  ", "\n", "\u3000"]), min_size=1),
)
def test_truncated_text_is_quoted_exactly(tokenizer, pieces, spaces):
    """Words are single characters here, so the text is truncated between characters."""
    pieces = pieces * 6
    prompt = "".join(p + spaces[i % len(spaces)] for i, p in enumerate(pieces))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = tokenize(tokenizer, [prompt])[0]
    if not caught:
        assert ids[-1] == tokenizer.eos_token_id
        return
    assert issubclass(caught[0].category, UserWarning)
    lost = re.search('is ignored: "(.*)"$', str(caught[0].message), re.DOTALL)[1]
    assert lost
    assert prompt.endswith(lost)
    kept = prompt[: -len(lost)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept_ids = plain_ids(tokenizer, kept.replace("\ud800", "\ufffd"))
    assert ids[1 : 1 + len(kept_ids)].tolist() == kept_ids
    first_lost = plain_ids(tokenizer, lost.replace("\ud800", "\ufffd").split()[0])
    assert len(kept_ids) <= LENGTH - 2 < len(kept_ids) + len(first_lost)


def test_a_prompt_that_just_fits_is_not_truncated(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(tokenizer, ["x " * (LENGTH - 2)])
    with pytest.warns(UserWarning, match=r'ignored: "Last one  "$'):
        cut = tokenize(tokenizer, ["x " * (LENGTH - 2) + "Last one  "])
    assert torch.equal(ids, cut)


def test_a_prompt_of_a_megabyte_is_truncated(tokenizer):
    with pytest.warns(UserWarning, match=r"ignored: \"y{500}\" and 1048076 more characters$") as caught:
        assert tokenize(tokenizer, ["x " * (LENGTH - 2) + "y" * 2**20]).shape == (1, LENGTH)
    assert len(str(caught[0].message)) < 700


# -- where transformers takes the pooled state ----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["first end", "greatest id"])
def test_pooled_state_is_at_the_end_of_the_caption(clip, tokenizer, rule):
    """Padding is also the end token: under either rule the state is that of the caption's own end."""
    model = CLIPTextModel(CLIPTextConfig.from_dict(clip.text_model.config.to_dict())).eval()
    if rule == "greatest id":
        model.config.eos_token_id = 2  # the value in OpenAI's own configurations
        getattr(model, "text_model", model).eos_token_id = 2
    prompts = ["", "a red star", "a small blue circle above a white square"]
    ids = tokenize(tokenizer, prompts)
    with torch.no_grad():
        output = model(input_ids=ids)
    ends = torch.tensor([1 + len(plain_ids(tokenizer, p)) for p in prompts])
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(3), ends])


def test_a_mask_would_change_the_padding_and_not_the_loss(clip, tokenizer):
    prompts = ["a red star", "a small blue circle above a white square"]
    stock = tokenizer(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        bare = clip.text_model(input_ids=stock.input_ids)
        masked = clip.text_model(input_ids=stock.input_ids, attention_mask=stock.attention_mask)
    torch.testing.assert_close(masked.pooler_output, bare.pooler_output)
    assert (masked.last_hidden_state - bare.last_hidden_state)[0, -1].abs().max() > 1e-3


# -- encoder --------------------------------------------------------------------------------------------------


def test_encoding_is_the_last_hidden_state_without_a_mask(encoder, clip, tokenizer):
    prompts = ["a red star", ""]
    with torch.no_grad():
        hidden = clip.text_model(input_ids=tokenize(tokenizer, prompts)).last_hidden_state
    encoded = encoder.encode(prompts)
    assert torch.equal(encoded, hidden)
    assert encoded.shape == (2, encoder.max_length, encoder.width) == (2, LENGTH, 32)
    assert not encoded.requires_grad
    torch.testing.assert_close(encoder.encode([""]), encoded[1:])
    assert encoder.encode([]).shape == (0, LENGTH, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.encode(prompts), encoded)
    with pytest.raises(ValueError, match="a red star"):
        encoder.encode("a red star")


def test_wrapping_leaves_the_tower_trainable(encoder, clip):
    encoder.encode(["a"])
    assert all(p.requires_grad for p in clip.parameters())


def test_saved_weights_carry_the_prefix_and_load_everywhere(encoder, tmp_path):
    encoder.save(tmp_path)
    stored = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)
    assert all((tmp_path / "tokenizer" / name).is_file() for name in FILES)
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (553, 554, 554)
    assert config["architectures"] == ["CLIPTextModel"]
    model, report = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    read = getattr(model, "text_model", model).state_dict()
    assert read.keys() == {name.removeprefix("text_model.") for name in stored}
    assert all(torch.equal(weight, stored["text_model." + name]) for name, weight in read.items())


def test_a_stock_pipeline_gives_its_unet_the_same_condition(encoder, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    encoder.save(tmp_path)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
    )
    unet.save_pretrained(tmp_path / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    parts = {
        "vae": "AutoencoderKL",
        "unet": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    index = {n: ["transformers" if c.startswith("CLIP") else "diffusers", c] for n, c in parts.items()}
    index |= {n: [None, None] for n in ("safety_checker", "feature_extractor", "image_encoder")}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    prompts = ["a red star", "Crème \U0001f600 <|endoftext|> brûlée"]
    positive, negative = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=True)
    with pytest.warns(UserWarning, match='ignored: "> brûlée"$'):
        ours = encoder.encode(prompts)
    torch.testing.assert_close(positive, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(negative, encoder.encode([""]).expand(2, -1, -1), rtol=0, atol=1e-6)
    assert ClipTextEncoder.load(tmp_path).digest == encoder.digest


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_is_an_earlier_layer_after_the_final_norm(tokenizer, tmp_path, skip):
    """The result equals transformers' hidden states, as diffusers' clip_skip reads them; saved, it needs no option."""
    clip = small_clip(tokenizer, text_layers=3).eval()
    ClipTextEncoder(clip.text_model, tokenizer).save(tmp_path / "full")
    full = ClipTextEncoder.load(tmp_path / "full")
    prompts = ["", "a red star", "a small blue circle above a white square"]
    with torch.no_grad():
        states = clip.text_model(input_ids=tokenize(tokenizer, prompts), output_hidden_states=True).hidden_states
        expected = clip.text_model.final_layer_norm(states[-(skip + 1)])
    encoder = ClipTextEncoder.load(tmp_path / "full", skip=skip)
    torch.testing.assert_close(encoder.encode(prompts), expected, rtol=0, atol=1e-6)
    assert (encoder.digest == full.digest) == (skip == 0)
    encoder.save(tmp_path / "cut")
    config = json.loads((tmp_path / "cut/text_encoder/config.json").read_text())
    assert config["num_hidden_layers"] == 3 - skip
    model, report = CLIPTextModel.from_pretrained(tmp_path / "cut/text_encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        stock = model(input_ids=tokenize(tokenizer, prompts)).last_hidden_state
    torch.testing.assert_close(stock, expected, rtol=0, atol=1e-6)
    again = ClipTextEncoder.load(tmp_path / "cut")
    assert again.digest == encoder.digest
    assert torch.equal(again.encode(prompts), encoder.encode(prompts))


@pytest.mark.parametrize("skip", [-1, 2, 3])
def test_a_skip_that_leaves_no_layer_is_refused(encoder, tmp_path, skip):
    encoder.save(tmp_path)
    with pytest.raises(UserError, match=f"clip_skip {skip}: must be 0 to 1 for a text encoder of 2 layers") as caught:
        ClipTextEncoder.load(tmp_path, skip=skip)
    assert str(tmp_path) in str(caught.value)


def move_tokenizer(folder: Path, target: Path) -> None:
    for name in FILES:
        (folder / "tokenizer" / name).rename(target / name)
    (folder / "tokenizer").rmdir()


FORMS = ("parts", "tokenizer inside", "tokenizer at the top", "the part itself", "text tower", "unprefixed", "clip")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_folder_loads(encoder, clip, tokenizer, tmp_path, form):
    source = tmp_path
    match form:
        case "clip":
            save_clip(clip, tokenizer, tmp_path)
        case "text tower" | "unprefixed":
            save_clip(clip, tokenizer, tmp_path)
            prefix = "" if form == "unprefixed" else "text_model."
            weights = {prefix + k: v.clone() for k, v in clip.text_model.state_dict().items()}
            save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
            clip.text_model.config.save_pretrained(tmp_path)
        case _:
            encoder.save(tmp_path)
            if form == "tokenizer inside":
                move_tokenizer(tmp_path, tmp_path / "text_encoder")
            elif form == "tokenizer at the top":
                move_tokenizer(tmp_path, tmp_path)
            elif form == "the part itself":
                source = tmp_path / "text_encoder"
    state = torch.get_rng_state()
    loaded = ClipTextEncoder.load(source)
    assert torch.equal(torch.get_rng_state(), state)  # no random number was drawn
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    assert torch.equal(loaded.encode(["a red star"]), encoder.encode(["a red star"]))
    assert loaded.digest == encoder.digest


def test_a_hub_id_loads_from_the_hubs_cache(encoder, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--model"
    encoder.save(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("ldm.formats.hub.snapshot_download", partial(snapshot_download, cache_dir=tmp_path))
    assert ClipTextEncoder.load("someone/model").digest == encoder.digest
    with pytest.raises(UserError, match="someone/else"):
        ClipTextEncoder.load("someone/else")


def test_unreadable_folders_are_refused_with_a_reason(encoder, clip, tokenizer, tmp_path):
    def refused(why: str, source: Path | str) -> None:
        with pytest.raises(UserError, match=why) as caught:
            ClipTextEncoder.load(source)
        assert "\n" not in str(caught.value)
        assert str(source) in str(caught.value)

    def broken(name: str) -> Path:
        encoder.save(tmp_path / name)
        return tmp_path / name

    refused("must be an existing folder or a hub id", tmp_path / "nowhere")
    refused("must be an existing folder or a hub id", "conditioning/nowhere/model")
    (tmp_path / "empty").mkdir()
    refused("must contain config.json or text_encoder/config.json", tmp_path / "empty")
    folder = broken("no tokenizer")
    (folder / "tokenizer").rename(folder / "elsewhere")
    refused("no tokenizer: it must have tokenizer.json, or vocab.json and merges.txt", folder)
    folder = broken("other model")
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "t5"}')
    refused("model_type 't5'", folder)
    folder = broken("missing weight")
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "text_encoder" / "model.safetensors")
    refused("the weight .* is missing", folder)
    folder = broken("other shape")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(r"has shape \(.*, but config.json needs", folder)
    folder = broken("truncated")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("can't be read", folder)
    for name in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
        folder = broken("not json " + name.split("/")[0])
        (folder / name).write_text("{")
        refused("can't be read", folder)
    folder = broken("too many tokens")
    many = train_tokenizer([f"{a}{b} " * 3 for a in "abcdefgh" for b in "ijklmnop"], 700, LENGTH)
    save_tokenizer(many, folder / "tokenizer")
    refused("tokens, but the text encoder only 555", folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_pickles_are_never_opened(encoder, tmp_path, name):
    encoder.save(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    (tmp_path / "text_encoder" / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    (tmp_path / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError):
        ClipTextEncoder.load(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_code_named_by_a_folder_is_never_run(encoder, tmp_path):
    encoder.save(tmp_path)
    (tmp_path / "tokenizer" / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: ...")
    for file in (tmp_path / "tokenizer" / "tokenizer_config.json", tmp_path / "text_encoder" / "config.json"):
        stored = json.loads(file.read_text())
        stored |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"], "AutoModel": "evil.Evil"}}
        file.write_text(json.dumps(stored))
    assert ClipTextEncoder.load(tmp_path).encode(["a"]).isfinite().all()
    assert not (tmp_path / "canary").exists()


def test_digest_follows_what_an_encoding_depends_on(encoder, clip, tokenizer, tmp_path):
    before = encoder.digest
    encoder.encode(["a red star"])
    tokenizer(["a", "b c"], padding="max_length", truncation=True)
    assert encoder.digest == before
    others = []
    encoder.save(tmp_path)
    others.append(ClipTextEncoder.load(tmp_path, dtype=torch.bfloat16))
    others.append(changed := ClipTextEncoder.load(tmp_path))
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[7] += 1e-6
    for key, value in (("num_attention_heads", 4), ("hidden_act", "quick_gelu")):
        file = tmp_path / "text_encoder" / "config.json"
        text = file.read_text()
        file.write_text(json.dumps(json.loads(text) | {key: value}))
        others.append(ClipTextEncoder.load(tmp_path))
        file.write_text(text)
    save_tokenizer(train_tokenizer(CAPTIONS[::2], 550, LENGTH), tmp_path / "tokenizer")
    others.append(ClipTextEncoder.load(tmp_path))
    assert len({before, *(other.digest for other in others)}) == 6


# -- contrastive ----------------------------------------------------------------------------------------------


def features(n: int, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, d, generator=generator, dtype=torch.float64))


def test_loss_without_repeated_captions_equals_clips(clip, tokenizer):
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = tokenize(tokenizer, CAPTIONS[:4])
    loss, metrics = Contrastive(clip)(pixels, ids, torch.arange(4))
    reference = clip(input_ids=ids, pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(loss, reference.loss)
    assert metrics["logit_scale"] == clip.logit_scale.exp()
    assert not any(value.requires_grad for value in metrics.values())


def test_equal_captions_share_the_target():
    """The loss equals the definition, evaluated row by row in float64."""
    image, text = features(6)
    ids, scale = torch.tensor([3, 1, 3, 2, 3, 1]), torch.tensor(1.5, dtype=torch.float64)
    cosine = F.cosine_similarity(image[:, None], text[None], dim=-1) * scale.exp()
    expected = 0.0
    for logits in (cosine, cosine.T):
        for i in range(6):
            right = [j for j in range(6) if ids[j] == ids[i]]
            expected -= sum(logits[i].log_softmax(0)[j] for j in right) / len(right) / 12
    torch.testing.assert_close(contrastive_loss(image, text, scale, ids), expected)


def test_equal_features_for_equal_captions_make_it_plain_infonce():
    image, text = features(6)
    ids, scale = torch.tensor([3, 1, 3, 2, 3, 1]), torch.tensor(1.5, dtype=torch.float64)
    shared = contrastive_loss(image, text[ids], scale, ids)
    torch.testing.assert_close(shared, contrastive_loss(image, text[ids], scale, torch.arange(6)))


def test_the_least_loss_is_the_entropy_of_the_targets():
    ids = torch.tensor([0, 0, 1, 2])
    image = F.one_hot(ids).double().requires_grad_()
    text = F.one_hot(ids).double().requires_grad_()
    loss = contrastive_loss(image, text, torch.tensor(math.log(100.0), dtype=torch.float64), ids)
    assert loss.item() == pytest.approx(2 / 4 * math.log(2), abs=1e-12)
    loss.backward()
    assert max(image.grad.abs().max(), text.grad.abs().max()) < 1e-12


def test_permuting_the_batch_changes_nothing():
    image, text = features(7)
    ids, scale, order = torch.tensor([0, 1, 0, 2, 3, 3, 4]), torch.tensor(2.0), torch.tensor([3, 1, 6, 0, 5, 2, 4])
    torch.testing.assert_close(
        contrastive_loss(image[order], text[order], scale, ids[order]), contrastive_loss(image, text, scale, ids)
    )


def test_temperature_is_clamped_at_a_hundred_and_can_fall_again(tokenizer):
    """For untrained towers the best scale is small, so the gradient lowers it at the limit and beyond."""
    module = Contrastive(small_clip(tokenizer))
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = tokenize(tokenizer, CAPTIONS[:4])
    with torch.no_grad():
        module.clip.logit_scale.fill_(10)
    loss, metrics = module(pixels, ids, torch.arange(4))
    loss.backward()
    assert metrics["logit_scale"].item() == pytest.approx(100, rel=1e-5)
    assert module.clip.logit_scale.grad > 1
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters() if p.ndim > 1)
    image, text = features(4)
    far = contrastive_loss(image, text, torch.tensor(50.0), torch.arange(4))
    limit = contrastive_loss(image, text, torch.tensor(math.log(100)), torch.arange(4))
    torch.testing.assert_close(far, limit, rtol=1e-5, atol=0)


def contrast_on(rank: int, ranks: int, folder: str) -> None:
    """Run one process of `ranks`: a backward pass over its rows of a fixed batch of 8, with DistributedDataParallel."""
    torch.set_num_threads(1)
    if ranks > 1:
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    module = Contrastive(CLIPModel.from_pretrained(folder)).double()
    wrapped = nn.parallel.DistributedDataParallel(module) if ranks > 1 else module
    pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    caption_ids = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4])
    loss, _ = wrapped(pixels[mine], tokenize(tokenizer, CAPTIONS[:8])[mine], caption_ids[mine])
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    torch.save({"loss": loss.detach(), **gradients}, f"{folder}/{ranks}-{rank}.pt")
    if ranks > 1:
        distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(clip, tokenizer, tmp_path):
    """Captions with equal ids (here of different text, so they count) are on both processes: both must be gathered."""
    save_clip(clip, tokenizer, tmp_path)
    contrast_on(0, 1, str(tmp_path))
    run_in_processes(contrast_on, 2, str(tmp_path))
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        for other in two:
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert one["clip.logit_scale"].abs() > 0


def test_retrieval_counts_equal_captions_as_right():
    text = torch.eye(4)[[0, 1, 1, 2, 3]]
    ids = torch.tensor([5, 6, 6, 7, 8])
    image = torch.stack(
        [
            torch.tensor([1.0, 0.9, 0.0, 0.0]),  # own caption
            torch.tensor([0.0, 1.0, 0.2, 0.0]),  # own caption, or an equal one
            torch.tensor([0.9, 0.8, 1.0, 0.0]),  # third
            torch.tensor([0.0, 0.0, 0.6, 0.8]),  # second
            torch.tensor([0.0, 1.0, 0.0, 0.5]),  # second, after the equal captions, which count once
        ]
    )
    found = retrieval_accuracy(image, text, ids, ranks=(1, 2, 3, 9))
    assert {name: round(value.item(), 4) for name, value in found.items()} == {
        "image_to_text@1": 0.4,
        "image_to_text@2": 0.8,
        "image_to_text@3": 1.0,
        "text_to_image@1": 0.6,
        "text_to_image@2": 1.0,
        "text_to_image@3": 1.0,
    }
    assert retrieval_accuracy(image, text, torch.zeros(5))["text_to_image@1"] == 1


def test_a_whole_clip_round_trips(clip, tokenizer, tmp_path):
    save_clip(clip, tokenizer, tmp_path)
    again, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(value, clip.state_dict()[name]) for name, value in again.state_dict().items())
    config = CLIPConfig.from_pretrained(tmp_path)
    assert (config.text_config.eos_token_id, config.text_config.max_position_embeddings) == (554, LENGTH)


def test_the_preprocessor_on_disk_makes_what_the_tower_was_trained_on(clip, tokenizer, tmp_path):
    from PIL import Image
    from transformers import CLIPProcessor

    save_clip(clip, tokenizer, tmp_path)
    processor = CLIPProcessor.from_pretrained(tmp_path)
    levels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    out = processor(text=["a red star"], images=Image.fromarray(levels.numpy()), return_tensors="pt")
    torch.testing.assert_close(out.pixel_values[0], levels.permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"text_heads": 3}, {"vision_heads": 5}, {"patch_size": 7}])
def test_shapes_that_do_not_fit_are_refused(tokenizer, wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        small_clip(tokenizer, **wrong)


def test_training_learns_to_distinguish_captions(tokenizer):
    """After a few dozen steps on plain colours every image retrieves its caption, also with repeated captions."""
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, 1, 1], [-1, -1, -1]]).float()
    module = Contrastive(small_clip(tokenizer))
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    index = torch.arange(12) % 6
    pixels = colours[index][:, :, None, None].expand(-1, -1, 16, 16)
    ids = tokenize(tokenizer, [f"a large {COLOURS[i]} square" for i in index])
    for _ in range(60):
        loss, metrics = module(pixels, ids, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["image_to_text@1"] == metrics["text_to_image@1"] == 1
    assert loss < math.log(2) + 0.1  # the entropy of two equal captions


# -- sketch and echo ------------------------------------------------------------------------------------------


def token_tasks(**weights: float) -> TokenTasks:
    shape = {"width": 32, "vocab_size": 555, "patch_size": 8, "image_size": 16}
    return TokenTasks(**{"sketch_weight": 0.0, "echo_weight": 0.0} | weights, **shape)


def test_a_patch_of_the_sketch_has_its_own_query():
    sketch = Sketch(width=16, patch_size=4, image_size=12)
    image = sketch(torch.randn(2, 5, 16))
    assert image.shape == (2, 3, 12, 12)
    (gradient,) = torch.autograd.grad(image[1, 2, 5, 10], sketch.queries)  # second row, third column
    assert gradient.abs().sum(1).nonzero().tolist() == [[1 * 3 + 2]]


def test_the_sketch_is_the_mean_image_and_depends_on_the_order_of_words(tokenizer):
    """Two captions have the same words. The first has two images, whose mean is the least-squares solution."""
    ids = tokenize(tokenizer, ["a red star above a blue circle"] * 2 + ["a blue circle above a red star"] * 2)
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tasks = token_tasks(sketch_weight=100.0)
    module = Contrastive(small_clip(tokenizer), tasks)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for _ in range(150):
        loss, metrics = module(pixels, ids, torch.tensor([0, 0, 1, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means = pixels.unflatten(0, (2, 2)).mean(1).repeat_interleave(2, 0)
    assert metrics["sketch_mse"] < 1.05 * F.mse_loss(means, pixels)
    drawn = tasks.sketch(module.clip.text_model(input_ids=ids).last_hidden_state)
    assert F.mse_loss(drawn, means) < 0.05 * means.var()


def test_the_echo_loss_counts_only_words_up_to_the_end():
    """The loss equals its definition, and a decoder that returns the codes has no error."""
    echo = Echo(width=8, vocab_size=9, words=2, code=8)
    ids = torch.tensor([[1, 2, 3, 8, 0], [1, 8, 8, 8, 8]])  # 8 ends; after it, padding
    tokens = torch.randn(2, 5, 8)
    predicted = echo.repeat(tokens).view(2, 5, 2, 8)
    expected = []
    for back in (0, 1):
        for caption, end in ((0, 3), (1, 1)):
            errors = [
                (predicted[caption, k, back] - echo.codes[ids[caption, k - back]]).square().mean()
                for k in range(back, end + 1)
            ]
            expected.append(torch.stack(errors).mean())
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(echo(tokens, ids, 8), expected)
    with torch.no_grad():
        echo.repeat.weight.copy_(torch.cat([torch.eye(8), torch.zeros(8, 8)]))
        echo.repeat.bias.zero_()
        exact = Echo(width=8, vocab_size=9, words=1, code=8)
        exact.load_state_dict({"codes": echo.codes, "repeat.weight": torch.eye(8), "repeat.bias": torch.zeros(8)})
    assert exact(echo.codes[ids], ids, 8) == 0


def test_the_echo_loss_trains_the_tower(tokenizer):
    """The last words are decoded from a token far better if the tower is trained with the decoder."""
    ids = tokenize(tokenizer, CAPTIONS[::3])
    pixels, caption_ids, error = torch.zeros(len(ids), 3, 16, 16), torch.arange(len(ids)), {}
    for learns in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Contrastive(small_clip(tokenizer), token_tasks(echo_weight=10.0))
        module.clip.requires_grad_(learns)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 3e-3)
        for _ in range(100):
            loss, metrics = module(pixels, ids, caption_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error[learns] = metrics["echo_mse"].item()
    assert error[True] < 0.6 * error[False] < 0.6


def test_truncated_captions_are_counted_and_the_first_is_quoted():
    tokenizer, messages = train_tokenizer(["a red star"], 600, 6), []
    truncated = TruncatedCaptions(messages.append, "--more")

    def read():
        with truncated.counted():
            tokenize(tokenizer, ["a", "a red star on a blue ground", "a red star and more"])
            warnings.warn("something else", stacklevel=1)

    with pytest.warns(UserWarning, match="^something else$"):
        read()
    with pytest.warns(UserWarning, match="^something else$"):
        read()
    assert truncated.count == 4
    assert len(messages) == 1
    assert 'this part is ignored: "' in messages[0]
    assert "ground" in messages[0]
