"""Faster sampling generates the same images: keys and values computed once, and engines that run the networks.

Reused deep features are an exception; they are compared with DeepCache's definition.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import ldm.model
from ldm.errors import RunError, UserError
from ldm.networks import compilation
from ldm.networks.attention import use_attention
from ldm.networks.compilation import Engine, EngineNetwork, OpenVinoEngine, TorchEngine
from ldm.networks.unet import UNet, add_guidance, widen
from ldm.networks.unet_sampling import cross_attentions
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import draw, generators
from support.images import box_mask, smooth_images
from support.models import PROMPTS, small_unet, tiny_pipeline
from train.commands.generate import ImageGenerator
from train.config.generation import Txt2ImgOptions

GUIDANCE: dict[str, dict[str, Any]] = {
    "one prompt": {},
    "interval": {"guidance_interval": (0.5, 4.0)},
    "compose": {"compose": [(PROMPTS[1], 2.0)]},
    "two-stage sampler": {"sampler": "heun"},
}


class Plain(Engine):
    """An engine that runs the module as it is, plus an error; it records the batches."""

    kind = "compile"
    pays = 10.0

    def __init__(self, module: nn.Module, required: bool = True, error: float = 0.0) -> None:
        super().__init__(module, required)
        self.error, self.batches = error, list[int]()

    def run(self, shapes: compilation.Shapes, inputs: tuple[Tensor, ...]) -> Tensor:
        self.batches.append(len(inputs[0]))
        return self.module(*inputs) * (1 + self.error)


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def weak() -> LatentDiffusionPipeline:
    return tiny_pipeline("eps")


@pytest.fixture
def plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "TorchEngine", Plain)
    monkeypatch.setattr(compilation, "compile_problem", lambda device: "")
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)


def latents(pipe: LatentDiffusionPipeline, prompts: Any = PROMPTS, **how: Any) -> Tensor:
    count = 1 if isinstance(prompts, str) else len(prompts)
    how = {"num_inference_steps": 3, "output_type": "latent", "generator": generators(count)} | how
    images = pipe(prompts, **how).images
    assert isinstance(images, Tensor)
    return images


def inputs(unet: UNet, b: int = 2, side: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    x = draw(b, unet.in_channels, side, side, dtype=torch.float32)
    return x, torch.tensor([7, 900, 3])[:b], draw(b, 5, unet.condition_width, seed=1, dtype=torch.float32)


# -- keys and values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", GUIDANCE.values(), ids=GUIDANCE)
def test_keys_and_values_are_computed_once_and_change_nothing(
    pipe: LatentDiffusionPipeline,
    weak: LatentDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
) -> None:
    calls: list[int] = []
    hooks = [
        attn.to_k.register_forward_hook(lambda *_: calls.append(1))
        for p in (pipe, weak)
        for attn in cross_attentions(p.unet)
    ]
    for given in (how, how | {"weak": weak}):
        calls.clear()
        once = latents(pipe, **given)
        layers = len(cross_attentions(pipe.unet)) * (2 if "weak" in given else 1)
        first = len(calls)
        with monkeypatch.context() as patch:
            patch.setattr(ldm.model.Model, "network", lambda model, *_: model.backbone)
            assert torch.equal(latents(pipe, **given), once)
        assert layers <= first <= 2 * layers < len(calls) - first
    if not how:
        assert not torch.equal(latents(pipe, PROMPTS[::-1], **given), once)
    for hook in hooks:
        hook.remove()


def test_other_attention_compiled_networks_and_gradients_get_the_condition() -> None:
    unet = UNet.wrap(small_unet().eval(), 4)
    x, time, condition = inputs(unet)
    network = unet.for_sampling()
    loss = network(x, time, condition.requires_grad_()).square().mean()
    (gradient,) = torch.autograd.grad(loss, condition)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        expected = network(x, time, condition)
        unet.module.set_attn_processor(AttnProcessor2_0())
        torch.testing.assert_close(network(x, time, condition), expected, rtol=1e-4, atol=1e-5)
        unet.set_attention("sdpa")
        seen: list[dict[str, Any]] = []
        unet.module._compiled_call_impl = lambda *a, **k: (
            seen.append(k) or UNet2DConditionModel.forward(unet.module, *a, **k)
        )
        assert torch.equal(network(x, time, condition), expected)
    assert [given["cross_attention_kwargs"] for given in seen] == [None]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"modulation": True},
        {"linear_projections": True, "attention": (False, True), "learned_variance": True, "depth": 2},
        {"context": True},
        {"guidance": 16},
    ],
    ids=str,
)
def test_the_core_is_the_unet(change: dict[str, Any]) -> None:
    module = small_unet(**{k: v for k, v in change.items() if k not in ("context", "guidance")}).eval()
    if "context" in change:
        widen(module, 9)
    if "guidance" in change:
        config = {k: v for k, v in module.config.items() if not k.startswith("_")}
        module = UNet2DConditionModel(**config | {"time_cond_proj_dim": 16}).eval()
        use_attention(module)
    unet, scale = UNet.wrap(module, 4), torch.tensor([2.0, 7.5])
    x, time, condition = inputs(unet)
    with torch.no_grad():
        embedding, prompt = unet.per_step(time, scale), unet.per_prompt(condition)
        expected = unet(x, time, condition, scale)
        assert torch.equal(unet.core()(x, embedding, *prompt), expected)
        assert torch.equal(unet.for_sampling()(x, time, condition, scale), expected)
        assert torch.equal(unet(x, time, condition), expected) != ("guidance" in change)


# -- deep features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0, 16])
def test_deep_features_are_reused_as_in_deepcache(guidance: int) -> None:
    """The reference is diffusers' UNet, in which the input of the last block is replaced by an earlier one."""
    module = small_unet().eval()
    if guidance:
        add_guidance(module, guidance)
        torch.nn.init.normal_(module.time_embedding.cond_proj.weight)
    unet, scale = UNet.wrap(module, 4), torch.tensor([2.0, 7.5])
    x, _, condition = inputs(unet)
    deep: list[Tensor] = []

    def replace_input(block: nn.Module, args: object, given: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        deep.append(given["hidden_states"])
        return args, given | {"hidden_states": deep[0] if reused else given["hidden_states"]}

    network = unet.for_sampling(3)
    with torch.no_grad():
        for k, time in enumerate(torch.tensor([[900, 900], [800, 800], [650, 650], [400, 400]])):
            output, reused = network(x + k, time, condition, scale), k % 3 != 0
            hook = module.up_blocks[-1].register_forward_pre_hook(replace_input, with_kwargs=True)
            if not reused:
                deep.clear()
            assert torch.equal(unet(x + k, time, condition, scale), output)
            hook.remove()
            assert reused == (not torch.equal(unet(x + k, time, condition, scale), output))
        other = condition.clone()  # a new condition starts anew
        assert torch.equal(network(x, time, other, scale), unet(x, time, other, scale))


@pytest.mark.parametrize("how", GUIDANCE.values(), ids=GUIDANCE)
def test_reusing_features_saves_evaluations_of_the_deep_layers(
    pipe: LatentDiffusionPipeline, how: dict[str, Any]
) -> None:
    depth: list[int] = []
    hook = pipe.unet.mid_block.register_forward_hook(lambda *_: depth.append(1))
    plain = latents(pipe, **how, num_inference_steps=4)
    evaluations = len(depth)
    assert torch.equal(latents(pipe, **how, num_inference_steps=4, reuse_features=1), plain)
    depth.clear()
    assert (latents(pipe, **how, num_inference_steps=4, reuse_features=2) - plain).abs().mean() > 1e-4
    hook.remove()
    assert evaluations / 2 <= len(depth) < evaluations


def test_features_are_not_reused_where_that_has_no_effect(pipe: LatentDiffusionPipeline, plain_engine: None) -> None:
    engine, module = tiny_pipeline(), small_unet()
    with pytest.raises(UserError, match="reuse features 0: must be a number of steps"):
        latents(pipe, reuse_features=0)
    engine.optimize("compile")
    with pytest.raises(UserError, match="reuse features 2: can't be used with optimize"):
        latents(engine, reuse_features=2)
    module.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(UserError, match="reuse features 2: needs ldm's attention"):
        UNet.wrap(module, 4).for_sampling(2)


# -- engines ----------------------------------------------------------------------------------------------------------


def test_an_engine_replaces_only_the_call_of_the_networks(plain_engine: None) -> None:
    """All samplers, guidance, image to image, masks and callbacks give what they give without an engine."""
    seen: list[float] = []
    for inpaints in (False, True):
        seen.clear()
        pipe = tiny_pipeline(inpaints=inpaints)
        image, mask = smooth_images(1), box_mask()
        cases: list[dict[str, Any]] = [
            {"sampler": "heun", "compose": [(PROMPTS[1], 2.0)]},
            {"image": image, "strength": 0.6, "sampler": "unipc"},
            {"image": image, "mask_image": mask, "sampler": "dpmpp_2m_sde"},
            {"callback_on_step_end": lambda p, k, t, tensors: seen.append(float(tensors["denoised"].sum()))},
        ]
        cases = cases[2:] if inpaints else cases
        expected = [latents(pipe, **how) for how in cases]
        assert pipe.optimize("compile") == "compile"
        for how, want in zip(cases, expected, strict=True):
            torch.testing.assert_close(latents(pipe, **how), want, rtol=0, atol=1e-5)
        assert seen[: len(seen) // 2] == pytest.approx(seen[len(seen) // 2 :], abs=1e-3)
        assert isinstance(pipe.model.engine, Plain)
        assert pipe.model.engine.batches
        pipe.to("cpu")
        assert pipe.model.engine is None
        assert pipe.autoencoder.compiled is None


def test_a_smaller_batch_is_padded_and_a_new_size_is_compiled() -> None:
    unet = UNet.wrap(small_unet().eval(), 4)
    engine = Plain(unet.core())
    network = EngineNetwork(unet, engine)
    for b, side in ((3, 16), (2, 16), (1, 16), (2, 8), (3, 16)):
        x, time, condition = inputs(unet, b, side)
        with torch.no_grad():
            torch.testing.assert_close(network(x, time, condition), unet(x, time, condition), rtol=1e-4, atol=1e-5)
    assert engine.batches == [3, 3, 1, 2, 3]


def test_further_sizes_are_compiled_when_they_are_used_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "patience", 3)
    unet = UNet.wrap(small_unet().eval(), 4)
    engine = Plain(unet.core(), error=1e-5)  # shows which calls were the engine's
    network, compiled = EngineNetwork(unet, engine), []
    for b, side in [(2, 16), *[(1, 8), (2, 16)] * 5, (1, 16), (2, 8)]:
        x, time, condition = inputs(unet, b, side)
        with torch.no_grad():
            output, expected = network(x, time, condition), unet(x, time, condition)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        compiled.append(not torch.allclose(output, expected, rtol=3e-6, atol=1e-8))
    assert compiled == [True, *3 * [False, True], *2 * [True, True], True, False]
    assert engine.batches == [2, *3 * [2], *2 * [1, 2], 2]


def test_a_wrong_engine_is_refused_or_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    unet = UNet.wrap(small_unet().eval(), 4)
    with pytest.raises(RunError, match=r"compile doesn't work for this network: its output differs by 1\.0e-02"):
        EngineNetwork(unet, Plain(unet.core(), error=0.01))(*inputs(unet))
    network = EngineNetwork(unet, Plain(unet.core(), required=False, error=float("nan")))
    with torch.no_grad():
        for b in (2, 1):
            assert torch.equal(network(*inputs(unet, b)), unet(*inputs(unet, b)))
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "optimize compile doesn't work for this network"
    ]


