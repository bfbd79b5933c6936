"""What the kit survives, counted: kills, mutated files, hostile pickles, a lost node, and images a second by batch. Written to data/results/faults.json, section by section; chapter 17 shows it.

    python tests/fuzz/report.py                                  # everything, in full: hours on one core
    python tests/fuzz/report.py --only kills --commands scale --n 3
    python tests/fuzz/report.py --only fuzz --cases 1000
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]

from posefree_kit.core import InputError, read_json, save_json

RESULTS = ROOT/"data"/"results"/"faults.json"

def told(script:str, *args) -> dict:
    "Run a script that ends with JSON in a file; if it fails, so do we"
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, ROOT/script, *map(str, args), "--json", f"{tmp}/told.json"], check=True)
        return dict(json.loads(Path(tmp, "told.json").read_text()), command=" ".join(["python", script, *map(str, args)]))

def kills(a): # one command after the other: what is done is kept
    for name in a.commands: yield name, told("tests/fuzz/kills.py", "--n", a.n, "--seed", a.seed, "--only", name)

def fuzz(a): yield "", told("tests/fuzz/fuzz.py", "--n", a.cases, "--seed", a.seed)

def pickles(a):
    "Programs that call what runs things, and files that claim or swell: every one must be an `InputError`, without a call, in bounded memory"
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from small import corpus
    from test_faults import BOMBS, harmless, programs, text

    from posefree_kit.checkpoints import import_official
    count = dict(programs=0, bombs=0)
    def refused(path):
        with harmless():
            try: import_official(path)
            except InputError: return
            raise AssertionError(f"expected it to be refused: {path.read_bytes()!r}")
    with tempfile.TemporaryDirectory() as tmp:
        corpus(tmp); import_official(Path(tmp)/"official.pkl")                  # what libraries do when they are first imported is not what a file does
        path = Path(tmp)/"x.pkl"
        @settings(max_examples=a.pickles, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(programs(), st.booleans())
        def attack(program, wrapped):
            path.write_bytes(b"\x80\x04}" + text("G_ema") + program[2:-1] + b"s." if wrapped else program)
            refused(path); count["programs"] += 1
        attack()
        for data in BOMBS.values(): path.write_bytes(data); refused(path); count["bombs"] += 1
    yield "", dict(count, refused=sum(count.values()), command=f"python tests/fuzz/report.py --only pickles --pickles {a.pickles}")

def batches(a): yield "", told("tests/benchmarks/scale.py", "--threads", a.threads, "--rounds", a.rounds, "--clock", a.clock, *(["--compiled"] if a.compiled else []))

def node(a): yield "", told("tests/fuzz/lost_node.py")

SECTIONS = dict(kills=kills, fuzz=fuzz, pickles=pickles, batches=batches, node=node)

def main():
    from kills import COMMANDS
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS)); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n", type=int, default=20, help="kills of each command"); p.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    p.add_argument("--cases", type=int, default=10_000, help="mutated files"); p.add_argument("--pickles", type=int, default=2000, help="hostile programs")
    p.add_argument("--threads", type=int, default=2); p.add_argument("--rounds", type=int, default=3); p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of images a second; cpu where the machine is busy"); p.add_argument("--compiled", action="store_true", help="count them with the compiled march")
    a = p.parse_args()
    for section in a.only:
        start = time.time()
        for name, figures in SECTIONS[section](a):
            faults = read_json(RESULTS) if RESULTS.exists() else {}
            figures = dict(figures, minutes=round((time.time() - start) / 60, 1)); start = time.time()
            if name: faults.setdefault(section, {})[name] = figures
            else: faults[section] = figures
            save_json(faults, RESULTS); print(f"{section} {name}: kept in {RESULTS.relative_to(ROOT)}", flush=True)

if __name__ == "__main__": main()
