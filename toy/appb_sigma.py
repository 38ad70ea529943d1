"""python -m toy.appb_sigma

Appendix B: the exact and the approximate (linear) σ_γ: how far apart they are, which one is right, what it changes.

Right depends on how the ends of a sub-path are coupled: the exact form assumes that x_t was made from x_s by fresh
noise (Markov chain, Eq. 20), and training makes x_s from x_t by DDIM.
"""

import functools
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from data import program
from splam import SIGMA_FORMS, Denoiser, Schedule, SubPathPoint, multiple_estimation, sub_path_point
from toy import plots
from toy.laboratory import Bench, Findings, Laboratory, Variant


@torch.no_grad()
def markov_estimation(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """x_s as the Markov chain has it, given x_t and the teacher's x_0: `multiple_estimation` with DDPM's ancestral
    steps in the place of DDIM's, so with fresh noise in each."""
    for _ in range(math.ceil(k / solver_step)):
        t_next = torch.maximum(t - solver_step, s)
        x0, eps = denoise(x, t)
        (alpha_t, sigma_t), (alpha, sigma) = schedule.at(t, x.ndim), schedule.at(t_next, x.ndim)
        fresh = sigma / sigma_t * (1 - (alpha_t / alpha) ** 2).clamp_min(0).sqrt()  # the posterior's deviation
        x = alpha * x0 + (sigma**2 - fresh**2).clamp_min(0).sqrt() * eps + fresh * torch.randn_like(x)
        t = t_next
    return x


COUPLINGS = {"DDIM": multiple_estimation, "Markov": markov_estimation}
CONDITIONINGS = {"": "--gamma_conditioning embedding", ", t'": "--gamma_conditioning time"}
VARIANTS = {
    f"{coupling}, {sigma} σ{name}": Variant(f"--sigma {sigma} {flags}", parts={"solver": solver})
    for coupling, solver in COUPLINGS.items()
    for sigma in SIGMA_FORMS
    for name, flags in CONDITIONINGS.items()
}
GAMMAS = torch.linspace(0, 1, 11)


def of_gamma(lines: dict[str, Sequence[float]]) -> dict:
    """Lines of a plots.Panel over the last of GAMMAS."""
    return {name: (GAMMAS[-len(values) :], values, None) for name, values in lines.items()}


def points(schedule: Schedule, t: int, k: int, gammas: Tensor, sigma: str, x_t: Tensor, x_s: Tensor) -> SubPathPoint:
    """`sub_path_point` on one sub-path, for many γ."""
    times = torch.full_like(gammas, t, dtype=torch.long)
    return sub_path_point(x_t, x_s, times, times - k, gammas, schedule, "sl", sigma)


def relative_error(schedule: Schedule, t: int, k: int, gammas: Tensor) -> Tensor:
    """Eq. 25, σ approx - σ exact, divided by σ exact."""
    zero = torch.zeros(len(gammas), 1)
    approx, exact = (points(schedule, t, k, gammas, s, zero, zero).sigma[:, 0] for s in SIGMA_FORMS)
    return approx / exact - 1


def inconsistency(bench: Bench, coupling: str, sigma: str, t: int, k: int, solver_step: int) -> list[float]:
    """By γ, the RMS of F(x_γ) - F(x_s) for the F that cannot be improved, the PF-ODE's own map: what is left of Eq. 17.

    F knows x_γ by α_γ and σ_γ: a wrong σ_γ starts the PF-ODE at a wrong time.
    """
    model, schedule, generator = bench.model, bench.model.schedule, torch.Generator().manual_seed(0)
    x0 = bench.reference[: len(bench.seeds)]
    time = torch.full((len(x0),), t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(time, 2), schedule.at(time - k, 2)
    x_t = alpha_t * x0 + sigma_t * torch.randn(x0.shape, generator=generator)
    x_s = alpha_s * x0 + sigma_s * torch.randn(x0.shape, generator=generator)
    if coupling == "Markov":
        r = alpha_t / alpha_s
        x_t = r * x_s + (1 - r**2).sqrt() * torch.randn(x0.shape, generator=generator)  # Eq. 20
    else:
        x_s = multiple_estimation(
            functools.partial(model.predict, cond={}), schedule, x_t, time, time - k, k, solver_step
        )
    end = model.mixture.endpoint(x_s, alpha_s[:1], sigma_s[:1])
    left = []
    for gamma in GAMMAS[1:]:  # at γ = 0 nothing is left
        point = points(schedule, t, k, gamma.expand(len(x0)), sigma, x_t, x_s)
        f = model.mixture.endpoint(point.x, point.alpha[:1], point.sigma[:1])
        left.append((f - end).square().sum(1).mean().sqrt().item())
    return left


def picture(found: Findings, bench: Bench) -> Image.Image:
    """Eq. 25; `inconsistency` where the teacher is a mixture, whose map is known; and the trained students."""
    schedule = bench.model.schedule
    lines = {f"t = {t}, k = {k}": relative_error(schedule, t, k, GAMMAS) for t in (999, 599, 199) for k in (20, 100)}
    panels = [plots.Panel("(approx σ - exact σ) / exact σ, Eq. 25", "γ", "", of_gamma(lines), yscale="linear")]
    if len(bench.model.shape) == 1:
        couplings = {"DDIM, 1 step": ("DDIM", 100), "DDIM, 5 steps": ("DDIM", 20), "Markov": ("Markov", 100)}
        left = {
            f"{name}, {sigma} σ": inconsistency(bench, coupling, sigma, 599, 100, solver_step)
            for name, (coupling, solver_step) in couplings.items()
            for sigma in SIGMA_FORMS
        }
        title = "what the ideal map leaves of Eq. 17, t = 599, k = 100"
        panels.append(plots.Panel(title, "γ", "RMS", of_gamma(left)))
        for name, values in left.items():
            print(f"the ideal map leaves at most {max(values):.2g}: {name}")
    trained = plots.dots({"map error": {name: found.last(name, "map error") for name in found.rows}})
    return plots.below(plots.curves(*panels), trained)


@program
def main() -> None:
    laboratory = Laboratory(__file__, __doc__)
    laboratory.report(VARIANTS, lambda found: picture(found, laboratory.bench()))


if __name__ == "__main__":
    main()
