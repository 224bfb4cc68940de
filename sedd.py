"""Score entropy discrete diffusion (SEDD), the whole method in one file.

Lou, Meng and Ermon, "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution",
ICML 2024, arXiv 2310.16834.

The idea: a sequence of tokens x0 is destroyed, token by token, by a Markov chain that runs for a time t in [0, 1]; a
token that is hit turns into MASK (absorbing graph) or into a random token (uniform graph). To run the chain backwards
one has to know the ratios p_t(y) / p_t(x) for all sequences y that differ from x in one position: together they are
called the concrete score. A transformer learns them by minimising the score entropy, which is smallest exactly at the
true ratios. Its denoising form asks only for the ratios p(y | x0) / p(x | x0), which are known; weighted by the rate of
the noise and integrated over time, with a term for each end, it is an upper bound on -log p(x0). To sample, run the
chain backwards from pure noise, with the learned score.

Sections 1 to 4 are the mathematics: noise, graph, loss, samplers. There the network is a black box: model(x, sigma) is
its log score (B, L, S), 0 at y = x, and model(x, sigma, x0) is graph.score_entropy (B, L) of that log score. Then come
the transformer (5), published weights (6), and two baselines, D3PM and GPT (7).

Notation, everywhere below: B sequences of L tokens, each in one of S states. x0 (B, L) is data and x (B, L) the noised
x_t, both int64. sigma is the total noise up to time t, dsigma its rate d sigma / dt: the paper's sigma-bar and sigma.
delta is the noise that a step takes off. A model takes sigma (B,), a graph what broadcasts with x: sigma[:, None].
(Where B = L, sigma (B,) would pass there, and be wrong.) x_T is x at t = 1, p_base the start that the bound assumes. s
is a score, and r the ratio that it learns from. Losses and bounds are in nats, rates of jumps per unit of sigma.
"""

import json
import math
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------
# 1. Noise: the clock of the chain. For t (...) in [0, 1], noise(t) is the total noise sigma (...) and dsigma (...).


class LogLinearNoise:
    """sigma(t) = -log(1 - (1 - eps) t), the schedule of the published models. The chance of a hit, 1 - e^-sigma, is
    (1 - eps) t. It grows linearly in time, and ends at 1 - eps, so that sigma stays finite.
    """

    def __init__(self, eps=1e-3):
        self.eps = eps

    def __call__(self, t):
        return -torch.log1p(-(1 - self.eps) * t), (1 - self.eps) / (1 - (1 - self.eps) * t)


class GeometricNoise:
    """sigma(t) = sigma_min^(1 - t) sigma_max^t, the paper's other schedule. It starts above zero: already at t = 0 a
    token has been hit with a chance of about sigma_min.
    """

    def __init__(self, sigma_min=1e-4, sigma_max=20.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, t):
        sigma = self.sigma_min ** (1 - t) * self.sigma_max**t
        return sigma, sigma * math.log(self.sigma_max / self.sigma_min)


# ------------------------------------------------------------------------------------------------------
# 2. Graph: the Markov chain of one token, dp/dt = dsigma(t) Q p, so that p_t = exp(sigma(t) Q) p_data.
# Q[y, x] is the rate of the jump from x to y.
#
# All tokens of a sequence are noised independently, so the neighbours of x are the sequences that differ from it in one
# position. The concrete score is a tensor (B, L, S): its entry (b, i, y) is p_t(x with x_i := y) / p_t(x), 1 at x_i.
#
# The reversed chain jumps from x to y at the rate Q[x, y] p_t(y) / p_t(x): the rate of the forward jump that it undoes,
# times the ratio. The score entropy of that jump, with learned score s and true ratio r, is
#
#     s - r log s + K(r)   with   K(r) = r (log r - 1):
#
# convex in s, zero at s = r, positive elsewhere and, for r > 0, infinite at s = 0. The ratio p_t(y) / p_t(x) is not
# known. But put r = p(y | x0) / p(x | x0) in its place. Wherever Q[x, y] > 0, its mean over x0 ~ p(x0 | x) is the sum
# of p(x0) p(y | x0) / p_t(x): the true ratio. So on average the loss only gains a constant, and is smallest at the same
# s. This is the denoising score entropy. Of a token it is the sum over the jumps y != x, weighted by Q[x, y].


