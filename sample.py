"""Write text with a trained model: python sample.py --steps 128"""

import contextlib
import glob
import itertools
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from config import Amount, Count, Seed, Whole, fail, parse, progress, run
from prepare import Tokenizer
from train import autocast, find_device, find_dtype, load_model

BATCH = 16 * 1024  # tokens that the network sees at a time
LONGEST = 1_000_000  # tokens to generate in a text: more is a slip of the hand, and would fill the memory
UNSAFE = re.compile(r"(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # moves a terminal's cursor or changes its colours


@dataclass
class Options:
    """Write text with a trained model. Example: python sample.py --infill "The {40} statement is used to {60}." """

    # the model
    out_dir: str = ""  # where train.py left ckpt.pt; not given: the newest one under out/
    init_from: str = ""  # other weights: a run's folder, or published ones (louaaron/sedd-small)
    # the text
    prefix: str = ""  # text to begin with (kept text is heeded fully under the absorbing graph only)
    suffix: str = ""  # text to end with
    infill: str = ""  # a text in which {n} stands for n tokens to write
    length: Whole = 0  # tokens in a text, kept ones included; 0: the model's block_size; more: piece by piece
    num_samples: Count = 1  # texts
    # the way to it
    steps: Count = 128  # calls of the network for a piece: more are slower and better
    sampler: Literal["tweedie", "euler", "exact"] = "tweedie"  # how it uses the scores; exact: one by one
    top_p: Amount = 1.0  # draw only from the likeliest tokens, as many as hold this share of the chances (0: one)
    eta: Amount = 0.0  # how often written tokens change again, say 0.05
    seed: Seed = 1337  # of the draws
    watch: bool = False  # see the first text being written, for 6 seconds or more, in a terminal
    judge: str = ""  # tell their perplexity under this model (gpt2-large)
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls


def build_prompt(o, tokenizer, block_size):
    """One text as a list of int: tokens to keep, and -1 where one is to be generated. ValueError where it cannot be."""
    if o.infill and (o.prefix or o.suffix or o.length):
        raise ValueError("--infill gives the whole text: it goes without --prefix, --suffix and --length")
    parts = re.split(r"\{(\d+)\}", o.infill) if o.infill else [o.prefix, "", o.suffix]  # text, gap, text, ..., text
    kept = [tokenizer.encode(text).tolist() for text in parts[::2]]
    size = sum(map(len, kept))
    gaps = [int(number) for number in parts[1::2]] if o.infill else [(o.length or block_size) - size]
    if not 0 < sum(gaps) <= LONGEST:
        raise ValueError(f"{size} tokens of the prompt leave {sum(gaps)} to generate, where 1 to {LONGEST:,} can be: "
                         "change --length, or mark gaps, as in --infill 'A {20} is used to {30}.'")  # fmt: skip
    return kept[0] + [token for gap, text in zip(gaps, kept[1:]) for token in [-1] * gap + text]


def pieces_of(prompt, block_size):
    """The slices, a block long, in which a text is written: each begins with the last half of the one before.

    One that would have nothing new to write is left out.
    """
    half = block_size // 2
    starts = range(0, max(1, len(prompt) - half), block_size - half)
    return [slice(i, i + block_size) for i in starts if -1 in prompt[i + half * (i > 0) : i + block_size]]


def write(generate, prompt, pieces, show):
    """prompt (B, N) -> tokens (B, N). show(before, step, x) sees each state of a piece, and what stands before it."""
    x = prompt.clone()
    for piece in pieces:
        x[:, piece] = generate(x[:, piece], callback=partial(show, x[0, : piece.start]))
    return x


def show(bar, tokenizer, watch, before, step, x):
    """Move the bar; to watch, print above it the first text so far, a dot for each token that is still to come."""
    bar.update(step > 0)
    if watch:
        runs = itertools.groupby([*before.tolist(), *x[0].tolist()], lambda token: 0 <= token < tokenizer.vocab_size)
        text = "".join(tokenizer.decode([*run]) if known else "·" * len([*run]) for known, run in runs)
        print("\033[H\033[2J" + UNSAFE.sub("\ufffd", text) + "\n\033[999H", end="", flush=True)
        bar.refresh()
        time.sleep(6 / bar.total)  # a fast model waits for the eye


def load_judge(name, device):
    """A causal language model of transformers, as a function from texts to their perplexity.

    This is the exp of the mean nats of the tokens, the first of each text left out. Of a text longer than the model can
    read, the beginning counts. No code from the model's repository runs, and no pickle but plain weights.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, utils

        utils.logging.set_verbosity_error()
        utils.logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"no weights for {min(report['missing_keys'])}")
        if len(tokenizer) < model.config.vocab_size / 2:  # where its files are missing, one of no words comes
            raise ValueError("no tokenizer")
    except Exception as error:  # each missing package and broken file has its own
        fail(f"judge={name!r} is no causal language model that transformers (pip install -e '.[judge]') can load: "
             f"{repr(error)[:200]}")  # fmt: skip
    model.to(device).float().eval()

    def perplexity(texts):
        read = [tokenizer.encode(text)[: getattr(model.config, "max_position_embeddings", None)] for text in texts]
        read = [torch.tensor([tokens], device=device) for tokens in read if len(tokens) > 1]
        counts = torch.tensor([tokens.shape[1] - 1.0 for tokens in read])
        nats = torch.tensor([model(tokens, labels=tokens).loss.item() for tokens in read])
        return (nats @ counts / counts.sum()).exp().item()

    return perplexity


def unigram_entropy(x):
    """The entropy, in nats, of how often each token is in a text: x (B, L), mean over the texts."""
    return sum(torch.special.entr(torch.bincount(row) / len(row)).sum().item() for row in x) / len(x)


@torch.no_grad()
def main():
    explicit = parse(Options)
    o = Options(**explicit)
    newest = max(glob.glob("out/**/ckpt.pt", recursive=True), key=os.path.getmtime, default="out/ckpt.pt")
    start = o.init_from or o.out_dir or os.path.dirname(newest)
    device = find_device(o.device)
    model, checkpoint = load_model(start if o.init_from else f"{start}/ckpt.pt")  # out_dir never means the hub
    if "tokenizer" not in checkpoint["meta"]:
        fail(f"{start!r} has {model.config.vocab_size} tokens and nothing that tells their text: GPT-2's are 50257")
    if model.causal and (odd := explicit.keys() & {"suffix", "infill", "steps", "sampler", "eta"}):
        fail(f"{start!r} holds a GPT, which writes from left to right, a token a step: leave out --{min(odd)}")
    if o.sampler == "exact" and "steps" in explicit:
        fail("sampler='exact' calls the network once for each token: leave out --steps")
    tokenizer = Tokenizer(checkpoint["meta"])
    try:
        prompt = build_prompt(o, tokenizer, model.config.block_size)
    except ValueError as error:
        fail(error)
    judge = load_judge(o.judge, device) if o.judge else None

    model.to(device)
    torch.manual_seed(o.seed)
    pieces = pieces_of(prompt, model.config.block_size)
    size = max(1, BATCH // min(len(prompt), model.config.block_size))
    batches = torch.tensor(prompt, device=device).expand(o.num_samples, -1).split(size)
    generate = partial(model.generate, steps=o.steps, sampler=o.sampler, top_p=o.top_p, eta=o.eta)
    steps = prompt.count(-1) if model.causal or o.sampler == "exact" else o.steps * len(pieces)
    written, began, watch = [], time.monotonic(), o.watch and sys.stdout.isatty()
    bar = progress(total=steps * len(batches), unit="step", leave=False, delay=0.5, file=sys.stdout if watch else None)
    try:
        print("\033[?1049h\033[?25l" if watch else "", end="")  # a second screen, without a cursor
        with contextlib.ExitStack() as screen, bar, autocast(device, find_dtype(o.dtype, device)):
            screen.callback(print, "\033[?25h\033[?1049l" if watch else "", end="", flush=True)
            for batch in batches:
                x = write(generate, batch, pieces, partial(show, bar, tokenizer, watch))
                if x.max() >= tokenizer.vocab_size:
                    raise ValueError(f"the model in {start!r} has diverged: train with a lower --learning_rate")
                written += x.tolist()
    except ValueError as error:  # divergence, or options that this model cannot follow
        fail(error)
    finally:  # Ctrl-C and errors cost nothing that was written
        texts = [tokenizer.decode(tokens) for tokens in written]
        output = ("\n\n" + "-" * 80 + "\n").join(texts)
        print(UNSAFE.sub("\ufffd", output) if sys.stdout.isatty() else output, end="\n" * bool(texts))
    print(f"{len(texts)} text{'s' * (len(texts) > 1)} of {len(prompt)} tokens in {time.monotonic() - began:.1f} s: "
          f"{steps} steps of {'GPT' if model.causal else o.sampler}, model from {start}", file=sys.stderr)  # fmt: skip
    if judge:
        perplexity, entropy = judge(texts), unigram_entropy(torch.tensor(written))
        print(f"perplexity {perplexity:.2f} by {o.judge}, unigram entropy {entropy:.2f} nats (repetition lowers both)",
              file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    run(main, "a smaller --num_samples or --length")
