"What the viewer writes is what the generator shows: right files, right shapes, nothing half-written."
import base64
import dataclasses
import functools
import io
import json
import math
import threading
import time
import types

import imageio.v2 as imageio
import matplotlib
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from posefree_kit import viewer
from posefree_kit.camera import Pose
from posefree_kit.core import InputError, config_to_dict
from posefree_kit.generator import GeneratorConfig, View
from posefree_kit.optimiser import invert, quick, with_steps
from posefree_kit.portraits import portrait
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.viewer import (FIELDS, FILES, KNOBS, Flipbook, Session, check_knob, cockpit, comparison, config_of, density_grid, depth_against, depth_figure, depth_image, load_latent, look, loss_plot, mesh, planned,
                                 plotly_offline, point_figure, pose_view, replay, save_depth, save_latent, save_session, scrubber, seen_surface, spark, steered, surface_figure, surface_level, surface_still, turntable, turntable_poses, view_points, weights_grid, write_results)

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
    around = lambda p: comparison(image, G, w, p).subfigs[1].axes[2].images[0].get_array()
    assert abs(around(pose.at(torch.tensor([2.2]))) - around(pose)).mean() > .02                # ... and from the distance of the reconstruction's camera
    comparison(torch.nn.functional.interpolate(image, (128, 128)), G, w, pose)                  # a larger input is made smaller
    with pytest.raises(InputError, match="square"): comparison(torch.zeros(1, 3, 8, 9), G, w, pose)
    bright = types.SimpleNamespace(planes=G.planes, config=G.config, render=lambda *a, **k: G.render(*a, **k)._replace(rgb=torch.full_like(image, 1.5)))
    assert "mean 0.000\nPSNR 120.0" in comparison(torch.ones_like(image), bright, w, pose, yaws_deg=(0,)).subfigs[0].axes[2].get_title()              # as in the report: what no file can hold counts as its end
    save_depth(G.view(w, pose), tmp_path/"d.png"); assert Image.open(tmp_path/"d.png").size[0] > 200

def test_turntable_loops(G, w, tmp_path):
    yaw, pitch = turntable_poses(48, 30., 5.).degrees().T
    assert yaw.max() == pytest.approx(30) and yaw.min() == pytest.approx(-30) and pitch.max() == pytest.approx(5) and abs(yaw[-1]) < 5
    for name in ("t.mp4", "t.gif"):
        turntable(G, w, tmp_path/name, frames=6, size=32, shown=64)
        frames = imageio.mimread(tmp_path/name)
        assert len(frames) == 6 and frames[0].shape[:2] == (64, 64)
    turntable(G, w, tmp_path/"near.gif", frames=6, size=32, shown=64, radius=torch.tensor([2.2]))  # a camera that the generator learnt the distance of
    near, far = (np.stack([f[..., :3] for f in imageio.mimread(tmp_path/name)]).astype(float) for name in ("near.gif", "t.gif"))
    assert abs(near - far).mean() > 5
    with pytest.raises(InputError, match="mp4 or .gif"): turntable(G, w, tmp_path/"t.avi")
    with pytest.raises(InputError, match="even sizes"): turntable(G, w, tmp_path/"t.mp4", size=33)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["near.gif", "t.gif", "t.mp4"]

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

class Plain:
    "psi and phi without networks: pixels"
    name = "pixels"
    def distance(self, a, b): return (a - b).square().mean((1, 2, 3))
    def features(self, x): return [x]
    def embed(self, x): return torch.nn.functional.avg_pool2d(x, 4).flatten(1) + .1

SHORT = with_steps(quick(candidates=4, starts=2, start_steps=1, noise=.02), 12)

@pytest.fixture(scope="module")
def small():
    torch.manual_seed(1)
    return PoseFreeGenerator(GeneratorConfig(channels=(8, 8), plane_channels=4, decoder_hidden=8, samples=6, render_resolution=16)).start(0).requires_grad_(False).eval()

