"The trainer's promises, on networks of a few thousand parameters."
import dataclasses, inspect, json, math, sys
from pathlib import Path

import pytest
import torch
from posefree_kit.camera import Pose, mirror
from posefree_kit.core import InputError, rng
from posefree_kit.checkpoints import load_generator, save_checkpoint
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig, widen_discriminator
from posefree_kit.generator import GeneratorConfig, View
from posefree_kit.latent_encoder import LatentEncoder, LatentEncoderConfig, fresh_encoder
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.training import STATE, Fakes, TrainConfig, UnposedImages, fit, grow, load_state, make_state, new_state, r1_penalty, relit, save_state, step_back, train_step

G8, D8 = GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8, samples=6), DiscriminatorConfig(channels=(8, 8))
C = TrainConfig(batch=4, hold_kimg=0.)


@pytest.fixture(scope="module")
def images(): return UnposedImages(torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_no_label_can_reach_training(images):
    assert set(vars(images)) == {"images", "mirror", "resolution"} and images.images.dtype == torch.uint8
    assert list(inspect.signature(train_step).parameters) == ["s", "images", "easy"]
    assert isinstance(images.batch(3, torch.Generator()), torch.Tensor)


@pytest.mark.parametrize("changes", [dict(), dict(loss="relativistic"), dict(loss="relativistic", r2_gamma=.1), dict(loss="relativistic", r2_gamma=.1, bf16=True), dict(bf16=False), dict(match_weight=1.), dict(r1_every=1, density_every=1)])
def test_steps_are_finite_and_move_everything(images, changes):
    import dataclasses
    s = new_state(G8, D8, dataclasses.replace(C, **changes))
    before = [p.clone() for p in list(s.G.parameters()) + list(s.D.parameters())]
    for _ in range(2): parts = train_step(s, images)
    assert all(torch.isfinite(torch.tensor(v)) for v in parts.values())
    still = [i for i, (a, b) in enumerate(zip(before, list(s.G.parameters()) + list(s.D.parameters()))) if torch.equal(a, b)]
    names = [n for n, _ in s.G.named_parameters()] + [n for n, _ in s.D.named_parameters()]
    assert all("embed_pose" in names[i] or names[i] == "real.bias" and s.config.loss == "relativistic" for i in still)   # the pose embedding waits for `condition_kimg`; a common bias cancels in differences


def test_r2_flattens_the_score_at_generated_images(images):
    "A discriminator that pays for slopes at generated images has gentler ones there than one that does not"
    steep = {}
    for gamma in (0., 200.):
        s = new_state(G8, D8, dataclasses.replace(C, loss="relativistic", d_rate=.02, r1_every=1, r2_gamma=gamma))
        for _ in range(30): parts = train_step(s, images)
        assert ("r2" in parts) == (gamma > 0)
        steep[gamma] = r1_penalty(s.D, s.ema.sample(8, 1)[1].rgb).item()
    assert steep[200.] < .5 * steep[0.], steep


def test_the_pose_learner_is_held(images):
    s = new_state(G8, D8, TrainConfig(batch=4, hold_kimg=1.))
    before = s.G.pose_learner.out.weight.clone(); train_step(s, images)
    assert torch.equal(before, s.G.pose_learner.out.weight)


def test_kill_and_resume_is_exact(images, tmp_path):
    config = dataclasses.replace(C, match_weight=1., match_kimg=.01)
    whole = fit(images, tmp_path / "a", G8, D8, config, kimg=.024, progress=False, device="cpu")
    fit(images, tmp_path / "b", G8, D8, config, kimg=.012, progress=False, device="cpu")
    b = fit(images, tmp_path / "b", G8, D8, config, kimg=.024, progress=False, device="cpu")
    assert all(torch.equal(x, y) for x, y in zip(whole.moments.buffers(), b.moments.buffers())) and b.moments.second.abs().sum() > 0
    assert all(torch.equal(x, y) for x, y in zip(whole.ema.parameters(), b.ema.parameters())) and whole.seen == b.seen == 24
    assert all(torch.equal(x, y) for x, y in zip(whole.D.parameters(), b.D.parameters()))
    assert [json.loads(l)["kimg"] for l in (tmp_path / "b/log.jsonl").read_text().splitlines()] == [.012, .024]


def test_a_damaged_state_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(InputError): load_state(tmp_path / "state.pt")


def test_growing_keeps_the_pictures(images):
    s = new_state(G8, D8, C); train_step(s, images)
    big = grow(s, 6, 6, C)
    w, small = s.ema.sample(2, seed=0)
    with torch.no_grad(): large = big.G.view(w, big.G.pose(w))
    assert (torch.nn.functional.avg_pool2d(large.rgb, 2) - small.rgb).abs().mean() < .1
    assert train_step(big, UnposedImages(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)))


