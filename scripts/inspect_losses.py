"""Find odd images and wrong captions by the losses of a trained model."""

from train.commands.cli import inspect_losses

if __name__ == "__main__":
    inspect_losses()
