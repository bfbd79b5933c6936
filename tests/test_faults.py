"Hostile files, killed processes, full disks, numbers that are none: nothing runs, nothing is lost, and the error is one line."
import contextlib
import io
import pickle
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent/"fuzz"))

from fuzz import forget, fuzz, now_mb, peak_mb
from small import D8, G8, G16, corpus
from test_official import Call, torch_bytes

from posefree_kit import cli, training
from posefree_kit.checkpoints import import_official, load_generator, module_state, read_snapshot
from posefree_kit.core import DivergedError, InputError, load_image, load_tensors, load_values, parse_json, read_network, read_torch, save_tensors, save_values
from posefree_kit.optimiser import InvertState, Networks, Stage, quick, run
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.training import TrainConfig, UnposedImages, fit, load_state

# Nothing runs, and memory is bounded

watched, FORBIDDEN = [], {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile", "socket.connect", "shutil.rmtree", "os.remove", "os.rename", "os.putenv", "builtins.input"}

def hook(event, args): # for the life of the process; it looks only while `watched` holds a list
    if not watched: return
    source = args[0].co_filename if event == "exec" and isinstance(args[0], types.CodeType) else str(args[1]) if event == "compile" else "<"
    if event in FORBIDDEN and source.startswith("<") and not source.startswith("<frozen") or event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"): watched[-1].append((event, str(args)[:80]))
sys.addaudithook(hook)

@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    "Every reader has read a good file before: what libraries do when they are first imported is not what a file does"
    folder = tmp_path_factory.mktemp("warm")
    for p in corpus(folder)["images"]: load_image(p)
    for name in ("official.pkl", "official.pt", "official.safetensors"): import_official(folder/name, None if name.endswith("pkl") else folder/"official.json")
    load_generator(folder/"generator.safetensors", "cpu")

@contextlib.contextmanager
def harmless(megabytes=300., seconds=60.):
    "Neither runs anything, nor takes much memory or time: of the processor, and ten times what a slow one needed, since what swells without bound asks for hours"
    forget()
    before, start, seen = now_mb(), time.process_time(), []
    watched.append(seen)
    try: yield
    finally: watched.pop()
    assert not seen, seen
    assert peak_mb() - before < megabytes and time.process_time() - start < seconds

def names():
    bad = "os system|posix system|nt system|subprocess Popen|builtins eval|builtins exec|builtins getattr|builtins __import__|builtins open|builtins bytearray|builtins compile|__builtin__ eval|pickle loads|_pickle loads|torch load|torch.hub load|torch.serialization load|" \
          "numpy load|importlib import_module|operator attrgetter|functools partial|types CodeType|types FunctionType|codecs decode|shutil rmtree|os execv|runpy run_path|webbrowser open|ctypes CDLL|torch._utils _rebuild_sparse_tensor|torch nn.Module|copyreg _reconstructor|posefree_kit.cli invert"
    good = "torch._utils _rebuild_tensor_v2|torch._utils _rebuild_parameter|torch.storage _load_from_bytes|torch_utils.persistence _reconstruct_persistent_obj|collections OrderedDict|builtins set|numpy dtype|numpy.core.multiarray scalar|_codecs encode|dnnlib.util EasyDict|training.x Y|torch.nn.modules.linear Linear"
    return st.sampled_from(bad.split("|")), st.sampled_from(good.split("|"))

text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
values = st.sampled_from([b"N", b"}", b"]", b")", b"\x8f", b"K\x05", b"\x8a\x05\xff\xff\xff\xff\x7f", b"G" + struct.pack(">d", 1e300), text("echo"), text("__call__"), b"C\x04eval", b"\x88"])

@st.composite
def programs(draw):
    "Pickles that call, build and nest names that run things, mixed with those that are allowed"
    bad, good = names()
    ops, depth = [b"\x80\x04"], draw(st.integers(1, 6))
    for i in range(depth):
        module, name = draw(bad if draw(st.booleans()) or i == depth - 1 else good).split()
        args = b"(" + b"".join(draw(st.lists(values, max_size=3))) + b"t"
        how = draw(st.integers(0, 4))
        load = f"c{module}\n{name}\n".encode() if draw(st.booleans()) else text(module) + text(name) + b"\x93"
        ops.append([load + args + b"R", load + args + b"\x81", b"(" + args[1:-1] + f"i{module}\n{name}\n".encode(), b"(" + load + args[1:-1] + b"o", load + draw(values) + b"b"][how])
        if draw(st.booleans()): ops.append(draw(st.sampled_from([b"\x85R", b"0", b"q\x01", b"\x94", b"h\x01", b"2b", b"a", b"s"])))
    return b"".join(ops) + b"."

@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.booleans())
def test_pickles_that_call_are_refused(tmp_path_factory, program, wrapped):
    path = tmp_path_factory.getbasetemp()/"x.pkl"
    path.write_bytes(b"\x80\x04}" + text("G_ema") + program[2:-1] + b"s." if wrapped else program)
    with harmless(), pytest.raises(InputError): import_official(path)

