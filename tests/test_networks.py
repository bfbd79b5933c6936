"Generator, pose learner, discriminator: structure, sharing, gradients."
import copy, dataclasses, os, shutil, threading
import pytest
import torch
from posefree_kit.camera import Pose
from posefree_kit.core import InputError
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig, grow_discriminator
from posefree_kit.generator import AXES, Generator, GeneratorConfig, WeightedRows, march_library, pof3d_config, sample_planes, sample_planes_plain
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.stylegan import modulated_conv

SMALL = GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8, samples=6)


def test_weighted_rows_in_double_precision():
    g = torch.Generator().manual_seed(0)
    table, weight = torch.randn(9, 4, generator=g, dtype=torch.float64, requires_grad=True), torch.rand(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    index = torch.randint(9, (5, 3), generator=g)
    assert torch.autograd.gradcheck(lambda t, w: WeightedRows.apply(t, index, w), (table, weight))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("shape", [(4, 4), (5, 9)])
def test_both_ways_of_reading_planes_agree(axes, shape):
    g = torch.Generator().manual_seed(1)
    planes, xyz = torch.randn(2, 3, 4, *shape, generator=g), torch.rand(2, 300, 3, generator=g) * 1.6 - .8
    assert torch.allclose(sample_planes(planes, xyz, 1., axes), sample_planes_plain(planes, xyz, 1., axes), atol=1e-5)


def test_many_views_share_planes_exactly():
    torch.manual_seed(0)
    G = PoseFreeGenerator(SMALL).start()
    planes = G.planes(G.mapping(G.draw(2)))
    poses = Pose.deg([0., 10, -20, 30])
    many = G.render(planes, poses)
    for i in range(4): assert torch.allclose(many.rgb[i], G.render(planes[i // 2:i // 2 + 1], poses[[i]]).rgb[0], atol=1e-5)


def test_intrinsics_zoom():
    torch.manual_seed(0)
    G = PoseFreeGenerator(SMALL).start(); w = G.mapping(G.draw(1)); pose = Pose.deg(0.)
    c2w, k = G.camera(pose)
    wide = k.clone(); wide[:, 0, 0] = wide[:, 1, 1] = k[0, 0, 0] / 4
    assert G.render(G.planes(w), pose, intrinsics=wide).weight.mean() < G.render(G.planes(w), pose).weight.mean()


@pytest.mark.parametrize("changes", [dict(superresolution="2x", features=8), dict(superresolution="8x", features=8), dict(noise=True), dict(view_dim=0), dict(fine_samples=4), dict(ball=0.), dict(background="none"), dict(plane_axes="eg3d")])
def test_every_option_renders_and_trains(changes):
    torch.manual_seed(0)
    G = PoseFreeGenerator(dataclasses.replace(SMALL, **changes)).start()
    w = G.mapping(G.draw(1)); v = G.view(w, G.pose(w))
    assert v.rgb.shape[-1] == G.resolution and v.rgb.isfinite().all() and v.depth.min() >= G.config.near
    v.rgb.square().mean().backward()
    assert G.synthesis.blocks[0].const.grad.abs().sum() > 0 and G.pose_learner.out.weight.grad.abs().sum() > 0


def test_official_structure_has_the_public_sizes():
    G = Generator(pof3d_config())
    assert G.num_ws == 14 and G.config.plane_resolution == 256 and G.resolution == 256
    assert abs(sum(p.numel() for p in G.parameters()) / 1e6 - 29.6) < .6


def test_style_batch_is_many_single_convolutions():
    x, w, s = torch.randn(3, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(3, 4)
    for up in (False, True):
        assert torch.allclose(modulated_conv(x, w, s, up=up), torch.cat([modulated_conv(x[i:i + 1], w, s[i:i + 1], up=up) for i in range(3)]), atol=1e-5)


def test_pose_of_ws_is_refused():
    G = PoseFreeGenerator(SMALL)
    with pytest.raises(InputError): G.pose(torch.zeros(1, G.num_ws, 72))
    with pytest.raises(InputError): G.planes(torch.zeros(1, G.num_ws + 1, 72))
    with pytest.raises(InputError): G.read_pose(torch.zeros(1, 3, 8, 8))


def test_growing_twice_keeps_judgement():
    torch.manual_seed(0)
    D = Discriminator(DiscriminatorConfig(channels=(8, 12, 16)))
    big = grow_discriminator(D, 6)
    for small, large, size in ((D, big, 32), (big, grow_discriminator(big, 5), 64)):
        small.old_rgb, small.fade, x = None, 1., torch.randn(4, 3, size, size)          # its own new layer is fully in
        pooled = torch.nn.functional.avg_pool2d(x, 2)
        assert torch.allclose(large(x).score, small(pooled).score, atol=1e-5) and torch.allclose(large.read_pose(x).yaw, small.read_pose(pooled).yaw, atol=1e-5)


needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler here")


@needs_compiler
@pytest.mark.parametrize("sizes", [(16, 32), (32, 64)])
@pytest.mark.parametrize("scenes", [1, 5])
def test_compiled_march_is_the_same_function(sizes, scenes):
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8, 8), plane_channels=sizes[0], decoder_hidden=sizes[1], render_resolution=12, samples=7, box=.5)).start()
    fast = copy.deepcopy(G).compile_march()
    w = G.mapping(G.draw(scenes))
    def run(G):
        turn, planes = torch.linspace(-1, 1, 2 * scenes).requires_grad_(), G.planes(w.detach())
        features = planes.features.detach().requires_grad_()
        v = G.render(planes._replace(features=features), Pose(turn, turn / 2), jitter=1., generator=torch.Generator().manual_seed(0))
        loss = v.rgb.square().sum() + v.depth.square().sum() + v.weight.square().sum()
        return [v.rgb, v.depth, v.weight, *torch.autograd.grad(loss, [features, turn, *G.decoder.parameters()])]
    for a, b in zip(run(G), run(fast)): assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.detach().abs().max()))


