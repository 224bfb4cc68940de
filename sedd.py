"""Score entropy discrete diffusion (SEDD), the whole method in one file.

Lou, Meng and Ermon, "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution",
ICML 2024, arXiv 2310.16834.

The idea: a sequence of tokens x0 is destroyed, token by token, by a Markov chain that runs for a time t
in [0, 1]; a token that is hit turns into MASK (absorbing graph) or into a random token (uniform graph).
The chain can be run backwards by whoever knows the ratios p_t(y) / p_t(x) for all sequences y that differ
from x in one position: together they are called the concrete score. A transformer learns them by
minimising the score entropy, which is smallest exactly at the true ratios. Its denoising form asks only for
the ratios p(y | x0) / p(x | x0), which are known; weighted by the rate of the noise and integrated over time,
it bounds -log p(x0) from above, up to a term for each end. To sample, start from pure noise and run the
chain backwards with the learned score.

    1. Noise         how much noise there is at time t
    2. Graph         what noise does to a token, and what follows from it: loss and reversed chain
    3. Transformer   the network whose output is the log score
    4. Loss          a random draw of it for training, and its integral, the likelihood bound
    5. Samplers      noise in, text out, with infilling
    6. Baselines     means instead of scores (D3PM), and GPT, on the same transformer
    7. Published weights

Notation, everywhere below: B sequences of L tokens, each in one of S states. x0 (B, L) is data and x (B, L)
the noised x_t, both int64; sigma (B,) is the total noise up to time t, dsigma (B,) its rate d sigma / dt: the
paper's sigma-bar and sigma (in `tweedie_probs` alone dsigma is a finite difference: the noise to undo). x_T is
x at t = 1, and p_base the distribution from which the chain is run backwards. Losses and bounds are in nats.
"""

import json
import math
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------
# 1. Noise: the clock of the chain. After time t, a token has been under noise for a total of sigma(t).
# ------------------------------------------------------------------------------------------------------


class LogLinearNoise:
    """sigma(t) = -log(1 - (1 - eps) t), the schedule of the published models.

    The chance that a token has been hit, 1 - e^-sigma = (1 - eps) t, grows linearly in time: it is 0 at
    t = 0, and stops at 1 - eps so that sigma stays finite at t = 1.
    """

    def __init__(self, eps=1e-3):
        self.eps = eps

    def __call__(self, t):
        """t (B,) in [0, 1] -> sigma (B,), dsigma (B,)."""
        return -torch.log1p(-(1 - self.eps) * t), (1 - self.eps) / (1 - (1 - self.eps) * t)


class GeometricNoise:
    """sigma(t) = sigma_min^(1 - t) sigma_max^t, the paper's other schedule.

    It starts above zero: already at t = 0 a token has been hit with a chance of about sigma_min.
    """

    def __init__(self, sigma_min=1e-4, sigma_max=20.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, t):
        """t (B,) in [0, 1] -> sigma (B,), dsigma (B,)."""
        sigma = self.sigma_min ** (1 - t) * self.sigma_max**t
        return sigma, sigma * math.log(self.sigma_max / self.sigma_min)


# ------------------------------------------------------------------------------------------------------
# 2. Graph: the Markov chain of one token, dp / dsigma = Q p. Q[y, x] is the rate of the jump from x to y.
#
# All tokens of a sequence are noised independently, so the neighbours of x are the sequences that differ
# from it in one position, and the concrete score is a tensor (B, L, S): its entry (b, i, y) stands for
# p_t(x with x_i := y) / p_t(x), which is 1 at y = x_i. Both matrices Q are so simple that exp(sigma Q) has
# a closed form; the methods below use it, and the matrices themselves serve the tests.
#
# The reversed chain jumps from x to y at the rate Q[x, y] p_t(y) / p_t(x): the rate of the forward jump that
# it undoes, times the ratio. The score entropy of that jump, with learned score s and true ratio r, is
#
#     s - r log s + K(r)   with   K(r) = r (log r - 1):
#
# convex in s, zero at s = r, positive elsewhere and, for r > 0, infinite at s = 0. The ratio p_t(y) / p_t(x)
# is unknown. But put in its place r = p(y | x0) / p(x | x0), with p(x | x0) = exp(sigma Q)[x, x0]: its mean over
# the x0 that x may have come from is just the true ratio, so that on average the loss has only gained a
# constant, and the same minimum. This is the denoising score entropy, the loss of a token being its sum over
# the jumps y != x, each weighted by Q[x, y].
#
# In both graphs this r has one value at y = x0 and another at every other y, so all that the loss asks of a
# token's scores is three sums over y != x:
#
#     total = sum of s_y,     log_total = sum of log s_y,     log_at_x0 = log s_x0 (0 where x = x0).
#
# `score_entropy` takes them from a log score (B, L, S). The transformer will find them without such a tensor
# and hand them to `entropy_from_sums`.
# ------------------------------------------------------------------------------------------------------


def score_sums(log_score, x, x0):
    """log_score (..., S), 0 at y = x; x and x0 (...) -> total, log_total, log_at_x0, each (...)."""
    total = log_score.exp().scatter(-1, x[..., None], 0.0).sum(-1)
    return total, log_score.sum(-1), log_score.gather(-1, x0[..., None])[..., 0]


