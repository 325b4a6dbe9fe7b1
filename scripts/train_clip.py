"""Train stage 0, a small CLIP: CONFIG --data DATA --out RUN."""

from train.commands.cli import train_clip

if __name__ == "__main__":
    train_clip()
