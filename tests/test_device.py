"""What costs a GPU its time, and can be seen without one: waiting for the host, and compiling again and again."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import quick
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
    assert waiting.seen == ["index", "index_put"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", ["", "--graph=uniform", "--parameterization=mean", "--parameterization=causal",
                                     "--optimizer=adamw --dtype=float16", "--dtype=bfloat16"])  # fmt: skip
def test_a_training_step_waits_once_and_once_a_micro_batch(options, count, home, monkeypatch):
    """The batch is made on the host, and waits for nobody. It is asked for in the middle of each step."""
    waiting, steps = Waiting(), []
    make = train.Data.batch

    def batch(*args):
        steps.append(waiting.seen)
        waiting.seen, waiting.off = [], True
        try:
            return make(*args)
        finally:
            waiting.off = False

    monkeypatch.setattr(train.Data, "batch", batch)
    monkeypatch.chdir(home)
    args = [*TINY, f"--micro_batch_size={4 // count}", "--max_steps=6", "--log_interval=99", "--eval_interval=99"]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--out_dir=waits", *options.split()])
    with waiting, Fetching(waiting):
        train.main()
    assert len(steps) == 7  # before the first step, and in each of the 6
    for seen in steps[2:]:
        assert sorted(seen) == ["nonzero"] * (0 if "causal" in options else count) + ["tolist"]


@pytest.mark.parametrize("size", [10**6, 50])  # places at a time: all, or a fifth
@pytest.mark.parametrize("sampler", ["tweedie", "euler"])
@pytest.mark.parametrize("name", ["score", "mean"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_a_sampling_step_waits_once_and_once_a_block(graph, name, sampler, size, monkeypatch):
    """For the places that can change, and in each block of them for those that do: twice, where there is one block."""
    monkeypatch.setattr(sedd, "rows_at_a_time", lambda x, graph: 2 * size)
    model, waiting, steps, blocks = random_model(graph, name).eval(), Waiting(), [], []

    def callback(step, x):
        steps.append(waiting.seen)
        waiting.off = True
        blocks.append(math.ceil(model.graph.can_change(x).sum().item() / size))
        waiting.seen, waiting.off = [], False

    with waiting, Fetching(waiting):
        model.generate(torch.full((B, L), -1), 5, sampler, callback)
    schedule, steps[1] = steps[1][:2], steps[1][2:]
    assert schedule == ["tolist"] * 2  # sigma and its rate, which are on the host, once
    assert blocks[0] == (1 if size == 10**6 else 6)
    assert steps[1:] == [["nonzero"] * (1 + count) for count in blocks[:5]]


# ------------------------------------------------------------------------------------------------ compiling again

# Numbers of masked positions: none, one, those that the padding makes as many as there are states (64, MASK being one)
# or as wide as the model (32), and all. The block of rows is larger than any of them, or so small that some have many.
ROWS = [60, 90, 0, 1, 63, 64, 65, 25, 31, 32, 33, 7, 8, 9, 256, 255, 120, 2, 90, 200]


@pytest.mark.parametrize("first, size, parallel", [(60, 1000, False), (25, 40, True)])
def test_no_number_of_rows_compiles_anew(first, size, parallel, tmp_path, monkeypatch):
    """Two steps compile all there is, even if the first number of rows is also that of the states, or the width.

    The second batch is short, like a last one, and so are some later ones; DDP has a process group of one.
    """
    if not train.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    monkeypatch.setattr(sedd, "rows_at_a_time", lambda x, graph: size)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = model = random_model()
    model.compile()
    if parallel:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    counters = torch._dynamo.utils.counters
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, optimize_ddp=False):
            for step, rows in enumerate([first, first, *ROWS]):
                batch = B - 3 if step % 4 == 1 else B
                x0 = torch.randint(VOCAB, (batch, L))
                x = x0.clone()
                x.view(-1)[torch.randperm(batch * L)[:rows]] = model.graph.mask_id
                with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=step > 1):
                    model.loss(x0, torch.rand(batch), x, network).mean().backward()
                if step == 1:
                    graphs = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
    finally:
        if parallel:
            time.sleep(0.2)  # as in train.main
            dist.destroy_process_group()
        torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- gpu.py


def gpu_py(*args):
    command = [sys.executable, str(ROOT / "tests/gpu.py"), *args]
    return quick.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = gpu_py()
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no GPU here" in done.stderr


def test_what_a_cpu_can_do_of_the_first_ten_minutes():
    """Not `recompilations`, which has a test of its own above."""
    checks = ["nccl", "shared_card", "loss", "attention", "profile", "mfu", "sampling", "by_process", "together", "failing", "restart"]
    done = gpu_py("--device=cpu", "--tiny", "--batch=2", "--only", *checks)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[1:]] == checks
    found = {row[0].strip("| "): row[1] for row in rows}
    assert found["attention"] == "math" and found["failing"].startswith("all ended after")
    assert len(found["by_process"].split("; ")) == 2  # processes
    assert int(found["restart"].split()[-1]) >= 3
