"Losses at their limits, the optimiser's promises, checkpoints: on small fresh networks, in seconds."
import copy, dataclasses, json
import pytest
import torch
from posefree_kit import losses
from posefree_kit.camera import Pose
from posefree_kit.baselines import load_latent_encoder
from posefree_kit.checkpoints import load_generator, read_card, save_checkpoint, shipped
from posefree_kit.core import InputError, config_to_dict, sha256
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig
from posefree_kit.features import Sight, load_identity, load_perceptual
from posefree_kit.generator import GeneratorConfig
from posefree_kit.optimiser import DivergedError, InvertState, Networks, Stage, candidates, constant, invert, objective, paper, quick, ramp, view_offsets, with_steps
from posefree_kit.pose import PoseFreeGenerator


class Pixels:
    "psi and phi without a network"
    name = "pixels"
    features = staticmethod(lambda x: [x])
    distance = staticmethod(lambda a, b, mask=None: (a - b).square().mean((1, 2, 3)))
    embed = staticmethod(lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), plane_channels=8, render_resolution=16)).start()
    G.set_reader(Discriminator(DiscriminatorConfig(channels=(8, 8, 8))).eval())
    return G.requires_grad_(False).eval()


TINY = quick(stages=(Stage(5, 2, .02, False), Stage(5, 1, .01, True)), starts=2, start_steps=3, candidates=8)
run = lambda G, image, config=TINY, **kw: invert(image, G, config, psi=Pixels, phi=Pixels, **kw)


def test_optimisation_lowers_the_loss_and_touches_only_the_code(G):
    before = {k: v.clone() for k, v in G.state_dict().items()}
    w, view = G.sample(2, seed=9)
    inv = run(G, view.rgb, with_steps(TINY, 80))
    assert (inv.trace[-1]["rec"] < .7 * inv.trace[0]["rec"]).all()
    assert all(torch.equal(v, G.state_dict()[k]) for k, v in before.items())


def test_pose_is_always_f_of_w(G):
    inv = run(G, G.sample(1, seed=2)[1].rgb)
    assert torch.equal(inv.pose.yaw, G.pose(inv.w).yaw) and inv.deltas.abs().max() > 0
    strict = run(G, G.sample(1, seed=2)[1].rgb, dataclasses.replace(TINY, space="w"))
    assert strict.deltas.abs().max() == 0


def test_a_further_loss_is_weighed_by_its_schedule_and_checked(G):
    x = G.sample(2, seed=5)[1].rgb
    front = lambda planes, pose, view, target: pose.yaw.square()
    free, held = run(G, x), run(G, x, terms=dict(front=(ramp((0, 0.), (1, 50.)), front)))
    assert [round(t["weights"]["front"], 3) for t in held.trace[:3]] == [0., 5., 10.] and held.trace[0]["front"].shape == (2,)
    assert (held.pose.yaw.abs() < free.pose.yaw.abs()).all()
    for name in ("geo", "pose", "total"): # a loss's, and entries' of the trace
        with pytest.raises(InputError, match=f"expected new names, got {name}"): run(G, x, terms={name: (1., front)})
    with pytest.raises(InputError, match=r"terms\['front'\]: expected shape \(B\)"): run(G, x, terms=dict(front=(1., lambda *args: front(*args).mean())))


def test_same_seed_same_result_other_seed_other_start(G):
    x = G.sample(1, seed=3)[1].rgb
    a, b, c = run(G, x), run(G, x), run(G, x, dataclasses.replace(TINY, seed=1))
    assert torch.equal(a.ws, b.ws) and not torch.equal(a.ws, c.ws)


def test_batch_is_many_single_runs(G):
    x = G.sample(3, seed=4)[1].rgb
    together = run(G, x)
    for i in range(3): assert torch.allclose(run(G, x[i:i + 1]).ws[0], together.ws[i], atol=1e-4)


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 8])
def test_stop_and_continue_is_exact(G, stop):
    x = G.sample(1, seed=5)[1].rgb
    whole = run(G, x)
    part = run(G, x, callback=lambda s: s.step < stop)
    assert torch.equal(run(G, x, state=part.state).ws, whole.ws) and len(part.trace) == stop + 1


def failing(when, counts=lambda a: True): # when: number of a call -> is its distance infinite? counts: which calls have one
    class Bad(Pixels):
        calls = 0
        @staticmethod
        def distance(a, b, mask=None):
            Bad.calls += counts(a)
            return Pixels.distance(a, b) * (float("inf") if when(Bad.calls) else 1.)
    return Bad


