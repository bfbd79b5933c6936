"The generator's function written straightforwardly: what the fast one is measured against, and must equal"
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from posefree_kit.camera import Pose, rays
from posefree_kit.generator import AXES, Planes, View, ball_prior, camera_eg3d, rays_eg3d
from posefree_kit.rendering import Rays, coarse_depths, fine_depths, fine_depths_eg3d


def filter_4_taps(x:Tensor, gain:float=1.) -> Tensor: # (B, C, H, W) -> (B, C, H - 3, W - 3)
    "[1, 3, 3, 1] in both directions, as a depthwise convolution"
    f = x.new_tensor([1., 3, 3, 1]) / 8
    return F.conv2d(x, (f[:, None] * f * gain).expand(x.shape[1], 1, 4, 4), groups=x.shape[1])

def double(x:Tensor) -> Tensor: # (B, C, H, W) -> (B, C, 2H, 2W)
    "Zeros between the pixels, then the filter"
    b, c, h, w = x.shape
    x = F.pad(x.reshape(b, c, h, 1, w, 1), (0, 1, 0, 0, 0, 1)).reshape(b, c, 2 * h, 2 * w)
    return filter_4_taps(F.pad(x, (2, 1, 2, 1)), 4.)

def modulated_conv(x:Tensor, weight:Tensor, style:Tensor, demodulate:bool=True, up:bool=False) -> Tensor:
    "One set of weights an image, one group of channels an image"
    (b, i, h, w), (o, _, k, _) = x.shape, weight.shape
    ws = weight * style[:, None, :, None, None]
    if demodulate: ws = ws * (ws.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, b * i, h, w)
    if not up: return F.conv2d(x, ws.reshape(b * o, i, k, k), padding=k // 2, groups=b).reshape(b, o, h, w)
    y = F.conv_transpose2d(x, ws.flip(3, 4).transpose(1, 2).reshape(b * i, o, k, k), stride=2, groups=b)
    return filter_4_taps(F.pad(y, (1, 1, 1, 1)), 4.).reshape(b, o, 2 * h, 2 * w)

def conv_layer(m, x, w, noise):
    y = modulated_conv(x, m.weight, m.style(w), up=m.up)
    if noise and hasattr(m, "noise"): y = y + m.noise * m.noise_strength
    y = F.leaky_relu(y + m.bias[:, None, None], .2) * math.sqrt(2)
    return y if m.clamp is None else y.clamp(-m.clamp, m.clamp)

def block(m, x, image, ws, noise):
    x = conv_layer(m.conv0, x, ws[:, 0], noise) if m.num_convs == 2 else m.const.expand(len(ws), -1, -1, -1)
    x = conv_layer(m.conv1, x, ws[:, -2], noise)
    t = m.to_image
    y = modulated_conv(x, t.weight, t.style(ws[:, -1]) * t.gain, demodulate=False) + t.bias[:, None, None]
    if t.clamp is not None: y = y.clamp(-t.clamp, t.clamp)
    if image is not None: y = y + (double(image) if m.up else image)
    return x, y

def planes(G, ws:Tensor) -> Planes: # (B, num_ws, w_dim)
    "`G.planes`"
    look, x, image, i = ws[..., :G.config.look_dim], None, None, 0
    for m in G.synthesis.blocks:
        x, image = block(m, x, image, look[:, i:i + m.num_convs + 1], True)
        i += m.num_convs
    return Planes(image.unflatten(1, (3, G.config.plane_channels)), look[:, -1])

def read_planes(features:Tensor, xyz:Tensor, box:float, axes:str) -> Tensor: # (B, 3, C, H, W), (B, M, 3) -> (B, M, C)
    "Three `grid_sample`s, then their mean"
    p = xyz * (2 / box)
    read = [F.grid_sample(features[:, i], p[:, None, :, list(a)], align_corners=False) for i, a in enumerate(AXES[axes])]
    return torch.stack(read, 1).squeeze(3).mT.mean(1)

def decode(d, x:Tensor) -> tuple: # (B, M, C) -> raw (B, M, 1), values (B, M, F)
    y = d.out(d.hidden(x))
    return y[..., :1], y[..., 1:].sigmoid() * 1.002 - .001

def march(raw:Tensor, values:Tensor, t:Tensor, c) -> tuple: # (B, N, S, 1), (B, N, S, F), (B, N, S, 1) -> Rays, weights (B, N, S - 1)
    "Densities and colours in the middle of every interval"
    middle = lambda x: (x[..., :-1, :] + x[..., 1:, :]) / 2
    sigma = F.softplus(middle(raw) - 1) * (1. if c.march == "eg3d" else c.density_scale)
    alpha = 1 - torch.exp(-sigma * t.diff(dim=-2))
    through = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1, :]), 1 - alpha + 1e-10], -2), -2)[..., :-1, :]
    w = alpha * through
    seen, weight, z = (w * middle(values)).sum(-2), w.sum(-2)[..., 0], (w * middle(t)).sum(-2)[..., 0]
    empty = weight <= (0 if c.march == "eg3d" else 1e-6)
    depth = torch.where(empty, torch.full_like(z, torch.inf) if c.march == "eg3d" else t[..., -1, 0], z / torch.where(empty, torch.ones_like(weight), weight)).clamp(t.detach().min(), t.detach().max())
    if c.background == "white": seen = seen + (1 - weight)[..., None]
    return Rays(seen, depth, weight), w[..., 0]

