"""What improved.py adds, by the oracles and helpers of test_splam.py, and by diffusers' DPM-Solver."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import test_splam
import torch
from conftest import ROOT
from diffusers import DPMSolverSinglestepScheduler
from hypothesis import given
from hypothesis import strategies as st
from test_splam import LINES, MIXTURE, PURE_NOISE, SD, SD_PATHS, close, points, seeded

import splam
import teacher
from experiments.table import PREDICTED
from improved import ToldTheTime, half_at_one, second_order, time_at
from splam import ConsistencyFunction, multiple_estimation, sub_path_point


@given(test_splam.sub_paths, st.floats(0.01, 100))
def test_time_at_inverts_the_schedule_at_any_scale_and_falls_from_t_to_s_along_a_sub_path(case, scale):
    """Only σ/α counts: x and c·x are at the same time."""
    schedule, found = case.schedule, time_at(case.schedule, scale * case.schedule.alpha, scale * case.schedule.sigma)
    torch.testing.assert_close(found, torch.arange(len(schedule)).float(), atol=1e-3, rtol=0)
    for ode in LINES:
        line = (case.point(ode, "linear", gamma) for gamma in torch.linspace(0, 1, 9).tolist())
        times = torch.stack([time_at(schedule, alpha, sigma) for _, alpha, sigma in line])
        torch.testing.assert_close(times[[0, -1]], torch.stack([case.s, case.t]).float(), atol=1e-3, rtol=0)
        assert (times.diff(dim=0) > 0).all()


def test_what_holds_for_every_student_holds_for_one_that_is_told_the_time(monkeypatch):
    for prediction_type in test_splam.PREDICTION_TYPES:
        test_splam.test_student_at_gamma_1_is_the_teacher(ToldTheTime, prediction_type)
        test_splam.test_at_time_0_the_student_is_the_identity(ToldTheTime, prediction_type)
    test_splam.test_after_training_the_projection_of_gamma_can_be_dropped(ToldTheTime)
    assert time_at(PURE_NOISE, *PURE_NOISE.at(torch.tensor([999]), 2)).item() == 999
    test_splam.test_a_schedule_may_end_in_pure_noise(ToldTheTime, monkeypatch)


@pytest.mark.parametrize("t, s", SD_PATHS)
@test_splam.each_ode
def test_a_teacher_that_is_told_the_time_is_right_at_every_gamma_without_training(ode, t, s):
    """It predicts E[x_0 | x_γ = α_γ x_0 + σ_γ ε], which a mixture has in closed form for any α_γ and σ_γ (Tweedie). One
    that believes t does so at γ = 1 only (note 9)."""
    log_rho = (SD.sigma.double() / SD.alpha.double()).log().numpy()

    def teacher(x, time):
        """The ideal ε network, at real-valued times too."""
        rho = torch.from_numpy(np.exp(np.interp(time.double().numpy(), np.arange(1000), log_rho)))[:, None]
        alpha = (1 + rho**2).rsqrt()
        return SimpleNamespace(sample=MIXTURE.eps(x, alpha, rho * alpha))

    gamma, t, s = torch.linspace(0, 1, 11), torch.full((11,), t), torch.full((11,), s)
    x0, (c_skip, c_out) = MIXTURE.sample(11, seeded(0))[0], splam.boundary(t, 2)
    ends = (alpha * x0 + sigma * points(11) for alpha, sigma in (SD.at(t, 2), SD.at(s, 2)))
    point = sub_path_point(*ends, t, s, gamma, SD, ode, "linear")
    x, alpha, sigma = (part.double() for part in point)
    right = (x - sigma * MIXTURE.eps(x, alpha, sigma)) / alpha
    told, believes_t = (
        ((kind(teacher, SD, "epsilon")(point.x, t, gamma, point) - c_skip * point.x) / c_out - right).norm(dim=1)
        for kind in (ToldTheTime, ConsistencyFunction)
    )
    assert (told < 1e-5).all() and believes_t[-1] < 1e-5 and (believes_t[:-1] > 1e-4).all()


def test_told_the_time_the_fixed_point_of_gaussian_data_is_that_of_lcm_for_short_sub_paths_only():
    """Note 16. Sub-paths of 20 tile the times, so that t' tells (t, γ); on each, 1/G is a line in ρ. Through t' = 199
    pass five sub-paths of 100, and no answer to t' suits them all: not even the best slope in z = x/α."""
    case, n = test_splam.Gaussian(1.0, 20), torch.arange(10, 15).repeat(200)

    def student(x, t, gamma=None, point=None):
        alpha, sigma = SD.at(t, 2) if point is None else point[1:]
        return x / alpha / torch.from_numpy(np.interp(sigma / alpha, case.rho, 1 / case.G)).float()

    assert case.loss(student, ode="lcm") < 1e-10 and case.loss(student) < 1e-10
    assert case.loss(student, k=100) > 1e-6
    gamma = ((case.rho[10] - case.rho[n - 5]) / (case.rho[n] - case.rho[n - 5])).float()
    x0, noise = torch.randn(2, 1000, 1, generator=seeded(0))

    def loss(slope):
        networks = (lambda x, t, gamma, point: slope * x / point.alpha), student, case.denoise
        return splam.splad_loss(*networks, SD, x0, {}, splam.Draws(20 * n - 1, gamma, noise), k=100, solver_step=20)

    assert min(loss(slope) for slope in case.G[10] * torch.linspace(0.95, 1.05, 101)) > 1e-6