def hit(x0, sigma, generator):
    """bool (B, L), which tokens of x0 (B, L) noise has hit by sigma (B,): each one with chance 1 - e^-sigma."""
    return torch.rand(x0.shape, generator=generator, device=x0.device) < -torch.expm1(-sigma)[:, None]


def close_rows(rate, x):
    """rate (B, L, S) with its entry at y = x set to minus the sum of the others, as a rate out of x must be."""
    rate = rate.scatter(-1, x[..., None], 0.0)
    return rate.scatter(-1, x[..., None], -rate.sum(-1, keepdim=True))


class Absorbing:
    """Every token turns into MASK at rate 1 and stays there: Q_absorb.

    Tokens are 0 ... vocab_size - 1 and MASK is one state more. The reversed chain can jump out of no
    state but MASK: only masked positions have scores that matter, a loss, and anything to draw.
    """

    def __init__(self, vocab_size):
        self.vocab_size = self.mask_id = vocab_size
        self.num_states = vocab_size + 1

    def rate_matrix(self):
        """Q (S, S) in float64; each column sums to zero."""
        Q = -torch.eye(self.num_states, dtype=torch.float64)
        Q[self.mask_id] += 1
        return Q

    def can_change(self, x):
        """x (B, L) -> bool (B, L), the positions from which the reversed chain can jump."""
        return x == self.mask_id

    def sample_transition(self, x0, sigma, generator=None):
        """x ~ exp(sigma Q) applied to each token of x0 (B, L), sigma (B,): a token that is hit becomes MASK."""
        return torch.where(hit(x0, sigma, generator), self.mask_id, x0)

    def sample_prior(self, *shape, device=None):
        """x_T, int64 of the given shape: all MASK."""
        return torch.full(shape, self.mask_id, device=device)

    def prior_kl(self, sigma):
        """KL(p(x_T | x0) || p_base) in nats per token, sigma (B,) -> (B,).

        At a finite sigma a token is still visible with chance e^-sigma, to which pure MASK would give no
        probability. So p_base keeps that much mass on the tokens, evenly: a visible one costs log V nats.
        """
        return torch.exp(-sigma) * math.log(self.vocab_size)

    def score_entropy(self, log_score, sigma, x, x0):
        """Denoising score entropy (B, L) of log_score (B, L, S), in nats per unit of sigma."""
        return self.entropy_from_sums(*score_sums(log_score, x, x0), sigma[:, None], x, x0)

    def entropy_from_sums(self, total, log_total, log_at_x0, sigma, x, x0):
        """The same from the three sums; all arguments of one shape, or broadcast to it.

        From MASK, p(y | x0) / p(MASK | x0) is r = e^-sigma / (1 - e^-sigma) at y = x0 and 0 elsewhere.
        """
        r = 1 / torch.expm1(sigma)
        entropy = total + r * (torch.log(r) - 1 - log_at_x0)
        return torch.where(x == self.mask_id, entropy, 0.0)

    def reverse_rate(self, score, x):
        """Rates out of x (B, L) of the reversed chain: Q[x, y] score_y at y != x, (B, L, S), rows sum to zero."""
        return close_rows(torch.where((x == self.mask_id)[..., None], score, 0.0), x)

    def tweedie_probs(self, score, dsigma, x):
        """p(y) ~ (exp(-dsigma Q) score)_y exp(dsigma Q)[x, y], (B, L, S): the Tweedie step back by dsigma.

        With the true scores it is, for each position by itself, p(its token at noise sigma - dsigma | x).
        From MASK this is (e^dsigma - 1) score_y for a token y, and MASK keeps the rest of the mass. A learned
        score can promise more than there is; the rest is then clamped at zero.
        """
        probs, masked = torch.expm1(dsigma)[:, None, None] * score, (x == self.mask_id)[..., None]
        probs[..., self.mask_id] = 0
        probs[..., self.mask_id] = (1 - probs.sum(-1)).clamp(min=0)
        probs *= masked / probs.sum(-1, keepdim=True)
        return probs.scatter_add_(-1, x[..., None], (~masked).to(probs.dtype))


