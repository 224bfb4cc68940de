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
from heapq import heappop, heappush, heappushpop
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import regex  # which comes with tiktoken, and reads its patterns
import tiktoken

from config import fail, parse, progress, run


@dataclass
class Options:
    """Prepare a data set for train.py. Example: python prepare.py mytext --input notes.txt --tokenizer gpt2"""

    name: str = "pydocs"  # or shakespeare_char, owt, text8, wikitext2, wikitext103, ptb, lambada, lm1b
    input: str = ""  # a UTF-8 text file or URL to prepare, under any name
    tokenizer: str = "bpe"  # bpe (learned from the text), char, gpt2, or a prepared folder, to use its vocabulary
    vocab_size: int = 1024  # tokens that bpe learns, with the 256 single bytes
    source: str = ""  # a folder of parquet, jsonl or txt files (train*, val*, test*) to read instead of the hub
    data_dir: str = "data"  # where the folder NAME goes


# GPT-2's words. A word takes the blank before it along; no token reaches from one word into the next.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What is encoded at a time, for tiktoken fails at a million blanks, and older versions are slow at a word of a million
# letters. It ends where a word ends, or before <|endoftext|>; only where there is no such place, a long run is cut.
PIECE = r"(?s).{1,10000}(?:\Z|(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}|]))|.{1,10000}(?=<\|endoftext\|>)|.{1,10000}"


