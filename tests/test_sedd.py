"""sedd.py against the definitions it implements: dense linear algebra, plain sums, the authors' own numbers."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import quick
import sedd
import train
from bench import peak_memory
from sedd import SEDD, Absorbing, GeometricNoise, LogLinearNoise, SEDDConfig, Uniform, diffusion_loss, sample

V = 5
GRAPHS = [Absorbing(V), Uniform(V)]
all_graphs = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: type(graph).__name__)
both_names = pytest.mark.parametrize("name", ["absorb", "uniform"])


def dense_transition(graph, sigma):
    """exp(sigma Q), float64 (..., S, S); column x is p(. | x)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return torch.linalg.matrix_exp(sigma[..., None, None] * graph.rate_matrix())


def random_case(graph, B=6, L=4, seed=0):
    """x0 (B, L), sigma (B, 1), x and a log score (0 at y = x) to compare formulas on, in float64."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(V, (B, L), generator=g)
    sigma = torch.rand(B, 1, generator=g, dtype=torch.float64) * 2 + 0.01
    x = graph.sample_transition(x0, sigma, g)
    log_score = torch.randn(B, L, graph.num_states, generator=g, dtype=torch.float64)
    return x0, sigma, x, log_score.scatter(-1, x[..., None], 0.0)


# ------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("noise", [LogLinearNoise(), GeometricNoise()], ids=["loglinear", "geometric"])
def test_dsigma_is_the_derivative_of_sigma(noise):
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    sigma, dsigma = noise(t)
    torch.testing.assert_close(torch.autograd.grad(sigma.sum(), t)[0], dsigma)


def test_schedules_at_their_ends():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(1 - torch.exp(-LogLinearNoise(1e-3)(ends)[0]), ends * (1 - 1e-3))
    torch.testing.assert_close(GeometricNoise(1e-4, 20.0)(ends)[0], torch.tensor([1e-4, 20.0], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- graph


def test_rate_matrices_are_the_papers():
    """Both, written out for three states; rows are y, columns are x."""
    third = 1 / 3
    uniform = [[third - 1, third, third], [third, third - 1, third], [third, third, third - 1]]
    absorb = [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [1.0, 1.0, 0.0]]
    torch.testing.assert_close(Uniform(3).rate_matrix(), torch.tensor(uniform, dtype=torch.float64))
    torch.testing.assert_close(Absorbing(2).rate_matrix(), torch.tensor(absorb, dtype=torch.float64))


@all_graphs
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_sample_transition_draws_from_the_matrix_exponential(graph, sigma):
    """Pearson's chi-square on 200,000 draws from each token; false alarm 1e-6 per case."""
    from scipy.stats import chi2

    n, g = 200_000, torch.Generator().manual_seed(1)
    for token in range(2):
        x = graph.sample_transition(torch.full((1, n), token), torch.tensor([sigma]), g)
        expected = n * dense_transition(graph, sigma)[:, token]
        counts = torch.bincount(x.flatten(), minlength=graph.num_states)
        assert counts[expected < 1e-9].sum() == 0
        cells = expected > 1e-9
        statistic = ((counts - expected) ** 2 / expected)[cells].sum()
        assert statistic < chi2.isf(1e-6, int(cells.sum()) - 1)


@all_graphs
def test_reverse_rate_is_the_rate_matrix_times_the_score(graph):
    _, _, x, log_score = random_case(graph)
    score, Q = log_score.exp(), graph.rate_matrix()
    expected = Q[x] * score  # Q[x_i, y] is the forward rate from y to x_i
    expected = expected - F.one_hot(x, graph.num_states) * expected.sum(-1, keepdim=True)
    torch.testing.assert_close(graph.reverse_rate(score, x), expected)
    torch.testing.assert_close(graph.reverse_rate(score, x).sum(-1), torch.zeros(x.shape, dtype=torch.float64))


@all_graphs
def test_tweedie_probs_are_matrix_exponentials(graph):
    """exp(-delta Q) score, times row x of exp(delta Q), normalised, wherever that is a distribution."""
    _, _, x, log_score = random_case(graph, B=40)
    score, delta = log_score.exp(), torch.linspace(0.001, 0.3, 40, dtype=torch.float64)
    if graph.mask_id is not None:  # from a visible token a score of the true chain is never asked for
        score = score * 0.1
        score = score.scatter(-1, x[..., None], 1.0)
    before = torch.einsum("bij,blj->bli", dense_transition(graph, -delta), score)
    arrive = dense_transition(graph, delta)[torch.arange(40)[:, None], x]
    expected = before * arrive
    proper = (expected >= 0).all(-1)
    assert proper.float().mean() > 0.3
    probs = graph.tweedie_probs(score, delta[:, None], x)
    torch.testing.assert_close(probs[proper], (expected / expected.sum(-1, keepdim=True))[proper])
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(x.shape, dtype=torch.float64))


