"""Train a score network: python train.py, or torchrun --nproc_per_node=8 train.py config/owt.py"""

import contextlib
import copy
import ctypes
import errno
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import fail, parse, progress, run
from sedd import GRAPHS, MODELS, NOISES, SEDD, SEDDConfig, load_weights


@dataclass
class Options:
    """Train SEDD. Example: python train.py --dataset=shakespeare_char --max_steps=5000 --graph=uniform"""

    # data and output
    dataset: str = "pydocs"  # a folder below data_dir, written by prepare.py
    data_dir: str = "data"  # where prepare.py put it
    out_dir: str = "out"  # for ckpt.pt and log.jsonl
    init_from: str = "scratch"  # or resume: out_dir/ckpt.pt; auto: resume or scratch; a checkpoint, folder, hub id
    # model
    graph: Literal[tuple(GRAPHS)] = "absorb"  # what noise turns a token into: MASK, or any token
    noise: Literal[tuple(NOISES)] = "loglinear"  # how sigma, the noise, grows with time
    parameterization: Literal[tuple(MODELS)] = "score"  # SEDD learns scores, D3PM means; causal: GPT
    block_size: int = 128  # tokens in a sequence
    n_layer: int = 4  # transformer blocks
    n_head: int = 2  # attention heads
    n_embd: int = 128  # width
    cond_dim: int = 64  # width of the embedding of sigma
    dropout: float = 0.0  # on the branches of the blocks
    # optimisation
    times: Literal["uniform", "logit_normal"] = "logit_normal"  # draws of t: the paper's, or more around 1/2
    max_steps: int = 1250  # optimiser steps
    batch_size: int = 32  # sequences a step, over all processes and micro-batches
    micro_batch_size: int = 0  # sequences a process holds at a time; 0: its whole share of the batch
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the blocks' matrices, and AdamW for the rest
    learning_rate: float = 1.2e-2  # of AdamW and Muon, after the warm-up
    warmup_steps: int = 50  # steps of linear growth from 0
    decay_lr: Literal["linear", "cosine", "none"] = "linear"  # how it then falls to 0 at max_steps, if it does
    weight_decay: float = 0.0  # of AdamW and Muon
    beta2: float = 0.98  # AdamW's memory for the size of gradients
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    ema: float = 0.999  # decay of the averaged weights, which are evaluated and sampled
    seed: int = 1337  # of the weights, batches, times, noise and dropout
    # evaluation and checkpoints
    eval_only: bool = False  # print the bound of the start weights and stop
    eval_split: Literal["val", "test", "train"] = "val"  # what is evaluated
    eval_interval: int = 500  # steps between evaluations
    eval_sequences: int = 128  # sequences evaluated, evenly spread over the split; 0: all of it
    eval_times: int = 8  # times per sequence in the bound's integral
    save_interval: int = 500  # steps between checkpoints
    log_interval: int = 10  # steps between lines of log.jsonl
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the matmuls; auto: what is fast here
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile; auto: where it works, for 500 steps or more


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MAX_RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))  # by torchrun, after the loss of a process
SHAPE = [field.name for field in fields(SEDDConfig) if hasattr(Options, field.name)]

# -------------------------------------------------------------------------------------------------- machine


