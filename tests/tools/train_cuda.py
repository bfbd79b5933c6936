"""Train on one GPU with each step captured as a CUDA graph: how the shipped generators went on (cards in posefree_kit/assets/generators).

    python tests/tools/train_cuda.py runs/gpu --minutes 4                 # portraits goes on at 64 pixels
    python tests/tools/train_cuda.py runs/gpu --minutes 4 --minutes-128 3 # and is grown to 128 afterwards

A step of `posefree_kit.training.train_step` is some 5,000 small kernels, and a GPU waits for Python to ask for each: measured on an H200 machine beside other work, 105 images a second
with batches of 32. Here the same step (an encoder in the loop, the pose learner held) is asked for once, recorded, and replayed: 900 images a second with batches of 64. What may not be recorded is gone:
random numbers come from the device, constants are made before, nothing is read back, and planes are looked up by `grid_sample`. `tests/test_training.py` compares its pictures with the library's and takes a step on the CPU.
The run that shipped used this code with its pictures made beside it, as they were needed; since it was put in order it has not been on a GPU again, and the recipe in `main` (scores compared in pairs, R2, features matched; chapter 08, points 15 to 17) and growing with the encoder in the loop have been tried on a CPU only.
"""
import argparse, copy, dataclasses, json, math, time
from pathlib import Path

import torch
import torch.nn.functional as F

from posefree_kit.baselines import load_latent_encoder, save_latent_encoder
from posefree_kit.camera import Pose, mirror
from posefree_kit.checkpoints import load_generator, save_checkpoint
from posefree_kit.core import config_to_dict, save_image
from posefree_kit.generator import AXES, Planes, View, ball_prior
from posefree_kit.latent_encoder import fresh_encoder
from posefree_kit.portraits import HELD_OUT, portrait_batch
from posefree_kit.rendering import march, softplus_density
from posefree_kit.training import Moments, TrainConfig, calibrate, d_loss, encoder_figures, g_loss, go_on_with, grow, make_state, pose_figures, pose_loss, pyramid, r1_penalty, sample_grid, slanted, wall_loss

class Constants(dict):
    "Tensors that a recorded step reads: made when they are first asked for, before anything is recorded"
    def __call__(self, name, make):
        if name not in self: self[name] = make()
        return self[name]

def rays(pose:Pose, radius:float, focal:float, size:int, const:Constants): # -> origins, directions (B, size * size, 3)
    "As `camera.rays` of `camera.cam2world`, around the origin"
    device = pose.yaw.device
    def grid():
        c = (torch.arange(size, device=device) + .5) / size
        v, u = torch.meshgrid(c, c, indexing="ij")
        return (u.reshape(-1, 1) - .5) / focal, (v.reshape(-1, 1) - .5) / focal
    x, y = const(f"grid{size}", grid)
    position = radius * torch.stack([-pose.yaw.sin() * pose.pitch.cos(), pose.pitch.sin(), pose.yaw.cos() * pose.pitch.cos()], -1)
    forward = F.normalize(-position, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, const("up", lambda: torch.tensor([0., 1, 0], device=device)).expand_as(forward)), dim=-1)
    d = right[:, None] * x + torch.linalg.cross(forward, right)[:, None] * y + forward[:, None]
    return position[:, None].expand_as(d), F.normalize(d, dim=-1)

def field(G, features, xyz): # (B, 3, C, H, W), (B, M, 3) -> raw density (B, M), values (B, M, 3)
    "As `Generator.field`, channels before points"
    c, p, seen = G.config, xyz * (2 / G.config.box), 0
    for i, (a, b) in enumerate(AXES[c.plane_axes]): seen = seen + F.grid_sample(features[:, i], torch.stack([p[..., a], p[..., b]], -1)[:, None], align_corners=False)
    h, o = G.decoder.hidden, G.decoder.out
    y = F.leaky_relu(torch.matmul(h.weight * (h.gain / 3), seen[:, :, 0]) + (h.bias * h.rate)[:, None], .2) * math.sqrt(2)
    y = torch.matmul(o.weight * o.gain, y) + (o.bias * o.rate)[:, None]
    return y[:, 0] + ball_prior(xyz, c.ball, c.ball_radius), (y[:, 1:].sigmoid() * 1.002 - .001).mT

