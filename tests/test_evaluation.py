"The measuring instrument: every figure at its limit, sets that never change, rows that survive, means that can be recomputed, and anybody's pictures."
import csv
import dataclasses
import functools
import json
import math
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from posefree_kit import cli, evaluation, optimiser
from posefree_kit.camera import FOCAL, Pose
from posefree_kit.checkpoints import save_checkpoint
from posefree_kit.core import InputError, load_image, rng, save_image, save_json
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig
from posefree_kit.evaluation import ABLATIONS, MEASURES, OFFSETS, SELF, SETS, Answer, Busy, Judges, RowFile, answer, attempt, benchmark, depth_error, differences, figure, evaluate, frechet_draws, image_metrics, in_sight, interval, label, load_judges, means, named, \
    normal_error, one_of, own_truth, paired, portrait_truth, pose_errors, protocol, read_rows, read_views, report, resolve, score, score_views, set_seeds, shown, table, verdict, write_tables, write_views
from posefree_kit.generator import GeneratorConfig
from posefree_kit.optimiser import DivergedError, Inversion, quick
from posefree_kit.portraits import STYLES, draw, portrait_batch
from posefree_kit.pose import PoseFreeGenerator
from tree import ROOT

SHORT = quick(stages=(optimiser.Stage(2, 2, .02, False), optimiser.Stage(2, 1, .01, True)), starts=2, start_steps=1, candidates=8)

@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), plane_channels=8, decoder_hidden=16, render_resolution=16, samples=8)).start()
    G.set_reader(Discriminator(DiscriminatorConfig(channels=(8, 8, 8))).eval())
    G.name, G.sha256 = "small", "0123456789abcdef"
    return G.requires_grad_(False).eval()

def known(G, w) -> Inversion:
    "An inversion that found w"
    pose = G.pose(w)
    return Inversion(w, torch.zeros(len(w), G.num_ws, w.shape[-1]), G.expand_ws(w), pose, G.view(w, pose), [], {}, None)

def mean_face(image, generator, config, callback=None): return known(generator, generator.w_avg.expand(len(image), -1))

# Pictures

def test_a_hollow_face_is_no_better_than_a_flat_one():
    truth = torch.rand(1, 1, 16, 16, generator=rng(0)) * .3 + 2.4
    scored = {name: depth_error(depth, truth, torch.ones(1, 1, 16, 16)) for name, depth in (("same", 2 * truth - 1), ("hollow", 5 - truth), ("flat", torch.full_like(truth, 2.5)))}
    assert scored["same"]["depth_rmse"] < 1e-6 and scored["hollow"]["depth_corr"] < -.999
    assert scored["hollow"]["depth_rmse"] == pytest.approx(float(scored["flat"]["depth_rmse"])) and scored["flat"]["depth_rmse"] > .05

def test_who_was_not_asked_has_not_failed(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    row = lambda method, image, **more: dict(set="portraits-easy", method=method, ablation="full", generator="g", sha256="h", config="c", preset="quick", steps=1, seed=0, image=image, **more)
    rows = [row("a", 1), row("b", 1, error="none found"), row("b", 2)]
    for name in ("1.truth", "2.truth", "1.a.full.c", "2.b.full.c"): save_image(torch.zeros(1, 3, 8, 32), tmp_path/f"{name}.png")
    words, text = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: (words.append(s), text(self, x, y, s, **k))[1])
    figure(rows, tmp_path, tmp_path/"f.png")
    assert words == ["failed"]                                                      # b's first; of a nobody asked for the second
    words.clear(); figure(rows + [row("c", i, error="no memory") for i in (1, 2, 3)], tmp_path, tmp_path/"g.png")
    assert words == ["failed"] * 3                                                  # and c's, of whom there is no picture at all

def test_identical_pictures_are_at_the_limit_of_every_figure():
    x = portrait_batch(torch.arange(10_000_000, 10_000_003), 32).image
    m = image_metrics(x, x)
    assert m["mse"] == m["mse_01"] == [0, 0, 0] and m["psnr"] == [120] * 3 and m["ssim"] == m["ms_ssim"] == m["id"] == [1] * 3
    assert max(m["ms_ssim_dist"] + m["pdist"]) < 1e-5

def test_a_known_difference_gives_the_known_number():
    x = torch.rand(2, 3, 32, 32, generator=rng(0)) - .5
    m = image_metrics(x + .2, x)
    for got, want in (("mse", .04), ("mse_01", .01), ("psnr", 20.)): assert m[got] == pytest.approx([want] * 2, abs=1e-4)
    x = portrait_batch([7], 32).image
    shifted = [image_metrics(x.roll(k, -1), x) for k in (0, 1, 3)]
    for k in ("mse", "ms_ssim_dist", "pdist"): assert shifted[0][k][0] < shifted[1][k][0] < shifted[2][k][0], k
    for k in ("psnr", "ssim", "ms_ssim"): assert shifted[0][k][0] > shifted[1][k][0] > shifted[2][k][0], k

def test_scales_follow_the_size_and_nothing_is_measured_above_256():
    for size, scales in ((16, 1), (64, 3), (176, 5)): assert image_metrics(*[torch.zeros(1, 3, size, size)] * 2, Judges())["ms_ssim_scales"] == [scales]
    x = torch.rand(1, 3, 512, 512, generator=rng(0)) * 2 - 1
    assert image_metrics(x, 0 * x, Judges())["mse"][0] == pytest.approx(float(torch.nn.functional.avg_pool2d(x, 2).square().mean()), abs=1e-5)

