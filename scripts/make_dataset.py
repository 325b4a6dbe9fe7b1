"""Make a data set of captioned pictures that needs no download."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.extras import subcommand_type_from_defaults

from train.cli import command, overlay
from train.data.shapes import write_shapes


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One or two plain objects in a relation, with exact captions (docs: the Shapes set)."""

    out: str = "data/shapes"
    """Folder to make; one that holds this very set is left as it is, any other is refused."""
    size: int = 32
    """Side of the pictures in pixels, at least 32."""
    train: int = 20000
    """Pictures for training."""
    test: int = 1000
    """Pictures for testing, half of them with a (colour, shape) pair that training never shows."""
    seed: int = 0
    """Another seed makes another set."""


def main() -> None:
    kinds = subcommand_type_from_defaults({"shapes": Shapes()})
    o = overlay(kinds, tyro.MISSING)
    written = write_shapes(Path(o.out), o.size, o.train, o.test, o.seed)
    state = "written" if written else "already there, left as it is"
    print(f"{o.out}: {o.train} training and {o.test} test pictures of {o.size} × {o.size}, seed {o.seed}: {state}")


if __name__ == "__main__":
    command(main)
