"""The interface of backbones with a second network, a transformer that only this file defines; and tasks."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train.stages.ldm
from ldm.errors import UserError
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.samplers import SamplerKind
from support.draws import generators
from support.images import box_mask, smooth_images
from support.models import PROMPTS, small_unet, tiny_pipeline
from support.runs import final_state, ldm_config
from train.config.ldm import DiffusionConfig, LdmConfig
from train.config.optimizer import OptimizerConfig

# -- a second network -------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Patches of 2 × 2 latents that attend to one another and to the condition's tokens."""

    def __init__(self, channels: int, out: int, condition: int, width: int = 32) -> None:
        super().__init__()
        self.settings = {"channels": channels, "out": out, "condition": condition, "width": width}
        self.patches, self.place = nn.Conv2d(channels, width, 2, 2), nn.Linear(2, width)
        self.time, self.text = nn.Linear(width, width), nn.Linear(condition, width)
        layer = nn.TransformerDecoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.out = nn.TransformerDecoder(layer, 2), nn.ConvTranspose2d(width, out, 2, 2)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        patches = self.patches(x)  # (b, width, h, w)
        h, w = patches.shape[2:]
        grid = torch.cartesian_prod(*(torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (h, w)))
        frequencies = 1000 ** -torch.linspace(0, 1, self.time.in_features // 2, device=x.device)
        angles = time[:, None] * frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        tokens = patches.flatten(2).mT + self.place(grid) + embedded[:, None]  # (b, h w, width)
        return self.out(self.blocks(tokens, self.text(condition)).mT.unflatten(2, (h, w)))


@dataclass(frozen=True)
class TransformerBackbone(Backbone):
    module: Transformer
    part: ClassVar[str] = "transformer"

    @classmethod
    def of(cls, module: Transformer, c: int = 4, side: int = 16) -> Self:
        s = module.settings
        return cls(
            module, c, s["out"], s["condition"], (side, side), context_channels=s["channels"] - c, size_multiple=2
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        module = Transformer(**json.loads((folder / "shape.json").read_text()))
        module.load_state_dict(load_file(folder / "weights.safetensors"))
        return cls.of(module.eval().requires_grad_(False))

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "shape.json").write_text(json.dumps(self.module.settings))
        save_file(self.module.state_dict(), folder / "weights.safetensors")


# -- its use through the interface ------------------------------------------------------------------------------------


CONSTANT = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)


def transformer(channels: int = 4, out: int = 4, condition: int = 32, seed: int = 0) -> TransformerBackbone:
    torch.manual_seed(seed)
    return TransformerBackbone.of(Transformer(channels, out, condition))


def config(shapes: Path, out: Path, parts: Path, **change: Any) -> LdmConfig:
    return ldm_config(shapes, out, parts, **{"steps": 4, "checkpoint_every": 2, "optimizer": CONSTANT} | change)


@pytest.mark.parametrize(
    ("task", "channels", "out"), [("txt2img", 4, 4), ("txt2img", 4, 8), ("inpaint", 9, 4)], ids=str
)
def test_a_transformer_trains_and_generates(
    shapes: Path, parts: Path, tmp_path: Path, task: str, channels: int, out: int
) -> None:
    """It is trained, saved by its own code, loaded and sampled. An interrupted and resumed run is the same."""
    settings: dict[str, Any] = {"task": task}
    if out == 8:
        settings["diffusion"] = DiffusionConfig(variance="learned", objective="hybrid")
    once, twice = tmp_path / "once", tmp_path / "twice"
    train.stages.ldm.train(config(shapes, once, parts, **settings), backbone=transformer(channels, out))
    for steps, seed in ((2, 0), (4, 1)):  # other initial weights don't matter to a resumed run
        train.stages.ldm.train(
            config(shapes, twice, parts, **settings, steps=steps), backbone=transformer(channels, out, seed=seed)
        )
    assert (once / "model/transformer/weights.safetensors").is_file()
    assert not (once / "model/unet").exists()
    limits = "variance learned" if out == 8 else "network Transformer: diffusers can't load this model"
    assert f"Note: {limits}" in (once / "model/README.md").read_text()
    assert final_state(once, 4) == final_state(twice, 4)

    backbone = TransformerBackbone.load(once / "model/transformer")
    pipe = LatentDiffusionPipeline.from_pretrained(once / "model", backbone=backbone)
    assert (pipe.model.task, pipe.inpaints) == (task, task == "inpaint")
    samplers: tuple[SamplerKind, ...] = ("ddpm", "ddim", "dpmpp_2m", "unipc")
    made = {}
    for sampler in samplers:
        how: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 4, "output_type": "np"}
        if task == "inpaint":
            how |= {"image": smooth_images(2), "mask_image": box_mask()}
        made[sampler] = pipe(PROMPTS, generator=generators(2), **how).images
        assert np.isfinite(made[sampler]).all()
        assert not np.array_equal(
            made[sampler], pipe(PROMPTS, generator=generators(2), guidance_scale=1.0, **how).images
        )
    assert not np.array_equal(made["ddim"], made["ddpm"])


