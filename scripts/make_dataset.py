"""Make a dataset of captioned images."""

from train.commands.cli import make_dataset

if __name__ == "__main__":
    make_dataset()
