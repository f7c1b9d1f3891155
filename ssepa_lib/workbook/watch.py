"""What is kept of a run while it is trained, at equal distances from its first step to its last."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ssepa_lib.model import Network


class Watch(ABC):
    """The `watch` of `training.train`. It leaves the run as it is, and a resumed run continues its file.

    Args:
        path: the file in the run folder.
        steps: of the run.
        intervals: into how many equal parts the moments divide the run; they fall on logged steps.
        kept: what the file holds already, by step.
    """

    def __init__(self, path: Path, steps: int, intervals: int, kept: dict[int, Any]):
        self.path, self.last, self.interval, self.kept = path, steps, steps / intervals, kept

    @property
    def steps(self) -> list[int]:
        """The moments that were kept; none for a run that nobody watched."""
        return list(self.kept)

    def __call__(self, network: Network, step: int) -> None:
        """Keep this moment if one is due, and drop later ones (of a run that starts again)."""
        self.kept = {at: moment for at, moment in self.kept.items() if at < step}
        if self.kept and step // self.interval <= max(self.kept) // self.interval and step < self.last:
            return
        self.kept[step] = self.take(network)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.store()

    @abstractmethod
    def take(self, network: Network) -> Any:
        """What is kept of one moment."""

    @abstractmethod
    def store(self) -> None:
        """Write the file anew."""
