"""The theory of the paper, each claim proven by enumeration.

On V = 3 tokens and L = 2 positions every quantity of the method is exact: the marginals p_t, the concrete scores,
the likelihood. `Oracle` computes them by dense linear algebra from the rate matrix alone, and stands where the
network would. A statistical test names its false-alarm probability and has a fixed seed.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2, kstest, poisson

from sedd import (
    SEDD, Absorbing, GeometricNoise, LogLinearNoise, SEDDConfig, Uniform, diffusion_loss, euler_probs,
    low_discrepancy_times, nll_bound, sample, sample_categorical,
)  # fmt: skip

V = 3
GRAPHS = [Absorbing(V), Uniform(V)]
all_graphs = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: type(graph).__name__)
both_noises = pytest.mark.parametrize("noise", [LogLinearNoise(), GeometricNoise()], ids=["loglinear", "geometric"])

# Two tokens that mostly agree; both positions have the same marginal (0.5, 0.3, 0.2).
PAIR = torch.tensor([[0.42, 0.05, 0.03], [0.03, 0.22, 0.05], [0.05, 0.03, 0.12]], dtype=torch.float64)
# Three in a row, each mostly the successor of the one before.
ROW = torch.einsum("a,ab,bc->abc", PAIR.sum(1), *[(PAIR / PAIR.sum(1, keepdim=True)).roll(1, 1)] * 2)


class Oracle:
    """The two call forms of a model, exact for data distributed as p0, a tensor (V, ..., V) of L dimensions."""

    def __init__(self, graph, p0, off_by=None):
        self.graph, self.L, self.off_by = graph, p0.dim(), off_by
        S = graph.num_states
        self.p0 = F.pad(p0, [0, S - V] * self.L)
        self.strides = S ** torch.arange(self.L - 1, -1, -1)

    def transition(self, sigma):
        return torch.linalg.matrix_exp(sigma.double()[:, None, None] * self.graph.rate_matrix())

    def marginal(self, sigma):
        """p_t over all S^L sequences: sigma (B,) -> (B, S^L)."""
        sigma, inverse = sigma.unique(return_inverse=True)
        p, T = self.p0.expand(len(sigma), *self.p0.shape), self.transition(sigma)
        for i in range(1, self.L + 1):
            p = torch.einsum("byx,b...x->b...y", T, p.movedim(i, -1)).movedim(-1, i)
        return p.reshape(len(sigma), -1).clamp(min=0)[inverse]

    def __call__(self, x, sigma, x0=None):
        p, S = self.marginal(sigma), self.graph.num_states
        here = (x * self.strides).sum(-1)
        there = here[:, None, None] + (torch.arange(S) - x[..., None]) * self.strides[:, None]
        log_score = p.gather(1, there.flatten(1)).view(there.shape).log() - p.gather(1, here[:, None])[..., None].log()
        if self.off_by is not None:
            log_score = log_score + self.off_by * (torch.arange(S) != x[..., None])
        return log_score if x0 is None else self.graph.score_entropy(log_score, sigma.double()[:, None], x, x0)


def sequences(S, L):
    """All S^L sequences, in the order of Oracle.marginal."""
    return torch.tensor(list(itertools.product(range(S), repeat=L)))


def off_diagonal(graph, x):
    """(B, L, S), the weights Q[x, y] of the jumps y != x."""
    return graph.rate_matrix()[x] * (torch.arange(graph.num_states) != x[..., None])


def expected_score_entropy(graph, oracle, table, sigma):
    """Score entropy, up to its K: E over x ~ p_t of sum Q[x, y] (s - r log s), for log scores table (S^L, L, S)."""
    x = sequences(graph.num_states, oracle.L)
    p = oracle.marginal(sigma)[0]
    reached = p > 0
    r = oracle(x[reached], sigma.expand(int(reached.sum()))).exp()
    table, x = table[reached], x[reached]
    return (p[reached] * (off_diagonal(graph, x) * (table.exp() - r * table)).sum((1, 2))).sum()


def expected_denoising_score_entropy(graph, oracle, table, sigma):
    """E over x0 ~ p0 and x ~ p(x | x0) of the denoising score entropy, for log scores table (S^L, L, S)."""
    x, x0 = sequences(graph.num_states, oracle.L), sequences(V, oracle.L)
    T, p0 = oracle.transition(sigma)[0], oracle.p0[tuple(x0.T)]
    table = table * (torch.arange(graph.num_states) != x[..., None])
    loss = 0.0
    for clean, weight in zip(x0, p0):
        conditional = T[x, clean].prod(-1)
        entropy = graph.score_entropy(table, sigma, x, clean.expand_as(x)).sum(-1)
        loss = loss + weight * (conditional * entropy).sum()
    return loss


SIGMA = torch.tensor([0.6], dtype=torch.float64)


@all_graphs
@pytest.mark.parametrize("objective", [expected_score_entropy, expected_denoising_score_entropy])
def test_minimiser_is_the_true_ratio(graph, objective):
    """Consistency (Section 3.1, and 3.2 for the denoising form): descent on a free table of log scores finds them."""
    oracle, x = Oracle(graph, PAIR), sequences(graph.num_states, 2)
    table = torch.zeros(len(x), 2, graph.num_states, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(graph, oracle, table, SIGMA)
        loss.backward()
        return loss

    optimizer.step(closure)
    used = (off_diagonal(graph, x) > 0) & (oracle.marginal(SIGMA)[0] > 0)[:, None, None]
    truth = oracle(x, SIGMA.expand(len(x)))
    assert used.sum() >= 2 * V * (V - 1)
    torch.testing.assert_close(table[used].exp().detach(), truth[used].exp(), rtol=1e-4, atol=1e-5)


@all_graphs
def test_denoising_score_entropy_differs_by_a_constant(graph):
    """Section 3.2: in expectation both objectives have the same gradient, at any scores."""
    oracle = Oracle(graph, PAIR)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(graph.num_states**2, 2, graph.num_states, dtype=torch.float64, generator=generator)
        table.requires_grad_()
        a, b = (torch.autograd.grad(f(graph, oracle, table, SIGMA), table)[0]
                for f in (expected_score_entropy, expected_denoising_score_entropy))  # fmt: skip
        assert a.abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@all_graphs
def test_score_entropy_is_nonnegative_convex_and_a_barrier(graph):
    """Section 3.1. Along the score s of one jump it is convex in s, at least zero, and grows without end as s -> 0."""
    x0, x = torch.zeros(400, 1, dtype=torch.long), torch.full((400, 1), graph.num_states - 1)
    p = torch.linalg.matrix_exp(SIGMA * graph.rate_matrix())[:, 0]  # the other scores are right: they cost nothing
    s = torch.linspace(0.01, max(8, 1.5 * p[0] / p[-1]), 400, dtype=torch.float64)
    log_score = (p / p[-1]).clamp(min=1e-20).log().expand(400, 1, -1).clone()
    log_score[:, 0, 0] = s.log()
    entropy = graph.score_entropy(log_score, SIGMA, x, x0)[:, 0]
    assert (entropy >= 0).all() and entropy.min() < 1e-4
    assert (entropy[2:] - 2 * entropy[1:-1] + entropy[:-2] > 0).all()
    log_score[:, 0, 0] = -torch.logspace(0, 12, 400, dtype=torch.float64)
    barrier = graph.score_entropy(log_score, SIGMA, x, x0)[:, 0]
    assert (barrier.diff() > 0).all() and barrier[-1] > 1e10


def test_cross_entropy_is_the_special_case():
    """If a masked token's scores are q(y) / (e^sigma - 1) with q a distribution, the loss is -log q(x0) / (e^sigma - 1)."""
    graph, q = Absorbing(V), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_score = torch.cat([q.log() - torch.log(torch.expm1(SIGMA)), torch.zeros(1)])[None, None]
    for x0 in range(V):
        entropy = graph.score_entropy(log_score, SIGMA, torch.tensor([[V]]), torch.tensor([[x0]]))
        torch.testing.assert_close(entropy[0, 0], -q[x0].log() / torch.expm1(SIGMA[0]))


