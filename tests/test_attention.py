"""Attention of the UNet: every backend equals the definition in float64, and unavailable backends are refused."""

import copy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from transformers import CLIPModel

from conditioning.contrastive import save_clip
from conditioning.tokenizer import train_tokenizer
from ldm.errors import UserError
from ldm.networks import attention as module
from ldm.networks.attention import AttentionProcessor, require_attention, sdpa, use_attention
from support.models import PROMPTS, small_clip_model, small_unet, tiny_pipeline


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, head by head."""
    heads = []
    for h in range(q.shape[2]):
        scores = q[:, :, h] @ k[:, :, h].mT / q.shape[3] ** 0.5  # (b, n, m)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[:, :, h])
    return torch.stack(heads, dim=2)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, gradient: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(gradient) for x in drawn]


def random_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return small_unet(0.1, latent_size=8, text_width=24)


def output_and_gradients(
    unet: UNet2DConditionModel, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return the output and the gradient of every weight, in float64."""
    unet.zero_grad()
    x, text = (t.to(device, dtype) for t in tensors((2, 4, 8, 8), (2, 11, 24), gradient=False))
    out = unet(x, torch.tensor([10, 700], device=device), text, return_dict=False)[0]
    out.square().mean().backward()
    grads = [p.grad for p in unet.parameters() if p.grad is not None]
    return [t.detach().double().cpu() for t in (out, *grads)]


# -- against the definition ---------------------------------------------------------------------------------------


