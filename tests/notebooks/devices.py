"What two devices must agree on, for one seed: written for any device, so that it runs on the CPU alone where there is no GPU."
import torch

from posefree_kit.benchmark import Memory
from posefree_kit.camera import Pose
from posefree_kit.checkpoints import load_generator
from posefree_kit.discriminator import DiscriminatorConfig
from posefree_kit.features import load_identity, load_perceptual
from posefree_kit.generator import GeneratorConfig, Planes
from posefree_kit.losses import geometry, identity, multiview, rec
from posefree_kit.optimiser import invert, objective, prepare, quick, with_steps
from posefree_kit.portraits import HELD_OUT, portrait
from posefree_kit.training import TrainConfig, UnposedImages, new_state, train_step

MEMORY_MB = 1000 # the most that one inversion step of the shipped generator may need beside weights and input
# Largest differences allowed between float32 on two devices: sums in another order, and TF32 off. (value's unit, or a share of the largest entry where it says so)
TOLERANCES = dict(rgb=2e-3, depth=2e-3, weight=2e-3, losses=2e-3, gradients=2e-2, psnr_db=1., yaw_deg=2., train=2e-2)
BF16 = dict(psnr_db=40.) # bf16 pictures against float32 ones, at least

def rendered(device, seed:int=5) -> dict: # name -> tensor on the CPU
    "Four people of the shipped generator, from their own viewpoints"
    G = load_generator(device=device)
    with torch.no_grad(): w, view = G.sample(4, seed)
    return dict(rgb=view.rgb.cpu(), depth=view.depth.cpu(), weight=view.weight.cpu(), w=w.cpu())

def losses(device, seed:int=5) -> dict: # name -> tensor (2,) on the CPU
    "Every loss of the paper between two people"
    G, psi, phi = load_generator(device=device), load_perceptual("portrait", device=device), load_identity("portrait", device=device)
    with torch.no_grad():
        w, view = G.sample(2, seed); planes, pose = G.planes(w), G.pose(w)
        target, c = view.rgb.roll(1, 0), G.config
        found = dict(rec=rec(view.rgb, target, psi.distance), id=identity(view.rgb, target, phi.embed), mv=multiview(G, planes, view, pose, Pose.deg([-10., 10.], device=device), psi.features), geo=geometry(view.depth, view.weight, c.near, c.far))
    return {k: v.cpu() for k, v in found.items()}

def step(device) -> tuple: # total (1,), gradients of w and deltas
    "The objective of the last step of an inversion of a held-out portrait, and its gradients"
    G, config = load_generator(device=device), quick()
    nets, target = prepare(portrait(HELD_OUT + 2, G.resolution).image, G, config)
    w, d = G.mapping(G.draw(1, 3)).requires_grad_(), torch.zeros(1, G.num_ws, G.config.w_dim, device=device, requires_grad=True)
    total = objective(nets, config, target, w, d, config.steps - 2)[0]
    return total.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(total.sum(), (w, d)))

def inversion(device, steps:int=50) -> dict:
    "A short inversion of a held-out portrait, from a start search of its own"
    G, person = load_generator(device=device), portrait(HELD_OUT + 2, 64)
    found = invert(person.image, G, with_steps(quick(candidates=64, starts=1), steps)).to("cpu")
    return dict(psnr_db=float(-10 * torch.log10(((found.view.rgb.clamp(-1, 1) - person.image) / 2).square().mean())), yaw_deg=float(found.pose.degrees()[0, 0]), ws=found.ws, device=found.report["device"])

def trained(device, steps:int=3) -> dict: # losses of the last step
    s = new_state(GeneratorConfig(channels=(16, 16, 8), render_resolution=16), DiscriminatorConfig(channels=(16, 24, 32)), TrainConfig(batch=4, bf16=False), device)
    data = UnposedImages.portraits(8, 16)
    for _ in range(steps): parts = train_step(s, data)
    return {k: v for k, v in parts.items() if k in ("d", "g", "pose")}

def pictures_in_half(device, seed:int=5) -> float: # dB
    "bf16 against float32, on one device"
    G = load_generator(device=device)
    with torch.no_grad():
        w, whole = G.sample(4, seed)
        with torch.autocast(torch.device(device).type, torch.bfloat16): planes = G.planes(w)
        half = G.render(Planes(*(x.float() for x in planes)), G.pose(w)) # as in training: convolutions in bf16, rendering in float32
    return float(-10 * torch.log10(((half.rgb - whole.rgb) / 2).square().mean()))

def peak_mb(device) -> float|None: # of one step; None where it cannot be measured
    step(device) # libraries set themselves up
    with Memory(device) as m: step(device)
    return m.mb

def off(a, b) -> float: # share of the largest entry
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
