"Many images: rows, whole files, resuming, workers that die, a node that is lost, batches that equal single runs."
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent/"fuzz"))

from small import generator, picture
from typer.testing import CliRunner

from posefree_kit import cli, optimiser
from posefree_kit.baselines import METHODS, fresh_encoder, save_latent_encoder
from posefree_kit.checkpoints import load_generator
from posefree_kit.core import DivergedError, InputError, load_image, save_image, sha256
from posefree_kit.evaluation import Busy
from posefree_kit.optimiser import Stage, invert, quick
from posefree_kit.scale import Batch, Halt, Item, Job, Lost, RayCrew, Worker, listing, one_of, opened, part, read_results, scale, share
from posefree_kit.viewer import load_latent, write_results

pa, pq = pytest.importorskip("pyarrow", reason="pyarrow is not installed"), pytest.importorskip("pyarrow.parquet")

SHORT = quick(candidates=8, starts=2, start_steps=1, stages=(Stage(1, 2, .02, False), Stage(2, 1, .01, True)))

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A small untrained generator, five pictures and a text that calls itself one"
    folder = tmp_path_factory.mktemp("scale")
    (folder/"in").mkdir()
    generator(folder/"generator")
    for i in range(5): picture(i, 32).save(folder/"in"/f"{i}.png")
    (folder/"in"/"3-bad.png").write_text("no picture")
    return folder

def job(home, out, **changes) -> Job:
    return Job(str(out), **{**dict(generator=str(home/"generator.safetensors"), config=SHORT, batch=2, device="cpu", cores=1), **changes})

def run(home, out, source=None, say=lambda text: None, **changes): # a local run without a bar
    kwargs = {k: changes.pop(k) for k in ("resume", "callback") if k in changes}
    return scale(source or home/"in", job(home, out, **changes), local=True, progress=False, say=say, **kwargs)

def tight(rows): return [{k: v for k, v in r.items() if k != "seconds"} for r in rows] # without what differs from run to run

@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    "An unbroken run, with files"
    out = tmp_path_factory.mktemp("whole")/"out"
    summary = run(home, out, write=write_light)
    return types.SimpleNamespace(out=out, summary=summary, rows=read_results(out))

def write_light(*args, **kwargs): return write_results(*args, solid=False, film=False, **kwargs)

# Batches

def test_a_batch_gives_what_single_runs_give(home):
    "Latents, poses and pictures, image by image"
    G = load_generator(home/"generator.safetensors", "cpu")
    images = torch.cat([load_image(p) for p in sorted((Path(__file__).parents[1]/"data").glob("portrait_*.png"))[:3]])
    config = quick(candidates=8, starts=2, start_steps=2, stages=(Stage(2, 2, .02, False), Stage(2, 1, .01, True))) # few steps: what rounding does grows from one to the next
    many = invert(images, G, config)
    for i in range(3):
        alone, cut = invert(images[i:i + 1], G, config), one_of(many, i, 0.)
        for a, b in ((alone.w, cut.w), (alone.deltas, cut.deltas), (alone.ws, cut.ws), (alone.pose.stack(), cut.pose.stack()), *zip(alone.view, cut.view)):
            assert a.shape == b.shape and float((a - b).abs().max()) < 2e-3 # rounding, which Adam makes larger where a gradient is next to zero; a step is ten times that
        assert alone.report["pose"][0] == pytest.approx(cut.report["pose"][0], abs=1e-2) and alone.report.keys() == cut.report.keys()
        for a, b in zip(alone.report["stages"], cut.report["stages"], strict=True): assert a["losses"] == pytest.approx(b["losses"], abs=1e-3)
    assert (many.w[0] - many.w[1]).abs().max() > 1e-2 # the images do differ

def test_trouble_of_one_image_is_not_that_of_its_batch(home, tmp_path, monkeypatch):
    "Where a batch diverges its images go one by one; the one that diverges alone is a row with an error"
    G = load_generator(home/"generator.safetensors", "cpu")
    bad = load_image(home/"in"/"1.png", G.resolution)
    def touchy(image, *args, **kwargs):
        if any(torch.allclose(x, bad[0], atol=1e-5) for x in image): raise DivergedError("rec is not finite at step 2 of 3", None)
        return invert(image, *args, **kwargs)
    monkeypatch.setitem(METHODS, "latent", touchy)
    said = []
    run(home, tmp_path/"o", say=said.append)
    rows = read_results(tmp_path/"o")
    assert [r["error"] is None for r in rows] == [True, False, True, False, True, True] and "rec is not finite" in rows[1]["error"]
    assert sum("one by one" in text for text in said) == 1