def test_score_entropy_is_a_bregman_divergence_and_not_symmetric():
    """Of F(r) = r log r: D(r, s) = F(r) - F(s) - F'(s) (r - s). Swapping 0.5 and 1 changes it."""

    def entropy(r, s):  # one masked token of a vocabulary of one, where the ratio is r at sigma = log(1 + 1/r)
        log_score = torch.tensor([[[math.log(s), 0.0]]], dtype=torch.float64)
        sigma = torch.tensor([math.log1p(1 / r)], dtype=torch.float64)
        return Absorbing(1).score_entropy(log_score, sigma, torch.tensor([[1]]), torch.tensor([[0]])).item()

    def bregman(r, s):
        return r * math.log(r) - s * math.log(s) - (math.log(s) + 1) * (r - s)

    assert entropy(0.5, 1) == pytest.approx(bregman(0.5, 1)) == pytest.approx(0.1534, abs=1e-4)
    assert entropy(1, 0.5) == pytest.approx(bregman(1, 0.5)) == pytest.approx(0.1931, abs=1e-4)


@all_graphs
def test_reverse_chain_carries_p_T_back(graph):
    """Section 2: the master equation with the rates Q[x, y] p_t(y) / p_t(x), integrated from sigma = 4 to 0.02 (RK4)."""
    oracle, S = Oracle(graph, PAIR), graph.num_states
    x = sequences(S, 2)

    def velocity(p, sigma):
        """Flow of p per unit of sigma undone: the gains and losses along all jumps of one position."""
        reached = oracle.marginal(sigma)[0] > 0
        rate = torch.zeros(len(x), 2, S, dtype=torch.float64)
        rate[reached] = graph.reverse_rate(oracle(x[reached], sigma.expand(int(reached.sum()))).exp(), x[reached])
        flow = (p[:, None, None] * rate).view(-1, 2, S)
        there = (x * oracle.strides).sum(-1)[:, None, None] + (torch.arange(S) - x[..., None]) * oracle.strides[:, None]
        return torch.zeros_like(p).index_add(0, there.flatten(), flow.flatten())

    grid = torch.logspace(math.log10(4), math.log10(0.02), 201, dtype=torch.float64)
    p = oracle.marginal(grid[:1])[0]
    for a, b in zip(grid[:-1], grid[1:]):
        h, middle = a - b, ((a + b) / 2)[None]
        k1 = velocity(p, a[None])
        k2 = velocity(p + h / 2 * k1, middle)
        k3 = velocity(p + h / 2 * k2, middle)
        k4 = velocity(p + h * k3, b[None])
        p = p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(p, oracle.marginal(grid[-1:])[0], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------- likelihood


def bound_of_each(model, graph, noise, L, copies=2000, num_times=16, seed=0):
    """Mean of nll_bound and its standard error for each of the V^L sequences: two tensors (V^L,)."""
    torch.manual_seed(seed)
    x0 = sequences(V, L).repeat_interleave(copies, 0)
    bound = torch.cat([nll_bound(model, graph, noise, part, num_times) for part in x0.split(20_000)])  # fits a cache
    bound = bound.double().view(-1, copies)
    return bound.mean(1), bound.std(1) / copies**0.5


@all_graphs
@both_noises
def test_bound_with_the_true_scores_is_the_likelihood(graph, noise):
    """Section 3.3. For every x0, within 5 standard errors and the two ends' known slack.

    That slack: under log-linear noise p_T differs from p_base by eps per token, at most eps |log V p(x_i)| each; under
    geometric noise the last step takes the positions one by one, an error of order sigma_min^2. False alarm 9 x 6e-7.
    """
    bound, error = bound_of_each(Oracle(graph, PAIR), graph, noise, 2)
    assert error.max() < 0.1
    slack = 1e-3 * (V * PAIR.sum(1)).log().abs().max() * 2
    assert ((bound + PAIR.flatten().log()).abs() < 5 * error + slack).all()


@all_graphs
@both_noises
def test_bound_with_wrong_scores_is_above_the_likelihood(graph, noise):
    """Section 3.3: scores wrong by e^0.5 cost more nats than 5 standard errors, averaged over the data."""
    bound, error = bound_of_each(Oracle(graph, PAIR, off_by=0.5), graph, noise, 2)
    excess = (PAIR.flatten() * (bound + PAIR.flatten().log())).sum()
    assert excess > 5 * (PAIR.flatten() * error).norm() and excess > 0.02


@all_graphs
def test_bound_needs_its_prior_term(graph):
    """Noise that stops at e^-sigma = 0.8, and data even over all sequences, for which p_T is p_base exactly.

    The bound is then exact, within 5 standard errors (false alarm 9 x 6e-7), and without its prior term would not be.
    """
    noise, p0 = LogLinearNoise(eps=0.8), torch.full((V, V), 1 / V**2, dtype=torch.float64)
    bound, error = bound_of_each(Oracle(graph, p0), graph, noise, 2, copies=4000, num_times=32)
    assert ((bound - 2 * math.log(V)).abs() < 5 * error).all()
    sigma, _ = noise(torch.ones(1, dtype=torch.float64))
    T = Oracle(graph, p0).transition(sigma)[0, :, :V]
    base = T.mean(1, keepdim=True)  # what noise makes of evenly drawn tokens
    if isinstance(graph, (Absorbing, Uniform)):
        known = [1 / V] * V if graph.mask_id is None else [0.8 / 3] * 3 + [0.2]
        torch.testing.assert_close(base[:, 0], torch.tensor(known, dtype=torch.float64))
    prior = torch.where(T > 0, T * (T / base).log(), 0.0).sum(0)
    torch.testing.assert_close(graph.prior_kl(sigma, torch.arange(V)), prior)
    assert 2 * prior.min() > 10 * error.max()


@all_graphs
def test_bound_pays_for_the_distance_of_p_T_from_p_base(graph):
    """Noise that stops at e^-sigma = 0.8, and data that are not even: the bound is off by just that distance.

    The chain that starts from p_T would generate p0. Started from p_base it costs E[log p_T(x_T) / p_base(x_T)] more,
    given x0. Within 5 standard errors, false alarm 9 x 6e-7; the distance is many of them.
    """
    noise, oracle, x0 = LogLinearNoise(eps=0.8), Oracle(graph, PAIR), sequences(V, 2)
    bound, error = bound_of_each(oracle, graph, noise, 2, copies=1000)
    sigma, _ = noise(torch.ones(1, dtype=torch.float64))
    T = oracle.transition(sigma)[0]
    p_T, p_base = oracle.marginal(sigma)[0], T[:, :V].mean(1).outer(T[:, :V].mean(1)).flatten()
    given = T[sequences(graph.num_states, 2), x0[:, None]].prod(-1)  # p(x_T | x0), (V^2, S^2)
    distance = (given * (p_T / p_base).log()).sum(-1)
    assert ((bound + PAIR.flatten().log() - distance).abs() < 5 * error).all()
    assert (distance.abs() > 10 * error).any()


@all_graphs
def test_bound_needs_its_reconstruction_term(graph):
    """Noise that starts at sigma = 0.5, and one position, for which the last denoising step is the exact posterior.

    Within 5 standard errors, false alarm 3 x 6e-7; the reconstruction term is many of them.
    """
    p0 = PAIR.sum(1)
    bound, error = bound_of_each(Oracle(graph, p0), graph, GeometricNoise(0.5, 20.0), 1, copies=4000)
    assert ((bound + p0.log()).abs() < 5 * error).all()
    T = Oracle(graph, p0).transition(torch.tensor([0.5]))[0][:, :V]
    posterior = T * p0 / (T * p0).sum(1, keepdim=True)
    reconstruction = -torch.where(T > 0, T * posterior.log(), 0.0).sum(0)
    assert (reconstruction > 10 * error).all()


@all_graphs
@both_noises
def test_diffusion_loss_is_a_draw_of_the_integral(graph, noise):
    """Section 3.3: its mean is the integral over all of [0, 1], done here by quadrature. Within 5 standard errors, 6e-7."""
    oracle, x0 = Oracle(graph, PAIR), torch.tensor([[0, 1]])
    x = sequences(graph.num_states, 2)
    # Gauss-Legendre in u with t = u^3, for the uniform graph's integrand grows like log 1/t
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(60))
    u = (nodes + 1) / 2
    sigma, dsigma = noise(u**3)
    integral = 0.0
    for s, d, w in zip(sigma, dsigma, weights / 2 * 3 * u**2):
        p = oracle.transition(s[None])[0][x, x0[0]].prod(-1)
        seen = p > 0
        entropy = oracle(x[seen], s.expand(int(seen.sum())), x0.expand(int(seen.sum()), 2)).sum(-1)
        integral += w * d * (p[seen] * entropy).sum()
    torch.manual_seed(0)
    draws = torch.stack([diffusion_loss(oracle, graph, noise, x0.expand(64, 2)).mean() for _ in range(400)])
    assert (draws.mean() - integral).abs() < 5 * draws.std() / 20


