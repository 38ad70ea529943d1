"""The 2-D distributions, held against autograd, scipy, diffusers and their own samples; the network; the plots."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from test_splam import SD, mixture_denoiser, points, seeded
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from toy import plots
from toy.distributions import DISTRIBUTIONS, GaussianMixture
from toy.mlp import PointMLP

each_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


def schedule_at(alpha):
    return torch.tensor([[alpha]], dtype=torch.float64), torch.tensor([[math.sqrt(1 - alpha**2)]], dtype=torch.float64)


@settings(max_examples=25)
@given(st.floats(0.01, 0.999), st.integers(0, 2**32 - 1))
@each_distribution
def test_eps_is_the_gradient_of_the_log_density(name, alpha, seed):
    """ε = -σ ∇ log p_t (below Eq. 3) by autograd, with torch's own mixture of N(α mean, (α std)² + σ²)."""
    mixture, (alpha, sigma) = DISTRIBUTIONS[name], schedule_at(alpha)
    x = 2 * points(8, seed).double()
    means, deviation = alpha * mixture.means.double(), ((alpha * mixture.std) ** 2 + sigma**2).sqrt()
    parts = Independent(Normal(means, deviation.expand(means.shape)), 1)
    density = MixtureSameFamily(Categorical(torch.ones(len(means), dtype=torch.float64)), parts)
    (score,) = torch.autograd.grad(density.log_prob(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(mixture.eps(x.detach(), alpha, sigma), -sigma * score)


@each_distribution
def test_samples_have_the_moments_of_the_mixture(name):
    """Components are equally likely, and each point is its component's mean plus noise of the right size."""
    mixture, n = DISTRIBUTIONS[name], 100_000
    x, component = mixture.sample(n, seeded(0))
    noise = (x - mixture.means[component]) / mixture.std
    shares = (component[:, None] == torch.arange(len(mixture.means))).double() * len(mixture.means)
    squares = noise[:, :, None] * noise[:, None]
    independent = noise[:, :, None] * shares[:, None]
    for values, expected in ((shares, 1), (noise, 0), (squares, torch.eye(2)), (independent, 0)):
        assert ((values.mean(0) - expected).abs() <= 5 * values.std(0) / math.sqrt(n)).all()  # 5 standard errors


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if DISTRIBUTIONS[name].num_classes])
def test_a_label_leaves_the_components_of_its_class(name):
    """ε of the mixture of these components alone; guidance as Eq. 18 has it; "no class" is the whole mixture."""
    mixture, (alpha, sigma) = DISTRIBUTIONS[name], schedule_at(0.8)
    x = points(6).double()
    whole = mixture.eps(x, alpha, sigma)
    for c in range(mixture.num_classes):
        label = torch.full((6,), c)
        part = GaussianMixture(mixture.means[mixture.classes == c], mixture.std).eps(x, alpha, sigma)
        assert not torch.allclose(part, whole, atol=1e-3)
        torch.testing.assert_close(mixture.eps(x, alpha, sigma, label), part)
        torch.testing.assert_close(mixture.eps(x, alpha, sigma, label, w=3.0), part + 3 * (part - whole))
    torch.testing.assert_close(mixture.eps(x, alpha, sigma, torch.full((6,), mixture.num_classes)), whole)


def test_class_probabilities_are_bayes():
    mixture, x = DISTRIBUTIONS["clouds"], torch.randn(50, 2, dtype=torch.float64)
    parts = [norm(mixture.means[mixture.classes == c], 0.25) for c in (0, 1)]
    density = np.stack([np.exp(part.logpdf(x[:, None]).sum(2)).sum(1) for part in parts], 1)
    np.testing.assert_allclose(mixture.class_probabilities(x), density / density.sum(1, keepdims=True), rtol=1e-5)


def test_the_endpoint_is_where_1000_ddim_steps_of_diffusers_arrive():
    """With a condition and guidance."""
    mixture, label, w = DISTRIBUTIONS["clouds"], torch.ones(200).long(), 2.0
    ddim = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(1000)
    noise = x = points(200)
    alpha, sigma = ddim.alphas_cumprod.sqrt(), (1 - ddim.alphas_cumprod).sqrt()
    for t in ddim.timesteps:
        x = ddim.step(mixture.eps(x, alpha[t].view(1, 1), sigma[t].view(1, 1), label, w), t, x).prev_sample
    end = mixture.endpoint(noise, alpha[-1].view(1, 1), sigma[-1].view(1, 1), label, w)
    assert (x - end).norm(dim=1).max() < 0.05 and (x - end).norm(dim=1).mean() < 0.01


def test_the_endpoint_of_one_gaussian_is_a_scaling():
    """The PF-ODE of N(m, s²) moves z = x / α along (z - m) / sqrt(s² + λ²) = constant."""
    mixture, (alpha, sigma) = GaussianMixture(torch.tensor([[2.0, -1.0]]), 0.5), schedule_at(0.1)
    x, mean = torch.randn(20, 2, dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    expected = mean + (x / alpha - mean) * 0.5 / math.hypot(0.5, sigma / alpha)
    torch.testing.assert_close(mixture.endpoint(x, alpha, sigma), expected, rtol=1e-5, atol=1e-5)


def test_network_takes_one_time_or_one_each_and_times_in_between():
    network, x, t = PointMLP(width=16, depth=1, time_dim=8), torch.randn(1, 2), torch.tensor([0.0, 10.0, 10.5, 11.0])
    each = network(x.expand(4, 2), t).sample
    torch.testing.assert_close(torch.cat([network(x, time).sample for time in t]), each)
    assert len(each.unique(dim=0)) == 4


@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize("name", sorted({*DISTRIBUTIONS} - {"gaussian"}))  # one Gaussian's trajectories are straight
def test_the_sub_path_that_is_shown_is_bent_and_its_line_a_chord_in_z(name, k):
    noise = points(16, 0).double()
    path = plots.sub_path(partial(mixture_denoiser, mixture=DISTRIBUTIONS[name]), SD, noise, k)
    x, alpha = path.x[:, path.which], path.alpha.double()
    assert path.end - path.begin == k and torch.equal(path.x[0], noise)
    assert (x[-1] - DISTRIBUTIONS[name].endpoint(x[:1], *SD.at(torch.tensor([999]), 2))).norm() < 0.1  # by scipy
    ends = torch.stack([alpha[path.begin] / alpha[path.end] * x[path.end], x[path.begin]])  # r x_s and x_t
    torch.testing.assert_close(path.line[[0, -1]], ends, rtol=1e-5, atol=1e-5)
    # Somewhere the curve leaves its chord, but it does not fold back on it.
    z = (x / alpha)[path.begin : path.end + 1]
    (along, across), rise = z[-1] - z[0], z - z[0]
    assert 0.001 < (along * rise[:, 1] - across * rise[:, 0]).abs().max() / (along**2 + across**2) < 0.41


@pytest.mark.parametrize("panels, shape", [(1, (1, 1)), (6, (1, 6)), (7, (2, 4)), (13, (3, 5))])
def test_the_picture_wraps_any_number_of_panels(monkeypatch, panels, shape):
    monkeypatch.setattr(plots, "_rendered", lambda figure: figure)
    path = plots.sub_path(mixture_denoiser, SD, points(8).double(), 100)
    named = {f"a long name, {i} steps": torch.randn(50, 2) for i in range(panels)}
    for below, shown in ((None, 0), (path, 3)):
        axes = [axis for axis in plots.overview(named, below).axes if axis.axison]
        grid = axes[0].get_subplotspec().get_gridspec()
        assert len(axes) == panels + shown and (grid.nrows, grid.ncols) == shape