def test_held_out_people_cannot_be_trained_on():
    with pytest.raises(InputError): UnposedImages.portraits(2, 8, first=9_999_999)


def test_folder_of_pictures(tmp_path):
    from PIL import Image
    with pytest.raises(InputError, match="holds none"): UnposedImages.folder(tmp_path, 8)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    assert UnposedImages.folder(tmp_path, 8).images.shape == (1, 3, 8, 8)
    (tmp_path/"00000").mkdir(); Image.new("RGB", (16, 16), "red").save(tmp_path/"00000"/"b.png")
    assert len(UnposedImages.folder(tmp_path, 8)) == 1
    (tmp_path/"00001"/"00000").mkdir(parents=True); Image.new("RGB", (16, 16), "red").save(tmp_path/"00001"/"00000"/"b.png")
    with pytest.raises(InputError, match="none itself: those of folders in it, as 00000/b.png, are not looked for"): UnposedImages.folder(tmp_path/"00001", 8)
    for name in ("c.HEIC", "d.jxl"): (tmp_path/name).write_bytes(b"x")
    with pytest.raises(InputError, match="can be read .*got 'c.HEIC' and 1 more like it: convert them"): UnposedImages.folder(tmp_path, 8)
    for name in ("c.HEIC", "d.jxl"): (tmp_path/name).unlink()
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(InputError): UnposedImages.folder(tmp_path, 8)


def test_easy_pictures_come_first(images):
    "Only easy pictures until the first mark, only the others from the second"
    easy, seen = UnposedImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), []
    s = new_state(G8, D8, TrainConfig(batch=4, bf16=False, relight=0., easy_kimg=(.008, .016)))
    s.D.register_forward_pre_hook(lambda m, x: seen.append(float((x[0] <= -.999).float().mean())) if len(x) == 1 and not x[0].requires_grad else None)
    for _ in range(6): train_step(s, images, easy)
    assert seen[0] > .99 and seen[1] > .99 and seen[-1] < .5


def test_relighting_follows_the_depth():
    "A wall seen from the front has one normal: no lamp changes it. A ball gets a bright side, and what is not there stays as it is"
    g = lambda: torch.Generator().manual_seed(0)
    u = torch.linspace(-1, 1, 16)
    r2 = (u ** 2 + u[:, None] ** 2)[None, None].expand(8, 1, -1, -1)
    grey, ones = torch.zeros(8, 3, 16, 16), torch.ones(8, 1, 16, 16)
    assert torch.allclose(relit(View(grey, grey, 2.7 * ones, ones), 1., 4.2634, g()), grey, atol=1e-5)
    ball = View(grey, grey, 2.7 - .25 * (1 - r2).clamp(min=0).sqrt(), (r2 < .9).float())
    x = relit(ball, 1., 4.2634, g())
    side = (x[..., 8:] * ball.weight[..., 8:]).sum((1, 2, 3)) - (x[..., :8] * ball.weight[..., :8]).sum((1, 2, 3))
    assert side.abs().min() > .5 and side.min() < 0 < side.max() and torch.equal(x[ball.weight.expand(-1, 3, -1, -1) == 0], torch.zeros(int(3 * (ball.weight == 0).sum())))
    assert torch.equal(relit(ball, 0., 4.2634, g()), grey)


def test_real_readings_are_scaled_to_the_generated_spread(images):
    s = new_state(G8, D8, TrainConfig(batch=8, bf16=False, calibrate=.5))
    for _ in range(12): train_step(s, images)
    assert (s.D.pose_gain > 1).all()                     # an untrained head reads next to nothing
    x = images.images.float() / 127.5 - 1
    scaled = lambda x: Pose.of((s.D(x).pose.stack() - s.D.pose_mean * s.D.unit) * s.D.pose_gain)
    assert torch.allclose(s.D.read_pose(x).stack(), (scaled(x).stack() + mirror(scaled(x.flip(-1))).stack()) / 2, atol=1e-5)
    assert torch.allclose(s.D.read_pose(x.flip(-1)).stack(), mirror(s.D.read_pose(x)).stack(), atol=1e-6)      # a mirrored picture is a mirrored pose
    still = new_state(G8, D8, TrainConfig(batch=4, bf16=False, calibrate=0.))
    train_step(still, images)
    one = new_state(G8, D8, TrainConfig(batch=1, bf16=False))
    train_step(one, images)
    assert torch.equal(one.D.pose_gain, torch.ones(2))   # one image has no spread
    assert torch.equal(still.D.pose_gain, torch.ones(2))


