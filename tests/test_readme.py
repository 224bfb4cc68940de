"""What the README files say exists: their commands parse, the files and names that they point to are there."""

import inspect
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

import experiments
import prepare
import sample
import sedd
import train
from config import parse
from test_prepare import make
from test_scripts import SIZES, TINY, call, works

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: (ROOT / path).read_text(encoding="utf-8")
         for path in ("README.md", "tests/README.md", "assets/experiments/README.md")}  # fmt: skip
SCRIPTS = {"train.py": (train, None), "sample.py": (sample, None), "prepare.py": (prepare, "name")}


def commands(text):
    """The commands in its indented lines and in its spans of code."""
    blocks = re.findall(r"^    (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    code = [code for code in [*blocks, *spans] if re.match(r"(\w+=\S+ )?(python|pip|pytest|torchrun)\b", code)]
    return {command.strip() for line in code for command in line.split("&&")}


@pytest.mark.parametrize("page, least", [*zip(PAGES, (24, 6, 8))])
def test_there_are_commands(page, least):
    assert len(commands(PAGES[page])) >= least


@pytest.mark.parametrize("command", sorted({command for text in PAGES.values() for command in commands(text)}))
def test_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("=N", "=8"))
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") and not word.startswith("config/")]
    if scripts:
        assert (ROOT / words[scripts[0]]).is_file()
    if "torchrun" in words:
        get_args_parser().parse_args([*words[words.index("torchrun") + 1 :], *([] if scripts else ["train.py"])])
    if scripts and words[scripts[0]] in SCRIPTS:
        module, positional = SCRIPTS[words[scripts[0]]]
        module.Options(**parse(module.Options, module.__file__, positional, words[scripts[0] + 1 :]))


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_exist(page):
    for path in re.findall(r"\b((?:tests|config|assets)/[\w/]+\.(?:py|svg|png))", PAGES[page]):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page]):  # links
        assert (ROOT / page).parent.joinpath(path).is_file(), path
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {name}(" in sources, name


def test_every_file_of_the_tests_is_told():
    for path in (ROOT / "tests").glob("*.py"):
        assert f"`{path.name}`" in PAGES["tests/README.md"] or path.name == "conftest.py", path.name


@pytest.mark.parametrize("page, begin, end", [
    ("tests/README.md", "| in the paper |", "## The theory, run"),
    ("README.md", "## The method in four equations", "## Things to try"),
])  # fmt: skip
def test_names_of_the_method_exist(page, begin, end):
    text = PAGES[page][PAGES[page].index(begin) : PAGES[page].index(end)]
    rows = [row.split("|")[3] for row in text.splitlines()[2:] if row.startswith("|")] or [text]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row) if not name.endswith((".py", ".md"))]
    assert len(names) >= 8
    for name in names:
        owner, _, own = name.rpartition(".")
        value = getattr(getattr(sedd, owner), own, None) if owner else getattr(sedd, own, None)
        assert callable(value) or own in inspect.signature(sedd.sample).parameters, name


