"The other methods, each at its limit and at its weakness: on a small fresh network, and on the shipped generator at 32 pixels."
import copy
import dataclasses
import math
import os
import shutil

import pytest
import torch

from posefree_kit import baselines
from posefree_kit.baselines import METHODS, Camera, LatentEncoder, LatentTraining, Symmetry, TunedBatch, Tuning, conflict, encoder, encoder_latent, first_stage, fresh_encoder, load_latent_encoder, mirror_term, pose_opt, pti, read_latent_encoder, save_latent_encoder, spi, train_latent_encoder
from posefree_kit.camera import Pose, mirror
from posefree_kit.checkpoints import load_generator, save_checkpoint
from posefree_kit.core import DivergedError, InputError, config_hash, save_values
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig
from posefree_kit.generator import GeneratorConfig, View, pof3d_config
from posefree_kit.optimiser import Networks, Stage, invert, quick
from posefree_kit.portraits import HELD_OUT, portrait
from posefree_kit.pose import PoseFreeGenerator
from test_inversion import Pixels, failing

TINY = quick(stages=(Stage(6, 2, .02, False), Stage(6, 1, .01, True)), starts=2, start_steps=2, candidates=8)
TUNE = Tuning(stop=0.)
frozen = dict(psi=Pixels, phi=Pixels)
psnr = lambda a, b: -10 * torch.log10(((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)))


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), plane_channels=8, render_resolution=16, samples=8)).start()
    G.set_reader(Discriminator(DiscriminatorConfig(channels=(8, 8, 8))).eval())
    return G.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def face(): # the shipped generator, from volume renderings of 32 pixels
    G = load_generator(device="cpu")
    G.config = dataclasses.replace(G.config, render_resolution=32)
    G.set_reader(None)                                                          # it reads 64 pixels
    return G.compile_march() if shutil.which(os.environ.get("CXX", "c++")) else G # the same pictures, sooner


def extra(name, G): return dict(net=fresh_encoder(G)) if name.startswith("encoder") else dict(tuning=TUNE) if name in ("pti", "spi") else {}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_signature_of_invert_and_leaves_the_generator_alone(G, name):
    before, seen = {k: v.clone() for k, v in G.state_dict().items()}, []
    x = G.sample(2, seed=9)[1].rgb
    inv = METHODS[name](x, G, TINY, lambda s: seen.append((s.step, s.steps, len(s.parts["l2" if s.stage == 2 else "rec"]))), **frozen, **extra(name, G))
    assert all(torch.equal(v, G.state_dict()[k]) for k, v in before.items()) and not any(p.requires_grad for p in G.parameters())
    H = inv.generator or G
    assert torch.allclose(H.render(H.planes(inv.ws), inv.pose).rgb, inv.view.rgb, atol=1e-6) and inv.view.rgb.shape == x.shape
    assert (inv.generator is not None) == (name in ("pti", "spi")) == inv.report["generator"].get("tuned", False)
    steps = 0 if name == "encoder" else TINY.steps
    assert seen == [(i, steps, 2) for i in range(steps)] and inv.report["steps"] == steps == len(inv.trace)
    assert inv.report["method"] == ("latent-only" if name == "latent" else name) and set(invert(x, G, TINY, **frozen).report) == set(inv.report)
    assert name == "pose_opt" or torch.equal(inv.pose.yaw, G.pose(inv.w).yaw)


def test_pose_opt_with_its_camera_at_f_of_w_is_latent_only(G):
    x = G.sample(2, seed=1)[1].rgb
    a, b = invert(x, G, TINY, **frozen), pose_opt(x, G, TINY, camera=Camera(free=False), **frozen)
    assert torch.equal(a.ws, b.ws) and torch.equal(a.pose.yaw, b.pose.yaw) and a.report["start_scores"] == b.report["start_scores"]


def test_pose_opt_moves_the_camera_first_and_alone(G):
    seen = []
    inv = pose_opt(G.sample(1, seed=1)[1].rgb, G, TINY, lambda s: seen.append((s.state.w.clone(), s.state.free.angles.clone())), Camera(preheat=1 / 3, start=Pose.deg(10.)), **frozen)
    assert all(torch.equal(w, seen[0][0]) for w, _ in seen[:4]) and not torch.equal(seen[4][0], seen[0][0])
    assert all(not torch.equal(a[1], b[1]) for a, b in zip(seen, seen[1:])) and not torch.equal(inv.pose.yaw, G.pose(inv.w).yaw)
    again = invert(G.sample(1, seed=1)[1].rgb, G, TINY, state=inv.state, **frozen)
    assert torch.equal(again.pose.yaw, inv.pose.yaw) and again.report["method"] == "pose_opt"