def test_some_are_judged_at_what_is_read(images):
    "Rows marked as such get the score of the reading, the others that of the given pose"
    s = new_state(G8, D8, C); D = s.D; D.condition = 1.
    x, own = images.images[:4].float() / 127.5 - 1, torch.tensor([True, False, True, False])
    given = Pose.deg([30., -30., 10., 5.])
    mixed, read, told = (D(x, *a).score for a in ((given, own), (), (given,)))
    assert torch.equal(mixed[own], read[own]) and torch.equal(mixed[~own], told[~own]) and not torch.allclose(read, told)
    with pytest.raises(InputError, match="read_share"): TrainConfig(read_share=1.5)


def test_the_discriminator_that_reads_is_an_average(images, tmp_path):
    "It follows slowly, is saved with the run, and a state from before it starts with the discriminator itself"
    import dataclasses
    from posefree_kit.core import load_values, save_values
    from posefree_kit.training import save_state
    s = new_state(G8, D8, dataclasses.replace(C, d_ema_kimg=.001)); s.seen = 1000
    before, p = s.d_ema.real.weight.clone(), s.D.real.weight
    train_step(s, images)
    keep = .5 ** 4                                      # four images at a half-life of one
    assert torch.allclose(s.d_ema.real.weight, keep * before + (1 - keep) * p, atol=1e-6) and not torch.equal(before, p)
    assert torch.equal(s.d_ema.pose_gain, s.D.pose_gain)
    save_state(s, tmp_path/"run.state")
    assert torch.equal(load_state(tmp_path/"run.state").d_ema.real.weight, s.d_ema.real.weight)
    old = load_values(tmp_path/"run.state"); old.pop("d_ema"); save_values(old, tmp_path/"old.state")
    assert torch.equal(load_state(tmp_path/"old.state").d_ema.real.weight, s.D.real.weight)


def test_mirrored_pictures_become_mirrored_poses(images):
    "With the wish alone, readings of a picture and of its mirror image come to agree"
    from posefree_kit.training import pose_loss
    x = images.images.float() / 127.5 - 1
    off = lambda D: float(pose_loss(D(x.flip(-1)).pose, mirror(D(x).pose), D.unit).detach())
    def after(weight):
        s = new_state(G8, D8, TrainConfig(batch=8, bf16=False, mirror_weight=weight, pose_weight=0.))
        with torch.no_grad(): s.D.pose_head[1].bias.copy_(torch.tensor([1., 0.]))  # reads a turn to one side into everything
        first = off(s.D)
        for _ in range(10): parts = train_step(s, images)
        return first, off(s.D), "mirror" in parts
    (a, b, told), (c, d, silent) = after(5.), after(0.)
    assert a == c and b < .8 * a and b < d and told and not silent


ENCODE = TrainConfig(batch=4, hold_kimg=0., bf16=False, encode_share=.5)

def test_an_encoder_learns_along(images):
    "It moves, the generator hears of the real images through it, and there is none where none is asked for"
    import dataclasses
    s, without = new_state(G8, D8, ENCODE), new_state(G8, D8, dataclasses.replace(ENCODE, encode_share=0.))
    before = [p.clone() for p in s.E.parameters()]
    parts, plain = train_step(s, images), train_step(without, images)
    assert {"rec", "rec_seen", "known", "tame"} <= set(parts) and not {"rec", "known"} & set(plain) and without.E is None
    assert any(not torch.equal(a, b) for a, b in zip(before, s.E.parameters())) and all(p.grad is not None for p in s.E.deltas.parameters())
    with pytest.raises(InputError, match="encode_share"): TrainConfig(encode_share=-.1)


def test_the_pose_learner_does_not_bend_to_the_encoder(images):
    "What the encoder gets wrong about poses is the encoder's to mend"
    s = new_state(G8, D8, ENCODE)
    fakes = Fakes(s, rng(0), images.batch(4, rng(1)))
    known = fakes.encoded.loss(s, fakes, 0., rng(2))["known"]
    assert all(g is None for g in torch.autograd.grad(known, list(s.G.pose_learner.parameters()), retain_graph=True, allow_unused=True))
    assert all(g is not None for g in torch.autograd.grad(known, list(s.E.w.parameters())))


def test_rendering_again_is_learnt(images):
    "One picture, again and again, with the wish to render it again alone: it comes nearer"
    one = UnposedImages(images.images[:1], mirror=False)
    s = new_state(G8, D8, TrainConfig(batch=4, bf16=False, encode_share=1., encode_weight=200., encode_rate=.005, pose_weight=0., symmetry_weight=0.))
    told = [train_step(s, one)["rec"] for _ in range(80)]
    assert sum(told[-10:]) < .8 * sum(told[:10])


def test_a_run_with_an_encoder_resumes_exactly(images, tmp_path):
    whole = fit(images, tmp_path/"a", G8, D8, ENCODE, kimg=.024, progress=False, device="cpu")
    fit(images, tmp_path/"b", G8, D8, ENCODE, kimg=.012, progress=False, device="cpu")
    b = fit(images, tmp_path/"b", G8, D8, ENCODE, kimg=.024, progress=False, device="cpu")
    for x, y in ((whole.E, b.E), (whole.e_ema, b.e_ema), (whole.G, b.G)): assert all(torch.equal(p, q) for p, q in zip(x.state_dict().values(), y.state_dict().values()))


