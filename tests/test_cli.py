"The command line: every file of an inversion, and every way in which a call can be wrong, by its one-line error and exit code."
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import trimesh
from PIL import Image
from typer.testing import CliRunner

from posefree_kit import cli, optimiser, viewer
from posefree_kit.baselines import read_latent_encoder
from posefree_kit.checkpoints import load_generator, save_checkpoint
from posefree_kit.core import InputError, load_image, save_image, save_json, sha256
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig
from posefree_kit.generator import GeneratorConfig
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.portraits import portrait, portrait_batch, write_portraits
from posefree_kit.baselines import load_latent_encoder
from posefree_kit.latent_encoder import LatentEncoder
from posefree_kit.training import TrainConfig, watch_poses

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a small untrained generator and a portrait"
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), plane_channels=8, decoder_hidden=16, render_resolution=16, samples=8)).start(0)
    save_checkpoint(folder/"small.safetensors", G, Discriminator(DiscriminatorConfig(channels=(16, 16, 16), group=1)))
    from posefree_kit.core import save_image
    save_image(portrait(10_000_000, 32).image, folder/"a.png")
    return folder

@pytest.fixture(autouse=True)
def short(monkeypatch):
    "The preset quick, with a start search of a moment"
    monkeypatch.setitem(optimiser.PRESETS, "quick", lambda **changes: optimiser.quick(**{**dict(candidates=16, starts=2, start_steps=1), **changes}))

def posefree(*args):
    "Run in this process: exit code, stdout, lines of stderr"
    r = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert r.exception is None or isinstance(r.exception, SystemExit), repr(r.exception)
    return r.exit_code, r.stdout, [line for line in r.stderr.splitlines() if line.strip()]

def invert(home, *images, out, extra=()):
    return posefree("invert", *images, "--out", out, "--generator", home/"small.safetensors", "--device", "cpu", "--steps", 2, "--no-progress", *extra)

LIGHT = ("--no-mesh", "--no-video")

def error(result, *contains):
    code, _, err = result
    assert code == 2 and len(err) == 1 and err[0].startswith("error: "), result
    for text in contains: assert text in err[0], err[0]
    return err[0]

def test_every_file_is_written_and_whole(home, tmp_path):
    code, said, err = invert(home, home/"a.png", out=tmp_path)
    folder = tmp_path/"a"
    assert code == 0 and "PSNR" in said and not [e for e in err if "error" in e]
    expected = set(viewer.FILES) - ({"mesh.glb"} if any("no mesh.glb" in e for e in err) else set())
    assert {p.name for p in folder.iterdir()} == expected
    assert Image.open(folder/"reconstruction.png").size == (16, 16)
    for name in ("comparison.png", "depth.png"): Image.open(folder/name).verify()
    if "mesh.glb" in expected: assert len(trimesh.load(folder/"mesh.glb", force="mesh").faces) > 100

def test_the_report_has_the_fields_that_were_promised(home, tmp_path):
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    report = json.loads((tmp_path/"a"/"report.json").read_text())
    assert list(report) == "image generator method space preset seed device seconds steps pose backends metrics stages".split()
    assert set(report["generator"]) == {"name", "sha256", "resolution"} and set(report["pose"]) == {"yaw_deg", "pitch_deg"} and set(report["backends"]) - {"lpips"} == {"perceptual", "identity", "judge"}
    assert set(report["metrics"]) == set("mse psnr lpips id ms_ssim ms_ssim_dist depth_std".split())
    assert report["steps"] == 2 and report["space"] == "w+" and report["preset"] == "quick" and report["generator"]["sha256"] == sha256(home/"small.safetensors")
    made = load_image(tmp_path/"a"/"reconstruction.png")
    truth = load_image(home/"a.png", 16)
    assert report["metrics"]["mse"] == pytest.approx(float((made - truth).square().mean()), abs=2e-3)

def test_the_latent_gives_the_same_picture_again(home, tmp_path):
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    t, meta = viewer.load_latent(tmp_path/"a"/"latent.safetensors")
    G = load_generator(home/"small.safetensors", "cpu")
    picture = G.view(t["ws"], G.pose(t["w"])).rgb.clamp(-1, 1)
    assert (picture - load_image(tmp_path/"a"/"reconstruction.png")).abs().max() < .01
    assert torch.allclose(G.pose(t["w"]).stack(), t["pose"], atol=1e-5)
    assert meta["generator"]["sha256"] == G.sha256 and meta["config"]["stages"][0]["steps"] == 1 and len(meta["config_hash"]) == 12

def test_the_same_seed_gives_the_same_result(home, tmp_path):
    for out in ("x", "y"): invert(home, home/"a.png", out=tmp_path/out, extra=LIGHT)
    invert(home, home/"a.png", out=tmp_path/"z", extra=(*LIGHT, "--seed", 5))
    w = [viewer.load_latent(tmp_path/out/"a"/"latent.safetensors")[0]["w"] for out in "xyz"]
    assert torch.equal(w[0], w[1]) and not torch.equal(w[0], w[2])

def test_space_w_has_no_deltas(home, tmp_path):
    invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--space", "w"))
    assert not viewer.load_latent(tmp_path/"a"/"latent.safetensors")[0]["deltas"].any()

