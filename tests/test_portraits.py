"The portrait simulator: signs, exact truth, independence of the batch, refusals"
import json
import numpy as np
import pytest, torch
import torch.nn.functional as F
from posefree_kit.camera import Pose, cam2world, intrinsics, project, unproject
from posefree_kit.core import InputError, load_image
from posefree_kit.portraits import FAR, HELD_OUT, NEAR, STYLES, draw, portrait, portrait_batch, write_portraits

PLAIN = dict(hair="bald", hat=None, glasses=None, beard=None)
FIELDS = ("image", "depth", "mask", "normal")

@pytest.fixture(scope="module")
def crowd(): return portrait_batch(range(100, 112), 64)

def same(a, b, i=slice(None), j=slice(None)): return max((getattr(a, f)[i] - getattr(b, f)[j]).abs().max().item() for f in FIELDS)

def test_shapes_and_ranges(crowd):
    assert crowd.image.shape == crowd.normal.shape == (12, 3, 64, 64) and crowd.depth.shape == crowd.mask.shape == (12, 1, 64, 64)
    assert crowd.image.abs().max() <= 1 and set(crowd.mask.unique().tolist()) == {0., 1.}
    assert torch.equal(crowd.depth == FAR, crowd.mask == 0)
    solid = crowd.depth[crowd.mask > 0]
    assert NEAR < solid.min() and solid.max() < FAR
    length = crowd.normal.norm(dim=1, keepdim=True)
    assert torch.allclose(length[crowd.mask > 0], torch.tensor(1.), atol=1e-4) and (length[crowd.mask == 0] == 0).all()
    assert len(crowd.pose) == 12 and len(crowd.identity["hair"]) == 12

def test_framing(crowd):
    cover = crowd.mask.mean((1, 2, 3))
    assert cover.min() > .25 and cover.max() < .85
    assert crowd.mask[:, 0, -1, 24:40].mean() > .9 and crowd.mask[:, 0, 28:40, 28:36].mean() > .97  # shoulders at the bottom, a head in the middle
    assert crowd.mask[:, 0, :4, :4].mean() < .05

def test_everything_in_the_box():
    r = portrait_batch(range(200, 206), 48, Pose.deg([-60., -30, 0, 20, 40, 60], [25., -25, 0, 10, -10, 5]), hat="brim")
    points = unproject(r.depth, cam2world(r.pose), intrinsics(batch=6))[r.mask.flatten(1) > 0]
    assert points.abs().max() < .55

def test_positive_yaw_moves_the_nose_right_and_positive_pitch_shows_the_crown():
    for yaw in (20., -20.):
        r = portrait_batch(range(6), 64, Pose.deg([yaw]), **PLAIN)
        nose = r.depth[:, 0, 34:40].flatten(1).argmin(1) % 64           # the nearest point of these rows is the tip of the nose
        assert torch.equal(nose > 32, torch.full((6,), yaw > 0)) and ((nose - 32).abs() > 4).all()
    up, down = (portrait_batch(range(6), 64, Pose.deg([0.], [p]), **PLAIN) for p in (20., -20.))
    row = lambda r: r.depth[:, 0, 16:48, 26:38].amin(2).argmin(1).float().mean()
    assert row(up) > row(down) + 3   # from above, the nose sinks in the image

def test_seed_does_not_depend_on_batch_or_order(crowd):
    assert same(crowd, portrait_batch([107], 64), slice(7, 8)) < 1e-4
    mixed = portrait_batch([111, 3, 100], 64)
    assert same(crowd, mixed, [11, 0], [0, 2]) < 1e-4

def test_threads_do_not_matter(crowd):
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert same(crowd, portrait_batch(range(100, 112), 64)) < 1e-4
    finally: torch.set_num_threads(before)

def test_seeds_and_variations_differ():
    a, b, c = portrait(5, 32), portrait(6, 32), portrait_batch([5], 32, variation=1)
    assert (a.image - b.image).abs().mean() > .05 and (a.image - c.image).abs().mean() > .02
    assert all(torch.equal(a.identity[k], c.identity[k]) if torch.is_tensor(a.identity[k]) else a.identity[k] == c.identity[k] for k in a.identity)
    assert not torch.equal(a.pose.yaw, c.pose.yaw)
    assert any(not torch.equal(a.identity[k], b.identity[k]) for k in a.identity if torch.is_tensor(a.identity[k]))

