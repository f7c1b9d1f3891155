"""The one exception a user is meant to read."""

import difflib
import errno

_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you may write to, or ask for the right to",
    errno.EPERM: "choose a folder that you may write to, or ask for the right to",
    errno.EEXIST: "a file of that name is in the way; choose another folder",
    errno.ENOTDIR: "a file is in the way of that folder; choose another one",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
    errno.EIO: "check that disk, and run the same command again",
    errno.ESTALE: "see whether the network drive is there, and run the same command again",
    errno.EMFILE: "raise the number of open files (ulimit -n) and run the same command again",
}
_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory")


class UserError(Exception):
    """Bad input: one sentence that names the file or setting and the remedy; the command line ends with 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence, without the stack trace (a hook of IPython)."""
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


def explain_failure(error: BaseException) -> str | None:
    """One sentence for a failure of the machine: of a disk, of memory, or of the right to write.

    None for every other error, which is then a mistake in the program.
    """
    if isinstance(error, MemoryError) or any(part in str(error) for part in _MEMORY):
        return (
            "memory is exhausted; for a training, lower data.batch or data.workers or set "
            "train.checkpointing, for an evaluation, lower eval.batch or the size, or close other programs; "
            "then run the same command again."
        )
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{error.filename or 'a file'} cannot be written ({error.strerror}); {_REMEDIES[error.errno]}."
    return None
