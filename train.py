"""Train a score network: python train.py, or torchrun --nproc_per_node=8 train.py config/owt.py"""

import contextlib
import copy
import ctypes
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from config import fail, parse, progress
from prepare import Tokenizer
from sedd import GPT, GRAPHS, MODELS, NOISES, SEDD, SEDDConfig, diffusion_loss, nll_bound, sample


@dataclass
class Options:
    """Train SEDD. Example: python train.py --dataset=shakespeare_char --max_steps=5000 --graph=uniform"""

    # data and output
    dataset: str = "pydocs"  # a folder below data_dir, written by prepare.py
    data_dir: str = "data"  # where prepare.py put it
    out_dir: str = "out"  # for ckpt.pt and log.jsonl
    init_from: str = "scratch"  # resume: out_dir/ckpt.pt; auto: that or scratch; a folder or hub id: its weights
    # model
    graph: Literal[tuple(GRAPHS)] = "absorb"  # what noise turns a token into: MASK, or any token
    noise: Literal[tuple(NOISES)] = "loglinear"  # how noise grows with time
    parameterization: Literal[tuple(MODELS)] = "score"  # what is learned: SEDD, D3PM, or GPT
    block_size: int = 128  # tokens in a sequence
    n_layer: int = 4  # transformer blocks
    n_head: int = 3  # attention heads
    n_embd: int = 192  # width
    cond_dim: int = 64  # width of the embedding of sigma
    dropout: float = 0.0  # on the branches of the blocks
    # optimisation
    times: Literal["uniform", "logit_normal"] = "logit_normal"  # draws of t: the paper's, or more around 1/2
    max_steps: int = 1250  # optimiser steps
    batch_size: int = 32  # sequences a step, over all processes and micro-batches
    micro_batch_size: int = 0  # sequences a process holds at a time; 0: its whole share of the batch
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the blocks' matrices, and AdamW for the rest
    learning_rate: float = 1.2e-2  # of both, after the warm-up
    warmup_steps: int = 50  # steps of linear growth from 0
    decay_lr: Literal["linear", "cosine", "none"] = "linear"  # how it then falls to 0 at max_steps; none: not
    weight_decay: float = 0.0  # of both optimisers
    beta2: float = 0.98  # memory of AdamW for the size of gradients
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
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; auto: bfloat16 where it is fast
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the blocks; auto: where it works and pays


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}  # what an optimiser knows of a parameter

# Training leaves out the first thousandth of time, where the uniform graph's rare losses explode.
T_MIN = 1e-3


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
    if device.type == "cpu":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # a switch of SDPA on all devices
        if platform.libc_ver()[0] == "glibc":  # keep freed memory: fetching it anew is a tenth of a large step
            ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0), ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return device


