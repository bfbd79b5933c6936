"Official weights: parity with recorded outputs of the public generator, snapshots that are followed and never run, and each published habit with its effect."
import collections
import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posefree_kit import cli
from posefree_kit.camera import Pose, pose_of_position, rays
from posefree_kit.checkpoints import import_official, load_generator, module_state, official_config, official_name, plane_axes_name, read_card, read_snapshot, save_checkpoint
from posefree_kit.core import InputError, config_from_dict, config_to_dict, sha256
from posefree_kit.generator import GeneratorConfig, SuperResolution, render_eg3d, sample_planes_plain
from posefree_kit.pose import PoseFreeGenerator, look_at_angles, look_at_pose
from posefree_kit.rendering import fine_depths, fine_depths_eg3d, march, march_eg3d, pooled_weights, softplus_density
from posefree_kit.stylegan import ModConv

REFERENCE = Path(os.environ.get("POSEFREE_REFERENCE") or Path(__file__).parents[2]/"shared/reference")
IMAGE, PLANES, EXACT = 5e-4, 1e-4, 2e-6 # largest difference allowed

class Reference:
    "One recorded configuration"
    def __init__(self, name):
        folder = REFERENCE/name
        self.io, self.options = load_file(folder/"io.safetensors"), json.loads((folder/"config.json").read_text())
        self.G = import_official(folder/"state.safetensors", folder/"config.json")
        self.k, self.size = self.io["in.intrinsics"], self.options["neural_rendering_resolution"]
        with torch.no_grad():
            self.w = self.G.mapping(self.io["in.z"])
            self.planes = self.G.planes(self.w)

    def __contains__(self, key): return f"out.{key}" in self.io
    def out(self, key): return self.io[f"out.{key}"]
    def close(self, got, key, tolerance, name=""):
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
    if not (REFERENCE/request.param).is_dir(): pytest.skip("skipped: no reference")
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

def test_samples_along_rays(ref):
    G, got = ref.G, []
    import posefree_kit.rendering as r
    real = r.fine_depths_eg3d
    r.fine_depths_eg3d = lambda t, w, *a: got.append((t, w, real(t, w, *a))) or got[0][2]
    try: view = render(ref, G.pose(ref.w))
    finally: r.fine_depths_eg3d = real
    coarse, weights, fine = got[0]
    ref.close(coarse, "depths_coarse", EXACT); ref.close(weights, "weights_coarse", IMAGE); ref.close(fine, "depths_fine", IMAGE)
    ref.close(1 - view.weight.flatten(2).mT, "transmittance_last", IMAGE)

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
    if "nrr64.image" in ref: ref.seen(render(ref, pose, size=64), "nrr64.")
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
    assert float((loss - ref.out("grad_loss")).abs()) < 1e-5
    ref.close(g_ws, "grad_ws", PLANES); ref.close(g_hv, "grad_cam_pose", PLANES)
