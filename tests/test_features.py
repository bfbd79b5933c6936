"Chapter 10: our encoders as shipped, their files, and the real loading code of the borrowed networks on small or random weights written here."
import io
import json
import math
import shutil
import socket
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from posefree_kit.core import InputError, config_to_dict, load_values, rng, save_values, sha256
from posefree_kit.features import (OURS, SHIPPED, EncoderConfig, EncoderTraining, PortraitEncoder, Trainer, arcface_logits, assets, augment, backends, calibrate, decode,
                                   default_identity, default_perceptual, encoder_card, fold, freeze, load_encoder, load_identity, load_perceptual, lpips_alex, perceptual_distance,
                                   photograph, save_encoder, train_encoder, verify)
from posefree_kit.portraits import HELD_OUT, portrait_batch

TINY = EncoderConfig(widths=(4, 6, 8), blocks=(1, 1), dim=8)

@pytest.fixture(scope="module")
def portraits(): return portrait_batch(range(HELD_OUT + 500, HELD_OUT + 506), 64).image

@pytest.fixture
def noise(): return torch.rand(2, 3, 64, 64, generator=rng(0)) * 2 - 1

@pytest.fixture
def no_caches(tmp_path, monkeypatch):
    "Empty caches, and no way out"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    return tmp_path

def gradient_flows(loss, image):
    image = image.clone().requires_grad_()
    loss(image).sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().max() > 0

# ArcFace and the perceptual distance

def test_arcface_without_margin_is_softmax_and_with_margin_is_harder():
    cos, label = torch.rand(16, 9, generator=rng(1)) * 2 - 1, torch.arange(16) % 9
    assert torch.allclose(arcface_logits(cos, label, 0., 5.), 5 * cos, atol=1e-4)
    logits = arcface_logits(cos, label, .4, 5.)
    assert (logits.gather(1, label[:, None]) < 5 * cos.gather(1, label[:, None])).all()
    other = torch.ones_like(cos, dtype=torch.bool).scatter(1, label[:, None], False)
    assert torch.equal(logits[other], (5 * cos)[other])
    assert math.isclose(float(arcface_logits(torch.tensor([[math.cos(1.)]]), torch.tensor([0]), .4, 1.)), math.cos(1.4), abs_tol=1e-5)

@pytest.mark.parametrize("name", OURS)
def test_perceptual_distance(name, portraits):
    psi = load_perceptual(name)
    a, b = portraits, portraits.roll(1, 0)
    assert psi.distance(a, a).abs().max() == 0 and torch.allclose(psi.distance(a, b), psi.distance(b, a))
    assert .3 < psi.distance(a, b).mean() < .8                                             # strangers are about 0.5 apart
    blurred = [F.interpolate(F.avg_pool2d(a, k), 64, mode="bilinear") for k in (2, 4, 8)]
    steps = torch.stack([psi.distance(a, x) for x in blurred])
    assert (steps[0] > 0).all() and (steps.diff(dim=0) > 0).all()                          # more blur, further away
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    assert psi.distance(a, a * mask - (1 - mask), mask).max() == 0 < psi.distance(a, b, mask).min()
    gradient_flows(lambda x: psi.distance(x, b), a)
    x = a.clone().requires_grad_()
    psi.distance(x, a).sum().backward()
    assert x.grad.abs().max() == 0                                                         # at the minimum: no slope, and no NaN

# the shipped encoders

def test_two_encoders_that_differ():
    a, b = (encoder_card(OURS[n]) for n in ("portrait", "portrait-eval"))
    assert a["config"]["widths"] != b["config"]["widths"] and a["config"]["kernel"] != b["config"]["kernel"] and a["config"]["blocks"] != b["config"]["blocks"]
    seen = [[(c["training"]["seed"], range(c["first_seed"], c["first_seed"] + c["people"])) for c in card["courses"]] for card in (a, b)]
    for seed, people in seen[0]: assert all(seed != other and not set(people) & set(them) for other, them in seen[1])
    for name in OURS.values():
        card = encoder_card(name)
        config, courses = SHIPPED[name]                                                     # the recipe in the chapter is the recipe of the file
        assert card["config"] == config_to_dict(config) and card["courses"] == [config_to_dict(c) for c in courses]
        strangers, siblings = card["verification"]["strangers"], card["verification"]["siblings"]
        assert max(c.seeds()[-1] for c in courses) < HELD_OUT <= min(strangers["first_seed"], siblings["first_seed"])
        assert card["bytes"] < 1_500_000 and strangers["auc"] > .95 and siblings["auc"] > .7

