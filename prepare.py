"""Text in, tokens out: python prepare.py [NAME] writes data/NAME/{train,val,test}.bin and meta.json."""

import glob
import json
import os
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappush, heapreplace
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import regex  # which comes with tiktoken, and reads its patterns
import tiktoken

from config import fail, parse, progress, run

END_OF_TEXT = 50256  # GPT-2's, written <|endoftext|>
BLOCK = 2000  # texts that are read and encoded together; of each block OpenWebText gives one to val: 0.05%


@dataclass
class Options:
    """Prepare a data set for train.py. Example: python prepare.py mytext --input notes.txt --tokenizer gpt2"""

    name: str = "pydocs"  # or shakespeare_char, owt, text8, wikitext2, wikitext103, ptb, lambada, lm1b
    input: str = ""  # a UTF-8 text file or URL to prepare, under any name
    tokenizer: str = "bpe"  # bpe is learned from the text; char; gpt2; or a data set's folder, to use its vocabulary
    vocab_size: int = 1024  # tokens that bpe learns, with the 256 single bytes
    source: str = ""  # a folder of parquet, jsonl or txt files (train*, validation*, test*) to read instead of the hub
    data_dir: str = "data"  # where the folder NAME goes


# GPT-2's words. A word takes the blank before it along; no token reaches from one word into the next.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Pieces to encode one by one. A million blanks are too much for tiktoken's search, and its older versions take the
# square of a word's length. A piece ends where a word does, also before <|endoftext|>; only a run too long is cut.
PIECE = r"(?s).{1,10000}(?:\Z|(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}|]))|.{1,10000}"


