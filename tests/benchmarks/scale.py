"""Images a second when B images share an optimisation, B = 1, 2, 4, 8, interleaved in one run.

    python tests/benchmarks/scale.py --threads 2 --rounds 3

A whole inversion is its parts times their numbers: the start search, the brief steps of the starts, the steps of each stage. Each part is timed for a few steps (its median over
the rounds), once for each B in turn, so that a machine's moods touch all alike. `--clock cpu` counts the processor's seconds instead of those on the wall: the same on an idle machine
with one thread, and the only figure that means anything on a busy one.
"""
import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from posefree_kit.checkpoints import load_generator
from posefree_kit.core import load_image
from posefree_kit.features import load_identity, load_perceptual
from posefree_kit.optimiser import PRESETS, InvertState, Networks, Stage, candidates, constant, run
from posefree_kit.scale import keep_memory

PORTRAITS = sorted((Path(__file__).resolve().parents[2]/"data").glob("portrait_*.png"))
CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)

def parts(config) -> dict: # part -> how many steps of it a whole inversion has
    "What an inversion is made of"
    return dict(search=1, starts=config.start_steps, **{f"stage {i + 1}": s.steps for i, s in enumerate(config.stages)})

def timed(part:str, nets, target, config, steps:int, clock) -> float: # seconds a step (of the search: in all)
    "Run a part for a few steps"
    G, device = nets.generator, target.device
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if part == "search":
        start = clock(); candidates(G, target, config); sync()
        return clock() - start
    if part == "starts": # as `search_start` runs them: all starts of all images together, without the losses that come later
        many, s = target.repeat_interleave(config.starts, 0), config.stages[0]
        config = dataclasses.replace(config, space="w", mv=constant(0.), geo=constant(0.), id=constant(0.), noise=0.)
    else:
        many, s = target, config.stages[int(part[-1]) - 1]
        late = .25 if part.endswith("1") else .75 # weights of the middle of the stage
        config = dataclasses.replace(config, **{k: constant(getattr(config, k)(late)) for k in ("rec", "id", "mv", "geo")})
    config = dataclasses.replace(config, stages=(Stage(steps, s.shrink, s.rate, s.layers),))
    state = InvertState(G.w_avg[None].repeat(len(many), 1))
    std = clock(); G.mapping(G.draw(512, config.seed)).std(0); std = clock() - std # once a run, not once a step
    start = clock(); run(nets, many, config, state); sync()
    return max(clock() - start - std, 0) / steps

def measure(batches=(1, 2, 4, 8), rounds:int=3, steps:int=4, preset:str="quick", device:str="cpu", clock:str="wall", generator:str="portraits", compiled:bool=False, say=print) -> dict:
    "Seconds of each part for each batch, and what follows for whole inversions"
    keep_memory() # as a worker does
    G = load_generator(generator, device)
    if compiled: G.compile_march()
    config = PRESETS[preset]()
    nets = Networks(G, load_perceptual(config.perceptual, device=device), load_identity(config.identity, device=device))
    images = torch.cat([load_image(p, G.resolution) for p in PORTRAITS])
    images = images.repeat(-(-max(batches) // len(images)), 1, 1, 1).to(G.w_avg.device)
    took = {b: {k: [] for k in parts(config)} for b in batches}
    for r in range(rounds):
        for k in parts(config):
            for b in batches: took[b][k].append(timed(k, nets, images[:b], config, steps, CLOCKS[clock]))
        say(f"round {r + 1} of {rounds}")
    each = {b: {k: statistics.median(v) * parts(config)[k] for k, v in t.items()} for b, t in took.items()} # seconds of a whole inversion of b images
    rows = [dict(batch=b, seconds=round(sum(t.values()), 2), images_per_s=b / sum(t.values()), **{k: round(v, 2) for k, v in t.items()}) for b, t in each.items()]
    for r in rows: r["ratio"] = round(r["images_per_s"] / rows[0]["images_per_s"], 2); r["images_per_s"] = round(r["images_per_s"], 5)
    return dict(generator=G.name, sha256=G.sha256[:12], resolution=G.resolution, preset=preset, steps=config.steps, compiled=compiled, device=str(G.w_avg.device), threads=torch.get_num_threads(), cores=os.cpu_count(), clock=clock, rounds=rounds, steps_timed=steps, rows=rows)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8]); p.add_argument("--rounds", type=int, default=3); p.add_argument("--steps", type=int, default=4)
    p.add_argument("--preset", default="quick"); p.add_argument("--device", default="cpu"); p.add_argument("--threads", type=int, default=2); p.add_argument("--clock", choices=list(CLOCKS), default="wall"); p.add_argument("--compiled", action="store_true"); p.add_argument("--json", type=Path)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    found = measure(a.batches, a.rounds, a.steps, a.preset, a.device, a.clock, compiled=a.compiled, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{found['generator']} {found['sha256']}, {found['resolution']} pixels, preset {found['preset']}, {found['device']}, {found['threads']} thread(s), {found['clock']} clock, median of {found['rounds']} rounds")
    print(f"{'batch':>5s}{'images/s':>10s}{'ratio':>7s}   seconds of: " + ", ".join(parts(PRESETS[a.preset]())))
    for r in found["rows"]: print(f"{r['batch']:5d}{r['images_per_s']:10.4f}{r['ratio']:7.2f}   " + "  ".join(f"{r[k]:.1f}" for k in parts(PRESETS[a.preset]())))
    if a.json: a.json.write_text(json.dumps(found, indent=1) + "\n")

if __name__ == "__main__": main()
