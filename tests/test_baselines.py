"""The baselines: D3PM's scores against enumeration, its absorbing loss against MDLM's, GPT against its definition."""

import itertools
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sedd
from sedd import D3PM, GPT, MODELS, SEDD, SEDDConfig, diffusion_loss, nll_bound, sample
from test_sedd import Largest, allow
from test_theory import PAIR, ROW, Oracle, all_graphs, sequences
from walk import Walk

both_names = pytest.mark.parametrize("name", ["absorb", "uniform"])


def random_model(parameterization, name="absorb", vocab_size=7, seed=0):
    torch.manual_seed(seed)
    model = MODELS[parameterization](SEDDConfig(vocab_size, 12, 2, 2, 32, 16, dropout=0.0, graph=name,
                                                parameterization=parameterization))  # fmt: skip
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model


def exact_means(oracle, sigma):
    """p(x0_i = y | x) by Bayes' rule for every sequence x, (S^L, L, S)."""
    T, x, x0 = oracle.transition(sigma)[0], sequences(oracle.graph.num_states, oracle.L), sequences(3, oracle.L)
    joint = T[x[:, None], x0].prod(-1) * oracle.p0[tuple(x0.T)]  # (S^L, 3^L)
    means = torch.einsum("xc,cly->xly", joint, F.one_hot(x0, oracle.graph.num_states).double())
    return means / joint.sum(-1)[:, None, None]


@all_graphs
@pytest.mark.parametrize("sigma", [0.01, 0.6, 4.0])
@pytest.mark.parametrize("p0", [PAIR, ROW], ids=["pair", "row"])
def test_exact_means_give_exact_scores(graph, sigma, p0):
    oracle, sigma = Oracle(graph, p0), torch.tensor([sigma], dtype=torch.float64)
    x = sequences(graph.num_states, oracle.L)
    reached = oracle.marginal(sigma)[0] > 0
    x, logits = x[reached], exact_means(oracle, sigma)[reached].log().clamp(min=-1e3)
    name = "absorb" if graph.mask_id is not None else "uniform"
    model = D3PM(SEDDConfig(3, 2, 1, 1, 8, 4, graph=name))
    score = model.log_score(logits, sigma, x).exp()
    truth = oracle(x, sigma.expand(len(x))).exp()
    used = graph.can_change(x)
    assert used.sum() >= len(x) / 2
    torch.testing.assert_close(score[used], truth[used], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.99])
def test_absorbing_means_pay_the_weighted_cross_entropy(t):
    """MDLM's loss: the cross-entropy of the masked tokens over t (under log-linear noise with eps = 0)."""
    model = random_model("mean")
    model.noise.eps = 0.0
    x0, t = torch.randint(7, (16, 12)), torch.full((16,), t)
    x = model.graph.sample_transition(x0, model.noise(t)[0][:, None])
    logits = model.output_layer.linear(model.trunk(x, model.noise(t)[0]))[..., :7]
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    expected = ((x == 7) * cross_entropy).sum(-1) / t
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(
        diffusion_loss(model, model.graph, model.noise, x0, t, x), expected, rtol=1e-5, atol=1e-6
    )


@both_names
def test_training_path_of_the_means_is_the_plain_path(name):
    model, x0, sigma = random_model("mean", name), torch.randint(7, (8, 12)), torch.linspace(0.05, 4, 8)
    x = model.graph.sample_transition(x0, sigma[:, None])
    torch.testing.assert_close(model(x, sigma, x0), model.graph.score_entropy(model(x, sigma), sigma[:, None], x, x0))


def test_bound_of_even_means():
    """At the start every mean is even: under the absorbing graph the bound is log V, and eps log V of the prior."""
    model = D3PM(SEDDConfig(7, 12, 2, 2, 32, 16)).eval()
    bound = nll_bound(model, model.graph, model.noise, torch.randint(7, (64, 12)), num_times=256) / 12
    assert bound.mean().item() == pytest.approx(1.001 * math.log(7), abs=5 * bound.std().item() / 8)
    assert bound.std() < 0.1


@both_names
@pytest.mark.parametrize("sampler", ["euler", "tweedie"])
def test_means_sample(name, sampler):
    model = random_model("mean", name).eval()
    assert sample(model, model.graph, model.noise, torch.full((8, 12), -1), 6, sampler).max() < 7


def test_all_four_have_the_same_parameters():
    systems = ("score", "absorb"), ("score", "uniform"), ("mean", "absorb"), ("causal", "absorb")
    counts = [sum(p.numel() for p in random_model(*system, 65).parameters()) for system in systems]
    assert max(counts) < 1.02 * min(counts)


@pytest.mark.parametrize("kind, graph, noise", [("causal", "uniform", "loglinear"), ("causal", "walk", "loglinear"),
                                                ("mean", "walk", "loglinear"), ("mean", "uniform", "geometric")])  # fmt: skip