def test_pose_and_look_do_not_change_the_geometry_of_a_person():
    "Light and background leave depth alone; a style changes only itself"
    pose = Pose.deg([10.])
    a = portrait(9, 48, pose)
    for c in (dict(light=4), dict(light=(1., .5)), dict(background=3)):
        b = portrait(9, 48, pose, **c)
        assert torch.equal(a.depth, b.depth) and (a.image - b.image).abs().max() > .05
    for f in ("light", "background"):
        b = portrait(9, 48, pose, **{f: 0})
        assert torch.equal(a.image, b.image)              # variation 0 is the one that was drawn
    lit = portrait(9, 48, pose, background=3)
    core = -F.max_pool2d(1 - a.mask, 3, 1, 1) + 1
    assert ((a.image - lit.image).abs() * core).max() < 1e-5  # the background does not shine on the person

def test_expression_moves_mouth_only_where_it_should():
    pose = Pose.deg([0.])
    a, b = (portrait(12, 64, pose, hair="bald", hat=None, glasses=None, expression=e) for e in ("neutral", "smile"))
    moved = (a.image - b.image).abs().amax(1)[0]
    assert moved[34:52].max() > .1 and moved[:18].max() < .02

def test_held_out_seeds():
    assert HELD_OUT == 10_000_000
    a, b = portrait_batch([HELD_OUT, HELD_OUT + 1], 32), portrait_batch([0, 1], 32)
    assert (a.image - b.image).abs().mean() > .1

def test_pose_statistics():
    seeds = torch.arange(HELD_OUT, HELD_OUT + 8000)
    p, styles, _ = draw(seeds, torch.zeros_like(seeds))
    yaw, pitch = (torch.rad2deg(p[k]) for k in ("yaw", "pitch"))
    assert abs(yaw.mean()) < 1 and abs(yaw.std() - 22) < 1 and yaw.abs().max() <= 60.01
    assert abs(pitch.mean()) < .4 and abs(pitch.std() - 8) < .4 and pitch.abs().max() <= 25.01
    for name, share in STYLES.items():
        if name == "beard": continue                       # thinned for long hair
        found = torch.bincount(styles[name], minlength=len(share)) / len(seeds)
        assert torch.allclose(found.float(), torch.tensor(list(share.values())), atol=.02), name

def test_depth_reprojects_into_another_view():
    a, b = (portrait_batch([4, 18, 25, 30], 128, Pose.deg([y], [p]), supersample=1) for y, p in ((-12., 5.), (12., -4.)))
    points = unproject(a.depth, cam2world(a.pose), intrinsics(batch=4))
    uv, far = project(points, cam2world(b.pose), intrinsics(batch=4))
    look = lambda v: F.grid_sample(v, uv[:, :, None] * 2 - 1, align_corners=False)[..., 0]
    inside = (a.mask.flatten(1) > 0) & (look(b.mask)[:, 0] == 1)
    error = (look(b.depth)[:, 0] - far)[inside]
    assert error.abs().median() < 5e-4 and (error.abs() < .004).float().mean() > .85
    assert (error > .01).float().mean() < .01              # nothing of A may hang in front of what B sees
    seen = error.abs() < .002
    colour = (look(b.image) - a.image.flatten(2)).abs().mean(1)[inside][seen]
    assert colour.median() < .015 and colour.quantile(.9) < .1  # the light is fixed to the head

def test_same_point_same_colour_exactly():
    "Without interpolation: trace one surface point from two cameras by shading it directly"
    from posefree_kit.portraits import normals, paint, scene, shade
    q = scene(*draw(torch.tensor([4]), torch.tensor([0])))
    a = portrait_batch([4], 64, Pose.deg([8.]), supersample=1)
    x, y, z = unproject(a.depth, cam2world(a.pose), intrinsics())[a.mask.flatten(1) > 0].T[:, None]
    n = normals(x, y, z, q)
    colour = shade(paint(x, y, z, n, q), n, x, y, z, q).clamp(0, 1) * 2 - 1   # knows no camera
    error = (colour[0] - a.image[0].flatten(1)[:, a.mask.flatten() > 0]).abs().amax(0)
    assert error.median() < 1e-3 and error.quantile(.98) < .03

