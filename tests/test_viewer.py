"What the viewer writes is what the generator shows: right files, right shapes, nothing half-written."
import json
import math

import imageio.v2 as imageio
import matplotlib
import pytest
import torch
import trimesh
from PIL import Image

from posefree_kit.camera import Pose
from posefree_kit.core import InputError
from posefree_kit.generator import GeneratorConfig, View
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.viewer import comparison, density_grid, depth_figure, depth_image, look, loss_plot, mesh, plotly_offline, point_figure, save_depth, surface_level, turntable, turntable_poses, view_points

@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    return PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), plane_channels=8, decoder_hidden=16)).start(0).requires_grad_(False).eval()

@pytest.fixture(scope="module")
def w(G): return G.mapping(G.draw(1, 0))

class Sphere:
    "A ball with a known surface (its rim is soft: light enters by 0.02), behind the interface of a generator"
    config = GeneratorConfig(samples=96, ball=0., background="none")
    render_resolution = 48
    def __init__(self, r=.2, centre=(.03, 0., 0.)): self.r, self.centre = r, torch.tensor(centre)
    def planes(self, ws):
        from posefree_kit.generator import Planes
        return Planes(torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 4))
    def field(self, planes, xyz):
        gap = self.r - (xyz - self.centre).norm(dim=-1)
        return gap * 400, (xyz * 2 + .5).clamp(0, 1)
    def render(self, planes, pose, size=None):
        from posefree_kit.camera import cam2world, intrinsics, rays
        from posefree_kit.rendering import render_rays, softplus_density
        c, n = self.config, size or self.render_resolution
        o, d = rays(cam2world(pose, c.radius), intrinsics(c.focal, len(pose)), n)
        values, depth, weight = (x.reshape(len(pose), n * n, -1).mT.unflatten(-1, (n, n)) for x in render_rays(lambda x: self.field(planes, x), o, d, c.near, c.far, c.samples, 0, softplus_density(c.density_scale)))
        return View(values * 2 - 1, values * 2 - 1, depth, weight)

def test_looking_does_not_depend_on_the_batch(G, w):
    poses = Pose.deg([-20., 0, 30])
    a, b = look(G, G.planes(w), poses, 40, batch=1), look(G, G.planes(w), poses, 40, batch=3)
    assert a.shape == (3, 3, 40, 40) and torch.allclose(a, b, atol=1e-5) and a.abs().max() <= 1

def test_depth_colours_are_ordered_and_empty_is_white():
    d = torch.linspace(2.4, 2.9, 25).reshape(1, 1, 5, 5)
    x = depth_image(d, torch.ones_like(d))
    assert (x[0, 1].flatten().diff() <= 0).all() and x[0, 1, 0, 0] > x[0, 1, -1, -1]           # viridis: green falls from near to far
    assert (depth_image(d, torch.zeros_like(d)) == 1).all()
    assert depth_image(torch.full((1, 1, 3, 3), torch.nan), torch.zeros(1, 1, 3, 3)).isfinite().all()
    with pytest.raises(InputError, match="weight: expected shape"): depth_image(d, torch.ones(1, 1, 4, 4))

def test_comparison_is_written_and_shows_the_error(G, w, tmp_path):
    backend, pose = matplotlib.get_backend(), G.pose(w)
    image = G.view(w, pose).rgb
    fig = comparison(image, G, w, pose, tmp_path/"c.png", title="häd")
    assert "mean 0.000" in fig.subfigs[0].axes[2].get_title() and len(fig.subfigs[1].axes) == 5
    assert "mean 0.1" in comparison((image + .25).clamp(-1, 1), G, w, pose).subfigs[0].axes[2].get_title()
    assert Image.open(tmp_path/"c.png").size[0] > 800 and matplotlib.get_backend() == backend
    comparison(torch.nn.functional.interpolate(image, (128, 128)), G, w, pose)                  # a larger input is made smaller
    with pytest.raises(InputError, match="square"): comparison(torch.zeros(1, 3, 8, 9), G, w, pose)
    save_depth(G.view(w, pose), tmp_path/"d.png"); assert Image.open(tmp_path/"d.png").size[0] > 200

