"""The explorers in a real browser: live in JupyterLab, frozen in a saved notebook and in the report.

Run with SSEPA_BROWSER=1; needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ssepa_lib.paths import PROJECT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed"),
    pytest.mark.skipif("SSEPA_BROWSER" not in os.environ, reason="set SSEPA_BROWSER=1 to start a browser"),
]
TOKEN = "explorers"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else JupyterLab asks
KERNEL_READY = (
    "return window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
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
    driver.set_script_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address and folder of a JupyterLab of its own."""
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
    tracker = root / ".jupyter" / "SETTINGS" / "@jupyterlab" / "notebook-extension"
    tracker.mkdir(parents=True)  # every cell is part of the page, also those out of sight
    settings = {"windowingMode": "none", "autoStartDefaultKernel": True}
    (tracker / "tracker.jupyterlab-settings").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with open(root / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
        try:
            until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5), 240)
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.terminate()
            server.wait()


def until(found, seconds=120):
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


def command(browser, name):
    """Run a command of JupyterLab and wait for its end."""
    code = "window.jupyterapp.commands.execute(arguments[0]).then(arguments[1], arguments[1])"
    browser.execute_async_script(f"const [name, done] = arguments; {code}", name)


def begin(browser, name):
    """Start a command of JupyterLab without waiting for its end, which may take minutes."""
    browser.execute_script("void window.jupyterapp.commands.execute(arguments[0])", name)


def elements(browser, selector):
    return browser.find_elements("css selector", selector)


def errors(browser):
    """What the page itself complained about."""
    ignored = ("favicon", "widget model not found")  # the second: JupyterLab about a view without a kernel
    entries = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in entries if not any(word in message for word in ignored)]


def look(browser, index=0, root=".ssx"):
    """Status line and pixels of an explorer's first canvas."""
    script = """const x = document.querySelectorAll(arguments[0])[arguments[1]];
    return [x.querySelector("[role=status]").textContent, x.querySelector("canvas").toDataURL()];"""
    return browser.execute_script(script, root, index)


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def click(browser, canvas, dx=0, dy=0):
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(browser).move_to_element_with_offset(canvas, dx, dy).click().perform()


def try_microscope(browser, root):
    """Click a patch, move by keyboard, choose a layer by keyboard: every time the words and pixels change."""
    from selenium.webdriver import Keys

    canvas = elements(browser, f"{root} canvas[tabindex]")[0]
    before = look(browser, root=root)
    for act in (
        lambda: click(browser, canvas, 5, 5),
        lambda: press(browser, Keys.ARROW_LEFT),
        lambda: press(browser, "1"),
    ):
        act()
        after = until(
            lambda old=before: (new := look(browser, root=root))[0] != old[0] and new[1] != old[1] and new, 10
        )
        before = after
    assert "Layer 1" in after[0] and "patch 20 (row 3, column 2)" in after[0]


MOVES = """const canvas = document.querySelector("canvas[tabindex]"), times = [];
for (let i = 0; i < 40; i++) {
  const began = performance.now(), key = i % 2 ? "ArrowLeft" : "ArrowRight";
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  times.push(performance.now() - began);
}
return times.sort((a, b) => a - b)[20];"""


def test_explorers_live_and_saved(browser, lab):
    from selenium.webdriver import Keys

    address, root = lab
    made = new_notebook(cells=[new_code_cell(MAKE)], metadata={"kernelspec": KERNEL})
    made.cells += [new_code_cell(f"{name} = {call}\n{name}") for name, call in EXPLORERS.items()]
    made.cells += [new_code_cell("print('CHOSEN', view.patch, view.layer, mix.weights)")]
    nbformat.write(made, root / "tried.ipynb")
    browser.get(f"{address}/lab/tree/tried.ipynb?token={TOKEN}")
    until(
        lambda: browser.execute_script(
            "return window.jupyterapp?.shell.currentWidget?.content.widgets.length"
        ),
        240,
    )
    until(lambda: browser.execute_script(KERNEL_READY), 120)  # else JupyterLab asks which kernel to take
    begin(browser, "notebook:run-all-cells")
    until(lambda: "CHOSEN 0 None" in browser.page_source, 240)
    until(lambda: len(elements(browser, ".ssepa-live .ssx")) >= len(EXPLORERS), 60)
    assert not elements(browser, '[data-mime-type*="stderr"], [data-mime-type*="error"]')
    try_microscope(browser, ".ssepa-live .ssx")
    before = look(browser, 1, ".ssepa-live .ssx")
    elements(browser, ".ssepa-live input[aria-label='layer 2']")[0].send_keys(Keys.ARROW_RIGHT * 4)
    until(lambda: look(browser, 1, ".ssepa-live .ssx")[1] != before[1], 10)
    assert browser.execute_script(MOVES) < 50, "milliseconds to move to another patch"
    script = (
        "const n = window.jupyterapp.shell.currentWidget.content; n.activeCellIndex = n.widgets.length - 1;"
    )
    browser.execute_script(script)
    begin(browser, "notebook:run-cell")
    until(lambda: "CHOSEN 20 1 [1.0, 1.0, 1.2]" in browser.page_source, 30)
    command(browser, "docmanager:save")
    assert errors(browser) == []
    close_kernels(address)
    browser.get(f"{address}/lab/tree/tried.ipynb?reset")
    until(lambda: len(elements(browser, "iframe.ssepa-frozen")) == len(EXPLORERS), 240)
    until(lambda: elements(browser, "iframe.ssepa-frozen")[0].is_displayed())
    texts = [c.text for c in elements(browser, ".jp-OutputArea-child") if c.is_displayed()]
    assert not [t for t in texts if "widget" in t.lower()], "a live view without a kernel stays hidden"
    assert errors(browser) == []


def close_kernels(address):
    """End every kernel of a server, so that a notebook opens without one."""
    head = {"Authorization": f"token {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions", headers=head)) as answer:
        sessions = json.load(answer)
    for session in sessions:
        place = f"{address}/api/sessions/{session['id']}"
        urllib.request.urlopen(urllib.request.Request(place, headers=head, method="DELETE")).close()


def test_the_report_is_alive_without_a_network(browser, tmp_path):
    from ssepa_lib.workbook.report import write_report

    made = new_notebook(cells=[new_markdown_cell("# Frozen\n\n$$A = \\frac{QK^\\top}{\\sqrt d}$$")])
    space = {}
    exec(MAKE, space)
    for call in EXPLORERS.values():
        cell = new_code_cell(call)
        cell.outputs = [new_output("display_data", {"text/html": eval(call, space).frozen()})]
        made.cells.append(cell)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(made, tmp_path / "notebooks" / "00_frozen.ipynb")
    page = write_report(tmp_path).parent / "00_frozen.html"
    errors(browser)
    with_network(browser, False)
    try:
        try_page(browser, page)
    finally:
        with_network(browser, True)


def with_network(browser, on):
    speed = -1 if on else 0
    conditions = {"offline": not on, "latency": 0, "downloadThroughput": speed, "uploadThroughput": speed}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def try_page(browser, page):
    """Equations have a size, every explorer has found its height, and the first one answers."""
    browser.get(page.as_uri())
    assert elements(browser, "math")[0].size["height"] > 20
    frames = elements(browser, "iframe")
    assert len(frames) == len(EXPLORERS)
    for frame in frames:
        browser.execute_script("arguments[0].scrollIntoView()", frame)
        assert until(lambda f=frame: f.size["height"] if f.size["height"] != 512 else 0, 20) > 200
    browser.switch_to.frame(frames[0])
    try_microscope(browser, ".ssx")
    browser.switch_to.default_content()
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert errors(browser) == []
