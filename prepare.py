"""Text in, tokens out: python prepare.py [NAME] writes data/NAME/{train,val,test}.bin and meta.json."""

import json
import os
import random
import re
import sys
import tempfile
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import regex  # which comes with tiktoken, and reads its patterns
import tiktoken

from config import Seed, Whole, fail, parse, progress, run

END_OF_TEXT = 50256  # GPT-2's
SPLITS = "train", "validation", "test"  # as the hub calls them; our files say val
BLOCK = 2000  # texts that are read and encoded together; of each block OpenWebText gives one to val: 0.05%


@dataclass
class Options:
    """Prepare a data set for train.py. Example: python prepare.py mytext --input notes.txt --tokenizer gpt2"""

    name: str = "pydocs"  # or shakespeare_char, owt, text8, wikitext2, wikitext103, ptb, lambada, lm1b, shakespeare
    input: str = ""  # a UTF-8 text file to prepare under this name, which then is any
    tokenizer: Literal["bpe", "char", "gpt2"] = "bpe"  # BPE learned from the text; a token a character; GPT-2's BPE
    vocab_size: Annotated[int, 256, 2**20] = 1024  # tokens that bpe learns, with the 256 single bytes
    source: str = ""  # a folder of parquet, jsonl or txt files (train*, validation*, test*) to read instead of the hub
    workers: Whole = 0  # threads that tokenize; 0: one a core
    seed: Seed = 0  # of the choice of owt's validation documents
    data_dir: str = "data"  # where the folder NAME goes


