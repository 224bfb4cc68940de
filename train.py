"""Train a score network: python train.py, or torchrun --nproc_per_node=8 train.py config/owt.py"""

import contextlib
import copy
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import Amount, Count, Fraction, Seed, Whole, fail, parse, progress, run
from prepare import Tokenizer
from sedd import GRAPHS, MODELS, NOISES, SEDD, SEDDConfig, load_weights


@dataclass
class Options:
    """Train SEDD. Example: python train.py --dataset=shakespeare_char --max_steps=5000 --graph=uniform"""

    # data and output
    dataset: str = "pydocs"  # a folder below data_dir, written by prepare.py
    data_dir: str = "data"  # where prepare.py put it
    out_dir: str = "out"  # for ckpt.pt and log.jsonl
    init_from: str = "scratch"  # resume: out_dir/ckpt.pt; auto: that or scratch; a checkpoint, folder or hub id
    # model
    graph: Literal[tuple(GRAPHS)] = "absorb"  # what noise turns a token into: MASK, or any token
    noise: Literal[tuple(NOISES)] = "loglinear"  # how noise grows with time
    parameterization: Literal[tuple(MODELS)] = "score"  # what is learned: SEDD, D3PM, or GPT
    block_size: Count = 128  # tokens in a sequence
    n_layer: Count = 4  # transformer blocks
    n_head: Count = 2  # attention heads
    n_embd: Count = 128  # width
    cond_dim: Count = 64  # width of the embedding of sigma
    dropout: Fraction = 0.0  # on the branches of the blocks
    # optimisation
    times: Literal["uniform", "logit_normal"] = "logit_normal"  # draws of t: the paper's, or more around 1/2
    max_steps: Count = 1250  # optimiser steps
    batch_size: Count = 32  # sequences a step, over all processes and micro-batches
    micro_batch_size: Whole = 0  # sequences a process holds at a time; 0: its whole share of the batch
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the blocks' matrices, and AdamW for the rest
    learning_rate: Amount = 1.2e-2  # of both, after the warm-up
    warmup_steps: Whole = 50  # steps of linear growth from 0
    decay_lr: Literal["linear", "cosine", "none"] = "linear"  # how it then falls to 0 at max_steps; none: not
    weight_decay: Amount = 0.0  # of both optimisers
    beta2: Fraction = 0.98  # memory of AdamW for the size of gradients
    grad_clip: Amount = 1.0  # largest norm of the gradient; 0: any
    ema: Fraction = 0.999  # decay of the averaged weights, which are evaluated and sampled
    seed: Seed = 1337  # of the weights, batches, times, noise and dropout
    # evaluation and checkpoints
    eval_only: bool = False  # print the bound of the start weights and stop
    eval_split: Literal["val", "test", "train"] = "val"  # what is evaluated
    eval_interval: Count = 500  # steps between evaluations
    eval_sequences: Whole = 128  # sequences evaluated, evenly spread over the split; 0: all of it
    eval_times: Count = 8  # times per sequence in the bound's integral
    save_interval: Count = 500  # steps between checkpoints
    log_interval: Count = 10  # steps between lines of log.jsonl
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matmuls; auto: what is fast here
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile; auto: where it works, for 500 steps or more


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Training leaves out the first thousandth of time, where the uniform graph's rare losses explode.
T_MIN = 1e-3

# Operations a second in 16 bits, without sparsity, as the makers give them.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
         "L4": 121e12, "T4": 65e12}  # fmt: skip

OF_THE_FILES = "source", "dtype", "sizes", "bytes"  # what meta.json tells of these files and not of the tokens
SHAPE = [field.name for field in fields(SEDDConfig) if hasattr(Options, field.name)]

# -------------------------------------------------------------------------------------------------- machine


def find_device(name):
    """The torch.device that `name` means here; fails where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # each process that torchrun starts on this machine has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:
        fail(f"device={name!r} is not to be had here: try --device=auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "cpu":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # a switch of SDPA on all devices
        if sys.platform == "linux":  # keep freed memory: fetching it anew is a tenth of a large step
            for parameter, value in (-4, 0), (-1, 2**31 - 1):  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
                ctypes.CDLL(None).mallopt(parameter, value)
    return device


def find_dtype(name, device):
    """bfloat16 on CUDA and on CPUs with instructions for it, float16 on older GPUs, else float32."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if name == "auto":
        name = "bfloat16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "float32"
    return getattr(torch, name)


