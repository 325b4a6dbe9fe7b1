"""Inspect images and captions before training: write statistics, problems and a contact sheet."""

from train.commands.cli import inspect_data

if __name__ == "__main__":
    inspect_data()
