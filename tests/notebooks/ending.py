"The last cell of a run by papermill: what became of the notebook's parameters, and what it cost, beside fixed work in the same process."
import json, time
from pathlib import Path

def calibrate(device:str) -> float: # seconds, the least of five: of this process on a CPU (others on the machine do not count), of the wall on CUDA
    "A fixed piece of work: products of matrices, and passes over memory"
    import torch
    wait, now = (torch.cuda.synchronize, time.perf_counter) if device.startswith("cuda") else (lambda: None, time.process_time)
    x = torch.full((512, 512), .5, device=device)
    def once():
        wait(); start = now(); y = x
        for _ in range(10): y = (y @ x).clamp(max=1.).sin()
        wait(); return now() - start
    once()
    return min(once() for _ in range(5))

def spent(device:str) -> float: # seconds since this process began
    if not device.startswith("cuda"): return time.process_time()
    import psutil
    return time.time() - psutil.Process().create_time()

def tell(path, names, namespace:dict):
    "Write what `names` are at the end of the notebook, and its time as a multiple of the calibration's"
    device = str(namespace.get("device", "cpu"))
    seconds = spent(device)
    left = {n: namespace[n] if n in namespace else "not there" for n in names}
    Path(path).write_text(json.dumps(dict(parameters=left, seconds=seconds, time_ratio=seconds / calibrate(device)), default=repr))
