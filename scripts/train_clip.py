"""Train stage 0, a small CLIP, from a configuration: train_clip.py CONFIG.yaml --data DATA --out RUN."""

from train.cli import command, parse
from train.clip import train
from train.config import ClipConfig

if __name__ == "__main__":
    command(lambda: train(parse(ClipConfig)))