def learn_bpe(text, vocab_size):
    """Byte pair encoding: a list of up to `vocab_size` tokens, first the 256 single bytes; see Tokenizer.

    Each word starts as its bytes. Again and again, the pair of neighbours that is seen most often becomes one token,
    of equals the one whose tokens come first in the list. A pair that is seen only once is not worth a token.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} must be at least 256, the number of bytes")
    tokens = [chr(byte) for byte in range(256)]
    found = Counter(match[0] for match in regex.finditer(WORD.replace("+", "{1,100}"), text))  # no word is endless
    times = [*found.values()]
    words = [word.encode().decode("latin-1") for word in found]  # each token is the character of its number
    holders = defaultdict(list)  # the words that a pair is in, or was
    gained = Counter()  # how often the text has a new pair
    for i, word in enumerate(words):
        for pair in map("".join, zip(word, word[1:])):
            gained[pair] += times[i]
            holders[pair].append(i)
    seen = Counter()  # how often it has any pair
    heap = [(0, "")]  # no pair: the end
    for new in map(chr, progress(range(256, vocab_size), desc="learning", unit=" tokens", delay=1)):
        seen.update(gained)
        for pair, n in gained.items():
            heappush(heap, (-n, pair))
        n, best = heappop(heap)
        while -n != seen[best]:  # other merges took some of these pairs: it goes back to its new place
            n, best = heappushpop(heap, (-seen[best], best))
        if n > -2:
            break
        tokens.append("".join(tokens[ord(c)] for c in best))
        gained = Counter()
        for i in set(holders.pop(best)):
            word = words[i] = words[i].replace(best, new)
            for x, y in zip(word, word[1:]):
                if x == new or y == new:
                    gained[x + y] += times[i]
                    holders[x + y].append(i)
                    old = (best[1] if x == new else x) + (best[0] if y == new else y)
                    seen[old] -= times[i]
                    if not seen[old]:
                        del seen[old], holders[old]
    return tokens


class Tokenizer:
    """Text to tokens and back, as a meta that JSON can hold tells: {"tokenizer", "vocab", "pattern"}.

    "char": vocab lists the characters. "bpe": it lists byte strings, a byte written as the character of its number;
    pattern finds the words. "gpt2" needs neither; `special` makes <|endoftext|> a token. Without "tokenizer" the tokens
    are somebody's own: their text is their numbers, below "vocab_size", with blanks between.
    """

    def __init__(self, meta, special=True):
        self.kind, self.encoding = meta.get("tokenizer"), None
        self.special = "all" if special else set()
        if self.kind == "gpt2":
            self.encoding = tiktoken.get_encoding("gpt2")
        elif self.kind == "bpe":
            ranks = {token.encode("latin-1"): i for i, token in enumerate(meta["vocab"])}
            self.encoding = tiktoken.Encoding("bpe", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens={})
        else:
            self.vocab = meta["vocab"] if self.kind else [str(token) for token in range(meta["vocab_size"])]
            self.numbers = {word: token for token, word in enumerate(self.vocab)}
        self.vocab_size = self.encoding.n_vocab if self.encoding else len(self.vocab)

    def encode(self, text):
        """text -> tokens (n,), a NumPy array; ValueError, in one line, at a character or number that is no token."""
        if self.encoding:
            return np.concatenate([
                self.encoding.encode_to_numpy(piece, allowed_special=self.special, disallowed_special=())
                for piece in regex.findall(PIECE, text) or [text]
            ])  # fmt: skip
        try:
            return np.fromiter(map(self.numbers.__getitem__, text if self.kind else text.split()), np.uint32)
        except KeyError as error:
            kind = "character" if self.kind else "number"
            raise ValueError(f"the vocabulary of {self.vocab_size:,} has no {kind} {error}") from None

    def decode(self, tokens):
        """List of tokens -> text; bytes that form no character become the replacement sign, U+FFFD."""
        if self.encoding:
            return self.encoding.decode(tokens)
        return ("" if self.kind else " ").join(self.vocab[token] for token in tokens)


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


# Where a set is on the Hugging Face hub, its revision, and the files of a split (never a partial-train, which is all
# that the hub converts of more than 5 GB); its splits, each with its rows where a perplexity on fewer would be wrong in
# silence; its rules. Of sets that were scripts, which `datasets` no longer runs, the hub keeps an old conversion.
WIKITEXT_ROWS = {"train": 0, "validation": 3760, "test": 4358}
HUB = {
    "owt": ("Skylion007/openwebtext", "main", "plain_text/{}-*-of-00080.parquet", {"train": 0}, []),
    "text8": ("afmck/text8", "main", "data/{}-*.parquet", {"train": 0, "validation": 0, "test": 0}, []),
    "wikitext2": ("Salesforce/wikitext", "main", "wikitext-2-raw-v1/{}-*.parquet", WIKITEXT_ROWS, WIKITEXT),
    "wikitext103": ("Salesforce/wikitext", "main", "wikitext-103-raw-v1/{}-*.parquet", WIKITEXT_ROWS, WIKITEXT),
    "ptb": ("ptb-text-only/ptb_text_only", "refs/convert/parquet", "penn_treebank/{}/*.parquet",
            {"train": 0, "validation": 3370, "test": 3761}, PTB),
    "lambada": ("EleutherAI/lambada_openai", "761609c75432cf25d076cd41b8182b7f3ceaae6e", "default/{}/*.parquet",
                {"test": 5153}, LAMBADA),
    "lm1b": ("billion-word-benchmark/lm1b", "8d52bfd3cc2819fc1166dbb8144c328e2690de3e", "plain_text/{}/*.parquet",
             {"train": 0, "test": 306688}, LM1B),
}  # fmt: skip
TEXTS = {
    "pydocs": "pydoc_data.topics of Python " + sys.version.split()[0],
    "shakespeare_char": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}
TOKENIZERS = {"pydocs": "bpe", "shakespeare_char": "char", "text8": "char"}  # all others have GPT-2's


def read_text(path):
    """The text of a UTF-8 file or URL, or what every Python carries for help(): half a megabyte of prose and code."""
    if path == TEXTS["pydocs"]:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    with urlopen(path, timeout=60) if "://" in path else open(path, "rb") as file:
        return file.read().decode("utf-8-sig")  # some editors begin a file with a mark, which is no text


def read_rows(name, folder, source):
    """Blocks of a set in its order, each (split, up to 2,000 texts), from the folder or, without one, from the hub.

    From the hub whole files go to its cache first, where the next call finds those that have come.
    """
    import datasets
    from huggingface_hub import snapshot_download

    datasets.config.TORCH_AVAILABLE = False  # to read text it would load PyTorch, with all of its memory
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the exception
    path, revision, files, splits, rules = HUB[name]
    kinds = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
    column = "sentence" if name == "ptb" else "text"
    rows, characters = Counter(), 0
    try:
        root = Path(folder or snapshot_download(path, repo_type="dataset", revision=revision,
                                                allow_patterns=[files.format(split) for split in splits]))  # fmt: skip
        for split in splits:
            found = sorted(root.glob(files.format(split)))
            if folder and not found:  # it has other names: val.txt will do
                names = f"{split.replace('validation', 'val')}*"
                found = [file for file in sorted(root.rglob(names)) if file.suffix in kinds]
            if not found:
                continue
            names = [glob.escape(str(file)) for file in found]  # for datasets takes them for patterns
            table = datasets.load_dataset(kinds[found[0].suffix], data_files=names, split="train", streaming=True)
            blocks = table.select_columns(column).iter(2000)
            for block in progress(blocks, desc=split, unit=" blocks", delay=1):
                texts = [detokenize(text, rules) for text in block[column]]
                characters += len("".join(texts))  # TypeError at what is no text
                rows[split] += len(texts)
                if name == "owt":  # it has no split to validate on, so we take one text of each block, 0.05%
                    yield "val", [texts.pop()]
                yield split.replace("validation", "val"), texts
    except Exception as error:  # each layer, from sockets to parquet, has its own
        reason = f"{type(error).__name__}: {error}"[:200]
        fail(f"could not read {source} ({reason}): go online, or give a folder of the same files: "
             f"python prepare.py {name} --source FOLDER")  # fmt: skip
    if not characters:
        fail(f"{source} has no texts of {' or '.join(splits)} in parquet, jsonl or txt files of that name")
    for split in rows:
        if splits[split] not in (0, rows[split]):
            print(f"prepare.py: {split} of {source} has {rows[split]:,} rows, not {splits[split]:,}", file=sys.stderr)


def write(folder, blocks, meta, end):
    """Encode blocks (split, texts) as they come, the tokens `end` after each text, into `folder`. Completes meta.

    Each file is written beside its place: an earlier data set lives until the new one is whole. Then its .bin files
    go, meta.json moves in, and train.bin moves in last: no .bin file ever stands beside another set's meta.json.
    """
    encoder = Tokenizer(meta, special=not end)  # in texts that get their end here, <|endoftext|> is ordinary
    end = np.array(end, "<u2" if encoder.vocab_size <= 65535 else "<u4")
    meta |= {"vocab_size": encoder.vocab_size, "dtype": end.dtype.str, "sizes": Counter(), "bytes": Counter()}
    try:
        with ThreadPoolExecutor() as pool:
            for split, texts in blocks:
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / f"{split}.bin.unfinished", "ab" if split in meta["sizes"] else "wb") as file:
                    for tokens in pool.map(encoder.encode, texts):
                        meta["sizes"][split] += file.write(np.append(tokens.astype(end.dtype), end)) // end.itemsize
                meta["bytes"][split] += sum(len(text.encode()) for text in texts)
        (folder / "meta.json.unfinished").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        for split in "train", "val", "test":
            (folder / f"{split}.bin").unlink(missing_ok=True)
        os.replace(folder / "meta.json.unfinished", folder / "meta.json")
        for split in "test", "val", "train":
            if split in meta["sizes"]:
                os.replace(folder / f"{split}.bin.unfinished", folder / f"{split}.bin")
    finally:
        for file in folder.glob("*.unfinished"):
            file.unlink()
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def main():
    given = parse(Options, __file__, "name")
    o = Options(**given)
    hub = not o.input and o.name in HUB
    path = o.input or TEXTS.get(o.name) or HUB.get(o.name, [""])[0]
    usual = o.tokenizer if o.input else TOKENIZERS.get(o.name, "gpt2")
    tokenizer = given.get("tokenizer", usual)
    folder, source = Path(o.data_dir, o.name), Path(o.source or o.input).name or path
    meta = {"tokenizer": tokenizer, "source": source}
    if not re.fullmatch(r"[^./\\][^/\\]*", o.name):
        fail(f"name={o.name!r} must be a plain folder name")
    if o.source and not hub:
        fail(f"source={o.source!r} can only stand in for a set of the hub, such as owt")
    if not path:
        fail(f"unknown data set {o.name!r}: there are {', '.join([*TEXTS, *HUB])}, or give a text with --input FILE")
    if hub and tokenizer != usual:
        fail(f"{o.name} has its tokenizer, {usual}: leave --tokenizer={tokenizer} to other texts")
    if tokenizer not in ("bpe", "char", "gpt2"):
        try:
            other = json.loads(Path(tokenizer, "meta.json").read_text(encoding="utf-8"))
            meta = other | {"tokenizer": other["tokenizer"], "source": source}
        except (OSError, ValueError, TypeError, KeyError):
            fail(f"tokenizer={tokenizer!r} must be bpe, char, gpt2, or a folder that prepare.py wrote, as data/pydocs")
    try:
        if hub:
            blocks = read_rows(o.name, o.source, source)
            alphabet = " abcdefghijklmnopqrstuvwxyz"  # of text8
        else:
            text = read_text(path)
            if len(text.strip()) < 20:
                fail(f"{source} is empty or short ({len(text)} characters): it takes 20 to leave some for val and test")
            alphabet = set(text)
            a, b = int(0.9 * len(text)), int(0.95 * len(text))
            blocks = ("train", [text[:a]]), ("val", [text[a:b]]), ("test", [text[b:]])
        if tokenizer == "char":
            meta["vocab"] = sorted(alphabet)
        elif tokenizer == "bpe":
            meta |= {"vocab": learn_bpe(text[:a], o.vocab_size), "pattern": WORD}
        write(folder, blocks, meta, [50256] if hub and tokenizer == "gpt2" else [])
    except (OSError, ValueError, HTTPException) as error:
        fail(f"cannot prepare {folder} from {source}: {error}")
    sizes = ", ".join(f"{name} {size:,}" for name, size in meta["sizes"].items())
    print(f"{folder}: {sizes} tokens of {meta['vocab_size']:,} kinds, from {source}")


if __name__ == "__main__":
    run(main)