def learn_bpe(text, vocab_size):
    """Byte pair encoding: a list of up to `vocab_size` tokens, first the 256 single bytes; see Tokenizer.

    Each word starts as its bytes. Again and again, the pair of neighbours that is seen most often becomes one token,
    of equals the one whose tokens come first in the list. A pair that is seen only once is not worth a token.
    A word of more than 100 characters is learned in parts. ValueError if vocab_size is below 256.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} must be at least 256, for the single bytes")
    tokens = [chr(byte) for byte in range(256)]
    words = []  # each written in tokens, a token as the character of its number, with how often the text has it
    seen, holders = Counter(), defaultdict(list)  # of a pair: how often the text has it, and the words that may hold it
    for word, n in Counter(match[0] for match in regex.finditer(WORD, text)).items():
        for start in range(0, len(word), 100):
            words.append((word[start : start + 100].encode().decode("latin-1"), n))
    for i, (word, n) in enumerate(words):
        for pair in map("".join, zip(word, word[1:])):
            seen[pair] += n
            holders[pair].append(i)

    # The most frequent pair is on top. Counts only fall, so an entry that is out of date stands too high: it is put
    # right when it comes to the top. The empty pair is seen 0 times, and ends a text that has no other.
    heap = [(0, ""), *((-n, pair) for pair, n in seen.items())]
    heapify(heap)
    for new in map(chr, progress(range(256, vocab_size), desc="learning", unit=" tokens", delay=1)):
        while -heap[0][0] != seen[heap[0][1]]:
            heapreplace(heap, (-seen[heap[0][1]], heap[0][1]))
        count, best = heap[0]
        if -count < 2:
            break
        a, b = best
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
        gained = Counter()
        for i in holders.pop(best):
            word, n = words[i]
            if best not in word:
                continue
            word = word.replace(best, new)
            words[i] = word, n
            for x, y in zip(word, word[1:]):
                if x == new or y == new:
                    gained[x + y] += n
                    holders[x + y].append(i)
                    old = (b if x == new else x) + (a if y == new else y)
                    seen[old] -= n
                    if not seen[old]:
                        del seen[old], holders[old]
        del seen[best]
        seen.update(gained)
        for pair, n in gained.items():
            heappush(heap, (-n, pair))
    return tokens


class Tokenizer:
    """Text to tokens and back, as a meta that JSON can hold tells: {"tokenizer", "vocab", "pattern"}.

    "char": vocab lists the characters. "bpe": it lists byte strings, a byte written as the character of its number;
    pattern finds the words. "gpt2" needs neither. A meta of "vocab_size" alone is that of a data set of one's own
    tokens: its text is their numbers, with blanks between. OSError, in one line, where GPT-2's files cannot be loaded.
    """

    def __init__(self, meta):
        kind = meta.get("tokenizer")
        self.characters = meta["vocab"] if kind == "char" else []
        self.encoding = None
        if kind is None:
            self.vocab_size = meta["vocab_size"]
            return
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

    def encode(self, text, special=True):
        """text -> tokens (n,), a NumPy array; ValueError, naming it, at what the vocabulary lacks.

        In GPT-2's vocabulary <|endoftext|> is one token; without `special` it is ordinary text.
        """
        if self.encoding is None:
            if wrong := [word for word in text.split() if not (word.isdecimal() and int(word) < self.vocab_size)]:
                raise ValueError(f"{wrong[0]!r} is no token: the tokens are numbers below {self.vocab_size:,}, "
                                 "with blanks between")  # fmt: skip
            return np.array([int(word) for word in text.split()], np.uint32)
        if self.characters and (missing := set(text).difference(self.characters)):
            raise ValueError(f"the vocabulary has no character {min(missing, key=text.index)!r} ({self.vocab_size} "
                             f"characters: {''.join(self.characters[:200])!r})")  # fmt: skip
        encode = partial(self.encoding.encode_to_numpy, allowed_special="all" if special else set(), disallowed_special=())
        return np.concatenate([encode(piece) for piece in regex.findall(PIECE, text) or [text]])

    def decode(self, tokens):
        """List of tokens -> text; bytes that form no character become the replacement sign, U+FFFD."""
        return self.encoding.decode(tokens) if self.encoding else " ".join(map(str, tokens))


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
class HubSet:
    """A data set of the Hugging Face hub: rows of text, each an example, in parquet files."""

    path: str
    files: str  # of a split; never a partial-train, which is all that the hub converts of more than 5 GB
    splits: dict  # and their rows, where a perplexity on part of them would pass for one on all; else 0
    rules: list = ()
    column: str = "text"
    revision: str = "main"
    letters: str = ""  # the vocabulary of a set by characters, whose rows are pieces of one text, without END_OF_TEXT


# `datasets` no longer runs scripts. Of sets that were scripts the hub keeps an old conversion to parquet: it is pinned
# here, but for ptb's, whose commit we do not know.
HUB = {
    "owt": HubSet("Skylion007/openwebtext", "plain_text/{}-*-of-00080.parquet", {"train": 0}),
    "text8": HubSet("afmck/text8", "data/{}-*.parquet", {"train": 0, "validation": 0, "test": 0},
                    letters=" abcdefghijklmnopqrstuvwxyz"),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1/{}-*.parquet",
                        {"train": 0, "validation": 3760, "test": 4358}, WIKITEXT),
    "wikitext103": HubSet("Salesforce/wikitext", "wikitext-103-raw-v1/{}-*.parquet",
                          {"train": 0, "validation": 3760, "test": 4358}, WIKITEXT),
    "ptb": HubSet("ptb-text-only/ptb_text_only", "penn_treebank/{}/*.parquet",
                  {"train": 0, "validation": 3370, "test": 3761}, PTB, "sentence", "refs/convert/parquet"),
    "lambada": HubSet("EleutherAI/lambada_openai", "default/{}/*.parquet", {"test": 5153}, LAMBADA,
                      revision="761609c75432cf25d076cd41b8182b7f3ceaae6e"),
    "lm1b": HubSet("billion-word-benchmark/lm1b", "plain_text/{}/*.parquet", {"train": 0, "test": 306688}, LM1B,
                   revision="8d52bfd3cc2819fc1166dbb8144c328e2690de3e"),
}  # fmt: skip
PYDOCS = "pydoc_data.topics of Python " + sys.version.split()[0]
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXTS = {"pydocs": (PYDOCS, "bpe"), "shakespeare_char": (SHAKESPEARE, "char")}


def pydocs():
    """The language reference that every Python carries, for the help() function: 0.5 MB of prose and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def read_text(path):
    """The text of a file or URL, without the mark that some editors put before UTF-8."""
    if path == PYDOCS:
        return pydocs()
    with urlopen(path, timeout=60) if "://" in path else open(path, "rb") as file:
        return file.read().decode("utf-8-sig")


def read_rows(name, folder, source):
    """Blocks of a set in its order, each (split, up to BLOCK texts), from the folder or, without one, from the hub.

    From the hub whole files go to its cache first, where the next call finds those that have come.
    """
    import datasets
    from huggingface_hub import snapshot_download

    datasets.config.TORCH_AVAILABLE = False  # to read text it would load PyTorch, with all of its memory
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the exception
    hub, rows, characters = HUB[name], Counter(), 0
    try:
        if folder:
            here = glob.escape(os.path.abspath(folder))  # a folder's name is no pattern
            patterns = datasets.data_files.get_data_patterns(here)
        else:
            patterns = {split: [hub.files.format(split)] for split in hub.splits}
            folder = snapshot_download(hub.path, repo_type="dataset", revision=hub.revision,
                                       allow_patterns=[pattern for [pattern] in patterns.values()])  # fmt: skip
            here = glob.escape(folder)
        files = {split: [f"{here}/{pattern}" for pattern in patterns[split]] for split in patterns}
        found = datasets.load_dataset(folder, data_files=files, streaming=True)
        for split in filter(found.get, hub.splits):
            for block in progress(found[split].select_columns(hub.column).iter(BLOCK), desc=split, unit=" blocks", delay=1):
                texts = [detokenize(text, hub.rules) for text in block[hub.column]]
                characters += len("".join(texts))  # TypeError at what is no text
                rows[split] += len(texts)
                if name == "owt":  # it has no split to validate on
                    yield "val", [texts.pop()]
                yield split.replace("validation", "val"), texts
    except Exception as error:  # each layer, from sockets to parquet, has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        fail(f"could not read {source} ({reason}): go online, or give a folder of the same files: "
             f"python prepare.py {name} --source FOLDER")  # fmt: skip
    if not characters:
        fail(f"{source} has no texts of {' or '.join(hub.splits)}")
    for split, n in rows.items():
        if hub.splits[split] not in (0, n):
            print(f"prepare.py: {split} of {source} has {n:,} rows, not {hub.splits[split]:,}", file=sys.stderr)


