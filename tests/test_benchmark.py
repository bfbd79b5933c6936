"The speed report: parts in turns, ratios to plain torch, shares of the measured floor; at tiny size."
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from posefree_kit.benchmark import Clock, Memory, Part, floor, generator_parts, measure, save_speed, speed, speed_markdown, step_parts, ways
from posefree_kit.checkpoints import save_checkpoint
from posefree_kit.core import InputError
from posefree_kit.evaluation import SETS, set_seeds
from posefree_kit.generator import GeneratorConfig
from posefree_kit.optimiser import paper, quick
from posefree_kit.pose import PoseFreeGenerator

sys.path.insert(0, str(Path(__file__).parent/"benchmarks"))
import sweep


def small(**changes):
    torch.manual_seed(0)
    return PoseFreeGenerator(GeneratorConfig(**dict(channels=(16, 16, 8), render_resolution=16, samples=8) | changes)).start()


@pytest.fixture(scope="module")
def told(): return speed(small(), rounds=1, size=16, batch=2, matrices=128)


def test_a_report_has_every_part_and_is_written_whole(told, tmp_path):
    assert [x["part"] for x in told["parts"]] == ["simulator", "inversion step", "training step", "planes", "volume render"] and told["inversions"] == []
    assert all(x["seconds"] > 0 and (x["gflop"] is None or x["gflop"] > 0) for x in told["parts"]) and min(told["floor"].values()) > 0
    step = told["parts"][1]
    assert step["ratio"] > 0 and math.isclose(step["floor_share"], step["gflop"] / told["floor"]["gflop_per_second"] / step["seconds"])
    paths = save_speed(told, tmp_path/"here.json")
    assert [p.name for p in paths] == ["here.json", "here.md"] and json.loads(paths[0].read_text()) == json.loads(json.dumps(told))
    assert paths[1].read_text() == speed_markdown(told) and speed_markdown(told).count("\n| ") >= 6 and "1 thread" in speed_markdown(told)


def test_the_two_ways_of_a_part_are_one_function():
    for p in generator_parts(small(superresolution="2x", superres_clamp=None)):
        for a, b in zip(p.fast(), p.plain()): assert torch.allclose(a, b, atol=3e-3 * float(b.abs().max())), p.name
    assert [p.name for p in generator_parts(small(superresolution="2x"))] == ["planes", "volume render", "super-resolution"]


def test_rounds_are_taken_in_turns_and_the_first_call_does_not_count():
    calls = []
    parts = [Part("a", "x", lambda: calls.append("a"), lambda: calls.append("A")), Part("b", "x", lambda: calls.append("b"))]
    rows = measure(parts, lambda f: (f(), {"a": 2., "A": 6., "b": 1.}[calls[-1]])[1], 2)
    assert calls[:3] == ["a", "A", "b"] and calls[3:9] == ["a", "A", "b"] * 2 # and then once more, to count operations
    assert rows[0]["seconds"] == 2 and rows[0]["ratio"] == 3 and rows[1]["plain_seconds"] is None and rows[1]["gflop"] is None
    with pytest.raises(InputError, match="at least 1 round"): measure(parts, Clock("cpu"), 0)


def test_the_training_step_that_is_counted_is_the_one_that_is_timed(monkeypatch):
    from posefree_kit import benchmark
    seen, real = [], benchmark.train_step
    monkeypatch.setattr(benchmark, "train_step", lambda s, data: (seen.append(s.step), real(s, data)))
    part = step_parts(small(), 16, 2)[-1]
    for _ in range(3): part.fast()
    assert seen == [1, 1, 1]                                                        # R1 (step 0) and smoothness (every fourth) in none of them


def test_presets_are_known_before_anything_is_measured():
    with pytest.raises(InputError, match="expected a preset among quick, paper, got 'slow'"): speed(None, presets=("quick", "slow"))


def test_the_clock_the_memory_and_the_floor():
    clock = Clock("cpu")
    assert clock(lambda: None) < .05 and floor(clock, "cpu", 64)["gflop_per_second"] > 0
    with Memory("cpu") as m: held = torch.ones(16, 2 ** 20)
    assert len(held) == 16 and (m.mb is None or 50 < m.mb < 90)


def test_a_generator_that_cannot_be_compiled_is_measured_and_said():
    G = small(march="eg3d", plane_axes="eg3d")
    assert not ways(G)[0].compiled and all(p.fast() for p in generator_parts(G))


def test_the_command(tmp_path):
    from typer.testing import CliRunner
    from posefree_kit.cli import app
    path = save_checkpoint(tmp_path/"small", small())
    args = ["benchmark", "--out", str(tmp_path/"speed"), "--generator", str(path), "--rounds", "1", "--size", "16", "--batch", "2", "--device", "cpu"]
    first = CliRunner().invoke(app, args)
    assert first.exit_code == 0 and "| volume render |" in first.output and (tmp_path/"speed.md").exists()
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 2 and "--overwrite" in again.output
    bad = CliRunner().invoke(app, [*args, "--overwrite", "--size", "17"])
    assert bad.exit_code == 2 and "16 or 32" in bad.output
    for option in ("--batch", "--rounds"):
        bad = CliRunner().invoke(app, [*args, "--overwrite", option, "0"])
        assert bad.exit_code == 2 and bad.output.splitlines() == [f"error: expected {option} of at least 1, got 0"]   # before anything is measured


def test_the_presets_are_what_the_sweep_found_and_every_setting_changes_something():
    configs = {k: change(sweep.stages(.02, .03)(quick())) for k, change in sweep.SETTINGS.items()}
    assert configs["fastest_at_once"] == quick() and configs["paper"] == paper()
    for k, c in configs.items(): assert k == "base" or c != configs["base"], k
    assert len({str(dataclasses.asdict(c)) for c in configs.values()}) == len(configs)


def test_the_sweep_asks_people_of_no_benchmark_set_half_of_them_from_the_side():
    people = sweep.people(8)
    assert len(set(people)) == 8 and not set(people) & {s for name in SETS for s in set_seeds(name)}
    yaw = torch.rad2deg(sweep.draw(torch.tensor(people), torch.zeros(8, dtype=torch.long))[0]["yaw"]).abs()
    assert all(30 <= y <= 60 for y in yaw[:4]) and all(y < 20 for y in yaw[4:])


def test_a_report_of_the_sweep_pairs_every_setting_with_the_base():
    row = lambda setting, image, gain: dict(set="s", setting=setting, image=image, seconds=2., config="c", method="latent", ablation="full", generator="g", sha256="h", preset="quick", steps=1) | {k: image + gain for k in sweep.FIGURES}
    told = sweep.report([row(k, i, gain) for k, gain in (("base", 0.), ("no_mv", .5)) for i in range(4)])
    assert list(told) == ["s"] and list(told["s"]) == ["base", "no_mv"] and told["s"]["no_mv"]["n"] == 4 and told["s"]["no_mv"]["seconds"] == 2.
    assert told["s"]["no_mv"]["psnr"][0] == 2. and told["s"]["no_mv"]["minus_base"]["psnr"] == [.5, .5, .5] and told["s"]["base"]["minus_base"]["psnr"] == [0., 0., 0.]
