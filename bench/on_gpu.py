"""Small jobs of `make bench-gpu` that run in a process of their own.

python bench/on_gpu.py machine    versions and devices
python bench/on_gpu.py check      every op on every GPU backend, at models' sizes: for the sanitizer; names of
                                  an op, backend or dtype behind it leave the others out
python bench/on_gpu.py profile    one attention and one MLP layer, forward and backward: for the profiler
"""

import importlib.util
import shutil
import subprocess
import sys

import torch


def machine() -> int:
    """Prints what is here."""
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, its CUDA {torch.version.cuda}")
    for package in ("triton", "timm", "pytest_benchmark", "torch_pruning"):
        print(package, "is here" if importlib.util.find_spec(package) else "is not installed")
    for tool in ("nvidia-smi", "nvcc", "c++"):
        found = shutil.which(tool)
        print(tool, "is here" if found else "is not on the PATH")
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"])
    for i in range(torch.cuda.device_count()):
        print(f"cuda:{i}", torch.cuda.get_device_properties(i))
    return 0


def check() -> int:
    """Runs every op on every GPU backend; 1 when one is wrong."""
    from uvc_kernels import self_check

    from uvc.bench.layer_variants import backends

    device, wrong = torch.device("cuda"), 0
    for op in self_check.EXAMPLES:
        for dtype in (torch.float32, torch.bfloat16):
            for backend in backends(op, device, dtype)[0]:
                names = {op, backend, str(dtype).removeprefix("torch.")}
                if backend == "reference" or not names.issuperset(sys.argv[2:]):
                    continue
                fault = self_check.fault(op, backend, device, dtype)
                print(f"{op} {backend} {dtype}: {fault or 'ok'}", flush=True)
                wrong += fault is not None
    return 1 if wrong else 0


def profile() -> int:
    """One layer of each kind, DeiT-S at batch 128, half kept, with the fastest backend's own kernels."""
    from uvc.bench.layer_variants import SHAPES, backends, layer

    device, dtype = torch.device("cuda"), torch.bfloat16
    for op in ("attention", "mlp"):
        backend = backends(op, device, dtype)[0][0]
        for backward in (False, True):
            made = layer(op, SHAPES["deit_small"], 0.5, 128, device, dtype, backward, variants=("dense",))
            call = made.calls[f"on_the_fly/{backend}"]
            for i in range(3):
                call(i)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call(0)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"profiled {op} {'backward' if backward else 'forward'} on {backend}", flush=True)
    return 0


if __name__ == "__main__":
    jobs = {"machine": machine, "check": check, "profile": profile}
    if sys.argv[1:2] == [] or sys.argv[1] not in jobs:
        sys.exit(f"on_gpu.py takes one of {', '.join(jobs)}")
    sys.exit(jobs[sys.argv[1]]())
