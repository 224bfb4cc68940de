"""What the scripts share: options (dataclass defaults < config files < --key=value), errors of one line, a bar."""

import argparse
import inspect
import io
import os
import re
import runpy
import sys
from pathlib import Path
from typing import get_args

from tqdm import tqdm


def fail(message):
    """One line on standard error, which names a process that is not the first, and exit status 2."""
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
    print(f"{rank}{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def run(main):
    """main(), where Ctrl-C ends quietly, and a file or a disk that fails ends in one line."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is of another kind
            # a file or pipe gets every letter; a terminal may have few, and shows a "?" for the others
            own = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if own else "utf-8", errors="replace")
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)


def progress(*args, **options):
    """A tqdm bar; in a log file, where it cannot move, a line each half minute."""
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30} | options)


def read_file(path):
    """The assignments of a config file as words --key=value. It is run as it stands: run only files you trust."""
    try:
        found = runpy.run_path(path).items()
    except (Exception, SystemExit) as error:
        fail(f"{path} is no config file that runs ({type(error).__name__}: {error}); options are written --key=value")
    return [f"--{name}={value}" for name, value in found if name[0] != "_" and not inspect.ismodule(value)]


def truth(text):
    return {"True": True, "False": False}.get(text, text)


def parse(Options, script, positional=None, argv=None, source=""):
    """The command line as a dict of the options that it sets, and only these; Options(**dict) fills in the rest.

    A word without dashes is a config file or, if `positional` names an option, its value. In the source of the
    dataclass, in the file `script`, the comment beside a field is its help, and one on its own line heads a group.
    """
    parser = group = argparse.ArgumentParser(
        usage=f"%(prog)s [{(positional or 'config ...').upper()}] [--key=value ...]", description=Options.__doc__,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.error = lambda message: fail(f"{source}{message} (--help lists all options)")
    parser.add_argument(positional or "files", nargs="?" if positional else "*", help=argparse.SUPPRESS)
    body = Path(script).read_text(encoding="utf-8").split(f"class {Options.__name__}:\n")[1].split("\n\n\n")[0]
    words = sys.argv[1:] if argv is None else argv
    for heading, name, comment in re.findall(r"^    (?:# (.+)|(\w+): [^#\n]*(?:# (.+))?)$", body, re.M):
        if heading:
            group = parser.add_argument_group(heading)
            continue
        default, choices = getattr(Options, name), get_args(Options.__annotations__[name]) or None
        kind = type(default)
        if kind is bool:  # a flag takes a value only after "=": the word behind it is a config file
            kind, choices = truth, (True, False)
            words = [f"{word}=True" if word == f"--{name}" else word for word in words]
        help_text = f"{comment} [{default}]".replace("%", "%%")
        group.add_argument(f"--{name}", type=kind, choices=choices, help=help_text)
    options = vars(parser.parse_intermixed_args(words))
    for name, value in options.items():
        if type(value) in (int, float) and not value >= 0:  # nan is not
            parser.error(f"{name}={value} must be 0 or more")
    for path in reversed(options.pop("files", [])):  # the later file beats the earlier one
        options = parse(Options, script, None, read_file(path), f"{path}: ") | options
    return options
