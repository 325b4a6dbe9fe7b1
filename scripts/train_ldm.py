"""Train stage 2, the latent diffusion model, from a configuration: train_ldm.py CONFIG.yaml --data DATA --out RUN."""

from train.commands.main import command
from train.config.ldm import LdmConfig
from train.config.load import parse


def main() -> None:
    config = parse(LdmConfig)
    from train.stages.ldm import train  # slow import

    train(config)


if __name__ == "__main__":
    command(main)
