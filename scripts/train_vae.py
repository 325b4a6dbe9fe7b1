"""Train stage 1, the autoencoder, from a configuration: train_vae.py CONFIG.yaml --data DATA --out RUN."""

from train.cli import command, parse
from train.config import VaeConfig
from train.vae import train

if __name__ == "__main__":
    command(lambda: train(parse(VaeConfig)))