def render(G, p:Planes, pose:Pose, size:int|None=None) -> View: # as many poses as latents
    "`G.render` without jitter; several views of one latent need its planes several times"
    c, size = G.config, size or G.config.render_resolution
    k = G.camera(pose)[1]
    o, d = rays_eg3d(camera_eg3d(pose, c.radius, c.pivot), k, size) if c.march == "eg3d" else rays(G.camera(pose)[0], k, size)
    def ask(t):
        xyz = (o[:, :, None] + d[:, :, None] * t).flatten(1, 2)
        raw, values = decode(G.decoder, read_planes(p.features, xyz, c.box, c.plane_axes))
        if c.ball: raw = raw + ball_prior(xyz, c.ball, c.ball_radius)[..., None]
        return raw.unflatten(1, t.shape[1:3]), values.unflatten(1, t.shape[1:3])
    t = coarse_depths(c.near, c.far, c.samples, o)[..., None]
    raw, values = ask(t)
    if c.fine_samples:
        _, w = march(raw, values, t, c)
        with torch.no_grad():
            u = torch.linspace(0, 1, c.fine_samples, device=t.device, dtype=t.dtype).expand(*t.shape[:2], c.fine_samples)
            more = (fine_depths_eg3d(t[..., 0], w, u) if c.march == "eg3d" else fine_depths(t[..., 0], w, c.fine_samples))[..., None]
        raw2, values2 = ask(more)
        t, order = torch.cat([t, more], -2).sort(-2)
        both = lambda a, b: torch.cat([a, b], -2).gather(-2, order.expand(-1, -1, -1, a.shape[-1]))
        raw, values = both(raw, raw2), both(values, values2)
    (seen, depth, weight), _ = march(raw, values, t, c)
    if G.background is not None: seen = torch.cat([seen[..., :3] + (1 - weight)[..., None] * G.background(p.w_last, size), seen[..., 3:]], -1)
    image = lambda x: x.reshape(len(pose), size * size, -1).mT.unflatten(-1, (size, size))
    features = image(seen) * 2 - 1
    rgb = raw_rgb = features[:, :3]
    if G.superres is not None:
        s = G.superres
        if features.shape[-1] != s.size and (s.shrink or features.shape[-1] < s.size):
            rgb, features = (F.interpolate(x, (s.size,) * 2, mode="bilinear", align_corners=False, antialias=s.antialias) for x in (rgb, features))
        for m in s.blocks: features, rgb = block(m, features, rgb, p.w_last[:, None].expand(-1, 3, -1), c.march == "eg3d" and c.superres_noise)
    return View(rgb, raw_rgb, image(depth), image(weight))
