"What must hold for any pose, any field and any depth: camera, rendering and warp. Drawn by hypothesis, the same each time."
import torch
from hypothesis import given, settings, strategies as st

from posefree_kit.camera import FOCAL, Pose, cam2world, camera_position, intrinsics, mirror, project, rays, turn, unproject
from posefree_kit.generator import GeneratorConfig
from posefree_kit.losses import warp_to_reference
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.rendering import alpha_from_density, march, render_rays, softplus_density, weights_from_alpha, weights_from_density

always = settings(max_examples=15, derandomize=True, deadline=None, database=None)
angle, seed, near_angle = st.floats(-1.25, 1.25), st.integers(0, 10 ** 6), st.floats(-.35, .35)
NEAR, FAR, SIZE = 2.25, 3.15, 12
MIRROR = torch.tensor([-1., 1, 1])

def random(s:int): return torch.Generator().manual_seed(s)
def pose_of(*yaw_pitch): return Pose.of(torch.tensor([yaw_pitch]))
def view_from(pose:Pose, k=None): return cam2world(pose), intrinsics(batch=len(pose)) if k is None else k

def field_of(s:int): # a smooth field with solids and gaps: xyz (B, M, 3) -> raw (B, M), values (B, M, 3)
    g = random(s)
    a, b, c = torch.randn(3, 4, generator=g) * 4, torch.randn(4, 4, generator=g) * 3, torch.rand(4, generator=g) * 6
    def field(xyz):
        waves = torch.sin(xyz @ a + c)
        return (waves @ b[:, :1])[..., 0] - 2, waves @ b[:, 1:]
    return field

def seen(field, pose, **kwargs): # image (B, 3, SIZE, SIZE), depth and weight (B, SIZE * SIZE)
    o, d = rays(*view_from(pose), SIZE)
    out = render_rays(field, o, d, NEAR, FAR, 12, 8, softplus_density(20.), **kwargs)
    return out.values.mT.unflatten(-1, (SIZE, SIZE)), out.depth, out.weight


# camera

@always
@given(angle, angle, st.integers(2, 9), st.floats(1., 6.), st.floats(.3, .7), st.floats(-.2, .2))
def test_out_and_back(yaw, pitch, size, focal, centre, skew):
    "project undoes unproject, for any pinhole"
    m, k = cam2world(pose_of(yaw, pitch)), torch.tensor([[[focal, skew, centre], [0, focal * 1.1, 1 - centre], [0, 0, 1]]])
    depth = 2 + torch.rand(1, 1, size, size, generator=random(0))
    uv, dist = project(unproject(depth, m, k), m, k)
    c = (torch.arange(size) + .5) / size
    assert torch.allclose(uv[0].view(size, size, 2), torch.stack(torch.meshgrid(c, c, indexing="xy"), -1), atol=1e-4)
    assert torch.allclose(dist, depth.flatten(1), atol=1e-4)


@always
@given(angle, angle, angle, angle, angle, angle)
def test_turns_add_up_and_mirrors_cancel(yaw, pitch, a, b, c, d):
    p = pose_of(yaw, pitch)
    assert torch.allclose(turn(turn(p, a, b), c, d).stack(), turn(p, a + c, b + d).stack(), atol=1e-5)
    assert torch.equal(turn(p).stack(), p.stack()) and torch.allclose(turn(turn(p, a, b), -a, -b).stack(), p.stack(), atol=1e-5)
    assert torch.equal(mirror(mirror(p)).stack(), p.stack())
    assert torch.allclose(mirror(turn(p, a, b)).stack(), turn(mirror(p), -a, b).stack(), atol=1e-5)


@always
@given(angle, angle)
def test_a_mirrored_pose_is_a_mirrored_camera(yaw, pitch):
    p = pose_of(yaw, pitch)
    assert torch.allclose(camera_position(mirror(p)), camera_position(p) * MIRROR, atol=1e-6)
    sides = torch.cat([MIRROR, torch.ones(1)])
    assert torch.allclose(cam2world(mirror(p)), sides[:, None] * cam2world(p) * sides, atol=1e-6)


# rendering

@always
@given(near_angle, near_angle, seed)
def test_a_mirrored_field_from_a_mirrored_pose_is_the_mirrored_image(yaw, pitch, s):
    field, p = field_of(s), pose_of(yaw, pitch)
    image, depth, weight = seen(field, p)
    other, far_depth, far_weight = seen(lambda xyz: field(xyz * MIRROR), mirror(p))
    assert torch.allclose(other.flip(-1), image, atol=2e-3)
    side = lambda x: x.unflatten(-1, (SIZE, SIZE)).flip(-1).flatten(1)
    assert torch.allclose(side(far_weight), weight, atol=1e-3) and torch.allclose(side(far_depth)[weight > .1], depth[weight > .1], atol=2e-3)


