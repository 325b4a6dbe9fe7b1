"""Train stage 0, a small CLIP, from a configuration: train_clip.py CONFIG.yaml --data DATA --out RUN."""

from train.commands.main import command
from train.config.clip import ClipConfig
from train.config.load import parse


def main() -> None:
    config = parse(ClipConfig)
    from train.stages.clip import train  # slow import

    train(config)


if __name__ == "__main__":
    command(main)
