"""Serve a web page to generate images, train, look at data and compare models in a browser."""

from train.commands.cli import page

if __name__ == "__main__":
    page()