@pytest.fixture(scope="module")
def face(small): return small.sample(1, seed=5)[1].rgb.clamp(-1, 1)

@pytest.fixture
def session(small, face):
    s = Session(face, small, SHORT, Plain(), Plain(), every=4)
    yield s
    s.close()

@pytest.fixture
def coarse(monkeypatch):
    "Films and meshes of saved results as small as can be"
    monkeypatch.setattr(viewer, "turntable", functools.partial(viewer.turntable, frames=2, size=16, shown=32))
    monkeypatch.setattr(viewer, "mesh", functools.partial(viewer.mesh, resolution=24))

def used(s, name): return [float(t["weights"][name]) for t in s.state.trace]

@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_moves_its_own_number_and_nothing_else(knob):
    value = 20 if knob == "split" else .037
    c, base = steered(quick(), {knob: value}), quick()
    assert planned(c, knob, 5) == value and c.steps == base.steps
    assert all(planned(c, k, 5) == planned(base, k, 5) for k in KNOBS if k != knob)
    assert planned(base, "rec", 5) == base.rec(.5) and planned(base, "w_prior", 5) == base.w_prior   # whatever else becomes a knob

def test_what_cannot_be_set_is_refused(session):
    for knob, value, words in (("lambda", 1., "a knob among"), ("geo", -1., "from 0"), ("geo", math.nan, "from 0"), ("geo", "x", "from 0"), ("split", 13, "from 0 to 12")):
        with pytest.raises(InputError, match=words): session.set(knob, value)
    assert not session.asked
    one = with_steps(quick(stages=quick().stages[:1]), 4)
    with pytest.raises(InputError, match="two stages"): check_knob(one, "split", 2)
    with pytest.raises(InputError, match="Stage.rate"): check_knob(one, "rate", 1e9)

def test_without_a_hand_a_session_is_invert(small, face, session):
    whole = invert(face, small, SHORT, psi=Plain(), phi=Plain())
    session.advance(5); session.advance()
    assert torch.equal(session.result().ws, whole.ws) and session.done and session.phase == "finished"

def test_a_change_takes_effect_at_its_step_and_is_let_go(session):
    session.advance(3); session.set("geo", .7); session.advance(2); session.set("geo"); session.advance(2)
    assert session.changes == [dict(step=3, knob="geo", value=.7), dict(step=5, knob="geo", value=None)]
    plan, force = session.curve("geo")
    assert used(session, "geo") == force[:7] and force[3:5] == [.7, .7] and force[5:] == plan[5:] and force[:3] == plan[:3]
    assert spark(session, "geo").count("<path") == 2 and spark(session, "mv").count("<path") == 0

def test_the_rate_in_force_follows_the_stage_split(session):
    session.advance(3); session.set("split", 9); session.advance(1)
    plan, force = session.curve("rate")
    first, second = (s.rate for s in SHORT.stages)
    assert first != second and plan == [planned(SHORT, "rate", i) for i in range(12)] and force == [first] * 9 + [second] * 3
    session.set("split"); assert session.curve("rate")[1] == plan and session.curve("geo")[0] == session.curve("geo")[1]

def test_the_last_word_before_a_step_counts(session):
    session.advance(2); session.set("id", .1); session.set("id", .9); session.advance(1); session.set("id", .2)
    assert session.changes == [dict(step=2, knob="id", value=.9)] and session.held == dict(id=.2)

def test_the_stage_split_moves_until_the_second_stage_begins(session):
    session.advance(3); session.set("split", 1); session.advance(1)                             # earlier than now means now
    assert session.changes == [dict(step=3, knob="split", value=3)] and [t["stage"] for t in session.state.trace] == [0, 0, 0, 1]
    with pytest.raises(InputError, match="which has begun"): session.set("split", 8)
    session.undo(0); session.set("split", 8); session.advance(6); assert {t["stage"] for t in session.state.trace} == {0}