# Rows and files

def test_every_image_has_a_row_and_its_files(home, whole):
    assert (whole.summary.images, whole.summary.failed, whole.summary.new, whole.summary.exit_code) == (6, 1, 6, 2)
    assert [r["image"] for r in whole.rows] == ["0.png", "1.png", "2.png", "3-bad.png", "3.png", "4.png"] and [r["index"] for r in whole.rows] == list(range(6))
    bad = [r for r in whole.rows if r["error"]]
    assert len(bad) == 1 and bad[0]["image"] == "3-bad.png" and "readable image" in bad[0]["error"] and bad[0]["w"] is None and bad[0]["psnr"] is None
    assert {p.name for p in whole.out.iterdir()} == {"rows.parquet", "run.json", "0", "1", "2", "3", "4"}
    G = load_generator(home/"generator.safetensors", "cpu")
    for r in whole.rows:
        if r["error"]: continue
        folder = whole.out/r["folder"]
        assert {p.name for p in folder.iterdir()} == {"reconstruction.png", "comparison.png", "depth.png", "latent.safetensors", "report.json"}
        report, (t, _) = json.loads((folder/"report.json").read_text()), load_latent(folder/"latent.safetensors")
        w, deltas = torch.tensor(r["w"])[None], torch.tensor(r["deltas"])[None]
        assert torch.equal(w, t["w"]) and torch.equal(deltas, t["deltas"]) and report["image"] == r["image"]
        assert report["pose"]["yaw_deg"] == pytest.approx(r["yaw_deg"], abs=1e-3) and report["metrics"]["psnr"] == pytest.approx(r["psnr"], abs=1e-3)
        assert (G.view(w[:, None] + deltas, G.pose(w)).rgb.clamp(-1, 1) - load_image(folder/"reconstruction.png")).abs().max() < .01

def test_a_stopped_run_goes_on_and_ends_the_same(home, whole, tmp_path):
    def stop(rows): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="2 of 6 images are done.*--resume"): run(home, tmp_path/"o", write=write_light, callback=stop)
    with pytest.raises(InputError, match="--resume"): run(home, tmp_path/"o", write=write_light)
    assert len(read_results(tmp_path/"o")) == 2
    part(tmp_path/"o", 1).write_bytes(b"PAR1 cut")                              # what is damaged is made again
    summary = run(home, tmp_path/"o", write=write_light, resume=True)
    assert summary.new == 4 and tight(read_results(tmp_path/"o")) == tight(whole.rows)
    for name in ("0", "4"): assert sha256(tmp_path/"o"/name/"latent.safetensors") == sha256(whole.out/name/"latent.safetensors")
    before = (tmp_path/"o"/"rows.parquet").stat().st_mtime_ns
    assert run(home, tmp_path/"o", write=write_light, resume=True).new == 0 and (tmp_path/"o"/"rows.parquet").stat().st_mtime_ns == before

def test_an_exchanged_picture_is_another_input(home, tmp_path):
    shutil.copytree(home/"in", tmp_path/"in")
    before = listing(tmp_path/"in", tmp_path/"o").digest
    assert listing(tmp_path/"in", tmp_path/"o").digest == before == listing(home/"in", tmp_path/"o").digest
    save_image(torch.zeros(1, 3, 16, 16), tmp_path/"in"/"3.png")
    assert listing(tmp_path/"in", tmp_path/"o").digest != before
    (tmp_path/"list.txt").write_text("in/1.png\nnowhere.png"); there = listing(tmp_path/"list.txt", tmp_path/"o").digest
    (tmp_path/"in"/"1.png").unlink(); assert listing(tmp_path/"list.txt", tmp_path/"o").digest != there

