"""Generate images from prompts with a trained model."""

from train.commands.cli import txt2img

if __name__ == "__main__":
    txt2img()
