"""Train stage 2, the latent diffusion model: CONFIG --data DATA --out RUN."""

from train.commands.cli import train_ldm

if __name__ == "__main__":
    train_ldm()
