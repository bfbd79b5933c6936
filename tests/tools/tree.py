"A private copy of the working tree: what is tried there cannot change the real one."
import contextlib, os, shutil, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIP = shutil.ignore_patterns(".git", ".venv", ".whl", ".gpu", "__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".hypothesis", ".mypy_cache", "*.egg-info",
                              "out", "runs", "build", "dist", "_proc", "_docs")

def notebooks(
    names=(), # some of them, such as 01_camera or nbs/01_camera.ipynb; none: all
    root=ROOT, # top of the tree
) -> list: # paths, sorted
    "The chapters and tutorials"
    found = sorted(p for p in (root/"nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts))
    wanted = {Path(name).stem for name in names}
    unknown = wanted - {p.stem for p in found}
    if unknown: raise SystemExit(f"expected names of notebooks in nbs/, got {', '.join(sorted(unknown))}")
    return [p for p in found if not wanted or p.stem in wanted]

@contextlib.contextmanager
def tree_copy():
    "Copy the tree to a temporary folder, go there, and come back"
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="posefree-") as tmp:
        copy = Path(tmp).resolve()/"tree"
        shutil.copytree(ROOT, copy, ignore=SKIP)
        os.chdir(copy)
        try: yield copy
        finally: os.chdir(here)

def private_jupyter(folder:Path): # where Jupyter and IPython may write
    "Keep Jupyter, IPython and Matplotlib out of the user's home"
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        (folder/name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder/name)