def test_a_stage_split_is_let_go(session):
    own = SHORT.stages[0].steps
    session.advance(1); session.set("split", own + 3); session.advance(1); session.set("split"); session.advance()
    assert session.changes == [dict(step=1, knob="split", value=own + 3), dict(step=2, knob="split", value=None)] and not session.held and [t["stage"] for t in session.state.trace] == [0] * own + [1] * (12 - own)
    session.undo(0); session.set("split", own + 3); session.advance(own + 1); session.set("split"); session.advance(1)
    assert session.held == dict(split=own + 1)                                                  # the plan's own number is past: it stays held, at this step

def test_undo_and_restart_forget_what_came_after(session):
    session.advance(4); at4 = session.state.copy()
    session.set("mv", .3); session.advance(3); session.set("rate", .05); session.advance(3)
    session.undo()
    assert session.state.step == 8 and [c["knob"] for c in session.changes] == ["mv", "rate"]   # snapshots at 0, 4, 8
    session.undo()
    assert session.state.step == 4 and not session.changes and torch.equal(session.state.w, at4.w) and session.undone == [dict(at=10, to=8), dict(at=8, to=4)]
    session.advance(2); session.set("geo", .2); session.advance(1); session.restart(keep=True); session.advance(1)
    assert session.state.step == 1 and session.changes == [dict(step=0, knob="geo", value=.2)] and used(session, "geo") == [.2]
    with pytest.raises(InputError, match="no snapshot|there is none"): session.undo(-1).result()

def test_undone_steps_leave_no_trace_in_the_result(small, face, session):
    session.advance(5); session.set("geo", 3.); session.advance(4); session.undo(4); session.advance()
    assert torch.equal(session.result().ws, invert(face, small, SHORT, psi=Plain(), phi=Plain()).ws)

def test_a_run_in_the_background_pauses_steps_and_is_replayed_to_the_bit(small, face, session, tmp_path):
    seen = []
    session.watchers.append(lambda s, step: (seen.append(step), time.sleep(.01)))
    session.start(); session.pause(); assert session.wait(300) and session.state.step < 12       # it rests where it was told to
    at = session.state.step
    session.step(); session.wait(300); assert session.state.step == at + 1
    session.set("perceptual_weight", 2.); session.set("offset", .3); session.start()
    while session.state.step < at + 3: time.sleep(.001)
    session.set("l1", .2); session.set("rate", .002); assert session.wait(300) and session.done
    assert seen[-1] is None and [c["knob"] for c in session.changes][:2] == ["perceptual_weight", "offset"] and len(session.changes) >= 2
    done = session.result()
    again = replay(face, small, json.loads(json.dumps(done.report)), Plain(), Plain())
    assert torch.equal(again.ws, done.ws) and again.report["hand"]["changes"] == session.changes and used(session, "rec") == [float(t["weights"]["rec"]) for t in again.trace]
    other = replay(face, small, dict(done.report, hand=dict(done.report["hand"], changes=[])), Plain(), Plain())
    assert not torch.equal(other.ws, done.ws)                                                   # the changes did change something
    with pytest.raises(InputError, match="another one"): replay(-face, small, done.report, Plain(), Plain())
    with pytest.raises(InputError, match="without 'hand'"): replay(face, small, {})

def test_a_stopped_replay_ends_where_the_run_did(small, face, session):
    session.advance(3); session.set("rate", .03); session.advance(2)
    part = session.result()
    assert part.report["steps"] == 5 and torch.equal(replay(face, small, part.report, Plain(), Plain()).ws, part.ws)

