"""2-D densities with a closed-form score. All are mixtures of isotropic Gaussians, so diffusing them is exact.

A new one needs a line of code: `DISTRIBUTIONS["mine"] = GaussianMixture(means, std)`, and then `toy:mine` is a teacher.
"""

import math
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from splam import guided


@dataclass
class GaussianMixture:
    """Equally weighted N(means[i], std² I), means (K, 2); diffused to (α, σ) they are N(α means[i], (α std)² + σ²).

    A labelled mixture has the class of each component, (K,). A `label` (B,) below restricts the mixture, sample by
    sample, to the components of that class; the label after the last class is "no class" and restricts nothing.
    """

    means: Tensor
    std: float
    classes: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n points (n, 2) and the component each came from (n,)."""
        component = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[component] + self.std * torch.randn(n, 2, generator=generator), component

    def _component_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log N(x; α means, variance) of each component (B, K), up to a constant that softmax removes; and what its
        gradient needs: the offsets (B, K, 2) of the means from x, and the variance (B, 1)."""
        variance = (alpha * self.std) ** 2 + sigma**2
        offset = alpha[..., None] * self.means.to(x) - x[:, None]  # (B, K, 2)
        return -offset.square().sum(2) / (2 * variance), offset, variance

    def class_probabilities(self, x: Tensor) -> Tensor:
        """How likely a point x (B, 2) of the data is of each class, (B, classes)."""
        log_p, _, _ = self._component_log_density(x, torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1]))
        membership = torch.nn.functional.one_hot(self.classes, self.num_classes).to(log_p)
        return log_p.softmax(1) @ membership

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None, w: float = 0.0) -> Tensor:
        """The ideal noise prediction ε = -σ ∇ log p_t(x) (below Eq. 3), in closed form; (B, 2). With a label that of
        p_t(x | label), and with guidance w that of Eq. 18."""
        log_p, offset, variance = self._component_log_density(x, alpha, sigma)

        def of(log_p: Tensor) -> Tensor:
            return -sigma * (log_p.softmax(1)[..., None] * offset).sum(1) / variance

        if label is None:
            return of(log_p)
        outside = (self.classes.to(label) != label[:, None]) & (label[:, None] < self.num_classes)
        return guided(of(log_p.masked_fill(outside, -torch.inf)), of(log_p), w)

    def endpoint(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None, w: float = 0.0) -> Tensor:
        """Where the PF-ODE (Eq. 3) takes x (B, 2) from the time of one α and σ, (1, 1), to the precision of scipy's
        solver.

        In z = x/α and ρ = σ/α the ODE is dz/dρ = ε (splam.py, section 1), and no noise schedule is left in it. scipy
        computes on the CPU, wherever x is.
        """
        label = None if label is None else label.cpu()

        def slope(rho, z):
            alpha = torch.full((len(x), 1), 1 / math.hypot(1, rho), dtype=torch.float64)
            return self.eps(alpha * torch.from_numpy(z).view(-1, 2), alpha, rho * alpha, label, w).flatten().numpy()

        z, rho = (x / alpha).cpu().double().flatten().numpy(), (sigma / alpha).item()
        path = solve_ivp(slope, (rho, 0), z, "DOP853", rtol=1e-7, atol=1e-7).y  # (2 B, the solver's times)
        return torch.from_numpy(path[:, -1]).view(-1, 2).to(x)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], 1)


def _moons(std: float) -> GaussianMixture:
    """Two half circles that interlock. The second is the first, turned by half a turn."""
    upper = _on_circle(torch.linspace(0, math.pi, 32)) - torch.tensor([0.5, 0.25])
    return GaussianMixture(0.75 * torch.cat([upper, -upper]), std, classes=torch.arange(2).repeat_interleave(32))


def _spiral() -> GaussianMixture:
    """The square root makes steps of equal length: far out, a turn is longer."""
    turn = torch.linspace(0.15, 1, 96).sqrt()
    return GaussianMixture(1.2 * (turn[:, None] * _on_circle(4 * math.pi * turn)), 0.04)


def _checkerboard() -> GaussianMixture:
    """Every second square of four by four, each filled by five by five Gaussians that overlap."""
    corner = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    inside = (torch.cartesian_prod(torch.arange(5), torch.arange(5)) + 0.5) / 5
    return GaussianMixture(0.6 * ((corner[:, None] + inside).reshape(-1, 2) - 2), 0.05)


DISTRIBUTIONS = {
    "gaussian": GaussianMixture(torch.zeros(1, 2), 1.0),  # of which all is known: docs/equations.md, note 16
    "8gaussians": GaussianMixture(_on_circle(torch.arange(8) * math.pi / 4), 0.08, classes=torch.arange(8)),
    "moons": _moons(0.06),
    "clouds": _moons(0.25),  # so wide that the two classes overlap
    "checkerboard": _checkerboard(),
    "spiral": _spiral(),
}
