"Every test runs offline and on one thread a process."
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent/"tools"))

def reference(name:str) -> Path:
    "The folder of a recorded configuration of the public generator ($POSEFREE_REFERENCE, or shared/reference beside the repository); where it is not there, the test is skipped"
    folder = Path(os.environ.get("POSEFREE_REFERENCE") or Path(__file__).parents[2]/"shared/reference")/name
    if not folder.is_dir(): pytest.skip(f"skipped: no reference ({name})")
    return folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

@pytest.fixture(scope="module")
def chromium():
    "Chromium, driven by playwright; skipped, with the reason, where one of them is not there"
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM: pytest.skip("no Chromium on the PATH: make test-browser installs it on Debian")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
