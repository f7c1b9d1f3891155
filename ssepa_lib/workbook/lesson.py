"""What a notebook teaches with: predictions, exercises, the library's own source, words and equations.

Every function returns something that Jupyter shows, or axes. Whatever comes from outside is escaped, so that
a class may have any name.
"""

import ast
import html
import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import HTML, Code
from matplotlib.axes import Axes
from torch import Tensor

from ssepa_lib.device import describe_device, resolve_device
from ssepa_lib.errors import UserError, nearest
from ssepa_lib.evaluation.attention import patch_distances
from ssepa_lib.evaluation.maps import PARTS, mass_by_part
from ssepa_lib.labels.crf import crf_available
from ssepa_lib.paths import PACKAGE
from ssepa_lib.workbook.contents import links
from ssepa_lib.workbook.terms import EQUATIONS, GLOSSARY, Equation

PAGE = 25  # lines of source that a reader takes in at once
COLOURS = {"right": "#1b7837", "wrong": "#b35806", "open": "#4a4a4a"}
NEEDED = {
    "torch": "tensors and training",
    "timm": "the vision transformers",
    "anywidget": "explorers that can be read back; without a kernel they can still be looked at",
}  # package → what it is for
NO_MASKS = "This dataset has no masks, so there is nothing to measure here."


def _box(state: str, text: str) -> HTML:
    """A sentence with a coloured bar at its left; the text is escaped."""
    style = f"border-left: 4px solid {COLOURS[state]}; padding: 0.3em 0.8em; margin: 0.3em 0"
    return HTML(f'<div style="{style}">{html.escape(text)}</div>')


def _table(head: list[str], rows: list[list[str | HTML]]) -> str:
    """An HTML table of escaped texts, and of HTML that is taken as it is."""
    style = ' style="text-align: left; vertical-align: top"'
    texts = [[c.data if isinstance(c, HTML) else html.escape(c) for c in row] for row in rows]
    lines = [f"<tr>{''.join(f'<th{style}>{html.escape(c)}</th>' for c in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td{style}>{c}</td>' for c in row)}</tr>" for row in texts]
    return f"<table>{''.join(lines)}</table>"


def source(thing: Any) -> HTML:
    """The library's own source of a function, method or class, highlighted, without its docstring.

    Args:
        thing: something written in this library.

    Raises:
        UserError: it is not, or it is longer than a page of 25 lines.
    """
    thing = thing.fget if isinstance(thing, property) else thing
    name = getattr(thing, "__qualname__", type(thing).__name__)
    try:
        lines, first = inspect.getsourcelines(thing)
        file = PACKAGE.name / Path(inspect.getsourcefile(thing)).resolve().relative_to(PACKAGE)
    except (TypeError, OSError, ValueError) as error:
        raise UserError(f"'{name}' is not written in this library, so its source cannot be shown.") from error
    text = _without_docstrings(textwrap.dedent("".join(lines)))
    count = len(text.splitlines())
    if count > PAGE:
        raise UserError(f"{name} has {count} lines; show one method of it, or a part of up to {PAGE} lines.")
    caption = f"{file.as_posix()}, line {first}: {name}, {count} lines without its docstring"
    code = Code(text, language="python")._repr_html_()
    return HTML(f"<div><small>{html.escape(caption)}</small>{code}</div>")


