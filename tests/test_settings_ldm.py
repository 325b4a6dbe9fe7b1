"""Settings of stage 2: each has its effect on a step of the stage, computed by other means."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from ldm.networks.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from support.models import small_unet, tiny_pipeline
from support.reference_diffusion import Importance, losses_of, path_of
from support.runs import ldm_config
from support.stepping import normals, record, uniforms
from train.config.ldm import DiffusionConfig, LdmConfig, UnetConfig


def tiny_unet(**shape: Any) -> UNet:
    """Return a UNet of one level, in which no weight is zero, for the latents and text features of `parts`."""
    torch.manual_seed(0)
    small = {"channels": (16,), "attention": (True,), "heads": (2,), "groups": 4}
    return UNet.wrap(small_unet(0.1, **small | shape), 4)


def changed(config: LdmConfig, **settings: Any) -> LdmConfig:
    return replace(config, **settings)


# -- the draws of a batch ---------------------------------------------------------------------------------------

DRAWS: list[tuple[float, float, bool]] = [(0.3, 0.5, True), (0.1, 0.0, False), (0.0, 0.1, True)]
"""Caption dropout, offset noise, and whether timesteps are stratified."""


@pytest.mark.parametrize("cache", ["", "off"])
@pytest.mark.parametrize(("dropout", "offset", "stratified"), DRAWS)
def test_draws_are_functions_of_seed_and_position(
    dropout: float, offset: float, stratified: bool, cache: str, shapes: Path, parts: Path, tmp_path: Path
) -> None:
    """Timesteps, noise, posterior samples and dropped captions of 200 positions, and the distributions of them."""
    diffusion = DiffusionConfig(offset_noise=offset, stratified=stratified)
    config = ldm_config(shapes, tmp_path / "run", parts, seed=5, diffusion=diffusion, accumulation=2)
    config = changed(config, caption_dropout=dropout, cache=cache or str(parts / "cache"))
    found: dict[str, Any] = {}

    def draw(stage: Any) -> None:
        raw = stage.training.__getitems__(list(range(200)))
        found.update(raw=raw, batch=stage.complete(raw), source=stage.inputs.source)

    record(config, 0, draw, backbone=tiny_unet())
    batch, positions = found["batch"], list(range(200))
    u = uniforms(5, 2, positions)[:, 0]
    times = (np.arange(200) % 8 + u) / 8 if stratified else u
    np.testing.assert_allclose(batch.timestep, times, atol=1e-7)
    if stratified:  # one timestep in each of the batch's intervals
        assert (np.sort((batch.timestep.view(-1, 8) * 8).long(), 1) == np.arange(8)).all()
    noise = normals(5, 3, positions, 4, 16, 16) + offset * normals(5, 11, positions, 4, 1, 1)
    torch.testing.assert_close(batch.noise, noise)
    between = batch.noise.mean((2, 3)).var().item()  # of a mean over 256 elements
    assert between == pytest.approx(1 / 256 + offset**2, rel=0.25)

    rows = [found["source"][k] for k in found["raw"].index.tolist()]
    choice = uniforms(5, 4, positions)[:, 0]
    captions = [row.captions[int(len(row.captions) * c)] for row, c in zip(rows, choice, strict=True)]
    dropped = uniforms(5, 5, positions)[:, 0] < dropout
    assert abs(dropped.sum() - 200 * dropout) <= 4 * (200 * dropout * (1 - dropout)) ** 0.5
    texts = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    encoder = ClipTextEncoder.load(parts / "clip/model")
    torch.testing.assert_close(batch.condition, encoder.encode(texts), rtol=1e-4, atol=1e-4)
    assert torch.equal(found["raw"].drawn.dropped, torch.from_numpy(dropped))

    pixels = torch.stack([_pixels(found["source"].read(k)) for k in found["raw"].index.tolist()])
    posterior = Autoencoder.load(parts / "vae/model").encode(pixels)
    latents = posterior.mean + posterior.std * normals(5, 8, positions, 4, 16, 16)
    torch.testing.assert_close(batch.x0, latents, rtol=1e-3, atol=1e-3)


def _pixels(file: bytes) -> Tensor:
    pixels = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


# -- the loss ---------------------------------------------------------------------------------------------------

PROCESSES: dict[str, dict[str, Any]] = {
    "eps": {},
    "v": {"target": "v", "schedule": "linear", "beta_start": 0.001, "beta_end": 0.02},
    "x0": {"target": "x0", "loss": "l1", "schedule": "cosine", "timesteps": 50},
    "sigmoid": {"schedule": "sigmoid", "loss": "huber", "beta_end": 0.03, "timesteps": 400},
    "quadratic": {"schedule": "quadratic", "offset_noise": 0.4, "target": "flow"},
    "zero": {"zero_terminal_snr": True, "target": "v", "timesteps": 20},
    "flow": {"schedule": "flow", "target": "flow", "shift": 2.5, "timestep_sampling": "logit_normal"},
    "logit": {"timestep_sampling": "logit_normal", "logit_mean": 0.7, "logit_std": 0.4},
    "min_snr": {"weighting": "min_snr", "gamma": 2.0, "spacing": "linspace"},
    "min_snr v": {"weighting": "min_snr", "gamma": 0.5, "target": "v"},
    "p2": {"weighting": "p2", "p2_gamma": 0.6, "beta_start": 0.0001},
    "p2 x0": {"weighting": "p2", "p2_gamma": 2.0, "target": "x0", "spacing": "leading"},
    "edm": {"weighting": "edm", "sigma_data": 0.3, "timesteps": 200},
    "edm v": {"weighting": "edm", "sigma_data": 0.5, "target": "v", "spacing": "karras"},
    "bound": {"objective": "vlb", "timesteps": 10, "variance": "fixed_large"},
    "bound small": {"objective": "vlb", "timesteps": 10, "target": "v"},
    "bound learned": {"objective": "vlb", "timesteps": 10, "variance": "learned"},
    "hybrid": {"objective": "hybrid", "variance": "learned", "weighting": "min_snr", "timesteps": 300},
}


@pytest.fixture(scope="module")
def small(parts: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> LdmConfig:
    """Settings of a stage whose latents and features are cached."""
    return ldm_config(shapes, tmp_path_factory.mktemp("ldm"), parts)


@pytest.mark.parametrize("name", PROCESSES)
def test_losses_equal_the_papers_formulas(name: str, small: LdmConfig, tmp_path: Path) -> None:
    """Two steps' losses and errors, the gradient, and the schedule that is saved with the model."""
    d = DiffusionConfig(**PROCESSES[name])
    processes = []
    recorded = record(
        changed(small, out=str(tmp_path / "run"), diffusion=d, batch_size=16),
        1,
        lambda stage: processes.append(stage.pipeline().process),
        backbone=tiny_unet(learned_variance=d.variance == "learned"),
    )
    (part,), net, metrics = recorded.parts[0], recorded.initial[0], recorded.metrics[0]
    expected = losses_of(d, net, part.x0, part.timestep.tolist(), part.noise, part.condition)
    assert len(expected.index.unique()) > 3
    assert metrics["error"] == pytest.approx(expected.error.mean().item(), rel=1e-3)
    assert metrics["loss"] == pytest.approx(expected.weighted.mean().item(), rel=1e-3)
    expected.weighted.mean().backward()
    norm = torch.stack([p.grad.square().sum() for p in net.parameters() if p.grad is not None]).sum().sqrt()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=2e-3)
    (process,) = processes
    torch.testing.assert_close(process.schedule.alpha, path_of(d).alpha, atol=1e-9, rtol=0)
    assert (process.target, process.variance, process.spacing) == (d.target, d.variance, d.spacing)


