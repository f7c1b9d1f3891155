"""From a loss to weights, and the folder they are kept in.

In comes a recipe; out comes a run folder with its recipe, history, checkpoint and final weights. `train`
trains or resumes a run, `RunFolder` is the one owner of its files, `load_run` gives the trained network back.
"""

from ssepa_lib.training.run import RunFolder, find_finished, load_run
from ssepa_lib.training.trainer import Trainer, train

__all__ = ["RunFolder", "Trainer", "find_finished", "load_run", "train"]