def test_tables_are_those_of_the_logs(capsys):
    experiments.tables(None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 46
    for line in lines[:-6]:
        assert line in PAGES["assets/experiments/README.md"], line
    for line in lines[-6:]:
        assert line in PAGES["README.md"], line


def test_trainings_of_the_tables_are_by_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    for _ in range(2):  # there is no such data; it is in byte pairs
        with pytest.raises(SystemExit, match="data/pydocs is not there by characters.*--tokenizer=char"):
            experiments.run_training(experiments.SYSTEMS[0], 0.01, 1, 1000, "pydocs")
        works(call("prepare.py", cwd=tmp_path))


def test_a_start_voids_what_the_log_has_of_later_steps(tmp_path):
    records = [{"step": 0, "options": {}}, {"step": 10, "loss": 3}, {"step": 10, "val_bound": 4},
               {"step": 20, "loss": 2}, {"step": 10, "options": {}}, {"step": 20, "loss": 1}]  # fmt: skip
    lines = ["", *map(json.dumps, records)]
    lines[5:5] = ['{"step": 30, "lo', ""]  # a kill
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert experiments.records_of(tmp_path) == [records[1], records[2], records[5]]


def test_each_sampler_of_the_comparison_is_measured(tmp_path, monkeypatch, capsys):
    """With models that have learned nothing: README's sampler writes as many texts, and all stand in the table."""
    shape = dict(n_layer=1, n_head=1, n_embd=16, cond_dim=8, block_size=128)

    def load(name, seed):
        torch.manual_seed(seed)
        return sedd.MODELS["causal" if name == "gpt" else "score"](sedd.SEDDConfig(9, **shape)).eval()

    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "load", load)
    monkeypatch.setattr(experiments, "model_of", lambda name, seed=1: f"{name}-{seed}")
    monkeypatch.setattr(experiments, "CONFIDENT", [("tweedie", 2), ("confident", 2)])
    experiments.confident(None)
    runs = [{"sampler": sampler, "steps": 2} for sampler in ("tweedie", "confident")]
    told = experiments.across_seeds("confident.jsonl", runs)
    assert [run["sampler"] for run in told] == ["tweedie", "confident"] and {run["seeds"] for run in told} == {3}
    assert all(8.9 < run["perplexity"] < 9.1 for run in told)  # of nine tokens that are all alike to the judge


def test_the_example_learns_and_writes(monkeypatch, capsys):
    """As it stands, but for a sixth of its steps, which bring the bound from log 256 = 5.55 to below 4.5."""
    (code,) = re.findall(r"```python\n(import torch\nfrom sedd import .*?)```", PAGES["README.md"], re.DOTALL)
    assert "range(300)" in code
    monkeypatch.chdir(ROOT)
    names = {}
    torch.manual_seed(0)
    exec(code.replace("range(300)", "range(50)"), names)
    x0 = names["text"][:2048].view(32, 64)
    assert names["model"].nll(x0, 8).mean() / 64 < 4.5
    assert len(eval(capsys.readouterr().out)) == 64


# --------------------------------------------------------------------------------------- commands, as they stand


def section(title):
    return PAGES["README.md"].split(f"## {title}\n")[1].split("\n## ")[0]


def shortened(words):
    """A training of some steps of a tiny model, and few calls of the network."""
    if words[0] == "train.py":
        words = [word for word in words if not word.startswith("--max_steps")]
        resumed = "--init_from=resume" in words
        words += ["--max_steps=5"] if resumed else ["--max_steps=3", *TINY]
    if words[0] == "sample.py" and "exact" not in words:
        words += ["--steps=2"]
    return words


def test_the_first_session(tmp_path):
    """The first command, and all of `Things to try`, one after another, where models are tiny and FILE is a text."""
    first = re.search(r"^    pip install -e \. && (.*)$", PAGES["README.md"], re.MULTILINE)[1]
    lines = [first, *re.findall(r"^    (python .*)$", section("Things to try"), re.MULTILINE)]
    assert len(lines) >= 10
    (tmp_path / "FILE").write_text("A text of one's own, and no long one. " * 200)
    for command in [command for line in lines for command in line.split(" && ")]:
        python, *words = shlex.split(command)
        done = works(call(*shortened(words), cwd=tmp_path))
        if "The {20} statement is used to {30}." in words:
            assert " statement is used to" in done.stdout
        if "The import {1000}" in words:
            assert done.stdout.startswith("The import") and re.search(r" 100\d tokens ", done.stderr)


def test_tokens_of_ones_own_as_the_readme_says(tmp_path):
    (meta,) = re.findall(r'`(\{"vocab_size".*?\})`', PAGES["README.md"])
    (prompt,) = re.findall(r'`"([\d ]+ \{\d\})"`', PAGES["README.md"])
    (tmp_path / "data/chess").mkdir(parents=True)
    (tmp_path / "data/chess/meta.json").write_text(meta)
    for split in "train", "val":
        moves = np.random.default_rng(0).integers(0, json.loads(meta)["vocab_size"], 500)
        (tmp_path / f"data/chess/{split}.bin").write_bytes(b"".join(int(m).to_bytes(2, "little") for m in moves))
    works(call("train.py", *TINY, "--dataset=chess", "--max_steps=2", cwd=tmp_path))
    written = works(call("sample.py", f"--prompt={prompt}", "--steps=2", cwd=tmp_path)).stdout.split()
    kept, gap = prompt.split(" {")
    assert written[: len(kept.split())] == kept.split() and len(written) == len(kept.split()) + int(gap[:-1])