def test_low_discrepancy_times_are_uniform_and_evenly_spread():
    """Every one of n intervals of [0, 1] gets exactly one of n times, at a place that moves."""
    shifts = set()
    for _ in range(20):
        t = low_discrepancy_times(50)
        assert (t > 0).all() and (t <= 1).all()
        assert sorted(torch.ceil(t.double() * 50 - 1e-4).tolist()) == list(range(1, 51))
        shifts.add(round(t[0].item() % 0.02, 4))
    assert len(shifts) > 10


# ----------------------------------------------------------------------------------------------------- samplers


@all_graphs
def test_tweedie_is_the_exact_posterior_of_one_token(graph):
    """Section 4.2 (discrete Tweedie): with L = 1 the step is Bayes' rule, p(x_s | x_t) for any s < t."""
    p0, S = PAIR.sum(1), graph.num_states
    oracle, x = Oracle(graph, p0), torch.arange(graph.num_states)[:, None]
    for sigma, delta in (2.0, 0.3), (1.0, 0.99), (0.5, 0.5):
        early, step = torch.tensor([sigma - delta]).double(), torch.tensor([delta]).double()
        joint = oracle.transition(step)[0] * oracle.marginal(early)[0]  # (x_t, x_s)
        probs = graph.tweedie_probs(oracle(x, (early + step).expand(S)).exp(), step, x)[:, 0]
        torch.testing.assert_close(probs, joint / joint.sum(1, keepdim=True))


