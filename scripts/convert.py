"""Convert between a diffusers folder and a single safetensors file with the original key names."""

from train.commands.cli import convert

if __name__ == "__main__":
    convert()