def test_lpips_and_pdist_never_stand_in_for_each_other():
    class One:
        name, distance = "one", staticmethod(lambda a, b: torch.ones(len(a)))
    x = torch.zeros(1, 3, 32, 32)
    assert {k: image_metrics(x, x, Judges(lpips=One))[k] for k in ("lpips", "pdist", "id")} == dict(lpips=[1], pdist=[None], id=[None])
    assert {k: image_metrics(x, x, Judges(perceptual=One))[k] for k in ("lpips", "pdist")} == dict(lpips=[None], pdist=[1])
    told = protocol(Judges(perceptual=One), 512)
    assert told["measures"]["pdist"]["network"] == "one" and told["measures"]["lpips"]["network"] is None and told["resolution"] == 256

def test_a_judge_that_the_loss_used_is_refused(G):
    with pytest.raises(InputError, match="portrait-eval in both"): evaluate(mean_face, SELF, G, quick(identity="portrait-eval"), n=1, progress=False)

# Shape and pose

@pytest.mark.parametrize("deg", [0, 10, 30, 50])
def test_normals_of_tilted_planes(deg):
    u = (torch.arange(32) + .5) / 32 - .5
    ray = (1 + (u[None] / FOCAL).square() + (u[:, None] / FOCAL).square()).sqrt()
    plane = lambda slope: (2.7 / (1 - slope * u / FOCAL) * ray)[None, None]
    level, tilted, all_ = plane(0.), plane(math.tan(math.radians(deg))), torch.ones(1, 1, 32, 32)
    assert float(normal_error(tilted, level, all_)) == pytest.approx(deg, abs=.01) and float(normal_error(tilted.mT, level, all_)) == pytest.approx(deg, abs=.01)
    assert float(normal_error(tilted, tilted, all_)) < 1e-3 and normal_error(level, level, 0 * all_).isnan().all()

def test_the_truth_itself_is_perfect_and_a_shift_is_seen():
    t = portrait_truth(tuple(set_seeds("portraits-extreme", 1)), 16)
    a = Answer(t.image, {o: t.turned(o) for o in OFFSETS}, t.depth, t.mask, t.pose)
    for r in score(a, t):
        assert r["psnr"] == r["novel_psnr"] == 120 and r["novel_id"] == r["depth_corr"] == 1 and r["depth_rmse"] < 1e-5 and r["normal_deg"] < 1e-3 and r["depth_std"] == r["true_depth_std"]
    other = dataclasses.replace(a, views={o: v.roll(1, -1) for o, v in a.views.items()}, depth=t.depth.flip(-1))
    for r in score(other, t): assert r["psnr"] == 120 and r["novel_psnr_-15"] < 30 and r["normal_deg"] > 10 and r["depth_corr"] < .99

def test_true_novel_views_are_at_true_yaw_and_ours_at_found_yaw(G):
    t = portrait_truth((10_100_000,), 16)
    side = portrait_batch([10_100_000], 16, poses=Pose(t.pose.yaw + math.radians(30), t.pose.pitch)).image
    assert torch.equal(t.turned(30), side)
    inv = known(G, G.mapping(G.draw(1, 5)))
    assert torch.equal(answer(inv, G).views[-45], G.render(G.planes(inv.ws), Pose(inv.pose.yaw - math.radians(45), inv.pose.pitch)).rgb)

def test_a_tuned_generator_renders_its_own_views(G):
    import copy
    H = copy.deepcopy(G)
    with torch.no_grad():
        for p in H.decoder.parameters(): p.mul_(1.5)
    inv = known(G, G.mapping(G.draw(1, 5)))
    inv.generator = H
    assert torch.equal(answer(inv, G).views[15], H.render(H.planes(inv.ws), Pose(inv.pose.yaw + math.radians(15), inv.pose.pitch)).rgb) and not torch.equal(answer(inv, G).views[15], answer(known(G, inv.w), G).views[15])

def test_kept_portraits_are_bounded_by_their_pixels(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "_DRAWN", {}); monkeypatch.setattr(evaluation, "_draw_truth", lambda seeds, size: drawn.append((seeds, size)) or SimpleNamespace(seeds=seeds))
    for _ in range(2):
        for i in range(4): assert portrait_truth((i,) * 8, 256).seeds == (i,) * 8
    assert len(drawn) == 4                                                          # 32 people at 256 pixels are kept
    for size in (128, 256, 2048): portrait_truth((9,) * 8, size)
    portrait_truth((9,) * 8, 2048)
    assert len(drawn) == 7 and [*evaluation._DRAWN] == [((9,) * 8, 2048)]           # one that is too large is kept alone