def total_variation(x, p0):
    """Between the rows of x (n, L) and p0; from n exact draws it would be about 0.4 sqrt(V^L / n)."""
    cells = (x * V ** torch.arange(p0.dim() - 1, -1, -1)).sum(-1)
    return (torch.bincount(cells, minlength=p0.numel()) / len(x) - p0.flatten()).abs().sum().item() / 2


N = 50_000
BLANK = {L: torch.full((N, L), -1) for L in (1, 2, 3)}  # prompts of which all is to be written
NOISE_OF_TV = 0.02  # exact draws from 27 cells exceed it with a chance below 1e-9: 2^27 exp(-2 N 0.02^2)


def sampler_distance(graph, noise, sampler, steps):
    torch.manual_seed(0)
    return total_variation(sample(Oracle(graph, PAIR), graph, noise, BLANK[2], steps, sampler), PAIR)


@all_graphs
@both_noises
@pytest.mark.parametrize("sampler", ["tweedie", "euler"])
def test_samplers_approach_the_data(graph, noise, sampler):
    """Section 4: the total variation between samples and p0 falls with the steps, to next to nothing."""
    few, more, many = (sampler_distance(graph, noise, sampler, steps) for steps in (2, 8, 64))
    assert few > more + NOISE_OF_TV and more > many and many < 0.02 + NOISE_OF_TV


