"""The explorers and notebooks in a browser: live in JupyterLab, frozen in a saved notebook and in the report.

Run with SSEPA_BROWSER=1; needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ssepa_lib.files import write_text
from ssepa_lib.paths import NOTEBOOKS, PROJECT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed"),
    pytest.mark.skipif("SSEPA_BROWSER" not in os.environ, reason="set SSEPA_BROWSER=1 to start a browser"),
]
TOKEN = "explorers"
PATIENCE = 600  # seconds; a busy machine takes many times as long as a quiet one
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else JupyterLab asks
KERNEL_READY = (
    "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
)
MAKE = """import numpy as np, pandas as pd, torch
from ssepa_lib.model import Attention, PatchAffinity
from ssepa_lib.workbook import explorers
g = torch.Generator().manual_seed(0)
sides = [[torch.randn(1, 2, 37, 8, generator=g) for _ in range(3)] for _ in range(2)]
affinity = PatchAffinity(Attention(*sides, 1, (6, 6)))
image = torch.rand(3, 48, 48, generator=g) * 255
mask = torch.zeros(48, 48, dtype=torch.uint8)
mask[8:30, 8:30] = 1
cam = torch.rand(6, 6, generator=g)
products = affinity.per_layer(cam.view(1, 36, 1))[..., 0]
snapshots = [{"step": s, "cam": cam, "pseudo_label": mask} for s in (0, 5)]
history = pd.DataFrame({"step": [0, 5], "loss": [1.0, 0.5]})"""
EXPLORERS = {
    "view": "explorers.microscope(image, affinity, cam=cam, mask=mask, start=0, names={8: 'Body'})",
    "mix": "explorers.mixer([image], products, [mask], presets={'first': [1, 0, 0]})",
    "cut": "explorers.thresholds(image, cam, mask=mask, classes=['<script>alert(1)</script>'])",
    "spread": "explorers.propagation(image, affinity, cam=cam, mask=mask)",
    "grown": "explorers.timeline(image, snapshots, history)",
    "hidden": "explorers.masks(image, cam, cam, cam)",
    "several": "explorers.heads(image, affinity.attention, mask=mask, names={8: 'Body'})",
    "fits": "explorers.memory()",
}
STEPS = 8  # of the runs that the notebooks find
SMALL = {  # what a folder needs to be trained within seconds
    "data.crop": 96,
    "data.eval_size": 96,
    "data.batch": 4,
    "data.workers": 0,
    "contrast.local_size": 32,
    "model.weights": "micro",
    "model.backbone_args": {"img_size": 96, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3},
}
OWN = {"preset": '"folder"', "steps": 4, "images": 5, "image": 0, "overrides": json.dumps(SMALL)}
FEW = {"steps": STEPS, "images": 6}
REAL = {  # name here → notebook, its parameters, and the explorers that are tried
    "00_start_here": ("00_start_here", FEW, ["Affinity microscope"]),
    "00_without_masks": ("00_start_here", OWN, ["Affinity microscope"]),
    "02_method": ("02_method", FEW, ["From map to labels", "Layer mixer"]),
    "04_cam_visualization": (
        "04_cam_visualization",
        FEW | {"rows": 2, "haaf_steps": 2},
        ["Affinity microscope", "Layer mixer", "Propagation, step by step", "From map to labels"],
    ),
}


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 1600)
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address and folder of a JupyterLab of its own; results lie in the folder's `results`."""
    root = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.root_dir": root}
    options |= {"IdentityProvider.token": TOKEN, "LabApp.expose_app_in_browser": True, "LabApp.news_url": ""}
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    own = {f"JUPYTER_{name}": str(root / ".jupyter" / name) for name in folders}
    own |= {f"JUPYTERLAB_{name}_DIR": str(root / ".jupyter" / name) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    own |= {"SSEPA_RESULTS": str(root / "results"), "FOLDER_ROOT": str(root / "own")}
    tracker = root / ".jupyter" / "SETTINGS" / "@jupyterlab" / "notebook-extension"
    tracker.mkdir(parents=True)  # every cell is part of the page, also those out of sight
    settings = {"windowingMode": "none", "autoStartDefaultKernel": True}
    (tracker / "tracker.jupyterlab-settings").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with open(root / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
        try:
            until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5))
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def runs(lab):
    """The runs that notebooks 00, 02 and 04 look at, a few steps long."""
    from ssepa_lib.paths import variables_set
    from ssepa_lib.training import train
    from ssepa_lib.workbook import study

    with variables_set(SSEPA_RESULTS=str(lab[1] / "results")):
        study.tour("shapes", STEPS)
        for method in ("toco", "ssepa"):
            recipe = study.recipe_for("shapes", method, steps=STEPS)
            train(recipe, study.run_folder("shapes", method))


