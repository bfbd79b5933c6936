"""Train, invert, evaluate and scale, killed at random moments: what a rerun with --resume ends with is what an unbroken run ends with, to the bit.

    python tests/fuzz/kills.py --n 20 --seed 0

Half of the kills come at a random time, half in the middle of a random write or just before or after a random rename. Then: a full disk, and Ctrl-C.
"""
import argparse
import errno
import functools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch
from small import D8, G8, generator, picture
from typer.testing import CliRunner

from posefree_kit import cli, evaluation, optimiser, scale as many
from posefree_kit.core import sha256
from posefree_kit.optimiser import Stage, quick
from posefree_kit.training import TrainConfig, UnposedImages, fit

torch.set_num_threads(1)
print = functools.partial(print, flush=True)
short = lambda **changes: quick(**{**dict(candidates=8, starts=2, start_steps=1, stages=(Stage(1, 2, .02, False), Stage(2, 1, .01, True))), **changes})
optimiser.PRESETS["quick"] = short

def posefree(*args) -> tuple: # exit code, lines of stderr
    r = CliRunner().invoke(cli.app, [str(a) for a in args])
    if r.exception is not None and not isinstance(r.exception, SystemExit): raise r.exception
    return r.exit_code, [line for line in r.stderr.splitlines() if line.strip()]

# The four commands, in small

def train(home, out, resume):
    pictures = UnposedImages(torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    fit(pictures, out, G8, D8, TrainConfig(batch=2, hold_kimg=0.), kimg=.012, resume=resume, save_minutes=0., device="cpu", progress=False)

def invert(home, out, resume):
    code, err = posefree("invert", *(home/f"{i}.png" for i in range(3)), "--out", out, "--generator", home/"generator.safetensors", "--device", "cpu", "--no-progress", "--no-mesh", "--no-video", *(["--resume"] if resume else []))
    if code: print(*err, file=sys.stderr); sys.exit(code)

def evaluate(home, out, resume):
    code, err = posefree("evaluate", "--out", out, "--generator", home/"generator.safetensors", "--sets", "self", "--n", 5, "--batch", 2, "--device", "cpu", "--no-progress", *(["--resume"] if resume else []))
    if code: print(*err, file=sys.stderr); sys.exit(code)

def scale(home, out, resume):
    code, err = posefree("scale", "--input", home/"list.txt", "--out", out, "--generator", home/"generator.safetensors", "--local", "--batch", 2, "--cores", 1, "--device", "cpu", "--no-progress", "--no-mesh", "--no-video", *(["--resume"] if resume and (Path(out)/"run.json").exists() else []))
    if code: print(*err, file=sys.stderr); sys.exit(code)

COMMANDS = dict(train=train, invert=invert, evaluate=evaluate, scale=scale)
WRITES = dict(train=26, invert=18, evaluate=14, scale=22) # and renames of an unbroken run: one is drawn to be killed at
LOOSE = {"seconds", "peak_mb", "minutes", "img_per_s"} # time and memory

def tight(x): # without what differs from run to run
    if isinstance(x, dict): return {k: tight(v) for k, v in x.items() if k not in LOOSE}
    return [tight(v) for v in x] if isinstance(x, list) else x

def contents(out) -> dict: # file -> what must be the same
    "Every file of a run; JSON without times, tables that hold times left out"
    found = {}
    for p in sorted(Path(out).rglob("*")):
        name = p.relative_to(out).as_posix()
        if p.is_dir() or name in ("table.md", "table.csv") or name.startswith("figures/"): continue
        if p.suffix == ".json": found[name] = tight(json.loads(p.read_text()))
        elif p.suffix == ".parquet": found[name] = [tight(row) for row in many.need("pyarrow.parquet").read_table(p).to_pylist()]
        elif p.suffix == ".jsonl": found[name] = [tight(json.loads(line)) for line in p.read_text().splitlines()]
        else: found[name] = sha256(p)
    return found

# Faults

def child(f, *args) -> int: # pid
    "Run in a process of its own, with everything imported already"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)                        # a shell starts what runs in its background without
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        f(*args); code = 0
    except SystemExit as e: code = int(e.code or 0)
    except KeyboardInterrupt as e: print(e, file=sys.stderr); code = 130
    except BaseException as e: print(f"{type(e).__name__}: {e}", file=sys.stderr)
    finally: sys.stderr.flush(); os._exit(code)

