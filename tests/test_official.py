"Official weights: parity with recorded outputs of the public generator, snapshots that are followed and never run, and each published habit with its effect."
import collections
import contextlib
import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import time
import warnings

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posefree_kit import cli, optimiser, rendering
from posefree_kit.camera import Pose, rays
from posefree_kit.checkpoints import SnapshotReader, import_official, load_generator, module_state, official_config, official_reader, plane_axes_name, read_card, read_snapshot, save_checkpoint
from posefree_kit.core import InputError, config_from_dict, config_to_dict, sha256
from posefree_kit.generator import GeneratorConfig, SuperResolution, render_eg3d, sample_planes_plain
from posefree_kit.optimiser import candidates, paper
from posefree_kit.pose import look_at_angles, look_at_pose
from posefree_kit.rendering import fine_depths_eg3d, march, march_eg3d, pooled_weights, softplus_density
from posefree_kit.stylegan import ModConv

from conftest import reference
from snapshots import RIGHT, SHAPENET, SMALL, WRONG, judge_state, official_state, options, snapshot

IMAGE, PLANES, EXACT = 5e-4, 1e-4, 2e-6 # largest difference allowed

class Reference:
    "One recorded configuration"
    def __init__(self, name):
        folder = reference(name)
        self.io, self.options = load_file(folder/"io.safetensors"), json.loads((folder/"config.json").read_text())
        self.G = import_official(folder/"state.safetensors", folder/"config.json")
        self.k, self.size = self.io["in.intrinsics"], self.options["neural_rendering_resolution"]
        with torch.no_grad():
            self.w = self.G.mapping(self.io["in.z"])
            self.planes = self.G.planes(self.w)

    def __contains__(self, key): return f"out.{key}" in self.io
    def out(self, key): return self.io[f"out.{key}"]
    def close(self, got, key, tolerance):
        want = self.out(key)
        error = float((got.reshape(want.shape) - want).abs().max())
        assert error <= tolerance, f"{key}: largest difference {error:.2e}, allowed {tolerance:.0e}"
    def seen(self, view, key=""):
        "Every output of a rendering that was recorded"
        for part, got in (("image", view.rgb), ("image_raw", view.rgb_raw), ("weight_sum", view.weight.flatten(2).mT)):
            if key + part in self: self.close(got, key + part, IMAGE)
        if key + "depth" in self:
            there = view.weight > 1e-3
            assert float((view.depth - self.out(key + "depth"))[there].abs().max()) <= 2 * IMAGE, f"{key}depth"

@pytest.fixture(scope="module", params=["ffhq128", "afhq512"])
def ref(request):
    return Reference(request.param)

def render(ref, pose, noise=None, planes=None, size=None, k=None):
    with torch.no_grad(): return render_eg3d(ref.G, planes or ref.planes, pose, size or ref.size, intrinsics=ref.k if k is None else k, noise=noise)

def test_codes_pose_and_rays(ref):
    G, w = ref.G, ref.w
    with torch.no_grad():
        ref.close(w, "w", EXACT); ref.close(G.expand_ws(w), "ws", EXACT)
        ref.close(G.expand_ws(G.truncate(w, .7)), "ws_psi0.7", EXACT); ref.close(G.truncate(w, .7, 8), "ws_psi0.7_cut8", EXACT)
        ref.close(look_at_angles(G.pose_learner.out(G.pose_learner.hidden(w)), G.config), "cam_pose", EXACT)
        c2w, k = G.camera(G.pose(w))
        ref.close(c2w, "c2w", EXACT); assert torch.allclose(k, ref.k, atol=1e-6)
        o, d = rays(c2w, ref.k, ref.size)
        ref.close(o, "ray_origins", EXACT); ref.close(d, "ray_dirs", EXACT)
        novel = G.camera(look_at_pose(*ref.io["in.novel_hv"].unbind(-1)))[0]
        assert torch.allclose(novel, ref.io["in.novel_c2w"], atol=EXACT)

def test_planes_and_their_blocks(ref):
    G, got = ref.G, {}
    hooks = [b.register_forward_hook(lambda m, a, out, k=k: got.update({f"block{4 * 2 ** k}.x": out[0], f"block{4 * 2 ** k}.img": out[1]})) for k, b in enumerate(G.synthesis.blocks)]
    try: planes = G.synthesis(G.expand_ws(ref.w))
    finally: [h.remove() for h in hooks]
    for key in (k for k in got if k in ref): ref.close(got[key], key, PLANES)
    ref.close(planes.mean((2, 3)), "planes_mean", PLANES); ref.close(planes.std((2, 3)), "planes_std", PLANES)
    if "planes_sub4" in ref: ref.close(planes[..., ::4, ::4], "planes_sub4", PLANES)
    if "planes_noisenone_sub8" in ref: ref.close(G.synthesis(G.expand_ws(ref.w), noise=False)[..., ::8, ::8], "planes_noisenone_sub8", PLANES)

def test_features_at_points(ref):
    xyz, c = ref.io["in.points"], ref.G.config
    each = torch.stack([sample_planes_plain(torch.zeros_like(ref.planes.features).index_copy(1, torch.tensor([i]), ref.planes.features[:, i:i + 1]), xyz, c.box, c.plane_axes) * 3 for i in range(3)], 1)
    ref.close(each, "points_features", PLANES)
    with torch.no_grad(): raw, values = ref.G.field(ref.planes, xyz)
    ref.close(values, "points_rgb", PLANES)
    assert float((raw[..., None] - ref.out("points_sigma")).abs().max()) < PLANES * max(1, float(ref.out("points_sigma").abs().max()) / 10)

def test_samples_along_rays(ref, monkeypatch):
    G, got = ref.G, []
    monkeypatch.setattr(rendering, "fine_depths_eg3d", lambda *a: got.append((*a[:2], fine_depths_eg3d(*a))) or got[0][2])
    monkeypatch.setattr(rendering, "march_eg3d", lambda *a: got.append(a) or march_eg3d(*a))
    monkeypatch.setattr(G.superres, "forward", lambda rgb, *a: rgb)
    render(ref, G.pose(ref.w))
    coarse, weights, fine = got[0]
    ref.close(coarse, "depths_coarse", EXACT); ref.close(weights, "weights_coarse", PLANES); ref.close(fine, "depths_fine", PLANES)
    raw, _, z, *_ = got[1]
    left = torch.exp(-(F.softplus((raw[..., 1:] + raw[..., :-1]) / 2 - 1) * z.diff(dim=-1))[..., :-1].sum(-1))
    ref.close(left, "transmittance_last", IMAGE)                              # what reaches the last interval

