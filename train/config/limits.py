"""Limits of settings: a number beyond any use is refused at once, instead of filling the memory or running forever."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

MOST_STEPS = 10**10
MOST_EXAMPLES = 10**6
"""Largest number of examples, prompts or images in one batch or of one kind."""
MOST_WORKERS = 1024
MOST_LEVELS = 16
MOST_LAYERS = 1000
WIDEST = 2**16
"""Largest number of channels or features of a layer."""
LONGEST_SIDE = 2**14
"""Longest side of an image, in pixels."""
_MOST_PARAMETERS = 20 * 10**9

Count = Annotated[int, Field(gt=0, le=WIDEST)]
"""Number of channels, heads or the like."""
Number = Annotated[int, Field(le=MOST_EXAMPLES)]
"""Number of examples, prompts or images; each command checks its own smallest number."""
Side = Annotated[int, Field(le=LONGEST_SIDE)]
"""Side of an image in pixels; each command checks its own smallest number."""


def _without_nul(path: str) -> str:
    if "\0" in path:
        raise ValueError("contains a NUL character, which no path can")
    return path


PathText = Annotated[str, AfterValidator(_without_nul)]
"""Path of a file or folder, or name of a repository."""


def require_possible(parameters: Iterable[int], fields: str) -> None:
    """Raise ValueError if these numbers of weights add up to more than any network has. fields: settings to lower."""
    if (total := sum(parameters)) > _MOST_PARAMETERS:
        raise ValueError(
            f"{fields}: the network would have about {total / 1e9:,.0f} billion parameters; up to "
            f"{_MOST_PARAMETERS // 10**9} billion are accepted"
        )
