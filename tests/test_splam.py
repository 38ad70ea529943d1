"""The paper's mathematics against oracles that this project did not write: diffusers' DDIM and LCM schedulers, scipy's
ODE solver, and the paper's own formulas in float64, computed here from ᾱ. It follows splam.py's notation and order."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import unet
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

import splam
from splam import ConsistencyFunction, Schedule, SubPathPoint, SubPathStudent, multiple_estimation, sub_path_point
from toy.distributions import DISTRIBUTIONS
from toy.mlp import PointMLP

LINES, SIGMAS, PREDICTION_TYPES = ["sl", "dl"], ["linear", "markov"], ["epsilon", "v_prediction"]
each_ode = pytest.mark.parametrize("ode", LINES)
each_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
each_kind = pytest.mark.parametrize("kind", [ConsistencyFunction, SubPathStudent])

# Stable Diffusion's schedule, the same with zero terminal SNR, and three sub-paths (t, s): clean, middle, noisy.
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SD = Schedule(DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod)
PURE_NOISE = Schedule(DDPMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod)
SD_PATHS = [(19, 0), (499, 399), (999, 899)]
MIXTURE = DISTRIBUTIONS["8gaussians"]


def close(actual, expected, tol=1e-5):
    """Each row of a batch is right to `tol` of its largest element."""
    assert actual.shape == expected.shape
    actual, expected = (a.detach().double().reshape(len(a), -1) for a in (actual, expected))
    error, size = (actual - expected).abs().amax(1), expected.abs().amax(1)
    assert (error <= tol * size).all(), f"relative error {(error / size).max():.3g}"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def points(n=64, seed=1):
    return torch.randn(n, 2, generator=seeded(seed))


def denoiser(network, schedule=SD, prediction_type="epsilon"):
    return lambda x, t: splam.to_x0_eps(network(x, t).sample, x, *schedule.at(t, x.ndim), prediction_type)


class SubPaths:
    """Random sub-paths on a schedule that is to be tested; what the tests compute themselves is in float64, from ᾱ."""

    def __init__(self, num_train_timesteps, beta_schedule, shape, seed):
        self.abar = DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule).alphas_cumprod.double()
        self.schedule, g = Schedule(self.abar), seeded(seed)
        self.k = torch.randint(1, num_train_timesteps, (), generator=g).item()
        self.t = torch.randint(1, num_train_timesteps, shape[:1], generator=g)
        self.s, self.gamma = (self.t - self.k).clamp_min(0), torch.rand(shape[0], generator=g)
        self.x0, self.eps = torch.randn(2, *shape, generator=g, dtype=torch.float64)
        self.x_t, self.x_s = (alpha * self.x0 + sigma * self.eps for alpha, sigma in (self.at(self.t), self.at(self.s)))

    def at(self, t):
        """(α_t, σ_t) of Eq. 1."""
        abar = splam.per_sample(self.abar[t], self.x0.ndim)
        return abar.sqrt(), (1 - abar).sqrt()

    def point(self, ode, sigma, gamma=None, ends=None):
        gamma = self.gamma if gamma is None else torch.full_like(self.gamma, gamma)
        return sub_path_point(*(ends or (self.x_t, self.x_s)), self.t, self.s, gamma, self.schedule, ode, sigma)


seeds = st.integers(0, 2**32 - 1)
beta_schedules = st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])
sub_paths = st.builds(SubPaths, st.integers(50, 1000), beta_schedules, st.sampled_from([(6, 2), (3, 3, 4, 4)]), seeds)


# -- 1  Schedule, denoiser, ODE solver --------------------------------------------------------------------------------
@given(sub_paths)
def test_schedule_is_the_square_root_of_alphas_cumprod_on_every_device(case):
    """Two devices may share it, so no table moves; "meta" is a second device that every machine has."""
    for device in ("cpu", "meta", "cpu"):
        found = case.schedule.at(case.t.to(device), case.x0.ndim)
        assert {(part.dtype, part.device.type) for part in found} == {(torch.float32, device)}
        assert case.schedule.alpha.device.type == case.schedule.sigma.device.type == "cpu"
    for actual, expected in zip(found, case.at(case.t), strict=True):
        close(actual, expected, 1e-7)


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(-1, 15), seeds)
def test_conversions_and_guidance(alpha, sigma, w, seed):
    """For any α and σ, since inside a sub-path α² + σ² ≠ 1, and α + σ ≠ 1 where the path is flow matching's. Eq. 18 is
    what diffusers' pipelines compute, uncond + guidance_scale (cond - uncond), with a scale that is 1 larger."""
    x0, eps = torch.randn(2, 5, 2, generator=seeded(seed), dtype=torch.float64)
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}
    for prediction_type, output in outputs.items():
        found = splam.to_x0_eps(output, alpha * x0 + sigma * eps, alpha, sigma, prediction_type)
        torch.testing.assert_close(found, (x0, eps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(splam.guided(x0, eps, w), eps + (w + 1) * (x0 - eps))
    assert torch.equal(splam.guided(x0, eps, 0), x0)


def mixture_denoiser(x, t, mixture=MIXTURE):
    alpha, sigma = (c.double() for c in SD.at(t, x.ndim))
    eps = mixture.eps(x, alpha, sigma)
    return (x - sigma * eps) / alpha, eps


def flow(x_t, t, s):
    """x_s on the PF-ODE. Eq. 3 in z = x/α and ρ = σ/α is dz/dρ = ε; scipy solves that for a mixture."""
    rho_t, rho_s = ((SD.sigma[time].double() / SD.alpha[time].double()).item() for time in (t, s))

    def velocity(rho, z):
        alpha = torch.tensor([[1 / math.sqrt(1 + rho**2)]], dtype=torch.float64)
        return MIXTURE.eps(alpha * torch.from_numpy(z).view(-1, 2), alpha, rho * alpha).flatten().numpy()

    z = solve_ivp(velocity, (rho_t, rho_s), (x_t / SD.alpha[t]).flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-10).y
    return SD.alpha[s] * torch.from_numpy(z[:, -1]).view(-1, 2)


@pytest.mark.parametrize("solver, order", [(multiple_estimation, 1)])
def test_a_solver_converges_to_the_probability_flow_with_its_order(solver, order):
    def solve(t, s, k, solver_step):
        t, s = (torch.as_tensor(time).expand(16) for time in (t, s))
        return solver(mixture_denoiser, SD, x_t, t, s, k, solver_step)

    for t, s in [(999, 745), (650, 396), (300, 44)]:  # 254 is no whole number of steps of 16
        x_t, steps = torch.randn(16, 2, generator=seeded(t), dtype=torch.float64), [16, 8, 4, 2]
        truth = flow(x_t, t, s)
        errors = [(solve(t, s, t - s, step) - truth).square().mean().sqrt().item() for step in steps]
        assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.06), errors
        assert errors[-1] < 1e-3
    # A sub-path that is cut off at time 0 is the shorter one, in a batch with a longer one, too.
    close(solve(35, 0, 100, 10), solve(35, 0, 35, 10))
    mixed = solve(torch.tensor([35, 135]).repeat(8), 0, 140, 10)
    close(mixed[::2], solve(35, 0, 40, 10)[::2])
    close(mixed[1::2], solve(135, 0, 140, 10)[1::2])
    # It keeps no graph of the teacher, though its weights could take a gradient: that would hold all m calls in memory.
    weight, t = torch.ones((), requires_grad=True), torch.full((16,), 499)
    assert not solver(lambda x, t: (weight * x, weight * x), SD, x_t, t, t - 100, 100, 50).requires_grad


# -- 2  The line between the ends of a sub-path -----------------------------------------------------------------------
@given(sub_paths)
@each_ode
def test_closed_forms_of_the_paper(ode, case):
    """Eq. 12, 14, 24 for SL and 26, 27, 28 for DL, and the linear σ of both, for any two points. γ = 1 is x_t with its
    own schedule; γ = 0 is x_s with its own, times r for SL: so a sub-path ends where the next one starts."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = case.at(case.t), case.at(case.s)
    g, r, x_t, x_s = splam.per_sample(case.gamma.double(), case.x0.ndim), alpha_t / alpha_s, case.x0, case.eps
    if ode == "sl":
        x = (1 - g) * r * x_s + g * x_t
        alpha, linear = alpha_t, (1 - g) * r * sigma_s + g * sigma_t
        variance = r**2 * sigma_s**2 + g**2 * (1 - r**2)
        end = r * x_s, r * alpha_s, r * sigma_s
        close(x / alpha, (1 - g) * x_s / alpha_s + g * x_t / alpha_t)  # note 3: a straight line in z = x/α
    else:
        x = (1 - g) * x_s + g * x_t
        alpha, linear = (1 - g) * alpha_s + g * alpha_t, (1 - g) * sigma_s + g * sigma_t
        variance = (1 - g + g * r) ** 2 * sigma_s**2 + g**2 * (1 - r**2)
        end = x_s, alpha_s, sigma_s
    half = x_t.bfloat16(), x_s.bfloat16()
    for sigma, noise in {"linear": linear, "markov": variance.sqrt()}.items():
        for gamma, expected in ((None, (x, alpha, noise)), (1, (x_t, alpha_t, sigma_t)), (0, end)):
            for actual, right in zip(case.point(ode, sigma, gamma, (x_t, x_s)), expected, strict=True):
                close(actual, right)
        rounded = (case.point(ode, sigma, ends=ends) for ends in (half, [x.float() for x in half]))
        for actual, right in zip(*rounded, strict=True):  # ends in bfloat16 cost the schedule no precision
            assert actual.dtype == torch.float32 and torch.equal(actual, right)


@given(sub_paths, st.integers(1, 1000))
@each_ode
def test_linear_sigma_follows_ddim_and_recovers_x0_when_the_ends_share_their_noise(ode, case, solver_step):
    """With the true ε every DDIM step is exact, so that the solver arrives at s by any steps, and Eq. 14 gives x_0 for
    every γ. Note 3: x_γ is where DDIM gets from t when it stops at the ratio σ_γ/α_γ, which for SL is linear in γ."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = case.at(case.t), case.at(case.s)
    way = case.schedule, case.x_t, case.t, case.s, case.k, min(solver_step, case.k)
    x_s = multiple_estimation(lambda x, t: (case.x0, case.eps), *way)
    close(x_s, case.x_s)
    x, alpha, sigma = case.point(ode, "linear", ends=(case.x_t, x_s))
    close(alpha * case.x0, x - sigma * case.eps, 2e-6 / alpha.min().item())
    rho, g = sigma.double() / alpha.double(), splam.per_sample(case.gamma.double(), case.x0.ndim)
    close(x / alpha, case.x_t / alpha_t + (rho - sigma_t / alpha_t) * case.eps)
    if ode == "sl":
        close(rho, (1 - g) * sigma_s / alpha_s + g * sigma_t / alpha_t)


@pytest.mark.parametrize("path, rms", [*zip(SD_PATHS, [0.0100, 0.0981, 1.207], strict=True)])
def test_which_sigma_is_right_depends_on_the_coupling_of_the_ends(path, rms):
    """At γ = 1/2 the noise x_γ - α_γ x_0 has the standard deviation σ_γ: within 5 standard errors, or clearly not. In
    training, where the ends share their noise, the other σ misses x_0 by Eq. 25 over α_t (note 2)."""
    n, (t, s) = 200_000, (torch.tensor([time]) for time in path)
    r, (x0, eps, fresh) = SD.alpha[t] / SD.alpha[s], torch.randn(3, n, 1, generator=seeded(0))
    shared, x_s = (SD.alpha[time] * x0 + SD.sigma[time] * eps for time in (t, s))
    chain = r * x_s + (1 - r**2).sqrt() * fresh  # Eq. 20

    def point(ode, sigma, gamma, x_t=shared):
        return sub_path_point(x_t, x_s, t, s, torch.tensor([gamma]), SD, ode, sigma)

    def standard_errors(*choice):
        x, alpha, sigma = point(*choice)
        return ((x - alpha * x0).square().mean().sqrt() / sigma - 1).abs().item() * math.sqrt(2 * n)

    for ode in LINES:
        assert standard_errors(ode, "linear", 0.5, shared) < 5 < 10 < standard_errors(ode, "markov", 0.5, shared)
        assert standard_errors(ode, "markov", 0.5, chain) < 5 < 10 < standard_errors(ode, "linear", 0.5, chain)
    for sigma, miss in (("linear", 0), ("markov", rms)):
        x, alpha, noise = point("sl", sigma, 0.5)
        found = ((x - noise * eps) / alpha - x0).square().mean().sqrt().item()
        assert found == pytest.approx(miss, rel=0.01, abs=1e-4 * rms)
    for gamma in (0.1, 0.5, 0.9):  # Eq. 25 is positive inside
        assert point("sl", "linear", gamma).sigma > 1.001 * point("sl", "markov", gamma).sigma


# -- 3  The student ---------------------------------------------------------------------------------------------------
def network(seed=0):
    torch.manual_seed(seed)
    return PointMLP(width=32, depth=1, time_dim=16)


def student_of(teacher, kind=SubPathStudent, schedule=SD, prediction_type="epsilon"):
    """A training student around a copy of `teacher`, whose γ-projection, if it has one, is large and random."""
    student = kind(copy.deepcopy(teacher), schedule, prediction_type)
    if kind is SubPathStudent:
        nn.init.normal_(student.network.time_embedding.projection.weight)
    return student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gamma_embedding_is_zero_at_1_and_has_sixteen_frequencies_from_a_quarter_turn_to_four_turns(dtype):
    """In float32, whatever γ is in."""
    assert torch.equal(splam.gamma_embedding(torch.ones(3, dtype=dtype)), torch.zeros(3, splam.GAMMA_DIM))
    gamma = torch.rand(500, generator=seeded(0)).to(dtype)
    turns = 0.25 * 16 ** (torch.arange(16, dtype=torch.float64) / 15)  # each a constant factor above the last
    expected = torch.exp(2j * math.pi * (1 - gamma.double())[:, None] * turns)
    sine, cosine = splam.gamma_embedding(gamma).double().chunk(2, dim=1)
    torch.testing.assert_close(torch.complex(cosine + 1, sine), expected, rtol=0, atol=1e-5)


def test_boundary_condition_is_that_of_lcm():
    """Eq. 5 at every time."""
    oracle = LCMScheduler().get_scalings_for_boundary_condition_discrete(torch.arange(1000.0).double()[:, None])
    for actual, expected in zip(splam.boundary(torch.arange(1000), 2), oracle, strict=True):
        close(actual, expected, 1e-6)


@each_prediction_type
@each_kind
def test_student_at_gamma_1_is_the_teacher(kind, prediction_type):
    """Whatever the γ-projection is. The teacher's denoiser and boundary condition are those of LCMScheduler."""
    for seed, schedule in enumerate(["linear", "scaled_linear", "squaredcos_cap_v2"]):
        case, oracle = SubPaths(700, schedule, (20, 2), seed), LCMScheduler(700, prediction_type=prediction_type)
        oracle.alphas_cumprod = case.abar
        teacher, x_t, expected = network(), case.x_t.float(), []
        for row, t, x in zip(teacher(x_t, case.t).sample, case.t.tolist(), x_t, strict=True):
            oracle.set_timesteps(timesteps=[t])
            expected.append(oracle.step(row.double(), t, x.double()).denoised)
        student = student_of(teacher, kind, case.schedule, prediction_type)
        told = torch.ones(20), case.point("sl", "linear", 1, (x_t, x_t))
        for prediction in (student(x_t, case.t), student(x_t, case.t, *told)):
            close(prediction, torch.stack(expected), 1e-4)


@each_prediction_type
@each_kind
def test_at_time_0_the_student_is_the_identity(kind, prediction_type):
    """Eq. 5: F(x, 0) = x to the bit, whatever the network says, and whatever γ, signal and noise it is told."""
    student, x, zero = student_of(network(), kind, SD, prediction_type), 3 * points(), torch.zeros(64).long()
    told = torch.full((64,), 0.5), SubPathPoint(x, torch.full((64, 1), 0.6), torch.full((64, 1), 0.3))
    assert torch.equal(student(x, zero), x) and torch.equal(student(x, zero, *told), x)


@pytest.mark.parametrize("kind", [SubPathStudent])
def test_a_schedule_may_end_in_pure_noise(kind, monkeypatch):
    """Where it ends with α = 0, a v network's x_0 is -v. There γ = 0, which is 0/0, must not be drawn."""
    teacher, x, t = network(), points(), torch.full((64,), 999)
    student = student_of(teacher, kind, PURE_NOISE, "v_prediction")
    close(student(x, t), -teacher(x, t).sample)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape))  # torch.rand can return 0
    draws = splam.draw(x, 1000, 1, seeded(0))
    assert (draws.t == 999).all() and (draws.gamma > 0).all()
    teacher = denoiser(teacher, PURE_NOISE, "v_prediction")
    loss = splam.splad_loss(student, student, teacher, PURE_NOISE, x, {}, draws, k=100, solver_step=20)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_prediction_type
