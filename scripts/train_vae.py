"""Train stage 1, the autoencoder, from a configuration: train_vae.py CONFIG.yaml --data DATA --out RUN."""

from train.commands.main import command
from train.config.load import parse
from train.config.vae import VaeConfig


def main() -> None:
    config = parse(VaeConfig)
    from train.stages.vae import train  # slow import

    train(config)


if __name__ == "__main__":
    command(main)