def closed_forms(graph, score, sigma, x, x0):
    """Each graph's formulas as the paper gives them, without pi, for x (...), score (..., S) with 1 at y = x."""
    S, a, here = graph.num_states, torch.exp(-sigma), F.one_hot(x, graph.num_states)
    others = score * (1 - here)
    total, undo = others.sum(-1), torch.expm1(sigma)
    if graph.mask_id is not None:
        masked, r = x == V, 1 / undo
        log_s = score.gather(-1, x0[..., None])[..., 0].log()
        entropy = masked * (total - r * log_s + r * (r.log() - 1))
        rate = masked[..., None] * (others - here * total[..., None])
        jump, stay = undo[..., None] * others, (1 - undo * total).clamp(min=0)
        tweedie = torch.where(masked[..., None], jump + here * stay[..., None], here.double())
        kl = a * math.log(V)  # MASK costs nothing, and a token of V has V times its share of p_base
        change = masked
    else:
        other = -torch.expm1(-sigma) / S  # p(y | x0) at y != x0
        same = a + other
        p = torch.where(torch.arange(S) == x0[..., None], same[..., None], other[..., None])
        r = p / torch.where(x == x0, same, other)[..., None]
        entropy = ((score - r * score.log() + r * (r.log() - 1)) * (1 - here)).sum(-1) / S
        rate = (others - here * total[..., None]) / S
        before = (undo + 1)[..., None] * score - (undo / S * (1 + total))[..., None]
        tweedie = before.clamp(min=0) * (a[..., None] * here + other[..., None])
        kl = same * torch.log(S * same) + (S - 1) * other * torch.log(S * other)
        change = torch.ones_like(x, dtype=torch.bool)
    return entropy, rate, tweedie / tweedie.sum(-1, keepdim=True), kl.expand(x0.shape), change


