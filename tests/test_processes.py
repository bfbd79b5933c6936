"Training on several processes is training on one: two real processes on the CPU, started by `accelerate launch`."
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from posefree_kit.core import InputError, Part, batch_rand, rng
from posefree_kit.training import STATE, Processes, fit, load_state
import processes
from tree import ROOT

pytest.importorskip("accelerate")

def launch(*what): # in two processes
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = str(s.getsockname()[1])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, *map(str, what)],
                          capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=paths))

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    p = launch(ROOT/"tests"/"processes.py", folder)
    assert p.returncode == 0, p.stderr[-3000:]
    return folder, [json.loads((folder/f"process{i}.json").read_text()) for i in (0, 1)]


def test_two_processes_learn_as_one_does(two):
    "32 images a step, or twice 16: each loss of the first 20 steps, to 1e-3; of those that stay small, to 1e-3 of their largest"
    told, alone = [t["curve"] for t in two[1]], processes.curve()
    assert [t["count"] for t in two[1]] == [2, 2] and told[0] == told[1] and {"r1", "density", "symmetry"} <= set(alone[0])
    unit = {k: min(1., max(abs(a.get(k, 0.)) for a in alone)) for step in alone for k in step}
    worst = max(abs(a[k] - b[k]) / max(unit[k], abs(a[k])) for a, b in zip(alone, told[0], strict=True) for k in a)
    assert worst < 1e-3, worst


def test_one_bad_process_takes_all_a_step_back(two):
    assert all("is nan at step 2" in t["sick"]["trouble"] and t["sick"]["seen"] == 128 for t in two[1])
    assert two[1][0]["sick"]["rate"] == two[1][1]["sick"]["rate"] == pytest.approx(processes.CONFIG.g_rate * processes.CONFIG.density_every / (processes.CONFIG.density_every + 1) / 2)


def test_all_stop_together_and_one_goes_on(two, tmp_path):
    "A run that two processes began and one finished is the run of one"
    folder, told = two
    assert all(t["stopped"].startswith("3 steps: stopped at 0.096 kimg") for t in told)
    assert load_state(folder/"stopped"/STATE).seen == 96
    run = lambda where: fit(processes.images(0), where, processes.G16, processes.D16, processes.CONFIG, kimg=.256, device="cpu", progress=False)
    a, b = run(folder/"stopped"), run(tmp_path)
    assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(a.ema.state_dict().values(), b.ema.state_dict().values()))
    assert torch.allclose(a.D.pose_gain, b.D.pose_gain, atol=1e-4) and torch.allclose(a.G.w_avg, b.G.w_avg, atol=1e-5)


def test_the_command_in_two_processes(tmp_path):
    p = launch("-m", "posefree_kit.cli", "train", "--out", tmp_path/"run", "--kimg", ".032", "--portraits", "20", "--size", "16", "--batch", "16", "--device", "cpu", "--no-progress")
    assert p.returncode == 0, p.stderr[-3000:]
    assert p.stdout.count("0.0 kimg") == 1 and len((tmp_path/"run/log.jsonl").read_text().splitlines()) == 1
    assert (tmp_path/"run/generator.safetensors").exists() and load_state(tmp_path/"run"/STATE).seen == 32


def test_uneven_splits_are_refused(two):
    assert all(t["uneven"].endswith("as a multiple of 16, for 2 processes and groups of 8 images; got 8") for t in two[1]) and not (two[0]/"uneven").exists()
    for batch, count in ((8, 2), (12, 2), (32, 8)):
        with pytest.raises(InputError, match="as a multiple of"): Processes(0, count).rows(batch, 8)
    for batch, count in ((16, 2), (48, 3), (32, 4)): # every image once, whole groups
        rows = [Processes(r, count).rows(batch, 8) for r in range(count)]
        assert sorted(torch.cat(rows).tolist()) == list(range(batch)) and len({len(r) for r in rows}) == 1


def test_rows_of_a_batch_have_its_numbers():
    rows = torch.tensor([1, 4, 5])
    for shape, dim in (((3, 2), 0), ((2, 3), 1)):
        whole = batch_rand((*shape[:dim], 6, *shape[dim + 1:]), rng(0), dim)
        assert torch.equal(batch_rand(shape, Part(rng(0), 6, rows), dim), whole.index_select(dim, rows))


def test_without_accelerate_several_processes_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2"); monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match="expected the package accelerate"): Processes.launched()
