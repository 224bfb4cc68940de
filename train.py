"""Train a score network: python train.py, or torchrun --nproc_per_node=8 train.py config/owt.py"""

import contextlib
import copy
import ctypes
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import fail, parse
from sedd import MODELS, SEDD, SEDDConfig, diffusion_loss, nll_bound


@dataclass
class Options:
    """Train SEDD. Example: python train.py --dataset=shakespeare_char --max_steps=5000 --graph=uniform"""

    # data and output
    dataset: str = "pydocs"  # a folder below data_dir, written by prepare.py
    data_dir: str = "data"  # where prepare.py put it
    out_dir: str = "out"  # for ckpt.pt and log.jsonl
    init_from: str = "scratch"  # scratch, or resume: go on from out_dir/ckpt.pt with its options
    # model
    graph: Literal["absorb", "uniform"] = "absorb"  # what noise turns a token into: MASK, or any token
    noise: Literal["loglinear", "geometric"] = "loglinear"  # how noise grows with time
    block_size: int = 128  # tokens in a sequence
    n_layer: int = 4  # transformer blocks
    n_head: int = 3  # attention heads
    n_embd: int = 192  # width
    cond_dim: int = 64  # width of the embedding of sigma
    dropout: float = 0.0  # on the branches of the blocks
    # optimisation
    times: Literal["uniform", "logit_normal"] = "logit_normal"  # draws of t: the paper's, or more around 1/2
    max_steps: int = 1700  # optimiser steps
    batch_size: int = 32  # sequences a step, over all processes and micro-batches
    micro_batch_size: int = 0  # sequences a process holds at a time; 0: its whole share of the batch
    learning_rate: float = 2e-3  # of AdamW, after the warm-up
    warmup_steps: int = 100  # steps of linear growth from 0
    decay_lr: bool = True  # fall along a cosine to 0 at max_steps, else stay constant
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    ema: float = 0.999  # decay of the averaged weights, which are evaluated and sampled
    seed: int = 1337  # of the weights, batches, times, noise and dropout
    # evaluation and checkpoints
    eval_only: bool = False  # print the validation bound of the start weights and stop
    eval_interval: int = 500  # steps between evaluations
    eval_sequences: int = 128  # validation sequences, evenly spread over the split
    eval_times: int = 8  # times per sequence in the bound's integral
    save_interval: int = 500  # steps between checkpoints
    log_interval: int = 10  # steps between lines of log.jsonl
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; auto: bfloat16 where it is fast
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the blocks; auto: on CUDA


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

# Training leaves out the first thousandth of time, where the uniform graph's rare losses explode.
T_MIN = 1e-3


