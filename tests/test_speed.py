"Every fast path is the same function as the plain one: values and gradients, in double precision where it is mathematics."
import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from posefree_kit.camera import Pose
from posefree_kit.generator import FrozenField, GeneratorConfig, add_rows, add_scene_rows, plane_table, pof3d_config, row_dots, sample_planes, sample_planes_plain
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.rendering import march, march_eg3d, render_rays, render_rays_eg3d, softplus_density
from posefree_kit.stylegan import FrozenConv, ModConv, ToImage, fixed, modulated_conv, plain_conv, scaled_conv, upsample

sys.path.insert(0, str(Path(__file__).parent/"benchmarks"))
import naive

OFFICIAL = dict(width=24, channels=(16, 16, 12), samples=7, fine_samples=6, render_resolution=6, superresolution="none", march="eg3d", pose_rule="look_at")
CONFIGS = {"ours": GeneratorConfig(channels=(8, 8, 8), plane_channels=6, render_resolution=7, samples=6), "ours, fine samples": GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=6, samples=5, fine_samples=6, plane_axes="eg3d"),
           "official": pof3d_config(**OFFICIAL), "official, white, corrected planes": pof3d_config(**OFFICIAL | dict(background="white", plane_axes="xyz", backbone_clamp=.5))}

def generator(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    G = PoseFreeGenerator(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith(("bias", "noise_strength")): p.add_(.3 * torch.randn_like(p))
    return G

def step(planes, render, ws, angles):
    "View, and gradients of everything that a view shows"
    ws, angles = ws.detach().clone().requires_grad_(), angles.clone().requires_grad_()
    v = render(planes(ws), Pose.of(angles))
    weights = torch.linspace(-1, 1, v.rgb.numel(), dtype=v.rgb.dtype).view_as(v.rgb)
    loss = (v.rgb * weights).sum() + v.depth.square().mean() + v.weight.square().mean() + v.rgb_raw.square().mean()
    return [*v, *torch.autograd.grad(loss, (ws, angles))]

def same(a, b, tolerance): # relative to the largest number
    for x, y in zip(a, b, strict=True):
        error = float((x - y).detach().abs().max() / y.detach().abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"relative difference {error:.1e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 3e-9), (torch.float32, 3e-4)]) # 1e-10 a sample is the published march's own constant
def test_the_whole_step_is_the_naive_one(name, dtype, tolerance):
    G = generator(CONFIGS[name], dtype)
    frozen = copy.deepcopy(G).requires_grad_(False)
    ws, angles = G.expand_ws(G.mapping(torch.randn(2, G.config.z_dim, dtype=dtype))), torch.tensor([[.2, .1], [-.4, .05]], dtype=dtype)
    want = step(lambda ws: naive.planes(G, ws), lambda p, pose: naive.render(G, p, pose), ws, angles)
    same(step(frozen.planes, frozen.render, ws, angles), want, tolerance)
    same(step(G.planes, G.render, ws, angles), want, tolerance) # weights with gradients: the plain way


def test_super_resolution_is_the_naive_one():
    G = generator(pof3d_config(**OFFICIAL | dict(superresolution="2x", superres_noise=True, features=4, plane_channels=4)), torch.float32)
    frozen, ws, angles = copy.deepcopy(G).requires_grad_(False), G.expand_ws(G.mapping(torch.randn(1, 24))), torch.tensor([[.2, .1]])
    same(step(frozen.planes, frozen.render, ws, angles), step(lambda ws: naive.planes(G, ws), lambda p, pose: naive.render(G, p, pose), ws, angles), 1e-3)


def test_frozen_is_chosen_by_the_weights_alone():
    made = lambda y: type(y.grad_fn).__name__
    for layer in (ModConv(4, 5, 3, noise_size=6, up=True), ModConv(4, 5, 3, clamp=1.), ToImage(4, 3, 3)):
        x, w = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(1, 3)
        assert made(layer(x, w)) != "FrozenConvBackward"
        layer.weight.requires_grad_(False)
        assert made(layer(x, w)) != "FrozenConvBackward" # the bias still learns
        for p in layer.parameters(recurse=False): p.requires_grad_(False)
        assert made(layer(x, w)) == "FrozenConvBackward"
        y = layer(x, w)
        y.sum().backward()
        assert layer.weight.grad is None and layer.style.weight.grad is not None # the style's own weights are another module's, and still learn
    G = generator(CONFIGS["ours"], torch.float32)
    w, xyz = torch.randn(1, 72), torch.zeros(1, 4, 3)
    assert made(G.field(G.planes(w), xyz)[1]) != "FrozenFieldBackward"
    assert made(G.requires_grad_(False).field(G.planes(w.requires_grad_()), xyz)[1]) == "FrozenFieldBackward"


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.booleans(), st.integers(1, 7), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, .8]), st.integers(0, 10 ** 6))
def test_frozen_convolution(batch, one_style, size, up, noisy, demodulate, act, clamp, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x, s, weight, bias = draw(batch, 3, size, size).requires_grad_(), draw(1 if one_style else batch, 3).requires_grad_(), draw(4, 3, 3, 3), draw(4)
    noise = draw(size * (1 + up), size * (1 + up)) if noisy else None
    how = weight, bias, noise, demodulate, up, act, clamp
    want, got = plain_conv(x, s.expand(batch, -1), *how), FrozenConv.apply(x, s, *how)
    d = torch.randn(want.shape, generator=g, dtype=torch.float64)
    same([got, *torch.autograd.grad(got, (x, s), d)], [want, *torch.autograd.grad(want, (x, s), d)], 1e-10)


@pytest.mark.parametrize("up", [False, True])
def test_frozen_convolution_has_second_derivatives(up):
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    x, s, weight, bias = draw(1, 2, 3, 3).requires_grad_(), draw(1, 2).requires_grad_(), draw(2, 2, 3, 3), draw(2)
    f = lambda x, s: FrozenConv.apply(x, s, weight, bias, None, True, up, True, None)
    assert torch.autograd.gradcheck(f, (x, s)) and torch.autograd.gradgradcheck(f, (x, s))


@pytest.mark.parametrize("name", ["ours", "official"])
@pytest.mark.parametrize("learn", ["pose", "ws", "pose and ws"])
def test_a_frozen_generator_has_second_derivatives(name, learn):
    "Of a view with respect to the pose alone, the code alone, and both: those of the generator with weights that learn"
    G = generator(dataclasses.replace(CONFIGS[name], render_resolution=3, samples=3, fine_samples=0))
    frozen, ws, angles = copy.deepcopy(G).requires_grad_(False), G.mapping(torch.randn(1, G.config.z_dim, dtype=torch.float64)).detach(), torch.tensor([[.2, .1]], dtype=torch.float64)
    def twice(view):
        x = [v.clone().requires_grad_() for v, k in ((ws, "ws"), (angles, "pose")) if k in learn]
        given = dict(zip([k for k in ("ws", "pose") if k in learn], x))
        v = view(given.get("ws", ws), Pose.of(given.get("pose", angles)))
        once = torch.autograd.grad(v.rgb.pow(3).sum() + v.depth.square().sum(), x, create_graph=True)
        return [*once, *torch.autograd.grad(sum(g.square().sum() for g in once), x)]
    want = twice(lambda ws, pose: naive.render(G, naive.planes(G, G.expand_ws(ws)), pose))
    same(twice(frozen.view), want, 1e-7); same(twice(G.view), want, 1e-7)


def test_a_style_of_zero_has_a_gradient():
    "Nothing is divided by the style"
    x, s, weight = torch.randn(1, 3, 9, 9), torch.tensor([[0., 1, -1]], requires_grad=True), torch.randn(4, 3, 3, 3)
    got, = torch.autograd.grad(FrozenConv.apply(x, s, weight, torch.zeros(4), None, True, False, True, None).square().sum(), s)
    want, = torch.autograd.grad(plain_conv(x, s, weight, torch.zeros(4), None, True, False, True, None).square().sum(), s)
    assert want[0, 0] != 0 and torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_folded_weights_are_the_same_convolution():
    torch.manual_seed(0)
    weight, s, scale, bias = torch.randn(3, 2, 3, 3), torch.randn(1, 2), torch.rand(1, 3), torch.randn(3)
    for size in (2, 9): # 2: pictures are smaller than weights, 9: weights are smaller, and are scaled
        x = torch.randn(1, 2, size, size)
        want = scale[:, :, None, None] * modulated_conv(x, weight, s, demodulate=False) + bias[:, None, None]
        assert torch.allclose(scaled_conv(x, weight, s, scale, bias), want, atol=1e-5)


def test_half_precision_comes_back_in_full():
    G = generator(CONFIGS["official"], torch.float32).requires_grad_(False)
    ws = G.expand_ws(G.mapping(torch.randn(1, 24)))
    with torch.autocast("cpu", torch.bfloat16): half = G.planes(ws).features
    full = G.planes(ws).features
    assert half.dtype == torch.float32 and .5 > float((half - full).norm() / full.norm()) > 1e-4


@pytest.mark.parametrize("axes,shape", [("xyz", (5, 5)), ("eg3d", (5, 5)), ("xyz", (4, 7)), ("eg3d", (4, 7))])
def test_planes_are_read_and_written_alike(axes, shape):
    g = torch.Generator().manual_seed(0)
    planes = torch.randn(2, 3, 4, *shape, generator=g, dtype=torch.float64, requires_grad=True)
    xyz = (torch.rand(2, 90, 3, generator=g, dtype=torch.float64) * 1.6 - .8).requires_grad_() # half of the points lie outside
    d = torch.randn(2, 90, 4, generator=g, dtype=torch.float64)
    want = sample_planes_plain(planes, xyz, 1., axes)
    want = [want, *torch.autograd.grad(want, (planes, xyz), d)]
    for p in (planes, planes.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)): # channels first and channels last in memory
        got = sample_planes(p, xyz, 1., axes)
        same([got, *torch.autograd.grad(got, (planes, xyz), d)], want, 1e-12)
    assert len(plane_table(planes, axes).axes) == (2 if axes == "eg3d" and shape[0] == shape[1] else 3)