def find_device(name):
    """The torch.device that `name` means here, ready for training; fails where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # each process that torchrun starts on a machine has a card of its own
        if WORLD > 1 and "LOCAL_RANK" not in os.environ:
            fail("LOCAL_RANK is not set, and so nothing says which card each process takes: start them with torchrun")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # PyTorch has many, each with its reason
        fail(f"device={name!r} does not work here ({error}): start no more processes than cards, or try --device=auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "cpu":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # a switch of SDPA on all devices
        if sys.platform == "linux":  # keep freed memory: fetching it anew is a tenth of a large step
            for parameter, value in (-4, 0), (-1, 2**31 - 1):  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
                ctypes.CDLL(None).mallopt(parameter, value)
    return device


def join_processes(name, device):
    """Meet the other processes: by NCCL on CUDA, by gloo elsewhere, and where `name` is one card for several."""
    environment = os.environ
    for key in "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT":
        if key not in environment:
            fail(f"{key} is not set, and so the processes cannot meet: start them with torchrun")
    if device.type == "mps":
        fail("there is no backend by which processes could meet on MPS: start one, without torchrun")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent and MAX_RESTARTS and environment["GROUP_WORLD_SIZE"] != "1":
        fail("restarts on several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and torchrun --rdzv-backend=c10d")
    store, _, _ = next(dist.rendezvous("env://"))
    if agent:  # this store outlives a restart, with the keys of the processes that have died
        store = dist.PrefixStore(f"start {environment['TORCHELASTIC_RESTART_COUNT']}", store)
    shared = ":" in name and environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    backend, own_card = ("nccl", device) if device.type == "cuda" and not shared else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=timedelta(minutes=10),
                            device_id=own_card)  # fmt: skip


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
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def training_attention(device):
    """On the CPU flash attention is the fastest forward, but its backward takes up to four times the formula's."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def mixed_seed(*numbers):
    """One 63-bit seed from several small numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ----------------------------------------------------------------------------------------------------- data


class Data:
    """The memory-mapped tokens of a data set, cut into blocks; fails in one line where it is missing or damaged."""

    def __init__(self, o):
        folder = self.folder = Path(o.data_dir) / o.dataset
        self.block_size, self.splits = o.block_size, {}
        try:
            self.meta = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "<u2"}  # of nanoGPT, which has no meta.json
            if not (folder / "train.bin").is_file() or [*folder.glob("meta.*")]:
                self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size = self.meta["vocab_size"]
            for name in [o.eval_split] if o.eval_only else [o.eval_split, "train"]:
                path = folder / f"{name}.bin"
                if np.fromfile(path, "<i4", 1).tolist() in ([20240520], [20240801]):
                    fail(f"{path} begins with llm.c's header of 1,024 bytes, which are no tokens: cut them off")
                tokens = self.splits[name] = np.memmap(path, self.meta["dtype"], "r")
                if len(tokens) != self.meta.get("sizes", {}).get(name, len(tokens)):
                    raise ValueError(f"{path} does not hold the {self.meta['sizes'][name]} tokens of meta.json")
                if len(tokens) < o.block_size:
                    fail(f"{path} has {len(tokens)} tokens, fewer than one block: "
                         f"try --block_size={max(1, len(tokens) // 2)}, or a longer text")  # fmt: skip
        except Exception as error:
            fail(f"the data set {folder} is not prepared, or is damaged ({error}): python prepare.py {o.dataset}")

    def read(self, split, starts):
        """The blocks (B, L) that begin at starts (B,); fails in one line at a token that the vocabulary lacks."""
        places = starts[:, None] + np.arange(self.block_size)
        x0 = torch.from_numpy(self.splits[split][places].astype(np.int64))
        if x0.max() >= self.vocab_size:
            fail(f"{self.folder} has a token {x0.max()} beyond its vocabulary of {self.vocab_size}: prepare it again")
        return x0

    def batch(self, o, step, model, pin=False):
        """This process's share of a step's batch in micro-batches (x0 (B, L), times t (B,), noised x (B, L)).

        It depends on seed and step alone. A share is every WORLD-th sequence, a micro-batch every n-th of these: so
        each has its part of every noise level. `pin` is for CUDA, which need not wait for what is in pinned memory.

        The times of a batch are one low-discrepancy set: uniform, or pushed towards 1/2, where most of the learning is
        (arXiv 2605.13026). Then the loss is no bound on the likelihood; `evaluate` always takes the paper's integral.
        """
        generator = torch.Generator().manual_seed(mixed_seed(o.seed, step))
        t = 1 - (torch.rand((), generator=generator) + torch.arange(o.batch_size) / o.batch_size) % 1
        if o.times == "logit_normal":
            t = torch.sigmoid(torch.special.ndtri(t.clamp(max=1 - 1e-6)))
        t = 1e-3 + (1 - 1e-3) * t  # below 1e-3 the uniform graph's rare losses explode
        choices = len(self.splits["train"]) - o.block_size + 1
        x0 = self.read("train", torch.randint(choices, (o.batch_size,), generator=generator).numpy())
        x = model.graph.sample_transition(x0, model.noise(t)[0][:, None], generator)
        share = x0[RANK::WORLD], t[RANK::WORLD], x[RANK::WORLD]
        n = math.ceil(len(share[0]) / (o.micro_batch_size or o.batch_size))
        parts = [[tensor[i::n].contiguous() for tensor in share] for i in range(n)]
        return [[tensor.pin_memory() for tensor in part] for part in parts] if pin else parts


# ------------------------------------------------------------------------------------------ model and state


def load_model(start):
    """A trained model (on the CPU, in evaluation mode) and its checkpoint, or a dict with the meta alone.

    `start` is a checkpoint or a run's folder, of which the average is taken, or a folder or hub repository in the
    published format. That names no tokenizer: 50,257 tokens are taken for GPT-2's. Fails in one line.
    """
    path = Path(start) / "ckpt.pt" if os.path.isdir(start) else Path(start)
    # a slip in out/mytext must not load a stranger's model of that name
    if not os.path.exists(start) and (start.count("/") != 1 or os.path.exists(start.split("/")[0])):
        fail(f"init_from={start!r} is no checkpoint, no folder, and no hub id such as louaaron/sedd-small")
    try:
        if not path.is_file():
            model = SEDD.from_pretrained(start)
            V = model.config.vocab_size
            return model, {"meta": {"vocab_size": V} | ({"tokenizer": "gpt2"} if V == 50257 else {})}
        checkpoint = load_weights(path)
        config, average = SEDDConfig(**checkpoint["config"]), checkpoint["ema"]
    except Exception as error:  # what is missing or damaged shows in many ways
        hint = ": pip install -e '.[hub]'" if isinstance(error, ImportError) else ""
        fail(f"{start} has no model that this version can load ({type(error).__name__}: {str(error)[:300]}){hint}")
    model = MODELS[config.parameterization](config)
    try:
        model.load_state_dict(average)
    except RuntimeError as error:
        fail(f"{start} is of another version of this code ({str(error)[:300]})")
    return model.eval(), checkpoint


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

    The optimiser is AdamW, as in the paper. Or it is Muon for the matrices of the blocks, and AdamW for the rest: Muon
    makes the mean gradient of a matrix nearly orthogonal, so that it moves in all directions alike.
    """

    def __init__(self, model, o, dtype=torch.float32):
        self.model, self.average, self.step = model, copy.deepcopy(model).eval().requires_grad_(False), 0
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=dtype == torch.float16)
        named = model.blocks.named_parameters() if o.optimizer == "muon" else []
        matrices = dict.fromkeys(p for name, p in named if p.ndim == 2 and "adaLN" not in name)
        rest = [p for p in model.parameters() if p not in matrices]
        adamw = torch.optim.AdamW(rest, 0.0, (0.9, o.beta2), weight_decay=o.weight_decay, fused=True)
        self.optimizers = {"adamw": adamw}
        if matrices:
            self.optimizers["muon"] = Muon([*matrices], 0.0, o.weight_decay)
            self.optimizers["muon"].dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def update(self, lr, ema):
        """One step of the optimisers, along the gradients that backward has left, and of the average."""
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        # a young average forgets faster, or it would remember the random start
        weight = 1 - min(ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_([*self.average.parameters()], [*self.model.parameters()], weight)

    def load(self, checkpoint):
        """Go on with all that `save` wrote, but with the options of the optimisers that are given now."""
        self.step = checkpoint["step"]
        self.model.load_state_dict(checkpoint["model"])
        self.average.load_state_dict(checkpoint["ema"])
        self.scaler.load_state_dict(checkpoint["scaler"] or self.scaler.state_dict())  # empty: saved without float16
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"][name]["state"]})

    def save(self, path, o, meta):
        """Write under another name and rename: whenever the machine stops, `path` is a whole checkpoint.

        Returns whether it is saved. If not, as on a full disk, a warning says why, and `path` stays what it was.
        """
        scratch = path.with_name(f".{path.name}.partial")
        checkpoint = {
            "step": self.step, "model": self.model.state_dict(), "ema": self.average.state_dict(),
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.model.config), "options": asdict(o), "meta": meta,
        }  # fmt: skip
        try:
            with open(scratch, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name without the content
            os.replace(scratch, path)
        except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
            scratch.unlink(missing_ok=True)
            tqdm.write(f"warning: step {self.step} was not saved ({error}); {path} is what it was", sys.stderr)
            return False
        return True


# ----------------------------------------------------------------------------------------------- evaluation


def evaluate(model, data, o, device, dtype, name):
    """Mean likelihood bound (exact for GPT) over blocks of a split, and its standard error, in nats per token.

    Prints both after `name`, and returns them as the log names them. Sequences, times and noise are the same at every
    call and for every number of processes. What fills no block, at the end of the split, is left out.
    """
    tokens, L = data.splits[o.eval_split], o.block_size
    total = len(tokens) // L
    rows = np.unique(np.linspace(0, total - 1, o.eval_sequences or total).astype(np.int64))
    bounds = torch.zeros(len(rows), device=device)
    batches = range(RANK, math.ceil(len(rows) / 16), WORLD)
    for k in progress(batches, unit="batch", leave=False, delay=5, disable=RANK > 0):
        torch.manual_seed(mixed_seed(o.seed, k))
        part = slice(16 * k, 16 * k + 16)
        with autocast(device, dtype):
            bounds[part] = model.nll(data.read(o.eval_split, L * rows[part]).to(device), o.eval_times)
    if dist.is_initialized():
        dist.all_reduce(bounds)
    bounds = bounds.cpu().double() / L
    bound, error = bounds.mean().item(), (bounds.std() / len(bounds) ** 0.5).item() if len(bounds) > 1 else math.nan
    kind, at_most = ("nll", "") if model.causal else ("bound", "≤ ")
    said = f"{bound:.4f} ± {error:.4f} nats per token, perplexity {at_most}{math.exp(min(bound, 700)):.2f}"
    if text_bytes := data.meta.get("bytes", {}).get(o.eval_split):
        said += f", {bound / math.log(2) * len(tokens) / text_bytes:.4f} bits per byte"
    tqdm.write(f"{name}: {o.eval_split} {kind} {said}, over {len(rows):,} of {total:,} blocks")
    return {f"{o.eval_split}_{kind}": bound, f"{o.eval_split}_error": error}


# ------------------------------------------------------------------------------------------------- training


def learning_rate(o, step):
    warm = min(1.0, (step + 1) / max(1, o.warmup_steps))
    done = min(1.0, max(0.0, (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps)))
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "none": 1.0}[o.decay_lr]
    return o.learning_rate * warm * left


