"What test_processes.py lets `accelerate launch` run in each process: python processes.py FOLDER. Alone, it trains the same run without any messages."
import dataclasses, json, os, signal, sys
from pathlib import Path

import torch

from posefree_kit import training
from posefree_kit.core import InputError
from posefree_kit.discriminator import DiscriminatorConfig
from posefree_kit.generator import GeneratorConfig
from posefree_kit.training import Processes, TrainConfig, UnposedImages, fit, new_state, train_step

G16, D16 = GeneratorConfig(channels=(8, 8, 8), plane_channels=4, render_resolution=16, samples=6), DiscriminatorConfig(channels=(8, 8, 8))
CONFIG = TrainConfig(batch=32, bf16=False, hold_kimg=0., r1_every=4, condition_kimg=(0., .3), easy_kimg=(.1, .5), encode_share=.06, match_weight=1., match_kimg=.1, seed=3)

def images(seed:int) -> UnposedImages: return UnposedImages(torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))

def curve(steps:int=20) -> list: # the losses of each step
    s = new_state(G16, D16, CONFIG)
    s.share = Processes.launched("cpu")
    told = [train_step(s, images(0), images(1)) for _ in range(steps)]
    sums = s.share.gather(torch.stack([torch.stack([v.double().sum() for v in net.state_dict().values()]).sum() for net in (s.G, s.D, s.ema)])[None])
    assert (sums == sums[0]).all(), "processes drifted apart"
    return told

def sick(share:Processes) -> dict: # one process meets a NaN once: all go back a step
    class Bad(UnposedImages):
        calls = 0
        def batch(self, *args):
            self.calls += 1
            x = super().batch(*args)
            return x * float("nan") if share.rank == 1 and self.calls == 3 else x
    s = fit(Bad(images(0).images), sys.argv[1] + "/sick", G16, D16, CONFIG, kimg=.128, device="cpu", progress=False)
    return dict(trouble=s.trouble, seen=s.seen, rate=s.opt_g.param_groups[0]["lr"])

def stopped(share:Processes) -> str: # one process is told to stop: all stop, after the same step
    step, calls = training.train_step, []
    def hear(s, *args):
        calls.append(s.step)
        if share.rank == 1 and s.step == 2: os.kill(os.getpid(), signal.SIGTERM)
        return step(s, *args)
    training.train_step = hear
    try: fit(images(0), sys.argv[1] + "/stopped", G16, D16, CONFIG, kimg=.256, device="cpu", progress=False)
    except KeyboardInterrupt as e: return f"{len(calls)} steps: {e}"
    finally: training.train_step = step
    return "not stopped"

def uneven() -> str: # 8 images, one group, cannot be halved: told before anything is written
    try: fit(images(0), sys.argv[1] + "/uneven", G16, D16, dataclasses.replace(CONFIG, batch=8), kimg=.032, device="cpu", progress=False)
    except InputError as e: return str(e)
    return "split"

if __name__ == "__main__":
    torch.set_num_threads(1)
    share = Processes.launched("cpu")
    found = dict(rank=share.rank, count=share.count, curve=curve(), sick=sick(share), stopped=stopped(share), uneven=uneven())
    (Path(sys.argv[1])/f"process{share.rank}.json").write_text(json.dumps(found))