def test_normals_agree_with_depth():
    r = portrait_batch(range(6), 128, Pose.deg([15.]), supersample=1)
    x = unproject(r.depth, cam2world(r.pose), intrinsics(batch=6)).view(6, 128, 128, 3)
    du, dv = x[:, 1:-1, 2:] - x[:, 1:-1, :-2], x[:, 2:, 1:-1] - x[:, :-2, 1:-1]
    n = F.normalize(torch.linalg.cross(dv, du), dim=-1).permute(0, 3, 1, 2)
    inner = (1 - F.max_pool2d(1 - r.mask, 5, 1, 2))[:, 0, 1:-1, 1:-1] > 0
    cosine = (n * r.normal[:, :, 1:-1, 1:-1]).sum(1)[inner]
    assert cosine.median() > .999 and (cosine > .97).float().mean() > .9

def test_marks_and_hair_are_asymmetric():
    pose = Pose.deg([0.])
    for mark in ("mole", "patch", "scar"):
        one = portrait(4, 64, pose, mark=mark, text=None, **PLAIN).image - portrait(4, 64, pose, mark=None, text=None, **PLAIN).image
        one = one.abs().sum((0, 1))
        assert one.max() > .1 and (one * one.flip(1)).sum() < .3 * (one * one).sum(), mark
    hair = portrait(3, 64, pose, hair="swept", hat=None, glasses=None, mark=None).image
    plain = portrait(3, 64, pose, hair="bald", hat=None, glasses=None, mark=None).image
    moved = ((hair - plain).abs().sum(1)[0] > .1).float()
    assert (moved - moved.flip(1)).abs().sum() > .04 * moved.sum()

def test_text_is_written():
    a, b = (portrait(4, 64, Pose.deg([0.]), text=t, **PLAIN).image for t in (None, "HAT"))
    other = portrait(4, 64, Pose.deg([0.]), text="VIZ", **PLAIN).image
    assert (a - b).abs().max() > .3 and (b - other).abs().max() > .3

def test_supersampling_only_touches_edges():
    a, b = (portrait_batch([1, 2], 64, supersample=s) for s in (1, 2))
    assert torch.equal(a.depth, b.depth) and torch.equal(a.normal, b.normal)
    assert .001 < (a.image - b.image).abs().mean() < .05

@pytest.mark.parametrize("size", [4, 17, 33, 50])
def test_odd_sizes(size):
    r = portrait_batch([1, 2], size)
    assert r.image.shape == (2, 3, size, size) and 0 < r.mask.mean() < 1

def test_resolutions_agree():
    a, b = portrait_batch(range(4), 32, Pose.deg([10.])), portrait_batch(range(4), 128, Pose.deg([10.]))
    assert (F.avg_pool2d(b.image, 4) - a.image).abs().mean() < .04
    assert (F.avg_pool2d(b.mask, 4) - a.mask).abs().mean() < .03

@pytest.mark.parametrize("bad, says", [
    (dict(glases="round"), "got 'glases'"), (dict(glasses="oval"), "among none, round, square"), (dict(hair=["short", "bald"]), "for each"), (dict(expression="bored"), "neutral"),
    (dict(light="left"), "integer"), (dict(expression=["smile"]), "neutral"), (dict(smile="much"), "smile as a number"), (dict(smile=[1., 2.]), "smile"), (dict(text="HI!"), "letters"), (dict(size=0), "4 to 4096"), (dict(size=64.), "4 to 4096"),
    (dict(seeds=[-1]), "from 0"), (dict(seeds=[1.5]), "integers"), (dict(seeds=[]), "at least one"), (dict(seeds="abc"), "integers"), (dict(variation=[1, 2]), "variation"),
    (dict(poses=Pose.deg([0., 1.])), "poses"), (dict(device="nowhere"), "device"), (dict(poses=(0., 0.)), "Pose"), (dict(poses=Pose.deg(0.), yaw=.8), "viewpoint said once"), (dict(poses=Pose.deg(float("nan"))), "finite angles"), (dict(smile=float("nan")), "smile as finite"), (dict(yaw=float("inf")), "yaw as finite"), (dict(supersample=3), "supersample")])