@pytest.mark.parametrize("graph", [Absorbing(V), Uniform(V)], ids=["Absorbing", "Uniform"])  # not a fork's new graph
def test_the_one_formula_is_each_graphs_closed_form(graph):
    """4,000 random cases of float64 to 1e-12, sigma from 1e-4 to 7."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(V, (1000, 4), generator=g)
    sigma = 1e-4 * 7e4 ** torch.rand(1000, 1, generator=g, dtype=torch.float64)
    x = torch.where(torch.rand(1000, 4, generator=g) < 0.5, graph.sample_prior(1000, 4, generator=g), x0)
    score = torch.randn(1000, 4, graph.num_states, generator=g, dtype=torch.float64).exp()
    score = score.scatter(-1, x[..., None], 1.0)
    entropy, rate, tweedie, kl, change = closed_forms(graph, score, sigma, x, x0)
    exact = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(graph.score_entropy(score.log(), sigma, x, x0), entropy, **exact)
    torch.testing.assert_close(graph.reverse_rate(score, x), rate, **exact)
    torch.testing.assert_close(graph.tweedie_probs(score, sigma, x), tweedie, **exact)
    torch.testing.assert_close(graph.prior_kl(sigma, x0), kl, **exact)
    assert graph.can_change(x).equal(change)


@all_graphs
@pytest.mark.parametrize(
    "shape, noise_shape", [((7,), (7,)), ((7,), (1,)), ((3, 7), (3, 1)), ((2, 3, 7), (3, 1)), ((), ())]
)
def test_methods_work_on_any_shape(graph, shape, noise_shape):
    """All tokens at once, with sigma that broadcasts, and token by token: the same."""
    g = torch.Generator().manual_seed(0)
    x0, sigma = torch.randint(V, shape, generator=g), 0.1 + torch.rand(noise_shape, generator=g, dtype=torch.float64)
    x = torch.where(torch.rand(shape, generator=g) < 0.5, graph.num_states - 1, x0)
    score = torch.rand(*shape, graph.num_states, generator=g, dtype=torch.float64).scatter(-1, x[..., None], 1.0)

    def results(score, sigma, x, x0):
        return [graph.score_entropy(score.log(), sigma, x, x0), graph.prior_kl(sigma, x0), graph.can_change(x),
                graph.reverse_rate(score, x), graph.tweedie_probs(score, sigma, x)]  # fmt: skip

    assert graph.sample_transition(x0, sigma).shape == graph.sample_prior(*shape).shape == x.shape
    together = [result.reshape(x.numel(), -1) for result in results(score, sigma, x, x0)]
    flat = score.view(-1, 1, graph.num_states), sigma.expand(shape).reshape(-1, 1), x.view(-1, 1), x0.view(-1, 1)
    for i, token in enumerate(zip(*flat)):
        for a, b in zip(together, results(*token)):
            torch.testing.assert_close(a[i], b.flatten())


@all_graphs
def test_methods_stay_on_the_device(graph):
    """On `meta`, where a tensor has no values, a CPU tensor in between is an error, as on a GPU."""
    x0, sigma, score = (torch.rand(shape, device="meta") for shape in ((2, 3), (2, 1), (2, 3, graph.num_states)))
    x0 = x0.long()
    x = graph.sample_transition(x0, sigma)
    results = (x, graph.sample_prior(2, 3, device="meta"), graph.prior_kl(sigma, x0), graph.can_change(x),
               graph.score_entropy(score, sigma, x, x0), graph.reverse_rate(score, x),
               graph.tweedie_probs(score, sigma, x))  # fmt: skip
    assert all(result.device.type == "meta" and result.shape[:2] == (2, 3) for result in results)
    assert results[-1].shape == results[-2].shape == score.shape


# ----------------------------------------------------------------------------------------- score entropy


def plain_score_entropy(graph, log_score, sigma, x, x0):
    """The definition, term by term: sum over y != x of Q[x, y] (s_y - r_y log s_y + K(r_y))."""
    p, Q = dense_transition(graph, sigma[:, 0]), graph.rate_matrix()
    result = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            here, clean = x[b, i], x0[b, i]
            for y in range(graph.num_states):
                rate = Q[here, y]
                if y != here and rate > 0:
                    r, s = p[b, y, clean] / p[b, here, clean], log_score[b, i, y].exp()
                    K = r * (r.log() - 1) if r > 0 else 0.0
                    result[b, i] += rate * (s - (r * s.log() if r > 0 else 0.0) + K)
    return result


@all_graphs
def test_score_entropy_is_the_plain_sum_of_its_definition(graph):
    x0, sigma, x, log_score = random_case(graph)
    expected = plain_score_entropy(graph, log_score, sigma, x, x0)
    assert expected.count_nonzero() > 5
    torch.testing.assert_close(graph.score_entropy(log_score, sigma, x, x0), expected)


def test_score_entropy_of_an_uneven_pi_is_the_plain_sum():
    class Uneven(sedd.Graph):
        def pi(self, y, dtype=torch.float32):
            return torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).to(dtype)[y]

    graph = Uneven(V)
    x0, sigma, x, log_score = random_case(graph, B=20)
    expected = plain_score_entropy(graph, log_score, sigma, x, x0)
    assert graph.can_change(x).sum() > 50
    torch.testing.assert_close(graph.score_entropy(log_score, sigma, x, x0), expected, rtol=1e-6, atol=1e-7)


@all_graphs
def test_score_entropy_is_zero_at_the_true_ratio_and_positive_elsewhere(graph):
    x0, sigma, x, noise = random_case(graph, B=50)
    p = dense_transition(graph, sigma[:, 0])[torch.arange(50)[:, None], :, x0]
    ratio = p / p.gather(-1, x[..., None])
    assert graph.score_entropy(ratio.log(), sigma, x, x0).abs().max() < 1e-9
    other = graph.score_entropy(ratio.clamp(min=1e-9).log() + 0.1 * noise, sigma, x, x0)
    assert (other[graph.can_change(x)] > 0).all() and (other >= 0).all()


def test_worked_example():
    """A masked token at r = 0.5 (sigma = log 3, one token): s - 0.5 log s + K(0.5), K(0.5) = -0.8466."""
    graph = Absorbing(1)
    entropy = graph.score_entropy(
        torch.tensor([[[0.0, 0.0]]]), torch.tensor([3.0]).log(), torch.tensor([[1]]), torch.tensor([[0]])
    )
    assert entropy.item() == pytest.approx(1 - 0.8466, abs=1e-4)  # at s = 1, log s = 0


@all_graphs
def test_score_entropy_is_infinite_where_the_score_vanishes(graph):
    x0, sigma, x, log_score = random_case(graph, B=30)
    values = [
        graph.score_entropy(log_score - F.one_hot(x0, graph.num_states).double() * c, sigma, x, x0) for c in (10, 1e300)
    ]
    lost = (x != x0) & (graph.rate_matrix()[x, x0] > 0)
    assert (values[1][lost] > 1e290).all() and (values[0][lost] < 1e3).all()


def test_a_token_that_noise_cannot_make_costs_nothing():
    """A visible x other than x0 under the absorbing graph, p(x | x0) = 0: no loss, and gradients of 0 and not NaN."""
    log_score = torch.randn(3, V + 1, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0, 1, 2])
    entropy = Absorbing(V).score_entropy(log_score, torch.tensor([0.5]).double(), x, (x + 1) % V)
    entropy.sum().backward()
    assert entropy.equal(torch.zeros_like(entropy)) and log_score.grad.equal(torch.zeros_like(log_score))


def test_score_entropy_keeps_its_digits_near_its_minimum():
    """A masked token at r = 0.5 (one token), log scores d off in float32: r (e^d - 1 - d) to a hundredth, d to 1e-3."""
    d = torch.tensor([-0.1, -1e-2, -1e-3, 1e-3, 1e-2, 0.1])
    log_score = torch.stack([math.log(0.5) + d, torch.zeros(6)], -1)
    x0 = torch.zeros(6, dtype=torch.long)
    entropy = Absorbing(1).score_entropy(log_score, torch.tensor([3.0]).log(), x0 + 1, x0)
    exact = 0.5 * (torch.expm1(d.double()) - d)
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 6.9])
def test_score_entropy_keeps_its_digits_in_float32(sigma):
    """GPT-2's vocabulary, uniform graph, 64 tokens of which half were hit, scores within a tenth of the truth.

    The largest error of a token is at most 2e-4 of the mean loss. By the definition as it stands it is 9e-4 at the
    smallest sigma: there r is 5e8, and its three terms cancel.
    """
    N, R, g = 50_257, 64, torch.Generator().manual_seed(0)
    graph, sigma = Uniform(N), torch.tensor([sigma])
    x0 = torch.randint(N, (R,), generator=g)
    x = torch.where(torch.arange(R) % 2 > 0, torch.randint(N, (R,), generator=g), x0)
    y, exact = torch.arange(N), sigma.double()
    p = -torch.expm1(-exact) / N + torch.exp(-exact) * (y == x0[:, None])
    r = p / p.gather(-1, x[:, None])
    log_score = r.log() + 0.1 * torch.randn(R, N, generator=g) * (y != x[:, None])
    log_score = log_score.float()
    truth = graph.score_entropy(log_score.double(), exact, x, x0)
    plain = ((log_score.double().exp() - r * log_score + r * (r.log() - 1)) * (y != x[:, None])).sum(-1) / N
    torch.testing.assert_close(truth, plain, rtol=1e-6, atol=1e-11 * plain.mean().item())
    error = (graph.score_entropy(log_score, sigma, x, x0) - truth).abs().max()
    assert error <= 2e-4 * truth.mean()


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 0.1, 1.0, 3.0, 6.9, 12.0, 20.0])
@pytest.mark.parametrize("kind, where", [(Absorbing, "mask"), (Uniform, "x0"), (Uniform, "half")])
def test_score_entropy_in_float32_is_that_of_float64(kind, where, sigma):
    """GPT-2's vocabulary, scores within a tenth of the truth: the largest error of a token, over the mean loss.

    It is 2e-6; 2e-4 where the score of x0 is large, for what float32 rounds off log r = 20 is 1e-5 of d = 0.1. At the true
    scores there is no loss but that of their rounding, and it is no larger than such an error.
    """
    N, R, g = 50_257, 32, torch.Generator().manual_seed(0)
    graph, sigma = kind(N), torch.tensor([sigma])
    x0 = torch.randint(N, (R,), generator=g)
    x = x0 if where == "x0" else torch.full_like(x0, N)
    if where == "half":
        x = torch.where(torch.arange(R) % 2 > 0, torch.randint(N, (R,), generator=g), x0)
    y, exact = torch.arange(graph.num_states), sigma.double()
    p = -torch.expm1(-exact) * graph.pi(y, torch.float64) + torch.exp(-exact) * (y == x0[:, None])
    if where == "mask":  # the true scores given more than x0: a distribution over the tokens
        p[:, :N] = torch.softmax(9 * torch.rand(R, N, generator=g, dtype=torch.float64), -1) * torch.exp(-exact)
    truth = (p / p.gather(-1, x[:, None])).log()
    errors, means = [], []
    for off in 0.0, 0.1:
        log_score = (truth + off * torch.randn(truth.shape, generator=g) * (y != x[:, None])).float()
        expected = graph.score_entropy(log_score.double(), exact, x, x0)
        errors.append((graph.score_entropy(log_score, sigma, x, x0) - expected).abs().max())
        means.append(expected.mean())
    tolerance = 2e-4 if where == "half" and sigma < 2 else 2e-6
    assert max(errors) <= tolerance * means[1]


# ----------------------------------------------------------------------------------------- the transformer


def random_model(name, vocab_size=11, seed=0, kind=SEDD):
    """A small model all of whose parameters are random: at initialisation many of them are zero."""
    torch.manual_seed(seed)
    model = kind(SEDDConfig(vocab_size, 16, 2, 4, 32, 16, dropout=0.0, graph=name))
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model


def both_paths(model, x0, sigma, x, dtype=torch.float32):
    """The score entropy and its gradients by model(x, sigma, x0) and by the full log score."""
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    results = []
    for plain in (False, True):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = model.graph.score_entropy(model(x, sigma), sigma[:, None], x, x0) if plain else model(x, sigma, x0)
        results.append((value, torch.autograd.grad((weight * value).sum(), list(model.parameters()))))
    return results


def allow(monkeypatch, scores):
    """That many scores at a time: rows x states."""
    monkeypatch.setattr(sedd, "rows_at_a_time", lambda x, graph: max(1, scores // graph.num_states))


def blank(*shape):
    """A prompt of which all is to be written."""
    return torch.full(shape, -1)


def close(a, b, tolerance):
    """|a - b| within `tolerance`, relative to the largest entry of b."""
    return (a - b).abs().max() <= tolerance * b.abs().max() + 1e-12


both_kinds = pytest.mark.parametrize("kind", [SEDD, sedd.D3PM])


def states(masks, model, x0, sigma, g):
    """x (B, L) with some, no or all tokens in the state that has a loss under either graph."""
    if masks == "some":
        return model.graph.sample_transition(x0, sigma[:, None], g)
    return x0 if masks == "none" else torch.full_like(x0, model.graph.num_states - 1)


def assert_paths_agree(model, x0, sigma, x, dtype):
    """The training path's value and each gradient are the plain path's, to 1e-5 in float32 and 2e-2 in bfloat16."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    (fast, fast_grads), (plain, plain_grads) = both_paths(model, x0, sigma, x, dtype)
    assert fast.shape == x.shape and fast.dtype == torch.float32
    assert close(fast, plain, tolerance)
    assert not model.graph.can_change(x).any() or plain.abs().max() > 0.01
    for (parameter, _), a, b in zip(model.named_parameters(), fast_grads, plain_grads):
        assert close(a, b, tolerance), parameter