def render(G, planes:Planes, pose:Pose, const:Constants, size:int|None=None, jitter:float=1.) -> View:
    "As `Generator.render` of our own generators"
    c, size, b, device = G.config, size or G.config.render_resolution, len(pose), planes.w_last.device
    o, d = rays(pose, c.radius, c.focal, size, const)
    t = const(f"depths{c.samples}", lambda: torch.linspace(c.near, c.far, c.samples, device=device)) + torch.rand(b, size * size, c.samples, device=device) * (jitter * (c.far - c.near) / (c.samples - 1))
    raw, values = field(G, planes.features, (o[:, :, None] + d[:, :, None] * t[..., None]).reshape(b, -1, 3))
    met = march(raw.view(b, size * size, c.samples), values.reshape(b, size * size, c.samples, -1), t, softplus_density(c.density_scale))
    def basis():
        q = (torch.arange(size, device=device) + .5) * (2 / size) - 1
        v, u = torch.meshgrid(q, q, indexing="ij")
        return torch.stack([torch.ones_like(u), u, v]).reshape(3, -1)
    back = (G.background.coefficients(planes.w_last).view(-1, 3, 3) @ const(f"basis{size}", basis)).mT.sigmoid()
    image, weight = lambda x: x.mT.unflatten(-1, (size, size)), met.weight[..., None]
    rgb = image((met.values[..., :3] + (1 - weight) * back) * 2 - 1)
    return View(rgb, rgb, image(met.depth[..., None]), image(weight))

def relit(view:View, strength:float, focal:float):
    "As `training.relit`"
    z, weight = view.depth.detach(), view.weight.detach()
    slope = lambda axis: torch.gradient(z, dim=axis)[0] / (z.mean() / (focal * z.shape[-1]))
    normal = F.normalize(torch.cat([slope(3), -slope(2), torch.ones_like(z)], 1), dim=1)
    a, b, soft = torch.rand(3, len(z), device=z.device)
    azimuth, height = 3 * a - 1.5, 1.5 * b - .3
    lamp = torch.stack([azimuth.sin() * height.cos(), height.sin(), azimuth.cos() * height.cos()], 1)[:, :, None, None]
    lit = (.3 + .4 * soft)[:, None, None, None] + (normal * lamp).sum(1, keepdim=True).clamp(min=0)
    gain = lit / (lit * weight).sum((2, 3), keepdim=True) * weight.sum((2, 3), keepdim=True).clamp(min=1)
    return ((view.rgb.detach() + 1) * (1 + strength * weight * (gain - 1)) - 1).clamp(max=1)

