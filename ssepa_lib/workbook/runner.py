"""Run the notebooks headlessly: check, say what will be trained, execute in dependency order, show progress,
report.

papermill executes; what it leaves to the caller is done here and in `notebooks`.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import build_dataset
from ssepa_lib.errors import UserError
from ssepa_lib.files import FolderLock
from ssepa_lib.paths import NOTEBOOKS, RECIPES, results_root, variables_set
from ssepa_lib.training.run import RunFolder
from ssepa_lib.workbook.notebooks import (
    Notebook,
    check_parameters,
    discover,
    folder_variables,
    forget_places,
    select,
)
from ssepa_lib.workbook.own_images import own_jobs
from ssepa_lib.workbook.plan import LONG, confirm, describe, notebook_jobs, plan
from ssepa_lib.workbook.progress import PROGRESS, Display, clock
from ssepa_lib.workbook.report import UNFINISHED, headline, write_report
from ssepa_lib.workbook.study import preset_folder

KERNEL = "ssepa-workbook"


def _engine(on_cell: Callable[[int, int], None], errors: IO[bytes]) -> str:
    """Register a papermill engine that reports the cell it runs and keeps the kernels' messages off the
    terminal."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=60, **_):
            cell_start = nb_man.cell_start

            def start(cell, cell_index=None, **more):
                on_cell(cell_index, len(nb_man.nb.cells))
                return cell_start(cell, cell_index, **more)

            nb_man.cell_start = start
            client = PapermillNotebookClient(
                nb_man,
                kernel_name=kernel_name,
                startup_timeout=start_timeout,
                store_widget_state=False,  # what an explorer shows without a kernel lies in its output
            )
            # nbclient would answer an `interact` on the very socket where it awaits the cell's end, and might
            # then wait forever (jupyter/nbclient issue 312); without the answer its output becomes the cell's
            client.comm_open_handlers.clear()
            client.execute(stderr=errors)

    papermill_engines.register(KERNEL, Engine)
    return KERNEL


def _execute(notebook: Notebook, folder: Path, values: Mapping[str, Any], engine: str) -> str | None:
    """Run one notebook into a folder; None, or one line that names cell and error.

    The copy has `.unfinished` in its name until the last cell has run: a failed call does not replace a
    good copy.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    copy = folder / f"{notebook.name}{UNFINISHED}.ipynb"
    failure = None
    try:
        papermill.execute_notebook(
            notebook.path,
            copy,
            dict(values),
            engine_name=engine,
            kernel_name=KERNEL,
            language="python",
            progress_bar=False,
            cwd=notebook.path.parent,
        )
    except PapermillExecutionError as error:
        number = error.exec_count - bool(values)  # papermill puts a cell of its own before the others
        line = next(iter(error.source.splitlines()), "")
        message = " ".join(str(error.evalue).split())
        failure = f"{notebook.name}, cell In [{number}] `{line}`: {error.ename}: {message}"
    except Exception as error:  # a kernel that dies or does not start must not hide the notebooks before it
        failure = f"{notebook.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    forget_places(copy, results_root())
    if failure is None:
        copy.replace(folder / notebook.path.name)
    return failure


def _run_all(
    chosen: Sequence[Notebook], values: Mapping[str, dict], folder: Path, scratch: Path
) -> dict[str, str]:
    """Execute in order; returns the failures and the notebooks skipped because of them, name → reason."""
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(scratch / "kernels" / KERNEL)  # this very interpreter, whatever else is installed
    logging.getLogger("papermill").setLevel(logging.ERROR)
    display = Display([n.name for n in chosen], scratch / "progress.json")
    failures: dict[str, str] = {}
    kernels = os.pathsep.join(filter(None, (str(scratch), os.environ.get("JUPYTER_PATH"))))
    environment = variables_set(JUPYTER_PATH=kernels, **{PROGRESS: str(display.progress)})
    with environment, (scratch / "kernels.log").open("wb") as errors, display.show():
        engine = _engine(display.at_cell, errors)
        for notebook in chosen:
            broken = [name for name in notebook.needs if name in failures]
            if broken:
                failures[notebook.name] = f"{notebook.name}: skipped, because it needs {broken[0]}"
                display.end(notebook.name, "skipped")
                continue
            display.start(notebook.name)
            reason = _execute(notebook, folder, values[notebook.name], engine)
            display.end(notebook.name, "failed" if reason else "done")
            if reason:
                failures[notebook.name] = reason
    return failures


def _check(
    preset: str, only: Sequence[str], start: str | None, parameters: Mapping[str, Any], notebooks: Path
) -> tuple[list[Notebook], dict[str, dict[str, Any]]]:
    """Notebooks to run and what to inject into each; everything that can be refused is refused here."""
    presets = sorted(path.stem for path in (RECIPES / "data").glob("*.yaml"))
    if "preset" in parameters:
        raise UserError("the preset is no notebook parameter of -p; write --preset NAME instead.")
    if preset not in presets:
        raise UserError(f"preset '{preset}' is unknown; choose one of {', '.join(presets)}.")
    everything = discover(notebooks)
    chosen = select(everything, only, start)
    if not chosen:
        raise UserError(
            f"none of --only {' '.join(only)} comes at or after --from {start}; drop one of the two."
        )
    values = check_parameters(chosen, {**parameters, "preset": preset}, everything)
    overrides = next((given["overrides"] for given in values.values() if "overrides" in given), {})
    lenient = preset == "folder" and all("folder" in each.parameters for each in chosen)
    if not lenient:  # missing data is reported here; a notebook on a folder of yours does that itself
        build_dataset(load_recipe(f"{preset}/ssepa", overrides).data, "val")  # ssepa takes most overrides
    return chosen, values


def _absolute(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with `folder`, if it is given, as a full path: the kernels run in another directory."""
    if not parameters.get("folder"):
        return dict(parameters)
    folder = Path(str(parameters["folder"])).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; give the folder that holds your images.")
    return {**parameters, "folder": str(folder)}


