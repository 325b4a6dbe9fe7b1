"""Train stage 1, the autoencoder, from a configuration: train_vae.py CONFIG.yaml --data DATA --out RUN."""

from train.vae import train
from train.cli import command, parse
from train.config import VaeConfig

if __name__ == "__main__":
    command(lambda: train(parse(VaeConfig)))