def can_compile(device):
    """Whether torch.compile finds what it needs here: a C++ compiler for the CPU, Triton for CUDA."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception:  # each missing piece has its own
        return False
    return device.type in ("cpu", "cuda")


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def training_attention(device):
    """On the CPU flash attention is the fastest forward, but its backward takes up to four times the formula's."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def join_processes():
    """Meet the other processes that torchrun has started: by gloo on the CPU, by NCCL on CUDA.

    Their store can outlive a restart, and what the dead left in it must not be taken for news. So process 0 makes a
    name for this start, and tells it to each process that has asked under a name of its own.
    """
    if "MASTER_ADDR" not in os.environ:
        fail(f"WORLD_SIZE={WORLD}, but nothing tells where the others are: start them with torchrun")
    store, name = next(dist.rendezvous("env://"))[0], os.urandom(8).hex()
    if RANK == 0:
        while store.add(name, 0) < WORLD - 1:
            for key in (f"name of {rank}" for rank in range(1, WORLD)):
                if store.check([key]):
                    store.set(store.get(key).decode(), name)
            time.sleep(0.05)
    else:
        store.set(f"name of {RANK}", name)
        name = store.get(name).decode()  # waits
        store.add(name, 1)
    dist.init_process_group(store=dist.PrefixStore(name, store), rank=RANK, world_size=WORLD)


def mixed_seed(*numbers):
    """One 63-bit seed from several small numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------- checkpoints


def load_model(start):
    """A trained model (on the CPU, in evaluation mode) and a dict with the meta of its data: of a run, all it saved.

    `start` is a checkpoint or a run's folder, whose averaged weights are taken, or else a folder or hub repository in
    the published format, where only GPT-2's tokens are known. Fails in one line at anything else.
    """
    path = Path(start) if os.path.isfile(start) or Path(start).name == "ckpt.pt" else Path(start) / "ckpt.pt"
    if not os.path.isfile(path):  # False for what no file can be called
        if path == Path(start):
            fail(f"there is no checkpoint {path}: train one first, python train.py --out_dir={path.parent}")
        try:
            model = SEDD.from_pretrained(start)
        except Exception as error:  # each layer, from the hub to the tensors, has its own
            install = ": pip install -e '.[hub]'" if isinstance(error, ImportError) else ""
            fail(f"{start!r} is no run, and no folder or hub repository with a model: {type(error).__name__}: "
                 f"{str(error)[:300]}{install}")
        V = model.config.vocab_size
        return model, {"meta": {"vocab_size": V} | ({"tokenizer": "gpt2"} if V == 50257 else {})}
    try:
        checkpoint = load_weights(path)
        config = SEDDConfig(**checkpoint["config"])
        model = MODELS[config.parameterization](config)
        model.load_state_dict(checkpoint["ema"])
        check_finite(checkpoint["ema"])
    except Exception as error:  # whatever is wrong with its content
        fail(f"{path} is no checkpoint of train.py, is of another version, or is cut short ({repr(error)[:200]})")
    return model.eval(), checkpoint


def check_finite(*parts):
    if not all(tensor.isfinite().all() for part in parts for tensor in part.values()):
        raise ValueError("its numbers are not all finite")


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with all matrices of one shape in one go, and in bfloat16 only where that is fast.

    A CPU that has no instructions for bfloat16 would spend four fifths of a training step in here.
    """

    dtype = torch.bfloat16

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        a, b, c = group["ns_coefficients"]
        for m, n in {p.shape for p in group["params"]}:
            matrices = [p for p in group["params"] if p.shape == (m, n)]
            gradients = [p.grad for p in matrices]
            means = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            X = torch.stack(torch._foreach_lerp(gradients, means, momentum)).to(self.dtype)  # Nesterov's look ahead
            X = X.mT if m > n else X
            X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            for _ in range(group["ns_steps"]):  # each brings the singular values nearer to 1: s to a s + b s^3 + c s^5
                A = X @ X.mT
                X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
            X = (X.mT if m > n else X).to(gradients[0].dtype)
            torch._foreach_mul_(matrices, 1 - lr * decay)
            torch._foreach_add_(matrices, list(X), alpha=-lr * 0.2 * max(m, n) ** 0.5)  # as large a move as AdamW's


