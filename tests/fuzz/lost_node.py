"""A Ray cluster of two nodes on this machine; one is killed while it has a batch in hand. Prints one line of JSON: every image's row is there once, and the same as without Ray.

    python tests/fuzz/lost_node.py
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

SLOW = "rfc3987_syntax" # jsonschema takes it where Jupyter brought it, and it parses a grammar for seconds in each of Ray's processes, for which Ray waits 15 s at most

def seen_by(path, folder): # a Worker's `read`
    "Tell which node this is, and wait until both have been here; the doomed one never goes on: its batch is in hand whenever the kill comes, however slowly its processes die"
    import ray
    from posefree_kit.scale import read_square
    folder, me, end = Path(folder), ray.get_runtime_context().get_node_id(), time.time() + 600
    (folder/me).touch()
    doomed = (folder.parent/"doomed").read_text() == me
    while (doomed or len(list(folder.iterdir())) < 2) and time.time() < end: time.sleep(.2)
    return read_square(path)

def processes(session:str) -> list: # of a Ray session
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if session in p.read_bytes().decode(errors="replace"): found.append(int(p.parent.name))
    return found

def main(n=10, batch=2, out=None):
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp/"light").mkdir(); (tmp/"light"/f"{SLOW}.py").write_text("raise ImportError\n")
        sys.path.insert(0, str(tmp/"light"))
        os.environ |= dict(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(tmp/"light"), str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]))
        import ray
        from ray.cluster_utils import Cluster
        from small import generator, picture

        from posefree_kit.optimiser import Stage, quick
        from posefree_kit.scale import Job, read_results, scale
        (tmp/"in").mkdir(); (tmp/"seen").mkdir(); g = generator(tmp/"generator")
        for i in range(n): picture(i, 32).save(tmp/"in"/f"{i:02d}.png")
        short = quick(candidates=8, starts=2, start_steps=1, stages=(Stage(1, 2, .02, False), Stage(2, 1, .01, True)))
        job = Job(str(tmp/"ray"), str(g), config=short, batch=batch, device="cpu", cores=1)
        small = dict(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2 ** 20)
        said, killed, start = [], [], time.time()
        def say(text): said.append(text); print(f"{time.time() - start:.0f} s: {text}", file=sys.stderr, flush=True)
        cluster = Cluster(initialize_head=True, head_node_args=small)
        try:
            other = cluster.add_node(**small)
            (tmp/"doomed").write_text(other.node_id)
            session = os.path.basename(other.get_session_dir_path())
            def kill(rows): # once rows have come, and the other node has been seen
                say(f"rows of {[r['image'] for r in rows]}")
                if not killed and (tmp/"seen"/other.node_id).exists(): cluster.remove_node(other, allow_graceful=False); killed.append(len(rows)); say("a node was killed")
            started = time.time() - start
            scale(tmp/"in", dataclasses.replace(job, read=functools.partial(seen_by, folder=str(tmp/"seen"))), workers=2, address=cluster.address, progress=False, say=say, callback=kill)
        finally: ray.shutdown(); cluster.shutdown()
        end = time.time() + 30
        while processes(session) and time.time() < end: time.sleep(.5)
        scale(tmp/"in", dataclasses.replace(job, out=str(tmp/"local")), local=True, progress=False, say=lambda text: None)
        tight = lambda out: [{k: v for k, v in r.items() if k != "seconds"} for r in read_results(out)]
        rows, want = tight(tmp/"ray"), tight(tmp/"local")
        told = dict(nodes=2, killed=len(killed), images=n, rows=len(rows), once=len({r["index"] for r in rows}), failed=sum(r["error"] is not None for r in rows), same=rows == want, died=sum("a worker died" in s for s in said), left=len(processes(session)), seconds_to_start=round(started, 1), seconds=round(time.time() - start, 1))
    print(json.dumps(told))
    if out: out.write_text(json.dumps(told))
    return 0 if told["killed"] and told["died"] and told["same"] and told["rows"] == told["once"] == n and not told["left"] else 1

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, help="write it here too")
    sys.exit(main(out=p.parse_args().json))