def test_a_run_is_gone_on_with_by_one_process_and_with_its_own_settings(home, whole):
    with pytest.raises(InputError, match="another batch: give another --out"): run(home, whole.out, write=write_light, resume=True, batch=3)
    with pytest.raises(InputError, match="another config"): run(home, whole.out, write=write_light, resume=True, config=quick(candidates=8, starts=1, start_steps=1))
    told = json.loads((whole.out/"run.json").read_text())
    with pytest.raises(InputError, match="another batch"):                          # also what this call does not say
        with opened(whole.out, {k: v for k, v in told.items() if k != "batch"}, True): pass
    with opened(whole.out, told, True), pytest.raises(Busy, match="another process"):
        with opened(whole.out, told, True): pass

def test_a_call_that_failed_before_it_had_anything_binds_nobody(home, tmp_path):
    for resume in (False, True):
        with pytest.raises(InputError, match="0 of 6 images are done"): run(home, tmp_path/"o", generator=str(home/"generator.safetensors"), config=quick(perceptual="lpips-vgg"), resume=resume)
    assert run(home, tmp_path/"o").images == 6
    with pytest.raises(InputError, match="got run.json: --resume"): run(home, tmp_path/"o")
    with pytest.raises(InputError, match="at least 1 worker, got 0"): scale(home/"in", job(home, tmp_path/"p"), workers=0)

def test_no_room_for_an_images_bytes_is_no_images_fault(home, tmp_path, monkeypatch):
    pq.write_table(pa.table(dict(image=[(home/"in"/"0.png").read_bytes()])), tmp_path/"t.parquet")
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr("posefree_kit.scale.tempfile.NamedTemporaryFile", full)
    with pytest.raises(Halt, match="could not keep image-00000000 for reading: No space left"): Worker(job(home, "o")).batch(listing(tmp_path/"t.parquet", tmp_path/"o").items(0, 1))

def test_trouble_while_files_are_drawn_is_that_images(home, tmp_path):
    def write(name, *_, **__): raise torch.OutOfMemoryError("none left") if name == "1.png" else None or InputError("x") if name == "2.png" else ZeroDivisionError("flat")
    run(home, tmp_path/"o", write=write)
    assert [r["error"].split(":")[-1].strip() for r in read_results(tmp_path/"o")][:3] == ["flat", "none left", "x"]

def test_warnings_of_an_alignment_are_notes_where_no_report_has_them(home):
    worker = Worker(job(home, "o", read=lambda path: (load_image(path), dict(warnings=["2 faces found"])), write=None)); worker.load()
    assert worker.batch(listing(home/"in", "o").items(0, 1))[1] == ["0.png: 2 faces found"]

def test_ray_is_this_runs_own_unless_an_address_is_given(home, monkeypatch):
    asked = []
    def init(address, **_): asked.append(address); raise ConnectionError(f"no Ray\nat {address}")
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(InputError, match="expected a running Ray cluster at 'nowhere:1', got: no Ray at nowhere:1"): RayCrew(job(home, "o"), "nowhere:1")
    with pytest.raises(ConnectionError): RayCrew(job(home, "o"))
    with pytest.raises(InputError, match="expected the device auto, cpu or cuda .* got 'cuda:1'"): RayCrew(job(home, "o", device="cuda:1"), "nowhere:1")
    assert asked == ["nowhere:1", "local"]

def test_a_full_disk_stops_the_run_and_a_bad_folder_does_not(home, tmp_path):
    def full(*_, **__):
        try: raise OSError(28, "No space left on device")
        except OSError as e: raise InputError("could not write") from e
    with pytest.raises(InputError, match="could not write; 0 of 6 images are done and kept, --resume"): run(home, tmp_path/"full", write=full)
    (tmp_path/"o").mkdir(); (tmp_path/"else").mkdir(); (tmp_path/"o"/"0").symlink_to(tmp_path/"else")
    run(home, tmp_path/"o", write=write_light)
    pq.write_table(pa.table(dict(image=[(home/"in"/"0.png").read_bytes()] * 2, name=["a\0b.png", "c.png"])), tmp_path/"nul.parquet")
    run(home, tmp_path/"nul", tmp_path/"nul.parquet", write=lambda *_, **__: None)
    bad, good = read_results(tmp_path/"nul")
    assert "a name that a folder can have, got 'a\\x00b.png'" in bad["error"] and good["error"] is None
    rows = read_results(tmp_path/"o")
    assert "inside" in rows[0]["error"] and rows[1]["error"] is None and not list((tmp_path/"else").iterdir())