def smooth_fixed_point(c, k, m, sigma, share, degree=8):
    """G/G* at t = 999 of a student F = G(t') z that is told t', where G/G* is a polynomial in ϑ = arctan(ρ/c), 1 at
    time 0: the one that is its own best fit. All is linear, so one z_t for each start and γ says all; `share` of the γ
    are 1."""
    case, t = test_splam.Gaussian(c, k), torch.arange(19, 1000, 20)
    s, (alpha, _) = (t - k).clamp_min(0), SD.at(t, 2)
    x_s = multiple_estimation(case.denoise, SD, alpha, t, s, k, k // m)  # from z_t = 1
    gamma = torch.cat([(torch.arange(400) + 0.5) / 400, torch.ones(1)])
    weight = torch.cat([torch.full((400,), (1 - share) / 400), torch.tensor([share])]).double()
    t, s, x_t, x_s = (part.repeat_interleave(401, 0) for part in (t, s, alpha, x_s))
    x, alpha, noise = sub_path_point(x_t, x_s, t, s, gamma.repeat(50), SD, "sl", sigma)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = SD.at(s, 2), SD.at(t, 2)
    rho, rho_s, rho_t = (
        (a / b).double().flatten() for a, b in ((noise, alpha), (sigma_s, alpha_s), (sigma_t, alpha_t))
    )
    z, z_s = (x / alpha).double().flatten(), (x_s / alpha_s).double().flatten()

    def truth(rho):
        return SD.alpha[0] * ((c**2 + case.rho[0] ** 2) / (c**2 + rho**2)).sqrt()

    def powers(rho):
        place = (rho / c).atan() - (case.rho[0] / c).atan()
        place = place / ((case.rho[-1] / c).atan() - (case.rho[0] / c).atan())
        return torch.from_numpy(np.polynomial.chebyshev.chebvander(2 * place.numpy() - 1, degree)) * place[:, None]

    # Loss: the mean square of truth(ρ) (1 + powers(ρ) a) z - truth(ρ_s) (1 + powers(ρ_s) a) z_s over x_t.
    scale = (weight.repeat(50) * (c**2 + rho_t**2)).sqrt()
    ours, theirs = truth(rho) * z * scale, truth(rho_s) * z_s * scale
    fit = torch.linalg.pinv(ours[:, None] * powers(rho))  # what the target asks for -> the best a
    asked = fit @ (theirs[:, None] * powers(rho_s))
    a = torch.linalg.solve(torch.eye(degree + 1) - asked, fit @ (theirs - ours))
    return (1 + powers(case.rho[-1:]) @ a).item()


@pytest.mark.parametrize("row, sigma, share, known", [
    ("smooth in time", "linear", 0, 0.002), ("half at one", "linear", 0.5, 0.001), ("Markov", "markov", 0, 0.013),
])  # fmt: skip
def test_the_fixed_points_of_note_16_if_the_student_is_smooth_in_time(row, sigma, share, known):
    """The table's numbers, which experiments/table.py has too. `known` is how well: by how much the degree counts."""
    (line,) = re.findall(rf"^\| .*{row} \|(.*)\|$", (ROOT / "docs/equations.md").read_text(), re.MULTILINE)
    sizes = [float(size) for size in line.split("|")]
    for size, case in zip(
        sizes, [(0.5, 20, 1), (0.5, 100, 5), (1.0, 20, 1), (1.0, 100, 5), (1.0, 100, 1)], strict=True
    ):
        found = [smooth_fixed_point(*case, sigma, share, degree) for degree in (6, 8, 10)]
        assert found == pytest.approx([size] * 3, abs=known), case
        assert found[1] == pytest.approx(size, abs=6e-4)
    more = {"smooth in time": "", "half at one": " half", "Markov": " --sigma markov"}[row]
    assert dict(PREDICTED.values())[f"--improved time{more}"] == sizes[3]  # c = 1, k = 100, m = 5


def test_half_of_gamma_is_1_and_the_rest_uniform():
    arguments = torch.zeros(10000, 1), 1000, 50
    (t, gamma, noise), plain = half_at_one(*arguments, seeded(0)), splam.draw(*arguments, seeded(0))
    assert torch.equal(t, plain.t) and torch.equal(noise, plain.noise)
    assert abs((gamma == 1).float().mean() - 0.5) < 5 * 0.5 / 100
    assert abs(gamma[gamma < 1].mean() - 0.5) < 5 * (1 / 12 / 5000) ** 0.5 and (gamma > 0).all()


def test_second_order_converges_with_its_order_stops_at_0_and_keeps_no_graph():
    test_splam.test_a_solver_converges_to_the_probability_flow_with_its_order(second_order, 2)


@pytest.mark.parametrize("t, s", [(999, 899), (599, 499), (199, 99), (19, 0), (2, 1), (1, 0)])
def test_a_second_order_step_is_that_of_diffusers(t, s):
    """Its solver is told our middle, which it would choose from a grid of its own, and that both steps count."""
    called, x, times = [], points(16, t).double(), torch.full((16,), t)

    def denoise(x, times):
        called.append(times[0].item())
        return test_splam.mixture_denoiser(x, times)

    ours = second_order(denoise, SD, x, times, times - (t - s), t - s, t - s)
    middle = called[1]
    assert called == [t, middle] and s <= middle < t
    options = dict(algorithm_type="dpmsolver++", prediction_type="sample")
    theirs = DPMSolverSinglestepScheduler(**test_splam.STABLE_DIFFUSION, **options)
    theirs.set_timesteps(timesteps=[t, middle, s])
    theirs.order_list, theirs.model_outputs = [1, 2, 1], [None, None]
    for step in (t, middle):
        x = theirs.step(test_splam.mixture_denoiser(x, torch.full((16,), step))[0], step, x).prev_sample
    close(ours, x)


@pytest.mark.parametrize("row, flags", [
    ("the toy's schedule", []), ("Stable Diffusion's", ["--beta_start", "0.00085", "--beta_end", "0.012"]),
])  # fmt: skip
def test_where_chains_of_solver_steps_end(row, flags):
    """The table of note 17, again: where LCM's training ends, beside where scipy's solver does."""
    schedule = ["--beta_schedule", "scaled_linear"] if flags else []
    model = teacher.new_model(teacher.parse(["--data", "ideal:8gaussians", *schedule, *flags]))
    denoise, (x, t, end) = partial(model.predict, cond={}), (points(1024), torch.full((1024,), 999), torch.zeros(1024))
    truth = model.mixture.endpoint(x.double(), *model.schedule.at(t[:1], 2))
    chains = [(multiple_estimation, k) for k in (20, 50, 100, 200)] + [(second_order, k) for k in (50, 100, 200)]
    found = [solver(denoise, model.schedule, x, t, end.long(), 999, k) for solver, k in chains]
    (line,) = re.findall(rf"^\| {row} \|(.*)\|$", (ROOT / "docs/equations.md").read_text(), re.MULTILINE)
    errors = [(x - truth).norm(dim=1).mean().item() for x in found]
    assert errors == pytest.approx([float(error) for error in line.split("|")], rel=0.05)


def test_a_second_order_step_begins_where_no_signal_is_left():
    """Zero terminal SNR: there log(α/σ) is minus infinity, and nothing may become nan of it. Data of one point."""

    def denoise(x, t):
        alpha, sigma = PURE_NOISE.at(t, 2)
        return torch.full_like(x, 0.5), (x - alpha * 0.5) / sigma

    x_t, t = points(16), torch.full((16,), 999)
    alpha, sigma = PURE_NOISE.at(t - 100, 2)
    close(second_order(denoise, PURE_NOISE, x_t, t, t - 100, 100, 100), alpha * 0.5 + sigma * x_t)


@pytest.mark.parametrize("t", [999, 599, 199])
def test_one_second_order_step_is_more_accurate_than_five_of_ddim(t):
    x_t = (SD.alpha[t] * MIXTURE.sample(64, seeded(1))[0] + SD.sigma[t] * points(64, t)).double()
    truth, way = test_splam.flow(x_t, t, t - 100), (x_t, torch.full((64,), t), torch.full((64,), t - 100), 100)
    second, first = (
        (solver(test_splam.mixture_denoiser, SD, *way, step) - truth).square().mean()
        for solver, step in ((second_order, 100), (multiple_estimation, 20))
    )
    assert second < first / 1.5
