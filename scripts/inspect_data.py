"""Inspect images and captions before training: write statistics, problems and a contact sheet."""

import sys
from io import TextIOWrapper
from pathlib import Path

from train.commands.main import command
from train.config.load import overlay
from train.config.reports import InspectOptions


def main() -> None:
    o = overlay(InspectOptions, InspectOptions())
    from train.commands.inspect import inspect  # slow import
    from train.commands.inspect_report import describe

    report = inspect(o)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters of the captions
    print(describe(report))
    print(f"\nwritten to {o.out}: {', '.join(sorted(path.name for path in Path(o.out).iterdir()))}")


if __name__ == "__main__":
    command(main)
