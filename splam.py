"""The Sub-Path Linear Approximation Model (SPLAM), Xu et al., ECCV 2024: the paper and nothing else.

Read this file beside the paper: "Eq. 12" is the paper's Eq. 12. It needs only torch.

Notation
    N            training time steps (1000); integer times t in 0..N-1, larger is noisier
    α_t, σ_t     variance-preserving schedule, α_t² + σ_t² = 1;  x_t = α_t x_0 + σ_t ε
    t, s         start (noisier, the paper's t_{n+k}) and end (cleaner, t_n) of a sub-path; s = max(t - k, 0)
    r            drift ratio α_t / α_s < 1
    k, k_φ, m    skipping step size, solver step size, solver steps per sub-path m = k / k_φ
    γ            place on the sub-path: 1 at its start t, 0 at its (drifted) end s
    w            guidance, ε + w (ε - ε_∅): w = 8 is a guidance_scale of 9 elsewhere
    f, F         denoiser (Eq. 8, 14) and the same with the boundary condition (Eq. 5, 16)

Shapes: x is (B, ...) - points (B, 2), pixels or latents (B, C, H, W); t, s and γ are (B,). Everything the schedule
touches is float32, whatever precision the networks compute in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5  # of the boundary condition; the values of LCM and of its scheduler
HUBER_C = 1e-3
GAMMA_DIM = 32  # length of the γ-embedding


# ---------------------------------------------------------------------------------------------------------------------
# Section 3: the diffusion process and its ODE solver
# ---------------------------------------------------------------------------------------------------------------------


class Schedule:
    """α_t and σ_t of Eq. 1 as float32 tables, from the ᾱ_t = α_t² (`alphas_cumprod`) of a diffusers scheduler."""

    def __init__(self, alphas_cumprod: Tensor):
        self.alpha = alphas_cumprod.double().sqrt().float()
        self.sigma = (1 - alphas_cumprod.double()).sqrt().float()

    def __len__(self) -> int:
        return len(self.alpha)

    def _on(self, device: torch.device) -> None:
        if self.alpha.device != device:
            self.alpha, self.sigma = self.alpha.to(device), self.sigma.to(device)

    def at(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t) for integer times t (B,), shaped (B, 1, ...) to multiply an x of `ndim` dimensions."""
        self._on(t.device)
        shape = (-1,) + (1,) * (ndim - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The real-valued time t' at which the process has the noise-to-signal ratio σ/α; shape (B,).

        Linear in log(σ/α) between integer times, because that is well conditioned in float32 over the whole schedule.
        """
        self._on(alpha.device)
        table = (self.sigma / self.alpha.clamp_min(1e-20)).log()
        value = (sigma / alpha.clamp_min(1e-20)).log().flatten().clamp(table[0], table[-1])
        after = torch.searchsorted(table, value).clamp(1, len(self) - 1)
        before = after - 1
        return before + (value - table[before]) / (table[after] - table[before])


def to_x0_eps(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Network output -> (x_0, ε) with x = α x_0 + σ ε: the denoiser of Eq. 8.

    "epsilon" outputs ε, "sample" x_0, and "v_prediction" v = α ε - σ x_0. Points inside a sub-path (Eq. 14) have
    α² + σ² < 1, so v is inverted without assuming 1.
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
    """ε̃ = ε(x,c) + w (ε(x,c) - ε(x,∅)), Eq. 18. Linear, so it holds for v and x_0 predictions alike."""
    return conditional + w * (conditional - unconditional)


Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, t) -> (x_0, ε), with condition and guidance inside


@torch.no_grad()
def multiple_estimation(
    denoise: Denoiser, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, k: int, solver_step: int
) -> Tensor:
    """x̂_s from x_t by m = k / k_φ deterministic DDIM steps of size k_φ (Eq. 18). m = 1 is one DDIM step.

    A sub-path that is cut off at time 0 arrives early; its remaining steps go from s to s, which DDIM leaves in place.
    """
    for _ in range(math.ceil(k / solver_step)):
        t_next = torch.maximum(t - solver_step, s)
        x0, eps = denoise(x, t)
        alpha, sigma = schedule.at(t_next, x.ndim)
        x, t = alpha * x0 + sigma * eps, t_next
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Section 4.2.1 and appendices B, C: the linear ODE of a sub-path
# ---------------------------------------------------------------------------------------------------------------------


class SubPathPoint(NamedTuple):
    """A point x_γ = α_γ x_0 + σ_γ ε of a sub-path, with its two coefficients, each broadcastable over x."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor


def sub_path_point(
    x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, gamma: Tensor, schedule: Schedule, ode: str, sigma: str
) -> SubPathPoint:
    """x_γ on the straight line between the ends of a sub-path, and its schedule (α_γ, σ_γ).

        SL (Eq. 12)   x_γ = (1-γ) r x_s + γ x_t,   so α_γ = α_t for every γ (Eq. 14)
        DL (Eq. 26)   x_γ = (1-γ)   x_s + γ x_t,   so α_γ = (1-γ) α_s + γ α_t (Eq. 27)

    The two differ in one number, the drift that multiplies x_s. With u = (1-γ)·drift the noise of x_γ is
    u σ_s ε_s + γ σ_t ε_t, and its size depends on how the noises of the two ends are coupled:

        σ_γ² = (u σ_s)² + 2 u γ C + (γ σ_t)²,   C = Cov(σ_s ε_s, σ_t ε_t)

        approx   C = σ_s σ_t:  σ_γ = u σ_s + γ σ_t (below Eq. 15). The ends share one ε, as they do when x_s comes from
                 x_t by a DDIM step: then this linear form is exact, and it is what the training below produces.
        exact    C = r σ_s²:   Eq. 24 for SL, Eq. 28 for DL. x_t comes from x_s by fresh noise (Markov chain, Eq. 20).

    Both give σ_t at γ = 1 and drift·σ_s at γ = 0; Eq. 25 is their difference in between.
    """
    gamma = gamma.view((-1,) + (1,) * (x_t.ndim - 1))
    alpha_t, sigma_t = schedule.at(t, x_t.ndim)
    alpha_s, sigma_s = schedule.at(s, x_t.ndim)
    r = alpha_t / alpha_s
    u = (1 - gamma) * (1 if ode == "dl" else r)
    if sigma == "approx":
        sigma_gamma = u * sigma_s + gamma * sigma_t
    else:
        sigma_gamma = ((u * sigma_s) ** 2 + 2 * u * gamma * r * sigma_s**2 + (gamma * sigma_t) ** 2).sqrt()
    return SubPathPoint(u * x_s + gamma * x_t, u * alpha_s + gamma * alpha_t, sigma_gamma)


# ---------------------------------------------------------------------------------------------------------------------
# Section 4.2.2: the student F_θ(x_γ, c, γ)
# ---------------------------------------------------------------------------------------------------------------------


def gamma_embedding(gamma: Tensor) -> Tensor:
    """γ (B,) -> (B, GAMMA_DIM), exactly the zero vector at γ = 1, so that its weights can be dropped after training.

    Smooth on purpose: the highest frequency turns four times over the sub-path, so neighbouring γ look alike.
    """
    freqs = math.pi * torch.logspace(-1, 3, GAMMA_DIM // 2, base=2, device=gamma.device)
    angle = (1 - gamma.float())[:, None] * freqs
    return torch.cat([angle.sin(), angle.cos() - 1], dim=1)


class GammaTimeEmbedding(nn.Module):
    """A network's own time embedding with γ beside t: MLP(t_emb + W·γ_emb). W has no bias, so γ = 1 adds exactly zero.

    γ is set by the surrounding ConsistencyFunction before each pass. It is an attribute and not a forward hook: a hook
    closes over one module and goes on reading *that* one after a deepcopy.
    """

    def __init__(self, time_embedding: nn.Module):
        super().__init__()
        self.time_embedding = time_embedding
        self.projection = nn.Linear(GAMMA_DIM, time_embedding.linear_1.in_features, bias=False)
        self.gamma: Tensor | None = None

    def forward(self, t_emb: Tensor, condition: Tensor | None = None) -> Tensor:
        t_emb = t_emb + self.projection(gamma_embedding(self.gamma)).to(t_emb.dtype)
        return self.time_embedding(t_emb, condition)


def boundary(t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """c_skip(t), c_out(t) of Eq. 5 and 16: c_skip(0) = 1, c_out(0) = 0, and soon the other way round."""
    scaled = (TIMESTEP_SCALING * t.float()).view((-1,) + (1,) * (ndim - 1))
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


class ConsistencyFunction(nn.Module):
    """F_θ(x_γ, c, γ) of Eq. 16 around a network with diffusers' signature `network(x, t, **cond).sample`.

    `gamma_conditioning` says how the network learns where on the sub-path it is:
        "embedding"  the paper: it sees (x_γ, t, γ), γ through an embedding that is zero at γ = 1.
        "time"       this project: with ρ = σ_γ/α_γ the same point, scaled to unit variance, lies on the diffusion
                     process at the time t' where σ_t'/α_t' = ρ, and the network sees just that. It needs no new
                     weights, and the teacher is already right there.
        None         the finished student, a plain network at γ = 1.
    At γ = 1 all three are the same function, and equal to the teacher's denoiser at the start of training.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, prediction_type: str, gamma_conditioning: str | None = None
    ):
        super().__init__()
        self.network, self.schedule = network, schedule
        self.prediction_type, self.gamma_conditioning = prediction_type, gamma_conditioning
        if gamma_conditioning == "embedding":
            network.time_embedding = GammaTimeEmbedding(network.time_embedding)

    def forward(self, x: Tensor, t: Tensor, gamma: Tensor | None = None, point: SubPathPoint | None = None, **cond):
        """x: (B, ...), t: (B,) start of the sub-path; γ (B,) and `point` (its α_γ, σ_γ), or neither for γ = 1."""
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
        return c_skip * x + c_out * x0

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The network's weights without the γ-projection: the teacher's parameter names and shapes."""
        weights = self.network.state_dict()
        weights.pop("time_embedding.projection.weight", None)
        return {name.replace("time_embedding.time_embedding.", "time_embedding."): w for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1: sub-path linear approximation distillation (SPLAD)
# ---------------------------------------------------------------------------------------------------------------------


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """The metric d of Eq. 17, averaged over batch and elements: "l2" squared, "huber" sqrt(d² + c²) - c."""
    difference = a.float() - b.float()
    if metric == "l2":
        return difference.square().mean()
    return ((difference.square() + HUBER_C**2).sqrt() - HUBER_C).mean()


class Draws(NamedTuple):
    """What Algorithm 1 draws for each sample: sub-path start t (B,), γ ~ U[0,1] (B, M), noise ε like x_0.

    In the paper M = 1. Several γ for one solved sub-path share the cost of solving it: this project's option.
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
    """t is uniform on the grid N-1, N-1-N/50, ... of 50 `num_ddim_timesteps`, from which few-step sampling takes its
    times as well. A share `gamma_at_one` of the γ, which is 0 in the paper, is 1."""
    n = torch.randint(num_ddim_timesteps, (x_shape[0],), generator=generator)
    gamma = (torch.rand(x_shape[0], gamma_draws, generator=generator) / (1 - gamma_at_one)).clamp_max(1)
    t = num_train_timesteps - 1 - num_train_timesteps // num_ddim_timesteps * n
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
    sigma: str = "approx",
    metric: str = "l2",
) -> Tensor:
    """Eq. 17, one batch of Algorithm 1; a scalar.

    student, target: F_θ and its average F_θ⁻ (ConsistencyFunction). denoise: the frozen teacher with guidance inside.
    ode: "sl" (the paper), "dl" (appendix C), or "lcm", which is "sl" with γ ≡ 1 (Eq. 7).
    """
    t, gamma, noise = draws
    if ode == "lcm":
        gamma = torch.ones_like(gamma)
    s = (t - k).clamp_min(0)
    alpha_t, sigma_t = schedule.at(t, x0.ndim)
    x_t = alpha_t * x0 + sigma_t * noise  # Eq. 1
    x_s = multiple_estimation(denoise, schedule, x_t, t, s, k, solver_step)  # Eq. 18
    with torch.no_grad():
        estimate = target(x_s, s, **cond)  # Eq. 16 at γ = 1, no gradient
    losses = []
    for g in gamma.unbind(1):
        point = sub_path_point(x_t, x_s, t, s, g, schedule, ode, sigma)  # Eq. 12 or 26
        losses.append(distance(student(point.x, t, g, point, **cond), estimate, metric))
    return torch.stack(losses).mean()


@torch.no_grad()
def ema_update(target: nn.Module, student: nn.Module, decay: float) -> None:
    """θ⁻ <- decay·θ⁻ + (1 - decay)·θ."""
    for averaged, parameter in zip(target.parameters(), student.parameters(), strict=True):
        averaged.lerp_(parameter.detach().to(averaged.dtype), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def few_step_times(num_inference_steps: int, num_train_timesteps: int, original_inference_steps: int) -> list[int]:
    """`num_inference_steps` times from the training grid, evenly spaced by index from N-1 down: LCM's time grid.

    The index is a rounded-down product of floats because it is one in diffusers' LCMScheduler.
    """
    step = num_train_timesteps // original_inference_steps
    grid = [step * (i + 1) - 1 for i in reversed(range(original_inference_steps))]
    return [grid[int(i * (original_inference_steps / num_inference_steps))] for i in range(num_inference_steps)]


@torch.no_grad()
def few_step_sample(
    student: Callable, schedule: Schedule, noise: Tensor, times: Sequence[int], randn: Callable[[], Tensor], **cond
) -> Iterator[Tensor]:
    """Eq. 19 and its repetition: predict x_0, re-noise it to the next time with fresh noise, predict again.

    Yields the prediction after every step, so the last one is the sample and a caller can draw the path.
    """
    x = noise
    for i, time in enumerate(times):
        x0 = student(x, torch.full((len(x),), time, device=x.device), **cond)
        yield x0
        if i + 1 < len(times):
            alpha, sigma = schedule.at(torch.full((len(x),), times[i + 1], device=x.device), x.ndim)
            x = alpha * x0 + sigma * randn()
