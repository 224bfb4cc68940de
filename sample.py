"""Write text with a trained model: python sample.py --steps 128"""

import re
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import sedd
from config import fail, parse
from prepare import Tokenizer
from train import autocast, find_device, find_dtype, load_checkpoint


@dataclass
class Options:
    """Sample from a checkpoint of train.py. Example: python sample.py --infill "The {40} statement is used to {60}." """

    out_dir: str = "out"  # where train.py left ckpt.pt
    steps: int = 128  # calls of the network for a batch: more are slower and better
    sampler: Literal["tweedie", "euler"] = "tweedie"  # how a step uses the scores
    num_samples: int = 1  # texts, drawn side by side
    length: int = 0  # tokens in a text, prompt included; 0: the model's block_size
    prefix: str = ""  # text to begin with (kept prompts are exact under the absorbing graph only)
    suffix: str = ""  # text to end with
    infill: str = ""  # a text in which {n} stands for n tokens to write, such as "def {12}(self):"
    seed: int = 1337  # of the draws
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


def main():
    o = Options(**parse(Options))
    for name, least in ("steps", 1), ("num_samples", 1), ("length", 0):
        if getattr(o, name) < least:
            fail(f"{name}={getattr(o, name)} must be at least {least}")
    if not 0 <= o.seed < 2**63:
        fail(f"seed={o.seed} must be at least 0 and below 2**63")
    checkpoint = load_checkpoint(f"{o.out_dir}/ckpt.pt")
    device = find_device(o.device)
    config = sedd.SEDDConfig(**checkpoint["config"])
    model = sedd.MODELS[config.parameterization](config)
    model.load_state_dict(checkpoint["ema"])
    model.to(device).eval()
    tokenizer = Tokenizer(checkpoint["meta"])
    prompt = build_prompt(o, tokenizer, model.config.block_size)

    torch.manual_seed(o.seed)
    prompt = torch.tensor(prompt, device=device).expand(o.num_samples, -1)
    calm = 0.1 if sys.stderr.isatty() else 30  # seconds between updates: a log file needs few
    with (tqdm(total=o.steps, unit="step", dynamic_ncols=True, mininterval=calm) as bar,
          autocast(device, find_dtype(o.dtype, device))):  # fmt: skip
        x = sedd.sample(model, model.graph, model.noise, prompt.shape, o.steps, o.sampler, prompt, device,
                        callback=lambda step, x: bar.update(step > 0))  # fmt: skip
    for i, tokens in enumerate(x.tolist()):
        if i:
            print("\n" + "-" * 80)
        print(tokenizer.decode(tokens))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that the model knows
    try:
        main()
    except BrokenPipeError:  # the reader of our output has seen enough, as head has
        sys.stderr.close()
