"""The first code cell of every notebook, which fetches and installs the project on Google Colab.

`python -m ssepa_lib.workbook.colab` writes the cell into all notebooks, with the address of the project that
`pyproject.toml` gives as `Repository`; a test keeps the cells alike. On Colab this file is imported before
anything is installed, so its first lines import only the standard library and modules that do the same.
"""

import subprocess
import sys
import tomllib
from typing import Any

from ssepa_lib.errors import UserError
from ssepa_lib.paths import NOTEBOOKS, PROJECT

TAG = "colab"
_CELL = """\
# On Google Colab, this cell fetches and installs the project; anywhere else it does nothing.
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab"):
    import subprocess
    import sys

    repository, folder = "REPOSITORY", "/content/ssepa-workbook"
    assert repository, "Write the address of the project, as `git clone` takes it, into the line above."
    clone = ["git", "clone", "--quiet", "--depth=1", repository, folder]
    done = subprocess.run(clone, capture_output=True, text=True)
    assert done.returncode == 0 or "already exists" in done.stderr, done.stderr
    sys.path.insert(0, folder)
    from ssepa_lib.workbook import colab

    colab.prepare(folder)"""


def cell() -> str:
    """The source of the cell; without an address in `pyproject.toml`, it asks the reader for one."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return _CELL.replace("REPOSITORY", project.get("urls", {}).get("Repository", ""))


def prepare(folder: str) -> None:
    """Install the project and what it needs on Colab, and say in a sentence whether there is a GPU.

    The dense CRF is left out, because it has to be compiled; everything else works without it.

    Args:
        folder: the clone of the project.

    Raises:
        UserError: pip has failed; the sentence has its last line.
    """
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", folder]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"pip could not install {folder} ({said}); run this cell again, or restart the session."
        )
    import torch

    if torch.cuda.is_available():
        print(f"The project is installed, and the GPU is a {torch.cuda.get_device_name()}.")
    else:
        print(
            "The project is installed. There is no GPU, and the built-in data need none; "
            "'Runtime', 'Change runtime type' offers one."
        )


def write_cell(cells: list[Any]) -> None:
    """Put the cell in front of the first code cell of a notebook, or bring it up to date."""
    from nbformat.v4 import new_code_cell

    own = next((each for each in cells if TAG in each.metadata.get("tags", [])), None)
    if own is None:
        metadata = {"jupyter": {"source_hidden": True}, "tags": [TAG]}
        first = next(i for i, each in enumerate(cells) if each.cell_type == "code")
        cells.insert(first, own := new_code_cell(id=TAG, metadata=metadata))
    own.source = cell()


if __name__ == "__main__":
    import nbformat

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        content = nbformat.read(path, as_version=4)
        write_cell(content.cells)
        nbformat.write(content, path)
