"""The one exception a user is meant to read."""

import difflib


class UserError(Exception):
    """Bad input: one sentence that names the file or setting and the remedy; the command line ends with 2."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in the place of a stack trace: the sentence."""
        return [f"{type(self).__name__}: {self}"]


def require_index(name: str, value: int, size: int) -> None:
    """Refuse an index outside 0..size-1.

    Raises:
        UserError: it is outside.
    """
    if not 0 <= value < size:
        raise UserError(f"{name} {value} does not exist; choose 0..{size - 1}.")


def nearest(name: str, known: list[str]) -> str:
    """A hint at the known name that looks most like the given one."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