def test_views(ref):
    pose = ref.G.pose(ref.w)
    view = render(ref, pose)
    ref.seen(view)
    with torch.no_grad(): assert torch.equal(ref.G.render(ref.planes, pose, ref.size, intrinsics=ref.k).rgb, view.rgb)
    novel = look_at_pose(*ref.io["in.novel_hv"].unbind(-1))
    for i in range(3):
        if f"novel{i}.image" in ref: ref.seen(render(ref, Pose(novel.yaw[[i] * len(pose)], novel.pitch[[i] * len(pose)])), f"novel{i}.")

def test_given_numbers_sizes_truncation_and_noise(ref):
    G, io, pose, n = ref.G, ref.io, ref.G.pose(ref.w), ref.size ** 2
    coarse, fine = io["in.noise.u_coarse"][..., 0], io["in.noise.u_fine"].reshape(len(pose), n, -1)
    ref.seen(render(ref, pose, (coarse, fine)), "given.")
    if "mid.image" in ref:
        middle = ((torch.arange(fine.shape[-1]) + .5) / fine.shape[-1]).expand_as(fine)
        ref.seen(render(ref, pose, (torch.full_like(coarse, .5), middle)), "mid.")
    if "nrr64.image" in ref: # at the module's own input size the published raw image already contains what the first block adds; ours does not
        features = []
        hook = G.superres.blocks[0].register_forward_hook(lambda m, a, out: features.append(out[1]))
        view = render(ref, pose, size=64)
        hook.remove()
        ref.seen(view._replace(rgb_raw=features[0]), "nrr64.")
        assert (view.rgb_raw - features[0]).abs().max() > 1
    if "psi0.7.depth" in ref:
        with torch.no_grad(): ref.seen(render(ref, pose, planes=G.planes(G.truncate(ref.w, .7))), "psi0.7.") # the pose is that of the whole code
    if "srconst.image" in ref:
        view = render(ref, pose)
        with torch.no_grad(): ref.close(G.superres(view.rgb_raw, ref.out("feature_image"), ref.planes.w_last, True), "srconst.image", IMAGE)

def test_gradients(ref):
    G = ref.G
    ws = G.expand_ws(ref.w).detach().clone().requires_grad_()
    hv = ref.out("cam_pose")[:, :2].clone().requires_grad_()
    loss = (G.render(G.planes(ws), look_at_pose(*hv.unbind(-1)), ref.size, intrinsics=ref.k).rgb - ref.io["in.target"]).square().mean()
    g_ws, g_hv = torch.autograd.grad(loss, (ws, hv))
    assert float((loss.detach() - ref.out("grad_loss")).abs()) < 1e-5 * max(1, float(ref.out("grad_loss"))) # float32: three parts in a million were seen on another CPU
    ref.close(g_ws, "grad_ws", PLANES); ref.close(g_hv, "grad_cam_pose", PLANES * max(1, float(ref.out("grad_cam_pose").abs().max())))

# The rules once more, straight from their statement, on official names: for options of which nothing was recorded

def fc(s, name, x, rate=1., act=False):
    y = x @ (s[f"{name}.weight"] * rate / math.sqrt(x.shape[-1])).T + s[f"{name}.bias"] * rate
    return F.leaky_relu(y, .2) * math.sqrt(2) if act else y

def fir(x, pads):
    "Filter with [1, 3, 3, 1], gain 2 an axis"
    tap = torch.tensor([1., 3, 3, 1]) / 4
    return F.conv2d(F.pad(x, pads), torch.outer(tap, tap).expand(x.shape[1], 1, 4, 4), groups=x.shape[1])

