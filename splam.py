"""The Sub-Path Linear Approximation Model (SPLAM, Xu et al., ECCV 2024) as a chapter to read beside the paper.

"Eq. 12" below is the paper's Eq. 12, and docs/equations.md has all of them in one place. The file needs only torch.
What belongs to this project and not to the paper says so where it stands: a solver of second order, a time in the place
of γ for the network, the frequencies of the γ-embedding, the metric "huber_sample", several γ for each solved sub-path,
a share of draws with γ = 1, and in sampling less fresh noise or other times. "Section 4.2.2" is the paper's; "section
2" is below.

    1  A diffusion model and its ODE        Eq. 1-3, 8, 18      Schedule, to_x0_eps, guided, multiple_estimation
    2  The line that replaces a sub-path    Eq. 12-14, 20-28    sub_path_point
    3  The student                          Eq. 5, 14, 16       gamma_embedding, boundary, ConsistencyFunction
    4  Algorithm 1                          Eq. 4-11, 15, 17    distance, draw, splad_loss, ema_update
    5  Sampling in a few steps              Eq. 19              few_step_times, few_step_sample

Notation
    N            number of time steps of the diffusion process (1000); times t are integers in 0..N-1, larger is noisier
    α_t, σ_t     signal and noise at time t, α_t² + σ_t² = 1 ("variance preserving"):  x_t = α_t x_0 + σ_t ε
    ρ, λ         noise-to-signal ratio σ/α, and log(α/σ) = -log ρ
    t, s         start (noisier, the paper's t_{n+k}) and end (cleaner, t_n) of a sub-path;  s = max(t - k, 0)
    r            drift ratio α_t / α_s, smaller than 1
    k, k_φ, m    length of a sub-path, length of a solver step, solver steps in a sub-path:  m = k / k_φ
    γ            place on the sub-path: 1 at its start x_t, 0 at its shrunken end r x_s
    w            guidance scale in ε + w (ε - ε_∅): w = 8 here is guidance_scale 9 in diffusers
    θ, θ⁻        weights of the student, and their running average (the "target")
    f, F         The paper swaps these letters. In Eq. 4 to 7, f is the consistency function with its boundary condition
                 and F the bare network. From Eq. 8 on, f is the denoiser "x_0 from x and ε", and from Eq. 16 on F is
                 that denoiser with the boundary condition. Here F_θ always means the F of Eq. 16. (In Eq. 2 and 3,
                 f and g are the drift and the diffusion of the process.)

Shapes: x is (B, ...): points (B, 2), or pixels or latents (B, C, H, W). t, s and γ are (B,). All that comes from the
noise schedule is computed in float32, whatever precision the networks compute in. Half precision keeps two or three
digits of α and σ, and x̂_0 = (x - σ ε)/α multiplies such an error by σ/α, which is 15 at t = 999.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The values that the options below may have. An unknown one raises ValueError: a misspelt "LCM" must not silently mean
# something else.
ODES = ("sl", "dl", "lcm")  # the line of Eq. 12, that of Eq. 26, or no line at all: γ = 1
SIGMA_FORMS = ("approx", "exact")  # σ_γ as below Eq. 15, or as in Eq. 24 and 28
METRICS = ("l2", "huber", "huber_sample")
GAMMA_CONDITIONINGS = ("time", "embedding")


def _check(name: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, known))}")


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

    The tables move to the device of the times that they are asked for. They are no buffers of a module: a checkpoint
    does not hold them, and a cast of the model to half precision does not reach them.
    """

    def __init__(self, alphas_cumprod: Tensor):
        self.alpha = alphas_cumprod.double().sqrt().float()
        self.sigma = (1 - alphas_cumprod.double()).sqrt().float()

    def __len__(self) -> int:
        return len(self.alpha)

    def _move_to(self, device: torch.device) -> None:
        if self.alpha.device != device:
            self.alpha, self.sigma = self.alpha.to(device), self.sigma.to(device)

    def at(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t) for integer times t (B,), each shaped (B, 1, ...) so that it multiplies an x of `ndim` dims."""
        self._move_to(t.device)
        shape = (-1,) + (1,) * (ndim - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The real-valued time t' at which the process has the noise-to-signal ratio ρ = σ/α; shape (B,).

        Between integer times it is linear in log ρ, which runs more evenly with time than ρ itself (0.03 to 15 with
        Stable Diffusion's schedule), so that the interpolation is accurate everywhere.
        """
        self._move_to(alpha.device)
        table = (self.sigma / self.alpha.clamp_min(1e-20)).log()  # the clamp: α may be 0 at the last time
        log_ratio = (sigma / alpha.clamp_min(1e-20)).log().flatten().clamp(table[0], table[-1])
        after = torch.searchsorted(table, log_ratio).clamp(1, len(self) - 1)
        before = after - 1
        return before + (log_ratio - table[before]) / (table[after] - table[before])


