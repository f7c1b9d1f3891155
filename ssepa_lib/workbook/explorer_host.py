"""How an explorer is shown: live in JupyterLab, frozen everywhere else, by one JavaScript module.

Live, an anywidget carries the data to the browser and brings back what the reader chose. Frozen, the same
module runs in an `<iframe srcdoc>` with the data inside: without a kernel and without a network. Both are
displayed, one below the other; the frozen page hides while the live view is there, so that a saved notebook
still shows its explorers when it is opened again.
"""

import base64
import html
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import matplotlib
import numpy as np
import traitlets
from IPython.display import display

from ssepa_lib.errors import require_index
from ssepa_lib.workbook.figures.images import CAM_COLOURS
from ssepa_lib.workbook.figures.style import CLASS_COLOURS

MODULE = Path(__file__).parent / "assets" / "explorer.js"
LIMIT = 700_000  # bytes of a frozen explorer's data, as base64
STATE = ("patch", "layer", "head", "weights", "step", "thresholds")  # what the reader chooses
WIDGET = "application/vnd.jupyter.widget-view+json"

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{margin:0}}</style><body><script type="application/json" id="state">{state}</script>
<script type="text/plain" id="blob">{blob}</script><script type="module">{module}
freeze();</script></body></html>"""
# JupyterLab draws "model not found" where a saved live view has no kernel, and drops frames and styles from
# a notebook that it does not trust.
_FROZEN = """<style>.ssepa-untrusted{{display:none}}
.jp-OutputArea-child:has(.ssepa-frozen):has(+.jp-OutputArea-child .ssepa-live),
.jp-OutputArea-child:has(.ssepa-frozen)+.jp-OutputArea-child:has(>.lm-Panel.jp-OutputArea-output):not(
:has(.ssepa-live)){{display:none}}</style>
<p class="ssepa-untrusted">{title}: run the notebook, or trust it, to see this explorer.</p>
<iframe class="ssepa-frozen" title="{title}" style="width:100%;height:32rem;border:0" srcdoc="{page}">
</iframe>"""


@cache
def _module() -> str:
    return MODULE.read_text(encoding="utf-8")


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Arrays of float32, uint16 or uint8 as one byte string, and where each of them lies in it.

    Returns:
        name → {at, count, type} with `type` f4, u2 or u1 (little endian), and the bytes.
    """
    places, pieces, at = {}, [], 0
    for name, array in arrays.items():
        kind = {"float32": "f4", "uint16": "u2", "uint8": "u1"}[array.dtype.name]
        piece = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        places[name] = {"at": at, "count": array.size, "type": kind}
        pieces.append(piece)
        at += len(piece)
    return places, b"".join(pieces)


def _text(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


class Explorer(anywidget.AnyWidget):
    """An interactive view; what the reader chose can be read from its attributes.

    Attributes:
        patch, layer: the chosen patch, 0..N-1, and layer, None for all layers (microscope, propagation).
        head: the chosen head, 0..H-1 (heads).
        weights: the layer weights, [K] (mixer).
        step: the chosen number of steps (propagation) or snapshot (timeline).
        thresholds: high and low (thresholds), or the two ends of what is uncertain (masks).
    """

    _esm = MODULE
    spec = traitlets.Dict().tag(sync=True)
    blob = traitlets.Bytes().tag(sync=True)
    patch = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(None, allow_none=True).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    weights = traitlets.List(traitlets.Float()).tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    thresholds = traitlets.List(traitlets.Float()).tag(sync=True)

    def __init__(self, kind: str, title: str, arrays: Mapping[str, np.ndarray], spec: Mapping, **state: Any):
        anchors = matplotlib.colormaps[CAM_COLOURS](np.linspace(0, 1, 17))
        colours = [matplotlib.colors.to_hex(colour) for colour in anchors]
        places, blob = pack(arrays)
        common = {"kind": kind, "title": title, "colours": colours, "palette": list(CLASS_COLOURS)}
        super().__init__(spec={**common, "parts": places, **spec}, blob=blob, **state)

    @traitlets.validate("patch")
    def _check_patch(self, proposal: Any) -> int:
        grid = self.spec.get("grid")
        if grid:
            require_index("patch", proposal["value"], grid[0] * grid[1])
        return proposal["value"]

    def show(self, other: "Explorer") -> None:
        """Take over the data and the choices of another explorer of any kind; the view in the page stays."""
        with self.hold_sync():
            for name in ("blob", "spec", *STATE):
                setattr(self, name, getattr(other, name))

    @property
    def payload(self) -> int:
        """Bytes of the frozen page's data."""
        return len(_text(self.spec)) + 4 * -(-len(self.blob) // 3)

    def page(self) -> str:
        """The frozen explorer as an HTML document of its own."""
        state = {name: getattr(self, name) for name in ("spec", *STATE)}
        return _PAGE.format(
            title=html.escape(self.spec["title"]),
            state=_text(state),
            blob=base64.b64encode(self.blob).decode(),
            module=_module(),
        )

    def frozen(self) -> str:
        """The frozen explorer as an HTML fragment, or one sentence where it would be too large."""
        title = html.escape(self.spec["title"])
        if self.payload > LIMIT:
            size = f"{self.payload / 1e6:.1f} MB of data, more than {LIMIT / 1e6:.1f} MB"
            return f"<p>{title}: this explorer works in a running notebook only ({size}).</p>"
        return _FROZEN.format(title=title, page=html.escape(self.page()))

    def _ipython_display_(self) -> None:
        display_both(self, self.frozen())


def display_both(live: Any, frozen: str) -> None:
    """Display a widget and, above it, the HTML that stands for it where there is no kernel."""
    display({"text/html": frozen, "text/plain": ""}, raw=True)
    bundle = {WIDGET: {"version_major": 2, "version_minor": 0, "model_id": live.model_id}}
    display(bundle | {"text/plain": ""}, raw=True)