@both_names
@both_kinds
@pytest.mark.parametrize("masks", ["some", "none", "all"])
@pytest.mark.parametrize("scores", [2**24, 7 * 200, 400, 1])  # one block; blocks that do not divide; the smallest
def test_training_path_equals_the_plain_path(name, kind, masks, scores, monkeypatch):
    allow(monkeypatch, scores)
    model = random_model(name, kind=kind)
    g = torch.Generator().manual_seed(2)
    x0, sigma = torch.randint(11, (4, 16), generator=g), torch.tensor([0.1, 0.5, 1.0, 3.0])
    assert_paths_agree(model, x0, sigma, states(masks, model, x0, sigma, g), torch.float32)


@both_names
@both_kinds
@pytest.mark.parametrize("masks", ["some", "none", "all"])
def test_training_path_equals_the_plain_path_in_bfloat16(name, kind, masks, monkeypatch):
    model = random_model(name, kind=kind)
    g = torch.Generator().manual_seed(2)
    x0, sigma = torch.randint(11, (8, 16), generator=g), torch.linspace(0.1, 3, 8)
    x = states(masks, model, x0, sigma, g)
    for scores in 2**25, 7 * 200, 1:
        allow(monkeypatch, scores)
        assert_paths_agree(model, x0, sigma, x, torch.bfloat16)


