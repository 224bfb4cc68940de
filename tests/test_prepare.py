"""Data sets of the hub, prepared from small folders of the same schema through the real `datasets` loader."""

import hashlib
import http.server
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scripts import ROOT, call, complains, files, run, works

import prepare

EOT = 50256
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257}
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}

pytestmark = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs GPT-2's BPE files: set TIKTOKEN_CACHE_DIR"
)


@pytest.fixture(scope="module")
def bpe():
    import tiktoken

    return tiktoken.get_encoding("gpt2").encode_ordinary


def rules(name):
    return prepare.HUB[name][-1]


def make(folder, splits, kind="parquet", column="text"):
    """A folder as `datasets` finds it: train.parquet, validation.jsonl, test.txt, ..."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        path = folder / f"{split}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({column: rows, "id": list(range(len(rows)))}), path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text("\n".join(rows), encoding="utf-8", newline="\n")
    return folder


def read(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert {p.stem for p in folder.glob("*.bin")} == set(meta["sizes"]) == set(meta["bytes"])
    splits = {split: np.fromfile(folder / f"{split}.bin", meta["dtype"]).tolist() for split in meta["sizes"]}
    assert meta["sizes"] == {split: len(tokens) for split, tokens in splits.items()}
    return meta, splits


# Rows in the style of each set, made up, and what the loaders of the paper's authors make of them.
PAGE = "One page.\n\nIts second paragraph — naïve, with <|endoftext|> in it.\n"
ROWS = {"owt": [(PAGE, PAGE)]}
for line in (Path(__file__).parent / "data/protocol.jsonl").read_text(encoding="utf-8").splitlines():
    fields = json.loads(line)
    ROWS.setdefault(fields["set"], []).append((fields["row"], fields["text"]))
ROWS["wikitext103"] = ROWS["wikitext2"]
SPLITS = {
    "owt": ["train"], "lambada": ["test"], "lm1b": ["train", "test"],
    **{name: ["train", "validation", "test"] for name in ("wikitext2", "wikitext103", "ptb")},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_detokenizer(name):
    for row, text in ROWS[name]:
        assert prepare.detokenize(row, rules(name)) == text


@pytest.mark.parametrize(
    "name, row, text",
    [
        ("wikitext2", "on 5 @,@ @-@ 6 and = = = = = Five = = = = =", "on 5 @,@-6 and ===== Five ====="),
        ("wikitext2", "N N N ( a ( b ) c ) /' 7/ it 's \n x", "N 1 N (a ( b) c ) /'[0-9]/ it's\nx"),
        ("wikitext2", 'a \' ( b \' ) " c " " d', 'a \'(b\') "c" " d'),
        ("ptb", "N N N N rose $ N \\/ N \\/ N", "N 1 1 1 rose $1 / 1 / N"),
        ("ptb", "its ' own and N 's", "its' own and N's"),
        ("lm1b", 'It was 5 . He \'s " a ( b ) " ? No . . ', 'It was 5. He\'s "a (b)"? No. . '),
        ("lm1b", "See https : / / a.org / b ! \n", "See https://a.org/b! \n"),
    ],
)
def test_detokenizer_where_rules_meet(name, row, text):
    """Rows on which the order of the rules shows."""
    assert prepare.detokenize(row, rules(name)) == text


DETOKENIZED = [name for name in ROWS if name != "owt"]


MARKS = "s n't N $ # <unk> \\/ ( ) [ ] { } \" ' = \n @-@ , .".split(" ")


@given(text=st.text() | st.lists(st.sampled_from(MARKS)).map(" ".join))
@settings(deadline=None)
def test_any_text_passes(text):
    for name in DETOKENIZED:
        assert isinstance(prepare.detokenize(text, rules(name)), str)


@given(text=st.text(st.characters(exclude_characters="\"'()[]{}=@N$£#<\\°“”:;.!?,/\n")))
def test_text_without_their_marks_is_left_alone(text):
    for name in DETOKENIZED:
        assert prepare.detokenize(text, rules(name)) == (
            "\n" + text.strip() if name == "lambada" else text
        )


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ROWS)
def test_set_is_its_texts_each_with_an_end(name, kind, tmp_path, bpe):
    column = "sentence" if name == "ptb" else "text"
    examples = {split: ROWS[name] * (3 + i) for i, split in enumerate(SPLITS[name])}
    make(tmp_path / "mine", {s: [row for row, _ in pairs] for s, pairs in examples.items()}, kind, column)
    done = works(call("prepare.py", name, "--source=mine", cwd=tmp_path))
    meta, splits = read(tmp_path / "data" / name)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "<u2")
    if name == "owt":  # three equal documents, one of them chosen for validation
        examples = {"val": examples["train"][:1], "train": examples["train"][1:]}
    examples = {split.replace("validation", "val"): pairs for split, pairs in examples.items()}
    assert splits == {s: [i for _, text in pairs for i in [*bpe(text), EOT]] for s, pairs in examples.items()}
    assert meta["bytes"] == {s: sum(len(text.encode()) for _, text in pairs) for s, pairs in examples.items()}
    for split, tokens in splits.items():
        assert f"{split} {len(tokens):,}" in done.stdout


def test_lines_of_text_files_are_examples(tmp_path, bpe):
    rows, texts = zip(*ROWS["lm1b"])
    make(tmp_path / "mine", {"test": rows}, "txt")
    works(call("prepare.py", "lm1b", "--source=mine", cwd=tmp_path))
    assert read(tmp_path / "data/lm1b")[1] == {"test": [i for text in texts for i in [*bpe(text), EOT]]}


def test_other_sizes_than_the_known_are_told(tmp_path):
    make(tmp_path / "mine", {"train": ["a b"] * 3, "test": ["c"]})
    done = works(call("prepare.py", "lm1b", "--source=mine", cwd=tmp_path))
    assert done.stderr.splitlines() == ["prepare.py: test of mine has 1 rows, not 306,688"]
    make(tmp_path / "whole", {"test": ["c"] * 5153})
    assert works(call("prepare.py", "lambada", "--source=whole", cwd=tmp_path)).stderr == ""


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103", "ptb", "lambada", "lm1b"])
def test_rows_of_what_is_evaluated_are_known(name):
    known = {"wikitext2": (3760, 4358), "wikitext103": (3760, 4358), "ptb": (3370, 3761), "lambada": (None, 5153),
             "lm1b": (None, 306688)}  # fmt: skip
    splits = prepare.HUB[name][3]
    assert (splits.get("validation"), splits.get("test")) == known[name]


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("eval_*.py")), ids=lambda path: path.stem)
def test_evaluation_is_on_the_validation_split_where_there_is_one(path):
    options = runpy.run_path(str(path))
    splits = prepare.HUB[options["dataset"]][3]
    assert options["eval_split"] == ("val" if "validation" in splits else "test")


# --------------------------------------------------------------------------------------------------------- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The little of the hub's protocol that a download takes: revisions, lists of files, files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.commit, found = "0" * 40, None
        path = self.path.split("?")[0].replace("%2F", "/")
        for repo, revision, files in self.server.sets:
            self.commit = revision if len(revision) == 40 else hashlib.sha1(revision.encode()).hexdigest()
            if path == f"/api/datasets/{repo}/revision/{revision}":
                return self.send(json.dumps({"id": repo, "sha": self.commit, "siblings": []}).encode())
            if path == f"/api/datasets/{repo}/tree/{self.commit}":
                entries = [{"type": "file", "path": p, "size": len(files[p]), "oid": self.commit} for p in files]
                return self.send(json.dumps(entries).encode())
            found = files.get(path.removeprefix(f"/datasets/{repo}/resolve/{self.commit}/"))
        if found is None:
            return self.send(b"", 404)
        first = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        self.server.asked.append((self.command, path, first))
        self.send(found[first:], 206 if first else 200)

    def send(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", hashlib.sha1(self.path.encode()).hexdigest())
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.server.stall])
            if len(body) > self.server.stall:
                self.server.stalled.wait(60)
                self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sets, server.asked, server.stall, server.stalled = [], [], 10**9, threading.Event()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
                  "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stalled.set()
    server.shutdown()
    thread.join()
    server.server_close()


def parquet(tmp_path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "one.parquet", compression="none")
    return (tmp_path / "one.parquet").read_bytes()


LAYOUTS = {
    "owt": ("Skylion007/openwebtext", "main", "plain_text/{}-000{}-of-00080.parquet"),
    "text8": ("afmck/text8", "main", "data/{}-000{}-of-00002.parquet"),
    "wikitext2": ("Salesforce/wikitext", "main", "wikitext-2-raw-v1/{}-000{}-of-00002.parquet"),
    "ptb": ("ptb-text-only/ptb_text_only", "refs/convert/parquet", "penn_treebank/{}/00{}.parquet"),
    "lm1b": ("billion-word-benchmark/lm1b", "8d52bfd3cc2819fc1166dbb8144c328e2690de3e", "plain_text/{}/00{}.parquet"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_the_hub(name, tmp_path, hub):
    """Each split is read from all of its files, in their order, and from no other: no part, no other configuration."""
    repo, revision, layout = LAYOUTS[name]
    column = "sentence" if name == "ptb" else "text"
    splits = ["train"] if name == "owt" else ["train", "test"] if name == "lm1b" else ["train", "validation", "test"]
    words = {split: [f"{split} {number}" for number in ("one", "two")] for split in splits}
    contents = {layout.format(split, f"{i:02}"): parquet(tmp_path, **{column: [words[split][i]]})
                for split in splits for i in range(2)}  # fmt: skip
    decoy = parquet(tmp_path, **{column: ["a decoy"]})
    for path in "{}/partial-train/0000.parquet", "{}-v1/train-00000-of-00001.parquet", "{}-v1/train/0000.parquet":
        contents[path.format(layout.split("/")[0])] = decoy
    contents[layout.format("train", "index").replace(".parquet", ".duckdb")] = decoy
    contents["README.md"] = b"---\nconfigs:\n- config_name: default\n  data_files: none.csv\n---\n"
    hub.sets = [(repo, revision, contents)]
    works(run("prepare.py", name, cwd=tmp_path, **hub.env))
    meta, tokens = read(tmp_path / "data" / name)
    found = {split: prepare.Tokenizer(meta).decode(tokens[split]) for split in tokens}
    if name == "owt":
        found["train"] = "".join(sorted([found["train"], found.pop("val")]))  # one of the two
    end = "" if name == "text8" else "<|endoftext|>"
    assert found == {s.replace("validation", "val"): "".join(word + end for word in words[s]) for s in splits}
    asked = {path.split("/", 6)[6] for _, path, _ in hub.asked}
    assert asked == {path for path in contents if contents[path] != decoy} - {"README.md"}


@pytest.fixture
def large(hub, tmp_path):
    """text8 with a file so large that a download can break off in it."""
    files = {f"data/{split}-00000-of-00001.parquet": parquet(tmp_path, text=[f"{split} text"], junk=[os.urandom(size)])
             for split, size in (("train", 30_000_000), ("validation", 10), ("test", 10))}  # fmt: skip
    hub.sets, hub.stall = [("afmck/text8", "main", files)], 25_000_000
    return hub


SIZES = {"train": 10, "val": 15, "test": 9}


def test_dropped_connection_loses_nothing(tmp_path, large):
    large.stalled.set()  # and so it hangs up
    works(run("prepare.py", "text8", cwd=tmp_path, **large.env))
    assert read(tmp_path / "data/text8")[0]["sizes"] == SIZES
    first = [first for command, path, first in large.asked if command == "GET" and "train-" in path]
    assert len(first) == 2 and first[0] == 0 and first[1] >= 1e7


def test_files_that_are_there_are_not_fetched_again_after_a_kill(tmp_path, large):
    with start(tmp_path, "text8", env=os.environ | large.env) as process:
        while process.poll() is None and len(list((tmp_path / "hf").rglob("snapshots/*/data/*"))) < 2:
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=60)
    assert not (tmp_path / "data").exists()
    large.asked.clear()
    large.stall = 10**9
    works(run("prepare.py", "text8", cwd=tmp_path, **large.env))
    assert [path.split("/")[-1] for command, path, _ in large.asked if command == "GET"] == [
        "train-00000-of-00001.parquet"
    ]
    assert read(tmp_path / "data/text8")[0]["sizes"] == SIZES


# --------------------------------------------------------------------------------------------- byte pair encoding


def slow_bpe(text, vocab_size):
    """The definition, all counted anew for each token."""
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(prepare.WORD, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        seen = Counter(pair for word in words for pair in pairwise(word))
        most = max(seen.values(), default=0)
        if most < 2:
            break
        best = min(
            (pair for pair in seen if seen[pair] == most), key=lambda pair: [tokens.index(part) for part in pair]
        )
        tokens.append(b"".join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [tokens[-1]]
                i += 1
    assert len(set(tokens)) == len(tokens)  # what lies between two ends of tokens was merged in one way
    return [token.decode("latin-1") for token in tokens]


def bpe_meta(text, vocab_size):
    vocab = prepare.learn_bpe(text, vocab_size)
    return {"tokenizer": "bpe", "vocab_size": len(vocab), "vocab": vocab, "pattern": prepare.WORD}


REPETITIVE = st.text(alphabet="ab é\n", max_size=200)


@given(text=REPETITIVE | st.text(), vocab_size=st.integers(256, 300))
@settings(deadline=None)
def test_learning_is_the_definition(text, vocab_size):
    assert prepare.learn_bpe(text, vocab_size) == slow_bpe(text, vocab_size)


def test_learning_is_the_definition_on_english():
    text = prepare.read_text(prepare.TEXTS["pydocs"])[50_000:54_000]
    tokens = prepare.learn_bpe(text, 400)
    assert tokens == slow_bpe(text, 400)
    assert len(tokens) == 400 and tokens[:256] == [chr(byte) for byte in range(256)]
    assert " the" in tokens and not any(" " in token[1:] for token in tokens if token.strip(" \n"))


def test_learned_words_are_encoded_as_they_were_learned():
    """What tiktoken makes of a text has the pairs that were merged, and none that is seen twice is left unmerged."""
    text = prepare.read_text(prepare.TEXTS["pydocs"])[:20_000]
    tokenizer = prepare.Tokenizer(bpe_meta(text, 2**16))
    words = [tokenizer.encode(word).tolist() for word in regex.findall(prepare.WORD, text)]
    assert max(Counter(pair for word in words for pair in pairwise(word)).values()) == 1


@given(text=st.text(), learned=REPETITIVE)
@settings(deadline=None)
def test_any_text_comes_back(text, learned):
    meta = json.loads(json.dumps(bpe_meta(learned, 270)))
    tokenizer = prepare.Tokenizer(meta)
    tokens = tokenizer.encode(text).tolist()
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size == len(meta["vocab"]) for token in tokens)
    assert len(tokens) <= len(text.encode())


def test_bytes_that_form_no_character_are_the_replacement_sign():
    tokenizer = prepare.Tokenizer(bpe_meta("", 256))
    assert tokenizer.decode(list("日".encode()[:2]) + [65, 255]) == "\ufffdA\ufffd"
    assert tokenizer.decode([]) == "" and tokenizer.encode("").tolist() == []


def test_bpe_data_is_the_same_on_every_run_and_learned_from_train_alone(tmp_path):
    text = prepare.read_text(prepare.TEXTS["pydocs"])[:40_000]
    ends = "zqzq zqzq " * 400  # the last tenth, of which training sees nothing
    (tmp_path / "a.txt").write_text(text[:36_000] + ends, encoding="utf-8")
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    for folder in "one", "two":
        works(run("prepare.py", "mine", "--input=a.txt", "--tokenizer=bpe", "--vocab_size=400", f"--data_dir={folder}",
                  cwd=tmp_path, PYTHONHASHSEED="random", OMP_NUM_THREADS="2"))  # fmt: skip
    works(call("prepare.py", "mine", "--input=b.txt", "--tokenizer=bpe", "--vocab_size=400", cwd=tmp_path))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    (meta, splits), (other, _) = read(tmp_path / "one/mine"), read(tmp_path / "data/mine")
    assert meta["vocab"] == other["vocab"] and meta["vocab_size"] == 400 and meta["pattern"] == prepare.WORD
    assert meta["vocab"] == prepare.learn_bpe(text[:36_000], 400)
    assert (meta["tokenizer"], meta["dtype"]) == ("bpe", "<u2")
    decode = prepare.Tokenizer(meta).decode
    assert "".join(decode(splits[split]) for split in ("train", "val", "test")) == text[:36_000] + ends
    assert meta["bytes"] == {split: len(decode(tokens).encode()) for split, tokens in splits.items()}


def test_char_data_of_before_is_still_read():
    old = {
        "tokenizer": "char",
        "source": "x",
        "vocab_size": 3,
        "sizes": {},
        "bytes": {},
        "vocab": ["a", "b", "é"],
        "dtype": "<u2",
    }
    tokenizer = prepare.Tokenizer(old)
    assert tokenizer.encode("éab").tolist() == [2, 0, 1]
    assert (tokenizer.decode([2, 0, 1]), tokenizer.vocab_size) == ("éab", 3)
    with pytest.raises(ValueError, match="no character 'c'"):
        tokenizer.encode("abcd")


def test_defaults_are_bpe_but_for_sets_by_characters(tmp_path):
    (tmp_path / "some.txt").write_text("some text " * 50)
    works(call("prepare.py", "mine", "--input=some.txt", cwd=tmp_path))
    works(call("prepare.py", cwd=tmp_path))
    mine, _ = read(tmp_path / "data/mine")
    pydocs, _ = read(tmp_path / "data/pydocs")
    assert mine["tokenizer"] == pydocs["tokenizer"] == "bpe"
    assert 256 < mine["vocab_size"] < 300 and pydocs["vocab_size"] == prepare.Options.vocab_size
    assert prepare.TOKENIZERS == {"pydocs": "bpe", "shakespeare_char": "char", "text8": "char"}


def test_vocab_size_below_the_bytes_is_refused(tmp_path):
    (tmp_path / "some.txt").write_text("some text " * 50)
    done = call("prepare.py", "x", "--input=some.txt", "--tokenizer=bpe", "--vocab_size=255", cwd=tmp_path)
    complains(done, "prepare.py", "vocab_size=255", "at least 256")


def test_words_are_learned_in_parts_of_100_characters():
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 2_050))
    assert prepare.learn_bpe(text, 300) == slow_bpe("\n".join(text[i : i + 100] for i in range(0, 2_050, 100)), 300)
    blanks = prepare.learn_bpe("x" + " " * 1_000 + "x", 300)
    assert max(map(len, blanks)) <= 100 and len(blanks) < 270


def seconds(function, *args):
    """Of this process alone: others may be busy."""
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def test_a_text_without_blanks_is_learned_in_no_time_and_little_memory():
    """A word of a megabyte, looked at from end to end for each token, would take minutes."""
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 60_000))
    assert seconds(prepare.learn_bpe, text, 500) < 4
    tracemalloc.start()
    prepare.learn_bpe(text[:20_000], 700)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_many_tokens_are_learned_in_no_time():
    """All pairs, looked at for each token, would take minutes."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrst"), (20_000, 8))
    text = " ".join(map("".join, letters))
    assert seconds(prepare.learn_bpe, text, 4000) < 6


