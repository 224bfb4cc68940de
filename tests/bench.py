"""How fast, and how near to the limit of this machine: python tests/bench.py [--help], on CUDA or on CPU.

Every figure is the median of several measurements, and beside each one the matmul rate of the machine is measured
anew, for it drifts: the ceiling. It is the rate of the model's own products, forward and backward, alone.

utilisation = necessary work / (seconds x ceiling), the necessary work of a training step being
    6 x trunk parameters x tokens + 12 x n_layer x n_embd x block_size x tokens
    + 6 x head parameters x tokens with a loss (absorbing graph: half of them on average, uniform: all).
"""

import argparse
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sedd import SEDD, SEDDConfig, diffusion_loss, low_discrepancy_times, sample  # noqa: E402
from train import autocast, find_device, training_attention  # noqa: E402

SHAPES = {  # name: batch, vocabulary, and n_layer, n_head, n_embd, cond_dim, block_size
    "gpt2-small": (1, 50257, dict(block_size=1024)),
    "char": (32, 65, dict(block_size=256, n_layer=6, n_head=6, n_embd=384)),
    "tiny": (4, 65, dict(block_size=64, n_layer=2, n_head=2, n_embd=64)),  # to try the script out
}


def seconds(f, device):
    """One call of f, with everything it started on the device."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(), f(), end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def peak_memory(f, device):
    """Bytes by which f raises the peak of what all tensors hold over what they hold before it.

    On the CPU too: the memory that the system gives a process has gaps, and can be 170 or 820 MB for the same loss.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


class Bench:
    """A model of one shape on random tokens, and what can be timed of it."""

    def __init__(self, shape, graph, dtype, compile, device, batch=None, **changes):
        self.batch, vocab_size, config = SHAPES[shape]
        self.batch = batch or self.batch
        torch.manual_seed(0)
        self.config = SEDDConfig(vocab_size, graph=graph, dropout=0.0, **{**config, **changes})
        self.device, self.dtype = device, dtype
        self.model = model = SEDD(self.config).to(device)
        for p in model.parameters():  # gates and head are zero at first, and products with zero may be quicker
            torch.nn.init.normal_(p, std=0.02)
        if compile:
            model.compile()
        self.parameters = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        L = self.config.block_size
        self.x0 = torch.randint(vocab_size, (self.batch, L), device=device)
        # of the necessary work half the positions count: let just that many be noised
        self.t = torch.full((self.batch,), 0.5, device=device) if self.batch == 1 \
            else low_discrepancy_times(self.batch, device)  # fmt: skip
        self.sigma, _ = model.noise(self.t)
        self.x = model.graph.sample_transition(self.x0, self.sigma[:, None])

    def plain(self, x, sigma, x0):
        """The loss by its definition: every logit of every position at once, for autograd to remember."""
        return self.model.graph.score_entropy(self.model(x, sigma), sigma[:, None], x, x0)

    def trunk(self):
        with autocast(self.device, self.dtype), training_attention(self.device):
            features = self.model.trunk(self.x, self.sigma)
        features.float().square().mean().backward()
        self.optimizer.zero_grad()

    def loss(self, model):
        with autocast(self.device, self.dtype), training_attention(self.device):
            loss = diffusion_loss(model, self.model.graph, self.model.noise, self.x0, self.t, self.x).mean()
        loss.backward()

    def step(self, model):
        self.loss(model)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1e-4)

    def bare_forward(self):
        with torch.no_grad(), autocast(self.device, self.dtype):
            self.model.trunk(self.x, self.sigma)

    def sample(self, sampler, steps):
        with autocast(self.device, self.dtype):
            sample(self.model, self.model.graph, self.model.noise, torch.full_like(self.x, -1), steps, sampler)

    def work(self):
        """Floating point operations that a training step cannot do without."""
        c, tokens = self.config, self.x.numel()
        trunk = sum(p.numel() for name, p in self.model.blocks.named_parameters() if "adaLN" not in name)
        head = self.model.output_layer.linear.weight.numel()
        lossy = tokens * (0.5 if c.graph == "absorb" else 1)
        return 6 * trunk * tokens + 12 * c.n_layer * c.n_embd * c.block_size * tokens + 6 * head * lossy

    def ceiling(self):
        """Operations a second of the model's products alone: for each weight, forward and both backward ones."""
        c, d = self.config, self.config.n_embd
        operations = total = 0
        for rows, n, m, times in [(self.x.numel(), d, d, c.n_layer), (self.x.numel(), d, 3 * d, c.n_layer),
                                  (self.x.numel(), d, 4 * d, 2 * c.n_layer)]:  # fmt: skip
            h, W, g = (torch.randn(s, device=self.device, dtype=self.dtype) for s in ((rows, n), (m, n), (rows, m)))
            products = [lambda: h @ W.T, lambda: g @ W, lambda: g.T @ h]
            for product in products:
                product()
            total += times * sum(statistics.median(seconds(p, self.device) for _ in range(5)) for p in products)
            operations += times * 3 * 2 * rows * n * m
        return operations / total


def medians(measures, reps, warm_up=2):
    """Calls the measures in turn, reps times, and takes each one's median; also of the ratios to the first."""
    for _ in range(warm_up):
        for measure in measures:
            measure()
    rows = [[measure() for measure in measures] for _ in range(reps)]
    return [statistics.median(column) for column in zip(*rows)], rows