def test_x0_is_computed_in_float32_whatever_the_network_computes_in(prediction_type, dtype):
    x, t, answer = points(4), torch.tensor([0, 19, 499, 999]), SimpleNamespace(sample=points(4, 2).to(dtype))
    student = ConsistencyFunction(lambda x, t: answer, SD, prediction_type)
    prediction, answer.sample = student(x, t), answer.sample.float()
    assert prediction.dtype == torch.float32 and torch.equal(prediction, student(x, t))


def test_copies_of_a_student_see_their_own_gamma(tmp_path):
    """Each sample its own. Note 10: a hook left behind on the original would make a copy deaf to γ without an error."""
    x, t = points(4), torch.tensor([99, 399, 699, 999])
    teacher, student, loaded = network(), student_of(network()), student_of(network(1))

    def at(student, *gamma):  # where x, t and the point do not depend on γ
        return student(x, t, torch.tensor(gamma).expand(4), SubPathPoint(x, *SD.at(t, 2)))

    torch.save(student.state_dict(), tmp_path / "student.pt")
    loaded.load_state_dict(torch.load(tmp_path / "student.pt"))
    copied, expected = copy.deepcopy(student), at(student, 0.3)
    student.network.time_embedding.projection.weight.data.zero_()
    plain = ConsistencyFunction(teacher, SD, "epsilon")(x, t)
    assert torch.equal(at(student, 0.3), plain) and not torch.equal(expected, plain)
    for other in (copied, loaded):
        assert torch.equal(at(other, 0.3), expected) and not torch.equal(at(other, 0.6), expected)
        close(at(other, 0.3, 1.0, 0.6, 0.3), torch.stack([expected[0], plain[1], at(other, 0.6)[2], expected[3]]))
        assert torch.equal(other(x, t), plain) and torch.equal(at(other, 1.0), plain)