def test_own_samples_are_known_exactly(G):
    seeds = set_seeds(SELF, 3)
    t = own_truth(seeds, G)
    assert torch.allclose(own_truth(seeds[1:2], G).image[0], t.image[1], atol=1e-5)
    for r in score(answer(known(G, t.w), G), t): assert r["psnr"] > 80 and r["novel_psnr"] > 80 and r["w_dist"] == 0 and r["depth_corr"] > .999
    assert score(answer(known(G, G.w_avg.expand(3, -1)), G), t)[0]["w_dist"] == 1
    start = torch.randn(512, G.config.z_dim, generator=rng(SHORT.seed))
    assert torch.cdist(torch.cat([G.draw(1, s) for s in seeds]), start).min() > 1, "the start search draws the very samples"

def test_pose_errors_after_one_rotation_and_none_for_own_samples():
    true = Pose.of(torch.randn(6, 2, generator=rng(0)) * .3).degrees().tolist()
    row = lambda i, off, name: dict(set=name, method="m", image=i, yaw_deg=true[i][0] + off, pitch_deg=true[i][1], true_yaw_deg=true[i][0], true_pitch_deg=true[i][1])
    turned = pose_errors([row(i, 15, "portraits-easy") for i in range(6)])
    own = pose_errors([row(0, 15, SELF)])
    assert max(r["pose_yaw_deg"] for r in turned) < .1 and own[0]["pose_yaw_deg"] == pytest.approx(15, abs=1e-3)
    assert "pose_yaw_deg" not in pose_errors([row(i, 0, "portraits-easy") for i in range(2)])[0], "two images are too few to fit a frame on the others"

def test_a_difference_shows_digits_of_its_widest_end():
    assert shown((.00012, -.0004, .0005), signed=True) == "+0.00012 [-0.00040, +0.00050]" and shown((1.164, .93, 1.43), signed=True) == "+1.16 [+0.93, +1.43]" and shown((0., -.02, .03), signed=True) == "+0.0000 [-0.0200, +0.0300]"
    assert shown((28.21, 27.3, 29.1)) == "28.2 [27.3, 29.1]" and shown((.5, None, None)) == "0.500" and shown((None, None, None)) == "-" and shown((0., 0., 0.)) == "0.000 [0.000, 0.000]"

def test_a_difference_of_pose_fits_both_frames_on_the_images_that_both_have():
    turned = lambda method, n, by: [dict(set="portraits-easy", method=method, ablation="full", generator="g", sha256="h", config="c", preset="quick", steps=1, image=i, true_yaw_deg=float(i), true_pitch_deg=0., pitch_deg=0., yaw_deg=i + (0. if i < 6 else by)) for i in range(n)]
    few, many = pose_errors(turned("few", 6, 20.)), pose_errors(turned("many", 12, 20.)) # alike on the first six; the others turn the frame
    assert sum(r["pose_yaw_deg"] for r in many[:6]) / 6 > 5 and sum(r["pose_yaw_deg"] for r in few) / 6 < .01
    assert paired(few, many, "pose_yaw_deg") | dict(n=0) == pytest.approx(dict(mean=0, low=0, high=0, n=0), abs=1e-3) and paired(many, few, "pose_yaw_deg")["n"] == 6
    apart = [r | dict(config=r["set"] if i < 2 else "d") for i, r in enumerate(few[:4])]           # two groups of two on one side, four rows on the other
    assert paired(few[:4], apart, "pose_yaw_deg")["n"] == 0
    assert paired(few[:2], many, "pose_yaw_deg") == dict(mean=None, low=None, high=None, n=0), "no frame is fitted on less than three"

# Sets

def test_sets_are_what_they_say_and_never_change():
    first = {"portraits": 10000000, "portraits-easy": 10100000, "portraits-extreme": 10200005, "portraits-asymmetric": 10300000, "portraits-occluded": 10400006, "portraits-written": 10500041}
    seeds = {name: set_seeds(name) for name in SETS}
    assert {k: v[0] for k, v in seeds.items()} == first and sum(map(len, seeds.values())) == len(set().union(*seeds.values())) == 32 * len(SETS) and min(map(min, seeds.values())) >= 10_000_000
    drawn = {k: draw(torch.tensor(v), torch.zeros(len(v), dtype=torch.long)) for k, v in seeds.items()}
    yaw = {k: torch.rad2deg(p["yaw"]).abs() for k, (p, *_) in drawn.items()}
    assert yaw["portraits-easy"].max() < 20 and yaw["portraits-extreme"].min() >= 30 and yaw["portraits-extreme"].max() <= 60
    style = {k: {group: [list(STYLES[group])[i] for i in chosen] for group, chosen in s.items()} for k, (_, s, _) in drawn.items()}
    assert "none" not in style["portraits-asymmetric"]["mark"] and set(style["portraits-asymmetric"]["hair"]) <= {"parted", "swept", "sidelong"}
    assert all(g != "none" or h != "none" for g, h in zip(style["portraits-occluded"]["glasses"], style["portraits-occluded"]["hat"])) and set(style["portraits-written"]["text"]) == {"marked"}
    assert set_seeds("portraits-written", 5) == seeds["portraits-written"][:5]
    assert in_sight(torch.tensor(seeds["portraits-written"][:4]), "text").all() and not in_sight(torch.tensor([10500004, 10500019]), "text").any(), "letters under hair, and under a hat, are in no set"
    with pytest.raises(InputError, match="expected a set among"): set_seeds("portraits-pretty")

# Rows