def catch_signals():
    """From now on SIGINT, SIGTERM and SIGHUP only join the list that this returns; a later SIGINT ends the process.

    SIGHUP comes when a terminal closes. One that was ignored when the process began, as under nohup, still is.
    """
    caught = []

    def catch(number, frame):
        caught.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun hands on what the terminal has sent already
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if RANK == 0:
            with contextlib.suppress(OSError):  # print could be what the signal has interrupted
                os.write(2, b"\nstopping after this step\n")

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    sys.stdout, sys.stderr = Output(sys.stdout, caught), Output(sys.stderr, caught)
    return caught


class Output:
    """A stream; when nobody reads it any more, as after the end of a terminal or of tee, that counts as SIGHUP."""

    def __init__(self, stream, caught):
        self.stream, self.caught = stream, caught

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text=""):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a full disk costs some words
                self.stream = open(os.devnull, "w", encoding="utf-8")
                self.caught.append(1)  # SIGHUP, for which Windows has no name

    flush = write


def log(o, record, before=""):
    """Process 0 adds a line to log.jsonl, unless the disk is full."""
    if RANK > 0:
        return
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with contextlib.suppress(OSError), open(Path(o.out_dir) / "log.jsonl", "a") as file:
        file.write(f"{before}{json.dumps(record)}\n")