def test_divergence_names_the_loss_and_keeps_the_last_good_state(G):
    with pytest.raises(DivergedError, match="rec is not finite at step") as e: invert(G.sample(1, seed=6)[1].rgb, G, TINY, psi=failing(lambda call: call > 12), phi=Pixels)
    assert e.value.state.w.isfinite().all() and e.value.state.step > 0


@pytest.mark.parametrize("once", [True, False])
def test_trouble_in_the_start_search_is_told(G, once):
    bad = lambda: failing(lambda call: call == 3 or call > 3 and not once, lambda a: len(a) == TINY.starts) # the image's starts, together
    go = lambda: invert(G.sample(1, seed=6)[1].rgb, G, TINY, psi=bad(), phi=Pixels)
    if once: assert go().report["trouble"].startswith("in the start search: rec is not finite at step")
    else:
        with pytest.raises(DivergedError, match="in the start search: rec") as e: go()
        assert e.value.state.w.shape == (1, G.config.w_dim)


def test_trouble_of_the_search_and_of_the_run_are_both_told(G):
    report = invert(G.sample(1, seed=6)[1].rgb, G, TINY, psi=failing(lambda call: call == 3), phi=Pixels, state=InvertState(G.w_avg[None], searched="in the start search: x")).report
    assert report["trouble"] == "in the start search: x; rec is not finite at step 2 of 10"


def test_a_report_has_every_loss_where_it_was_last_due(G):
    from posefree_kit.scale import one_of
    inv = run(G, G.sample(2, seed=8)[1].rgb)
    assert "mv" not in inv.trace[9] and inv.report["stages"][1]["losses"]["mv"] == round(float(inv.trace[8]["mv"].mean()), 5)
    assert one_of(inv, 1, 0.).report["stages"][1]["losses"]["mv"] == round(float(inv.trace[8]["mv"][1]), 5)


def test_a_state_moves_as_a_whole(G):
    state = run(G, G.sample(1, seed=6)[1].rgb).state
    moved = state.copy().to("meta")
    assert moved.w.device.type == moved.adam["m"][0].device.type == moved.before[1].device.type == moved.before[3]["v"][0].device.type == "meta" and state.before[1].device.type == "cpu"


@pytest.mark.parametrize("bad", [dict(shrink=0), dict(shrink=-1), dict(rate=-1.), dict(rate=float("nan"))])
def test_a_stage_that_cannot_be_is_refused(bad):
    with pytest.raises(InputError, match=f"Stage.{next(iter(bad))}: expected"): Stage(**dict(steps=1, shrink=1, rate=.1, layers=True) | bad)


def test_networks_without_a_name_are_told_by_their_kind(G):
    class Nameless: features, distance, embed = (staticmethod(getattr(Pixels, k)) for k in ("features", "distance", "embed"))
    report = invert(G.sample(1, seed=6)[1].rgb, G, dataclasses.replace(TINY, start_steps=0), psi=Nameless(), phi=Pixels).report
    assert report["backends"] == dict(perceptual="Nameless (given by the caller)", identity="pixels (given by the caller)") and report["start_scores"] is None # nothing was compared


@pytest.mark.parametrize("image", [torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 12), torch.full((1, 3, 16, 16), float("nan"))])
def test_bad_images(G, image):
    with pytest.raises(InputError): run(G, image)

def test_a_stage_needs_a_pixel(G):
    with pytest.raises(InputError, match="Stage.shrink: expected at most 16, the generator's pixels a side, got 32"): run(G, torch.zeros(1, 3, 16, 16), quick(stages=(Stage(1, 32, .1, True),)))


def test_presets_survive_json():
    for c in (quick(), paper(space="w")):
        d = json.loads(json.dumps(config_to_dict(c)))
        assert d["stages"][0]["steps"] == c.stages[0].steps and d["mv"]["points"][-1][1] == c.mv(1)
    assert sum(s.steps for s in paper().stages) == 1000
    for bad in (dict(space="z"), dict(stages=()), dict(mv_every=0), dict(starts=0)):
        with pytest.raises(InputError): quick(**bad)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 350])