class Recorded:
    "A run whose steps can be recorded: generator, discriminator, encoder, their averages, and all pictures on the device"
    KINDS = ((True, True), (False, True), (False, False)) # R1 or not, density or not
    def __init__(self, G, D, E, config:TrainConfig, images, ema_kimg:float=15.): # images (N, 3, R, R) uint8
        self.G, self.D, self.E, self.c, self.seen, self.const = G, D, E, config, 0, Constants()
        self.device = device = G.w_avg.device
        G.pose_learner.requires_grad_(False) # held
        slow = lambda net: copy.deepcopy(net).requires_grad_(False)
        self.averages = [(slow(net), net, .5 ** (config.batch / (1000 * kimg))) for net, kimg in ((G, ema_kimg), (D, 3.), (E, ema_kimg))]
        self.images = images.to(device)
        self.unit, self.fade = D.unit, torch.ones((), device=device)
        D.fade = self.fade # on the device, where a recorded step reads it
        self.rates = [config.g_rate * config.density_every / (config.density_every + 1), config.d_rate * config.r1_every / (config.r1_every + 1), config.encode_rate]
        self.now = [torch.tensor(r, device=device) for r in self.rates]
        fast = dict(fused=True, capturable=True) if device.type == "cuda" else {}
        betas = ((0., .99 ** (self.rates[0] / config.g_rate)), (0., .99 ** (self.rates[1] / config.d_rate)), (.9, .99))
        self.opt = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr, betas=b, **fast) for net, lr, b in zip((G, D, E), self.now, betas)]
        self.moments = Moments(D.config.feature_dim).to(device)
        self.sign = torch.ones(config.batch, 2, device=device); half = int(config.batch * config.flip_share)
        self.sign[:half // 2, 0] = self.sign[half // 2:half, 1] = -1

    def fakes(self):
        "Real pictures, generated ones with their poses, and what the encoder read"
        G, E, c, device, n = self.G, self.E, self.c, self.device, self.c.batch
        coin = lambda k, share=.5: torch.rand(k, device=device) < share
        real = self.images.index_select(0, (torch.rand(n, device=device) * len(self.images)).long()).float() / 127.5 - 1
        real = torch.where(coin(n)[:, None, None, None], real.flip(-1), real)
        w = G.mapping(torch.randn(n, G.config.z_dim, device=device))
        own = G.pose(w).stack().detach()
        at = torch.rand(n, device=device).argsort()[:round(n * c.encode_share)]
        image = real.index_select(0, at)
        code, deltas = E(image)
        ws = code[:, None] + torch.where(coin(len(at))[:, None, None], 0., deltas)
        planes = G.planes(G.expand_ws(w).index_copy(0, at, ws))
        pose = Pose.of(own * self.sign)
        return dict(real=real, w=w, own=own, pose=pose, read=coin(n, c.read_share), at=at, image=image, code=code, deltas=deltas, planes=planes, view=render(G, planes, pose, self.const))

    def d_loss(self, f, r1:bool) -> dict:
        D, c, real = self.D, self.c, f["real"]
        fake, judged = D(f["view"].rgb.detach(), f["pose"], f["read"]), D(real)
        lit, turned = D(relit(f["view"], c.relight, self.G.config.focal)).pose, D((slanted(real, c.slant, None) if c.slant else real).flip(-1)).pose
        parts = dict(d=d_loss(judged.score, fake.score, c.loss), pose=pose_loss(lit, f["pose"], self.unit), mirror=pose_loss(turned, mirror(judged.pose), self.unit))
        if r1:
            parts["r1"] = r1_penalty(D, real)
            if c.r2_gamma: parts["r2"] = r1_penalty(D, f["view"].rgb)
        f["shown"] = judged.pose.stack().detach()
        return parts

    def g_loss(self, f, density:bool) -> dict:
        G, D, E, c, planes, pose, at, look = self.G, self.D, self.E, self.c, f["planes"], f["pose"], f["at"], self.G.config.look_dim
        judged, there = D(f["view"].rgb, pose, f["read"]), D(f["real"])
        parts = dict(g=g_loss(judged.score, there.score if c.loss == "relativistic" else None, c.loss), wall=wall_loss(f["view"], G.config.radius))
        drawn = torch.ones(c.batch, device=self.device).index_fill(0, at, 0.)
        if c.match_weight:
            self.moments.update(judged.features, there.features, drawn, .5 ** (c.batch / (1000 * c.match_kimg)))
            parts["match"] = self.moments.loss(judged.features, drawn)
        if density:
            u = (torch.rand(c.batch, 500, 3, device=self.device) - .5) * G.config.box
            sigma = F.softplus(field(G, planes.features, torch.cat([u, u + .004 * G.config.box * torch.randn_like(u)], 1))[0] - 1) * G.config.density_scale
            parts["density"] = (sigma[:, :500] - sigma[:, 500:]).abs().mean()
        zero = self.const("zero", lambda: torch.zeros(min(8, c.batch), device=self.device))
        front = render(G, planes[:len(zero)], Pose(zero, zero), self.const, 32)
        depth, weight = (x[..., 13:23, 11:21] for x in (front.depth, front.weight)) # the face: training.symmetry_loss
        both, off = (weight * weight.flip(-1)).detach(), (depth - depth.flip(-1)).square()
        parts["symmetry"] = (both * off / (off + c.symmetry_scale ** 2)).sum() / both.sum().clamp(min=1)
        spread = lambda w: (w - E.mean) / E.std
        seen = E(f["view"].rgb.detach())[0]
        off = ((G.pose(seen).stack() - pose.stack()) / self.unit).square().sum(1) / 2
        parts["known"] = (off + (drawn[:, None] * (spread(seen) - spread(f["w"].detach()))[:, :look].square()).mean(1) + .02 * spread(seen)[:, look:].square().sum(1)).mean()
        parts["tame"] = (.01 * spread(f["code"]).square().mean(1) + 2e-4 * f["deltas"].square().sum((1, 2))).mean()
        again = render(G, Planes(*(x.index_select(0, at) for x in planes)), G.pose(f["code"]), self.const).rgb
        parts["rec"] = sum((x - y).abs().mean() for x, y in zip(pyramid(again), pyramid(f["image"]))) / 3
        with torch.no_grad(): there = D.layers(f["image"])
        parts["rec_seen"] = (sum((x - y).abs().mean((1, 2, 3)) / y.abs().mean((1, 2, 3)) for x, y in zip(D.layers(again), there)) / len(there)).mean()
        return parts

    def step(self, r1:bool, density:bool): # -> losses (tensor), named in `self.names`
        "All networks, once"
        c, D = self.c, self.D
        weights = dict(pose=c.pose_weight, mirror=c.mirror_weight, r1=c.r1_gamma / 2 * c.r1_every, r2=c.r2_gamma / 2 * c.r1_every, density=c.density_weight, wall=c.wall_weight, symmetry=c.symmetry_weight, match=c.match_weight, known=c.encode_known_weight, rec=c.encode_weight, rec_seen=c.encode_feature_weight)
        def down(parts, opts):
            for o in opts: o.zero_grad(set_to_none=True)
            sum(weights.get(k, 1.) * v for k, v in parts.items()).backward()
            for o in opts: o.step()
            return {k: v.detach() for k, v in parts.items()}
        f = self.fakes()
        D.requires_grad_(True)
        parts = down(self.d_loss(f, r1), self.opt[1:2])
        with torch.no_grad(): calibrate(D, f["own"] / self.unit, f["shown"] / self.unit, c.calibrate)
        D.requires_grad_(False)
        parts |= down(self.g_loss(f, density), self.opt[::2])
        with torch.no_grad():
            self.G.w_avg.lerp_(f["w"].mean(0), .005)
            for slow, net, beta in self.averages:
                torch._foreach_lerp_([*slow.parameters()], [*net.parameters()], 1 - beta)
                for x, y in zip(slow.buffers(), net.buffers()): x.copy_(y)
        self.names = [*parts]
        return torch.stack([*parts.values()])

    def record(self):
        "Each kind of step twice, so that libraries set themselves up, then recorded"
        if self.D.old_rgb is not None: self.fade.zero_() # as `grow` leaves it: these steps train too
        side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for kind in 2 * self.KINDS: self.step(*kind)
        torch.cuda.current_stream().wait_stream(side); torch.cuda.synchronize()
        self.graphs = {}
        for kind in self.KINDS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph): losses = self.step(*kind)
            self.graphs[kind] = graph, losses, self.names

    def run(self, minutes:float, log, fade_kimg:float=0., flat:float=.4, end:float=.04):
        "Replay until the time is up; rates fall in a straight line after the first `flat` of it"
        start, i, told = time.time(), 0, time.time()
        while (gone := (time.time() - start) / (60 * minutes)) < 1:
            if i % 20 == 0:
                for lr, rate in zip(self.now, self.rates): lr.fill_(rate * (1 - (1 - end) * max(0., (gone - flat) / (1 - flat))))
                if fade_kimg: self.fade.fill_(min(1., self.seen / 1000 / fade_kimg))
            graph, losses, names = self.graphs[self.KINDS[0 if i % self.c.r1_every == 0 else 1 if i % self.c.density_every == 0 else 2]]
            graph.replay(); self.seen += self.c.batch; i += 1
            if i % 100 == 0 and not losses.isfinite().all(): raise FloatingPointError(f"a loss is no number at {self.seen / 1000:.1f} kimg: {dict(zip(names, losses.tolist()))}")
            if time.time() - told > 10: told = time.time(); log(kimg=self.seen / 1000, img_per_s=round(self.seen / (told - start), 1), **{k: round(v, 4) for k, v in zip(names, losses.tolist())})
        torch.cuda.synchronize()

