"""Text in, tokens out: python prepare.py [NAME] writes data/NAME/{train,val,test}.bin and meta.json."""

import json
import os
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal
from urllib.request import urlopen

import numpy as np
import regex  # which comes with tiktoken, and reads its patterns
import tiktoken

from config import fail, parse, progress, run

END_OF_TEXT = 50256  # GPT-2's
BLOCK = 2000  # texts that are read and encoded together; of each block OpenWebText gives one to val: 0.05%


@dataclass
class Options:
    """Prepare a data set for train.py. Example: python prepare.py mytext --input notes.txt --tokenizer gpt2"""

    name: str = "pydocs"  # or shakespeare_char, owt, text8, wikitext2, wikitext103, ptb, lambada, lm1b
    input: str = ""  # a UTF-8 text file to prepare under this name, which then is any
    tokenizer: Literal["bpe", "char", "gpt2"] = "bpe"  # BPE learned from the text; a token a character; GPT-2's BPE
    vocab_size: Annotated[int, 256, 2**20] = 1024  # tokens that bpe learns, with the 256 single bytes
    source: str = ""  # a folder of parquet, jsonl or txt files (train*, validation*, test*) to read instead of the hub
    data_dir: str = "data"  # where the folder NAME goes


# GPT-2's words. A word takes the blank before it along; no token reaches from one word into the next.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn_bpe(text, vocab_size):
    """Byte pair encoding: a list of up to `vocab_size` tokens, first the 256 single bytes; see Tokenizer.

    Each word starts as its bytes. Again and again, the pair of neighbours that is seen most often becomes one token,
    of equals the one whose tokens come first in the list. A pair that is seen only once is not worth a token.
    """
    tokens = [chr(byte) for byte in range(256)]
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
        tokens.append("".join(tokens[ord(c)] for c in best))
    return tokens


class Tokenizer:
    """Text to tokens and back, as a meta that JSON can hold tells: {"tokenizer", "vocab", "pattern"}.

    "char": vocab lists the characters. "bpe": it lists byte strings, a byte written as the character of its number;
    pattern finds the words. "gpt2" needs neither. OSError, in one line, where GPT-2's files cannot be loaded.
    """

    def __init__(self, meta):
        kind = meta["tokenizer"]
        self.characters = meta["vocab"] if kind == "char" else []
        if kind == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding(kind)
            except Exception as error:  # whatever the network layer raises
                raise OSError(f"GPT-2's BPE files could not be downloaded ({type(error).__name__}): go online once, "
                              "or set TIKTOKEN_CACHE_DIR to a folder that holds them") from error  # fmt: skip
        else:  # a character is a word, and a token
            pattern, code = ("(?s).", "utf-8") if self.characters else (meta["pattern"], "latin-1")
            ranks = {token.encode(code): i for i, token in enumerate(meta["vocab"])}
            self.encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        """text -> tokens (n,), a NumPy array; ValueError, naming it, at a character that the vocabulary lacks."""
        if self.characters and (missing := set(text).difference(self.characters)):
            raise ValueError(f"the vocabulary has no character {min(missing, key=text.index)!r} ({self.vocab_size} "
                             f"characters: {''.join(self.characters[:200])!r})")  # fmt: skip
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens):
        """List of tokens -> text; bytes that form no character become the replacement sign, U+FFFD."""
        return self.encoding.decode(tokens)


def detokenize(text, rules):
    """The rules, each a regular expression and what takes its place, applied one after the other."""
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


