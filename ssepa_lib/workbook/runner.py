"""Run the notebooks headlessly: select, check parameters, execute in dependency order, show progress, report.

papermill executes; what it leaves to the caller is done here. It only warns about a misspelt parameter and
injects a value of any type, so names and types are checked against the notebook's `parameters` cell before
anything runs. It has no notion of dependence, so each notebook names what it needs in its metadata:
`{"ssepa": {"needs": [...]}}`.
"""

import ast
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ssepa_lib.compose import load_recipe
from ssepa_lib.data import DATASETS, build_dataset
from ssepa_lib.errors import UserError
from ssepa_lib.paths import NOTEBOOKS, RECIPES, results_root
from ssepa_lib.workbook.progress import PROGRESS, Display, clock
from ssepa_lib.workbook.report import UNFINISHED, headline, write_report
from ssepa_lib.workbook.study import preset_folder

KERNEL = "ssepa-workbook"


@dataclass(frozen=True)
class Notebook:
    """One `NN_topic.ipynb`: its defaults (name → literal) and the names of the notebooks it needs."""

    path: Path
    needs: tuple[str, ...]
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        """`NN_topic`."""
        return self.path.stem


def read_parameters(path: Path, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Defaults of the one cell tagged `parameters`, name → literal.

    Raises:
        UserError: there is not exactly one such cell, or it holds more than assignments of literals.
    """
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise UserError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; tag exactly one.")
    defaults = {}
    for statement in ast.parse(tagged[0]["source"]).body:
        try:
            (target,) = statement.targets
            defaults[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            line = statement.lineno
            raise UserError(
                f"{path.name}: line {line} of its parameters cell is not `name = literal`."
            ) from error
    return defaults


def discover(folder: Path = NOTEBOOKS) -> list[Notebook]:
    """All notebooks `NN_topic.ipynb` of a folder in the order in which they can run."""
    import nbformat

    waiting = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        try:
            content = nbformat.read(path, as_version=4)
        except (ValueError, nbformat.ValidationError) as error:
            raise UserError(f"{path} is not a notebook ({error}); restore it with git checkout.") from error
        needs = content.metadata.get("ssepa", {}).get("needs", [])
        waiting.append(Notebook(path, tuple(needs), read_parameters(path, content.cells)))
    if not waiting:
        raise UserError(f"no notebook NN_topic.ipynb in {folder}; run from a complete checkout.")
    ordered: list[Notebook] = []
    while waiting:
        done = {n.name for n in ordered}
        ready = next((n for n in waiting if done.issuperset(n.needs)), None)
        if ready is None:
            stuck = ", ".join(n.name for n in waiting)
            raise UserError(
                f"notebooks {stuck} need a missing one or each other; correct their 'needs' metadata."
            )
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def select(
    notebooks: Sequence[Notebook], only: Sequence[str] = (), start: str | None = None
) -> list[Notebook]:
    """Notebooks named in `only` (number or name; empty: all), from `start` on."""

    def position(key: str) -> int:
        for i, notebook in enumerate(notebooks):
            if key in (notebook.name, notebook.name.split("_")[0], notebook.path.name):
                return i
        raise UserError(f"there is no notebook '{key}'; choose among {', '.join(n.name for n in notebooks)}.")

    wanted = {position(key) for key in only} or set(range(len(notebooks)))
    first = 0 if start is None else position(start)
    return [notebook for i, notebook in enumerate(notebooks) if i in wanted and i >= first]


def coerce(name: str, value: Any, default: Any) -> Any:
    """`value` (text from a command line, or a Python value) as the type of `default`.

    Raises:
        UserError: it is not one.
    """
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind in (list, tuple):
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        return [coerce(f"an item of {name}", item, default[0]) if default else item for item in value]
    if type(value) is not kind:
        raise UserError(
            f"parameter {name} is {value!r}, but it must be of type {kind.__name__} (default {default!r})."
        )
    return value


def check_parameters(notebooks: Sequence[Notebook], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What to inject into each notebook, name of the notebook → its parameters.

    Raises:
        UserError: a name that no selected notebook knows, or a wrong type.
    """
    known = sorted({name for notebook in notebooks for name in notebook.parameters})
    for name in given:
        if name not in known:
            choices = ", ".join(known)
            raise UserError(f"no selected notebook has a parameter '{name}'; choose among {choices}.")
    values = {}
    for notebook in notebooks:
        defaults = notebook.parameters
        names = [name for name in given if name in defaults]
        values[notebook.name] = {name: coerce(name, given[name], defaults[name]) for name in names}
    return values


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables that the kernels inherit, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
        return f"{notebook.name}, cell In [{number}] `{line}`: {error.ename}: {message}"
    except Exception as error:  # a kernel that dies or does not start must not hide the notebooks before it
        return f"{notebook.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    copy.replace(folder / notebook.path.name)
    return None


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
    environment = _environment(JUPYTER_PATH=kernels, **{PROGRESS: str(display.progress)})
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


def _plan(
    preset: str, only: Sequence[str], start: str | None, parameters: Mapping[str, Any], notebooks: Path
) -> tuple[list[Notebook], dict[str, dict[str, Any]]]:
    """Notebooks to run and what to inject into each; everything that can be refused is refused here."""
    presets = sorted(path.stem for path in (RECIPES / "data").glob("*.yaml"))
    if "preset" in parameters:
        raise UserError("the preset is no notebook parameter of -p; write --preset NAME instead.")
    if preset not in presets:
        raise UserError(f"preset '{preset}' is unknown; choose one of {', '.join(presets)}.")
    chosen = select(discover(notebooks), only, start)
    if not chosen:
        raise UserError(
            f"none of --only {' '.join(only)} comes at or after --from {start}; drop one of the two."
        )
    values = check_parameters(chosen, {**parameters, "preset": preset})
    build_dataset(load_recipe(f"{preset}/toco").data, "val")  # missing data is reported before anything runs
    return chosen, values


def run_workbook(
    preset: str = "shapes",
    only: Sequence[str] = (),
    start: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    results: Path | None = None,
    notebooks: Path = NOTEBOOKS,
) -> int:
    """Execute notebooks and write copies, figures and an HTML report; prints where they are.

    They go to `<results>/<preset>/`, and with the parameter `run_name` to `<results>/<preset>/<run_name>/`.

    Args:
        preset: a data recipe (shapes, voc_mini, voc, …); becomes the parameter `preset` of every notebook.
            The data of voc, coco and folder lie where VOC_ROOT, COCO_ROOT and FOLDER_ROOT say.
        only, start: which notebooks (numbers or names), and the first of them.
        parameters: overrides, name → value or text; checked by name and type before anything runs.
        results: folder of everything computed; default `results_root()`.

    Returns:
        0, or 1 when a notebook failed. Interrupted runs are resumed from their checkpoint by the next call.

    Raises:
        UserError: unknown preset, notebook or parameter, wrong type, broken notebook file, missing data.
    """
    parameters = parameters or {}
    chosen, values = _plan(preset, only, start, parameters, notebooks)
    run_name = str(parameters.get("run_name", ""))
    root = (results or results_root()).resolve()
    variables = ["SSEPA_WEIGHTS", *(dataset.root_variable for dataset in DATASETS.values())]
    places = {name: str(Path(os.environ[name]).resolve()) for name in variables if os.environ.get(name)}
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch, _environment(SSEPA_RESULTS=str(root), **places):
        folder = preset_folder(preset, run_name)
        (folder / "notebooks").mkdir(exist_ok=True)
        failures = _run_all(chosen, values, folder / "notebooks", Path(scratch))
    index = write_report(root / preset, run_name)
    print(f"\n{headline(root / preset, run_name)}\n")
    taken = clock(time.time() - began)
    print(f"{len(chosen) - len(failures)} of {len(chosen)} notebooks ran in {taken} min.")
    for reason in failures.values():
        print(f"  {reason}")
    print(f"Report: {index}\nExecuted notebooks: {folder / 'notebooks'}\nFigures: {folder / 'figures'}")
    return 1 if failures else 0