def test_few_steps_are_shared_out_over_many_stages(steps):
    four = quick(stages=tuple(Stage(n, 1, .05, True) for n in (90, 90, 90, 80)))
    got = [s.steps for s in with_steps(four, steps).stages]
    assert sum(got) == steps and min(got) >= 0 and max(got) - min(got) <= max(1, steps // 30)
    assert [s.steps for s in with_steps(quick(), 10).stages] == [4, 6]
    assert [with_steps(quick(), n).start_steps for n in (6, 30, 350)] == [6, 30, 30]   # ten steps asked for are not ninety in the search before

def test_multiview_is_zero_without_offset_and_sees_every_image_alone(G):
    w, view = G.sample(2, seed=7); planes, pose = G.planes(w), G.pose(w)
    f = lambda pl, v, p, off: losses.multiview(G, pl, v, p, off, Pixels.features)
    assert f(planes, view, pose, Pose.deg([0.])).max() < 1e-4
    both = f(planes, view, pose, Pose.deg([-8., 8.]))
    one = f(planes[1:], type(view)(*(x[1:] for x in view)), pose[[1]], Pose.deg([-8., 8.]))
    assert torch.allclose(both[1:], one, atol=1e-6) and both.min() > 0


def test_a_shifted_depth_is_not_visible():
    "depths that disagree by more than the tolerance never count"
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8))
    cam = G.camera(Pose.deg(0.)); d = torch.full((1, 1, 8, 8), 2.7)
    ok = losses.warp_to_reference(torch.zeros(1, 3, 8, 8), d, d, torch.ones_like(d), cam, cam)[1]
    assert ok.mean() == 1
    assert losses.warp_to_reference(torch.zeros(1, 3, 8, 8), d + .05, d, torch.ones_like(d), cam, cam)[1].max() == 0
    assert losses.warp_to_reference(torch.zeros(1, 3, 8, 8), d, d, .4 * torch.ones_like(d), cam, cam)[1].max() == 0


def test_geometry_is_scale_free_and_zero_when_flat():
    d, m = torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    assert torch.allclose(losses.geometry(d, m, 0, 1, 0.), losses.geometry(3 * d, m, 0, 3, 0.), atol=1e-6)
    assert losses.geometry(torch.ones_like(d), m, 0, 1).max() == 0
    assert torch.isclose(losses.geometry(d, m, 0, 1, 0.)[0], (d[0].diff(dim=-1).abs().mean() + d[0].diff(dim=-2).abs().mean()), atol=1e-6)


def test_depth_std_sees_a_flat_face_before_a_wall_only_with_a_mask():
    head = torch.zeros(2, 1, 8, 8); head[..., 2:6, 2:6] = 1
    depth, solid = 3. - head, torch.ones(2, 1, 8, 8)
    assert losses.depth_std(depth, solid).min() > .4 and losses.depth_std(depth, solid, head).max() == losses.depth_std(depth, head).max() == 0
    rough = depth + torch.rand(2, 1, 8, 8)
    assert torch.equal(losses.depth_std(rough, head), losses.depth_std(rough, solid, head)) and losses.depth_std(rough, head).min() > .1


def test_checkpoint_round_trip_and_damage(G, tmp_path):
    f = save_checkpoint(tmp_path / "g", G, G.reader, dict(note="x"))
    H = load_generator(f, "cpu")
    w = G.mapping(G.draw(1)); assert (H.view(w, H.pose(w)).rgb - G.view(w, G.pose(w)).rgb).abs().max() < .05
    assert read_card(f)["note"] == "x" and H.sha256 == sha256(f)
    data = bytearray(f.read_bytes()); data[-3] ^= 255; f.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256"): load_generator(f, "cpu")
    f.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="model card"): load_generator(f, "cpu")


def test_every_shipped_generator_loads_and_is_small():
    assert {"portraits", "portraits-small", "portraits-128"} <= set(shipped())
    for name in shipped():
        G = load_generator(name, "cpu")
        assert read_card(name)["bytes"] < 12e6 and G.resolution >= 64 and G.reader is not None
        assert load_latent_encoder(G).card["generator"]["sha256"] == G.sha256
        w, v = G.sample(1, seed=0)
        assert v.rgb.isfinite().all() and v.weight.max() > .9 and 5 < G.pose(G.mapping(G.draw(512))).degrees()[:, 0].std() < 60


def test_schedules():
    s = ramp((0, 1), (.5, 3), (1, 0))
    assert [s(x) for x in (0, .25, .5, .75, 1)] == [1, 2, 3, 1.5, 0] and constant(2)(.3) == 2