def done(pid) -> int: # exit code, -9 where it was killed
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(k:int, r:random.Random):
    "Be killed at the k-th write or rename: half way, before or after it"
    left, replace, write = [k], os.replace, Path.write_bytes
    def at(before, do, half):
        left[0] -= 1
        if left[0]: return do()
        if before: half()
        else: do()
        os.kill(os.getpid(), signal.SIGKILL)
    how = r.random() < .5
    os.replace = lambda a, b: at(how, lambda: replace(a, b), lambda: None)
    Path.write_bytes = lambda p, data: at(how, lambda: write(p, data), lambda: write(p, data[:len(data) // 2]))

def killed(command, home, out, r:random.Random, seconds:float) -> str: # how
    "Start it, kill it; say how that went"
    writing = r.random() < .5
    k = r.randrange(1, WRITES[command.__name__] + 1)
    def run():
        if writing: die_at(k, r)
        command(home, out, False)
    pid = child(run)
    if not writing: time.sleep(r.uniform(0, seconds)); os.kill(pid, signal.SIGKILL)
    return f"{'in write or rename ' + str(k) if writing else 'at a random time'}: " + ("killed" if done(pid) == -9 else "was done before")

def prove(name:str, n:int, seed:int, folder:Path, say=print) -> int: # kills survived
    "n runs, each killed once and resumed; the result must be that of an unbroken run"
    command, home, r, count = COMMANDS[name], folder/"home", random.Random(f"{name} {seed}"), 0
    start = time.time()
    assert done(child(command, home, folder/f"{name}-whole", False)) == 0
    seconds, want = time.time() - start, contents(folder/f"{name}-whole")
    assert want
    for i in range(n):
        out = folder/f"{name}-{i}"
        how = killed(command, home, out, r, seconds)
        resume = name != "train" or (out/"run.state").exists()
        code = done(child(command, home, out, resume))
        got = contents(out) if out.exists() else {}
        other = [k for k in want.keys() | got.keys() if want.get(k) != got.get(k)]
        assert code == 0 and not other, f"{name} {i}, {how}: exit code {code}, differs in {other}"
        count += "killed" in how
    say(f"{name:9s} {count} kills in {n} runs survived: {len(want)} files the same as those of an unbroken run of {seconds:.1f} s")
    return count

def told(f) -> tuple: # exit code, what it said
    "A child's exit code and stderr"
    with tempfile.TemporaryFile() as err:
        def run(): os.dup2(err.fileno(), 2); f()
        code = done(child(run))
        err.seek(0)
        return code, err.read().decode()

def full_disk(folder:Path, names, say=print):
    "No file may grow beyond a limit: a clear error, and what was there before is intact; on a disk with room it goes on"
    home = folder/"home"
    def limited(command, out, most):
        def run(): signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)); command(home, out, True)
        return run
    for name, most, before in (("invert", 30_000, "0"), ("evaluate", 3_000, None), ("train", 10_000, None), ("scale", 20_000, None)):
        if name not in names: continue
        out, whole = folder/f"{name}-full", contents(folder/f"{name}-whole")
        if before is not None: # one image is done already
            posefree("invert", home/f"{before}.png", "--out", out, "--generator", home/"generator.safetensors", "--device", "cpu", "--no-progress", "--no-mesh", "--no-video")
        there = contents(out) if out.exists() else {}
        code, err = told(limited(COMMANDS[name], out, most))
        assert code and os.strerror(errno.EFBIG) in err and "Traceback" not in err, (name, code, err)
        after = contents(out)
        assert all(after[k] == v for k, v in there.items()) and not [p for p in Path(out).rglob(".*tmp*")], name
        assert done(child(COMMANDS[name], home, out, name != "train" or (Path(out)/"run.state").exists())) == 0 and contents(out) == whole, name
        say(f"{name:9s} on a full disk: {[line for line in err.splitlines() if line][-1][:150]}")

def ctrl_c(folder:Path, names, say=print):
    "Saved, and told how to go on"
    home = folder/"home"
    for name, text in (("train", "--resume goes on"), ("invert", "--resume"), ("evaluate", "--resume goes on"), ("scale", "--resume goes on")):
        if name not in names: continue
        out = folder/f"{name}-stopped"
        def run():
            first = {"train": (evaluation.Path, "write_text"), "invert": (cli, "skip"), "evaluate": (evaluation.RowFile, "append"), "scale": (many, "save_rows")}[name]
            f, seen = getattr(*first), []
            def spy(*args, **kwargs):
                seen.append(1)
                result = f(*args, **kwargs)
                if len(seen) == 2: os.kill(os.getpid(), signal.SIGINT)
                return result
            setattr(*first, spy)
            COMMANDS[name](home, out, False)
        code, err = told(run)
        assert code == 130 and text in err, (name, code, err)
        assert done(child(COMMANDS[name], home, out, True)) == 0 and contents(out) == contents(folder/f"{name}-whole"), name
        say(f"{name:9s} on Ctrl-C: {err.splitlines()[-1][:150].replace(str(folder) + '/', '')}")

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--n", type=int, default=20); p.add_argument("--seed", type=int, default=0); p.add_argument("--only", choices=list(COMMANDS)); p.add_argument("--json", type=Path, help="write the counts here too")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp); (folder/"home").mkdir()
        generator(folder/"home"/"generator")
        for i in range(3): picture(i, 32).save(folder/"home"/f"{i}.png")
        (folder/"home"/"list.txt").write_text("".join(f"{i}.png\n" for i in range(3)))
        names = [a.only] if a.only else list(COMMANDS)
        survived = {name: prove(name, a.n, a.seed, folder) for name in names}
        full_disk(folder, names); ctrl_c(folder, names)
    if a.json: a.json.write_text(json.dumps(dict(runs=a.n * len(names), kills=sum(survived.values()), full_disks=len(names), ctrl_c=len(names))))

if __name__ == "__main__": main()