def test_results_are_not_lost_by_accident(home, tmp_path):
    assert invert(home, home/"a.png", out=tmp_path, extra=LIGHT)[0] == 0
    before = (tmp_path/"a"/"report.json").stat().st_mtime_ns
    error(invert(home, home/"a.png", out=tmp_path, extra=LIGHT), "expected no results in", "--resume", "--overwrite")
    code, said, _ = invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--resume"))
    assert code == 0 and "skipped" in said and (tmp_path/"a"/"report.json").stat().st_mtime_ns == before
    error(invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--resume", "--seed", 3)), "some made with seed 0")
    error(invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--resume", "--overwrite")), "got both")
    assert invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--overwrite"))[0] == 0 and (tmp_path/"a"/"report.json").stat().st_mtime_ns > before

def test_resume_knows_its_own_results_whatever_the_method(home, tmp_path):
    "pti finds its code in the space w, and may stop early: neither is another setting"
    assert invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--method", "pti"))[0] == 0
    code, said, _ = invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--method", "pti", "--resume"))
    assert code == 0 and "skipped" in said
    error(invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--method", "spi", "--resume")), "some made with method pti")
    (tmp_path/"a"/"latent.safetensors").write_bytes(b"cut")                        # a report without its latent is no result
    code, said, _ = invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--method", "pti", "--resume"))
    assert code == 0 and "skipped" not in said and viewer.load_latent(tmp_path/"a"/"latent.safetensors")

def test_resume_takes_nothing_made_otherwise_for_its_own(home, tmp_path):
    job = lambda **changes: types.SimpleNamespace(**dict(resume=True, generator=load_generator(home/"small.safetensors", "cpu"), method="latent", config=optimiser.with_steps(optimiser.quick(candidates=16, starts=2, start_steps=1), 2), asked=dict(align=False, background=None, framing=None, encoder=None)) | changes)
    assert invert(home, home/"a.png", out=tmp_path, extra=LIGHT)[0] == 0
    assert cli.skip(home/"a.png", tmp_path/"a", job())["image"].endswith("a.png")
    for changes, said in ((dict(config=dataclasses.replace(job().config, perceptual="lpips-alex")), "perceptual portrait"), (dict(asked=job().asked | dict(align=True, background="plain")), "align False, background None"),
                          (dict(config=optimiser.with_steps(job().config, 3)), "steps 2"), (dict(asked=job().asked | dict(encoder="ab")), "encoder None")):
        with pytest.raises(InputError, match=said): cli.skip(home/"a.png", tmp_path/"a", job(**changes))

def test_resume_looks_at_the_picture_and_adds_what_was_left_out(home, tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "turntable", functools.partial(viewer.turntable, frames=2, size=16, shown=32))
    shutil.copy(home/"a.png", tmp_path/"a.png")
    assert invert(home, tmp_path/"a.png", out=tmp_path/"o", extra=LIGHT)[0] == 0 and not (tmp_path/"o"/"a"/"turntable.mp4").exists()
    before = (tmp_path/"o"/"a"/"report.json").read_bytes()
    code, said, _ = invert(home, tmp_path/"a.png", out=tmp_path/"o", extra=("--resume", "--no-mesh"))
    assert code == 0 and "turntable.mp4 added" in said and (tmp_path/"o"/"a"/"turntable.mp4").stat().st_size > 500 and (tmp_path/"o"/"a"/"report.json").read_bytes() == before
    assert invert(home, tmp_path/"a.png", out=tmp_path/"p", extra=(*LIGHT, "--method", "pti"))[0] == 0   # with a tuned copy of the generator
    code, said, _ = invert(home, tmp_path/"a.png", out=tmp_path/"p", extra=("--resume", "--no-mesh", "--method", "pti"))
    assert code == 0 and "turntable.mp4 added" in said
    assert cli.latent_and_generator(tmp_path/"o"/"a"/"latent.safetensors", home/"small.safetensors", "cpu")[0].resolution == 16
    Image.open(home/"a.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path/"a.png") # another person under that name
    error(invert(home, tmp_path/"a.png", out=tmp_path/"o", extra=(*LIGHT, "--resume")), "those of another file of that name")

def test_what_has_no_pose_takes_none(home, tmp_path):
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    for name in ("x.mp4", "x.glb"): error(posefree("render", tmp_path/"a"/"latent.safetensors", "--out", tmp_path/name, "--yaw-deg", 10), "expected --yaw-deg and --pitch-deg with pictures")

def test_resume_does_what_is_not_complete(home, tmp_path):
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    (tmp_path/"a"/"report.json").write_text('{"image": ')
    code, said, _ = invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--resume"))
    assert code == 0 and "skipped" not in said and cli.complete(tmp_path/"a"/"report.json")

def test_bad_images_fail_alone(home, tmp_path):
    good, bad = Image.open(home/"a.png").convert("RGB"), tmp_path/"bad"
    bad.mkdir()
    (bad/"empty.png").touch(); (bad/"text.png").write_text("this is a text")
    good.save(bad/"cut.jpg"); (bad/"cut.jpg").write_bytes((bad/"cut.jpg").read_bytes()[:700])
    Image.fromarray(np.zeros((32, 32), "uint16")).save(bad/"sixteen.png"); good.crop((0, 0, 32, 20)).save(bad/"wide.png")
    Image.new("1", (30_000, 30_000)).save(bad/"huge.png")
    (bad/"folder.png").mkdir()
    expected = {"missing.png": "no such file", "empty.png": "the file is empty", "text.png": "expected a readable image file", "cut.jpg": "truncated", "sixteen.png": "8 bits a channel",
                "wide.png": "expected a square image", "huge.png": "64,000,000 pixels", "folder.png": "a folder"}
    code, said, err = invert(home, *(bad/n for n in expected), home/"a.png", out=tmp_path/"o", extra=LIGHT)
    assert code == 2 and "1 of 9 images done, 8 failed" in said and cli.complete(tmp_path/"o"/"a"/"report.json")
    errors = [e for e in err if e.startswith("error: ")]
    assert len(errors) == len(err) - sum(e.startswith("note: ") for e in err) == 8
    for line, (name, text) in zip(errors, expected.items()): assert name in line and text in line and "expected" in line, line
    assert [p.name for p in (tmp_path/"o").iterdir()] == ["a"]                  # a bad image leaves no folder behind

@pytest.mark.parametrize("mode", ("CMYK", "P", "RGBA", "LA", "L", "1"))
def test_other_kinds_of_images_are_converted(home, tmp_path, mode):
    path = tmp_path/f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.open(home/"a.png").convert(mode).save(path)
    assert invert(home, path, out=tmp_path/"o", extra=LIGHT)[0] == 0 and (tmp_path/"o"/"x"/"report.json").exists()

def test_names_may_be_strange(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("-dash.png", "größe 名 x.png", "a.b.png", "$x^$_.png")
    for n in names: shutil.copy(home/"a.png", n)
    code, _, err = posefree("invert", "--out", "o", "--generator", home/"small.safetensors", "--steps", 1, "--no-progress", *LIGHT, "--", *names)
    assert code == 0, err
    assert sorted(p.name for p in Path("o").iterdir()) == sorted(("-dash", "größe 名 x", "a.b", "$x^$_"))

def test_a_name_that_is_no_text_costs_nobody(home, tmp_path):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/f\xff.png")
    try: shutil.copy(home/"a.png", strange)
    except OSError: pytest.skip("this file system takes no such name")
    code, said, err = invert(home, strange, home/"a.png", out=tmp_path/"o", extra=LIGHT)
    assert code == 0 and "2 of 2 images done" in said, (said, err)
    assert json.loads(next((tmp_path/"o").glob("f*/report.json")).read_text(encoding="utf-8"))["image"].endswith("f?.png")

def test_an_import_replaces_nothing_that_it_reads(tmp_path):
    (tmp_path/"model.json").write_text("{}"); (tmp_path/"model.pt").touch()
    error(posefree("import-official", tmp_path/"model.pt", tmp_path/"model.safetensors", "--config", tmp_path/"model.json", "--overwrite"), "would replace", "which is read")
    error(posefree("import-official", tmp_path/"model.pt", tmp_path/"model.safetensors"), "expected a new file", "model.json")
    assert (tmp_path/"model.json").read_text() == "{}"

def test_full_memory_after_the_optimisation_costs_that_image_alone(home, tmp_path, monkeypatch):
    real, calls = viewer.comparison, []
    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **kwargs)
    monkeypatch.setattr(viewer, "comparison", full)
    shutil.copy(home/"a.png", tmp_path/"b.png")
    code, said, err = invert(home, tmp_path/"b.png", home/"a.png", out=tmp_path/"o", extra=LIGHT)
    assert code == 2 and "1 of 2 images done, 1 failed" in said and any("b.png: expected to fit into the device's memory, got: CUDA out of memory: --no-video and --no-mesh take less" in e for e in err), err
    assert cli.complete(tmp_path/"o"/"a"/"report.json") and not (tmp_path/"o"/"b"/"report.json").exists()

def diverging(monkeypatch):
    real = optimiser.losses.rec
    calls = iter(range(10 ** 9))
    monkeypatch.setattr(optimiser.losses, "rec", lambda *a, **k: real(*a, **k) * (float("nan") if next(calls) > 3 else 1.))

def test_what_was_reached_is_a_latent_and_what_was_there_stays(home, tmp_path, monkeypatch):
    assert invert(home, home/"a.png", out=tmp_path, extra=LIGHT)[0] == 0
    folder = tmp_path/"a"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    diverging(monkeypatch)
    code, _, err = invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--overwrite", "--steps", 9))
    assert code == 1 and "last-good.safetensors, which `posefree render` takes" in err[-1], err
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(after) - set(before) == {"last-good.safetensors"} and all(after[k] == v for k, v in before.items())
    assert posefree("render", folder/"last-good.safetensors", "--out", tmp_path/"v.png", "--size", 16, "--device", "cpu", "--generator", home/"small.safetensors")[0] == 0
    monkeypatch.undo()
    for p in folder.iterdir(): p.name == "last-good.safetensors" or p.unlink()
    error(posefree("invert", home/"a.png", "--out", tmp_path, "--generator", home/"small.safetensors", "--no-progress"), "expected no results in", "got last-good.safetensors")

def test_one_name_twice_is_told(home, tmp_path):
    code, said, _ = invert(home, tmp_path/"no.png", tmp_path/"no.png", tmp_path/"no.png", out=tmp_path/"n", extra=LIGHT)
    assert code == 2 and "0 of 3 images done, 3 failed" in said
    (tmp_path/"other").mkdir(); shutil.copy(home/"a.png", tmp_path/"other"/"a.png")
    code, said, err = invert(home, home/"a.png", tmp_path/"other"/"a.png", out=tmp_path/"o", extra=LIGHT)
    assert code == 2 and "1 of 2" in said and any("images of different names" in e and "other" in e for e in err)

@pytest.mark.parametrize("args, text", [
    (("--steps", 0), "expected at least 1 step, got 0"), (("--steps", -3), "at least 1 step"), (("--preset", "slow"), "expected a preset among quick, paper; got 'slow'"),
    (("--space", "z"), "got 'z'"), (("--method", "guess"), "expected a method among latent, pose_opt, pti, spi, encoder, encoder+latent; got 'guess'"), (("--encoder", "x.safetensors"), "got it with latent"), (("--background", "plain"), "got --background plain without it"), (("--framing", "ffhq"), "got --framing ffhq without it"), (("--generator", "nobody"), "expected a generator"), (("--device", "cuda:7"), "expected a device"), (("--device", "toaster"), "expected a device"),
    (("--perceptual", "nothing"), "nothing"), (("--identity", "nothing"), "nothing"), (("--background", "blue", "--align"), "keep or plain"), (("--resume", "--overwrite"), "got both"), (("--framing", "square"), "auto, portraits, ffhq"), (("--seed", 10 ** 15), "seed")], ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "")
def test_wrong_options_stop_the_call(home, tmp_path, args, text):
    error(posefree("invert", home/"a.png", "--out", tmp_path/"o", *(() if "--generator" in args else ("--generator", home/"small.safetensors")), "--no-progress", *args), text)
    assert not list((tmp_path/"o").glob("*"))

def test_an_output_folder_that_cannot_be_written(home, tmp_path):
    (tmp_path/"file").write_text("x")
    for out in (tmp_path/"file", tmp_path/"file"/"below"): error(invert(home, home/"a.png", out=out), "expected a folder that can be written")
    if os.geteuid():                                                            # root may write anywhere
        (tmp_path/"locked").mkdir(mode=0o500)
        error(invert(home, home/"a.png", out=tmp_path/"locked"), "expected a folder that can be written")

def test_a_damaged_checkpoint_is_refused(home, tmp_path):
    for suffix in (".safetensors", ".json"): shutil.copy(home/f"small{suffix}", tmp_path/f"cut{suffix}")
    data = (tmp_path/"cut.safetensors").read_bytes()
    call = lambda: posefree("invert", home/"a.png", "--out", tmp_path/"o", "--generator", tmp_path/"cut.safetensors", "--device", "cpu", "--no-progress")
    (tmp_path/"cut.safetensors").write_bytes(data[:len(data) // 2]); error(call(), "SHA-256")
    card = json.loads((tmp_path/"cut.json").read_text())
    save_json(card | dict(sha256=sha256(tmp_path/"cut.safetensors")), tmp_path/"cut.json"); error(call(), "whole .safetensors")
    (tmp_path/"cut.safetensors").write_bytes(data); error(call(), "SHA-256")
    (tmp_path/"cut.json").unlink(); error(call(), "model card")

@pytest.fixture(scope="module")
def photo(home):
    Image.fromarray(skimage.data.astronaut()).save(home/"astronaut.png")
    return home/"astronaut.png"

def test_a_photograph_goes_through(home, photo, tmp_path):
    code, _, err = invert(home, photo, out=tmp_path, extra=(*LIGHT, "--align", "--background", "plain"))
    assert code == 0 and Image.open(tmp_path/"astronaut"/"aligned.png").size == (256, 256)
    known = viewer.load_latent(tmp_path/"astronaut"/"latent.safetensors")[1]["aligned"]
    assert known["faces_found"] == 1 and abs(known["landmarks"][0][0] - 205) < 4

def test_the_frame_follows_the_generator(home, capsys):
    from posefree_kit.photos import ffhq_framing, similarity
    ours = load_generator(home/"small.safetensors", "cpu")
    faces = portrait_batch(torch.arange(16), 96).image
    imported = types.SimpleNamespace(source=dict(format="PoF3D, official"), sample=lambda n, seed, psi: (None, types.SimpleNamespace(rgb=faces[seed:seed + 1])))
    assert cli.framing_for(ours, "auto") is similarity and cli.framing_for(imported, "portraits") is similarity and cli.framing_for(ours, "ffhq") is ffhq_framing
    framing = cli.framing_for(imported, "auto")
    assert framing not in (similarity, ffhq_framing) and "of 16 of the generator's own pictures" in capsys.readouterr().err

def test_no_face_and_two_faces(home, photo, tmp_path):
    Image.new("RGB", (200, 120), "grey").save(tmp_path/"wall.png")
    face = Image.open(photo)
    pair = Image.new("RGB", (812, 512)); pair.paste(face, (0, 0)); pair.paste(face.resize((300, 300)), (512, 0)); pair.save(tmp_path/"pair.png")
    code, _, err = invert(home, tmp_path/"wall.png", tmp_path/"pair.png", out=tmp_path/"o", extra=(*LIGHT, "--align"))
    assert code == 2 and any("wall.png" in e and "expected a picture with a face, found none" in e for e in err)
    assert any(e.startswith("note: ") and "2 faces found, took the largest" in e for e in err) and cli.complete(tmp_path/"o"/"pair"/"report.json")

def test_render(home, tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "turntable", functools.partial(viewer.turntable, frames=2))
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    latent, render = tmp_path/"a"/"latent.safetensors", lambda *a: posefree("render", *a, "--generator", home/"small.safetensors", "--device", "cpu")
    assert render(latent, "--out", tmp_path/"v.png", "--yaw-deg", 20, "--pitch-deg", -5, "--size", 64)[0] == 0 and Image.open(tmp_path/"v.png").size == (64, 64)
    assert render(latent, "--out", tmp_path/"views", "--yaw-deg", -20, "--yaw-deg", 20, "--size", 32)[0] == 0 and len(list((tmp_path/"views").glob("*.png"))) == 2
    assert (np.array(Image.open(sorted((tmp_path/"views").glob("*"))[0])) != np.array(Image.open(sorted((tmp_path/"views").glob("*"))[1]))).any()
    error(render(latent, "--out", tmp_path/"v.png"), "--overwrite replaces it"); error(render(latent, "--out", tmp_path/"views", "--yaw-deg", 20), "--overwrite replaces it")
    error(render(latent, "--out", tmp_path/"near", "--yaw-deg", 10.01, "--yaw-deg", 10.04), "differ by a tenth of a degree"); assert not (tmp_path/"near").exists()
    (tmp_path/"run-0.5").mkdir(); assert render(latent, "--out", tmp_path/"run-0.5", "--size", 32)[0] == 0 == render(latent, "--out", tmp_path/"run-0.5", "--size", 32, "--overwrite")[0]
    error(render(latent, "--out", tmp_path/"v.txt"), "expected --out")
    code, said, _ = render(latent, "--out", tmp_path/"x.gif", "--size", 16)
    assert code == 0 and said.strip() == str(tmp_path/"x.gif") and Image.open(tmp_path/"x.gif").n_frames == 2
    monkeypatch.setattr(viewer, "mesh", functools.partial(viewer.mesh, resolution=32))
    for name in ("x.glb", "x.obj"):
        code, said, err = render(latent, "--out", tmp_path/name)
        assert code == 0 and said.strip() == str(tmp_path/name) and len(trimesh.load(tmp_path/name, force="mesh").faces) > 100, err
    error(render(latent, "--out", tmp_path/"w.png", "--size", 4), "expected a size")
    error(render(latent, "--out", tmp_path/"w.png", "--yaw-deg", 400), "within 89 degrees")
    error(render(tmp_path/"none.safetensors", "--out", tmp_path/"w.png"), "no such file")
    error(render(home/"small.safetensors", "--out", tmp_path/"w.png"), "expected format")
    (tmp_path/"cut.safetensors").write_bytes(latent.read_bytes()[:300]); error(render(tmp_path/"cut.safetensors", "--out", tmp_path/"w.png"), "expected a whole .safetensors")

def test_a_camera_that_the_generator_learnt_the_distance_of_is_kept(home, tmp_path):
    from posefree_kit.camera import Pose
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    t, meta = viewer.load_latent(tmp_path/"a"/"latent.safetensors")
    G, near = load_generator(home/"small.safetensors", "cpu"), Pose(*t["pose"].T, torch.tensor([2.2]))
    viewer.save_latent(types.SimpleNamespace(w=t["w"], deltas=t["deltas"], pose=near, generator=None, report=dict(generator=meta["generator"], method="latent")), optimiser.quick(), tmp_path/"near.safetensors")
    assert viewer.load_latent(tmp_path/"near.safetensors")[0]["radius"] == near.radius and "radius" not in t
    assert posefree("render", tmp_path/"near.safetensors", "--out", tmp_path/"n.png", "--size", 16, "--device", "cpu", "--generator", home/"small.safetensors")[0] == 0
    made = load_image(tmp_path/"n.png")
    assert (made - G.view(t["ws"], near).rgb.clamp(-1, 1)).abs().max() < .01 and (made - load_image(tmp_path/"a"/"reconstruction.png")).abs().max() > .05

def test_another_method_leaves_the_same_files_and_the_generator_that_it_tuned(home, tmp_path, monkeypatch):
    from posefree_kit import baselines
    monkeypatch.setitem(baselines.METHODS, "pti", functools.partial(baselines.pti, tuning=baselines.Tuning(stop=0.)))
    assert invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--method", "pti"))[0] == 0
    report, (_, meta) = json.loads((tmp_path/"a"/"report.json").read_text()), viewer.load_latent(tmp_path/"a"/"latent.safetensors")
    assert report["method"] == meta["method"] == "pti" and report["generator"]["tuned"] and (tmp_path/"a"/"tuned.safetensors").exists() and report["steps"] == 2
    assert posefree("render", tmp_path/"a"/"latent.safetensors", "--out", tmp_path/"v.png", "--size", 16, "--device", "cpu")[0] == 0
    assert (load_image(tmp_path/"v.png") - load_image(tmp_path/"a"/"reconstruction.png")).abs().max() < .02
    error(posefree("render", tmp_path/"a"/"latent.safetensors", "--out", tmp_path/"w.png", "--generator", home/"small.safetensors"), "expected the generator that the latent was made with (tuned.safetensors")
    error(invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--resume")), "some made with method pti")
    pti = lambda: invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--resume", "--method", "pti"))
    code, out, err = pti(); assert code == 0 and "skipped" in f"{out}{err}"
    (tmp_path/"a"/"tuned.safetensors").unlink() # without its generator the latent is of no use
    error(posefree("render", tmp_path/"a"/"latent.safetensors", "--out", tmp_path/"u.png"), "expected tuned.safetensors beside", "got none")
    code, out, err = pti(); assert code == 0 and "skipped" not in f"{out}{err}" and (tmp_path/"a"/"tuned.safetensors").exists()
    assert invert(home, home/"a.png", out=tmp_path, extra=(*LIGHT, "--overwrite"))[0] == 0 and not (tmp_path/"a"/"tuned.safetensors").exists()
    error(invert(home, home/"a.png", out=tmp_path/"e", extra=("--method", "encoder+latent")), "expected a latent encoder for the generator 'small'", "train-encoder")

def test_train_encoder(home, tmp_path):
    train = lambda *a: posefree("train-encoder", "--out", tmp_path/"e.safetensors", "--generator", home/"small.safetensors", "--device", "cpu", "--no-progress", *a)
    code, said, err = train("--steps", 1, "--portraits", 64)
    assert code == 0 and "1 steps" in said, err
    card = json.loads((tmp_path/"e.json").read_text())
    assert card["generator"]["sha256"] == sha256(home/"small.safetensors") and card["bytes"] < 8e6 and str(tmp_path) not in json.dumps(card)
    look = lambda *a: posefree("invert", home/"a.png", "--out", tmp_path/"o", "--generator", home/"small.safetensors", "--device", "cpu", "--no-progress", *LIGHT, "--method", "encoder", "--encoder", tmp_path/"e.safetensors", *a)
    error(look("--steps", 2), "got --steps 2 with encoder, which takes one look"); error(look("--preset", "paper"), "got --preset paper with encoder")
    assert look()[0] == 0
    report = json.loads((tmp_path/"o"/"a"/"report.json").read_text())
    assert (report["method"], report["steps"], report["stages"]) == ("encoder", 0, [])
    error(train("--steps", 1), "--overwrite replaces it")
    error(train(), "expected a budget above 0", "none"); error(train("--minutes", -1), "--minutes -1")
    error(train("--steps", 1, "--overwrite", "--start", tmp_path/"nothing.safetensors"), "with its card")

def test_a_latent_goes_with_its_generator(home, tmp_path):
    invert(home, home/"a.png", out=tmp_path, extra=LIGHT)
    torch.manual_seed(1)
    save_checkpoint(tmp_path/"other.safetensors", PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), plane_channels=8, decoder_hidden=16, render_resolution=16, samples=8)))
    error(posefree("render", tmp_path/"a"/"latent.safetensors", "--out", tmp_path/"v.png", "--generator", tmp_path/"other.safetensors"), "expected the generator that the latent was made with")

def test_portraits(tmp_path):
    assert posefree("portraits", "--n", 2, "--out", tmp_path/"p", "--size", 32, "--yaw-deg", 15)[0] == 0
    records = json.loads((tmp_path/"p"/"portraits.json").read_text())
    assert [r["seed"] for r in records] == [10_000_000, 10_000_001] and records[0]["yaw_deg"] == pytest.approx(15, abs=.01) and Image.open(tmp_path/"p"/records[1]["file"]).size == (32, 32)
    error(posefree("portraits", "--out", tmp_path/"p"), "--overwrite")
    error(posefree("portraits", "--n", 0, "--out", tmp_path/"q"), "expected 1 to")
    error(posefree("portraits", "--size", 1, "--out", tmp_path/"q"), "expected a size")
    for option, v in (("--yaw-deg", "nan"), ("--yaw-deg", 500), ("--pitch-deg", 95)): error(posefree("portraits", option, v, "--out", tmp_path/"r"), "expected angles within 89 degrees", str(v))
    assert not (tmp_path/"r").exists()

def test_train_exports_a_generator_that_loads(tmp_path):
    train = lambda out, *a: posefree("train", "--out", out, "--device", "cpu", "--no-progress", *a)
    code, said, err = train(tmp_path/"r", "--kimg", .016, "--portraits", 12, "--size", 16, "--batch", 8)
    assert code == 0, err
    G, card = load_generator(tmp_path/"r"/"generator.safetensors", "cpu"), json.loads((tmp_path/"r"/"generator.json").read_text())
    assert G.resolution == 16 and card["kimg"] == .016 and "12 simulated portraits" in card["data"]
    error(train(tmp_path/"r", "--kimg", 1), "--resume goes on")
    error(train(tmp_path/"s", "--kimg", 1, "--resume"), "expected a run to go on with")
    error(train(tmp_path/"s"), "expected a budget above 0", "none")
    error(train(tmp_path/"s", "--minutes", 0), "--minutes 0")
    error(train(tmp_path/"s", "--kimg", 1, "--size", 48), "expected a size")
    error(train(tmp_path/"s", "--kimg", 1, "--images", tmp_path/"nothing"), "expected a folder with images")
    error(train(tmp_path/"s", "--kimg", 1, "--grow-from", tmp_path/"nothing"), "expected the folder of a run")
    assert not (tmp_path/"s").exists()
    code, _, err = train(tmp_path/"t", "--kimg", .008, "--portraits", 12, "--batch", 8, "--start", tmp_path/"r"/"generator.safetensors", "--encode", .5)
    assert code == 0, err
    H = load_generator(tmp_path/"t"/"generator.safetensors", "cpu")
    E, card = load_latent_encoder(H, tmp_path/"t"/"latent_encoder.safetensors"), json.loads((tmp_path/"t"/"generator.json").read_text())
    assert isinstance(E, LatentEncoder) and card["started_from"] == dict(name=G.name, sha256=G.sha256, encoder=None)
    code, _, err = train(tmp_path/"u", "--kimg", .008, "--portraits", 12, "--batch", 8, "--start", tmp_path/"t"/"generator.safetensors", "--encode", .5, "--set", "encode_rate=0", "--seed", 9) # a fresh one of another seed is far away
    assert code == 0 and "no encoder" not in err, err                               # the encoder that lies beside it comes along
    F = load_latent_encoder(load_generator(tmp_path/"u"/"generator.safetensors", "cpu"), tmp_path/"u"/"latent_encoder.safetensors")
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(E.parameters(), F.parameters())) and json.loads((tmp_path/"u"/"generator.json").read_text())["started_from"]["encoder"] == E.card["sha256"]
    error(train(tmp_path/"s", "--kimg", 1, "--start", "portraits", "--grow-from", tmp_path/"r"), "--start or --grow-from")
    error(train(tmp_path/"s", "--kimg", 1, "--encode", 2), "encode_share")

@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_networks_of_every_size(size):
    from posefree_kit.cli import architecture
    g, d = architecture(size)
    assert PoseFreeGenerator(g).resolution == size == Discriminator(d).config.resolution
    if size > 16: assert architecture(size // 2)[0].channels == g.channels[:-1] and architecture(size // 2)[1].channels == d.channels[1:]   # what growing keeps

def test_train_with_any_setting(tmp_path, monkeypatch):
    train = lambda out, *a: posefree("train", "--out", out, "--device", "cpu", "--no-progress", "--portraits", 12, "--size", 16, "--batch", 8, *a)
    asked = ("--set", "loss=relativistic", "--set", "r2_gamma=0.12", "--set", "fall_kimg=[1, 2]", "--set", "bf16=false")
    code, _, err = train(tmp_path/"r", "--kimg", .008, *asked)
    assert code == 0, err
    said = json.loads((tmp_path/"r"/"generator.json").read_text())["training"]
    assert said["loss"] == "relativistic" and said["r2_gamma"] == .12 and said["fall_kimg"] == [1, 2] and said["r1_gamma"] == .05 / 4 and said["g_rate"] == TrainConfig().g_rate
    error(posefree("train", "--out", tmp_path/"r", "--device", "cpu", "--kimg", 1, "--resume", "--batch", 32, "--size", 32), "settings that the run", "--batch 32, --size 32")   # though both are the usual ones
    assert train(tmp_path/"r", "--kimg", .016, "--resume", *asked)[0] == 0          # the same command goes on
    error(train(tmp_path/"r", "--kimg", 1, "--resume", "--set", "r2_gamma=.2"), "settings that the run", "--set r2_gamma=0.2")
    code, _, err = train(tmp_path/"g", "--kimg", .008, "--size", 32, "--grow-from", tmp_path/"r", "--set", "g_rate=0.001")
    assert code == 0, err
    said = json.loads((tmp_path/"g"/"generator.json").read_text())["training"]
    assert said["g_rate"] == .001 and said["fade_kimg"] == 4 and said["d_rate"] == .0014   # what was not asked is the usual one of grown runs
    found = []
    for out, run, size, encode, note in (("e", "r", 32, .5, "no encoder learnt along"), ("e2", "e", 64, .5, ""), ("e3", "e", 64, 0, "stays behind: --encode")): # an encoder grows along, where there is one
        code, _, err = train(tmp_path/out, "--kimg", .008, "--size", size, "--grow-from", tmp_path/run, "--encode", encode, "--set", "fade_kimg=.001", "--set", "encode_rate=0", "--seed", size)
        assert code == 0 and [note in line for line in err if "encoder" in line] == [True] * bool(note) and (tmp_path/out/"latent_encoder.safetensors").exists() == bool(encode), err
        if encode: found.append(read_latent_encoder(tmp_path/out/"latent_encoder.safetensors").state_dict())
    assert all(torch.equal(x[:len(y)], y) for x, y in zip(found[1].values(), found[0].values())) and found[1]["deltas.bias"].shape > found[0]["deltas.bias"].shape
    for text, *words in (("loss", "NAME=VALUE"), ("=1", "NAME=VALUE"), ("batch=4", "--batch"), ("rate=1", "unknown settings ['rate']"), ("g_rate=fast", "TrainConfig.g_rate", "'fast'"), ("loss=hinge", "nonsaturating or relativistic"), ("d_rate=-1", "TrainConfig.d_rate: expected 0 to 1"), ("encode_rate=-1", "encode_rate"), ("blur_px=1e12", "blur_px"), ("pose_weight=-5", "pose_weight"), ("condition_kimg=[]", "condition_kimg: expected two numbers"), ('condition_kimg=["a", 2]', "condition_kimg"), ("easy_kimg=[3, 2]", "easy_kimg: expected two numbers")): error(train(tmp_path/"s", "--kimg", 1, "--set", text), *words)
    error(train(tmp_path/"s", "--kimg", 1, "--set", "loss=relativistic", "--set", "loss=nonsaturating"), "one value, got several")
    error(train(tmp_path/"s", "--kimg", 1, "--start", tmp_path/"r"/"generator.safetensors", "--set", "blur_kimg=3"), "--set blur_kimg", "--start")
    error(train(tmp_path/"s", "--kimg", 1, "--start", "portraits-small", "--size", 128), "--size: expected 64")
    error(posefree("train", "--out", tmp_path/"s", "--kimg", 1, "--start", tmp_path/"r"/"generator.safetensors", "--plain", 3), "--plain", "--start")
    assert not (tmp_path/"s").exists()
    error(train(tmp_path/"r", "--kimg", 1, "--resume", "--portraits", 13, *asked), "expected the pictures that the run", "12 simulated portraits", "got 13 simulated")
    with monkeypatch.context() as m: # before any picture is drawn
        m.setattr(cli, "training_images", lambda *args, **kwargs: pytest.fail("pictures were drawn"))
        error(train(tmp_path/"r", "--kimg", 1, "--resume", "--plain", 3, *asked), "expected the pictures that the run", "plain_images")

def test_train_on_easy_pictures_of_ones_own_first(tmp_path):
    "--easy and --no-mirror reach training, the card and what --resume compares"
    for name, seeds in (("all", range(9)), ("easy", range(20, 24))): write_portraits(seeds, tmp_path/name, size=16)
    train = lambda out, *a: posefree("train", "--out", tmp_path/out, "--device", "cpu", "--no-progress", "--size", 16, "--batch", 8, "--images", tmp_path/"all", *a)
    runs = dict(usual=(), easy=("--easy", tmp_path/"easy"), unmirrored=("--no-mirror",))
    for name, more in runs.items(): assert train(name, "--kimg", .008, *more)[0] == 0
    card = {name: json.loads((tmp_path/name/"generator.json").read_text()) for name in runs}
    assert len({c["sha256"] for c in card.values()}) == 3                            # each saw other pictures
    assert card["easy"]["easy_images"] == 4 and card["easy"]["easy_data"] == "easy" and "easy_data" not in card["usual"]
    assert card["usual"]["mirror"] is True and card["unmirrored"]["mirror"] is False and str(tmp_path) not in json.dumps(card)
    for name, more in runs.items(): assert train(name, "--kimg", .016, "--resume", *more)[0] == 0
    error(train("easy", "--kimg", 1, "--resume"), "expected the pictures that the run", "easy_data")
    error(train("unmirrored", "--kimg", 1, "--resume"), "expected the pictures that the run", "mirror")
    a, b = sorted((tmp_path/"all").glob("*.png"))[3:5]; a.write_bytes(b.read_bytes())                # as many files, of the same names
    error(train("usual", "--kimg", 1, "--resume"), "expected the pictures that the run", "(pictures)")
    error(train("s", "--kimg", 1, "--plain", 3), "--plain", "--easy FOLDER")
    error(posefree("train", "--out", tmp_path/"s", "--kimg", 1, "--easy", tmp_path/"easy"), "--easy: expected --images")
    error(posefree("train", "--out", tmp_path/"s", "--kimg", 1, "--start", "portraits-small", "--images", tmp_path/"all", "--easy", tmp_path/"easy"), "--easy", "--start")
    assert not (tmp_path/"s").exists()

def invert_with(generator, tmp_path):
    save_image(portrait(10_000_001, 16).image, tmp_path/"face.png")
    return posefree("invert", tmp_path/"face.png", "--out", tmp_path/"i", "--generator", generator, "--device", "cpu", "--no-video", "--no-mesh", "--no-progress", "--steps", 2)

def test_train_begins_wider(tmp_path):
    train = lambda out, *a: posefree("train", "--out", out, "--device", "cpu", "--no-progress", "--portraits", 12, "--batch", 8, *a)
    assert train(tmp_path/"r", "--kimg", .008, "--size", 16)[0] == 0
    small = tmp_path/"r"/"generator.safetensors"; had = list(load_generator(small, "cpu").config.channels)
    had_d = json.loads((tmp_path/"r"/"generator.json").read_text())["discriminator"]["channels"]
    code, _, err = train(tmp_path/"w", "--kimg", .008, "--start", small, "--widen", ",".join(str(c + 8) for c in had), "--widen-discriminator", ",".join(str(c + 4) for c in had_d))
    assert code == 0, err
    card = json.loads((tmp_path/"w"/"generator.json").read_text())
    assert card["generator"]["channels"] == card["started_from"]["widened"] == [c + 8 for c in had]
    assert card["discriminator"]["channels"] == card["started_from"]["widened_discriminator"] == [c + 4 for c in had_d]
    error(train(tmp_path/"s", "--kimg", 1, "--start", small, "--widen-discriminator", "8,eight"), "--widen-discriminator: expected whole numbers", "'8,eight'")
    error(train(tmp_path/"s", "--kimg", 1, "--start", small, "--widen-discriminator", "4,4,4"), "widen_discriminator: expected 3 numbers, at least", "(4, 4, 4)")
    error(train(tmp_path/"s", "--kimg", 1, "--widen-discriminator", "64,64,48"), "--widen-discriminator: expected --start")
    error(train(tmp_path/"s", "--kimg", 1, "--start", small, "--widen", "8,eight"), "--widen: expected whole numbers", "'8,eight'")
    error(train(tmp_path/"s", "--kimg", 1, "--start", small, "--widen", "4,4,4"), "widen: expected a look of at least", "(4, 4, 4)")
    error(train(tmp_path/"s", "--kimg", 1, "--widen", "64,64,48"), "--widen: expected --start")
    error(train(tmp_path/"w", "--kimg", 1, "--resume", "--widen", "64,64,48"), "--widen: expected a run that begins, got --resume")
    assert invert_with(small, tmp_path)[0] == 0
    error(posefree("render", tmp_path/"i"/"face"/"latent.safetensors", "--out", tmp_path/"v.png"), "expected the generator that the latent was made with (generator,", "does not ship: name its file with --generator")
    assert posefree("render", tmp_path/"i"/"face"/"latent.safetensors", "--out", tmp_path/"v.png", "--generator", small, "--device", "cpu")[0] == 0
    error(posefree("render", tmp_path/"i"/"face", "--out", tmp_path/"u.png"), "expected a .safetensors file", "a folder")
    assert not (tmp_path/"s").exists()

def test_a_start_that_failed_leaves_no_trace_in_another_run(tmp_path):
    error(posefree("train", "--out", tmp_path/"r", "--kimg", 1, "--start", "portraits-small", "--portraits", 0), "at least 1 portrait")
    assert posefree("train", "--out", tmp_path/"r", "--device", "cpu", "--no-progress", "--portraits", 12, "--size", 16, "--batch", 8, "--kimg", .008)[0] == 0
    assert "started_from" not in json.loads((tmp_path/"r"/"generator.json").read_text())

def test_an_encoder_of_another_generator_is_refused(tmp_path, monkeypatch):
    from posefree_kit.checkpoints import ASSETS
    for ext in ("safetensors", "json"): shutil.copy(ASSETS/"generators"/f"portraits-small.{ext}", tmp_path); shutil.copy(ASSETS/"latent_encoders"/f"portraits.{ext}", tmp_path/f"latent_encoder.{ext}")
    error(posefree("train", "--out", tmp_path/"r", "--kimg", 1, "--start", tmp_path/"portraits-small.safetensors", "--encode", .5), "latent_encoder.safetensors", "another generator", "move it away")
    (tmp_path/"latent_encoder.safetensors").unlink(); monkeypatch.chdir(tmp_path)
    assert cli.own_encoder(load_generator("portraits-small", "cpu"), "portraits-small.safetensors") is None   # a bare name of a file has a folder too

def test_train_with_a_discriminator_that_is_not_told_the_pose(tmp_path):
    train = lambda out, *a: posefree("train", "--out", out, "--device", "cpu", "--no-progress", "--no-pose-conditioned", "--portraits", 12, "--batch", 8, *a)
    code, _, err = train(tmp_path/"r", "--kimg", .008, "--size", 16)
    assert code == 0, err
    card = json.loads((tmp_path/"r"/"generator.json").read_text())
    assert card["discriminator"]["pose_conditioned"] is False and load_generator(tmp_path/"r"/"generator.safetensors", "cpu").read_pose(torch.zeros(1, 3, 16, 16)).stack().shape == (1, 2)
    assert train(tmp_path/"r", "--kimg", .016, "--resume")[0] == 0                 # the same command goes on
    error(train(tmp_path/"r", "--kimg", 1, "--resume", "--seed", 9), "settings that the run", "--seed 9")
    error(posefree("train", "--out", tmp_path/"r", "--kimg", 1, "--resume", "--start", "portraits"), "alone, got --start too")
    error(train(tmp_path/"s", "--kimg", 1, "--start", tmp_path/"r"/"generator.safetensors"), "--start", "from nothing")
    assert posefree("train", "--out", tmp_path/"t", "--device", "cpu", "--no-progress", "--portraits", 12, "--batch", 8, "--kimg", .008, "--size", 16)[0] == 0
    error(train(tmp_path/"t", "--kimg", 1, "--resume"), "--no-pose-conditioned", "began with it")

def test_train_on_a_folder(home, tmp_path):
    (tmp_path/"pictures").mkdir()
    for i in range(3): shutil.copy(home/"a.png", tmp_path/"pictures"/f"{i}.png")
    code, _, err = posefree("train", "--out", tmp_path/"r", "--images", tmp_path/"pictures", "--kimg", .008, "--size", 16, "--batch", 8, "--device", "cpu", "--no-progress")
    assert code == 0, err
    card = json.loads((tmp_path/"r"/"generator.json").read_text())
    assert card["images"] == 3 and str(tmp_path) not in json.dumps(card)        # a card that is passed on names no folder

def test_train_on_plain_portraits_first_compiled_and_watched(tmp_path, monkeypatch):
    monkeypatch.setattr("posefree_kit.training.watch_poses", lambda size: watch_poses(size, n=8))
    code, _, err = posefree("train", "--out", tmp_path/"r", "--kimg", .016, "--portraits", 8, "--plain", 8, "--size", 16, "--batch", 8, "--device", "cpu", "--no-progress", "--watch", *(("--compiled",) if COMPILER else ()))
    assert code == 0, err
    card = json.loads((tmp_path/"r"/"generator.json").read_text())
    assert card["plain_images"] == 8 and card["images"] == 8 and load_generator(tmp_path/"r"/"generator.safetensors", "cpu").resolution == 16
    log = [json.loads(line) for line in (tmp_path/"r"/"log.jsonl").read_text().splitlines()]
    assert any({"yaw_r", "true_yaw_sd"} <= set(row) | set(row.get("watch", {})) for row in log), log[-1]   # what the onlooker saw

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")

@needs_compiler
def test_compiled_inversion_is_the_same_inversion(home, tmp_path):
    torch.manual_seed(0)
    G = PoseFreeGenerator(GeneratorConfig(channels=(16, 16, 16), render_resolution=16, samples=8)).start(0)
    save_checkpoint(tmp_path/"g.safetensors", G, Discriminator(DiscriminatorConfig(channels=(16, 16, 16), group=1)))
    for out, extra in (("plain", ()), ("fast", ("--compiled",))):
        code, _, err = posefree("invert", home/"a.png", "--out", tmp_path/out, "--generator", tmp_path/"g.safetensors", "--device", "cpu", "--steps", 2, "--no-progress", *LIGHT, *extra)
        assert code == 0, err
    a, b = (load_image(tmp_path/out/"a"/"reconstruction.png") for out in ("plain", "fast"))
    assert (a - b).abs().max() < .05                                            # rounding, grown by a few steps of Adam
    error(posefree("invert", home/"a.png", "--out", tmp_path/"no", "--generator", home/"small.safetensors", "--device", "cpu", "--compiled"), "compiled march: expected")

def test_without_a_compiler_it_is_told(home, tmp_path, monkeypatch):
    from posefree_kit.generator import march_library
    monkeypatch.setenv("CXX", "no-such-compiler")
    march_library.cache_clear()
    try:
        error(posefree("train", "--out", tmp_path/"r", "--kimg", .008, "--portraits", 8, "--size", 16, "--batch", 8, "--device", "cpu", "--no-progress", "--compiled"), "expected a C++ compiler (no-such-compiler")
        what, how, state = cli._try("compiled march", cli._compiled, "missing")
        assert state == "missing" and "no-such-compiler" in how
    finally: march_library.cache_clear()

def test_doctor_says_what_is_there():
    code, said, _ = posefree("doctor")
    assert next(line for line in said.splitlines() if "compiled march" in line).startswith("ok" if COMPILER else "missing")
    assert "torch" in said and "MTCNN" in said and "generator portraits" in said and "encoder portrait-eval" in said
    assert code == (1 if "broken" in said else 0)
    shipped = [line for line in said.splitlines() if " generator " in f" {line[9:]}" or " encoder " in f" {line[9:]}" or "pose oracle" in line]
    assert len(shipped) > 8 and all(line.startswith("ok ") for line in shipped), shipped

def test_the_function_is_the_command(home, tmp_path):
    outcome = cli.invert([home/"a.png"], tmp_path, generator=str(home/"small.safetensors"), device="cpu", steps=1, mesh=False, video=False, progress=False)
    assert outcome.exit_code == 0 and outcome.reports[0]["steps"] == 1
    with pytest.raises(InputError, match="at least 1 step"): cli.invert([home/"a.png"], tmp_path, steps=0)

def test_help_is_quick_and_complete():
    p = subprocess.run([sys.executable, "-c", "import sys; from posefree_kit.cli import app\ntry: app(['--help'])\nfinally: print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"], capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.strip().endswith("[]")
    for name in ("invert", "render", "portraits", "train", "doctor"): assert name in p.stdout and posefree(name, "--help")[0] == 0
    options = posefree("invert", "--help")[1]
    from posefree_kit.optimiser import InvertConfig
    assert all(f"--{word} " in options for word in ("preset", "space", "seed", "perceptual", "identity")) and {"preset", "space", "seed", "perceptual", "identity"} <= set(InvertConfig.__dataclass_fields__)


def test_compiled_is_for_cpus():
    import torch
    from posefree_kit.cli import march_for
    march_for(True, torch.device("cpu")); march_for(False, torch.device("cuda"))
    with pytest.raises(InputError, match="--compiled: expected a CPU, got cuda"): march_for(True, torch.device("cuda"))

def test_options_that_nothing_would_come_of_are_refused(home, tmp_path):
    error(posefree("scale", "--input", home, "--out", tmp_path/"o", "--local", "--workers", 3), "expected --local", "or --workers 3, got both")
    error(posefree("scale", "--input", home, "--out", tmp_path/"o", "--local", "--address", "auto"), "expected --local", "or --address, got both")

def test_a_generator_without_its_run_is_not_replaced(tmp_path):
    (tmp_path/"generator.safetensors").write_bytes(b"somebody's")
    error(posefree("train", "--out", tmp_path, "--minutes", 1), "with generator.safetensors in it")
    assert (tmp_path/"generator.safetensors").read_bytes() == b"somebody's"

def test_a_judge_is_not_in_the_loss(home, tmp_path):
    for option in ("--identity", "--perceptual"): error(posefree("invert", home/"a.png", "--out", tmp_path/"o", "--generator", home/"small.safetensors", "--device", "cpu", option, "portrait-eval"), "which judges the result")