@each_kind
def test_after_training_the_projection_of_gamma_can_be_dropped(kind):
    """F at γ = 1 does not know W, and the other weights have the teacher's names."""
    finished, plain, x, t = student_of(network(), kind), network(9), points(4), torch.tensor([19, 399, 699, 999])
    plain.load_state_dict(finished.plain_state_dict())
    assert torch.equal(ConsistencyFunction(plain, SD, "epsilon")(x, t), finished(x, t))


# -- 4  Algorithm 1 ---------------------------------------------------------------------------------------------------
@given(st.floats(1e-6, 1e3), seeds)
def test_distances(scale, seed):
    a, b = scale * torch.randn(2, 5, 2, generator=seeded(seed))
    d, c = a.double() - b.double(), 1e-3
    for metric, expected in {"l2": d**2, "huber": (d**2 + c**2) ** 0.5 - c}.items():
        found = splam.distance(a, b, metric).double()  # a number for each sample, which a weight could multiply
        torch.testing.assert_close(found, expected.mean(1), rtol=1e-4, atol=2e-10)


@given(st.integers(1, 20), st.integers(1, 50), seeds)
def test_draws_are_repeatable_and_independent_and_on_the_grid_of_sampling(step, starts, seed):
    """All numbers are drawn on the CPU, so that they are the same wherever x_0 is and the draws are put."""
    x0, here, there = torch.zeros(64, 2), seeded(seed), seeded(seed)
    draws, elsewhere = (splam.draw(x, step * starts, starts, g) for x, g in ((x0, here), (x0.to("meta"), there)))
    assert {part.device.type for part in elsewhere} == {"meta"} and torch.equal(here.get_state(), there.get_state())
    assert all(map(torch.equal, draws, splam.draw(x0, step * starts, starts, seeded(seed))))
    assert set(draws.t.tolist()) <= set(range(step - 1, step * starts, step))
    assert len(draws.gamma.unique()) == 64 and len(draws.noise.unique()) == 128
    t, gamma, _ = splam.draw(torch.zeros(5000, 1), 1000, 50, seeded(0))
    assert set(t.tolist()) == set(splam.few_step_times(50, 1000, 50)) == set(range(19, 1000, 20))
    assert abs(gamma.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 5000)