# GPT-2's words. A word takes the blank before it along; no token reaches from one word into the next.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn_bpe(text, vocab_size):
    """Byte pair encoding: a list of up to `vocab_size` byte strings, first the 256 single bytes.

    Each word starts as its bytes. Again and again, the pair of neighbours that is seen most often becomes one token,
    of equals the one whose tokens come first in the list. A pair that is seen only once is not worth a token.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words = Counter()  # written in tokens, each the character of its number, with how often the text has them
    seen, holders = Counter(), defaultdict(set)  # of a pair: how often the text has it, and the words that hold it

    def count(word, n):
        words[word] += n
        for pair in map("".join, zip(word, word[1:])):
            seen[pair] += n
            (holders[pair].add if n > 0 else holders[pair].discard)(word)

    for word, n in Counter(match[0] for match in regex.finditer(WORD, text)).items():
        count(word.encode().decode("latin-1"), n)
    while len(tokens) < vocab_size and (most := max(seen.values(), default=0)) > 1:
        best = min(pair for pair, n in seen.items() if n == most)
        for word in list(holders[best]):
            n = words[word]
            count(word, -n)
            count(word.replace(best, chr(len(tokens))), n)
        tokens.append(b"".join(tokens[ord(c)] for c in best))
    return list(dict.fromkeys(tokens))  # two pairs may have spelled the same


class Tokenizer:
    """Text to tokens and back, as a meta that JSON can hold tells: {"tokenizer", "vocab_size", "vocab", "pattern"}.

    "char": vocab lists the characters. "bpe": it lists byte strings, a byte written as the character of its number;
    pattern finds the words. "gpt2" needs neither. OSError, in one line, where GPT-2's files cannot be loaded.
    """

    def __init__(self, meta):
        self.vocab_size, self.vocab, self.bpe = meta["vocab_size"], meta.get("vocab"), None
        if meta["tokenizer"] == "bpe":
            ranks = {token.encode("latin-1"): i for i, token in enumerate(self.vocab)}
            self.bpe = tiktoken.Encoding("bpe", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens={})
        elif meta["tokenizer"] == "gpt2":
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever the network layer raises
                raise OSError(f"GPT-2's BPE files could not be downloaded ({type(error).__name__}): go online once, "
                              "or set TIKTOKEN_CACHE_DIR to a folder that holds them") from error  # fmt: skip

    def encode(self, text):
        """text -> list of tokens; ValueError, naming it, at a character that the vocabulary lacks."""
        if self.bpe:
            return self.bpe.encode_ordinary(text)
        index = {c: i for i, c in enumerate(self.vocab)}
        try:
            return [index[c] for c in text]
        except KeyError as missing:
            raise ValueError(f"the vocabulary has no character {missing} ({len(index)} characters: "
                             f"{''.join(self.vocab[:200])!r})") from None  # fmt: skip

    def decode(self, tokens):
        """List of tokens -> text; bytes that form no character become the replacement sign, U+FFFD."""
        return self.bpe.decode(tokens) if self.bpe else "".join(self.vocab[i] for i in tokens)


def detokenize(text, rules):
    """The rules, pairs of what is sought and what takes its place, applied one after the other."""
    for old, new in rules:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


# Perplexities can be compared only on equal texts. So these rules make of each row what the loaders of the paper's
# authors make of it, also where that is crude. Their order counts.
WIKITEXT = [
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *[(f" @{mark}@ ", mark) for mark in "-,."],
    *[(f" {mark} ", f"{mark} ") for mark in ":;.!?,"],
    *[(re.compile(rf"\{a}\s*([^\{b}]*?)\s*\{b}"), rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")],
    *[("= " * n + "=", "=" * (n + 1)) for n in (3, 2, 1)],
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
]  # fmt: skip
PTB = [
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"),
    (" N ", " 1 "), (" N ", " 1 "),  # twice, for of several in a row the first pass takes every other one
    ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"),
]  # fmt: skip
LM1B = [
    ("http : / / ", "http://"), ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "), (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "), (re.compile(r" \?$"), "?"), (" ! ", "! "), (re.compile(r" !$"), "!"),
    (" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"),
    *[(re.compile(rf"\{a} ([^\{a}\{b}]+) \{b}"), rf"{a}\1{b}") for a, b in ('""', "''", "()", "[]")],
    ("$ ", "$"), ("£ ", "£"),
]  # fmt: skip
LAMBADA = [("“", '"'), ("”", '"'), (re.compile(r"(?s)\A\s*(.*?)\s*\Z"), r"\n\1")]


@dataclass
class Set:
    """Where a data set is, and what becomes of its rows: examples that end in END_OF_TEXT, or pieces of one text."""

    path: str  # on the Hugging Face hub, if there are `files`; else a file or URL
    files: str = ""  # of a split; never a partial-train, which is all that the hub converts of more than 5 GB
    sizes: tuple = ()  # what is known of SPLITS, in rows, or in characters of one text; 0: there is no such split
    rules: list = ()
    column: str = "text"
    revision: str = "main"
    one_text: bool = False
    tokenizer: str = "gpt2"
    letters: str = ""  # the vocabulary by characters, where the set and not the text defines it


# `datasets` no longer runs scripts. Of sets that were scripts the hub keeps an old conversion to parquet: it is pinned
# here, but for ptb's, whose commit we do not know.
SETS = {
    "pydocs": Set("pydoc_data.topics of Python " + sys.version.split()[0], one_text=True, tokenizer=Options.tokenizer),
    "shakespeare_char": Set("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                            one_text=True, tokenizer="char"),
    "owt": Set("Skylion007/openwebtext", "plain_text/{}-*-of-00080.parquet", (8013769, 0, 0)),
    "text8": Set("afmck/text8", "data/{}-*.parquet", (90000000, 5000000, 5000000), one_text=True, tokenizer="char",
                 letters=" abcdefghijklmnopqrstuvwxyz"),
    "wikitext2": Set("Salesforce/wikitext", "wikitext-2-raw-v1/{}-*.parquet", (36718, 3760, 4358), WIKITEXT),
    "wikitext103": Set("Salesforce/wikitext", "wikitext-103-raw-v1/{}-*.parquet", (1801350, 3760, 4358), WIKITEXT),
    "ptb": Set("ptb-text-only/ptb_text_only", "penn_treebank/{}/*.parquet", (42068, 3370, 3761), PTB, "sentence",
               "refs/convert/parquet"),
    "lambada": Set("EleutherAI/lambada_openai", "default/{}/*.parquet", (0, 0, 5153), LAMBADA,
                   revision="761609c75432cf25d076cd41b8182b7f3ceaae6e"),
    "lm1b": Set("billion-word-benchmark/lm1b", "plain_text/{}/*.parquet", (30301028, 0, 306688), LM1B,
                revision="8d52bfd3cc2819fc1166dbb8144c328e2690de3e"),
    "shakespeare": Set("karpathy/tiny_shakespeare", "data/{}-*.parquet", (1003854, 55770, 55770), one_text=True,
                       revision="fe12e06d82fe3af4291b90426557387520d81385"),
}  # fmt: skip


def pydocs():
    """The language reference that every Python carries, for the help() function: 0.5 MB of prose and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def read_text(kind):
    """The text of a set that is one file; fails in one line where it is not to be had, or not UTF-8."""
    try:
        if kind is SETS["pydocs"]:
            return pydocs()
        if kind is SETS["shakespeare_char"]:
            with urllib.request.urlopen(kind.path, timeout=60) as response:
                return response.read().decode()
        return Path(kind.path).read_bytes().decode()
    except UnicodeDecodeError as error:
        fail(f"{kind.path} is not UTF-8 text (byte {error.start}): convert it first, as with iconv -t UTF-8")
    except OSError as error:
        fail(f"could not read {kind.path} ({error}): give a text that is there, with --input FILE")


