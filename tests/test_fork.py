"""The README's new graph, put into a copy of the repository as the README says: it passes the tests, trains and writes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    fork = tmp_path_factory.mktemp("fork")
    for folder in "config", "tests":
        shutil.copytree(ROOT / folder, fork / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in "sedd.py", "train.py", "sample.py", "prepare.py", "pyproject.toml":
        shutil.copy(ROOT / script, fork)

    (walk,) = re.findall(r"```python\n(class Walk:.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    edit(fork / "sedd.py", 'GRAPHS = {"absorb": Absorbing,', f'{walk}\n\nGRAPHS = {{"walk": Walk, "absorb": Absorbing,')
    for file in "test_sedd.py", "test_theory.py":
        edit(fork / "tests" / file, "GRAPHS = [", "GRAPHS = [Walk(V), ")
        edit(fork / "tests" / file, "    SEDD, Absorbing," if "theory" in file else "import SEDD, Absorbing,",
             "    SEDD, Walk, Absorbing," if "theory" in file else "import SEDD, Walk, Absorbing,")  # fmt: skip
    return fork


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def run(fork, *args):
    done = subprocess.run([sys.executable, *args], cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_the_tests_of_a_graph(fork):
    quick = "Walk and not (euler or wrong_scores or reconstruction or geometric)"  # the others take long
    out = run(fork, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_sedd.py", "tests/test_theory.py", "-k", quick)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 18


def test_it_trains_and_writes(fork):
    run(fork, "prepare.py")
    shape = "--n_layer=1", "--n_head=2", "--n_embd=16", "--cond_dim=8", "--block_size=16", "--batch_size=4"
    run(fork, "train.py", "--graph=walk", "--out_dir=out/walk", *shape, "--max_steps=3", "--eval_sequences=2", "--eval_times=2")
    assert len(run(fork, "sample.py", "--out_dir=out/walk", "--steps=4")) == 16 + 1
