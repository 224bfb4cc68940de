"""The first ten minutes on a GPU: python tests/gpu.py [--help]. One table: what was found, and what it should be.

Each check stands by itself: what fails is told in its line, and the others go on. The processes, two or one for each
GPU, are those that a user would start: torchrun, train.py, and data of random tokens in a scratch folder.
With --device=cpu --tiny the script itself can be tried out; what only CUDA can tell is left out there.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import sedd  # noqa: E402
import train  # noqa: E402

TINY = dict(vocab_size=63, block_size=32, n_layer=2, n_head=2, n_embd=32, cond_dim=16)
SMALL = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, cond_dim=128)
MORE = "--eval_interval=100000 --eval_sequences=2 --eval_times=1 --warmup_steps=1 --optimizer=adamw".split()


class Bench:
    """A model, random tokens, and one step of training as train.py takes it."""

    def __init__(self, a, device, graph="absorb", compiled=True):
        torch.manual_seed(0)
        self.device, self.dtype = device, train.find_dtype("auto", device)
        config = sedd.SEDDConfig(**(TINY if a.tiny else SMALL), dropout=0.0, graph=graph)
        self.model = sedd.SEDD(config).to(device)
        for p in self.model.parameters():  # where gates and head are zero, many a fault would not show
            torch.nn.init.normal_(p, std=0.02)
        if compiled:
            self.model.compile()
        self.options = train.Options(batch_size=a.batch, block_size=config.block_size, grad_clip=1.0, optimizer="adamw")
        self.state = train.State(self.model, self.options, self.dtype)
        self.x0 = torch.randint(config.vocab_size, (a.batch, config.block_size), device=device)

    def loss(self, t=None):
        with train.autocast(self.device, self.dtype), train.training_attention(self.device):
            return self.model.loss(self.x0, t).mean() / self.options.block_size

    def step(self):
        loss, scaler = self.loss(), self.state.scaler
        scaler.scale(loss).backward()
        for optimizer in self.state.optimizers.values():
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.state.update(1e-4, 0.999)
        self.model.zero_grad()
        scaler.update()

    def seconds(self, f, times):
        """Of one call of f on average, after three to warm up."""
        for i in range(times + 3):
            if i == 3:
                synchronize(self.device)
                began = time.perf_counter()
            f()
        synchronize(self.device)
        return (time.perf_counter() - began) / times


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------- the checks: each returns what it has found


def loss(a, device):
    """Loss and gradient, compiled, against score_entropy of all the scores at once, both graphs."""
    told = []
    for graph in "absorb", "uniform":
        b = Bench(a, device, graph, compiled=a.compiled)
        model, x0 = b.model, b.x0[:2]
        sigma, _ = model.noise(torch.tensor([0.3, 0.8], device=device))
        x = model.graph.sample_transition(x0, sigma[:, None])
        results = []
        for way in "rows", "plain":
            with train.autocast(device, b.dtype), train.training_attention(device):
                if way == "rows":
                    entropy = model(x, sigma, x0).mean()
                else:
                    entropy = model.graph.score_entropy(model(x, sigma), sigma[:, None], x, x0).mean()
            results.append([entropy.detach(), *torch.autograd.grad(entropy, model.parameters())])
        value = abs(results[0][0] / results[1][0] - 1).item()
        gradient = max(((p - q).norm() / q.norm()).item() for p, q in zip(*results) if q.norm() > 0)
        assert value < 1e-3 and gradient < 0.05, f"{graph}: loss off by {value:.1e}, a gradient by {gradient:.1e}"
        told.append(f"{graph} {value:.0e}, {gradient:.0e}")
    return "; ".join(told)


def attention(a, device):
    """Which of its kernels scaled_dot_product_attention takes for training. (MPS cannot tell.)"""
    b = Bench(a, device, compiled=False)
    c = b.model.config
    q = torch.empty(1, c.n_head, c.block_size, c.n_embd // c.n_head, device=device, dtype=b.dtype, requires_grad=True)
    with train.training_attention(device):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().removesuffix("_attention")


def waits(a, device):
    """Warnings by torch.cuda.set_sync_debug_mode: of a micro-batch and its update, and of a step of sampling."""
    b = Bench(a, device, compiled=a.compiled)
    counts = []
    for act, times in (b.step, 1), (lambda: b.model.generate(torch.full_like(b.x0[:2], -1), 8), 8):
        act()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                act()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(warning.message) for warning in caught) / times)
    assert counts[0] <= 1 and counts[1] <= 3, f"{counts[0]:g} a micro-batch, {counts[1]:.1f} a step of sampling"
    return f"{counts[0]:g} a micro-batch, {counts[1]:.1f} a step of sampling"


def recompilations(a, device):
    """Graphs that steps of different numbers of masked rows add after the first two, and graph breaks."""
    if not a.compiled:
        return "not compiled"
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    b = Bench(a, device)
    for i, t in enumerate(torch.linspace(0.99, 0.01, 20).tolist()):
        b.loss(torch.full((a.batch,), t, device=device)).backward()
        if i == 1:
            before = counters["stats"]["unique_graphs"]
    more, breaks = counters["stats"]["unique_graphs"] - before, sum(counters["graph_break"].values())
    assert more == breaks == 0, f"{more} compiled anew, {breaks} graph breaks"
    return f"{before} graphs, {more} more, {breaks} breaks"


def profile(a, device):
    """Milliseconds of a step and of its trunk alone; the device's idle share, by the profiler's kernels."""
    b = Bench(a, device, compiled=a.compiled)
    sigma, _ = b.model.noise(torch.full((a.batch,), 0.5, device=device))

    def trunk():
        with train.autocast(device, b.dtype), train.training_attention(device):
            b.model.trunk(b.x0, sigma).float().square().mean().backward()

    times = 20 if device.type == "cuda" else 3
    step, both, alone = (b.seconds(f, times) for f in (b.step, lambda: b.loss().backward(), trunk))
    told = f"{1e3 * step:.1f} ms a step, of which head and loss {(both - alone) / step:.0%}"
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiled:
            for _ in range(5):
                b.step()
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 5e6
        told += f", idle {max(0.0, 1 - busy / step):.0%}"
    return told


# Operations a second in 16 bits, without sparsity, as the makers give them.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
         "L4": 121e12, "T4": 65e12}  # fmt: skip


def operations(model, tokens):
    """Those of a training step that it cannot do without, as in model FLOPs utilisation."""
    c = model.config
    trunk = sum(p.numel() for name, p in model.blocks.named_parameters() if "adaLN" not in name)
    head = model.output_layer.linear.weight.numel() * (0.5 if c.graph == "absorb" and not model.causal else 1)
    return tokens * (6 * (trunk + head) + 12 * c.n_layer * c.n_embd * c.block_size)


def mfu(a, device):
    """Of 20 steps without the first three: tokens a second, memory, and the share of the card's peak."""
    b = Bench(a, device, compiled=a.compiled)
    seconds, tokens = b.seconds(b.step, 20 if device.type == "cuda" else 3), a.batch * b.options.block_size
    told = f"{1e3 * seconds:.1f} ms, {tokens / seconds:,.0f} tokens a second"
    if device.type == "cuda":
        told += f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
        name = torch.cuda.get_device_name(device)
        peak = next((peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)), None)
        if peak and b.dtype != torch.float32:
            told += f", mfu {operations(b.model, tokens) / seconds / peak:.3f}"
    return told