def read_rows(name, source, seed, counts):
    """(split, list of up to BLOCK texts) of a set in its order, from the folder `source` or from the hub.

    From the hub whole files go to its cache first, where the next call finds those that have come.
    What is read of each split is counted in the Counter `counts`, in the unit of Set.sizes.
    """
    import datasets
    from huggingface_hub import snapshot_download

    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False  # to read text it would load PyTorch, with all of its memory
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the exception
    kind, draw = SETS[name], random.Random(seed)
    where = source or f"{kind.path} on the Hugging Face hub"
    files = {split: kind.files.format(split) for split, size in zip(SPLITS, kind.sizes) if size}
    try:
        folder = source or snapshot_download(kind.path, repo_type="dataset", revision=kind.revision,
                                             allow_patterns=list(files.values()))  # fmt: skip
        txt = {"sample_by": "document" if kind.one_text else "line"} if any(Path(folder).rglob("*.txt")) else {}
        found = datasets.load_dataset(folder, data_files=None if source else files, streaming=True, **txt)
        if not found.keys() & files.keys():
            fail(f"{where} has no split {' or '.join(files)}, only {', '.join(found)}")
        for split in (split for split in files if split in found):
            for block in found[split].iter(BLOCK):
                texts = block.get(kind.column, [None])
                if not all(isinstance(text, str) for text in texts):
                    fail(f"{where} has rows without a text in the column {kind.column!r}")
                counts[split] += sum(map(len, texts)) if kind.one_text else len(texts)
                if name == "owt":  # it has no split to validate on
                    yield "val", [texts.pop(draw.randrange(len(texts)))]
                yield split.replace("validation", "val"), texts
    except Exception as error:  # each layer, from sockets to parquet, has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        advice = f": go online, or give a folder of the same files: python prepare.py {name} --source FOLDER"
        fail(f"could not read {where} ({reason}){'' if source else advice}")


def cut(text, source):
    """The text as train, val and test: 90, 5 and 5 percent of its characters."""
    if len(text.strip()) < 20:
        fail(f"{source} is empty or short ({len(text)} characters): it takes 20 to leave some for validation and test")
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[:a], "val": text[a:b], "test": text[b:]}


def pieces(text, size=1 << 20):
    """The text in pieces of some `size` characters whose tokens are those of the text: each ends before a blank."""
    return re.findall(rf"(?s).{{1,{size}}}(?:(?<=\S)(?=[ \n])|\Z)|.+", text)