def write(folder, blocks, meta, end):
    """Encode blocks (split, texts) as they come, the tokens `end` after each text, into `folder`. Completes meta.

    All is written beside its place first: an earlier data set lives until the new one is whole. Then the old .bin
    files go, meta.json moves in and train.bin last, so that no .bin file ever stands beside another set's meta.json.
    """
    encoder = Tokenizer(meta)
    encode = partial(encoder.encode, special=not end)  # in rows that get an end of their own, <|endoftext|> is text
    end = np.array(end, "<u2" if encoder.vocab_size <= 65535 else "<u4")
    meta |= {"vocab_size": encoder.vocab_size, "dtype": end.dtype.str, "sizes": Counter(), "bytes": Counter()}
    parts = {name: folder / f"{name}.part" for name in ("meta.json", "test.bin", "val.bin", "train.bin")}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor() as pool:
            for split, texts in blocks:
                with open(parts[f"{split}.bin"], "ab" if split in meta["sizes"] else "wb") as file:
                    for tokens in pool.map(encode, texts):
                        meta["sizes"][split] += file.write(np.append(tokens.astype(end.dtype), end)) // end.itemsize
                meta["bytes"][split] += sum(len(text.encode()) for text in texts)
        parts["meta.json"].write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        for split in "train", "val", "test":
            (folder / f"{split}.bin").unlink(missing_ok=True)
        for name in "meta.json", *(f"{split}.bin" for split in ("test", "val", "train") if split in meta["sizes"]):
            os.replace(parts[name], folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def main():
    given = parse(Options, __file__, "name")
    o = Options(**given)
    hub = None if o.input else HUB.get(o.name)
    if not re.fullmatch(r"[^./\\][^/\\]*", o.name):
        fail(f"name={o.name!r} must be a plain folder name")
    if o.source and not (hub and Path(o.source).is_dir()):
        fail(f"source={o.source!r} must be a folder, and stand in for a set of the hub, such as owt")
    if o.input:
        path, usual = o.input, o.tokenizer
    elif hub:
        path, usual = hub.path, "char" if hub.letters else "gpt2"
    elif o.name in TEXTS:
        path, usual = TEXTS[o.name]
    else:
        fail(f"unknown data set {o.name!r}: there are {', '.join([*TEXTS, *HUB])}, or give a text with --input FILE")
    tokenizer = given.get("tokenizer", usual)
    if hub and tokenizer != usual:
        fail(f"{o.name} has its tokenizer, {usual}: leave --tokenizer={tokenizer} to other texts")

    folder, source = Path(o.data_dir) / o.name, Path(o.source or o.input).name or path
    meta = {"tokenizer": tokenizer, "source": source}
    if tokenizer not in ("bpe", "char", "gpt2"):
        try:
            other = json.loads(Path(tokenizer, "meta.json").read_text(encoding="utf-8"))
            meta = other | {"tokenizer": other["tokenizer"], "source": source}
        except (OSError, ValueError, TypeError, KeyError):
            fail(f"tokenizer={tokenizer!r} must be bpe, char, gpt2, or a folder that prepare.py wrote, as data/pydocs")
    try:
        if hub:
            rows = read_rows(o.name, o.source, source)
            blocks = chain([next(rows)], rows)  # what cannot be read fails before anything is touched
        else:
            text = read_text(path)
            if len(text.strip()) < 20:
                fail(f"{source} is empty or short ({len(text)} characters): it takes 20 to leave some for val and test")
            a, b = int(0.9 * len(text)), int(0.95 * len(text))
            blocks = ("train", [text[:a]]), ("val", [text[a:b]]), ("test", [text[b:]])
        if tokenizer == "char":
            meta["vocab"] = list(hub.letters) if hub else sorted(set(text))
        elif tokenizer == "bpe":
            meta |= {"vocab": learn_bpe(text[:a], o.vocab_size), "pattern": WORD}
        write(folder, blocks, meta, [END_OF_TEXT] if hub and not hub.letters else [])
    except UnicodeDecodeError as error:
        fail(f"{source} is not UTF-8 text (byte {error.start}): convert it first, as with iconv -t UTF-8")
    except (OSError, ValueError, HTTPException) as error:
        fail(f"cannot prepare {folder} from {source}: {getattr(error, 'strerror', None) or error}")
    sizes = ", ".join(f"{name} {size:,}" for name, size in meta["sizes"].items())
    print(f"{folder}: {sizes} tokens of {meta['vocab_size']:,} kinds, from {source}")


if __name__ == "__main__":
    run(main)
