"""Two new graphs, put into a copy of the repository as the README says: they pass the tests, train and write.

The README's own is of the kind that sedd.py has, and names its pi; walk.py is of another kind.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

import quick

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"Frequency": ROOT / "README.md", "Walk": ROOT / "tests" / "walk.py"}


@pytest.fixture(scope="module", params=SOURCES)
def fork(request, tmp_path_factory):
    """The copy, and the name of its new graph."""
    fork, name = tmp_path_factory.mktemp("fork"), request.param
    for folder in "config", "tests":
        shutil.copytree(ROOT / folder, fork / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in "sedd.py", "train.py", "sample.py", "prepare.py", "pyproject.toml":
        shutil.copy(ROOT / script, fork)

    text = SOURCES[name].read_text(encoding="utf-8")
    (graph,) = re.findall(rf"^(class {name}\(Graph\):.*?)(?:```|\Z)", text, re.DOTALL | re.MULTILINE)
    edit(fork / "sedd.py", 'GRAPHS = {"absorb"', f'{graph}\n\nGRAPHS = {{"{name.lower()}": {name}, "absorb"')
    for file in "test_sedd.py", "test_theory.py":
        edit(fork / "tests" / file, "GRAPHS = [", f"GRAPHS = [{name}(V), ")
        edit(fork / "tests" / file, "    SEDD, Absorbing," if "theory" in file else "import SEDD, Absorbing,",
             f"    SEDD, {name}, Absorbing," if "theory" in file else f"import SEDD, {name}, Absorbing,")  # fmt: skip
    return fork, name


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def run(fork, *args):
    done = quick.run([sys.executable, *args], cwd=fork, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_the_tests_of_a_graph(fork):
    fork, name = fork
    left_out = "euler or wrong_scores or reconstruction or geometric or prior_term"  # these take long
    if name == "Walk":  # it jumps at more than rate 1: long steps magnify the rounding of float32 scores beyond use
        left_out += " or every_step"
    quick = f"{name} and not ({left_out})"
    files = "tests/test_sedd.py", "tests/test_theory.py"
    out = run(fork, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", quick)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 18


def test_it_trains_and_writes(fork):
    fork, name = fork
    run(fork, "prepare.py", "pydocs", "--tokenizer=char")
    shape = "--n_layer=1", "--n_head=2", "--n_embd=16", "--cond_dim=8", "--block_size=16", "--batch_size=4"
    run(fork, "train.py", f"--graph={name.lower()}", "--out_dir=out/new", *shape, "--max_steps=3", "--eval_sequences=2",
        "--eval_times=2")  # fmt: skip
    assert len(run(fork, "sample.py", "--out_dir=out/new", "--steps=4")) == 16 + 1


def test_the_readmes_graph_is_short():
    readme = SOURCES["Frequency"].read_text(encoding="utf-8")
    (graph,) = re.findall(r"```python\n(class Frequency.*?)```", readme, re.DOTALL)
    assert len(graph.splitlines()) <= 10
