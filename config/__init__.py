"""Reads the options of a script: dataclass defaults < config files < --key=value.

A config file is plain Python, run as it stands, whose assignments name options: run only files you trust.
"""

import argparse
import difflib
import inspect
import os
import re
import runpy
import sys
import typing
from pathlib import Path

from tqdm import tqdm


WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def fail(message):
    """One line on standard error, which names a process that is not the first, and exit status 2."""
    rank = os.environ.get("RANK", "0")
    name = Path(sys.argv[0]).name if rank == "0" else f"[rank {rank}] {Path(sys.argv[0]).name}"
    print(f"{name}: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(2)


def progress(*args, **options):
    """A tqdm bar; where nobody watches it move, as in a log file, with a line each half minute."""
    return tqdm(*args, **{"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30} | options)


def convert(name, kind, value):
    """`value`, a string from the command line or an object from a config file, as the option's type."""
    choices = typing.get_args(kind)
    if choices:
        if str(value) not in choices:  # a config file may say compile = False
            fail(f"{name} is one of {', '.join(choices)}, not {value!r}")
        return str(value)
    if kind is bool and str(value).lower() in ("true", "1", "false", "0"):
        return str(value).lower() in ("true", "1")
    if isinstance(value, str) or (kind is float and type(value) is int):
        try:
            if kind is not bool:
                return kind(value)
        except (ValueError, OverflowError):
            pass
    elif type(value) is kind:
        return value
    fail(f"{name} takes {WANTED[kind]}, not {value!r}")


def nearest(name, options):
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.0)
    return f"unknown option {name!r}: did you mean {close[0]!r}? --help lists them all"


def read_file(path, kinds):
    """The options that a config file assigns, checked against `kinds`, a dict from name to type."""
    if not os.path.isfile(path):  # False for what no file can be called
        known = sorted(str(p.relative_to(Path.cwd()) if p.is_relative_to(Path.cwd()) else p)
                       for p in Path(__file__).parent.glob("*.py") if p.name != "__init__.py")  # fmt: skip
        fail(f"there is no config file {path!r}: there are {', '.join(known)}; options are written --key=value")
    try:
        assigned = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        fail(f"the config file {path} does not run: {type(error).__name__}: {error}")
    assigned = {k: v for k, v in assigned.items() if not k.startswith("_") and not inspect.ismodule(v)}
    for name in assigned:
        if name not in kinds:
            fail(f"{path}: {nearest(name, kinds)}")
    return {name: convert(name, kinds[name], value) for name, value in assigned.items()}


def parse(Options, positional=None, argv=None):
    """The command line as a dict of the options it sets, and only these; Options(**dict) fills in the rest.

    Words without dashes are config files, or, if `positional` names an option, its value. In the source of the
    dataclass `Options` the comment beside each field is its help text, and a comment on a line of its own
    heads a group.
    """
    kinds = typing.get_type_hints(Options)
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s [{positional.upper() if positional else 'CONFIG ...'}] [--key=value ...]",
        description=inspect.getdoc(Options), allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
    )  # fmt: skip
    parser.error = fail
    group = parser.add_argument_group("options")
    for line in inspect.getsource(Options).splitlines():
        if heading := re.match(r"    # (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif field := re.match(r"    (\w+): .*?  # (.+)", line):
            name, comment = field.groups()
            choices, default = typing.get_args(kinds[name]), getattr(Options, name)
            group.add_argument(
                f"--{name}", **({"nargs": "?", "const": "True"} if kinds[name] is bool else {}),
                metavar="|".join(choices) or kinds[name].__name__.upper(),
                help=f"{comment} [{default}]".replace("%", "%%"),
            )  # fmt: skip
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    if positional:
        parser.add_argument("words", nargs="?", metavar=positional.upper(), help=f"same as --{positional}")
    else:
        parser.add_argument("words", nargs="*", metavar="CONFIG", help="files of such options, as Python assignments")
    found, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        fail(nearest(word.lstrip("-").split("=")[0], kinds) if word.startswith("-") else f"unexpected {word!r}")

    found = vars(found)
    words = found.pop("words", None) or []
    options = {positional: words} if positional and words else {}
    for path in [] if positional else words:
        options |= read_file(path, kinds)
    return options | {name: convert(name, kinds[name], value) for name, value in found.items()}