class Graph:
    """A token is replaced, at rate 1, by a draw from a distribution pi: MASK always, or any token.

    So Q = pi 1^T - I, and Q[x, y] = pi_x for y != x. As pi 1^T is its own square, exp(sigma Q) = a I + (1 - a) pi 1^T
    with a = e^-sigma: after noise sigma a token is unhit with chance a, and otherwise distributed as pi.

    Tokens are 0 ... vocab_size - 1; MASK, where there is one, is one state more. x and x0 (...) are int64 of any shape,
    sigma and delta broadcast with them, as (B, 1) does with (B, L), and scores are (..., S). A graph of this kind
    defines pi(y, dtype), y (...) -> pi_y (...). A graph of another kind overrides each method that uses pi.
    """

    mask_id = None

    def __init__(self, vocab_size):
        self.vocab_size = self.num_states = vocab_size

    def rate_matrix(self):
        """Q (S, S) in float64; each column sums to zero. For tests, and to look at."""
        return self.pi(torch.arange(self.num_states), torch.float64)[:, None] - torch.eye(self.num_states).double()

    def can_change(self, x):
        """x (...) -> bool (...), the positions from which the reversed chain can jump: where x can come from noise."""
        return self.pi(x) > 0

    def sample_transition(self, x0, sigma, generator=None):
        """x ~ exp(sigma Q) applied to each token of x0 (...): with chance 1 - e^-sigma it is hit, and drawn from pi."""
        hit = torch.rand(x0.shape, generator=generator, device=x0.device) < -torch.expm1(-sigma)
        return torch.where(hit, self.sample_prior(*x0.shape, device=x0.device, generator=generator), x0)

    def sample_prior(self, *shape, device=None, generator=None):
        """Pure noise, int64 of the given shape, drawn from pi: what a hit token becomes, and where `sample` starts."""
        pi = self.pi(torch.arange(self.num_states, device=device))
        return torch.multinomial(pi, math.prod(shape), replacement=True, generator=generator).view(shape)

    def prior_kl(self, sigma, x0):
        """KL(p(x_T | x0) || p_base) in nats per token, x0 (...) -> (...).

        p_base is what noise makes of evenly drawn tokens: (1 - a) pi, and a / V on each of the V tokens. (pi alone
        gives x0 no chance under the absorbing graph, though x0 is still there with chance a.)
        """

        def cost(y, sigma, untouched):
            """p log(p / p_base) at y, where p = untouched + (1 - a) pi."""
            hit = -torch.expm1(-sigma) * self.pi(y, sigma.dtype)
            base = hit + torch.exp(-sigma) * (y < self.vocab_size) / self.vocab_size
            return torch.xlogy(untouched + hit, (untouched + hit) / base)

        # all y as if none were x0, and then y = x0 as it is
        everywhere = cost(torch.arange(self.num_states, device=x0.device), sigma[..., None], 0.0).sum(-1)
        return everywhere - cost(x0, sigma, 0.0) + cost(x0, sigma, torch.exp(-sigma))

    def score_entropy(self, log_score, sigma, x, x0):
        """Denoising score entropy in nats per unit of sigma, of log_score (..., S), which is 0 at y = x -> (...).

        For sigma > 0 it is pi_x times the sum over y of s - r log s + K(r), which is zero at y = x. At large r these
        would cancel all their digits. So they are written r (e^d - 1 - d), with d = log s - log r, and s where r = 0.
        """
        a, hit, pi_x = torch.exp(-sigma), -torch.expm1(-sigma), self.pi(x, sigma.dtype)
        p_x = a * (x == x0) + hit * pi_x  # p(x | x0), for p(y | x0) = [y = x0] a + (1 - a) pi_y
        p_x = torch.where(p_x > 0, p_x, 1.0)  # where no noise leads to x, pi_x is zero, and so is the loss
        # r = p(y | x0) / p(x | x0) in two numbers a token: r at y = x0, and r / pi_y at any other y
        r_x0, c = torch.stack([(a + hit * self.pi(x0, sigma.dtype)) / p_x, hit / p_x])[..., None]
        y = torch.arange(self.num_states, device=x.device)
        pi, at_x0 = self.pi(y, log_score.dtype), y == x0[..., None]
        r = torch.where(at_x0, r_x0, c * pi)
        log_r = torch.where(at_x0, r_x0.log(), c.log() + pi.log())
        reached = r > 0
        d = torch.where(reached, log_score - log_r, 0.0)
        entropy = torch.where(reached, r * (torch.expm1(d) - d), log_score.exp())
        return self.pi(x, log_score.dtype) * entropy.sum(-1)

    def reverse_rate(self, score, x):
        """Rates of the reversed chain out of x, per unit of sigma: Q[x, y] s_y at y != x, (..., S); the sum is 0."""
        x = x[..., None]
        rate = (self.pi(x, score.dtype) * score).scatter_(-1, x, 0.0)
        return rate.scatter_(-1, x, -rate.sum(-1, keepdim=True))

    def tweedie_probs(self, score, delta, x):
        """p(y) = (exp(-delta Q) s)_y exp(delta Q)[x, y], (..., S): the Tweedie step, which undoes the noise delta.

        With the true scores it is, for each position by itself, p(its token at noise sigma - delta | x), by Bayes: the
        first factor is the chance of y there over that of x, the second that noise delta leads from y to x. Learned
        scores can make entries negative; these become zero.
        """
        x, undo = x[..., None], torch.expm1(delta)[..., None]
        pi = self.pi(torch.arange(self.num_states, device=x.device), score.dtype)
        pi_x = self.pi(x, score.dtype)
        others = score.scatter(-1, x, 0.0)
        total = others.sum(-1, keepdim=True)  # over y != x: beside s_x = 1 a small sum would lose its digits
        # the factors are (1 + undo) s - undo (sum of s) pi and e^-delta ([y = x] + undo pi_x), with undo = e^delta - 1
        stay = (1 + undo * (1 - pi_x - pi_x * total)).clamp(min=0) * (1 + undo * pi_x)
        jumps = others.mul_(1 + undo).addcmul_(-undo * (1 + total), pi).clamp_(min=0).mul_(undo * pi_x)
        probs = jumps.scatter_(-1, x, stay)
        return probs.div_(probs.sum(-1, keepdim=True))

    def denoise_probs(self, score, sigma, x):
        """The last step, from noise sigma to none at all: Tweedie's, but MASK is no longer an answer. (..., S)."""
        probs = self.tweedie_probs(score, sigma, x)
        probs[..., self.vocab_size :] = 0
        return probs.div_(probs.sum(-1, keepdim=True))