class Uniform:
    """Every token is replaced at rate 1 by one drawn evenly from all N states: Q_uniform = 1 1^T / N - I.

    The factor 1 / N makes sigma the same clock for both graphs and for every N: of a token, 1 - e^-sigma is hit.
    """

    mask_id = None

    def __init__(self, vocab_size):
        self.vocab_size = self.num_states = vocab_size

    def rate_matrix(self):
        """Q (S, S) in float64; each column sums to zero."""
        N = self.num_states
        return torch.full((N, N), 1 / N, dtype=torch.float64) - torch.eye(N, dtype=torch.float64)

    def can_change(self, x):
        """x (B, L) -> bool (B, L), the positions from which the reversed chain can jump: all of them."""
        return torch.ones_like(x, dtype=torch.bool)

    def sample_transition(self, x0, sigma, generator=None):
        """x ~ exp(sigma Q) applied to each token of x0 (B, L), sigma (B,): a token that is hit is drawn anew."""
        drawn = torch.randint(self.num_states, x0.shape, generator=generator, device=x0.device)
        return torch.where(hit(x0, sigma, generator), drawn, x0)

    def sample_prior(self, *shape, device=None):
        """x_T, int64 of the given shape: evenly drawn tokens."""
        return torch.randint(self.num_states, shape, device=device)

    def prior_kl(self, sigma):
        """KL(p(x_T | x0) || p_base) in nats per token, sigma (B,) -> (B,).

        With a = e^-sigma, p(x_T | x0) is a + (1 - a) / N at x0 and (1 - a) / N elsewhere; p_base is 1 / N.
        """
        N, a = self.num_states, torch.exp(-sigma)
        at_x0, elsewhere = a + (1 - a) / N, (1 - a) / N
        return torch.xlogy(at_x0, N * at_x0) + (N - 1) * torch.xlogy(elsewhere, N * elsewhere)

    def score_entropy(self, log_score, sigma, x, x0):
        """Denoising score entropy (B, L) of log_score (B, L, S), in nats per unit of sigma."""
        return self.entropy_from_sums(*score_sums(log_score, x, x0), sigma[:, None], x, x0)

    def entropy_from_sums(self, total, log_total, log_at_x0, sigma, x, x0):
        """The same from the three sums; all arguments of one shape, or broadcast to it.

        p(y | x0) is in proportion to R = 1 + N / (e^sigma - 1) at y = x0 and to 1 elsewhere. So where x = x0
        every ratio is 1 / R; otherwise it is R at y = x0 and 1 at the N - 2 other jumps.
        """
        N = self.num_states
        log_R = torch.log1p(N / torch.expm1(sigma))
        kept = torch.exp(-log_R) * ((N - 1) * (-log_R - 1) - log_total)
        moved = torch.exp(log_R) * (log_R - 1 - log_at_x0) - (N - 2) - (log_total - log_at_x0)
        return (total + torch.where(x == x0, kept, moved)) / N

    def reverse_rate(self, score, x):
        """Rates out of x (B, L) of the reversed chain: Q[x, y] score_y at y != x, (B, L, S), rows sum to zero."""
        return close_rows(score / self.num_states, x)

    def tweedie_probs(self, score, dsigma, x):
        """p(y) ~ (exp(-dsigma Q) score)_y exp(dsigma Q)[x, y], (B, L, S): the Tweedie step back by dsigma.

        exp(sigma Q) = e^-sigma I + (1 - e^-sigma) 1 1^T / N, and with -dsigma for sigma its inverse. Undoing
        the noise of a learned score can leave less than nothing of an unlikely token; clamp it at zero.
        """
        undo, redo = torch.exp(dsigma)[:, None, None], torch.exp(-dsigma)[:, None, None]
        before = (undo * score).add_((1 - undo) * score.mean(-1, keepdim=True)).clamp_(min=0)
        staying = redo * before.gather(-1, x[..., None])
        probs = before.mul_((1 - redo) / self.num_states).scatter_add_(-1, x[..., None], staying)
        return probs.div_(probs.sum(-1, keepdim=True))


GRAPHS = {"absorb": Absorbing, "uniform": Uniform}
NOISES = {"loglinear": LogLinearNoise, "geometric": GeometricNoise}

# ------------------------------------------------------------------------------------------------------
# 3. Transformer. Bidirectional, with rotary positions, and told about sigma by adaptive layer norm: an MLP
# of sigma gives each block the shifts, scales and gates of its two branches (adaLN-zero, of DiT). The gates
# start at zero, so that every block starts as the identity.
# ------------------------------------------------------------------------------------------------------


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
    graph: Literal["absorb", "uniform"] = "absorb"
    noise: Literal["loglinear", "geometric"] = "loglinear"
    parameterization: Literal["score", "mean", "causal"] = "score"  # the last two are baselines, section 6

    def __post_init__(self):
        for name in "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "cond_dim":
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head} into heads of even width: "
                f"try --n_embd={64 * self.n_head}"
            )
        for name, known in ("graph", GRAPHS), ("noise", NOISES), ("parameterization", MODELS):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if self.graph not in MODELS[self.parameterization].known_graphs:
            raise ValueError(f"parameterization={self.parameterization!r} has no graph={self.graph!r}: try --graph=absorb")


class SigmaMap(nn.Module):
    """sigma (B,) -> (B, cond_dim): cosines and sines of sigma at 128 frequencies, then an MLP."""

    def __init__(self, cond_dim, half=128):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * half, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        freqs = torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, sigma):
        angles = sigma[:, None].float() * self.freqs
        return F.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], -1)))


