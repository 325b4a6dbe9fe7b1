"""Measure a record of training on Shapes: how many steps and CPU seconds a recipe needs until its images are right.

    python benchmarks/speedrun.py --name muon --steps 1800                       # train, measure, and time the step
    python benchmarks/speedrun.py --name next --steps 1200 --settings="--optimizer.lr 3e-3" \\
        --before benchmarks/records/muon/record.json --checkout ../at-its-commit
    python benchmarks/speedrun.py --table                                        # the table of docs/RECORDS.md

docs/RECORDS.md has the rules. Each seed is a run of its own, so that an interrupted measurement continues. With
--choosing, other prompts are used and no record is written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

from tracks import demo, peer, stage1, stage2
from tracks.options import Options
from tracks.records import Measured, read_record, store, table

from ldm.errors import UserError
from train.commands.main import command
from train.config.load import overlay


@command
def main() -> None:
    o = overlay(Options, Options())
    if o.table:
        print(table(Path(o.records)))
        return
    check(o)
    before = read_record(Path(o.before), "stage-2" if o.track == "peer" else o.track) if o.before else None
    measured = measure(o, before)
    print(json.dumps({key: value for key, value in measured.record.items() if key != "machine"}, indent=2))
    if not o.choosing:
        print(f"{'a record' if measured.record['valid'] else 'not a record'}: {store(o, measured)}")


def check(o: Options) -> None:
    """Raise UserError for options that name nothing to measure."""
    if not o.name.replace("-", "").isalnum():
        raise UserError(f"--name {o.name!r}: must be letters, digits and -")
    if o.steps < 1 and o.track != "demo":
        raise UserError(f"--steps {o.steps}: must be at least 1")
    if min(o.prompts, o.images, o.calls, o.turns, o.jobs, len(o.seeds)) < 1:
        raise UserError("--prompts, --images, --calls, --turns, --jobs: must be at least 1, and --seeds must name one")


def measure(o: Options, before: Mapping[str, Any] | None) -> Measured:
    """Measure a record of the track. before: the record before."""
    match o.track:
        case "stage-2":
            return stage2.measure(o, before)
        case "stage-1":
            return stage1.measure(o, before)
        case "demo":
            return demo.measure(o, before)
        case "peer":
            return peer.measure(o, before)
        case _:
            assert_never(o.track)


if __name__ == "__main__":
    main()