@needs_compiler
@pytest.mark.parametrize("size", [1, 3, 8, 11]) # rays go eight at a time: fewer than eight in all, and some left over
def test_compiled_march_with_fixed_weights(size):
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8, 8), render_resolution=12, samples=7)).start().requires_grad_(False)
    fast, w = copy.deepcopy(G).compile_march(), G.mapping(G.draw(1))
    def run(G):
        ws, turn = w.clone().requires_grad_(), torch.tensor([.3, -.5], requires_grad=True)
        v = G.render(G.planes(ws), Pose(turn, turn / 2), size=size)
        return [v.rgb, v.depth, v.weight, *torch.autograd.grad(v.rgb.square().sum() + v.depth.square().sum() + v.weight.square().sum(), [ws, turn])]
    for a, b in zip(run(G), run(fast)): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))


def test_compiled_march_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(InputError, match="got march plain, lrelu 4 / 32 / 3"): Generator(SMALL).compile_march()
    with pytest.raises(InputError, match="200 samples"): Generator(GeneratorConfig(samples=200)).compile_march()
    with pytest.raises(InputError, match="pose_extra"): GeneratorConfig(pose_extra="radius")
    with pytest.raises(InputError, match="no fine samples"): Generator(GeneratorConfig(fine_samples=4)).compile_march()
    with pytest.raises(InputError, match="expected a generator on the CPU, got one on meta"): Generator().to("meta").compile_march()
    monkeypatch.setenv("CXX", "no-such-compiler")
    march_library.cache_clear()
    try:
        with pytest.raises(InputError, match="expected a C.. compiler"): Generator().compile_march()
    finally: march_library.cache_clear()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_pose_of_another_type_and_autocast_give_the_same_picture(compiled):
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8, 8), render_resolution=12, samples=7)).start().requires_grad_(False)
    if compiled: G.compile_march()
    w, pose = G.mapping(G.draw(1)), Pose.deg(20., 10.)
    planes, want = G.planes(w), G.pose(w)
    for kind in (torch.float64, torch.bfloat16):
        other = pose.to(kind)
        assert torch.equal(G.render(planes, other).rgb, G.render(planes, other.to(torch.float32)).rgb) and G.render(planes, other).rgb.dtype == torch.float32
    o, d = torch.zeros(1, 4, 3, dtype=torch.float64), torch.tensor([0., 0, -1], dtype=torch.float64).expand(1, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(G.march(planes, o, d), G.march(planes, o.float(), d.float())))
    with torch.autocast("cpu", torch.bfloat16): half, spoken = G.render(planes, pose), G.pose(w)
    assert torch.equal(half.depth, G.render(planes, pose).depth) and torch.equal(spoken.yaw, want.yaw) # the rays are those of float32, though a background may be of bfloat16
    with torch.autocast("cpu", torch.bfloat16): view = G.view(G.mapping(G.draw(1)), pose)
    assert (view.depth - half.depth).abs().mean() < .02 and view.depth.dtype == torch.float32
    late = G.render(planes._replace(features=planes.features.bfloat16()), pose)
    assert (late.rgb - G.render(planes, pose).rgb).abs().mean() < .02