def rotate(qk, cos, sin):
    """Rotary positions: turn the pairs (j, j + D/2) of qk (..., L, D) by the angles of cos, sin (L, D/2)."""
    a, b = qk.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def modulate(x, shift, scale):
    """x (B, L, d), shift and scale (B, 1, d) -> (B, L, d)."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """x (B, L, n_embd), c (B, cond_dim) of sigma, cos and sin (L, D/2) for heads of width D -> (B, L, n_embd)."""

    causal = False  # the GPT of section 6 sets it

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.attn_qkv, self.attn_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * d)

    def forward(self, x, c, cos, sin):
        B, L, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)

        qkv = self.attn_qkv(modulate(self.norm1(x), shift1, scale1)).view(B, L, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, L, D)
        # float32 tables would promote q and k, and then no flash kernel takes them
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=self.causal)
        y = self.attn_out(y.transpose(1, 2).reshape(B, L, d))
        x = torch.addcmul(x, gate1, self.dropout(y))

        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2, self.dropout(y))


class OutputLayer(nn.Module):
    """The last norm, x (B, L, d), c (B, cond_dim) -> (B, L, d), and the vocabulary head.

    SEDD applies the head `linear` itself, to the rows that need it. It starts at zero: every score starts equal.
    """

    def __init__(self, config, num_states):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.n_embd, bias=False)
        self.linear = nn.Linear(config.n_embd, num_states)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.n_embd)

    def forward(self, x, c):
        return modulate(self.norm_final(x), *self.adaLN_modulation(c)[:, None].chunk(2, -1))


class VocabularySums(torch.autograd.Function):
    """The three sums of the loss for the logits z = h W^T + b, without holding all of a large z.

    h (R, d), W (S, d), b (S,), x and x0 (R,) -> sum over y != x of e^{z_y}, sum over y != x of z_y, and z_x0
    (0 where x0 = x), each (R,) in float32. Score entropy has no softmax: it is a plain sum over y. So the
    vocabulary can be cut into chunks that know nothing of each other. The gradient of a chunk's logits is
    g_total e^{z_y} + g_log_total + g_log_at_x0 [y = x0], 0 at y = x: for it backward computes them again, but for
    the first few, which forward keeps.
    """

    ELEMENTS = 2**23  # logits worked on at a time
    KEPT = 2**26  # logits kept for backward, in the dtype of h

    @staticmethod
    def chunks(h, W, b, x, x0, kept):
        """For each slice of the vocabulary: the slice, its logits, and where x and x0 lie in it (see `place`).

        The logits are taken from the list `kept`, or, as long as there is room, put into it.
        """
        n = max(1, VocabularySums.ELEMENTS // max(1, len(h)))

        def place(y, start, width):
            """The column of y (R,) in the slice, brought inside, and whether it is really there: each (R, 1)."""
            column = y[:, None] - start
            inside = (column >= 0) & (column < width)
            return column.clamp(0, width - 1), inside

        for start in range(0, len(W), n):
            s, i = slice(start, start + n), start // n
            z = kept[i] if i < len(kept) else F.linear(h, W[s], b[s])
            if i == len(kept) and (i + 1) * n * len(h) <= VocabularySums.KEPT:
                kept.append(z)
            z = z.to(torch.float32, copy=True)
            yield s, z, *place(x, start, z.shape[1]), *place(x0, start, z.shape[1])

    @staticmethod
    def forward(ctx, h, W, b, x, x0):
        ctx.save_for_backward(h, W, b, x, x0)
        ctx.kept = []
        total, log_total, log_at_x0 = h.new_zeros(3, len(h), 1, dtype=torch.float32)
        moved = (x != x0)[:, None]
        for _, z, x_column, x_here, x0_column, x0_here in VocabularySums.chunks(h, W, b, x, x0, ctx.kept):
            log_total += z.sum(1, keepdim=True) - z.gather(1, x_column) * x_here
            log_at_x0 += z.gather(1, x0_column) * (x0_here & moved)
            e = z.exp_()
            e.scatter_(1, x_column, e.gather(1, x_column).masked_fill(x_here, 0.0))
            total += e.sum(1, keepdim=True)
        return total[:, 0], log_total[:, 0], log_at_x0[:, 0]

    @staticmethod
    def backward(ctx, g_total, g_log_total, g_log_at_x0):
        h, W, b, x, x0 = ctx.saved_tensors
        g_total, g_log_total, g_log_at_x0 = g_total[:, None], g_log_total[:, None], g_log_at_x0[:, None]
        dh, dW, db = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(W), torch.empty_like(b)
        for s, z, x_column, x_here, x0_column, x0_here in VocabularySums.chunks(h, W, b, x, x0, ctx.kept):
            dz = z.exp_().mul_(g_total).add_(g_log_total)
            dz.scatter_add_(1, x0_column, g_log_at_x0 * x0_here)
            dz.scatter_(1, x_column, dz.gather(1, x_column).masked_fill(x_here, 0.0))
            db[s] = dz.sum(0)
            dz = dz.to(W.dtype)
            dW[s] = dz.T @ h
            dh += dz @ W[s]
        return dh.to(h.dtype), dW, db, None, None


class SEDD(nn.Module):
    """The score network. model(x, sigma) is the log score, model(x, sigma, x0) the denoising score entropy.

    Attributes `graph` and `noise` are built from the config. The parameters are named and shaped as in the
    published checkpoints, where vocab_embed.weight is called vocab_embed.embedding.
    """

    known_graphs = GRAPHS  # those for which the class has formulas

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.graph, self.noise = GRAPHS[config.graph](config.vocab_size), NOISES[config.noise]()
        self.vocab_embed = nn.Embedding(self.graph.num_states, config.n_embd)
        self.sigma_map = SigmaMap(config.cond_dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.output_layer = OutputLayer(config, self.graph.num_states)

        nn.init.kaiming_uniform_(self.vocab_embed.weight, a=5**0.5)
        for layer in (*[block.adaLN_modulation for block in self.blocks], self.output_layer.adaLN_modulation):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.output_layer.linear.weight), nn.init.zeros_(self.output_layer.linear.bias)

        D = config.n_embd // config.n_head
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, D, 2) / D), persistent=False)

    def trunk(self, x, sigma):
        """x (B, L), sigma (B,) -> features (B, L, n_embd), all but the vocabulary head."""
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        h, c = self.vocab_embed(x), self.sigma_map(sigma)
        for block in self.blocks:
            h = block(h, c, cos, sin)
        return self.output_layer(h, c)

    def shift(self, sigma):
        """The part of every log score that is known: sigma (B,) -> (B,).

        Under the absorbing graph the true score of a masked position i is p(x0_i = y | visible tokens) times
        1 / (e^sigma - 1): the network starts from p = 1 / vocab_size and learns what is missing.
        """
        if self.graph.mask_id is None:
            return torch.zeros_like(sigma)
        return -torch.log(torch.expm1(sigma)) - math.log(self.config.vocab_size)

    def log_score(self, h, sigma, x):
        """Features h (..., d), sigma and x (...) -> log score (..., S), float32, 0 at y = x."""
        z = self.output_layer.linear(h).float()
        return z.add_(self.shift(sigma)[..., None]).scatter_(-1, x[..., None], 0.0)

    def entropy(self, h, sigma, x, x0):
        """Features h (R, d), the others (R,) -> score entropy (R,), without the log scores."""
        if not hasattr(self.graph, "entropy_from_sums"):  # a graph whose loss asks for more than sums
            # the rows are a batch of sequences of length 1
            return self.graph.score_entropy(self.log_score(h, sigma, x)[:, None], sigma, x[:, None], x0[:, None])[:, 0]
        head, shift, kind = self.output_layer.linear, self.shift(sigma), h.device.type
        # cast the head once, not once a chunk
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        total, log_total, log_at_x0 = VocabularySums.apply(
            h.to(dtype), head.weight.to(dtype), head.bias.to(dtype), x, x0
        )
        total, log_total = total * shift.exp(), log_total + (self.graph.num_states - 1) * shift
        log_at_x0 = log_at_x0 + torch.where(x == x0, 0.0, shift)
        return self.graph.entropy_from_sums(total, log_total, log_at_x0, sigma, x, x0)

    def log_score_rows(self, x, sigma, rows):
        """For the samplers: the log scores of the positions `rows`, bool (B, L), and of no other.

        Yields, a few rows at a time, their slice of x[rows] and their log scores (n, S).
        """
        h, sigma, x = self.trunk(x, sigma)[rows], sigma[:, None].expand(x.shape)[rows], x[rows]
        n = max(1, VocabularySums.ELEMENTS // self.graph.num_states)
        for part in (slice(i, i + n) for i in range(0, len(x), n)):
            yield part, self.log_score(h[part], sigma[part], x[part])

    def forward(self, x, sigma, x0=None):
        """x (B, L), sigma (B,) -> log score (B, L, S), float32, 0 at y = x.

        With x0 (B, L): the denoising score entropy (B, L), equal to graph.score_entropy of the log score, but made
        without a tensor (B, L, S): only the positions that have a loss meet the vocabulary, a part of it at a time.
        """
        h, sigma = self.trunk(x, sigma), sigma[:, None].expand(x.shape)
        if x0 is None:
            return self.log_score(h, sigma, x)
        rows = self.graph.can_change(x)
        entropy = self.entropy(h[rows], sigma[rows], x[rows], x0[rows])
        return torch.zeros_like(rows, dtype=entropy.dtype).masked_scatter(rows, entropy)


MODELS = {"score": SEDD}

# ------------------------------------------------------------------------------------------------------
# 4. Loss. Each function takes as `model` any callable with the two forms of SEDD.forward, model(x, sigma)
# and model(x, sigma, x0): the tests pass exact scores where training passes the network. Its log score must be 0 at
# y = x, the ratio of x to itself. (The samplers use its log_score_rows as well, if there is one.)
# ------------------------------------------------------------------------------------------------------


def low_discrepancy_times(n, device=None):
    """n times in (0, 1], each uniform, together evenly spread: one random shift of a regular grid, (n,)."""
    return 1 - (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1


def diffusion_loss(model, graph, noise, x0, t=None, x=None):
    """One draw of the diffusion-weighted denoising score entropy: x0 (B, L) -> (B,), nats per sequence.

        E_{t, x_t} [ dsigma(t) sum over positions of the denoising score entropy at (x_t, sigma(t)) ]

    is, for t uniform in [0, 1], the integral that bounds -log p(x0) (see nll_bound). Left out, the times
    t (B,) are a low-discrepancy set, and x (B, L) is drawn from the forward process at these times.
    """
    if t is None:
        t = low_discrepancy_times(len(x0), x0.device)
    sigma, dsigma = noise(t)
    if x is None:
        x = graph.sample_transition(x0, sigma)
    return dsigma * model(x, sigma, x0).sum(-1)


@torch.no_grad()
def nll_bound(model, graph, noise, x0, num_times=128):
    """An unbiased draw of an upper bound on -log p(x0): x0 (B, L) -> (B,), nats per sequence.

        -log p(x0) <= integral over t of the diffusion loss
                      + KL(p(x_T | x0) || p_base)                 graph.prior_kl, the end at t = 1
                      + E[-log p(x0 | x_t0)]                      the last denoising step, the end at t = 0

    p(x0) is what the reversed chain generates from p_base with this model's scores, in continuous time (`sample`
    takes steps, and starts from the pure noise that p_base is but for graph.prior_kl's visible tokens); with the true
    scores the bound is an equality, up to the distance of p_T from p_base and to the last step's independent positions.
    The integral takes num_times times t = u^2, with u evenly spaced from one random shift per sequence: a token
    hit at time t is rare and weighs 1 / t, so that with even times the variance would have no limit. What each
    schedule leaves at the two ends:

    t = 1. Log-linear noise stops at e^-sigma = eps. The absorbing graph then pays eps log V nats per token
    for the tokens that are still visible (0.01 on GPT-2's vocabulary); the uniform graph (N - 1) eps^2 / 2
    while N eps is small, and never more than eps log N. Geometric noise stops at e^-20: nothing.
    t = 0. Log-linear noise starts at sigma = 0, where x_t is x0 and nothing is left to pay. Geometric noise
    starts at sigma_min, and the samplers' denoising step from there has to find x0: one draw of x_t0. (It is
    infinite where that step, its negative probabilities clamped, gives some token of x0 none.)
    """
    B, L = x0.shape
    shift = low_discrepancy_times(B, x0.device)[torch.randperm(B, device=x0.device)]
    integral = torch.zeros_like(shift)
    for k in range(num_times):
        u = (k + shift) / num_times
        integral += 2 * u / num_times * diffusion_loss(model, graph, noise, x0, u**2)  # dt = 2 u du
    prior = L * graph.prior_kl(noise(torch.ones_like(shift))[0])
    sigma = noise(torch.zeros_like(shift))[0]
    reconstruction = torch.zeros_like(shift)
    if sigma[0] > 0:
        x = graph.sample_transition(x0, sigma)
        for i in range(B):  # one sequence at a time: this term alone needs all of a sequence's scores at once
            probs = denoise_probs(graph, model(x[i : i + 1], sigma[i : i + 1]).exp(), sigma[i : i + 1], x[i : i + 1])
            reconstruction[i] = -probs.gather(-1, x0[i : i + 1, :, None]).log().sum()
    return integral + prior + reconstruction


# ------------------------------------------------------------------------------------------------------
# 5. Samplers. The reversed chain, cut into steps in which all positions jump independently.
# ------------------------------------------------------------------------------------------------------


def denoise_probs(graph, score, sigma, x):
    """The last step, from sigma to no noise at all, where MASK is no longer an answer: (B, L, S)."""
    probs = graph.tweedie_probs(score, sigma, x)
    if graph.mask_id is not None:
        probs = torch.cat([probs[..., : graph.mask_id], torch.zeros_like(probs[..., :1])], -1)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample_categorical(probs):
    """Exact draws from probs (..., S), normalised or not -> (...), by inverting the running sum in float64.

    The Gumbel trick in float32 cannot reach far into the tail: it makes samples less diverse than the model
    is, and look better for it (arXiv 2409.02908).
    """
    device, probs = probs.device, probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
    running = probs.double().cumsum(-1)
    u = torch.rand(running.shape[:-1], dtype=torch.float64, device=running.device) * running[..., -1]
    return torch.searchsorted(running, u[..., None], right=True)[..., 0].clamp(max=probs.shape[-1] - 1).to(device)


def sample_jumps(probs, here):
    """The same draws where most tokens stay where they are: probs (R, S), here (R,) -> (R,). Overwrites probs.

    Whether a token leaves is drawn first, from one number; where to, only for those that do.
    """
    stay = probs.gather(-1, here[:, None])[:, 0]
    leave = probs.scatter_(-1, here[:, None], 0.0).sum(-1)
    jumps = torch.rand(len(here), device=here.device) * (stay + leave) >= stay
    return here.masked_scatter(jumps, sample_categorical(probs[jumps]))


@torch.no_grad()
def sample(model, graph, noise, shape, steps, sampler="tweedie", prompt=None, device=None, callback=None):
    """Draw sequences of the given shape (B, L) -> (B, L) tokens, never MASK, in at most `steps` calls of the model.

    `euler` is tau-leaping: every position jumps with a chance of its rate, as it is at the beginning of the step,
    times the step's length. `tweedie` is, given the true scores, optimal among the steps that move each position
    independently, and exact for a single position. The last step of both is Tweedie's, from wherever the noise is down
    to none. (Under the absorbing graph with log-linear noise the two are the same: from t to t - dt a MASK is left with
    the chance dt / t, which is rate times length.)

    prompt (B, L) has a token where it is to be kept and -1 where one is to be generated. Under the absorbing
    graph this samples p(rest | kept) at any positions, as exactly as it samples without: a kept token looks just
    like one that noise has missed. Under the uniform graph it stays approximate however small the steps: the scores
    take a kept token for one that may be noisy, and believe it too little.
    callback(step, x), if given, sees each state from the prior (step 0) to the last.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: sampling takes at least 1 step")
    if sampler not in ("euler", "tweedie"):
        raise ValueError(f"sampler={sampler!r} is none of euler, tweedie")
    x = graph.sample_prior(*shape, device=device)
    free = torch.ones_like(x, dtype=torch.bool)
    if prompt is not None:
        if prompt.shape != x.shape or prompt.max() >= graph.vocab_size:
            raise ValueError(f"prompt must be {tuple(x.shape)} tokens below {graph.vocab_size}, or -1 to generate")
        free = prompt.to(x.device) < 0
        x = torch.where(free, x, prompt.to(x.device))

    times = torch.linspace(1, 0, steps + 1, device=x.device)
    for step in range(steps):
        if callback:
            callback(step, x)
        rows = free & graph.can_change(x)
        if not rows.any():
            continue
        sigma, dsigma = noise(times[step].expand(shape[0]))
        sigma_next, _ = noise(times[step + 1].expand(shape[0]))
        here = x[rows]
        if hasattr(model, "log_score_rows"):
            parts = model.log_score_rows(x, sigma, rows)
        else:
            parts = [(slice(None), model(x, sigma)[rows])]
        sigma, dsigma, sigma_next = (s[:, None].expand(shape)[rows] for s in (sigma, dsigma, sigma_next))
        drawn = torch.empty_like(here)
        for part, log_score in parts:
            # the rows are a batch of sequences of length 1
            score, y = log_score.exp_()[:, None], here[part, None]
            if step == steps - 1:
                probs = denoise_probs(graph, score, sigma[part], y)
            elif sampler == "tweedie":
                probs = graph.tweedie_probs(score, (sigma - sigma_next)[part], y)
            else:
                # a step too long for its rates would leave less than nothing for staying
                probs = graph.reverse_rate(score, y) * (dsigma[part, None, None] / steps)
                probs = probs.scatter_add_(-1, y[..., None], torch.ones_like(probs[..., :1])).clamp_(min=0)
            drawn[part] = sample_jumps(probs[:, 0], y[:, 0])
        x = x.masked_scatter(rows, drawn)
    if callback:
        callback(steps, x)
    return x


