"""The paper's mathematics, held against oracles this project did not write.

These are diffusers' DDIM and LCM schedulers, scipy's ODE solver, and the paper's own formulas in float64, computed
here from ᾱ. Read it beside the paper and `splam.py`, whose notation it uses.
"""

import copy
import functools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import unet
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverSinglestepScheduler, LCMScheduler, TCDScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

import splam
from splam import SOLVERS, ConsistencyFunction, Schedule, SubPathPoint, multiple_estimation, splad_loss, sub_path_point
from toy.distributions import DISTRIBUTIONS, GaussianMixture
from toy.mlp import PointMLP

ODES, SIGMAS, PREDICTION_TYPES = ["sl", "dl"], ["approx", "exact"], ["epsilon", "v_prediction", "sample"]
each_ode = pytest.mark.parametrize("ode", ODES)
each_sigma = pytest.mark.parametrize("sigma", SIGMAS)
each_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
each_conditioning = pytest.mark.parametrize("conditioning", ["embedding", "time"])

# Stable Diffusion's schedule, and three of its sub-paths (t, s): clean, middle, noisy.
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SD = Schedule(DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod)
SD_PATHS = [(19, 0), (499, 399), (999, 899)]


def close(actual, expected, tol=1e-5):
    """Each row of a batch is right to `tol` of its largest element."""
    assert actual.shape == expected.shape
    actual, expected = (a.detach().double().reshape(len(a), -1) for a in (actual, expected))
    error, size = (actual - expected).abs().amax(1), expected.abs().amax(1)
    assert (error <= tol * size).all(), f"relative error {(error / size).max():.3g}"


def rows(values, x):
    """(B,) -> (B, 1, ...), to multiply x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# -- random cases -----------------------------------------------------------------------------------------------------

noise_schedules = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.integers(50, 1000),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    }
)
seeds = st.integers(0, 2**32 - 1)
gammas = seeds.map(lambda seed: torch.rand(8, generator=seeded(seed)))


@functools.lru_cache
def alphas_cumprod(num_train_timesteps, beta_schedule):
    return DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule).alphas_cumprod


class SubPaths(NamedTuple):
    """A batch of sub-paths; `schedule` is what is tested, `abar` its ᾱ in float64, from which the tests compute."""

    schedule: Schedule
    abar: torch.Tensor
    k: int
    t: torch.Tensor
    s: torch.Tensor
    gamma: torch.Tensor
    x0: torch.Tensor
    eps: torch.Tensor

    def at(self, t):
        """(α_t, σ_t) in float64."""
        return rows(self.abar[t].sqrt(), self.x0), rows((1 - self.abar[t]).sqrt(), self.x0)

    def noised(self, t):
        """Eq. 1."""
        alpha, sigma = self.at(t)
        return alpha * self.x0 + sigma * self.eps

    def point(self, ode, sigma, gamma=None, x_t=None, x_s=None):
        x_t, x_s = self.noised(self.t) if x_t is None else x_t, self.noised(self.s) if x_s is None else x_s
        gamma = self.gamma if gamma is None else torch.full_like(self.gamma, gamma)
        return sub_path_point(x_t, x_s, self.t, self.s, gamma, self.schedule, ode, sigma)


@st.composite
def sub_paths(draw, shapes=((6, 2), (3, 3, 4, 4))):
    abar = alphas_cumprod(**draw(noise_schedules))
    g, shape, k = seeded(draw(seeds)), draw(st.sampled_from(shapes)), draw(st.integers(1, len(abar) - 1))
    t = torch.randint(1, len(abar), shape[:1], generator=g)
    gamma = torch.rand(shape[0], generator=g)
    x0, eps = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return SubPaths(Schedule(abar), abar.double(), k, t, (t - k).clamp_min(0), gamma, x0, eps)


def true_denoiser(case):
    """A teacher that knows x_0 and ε."""
    return lambda x, t: (case.x0, case.eps)


# -- Section 3: schedule, denoiser, ODE solver ------------------------------------------------------------------------


@given(sub_paths())
def test_schedule_is_the_square_root_of_alphas_cumprod(case):
    alpha, sigma = case.schedule.at(case.t, case.x0.ndim)
    assert alpha.dtype == sigma.dtype == torch.float32
    close(alpha, case.at(case.t)[0], 1e-7)
    close(sigma, case.at(case.t)[1], 1e-7)


@given(noise_schedules, st.floats(0.01, 100))
def test_time_at_inverts_the_schedule_at_any_scale(kind, scale):
    """Only σ/α counts: x and c·x are at the same time."""
    schedule = Schedule(alphas_cumprod(**kind))
    time = schedule.time_at(scale * schedule.alpha, scale * schedule.sigma)
    torch.testing.assert_close(time, torch.arange(len(schedule)).float(), atol=1e-3, rtol=0)


@given(sub_paths())
@each_ode
def test_time_at_falls_from_t_to_s_along_a_sub_path(ode, case):
    times = torch.stack(
        [case.schedule.time_at(*case.point(ode, "approx", gamma)[1:]) for gamma in torch.linspace(0, 1, 9).tolist()]
    )
    torch.testing.assert_close(times[0], case.s.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(times[-1], case.t.float(), atol=1e-3, rtol=0)
    assert (times.diff(dim=0) > 0).all()


@given(st.floats(0.05, 1), st.floats(0.05, 1), seeds)
@each_prediction_type
def test_to_x0_eps_inverts_each_prediction_type(prediction_type, alpha, sigma, seed):
    """Also where α² + σ² ≠ 1, as it is inside a sub-path; v is defined as α ε - σ x_0."""
    x0, eps = torch.randn(2, 5, 2, generator=seeded(seed), dtype=torch.float64)
    output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction_type]
    found = splam.to_x0_eps(output, alpha * x0 + sigma * eps, alpha, sigma, prediction_type)
    torch.testing.assert_close(found, (x0, eps), rtol=1e-9, atol=1e-9)


def test_to_x0_eps_refuses_an_unknown_prediction_type():
    with pytest.raises(ValueError, match="flow"):
        splam.to_x0_eps(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1), torch.ones(1, 1), "flow")


@given(st.floats(-1, 15), seeds)
def test_guidance_w_is_guidance_scale_less_one(w, seed):
    """Eq. 18 against what diffusers' pipelines compute, uncond + guidance_scale (cond - uncond)."""
    cond, uncond = torch.randn(2, 3, 2, generator=seeded(seed), dtype=torch.float64)
    torch.testing.assert_close(splam.guided(cond, uncond, w), uncond + (w + 1) * (cond - uncond))
    assert torch.equal(splam.guided(cond, uncond, 0), cond)


