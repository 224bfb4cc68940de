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
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


def read_stream(stream, word):
    """Read until a line has the word: that line."""
    for line in stream:
        if word in line:
            return line
    pytest.fail(f"{word!r} never came")


def printed_bound(done):
    bound, error = re.search(r": (?:bound|nll) (\S+) ± (\S+) nats", works(done).stdout).groups()
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
    assert re.search(r"^out: bound \d\.\d{4} ", one.stdout, re.MULTILINE)


def test_evaluation_says_what_it_leaves_out(home):
    args = [*TINY, "--dataset=bpe", "--eval_only", "--eval_sequences=0", "--eval_split=test"]
    done = works(call("train.py", *args, cwd=home))
    assert f"10 of 10 blocks of {L} tokens" in done.stdout
    assert f"{333 - 10 * L} tokens that fill no block" in done.stdout


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
    ("--init_from=out --n_layer=2 --out_dir=x", ["out was trained with other options", "say --n_layer=1"]),
    ("--init_from=out --n_embd=64 --n_layer=2 --graph=uniform --out_dir=x", ["say --n_layer=1 --n_embd=32 --graph=absorb"]),
    ("--init_from=out --graph=uniform --eval_only", ["--graph=absorb"]),
    ("--init_from=out", ["'out'", "out_dir as well"]),
    ("--init_from=out/ckpt.pt", ["'out/ckpt.pt'", "out_dir as well"]),
    ("--init_from=data --eval_only", ["data' is no folder or hub"]),
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
    complains(done, "train.py", "trained with other options", "--optimizer=adamw")
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


def test_a_checkpoint_of_no_finite_step_goes_on(home):
    """It has no moments yet."""
    meta = json.loads((home / "data/pydocs/meta.json").read_text())
    model = sedd.SEDD(sedd.SEDDConfig(meta["vocab_size"], L, 1, 2, 32, 16))
    model.output_layer.linear.bias.data[0] = 3e38
    model.save_pretrained(home / "infinite")
    works(call("train.py", "--init_from=infinite", "--max_steps=3", "--out_dir=never_finite", cwd=home))
    works(call("train.py", "--init_from=resume", "--max_steps=4", "--out_dir=never_finite", cwd=home))
    saved = checkpoint(home / "never_finite")
    assert saved["step"] == 4 and not saved["optimizer"]["adamw"]["state"]
    assert_same(saved["model"], dict(model.state_dict()))


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
    advice = re.search(r"python train.py (.*) goes on", out)[1].split()
    works(call("train.py", *advice, f"--max_steps={step + 3}", cwd=home))
    works(call("train.py", *args, f"--max_steps={step + 3}", "--out_dir=unbroken", cwd=home))
    a, b = checkpoint(home / "termed"), checkpoint(home / "unbroken")
    for part in "step", "model", "ema", "optimizer":
        assert_same(a[part], b[part], part)


def test_a_signal_in_the_last_step_stops_nothing(home):
    (home / "late.py").write_text(WRAPPED % "import signal, torch\n"
                                            "clip = torch.nn.utils.clip_grad_norm_\n"
                                            "def killed(*args):\n"
                                            "    os.kill(os.getpid(), signal.SIGTERM)\n"
                                            "    return clip(*args)\n"
                                            "torch.nn.utils.clip_grad_norm_ = killed")  # fmt: skip
    done = run(home / "late.py", *TINY, "--max_steps=1", "--out_dir=late", cwd=home)
    assert "late/ckpt.pt is ready" in works(done).stdout and "stopping after this step" in done.stderr


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