def test_pose_opt_keeps_the_distance_that_a_generator_learnt():
    torch.manual_seed(0)
    G = PoseFreeGenerator(pof3d_config(width=24, channels=(16, 16, 12), samples=7, fine_samples=6, render_resolution=16, superresolution="none", march="eg3d", pose_rule="look_at", pose_extra="radius")).requires_grad_(False).eval()
    seen = []
    inv = pose_opt(G.sample(1, seed=1)[1].rgb, G, TINY, lambda s: seen.append(s.pose), **frozen)
    assert all(p.radius is not None for p in seen) and torch.equal(inv.pose.radius, G.pose(inv.w).radius) and not torch.equal(inv.pose.yaw, G.pose(inv.w).yaw)


def test_after_trouble_the_camera_goes_on_at_half_the_rate_too(G):
    go = lambda psi: pose_opt(G.sample(1, seed=1)[1].rgb, G, dataclasses.replace(TINY, start_steps=0), lambda s: seen.append(s.state.free.angles.clone()), Camera(preheat=.9, start=Pose.deg(10.)), psi=psi, phi=Pixels)
    seen = []; go(Pixels); plain = seen
    seen = []; assert "rec is not finite at step 2" in go(failing(lambda call: call == 3)).report["trouble"]             # steps 0, 1, trouble, 1 again
    moved = lambda s, i: (s[i] - s[i - 1]).norm()
    assert torch.equal(seen[1], plain[1]) and moved([seen[0], seen[2]], 1) < .6 * moved(plain, 1)


def test_pose_opt_depends_on_its_first_pose(face):
    "its known weakness: from a wrong first pose it stays on the wrong side; latent-only never asks for one"
    w = face.mapping(face.draw(64, 3))
    w = w[face.pose(w).yaw.argsort()[-2:-1]]                                    # far to one side
    pose, config = face.pose(w), quick(stages=(Stage(16, 1, .02, False),), starts=1, candidates=32, **{k: baselines.constant(0.) for k in ("id", "mv", "geo")})
    x = face.view(w, pose).rgb
    good, bad = (pose_opt(x, face, config, camera=Camera(start=p), **frozen) for p in (pose, mirror(pose)))
    off = lambda inv: abs(float(inv.pose.degrees()[0, 0] - pose.degrees()[0, 0]))
    assert off(bad) > 15 + off(good) and bad.trace[-1]["rec"] > good.trace[-1]["rec"]


def test_pti_without_tuning_is_its_first_stage(G):
    x = G.sample(2, seed=2)[1].rgb
    a, b = pti(x, G, TINY, tuning=Tuning(share=0.), **frozen), invert(x, G, first_stage(TINY, Tuning(share=0.), "w")[0], **frozen)
    assert torch.equal(a.ws, b.ws) and torch.equal(a.view.rgb, b.view.rgb) and a.generator is None and a.deltas.abs().max() == 0
    with pytest.raises(InputError, match="share"): pti(x, G, TINY, tuning=Tuning(share=1.), **frozen)


def test_tuning_is_one_generator_an_image(G):
    x = G.sample(2, seed=3)[1].rgb
    both, one = pti(x, G, TINY, tuning=TUNE, **frozen), pti(x[1:], G, TINY, tuning=TUNE, **frozen)
    assert isinstance(both.generator, TunedBatch) and torch.allclose(both.view.rgb[1:], one.view.rgb, atol=1e-3)
    turned = both.generator.render(both.generator.planes(both.ws), Pose.deg([-20., 20., -20., 20.])).rgb
    assert torch.allclose(turned[2:], both.generator[1].view(both.ws[1:], Pose.deg([-20., 20.])).rgb, atol=1e-6)
    with pytest.raises(InputError, match="expected 2 latents"): both.generator.planes(both.ws[:1])
    with pytest.raises(InputError, match="got 3 poses and 2 generators"): both.generator.render(both.generator.planes(both.ws), Pose.deg([-20., 20., 0.]))
    assert one.report["config"] == config_hash(TINY)
    planes, xyz = both.generator.planes(both.ws), torch.rand(2, 5, 3) - .5
    assert all(torch.equal(x[1:], y) for x, y in zip(both.generator.field(planes, xyz), both.generator[1].field(planes[1:], xyz[1:])))
    assert both.generator.config == G.config and both.generator.w_avg.shape == G.w_avg.shape
    for name in ("sample", "state_dict", "march"): # what they do not share is no single one's to answer
        with pytest.raises(AttributeError, match=f"all generators share, got {name}"): getattr(both.generator, name)


