"""The Sub-Path Linear Approximation Model (SPLAM, Xu et al., ECCV 2024) as a chapter to read beside the paper.

"Eq. 12" below is the paper's Eq. 12; docs/equations.md has all of them in one place. "Section 4.2.2" is the paper's,
"section 2" is below. This file holds the paper's method, and needs only torch. What goes beyond the paper stands in
improved.py.

    1  A diffusion model and its ODE        Eq. 1-3, 8, 18      Schedule, to_x0_eps, guided, multiple_estimation
    2  The line that replaces a sub-path    Eq. 9-14, 20-28     sub_path_point
    3  The student                          Eq. 5, 14, 16       boundary, ConsistencyFunction, SubPathStudent
    4  Algorithm 1                          Eq. 4-7, 15, 17     distance, draw, splad_loss, ema_update
    5  Sampling in a few steps              Eq. 19              few_step_times, few_step_sample

Notation
    N            number of time steps of the diffusion process (1000); times t are integers in 0..N-1, larger is noisier
    α_t, σ_t     signal and noise at time t, α_t² + σ_t² = 1 ("variance preserving"):  x_t = α_t x_0 + σ_t ε
    ρ            noise-to-signal ratio σ/α
    t, s         start (noisier, the paper's t_{n+k}) and end (cleaner, t_n) of a sub-path;  s = max(t - k, 0)
    r            drift ratio α_t / α_s, smaller than 1
    k, k_φ, m    length of a sub-path, length of a solver step (both in time steps), solver steps in a sub-path:
                 m = k / k_φ
    γ            place on the line: 1 at the start x_t, 0 at the shrunken end r x_s
    c, ∅         condition (a text, or a class), and the empty one
    w            guidance scale in ε + w (ε - ε_∅): w = 8 here is guidance_scale 9 in diffusers
    θ, θ⁻        weights of the student, and their running average (the "target")
    f, F         The paper swaps these letters. In Eq. 4 to 7, f maps a point of a trajectory to the trajectory's
                 end, and F is the bare network in it. From Eq. 8 on, f is the denoiser "x_0 from x and ε", and from
                 Eq. 16 on F is that denoiser with the boundary condition. Here F_θ always means the F of Eq. 16. (In
                 Eq. 2 and 3, f and g are the drift and the diffusion of the process.)

Shapes: x is (B, ...): points (B, 2), or pixels or latents (B, C, H, W). t, s and γ are (B,). All that comes from the
noise schedule is computed in float32, whatever precision the networks compute in. Half precision keeps two or three
digits of α and σ, and x̂_0 = (x - σ ε)/α multiplies such an error by σ/α, which is 15 at t = 999 of Stable Diffusion's
schedule.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# 1  A diffusion model and its ODE (Section 3)
#
# Diffusion adds noise to data. Eq. 1 says how much there is at time t: x_t = α_t x_0 + σ_t ε. Eq. 2 is the stochastic
# differential equation that does it, dx = f(t) x dt + g(t) dw, with f = d log α/dt and g² = dσ²/dt - 2 f σ². It has no
# code, because Eq. 1 reaches every time in one jump.
#
# Eq. 3, the probability flow ODE (PF-ODE), turns noise back into data without any randomness:
#
#     dx/dt = f x - g²/2 · ∇ log p_t(x)     with     ∇ log p_t(x) = -ε(x, t)/σ
#
# Divide x by α, so z = x/α, and measure time by the noise-to-signal ratio ρ = σ/α. In dz/dt the decay of α cancels the
# term f x, and g² ε / (2 σ α) is left. The definition of g² makes g² / (2 σ α) equal to (dσ/dt - f σ)/α, which is
# dρ/dt. So
#
#     dz/dρ = ε(x, t)                                                                                          (PF-ODE)
#
# with no noise schedule in it. Euler's method for this ODE, z_s = z_t + (ρ_s - ρ_t) ε, is DDIM: with Eq. 8,
# x̂_0 = (x_t - σ_t ε)/α_t, it reads x_s = α_s x̂_0 + σ_s ε. Section 2 becomes simple in z and ρ, too.
# ---------------------------------------------------------------------------------------------------------------------


class Schedule:
    """α_t and σ_t of Eq. 1 as float32 tables, from ᾱ_t = α_t², which diffusers' schedulers call `alphas_cumprod`.

    They are no buffers of a module: a checkpoint does not hold them, and a cast of the model to half precision does not
    reach them.
    """

    def __init__(self, alphas_cumprod: Tensor):
        self.alpha = alphas_cumprod.double().sqrt().float()
        self.sigma = (1 - alphas_cumprod.double()).sqrt().float()

    def __len__(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t) for integer times t (B,), each shaped (B, 1, ...) so that it multiplies an x of `ndim` dims."""
        return per_sample(self.alpha.to(t.device)[t], ndim), per_sample(self.sigma.to(t.device)[t], ndim)