MILLION = "first line\n" * 30 + " " * 1_200_000 + "last line" * 30


@pytest.mark.parametrize("tokenizer", ["bpe", "gpt2", "char"])
def test_a_million_blanks_are_prepared(tokenizer, tmp_path):
    (tmp_path / "padded.txt").write_text(MILLION)
    works(call("prepare.py", "padded", "--input=padded.txt", f"--tokenizer={tokenizer}", cwd=tmp_path))
    meta, splits = read(tmp_path / "data/padded")
    decode = prepare.Tokenizer(meta).decode
    assert "".join(decode(splits[split]) for split in ("train", "val", "test")) == MILLION


def test_rows_of_a_million_blanks_are_prepared(tmp_path):
    make(tmp_path / "mine", {"train": [MILLION, "short", "a" * 300_000]})
    works(call("prepare.py", "owt", "--source=mine", cwd=tmp_path))
    assert sum(read(tmp_path / "data/owt")[0]["bytes"].values()) == len(MILLION) + 300_005


PARTS = ["the", "a", " ", "  ", "\n", "\n\n", "'s", "'ll", "12", "!", "?|", "<|endoftext|>", "é", "日", "_", "\u0301"]


@given(text=st.lists(st.sampled_from(PARTS), max_size=60).map("".join))
@settings(deadline=None, max_examples=300)
def test_pieces_end_where_words_do(text):
    """So the tokens of a text are the same in pieces; here small ones. Only what is longer than a piece is cut."""
    pieces = regex.findall(prepare.PIECE.replace("10000", "40"), text)
    assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 40
    assert not any(piece.startswith(tuple("<|endoftext|>"[i:] for i in range(1, 13))) for piece in pieces)
    if max(map(len, regex.split(r"(?V1)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}|])", text))) <= 40:
        words = [word for piece in pieces for word in regex.findall(prepare.WORD, piece)]
        assert words == regex.findall(prepare.WORD, text)


