"""The names of the options in a configuration.

This module doesn't import torch, so that a command line can list the names fast. Each family of names is matched in one
place, next to its formulas; the string below a name gives the file.
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
"""ldm/objective.py, for both"""
Spacing = Literal["leading", "trailing", "linspace", "karras"]
"""ldm/spacing.py"""
AttentionBackend = Literal["sdpa", "xformers", "auto"]
"""ldm/networks/attention.py"""
