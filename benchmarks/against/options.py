"""The options of `peers.py`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare speed and memory with diffusers and OpenVINO, in one run on one machine."""

    only: tuple[str, ...] = ()
    """Rows to measure; none: all."""
    seconds: float = 240
    """Time limit per row. When it is over, the turns made so far are reported."""
    repeats: int = 7
    """Turns per program and row."""
    precision: str = "bf16"
    """fp32, bf16 or fp16."""
    threads: int = 0
    """CPU threads of each program; 0: torch's default."""
    without: tuple[str, ...] = ()
    """Programs to leave out: those whose name contains one of these."""
    model: str = ""
    """Folder of a model of the demo's shape to sample from; empty: random weights."""
    openvino_python: str = ""
    """Python of an environment with optimum-intel; empty: OpenVINO by optimum isn't measured."""
    diffusers: str = ""
    """Checkout of diffusers whose training script is run as shipped; empty: it isn't measured."""
    caches: str = ""
    """Folder for compiled code, kept for later calls; empty: everything is compiled anew.
    With a folder of an earlier call, the time of compiling anew stays in the results, and the new time is added."""
    size: int = 0
    """Size of Stable Diffusion 1.5's images; 0: 512 on a GPU, 256 on a CPU."""
    work: str = "runs/peers"
    """Folder for models with random weights, logs and caches."""
    out: str = "runs/peers/results.json"
    """File of the results."""
    table: bool = False
    """Print the tables of --out and measure nothing."""
    tiny: bool = False
    """Measure tiny networks, to test this program."""
