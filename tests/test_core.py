"Files, shapes, seeds, configuration: what must hold for any input."
import copy, dataclasses, os, struct, threading, time, zlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from posefree_kit.benchmark import report_paths
from posefree_kit.core import InputError, check_shape, config_from_dict, config_hash, config_to_dict, ending, image_grid, load_image, resize, resolve_device, rng, save_image, whole_file


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_check_shape_binds_every_letter(shape):
    letters = "ABCD"[:len(shape)]
    assert check_shape(torch.zeros(shape), " ".join(letters)) == dict(zip(letters, shape))
    with pytest.raises(InputError): check_shape(torch.zeros(shape + [1]), " ".join(letters))


@pytest.mark.parametrize("mode,ok", [("RGB", 1), ("L", 1), ("P", 1), ("CMYK", 1), ("RGBA", 1), ("LA", 1), ("1", 1), ("I;16", 0), ("F", 0)])
def test_image_modes(tmp_path, mode, ok):
    path = tmp_path / f"x.{'tiff' if mode in ('CMYK', 'F') else 'png'}"
    Image.new(mode, (6, 6)).save(path)
    if ok: assert load_image(path).shape == (1, 3, 6, 6)
    else:
        with pytest.raises(InputError, match="8 bits"): load_image(path)


@pytest.mark.parametrize("colour,channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused(tmp_path, colour, channels):
    "Pillow opens 16-bit colour as 8 bits and says nothing; the header does"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for bits in (8, 16):
        rows = (b"\0" + b"\x80" * (4 * channels * bits // 8)) * 4
        (tmp_path / f"{bits}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert load_image(tmp_path / "8.png").shape == (1, 3, 4, 4)
    with pytest.raises(InputError, match="8 bits a channel"): load_image(tmp_path / "16.png")


def test_sixteen_bits_of_other_formats(tmp_path):
    for most, ok in ((255, True), (65535, False)):
        (tmp_path / "x.ppm").write_bytes(b"P6 2 2 %d\n" % most + b"\1" * 12 * (2 if most > 255 else 1))
        if ok: assert load_image(tmp_path / "x.ppm").shape == (1, 3, 2, 2)
        else:
            with pytest.raises(InputError, match="8 bits a channel"): load_image(tmp_path / "x.ppm")


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_not_an_image(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError): load_image(tmp_path / "x.png")


def test_truncated_jpeg(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="readable"): load_image(tmp_path / "x.jpg")


def test_bomb_is_refused_before_decoding(tmp_path):
    import struct, zlib
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    (tmp_path / "b.png").write_bytes(head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    with pytest.raises(InputError, match="expected at most"): load_image(tmp_path / "b.png")


def test_exif_orientation(tmp_path):
    img = Image.new("RGB", (8, 4)); exif = img.getexif(); exif[0x0112] = 6
    img.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").shape == (1, 3, 8, 4)


def test_saved_images_carry_no_metadata(tmp_path):
    save_image(torch.zeros(1, 3, 4, 4), tmp_path / "x.png")
    assert not Image.open(tmp_path / "x.png").info


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_resize_keeps_constants(a, b):
    assert torch.allclose(resize(torch.full((1, 3, a, a), .3), b), torch.full((1, 3, b, b), .3), atol=1e-5)


def test_whole_file_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with whole_file(tmp_path / "a.txt") as t: t.write_text("half"); raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError): 
        with whole_file(tmp_path / "a.txt" / "b.txt" if (tmp_path / "a.txt").write_text("x") else None) as t: t.write_text("y")


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    failed, together = [], threading.Barrier(4)
    def write(text):
        try:
            for _ in range(5):
                together.wait()
                with whole_file(tmp_path/"a.txt") as t: t.write_text(text); time.sleep(.002)
        except InputError as e: failed.append(e); together.abort()
    threads = [threading.Thread(target=write, args=(c * 99,)) for c in "abcd"]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed and len(set((tmp_path/"a.txt").read_text())) == 1 and [p.name for p in tmp_path.iterdir()] == ["a.txt"]

def test_what_a_killed_process_left_is_cleared_away_and_that_of_others_stays(tmp_path):
    with whole_file(tmp_path/"a.txt") as t: t.write_text("x"); name = t.name
    gone, here = name.replace(f"-{os.getpid()}-", "-999999999-"), name
    for n in (gone, here): (tmp_path/n).write_text("half")
    with whole_file(tmp_path/"a.txt") as t: t.write_text("y")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", here}

def test_names_of_pictures_that_cannot_be_are_refused(tmp_path):
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(InputError, match="expected an image file"): load_image(name)
    for name in ("noext", "x.xyz"):
        with pytest.raises(InputError, match="ending that can be written"): save_image(torch.zeros(1, 3, 4, 4), tmp_path/name)
    assert not list(tmp_path.iterdir())

def test_values_that_no_reader_would_take_are_not_written(tmp_path):
    from posefree_kit.core import save_values
    with pytest.raises(InputError, match="expected finite numbers"): save_values(dict(best=float("inf")), tmp_path/"a.state")
    assert not list(tmp_path.iterdir())

def test_a_value_that_grows_without_end_when_it_is_written_out_is_refused_at_once():
    from posefree_kit.core import _few, _short
    from posefree_kit.generator import GeneratorConfig
    v, w = (), [0.] * 1000
    for _ in range(60): v = (v, v)
    for _ in range(7): w = [w] * 1000
    before = time.perf_counter()
    for nest in (v, w):
        with pytest.raises(InputError, match="GeneratorConfig.pivot: expected at most 4096 items"): config_from_dict(GeneratorConfig, dict(pivot=nest))
        assert len(_short(nest)) < 60 and not _few({"a": nest})
    assert time.perf_counter() - before < .5 and _short((1, ["a", None])) == "(1, ['a', None])" and _short(2 ** 9000) == "int" and _short("a" * 999) == repr("a" * 60)

def test_config_hash_sees_every_field():
    from posefree_kit.generator import GeneratorConfig
    base = GeneratorConfig()
    for f in dataclasses.fields(base):
        other = copy.copy(base); object.__setattr__(other, f.name, "something else") # whatever a valid value would be
        assert config_hash(other) != config_hash(base), f.name
    assert config_from_dict(GeneratorConfig, config_to_dict(base)) == base


def test_missing_device():
    with pytest.raises(InputError): resolve_device("cuda:77")
    with pytest.raises(InputError): resolve_device("toaster")


def test_rng_streams_are_independent():
    a = rng(1); torch.randn(5); torch.manual_seed(3)
    assert torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=rng(1)))


def test_grid_shape(): assert image_grid(torch.zeros(7, 3, 5, 5), 4, pad=1).shape == (1, 3, 11, 23)


def test_hollow_networks_have_shapes_and_no_memory():
    from posefree_kit.core import Hollow
    from posefree_kit.generator import Generator, GeneratorConfig
    with Hollow(): empty = Generator(GeneratorConfig(channels=(8, 8)))
    full = Generator(GeneratorConfig(channels=(8, 8)))
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {k: (v.shape, v.dtype) for k, v in full.state_dict().items()}
    assert {p.device.type for p in empty.parameters()} == {"meta"} and {p.device.type for p in full.parameters()} == {"cpu"}


def test_what_goes_wrong_says_so(tmp_path):
    "Blocks that do not fail, full memory, cut files, values of another shape, a damaged archive"
    from posefree_kit.core import expect_fail, load_tensors, load_values, memory_advice, read_torch, save_tensors, save_values
    with pytest.raises(AssertionError, match="nothing failed"), expect_fail("anything"): pass
    with pytest.raises(AssertionError, match="expected an error with 'this'"), expect_fail("this"): raise InputError("that")
    with pytest.raises(InputError, match="take half"), memory_advice("take half"): raise torch.OutOfMemoryError("out of memory. Tried much")
    nest = {"a": [torch.ones(2), 1, None], 3: {"b": "text"}}
    save_values(nest, tmp_path/"whole.state")
    back = load_values(tmp_path/"whole.state")
    assert torch.equal(back["a"].pop(0), torch.ones(2)) and back == {"a": [1, None], 3: {"b": "text"}}
    (tmp_path/"cut.state").write_bytes((tmp_path/"whole.state").read_bytes()[:-3])
    with pytest.raises(InputError, match="expected a whole .safetensors file"): load_tensors(tmp_path/"cut.state")
    save_tensors({}, tmp_path/"other.state", format="posefree_kit values 1", tree={"tensor": 5})
    with pytest.raises(InputError, match="expected values by name"): load_values(tmp_path/"other.state")
    with pytest.raises(InputError, match="expected a file of tensors, got noise"): read_torch(b"noise", "noise")

def test_an_ending_is_appended_once():
    names = lambda *paths: [ending(p, ".json").as_posix() for p in paths]
    assert names("run", "run.json", "a/run-0.5", "run.safetensors") == ["run.json", "run.json", "a/run-0.5.json", "run.safetensors.json"]
    assert [p.name for p in report_paths("cpu-2.8")] == ["cpu-2.8.json", "cpu-2.8.md"] == [p.name for p in report_paths("x/cpu-2.8.md")]


def test_a_turned_photograph_with_a_tag_that_cannot_be_written_is_read(tmp_path):
    from PIL import Image
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x011A] = 72.
    picture = Image.new("RGB", (6, 4)); picture.putpixel((0, 0), (255, 255, 255)); picture.save(tmp_path/"a.png", exif=exif)
    x = load_image(tmp_path/"a.png")
    assert x.shape[-2:] == (6, 4) and x[0, :, 0, 3].min() > .9                       # what was at the left is at the top, on the right
    from posefree_kit import core
    bad = Image.Exif(); bad._loaded = True; bad._data = {0x0112: 3, 0x0213: 70000}
    odd = Image.new("RGB", (2, 1)); odd.putpixel((0, 0), (255, 0, 0)); odd._exif = bad; odd.info["exif"] = b"x"
    assert core._upright(odd).getpixel((1, 0)) == (255, 0, 0)
    for turn in range(1, 9):                                                         # a TIFF turns itself
        exif = Image.Exif(); exif[0x0112] = turn; picture.save(tmp_path/"a.png", exif=exif); picture.save(tmp_path/"a.tiff", exif=exif)
        assert torch.equal(load_image(tmp_path/"a.png"), load_image(tmp_path/"a.tiff")), turn

def grey_profile(gamma:float) -> bytes: # the smallest of a grey picture
    xyz = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(78), b"cprt": b"text" + bytes(4) + b"-\0", b"wtpt": xyz, b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, int(gamma * 256))}
    body, table, at = b"", struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags)
    for name, data in tags.items(): table += name + struct.pack(">II", at + len(body), len(data)); body += data + bytes(-len(data) % 4)
    size = at + len(body)
    return struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp" + bytes(28) + xyz[8:] + bytes(48) + table + body