# ------------------------------------------------------------------------------------------------------
# 6. Baselines on the same transformer: means instead of scores, and GPT. Nothing above needs this section.
# ------------------------------------------------------------------------------------------------------


class D3PM(SEDD):
    """The mean parameterisation, D3PM in continuous time: the network predicts mu(y) = p(x0_i = y | x).

    The score is the mean under mu of the known ratio p(y | x0) / p(x | x0), so it follows in closed form, and loss,
    bound and samplers are SEDD's. From MASK it is mu_y / (e^sigma - 1). Put into the absorbing graph's score
    entropy, with r = 1 / (e^sigma - 1) and scores that sum to r,

        r + r (log r - 1 - log(r mu_x0)) = -r log mu_x0,

    whose weight dsigma r is 1 / t under log-linear noise: the weighted cross-entropy known as MDLM.
    Under the uniform graph, with R = 1 + N / (e^sigma - 1), the ratio is 1 / R for x0 = x, R for x0 = y and
    1 for any other x0: score_y = mu_x / R + mu_y R + (1 - mu_x - mu_y).

    This plain version holds all logits at once, for its softmax: it is not made for large vocabularies.
    """

    known_graphs = "absorb", "uniform"

    def log_score(self, h, sigma, x):
        return self.log_score_of_mean(self.output_layer.linear(h).float(), sigma, x)

    def log_score_of_mean(self, logits, sigma, x):
        """Logits of mu (..., S), sigma and x (...) -> log score (..., S), 0 at y = x. MASK has no part in mu."""
        if self.graph.mask_id is not None:
            log_mu = logits[..., : self.graph.mask_id].log_softmax(-1)
            log_score = F.pad(log_mu - torch.log(torch.expm1(sigma))[..., None], (0, 1))
        else:
            mu, R = logits.softmax(-1), (1 + self.graph.num_states / torch.expm1(sigma))[..., None]
            at_x, others = mu.gather(-1, x[..., None]), mu.scatter(-1, x[..., None], 0.0).sum(-1, keepdim=True)
            log_score = (at_x / R + mu * (R - 1) + others).log()
        return log_score.scatter(-1, x[..., None], 0.0)

    def entropy(self, h, sigma, x, x0):
        return self.graph.entropy_from_sums(*score_sums(self.log_score(h, sigma, x), x, x0), sigma, x, x0)