def to_x0_eps(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The denoiser of Eq. 8, x̂_0 = (x - σ ε) / α, for all that a network may output: -> (x_0, ε), x = α x_0 + σ ε.

    `prediction_type` is named as in diffusers: "epsilon" outputs ε, "sample" x_0, "v_prediction" v = α ε - σ x_0.
    A point inside a sub-path has the signal α_t and less noise than σ_t (section 2), so α² + σ² < 1; v is inverted
    without taking that sum for 1.
    """
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    if prediction_type == "v_prediction":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    raise ValueError(f"prediction_type {prediction_type!r} is none of epsilon, v_prediction, sample")


def guided(conditional: Tensor, unconditional: Tensor, w: float) -> Tensor:
    """Classifier-free guidance, inside Eq. 18: ε̃ = ε(x, c) + w (ε(x, c) - ε(x, ∅)).

    The weights 1 + w and -w add up to 1, and each conversion above is an affine function of the output. So the outputs
    themselves may be combined, be they ε, v or x_0.
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


@torch.no_grad()
def second_order_estimation(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """This project's option: x̂_s from x_t by k / `solver_step` steps of DPM-Solver++(2S), two calls of the teacher
    each.

    Divided by σ instead of α, the PF-ODE is d(x/σ) = x_0 d(α/σ), and DDIM is Euler's method for it: it takes x_0 at the
    start of the step for constant over the step. x_0 in the middle is a better constant: its error shrinks with the
    third power of the step's length, and not with the second. So a DDIM step goes half of the way in λ, the teacher is
    asked there, and a second DDIM step goes the whole way with that x_0.
    With k = 100, one such step is more accurate than five DDIM steps in the middle of the way, and less so near the
    data (toy/README.md). Where α_T is 0 the first sub-path is infinitely long in λ, and there it gains nothing.

    Teachers know integer times only, so the second call is near the middle and not at it. A line through both values
    of x_0 is read at the true middle.
    """

    def log_ratio(time: Tensor) -> Tensor:
        alpha, sigma = schedule.at(time, x.ndim)
        return (alpha.clamp_min(1e-20) / sigma).log()  # λ; the clamp: α may be 0 at the last time

    for _ in range(math.ceil(k / solver_step)):
        t_next = torch.maximum(t - solver_step, s)
        (alpha_t, sigma_t), (alpha, sigma) = schedule.at(t, x.ndim), schedule.at(t_next, x.ndim)
        middle = schedule.time_at((alpha_t * alpha).sqrt(), (sigma_t * sigma).sqrt()).round().long()
        middle = torch.maximum(torch.minimum(middle, t - 1), t_next)  # at least one time step away
        x0, eps = denoise(x, t)
        alpha_m, sigma_m = schedule.at(middle, x.ndim)
        x0_m, _ = denoise(alpha_m * x0 + sigma_m * eps, middle)
        begin, end = log_ratio(t), log_ratio(t_next)
        x0 = x0 + (x0_m - x0) * (end - begin) / (2 * (log_ratio(middle) - begin))
        # DDIM with that x_0, and the ε that belongs to it at the step's start. What has arrived at s stays there.
        moved = alpha * x0 + sigma * (x - alpha_t * x0) / sigma_t
        x, t = torch.where((t_next < t).view(alpha.shape), moved, x), t_next
    return x


SOLVERS = {"ddim": multiple_estimation, "dpmsolver++": second_order_estimation}
SOLVER_CALLS = {"ddim": 1, "dpmsolver++": 2}  # of the teacher, in each solver step


# ---------------------------------------------------------------------------------------------------------------------
# 2  The line that replaces a sub-path (Section 4.2.1, appendices B and C)
#
# A sub-path is a piece of the PF-ODE's trajectory, from x_t to x_s. LCM asks the student at x_t only, a whole sub-path
# away from its target. SPLAM asks it at all points of a straight line between the ends, x_γ = (1-γ) r x_s + γ x_t
# (Eq. 12). Eq. 9 to 11 say why. They split the error of consistency training, d(f(x_t), f(x_s)), into two terms: the
# difference of the points, x_t - r x_s, and a difference of noise estimates. At x_γ the first is only γ (x_t - r x_s).
# So the task grows from an easy one at γ = 0 to LCM's at γ = 1.
#
# Why the end is multiplied by r = α_t / α_s. x_t holds the signal α_t x_0 and x_s holds α_s x_0, which is more. r x_s
# holds α_t x_0 as well, so every point between r x_s and x_t has the same signal and only the noise varies (Eq. 14).
# Without r the signal varies with γ too; that line is the "DL-ODE" of appendix C, the paper's ablation.
#
# Divided by its signal, z = x/α, the SL line is (1-γ) z_s + γ z_t: the chord between two points of the PF-ODE's curve
# in the coordinates of section 1. The DL line lies on the same chord, with its points spread differently over it. So
# with the linear σ, and told the time (section 3), a student sees nearly the same task from both.
#
# How much noise x_γ holds depends on how the noises ε_s and ε_t of the two ends belong together.
#
# - They are one and the same, when x_s was computed from x_t by a DDIM step: x_t = α_t x̂_0 + σ_t ε̂ and
#   x_s = α_s x̂_0 + σ_s ε̂. On a line between them the coefficients of ε̂ are on a line too. This is the "approximate"
#   form below Eq. 15. For one solver step it is exact, to rounding. With m > 1 steps the estimate ε̂ changes on the way,
#   and the form is an approximation again; toy/README.md measures by how much.
# - x_t is r x_s plus noise that does not depend on x_s, when x_t was made from x_s by fresh noise (Eq. 20:
#   x_t = r x_s + √(1-r²) ε'; Eq. 21 and 22 say what that makes of x_0). Then variances add: put Eq. 20 into Eq. 12, and
#   x_γ = r x_s + γ √(1-r²) ε' (Eq. 23), so that σ_γ² = r² σ_s² + γ² (1-r²) (Eq. 24). This is the "exact" form. Training
#   does not couple its ends in this way: there, in spite of its name, it is the wrong σ. ("approx" and "exact" are the
#   paper's words. Where they would mislead, this project says the linear and the Markov σ.)
#
# Eq. 25 is the difference of the two forms. Their squares differ by 2 γ (1-γ) r σ_s (σ_t - r σ_s): nothing at γ = 0 and
# γ = 1, and in between approx is larger.
# ---------------------------------------------------------------------------------------------------------------------


class SubPathPoint(NamedTuple):
    """A point x_γ = α_γ x̂_0 + σ_γ ε̂ of a sub-path; α_γ and σ_γ are shaped to multiply x."""

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
    g = gamma.view((-1,) + (1,) * (x_t.ndim - 1))
    alpha_t, sigma_t = schedule.at(t, x_t.ndim)
    alpha_s, sigma_s = schedule.at(s, x_t.ndim)
    r = alpha_t / alpha_s
    # The variance of Eq. 20's fresh noise, 1 - r², in another form: with it γ = 1 gives back σ_t, however small it is.
    fresh = sigma_t**2 - r**2 * sigma_s**2
    if ode == "sl":
        x = (1 - g) * r * x_s + g * x_t  # Eq. 12
        alpha = alpha_t  # Eq. 14: the same for every γ, which is what r is for
        if sigma_form == "approx":
            sigma = (1 - g) * r * sigma_s + g * sigma_t  # below Eq. 15
        else:
            sigma = (r**2 * sigma_s**2 + g**2 * fresh).sqrt()  # Eq. 24
    else:
        x = (1 - g) * x_s + g * x_t  # Eq. 26
        alpha = (1 - g) * alpha_s + g * alpha_t  # Eq. 27
        if sigma_form == "approx":
            sigma = (1 - g) * sigma_s + g * sigma_t
        else:
            sigma = (((1 - g) + g * r) ** 2 * sigma_s**2 + g**2 * fresh).sqrt()  # Eq. 28
    return SubPathPoint(x, alpha, sigma)


# ---------------------------------------------------------------------------------------------------------------------
# 3  The student F_θ(x_γ, c, γ) (Section 4.2.2)
#
# The student is a copy of the teacher's network. At γ < 1 its input holds less noise than the time t announces, so a
# network that believes t estimates the noise wrongly. In x̂_0 = (x - σ ε)/α the mistake is multiplied by σ/α, which is
# 15 at t = 999. So the network must be told where on the sub-path it is. There are two ways:
#
# "embedding", the paper's: an embedding of γ is added to the network's own embedding of t. The network must learn what
#     it means. The embedding is zero at γ = 1, so there the student is exactly the teacher before training, and after
#     training, when γ is always 1, the embedding's weights are dropped.
# "time", this project's and its default: the network is told another time. x_γ = α_γ x_0 + σ_γ ε, scaled to
#     α² + σ² = 1, has the signal and the noise of the diffusion process at the time t' where σ_t'/α_t' = σ_γ/α_γ. The
#     network knows from its training as a teacher what to do there. To replace t by t' is to add φ(t') - φ(t) to the
#     network's own Fourier embedding φ(t): that too is an embedding of γ which is zero at γ = 1, as Section 4.2.2
#     asks for, but with weights that the teacher has learnt already.
# ---------------------------------------------------------------------------------------------------------------------

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

    diffusers' networks have no argument for γ, so ConsistencyFunction leaves it in the attribute `gamma` before each
    pass. A forward hook would be shorter, but it would hold on to this very module: after copy.deepcopy, the target's
    hook would read the γ that the student was last given, and not its own γ = 1, without an error.
    """

    def __init__(self, time_embedding: nn.Module, embed: Callable[[Tensor], Tensor] = gamma_embedding):
        super().__init__()
        self.time_embedding, self.embed = time_embedding, embed
        self.projection = nn.Linear(GAMMA_DIM, time_embedding.linear_1.in_features, bias=False)
        self.gamma: Tensor | None = None

    def forward(self, t_emb: Tensor, condition: Tensor | None = None) -> Tensor:
        t_emb = t_emb + self.projection(self.embed(self.gamma)).to(t_emb.dtype)
        return self.time_embedding(t_emb, condition)


TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5  # LCM's values, which its scheduler in diffusers has too


def boundary(t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """c_skip(t) and c_out(t) of Eq. 5 and 16, with c_skip(0) = 1 and c_out(0) = 0.

    Eq. 5, whose f is our F, makes F_θ(x, 0) = x hold by construction. Without such an anchor a constant function would
    satisfy self-consistency (Eq. 4) perfectly. With LCM's scaling of 10 it is a matter of the first time step: c_skip
    is 0.0025 at t = 1 and below 1e-5 from t = 16 on. With 50 starts in 1000 times, sub-paths start at t = 19 or later.
    So in practice it acts where a sub-path ends, at s = 0, and nowhere else: there the target is the point x̂_s itself.
    (In discrete time that point is not quite clean: Stable Diffusion has σ_0 = 0.029.)
    """
    scaled = (TIMESTEP_SCALING * t.float()).view((-1,) + (1,) * (ndim - 1))
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


class ConsistencyFunction(nn.Module):
    """F_θ(x_γ, c, γ) of Eq. 16 around a network with diffusers' signature, `network(x, t, **cond).sample`.

    `gamma_conditioning` is "embedding" or "time", as described above, or None for a finished student, which is only
    ever asked at γ = 1. There all three are the same function as long as the weights are the teacher's: exactly so for
    "embedding" and None, and to float32 rounding for "time", whose t' is computed and not looked up.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction_type: str,
        gamma_conditioning: str | None = None,
        embed: Callable[[Tensor], Tensor] = gamma_embedding,
    ):
        super().__init__()
        _check("gamma_conditioning", gamma_conditioning, (None, *GAMMA_CONDITIONINGS))
        self.network, self.schedule = network, schedule
        self.prediction_type, self.gamma_conditioning = prediction_type, gamma_conditioning
        if gamma_conditioning == "embedding":
            network.time_embedding = GammaTimeEmbedding(network.time_embedding, embed)

    def forward(self, x: Tensor, t: Tensor, gamma: Tensor | None = None, point: SubPathPoint | None = None, **cond):
        """x (B, ...) and the start t (B,) of its sub-path; γ (B,) with its `point`, or neither of them for γ = 1."""
        if gamma is None:
            gamma, point = torch.ones_like(t, dtype=torch.float32), SubPathPoint(x, *self.schedule.at(t, x.ndim))
        x_in, t_in, alpha, sigma = x, t, point.alpha, point.sigma
        if self.gamma_conditioning == "time":
            scale = (alpha**2 + sigma**2).rsqrt()
            x_in, alpha, sigma = x * scale, alpha * scale, sigma * scale
            t_in = self.schedule.time_at(alpha, sigma)
        elif self.gamma_conditioning == "embedding":
            self.network.time_embedding.gamma = gamma
        output = self.network(x_in, t_in, **cond).sample.float()
        x0, _ = to_x0_eps(output, x_in, alpha, sigma, self.prediction_type)  # f_θ(x_γ, γ), Eq. 14
        c_skip, c_out = boundary(t, x.ndim)
        return c_skip * x + c_out * x0  # Eq. 16

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The network's weights under the teacher's parameter names, without the projection of γ: the student at γ = 1,
        which any program that can load the teacher can load."""
        weights = self.network.state_dict()
        weights.pop("time_embedding.projection.weight", None)
        return {name.replace("time_embedding.time_embedding.", "time_embedding."): w for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 4  Algorithm 1: sub-path linear approximation distillation (SPLAD)
#
# Self-consistency, Eq. 4: along one trajectory of the PF-ODE, f(x_t, t) is the same for every t, namely where the
# trajectory ends. Consistency distillation (Eq. 6) trains this on neighbours: the student at t must land where its
# average lands from the point s that the teacher's solver reaches. LCM (Eq. 7) lets neighbours be k apart, and adds a
# condition and guidance. SPLAM (Eq. 15, and Eq. 17 with the solver of Eq. 18) asks it of all x_γ between the two.
# ---------------------------------------------------------------------------------------------------------------------

HUBER_C = 1e-3


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """The metric d of Eq. 17, one number for each sample (B,): "l2" is the mean of Δ² over the sample's elements,
    "huber" the mean of √(Δ² + c²) - c, and "huber_sample" the √(mean of Δ² + c²) - c.

    Pseudo-Huber is quadratic below c and linear above, so that a few large errors do not dominate the gradient. By
    element, as in LCM's and SPLAM's code, these are errors of pixels, and it is nearly L1. By sample, as in iCT, which
    the paper cites, they are errors of samples. (iCT has c = 0.00054 in these units, and √D times the value for D
    elements.) "huber_sample" is an option of this project.
    """
    _check("metric", metric, METRICS)
    squared = (a.float() - b.float()).square()
    if metric == "huber":
        squared = (squared + HUBER_C**2).sqrt() - HUBER_C
    mean = squared.flatten(1).mean(1)
    return (mean + HUBER_C**2).sqrt() - HUBER_C if metric == "huber_sample" else mean


class Draws(NamedTuple):
    """What Algorithm 1 draws for each sample: the start t (B,) of a sub-path, γ (B, M), noise ε of the shape of x_0.

    In the paper M = 1. Several γ for one sub-path share the cost of solving it; that is an option of this project.
    """

    t: Tensor
    gamma: Tensor
    noise: Tensor


def draw(
    x_shape: Sequence[int],
    num_train_timesteps: int,
    num_ddim_timesteps: int,
    generator: torch.Generator,
    gamma_draws: int = 1,
    gamma_at_one: float = 0.0,
) -> Draws:
    """n, γ ~ U[0, 1] and ε of Algorithm 1 for a batch of the shape `x_shape`.

    n names the start of a sub-path on the grid N-1, N-1-N/50, ..., whose length `num_ddim_timesteps` is 50. Few-step
    sampling takes its times from the same grid, so it never asks the student at a time where it was not trained.

    `gamma_at_one` is this project's option, 0 in the paper: that share of the γ is 1. Sampling happens at γ = 1 alone,
    and uniform draws come near it rarely. It is also where the student is asked farthest from its target, a whole
    sub-path away; near γ = 0 it is asked almost where the target is.
    """
    n = torch.randint(num_ddim_timesteps, (x_shape[0],), generator=generator)
    t = num_train_timesteps - 1 - num_train_timesteps // num_ddim_timesteps * n
    u, uniform_share = torch.rand(x_shape[0], gamma_draws, generator=generator), 1 - gamma_at_one
    gamma = torch.where(u < uniform_share, u / uniform_share, 1.0)  # below that share, u is uniform once more
    # An exact 0 would be a point without signal and without noise where a schedule ends with α = 0.
    gamma = gamma.clamp_min(2**-24)
    return Draws(t, gamma, torch.randn(x_shape, generator=generator))


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
    sigma_form: str = "approx",
    metric: str = "l2",
    solver: Callable[..., Tensor] = multiple_estimation,
) -> Tensor:
    """Eq. 17 for one batch: the inner lines of Algorithm 1. Returns a scalar, differentiable in θ only.

    student, target   F_θ and F_θ⁻, called like ConsistencyFunction
    denoise           the frozen teacher, told condition and guidance: (x, t) -> (x_0, ε)
    x0, cond          clean samples or latents (B, ...), and the networks' keyword arguments
    ode               "sl" (the paper), "dl" (its appendix C), or "lcm": γ = 1 always, which is Eq. 7
    solver            what takes x_t to x_s; another one is an ablation
    """
    _check("ode", ode, ODES)
    t, gamma, noise = draws
    s = (t - k).clamp_min(0)
    alpha_t, sigma_t = schedule.at(t, x0.ndim)
    x_t = alpha_t * x0 + sigma_t * noise  # Eq. 1: the start of the sub-path
    x_s = solver(denoise, schedule, x_t, t, s, k, solver_step)  # Eq. 18: its end, by the teacher
    with torch.no_grad():  # no gradient through the target (Eq. 17), and no memory for one
        landing = target(x_s, s, **cond)  # F_θ⁻(x̂_s, c, γ = 1), the end of the sub-path taken as a start of its own
    losses = []
    for g in gamma.unbind(1):
        if ode == "lcm":
            g = torch.ones_like(g)
        line = "dl" if ode == "dl" else "sl"  # at γ = 1 both are x_t
        point = sub_path_point(x_t, x_s, t, s, g, schedule, line, sigma_form)  # Eq. 12, or 26
        losses.append(distance(student(point.x, t, g, point, **cond), landing, metric))
    # Consistency models weight d by a λ(t), and the paper omits a factor of Eq. 9 "due to its negligible effect".
    # Such a weight would multiply on the next line, before the mean: there is a number for each sample and γ.
    return torch.stack(losses, dim=1).mean()


@torch.no_grad()
def ema_update(target: nn.Module, student: nn.Module, decay: float) -> None:
    """θ⁻ <- decay · θ⁻ + (1 - decay) · θ, the last line of Algorithm 1.

    The student chases a target that is made from itself. If the target jumped with every step, errors would feed on
    themselves; toy/README.md shows what happens without the average.
    """
    averages = list(target.parameters())
    parameters = [p.detach().to(a.dtype) for a, p in zip(averages, student.parameters(), strict=True)]
    # a <- a + (1 - decay) (p - a) for all pairs in one call, which a GPU begins sooner than hundreds.
    torch._foreach_lerp_(averages, parameters, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# 5  Sampling in a few steps (Eq. 19)
#
# One step is Eq. 19, x̂_0 = F_θ(x_T, c, γ = 1): the student jumps from pure noise to the end of the trajectory. Its
# error is largest for this longest jump. So more steps go back part of the way: noise is added to x̂_0 until it has
# as much as a less noisy time than the first, and the student jumps again from there, a shorter way.
#
# Which noise is added is a choice. In the paper it is fresh. Then x̂_0 and the noise are independent, as x_0 and ε are
# in Eq. 1, and a perfect student's new points are distributed as they should be. But each lies on another trajectory:
# with more than one step, the first noise alone does not decide the sample.
#
# It could also be the noise ε̂ that the step has found in its input, x = α x̂_0 + σ ε̂, and η mixes the two (an option of
# this project). With η = 0 nothing is random but the start. For the denoiser of a diffusion model (Eq. 8) this is a
# DDIM step. A student's x̂_0 is something else, the end of the trajectory, which depends on the very noise that ε̂ is to
# stand for. So even a perfect student leaves its trajectory, and its samples spread too far, further with each step.
# (For data that are standard normal themselves, x̂_0 = x, and on Stable Diffusion's schedule a step from 999 to 499
# multiplies x by 1.32.) A student that makes too blurred images may gain by it all the same: toy/README.md has measured
# when.
#
# How far back is another choice. LCM's times are even: 999, 759, 499, 259. How much noise they hold depends on the
# schedule: σ/α at 759 is 4.3 with Stable Diffusion's, and 2.5 with diffusers' squaredcos_cap_v2. There the noise hides
# less of the first step's mistakes, and times with more of it are better: docs/images.md has measured it.
# ---------------------------------------------------------------------------------------------------------------------


def few_step_times(num_inference_steps: int, num_train_timesteps: int, original_inference_steps: int) -> list[int]:
    """`num_inference_steps` times of the training grid from N-1 down, evenly spaced by their place on it: LCM's times.

    `original_inference_steps` is the number of times on that grid, by its name in diffusers' LCMScheduler. diffusers
    computes the place with floats and rounds down, and so does this. (On grids of 200 times and more, exact fractions
    would now and then give another time.)
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
    eta: float = 1.0,
    **cond,
) -> Iterator[Tensor]:
    """Eq. 19 at the first of `times`; then, for each of the others, noise (Eq. 1) and Eq. 19 again.

    Yields x̂_0 after each step, so that a caller can draw the way; the last one is the sample. `randn` returns fresh
    noise of the shape of `noise` at each call. `eta`, this project's option, is its share: 1 is the paper's sampling,
    and LCM's; with 0 the first noise alone decides. (TCD, arXiv 2402.19159, has an η with the same two ends.)
    """
    x, t = noise, torch.full((len(noise),), times[0], device=noise.device)
    for i in range(len(times)):
        x0 = student(x, t, **cond)
        yield x0
        if i + 1 < len(times):
            alpha, sigma = schedule.at(t, x.ndim)
            found = (x - alpha * x0) / sigma  # ε̂
            t = torch.full_like(t, times[i + 1])
            alpha, sigma = schedule.at(t, x.ndim)
            x = alpha * x0 + sigma * (math.sqrt(1 - eta**2) * found + eta * randn())