@pytest.mark.parametrize("name, kind, dtype", [
    ("absorb", SEDD, torch.float32), ("uniform", SEDD, torch.bfloat16),
    ("absorb", sedd.D3PM, torch.bfloat16), ("uniform", sedd.D3PM, torch.float32),
])  # fmt: skip
def test_compiled_training_path_equals_the_plain_path(name, kind, dtype, monkeypatch):
    """Each two of graph, model and dtype meet in one of the four. The blocks below the head would take longest to compile,
    and are left out. Too many recompilations are an error: what goes on uncompiled would only be compared with itself.
    """
    allow(monkeypatch, 200)
    torch._dynamo.reset()
    model = random_model(name, kind=kind)
    model.blocks = model.blocks[:0]
    model.compile()
    g = torch.Generator().manual_seed(2)
    x0, sigma = torch.randint(11, (4, 16), generator=g), torch.tensor([0.1, 0.5, 1.0, 3.0])
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for masks in "some", "none", "all":
            assert_paths_agree(model, x0, sigma, states(masks, model, x0, sigma, g), dtype)
    torch._dynamo.reset()


class Launches(TorchDispatchMode):
    """Counts operations, and notes the sizes of the matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.count, self.sizes = 0, set()

    @classmethod
    def ignore_compile_internals(cls):
        return True  # or what torch.compile made would run eagerly in this mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.sizes.update(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2)
        return func(*args, **(kwargs or {}))


def print_launches():
    """What the next test looks at, for a process that has compiled nothing before."""
    fraction = 64
    sedd.rows_at_a_time = lambda x, graph: 2**29 // fraction // graph.num_states
    model = SEDD(SEDDConfig(50_257, 1024, 1, 1, 8, 8, dropout=0.0))
    model.blocks = model.blocks[:0]
    model.compile()
    x0 = torch.randint(50_257, (32, 1024 // fraction))
    x = torch.where(torch.arange(1024 // fraction) % 2 > 0, 50_257, x0)
    sigma = torch.full((32,), math.log(2))
    model(x, sigma, x0).sum().backward()
    kernels = torch._inductor.metrics.generated_kernel_count
    with Launches() as seen:
        model(x, sigma, x0).sum().backward()
    print(repr((seen.count, kernels, sorted(size for size in seen.sizes if max(size) > 50_000))))


def test_head_and_loss_are_few_launches(tmp_path):
    """32 x 1024 tokens, half masked, in the blocks of rows that CUDA gets: at most 600 launches, forward and backward.

    An operation is one however large its tensors are, so the rows, and the rows of a block, are cut to a 64th. A launch
    is an operation or a compiled kernel; what the network without blocks does below the head is counted too. There are
    two blocks of rows, and each runs every kernel once.
    """
    path = [str(Path(file).parent) for file in (sedd.__file__, __file__)]
    (tmp_path / "fresh.py").write_text(
        f"import sys\nsys.path += {path}\nimport test_sedd\ntest_sedd.print_launches()\n"
    )
    done = quick.run([sys.executable, tmp_path / "fresh.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    operations, kernels, sizes = eval(done.stdout)
    assert kernels > 0 and operations + 2 * kernels <= 600
    assert (50_264, 8) in sizes and all(width % 8 == 0 for size in sizes for width in size)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@both_names
def test_training_path_holds_no_tensor_of_the_whole_vocabulary(name, monkeypatch):
    """No operation, forward or backward, makes a tensor of as many entries as (B, L, S).

    And together they never hold more than six blocks of scores.
    """
    allow(monkeypatch, scores := 2**21)
    S = 20_000
    model = random_model(name, vocab_size=S)
    x0, sigma = torch.randint(S, (16, 64)), torch.full((16,), 1.0)
    x = model.graph.sample_transition(x0, sigma[:, None])
    with Largest() as seen:
        peak = peak_memory(lambda: model(x, sigma, x0).sum().backward(), torch.device("cpu"))
    assert seen.size <= scores < x0.numel() * S / 4
    assert peak <= 6 * 4 * scores  # of 4 bytes each


@both_names
def test_the_bound_is_the_same_for_any_number_of_sequences_at_a_time(name, monkeypatch):
    """Its last term takes all of them, three, or one of which alone is too large."""
    model, x0, bounds = random_model(name), torch.randint(11, (8, 16)), []
    for scores in 2**25, 3 * 16 * 12, 1:
        allow(monkeypatch, scores)
        torch.manual_seed(0)
        bounds.append(sedd.nll_bound(model, model.graph, GeometricNoise(), x0, num_times=2))
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0])


@pytest.mark.parametrize("graph", [Absorbing(50_257), Uniform(50_257)])
def test_every_device_holds_some_rows_at_a_time(graph):
    assert sedd.rows_at_a_time(torch.empty(3), graph) == sedd.rows_at_a_time(torch.empty(3, device="meta"), graph) == 667
    assert sedd.rows_at_a_time(torch.empty(3), Uniform(2**26)) == 1


@pytest.mark.parametrize("sampler", ["tweedie", "exact"])
def test_samples_are_the_same_for_any_number_of_places_at_a_time(sampler, monkeypatch):
    """The likeliest token of each place, for with top_p = 0 nothing is left to chance."""
    graph, table, texts = Absorbing(11), torch.randn(4, 16, 12), []
    model = lambda x, sigma: table.scatter(-1, x[..., None], 0.0)
    for scores in 2**25, 12 * 2 * 9, 1:
        allow(monkeypatch, scores)
        torch.manual_seed(0)
        texts.append(sample(model, graph, LogLinearNoise(), blank(4, 16), 1, sampler, top_p=0.0))
    assert all(x.equal(table[..., :11].argmax(-1)) for x in texts)


@both_names
@pytest.mark.parametrize("size", [64, 9, 1])  # all rows at once; blocks that do not divide; row by row
def test_scores_of_some_rows_are_rows_of_the_scores(name, size):
    model = random_model(name)
    x, sigma = torch.randint(11, (4, 16)), torch.rand(4)
    rows = (torch.rand(4, 16) < 0.3).flatten().nonzero()[:, 0]
    scores_of = model.scores_at(x, sigma)
    scores = torch.cat([scores_of(part) for part in rows.split(size)])
    torch.testing.assert_close(scores, model(x, sigma).flatten(0, 1)[rows])


@both_names
def test_attention_runs_in_the_compute_dtype(name, monkeypatch):
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *qkv, **how: (seen.extend(t.dtype for t in qkv), attention(*qkv, **how))[1],
    )
    with torch.autocast("cpu", torch.bfloat16):
        log_score = random_model(name)(torch.randint(11, (2, 16)), torch.rand(2))
    assert set(seen) == {torch.bfloat16} and log_score.dtype == torch.float32


# ------------------------------------------------------------------------- the authors' code, on their format

DATA = Path(__file__).parent / "data"


@both_names
def test_log_score_is_the_published_codes(name):
    load_file = pytest.importorskip("safetensors.torch").load_file
    weights = load_file(DATA / name / "model.safetensors")
    io = torch.load(DATA / name / "io.pt", weights_only=True)
    model = random_model(name).eval()
    torch.testing.assert_close(weights["rotary_emb.inv_freq"], model.rotary_emb.inv_freq)
    model.load_state_dict(weights)
    assert (model(io["x"], io["sigma"]) - io["log_score"]).abs().max() < 2e-4


@both_names
@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
def test_loss_rates_and_tweedie_are_the_published_codes(name, schedule):
    """To 1e-4 relative: the published numbers were computed in float32."""
    case = torch.load(DATA / "graph.pt", weights_only=True)[f"{name}.{schedule}"]
    graph, score = sedd.GRAPHS[name](11), case["log_score"].exp()
    sigma, dsigma = sedd.NOISES[schedule]()(case["t"])
    assert close(sigma, case["sigma"], 1e-4) and close(dsigma, case["dsigma"], 1e-4)
    assert close(
        graph.score_entropy(case["log_score"], sigma[:, None], case["x"], case["x0"]), case["score_entropy"], 1e-4
    )
    oracle = lambda x, sigma, x0: graph.score_entropy(case["log_score"], sigma[:, None], x, x0)
    loss = diffusion_loss(oracle, graph, sedd.NOISES[schedule](), case["x0"], case["t"], case["x"])
    assert close(loss, case["loss"], 1e-4)
    assert close(graph.reverse_rate(score, case["x"]), case["reverse_rate"], 1e-4)
    tweedie = case["tweedie_unnormalised"].clamp(min=0)
    tweedie = tweedie / tweedie.sum(-1, keepdim=True)
    assert close(graph.tweedie_probs(score, case["tweedie_dsigma"][:, None], case["x"]), tweedie, 1e-4)


# ------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("name, sampler, how", [
    *itertools.product(["absorb", "uniform"], ["euler", "tweedie"], [{}, {"eta": 0.3}, {"top_p": 0.5}]),
    ("absorb", "exact", {}), ("absorb", "exact", {"top_p": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_samples_are_clean_and_keep_the_prompt(name, sampler, how, steps):
    model = random_model(name).eval()
    prompt = torch.full((32, 16), -1)
    prompt[:, [0, 3, 15]] = torch.randint(11, (32, 3))
    seen = []
    x = sample(model, model.graph, model.noise, prompt, steps, sampler,
               callback=lambda step, x: seen.append((step, x.clone())), **how)  # fmt: skip
    assert x.shape == prompt.shape and x.min() >= 0 and x.max() < 11
    assert [step for step, _ in seen] == list(range((13 if sampler == "exact" else steps) + 1))
    for _, state in seen:
        assert (state == prompt)[prompt >= 0].all()


@pytest.mark.parametrize("sampler", ["euler", "tweedie"])
def test_scores_that_promise_too_little_still_leave_no_mask(sampler):
    """Scores e^-3 times too small: by them MASK would stay MASK, but the last step has no MASK to give."""
    model = random_model("absorb").eval()
    timid = lambda x, sigma: model(x, sigma) - 3 * (torch.arange(12) != x[..., None])
    assert sample(timid, model.graph, model.noise, blank(64, 16), 4, sampler).max() < 11


@both_names
def test_a_model_with_just_the_two_call_forms_samples_the_same(name):
    model = random_model(name).eval()
    draws = []
    for callable_model in (model, lambda x, sigma: model(x, sigma)):
        torch.manual_seed(3)
        draws.append(sample(callable_model, model.graph, model.noise, blank(4, 16), 5))
    assert draws[0].equal(draws[1])


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(sampler="best"), dict(prompt=torch.full((9,), 1)),
                                   dict(prompt=torch.full((2, 16), 11)), dict(eta=0.1, sampler="exact")])  # fmt: skip
def test_sample_refuses_what_it_cannot_do(wrong):
    model = random_model("absorb")
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample(model, model.graph, model.noise, **{"prompt": blank(2, 16), "steps": 2, **wrong})


@both_names
def test_a_tiny_model_memorises_a_sentence_and_both_samplers_write_it(name):
    """The sentence runs around a circle, cut anywhere: with relative positions alone, no MASK knows where it is."""
    sentence = "Judge vows."
    chars, n = sorted(set(sentence)), len(sentence)
    circle = torch.tensor([chars.index(c) for c in sentence])
    turns = circle[(torch.arange(n)[:, None] + torch.arange(n)) % n]  # (n, n), every rotation
    torch.manual_seed(0)
    model = SEDD(SEDDConfig(len(chars), n, 2, 2, 64, 32, dropout=0.0, graph=name))
    state, o = train.State(model, train.Options()), train.Options(max_steps=350)
    for step in range(350):
        (diffusion_loss(model, model.graph, model.noise, turns.repeat(6, 1)).mean() / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        state.update(train.learning_rate(o, step), o.ema)
        model.zero_grad()
    model.eval()
    for sampler in ("euler", "tweedie"):
        written = sample(model, model.graph, model.noise, blank(128, n), 64, sampler)
        texts = ["".join(chars[i] for i in row) for row in written.tolist()]
        assert sum(text in 2 * sentence for text in texts) >= 96, texts


@pytest.mark.parametrize("stays", [0.98, 0.3, 0.0])
def test_jumps_are_draws_from_the_plain_posterior(stays):
    """Pearson's chi-square of 200,000 draws in two parts, whether and where to, against the row; false alarm 1e-6."""
    from scipy.stats import chi2

    n, probs = 200_000, torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probs[2] = 0
    probs = probs * (1 - stays) / probs.sum()
    probs[2] = stays

    class Given(Uniform):
        """A chain that starts at token 2, and whose one step has the probabilities above."""

        def sample_prior(self, *shape, device=None, generator=None):
            return torch.full(shape, 2)

        def tweedie_probs(self, score, delta, x):
            return 3.7 * probs.float().repeat(len(x), 1)

    torch.manual_seed(2)
    drawn = sample(lambda x, sigma: torch.zeros(*x.shape, 7), Given(7), LogLinearNoise(), blank(n, 1), 1)[:, 0]
    expected, counts = n * probs, torch.bincount(drawn, minlength=7)
    cells = expected > 0
    assert counts[~cells].sum() == 0
    assert ((counts - expected) ** 2 / expected)[cells].sum() < chi2.isf(1e-6, int(cells.sum()) - 1)