class GPT(SEDD):
    """The yardstick: the same blocks, causal, at sigma = 0 always; it predicts each token from those before it.

    Built with the absorbing graph, whose MASK stands before the first token.
    """

    known_graphs = ("absorb",)

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.causal = True

    def logits(self, x):
        """x (B, L), its first token MASK -> logits of the next tokens (B, L, V)."""
        h = self.trunk(x, torch.zeros(len(x), device=x.device))
        return self.output_layer.linear(h)[..., : self.config.vocab_size].float()

    def forward(self, x0):
        """x0 (B, L) -> -log p(x0_i | x0_1 ... x0_i-1), (B, L), in nats, exactly."""
        before = F.pad(x0[:, :-1], (1, 0), value=self.graph.mask_id)
        return F.cross_entropy(self.logits(before).transpose(1, 2), x0, reduction="none")

    @torch.no_grad()
    def sample(self, prompt, callback=None):
        """prompt (B, L), tokens to begin with and then -1 -> (B, L), a token a call, all of its past computed anew."""
        x = F.pad(prompt, (1, 0), value=self.graph.mask_id)
        for i in range(int((prompt >= 0).all(0).sum()), prompt.shape[1]):
            drawn = sample_categorical(self.logits(x[:, : i + 1])[:, -1].softmax(-1))
            x[:, i + 1] = torch.where(prompt[:, i] < 0, drawn, prompt[:, i])
            if callback:
                callback(i + 1, x[:, 1:])
        return x[:, 1:]