def test_published_rays_are_those_of_float32_under_autocast():
    torch.manual_seed(0)
    G = PoseFreeGenerator(pof3d_config(width=8, channels=(8, 8), render_resolution=6, samples=5, fine_samples=4, superresolution="none", march="eg3d", pose_rule="look_at")).requires_grad_(False)
    w, pose = torch.randn(1, 8), Pose.deg(20., 10.)
    planes = G.planes(w)
    with torch.autocast("cpu", torch.bfloat16): half = G.render(planes, pose)
    assert all(torch.equal(a, b) for v in (half, G.render(planes, pose.to(torch.float64))) for a, b in zip(v, G.render(planes, pose)))


@pytest.mark.parametrize("march", ["plain", "eg3d"])
def test_what_cannot_be_rendered_is_refused_by_name(march):
    G = PoseFreeGenerator(dataclasses.replace(SMALL, march=march, background="none"))
    planes, pose = G.planes(G.mapping(G.draw(1))), Pose.deg([0., 1.])
    def refused(match, planes, pose, **k):
        with pytest.raises(InputError, match=match): G.render(planes, pose, **k)
    for pixels in (1.5, -1): refused("expected a size in whole pixels", planes, pose, size=pixels)
    refused("got 0 poses and 1 latents", planes, pose[[]]); refused("got 2 poses and 0 latents", planes[:0], pose)
    refused("got 3", planes, pose, intrinsics=torch.eye(3).expand(3, 3, 3)); refused("render: intrinsics", planes, pose, intrinsics=torch.eye(4)[None])


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["features", "turn", "decoder", "gradient"])
def test_compiled_march_hands_on_what_is_not_finite(where, bad):
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8, 8), render_resolution=9, samples=7)).start().compile_march()
    planes = G.planes(G.mapping(G.draw(2)).detach())
    features, turn = planes.features.detach(), torch.tensor([.1, .2])
    if where == "features": features[1] *= bad
    if where == "turn": turn[1] = bad
    if where == "decoder":
        with torch.no_grad(): G.decoder.hidden.bias[3] = bad
    v = G.render(planes._replace(features=features.requires_grad_()), Pose(turn.requires_grad_(), turn / 2))
    gone = v.rgb.isnan().flatten(1)
    assert gone[1].all() == (where != "gradient") and gone[0].all() == (where == "decoder") and gone[0].any() == (where == "decoder")
    loss = v.rgb[1].sum() * (bad if where == "gradient" else 1.) + v.rgb[0].sum()
    g_features, g_turn, *g_decoder = torch.autograd.grad(loss, [features, turn, *G.decoder.parameters()])
    assert g_features[1].isnan().all() and g_turn[1].isnan() and all(g.isnan().all() for g in g_decoder) and (where == "decoder" or g_features[0].isfinite().all() and g_turn[0].isfinite())