def begin(given, device):
    """What init_from means: all options, the averaged model (None: a fresh one), its checkpoint, whether to resume it.

    The options of a run that is resumed stay as they were, but for those that are given now.
    """
    o = Options(**given)
    path, start, trained, checkpoint = Path(o.out_dir) / "ckpt.pt", o.init_from, None, {}
    resume = start == "resume" or start == "auto" and path.is_file()
    if MAX_RESTARTS and start not in ("auto", "resume") and not o.eval_only:
        way_out = "say --init_from=auto" if start == "scratch" else "leave out --max-restarts"
        fail(f"each restart by torchrun would begin anew: {way_out}")
    if resume and not path.is_file():
        fail(f"there is no checkpoint {path}: train one first, python train.py --out_dir={o.out_dir}")
    if resume or start not in ("scratch", "auto"):
        if not (resume or o.eval_only) and Path(start).resolve() in (path.resolve(), path.parent.resolve()):
            fail(f"init_from={start!r} is out_dir as well: name another --out_dir, or --init_from=resume")
        trained, checkpoint = load_model(str(path) if resume else start)
        before = {name: getattr(trained.config, name) for name in SHAPE}
        if resume:
            before |= checkpoint["options"] | {"init_from": "resume", "out_dir": o.out_dir, "device": o.device}
        if unknown := before.keys() - asdict(o).keys():
            fail(f"{path} is of another version of this code: it has an option {min(unknown)!r}")
        fixed = before.keys() & {*SHAPE, "optimizer"} - {"block_size", "dropout"}
        if other := [name for name in before if name in fixed and given.get(name, before[name]) != before[name]]:
            fail(f"{start} was trained otherwise: say {' '.join(f'--{name}={before[name]}' for name in other)}")
        o = Options(**(before | given))
    if dist.is_initialized():
        step = torch.tensor(checkpoint["step"] if resume else -1, device=device)
        first = step.clone()
        dist.broadcast(first, 0)
        if first != step:
            fail(f"process 0 found step {first} in {path}, this one {step} (-1: none): do both see the same disk?")
    return o, trained, checkpoint, resume