def _announce(chosen: Sequence[Notebook], values: Mapping[str, dict], yes: bool) -> None:
    """Print what will be trained, and ask where that takes long."""
    jobs = []
    for each in chosen:
        parameters = each.parameters | values[each.name]
        jobs += notebook_jobs(each.trains, parameters)
        jobs += own_jobs(parameters) if any("own" in entry for entry in each.trains) else []
    if jobs:
        planned = plan(jobs)
        for run in planned:
            if run.source != "finished":
                RunFolder(run.job.folder).require(run.job.recipe)
        print(
            f"Notebooks: {', '.join(each.name for each in chosen)}\nRuns:\n{describe(planned)}\n", flush=True
        )
        confirm(planned, yes, limit=LONG)


def run_workbook(
    preset: str = "shapes",
    only: Sequence[str] = (),
    start: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    results: Path | None = None,
    notebooks: Path = NOTEBOOKS,
    yes: bool = False,
) -> int:
    """Execute notebooks and write copies, figures and an HTML report; prints where they are.

    They go to `<results>/<preset>/`, and with the parameter `run_name` to `<results>/<preset>/<run_name>/`.

    Args:
        preset: a data recipe (shapes, voc_mini, voc, …); becomes the parameter `preset` of every notebook.
            The data of voc, coco and folder lie where VOC_ROOT, COCO_ROOT and FOLDER_ROOT say.
        only, start: which notebooks (numbers or names), and the first of them.
        parameters: overrides, name → value or text; checked by name and type before anything runs.
        results: folder of everything computed; default `results_root()`.
        yes: do not ask before something long starts.

    Returns:
        0, or 1 when a notebook failed. Interrupted runs are resumed from their checkpoint by the next call.

    Raises:
        UserError: unknown preset, notebook or parameter, wrong type, broken notebook file, missing data,
            or hours of training that nobody has confirmed.
    """
    parameters = _absolute(parameters or {})
    chosen, values = _check(preset, only, start, parameters, notebooks)
    run_name = str(parameters.get("run_name", ""))
    root = (results or results_root()).resolve()
    given = [name for name in folder_variables() if os.environ.get(name)]
    places = {name: str(Path(os.environ[name]).resolve()) for name in given}
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch, variables_set(SSEPA_RESULTS=str(root), **places):
        _announce(chosen, values, yes)
        folder = preset_folder(preset, run_name)
        with FolderLock(folder / "notebooks"):
            failures = _run_all(chosen, values, folder / "notebooks", Path(scratch))
    index = write_report(root / preset, run_name)
    print(f"\n{headline(root / preset, run_name)}\n")
    taken = clock(time.time() - began)
    print(f"{len(chosen) - len(failures)} of {len(chosen)} notebooks ran in {taken} min.")
    for reason in failures.values():
        print(f"  {reason}")
    print(f"Report: {index}\nExecuted notebooks: {folder / 'notebooks'}\nFigures: {folder / 'figures'}")
    return 1 if failures else 0
