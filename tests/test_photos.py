"Faces in photographs: found, levelled, cut out; whatever is not a face is refused in one line."
import math

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F

from posefree_kit.camera import Pose
from posefree_kit.core import InputError
from posefree_kit.photos import BEHIND, EYE_DISTANCE, EYES_TO_MOUTH, LIFT, TURNED, align_face, cut_out, eye_spread, ffhq_framing, find_faces, measured_framing, outline, plain_background, rotation, similarity
from posefree_kit.portraits import portrait_batch

MIDDLE = torch.tensor([255.5, 255.5])

@pytest.fixture(scope="module")
def astronaut(): return torch.from_numpy(skimage.data.astronaut().copy()).permute(2, 0, 1)[None] / 127.5 - 1

def test_the_astronaut_has_one_face_with_eyes_where_they_are(astronaut):
    a = align_face(astronaut, 128)
    assert a.faces_found == 1 and a.image.shape == (1, 3, 128, 128) and a.image.abs().max() <= 1.001
    assert (a.landmarks[:2] - torch.tensor([[205., 102.], [247., 104.]])).abs().max() < 4
    left, top, right, bottom = a.box
    assert abs(left - 181) < 6 and abs(top - 62) < 6 and abs(right - 268) < 6 and abs(bottom - 172) < 6

@pytest.mark.parametrize("degrees", (-25, 20))
def test_a_tilted_photograph_comes_out_level(astronaut, degrees):
    straight, tilted = align_face(astronaut, 96), align_face(cut_out(astronaut, MIDDLE, 512, math.radians(degrees), 512)[0], 96)
    assert abs(tilted.roll_deg - (straight.roll_deg - degrees)) < 3
    eye = find_faces(tilted.image)[0].landmarks
    assert abs(math.degrees(math.atan2(*(eye[1] - eye[0]).flip(0)))) < 5
    assert (tilted.image - straight.image).abs().mean() < .12

def test_the_crop_shows_the_landmarks_where_the_simulator_has_them(astronaut):
    points = (find_faces(align_face(astronaut, 256).image)[0].landmarks + .5) / 256
    target = torch.tensor([[.40, .456], [.606, .456], [.503, .567], [.419, .68], [.59, .68]])
    assert (points - target).abs().max() < .06

def test_portraits_are_framed_already():
    made = portrait_batch(range(200, 206), 96, Pose.deg([-20., -10, 0, 0, 10, 20], [0., 5, 0, -5, 0, 5]))
    for x in made.image:
        centre, side, roll = similarity((find_faces(x[None])[0].landmarks + .5) / 96)
        assert (centre - .5).abs().max() < .08 and abs(side - 1) < .12 and abs(math.degrees(roll)) < 7

def test_a_strongly_turned_face_is_told(astronaut):
    assert not align_face(astronaut, 64).warnings and eye_spread(find_faces(astronaut)[0].landmarks) > TURNED
    for yaw, told in ((0., 0), (30., 0), (60., 2)):
        faces = [align_face(x[None], 96) for x in portrait_batch(range(220, 223), 96, Pose.deg(yaw)).image if find_faces(x[None])]
        found = sum(any("strongly turned" in w for w in f.warnings) for f in faces)
        assert len(faces) >= 2 and (found >= told if told else found == 0)
    points = torch.tensor([[0., 0.], [3., 0.], [1.5, 2.], [.5, 4.], [2.5, 4.]])
    assert eye_spread(points) == pytest.approx(.75) and eye_spread(points * 7 @ rotation(.5).T) == pytest.approx(.75)

def test_small_pictures_work():
    assert len(find_faces(portrait_batch([7], 48, Pose.deg(0.)).image)) == 1

@pytest.mark.parametrize("image", (torch.zeros(1, 3, 200, 200), torch.ones(1, 3, 64, 300), torch.full((1, 3, 1, 1), .3), torch.rand(1, 3, 180, 180, generator=torch.Generator().manual_seed(0))), ids="black white pixel noise".split())
def test_a_picture_without_a_face_is_an_error_of_one_line(image):
    with pytest.raises(InputError, match="expected a picture with a face, found none") as e: align_face(image)
    assert "\n" not in str(e.value)

