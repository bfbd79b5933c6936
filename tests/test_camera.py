"Poses, positions and frames. (What holds for any pose: test_invariants.py.)"
import json
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from conftest import reference
from posefree_kit.camera import FOCAL, Pose, align_pose, cam2world, camera_position, fit_frame, intrinsics, pose_of_position, rays, turn
from posefree_kit.core import InputError

angle = st.floats(-1.25, 1.25)


@settings(deadline=None)
@given(angle, angle)
def test_position_and_pose_are_inverse(yaw, pitch):
    pose = Pose(torch.tensor([yaw]), torch.tensor([pitch]))
    assert torch.allclose(pose_of_position(camera_position(pose)).stack(), pose.stack(), atol=1e-4)
    assert torch.allclose(camera_position(pose).norm(dim=-1), torch.tensor(2.7), atol=1e-4)


def test_the_middle_ray_meets_the_origin():
    for y in (-60., 0., 45.):
        m = cam2world(Pose.deg(y, 15.))
        o, d = rays(m, intrinsics(), 1)
        closest = o + d * -(o * d).sum(-1, keepdim=True)
        assert closest.norm() < 1e-5


def test_focal_is_eg3ds(): assert abs(FOCAL - 1 / (math.tan(math.radians(18.837) / 2) * 1.414)) < 1e-3


def test_reference_cameras_agree():
    "The official cam2world at known angles, if the reference is there"
    ref = reference("ffhq128")
    io, cfg = load_file(ref / "io.safetensors"), json.loads((ref / "config.json").read_text())
    m = io["out.c2w"]
    pivot = tuple(cfg["constructor"]["rendering_kwargs"]["avg_camera_pivot"])
    pose = pose_of_position(m[:, :3, 3])
    assert torch.allclose(cam2world(pose, float(m[0, :3, 3].norm()), pivot), m, atol=2e-5)


def test_align_undoes_any_rotation():
    g = torch.Generator().manual_seed(0)
    true = Pose.of(torch.randn(30, 2, generator=g) * .4)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=g)); q = q * torch.det(q).sign()
    moved = camera_position(true, 1.) @ q.T
    frame = fit_frame(pose_of_position(moved), true)
    assert torch.allclose(align_pose(pose_of_position(moved), frame).stack(), true.stack(), atol=1e-4)


def test_a_frame_of_no_numbers_is_refused():
    with pytest.raises(InputError, match="finite"): fit_frame(Pose.deg([0., math.nan]), Pose.deg([0., 1.]))


def test_turn_adds(): assert torch.allclose(turn(Pose.deg(10.), math.radians(5), math.radians(-2)).degrees(), torch.tensor([[15., -2.]]), atol=1e-4)


def test_a_pose_with_a_distance_of_its_own_keeps_it():
    pose = Pose(*torch.deg2rad(torch.tensor([[20., -30], [5., 9]])), torch.tensor([5., 2]))
    assert torch.allclose(camera_position(pose).norm(dim=-1), pose.radius) and torch.allclose(cam2world(pose)[:, :3, 3], camera_position(pose))
    frame = fit_frame(pose, Pose(pose.yaw, pose.pitch))
    assert torch.allclose(frame, torch.eye(3), atol=1e-5) and torch.equal(align_pose(pose, frame).radius, pose.radius) # directions alone are fitted
