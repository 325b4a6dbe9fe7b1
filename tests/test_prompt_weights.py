"""Weights in prompts: expected weights are written down by hand, and features are computed independently here."""

from typing import Any

import pytest
import torch
from PIL import Image

from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import tokenize, train_tokenizer
from conditioning.weights import fragments
from ldm.errors import UserError
from support.commands import run_script
from support.models import PROMPTS, small_clip_model, tiny_pipeline

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red star", [("a red star", 1)]),
        ("a (red) star", [("a ", 1), ("red", UP), (" star", 1)]),
        ("a (red:1.3) star", [("a ", 1), ("red", 1.3), (" star", 1)]),
        ("a [red] star", [("a ", 1), ("red", DOWN), (" star", 1)]),
        ("((red))", [("red", UP**2)]),
        ("[[red]]", [("red", DOWN**2)]),
        ("(a (red:1.5) star:1.2)", [("a ", 1.2), ("red", 1.8), (" star", 1.2)]),
        ("[a (red)]", [("a ", DOWN), ("red", 1)]),
        ("(red:.5)(star: 2 )", [("red", 0.5), ("star", 2)]),
        ("(red:-1)", [("red", -1)]),
        (r"a \(red\) star", [("a (red) star", 1)]),
        (r"\[red\] \\ x", [("[red] \\ x", 1)]),
        ("ratio 16:9, a:b", [("ratio 16:9, a:b", 1)]),
        ("red) star]", [("red) star]", 1)]),
        ("(red star", [("red star", UP)]),
        ("a ([red) star]", [("a red", 1), (" star", DOWN)]),
        ("(red:x)", [("red:x", UP)]),
        ("(cat)(dog)", [("catdog", UP)]),  # parts of equal weight are one text there
        ("", [("", 1)]),
        ("()", [("", 1)]),
    ],
)
def test_the_web_uis_rules(prompt: str, expected: list[tuple[str, float]]) -> None:
    parts = fragments(prompt, "a1111")
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red) star", [("a ", 1), ("red", UP), (" star", 1)]),
        ("((red))", [("red", UP**2)]),
        ("(a (red:1.5) star:1.2)", [("a ", 1.2), ("red", 1.5), (" star", 1.2)]),  # not multiplied
        ("(a (red) star:1.2)", [("a ", 1.2), ("red", 1.2 * UP), (" star", 1.2)]),
        ("a [red] star", [("a [red] star", 1)]),
        (r"a \(red\) star", [("a (red) star", 1)]),
        ("(red:x)", [("red:x", UP)]),
        ("(red star", [("(red star", 1)]),
        ("(:1.3)", [(":1.3", UP)]),
        ("a:b", [("a:b", 1)]),
        ("", [("", 1)]),
    ],
)
def test_comfyuis_rules(prompt: str, expected: list[tuple[str, float]]) -> None:
    parts = fragments(prompt, "comfyui")
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])


def test_a_weight_that_is_not_finite_is_refused() -> None:
    for prompt in ("(red:inf)", "(red:nan)", "(red:1e999)"):
        with pytest.raises(UserError, match="must be a finite number"):
            fragments(prompt, "comfyui")
    with pytest.raises(UserError, match="must be a finite number"):
        fragments(f"(red:{'9' * 400})", "a1111")


@pytest.fixture(scope="module")
def encoder() -> ClipTextEncoder:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([*PROMPTS, "a red star (red) [red]"] * 3, 640, 16)
    tower = small_clip_model(tokenizer).text_model.eval().requires_grad_(False)
    for name, bias in tower.named_parameters():
        if name.endswith("final_layer_norm.bias"):
            bias += 0.3  # else the mean of the features is 0
    return ClipTextEncoder(tower, tokenizer)


def positions(encoder: ClipTextEncoder, before: str, weighted: str) -> slice:
    """Return the places of a part's tokens, after the begin token."""
    first, count = (len(encoder.tokenizer(text, add_special_tokens=False).input_ids) for text in (before, weighted))
    return slice(1 + first, 1 + first + count)


def test_features_by_the_web_uis_rule(encoder: ClipTextEncoder) -> None:
    plain = encoder.encode(["a red star"])[0].double()
    expected = plain.clone()
    expected[positions(encoder, "a ", "red")] *= 1.3
    expected *= plain.mean() / expected.mean()
    weighted = encoder.encode(["a (red:1.3) star", "a red star"], "a1111")
    torch.testing.assert_close(weighted[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weighted[1], encoder.encode(["a red star"])[0])  # others of a batch stay the same


def test_features_by_comfyuis_rule(encoder: ClipTextEncoder) -> None:
    plain, empty = encoder.encode(["a red star", ""]).double()
    expected, place = plain.clone(), positions(encoder, "a ", "red")
    expected[place] = empty[place] + 1.3 * (plain[place] - empty[place])
    weighted = encoder.encode(["a (red:1.3) star", "a red star"], "comfyui")
    torch.testing.assert_close(weighted[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(weighted[1], encoder.encode(["a red star"])[0])


def test_weights_follow_their_tokens_into_later_chunks(encoder: ClipTextEncoder) -> None:
    """The chunk without weights keeps its features."""
    long = ClipTextEncoder(encoder.model, encoder.tokenizer, chunks=2)
    words = "red " * 20
    plain, weighted = long.encode([f"{words}star"])[0], long.encode([f"{words}(star:2)"], "a1111")[0]
    size = encoder.max_length
    torch.testing.assert_close(weighted[:size], plain[:size])
    assert not torch.allclose(weighted[size:], plain[size:])


def test_plain_text_is_the_default(encoder: ClipTextEncoder) -> None:
    assert not torch.equal(encoder.encode(["a (red) star"]), encoder.encode(["a red star"]))
    ids = tokenize(encoder.tokenizer, ["a (red) star"])
    assert "(" in encoder.tokenizer.decode(ids[0])
    for rules in ("a1111", "comfyui"):
        assert torch.equal(encoder.encode(PROMPTS, rules), encoder.encode(PROMPTS))
        assert encoder.encode([], rules).shape == encoder.encode([]).shape == (0, 16, 32)


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_every_prompt_of_a_call_is_weighted() -> None:
    pipe = tiny_pipeline()

    def image(**arguments: Any) -> torch.Tensor:
        how: dict[str, Any] = {"prompt": "a red star", "num_inference_steps": 1, "output_type": "latent"}
        return pipe(**how | arguments, generator=torch.Generator().manual_seed(0)).images

    for name, weighted in (
        ("prompt", "a (red:2) star"),
        ("negative_prompt", "a (blue:2) star"),
        ("compose", [("a (blue:2) star", 1.0)]),
    ):
        results = [image(**{name: weighted, "prompt_weights": rules}) for rules in ("none", "a1111", "comfyui")]
        assert len({result.sum().item() for result in results}) == 3, name
    with pytest.raises(UserError, match="prompt_weights 'forge': choose none, a1111, comfyui"):
        image(prompt_weights="forge")


def test_the_option_is_saved_with_an_image(tmp_path: Any) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    shared = ("--model", tmp_path / "model", "--steps", "1", "--prompt", "(red:2)")
    (first,) = run_script("txt2img", *shared, "--prompt-weights", "a1111", "--out", tmp_path / "a").paths
    (again,) = run_script("txt2img", "--like", first, "--out", tmp_path / "b").paths
    (plain,) = run_script("txt2img", *shared, "--out", tmp_path / "c").paths
    assert Image.open(first).tobytes() == Image.open(again).tobytes() != Image.open(plain).tobytes()