def layer(s, name, x, w, up, clamp, noise=True, rgb=False):
    style = fc(s, f"{name}.affine", w) * (1 / math.sqrt(x.shape[1]) if rgb else 1)
    weight = s[f"{name}.weight"] * style[:, None, :, None, None]
    if not rgb: weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    conv = (lambda a, k: fir(F.conv_transpose2d(a, k.transpose(0, 1), stride=2), (1, 1, 1, 1))) if up else (lambda a, k: F.conv2d(a, k, padding=k.shape[-1] // 2))
    y = torch.cat([conv(x[i:i + 1], weight[i]) for i in range(len(x))])
    if not rgb and noise: y = y + s[f"{name}.noise_const"] * s[f"{name}.noise_strength"]
    y = y + s[f"{name}.bias"][:, None, None]
    if not rgb: y = F.leaky_relu(y, .2) * math.sqrt(2)
    return y if clamp is None else y.clamp(-clamp, clamp)

def block(s, name, x, image, ws, up, clamp, noise=True):
    if f"{name}.const" in s: x = s[f"{name}.const"].expand(len(ws[0]), -1, -1, -1)
    else: x = layer(s, f"{name}.conv0", x, ws[0], up, clamp, noise)
    x = layer(s, f"{name}.conv1", x, ws[-2], False, clamp, noise)
    if image is not None and up: image = fir(F.pad(image.flatten(2)[..., None, None], (0, 1, 0, 1)).unflatten(2, image.shape[2:]).transpose(3, 4).flatten(4, 5).flatten(2, 3), (2, 1, 2, 1))
    y = layer(s, f"{name}.torgb", x, ws[-1], False, clamp, rgb=True)
    return x, y if image is None else image + y

def restated(s, o, z, k):
    "Everything from z to the image: a dict"
    r, m = o["rendering_kwargs"], o["mapping_kwargs"]
    w = z * (z.square().mean(-1, keepdim=True) + 1e-8).rsqrt()
    for i in range(m["num_layers"]): w = fc(s, f"backbone.mapping.fc{i}", w, m["lr_multiplier"], True)
    a = fc(s, "backbone.mapping.affine_layer2", fc(s, "backbone.mapping.affine_layer1", w, m["lr_multiplier_pose"], True), m["lr_multiplier_pose"])
    h, v = a[:, 0] + r.get("h_mean", math.pi / 2), a[:, 1] + math.pi / 2
    if "clamp_h" in r: h = h.clamp(*r["clamp_h"])
    if "clamp_v" in r: v = v.clamp(*r["clamp_v"]).clamp(1e-5, math.pi - 1e-5)
    radius = a[:, 2] + r.get("r_mean", 2.7) if m.get("cam_dim", 2) == 3 else torch.full_like(h, r["avg_camera_radius"])
    phi = torch.arccos(1 - 2 * v / math.pi)
    o0 = radius[:, None] * torch.stack([phi.sin() * (math.pi - h).cos(), phi.cos(), phi.sin() * (math.pi - h).sin()], -1)
    fw = F.normalize(torch.tensor(r["avg_camera_pivot"], dtype=torch.float) - o0, dim=-1)
    right = -F.normalize(torch.linalg.cross(torch.tensor([[0., 1, 0]]).expand_as(fw), fw), dim=-1)
    turn = torch.stack([right, torch.linalg.cross(fw, right), fw], -1)
    n = o["neural_rendering_resolution"]
    at = (torch.arange(n) + .5) / n
    d = torch.stack([((at - k[0, 2]) / k[0, 0]).expand(n, n), ((at - k[1, 2]) / k[1, 1])[:, None].expand(n, n), torch.ones(n, n)], -1).reshape(1, -1, 3)
    d = F.normalize(d @ turn.mT, dim=-1)
    x = image = None
    for size in (4, 8, 16, 32, 64, 128, 256): x, image = block(s, f"backbone.synthesis.b{size}", x, image, [w] * 3, True, o["conv_clamp"])
    planes = image.unflatten(1, (3, 32))
    def field(z):
        p = (o0[:, None, None] + d[:, :, None] * z[..., None]) * (2 / r["box_warp"])
        third = p[..., [2, 0]] if r["wrong"] else p[..., [2, 1]]
        f = sum(F.grid_sample(planes[:, i], q, align_corners=False) for i, q in enumerate((p[..., :2], p[..., [0, 2]], third))) / 3
        y = fc(s, "decoder.net.2", F.softplus(fc(s, "decoder.net.0", f.permute(0, 2, 3, 1), r["decoder_lr_mul"])), r["decoder_lr_mul"])
        return y[..., 0], y[..., 1:].sigmoid() * 1.002 - .001
    def weights(raw, z):
        alpha = 1 - torch.exp(-F.softplus((raw[..., 1:] + raw[..., :-1]) / 2 - 1) * (z[..., 1:] - z[..., :-1]))
        return alpha * torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], -1), -1)[..., :-1]
    nc, nf = r["depth_resolution"], r["depth_resolution_importance"]
    z0 = torch.linspace(r["ray_start"], r["ray_end"], nc).expand(len(w), n * n, nc)
    raw, c = field(z0)
    p = weights(raw, z0)
    p = torch.cat([p[..., :1], torch.maximum(p[..., 1:], p[..., :-1]), p[..., -1:]], -1)
    p = ((p[..., 1:] + p[..., :-1]) / 2 + .01)[..., 1:-1] + 1e-5
    cdf = F.pad((p / p.sum(-1, keepdim=True)).cumsum(-1), (1, 0)).contiguous()
    bins, u = ((z0[..., 1:] + z0[..., :-1]) / 2), torch.linspace(0, 1, nf).expand(len(w), n * n, nf).contiguous()
    i = torch.searchsorted(cdf, u, right=True)
    lo, hi = (i - 1).clamp(min=0), i.clamp(max=nc - 3)
    den = cdf.gather(-1, hi) - cdf.gather(-1, lo); den[den < 1e-5] = 1
    z1 = (bins.gather(-1, lo) + (u - cdf.gather(-1, lo)) / den * (bins.gather(-1, hi) - bins.gather(-1, lo))).detach()
    raw1, c1 = field(z1)
    z, order = torch.cat([z0, z1], -1).sort(-1)
    raw, c = torch.cat([raw, raw1], -1).gather(-1, order), torch.cat([c, c1], -2).gather(-2, order[..., None].expand(*order.shape, 32))
    p = weights(raw, z); seen = p.sum(-1)
    f = 2 * ((p[..., None] * (c[..., 1:, :] + c[..., :-1, :]) / 2).sum(-2) + ((1 - seen)[..., None] if r.get("white_back") else 0)) - 1
    depth = ((p * (z[..., 1:] + z[..., :-1]) / 2).sum(-1) / seen).nan_to_num(torch.inf).clamp(z.min(), z.max())
    f = f.mT.unflatten(-1, (n, n)); rgb = f[:, :3].clone(); out = rgb
    if r["superresolution_module"]:
        kind = r["superresolution_module"].split("Hybrid")[1]
        size, ups = dict([("2X", (64, (0, 1))), ("4X", (128, (0, 1))), ("8X", (128, (1, 1))), ("8XDC", (128, (1, 1)))])[kind]
        if n < size or n > size and kind != "4X": f, out = (F.interpolate(t, (size, size), mode="bilinear", align_corners=False, antialias=False) for t in (f, out)) # whatever sr_antialias says
        clamp, noise = 256 if o["sr_num_fp16_res"] else None, r["superresolution_noise_mode"] == "const"
        for j, up in enumerate(ups): f, out = block(s, f"superresolution.block{j}", f, out, [w] * 3, bool(up), clamp, noise)
    return dict(w=w, pose=torch.stack([h, v], -1), radius=radius, planes=planes, image_raw=rgb, image=out, depth=depth.unflatten(-1, (n, n))[:, None], weight=seen.unflatten(-1, (n, n))[:, None])

CASES = {"four times, three planes": options("4X", 256, 24, wrong=False), "ShapeNet": options("2X", 128, 64, **SHAPENET), "no super-resolution, AFHQ": options(None, 24, 24, avg_camera_pivot=[0, 0, -.06], superresolution_noise_mode="none"),
         "twice, noise, shrunk": options("2X", 128, 72, superresolution_noise_mode="const", wrong=False), "eight times": options("8X", 512, 12),
         "CompCars, radius learnt": options("2X", 128, 16, **SHAPENET | dict(avg_camera_radius=1.9, r_mean=1.9, fov_mean=40, clamp_v=(1.2, 1.9))) | dict(mapping_kwargs=dict(num_layers=3, lr_multiplier=.02, lr_multiplier_pose=.05, cam_dim=3)),
         "slow decoder, clamps that bite": options("2X", 128, 16, decoder_lr_mul=.5) | dict(conv_clamp=1.5)}

@pytest.mark.parametrize("name", CASES)
def test_the_rules_restated(name):
    o = CASES[name]
    s = official_state(o)
    G = import_official(s, o)
    z, k = torch.randn(2, 12, generator=torch.Generator().manual_seed(5)), torch.tensor([[G.config.focal, 0, .5], [0, G.config.focal, .5], [0, 0, 1]])
    with torch.no_grad():
        want, w = restated(s, o, z, k), G.mapping(z)
        pose = G.pose(w)
        planes = G.planes(w)
        view = G.render(planes, pose)
    away = lambda a, b: float((a - b).abs().max())
    assert away(w, want["w"]) < 1e-5 and away(look_at_angles(G.pose_learner.out(G.pose_learner.hidden(w)), G.config)[:, :2], want["pose"]) < 1e-5 and away(planes.features, want["planes"]) < PLANES
    if pose.radius is not None: assert away(pose.radius, want["radius"]) < 1e-5 and pose.radius.std() > 0
    assert away(view.rgb_raw, want["image_raw"]) < IMAGE and away(view.rgb, want["image"]) < IMAGE and away(view.weight, want["weight"]) < IMAGE
    there = want["weight"] > 1e-3
    assert away(view.depth[there], want["depth"][there]) < 2 * IMAGE and view.rgb_raw.std() > .01 and view.rgb.shape[-1] == (o["img_resolution"] if G.superres else 24)
    assert .02 < want["weight"].mean() < .98                                   # neither empty nor a wall: the test sees something

