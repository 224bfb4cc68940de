"""Text in, tokens out: python prepare.py [NAME] writes data/NAME/{train,val,test}.bin and meta.json."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import numpy as np

from config import fail, parse, progress

END_OF_TEXT = 50256  # GPT-2's
BLOCK = 50  # texts that are read and encoded together
VAL_EVERY = 40  # blocks of OpenWebText, of which one document is for validation: 0.05%


@dataclass
class Options:
    """Prepare a data set for train.py. Example: python prepare.py mytext --input notes.txt --tokenizer gpt2"""

    name: str = "pydocs"  # or shakespeare_char, owt, text8, wikitext2, wikitext103, ptb, lambada, lm1b, shakespeare
    input: str = ""  # a UTF-8 text file to prepare under this name, which then is any
    tokenizer: Literal["char", "gpt2"] = "char"  # of --input: a token a character, or GPT-2's BPE
    source: str = ""  # a folder of parquet, jsonl or txt files (train*, validation*, test*) to read instead of the hub
    workers: int = 0  # threads that tokenize; 0: one a core
    seed: int = 0  # of the choice of owt's validation documents
    data_dir: str = "data"  # where the folder NAME goes


class Tokenizer:
    """Text to tokens and back, described by a meta that JSON can hold: {"tokenizer", "vocab_size", "vocab"}.

    OSError, with a message of one line, where GPT-2's BPE files cannot be loaded.
    """

    def __init__(self, meta):
        self.vocab_size = meta["vocab_size"]
        if meta["tokenizer"] == "char":
            self.chars, self.index = meta["vocab"], {c: i for i, c in enumerate(meta["vocab"])}
            self.decode = lambda tokens: "".join(self.chars[i] for i in tokens)
        else:
            import tiktoken

            try:
                bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever the network layer raises
                raise OSError(f"GPT-2's BPE files could not be downloaded ({type(error).__name__}): go online once, "
                              "or set TIKTOKEN_CACHE_DIR to a folder that holds them") from error  # fmt: skip
            self.index, self.decode = None, bpe.decode
            self.encode_bpe = bpe.encode_ordinary

    def encode(self, text):
        """text -> list of tokens; ValueError, naming it, at a character that the vocabulary lacks."""
        if self.index is None:
            return self.encode_bpe(text)
        try:
            return [self.index[c] for c in text]
        except KeyError as missing:
            known, more = "".join(self.chars[:200]), "..." * (len(self.chars) > 200)
            raise ValueError(f"the vocabulary has no character {missing.args[0]!r} ({len(self.chars)} characters: "
                             f"{known!r}{more})") from None  # fmt: skip


# ------------------------------------------------------------------------------------------ one text, cut in three


def pydocs():
    """The language reference that every Python carries, for the help() function: 0.5 MB of prose and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def shakespeare_char():
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read().decode()
    except (urllib.error.URLError, OSError) as error:
        fail(f"could not download {url} ({error}): go online, or give the file: "
             "python prepare.py shakespeare_char --input FILE")  # fmt: skip


TEXTS = {"pydocs": pydocs, "shakespeare_char": shakespeare_char}


def read_text(path):
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text (byte {error.start}): convert it first, as with iconv -t UTF-8")
    if not text.strip():
        fail(f"{path} is empty: nothing to learn from")
    return text


def cut(text, source):
    """The text as train, val and test: 90, 5 and 5 percent of its characters."""
    if len(text) < 20:
        fail(f"{source} has {len(text)} characters: it takes 20 to leave some for validation and test")
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[:a], "val": text[a:b], "test": text[b:]}


# ------------------------------------------------------------------------------------------------ sets of the hub


def detokenizer(*rules):
    """A function that applies the rules, pairs of what is sought and what takes its place, one after the other."""

    def detokenize(text):
        for old, new in rules:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text

    return detokenize


def without_blank_before(marks):
    return [(f" {mark} ", f"{mark} ") for mark in marks]


