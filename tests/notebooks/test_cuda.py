"CPU and CUDA agree on one seed, bf16 comes near to float32, memory stays under its bound, and the same run twice is the same. Where there is no GPU, each function runs on the CPU once, shorter, and must give finite numbers."
import pytest
import torch

import devices
from devices import BF16, MEMORY_MB, TOLERANCES, off

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch sees none")
pair, one = pytest.mark.parametrize("b", ["cuda" if torch.cuda.is_available() else "cpu"]), pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

def both(f, b, *args): # what f gives on the CPU and on b, which is another device, or the CPU and then the same
    x = f("cpu", *args)
    return x, f(b, *args) if b != "cpu" else x

@pytest.fixture(autouse=True)
def float32_is_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

@pair
def test_pictures_and_losses_agree(b):
    x, y = both(devices.rendered, b)
    for k in ("rgb", "weight"): assert (x[k] - y[k]).abs().max() <= TOLERANCES[k], k
    assert ((x["depth"] - y["depth"]).abs() * x["weight"]).max() <= TOLERANCES["depth"] # a ray that meets next to nothing has its depth from rounding
    x, y = both(devices.losses, b)
    for k in x: assert torch.allclose(x[k], y[k], rtol=TOLERANCES["losses"], atol=1e-4), k

@pair
def test_gradients_agree(b):
    for x, y in zip(*both(devices.step, b)): assert off(y, x) <= TOLERANCES["gradients"]

@pair
def test_short_inversions_and_trainings_agree(b):
    x, y = both(devices.inversion, b, 50 if b == "cuda" else 3)
    assert abs(x["psnr_db"] - y["psnr_db"]) <= TOLERANCES["psnr_db"] and abs(x["yaw_deg"] - y["yaw_deg"]) <= TOLERANCES["yaw_deg"] and y["device"].startswith(b)
    x, y = both(devices.trained, b, 1)
    for k in x: assert abs(x[k] - y[k]) <= TOLERANCES["train"] * (1 + abs(x[k])), k

@one
def test_bf16_comes_near(device):
    assert devices.pictures_in_half(device) >= BF16["psnr_db"]

@one
def test_memory_stays_under_its_bound(device):
    mb = devices.peak_mb(device)
    assert mb is None and device == "cpu" or 1 < mb < MEMORY_MB

@one
def test_the_same_twice(device):
    steps = 20 if device == "cuda" else 2
    x, y = devices.inversion(device, steps), devices.inversion(device, steps)
    if device == "cpu": assert torch.equal(x["ws"], y["ws"])
    else: assert abs(x["psnr_db"] - y["psnr_db"]) < .2 and off(y["ws"], x["ws"]) < .05 # sums by atomic additions come in any order; the CPU is the same to the bit

def test_the_comparisons_can_fail():
    "Another seed is another picture, and other losses"
    a, b = devices.rendered("cpu"), devices.rendered("cpu", seed=6)
    assert (a["rgb"] - b["rgb"]).abs().max() > 10 * TOLERANCES["rgb"] and off(b["depth"], a["depth"]) > TOLERANCES["depth"]
    x, y = devices.losses("cpu"), devices.losses("cpu", seed=6)
    assert not torch.allclose(x["rec"], y["rec"], rtol=TOLERANCES["losses"], atol=1e-4)