def write(folder, encoded, meta):
    """Write (split, tokens, bytes) as they come, and meta, into `folder`: all of it, or nothing.

    Other files there, such as the text itself, stay. While the finished files move in, meta.json is empty, and the
    folder no data set: without a meta.json, train.py would take it for one of nanoGPT's.
    """
    first = next(encoded, None)  # what cannot be read fails before anything is touched
    if first is None:
        raise ValueError("there are no texts")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        for split, tokens, num_bytes in chain([first], encoded):
            with open(f"{scratch}/{split}.bin", "ab") as file:
                file.write(tokens)
            meta["sizes"][split] += len(tokens)
            meta["bytes"][split] += num_bytes
        Path(scratch, "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").write_text("")
        for name in "train.bin", "val.bin", "test.bin":
            (folder / name).unlink(missing_ok=True)
        for name in *(f"{split}.bin" for split in meta["sizes"]), "meta.json":
            os.replace(f"{scratch}/{name}", folder / name)


def main():
    given = parse(Options, "name")
    o, counts = Options(**given), Counter()
    kind = Set(o.input, one_text=True, tokenizer=o.tokenizer) if o.input else SETS.get(o.name)
    if not re.fullmatch(r"[^./\\][^/\\]*", o.name):
        fail(f"name={o.name!r} must be a plain folder name")
    if o.source and not (kind and kind.files):
        fail(f"--source stands in for a set of the hub: {', '.join(name for name in SETS if SETS[name].files)}")
    if o.source and not Path(o.source).is_dir():
        fail(f"source={o.source!r} is not a folder")
    if not kind:
        fail(f"unknown data set {o.name!r}: there are {', '.join(SETS)}, or give a text with --input FILE")
    tokenizer, source = given.get("tokenizer", kind.tokenizer), Path(o.source or o.input).name or kind.path
    if tokenizer != "gpt2" and not kind.one_text:
        fail(f"{o.name} has its tokenizer, gpt2: leave --tokenizer={tokenizer} to other texts")

    blocks = read_rows(o.name, o.source, o.seed, counts) if kind.files else [("train", [read_text(kind)])]
    if kind.one_text:
        texts = defaultdict(str)
        for split, block in blocks:
            texts[split] += "".join(block)
        texts = cut(texts["train"], source) if list(texts) == ["train"] else texts
        blocks = ((split, pieces(text)) for split, text in texts.items() if text)
    meta = {"tokenizer": tokenizer, "source": source, "sizes": Counter(), "bytes": Counter()}
    if tokenizer == "char":
        meta["vocab"] = list(kind.letters) or sorted(set("".join(texts.values())))
    elif tokenizer == "bpe":
        meta["vocab"] = [token.decode("latin-1") for token in learn_bpe(texts["train"], o.vocab_size)]
        meta["pattern"] = WORD
    meta["vocab_size"] = len(meta["vocab"]) if "vocab" in meta else 50257
    meta["dtype"] = "<u2" if meta["vocab_size"] <= 65535 else "<u4"
    encoder, end = Tokenizer(meta), [] if kind.one_text else [END_OF_TEXT]

    def encode(text):
        return np.array(encoder.encode(text) + end, meta["dtype"])

    def encoded():
        with ThreadPoolExecutor(o.workers or os.cpu_count()) as pool, progress(unit=" texts", delay=1) as bar:
            for split, block in blocks:
                block = [detokenize(text, kind.rules) for text in block]
                yield split, np.concatenate([*pool.map(encode, block)]), sum(len(text.encode()) for text in block)
                bar.update(len(block))

    folder = Path(o.data_dir) / o.name
    try:
        write(folder, encoded(), meta)
    except ValueError as error:
        fail(f"{source}: {error}")
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror or error}")
    for split, known in zip(SPLITS, kind.sizes):
        if split in counts and counts[split] != known:
            unit = "characters" if kind.one_text else "rows"
            print(f"prepare.py: {split} of {source} has {counts[split]:,} {unit}, not {known:,}", file=sys.stderr)
    sizes = ", ".join(f"{name} {size:,}" for name, size in meta["sizes"].items())
    print(f"{folder}: {sizes} tokens of {meta['vocab_size']:,} kinds, from {source}")


if __name__ == "__main__":
    run(main)
