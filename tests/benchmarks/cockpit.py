"""The cockpit in a real JupyterLab and Chromium: seconds from Run to its first pictures, steps a second with the display on, and what the display costs.

    python tests/benchmarks/cockpit.py [--threads 2] [--rounds 2] [--json FILE]

Steps with and without the display alternate in one run, in each of the two stages; the start search comes before.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parents[1]/"tools"), str(HERE.parents[1]/"browser")]

from conftest import CHROMIUM
from playwright.sync_api import sync_playwright
from test_cockpit import jupyter, until

OPEN = """from posefree_kit import viewer
from posefree_kit.checkpoints import load_generator
from posefree_kit.core import load_image, save_json
from posefree_kit.optimiser import quick
G = load_generator("portraits", "cpu").compile_march()
c = viewer.cockpit(load_image("face.png"), G, quick(), every=10)
c"""
MEASURE = """import time
def rate(steps, shown):
    c.session.watchers[:] = [c._watch] if shown else []
    t, d = time.perf_counter(), c.draws
    c.session.start(steps); c.session.wait()
    return dict(shown=shown, steps_per_s=steps / (time.perf_counter() - t), draws=c.draws - d)
def rounds(n, steps): return [rate(steps, shown) for i in range(n) for shown in ((True, False) if i % 2 else (False, True))]
rate(2, True)                                            # with the start search
half = rounds({n}, 30)
rate(150 - c.session.state.step, False)
save_json(dict(half=half, full=rounds({n}, 30)), "measured.json")"""

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2); p.add_argument("--rounds", type=int, default=2, choices=(1, 2)); p.add_argument("--json", type=Path)
    a = p.parse_args()
    if not CHROMIUM: sys.exit("expected Chromium on the PATH (make chromium), found none")
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as play, jupyter(Path(tmp), [OPEN, MEASURE.replace("{n}", str(a.rounds))], a.threads) as (work, address):
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1500, height=1250))
        page.set_default_timeout(300_000); page.goto(address)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        clock = time.time()
        page.get_by_role("menuitem", name="Run", exact=True).click(); page.get_by_text("Run All Cells", exact=True).click()
        page.locator("img.widget-image").nth(4).wait_for()
        first = time.time() - clock
        until("the steps", (work/"measured.json").exists, 600)
        rows = json.loads((work/"measured.json").read_text())
        browser.close()
    rate = lambda rows, shown: statistics.median(r["steps_per_s"] for r in rows if r["shown"] == shown)
    told = dict(threads=a.threads, rounds=a.rounds, first_pictures_s=round(first, 1)) | {stage: dict(shown=round(rate(r, True), 2), hidden=round(rate(r, False), 2), display_share=round(1 - rate(r, True) / rate(r, False), 3), draws=sum(x["draws"] for x in r)) for stage, r in rows.items()}
    print(f"Run All to the first pictures: {told['first_pictures_s']} s, {a.threads} threads")
    for stage in rows: print(f"{stage} resolution: {told[stage]['shown']} steps a second with the display, {told[stage]['hidden']} without: it costs {100 * told[stage]['display_share']:.0f} %")
    if a.json: a.json.write_text(json.dumps(told, indent=1) + "\n")

if __name__ == "__main__": main()