@pytest.mark.parametrize("stop, tuned", [(2, False), (8, True)])
def test_a_callback_stops_every_stage(G, stop, tuned):
    inv = pti(G.sample(1, seed=4)[1].rgb, G, TINY, lambda s: s.step < stop, tuning=TUNE, **frozen)
    assert len(inv.trace) == inv.report["steps"] == stop + 1 and (inv.generator is not None) == tuned


def test_tuning_ends_when_it_is_good_enough(G):
    inv = pti(G.sample(1, seed=4)[1].rgb, G, TINY, tuning=Tuning(stop=1e9), **frozen)
    assert inv.report["stages"][-1]["steps"] == 1 and torch.equal(inv.generator.synthesis.blocks[0].const, G.synthesis.blocks[0].const)


def steep(x): return (0 * x).square().sum((1, 2, 3)).sqrt() # 0, and a gradient that is no number


def test_tuning_that_ends_in_no_numbers_says_so(G, monkeypatch):
    "A finite loss whose gradient is none, in the only step; and a device that is full"
    one, x = Tuning(share=1 / 12, stop=-1.), G.sample(1, seed=4)[1].rgb
    monkeypatch.setattr(baselines, "match", lambda image, target, psi: dict(l2=steep(image), perceptual=steep(image)))
    with pytest.raises(DivergedError, match="weights that are not finite by step 11") as e: pti(x, G, TINY, tuning=one, **frozen)
    assert e.value.state.w.isfinite().all()
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    monkeypatch.setattr(baselines, "match", full)
    with pytest.raises(InputError, match="device's memory.*fewer images at once"): pti(x, G, TINY, tuning=one, **frozen)


def test_a_camera_begins_with_one_pose_an_image(G):
    with pytest.raises(InputError, match="Camera.start: expected 2 poses, one an image, got 1"): pose_opt(G.sample(2, seed=1)[1].rgb, G, TINY, camera=Camera(start=Pose.deg(10.)), **frozen)


def test_the_published_stop_is_of_lpips(G):
    "what says nearly nothing of every picture ends tuning where it is LPIPS, and is no reason to stop where it is not"
    Near = type("Near", (Pixels,), dict(distance=staticmethod(lambda a, b, mask=None: .01 * Pixels.distance(a, b))))
    x, steps = G.sample(1, seed=4)[1].rgb, lambda psi: pti(x, G, TINY, psi=psi, phi=Pixels).report["stages"][-1]
    assert steps(type("Lpips", (Near,), dict(name="lpips-alex")))["steps"] == 1
    assert steps(Near)["steps"] == first_stage(TINY, Tuning(), "w")[1] > 1 and steps(Near)["tuning"]["stop"] == 0.


def test_pti_sees_only_the_input_view(face):
    "its known weakness: what tuning gains where the picture was taken, it does not gain to the side"
    p = portrait(HELD_OUT + 2, 32)
    side = [Pose(p.pose.yaw + math.radians(y), p.pose.pitch) for y in (-35., 35.)]
    truth = torch.cat([portrait(HELD_OUT + 2, 32, pose=q).image for q in side])
    config = quick(stages=(Stage(32, 1, .02, False),), starts=1, candidates=48)
    inv = pti(p.image, face, config, tuning=Tuning(share=.5, stop=0., rate=1e-3), **frozen)
    before = face.view(inv.ws, inv.pose)
    turned = Pose(*(torch.cat(a) for a in zip(*((inv.pose.yaw + math.radians(y), inv.pose.pitch) for y in (-35., 35.)))))
    new, old = (H.render(H.planes(inv.ws), turned).rgb for H in (inv.generator, face))
    here, there = float(psnr(inv.view.rgb, p.image) - psnr(before.rgb, p.image)), float((psnr(new, truth) - psnr(old, truth)).mean())
    assert here > 1 and there < .85 * here