def test_wrong_shapes_and_words_are_errors(astronaut):
    for x in (astronaut[0], astronaut[:, :1], torch.cat([astronaut] * 2)):
        with pytest.raises(InputError, match="expected shape"): align_face(x)
    with pytest.raises(InputError, match="which among"): align_face(astronaut, which="best")
    with pytest.raises(InputError, match="keep or plain"): align_face(astronaut, background="blue")
    with pytest.raises(InputError, match="could hold a face"): find_faces(torch.zeros(1, 3, 1, 9000))

def test_of_two_faces_the_larger_is_taken_and_told(astronaut):
    small = F.interpolate(astronaut, (300, 300), mode="bilinear", antialias=True)
    pair = torch.zeros(1, 3, 512, 812)
    pair[..., :300, :300], pair[..., 300:] = small, astronaut                   # the larger stands at the right
    a = align_face(pair, 64)
    assert a.faces_found == 2 and a.box[0] > 300 and "2 faces" in a.warnings[0] and "largest" in a.warnings[0]
    assert align_face(pair, 64, which="leftmost").box[2] < 300

def test_a_crop_beyond_the_edge_is_filled_and_told(astronaut):
    a = align_face(astronaut[..., 70:200, 150:280], 64)
    assert a.image.isfinite().all() and any("outside" in w for w in a.warnings)

def test_similarity_follows_the_points():
    points = torch.tensor([[.4, .46], [.61, .46], [.5, .57], [.42, .68], [.59, .68]])
    c0, s0, r0 = similarity(points)
    turn = rotation(.4)
    c, s, r = similarity(30 * points @ turn.T + 5)
    assert torch.allclose(c, 30 * turn @ c0 + 5, atol=1e-3) and s == pytest.approx(30 * s0, rel=1e-4) and r == pytest.approx(r0 + .4, abs=1e-5)
    assert s0 == pytest.approx(max(.21 / EYE_DISTANCE, .22 / EYES_TO_MOUTH), abs=.01) and BEHIND > 0 and LIFT > 0

def test_cutting_out_does_not_alias():
    stripes = (torch.arange(256) % 2 * 2. - 1).expand(1, 3, 256, 256)
    assert cut_out(stripes, torch.tensor([127.5, 127.5]), 256, 0., 32)[0].abs().max() < 1e-4

