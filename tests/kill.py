"""Kill a training again and again, resume it each time, and compare it with one that was left in peace, bit for bit.

python tests/kill.py [KILLS]   about 4 minutes for the 50 kills it does by itself
"""

import os
import random
import sys
import tempfile
import threading
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, run

import torch

ROOT = Path(__file__).parent.parent
# a constant learning rate: the weights after n steps do not depend on the number of steps that were planned
ARGS = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--cond_dim=16", "--block_size=32", "--batch_size=4",
        "--dropout=0.1", "--decay_lr=none", "--warmup_steps=5", "--save_interval=3", "--eval_interval=7",
        "--eval_sequences=4", "--eval_times=2", "--device=cpu", "--compile=False"]  # fmt: skip


def start(folder, out, *args):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-u", str(ROOT / "train.py"), *ARGS, f"--out_dir={out}", *args]
    return Popen(command, cwd=folder, env=env | {"OMP_NUM_THREADS": "1"}, text=True, errors="replace",
                            stdin=DEVNULL, stdout=PIPE, stderr=PIPE)  # fmt: skip


def finish(folder, out, *args):
    process = start(folder, out, *args)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def trial(folder, kills, seed=0):
    """Train on `folder`/data, with `kills` SIGKILLs; returns what happened, having compared the weights."""
    draw, checkpoint = random.Random(seed), Path(folder) / "killed/ckpt.pt"
    counts = {"kills": 0, "resumes": 0, "during startup": 0, "during a save": 0, "steps": 0}
    while counts["kills"] < kills:
        resume = checkpoint.is_file()
        process = start(folder, "killed", "--max_steps=1000000", *(["--init_from=resume"] if resume else []))
        if draw.random() < 0.2:
            timer = threading.Timer(draw.uniform(0.1, 3), process.kill)  # whatever it does by then
            timer.start()
            started = "parameters" in process.stdout.readline()
        else:
            started = "parameters" in process.stdout.readline()
            timer = threading.Timer(draw.uniform(0, 1.5), process.kill)
            timer.start()
        _, errors = process.communicate(timeout=60)
        timer.join()
        assert process.returncode == -9, errors
        counts["kills"] += 1
        counts["resumes"] += resume
        counts["during startup"] += not started
        counts["during a save"] += checkpoint.with_name(".ckpt.pt.partial").exists()
    assert checkpoint.is_file(), "no checkpoint was ever reached"
    step = torch.load(checkpoint, weights_only=True)["step"]
    counts["steps"] = step + 2
    for out, *args in ("killed", "--init_from=resume"), ("peace",):
        finish(folder, out, f"--max_steps={step + 2}", *args)
    a, b = (torch.load(Path(folder) / out / "ckpt.pt", weights_only=True) for out in ("killed", "peace"))
    assert a["step"] == b["step"] == step + 2
    for part in "model", "ema":
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), f"{part} differs"
    for name, optimizer in a["optimizer"].items():
        for i, state in optimizer["state"].items():
            same = b["optimizer"][name]["state"][i]
            assert all(torch.equal(state[moment], same[moment]) for moment in state), "optimizer differs"
    return counts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, str(ROOT / "prepare.py")], cwd=folder, check=True)
        counts = trial(folder, int(sys.argv[1]) if sys.argv[1:] else 50)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()) + ": the weights agree bit for bit")