# ------------------------------------------------------------------------------------------ what people bring along


def test_tokens_of_ones_own_are_numbers_with_blanks_between():
    tokenizer = prepare.Tokenizer({"vocab_size": 1500, "dtype": "<u2"})
    assert tokenizer.decode([12, 7, 3]) == "12 7 3" and tokenizer.decode([]) == ""
    tokens = tokenizer.encode(" 12 7\n3 1499")
    assert tokens.tolist() == [12, 7, 3, 1499] and np.issubdtype(tokens.dtype, np.integer)
    assert tokenizer.encode("").tolist() == [] and tokenizer.vocab_size == 1500
    for text, word in ("7 1500", "1500"), ("seven 7", "seven"), ("7 -1", "-1"), ("1.5", "1.5"), ("1_0", "1_0"):
        with pytest.raises(ValueError, match=f"no number '{word}'") as error:
            tokenizer.encode(text)
        assert "\n" not in str(error.value) and "of 1,500 " in str(error.value)


def test_end_of_text_is_one_token_in_texts_and_prompts(tmp_path, bpe):
    stories = "A cat slept.\n<|endoftext|>\nA dog ran.<|endoftext|>" * 20
    assert prepare.Tokenizer(GPT2).encode(stories[:60]).tolist().count(EOT) == 2
    (tmp_path / "stories.txt").write_text(stories)
    works(call("prepare.py", "stories", "--input=stories.txt", "--tokenizer=gpt2", cwd=tmp_path))
    meta, splits = read(tmp_path / "data/stories")
    tokens = [token for split in ("train", "val", "test") for token in splits[split]]
    assert prepare.Tokenizer(meta).decode(tokens) == stories
    assert 38 <= tokens.count(EOT) <= 40  # the cuts between splits know nothing of tokens
    assert splits["train"][: len(bpe("A cat slept.\n")) + 1] == [*bpe("A cat slept.\n"), EOT]


