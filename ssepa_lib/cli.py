"""The command line: `python -m ssepa_lib COMMAND`. Bad input ends with one sentence and exit code 2."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from ssepa_lib import commands, study_commands
from ssepa_lib.errors import UserError, nearest

COMMANDS: dict[str, Callable[..., int | None]] = {
    "workbook": study_commands.workbook,
    "lesson": study_commands.lesson,
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
    2: "the input was wrong, or something long was not confirmed; one sentence says what to do",
    130: "stopped by Ctrl-C; the same command resumes",
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
        return parse(name, rest)() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130


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