def dag(depth=40):
    "Networks that hang in each other: 2^40 ways through"
    node = dict(state=dict(_modules={}))
    for _ in range(depth): node = dict(state=dict(_modules=dict(a=node, b=node)))
    return node

def claim(code, n, size=8): return b"\x80\x04" + code + n.to_bytes(size, "little") + b"x."

storage = pickle.dumps(torch_bytes(torch.zeros(50_000).storage()), 4)[2:-1]
BOMBS = dict(
    memo=b"\x80\x02}r" + (2 ** 31 - 1).to_bytes(4, "little") + b".", bytes=claim(b"\x8e", 2 ** 31), text=claim(b"\x8d", 2 ** 31), array=claim(b"\x96", 2 ** 31), frame=claim(b"\x95", 2 ** 31), integer=claim(b"\x8b", 2 ** 31 - 1, 4), old_text=claim(b"X", 2 ** 31 - 1, 4),
    sets=b"\x80\x04(" + b"\x8f" * 2_500_000 + b"l.", deep=b"\x80\x04" + b"(" * 1_000_000 + b".", doubled=b"\x80\x04]\x94" + b"h\x00h\x00\x86\x94" * 1000 + b".",
    again=b"\x80\x04ctorch.storage\n_load_from_bytes\n\x940" + storage + b"\x940" + b"(" + b"h\x00h\x01\x85R" * 3000 + b"l.", classes=b"\x80\x04(" + b"".join(f"ctraining.x\nC{i}\n".encode() for i in range(30_000)) + b"l.")

@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", BOMBS)
def test_claims_and_swellings_are_refused(name, tmp_path):
    (tmp_path/"x.pkl").write_bytes(BOMBS[name])
    with harmless(), pytest.raises(InputError, match="x.pkl"): import_official(tmp_path/"x.pkl")

def test_networks_in_each_other_end():
    with harmless(), pytest.raises(InputError, match="modules|expected a network"): module_state(dag(30))

def test_files_of_torch_cannot_swell(tmp_path):
    "Compressed records, byte arrays of any size, and calls"
    b = io.BytesIO(); torch.save(dict(a=torch.zeros(20_000_000)), b)
    with zipfile.ZipFile(io.BytesIO(b.getvalue())) as old, zipfile.ZipFile(tmp_path/"x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for i in old.infolist(): new.writestr(i.filename, old.read(i))
    assert (tmp_path/"x.pt").stat().st_size < 1_000_000
    del b
    with harmless(30.), pytest.raises(InputError, match="compressed"): read_torch(tmp_path/"x.pt", "x.pt")
    for what in (Call(bytearray, 2 ** 31), Call(print, "run")):
        for old in (True, False):
            torch.save(dict(a=what), tmp_path/"y.pt", _use_new_zipfile_serialization=not old)
            with harmless(), pytest.raises(InputError, match="y.pt"): read_torch(tmp_path/"y.pt", "y.pt")

def test_headers_are_checked_before_memory_is_taken(tmp_path):
    save_tensors(torch.nn.Linear(3, 2).state_dict(), tmp_path/"a.safetensors")
    with harmless(30.), pytest.raises(InputError, match="expected shape"): read_network(lambda: torch.nn.Linear(3, 10 ** 9), tmp_path/"a.safetensors")
    save_tensors({k: v.long() for k, v in torch.nn.Linear(3, 2).state_dict().items()}, tmp_path/"b.safetensors")
    with pytest.raises(InputError, match="type F16"): read_network(lambda: torch.nn.Linear(3, 2), tmp_path/"b.safetensors")
    save_tensors({k: v * float("nan") for k, v in torch.nn.Linear(3, 2).state_dict().items()}, tmp_path/"c.safetensors")
    with pytest.raises(InputError, match="finite"): read_network(lambda: torch.nn.Linear(3, 2), tmp_path/"c.safetensors")
    (tmp_path/"d.safetensors").write_bytes((2 ** 31).to_bytes(8, "little") + b"{}")
    with harmless(30.), pytest.raises(InputError, match="whole"): load_tensors(tmp_path/"d.safetensors")

@given(st.recursive(st.none() | st.booleans() | st.integers(-2 ** 62, 2 ** 62) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), x, max_size=4), max_leaves=12))
@settings(max_examples=60, deadline=None)
def test_values_come_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp()/"v.state"
    save_values(dict(v=value, t=torch.ones(2)), path)
    back = load_values(path)
    assert back["v"] == value and torch.equal(back["t"], torch.ones(2))

