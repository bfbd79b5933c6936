"Snapshots in the layout of the official PoF3D code, with random tensors and classes that do nothing: for the tests and the tutorial, which have no official file at hand."
import collections
import contextlib
import math
import pickle
import sys
import types

import numpy as np
import torch

from posefree_kit.checkpoints import official_config, official_name
from posefree_kit.pose import PoseFreeGenerator

def options(sr="2X", size=128, render=16, **changes) -> dict:
    "A small official configuration; changes to rendering_kwargs"
    r = dict(superresolution_module=f"training.superresolution.SuperresolutionHybrid{sr}" if sr else None, clamp_mode="softplus", superresolution_noise_mode="none", decoder_lr_mul=1, sr_antialias=True, wrong=True, image_resolution=size,
             depth_resolution=9, depth_resolution_importance=7, ray_start=2.25, ray_end=3.3, box_warp=1, avg_camera_radius=2.7, avg_camera_pivot=[0, 0, .2], h_mean=math.pi / 2) | changes
    return dict(z_dim=12, c_dim=25, w_dim=12, img_resolution=size, img_channels=3, sr_num_fp16_res=4, mapping_kwargs=dict(num_layers=2, linear_pose=False, lr_multiplier=.01, lr_multiplier_pose=.01), rendering_kwargs=r,
                sr_kwargs=dict(w_dim=12), channel_base=512, channel_max=6, num_fp16_res=0, conv_clamp=None, neural_rendering_resolution=render)

SMALL = options("2X", 128, 16)
SHAPENET = dict(white_back=True, ray_start=.1, ray_end=2.6, box_warp=1.6, avg_camera_radius=1.7, avg_camera_pivot=[0, 0, 0], h_mean=math.pi, clamp_h=(0, 2 * math.pi), clamp_v=(0, 3.1415926))

def official_state(o, seed=0) -> dict: # official name -> tensor
    "A state dict of official names with random, non-trivial values"
    torch.manual_seed(seed)
    G, g = PoseFreeGenerator(official_config(o)), torch.Generator().manual_seed(seed)
    s = {official_name(k): v.clone() for k, v in G.state_dict().items()}
    for k, v in s.items():
        if k.endswith(("bias", "noise_strength", "w_avg")): v.add_(torch.randn(v.shape, generator=g) * (3. if "affine_layer" in k else .3))
    s["decoder.net.2.weight"][0] = 3 * (s["decoder.net.2.weight"][0] - s["decoder.net.2.weight"][0].mean()); s["decoder.net.2.bias"][0] = 2 / (o["rendering_kwargs"]["ray_end"] - o["rendering_kwargs"]["ray_start"])
    tap = torch.tensor([1., 3, 3, 1]) / 8
    blocks = {k.rsplit(".", 2)[0] for k in s if k.endswith("torgb.weight")}
    return s | {f"{b}{m}.resample_filter": torch.outer(tap, tap) for b in blocks for m in ("", ".conv0", ".conv1") if not m or f"{b}{m}.weight" in s}

def judge_state(resolution=128, channels=4, images=2, seed=0) -> dict: # official name -> tensor
    "A discriminator of official names with random values: blocks, epilogue, pose branch, and the mapping of its label"
    g, n, s = torch.Generator().manual_seed(seed), channels, {}
    put = lambda name, *shape: s.__setitem__(name, torch.randn(shape, generator=g))
    r = resolution
    put(f"b{r}.fromrgb.weight", n, 3 * images, 1, 1); put(f"b{r}.fromrgb.bias", n)
    while r > 4:
        for conv in ("conv0", "conv1"): put(f"b{r}.{conv}.weight", n, n, 3, 3); put(f"b{r}.{conv}.bias", n)
        put(f"b{r}.skip.weight", n, n, 1, 1); s[f"b{r}.conv1.resample_filter"] = torch.outer(*[torch.tensor([1., 3, 3, 1]) / 8] * 2)
        r //= 2
    put("b4.conv.weight", n, n + 1, 3, 3); put("b4.conv.bias", n); put("b4.fc.weight", n, 16 * n); put("b4.fc.bias", n); put("b4.out.weight", n, n); put("b4.out.bias", n)
    put("b4.cam_out1.weight", 8 * n, 16 * n); put("b4.cam_out1.bias", 8 * n); put("b4.cam_out2.weight", 2, 8 * n); put("b4.cam_out2.bias", 2); put("mapping.fc0.weight", n, 2); put("mapping.fc0.bias", n)
    return s