# Perplexities can be compared only on equal texts. So these make of each row what the paper's loaders make of it,
# also where that is crude: the order of the rules counts, and a nicer text would be another test set.
wikitext = detokenizer(
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *[(f" @{mark}@ ", mark) for mark in "-,."],
    *without_blank_before(":;.!?,"),
    *[(re.compile(rf"\{a}\s*([^\{b}]*?)\s*\{b}"), rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")],
    *[("= " * n + "=", "=" * (n + 1)) for n in (3, 2, 1)],
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip
ptb = detokenizer(
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"),
    (" N ", " 1 "), (" N ", " 1 "),  # twice, for in a row of them every other one lends its blank
    ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"),
)  # fmt: skip
lm1b = detokenizer(
    ("http : / / ", "http://"), ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "), (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "), (re.compile(r" \?$"), "?"), (" ! ", "! "), (re.compile(r" !$"), "!"),
    *without_blank_before(",:;"), (" / ", "/"),
    *[(re.compile(rf"\{a} ([^\{a}\{b}]+) \{b}"), rf"{a}\1{b}") for a, b in ('""', "''", "()", "[]")],
    ("$ ", "$"), ("£ ", "£"),
)  # fmt: skip


def lambada(text):
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


@dataclass
class Hub:
    """Where the hub has a set, and what becomes of a row."""

    path: str
    config: str
    splits: tuple = ("train", "validation", "test")
    column: str = "text"
    detokenize: Callable = str
    one_text: bool = False  # the rows of a split are pieces of one text, not examples that end in END_OF_TEXT
    tokenizer: str = "gpt2"


# text8 comes from the hub too and not as a zip from its author: one loader, and --source, serve all sets.
SETS = {
    "owt": Hub("Skylion007/openwebtext", "plain_text", ("train",)),
    "text8": Hub("afmck/text8", "default", one_text=True, tokenizer="char"),
    "wikitext2": Hub("Salesforce/wikitext", "wikitext-2-raw-v1", detokenize=wikitext),
    "wikitext103": Hub("Salesforce/wikitext", "wikitext-103-raw-v1", detokenize=wikitext),
    "ptb": Hub("ptb-text-only/ptb_text_only", "penn_treebank", column="sentence", detokenize=ptb),
    "lambada": Hub("EleutherAI/lambada_openai", "default", ("test",), detokenize=lambada),
    "lm1b": Hub("billion-word-benchmark/lm1b", "plain_text", ("train", "test"), detokenize=lm1b),
    "shakespeare": Hub("karpathy/tiny_shakespeare", "default", one_text=True),
}


def rows(name, source):
    """(split, list of up to BLOCK texts) of a set in its order, streamed from the hub or the folder `source`."""
    import datasets
    from huggingface_hub import get_session

    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False  # to read text it would load PyTorch, with all of its memory
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the exception
    hub, where = SETS[name], source or f"{SETS[name].path} on the Hugging Face hub"
    if source and not Path(source).is_dir():
        fail(f"source={source!r} is not a folder")
    if source:
        given = {"sample_by": "document" if hub.one_text else "line"} if any(Path(source).rglob("*.txt")) else {}
    else:  # the hub's own conversion: several of these sets are scripts, which `datasets` no longer runs
        given = {"revision": "refs/convert/parquet",
                 "data_files": {split: f"{hub.config}/{split}/*.parquet" for split in hub.splits}}  # fmt: skip
    try:
        if not source:
            get_session().head(datasets.config.HF_ENDPOINT, timeout=5)  # load_dataset would try for half a minute
        found = datasets.load_dataset(source or hub.path, streaming=True, **given)
        if not found.keys() & set(hub.splits):
            fail(f"{where} has no split {' or '.join(hub.splits)}, only {', '.join(found)}")
        for split in (s for s in hub.splits if s in found):
            for block in found[split].iter(BLOCK):
                texts = block.get(hub.column, [None])
                if not all(isinstance(text, str) for text in texts):
                    fail(f"{where} has rows without a text in the column {hub.column!r}")
                yield split.replace("validation", "val"), texts
    except Exception as error:  # each layer, from sockets to parquet, has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        fail(f"could not read {where} ({reason})" + ("" if source else ": go online, or give a folder of the same "
             f"files: python prepare.py {name} --source FOLDER"))  # fmt: skip


def examples(name, source, seed):
    """(split, list of texts) to encode; owt, which has but one split, gives 0.05% of it to val."""
    if SETS[name].one_text:
        texts = {}
        for split, block in rows(name, source):
            texts[split] = texts.get(split, "") + "".join(block)
        yield from pieces(cut(texts["train"], name) if list(texts) == ["train"] else texts, SETS[name].tokenizer)
        return

    draw = random.Random(seed)
    for i, (split, block) in enumerate(rows(name, source)):
        if name == "owt":
            if i % VAL_EVERY == 0:  # the first run takes from its first block: a small set has validation texts too
                chosen = i + (draw.randrange(VAL_EVERY) if i else 0)
            if i == chosen:
                yield "val", [block.pop(draw.randrange(len(block)))]
        if block:
            yield split, block


def pieces(texts, tokenizer):
    """(split, [piece of text]): a million characters at a time, or all, for BPE sees across any cut."""
    for split, text in texts.items():
        size = 1 << 20 if tokenizer == "char" else max(1, len(text))
        yield from ((split, [text[i : i + size]]) for i in range(0, len(text), size))