def find_device(name):
    """The torch.device that `name` means here; fails where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception:
        fail(f"device={name!r} is not to be had here: try --device=auto")
    if device.type == "cpu":
        # in bfloat16 the CPU's flash kernel takes up to four times as long as the formula it stands for
        torch.backends.cuda.enable_flash_sdp(False)  # the switches of SDPA, of all devices
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
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


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path):
    """The dict that train() saved, on the CPU; fails in one line at anything else."""
    path = Path(path)
    if not path.is_file():
        fail(f"there is no checkpoint {path}: train one first, python train.py --out_dir={path.parent}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model"], checkpoint["ema"], checkpoint["meta"]["tokenizer"], checkpoint["config"]["graph"]
    except Exception as error:
        fail(f"{path} is no checkpoint of train.py, or is cut short ({type(error).__name__})")
    return checkpoint


def save_checkpoint(path, checkpoint):
    """Write to a temporary name and rename: whenever the machine stops, `path` is a whole checkpoint."""
    scratch = path.with_name(f".{path.name}.partial")
    torch.save(checkpoint, scratch)
    os.replace(scratch, path)


def load_model(start):
    """A trained SEDD (on the CPU, in evaluation mode) and the meta of its data, None where nothing tells it.

    `start` is a folder with the ckpt.pt of a run, whose averaged weights are taken, or else a folder or hub
    repository in the published format. Fails in one line at anything else.
    """
    if (Path(start) / "ckpt.pt").is_file():
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


class Data:
    """One data set's memory-mapped tokens, cut into blocks."""

    def __init__(self, o):
        self.folder, self.block_size = Path(o.data_dir) / o.dataset, o.block_size
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.splits = {s: np.memmap(self.folder / f"{s}.bin", self.meta["dtype"], "r") for s in ("train", "val")}
            self.meta["vocab_size"], self.meta["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            there = isinstance(error, FileNotFoundError) and "is not prepared" or f"is not readable ({error})"
            fail(f"the data set {self.folder} {there}: python prepare.py {o.dataset}")
        for name, tokens in self.splits.items():
            if len(tokens) < o.block_size:
                fail(f"{self.folder}/{name}.bin has {len(tokens)} tokens, fewer than one block: "
                     f"try --block_size={max(1, min(map(len, self.splits.values())) // 2)}, or a longer text")

    def batch(self, o, step, indices, model):
        """x0 (n, L), times t (n,) and noised x (n, L) of the sequences `indices` of the global batch of a step.

        A pure function of (seed, step, index), however many processes share the batch. The times of the whole
        batch are one low-discrepancy set: uniform, or pushed towards 1/2, to where most of the learning is
        (arXiv 2605.13026). That changes how much each noise level counts in the training loss, which then is
        no bound on the likelihood; the bound that `evaluate` reports always has the paper's uniform times.
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
        return torch.stack(x0), t, torch.stack(x)

    def fixed_blocks(self, split, n):
        """n whole blocks (or all, if there are fewer), evenly spread over the split: (n, L)."""
        tokens, L = self.splits[split], self.block_size
        starts = np.unique(np.linspace(0, len(tokens) // L - 1, n).astype(int)) * L
        return torch.from_numpy(np.stack([tokens[s : s + L].astype(np.int64) for s in starts]))


def mixed_seed(*numbers):
    """One 63-bit seed from several small numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ----------------------------------------------------------------------------------------------- evaluation


def evaluate(model, x0, num_times, seed, rank, world, device, dtype):
    """Mean likelihood bound of x0 (n, L) and its standard error over sequences, in nats per token.

    Sequences, times and noise are the same at every call and for every number of processes.
    """
    bounds = torch.zeros(len(x0))
    model.eval()
    for k, rows in enumerate(torch.arange(len(x0)).split(16)):
        if k % world == rank:
            torch.manual_seed(mixed_seed(seed, k))
            with autocast(device, dtype):
                bounds[rows] = nll_bound(model, model.graph, model.noise, x0[rows].to(device), num_times).cpu()
    if world > 1:
        bounds = bounds.to(device)
        dist.all_reduce(bounds)
    bounds = bounds.cpu().double() / x0.shape[1]
    return bounds.mean().item(), (bounds.std() / len(bounds) ** 0.5).item() if len(bounds) > 1 else 0.0


def describe(bound, error, meta):
    text = f"bound {bound:.4f} ± {error:.4f} nats per token, perplexity ≤ {math.exp(min(bound, 700)):.2f}"
    return text + (f", {bound / math.log(2):.4f} bits per character" if meta["tokenizer"] == "char" else "")


# ------------------------------------------------------------------------------------------------- training


def learning_rate(o, step):
    warm = min(1.0, (step + 1) / max(1, o.warmup_steps))
    progress = max(0.0, (step - o.warmup_steps) / max(1, o.max_steps - o.warmup_steps))
    return o.learning_rate * warm * (0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if o.decay_lr else 1.0)


def train(o, explicit):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, main = int(os.environ.get("LOCAL_RANK", 0)), rank == 0
    out = Path(o.out_dir)

    resumed = None
    if o.init_from == "resume":
        resumed = load_checkpoint(out / "ckpt.pt")
        saved = {k: v for k, v in resumed["options"].items() if k not in ("init_from", "out_dir", "eval_only")}
        for name in {f.name for f in fields(SEDDConfig)} & explicit.keys():
            if explicit[name] != saved[name]:
                fail(f"{name}={explicit[name]} but {out}/ckpt.pt was trained with {saved[name]}: leave it out to resume")
        o = Options(**{**saved, **explicit})
    elif o.init_from != "scratch":
        fail(f"init_from={o.init_from!r} is none of scratch, resume")

    for name, least in {
        "block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "cond_dim": 1, "max_steps": 1, "eval_interval": 1,
        "eval_sequences": 1, "eval_times": 1, "save_interval": 1, "log_interval": 1, "micro_batch_size": 0,
        "warmup_steps": 0, "learning_rate": 0, "weight_decay": 0, "grad_clip": 0, "seed": 0,
    }.items():  # fmt: skip
        if not least <= getattr(o, name) < math.inf:  # nan is in no order with anything
            fail(f"{name}={getattr(o, name)} must be at least {least}")
    for name in "dropout", "ema":
        if not 0 <= getattr(o, name) < 1:
            fail(f"{name}={getattr(o, name)} must be at least 0 and below 1")
    share, left = divmod(o.batch_size, world)
    micro = o.micro_batch_size or share
    if o.batch_size < 1 or left or micro < 1 or share % micro:
        fail(f"batch_size={o.batch_size} cannot be shared by {world} processes in micro-batches of {micro or 1}: "
             f"try --batch_size={max(1, round(o.batch_size / (world * max(1, micro)))) * world * max(1, micro)}")  # fmt: skip

    device = find_device(o.device if world == 1 or o.device != "auto" or not torch.cuda.is_available()
                         else f"cuda:{local_rank}")  # fmt: skip
    dtype = find_dtype(o.dtype, device)
    data = Data(o)
    if resumed and resumed["meta"].get("vocab") != data.meta.get("vocab"):
        fail(f"{out}/ckpt.pt was trained on another vocabulary than {data.folder} has: prepare the same data set")
    torch.manual_seed(o.seed)
    try:
        config = SEDDConfig(data.meta["vocab_size"], o.block_size, o.n_layer, o.n_head, o.n_embd, o.cond_dim,
                            o.dropout, o.graph, o.noise)  # fmt: skip
    except ValueError as error:
        fail(str(error))
    if main and not o.eval_only:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"out_dir={o.out_dir!r} cannot hold the results: {error.strerror}")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True

    model = SEDD(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.learning_rate, weight_decay=o.weight_decay, fused=True)
    start = 0
    if resumed:
        model.load_state_dict(resumed["model"])
        ema.load_state_dict(resumed["ema"])
        optimizer.load_state_dict(resumed["optimizer"])
        start = resumed["step"]

    val = data.fixed_blocks("val", o.eval_sequences)
    evaluation = lambda: evaluate(ema, val, o.eval_times, o.seed, rank, world, device, dtype)
    if o.eval_only:
        bound = evaluation()
        if main:
            print(f"step {start}: {describe(*bound, data.meta)}")
        return

    if o.compile == "True" or (o.compile == "auto" and device.type == "cuda"):
        for block in model.blocks:  # block by block: one compilation serves them all, and DDP can overlap them
            block.compile()
    trained = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None) \
        if world > 1 else model  # fmt: skip

    bar, log = None, None
    if main:
        n = sum(p.numel() for p in model.parameters())
        print(f"{n / 1e6:.2f}M parameters on {world} x {device} in {str(dtype).removeprefix('torch.')}; "
              f"{o.batch_size * o.block_size:,} tokens a step, steps {start} to {o.max_steps}; output in {out}/")  # fmt: skip
        before = []
        if resumed and (out / "log.jsonl").is_file():
            lines = (out / "log.jsonl").read_text().splitlines()
            before = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        elif not resumed and (out / "ckpt.pt").is_file():
            os.replace(out / "ckpt.pt", out / "ckpt.old.pt")
            print(f"the checkpoint of an earlier run is kept as {out}/ckpt.old.pt")
        log = open(out / "log.jsonl", "w", buffering=1)
        log.writelines(line + "\n" for line in before)
        bar = tqdm(total=o.max_steps, initial=start, unit="step", dynamic_ncols=True,
                   mininterval=0.1 if sys.stderr.isatty() else 30)  # fmt: skip

    parameters, averaged = list(model.parameters()), list(ema.parameters())
    losses, clock, since = [], time.perf_counter(), start
    for step in range(start, o.max_steps):
        torch.manual_seed(mixed_seed(o.seed, step, rank))  # dropout
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        mine = range(rank * share, (rank + 1) * share)
        for i in range(0, share, micro):
            batch = data.batch(o, step, mine[i : i + micro], model)
            x0, t, x = (tensor.to(device, non_blocking=True) for tensor in batch)
            wait = world > 1 and i + micro < share
            with trained.no_sync() if wait else contextlib.nullcontext():
                with autocast(device, dtype):
                    loss = diffusion_loss(trained, model.graph, model.noise, x0, t, x).mean()
                (loss * (micro / share / o.block_size)).backward()
            losses.append(loss.detach() / o.block_size)
        if o.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # a young average forgets faster, or it would remember the random start
        torch._foreach_lerp_(averaged, parameters, 1 - min(o.ema, (1 + step) / (10 + step)))

        done = step + 1
        record = {}
        if done % o.log_interval == 0 or done == o.max_steps:
            loss = torch.stack(losses).mean()
            if world > 1:
                dist.all_reduce(loss)
            rate = (done - since) * o.batch_size * o.block_size / (time.perf_counter() - clock)
            record = {"loss": loss.item() / world, "lr": learning_rate(o, step), "tokens_per_s": round(rate)}
            losses, clock, since = [], time.perf_counter(), done
        if done % o.eval_interval == 0 or done == o.max_steps:
            paused = time.perf_counter()
            bound, error = evaluation()
            record |= {"val_bound": bound, "val_error": error}
            if main:
                bar.write(f"step {done}: validation {describe(bound, error, data.meta)}")
            clock += time.perf_counter() - paused
        if main:
            bar.update()
            if record:
                log.write(json.dumps({"step": done} | record) + "\n")
                if "loss" in record:
                    bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_s']:,} tokens/s")
            if done % o.save_interval == 0 or done == o.max_steps:
                save_checkpoint(out / "ckpt.pt", {
                    "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": done, "config": asdict(config), "options": asdict(o), "meta": data.meta,
                })  # fmt: skip
    if main:
        bar.close()
        print(f"{out}/ckpt.pt is ready: python sample.py --out_dir={out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # no run shall end because a terminal lacks the sign for "at most"
    explicit = parse(Options)
    try:
        train(Options(**explicit), explicit)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