@contextlib.contextmanager
def stand_ins(): # -> the classes
    "Modules and classes with the official names, that do nothing, while a snapshot is written; gone when it is read"
    before = dict(sys.modules)
    def persistent(obj): return obj._reconstruct, (dict(type="class", version=6, module_src="raise SystemExit('the source was executed')", class_name=type(obj).__name__, state=obj.__dict__),)
    def _reconstruct_persistent_obj(meta): raise SystemExit("the official loader was called")
    def module(name, **what):
        m = sys.modules[name] = types.ModuleType(name)
        for k, v in what.items():
            setattr(m, k, v)
            if hasattr(v, "__module__"): v.__module__, v.__qualname__ = name, k
    make = lambda name, base=object, **d: type(name, (base,), d)
    network = lambda name: make(name, _reconstruct=staticmethod(_reconstruct_persistent_obj), __reduce__=persistent)
    cls = types.SimpleNamespace(Layer=network("FullyConnectedLayer"), Gen=network("TriPlaneGeneratorPose"), Dis=network("DualDiscriminator"), Renderer=make("ImportanceRenderer"), EasyDict=make("EasyDict", dict))
    try:
        for package in ("torch_utils", "training", "dnnlib", "training.volumetric_rendering"): module(package)
        module("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj)
        module("training.volumetric_rendering.renderer", ImportanceRenderer=cls.Renderer)
        module("training.networks_stylegan2", FullyConnectedLayer=cls.Layer); module("training.triplane_autopose", TriPlaneGeneratorPose=cls.Gen); module("training.dual_discriminator", DualDiscriminator=cls.Dis)
        module("dnnlib.util", EasyDict=cls.EasyDict)
        yield cls
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("torch_utils", "training", "dnnlib"): del sys.modules[name]

WRONG = torch.tensor([[[1., 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]]]) # published frames
RIGHT = WRONG.clone(); RIGHT[2] = torch.tensor([[0., 0, 1], [0, 1, 0], [1, 0, 0]])

def snapshot(
    state:dict, # official name -> tensor
    o:dict, # official options
    axes=WRONG, # the renderer's plane_axes
    protocol:int=4, # of the pickle
    judge:dict|None=None, # official name -> tensor of the discriminator that is in it too
) -> bytes:
    "The bytes of a snapshot in the official layout"
    with stand_ins() as cls:
        def fill(x, **more):
            x.__dict__.update(training=False, _parameters=collections.OrderedDict(), _buffers=collections.OrderedDict(), _modules=collections.OrderedDict(), _non_persistent_buffers_set=set(), **more); return x
        def net(root, tensors):
            for name, v in tensors.items():
                node = root
                for part in name.split(".")[:-1]: node = node._modules.setdefault(part, None) or node._modules.__setitem__(part, fill(cls.Layer())) or node._modules[part]
                leaf = name.split(".")[-1]
                if leaf in ("resample_filter", "noise_const", "w_avg"): node._buffers[leaf] = v
                else: node._parameters[leaf] = torch.nn.Parameter(v)
            return root
        G = net(fill(cls.Gen(), _init_args=(), _init_kwargs=cls.EasyDict({k: v for k, v in o.items() if k != "neural_rendering_resolution"}), rendering_kwargs=o["rendering_kwargs"], neural_rendering_resolution=np.int64(o["neural_rendering_resolution"])), state)
        G._modules["renderer"] = fill(cls.Renderer(), plane_axes=axes)
        G._buffers["dataset_label_std"] = torch.rand(25) # the training loop's
        G._modules["renderer"]._buffers["passing"] = torch.zeros(3); G._modules["renderer"]._non_persistent_buffers_set.add("passing")
        G._modules["superresolution"] = G._modules.get("superresolution") # None where there is none
        D = net(fill(cls.Dis(), _init_kwargs=cls.EasyDict(c_dim=2, img_resolution=o["img_resolution"], conv_clamp=256)), judge) if judge else None
        return pickle.dumps(dict(G=None, D=D, G_ema=G, training_set_kwargs=cls.EasyDict(resolution=o["img_resolution"], note="é".encode("latin1"), p=np.float64(.25)), augment_pipe=None), protocol)
