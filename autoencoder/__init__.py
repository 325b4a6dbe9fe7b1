"""Stage 1's network and losses: pictures to latents of mean 0 and variance 1, and back."""