@pytest.mark.parametrize("bad", ["", "{", "NaN", '{"a": Infinity}', "[" * 100_000, "\ud800", b"\xff\xfe\x00", '{"a": ' + "9" * 10_000 + "}"])
def test_json_that_is_none(bad):
    with harmless(), pytest.raises(InputError, match="expected JSON in it"): parse_json(bad.encode(errors="surrogatepass") if isinstance(bad, str) else bad, "it")

# Images and names

def test_a_large_picture_is_made_smaller_and_others_are_not(tmp_path):
    Image.effect_noise((5000, 4000), 50).save(tmp_path/"a.bmp")
    with harmless(700.): x = load_image(tmp_path/"a.bmp")
    assert x.shape == (1, 3, 2000, 2500) and x.std() > .1
    Image.new("RGB", (30, 20)).save(tmp_path/"b.png"); assert load_image(tmp_path/"b.png").shape == (1, 3, 20, 30)

def test_formats_that_start_programs_are_not_read(tmp_path):
    (tmp_path/"a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(was_run) (w) file\n")
    with harmless(), pytest.raises(InputError, match="readable image"): load_image(tmp_path/"a.png")

@pytest.mark.parametrize("name", ["..png", "...png", ".png", "..", "a" * 251 + ".png", "ü" * 124 + ".png", " .png", "-rf.png", "a\nb.png", "../../x.png", "con.png"])
def test_every_name_stays_inside(name, tmp_path):
    job = types.SimpleNamespace(out=tmp_path/"out", taken={}, resume=False, overwrite=False)
    job.out.mkdir()
    folder = cli.claim(tmp_path/name, job) if name != ".." else tmp_path/"out"/"x"
    assert folder.resolve().parent == job.out.resolve() and (not folder.name.startswith("..") or folder.name in ("...png", "..png"))
    folder.mkdir(); save_values({}, folder/("n" * 250 + ".x"))                  # a long name has room for the temporary one
    with pytest.raises(InputError, match="different names"): cli.claim(folder.parent/name, job) if name != ".." else cli.claim(tmp_path/"x.png", types.SimpleNamespace(out=job.out, taken={folder: "x"}, resume=False, overwrite=False))

def test_a_folder_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path/"out").mkdir(); (tmp_path/"else").mkdir(); (tmp_path/"out"/"a").symlink_to(tmp_path/"else")
    with pytest.raises(InputError, match="inside"): cli.claim(tmp_path/"a.png", types.SimpleNamespace(out=tmp_path/"out", taken={}, resume=True, overwrite=True))

# Numbers that are none

def images(): return UnposedImages(torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))

def poisoned(monkeypatch, at):
    "g_loss is NaN in the calls `at`"
    calls, real = [0], training.g_loss
    def bad(*args): calls[0] += 1; return real(*args) * (float("nan") if calls[0] in at else 1.)
    monkeypatch.setattr(training, "g_loss", bad)

def test_training_goes_back_once_and_halves_the_rate(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {4})
    s = fit(images(), tmp_path, G8, D8, TrainConfig(batch=2), kimg=.01, save_minutes=0., device="cpu", progress=False)
    assert "loss g is nan at step 3" in s.trouble and s.seen == 10 and training.sound(s)
    rate = s.config.g_rate * s.config.density_every / (s.config.density_every + 1)
    assert s.opt_g.param_groups[0]["lr"] == rate / 2 and load_state(tmp_path/"run.state").trouble == s.trouble

