"""Write text with a trained model: python sample.py --steps 128"""

import contextlib
import itertools
import math
import re
import shutil
import signal
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from config import fail, parse, progress
from prepare import Tokenizer
from train import autocast, find_device, find_dtype, generate, load_checkpoint, load_model


@dataclass
class Options:
    """Write text with a trained model. Example: python sample.py --infill "The {40} statement is used to {60}." """

    # the model
    out_dir: str = "out"  # where train.py left ckpt.pt
    init_from: str = ""  # other weights: a run's folder, or published ones (louaaron/sedd-small)
    # the text
    prefix: str = ""  # text to begin with (kept text is heeded fully under the absorbing graph only)
    suffix: str = ""  # text to end with
    infill: str = ""  # a text in which {n} stands for n tokens to write
    length: int = 0  # tokens in a text, kept ones included; 0: the model's block_size
    num_samples: int = 1  # texts, drawn side by side
    # the way to it
    steps: int = 128  # calls of the network for a batch: more are slower and better
    sampler: Literal["tweedie", "euler"] = "tweedie"  # how a step uses the scores
    seed: int = 1337  # of the draws
    watch: bool = False  # see the first text being written, for 6 seconds or more, in a terminal
    judge: str = ""  # tell the perplexity of the texts under this language model (gpt2-large)
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls


def build_prompt(o, tokenizer, block_size):
    """One row of tokens to keep, with -1 where one is to be generated: a list of int."""
    try:
        if o.infill:
            if o.prefix or o.suffix or o.length:
                fail("--infill gives the whole text: it goes without --prefix, --suffix and --length")
            pieces = re.split(r"\{(\d+)\}", o.infill)  # kept, number, kept, number, ..., kept
            prompt = []
            for i, piece in enumerate(pieces):  # one token too many is refused below, before billions fill the memory
                prompt += tokenizer.encode(piece) if i % 2 == 0 else [-1] * min(int(piece), block_size + 1)
        else:
            prefix, suffix = tokenizer.encode(o.prefix), tokenizer.encode(o.suffix)
            length = o.length or block_size
            if len(prefix) + len(suffix) > length:
                fail(f"the prompt has {len(prefix) + len(suffix)} tokens, more than the length {length}: "
                     "shorten it or raise --length")  # fmt: skip
            prompt = prefix + [-1] * min(length - len(prefix) - len(suffix), block_size + 1) + suffix
    except ValueError as error:
        fail(str(error))
    if len(prompt) > block_size:
        fail(f"the text would have more tokens than the {block_size} that this model was trained on: ask for fewer")
    if -1 not in prompt:
        fail("the prompt leaves nothing to generate: mark the gaps, as in --infill 'A {20} is used to {30}.'")
    return prompt


# -------------------------------------------------------------------------------- what is seen while it is written


@contextlib.contextmanager
def progress_bar(steps):
    """Gives a callback for the samplers."""
    with progress(total=steps, unit="step") as bar:
        yield lambda step, x: bar.update(step > 0)


def wrap(text, width):
    """The rows of a text on a terminal of that width; what would move its cursor becomes harmless."""
    rows, used = [""], 0
    for c in text.expandtabs(4):
        cells = 1 + (unicodedata.east_asian_width(c) in "WF")
        if c == "\n" or used + cells > width:
            rows.append("")
            used = 0
        if c != "\n":
            rows[-1] += c if c.isprintable() else "?"
            used += cells
    return rows


@contextlib.contextmanager
def watching(steps, tokenizer, least_seconds=6.0, least_pause=1 / 25):
    """Gives a callback that shows the first text in the terminal, one dot a token that is still to come.

    It waits where the model is too fast for the eye and leaves out frames where there are too many. A text taller
    than the terminal is shown from its top.
    """
    start, seen, drawn = time.monotonic(), itertools.count(), -math.inf

    def show(step, x):
        nonlocal drawn
        done = next(seen)
        time.sleep(max(0.0, start + least_seconds * done / steps - time.monotonic()))
        if time.monotonic() - drawn < least_pause and done < steps:
            return
        drawn, text = time.monotonic(), ""
        for known, run in itertools.groupby(x[0].tolist(), lambda token: 0 <= token < tokenizer.vocab_size):
            text += tokenizer.decode(list(run)) if known else "·" * len(list(run))
        width, height = shutil.get_terminal_size()
        rows = wrap(text, width)
        rows = rows[: height - 1] + [""] * (height - 1 - len(rows)) + [f"step {done} of {steps}"[: width - 1]]
        sys.stdout.write("\033[H" + "\n".join("\033[K" + row for row in rows))
        sys.stdout.flush()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a kill, too, shall leave a terminal one can use
    sys.stdout.write("\033[?1049h\033[?25l")  # a second screen, without a cursor
    try:
        yield show
    finally:
        sys.stdout.write("\033[?25h\033[?1049l")
        sys.stdout.flush()


