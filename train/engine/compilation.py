"""torch.compile for the networks that a stage trains."""

from collections.abc import Iterable

import torch
from torch import nn

from ldm.networks.compilation import compile_problem
from train.engine.run import AnyRun


def compile_networks(run: AnyRun, networks: Iterable[nn.Module], *, hooked: bool = False) -> None:
    """Compile networks in place if the run is configured to; their weights keep their names.

    They are compiled when they are first called, for the shapes of that call. Copies such as averages aren't compiled.
    Without a compiler, or if it fails, training continues without compilation. hooked: whether hooks of each step read
    outputs of submodules; then nothing is compiled, because each step would compile again.
    """
    if not run.config.compile:
        return
    problem = "terms read outputs of submodules" if hooked else compile_problem(run.accelerator.device)
    if problem:
        run.print(f"compile True: {problem}; training without it")
        return
    run.print("compiling the networks in the first steps, which can take minutes")
    from torch._functorch import config

    torch._dynamo.config.suppress_errors = True
    config.donated_buffer = False  # the backward pass may run twice, as for stage 1's adaptive weight
    for network in networks:
        network.compile()
