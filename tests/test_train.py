"""train.py when things go wrong, and what it says of a model: known answers, signals, kills, full disks, NaN."""

import contextlib
import copy
import errno
import fcntl
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

import kill
import quick
import sedd
import train
from test_scripts import (
    ROOT, SIZES, TINY, TORCHRUN, L, assert_same, call, complains, environment, files, read_log, run, together, works,
)  # fmt: skip

EXAMPLES = int(os.environ.get("FUZZ", 30))
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize="FUZZ" not in os.environ,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the default data set, a short training in out/, and a little data in GPT-2's tokens."""
    home = tmp_path_factory.mktemp("home")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    works(call("prepare.py", cwd=home))
    works(call("train.py", *TINY, "--max_steps=20", "--log_interval=5", "--eval_interval=10", cwd=home))
    (home / "data/bpe").mkdir()
    sizes = {"train": 400, "val": 100, "test": 333}
    for split, n in sizes.items():
        np.random.default_rng(n).integers(50257, size=n).astype("<u2").tofile(home / f"data/bpe/{split}.bin")
    meta = {"tokenizer": "gpt2", "source": "dice", "vocab_size": 50257, "dtype": "<u2", "sizes": sizes}
    (home / "data/bpe/meta.json").write_text(json.dumps(meta | {"bytes": {name: 4 * n for name, n in sizes.items()}}))
    yield home
    torch.set_num_threads(threads)


def launch(home, *args, launcher=(), script=ROOT / "train.py", **more):
    return quick.Popen([sys.executable, "-u", *launcher, str(script), *args], cwd=home, env=environment(),
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                       errors="replace", **more)  # fmt: skip


