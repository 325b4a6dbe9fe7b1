"""Configurations: every file builds its networks, and wrong ones give one line that states what is accepted."""

import contextlib
import copy
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from conditioning.tokenizer import train_tokenizer
from ldm.errors import UserError
from ldm.networks.unet import widen
from support import ROOT
from support.commands import run_command
from train.config.clip import ClipConfig
from train.config.distill import DistillConfig
from train.config.generation import InterpolateOptions, Txt2ImgOptions
from train.config.ldm import LdmConfig, UnetConfig
from train.config.load import dump, overlay, parse, plain, read_yaml, validate
from train.config.reports import EvaluateOptions, InspectOptions
from train.config.resumable import Fixed, Resumable, differences, published
from train.config.run import RunConfig
from train.config.shipped import shipped
from train.config.vae import AutoencoderConfig, VaeConfig

KINDS = {"clip": ClipConfig, "vae": VaeConfig, "ldm": LdmConfig, "distill": DistillConfig}
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def load(path: Path) -> RunConfig:
    return parse(KINDS[path.stem.split("_")[0]], [str(path)])


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_builds_its_networks(path: Path) -> None:
    config = load(path)
    with torch.device("meta"):
        match config:
            case VaeConfig():
                side, factor = config.input.resolution, 2 ** (len(config.model.channels) - 1)
                network = config.model.build(side) if config.init else config.build()  # nothing is downloaded
                assert AutoencoderConfig.of(network) == config.model
                assert side % factor == 0
                if (discriminator := config.build_discriminator(factor)) is not None:
                    assert discriminator(torch.empty(1, 3, side, side)).shape[:2] == (1, 1)
            case LdmConfig():
                beside = path.with_name("vae.yaml")
                vae = load(beside if beside.is_file() else ROOT / "configs/sd15/vae.yaml")  # as sd2/ldm.yaml says
                unet(config, vae, 768)
                with torch.device("cpu"):
                    assert config.diffusion.timesteps == config.diffusion.build_objective().schedule.T
                    assert config.diffusion.build_process().target == config.diffusion.target
            case DistillConfig():
                with torch.device("cpu"):
                    teacher = load(path.with_name("ldm.yaml"))
                    assert isinstance(teacher, LdmConfig)
                    objective = config.build_objective(teacher.diffusion.build_process())
                kind = "trajectory" if config.trajectory else config.method
                assert type(objective).__name__ == f"{kind.title()}Distillation"
            case ClipConfig():
                with torch.device("cpu"):
                    tokenizer = train_tokenizer(["a red star"], config.text.vocab_size, config.text.max_length)
                assert config.build(tokenizer).clip.text_model.config.hidden_size == config.text.width


def unet(config: LdmConfig, vae: VaeConfig, text_width: int) -> torch.nn.Module:
    side = config.input.resolution // 2 ** (len(vae.model.channels) - 1)
    return config.unet.build(latent_channels=vae.model.latent_channels, latent_size=side, text_width=text_width)


def test_stable_diffusion_shapes() -> None:
    """The networks have the published parameter counts and head widths."""
    vae, ldm = load(ROOT / "configs/sd15/vae.yaml"), load(ROOT / "configs/sd15/ldm.yaml")
    with torch.device("meta"):
        network = unet(ldm, vae, 768)
        codec = vae.build()
    assert sum(p.numel() for p in network.parameters()) == 859_520_964
    assert sum(p.numel() for p in codec.parameters()) == 83_653_863
    heads = [b.attentions[0].transformer_blocks[0].attn1.heads for b in network.down_blocks if hasattr(b, "attentions")]
    assert heads == [8, 8, 8]
    widen(network, 9)
    assert sum(p.numel() for p in network.parameters()) == 859_535_364  # the count of the published inpainting model