@always
@given(st.integers(2, 24), st.floats(0., 1e4), seed)
def test_routes_agree_and_nothing_is_lost(n, scale, s):
    "By opacity or by density: the same weights; with what passes through, they sum to 1"
    g = random(s)
    sigma, delta = torch.rand(3, n, generator=g, dtype=torch.float64) * scale, torch.rand(3, n, generator=g, dtype=torch.float64) * .1
    a, b = weights_from_alpha(alpha_from_density(sigma, delta)), weights_from_density(sigma, delta)
    assert torch.allclose(a, b, atol=1e-10) and (a >= 0).all() and (b >= 0).all()
    assert torch.allclose(a.sum(-1) + torch.exp(-(sigma * delta).sum(-1)), torch.ones(3, dtype=torch.float64))


@always
@given(near_angle, near_angle, seed, st.floats(0., 1.))
def test_depth_and_weight_stay_in_bounds(yaw, pitch, s, jitter):
    _, depth, weight = seen(field_of(s), pose_of(yaw, pitch), jitter=jitter, generator=random(s))
    assert depth.min() >= NEAR and depth.max() <= FAR + jitter * (FAR - NEAR) / 11 + 1e-5 # a jittered sample may lie up to a step further
    assert weight.min() >= 0 and weight.max() <= 1 + 1e-5


@always
@given(seed, st.integers(2, 9), st.integers(1, 9))
def test_the_order_of_samples_and_rays_does_not_matter(s, n, m):
    g = random(s)
    t, raw, values = torch.rand(2, 5, n + m, generator=g) + 2, torch.randn(2, 5, n + m, generator=g), torch.randn(2, 5, n + m, 3, generator=g)
    sorted_, order = t.sort(-1)
    raw = raw.gather(-1, order)
    plain = march(raw, values.gather(2, order[..., None].expand(-1, -1, -1, 3)), sorted_, softplus_density(9.))
    passes = march(raw, list(values.split([n, m], 2)), sorted_, softplus_density(9.), order)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, passes))
    shuffle = torch.randperm(5, generator=g)
    other = march(raw[:, shuffle], [v[:, shuffle] for v in values.split([n, m], 2)], sorted_[:, shuffle], softplus_density(9.), order[:, shuffle])
    assert all(torch.allclose(a[:, shuffle], b, atol=1e-5) for a, b in zip(passes, other))


# warp of Eq. 4

def plane_depth(normal, offset:float, cam, k, size:int): # distance along each ray to the plane normal . x = offset: (B, 1, size, size)
    o, d = rays(cam, k, size)
    return ((offset - o @ normal) / (d @ normal)).unflatten(-1, (size, size))[:, None]

@always
@given(angle, angle, seed)
def test_no_turn_is_no_warp(yaw, pitch, s):
    g, size = random(s), 16
    camera = view_from(pose_of(yaw, pitch))
    image, depth = torch.rand(1, 3, size, size, generator=g) * 2 - 1, 2.7 + .02 * torch.rand(1, 1, size, size, generator=g)
    warped, visible = warp_to_reference(image, depth, depth, torch.ones_like(depth), camera, camera)
    assert torch.allclose(warped, image, atol=1e-3) and visible.all()


@always
@given(angle, angle, near_angle, near_angle, seed)
def test_the_warp_of_a_plane_is_its_homography(yaw, pitch, dyaw, dpitch, s):
    "u' ~ K (R + t n^T / d) K^-1 u: read off an image whose colours are its own coordinates"
    size, g = 24, random(s)
    here, there = pose_of(yaw, pitch), pose_of(max(-1.3, min(1.3, yaw + dyaw)), max(-1.3, min(1.3, pitch + dpitch)))
    (m1, k), (m2, _) = view_from(here), view_from(there)
    normal = torch.nn.functional.normalize(-m1[0, :3, 2] - m2[0, :3, 2] + .4 * (torch.rand(3, generator=g) - .5), dim=0) # faces both cameras
    offset = .2 * (float(torch.rand((), generator=g)) - .5)
    depth, novel_depth = (plane_depth(normal, offset, m, k, size) for m in (m1, m2))
    c = (torch.arange(size) + .5) / size
    own = torch.stack([*torch.meshgrid(c, c, indexing="xy"), torch.zeros(size, size)])[None]
    warped, visible = warp_to_reference(own, novel_depth, depth, torch.ones_like(depth), (m1, k), (m2, k), max_step=9.)
    turned = m2[0, :3, :3].T @ m1[0, :3, :3]
    shift = m2[0, :3, :3].T @ (m1[0, :3, 3] - m2[0, :3, 3])
    n1 = m1[0, :3, :3].T @ normal                                                # the plane as the first camera has it: n1 . x = d1
    d1 = offset - float(normal @ m1[0, :3, 3])
    h = k[0] @ (turned + torch.outer(shift, n1) / d1) @ torch.linalg.inv(k[0])
    uvw = torch.cat([own[0, :2], torch.ones(1, size, size)]).flatten(1)
    uv = (h @ uvw)[:2] / (h @ uvw)[2:]
    inside = ((uv > .5 / size) & (uv < 1 - .5 / size)).all(0)                    # colours stop changing half a pixel from the border
    assert (warped[0, :2].flatten(1) - uv)[:, inside].abs().max() < 2e-3 if inside.any() else True
    sure = ((uv > 1 / size) & (uv < 1 - 1 / size)).all(0)
    assert visible.flatten()[sure].all() and not visible.flatten()[((uv < -1e-3) | (uv > 1 + 1e-3)).any(0)].any()


