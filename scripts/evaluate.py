"""Measure a trained model on a dataset, and write a report and a sheet of sample images."""

from train.commands.cli import evaluate

if __name__ == "__main__":
    evaluate()
