"The cockpit by a real browser: JupyterLab and Chromium, driven by playwright; skipped, with the reason, where one of them is not there."
import contextlib
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

from tree import ROOT, private_jupyter

pytestmark = pytest.mark.xdist_group("lab") # one worker, one server
PICTURES = ROOT/"out"/"browser" # the screenshots, kept as artefacts
CELLS = ("""import contextlib, json
from posefree_kit import viewer
from posefree_kit.camera import Pose
from posefree_kit.checkpoints import load_generator
from posefree_kit.core import InputError, load_image
from posefree_kit.optimiser import quick, with_steps
G = load_generator("portraits", "cpu")
with contextlib.suppress(InputError): G.compile_march()
c = viewer.cockpit(load_image("face.png"), G, with_steps(quick(starts=1, candidates=64), 2000), folder="saved", every=2)
def write(session, step):
    if step: print(json.dumps(dict(step=step.step, geo=step.weights["geo"])), file=open("trace.jsonl", "a"), flush=True)
c.session.watchers.append(write)
c""", """viewer.plotly_offline()
w, view = G.sample(1, seed=1)
viewer.depth_figure(view, G.pose(w), G.config, limit=32).show()""")

def free_port() -> int:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def until(what, condition, seconds=120):
    "Wait for something to become true"
    end = time.time() + seconds
    while not (got := condition()):
        assert time.time() < end, f"waited {seconds} s for {what}"
        time.sleep(.2)
    return got

@contextlib.contextmanager
def jupyter(home, cells, threads=1):
    "A JupyterLab of its own with a notebook of these cells: its folder, the notebook's address"
    before = dict(os.environ)
    private_jupyter(home/"jupyter")
    for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"): os.environ[name] = str(home/name.lower())
    quiet = home/"jupyterlab_settings_dir"/"@jupyterlab"/"apputils-extension"
    quiet.mkdir(parents=True); (quiet/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    work = home/"work"; work.mkdir()
    shutil.copy(ROOT/"data"/"portrait_10000002.png", work/"face.png")
    shutil.copy(ROOT/"nbs"/"tutorials"/"quick_tour.ipynb", work)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3 (ipykernel)", language="python")))
    nbformat.write(nb, work/"cockpit.ipynb")
    port, token = free_port(), "posefree"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads))
    log = open(home/"lab.log", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}"], env=env, stdout=log, stderr=log)
    try:
        def up():
            assert server.poll() is None, (home/"lab.log").read_text()[-2000:]
            try: return urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).status == 200
            except OSError: return False
        until("JupyterLab", up)
        yield work, f"http://127.0.0.1:{port}/lab/tree/cockpit.ipynb?token={token}&reset"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close(); os.environ.clear(); os.environ.update(before)

@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory): # without Chromium no server is started
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    with jupyter(tmp_path_factory.mktemp("lab"), CELLS) as it: yield it

@pytest.fixture
def page(chromium, lab):
    PICTURES.mkdir(parents=True, exist_ok=True)
    page = chromium.new_page(viewport=dict(width=1500, height=1250))
    page.set_default_timeout(300_000)
    page.goto(lab[1])
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    yield page
    page.screenshot(path=PICTURES/"end.png")

def trace(work) -> list: return [json.loads(line) for line in (work/"trace.jsonl").read_text().splitlines()] if (work/"trace.jsonl").exists() else []

def test_the_cockpit_is_driven_by_hand(lab, page):
    work = lab[0]
    press = lambda name: page.locator(".jupyter-button").filter(has_text=re.compile(rf"^\s*{name}\s*$")).click()
    clock = time.time()
    page.get_by_role("menuitem", name="Run", exact=True).click(); page.get_by_text("Run All Cells", exact=True).click()
    slider = page.locator(".widget-slider").filter(has=page.locator("label", has_text=re.compile("^geo$")))
    slider.locator(".noUi-handle").wait_for()
    page.locator("img.widget-image").nth(4).wait_for()
    print(f"\nfrom Run All to the cockpit's first pictures: {time.time() - clock:.1f} s")
    page.screenshot(path=PICTURES/"1-ready.png")
    press("start")
    until("six steps", lambda: len(trace(work)) >= 6, 300)
    first = page.locator("img.widget-image").nth(1).get_attribute("src")
    handle = slider.locator(".noUi-handle"); handle.focus()
    for _ in range(5): handle.press("ArrowRight")                                              # while it runs
    until("the weight in the trace", lambda: trace(work)[-1]["geo"] > .045, 120)
    until("a picture that moves", lambda: page.locator("img.widget-image").nth(1).get_attribute("src") != first, 120)
    page.screenshot(path=PICTURES/"2-running.png")
    press("pause")
    page.get_by_text(re.compile(r"paused: step \d+ of 2000")).wait_for()
    rest = len(trace(work)); time.sleep(1.5); assert len(trace(work)) == rest                   # it stands still
    page.wait_for_function("n => document.querySelector('.js-plotly-plot')?.data?.find(t => t.name == 'total')?.x.length == n", arg=rest) # the chart catches up
    press("save")
    until("saved files", lambda: (work/"saved"/"report.json").exists(), 300)
    page.get_by_text("saved: saved").wait_for()
    page.screenshot(path=PICTURES/"3-saved.png")
    from posefree_kit.viewer import FILES
    assert sorted(p.name for p in (work/"saved").iterdir()) == sorted(FILES)
    report, told = json.loads((work/"saved"/"report.json").read_text()), trace(work)
    changes = [c for c in report["hand"]["changes"] if c["knob"] == "geo"]
    assert changes and report["steps"] == rest and told[changes[0]["step"] - 1]["geo"] < .03 and told[-1]["geo"] == changes[-1]["value"]
    press("undo"); page.get_by_text(re.compile(rf"paused: step (?!{rest} )\d+ of")).wait_for()
    press("start"); page.get_by_text(re.compile(r"running: step")).wait_for(); press("pause")

def test_the_quick_tour_opens(lab, page):
    page.goto(lab[1].replace("cockpit.ipynb", "quick_tour.ipynb"))
    page.get_by_role("heading", name="Quick tour").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()                                 # no question which kernel
    assert not page.locator(".jp-Dialog").count()
    page.screenshot(path=PICTURES/"5-quick-tour.png")

def test_the_depth_view_turns(lab, page):
    page.get_by_role("menuitem", name="Run", exact=True).click(); page.get_by_text("Run All Cells", exact=True).click()
    plot = page.locator(".js-plotly-plot:has(.gl-container canvas)").last
    plot.scroll_into_view_if_needed(); plot.locator("canvas").first.wait_for()
    eye = "e => JSON.stringify(e._fullLayout.scene._scene.getCamera().eye)"
    before, box = plot.evaluate(eye), plot.bounding_box()
    page.mouse.move(box["x"] + 150, box["y"] + 180); page.mouse.down(); page.mouse.move(box["x"] + 260, box["y"] + 200, steps=8); page.mouse.up()
    until("the view to turn", lambda: plot.evaluate(eye) != before, 60)
    page.screenshot(path=PICTURES/"4-turned.png")