@pytest.mark.parametrize("ratio", [15, 40])
def test_cutting_a_small_picture_out_of_a_huge_one_does_not_alias(ratio):
    stripes = (torch.arange(640) % 2 * 2. - 1).expand(1, 3, 640, 640)
    assert cut_out(stripes, torch.tensor([319.5, 319.5]), 600., 0., 600 // ratio)[0].abs().max() < .02

def test_plain_background_goes_along_with_another_frame():
    from posefree_kit import photos
    people = portrait_batch([3, 4], 128, Pose.deg(0.))
    def near(points): c, s, r = similarity(points); return c + torch.tensor([.1, -.05]) * s, s * .75, r + .1
    for x, mask in zip(people.image.split(1), people.mask.split(1)):
        keep, plain = (align_face(x, 96, framing=near, background=b).image for b in ("keep", "plain"))
        person = cut_out(mask.float().expand(-1, 3, -1, -1), *near(find_faces(x)[0].landmarks), 96)[0][:, :1] > .5
        changed = (keep - plain).abs().amax(1, keepdim=True) > 1e-3
        assert (changed & person).sum() < .1 * person.sum() and (changed & ~person).sum() > .2 * (~person).sum(), (changed & person).sum() / person.sum()
    at = photos._in_our_framing(find_faces(x)[0].landmarks, *similarity(find_faces(x)[0].landmarks), 32)
    assert torch.allclose(outline(32, at), outline(32), atol=1e-3)                  # ours in ours is ours

def test_plain_background_keeps_the_face():
    x = portrait_batch([3], 64, Pose.deg(0.)).image
    y = plain_background(x)
    assert torch.equal(y[..., 20:44, 24:40], x[..., 20:44, 24:40]) and (y[..., :4, :4] - y[..., :1, :1]).abs().max() < 1e-6
    assert 0 <= outline(32).min() and outline(32).max() <= 1

def test_ffhq_framing_is_the_printed_recipe():
    "Karras et al. 2018, Appendix C, in its own letters"
    for seed in range(5):
        e0, e1, nose, m0, m1 = p = np.random.default_rng(seed).normal(size=(5, 2)) * 8 + np.array([[0, 0], [40, 0], [20, 20], [5, 45], [35, 45]])
        x, y = e1 - e0, (e0 + e1) / 2 - (m0 + m1) / 2
        axis = x - np.array([y[1], -y[0]])                                       # Rotate90
        centre, side, roll = ffhq_framing(torch.tensor(p, dtype=torch.float32))
        assert np.allclose(centre, (e0 + e1) / 2 - .1 * y, atol=1e-4) and side == pytest.approx(max(4 * np.hypot(*x), 3.6 * np.hypot(*y)), rel=1e-5)
        assert roll == pytest.approx(math.atan2(axis[1], axis[0]), abs=1e-5)

def test_another_frame_cuts_as_it_says(astronaut):
    a = align_face(astronaut, 160, framing=ffhq_framing)
    assert not torch.allclose(a.corners, align_face(astronaut, 160).corners, atol=5)
    centre, side, roll = ffhq_framing((find_faces(a.image)[0].landmarks + .5) / 160)  # the crop, framed again, is itself
    assert abs(side - 1) < .06 and (centre - .5).abs().max() < .04 and abs(math.degrees(roll)) < 3

def test_a_frame_is_measured_from_pictures():
    pictures = portrait_batch(torch.arange(6), 128, Pose.deg(0.)).image
    for base in (ffhq_framing, similarity):
        framing, shift, factor, count = measured_framing(pictures, base)
        cuts = [framing((find_faces(x[None])[0].landmarks + .5) / 128) for x in pictures]
        assert count == 6 and abs(np.mean([s for _, s, _ in cuts]) - 1) < .04 and (torch.stack([c for c, *_ in cuts]).mean(0) - .5).abs().max() < .03
        if base is similarity: assert abs(factor - 1) < .08 and shift.abs().max() < .05  # our own recipe needs little
        else: assert abs(factor - 1) > .08                                       # FFHQ's is another frame
    with pytest.raises(InputError, match="4 at least, got 0"): measured_framing(torch.rand(4, 3, 64, 64) * .1)


@pytest.mark.parametrize("size", ((100, 100), (100, 200), (200, 100)))
def test_what_lies_beyond_the_edge_is_softened_by_its_distance_whatever_the_format(size):
    "Half of the crop hangs over the right rim, or the lower one: the same picture, turned"
    h, w = size
    image = torch.rand(1, 1, 100, 100, generator=torch.Generator().manual_seed(0)).expand(1, 3, 100, 100) * 2 - 1
    whole = torch.zeros(1, 3, h, w); whole[..., -100:, -100:] = image
    right, lower = (cut_out(x, torch.tensor(c), 64., 0., 32)[0] for x, c in ((whole, [w - .5, h - 50.5]), (whole[..., -100:, -100:].transpose(-1, -2), [49.5, 99.5])))
    assert torch.allclose(right, lower.transpose(-1, -2), atol=1e-5)


def test_a_strip_that_holds_no_face_is_refused():
    with pytest.raises(InputError, match="could hold a face"): find_faces(torch.zeros(1, 3, 200, 16000))


def test_the_second_look_keeps_to_the_face_that_was_chosen(monkeypatch):
    from posefree_kit import photos
    five = torch.tensor([[-20., -20], [20, -20], [0, 0], [-15, 25], [15, 25]])
    face = lambda at, k: photos.Face((0., 0., 1., 1.), five * k + torch.tensor(at), .99)
    tilted = five @ photos.rotation(math.radians(15)).T + 100                        # one that leans by 15 degrees, in a picture with a larger neighbour
    look = lambda *found: (monkeypatch.setattr(photos, "find_faces", lambda *a, **k: list(found)), photos._look_again(torch.zeros(1, 3, 200, 200), tilted, "cpu"))[1]
    alone = look(face((127.5, 127.5), 1.))
    assert torch.equal(look(face((230., 120.), 2.), face((127.5, 127.5), 1.)), alone) and not torch.equal(alone, tilted)
    assert torch.equal(look(face((230., 120.), 2.)), tilted) and torch.equal(look(), tilted)   # not there again: as it was first found