def find_dtype(name, device):
    """bfloat16 on CUDA and on CPUs with instructions for it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    )  # fmt: skip
    return torch.bfloat16 if fast else torch.float32


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


# ---------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path):
    """The dict that train() saved, on the CPU; fails in one line at anything else."""
    path = Path(path)
    if not os.path.isfile(path):  # False for what no file can be called
        fail(f"there is no checkpoint {path}: train one first, python train.py --out_dir={path.parent}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["meta"]["tokenizer"], range(checkpoint["step"])
        options, config = Options(**checkpoint["options"]), SEDDConfig(**checkpoint["config"])
        with torch.device("meta"):  # shapes without numbers
            model = MODELS[config.parameterization](config)
        shapes = lambda weights: {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
        if not shapes(checkpoint["model"]) == shapes(checkpoint["ema"]) == shapes(model.state_dict()):
            raise ValueError("its weights are not those of its config")
        if checkpoint["step"] < 1:
            raise ValueError("it is of no step")
        for name, parameters in shares(model, options.optimizer).items():
            moments, (group,) = checkpoint["optimizer"][name]["state"], checkpoint["optimizer"][name]["param_groups"]
            if group["params"] != list(range(len(parameters))) or any(
                moments[i][moment].shape != p.shape for i, p in enumerate(parameters) for moment in MOMENTS[name]
            ):
                raise ValueError("its optimiser is not that of its weights")
        if not all_finite(checkpoint):
            raise ValueError("its numbers are not all finite")
    except Exception as error:
        why = str(error) if type(error) is ValueError else type(error).__name__
        fail(f"{path} is no checkpoint of train.py, is of another version, or is cut short ({why})")
    return checkpoint


def all_finite(checkpoint):
    moments = [part for optimizer in checkpoint["optimizer"].values() for part in optimizer["state"].values()]
    numbers = [checkpoint["model"], checkpoint["ema"], *moments]
    return all(tensor.isfinite().all() for part in numbers for tensor in part.values())


def save_checkpoint(path, checkpoint):
    """Write to a temporary name and rename: whenever the machine stops, `path` is a whole checkpoint.

    OSError where the disk is full, ValueError where a number is not finite; `path` is then what it was before.
    """
    if not all_finite(checkpoint):
        raise ValueError("its numbers are not all finite")
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with open(scratch, "wb") as file:
            torch.save(checkpoint, file)
            file.flush(), os.fsync(file.fileno())  # or a power cut could leave the new name without the content
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        scratch.unlink(missing_ok=True)
        raise OSError(str(error.strerror if isinstance(error, OSError) else "the disk may be full")) from None


def load_model(start):
    """A trained SEDD (on the CPU, in evaluation mode) and the meta of its data, None where nothing tells it.

    `start` is a folder with the ckpt.pt of a run, whose averaged weights are taken, or else a folder or hub
    repository in the published format. Fails in one line at anything else.
    """
    if os.path.isfile(Path(start) / "ckpt.pt"):
        checkpoint = load_checkpoint(Path(start) / "ckpt.pt")
        config = SEDDConfig(**checkpoint["config"])
        model = MODELS[config.parameterization](config)
        model.load_state_dict(checkpoint["ema"])
        return model.eval(), checkpoint["meta"]
    try:
        model = SEDD.from_pretrained(start)
    except (ImportError, ValueError) as error:
        fail(str(error))
    gpt2 = {"tokenizer": "gpt2", "vocab_size": 50257}
    return model, gpt2 if model.config.vocab_size == 50257 else None


# ----------------------------------------------------------------------------------------------------- data


def check_meta(meta):
    """ValueError, KeyError or TypeError where a field of meta.json is not what prepare.py writes."""
    counts = lambda value: isinstance(value, dict) and all(type(n) is int and n >= 0 for n in value.values())
    size, vocab = meta["vocab_size"], meta["vocab"] if meta["tokenizer"] == "char" else None
    chars = isinstance(vocab, list) and all(isinstance(c, str) and len(c) == 1 for c in vocab)
    for name, right in {
        "tokenizer": meta["tokenizer"] in ("char", "gpt2"),
        "vocab": vocab is None or (chars and 0 < len(set(vocab)) == len(vocab)),
        "vocab_size": type(size) is int and size == (len(vocab) if chars else 50257),
        "dtype": meta["dtype"] in ("<u2", "<u4"),
        "sizes": counts(meta["sizes"]),
        "bytes": counts(meta.get("bytes", {})),
    }.items():
        if not right:
            raise ValueError(f"meta.json has {name}={str(meta[name])[:50]!r}")


class Data:
    """One data set's memory-mapped tokens, cut into blocks."""

    def __init__(self, o):
        self.folder, self.block_size, self.splits = Path(o.data_dir) / o.dataset, o.block_size, {}
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            check_meta(self.meta)
            for name in dict.fromkeys([o.eval_split] if o.eval_only else ["train", o.eval_split]):
                path, size = self.folder / f"{name}.bin", self.meta["sizes"][name]
                if path.stat().st_size != size * np.dtype(self.meta["dtype"]).itemsize:
                    raise ValueError(f"{path.name} does not hold the {size} tokens of meta.json")
                self.splits[name] = np.memmap(path, self.meta["dtype"], "r") if size else np.empty(0, "u2")
        except (OSError, ValueError, KeyError, TypeError) as error:
            there = isinstance(error, FileNotFoundError) and "is not prepared" or f"is not readable ({error})"
            fail(f"the data set {self.folder} {there}: python prepare.py {o.dataset}")
        for name, tokens in self.splits.items():
            if len(tokens) < o.block_size:
                fail(f"{self.folder}/{name}.bin has {len(tokens)} tokens, fewer than one block: "
                     f"try --block_size={max(1, min(map(len, self.splits.values())) // 2)}, or a longer text")

    def checked(self, x0):
        """x0 itself; fails in one line where it has a token that the vocabulary lacks."""
        if x0.max() >= self.meta["vocab_size"]:
            fail(f"{self.folder} has a token {x0.max()} beyond its vocabulary: python prepare.py {self.folder.name}")
        return x0

    def batch(self, o, step, indices, model):
        """x0 (n, L), times t (n,) and noised x (n, L) of the sequences `indices` of the global batch of a step.

        A pure function of (seed, step, index), however many processes share the batch. The times of the whole
        batch are one low-discrepancy set: uniform, or pushed towards 1/2, to where most of the learning is
        (arXiv 2605.13026). That changes how much each noise level counts in the training loss, which then is
        no bound on the likelihood; `evaluate` always estimates the paper's integral over even times.
        """
        shift = np.random.default_rng((o.seed, step)).random()
        t = 1 - (shift + torch.tensor(indices, dtype=torch.float64) / o.batch_size) % 1
        if o.times == "logit_normal":
            t = torch.sigmoid(torch.special.ndtri(t.clamp(max=1 - 1e-6)))
        t = (T_MIN + (1 - T_MIN) * t).float()
        sigma, _ = model.noise(t)
        x0, x = [], []
        for i, s in zip(indices, sigma):
            generator = torch.Generator().manual_seed(mixed_seed(o.seed, step, i + 1))
            tokens = self.splits["train"]
            start = torch.randint(len(tokens) - self.block_size + 1, (), generator=generator)
            x0.append(torch.from_numpy(tokens[start : start + self.block_size].astype(np.int64)))
            x.append(model.graph.sample_transition(x0[-1][None], s[None], generator)[0])
        return self.checked(torch.stack(x0)), t, torch.stack(x)

    def fixed_blocks(self, split, n):
        """All whole blocks of the split (N, L), unread, and the numbers of n of them, evenly spread (0: of all)."""
        tokens, L = self.splits[split], self.block_size
        blocks = tokens[: len(tokens) // L * L].reshape(-1, L)
        return blocks, np.unique(np.linspace(0, len(blocks) - 1, n or len(blocks)).astype(int))


def mixed_seed(*numbers):
    """One 63-bit seed from several small numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ----------------------------------------------------------------------------------------------- evaluation


def evaluate(model, data, split, n, num_times, seed, rank, world, device, dtype, bar=False):
    """Mean likelihood bound of n blocks (0: all) and its standard error over them, in nats per token; exact for GPT.

    Sequences, times and noise are the same at every call and for every number of processes.
    """
    blocks, rows = data.fixed_blocks(split, n)
    bounds = torch.zeros(len(rows))
    model.eval()
    batches = progress(torch.arange(len(rows)).split(16), unit="batch", disable=not bar)
    for k, batch in enumerate(batches):
        if k % world == rank:
            torch.manual_seed(mixed_seed(seed, k))
            x = data.checked(torch.from_numpy(blocks[rows[batch.numpy()]].astype(np.int64))).to(device)
            with torch.no_grad(), autocast(device, dtype):
                bounds[batch] = (model(x).sum(-1) if isinstance(model, GPT)
                                 else nll_bound(model, model.graph, model.noise, x, num_times)).cpu()  # fmt: skip
    if world > 1:
        bounds = bounds.to(device)
        dist.all_reduce(bounds)
    bounds = bounds.cpu().double() / data.block_size
    return bounds.mean().item(), (bounds.std() / len(bounds) ** 0.5).item() if len(bounds) > 1 else 0.0


def describe(model, bound, error, meta, split):
    name, at_most = ("nll", "") if isinstance(model, GPT) else ("bound", "≤ ")  # the one is exact
    text = f"{name} {bound:.4f} ± {error:.4f} nats per token, perplexity {at_most}{math.exp(min(bound, 700)):.2f}"
    if meta["tokenizer"] == "char":
        return text + f", {bound / math.log(2):.4f} bits per character"
    size = meta.get("bytes", {}).get(split)  # of the original text
    return text + (f", {bound * meta['sizes'][split] / size / math.log(2):.4f} bits per byte" if size else "")


def generate(model, prompt, steps, sampler="tweedie", callback=None):
    """sedd.sample of prompt (B, L) with any model; GPT goes from left to right, a token a call, whatever the steps."""
    if isinstance(model, GPT):
        return model.sample(prompt, callback)
    return sample(model, model.graph, model.noise, prompt.shape, steps, sampler, prompt, prompt.device, callback)


def sample_line(model, tokenizer, seed, device, dtype):
    """A short text of the model, the same noise at every call, its whitespace escaped."""
    shape = 1, min(64, model.config.block_size)
    torch.manual_seed(mixed_seed(seed))
    with autocast(device, dtype):
        x = generate(model, torch.full(shape, -1, device=device), 16)
    # scores that are not finite can leave a MASK
    return repr(tokenizer.decode(x[0].clamp(max=model.config.vocab_size - 1).tolist()))


def shares(model, optimizer):
    """Which parameters each optimiser takes care of, {"adamw": list, "muon": list}; only those that there are."""
    names = model.blocks.named_parameters() if optimizer == "muon" else []
    matrices = {id(p) for name, p in names if p.ndim == 2 and "adaLN" not in name}
    mine = {"adamw": [], "muon": []}
    for p in model.parameters():
        mine["muon" if id(p) in matrices else "adamw"].append(p)
    return {name: parameters for name, parameters in mine.items() if parameters}


def make_optimizers(model, o):
    """AdamW, as in the paper; or Muon (torch.optim.Muon) for the matrices of the blocks.

    Where AdamW scales each number of its mean gradient by itself, Muon makes that of a matrix nearly orthogonal, so
    that it moves in all directions alike. Scaled to the size of AdamW's moves, it takes the same learning rate.
    """
    mine, options = shares(model, o.optimizer), dict(lr=o.learning_rate, weight_decay=o.weight_decay)
    optimizers = {"adamw": torch.optim.AdamW(mine["adamw"], betas=(0.9, o.beta2), fused=True, **options)}
    if "muon" in mine:
        optimizers["muon"] = torch.optim.Muon(mine["muon"], adjust_lr_fn="match_rms_adamw", **options)
    return optimizers


def learning_rate(o, step):
    warm = min(1.0, (step + 1) / max(1, o.warmup_steps))
    progress = min(1.0, max(0.0, (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps)))
    left = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "none": 1.0}[o.decay_lr]
    return o.learning_rate * warm * left


def catch_signals(main):
    """From now on SIGINT and SIGTERM only join the list that this returns; a second SIGINT ends the process at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun hands on what the terminal has sent already
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if main:
            with contextlib.suppress(OSError):  # print could be what the signal has interrupted
                os.write(2, b"\nstopping after this step\n")

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, catch)
    return caught