@pytest.mark.parametrize("tokenizer", ["bpe", "char", "gpt2"])
def test_vocabulary_of_another_data_set(tokenizer, tmp_path):
    first, second = "the cat sat on the mat. " * 40, "the man sat on the mat, not the cat. "[:-1].replace(",", ".") * 9
    (tmp_path / "first.txt").write_text(first)
    (tmp_path / "second.txt").write_text(second)
    works(call("prepare.py", "first", "--input=first.txt", f"--tokenizer={tokenizer}", cwd=tmp_path))
    works(call("prepare.py", "second", "--input=second.txt", "--tokenizer=data/first", cwd=tmp_path))
    (meta, _), (other, splits) = (read(tmp_path / "data" / name) for name in ("first", "second"))
    assert {key: meta.get(key) for key in ("tokenizer", "vocab", "pattern", "vocab_size", "dtype")} == {
        key: other.get(key) for key in ("tokenizer", "vocab", "pattern", "vocab_size", "dtype")
    }
    assert other["source"] == "second.txt"
    tokens = [token for split in ("train", "val", "test") for token in splits[split]]
    assert prepare.Tokenizer(meta).decode(tokens) == second


def test_a_character_that_the_other_vocabulary_lacks(tmp_path):
    (tmp_path / "first.txt").write_text("abc " * 50)
    (tmp_path / "second.txt").write_text("abc " * 50 + "é")  # at its very end, which is for test
    works(call("prepare.py", "first", "--input=first.txt", "--tokenizer=char", cwd=tmp_path))
    before = files(tmp_path)
    for name in "second", "first":
        done = call("prepare.py", name, "--input=second.txt", "--tokenizer=data/first", cwd=tmp_path)
        complains(done, "prepare.py", "no character 'é'", f"data/{name}")
    assert files(tmp_path) == before and os.listdir(tmp_path / "data") == ["first"]


