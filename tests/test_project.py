"""What the repository promises: dependencies, notebooks, documents, recipes, and the rules of the house."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import types

import nbformat
import pytest
import yaml

from ssepa_lib import private_api
from ssepa_lib.compose import load_recipe
from ssepa_lib.paths import NOTEBOOKS, PROJECT, RECIPES
from ssepa_lib.workbook import colab
from ssepa_lib.workbook.notebooks import discover

NUMBERS = [f"{n:02d}" for n in range(9)]
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
DOCUMENTS = [*PROJECT.glob("*.md"), *(PROJECT / folder / "README.md" for folder in ("data", "results"))]
DOCUMENTS.append(NOTEBOOKS / "TEACHING.md")
pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def cells(path):
    return nbformat.read(path, as_version=4).cells


def test_the_conda_environment_installs_the_project():
    """The dense CRF is not in it: a failing build must not undo the environment."""
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-e .[dev]"]
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    assert python.removeprefix("python=") in ("3.11", "3.12")


def test_what_the_library_imports_is_what_it_declares():
    files = [*(PROJECT / "ssepa_lib").rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in files]
    modules = {n.name for t in trees for i in ast.walk(t) if isinstance(i, ast.Import) for n in i.names}
    modules |= {i.module for t in trees for i in ast.walk(t) if isinstance(i, ast.ImportFrom)}
    roots = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"ssepa_lib"}
    distribution = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "pydensecrf": "pydensecrf2",
        "lightning_fabric": "lightning-fabric",
        "lightning": "lightning-fabric",
    }
    brought = {
        "nbformat",
        "ipykernel",
        "nbclient",
        "IPython",
        "traitlets",
        "pygments",
    }  # by papermill and jupyterlab
    needed = {distribution.get(root, root) for root in roots} - brought
    listed = [*pyproject["dependencies"], *pyproject["optional-dependencies"]["crf"]]
    assert needed <= {re.match(r"[\w-]+", line)[0] for line in listed}


def test_notebooks_are_complete_and_can_be_ordered():
    names = [notebook.name for notebook in discover()]
    assert sorted(names) == names, "the numbers are the order in which they run"
    assert [name[:2] for name in names][: len(NUMBERS)] == NUMBERS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebook_is_stripped(path):
    for cell in cells(path):
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebook_has_the_house_order(path):
    """Title, the cell for Colab, parameters, imports … Checks with asserts, Takeaways."""
    content = cells(path)
    assert content[0].cell_type == "markdown" and content[0].source.startswith("# ")
    code = [cell for cell in content if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in code[:2]] == [[colab.TAG], ["parameters"]]
    assert "import" in code[2].source
    text = "\n".join(cell.source for cell in content if cell.cell_type == "markdown")
    headings = re.findall(r"^## .*$", text, re.M)
    assert headings[-2:] == ["## Checks", "## Takeaways"]
    after = content[next(i for i, c in enumerate(content) if c.source.startswith("## Checks")) :]
    assert any("assert" in cell.source for cell in after if cell.cell_type == "code")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_notebook_cells_are_short_and_define_nothing(path):
    code = [cell.source for cell in cells(path) if cell.cell_type == "code"]
    lengths = [len(source.splitlines()) for source in code]
    assert max(lengths) <= 25 and sum(length <= 10 for length in lengths) > len(lengths) / 2
    for source in code:
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.ClassDef, ast.FunctionDef}, "definitions belong in the library"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_saved_figure_prints_no_path(path):
    for cell in cells(path):
        last = cell.source.splitlines()[-1] if cell.source else ""
        assert not last.startswith("figures.save_figure(") or last.endswith(";"), f"a semicolon after {last}"


def test_every_parameter_is_explained_and_used():
    for path in FILES:
        code = [cell.source for cell in cells(path) if cell.cell_type == "code"]
        for line in code[1].splitlines():
            assert re.match(r"\w+ = .+  # \w", line), f"{path.name}: {line}"
            name = line.split(" = ")[0]
            assert any(re.search(rf"\b{name}\b", source) for source in code[2:]), (
                f"{path.name}: nobody reads {name}"
            )


# The second edition: predictions, exercises, explorers with a static twin, code that is built and compared.

SECOND_EDITION = {  # number of a notebook → predictions it has at least
    "00": 2,
    "01": 2,
    "02": 3,
    "03": 2,
    "04": 3,
    "05": 2,
    "06": 2,
    "07": 2,
    "08": 2,
}
LESSONS = [path for path in FILES if path.stem[:2] in SECOND_EDITION]
EXPLORER = re.compile(r"\bexplorers\.(\w+)\(")


def sections(path):
    """The cells of a notebook below each heading `##`; what stands before the first one comes first."""
    found = [[]]
    for cell in cells(path):
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            found.append([])
        found[-1].append(cell)
    return found


def heading(section):
    return section[0].source.splitlines()[0] if section else ""


def test_every_lesson_is_there():
    assert [path.stem[:2] for path in LESSONS] == sorted(SECOND_EDITION)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_opens_with_a_belief_and_one_picture(path):
    titles = [heading(section) for section in sections(path)]
    assert titles[1:3] == ["## What you may believe", "## The one picture"]
    assert titles[-3:] == ["## Exercises", "## Checks", "## Takeaways"]
    picture = "\n".join(cell.source for cell in sections(path)[2] if cell.cell_type == "code")
    assert "save_figure(" in picture, "the one picture is saved"
    assert "Afterwards you can" in " ".join(cells(path)[0].source.split())


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_asks_before_it_shows(path):
    """Every prediction has options, an empty guess, and an answer that is computed."""
    code = [cell.source for cell in cells(path) if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    asked = len(re.findall(r"\*\*Predict \d", text))
    guesses = [source for source in code if re.match(r"guess = ", source)]
    reveals = [
        call for source in code for call in re.findall(r"lesson\.reveal\(\s*([^,]+),\s*([^,]+)", source)
    ]
    assert asked == len(guesses) == len(reveals) >= SECOND_EDITION[path.stem[:2]]
    assert all(re.match(r"guess = None  # \S", source) for source in guesses), "no guess is stored in git"
    assert all(guess == "guess" and not answer.strip().startswith(('"', "'")) for guess, answer in reveals)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_has_two_exercises_with_a_folded_solution(path):
    (exercises,) = (section for section in sections(path) if heading(section) == "## Exercises")
    text = "\n".join(cell.source for cell in exercises if cell.cell_type == "markdown")
    assert re.findall(r"\*\*Exercise (\d)", text) == ["1", "2"]
    assert sum("lesson.mark(" in cell.source for cell in exercises) == 2
    solutions = [cell for cell in cells(path) if "solution" in cell.metadata.get("tags", [])]
    assert len(solutions) == 2 and all(cell in exercises for cell in solutions)
    for cell in solutions:
        assert cell.metadata["jupyter"]["source_hidden"] and "assert " in cell.source


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_an_explorer_is_followed_by_its_saved_twin(path):
    for section in sections(path):
        code = [cell.source for cell in section if cell.cell_type == "code"]
        for i, source in enumerate(code):
            if EXPLORER.search(source):
                assert any("save_figure(" in later for later in code[i + 1 :]), (
                    f"{heading(section)}: {source}"
                )


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_what_is_built_is_compared_with_the_library(path):
    for section in sections(path):
        text = "\n".join(cell.source for cell in section if cell.cell_type == "markdown")
        if "**Build" in text:
            code = "\n".join(cell.source for cell in section if cell.cell_type == "code")
            assert re.search(r"\b(allclose|assert_close)\(", code), heading(section)


def test_every_recipe_loads():
    names = {
        kind: [path.stem for path in (RECIPES / kind).glob("*.yaml")]
        for kind in ("data", "method", "backbone")
    }
    for data in names["data"]:
        for method in names["method"]:
            load_recipe(f"{data}/{method}")
    for backbone in names["backbone"]:
        load_recipe(f"voc/ssepa/{backbone}")


def test_nothing_is_committed_that_should_be_computed():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = PROJECT / name
        assert path.suffix not in (".pt", ".pth", ".pkl", ".npy"), name
        assert not path.is_file() or path.stat().st_size <= 4 * 2**20, f"{name} is larger than 4 MiB"


# The rules of the house: layers, sizes, docstrings, words, formatting.

LIBRARY = PROJECT / "ssepa_lib"
MODULES = sorted(LIBRARY.rglob("*.py"))
LAYERS = ("data", "model", "labels", "methods", "training", "evaluation", "workbook", "benchmarks")
COMMANDS = {"__main__", "cli", "commands", "study_commands"}  # above every folder; other files are the ground
GLOSSARY = {
    r"(?<!one )\bpictures?\b": "image",
    r"\bmirror(ed|s)?\b": "flip",
    r"\bprocessors?\b": "CPU",
    r"\ba training\b": "a run",
    r"\bgoes on\b|\bgo on\b": "resume",
    r"\bdata sets?\b": "dataset",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def layer(parts):
    """Place of a module below ssepa_lib: 0 the ground, then the folders, then the commands."""
    if parts and parts[0] in LAYERS:
        return 1 + LAYERS.index(parts[0])
    return 1 + len(LAYERS) if parts and parts[0] in COMMANDS else 0


def imported(tree):
    """Every module of the library that a file imports, as parts of its name below ssepa_lib."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "ssepa_lib":
            names = [f"ssepa_lib.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            root, *parts = name.split(".")
            if root == "ssepa_lib" and parts:
                yield parts


def test_a_folder_imports_only_from_earlier_ones():
    wrong = []
    for path in MODULES:
        own = layer(path.relative_to(LIBRARY).with_suffix("").parts)
        for parts in imported(ast.parse(path.read_text())):
            if layer(parts) > own:
                wrong.append(f"{path.relative_to(LIBRARY)} imports {'.'.join(parts)}")
    assert not wrong


def test_files_and_functions_are_short():
    long = []
    for path in MODULES:
        text, name = path.read_text(), path.relative_to(LIBRARY)
        if text.count("\n") > 350:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= 50:
                long.append(f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


def public(tree):
    """Public functions and classes of a module, and methods of classes without a base."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node, node.name
            inherits = isinstance(node, ast.ClassDef) and node.bases
            for part in node.body if isinstance(node, ast.ClassDef) and not inherits else []:
                if isinstance(part, FUNCTIONS) and not part.name.startswith("_"):
                    yield part, f"{node.name}.{part.name}"


def test_everything_public_has_a_docstring():
    bare = []
    for path in MODULES:
        tree, name = ast.parse(path.read_text()), path.relative_to(LIBRARY)
        if path.name != "__init__.py" or path.parent != LIBRARY:
            bare += [] if ast.get_docstring(tree) else [str(name)]
        bare += [f"{name}: {what}" for node, what in public(tree) if not ast.get_docstring(node)]
    assert not bare


def test_the_formatter_has_no_exceptions():
    files = [*MODULES, *(PROJECT / "tests").glob("*.py"), *FILES]
    marks = ("# fmt" + ": skip", "# fmt" + ": off", "# no" + "qa")
    assert not [f"{path.name}: {mark}" for path in files for mark in marks if mark in path.read_text()]
    for rule in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *rule, "ssepa_lib", "tests", "notebooks"]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def prose(path):
    """What people read of a file: Markdown, docstrings, or the comments of a recipe."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        return "\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    if path.suffix == ".yaml":
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    if path.suffix == ".py":
        documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
        return "\n".join(filter(None, map(ast.get_docstring, nodes)))
    return text


def test_texts_use_the_words_of_the_glossary():
    found = []
    for path in [*DOCUMENTS, *FILES, *MODULES, *RECIPES.rglob("*.yaml")]:
        text = prose(path)
        for pattern, word in GLOSSARY.items():
            hits = re.findall(rf"(?i)(?:\w+ )?(?:{pattern})", text)
            if hits:
                found.append(f"{path.relative_to(PROJECT)}: write '{word}' ({len(hits)} times)")
    assert not found


def test_private_interfaces_are_listed_and_still_there():
    """torch and timm may drop what is private; the message names the versions that are known to have it."""
    supported = "; ".join(d for d in pyproject["dependencies"] if d.startswith(("torch>", "timm>")))
    for owner, names in private_api.NAMES.items():
        module, _, attribute = owner.rpartition(".")
        try:
            holder = importlib.import_module(owner)
        except ImportError:
            holder = getattr(importlib.import_module(module), attribute)
        for name in names:
            assert hasattr(holder, name) or name in getattr(holder, "__annotations__", {}), (
                f"{owner}.{name} has disappeared; ssepa_lib/private_api.py was written for {supported}"
            )
    used = [name for names in private_api.NAMES.values() for name in names]
    for path in MODULES:
        if path.name != "private_api.py":
            assert not [name for name in used if f".{name}" in path.read_text()], path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_of_the_library_in_notebooks_exist(path):
    """Every `module.function` and `Class.method` of the library that a cell names can be found."""
    sources = [cell.source for cell in cells(path) if cell.cell_type == "code"]
    tree = ast.parse("\n".join(sources))
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssepa_lib"):
            module = importlib.import_module(node.module)
            for each in node.names:
                if not hasattr(module, each.name):
                    importlib.import_module(f"{node.module}.{each.name}")
                known[each.asname or each.name] = getattr(module, each.name)
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            owner = known[node.value.id]
            if isinstance(owner, type | types.ModuleType) and not hasattr(owner, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    assert not missing
