"""Measure an autoencoder on images: the quality of reconstructions, and whether its latents suit a diffusion model."""

from train.commands.cli import evaluate_vae

if __name__ == "__main__":
    evaluate_vae()