@pytest.mark.parametrize("meta", [None, "", "[]", "{}", '{"vocab_size": 9, "dtype": "<u2"}'])
def test_folder_that_is_no_prepared_set(meta, tmp_path):
    (tmp_path / "some.txt").write_text("some text " * 50)
    (tmp_path / "it").mkdir()
    if meta is not None:
        (tmp_path / "it/meta.json").write_text(meta)
    before = files(tmp_path)
    for tokenizer in "it", "nowhere", "some.txt", "bpee", "":
        done = call("prepare.py", "x", "--input=some.txt", f"--tokenizer={tokenizer}", cwd=tmp_path)
        complains(done, "prepare.py", f"tokenizer={tokenizer!r}", "bpe, char, gpt2", "folder")
    assert files(tmp_path) == before and not (tmp_path / "data").exists()


def test_clone_of_a_repository_is_its_own_configuration_alone(tmp_path, bpe):
    for number in "2", "103":
        (tmp_path / "clone" / f"wikitext-{number}-raw-v1").mkdir(parents=True)
        for split in "train", "validation", "test":
            table = parquet(tmp_path, text=[f"{split} {number}"])
            (tmp_path / f"clone/wikitext-{number}-raw-v1/{split}-00000-of-00001.parquet").write_bytes(table)
    (tmp_path / "clone/README.md").write_text("---\nconfigs:\n- config_name: a\n- config_name: b\n---\n")
    for number in "2", "103":
        works(call("prepare.py", f"wikitext{number}", "--source=clone", cwd=tmp_path))
        _, splits = read(tmp_path / f"data/wikitext{number}")
        assert splits == {s.replace("validation", "val"): [*bpe(f"{s} {number}"), EOT]
                          for s in ("train", "validation", "test")}  # fmt: skip