def test_a_divergence_stops_the_run_and_leaves_it_usable(session, monkeypatch):
    session.advance(5)
    monkeypatch.setattr(Plain, "distance", lambda self, a, b: (a - b).square().mean((1, 2, 3)) * math.nan)
    session.start(); session.wait(300)
    assert session.phase == "stopped" and "not finite at step 5" in session.error and session.state.w.isfinite().all()
    monkeypatch.undo()
    session.undo(); session.start(); assert session.wait(300) and session.done and not session.error

def test_a_running_session_is_closed(small, face):
    s, steps = Session(face, small, with_steps(SHORT, 500), Plain(), Plain()), threading.Event()
    s.watchers.append(lambda s, step: steps.set() if step else None)
    s.start(); assert steps.wait(120)
    closing = threading.Thread(target=s.close, daemon=True); closing.start(); closing.join(60)
    assert not closing.is_alive() and s.thread is None and s.failure is None and 0 < s.state.step < 500

def test_a_failure_in_the_background_is_raised_to_whoever_waits(session):
    session.watchers.append(lambda s, step: 1 / 0)
    session.start()
    with pytest.raises(ZeroDivisionError): session.wait(300)

def test_a_failure_in_the_background_is_shown_and_belongs_to_its_own_run(small, face, monkeypatch):
    c = cockpit(face, small, SHORT, psi=Plain(), phi=Plain())
    s = c.session
    try:
        monkeypatch.setattr(Plain, "distance", lambda self, a, b: {}["a bug"])
        s.start(); assert s.resting.wait(300)
        assert "<b>stopped</b>" in c.status.value and "KeyError" in c.status.value
        monkeypatch.undo()
        s.start(1); assert s.wait(300) and s.state.step == 1 and "<b>paused</b>" in c.status.value and "KeyError" not in c.status.value
    finally: s.close()

def test_a_configuration_comes_back_from_json():
    assert config_of(json.loads(json.dumps(config_to_dict(SHORT)))) == SHORT
    with pytest.raises(InputError): config_of(dict(lambdas=1))

def test_save_writes_what_invert_writes(session, tmp_path, coarse):
    session.advance(4); session.set("geo", .2); session.advance(1)
    report = save_session(session, tmp_path/"a", "face.png")
    assert sorted(p.name for p in (tmp_path/"a").iterdir()) == sorted(FILES) and set(report) == {*FIELDS, "hand"}
    t, meta = load_latent(tmp_path/"a"/"latent.safetensors")
    assert torch.equal(t["ws"], session.result().ws) and meta["config"]["geo"] == dict(points=[[0., .2]]) and meta["image"] == "face.png"
    again = replay(session.image, session.generator, tmp_path/"a"/"report.json", Plain(), Plain())
    assert torch.equal(again.ws, t["ws"])
    two = types.SimpleNamespace(w=t["w"].repeat(2, 1))
    with pytest.raises(InputError, match="of one image, got one of 2"): save_latent(two, SHORT, tmp_path/"two.safetensors")

def test_what_is_saved_is_of_one_moment(session, monkeypatch):
    session.advance(3); session.set("geo", .2); session.advance(1)
    def busy(f): answer = asked(f); session.advance(1); session.set("geo", .9); session.advance(1); return answer # the steps go on meanwhile, and so does the hand
    asked, given = session.ask, []
    monkeypatch.setattr(session, "ask", busy); monkeypatch.setattr(viewer, "write_results", lambda *args: given.extend(args))
    save_session(session, "o")
    _, _, inversion, _, config, *_ = given
    assert inversion.report["steps"] == 4 and config.geo(.5) == .2 and session.config.geo(.5) == .9

def test_a_judge_that_the_loss_uses_saves_nothing(small, face, tmp_path):
    s = Session(face, small, dataclasses.replace(SHORT, identity="portrait-eval"), Plain(), Plain())
    with pytest.raises(InputError, match="portrait-eval in both"): save_session(s, tmp_path/"o")
    assert not (tmp_path/"o").exists()

