"""The tracks of records beside stage 2: diffusers' loop, stage 1, and the whole demo."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against.finetuning import Finetuning, open_loop, train_peer
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tracks import demo, peer, stage1
from tracks.options import Options

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from support.records import SETTINGS, quick, tiny_options, train_here
from train.config.data import DataConfig
from train.data.synthetic.shapes import example, render
from train.engine.open_data import open_inputs
from train.evaluation.autoencoder import psnr

CPU = torch.device("cpu")


@pytest.fixture
def o(shapes: Path, parts: Path, tmp_path: Path) -> Options:
    return tiny_options(shapes, parts, tmp_path)


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=8,
    )


def test_the_loop_by_hand_makes_the_steps_of_the_shipped_calls() -> None:
    shipped, by_hand = (Finetuning(unet(), CPU, "fp32", how, 1e-3, 6) for how in ("shipped", "fused"))
    for k in range(4):
        torch.manual_seed(k)
        batch = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
        assert shipped.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - k / 6))
        torch.testing.assert_close(shipped.step(*batch), by_hand.step(*batch))
    for loop in (shipped, by_hand):
        last = [w.detach().clone() for w in loop.weights]
        loop.copy_average()
        assert not all(map(torch.equal, last, loop.weights))
    torch.testing.assert_close(shipped.weights, by_hand.weights, atol=1e-5, rtol=1e-4)


def test_the_peer_trains_on_the_same_latents_and_text_as_stage_2(
    o: Options, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    o = replace(o, track="peer")
    specs: list[dict[str, Any]] = []

    def train_seeds(o: Options, program: Any) -> None:
        for seed in o.seeds:
            specs.append(json.loads(program(seed)[2]))
            train_peer(specs[-1], CPU)

    monkeypatch.setattr(peer, "train_seeds", train_seeds)
    record = peer.measure(o, None).record
    assert record["before"]["ratio"] == 0.5  # of stage 2 with the same number of steps
    assert (record["peer"], record["valid"], set(record["accuracy"]["seeds"])) == ("best", False, {"4", "5"})

    inputs, source = load_file(specs[0]["inputs"]), open_inputs(str(shapes), DataConfig(resolution=32)).source
    text, vae = ClipTextEncoder.load(o.text_encoder), Autoencoder.load(o.vae)
    assert len(inputs["mean"]) == len(inputs["rows"]) == len(source)
    torch.testing.assert_close(inputs["texts"][:1], text.encode([""]))
    captions = [source[k].captions[0] for k in range(4)]
    torch.testing.assert_close(inputs["texts"][inputs["rows"][:4]], text.encode(captions), atol=1e-5, rtol=1e-4)
    pixels = torch.stack([pixels_of(source.read(k)) for k in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(inputs["mean"][:4], vae.encode(pixels).mean, atol=1e-4, rtol=1e-3)

    _, batches = open_loop(specs[0] | {"batch": 16}, CPU)
    conditions = torch.cat([next(batches).condition for _ in range(4 * len(source) // 16)])
    dropped = (conditions == inputs["texts"][0]).flatten(1).all(1)
    assert 0.03 < dropped.float().mean() < 0.2  # of 256 captions, 10 %
    kept = {tuple(c.flatten().tolist()) for c in conditions[~dropped]}
    assert kept <= {tuple(c.flatten().tolist()) for c in inputs["texts"][1:]}

    folders = [peer.own_folder(o, seed) for seed in o.seeds]
    starts = [load_file(Path(spec["start"], "unet/diffusion_pytorch_model.safetensors")) for spec in specs]
    assert not torch.equal(starts[0]["conv_in.weight"], starts[1]["conv_in.weight"])
    assert starts[0]["conv_out.weight"].any()  # diffusers' initial weights have no zeros
    model = LatentDiffusionPipeline.from_pretrained(str(folders[0] / "model")).model
    for name, value in model.backbone.module.state_dict().items():
        assert torch.equal(value, load_file(folders[0] / "unet/diffusion_pytorch_model.safetensors")[name])
        assert value.ndim < 2 or not torch.equal(value, starts[0][name])
    assert torch.equal(model.autoencoder.vae.encoder.conv_in.weight, vae.vae.encoder.conv_in.weight)

    monkeypatch.setattr(peer, "train_seeds", lambda o, program: specs.extend(o.seeds))
    count = len(specs)
    assert peer.measure(o, None).record["accuracy"] == record["accuracy"]  # finished seeds aren't trained again
    assert len(specs) == count


def pixels_of(file: Any) -> torch.Tensor:
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def test_the_shipped_script_gets_the_same_model_and_data(o: Options, tmp_path: Path) -> None:
    o = replace(o, track="peer", peer="shipped", peer_lr=2e-4)
    with pytest.raises(UserError, match="--diffusers '': must be a checkout of diffusers"):
        peer.measure(o, None)
    with pytest.raises(UserError, match=r"needs diffusion\.target eps"):
        peer.measure(replace(o, settings=f"{SETTINGS} --diffusion.target v"), None)
    config = peer.parse(peer.LdmConfig, peer.ldm_arguments(o, "configs/shapes/ldm.yaml", o.settings, o.vae))
    spec = json.loads(peer.training(o, config, tmp_path, 5).command()[2])
    given = dict(zip(spec["arguments"][1::2], spec["arguments"][2::2], strict=True))
    assert spec["log"] == str(peer.own_folder(o, 5).resolve() / "metrics.jsonl")
    assert given["--pretrained_model_name_or_path"] == str(tmp_path / "seed-5")
    assert given["--train_data_dir"] == f"{Path(o.data).resolve()}/train"
    assert (given["--max_train_steps"], given["--seed"], given["--learning_rate"]) == ("2", "5", "0.0002")
    assert (given["--train_batch_size"], given["--resolution"], given["--mixed_precision"]) == ("4", "32", "no")


VAE = (
    "--model.channels 8 16 --model.layers 1 --model.groups 2 --model.attention False --batch-size 4 --trackers "
    "--precision fp32 --first-samples 0 --encode-once False"
)


def test_stage_1_is_judged_by_stage_2_on_its_latents(o: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(stage1, "train_seeds", train_here)
    o = replace(o, track="stage-1", settings=VAE, judge=f"{SETTINGS} --steps 1", images=6, seeds=(5,))
    measured = stage1.measure(o, None)
    first = measured.record
    assert first["cpu_seconds"] == {"step": 1.5, "training": 3.0}
    assert set(measured.logs) == {"seed-5.jsonl", "seed-5-judge.jsonl"}
    assert all(log.is_file() for log in measured.logs.values())
    run, judge = (stage1.run_folder(o, 5, what) for what in ("", "-judge"))
    vae = Autoencoder.load(str(run / "model"))
    images = [render(scene, 32, rng) for scene, rng in (example(70_001, "test", k) for k in range(6))]
    pixels = torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        found = psnr(vae.decode(vae.encode(pixels).mean), pixels).mean()
    assert first["psnr"]["seeds"]["5"] == first["latents"]["5"]["psnr"] == pytest.approx(float(found), abs=1e-3)
    assert stage1.psnr({"1": {"psnr": 34.5}, "2": {"psnr": 33.5}})["least"] == 33.5
    assert {"mean", "std", "kl"} <= set(first["latents"]["5"]["channels"][0])
    judging = LatentDiffusionPipeline.from_pretrained(str(judge / "model")).model.autoencoder
    assert torch.equal(judging.vae.encoder.conv_in.weight, vae.vae.encoder.conv_in.weight)

    monkeypatch.setattr(stage1, "judged", lambda o: first["accuracy"]["seeds"])
    monkeypatch.setattr(stage1, "train_seeds", lambda o, program: None)
    again = stage1.measure(o, first | {"steps": 8}).record
    assert again["before"]["ratio"] == 2 * 1.5 / (8 * 3.0)
    with pytest.raises(UserError, match="was judged with --judge 'other'"):
        stage1.measure(o, first | {"judge": "other"})


@pytest.mark.parametrize(
    ("change", "dead", "least", "accuracy", "valid"),
    [
        ({}, 0.0, 34.0, 0.8, True),
        ({}, 0.0, 33.9, 0.8, False),
        ({}, 1.0, 34.0, 0.8, False),
        ({}, 0.0, 34.0, 0.791, True),
        ({}, 0.0, 34.0, 0.789, False),
        ({"images": 999}, 0.0, 34.0, 0.8, False),
        ({"seeds": (1, 2)}, 0.0, 34.0, 0.8, False),
    ],
)
def test_the_rule_of_stage_1(change: dict[str, Any], dead: float, least: float, accuracy: float, valid: bool) -> None:
    stored = {"psnr": {"least": least}, "accuracy": {"mean": accuracy}, "latents": {"1": {"dead_channels": dead}}}
    before = {"accuracy": {"mean": 0.8}}
    assert stage1.is_valid(replace(Options(), **change), stored, before) == valid


SCRIPT = """
import pathlib, sys, time
code, seconds = pathlib.Path(__file__).resolve().parents[1], {seconds}
started = time.process_time()
while time.process_time() < started + seconds:
    pass
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "model").mkdir(parents=True)
(out / "metrics.jsonl").write_text("{{}}")
with open(code.parent / "order", "a") as file:
    print(code.name, *sys.argv[1:], file=file)
