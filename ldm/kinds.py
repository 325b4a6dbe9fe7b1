"""The names of the options in a configuration.

This module doesn't import torch, so that a command line can list the names fast. One function per family of names
selects the formulas; the string below a family is the file that contains them.
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
"""ldm/objective.py"""
LossKind = Literal["l2", "l1", "huber"]
"""ldm/objective.py"""
Spacing = Literal["leading", "trailing", "linspace", "karras"]
"""ldm/spacing.py"""
AttentionBackend = Literal["sdpa", "xformers", "auto"]
"""ldm/networks/attention.py"""