@given(sub_paths(), st.data())
@each_prediction_type
def test_one_solver_step_is_one_step_of_ddim(prediction_type, case, data):
    """With its x_0, for each prediction type. Where t - k < 0, DDIM ends at time 0, as s does."""
    n = len(case.schedule)
    oracle = DDIMScheduler(n, clip_sample=False, prediction_type=prediction_type)
    oracle.alphas_cumprod, oracle.final_alpha_cumprod = case.abar, case.abar[0]
    oracle.set_timesteps(data.draw(st.integers(1, n)))
    k = n // oracle.num_inference_steps  # the length of a step of DDIMScheduler
    x_t, output = case.noised(case.t), torch.randn(case.x0.shape, generator=seeded(0), dtype=torch.float64)

    def denoise(x, t):
        return splam.to_x0_eps(output, x, *case.schedule.at(t, x.ndim), prediction_type)

    steps = [oracle.step(o, t, x) for o, t, x in zip(output, case.t.tolist(), x_t, strict=True)]
    x_s = multiple_estimation(denoise, case.schedule, x_t, case.t, (case.t - k).clamp_min(0), k, k)
    close(x_s, torch.stack([step.prev_sample for step in steps]))
    close(denoise(x_t, case.t)[0], torch.stack([step.pred_original_sample for step in steps]))


@given(sub_paths(), st.integers(1, 1000))
def test_solver_arrives_at_s_whatever_its_step(case, solver_step):
    """With the true ε every DDIM step is exact, so nothing but the time of arrival shows; t < k is cut off at 0."""
    x_s = multiple_estimation(
        true_denoiser(case), case.schedule, case.noised(case.t), case.t, case.s, case.k, min(solver_step, case.k)
    )
    close(x_s, case.noised(case.s))


MIXTURE = DISTRIBUTIONS["8gaussians"]


def mixture_denoiser(x, t):
    alpha, sigma = (c.double() for c in SD.at(t, x.ndim))
    eps = MIXTURE.eps(x, alpha, sigma)
    return (x - sigma * eps) / alpha, eps


def solve(x_t, t, s, k, solver_step, solver="ddim"):
    t, s = (torch.full((len(x_t),), time) for time in (t, s))
    return SOLVERS[solver](mixture_denoiser, SD, x_t, t, s, k, solver_step)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sub_path_cut_off_at_time_0_is_the_shorter_one(solver):
    x_t = torch.randn(16, 2, generator=seeded(0), dtype=torch.float64)
    short = solve(x_t, 35, 0, 40, 10, solver)
    close(solve(x_t, 35, 0, 100, 10, solver), short)
    # In a batch with a longer one, which is not finished when the shorter one is.
    both = SOLVERS[solver](
        mixture_denoiser, SD, x_t, torch.tensor([35, 135]).repeat(8), torch.zeros(16).long(), 140, 10
    )
    close(both[::2], short[::2])
    close(both[1::2], solve(x_t, 135, 0, 140, 10, solver)[1::2])


def flow(x_t, t, s):
    """x_s on the PF-ODE. Eq. 3 in z = x/α and ρ = σ/α is dz/dρ = ε; scipy solves that for a mixture."""
    rho_t, rho_s = ((SD.sigma[time].double() / SD.alpha[time].double()).item() for time in (t, s))

    def velocity(rho, z):
        alpha = torch.tensor([[1 / math.sqrt(1 + rho**2)]], dtype=torch.float64)
        return MIXTURE.eps(alpha * torch.from_numpy(z).view(-1, 2), alpha, rho * alpha).flatten().numpy()

    alpha_t, alpha_s = SD.alpha[t].double(), SD.alpha[s].double()
    z = solve_ivp(velocity, (rho_t, rho_s), (x_t / alpha_t).flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-10)
    return alpha_s * torch.from_numpy(z.y[:, -1]).view(-1, 2)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpmsolver++", 2)])
@pytest.mark.parametrize("t, s", [(999, 743), (650, 394), (300, 44)])
def test_solvers_converge_to_the_probability_flow_with_their_order(t, s, solver, order):
    x_t = torch.randn(16, 2, generator=seeded(t), dtype=torch.float64)
    truth = flow(x_t, t, s)
    steps = [16, 8, 4, 2]  # a step of one time has no middle
    errors = [(solve(x_t, t, s, t - s, step, solver) - truth).square().mean().sqrt().item() for step in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.06), errors
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("t, s", [(999, 899), (599, 499), (199, 99), (19, 0), (2, 1), (1, 0)])
def test_a_second_order_step_is_that_of_diffusers(t, s):
    """Its solver is told our middle, which it would choose from a grid of its own, and that both steps count."""
    called = []

    def denoise(x, times):
        called.append(times[0].item())
        return mixture_denoiser(x, times)

    x = torch.randn(16, 2, generator=seeded(t), dtype=torch.float64)
    time, end = torch.full((16,), t), torch.full((16,), s)
    ours = SOLVERS["dpmsolver++"](denoise, SD, x, time, end, t - s, t - s)
    middle = called[1]
    assert called == [t, middle] and s <= middle < t
    theirs = DPMSolverSinglestepScheduler(**STABLE_DIFFUSION, algorithm_type="dpmsolver++", prediction_type="sample")
    theirs.set_timesteps(timesteps=[t, middle, s])
    theirs.order_list, theirs.model_outputs = [1, 2, 1], [None, None]
    sample = x
    for step in (t, middle):
        x0, _ = mixture_denoiser(sample, torch.full((16,), step))
        sample = theirs.step(x0, step, sample).prev_sample
    close(ours, sample)


def test_a_second_order_step_begins_where_no_signal_is_left():
    """Zero terminal SNR: there log(α/σ) is minus infinity, and nothing may become nan of it."""
    schedule = Schedule(DDPMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod)

    def denoise(x, t):
        x0 = 0.5 * torch.ones_like(x)  # data of one point
        alpha, sigma = schedule.at(t, x.ndim)
        return x0, (x - alpha * x0) / sigma

    x_t, t = torch.randn(16, 2, generator=seeded(0)), torch.full((16,), 999)
    alpha, sigma = schedule.at(t - 100, 2)
    x_s = SOLVERS["dpmsolver++"](denoise, schedule, x_t, t, t - 100, 100, 100)
    close(x_s, alpha * 0.5 + sigma * x_t)