def test_refusals(bad, says):
    with pytest.raises(InputError) as e: portrait_batch(**(dict(seeds=[1], size=16) | bad))
    assert says in str(e.value) and "\n" not in str(e.value)

def test_files_with_truth(tmp_path):
    records = write_portraits([HELD_OUT, HELD_OUT + 5], tmp_path, 32, glasses="round")
    assert json.loads((tmp_path / "portraits.json").read_text()) == records and records[1]["changes"] == {"glasses": "round"}
    again = portrait(HELD_OUT + 5, 32, Pose.deg([records[1]["yaw_deg"]], [records[1]["pitch_deg"]]), glasses="round")
    assert (load_image(tmp_path / records[1]["file"]) - again.image).abs().max() < .02

def test_shipped_portraits_are_what_their_truth_says():
    from pathlib import Path
    data = Path(__file__).parent.parent / "data"
    records = json.loads((data / "portraits.json").read_text())
    assert len(records) >= 3 and all(r["seed"] >= HELD_OUT for r in records)
    for r in records:
        again = portrait(r["seed"], r["size"], Pose.deg([r["yaw_deg"]], [r["pitch_deg"]]), **r["changes"])
        assert (load_image(data / r["file"]) - again.image).abs().mean() < .005

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_the_same_pixels(crowd):
    r = portrait_batch(range(100, 112), 64, device="cuda")
    assert max((getattr(crowd, f) - getattr(r, f).cpu()).abs().mean().item() for f in FIELDS) < 1e-4


def test_a_distance_of_ones_own_is_refused():
    with pytest.raises(InputError, match="poses without a radius"): portrait_batch([1], 16, poses=Pose.deg(0.).at(torch.tensor([2.2])))

def test_many_are_drawn_a_few_at_a_time_and_are_the_same(tmp_path):
    many = write_portraits(range(HELD_OUT, HELD_OUT + 70), tmp_path, 16)                     # a few at a time: the same portraits
    one = portrait(HELD_OUT + 66, 16)
    assert len(many) == 70 and many[66]["yaw_deg"] == round(float(one.pose.degrees()[0, 0]), 4) and (load_image(tmp_path/f"portrait_{HELD_OUT + 66}.png") - one.image).abs().max() < .01
    write_portraits(range(70), tmp_path/"lit", 16, light=([.1] * 70, [.2] * 70))            # what differs from one to the next is drawn together

def test_numbers_of_other_libraries_are_written_as_plain_ones(tmp_path):
    changes = dict(yaw=np.array([.1, .2]), smile=np.float64(.5), glasses=np.array(["round", "none"]), light=(torch.tensor(.1), np.float32(.5)))
    records = write_portraits([HELD_OUT, HELD_OUT + 1], tmp_path, 16, **changes)
    assert json.loads((tmp_path/"portraits.json").read_text()) == json.loads(json.dumps(records)) and records[0]["changes"]["yaw"] == [.1, .2] and records[0]["changes"]["smile"] == .5
    plain = portrait_batch([HELD_OUT, HELD_OUT + 1], 16, yaw=[.1, .2], smile=.5, glasses=["round", "none"], light=(.1, .5))
    assert (load_image(tmp_path/records[0]["file"]) - plain.image[:1]).abs().max() < .01

def test_no_picture_replaces_another(tmp_path):
    with pytest.raises(InputError, match="each seed once"): write_portraits([HELD_OUT, HELD_OUT], tmp_path, 16, variation=[0, 1])
    assert not list(tmp_path.iterdir())
    records = write_portraits([HELD_OUT, HELD_OUT + 1], tmp_path, 16, yaw=torch.tensor([.1, .2]))
    assert [round(r["yaw_deg"], 2) for r in records] == [5.73, 11.46] and json.loads((tmp_path/"portraits.json").read_text()) == json.loads(json.dumps(records))