def wait_for(condition, process, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(str(process.communicate()))
        time.sleep(0.01)


def read_stream(stream, word):
    """Read until a line has the word: that line."""
    for line in stream:
        if word in line:
            return line
    pytest.fail(f"{word!r} never came")


def printed_bound(done):
    bound, error = re.search(r": \w+ (?:bound|nll) (\S+) ± (\S+) nats", works(done).stdout).groups()
    return float(bound), float(error)


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def put_checkpoint(home, out, change):
    """A copy of the checkpoint in home/out, changed, in home/`out`."""
    changed = checkpoint(home / "out")
    change(changed)
    (home / out).mkdir(exist_ok=True)
    torch.save(changed, home / out / "ckpt.pt")


# ----------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("options", ["", "--graph=uniform", "--parameterization=mean", "--parameterization=causal"])
def test_a_fresh_model_knows_nothing(home, options):
    """All its scores are equal: it needs log(vocab) nats for a token."""
    args = [*TINY, *options.split(), "--eval_only", "--eval_sequences=64", "--eval_times=16"]
    done = call("train.py", *args, cwd=home)
    assert ("perplexity ≤ " in done.stdout) == ("bound" in done.stdout) == ("causal" not in options)
    bound, error = printed_bound(done)
    vocab_size = json.loads((home / "data/pydocs/meta.json").read_text())["vocab_size"]
    assert bound == pytest.approx(math.log(vocab_size), abs=3 * error + 1e-4)
    assert error < bound / 50


def test_the_printed_error_is_the_spread_over_seeds(home):
    args = [*TINY, "--eval_only", "--eval_sequences=16", "--eval_times=16", "--dtype=float32"]
    found = [printed_bound(call("train.py", *args, f"--seed={seed}", cwd=home)) for seed in range(20)]
    bounds, errors = np.array(found).T
    ratio = 19 * bounds.var(ddof=1) / (errors**2).mean()
    assert chi2.ppf(0.001, 19) < ratio < chi2.ppf(0.999, 19)


def test_two_processes_print_the_bound_of_one(home):
    args = [*TINY, "--init_from=out", "--eval_only", "--eval_sequences=0", "--eval_split=test", "--eval_times=1"]
    one = works(call("train.py", *args, cwd=home))
    two = works(together(2, "train.py", *args, cwd=home))
    assert one.stdout == two.stdout
    assert re.search(r"^out: test bound \d\.\d{4} ", one.stdout, re.MULTILINE)


def test_evaluation_takes_blocks_spread_over_the_split(home, monkeypatch):
    """3 of 10: the first, one in the middle, the last whole one. What fills no block is left out."""
    read, seen = train.Data.read, []
    monkeypatch.setattr(train.Data, "read", lambda self, split, starts: seen.extend(starts // L) or read(self, split, starts))
    args = [*TINY, "--dataset=bpe", "--eval_only", "--eval_split=test"]
    monkeypatch.chdir(home)
    for count, blocks in (3, [0, 4, 9]), (0, list(range(10))):
        monkeypatch.setattr(sys, "argv", ["train.py", *args, f"--eval_sequences={count}"])
        with contextlib.suppress(SystemExit):
            train.main()
        assert seen == blocks
        seen.clear()
    assert "over 10 of 10 blocks" in works(call("train.py", *args, "--eval_sequences=0", cwd=home)).stdout


def test_more_processes_than_a_batch_can_evaluate(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(train, "WORLD", 64)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--init_from=out", "--eval_only"])
    train.main()
    assert "nats per token" in capsys.readouterr().out


def test_bits_are_counted_on_the_original_text(home, tmp_path):
    args = [*TINY, "--dataset=bpe", "--eval_only"]
    done = works(call("train.py", *args, cwd=home))
    bound, _ = printed_bound(done)
    assert float(re.search(r"(\S+) bits per byte", done.stdout)[1]) == pytest.approx(bound / math.log(2) / 4, abs=1e-4)
    shutil.copytree(home / "data/bpe", tmp_path / "data/bpe")
    meta = json.loads((home / "data/bpe/meta.json").read_text())
    del meta["bytes"]
    (tmp_path / "data/bpe/meta.json").write_text(json.dumps(meta))
    older = works(call("train.py", *args, cwd=tmp_path))
    assert older.stdout == done.stdout.replace(re.search(r", \S+ bits per byte", done.stdout)[0], "")


# -------------------------------------------------------------------------------------------------- start weights


@pytest.fixture(scope="module")
def published(home):
    torch.manual_seed(0)
    sedd.SEDD(sedd.SEDDConfig(50257, L, 1, 2, 32, 16, 0.0)).save_pretrained(home / "published")
    return home


def test_published_weights_are_evaluated_on_their_vocabulary(published):
    args = ["--init_from=published", "--dataset=bpe", "--eval_only", "--device=cpu"]
    bound, error = printed_bound(call("train.py", *args, cwd=published))
    assert bound == pytest.approx(math.log(50257), abs=4 * error)
    done = call("train.py", "--init_from=published", "--eval_only", cwd=published)
    complains(done, "train.py", "published", "another vocabulary", "data/pydocs")
    done = call("train.py", "--init_from=out", "--dataset=bpe", "--eval_only", cwd=published)
    complains(done, "train.py", "out", "another vocabulary", "data/bpe")


@pytest.mark.parametrize("start", ["out", "out/ckpt.pt"])
def test_fine_tuning_starts_from_the_averaged_weights(start, home):
    before = files(home / "out")
    args = [f"--init_from={start}", "--out_dir=tuned", "--learning_rate=0", "--max_steps=2", "--device=cpu"]
    works(call("train.py", *args, cwd=home))
    a, b = checkpoint(home / "out"), checkpoint(home / "tuned")
    assert_same(a["ema"], b["model"])
    assert_same(a["ema"], b["ema"])
    assert b["config"] == a["config"] and b["step"] == 2
    assert files(home / "out") == before


@pytest.mark.parametrize("line, words", [
    ("--init_from=out --n_layer=2 --out_dir=x", ["out was trained otherwise", "say --n_layer=1"]),
    ("--init_from=out --n_embd=64 --n_layer=2 --graph=uniform --out_dir=x", ["say --n_layer=1 --n_embd=32 --graph=absorb"]),
    ("--init_from=out --graph=uniform --eval_only", ["--graph=absorb"]),
    ("--init_from=out", ["'out'", "out_dir as well"]),
    ("--init_from=out/ckpt.pt", ["'out/ckpt.pt'", "out_dir as well"]),
    ("--init_from=data --eval_only", ["data has no model"]),
    ("--init_from=out/mytext --eval_only", ["'out/mytext'", "no hub id"]),
    ("--init_from=somewhere --eval_only", ["'somewhere'", "no checkpoint"]),
])  # fmt: skip
def test_start_weights_that_do_not_fit(home, line, words):
    before = files(home)
    complains(call("train.py", *line.split(), cwd=home), "train.py", *words)
    assert files(home) == before


@pytest.mark.parametrize("decay, quarter, end", [("linear", 0.75, 0), ("cosine", 0.5 + 0.125**0.5, 0), ("none", 1, 1)])
def test_the_learning_rate_rises_and_falls(decay, quarter, end):
    o = train.Options(learning_rate=2.0, warmup_steps=10, max_steps=110, decay_lr=decay)
    found = [train.learning_rate(o, step) for step in (0, 4, 9, 10, 35, 110, 200)]
    assert found == pytest.approx([0.2, 1, 2, 2, 2 * quarter, 2 * end, 2 * end])


def test_each_optimiser_has_its_parameters(home):
    """Muon orthogonalises: in its first step the singular values, but for the smallest, are those of AdamW's size."""
    model = sedd.SEDD(sedd.SEDDConfig(7, 8, 2, 2, 32, 16))
    names = {id(p): name for name, p in model.named_parameters()}
    state = train.State(model, train.Options(learning_rate=0.01))
    shares = {kind: {names[id(p)] for p in optimizer.param_groups[0]["params"]}
              for kind, optimizer in state.optimizers.items()}  # fmt: skip
    assert shares["muon"] == {f"blocks.{i}.{name}.weight" for i in range(2)
                              for name in ("attn_qkv", "attn_out", "mlp.0", "mlp.2")}  # fmt: skip
    assert shares["adamw"] == {*names.values()} - shares["muon"]
    alone = train.State(model, train.Options(optimizer="adamw")).optimizers
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in alone.values()] == [len(names)]

    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    state.update(lr=0.01, ema=0.999)
    moves = [p.detach() - q.detach() for p, q in zip(model.parameters(), before.parameters())]
    for p, move in zip(model.parameters(), moves):
        if names[id(p)] in shares["muon"]:
            size = 0.01 * 0.2 * max(p.shape) ** 0.5
            singular = torch.linalg.svdvals(move)
            assert 0.6 * size < singular.quantile(0.1) and singular.max() < 1.3 * size
        else:
            torch.testing.assert_close(move, -0.01 * p.grad.sign(), rtol=1e-3, atol=1e-6)


def test_muon_is_that_of_torch():
    """In bfloat16 up to its rounding; in float32 up to what bfloat16 loses, and as exactly as float64."""
    shapes = [(32, 96), (96, 32), (32, 32), (96, 32)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]

    def after_three_steps(optimizer, dtype=None, of=torch.float32):
        matrices = [torch.nn.Parameter(matrix.to(of, copy=True)) for matrix in start]
        optimizer = optimizer(matrices)
        optimizer.dtype = dtype
        for step in gradients:
            for p, gradient in zip(matrices, step):
                p.grad = gradient.to(of)
            optimizer.step()
        return torch.cat([(p - before).detach().float().flatten() for p, before in zip(matrices, start)])

    torchs = after_three_steps(lambda p: torch.optim.Muon(p, 0.1, 0.01, adjust_lr_fn="match_rms_adamw"))
    ours = {dtype: after_three_steps(lambda p: train.Muon(p, 0.1, 0.01), dtype)
            for dtype in (torch.bfloat16, torch.float32)}  # fmt: skip
    exact = after_three_steps(lambda p: train.Muon(p, 0.1, 0.01), torch.float64, torch.float64)
    size = torchs.norm()
    assert (ours[torch.bfloat16] - torchs).norm() < 0.01 * size
    assert (ours[torch.float32] - torchs).norm() < 0.03 * size
    assert (ours[torch.float32] - exact).norm() < 1e-5 * size


def test_a_run_keeps_its_optimiser(home):
    works(call("train.py", *TINY, "--optimizer=adamw", "--max_steps=2", "--out_dir=adamw", cwd=home))
    assert checkpoint(home / "adamw")["optimizer"].keys() == {"adamw"}
    works(call("train.py", "--init_from=resume", "--max_steps=3", "--out_dir=adamw", cwd=home))
    done = call("train.py", "--init_from=resume", "--max_steps=4", "--optimizer=muon", "--out_dir=adamw", cwd=home)
    complains(done, "train.py", "trained otherwise", "--optimizer=adamw")
    assert checkpoint(home / "adamw")["step"] == 3


def test_options_given_at_a_resume_reach_the_optimiser(home):
    shutil.copytree(home / "out", home / "decayed")
    works(call("train.py", "--init_from=resume", "--out_dir=decayed", "--max_steps=21", "--weight_decay=0.5", "--beta2=0.9",
               cwd=home))  # fmt: skip
    optimizers = checkpoint(home / "decayed")["optimizer"]
    assert {name: optimizer["param_groups"][0]["weight_decay"] for name, optimizer in optimizers.items()} == {
        "adamw": 0.5, "muon": 0.5}  # fmt: skip
    assert optimizers["adamw"]["param_groups"][0]["betas"] == (0.9, 0.9)
    assert optimizers["adamw"]["state"][0]["step"] == 21


def test_what_is_not_finite_is_not_saved(home):
    """A stop in such a step names the step that ckpt.pt holds; a last step that is not saved is no success."""
    spoil = lambda saved: saved["model"]["output_layer.linear.bias"].__setitem__(0, 3e38)  # finite, but not its exp
    put_checkpoint(home, "unsaved", spoil)
    before = (home / "unsaved/ckpt.pt").read_bytes()
    done = call("train.py", "--init_from=resume", "--max_steps=24", "--out_dir=unsaved", cwd=home)
    assert done.returncode == 1 and "unsaved/ckpt.pt holds step 20:" in done.stdout
    assert (home / "unsaved/ckpt.pt").read_bytes() == before
    (home / "stopped.py").write_text(WRAPPED % STOP_IN_A_STEP)
    done = run(home / "stopped.py", "--init_from=resume", "--max_steps=24", "--out_dir=unsaved", cwd=home)
    assert done.returncode == 143 and "unsaved/ckpt.pt holds step 20:" in done.stdout
    assert (home / "unsaved/ckpt.pt").read_bytes() == before


STOP_IN_A_STEP = """import signal, torch
clip = torch.nn.utils.clip_grad_norm_
def killed(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return clip(*args)
torch.nn.utils.clip_grad_norm_ = killed"""


def test_the_gradient_is_clipped(home):
    """AdamW's first moment after a step is a tenth of the gradient: its norm is that of --grad_clip, or the gradient's."""
    norms = {}
    for clip in 0.25, 0:
        args = [*TINY, "--optimizer=adamw", "--max_steps=1", f"--grad_clip={clip}", f"--out_dir=clipped{clip}"]
        works(call("train.py", *args, cwd=home))
        moments = checkpoint(home / f"clipped{clip}")["optimizer"]["adamw"]["state"].values()
        norms[clip] = 10 * sum(state["exp_avg"].double().square().sum() for state in moments).sqrt().item()
        (record,) = read_log(home / f"clipped{clip}")
        assert record["norm"] > 0.5
    assert norms[0.25] == pytest.approx(0.25, rel=1e-3) and norms[0] == pytest.approx(record["norm"], rel=1e-3)


def test_a_training_draws_every_window(home, monkeypatch):
    """Of 35 tokens there are four windows of 32, the last one too."""
    (home / "data/few").mkdir()
    np.arange(35).astype("<u2").tofile(home / "data/few/train.bin")
    np.arange(35).astype("<u2").tofile(home / "data/few/val.bin")
    (home / "data/few/meta.json").write_text(json.dumps({"vocab_size": 35, "dtype": "<u2"}))
    o = train.Options(**SIZES | {"batch_size": 100}, data_dir=str(home / "data"), dataset="few")
    data, model = train.Data(o), sedd.SEDD(sedd.SEDDConfig(35, L, 1, 2, 32, 16))
    ((x0, _, _),) = data.batch(o, 0, model)
    assert {*x0[:, 0].tolist()} == {0, 1, 2, 3} and (x0 == x0[:, :1] + torch.arange(L)).all()


# -------------------------------------------------------------------------------------------------------- signals


def test_sigterm_ends_the_step_and_loses_nothing(home):
    args = [*TINY, "--dropout=0.1", "--log_interval=1", "--save_interval=100000", "--decay_lr=none"]
    process = launch(home, *args, "--max_steps=100000", "--out_dir=termed")
    log = home / "termed/log.jsonl"
    wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    step = checkpoint(home / "termed")["step"]
    assert step >= 5 and [record["step"] for record in read_log(home / "termed")] == list(range(1, step + 1))
    assert f"holds step {step}" in out
    advice = re.search(r"python train.py (.*)", out)[1].split()
    works(call("train.py", *advice, f"--max_steps={step + 3}", cwd=home))
    works(call("train.py", *args, f"--max_steps={step + 3}", "--out_dir=unbroken", cwd=home))
    a, b = checkpoint(home / "termed"), checkpoint(home / "unbroken")
    for part in "step", "model", "ema", "optimizer":
        assert_same(a[part], b[part], part)


def test_a_signal_in_the_last_step_stops_nothing(home):
    (home / "late.py").write_text(WRAPPED % STOP_IN_A_STEP)
    done = run(home / "late.py", *TINY, "--max_steps=1", "--out_dir=late", cwd=home)
    assert "late/ckpt.pt holds step 1: python sample.py" in works(done).stdout and "stopping after this step" in done.stderr


def test_second_sigint_ends_at_once(home):
    """The first would wait for an evaluation of hours."""
    process = launch(home, *TINY, "--eval_interval=1", "--eval_times=10000000", "--out_dir=hasty")
    read_stream(process.stdout, "parameters")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    read_stream(process.stderr, "stopping after this step")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_auto_starts_and_goes_on(home):
    args = [*TINY, "--decay_lr=none", "--save_interval=2"]
    works(call("train.py", *args, "--max_steps=6", "--out_dir=straight", cwd=home))
    for max_steps in 4, 6:
        works(call("train.py", *args, f"--max_steps={max_steps}", "--init_from=auto", "--out_dir=auto", cwd=home))
    for part in "model", "ema", "optimizer":
        assert_same(checkpoint(home / "auto")[part], checkpoint(home / "straight")[part])


def test_every_earlier_checkpoint_is_kept(home):
    for steps in 1, 2, 3:
        works(call("train.py", *TINY, f"--max_steps={steps}", "--out_dir=thrice", cwd=home))
    for steps, name in (1, ".old"), (2, ".old2"), (3, ""):
        assert torch.load(home / "thrice" / f"ckpt{name}.pt")["step"] == steps
    lines = [json.loads(line) for line in (home / "thrice/log.jsonl").read_text().splitlines() if line]
    assert [line["options"]["max_steps"] for line in lines if "options" in line] == [1, 2, 3]


def test_a_kill_in_a_long_evaluation_costs_no_steps(home):
    args = [*TINY, "--max_steps=5", "--eval_times=10000000", "--save_interval=99", "--out_dir=evaluated"]
    process = launch(home, *args)
    wait_for((home / "evaluated/ckpt.pt").is_file, process)
    process.kill()
    process.communicate(timeout=60)
    assert checkpoint(home / "evaluated")["step"] == 5


@pytest.mark.parametrize("start", ["--init_from=resume", "--init_from=out"])
def test_training_holds_no_copy_of_its_start(home, monkeypatch, start):
    """Neither the model that was loaded nor the checkpoint, which are gigabytes."""
    load, held, alive = train.load_model, [], []

    def load_model(path):
        model, saved = load(path)
        held.extend(weakref.ref(tensor) for tensor in (*model.parameters(), *saved["model"].values()))
        return model, saved

    monkeypatch.chdir(home)
    monkeypatch.setattr(train, "load_model", load_model)
    monkeypatch.setattr(train, "train", lambda *args: alive.extend(ref for ref in held if ref() is not None) or 0)
    out = "out" if start == "--init_from=resume" else "held"
    monkeypatch.setattr(sys, "argv", ["train.py", start, f"--out_dir={out}", "--max_steps=30", "--device=cpu"])
    with contextlib.suppress(SystemExit):
        train.main()
    assert held and not alive


def test_a_missing_compiler_is_told_before_anything_is_moved(home, monkeypatch):
    before = files(home / "out")
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no g++" + "\nand 200 lines more" * 200)))
    args = [word for word in TINY if "compile" not in word]
    complains(call("train.py", *args, "--compile=True", cwd=home), "train.py", "compile=True", "compiler")
    works(call("train.py", *args, "--max_steps=1", "--eval_interval=9", "--out_dir=uncompiled", cwd=home))
    assert files(home / "out") == before


def test_the_average_remembers_no_graph(home, monkeypatch):
    """An average that autograd follows would hold on to every step that there was."""
    seen = []
    monkeypatch.chdir(home)
    monkeypatch.setattr(train, "evaluate", lambda model, *args, **kwargs: seen.extend(model.parameters()) or {})
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--max_steps=3", "--out_dir=average"])
    with contextlib.suppress(SystemExit):
        train.main()
    assert seen and all(p.grad_fn is None and not p.requires_grad for p in seen)


def test_each_process_has_a_gpu_of_its_own(home, monkeypatch):
    """Without a GPU the message tells which one it would have been."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.empty(1, device=f"{device}-none"))
    complains(call("train.py", *TINY, "--device=cuda", cwd=home), "train.py", "device='cuda:3'")


def test_sigint_during_an_evaluation(home):
    process = launch(home, *TINY, "--eval_only", "--eval_times=10000000")
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in err


def test_killed_again_and_again(home, tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "Popen", quick.Popen)
    (tmp_path / "data").symlink_to(home / "data")
    counts = kill.trial(tmp_path, 3)
    assert counts["kills"] == 3 and counts["resumes"] >= 1


def second_of(process):
    """The process id of rank 1 below torchrun, or None."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "rank 1\n":  # see quick.py
                return int(pid)


# ------------------------------------------------------------------------------- what a user starts and starts again


def test_a_stopped_run_of_the_defaults_ends_at_the_same_bits(home):
    """Compiled, as 500 steps are: also where it is stopped with less than that to go."""
    if not train.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    args = [word for word in TINY if "compile" not in word]
    args += ["--max_steps=505", "--log_interval=1", "--eval_interval=9999"]
    straight = works(run("train.py", *args, "--out_dir=at_once", cwd=home))
    process = launch(home, *args, "--out_dir=in_two", "--save_interval=9999")
    log = home / "in_two/log.jsonl"
    wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 10, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    step = checkpoint(home / "in_two")["step"]
    assert process.returncode == 143 and 10 <= step < 505
    resumed = works(run("train.py", "--init_from=resume", "--out_dir=in_two", cwd=home))
    assert f"compiled; {4 * L} tokens a step, steps {step} to 505" in resumed.stdout and ", compiled" in straight.stdout
    for part in "model", "ema", "optimizer":
        assert_same(checkpoint(home / "at_once")[part], checkpoint(home / "in_two")[part], part)


def test_a_micro_batch_is_never_larger_than_the_share(home, monkeypatch):
    works(call("train.py", *TINY, "--micro_batch_size=32", "--max_steps=1", "--out_dir=small_share", cwd=home))
    owt = train.Options(batch_size=512, micro_batch_size=32, data_dir=str(home / "data"))
    data = train.Data(owt)
    model = sedd.SEDD(sedd.SEDDConfig(data.vocab_size, L, 1, 2, 32, 16))
    for world, count in (1, 16), (8, 2), (16, 1), (32, 1), (512, 1), (5, 4), (100, 1):
        monkeypatch.setattr(train, "WORLD", world)
        batch = data.batch(owt, 0, model)
        assert len(batch) == count and max(len(x0) for x0, _, _ in batch) <= 32


def test_fine_tuning_with_another_length_and_dropout(home):
    args = ["--init_from=out", "--out_dir=shorter", "--block_size=16", "--dropout=0.2", "--max_steps=1", "--device=cpu"]
    works(call("train.py", *args, cwd=home))
    before = checkpoint(home / "out")["config"]
    assert checkpoint(home / "shorter")["config"] == before | {"block_size": 16, "dropout": 0.2}
    works(call("train.py", "--init_from=resume", "--out_dir=shorter", "--max_steps=2", "--dropout=0", cwd=home))
    assert checkpoint(home / "shorter")["config"]["dropout"] == 0


WRAPPED = f"""
import os, pathlib, runpy, sys
import torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
%s
runpy.run_path({str(ROOT / "train.py")!r}, run_name='__main__')
"""


@pytest.mark.parametrize("option, keys", [
    ("--eval_split=test", {"test_bound", "test_error"}), ("--parameterization=causal", {"val_nll", "val_error"}),
])  # fmt: skip
def test_the_log_names_what_was_measured(home, option, keys):
    works(call("train.py", *TINY, option, "--max_steps=1", "--out_dir=named", cwd=home))
    (record,) = read_log(home / "named")
    assert record.keys() == {"step", "loss", "norm", "lr", "ms", "tokens_per_s", "skipped"}
    (record,) = read_log(home / "named", min(keys))
    assert record.keys() == {"step"} | keys
    assert '"out_dir": "named"' in (home / "named/log.jsonl").read_text().splitlines()[1]


def test_speed_is_that_of_the_steps_alone(home, monkeypatch):
    """Neither saving nor evaluating counts."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: time.sleep(2) or save(*args))
    args = [*TINY, "--save_interval=1", "--log_interval=1", "--eval_interval=1", "--eval_times=50", "--max_steps=3"]
    works(call("train.py", *args, "--out_dir=paused", cwd=home))
    assert all(4 * L / record["tokens_per_s"] < 1 for record in read_log(home / "paused")[1:])


def test_a_folder_of_nanogpt_trains_as_it_is(home):
    (home / "data/nano").mkdir()
    for name in "train", "val":
        shutil.copy(home / f"data/bpe/{name}.bin", home / "data/nano")
    done = works(call("train.py", *TINY, "--dataset=nano", "--max_steps=1", "--out_dir=nano", cwd=home))
    assert "bits per byte" not in done.stdout and checkpoint(home / "nano")["config"]["vocab_size"] == 50257
    done = call("train.py", *TINY, "--dataset=nano", "--eval_only", "--eval_split=test", cwd=home)
    complains(done, "train.py", "data/nano/test.bin", "not prepared")
    (home / "data/nano/meta.pkl").touch()  # that of nanoGPT's characters
    complains(call("train.py", *TINY, "--dataset=nano", cwd=home), "train.py", "data/nano", "not prepared")


def test_a_young_average_forgets_the_start(home):
    """Its weight is min(ema, (1 + step) / (10 + step)), so that a short run's average is not its random start."""
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(1, 1, bias=False)})
    state = train.State(model, train.Options(optimizer="adamw"))
    (p,), (mean,) = state.model.parameters(), state.average.parameters()
    p.grad, expected = torch.zeros_like(p), mean.item()
    for state.step, weight in (0, 0.1), (1, 2 / 11), (5000, 0.99):
        p.data.fill_(state.step + 1)
        state.update(lr=0.0, ema=0.99)
        expected = weight * expected + (1 - weight) * (state.step + 1)
        assert mean.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_training_times_are_even_and_leave_out_the_first_thousandth(home, times):
    """Below it the uniform graph's losses explode; each of B even times has a B-th of the rest."""
    o = train.Options(**SIZES | {"batch_size": 1000}, data_dir=str(home / "data"), times=times)
    data = train.Data(o)
    model = sedd.SEDD(sedd.SEDDConfig(data.vocab_size, L, 1, 2, 32, 16))
    for step in range(5):
        ((_, t, _),) = data.batch(o, step, model)
        assert t.min() >= 1e-3 and t.max() <= 1
        even = (t.double() - 1e-3) / (1 - 1e-3)
        even = torch.special.ndtr(torch.logit(even)) if times == "logit_normal" else even
        assert (1000 * even.sort()[0] - torch.arange(1000) - 0.5).abs().max() < 0.51


# ------------------------------------------------------------------------------------------- many GPUs, and older ones


def test_the_processes_share_the_noise_evenly(home, monkeypatch):
    """Of the masked positions of a step the busiest of 4 processes has hardly more than its part: all wait for it."""
    o = train.Options(block_size=128, batch_size=128, times="uniform", max_steps=20, data_dir=str(home / "data"))
    share = replace(o, micro_batch_size=16)
    data = train.Data(o)
    model = sedd.SEDD(sedd.SEDDConfig(data.vocab_size, 128, 1, 2, 32, 16))
    masked = torch.zeros(4, 20)
    for step in range(20):
        monkeypatch.setattr(train, "RANK", 0)
        monkeypatch.setattr(train, "WORLD", 1)
        (whole,) = data.batch(o, step, model)
        monkeypatch.setattr(train, "WORLD", 4)
        for rank in range(4):
            monkeypatch.setattr(train, "RANK", rank)
            parts = data.batch(share, step, model)
            assert len(parts) == 2
            for i, part in enumerate(parts):
                assert_same(part, [tensor[rank::4][i::2] for tensor in whole])
            masked[rank, step] = sum((x == model.graph.mask_id).sum() for _, _, x in parts)
    assert (masked.max(0).values <= 1.1 * masked.mean(0)).all()


def test_four_live_processes_share_the_noise_evenly(home):
    """The same, counted by 4 processes that torchrun starts, each of its own share, and put together by gloo."""
    (home / "count.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
import sedd, train
train.join_processes("cpu", torch.device("cpu"))
o = train.Options(block_size=128, batch_size=128, micro_batch_size=16, times="uniform", max_steps=20)
data = train.Data(o)
model = sedd.SEDD(sedd.SEDDConfig(data.vocab_size, 128, 1, 2, 32, 16))
masked = torch.zeros(4, 20)
for step in range(20):
    parts = data.batch(o, step, model)
    masked[train.RANK, step] = sum((x == model.graph.mask_id).sum() for _, _, x in parts)
dist.all_reduce(masked)
if train.RANK == 0:
    backend = dist.group.WORLD._get_backend(torch.device("cpu")).name()
    print(dist.get_world_size(), backend, (masked.max(0).values / masked.mean(0)).max().item())
time.sleep(0.2)  # as in train.main
dist.destroy_process_group()
""")
    command = [sys.executable, *TORCHRUN, "--nproc-per-node=4", "count.py"]
    done = quick.run(command, cwd=home, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    world, backend, busiest = done.stdout.split()
    assert (world, backend) == ("4", "gloo") and 1 <= float(busiest) <= 1.1


def test_dropout_differs_between_processes_and_steps(home):
    """Each of two processes keeps the masks of its two layers of dropout in two steps: any two agree in half the places."""
    (home / "masks.py").write_text(WRAPPED % "import torch\n"
                                             "drop, masks = torch.nn.Dropout.forward, []\n"
                                             "def forward(self, x):\n"
                                             "    mask = drop(self, torch.ones_like(x))\n"
                                             "    if self.training:\n"
                                             "        masks.append(mask > 0)\n"
                                             "        torch.save(masks, f'masks{os.environ[\"RANK\"]}.pt')\n"
                                             "    return x * mask\n"
                                             "torch.nn.Dropout.forward = forward")  # fmt: skip
    args = [*TINY, "--dropout=0.5", "--max_steps=2", "--out_dir=masks"]
    works(together(2, home / "masks.py", *args, cwd=home))
    masks = [mask for rank in range(2) for mask in torch.load(home / f"masks{rank}.pt")]
    assert len(masks) == 8 and {mask.shape for mask in masks} == {(2, L, 32)}
    for a, b in itertools.combinations(masks, 2):
        assert 0.4 < (a == b).float().mean() < 0.6


def test_micro_batches_for_a_gpu_are_pinned_and_whole(home, monkeypatch):
    """A strided tensor would be copied through memory that is not pinned. (Without a GPU there is none to pin.)"""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    o = train.Options(**SIZES, micro_batch_size=2, data_dir=str(home / "data"))
    data = train.Data(o)
    model = sedd.SEDD(sedd.SEDDConfig(data.vocab_size, L, 1, 2, 32, 16))
    a, b = (data.batch(o, 3, model, pin) for pin in (False, True))
    assert_same(a, b)
    assert len(pinned) == 6 and all(tensor.is_contiguous() for tensor in pinned)


def test_float16_ends_near_bfloat16(home):
    bounds = {}
    for dtype in "float16", "bfloat16":
        args = [*TINY, f"--dtype={dtype}", "--max_steps=50", "--warmup_steps=5", "--eval_sequences=32"]
        done = works(call("train.py", *args, f"--out_dir={dtype}", cwd=home))
        assert f"in {dtype};" in done.stdout
        bounds[dtype] = read_log(home / dtype, "val_bound")[-1]["val_bound"]
    assert bounds["float16"] == pytest.approx(bounds["bfloat16"], abs=0.1)
    assert checkpoint(home / "float16")["scaler"]["scale"] >= 1 and checkpoint(home / "bfloat16")["scaler"] == {}


SCALER = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def test_overflow_in_float16_is_left_out_by_both_optimisers_and_survived(home, monkeypatch):
    """Also more than ten times in a row, while the scale of the loss still comes down."""
    put_checkpoint(home, "scaled", lambda saved: saved.update(scaler=SCALER | {"scale": 2.0**60}))
    args = ["--init_from=resume", "--out_dir=scaled", "--dtype=float16", "--log_interval=1"]
    before = (home / "scaled/ckpt.pt").read_bytes()
    done = call("train.py", *args, "--max_steps=35", cwd=home)
    assert done.returncode == 1 and "scaled/ckpt.pt holds step 20" in done.stdout and "error" not in done.stderr
    assert (home / "scaled/ckpt.pt").read_bytes() == before
    update, updates = train.State.update, []
    monkeypatch.setattr(train.State, "update", lambda *args: updates.append(1) or update(*args))
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--max_steps=80"])
    monkeypatch.chdir(home)
    train.main()
    skipped = [record["skipped"] for record in read_log(home / "scaled")]
    count = sum(skipped)
    assert len(updates) == 60 - count  # nothing else moves the weights
    assert len(skipped) == 60 and 30 < skipped.index(0) <= count < 55  # the first ones in a row, and few of them later
    assert checkpoint(home / "scaled")["scaler"]["scale"] == 2.0 ** (60 - count)


def test_ten_in_a_row_stop_float16_when_the_scale_is_down(home):
    def spoil(saved):
        saved["model"]["output_layer.linear.bias"][0] = 3e38
        saved["scaler"] = SCALER | {"scale": 8.0}

    put_checkpoint(home, "down", spoil)
    args = ["--init_from=resume", "--out_dir=down", "--dtype=float16", "--max_steps=60"]
    done = call("train.py", *args, cwd=home)
    assert done.returncode == 1 and "not finite in steps 24 to 33" in done.stderr


# ------------------------------------------------------------------------------------------------------ full disk


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_full_disk_at_the_end_keeps_the_old_checkpoint(home):
    shutil.copytree(home / "out", home / "full")
    before = (home / "full/ckpt.pt").read_bytes()
    process = launch(home, "--init_from=resume", "--out_dir=full", "--max_steps=40", "--save_interval=10",
                     preexec_fn=limit_files(20_000))  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert re.findall(r"warning: step (\d+) was not saved", err) == ["30", "40"]
    assert (home / "full/ckpt.pt").read_bytes() == before
    assert sorted(p.name for p in (home / "full").iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_the_run_goes_on_when_the_disk_has_room_again(home):
    args = [*TINY, "--max_steps=100000", "--save_interval=5", "--log_interval=1", "--eval_interval=100000"]
    process = launch(
        home, *args, "--out_dir=tight", preexec_fn=limit_files(20_000)
    )  # old PyTorch writes 10,000 of its own
    read_stream(process.stderr, "warning: step 5 was not saved")
    wait_for(lambda: (home / "tight/log.jsonl").stat().st_size == 20_000, process)  # the rest of it is lost
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for((home / "tight/ckpt.pt").is_file, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    step = checkpoint(home / "tight")["step"]
    steps = [record["step"] for record in read_log(home / "tight")]
    assert steps[0] == 1 and steps[-1] == step and steps == sorted({*steps})


# ----------------------------------------------------------------------------------------------------- not finite


def test_a_learning_rate_out_of_this_world_stops_the_run(home):
    args = ["--learning_rate=1e30", "--warmup_steps=0", "--max_steps=100", "--save_interval=1", "--out_dir=wild"]
    done = call("train.py", *TINY, *args, "--seed=3", cwd=home)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    first, last = map(int, re.search(r"not finite in steps (\d+) to (\d+)", done.stderr).groups())
    assert last - first >= 9 and last <= 30
    assert sum(record["skipped"] for record in read_log(home / "wild")) >= 1


@pytest.mark.parametrize("least, most, interval", [(2, 4, 1), (11, 20, 1), (11, 20, 10)],
                         ids=["few", "many, but never ten in a row", "many, in lines of ten steps"])  # fmt: skip
def test_steps_that_are_not_finite_are_skipped_and_counted(home, least, most, interval):
    """One character has an embedding whose norm overflows: it spoils the steps that see it, and no other."""
    meta = json.loads((home / "data/pydocs/meta.json").read_text())
    o = train.Options(**SIZES, data_dir=str(home / "data"))
    model = sedd.SEDD(sedd.SEDDConfig(meta["vocab_size"], L, 1, 2, 32, 16))
    data = train.Data(o)
    seen = [{*x.flatten().tolist()} for step in range(20, 50) for _, _, x in data.batch(o, step, model)]
    spoilt = ([token in tokens for tokens in seen] for token in range(meta["vocab_size"]))
    token, spoilt = next((token, steps) for token, steps in enumerate(spoilt)
                         if least <= sum(steps) <= most and not steps[-1] and "1" * 10 not in "".join(str(int(step)) for step in steps))  # fmt: skip

    def spoil(saved):
        saved["model"]["vocab_embed.embedding"][token] = 3e38

    out = f"spoilt{least}_{interval}"
    put_checkpoint(home, out, spoil)
    args = ["--init_from=resume", f"--out_dir={out}", "--max_steps=50", "--save_interval=10"]
    works(call("train.py", *args, f"--log_interval={interval}", cwd=home))
    assert checkpoint(home / out)["step"] == 50
    log, skipped = read_log(home / out), [sum(spoilt[i : i + interval]) for i in range(0, 30, interval)]
    assert [record.get("skipped", 0) for record in log] == skipped
    assert [record["loss"] is None for record in log] == [count == interval for count in skipped]


def test_ten_in_a_row_stop_the_run(home):
    def spoil(saved):
        saved["model"]["output_layer.linear.bias"][0] = 3e38  # finite, but not its exp

    put_checkpoint(home, "still", spoil)
    done = call("train.py", "--init_from=resume", "--out_dir=still", "--max_steps=40", "--log_interval=10", cwd=home)
    assert done.returncode == 1 and "not finite in steps 21 to 30" in done.stderr


# ----------------------------------------------------------------------------------------------------------- fuzz


def one_line_or(done, *codes):
    """A run that ends as it should, or one line that says why not."""
    if done.returncode not in codes:
        complains(done, "train.py")
    return done.returncode in codes


@pytest.fixture(scope="module")
def truth(home):
    return works(call("train.py", "--init_from=resume", "--eval_only", cwd=home)).stdout


OTHERS = {
    "another config": lambda saved: saved["config"].update(colour=1),
    "no average": lambda saved: saved.pop("ema"),
    "another width": lambda saved: saved["config"].update(n_embd=64),
    "half a weight": lambda saved: saved["ema"]["vocab_embed.embedding"].resize_(3, 32),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_checkpoints_of_another_version(home, change):
    put_checkpoint(home, "version", change)
    done = call("train.py", "--init_from=resume", "--out_dir=version", "--max_steps=30", cwd=home)
    complains(done, "train.py", "version/ckpt.pt", "version")


def test_a_bug_of_a_fork_is_no_fault_of_the_checkpoint(home, monkeypatch):
    """It shows as it is, with its traceback."""

    class Fork(sedd.SEDD):
        def __init__(self, config):
            raise TypeError("a bug of my own")

    monkeypatch.setitem(sedd.MODELS, "score", Fork)
    with pytest.raises(TypeError, match="a bug of my own"):
        train.load_model(str(home / "out"))


def test_an_option_that_is_gone_is_named(home):
    """A run could not go on as it was. Its weights can be evaluated, tuned and sampled all the same."""
    put_checkpoint(home, "renamed", lambda saved: saved["options"].update(colour=1))
    done = call("train.py", "--init_from=resume", "--out_dir=renamed", "--max_steps=30", cwd=home)
    complains(done, "train.py", "renamed/ckpt.pt", "another version", "'colour'")
    works(call("train.py", "--init_from=renamed", "--eval_only", cwd=home))


@fuzz
@given(st.data())
def test_damaged_checkpoints(home, truth, data):
    """Any byte changed, or the tail cut off: refused, or (where the byte says nothing) the same answer."""
    whole = (home / "out/ckpt.pt").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 5000, len(whole) - 1))
    if data.draw(st.booleans()):
        broken = whole[:place]
    else:
        broken = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    (home / "broken").mkdir(exist_ok=True)
    (home / "broken/ckpt.pt").write_bytes(broken)
    done = call("train.py", "--init_from=resume", "--out_dir=broken", "--eval_only", cwd=home)
    if one_line_or(done, 0):
        assert done.stdout == truth and len(broken) == len(whole)


@fuzz
@given(st.data())
def test_data_files_of_another_size_or_with_foreign_tokens(home, truth, data):
    folder = home / "data/cut"
    if not folder.is_dir():
        shutil.copytree(home / "data/pydocs", folder)
    whole = (home / "data/pydocs/val.bin").read_bytes()
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))] + b"x" * data.draw(st.integers(0, 3))
        accepted = len(broken) == len(whole)
    else:
        broken, accepted = b"\xff" * len(whole), False
    (folder / "val.bin").write_bytes(broken)
    done = call("train.py", "--init_from=resume", "--dataset=cut", "--eval_only", cwd=home)
    if done.returncode:  # the bar may have begun
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert sum("train.py: error: " in line for line in done.stderr.splitlines()) == 1
    else:
        assert accepted


