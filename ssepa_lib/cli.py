"""The command line: `python -m ssepa_lib COMMAND`. Bad input ends with one sentence and exit code 2."""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from ssepa_lib import commands, study_commands
from ssepa_lib.errors import UserError, explain_failure, nearest

COMMANDS: dict[str, Callable[..., int | None]] = {
    "workbook": study_commands.workbook,
    "lesson": commands.lesson,
    "train": commands.train,
    "evaluate": commands.evaluate,
    "predict": commands.predict,
    "pseudo-labels": commands.pseudo_labels,
    "submission": commands.submission,
    "data": commands.data,
    "recipe": commands.recipe,
    "study": study_commands.study,
    "haaf": study_commands.haaf,
    "readings": study_commands.readings,
    "tables": study_commands.tables,
    "bench": study_commands.bench,
    "gpu": study_commands.gpu,
    "pretrain": study_commands.pretrain,
}
PROGRAM = "python -m ssepa_lib"
EXIT_CODES = {
    0: "success",
    1: "a notebook failed, or data is missing",
    2: "the input was wrong, the disk is full, memory is exhausted, or something long was not confirmed; one "
    "sentence says what to do",
    130: "stopped by Ctrl-C; the same command resumes",
    141: "nobody reads the output any more; the same command resumes",
    143: "stopped by the system or a job scheduler; the same command resumes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn bad input into one line on standard error and exit code 2."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(_overview())
            return 0
        if name not in COMMANDS:
            raise UserError(f"there is no command {name}; {nearest(name, list(COMMANDS))}")
        code = parse(name, rest)() or 0
        sys.stdout.flush()  # here, where a closed pipe can still be answered
        return code
    except UserError as error:
        return _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _end("stopped; run the same command again to resume", 130)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # nothing more is written there, on leaving either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _end("stopped, because nobody reads the output; run the same command again to resume", 141)
    except SystemExit as end:
        if end.code == 143:
            _end("stopped by the system; run the same command again to resume", 143)
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        reason = explain_failure(error)
        if reason is None and isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}; correct that path, or what is there."
        if reason is None:
            raise
        return _end(f"error: {reason}", 2)


def _end(message: str, code: int) -> int:
    """Print one line on standard error, if anybody reads it, and return the exit code."""
    line = "".join(c if c.isprintable() else " " for c in message)  # whatever a name in it holds
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
    return code


def parse(name: str, arguments: Sequence[str]) -> Callable[[], int | None]:
    """The command with its arguments, not yet called.

    Raises:
        UserError: the arguments do not fit.
        SystemExit: after help has been printed.
    """
    command = COMMANDS[name]

    @functools.wraps(command)
    def bound(*args, **options):
        return functools.partial(command, *args, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(bound, prog=f"{PROGRAM} {name}", args=list(arguments), config=config)
    except SystemExit as end:
        if not end.code:
            if name == "workbook":
                print(study_commands.notebook_parameters())
            raise
        raise UserError(_unboxed(said.getvalue())) from None


def _unboxed(message: str) -> str:
    """The sentence in the box that tyro draws around an error; without UTF-8 the box consists of spaces."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", message).splitlines()[1:]
    inside = (line.strip("│ ") for line in lines)
    return " ".join(line for line in inside if line.strip("─-╰╯"))


def _overview() -> str:
    """The commands with the first line of their documentation."""
    lines = [f"  {name:14} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND …",
            "",
            "Weakly supervised semantic segmentation from image labels: ToCo, SS-EPA and FSR.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help shows the options of a command and an example.",
            "",
            "exit codes:",
            *(f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items()),
        ]
    )
