"""The names among which a person chooses. They stand apart from what they name because a command line that only lists them
shouldn't wait for torch; each family is matched in one place, beside its formulas.
"""

from typing import Literal

BetaKind = Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid"]
ScheduleKind = Literal[BetaKind, "flow"]
"""ldm/schedule.py"""
Target = Literal["eps", "x0", "v", "flow"]
"""ldm/parameterization.py"""
VarianceKind = Literal["fixed_small", "fixed_large", "learned"]
"""ldm/process.py"""
ObjectiveKind = Literal["simple", "vlb", "hybrid"]
LossKind = Literal["l2", "l1", "huber"]
"""ldm/objective.py, as the objectives"""
Spacing = Literal["leading", "trailing", "linspace", "karras"]
"""ldm/spacing.py"""
AttentionBackend = Literal["sdpa", "xformers", "auto"]
"""ldm/networks/attention.py"""