def _without_docstrings(text: str) -> str:
    """Source without the docstrings in it."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            string = node.body[0]
            lines[string.lineno - 1 : string.end_lineno] = [None] * (string.end_lineno - string.lineno + 1)
    kept = [line for line in lines if line is not None]
    blank = [not line.strip() for line in kept]
    opens = [i > 0 and kept[i - 1].rstrip().endswith(":") for i in range(len(kept))]
    return "\n".join(line for line, b, o in zip(kept, blank, opens, strict=True) if not (b and o))


def check_machine(device: str) -> HTML:
    """What the workbook found on this machine, and what is missing without it.

    Args:
        device: auto, cpu or cuda.
    """
    crf = "installed" if crf_available() else "not installed"
    rows = [
        ["device", describe_device(resolve_device(device)), "a GPU is faster; the CPU does everything"],
        *([name, version(name), need] for name, need in NEEDED.items()),
        ["dense CRF", crf, "without it the columns 'CRF' stay empty; everything else works"],
    ]
    return HTML(_table(["what", "found here", "what it is for"], rows))


def reveal(guess: str | None, answer: str | None, why: str = "") -> HTML:
    """The computed answer to a prediction, beside the reader's own.

    Args:
        guess: a letter, or None for a reader who has not guessed.
        answer: the letter that this run's numbers give; None: there are no masks to measure it with.
        why: a sentence with these numbers.
    """
    if answer is None:
        return _box("open", NO_MASKS)
    rest = f"{answer}. {why}".strip()
    if guess is None:
        return _box("open", f"You have not guessed yet. The answer is {rest}")
    if not (isinstance(guess, str) and len(guess.strip()) == 1 and guess.strip().isalpha()):
        hint = f'Your guess is {guess!r}; write one letter in quotation marks, such as "A".'
        return _box("open", f"{hint} The answer is {rest}")
    if guess.strip().upper() == answer:
        return _box("right", f"Right, it is {rest}")
    return _box("wrong", f"You guessed {guess.strip().upper()}; it is {rest}")


def seen(text: str) -> HTML:
    """A sentence with what a figure or table above it has shown; its numbers are computed."""
    return _box("open", text)


def mark(value: Any, target: float, unit: str = "", *, lower: bool = False) -> HTML:
    """How far an exercise is from its target.

    Args:
        value: the reader's number.
        target: what is asked for.
        unit: written behind both, such as " points".
        lower: the target is an upper limit.
    """
    number = isinstance(value, (int, float, np.number)) or (isinstance(value, Tensor) and value.numel() == 1)
    if not number or isinstance(value, bool) or math.isnan(float(value)):
        shown = f"a {type(value).__name__}" if not number else repr(value)
        return _box("open", f"The exercise expects one number, but got {shown}.")
    distance = float(value) - target if lower else target - float(value)
    measured = f"Your value is {float(value):.3g}{unit}, the target {target:.3g}{unit}"
    if distance <= 0:
        return _box("right", f"{measured}: reached.")
    return _box("wrong", f"{measured}: {distance:.2g}{unit} to go.")


def landmarks(cam: Tensor, *, mask: Tensor | None = None, parts: Tensor | None = None) -> dict[str, int]:
    """Three patches that a lesson follows: Head, Body and Ground.

    Head is the patch that shows most of the head and, of several, has the highest map; Body the patch of
    the body that is farthest from Head; Ground the patch that is farthest from the object, not at the edge
    of the image if there is another. Without parts, Head is the peak of the map inside the object and the
    whole object counts as body. Without a mask as well, the patches above half of the peak stand in for the
    object.

    Args:
        cam: map [h, w] of the shown class on the grid of patches.
        mask: integer [H, W], above 0 on the object.
        parts: integer [H, W], 0 background, 1 head, 2 body.

    Returns:
        Name → index of the patch, 0..h·w-1, row by row.
    """
    cam = cam.detach().float().cpu()
    if mask is None and parts is None:
        inside = (cam > cam.min() + 0.5 * (cam.max() - cam.min())).float()
    else:
        inside = _share((parts if mask is None else mask) > 0, cam)
    known = parts is not None and bool((parts == 1).any())
    tips = _share(parts == 1, cam) if known else (inside >= 0.75 * inside.max()).float()
    bodies = _share(parts == 2, cam) if parts is not None else inside
    head = int((tips + 1e-3 * _unit(cam)).argmax())
    apart = patch_distances(tuple(cam.shape), (1, 1))  # [N, N]
    body = int(torch.where(bodies.flatten() >= 0.9 * bodies.max(), apart[head], -1).argmax())
    return {"Head": head, "Body": body, "Ground": _ground(inside, apart)}


def _ground(inside: Tensor, apart: Tensor) -> int:
    """The patch of the background with the largest distance to the object, off the edge if possible."""
    empty = (inside <= inside.min()).flatten()
    edge = F.pad(torch.zeros(max(0, inside.shape[0] - 2), max(0, inside.shape[1] - 2)), (1, 1, 1, 1), value=1)
    inner = empty & (edge[: inside.shape[0], : inside.shape[1]].flatten() == 0)
    if empty.all():
        return int((inner if inner.any() else empty).float().argmax())
    far = apart[:, ~empty].min(1).values
    return int(torch.where(inner if inner.any() else empty, far, -1).argmax())


def patch_parts(parts: Tensor | None, grid: tuple[int, int]) -> list[str]:
    """What most of each patch shows: head, body or ground; "unknown" without a mask.

    Args:
        parts: integer [H, W], 1 head, 2 body, else ground.
        grid: h, w.

    Returns:
        h·w names, row by row.
    """
    if parts is None:
        return ["unknown"] * (grid[0] * grid[1])
    cells = torch.empty(grid)
    shares = torch.stack([_share(parts == part, cells) for part in (1, 2)])  # [2, h, w]
    shares = torch.cat([shares, 1 - shares.sum(0, keepdim=True)])
    return [PARTS[i] for i in shares.argmax(0).flatten().tolist()]


def part_shares(values: Tensor, parts: Tensor | None) -> str:
    """Where a map on the patches has its mass, in words.

    Args:
        values: [h, w].
        parts: integer [H, W], 1 head, 2 body, else ground; None: the dataset has no masks.
    """
    if parts is None:
        return "this dataset has no masks, so the parts are not known"
    full = F.interpolate(values.detach().float().cpu()[None, None], tuple(parts.shape))[0, 0]
    shares = 100 * mass_by_part(full, parts)
    if bool(shares.isnan().any()):
        return "the map is zero everywhere"
    return ", ".join(f"{name} {share:.0f} %" for name, share in zip(PARTS, shares.tolist(), strict=True))


def _share(where: Tensor, cam: Tensor) -> Tensor:
    """Share of each patch of a grid that is True, [H, W] → [h, w]."""
    return F.adaptive_avg_pool2d(where.cpu().float()[None, None], tuple(cam.shape))[0, 0]


def _unit(cam: Tensor) -> Tensor:
    return (cam - cam.min()) / (cam.max() - cam.min()).clamp_min(1e-12)


def _words(terms: Iterable[str]) -> str:
    rows = [[term, GLOSSARY[term].meaning, HTML(links(GLOSSARY[term].place))] for term in terms]
    return _table(["word", "meaning", "built in"], rows)


def glossary(*terms: str) -> HTML:
    """Words in one sentence each, folded up, with links to the sections; all words where none is named.

    Raises:
        UserError: a word that the glossary does not have.
    """
    for term in terms:
        if term not in GLOSSARY:
            raise UserError(f"the glossary has no '{term}'; {nearest(term, list(GLOSSARY))}")
    chosen = terms or tuple(GLOSSARY)
    return HTML(f"<details><summary>Glossary: {len(chosen)} words</summary>{_words(chosen)}</details>")


def _functions(chosen: Iterable[Equation]) -> str:
    rows = [[e.where, e.says, ", ".join(e.functions), HTML(links(e.place))] for e in chosen]
    return _table(["where", "what it says", "function in ssepa_lib", "built in"], rows)


def equations(*numbers: str) -> HTML:
    """Which equation is which function, with links to the sections that build it; all where none is named.

    Raises:
        UserError: an equation that is not in the table.
    """
    for number in numbers:
        if number not in EQUATIONS:
            raise UserError(f"there is no equation '{number}'; {nearest(number, list(EQUATIONS))}")
    return HTML(_functions(dict.fromkeys(EQUATIONS[number] for number in numbers or EQUATIONS)))


def words_page() -> str:
    """The glossary and the equations as HTML, with links to the notebooks."""
    words, functions = _words(GLOSSARY), _functions(dict.fromkeys(EQUATIONS.values()))
    return f"<h1>Words and equations</h1><h2>Words</h2>{words}<h2>Equations</h2>{functions}"


def two_worlds(
    live: pd.Series, committed: pd.Series, label: str = "mIoU, %", axes: Mapping[str, Axes] | None = None
) -> dict[str, Axes]:
    """The live result at the left and the committed one at the right, as bars on one scale.

    Args:
        live, committed: name of a bar → value; the name of the series is its setting (data, steps, seeds).
        label: of the values.
        axes: `live` and `committed`; None: new ones.
    """
    if axes is None:
        height = 0.35 * max(len(live), len(committed)) + 1.3
        panels = plt.subplots(1, 2, figsize=(10, height), sharex=True)[1]
        axes = dict(zip(("live", "committed"), panels, strict=True))
    for ax, series, colour in zip(axes.values(), (live, committed), ("C0", "C4"), strict=True):
        bars = ax.barh(range(len(series)), series.to_numpy(float), color=colour, height=0.7)
        ax.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
        ax.set_yticks(range(len(series)), [str(name) for name in series.index])
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.grid(False, axis="y")
        ax.set_xlabel(label)
        ax.set_title(textwrap.fill(str(series.name), 44), fontsize="small", loc="left")
    return dict(axes)