@needs_compiler
def test_threads_build_the_march_once(tmp_path, monkeypatch):
    script = tmp_path/"compiler"
    script.write_text(f'#!/bin/sh\necho called >> {tmp_path/"calls"}\nsleep .2\nfor x; do case "$last" in -o) cp "{march_library()._name}" "$x";; esac; last="$x"; done\n'); script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script)); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    march_library.cache_clear()
    try:
        threads = [threading.Thread(target=march_library) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert (tmp_path/"calls").read_text().split() == ["called"] and march_library()._name.startswith(str(tmp_path))
    finally: march_library.cache_clear()


def test_settings_that_would_fail_later_are_refused():
    for bad, match in ((dict(march="eg3d", samples=2, fine_samples=4), "at least 3"), (dict(backbone_clamp=-1.), "backbone_clamp"), (dict(superres_clamp=0.), "superres_clamp")):
        with pytest.raises(InputError, match=match): dataclasses.replace(SMALL, **bad)
    for rule in ("plain", "eg3d"):
        G = PoseFreeGenerator(dataclasses.replace(SMALL, march=rule, samples=3 if rule == "eg3d" else 2, fine_samples=4, background="none"))
        assert G.view(G.mapping(G.draw(1)), Pose.deg(0.)).rgb.isfinite().all()                # the fewest that work


def test_the_resolution_is_that_of_the_picture():
    for kind, size in (("2x", 72), ("4x", 136)):
        G = PoseFreeGenerator(dataclasses.replace(SMALL, superresolution=kind, render_resolution=size, samples=2))
        with torch.no_grad(): assert G.view(G.mapping(G.draw(1)), Pose.deg(0.)).rgb.shape[-1] == G.resolution, (kind, size)


def test_the_reader_goes_where_the_generator_goes():
    G, D = PoseFreeGenerator(SMALL), Discriminator(DiscriminatorConfig(channels=(8, 8)))
    G.set_reader(D)
    names = list(G.state_dict())
    G.double()
    assert G.reader is D and G.read_pose(torch.zeros(1, 3, 8, 8, dtype=torch.float64)).yaw.dtype == torch.float64
    assert list(G.state_dict()) == names and next(G.to("meta").reader.parameters()).device.type == "meta"
    assert next(D.parameters()).device.type == "cpu" # another generator may share it
    G.set_reader(None); G.float()


@needs_compiler
def test_compiled_march_stays_finite_far_out():
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8), render_resolution=8, samples=6)).start()
    with torch.no_grad(): G.decoder.out.weight.mul_(1e4)
    G.compile_march()
    ws = G.mapping(G.draw(2)).detach().requires_grad_()
    v = G.view(ws, G.pose(ws))
    grads = torch.autograd.grad(v.rgb.sum() + v.depth.sum(), [ws, *G.decoder.parameters()])
    assert v.rgb.isfinite().all() and all(g.isfinite().all() for g in grads)


@needs_compiler
def test_the_compiled_march_leaves_the_arithmetic_of_others_alone():
    G = PoseFreeGenerator(GeneratorConfig()).compile_march()
    w = G.mapping(G.draw(1)).detach().requires_grad_()
    G.view(w, G.pose(w)).rgb.sum().backward()
    assert (torch.tensor(1e-40) * .5).item() > 0                               # subnormal numbers are still there

@pytest.mark.parametrize("asked", [(20., 8.6), (45., 4.), (5., 30.)])
def test_a_fresh_pose_learner_has_the_spread_that_was_asked_for(asked): # squeezed softly towards 80 degrees: the rescaling allows for it
    torch.manual_seed(0)
    G = PoseFreeGenerator(dataclasses.replace(SMALL, pose_start_deg=asked)).start()
    with torch.no_grad(): poses = G.pose(G.mapping(G.draw(8192, 0))).degrees()      # the codes that it was rescaled on
    assert torch.allclose(poses.std(0), torch.tensor(asked), rtol=.01) and (poses.mean(0).abs() < .1 * torch.tensor(asked)).all()
