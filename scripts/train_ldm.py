"""Train stage 2, the latent diffusion model, from a configuration: train_ldm.py CONFIG.yaml --data DATA --out RUN."""

from train.cli import command, parse
from train.config import LdmConfig
from train.ldm import train

if __name__ == "__main__":
    command(lambda: train(parse(LdmConfig)))