# ---------------------------------------------------------------------------------------------------- text to files


def encode_all(texts_of_splits, encode, workers):
    """encode(texts) of each (split, texts), in order: (split, tokens, bytes). Threads: tiktoken lets go of the GIL."""
    with ThreadPoolExecutor(workers) as pool, progress(unit=" texts", delay=1) as bar:
        waiting = deque()
        for split, texts in texts_of_splits:
            waiting.append((split, len(texts), pool.submit(encode, texts)))
            if len(waiting) > 2 * workers:  # reading goes on while tokens are made, but not far ahead
                split, n, done = waiting.popleft()
                yield split, *done.result()
                bar.update(n)
        for split, n, done in waiting:
            yield split, *done.result()
            bar.update(n)


def write(folder, encoded, meta):
    """Write (split, tokens, bytes) as they come, and meta, into `folder`: all of it, or nothing.

    Other files there, such as the text itself, stay. The folder is without meta.json, and so not a data set,
    while the finished files move in.
    """
    first = next(encoded, None)  # what cannot be read fails before anything is touched
    if first is None:
        raise ValueError("there are no texts")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with contextlib.closing(encoded), contextlib.ExitStack() as stack:
            files = {}
            for split, tokens, num_bytes in itertools.chain([first], encoded):
                if split not in files:
                    files[split] = stack.enter_context(open(scratch / f"{split}.bin", "wb"))
                files[split].write(tokens.tobytes())
                for total, n in ("sizes", len(tokens)), ("bytes", num_bytes):
                    meta[total][split] = meta[total].get(split, 0) + n
        (scratch / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        for split in "train", "val", "test":
            (folder / f"{split}.bin").unlink(missing_ok=True)
        for name in *(f"{split}.bin" for split in files), "meta.json":
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main():
    given = parse(Options, positional="name")
    o = Options(**given)
    hub = SETS.get(o.name) if not o.input else None
    if not o.name or Path(o.name).name != o.name or o.name.startswith("."):
        fail(f"name={o.name!r} must be a plain folder name")
    if o.workers < 0:
        fail(f"workers={o.workers} must be at least 0")
    if o.source and not hub:
        fail(f"--source stands in for a set of the hub: {', '.join(SETS)}")
    if hub and given.get("tokenizer", hub.tokenizer) != hub.tokenizer:
        fail(f"{o.name} has its tokenizer, {hub.tokenizer}: leave --tokenizer={o.tokenizer} to other texts")
    if o.input:
        text, source, tokenizer = read_text(o.input), Path(o.input).name, o.tokenizer
    elif o.name in TEXTS:
        text, source, tokenizer = TEXTS[o.name](), o.name, o.tokenizer
        if o.name == "pydocs":
            source = f"pydoc_data.topics of Python {sys.version.split()[0]}"
    elif hub:
        source, tokenizer = Path(o.source).name or hub.path, hub.tokenizer
    else:
        fail(f"unknown data set {o.name!r}: there are {', '.join([*TEXTS, *SETS])}, or give a text with --input FILE")

    meta = {"tokenizer": tokenizer, "source": source, "vocab_size": 50257, "sizes": {}, "bytes": {}}
    if tokenizer == "char":
        meta["vocab"] = list(" abcdefghijklmnopqrstuvwxyz") if hub else sorted(set(text))
        meta["vocab_size"] = len(meta["vocab"])
    meta["dtype"] = "<u2" if meta["vocab_size"] <= 65535 else "<u4"
    end = [END_OF_TEXT] if hub and not hub.one_text else []
    folder = Path(o.data_dir) / o.name
    try:
        encoder = Tokenizer(meta)
    except OSError as error:
        fail(str(error))

    def encode(texts):
        texts = [hub.detokenize(text) for text in texts] if hub else texts
        tokens = np.concatenate([np.asarray(encoder.encode(text) + end, meta["dtype"]) for text in texts])
        return tokens, sum(len(text.encode()) for text in texts)

    texts = examples(o.name, o.source, o.seed) if hub else pieces(cut(text, source), tokenizer)
    try:
        write(folder, encode_all(texts, encode, o.workers or os.cpu_count()), meta)
    except ValueError as error:
        fail(f"{source}: {error}")
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror or error}")
    sizes = ", ".join(f"{name} {size:,}" for name, size in meta["sizes"].items())
    print(f"{folder}: {sizes} tokens of {meta['vocab_size']:,} kinds, from {source}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a kill, too, shall leave no half-written files
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
