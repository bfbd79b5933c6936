"Execute the chapters by papermill: every notebook of nbs/, in parallel processes, on a copy (or in place with --save)."
import argparse, concurrent.futures, contextlib, json, logging, multiprocessing, os, re, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tree import ROOT, notebooks, private_jupyter, tree_copy

FLAGS = ("slow", "gpu", "net") # as tst_flags in settings.ini: cells marked so are left out unless asked for
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS = ROOT/".venv"/"chapters.json" # how long each took last time, so that the longest start first

@dataclass
class Ran:
    "What became of one notebook"
    error:str # "" or what went wrong
    seconds:float # of the wall
    figures:dict|None = None # name -> number, as its `record` wrote them; None: it was given no `result_path`, or wrote nothing
    ending:dict|None = None # parameters at its end, seconds of its process, time_ratio (`tests/notebooks/ending.py`)

def skipped(
    source:str, # a code cell
    flags=(), # directives that are wanted
) -> bool:
    "Does a directive of this cell (`#| eval: false`, `#| slow` ...) take it out?"
    directives = re.findall(r"^\s*#\s*\|\s*(.+?)\s*$", source, re.M)
    return any(re.fullmatch(r"eval:\s*false", d) or (d in FLAGS and d not in flags) for d in directives)

def runnable(nb, flags=()):
    "The cells that are to run: papermill itself would execute `#| eval: false`"
    return nbformat.from_dict(dict(nb, cells=[dict(c, outputs=[], execution_count=None) for c in nb.cells if c.cell_type == "code" and c.source.strip() and not skipped(c.source, flags)]))

def still(nb):
    "Leave what a page without a kernel can show: no widgets beside the figure or page that stands for them"
    nb.metadata.pop("widgets", None)
    for data in (o.data for c in nb.cells for o in c.get("outputs", []) if "data" in o):
        if set(data) - {WIDGET, "text/plain"}: data.pop(WIDGET, None)

def told(text:str) -> str:
    "The end of an error as plain text"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return text if len(text) < 6000 else "[...]\n" + text[-6000:]

def taken(nb, done):
    "Put the outputs of what ran back into the notebook: nothing else of the run stays, no injected cell and no tag"
    ran = {c.id: c for c in done.cells}
    for c in nb.cells:
        if c.cell_type == "code" and c.id in ran:
            c.outputs, c.execution_count = ran[c.id].outputs, ran[c.id].execution_count
            CoalesceStreamsPreprocessor().preprocess_cell(c, {}, 0) # on a busy machine, what was printed together comes in pieces
    still(nb)

def read(path:Path): return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

def begun(ask, times:int=3): # -> what ask() gives
    "Ask again where a kernel died before it said a word: its ports are chosen before it binds them, and another program may be faster; nothing of the notebook has run then"
    for left in reversed(range(times)):
        try: return ask()
        except RuntimeError as e:
            if not left or "before replying to kernel_info" not in str(e): raise

