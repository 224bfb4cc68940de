"""What the README says of forks, done in a copy of the repository: new graphs and a sampler, which train and write.

The README's own graph is of the kind that sedd.py has, and names its pi; walk.py is of another kind.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import quick

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHAPE = "--n_layer=1", "--n_head=2", "--n_embd=16", "--cond_dim=8", "--block_size=16", "--batch_size=4"


def code_of(name, text=README):
    """The block of Python in the README, or the end of another file, that begins with this class or function."""
    (code,) = re.findall(rf"^((?:class|def) {name}\b.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE)
    return code


def copy_repository(fork):
    for folder in "config", "tests":
        shutil.copytree(ROOT / folder, fork / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in "sedd.py", "train.py", "sample.py", "prepare.py", "pyproject.toml":
        shutil.copy(ROOT / script, fork)
    return fork


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def run(fork, *args):
    done = quick.run([sys.executable, *args], cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(fork, *args):
    run(fork, "prepare.py", "pydocs", "--tokenizer=char")
    run(fork, "train.py", "--out_dir=out/new", *SHAPE, "--max_steps=3", "--eval_sequences=2", "--eval_times=2", *args)


# ------------------------------------------------------------------------------------------------- a graph


@pytest.fixture(scope="module", params=["Zipf", "Walk"])
def graph(request, tmp_path_factory):
    """The copy, and the name of its new graph."""
    fork, name = copy_repository(tmp_path_factory.mktemp("fork")), request.param
    code = code_of(name, README if name == "Zipf" else (ROOT / "tests" / "walk.py").read_text(encoding="utf-8"))
    edit(fork / "sedd.py", 'GRAPHS = {"absorb"', f'{code}\n\nGRAPHS = {{"{name.lower()}": {name}, "absorb"')
    for file in "test_sedd.py", "test_theory.py":
        edit(fork / "tests" / file, "GRAPHS = [", f"GRAPHS = [{name}(V), ")
        edit(fork / "tests" / file, "    SEDD, Absorbing," if "theory" in file else "import SEDD, Absorbing,",
             f"    SEDD, {name}, Absorbing," if "theory" in file else f"import SEDD, {name}, Absorbing,")  # fmt: skip
    return fork, name


def test_it_passes_the_tests_of_a_graph(graph):
    fork, name = graph
    left_out = "euler or wrong_scores or reconstruction or geometric or prior_term"  # these take long
    if name == "Walk":  # it jumps at more than rate 1: long steps magnify the rounding of float32 scores beyond use
        left_out += " or every_step"
    chosen = f"{name} and not ({left_out})"
    files = "tests/test_sedd.py", "tests/test_theory.py"
    out = run(fork, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 18


def test_it_trains_and_writes(graph):
    fork, name = graph
    train(fork, f"--graph={name.lower()}")
    assert len(run(fork, "sample.py", "--init_from=out/new", "--steps=4")) == 16 + 1


def test_the_readmes_graph_is_as_short_as_it_says():
    assert "a graph of your own is six lines" in README and len(code_of("Zipf").splitlines()) == 6


# ------------------------------------------------------------------------------------------------ a sampler


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """The copy, where sample.py knows the README's sampler."""
    fork = copy_repository(tmp_path_factory.mktemp("fork"))
    (states,) = re.findall(r"`(states =\s[^`]*)`", README)
    assert (fork / "sedd.py").read_text(encoding="utf-8").count('"exact"') == 3, "the README speaks of three lines"
    edit(fork / "sedd.py", "@torch.no_grad()\ndef sample(", f"{code_of('confident')}\n\n@torch.no_grad()\ndef sample(")
    edit(fork / "sedd.py", 'sampler not in ("tweedie", "euler", "exact")',
         'sampler not in ("tweedie", "euler", "exact", "confident")')  # fmt: skip
    edit(fork / "sedd.py", 'if sampler == "exact" and', 'if sampler in ("exact", "confident") and')
    edit(fork / "sedd.py", '    if sampler == "exact":\n',
         f'    if sampler == "confident":\n        {" ".join(states.split())}\n'
         '    elif sampler == "exact":\n')  # fmt: skip
    edit(fork / "sample.py", '"euler", "exact"]', '"euler", "exact", "confident"]')
    return fork