def test_half_precision_with_gradients_is_computed_in_float32_on_a_cpu() -> None:
    q, k, v = tensors((2, 6, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8), dtype=torch.bfloat16)
    exact = definition(*(x.double() for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sdpa(q, k, v), exact.bfloat16())


def test_sdpa_and_its_gradient_equal_the_definition() -> None:
    inputs = tensors((2, 6, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8))
    ours, theirs = sdpa(*inputs), definition(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    probe = tensors((2, 6, 3, 8), gradient=False)[0]
    for mine, slow in zip(*(torch.autograd.grad((x * probe).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", [True, False])
def test_half_precision_errors_are_within_rounding(dtype: torch.dtype, gradient: bool) -> None:
    inputs = tensors((2, 6, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8), dtype=dtype, gradient=gradient)
    out = sdpa(*inputs)
    assert out.dtype == dtype
    exact = definition(*(x.double() for x in inputs))
    assert (out.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("context", [None, (2, 5, 20)], ids=["self", "cross"])
def test_a_layer_equals_diffusers_attention(context: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=context and context[-1], heads=4, dim_head=3).double()
    x, text = tensors((2, 6, 16), context or (0,))
    text = text if context else None
    plain = AttnProcessor()(layer, x, text)
    torch.testing.assert_close(AttentionProcessor(sdpa)(layer, x, text), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(AttentionProcessor(definition)(layer, x, text), plain, rtol=1e-12, atol=1e-12)


def test_a_clips_attention_is_transformers_own_and_fast_in_16_bits(tmp_path: Path) -> None:
    """In training, bf16 attention is computed in fp32; everything else, and the saved model, are as in transformers."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, 600, 12)
    clip = small_clip_model(tokenizer)
    save_clip(clip, tokenizer, tmp_path / "clip")
    assert "attn_implementation" not in (tmp_path / "clip/config.json").read_text()
    plain = CLIPModel.from_pretrained(tmp_path / "clip", attn_implementation="sdpa")
    inputs = {
        "input_ids": torch.randint(0, len(tokenizer), (3, tokenizer.model_max_length)),
        "pixel_values": tensors((3, 3, 16, 16), dtype=torch.float32, gradient=False)[0],
    }
    for tower, name in (("text_model", "input_ids"), ("vision_model", "pixel_values")):
        outputs = []
        for model in (clip, plain):
            output = getattr(model, tower)(**{name: inputs[name]}).last_hidden_state
            output.square().mean().backward()
            outputs.append(output)
        assert torch.equal(*outputs)
    for mine, theirs in zip(clip.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
    assert attention_dtypes(clip, inputs, gradient=True) == {torch.float32}
    assert attention_dtypes(clip, inputs, gradient=False) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        half = clip(**inputs).text_embeds
    torch.testing.assert_close(half.float(), plain(**inputs).text_embeds, rtol=0, atol=0.02)


def attention_dtypes(clip: CLIPModel, inputs: dict[str, Tensor], *, gradient: bool) -> set[torch.dtype]:
    """Return the dtypes in which torch computes the attention of a CLIP under autocast to bf16."""
    found = set()

    def recorded(q: Tensor, *others: Any, **how: Any) -> Tensor:
        found.add(q.dtype)
        return attend(q, *others, **how)

    attend = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
        clip(**inputs)
    return found


# -- backends -----------------------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, attention: Callable[..., Tensor] | None, device: str = "cpu") -> None:
    """Install stand-ins for xformers and its library, on an available device."""
    monkeypatch.setattr(module, "_XFORMERS_DEVICE", device)
    for name in ("xformers", "xformers.ops", "xformers._cpp_lib"):
        fake: Any = ModuleType(name)
        fake.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, fake)
    if attention is not None:
        sys.modules["xformers.ops"].memory_efficient_attention = attention  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["xformers", "auto"])
def test_xformers_receives_the_arguments_of_the_definition(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    seen: set[tuple[int, ...]] = set()

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.add((*q.shape, k.shape[1]))
        return definition(q, k, v)

    unet = random_unet().double()
    assert use_attention(unet, "sdpa") == "sdpa"
    expected = output_and_gradients(unet)
    install(monkeypatch, recorded)
    require_attention(backend)
    assert use_attention(unet, backend) == "xformers"
    seen.clear()
    got = output_and_gradients(unet)
    # (b, n, heads, d) and the number of keys: self-attention and attention to the text, at two levels
    assert seen == {(2, 64, 2, 16, 64), (2, 64, 2, 16, 11), (2, 16, 4, 16, 16), (2, 16, 4, 16, 11)}
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    copied = copy.deepcopy(unet)  # as the running average does
    torch.testing.assert_close(output_and_gradients(copied)[0], expected[0])
    assert use_attention(unet) == "sdpa"
    seen.clear()
    output_and_gradients(unet)
    assert not seen


def test_the_trial_has_the_dtype_and_gradients_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, torch.dtype, bool]] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tried.append((q.shape[-1], q.dtype, q.requires_grad))
        return sdpa(q, k, v)

    install(monkeypatch, recorded)
    unet = random_unet()
    state = torch.get_rng_state()
    use_attention(unet, "xformers", torch.bfloat16)
    with torch.no_grad():
        use_attention(unet.to(torch.float16), "auto")
        use_attention(unet.requires_grad_(False), "auto")
    assert tried == [(16, torch.bfloat16, True), (16, torch.float16, True), (16, torch.float16, False)]
    assert torch.equal(torch.get_rng_state(), state)


def refused(unet: UNet2DConditionModel, *words: str) -> None:
    """Assert that xformers, if requested, is refused in one line with these words, and that `auto` uses sdpa."""
    with pytest.raises(UserError) as caught:
        use_attention(unet, "xformers")
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in ("attention xformers", *words)), line
    assert use_attention(unet, "auto") == "sdpa"


def test_unavailable_xformers_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError(
            "No operator found for `memory_efficient_attention_forward` with inputs:\n  query: …\n"
        )

    def forward_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v).detach()

    unet = random_unet()
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_spec", lambda name: None)
        refused(unet, "isn't installed", "pip install xformers")
        with pytest.raises(UserError, match="isn't installed"):
            require_attention("xformers")
    with monkeypatch.context() as patch:
        install(patch, definition, device="cuda")
        refused(unet, "CUDA GPU", "the device is cpu")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="torch finds none"):
            require_attention("xformers")
        require_attention("auto")
        require_attention("sdpa")
    with monkeypatch.context() as patch:
        install(patch, None)
        refused(unet, "cannot import name 'memory_efficient_attention'")
    with monkeypatch.context() as patch:
        install(patch, no_kernel)
        refused(unet, "torch.float32 on cpu: No operator found for `memory_efficient_attention_forward` with inputs;")
        library = RuntimeError("xFormers can't load C++/CUDA extensions.\n  Please reinstall xformers")
        library.__cause__ = OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
        sys.modules["xformers._cpp_lib"]._cpp_library_load_exception = library  # type: ignore[attr-defined]
        refused(unet, "No operator found", "libcudart.so.12: cannot open", "nvidia-cuda-runtime-cu12", "LD_PRELOAD")
    with monkeypatch.context() as patch:
        install(patch, forward_only)
        refused(unet, "does not require grad")
        assert use_attention(unet.requires_grad_(False), "auto") == "xformers"
    with pytest.raises(UserError, match="attention 'flash': choose sdpa, xformers, auto"):
        use_attention(unet, "flash")


def test_a_pipeline_generates_the_same_with_either_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()

    def image() -> Tensor:
        return pipe(
            "a red star", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images

    before = image()
    install(monkeypatch, definition)
    assert pipe.set_attention("auto") == "xformers"
    assert (image() - before).abs().max() < 1e-4
    assert pipe.set_attention("sdpa") == "sdpa"
    assert torch.equal(image(), before)


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("xformers") is None, reason="needs a CUDA GPU and xformers"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_xformers_equals_sdpa_on_a_gpu(dtype: torch.dtype) -> None:
    """Both are equally close to float64, forwards and backwards."""
    unet = random_unet().double()
    exact = output_and_gradients(unet)
    unet.to("cuda", dtype)
    error: dict[str, list[float]] = {}
    for backend in ("sdpa", "xformers"):
        assert use_attention(unet, backend) == backend
        (out, *grads), (exact_out, *exact_grads) = output_and_gradients(unet, "cuda", dtype), exact
        pairs = ((out, exact_out), (torch.cat([g.ravel() for g in x]) for x in (grads, exact_grads)))
        error[backend] = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    for mine, theirs in zip(error["xformers"], error["sdpa"], strict=True):
        assert mine < 2 * theirs + torch.finfo(dtype).eps
