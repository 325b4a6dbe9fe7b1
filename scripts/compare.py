"""Write one HTML report of one or several evaluated models."""

from train.commands.cli import compare

if __name__ == "__main__":
    compare()
