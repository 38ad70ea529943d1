"""The 2-D distributions, held against autograd, scipy and their own samples; and the network's calling convention."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm

from toy.distributions import DISTRIBUTIONS, GaussianMixture
from toy.mlp import PointMLP

each_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
alphas, seeds = st.floats(0.01, 0.999), st.integers(0, 2**32 - 1)


def schedule_at(alpha):
    return torch.tensor([[alpha]], dtype=torch.float64), torch.tensor([[math.sqrt(1 - alpha**2)]], dtype=torch.float64)


def within_5_standard_errors(samples, expected):
    """The mean of `samples` (n, ...) is `expected`, as far as n samples can tell."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < 5 * error).all()


@settings(max_examples=25)
@given(alphas, seeds)
@each_distribution
def test_eps_is_the_gradient_of_the_log_density(name, alpha, seed):
    """ε = -σ ∇ log p_t (below Eq. 3)."""
    mixture, (alpha, sigma) = DISTRIBUTIONS[name], schedule_at(alpha)
    x = 2 * torch.randn(8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(mixture.eps(x.detach(), alpha, sigma), -sigma * score)


@settings(max_examples=25)
@given(alphas, seeds)
@each_distribution
def test_log_density_is_the_diffused_mixture(name, alpha, seed):
    """Components N(α mean, (α std)² + σ²), by scipy, whose norm is of one dimension."""
    mixture, (alpha, sigma) = DISTRIBUTIONS[name], schedule_at(alpha)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    deviation = math.hypot(alpha.item() * mixture.std, sigma.item())
    parts = norm(alpha * mixture.means.double(), deviation).logpdf(x[:, None]).sum(2)
    expected = logsumexp(parts, axis=1) - math.log(len(mixture.means))
    np.testing.assert_allclose(mixture.log_density(x, alpha, sigma), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.95, 0.5])
@each_distribution
def test_density_integrates_to_one(name, alpha):
    side = torch.linspace(-6, 6, 121, dtype=torch.float64)
    log_p = DISTRIBUTIONS[name].log_density(torch.cartesian_prod(side, side), *schedule_at(alpha))
    assert log_p.exp().sum() * 0.1**2 == pytest.approx(1, abs=1e-6)


@each_distribution
def test_samples_have_the_moments_of_the_mixture(name):
    """Each point is its component's mean plus noise of the right size, and components are equally likely."""
    mixture = DISTRIBUTIONS[name]
    x, component = (a.double() for a in mixture.sample(100_000, torch.Generator().manual_seed(0)))
    means, isotropic = mixture.means.double(), mixture.std**2 * torch.eye(2, dtype=torch.float64)
    within_5_standard_errors(x, means.mean(0))
    within_5_standard_errors(x[:, :, None] * x[:, None], means.T @ means / len(means) + isotropic)
    noise = x - means[component.long()]
    within_5_standard_errors(noise[:, :, None] * noise[:, None], isotropic)
    within_5_standard_errors((component[:, None] == torch.arange(len(means))).double(), 1 / len(means))


@pytest.mark.parametrize("alpha", [0.99, 0.7, 0.1])
@each_distribution
def test_eps_is_the_mean_of_the_noise_given_x(name, alpha):
    """So what is left of the true noise is uncorrelated with every function of x: what training ε_θ looks for."""
    mixture, (alpha, sigma), g = DISTRIBUTIONS[name], schedule_at(alpha), torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 2, generator=g, dtype=torch.float64)
    x = alpha * mixture.sample(20_000, g)[0] + sigma * noise
    left = noise - mixture.eps(x, alpha, sigma)
    for function in (torch.ones_like(x), x, torch.sin(5 * x), torch.sign(x)):
        within_5_standard_errors(left * function, 0)


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if DISTRIBUTIONS[name].num_classes])
def test_a_label_leaves_the_components_of_its_class(name):
    """ε of the mixture of these components alone; guidance as Eq. 18 has it; "no class" is the whole mixture."""
    mixture, (alpha, sigma) = DISTRIBUTIONS[name], schedule_at(0.8)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
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
    density = np.stack(
        [np.exp(norm(mixture.means[mixture.classes == c], 0.25).logpdf(x[:, None]).sum(2)).sum(1) for c in (0, 1)], 1
    )
    np.testing.assert_allclose(mixture.class_probabilities(x), density / density.sum(1, keepdims=True), rtol=1e-5)
    assert mixture.class_probabilities(mixture.means[mixture.classes == 1])[:, 1].min() > 0.5


@pytest.mark.parametrize("label, w", [(None, 0.0), (1, 0.0), (1, 2.0)])
def test_the_endpoint_is_where_many_ddim_steps_arrive(label, w):
    """diffusers' DDIM in 1000 steps."""
    mixture = DISTRIBUTIONS["clouds"]
    ddim = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(1000)
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    label = None if label is None else torch.full((200,), label)
    x, alpha, sigma = noise, ddim.alphas_cumprod.sqrt(), (1 - ddim.alphas_cumprod).sqrt()
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


def test_one_component_has_a_linear_eps():
    """ε = σ (x - α mean) / ((α std)² + σ²), worked out by hand for one Gaussian."""
    alpha, sigma = schedule_at(0.6)
    eps = GaussianMixture(torch.tensor([[2.0, -1.0]]), 0.5).eps(torch.tensor([[1.0, 1.0]]).double(), alpha, sigma)
    torch.testing.assert_close(eps, torch.tensor([[0.8 * (1 - 1.2), 0.8 * (1 + 0.6)]]).double() / (0.09 + 0.64))


def test_network_takes_one_time_or_one_each_and_times_in_between():
    torch.manual_seed(0)
    network, x, t = PointMLP(width=16, depth=1, time_dim=8), torch.randn(4, 2), torch.tensor([0.0, 10.0, 10.5, 11.0])
    each = network(x, t).sample
    for i in range(4):
        torch.testing.assert_close(network(x, t[i]).sample[i], each[i])
    at_one_x = network(x[:1].expand(4, 2), t).sample
    assert len(at_one_x.unique(dim=0)) == 4