def test_a_cut_file_goes_on_where_it_stopped(G, tmp_path):
    asked = []
    def method(image, *rest): asked.append(len(image)); return mean_face(image, *rest)
    ask = lambda **kw: evaluate(method, SELF, G, SHORT, n=4, batch=2, out=tmp_path/"r.jsonl", progress=False, **kw)
    whole = ask()
    assert asked == [2, 2] and [r["image"] for r in whole] == set_seeds(SELF, 4)
    lines = (tmp_path/"r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path/"r.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    with pytest.raises(InputError, match="--resume goes on"): ask()
    again = ask(resume=True)
    same = lambda rows: [{k: v for k, v in r.items() if k not in ("seconds", "peak_mb")} for r in rows]
    assert asked == [2, 2, 2] and same(again) == same(whole) == same(read_rows(tmp_path/"r.jsonl"))
    assert ask(resume=True) == again and asked == [2, 2, 2]
    with pytest.raises(InputError, match="give another file"): evaluate(method, SELF, G, dataclasses.replace(SHORT, seed=1), n=4, out=tmp_path/"r.jsonl", resume=True, progress=False)
    for nameless in (functools.partial(method), lambda *args: method(*args)): # rows of two of them could not be told apart
        with pytest.raises(InputError, match="expected a method with a name of its own"): evaluate(nameless, SELF, G, SHORT, n=2, out=tmp_path/"n.jsonl", progress=False)
    (tmp_path/"r.jsonl").write_bytes(b"{broken}\n" + lines[0])
    with pytest.raises(InputError, match="line 1: expected a row"): ask(resume=True)

def test_one_process_at_a_time_writes_a_file(tmp_path):
    with RowFile(tmp_path/"r.jsonl"):
        with pytest.raises(Busy): RowFile(tmp_path/"r.jsonl", resume=True)
    RowFile(tmp_path/"r.jsonl").__exit__()

def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path/"notes.txt").write_text("no row, and no end of line")
    for resume in (False, True):
        with pytest.raises(InputError, match="expected a file of rows .* got 'no row"): RowFile(tmp_path/"notes.txt", resume)
    assert (tmp_path/"notes.txt").read_text() == "no row, and no end of line"
    (tmp_path/"config.json").write_text('{"learning_rate": 0.1}')
    with pytest.raises(InputError, match="expected a file of rows"): RowFile(tmp_path/"config.json")
    assert (tmp_path/"config.json").read_text() == '{"learning_rate": 0.1}'
    (tmp_path/"cut.jsonl").write_text('{"set": "po')                                # a row that was cut is made again
    with RowFile(tmp_path/"cut.jsonl") as file: assert not file.rows
    assert not (tmp_path/"cut.jsonl").read_text()

def test_a_part_that_another_process_has_is_left_to_it(G, tmp_path):
    rows = benchmark(G, tmp_path, sets=["self"], config=SHORT, n=1, progress=False)
    part = next((tmp_path/"rows").glob("*.jsonl"))
    notes = []
    with RowFile(part, resume=True): benchmark(G, tmp_path, sets=["self"], config=SHORT, n=2, resume=True, progress=False, say=notes.append)
    assert len(rows) == 1 and len(read_rows(tmp_path/"rows.jsonl")) == 1 and "another process" in notes[0]

def test_failures_are_counted_and_cost_nobody_else(G):
    t = own_truth(set_seeds(SELF, 4), G)
    def method(image, *rest):
        if any(torch.allclose(x, t.image[2], atol=1e-4) for x in image): raise DivergedError("rec is not finite", None)
        return mean_face(image, *rest)
    rows = evaluate(method, SELF, G, SHORT, n=4, batch=4, progress=False)
    assert [bool(r.get("error")) for r in rows] == [False, False, True, False] and "not finite" in rows[2]["error"] and "psnr" not in rows[2]
    m = means(rows)[0]
    assert (m["n"], m["failed"]) == (3, 1) and "|3|1|" in table(rows) and "DivergedError" in report(rows)
    def nan(image, *rest): inv = mean_face(image, *rest); return dataclasses.replace(inv, view=inv.view._replace(rgb=inv.view.rgb * math.nan))
    assert "not finite" in attempt(nan, one_of(t, 0), G, SHORT, None)[0]["error"]
    def bug(*_): raise TypeError("a bug")
    with pytest.raises(TypeError): evaluate(bug, SELF, G, SHORT, n=1, progress=False)

def test_one_images_trouble_is_nobody_elses(G):
    sizes = []
    def method(image, generator, config, callback=None):
        sizes.append(len(image)); inv = mean_face(image, generator, config, callback)
        return dataclasses.replace(inv, report=inv.report | dict(trouble="rec is not finite")) if len(image) > 1 or len(sizes) == 3 else inv
    rows = evaluate(method, SELF, G, SHORT, n=2, batch=2, progress=False)
    assert sizes == [2, 1, 1] and ["trouble" in r for r in rows] == [False, True] and all(r["psnr"] for r in rows)

def test_a_failed_batch_leaves_nothing_in_memory(G):
    import gc, weakref
    class Big: pass
    held, alive = [], []
    def method(image, generator, config, callback=None):
        big = Big()
        if len(image) > 1: held.append(weakref.ref(big)); raise RuntimeError("out of memory")
        gc.collect(); alive.append(held[0]() is not None)
        return mean_face(image, generator, config, callback)
    assert len(evaluate(method, SELF, G, SHORT, n=2, batch=2, progress=False)) == 2 and alive == [False, False]

