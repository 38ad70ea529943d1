"""The 2-D laboratory: densities with a closed-form score, and a network small enough for seconds of CPU."""

from toy.distributions import DISTRIBUTIONS, GaussianMixture
from toy.mlp import PointMLP

__all__ = ["DISTRIBUTIONS", "GaussianMixture", "PointMLP"]