def per_sample(values: Tensor, ndim: int) -> Tensor:
    """(B,) -> (B, 1, ...) of `ndim` dims: one number for each sample, shaped to multiply x."""
    return values.view((-1,) + (1,) * (ndim - 1))


def to_x0_eps(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The denoiser of Eq. 8, x̂_0 = (x - σ ε) / α, for what a network may output: -> (x_0, ε), with x = α x_0 + σ ε.

    `prediction_type` is named as in diffusers: "epsilon" outputs ε, "v_prediction" v = α ε - σ x_0. On the line of
    section 2, α² + σ² is smaller than 1; so v is inverted without taking that sum for 1. "flow" outputs ε - x_0, as
    flow matching does (improved.py).
    """
    _check("prediction_type", prediction_type, ("epsilon", "v_prediction", "flow"))
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction_type == "flow":
        return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    norm = alpha**2 + sigma**2
    return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm


def _check(name: str, value: str, known: Sequence[str]) -> None:
    # A misspelt name must not fall into the `else` of a branch below and be another method, silently.
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")


def guided(conditional: Tensor, unconditional: Tensor, w: float) -> Tensor:
    """Classifier-free guidance, inside Eq. 18: ε̃ = ε(x, c) + w (ε(x, c) - ε(x, ∅)).

    The weights 1 + w and -w add up to 1, and each conversion above is an affine function of the output. So the outputs
    themselves may be combined, be they ε or v.
    """
    return conditional + w * (conditional - unconditional)


# (x, t) -> (x_0, ε): a teacher whose condition and guidance are set already.
Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def multiple_estimation(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """Eq. 18: x̂_s from x_t by m = k / k_φ DDIM steps of the teacher, each k_φ = `solver_step` long.

    The error of one Euler step grows with the square of its length; that of m steps over the same way is about m times
    smaller. The price is m calls of the teacher. That is what lets k be 100.

    A sub-path that is cut off at time 0 may arrive before its m steps are over. The rest then goes from s to s, where
    DDIM returns α_s x̂_0 + σ_s ε = x: nothing moves, and a batch of mixed lengths needs no special case.
    """
    for _ in range(math.ceil(k / solver_step)):
        t_next = torch.maximum(t - solver_step, s)
        x0, eps = denoise(x, t)
        alpha, sigma = schedule.at(t_next, x.ndim)
        x, t = alpha * x0 + sigma * eps, t_next
    return x


# ---------------------------------------------------------------------------------------------------------------------
# 2  The line that replaces a sub-path (Section 4.2.1, appendices B and C)
#
# A sub-path is a piece of the PF-ODE's trajectory, from x_t to x_s. LCM, the latent consistency model that SPLAM builds
# on, trains a network, the student, to say at x_t what its own running average, the target, says at x_s: a distance
# d(f(x_t), f(x_s)) is to vanish (section 4). SPLAM asks the student at all points of a straight line between the ends,
# x_γ = (1-γ) r x_s + γ x_t (Eq. 12). Eq. 9 to 11 say why. They split that error into two terms: the difference of the
# points, x_t - r x_s, and a difference of noise estimates. At x_γ the first is only γ (x_t - r x_s). So the task grows
# from an easy one at γ = 0 to LCM's at γ = 1.
#
# Why the end is multiplied by r = α_t / α_s. x_t holds the signal α_t x_0 and x_s holds α_s x_0, which is more. r x_s
# holds α_t x_0 as well, so every point between r x_s and x_t has the same signal and only the noise varies (Eq. 14).
# Without r the signal varies with γ too; that line is the "DL-ODE" of appendix C, the paper's ablation.
#
# Divided by its signal, z = x/α, the SL line is (1-γ) z_s + γ z_t: the chord between two points of the PF-ODE's curve
# in the coordinates of section 1. The DL line lies on the same chord, with its points spread differently over it.
#
# How much noise x_γ holds depends on how the noises ε_s and ε_t of the two ends belong together.
#
# - They are one and the same, when x_s was computed from x_t by a DDIM step: x_t = α_t x̂_0 + σ_t ε̂ and
#   x_s = α_s x̂_0 + σ_s ε̂. On a line between them the coefficients of ε̂ are on a line too. This is the "linear" σ_γ,
#   the form below Eq. 15, which the paper calls approximate. For one solver step it is exact, to rounding. With m > 1
#   steps the estimate ε̂ changes on the way, and the form is an approximation again.
# - x_t is r x_s plus noise that does not depend on x_s, when x_t was made from x_s by a step of a Markov chain
#   (Eq. 20: x_t = r x_s + √(1-r²) ε'; Eq. 21 and 22 say what that makes of x_0). Then variances add: put Eq. 20 into
#   Eq. 12, and x_γ = r x_s + γ √(1-r²) ε' (Eq. 23), so that σ_γ² = r² σ_s² + γ² (1-r²) (Eq. 24). This is the "markov"
#   σ_γ, which the paper calls exact. Training does not couple its ends in this way.
#
# Eq. 25 is the difference of the two forms. Their squares differ by 2 γ (1-γ) r σ_s (σ_t - r σ_s): nothing at γ = 0 and
# γ = 1, and in between the linear form is larger.
# ---------------------------------------------------------------------------------------------------------------------

ODES = ("sl", "dl", "lcm")  # the paper's line; its ablation; and LCM, which has no line: γ = 1 always
SIGMA_FORMS = ("linear", "markov")


class SubPathPoint(NamedTuple):
    """A point x_γ = α_γ x̂_0 + σ_γ ε̂ of a line; α_γ and σ_γ are shaped to multiply x."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor


def sub_path_point(
    x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, gamma: Tensor, schedule: Schedule, ode: str, sigma_form: str
) -> SubPathPoint:
    """x_γ on the line between the ends of a sub-path, with its signal α_γ and its noise σ_γ; `ode` is "sl" or "dl".

    Eq. 13 is the derivative of Eq. 12, dx_γ/dγ = x_t - r x_s: constant, so the linear ODE needs no solver.
    """
    _check("ode", ode, ("sl", "dl"))
    _check("sigma_form", sigma_form, SIGMA_FORMS)
    g = per_sample(gamma, x_t.ndim)
    alpha_t, sigma_t = schedule.at(t, x_t.ndim)
    alpha_s, sigma_s = schedule.at(s, x_t.ndim)
    r = alpha_t / alpha_s
    # The variance of Eq. 20's fresh noise, 1 - r², in a form that holds on any path (improved.StraightPath) and gives
    # back σ_t at γ = 1, however small it is.
    fresh = sigma_t**2 - r**2 * sigma_s**2
    if ode == "sl":
        x = (1 - g) * r * x_s + g * x_t  # Eq. 12
        alpha = alpha_t  # Eq. 14: the same for every γ, which is what r is for
        if sigma_form == "linear":
            sigma = (1 - g) * r * sigma_s + g * sigma_t  # below Eq. 15
        else:
            sigma = (r**2 * sigma_s**2 + g**2 * fresh).sqrt()  # Eq. 24
    else:
        x = (1 - g) * x_s + g * x_t  # Eq. 26
        alpha = (1 - g) * alpha_s + g * alpha_t  # Eq. 27
        if sigma_form == "linear":
            sigma = (1 - g) * sigma_s + g * sigma_t  # linear, docs/equations.md, Eq. 28
        else:
            sigma = (((1 - g) + g * r) ** 2 * sigma_s**2 + g**2 * fresh).sqrt()  # Eq. 28
    return SubPathPoint(x, alpha, sigma)


# ---------------------------------------------------------------------------------------------------------------------
# 3  The student F_θ(x_γ, c, γ) (Section 4.2.2)
#
# The student is a copy of the teacher's network. At γ < 1 its input holds less noise than the time t announces, so a
# network that believes t estimates the noise wrongly. In x̂_0 = (x - σ ε)/α the mistake is multiplied by σ/α, which is
# 15 at t = 999. So the network must be told where on the line it is: an embedding of γ is added to the network's
# own embedding of t, and the network learns what it means. The embedding is zero at γ = 1. So there the network is
# exactly the teacher's before training; and after training, when γ is always 1, the embedding's weights are dropped.
# ---------------------------------------------------------------------------------------------------------------------

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5  # LCM's values, which its scheduler in diffusers has too


def boundary(t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """c_skip(t) and c_out(t) of Eq. 5 and 16, with c_skip(0) = 1 and c_out(0) = 0.

    Eq. 5, whose f is our F, makes F_θ(x, 0) = x hold by construction. Without such an anchor a constant function would
    satisfy self-consistency (Eq. 4) perfectly. With LCM's scaling of 10 only the first times feel it: c_skip is 0.0025
    at t = 1 and below 1e-5 from t = 16 on. With 50 starts in 1000 times, sub-paths start at t = 19 or later. So in
    practice it acts where a sub-path ends, at s = 0, and nowhere else: there the target is the point x̂_s itself. (In
    discrete time that point is not quite clean: Stable Diffusion has σ_0 = 0.029.)
    """
    scaled = per_sample(TIMESTEP_SCALING * t.float(), ndim)
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


class ConsistencyFunction(nn.Module):
    """F_θ(x_γ, c, γ) of Eq. 16 around a network with diffusers' signature, `network(x, t, **cond).sample`.

    This is the finished student, which is asked at γ = 1 only. A student in training is a subclass, whose `tell` says
    to the network where on the line it is.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: str):
        super().__init__()
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type

    def tell(self, gamma: Tensor, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """What the network gets for x and t, and signal and noise of that x. At γ = 1 there is nothing to tell."""
        return x, t, alpha, sigma

    def forward(self, x: Tensor, t: Tensor, gamma: Tensor | None = None, point: SubPathPoint | None = None, **cond):
        """x (B, ...) and the start t (B,) of its sub-path; γ (B,) with its `point`, or neither of them for γ = 1."""
        if gamma is None:
            gamma, point = torch.ones_like(t, dtype=torch.float32), SubPathPoint(x, *self.schedule.at(t, x.ndim))
        x_in, t_in, alpha, sigma = self.tell(gamma, x, t, point.alpha, point.sigma)
        output = self.network(x_in, t_in, **cond).sample.float()  # autocast may have left it in half precision
        x0, _ = to_x0_eps(output, x_in, alpha, sigma, self.prediction_type)  # f_θ(x_γ, γ), Eq. 14
        c_skip, c_out = boundary(t, x.ndim)
        return c_skip * x + c_out * x0  # Eq. 16

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The network's weights under the teacher's parameter names: the student at γ = 1, which any program that can
        load the teacher can load."""
        return self.network.state_dict()


GAMMA_DIM = 32  # length of the γ-embedding


def gamma_embedding(gamma: Tensor) -> Tensor:
    """γ (B,) -> (B, GAMMA_DIM) in float32, exactly the zero vector at γ = 1.

    The official code embeds 10 (1-γ) as LCM embeds w: sin and cos of 1000 times that, times frequencies. At γ = 1 its
    cosines are 1, so that embedding is never zero; hence the cos - 1. And its highest frequency turns 1,600 times from
    γ = 0 to 1, which makes neighbouring γ look unrelated. Here it turns four times.
    """
    frequencies = math.pi * torch.logspace(-1, 3, GAMMA_DIM // 2, base=2, device=gamma.device)
    angle = (1 - gamma.float())[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos() - 1], dim=1)


class GammaTimeEmbedding(nn.Module):
    """Stands in for a network's own time embedding, MLP(φ(t)), and adds γ to it: MLP(φ(t) + W e(γ)).

    W has no bias, so that e(1) = 0 adds exactly nothing, whatever W is.

    Few networks of diffusers take a number beside t, so SubPathStudent leaves γ in the attribute `gamma` before each
    pass. A forward hook would be shorter, but it would hold on to this very module: after copy.deepcopy, the target's
    hook would read the γ that the student was last given, and not its own γ = 1, without an error.
    """

    def __init__(self, time_embedding: nn.Module):
        super().__init__()
        self.time_embedding = time_embedding
        self.projection = nn.Linear(GAMMA_DIM, time_embedding.linear_1.in_features, bias=False)
        self.gamma: Tensor | None = None

    def forward(self, t_emb: Tensor, condition: Tensor | None = None) -> Tensor:
        """φ(t) (B, D), and LCM's embedding of w where a network has one, -> the network's time embedding (B, D')."""
        t_emb = t_emb + self.projection(gamma_embedding(self.gamma)).to(t_emb.dtype)
        return self.time_embedding(t_emb, condition)


class SubPathStudent(ConsistencyFunction):
    """The student in training, told γ by the embedding above, which it puts into the network that it is given."""

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: str):
        super().__init__(network, schedule, prediction_type)
        network.time_embedding = GammaTimeEmbedding(network.time_embedding)

    def tell(self, gamma: Tensor, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Leaves γ where the embedding finds it; x and t are what they are. (Eq. 14: ε_θ(x_γ, t_{n+k}, γ).)"""
        self.network.time_embedding.gamma = gamma
        return x, t, alpha, sigma

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Without the projection of γ, which adds nothing at γ = 1."""
        weights = self.network.state_dict()
        del weights["time_embedding.projection.weight"]
        return {name.replace("time_embedding.time_embedding.", "time_embedding."): w for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 4  Algorithm 1: sub-path linear approximation distillation (SPLAD)
#
# Self-consistency, Eq. 4: along one trajectory of the PF-ODE, f(x_t, t) is the same for every t, namely where the
# trajectory ends. Consistency distillation (Eq. 6) trains this on neighbours: the student at t must land where its
# average lands from the point s that the teacher's solver reaches. LCM (Eq. 7) lets neighbours be k apart, and adds a
# condition and guidance. SPLAM (Eq. 15, and Eq. 17 with the solver of Eq. 18) asks it of all x_γ between the two.
# ---------------------------------------------------------------------------------------------------------------------

METRICS = ("l2", "huber")
HUBER_C = 1e-3


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """The metric d of Eq. 17, one number for each sample (B,): "l2" is the mean of Δ² over the sample's elements,
    "huber" the mean of √(Δ² + c²) - c.

    Pseudo-Huber is quadratic below c and linear above, so that a few large errors do not dominate the gradient. It is
    taken by element, as in LCM's and SPLAM's code, where it is nearly L1. (The work that the paper cites takes it of a
    whole sample's norm: docs/equations.md, note 15.)
    """
    _check("metric", metric, METRICS)
    difference = (a - b).flatten(1)
    if metric == "l2":
        return difference.square().mean(1)
    return ((difference.square() + HUBER_C**2).sqrt() - HUBER_C).mean(1)


class Draws(NamedTuple):
    """What Algorithm 1 draws for each sample: the start t (B,) of a sub-path, γ (B,), noise ε of the shape of x_0."""

    t: Tensor
    gamma: Tensor
    noise: Tensor


def draw(x0: Tensor, num_train_timesteps: int, num_ddim_timesteps: int, generator: torch.Generator) -> Draws:
    """n, γ ~ U[0, 1] and ε of Algorithm 1 for the batch x_0 (B, ...), on its device.

    n names the start of a sub-path, the paper's t_{n+k}, on the grid N-1, N-1-N/50, ..., whose length
    `num_ddim_timesteps` is 50, or another divisor of N. Few-step sampling takes its times from the same grid, so it
    never asks the student at a time where it was not trained.

    The generator is a CPU's: from the same seed, each model of GPU draws other numbers.
    """
    n = torch.randint(num_ddim_timesteps, (len(x0),), generator=generator)
    t = num_train_timesteps - 1 - num_train_timesteps // num_ddim_timesteps * n
    # An exact 0 would be a point without signal and without noise where a schedule ends with α = 0.
    gamma = torch.rand(len(x0), generator=generator).clamp_min(2**-24)
    noise = torch.randn(x0.shape, generator=generator)
    return Draws(t.to(x0.device), gamma.to(x0.device), noise.to(x0.device))


def splad_loss(
    student: Callable,
    target: Callable,
    denoise: Denoiser,
    schedule: Schedule,
    x0: Tensor,
    cond: dict[str, Tensor],
    draws: Draws,
    *,
    k: int,
    solver_step: int,
    ode: str = "sl",
    sigma_form: str = "linear",
    metric: str = "l2",
    solver: Callable[..., Tensor] = multiple_estimation,
) -> Tensor:
    """Eq. 17 for one batch: the inner lines of Algorithm 1. Returns a scalar, differentiable in θ only.

    student, target   F_θ and F_θ⁻, called like ConsistencyFunction
    denoise           the frozen teacher, told condition and guidance: (x, t) -> (x_0, ε)
    x0, cond          clean samples or latents (B, ...), and the networks' keyword arguments
    k, solver_step    length of a sub-path and k_φ, that of a solver step, in time steps
    metric            d, a name that `distance` knows
    ode               "sl" (the paper), "dl" (its appendix C), or "lcm": γ = 1 always, which is Eq. 7
    sigma_form        "linear" or "markov", as `sub_path_point` has it
    solver            what takes x_t to x_s
    """
    t, gamma, noise = draws
    s = (t - k).clamp_min(0)
    alpha_t, sigma_t = schedule.at(t, x0.ndim)
    x_t = alpha_t * x0 + sigma_t * noise  # Eq. 1: the start of the sub-path
    x_s = solver(denoise, schedule, x_t, t, s, k, solver_step)  # Eq. 18: its end, by the teacher
    with torch.no_grad():  # no gradient through the target (Eq. 17), and no memory for one
        landing = target(x_s, s, **cond)  # F_θ⁻(x̂_s, c, γ = 1), the end of the sub-path taken as a start of its own
    if ode == "lcm":
        gamma, ode = torch.ones_like(gamma), "sl"  # at γ = 1 both lines are x_t
    point = sub_path_point(x_t, x_s, t, s, gamma, schedule, ode, sigma_form)  # Eq. 12, or 26
    d = distance(student(point.x, t, gamma, point, **cond), landing, metric)  # Eq. 17, one number for each sample
    return d.mean()  # a weight, which Eq. 9 has and Eq. 17 omits, would multiply d first


@torch.no_grad()
def ema_update(target: nn.Module, student: nn.Module, decay: float) -> None:
    """θ⁻ <- decay · θ⁻ + (1 - decay) · θ, the last line of Algorithm 1.

    The student chases a target that is made from itself. If the target jumped with every step, errors would feed on
    themselves.
    """
    for average, parameter in zip(target.parameters(), student.parameters(), strict=True):
        average.lerp_(parameter.detach().to(average.dtype), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# 5  Sampling in a few steps (Eq. 19)
#
# One step is Eq. 19, x̂_0 = F_θ(x_T, c, γ = 1): the student jumps from pure noise to the end of the trajectory. Its
# error is largest for this longest jump. So more steps go back part of the way: x̂_0 is diffused again (Eq. 1), to a
# time below N-1, and the student jumps from there, a shorter way. x̂_0 and the noise are independent, as x_0 and ε are
# in Eq. 1, so a perfect student's new points are distributed as they should be. But each lies on another trajectory:
# with more than one step, the first noise alone does not decide the sample.
# ---------------------------------------------------------------------------------------------------------------------


def few_step_times(num_inference_steps: int, num_train_timesteps: int, original_inference_steps: int) -> list[int]:
    """`num_inference_steps` times of the training grid from N-1 down, evenly spaced by their place on it: LCM's times.

    `original_inference_steps` is the number of times on that grid, by its name in diffusers' LCMScheduler. diffusers
    computes the place with floats and rounds down, and so does this: exact fractions would now and then give another
    time.
    """
    step = num_train_timesteps // original_inference_steps
    grid = [step * (i + 1) - 1 for i in reversed(range(original_inference_steps))]
    return [grid[int(i * (original_inference_steps / num_inference_steps))] for i in range(num_inference_steps)]


@torch.no_grad()
def few_step_sample(
    student: Callable,
    schedule: Schedule,
    noise: Tensor,
    times: Sequence[int],
    randn: Callable[[], Tensor],
    **cond,
) -> Iterator[Tensor]:
    """Eq. 19 at the first of `times`; then, for each of the others, fresh noise (Eq. 1) and Eq. 19 again.

    Yields x̂_0 after each step, so that a caller can draw the way; the last one is the sample. `randn` returns fresh
    noise of the shape of `noise` at each call.
    """
    x, x0 = noise, None
    for time in times:
        t = torch.full((len(noise),), time, device=noise.device)
        if x0 is not None:
            alpha, sigma = schedule.at(t, noise.ndim)
            x = alpha * x0 + sigma * randn()
        x0 = student(x, t, **cond)
        yield x0
