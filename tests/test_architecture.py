"""Imports go one way: scripts → train → ldm.pipeline → {the rest of ldm, autoencoder, conditioning}.

The three on the right may import the leaves, which import only one another.
"""

import ast
from pathlib import Path

import pytest

from support import ROOT

PACKAGES = ("ldm", "autoencoder", "conditioning", "train", "scripts")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


LEAVES = (
    *("ldm.errors", "ldm.files", "ldm.float64", "ldm.formats.hub", "ldm.formats.clip_layout"),
    *("ldm.imports", "ldm.libraries", "ldm.networks.attention_precision", "ldm.networks.text_tower"),
)


def layer(module: str) -> str:
    """Return the layer of a module or of a name in it: its package, except for the pipeline and the leaves."""
    if any(f"{module}.".startswith(f"{leaf}.") for leaf in LEAVES):
        return "leaf"
    pipeline = ("ldm.pipeline", "ldm.model", "ldm.request", "ldm.preparation")
    if module.startswith(pipeline) or module == "ldm.LatentDiffusionPipeline":
        return "pipeline"
    return module.split(".")[0]


MAY = {
    "leaf": {"leaf"},
    "ldm": {"ldm", "leaf"},
    "autoencoder": {"autoencoder", "leaf"},
    "conditioning": {"conditioning", "leaf"},
    "pipeline": {"pipeline", "ldm", "autoencoder", "conditioning", "leaf"},
    "train": {"train", "pipeline", "ldm", "autoencoder", "conditioning", "leaf"},
    "scripts": {"train", "pipeline", "ldm", "autoencoder", "conditioning", "leaf"},
}
FILES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py") if p != ROOT / "ldm" / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    ours = {layer(name) for name in imported(path) if name.split(".")[0] in PACKAGES and name != "ldm"}
    assert ours <= MAY[layer(module)], f"{module} imports {ours - MAY[layer(module)]}"


def test_the_mathematics_needs_no_network_library() -> None:
    files = (
        "schedule",
        "spacing",
        "parameterization",
        "process",
        "timesteps",
        "objective",
        "bound",
        "denoiser",
        "guidance",
        "samplers",
    )
    for name in files:
        names = {module.split(".")[0] for module in imported(ROOT / "ldm" / f"{name}.py")}
        assert not names & {"diffusers", "transformers", "accelerate", "pydantic", "tyro"}, name


def test_test_modules_import_no_other_test_module() -> None:
    """They share helpers through tests/support and fixtures through tests/conftest.py."""
    for path in (ROOT / "tests").rglob("*.py"):
        modules = {part for name in imported(path) for part in name.split(".")}
        assert not {name for name in modules if name.startswith("test_") or name == "conftest"}, path