def execute(
    path:Path, # a notebook; its outputs are written back to it
    flags=(), timeout:float=600, # seconds in all
    parameters:dict|None=None, # injected by papermill after the cell tagged `parameters`, with a `result_path`; None: the notebook's own
) -> Ran:
    "Run one notebook by papermill, in its folder"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    nb, start, trouble = nbformat.read(path, as_version=4), time.time(), ""
    at = {c.id: i for i, c in enumerate(nb.cells)}
    if len(at) != len(nb.cells): return Ran(f"expected an id of its own for each cell of {path.name}", 0.)
    with tempfile.TemporaryDirectory(prefix="posefree-") as tmp:
        result, end, run = Path(tmp)/"figures.json", Path(tmp)/"end.json", runnable(nb, flags)
        if parameters is not None:
            parameters = dict(parameters, result_path=str(result))
            run.cells.append(nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT/'tests'/'notebooks')!r})\nfrom ending import tell\ntell({str(end)!r}, {[*parameters]!r}, globals())"))
        left = lambda cell: max(1, int(start + timeout - time.time()))
        ask = lambda: papermill.execute_notebook(run, Path(tmp)/"done.ipynb", parameters, kernel_name="python3", language="python", cwd=path.parent, progress_bar=False, request_save_on_cell_execute=False,
                                                 timeout_func=left, store_widget_state=False, extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
        try: done = begun(ask)
        except papermill.PapermillExecutionError as e: trouble = f"cell {at.get(_failed(Path(tmp)/'done.ipynb'), 'of the runner')}:\n{told(str(e))}"
        except CellTimeoutError: trouble = f"took longer than {timeout:g} s"
        except DeadKernelError as e: trouble = f"its kernel died: {e}"
        ran = Ran(trouble, time.time() - start, read(result), read(end))
    if not trouble: taken(nb, done); nbformat.write(nb, path)
    if not trouble and parameters is not None:
        kept = {k: v for k, v in ran.ending["parameters"].items() if v != parameters[k]} if ran.ending else parameters
        if ran.figures is None and kept: ran.error = f"parameters did not arrive (papermill puts them after the cell tagged `parameters`): at the end {kept}"
        elif kept: ran.error = f"parameters were changed in the notebook: at the end {kept}"
        elif ran.figures is None: ran.error = "no figure: expected `record(result_path, ...)` in its last cell"
    return ran

def _failed(done): # the id of the cell that raised
    return next((c.id for c in nbformat.read(done, as_version=4).cells if any(o.output_type == "error" for o in c.get("outputs", []))), None) if done.exists() else None

def ready(tmp, path): # in each worker process
    private_jupyter(Path(tmp)/str(os.getpid()))
    os.environ["PYTHONPATH"] = path

def run_all(paths, workers, flags, timeout, parameters=lambda path: None, tmp=None) -> dict: # stem -> Ran
    "Run the notebooks, a few at a time, and tell each as it ends; `parameters(path)`: what papermill injects"
    took, ran = read(SECONDS) or {}, {}
    shares = (read(ROOT/"data"/"goldens"/"cpu.json") or {}).get("notebooks", {}) # in a fresh clone: as multiples of a calibration
    guess = lambda p: took.get(p.stem) or shares.get(p.stem, {}).get("time_ratio", {}).get("value", 0.) / 15
    longest_first = sorted(paths, key=guess, reverse=True)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), ready, (tmp, os.environ.get("PYTHONPATH", ""))) as pool:
        jobs = {pool.submit(execute, p, flags, timeout, parameters(p)): p for p in longest_first}
        for job in concurrent.futures.as_completed(jobs):
            path = jobs[job]
            try: r = job.result()
            except Exception as e: r = Ran(f"{type(e).__name__}: {e}", 0.)
            ran[path.stem], took[path.stem] = r, round(r.seconds, 1)
            print(f"{'FAILED' if r.error else 'ok':7}{path.stem:24}{r.seconds:7.1f} s", flush=True)
            if r.error: print(f"--- {path.name}, {r.error}\n---", flush=True)
    with contextlib.suppress(OSError): SECONDS.write_text(json.dumps(took, indent=1, sort_keys=True))
    return ran

def arguments(doc) -> argparse.ArgumentParser:
    "What every runner of notebooks takes"
    ap = argparse.ArgumentParser(description=doc)
    ap.add_argument("names", nargs="*", help="chapters to run, such as 01_camera (default: all)")
    ap.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="notebooks at a time, one thread each")
    ap.add_argument("--timeout", type=int, default=600, help="seconds a notebook may take")
    ap.add_argument("--flags", default="", help="also run cells marked so: " + " ".join(FLAGS))
    return ap

def run(names, save:bool, workers:int, flags, timeout:int, parameters=lambda path: None) -> dict: # stem -> Ran
    "Execute in place, or on a copy of the tree, and say how it went"
    os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), PYTHONDONTWRITEBYTECODE="1")
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="posefree-") as tmp, contextlib.ExitStack() as stack:
        root = ROOT if save else stack.enter_context(tree_copy())
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        ran = run_all(notebooks(names, root), workers, flags, timeout, parameters, tmp=tmp)
        if save:
            from nbdev.clean import nbdev_clean
            os.chdir(ROOT)
            for path in notebooks(names): nbdev_clean.__wrapped__(str(path))
    bad = sorted(name for name, r in ran.items() if r.error)
    if bad: print("failed:", *bad)
    print(f"chapters: {time.time() - start:.0f} s\n{len(ran) - len(bad)} passed, {len(bad)} failed")
    return ran

def main():
    ap = arguments(__doc__)
    ap.add_argument("--save", action="store_true", help="execute in place and keep the outputs")
    args = ap.parse_args()
    return 1 if any(r.error for r in run(args.names, args.save, args.workers, args.flags.split(), args.timeout).values()) else 0

if __name__ == "__main__": sys.exit(main())