@all_graphs
def test_tweedie_is_no_worse_than_euler(graph):
    """Section 4.2, at equal steps of log-linear noise. Under the absorbing graph the two are then the same,
    up to a draw in a thousand that rounding decides.

    That a step is the best possible one from where it starts does not make it the best one on the way. With the
    coarse steps of geometric noise Euler happens to be nearer under the uniform graph: 0.09 against 0.11 at 8 steps.
    """
    for steps in 2, 8, 64:
        tweedie, euler = (sampler_distance(graph, LogLinearNoise(), sampler, steps) for sampler in ("tweedie", "euler"))
        assert tweedie <= euler + (1e-3 if graph.mask_id is not None else NOISE_OF_TV)


@pytest.mark.parametrize("t, dt", [(1.0, 0.25), (0.5, 0.1), (0.2, 0.15)])
def test_the_samplers_are_one_under_absorbing_log_linear_noise(t, dt):
    """The chances of Euler's step, delta(x, y) + dt dsigma(t) Q[x, y] score_y, are Tweedie's."""
    graph, noise, t, dt = Absorbing(V), LogLinearNoise(), *torch.tensor([[t], [dt]], dtype=torch.float64)
    (sigma, dsigma), (earlier, _) = noise(t), noise(t - dt)
    x = graph.sample_prior(1, 2)
    score = Oracle(graph, PAIR)(x, sigma).exp()
    euler = F.one_hot(x, graph.num_states) + dt * dsigma * graph.reverse_rate(score, x)
    assert 0.1 < euler[..., graph.mask_id].min() and euler[..., graph.mask_id].max() < 0.9
    torch.testing.assert_close(euler, graph.tweedie_probs(score, sigma - earlier, x))


def exact_steps(graph, oracle, noise, sampler, steps, eta=0.0):
    """The distribution over all S^L sequences before each step and after the last, (S^L,) each, by dense matrices."""
    x, Q = sequences(graph.num_states, oracle.L), graph.rate_matrix()
    prior = torch.linalg.matrix_exp(100 * Q)[:, 0]  # noise without end forgets where it began
    p = prior
    for _ in range(oracle.L - 1):
        p = p.outer(prior).flatten()
    yield p
    sigmas, rates = noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    sigmas[-1] = 0
    for step in range(steps):
        score, last = oracle(x, sigmas[step].expand(len(x))).exp(), step == steps - 1
        if sampler == "euler" and not last:
            jump = rates[step] / steps * off_diagonal(graph, x) * score
            probs = jump + F.one_hot(x, graph.num_states) * (1 - jump.sum(-1, keepdim=True)).clamp(min=0)
        else:
            step_Q = (sigmas[step] - sigmas[step + 1]) * Q
            before = torch.einsum("yz,xlz->xly", torch.linalg.matrix_exp(-step_Q), score)
            probs = before.clamp(min=0) * torch.linalg.matrix_exp(step_Q)[x]
            probs[..., V:] *= not last
        probs = probs / probs.sum(-1, keepdim=True)
        if eta and not last:  # kappa of the step, and else p(x0 | x) with new noise
            kappa = 1 - min(1, eta / -torch.expm1(-sigmas[step + 1]))
            before = torch.einsum("yz,xlz->xly", torch.linalg.matrix_exp(-sigmas[step] * Q), score)
            clean = before.clamp(min=0) * torch.linalg.matrix_exp(sigmas[step] * Q)[x]
            clean = clean[..., :V] / clean[..., :V].sum(-1, keepdim=True)
            probs = kappa * probs + (1 - kappa) * clean @ torch.linalg.matrix_exp(sigmas[step + 1] * Q)[:, :V].T
        to = probs[:, 0]
        for i in range(1, oracle.L):
            to = (to[:, :, None] * probs[:, i, None]).flatten(1)
        p = p @ to
        yield p


@all_graphs
@pytest.mark.parametrize("noise", [LogLinearNoise(), GeometricNoise(), GeometricNoise(0.5, 20.0)],
                         ids=["loglinear", "geometric", "geometric from 0.5"])  # fmt: skip
@pytest.mark.parametrize("sampler, eta, steps, off_by", [
    *((sampler, 0, *how) for sampler in ("tweedie", "euler") for how in [(2, None), (8, None), (3, 0.7), (3, -0.7)]),
    ("tweedie", 0.1, 8, None), ("tweedie", 0.6, 3, -0.7), ("euler", 0.3, 3, 0.7),
])  # fmt: skip
def test_every_step_is_its_formula(graph, noise, sampler, eta, steps, off_by):
    """Section 4: N samples, with scores in float32, after each step against the exact distribution of that step.

    Pearson's chi-square over the sequences, and Poisson's law for those that hardly occur; false alarm 2e-6 a step.
    Scores that are wrong by a factor reach the cases where a probability would come out negative. Noise that starts at
    0.5 shows whether the last step undoes all of it.
    """
    oracle, counts, S = Oracle(graph, PAIR, off_by), [], graph.num_states
    model = lambda x, sigma: oracle(x, sigma).float()
    torch.manual_seed(0)
    sample(model, graph, noise, BLANK[2], steps, sampler, eta=eta,
           callback=lambda step, x: counts.append(torch.bincount(x @ oracle.strides, minlength=S**2)))  # fmt: skip
    assert len(counts) == steps + 1
    for count, p in zip(counts, exact_steps(graph, oracle, noise, sampler, steps, eta)):
        expected, often = N * p, N * p >= 5
        assert ((count - expected) ** 2 / expected)[often].sum() < chi2.isf(1e-6, int(often.sum()))
        assert count[~often].sum() <= poisson.isf(1e-6, expected[~often].sum())