class State:
    """What training changes and a checkpoint keeps: weights, their average, what the optimisers remember, the step.

    The optimiser is AdamW, as in the paper; or Muon for the matrices of the blocks, and AdamW for the rest. AdamW
    scales each number of its mean gradient by itself. Muon makes that of a matrix nearly orthogonal, so that it moves
    in all directions alike. Scaled to the size of AdamW's moves, it takes the same learning rate.
    """

    def __init__(self, model, o, dtype=torch.float32, checkpoint=None):
        """`checkpoint`: what to go on with; `model` has its average already."""
        self.model, self.average, self.step = model, copy.deepcopy(model).eval().requires_grad_(False), 0
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=dtype == torch.float16)
        named = model.blocks.named_parameters() if o.optimizer == "muon" else []
        matrices = dict.fromkeys(p for name, p in named if p.ndim == 2 and "adaLN" not in name)
        rest = [p for p in model.parameters() if p not in matrices]
        adamw = torch.optim.AdamW(rest, 0.0, (0.9, o.beta2), weight_decay=o.weight_decay, fused=True)
        self.optimizers = {"adamw": adamw}
        if matrices:
            self.optimizers["muon"] = Muon([*matrices], 0.0, o.weight_decay)
            self.optimizers["muon"].dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        if checkpoint:
            self.step = checkpoint["step"]
            model.load_state_dict(checkpoint["model"])
            self.scaler.load_state_dict(checkpoint["scaler"] or self.scaler.state_dict())  # empty: not of float16
            for name, optimizer in self.optimizers.items():
                # what it remembers, but with the options that were given now
                optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"][name]["state"]})

    def update(self, lr, ema):
        """One step of the optimisers, with the gradients that there are, and of the average."""
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        # a young average forgets faster, or it would remember the random start
        weight = 1 - min(ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_([*self.average.parameters()], [*self.model.parameters()], weight)

    def save(self, path, o, meta):
        """Write to another name and rename: whenever the machine stops, `path` is a whole checkpoint.

        Returns whether it is saved. If not (a full disk, numbers that are not finite) it says why, and `path` stays.
        """
        scratch = path.with_name(f".{path.name}.partial")
        checkpoint = {
            "step": self.step, "model": self.model.state_dict(), "ema": self.average.state_dict(),
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.model.config), "options": asdict(o), "meta": meta,
        }  # fmt: skip
        moments = [moment for optimizer in self.optimizers.values() for moment in optimizer.state.values()]
        try:
            check_finite(checkpoint["model"], checkpoint["ema"], *moments)
            with open(scratch, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name without the content
            os.replace(scratch, path)
        except (OSError, RuntimeError, ValueError) as error:  # torch.save turns the first into the second
            scratch.unlink(missing_ok=True)
            tqdm.write(f"warning: step {self.step} was not saved ({error}); {path} is what it was", sys.stderr)
            return False
        return True


# ----------------------------------------------------------------------------------------------------- data


class Data:
    """One data set's memory-mapped tokens, cut into blocks."""

    def __init__(self, o):
        folder = self.folder = Path(o.data_dir) / o.dataset
        self.block_size, self.splits, self.bytes = o.block_size, {}, {}
        try:
            if (folder / "train.bin").is_file() and not [*folder.glob("meta.*")]:  # nanoGPT's, of GPT-2's tokens
                self.meta = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "<u2"}
            else:
                self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size = self.meta["vocab_size"]
            for name in [o.eval_split] if o.eval_only else ["train", o.eval_split]:
                tokens = self.splits[name] = np.memmap(folder / f"{name}.bin", self.meta["dtype"], "r")
                if self.meta.get("sizes", {name: len(tokens)})[name] != len(tokens):
                    raise ValueError(f"{name}.bin does not hold the {self.meta['sizes'][name]} tokens of meta.json")
                # of the original text, in a token; 0 where nothing tells
                self.bytes[name] = self.meta.get("bytes", {}).get(name, 0) / len(tokens)
        except FileNotFoundError as error:
            fail(f"the data set {folder} is not prepared, or not with this split (there is no {error.filename}): "
                 f"python prepare.py {o.dataset}")  # fmt: skip
        except Exception as error:
            fail(f"the data set {folder} is not readable ({error}): python prepare.py {o.dataset}")
        name, tokens = min(self.splits.items(), key=lambda split: len(split[1]))
        if len(tokens) < o.block_size:
            fail(f"{folder}/{name}.bin has {len(tokens)} tokens, fewer than one block: "
                 f"try --block_size={max(1, len(tokens) // 2)}, or a longer text")  # fmt: skip

    def read(self, split, starts):
        """The blocks (B, L) that begin at starts (B,); fails in one line at a token that the vocabulary lacks."""
        places = starts[:, None] + np.arange(self.block_size)
        x0 = torch.from_numpy(self.splits[split][places].astype(np.int64))
        if x0.max() >= self.vocab_size:
            fail(f"{self.folder} has a token {x0.max()} beyond its vocabulary: python prepare.py {self.folder.name}")
        return x0

    def batch(self, o, step, model, pin=False):
        """This process's share of a step's batch in micro-batches (x0 (B, L), times t (B,), noised x (B, L)).

        All of it is a pure function of (seed, step). A share is every WORLD-th sequence, a micro-batch every n-th of
        these: as the times are spread over the batch, each has its part of every noise level, and none more work than
        the others. `pin` is for CUDA, which fetches what lies in pinned memory without waiting.

        The times of the batch are one low-discrepancy set: uniform, or pushed towards 1/2, to where most of the
        learning is (arXiv 2605.13026). That changes how much each noise level counts in the training loss, which then
        is no bound on the likelihood; `evaluate` always estimates the paper's integral over even times.
        """
        generator = torch.Generator().manual_seed(mixed_seed(o.seed, step))
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        t = 1 - (shift + torch.arange(o.batch_size) / o.batch_size) % 1
        if o.times == "logit_normal":
            t = torch.sigmoid(torch.special.ndtri(t.clamp(max=1 - 1e-6)))
        t = (T_MIN + (1 - T_MIN) * t).float()
        choices = len(self.splits["train"]) - o.block_size + 1
        x0 = self.read("train", torch.randint(choices, (o.batch_size,), generator=generator).numpy())
        x = model.graph.sample_transition(x0, model.noise(t)[0][:, None], generator)
        share = x0[RANK::WORLD], t[RANK::WORLD], x[RANK::WORLD]
        n = math.ceil(len(share[0]) / (o.micro_batch_size or o.batch_size))
        parts = [[tensor[i::n].contiguous() for tensor in share] for i in range(n)]
        return [[tensor.pin_memory() for tensor in part] for part in parts] if pin else parts