@pytest.mark.parametrize("shell", [">&-", "2>&-"])
def test_training_does_not_depend_on_its_output(home, shell):
    """There may be nowhere to write."""
    out = re.sub(r"\W", "_", shell)
    line = f"'{sys.executable}' '{ROOT / 'train.py'}' {' '.join(TINY)} --out_dir={out} --max_steps=6 --eval_interval=1 {shell}"
    subprocess.run(
        ["bash", "-c", line], cwd=home, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert checkpoint(home / out)["step"] == 6 and read_log(home / out)[-1]["step"] == 6


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_training_does_not_depend_on_its_readers(home, name):
    """They may leave after a line; what goes elsewhere meets a full disk."""
    args = [*TINY, f"--out_dir={name}", "--max_steps=6", "--eval_interval=1"]
    command = [sys.executable, "-u", str(ROOT / "train.py"), *args]
    with open("/dev/full", "w") as full:
        process = quick.Popen(command, cwd=home, **{"stdout": full, "stderr": full, name: subprocess.PIPE})
    stream = getattr(process, name)
    stream.read(1)
    stream.close()
    process.wait(60)
    assert checkpoint(home / name)["step"] == 6 and read_log(home / name)[-1]["step"] == 6


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
        log = [json.loads(line) for line in (home / "thrice" / f"log{name}.jsonl").read_text().splitlines()]
        assert (log[0]["step"], log[0]["options"]["max_steps"], log[-1]["step"]) == (0, steps, steps)


def test_one_training_at_a_time_in_a_folder(home):
    works(call("train.py", *TINY, "--max_steps=1", "--out_dir=busy", cwd=home))
    before = files(home / "busy")
    with open(home / "busy/log.jsonl", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = call("train.py", *TINY, "--max_steps=2", "--out_dir=busy", cwd=home)
    assert done.returncode == 2 and "another training is writing to out_dir='busy'" in done.stderr
    assert files(home / "busy") == before


def test_the_average_remembers_no_graph(home, monkeypatch):
    """An average that autograd follows would hold on to every step that there was."""
    seen = []
    monkeypatch.chdir(home)
    monkeypatch.setattr(train, "evaluate", lambda model, *args, **kwargs: seen.extend(model.parameters()) or {})
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--max_steps=3", "--out_dir=average"])
    train.main()
    assert seen and all(p.grad_fn is None and not p.requires_grad for p in seen)


def test_each_process_has_a_gpu_of_its_own(home, monkeypatch):
    """Without a GPU the message tells which one it would have been."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.empty(1, device=f"{device}-none"))
    complains(call("train.py", *TINY, "--device=cuda", cwd=home), "train.py", "device='cuda:3'")


def test_sigint_during_an_evaluation(home):
    process = launch(home, *TINY, "--eval_only", "--eval_times=10000000")
    read_stream(process.stdout, "blocks")
    time.sleep(1)
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


def test_torchrun_restarts_after_the_loss_of_a_process(home):
    """One process of two is told to stop, and all stop at one step; torchrun starts them again; one is killed."""
    args = [*TINY, "--dropout=0.1", "--max_steps=80", "--save_interval=5", "--log_interval=1", "--eval_interval=100000"]
    launcher = [*TORCHRUN, "--nproc-per-node=2"]
    works(together(2, "train.py", *args, "--out_dir=quiet", cwd=home))
    # another run's checkpoint lies there, of the last step
    put_checkpoint(home, "robust", lambda saved: saved.update(step=80))
    process = launch(home, *args, "--out_dir=robust", launcher=[*launcher, "--max-restarts=3"])
    log, ended = home / "robust/log.jsonl", []
    for lines, number in (8, signal.SIGTERM), (28, signal.SIGKILL):
        wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > lines, process)
        wait_for(lambda: second_of(process) not in (None, *ended), process)
        ended.append(second_of(process))
        os.kill(ended[-1], number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stopped, (first, *resumed) = re.findall(r"holds step (\d+)", out), re.findall(r"steps (\d+) to 80", out)
    assert first == "0" and stopped == resumed[:1] and 8 < int(stopped[0]) < int(resumed[1]) < 80
    a, b = checkpoint(home / "robust"), checkpoint(home / "quiet")
    for part in "step", "model", "ema", "optimizer":
        assert_same(a[part], b[part], part)


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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_hindrance(home, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    works(call("train.py", *TINY, "--max_steps=1", "--out_dir=lockless", cwd=home))
    assert fcntl.flock.called


def test_a_restart_by_torchrun_goes_on_like_auto(home, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    shutil.copytree(home / "out", home / "again")
    done = works(call("train.py", *TINY, "--max_steps=22", "--out_dir=again", cwd=home))
    assert "steps 20 to 22" in done.stdout and sorted(os.listdir(home / "again")) == ["ckpt.pt", "log.jsonl"]
    done = works(call("train.py", *TINY, "--max_steps=1", "--out_dir=again_new", cwd=home))
    assert "steps 0 to 1" in done.stdout
    done = works(call("train.py", "--init_from=again", "--out_dir=again_new", "--eval_only", cwd=home))
    assert re.search(r"^again: bound ", done.stdout, re.MULTILINE)  # and not of the checkpoint in again_new


WRAPPED = f"""
import os, pathlib, runpy, sys
import torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
%s
runpy.run_path({str(ROOT / "train.py")!r}, run_name='__main__')
"""


@pytest.mark.parametrize("processes, crash", [(2, "dist.broadcast = lambda *args: os._exit(1)"), (1, "os._exit(1)")])
def test_a_crash_at_the_start_does_not_make_a_restart_adopt_an_older_run(home, processes, crash):
    """Before the first start has moved it away, the checkpoint in the folder is of another run, if of equal options."""
    out = f"adopted{processes}"
    args = [*TINY, "--max_steps=4", f"--out_dir={out}"]
    works(call("train.py", *args, cwd=home))
    (home / f"{out}.py").write_text(WRAPPED % f"if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    {crash}")
    launcher = [*TORCHRUN, f"--nproc-per-node={processes}", "--max-restarts=2"]
    assert "steps 0 to 4" in works(run(home / f"{out}.py", *args, cwd=home, launcher=launcher)).stdout
    assert checkpoint(home / out)["step"] == 4 and (home / out / "ckpt.old.pt").is_file()


def test_two_nodes_go_on_together_after_the_loss_of_a_process(home):
    """Each counts its restarts, and their store remembers the dead: process 1 must not take an old address of 0."""
    (home / "slow.py").write_text(WRAPPED % "import time\n"
                                            "join = dist.init_process_group\n"
                                            "def late(*args, **kwargs):\n"
                                            "    time.sleep(2 if os.environ['RANK'] == '0' else 0)\n"
                                            "    join(*args, **kwargs)\n"
                                            "dist.init_process_group = late")  # fmt: skip
    args = [*TINY, "--max_steps=100", "--save_interval=5", "--log_interval=1", "--eval_interval=999", "--out_dir=nodes"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
                "--local-addr=127.0.0.1", "--max-restarts=1"]  # fmt: skip
    nodes = [launch(home, *args, launcher=launcher, script=home / "slow.py") for _ in range(2)]
    log = home / "nodes/log.jsonl"
    wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 12, nodes[0])
    os.kill(next(pid for pid in map(second_of, nodes) if pid), signal.SIGKILL)
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    starts = re.findall(r"steps (\d+) to 100", "".join(out for out, _ in outputs))
    assert len(starts) == 2 and starts[0] == "0" and 10 <= int(starts[1]) < 100
    assert [record["step"] for record in read_log(home / "nodes")] == [*range(1, 101)]


def test_process_0_decides_for_all_whether_to_resume(home):
    """The others may see an older state of the folder: here the second process sees no checkpoint."""
    shutil.copytree(home / "out", home / "stale")
    (home / "stale.py").write_text(WRAPPED % "if os.environ['RANK'] == '1':\n"
                                             "    see = pathlib.Path.is_file\n"
                                             "    pathlib.Path.is_file = lambda p: p.name != 'ckpt.pt' and see(p)")  # fmt: skip
    args = [*TINY, "--init_from=auto", "--out_dir=stale", "--max_steps=22"]
    done = works(together(2, home / "stale.py", *args, cwd=home))
    assert "steps 20 to 22" in done.stdout and "Warning" not in done.stderr and checkpoint(home / "stale")["step"] == 22


@pytest.mark.parametrize("option, keys", [
    ("--eval_split=test", {"test_bound", "test_error"}), ("--parameterization=causal", {"val_nll", "val_error"}),
])  # fmt: skip
def test_the_log_names_what_was_measured(home, option, keys):
    works(call("train.py", *TINY, option, "--max_steps=1", "--out_dir=named", cwd=home))
    (record,) = read_log(home / "named")
    assert record.keys() == {"step", "loss", "norm", "lr", "ms", "tokens_per_s"} | keys
    assert json.loads((home / "named/log.jsonl").read_text().splitlines()[0])["options"]["out_dir"] == "named"


def test_speed_is_that_of_the_steps_alone(home, monkeypatch):
    """Neither saving nor evaluating counts."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: time.sleep(2) or save(*args))
    args = [*TINY, "--save_interval=1", "--log_interval=1", "--eval_interval=1", "--eval_times=50", "--max_steps=3"]
    works(call("train.py", *args, "--out_dir=paused", cwd=home))
    assert all(4 * L / record["tokens_per_s"] < 1 for record in read_log(home / "paused")[1:])


def test_ten_in_a_row_end_all_restarts(home):
    """They would meet the same batches again."""
    args = [*TINY, "--learning_rate=1e30", "--warmup_steps=0", "--seed=3", "--out_dir=once"]
    launcher = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=3"]
    done = run("train.py", *args, cwd=home, launcher=launcher)
    assert done.returncode != 0 and done.stderr.count("train.py: error: loss or gradient is not finite") == 1


def test_a_folder_of_nanogpt_trains_as_it_is(home):
    (home / "data/nano").mkdir()
    for name in "train", "val":
        shutil.copy(home / f"data/bpe/{name}.bin", home / "data/nano")
    done = works(call("train.py", *TINY, "--dataset=nano", "--max_steps=1", "--out_dir=nano", cwd=home))
    assert "bits per byte" not in done.stdout and checkpoint(home / "nano")["config"]["vocab_size"] == 50257
    done = call("train.py", *TINY, "--dataset=nano", "--eval_only", "--eval_split=test", cwd=home)
    complains(done, "train.py", "data/nano/test.bin", "not with this split")
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
train.join_processes()
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


def test_weights_of_one_two_and_four_processes_agree(home):
    args = [*TINY, "--batch_size=8", "--max_steps=20", "--dtype=float32", "--warmup_steps=5", "--eval_interval=9999",
            "--optimizer=adamw", "--learning_rate=0.002"]  # Muon counts in bfloat16: there a rounding can be much  # fmt: skip
    for count in 1, 2, 4:
        works(together(count, "train.py", *args, f"--out_dir=w{count}", cwd=home))
    one = checkpoint(home / "w1")["model"]
    for count in 2, 4:
        many = checkpoint(home / f"w{count}")["model"]
        assert max((many[name] - p).abs().max() for name, p in one.items()) < 1e-4


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


def test_the_share_of_the_peak_is_told_where_it_is_known(monkeypatch):
    """By hand: a weight of trunk and head takes 6 operations a token, attention 12 x layers x width x length."""
    model, o = sedd.SEDD(sedd.SEDDConfig(99, 8, 2, 2, 32, 16)), train.Options(batch_size=4, block_size=8)
    work = 4 * 8 * (6 * (2 * (12 * 32 * 32 + 5 * 32 + 2 * 32) + 100 * 32 / 2) + 12 * 2 * 32 * 8)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_345_678_901)
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12,
             "Tesla T4": 65e12, "NVIDIA L4": 121e12, "NVIDIA L40S": None, "NVIDIA GeForce RTX 4090": 165e12}  # fmt: skip
    for name, peak in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        told = train.speed(o, model, work / 989e12 / 0.25, torch.device("cuda"), torch.bfloat16)
        assert told["peak_gb"] == 12.35 and told.get("mfu") == (peak and pytest.approx(0.25 * 989e12 / peak, abs=1e-3))
    assert train.speed(o, model, 0.5, torch.device("cpu"), torch.bfloat16) == {"ms": 500.0, "tokens_per_s": 64}


