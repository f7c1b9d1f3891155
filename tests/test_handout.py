"""The versions for a class: the students' one has nothing of a solution, and no work of theirs is lost."""

import ast
import builtins
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ssepa_lib.cli import main
from ssepa_lib.errors import UserError
from ssepa_lib.paths import NOTEBOOKS
from ssepa_lib.workbook import handout
from ssepa_lib.workbook.contents import anchor
from ssepa_lib.workbook.notebooks import discover, select

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def versions(path):
    notebook = nbformat.read(path, as_version=4)
    return notebook, *(handout.version_of(notebook, version) for version in handout.VERSIONS)


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_solution_leaks_into_the_students_version(path):
    """Neither a cell, nor a line of one that stands nowhere else, nor a text that speaks of the solution."""
    notebook, student, _ = versions(path)
    kept = [cell for cell in notebook.cells if not handout.is_solution(cell)]
    shared = {line.strip() for cell in kept for line in cell.source.splitlines()}
    own = {
        line.strip()
        for cell in notebook.cells
        if handout.is_solution(cell)
        for line in cell.source.splitlines()
    }
    given = {line.strip() for cell in student.cells for line in cell.source.splitlines()}
    assert not (own - shared) & given
    assert len(student.cells) == len(kept) + 1 and student.metadata == notebook.metadata
    assert not [cell.source for cell in student.cells if re.search(r"\bsolution\b", cell.source, re.I)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_students_keep_questions_and_starters(path):
    notebook, student, solution = versions(path)
    for version in (student, solution):
        guesses = [source for source in code(version) if source.startswith("guess = ")]
        assert guesses == [source for source in code(notebook) if source.startswith("guess = ")]
        text = "\n".join(cell.source for cell in version.cells if cell.cell_type == "markdown")
        original = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        assert re.findall(r"\*\*Exercise \d", text) == re.findall(r"\*\*Exercise \d", original)
        assert "".join(code(version)).count("lesson.mark(") == "".join(code(notebook)).count("lesson.mark(")
    marked = [cell.source for cell in solution.cells if cell.source.startswith("**Solution ")]
    assert len(marked) == sum(
        "solution" in c.metadata.get("tags", []) for c in notebook.cells if c.cell_type == "code"
    )


def names(source, context):
    return {
        n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, context)
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_both_versions_are_notebooks_whose_code_compiles(path):
    """And no later cell of the students' version needs a name that only a solution would give it."""
    _, *both = versions(path)
    for version in both:
        nbformat.validate(nbformat.reads(nbformat.writes(version), as_version=4))
        known = set(dir(builtins)) | {"display"}
        for source in code(version):
            compile(source, path.name, "exec")
            imported = re.findall(r"import (.+)$", source.replace("(\n", "").replace(",\n", ", "), re.M)
            known |= set(re.findall(r"\w+", " ".join(imported)))
            bound = {
                a.arg for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Lambda) for a in n.args.args
            }
            known |= names(source, ast.Store)
            assert names(source, ast.Load) <= known | bound
        links = re.findall(r"^- \[(.+)\]\(<#(.+)>\)$", version.cells[1].source, re.M)
        assert links and all(mark == anchor(heading) for heading, mark in links)


def small_notebook():
    exercise = new_code_cell("value = 0.1 * number\nprint(value)")
    solution = new_code_cell(
        "value = 6.0 * number\nassert value == 42",
        metadata={"tags": ["solution"], "jupyter": {"source_hidden": True}},
    )
    about = new_markdown_cell("The solution multiplies by six.")
    return new_notebook(
        cells=[
            new_markdown_cell("# A question"),
            new_code_cell("number = 5  # of hands", metadata={"tags": ["parameters"]}),
            new_markdown_cell("## 1 Look (Eq. 1)"),
            new_code_cell('guess = None  # "A" or "B"'),
            new_markdown_cell("## Exercises\n\n**Exercise 1.** Multiply."),
            exercise,
            about,
            solution,
            new_markdown_cell("## Takeaways"),
            new_code_cell("assert guess is None\nprint('the end', number)"),
        ]
    )


def test_the_students_version_runs_with_parameters(tmp_path):
    import papermill

    nbformat.write(handout.version_of(small_notebook(), "student"), tmp_path / "in.ipynb")
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
    done = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"number": 7}, **options)
    printed = "".join(o.get("text", "") for cell in done.cells for o in cell.get("outputs", []))
    assert printed.split("\n")[1:-1] == ["the end 7"] and printed.startswith("0.7")


def test_the_solution_is_marked_and_the_contents_are_linked():
    made = handout.version_of(small_notebook(), "solution")
    sources = [cell.source for cell in made.cells]
    start = sources.index("**Solution 1**")
    assert sources[start + 1] == "The solution multiplies by six." and sources[start + 2].startswith(
        "value = 6"
    )
    assert "jupyter" not in made.cells[start + 2].metadata and sources.count("**Solution 1**") == 1
    assert "[1 Look (Eq. 1)](<#1-Look-(Eq.-1)>)" in sources[1]


def test_the_lesson_is_written_again_but_never_over_changes(tmp_path):
    chosen = select(discover(), ["00", "07"])
    folders = handout.write_lesson(chosen, tmp_path)
    assert [folder.name for folder in folders] == ["student", "solution"]
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(first) == 2 * 3 + 1
    handout.write_lesson(chosen, tmp_path)
    assert first == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}

    own = tmp_path / "student" / "07_memory_profiling.ipynb"
    own.write_text(own.read_text().replace("guess = None", "guess = 'B'"))
    (tmp_path / "student" / "00_start_here.ipynb").unlink()
    with pytest.raises(UserError, match=r"07_memory_profiling.ipynb has been changed .* --out"):
        handout.write_lesson(chosen, tmp_path)
    assert "'B'" in own.read_text() and not (tmp_path / "student" / "00_start_here.ipynb").exists()
    handout.write_lesson(select(discover(), ["00"]), tmp_path)
    assert (tmp_path / "student" / "00_start_here.ipynb").exists() and "'B'" in own.read_text()


def test_an_older_version_is_replaced_where_nobody_changed_it(tmp_path, monkeypatch):
    chosen = select(discover(), ["00"])
    monkeypatch.setitem(handout.VERSIONS, "student", "an older title")
    handout.write_lesson(chosen, tmp_path)
    monkeypatch.undo()
    handout.write_lesson(chosen, tmp_path)
    assert "Students' version" in (tmp_path / "student" / "00_start_here.ipynb").read_text()


def test_bad_input_of_the_command_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["lesson", "--only", "55"]) == 2 and "no notebook '55'" in capsys.readouterr().err
    assert main(["lesson", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path / 'file'} is a file, but results need a folder"
    )
    (tmp_path / "checksums.json").write_text("[]")
    assert main(["lesson", "--out", str(tmp_path)]) == 2
    assert "checksums.json does not hold the checksums of a lesson; delete it" in capsys.readouterr().err
    assert main(["lesson", "--only", "07", "--out", str(tmp_path / "class")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "class" / v) for v in ("student", "solution")]