def sampling(a, device):
    b = Bench(a, device, compiled=False)
    b.model.eval()
    steps, prompt = (4, 64)[device.type == "cuda"], torch.full((8, b.options.block_size), -1, device=device)
    with train.autocast(device, b.dtype):
        b.model.generate(prompt, 2)
        began = time.perf_counter()
        x = b.model.generate(prompt, steps)
    low, high = x.min().item(), x.max().item()
    assert 0 <= low and high < b.model.config.vocab_size, f"tokens from {low} to {high}"
    return f"8 sequences, {1e3 * (time.perf_counter() - began) / steps:.1f} ms a step"


# ------------------------------------------------------------------------------------- and those of several processes


def launch(a, device, folder, out, script, *args, restarts=0, world=None):
    """The script under torchrun, on as many processes as there are GPUs, 2 on the CPU; it writes to folder/out.txt."""
    world = world or (torch.cuda.device_count() if device.type == "cuda" else 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
               f"--nproc-per-node={world}", f"--max-restarts={restarts}", str(script), *args]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    with open(folder / f"{out}.txt", "a") as output:
        return subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                start_new_session=True)  # fmt: skip


def options(folder, out, config, batch, *args):
    """For train.py: a model of this shape, and data of random tokens."""
    data = folder / "data" / str(config["vocab_size"])
    data.mkdir(parents=True, exist_ok=True)
    sizes = {"train": 10**6, "val": 10**4}
    for split, n in sizes.items():
        if not (data / f"{split}.bin").exists():
            np.random.default_rng(n).integers(config["vocab_size"], size=n).astype("<u2").tofile(data / f"{split}.bin")
    (data / "meta.json").write_text(json.dumps({"vocab_size": config["vocab_size"], "dtype": "<u2", "sizes": sizes}))
    shape = [f"--{name}={value}" for name, value in config.items() if name != "vocab_size"]
    return [*shape, *MORE, f"--data_dir={folder}/data", f"--dataset={data.name}", f"--batch_size={batch}",
            f"--out_dir={folder / out}", "--log_interval=1", *args]  # fmt: skip