def test_folder_of_many_kinds_of_files(tmp_path, bpe):
    make(tmp_path / "mine", {"train-2": ["two"], "train-1": ["one"]})
    make(tmp_path / "mine", {"val": ["three"]}, "jsonl")
    make(tmp_path / "mine/deep", {"test": ["four"]}, "txt")
    for name in "train.txt.bak", "README.md", ".train.jsonl.swp", "train.idx":
        (tmp_path / "mine" / name).write_text("none")
    works(call("prepare.py", "wikitext2", "--source=mine", cwd=tmp_path))
    _, splits = read(tmp_path / "data/wikitext2")
    assert splits == {"train": [*bpe("one"), EOT, *bpe("two"), EOT], "val": [*bpe("three"), EOT],
                      "test": [*bpe("four"), EOT]}  # fmt: skip


@pytest.mark.parametrize("name", ["owt[1]", "owt*", "ow?1", "o{w}t", "[!a]"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_name_of_a_folder_is_no_pattern(name, kind, tmp_path, bpe):
    make(tmp_path / "owt1", {"train": ["wrong"] * 3}, kind)
    make(tmp_path / name, {"train": ["right"] * 3}, kind)
    works(call("prepare.py", "owt", "--source", name, cwd=tmp_path))
    meta, splits = read(tmp_path / "data/owt")
    assert splits["train"] == [*bpe("right"), EOT] * 2 and meta["source"] == name


def test_name_of_the_cache_is_no_pattern(tmp_path, hub):
    contents = {f"data/{split}-00000-of-00001.parquet": parquet(tmp_path, text=["abc"])
                for split in ("train", "validation", "test")}  # fmt: skip
    hub.sets = [("afmck/text8", "main", contents)]
    works(run("prepare.py", "text8", cwd=tmp_path, **hub.env | {"HF_HOME": str(tmp_path / "my [own] cache")}))
    assert read(tmp_path / "data/text8")[1] == {split: [1, 2, 3] for split in ("train", "val", "test")}


class BreaksOff(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200 if self.path == "/some.txt" else 404)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"some words " * 450)


def test_url_that_fails_gets_one_line(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        for url, words in {
            "http://127.0.0.1:9/my file.txt": ["my file.txt", "' '"], "http://127.0.0.1:9/a.txt": ["refused"],
            f"{here}/some.txt": ["some.txt", "4950 bytes read"], f"{here}/other.txt": ["other.txt", "404"],
            "http://[::1/a.txt": ["a.txt"], "gopher://127.0.0.1/a.txt": ["gopher"],
        }.items():  # fmt: skip
            complains(call("prepare.py", "x", "--input", url, cwd=tmp_path), "prepare.py", "cannot prepare", *words)
        server.shutdown()
    assert not list(tmp_path.iterdir())


def test_mark_before_a_text_is_no_part_of_it(tmp_path):
    (tmp_path / "notepad.txt").write_text("some text " * 20, encoding="utf-8-sig")
    works(call("prepare.py", "x", "--input=notepad.txt", "--tokenizer=char", cwd=tmp_path))
    assert read(tmp_path / "data/x")[0]["vocab"] == sorted(set("some text "))


# --------------------------------------------------------------------------------------------------- one long text


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_text8(kind, tmp_path):
    text = " anarchism originated as a term of abuse first used against early" * 40
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    parts = {"train": [text[:2000], text[2000:2300]], "validation": [text[2300:2450]], "test": [text[2450:]]}
    make(tmp_path / "parts", parts, kind)
    works(call("prepare.py", "text8", "--source=parts", cwd=tmp_path))
    meta, splits = read(tmp_path / "data/text8")
    assert (meta["tokenizer"], meta["vocab_size"], "".join(meta["vocab"])) == ("char", 27, alphabet)
    assert meta["bytes"] == meta["sizes"] == {"train": 2300, "val": 150, "test": len(text) - 2450}
    assert "".join(alphabet[i] for split in ("train", "val", "test") for i in splits[split]) == text


def test_text8_from_its_one_file_is_cut(tmp_path):
    text = " the quick brown fox jumps over the lazy dog" * 50
    n = len(text)
    (tmp_path / "text8").write_text(text)
    works(call("prepare.py", "text8", "--input=text8", "--tokenizer=char", cwd=tmp_path))
    meta, splits = read(tmp_path / "data/text8")
    assert meta["vocab"] == list(" abcdefghijklmnopqrstuvwxyz")
    assert meta["bytes"] == meta["sizes"] == {"train": int(0.9 * n), "val": int(0.95 * n) - int(0.9 * n),
                                              "test": n - int(0.95 * n)}  # fmt: skip
    assert prepare.Tokenizer(meta).decode(sum((splits[split] for split in ("train", "val", "test")), [])) == text


@pytest.mark.parametrize("tokenizer", ["char", "bpe", "gpt2"])
def test_bytes_of_a_text_of_ones_own(tokenizer, tmp_path):
    text = "Größe, naïve — 日本語 🙂 and plain words, <|endoftext|> among them\n" * 30
    (tmp_path / "some.txt").write_text(text, encoding="utf-8")
    works(call("prepare.py", "mine", "--input=some.txt", f"--tokenizer={tokenizer}", cwd=tmp_path))
    meta, splits = read(tmp_path / "data/mine")
    decode = prepare.Tokenizer(meta).decode
    assert meta["bytes"] == {split: len(decode(tokens).encode()) for split, tokens in splits.items()}
    assert sum(meta["bytes"].values()) == len(text.encode())
    assert "".join(decode(splits[split]) for split in ("train", "val", "test")) == text


def test_long_text8_is_encoded(tmp_path):
    text = np.random.default_rng(0).choice(list(" abcdefghijklmnopqrstuvwxyz"), 1_500_000)
    make(tmp_path / "mine", {"test": ["".join(text)]})
    works(call("prepare.py", "text8", "--source=mine", cwd=tmp_path))
    _, splits = read(tmp_path / "data/text8")
    assert "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in splits["test"]) == "".join(text)


# ------------------------------------------------------------------------------------------------------------- owt


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """4,000 documents, each of which names its number."""
    home = tmp_path_factory.mktemp("pages")
    make(home / "mine", {"train": [f"Page {i}" + " and so on" * (i % 7) for i in range(4000)]})
    return home


def documents(tokens, decode):
    texts = decode(tokens).split("<|endoftext|>")
    assert texts.pop() == ""
    return texts


def test_owt_validates_on_one_document_of_2000(pages):
    import tiktoken

    decode = tiktoken.get_encoding("gpt2").decode
    for folder in "a", "b":
        works(call("prepare.py", "owt", "--source=mine", f"--data_dir={folder}", cwd=pages))
        _, splits = read(pages / folder / "owt")
        train, val = (documents(splits[s], decode) for s in ("train", "val"))
        numbers = [[int(text.split()[1]) for text in texts] for texts in (train, val)]
        assert numbers[0] == sorted(numbers[0]) and sorted(sum(numbers, [])) == list(range(4000))
        assert [i // 2000 for i in numbers[1]] == [0, 1]  # 0.05%, spread over the set
    assert files(pages / "a") == files(pages / "b")


def rss_of_tree(pid):
    """Resident bytes of a process and its descendants."""
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        children = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return total + sum(rss_of_tree(child) for child in children)


def start(folder, *args, **kwargs):
    return subprocess.Popen([sys.executable, ROOT / "prepare.py", *args], cwd=folder, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)  # fmt: skip


@pytest.fixture(scope="module")
def hundred_mb(tmp_path_factory):
    home = tmp_path_factory.mktemp("much")
    page = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade.\n" * 60
    rows = [f"{i} {page}" for i in range(1000)]
    for k in range(20):
        make(home / "mine", {f"train-{k:05}-of-00020": rows})
    return home, 20 * sum(len(row) for row in rows)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat(hundred_mb):
    home, num_bytes = hundred_mb
    assert num_bytes > 100e6
    with start(home, "owt", "--source=mine") as process:
        peak = 0  # bytes
        while process.poll() is None:
            peak = max(peak, rss_of_tree(process.pid))
            time.sleep(0.05)
        assert process.returncode == 0, process.stderr.read()
    meta = json.loads((home / "data/owt/meta.json").read_text())
    assert sum(meta["bytes"].values()) == num_bytes and sum(meta["sizes"].values()) > num_bytes / 6
    assert 50e6 < peak < 600e6


# -------------------------------------------------------------------------------------------------- clumsy or cut off


def test_stopped_midway_leaves_the_data_as_it_was(hundred_mb, tmp_path):
    make(tmp_path / "small", {"train": ["An earlier text."] * 10})
    works(call("prepare.py", "owt", "--source=small", cwd=tmp_path))
    before = files(tmp_path)
    with start(tmp_path, "owt", f"--source={hundred_mb[0]}/mine") as process:
        while process.poll() is None and sum(p.stat().st_size for p in tmp_path.glob("data/owt/train.bin.unfinished")) < 1e6:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0
    assert files(tmp_path) == before


def test_full_disk_leaves_the_data_as_it_was(pages, tmp_path):
    make(tmp_path / "small", {"train": ["An earlier text."] * 10})
    works(call("prepare.py", "owt", "--source=small", cwd=tmp_path))
    before = files(tmp_path)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    with start(tmp_path, "owt", f"--source={pages}/mine", preexec_fn=full) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines() == ["prepare.py: error: cannot prepare data/owt from mine: [Errno 27] File too large"]
    assert files(tmp_path) == before


@pytest.mark.parametrize("last", range(1, 5))
def test_folder_is_no_data_set_before_all_of_it_is_there(tmp_path, monkeypatch, last):
    """The old data would be taken for the new: as many tokens of as many kinds."""
    (tmp_path / "some.txt").write_text("some text " * 50)
    (tmp_path / "more.txt").write_text("more text " * 50)
    works(call("prepare.py", "mine", "--input=some.txt", "--tokenizer=char", cwd=tmp_path))
    replace, calls = os.replace, []

    def stop(*paths):
        calls.append(paths)
        if len(calls) == last:
            raise OSError(5, "Input/output error")
        replace(*paths)

    monkeypatch.setattr(os, "replace", stop)
    done = call("prepare.py", "mine", "--input=more.txt", "--tokenizer=char", cwd=tmp_path)
    complains(done, "prepare.py", "data/mine", "Input/output")
    assert len(calls) == last and os.listdir(tmp_path / "data") == ["mine"]
    assert not (tmp_path / "data/mine/train.bin").exists()
    complains(call("train.py", "--dataset=mine", "--block_size=8", cwd=tmp_path), "train.py", "data/mine", "python prepare.py mine")
    meta = json.loads((tmp_path / "data/mine/meta.json").read_text())
    assert meta["source"] == ("some.txt" if last == 1 else "more.txt") or not list(tmp_path.glob("data/mine/*.bin"))


def test_splits_that_a_set_lacks_are_gone(tmp_path):
    (tmp_path / "some.txt").write_text("some text " * 50)
    works(call("prepare.py", "lambada", "--input=some.txt", cwd=tmp_path))
    make(tmp_path / "mine", {"test": ["A passage."]})
    works(call("prepare.py", "lambada", "--source=mine", cwd=tmp_path))
    assert sorted(p.name for p in (tmp_path / "data/lambada").iterdir()) == ["meta.json", "test.bin"]


@pytest.mark.parametrize("name", ["wikitext2", "text8"])
def test_unreachable_hub_in_a_real_process(name, tmp_path):
    began = time.monotonic()
    done = run("prepare.py", name, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"), **NO_NETWORK)
    assert time.monotonic() - began < 15
    complains(done, "prepare.py", prepare.HUB[name][0], "go online", f"python prepare.py {name} --source FOLDER")
    assert not (tmp_path / "data").exists()


def test_missing_bpe_files_in_a_real_process(tmp_path):
    make(tmp_path / "mine", {"test": ["A passage."]})
    (tmp_path / "empty").mkdir()
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), **NO_NETWORK}
    done = run("prepare.py", "lambada", "--source=mine", cwd=tmp_path, **env)
    complains(done, "prepare.py", "cannot prepare data/lambada", "/vocab.bpe")
    assert not (tmp_path / "data").exists()


def test_tokenizer_raises_where_bpe_files_are_missing(tmp_path, monkeypatch):
    from tiktoken import registry

    monkeypatch.setattr(registry, "ENCODINGS", {})  # as in a fresh process
    for key, value in {"TIKTOKEN_CACHE_DIR": str(tmp_path), **NO_NETWORK}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(OSError, match="/vocab.bpe") as error:
        prepare.Tokenizer({"tokenizer": "gpt2", "vocab_size": 50257})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, words",
    [
        ("ptb --source=good", ["could not read good", "'sentence'", "'text'"]),
        ("lm1b --source=numbers", ["could not read numbers", "TypeError", "'int'"]),
        ("owt --source=nulls", ["could not read nulls", "TypeError", "NoneType"]),
        ("lambada --source=trainonly", ["trainonly", "no texts of test"]),
        ("lm1b --source=nowhere", ["nowhere", "no texts of train or test"]),
        ("lm1b --source=good/test.parquet", ["test.parquet", "no texts of train or test"]),
        ("lm1b --source=empty", ["empty", "no texts of train or test", "jsonl"]),
        ("lm1b --source=noise", ["could not read noise", "magic bytes"]),
        ("text8 --source=good", ["of 27 has no character 'A'"]),
        ("text8 --source=none", ["none", "no texts"]),
        ("pydocs --source=good", ["source='good'", "set of the hub", "owt"]),
        ("x --source=good", ["source='good'", "set of the hub", "owt"]),
        ("lm1b --source=good --input=good/some.txt", ["source='good'", "set of the hub"]),
        ("lm1b --source=good --tokenizer=char", ["lm1b", "gpt2", "--tokenizer=char"]),
        ("text8 --source=good --tokenizer=bpe", ["text8", "char", "--tokenizer=bpe"]),
    ],
)
def test_bad_source_gets_one_line(args, words, tmp_path):
    make(tmp_path / "good", {"test": ["A passage."]})
    make(tmp_path / "numbers", {"test": [1, 2]})
    make(tmp_path / "nulls", {"train": ["A passage.", None]})
    make(tmp_path / "trainonly", {"train": ["A passage."]})
    make(tmp_path / "none", {"test": [""]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise/test.parquet").write_bytes(b"PAR1 but not really")
    before = files(tmp_path)
    start = run if "noise" in args else call  # the library's own log would show in a process of its own
    complains(start("prepare.py", *args.split(), cwd=tmp_path), "prepare.py", *words)
    assert files(tmp_path) == before