def test_a_weaker_transformer_guides_and_inversion_recovers_the_noise() -> None:
    tiny = tiny_pipeline()
    pipe, weak = (
        LatentDiffusionPipeline(transformer(seed=k), tiny.autoencoder, tiny.text_encoder, tiny.process) for k in (0, 1)
    )
    how: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "latent", "sampler": "ddim"}
    plain, away = (pipe(PROMPTS, generator=generators(2), **how, **more).images for more in ({}, {"weak": weak}))
    assert isinstance(plain, Tensor) and isinstance(away, Tensor)  # noqa: PT018
    assert not torch.equal(plain, away)
    back = pipe.invert(plain, PROMPTS, num_inference_steps=10, refinements=5)
    again = pipe(PROMPTS, latents=back, **how).images
    torch.testing.assert_close(again, plain, atol=1e-2, rtol=0)
    with pytest.raises(UserError, match="multiples of 4"):
        pipe(PROMPTS, height=34)
    assert pipe.set_attention("auto") == "sdpa"
    with pytest.raises(UserError, match="Transformer"):
        pipe.set_attention("xformers")
    with pytest.raises(UserError, match="Transformer: has no counterpart in the original layout"):
        pipe.save_single_file("never.safetensors")


def test_a_network_that_does_not_fit_is_refused(shapes: Path, parts: Path, tmp_path: Path) -> None:
    for backbone, change, message in (
        (transformer(condition=16), {}, "has condition_width 16, but this run needs 32"),
        (transformer(out=8), {}, "has out_channels 8, but this run needs 4"),
        (transformer(channels=9), {}, "has in_channels 9, but this run needs 4"),
        (transformer(), {"task": "inpaint"}, "has in_channels 4, but this run needs 9"),
        (transformer(), {"init": "anything"}, "init 'anything' with a backbone"),
        (transformer(), {"gradient_checkpointing": True}, "gradient checkpointing: Transformer doesn't support it"),
    ):
        with pytest.raises(UserError, match=message):
            train.stages.ldm.train(config(shapes, tmp_path / "run", parts, **change), backbone=backbone)
        assert not (tmp_path / "run").exists()


# -- the task ----------------------------------------------------------------------------------------------------------


def load_as(folder: Path, name: str | None) -> LatentDiffusionPipeline:
    """Load a model with another class in model_index.json, or without this file if name is None."""
    index = folder / "model_index.json"
    if name is None:
        index.unlink()
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    return LatentDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("inpaints", [False, True])
def test_the_task_is_read_from_the_folder(tmp_path: Path, inpaints: bool) -> None:
    task = "inpaint" if inpaints else "txt2img"
    folder = tmp_path / "model"
    tiny_pipeline(inpaints=inpaints).save_pretrained(folder)
    assert LatentDiffusionPipeline.from_pretrained(folder).model.task == task
    if inpaints:
        with pytest.raises(UserError, match="task txt2img: the network needs 0 context channels, but it has 5"):
            load_as(folder, "StableDiffusionPipeline")
    else:  # such a network inpaints by blending, in diffusers too
        assert load_as(folder, "StableDiffusionInpaintPipeline").model.task == "txt2img"
    for name in ("SomebodysPipeline", None):
        assert load_as(folder, name).model.task == task


def test_the_unet_reports_its_properties() -> None:
    pipe = tiny_pipeline(variance="learned", inpaints=True)
    unet = pipe.backbone
    facts = unet.latent_channels, unet.context_channels, unet.out_channels, unet.condition_width, unet.sample_size
    assert facts == (4, 5, 8, 32, (16, 16))
    assert (unet.size_multiple, unet.describe(), unet.diffusers_limits()) == (2, "channels 32, 64", None)
    assert UNet.wrap(tiny_pipeline().unet, 4).adapt(5, 8).sample_size == (8, 8)
    assert pipe.unet is unet.module
    other = tiny_pipeline()
    other.autoencoder.latent_channels = 8
    with pytest.raises(UserError, match="the network has 4 input channels, but the autoencoder's latents have 8"):
        LatentDiffusionPipeline(other.unet, other.autoencoder, other.text_encoder, other.process)


def test_the_time_embedding_of_the_unet_is_sinusoidal() -> None:
    d = small_unet().config.block_out_channels[0]
    index = torch.tensor([0, 1, 500, 999])
    waves = [10000 ** (-2 * k / d) for k in range(d // 2)]
    expected = [[math.cos(w * i) for w in waves] + [math.sin(w * i) for w in waves] for i in index.tolist()]
    torch.testing.assert_close(small_unet().time_proj(index), torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_level_has_its_number_of_transformer_blocks_and_heads():
    unet = small_unet(depth=3, heads=(2, 8))
    for k, heads in enumerate((2, 8)):
        for transformer in unet.down_blocks[k].attentions:
            assert [block.attn1.heads for block in transformer.transformer_blocks] == [heads] * 3


def test_modulation_pools_the_text_with_the_heads_of_level_0():
    unet = small_unet(modulation=True, heads=(4, 8), text_width=36)
    assert unet.add_embedding.pool.num_heads == 4
    with pytest.raises(UserError, match=r"36 of the text features must be a multiple of 8, the number of heads of lev"):
        small_unet(modulation=True, heads=(8, 4), text_width=36)
    assert small_unet(heads=(8, 4), text_width=36).config.cross_attention_dim == 36