def training(a, folder, device, out, steps, *args, **how):
    """train.py, each process with a batch of its own as large as --batch."""
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    args = options(folder, out, TINY if a.tiny else SMALL, a.batch * world, f"--max_steps={steps}",
                   f"--compile={a.compiled}", f"--device={device.type}", *args)  # fmt: skip
    return launch(a, device, folder, out, ROOT / "train.py", *args, **how)


def finish(process, folder, out, seconds=500):
    """Wait for its end, which must be a good one; what it has said."""
    try:
        status, said = process.wait(timeout=seconds), (folder / f"{out}.txt").read_text()
        assert status == 0, f"status {status}: {said[-300:]!r}"
        return said
    finally:
        end(process)


def log_of(folder, out):
    """The steps in log.jsonl so far, without a line that is being written."""
    path = folder / out / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, filter(None, lines)) if "loss" in record]


def wait_for(condition, process, folder, out, limit):
    until = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, f"ended early: {(folder / f'{out}.txt').read_text()[-300:]!r}"
        assert time.monotonic() < until, f"not within {limit} s"
        time.sleep(0.1)


def children(process):
    """Ids of the processes that torchrun has started, none after its end."""
    with contextlib.suppress(FileNotFoundError):
        return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


def end(process):
    for pid in [*children(process), process.pid]:  # each is in a session of its own, and outlives torchrun
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def worker(a, device):
    """What `by_process` starts: 10 steps under DDP, each with its share of the noise; process 0 prints the medians."""
    train.join_processes(a.device, device)
    b = Bench(a, device, compiled=a.compiled)
    torch._dynamo.config.optimize_ddp = False  # as train.py does
    network = torch.nn.parallel.DistributedDataParallel(b.model, gradient_as_bucket_view=True)
    times = []
    for step in range(13):
        torch.manual_seed(step)
        t = sedd.low_discrepancy_times(a.batch * train.WORLD)[train.RANK :: train.WORLD].to(device)
        synchronize(device)
        began = time.perf_counter()
        with train.autocast(device, b.dtype), train.training_attention(device):
            loss = b.model.loss(b.x0, t, network=network).mean()
        synchronize(device)
        middle = time.perf_counter()
        loss.backward()
        synchronize(device)
        times.append([middle - began, time.perf_counter() - middle])
        b.model.zero_grad()
    gathered = [None] * train.WORLD
    torch.distributed.all_gather_object(gathered, torch.tensor(times[3:]).median(0).values.tolist())
    if train.RANK == 0:
        print(json.dumps(gathered))
    time.sleep(0.2)  # as in train.main
    torch.distributed.destroy_process_group()