def test_engines_that_cannot_be_used_are_refused(
    pipe: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    for engine, device, dtype, message in (
        ("fast", cpu, torch.float32, "optimize 'fast': choose auto, off, compile, openvino"),
        ("openvino", gpu, torch.float32, "optimize openvino: needs device cpu, but the device is cuda"),
        ("openvino", cpu, torch.float16, "optimize openvino: needs fp32 or bf16, but the weights are float16"),
        ("compile", cpu, torch.float32, "optimize compile: needs a C.. compiler"),
        ("compile", torch.device("mps"), torch.float32, "optimize compile: needs a CPU or a CUDA GPU"),
    ):
        with pytest.raises(UserError, match=message):
            compilation.choose_engine(engine, device, dtype)
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="install it with pip install openvino"):
        pipe.optimize("openvino")
    assert pipe.optimize() == "off"
    monkeypatch.setattr(compilation.shutil, "which", str)
    assert compilation.choose_engine("auto", cpu, torch.float32) is TorchEngine
    monkeypatch.setattr(compilation, "find_spec", str)
    assert compilation.choose_engine("auto", cpu, torch.float32) is OpenVinoEngine
    assert compilation.choose_engine("auto", cpu, torch.float16) is TorchEngine
    assert compilation.choose_engine("auto", gpu, torch.float32) is TorchEngine
    assert compilation.choose_engine("auto", cpu, torch.float32, OpenVinoEngine.pays) is None
    offloaded = tiny_pipeline()
    offloaded.enable_model_cpu_offload("cpu")
    assert offloaded.optimize() == "off"
    with pytest.raises(UserError, match="can't be used with offloading"):
        offloaded.optimize("compile")