@pytest.mark.parametrize("name", OURS)
def test_people_that_were_never_seen(name):
    embed, people = load_identity(name).embed, range(HELD_OUT + 700, HELD_OUT + 720)
    found = verify(embed, portrait_batch, people)
    assert found["auc"] > .95 and found["same"] > found["different"] + .3 and found["top1"] > .8, found
    assert .7 < verify(embed, portrait_batch, people, family=4)["auc"] < found["auc"]        # siblings are harder, and still not one person

def test_verification_can_fail():
    people = range(HELD_OUT + 700, HELD_OUT + 720)
    blind = verify(lambda x: F.normalize(x.mean((2, 3)) + .01, dim=-1), portrait_batch, people, size=16)
    assert blind["auc"] < .8 and blind["top1"] < .5, blind

@pytest.mark.parametrize("name", OURS)
def test_an_identity_is_a_frozen_unit_vector(name, portraits):
    phi = load_identity(name)
    assert torch.allclose(phi.embed(portraits).norm(dim=-1), torch.ones(len(portraits)), atol=1e-5)
    assert not any(p.requires_grad for p in phi.parameters()) and not phi.train().network.training
    assert torch.allclose(phi.embed(portraits)[:1], phi.embed(portraits[:1]), atol=1e-5)     # a batch is only a batch
    gradient_flows(lambda x: 1 - phi.similarity(x, portraits.roll(1, 0)), portraits)
    for size in (32, 96, 128): assert phi.embed(torch.zeros(1, 3, size, size)).shape == phi.embed(portraits[:1]).shape
    assert phi.similarity(F.avg_pool2d(portraits, 2), portraits).min() > .7                  # half the resolution is still the same person
    flipped = phi.similarity(portraits, portraits.flip(-1)).mean()
    assert flipped < .99, "the encoder cannot tell left from right"