@pytest.mark.parametrize("t", [999, 599, 199])
def test_one_second_order_step_is_more_accurate_than_five_of_ddim(t):
    x_t = SD.alpha[t] * MIXTURE.sample(64, seeded(1))[0] + SD.sigma[t] * torch.randn(64, 2, generator=seeded(t))
    truth = flow(x_t.double(), t, t - 100)
    second, first = (
        (solve(x_t.double(), t, t - 100, 100, step, solver) - truth).square().mean()
        for solver, step in (("dpmsolver++", 100), ("ddim", 20))
    )
    assert second < first / 1.5


# -- Section 4.2.1, appendices B and C: the line between the ends of a sub-path ---------------------------------------


@given(sub_paths())
@each_sigma
@each_ode
def test_ends_of_the_line(ode, sigma, case):
    """γ = 1 is x_t with its own schedule; γ = 0 is x_s with its own, times the drift ratio for SL."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = case.at(case.t), case.at(case.s)
    drift = 1 if ode == "dl" else alpha_t / alpha_s
    start, end = case.point(ode, sigma, 1), case.point(ode, sigma, 0)
    for actual, expected in zip(start, (case.noised(case.t), alpha_t, sigma_t), strict=True):
        close(actual, expected)
    for actual, expected in zip(end, (case.noised(case.s), alpha_s, sigma_s), strict=True):
        close(actual, drift * expected)


@given(sub_paths())
@each_ode
def test_closed_forms_of_the_paper(ode, case):
    """Eq. 12, 14, 24 for SL and 26, 27, 28 for DL, and the linear σ of both, for any two points."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = case.at(case.t), case.at(case.s)
    g, r, x_t, x_s = rows(case.gamma.double(), case.x0), alpha_t / alpha_s, case.x0, case.eps
    if ode == "sl":
        x = (1 - g) * r * x_s + g * x_t
        alpha, linear = alpha_t, (1 - g) * r * sigma_s + g * sigma_t
        variance = r**2 * sigma_s**2 + g**2 * (1 - r**2)
    else:
        x = (1 - g) * x_s + g * x_t
        alpha, linear = (1 - g) * alpha_s + g * alpha_t, (1 - g) * sigma_s + g * sigma_t
        variance = (1 - g + g * r) ** 2 * sigma_s**2 + g**2 * (1 - r**2)
    for sigma, expected in {"approx": linear, "exact": variance.sqrt()}.items():
        point = case.point(ode, sigma, x_t=x_t, x_s=x_s)
        close(point.x, x)
        close(point.alpha, alpha)
        close(point.sigma, expected)


@given(sub_paths())
@each_sigma
def test_noise_grows_along_the_line(sigma, case):
    """σ_γ itself for SL; σ_γ/α_γ for DL as well, but not σ_γ, see the next test."""
    sl, dl = ([case.point(ode, sigma, g) for g in torch.linspace(0, 1, 9).tolist()] for ode in ODES)
    for values in ([p.sigma for p in sl], [p.sigma / p.alpha for p in sl], [p.sigma / p.alpha for p in dl]):
        values = torch.stack(values)
        assert (values.diff(dim=0) > -1e-6 * values[1:]).all()
        assert (values[-1] > values[0]).all()


@pytest.mark.parametrize("t, s", SD_PATHS[1:])
def test_dl_noise_dips_under_its_end_in_the_exact_form_only(t, s):
    """dσ_γ²/dγ = -2 (1 - r) σ_s² < 0 at γ = 0: fresh noise enters with γ², the old leaves with γ."""
    ends = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([t]), torch.tensor([s])
    at_small_gamma = {sigma: sub_path_point(*ends, torch.tensor([0.05]), SD, "dl", sigma).sigma for sigma in SIGMAS}
    assert at_small_gamma["exact"] < SD.sigma[s] < at_small_gamma["approx"]


@given(sub_paths())
@each_ode
def test_linear_sigma_recovers_x0_when_the_ends_share_their_noise(ode, case):
    """Eq. 14 on a pair made by a DDIM step with the true ε gives back x_0 for every γ."""
    x_t = case.noised(case.t)
    x_s = multiple_estimation(true_denoiser(case), case.schedule, x_t, case.t, case.s, case.k, case.k)
    point = case.point(ode, "approx", x_t=x_t, x_s=x_s)
    close(point.alpha * case.x0, point.x - point.sigma * case.eps, 2e-6 / point.alpha.min().item())


@pytest.mark.parametrize("path, rms", [*zip(SD_PATHS, [0.0100, 0.0981, 1.207], strict=True)])
def test_eq_24_misses_x0_when_the_ends_share_their_noise(path, rms):
    """By Eq. 25 over α_t, the difference of the two σ: here for γ = 1/2 (note 2)."""
    n, (t, s) = 100_000, ([time] for time in path)
    x0, eps = torch.randn(2, n, 2, generator=seeded(0))
    x_t, x_s = (SD.alpha[time] * x0 + SD.sigma[time] * eps for time in (t, s))
    error = {}
    for sigma in SIGMAS:
        point = sub_path_point(x_t, x_s, torch.tensor(t), torch.tensor(s), torch.tensor([0.5]), SD, "sl", sigma)
        error[sigma] = ((point.x - point.sigma * eps) / point.alpha - x0).square().mean().sqrt().item()
    assert error["exact"] == pytest.approx(rms, rel=0.01)
    assert error["approx"] < 1e-4 * error["exact"]


@pytest.mark.parametrize("t, s", SD_PATHS)
@pytest.mark.parametrize("coupling, right, wrong", [("markov", "exact", "approx"), ("ddim", "approx", "exact")])
@each_ode
def test_which_sigma_is_right_depends_on_the_coupling_of_the_ends(ode, coupling, right, wrong, t, s):
    """The noise x_γ - α_γ x_0 has the standard deviation σ_γ: within 5 standard errors, or clearly not."""
    n, g = 200_000, seeded(0)
    x0, eps, fresh = torch.randn(3, n, 1, generator=g)
    x_s = SD.alpha[s] * x0 + SD.sigma[s] * eps
    if coupling == "markov":  # Eq. 20
        r = SD.alpha[t] / SD.alpha[s]
        x_t = r * x_s + (1 - r**2).sqrt() * fresh
    else:
        x_t = SD.alpha[t] * x0 + SD.sigma[t] * eps
    t, s = torch.tensor([t]), torch.tensor([s])

    def standard_errors(sigma):
        point = sub_path_point(x_t, x_s, t, s, torch.tensor([0.5]), SD, ode, sigma)
        ratio = (point.x - point.alpha * x0).square().mean().sqrt() / point.sigma
        return (ratio - 1).abs().item() * math.sqrt(2 * n)

    assert standard_errors(right) < 5 < 10 < standard_errors(wrong)