def nccl(a, device, folder):
    """The very lines that eight GPUs run, on as many as there are: ten steps, an evaluation, a checkpoint, a resume."""
    for steps, start in (10, "scratch"), (12, "resume"):
        process = training(a, folder, device, "nccl", steps, f"--init_from={start}", "--eval_interval=5")
        said = finish(process, folder, "nccl")
    assert "steps 10 to 12" in said and said.count(" bound ") == 3, said[-300:]
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    return f"{world} x {device.type}: steps 0 to 10 and 10 to 12, loss {log_of(folder, 'nccl')[-1]['loss']:.3f}"


PLAIN = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_float32_matmul_precision = lambda precision: None  # the highest, so that only the order of sums differs
import sedd
if "LOST" in os.environ and os.environ["RANK"] == "1":
    loss = sedd.SEDD.loss
    sedd.SEDD.loss = lambda self, *args, **more: 0 * loss(self, *args, **more)
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def shared_card(a, device, folder):
    """Several processes on one card, by gloo: how far their weights are from those of one with the whole batch."""
    (folder / "plain.py").write_text(PLAIN)
    card = "cuda:0" if device.type == "cuda" else device.type
    several = {
        "one": (1, {}), "two": (2, {}), "four": (4, {}), "micro": (2, {"micro_batch_size": 1}), "lost": (2, {}),
        **({"one compiled": (1, {"compile": True}), "two compiled": (2, {"compile": True})} if a.compiled else {}),
    }  # fmt: skip
    weights, far = {}, {}
    for name, (world, more) in several.items():
        out, more = name.replace(" ", "_"), {"compile": False, "dtype": "float32", "learning_rate": 2e-3, **more}
        args = options(folder, out, TINY, 8, "--max_steps=5", f"--device={card}", *(f"--{k}={v}" for k, v in more.items()))
        with mock.patch.dict(os.environ, {"LOST": ""} if name == "lost" else {}):
            process = launch(a, device, folder, out, folder / "plain.py", *args, world=world)
        finish(process, folder, out)
        weights[name] = torch.load(folder / out / "ckpt.pt", map_location="cpu", weights_only=True)["model"]
        alone = weights["one compiled" if "compiled" in name else "one"]
        far[name] = max((weights[name][key] - p).abs().max().item() for key, p in alone.items())
    assert far["lost"] > 1e-3, f"a gradient that is left out is not seen: {far['lost']:.0e}"
    told = ", ".join(f"{name} {distance:.0e}" for name, distance in far.items() if not name.startswith("one"))
    assert all(distance < 1e-4 for name, distance in far.items() if name != "lost"), told
    return told


def by_process(a, device, folder):
    """Milliseconds of forward and of backward pass in each process, medians of 10 steps."""
    args = f"--worker --device={device.type} --batch={a.batch}".split() + ["--tiny"] * a.tiny
    said = finish(launch(a, device, folder, "by_process", __file__, *args), folder, "by_process")
    passes = json.loads(said.splitlines()[-1])
    return "; ".join(f"{1e3 * forward:.1f} + {1e3 * backward:.1f}" for forward, backward in passes)


