"""The wheel: its content, its requirements, and its commands in their own environment."""

import ast
import os
import re
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from PIL import Image

import ldm
from support import ROOT
from train.engine import provenance

PACKAGES = ("ldm", "autoencoder", "conditioning", "train")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def build(folder: Path, out: Path) -> Path:
    """Build a source distribution and a wheel of a folder. Return the wheel."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=folder, check=True, timeout=60)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def read(wheel: Path, name: str) -> str:
    """Return the content of a file of the wheel's .dist-info folder."""
    with ZipFile(wheel) as archive:
        return archive.read(f"ldm-{ldm.__version__}.dist-info/{name}").decode()


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(read(wheel, "METADATA"))


def test_the_wheel_contains_packages_and_configurations(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for path in SOURCES} | {f"{name}/py.typed" for name in PACKAGES}
    code.add("train/evaluation/report.html")
    assert names == code | {f"train/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}


def test_a_source_distribution_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / f"ldm-{ldm.__version__}", tmp_path / "dist")
    assert again.read_bytes() == wheel.read_bytes()


def test_every_script_is_also_an_entry_point(wheel: Path) -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"demo"}
    lines = read(wheel, "entry_points.txt").split("\n")
    expected = {f"ldm-{name.replace('_', '-')} = train.commands.cli:{name}" for name in scripts}
    assert {line for line in lines if line} == expected | {"[console_scripts]"}


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert metadata(wheel)["Version"] == provenance.versions()["ldm"] == cited == ldm.__version__


def test_every_import_is_a_requirement(wheel: Path) -> None:
    """Imports inside functions, and in the page, may be those of an extra; all others belong to every installation."""
    lines = metadata(wheel).get_all("Requires-Dist", [])
    extras = {normalised(line) for line in lines}
    always = {normalised(line) for line in lines if "extra ==" not in line}
    provided = packages_distributions()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inner = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            for module in top_level(node) - sys.stdlib_module_names - set(PACKAGES):
                distributions = {normalised(name) for name in provided.get(module, [module])}
                optional = id(node) in inner or path.is_relative_to(ROOT / "train/page")
                assert distributions & (extras if optional else always), f"{path}: {module} is not declared"


def top_level(node: ast.AST) -> set[str]:
    """Return the top-level modules that a statement imports."""
    match node:
        case ast.Import():
            return {alias.name.split(".")[0] for alias in node.names}
        case ast.ImportFrom():
            return {str(node.module).split(".")[0]}
        case _:
            return set()


def normalised(requirement: str) -> str:
    """Return a distribution's name in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def test_an_installed_copy_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment is often inside the checkout of another project, whose commit says nothing about the copy."""
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "provenance.py").touch()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "other"], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit() == ""
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{7,}-dirty", provenance.commit())


# -- an environment of its own ----------------------------------------------------------------------------------------

TRAIN = "--steps 2 --batch-size 4 --optimizer.warmup 0 --log-every 1"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. The requirements are those of this environment; the checkout is hidden."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", wheel], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # A folder that a .pth file names is searched, but its own .pth files, such as an editable install's, are not read.
    (site / "requirements.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder


def run(environment: Path, cwd: Path, program: str, *arguments: str) -> str:
    """Run a program of the environment, offline and without this process's paths. Return its output."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=cwd,
        env=variables | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_environment_has_only_the_wheel(environment: Path, tmp_path: Path) -> None:
    files = f"import {', '.join(PACKAGES)}; print(*({', '.join(f'{name}.__file__' for name in PACKAGES)},))"
    for file in run(environment, tmp_path, "python", "-c", files).split():
        assert Path(file).is_relative_to(environment)


@pytest.mark.slow
def test_the_installed_commands_train_and_generate(environment: Path, tmp_path: Path) -> None:
    for line in (
        "ldm-make-dataset shapes --out data --size 32 --train 16 --test 8",
        "ldm-inspect-data --data data --workers 0",
        f"ldm-train-clip shapes/clip --data data --out clip {TRAIN} --text.layers 1 --image.layers 1",
        f"ldm-train-vae shapes/vae --data data --out vae {TRAIN} --model.channels 16 16 16",
        f"ldm-train-ldm shapes/ldm --data data --vae vae/model --text-encoder clip/model --out ldm {TRAIN} "
        "--unet.channels 32 32 --sample-steps 2",
        "ldm-txt2img --model ldm/model --prompt star --steps 2 --out out",
        "ldm-convert --model ldm/model --out model.safetensors",
    ):
        run(environment, tmp_path, *line.split())
    with Image.open(next((tmp_path / "out").iterdir())) as image:
        assert image.size == (32, 32)
    about = yaml.safe_load((tmp_path / "ldm/config.yaml").read_text())["about"]
    assert about["versions"]["ldm"] == ldm.__version__
    assert about["commit"] == ""