@given(sub_paths())
def test_sl_is_a_straight_line_in_z_and_follows_ddim(case):
    """Note 3. z = x/α; the point at γ is where DDIM gets from t when it stops at the ratio σ_γ/α_γ."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = case.at(case.t), case.at(case.s)
    gamma, rho_t, rho_s = rows(case.gamma.double(), case.x0), sigma_t / alpha_t, sigma_s / alpha_s
    any_point = case.point("sl", "approx", x_t=case.x0, x_s=case.eps)
    close(any_point.x / any_point.alpha, (1 - gamma) * case.eps / alpha_s + gamma * case.x0 / alpha_t)

    on_ddim = case.point("sl", "approx")
    rho = (1 - gamma) * rho_s + gamma * rho_t
    close(on_ddim.sigma / on_ddim.alpha, rho)
    z_t = case.noised(case.t) / alpha_t
    close(on_ddim.x / on_ddim.alpha, z_t + (rho - rho_t) * case.eps)


@given(sub_paths())
@each_sigma
@each_ode
def test_a_bfloat16_point_costs_the_schedule_no_precision(ode, sigma, case):
    x_t, x_s = case.noised(case.t).bfloat16(), case.noised(case.s).bfloat16()
    point = case.point(ode, sigma, x_t=x_t, x_s=x_s)
    assert all(part.dtype == torch.float32 for part in point)
    for part, expected in zip(point, case.point(ode, sigma, x_t=x_t.float(), x_s=x_s.float()), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    "wrong", [("SL", "approx"), ("lcm", "approx"), ("sl", "aprox"), ("dl", "Exact"), ("", "approx"), ("sl", None)]
)
def test_a_misspelt_option_is_an_error(wrong):
    """A line that is no known one must not silently be another."""
    x, t = torch.zeros(1, 2), torch.tensor([99])
    with pytest.raises(ValueError, match="is none of"):
        sub_path_point(x, x, t, t - 20, torch.ones(1), SD, *wrong)
    for options in ({"ode": "LCM"}, {"metric": "l1"}, {"sigma_form": "aprox"}):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            loss_and_gradients(**{"ode": "sl", **options})
    with pytest.raises(ValueError, match="gamma"):
        ConsistencyFunction(network(), SD, "epsilon", "gamma")


@given(sub_paths())
def test_eq_25_is_never_negative_and_zero_at_both_ends(case):
    """The linear σ is the larger one: variances add up to less than deviations do."""
    for gamma in (0.0, 0.25, 0.5, 0.75, 1.0):
        approx, exact = (case.point("sl", sigma, gamma).sigma for sigma in SIGMAS)
        assert (approx >= exact * (1 - 1e-5)).all()
        if gamma in (0, 1):
            close(approx, exact)


@pytest.mark.parametrize("t, s", SD_PATHS)
def test_eq_25_is_positive_inside(t, s):
    ends = torch.zeros(9, 2), torch.zeros(9, 2), torch.full((9,), t), torch.full((9,), s)
    gamma = torch.linspace(0.1, 0.9, 9)
    approx, exact = (sub_path_point(*ends, gamma, SD, "sl", sigma).sigma for sigma in SIGMAS)
    assert (approx > exact * 1.001).all()


@each_sigma
@pytest.mark.parametrize("k", [20, 100])
def test_a_sub_path_ends_where_the_next_one_starts(k, sigma):
    """γ = 0, divided by the drift, is γ = 1 of the sub-path that starts at s: point, signal and noise."""
    x_t, x_s, x_next = torch.randn(3, 5, 2, generator=seeded(0))
    t = torch.tensor([999, 799, 599, 399, 219])
    s, zero, one = t - k, torch.zeros(5), torch.ones(5)
    r = rows(SD.alpha[t] / SD.alpha[s], x_t)
    end = sub_path_point(x_t, x_s, t, s, zero, SD, "sl", sigma)
    start = sub_path_point(x_s, x_next, s, s - k, one, SD, "sl", sigma)
    for a, b in zip(end, start, strict=True):
        close(a / r, b)


# -- Section 4.2.2: the student ---------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return PointMLP(width=32, depth=1, time_dim=16)


def student_of(teacher, conditioning, schedule=SD, prediction_type="epsilon"):
    """A training student around a copy of `teacher`, whose γ-projection, if it has one, is large and random."""
    student = ConsistencyFunction(copy.deepcopy(teacher), schedule, prediction_type, conditioning)
    if conditioning == "embedding":
        nn.init.normal_(student.network.time_embedding.projection.weight)
    return student


def test_gamma_embedding_is_exactly_zero_at_1():
    assert torch.equal(splam.gamma_embedding(torch.ones(3)), torch.zeros(3, splam.GAMMA_DIM))


@given(gammas, gammas)
def test_gamma_embedding_tells_gammas_apart_and_is_smooth(gamma, other):
    """|e(γ)| ≥ 1 - γ; no component turns more than four times over the sub-path, so none is steeper than 8π."""
    one, two = splam.gamma_embedding(gamma), splam.gamma_embedding(other)
    assert (one.norm(dim=1) >= (1 - gamma) * (1 - 1e-5)).all()
    assert ((one - two).abs() <= 8 * math.pi * (gamma - other).abs()[:, None] + 1e-5).all()


@given(gammas)
def test_gamma_embedding_is_float32_for_a_bfloat16_gamma(gamma):
    embedding = splam.gamma_embedding(gamma.bfloat16())
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, splam.gamma_embedding(gamma.bfloat16().float()))


def test_boundary_condition_is_that_of_lcm():
    """Eq. 5 at every time; x itself at time 0, the denoiser far from it."""
    t = torch.arange(1000)
    c_skip, c_out = splam.boundary(t, 2)
    oracle = LCMScheduler().get_scalings_for_boundary_condition_discrete(t.double()[:, None])
    for actual, expected in zip((c_skip, c_out), oracle, strict=True):
        close(actual, expected, 1e-6)
    assert (c_skip[0], c_out[0]) == (1, 0)
    assert c_skip[-1] < 1e-6 and c_out[-1] > 1 - 1e-6


@given(sub_paths(shapes=[(6, 2)]), st.sampled_from(PREDICTION_TYPES))
@each_conditioning
def test_student_at_gamma_1_is_the_teacher(conditioning, case, prediction_type):
    """Whatever the γ-projection is. The teacher's denoiser and boundary condition are those of LCMScheduler."""
    oracle = LCMScheduler(len(case.schedule), prediction_type=prediction_type)
    oracle.alphas_cumprod = case.abar
    teacher, x_t = network(), case.noised(case.t).float()
    output = teacher(x_t, case.t).sample
    expected = []
    for row, t, x in zip(output, case.t.tolist(), x_t, strict=True):
        oracle.set_timesteps(timesteps=[t])
        expected.append(oracle.step(row.double(), t, x.double()).denoised)
    student = student_of(teacher, conditioning, case.schedule, prediction_type)
    gamma_1 = torch.ones(len(x_t)), case.point("sl", "approx", 1, x_t=x_t, x_s=x_t)
    for prediction in (student(x_t, case.t), student(x_t, case.t, *gamma_1)):
        close(prediction, torch.stack(expected), 1e-4)
        if conditioning == "embedding":
            plain = ConsistencyFunction(teacher, case.schedule, prediction_type)
            assert torch.equal(prediction, plain(x_t, case.t))