def test_a_model_is_published(tmp_path, monkeypatch):
    """By the `python -c` of its section, in a folder with a run in out/."""
    (code,) = re.findall(r'`python -c "(.*?)"`', section("Published weights"), re.DOTALL)
    works(call("prepare.py", cwd=tmp_path))
    works(call("train.py", *TINY, "--max_steps=2", cwd=tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(" ".join(code.split()), {})
    assert {path.name for path in (tmp_path / "published").iterdir()} == {"config.json", "model.safetensors"}
    numbers = works(call("sample.py", "--init_from=published", "--steps=2", cwd=tmp_path)).stdout.split()
    assert len(numbers) == SIZES["block_size"]


# -------------------------------------------------------------------------------------- likelihood on other texts


SAID = [
    "The cat sat on the mat , and it did n't move .", "He said : `` No . '' Then he left for New York .",
    " = A Title = ", "It cost $ 1 @,@ 000 in 1998 , or so .", "Who could it be ? nobody knew the <unk> N .",
]  # fmt: skip
LOCAL = {"lambada": {"test": 120}, "wikitext2": {"validation": 130, "test": 10}, "ptb": {"validation": 140, "test": 10},
         "wikitext103": {"validation": 150, "test": 10}, "lm1b": {"train": 10, "test": 160}}  # fmt: skip


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's BPE files")
def test_likelihood_on_local_copies_of_the_five_sets(tmp_path):
    """The loop of the experiments' page, command by command, with a tiny model, not the published one, and --source."""
    page = PAGES["assets/experiments/README.md"]
    loop = page[page.index("    for set in ") :].split("    done")[0]
    names = re.search("for set in (.*); do", loop)[1].split()
    prepares, trains = re.search(r"python (.*?) >&2.*python (.*?) \|", loop, re.DOTALL).groups()
    sed = loop[loop.index("sed -n") :].strip()
    assert sorted(names) == sorted(LOCAL)
    told = section("Published weights")
    assert f"python {prepares} && python {trains}".replace("$set", "ptb") in told
    assert all(name in told for name in {*names} - {"ptb"})

    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "notes.txt").write_text("\n".join(SAID * 20))
    works(call("prepare.py", "notes", "--input=notes.txt", "--tokenizer=gpt2", cwd=tmp_path))
    works(call("train.py", *TINY, "--dataset=notes", "--max_steps=3", cwd=tmp_path))
    for name in names:
        rows = {split: [SAID[i % len(SAID)] for i in range(size)] for split, size in LOCAL[name].items()}
        make(tmp_path / name, rows, column="sentence" if name == "ptb" else "text")
        words = shlex.split(prepares.replace("$set", name))
        works(call(*words, f"--source={name}", cwd=tmp_path))
        words = shlex.split(trains.replace("$set", name).replace("louaaron/sedd-small", "out"))
        done = works(call(*words, "--eval_times=2", cwd=tmp_path))

        split = "test" if name in ("lambada", "lm1b") else "val"
        tokens = np.fromfile(tmp_path / "data" / name / f"{split}.bin", "<u2")
        assert (tokens == 50256).sum() == LOCAL[name].get("validation", LOCAL[name]["test"])
        blocks = len(tokens) // 1024
        assert blocks > 0 and f"over {blocks} of {blocks} blocks" in done.stdout
        command = ["sh", "-c", sed.replace("$set", name)]
        row = subprocess.run(command, input=done.stdout, capture_output=True, text=True).stdout
        nats, perplexity = map(float, re.search(r"bound ([\d.]+) .*perplexity ≤ ([\d.]+)", done.stdout).groups())
        assert row == f"| {name} | {perplexity:.2f} |\n"
        assert perplexity == pytest.approx(np.exp(nats), rel=0.06)  # the bound may be printed with few digits
        assert abs(nats - np.log(50257)) < 3  # after three steps it knows next to nothing, and two draws are few
