"""What costs a GPU its time, and can be seen without one: waiting for the host, and compiling again and again."""

import copy
import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sedd
import train
from test_scripts import ROOT, TINY, call, works

VOCAB, B, L = 63, 8, 32  # with MASK there are 64 states: a multiple of 8, as the numbers of rows are


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the default data set."""
    home = tmp_path_factory.mktemp("home")
    works(call("prepare.py", cwd=home))
    return home


def random_model(graph="absorb", parameterization="score"):
    """Two blocks of random weights: fresh ones are zero where it matters."""
    torch.manual_seed(0)
    config = sedd.SEDDConfig(VOCAB, L, 2, 2, 32, 16, 0.0, graph, parameterization=parameterization)
    model = sedd.MODELS[parameterization](config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model


def noisy(graph, rows):
    """x0 and x (B, L); under the absorbing graph just so many positions of x are masked."""
    x0 = torch.randint(VOCAB, (B, L))
    x = torch.randint(VOCAB, (B, L))
    if graph.mask_id is not None:
        x = x0.clone()
        x.view(-1)[torch.randperm(B * L)[:rows]] = graph.mask_id
    return x0, x


# ---------------------------------------------------------------------------------------------------- waiting

TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Waiting(TorchDispatchMode):
    """Collects the operations whose result, or its shape, the host has to wait for, in forward and backward passes.

    Indexing by integers makes no one wait, and is left out in spite of its tag.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.off = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            waits = bool(TAGS & {*function.tags})
        if waits and not self.off:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class Fetching(TorchFunctionMode):
    """Adds to `seen` what copies a whole tensor to the host: on the CPU that is no operation of its own."""

    def __init__(self, waiting):
        super().__init__()
        self.waiting = waiting

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "__array__") and not self.waiting.off:
            self.waiting.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, act",
    [
        ("nonzero", lambda x: x.nonzero()),
        ("nonzero", lambda x: torch.where(x > 1)),
        ("masked_select", lambda x: x.masked_select(x > 1)),
        ("index", lambda x: x[x > 1]),
        ("index_put", lambda x: torch.where(x > 1, x, 0).index_put((x > 1,), x[0])),
        ("_local_scalar_dense", lambda x: x.max().item()),
        ("_local_scalar_dense", lambda x: 1 if x[0] > 0 else 0),
        ("_unique2", lambda x: x.unique()),
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        (None, lambda x: x[torch.tensor([0, 2])] + x.gather(0, torch.tensor([0, 1])) + x.sum()),
    ],
)
def test_the_count_sees_what_waits(name, act):
    with Waiting() as waiting, Fetching(waiting):
        act(torch.arange(3.0))
    assert waiting.seen == ([name] if name else [])


def test_the_count_sees_the_backward_pass():
    x = torch.arange(3.0, requires_grad=True)
    with Waiting() as waiting:
        (x[x > 1].sum() + x[torch.tensor([0, 2])].sum()).backward()
    assert waiting.seen == ["index", "index_put_"] or waiting.seen == ["index", "_index_put_impl_"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", ["", "--graph=uniform", "--parameterization=mean", "--parameterization=causal",
                                     "--optimizer=adamw --dtype=float16", "--dtype=bfloat16"])  # fmt: skip
def test_a_training_step_waits_once_and_once_a_micro_batch(options, count, home, monkeypatch):
    """The batch is made on the host, and waits for nobody. It is asked for in the middle of each step."""
    waiting, steps = Waiting(), []
    make = train.micro_batches

    def micro_batches(*args):
        steps.append(waiting.seen)
        waiting.seen, waiting.off = [], True
        try:
            return make(*args)
        finally:
            waiting.off = False

    monkeypatch.setattr(train, "micro_batches", micro_batches)
    monkeypatch.chdir(home)
    args = [*TINY, f"--micro_batch_size={4 // count}", "--max_steps=6", "--log_interval=99", "--eval_interval=99"]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--out_dir=waits", *options.split()])
    with waiting, Fetching(waiting):
        train.main()
    assert len(steps) == 7  # before the first step, and in each of the 6
    for seen in steps[2:]:
        assert sorted(seen) == ["nonzero"] * (0 if "causal" in options else count) + ["tolist"]


@pytest.mark.parametrize("rows", [10**6, 50])  # at a time: all, or a fifth
@pytest.mark.parametrize("sampler", ["tweedie", "euler"])
@pytest.mark.parametrize("name", ["score", "mean"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_a_sampling_step_waits_twice(graph, name, sampler, rows, monkeypatch):
    """For the positions that can change, and for those that do."""
    monkeypatch.setitem(sedd.SCORES_AT_A_TIME, "cpu", rows * 64)
    model, waiting, steps = random_model(graph, name).eval(), Waiting(), []

    def callback(step, x):
        steps.append(waiting.seen)
        waiting.seen = []

    with waiting, Fetching(waiting):
        model.generate(torch.full((B, L), -1), 5, sampler, callback)
    assert steps[1:] == [["nonzero"] * 2] * 5