@all_graphs
@both_noises
@pytest.mark.parametrize("eta", [0.02, 0.3, 1.0])
def test_fresh_draws_keep_the_marginal_of_a_position(graph, noise, eta):
    """Of the states of one position, at each step: its marginal at that time. Pearson's chi-square, false alarm 1e-6."""
    oracle, steps, counts = Oracle(graph, PAIR.sum(1)), 6, []
    torch.manual_seed(0)
    sample(oracle, graph, noise, BLANK[1], steps, eta=eta,
           callback=lambda step, x: counts.append(torch.bincount(x[:, 0], minlength=graph.num_states)))  # fmt: skip
    sigmas, _ = noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    for step in range(1, steps):  # at the start, pi is not yet the marginal, and at the end there is no noise
        p = oracle.marginal(sigmas[step][None])[0]
        slack = 2 * N * torch.exp(-sigmas[0])  # what pi lacks of the marginal at the start
        excess = ((counts[step] - N * p).abs() - slack).clamp(min=0)
        assert (excess**2 / (N * p).clamp(min=1)).sum() < chi2.isf(1e-6, graph.num_states - 1)


@both_noises
def test_the_exact_sampler_draws_from_the_data(noise):
    """N samples of three tokens: Pearson's chi-square against p0, false alarm 1e-6, where as many Tweedie steps fail."""
    model, off = Oracle(Absorbing(V), ROW), {}
    for sampler in "exact", "tweedie":
        torch.manual_seed(0)
        x = sample(model, model.graph, noise, BLANK[3], 3, sampler)
        counts = torch.bincount((x * V ** torch.arange(2, -1, -1)).sum(-1), minlength=V**3)
        off[sampler] = ((counts - N * ROW.flatten()) ** 2 / (N * ROW.flatten())).sum()
    assert off["exact"] < chi2.isf(1e-6, V**3 - 1) < off["tweedie"] / 10


@both_noises
def test_the_exact_sampler_meets_each_token_at_its_time(noise):
    """One token a call, in any order alike, and at such times that (m' / m)^n is uniform: Kolmogorov and chi-square.

    m = 1 - e^-sigma is the chance of being masked, and n the number of masked tokens. False alarm 1e-6 each.
    """
    graph, calls, states = Absorbing(V), [], []
    oracle = Oracle(graph, ROW)

    def model(x, sigma):
        calls.append(-torch.expm1(-sigma.double()))
        return oracle(x, sigma)

    torch.manual_seed(0)
    sample(model, graph, noise, BLANK[3], 1, "exact", callback=lambda step, x: states.append(x == graph.mask_id))
    assert [state.sum() for state in states] == [3 * N, 2 * N, N, 0] and len(calls) == 3
    m = -torch.expm1(-noise(torch.ones(N).double())[0])
    for n, now in zip((3, 2, 1), calls):
        assert kstest(((now / m) ** n).numpy(), "uniform").pvalue > 1e-6
        m = now
    order = torch.stack(states[:-1]).sum(0)  # (N, 3): how many calls each has waited
    kinds = torch.bincount(order @ torch.tensor([16, 4, 1]))
    kinds = kinds[kinds > 0]
    assert len(kinds) == 6 and ((kinds - N / 6) ** 2 / (N / 6)).sum() < chi2.isf(1e-6, 5)


def test_the_exact_sampler_ends_where_the_noise_does():
    """Geometric noise that begins at 0.7 leaves tokens masked with chance 1/2: they all appear in one last call."""
    noise, graph, calls = GeometricNoise(0.7, 20.0), Absorbing(V), []
    oracle = Oracle(graph, torch.einsum("a,b,c,d,e,f->abcdef", *[PAIR.sum(1)] * 6))

    def model(x, sigma):
        calls.append((x == graph.mask_id).sum(-1)[sigma < 0.7 + 1e-6])  # of sequences at the end of their noise
        return oracle(x, sigma)

    torch.manual_seed(0)
    x = sample(model, graph, noise, torch.full((2000, 6), -1), 1, "exact")
    left = torch.cat(calls)
    left = torch.bincount(left[left > 0], minlength=7)
    share = 1 - math.exp(-0.7)  # of tokens that noise has hit by then; a sequence with none left has no last call
    expected = 2000 * torch.tensor([math.comb(6, k) * share**k * (1 - share) ** (6 - k) for k in range(7)])
    assert ((left - expected)[1:] ** 2 / expected[1:]).sum() < chi2.isf(1e-6, 6)
    counts = torch.bincount(x.flatten(), minlength=V)
    assert ((counts - 12000 * PAIR.sum(1)) ** 2 / (12000 * PAIR.sum(1))).sum() < chi2.isf(1e-6, V - 1)