@each_conditioning
def test_student_takes_a_schedule_that_ends_in_pure_noise(conditioning):
    """Zero terminal SNR, α = 0: a v network's x_0 is -v there, at the last time and not beyond it."""
    schedule = Schedule(DDPMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod)
    teacher, x, t = network(), torch.randn(4, 2, generator=seeded(0)), torch.full((4,), 999)
    assert schedule.time_at(*schedule.at(t, 2)).tolist() == [999] * 4
    close(student_of(teacher, conditioning, schedule, "v_prediction")(x, t), -teacher(x, t).sample)


def sees_gamma(student):
    """Whether the output depends on γ where x, t and the point do not."""
    x, t = torch.randn(4, 2, generator=seeded(0)), torch.tensor([99, 399, 699, 999])
    at = [student(x, t, torch.full((4,), gamma), SubPathPoint(x, *SD.at(t, 2))) for gamma in (0.3, 0.6, 1.0)]
    return not (torch.equal(at[0], at[1]) or torch.equal(at[1], at[2]))


def test_copies_of_a_student_see_their_own_gamma():
    """Note 10: a hook left behind on the original would make a copy deaf to γ without any error."""
    student = student_of(network(), "embedding")
    assert sees_gamma(student)
    copied, loaded = copy.deepcopy(student), student_of(network(1), "embedding")
    loaded.load_state_dict(student.state_dict())
    student.network.time_embedding.projection.weight.data.zero_()
    assert not sees_gamma(student)
    assert sees_gamma(copied) and sees_gamma(loaded)


@given(seeds, st.sampled_from(PREDICTION_TYPES), st.sampled_from([None, "time", "embedding"]))
def test_at_time_0_the_student_is_the_identity(seed, prediction_type, conditioning):
    """Eq. 5: F(x, 0) = x to the bit, whatever the network says."""
    student = student_of(network(seed % 1000), conditioning, SD, prediction_type)
    x = 3 * torch.randn(8, 2, generator=seeded(seed))
    assert torch.equal(student(x, torch.zeros(8, dtype=torch.long)), x)
    assert not torch.equal(student(x, torch.ones(8, dtype=torch.long)), x)  # and at no other time


@pytest.mark.parametrize("t, s", SD_PATHS[1:])
@each_prediction_type
def test_with_time_conditioning_the_end_of_a_sub_path_is_an_ordinary_point(prediction_type, t, s):
    """At γ = 0 the denoiser sees (x_s, s), though its input is r x_s and its sub-path starts at t."""
    student, x_s = student_of(network(), "time", SD, prediction_type), torch.randn(8, 2, generator=seeded(0))
    t, s, zero = torch.full((8,), t), torch.full((8,), s), torch.zeros(8)
    point = sub_path_point(torch.zeros(8, 2), x_s, t, s, zero, SD, "sl", "approx")
    denoised = []
    for prediction, x, time in ((student(point.x, t, zero, point), point.x, t), (student(x_s, s), x_s, s)):
        c_skip, c_out = splam.boundary(time, 2)
        denoised.append((prediction - c_skip * x) / c_out)
    close(*denoised, 1e-3)


def test_after_training_the_projection_of_gamma_can_be_dropped():
    """What was learnt at γ < 1 has changed W, and F at γ = 1 is the same without it, to the bit."""
    student, target, _, denoise, x0, _ = algorithm_1()
    optimizer, before = torch.optim.AdamW(student.parameters(), lr=1e-2), copy.deepcopy(student.state_dict())
    for step in range(5):
        loss = splad_loss(
            student, target, denoise, SD, x0, {}, splam.draw((64, 2), 1000, 50, seeded(step)), k=100, solver_step=20
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    projection = "network.time_embedding.projection.weight"
    assert (student.state_dict()[projection] - before[projection]).abs().max() > 1e-3
    plain = network(9)
    plain.load_state_dict(student.plain_state_dict())
    x, t = torch.randn(4, 2, generator=seeded(0)), torch.tensor([19, 399, 699, 999])
    assert torch.equal(ConsistencyFunction(plain, SD, "epsilon")(x, t), student(x, t))


@each_conditioning
def test_finished_student_has_the_teachers_weights_by_name(conditioning):
    teacher = network()
    weights, plain = student_of(teacher, conditioning).plain_state_dict(), network(1)
    assert list(weights) == list(teacher.state_dict())
    plain.load_state_dict(weights, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), teacher.parameters(), strict=True))