def test_a_damaged_asset_is_refused(tmp_path):
    for f in assets().glob("portrait-id.*"): shutil.copy(f, tmp_path)
    path = tmp_path/"portrait-id.safetensors"
    assert load_perceptual("portrait", weights=path).name == "portrait"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="expected sha256"): load_encoder(path)
    path.write_bytes(data[:5000])
    with pytest.raises(InputError, match="expected sha256"): load_identity("portrait", weights=path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(InputError, match="model card"): load_encoder(path)
    with pytest.raises(InputError, match="no-such|No such"): load_encoder(tmp_path/"no-such.safetensors")

def test_an_encoder_survives_its_file(tmp_path, noise):
    net = calibrate(freeze(PortraitEncoder(TINY)), torch.cat([noise, -noise]))
    save_encoder(net, tmp_path/"tiny.safetensors", note="random")
    again = load_encoder(tmp_path/"tiny.safetensors")
    assert again.card["note"] == "random" and torch.allclose(again(noise), net(noise), atol=2e-2)
    card = json.loads((tmp_path/"tiny.json").read_text())
    card["config"]["dim"] = 9
    (tmp_path/"tiny.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="expected shape"): load_encoder(tmp_path/"tiny.safetensors")

# training

def test_training_learns_and_resumes_exactly(tmp_path):
    people = photograph(portrait_batch, range(6), 4, size=32)
    training, losses = EncoderTraining(steps=30, batch=16, margin=0., seed=3, bfloat16=False), []
    config = EncoderConfig(widths=(6, 8, 12), blocks=(1, 1), dim=8, size=32)
    whole = train_encoder(people, config, training, state=tmp_path/"first.state", callback=lambda step, loss, right: losses.append(loss))
    assert sum(losses[-5:]) < .8 * sum(losses[:5])
    first = Trainer(config, training, 6)
    for _ in range(11): first.update(people)
    save_values(first.state() | dict(made=load_values(tmp_path/"first.state")["made"]), tmp_path/"first.state") # as if it had been stopped after 11 steps
    resumed = train_encoder(people, config, training, state=tmp_path/"first.state")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())

def test_a_state_is_gone_on_with_by_its_own_training_alone(tmp_path):
    people = torch.randint(0, 256, (3, 2, 3, 16, 16), generator=rng(0), dtype=torch.uint8)
    config, training, state = EncoderConfig(widths=(4, 6), blocks=(1,), dim=4, size=16), EncoderTraining(steps=1, batch=4, bfloat16=False), tmp_path/"a.state"
    ask = lambda pictures=people, config=config, training=training, start=None: train_encoder(pictures, config, training, start, state)
    net = ask(); ask()
    for other, given in dict(pictures=dict(pictures=255 - people), config=dict(config=replace(config, dim=6)), training=dict(training=replace(training, seed=1)), start=dict(start=net.state_dict())).items():
        with pytest.raises(InputError, match=f"a.state: expected the state of this training, got one of another {other}: delete it"): ask(**given)
    for old in (Trainer(config, training, 3).state(), [1]):
        save_values(old, state)
        with pytest.raises(InputError, match="a.state: expected a state that says which training it is of"): ask()

def test_a_family_shares_looks_and_clothes_change():
    seen = []
    def render(seeds, size, **given):
        seen.append(given)
        return portrait_batch(seeds, size, **given)
    people = photograph(render, range(8), 2, size=8, family=4, dress=True)
    given = seen[-1]
    assert people.shape == (8, 2, 3, 8, 8) and len(set(given["hair_tone"].tolist())) == 2 and given["hair"][:8] == given["hair"][:1] * 8
    assert len(set(given["cloth_hue"].tolist())) == 16
    assert torch.equal(people, photograph(portrait_batch, range(8), 2, size=8, family=4, dress=True))

def test_augmentation_never_mirrors():
    x = torch.zeros(64, 3, 64, 64)
    x[..., :32] = .5
    y = augment(x, rng(0))
    assert (y[..., :24].mean((1, 2, 3)) > y[..., 40:].mean((1, 2, 3))).all() and y.abs().max() <= 1

# borrowed networks: the real loading code on files made here

@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_lpips_equals_the_library(net, tmp_path, noise, monkeypatch):
    lpips = pytest.importorskip("lpips")
    import torchvision
    if net != "squeeze": # large classifiers that LPIPS throws away need no random numbers
        monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
        monkeypatch.setattr(torch.nn.init, "normal_", lambda x, *a, **k: x)
    torch.manual_seed(0)
    make = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1, "vgg": torchvision.models.vgg16}[net]
    backbone = {k: v for k, v in make(weights=None).state_dict().items() if k.startswith("features")}
    other = {f"classifier.{i}.{k}": torch.zeros(2) for i in (0, 1, 3, 4, 6) for k in ("weight", "bias")} # what published files hold besides, under numbers that the backbone has too
    torch.save(backbone | other, tmp_path/"backbone.pth")
    psi = load_perceptual(f"lpips-{net}", weights=tmp_path/"backbone.pth")
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for k in theirs.net.state_dict(): theirs.net.state_dict()[k].copy_(backbone["features." + k.split(".", 1)[1]])
    with torch.no_grad(): expected = theirs(noise[:1], noise[1:]).flatten()
    assert torch.allclose(psi.distance(noise[:1], noise[1:]), expected, rtol=1e-3, atol=1e-6) and expected > 1e-4
    gradient_flows(lambda x: psi.distance(x, noise[1:]), noise[:1])
    torch.save({k: v for k, v in list(backbone.items())[2:]}, tmp_path/"part.pth")
    with pytest.raises(InputError, match="expected slice1.0.weight .* got none"): load_perceptual(f"lpips-{net}", weights=tmp_path/"part.pth")

def test_lpips_finds_torchs_cache_and_checks_the_hash(no_caches):
    import torchvision
    folder = no_caches/"torch"/"hub"/"checkpoints"
    folder.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder/"squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(InputError, match="sha256 begins with b8a52dc0"): load_perceptual("lpips-squeeze")
    assert lpips_alex() is None                                                         # not there: left out
    (folder/"alexnet-owt-7be5be79.pth").write_bytes(b"cut short")
    with pytest.raises(InputError, match="sha256 begins with 7be5be79"): lpips_alex()   # there, and damaged: said
    assert lpips_alex(used="lpips-alex") is None