# Perplexities can be compared only on equal texts. So these rules make of each row what the loaders of the paper's
# authors make of it, also where that is crude. Their order counts.
WIKITEXT = [
    ("s '", "s'"), ("/' [0-9]/", "/'[0-9]/"),
    *[(rf" @\{mark}@ ", mark) for mark in "-,."],
    *[(rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"],
    *[(rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")],
    *[("= " * n + "=", "=" * (n + 1)) for n in (3, 2, 1)],
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
]  # fmt: skip
PTB = [
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), (r"\\/", "/"),
    (" N ", " 1 "), (" N ", " 1 "),  # twice, for of several in a row the first pass takes every other one
    (r"\$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"),
]  # fmt: skip
LM1B = [
    (r"(https?) : / / ", r"\1://"), (r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "), (r" \?$", "?"), (" ! ", "! "), (" !$", "!"), *[(f" {mark} ", f"{mark} ") for mark in ",:;"],
    (" / ", "/"), *[(rf"\{a} ([^\{a}\{b}]+) \{b}", rf"{a}\1{b}") for a, b in ('""', "''", "()", "[]")],
    (r"\$ ", "$"), ("£ ", "£"),
]  # fmt: skip
LAMBADA = [("[“”]", '"'), (r"(?s)\A\s*(.*?)\s*\Z", r"\n\1")]


@dataclass
class Set:
    """Where a data set is, and what becomes of it. A set of the hub is rows, each an example; any other is one text."""

    path: str  # on the Hugging Face hub, if there are `files`; else a file or URL
    files: str = ""  # of a split; never a partial-train, which is all that the hub converts of more than 5 GB
    sizes: tuple = ()  # known rows (of a set by letters: characters) of train, validation and test; 0: no such split
    rules: list = ()
    column: str = "text"
    revision: str = "main"
    tokenizer: str = "gpt2"
    letters: str = ""  # the vocabulary of a set by characters, whose rows are pieces of one text, without END_OF_TEXT


# `datasets` no longer runs scripts. Of sets that were scripts the hub keeps an old conversion to parquet: it is pinned
# here, but for ptb's, whose commit we do not know.
SETS = {
    "pydocs": Set("pydoc_data.topics of Python " + sys.version.split()[0], tokenizer=Options.tokenizer),
    "shakespeare_char": Set("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                            tokenizer="char"),
    "owt": Set("Skylion007/openwebtext", "plain_text/{}-*-of-00080.parquet", (8013769, 0, 0)),
    "text8": Set("afmck/text8", "data/{}-*.parquet", (90000000, 5000000, 5000000), tokenizer="char",
                 letters=" abcdefghijklmnopqrstuvwxyz"),
    "wikitext2": Set("Salesforce/wikitext", "wikitext-2-raw-v1/{}-*.parquet", (36718, 3760, 4358), WIKITEXT),
    "wikitext103": Set("Salesforce/wikitext", "wikitext-103-raw-v1/{}-*.parquet", (1801350, 3760, 4358), WIKITEXT),
    "ptb": Set("ptb-text-only/ptb_text_only", "penn_treebank/{}/*.parquet", (42068, 3370, 3761), PTB, "sentence",
               "refs/convert/parquet"),
    "lambada": Set("EleutherAI/lambada_openai", "default/{}/*.parquet", (0, 0, 5153), LAMBADA,
                   revision="761609c75432cf25d076cd41b8182b7f3ceaae6e"),
    "lm1b": Set("billion-word-benchmark/lm1b", "plain_text/{}/*.parquet", (30301028, 0, 306688), LM1B,
                revision="8d52bfd3cc2819fc1166dbb8144c328e2690de3e"),
}  # fmt: skip


def pydocs():
    """The language reference that every Python carries, for the help() function: 0.5 MB of prose and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def read_rows(name, folder, source):
    """Blocks of a set in its order, each (split, up to BLOCK texts), from the folder or, without one, from the hub.

    From the hub whole files go to its cache first, where the next call finds those that have come.
    """
    import datasets
    from huggingface_hub import snapshot_download

    datasets.config.TORCH_AVAILABLE = False  # to read text it would load PyTorch, with all of its memory
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the exception
    kind, seen = SETS[name], Counter()
    known = {split: size for split, size in zip(("train", "validation", "test"), kind.sizes) if size}
    files = None if folder else {split: kind.files.format(split) for split in known}
    try:
        folder = folder or snapshot_download(kind.path, repo_type="dataset", revision=kind.revision,
                                             allow_patterns=[*files.values()])  # fmt: skip
        found = datasets.load_dataset(folder, data_files=files, streaming=True)
        for split in filter(found.get, known):
            rows = found[split].select_columns(kind.column)
            for block in progress(rows.iter(BLOCK), desc=split, unit=" blocks", delay=1):
                texts = [detokenize(text, kind.rules) for text in block[kind.column]]
                characters = sum(map(str.__len__, texts))  # TypeError at what is no text
                seen[split] += characters if kind.letters else len(texts)
                if name == "owt":  # it has no split to validate on
                    yield "val", [texts.pop()]
                yield split.replace("validation", "val"), texts
    except Exception as error:  # each layer, from sockets to parquet, has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        fail(f"could not read {source} ({reason}): go online, or give a folder of the same files: "
             f"python prepare.py {name} --source FOLDER")  # fmt: skip
    if not any(seen.values()):
        fail(f"{source} has no texts of {' or '.join(known)}")
    for split in seen:
        if seen[split] != known[split]:
            unit = "characters" if kind.letters else "rows"
            print(f"prepare.py: {split} of {source} has {seen[split]:,} {unit}, not {known[split]:,}", file=sys.stderr)


def write(folder, blocks, meta, end):
    """Encode blocks (split, texts) as they come, the tokens `end` after each text, into `folder`: all, or nothing.

    Completes meta. Other files in the folder, such as the text itself, stay. Old data go before the new move in,
    meta.json first: wherever that stops, all that is there fits the meta.json beside it.
    """
    encoder = Tokenizer(meta)
    end = np.array(end, "<u2" if encoder.vocab_size <= 65535 else "<u4")
    meta |= {"vocab_size": encoder.vocab_size, "dtype": end.dtype.str, "sizes": Counter(), "bytes": Counter()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool, TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as new:
        for split, texts in blocks:
            with open(f"{new}/{split}.bin", "ab") as file:
                for tokens in pool.map(encoder.encode, texts):
                    meta["sizes"][split] += file.write(np.append(tokens.astype(end.dtype), end)) // end.itemsize
            meta["bytes"][split] += sum(len(text.encode()) for text in texts)
        Path(new, "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for split in "train", "val", "test":
            (folder / f"{split}.bin").unlink(missing_ok=True)
        for name in "meta.json", *(f"{split}.bin" for split in reversed(meta["sizes"])):
            os.replace(f"{new}/{name}", folder / name)


def main():
    given = parse(Options, "name")
    o = Options(**given)
    kind = Set(o.input, tokenizer=o.tokenizer) if o.input else SETS.get(o.name)
    if not re.fullmatch(r"[^./\\][^/\\]*", o.name):
        fail(f"name={o.name!r} must be a plain folder name")
    if o.source and not (kind and kind.files and Path(o.source).is_dir()):
        fail(f"source={o.source!r} must be a folder, and stand in for a set of the hub, such as owt")
    if not kind:
        fail(f"unknown data set {o.name!r}: there are {', '.join(SETS)}, or give a text with --input FILE")
    tokenizer, source = given.get("tokenizer", kind.tokenizer), Path(o.source or o.input).name or kind.path
    if kind.files and tokenizer != kind.tokenizer:
        fail(f"{o.name} has its tokenizer, {kind.tokenizer}: leave --tokenizer={tokenizer} to other texts")

    meta, folder = {"tokenizer": tokenizer, "source": source}, Path(o.data_dir) / o.name
    try:
        if kind.files:
            rows = read_rows(o.name, o.source, source)
            blocks = chain([next(rows)], rows)  # what cannot be read fails before anything is touched
        else:
            if kind is SETS["pydocs"]:
                text = pydocs()
            else:
                with urlopen(kind.path, timeout=60) if "://" in kind.path else open(kind.path, "rb") as file:
                    text = file.read().decode()
            if len(text.strip()) < 20:
                fail(f"{source} is empty or short ({len(text)} characters): it takes 20 to leave some for val and test")
            a, b = int(0.9 * len(text)), int(0.95 * len(text))
            blocks = ("train", [text[:a]]), ("val", [text[a:b]]), ("test", [text[b:]])
        if tokenizer == "char":
            meta["vocab"] = list(kind.letters) or sorted(set(text))
        elif tokenizer == "bpe":
            meta |= {"vocab": learn_bpe(text[:a], o.vocab_size), "pattern": WORD}
        write(folder, blocks, meta, [END_OF_TEXT] if kind.files and not kind.letters else [])
    except UnicodeDecodeError as error:
        fail(f"{source} is not UTF-8 text (byte {error.start}): convert it first, as with iconv -t UTF-8")
    except (OSError, ValueError) as error:
        fail(f"cannot prepare {folder} from {source}: {getattr(error, 'strerror', None) or error}")
    sizes = ", ".join(f"{name} {size:,}" for name, size in meta["sizes"].items())
    print(f"{folder}: {sizes} tokens of {meta['vocab_size']:,} kinds, from {source}")


if __name__ == "__main__":
    run(main)
