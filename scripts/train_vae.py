"""Train stage 1, the autoencoder: CONFIG --data DATA --out RUN."""

from train.commands.cli import train_vae

if __name__ == "__main__":
    train_vae()
