"""The samplers, one record each. A new sampler needs a name and a case here, and a new step class if none fits.

Only `make_sampler` imports torch, so that a command line can list the names fast.
"""

from typing import TYPE_CHECKING, Literal, assert_never, get_args

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.steps import Sampler

SamplerKind = Literal[
    "ddpm",
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "unipc_b1",
    "unipc_3",
    "unipc_3_b1",
    "predictor_corrector",
    "lcm",
]


def make_sampler(kind: SamplerKind, eta: float = 0.0) -> "Sampler":
    """Return the record of a sampler. eta is the share of new noise in ddim's steps, 0 to 1.

    Raises UserError for an unknown name, or for an eta with a sampler other than ddim.
    """
    from ldm.spacing import Grid
    from ldm.steps import DDPM, Consistency, Heun, Multistep, PredictorCorrector, Sampler, UniPC

    if kind not in get_args(SamplerKind):
        raise UserError(f"sampler {kind!r}: choose {', '.join(get_args(SamplerKind))}")
    if eta and kind != "ddim":
        raise UserError(f"eta {eta}: can't be used with sampler {kind}; leave it out, or choose ddim")
    euler_grid = Grid(rounded=(), starts_at_sigma=("trailing", "linspace", "karras"))
    dpm_solver_grid = Grid(rounded=("linspace", "karras"), extra_level=True)
    match kind:
        case "ddpm":
            grid = Grid(karras=False)
            return Sampler(lambda _, variance, __: DDPM(variance), grid, draws_noise=True, uses_learned_variance=True)
        case "ddim":
            grid = Grid(karras=False, fixed_stride=True)
            return Sampler(lambda *_: Multistep(1, eta), grid, draws_noise=eta > 0)
        case "euler":
            return Sampler(lambda *_: Multistep(1), euler_grid, draws_noise=False)
        case "euler_ancestral":
            return Sampler(lambda *_: Multistep(1, 1.0), euler_grid, draws_noise=True)
        case "heun":  # integrates the flow's equation if the first level is pure noise
            return Sampler(lambda path, *_: Heun(straight=path.zero_terminal_snr), euler_grid, draws_noise=False)
        case "dpmpp_2m":
            return Sampler(lambda *_: Multistep(2), dpm_solver_grid, draws_noise=False)
        case "dpmpp_2m_sde":
            return Sampler(lambda *_: Multistep(2, 1.0), dpm_solver_grid, draws_noise=True)
        case "unipc":
            return Sampler(lambda *_: UniPC(), dpm_solver_grid, draws_noise=False)
        case "unipc_b1":
            return Sampler(lambda *_: UniPC(b="h"), dpm_solver_grid, draws_noise=False)
        case "unipc_3":
            return Sampler(lambda _, __, n: UniPC(3, steps=n), dpm_solver_grid, draws_noise=False)
        case "unipc_3_b1":
            return Sampler(lambda _, __, n: UniPC(3, "h", n), dpm_solver_grid, draws_noise=False)
        case "predictor_corrector":
            return Sampler(
                lambda _, variance, __: PredictorCorrector(DDPM(variance)),
                Grid(starts_at_sigma=("karras",)),
                draws_noise=True,
                uses_learned_variance=True,
            )
        case "lcm":
            return Sampler(lambda *_: Consistency(), Grid(karras=False, consistency=True), draws_noise=True)
        case _:
            assert_never(kind)