@contextlib.contextmanager
def doubles():
    "Everything in double precision: in single, one sample that rounding moves across a pixel of a rough plane changes a gradient by per cents, in either implementation"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.Tensor, "float", lambda self: self.double())
        torch.set_default_dtype(torch.float64)
        try: yield
        finally: torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize("name", ["four times, three planes", "ShapeNet", "CompCars, radius learnt"])
def test_the_rules_restated_in_double_precision_and_their_gradient(name):
    "The image, and the gradient of a weighted sum of it with respect to z: through mapping, pose, planes, march and super-resolution"
    o = copy.deepcopy(CASES[name]); o["neural_rendering_resolution"] = 8
    s = official_state(o)
    G, s = import_official(s, o).double(), {k: v.double() for k, v in s.items()}
    z = torch.randn(1, 12, generator=torch.Generator().manual_seed(6)).double()
    with doubles():
        k, a, b = torch.tensor([[G.config.focal, 0, .5], [0, G.config.focal, .5], [0, 0, 1]]), z.clone().requires_grad_(), z.clone().requires_grad_()
        w = G.mapping(a)
        image, want = G.render(G.planes(w), G.pose(w)).rgb, restated(s, o, b, k)["image"]
        weight = torch.randn(image.shape, generator=torch.Generator().manual_seed(7)) / image.numel() ** .5
        (g,), (g_want,) = torch.autograd.grad((image * weight).sum(), a), torch.autograd.grad((want * weight).sum(), b)
    assert image.dtype == torch.float64 and (image - want).abs().max() < 1e-5
    assert g.isfinite().all() and g_want.abs().max() > .1 and (g - g_want).abs().max() < 1e-5 * g_want.abs().max()

# Snapshots: followed, never run

@pytest.mark.parametrize("protocol", [2, 4])
def test_a_snapshot_is_read_to_an_identical_state_dict(tmp_path, protocol):
    state, path = official_state(SMALL), tmp_path/"network-snapshot.pkl"
    path.write_bytes(snapshot(state, SMALL, RIGHT, protocol))
    assert not [m for m in sys.modules if m.split(".")[0] in ("torch_utils", "training", "dnnlib")]
    data = read_snapshot(path)
    got = module_state(data["G_ema"])
    assert set(got) == {*state, "dataset_label_std"} and all(torch.equal(got[k], state[k]) for k in state)
    assert data["training_set_kwargs"] == dict(resolution=128, note="é".encode("latin1"), p=.25)
    G = import_official(path)
    want = import_official(state, SMALL | dict(rendering_kwargs=SMALL["rendering_kwargs"] | dict(wrong=False)))
    assert G.config == want.config and G.config.plane_axes == "xyz" and all(torch.equal(a, b) for a, b in zip(G.state_dict().values(), want.state_dict().values()))
    assert G.source["sha256"] == sha256(path) and G.source["network"] == "G_ema" and not any(p.requires_grad for p in G.parameters())

def published_angles(s, image, render, clamp=256.): # what the public description says, written a second time: one picture after the other, filters as they stand
    "h and v of the pose branch of a discriminator of official names"
    r = image.shape[-1]
    f = torch.outer(*[torch.tensor([1., 3, 3, 1]) / 8] * 2)
    filtered = lambda x, pad: F.conv2d(F.pad(x.transpose(0, 1), (pad,) * 4), f[None, None]).transpose(0, 1)
    lrelu = lambda x, gain=1.: (torch.where(x > 0, x, .2 * x) * 2 ** .5 * gain).clamp(-clamp * gain, clamp * gain)
    w = lambda name: s[name + ".weight"] / s[name + ".weight"][0].numel() ** .5
    out = []
    for im in image.split(1):
        small = F.interpolate(im, (render, render), mode="bilinear")
        x, n = torch.cat([im, F.interpolate(small, (r, r), mode="bilinear")], 1), r
        x = lrelu(torch.einsum("oi,bihw->bohw", w(f"b{n}.fromrgb")[..., 0, 0], x) + s[f"b{n}.fromrgb.bias"][:, None, None])
        while n > 4:
            skip = torch.einsum("oi,bihw->bohw", w(f"b{n}.skip")[..., 0, 0], filtered(x, 1)[..., ::2, ::2]) * .5 ** .5
            y = lrelu(F.conv2d(x, w(f"b{n}.conv0"), padding=1) + s[f"b{n}.conv0.bias"][:, None, None])
            x = skip + lrelu(F.conv2d(filtered(y, 2), w(f"b{n}.conv1"))[..., ::2, ::2] + s[f"b{n}.conv1.bias"][:, None, None], .5 ** .5)
            n //= 2
        x = torch.cat([x, torch.full((1, 1, 4, 4), 1e-4)], 1)                                              # one picture: no deviation but the 1e-8 under the root
        x = lrelu(F.conv2d(x, w("b4.conv"), padding=1) + s["b4.conv.bias"][:, None, None]).flatten(1)
        h = x @ w("b4.cam_out1").T + s["b4.cam_out1.bias"]
        out.append((torch.where(h > 0, h, .2 * h) * 2 ** .5) @ w("b4.cam_out2").T + s["b4.cam_out2.bias"])
    return torch.cat(out)

@pytest.mark.parametrize("clamp", [256., .5])
def test_the_pose_branch_is_the_public_description(clamp):
    s, x = judge_state(32), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    D = official_reader(s, 8, clamp)
    want = published_angles(s, x, 8, clamp)
    assert D.config.dual and D.config.channels == (4, 4, 4, 4) and want.std(0).min() > 1e-5
    assert torch.allclose(D.angles(x), want, atol=1e-4 * float(want.abs().max()))
    pose = D.read_pose(x)
    assert torch.allclose(pose.yaw, math.pi / 2 - D.angles(x)[:, 0]) and pose.pitch.abs().max() <= math.pi / 2
    single = official_reader(judge_state(32, images=1), 8)
    assert not single.config.dual and single.angles(x).shape == (3, 2)

@pytest.mark.parametrize("spoil, match", [(lambda s: s.pop("b4.cam_out2.weight"), "missing"), (lambda s: [s.pop(k) for k in list(s) if "cam_out" in k], "expected a pose branch"), (lambda s: s.pop("b32.fromrgb.weight"), "3 or 6 inputs"),
                                          (lambda s: s.update({"b16.conv0.weight": torch.zeros(4, 5, 3, 3)}), r"b16.conv0.weight \(4, 5, 3, 3\) instead of \(4, 4, 3, 3\)"), (lambda s: [s.pop(k) for k in list(s) if k.startswith("b")], "expected blocks")])
def test_a_discriminator_that_does_not_fit_is_named(spoil, match):
    s = judge_state(32)
    spoil(s)
    with pytest.raises(InputError, match=match): official_reader(s)

