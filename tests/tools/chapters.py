"Execute the chapters: every notebook of nbs/, in parallel processes, on a copy (or in place with --save)."
import argparse, asyncio, contextlib, json, os, re, sys, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tree import ROOT, notebooks, private_jupyter, tree_copy

FLAGS = ("slow", "gpu", "net") # as tst_flags in settings.ini: cells marked so are left out unless asked for
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS = ROOT/".venv"/"chapters.json" # how long each took last time, so that the longest start first

def skipped(
    source:str, # a code cell
    flags=(), # directives that are wanted
) -> bool:
    "Does a directive of this cell (`#| eval: false`, `#| slow` ...) take it out?"
    directives = re.findall(r"^\s*#\s*\|\s*(.+?)\s*$", source, re.M)
    return any(re.fullmatch(r"eval:\s*false", d) or (d in FLAGS and d not in flags) for d in directives)

def still(nb):
    "Leave what a page without a kernel can show: no widgets beside the figure or page that stands for them"
    nb.metadata.pop("widgets", None)
    for data in (o.data for c in nb.cells for o in c.get("outputs", []) if "data" in o):
        if set(data) - {WIDGET, "text/plain"}: data.pop(WIDGET, None)

def told(error:Exception) -> str:
    "The end of an error as plain text"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text if len(text) < 6000 else "[...]\n" + text[-6000:]

async def execute(path, flags, timeout) -> str: # "" or what went wrong
    "Run one notebook and write its outputs back to the file"
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", store_widget_state=False,
                            extra_arguments=["--IPKernelApp.log_level=ERROR"], resources={"metadata": {"path": str(path.parent)}})
    try:
        async with asyncio.timeout(timeout), client.async_setup_kernel():
            for i, cell in enumerate(nb.cells):
                if cell.cell_type != "code" or skipped(cell.source, flags): continue
                try: await client.async_execute_cell(cell, i)
                except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: return f"cell {i}:\n{told(e)}"
    except TimeoutError: return f"took longer than {timeout} s"
    still(nb)
    nbformat.write(nb, path)
    return ""

async def run_all(paths, workers, flags, timeout) -> dict: # stem -> what went wrong
    "Run the notebooks, a few at a time, and tell each as it ends"
    gate, failed = asyncio.Semaphore(workers), {}
    took = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    async def one(path):
        async with gate:
            start = time.time()
            failed[path.stem] = await execute(path, flags, timeout)
            took[path.stem] = round(time.time() - start, 1)
            print(f"{'FAILED' if failed[path.stem] else 'ok':7}{path.stem:24}{took[path.stem]:7.1f} s", flush=True)
            if failed[path.stem]: print(f"--- {path.name}, {failed[path.stem]}\n---", flush=True)
    longest_first = sorted(paths, key=lambda p: -took.get(p.stem, p.stat().st_size / 1e4))
    await asyncio.gather(*(one(p) for p in longest_first))
    with contextlib.suppress(OSError): SECONDS.write_text(json.dumps(took, indent=1, sort_keys=True))
    return failed

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("names", nargs="*", help="chapters to run, such as 01_camera (default: all)")
    ap.add_argument("--save", action="store_true", help="execute in place and keep the outputs")
    ap.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="notebooks at a time, one thread each")
    ap.add_argument("--timeout", type=int, default=600, help="seconds a notebook may take")
    ap.add_argument("--flags", default="", help="also run cells marked so: " + " ".join(FLAGS))
    args = ap.parse_args()
    os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), PYTHONDONTWRITEBYTECODE="1")
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="posefree-") as tmp, contextlib.ExitStack() as stack:
        private_jupyter(Path(tmp))
        root = ROOT if args.save else stack.enter_context(tree_copy())
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        failed = asyncio.run(run_all(notebooks(args.names, root), args.workers, args.flags.split(), args.timeout))
        if args.save:
            from nbdev.clean import nbdev_clean
            os.chdir(ROOT)
            for path in notebooks(args.names): nbdev_clean.__wrapped__(str(path))
    bad = sum(map(bool, failed.values()))
    if bad: print("failed:", *sorted(name for name, error in failed.items() if error))
    print(f"chapters: {time.time() - start:.0f} s\n{len(failed) - bad} passed, {bad} failed")
    return 1 if bad else 0

if __name__ == "__main__": sys.exit(main())