sys.exit("broken" in code.name)
"""


def checkout(folder: Path, seconds: float) -> Path:
    """Write a checkout whose demo has two parts, each of them a loop of this many CPU seconds."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "configs").mkdir()
    (folder / "scripts/part.py").write_text(SCRIPT.format(seconds=seconds))
    lines = {"data": "scripts/part.py --out data", "ldm": "scripts/part.py --out runs/demo/ldm"}
    (folder / "train").mkdir()
    (folder / "train/__init__.py").write_text(f"LINES = {lines!r}\n")
    (folder / "scripts/demo.py").write_text("from train import LINES as STAGES\n")
    return folder


def test_the_demos_parts_take_turns_with_another_checkout(
    o: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(demo, "ROOT", checkout(tmp_path / "this", 0.02))
    monkeypatch.setattr(demo, "accuracy", lambda o, model: {"seen": 0.9, "unseen": 1.0, "mean": 0.95})
    o = replace(o, track="demo", steps=0, settings="", checkout=str(checkout(tmp_path / "other", 0.3)))
    measured = demo.measure(o, None)
    record, order = measured.record, (tmp_path / "order").read_text()
    parts = ["--out data", "--out runs/demo/ldm --seed {}"]
    assert order.splitlines() == [
        f"{who} {part.format(seed)}" for seed in (4, 5) for part in parts for who in ("other", "this")
    ]
    seconds, before = record["cpu_seconds"], record["before"]
    for found, least in ((seconds, 0.02), (before["cpu_seconds"], 0.3)):
        assert set(found["parts"]) == {"data", "ldm"}
        assert all(least < value < least + 0.5 for value in found["parts"].values())
    assert before["ratio"] == seconds["training"] / before["cpu_seconds"]["training"] < 1
    assert (before["name"], record["accuracy"]["mean"], record["valid"]) == ("other", 0.95, False)
    assert measured.logs["seed-5.jsonl"].read_text() == "{}"
    assert demo.measure(o, None).record["cpu_seconds"] == seconds
    assert (tmp_path / "order").read_text() == order  # finished parts don't run again

    broken = checkout(tmp_path / "broken", 0.0)
    with pytest.raises(RunError, match="data ended with status 1; its output is in"):
        demo.measure(replace(o, name="next", checkout=str(broken)), None)
    faulty = checkout(tmp_path / "faulty", 0.0)
    (faulty / "scripts/demo.py").write_text("import nowhere")
    (broken / "scripts/demo.py").write_text("STAGES = {'data': 'a'}")
    for change, message in (
        ({"checkout": str(broken)}, "its demo has other parts: data"),
        ({"checkout": str(tmp_path)}, r"has no scripts/demo\.py"),
        ({"checkout": str(faulty)}, r"scripts/demo\.py can't be read \(ModuleNotFoundError: No module named 'nowhere'"),
        ({"settings": "--seed 1"}, "the demo has its own"),
    ):
        with pytest.raises(UserError, match=message):
            demo.measure(replace(o, **change), None)
