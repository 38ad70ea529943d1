"""What this project found to help and the paper does not have. Each part takes the place of one of splam.py's.

    time           ToldTheTime    for SubPathStudent: the network is told a time t' instead of γ
    half           half_at_one    for draw: half of the γ are 1
    second_order   second_order   for multiple_estimation: one step of second order instead of several of first order

`distill.py --improved` puts in all three, `--improved time` one of them. experiments/README.md has what each is worth.

At the end StraightPath, the noise schedule of flow matching: a first step beyond the teachers of the paper.
"""

import math

import torch
from torch import Tensor

from splam import ConsistencyFunction, Denoiser, Draws, Schedule, draw


def time_at(schedule: Schedule, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The real-valued time t' (B,) at which the process has the noise-to-signal ratio ρ = σ/α of (B, 1, ...) tensors.

    Between integer times it is linear in log ρ, which runs more evenly with time than ρ itself (0.03 to 15 with Stable
    Diffusion's schedule), so that the interpolation is accurate everywhere.
    """
    signal, noise = schedule.at(torch.arange(len(schedule), device=alpha.device), 1)
    table = (noise / signal.clamp_min(1e-20)).log()  # α may be 0 at t = N-1
    log_ratio = (sigma / alpha.clamp_min(1e-20)).log().flatten().clamp(table[0], table[-1])
    after = torch.searchsorted(table, log_ratio).clamp_min(1)
    before = after - 1
    return before + (log_ratio - table[before]) / (table[after] - table[before])


class ToldTheTime(ConsistencyFunction):
    """The network is told the time t' that has the noise-to-signal ratio of x_γ, instead of an embedding of γ.

    Why it helps: x_γ, scaled to α² + σ² = 1, has the signal and the noise of the diffusion process at t'. The teacher's
    weights know what to do there, so nothing new must be learnt and training is much faster.

    What it costs: a bias. (t, γ) names one sub-path and t' forgets which: if k exceeds the spacing of the starts,
    several pass through each t' and ask for different things there, and a student that has converged is too blurred
    (docs/equations.md, note 16). It needs the linear σ, since a wrong σ_γ is a wrong t'. It needs a network that takes
    times between the integers.
    """

    def tell(self, gamma: Tensor, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """x scaled to α² + σ² = 1, its time t', and its signal and noise after scaling."""
        scale = (alpha**2 + sigma**2).rsqrt()
        return x * scale, time_at(self.schedule, alpha, sigma), alpha * scale, sigma * scale


def half_at_one(x0: Tensor, num_train_timesteps: int, num_ddim_timesteps: int, generator: torch.Generator) -> Draws:
    """splam.draw with half of the γ at 1.

    Why it helps: sampling happens at γ = 1, and uniform draws come near it rarely. It is also where the student is
    asked farthest from its target. What it costs: the easy tasks near γ = 0, which prepare the hard ones, come half as
    often.
    """
    draws = draw(x0, num_train_timesteps, num_ddim_timesteps, generator)
    return draws._replace(gamma=(2 * draws.gamma).clamp_max(1))


@torch.no_grad()
def second_order(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """x̂_s from x_t by k / `solver_step` steps of DPM-Solver++(2S), two calls of the teacher each.

    Why it helps: with k = 100 a single such step costs two calls instead of five, so that a run of the same cost has
    more training steps. What it costs: over the whole way five DDIM steps are more accurate (note 17), which a long run
    will show; and where α is 0 at t = N-1, the sub-path from there is infinitely long in λ = log(α/σ) and gains
    nothing.

    How it works: divided by σ instead of α, the PF-ODE is d(x/σ) = x_0 d(α/σ), and DDIM, Euler's method for it, takes
    x_0 at the start of the step for constant. x_0 in the middle is a better constant. So a DDIM step goes half of the
    way in λ, the teacher is asked there, and a second DDIM step goes the whole way with that x_0.
    """

    def lam(time: Tensor) -> Tensor:
        alpha, sigma = schedule.at(time, x.ndim)
        return (alpha.clamp_min(1e-20) / sigma).log()  # λ; α may be 0 at t = N-1

    for _ in range(math.ceil(k / solver_step)):
        t_next = torch.maximum(t - solver_step, s)
        (alpha_t, sigma_t), (alpha, sigma) = schedule.at(t, x.ndim), schedule.at(t_next, x.ndim)
        # Teachers know integer times only, so the second call is near the middle and not at it, and at least one time
        # away from the start.
        middle = time_at(schedule, (alpha_t * alpha).sqrt(), (sigma_t * sigma).sqrt()).round().long()
        middle = torch.maximum(torch.minimum(middle, t - 1), t_next)
        x0, eps = denoise(x, t)
        alpha_m, sigma_m = schedule.at(middle, x.ndim)
        x0_m, _ = denoise(alpha_m * x0 + sigma_m * eps, middle)
        # A line through both values of x_0 is read at the true middle.
        begin, end = lam(t), lam(t_next)
        x0 = x0 + (x0_m - x0) * (end - begin) / (2 * (lam(middle) - begin))
        # DDIM with that x_0, and the ε that belongs to it at the step's start. What is at s already stays there: for
        # it the line above is 0/0.
        moved = alpha * x0 + sigma * (x - alpha_t * x0) / sigma_t
        x, t = torch.where((t_next < t).view(alpha.shape), moved, x), t_next
    return x


class StraightPath(Schedule):
    """The path of flow matching, x_t = (1 - σ) x_0 + σ ε with σ from 1/N to 1, in the place of the paper's.

    What it is: with z = x/α and ρ = σ/α the ODE is dz/dρ = ε here too, DDIM is Euler's method in σ, and both lines
    and both σ_γ stay as they are, once 1 - r² is written without α² + σ² = 1 (docs/equations.md, note 18).

    What changes: α + σ = 1 holds on the DL line and not on the SL line, so here DL is the natural one. At
    t = N-1 α is 0, so that r is 0 and all points of an SL line are γ x_t: they do not tell where it ends.
    """

    def __init__(self, times: int):
        self.sigma = torch.arange(1, times + 1) / times
        self.alpha = 1 - self.sigma


# What each name of --improved puts in the place of which part of the method.
PARTS = {"time": {"student": ToldTheTime}, "half": {"draw": half_at_one}, "second_order": {"solver": second_order}}
