"""How a training starts and ends where people are: several GPUs, a Mac, a terminal that closes, processes that die.

What this machine lacks has a stand-in that fails as the real thing does: an accelerator for which gloo has no CPU
backend, attention kernels that are not there.
"""

import contextlib
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import quick
from test_scripts import ROOT, TINY, TORCHRUN, assert_same, call, complains, environment, read_log, run, together, works
from test_train import WRAPPED, checkpoint, home, launch, second_of, wait_for  # noqa: F401

LONG = [*TINY, "--dropout=0.1", "--decay_lr=none", "--log_interval=1", "--eval_interval=99999", "--save_interval=99999"]
PARTS = "step", "model", "ema", "optimizer"


@pytest.fixture(scope="module")
def truth(home):
    """A function: the checkpoint of LONG after so many steps of one process that nothing disturbs."""

    def after(steps):
        works(call("train.py", *LONG, f"--max_steps={steps}", f"--out_dir=truth{steps}", cwd=home))
        return checkpoint(home / f"truth{steps}")

    return after


def steps_of(out):
    return [record["step"] for record in read_log(out)] if (out / "log.jsonl").exists() else []


def assert_stopped_well(home, out, truth):
    """The checkpoint is of the step that the log ends with, and goes on bit for bit."""
    step = checkpoint(home / out)["step"]
    assert step > 5 and steps_of(home / out) == [*range(1, step + 1)]
    works(call("train.py", "--init_from=resume", f"--out_dir={out}", f"--max_steps={step + 2}", cwd=home))
    a, b = checkpoint(home / out), truth(step + 2)
    for part in PARTS:
        assert_same(a[part], b[part], part)


# ------------------------------------------------------------------------------------------ where there is no CUDA

ON_A_MAC = "import torch\ntorch._C._get_accelerator = lambda *args: torch.device('mps')"
NO_KERNELS = """import torch
def missing(*args, **kwargs):
    raise NotImplementedError('_fused_sdp_choice is not there for MPS')
torch._fused_sdp_choice = missing"""


def test_the_backend_is_that_of_the_device_and_not_of_the_machine(home):
    """Without a name for it PyTorch takes one for the machine's accelerator: none for tensors on the CPU."""
    (home / "mac.py").write_text(WRAPPED % ON_A_MAC)
    args = [*TINY, "--max_steps=4", "--eval_interval=2", "--out_dir=mac"]
    done = works(together(2, home / "mac.py", *args, cwd=home))
    assert "2 x cpu" in done.stdout and done.stdout.count(" bound ") == 2
    done = works(together(2, home / "mac.py", "--init_from=resume", "--max_steps=6", "--out_dir=mac", cwd=home))
    assert "steps 4 to 6" in done.stdout and checkpoint(home / "mac")["step"] == 6
    works(together(2, home / "mac.py", "--init_from=mac", "--eval_only", cwd=home))


def test_training_asks_for_no_kernel_by_name(home):
    (home / "kernels.py").write_text(WRAPPED % NO_KERNELS)
    works(run(home / "kernels.py", *TINY, "--max_steps=2", "--out_dir=kernels", cwd=home))


def test_processes_cannot_meet_on_mps(home, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None: zeros(*args))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    complains(call("train.py", *TINY, "--device=mps", cwd=home), "train.py", "MPS", "without torchrun")


@pytest.mark.parametrize("given, missing", [
    ({"RANK": "1"}, "WORLD_SIZE"), ({"WORLD_SIZE": "3"}, "RANK"), ({"RANK": "0", "WORLD_SIZE": "3"}, "MASTER_ADDR"),
])  # fmt: skip
def test_a_start_without_torchrun_is_named(home, monkeypatch, given, missing):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prefix = "[rank 1] " if given.get("RANK") == "1" else ""
    complains(call("train.py", *TINY, cwd=home), f"{prefix}train.py", f"{missing} is not set", "torchrun")


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_many_that_do_not_know_of_each_other_are_refused(home, monkeypatch, variable):
    """srun and mpirun without torchrun: all would write one checkpoint."""
    monkeypatch.setenv(variable, "8")
    complains(call("train.py", *TINY, cwd=home), "train.py", "srun or mpirun", "torchrun")
    monkeypatch.setenv(variable, "1")
    works(call("train.py", *TINY, "--max_steps=1", "--eval_interval=9", "--out_dir=alone", cwd=home))


