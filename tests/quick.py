"""New Python processes in a moment, for the tests start hundreds: forks of one that has imported torch and run nothing.

`Popen` and `run` are subprocess's. Each process is one of its own, with the command, folder, environment, streams and
signals that it was given, and it ends as Python ends. Where that cannot be, it is started in the usual way: not Linux,
no Python to be started, or an environment that Python reads at its start.
"""

import ctypes
import gc
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from unittest import mock

NEW = subprocess.Popen


class Popen(NEW):
    parent = None  # our end of a socket to the process that forks

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        # rest, in Python 3.10 and later: 3 to 8 are the ends of the pipes, 14 is start_new_session
        environment, startup = dict(os.environ if env is None else env), ("PYTHON", "LC_", "LANG")
        told = [{k: v for k, v in e.items() if k.startswith(startup)} for e in (environment, os.environ)]
        usual = sys.platform != "linux" or args[0] != sys.executable or args[1] == "-c" or told[0] != told[1]
        if usual or preexec_fn or pass_fds:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        if Popen.parent is None:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            NEW([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
            its.close()
            adopt(ours)
        fds = [given if given >= 0 else ours for ours, given in enumerate((rest[3], rest[6], rest[8]))]
        request = [*map(os.fspath, args[1:])], os.path.abspath(cwd or "."), environment, rest[14]
        socket.send_fds(Popen.parent, [json.dumps(request).encode()], fds)
        self.pid, self._child_created = json.loads(Popen.parent.recv(99)), True
        self._close_pipe_fds(*rest[3:9])


def adopt(parent):
    """From now on the process at the other end forks for this one, and these forks become its children."""
    Popen.parent = parent
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def run(*args, **more):
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(*args, **more)


def serve(requests):
    """Forks at each request; returns in the child alone, which is what was asked for, with its arguments."""
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        read, write = os.pipe()
        if between := os.fork():
            os.waitpid(between, 0)  # its child has a new parent now
            requests.send(os.read(read, 99))
            for fd in *fds, read, write:
                os.close(fd)
        elif child := os.fork():
            os.write(write, str(child).encode())
            os._exit(0)
        else:
            break
    for ours, fd in enumerate(fds):
        os.dup2(fd, ours)
    for fd in *fds, read, write, requests.detach():
        os.close(fd)
    args, folder, environment, session = json.loads(message)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = args[0] == "-u"
    args = args[unbuffered:]
    for fd, name in enumerate(["stdin", "stdout", "stderr"]):
        raw, errors = unbuffered and fd > 0, "backslashreplace" if fd == 2 else "strict"
        stream = open(fd, "wb" if fd else "rb", 0 if raw else -1, closefd=False)
        stream = io.TextIOWrapper(stream, "utf-8", errors, line_buffering=fd == 2 or os.isatty(fd), write_through=raw)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return args


def main(requests):
    args = serve(requests)
    if "torch.distributed.run" in args[:2] or args[0].endswith("gpu.py"):  # these start processes themselves
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            ours.close()
            return main(its)
        its.close()
        adopt(ours)
        subprocess.Popen = subprocess_handler.Popen = Popen
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(15, f"rank {os.environ['RANK']}".encode())  # PR_SET_NAME, for /proc/PID/comm
    if args[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(args[0])), args
        runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    # what train.py and sample.py import
    import numpy, tiktoken, torch, torch._dynamo, torch.distributed.run, tqdm  # noqa: E401, F401
    from torch.nn.parallel import DistributedDataParallel  # noqa: F401

    gc.freeze()
    main(socket.socket(fileno=int(sys.argv[1])))