def test_stable_diffusion_2_has_linear_projections_and_heads_of_64() -> None:
    vae, ldm = load(ROOT / "configs/sd15/vae.yaml"), load(ROOT / "configs/sd2/ldm.yaml")
    with torch.device("meta"):
        network = unet(ldm, vae, 1024)
        published = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
        )
    assert sum(p.numel() for p in network.parameters()) == 865_910_724
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (network, published)]
    assert shapes[0] == shapes[1]
    heads = [b.attentions[0].transformer_blocks[0].attn1.heads for b in network.down_blocks if hasattr(b, "attentions")]
    assert [c // h for c, h in zip((320, 640, 1280), heads, strict=True)] == [64, 64, 64]
    assert ldm.clip_skip == 1


def test_linear_projections_compute_what_convolutions_do() -> None:
    """The same weights in another shape; the blocks are otherwise the same, and start with an output of zero."""
    both = [
        UnetConfig(channels=(32, 64), heads=(2, 2), linear_projections=linear).build(
            latent_channels=4, latent_size=8, text_width=16
        )
        for linear in (False, True)
    ]
    convolutions = both[0].state_dict()
    assert not any(value.any() for name, value in both[1].state_dict().items() if ".proj_out." in name)
    for value in convolutions.values():
        if not value.any():
            value.normal_(std=0.05)
    flat = {name: value.view_as(both[1].state_dict()[name]) for name, value in convolutions.items()}
    both[1].load_state_dict(flat)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    with torch.no_grad():
        one, other = (net(x, torch.tensor([5]), text).sample for net in both)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert one.std() > 0.05


def test_shapes_128_has_heads_of_64() -> None:
    config = load(ROOT / "configs/shapes128/ldm.yaml")
    assert [c // h for c, h in zip(config.unet.channels, config.unet.heads, strict=True)] == [64, 64, 64]


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_dumped_configuration_is_read_back(kind: type[RunConfig]) -> None:
    assert validate(kind, yaml.safe_load(dump(kind()))) == kind()


# Settings that a continued run may change without a request: a contract with existing runs.
RESUMABLE = {
    *(
        "data",
        "out",
        "steps",
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "log_every",
        "cache",
        "workers",
    ),
    "input.max_damaged",
    *("first_samples", "roll_back_after", "trackers", "license", "init", "perceptual.model", "validation_examples"),
    *("compile", "validation_draws", "keep_best", "evaluate_every", "evaluation_images", "evaluation_features"),
    *(
        "validation_features",
        "vae",
        "text_encoder",
        "teacher",
        "attention",
        "prompts",
        "sample_steps",
        "guidance_scale",
    ),
    # The fingerprint of the data guards these.
    *(f"input.{name}" for name in ("caption_from_names", "caption_files", "encoding", "follow_links", "reading")),
}
# Settings that can't change at all in a run, because of its weights, its optimizer or the meaning of its outputs.
FIXED = {
    *("optimizer.kind", "decoder_only", "learn_logvar", "task", "clip_skip", "text_chunks", "projection"),
    *(f"adversarial.{name}" for name in ("channels", "layers", "spectral_norm")),
    *(f"diffusion.{name}" for name in ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr")),
    *("diffusion.shift", "diffusion.target", "method", "solver_steps"),
}
FIXED_RECORDS = ("text.", "image.", "model.", "unet.")
PLACES = {"data", "out", "cache", "init", "perceptual.model", "validation_features", "vae", "text_encoder"}
PLACES |= {"input.duplicates", "evaluation_features", "teacher"}


def leaves(config: object, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return flat


def changed(config: Any, name: str) -> Any:
    """Return a copy in which one field has another value, valid or not."""
    first, _, rest = name.partition(".")
    copied = copy.copy(config)
    object.__setattr__(copied, first, changed(getattr(config, first), rest) if rest else "something else")
    return copied


@pytest.mark.parametrize("kind", KINDS.values())
def test_which_settings_a_continued_run_may_change(kind: type[RunConfig]) -> None:
    config = kind()
    for name, value in leaves(config).items():
        now = changed(config, name)
        found = list(differences(config, now))
        assert [d[:3] for d in found] == ([] if name in RESUMABLE else [(name, value, "something else")])
        for d in found:
            fixed = (
                name in FIXED or name.startswith(FIXED_RECORDS) or (kind.stage, name) == ("clip", "input.resolution")
            )
            assert bool(d.why) == (fixed or name in ("adversarial.kind", "adversarial"))  # its default is none


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (ClipConfig, "tokens.sketch", (100.0, 0.0)),
        (ClipConfig, "tokens.echo", (10.0, 0.0)),
        (VaeConfig, "adversarial.kind", ("hinge", "none")),
        (LdmConfig, "diffusion.variance", ("fixed_small", "learned")),
        (LdmConfig, "diffusion.timestep_sampling", ("uniform", "importance")),
    ],
)
def test_a_part_with_weights_of_its_own_cannot_be_turned_on_or_off(
    kind: type[RunConfig], name: str, values: tuple[Any, Any]
) -> None:
    bound = ["--diffusion.objective", "vlb"] * (name == "diffusion.variance")
    on, off = (parse(kind, [f"--{name.replace('_', '-')}", str(value), *bound]) for value in values)
    for before, now in ((on, off), (off, on)):
        assert [bool(d.why) for d in differences(before, now)] == [True]


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_setting_states_whether_it_can_change(kind: type[RunConfig]) -> None:
    """A new field needs a mark."""

    def unmarked(record: type, prefix: str = "") -> Iterator[str]:
        for name, field in record.__pydantic_fields__.items():  # type: ignore[attr-defined]
            if not any(isinstance(mark, Resumable | Fixed) for mark in field.metadata):
                nested = is_dataclass(field.annotation)
                yield from unmarked(field.annotation, f"{prefix}{name}.") if nested else [prefix + name]

    assert not list(unmarked(kind))


def test_a_continued_run_turns_its_cache_on_or_off_only_on_request() -> None:
    kept, elsewhere, off = RunConfig(), RunConfig(cache="elsewhere"), RunConfig(cache="off")
    assert not list(differences(kept, elsewhere))
    assert list(differences(kept, off)) == [("cache", "", "off", "")]
    assert list(differences(off, elsewhere)) == [("cache", "off", "elsewhere", "")]


@pytest.mark.parametrize("kind", KINDS.values())
def test_only_paths_are_shortened_when_published(kind: type[RunConfig]) -> None:
    was, now = plain(kind()), published(kind(), lambda place: f"<{place}>")
    names = {name for name in leaves(kind()) if dotted(was, name) != dotted(now, name)}
    assert names == PLACES & leaves(kind()).keys()
    assert dotted(now, "out") == "<>"


def dotted(tree: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\noptimizer: {lr: 1e-3, warmup: 3}\nunet: {channels: [32, 64], heads: [1, 2]}\n")
    config = parse(LdmConfig, [str(file), "--optimizer.lr", "2e-4", "--batch-size", "8", "--unet.heads", "2", "4"])
    assert (config.steps, config.optimizer.lr, config.optimizer.warmup) == (7, 2e-4, 3)
    assert (config.batch_size, config.unet.heads) == (8, (2, 4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", ["stepz", "did you mean 'steps'?"]),
        ("batch-size: 3", ["batch-size", "did you mean 'batch_size'?"]),
        ("optimiser: {lr: 1}", ["optimiser", "did you mean 'optimizer'?"]),
        ("learning_rate: 3", ["did you mean 'optimizer.lr'?"]),
        ("unet: {chanels: [32]}", ["unet.chanels", "did you mean 'unet.channels'?"]),
        ("quux: 3", ["quux", "--help lists all"]),
        ("steps: many", ["steps", "'many'", "integer"]),
        ("steps: -1", ["steps", "-1", "greater than 0"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr", "finite"]),
        ("optimizer: {rate: 1}", ["optimizer.rate"]),
        ("precision: fp8", ["precision", "fp8", "bf16"]),
        ("input: {encoding: utf-9}", ["input.encoding = 'utf-9': is unknown; accepted"]),
        ("unet: {channels: [32], heads: [1, 2]}", ["unet", "one entry per level"]),
        ("- steps", ["list", "mapping"]),
        ("steps: !!python/object/apply:os.system ['true']", ["YAML"]),
        ("steps: [", ["YAML"]),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(LdmConfig, [str(file)])
    assert str(caught.value).startswith(str(file))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "3"], ["--stepz", "did you mean --steps?"]),
        (["--batchsize", "3"], ["--batchsize", "did you mean --batch-size?"]),
        (["--Batch_Sise=3"], ["did you mean --batch-size?"]),
        (["-batch-size", "3"], ["did you mean --batch-size?"]),
        (["--optimiser.lr", "3"], ["did you mean --optimizer.lr?"]),
        (["--unet.chanels", "3"], ["did you mean --unet.channels?"]),
        (["--resolutoin", "3"], ["did you mean --input.resolution?"]),
        (["--input.batch-size", "3"], ["did you mean --batch-size?"]),
        (["--learning-rate", "3"], ["did you mean --optimizer.lr?"]),
        (["--hepl"], ["did you mean --help?"]),
        (["--lr", "1e-3"], ["--lr", "did you mean --optimizer.lr?"]),
        (["--steps", "3", "4"], ["'4'", "isn't the value of any option", "in quotes"]),
        (["--unet.channels", "64", "x"], ["--unet.channels 64 x", "integer"]),
        (["--input.background", "0", "0"], ["--input.background 0 0: needs 3 values"]),
        (["--steps"], ["--steps: needs a value"]),
        (["--precision"], ["--precision: needs a value: fp32, bf16 or fp16"]),
        (["--width", "3"], ["unknown option --width", "--help"]),
        (["-steps", "3"], ["unknown option -steps", "did you mean --steps?"]),
        (["--unet.channels"], ["--unet.channels: must have at least 1 value"]),
        (["--unet.channels", "0", "64"], ["--unet.channels 0 64: must be greater than 0"]),
        (["--unet.heads", "0", "4"], ["--unet.heads 0 4: must be greater than 0"]),
        (["--unet.heads", "4"], ["unet.channels (128, 256)", "one entry per level"]),
        (["--optimizer.betas", "0.9", "1"], ["--optimizer.betas 0.9 1: must be less than 1"]),
        (["--text-chunks", "33"], ["--text-chunks 33: must be at most 32"]),
        (["--input.resolution", "4"], ["--input.resolution 4: must be at least 8"]),
        (["--optimizer.lr", "fast"], ["--optimizer.lr fast: must be a number"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "0"], ["steps", "greater than 0"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--optimizer.lr"], ["optimizer.lr"]),
        (["--input.encoding", "utf-9"], ["--input.encoding utf-9: is unknown; accepted: utf-8"]),
        (["--input.caption-column", "a:0"], ["--input.caption-column a:0: must be the name of a column, or names"]),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        overlay(LdmConfig, LdmConfig(), arguments)
    for word in words:
        assert word in str(caught.value)
    assert "─" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--printconfig"], "unknown option --printconfig: did you mean --print-config?"),
        (["--resume-with-change"], "unknown option --resume-with-change: did you mean --resume-with-changes?"),
        (["--steps", "3", "shapes/ldm"], "the configuration must be the first argument"),
    ],
)
def test_configurations_and_their_print_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(LdmConfig, arguments)


@pytest.mark.parametrize(
    ("typed", "meant"), [("--promt", "--prompt"), ("--cfg-scale", "--guidance-scale"), ("--num-image", "--num-images")]
)
def test_misspelt_options_of_generation_are_met_with_a_suggestion(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown option {typed}: did you mean {meant}?")):
        overlay(Txt2ImgOptions, Txt2ImgOptions(), [typed, "3"])


@pytest.mark.parametrize("words", [("docs/figures.py", "--help"), ("docs/figures.py", "--nope")])
def test_programs_without_options_refuse_arguments(words: tuple[str, ...]) -> None:
    figures = {path: path.stat().st_mtime_ns for path in (ROOT / "docs/figures").iterdir()}
    assert run_command(*words).status == (0 if "--help" in words else 2)
    assert figures == {path: path.stat().st_mtime_ns for path in (ROOT / "docs/figures").iterdir()}


@pytest.mark.parametrize("words", [["--help"], ["--nope"], []])
def test_the_gpu_check_prints_its_usage(words: list[str]) -> None:
    done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), *words], capture_output=True, text=True)
    assert "bash benchmarks/gpu.sh OUT" in done.stdout
    assert done.returncode == (0 if words == ["--help"] else 2)


@dataclass(frozen=True, kw_only=True)
class GeneratingConfig:
    loop: bool = True
    tile: int | None = 3
    span: tuple[float, float] | None = None
    compose: tuple[tuple[str, float], ...] = ()
    corner: tuple[int, int] = (0, 0)
    name: str = "x"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--no-loop --tile None", {"loop": False, "tile": None}),
        ("--no-loop --loop --tile=5", {"tile": 5}),
        ("--span 0.5 4 --corner -1 2", {"span": (0.5, 4.0), "corner": (-1, 2)}),
        ("--compose a 2 b 0.5 --name=a=b", {"compose": (("a", 2.0), ("b", 0.5)), "name": "a=b"}),
        ("--compose --name -x", {"name": "-x"}),
        ("--loop True", "--loop True: --loop takes no value; give --loop or --no-loop"),
        ("--no-loop=x", "--no-loop=x: --no-loop takes no value; give --loop or --no-loop"),
        ("--compose a", "--compose a: needs 2 values for each entry"),
        ("--compose a 1 b", "--compose a 1 b: needs 2 values for each entry"),
        ("--compose a two", "--compose a two: must be a number"),
        ("--tile --loop", "--tile: needs a value"),
        ("--tile=", "--tile '': must be an integer"),
        ("--span 1", "--span 1: needs 2 values"),
        ("--no-tile", "unknown option --no-tile"),
    ],
)
def test_the_forms_of_options(line: str, expected: dict | str) -> None:
    if isinstance(expected, dict):
        assert overlay(GeneratingConfig, GeneratingConfig(), line.split()) == GeneratingConfig(**expected)
    else:
        with pytest.raises(UserError) as caught:
            overlay(GeneratingConfig, GeneratingConfig(), line.split())
        assert str(caught.value).startswith(expected)


LIGHT = """
import sys
sys.argv = sys.argv[1:]
import runpy
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("heavy:", *{"torch", "diffusers", "transformers", "accelerate", "datasets"} & sys.modules.keys())
"""


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.py")))
@pytest.mark.parametrize("argument", ["--help", "--nope"])
def test_help_and_wrong_options_load_no_heavy_library(script: str, argument: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, f"scripts/{script}", argument], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == (0 if argument == "--help" else 2), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize(
    ("kind", "typed", "usage"),
    [
        (LdmConfig, "/env/bin/ldm-train-ldm", "ldm-train-ldm [CONFIG] [--print-config] [-h]"),
        (LdmConfig, "scripts/train_ldm.py", "train_ldm.py [CONFIG] [--print-config] [-h]"),
        (Txt2ImgOptions, "/env/bin/ldm-txt2img", "ldm-txt2img [-h]"),
    ],
)
def test_help_names_the_program_and_the_configurations(
    kind: type, typed: str, usage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(kind) if kind is LdmConfig else overlay(kind, kind())
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {usage} ")
    text = " ".join(printed.split())
    for word in (
        "shapes/ldm, shapes/ldm_inpaint, ",
        "CONFIG, the first argument:",
        "--print-config: print all",
        "--resume-with-changes: ",
    ):
        assert (word in text) == (kind is LdmConfig)
    assert max(map(len, printed.splitlines())) <= 80


def test_configurations_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name refers to one stage's file, in any working directory."""
    monkeypatch.chdir(tmp_path)
    named = {name: (kind, path) for stage, kind in KINDS.items() for name, path in shipped(stage).items()}
    assert sorted(path for _, path in named.values()) == FILES
    for name, (kind, path) in named.items():
        assert f"configs/{name}.yaml" == str(path.relative_to(ROOT))
        assert parse(kind, [name]) == parse(kind, [str(path)])


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shapes/vae").mkdir(parents=True)  # a folder is not a configuration
    Path("shapes/ldm").write_text("steps: 7")
    assert parse(LdmConfig, ["shapes/ldm"]).steps == 7
    assert parse(VaeConfig, ["shapes/vae"]).steps == 400


def test_a_folder_as_configuration_is_refused_with_the_option_for_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder, not a configuration; give images as --data "):
        parse(VaeConfig, [str(tmp_path)])


@pytest.mark.parametrize("given", ["shapes/vea", "shapes/ldm", "shapes", "", "no.yaml"])
def test_an_unknown_name_is_refused_with_the_names_of_the_stage(given: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(VaeConfig, [given])
    assert str(caught.value) == (
        f"{given!r}: no such file, and not the name of a configuration of this command; names: emoji/vae, "
        "emoji128/vae, pictures/vae, sd15/vae, sd15/vae_ft_mse, sd15/vae_mosaic, shapes/vae, shapes128/vae, "
        "styles/vae, styles128/vae"
    )


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=8), t, max_size=3))
names = st.sampled_from(["steps", "optimizer", "unet", "diffusion", "input", "precision", "prompts", "trackers", "x"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, trees, max_size=4))
def test_any_mapping_is_a_configuration_or_a_plain_refusal(given: dict) -> None:
    with contextlib.suppress(UserError):  # no other exception is allowed
        assert isinstance(validate(LdmConfig, given), LdmConfig)