@pytest.mark.parametrize("size", (16, 43, 44, 64, 87, 88, 96, 98, 99, 175, 176, 256))
def test_every_size_has_scales(size):
    x = torch.rand(1, 3, size, size, generator=rng(0)) * 2 - 1
    assert image_metrics(x, x, Judges())["ms_ssim"] == [1.]

def test_images_of_which_nothing_is_known(G):
    rows = evaluate(mean_face, G.sample(2, seed=3)[1].rgb, G, SHORT, progress=False)
    assert [r["image"] for r in rows] == [0, 1] and rows[0]["psnr"] > 0 and "depth_corr" not in rows[0] and rows[0]["set"] == "images"
    row = evaluate(mean_face, [10_100_000], G, SHORT, progress=False)[0]
    assert row["image"] == 10_100_000 and row["set"] == "seeds" and row["novel_psnr"] > 0

def test_ablations_change_what_they_say():
    c = {name: resolve("latent", quick(), name)[2] for name in ABLATIONS}
    assert c["full"] == quick() and c["no_geo"].geo(.5) == c["no_id"].id(.5) == c["no_mv"].mv(.5) == 0 and c["no_geo"].id == quick().id
    assert len(c["one_stage"].stages) == 1 and c["one_stage"].steps == quick().steps and c["one_stage"].stages[0].shrink == 1
    assert c["no_curriculum"].mv(0) == c["no_curriculum"].mv(1) == pytest.approx(.105, abs=1e-3) and c["no_curriculum"].id(0) == pytest.approx(.2, abs=1e-3)
    assert resolve("latent:w", quick())[2].space == "w"
    assert resolve("pti", quick())[::2] == ("pti", quick()) and resolve("pti", quick(space="w"))[0] == "pti"
    for bad in ("pti:w", "pti:w+"):
        with pytest.raises(InputError, match=f"expected pti without a space.*got '{re.escape(bad)}'"): resolve(bad, quick())
    for bad in (("latnt", "full"), ("latent", "no_everything"), ("latent:z", "full")):
        with pytest.raises(InputError): resolve(bad[0], quick(), bad[1])

def test_a_generator_that_draws_portraits_is_as_far_as_portraits_are():
    "Other people of the simulator's are at 1; the same few colours for everybody are far"
    class Perfect:
        resolution = 16
        def sample(self, n, seed): return None, SimpleNamespace(rgb=portrait_batch(torch.arange(n) + 4_000_000 + 100 * seed, 16).image)
    class Flat(Perfect):
        def sample(self, n, seed): return None, SimpleNamespace(rgb=torch.rand(n, 3, 1, 1, generator=rng(seed)).mul(2).sub(1).expand(-1, -1, 16, 16))
    good, bad = (frechet_draws(g(), portraits=64, draws=2, halvings=4) for g in (Perfect, Flat))
    assert .7 < good["ratio"] < 1.4 and bad["ratio"] > 3 and good["real"] == bad["real"], (good, bad)
    assert len(good["ratios"]) == 2 and len(good["real"]) == 4 and good["variance"] == bad["variance"] > 1
    with pytest.raises(InputError, match="at least 2 portraits, 1 draw"): frechet_draws(Perfect(), portraits=64, draws=0)

# Tables

def test_intervals_cover_and_are_the_same_every_time():
    draws = rng(1)
    covered = sum(lo <= 0 <= hi for _, lo, hi in (interval(torch.randn(32, generator=draws).tolist()) for _ in range(60)))
    assert 51 <= covered <= 60 and interval([1., 2., 4.]) == interval([1., 2., 4.])
    assert interval([2., 2.]) == (2, 2, 2) and interval([3.]) == (3, None, None) and interval([None]) == (None,) * 3 and interval([1., None, 3.])[0] == 2

def test_paired_differences_pair():
    rows = lambda method, values: [dict(set="s", image=i, method=method, ablation="full", psnr=v) for i, v in values.items()]
    d = paired(rows("a", {1: 10., 2: 20., 3: None}), rows("b", {1: 9., 2: 18., 3: 5., 4: 50.}), "psnr")
    assert d["n"] == 2 and d["mean"] == 1.5 and 1 <= d["low"] <= 1.5 <= d["high"] <= 2
    assert "|s|b|2|-1.50 [-2.00, -1.00]|" in differences(rows("latent", {1: 10., 2: 20.}) + rows("b", {1: 9., 2: 18.}), ("psnr",))

def test_what_does_not_belong_together_is_not_subtracted():
    rows = lambda method, value, **of: [dict(set="s", image=i, method=method, ablation="full", psnr=value + i) | of for i in (1, 2)]
    one, other = dict(seed=0, config="c0"), dict(seed=1, config="c1")
    text = differences(rows("latent", 10., **one) + rows("latent", 50., **other) + rows("pti", 12., **one), ("psnr",))
    assert text.count("pti") == 1 and "|s|pti|2|+2.00 [+2.00, +2.00]|" in text
    text = differences(rows("latent", 10., config="c0") + rows("latent", 50., config="c1") + rows("pti", 12., config="c0"), ("psnr",))
    assert "pti (configuration c0, minus c0)|2|+2.00" in text and "pti (configuration c0, minus c1)|2|-38.0" in text
    with pytest.raises(InputError, match="once on either side"): paired(rows("a", 1.) + rows("a", 2.), rows("b", 3.), "psnr")
    assert label(dict(method="latent", seed=7)) == "latent, seed 7" and label(dict(method="latent", seed=0, ablation="no_mv")) == "latent, no_mv"

