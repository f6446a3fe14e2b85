"""A process that runs training steps of one source tree, one at a time, whenever its input names one.

    python worker.py SETTINGS

It is run as a file beside another tree's packages, so it uses nothing but the fixed public names of `uvc`.
SETTINGS is JSON: model, device, dtype, batch, threads and structures, a structure's JSON by name. The first
line printed lists the steps as JSON; then each line with a step's name is answered with its milliseconds.
"""

import copy
import json
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

import uvc
import uvc.models  # registers its models with timm


def build(settings: dict) -> dict[str, Callable[[], None]]:
    """The training steps: converted with nothing pruned, and per structure on the fly and compacted."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    dense = timm.create_model(settings["model"]).to(device)
    shape = (settings["batch"], dense.in_chans, *dense.patch_embed.img_size)
    x, y = torch.randn(shape, device=device), torch.randint(dense.num_classes, shape[:1], device=device)
    models = {"nothing pruned": uvc.convert(copy.deepcopy(dense))}
    for name, text in settings["structures"].items():
        fly = uvc.apply_structure(copy.deepcopy(dense), uvc.Structure.from_json(text))
        models |= {f"{name} on the fly": fly, f"{name} compacted": uvc.compact(fly)}
    return {name: step(model.train(), x, y, dtype) for name, model in models.items()}


def step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward, AdamW, until the device is done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Answers until standard input ends."""
    steps = build(json.loads(sys.argv[1]))
    print(json.dumps(list(steps)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        steps[line.strip()]()
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