# ----------------------------------------------------------------------------------------------- evaluation


def evaluate(model, data, o, device, dtype, name, tell=False):
    """Mean likelihood bound (exact for GPT) over blocks of a split, and its standard error, in nats per token.

    Prints them after `name`, and returns them under the names that they have in the log. Sequences, times and noise are
    the same at every call and for every number of processes.
    """
    tokens, L = data.splits[o.eval_split], o.block_size
    total = len(tokens) // L
    rows = np.unique(np.linspace(0, total - 1, o.eval_sequences or total).astype(int))
    if tell:
        print(f"{data.folder}, {o.eval_split}: {len(rows):,} of {total:,} blocks of {L} tokens at {o.eval_times} "
              f"times; dropped at the end: {len(tokens) % L:,} tokens that fill no block")  # fmt: skip
    bounds = torch.zeros(len(rows))
    for k in progress(range(RANK, math.ceil(len(rows) / 16), WORLD), unit="batch", disable=RANK > 0 or not tell):
        torch.manual_seed(mixed_seed(o.seed, k))
        part = slice(16 * k, 16 * k + 16)
        x0 = data.read(o.eval_split, L * rows[part]).to(device)
        with autocast(device, dtype):
            bounds[part] = model.nll(x0, o.eval_times).cpu()
    if WORLD > 1:
        dist.all_reduce(bounds)
    bounds, bytes_per_token = bounds.double() / L, data.bytes[o.eval_split]
    bound, error = bounds.mean().item(), (bounds.std() / len(bounds) ** 0.5).item() if len(bounds) > 1 else math.nan
    kind, at_most = ("nll", "") if model.causal else ("bound", "≤ ")
    bits = f", {bound / bytes_per_token / math.log(2):.4f} bits per byte" if bytes_per_token > 0 else ""
    tqdm.write(f"{name} {kind} {bound:.4f} ± {error:.4f} nats per token, perplexity {at_most}"
               f"{math.exp(min(bound, 700)):.2f}{bits}")  # fmt: skip
    return {f"{o.eval_split}_{kind}": bound, f"{o.eval_split}_error": error}


