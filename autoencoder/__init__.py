"""Network and losses of stage 1, which maps images to normalised latents, and back."""

from typing import Literal

ReconstructionKind = Literal["l1", "l2", "huber"]
"""Names of the reconstruction errors; autoencoder/losses.py has the formulas."""
AdversarialKind = Literal["hinge", "non_saturating", "saturating"]
"""Names of the adversarial losses; autoencoder/discriminator.py has the formulas."""
Normalisation = Literal["channels", "pixels"]
"""Names of the normalisations of latents; autoencoder/normalisation.py has the formulas."""