@pytest.mark.parametrize("objective", ["simple", "vlb"])
def test_importance_sampling_follows_the_losses_and_corrects_for_it(
    objective: str, small: LdmConfig, tmp_path: Path
) -> None:
    """Indices and importance weights of four steps, of which the last follow the losses of the first."""
    weighting = "min_snr" if objective == "simple" else "uniform"
    d = DiffusionConfig(timesteps=5, timestep_sampling="importance", objective=objective, weighting=weighting)
    config = changed(small, out=str(tmp_path / "run"), diffusion=d, batch_size=16, accumulation=2)
    recorded, reference, weights = record(config, 4, backbone=tiny_unet()), Importance(5), []
    net = recorded.initial[0]
    for step, parts in enumerate(recorded.parts):
        losses = [losses_of(d, net, p.x0, p.timestep.tolist(), p.noise, p.condition, reference) for p in parts]
        weighted, index, free = (
            torch.cat([getattr(e, k) for e in losses]) for k in ("weighted", "index", "uncorrected")
        )
        assert recorded.metrics[step]["loss"] == pytest.approx(weighted.mean().item(), rel=1e-3), step
        weights.append((weighted / free).std().item())
        reference.update(index.tolist(), free.tolist())
        net.load_state_dict(recorded.weights[step][0])
    assert weights[0] == 0
    assert weights[-1] > 0.05  # the timesteps aren't uniform any more