def together(a, device, folder):
    """Steps of all processes: milliseconds, and gradients that all have."""
    finish(training(a, folder, device, "together", 20), folder, "together")
    records = log_of(folder, "together")
    assert all(np.isfinite([record["loss"], record["norm"]]).all() for record in records), records
    milliseconds = sorted(record["ms"] for record in records[5:])
    median = milliseconds[len(milliseconds) // 2]
    return f"median {median} ms a step, slowest {milliseconds[-1]}, loss {records[-1]['loss']:.3f}"


def failing(a, device, folder):
    """One process is killed: seconds until torchrun and all others have ended."""
    process = training(a, folder, device, "failing", 10**6)
    try:
        wait_for(lambda: len(log_of(folder, "failing")) >= 3, process, folder, "failing", 200)
        os.kill(children(process)[-1], signal.SIGKILL)
        began = time.monotonic()
        status = process.wait(timeout=60)
        seconds = time.monotonic() - began
        assert status != 0 and seconds < 45, f"status {status} after {seconds:.0f} s"
        return f"all ended after {seconds:.1f} s, status {status}"
    finally:
        end(process)


def restart(a, device, folder):
    """One process is killed, and torchrun starts all again: from which step it goes on."""
    process = training(a, folder, device, "restart", 10**6, "--save_interval=3", "--init_from=auto", restarts=1)
    checkpoint, log = folder / "restart/ckpt.pt", folder / "restart/log.jsonl"
    try:
        wait_for(checkpoint.exists, process, folder, "restart", 200)
        before = children(process)
        os.kill(before[-1], signal.SIGKILL)
        wait_for(lambda: set(children(process)) - {*before}, process, folder, "restart", 60)

        def starts():  # the step of each
            return re.findall(r"tokens a step, steps (\d+) to ", (folder / "restart.txt").read_text())

        wait_for(lambda: len(starts()) == 2, process, folder, "restart", 120)
        step = starts()[1]
        assert int(step) >= 3, f"started again at step {step}"
        wait_for(lambda: '"loss"' in log.read_text().split('"options"')[-1], process, folder, "restart", 120)
        return f"went on from step {step}"
    finally:
        end(process)


CHECKS = {  # name: what the line should be
    "nccl": "steps 0 to 10 and 10 to 12: eight GPUs start as this one does",
    "shared_card": "below 1e-4 but for `lost`, a process whose gradient is left out: above 1e-3",
    "loss": "compiled against plain: loss to 1e-3, gradients to 5e-2 (bfloat16)",
    "attention": "flash or cudnn (CPU: math)",
    "waits": "at most 1 a micro-batch, 2 a step of sampling (and a few once, here shared by 8 steps)",
    "recompilations": "2 graphs or 3, 0 more, 0 breaks",
    "profile": "head and loss below a third, idle below 10%",
    "mfu": "H100 and A100: 0.35 and more is good, 0.5 very good; eager 0.25",
    "sampling": "every token one of the vocabulary",
    "by_process": "every process within a tenth of the others, forward and backward",
    "together": "slowest within a tenth of the median",
    "failing": "all ended within 45 s (torchrun gives 30 to those that wait for the dead), a status other than 0",
    "restart": "went on from step 3 or later",
}


SEVERAL = "nccl", "shared_card", "by_process", "together", "failing", "restart"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, not compiled, to try the script out")
    parser.add_argument("--batch", type=int, default=32, help="sequences a process holds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS])
    a = parser.parse_args()
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU here, so nothing was run (--device=cpu --tiny tries out what a CPU can)")
    device = train.find_device(a.device)
    a.compiled = not a.tiny and train.can_compile(device)
    if a.worker:
        return worker(a, device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = str(train.find_dtype("auto", device)).removeprefix("torch.")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
    print(f"{device} ({card}), {max(1, torch.cuda.device_count())} of them, {dtype}\n")
    print("| check | found | should be | seconds |\n" + "|---" * 4 + "|")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in a.only:
            began, several = time.monotonic(), name in SEVERAL
            if name == "waits" and device.type != "cuda":
                continue
            gc.collect()  # a compiled model is a cycle, and other processes need its memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                found = globals()[name](a, device, *([Path(folder)] if several else []))
            except Exception as error:  # one fault is not to hide the others
                failed += 1
                found = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"| {name} | {found} | {CHECKS[name]} | {time.monotonic() - began:.0f} |", flush=True)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