def test_the_whole_w_form_inverts_too():
    "PoF3D's pose learner reads all of w: the start search ranks whole codes by the pose they carry"
    torch.manual_seed(1)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8, view_dim=0)).start()
    G.set_reader(Discriminator(DiscriminatorConfig(channels=(8, 8))).eval())
    inv = run(G.requires_grad_(False), G.sample(2, seed=1)[1].rgb, dataclasses.replace(TINY, starts=4))
    assert inv.w.shape == (2, 72) and torch.equal(inv.pose.yaw, G.pose(inv.w).yaw)


@pytest.mark.parametrize("view_dim", [0, 8])
def test_a_large_generator_is_looked_at_few_at_a_time(view_dim, monkeypatch):
    from types import SimpleNamespace
    from posefree_kit import optimiser
    for name in shipped(): assert optimiser._at_once(load_generator(name, "cpu")) == 64                # as ever
    ffhq = GeneratorConfig(z_dim=512, w_dim=512, view_dim=0, channels=(512, 512, 512, 512, 512, 256, 128), plane_channels=32, render_resolution=64, superresolution="4x", features=32)
    assert 4 <= optimiser._at_once(SimpleNamespace(config=ffhq, resolution=256)) <= 8
    torch.manual_seed(1)
    G = PoseFreeGenerator(GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8, view_dim=view_dim)).start().requires_grad_(False)
    G.set_reader(Discriminator(DiscriminatorConfig(channels=(8, 8))).eval())
    target, config, seen, planes = G.sample(1, seed=1)[1].rgb, quick(candidates=40, starts=4), [], G.planes
    all_at_once = candidates(G, target, config)
    monkeypatch.setattr(optimiser, "_at_once", lambda G: 3)
    monkeypatch.setattr(G, "planes", lambda ws: (seen.append(len(ws)), planes(ws))[1])
    assert torch.allclose(candidates(G, target, config), all_at_once) and max(seen) == 3


@pytest.mark.parametrize("starts", [1, 3])
def test_a_generator_without_a_pose_head_is_inverted_too(G, starts):
    "Imported generators bring no discriminator: the search falls back to what looks most similar, from wherever it is seen"
    import copy
    bare = copy.copy(G); object.__setattr__(bare, "reader", None)
    config = dataclasses.replace(TINY, starts=starts, candidates=40)
    w, view = bare.sample(2, seed=9)
    inv = run(bare, view.rgb, config)
    assert inv.view.rgb.isfinite().all() and (inv.trace[-1]["rec"] < inv.trace[0]["rec"]).all()
    mine = candidates(bare, bare.view(w, bare.pose(w)).rgb, config)
    assert mine.shape == (2, starts, bare.config.w_dim) and (starts == 1 or torch.equal(mine[:, -1], bare.w_avg.expand(2, -1)))


@pytest.mark.parametrize("kind", ["none", "2x"])
def test_every_stage_of_the_paper_preset_has_every_loss(kind):
    "Novel views are compared at the stage's size, also where a super-resolution draws them larger"
    torch.manual_seed(0)
    big = PoseFreeGenerator(GeneratorConfig(channels=(8, 8, 8), plane_channels=4, decoder_hidden=8, features=8 if kind == "2x" else 3, render_resolution=16, samples=5, superresolution=kind)).start(0).requires_grad_(False).eval()
    nets, config = Networks(big, Pixels, Pixels), paper()
    w, target = big.mapping(big.draw(1)), torch.rand(1, 3, big.resolution, big.resolution)
    for step in (200, 800):
        total, parts, *_, view = objective(nets, config, target, w, torch.zeros(1, big.num_ws, big.config.w_dim), step)
        assert {"rec", "id", "mv", "geo"} <= set(parts) and total.isfinite().all() and parts["mv"] > 0
        assert view.rgb.shape[-1] == big.resolution // config.stages[0 if step < 400 else 1].shrink


@pytest.mark.parametrize("phi", ["portrait", "portrait-eval"]) # the same encoder as psi, and another
@pytest.mark.parametrize("size", [32, 64, 128]) # at 128 psi looks at more pixels than phi
def test_a_sight_sees_what_psi_and_phi_see(phi, size):
    g = torch.Generator().manual_seed(0)
    psi, phi, target = load_perceptual("portrait"), load_identity(phi), torch.rand(2, 3, 128, 128, generator=g) * 2 - 1
    sight, x = Sight(psi, phi, target), (torch.rand(2, 3, size, size, generator=g) * 2 - 1).requires_grad_()
    small = sight.target(size)
    assert sight.one == (phi.name == "portrait") and sight.target(size) is small
    def losses_of(eyes): return eyes.distance(x, small), losses.identity(x, small, eyes.embed)
    class Apart: distance, embed = psi.distance, phi.embed
    for _ in range(2): # the second time the target is known
        got, want = losses_of(sight), losses_of(Apart)
        for a, b in zip(got, want): assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        ours, theirs = (torch.autograd.grad(sum(y).sum(), x)[0] for y in (got, want))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
        sight.forget()
    assert not sight.now and all(k[1] == id(small) for k in sight.kept)


