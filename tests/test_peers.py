"""The comparison with other programs: turns of processes, failures, tables; and the GPU's script, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from against import contest, tables
from against.contest import Contestant, Row

from support import ROOT

PROGRAM = """
import json, sys, time
from against.served import Server
spec, server, memory = json.loads(sys.argv[1]), Server(), []
if spec["name"] == "broken":
    sys.exit("no such network")
def call():
    if spec["name"] == "hangs":
        time.sleep(600)
    time.sleep(spec["seconds"])
    with open(spec["log"], "a") as file:
        file.write(spec["name"] + " ")
def save(path):
    import numpy as np
    np.save(path, np.full(4, spec["value"]))
server.output = save
print("not an answer")
server.answer(prepared=0.25)
server.serve(call)
"""


def contestant(folder: Path, name: str, seconds: float = 0.0, value: float = 1.0) -> Contestant:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    spec = {"name": name, "seconds": seconds, "value": value, "log": str(folder / "order")}
    return Contestant(name, str(program), spec)


def test_programs_take_turns_and_failures_are_results(tmp_path: Path) -> None:
    found = [
        contestant(tmp_path, "slow", 0.05, value=2.2),
        contestant(tmp_path, "broken"),
        contestant(tmp_path, "fast", 0.01),
    ]
    row = Row("row", "", found, calls=2, reference=contestant(tmp_path, "exact", value=2.0))
    results = contest.run(row, tmp_path / "logs", 60, 3, {})
    assert (tmp_path / "order").read_text().split() == 2 * ["slow"] + 2 * ["fast"] + 3 * (2 * ["slow"] + 2 * ["fast"])
    assert results["broken"]["failed"] == "no such network"
    for name, seconds, error in (("slow", 0.05, 0.1), ("fast", 0.01, 0.5)):
        result = results[name]
        assert seconds <= result["wall from"] <= result["wall"] <= result["wall to"] < seconds + 0.5
        assert result["cpu"] < seconds  # sleeping costs no CPU time
        assert result["turns"] == 3
        assert 0.2 < result["compile"] < 0.75  # what was prepared before the first call took 0.25 s
        assert result["MiB"] > 1
        np.testing.assert_allclose(result["difference"], error)


def test_a_program_that_hangs_costs_only_its_time(tmp_path: Path) -> None:
    row = Row("row", "", [contestant(tmp_path, "hangs"), contestant(tmp_path, "fast")], together=False)
    results = contest.run(row, tmp_path / "logs", 2, 2, {})
    assert results["hangs"]["failed"] == "no time left"
    assert results["fast"]["turns"] == 2


def result(seconds: float, *, exact: bool = True) -> dict:
    times = {f"{clock}{end}": seconds for clock in ("wall", "cpu") for end in ("", " from", " to")}
    return {"exact": exact, "compile": 1.5, "MiB": 2048.0, "difference": 0.0123, "gigaflops": 100.0, **times}


def test_the_tables_separate_approximations_and_compare_with_the_base() -> None:
    about = {"device": "a CPU", "threads": 1, "versions": dict.fromkeys(("torch", "diffusers", "transformers"), "1")}
    row = {
        "what": "images",
        "base": "theirs",
        "precision": "bf16",
        "GFLOP/s": {"fp32": 50.0, "bf16": 100.0},
        "about": about | {"date": "2026-11-27T00:00:00", "commit": "abc"},
        "results": {
            "theirs": result(4.0),
            "ours": result(2.0),
            "lost": {"failed": "no network", "exact": True},
            "cached": result(1.0, exact=False),
        },
    }
    exact, approximate = tables.markdown({"row": row}).split("Approximations:")
    assert "| images | theirs | 4 s (4 s to 4 s), 25% of the matrix rate | 1.00× | 1.5 s | 0.012 | 2,048 MiB |" in exact
    assert "|  | ours | 2 s (2 s to 2 s), 50% of the matrix rate | 2.00× |" in exact
    assert "| lost | no network |" in exact
    assert "cached" not in exact
    assert "| images | cached | 1 s (1 s to 1 s), 100% of the matrix rate | 4.00× |" in approximate


@pytest.mark.slow
def test_every_part_of_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"GPU_SH_TINY": "1", "GPU_WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(tmp_path / "out")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    log = (tmp_path / "out/log.txt").read_text()
    parts = [line for line in done.stdout.splitlines() if line.startswith("==")]
    assert all("status 0" in line for line in parts), f"{parts}\n{log[-4000:]}"
    assert len(parts) == 10
    checks = json.loads((tmp_path / "out/check.json").read_text())[1:]
    assert all(check["ok"] for check in checks), [check for check in checks if not check["ok"]]
    rows = json.loads((tmp_path / "out/peers.json").read_text())
    failed = {
        (name, program): found["failed"]
        for name, row in rows.items()
        for program, found in row["results"].items()
        if "failed" in found
    }
    assert not {key: why for key, why in failed.items() if "openvino" not in why.lower()}
    assert (tmp_path / "out/samples.png").stat().st_size > 1000
    assert "Same computation" in (tmp_path / "out/peers.md").read_text()