def test_one_method_under_two_names_counts_once(G, tmp_path):
    a = benchmark(G, tmp_path, ("latent", "latent:w+"), ("self",), config=SHORT, n=2, progress=False)
    assert len(a) == 2 and {r["method"] for r in a} == {"latent"}
    b = benchmark(G, tmp_path, ("latent:w+",), ("self",), config=SHORT, n=2, progress=False)
    assert len(b) == 2 and means(b)[0]["n"] == 2

def test_rows_that_are_there_stop_a_run_before_its_first_job(G, tmp_path):
    benchmark(G, tmp_path, ("latent:w",), ("self",), config=SHORT, n=1, progress=False)
    before = sorted((tmp_path/"rows").iterdir())
    with pytest.raises(InputError, match="expected no rows in .*--resume"): benchmark(G, tmp_path, ("latent", "latent:w"), ("self",), config=SHORT, n=1, progress=False)
    assert sorted((tmp_path/"rows").iterdir()) == before

def test_rows_that_are_there_twice_do_not_fit_their_own_frames(tmp_path):
    row = lambda method, i: dict(set="portraits-easy", method=method, space="w+", ablation="full", generator="g", sha256="h" * 12, config="c", preset="quick", steps=1, seed=0, image=i, true_yaw_deg=float(i), true_pitch_deg=0., pitch_deg=.5 * i ** 2, yaw_deg=i + 3. * (i == 2))
    def table(*methods):
        (tmp_path/"rows").mkdir(exist_ok=True)
        for m in methods: (tmp_path/"rows"/f"{m.replace(':', '_')}.jsonl").write_text("".join(json.dumps(row(m, i)) + "\n" for i in range(6)))
        return [r["pose_yaw_deg"] for r in write_tables(tmp_path)]
    assert table("latent") == table("latent", "latent:w+")

def test_a_method_has_one_name_however_its_space_was_asked_for():
    assert [named(dict(method=m, space=s)) for m, s in (("latent", "w+"), ("latent:w+", "w+"), ("latent", "w"), ("latent:w", "w"), ("encoder+latent", "w+"))] == ["latent", "latent", "latent:w", "latent:w", "encoder+latent"]
    assert named(dict(method="truth")) == "truth" and named(dict(method="mine:w")) == "mine:w"    # what others call theirs

def test_a_judge_that_the_loss_uses_is_left_out(monkeypatch, tmp_path):
    from posefree_kit import features
    there = tmp_path/features.BACKBONES["lpips-alex"].folder/features.BACKBONES["lpips-alex"].file
    there.parent.mkdir(parents=True); there.touch(); monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "load_perceptual", lambda name, **_: SimpleNamespace(name=name))   # LPIPS as if its weights were here
    assert load_judges(domain="other").lpips.name == "lpips-alex" and load_judges(domain="other", used="lpips-alex").lpips is None and load_judges(domain="other", used="lpips-vgg").lpips

def test_a_verdict_needs_pairs_and_an_interval_on_one_side():
    d = lambda low, high, n=8: dict(low=low, high=high, n=n)
    assert [verdict(x, "higher") for x in (d(.1, .2), d(-.1, .2), d(-.2, -.1), d(.1, .2, 3), d(None, None, 0))] == ["held", "undecided", "the opposite", "too few (3)", "not measured"]
    assert verdict(d(None, None, 1), "higher", least=1) == "too few (1)"
    assert verdict(d(-.2, -.1), "lower") == "held" and verdict(d(0, .2), "higher") == "undecided"

COMMITTED = ROOT/"data"/"results"/"benchmark"

def test_the_committed_means_come_from_the_committed_rows():
    rows, runs = read_rows(COMMITTED/"rows.jsonl"), json.loads((COMMITTED/"runs.json").read_text())
    assert (COMMITTED/"table.md").read_text(encoding="utf-8") == report(rows, runs["protocols"])
    assert {r["config"] for r in rows if r["config"] != "files"} <= set(runs["configs"]) and all(len(r["sha256"]) == 12 for r in rows)
    for g in means(rows, ("psnr", "id", "novel_psnr_30")):
        mine = [r for r in rows if all(r[k] == g[k] for k in ("set", "method", "ablation", "sha256", "config"))]
        assert g["n"] + g["failed"] == len(mine)
        for k in ("psnr", "id", "novel_psnr_30"):
            if g["n"]: assert g[k][0] == pytest.approx(statistics.fmean(r[k] for r in mine if not r.get("error")), abs=1e-4)