class Ideal(nn.Module):
    """The ideal ε network of a mixture, at real-valued times too (log σ/α linear in between)."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.log_rho = mixture, (SD.sigma.double() / SD.alpha.double()).log().numpy()

    def forward(self, x, t):
        rho = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), self.log_rho)))[:, None]
        alpha = (1 + rho**2).rsqrt()
        return SimpleNamespace(sample=self.mixture.eps(x, alpha, rho * alpha))


def ideal_prediction(mixture, conditioning, ode, t, s):
    """What a student around the ideal network makes of 11 points from γ = 0 to 1; with them, and x_0's coefficients."""
    gamma, g, t, s = torch.linspace(0, 1, 11), seeded(0), torch.full((11,), t), torch.full((11,), s)
    x0, eps = mixture.sample(11, g)[0], torch.randn(11, 2, generator=g)
    x_t, x_s = (alpha * x0 + sigma * eps for alpha, sigma in (SD.at(t, 2), SD.at(s, 2)))
    point = sub_path_point(x_t, x_s, t, s, gamma, SD, ode, "approx")
    prediction = ConsistencyFunction(Ideal(mixture), SD, "epsilon", conditioning)(point.x, t, gamma, point)
    c_skip, c_out = splam.boundary(t, 2)
    return (prediction - c_skip * point.x) / c_out, point


@pytest.mark.parametrize("t, s", SD_PATHS)
@each_ode
def test_time_conditioning_is_right_at_every_gamma_without_training(ode, t, s):
    """Note 9, data of one point: a teacher told t' finds it from every x_γ; one that believes t, at γ = 1 only."""
    one_point = GaussianMixture(torch.tensor([[0.7, -1.2]]), 0.0)
    knows_t, believes_t = (ideal_prediction(one_point, c, ode, t, s)[0] - one_point.means for c in ("time", None))
    assert (knows_t.norm(dim=1) < 1e-5).all()
    assert believes_t[-1].norm() < 1e-5 and (believes_t[:-1].norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("t, s", SD_PATHS)
@each_ode
def test_time_conditioning_predicts_the_mean_of_x0_given_the_point(ode, t, s):
    """In general: E[x_0 | x_γ = α_γ x_0 + σ_γ ε], which the mixture has in closed form for any α_γ, σ_γ (Tweedie)."""
    prediction, (x, alpha, sigma) = ideal_prediction(MIXTURE, "time", ode, t, s)
    x, alpha, sigma = x.double(), alpha.double(), sigma.double()
    close(prediction, (x - sigma * MIXTURE.eps(x, alpha, sigma)) / alpha, 1e-4)


# -- Algorithm 1 ------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e3), seeds)
def test_distances(scale, seed):
    a, b = scale * torch.randn(2, 5, 2, generator=seeded(seed))
    d, c = a.double() - b.double(), 1e-3
    torch.testing.assert_close(splam.distance(a, b, "l2").double().mean(), (d**2).mean(), rtol=1e-5, atol=0)
    huber = ((d**2 + c**2) ** 0.5 - c).mean()
    assert splam.distance(a, b, "l2").shape == (5,)  # a number for each sample, which a weight could multiply
    torch.testing.assert_close(splam.distance(a, b, "l2")[:2], splam.distance(a[:2], b[:2], "l2"))
    torch.testing.assert_close(splam.distance(a, b, "huber").double().mean(), huber, rtol=1e-4, atol=2e-10)
    # iCT's, for its c: the norm of the whole sample. Ours is the same number over √D.
    norm = d.flatten(1).norm(dim=1)
    size = d[0].numel()
    ict = ((norm**2 + size * c**2) ** 0.5 - size**0.5 * c) / size**0.5
    torch.testing.assert_close(splam.distance(a, b, "huber_sample").double(), ict, rtol=1e-4, atol=2e-10)


def test_huber_is_quadratic_near_zero_and_linear_far_away():
    def huber(d):
        return splam.distance(torch.tensor([[d]]), torch.zeros(1, 1), "huber").item()

    assert huber(1e-4) == pytest.approx(1e-4**2 / (2 * 1e-3), rel=0.01)
    assert huber(100.0) == pytest.approx(100, rel=1e-4)


@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 3), seeds)
def test_draws_are_on_the_grid_and_repeatable(step, starts, gamma_draws, seed):
    draws = splam.draw((64, 2), step * starts, starts, seeded(seed), gamma_draws)
    assert set(draws.t.tolist()) <= set(range(step - 1, step * starts, step))
    assert (draws.gamma >= 0).all() and (draws.gamma < 1).all()
    assert draws.gamma.shape == (64, gamma_draws) and draws.noise.shape == (64, 2)
    assert len(draws.gamma.unique()) == 64 * gamma_draws
    for again, first in zip(splam.draw((64, 2), step * starts, starts, seeded(seed), gamma_draws), draws, strict=True):
        assert torch.equal(again, first)