def test_grey_with_transparency_has_a_profile_too(tmp_path):
    for mode, value, extra in (("L", 64, {}), ("LA", (64, 255), {}), ("L", 64, dict(transparency=0))):
        Image.new(mode, (2, 2), value).save(tmp_path/"a.png", icc_profile=grey_profile(1.), **extra)
        assert load_image(tmp_path/"a.png").mean() == pytest.approx(137 / 127.5 - 1, abs=.02), (mode, extra)

def test_colours_of_a_profile_are_brought_to_srgb(tmp_path):
    from PIL import Image, ImageCms
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (2, 2), (200, 30, 90)).save(tmp_path/"same.png", icc_profile=lab)
    Image.new("RGB", (2, 2), (200, 30, 90)).save(tmp_path/"broken.png", icc_profile=b"no profile")
    plain = torch.tensor([200., 30, 90]) / 127.5 - 1
    for name in ("same", "broken"): assert torch.allclose(load_image(tmp_path/f"{name}.png")[0, :, 0, 0], plain, atol=1e-6)
    odd = lab.replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be")).replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ") # red is green there
    for mode, extra in (("RGB", ()), ("RGBA", (255,))):
        Image.new(mode, (2, 2), (200, 30, 90, *extra)).save(tmp_path/"odd.png", icc_profile=odd)
        assert torch.allclose(load_image(tmp_path/"odd.png")[0, :, 0, 0], plain[[1, 0, 2]], atol=.03)
    Image.new("RGB", (2, 2), (200, 30, 90)).save(tmp_path/"key.png", icc_profile=odd, transparency=(200, 30, 90))
    assert (load_image(tmp_path/"key.png") == 1).all()                               # what is transparent stays so
    for mode in ("P", "PA"):                                                          # a palette's colours are of the profile too
        picture = Image.new("RGB", (2, 2), (200, 30, 90)).convert("P", palette=Image.Palette.ADAPTIVE).convert(mode)
        picture.save(tmp_path/"palette.tiff" if mode == "PA" else tmp_path/"palette.png", icc_profile=odd)
        assert torch.allclose(load_image(tmp_path/("palette.tiff" if mode == "PA" else "palette.png"))[0, :, 0, 0], plain[[1, 0, 2]], atol=.03), mode
    from posefree_kit import core
    wide = Image.new("RGBA", (2, 2), (200, 30, 90, 77)); wide.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert core._srgb(wide) is wide                                                  # a profile of another kind than the picture: the numbers as they stand
