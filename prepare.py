"""Text in, tokens out: python prepare.py [NAME] writes data/NAME/{train,val,test}.bin and meta.json."""

import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from config import fail, parse


@dataclass
class Options:
    """Prepare a data set for train.py. Example: python prepare.py mytext --input notes.txt --tokenizer gpt2"""

    name: str = "pydocs"  # pydocs, shakespeare_char, or with --input any name
    input: str = ""  # a UTF-8 text file to prepare under this name
    tokenizer: Literal["char", "gpt2"] = "char"  # of --input: a token a character, or GPT-2's BPE
    data_dir: str = "data"  # where the folder NAME goes


class Tokenizer:
    """Text to tokens and back, described by a meta that JSON can hold: {"tokenizer", "vocab_size", "vocab"}."""

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
                fail(f"GPT-2's BPE files could not be downloaded ({type(error).__name__}): "
                     "go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds them")  # fmt: skip
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


SOURCES = {"pydocs": pydocs, "shakespeare_char": shakespeare_char}


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


def write(folder, splits, meta):
    """Write splits, a dict from name to tokens, and meta into `folder`: all of it, or nothing.

    Other files there, such as the text itself, stay. The folder is without meta.json, and so not a data set,
    while the finished files move in.
    """
    dtype = "<u2" if meta["vocab_size"] <= 65535 else "<u4"
    meta |= {"dtype": dtype, "sizes": {name: len(tokens) for name, tokens in splits.items()}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, tokens in splits.items():
            np.asarray(tokens, dtype).tofile(scratch / f"{name}.bin")
        (scratch / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        for name in *(f"{name}.bin" for name in splits), "meta.json":
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main():
    o = Options(**parse(Options, positional="name"))
    if not o.name or Path(o.name).name != o.name or o.name.startswith("."):
        fail(f"name={o.name!r} must be a plain folder name")
    if o.input:
        text, source = read_text(o.input), Path(o.input).name
    elif o.name in SOURCES:
        text, source = SOURCES[o.name](), o.name
        if o.name == "pydocs":
            source = f"pydoc_data.topics of Python {sys.version.split()[0]}"
    else:
        fail(f"unknown data set {o.name!r}: there are {', '.join(SOURCES)}, or give a text with --input FILE")

    meta = {"tokenizer": o.tokenizer, "source": source}
    if o.tokenizer == "char":
        meta |= {"vocab": sorted(set(text)), "vocab_size": len(set(text))}
    else:
        meta |= {"vocab_size": 50257}
    tokens = Tokenizer(meta).encode(text)
    if len(tokens) < 20:
        fail(f"{source} has {len(tokens)} tokens: it takes 20 to leave some for validation and test")
    a, b = int(0.9 * len(tokens)), int(0.95 * len(tokens))
    folder = Path(o.data_dir) / o.name
    try:
        write(folder, {"train": tokens[:a], "val": tokens[a:b], "test": tokens[b:]}, meta)
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror or error}")
    sizes = ", ".join(f"{name} {size:,}" for name, size in meta["sizes"].items())
    print(f"{folder}: {sizes} tokens of {meta['vocab_size']:,} kinds, from {source}")


if __name__ == "__main__":
    main()
