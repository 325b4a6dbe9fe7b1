"""Generate images that start from given images."""

from train.commands.cli import img2img

if __name__ == "__main__":
    img2img()