def test_the_front_page_tells_the_figures_that_are_committed():
    of = [r for r in read_rows(COMMITTED/"rows.jsonl") if r["generator"] == "portraits"]
    def asked(method="latent", preset="quick", name=None): return [r for r in of if (r["method"], r["preset"], r["ablation"]) == (method, preset, "full") and (r["set"] == name if name else r["set"] != SELF)]
    groups = [asked(), asked(name="portraits-easy"), asked(name="portraits-extreme"), asked(preset="paper", name="portraits-easy"), asked(preset="paper", name="portraits-extreme"), asked("encoder+latent"), asked("pti"), asked(name=SELF)]
    lines = [[x.strip() for x in line.strip(" |").split("|")] for line in (ROOT/"README.md").read_text(encoding="utf-8").splitlines() if line.startswith("  |")]
    lines = [x for x in lines if len(x) == 6 and x[1].isdigit()]
    assert len(lines) == len(groups)
    for (_, n, *cells), g in zip(lines, groups):
        assert int(n) == len(g) > 0
        for text, k in zip(cells, ("psnr", "novel_psnr_30", "depth_corr", "pose_yaw_deg")): assert float(text) == pytest.approx(statistics.fmean(r[k] for r in g), abs=.51 * 10 ** -len(text.partition(".")[2]))

# Anybody's pictures

@pytest.fixture
def views(tmp_path):
    return write_views("portraits-written", tmp_path/"v", n=2, size=16), tmp_path/"v"

def test_the_truths_own_files_are_perfect_and_shifted_ones_are_not(views, tmp_path):
    v, folder = views
    rows = score_views(folder, out=tmp_path/"out")
    assert all(r["psnr"] > 45 and r["novel_psnr"] > 45 and r["id"] > .99 and r["depth_corr"] > .9999 and r["normal_deg"] < .1 and r["true_yaw_deg"] == pytest.approx(r["yaw_deg"], abs=1e-3) for r in rows) and len(rows) == 2
    assert read_rows(tmp_path/"out"/"rows") == rows == score_views(folder, out=tmp_path/"out", resume=True)
    for f in folder.glob("*/view_*.png"): save_image(load_image(f).roll(2, -1), f)
    for a, b in zip(rows, score_views(folder)): assert b["psnr"] < a["psnr"] - 15 and b["novel_psnr"] < a["novel_psnr"] - 15 and b["pdist"] > a["pdist"] and b["depth_corr"] == a["depth_corr"]

def test_scores_of_other_files_are_not_taken_over(views, G, tmp_path):
    v, folder = views
    save_json(v | dict(images=v["images"][:1]), folder/"views.json"); score_views(folder, out=tmp_path/"out")
    save_json(v, folder/"views.json")                                              # the list was mended
    with pytest.raises(InputError, match="delete that file"): score_views(folder, out=tmp_path/"out", resume=True)
    evaluate(mean_face, G.sample(2, seed=3)[1].rgb, G, SHORT, out=tmp_path/"r.jsonl", progress=False)
    with pytest.raises(InputError, match="expected rows of"): evaluate(mean_face, G.sample(2, seed=4)[1].rgb, G, SHORT, out=tmp_path/"r.jsonl", resume=True, progress=False)

def test_what_is_missing_is_a_failure_and_what_is_left_out_is_not_scored(views):
    v, folder = views
    first, second = v["images"]
    (folder/first["novel"]["+30"]).unlink()
    rows = score_views(folder)
    assert "no such file" in rows[0]["error"] and "error" not in rows[1]
    save_json(v | dict(images=[{k: second[k] for k in ("image", "reconstruction")}]), folder/"views.json")
    rows = score_views(folder)
    assert rows[0]["error"] == "not listed in views.json" and rows[1]["psnr"] > 45 and "novel_psnr" not in rows[1] and "depth_corr" not in rows[1]
    assert (means(rows)[0]["n"], means(rows)[0]["failed"]) == (1, 1)
    some = lambda **changes: dict(set="s", method="m", ablation="full", generator="", sha256="", config="files", preset="files", steps=None, seed=0, psnr=20.) | changes
    text = table([some(image=1, psnr=30.), some(image=2), some(image=3, depth_corr=.5)], ("psnr", "depth_corr"))
    assert "|3|0|23.3" in text and "(1 of 3)" in text and text.count(" of 3)") == 1 # a mean over some of them says so
    (folder/second["depth"]).write_bytes(b"not numbers")
    save_json(v | dict(images=[second]), folder/"views.json")
    assert "depth" in score_views(folder)[1]["error"]

@pytest.mark.parametrize("change", [dict(format="x"), dict(method=""), dict(set="self"), dict(n=0), dict(size="64"), dict(images={}), dict(extra=1), dict(images=[dict(image=1, reconstruction="a.png")]), dict(images=[dict(image=10500041)]),
                                    dict(images=[dict(image=10500041, reconstruction="a.png", novel={"20": "b.png"})]), dict(images=[dict(image=10500041, reconstruction="a.png")] * 2), dict(images=[dict(image=True, reconstruction="a.png")]),
                                    dict(images=[dict(image=10500041, reconstruction="a.png", novel={"+30": 5})]), dict(images=[dict(image=10500041, reconstruction="a.png", seconds=10 ** 400)]), dict(images=[dict(image=10500041, reconstruction="a.png", yaw_deg=-1e300)])])
def test_a_wrong_list_is_refused(tmp_path, change):
    save_json(dict(format="posefree_kit views 1", method="m", set="portraits-written", n=2, size=32, images=[]) | change, tmp_path/"views.json")
    with pytest.raises(InputError, match="expected"): read_views(tmp_path)

