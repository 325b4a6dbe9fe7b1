"""The names of the options in a configuration.

This module doesn't import torch, so that a command line can list the names fast. One function per family of names
selects the formulas; the string below a family is the file that contains them.
"""

from typing import Literal

BetaKind = Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid"]
ScheduleKind = Literal[BetaKind, "flow"]
"""Noise schedules; formulas: ldm/schedule.py"""
Target = Literal["eps", "x0", "v", "flow"]
"""Prediction targets; formulas: ldm/parameterization.py"""
VarianceKind = Literal["fixed_small", "fixed_large", "learned"]
"""Variances of the reverse process; formulas: ldm/process.py"""
ObjectiveKind = Literal["simple", "vlb", "hybrid"]
"""Training objectives; formulas: ldm/objective.py"""
LossKind = Literal["l2", "l1", "huber"]
"""Losses of the prediction; formulas: ldm/objective.py"""
Spacing = Literal["leading", "trailing", "linspace", "karras"]
"""Spacings of the sampler's steps; formulas: ldm/spacing.py"""
AttentionBackend = Literal["sdpa", "xformers", "auto"]
"""Implementations of attention: ldm/networks/attention.py"""
EngineKind = Literal["auto", "off", "compile", "openvino"]
"""Engines that run the networks in sampling: ldm/networks/compilation.py"""