@each_conditioning
def test_a_draw_at_the_lines_beginning_is_finite_where_a_schedule_ends_in_pure_noise(monkeypatch, conditioning):
    """At γ = 0 such a line would begin at a point of no signal and no noise: 0/0. torch.rand can return 0."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape))
    schedule = Schedule(DDPMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod)
    draws = splam.draw((8, 2), 1000, 1, seeded(0))
    assert (draws.t == 999).all() and (draws.gamma > 0).all()
    teacher = network()
    student = student_of(network(1), conditioning, schedule, "v_prediction")

    def denoise(x, t):
        return splam.to_x0_eps(teacher(x, t).sample, x, *schedule.at(t, x.ndim), "v_prediction")

    x0 = torch.randn(8, 2, generator=seeded(1))
    loss = splam.splad_loss(student, student, denoise, schedule, x0, {}, draws, k=100, solver_step=20)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_training_and_sampling_share_their_grid():
    t, gamma, _ = splam.draw((5000, 1), 1000, 50, seeded(0))
    assert set(t.tolist()) == set(splam.few_step_times(50, 1000, 50)) == set(range(19, 1000, 20))
    assert abs(gamma.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 5000)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_gamma_is_1_and_the_rest_uniform(share):
    gamma = splam.draw((5000, 1), 1000, 50, seeded(0), 2, share).gamma
    one = (gamma == 1).float()
    assert abs(one.mean() - share) < 5 * math.sqrt(share * (1 - share) / 10000)
    assert abs(gamma[gamma < 1].mean() - 0.5) < 5 * math.sqrt(1 / 12 / 10000 / (1 - share))


def algorithm_1(conditioning="embedding"):
    """(student, target, teacher network, its denoiser, x_0, draws): all networks different, all with gradients."""
    teacher = network()
    student, target = student_of(network(1), conditioning), student_of(network(2), conditioning)
    draws = splam.draw((64, 2), 1000, 50, seeded(0))

    def denoise(x, t):
        return splam.to_x0_eps(teacher(x, t).sample, x, *SD.at(t, x.ndim), "epsilon")

    return student, target, teacher, denoise, torch.randn(64, 2, generator=seeded(1)), draws


def loss_and_gradients(ode, draws=None, conditioning="embedding", **options):
    student, target, teacher, denoise, x0, drawn = algorithm_1(conditioning)
    options = dict(k=100, solver_step=20, ode=ode) | options
    loss = splad_loss(student, target, denoise, SD, x0, {}, draws or drawn, **options)
    loss.backward()
    return loss.detach(), [[p.grad for p in module.parameters()] for module in (student, target, teacher)]


@each_conditioning
@each_ode
def test_only_the_student_gets_a_gradient(ode, conditioning):
    """The whole student, its γ-projection included; the target and the teacher none, though they could take one."""
    _, (student, target, teacher) = loss_and_gradients(ode, conditioning=conditioning)
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in student)
    assert all(grad is None for grad in target + teacher)


@pytest.mark.parametrize("ode", ["lcm", *ODES])
def test_loss_is_eq_17_and_for_lcm_eq_7(ode):
    """With diffusers' own noising and DDIM step; d = L2, k = k_φ = 20."""
    student, target, teacher, _, x0, (t, gamma, noise) = algorithm_1()
    loss, _ = loss_and_gradients(ode, k=20)
    ddim = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)
    s, x_t = (t - 20).clamp_min(0), ddim.add_noise(x0, noise, t)
    output = teacher(x_t, t).sample
    x_s = torch.stack([ddim.step(o, n, x).prev_sample for o, n, x in zip(output, t.tolist(), x_t, strict=True)])
    if ode == "lcm":
        prediction = student(x_t, t)
    else:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = SD.at(t, 2), SD.at(s, 2)
        drift, g = (alpha_t / alpha_s if ode == "sl" else 1), gamma
        lines = ((drift * at_s, at_t) for at_s, at_t in ((x_s, x_t), (alpha_s, alpha_t), (sigma_s, sigma_t)))
        point = SubPathPoint(*((1 - g) * end + g * start for end, start in lines))
        prediction = student(point.x, t, gamma[:, 0], point)
    torch.testing.assert_close(loss, (prediction - target(x_s, s)).square().mean(), rtol=1e-4, atol=0)


def test_gamma_1_is_lcm_for_both_odes_to_the_bit():
    """Section 4: LCM is SPLAM at γ ≡ 1. With γ < 1 the three losses differ."""
    draws = algorithm_1()[-1]
    at_1 = draws._replace(gamma=torch.ones(64, 1))
    lcm, (gradients, *_) = loss_and_gradients("lcm")
    for ode in ODES:
        loss, (same, *_) = loss_and_gradients(ode, at_1)
        assert torch.equal(loss, lcm) and all(map(torch.equal, same, gradients))
    assert len({loss_and_gradients(ode)[0].item() for ode in ("lcm", "sl", "dl")}) == 3


def test_the_last_sub_path_ends_at_time_0_where_the_target_is_the_point_itself():
    """Note 6. A student that answers 0 has the loss x̂_s², and x̂_s is known, for the teacher knows x_0 and ε."""
    target, draws = student_of(network(2), "time"), splam.draw((64, 2), 1000, 50, seeded(0))
    draws = draws._replace(t=torch.tensor([19, 39, 59, 99]).repeat(16))
    x0 = torch.randn(64, 2, generator=seeded(1))

    def zero(x, t, gamma=None, point=None):
        return torch.zeros_like(x)

    loss = splad_loss(zero, target, lambda x, t: (x0, draws.noise), SD, x0, {}, draws, k=100, solver_step=20)
    end = SD.alpha[0] * x0 + SD.sigma[0] * draws.noise
    torch.testing.assert_close(loss, end.square().mean(), rtol=1e-5, atol=0)


def test_gradient_checkpointing_changes_no_gradient():
    """With several γ for one sub-path: what is computed a second time must see the γ of its own pass, not the last."""

    def gradients(checkpointing):
        torch.manual_seed(0)
        network = unet()
        if checkpointing:
            network.enable_gradient_checkpointing()
        student = student_of(network.train(), "embedding")
        draws, x0 = splam.draw((2, 3, 8, 8), 1000, 50, seeded(0), 2), torch.randn(2, 3, 8, 8, generator=seeded(1))
        splad_loss(student, lambda x, t: x, lambda x, t: (x, x), SD, x0, {}, draws, k=20, solver_step=20).backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain["network.time_embedding.projection.weight"].abs().max() > 1e-4
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], rtol=1e-4, atol=1e-7)


@each_conditioning
@each_ode
def test_several_gammas_share_one_solved_sub_path(ode, conditioning):
    """Their loss and gradient are the mean of each alone, and the teacher is asked no more often than for one."""
    draws, calls = algorithm_1()[-1], 0
    both = draws._replace(gamma=torch.rand(64, 2, generator=seeded(3)))
    loss, (together, *_) = loss_and_gradients(ode, both, conditioning)
    alone = [loss_and_gradients(ode, draws._replace(gamma=g[:, None]), conditioning) for g in both.gamma.T]
    assert alone[0][0] != alone[1][0]
    torch.testing.assert_close(loss, (alone[0][0] + alone[1][0]) / 2)
    for whole, *parts in zip(together, *(gradients for _, (gradients, *_) in alone), strict=True):
        torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-3, atol=1e-6)

    def counting(x, t):
        nonlocal calls
        calls += 1
        return x, x

    student, target, _, _, x0, _ = algorithm_1(conditioning)
    splad_loss(student, target, counting, SD, x0, {}, both, k=100, solver_step=20, ode=ode)
    assert calls == 5


def knows(eps, seen=None):
    """A perfect consistency function, for it knows ε: the coefficients are all that can go wrong. It wants a label."""

    def function(x, t, gamma=None, point=None, *, label):
        if point is not None and seen is not None:
            seen.append((x, point.alpha, point.sigma))
        alpha, sigma = SD.at(t, x.ndim) if point is None else point[1:]
        return (x - sigma * eps) / alpha

    return function