def test_a_graph_that_a_baseline_cannot_learn_is_refused(kind, graph, noise, monkeypatch):
    """In one line. (Means under uniform and geometric noise: a step from sigma = 15 was off by a total variation of 0.4.)"""
    monkeypatch.setitem(sedd.GRAPHS, "walk", Walk)
    with pytest.raises(ValueError, match=f"graph='{graph}'") as error:
        MODELS[kind](SEDDConfig(7, 12, 2, 2, 32, 16, 0.0, graph, noise, kind))
    assert len(str(error.value).splitlines()) == 1


def test_means_know_geometric_noise_under_masks():
    assert D3PM(SEDDConfig(7, 12, 2, 2, 32, 16, 0.0, "absorb", "geometric", "mean"))


@pytest.mark.parametrize("scores", [2**25, 200, 1])  # one block, five, twelve
def test_gpt_pays_the_cross_entropy_of_all_its_logits(scores, monkeypatch):
    """Its value and its gradients, to 1e-5: two blocks keep their logits, others compute them again."""
    allow(monkeypatch, scores)
    model, x0 = random_model("causal"), torch.randint(7, (8, 12))
    logits = model.output_layer.linear(model.trunk(F.pad(x0[:, :-1], (1, 0), value=7), torch.zeros(8)))[..., :7]
    expected = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    torch.testing.assert_close(model(x0), expected, rtol=1e-5, atol=1e-6)
    weight, parameters = torch.rand(8, 12), [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad((weight * nll).sum(), parameters) for nll in (model(x0), expected))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_gpt_holds_no_tensor_of_the_whole_vocabulary(monkeypatch):
    """Neither in training nor when it writes, where it needs the logits of the last position alone."""
    allow(monkeypatch, scores := 2**20)
    model, x0 = random_model("causal", vocab_size=20_000), torch.randint(20_000, (16, 64))
    with Largest() as seen:
        model(x0).sum().backward()
    assert seen.size <= scores < x0.numel() * 20_000 / 4
    prompt = x0.clone()
    prompt[:, -1] = -1
    with Largest() as seen:
        model.generate(prompt)
    assert seen.size <= 20_001 * 32  # of the weight of the head, and 16 x 20,000 logits


def test_gpt_is_a_distribution_over_sequences():
    """The chances of all 3^4 texts of four tokens sum to 1."""
    model = random_model("causal", vocab_size=3)
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    assert torch.exp(-model(texts).sum(-1)).sum().item() == pytest.approx(1, abs=1e-5)


def test_gpt_samples_what_it_predicts():
    """Frequencies of 20,000 texts of two tokens against their chances; five standard errors."""
    model = random_model("causal", vocab_size=3)
    texts, n = torch.tensor(list(itertools.product(range(3), repeat=2))), 20_000
    chance = torch.exp(-model(texts).sum(-1))
    assert chance.max() > 2 * chance.min()
    drawn = model.generate(torch.full((n, 2), -1))
    frequency = torch.bincount(drawn @ torch.tensor([3, 1]), minlength=9) / n
    assert ((frequency - chance).abs() < 5 * (chance * (1 - chance) / n).sqrt()).all()


def test_gpt_keeps_the_prefix():
    prompt = torch.full((5, 12), -1)
    prompt[:, :4] = torch.randint(7, (4,))
    x = random_model("causal").generate(prompt)
    assert (x[:, :4] == prompt[:, :4]).all() and x.min() >= 0 and x.max() < 7


def test_gpt_keeps_prefixes_of_any_length():
    prompt = torch.full((5, 12), -1)
    for i, row in enumerate(prompt):
        row[: 2 * i] = torch.randint(7, (2 * i,))
    x = random_model("causal").generate(prompt)
    assert (x == prompt)[prompt >= 0].all() and x.min() >= 0 and x.max() < 7


def test_sedd_is_not_causal():
    for kind, knows in ("score", True), ("causal", False):
        model, x = random_model(kind), torch.randint(7, (1, 12))
        features = (
            model.trunk(x, torch.ones(1)),
            model.trunk(torch.cat([x[:, :-1], (x[:, -1:] + 1) % 7], 1), torch.ones(1)),
        )
        assert (features[0][0, 0] - features[1][0, 0]).abs().max().gt(0).item() is knows
    assert isinstance(random_model("score"), SEDD) and isinstance(random_model("causal"), GPT)


def test_the_method_does_not_need_the_baselines():
    """sedd.py without its last section loses, bounds and samples as it does with it."""
    before, _ = Path(sedd.__file__).read_text(encoding="utf-8").split(f"# {'-' * 102}\n# 7. Baselines")
    alone = types.ModuleType("alone")
    exec(before, alone.__dict__)
    assert not hasattr(alone, "GPT") and not hasattr(alone, "MODELS")
    results = []
    for module in alone, sedd:
        torch.manual_seed(0)
        model = module.SEDD(module.SEDDConfig(7, 12, 2, 2, 32, 16)).eval()
        x0 = torch.randint(7, (4, 12))
        loss = module.diffusion_loss(model, model.graph, model.noise, x0)
        bound = module.nll_bound(model, model.graph, model.noise, x0, num_times=4)
        blank = torch.full((4, 12), -1)
        results.append((loss, bound, module.sample(model, model.graph, model.noise, blank, 8)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