def algorithm_1():
    """(student, target, teacher network, its denoiser, x_0, draws): all networks different, all with gradients."""
    teacher, x0 = network(), points()
    student, target = student_of(network(1)), student_of(network(2))
    return student, target, teacher, denoiser(teacher), x0, splam.draw(x0, 1000, 50, seeded(0))


def loss_and_gradients(ode, draws=None, **options):
    student, target, teacher, denoise, x0, drawn = algorithm_1()
    options = dict(k=100, solver_step=20, ode=ode) | options
    loss = splam.splad_loss(student, target, denoise, SD, x0, {}, draws or drawn, **options)
    loss.backward()
    return loss.detach(), [[p.grad for p in module.parameters()] for module in (student, target, teacher)]


@each_ode
def test_only_the_student_gets_a_gradient(ode):
    """The whole student, its γ-projection included; target and teacher none, though they could take one."""
    _, (student, target, teacher) = loss_and_gradients(ode)
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in student)
    assert all(grad is None for grad in target + teacher)


@pytest.mark.parametrize("ode", ["lcm", *LINES])
def test_loss_is_eq_17_and_for_lcm_eq_7(ode):
    """With diffusers' own noising and DDIM step; d = L2, k = k_φ = 20. Another solver may find x_s."""
    student, target, teacher, _, x0, (t, gamma, noise) = algorithm_1()
    ddim = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)
    s, x_t = (t - 20).clamp_min(0), ddim.add_noise(x0, noise, t)
    output = teacher(x_t, t).sample
    x_s = torch.stack([ddim.step(o, n, x).prev_sample for o, n, x in zip(output, t.tolist(), x_t, strict=True)])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SD.at(t, 2), SD.at(s, 2)
    drift, g = (alpha_t / alpha_s if ode == "sl" else 1), gamma[:, None]
    lines = ((drift * at_s, at_t) for at_s, at_t in ((x_s, x_t), (alpha_s, alpha_t), (sigma_s, sigma_t)))
    point = SubPathPoint(*((1 - g) * end + g * start for end, start in lines))
    prediction = student(x_t, t) if ode == "lcm" else student(point.x, t, gamma, point)
    expected = (prediction - target(x_s, s)).square().mean().detach()
    for options in ({}, {"solver": lambda *_: x_s.detach(), "solver_step": 5}):
        torch.testing.assert_close(loss_and_gradients(ode, k=20, **options)[0], expected, rtol=1e-4, atol=0)


