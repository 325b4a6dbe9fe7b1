"""Train stage 2, the latent diffusion model, from a configuration: train_ldm.py CONFIG.yaml --data DATA --out RUN."""

from train.ldm import train
from train.cli import command, parse
from train.config import LdmConfig

if __name__ == "__main__":
    command(lambda: train(parse(LdmConfig)))