def sample_line(model, tokenizer, seed, device, dtype):
    """A short text of the model, the same noise at every call, its whitespace escaped."""
    torch.manual_seed(mixed_seed(seed))
    with autocast(device, dtype):
        x = model.generate(torch.full((1, min(64, model.config.block_size)), -1, device=device), 16)
    # scores that are not finite can leave a MASK
    return repr(tokenizer.decode(x[0].clamp(max=model.config.vocab_size - 1).tolist()))


# ------------------------------------------------------------------------------------------------- training


def learning_rate(o, step):
    warm = min(1.0, (step + 1) / max(1, o.warmup_steps))
    done = min(1.0, max(0.0, (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps)))
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "none": 1.0}[o.decay_lr]
    return o.learning_rate * warm * left


def attention_kernel(model, device, dtype):
    """Which of its kernels scaled_dot_product_attention takes for training here."""
    c = model.config
    q = torch.empty(1, c.n_head, c.block_size, c.n_embd // c.n_head, device=device, dtype=dtype, requires_grad=True)
    with training_attention(device):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().removesuffix("_attention")


def speed(o, model, seconds, device, dtype):
    """What log.jsonl tells of a step that takes so many seconds.

    mfu is the share of the card's peak, where it is known. Only such operations count as a step cannot do without.
    """
    tokens, c = o.batch_size * o.block_size, model.config
    told = {"ms": round(1000 * seconds, 1), "tokens_per_s": round(tokens / seconds)}
    if device.type == "cuda":
        told["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        name = torch.cuda.get_device_name(device)
        peak = next((peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)), None)
        if peak and dtype != torch.float32:
            trunk = sum(p.numel() for name, p in model.blocks.named_parameters() if "adaLN" not in name)
            head = model.output_layer.linear.weight.numel() * (0.5 if c.graph == "absorb" and not model.causal else 1)
            work = tokens * (6 * (trunk + head) + 12 * c.n_layer * c.n_embd * c.block_size)
            told["mfu"] = round(work / seconds / WORLD / peak, 3)
    return told


def catch_signals():
    """From now on SIGINT and SIGTERM only join the list that this returns; a SIGINT after that ends the process."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun hands on what the terminal has sent already
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if RANK == 0:
            with contextlib.suppress(OSError):  # print could be what the signal has interrupted
                os.write(2, b"\nstopping after this step\n")

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, catch)
    return caught


def open_log(o, start):
    """A function that adds a dict to log.jsonl as a line, behind the lines up to step `start`.

    The file is this process's alone until it ends. A fresh start keeps the checkpoint of an earlier run, and its
    log, under other names.
    """
    out = Path(o.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "log.jsonl", "a+b", buffering=2**20)  # where lines wait that a full disk does not take
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another training is writing to out_dir={o.out_dir!r}: wait for its end, or name another --out_dir")
    except (ImportError, OSError):  # Windows, or a file system that has no locks
        pass
    if not start and (out / "ckpt.pt").is_file():
        n = next(n for n in ["", *range(2, 10**6)] if not [*out.glob(f"*.old{n}.*")])
        (out / f"log.old{n}.jsonl").write_bytes((out / "log.jsonl").read_bytes())
        os.replace(out / "ckpt.pt", out / f"ckpt.old{n}.pt")
        print(f"the checkpoint of an earlier run is kept as {out}/ckpt.old{n}.pt")
    file.seek(0)
    steps = [(line, re.match(rb'{"step": (\d+),.*}\n', line)) for line in file]  # none where a line was cut off
    file.truncate(sum(len(line) for line, step in steps if start and step and int(step[1]) <= start))

    def log(record):
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with contextlib.suppress(OSError):
            file.write((json.dumps(record) + "\n").encode())
            file.flush()

    if start < o.max_steps:
        log({"step": start, "options": asdict(o)})
    return log


def begin(explicit, store):
    """What init_from means: options, completed by it, averaged model (None: fresh), meta, checkpoint to resume or None.

    Process 0 decides whether one is resumed: the others may see an older state of a shared disk. A restart by torchrun
    is like `auto`: the first start has moved the checkpoints of earlier runs away.
    """
    o = Options(**explicit)
    path, restarted = Path(o.out_dir) / "ckpt.pt", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if store:  # it knows better: each node counts for itself, and a start may fail before it moves anything
        restarted = store.check(["begun"])
    look = o.init_from == "auto" or restarted and not o.eval_only
    found = torch.tensor(o.init_from == "resume" or look and path.is_file())
    if WORLD > 1:
        dist.broadcast(found, 0)
    start = str(path) if found else o.init_from
    if start in ("scratch", "auto"):
        return o, None, {}, None
    if not (found or "/" in start or os.path.exists(start)):
        fail(f"init_from={start!r} is none of scratch, resume, auto, a folder, or a hub id such as owner/name")
    if not (found or o.eval_only) and Path(start).resolve() in (path.resolve(), path.parent.resolve()):
        fail(f"init_from={start!r} is out_dir as well: name another --out_dir, or --init_from=resume")
    model, checkpoint = load_model(start)
    kept = {name: getattr(model.config, name) for name in SHAPE}
    if found:
        words = [f"--{name}={value}" for name, value in checkpoint["options"].items()]
        kept |= parse(Options, argv=words, source=f"{path}: ") | {"init_from": "resume", "out_dir": o.out_dir}
    fixed = [name for name in (*SHAPE, "optimizer") if name in kept and name not in ("block_size", "dropout")]
    if other := [f"--{name}={kept[name]}" for name in fixed if explicit.get(name, kept[name]) != kept[name]]:
        fail(f"{start} was trained with other options: say {' '.join(other)}")
    return Options(**(kept | explicit)), model, checkpoint["meta"], checkpoint if found else None


def main():
    explicit = parse(Options)
    if WORLD > 1:
        join_processes()
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it outlives a restart
    store = next(dist.rendezvous("env://"))[0] if of_torchrun else None
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    o, trained, meta, checkpoint = begin(explicit, store)
    device, data = find_device(o.device), Data(o)
    dtype = find_dtype(o.dtype, device)
    if any(data.meta.get(name) != value for name, value in meta.items() if name not in OF_THE_FILES):
        fail(f"init_from={o.init_from!r} was trained on another vocabulary than {data.folder} has: name its data set")
    try:
        torch.manual_seed(o.seed)
        model = MODELS[o.parameterization](SEDDConfig(data.vocab_size, **{name: getattr(o, name) for name in SHAPE}))
    except ValueError as error:
        fail(error)
    if trained:
        model.load_state_dict(trained.state_dict())
    model.to(device)
    if o.eval_only:
        name = f"step {checkpoint['step']}" if checkpoint else o.init_from if trained else "step 0"
        evaluate(model.eval(), data, o, device, dtype, f"{name}:", tell=True)
        status = 0
    else:
        if o.batch_size < WORLD:
            fail(f"batch_size={o.batch_size} leaves nothing to some of {WORLD} processes: try --batch_size={WORLD}")
        state = State(model, o, dtype, checkpoint)
        log = open_log(o, state.step) if RANK == 0 else None
        if log and store:
            store.set("begun", "")
        compiled = o.compile == "True" or o.compile == "auto" and o.max_steps >= 500 and can_compile(device)
        if compiled:
            model.compile()
            torch._dynamo.config.optimize_ddp = False  # it cuts a block in two, but DDP overlaps whole ones as well
        network = model
        if WORLD > 1:
            network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {WORLD} x {device} in "
              f"{str(dtype).removeprefix('torch.')}, {attention_kernel(model, device, dtype)} attention"
              f"{', compiled' * compiled}; {o.batch_size * o.block_size:,} tokens a step, steps {state.step} to "
              f"{o.max_steps}; output in {o.out_dir}/")  # fmt: skip
        status = train(o, data, state, network, log, device, dtype)
    if WORLD > 1:
        time.sleep(0.2)  # gloo's threads may still need the interpreter, which the next line holds while it awaits them
        dist.destroy_process_group()  # here, where all arrive: one that has failed alone could wait for ever
    if status:
        sys.exit(status)


def train(o, data, state, network, log, device, dtype):
    """The steps that are left; returns the exit status."""
    model, scaler, path, tokenizer = state.model.train(), state.scaler, Path(o.out_dir) / "ckpt.pt", None
    with contextlib.suppress(OSError):  # GPT-2's BPE files are not to be had: then no text is shown
        tokenizer = Tokenizer(data.meta)
    bar = progress(total=o.max_steps, initial=state.step, unit="step", disable=RANK > 0)
    losses, seconds, in_a_row, stop, saved, caught = [], 0.0, 0, 0, True, catch_signals()
    pin = device.type == "cuda"
    batch = data.batch(o, state.step, model, pin)
    while state.step < o.max_steps and not stop:
        began = time.perf_counter()
        lr = learning_rate(o, state.step)
        torch.manual_seed(mixed_seed(o.seed, state.step, RANK + 1))  # for dropout; a last 0 would give the batch's seed
        loss = 0.0
        for i, part in enumerate(batch):
            x0, t, x = (tensor.to(device, non_blocking=pin) for tensor in part)
            network.require_backward_grad_sync = i == len(batch) - 1
            with autocast(device, dtype), training_attention(device):
                # times WORLD, for DDP takes the mean over the processes
                part_loss = model.loss(x0, t, x, network).sum() * WORLD / (o.batch_size * o.block_size)
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        batch = data.batch(o, state.step + 1, model, pin)  # while a GPU is still busy with this one
        for optimizer in state.optimizers.values():
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)

        # of all processes: loss, norm, and how many signals came
        sums = torch.stack([loss / WORLD, norm / WORLD, norm.new_full((), len(caught))])
        if WORLD > 1:
            dist.all_reduce(sums)
        loss, norm, stop = sums.tolist()
        bad = not math.isfinite(loss + norm)  # of one process, of all
        if not bad:
            state.update(lr, o.ema)
        model.zero_grad()
        # float16 begins with a scale that is too large, and steps are left out while it comes down
        in_a_row = (in_a_row + (scaler.get_scale() <= 1)) if bad else 0
        if in_a_row == 10:
            give_up(o, state.step)
        scaler.update()
        state.step += 1
        losses.append(math.nan if bad else loss)
        seconds += time.perf_counter() - began

        record, last = {}, stop or state.step == o.max_steps
        if state.step % o.log_interval == 0 or last:
            record = {"loss": torch.tensor(losses).nanmean().item(), "norm": norm, "lr": lr}
            record |= speed(o, model, seconds / len(losses), device, dtype)
            if skipped := sum(map(math.isnan, losses)):
                record["skipped"] = skipped
            bar.set_postfix(record, refresh=False)
            losses, seconds = [], 0.0
        bar.update()
        if state.step % o.eval_interval == 0 or state.step == o.max_steps:
            record |= evaluate(state.average, data, o, device, dtype, f"step {state.step}: {o.eval_split}")
            if log and tokenizer:
                bar.write(sample_line(state.average, tokenizer, o.seed, device, dtype))
        if log and record:
            log({"step": state.step} | record)
        if log and (state.step % o.save_interval == 0 or last):
            saved = state.save(path, o, data.meta)
    bar.close()
    stopped = state.step < o.max_steps
    if saved:
        print(f"{path} " + (f"holds step {state.step}: python train.py --init_from=resume --out_dir={o.out_dir} goes on"
                            if stopped else f"is ready: python sample.py --out_dir={o.out_dir}"))  # fmt: skip
    return 128 + max(caught, default=signal.SIGTERM) if stopped else int(not saved)


def give_up(o, step):
    """Ends all for good: torchrun would start again, with the same batches."""
    if RANK == 0:
        print(f"train.py: error: loss or gradient is not finite in steps {step - 8} to {step + 1}, the first with "
              f"Data.batch(o, {step - 9}, model), seed={o.seed}: try a lower --learning_rate, or another --dtype",
              file=sys.stderr)  # fmt: skip
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)
    sys.exit(1)


class Output:
    """A stream that goes quiet when it cannot be written any more: no training ends because of what it says."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.stream = open(os.devnull, "w")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    run(main, "a smaller --micro_batch_size, --block_size or model")