@pytest.fixture(scope="module")
def own_images(lab):
    """A folder of five images without masks, whose class would like to run a script."""
    from PIL import Image

    from ssepa_lib.data.shapes import render_scene, scene_facts

    table = ["image,classes"]
    (lab[1] / "own" / "images").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(render_scene("val", i)[0]).save(lab[1] / "own" / "images" / f"{i}.png")
        classes = ["<script>alert(1)</script>", *scene_facts("val", i).classes]
        table.append(f"{i}.png,{';'.join(classes[: 1 + i % 2])}")
    write_text(lab[1] / "own" / "labels.csv", "\n".join(table))


def until(found, seconds=PATIENCE):
    """The first true answer of a function; fails with the last error."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if answer := found():
                return answer
        except Exception as error:  # a page or a server that is not ready yet has many ways of saying so
            last = error
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds} s: {last}")


def elements(browser, selector):
    return browser.find_elements("css selector", selector)


def errors(browser):
    """What the page itself complained about, but for what JupyterLab and anywidget say of a slow machine."""
    ignored = ("favicon", "beforeunload", "widget model not found")
    ignored += ("Failed to initialize model",)  # anywidget, after 2 s; it goes on all the same
    entries = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in entries if not any(word in message for word in ignored)]


def run(browser, command):
    """Run a command of JupyterLab and wait for its end."""
    start = "window.jupyterapp.commands.execute(arguments[0]).then(end, end)"
    browser.execute_script(f"window.ended = false; const end = () => (window.ended = true); {start}", command)
    until(lambda: browser.execute_script("return window.ended"))


def open_notebook(browser, lab, name, kernel=True):
    """Open a notebook of the folder; with a kernel, wait until that is ready."""
    cells = "return window.jupyterapp?.shell.currentWidget?.content?.widgets?.length"
    browser.get(f"{lab[0]}/lab/tree/{name}.ipynb?reset&token={TOKEN}")
    until(lambda: browser.execute_script(cells))
    if kernel:  # else JupyterLab asks which kernel to take
        until(lambda: browser.execute_script(KERNEL_READY))


def close_kernels(address):
    """End every kernel of a server, so that a notebook opens without one."""
    head = {"Authorization": f"token {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions", headers=head)) as answer:
        sessions = json.load(answer)
    for session in sessions:
        place = f"{address}/api/sessions/{session['id']}"
        urllib.request.urlopen(urllib.request.Request(place, headers=head, method="DELETE")).close()


def explorer(browser, title, root=".ssepa-live "):
    """The explorer of a title, once its image is drawn."""
    (view,) = until(lambda: elements(browser, f"{root}.ssx[aria-label='{title}']")[:1])
    until(lambda: look(browser, view)[0])
    return view


def look(browser, view):
    """Status line and pixels of an explorer."""
    script = """const x = arguments[0], pixels = [...x.querySelectorAll("canvas")].map((c) => c.toDataURL());
    return [x.querySelector("[role=status]").textContent, pixels.join()];"""
    return browser.execute_script(script, view)


def changes(browser, view, act):
    """Do something to an explorer, wait until words and pixels have changed, and return its words."""
    before = look(browser, view)
    act()

    def different():
        now = look(browser, view)
        return now if now[0] != before[0] and now[1] != before[1] else None

    return until(different)[0]


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def click(browser, node, dx=0, dy=0):
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    ActionChains(browser).move_to_element_with_offset(node, dx, dy).click().perform()


def try_microscope(browser, view):
    """Click a patch, move by keyboard, choose a layer by keyboard."""
    from selenium.webdriver import Keys

    canvas = view.find_element("css selector", "canvas[tabindex]")
    changes(browser, view, lambda: click(browser, canvas, 5, 5))
    moved = changes(browser, view, lambda: press(browser, Keys.ARROW_LEFT))
    assert re.search(r"patch \d+ \(row \d+, column \d+\)\. All layers", moved)
    assert "Layer 1" in changes(browser, view, lambda: press(browser, "1"))


def try_mixer(browser, view):
    """Jump to the slider of a layer by its digit and move it by the arrow keys."""
    from selenium.webdriver import Keys

    (slider,) = view.find_elements("css selector", "input[aria-label='layer 2']")
    click(
        browser, view.find_element("css selector", "button")
    )  # the preset "uniform", so that keys arrive here
    press(browser, "2")
    assert browser.switch_to.active_element == slider
    said = changes(browser, view, lambda: press(browser, Keys.ARROW_RIGHT * 4))
    assert "Your own weights" in said and slider.get_attribute("value") == "1.2"


def try_slider(browser, view):
    """Move the first slider of an explorer by the arrow keys."""
    from selenium.webdriver import Keys

    slider = view.find_element("css selector", "input[type=range]")
    click(browser, slider)
    changes(browser, view, lambda: press(browser, Keys.ARROW_LEFT * 3))


TRY = {
    "Affinity microscope": try_microscope,
    "Layer mixer": try_mixer,
    "Propagation, step by step": try_slider,
    "From map to labels": try_slider,
}
MOVES = """const canvas = arguments[0].querySelector("canvas[tabindex]"), times = [];
for (let i = 0; i < 40; i++) {
  const began = performance.now(), key = i % 2 ? "ArrowLeft" : "ArrowRight";
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  canvas.getContext("2d").getImageData(0, 0, 1, 1);  // until it is drawn
  times.push(performance.now() - began);
}
return times.sort((a, b) => a - b);"""


def time_of_moves(browser, view, record):
    """Median milliseconds of 40 moves, printed; less than 50 on a quiet machine, more on a busy one."""
    times = browser.execute_script(MOVES, view)
    record("milliseconds_of_a_move", round(times[20], 1))
    print(f"\nan explorer move takes {times[20]:.1f} ms (median of 40; {times[0]:.1f} to {times[-1]:.1f})")
    assert times[20] < 250


def try_saved(browser, lab, name, count):
    """Save, end the kernel, reopen: every explorer is there, frozen, and nothing else speaks of widgets."""
    run(browser, "docmanager:save")
    assert errors(browser) == []
    close_kernels(lab[0])
    open_notebook(browser, lab, name, kernel=False)
    until(lambda: len(elements(browser, "iframe.ssepa-frozen")) == count)
    until(lambda: elements(browser, "iframe.ssepa-frozen")[0].is_displayed())
    texts = [c.text for c in elements(browser, ".jp-OutputArea-child") if c.is_displayed()]
    told = [t for t in texts if re.search(r"(displaying|loading) widget|model not found", t, re.I)]
    assert not told, "a live view without a kernel stays hidden"
    assert errors(browser) == []


def no_error_output(browser):
    found = elements(browser, '[data-mime-type*="stderr"], [data-mime-type*="error"]')
    texts = [element.text for element in found]
    assert [text for text in texts if "step/s" not in text] == [], "progress bars are written there as well"


def test_explorers_live_and_saved(browser, lab, record_property):
    made = new_notebook(cells=[new_code_cell(MAKE)], metadata={"kernelspec": KERNEL})
    made.cells += [new_code_cell(f"{name} = {call}\n{name}") for name, call in EXPLORERS.items()]
    made.cells += [new_code_cell("print('CHOSEN', view.patch, view.layer, mix.weights)")]
    nbformat.write(made, lab[1] / "tried.ipynb")
    open_notebook(browser, lab, "tried")
    run(browser, "notebook:run-all-cells")
    until(lambda: len(elements(browser, ".ssepa-live .ssx")) == len(EXPLORERS))
    assert "CHOSEN 0 None" in browser.page_source
    no_error_output(browser)
    view = explorer(browser, "Affinity microscope")
    try_microscope(browser, view)
    assert "patch 20 (row 3, column 2)" in look(browser, view)[0]
    for title in ("Layer mixer", "Propagation, step by step", "From map to labels"):
        TRY[title](browser, explorer(browser, title))
    time_of_moves(browser, view, record_property)
    last = (
        "const n = window.jupyterapp.shell.currentWidget.content; n.activeCellIndex = n.widgets.length - 1;"
    )
    browser.execute_script(last)
    run(browser, "notebook:run-cell")
    until(lambda: "CHOSEN 20 1 [1.0, 1.0, 1.2]" in browser.page_source)
    try_saved(browser, lab, "tried", len(EXPLORERS))


@pytest.mark.parametrize("name", REAL)
def test_a_notebook_as_a_reader_uses_it(browser, lab, runs, own_images, record_property, name):
    notebook, values, titles = REAL[name]
    made = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4)
    made.metadata["kernelspec"] = KERNEL
    (given,) = (cell for cell in made.cells if "parameters" in cell.metadata.get("tags", []))
    for parameter, value in values.items():
        given.source, found = re.subn(rf"(?m)^{parameter} = \S+", f"{parameter} = {value}", given.source)
        assert found == 1
    nbformat.write(made, lab[1] / f"{name}.ipynb")
    open_notebook(browser, lab, name)
    run(browser, "notebook:run-all-cells")
    no_error_output(browser)
    for title in titles:
        TRY[title](browser, explorer(browser, title))
    if "Affinity microscope" in titles:
        time_of_moves(browser, explorer(browser, "Affinity microscope"), record_property)
    try_saved(browser, lab, name, len(titles))
    read_report(browser, lab[1] / f"{name}.ipynb", len(titles))


def read_report(browser, executed, explorers):
    """Write the report of one executed notebook and read its page without a network."""
    from ssepa_lib.workbook.report import write_report

    folder = executed.parent / f"report-{executed.stem}"
    write_text(folder / "notebooks" / executed.name, executed.read_text(encoding="utf-8"))
    page = write_report(folder).parent / f"{executed.stem}.html"
    errors(browser)
    with_network(browser, False)
    try:
        try_page(browser, page, explorers)
    finally:
        with_network(browser, True)
        browser.set_window_size(1280, 1600)


def test_the_report_is_alive_without_a_network(browser, tmp_path):
    made = new_notebook(cells=[new_markdown_cell("# Frozen\n\n$$A = \\frac{QK^\\top}{\\sqrt d}$$")])
    space = {}
    exec(MAKE, space)
    for call in EXPLORERS.values():
        cell = new_code_cell(call)
        cell.outputs = [new_output("display_data", {"text/html": eval(call, space).frozen()})]
        made.cells.append(cell)
    nbformat.write(made, tmp_path / "00_frozen.ipynb")
    read_report(browser, tmp_path / "00_frozen.ipynb", len(EXPLORERS))
    assert elements(browser, "math")[0].size["height"] > 20


def with_network(browser, on):
    speed = -1 if on else 0
    conditions = {"offline": not on, "latency": 0, "downloadThroughput": speed, "uploadThroughput": speed}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def try_page(browser, page, explorers):
    """No equation is left as TeX, every explorer has found its height, and the first one answers."""
    browser.get(page.as_uri())
    assert not re.search(r"\\(frac|sqrt|min|max|top)\b", browser.find_element("css selector", "main").text)
    frames = elements(browser, "iframe")
    assert len(frames) == explorers
    for frame in frames:
        browser.execute_script("arguments[0].scrollIntoView()", frame)
        assert until(lambda f=frame: f.size["height"] if f.size["height"] != 512 else 0) > 200
    browser.switch_to.frame(frames[0])
    title = elements(browser, ".ssx")[0].get_attribute("aria-label")
    TRY[title](browser, explorer(browser, title, ""))
    browser.switch_to.default_content()
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert errors(browser) == []


def test_an_explorer_whose_data_is_not_there_says_so(browser, tmp_path):
    space = {}
    exec(MAKE, space)
    whole = eval(EXPLORERS["mix"], space).page()
    write_text(tmp_path / "page.html", re.sub(r'(id="blob">)[^<]*', r"\1", whole))
    browser.get((tmp_path / "page.html").as_uri())
    assert "is not there yet" in browser.find_element("css selector", "[role=status]").text
    assert errors(browser) == []
