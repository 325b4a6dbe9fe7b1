"""Settings of stage 0: each has its effect on a step of the stage, computed by other means."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from support.reference_losses import clip_terms
from support.runs import clip_config
from support.stepping import record
from train.config.clip import ImageTowerConfig, TextTowerConfig, TokenTasksConfig

TASKS = [(100.0, 10.0), (0.0, 3.0), (7.0, 0.0), (0.0, 0.0), (0.5, 40.0)]


@pytest.mark.parametrize(("sketch", "echo"), TASKS)
def test_the_loss_is_the_contrastive_one_and_the_weighted_tasks(
    sketch: float, echo: float, shapes: Path, tmp_path: Path
) -> None:
    config = clip_config(shapes, tmp_path / "run", tokens=TokenTasksConfig(sketch=sketch, echo=echo))
    recorded = record(config)
    net, metrics = recorded.initial[0], recorded.metrics[0]
    terms = clip_terms(net, recorded.parts[0][0])
    assert terms.keys() == {"contrastive"} | {name for name, w in (("sketch", sketch), ("echo", echo)) if w}
    assert {name for name in metrics if name.endswith("_mse")} == {f"{n}_mse" for n in terms.keys() - {"contrastive"}}
    loss = sum(
        ({"sketch": sketch, "echo": echo}.get(name, 1.0) * term for name, term in terms.items()), torch.zeros(())
    )
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name in terms.keys() - {"contrastive"}:
        assert metrics[f"{name}_mse"] == pytest.approx(terms[name].item(), rel=1e-4)
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in net.parameters() if p.grad is not None]).sum().sqrt()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=2e-3)


TOWERS: list[dict[str, Any]] = [
    {
        "text": TextTowerConfig(vocab_size=610, max_length=9, width=24, layers=1, heads=3),
        "image": ImageTowerConfig(patch_size=16, width=20, layers=2, heads=5),
        "projection": 6,
    },
    {
        "text": TextTowerConfig(vocab_size=650, max_length=30, width=16, layers=3, heads=2),
        "image": ImageTowerConfig(patch_size=4, width=12, layers=1, heads=1),
        "projection": 10,
    },
]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with captions of 400 invented words."""
    folder, rng = tmp_path_factory.mktemp("wordy"), np.random.default_rng(0)
    for k in range(40):
        Image.new("RGB", (32, 32), (k, 0, 0)).save(folder / f"{k}.png")
        words = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(10)]
        (folder / f"{k}.txt").write_text(" ".join(words))
    return folder


@pytest.mark.parametrize("shape", TOWERS)
def test_the_towers_have_their_shapes(shape: dict[str, Any], wordy: Path, tmp_path: Path) -> None:
    config = clip_config(wordy, tmp_path / "run")
    text, image, projection = shape["text"], shape["image"], shape["projection"]
    recorded = record(replace(config, **shape))
    net, ids = recorded.initial[0].clip, recorded.parts[0][0].input_ids
    assert len(recorded.stage.tokenizer) == text.vocab_size  # the captions have more pairs than that
    assert ids.shape == (8, text.max_length)
    embeddings = net.text_model.embeddings
    assert embeddings.token_embedding.weight.shape == (text.vocab_size, text.width)
    assert embeddings.position_embedding.weight.shape == (text.max_length, text.width)
    assert net.vision_model.embeddings.patch_embedding.weight.shape == (image.width, 3, *[image.patch_size] * 2)
    for tower, given in ((net.text_model, text), (net.vision_model, image)):
        assert len(tower.encoder.layers) == given.layers
        for layer in tower.encoder.layers:
            assert (layer.self_attn.num_heads, layer.self_attn.head_dim) == (given.heads, given.width // given.heads)
            assert layer.mlp.fc1.weight.shape == (4 * given.width, given.width)
    assert net.text_projection.weight.shape == (projection, text.width)
    assert net.visual_projection.weight.shape == (projection, image.width)
    assert recorded.initial[0].tasks.sketch.paint[-1].weight.shape == (3 * image.patch_size**2, text.width)


def test_validation_measures_the_averaged_weights(shapes: Path, tmp_path: Path) -> None:
    """Retrieval among the 24 held-out images by the averaged towers, at a high learning rate."""
    found: dict[str, float] = {}

    @torch.no_grad()
    def measure(stage: Any) -> None:
        found.update(stage.validate(6).metrics)
        batch = stage.tokenised(stage.held_out.__getitems__(list(range(24))))
        clip, ids = stage.ema.module, batch.input_ids
        images = clip.visual_projection(clip.vision_model(pixel_values=batch.pixels).pooler_output)
        texts = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        likeness = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        nearest = likeness.argmax(1)
        found["expected"] = (ids[nearest] == ids).all(1).float().mean().item()
        ranks = (likeness >= likeness.diagonal()[:, None]).sum(1)
        found["at least"] = (ranks <= 5).float().mean().item()

    config = clip_config(shapes, tmp_path / "run", ema_decay=0.5)
    record(config, 6, measure)
    assert found["val_image_to_text@1"] == pytest.approx(found["expected"])
    assert found["val_image_to_text@5"] >= found["at least"] - 1e-6
