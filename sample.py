"""Write text with a trained model: python sample.py --prompt "The import" --steps 256"""

import glob
import itertools
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from config import fail, parse, progress, run
from prepare import Tokenizer
from train import autocast, find_device, find_dtype, load_model

CLEAR = "\033[H\033[2J"  # of a terminal
UNSAFE = re.compile(r"(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # moves a terminal's cursor or changes its colours


@dataclass
class Options:
    """Write text with a trained model. Example: python sample.py --prompt "The {20} statement is used to {}." """

    # the model
    init_from: str = ""  # a run, checkpoint or published model (louaaron/sedd-small); not given: the newest under out/
    # the text
    prompt: str = "{}"  # {20}: 20 tokens to write; {}: the rest of a block (at the end if there is no gap); {{: brace
    num_samples: int = 1  # texts
    # sampling
    steps: int = 128  # calls of the network for a block: more are slower and better
    sampler: Literal["tweedie", "euler", "exact"] = "tweedie"  # how tokens are drawn; exact: one at a time
    top_p: float = 1.0  # draw only from the likeliest tokens, as many as hold this share of the chances (0: one)
    eta: float = 0.0  # how often written tokens change again, say 0.05
    seed: int = 1337  # of the random draws
    watch: bool = False  # see the first text being written, for 6 seconds or more, in a terminal
    judge: str = ""  # report their perplexity under this model (gpt2-large)
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls


def build_prompt(text, tokenizer, block_size, blank):
    """A list of int: tokens to keep, and -1 where one is to be written. ValueError where the text is no prompt.

    `blank` is what a gap takes from the text before it. It is " " if words bring their blanks, for a blank that is a
    token of its own is almost never followed by a word. The model then writes it, as part of the gap's first token.
    """
    # a gap becomes its number between two \0, which no command line can hold
    text = re.sub(r"\{\{|\}\}|\{([0-9]*)\}", lambda m: m[0][0] if m[1] is None else f"\0{m[1]}\0", text)
    if "\0" not in text:
        text += "\0\0"
    parts = text.replace(blank + "\0", "\0").split("\0")  # text, gap, text, ..., text
    gaps = parts[1::2]
    kept = [tokenizer.encode(text).tolist() for text in parts[::2]]
    room = block_size - sum(map(len, kept)) - sum(int(gap or 0) for gap in gaps)
    if gaps.count("") > 1 or "" in gaps and room < 1:
        raise ValueError(f"a block of {block_size} leaves {room} tokens for {{}}: write one {{}} at most, or {{20}}")
    sizes = [int(gap or room) for gap in gaps]
    if not 0 < sum(sizes) <= 1_000_000:  # more is a slip of the hand, and would fill the memory
        raise ValueError(f"the prompt's gaps have {sum(sizes)} tokens to write, and must have 1 to 1,000,000")
    prompt = kept[0]
    for size, tokens in zip(sizes, kept[1:]):
        prompt = prompt + [-1] * size + tokens
    return prompt


def judged(texts, x, judge):
    """Perplexity and entropy of texts with the tokens x (B, L), in one line.

    The perplexity is that of a causal model of transformers, on all tokens that it can read but the first. The entropy,
    in nats, is of how often each token is in a text, and the mean over the texts.
    """
    model = judge.model.float()
    longest = getattr(model.config, "max_position_embeddings", None)
    nats = count = entropy = 0
    for text, row in zip(texts, x):
        tokens = torch.tensor([judge.tokenizer.encode(text)[:longest]], device=model.device)
        n = tokens.numel() - 1  # the first is given
        nats += n * model(tokens, labels=tokens).loss
        count += n
        entropy += torch.special.entr(torch.bincount(row) / len(row)).sum() / len(x)
    return (f"perplexity {(nats / count).exp():.2f} by {model.name_or_path}, unigram entropy {entropy:.2f} nats "
            "(repetition lowers both)")  # fmt: skip


@torch.no_grad()
def main():
    given = parse(Options, __file__)
    o = Options(**given)
    if o.steps < 1 or o.num_samples < 1:
        fail(f"steps={o.steps} and num_samples={o.num_samples} must be at least 1")
    trained = glob.glob("out/**/ckpt.pt", recursive=True)
    if not (o.init_from or trained):
        fail("there is no checkpoint below out/: train a model first, python train.py, or say --init_from")
    start = o.init_from or os.path.dirname(max(trained, key=os.path.getmtime))
    device = find_device(o.device)
    model, checkpoint = load_model(start)
    meta, L = checkpoint["meta"], model.config.block_size
    tokenizer = Tokenizer(meta)
    try:
        prompt = build_prompt(o.prompt, tokenizer, L, " " if meta.get("tokenizer") in ("bpe", "gpt2") else "")
    except ValueError as error:
        fail(error)
    if model.causal and (given.keys() & {"steps", "sampler", "eta"} or max(prompt[prompt.index(-1) :]) >= 0):
        fail(f"{start!r} is a GPT, which writes left to right: no --steps, --sampler, --eta, no text after a gap")
    if o.sampler == "exact" and ("steps" in given or o.eta or model.graph.mask_id is None):
        fail("sampler='exact' turns one MASK into a token a call: no --steps, no --eta, no uniform graph")
    if o.judge:
        from transformers import pipeline

        judge = pipeline("text-generation", o.judge, device=device)  # before the texts: a wrong name costs none

    x = torch.tensor(prompt, device=device).repeat(o.num_samples, 1)
    batches = x.split(max(1, 16 * 1024 // min(len(prompt), L)))  # the network sees 16K tokens at a time
    # A long text is written in pieces. Each begins with the last half of the one before, which is written already.
    starts = range(0, len(prompt), L - L // 2)
    pieces = [slice(i, i + L) for i in starts if -1 in prompt[i + L // 2 * (i > 0) : i + L]]
    steps = prompt.count(-1) if model.causal or o.sampler == "exact" else o.steps * len(pieces)
    bar = progress(total=steps * len(batches), unit="step", leave=False, delay=0.5)
    watch = o.watch and sys.stdout.isatty()
    texts = []

    def show(step, part):
        bar.update(step > 0)
        if watch and not texts:  # a dot for each token that is still to come
            tokens = x[0, : piece.start].tolist() + part[0].tolist()
            runs = itertools.groupby(tokens, lambda token: 0 <= token < tokenizer.vocab_size)
            text = "".join(tokenizer.decode([*run]) if known else "·" * len([*run]) for known, run in runs)
            print(CLEAR + UNSAFE.sub("\ufffd", text), flush=True)
            bar.refresh()
            time.sleep(6 / steps)  # a fast model waits for the eye

    began = time.monotonic()
    model.to(device)
    torch.manual_seed(o.seed)
    with bar, autocast(device, find_dtype(o.dtype, device)):
        for batch in batches:
            for piece in pieces:
                batch[:, piece] = model.generate(batch[:, piece], o.steps, o.sampler, show, top_p=o.top_p, eta=o.eta)
            if sys.stderr.isatty():
                bar.clear()
            if batch.max() >= tokenizer.vocab_size:  # MASK
                fail(f"the model in {start!r} has diverged: train with a lower --learning_rate")
            for text in map(tokenizer.decode, batch.tolist()):
                print("\n" + "-" * 80 + "\n" if texts else CLEAR * watch, end="")
                print(UNSAFE.sub("\ufffd", text) if sys.stdout.isatty() else text, flush=True)
                texts.append(text)
    how, seconds = "GPT" if model.causal else o.sampler, time.monotonic() - began
    print(f"{len(texts)} text{'s' * (len(texts) > 1)} of {len(prompt)} tokens in {seconds:.1f} s: "
          f"{bar.n // len(batches)} steps of {how}, model from {start}", file=sys.stderr)  # fmt: skip
    if o.judge:
        print(judged(texts, x, judge), file=sys.stderr)


if __name__ == "__main__":
    run(main)
