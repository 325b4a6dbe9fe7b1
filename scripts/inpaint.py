"""Inpaint the masked part of an image, or extend the image beyond its borders; the rest doesn't change."""

from train.commands.cli import inpaint

if __name__ == "__main__":
    inpaint()