def test_float16_ends_near_bfloat16(home):
    bounds = {}
    for dtype in "float16", "bfloat16":
        args = [*TINY, f"--dtype={dtype}", "--max_steps=50", "--warmup_steps=5", "--eval_sequences=32"]
        done = works(call("train.py", *args, f"--out_dir={dtype}", cwd=home))
        assert f"in {dtype}, math attention" in done.stdout
        bounds[dtype] = read_log(home / dtype)[-1]["val_bound"]
    assert bounds["float16"] == pytest.approx(bounds["bfloat16"], abs=0.1)
    assert checkpoint(home / "float16")["scaler"]["scale"] >= 1 and checkpoint(home / "bfloat16")["scaler"] == {}


SCALER = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def test_overflow_in_float16_is_left_out_by_both_optimisers_and_survived(home):
    """Also more than ten times in a row, while the scale of the loss still comes down."""
    put_checkpoint(home, "scaled", lambda saved: saved.update(scaler=SCALER | {"scale": 2.0**60}))
    args = ["--init_from=resume", "--out_dir=scaled", "--dtype=float16", "--log_interval=1"]
    works(call("train.py", *args, "--max_steps=25", cwd=home))
    a, b = checkpoint(home / "out"), checkpoint(home / "scaled")
    assert b["step"] == 25 and b["scaler"]["scale"] == 2.0**55
    for part in "model", "ema":
        assert_same(a[part], b[part])
    for name, optimizer in a["optimizer"].items():
        assert_same(optimizer["state"], b["optimizer"][name]["state"])
    works(call("train.py", *args, "--max_steps=80", cwd=home))
    skipped = [record.get("skipped", 0) for record in read_log(home / "scaled")]
    count = sum(skipped)
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
    wait_for(lambda: (home / "tight/log.jsonl").stat().st_size == 20_000, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for((home / "tight/ckpt.pt").is_file, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    step = checkpoint(home / "tight")["step"]
    assert [record["step"] for record in read_log(home / "tight")] == list(range(1, step + 1))


# ----------------------------------------------------------------------------------------------------- not finite


def test_a_learning_rate_out_of_this_world_stops_the_run(home):
    args = ["--learning_rate=1e30", "--warmup_steps=0", "--max_steps=100", "--save_interval=1", "--out_dir=wild"]
    done = call("train.py", *TINY, *args, "--seed=3", cwd=home)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    first, last = map(int, re.search(r"not finite in steps (\d+) to (\d+)", done.stderr).groups())
    assert last - first >= 9 and last <= 30
    assert f"Data.batch(o, {first - 1}, model), seed=3" in done.stderr
    log = read_log(home / "wild")
    assert sum(record.get("skipped", 0) for record in log) >= 1
    if (home / "wild/ckpt.pt").is_file():
        assert all(tensor.isfinite().all() for tensor in checkpoint(home / "wild")["model"].values())


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
                         if least <= sum(steps) <= most and "1" * 10 not in "".join(str(int(step)) for step in steps))  # fmt: skip

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


def test_numbers_that_are_not_finite_are_not_saved(home, capfd):
    before, saved = (home / "out/ckpt.pt").read_bytes(), checkpoint(home / "out")
    o = train.Options(**saved["options"])
    model = sedd.SEDD(sedd.SEDDConfig(**saved["config"]))
    state = train.State(model, o, checkpoint=saved)
    state.average.output_layer.linear.bias.data[0] = math.nan
    assert not state.save(home / "out/ckpt.pt", o, saved["meta"])
    assert "step 20 was not saved (its numbers are not all finite)" in capfd.readouterr().err
    assert (home / "out/ckpt.pt").read_bytes() == before


def test_ten_in_a_row_stop_the_run(home):
    def spoil(saved):
        saved["model"]["output_layer.linear.bias"][0] = 3e38  # finite, but not its exp

    put_checkpoint(home, "still", spoil)
    done = call("train.py", "--init_from=resume", "--out_dir=still", "--max_steps=40", "--log_interval=10", cwd=home)
    assert done.returncode == 1 and "not finite in steps 21 to 30" in done.stderr


# ------------------------------------------------------------------------------------------------------- pleasure


def test_each_evaluation_shows_a_text_and_disturbs_nothing(home):
    works(call("prepare.py", "--tokenizer=char", "--data_dir=chars", cwd=home))  # L tokens are L characters
    args = [*TINY, "--data_dir=chars", "--dropout=0.1", "--max_steps=6", "--log_interval=2"]
    often = works(call("train.py", *args, "--eval_interval=2", "--out_dir=often", cwd=home))
    never = works(call("train.py", *args, "--eval_interval=100", "--out_dir=never", cwd=home))
    shown = [line for line in often.stdout.splitlines() if line[:1] in "'\""]
    assert len(shown) == 3 and all(len(eval(line)) == L for line in shown)
    assert len([line for line in never.stdout.splitlines() if line[:1] in "'\""]) == 1
    assert re.search(r"/6 \[\d\d:\d\d<", often.stderr)  # the time that is still to go
    assert_same(checkpoint(home / "often")["model"], checkpoint(home / "never")["model"])


def test_without_the_bpe_files_training_shows_no_text(home, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: open("/nowhere"))
    done = works(call("train.py", *TINY, "--dataset=bpe", "--max_steps=1", "--out_dir=offline", cwd=home))
    assert not [line for line in done.stdout.splitlines() if line[:1] in "'\""]


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
    "not a number": lambda saved: saved["ema"]["output_layer.linear.bias"].fill_(math.nan),
    "no shape": lambda saved: saved["config"].update(n_head=0),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_checkpoints_of_another_version(home, change):
    put_checkpoint(home, "version", change)
    done = call("train.py", "--init_from=resume", "--out_dir=version", "--max_steps=30", cwd=home)
    complains(done, "train.py", "version/ckpt.pt", "another version")


def test_an_option_that_is_gone_is_named(home):
    """A run could not go on as it was. Its weights can be evaluated, tuned and sampled all the same."""
    put_checkpoint(home, "renamed", lambda saved: saved["options"].update(colour=1))
    done = call("train.py", "--init_from=resume", "--out_dir=renamed", "--max_steps=30", cwd=home)
    complains(done, "train.py", "renamed/ckpt.pt", "unknown option 'colour'")
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


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=5)  # fmt: skip