@pytest.fixture(scope="module")
def sedd(fork):
    """The copy's sedd.py."""
    spec = importlib.util.spec_from_file_location("sedd_of_a_fork", fork / "sedd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_writes_with_the_new_sampler(fork):
    train(fork)
    text = run(fork, "sample.py", "--init_from=out/new", "--sampler=confident", "--steps=4", "--prompt={3}the{}")
    assert len(text) == 16 + 1 and text[3:6] == "the"
    greedy = [run(fork, "sample.py", "--init_from=out/new", "--sampler=confident", "--top_p=0", f"--seed={seed}")
              for seed in (1, 2)]  # fmt: skip
    assert greedy[0] == greedy[1]  # nothing is left to chance but ties


class Independent:
    """Exact log scores of tokens that are drawn one by one from p (L, V); it remembers what it was asked."""

    def __init__(self, p):
        self.p, self.asked = p, []

    def __call__(self, x, sigma):
        self.asked.append((x.clone(), sigma.clone()))
        log_score = (self.p / torch.expm1(sigma)[:, None, None]).log()
        log_score = torch.cat([log_score, torch.zeros_like(log_score[..., :1])], -1)
        return torch.where((x == self.p.shape[1])[..., None], log_score, -torch.inf).scatter(-1, x[..., None], 0.0)


def states_of(sedd, model, prompt, steps, **how):
    """What `sample` passes through, (steps + 1, B, L)."""
    graph, states = sedd.Absorbing(model.p.shape[1]), []

    def callback(step, x):
        assert step <= steps  # or it would never end
        states.append(x.clone())

    x = sedd.sample(model, graph, sedd.LogLinearNoise(), prompt, steps, "confident", callback, **how)
    assert x.max() < graph.vocab_size and torch.equal(x, states[-1])
    return torch.stack(states)


@pytest.mark.parametrize("steps, calls", [(1, 1), (3, 3), (4, 4), (5, 4), (8, 8), (99, 8)])
def test_the_surest_tokens_come_first_and_as_many_at_each_step(sedd, steps, calls):
    """The place's own likeliest token is drawn with top_p=0: so places come by how likely it is, known beforehand."""
    torch.manual_seed(0)
    sure = torch.linspace(0.3, 0.95, 8)[torch.randperm(8)]
    model = Independent(torch.stack([sure, *[(1 - sure) / 4] * 4], -1))
    states = states_of(sedd, model, torch.full((2, 8), -1), steps, top_p=0.0)
    assert len(states) == calls + 1 <= steps + 1
    came = (states == 5).sum(0)  # in how many states a place is MASK
    keep = -(-8 // steps)
    order = sure.argsort(descending=True)
    assert torch.equal(came[:, order], (1 + torch.arange(8) // keep).expand(2, 8))
    for x, sigma in model.asked:  # which noise the model is told of: that which masks as many
        torch.testing.assert_close(1 - torch.exp(-sigma), (x == 5).float().mean(-1).clamp(max=0.999))


def test_what_is_kept_was_the_likeliest_draw(sedd, monkeypatch):
    draws, draw = [], sedd.sample_categorical
    monkeypatch.setattr(sedd, "sample_categorical", lambda *args: draws.append(draw(*args)) or draws[-1])
    torch.manual_seed(1)
    model = Independent(torch.randn(12, 5).softmax(-1))
    states = states_of(sedd, model, torch.full((3, 12), -1), 4)
    assert len(draws) == len(states) - 1 == 4
    for before, after, drawn in zip(states, states[1:], draws):
        drawn = torch.zeros_like(before).masked_scatter(before == 5, drawn)
        chances = model.p.expand(3, 12, 5).gather(-1, drawn[..., None])[..., 0]
        new = (before == 5) & (after != 5)
        assert (new.sum(-1) == 3).all() and torch.equal(after[new], drawn[new])
        left = after == 5
        assert (chances.where(new, torch.inf).amin(-1) >= chances.where(left, -torch.inf).amax(-1)).all()


def test_prompts_are_kept_whatever_their_gaps(sedd):
    torch.manual_seed(2)
    prompt = torch.tensor([[-1] * 8, [1, 2, 3, 4, 0, 1, 2, -1], [1, 2, 3, 4, 0, 1, 2, 3], [-1, 4] * 4])
    states = states_of(sedd, Independent(torch.randn(8, 5).softmax(-1)), prompt, 4)
    assert len(states) == 5
    assert ((prompt < 0) | (states == prompt)).all()


def test_its_texts_are_likelier_than_the_model_and_less_varied(sedd):
    """Two places, two steps, each token 0 with chance 0.6, 1 with 0.3 and 2 with 0.1.

    The first step keeps 0 but where both draws are others, and the second draws the other place anew: so a token is 0
    with chance (1 - 0.4^2 + 0.6) / 2 = 0.72. Tweedie's steps leave it at 0.6. The tolerance is 6 standard errors.
    """
    torch.manual_seed(3)
    p, n = torch.tensor([0.6, 0.3, 0.1]), 20_000
    model, prompt = Independent(p.expand(2, 3)), torch.full((n, 2), -1)
    texts = states_of(sedd, model, prompt, 2)[-1]
    plain = sedd.sample(model, sedd.Absorbing(3), sedd.LogLinearNoise(), prompt, 2)
    for x, chance in (texts, 0.72), (plain, 0.6):
        assert abs((x == 0).double().mean().item() - chance) < 6 * (chance * (1 - chance) / (2 * n)) ** 0.5


@pytest.mark.parametrize("wrong", [dict(eta=0.1), dict(graph="uniform")])
def test_it_is_refused_where_exact_is(sedd, wrong):
    graph = sedd.GRAPHS[wrong.pop("graph", "absorb")](5)
    with pytest.raises(ValueError, match="MASK"):
        sedd.sample(Independent(torch.ones(8, 5)), graph, sedd.LogLinearNoise(), torch.full((1, 8), -1), 4,
                    "confident", **wrong)  # fmt: skip


def test_the_readmes_sampler_is_about_ten_lines():
    assert len(code_of("confident").splitlines()) <= 12
