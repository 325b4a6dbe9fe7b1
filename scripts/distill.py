"""Distil a trained model into a faster one: CONFIG --teacher MODEL --data DATA --out RUN."""

from train.commands.cli import distill

if __name__ == "__main__":
    distill()