def loss_knowing_eps(ode, sigma, seen=None):
    """Teacher, student and target all know x_0 and ε."""
    draws, x0 = splam.draw((64, 2), 1000, 50, seeded(0)), torch.randn(64, 2, generator=seeded(1))
    perfect, options = knows(draws.noise, seen), dict(k=100, solver_step=20, ode=ode, sigma_form=sigma)
    return splad_loss(perfect, perfect, lambda x, t: (x0, draws.noise), SD, x0, {"label": 0}, draws, **options)


@each_ode
def test_loss_of_a_perfect_student_is_zero_with_the_linear_sigma_only(ode):
    assert loss_knowing_eps(ode, "approx") < 1e-9
    assert loss_knowing_eps(ode, "exact") > 1e-3


@each_sigma
@each_ode
def test_schedule_stays_float32_under_autocast(ode, sigma):
    """What the student is shown is the same to the bit, and the loss is float32."""
    seen = []
    loss = loss_knowing_eps(ode, sigma, seen)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss_knowing_eps(ode, sigma, seen)
    assert torch.equal(loss, under_autocast) and loss.dtype == under_autocast.dtype == torch.float32
    for a, b in zip(*seen, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@given(st.floats(0, 0.999), st.integers(1, 20))
def test_ema_of_a_constant_student_closes_in_geometrically(decay, updates):
    target, student = nn.Linear(3, 4), nn.Linear(3, 4)
    first, constant = ([p.detach().double() for p in copy.deepcopy(n).parameters()] for n in (target, student))
    for _ in range(updates):
        splam.ema_update(target, student, decay)
    for a, b, p in zip(first, constant, target.parameters(), strict=True):
        torch.testing.assert_close(p.double(), b + decay**updates * (a - b), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(p.double(), b) for p, b in zip(student.parameters(), constant, strict=True))


# -- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1000, 333])
def test_few_step_times_are_those_of_lcm(n):
    """All of them up to 50 steps; exhaustively, because LCM's rounding differs from integers' at a few places only."""
    oracle = LCMScheduler(n)
    for original_steps in range(1, 51):
        for steps in range(1, original_steps + 1):
            oracle.set_timesteps(steps, original_inference_steps=original_steps)
            assert splam.few_step_times(steps, n, original_steps) == oracle.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4])
@each_prediction_type
def test_few_step_sample_is_a_loop_of_lcm(prediction_type, steps):
    """Eq. 19 and its repetition, with the same noises; what is yielded last is the sample."""
    oracle = LCMScheduler(**STABLE_DIFFUSION, prediction_type=prediction_type)
    oracle.set_timesteps(steps, original_inference_steps=50)
    teacher, noise, ours, theirs = network(), torch.randn(16, 2, generator=seeded(0)), seeded(1), seeded(1)
    student, times = ConsistencyFunction(teacher, SD, prediction_type), splam.few_step_times(steps, 1000, 50)
    path = list(splam.few_step_sample(student, SD, noise, times, lambda: torch.randn(16, 2, generator=ours)))
    x = noise
    for predicted, t in zip(path, oracle.timesteps, strict=True):
        step = oracle.step(teacher(x, t).sample, t, x, generator=theirs)
        x = step.prev_sample
        close(predicted, step.denoised, 1e-4)
    close(path[-1], x, 1e-4)


@pytest.mark.parametrize("steps", [2, 4])
@each_prediction_type
def test_few_step_sample_without_fresh_noise_is_a_loop_of_tcd(prediction_type, steps):
    """TCD's sampler with η = 0. It takes the network's x_0 as it is, and so does Eq. 16 to 1e-5 at these times."""
    oracle = TCDScheduler(**STABLE_DIFFUSION, prediction_type=prediction_type)
    oracle.set_timesteps(steps)
    teacher, noise = network(), torch.randn(16, 2, generator=seeded(0))
    student, times = ConsistencyFunction(teacher, SD, prediction_type), splam.few_step_times(steps, 1000, 50)
    randn = lambda: torch.full((16, 2), 1e6)  # noqa: E731  whatever is drawn must not count
    path = list(splam.few_step_sample(student, SD, noise, times, randn, 0.0))
    x = noise
    for predicted, t in zip(path, oracle.timesteps, strict=True):
        alpha, sigma = SD.at(t.expand(16), 2)
        close(predicted, splam.to_x0_eps(teacher(x, t).sample, x, alpha, sigma, prediction_type)[0], 1e-3)
        x = oracle.step(teacher(x, t).sample, t, x, eta=0.0).prev_sample


def test_found_and_fresh_noise_add_up_to_standard_normal_noise():
    """Whatever their shares: seen with a student that finds nothing in the first step, so that all of x is noise, and
    changes nothing in the second."""
    noise, fresh = torch.randn(2, 100_000, 1, generator=seeded(0))
    idle = lambda x, t: x * (t != 999).view(-1, 1)  # noqa: E731
    for eta in (0.0, 0.5, 0.8, 1.0):
        *_, x = splam.few_step_sample(idle, SD, noise, [999, 499], lambda: fresh, eta)
        assert x.std() == pytest.approx(SD.sigma[499].item(), rel=0.01)
        shares = torch.linalg.lstsq(torch.cat([noise, fresh], 1), x).solution.flatten() / SD.sigma[499]
        # x = σ ε at the start too: the noise that is found is the whole input over σ_999, which is 0.998.
        assert shares[1] == pytest.approx(eta, abs=1e-4)
        assert shares[0] == pytest.approx(math.sqrt(1 - eta**2) / SD.sigma[999].item(), abs=1e-4)


@pytest.mark.parametrize("eta, spread", [(1.0, 1.0), (0.5, 1.29), (0.0, 1.32)])
def test_a_perfect_student_samples_rightly_with_fresh_noise_only(eta, spread):
    """Data that are standard normal: the PF-ODE moves nothing, so that a perfect student returns x. With found noise,
    which is not independent of x̂_0, samples spread too far."""
    noise, fresh = torch.randn(2, 100_000, 1, generator=seeded(0))
    *_, x = splam.few_step_sample(lambda x, t: x, SD, noise, [999, 499], lambda: fresh, eta)
    assert x.std() == pytest.approx(spread, rel=0.01)


def test_the_condition_reaches_every_step():
    def student(x, t, *, label):
        return torch.full_like(x, label)

    path = splam.few_step_sample(student, SD, torch.zeros(4, 2), [999, 499], lambda: torch.zeros(4, 2), label=3)
    assert all(torch.equal(x0, torch.full((4, 2), 3.0)) for x0 in path)