def main():
    given = parse(Options, __file__)
    named = Options(**given).device
    device = find_device(named)
    if {"RANK", "WORLD_SIZE"} & os.environ.keys():
        join_processes(named, device)
    elif any(int(os.environ.get(key, 1)) > 1 for key in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        fail("srun or mpirun has started several processes, each of which would train alone: start them with torchrun")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # process 0 speaks for all
    o, trained, checkpoint, resume = begin(given, device)
    may_be_0 = "micro_batch_size", "warmup_steps", "eval_sequences", "seed"
    if zero := [k for k, v in asdict(o).items() if type(v) is int and v == 0 and k not in may_be_0]:
        fail(f"{zero[0]}=0 must be at least 1")
    if not o.eval_only and o.batch_size < WORLD:
        fail(f"batch_size={o.batch_size} leaves nothing to some of {WORLD} processes: try --batch_size={WORLD}")
    if o.compile == "True" and not can_compile(device):
        fail(f"compile=True, but there is no compiler for {device.type} here: install one, or leave it out")
    data, dtype = Data(o), find_dtype(o.dtype, device)
    vocabulary = "tokenizer", "vocab_size", "vocab", "pattern"
    if trained and any(data.meta.get(name) != checkpoint["meta"].get(name) for name in vocabulary):
        fail(f"init_from={o.init_from!r} was trained on another vocabulary than {data.folder} has: name its data set")
    torch.manual_seed(o.seed)
    try:
        config = SEDDConfig(data.vocab_size, **{name: getattr(o, name) for name in SHAPE})
        model = MODELS[o.parameterization](config)
    except ValueError as error:  # sizes, or a graph, that do not fit
        fail(error)
    if trained:
        model.load_state_dict(trained.state_dict())
    model.to(device)
    status = 0
    if o.eval_only:
        name = f"step {checkpoint['step']}" if resume else o.init_from if trained else "step 0"
        evaluate(model.eval(), data, o, device, dtype, name)
    else:
        state = State(model, o, dtype)
        if resume:
            state.load(checkpoint)
        del trained, checkpoint  # gigabytes
        compiled = o.compile == "True" or o.compile == "auto" and o.max_steps >= 500 and can_compile(device)
        if compiled:
            model.compile()
            torch._dynamo.config.optimize_ddp = False  # it cuts a block in two, but DDP overlaps whole ones as well
        network = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {WORLD} x {device} in "
              f"{str(dtype).removeprefix('torch.')}{', compiled' * compiled}; {o.batch_size * o.block_size:,} tokens a "
              f"step, steps {state.step} to {o.max_steps}; output in {o.out_dir}/")  # fmt: skip
        status = train(o, data, state, network, device, dtype)
    if dist.is_initialized():
        time.sleep(0.2)  # gloo's threads may need the interpreter, which the next line holds while it waits for them
        dist.destroy_process_group()  # not after an error: a process that has failed alone could wait for ever
    if status:
        sys.exit(status)