def test_facenet_from_a_file(tmp_path, noise, monkeypatch):
    facenet_pytorch = pytest.importorskip("facenet_pytorch")
    torch.manual_seed(0)
    net = facenet_pytorch.InceptionResnetV1(pretrained=None).eval()
    torch.save(net.state_dict() | {"logits.weight": torch.zeros(8631, 512), "logits.bias": torch.zeros(8631)}, tmp_path/"vggface2.pt")
    phi = load_identity("facenet", weights=tmp_path/"vggface2.pt")
    with torch.no_grad(): expected = net(F.interpolate(noise, 160, mode="bilinear", antialias=True) * 127.5 / 128)
    assert torch.allclose(phi.embed(noise), expected, atol=1e-4)
    gradient_flows(lambda x: phi.embed(x)[:, 0], noise)
    assert backends(load_perceptual(), phi)["identity"] == f"facenet (vggface2.pt sha256:{sha256(tmp_path/'vggface2.pt')[:12]})"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch")) # and from the cache, whose file's name holds no hash
    cached = tmp_path/"torch"/"checkpoints"/"20180402-114759-vggface2.pt"; cached.parent.mkdir(parents=True); (tmp_path/"vggface2.pt").rename(cached)
    with torch.no_grad(): assert torch.allclose(load_identity("facenet").embed(noise), expected, atol=1e-4)

def test_clip_from_a_file(tmp_path, noise, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file
    config = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8), text_cfg=dict(context_length=8, vocab_size=64, width=16, heads=1, layers=1))
    (tmp_path/"configs").mkdir()
    (tmp_path/"configs"/"tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path/"configs")
    torch.manual_seed(0)
    net = open_clip.create_model("tiny-test").eval()
    save_file(net.state_dict(), tmp_path/"tiny.safetensors")
    phi = load_identity("clip:tiny-test", weights=tmp_path/"tiny.safetensors")
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1), torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    with torch.no_grad(): expected = net.encode_image((F.avg_pool2d(noise, 2) / 2 + .5 - mean) / std, normalize=True)
    assert torch.allclose(phi.embed(noise), expected, atol=1e-5)
    gradient_flows(lambda x: phi.embed(x)[:, 0], noise)
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pt")
    with pytest.raises(InputError, match="tiny-test"): load_identity("clip:tiny-test", weights=tmp_path/"other.pt")
    with pytest.raises(InputError, match="expected a tag among none .*no tag., got 'odd'"): load_identity("clip:tiny-test/odd", weights=tmp_path/"tiny.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", dict(odd=dict(url="", quick_gelu=True, mean=(.5,) * 3, std=(.5,) * 3)))
    odd = load_identity("clip:tiny-test/odd", weights=tmp_path/"tiny.safetensors")  # what is in no file: the activation and the normalisation of a tag's weights
    theirs = open_clip.create_model("tiny-test", force_quick_gelu=True).eval(); theirs.load_state_dict(net.state_dict())
    with torch.no_grad(): assert torch.allclose(odd.embed(noise), theirs.encode_image(F.avg_pool2d(noise, 2), normalize=True), atol=1e-5) and not torch.allclose(odd.embed(noise), expected, atol=1e-3)

