"""What the scripts share: options (dataclass defaults < config files < --key=value), errors of one line, a bar."""

import argparse
import contextlib
import difflib
import inspect
import os
import re
import runpy
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from tqdm import tqdm

# Types of options that are numbers: the least one, and the first that is too large.
Whole, Count, Seed = Annotated[int, 0, 2**31], Annotated[int, 1, 2**31], Annotated[int, 0, 2**63]
Amount, Fraction = Annotated[float, 0, float("inf")], Annotated[float, 0, 1]


def fail(message):
    """One line on standard error, which names a process that is not the first, and exit status 2."""
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
    print(f"{rank}{Path(sys.argv[0]).name}: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(2)


def run(main, smaller="a smaller model, or less at a time"):
    """main(), where what a user can cause ends in one line, or quietly. `smaller`: what to try if memory is short."""
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # if closed
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that a text has
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` blocks run
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # which tells torchrun, and shells, of it
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (MemoryError, RuntimeError) as error:
        if type(error) is not MemoryError and "allocate" not in str(error):  # the word of NumPy, the CPU and CUDA
            raise
        fail(f"the memory does not hold this: try {smaller}")


def progress(*args, **options):
    """A tqdm bar; where nobody watches it move, as in a log file, with a line each half minute."""
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30} | options)


def convert(name, kind, text):
    """What `text` stands for in an option of this type: str, bool, Literal[...], or a number as above."""
    if kind is str:
        return text
    if get_origin(kind) is Annotated:
        number, least, limit = get_args(kind)
        wanted = f"{'a whole number' if number is int else 'a number'}, at least {least} and below {limit}"
        with contextlib.suppress(ValueError):
            text = number(text)
            if least <= text < limit:  # nan is in no order with anything
                return text
    else:
        choices = {str(choice): choice for choice in get_args(kind) or (True, False)}
        wanted = f"one of {', '.join(choices)}"
        if text in choices:
            return choices[text]
    fail(f"{name}={text!r} must be {wanted}")


def read_file(path):
    """The assignments of a config file as words --key=value. It is run as it stands: run only files you trust."""
    if not os.path.isfile(path):  # False for what no file can be called
        known = ", ".join(sorted(os.path.relpath(file) for file in Path(__file__).parent.glob("[!_]*.py")))
        fail(f"there is no config file {path!r}: there are {known}; options are written --key=value")
    try:
        found = runpy.run_path(path).items()
        return [f"--{name}={value}" for name, value in found if name[0] != "_" and not inspect.ismodule(value)]
    except (Exception, SystemExit) as error:
        fail(f"the config file {path} does not run: {type(error).__name__}: {error}")


def parse(Options, positional=None, argv=None, source=""):
    """The command line as a dict of the options it sets, and only these; Options(**dict) fills in the rest.

    A word without dashes is a config file or, if `positional` names an option, its value. In the source of the
    dataclass the comment beside a field is its help, and a comment on a line of its own heads a group.
    """
    parser = group = argparse.ArgumentParser(
        usage=f"%(prog)s [{(positional or 'config ...').upper()}] [--key=value ...]", description=Options.__doc__,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.error = fail
    parser.add_argument(positional or "files", nargs="?" if positional else "*", help=argparse.SUPPRESS)
    fields = r"^    (?:# (.+)|(\w+): [^#\n]*(?:# (.+))?)$"
    for heading, name, comment in re.findall(fields, inspect.getsource(Options), re.M):
        if heading:
            group = parser.add_argument_group(heading)
            continue
        kind, default = Options.__annotations__[name], getattr(Options, name)
        group.add_argument(
            f"--{name}", type=partial(convert, name, kind), help=f"{comment} [{default}]".replace("%", "%%"),
            metavar="|".join(get_args(kind)) if get_origin(kind) is Literal else type(default).__name__.upper(),
            **({"nargs": "?", "const": True} if kind is bool else {}),
        )  # fmt: skip
    found, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        name = word.lstrip("-").split("=")[0]
        close = difflib.get_close_matches(name, Options.__annotations__, n=1, cutoff=0.0)[0]
        fail(f"{source}unknown option {name!r}: did you mean {close!r}? --help lists them all"
             if word[0] == "-" else f"unexpected {word!r}")  # fmt: skip
    options = vars(found)
    for path in reversed(options.pop("files", [])):  # the later file beats the earlier one
        options = parse(Options, None, read_file(path), f"{path}: ") | options
    return options