def test_training_that_diverges_again_stops_with_what_it_has(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(4, 99))
    with pytest.raises(DivergedError, match="loss g is nan at step 3.*half the rate, loss g is nan") as e: fit(images(), tmp_path, G8, D8, TrainConfig(batch=2), kimg=.01, save_minutes=0., device="cpu", progress=False)
    kept = load_state(tmp_path/"run.state")
    assert e.value.state.seen == kept.seen == 6 and training.sound(kept) and training.sound(e.value.state)

class Pixels:
    "Stands in for the frozen networks; NaN in the calls `at`"
    name = source = "pixels"
    def __init__(self, at): self.calls, self.at = 0, at
    def distance(self, a, b, mask=None): self.calls += 1; return (a - b).square().mean((1, 2, 3)) * (float("nan") if self.calls in self.at else 1.)
    def features(self, x): return [x]
    def embed(self, x): return x.flatten(1)

def test_an_inversion_goes_back_once_and_halves_the_rate():
    torch.manual_seed(0)
    G = PoseFreeGenerator(G16).start().requires_grad_(False)
    target, config = G.sample(1, seed=3)[1].rgb, quick(stages=(Stage(4, 2, .02, False), Stage(4, 1, .01, True)))
    go = lambda at: run(Networks(G, Pixels(at), Pixels(())), target, config, InvertState(G.w_avg[None]))
    clean, once = go(()), go((3,))
    assert not clean.trouble and once.trouble == "rec is not finite at step 2 of 8" and [t["step"] for t in once.trace] == list(range(8)) and once.w.isfinite().all()
    assert [a["rate"] / b["rate"] for a, b in zip(clean.trace, once.trace)] == [1] + [2] * 7
    with pytest.raises(DivergedError, match="rec is not finite at step 2 of 8; a step back and at half the rate, rec at step 1") as e: go(range(3, 99))
    assert e.value.state.step == 1 and torch.equal(e.value.state.w, go_to(G, target, config, 1))

def go_to(G, target, config, n):
    return run(Networks(G, Pixels(()), Pixels(())), target, config, InvertState(G.w_avg[None]), lambda s: s.step + 1 < n).w

def test_full_device_memory_says_what_takes_less(tmp_path, monkeypatch):
    def full(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(InputError, match="CUDA out of memory: half of TrainConfig.batch .now 8; --batch 4"): fit(images(), tmp_path, G8, D8, TrainConfig(batch=8), kimg=.01, device="cpu", progress=False)

# The scripts, in short

def test_a_slice_of_the_fuzz(tmp_path):
    before, said = signal.getsignal(signal.SIGALRM), []
    found = fuzz(150, 1, tmp_path, say=said.append)
    signal.signal(signal.SIGALRM, before)
    assert not said, said
    assert sum(c.get("refused", 0) for c in found.values()) > 75

def test_a_few_kills(tmp_path):
    p = subprocess.run([sys.executable, Path(__file__).parent/"fuzz"/"kills.py", "--n", "2", "--only", "train"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    assert all(p.stdout.count(text) == 1 for text in ("survived", "on a full disk", "on Ctrl-C")), p.stdout
    assert int(p.stdout.split("kills in 2 runs")[0].split()[-1]) > 0, p.stdout       # some did hit


@pytest.mark.parametrize("make", (b"cdnnlib.util\nEasyDict\n", b"ccollections\nOrderedDict\n"))
def test_a_container_cannot_be_copied_without_end(make, tmp_path):
    "A dictionary of 2,000 items, and a list of 2,000 copies of it: 20 kB that would become 4,000,000 items"
    items = b"(" + b"".join(b"I%d\nI1\n" % i for i in range(2000)) + b"dp0\n0"
    (tmp_path/"x.pkl").write_bytes(b"\x80\x02" + items + make + b"p1\n0](" + b"g1\ng0\n\x85R" * 2000 + b"e.")
    with pytest.raises(InputError, match="1,000,000 items in all"): read_snapshot(tmp_path/"x.pkl")


def test_one_layer_under_many_names_is_counted_each_time():
    leaf = dict(state=dict(_parameters={f"p{i}": torch.zeros(1) for i in range(1000)}, _buffers={}, _modules={}))
    with pytest.raises(InputError, match="10,000 modules and tensors"): module_state(dict(state=dict(_parameters={}, _buffers={}, _modules={f"m{i}": leaf for i in range(300)})))