class Absorbing(Graph):
    """A token that is hit turns into MASK: Q_absorb = e_MASK 1^T - I. Only from there does the reversed chain jump."""

    def __init__(self, vocab_size):
        self.vocab_size = self.mask_id = vocab_size
        self.num_states = vocab_size + 1

    def pi(self, y, dtype=torch.float32):
        return (y == self.mask_id).to(dtype)

    def sample_prior(self, *shape, device=None, generator=None):
        return torch.full(shape, self.mask_id, device=device)


class Uniform(Graph):
    """A token that is hit turns into any of all N, even itself: Q_uniform = 1 1^T / N - I."""

    def pi(self, y, dtype=torch.float32):
        return torch.full_like(y, 1 / self.num_states, dtype=dtype)

    def sample_prior(self, *shape, device=None, generator=None):
        return torch.randint(self.num_states, shape, device=device, generator=generator)


# ------------------------------------------------------------------------------------------------------
# 3. Loss: what training minimises, and the likelihood bound that follows from it.


def low_discrepancy_times(n, device=None):
    """n times in (0, 1], each uniform, together evenly spread: one random shift of a regular grid, (n,)."""
    return 1 - (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1


def diffusion_loss(model, graph, noise, x0, t=None, x=None):
    """One draw of the diffusion-weighted denoising score entropy: x0 (B, L) -> (B,), nats per sequence.

        E_{t, x_t} [ dsigma(t) sum over positions of graph.score_entropy at (x_t, sigma(t)) ],

    t uniform in [0, 1], is the integral in nll_bound. By default the times t (B,) are a low-discrepancy set, and x
    (B, L) is drawn from the forward process at these times.
    """
    if t is None:
        t = low_discrepancy_times(len(x0), x0.device)
    sigma, dsigma = noise(t)
    if x is None:
        x = graph.sample_transition(x0, sigma[:, None])
    return dsigma * model(x, sigma, x0).sum(-1)  # the model's score entropy


def rows_at_a_time(x, graph):
    """How many rows of S scores to hold at a time, to bound the memory on the device of x."""
    return max(1, (2**29 if x.is_cuda else 2**25) // graph.num_states)


@torch.no_grad()
def nll_bound(model, graph, noise, x0, num_times=128):
    """An unbiased draw of an upper bound on -log p(x0): x0 (B, L) -> (B,), nats per sequence.

        -log p(x0) <= E[diffusion_loss], an integral over t
                      + KL(p(x_T | x0) || p_base)              graph.prior_kl, the end at t = 1
                      + E[-log p(x0 | x at t = 0)]             the last denoising step, at t = 0 (not in the paper)

    p(x0) is what the reversed chain generates from p_base with this model's scores, in continuous time. With the true
    scores the bound is an equality, up to the distance of p_T from p_base and to the last step's independent positions.
    The integral takes num_times times t = u^2, u evenly spaced from a random shift per sequence: under log-linear noise
    the rare hits near t = 0 weigh 1 / t, and even times would have an infinite variance. Under it the last term is 0,
    and the KL at most eps log V nats per token. Under geometric noise the KL is tiny; one x is drawn for the last term.
    """
    shift = low_discrepancy_times(len(x0), x0.device)[torch.randperm(len(x0), device=x0.device)]
    bound = graph.prior_kl(noise(torch.ones_like(shift))[0][:, None], x0).sum(-1)
    for k in range(num_times):
        u = (k + shift) / num_times
        bound += 2 * u / num_times * diffusion_loss(model, graph, noise, x0, u**2)  # dt = 2 u du
    sigma, _ = noise(torch.zeros_like(shift))
    if sigma[0] > 0:
        x = graph.sample_transition(x0, sigma[:, None])
        size = max(1, rows_at_a_time(x, graph) // x.shape[1])  # sequences, of which this term needs all scores
        for part, x, sigma, x0 in zip(*(tensor.split(size) for tensor in (bound, x, sigma, x0))):
            probs = graph.denoise_probs(model(x, sigma).exp(), sigma[:, None], x)
            part -= probs.gather(-1, x0[..., None]).log().sum((1, 2))
    return bound


# ------------------------------------------------------------------------------------------------------
# 4. Samplers: the reversed chain, cut into steps in which all positions jump independently, or token by token. A step
# turns scores into chances (step_probs), and draws from them (jump). `sample` runs one of two loops over x (B, L).


def euler_probs(graph, score, delta, x):
    """Tau-leaping, where delta is dt dsigma(t), the rates held constant: [y = x] + delta reverse_rate_y, (..., S)."""
    probs = graph.reverse_rate(score, x) * delta[..., None]
    probs.scatter_add_(-1, x[..., None], torch.ones_like(probs[..., :1]))
    return probs.clamp_(min=0)  # too long a step would make staying negative


def step_probs(sampler, graph, score, x, sigma, after, leap):
    """Chances (R, S) of a step from noise sigma to `after`, x (R,) with scores (R, S). leap is Euler's dt dsigma(t)."""
    delta = leap if sampler == "euler" and after else sigma - after
    delta = torch.full_like(score[:, 0], delta)
    if after == 0:
        return graph.denoise_probs(score, delta, x)
    if sampler == "euler":
        return euler_probs(graph, score, delta, x)
    return graph.tweedie_probs(score, delta, x)


def in_float64(tensor):
    """The tensor in float64, which MPS does not have: from there it goes to the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def sample_categorical(probs, top_p=1.0):
    """Exact draws from probs (..., S), normalised or not -> (...), by inverting the running sum in float64.

    The Gumbel trick in float32 cannot reach far into the tail: it makes samples less diverse than the model is, and
    look better for it (arXiv 2409.02908). top_p < 1 cuts the tail on purpose: it draws only from the likeliest states,
    as many as hold this share, and at least from one.
    """
    device, probs = probs.device, in_float64(probs)
    if top_p < 1:
        likely, y = probs.sort(-1, descending=True)
        before = likely.cumsum(-1) - likely  # what the likelier states hold
        kept = (before < top_p * likely.sum(-1, keepdim=True)) | (before == 0)
        probs = torch.zeros_like(probs).scatter(-1, y, likely * kept)
    running = probs.cumsum(-1)
    u = torch.rand(running.shape[:-1], dtype=running.dtype, device=running.device) * running[..., -1]
    return torch.searchsorted(running, u[..., None], right=True)[..., 0].clamp(max=probs.shape[-1] - 1).to(device)


def jump(x, probs, top_p):
    """x (R,) after a draw from probs (R, S), overwritten: whether a token jumps and then, for the few, where to."""
    stay = probs.gather(-1, x[:, None])
    jumps = probs.scatter_(-1, x[:, None], 0.0)
    jumping = sample_categorical(torch.cat([stay, jumps.sum(-1, keepdim=True)], -1)).nonzero()[:, 0]
    return x.scatter(0, jumping, sample_categorical(jumps[jumping], top_p))


def steps_of(sampler, scores_at, graph, noise, x, free, steps, top_p, eta):
    """The states of x (B, L) in so many steps of equal dt, of which only the places `free` (B, L) change.

    scores_at(x, sigma) is a function from places rows (R,) in x.flatten() to the log scores there (R, S).
    """
    yield x
    sigmas, rates = (values.tolist() for values in noise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)))
    sigmas[-1] = 0.0  # the last step is to clean data, also where the schedule starts above zero
    size = max(1, rows_at_a_time(x, graph) // 2)  # draws are in float64
    for sigma, after, rate in zip(sigmas, sigmas[1:], rates):
        rows = (free & graph.can_change(x)).flatten().nonzero()[:, 0]
        goals = [(rows, after)]
        if eta and after:  # some places go to clean data, and get new noise
            fresh = free & (torch.rand(x.shape, device=x.device) < eta / -math.expm1(-after))
            of_rows = fresh.flatten()[rows]
            goals = [(rows[~of_rows], after), (rows[of_rows], 0.0)]
        parts = [(part, goal) for places, goal in goals for part in places.split(size) if len(part)]
        if parts:
            log_score_at = scores_at(x, torch.full(x.shape[:1], sigma, device=x.device))
            for part, goal in parts:
                score = log_score_at(part)
                if sigma > 9:  # a step can magnify rounding by e^(sigma - after): in float32 it would show
                    score = in_float64(score)
                here = x.flatten()[part].to(score.device)
                probs = step_probs(sampler, graph, score.exp_(), here, sigma, goal, rate / steps)
                x = x.flatten().scatter(0, part, jump(here, probs, top_p).to(x.device)).view(x.shape)
        if eta and after:
            x = torch.where(fresh, graph.sample_transition(x, torch.tensor(after, device=x.device)), x)
        yield x


def first_hitting(scores_at, graph, noise, x, top_p):
    """The states of x (B, L) in continuous time: a call of the model turns one MASK of each sequence into a token.

    A token is masked with chance m = 1 - e^-sigma. Of n masked ones the first to appear does so when m has fallen to
    m u^(1/n), u uniform, at a place drawn evenly, and its score there says which token it is (arXiv 2409.02908). With
    exact scores this draws from p(x0), but for what is masked at the end of the noise, and appears at once: under
    geometric noise several tokens in half a percent of texts of 1,024. Only the proportions of scores count here. A sum
    other than 1 / (e^sigma - 1), which learned ones can have, makes Tweedie write a token too soon or too late.
    """
    yield x
    start, end = torch.log(-torch.expm1(-noise(torch.tensor([1.0, 0.0], dtype=torch.float64))[0])).tolist()
    log_m = torch.full_like(x[:, :1], start, dtype=torch.float32)
    while (masked := x == graph.mask_id).any():
        wait = torch.empty_like(log_m).exponential_() / masked.sum(-1, keepdim=True).clamp(min=1)  # -log u / n
        log_m = (log_m - wait).clamp(min=end)
        place = torch.where(masked, torch.rand(x.shape, device=x.device), -1.0).argmax(-1, keepdim=True)
        now = masked & ((torch.arange(x.shape[1], device=x.device) == place) | (log_m == end))
        sigma = torch.log1p(1 / torch.expm1(-log_m[:, 0]))  # -log(1 - m), with all digits
        log_score = scores_at(x, sigma)(now.flatten().nonzero()[:, 0])
        x = x.masked_scatter(now, sample_categorical(log_score[:, : graph.vocab_size].exp(), top_p))
        yield x


@torch.no_grad()
def sample(model, graph, noise, prompt, steps, sampler="tweedie", callback=None, top_p=1.0, eta=0.0):
    """Draw sequences: prompt (B, L), tokens to keep and -1 where to write -> (B, L) tokens, on the same device.

    No MASK is left where scores are finite. `tweedie` and `euler` call the model at most `steps` times. Given the true
    scores `tweedie` is optimal among the steps that move each position independently, and exact for a single position;
    `euler` is tau-leaping. (Under the absorbing graph with log-linear noise they are the same for any scores, for
    e^(sigma(t) - sigma(t - dt)) - 1 is dt dsigma(t).) `exact` is first_hitting.

    Under the absorbing graph exact scores and small steps give p(rest | kept): a kept token looks like one that noise
    has missed. Under the uniform graph they do not: a kept token is taken for one that may be noisy.

    top_p < 1 does not change whether a token jumps, only where to. eta > 0 lets a token change again after it is
    written: instead of a step to noise sigma', a position takes, with chance min(1, eta / (1 - e^-sigma')), a fresh
    draw of x0, noised up to sigma' (remasking, arXiv 2503.00307, 2602.21185). With exact scores, from x ~ p_t, Tweedie
    steps keep each position's marginal. callback(step, x) sees each state, from step 0. ValueError at wrong options.
    """
    if sampler not in ("tweedie", "euler", "exact") or steps < 1:
        raise ValueError(f"sampler={sampler!r} must be tweedie, euler or exact, and steps={steps} at least 1")
    if sampler == "exact" and (graph.mask_id is None or eta):
        raise ValueError("sampler='exact' needs a graph with MASK, and eta=0")
    if prompt.dim() != 2 or prompt.max() >= graph.vocab_size:
        raise ValueError(f"prompt must be (B, L) tokens below {graph.vocab_size}, or -1 to generate")
    free = prompt < 0
    x = torch.where(free, graph.sample_prior(*prompt.shape, device=prompt.device), prompt)
    scores_at = getattr(model, "scores_at", lambda x, sigma: model(x, sigma).flatten(0, 1).__getitem__)
    if sampler == "exact":
        states = first_hitting(scores_at, graph, noise, x, top_p)
    else:
        states = steps_of(sampler, scores_at, graph, noise, x, free, steps, top_p, eta)
    for step, x in enumerate(states):
        if callback:
            callback(step, x)
    return x


# ------------------------------------------------------------------------------------------------------
# 5. Transformer. Bidirectional, with rotary positions, and told about sigma by adaptive layer norm: an MLP of sigma
# gives each block the shifts, scales and gates of its two branches (adaLN-zero, of DiT). The gates start at zero, so
# that every block starts as the identity. Modules bear their names in the published checkpoints.

GRAPHS = {"absorb": Absorbing, "uniform": Uniform}
NOISES = {"loglinear": LogLinearNoise, "geometric": GeometricNoise}
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # again(f, x): f(x), and once more backward


@dataclass
class SEDDConfig:
    """The shape of a model. The defaults are the published small model, 12 layers on GPT-2's vocabulary."""

    vocab_size: int = 50257  # tokens of the data; the absorbing graph adds MASK by itself
    block_size: int = 1024  # sequence length in training
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    cond_dim: int = 128  # width of the embedding of sigma
    dropout: float = 0.1
    graph: str = "absorb"  # or uniform
    noise: str = "loglinear"  # or geometric
    parameterization: str = "score"  # or mean, or causal: the baselines of section 7

    def __post_init__(self):
        if not self.n_head or self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head} into heads of even width")
        if self.parameterization == "causal" and self.graph != "absorb":
            raise ValueError(f"graph={self.graph!r} has no MASK, with which parameterization='causal' begins a text")


