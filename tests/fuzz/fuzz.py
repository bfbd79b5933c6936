"""Mutated images, checkpoints and configurations: only `InputError` may come out, in 5 seconds and 1 GB each.

    python tests/fuzz/fuzz.py --n 10000 --seed 0
"""
import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from small import corpus, header, with_header

from posefree_kit.baselines import read_latent_encoder
from posefree_kit.checkpoints import import_official, load_generator
from posefree_kit.core import InputError, config_from_dict, load_image, read_json, save_json, sha256, tensor_digest
from posefree_kit.evaluation import parse_rows, read_views
from posefree_kit.features import load_encoder
from posefree_kit.generator import GeneratorConfig
from posefree_kit.training import load_state
from posefree_kit.viewer import config_of, load_latent

SECONDS, MEGABYTES = 5., 1000.
TIMERS = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: 12 * SECONDS} # of the process; on the clock, since a machine may be busy with other things

class Hang(BaseException): "More than SECONDS"

# Mutations

def bytes_of(data:bytes, r:random.Random) -> bytes:
    "A few changes anywhere, more of them near the beginning, where the headers are"
    b = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 4, 16))):
        if not b: break
        at = r.randrange(min(len(b), 200) if r.random() < .5 else len(b))
        kind = r.randrange(7)
        if kind == 0: b[at] ^= 1 << r.randrange(8)
        elif kind == 1: b[at] = r.choice((0, 1, 0x7f, 0x80, 0xff, r.randrange(256)))
        elif kind == 2: b[at:at + 4] = r.choice((b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff" * 4, b"\0" * 4, r.randbytes(4)))
        elif kind == 3: b[at:at + 8] = r.choice((b"\0" * 8, b"\xff" * 8, (2 ** 31).to_bytes(8, "little"), (2 ** 40).to_bytes(8, "little")))
        elif kind == 4: del b[at:at + r.choice((1, 3, 50, len(b)))]
        elif kind == 5: b[at:at] = r.randbytes(r.choice((1, 5, 200)))
        else: n = r.randrange(1, 64); to = r.randrange(len(b)); b[to:to + n] = b[at:at + n]
    return bytes(b)

def odd(r:random.Random, old):
    "A value that does not belong there"
    deep = []
    for _ in range(r.choice((3, 60))): deep = [deep]
    number = old if isinstance(old, (int, float)) and not isinstance(old, bool) else 1
    return r.choice((None, True, -1, 0, 1, 3, 2 ** 31, 2 ** 63, 10 ** 30, 1e308, -1e-300, float("nan"), float("inf"), "", "x", "x" * 5000, "../../etc", [], {}, [0], [1e9] * 5, [4] * 5000, {"a": 1}, deep, -number, number * 1000, number * .5, number + 1))

def json_of(value, r:random.Random):
    "One or two changes somewhere in a JSON value"
    value = json.loads(json.dumps(value))
    for _ in range(r.choice((1, 1, 2))):
        parent, key, here = None, None, value
        while isinstance(here, (dict, list)) and here and r.random() < .9:
            parent, key = here, r.choice(list(here) if isinstance(here, dict) else range(len(here))); here = parent[key]
        if parent is None: return odd(r, value)
        kind = r.randrange(5)
        if kind == 0: del parent[key]
        elif kind == 1 and isinstance(parent, dict): parent[r.choice(("unknown", key + "x", ""))] = odd(r, here)
        else: parent[key] = odd(r, here)
    return value

# What is read, and how a file of it is made

def in_header(path:Path, r:random.Random):
    "Change the header of a .safetensors file: shapes, types, places, or the settings in its metadata"
    head, numbers = header(path.read_bytes())
    meta, name = head.get("__metadata__", {}), r.choice([k for k in head if k != "__metadata__"])
    if meta and r.random() < .45:
        key = r.choice(list(meta)); meta[key] = json.dumps(json_of(json.loads(meta[key]), r)) if r.random() < .9 else "{" * 2000
    else: head[name] = json_of(head[name], r)
    path.write_bytes(with_header(head, numbers))

def redigest(path:Path):
    "Make the SHA-256 inside right again, so that what comes after it is reached"
    from posefree_kit.core import open_tensors
    with contextlib.suppress(Exception):
        with open_tensors(path) as (f, values): tensors = {k: f.get_tensor(k) for k in f.keys()}
        values.pop("sha256", None)
        head, numbers = header(path.read_bytes())
        head["__metadata__"]["sha256"] = json.dumps(tensor_digest(tensors, values))
        path.write_bytes(with_header(head, numbers))

def mutate(path:Path, r:random.Random):
    if path.suffix == ".json" and r.random() < .8: path.write_text(json.dumps(json_of(json.loads(path.read_text()), r))); return
    if path.suffix in (".safetensors", ".state") and r.random() < .7: in_header(path, r); return
    path.write_bytes(bytes_of(path.read_bytes(), r))

def carded(load):
    "A file and its card: either is changed, and mostly the card's SHA-256 is made right again"
    def run(folder, name, r):
        path = folder/name; card = path.with_suffix(".json")
        mutate(r.choice((path, path, card)), r)
        if r.random() < .8:
            with contextlib.suppress(InputError): save_json(read_json(card) | dict(sha256=sha256(path)), card)
        load(path)
    return run

def plain(load, digest=False):
    def run(folder, name, r):
        mutate(folder/name, r)
        if digest and r.random() < .8: redigest(folder/name)
        load(folder/name)
    return run

def official(folder, name, r):
    mutate(folder/r.choice((name, "official.json") if name.endswith("s") else (name,)), r)
    import_official(folder/name, None if name.endswith(".pkl") else folder/"official.json")

def settings(folder, name, r):
    if r.random() < .5: config_of(json_of(read_json(folder/"quick.json"), r))
    else: config_from_dict(GeneratorConfig, json_of(read_json(folder/"generator.json")["generator"], r))

KINDS = dict( # name -> (how often, files, how one is changed and read)
    image=(40, None, plain(load_image)),
    generator=(12, ("generator.safetensors",), carded(lambda p: load_generator(p, "cpu"))),
    encoder=(8, ("encoder.safetensors",), carded(load_encoder)),
    latent_encoder=(8, ("latent_encoder.safetensors",), carded(read_latent_encoder)),
    latent=(6, ("latent.safetensors",), plain(load_latent, True)),
    state=(6, ("run.state", "encode.state"), plain(load_state, True)),
    official=(6, ("official.pkl", "official.pkl", "official.safetensors", "official.pt"), official),
    views=(5, ("views.json",), plain(lambda p: read_views(p.parent))),
    rows=(3, ("rows.jsonl",), plain(lambda p: parse_rows(p.read_bytes(), p.name))),
    config=(6, ("quick.json",), settings))

def forget(): # the peak so far, where the system keeps one
    with contextlib.suppress(OSError): Path("/proc/self/clear_refs").write_text("5")
def told(key) -> float: return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024 if Path("/proc/self/status").exists() and os.access("/proc/self/clear_refs", os.W_OK) else 0. # elsewhere memory is not watched
def peak_mb() -> float: return told("VmHWM")
def now_mb() -> float: return told("VmRSS")

def one(kind:str, seed:int, good:Path, images:list) -> tuple: # what came out, seconds, megabytes, more
    "One case: a fresh copy of the files, one changed, read"
    r = random.Random(f"{kind} {seed}")
    _, files, run = KINDS[kind]
    name = r.choice([p.name for p in images] if files is None else files)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for p in good.glob("official.*" if kind == "official" else "*.json" if kind in ("config", "views") else f"{Path(name).stem}.*"): shutil.copy(p, folder)
        forget()
        before, start = now_mb(), time.process_time()
        for timer, limit in TIMERS.items(): signal.setitimer(timer, limit)
        try: run(folder, name, r); out, more = "accepted", ""
        except InputError as e: out, more = ("refused", "") if "\n" not in str(e) and len(str(e)) < 4000 else ("WRONG", f"a long message of {len(str(e))}: {str(e)[:200]}")
        except Hang: out, more = "HANG", ""
        except Exception as e: out, more = "WRONG", f"{type(e).__name__}: {str(e)[:200]}"
        finally:
            for timer in TIMERS: signal.setitimer(timer, 0)
        seconds, mb = time.process_time() - start, peak_mb() - before
    if mb > MEGABYTES: out, more = "LARGE", f"{mb:.0f} MB"
    return out, seconds, mb, more

def fuzz(n:int, seed:int, folder, minutes:float=1e9, say=print) -> dict: # kind -> Counter of what came out, with the slowest and the largest
    "n cases, shared out over the kinds"
    def hang(*_): raise Hang
    for s in (signal.SIGALRM, signal.SIGPROF): signal.signal(s, hang)
    good = Path(folder)
    images = corpus(good)["images"]
    (good/"rows.jsonl").write_text('{"set": "self", "image": 1, "method": "m", "psnr": 1.5}\n' * 3)
    r, weights, found = random.Random(seed), [k[0] for k in KINDS.values()], {k: collections.Counter() for k in KINDS}
    worst = {k: [0., 0.] for k in KINDS}
    start = time.time()
    for i in range(n):
        if time.time() - start > 60 * minutes: say(f"stopped after {minutes:g} minutes and {i} cases"); break
        kind = r.choices(list(KINDS), weights)[0]
        case = seed * 1_000_000 + i
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            out, seconds, mb, more = one(kind, case, good, images)
        found[kind][out] += 1
        worst[kind] = [max(worst[kind][0], seconds), max(worst[kind][1], mb)]
        if out not in ("refused", "accepted"): say(f"{kind} {case}: {out} {more}")
    return {k: dict(c, seconds=round(worst[k][0], 2), mb=round(worst[k][1], 1)) for k, c in found.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--n", type=int, default=10_000); p.add_argument("--seed", type=int, default=0); p.add_argument("--minutes", type=float, default=1e9); p.add_argument("--json", type=Path, help="write the counts here too")
    a = p.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    with tempfile.TemporaryDirectory() as tmp: found = fuzz(a.n, a.seed, tmp, a.minutes)
    print(f"{'kind':16s}{'refused':>9s}{'accepted':>9s}{'wrong':>7s}{'slowest':>9s}{'most MB':>9s}")
    total = collections.Counter()
    for kind, c in found.items():
        bad = sum(c.get(k, 0) for k in ("WRONG", "HANG", "LARGE"))
        total.update(refused=c.get("refused", 0), accepted=c.get("accepted", 0), wrong=bad)
        print(f"{kind:16s}{c.get('refused', 0):9d}{c.get('accepted', 0):9d}{bad:7d}{c['seconds']:8.2f}s{c['mb']:9.1f}")
    print(f"{'in all':16s}{total['refused']:9d}{total['accepted']:9d}{total['wrong']:7d}")
    if a.json: a.json.write_text(json.dumps(dict(cases=sum(total.values()), **total, slowest_s=max(c["seconds"] for c in found.values()), most_mb=max(c["mb"] for c in found.values()), kinds=found)))
    sys.exit(bool(total["wrong"]))

if __name__ == "__main__": main()