def test_processes_that_know_no_card_of_theirs_are_refused(home, monkeypatch):
    """As under srun and mpirun: all would take the first."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    complains(call("train.py", *TINY, "--device=cuda", cwd=home), "train.py", "LOCAL_RANK is not set", "torchrun")


@pytest.mark.parametrize("device, local, expected", [
    ("cuda:1", "8", ("nccl", "cuda:1")), ("cuda:1", "1", ("nccl", "cuda:1")), ("cpu", "8", ("gloo", None)),
    ("cuda:0 named", "2", ("gloo", None)), ("cuda:0 named", "1", ("nccl", "cuda:0")),
])  # fmt: skip
def test_which_backend_and_which_store(device, local, expected, monkeypatch):
    """What PyTorch is asked for, on machines that are not this one."""
    import torch.distributed as dist

    import train

    asked, (device, *named) = {}, device.split()
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "a", "MASTER_PORT": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 8)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kw: asked.update(kw, backend=backend))
    train.join_processes(device if named else "auto", torch.device(device))
    assert asked["backend"] == expected[0] and asked["device_id"] == (expected[1] and torch.device(expected[1]))
    assert asked["timeout"].total_seconds() == 600
    asked["store"].set("key", "1")
    assert asked["store"].has_extended_api() or True
    assert asked["store"].underlying_store.check(["start 3/key"])


# ------------------------------------------------------------------------------------------ a terminal that closes


def gone(word, seconds=60):
    """Wait until no process has the word in its command."""
    until = time.monotonic() + seconds
    while any(word in command for command in commands()):
        assert time.monotonic() < until, f"{word} is still running"
        time.sleep(0.1)


def commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().decode(errors="replace").replace("\0", " ")


def test_a_terminal_that_closes_stops_the_run_after_its_step(home, truth):
    """The run is the leader of the terminal's session, as after `exec`."""
    (home / "terminal.py").write_text(WRAPPED % "os.close(os.open(os.ttyname(0), os.O_RDWR))")
    main, side = pty.openpty()
    command = [sys.executable, str(home / "terminal.py"), *LONG, "--max_steps=100000", "--out_dir=terminal"]
    process = quick.Popen(command, cwd=home, env=environment(), stdin=side, stdout=side, stderr=side,
                          start_new_session=True)  # fmt: skip
    os.close(side)
    wait_for(lambda: len(steps_of(home / "terminal")) > 5, process)
    os.close(main)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert_stopped_well(home, "terminal", truth)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_terminal_closes_over_torchrun_and_tee(home):
    """bash, torchrun and tee get SIGHUP, and torchrun hands it on to two processes whose output nobody reads any more."""
    line = f"'{sys.executable}' {' '.join(TORCHRUN)} --nproc-per-node=2 '{ROOT}/train.py' {' '.join(LONG)} "
    line += "--max_steps=100000 --out_dir=tee 2>&1 | tee tee.txt"
    pid, main = pty.fork()
    if pid == 0:
        os.chdir(home)
        os.execvpe("bash", ["bash", "-c", line], environment())
    until = time.monotonic() + 90
    while len(steps_of(home / "tee")) < 6:
        assert time.monotonic() < until, (home / "tee.txt").read_text()
        time.sleep(0.1)
    os.close(main)
    os.waitpid(pid, 0)
    gone("--out_dir=tee")
    step = checkpoint(home / "tee")["step"]
    assert step > 5 and steps_of(home / "tee") == [*range(1, step + 1)]
    works(together(2, "train.py", "--init_from=resume", "--out_dir=tee", f"--max_steps={step + 2}", cwd=home))
    works(together(2, "train.py", *LONG, "--out_dir=tee2", f"--max_steps={step + 2}", cwd=home))
    for part in PARTS:
        assert_same(checkpoint(home / "tee")[part], checkpoint(home / "tee2")[part], part)


