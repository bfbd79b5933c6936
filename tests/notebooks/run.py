"""The notebooks as a regression test: papermill runs each with a profile's parameters, and its figures are compared with the goldens.

    python tests/notebooks/run.py                                # make test: short, on the CPU, on a copy of the tree
    python tests/notebooks/run.py --profile cuda                 # make test-cuda: the real settings
    python tests/notebooks/run.py --renew 12_optimiser           # accept what it gives now: in place, outputs kept, data/goldens written
"""
import json, math, os, platform, sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]/there) for i, there in ((1, "tools"), (2, ""))] # the kit too: where it is not installed, goldens would be lost after all that work
from chapters import arguments, run
from tree import ROOT, notebooks

GOLDENS = ROOT/"data"/"goldens"
PROFILES = dict(cpu=dict(device="cpu", steps=None, seed=0), cuda=dict(device="cuda", steps=350, seed=0)) # steps=None: the notebook's own, which are few
STEPS = {"08_training": 400, "10_features": 400, "train_your_own": 600, "why_pose_free": 400} # where 350 is not what is meant: minutes on a GPU, whose training steps wait for Python
# What a figure of that ending allows, until its line in the goldens says otherwise: which way is better, and how much worse it may get (a number in its unit, and a share of the golden).
RULES = (("time_ratio", "lower", 0., 1.5), ("_db", "higher", 1., .0), ("_deg", "lower", 1., .25), ("_r", "higher", .05, 0.), ("_auc", "higher", .03, 0.), ("_share", "higher", .05, 0.),
         ("_cosine", "higher", .05, 0.), ("_error", "lower", 1e-5, .5), ("_gain", "higher", 0., .5), ("_loss", "lower", 1e-3, .2), ("_count", "same", 0., 0.), ("", "same", 1e-6, .1))

def parameters(profile:str, name:str) -> dict:
    "What papermill gives to a notebook"
    p = PROFILES[profile]
    return dict(p, steps=STEPS.get(name, p["steps"]) if p["steps"] else None)

def rule(figure:str) -> dict:
    "How a new figure is judged, by the end of its name"
    _, better, atol, rtol = next(r for r in RULES if figure.endswith(r[0]))
    return dict(better=better, atol=atol, rtol=rtol)

def judged(found:float|None, golden:dict) -> str: # "": within what is allowed
    "Is a figure worse than its golden allows?"
    if found is None or not math.isfinite(found): return "missing" if found is None else f"{found}: no finite number"
    off = found - golden["value"]
    worse = dict(higher=-off, lower=off, same=abs(off))[golden["better"]]
    room = golden["atol"] + golden["rtol"] * abs(golden["value"])
    return f"{found:.5g}, golden {golden['value']:.5g} ({golden['better']} is better, {room:.2g} allowed)" if worse > room else ""

def compare(found:dict, golden:dict|None) -> tuple: # name -> number, name -> golden; -> failures, what moved, lines each
    "All figures of one notebook"
    if golden is None: return ["no goldens: --renew writes them"], []
    failures = [f"{k}: {why}" for k, g in golden.items() if (why := judged(found.get(k), g))]
    failures += [f"{k}: no golden: --renew writes it" for k in found if k not in golden]
    moved = [f"{k}: {g['value']:.5g} -> {found[k]:.5g}" for k, g in golden.items() if k in found and not judged(found[k], g) and abs(found[k] - g["value"]) > 1e-3 * abs(g["value"]) + 1e-9]
    return failures, moved

def renewed(found:dict, golden:dict|None) -> dict: # name -> golden
    "New values; directions and tolerances as they were"
    return {k: dict(value=round(v, 6) if abs(v) > .01 else float(f"{v:.4g}"), **{x: (golden or {}).get(k, rule(k))[x] for x in ("better", "atol", "rtol")}) for k, v in found.items()}

def figures(ran) -> dict: # of a notebook that ran: its own, and its time as a multiple of the calibration's
    return ran.figures | dict(time_ratio=ran.ending["time_ratio"])

def read(profile:str) -> dict|None:
    path = GOLDENS/f"{profile}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

def circumstances() -> dict: # what a golden was made with, so that a difference can be understood
    from importlib.metadata import version
    import torch
    from posefree_kit.checkpoints import read_card
    return dict(torch=version("torch"), python=platform.python_version(), machine=platform.machine(), threads=int(os.environ["OMP_NUM_THREADS"]), generator=read_card()["sha256"][:12], **(dict(device=torch.cuda.get_device_name()) if torch.cuda.is_available() else {}))

def report(profile:str, ran:dict, goldens:dict|None) -> int: # failures
    "Say of each notebook what moved, and what moved too far"
    bad = sum(bool(r.error) for r in ran.values())
    if goldens is None:
        print(f"no goldens of profile {profile} (data/goldens/{profile}.json): no such machine has run it yet; figures had to be there, and are compared with nothing. --renew writes them")
        return bad
    now, then = circumstances(), goldens["made_with"]
    for k in [k for k in then if then[k] != now.get(k)]: print(f"note: the goldens were made with {k} {then[k]}, this is {now.get(k)}")
    for name, r in sorted(ran.items()):
        if r.error: print(f"{name}: did not run well, nothing to compare"); continue
        failures, moved = compare(figures(r), goldens["notebooks"].get(name))
        print(f"{name}: {len(r.figures)} figures, {len(failures)} failed, {len(moved)} moved")
        for text in failures: print(f"  FAILED {text}")
        for text in moved: print(f"  moved  {text}")
        bad += bool(failures)
    return bad

def renew(profile:str, ran:dict, goldens:dict|None):
    "Write what the notebooks gave; those that did not run now keep theirs"
    from posefree_kit.core import save_json
    kept = (goldens or {}).get("notebooks", {})
    there = {p.stem for p in notebooks()}
    new = {k: v for k, v in kept.items() if k in there} | {name: renewed(figures(r), kept.get(name)) for name, r in ran.items() if not r.error}
    every = not goldens or all(name in ran and not ran[name].error for name in new) # of some, `made_with` would be false for the others
    save_json(dict(profile=profile, made_with=circumstances() if every else goldens["made_with"], notebooks=dict(sorted(new.items()))), GOLDENS/f"{profile}.json")
    print(f"data/goldens/{profile}.json: {sum(not r.error for r in ran.values())} of {len(new)} notebooks renewed")

def main() -> int:
    ap = arguments(__doc__.splitlines()[0])
    ap.add_argument("--profile", choices=[*PROFILES], default="cpu", help="cpu: short; cuda: the real settings")
    ap.set_defaults(timeout=None) # 600 on the CPU, 3600 with the real settings
    ap.add_argument("--renew", action="store_true", help="write the goldens; on the CPU it executes in place and keeps the outputs, as chapters.py --save")
    args = ap.parse_args()
    if args.profile == "cuda":
        import torch
        if not torch.cuda.is_available(): print("skipped: the CUDA profile needs a CUDA device, and torch sees none here"); return 0
    ran = run(args.names, args.renew and args.profile == "cpu", args.workers, args.flags.split(), args.timeout or (600 if args.profile == "cpu" else 3600), lambda path: parameters(args.profile, path.stem))
    goldens = read(args.profile)
    if args.renew: renew(args.profile, ran, goldens)
    bad = sum(bool(r.error) for r in ran.values()) if args.renew else report(args.profile, ran, goldens)
    print(f"notebooks, profile {args.profile}: {len(ran) - bad} passed, {bad} failed")
    return 1 if bad else 0

if __name__ == "__main__": sys.exit(main())
