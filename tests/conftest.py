"Every test runs offline and on one thread a process."
import os
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