@pytest.mark.parametrize("least, most", [(1e-12, 1e-8), (15.0, 20.0)])
def test_the_exact_sampler_knows_sigma_where_nearly_none_or_nearly_all_is_masked(least, most):
    """1 - e^-sigma rounds to 0 or to 1 there, in float32: sigma must not."""
    graph, seen = Absorbing(V), []
    oracle = Oracle(graph, PAIR.sum(1))

    def model(x, sigma):
        seen.append(sigma)
        return oracle(x, sigma.double().clamp(0.1, 5))

    torch.manual_seed(0)
    sample(model, graph, GeometricNoise(least, most), torch.full((1000, 1), -1), 1, "exact")
    (sigma,) = seen
    if most < 1:  # m falls to m u, and at small noise sigma is m
        assert (sigma > 0).all() and kstest(sigma.double().numpy() / most, "uniform").pvalue > 1e-6
    else:  # it falls to the end at once, for m u is far below 1
        torch.testing.assert_close(sigma, torch.full((1000,), least), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kept", [{0: 1}, {1: 2}, {0: 0, 2: 0}], ids=["prefix", "middle", "both ends"])
def test_the_exact_sampler_infills(kept):
    """Section 4.3, and now without any error of steps."""
    assert infilling_distance(Absorbing(V), kept, sampler="exact") < NOISE_OF_TV


@all_graphs
def test_steps_have_no_negative_probability(graph):
    """Where a step is too long, or scores promise too much or too little, there is still a chance of each state."""
    x = sequences(graph.num_states, 2)
    for off_by, sigma in itertools.product((-3.0, 0.0, 3.0), (0.1, 1.0, 5.0)):
        sigma = torch.tensor([sigma], dtype=torch.float64)
        score = Oracle(graph, PAIR, off_by)(x, sigma.expand(len(x))).exp()
        for probs in (euler_probs(graph, score, sigma, x), graph.denoise_probs(score, sigma, x),
                      graph.tweedie_probs(score, sigma, x)):  # fmt: skip
            assert (probs >= 0).all() and (probs.sum(-1) > 0.99).all()


def infilling_distance(graph, kept, seed=0, sampler="tweedie"):
    """Total variation of the infilled rest against p0(rest | kept), for ROW with `kept`, a dict from position to token."""
    prompt = torch.full((N, 3), -1)
    for i, token in kept.items():
        prompt[:, i] = token
    torch.manual_seed(seed)
    x = sample(Oracle(graph, ROW), graph, LogLinearNoise(), prompt, 64, sampler)
    assert all((x[:, i] == token).all() for i, token in kept.items())
    conditional = torch.zeros_like(ROW)
    place = tuple(kept.get(i, slice(None)) for i in range(3))
    conditional[place] = ROW[place] / ROW[place].sum()
    return total_variation(x, conditional)


@pytest.mark.parametrize(
    "kept", [{0: 1}, {2: 1}, {1: 2}, {0: 0, 2: 0}], ids=["prefix", "suffix", "middle", "both ends"]
)
def test_infilling_is_exact_under_the_absorbing_graph(kept):
    """Section 4.3: the rest follows p0(rest | kept); 64 steps leave up to 0.02, chance below 1e-9 up to NOISE_OF_TV."""
    assert infilling_distance(Absorbing(V), kept) < 0.02 + NOISE_OF_TV


@pytest.mark.parametrize("kept", [{0: 1}, {1: 2}], ids=["prefix", "middle"])
def test_infilling_is_not_exact_under_the_uniform_graph(kept):
    """A clean kept token is taken for one that may be noisy, and believed too little: a gap of 0.15 that no steps close."""
    assert infilling_distance(Uniform(V), kept) > 0.1 + NOISE_OF_TV


def test_draws_are_exact_far_into_the_tail():
    """50,000 tokens, one of mass 0.9995 and a tail of 1e-8 each. Of 30,000 draws 15 fall in the tail, Poisson.

    Outside 2 ... 36 with chance 1e-5. The Gumbel trick on float32 uniform numbers, of which the largest is 1 - 2^-24,
    cannot lift a tail token past the head: it fails the same test. (It is monotone: the tail's largest number will do.)
    """
    gumbel_of = lambda u: u.clamp(min=1e-30).log().neg().log().neg()
    torch.manual_seed(0)
    p = torch.full((50_000,), 5e-4 / 49_999)
    p[0] = 1 - 5e-4
    exact = gumbel = 0
    for _ in range(60):
        exact += (sample_categorical(p.expand(500, -1)) > 0).sum().item()
        u = torch.rand(500, 50_000)
        tail = gumbel_of(u[:, 1:].amax(-1)) + p[1].log()
        gumbel += (tail > gumbel_of(u[:, 0]) + p[0].log()).sum().item()
    assert 2 <= exact <= 36
    assert gumbel < 2


def test_draws_follow_their_probabilities():
    """Pearson's chi-square on 400,000 draws from 40 unequal cells, some empty; false alarm 1e-6."""
    torch.manual_seed(0)
    p = torch.arange(40).float() ** 2 * (torch.arange(40) % 3 > 0)
    counts = torch.bincount(sample_categorical(p.expand(400_000, -1)), minlength=40)
    expected = (400_000 * p / p.sum()).double()
    assert counts[p == 0].sum() == 0
    assert ((counts - expected) ** 2 / expected)[p > 0].sum() < chi2.isf(1e-6, int((p > 0).sum()) - 1)


@pytest.mark.parametrize("u, drawn", [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_states_of_no_chance_are_not_drawn(u, drawn, monkeypatch):
    """Not even where the uniform number is the sum of those before, or next to 1."""
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.full(shape, u, **how))
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    assert sample_categorical(probs).tolist() == [drawn]


def test_top_p_cuts_the_tail_of_the_exact_sampler():
    """One position: of tokens with chances 0.5, 0.3 and 0.2 the first two hold 0.6, and come as 5 to 3; 1e-6."""
    model = Oracle(Absorbing(V), PAIR.sum(1))
    torch.manual_seed(0)
    counts = torch.bincount(sample(model, model.graph, LogLinearNoise(), BLANK[1], 1, "exact", top_p=0.6)[:, 0])
    assert len(counts) == 2 and (counts[0] - N * 5 / 8) ** 2 / (N * 15 / 64) < chi2.isf(1e-6, 1)


@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.5, 0.9, 0.999])
def test_the_tail_is_cut_off_where_the_others_hold_top_p(top_p):
    """By its definition, on plain lists; then Pearson's chi-square of 200,000 draws, false alarm 1e-6."""
    torch.manual_seed(0)
    p = torch.rand(40).double() ** 4
    kept, share = [], 0.0
    for chance, y in sorted(((chance, y) for y, chance in enumerate((p / p.sum()).tolist())), reverse=True):
        if share < top_p or not kept:
            kept.append(y)
            share += chance
    counts = torch.bincount(sample_categorical(p.expand(200_000, -1), top_p), minlength=40)
    assert counts.sum() == counts[kept].sum() and len(kept) < 40
    expected = 200_000 * p[kept] / p[kept].sum()
    assert ((counts[kept] - expected) ** 2 / expected).sum() < chi2.isf(1e-6, max(1, len(kept) - 1))