def test_a_device_that_is_gone_is_no_images_fault(home):
    worker = Worker(job(home, "o")); worker.load()
    worker.generator = types.SimpleNamespace(w_avg=types.SimpleNamespace(device="cuda:99"))
    with pytest.raises(Halt, match="to go on working, got: CUDA error"): worker.check_device(RuntimeError("CUDA error: an illegal memory access"))

# What can be input

def test_inputs(home, tmp_path):
    folder, data = home/"in", [(home/"in"/f"{i}.png").read_bytes() for i in range(2)]
    assert listing(folder, tmp_path).names == ["0.png", "1.png", "2.png", "3-bad.png", "3.png", "4.png"]
    (tmp_path/"list.txt").write_text(f"a/x.png\nb/x.png\n\n{folder}/0.png\n../parts.png\n")
    seen = listing(tmp_path/"list.txt", tmp_path)
    assert [i.folder for i in seen.items(0, 9)] == ["x", "x-1", "0", "parts-3"] and seen.sources[0] == str(tmp_path/"a/x.png") and seen.sources[2] == f"{folder}/0.png"
    for name, columns in dict(image=dict(image=data, name=["p", "q"]), path=dict(path=["0.png", None]), both=dict(image=[dict(bytes=b, path=None) for b in data])).items():
        pq.write_table(pa.table(columns), tmp_path/f"{name}.parquet", row_group_size=1)
        items = listing(tmp_path/f"{name}.parquet", tmp_path).items(0, 9)
        assert [i.source for i in items] == ([str(tmp_path/"0.png"), None] if name == "path" else data)
        assert [i.name for i in items] == dict(image=["p", "q"], path=["0.png", "image-00000001"], both=["image-00000000", "image-00000001"])[name]
    (tmp_path/"bad.parquet").write_bytes(b"PAR1 no"); (tmp_path/"bad.txt").write_bytes(b"\xff\xfe"); (tmp_path/"empty").mkdir()
    pq.write_table(pa.table(dict(x=[1])), tmp_path/"x.parquet")
    for source, text in {tmp_path/"bad.parquet": "a Parquet file", tmp_path/"bad.txt": "UTF-8", tmp_path/"empty": "got none", tmp_path/"none": "no such file", tmp_path/"x.parquet": "a column image, bytes or path"}.items():
        with pytest.raises(InputError, match=text): listing(source, home)
    pq.write_table(pa.table(dict(image=[[1, 2], [3]])), tmp_path/"numbers.parquet")
    with pytest.raises(InputError, match="expected bytes or paths in the column image, got list"): listing(tmp_path/"numbers.parquet", home).items(0, 1)
    with pytest.raises(InputError, match="outside the input folder"): listing(folder, folder/"out")
    (tmp_path/"bom.txt").write_text("a/x.png\n", encoding="utf-8-sig")
    assert listing(tmp_path/"bom.txt", home).names == ["a/x.png"]
    (tmp_path/"linked").mkdir(); (tmp_path/"linked"/"a").symlink_to(folder); (tmp_path/"linked"/"b").symlink_to(tmp_path/"linked") # the second leads round in a circle
    assert listing(tmp_path/"linked", home).names == [f"a/{n}" for n in listing(folder, tmp_path).names]
    with pytest.raises(InputError, match="outside the input folder"): listing(tmp_path/"linked", folder/"out") # behind the link
    (tmp_path/"both"/"b").mkdir(parents=True); picture(0, 8).save(tmp_path/"both"/"b"/"x.png"); (tmp_path/"both"/"a").symlink_to(tmp_path/"both"/"b")
    assert listing(tmp_path/"both", home).names == ["b/x.png"]                                   # its own name comes before a link's

def test_results_of_others_are_left_alone(home, tmp_path):
    (tmp_path/"o"/"face").mkdir(parents=True); (tmp_path/"o"/"face"/"report.json").write_text("{}")
    with pytest.raises(InputError, match="without other results in .* got face/report.json"): run(home, tmp_path/"o")
    assert not (tmp_path/"o"/"run.json").exists()