def test_the_cockpit_steers_by_its_widgets_and_degrades(small, face, tmp_path, coarse):
    c = cockpit(face, small, SHORT, folder=tmp_path/"out", every=4, psi=Plain(), phi=Plain())
    s = c.session
    try:
        assert all(p.value[:2] == b"\xff\xd8" for p in c.pictures.values()) and c.draws == 1
        c.buttons["step"].click(); s.wait(300)
        c.sliders["geo"].value = .6
        assert c.hands["geo"].value and s.held == dict(geo=.6) and c.sparks["geo"].value.count("<path") == 0            # a diamond only where it has taken effect
        c.buttons["start"].click(); assert s.wait(300) and s.done
        assert s.changes == [dict(step=1, knob="geo", value=.6)] and used(s, "geo")[1:] == [.6] * 11
        lines = {line.name: line for line in c.chart.data}
        assert len(lines["total"].x) == 12 and list(lines["by hand"].x) == [1] and len(lines["yaw"].y) == 12
        assert "finished" in c.status.value and c.sparks["geo"].value.count("<path") == 1
        c.hands["split"].value = True; assert "second stage" in c.status.value and not c.hands["split"].value and "split" not in s.held                      # a refusal is seen at the button too
        c.buttons["undo"].click(); s.wait(300); assert s.state.step == 8 and len(lines["total"].x) == 8
        c.hands["geo"].value = False; c.buttons["step"].click(); s.wait(300); assert s.changes[-1] == dict(step=8, knob="geo", value=None) and not c.hands["geo"].value
        assert c.sliders["geo"].value == pytest.approx(planned(SHORT, "geo", 9), abs=.01) and "geo" not in s.held         # the slider follows the schedule again, and is no hand
        c.buttons["save"].click(); c.saver.join(300); assert "saved" in c.status.value and (tmp_path/"out"/"report.json").exists() and not c.buttons["save"].disabled
        bundle = c._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in bundle and Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).size[0] > 800
    finally: s.close()

def test_a_chart_that_hears_the_page_loses_nothing(small, face):
    "The kernel's thread answers the page while the session's thread draws"
    c, inside, told = cockpit(face, small, SHORT, psi=Plain(), phi=Plain()), threading.Event(), []
    try:
        c.session.watchers.clear(); c.session.advance(3)                                          # nothing of it is drawn yet
        c.chart.observe(lambda change: told.append(change["new"]), "_py2js_update")
        page, take = threading.Thread(target=lambda: c.chart.set_state(dict(_last_layout_edit_id=9))), c.chart.set_trait
        def late(*args): take(*args); inside.set(); time.sleep(.3)                                # what the widget would say is held back here
        c.chart.set_trait = late
        page.start(); assert inside.wait(30)
        c._draw_chart(); page.join(30)
        assert any(told)
    finally: c.session.close()

def test_the_display_keeps_to_its_share(small, face, monkeypatch):
    c = cockpit(face, small, SHORT, share=.2, psi=Plain(), phi=Plain())
    now = [0.]
    monkeypatch.setattr(viewer.time, "perf_counter", lambda: now[0])
    def draw(): now[0] += .1                                                                    # a drawing costs a tenth of a second
    monkeypatch.setattr(c, "_draw_chart", draw); c.next = drawn = 0.
    for _ in range(1000):                                                                       # a step costs a hundredth
        now[0] += .01
        before = now[0]; c._watch(c.session, object()); drawn += now[0] - before
    assert .15 < drawn / now[0] < .2 + 1e-9

def test_a_flip_book_is_one_sheet_and_its_texts():
    colours = [[torch.full((1, 3, 8, 8), v) for v in row] for row in ((-1., 0.), (0., 1.), (1., -1.))]
    book = Flipbook(colours, [["a", "b"], ["c", "<d>"], ["e", "f"]], ("one", "two"), width=16)
    page = book._repr_html_()
    sheet = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0])))
    assert sheet.size == (32, 48) and page.count('type="range"') == 2 and 'max="2"' in page and "&lt;d&gt;" in page and "<d>" not in page
    assert sheet.getpixel((8, 8))[0] < 30 and sheet.getpixel((24, 24))[0] > 225 and sheet.getpixel((24, 40))[0] < 30
    with pytest.raises(InputError, match="full rows"): Flipbook([[colours[0][0]], []], [["a"], []], ("one",))