def test_a_process_whose_rows_hold_no_encoded_person_goes_on(images):
    from posefree_kit.training import Processes
    class Half(Processes): # the first two of four images
        def rows(self, batch, group): return torch.arange(2)
    s = new_state(G8, D8, dataclasses.replace(ENCODE, encode_share=.25)); s.share = Half()
    parts = []
    for _ in range(8):
        parts.append(train_step(s, images))
        assert all(p.grad is not None for p in s.E.parameters()) # all processes average as many numbers
    assert {p["rec"] == 0 for p in parts} == {True, False} and all(math.isfinite(v) for p in parts for v in p.values())
    w, deltas = s.E(images.images[:0].float())
    assert w.shape == (0, s.G.config.w_dim) and deltas.shape == (0, s.E.config.num_ws, s.G.config.w_dim)


def test_what_grows_begins_with_large_styles_and_its_encoder(images):
    s = new_state(G8, D8, ENCODE)
    def written(state): # by the new block, into the planes
        heard = []
        hook = state.G.synthesis.blocks[-1].to_image.register_forward_hook(lambda m, i, o: heard.append(o.detach()))
        state.G.planes(state.G.mapping(state.G.draw(2))); hook.remove()
        return heard[0]
    little = written(grow(s, 8, 8, ENCODE))
    with torch.no_grad():
        s.ema.synthesis.blocks[-1].to_image.style.bias.add_(5.)                        # as after a long run, where styles are large
        for p in s.e_ema.parameters(): p.add_(.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        s.e_ema.mean.add_(.5)
    big = grow(s, 8, 8, dataclasses.replace(ENCODE, fade_kimg=0.))
    *_, old, new = (b.to_image.style(big.G.w_avg[None, :big.G.config.look_dim]).square().mean().sqrt().item() for b in big.G.synthesis.blocks)
    assert old > 5 and abs(new / old - 1) < 1e-4
    assert torch.allclose(written(big), little, atol=1e-6) and 0 < little.std() < .1   # and has as little to say
    with torch.no_grad(): big.G.synthesis.blocks[-1].to_image.weight.add_(.001); moved = written(big) - little; big.G.synthesis.blocks[-1].to_image.weight.sub_(.001)
    calm = grow(dataclasses.replace(s, ema=new_state(G8, D8, ENCODE).ema), 8, 8, ENCODE)
    with torch.no_grad(): calm.G.synthesis.blocks[-1].to_image.weight.add_(.001)
    assert moved.std() > 4 * (written(calm) - little).std()                            # but the same step of its weights says more
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (w, deltas), (w2, deltas2) = s.e_ema(x), big.E(x)
    assert torch.equal(w, w2) and torch.equal(deltas, deltas2[:, :s.G.num_ws]) and deltas.any() and torch.equal(deltas2[:, s.G.num_ws:], deltas[:, -1:].expand(-1, 2, -1))
    assert torch.equal(big.G.planes(w2[:, None] + deltas2).w_last, s.ema.planes(w[:, None] + deltas).w_last)   # what draws the background hears the same
    assert all(p.requires_grad for p in big.E.parameters()) and train_step(big, UnposedImages.portraits(8, 16))["rec"] > 0
    assert grow(s, 8, 8, C).E is None


def test_widening_keeps_the_pictures():
    from posefree_kit.training import widen
    small = new_state(G8, D8, C).G
    with torch.no_grad():
        for p in small.parameters(): p.add_(.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    big = widen(small, (12, 10), 80)
    w = small.mapping(small.draw(3))
    wide = torch.cat([w[:, :64], torch.randn(3, 16), w[:, 64:]], 1)
    assert big.config.w_dim == 88 and big.config.channels == (12, 10)
    with torch.no_grad(): assert torch.allclose(small.view(w, small.pose(w)).rgb, big.view(wide, big.pose(wide)).rgb, atol=1e-4)
    assert torch.allclose(big.pose(big.mapping(big.draw(4096))).stack().std(0), small.pose(small.mapping(small.draw(4096))).stack().std(0), rtol=.05)
    with pytest.raises(InputError, match="widen"): widen(small, (4, 8), 64)


def test_going_on_with_a_generator(images):
    from posefree_kit.training import go_on_with
    s = new_state(G8, D8, C); s.ema.set_reader(s.d_ema)
    t = go_on_with(s.ema, ENCODE)
    assert t.G is not s.ema and t.G.reader is None and t.E is not None and t.config.condition_kimg == (0., 0.) and train_step(t, images)
    from posefree_kit.training import widen
    assert train_step(go_on_with(widen(s.ema, (10, 12), 70), ENCODE), images)           # wider, then on
    s.ema.set_reader(None)
    with pytest.raises(InputError, match="with the discriminator"): go_on_with(s.ema, C)

def test_the_recorded_step_is_the_same_step():
    "tests/tools/train_cuda.py, whose steps a GPU replays: its pictures are the library's, and a step of it on the CPU moves every network"
    sys.path.insert(0, str(Path(__file__).parent/"tools"))
    from train_cuda import Constants, Recorded, render
    from posefree_kit.checkpoints import load_generator
    G = load_generator("portraits", "cpu")
    w = G.mapping(G.draw(2, 5)); planes, pose = G.planes(w), G.pose(w)
    with torch.no_grad():
        for x, y in zip(render(G, planes, pose, Constants(), 16, jitter=0.), G.render(planes, pose, size=16)): assert torch.allclose(x, y, atol=2e-5)
    c = TrainConfig(batch=8, encode_share=.25, loss="relativistic", r2_gamma=.1, match_weight=1., slant=.5)
    s = grow(new_state(GeneratorConfig(channels=(16, 16, 8), render_resolution=16), DiscriminatorConfig(channels=(16, 24, 32)), c), 8, 8, c)
    run = Recorded(s.G, s.D, s.E, c, UnposedImages.portraits(8, 32).images)
    before = [p.detach().clone() for net in (run.G.synthesis, run.D, run.E) for p in net.parameters()]
    values = run.step(True, True).tolist()
    losses = dict(zip(run.names, values))
    assert {"d", "pose", "mirror", "r1", "r2", "g", "density", "wall", "symmetry", "known", "rec", "match"} <= set(losses) and all(math.isfinite(v) for v in losses.values())
    after = [p for net in (run.G.synthesis, run.D, run.E) for p in net.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > .9 * len(after)


def test_rates_fall_in_a_straight_line(images):
    s = new_state(G8, D8, dataclasses.replace(C, fall_kimg=(0., .016), fall_to=.1))
    full, seen = [g["lr"] for g in s.groups], []
    for _ in range(5): train_step(s, images); seen.append([g["lr"] / f for g, f in zip(s.groups, full)])
    for got, want in zip(seen, (1, .775, .55, .325, .1)): assert got == pytest.approx([want] * len(full))
    with pytest.raises(InputError, match="fall_kimg"): TrainConfig(fall_kimg=(3., 2.))

def test_the_shipped_generator_is_what_its_card_says():
    "Reads true poses about as well as its card says, and the card's figures are those of data/results"
    from posefree_kit.checkpoints import load_generator, read_card
    from posefree_kit.portraits import HELD_OUT, portrait_batch
    from posefree_kit.training import pose_figures
    G, card = load_generator("portraits", "cpu"), read_card("portraits")
    assert card["figures"] | dict(sha256=card["sha256"]) == json.loads((Path(__file__).parents[1]/"data/results/generator.json").read_text())
    held = portrait_batch(torch.arange(HELD_OUT, HELD_OUT + 64), 64)
    found = pose_figures(G, G.reader, held.image, held.pose, 256)
    for key in ("yaw_r", "pitch_r"): assert found[key] == pytest.approx(card["figures"][key], abs=.04), (key, found)
    assert found["yaw_slope"] == pytest.approx(card["figures"]["yaw_slope"], abs=.1), found


def test_growing_twice_and_never_half_way(images, tmp_path):
    from posefree_kit.checkpoints import load_generator, save_checkpoint
    s = grow(new_state(G8, D8, C), 8, 8, dataclasses.replace(C, fade_kimg=.008))
    x = UnposedImages(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    train_step(s, x)
    with pytest.raises(InputError, match="fully in, got one at 0.0 of 0.008 kimg"): grow(s, 8, 8, C)
    with pytest.raises(InputError, match="would read poses"): save_checkpoint(tmp_path/"half", s.ema, s.d_ema)
    save_state(s, tmp_path/"half.state"); again = load_state(tmp_path/"half.state")                # loaded, and not a step taken
    assert 0 < again.d_ema.fade == again.D.fade < 1 and again.D.condition == again.d_ema.condition
    with pytest.raises(InputError, match="would read poses"): save_checkpoint(tmp_path/"half", again.ema, again.d_ema)
    for _ in range(3): train_step(s, x)
    seen = x.images[:2].float() / 127.5 - 1
    save_checkpoint(tmp_path/"run-0.5", s.ema, s.d_ema, half=False); save_checkpoint(tmp_path/"run-0.25", s.ema)
    assert torch.allclose(load_generator(tmp_path/"run-0.5.safetensors", "cpu").read_pose(seen).stack(), s.d_ema.read_pose(seen).stack(), atol=1e-5) and (tmp_path/"run-0.25.json").exists()
    assert grow(s, 8, 8, C).G.resolution == 32                                       # and once more


def test_a_run_that_ends_with_its_fade_is_fully_in(images, tmp_path):
    "What `fit` gives back says of the new layer what its file says"
    from posefree_kit.checkpoints import save_checkpoint
    x = UnposedImages(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    s = fit(x, tmp_path, start=grow(new_state(G8, D8, C), 8, 8, dataclasses.replace(C, fade_kimg=.008, condition_kimg=(0., .016))), kimg=.008, progress=False, device="cpu")
    again = load_state(tmp_path/"run.state")
    assert s.D.fade == s.d_ema.fade == again.d_ema.fade == 1. and s.D.condition == s.d_ema.condition == again.D.condition == .5
    save_checkpoint(tmp_path/"whole", s.ema, s.d_ema)


def test_a_start_is_for_a_folder_of_its_own_and_its_own_device(images, tmp_path):
    begin = lambda: new_state(G8, D8, C)
    fit(images, tmp_path, start=begin(), kimg=.004, progress=False)
    with pytest.raises(InputError, match="without a run, to begin from `start`, got .*resume=False, which begins anew in its place"): fit(images, tmp_path, start=begin(), kimg=.008, progress=False)
    assert load_state(tmp_path/"run.state").seen == 4 and fit(images, tmp_path, start=begin(), kimg=.008, resume=False, progress=False).seen == 8
    with pytest.raises(InputError, match="expected a `start` on the device cpu, got one on meta"): fit(images, tmp_path/"b", start=dataclasses.replace(begin(), G=begin().G.to("meta")), kimg=.004, progress=False, device="cpu")


def test_who_has_none_of_the_eight_draws_all_the_same(images):
    "From nine processes on, some have none of the pictures that symmetry is asked of: what they draw afterwards must be what others draw"
    from posefree_kit.core import Part
    from posefree_kit.generator import Planes
    from posefree_kit.training import symmetry_loss
    G = new_state(G8, D8, C).G
    planes, streams = G.planes(G.w_avg.expand(8, -1)), []
    for rows in (torch.arange(8), torch.arange(0)):
        streams.append(rng(1))
        loss = symmetry_loss(G, Planes(*(x[rows] for x in planes)), Part(streams[-1], 8, rows), 8)
    assert loss == 0 and torch.equal(streams[0].get_state(), streams[1].get_state())


def test_the_encoder_works_in_bfloat16_but_for_its_heads(images):
    s, seen = new_state(G8, D8, dataclasses.replace(ENCODE, bf16=True)), []
    for part in (s.E.body, s.E.w, s.E.deltas): part.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    parts = train_step(s, images)
    assert seen == 2 * [torch.bfloat16, torch.float32, torch.float32] and all(math.isfinite(v) for v in parts.values())


def test_a_batch_of_one_goes_on(images, tmp_path):
    one = dataclasses.replace(C, batch=1)
    fit(images, tmp_path, G8, D8, one, kimg=.001, progress=False, device="cpu", watch=lambda s: dict(yaw_r=math.nan))
    assert json.loads((tmp_path/"log.jsonl").read_text())["yaw_r"] is None
    assert fit(images, tmp_path, kimg=.002, progress=False, device="cpu").seen == 2


def test_a_run_goes_on_with_its_own_settings_or_says_so(images, tmp_path):
    fit(images, tmp_path, G8, D8, C, kimg=.004, progress=False, device="cpu")
    with pytest.raises(InputError, match="TrainConfig that the run in .* batch, seed"): fit(images, tmp_path, config=dataclasses.replace(C, batch=2, seed=9), kimg=.008, progress=False, device="cpu")
    with pytest.raises(InputError, match="GeneratorConfig that the run in .* samples"): fit(images, tmp_path, dataclasses.replace(G8, samples=5), D8, C, kimg=.008, progress=False, device="cpu")
    assert fit(images, tmp_path, kimg=.008, progress=False, device="cpu").seen == 8
    with pytest.raises(InputError, match="TrainConfig of `start` .* batch"): fit(images, tmp_path/"other", config=dataclasses.replace(C, batch=2), start=new_state(G8, D8, C), kimg=.004, progress=False, device="cpu")
    with pytest.raises(InputError, match="TrainConfig.seed: expected 0 to"): TrainConfig(seed=1 << 62)


def test_a_run_does_not_end_with_weights_that_are_no_numbers(images, tmp_path, monkeypatch):
    "The last step of the budget spoils a weight, once: a step back, and on to the end at half the rate"
    from posefree_kit import training
    honest, spoilt = training.train_step, []
    def step(s, *args):
        parts = honest(s, *args)
        if s.seen == 12 and not spoilt: spoilt.append(s.groups[0]["lr"]); next(s.ema.parameters()).data.fill_(math.nan)
        return parts
    monkeypatch.setattr(training, "train_step", step)
    s = fit(images, tmp_path, G8, D8, C, kimg=.012, progress=False, device="cpu")
    assert spoilt and s.seen == 12 and training.sound(s) and "a weight is not finite at step" in s.trouble and s.groups[0]["lr"] == pytest.approx(spoilt[0] / 2)
    assert load_state(tmp_path/"run.state").seen == 12 and [json.loads(line)["kimg"] for line in (tmp_path/"log.jsonl").read_text().splitlines()] == [.012]


def test_a_folder_of_pictures_is_read_whole_or_refused(tmp_path):
    import numpy as np
    from PIL import Image
    full = lambda *size: Image.fromarray(np.full((*size, 3), 255, np.uint8))
    for name in ("a.png", "b.tif", "c.ppm"): full(8, 8).save(tmp_path/name)
    np.save(tmp_path/"d.npy", np.full((2, 3, 8, 8), 255, np.uint8))
    assert len(x := UnposedImages.folder(tmp_path, 8)) == 5 and int(x.images.min()) == 255
    for name, write, said in (("e.npy", lambda p: np.save(p, np.ones((2, 3, 8, 8), np.float32)), "uint8 in 'e.npy'.*float32"), ("i.npy", lambda p: np.save(p, np.ones((2, 3, 8, 9), np.uint8)), "in 'i.npy', got .2, 3, 8, 9"), ("f.npy", lambda p: p.write_bytes(b"\x93NUMPY cut"), "in 'f.npy'"), ("h.npy", lambda p: np.savez(p.open("wb"), x=np.ones(2)), "in 'h.npy', got an archive of arrays"), ("g.png", lambda p: full(8, 12).save(p), "square images to train on, got 'g.png' of 12 x 8")):
        write(tmp_path/name)
        with pytest.raises(InputError, match=said): UnposedImages.folder(tmp_path, 8)
        (tmp_path/name).unlink()
    with pytest.raises(InputError, match="seeds below"): UnposedImages.portraits(2, 8, first=10_000_005)

def test_slant_and_symmetry_scale_reach_the_step(images):
    "Each changes what it is for, and nothing else of a first step"
    def step(**kw):
        s = new_state(G8, D8, dataclasses.replace(C, bf16=False, **kw))
        return train_step(s, images)
    base, slant, soft = step(), step(slant=.7), step(symmetry_scale=.2)
    assert slant["mirror"] != base["mirror"] and slant["d"] == base["d"] and slant["pose"] == base["pose"]
    assert soft["symmetry"] < base["symmetry"] and soft["d"] == base["d"] and soft["g"] == base["g"]
    with pytest.raises(InputError, match="slant"): TrainConfig(slant=-.1)
    with pytest.raises(InputError, match="symmetry_scale"): TrainConfig(symmetry_scale=0.)


def test_moments_are_matched(images):
    "Generated images come to be of the mean and the spread that real ones have in the features, where only that is asked for; encoded people do not count"
    s = new_state(G8, D8, dataclasses.replace(ENCODE, match_weight=1., g_rate=.01))
    for p in s.moments.buffers(): assert not p.any()
    parts = train_step(s, images)
    assert "match" in parts and s.moments.kept > 0 and "match" not in train_step(new_state(G8, D8, ENCODE), images)
    for g in s.opt_d.param_groups: g["lr"] = 0.                                                  # features that stay
    s.config = dataclasses.replace(s.config, match_weight=1e3, match_kimg=.1, encode_share=.5)
    told = [train_step(s, images)["match"] for _ in range(80)]
    assert sum(told[-10:]) < .5 * max(sum(told[i:i + 10]) for i in range(0, 60, 10)), told
    f = Fakes(s, rng(0), images.batch(4, torch.Generator()))
    assert f.drawn.sum() == 2 and not f.drawn[f.encoded.at].any()
    with pytest.raises(InputError, match="match_kimg"): TrainConfig(match_kimg=0.)
    for bad in (dict(batch=1), dict(encode_share=1.), dict(batch=4, encode_share=.9)):
        with pytest.raises(InputError, match="match_weight: expected batches of at least 4"): TrainConfig(match_weight=1., **bad)


class Halved(Discriminator):
    "A subclass that replaces a method"
    def forward(self, *args, **kwargs): j = super().forward(*args, **kwargs); return j._replace(score=j.score / 2)


def test_networks_of_other_classes_go_on_as_what_they_are(images, tmp_path):
    kinds = (PoseFreeGenerator, Halved, LatentEncoder)
    G = new_state(G8, D8, C).G
    s = fit(images, tmp_path/"r", start=make_state(G, Halved(D8), C), kimg=.004, progress=False, device="cpu")
    with pytest.raises(InputError, match="^run.state: expected a run of PoseFreeGenerator, Discriminator, LatentEncoder, got one of PoseFreeGenerator, Halved: give"): fit(images, tmp_path/"r", kimg=.008, progress=False, device="cpu")
    t = fit(images, tmp_path/"r", kimg=.008, progress=False, device="cpu", kinds=kinds)
    assert type(t.D) is type(t.d_ema) is Halved and t.seen == 8
    back = step_back(FloatingPointError("a loss"), tmp_path/"r"/STATE, torch.device("cpu"), like=t)
    assert type(back.D) is Halved and type(widen_discriminator(back.D, (12, 12))) is Halved
    path = save_checkpoint(tmp_path/"g.safetensors", s.ema, s.d_ema)
    with pytest.raises(InputError, match="got one of the class 'Halved'"): load_generator(path, "cpu")
    assert type(load_generator(path, "cpu", reader=Halved).reader) is Halved


def test_a_nan_loss_leaves_a_subclass_what_it_is(images, tmp_path, monkeypatch):
    from posefree_kit import training
    real, calls = training.train_step, []
    def broken(*args):
        calls.append(type(args[0].D))
        if len(calls) == 2: raise FloatingPointError("loss d is nan")
        return real(*args)
    monkeypatch.setattr(training, "train_step", broken)
    class Own(LatentEncoder): pass
    start = make_state(new_state(G8, D8, C).G, Halved(D8), ENCODE, Own(fresh_encoder(new_state(G8, D8, C).G).config))
    start.D.from_rgb.requires_grad_(False); before = start.D.from_rgb.weight.clone()
    s = fit(images, tmp_path/"r", start=start, kimg=.012, progress=False, device="cpu")
    assert s.trouble == "loss d is nan" and type(s.D) is Halved and set(calls) == {Halved} and type(s.E) is type(s.e_ema) is Own
    assert torch.equal(before, s.D.from_rgb.weight) # what was frozen still is


def test_what_is_frozen_in_a_discriminator_stays_frozen(images):
    s = new_state(G8, D8, C)
    s.D.from_rgb.requires_grad_(False); before = s.D.from_rgb.weight.clone()
    for _ in range(3): train_step(s, images)
    assert torch.equal(before, s.D.from_rgb.weight) and not s.D.from_rgb.weight.requires_grad and s.D.real.weight.requires_grad


def test_own_planes_and_own_encoders_train_with_bfloat16(images):
    class Voxels(PoseFreeGenerator):
        def planes(self, ws): p = super().planes(ws); return p._replace(features=p.features.bfloat16())
    class Half(LatentEncoder):
        def forward(self, image): return tuple(x.bfloat16() for x in super().forward(image))
    config = dataclasses.replace(ENCODE, bf16=True)
    G = Voxels(G8).start(0)
    E = Half(fresh_encoder(G).config); E.load_state_dict(fresh_encoder(G).state_dict())
    assert all(math.isfinite(v) for v in train_step(make_state(G, Discriminator(D8), config, E), images).values())


def test_an_encoder_of_other_widths_trains_along(images):
    s = new_state(G8, D8, C)
    E = fresh_encoder(s.G, config=LatentEncoderConfig(widths=(8, 16), hidden=24))
    assert E.config.widths == (8, 16) and E.config.num_ws == s.G.num_ws and not torch.equal(E.std, torch.ones_like(E.std))
    assert fresh_encoder(s.G, start=E).config == E.config
    t = make_state(s.G, s.D, ENCODE, E); before = E.w.weight.clone()
    assert train_step(t, images)["rec"] > 0 and not torch.equal(before, t.E.w.weight)


def test_a_learned_distance_is_trained(images):
    class Far(PoseFreeGenerator):
        def __init__(self, config): super().__init__(config); self.far = torch.nn.Parameter(torch.tensor(2.7))
        def pose(self, w): return super().pose(w).at(self.far.expand(len(w)))
    s = make_state(Far(G8).start(0), Discriminator(D8), C)
    for _ in range(2): train_step(s, images)
    assert s.G.far.grad is not None and float(s.G.far.detach()) != 2.7


def test_channels_last_is_the_same_discriminator(images):
    "Convolutions work in another order of memory; what they say stays"
    D = Discriminator(D8)
    x = images.batch(4, torch.Generator().manual_seed(0))
    with torch.no_grad(): seen = [layer for layer in D.layers(x)]
    assert all(layer.is_contiguous(memory_format=torch.channels_last) for layer in seen)
    with torch.no_grad(): want = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x.double(), D.from_rgb.weight.double() * D.from_rgb.gain) + D.from_rgb.bias.double()[:, None, None], .2) * math.sqrt(2)
    assert torch.allclose(seen[0].double(), want, atol=1e-5)