def open_log(path, step):
    """The log open for bytes, unbuffered, cut back to the lines up to `step`; it is this process's until it ends.

    BlockingIOError where another training writes it.
    """
    log = open(path, "a+b", buffering=0)
    if fcntl:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    log.seek(0)
    end = 0
    for line in log.readlines() if step else []:
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    log.truncate(end), log.seek(end)
    return log


def duration(seconds):
    return next(f"{seconds / unit:.0f} {name}" for unit, name in ((3600, "h"), (60, "min"), (1, "s"))
                if seconds >= 1.5 * unit or unit == 1)  # fmt: skip


def start_weights(o, explicit):
    """What init_from names: the options completed by it, its weights (None: fresh ones), and a checkpoint to resume."""
    out, restarted = Path(o.out_dir), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    weights, meta, resumed, config = None, None, None, {}
    if o.init_from == "auto":
        start = {"init_from": "resume" if (out / "ckpt.pt").is_file() else "scratch"}
        o, explicit = replace(o, **start), explicit | start
    if o.init_from == "resume":
        resumed = load_checkpoint(out / "ckpt.pt")
        kept = {k: v for k, v in resumed["options"].items() if k not in ("init_from", "out_dir", "eval_only")}
        o, meta = Options(**{**kept, **explicit}), resumed["meta"]
        config = resumed["config"] | {"optimizer": Options(**kept).optimizer}
    elif o.init_from != "scratch":
        if "/" not in o.init_from and not os.path.isdir(o.init_from):
            fail(f"init_from={o.init_from!r} is none of scratch, resume, auto, a folder, or a hub id such as owner/name")
        if not o.eval_only and Path(o.init_from).resolve() == out.resolve():
            fail(f"init_from={o.init_from!r} is out_dir as well: name another --out_dir, or --init_from=resume")
        weights, meta = load_model(o.init_from)
        config = asdict(weights.config)
        if meta is None:
            meta = {"vocab_size": config["vocab_size"]}
            print(f"warning: nothing tells the vocabulary of {o.init_from}: it is taken for that of the data", file=sys.stderr)
    for name in config.keys() & explicit.keys():
        if explicit[name] != config[name]:
            fail(f"{name}={explicit[name]} but {out / 'ckpt.pt' if resumed else o.init_from} was trained with "
                 f"{config[name]}: leave it out, or say --{name}={config[name]}")  # fmt: skip
    o = replace(o, **{name: value for name, value in config.items() if name != "vocab_size"})
    if restarted and o.init_from != "resume" and (out / "ckpt.pt").is_file():
        # the first start has moved other runs' checkpoints away
        resumed = load_checkpoint(out / "ckpt.pt")
        resumed = resumed if resumed["options"] == asdict(o) else None
        meta = resumed["meta"] if resumed else meta
    return o, weights, meta, resumed