def test_scrubber_and_grid_and_pose_view(small, face, session, monkeypatch):
    session.advance(8)
    book = scrubber(session.snapshots, small)
    assert [t[0].split(",")[0] for t in book.texts] == ["step 0", "step 4", "step 8"] and book.pictures[0][0].shape == (1, 3, 16, 48)
    assert len(scrubber(session.snapshots, small, limit=2).pictures) == 2
    grid = weights_grid(face, small, with_steps(SHORT, 4), ("geo", (0., 5.)), ("id", (0., .5, 1.)), Plain(), Plain())
    assert len(grid.pictures) == 2 and len(grid.pictures[0]) == 3 and grid.texts[1][1].startswith("geo 5, id 0.5 (as found, from the side, depth): PSNR")
    assert not torch.equal(grid.pictures[0][0], grid.pictures[1][2])
    ends, draw = set(), viewer.depth_image
    monkeypatch.setattr(viewer, "depth_image", lambda d, w, near=None, far=None: (ends.add((near, far)), draw(d, w, near, far))[1])
    live = pose_view(small, session.result().ws, 16, (-20, 20), (0,))
    bundle = live._repr_mimebundle_()
    assert len(ends) == 1 and None not in ends.pop()                                            # one scale of depth for all poses
    before = live.box.children[2].value; live.box.children[0].value = 40
    assert live.box.children[2].value != before and "text/html" in bundle and bundle["text/html"].count("range") == 2
    with pytest.raises(InputError, match="at least one state"): scrubber({}, small)
    with pytest.raises(InputError, match="a knob among .* got 'nope'"): weights_grid(face, small, SHORT, ("nope", (0., 1.)), psi=Plain(), phi=Plain())
    with pytest.raises(InputError, match="expected mv as a number"): weights_grid(face, small, SHORT, second=("mv", (0., -1.)), psi=Plain(), phi=Plain())

def test_depth_against_the_truth_ignores_scale_and_shift_and_nothing_else():
    p = portrait(10_000_003, 64)
    inside = p.mask > .5
    fitted, error, true = depth_against(p.depth * .7 + .4, p.depth, p.mask)
    assert error[inside].abs().max() < 1e-4 and error[~inside].isnan().all() and torch.equal(true[inside], p.depth[inside])
    bent = p.depth.clone(); bent[..., 20:24, 30:34] += .1
    error = depth_against(bent, p.depth, p.mask)[1]
    assert error[..., 20:24, 30:34].mean() > .08 and error.nan_to_num()[..., 40:, :].abs().mean() < .01                # + is too far
    hollow, flat = (depth_against(d, p.depth, p.mask)[1][inside] for d in (5 - p.depth, torch.full_like(p.depth, 2.5)))
    assert torch.allclose(hollow, flat) and hollow.abs().max() > .05                            # a hollow face is no better than a flat one
    with pytest.raises(InputError, match="two pixels"): depth_against(p.depth, p.depth, p.mask * 0)

def test_surfaces_side_by_side(tmp_path):
    s, pose = Sphere(), Pose.deg(10.)
    view = s.render(None, pose)
    pair = [seen_surface(view, pose, s.config, "a", limit=24), seen_surface(view, pose, s.config, "b", limit=24, error=view.depth - 2.6)]
    assert pair[0].points.shape == (24, 24, 3) and pair[1].error
    fig = surface_figure(pair)
    assert len(fig.data) == 2 and fig.data[1].cmin == -fig.data[1].cmax and len(json.dumps(fig.to_plotly_json(), default=str)) < 200_000
    surface_still(pair, dots=True, path=tmp_path/"s.png"); assert Image.open(tmp_path/"s.png").size[0] > 500
    for draw in (surface_figure, surface_still):
        with pytest.raises(InputError, match="at least one surface, got none"): draw([])