MODELS |= {"mean": D3PM, "causal": GPT}


# ------------------------------------------------------------------------------------------------------
# 7. Published weights: a folder, or a repository of the Hugging Face hub, with the authors' config.json and
# model.safetensors or pytorch_model.bin. The parameters above bear their names, but for the embedding.
# ------------------------------------------------------------------------------------------------------

CONFIG, SAFE, BIN = "config.json", "model.safetensors", "pytorch_model.bin"


def from_pretrained(path_or_hub_id):
    """The SEDD model (float32, CPU, evaluation mode) in a local folder or a hub repository of that format.

    ValueError, of one line, where there is none; ImportError, with the command to run, where a package is missing.
    Only numbers are read: nothing in a downloaded file can run. They must be finite, and those of a .bin are held
    against its checksums; a .safetensors has none.
    """
    folder = Path(path_or_hub_id)
    try:
        if not folder.is_dir():
            if str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id)[0] in "/.~":
                raise ValueError("there is no such folder, and a hub id is written owner/name")
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=[CONFIG, SAFE, BIN]))
        published = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        shape, noise = published["model"], published["noise"]
        config = SEDDConfig(
            published["tokens"], shape["length"], shape["n_blocks"], shape["n_heads"], shape["hidden_size"],
            shape["cond_dim"], shape["dropout"], published["graph"]["type"], noise["type"],
        )  # fmt: skip
        if shape["scale_by_sigma"] is not (config.graph == "absorb"):
            raise ValueError(f"scale_by_sigma={shape['scale_by_sigma']!r} under the {config.graph} graph")
        if config.noise == "geometric" and (noise["sigma_min"], noise["sigma_max"]) != (1e-4, 20):
            raise ValueError("geometric noise, but not from 1e-4 to 20")
        if (folder / SAFE).is_file():
            from safetensors.torch import load_file

            weights = load_file(folder / SAFE)
        else:
            with zipfile.ZipFile(folder / BIN) as archive:  # torch.load does not look at the checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{BIN} is damaged in its part {damaged}")
            weights = torch.load(folder / BIN, map_location="cpu", weights_only=True)
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(f"{name} does not hold finite real numbers")
        weights["vocab_embed.weight"] = weights.pop("vocab_embed.embedding")
        inv_freq = weights.pop("rotary_emb.inv_freq", None)
        if config.n_layer > len(weights):
            raise ValueError(f"n_blocks={config.n_layer} but there are {len(weights)} tensors")
        with torch.device("meta"):  # shapes first: a wrong config can ask for more memory than there is
            SEDD(config).load_state_dict(weights, assign=True)
        model = SEDD(config)
        model.load_state_dict(weights)
        if inv_freq is not None and not torch.allclose(inv_freq, model.inv_freq):
            raise ValueError("rotary positions of other frequencies")
    except ImportError:
        raise ImportError(f"{str(path_or_hub_id)!r} needs packages more: pip install -e '.[hub]'") from None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{str(path_or_hub_id)!r} is no folder or hub repository with a SEDD model: {why}") from None
    return model.eval()


