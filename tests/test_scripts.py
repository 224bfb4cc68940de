"""The scripts from end to end, as a user meets them: tiny models, real files, real processes, clumsy input."""

import contextlib
import io
import json
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from subprocess import CompletedProcess
from typing import Literal
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
import prepare  # noqa: E402
import quick  # noqa: E402
import sample  # noqa: E402
import sedd  # noqa: E402
import train  # noqa: E402

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "cond_dim": 16, "block_size": 32, "batch_size": 4,
         "eval_sequences": 4, "eval_times": 2, "device": "cpu", "compile": "False"}  # fmt: skip
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
L = SIZES["block_size"]


def environment():
    """Of a process that is one of no others, and has one thread."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def run(script, *args, cwd, launcher=(), **env):
    """The script in a process of its own, started in cwd."""
    env = environment() | env
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
    done = quick.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    return CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def together(count, script, *args, cwd):
    """The script in as many processes that know of each other, as torchrun would start them; what the first gave."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    env = environment() | meet
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    processes = [
        quick.Popen(command, cwd=cwd, env=env | {"RANK": rank, "LOCAL_RANK": rank}, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in map(str, range(count))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    status = max(abs(process.returncode) for process in processes)
    return CompletedProcess(command, status, outputs[0][0], "".join(err for _, err in outputs))


def call(script, *args, cwd):
    """The same without the seconds that a new process takes: the script as __main__ of this one."""
    before, code = os.getcwd(), 0
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n", write_through=True) for _ in range(2))
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", [script, *map(str, args)]):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        os.chdir(before)
    return CompletedProcess(args, code or 0, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def works(done):
    assert done.returncode == 0, done.stderr
    return done


def complains(done, script, *words):
    """Exit status 2 and one line on stderr that holds all the words."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"{script}: error: ") and done.stderr.endswith("\n")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def read_log(out, key="loss"):
    """The records of log.jsonl that have this key, in strict JSON: no NaN. A start voids earlier ones of later steps."""
    records = []
    for line in (out / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # blank, or cut off by a kill or a full disk
            record = json.loads(line, parse_constant=pytest.fail)
            if "options" in record:
                records = [earlier for earlier in records if earlier["step"] <= record["step"]]
            else:
                records.append(record)
    return [record for record in records if key in record]


def read_data(folder):
    """meta and the splits, with the file format spelled out."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta, {s: np.fromfile(folder / f"{s}.bin", meta["dtype"]) for s in ("train", "val", "test")}


def text_of(folder):
    meta, splits = read_data(folder)
    return prepare.Tokenizer(meta).decode(np.concatenate(list(splits.values())).tolist())


def assert_same(a, b, at=""):
    """Nested dicts and lists of tensors, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), at
    else:
        assert a == b, at


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in one order, here as in the subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """A folder where a user has prepared a data set, by characters, and trained on it, and what the scripts said."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.py").write_text("".join(f"{k} = {v!r}\n" for k, v in SIZES.items()) + "max_steps = 3\n")
    prepared = works(run("prepare.py", "--tokenizer=char", cwd=home))
    trained = works(run("train.py", "tiny.py", "--max_steps=20", "--log_interval", "5", "--eval_interval=10", cwd=home))
    return home, prepared, trained


@pytest.fixture(scope="module")
def home(beginning):
    return beginning[0]


@pytest.fixture
def desk(home, tmp_path):
    """A copy of home to make a mess in, with files of the wrong kind lying around."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    for name, content in {
        "empty.txt": b"", "blank.txt": b" \n\n", "latin1.txt": b"caf\xe9 " * 100, "ten.txt": b"0123456789",
        "broken.py": b"n_layer = = 2\n", "crash.py": b"n_layer = 1 / 0\n", "misspelt.py": b"n_layers = 2\n",
        "mistyped.py": b"n_layer = 'two'\n", "negative.py": b"n_layer = -2\n", "noise/ckpt.pt": random.Random(0).randbytes(999), "nothing/ckpt.pt": b"",
        "cut/ckpt.pt": (home / "out/ckpt.pt").read_bytes()[:-5000],
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other").mkdir()
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "other/ckpt.pt")
    (tmp_path / "short.txt").write_text("too short for a block " * 5)
    (tmp_path / "digits.txt").write_text("0123456789" * 100)
    for name in "short", "digits":
        works(call("prepare.py", name, f"--input={name}.txt", "--tokenizer=char", cwd=tmp_path))
    shutil.copytree(tmp_path / "data/pydocs", tmp_path / "data/shard")
    for split in "train", "val":
        np.array([20240520, 1, 500] + 253 * [0] + 500 * [7], "<i4").tofile(tmp_path / f"data/shard/{split}.bin")
    (tmp_path / "data/shard/meta.json").unlink()
    for name, change in {"keyless": {"vocab_size": None}, "listed": None, "odd": {"dtype": "x9"}}.items():
        shutil.copytree(tmp_path / "data/pydocs", tmp_path / "data" / name)
        meta = json.loads((tmp_path / "data/pydocs/meta.json").read_text()) | (change or {})
        meta = {k: v for k, v in meta.items() if v is not None} if change else []
        (tmp_path / "data" / name / "meta.json").write_text(json.dumps(meta))
    return tmp_path


# ------------------------------------------------------------------------------------- prepare, train, sample


def test_from_nothing_to_text(beginning):
    home, prepared, trained = beginning
    assert "data/pydocs" in prepared.stdout and prepared.stderr == ""
    assert "python sample.py --init_from=out" in trained.stdout
    assert "step" in trained.stderr and "perplexity" in trained.stdout

    sampled = works(run("sample.py", "--steps", 8, cwd=home))
    vocab = json.loads((home / "data/pydocs/meta.json").read_text())["vocab"]
    assert sampled.stdout.endswith("\n") and len(sampled.stdout) == L + 1
    assert set(sampled.stdout[:-1]) <= set(vocab)
    assert re.fullmatch(r"1 text of 32 tokens in .* s: 8 steps of tweedie, model from out\n", sampled.stderr)


def test_log_has_a_line_for_each_interval(home):
    log = read_log(home / "out")
    assert [record["step"] for record in log] == [5, 10, 15, 20]
    assert all(record["tokens_per_s"] > 0 and record["loss"] > 0 and record["lr"] >= 0 for record in log)
    bounds = read_log(home / "out", "val_bound")
    assert [record["step"] for record in bounds] == [10, 20]
    characters = json.loads((home / "data/pydocs/meta.json").read_text())["vocab_size"]
    assert 1 < bounds[1]["val_bound"] < 2 * np.log(characters)
    assert bounds[1]["val_bound"] < bounds[0]["val_bound"]


def test_checkpoint_holds_the_options_by_rank_of_their_source(home):
    options = torch.load(home / "out/ckpt.pt", weights_only=True)["options"]
    assert options["max_steps"] == 20  # the command line over the config file
    assert options["n_embd"] == SIZES["n_embd"]  # the config file over the default
    assert options["grad_clip"] == train.Options.grad_clip


def test_second_training_keeps_the_first_checkpoint(home, tmp_path):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    works(call("train.py", "tiny.py", "--max_steps=1", cwd=tmp_path))
    assert (tmp_path / "out/ckpt.old.pt").read_bytes() == (home / "out/ckpt.pt").read_bytes()
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 1


def test_eval_only_prints_the_bound_of_the_checkpoint_and_writes_nothing(home):
    before = files(home)
    done = works(call("train.py", "--init_from=resume", "--eval_only", cwd=home))
    assert f"step 20: val bound {read_log(home / 'out', 'val_bound')[-1]['val_bound']:.4f}" in done.stdout
    assert files(home) == before


def test_one_validation_sequence_is_enough(home, recwarn):
    works(call("train.py", *TINY, "--eval_sequences=1", "--max_steps=1", "--out_dir=single", cwd=home))
    assert read_log(home / "single", "val_bound")[-1]["val_bound"] > 0
    assert not [w for w in recwarn if "degrees of freedom" in str(w.message)]


def test_grad_clip_0_means_no_clipping(home):
    for clip in "0", "1e9":
        works(call("train.py", *TINY, f"--grad_clip={clip}", "--max_steps=3", f"--out_dir=clip{clip}", cwd=home))
    a, b = (torch.load(home / f"clip{clip}/ckpt.pt", weights_only=True)["model"] for clip in ("0", "1e9"))
    assert_same(a, b)


class Quiet:
    """The stdout of a notebook or of IDLE: no file, and without reconfigure."""

    encoding, text = "UTF-8", ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("script, args, said", [
    ("prepare.py", ["pydocs", "--data_dir=elsewhere"], "elsewhere/pydocs: train"),
    ("train.py", [*TINY, "--max_steps=1", "--out_dir=notebook"], "notebook/ckpt.pt holds step 1: python sample.py"),
    ("sample.py", ["--steps=1", "--prompt=The {4}", "--init_from=out"], "The "),
])  # fmt: skip
def test_scripts_start_from_a_notebook(script, args, said, home, monkeypatch):
    """As %run starts them, and a profiler: their source is not where inspect looks for it."""
    for name, value in {"argv": [script, *args], "stdout": Quiet(), "stderr": Quiet()}.items():
        monkeypatch.setattr(sys, name, value)
    monkeypatch.chdir(home)
    with contextlib.suppress(SystemExit):
        exec(compile((ROOT / script).read_text(), str(ROOT / script), "exec"),
             {"__name__": "__main__", "__file__": str(ROOT / script)})  # fmt: skip
    assert said in sys.stdout.text, sys.stderr.text


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "sample.py"])
def test_scripts_start_in_a_profiler(script, home):
    done = works(run(script, "--help", cwd=home, launcher=["-m", "cProfile"]))
    assert done.stdout.startswith(f"usage: {script}") and "function calls" in done.stdout


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # a locale that knows 128 characters


def test_pipes_get_every_letter_in_any_locale(home):
    """Two processes, one of which speaks into nothing."""
    launcher = [*TORCHRUN, "--nproc-per-node=2"]
    done = works(run("train.py", *TINY, "--max_steps=1", "--out_dir=ascii", cwd=home, launcher=launcher, **ASCII))
    assert " ± " in done.stdout and " ≤ " in done.stdout


def test_who_names_an_encoding_gets_it(home):
    text = works(run("sample.py", "--steps=1", "--prompt=“—{7}", cwd=home, PYTHONIOENCODING="ascii")).stdout
    assert text[:2] == "??" and len(text) == 10


def test_nobody_reads_the_text(home):
    """sample.py ends without a word, with the status that shells know of such an end."""
    line = f"'{sys.executable}' '{ROOT}'/sample.py --steps=1 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 141 and "rror" not in done.stderr


# ------------------------------------------------------------------------------------------------------- prepare


def test_pydocs_files_are_little_endian_uint16_in_the_sizes_of_meta(home):
    folder = home / "data/pydocs"
    meta, splits = read_data(folder)
    assert meta["dtype"] == "<u2" and meta["vocab_size"] == len(meta["vocab"])
    assert meta["sizes"] == {s: (folder / f"{s}.bin").stat().st_size // 2 for s in splits}
    first = (folder / "train.bin").read_bytes()[:2]
    token = meta["vocab"][first[0] + 256 * first[1]]
    assert token and prepare.read_text(prepare.TEXTS["pydocs"]).startswith(token)
    n = sum(meta["bytes"].values())
    for split, share in ("train", 0.9), ("val", 0.05), ("test", 0.05):
        assert meta["bytes"][split] == pytest.approx(share * n, rel=0.01)


def test_pydocs_decodes_to_the_text(home):
    assert text_of(home / "data/pydocs") == prepare.read_text(prepare.TEXTS["pydocs"])


def test_one_text_under_two_names_is_the_same_data(tmp_path):
    text = "Größe, naïve,\r\n\ttabs — and 日本語 \x07 🙂\n" * 50
    (tmp_path / "any file.txt").write_bytes(text.encode())
    for name in "first", "second":
        works(call("prepare.py", name, "--input", "any file.txt", cwd=tmp_path))
    assert files(tmp_path / "data/first") == files(tmp_path / "data/second")
    assert text_of(tmp_path / "data/second") == text


def test_more_characters_than_uint16_holds(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 65_536)))
    (tmp_path / "many.txt").write_bytes(text.encode())
    works(call("prepare.py", "many", "--input=many.txt", "--tokenizer=char", cwd=tmp_path))
    meta, splits = read_data(tmp_path / "data/many")
    assert meta["dtype"] == "<u4" and meta["vocab_size"] == 65_536
    assert (tmp_path / "data/many/val.bin").stat().st_size == 4 * len(splits["val"])
    assert text_of(tmp_path / "data/many") == text


def test_a_new_text_replaces_the_data_and_nothing_else_in_the_folder(tmp_path):
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/input.txt").write_text("first " * 50)
    works(call("prepare.py", "mine", "--input=data/mine/input.txt", cwd=tmp_path))
    (tmp_path / "data/mine/input.txt").write_text("second " * 50)
    works(call("prepare.py", "mine", "--input=data/mine/input.txt", cwd=tmp_path))
    assert text_of(tmp_path / "data/mine") == "second " * 50 == (tmp_path / "data/mine/input.txt").read_text()
    assert sorted(p.name for p in (tmp_path / "data").rglob("*")) == [
        "input.txt", "meta.json", "mine", "test.bin", "train.bin", "val.bin"]  # fmt: skip


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", [FULL, KeyboardInterrupt()], ids=["full", "stopped"])
@pytest.mark.parametrize("where", ["val.bin", "meta.json"])
def test_interrupted_prepare_leaves_the_data_as_it_was(home, tmp_path, monkeypatch, where, trouble):
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "new.txt").write_text("new text " * 100)
    before = files(tmp_path)
    if where == "meta.json":
        monkeypatch.setattr(json, "dumps", mock.Mock(side_effect=trouble))
    else:
        encode, bad = tiktoken.Encoding.encode_to_numpy, mock.Mock(side_effect=trouble)
        monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy",
                            lambda self, text, **options: (encode if len(text) > 500 else bad)(self, text, **options))  # fmt: skip
    for name in "pydocs", "fresh":
        done = call("prepare.py", name, "--input=new.txt", cwd=tmp_path)
        if trouble is FULL:
            complains(done, "prepare.py", f"data/{name}", "No space left on device")
        else:
            assert done.returncode == 130 and done.stderr == ""
        assert where == "meta.json" or bad.called
    monkeypatch.undo()
    assert files(tmp_path) == before
    assert os.listdir(tmp_path / "data") == ["pydocs"]


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs GPT-2's BPE files: set TIKTOKEN_CACHE_DIR")
def test_gpt2_tokens_from_text_to_text(tmp_path):
    text = prepare.read_text(prepare.TEXTS["pydocs"])[:20_000] + "日本語 🙂 <|endoftext|>\n"
    (tmp_path / "some.txt").write_bytes(text.encode())
    works(call("prepare.py", "bpe", "--input=some.txt", "--tokenizer=gpt2", cwd=tmp_path))
    meta, splits = read_data(tmp_path / "data/bpe")
    assert (meta["tokenizer"], meta["dtype"], meta["vocab_size"]) == ("gpt2", "<u2", 50257)
    assert meta["sizes"] == {s: len(tokens) for s, tokens in splits.items()}
    assert sum(meta["sizes"].values()) < len(text) / 2
    assert text_of(tmp_path / "data/bpe") == text

    works(call("train.py", *TINY, "--dataset=bpe", "--max_steps=2", cwd=tmp_path))
    sampled = works(call("sample.py", "--steps=2", "--prompt=The while statement{} ends here.", cwd=tmp_path))
    assert sampled.stdout.startswith("The while statement") and sampled.stdout.endswith(" ends here.\n")


def test_without_a_network_prepare_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_text("some text " * 50)
    monkeypatch.setattr("tiktoken.get_encoding", mock.Mock(side_effect=ConnectionError("no route")))
    done = call("prepare.py", "some", "--input=some.txt", "--tokenizer=gpt2", cwd=tmp_path)
    complains(done, "prepare.py", "data/some", "no route")
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("no route")))
    done = call("prepare.py", "shakespeare_char", cwd=tmp_path)
    complains(done, "prepare.py", "no route", "tinyshakespeare/input.txt")
    assert os.listdir(tmp_path) == ["some.txt"]


# -------------------------------------------------------------------------------------------------------- resume


def test_resume_in_a_new_process_gives_the_same_bits(home):
    args = [*TINY, "--dropout=0.1", "--decay_lr=none", "--warmup_steps=5", "--log_interval=4"]
    works(run("train.py", *args, "--max_steps=20", "--out_dir=straight", cwd=home))
    works(run("train.py", *args, "--max_steps=10", "--out_dir=halves", cwd=home))
    works(run("train.py", "--init_from=resume", "--max_steps=20", "--out_dir=halves", cwd=home))
    a, b = (torch.load(home / out / "ckpt.pt", weights_only=True) for out in ("straight", "halves"))
    assert a["step"] == 20 and a["optimizer"]["adamw"]["state"][0]["exp_avg"].abs().sum() > 0
    for part in "step", "model", "ema", "optimizer", "config", "meta":
        assert_same(a[part], b[part], part)
    assert [record["step"] for record in read_log(home / "halves")] == [4, 8, 10, 12, 16, 20]


@pytest.mark.parametrize("graph, dtype", [("absorb", "float32"), ("uniform", "bfloat16")])
def test_resume_after_a_kill_gives_the_same_bits(home, tmp_path, graph, dtype):
    (tmp_path / "data").symlink_to(home / "data")
    args = [*TINY, "--dropout=0.1", f"--graph={graph}", f"--dtype={dtype}", "--max_steps=20", "--warmup_steps=5",
            "--save_interval=10", "--log_interval=1"]  # fmt: skip
    works(call("train.py", *args, "--out_dir=straight", cwd=tmp_path))
    replace = os.replace
    with mock.patch("os.replace", side_effect=[mock.DEFAULT, KeyboardInterrupt], wraps=replace):
        assert call("train.py", *args, "--out_dir=killed", cwd=tmp_path).returncode == 130
    killed = torch.load(tmp_path / "killed/ckpt.pt", weights_only=True)
    assert killed["step"] == 10 and len(read_log(tmp_path / "killed")) > 10  # the log is ahead of the checkpoint

    works(call("train.py", "--init_from=resume", "--out_dir=killed", cwd=tmp_path))
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True) for out in ("straight", "killed"))
    assert not torch.equal(killed["model"]["vocab_embed.embedding"], a["model"]["vocab_embed.embedding"])
    for part in "step", "model", "ema", "optimizer":
        assert_same(a[part], b[part], part)
    losses = [[(r["step"], r["loss"]) for r in read_log(tmp_path / out)] for out in ("straight", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_resume_survives_a_log_whose_last_line_is_cut(home, tmp_path):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    with open(tmp_path / "out/log.jsonl", "a") as log:
        log.write('{"step": 25, "lo')
    works(call("train.py", "--init_from=resume", "--max_steps=22", cwd=tmp_path))
    assert [record["step"] for record in read_log(tmp_path / "out")] == [5, 10, 15, 20, 22]


def test_resume_of_a_finished_run_changes_nothing(home):
    before = files(home / "out")
    works(call("train.py", "--init_from=resume", cwd=home))
    assert files(home / "out") == before


# --------------------------------------------------------------------------- many processes, gradient accumulation


@pytest.fixture(scope="module")
def one_process(home):
    """The log of a run in one process, one micro-batch a step, and the options to repeat it with."""
    args = [*TINY, "--eval_sequences=20", "--max_steps=6", "--log_interval=1", "--warmup_steps=2", "--dtype=float32",
            "--grad_clip=1e9"]  # fmt: skip
    works(call("train.py", *args, "--out_dir=plain", cwd=home))
    return args, home / "plain"


def assert_same_run(out, into):
    # the steps of both optimisers do not tell a gradient from twice that gradient, but their moments do
    a, b = (torch.load(o / "ckpt.pt", weights_only=True)["optimizer"] for o in (out, into))
    for name, moment in ("adamw", "exp_avg"), ("muon", "momentum_buffer"):
        for i, state in a[name]["state"].items():
            torch.testing.assert_close(state[moment], b[name]["state"][i][moment], rtol=1e-3, atol=1e-4)
    log, reference = read_log(out), read_log(into)
    for key in "step", "lr":
        assert [record[key] for record in log] == [record[key] for record in reference]
    losses = [record["loss"] for record in log]
    assert losses == pytest.approx([record["loss"] for record in reference], abs=1e-4)
    assert max(losses) - min(losses) > 1e-2  # the steps differ, so that agreement says something
    bounds = [read_log(o, "val_bound")[-1]["val_bound"] for o in (out, into)]
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-4)


@pytest.mark.parametrize("processes, micro_batch_size", [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_torchrun_gives_the_losses_of_one_process(home, one_process, processes, micro_batch_size):
    args, reference = one_process
    out, launcher = f"p{processes}m{micro_batch_size}", [*TORCHRUN, f"--nproc-per-node={processes}"]
    args = [*args, f"--micro_batch_size={micro_batch_size}", f"--out_dir={out}"]
    if micro_batch_size:
        done = works(together(processes, "train.py", *args, cwd=home))
    else:
        done = works(run("train.py", *args, cwd=home, launcher=launcher, PYTHONUNBUFFERED="1"))  # none of quick.py's
    assert f"{processes} x cpu" in done.stdout
    assert_same_run(home / out, reference)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_gradient_accumulation_gives_the_same_losses(home, one_process, micro_batch_size):
    args, reference = one_process
    works(call("train.py", *args, f"--micro_batch_size={micro_batch_size}", "--out_dir=micro", cwd=home))
    assert_same_run(home / "micro", reference)


# ------------------------------------------------------------------------------------------------- configuration


def test_only_sedd_is_installed():
    """Modules named train, sample, prepare and config would shadow a user's own."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"] == {"py-modules": ["sedd"]}


def parse(Options, *argv, positional=None):
    return config.parse(Options, sys.modules[Options.__module__].__file__, positional, [*map(str, argv)])


def test_command_line_beats_config_file_beats_default(tmp_path):
    file, second = tmp_path / "a.py", tmp_path / "b.py"
    file.write_text("import os\nn_layer, n_head = 7, 5\nlearning_rate = 1\n_out = 'elsewhere'\nout_dir = _out\n")
    second.write_text("n_head = 3\ncompile = False\n")
    found = parse(train.Options, file, "--n_layer=8", "--batch_size", 16, "--eval_only", second)
    assert found == {"n_layer": 8, "n_head": 3, "learning_rate": 1.0, "out_dir": "elsewhere", "compile": "False",
                     "batch_size": 16, "eval_only": True}  # fmt: skip
    assert type(found["learning_rate"]) is float
    assert train.Options(**found).n_embd == train.Options.n_embd


@dataclass
class New:
    """Options that somebody adds in haste: 100% new."""

    width: int = 3
    # a group
    height: int = 4 # too near
    depth: float = 5.0  # as it should be: 50% at most
    flag: bool = False  # a flag
    on: bool = True
    kind: Literal["a", "b"] = "a"  # of which kind: # 1
    name: str = "x: int = 3"  # a text


def test_an_option_needs_no_comment(capsys):
    assert parse(New, "--height=7", "--depth=8", "--width", "2") == {"height": 7, "depth": 8.0, "width": 2}
    with pytest.raises(SystemExit) as end:
        parse(New, "--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "100% new" in said and "50% at most [5.0]" in said and "[x: int = 3]" in said
    assert said.index("--width") < said.index("a group:") < said.index("--height")


def test_a_flag_takes_a_value_only_after_an_equals_sign(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("width = 9\non = False\n")
    assert parse(New, "--flag", file) == {"flag": True, "width": 9, "on": False}
    assert parse(New, file, "--on=True", "--flag=False") == {"flag": False, "width": 9, "on": True}
    assert parse(New, "--flag", "x", positional="name") == {"flag": True, "name": "x"}


@pytest.mark.parametrize("line, words", [
    ("--heigth=3", ["--heigth=3", "--help"]), ("--hei=3", ["--hei=3"]), ("--height", ["--height", "expected one"]),
    ("--height=x", ["--height", "int", "'x'"]), ("--height=1.5", ["--height", "int", "'1.5'"]),
    ("--height=-1", ["height=-1", "0 or more"]), ("--height -1", ["height=-1"]), ("--depth=nan", ["depth=nan"]),
    ("--depth=-inf", ["depth=-inf"]), ("--depth=-1e-9", ["depth=-1e-09"]), ("--flag=perhaps", ["--flag", "perhaps"]),
    ("--flag=true", ["--flag", "True"]), ("--kind=c", ["--kind", "'a', 'b'"]), ("--flag True", ["True", "options are"]),
    ("nowhere.py", ["nowhere.py", "--key=value"]), (".", [".", "--key=value"]),
    ("broken.py", ["broken.py", "SyntaxError"]), ("exit.py", ["exit.py"]),
    ("crash.py", ["crash.py", "ZeroDivisionError"]), ("unknown.py", ["unknown.py: ", "--hight"]),
    ("below.py", ["below.py: ", "height=-3"]), ("kind.py", ["kind.py: ", "--kind"]), ("good.py --kind=c", ["--kind"]),
    ("latin1.py", ["latin1.py"]),
])  # fmt: skip
def test_wrong_options_get_one_line(line, words, tmp_path, monkeypatch, capsys):
    for name, text in {"broken": "width = = 2", "crash": "1 / 0", "exit": "exit(3)", "unknown": "hight = 2",
                       "good": "width = 3", "below": "height = -3", "kind": "kind = 'c'"}.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "latin1.py").write_bytes(b"name = 'caf\xe9'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["new.py"])
    with pytest.raises(SystemExit) as end:
        parse(New, *line.split())
    complains(CompletedProcess(line, end.value.code, *capsys.readouterr()), "new.py", *words)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[!_]*.py")), ids=lambda path: path.name)
def test_config_files_of_the_repository_parse(path):
    found = parse(train.Options, path)
    assert found and isinstance(train.Options(**found), train.Options)


def test_owt_is_the_published_small_model():
    options = train.Options(**parse(train.Options, ROOT / "config" / "owt.py"))
    for field in fields(sedd.SEDDConfig):
        assert field.name == "vocab_size" or getattr(options, field.name) == field.default


@pytest.mark.parametrize("module", [prepare, train, sample], ids=lambda m: m.__name__)
def test_help_lists_every_option_with_its_default(module, tmp_path):
    done = works(call(f"{module.__name__}.py", "--help", cwd=tmp_path))
    entries = re.findall(r"^  --(\w+) .*?\[([^\]]*)\]$", done.stdout, re.MULTILINE | re.DOTALL)
    assert dict(entries) == {name: str(getattr(module.Options, name)) for name in module.Options.__dataclass_fields__}


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.fixture(scope="module")
def uniform(home):
    works(call("train.py", *TINY, "--graph=uniform", "--noise=geometric", "--max_steps=5", "--out_dir=uniform",
               cwd=home))  # fmt: skip
    return "uniform"


def write(home, *args):
    """The text that sample.py prints, without print's own newline."""
    stdout = works(call("sample.py", "--steps=4", *args, cwd=home)).stdout
    assert stdout[-1] == "\n"
    return stdout[:-1]


@pytest.mark.parametrize("sampler", ["tweedie", "euler"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_given_text_is_kept(home, uniform, graph, sampler):
    args = [f"--init_from={'out' if graph == 'absorb' else uniform}", f"--sampler={sampler}"]
    text = write(home, *args, "--prompt=The if {} ends.")
    assert len(text) == L and text.startswith("The if ") and text.endswith(" ends.")
    text = write(home, *args, "--prompt", "The if ")
    assert len(text) == L and text.startswith("The if ")
    text = write(home, *args, "--prompt={3}while{5} \n{2}")
    assert len(text) == 17 and text[3:8] == "while" and text[13:15] == " \n"
    text = write(home, *args, "--prompt", "{{}} {7}")
    assert len(text) == 10 and text[:3] == "{} "


def test_seed_decides_the_text(home):
    first, again, other = (write(home, f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other
    assert write(home, "--seed=1", "--prompt=") == write(home, "--seed=1", "--prompt={32}") == first


def test_samplers_differ_but_for_the_log_linear_absorbing_chain(home, uniform):
    """There both unmask a token with chance (t - s) / t in the step from t to s."""
    assert write(home, "--sampler=tweedie") == write(home, "--sampler=euler")
    out = f"--init_from={uniform}"
    assert write(home, out, "--sampler=tweedie") != write(home, out, "--sampler=euler")
    done = call("sample.py", out, "--sampler=exact", cwd=home)
    complains(done, "sample.py", "'exact'", "MASK", "uniform")


def test_what_the_samplers_are_told_reaches_them(home, uniform):
    """With top_p = 0 each token is the likeliest, and few are used; with eta, and in another order, the text is another."""
    plain, certain, corrected = write(home), write(home, "--top_p=0"), write(home, "--eta=0.5")
    exact = works(call("sample.py", "--sampler=exact", cwd=home)).stdout[:-1]
    assert len({plain, certain, corrected, exact}) == 4 and len(certain) == len(corrected) == len(exact) == L
    assert len(set(certain + write(home, "--top_p=0", "--seed=1"))) < len(set(plain))


def test_samples_are_separated_by_a_line(home):
    texts = write(home, "--num_samples=3").split("\n\n" + "-" * 80 + "\n")
    assert [len(text) for text in texts] == [L, L, L] and len(set(texts)) == 3


def test_sample_needs_the_checkpoint_alone(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "elsewhere")
    assert write(tmp_path, "--init_from=elsewhere") == write(home)


# ----------------------------------------------------------------------------------------------------- bad input

BAD = {
    "train.py": [
        ("--learning_rat=0.1", "--learning_rat=0.1", "unrecognized", "--help"),
        ("--n-layer 2", "--n-layer"),
        ("-max_step 2", "-max_step"),
        ("--learning_rate=abc", "learning_rate", "float", "'abc'"),
        ("--max_steps=1e6", "max_steps", "int", "'1e6'"),
        ("--n_layer=2.5", "n_layer", "int", "'2.5'"),
        ("--decay_lr=perhaps", "decay_lr", "linear", "cosine", "none", "'perhaps'"),
        ("--eval_only=perhaps", "eval_only", "True, False", "'perhaps'"),
        ("--dtype=foo", "dtype", "auto", "bfloat16", "'foo'"),
        ("--graph=none", "graph", "absorb", "uniform", "'none'"),
        ("--compile=maybe", "compile", "auto", "True", "False", "'maybe'"),
        ("--max_steps", "--max_steps", "expected one argument"),
        ("nowhere.py", "nowhere.py", "no config file", "--key=value"),
        ("tiny.py nowhere.py", "nowhere.py", "no config file", "--key=value"),
        ("broken.py", "broken.py", "SyntaxError", "line 1"),
        ("crash.py", "crash.py", "ZeroDivisionError"),
        ("misspelt.py", "misspelt.py", "--n_layers=2"),
        ("mistyped.py", "mistyped.py", "n_layer", "int", "'two'"),
        ("negative.py", "negative.py", "n_layer=-2", "0 or more"),
        ("--dataset=nowhere", "data/nowhere", "not prepared", "python prepare.py nowhere"),
        ("--dataset=short", "data/short/val.bin", "5 tokens", "fewer than one block", "--block_size="),
        ("--dataset=keyless", "data/keyless", "vocab_size", "python prepare.py keyless"),
        ("--dataset=listed", "data/listed", "python prepare.py listed"),
        ("--dataset=odd", "data/odd", "x9", "python prepare.py odd"),
        ("--dataset=shard", "data/shard/val.bin", "llm.c's header", "cut them off"),
        ("--init_from=rezume", "'rezume'", "no checkpoint", "hub id"),
        ("--init_from=resume --out_dir=nowhere", "nowhere/ckpt.pt", "python train.py --out_dir=nowhere"),
        ("--init_from=resume --out_dir=cut", "cut/ckpt.pt", "no model", "version"),
        ("--init_from=resume --out_dir=other", "other/ckpt.pt", "no model", "version"),
        ("--init_from=resume --n_layer=3", "trained otherwise", "--n_layer=1"),
        ("--init_from=resume --dataset=digits --eval_only", "another vocabulary", "data/digits"),
        ("--device=cuda:99", "'cuda:99'", "--device=auto"),
        ("--device=gpu", "'gpu'", "--device=auto"),
        ("--n_embd=33", "n_embd=33", "n_head=2", "not divisible"),
        *[(f"--{name}=0", f"{name}=0", "at least 1") for name in (
            "n_layer", "n_head", "n_embd", "cond_dim", "block_size", "max_steps", "eval_times", "save_interval")],
        *[(f"--{name}={value}", f"{name}={value}", "0 or more") for name, value in (
            ("n_embd", -32), ("n_head", -1), ("block_size", -5), ("batch_size", -4), ("micro_batch_size", -1),
            ("max_steps", -3), ("eval_sequences", -1), ("dropout", -0.1), ("dropout", "nan"), ("ema", -1.0),
            ("learning_rate", -1.0), ("learning_rate", "nan"), ("warmup_steps", -1), ("grad_clip", -1.0), ("seed", -1))],
        ("--batch_size=0", "batch_size=0"),
        ("--graph=uniform --noise=geometric --parameterization=mean", "parameterization='mean'", "loglinear"),
        ("--graph=uniform --parameterization=causal", "graph='uniform'", "MASK"),
        ("--eval_split=dev", "eval_split", "val", "test", "train", "'dev'"),
    ],
    "prepare.py": [
        ("shakespear", "'shakespear'", "pydocs, shakespeare_char", "--input FILE"),
        ("a b", "unrecognized arguments: b", "--help"),
        ("x --input=empty.txt", "empty.txt", "is empty"),
        ("x --input=blank.txt", "blank.txt", "is empty"),
        ("x --input=latin1.txt", "latin1.txt", "'utf-8'", "position 3"),
        ("x --input=ten.txt", "ten.txt", "10 characters", "20"),
        ("x --input=nowhere.txt", "nowhere.txt", "No such file"),
        ("x --input=data", "data", "Is a directory"),
        ("x --input=short.txt --tokenizer=words", "tokenizer='words'", "bpe, char, gpt2", "folder"),
        ("x --input=short.txt --tokenizer=other", "tokenizer='other'", "bpe, char, gpt2", "folder"),
        ("x --input=short.txt --vocab_size=255", "vocab_size=255", "at least 256"),
        ("x --input=short.txt --vocab_size=many", "vocab_size", "'many'"),
        ("x --input=short.txt --vocab_size=-1", "vocab_size=-1"),
        ("x --inputs=short.txt", "--inputs=short.txt", "--help"),
        ("../x --input=short.txt", "'../x'", "plain folder name"),
        (".. --input=short.txt", "'..'", "plain folder name"),
        ("x --input=short.txt --data_dir=tiny.py", "tiny.py/x", "cannot prepare"),
    ],
    "sample.py": [
        ("--step=5", "--step=5", "--help"),
        ("--steps=0", "steps=0", "at least 1"),
        ("--steps=-1", "steps=-1", "0 or more"),
        ("--steps=many", "--steps", "int", "'many'"),
        ("--num_samples=0", "num_samples=0", "at least 1"),
        ("--sampler=ddim", "--sampler", "'tweedie', 'euler', 'exact'", "'ddim'"),
        ("--sampler=exact --steps=5", "'exact'", "no --steps"),
        ("--sampler=exact --eta=0.1", "'exact'", "no --eta"),
        ("--top_p=-1", "top_p=-1.0", "0 or more"),
        ("--eta=nan", "eta=nan", "0 or more"),
        ("--seed=-1", "seed=-1", "0 or more"),
        ("--prompt=caf\xe9", "no character '\xe9'"),
        ("--prompt={3}\x07", r"no character '\x07'"),
        ("--prompt={3}\u65e5{3}", "no character '\u65e5'"),
        (f"--prompt={32 * 'a'}", "a block of 32", "0 tokens", "{20}"),
        ("--prompt={32}{}", "a block of 32", "0 tokens", "{20}"),
        ("--prompt={1000}{}", "-968 tokens"),
        ("--prompt={}a{}", "a block of 32", "one {}"),
        ("--prompt={0}", "0 tokens to write"),
        ("--prompt={1000001}", "1000001 tokens to write", "1 to 1,000,000"),
        ("--prompt={1000000}a{1}", "to write", "1 to 1,000,000"),
        ("--prompt={99999999999}", "to write", "1 to 1,000,000"),
        ("--prefix=a", "--prefix=a", "--help"),
        ("--out_dir=out", "--out_dir=out", "--help"),
        ("--init_from=nowhere", "nowhere"),
        ("--init_from=out/nowhere", "out/nowhere"),
        ("--init_from=tiny.py", "tiny.py"),
        ("--init_from=cut", "cut"),
        ("--init_from=noise/ckpt.pt", "noise/ckpt.pt"),
        ("--init_from=nothing", "nothing"),
        ("--init_from=other", "other"),
        ("--device=cuda:99", "'cuda:99'", "--device=auto"),
        ("words", "words", "--key=value"),
    ],
}  # fmt: skip
CASES = [pytest.param(script, line, words, id=f"{script} {line[:60]!a}")
         for script, cases in BAD.items() for line, *words in cases]  # fmt: skip


def complete(script, line):
    """The words of a command line; a training gets a tiny model and few steps, in case it starts against its brief."""
    words = line.split(" ")
    tiny = script == "train.py" and not any(w.startswith(("--init_from=resume", "--dataset=short")) for w in words)
    return [*TINY, "--max_steps=2", *words] if tiny else words


@pytest.mark.parametrize("script, line, words", CASES)
def test_bad_input_gets_one_line_and_changes_nothing(desk, script, line, words):
    before = files(desk)
    complains(call(script, *complete(script, line), cwd=desk), script, *words)
    assert files(desk) == before


@pytest.mark.parametrize(
    "script, line, words",
    [
        ("train.py", "--dropuot=0.1", ["--dropuot=0.1"]),
        ("prepare.py", "x --input=latin1.txt", ["latin1.txt", "'utf-8'"]),
        ("sample.py", "--init_from=cut", ["cut"]),
    ],
)
def test_bad_input_in_a_real_process(desk, script, line, words):
    before = files(desk)
    complains(run(script, *complete(script, line), cwd=desk), script, *words)
    assert files(desk) == before


def test_batch_that_the_processes_cannot_share(desk):
    before = files(desk)
    done = run("train.py", *TINY, "--batch_size=2", cwd=desk, launcher=[*TORCHRUN, "--nproc-per-node=3"])
    words = "train.py: error: batch_size=2 leaves nothing to some of 3 processes: try --batch_size=3"
    lines = [line for line in done.stderr.splitlines() if "train.py: error: " in line]
    assert done.returncode and lines and all(words in line for line in lines), done.stderr
    assert files(desk) == before


def test_advice_for_a_short_text_works(desk):
    advice = re.search(r"--block_size=\d+", call("train.py", "--dataset=short", cwd=desk).stderr)[0]
    works(call("train.py", *TINY, "--dataset=short", advice, "--max_steps=1", cwd=desk))


def test_advice_for_an_unprepared_data_set_works(tmp_path):
    advice = call("train.py", *TINY, cwd=tmp_path).stderr.strip()
    assert advice.endswith(": python prepare.py pydocs")
    works(call("prepare.py", "pydocs", cwd=tmp_path))
    works(call("train.py", *TINY, "--max_steps=1", cwd=tmp_path))


def test_missing_character_is_named_without_listing_thousands():
    meta = {"tokenizer": "char", "vocab": [chr(0x4E00 + i) for i in range(5000)], "vocab_size": 5000}
    with pytest.raises(ValueError, match="of 5,000 has no character 'a'") as error:
        prepare.Tokenizer(meta).encode("\u4e00a")
    assert len(str(error.value)) < 300