@pytest.mark.parametrize("name", ["b4.conv.weight", "b4.cam_out1.weight", "b16.conv1.weight"])
def test_a_discriminator_of_odd_shapes_stays_behind_and_the_generator_comes(name, tmp_path):
    path, o, judge = tmp_path/"odd.pkl", options("2X", 128, 8), judge_state(128)
    for odd in (torch.tensor(1.), torch.ones(3)):
        path.write_bytes(snapshot(official_state(o), o, judge=judge | {name: odd}))
        G = import_official(path)
        assert G.reader is None and "left behind: discriminator: expected weights of convolutions" in G.source["reader"] and name in G.source["reader"]

def test_the_pose_branch_comes_along(tmp_path):
    path, o = tmp_path/"with-judge.pkl", options("2X", 128, 8)
    path.write_bytes(snapshot(official_state(o), o, judge=judge_state(128)))
    G = import_official(path)
    assert G.source["left_in_the_snapshot"] == {"D": "DualDiscriminator"} and G.source["reader"] == "the discriminator's pose branch"
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    assert torch.allclose(G.reader.angles(x), published_angles(judge_state(128), x, 8), atol=1e-3)
    H = load_generator(save_checkpoint(tmp_path/"kept.safetensors", G, G.reader), "cpu")
    assert H.reader.config == G.reader.config and torch.equal(H.read_pose(x).yaw, G.read_pose(x).yaw)
    w = candidates(H, x[:1], paper(candidates=6, starts=3))
    assert w.shape == (1, 3, 12) and w.isfinite().all()
    assert import_official(path, reader=False).reader is None

def test_a_discriminator_of_another_kind_stays_in_the_snapshot_and_inversion_does_without(tmp_path):
    path = tmp_path/"with-judge.pkl"
    o = options("2X", 128, 8)
    path.write_bytes(snapshot(official_state(o), o, judge={"b4.fc.weight": torch.zeros(3, 2), "b4.fc.bias": torch.zeros(3)}))
    G = import_official(path)
    assert G.source["left_in_the_snapshot"] == {"D": "DualDiscriminator"} and G.reader is None and "left behind: discriminator: expected blocks" in G.source["reader"]
    assert set(module_state(read_snapshot(path)["D"])) == {"b4.fc.weight", "b4.fc.bias"}                 # there for whoever knows what it means
    with pytest.raises(InputError, match="expected a discriminator"): G.read_pose(torch.zeros(1, 3, 128, 128))
    target = G.sample(1, 3)[1].rgb.clamp(-1, 1)
    w = candidates(G, target, paper(candidates=6, starts=3))
    assert w.shape == (1, 3, 12) and torch.equal(w[:, -1], G.w_avg[None]) and w.isfinite().all()

def test_from_a_snapshot_and_a_photograph_to_a_reconstruction(monkeypatch, tmp_path):
    "The steps of the tutorial, in a shell"
    monkeypatch.setitem(optimiser.PRESETS, "paper", lambda **changes: paper(**{**dict(candidates=4, starts=1, start_steps=0), **changes}))
    o = options("2X", 128, 8)
    (tmp_path/"network.pkl").write_bytes(snapshot(official_state(o), o, judge=judge_state(128)))
    Image.fromarray(skimage.data.astronaut()).save(tmp_path/"astronaut.png")
    run = lambda *a: CliRunner().invoke(cli.app, [str(x) for x in a])
    r = run("import-official", tmp_path/"network.pkl", tmp_path/"faces.safetensors")
    assert r.exit_code == 0 and "pose reader: the discriminator's pose branch" in r.stdout, r.stderr
    call = ["invert", tmp_path/"astronaut.png", "--out", tmp_path/"out", "--generator", tmp_path/"faces.safetensors", "--preset", "paper", "--align", "--steps", 2, "--device", "cpu", "--no-progress", "--no-mesh", "--no-video"]
    r = run(*call)
    assert r.exit_code == 0 and "FFHQ's is used" in r.stderr, r.stderr                                   # random weights draw no faces to measure
    report = json.loads((tmp_path/"out"/"astronaut"/"report.json").read_text())
    assert report["preset"] == "paper" and [s["shrink"] for s in report["stages"]] == [2, 1] and report["generator"]["resolution"] == 128
    assert Image.open(tmp_path/"out"/"astronaut"/"reconstruction.png").size == (128, 128)
    r = run(*call, "--overwrite", "--framing", "square"); assert r.exit_code == 2 and "auto, portraits, ffhq" in r.stderr

def test_the_published_planes_are_recognised():
    assert plane_axes_name(WRONG) == "eg3d" and plane_axes_name(RIGHT) == "xyz"
    for bad in (WRONG.roll(1, 0), torch.zeros(3, 3, 3), torch.eye(3), None):
        with pytest.raises(InputError, match="plane_axes"): plane_axes_name(bad)

class Call:
    "A pickle that calls f(*args)"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    FOUR = torch.zeros(4).storage()

def hostile():
    touch = "open('was_run', 'w')"
    yield "os.system", Call(os.system, "touch was_run")
    yield "eval", Call(eval, touch)
    yield "exec", Call(exec, touch)
    yield "getattr", Call(getattr, dict, "fromkeys")
    yield "torch.load", Call(torch.load, "was_run")
    yield "subprocess", Call(subprocess.Popen, ["touch", "was_run"])
    yield "nested", Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, "touch was_run")))
    yield "nested in torch's own format", Call(torch.storage._load_from_bytes, torch_bytes(Call(os.system, "touch was_run")))
    yield "no storage", Call(torch.storage._load_from_bytes, torch_bytes({"a": torch.zeros(2)}))
    yield "too long a tensor", Call(torch._utils._rebuild_tensor_v2, FOUR, 0, (5,), (1,), False, collections.OrderedDict())
    yield "a far offset", Call(torch._utils._rebuild_tensor_v2, FOUR, 3, (2,), (1,), False, collections.OrderedDict())
    yield "a negative stride", Call(torch._utils._rebuild_tensor_v2, FOUR, 3, (2,), (-1,), False, collections.OrderedDict())
    yield "an endless tensor", Call(torch._utils._rebuild_tensor_v2, FOUR, 0, (10 ** 12,), (0,), False, collections.OrderedDict())
    yield "numbers of an overflowing size", Call(torch._utils._rebuild_tensor_v2, FOUR, 0, (2 ** 40, 2 ** 40), (1, 1), False, collections.OrderedDict())

def torch_bytes(x):
    b = io.BytesIO(); torch.save(x, b, _use_new_zipfile_serialization=False); return b.getvalue()

