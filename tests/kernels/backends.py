"""Every backend, where it runs, and tests on all of them; triton runs in its interpreter and cuda as its host
build where there is no GPU.
"""

import pytest
import torch

try:
    import on_triton
except pytest.skip.Exception:
    on_triton = None

GPU = torch.cuda.is_available()
BACKENDS = {
    "reference": "cpu",
    "cpu": "cpu",
    "cuda-host": "cpu",
    "triton": "cuda" if GPU else "cpu",
    "cuda": "cuda",
}
HALF = (torch.bfloat16, torch.float16)
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "reference": (torch.float32,)}


def case(backend, *values, slow=False):
    """One test's parameters, skipped with its reason where it cannot run."""
    marks = [pytest.mark.slow, pytest.mark.timeout(3000)] if slow else []
    if BACKENDS[backend] == "cuda" and not GPU:
        marks.append(pytest.mark.skip(reason="no GPU"))
    if backend == "triton" and on_triton is None:
        marks.append(pytest.mark.skip(reason="Triton is not installed"))
    words = [word for value in values for word in (value if isinstance(value, tuple) else (value,))]
    name = "-".join([backend, *(str(word).removeprefix("torch.") for word in words)])
    return pytest.param(backend, *values, id=name, marks=marks)


def on_every_backend(quick=None, interpreted=None, all_of=None, also=(), without=()):
    """Parametrizes (backend, dtype) and, with sizes, size: the `quick` ones, `interpreted` in Triton's slow
    interpreter; the others of `all_of` are marked slow. `also`: further pairs; `without`: backends that are
    left out.
    """
    pairs = [(b, d) for b in BACKENDS for d in DTYPES.get(b, (torch.float32, *HALF)) if b not in without]
    pairs += also
    if quick is None:
        return pytest.mark.parametrize(("backend", "dtype"), [case(*pair) for pair in pairs])
    cases = []
    for backend, dtype in pairs:
        chosen = interpreted if backend == "triton" and not GPU else quick
        cases += [case(backend, dtype, size, slow=size not in chosen) for size in all_of]
    return pytest.mark.parametrize(("backend", "dtype", "size"), cases)