# --------------------------------------------------------------------------------------- what the texts are worth


def load_judge(name, device, ours):
    """A causal language model of transformers, and its tokenizer as a function from text to tokens.

    No code from the model's repository runs, and no pickle but plain weights. Without a tokenizer of its own it
    reads the tokens of `ours`, if it knows as many.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        fail("--judge needs a package more: pip install -e '.[judge]'")
    logging.set_verbosity_error(), logging.disable_progress_bar()
    try:
        judge, report = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, weights_only=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"no weights for {sorted(report['missing_keys'])[0]}")
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        fail(f"judge={name!r} is no causal language model that transformers can load: {why}")
    judge.to(device).float().eval()
    known = judge.get_input_embeddings().num_embeddings
    with contextlib.suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if len(tokenizer) > known / 2:  # where the files are missing, a tokenizer of no words may come
            return judge, lambda text: tokenizer(text)["input_ids"]
    if known != ours.vocab_size:
        fail(f"judge={name!r} has no tokenizer, and its {known} tokens are not the {ours.vocab_size} of the model")
    return judge, ours.encode


def perplexity(judge, encode, texts):
    """exp of the judge's mean nats per token, over all tokens of the texts but the first of each, which it is given.

    Of a text longer than the judge can read, the beginning counts.
    """
    nats, count = 0.0, 0
    for text in texts:
        tokens = torch.tensor(encode(text)[: getattr(judge.config, "max_position_embeddings", None)]).to(judge.device)
        if len(tokens) > 1:
            logits = judge(tokens[None]).logits[0, :-1].float()
            nats += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
            count += len(tokens) - 1
    return math.exp(min(nats / count, 700)) if count else math.nan


def unigram_entropy(x):
    """The entropy, in nats, of how often each token is in a text: x (B, L), mean over the texts."""
    return sum(torch.special.entr(torch.bincount(row) / len(row)).sum().item() for row in x) / len(x)


@torch.no_grad()
def main():
    explicit = parse(Options)
    o = Options(**explicit)
    for name, least in ("steps", 1), ("num_samples", 1), ("length", 0):
        if getattr(o, name) < least:
            fail(f"{name}={getattr(o, name)} must be at least {least}")
    if not 0 <= o.seed < 2**63:
        fail(f"seed={o.seed} must be at least 0 and below 2**63")
    start = o.init_from or o.out_dir
    if not o.init_from and not Path(start, "ckpt.pt").is_file():
        load_checkpoint(f"{start}/ckpt.pt")  # says what to do; out_dir never means the hub
    device = find_device(o.device)
    model, meta = load_model(start)
    if meta is None:
        fail(f"{start!r} has {model.config.vocab_size} tokens and nothing that tells their text: GPT-2's are 50257")
    causal = model.config.parameterization == "causal"
    for name in ("suffix", "infill", "steps", "sampler") if causal else ():
        if name in explicit:
            fail(f"{start!r} holds a GPT, which writes from left to right, a token a step: leave out --{name}")
    try:
        tokenizer = Tokenizer(meta)
    except OSError as error:
        fail(str(error))
    prompt = torch.tensor(build_prompt(o, tokenizer, model.config.block_size), device=device).expand(o.num_samples, -1)
    judge = load_judge(o.judge, device, tokenizer) if o.judge else None

    model.to(device)
    diverged = f"the model in {start!r} has diverged and cannot write: train again with a lower --learning_rate"
    noise = model.graph.sample_prior(1, prompt.shape[1], device=device)
    if not model.output_layer.linear(model.trunk(noise, torch.ones(1, device=device))).isfinite().all():
        fail(diverged)
    torch.manual_seed(o.seed)
    steps = int((prompt[0] < 0).sum()) if causal else o.steps
    view = watching(steps, tokenizer) if o.watch and sys.stdout.isatty() else progress_bar(steps)
    with view as callback, autocast(device, find_dtype(o.dtype, device)):
        x = generate(model, prompt, steps, o.sampler, callback)
    if x.max() >= tokenizer.vocab_size:
        fail(diverged)
    texts = [tokenizer.decode(tokens) for tokens in x.tolist()]
    print(("\n\n" + "-" * 80 + "\n").join(texts))
    if judge:
        print(f"perplexity {perplexity(*judge, texts):.2f} by {o.judge}, unigram entropy {unigram_entropy(x):.2f} nats "
              "(repetition lowers both)", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that the model knows
    try:
        main()
    except BrokenPipeError:  # the reader of our output has seen enough, as head has
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit(130)