def test_background_is_cut_from_a_mesh(tmp_path):
    class Before(Sphere): # a wall
        def field(self, planes, xyz):
            gap, colour = super().field(planes, xyz)
            return torch.maximum(gap, (-.2 - xyz[..., 2]) * 400), colour
    cut, whole = (mesh(Before(), torch.zeros(1, 4), tmp_path/f"{i}.ply", resolution=48, **k) for i, k in enumerate((dict(), dict(side=9., back=9.))))
    size = [trimesh.load(m.path).extents for m in (cut, whole)]
    assert cut.watertight and size[0][0] < .46 and size[1][0] > .55 and size[0][2] < .46


def test_plotly_comes_without_what_checks_addresses():
    "38 grammars that nobody needs are 2.5 s of the cockpit's start; afterwards the package is there for whoever wants it"
    import subprocess, sys
    code = "import sys\nfrom posefree_kit.viewer import plotly_parts\ngo, _ = plotly_parts(); go.FigureWidget()\nprint('rfc3987_syntax' in sys.modules, 'lark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


def test_without_a_film_everything_else_is_written(tmp_path, monkeypatch, coarse):
    import imageio.v2
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=16, samples=6)).start().requires_grad_(False).eval()
    image = torch.zeros(1, 3, 16, 16)
    inversion = invert(image, G, with_steps(quick(candidates=4, starts=1), 1))
    for i, broken in enumerate((RuntimeError("No ffmpeg exe could be found"), OSError(2, "no such file"))):
        def fail(*_, **__): raise broken
        monkeypatch.setattr(imageio.v2, "mimwrite", fail)
        notes = []
        write_results("a", image, inversion, G, quick(), tmp_path/str(i), solid=False, note=notes.append)
        assert len(notes) == 1 and "an ffmpeg that works" in notes[0] and {"latent.safetensors", "report.json"} <= {p.name for p in (tmp_path/str(i)).iterdir()}
    monkeypatch.setattr(imageio.v2, "mimwrite", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="could not write .*No space left"): write_results("a", image, inversion, G, quick(), tmp_path/"full", solid=False)
    assert (tmp_path/"full"/"latent.safetensors").exists()                           # what took minutes is there
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(trimesh.Trimesh, "export", full); monkeypatch.setattr(viewer, "comparison", lambda *_, **__: None)
    with pytest.raises(InputError, match="could not write .*mesh.glb.*No space left"): write_results("a", image, inversion, G, quick(), tmp_path/"full", film=False)
    monkeypatch.setattr(viewer, "full_report", full)
    with pytest.raises(OSError): write_results("a", image, inversion, G, quick(), tmp_path/"measured")
    assert [p.name for p in (tmp_path/"measured").iterdir()] == ["latent.safetensors"]  # before anything is measured or drawn

def test_a_full_disk_is_no_note_of_a_mesh_that_is_added(tmp_path, monkeypatch):
    from posefree_kit import cli
    def write(error):
        try: raise error
        except OSError as e: raise InputError("could not write mesh.glb") from e
    monkeypatch.setattr(cli, "latent_and_generator", lambda *_: (None, None, None))
    job = types.SimpleNamespace(video=False, mesh=True, generator=types.SimpleNamespace(w_avg=torch.zeros(1)))
    monkeypatch.setattr(viewer, "mesh", lambda *_: write(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="could not write"): cli.complete_files("a.png", tmp_path, job)
    monkeypatch.setattr(viewer, "mesh", lambda *_: write(OSError(2, "no such file")))
    assert cli.complete_files("a.png", tmp_path, job) == []