def symmetric(p): # a portrait made equal to its mirror image
    even = lambda x: (x + x.flip(-1)) / 2
    return View(even(p.image), even(p.image), even(p.depth), even(p.mask.float()))


def test_symmetry_has_no_conflict_on_a_symmetric_frontal_portrait(face):
    at = Pose.deg(0.)
    view = symmetric(portrait(HELD_OUT + 1, 32, pose=at))
    assert conflict(face, view.rgb, view, at, view).sum() == 0 and Symmetry().factor(at) == 0
    assert conflict(face, view.rgb.roll(3, -1), view, at, view).sum() > 20        # the same, shifted aside: now it has
    assert mirror_term(Networks(face, Pixels, Pixels), Symmetry())(None, at, view, view.rgb) == 0


def test_a_mark_on_one_side_is_a_conflict(face):
    p, q = (portrait(HELD_OUT + 4, 64, pose=Pose.deg(y), light=(0., .3), hair="short", hat=None, glasses=None) for y in (14., -14.))
    view, mirrored = (View(v.image, v.image, v.depth, v.mask.float()) for v in (p, q))
    marked = p.image.clone(); marked[..., 36:42, 38:44] = -1                    # on one cheek, near the nose
    plain, found = (conflict(face, x, view, p.pose, mirrored) for x in (p.image, marked))
    new = (found - plain).clamp(min=0)
    assert new.sum() > 36 and new[..., 30:48, :].sum() == new.sum()             # there and where its mirror image falls, and nowhere else


def test_symmetry_pulls_an_asymmetric_face_from_the_truth(face):
    "its known weakness: at the true code of an asymmetric face nothing is left to explain, yet the mirrored view still pulls"
    w = face.mapping(face.draw(64, 3)); w = w[face.pose(w).yaw.argsort()[-3:-2]]
    x = face.view(w, face.pose(w)).rgb
    v = w.clone().requires_grad_()
    planes, pose = face.planes(v), face.pose(v)
    view = face.render(planes, pose)
    rec, sym = (view.rgb - x).square().mean(), mirror_term(Networks(face, Pixels, Pixels), Symmetry())(planes, pose, view, x).sum()
    pull = [torch.autograd.grad(loss, v, retain_graph=True)[0].norm() for loss in (rec, sym)]
    assert pull[0] < 1e-6 and pull[1] > 1e-3


def test_spi_holds_the_depth(face):
    x = portrait(HELD_OUT + 2, 32, pose=Pose.deg(25.)).image
    config, far = quick(stages=(Stage(14, 1, .02, False),), starts=1, candidates=32), []
    for anchor in (0., 30.):
        inv = spi(x, face, config, tuning=Tuning(share=.6, stop=0., rate=2e-3, anchor=anchor), **frozen)
        far.append(float((inv.view.depth - face.view(inv.ws, inv.pose).depth).abs().mean()))
    assert far[1] < .8 * far[0] and {"pseudo", "anchor"} <= set(inv.trace[-1])


@pytest.fixture(scope="module")
def pictures(): return torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

QUICK = LatentTraining(pool=24, batch=8, portraits=2, held=4)


def test_an_encoder_learns_what_is_known(G, pictures, tmp_path):
    seen = []
    net = train_latent_encoder(G, pictures, tmp_path/"e", steps=30, training=dataclasses.replace(QUICK, known=1., pool=8), callback=lambda s, parts: seen.append(parts), **frozen)
    assert sum(p["look"] + p["pose"] for p in seen[-5:]) < .7 * sum(p["look"] + p["pose"] for p in seen[:5])
    w, d = net(G.sample(3)[1].rgb)
    assert w.shape == (3, 72) and d.shape == (3, G.num_ws, 72) and d[..., 64:].abs().max() == 0 and net.card["steps"] == 30 and not any(p.requires_grad for p in net.parameters())


