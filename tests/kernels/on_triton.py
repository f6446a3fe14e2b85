"""Where the Triton tests run: on the GPU when there is one, else in Triton's interpreter on the CPU."""

import importlib
import os
from functools import partial

import accuracy
import pytest
import torch
import uvc_kernels
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpret_the_standard_library() -> None:
    # tl.sum and its like were decorated when triton was first imported: by timm, before the variable is set.
    # Gluon wraps them when it is imported, and insists on the compiled kind.
    importlib.import_module("triton.experimental.gluon")
    import triton.language as tl
    from triton.language import standard

    if DEVICE == "cpu" and isinstance(tl.sum, triton.JITFunction):
        importlib.reload(standard)
        for name, function in vars(standard).items():
            if isinstance(getattr(tl, name, None), triton.JITFunction):
                setattr(tl, name, function)


def _patch_once_per_launch() -> None:
    # A kernel's every call of a helper patches triton.language anew, which is most of the interpreter's time.
    from triton.runtime import interpreter

    launch, patched = interpreter.GridExecutor.__call__, set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


def _load() -> None:
    # The kernels are decorated for the interpreter or for the compiler when their files are imported.
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        _interpret_the_standard_library()
        _patch_once_per_launch()
        with uvc_kernels.backend("triton"):
            for op in (
                "attention",
                "attention_with_positions",
                "mlp",
                "gather",
                "group_scores",
                "prox_shrink",
            ):
                uvc_kernels.select(op, torch.device(DEVICE), torch.float32)
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)


_load()
Tile = importlib.import_module("uvc_kernels.triton.launch").Tile
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="float64 runs in the interpreter only")


def random(*shape: int) -> Tensor:
    """Normal float64 numbers on the device under test."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE)


check = partial(accuracy.check, provider="triton")
forced = partial(accuracy.forced, "triton")
