"""How fast is the generator, against the same function written straightforwardly? Parts, whole inversion steps and several views, paired and interleaved in one process.

    python tests/benchmarks/generator.py --models kit64 kit128 --repeats 7 --out data/results/benchmark_generator
    python tests/benchmarks/generator.py --models ffhq256 --repeats 2 --out data/results/benchmark_generator
    python tests/benchmarks/generator.py --models official.json --device cuda --repeats 30
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import naive
from posefree_kit.benchmark import Clock, Memory, floor
from posefree_kit.camera import Pose, intrinsics
from posefree_kit.checkpoints import official_config, read_card
from posefree_kit.core import InputError, config_from_dict, config_to_dict, resolve_device, save_json, whole_file
from posefree_kit.generator import GeneratorConfig, Planes, pof3d_config
from posefree_kit.pose import PoseFreeGenerator

def model(name:str) -> GeneratorConfig:
    "A named structure, a shipped generator's, or a JSON file of options (ours or official)"
    kit = lambda: config_from_dict(GeneratorConfig, read_card("portraits")["generator"])
    if name == "kit64": return kit()
    if name == "kit128": return dataclasses.replace(kit(), channels=(*kit().channels, 16), render_resolution=128)
    if name == "ffhq256": return pof3d_config(march="eg3d", pose_rule="look_at", superres_noise=True)
    if Path(name).suffix != ".json": return config_from_dict(GeneratorConfig, read_card(name)["generator"])
    options = json.loads(Path(name).read_text(encoding="utf-8"))
    try: return config_from_dict(GeneratorConfig, options)
    except InputError: return official_config(options)

def build(config:GeneratorConfig, device) -> tuple: # the kit's generator with fixed weights, and one whose weights take gradients
    torch.manual_seed(0)
    G = PoseFreeGenerator(config)
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"): p.data.fill_(.1)
    G = G.to(device).eval()
    return copy.deepcopy(G).requires_grad_(False), G

class Work:
    "Everything that is timed, for one model: each function once by the kit and once naively"
    def __init__(self, config:GeneratorConfig, device, views:int):
        self.config, self.views = config, views
        self.G, self.N = build(config, device)
        with torch.no_grad():
            w = self.G.mapping(torch.randn(1, config.z_dim, device=device))
            self.ws, self.planes = self.G.expand_ws(w), self.G.planes(w)
            self.angles = torch.tensor([[.2, .1]], device=device)
            self.seen = self.G.render(self.planes, Pose.of(self.angles))
        self.around = torch.stack([torch.linspace(-.4, .4, views, device=device), torch.zeros(views, device=device)], -1)
        self.target = torch.rand_like(self.seen.rgb) * 2 - 1
        self.bare = [copy.copy(m) for m in (self.G, self.N)] # without super-resolution: a shallow copy that shares the weights
        for m in self.bare: m._modules = dict(m._modules); m._modules["superres"] = None

    def planes_of(self, m, ws): return naive.planes(m, ws) if m in (self.N, self.bare[1]) else m.planes(ws)
    def render(self, m, planes, pose, **kw): return naive.render(m, planes, pose) if m in (self.N, self.bare[1]) else m.render(planes, pose, **kw)
    def leaves(self, *tensors): return [x.detach().clone().requires_grad_() for x in tensors]
    def done(self, m, leaves): # what the backward pass left in the weights goes, as an optimiser's `zero_grad` would
        for p in m.parameters(): p.grad = None
        return [x.grad for x in leaves]

    def step(self, m, fixed:bool=False): # one step of an inversion with a squared error; fixed: the camera needs no gradient
        ws, angles = self.leaves(self.ws, self.angles)
        view = self.render(m, self.planes_of(m, ws), Pose.of(angles.detach() if fixed else angles))
        (view.rgb - self.target).square().mean().backward()
        return [view.rgb.detach(), *self.done(m, [ws] if fixed else [ws, angles])]

    def backbone(self, m):
        ws, = self.leaves(self.ws)
        out = self.planes_of(m, ws).features
        (out * self.planes.features).sum().backward()
        return [out.detach(), *self.done(m, [ws])]

    def volume(self, m):
        m = self.bare[m is self.N]
        features, angles = self.leaves(self.planes.features, self.angles)
        view = self.render(m, Planes(features, self.planes.w_last), Pose.of(angles))
        (view.rgb.square().mean() + view.depth.mean()).backward()
        return [view.rgb.detach(), *self.done(m, [features, angles])]

    def superres(self, m):
        features, w = self.leaves(self.features, self.planes.w_last)
        s, noise = m.superres, self.config.march == "eg3d" and self.config.superres_noise
        if m is self.N:
            rgb, x = features[:, :3], features
            if x.shape[-1] != s.size and (s.shrink or x.shape[-1] < s.size): rgb, x = (torch.nn.functional.interpolate(v, (s.size,) * 2, mode="bilinear", align_corners=False, antialias=s.antialias) for v in (rgb, x))
            for b in s.blocks: x, rgb = naive.block(b, x, rgb, w[:, None].expand(-1, 3, -1), noise)
        else: rgb = s(features[:, :3], features, w, noise)
        (rgb - self.target).square().mean().backward()
        return [rgb.detach(), *self.done(m, [features, w])]
    features = property(lambda self: torch.randn(1, self.config.features, *self.seen.rgb_raw.shape[-2:], generator=torch.Generator().manual_seed(0)).to(self.target))

    @torch.no_grad()
    def several(self, m): # novel views of one latent: the kit draws the planes once
        poses = Pose.of(self.around)
        if m is self.N: return [torch.cat([self.render(m, self.planes_of(m, self.ws), poses[[i]]).rgb for i in range(self.views)])]
        planes = m.planes(self.ws)
        return [torch.cat([m.render(planes, poses[[i]]).rgb for i in range(self.views)])]

def difference(a:list, b:list) -> float:
    "The largest difference, relative to the largest number, over values and gradients"
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))

def counted(f, memory) -> tuple: # what it returns, GFLOP of convolutions and matrix products, MB
    with memory, FlopCounterMode(display=False) as flops: out = f()
    return out, flops.get_total_flops() / 1e9, memory.mb

def compare(name:str, fast, slow, clock:Clock, device, repeats:int) -> dict:
    "One row: both for memory and operations (quick ones twice, since libraries keep something of each new size), then in turns"
    if clock(fast) < 2: slow()
    (a, gflop, mb), (b, gflop_naive, mb_naive) = counted(fast, Memory(device)), counted(slow, Memory(device))
    error = difference(a, b)
    del a, b
    pairs = [(clock(fast), clock(slow)) for _ in range(repeats)]
    row = dict(part=name, seconds=statistics.median(p[0] for p in pairs), naive_seconds=statistics.median(p[1] for p in pairs), ratio=statistics.median(p[1] / p[0] for p in pairs), ratios=[p[1] / p[0] for p in pairs],
               gflop=gflop, naive_gflop=gflop_naive, mb=mb, naive_mb=mb_naive, difference=error)
    print(f"  {name}: {row['seconds']:.3f} s against {row['naive_seconds']:.3f}, {row['ratio']:.2f} x; {gflop:.1f} GFLOP against {gflop_naive:.1f}; {mb or 0:.0f} MB against {mb_naive or 0:.0f}; difference {error:.0e}", flush=True)
    return row

@contextlib.contextmanager
def tf32(on:bool=True):
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try: yield
    finally: torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old

class GraphStep:
    "The whole step as one CUDA graph: fixed shapes, the same memory every time, one launch"
    def __init__(self, work:Work, autocast=contextlib.nullcontext):
        c, G, self.target = work.config, work.G, work.target.clone()
        self.ws, self.angles = work.leaves(work.ws, work.angles)
        k = intrinsics(c.focal, 1, work.ws.device)
        def step():
            with autocast(): view = G.render(G.planes(self.ws), Pose.of(self.angles), intrinsics=k)
            loss = (view.rgb - self.target).square().mean()
            return view.rgb.detach(), *torch.autograd.grad(loss, (self.ws, self.angles))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): step() # libraries choose their algorithms before anything is recorded
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph): self.out = step()
    def __call__(self): self.graph.replay(); return list(self.out)

def variants(work:Work, clock:Clock, device, repeats:int, want:list) -> list: # rows: the step in other ways, against the kit's plain float32 step
    "What else could be done, and what it costs in accuracy"
    bf16 = lambda: torch.autocast("cuda", torch.bfloat16)
    def last(): # weights with channels last make cuDNN's convolutions so
        G = copy.deepcopy(work.G).to(memory_format=torch.channels_last)
        return lambda: work.step(G)
    def half(step=work.step, G=None):
        G = G or copy.deepcopy(work.G).to(memory_format=torch.channels_last)
        def f():
            with bf16(): return step(G)
        return f
    graphs = dict(graph=lambda: GraphStep(work), graph_bf16=lambda: GraphStep(work, bf16))
    ways = dict(fixed_camera=lambda: lambda: work.step(work.G, True))
    if device.type == "cuda": ways |= dict(tf32=lambda: lambda: work.step(work.G), channels_last=last, bf16=half) | graphs
    elif work.config.march == "plain":
        def compiled():
            G = copy.deepcopy(work.G).compile_march()
            return lambda: work.step(G)
        ways["compiled_march"] = compiled
    rows, base = [], work.step(work.G)
    for name in (n for n in want if n in ways) if want else ways:
        try:
            with tf32(name == "tf32" or "bf16" in name):
                f = ways[name]()
                out = f()
                pairs = [(clock(f), clock(lambda: work.step(work.G))) for _ in range(repeats)]
        except (RuntimeError, InputError) as e: # a graph that cannot be recorded, no compiler: told, not hidden
            rows.append(dict(variant=name, failed=str(e).strip().splitlines()[0])); print(f"  {name}: failed: {rows[-1]['failed']}", flush=True)
            continue
        rows.append(dict(variant=name, seconds=statistics.median(p[0] for p in pairs), ratio=statistics.median(p[1] / p[0] for p in pairs), difference=difference(out[:2], base[:2])))
        print(f"  {name}: {rows[-1]['seconds']:.4f} s, {rows[-1]['ratio']:.2f} x the kit's step; difference {rows[-1]['difference']:.0e}", flush=True)
    return rows

def measure(name:str, a) -> dict:
    "All rows of one model"
    device = resolve_device(a.device)
    small = Work(pof3d_config(width=16, samples=4, fine_samples=4, render_resolution=16, march="eg3d"), device, 1)
    for m in (small.G, small.N): small.step(m) # libraries set themselves up: not a part of any model's memory or time
    clock, work = Clock(device), Work(model(name), device, a.views)
    G, N = work.G, work.N
    count = sum(p.numel() for p in G.parameters())
    print(f"{name}: {count / 1e6:.2f} M parameters, {work.config.resolution} pixels a side", flush=True)
    parts = dict(step="inversion step", several=f"{a.views} views", backbone="backbone", volume="volume renderer", superres="super-resolution")
    rows = [compare(label, lambda: getattr(work, part)(G), lambda: getattr(work, part)(N), clock, device, a.repeats)
            for part, label in parts.items() if (not a.parts or part in a.parts) and (part != "superres" or G.superres is not None)]
    return dict(model=name, parameters=count, config=config_to_dict(work.config), views=a.views, device=device.type, threads=torch.get_num_threads(), clock=clock.name, repeats=a.repeats, torch=torch.__version__,
                floor=floor(clock, device), rows=rows, variants=variants(work, clock, device, a.repeats, a.variants) if a.variants != ["none"] else [])

def markdown(results:list) -> str:
    "The tables of a result file"
    number = lambda x, form: "-" if x is None else format(x, form)
    lines = []
    for r in results:
        lines += [f"### {r['model']}: {r['parameters'] / 1e6:.2f} M parameters, {r['device']}, {r['threads']} thread(s), median of {r['repeats']} pairs, {r['clock']}", "",
                  "| forward and backward | kit s | naive s | naive / kit | kit GFLOP | naive GFLOP | kit MB | naive MB | difference |", "|---|---|---|---|---|---|---|---|---|"]
        lines += [f"| {x['part']} | {x['seconds']:.3f} | {x['naive_seconds']:.3f} | **{x['ratio']:.2f}** | {x['gflop']:.1f} | {x['naive_gflop']:.1f} | {number(x['mb'], '.0f')} | {number(x['naive_mb'], '.0f')} | {x['difference']:.0e} |" for x in r["rows"]]
        lines += [""] + [f"- step, {v['variant'].replace('_', ' ')}: " + (f"not measured: {v['failed']}" if "failed" in v else f"{v['seconds']:.4f} s, {v['ratio']:.2f} x the kit's step, difference {v['difference']:.0e}") for v in r["variants"]]
        f = r["floor"]
        lines += [f"- this machine in the same run: {f['gflop_per_second']:.0f} GFLOP/s in matrix products, {f['gb_per_second']:.1f} GB/s copied", ""]
    return "\n".join(lines)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["kit64"], help="kit64, kit128, ffhq256, a shipped generator, or a JSON file of options (ours or official)")
    p.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--repeats", type=int, default=5, help="pairs")
    p.add_argument("--views", type=int, default=8, help="views of one latent")
    p.add_argument("--parts", nargs="*", choices=["step", "several", "backbone", "volume", "superres"], help="default: all")
    p.add_argument("--variants", nargs="*", default=[], help="fixed_camera, compiled_march; on CUDA tf32, channels_last, bf16, graph, graph_bf16; none; default: all that the device has")
    p.add_argument("--out", type=Path, help="where to write OUT.json and OUT.md; models measured earlier stay in the JSON file")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    results = {}
    if a.out and a.out.with_suffix(".json").exists(): results = {r["model"]: r for r in json.loads(a.out.with_suffix(".json").read_text(encoding="utf-8"))}
    for name in a.models:
        results[Path(name).stem] = measure(name, a) | dict(model=Path(name).stem)
        if not a.out: continue
        save_json(list(results.values()), a.out.with_suffix(".json"))
        with whole_file(a.out.with_suffix(".md")) as tmp: Path(tmp).write_text(markdown(list(results.values())), encoding="utf-8")
    print(markdown(list(results.values())))

if __name__ == "__main__": main()
