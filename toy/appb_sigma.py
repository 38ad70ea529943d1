"""python -m toy.appb_sigma

Appendix B: the exact and the approximate (linear) σ_γ: how far apart they are, which one is right, what it changes.

Right depends on how the ends of a sub-path are coupled: the exact form assumes that x_t was made from x_s by fresh
noise (Markov chain, Eq. 20), and training makes x_s from x_t by DDIM.
"""

import functools
import math

import torch
from PIL import Image
from torch import Tensor

from data import program
from splam import SIGMA_FORMS, Denoiser, Schedule, multiple_estimation, sub_path_point
from toy import plots
from toy.laboratory import Bench, Findings, Laboratory, Variant


@torch.no_grad()
def markov_estimation(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """x_s as the Markov chain has it, given x_t and the teacher's x_0: `multiple_estimation` with DDPM's ancestral
    steps in the place of DDIM's, so with fresh noise in each.

    Each step draws x at t_next from its distribution given x_t and x_0. Its noise is no longer that of x_t, and the
    ends of a sub-path are coupled as Eq. 20 says, as far as x̂_0 is right.
    """
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


def relative_error(schedule: Schedule, t: int, k: int) -> Tensor:
    """Eq. 25, σ approx - σ exact, divided by σ exact; for each of GAMMAS."""
    x, times = torch.zeros(len(GAMMAS), 1), torch.full(GAMMAS.shape, t)  # σ_γ does not depend on x
    approx, exact = (sub_path_point(x, x, times, times - k, GAMMAS, schedule, "sl", s).sigma[:, 0] for s in SIGMA_FORMS)
    return approx / exact - 1


def inconsistency(bench: Bench, coupling: str, sigma: str, t: int, k: int, solver_step: int) -> list[float]:
    """By γ, the RMS of F(x_γ) - F(x_s) for the F that cannot be improved, the PF-ODE's own map: what is left of Eq. 17.

    F knows x_γ by α_γ and σ_γ: a wrong σ_γ starts the PF-ODE at a wrong time. The sub-paths go from t to t - k; with
    the coupling "DDIM" their ends are computed in steps of `solver_step`.
    """
    model, schedule, generator = bench.model, bench.model.schedule, torch.Generator().manual_seed(0)
    x0 = bench.reference[: len(bench.seeds)].to(model.device)
    time = torch.full((len(x0),), t, device=model.device)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(time, 2), schedule.at(time - k, 2)
    at_t, at_s, between = (torch.randn(x0.shape, generator=generator).to(x0) for _ in range(3))
    if coupling == "Markov":
        r, x_s = alpha_t / alpha_s, alpha_s * x0 + sigma_s * at_s
        x_t = r * x_s + (1 - r**2).sqrt() * between  # Eq. 20
    else:
        x_t, denoise = alpha_t * x0 + sigma_t * at_t, functools.partial(model.predict, cond={})
        x_s = multiple_estimation(denoise, schedule, x_t, time, time - k, k, solver_step)
    end, left = model.mixture.endpoint(x_s, alpha_s[:1], sigma_s[:1]), []
    for gamma in GAMMAS[1:].to(x0):  # at γ = 0, x_γ is r x_s, which F maps as it maps x_s: nothing is left
        point = sub_path_point(x_t, x_s, time, time - k, gamma.expand(len(x0)), schedule, "sl", sigma)
        f = model.mixture.endpoint(point.x, point.alpha[:1], point.sigma[:1])
        left.append((f - end).square().sum(1).mean().sqrt().item())
    return left


def picture(found: Findings) -> Image.Image:
    """Eq. 25; `inconsistency` where the teacher is a mixture, whose map is known; and the trained students."""
    model, left = found.bench.model, {}
    sub_paths = [(t, k) for t in (999, 599, 199) for k in (20, 100)]
    lines = {f"t = {t}, k = {k}": (GAMMAS, relative_error(model.schedule, t, k), None) for t, k in sub_paths}
    panels = [plots.Panel("(approx σ - exact σ) / exact σ, Eq. 25", "γ", "", lines, yscale="linear")]
    if len(model.shape) == 1:
        couplings = {"DDIM, 1 step": ("DDIM", 100), "DDIM, 5 steps": ("DDIM", 20), "Markov": ("Markov", 100)}
        for name, (coupling, solver_step) in couplings.items():
            for sigma in SIGMA_FORMS:
                values = inconsistency(found.bench, coupling, sigma, 599, 100, solver_step)
                print(f"the ideal map leaves at most {max(values):.2g}: {name}, {sigma} σ")
                left[f"{name}, {sigma} σ"] = (GAMMAS[1:], values, None)
        panels.append(plots.Panel("what the ideal map leaves of Eq. 17, t = 599, k = 100", "γ", "RMS", left))
    return plots.below(plots.curves(*panels), plots.dots(found.summary(), ["map error"]))


@program
def main() -> None:
    Laboratory(__file__, __doc__).report(VARIANTS, picture)


if __name__ == "__main__":
    main()
