"""What every program needs to speak with a person: one clear line for bad input, flags, files.

The rule for checks is the same everywhere. Before the work begins, a program refuses what would otherwise give a wrong
result in silence, or fail after hours. Everything else is left to the library that meets it. What is foreseen of that
is shown as one line. Our own mistakes keep their traceback.
"""

import argparse
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

# torch.load can run code that a file contains. This makes every call refuse such files, those inside libraries too.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


class BadInput(ValueError):
    """Something that a person can put right: a flag, a file, a folder. Its text is the one line that they see."""


def refuse(when: object, why: str) -> None:
    """Ends the program with the line `why`, if the condition holds."""
    if when:
        raise BadInput(why)


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates the `main` of a program: what is foreseen ends it with one line on stderr.

    Exit status 2 is BadInput. 1 is the system's own trouble: a full disk, a GPU without room. 130 is Ctrl-C or SIGTERM.
    Whatever has its final name on disk is complete then. SPLAM_TRACEBACK=1 shows where it came from.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # which a cluster's scheduler sends before it kills
        try:
            with logging_redirect_tqdm():  # a warning has a line of its own, above the progress bars
                main()
        except BadInput as error:
            _end(str(error), 2, error)
        except (OSError, torch.OutOfMemoryError) as error:
            _end(f"{error} (SPLAM_TRACEBACK=1 shows where)".splitlines()[0], 1, error)
        except KeyboardInterrupt as error:
            _end("interrupted (training goes on by --resume_from_checkpoint latest)", 130, error)

    return wrapped


def _end(why: str, status: int, error: BaseException) -> NoReturn:
    if os.environ.get("SPLAM_TRACEBACK"):
        raise error
    for bar in list(getattr(tqdm, "_instances", [])):  # so that the line stands below what they have drawn
        bar.close()
    print(f"{Path(sys.argv[0]).name}: error: {why}", file=sys.stderr)
    # In one process of several, an exception would be shown once more by the launcher, with its traceback.
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with one line for a bad flag, and without abbreviations: --seed must not be taken for --seeds."""

    def __init__(self, **options):
        help_lines = functools.partial(Help, max_help_position=36, width=118)
        super().__init__(allow_abbrev=False, formatter_class=help_lines, **options)

    # argparse itself would print all flags before the one line that matters.
    def error(self, message: str) -> NoReturn:
        raise BadInput(message.removeprefix("argument ").replace(": ", " ", 1))


class Help(argparse.RawDescriptionHelpFormatter):
    """A line for each flag, with its default if it has one."""

    # --train_batch_size X: argparse would write the flag's name a second time, in capitals.
    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "X"

    # A switch, and a flag that has no value until it is typed, have no default worth a word.
    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default in (None, []) or isinstance(action.default, bool) or not action.option_strings
        return action.help if without or action.default is argparse.SUPPRESS else f"{action.help} (default %(default)s)"


def number(kind: type, allowed: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """A type for argparse: a number that is `allowed`, which nan never is, or the error that it "must be `words`"."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text}")
        return value

    return parse


# Seeds and sizes are 32-bit integers to some of the libraries that get them. 1e30 is near the end of float32, beyond
# which a loss is infinite at once.
positive = number(int, lambda n: 0 < n < 2**31, "positive, and below 2**31")
count = number(int, lambda n: 0 <= n < 2**31, "a whole number, 0 or more, and below 2**31")
two_or_more = number(int, lambda n: 1 < n < 2**31, "2 or more, for their spread")
amount = number(float, lambda x: 0 <= x <= 1e30, "a number, 0 or more")
share = number(float, lambda x: 0 <= x < 1, "in [0, 1)")
finite = number(float, lambda x: abs(x) <= 1e30, "a number")


def recipes(title: str, named: dict[str, str]) -> str:
    """For the end of a program's help: command lines by name."""
    return "\n".join([f"{title}:", *(f"  {name}: {flags}" for name, flags in named.items()), ""])


def read_prompts(values: list[str]) -> list[str]:
    """Prompts from the command line: the values themselves, or the lines of a single value that ends in .txt."""
    if len(values) != 1 or not values[0].endswith(".txt"):
        return values
    # utf-8-sig: Windows' editors begin a file with a mark, which would become a part of the first prompt.
    lines = [line.strip() for line in Path(values[0]).read_text(encoding="utf-8-sig").splitlines()]
    prompts = [line for line in lines if line]
    refuse(not prompts, f"no prompts in {values[0]}")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def by_library(call: Callable, name: str | Path, **options):
    """What a library makes of a file, a folder or a hub id. Each has its own errors for what it cannot read; here all
    are BadInput."""
    try:
        return call(name, **options)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        hint = " (*.fp16.safetensors need --variant fp16; *.bin are not read)" if "no file named" in first_line else ""
        raise BadInput(f"cannot load {name}: {type(error).__name__}: {first_line}{hint}") from error


def read_json(file: str | Path) -> dict:
    """A JSON file that holds an object. A person may have edited it."""
    content = by_library(lambda file: json.loads(Path(file).read_text()), file)
    refuse(not isinstance(content, dict), f"cannot load {file}: it holds no JSON object")
    return content


def writable_folder(path: str | Path) -> Path:
    """The folder, made if need be. Refused now rather than after hours, when the first result is to be written."""
    # A file of that name ends here too, by mkdir's own error.
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    refuse(not os.access(folder, os.W_OK), f"cannot write to {folder}")
    return folder


def output_file(path: str | Path, suffix: str) -> Path:
    """Where a result is to be written: refused now rather than after the work that it is the result of."""
    file = Path(path)
    refuse(file.suffix != suffix or file.is_dir(), f"{file} must be the name of a file that ends in {suffix}")
    writable_folder(file.parent)
    return file