class Block(nn.Module):
    """x (B, L, n_embd), c (B, cond_dim) of sigma, cos and sin (L, D/2) for heads of width D -> (B, L, n_embd)."""

    def __init__(self, config, causal):
        super().__init__()
        d = config.n_embd
        self.n_head, self.causal = config.n_head, causal
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.norm2 = nn.LayerNorm(d, bias=False)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * d)

    def forward(self, x, c, cos, sin):
        B, L, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)

        qkv = self.attn_qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1)).view(B, L, 3, self.n_head, -1)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # each part (B, n_head, L, D)
        cos, sin = cos.to(qk.dtype), sin.to(qk.dtype)  # float32 would promote q and k, and no flash kernel takes that
        a, b = qk.chunk(2, -1)  # the pairs (j, j + D/2) are turned by their angle
        q, k = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        y = F.scaled_dot_product_attention(q, k, v[0], is_causal=self.causal)
        y = self.attn_out(y.transpose(1, 2).reshape(B, L, d))
        x = torch.addcmul(x, gate1, self.dropout(y))

        y = self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return torch.addcmul(x, gate2, self.dropout(y))


class Transformer(nn.Module):
    """From tokens and noise to features, of which a subclass makes a `row_loss`. The config names graph and noise."""

    causal = False  # whether a position sees only those before it

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.n_embd
        self.graph, self.noise = GRAPHS[config.graph](config.vocab_size), NOISES[config.noise]()
        S, c = self.graph.num_states, config.cond_dim
        self.vocab_embed = nn.ParameterDict({"embedding": nn.init.kaiming_uniform_(torch.empty(S, d), a=5**0.5)})
        self.sigma_map = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c))})
        self.blocks = nn.ModuleList([Block(config, self.causal) for _ in range(config.n_layer)])
        out = {"norm_final": nn.LayerNorm(d, bias=False), "linear": nn.Linear(d, S)}
        self.output_layer = nn.ModuleDict(out | {"adaLN_modulation": nn.Linear(c, 2 * d)})
        for layer in self.output_layer.linear, *(part.adaLN_modulation for part in (self.output_layer, *self.blocks)):
            nn.init.zeros_(layer.weight)  # every block starts as the identity, and every score as equal
            nn.init.zeros_(layer.bias)
        D = d // config.n_head
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, D, 2) / D))

    def trunk(self, x, sigma):
        """x (B, L), sigma (B,) -> features (B, L, n_embd), before the vocabulary head output_layer.linear."""
        angles = sigma[:, None].float() * 10000.0 ** (-torch.arange(128, device=x.device) / 128)
        c = F.silu(self.sigma_map.mlp(torch.cat([angles.cos(), angles.sin()], -1)))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.rotary_emb.inv_freq
        cos, sin = angles.cos(), angles.sin()
        h = F.embedding(x, self.vocab_embed.embedding)
        for block in self.blocks:
            h = block(h, c, cos, sin)
        shift, scale = self.output_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        return torch.addcmul(shift, self.output_layer.norm_final(h), 1 + scale)

    # The rest of this class makes the same numbers in less time and memory: no tensor has (B, L, S) entries.

    def loss_of_rows(self, rows, h, *inputs):
        """row_loss at rows (R,), places in the flattened h (B, L, n_embd) and inputs (B, L) -> (B, L), else 0."""
        head, S, kind, shape = self.output_layer.linear, self.graph.num_states, h.device.type, h.shape[:2]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        # GPUs multiply faster where sizes are multiples of 8. And an empty block would be compiled anew.
        W = F.pad(head.weight.to(dtype), (0, 0, 0, -S % 8))
        b = F.pad(head.bias.to(dtype), (0, -S % 8))
        places = F.pad(rows, (0, 8 - len(rows) % 8))
        h, *inputs = (tensor.flatten(0, 1).index_select(0, places) for tensor in (h, *inputs))
        size, losses = max(1, rows_at_a_time(h, self.graph) // 8) * 8, []
        # two blocks of rows keep their logits for the backward pass; others compute them again
        for i, block in enumerate(zip(*(tensor.split(size) for tensor in (h.to(dtype), *inputs)))):
            losses.append(self.block_loss(W, b, *block) if i < 2 else again(self.block_loss, W, b, *block))
        losses = torch.cat(losses)[: len(rows)]
        return losses.new_zeros(shape).flatten().scatter(0, rows, losses).view(shape)

    def block_loss(self, W, b, h, *inputs):
        """The head's W (P, n_embd) and b (P,) with P >= S, h (R, n_embd) and inputs (R,) -> row_loss (R,)."""
        logits = F.linear(h, W, b)[:, : self.graph.num_states]
        if torch.compiler.is_compiling():
            return self.row_loss(logits, *inputs)  # one kernel: what is computed on the way needs no memory
        few = max(1, rows_at_a_time(h, self.graph) // 16)
        parts = zip(*(tensor.split(few) for tensor in (logits, *inputs)))
        return torch.cat([again(self.row_loss, *part) for part in parts])

    def compile(self):
        """Compile in place what takes the time: the blocks of the trunk, and the loss of a block of rows."""
        for block in self.blocks:  # one by one: one compilation serves them all, and DDP can overlap them
            block.compile()
        torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal at the first call may differ later
        options = {"triton.prefer_nd_tiling": True}  # tiles of rows and states spare Triton a division for every score
        self.block_loss = torch.compile(self.block_loss, dynamic=True, options=options)


class SEDD(Transformer):
    """The score network. `loss`, `nll` and `generate` are diffusion_loss, nll_bound and sample for this model."""

    def forward(self, x, sigma, x0=None):
        """x (B, L), sigma (B,) -> log score (B, L, S), float32, 0 at y = x. With x0 (B, L): score entropy (B, L)."""
        if x0 is None:
            return self.log_score(self.output_layer.linear(self.trunk(x, sigma)), sigma[:, None], x)
        rows = self.graph.can_change(x).flatten().nonzero()[:, 0]  # before the trunk, for it waits for the GPU
        return self.loss_of_rows(rows, self.trunk(x, sigma), sigma[:, None].expand_as(x), x, x0)

    def row_loss(self, logits, sigma, x, x0):
        return self.graph.score_entropy(self.log_score(logits, sigma, x), sigma, x, x0)

    def log_score(self, logits, sigma, x):
        """Logits (..., S), sigma and x (...) -> log score (..., S), float32, 0 at y = x.

        Under the absorbing graph the true score of a masked position i is p(x0_i = y | visible tokens) times
        1 / (e^sigma - 1). So here a logit is log(p V), and a network of zeros says p = 1 / V.
        """
        log_score = logits.float()
        if self.graph.mask_id is not None:
            log_score = log_score - (torch.log(torch.expm1(sigma)) + math.log(self.config.vocab_size))[..., None]
        return torch.where(torch.arange(self.graph.num_states, device=x.device) == x[..., None], 0.0, log_score)

    def scores_at(self, x, sigma):
        """A function from places rows (R,) in x.flatten() to the log scores there (R, S), for `sample`."""
        h, L = self.trunk(x, sigma).flatten(0, 1), x.shape[1]
        return lambda rows: self.log_score(self.output_layer.linear(h[rows]), sigma[rows // L], x.flatten()[rows])

    def loss(self, x0, t=None, x=None, network=None):
        return diffusion_loss(network or self, self.graph, self.noise, x0, t, x)  # network: DDP's wrapper around self

    def nll(self, x0, num_times=128):
        return nll_bound(self, self.graph, self.noise, x0, num_times)

    def generate(self, prompt, steps, sampler="tweedie", callback=None, top_p=1.0, eta=0.0):
        return sample(self, self.graph, self.noise, prompt, steps, sampler, callback, top_p, eta)


# ------------------------------------------------------------------------------------------------------
# 6. Published weights: a folder, or a repository of the Hugging Face hub, with the authors' config.json and
# model.safetensors or pytorch_model.bin. The tensors above bear their names.

SHAPE = {"length": "block_size", "n_blocks": "n_layer", "n_heads": "n_head", "hidden_size": "n_embd",
         "cond_dim": "cond_dim", "dropout": "dropout"}  # fmt: skip  # their names: ours


def load_weights(path):
    """What torch.save wrote to `path`, plain data only. Raises at damage, for torch.load looks at no checksum."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def from_pretrained(path_or_hub_id):
    """The SEDD model (float32, CPU, evaluation mode) in a local folder or a hub repository. Nothing in it can run."""
    from huggingface_hub import snapshot_download  # pip install -e '.[hub]'
    from safetensors.torch import load_file

    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape, graph, noise = published["model"], published["graph"]["type"], published["noise"]
    if shape["scale_by_sigma"] is not (graph == "absorb"):
        raise ValueError(f"scale_by_sigma={shape['scale_by_sigma']!r} under the {graph} graph")
    if noise["type"] == "geometric" and (noise["sigma_min"], noise["sigma_max"]) != (1e-4, 20):
        raise ValueError("geometric noise, but not from 1e-4 to 20")
    shape = {ours: shape[theirs] for theirs, ours in SHAPE.items()}
    model = SEDD(SEDDConfig(published["tokens"], graph=graph, noise=noise["type"], **shape))
    file = next(folder.glob("model.safetensors"), folder / "pytorch_model.bin")
    if file.stat().st_size < 1000 and b"git-lfs" in file.read_bytes():
        raise ValueError(f"{file} only says where the weights are: git lfs pull fetches them")
    model.load_state_dict(load_file(file) if file.suffix == ".safetensors" else load_weights(file))
    return model.eval()


def save_pretrained(model, folder):
    """Write the model for from_pretrained and the authors' code. ValueError at a baseline, which has no place there."""
    from safetensors.torch import save_file  # pip install -e '.[hub]'

    config, folder = model.config, Path(folder)
    if config.parameterization != "score":
        raise ValueError(f"the published format has no place for parameterization={config.parameterization!r}")
    shape = {theirs: getattr(config, ours) for theirs, ours in SHAPE.items()}
    published = {
        "tokens": config.vocab_size,
        "graph": {"type": config.graph, "file": "data", "report_all": False},
        "noise": {"type": config.noise, "sigma_min": 1e-4, "sigma_max": 20},
        "model": {"name": "sedd", "type": "ddit", "scale_by_sigma": config.graph == "absorb", **shape},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(published, indent=2), encoding="utf-8")


SEDD.from_pretrained = staticmethod(from_pretrained)
Transformer.save_pretrained = save_pretrained

# ------------------------------------------------------------------------------------------------------
# 7. Baselines on the same transformer: means instead of scores, and GPT, for which a Transformer can be `causal`.


class D3PM(SEDD):
    """The mean parameterisation, D3PM in continuous time: the network predicts mu(y) = p(x0_i = y | x).

    The score is the expectation under mu of the known ratio p(y | x0) / p(x | x0). Under the absorbing graph, at MASK,
    it is r mu_y with r = 1 / (e^sigma - 1), and the score entropy becomes r + r (log r - 1) - r log(r mu_x0) =
    -r log mu_x0. Its weight in the loss, dsigma r, is 1 / t under log-linear noise: the cross-entropy known as MDLM.
    """

    def __init__(self, config):
        super().__init__(config)
        if not hasattr(self.graph, "pi"):
            raise ValueError(f"graph={config.graph!r} has no pi, of which parameterization='mean' makes its scores")
        if self.graph.mask_id is None and self.noise(torch.ones(()))[0] > 9:  # scores say e^-sigma, float32 rounds it
            raise ValueError(f"graph={config.graph!r} with parameterization='mean' needs --noise=loglinear")

    def log_score(self, logits, sigma, x):
        """Logits of mu (..., S), sigma and x (...) -> log score (..., S), 0 at y = x.

        With b = e^sigma - 1: s_y = mu_y / (b pi_x) + (pi_y / pi_x) (1 - mu_x + b pi_x) / (1 + b pi_x), for y != x.
        """
        y, x = torch.arange(self.graph.num_states, device=x.device), x[..., None]
        b = torch.expm1(sigma)[..., None]
        pi, pi_x = self.graph.pi(y, b.dtype), self.graph.pi(x, b.dtype)
        log_mu = logits.to(b.dtype).masked_fill(y >= self.graph.vocab_size, -math.inf).log_softmax(-1)  # MASK is no x0
        rest = torch.where(y == x, 0.0, log_mu.exp()).sum(-1, keepdim=True).clamp(min=1e-30)  # 1 - mu_x, not rounded
        others = torch.log(b * pi) + torch.log((rest + b * pi_x) / (1 + b * pi_x))
        log_score = torch.logaddexp(log_mu, others) - torch.log(b * torch.where(pi_x > 0, pi_x, 1.0))
        return torch.where(y == x, 0.0, log_score)


class GPT(Transformer):
    """The yardstick: the same blocks, causal, at sigma = 0; predicts each token from MASK and those before it."""

    causal = True  # so that its nll is exact, and no bound

    def forward(self, x0):
        """x0 (B, L) -> -log p(x0_i | x0_1 ... x0_i-1), (B, L), in nats, exactly."""
        before = F.pad(x0[:, :-1], (1, 0), value=self.graph.mask_id)
        h = self.trunk(before, x0.new_zeros(len(x0)))
        return self.loss_of_rows(torch.arange(x0.numel(), device=x0.device), h, x0)

    def row_loss(self, logits, x0):
        return F.cross_entropy(logits[:, : self.config.vocab_size].float(), x0, reduction="none")

    def loss(self, x0, t=None, x=None, network=None):
        """-log p(x0), x0 (B, L) -> (B,) in nats per sequence. There is no noise, and no use for t and x."""
        return (network or self)(x0).sum(-1)

    nll = torch.no_grad()(loss)

    @torch.no_grad()
    def generate(self, prompt, steps=None, sampler=None, callback=None, top_p=1.0, eta=None):
        """prompt (B, L), tokens and then -1 -> (B, L), one token at each call; what came before is computed again."""
        x = F.pad(prompt, (1, 0), value=self.graph.mask_id)
        for i in range(int((prompt >= 0).all(0).cumprod(0).sum()), prompt.shape[1]):
            h = self.trunk(x[:, : i + 1], x.new_zeros(len(x)))[:, -1]
            logits = self.output_layer.linear(h)[:, : self.config.vocab_size]
            drawn = sample_categorical(logits.float().softmax(-1), top_p)
            x[:, i + 1] = torch.where(prompt[:, i] < 0, drawn, prompt[:, i])
            if callback:
                callback(i + 1, x[:, 1:])
        return x[:, 1:]


MODELS = {"score": SEDD, "mean": D3PM, "causal": GPT}