def test_an_interrupted_training_goes_on_exactly(G, pictures, tmp_path):
    def stop(step, parts):
        if step == 3: raise KeyboardInterrupt
    whole = train_latent_encoder(G, pictures, tmp_path/"a", steps=6, training=QUICK, **frozen)
    with pytest.raises(KeyboardInterrupt): train_latent_encoder(G, pictures, tmp_path/"b", steps=6, training=QUICK, callback=stop, **frozen)
    parts = train_latent_encoder(G, pictures, tmp_path/"b", steps=6, training=QUICK, resume=True, **frozen)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in parts.state_dict().items())
    more = train_latent_encoder(G, pictures, tmp_path/"c", steps=1, training=QUICK, start=tmp_path/"a.safetensors", **frozen)
    assert more.card["started_from"]["name"] == "a" and (more.w.weight - whole.w.weight).abs().max() < 1e-3
    for bad, text in ((dict(), "budget"), (dict(steps=-1), "budget"), (dict(steps=7, resume=True), "expected the state")):
        with pytest.raises(InputError, match=text): train_latent_encoder(G, pictures, tmp_path/"d", training=QUICK, **bad, **frozen)
    for bad in (dict(batch=1), dict(held=0), dict(known=1.5)):
        with pytest.raises(InputError, match=f"LatentTraining.{[*bad][0]}: expected"): LatentTraining(**bad)
    with pytest.raises(InputError, match="at least 8"): train_latent_encoder(G, pictures[:6], tmp_path/"d", steps=1, training=QUICK, **frozen)


def test_a_run_goes_on_only_with_what_it_began_with(G, pictures, tmp_path):
    def stop(step, parts):
        if step == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_latent_encoder(G, pictures, tmp_path/"b", steps=6, training=QUICK, callback=stop, **frozen)
    for changes, what in ((dict(images=pictures.flip(0)), "images"), (dict(training=dataclasses.replace(QUICK, seed=9)), "training")):
        with pytest.raises(InputError, match=f"resume: expected the {what} that"): train_latent_encoder(**dict(dict(generator=G, images=pictures, out=tmp_path/"b", steps=6, training=QUICK, resume=True, **frozen), **changes))


def test_what_is_no_number_replaces_no_encoder(G, pictures, tmp_path):
    "A loss that is none, a gradient that is none, a full device: each is named, and neither the encoder nor a state is written"
    train = lambda steps, **kw: train_latent_encoder(G, pictures, tmp_path/"e", steps=steps, training=dataclasses.replace(QUICK, known=.5), psi=type("Psi", (Pixels,), kw), phi=Pixels)
    train(2); before = (tmp_path/"e.safetensors").read_bytes()
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    for distance, error, said in ((lambda a, b: a.mean((1, 2, 3)) * math.nan, DivergedError, "at step 1: its rec loss is nan"), (lambda a, b: steep(a), DivergedError, "at step 1: a gradient is not finite"), (full, InputError, "device's memory.*smaller LatentTraining.batch")):
        with pytest.raises(error, match=said): train(2, distance=staticmethod(distance))
        assert baselines.load_values(tmp_path/"e.state")["step"] == 1; (tmp_path/"e.state").unlink()   # one good step was taken
        with pytest.raises(error, match=said.replace("step 1", "step 0")): train_latent_encoder(G, pictures, tmp_path/"e", steps=2, training=dataclasses.replace(QUICK, known=0.), psi=type("Psi", (Pixels,), dict(distance=staticmethod(distance))), phi=Pixels)
        assert (tmp_path/"e.safetensors").read_bytes() == before and not (tmp_path/"e.state").exists()
    net = fresh_encoder(G)
    with torch.no_grad(): net.w.bias[0] = 1e6
    with pytest.raises(InputError, match="finite in half precision, got others in w.bias"): save_latent_encoder(net, tmp_path/"e.safetensors", G)
    assert (tmp_path/"e.safetensors").read_bytes() == before


def test_a_foreign_state_is_refused(G, pictures, tmp_path):
    for values in (dict(G=1, D=2), dict(net=1, opt={}, step=0, seconds=0.), [1], dict(of=3)):
        save_values(values, tmp_path/"e.state")
        with pytest.raises(InputError, match="expected the state of an encoder's training in 'e.state', got"): train_latent_encoder(G, pictures, tmp_path/"e", steps=2, training=QUICK, resume=True, **frozen)


def test_a_generator_that_is_not_frozen_will_do(G, pictures, tmp_path):
    H = copy.deepcopy(G, {id(G.reader): G.reader}).requires_grad_(True)
    a, b = (train_latent_encoder(g, pictures, tmp_path/n, steps=2, training=dataclasses.replace(QUICK, known=1.), **frozen) for g, n in ((H, "a"), (G, "b")))
    assert torch.equal(a.w.weight, b.w.weight)