def test_channels_last_planes_are_a_table_already():
    planes = torch.randn(2, 5, 5, 3, 4).permute(0, 3, 4, 1, 2)
    assert plane_table(planes).rows.data_ptr() == planes.data_ptr()


def test_rows_are_added_where_they_were_read():
    g = torch.Generator().manual_seed(0)
    index, weight, d = torch.randint(9, (50, 3), generator=g, dtype=torch.int32), torch.rand(50, 3, generator=g), torch.randn(50, 4, generator=g)
    want = torch.zeros(12, 4)                                                      # rows 9, 10 and 11 are never read
    for k in range(3): want.index_add_(0, index[:, k], d * weight[:, k:k + 1])
    assert torch.allclose(add_rows(d, index, weight, 12), want, atol=1e-5)
    both = torch.cat([index, index + 12]), torch.cat([weight, weight * 2])
    assert torch.allclose(add_scene_rows(torch.cat([d, d]), *both, 24, 2), add_rows(torch.cat([d, d]), *both, 24), atol=1e-5)
    table = torch.randn(12, 4, generator=g)
    assert torch.allclose(row_dots(d, table, index), (table[index.long()] * d[:, None]).sum(-1), atol=1e-5)


@pytest.mark.parametrize("act", ["lrelu", "softplus"])
@pytest.mark.parametrize("chunk", [1000, 7])
def test_frozen_field(act, chunk):
    config = dataclasses.replace(CONFIGS["ours"], decoder_act=act, plane_axes="eg3d")
    G = generator(config).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    planes, xyz = torch.randn(2, 3, 6, 5, 5, generator=g, dtype=torch.float64).requires_grad_(), (torch.rand(2, 40, 3, generator=g, dtype=torch.float64) * 1.2 - .6).requires_grad_()
    table = plane_table(planes, "eg3d")
    def run(f):
        raw, values = f()
        return [raw, values, *torch.autograd.grad(raw.square().sum() + values.pow(3).sum(), (planes, xyz), retain_graph=True)]
    fast = lambda: FrozenField.apply(table.rows, xyz, table._replace(rows=None), 1., G.decoder, chunk)
    same(run(fast), run(lambda: G.decoder(sample_planes_plain(planes, xyz, 1., "eg3d"))), 1e-10)
    once, = torch.autograd.grad(fast()[1].square().sum(), planes, create_graph=True)
    plain, = torch.autograd.grad(G.decoder(sample_planes_plain(planes, xyz, 1., "eg3d"))[1].square().sum(), planes, create_graph=True)
    same(torch.autograd.grad(once.square().sum(), planes), torch.autograd.grad(plain.square().sum(), planes), 1e-9) # and once more