@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name,bomb", [pytest.param(n, b, id=n) for n, b in hostile()])
def test_hostile_snapshots_are_refused(name, bomb, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path/"x.pkl"; path.write_bytes(pickle.dumps(dict(G_ema=bomb), protocol))
    with pytest.raises(InputError) as e: import_official(path)
    assert "x.pkl" in str(e.value) and not (tmp_path/"was_run").exists() and "\n" not in str(e.value)

def build(*ops): return b"\x80\x02" + b"".join(ops) + b"."
GLOBAL, EMPTY, STATE = lambda m, n: f"c{m}\n{n}\n".encode(), b"}", b"b"

@pytest.mark.parametrize("what", ["torch_utils.persistence _reconstruct_persistent_obj", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch.storage _load_from_bytes", "training.x Y", "numpy dtype", "collections OrderedDict", "_codecs encode", "dnnlib.util EasyDict", "builtins set"])
def test_nothing_handed_out_keeps_what_a_pickle_sets_on_it(what, tmp_path):
    "BUILD on the name itself: state {'__call__': ...} must neither stay nor be called"
    module, name = what.split()
    path = tmp_path/"x.pkl"
    for state in (pickle.dumps({"__call__": 1, "f": 2}, 2)[2:-1], pickle.dumps((None, {"__call__": 1, "__setstate__": 2}), 2)[2:-1]):
        data = build(GLOBAL(module, name), state, STATE)
        path.write_bytes(data)
        with pytest.raises(InputError, match="expected a state for an object"): read_snapshot(path)
        reader = SnapshotReader(io.BytesIO(data), len(data))
        before = set(dir(reader.find_class(module, name)))
        with pytest.raises(InputError): reader.load()
        handed = reader.find_class(module, name)
        assert set(dir(handed)) == before and "f" not in before and getattr(handed, "__call__", None) != 1
    import torch._utils
    assert not hasattr(torch._utils._rebuild_tensor_v2, "f") and not hasattr(collections.OrderedDict, "f")

@pytest.mark.parametrize("kind", [tuple, list])
def test_nests_that_hold_each_other_cost_nothing(kind, tmp_path):
    "A file of some hundred bytes whose value, written out or hashed, would be longer than any memory"
    v = kind()
    for _ in range(60): v = kind((v, v))
    class Pid(pickle.Pickler):
        def persistent_id(self, obj): return v if obj == "here" else None
    b = io.BytesIO(); Pid(b, 2).dump("here")
    whole = lambda x: pickle.dumps(x, 2)[2:-1]
    many = (b")" + b"2\x86" * 60) if kind is tuple else whole(v)
    before = time.perf_counter()
    for data in (b.getvalue(), b"\x80\x02" + many + b"Q.", build(GLOBAL("torch_utils.persistence", "_reconstruct_persistent_obj"), many, b"\x85R"), build(GLOBAL("_codecs", "encode"), whole("a"), many, b"\x86R"), build(b"}", many, whole(1), b"s")):
        (tmp_path/"x.pkl").write_bytes(data)
        with pytest.raises(InputError) as e: read_snapshot(tmp_path/"x.pkl")
        assert len(str(e.value)) < 400
    for o in (SMALL | dict(rendering_kwargs=SMALL["rendering_kwargs"] | dict(clamp_mode=v)), SMALL | dict(conv_clamp=v), SMALL | dict(sr_kwargs=dict(w_dim=v))):
        with pytest.raises(InputError) as e: official_config(o)
        assert len(str(e.value)) < 400
    assert time.perf_counter() - before < 2

def test_damaged_and_foreign_snapshots(tmp_path):
    path = tmp_path/"x.pkl"
    good = snapshot(official_state(SMALL), SMALL)
    for content in (b"", good[:1000], good[:-1000], b"not a pickle", pickle.dumps([1]), pickle.dumps(dict(G_ema=None)), pickle.dumps({}), b"\x80\x04]" + b"(" * 200 + b"."):
        path.write_bytes(content)
        with pytest.raises(InputError, match="x.pkl"): import_official(path)
    class Pid(pickle.Pickler):
        def persistent_id(self, obj): return "elsewhere" if obj == "here" else None
    b = io.BytesIO(); Pid(b, 2).dump(dict(a="here")); path.write_bytes(b.getvalue())
    with pytest.raises(InputError, match="outside"): read_snapshot(path)
    with pytest.raises(InputError, match="no such file"): import_official(tmp_path/"none.pkl")
    with pytest.raises(InputError, match="expected a .pkl, .safetensors or .pt"): (tmp_path/"x.zip").touch(); import_official(tmp_path/"x.zip", SMALL)
    torch.save(Call(os.system, "true"), tmp_path/"x.pt")
    with pytest.raises(InputError, match="x.pt"): import_official(tmp_path/"x.pt", SMALL)

# Configurations and names

def test_missing_left_over_and_misshapen_tensors_are_named():
    s = official_state(SMALL)
    lost, name = dict(s), "superresolution.block1.conv0.affine.bias"
    del lost[name]; lost["backbone.more"] = torch.zeros(2); lost["decoder.net.0.bias"] = torch.zeros(63); lost["superresolution.block0.resample_filter"] = torch.ones(4, 4)
    with pytest.raises(InputError) as e: import_official(lost, SMALL)
    for text in ("1 missing: " + name, "1 left over: backbone.more", "decoder.net.0.bias (63,) instead of (64,)", "1 other filters: superresolution.block0.resample_filter"): assert text in str(e.value)
    with pytest.raises(InputError, match="background NeRF"): import_official(s | {"backbone.bg_nerf.fc.weight": torch.zeros(1)}, SMALL)
    with pytest.raises(InputError, match="configuration beside bare tensors"): import_official(s)

@pytest.mark.parametrize("text,change", [("background NeRF", dict(bg_kwargs=dict(num_bg_pts=4))), ("superresolution_module", dict(rendering_kwargs=dict(superresolution_module="a.Other"))), ("linear_pose", dict(mapping_kwargs=dict(linear_pose=True))),
                                         ("uniform_sampling", dict(mapping_kwargs=dict(uniform_sampling=True))), ("clamp_mode", dict(rendering_kwargs=dict(clamp_mode="relu"))), ("disparity", dict(rendering_kwargs=dict(disparity_space_sampling=True))),
                                         ("ray_start", dict(rendering_kwargs=dict(ray_start="auto"))), ("img_resolution", dict(img_resolution=256)), ("sr_kwargs", dict(sr_kwargs=dict(w_dim=3))), ("backbone_noise_mode.*no other noise", dict(backbone_noise_mode="loud")),
                                         ("superresolution_noise_mode.*no other noise", dict(rendering_kwargs=dict(superresolution_noise_mode="loud"))), ("cam_dim.*2 or 3", dict(mapping_kwargs=dict(cam_dim=4)))])
def test_what_cannot_be_honoured_is_refused_by_name(text, change):
    o = copy.deepcopy(SMALL)
    for k, v in change.items(): o[k] = o[k] | v if isinstance(v, dict) and isinstance(o.get(k), dict) else v
    with pytest.raises(InputError, match=text): official_config(o)

def test_configurations_of_every_kind(tmp_path):
    s, c = official_state(SMALL), official_config(SMALL)
    (tmp_path/"official.json").write_text(json.dumps(dict(constructor={k: v for k, v in SMALL.items() if k != "neural_rendering_resolution"}, neural_rendering_resolution=16, doc={})))
    (tmp_path/"ours.json").write_text(json.dumps(config_to_dict(c)))
    save_file(s, tmp_path/"s.safetensors"); torch.save(s, tmp_path/"s.pt")
    for path in (s, tmp_path/"s.safetensors", tmp_path/"s.pt"):
        for config in (SMALL, tmp_path/"official.json", tmp_path/"ours.json", c, config_to_dict(c)):
            assert import_official(path, config).config == c
    with pytest.raises(InputError, match="JSON"): import_official(s, tmp_path/"s.pt")
    missing = copy.deepcopy(SMALL); del missing["rendering_kwargs"]["wrong"], missing["z_dim"]
    with pytest.raises(InputError, match="missing.*z_dim.*wrong"): official_config(missing)
    with pytest.warns(UserWarning, match="no_such_option"): G = import_official(s, SMALL | dict(no_such_option=1))
    assert "no_such_option" in G.source["notes"][0]
    shapenet, cars = official_config(CASES["ShapeNet"]), official_config(CASES["CompCars, radius learnt"])
    assert shapenet.focal == 1.025390625 and shapenet.domain == "objects" and c.domain == "faces" and c.focal == pytest.approx(4.2634, abs=2e-5)
    assert cars.pose_extra == "radius" and cars.radius == 1.9 and cars.focal == pytest.approx(1 / (math.tan(math.radians(20)) * 1.414), rel=1e-4)

def test_a_learnt_field_of_view_is_read_and_moves_no_camera():
    o = copy.deepcopy(CASES["CompCars, radius learnt"]); o["mapping_kwargs"]["learn_fov"] = True
    G = import_official(official_state(o), o)
    w = G.mapping(G.draw(3))
    a = look_at_angles(G.pose_learner.out(G.pose_learner.hidden(w)), G.config)
    assert a.shape == (3, 3) and a[:, 2].std() > 0 and abs(float(a[:, 2].mean()) - 40) < 20 and G.pose(w).radius is None

def test_saved_exactly_and_loaded_again(tmp_path):
    o = CASES["ShapeNet"]
    save_file(official_state(o), tmp_path/"state.safetensors")
    G = import_official(tmp_path/"state.safetensors", o)
    path = save_checkpoint(tmp_path/"cars", G)
    again = load_generator(path, "cpu")
    assert read_card(path)["source"]["sha256"] == sha256(tmp_path/"state.safetensors") == again.source["sha256"] and again.config == G.config
    assert all(torch.equal(a, b) for a, b in zip(G.state_dict().values(), again.state_dict().values()))
    w = G.mapping(G.draw(1))
    with torch.no_grad(): a, b = (g.view(w, g.pose(w), size=8) for g in (G, again))
    assert torch.equal(a.rgb, b.rgb) and torch.equal(a.depth, b.depth)
    small = save_checkpoint(tmp_path/"half", G, half=True)
    assert small.stat().st_size < .6 * path.stat().st_size

def test_what_no_reader_would_take_is_not_written(tmp_path):
    G = load_generator("portraits", "cpu")
    for card in (dict(psnr=math.nan), dict(pose=torch.zeros(2))):
        with pytest.raises(InputError, match="card of plain JSON values"): save_checkpoint(tmp_path/"a", G, card=card)
    G.decoder.out.bias[0] = 1e5
    with pytest.raises(InputError, match="at most 65504.*decoder.out.bias"): save_checkpoint(tmp_path/"a", G)
    assert not list(tmp_path.iterdir()) and load_generator(save_checkpoint(tmp_path/"a", G, half=False), "cpu").decoder.out.bias[0] == 1e5

def test_import_from_a_shell(tmp_path):
    save_file(official_state(SMALL), tmp_path/"s.safetensors"); (tmp_path/"c.json").write_text(json.dumps(dict(constructor=SMALL, neural_rendering_resolution=16)))
    run = lambda *a: CliRunner().invoke(cli.app, ["import-official", *map(str, a)])
    r = run(tmp_path/"s.safetensors", tmp_path/"g.safetensors", "--config", tmp_path/"c.json")
    assert r.exit_code == 0 and "g.safetensors" in r.stdout and load_generator(tmp_path/"g.safetensors", "cpu").resolution == 128
    for args in ((tmp_path/"s.safetensors", tmp_path/"g.safetensors", "--config", tmp_path/"c.json"), (tmp_path/"s.safetensors", tmp_path/"h.safetensors"), (tmp_path/"no.pkl", tmp_path/"h.safetensors"), (tmp_path/"s.safetensors", tmp_path/"h.txt", "--config", tmp_path/"c.json")):
        r = run(*args)
        assert r.exit_code == 2 and r.stderr.startswith("error: ") and "expected" in r.stderr and r.stderr.count("\n") == 1, r.stderr
    assert run(tmp_path/"s.safetensors", tmp_path/"g.safetensors", "--config", tmp_path/"c.json", "--overwrite").exit_code == 0

# Each published habit and its effect; ours have none of them

def test_our_own_generators_have_none_of_the_habits():
    c = GeneratorConfig()
    assert (c.march, c.pose_rule, c.pose_extra, c.decoder_rate, c.backbone_clamp, c.superres_noise, c.background) == ("plain", "tanh", "none", 1., None, False, "linear")
    card = read_card("portraits")["generator"]
    own = load_generator("portraits", "cpu").config
    assert own == config_from_dict(GeneratorConfig, card) and own.march == "plain" and own.pose_rule == "tanh"
    habits = ("march", "pose_rule", "pose_extra", "decoder_rate", "backbone_clamp", "superres_noise")
    assert own == config_from_dict(GeneratorConfig, {k: v for k, v in card.items() if k not in habits})   # a card from before these options

def walls(n=9):
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 6, n, generator=g) * 4, torch.rand(2, 6, n, 4, generator=g), (torch.rand(2, 6, n, generator=g) * .4 + torch.arange(n) * .5 + torch.tensor([2., 5.])[:, None, None])

def test_shifted_bins_are_half_a_step_off_and_pooling_widens():
    t, w = torch.linspace(0, 1, 21).expand(1, 1, 21), torch.zeros(1, 1, 20)
    w[..., 12] = 1.
    u = torch.linspace(.1, .9, 50).expand(1, 1, 50)
    right, off = (fine_depths_eg3d(t, w, u, False, s) for s in (False, True))
    assert torch.allclose(off, right - .025, atol=1e-4) and (right > .6).all() and (right < .65).all()
    p = pooled_weights(w)[0, 0]
    assert torch.allclose(p[11:15], torch.tensor([.51, 1.01, .51, .01])) and torch.allclose(p[:11], torch.full((11,), .01))
    assert fine_depths_eg3d(t, w, u, True, True).std() > 2 * off.std()

def test_white_back_fills_every_channel():
    raw, c, t = walls()
    a, b = march_eg3d(raw, c, t), march_eg3d(raw, c, t, white=True)
    assert torch.allclose(b.values - a.values, (1 - a.weight)[..., None].expand_as(a.values), atol=1e-6) and (a.weight < .9).any()

def test_an_empty_ray_takes_its_depth_from_its_neighbours_in_the_batch():
    raw, c, t = walls()
    raw[0, 0] = -400.
    alone, together = march_eg3d(raw[:1], c[:1], t[:1]), march_eg3d(raw, c, t)
    assert alone.depth[0, 0] == t[:1].max() < together.depth[0, 0] == t.max()
    assert march(raw, c, t, softplus_density()).depth[0, 0] == t[0, 0, -1]     # ours: the end of its own ray
    together = march_eg3d(raw.requires_grad_(), c, t)
    together.depth.sum().backward(); assert raw.grad.isfinite().all()

def test_wrong_planes_never_look_along_y_and_z():
    G = [import_official(official_state(SMALL), SMALL | dict(rendering_kwargs=SMALL["rendering_kwargs"] | dict(wrong=w))) for w in (True, False)]
    w = G[0].mapping(G[0].draw(1))
    xyz = torch.tensor([[[.1, .2, .3], [.1, -.2, .3]]])
    for g in G: # the third plane alone
        p = g.planes(w); p.features[:, :2] = 0
        same = torch.equal(*g.field(p, xyz)[1][0].split(1)); assert same == (g.config.plane_axes == "eg3d")

def test_truncation_never_moves_a_published_camera():
    G = import_official(official_state(SMALL), SMALL)
    whole = G.mapping(G.draw(2, 4))
    w, view = G.sample(2, 4, psi=.3, size=6)
    with torch.no_grad(): want = G.view(w, G.pose(whole), size=6)
    assert torch.equal(view.rgb, want.rgb) and not torch.allclose(G.pose(w).yaw, G.pose(whole).yaw, atol=1e-3)

def test_kept_noise_is_part_of_the_picture():
    G = import_official(official_state(SMALL), SMALL)
    ws = G.expand_ws(G.mapping(G.draw(1)))
    assert (G.synthesis(ws) - G.synthesis(ws, noise=False)).abs().max() > .1
    loud = import_official(official_state(SMALL), SMALL | dict(rendering_kwargs=SMALL["rendering_kwargs"] | dict(superresolution_noise_mode="const")))
    pose = G.pose(ws[:, 0])
    with torch.no_grad(): a, b = G.view(ws, pose), loud.view(ws, pose)
    assert torch.equal(a.rgb_raw, b.rgb_raw) and (a.rgb - b.rgb).abs().max() > .05

def test_noise_modes():
    s = official_state(SMALL)
    G, still = import_official(s, SMALL), import_official(s, SMALL | dict(backbone_noise_mode="none"))
    ws = G.expand_ws(G.mapping(G.draw(1)))
    assert torch.equal(still.synthesis(ws), G.synthesis(ws, noise=False)) and not torch.equal(still.synthesis(ws), G.synthesis(ws))
    with pytest.warns(UserWarning, match="the stored noise is used"): drawn = import_official(s, SMALL | dict(backbone_noise_mode="random"))
    assert torch.equal(drawn.synthesis(ws), G.synthesis(ws)) and "backbone_noise_mode" in drawn.source["notes"][0]
    with pytest.warns(UserWarning, match="superresolution_noise_mode"): assert official_config(SMALL | dict(rendering_kwargs=SMALL["rendering_kwargs"] | dict(superresolution_noise_mode="random"))).superres_noise

def test_pose_means_and_limits():
    s = official_state(SMALL)
    render = lambda **k: import_official(s, SMALL | dict(rendering_kwargs=SMALL["rendering_kwargs"] | k))
    G = render()
    w = G.mapping(G.draw(64))
    angles = lambda G: look_at_angles(G.pose_learner.out(G.pose_learner.hidden(w)), G.config)
    free = angles(G)
    assert free[:, 0].std() > .01 and free[:, 1].std() > .01
    assert torch.allclose(angles(render(h_mean=math.pi)) - free, torch.tensor([math.pi / 2, 0.]).expand(64, 2), atol=1e-5)
    low, high = free.quantile(.3, 0), free.quantile(.7, 0)
    both = angles(render(clamp_h=(float(low[0]), float(high[0])), clamp_v=(float(low[1]), float(high[1]))))
    assert torch.allclose(both, free.clamp(low, high), atol=1e-6) and not torch.allclose(both, free, atol=1e-3)
    assert render(clamp_v=(-9., 9.)).config.pose_clamp[1] == (1e-5, math.pi - 1e-5)                       # clamp_v always stays off the poles

def test_the_4x_module_never_shrinks():
    "Public super-resolution at more rays than its input size: 4x keeps them, the others resize"
    x = torch.rand(1, 6, 136, 136, generator=torch.Generator().manual_seed(0))
    for kind, size in (("4x", 272), ("8x", 512), ("2x", 128)):
        with torch.no_grad(): assert SuperResolution(kind, 6, 4)(x[:, :3], x, torch.ones(1, 4)).shape[-1] == size

def test_clamps_cut_where_they_say():
    conv = lambda gain: ModConv(4, 4, 4, clamp=256., clamp_gain=gain).requires_grad_(False)
    x, w = torch.full((1, 4, 6, 6), 1.), torch.ones(1, 4)
    for gain, top in ((1., 256.), (math.sqrt(2), 256 * math.sqrt(2))):
        c = conv(gain); c.bias.fill_(1e4)
        assert c(x, w).max() == pytest.approx(top)
    off = official_config(SMALL | dict(sr_num_fp16_res=0))
    assert off.superres_clamp is None and official_config(SMALL).superres_clamp == 256 and official_config(SMALL).clamp_gain == 1 and official_config(SMALL | dict(conv_clamp=256)).backbone_clamp == 256

def test_antialiasing_matters_where_features_shrink():
    x = torch.rand(1, 6, 96, 96, generator=torch.Generator().manual_seed(0))
    sharp, soft = (SuperResolution("2x", 6, 4, antialias=a) for a in (False, True))
    soft.load_state_dict(sharp.state_dict())
    with torch.no_grad(): assert (sharp(x[:, :3], x, torch.ones(1, 4)) - soft(x[:, :3], x, torch.ones(1, 4))).abs().max() > .01

def test_the_published_modules_never_antialias_whatever_the_option_says():
    for said in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert official_config(options("2X", 128, 16, sr_antialias=said)).superres_antialias is False