def test_turntable_loops(G, w, tmp_path):
    yaw, pitch = turntable_poses(48, 30., 5.).degrees().T
    assert yaw.max() == pytest.approx(30) and yaw.min() == pytest.approx(-30) and pitch.max() == pytest.approx(5) and abs(yaw[-1]) < 5
    for name in ("t.mp4", "t.gif"):
        turntable(G, w, tmp_path/name, frames=6, size=32, shown=64)
        frames = imageio.mimread(tmp_path/name)
        assert len(frames) == 6 and frames[0].shape[:2] == (64, 64)
    with pytest.raises(InputError, match="mp4 or .gif"): turntable(G, w, tmp_path/"t.avi")
    with pytest.raises(InputError, match="even sizes"): turntable(G, w, tmp_path/"t.mp4", size=33)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.gif", "t.mp4"]

@pytest.mark.parametrize("suffix", ("glb", "ply"))
def test_the_mesh_of_a_sphere_is_a_sphere(tmp_path, suffix):
    s = Sphere()
    info = mesh(s, torch.zeros(1, 4), tmp_path/f"m.{suffix}", resolution=72)
    shape = trimesh.load(tmp_path/f"m.{suffix}", force="mesh")
    r = (torch.tensor(shape.vertices, dtype=torch.float32) - s.centre).norm(dim=-1)
    assert info.watertight and shape.is_watertight and info.vertices == len(shape.vertices) and shape.volume > 0
    seen = (view_points(s.render(None, Pose.deg(0.)), Pose.deg(0.), s.config)[0] - s.centre).norm(dim=-1)
    assert r.std() < .004 and abs(r.mean() - .2) < .025 and abs(r.mean() - seen[20:28, 20:28].median()) < .004 and abs(shape.centroid[0] - .03) < .004     # its place in the world is right
    colour = torch.tensor(shape.visual.vertex_colors[:, :3].copy()).float() / 255
    assert (colour - (torch.tensor(shape.vertices).float() * 2 + .5).clamp(0, 1)).abs().max() < .01

def test_a_mesh_is_closed_where_the_picture_ends_and_of_one_piece(tmp_path):
    big = Sphere(r=.4)
    assert mesh(big, torch.zeros(1, 4), tmp_path/"m.ply", resolution=48, level=20.).watertight
    shape = trimesh.load(tmp_path/"m.ply")
    assert shape.bounds[1, 1] < .36 and shape.body_count == 1
    sigma, half = density_grid(big, big.planes(None), 32)
    assert half == big.config.box / 2 and all(sigma.select(a, i).abs().max() == 0 for a in range(3) for i in (0, -1))

def test_a_mesh_of_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no surface"): mesh(Sphere(r=-.5), torch.zeros(1, 4), tmp_path/"m.glb", resolution=24)
    with pytest.raises(InputError, match="no surface"): mesh(Sphere(), torch.zeros(1, 4), tmp_path/"m.glb", resolution=24, level=1e9)
    with pytest.raises(InputError, match="expected a .glb"): mesh(Sphere(), torch.zeros(1, 4), tmp_path/"m.txt")
    assert not list(tmp_path.iterdir()) and surface_level(Sphere(), Sphere().planes(None)) > 0

def test_points_of_a_sphere_lie_on_it():
    s, pose = Sphere(), Pose.deg(25., 10.)
    view = s.render(None, pose)
    points, seen = view_points(view, pose, s.config)
    r = (points[seen] - s.centre).norm(dim=-1)
    assert (r - .2).abs().median() < .025 and r.std() < .006 and 500 < int(seen.sum()) < 48 * 48
    surface, dots = depth_figure(view, pose, s.config).data[0], point_figure(view, pose, s.config).data[0]
    assert surface.z.shape == (48, 48) and math.isnan(surface.z[0, 0]) and len(dots.x) == int(seen.sum())
    json.dumps(point_figure(view, pose, s.config).to_plotly_json()["layout"], default=str)
    plotly_offline()
    import plotly.io as pio
    assert pio.renderers.default == "plotly_mimetype+docs"

def test_loss_plot(tmp_path):
    fig = loss_plot([dict(step=i, stage=i // 3, total=1 / (i + 1), mv=0., note="x", bad=float("nan")) for i in range(6)], tmp_path/"l.png")
    lines = [line.get_label() for line in fig.axes[0].lines]
    assert "total" in lines and "mv" not in lines and "note" not in lines and (tmp_path/"l.png").stat().st_size > 1000
    with pytest.raises(InputError, match="at least one step"): loss_plot([])