@always
@given(st.floats(.15, .35), st.floats(-.06, .06), st.booleans())
def test_what_is_hidden_is_left_out(dyaw, edge, left):
    "A wall behind half a screen: what the screen hides from the second camera is never carried over, what both see is"
    size, z_wall, z_screen = 48, -.3, .2
    pose, novel = pose_of(0., 0.), pose_of(dyaw if left else -dyaw, 0.)
    def depth_of(m, k): # the screen covers x < edge
        o, d = rays(m, k, size)
        wall, screen = ((z - o[..., 2]) / d[..., 2] for z in (z_wall, z_screen))
        hit = (o + d * screen[..., None])[..., 0] < edge
        return torch.where(hit, screen, wall).unflatten(-1, (size, size))[:, None], hit
    (m1, k), (m2, _) = view_from(pose), view_from(novel)
    (depth, on_screen), (novel_depth, _) = depth_of(m1, k), depth_of(m2, k)
    _, visible = warp_to_reference(torch.zeros(1, 3, size, size), novel_depth, depth, torch.ones_like(depth), (m1, k), (m2, k))
    x, eye = unproject(depth, m1, k), m2[:, None, :3, 3]
    crossing = (eye + (x - eye) * ((z_screen - eye[..., 2:]) / (x[..., 2:] - eye[..., 2:])))[..., 0] # where the way to the second camera passes the screen's plane
    uv, _ = project(x, m2, k)
    inside, pixel = ((uv > .03) & (uv < .97)).all(-1), 2.9 / FOCAL / size
    hidden, free = ~on_screen & (crossing < edge - 2 * pixel), on_screen | (crossing > edge + 2 * pixel)
    rim = (x[..., 0] - edge).abs() < 3 * pixel                                   # the screen's own rim, and the wall beside it
    assert not (visible.flatten(1).bool() & hidden).any() and (visible.flatten(1).bool() | ~(free & inside) | rim | ((crossing - edge).abs() < 3 * pixel)).all()
    if left: assert hidden.any() or not (~on_screen).any()


@always
@given(seed)
def test_images_of_a_batch_do_not_meet(s):
    g, size = random(s), 10
    pose, off = Pose.of(torch.rand(3, 2, generator=g) - .5), Pose.of(.2 * torch.rand(3, 2, generator=g))
    novel, depth, other = torch.randn(3, 3, size, size, generator=g), *(2.7 + .05 * torch.rand(2, 3, 1, size, size, generator=g))
    there = turn(pose, off.yaw, off.pitch)
    warp = lambda i: warp_to_reference(novel[i], other[i], depth[i], torch.ones_like(depth[i]), view_from(pose[i]), view_from(there[i]))
    whole = warp(slice(0, 3))
    assert all(torch.allclose(a[i:i + 1], b, atol=1e-5) for i in range(3) for a, b in zip(whole, warp(slice(i, i + 1))))
    image = seen(field_of(s), pose)
    assert all(torch.allclose(a[i:i + 1], b, atol=1e-4) for i in range(3) for a, b in zip(image, seen(field_of(s), pose[i])))


@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(seed)
def test_a_generator_draws_each_image_by_itself(s):
    torch.manual_seed(s % 1000)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8, samples=6)).requires_grad_(False)
    w = torch.randn(3, G.config.w_dim)
    whole = G.view(w, G.pose(w))
    for i in range(3):
        alone = G.view(w[i:i + 1], G.pose(w[i:i + 1]))
        assert all(torch.allclose(a[i:i + 1], b, atol=1e-4) for a, b in zip(whole, alone))