def save_pretrained(model, folder):
    """Write the model for from_pretrained and the authors' code: as safetensors if that is installed, else as .bin.

    ValueError at a baseline, for which the format has no place. Other files in the folder stay. It is without
    config.json, and so holds no model, while the finished files move in.
    """
    config, folder = model.config, Path(folder)
    known = {"parameterization": ["score"], "graph": ["absorb", "uniform"], "noise": ["loglinear", "geometric"]}
    for name in known:
        if getattr(config, name) not in known[name]:
            raise ValueError(f"the published format has no place for {name}={getattr(config, name)!r}")
    published = {
        "tokens": config.vocab_size,
        "graph": {"type": config.graph, "file": "data", "report_all": False},
        "noise": {"type": config.noise, "sigma_min": 1e-4, "sigma_max": 20},
        "model": {
            "name": "sedd", "type": "ddit", "hidden_size": config.n_embd, "cond_dim": config.cond_dim,
            "length": config.block_size, "n_blocks": config.n_layer, "n_heads": config.n_head,
            "scale_by_sigma": config.graph == "absorb", "dropout": config.dropout,
        },
    }  # fmt: skip
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    weights["vocab_embed.embedding"] = weights.pop("vocab_embed.weight")
    weights["rotary_emb.inv_freq"] = model.inv_freq.cpu()
    try:
        from safetensors.torch import save_file as save

        file, other = SAFE, BIN
    except ImportError:
        save, file, other = torch.save, BIN, SAFE
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save(weights, Path(scratch, file))
        Path(scratch, CONFIG).write_text(json.dumps(published, indent=2), encoding="utf-8")
        (folder / CONFIG).unlink(missing_ok=True)
        os.replace(Path(scratch, file), folder / file)
        (folder / other).unlink(missing_ok=True)
        os.replace(Path(scratch, CONFIG), folder / CONFIG)


SEDD.from_pretrained, SEDD.save_pretrained = staticmethod(from_pretrained), save_pretrained