def test_a_sight_asks_networks_of_others_as_they_are():
    x, target = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)
    sight = Sight(Pixels, Pixels, target)
    assert torch.equal(sight.distance(x, sight.target(8)), Pixels.distance(x, sight.target(8))) and torch.equal(sight.embed(x), Pixels.embed(x)) and not sight.kept


def test_deltas_move_in_stages_that_allow_them_and_in_no_other(G):
    target = G.sample(1, seed=2)[1].rgb
    after = {}
    def see(step): after[step.step] = None if step.state.d is None else step.state.d.clone()
    invert(target, G, quick(stages=(Stage(2, 1, .05, True), Stage(2, 1, .05, False)), starts=1, candidates=8, start_steps=0), see, psi=Pixels, phi=Pixels)
    assert after[1].abs().max() > 0 and torch.equal(after[1], after[2]) and torch.equal(after[2], after[3])
    with pytest.raises(InputError, match="without deltas"): invert(target, G, quick(space="w", stages=(Stage(1, 1, .05, True),)), state=InvertState(G.w_avg[None], torch.zeros(1, G.num_ws, G.config.w_dim)), psi=Pixels, phi=Pixels)


@pytest.mark.parametrize("every", (1, 4, 8))
def test_offsets_look_along_both_diagonals(every):
    signs = {float(p.yaw[0] * p.pitch[0]) > 0 for step in range(0, 64, every) for p in [view_offsets(quick(mv_every=every), step)]}
    assert signs == {True, False}


def test_a_generator_loads_without_the_imports_that_shapes_alone_would_ask_for():
    "sympy and what hangs on it cost two seconds; `Hollow` is there to avoid them"
    import subprocess, sys
    run = subprocess.run([sys.executable, "-c", "import sys; from posefree_kit.checkpoints import load_generator; load_generator('portraits', 'cpu'); print('sympy' in sys.modules)"], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stdout + run.stderr[-800:]


def test_replaced_networks_are_asked(G):
    "An overridden method of psi or phi, in a subclass or on the object, counts in an inversion"
    x = G.sample(1, seed=3)[1].rgb
    psi, phi = load_perceptual("portrait", device="cpu"), load_identity("portrait", device="cpu")
    none = lambda a, b, mask=None: torch.zeros(len(a))
    class Blind(type(psi)):
        def features(self, image): return [0 * f for f in super().features(image)]
    class Same(type(phi)):
        def embed(self, image): return torch.nn.functional.one_hot(torch.zeros(len(image), dtype=torch.long), 8).float() + 0 * image.mean((1, 2, 3))[:, None]
    blind, same = copy.copy(psi), copy.copy(phi); blind.__class__, same.__class__ = Blind, Same
    off = copy.copy(psi); off.distance = none
    first = lambda psi, phi: objective(Networks(G, psi, phi), TINY, x, G.w_avg[None] + .1, torch.zeros(1, G.num_ws, G.config.w_dim), 9)[1]
    plain = first(psi, phi)
    for other in (blind, off): assert float(first(other, phi)["rec"]) < .9 * float(plain["rec"])
    assert float(first(psi, same)["id"]) < 1e-5 < float(plain["id"])


def test_a_wrong_state_schedule_or_term_is_told_by_its_name(G):
    x = G.sample(1, seed=4)[1].rgb
    with pytest.raises(InputError, match="InvertConfig.mv: expected a Schedule"): quick(mv=0.)
    with pytest.raises(InputError, match=r"terms\['front'\]: expected \(weight, function\)"): run(G, x, terms=dict(front=lambda *args: 0))
    with pytest.raises(InputError, match="state: expected an InvertState"): run(G, x, state=G.w_avg[None])
    with pytest.raises(InputError, match="state.w: expected shape"): run(G, x, state=InvertState(G.w_avg.expand(2, -1)))
    with pytest.raises(InputError, match="state.w: expected shape"): run(G, x, state=InvertState(G.w_avg[None, :-1]))