def test_a_hangup_by_hand_stops_two_processes(home):
    process = launch(home, *LONG, "--max_steps=100000", "--out_dir=hup", launcher=[*TORCHRUN, "--nproc-per-node=2"])
    wait_for(lambda: len(steps_of(home / "hup")) > 5, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode and checkpoint(home / "hup")["step"] == steps_of(home / "hup")[-1]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_when_nobody_reads_a_run_stops_after_its_step(home, truth, stream):
    """tee has died alone. The status tells of SIGHUP, not of a broken pipe."""
    args = [*LONG, "--max_steps=100000", f"--out_dir=unread_{stream}"]
    args += ["--eval_interval=1"] if stream == "stdout" else []  # where only evaluations are told
    command = [sys.executable, str(ROOT / "train.py"), *args]
    process = quick.Popen(command, cwd=home, env=environment() | {"TQDM_MININTERVAL": "0"}, stdin=subprocess.DEVNULL,
                          **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE})
    wait_for(lambda: len(steps_of(home / f"unread_{stream}")) > 5, process)
    getattr(process, stream).close()
    assert process.wait(60) == 128 + signal.SIGHUP
    assert checkpoint(home / f"unread_{stream}")["step"] == steps_of(home / f"unread_{stream}")[-1]


def test_under_nohup_a_run_goes_on(home):
    (home / "nohup.py").write_text(WRAPPED % "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process = launch(home, *LONG, "--max_steps=60", "--out_dir=nohup", script=home / "nohup.py")
    wait_for(lambda: len(steps_of(home / "nohup")) > 5, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopping" not in err and checkpoint(home / "nohup")["step"] == 60


# ---------------------------------------------------------------------------------------------- under torchrun


def test_one_process_under_torchrun_is_one_process(home, truth):
    """It joins a group, as eight do, and ends with the same bits as without."""
    launcher = [*TORCHRUN, "--nproc-per-node=1"]
    works(run("train.py", *LONG, "--max_steps=12", "--out_dir=joined", cwd=home, launcher=launcher))
    for part in PARTS:
        assert_same(checkpoint(home / "joined")[part], truth(12)[part], part)


LATE = """import time
import torch.distributed as dist
join = dist.init_process_group
def late(*args, **kwargs):
    time.sleep(2 if os.environ['RANK'] == '0' else 0)
    join(*args, **kwargs)
dist.init_process_group = late"""
LOST = [*TINY, "--dropout=0.1", "--max_steps=60", "--save_interval=5", "--log_interval=1", "--eval_interval=99999",
        "--init_from=auto"]  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("rendezvous, late", [("standalone", False), ("standalone", True), ("static", True)])
def test_after_the_loss_of_a_process_both_go_on(home, quiet, rendezvous, late):
    out = f"{rendezvous}_{late}"
    launcher = TORCHRUN if rendezvous == "standalone" else [
        *TORCHRUN[:2], "--local-addr=127.0.0.1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]  # fmt: skip
    (home / "late.py").write_text(WRAPPED % LATE)
    process = launch(home, *LOST, f"--out_dir={out}", script=home / "late.py" if late else ROOT / "train.py",
                     launcher=[*launcher, "--nproc-per-node=2", "--max-restarts=2"])  # fmt: skip
    wait_for(lambda: len(steps_of(home / out)) > 12, process)
    os.kill(second_of(process), signal.SIGKILL)
    output, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    starts = [int(step) for step in re.findall(r"steps (\d+) to 60", output)]
    assert len(starts) == 2 and starts[0] == 0 and 10 <= starts[1] < 60
    for part in PARTS:
        assert_same(checkpoint(home / out)[part], checkpoint(quiet)[part], part)


@pytest.fixture(scope="module")
def quiet(home):
    works(together(2, "train.py", *LOST, "--out_dir=quiet", cwd=home))
    return home / "quiet"


def nodes(home, out, *more, **variables):
    """train.py by two torchruns, as on two machines that share a disk."""
    (home / "late.py").write_text(WRAPPED % LATE)
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=x",
                f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", *more]  # fmt: skip
    command = [sys.executable, "-u", *launcher, str(home / "late.py"), *LOST, f"--out_dir={out}"]
    return [quick.Popen(command, cwd=home, env=environment() | variables, stdin=subprocess.DEVNULL, text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]  # fmt: skip


def test_two_nodes_go_on_together_after_the_loss_of_a_process(home, quiet):
    """Each torchrun counts its own restarts; with a store of its own for each start they meet all the same."""
    agents = nodes(home, "nodes", "--max-restarts=1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(lambda: len(steps_of(home / "nodes")) > 12, agents[0])
    os.kill(next(pid for pid in map(second_of, agents) if pid), signal.SIGKILL)
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    starts = re.findall(r"steps (\d+) to 60", "".join(out for out, _ in outputs))
    assert len(starts) == 2 and starts[0] == "0" and 10 <= int(starts[1]) < 60
    for part in PARTS:
        assert_same(checkpoint(home / "nodes")[part], checkpoint(quiet)[part], part)


def test_two_nodes_with_restarts_on_torchruns_own_store_are_refused(home):
    outputs = [agent.communicate(timeout=120) for agent in nodes(home, "shared_store", "--max-restarts=1")]
    assert all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in err and "--rdzv-backend=c10d" in err for _, err in outputs)
    assert not (home / "shared_store").exists()


@pytest.mark.parametrize("start, advice", [("scratch", "--init_from=auto"), ("out", "leave out --max-restarts")])
def test_a_start_that_restarts_would_repeat_is_refused(home, monkeypatch, start, advice):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    done = call("train.py", *TINY, f"--init_from={start}", "--out_dir=again", cwd=home)
    complains(done, "train.py", "restart", advice)
    works(call("train.py", f"--init_from={start}", "--eval_only", "--device=cpu", cwd=home))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    works(call("train.py", "--init_from=auto", *TINY, "--max_steps=1", "--out_dir=again", cwd=home))


def test_processes_that_see_different_disks_end(home):
    """The second sees no checkpoint."""
    shutil.copytree(home / "out", home / "stale")
    (home / "stale.py").write_text(WRAPPED % "if os.environ['RANK'] == '1':\n"
                                             "    see = pathlib.Path.is_file\n"
                                             "    pathlib.Path.is_file = lambda p: p.name != 'ckpt.pt' and see(p)")  # fmt: skip
    launcher = [*TORCHRUN, "--nproc-per-node=2"]
    done = run(home / "stale.py", *TINY, "--init_from=auto", "--out_dir=stale", "--max_steps=22", cwd=home, launcher=launcher)
    assert done.returncode and "process 0 found step 20 in stale/ckpt.pt, this one -1" in done.stderr
    assert checkpoint(home / "stale")["step"] == 20


def test_the_device_is_never_that_of_the_checkpoint(home):
    """A run of another machine goes on here."""
    shutil.copytree(home / "out", home / "moved")
    saved = checkpoint(home / "moved")
    saved["options"]["device"] = "cuda:7"
    torch.save(saved, home / "moved/ckpt.pt")
    done = works(call("train.py", "--init_from=resume", "--out_dir=moved", "--max_steps=21", cwd=home))
    assert "1 x cpu" in done.stdout and checkpoint(home / "moved")["options"]["device"] == "auto"