def test_a_clip_that_gives_tokens_too_and_one_whose_text_side_lies_elsewhere(tmp_path, noise):
    open_clip = pytest.importorskip("open_clip")
    tower = dict(context_length=8, vocab_size=64, width=16, heads=1, layers=1)
    config = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8, output_tokens=True), text_cfg=tower)
    (tmp_path/"configs").mkdir(); (tmp_path/"configs"/"tokens-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path/"configs")
    net = open_clip.create_model("tokens-test").eval(); torch.save(net.state_dict(), tmp_path/"tokens.pt")
    assert isinstance(net.visual(noise[:, :, :32, :32]), tuple)
    assert load_identity("clip:tokens-test", weights=tmp_path/"tokens.pt").embed(noise).shape == (2, 16)
    with pytest.raises(InputError, match="text side is open_clip's own"): load_identity("clip:roberta-ViT-B-32", weights=tmp_path/"tokens.pt")

def test_an_older_repository_has_another_file_and_the_libraries_errors_are_told(no_caches, monkeypatch):
    pytest.importorskip("open_clip")
    import huggingface_hub
    asked = []
    def head(request, **_):
        asked.append(request.full_url.rsplit("/", 1)[-1])
        if asked[-1].endswith(".safetensors"): raise urllib.error.HTTPError(request.full_url, 404, "Not Found", {}, None)
        return io.BytesIO()
    def fetch(repo, file): raise OverflowError(f"{file} is\ngated")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False); monkeypatch.setattr(urllib.request, "urlopen", head); monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(InputError, match="expected to download .*open_clip_pytorch_model.bin, got OverflowError: open_clip_pytorch_model.bin is gated: give weights=FILE"): load_identity("clip", download=True)
    assert asked == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]

@pytest.mark.parametrize("load,name,says", [
    (load_perceptual, "lpips-vgg", "vgg16-397923af.pth"), (load_perceptual, "lpips-alex", "alexnet-owt-7be5be79.pth"), (load_identity, "facenet", "20180402-114759-vggface2.pt"),
    (load_identity, "clip", "laion/CLIP-ViT-B-32"), (load_identity, "clip:ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai")])
def test_what_is_missing_is_refused_at_once_and_says_what_to_do(load, name, says, no_caches, monkeypatch):
    if name.startswith("clip"): pytest.importorskip("open_clip")
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or []) # nobody is looked up, so nobody is waited for
    with pytest.raises(InputError) as e: load(name)
    assert says in str(e.value) and "weights=FILE" in str(e.value) and "download=True" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="expected to reach .*HF_HUB_OFFLINE is set"): load(name, download=True)
    assert not asked

def test_wrong_requests(tmp_path):
    with pytest.raises(InputError, match="lpips-vgg"): load_perceptual("vgg")
    with pytest.raises(InputError, match="facenet"): load_identity("arcface")
    with pytest.raises(InputError, match="no such file"): load_identity("facenet", weights=tmp_path/"none.pt")
    (tmp_path/"text.pth").write_text("not tensors")
    with pytest.raises(InputError, match="file of tensors"): load_perceptual("lpips-squeeze", weights=tmp_path/"text.pth")
    with pytest.raises(InputError, match="image: expected shape"): load_identity("portrait").embed(torch.zeros(3, 64, 64))
    with pytest.raises(InputError, match="first image|second image"): load_perceptual("portrait").distance(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32))

def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self): return (print, ("executed",))
    torch.save({"features.0.weight": Bomb()}, tmp_path/"bomb.pth")
    with pytest.raises(InputError, match="file of tensors"): load_perceptual("lpips-squeeze", weights=tmp_path/"bomb.pth")

def test_the_domain_chooses():
    assert default_identity("faces") == "portrait" and default_identity("cats") == "clip"
    assert default_perceptual("faces") == "portrait" and default_perceptual("cats") == "lpips-vgg"
    told = backends(load_perceptual("portrait"), load_identity("portrait-eval"))
    assert list(told) == ["perceptual", "identity"]
    assert told["perceptual"].startswith("portrait (portrait-id.safetensors sha256:") and told["identity"].startswith("portrait-eval (portrait-id-eval.")
    assert backends(judge=load_identity("portrait-eval"), lpips=None) == dict(judge=told["identity"])

def test_distance_takes_any_features():
    a = torch.rand(2, 3, 8, 8)
    assert torch.allclose(perceptual_distance(lambda x: [x], a, a + .1), torch.full((2,), .03), atol=1e-6)
    assert decode(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_a_folded_encoder_is_the_same_function(noise):
    plain, folded = load_encoder("portrait-id-eval"), fold(load_encoder("portrait-id-eval"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) and not any(p.requires_grad for p in folded.parameters())
    for a, b in zip([*plain.features(noise), plain(noise)], [*folded.features(noise), folded(noise)]): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