def test_a_command_optimizes_when_it_saves_time(
    tmp_path: Path, plain_engine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    few = tiny_pipeline().model.seconds(1, 2)
    monkeypatch.setattr(Plain, "pays", 2.5 * few)

    def generate(out: str, **change: Any) -> tuple[list[np.ndarray], Any]:
        from PIL import Image

        options = Txt2ImgOptions(
            **{"model": str(tmp_path / "model"), "prompt": "a", "steps": 2, "num_images": 3, "batch_size": 1} | change,
            out=str(tmp_path / out),
        )
        generator = ImageGenerator(options)
        paths = list(generator.generate(generator.jobs("a")))
        return [np.asarray(Image.open(path), dtype=float) for path in paths], generator.pipe.model.engine

    expected, engine = generate("off", optimize="off")
    assert engine is None
    for out, change, batches in (
        ("auto", {}, 1),
        ("short", {"num_images": 2}, 0),
        ("compile", {"optimize": "compile"}, 1),
    ):
        images, engine = generate(out, **change)
        assert (engine is not None) == bool(batches), out
        for image, want in zip(images, expected, strict=False):
            assert np.abs(image - want).max() <= 1
    assert "the networks were optimized with compile" in capsys.readouterr().err


# -- real engines -----------------------------------------------------------------------------------------------------


def measured_error(module: UNet2DConditionModel, kind: type[Engine], dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative errors of an engine and of torch in this dtype against torch in fp32."""
    reference = UNet.wrap(module, 4)
    x, time, condition = inputs(reference)
    condition = condition.to(dtype)
    with torch.no_grad():
        exact = reference(x, time, condition.float())
        unet = UNet.wrap(module.to(dtype), 4)
        outputs = EngineNetwork(unet, kind(unet.core()))(x, time, condition), unet(x, time, condition)
    ours, stock = (float((y.float() - exact).norm() / exact.norm()) for y in outputs)
    return ours, stock


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("inpaints", "cases"),
    [
        (False, [{}]),
        pytest.param(
            False, [{"width": 48, "output_type": "pt"}, {"prompts": PROMPTS[0], "width": 48}], marks=pytest.mark.slow
        ),
        pytest.param(
            True, [{"image": smooth_images(1), "mask_image": box_mask(), "output_type": "pt"}], marks=pytest.mark.slow
        ),
    ],
)
def test_openvino_generates_the_same(inpaints: bool, cases: list[dict[str, Any]]) -> None:
    pytest.importorskip("openvino")
    pipe = tiny_pipeline(inpaints=inpaints)
    expected = [latents(pipe, **how) for how in cases]
    assert pipe.optimize("openvino") == "openvino"
    for how, want in zip(cases, expected, strict=True):
        torch.testing.assert_close(latents(pipe, **how), want, rtol=0, atol=1e-4)


def test_openvino_in_bf16_is_as_exact_as_torch() -> None:
    pytest.importorskip("openvino")
    ours, stock = measured_error(small_unet(), OpenVinoEngine, torch.bfloat16)
    assert ours <= 1.25 * stock


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
def test_torchs_compiler_generates_the_same() -> None:
    pipe = tiny_pipeline()
    expected = latents(pipe, output_type="pt")
    assert pipe.optimize("compile") == "compile"
    torch.testing.assert_close(latents(pipe, output_type="pt"), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
def test_torchs_compiler_in_bf16_is_as_exact_as_torch() -> None:
    ours, stock = measured_error(small_unet(), TorchEngine, torch.bfloat16)
    assert ours <= 1.25 * stock