def test_a_generator_without_an_encoder_stops_the_run_and_one_of_its_own_is_named(home, tmp_path):
    with pytest.raises(InputError, match="expected a latent encoder for the generator"): run(home, tmp_path/"o", method="encoder")
    G = load_generator(home/"generator.safetensors", "cpu")
    save_latent_encoder(fresh_encoder(G), tmp_path/"e.safetensors", G)
    assert run(home, tmp_path/"p", method="encoder", encoder=str(tmp_path/"e.safetensors")).failed == 1
    code, said, _ = command(home, tmp_path/"q", "--local", "--no-files", "--method", "encoder", "--encoder", tmp_path/"e.safetensors")
    assert code == 2 and "5 of 6 images inverted" in said and tight(read_results(tmp_path/"q")) == tight(read_results(tmp_path/"p"))
    code, _, err = command(home, tmp_path/"r", "--local", "--method", "encoder")
    assert code == 2 and "expected a latent encoder" in err[0] and not (tmp_path/"r"/"run.json").exists()

def test_bytes_and_paths_give_the_same_rows(home, whole, tmp_path):
    names = ["0.png", "1.png", "2.png", "3-bad.png", "3.png", "4.png"]
    pq.write_table(pa.table(dict(image=[(home/"in"/n).read_bytes() for n in names], name=names)), tmp_path/"t.parquet")
    run(home, tmp_path/"o", tmp_path/"t.parquet")
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("folder", "error")} for r in tight(rows)]
    assert strip(read_results(tmp_path/"o")) == strip(whole.rows) and "3-bad.png" in read_results(tmp_path/"o")[3]["error"]

def test_bad_jobs(home):
    with pytest.raises(InputError, match="pti and spi tune"): job(home, "o", method="pti")
    with pytest.raises(InputError, match="at least one image a batch"): job(home, "o", batch=0)

# Who does the work: a crew of threads, of which some die

class Crew:
    "Workers that are names; `fate(worker, items)` gives rows or a `Lost`"
    def __init__(self, fate, room=9): self.fate, self.room, self.count, self.due, self.fired, self.most = fate, room, 0, {}, [], 0
    def hire(self): self.count += 1; promise = f"hire {self.count}"; self.due[promise] = lambda n=self.count: n; return promise
    def give(self, worker, items):
        promise = f"{worker}: {[i.index for i in items]}"
        self.due[promise] = lambda: self.fate(worker, items)
        return promise
    def fire(self, worker): self.fired.append(worker)
    def wait(self, promises, seconds):
        self.most = max(self.most, sum(":" in p for p in promises))
        ready = [p for p in promises if not (p.startswith("hire") and int(p[5:]) > self.room)][-1:]
        return [(p, self.due[p]()) for p in ready]

def batches(n, size=2): return [Batch(k, [Item(i, f"{i}.png", str(i), None) for i in range(k * size, k * size + size)]) for k in range(n)]
rows_of = lambda items: ([dict(index=i.index) for i in items], [])

def test_a_dead_workers_batch_goes_to_another():
    said, crew = [], Crew(lambda worker, items: Lost("killed") if worker == 2 else rows_of(items))
    got = list(share(batches(5), crew, 2, say=said.append))
    assert sorted(n for n, _, _ in got) == list(range(5)) and sorted(r["index"] for _, rows, _ in got for r in rows) == list(range(10))
    assert crew.fired == [2] and crew.count == 3 and said == ["a worker died (killed): its 2 images go to another"]

def test_an_image_that_kills_workers_is_a_failed_row():
    crew = Crew(lambda worker, items: Lost("memory") if any(i.index == 4 for i in items) else rows_of(items))
    got = {n: rows for n, rows, _ in share(batches(4), crew, 2, retries=1, say=lambda text: None)}
    assert sorted(got) == [0, 1, 2, 3] and [r["index"] for r in got[2]] == [4, 5]
    assert "got 3 that died" in got[2][0]["error"] and "error" not in got[2][1] and len(crew.fired) == 3

def test_no_more_is_read_than_workers_can_hold():
    taken = []
    def lazily():
        for b in batches(20): taken.append(b.number); yield b
    crew = Crew(lambda worker, items: rows_of(items))
    for n, (_, rows, _) in enumerate(share(lazily(), crew, 3), 1): assert len(taken) <= n + 3 + 1
    assert crew.most == 3 and len(taken) == 20