def bench_training(a, device):
    print("\nTraining: forward, backward, clipping, AdamW and EMA. plain: the same with the loss by its definition.")
    print("head: what head and loss add to the trunk's forward and backward, over what they add on the plain path.")
    print(
        "Not compiled, head and loss are slower: a few rows at a time, each of whose terms goes to memory and back.\n"
    )
    print("| shape | graph | dtype | compiled | s / step | tokens / s | ceiling, GFLOP/s | utilisation | plain / this | "
          "head | peak MB, this | peak MB, plain |\n" + "|---" * 12 + "|")  # fmt: skip
    for shape in a.shapes:
        for dtype in a.dtypes:
            for graph in "absorb", "uniform":
                for compiled in a.compiled:
                    b = Bench(shape, graph, getattr(torch, dtype), compiled, device)
                    timed = lambda f, *args: lambda: seconds(lambda: f(*args), device)
                    measures = [b.ceiling, timed(b.step, b.model), timed(b.step, b.plain), timed(b.trunk),
                                timed(b.loss, b.model), timed(b.loss, b.plain)]  # fmt: skip
                    (_, step, *_), rows = medians(measures, a.reps)
                    median = lambda f: statistics.median(f(*row) for row in rows)
                    b.optimizer.zero_grad()
                    memory = [peak_memory(lambda: b.step(m), device) / 1e6 for m in (b.model, b.plain)]
                    print(f"| {shape} {b.batch} x {b.config.block_size} | {graph} | {dtype} | {'yes' if compiled else 'no'} "
                          f"| {step:.3f} | {b.x.numel() / step:,.0f} | {median(lambda c, *_: c) / 1e9:,.0f} "
                          f"| {median(lambda c, s, *_: b.work() / s / c):.2f} | {median(lambda c, s, p, *_: p / s):.2f} "
                          f"| {median(lambda c, s, p, t, l, q: (l - t) / (q - t)):.2f} "
                          f"| {memory[0]:,.0f} | {memory[1]:,.0f} |", flush=True)  # fmt: skip
                    del b, measures


def bench_sampling(a, device):
    print("\nSampling, 1 sequence: the mean step over one bare forward of the trunk.\n")
    print("| shape | graph | dtype | sampler | steps | s / step | s / bare forward | ratio |\n" + "|---" * 8 + "|")
    for shape in a.shapes:
        for graph in "absorb", "uniform":
            b = Bench(shape, graph, getattr(torch, a.dtypes[0]), False, device, batch=1)
            for sampler in "tweedie", "euler":
                bare = lambda: seconds(b.bare_forward, device)
                run = lambda: seconds(lambda: b.sample(sampler, a.steps), device) / a.steps
                rows = [(bare(), bare(), run(), bare()) for _ in range(max(1, a.reps // 3))]
                rows = [((r[1] + r[3]) / 2, r[2]) for r in rows]
                forward, step = (statistics.median(column) for column in zip(*rows))
                print(f"| {shape} 1 x {b.config.block_size} | {graph} | {a.dtypes[0]} | {sampler} | {a.steps} | {step:.4f} "
                      f"| {forward:.4f} | {statistics.median(s / f for f, s in rows):.2f} |", flush=True)  # fmt: skip


def bench_loss_memory(a, device):
    print(
        "\nPeak memory of one forward and backward of the loss with 1 block of GPT-2-small shape, over that of its trunk.\n"
    )
    print("| batch | graph | dtype | trunk, MB | with head and loss, MB | head and loss, MB |\n" + "|---" * 6 + "|")
    for graph in "absorb", "uniform":
        for batch in 8, 16:
            b = Bench("gpt2-small", graph, getattr(torch, a.dtypes[0]), False, device, batch=batch, n_layer=1)
            peaks = []
            for f in b.trunk, lambda: b.loss(b.model):
                f()  # what is allocated once and for all
                b.optimizer.zero_grad()
                peaks.append(peak_memory(f, device) / 1e6)
                b.optimizer.zero_grad()
            print(f"| {batch} x 1024 x 50,258 | {graph} | {a.dtypes[0]} | {peaks[0]:,.0f} | {peaks[1]:,.0f} "
                  f"| {peaks[1] - peaks[0]:,.0f} |", flush=True)  # fmt: skip


def bench_graph_breaks(a, device):
    found = torch._dynamo.utils.counters["graph_break"]
    breaks = []
    for graph in "absorb", "uniform":
        b = Bench(a.shapes[-1], graph, getattr(torch, a.dtypes[0]), True, device)
        before = sum(found.values())
        b.loss(b.model)
        breaks.append(sum(found.values()) - before)
    print(f"\nGraph breaks in the compiled blocks and loss: absorb {breaks[0]}, uniform {breaks[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["gpt2-small", "char"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--compiled", nargs="+", type=int, choices=[0, 1], default=[0, 1], help="1: torch.compile")
    parser.add_argument("--reps", type=int, default=7, help="measurements behind each median")
    parser.add_argument("--steps", type=int, default=128, help="of sampling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", default=["training", "sampling", "memory", "breaks"])
    a = parser.parse_args()
    device = find_device(a.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device} ({name})")
    parts = {"training": bench_training, "sampling": bench_sampling, "memory": bench_loss_memory,
             "breaks": bench_graph_breaks}  # fmt: skip
    for part in a.only:
        parts[part](a, device)


if __name__ == "__main__":
    main()