@fuzz
@given(st.sampled_from(["tokenizer", "vocab", "vocab_size", "dtype", "sizes", "bytes", "source", "all"]),
       JSON | st.sampled_from(["gpt2", "char", "<u4", "<u2", 50257, ["a", "b"], {"train": 5, "val": 5}]))  # fmt: skip
def test_meta_with_a_wrong_field(home, truth, field, value):
    folder = home / "data/odd"
    if not folder.is_dir():
        shutil.copytree(home / "data/pydocs", folder)
    meta = json.loads((home / "data/pydocs/meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(value if field == "all" else meta | {field: value}))
    done = call("train.py", "--init_from=resume", "--dataset=odd", "--eval_only", cwd=home)
    if one_line_or(done, 0):
        assert field in ("source", "bytes") or meta[field] == value
        told = [done.stdout, truth.replace("pydocs", "odd")]
        if field == "bytes":  # nothing contradicts another number of them
            told = [text.split(", perplexity")[0] for text in told]
        assert told[0] == told[1]


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


NUMBERS = st.sampled_from(["-1", "0", "1", "2", "3", "7", "64", "1e3", "1e30", "nan", "inf", "-inf", "x", str(10**30)])
WORDS = st.text(max_size=5).filter(lambda text: "\0" not in text)
FLAGS = sorted(train.Options.__dataclass_fields__.keys() - {"max_steps", "out_dir", "data_dir", "compile"})
LARGE = "n_layer", "n_embd", "cond_dim", "batch_size", "eval_times"


@fuzz
@given(st.lists(st.tuples(st.sampled_from(FLAGS), NUMBERS | WORDS), max_size=3))
def test_options(home, pairs):
    args = [f"--{name}={value}" for name, value in pairs]
    if any(name in LARGE and len(value) > 2 for name, value in pairs):
        args.append("--n_head=0")  # a model of that size would be built in earnest
    done = call("train.py", *TINY, "--out_dir=options", *args, "--max_steps=2", cwd=home)
    if one_line_or(done, 0, 1):
        assert done.stdout


NAMES = ["n_layer", "seed", "dropout", "dtype", "decay_lr", "dataset", "colour", "x y"]
CODE = ["exit()", "1/0", "10**400", "open", "'bfloat16'", "2", "0.1", "(", "'", "\0", "\ud800", "\n"]


@fuzz
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(CODE) | JSON.map(repr)), max_size=3))
def test_config_files(home, pairs):
    text = "".join(f"{name} = {code}\n" for name, code in pairs)
    (home / "fuzz.py").write_bytes(text.encode("utf-8", "surrogatepass"))
    one_line_or(call("train.py", *TINY, "fuzz.py", "--out_dir=configs", "--n_layer=1", "--max_steps=2", cwd=home), 0)