def test_an_encoder_belongs_to_its_generator(G, tmp_path):
    H, other = (load_generator(save_checkpoint(tmp_path/n, G, half=h), "cpu") for n, h in (("one", True), ("two", False)))
    save_latent_encoder(fresh_encoder(H), tmp_path/"e.safetensors", H)
    assert isinstance(load_latent_encoder(H, tmp_path/"e.safetensors"), LatentEncoder)
    with pytest.raises(InputError, match="trained for this generator .*train-encoder"): load_latent_encoder(other, tmp_path/"e.safetensors")
    with pytest.raises(InputError, match="not saved"): load_latent_encoder(G, tmp_path/"e.safetensors")
    with pytest.raises(InputError, match="got none at 'two.safetensors'.*train-encoder"): load_latent_encoder(other)
    with pytest.raises(InputError, match="of the shape"): fresh_encoder(PoseFreeGenerator(GeneratorConfig(channels=(8, 8))), start=fresh_encoder(G))
    shutil.copy(tmp_path/"e.json", tmp_path/"f.json"); (tmp_path/"f.safetensors").write_bytes((tmp_path/"e.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="SHA-256"): read_latent_encoder(tmp_path/"f.safetensors")
    with pytest.raises(InputError, match="with its card"): read_latent_encoder(tmp_path/"g.safetensors")


def test_the_encoder_is_a_start_for_the_optimiser(G):
    net, x, seen = fresh_encoder(G, 5), G.sample(2, seed=5)[1].rgb, []
    look = encoder(x, G, TINY, net=net, **frozen)
    inv = encoder_latent(x, G, dataclasses.replace(TINY, noise=0., start_steps=0), lambda s: seen.append(s.pose), net=net, **frozen)
    assert torch.equal(look.w, net(x)[0]) and torch.equal(seen[0].yaw, look.pose.yaw) and not torch.equal(inv.w, look.w) and look.trace == []
    assert encoder_latent(x, G, dataclasses.replace(TINY, space="w"), net=net, **frozen).deltas.abs().max() == 0
    w = G.mapping(G.draw(2, 5))
    knows = lambda image: (w, torch.ones(2, G.num_ws, w.shape[1]))                # an encoder that is right wins the search, and its deltas stay
    for net, wins in ((knows, True), (lambda image: (w + 50., knows(image)[1]), False)):
        inv = encoder_latent(x, G, dataclasses.replace(TINY, stages=(Stage(1, 2, 0., True),)), net=net, **frozen)
        scores = torch.tensor(inv.report["start_scores"])
        assert scores.shape == (2, TINY.starts + 1) and bool((scores.argmin(1) == TINY.starts).all()) == wins and bool((inv.deltas.abs().amax((1, 2)) > .5).all()) == wins


def test_the_shipped_encoder_is_small_and_knows_its_generator(face):
    net = load_latent_encoder(face)
    assert net.card["bytes"] < 8e6 and {"data", "steps", "minutes", "seed", "figures", "generator"} <= set(net.card)
    w, v = face.sample(12, seed=1_000_003)
    got, d = net(v.rgb)
    lost, mean = (psnr(face.view(ws, at).rgb, v.rgb).mean() for ws, at in ((got[:, None] + d, face.pose(got)), (face.w_avg.expand(12, -1), face.pose(w))))
    assert lost > mean + 2                                                      # better than the mean face, seen from the true pose
    assert (face.pose(got).yaw - face.pose(w).yaw).abs().mean() < .5 * face.pose(w).yaw.abs().mean()


def test_an_own_representation_is_tuned_too(G):
    class Voxels(PoseFreeGenerator):
        def __init__(self, config): super().__init__(config); self.grid = torch.nn.Parameter(torch.zeros(3, config.plane_channels, 1, 1))
        def planes(self, ws): p = super().planes(ws); return p._replace(features=p.features + self.grid)
    H = Voxels(G.config); H.load_state_dict(G.state_dict(), strict=False); H.requires_grad_(False).eval()
    inv = pti(G.sample(1, seed=9)[1].rgb, H, TINY, tuning=TUNE, **frozen)
    assert inv.generator.grid.abs().max() > 0 and H.grid.abs().max() == 0
    assert torch.equal(H.pose(inv.w).yaw, inv.generator.pose(inv.w).yaw) # f(w) stays


def test_a_method_of_ones_own_is_reported_by_its_name(G, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", invert)
    x = G.sample(1, seed=9)[1].rgb
    assert [baselines.by_name(name, x, G, TINY, **frozen).report["method"] for name in ("mine", "latent")] == ["mine", "latent-only"]
