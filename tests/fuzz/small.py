"Tiny networks and one file of every kind that the kit reads, for fuzzing and for faults."
import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posefree_kit.baselines import save_latent_encoder
from posefree_kit.latent_encoder import LatentEncoder, LatentEncoderConfig
from posefree_kit.checkpoints import save_checkpoint
from posefree_kit.core import config_to_dict, save_json, save_tensors, sha256
from posefree_kit.discriminator import Discriminator, DiscriminatorConfig
from posefree_kit.evaluation import OFFSETS, VIEWS
from posefree_kit.features import EncoderConfig, PortraitEncoder, save_encoder
from posefree_kit.generator import GeneratorConfig
from posefree_kit.optimiser import quick
from posefree_kit.pose import PoseFreeGenerator
from posefree_kit.training import TrainConfig, make_state, new_state, save_state

G16 = GeneratorConfig(channels=(16, 16, 16), plane_channels=8, decoder_hidden=16, render_resolution=16, samples=8)
D16 = DiscriminatorConfig(channels=(16, 16, 16), group=1)
G8, D8 = GeneratorConfig(channels=(8, 8), plane_channels=4, render_resolution=8, samples=6), DiscriminatorConfig(channels=(8, 8))

def generator(path) -> Path:
    "A small untrained generator with its discriminator"
    torch.manual_seed(0)
    return save_checkpoint(path, PoseFreeGenerator(G16).start(0), Discriminator(D16))

def picture(seed=0, side=24) -> Image.Image: return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))

def images(folder:Path) -> list:
    "One of every format, with the parts that decoders stumble over: EXIF, text, profiles, palettes, frames, transparency"
    img, made = picture(), []
    exif, text = img.getexif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010e] = 6, "a note"
    text.add_text("note", "x" * 300, zip=True)
    for name, im, more in (("a.png", img, dict(pnginfo=text, icc_profile=b"p" * 200)), ("b.jpg", img, dict(exif=exif)), ("c.gif", img, dict(save_all=True, append_images=[picture(1)])), ("d.webp", img, dict(exif=exif)), ("e.tiff", img, dict(compression="tiff_lzw")),
                           ("f.bmp", img, {}), ("g.ppm", img, {}), ("h.png", img.convert("P"), dict(transparency=3)), ("i.tiff", img.convert("CMYK"), {}), ("j.png", img.convert("RGBA"), {}), ("k.jpg", img.convert("L"), dict(progressive=True)), ("l.webp", img, dict(lossless=True))):
        im.save(folder/name, **more); made.append(folder/name)
    return made

def corpus(folder) -> dict: # kind -> files
    "One good file of each kind"
    from snapshots import SMALL, official_state, snapshot
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    g = generator(folder/"generator")
    torch.manual_seed(1)
    save_encoder(PortraitEncoder(EncoderConfig((4, 4), (1,), dim=4, size=16)), folder/"encoder.safetensors", note="x")
    G = PoseFreeGenerator(G16); G.name, G.sha256 = "generator", sha256(g)
    save_latent_encoder(LatentEncoder(LatentEncoderConfig(widths=(4, 4), hidden=8, size=16, num_ws=G.num_ws)), folder/"latent_encoder.safetensors", G)
    save_tensors(dict(w=torch.zeros(1, 72), deltas=torch.zeros(1, G.num_ws, 72), pose=torch.zeros(1, 2)), folder/"latent.safetensors", format="posefree_kit latent 1", generator=dict(name="generator", sha256=G.sha256), config=config_to_dict(quick()))
    s = new_state(G8, D8, TrainConfig(batch=2))
    save_state(s, folder/"run.state")
    save_state(make_state(s.G, s.D, TrainConfig(batch=2, encode_share=.5), LatentEncoder(LatentEncoderConfig(widths=(4, 4), hidden=8, size=8, num_ws=s.G.num_ws))), folder/"encode.state") # an encoder learns along
    state = official_state(SMALL)
    (folder/"official.pkl").write_bytes(snapshot(state, SMALL))
    (folder/"official.safetensors").write_bytes(save({k: v.contiguous() for k, v in state.items()}))
    torch.save(state, folder/"official.pt")
    save_json(SMALL, folder/"official.json")
    save_json(config_to_dict(quick()), folder/"quick.json")
    save_json(dict(format=VIEWS, method="m", set="portraits", n=2, size=64, images=[dict(image=10_000_000, reconstruction="a.png", novel={f"{o:+d}": "a.png" for o in OFFSETS}, yaw_deg=1., pitch_deg=2.)]), folder/"views.json")
    return dict(images=images(folder))

def header(data:bytes) -> tuple: # of a .safetensors file -> its JSON, the bytes of the numbers
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + n]), data[8 + n:]

def with_header(head:dict, numbers:bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + numbers

