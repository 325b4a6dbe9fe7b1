"""Long prompts in chunks: each is encoded separately, and their number belongs to the model."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel

from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import tokenize
from ldm.errors import UserError
from ldm.model import warn_once
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import generators
from support.models import tiny_pipeline

SHORT = "a small blue star"
WORDS = [
    f"{size} {colour} star" for size in ("small", "large") for colour in ("red", "blue", "green", "white", "black")
]
LONG = " ".join(WORDS)  # 30 tokens: two chunks of 14 have room for 28


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


def chunked(pipe: LatentDiffusionPipeline, chunks: int) -> ClipTextEncoder:
    return ClipTextEncoder(pipe.text_encoder.model, pipe.text_encoder.tokenizer, chunks=chunks)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_one_chunk_equals_the_plain_encoding(pipe) -> None:
    one, prompts = chunked(pipe, 1), [SHORT, "", "a red star"]
    with torch.no_grad():
        hidden = one.model(input_ids=tokenize(one.tokenizer, prompts)).last_hidden_state
    assert torch.equal(one.encode(prompts), hidden)
    assert torch.equal(pipe.text_encoder.encode(prompts), hidden)
    assert one.digest == pipe.text_encoder.digest
    assert one.tokens == one.max_length == 16


def test_a_short_prompt_is_padded_with_empty_chunks(pipe) -> None:
    one, three = chunked(pipe, 1), chunked(pipe, 3)
    encoded = three.encode([SHORT, "a red star"])
    assert encoded.shape == (2, three.tokens, 32) == (2, 48, 32)
    for row, prompt in zip(encoded, (SHORT, "a red star"), strict=True):
        close(row[None], torch.cat([one.encode([prompt]), one.encode([""]), one.encode([""])], 1))
    close(three.encode([""]), one.encode([""]).repeat(1, 3, 1))
    assert three.encode([]).shape == (0, 48, 32)
    assert len({one.digest, chunked(pipe, 2).digest, three.digest}) == 3


def test_a_long_prompt_is_encoded_chunk_by_chunk(pipe) -> None:
    one, three = chunked(pipe, 1), chunked(pipe, 3)
    words = LONG.split()
    assert [len(one.tokenizer.tokenize(word)) for word in words] == [1] * 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = three.encode([LONG])
    parts = [" ".join(words[k : k + 14]) for k in (0, 14, 28)]
    close(encoded, torch.cat([one.encode([part]) for part in parts], 1))


def test_text_beyond_the_last_chunk_is_quoted(pipe) -> None:
    two = chunked(pipe, 2)
    with pytest.warns(UserWarning, match='30 tokens but only 28 fit; this part is ignored: "black star"') as caught:
        cut = two.encode([LONG])
    assert len(caught) == 1
    close(cut, two.encode([" ".join(LONG.split()[:28])]))


@settings(deadline=None)
@given(prompt=st.text(st.sampled_from("ab é1\U0001f600.'"), max_size=80), chunks=st.integers(1, 4))
def test_chunks_contain_the_tokens_in_order(pipe, prompt: str, chunks: int) -> None:
    tokenizer = pipe.text_encoder.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = tokenize(tokenizer, [prompt], chunks).view(chunks, 16)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (ids[:, 0] == begin).all()
    assert (ids[:, -1] == end).all()
    encoded = [token for row in ids.tolist() for token in row if token not in (begin, end)]
    assert encoded == tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[: chunks * 14]
    filled = (ids[:, 1:-1] != end).sum(1).tolist()
    assert filled == sorted(filled, reverse=True)
    assert sum(0 < n < 14 for n in filled) <= 1


def test_the_number_is_saved_with_the_model_and_can_be_overridden(pipe, tmp_path: Path, caplog) -> None:
    warn_once.cache_clear()
    long = LatentDiffusionPipeline(pipe.unet, pipe.autoencoder, chunked(pipe, 2), pipe.process)
    long.save_pretrained(tmp_path)
    long.save_pretrained(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ldm.model"]
    assert "2 chunks" in line
    assert "first 16 tokens" in line
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["prompt_chunks"] == 2
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert again.text_encoder.chunks == 2
    assert again.text_encoder.digest == long.text_encoder.digest
    assert ClipTextEncoder.load(tmp_path).encode([SHORT]).shape == (1, 32, 32)
    for chunks in (1, 3):
        other = LatentDiffusionPipeline.from_pretrained(tmp_path, chunks=chunks)
        assert other.encode([SHORT]).shape == (1, chunks * 16, 32)
        other.save_pretrained(tmp_path / "other")
        assert LatentDiffusionPipeline.from_pretrained(tmp_path / "other").text_encoder.chunks == chunks
    pipe.save_pretrained(tmp_path / "one")
    assert "prompt_chunks" not in json.loads((tmp_path / "one/text_encoder/config.json").read_text())


@pytest.mark.parametrize("wrong", [0, -1, "2", 1.5, True, None])
def test_other_numbers_of_chunks_are_refused(pipe, tmp_path: Path, wrong) -> None:
    pipe.text_encoder.save(tmp_path)
    file = tmp_path / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompt_chunks": wrong}))
    with pytest.raises(UserError, match=f"chunks {wrong!r}: must be a whole number from 1 to 32"):
        ClipTextEncoder.load(tmp_path)
    assert ClipTextEncoder.load(tmp_path, chunks=2).chunks == 2
    with pytest.raises(UserError, match="chunks 0"):
        ClipTextEncoder.load(tmp_path, chunks=0)


def test_stock_diffusers_reads_the_folder_and_generates_from_short_prompts(pipe, tmp_path: Path, capfd) -> None:
    long = LatentDiffusionPipeline(pipe.unet, pipe.autoencoder, chunked(pipe, 2), pipe.process)
    long.save_pretrained(tmp_path)
    _, report = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert "prompt_chunks" not in capfd.readouterr().err
    stock.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 5, "guidance_scale": 3.0, "generator": generators(2, 5)}
    theirs = torch.from_numpy(stock([SHORT, "a red star"], output_type="np", **how).images).permute(0, 3, 1, 2)
    first = LatentDiffusionPipeline.from_pretrained(tmp_path, chunks=1)  # diffusers' input
    how["generator"] = generators(2, 5)
    ours = first([SHORT, "a red star"], sampler="ddim", output_type="pt", **how).images
    assert (ours - theirs).abs().max() <= 1 / 255


@pytest.mark.filterwarnings("ignore:a prompt has 30 tokens but only 14 fit")  # in the weaker model
def test_all_prompts_of_an_image_have_the_same_number_of_chunks(pipe) -> None:
    long = LatentDiffusionPipeline(pipe.unet, pipe.autoencoder, chunked(pipe, 3), pipe.process)

    def generated(*prompts: str, negative: str = "", scale: float = 3.0, **more) -> torch.Tensor:
        return long(
            prompts,
            negative,
            num_inference_steps=3,
            guidance_scale=scale,
            generator=generators(2, 5)[: len(prompts)],
            output_type="latent",
            **more,
        ).images

    def same(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    both = generated(LONG, SHORT)
    same(generated(LONG), both[:1])
    assert (generated(f"{LONG} cross")[0] - both[0]).abs().mean() > 1e-4  # the third chunk has an effect
    single = generated(SHORT, scale=1.0)
    assert (both[1:] - single).abs().mean() > 1e-3  # so has the null condition
    same(generated(SHORT, negative=SHORT), single)  # a negative prompt replaces it,
    same(generated(LONG, negative=LONG), generated(LONG, scale=1.0))  # also a long one
    same(generated(SHORT, scale=0.0, compose=[(LONG, 3.0)]), both[:1])
    assert (generated(LONG, SHORT, weak=pipe) - both).abs().mean() > 1e-3  # the weaker model reads one chunk
    assert long.invert(both, [LONG, SHORT], num_inference_steps=3).isfinite().all()