def test_gamma_1_is_lcm_for_both_odes_to_the_bit():
    """Section 4: LCM is SPLAM at γ ≡ 1. With γ < 1 the three losses differ."""
    at_1 = algorithm_1()[-1]._replace(gamma=torch.ones(64))
    lcm, (gradients, *_) = loss_and_gradients("lcm")
    for ode in LINES:
        loss, (same, *_) = loss_and_gradients(ode, at_1)
        assert torch.equal(loss, lcm) and all(map(torch.equal, same, gradients))
    assert len({loss_and_gradients(ode)[0].item() for ode in splam.ODES}) == 3


def test_a_misspelt_option_is_an_error():
    """A name that is no known one must not silently be another."""
    misspelt = [("SL", {}), ("LCM", {}), ("", {}), ("sl", {"metric": "l1"}), ("dl", {"sigma_form": None})]
    for ode, options in [*misspelt, ("lcm", {"sigma_form": "exact"})]:
        with pytest.raises(ValueError, match="is none of"):
            loss_and_gradients(ode, **options)
    for prediction_type in ("Flow", "sample", "eps"):
        with pytest.raises(ValueError, match=prediction_type):
            ConsistencyFunction(network(), SD, prediction_type)(points(1), torch.tensor([99]))


def test_gradient_checkpointing_changes_no_gradient():
    """With two passes before one backward: what is computed again must see the γ of its own pass, not the last."""

    def gradients(checkpointing):
        network, x0, loss = unet(), torch.randn(2, 3, 8, 8, generator=seeded(1)), 0
        if checkpointing:
            network.enable_gradient_checkpointing()
        student, options = student_of(network.train()), dict(k=20, solver_step=20)
        for seed in (0, 1):
            draws = splam.draw(x0, 1000, 50, seeded(seed))
            loss += splam.splad_loss(student, lambda x, t: x, lambda x, t: (x, x), SD, x0, {}, draws, **options)
        loss.backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    plain = gradients(False)
    assert plain["network.time_embedding.projection.weight"].abs().max() > 1e-4
    torch.testing.assert_close(gradients(True), plain, rtol=1e-4, atol=1e-7)