def test_workers_that_never_come_are_told():
    with pytest.raises(Halt, match="within 0 s, got none"): list(share(batches(2), Crew(rows_of, room=0), 2, patience=0.))
    class Stillborn(Crew):
        def hire(self): promise = super().hire(); self.due[promise] = lambda: Lost("no memory"); return promise
    said = []
    with pytest.raises(Halt, match="got 5 in a row that died; the last: no memory"): list(share(batches(2), Stillborn(rows_of), 2, say=said.append))
    assert said == ["a worker died as it started (no memory): others are tried"]
    class Mortal(Stillborn): # the first worker comes and dies with its batch, and nobody comes after it
        def hire(self): promise = super().hire(); self.due |= {promise: lambda: 1} if promise == "hire 1" else {}; return promise
    with pytest.raises(Halt, match=r"within 0.02 s, got none: the last died as it started \(no memory\)"): list(share(batches(1), Mortal(lambda worker, items: Lost("killed")), 1, patience=.02, say=said.append))
    assert said[1:] == ["a worker died (killed): its 2 images go to another", "a worker died as it started (no memory): others are tried"]
    class Bad(Stillborn): # only its first worker comes, and is at work whenever another dies
        def hire(self): promise = super().hire(); self.due |= {promise: lambda: 1} if promise == "hire 1" else {}; return promise
        def wait(self, promises, seconds):
            ready = [p for p in promises if p == "hire 1"] or [p for p in promises if p.startswith("hire")][:1] * (self.count < 20) or promises[:1]
            return [(p, self.due[p]()) for p in ready]
    assert len(list(share(batches(3), Bad(lambda worker, items: rows_of(items)), 2, say=said.append))) == 3 # a bad machine beside a good one
    crew = Crew(lambda worker, items: rows_of(items), room=1)                  # room for one of three: it does everything
    assert len(list(share(batches(4), crew, 3, patience=0.))) == 4 and crew.most == 1

# The command

def posefree(*args):
    r = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert r.exception is None or isinstance(r.exception, SystemExit), repr(r.exception)
    return r.exit_code, r.stdout, [line for line in r.stderr.splitlines() if line.strip()]

def command(home, out, *extra): return posefree("scale", "--input", home/"in", "--out", out, "--generator", home/"generator.safetensors", "--device", "cpu", "--cores", 1, "--batch", 2, "--no-progress", *extra)

def test_the_command_gives_the_same_rows(home, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(optimiser.PRESETS, "quick", lambda **changes: quick(**{**dict(candidates=8, starts=2, start_steps=1, stages=SHORT.stages), **changes}))
    code, said, err = command(home, tmp_path/"o", "--local", "--no-mesh", "--no-video")
    assert code == 2 and "5 of 6 images inverted, 1 failed" in said and any("without Ray" in line for line in err), (said, err)
    assert tight(read_results(tmp_path/"o")) == tight(whole.rows)
    code, said, err = command(home, tmp_path/"o", "--local", "--no-mesh", "--no-video")
    assert code == 2 and len(err) == 1 and "--resume goes on" in err[0]
    code, said, err = command(home, tmp_path/"o", "--local", "--resume")
    assert code == 2 and "another files" in err[0]

def test_without_ray_the_extra_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = command(home, tmp_path/"o", "--workers", 2)
    assert code == 2 and len(err) == 1 and "pip install 'posefree_kit[scale]'" in err[0]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, err = command(home, tmp_path/"p", "--local")
    assert code == 2 and "pip install 'posefree_kit[scale]'" in err[0]

# Ray

@pytest.mark.slow
def test_a_lost_node_costs_no_image():
    "Two Ray nodes on this machine, one killed while it works: every image once, the rows those of a local run, and no process left"
    pytest.importorskip("ray", reason="ray is not installed: pip install 'posefree_kit[scale]'")
    script = Path(__file__).parent/"fuzz"/"lost_node.py"
    p = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900)
    assert p.returncode == 0, p.stderr[-3000:]
    told = json.loads(p.stdout.splitlines()[-1])
    assert told["rows"] == told["images"] == told["once"] and told["same"] and told["died"] >= 1 and told["left"] == 0, told
