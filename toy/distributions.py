"""2-D densities with a closed-form score. All are mixtures of isotropic Gaussians, so diffusing them is exact.

A new one needs a line of code: `DISTRIBUTIONS["mine"] = GaussianMixture(means, std)`, and then `toy:mine` is a teacher.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class GaussianMixture:
    """Equally weighted N(means[i], std² I), means (K, 2); diffused to (α, σ) they are N(α means[i], (α std)² + σ²)."""

    means: Tensor
    std: float

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, 2) and the component each came from (n,)."""
        component = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[component] + self.std * torch.randn(n, 2, generator=generator), component

    def _component_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = (alpha * self.std) ** 2 + sigma**2
        offset = alpha[..., None] * self.means.to(x) - x[:, None]  # (B, K, 2)
        return -offset.square().sum(2) / (2 * variance) - (2 * math.pi * variance).log(), offset, variance

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p_t(x), shape (B,), of x = α x_0 + σ ε; α and σ are (B, 1)."""
        log_p, _, _ = self._component_log_density(x, alpha, sigma)
        return log_p.logsumexp(1) - math.log(len(self.means))

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The ideal noise prediction ε = -σ ∇ log p_t(x) (below Eq. 3), in closed form; (B, 2)."""
        log_p, offset, variance = self._component_log_density(x, alpha, sigma)
        score = (log_p.softmax(1)[..., None] * offset).sum(1) / variance
        return -sigma * score


def _eight_gaussians() -> GaussianMixture:
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), 0.08)


def _moons() -> GaussianMixture:
    angle = torch.linspace(0, math.pi, 32)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return GaussianMixture(0.75 * torch.cat([upper, -upper]), 0.06)


def _spiral() -> GaussianMixture:
    turn = torch.linspace(0.15, 1, 96).sqrt()
    angle = 4 * math.pi * turn
    return GaussianMixture(1.2 * torch.stack([turn * angle.cos(), turn * angle.sin()], 1), 0.04)


def _checkerboard() -> GaussianMixture:
    corner = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    inside = (torch.cartesian_prod(torch.arange(5), torch.arange(5)) + 0.5) / 5
    return GaussianMixture(0.6 * ((corner[:, None] + inside).reshape(-1, 2) - 2), 0.05)


DISTRIBUTIONS = {
    "8gaussians": _eight_gaussians(),
    "moons": _moons(),
    "checkerboard": _checkerboard(),
    "spiral": _spiral(),
}