@each_ode
def test_loss_of_a_perfect_student_is_zero_with_the_linear_sigma_only(ode):
    """Teacher, student and target know x_0 and ε, so the coefficients are all that can go wrong. They want a condition.
    Under autocast the schedule stays float32: what the student is shown is the same to the bit."""
    x0, shown = points(), []
    draws = splam.draw(x0, 1000, 50, seeded(0))

    def perfect(x, t, gamma=None, point=None, *, label):
        shown.extend(point or [])
        alpha, sigma = SD.at(t, 2) if point is None else point[1:]
        return (x - sigma * draws.noise) / alpha

    def losses():
        networks = perfect, perfect, lambda x, t: (x0, draws.noise), SD, x0, {"label": 0}, draws
        options = dict(k=100, solver_step=20, ode=ode)
        return torch.stack([splam.splad_loss(*networks, **options, sigma_form=sigma) for sigma in SIGMAS])

    linear, markov = found = losses()
    assert linear < 1e-9 and markov > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses(), found)
    assert {part.dtype for part in [found, *shown]} == {torch.float32} and all(map(torch.equal, shown[:6], shown[6:]))


class Gaussian:
    """Data N(0, c²), where all is linear in z = x/α: a perfect teacher, and the student to which its steps of 20 lead,
    told (t, γ). In closed form (docs/equations.md, note 16): G(t) is the true map times cos Δθ a step, tan θ = ρ/c."""

    def __init__(self, c, k, ode="sl"):
        self.c, self.k, self.ode = c, k, ode
        self.rho = (SD.sigma / SD.alpha)[[0, *range(19, 1000, 20)]].double()  # the grid, and where it ends
        self.truth = SD.alpha[0] * ((c**2 + self.rho[0] ** 2) / (c**2 + self.rho**2)).sqrt()
        self.G = torch.cat([self.truth[:1], self.truth[1:] * (self.rho / c).atan().diff().cos().cumprod(0)])

    def denoise(self, x, t):
        alpha, sigma = SD.at(t, x.ndim)
        variance = (alpha * self.c) ** 2 + sigma**2
        return alpha * self.c**2 / variance * x, sigma / variance * x

    def __call__(self, x, t, gamma=None, point=None):
        """G(t) z_t: x_γ determines x_t, because the solver leads from z_t to z_s = z_t G(t)/G(s)."""
        g, s = 1 if gamma is None else gamma[:, None], (t - self.k).clamp_min(0)
        (at_t, _), (at_s, _) = SD.at(t, 2), SD.at(t if self.ode == "sl" else s, 2)  # the signal at SL's ends is one
        G_t, G_s = (self.G[(time + 1) // 20][:, None] for time in (t, s))
        return x / ((1 - g) * at_s / G_s + g * at_t / G_t)

    def loss(self, student=None, ode="sl", **options):
        """Of a student whose target is itself, at every start of the grid."""
        x0, t = self.c * torch.randn(500, 1, generator=seeded(1)), torch.arange(19, 1000, 20).repeat(10)
        draws, student = splam.draw(x0, 1000, 50, seeded(0))._replace(t=t), student or self
        options = dict(k=self.k, solver_step=20, ode=ode) | options
        return splam.splad_loss(student, student, self.denoise, SD, x0, {}, draws, **options).item()


@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize("c, size", [(0.5, 0.9512), (1.0, 0.9729)])
def test_lcm_and_splam_have_one_fixed_point_for_gaussian_data_and_it_is_a_product_of_cosines(c, size, k):
    """Note 16. It depends on the solver's step, and not on k, γ, the line or σ. `size` is G(999) over the true map."""
    case = Gaussian(c, k)
    assert (case.G[-1] / case.truth[-1]).item() == pytest.approx(size, abs=5e-5)
    assert case.loss(ode="lcm") < 1e-10 < 1e-8 < case.loss(ode="lcm", solver_step=10)
    for ode, sigma in [("sl", "linear"), ("sl", "markov"), ("dl", "linear"), ("dl", "markov")]:
        assert Gaussian(c, k, ode).loss(ode=ode, sigma_form=sigma) < 1e-10


@given(st.floats(0, 0.999), st.integers(1, 20))
def test_ema_of_a_constant_student_closes_in_geometrically(decay, updates):
    """In the precision of the average, not of the student. Statistics that a network keeps of its inputs are buffers,
    and no weights: they stay each network's own."""
    target, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(student.weight)
    student(100 + torch.randn(8, 3))
    before, constant = copy.deepcopy(target.state_dict()), copy.deepcopy(student.bfloat16().state_dict())
    for _ in range(updates):
        splam.ema_update(target, student, decay)
    for name, value in target.state_dict().items():
        expected, old = constant[name].double(), before[name].double()
        expected = expected + decay**updates * (old - expected) if name in ("weight", "bias") else old
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, constant[name]) for name, value in student.state_dict().items())


# -- 5  Sampling ------------------------------------------------------------------------------------------------------
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
    """Eq. 19 and its repetition, with the same condition and noises; what is yielded last is the sample."""
    oracle = LCMScheduler(**STABLE_DIFFUSION, prediction_type=prediction_type)
    oracle.set_timesteps(steps, original_inference_steps=50)
    teacher, noise, ours, theirs = PointMLP(32, 1, 16, num_class_embeds=2), points(16, 0), seeded(1), seeded(1)
    student, times = ConsistencyFunction(teacher, SD, prediction_type), splam.few_step_times(steps, 1000, 50)
    cond = {"class_labels": torch.arange(2).repeat(8)}
    path = list(splam.few_step_sample(student, SD, noise, times, lambda: torch.randn(16, 2, generator=ours), **cond))
    x = noise
    for predicted, t in zip(path, oracle.timesteps, strict=True):
        step = oracle.step(teacher(x, t, **cond).sample, t, x, generator=theirs)
        x = step.prev_sample
        close(predicted, step.denoised, 1e-4)
    close(path[-1], x, 1e-4)