def sorted_together(field, o, d, near, far, n, m, rule, **kwargs):
    "The straightforward way: colours of both passes are sorted too"
    asked = []
    def listen(xyz):
        raw, values = field(xyz)
        asked.append((((xyz - o.repeat_interleave(xyz.shape[1] // o.shape[1], 1)).norm(dim=-1)).view(*o.shape[:2], -1), raw.view(*o.shape[:2], -1), values.view(*o.shape[:2], -1, values.shape[-1])))
        return raw, values
    got = rule(listen, o, d, near, far, n, m, **kwargs)
    t, raw, values = (torch.cat(x, 2) for x in zip(*asked))
    t, order = t.sort(-1)
    return got, (raw.gather(-1, order), values.gather(-2, order[..., None].expand(*order.shape, values.shape[-1])), t)


def test_colours_need_no_sorting():
    g = torch.Generator().manual_seed(0)
    o, d = torch.zeros(2, 5, 3, dtype=torch.float64), torch.nn.functional.normalize(torch.randn(2, 5, 3, generator=g, dtype=torch.float64), dim=-1)
    field = lambda x: (3 * (4 * x).sin().sum(-1), torch.cat([x.cos(), x.sin()], -1))
    got, sorted_ = sorted_together(field, o, d, 1., 2., 9, 11, render_rays, jitter=1., generator=torch.Generator().manual_seed(1))
    same(got, march(*sorted_, softplus_density()), 1e-10)
    got, sorted_ = sorted_together(field, o, d, 1., 2., 9, 11, render_rays_eg3d, white=True, jitter=1., generator=torch.Generator().manual_seed(1))
    same(got, march_eg3d(*sorted_, True), 1e-10)


@pytest.mark.parametrize("name", ["ours", "official"])
def test_views_share_planes_and_style(name):
    G = generator(CONFIGS[name]).requires_grad_(False)
    ws, poses = G.expand_ws(G.mapping(torch.randn(1, G.config.z_dim, dtype=torch.float64))), Pose.of(torch.linspace(-.4, .4, 8, dtype=torch.float64).view(4, 2))
    many = G.render(G.planes(ws), poses)
    for i in range(4):
        one = G.render(G.planes(ws), poses[[i]])
        seen = one.weight > 1e-2                                                   # the depth of empty rays is the batch's, as published
        same([many.rgb[i:i + 1], many.weight[i:i + 1], many.depth[i:i + 1][seen]], [one.rgb, one.weight, one.depth[seen]], 1e-9)


def test_doubling_is_its_own_convolution():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    for y in (upsample(x), upsample(x.contiguous(memory_format=torch.channels_last))):
        d = torch.randn_like(y)
        same([y, *torch.autograd.grad(y, x, d)], [naive.double(x), *torch.autograd.grad(naive.double(x), x, d)], 1e-12)


def test_what_is_kept_of_a_weight_follows_the_weight():
    layer, x, w = ModConv(4, 5, 3).requires_grad_(False), torch.randn(1, 4, 3, 3), torch.randn(1, 3)
    plain = lambda: plain_conv(x, layer.style(w), layer.weight, layer.bias, None, True, False, True, None)
    assert torch.allclose(layer(x, w), plain(), atol=1e-5) and fixed(layer.weight) is fixed(layer.weight)
    before = layer(x, w)
    changes = [lambda: layer.weight.mul_(torch.rand_like(layer.weight)), lambda: layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}), lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn_like(layer.weight), requires_grad=False))]
    for change in changes:
        change()
        assert torch.allclose(layer(x, w), plain(), atol=1e-5) and not torch.allclose(layer(x, w), before, atol=1e-2)
    double = copy.deepcopy(layer).double()
    assert double(x.double(), w.double()).dtype == torch.float64 and torch.allclose(double(x.double(), w.double()).float(), layer(x, w), atol=1e-5)
    with torch.inference_mode():
        fresh = ModConv(4, 5, 3)
        fresh(x, w)
    assert torch.allclose(layer(x, w), plain(), atol=1e-5)
