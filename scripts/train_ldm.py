"""Train stage 2, the latent diffusion model, from a configuration: train_ldm.py CONFIG.yaml --data DATA --out RUN."""

from train.commands.main import command
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.stages.ldm import train

if __name__ == "__main__":
    command(lambda: train(parse(LdmConfig)))