@all_graphs
def test_top_p_decides_where_a_token_goes_and_not_whether(graph):
    """One step from noise, N times: as many stay as ever (chi-square, false alarm 1e-6), and the least likely never come."""
    p0, states = PAIR.sum(1), []
    torch.manual_seed(0)
    sample(Oracle(graph, p0), graph, LogLinearNoise(), BLANK[1], 2, top_p=0.3,
           callback=lambda step, x: states.append(x[:, 0]))  # fmt: skip
    sigma, after = LogLinearNoise()(torch.tensor([1.0, 0.5]).double())[0]
    start = torch.arange(graph.num_states)[:, None]
    score = Oracle(graph, p0)(start, sigma.expand(len(start))).exp()
    probs = graph.tweedie_probs(score, (sigma - after)[None], start)[:, 0]
    seen = 0
    for x in states[0].unique().tolist():
        went = states[1][states[0] == x]
        others = torch.where(torch.arange(graph.num_states) == x, 0.0, probs[x])
        likely = others.argsort(descending=True)
        before = others[likely].cumsum(0) - others[likely]
        others[likely[before >= 0.3 * others.sum()]] = 0.0
        expected = others / others.sum() * (1 - probs[x, x])
        expected[x] = probs[x, x]
        expected, counts = len(went) * expected, torch.bincount(went, minlength=graph.num_states)
        assert counts[expected == 0].sum() == 0 and (expected == 0).any()
        cells = expected > 0
        assert ((counts - expected)[cells] ** 2 / expected[cells]).sum() < chi2.isf(1e-6, int(cells.sum()) - 1)
        seen += 1
    assert seen == (1 if graph.mask_id is not None else V)


# ------------------------------------------------------------------------------------------ a network that learned


@pytest.mark.parametrize("name", ["absorb", "uniform"])
def test_trained_network_obeys_the_bound(name):
    """Training on the enumerable data: the mean bound is above the entropy (5 standard errors, 3e-7), by at most 0.05."""
    torch.manual_seed(0)
    model = SEDD(SEDDConfig(V, 2, 2, 2, 32, 32, dropout=0.0, graph=name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        cells = sample_categorical(PAIR.flatten().expand(512, -1))
        diffusion_loss(model, model.graph, model.noise, torch.stack([cells // V, cells % V], 1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), decay.step()
    bound, error = bound_of_each(model.eval(), model.graph, model.noise, 2, copies=10_000, num_times=8)
    weight, entropy = PAIR.flatten(), -(PAIR * PAIR.log()).sum()
    mean, error = (weight * bound).sum(), (weight * error).norm()
    assert error < 0.015
    assert entropy - 5 * error < mean < entropy + 0.05
