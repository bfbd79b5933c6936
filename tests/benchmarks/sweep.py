"""What each knob of `invert` is worth: one changed at a time, on the generator's own samples and on people of no benchmark set.

    python tests/benchmarks/sweep.py runs/sweep base no_mv noise_0     # some settings (all by default); can be stopped and started again, and run beside others
    python tests/benchmarks/sweep.py runs/sweep --report data/results/sweep.json

Chapter 12 shows the report. Images are inverted together with the preset `quick`; every difference is paired, image by image, with `base`, what `quick` was before.
"""
import argparse, dataclasses, json
from pathlib import Path

import torch

from posefree_kit.checkpoints import load_generator
from posefree_kit.evaluation import ABLATIONS, SELF, evaluate, interval, paired, pose_errors, read_rows
from posefree_kit.optimiser import Stage, constant, paper, quick
from posefree_kit.portraits import HELD_OUT, draw

FIRST = HELD_OUT + 700_000 # people of no set of `evaluation.SETS`
FIGURES = ("psnr", "ms_ssim_dist", "id", "novel_psnr_30", "depth_corr", "pose_yaw_deg")

change = lambda **k: lambda c: dataclasses.replace(c, **k)
stages = lambda one, two, layers=False, steps=(150, 200): change(stages=(Stage(steps[0], 2, one, layers), Stage(steps[1], 1, two, True))) # a step at full resolution costs about four at half
long = lambda one, two: paper(stages=(Stage(400, 2, one, True), Stage(600, 1, two, True)))
SETTINGS = dict( # name -> configuration -> configuration
    base=lambda c: c, # what `quick` was before this sweep; `fastest_at_once` is what it is since
    **{k: ABLATIONS[k] for k in ("no_mv", "no_geo", "no_id", "one_stage", "no_curriculum")},
    noise_0=change(noise=0.), noise_15=change(noise=.15),
    slower=stages(.01, .015), faster=stages(.03, .05), fastest=stages(.05, .08), fastest_at_once=stages(.05, .08, True), fastest_yet=stages(.1, .15), fastest_yet_at_once=stages(.08, .12, True), second_faster=stages(.02, .05), faster_at_once=stages(.03, .05, True), faster_long_half=stages(.03, .05, steps=(350, 150)),
    layers_at_once=stages(.02, .03, True),
    perceptual_04=change(perceptual_weight=.4), perceptual_16=change(perceptual_weight=1.6),
    prior_1=change(w_prior=1e-3), prior_20=change(w_prior=2e-2), delta_prior_01=change(delta_prior=1e-4),
    id_half=change(id=constant(.1)), geo_tenth=change(geo=constant(.01)),
    mv_small=change(mv=constant(.02)), mv_depth=change(mv_grad_depth=True),
    clip_5=change(clip=5.), starts_6=change(candidates=1024, starts=6),
    paper_slower=lambda c: long(.02, .04), paper=lambda c: long(.05, .08))

def people(n:int) -> list: # seeds: half of them seen from the side
    "The first from FIRST on: n // 2 with |yaw| of 30 to 60 degrees, the others under 20"
    seeds = torch.arange(FIRST, FIRST + 1000)
    yaw = torch.rad2deg(draw(seeds, torch.zeros_like(seeds))[0]["yaw"]).abs()
    side, front = (seeds[m].tolist() for m in ((yaw >= 30) & (yaw <= 60), yaw < 20))
    return side[:n // 2] + front[:n - n // 2]

def report(rows:list) -> dict: # set -> setting -> figures: (mean, low, high), and of the difference to base
    out = {}
    for s in sorted({r["set"] for r in rows}):
        of = {k: pose_errors([r for r in rows if (r["set"], r["setting"]) == (s, k)]) for k in SETTINGS}
        out[s] = {k: dict(n=len(v), seconds=round(sum(r["seconds"] for r in v) / len(v), 1), config=v[0]["config"], **{f: interval([r[f] for r in v]) for f in FIGURES},
                          minus_base={f: list(paired(v, of["base"], f).values())[:3] for f in FIGURES}) for k, v in of.items() if v}
    return out

if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out", type=Path); a.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS)); a.add_argument("--n", type=int, default=8); a.add_argument("--report", type=Path); a.add_argument("--generator", default="portraits")
    a = a.parse_args()
    if unknown := set(a.settings) - set(SETTINGS): raise SystemExit(f"expected settings among {', '.join(SETTINGS)}; got {', '.join(sorted(unknown))}")
    a.out.mkdir(parents=True, exist_ok=True)
    if a.report:
        rows = [r | dict(setting=f.stem.split(".")[0]) for f in sorted(a.out.glob("*.jsonl")) for r in read_rows(f)]
        one = lambda key: sorted({str(r[key]) for r in rows})
        a.report.write_text(json.dumps(dict(generator=one("generator"), sha256=one("sha256"), preset=one("preset"), device=one("device"), sets=report(rows)), indent=1) + "\n", encoding="utf-8")
    else:
        G = load_generator(a.generator, "cpu"); G.compile_march()
        for images, name in ((people(a.n), "seeds"), (SELF, SELF)):
            for k in a.settings or SETTINGS:
                rows = evaluate("latent", images, G, SETTINGS[k](stages(.02, .03)(quick())), n=a.n, batch=8, out=a.out/f"{k}.{name}.jsonl", resume=True, progress=False)
                print(k, name, {f: round(sum(r[f] for r in rows) / len(rows), 4) for f in FIGURES[:-1]}, round(sum(r["seconds"] for r in rows) / len(rows), 1), flush=True)
