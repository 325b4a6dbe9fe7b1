"""Compare speed and memory with other programs, in one run on one machine; docs/performance.md shows the tables.

    python benchmarks/peers.py                                         # all rows that this machine can measure
    python benchmarks/peers.py --only sample-1 sample-16 --seconds 150
    python benchmarks/peers.py --openvino-python ENV/bin/python --diffusers CHECKOUT
    python benchmarks/peers.py --table                                 # print the tables of --out again

Each program runs in its own process on the same weights and noise, and the processes take turns. Medians are reported,
with the rate of the machine's matrix products measured just before. Results are written after each row; rows that are
measured again are replaced.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from against import contest, machine, tables
from against.options import Options
from against.rows import rows

from ldm.errors import UserError
from train.commands.main import command
from train.config.load import overlay


@command
def main() -> None:
    o = overlay(Options, Options())
    out = Path(o.out)
    stored = json.loads(out.read_text()) if out.exists() else {}
    if o.table:
        print(tables.markdown(stored))
        return
    if o.threads:
        torch.set_num_threads(o.threads)
    known = rows(o)
    if unknown := [name for name in o.only if name not in known]:
        raise UserError(f"--only {unknown[0]}: choose {', '.join(known)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, make in known.items():
        if o.only and name not in o.only:
            continue
        row = make()
        chosen = [c for c in row.contestants if not any(word in c.name for word in o.without)]
        row = replace(row, contestants=chosen)
        proof = {"losses": row.proof()} if row.proof else {}
        with tempfile.TemporaryDirectory(prefix="peers-") as empty:
            variables = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            variables["TORCHINDUCTOR_CACHE_DIR"] = str(Path(o.caches, name).resolve()) if o.caches else empty
            results = contest.run(row, Path(o.work) / "logs" / name, o.seconds, o.repeats, variables)
        if o.caches:
            keep_first_compilation(results, stored.get(name, {}).get("results", {}))
        stored[name] = {
            "what": row.what,
            "about": machine.about(),
            "GFLOP/s": machine.matrix_rates(),
            "base": row.base,
            "precision": o.precision,
            "results": results,
            **proof,
        }
        out.write_text(json.dumps(stored, indent=1) + "\n")
        print(tables.markdown({name: stored[name]}), flush=True)


def keep_first_compilation(results: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Store the time to compile from the caches as `again`, where an earlier call compiled anew."""
    for name, result in results.items():
        if "compile" in result and "compile" in earlier.get(name, {}):
            result["again"], result["compile"] = result["compile"], earlier[name]["compile"]


if __name__ == "__main__":
    main()
