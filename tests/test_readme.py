"""What the README says exists: its commands parse, its files and the names that it points to are there."""

import re
import shlex
from pathlib import Path

import pytest

import experiments
import prepare
import sample
import sedd
import train
from config import parse

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": (train, None), "sample.py": (sample, None), "prepare.py": (prepare, "name")}

blocks = re.findall(r"^    (.+)$", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL), re.MULTILINE)
spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", TEXT)]
COMMANDS = sorted({command.strip() for code in [*blocks, *spans] if re.match(r"(python|pip|pytest|torchrun)\b", code)
                   for command in code.split("&&")})  # fmt: skip


def test_there_are_commands():
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("=N", "=8").replace("--graph=frequency", ""))  # test_fork.py has that graph
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") and not word.startswith("config/")]
    if scripts:
        assert (ROOT / words[scripts[0]]).is_file()
    if scripts and words[scripts[0]] in SCRIPTS:
        module, positional = SCRIPTS[words[scripts[0]]]
        module.Options(**parse(module.Options, positional, words[scripts[0] + 1 :]))


def test_files_and_tests_exist():
    for path in re.findall(r"\b((?:tests|config|assets)/[\w/]+\.(?:py|svg|png))", TEXT):
        assert (ROOT / path).is_file(), path
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in tests, name


def test_names_of_the_paper_table_exist():
    table = TEXT[TEXT.index("| in the paper |") : TEXT.index("## The theory, run")]
    source = Path(sedd.__file__).read_text(encoding="utf-8")
    for row in table.splitlines()[2:]:
        if row.startswith("|"):
            names = re.findall(r"`([\w.]+)`", row.split("|")[3])
            for name in names:
                assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b|\b{name.split('.')[-1]}\b =", source), name


def test_tables_are_those_of_the_logs(capsys):
    experiments.tables(None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 40
    for line in lines:
        assert line in TEXT, line
