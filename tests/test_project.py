"""What the repository promises: one list of dependencies, clean notebooks, commands that exist, recipes that load."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml

from ssepa_lib.paths import NOTEBOOKS, PROJECT, RECIPES
from ssepa_lib.recipe import load_recipe
from ssepa_lib.workbook.runner import discover

NUMBERS = [f"{n:02d}" for n in range(8)]
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def cells(path):
    return nbformat.read(path, as_version=4).cells


def test_environment_and_pyproject_are_in_step():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    extras = pyproject["optional-dependencies"]
    assert pip == [*pyproject["dependencies"], *extras["crf"], *extras["dev"], "-e ."]
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
        "pydensecrf": "pydensecrf2",
        "lightning_fabric": "lightning-fabric",
        "lightning": "lightning-fabric",
    }
    brought = {"nbformat", "ipykernel", "nbclient"}  # by papermill and jupyterlab
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
    """Title, parameters, imports … Checks with asserts, Takeaways."""
    content = cells(path)
    assert content[0].cell_type == "markdown" and content[0].source.startswith("# ")
    code = [cell for cell in content if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", []) and "import" in code[1].source
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


def test_every_parameter_is_explained_and_used():
    for path in FILES:
        code = [cell.source for cell in cells(path) if cell.cell_type == "code"]
        for line in code[0].splitlines():
            assert re.match(r"\w+ = .+  # \w", line), f"{path.name}: {line}"
            name = line.split(" = ")[0]
            assert any(re.search(rf"\b{name}\b", source) for source in code[1:]), (
                f"{path.name}: nobody reads {name}"
            )


@pytest.mark.parametrize("document", ["README.md", "data/README.md", "results/README.md"])
def test_documents_name_things_that_exist(document):
    text = (PROJECT / document).read_text()
    targets = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b", text)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((PROJECT / document).parent / link).exists(), (
            f"{document} links to {link}, which is not there"
        )
    for module in re.findall(r"`(?:ssepa_lib/)?(\w+\.py)`", text):
        assert (PROJECT / "ssepa_lib" / module).is_file(), f"{document} names {module}"


def test_the_readme_maps_every_module():
    text = (PROJECT / "README.md").read_text()
    modules = {path.name for path in (PROJECT / "ssepa_lib").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {name for name in modules if f"`{name}`" not in text}


def test_commands_in_the_documents_are_commands():
    shown = subprocess.run(
        [sys.executable, "-m", "ssepa_lib", "--help"], cwd=PROJECT, capture_output=True, text=True
    )
    known = set(re.findall(r"\w+", shown.stdout))
    for document in ("README.md", "data/README.md", "results/README.md"):
        used = re.findall(r"python -m ssepa_lib ([a-z]+)", (PROJECT / document).read_text())
        assert set(used) <= known, document


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