def train(o, explicit):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main = rank == 0
    if world > 1 and "MASTER_ADDR" not in os.environ:
        fail(f"WORLD_SIZE={world}, but nothing tells where the others are: start them with torchrun")
    o, weights, meta, resumed = start_weights(o, explicit)
    out = Path(o.out_dir)

    for name, least in {
        "block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "cond_dim": 1, "max_steps": 1, "eval_interval": 1,
        "eval_sequences": 0, "eval_times": 1, "save_interval": 1, "log_interval": 1, "micro_batch_size": 0,
        "warmup_steps": 0, "learning_rate": 0, "weight_decay": 0, "grad_clip": 0, "seed": 0,
    }.items():  # fmt: skip
        value = getattr(o, name)
        limit = math.inf if isinstance(value, float) else 2**63 if name == "seed" else 2**31
        if not least <= value < limit:  # nan is in no order with anything
            fail(f"{name}={value} must be at least {least} and below {limit}")
    for name in "dropout", "ema", "beta2":
        if not 0 <= getattr(o, name) < 1:
            fail(f"{name}={getattr(o, name)} must be at least 0 and below 1")
    share, left = divmod(o.batch_size, world)
    micro = o.micro_batch_size or share
    if o.batch_size < 1 or left or micro < 1 or share % micro:
        fail(f"batch_size={o.batch_size} cannot be shared by {world} processes in micro-batches of {micro or 1}: "
             f"try --batch_size={max(1, round(o.batch_size / (world * max(1, micro)))) * world * max(1, micro)}")  # fmt: skip

    device = find_device(o.device)
    dtype = find_dtype(o.dtype, device)
    data = Data(o)
    if any(data.meta.get(name) != meta[name] for name in {"tokenizer", "vocab", "vocab_size"} & (meta or {}).keys()):
        fail(f"{out / 'ckpt.pt' if resumed else o.init_from} was trained on another vocabulary than {data.folder} has: "
             "name the data set that it was trained on")  # fmt: skip
    torch.manual_seed(o.seed)
    try:
        config = SEDDConfig(data.meta["vocab_size"], o.block_size, o.n_layer, o.n_head, o.n_embd, o.cond_dim,
                            o.dropout, o.graph, o.noise, o.parameterization)  # fmt: skip
    except ValueError as error:
        fail(str(error))
    if main and not o.eval_only:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            fail(f"out_dir={o.out_dir!r} cannot hold the results: {getattr(error, 'strerror', error)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    signals = None  # the group of processes that agrees on signals, without the GPU
    if world > 1:
        # the store outlives a restart by torchrun: the keys of the two must not meet
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        signals = dist.new_group(backend="gloo")

    model = (weights or MODELS[o.parameterization](config)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, o)
    start = 0
    if resumed:
        model.load_state_dict(resumed["model"])
        ema.load_state_dict(resumed["ema"])
        for name, optimizer in optimizers.items():
            # what it remembers, but with the options that were given now
            optimizer.load_state_dict(optimizer.state_dict() | {"state": resumed["optimizer"][name]["state"]})
        start, resumed = resumed["step"], None  # a second copy of all numbers need not stay
    if world > 1:
        starts = torch.tensor([start, -start])
        dist.all_reduce(starts, dist.ReduceOp.MAX, group=signals)
        if starts[0] != -starts[1]:
            fail(f"the processes would start at steps {-starts[1]} to {starts[0]}: out_dir={o.out_dir!r} must be a folder "
                 "that all machines share")  # fmt: skip

    evaluation = lambda bar=False: evaluate(ema, data, o.eval_split, o.eval_sequences, o.eval_times, o.seed,
                                            rank, world, device, dtype, bar)  # fmt: skip
    if o.eval_only:
        blocks, rows = data.fixed_blocks(o.eval_split, o.eval_sequences)
        left = len(data.splits[o.eval_split]) - blocks.size
        if main:
            print(f"{data.folder}, {o.eval_split}: {len(rows):,} of {len(blocks):,} blocks of {o.block_size} tokens at "
                  f"{o.eval_times} times; dropped at the end: {left:,} tokens that fill no block")  # fmt: skip
        bound = evaluation(bar=main)
        if main:
            name = o.init_from if weights else f"step {start}"
            print(f"{name}: {describe(model, *bound, data.meta, o.eval_split)}")
        return

    compiled = o.compile == "True" or o.compile == "auto" and o.max_steps - start >= 500 and can_compile(device)
    if compiled:
        for block in model.blocks:  # block by block: one compilation serves them all, and DDP can overlap them
            block.compile()
    trained = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                      broadcast_buffers=False) \
        if world > 1 else model  # fmt: skip

    bar, log, pending, tokenizer = None, None, b"", None
    if main:
        n = sum(p.numel() for p in model.parameters())
        print(f"{n / 1e6:.2f}M parameters on {world} x {device} in {str(dtype).removeprefix('torch.')}"
              f"{', compiled' * compiled}; {o.batch_size * o.block_size:,} tokens a step, "
              f"steps {start} to {o.max_steps}; output in {out}/")  # fmt: skip
        with contextlib.suppress(OSError, ValueError):  # GPT-2's BPE files are not to be had: then no text is shown
            tokenizer = Tokenizer(data.meta)
        try:
            log = open_log(out / "log.jsonl", start)
            if not start and (out / "ckpt.pt").is_file():
                names = (out / f"ckpt.old{n}.pt" for n in itertools.chain([""], itertools.count(2)))
                kept = next(path for path in names if not path.exists())
                os.replace(out / "ckpt.pt", kept)
                print(f"the checkpoint of an earlier run is kept as {kept}")
        except BlockingIOError:
            fail(f"another training is writing to out_dir={o.out_dir!r}: wait for its end, or name another --out_dir")
        except OSError as error:
            fail(f"out_dir={o.out_dir!r} cannot hold the results: {error.strerror}")
        bar = progress(total=o.max_steps, initial=start, unit="step")

    caught = catch_signals(main)
    parameters, averaged = list(model.parameters()), list(ema.parameters())
    skipped, in_a_row = 0, 0
    stop, unsaved, told = 0, False, False
    losses, clock, since = [], time.perf_counter(), start
    for step in range(start, o.max_steps):
        torch.manual_seed(mixed_seed(o.seed, step, 0, rank))  # dropout
        model.train()
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = learning_rate(o, step)
        mine = range(rank * share, (rank + 1) * share)
        for i in range(0, share, micro):
            batch = data.batch(o, step, mine[i : i + micro], model)
            x0, t, x = (tensor.to(device, non_blocking=True) for tensor in batch)
            wait = world > 1 and i + micro < share
            with trained.no_sync() if wait else contextlib.nullcontext():
                with autocast(device, dtype), training_attention(device):
                    loss = (trained(x0).sum(-1) if isinstance(model, GPT)
                            else diffusion_loss(trained, model.graph, model.noise, x0, t, x)).mean()  # fmt: skip
                (loss * (micro / share / o.block_size)).backward()
            losses.append(loss.detach() / o.block_size)
        norm = torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip or math.inf)
        bad = (~torch.isfinite(norm + torch.stack(losses[-(share // micro) :]).sum())).float()
        if world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad:  # the step is left out
            skipped, in_a_row = skipped + 1, in_a_row + 1
        else:
            in_a_row = 0
            for optimizer in optimizers.values():
                optimizer.step()
            # a young average forgets faster, or it would remember the random start
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - min(o.ema, (1 + step) / (10 + step)))
        model.zero_grad()
        if in_a_row == 10:
            sys.exit(f"train.py: error: loss or gradient is not finite in steps {step - 8} to {step + 1}, the first "
                     f"with Data.batch(o, {step - 9}, range({o.batch_size}), model), seed={o.seed}: try a lower "
                     "--learning_rate, or another --dtype" if main else 1)  # fmt: skip

        done = step + 1
        stop = torch.tensor(caught[0] if caught else 0)
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=signals)
        last = done == o.max_steps or bool(stop)
        record = {}
        if done % o.log_interval == 0 or last:
            loss = torch.stack(losses)
            loss = loss[loss.isfinite()].mean()
            if world > 1:
                dist.all_reduce(loss)
            rate = (done - since) * o.batch_size * o.block_size / (time.perf_counter() - clock)
            record = {"loss": loss.item() / world, "lr": learning_rate(o, step), "tokens_per_s": round(rate)}
            if skipped:
                record["skipped"] = skipped
            if main and not told and since > start and not last:
                bar.write(f"about {duration((o.max_steps - done) * o.batch_size * o.block_size / rate)} to go")
                told = True
            losses, clock, since, skipped = [], time.perf_counter(), done, 0
        if done % o.eval_interval == 0 or done == o.max_steps:
            paused = time.perf_counter()
            bound, error = evaluation()
            record |= {"val_bound": bound, "val_error": error}
            if main:
                bar.write(f"step {done}: {o.eval_split} {describe(model, bound, error, data.meta, o.eval_split)}")
                if tokenizer:
                    bar.write(sample_line(ema, tokenizer, o.seed, device, dtype))
            clock += time.perf_counter() - paused
        if main:
            bar.update()
            if "loss" in record:
                bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_s']:,} tokens/s", refresh=False)
            if record:
                record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
                pending += (json.dumps({"step": done} | record) + "\n").encode()
                with contextlib.suppress(OSError):  # the disk is full: what it did not take follows with the next line
                    pending = pending[log.write(pending) :]
            if done % o.save_interval == 0 or last:
                try:
                    if not optimizers["adamw"].state:
                        raise ValueError("no step was finite yet")
                    save_checkpoint(out / "ckpt.pt", {
                        "model": model.state_dict(), "ema": ema.state_dict(),
                        "optimizer": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                        "step": done, "config": asdict(config), "options": asdict(o), "meta": data.meta,
                    })  # fmt: skip
                    unsaved = False
                except (OSError, ValueError) as error:
                    unsaved = True
                    bar.write(f"warning: step {done} was not saved ({error}); {out}/ckpt.pt is what it was", sys.stderr)
        if stop:
            break
    if main:
        bar.close()
        if pending:
            print(f"warning: {out}/log.jsonl lacks its last lines: the disk is full", file=sys.stderr)
        if unsaved:
            sys.exit(1)
        print(f"{out}/ckpt.pt " + (f"holds step {done}: python train.py --init_from=resume --out_dir={out} goes on"
                                   if stop else f"is ready: python sample.py --out_dir={out}"))  # fmt: skip
    if stop:
        sys.exit(128 + int(stop))


class Output:
    """A text stream that goes quiet when it cannot be written any more: no training ends because of what it says."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text), self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        pass


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # no run shall end because a terminal lacks the sign for "at most"
    explicit = parse(Options)
    try:
        train(Options(**explicit), explicit)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if "allocate" not in str(error):  # the words of the CPU and of CUDA
            raise
        fail("the memory does not hold this: try a smaller --micro_batch_size, --block_size or model")
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()