# -- the network ------------------------------------------------------------------------------------------------

SHAPES = [
    UnetConfig(channels=(8, 16), layers=2, attention=(False, True), heads=(2, 4), groups=4, linear_projections=True),
    UnetConfig(channels=(12, 24, 24), layers=1, attention=(True, True, False), heads=(3, 2, 4), depth=2, groups=6),
    UnetConfig(channels=(8, 8), layers=1, attention=(True, False), heads=(1, 8), groups=2, modulation=True),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_has_its_shape(shape: UnetConfig, small: LdmConfig, tmp_path: Path) -> None:
    unet = record(changed(small, out=str(tmp_path / "run"), unet=shape)).initial[0]
    for k, block in enumerate(unet.down_blocks):
        assert len(block.resnets) == shape.layers
        assert {r.conv1.out_channels for r in block.resnets} == {shape.channels[k]}
    assert [len(block.resnets) for block in unet.up_blocks] == [shape.layers + 1] * len(shape.channels)
    for blocks, levels in ((unet.down_blocks, range(len(shape.channels))), (unet.up_blocks, None)):
        order = list(levels) if levels is not None else list(reversed(range(len(shape.channels))))
        for block, k in zip(blocks, order, strict=True):
            found = [m for m in block.modules() if isinstance(m, BasicTransformerBlock)]
            assert len(found) == (len(block.resnets) * shape.depth if shape.attention[k] else 0)
            assert {m.attn2.heads for m in found} <= {shape.heads[k]}
            assert {m.attn2.to_k.in_features for m in found} <= {32}
    assert {m.num_groups for m in unet.modules() if isinstance(m, nn.GroupNorm)} == {shape.groups}
    projections = {type(m.proj_in) for m in unet.modules() if isinstance(m, Transformer2DModel)}
    assert projections == {nn.Linear if shape.linear_projections else nn.Conv2d}
    first = unet.down_blocks[0].resnets[0]
    assert first.time_emb_proj.out_features == shape.channels[0] * (1 + shape.modulation)


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_computes_activations_twice(
    on: bool, small: LdmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [0], ResnetBlock2D.forward

    def counted(block: ResnetBlock2D, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += block.training
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    unet = record(changed(small, out=str(tmp_path / "run"), gradient_checkpointing=on), backbone=tiny_unet()).initial[0]
    levels = sum(isinstance(m, ResnetBlock2D) for b in (*unet.down_blocks, *unet.up_blocks) for m in b.modules())
    middle = sum(isinstance(m, ResnetBlock2D) for m in unet.mid_block.modules())
    # diffusers keeps the first residual block of the middle.
    assert calls[0] == levels * (1 + on) + middle + on * (middle - 1)


def test_the_attention_is_the_configured_one(small: LdmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    set_attention = UNet.set_attention
    monkeypatch.setattr(
        UNet, "set_attention", lambda net, kind, *a: (asked.append(kind), set_attention(net, kind, *a))[1]
    )
    for kind in ("sdpa", "auto"):
        record(changed(small, out=str(tmp_path / kind), attention=kind), 0, backbone=tiny_unet())
    assert asked == ["sdpa", "auto"]
    with pytest.raises(UserError, match="xformers"):
        record(changed(small, out=str(tmp_path / "xformers"), attention="xformers"), 0, backbone=tiny_unet())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_the_parts_are_those_that_are_named(pipeline: Path, small: LdmConfig, parts: Path, tmp_path: Path) -> None:
    """`init` gives the UNet, and the autoencoder and the text encoder unless others are named."""
    stored = LatentDiffusionPipeline.from_pretrained(pipeline)
    own = {"vae": Autoencoder.load(parts / "vae/model"), "text_encoder": ClipTextEncoder.load(parts / "clip/model")}
    theirs = {"vae": stored.autoencoder, "text_encoder": stored.text_encoder}
    for name, options in {"all": {"vae": "", "text_encoder": ""}, "one": {}}.items():
        config = changed(small, out=str(tmp_path / name), init=str(pipeline), unet=UnetConfig(), **options, cache="off")
        recorded = record(config)
        used = recorded.stage.components
        for part, module in (("vae", used.autoencoder), ("text_encoder", used.text_encoder)):
            assert module.digest == (theirs if part in options else own)[part].digest, (name, part)
        first = recorded.initial[0].state_dict()
        assert all(torch.equal(first[k], v) for k, v in stored.backbone.module.state_dict().items())


@pytest.fixture(scope="module")
def deep_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a text encoder of two layers."""
    folder = tmp_path_factory.mktemp("text")
    tiny_pipeline().text_encoder.save(folder)
    return folder


@pytest.mark.parametrize("cache", ["", "off"])
@pytest.mark.parametrize(("skip", "chunks"), [(0, 0), (1, 0), (0, 3)])
def test_features_skip_layers_and_have_their_chunks(
    skip: int, chunks: int, cache: str, deep_text: Path, small: LdmConfig, tmp_path: Path
) -> None:
    settings = {"text_encoder": str(deep_text), "clip_skip": skip, "text_chunks": chunks, "cache": cache}
    config = changed(small, out=str(tmp_path / "run"), caption_dropout=0.0, **settings)
    recorded = record(config, backbone=tiny_unet())
    (part,), (raw,), stage = recorded.parts[0], recorded.read[0], recorded.stage
    assert part.condition.shape == (8, 16 * max(1, chunks), 32)
    tower = CLIPTextModel.from_pretrained(deep_text / "text_encoder")
    captions = [stage.inputs.source[k].captions[0] for k in raw.index.tolist()]
    short = [
        k for k, caption in enumerate(captions) if len(stage.complete.text_encoder.tokenizer(caption).input_ids) <= 16
    ]
    assert short
    ids = stage.complete.text_encoder.tokenizer(
        [captions[k] for k in short], padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = tower(input_ids=ids, output_hidden_states=True).hidden_states
        norm = getattr(tower, "text_model", tower).final_layer_norm
        expected = norm(states[-1 - skip])
    torch.testing.assert_close(part.condition[short][:, :16], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["txt2img", "inpaint"])
def test_the_task_determines_the_input(task: str, small: LdmConfig, parts: Path, tmp_path: Path) -> None:
    recorded = record(changed(small, out=str(tmp_path / "run"), task=task))
    (part,), (raw,) = recorded.parts[0], recorded.read[0]
    unet = recorded.initial[0]
    assert unet.conv_in.in_channels == {"txt2img": 4, "inpaint": 9}[task]
    if task == "txt2img":
        assert part.context is None
        return
    mask = raw.drawn.masks.mask
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    masked = Autoencoder.load(parts / "vae/model").encode(raw.pixels * (1 - mask))
    noise = normals(0, 16, raw.position.tolist(), 4, 16, 16)
    torch.testing.assert_close(part.context[:, 1:], masked.mean + masked.std * noise, rtol=1e-3, atol=1e-3)
    assert part.context.shape == (8, 5, 16, 16)


# -- validation and sheets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cached", "draws"), [(True, 1), (False, 3)])
def test_validation_measures_the_averaged_weights_on_so_many_examples(
    cached: bool, draws: int, small: LdmConfig, tmp_path: Path
) -> None:
    """Timesteps are spread evenly, whatever the training draws; captions aren't dropped and noise has no offset.

    Each image is measured as often as configured, each time with its own noise.
    """
    count = 10 * draws
    d = DiffusionConfig(
        offset_noise=1.0, stratified=True, timestep_sampling="logit_normal", logit_mean=2.0, weighting="min_snr"
    )
    found: dict[str, Any] = {}

    @torch.no_grad()
    def measure(stage: Any) -> None:
        found.update(stage.validate(4)._asdict())
        raw = stage.held_out.__getitems__(list(range(10)))
        batch = stage.complete(raw)
        noise = normals(9, 3, range(count), 4, 16, 16)
        posterior = stage.complete(replace(raw, drawn=replace(raw.drawn, posterior_noise=torch.zeros_like(noise[:10]))))
        std = (batch.x0 - posterior.x0) / raw.drawn.posterior_noise
        x0 = posterior.x0.repeat(draws, 1, 1, 1) + std.repeat(draws, 1, 1, 1) * normals(9, 8, range(count), 4, 16, 16)
        u = [(k + 0.5) / count for k in range(count)]
        plain = replace(d, timestep_sampling="uniform")
        assert not raw.drawn.dropped.any()
        torch.testing.assert_close(batch.noise, noise[:10])
        expected = losses_of(plain, stage.ema.module, x0, u, noise, batch.condition.repeat(draws, 1, 1))
        found.update(loss=expected.weighted.double(), error=expected.error.double())

    settings: dict[str, Any] = {"validation_examples": 10, "validation_draws": draws, "caption_dropout": 0.9, "seed": 9}
    config = changed(small, out=str(tmp_path / "run"), diffusion=d, **settings)
    config = config if cached else changed(config, cache="off")
    record(changed(config, ema_decay=0.9), 4, measure, backbone=tiny_unet())
    metrics = found["metrics"]
    assert metrics["val_loss"] == pytest.approx(float(found["loss"].mean()), rel=1e-3)
    assert metrics["val_error"] == pytest.approx(float(found["error"].mean()), rel=1e-3)
    torch.testing.assert_close(found["losses"], found["loss"].view(draws, 10).mean(0), rtol=1e-3, atol=0)
    bands = [part.mean().item() for part in np.split(found["error"], [count * k // 4 for k in (1, 2, 3)])]
    assert [v for name, v in metrics.items() if "noise" in name] == pytest.approx(bands, rel=1e-3)
    assert [name for name in metrics if "noise" in name][::3] == ["val_error_noise_0-25", "val_error_noise_75-100"]


@pytest.mark.parametrize(
    ("task", "prompts", "precision"),
    [
        ("txt2img", (), "bf16"),
        ("txt2img", ("a red star", "a circle"), "bf16"),
        ("txt2img", (), "fp16"),
        ("inpaint", (), "bf16"),
    ],
)
def test_sheets_are_sampled_as_configured(
    task: str,
    prompts: tuple[str, ...],
    precision: str,
    small: LdmConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The averaged network generates the sheet's images, with the steps, guidance scale, prompts, seed and precision.

    Inpainting is in fp32, because its decoder isn't separate from its network, and so are runs in fp16, which can
    overflow.
    """
    calls: list[dict[str, Any]] = []
    call = LatentDiffusionPipeline.__call__

    def noted(pipe: LatentDiffusionPipeline, prompt: Any, *args: Any, **how: Any) -> Any:
        half = torch.is_autocast_enabled("cpu")
        calls.append({"prompt": list(prompt), "net": pipe.backbone.module, "half": half, **how})
        return call(pipe, prompt, *args, **how)

    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", noted)
    settings = {"sample_steps": 3, "guidance_scale": 1.7, "prompts": prompts, "seed": 4, "precision": precision}
    config = changed(small, out=str(tmp_path / "run"), task=task, **settings)
    held_out: list[str] = []

    def draw(stage: Any) -> None:
        stage.sheet(tmp_path / "sheet.png")
        held_out.extend(c for row in stage.inputs.held_out for c in row.captions)
        assert all(c["net"] is stage.ema.module for c in calls)

    record(config, 1, draw)
    (seen,) = calls
    assert (seen["num_inference_steps"], seen["guidance_scale"]) == (3, 1.7)
    assert seen["half"] == (task == "txt2img" and precision == "bf16")
    assert seen["prompt"] == list(prompts) if prompts else set(seen["prompt"]) <= set(held_out)
    assert [g.initial_seed() for g in seen["generator"]] == [4 + k for k in range(len(seen["prompt"]))]