def train(o, data, state, network, device, dtype):
    """The steps that are left, with their log, checkpoints and evaluations; returns the exit status."""
    model, scaler, path, pin = state.model.train(), state.scaler, Path(o.out_dir) / "ckpt.pt", device.type == "cuda"
    batch = data.batch(o, state.step, model, pin)
    if RANK == 0 and state.step < o.max_steps:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not state.step and path.is_file():  # of an earlier run: a command that is typed twice loses no model
            names = (path.with_suffix(f".old{n}.pt") for n in ("", *range(2, 10**6)))
            print("the checkpoint of an earlier run is kept as", path.rename(next(p for p in names if not p.exists())))
        log(o, {"step": state.step, "options": asdict(o)}, before="\n")  # the line before may have been cut off
    caught = catch_signals()
    bar = progress(total=o.max_steps, initial=state.step, unit="step", disable=RANK > 0)
    saved, stop, bad_in_a_row, losses, seconds = state.step, 0, 0, [], 0.0
    while state.step < o.max_steps and not stop and bad_in_a_row < 10:
        began = time.perf_counter()
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

        sums = torch.stack([loss / WORLD, norm / WORLD, norm.new_full((), len(caught))])
        if dist.is_initialized():
            dist.all_reduce(sums)  # so that all agree on whether the step counts, and whether to stop
        loss, norm, stop = sums.tolist()
        lr, finite = learning_rate(o, state.step), math.isfinite(loss + norm)
        if finite:
            state.update(lr, o.ema)
        # float16 begins with a scale that is too large: steps that bring it down are no reason to give up
        bad_in_a_row = 0 if finite else bad_in_a_row + (scaler.get_scale() <= 1)
        scaler.update()
        model.zero_grad()
        state.step += 1
        losses.append(loss if finite else math.nan)
        seconds += time.perf_counter() - began

        last = stop or state.step == o.max_steps
        if state.step % o.log_interval == 0 or last:
            loss, rate = torch.tensor(losses).nanmean().item(), len(losses) / seconds  # steps a second
            log(o, {"step": state.step, "loss": loss, "norm": norm, "lr": lr, "ms": round(1000 / rate, 1),
                    "tokens_per_s": round(rate * o.batch_size * o.block_size),
                    "skipped": sum(map(math.isnan, losses))})  # fmt: skip
            bar.set_postfix(loss=loss, norm=norm, lr=lr, refresh=False)
            losses, seconds = [], 0.0
        if (state.step % o.save_interval == 0 or last) and finite:
            if RANK > 0 or state.save(path, o, data.meta):
                saved = state.step
        bar.update()
        if state.step == o.max_steps or state.step % o.eval_interval == 0 and not stop:  # can take long: save first
            log(o, {"step": state.step} | evaluate(state.average, data, o, device, dtype, f"step {state.step}"))
    bar.close()
    if bad_in_a_row == 10 and RANK == 0:
        print(f"train.py: error: loss or gradient is not finite in steps {state.step - 9} to {state.step}: try a lower "
              "--learning_rate, or another --dtype", file=sys.stderr)  # fmt: skip
    if saved:
        goes_on = f"sample.py --init_from={o.out_dir}" if saved >= o.max_steps else (
                  f"train.py --init_from=resume --out_dir={o.out_dir}")  # fmt: skip
        print(f"{path} holds step {saved}: python {goes_on}")
    if stop and state.step < o.max_steps:
        return 128 + (caught or [signal.SIGTERM])[0]
    return int(saved < o.max_steps)


if __name__ == "__main__":
    run(main)