def test_help_lists_every_field_with_its_meaning() -> None:
    ended = run_command("scripts/train_ldm.py", "--help")
    assert ended.status == 0
    printed = " ".join(ended.out.split())
    for option in ("--optimizer.lr", "--unet.channels", "--diffusion.target", "--precision", "--input.caption-column"):
        assert option in printed
    assert "Peak learning rate" in printed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--diffusion.target eps --diffusion.zero-terminal-snr True", "choose v, x0 or flow"),
        ("--diffusion.objective vlb --diffusion.offset-noise 0.1", "offset_noise 0.1 with objective vlb"),
        ("--sample-steps 1001", "1001 sampling steps"),
        ("--unet.channels 64", "unet.channels (64,)"),
        ("--diffusion.shift 2", "shift 2.0: can't be used with schedule scaled_linear"),
    ],
)
def test_contradictory_settings_are_refused(line: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        parse(LdmConfig, line.split())


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no-such\.yaml"):
        read_yaml(Path("no-such.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        *("2001-99-99", "!!int x", "!!float x", "!!bool x", "!!timestamp x", '!!binary "é"', "!!set [1]", "!!map [1]"),
        *("9" * 5000, "1:" * 5000 + "1", "0x" + "f" * 5000, "[" * 3000, "- " * 3000, "? " * 3000),
        "&a [*a]",
        "".join(f"\n a{k}: &a{k} [{', '.join(['x'] if k == 0 else [f'*a{k - 1}'] * 9)}]" for k in range(30)),
        "".join(f"\n a{k}: &a{k} {{{'x: 1' if k == 0 else f'<<: [*a{k - 1}, *a{k - 1}]'}}}" for k in range(40)),
        *("{0: 1, 0: 2}", "!!python/name:os.system", "'" + "x" * 200_000 + "'"),
    ],
    ids=lambda text: text[:20].strip(),
)
def test_hostile_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"steps: {text}\n")
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (VaeConfig, "--adversarial.layers 1000000000", "must be at most 16"),
        (VaeConfig, "--adversarial.channels 999999999999999999999999", "must be at most 1,024"),
        (VaeConfig, "--model.channels 65536 65536 --model.groups 1", "up to 20 billion are accepted"),
        (VaeConfig, "--model.channels" + " 1" * 17 + " --model.groups 1", "most 16"),
        (LdmConfig, "--unet.channels -32 32", "must be greater than 0"),
        (LdmConfig, "--unet.channels", "must have at least 1 value"),
        (LdmConfig, "--unet.heads 0 0", "must be greater than 0"),
        (LdmConfig, "--unet.depth 1000 --unet.layers 1000", "up to 20 billion are accepted"),
        (LdmConfig, "--optimizer.betas 0.9 1.0", "must be less than 1"),
        (LdmConfig, "--diffusion.timesteps 1000000000000", "must be at most 100,000"),
        (LdmConfig, "--diffusion.shift 1e308", "must be at most 1,000"),
        (LdmConfig, "--input.bucket-ratio 1e308", "must be at most 100"),
        (LdmConfig, "--input.resolution 1000000000", "must be at most 16,384"),
        (ClipConfig, "--workers 1000000000", "must be at most 1,024"),
        (ClipConfig, "--text.layers 1000000000", "must be at most 1,000"),
        (ClipConfig, "--text.width 60000 --text.layers 999", "up to 20 billion are accepted"),
        (ClipConfig, "--text.vocab-size 1000000000", "must be at most 49,408"),
        (ClipConfig, "--batch-size " + "9" * 5000, "must be an integer"),
        (Txt2ImgOptions, "--num-images 100000000000", "must be at most 1,000,000"),
        (InterpolateOptions, "--frames 100000000000", "must be at most 1,000,000"),
        (EvaluateOptions, "--prompts 100000000000", "must be at most 1,000,000"),
        (InspectOptions, "--workers 100000000", "must be at most 1,024"),
    ],
)
def test_absurd_sizes_are_refused_at_once(kind: Any, words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        overlay(kind, kind(), words.split())
    assert words.split()[0].split(".")[-1].strip("-") in str(caught.value)


@pytest.mark.parametrize("name", ["data", "out", "cache", "vae", "text_encoder", "init", "input: {duplicates"])
def test_a_path_with_a_nul_character_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f'{name}: "a\\0b"{"}" * ("{" in name)}\n')
    with pytest.raises(UserError, match=r" = 'a\\x00b': contains a NUL character") as caught:
        parse(LdmConfig, [str(file)])
    assert name.rpartition("{")[2] in str(caught.value)