def test_chances_of_1e_9_are_drawn():
    """The seed tells the first uniform number u. A token of the chance 1e-9 that lies around u is drawn, each time.

    And a token stays if its chance to stay is a little more than u, and leaves if it is a little less. Float32 numbers
    are 6e-8 apart.
    """
    n = 1000
    torch.manual_seed(4)
    u = torch.rand(n, dtype=torch.float64)
    probs = torch.stack([u - 5e-10, torch.full_like(u, 1e-9), 1 - u - 5e-10], -1)
    torch.manual_seed(4)
    assert (sedd.sample_categorical(probs) == 1).all()

    above = torch.arange(n) % 2 > 0

    class Given(Uniform):
        """A chain that starts at token 0, and stays there with a chance of 5e-10 more or less than u, or goes to 1."""

        def sample_prior(self, *shape, device=None, generator=None):
            return torch.zeros(shape, dtype=torch.long)

        def tweedie_probs(self, score, delta, x):
            stay = u + torch.where(above, 5e-10, -5e-10)
            return torch.stack([stay, 1 - stay], -1)

    torch.manual_seed(4)
    drawn = sample(lambda x, sigma: torch.zeros(*x.shape, 2), Given(2), LogLinearNoise(), blank(n, 1), 1)[:, 0]
    assert drawn.equal((~above).long())