def pictures(n:int, size:int, first:int, device, many:int): # (n, 3, size, size) uint8
    return torch.cat([((portrait_batch(torch.arange(i, min(i + many, first + n)), size, device=device).image + 1) * 127.5).round().clamp(0, 255).byte() for i in range(first, first + n, many)])

def finish(run:Recorded, out:Path, name:str, log):
    "Write generator, discriminator and encoder as they are on average, a sheet of people, and figures on held-out portraits"
    (ema, _, _), (d_ema, _, _), (e_ema, _, _) = run.averages
    d_ema.fade = 1.
    save_checkpoint(out/f"{name}.safetensors", ema, d_ema, dict(training=dict(kimg=run.seen / 1000, images=len(run.images), config=config_to_dict(run.c))))
    save_latent_encoder(e_ema, out/f"{name}_encoder.safetensors", load_generator(str(out/f"{name}.safetensors"), run.device), steps=run.seen // run.c.batch, figures={})
    save_image(sample_grid(ema), out/f"{name}.png")
    held = portrait_batch(torch.arange(HELD_OUT + 20_000, HELD_OUT + 20_300), ema.resolution, device=run.device)
    log(kimg=run.seen / 1000, **pose_figures(ema, d_ema, held.image, held.pose), **encoder_figures(ema, e_ema, held.image[:96], Pose.of(held.pose.stack()[:96])))

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path); ap.add_argument("--minutes", type=float, required=True); ap.add_argument("--minutes-128", type=float, default=0.)
    ap.add_argument("--start", default="portraits"); ap.add_argument("--portraits", type=int, default=73_728); ap.add_argument("--seed", type=int, default=103)
    args = ap.parse_args()
    if not torch.cuda.is_available(): raise SystemExit("expected a CUDA device: torch sees none (posefree train works on a CPU)")
    torch.manual_seed(args.seed); torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    def log(**k):
        with open(args.out/"log.jsonl", "a") as f: f.write(json.dumps(k) + "\n")
        print(k, flush=True)
    config = TrainConfig(batch=64, g_rate=.002, d_rate=.0014, loss="relativistic", r1_gamma=.12, r2_gamma=.12, encode_share=.25, encode_weight=40., match_weight=1., slant=.7, symmetry_weight=.5, symmetry_scale=.02, seed=args.seed)
    G = load_generator(args.start, "cuda")
    if G.resolution == 128: config = dataclasses.replace(config, batch=32, r1_gamma=.5, r2_gamma=.5)
    s = go_on_with(G, dataclasses.replace(config, encode_share=0.))
    size, beside = G.resolution, Path(args.start).with_name(f"{Path(args.start).stem}_encoder.safetensors") # as `finish` names it
    if args.minutes_128 and size != 64: raise SystemExit(f"--minutes-128: expected a generator of 64 pixels to grow, got one of {size}")
    E = load_latent_encoder(G, beside if beside.is_file() else None)
    run = Recorded(s.G, s.D, fresh_encoder(G, start=E), config, pictures(args.portraits * 64 ** 2 // size ** 2, size, 30_000, "cuda", 4096 * 64 ** 2 // size ** 2))
    run.record(); run.run(args.minutes, log); finish(run, args.out, "portraits" if size == 64 else f"portraits-{size}", log)
    if not args.minutes_128: return
    (ema, _, _), (d_ema, _, _), (e_ema, _, _) = run.averages
    config = dataclasses.replace(config, batch=32, r1_gamma=.5, r2_gamma=.5)
    big = grow(make_state(ema, d_ema, config, e_ema), 24, 12, config)
    run = Recorded(big.G.requires_grad_(True), big.D.requires_grad_(True), big.E, config, pictures(args.portraits // 4, 128, 30_000, "cuda", 1024), ema_kimg=8.)
    run.record(); run.run(args.minutes_128, log, fade_kimg=4., flat=.5); finish(run, args.out, "portraits-128", log)

if __name__ == "__main__": main()