def test_files_outside_the_folder_and_broken_json(tmp_path):
    entry = dict(image=10500041, reconstruction="../secret.png")
    save_image(torch.zeros(1, 3, 32, 32), tmp_path/"secret.png")
    save_json(dict(format="posefree_kit views 1", method="m", set="portraits-written", n=1, size=32, images=[entry]), tmp_path/"v"/"views.json")
    assert "inside the folder" in score_views(tmp_path/"v")[0]["error"]
    save_image(torch.zeros(1, 3, 32, 32), tmp_path/"v"/"x.png")
    np.savez((tmp_path/"v"/"zip.npy").open("wb"), x=np.ones(2)); (tmp_path/"v"/"cut.npy").write_bytes((tmp_path/"v"/"zip.npy").read_bytes()[:100]); np.save(tmp_path/"v"/"text.npy", np.full((8, 8), "x")); np.save(tmp_path/"v"/"complex.npy", np.ones((8, 8), complex)); np.save(tmp_path/"v"/"none.npy", np.ones((0, 0)))
    for change, said in ((dict(depth="zip.npy"), "an archive of arrays"), (dict(depth="cut.npy"), "an array of numbers in 'cut.npy'"), (dict(depth="text.npy"), "got <U1"), (dict(depth="complex.npy"), "got complex128"), (dict(depth="none.npy"), "got (0, 0)"), (dict(reconstruction="a\0b.png"), "the name of a file")):
        save_json(dict(format="posefree_kit views 1", method="m", set="portraits-written", n=1, size=32, images=[entry | dict(reconstruction="x.png") | change]), tmp_path/"v"/"views.json")
        assert said in score_views(tmp_path/"v")[0]["error"]
    (tmp_path/"v"/"views.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON"): read_views(tmp_path/"v")
    with pytest.raises(InputError, match="expected JSON"): read_views(tmp_path/"nowhere")

# The whole of it, small

def test_the_command_measures_resumes_and_makes_tables(G, tmp_path, monkeypatch):
    monkeypatch.setitem(optimiser.PRESETS, "quick", lambda **changes: dataclasses.replace(SHORT, **changes))
    save_checkpoint(tmp_path/"small.safetensors", G, G.reader)
    out = tmp_path/"out"
    write_views("portraits-easy", tmp_path/"v", n=2, size=16)
    call = lambda *args: CliRunner().invoke(cli.app, ["evaluate", "--out", str(out), "--generator", str(tmp_path/"small.safetensors"), "--device", "cpu", "--n", "2", "--no-progress", "--sets", "portraits-easy,self", *args])
    r = call("--methods", "latent,latent:w", "--ablate", "full,no_geo", "--views", str(tmp_path/"v"), "--pictures", "1")
    assert r.exit_code == 0 and "14 rows" in r.stdout, r.output
    rows = read_rows(out/"rows.jsonl")
    assert not [r for r in rows if r.get("error")] and {(r["method"], r["ablation"]) for r in rows} == {("latent", "full"), ("latent:w", "full"), ("latent", "no_geo"), ("truth", "full")}
    assert all(set(MEASURES) - {"lpips", "w_dist", "pose_yaw_deg", "pose_pitch_deg"} <= set(r) for r in rows if r["set"] == "portraits-easy" and r["method"] != "truth") and all("w_dist" in r for r in rows if r["set"] == SELF)
    with open(out/"table.csv", newline="") as f: assert [float(r["psnr"]) for r in csv.DictReader(f)] == [r["psnr"] for r in rows]
    figures = sorted(p.name for p in (out/"figures").iterdir())
    assert len(figures) == 5 and sum("ablations" in f for f in figures) == 2 and (out/"table.md").read_text().count("latent, no_geo") >= 4
    assert call("--methods", "latent").exit_code == 2
    r = call("--methods", "encoder,encoder:w", "--steps", "5"); assert r.exit_code == 2 and "--steps 5 with encoder" in r.stderr # which takes one look
    before = (out/"table.md").read_bytes()
    assert call("--methods", "latent,latent:w", "--ablate", "full,no_geo", "--resume").exit_code == 0 and (out/"table.md").read_bytes() == before

def test_inputs_for_others(G, tmp_path, capsys):
    save_checkpoint(tmp_path/"small.safetensors", G, G.reader)
    rows = cli.evaluate(tmp_path/"out", sets="portraits-occluded", n=1, inputs=tmp_path/"in", generator=tmp_path/"small.safetensors")
    assert rows[0]["size"] == 16 and (tmp_path/"in"/"portraits-occluded"/"10400006"/"input.png").is_file() and not (tmp_path/"out").exists()
    assert "inputs of portraits-occluded, 1 people each" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected no inputs in .*portraits-occluded.*got views.json"): cli.evaluate(tmp_path/"out", sets="portraits-occluded", n=1, inputs=tmp_path/"in", generator=tmp_path/"small.safetensors")
    with pytest.raises(InputError, match="expected sets that have pictures with --inputs, got 'self'"): cli.evaluate(tmp_path/"out", sets="self", n=1, inputs=tmp_path/"in", generator=tmp_path/"small.safetensors")
    with pytest.raises(InputError, match="at least 1"): cli.evaluate(tmp_path/"out", n=0)
