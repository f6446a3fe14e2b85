"""Attention and MLP layers by backend, against what else one could do; ops over all layers, against torch."""

import pytest
import torch

from uvc.bench import layer_variants, op_variants
from uvc.bench.rows import Group

KEEPS = (1.0, 0.75, 0.5, 0.25)
# Images per call: about equal work on the CPU; on a GPU what people train with.
BATCH = {"cpu": {"deit_tiny": 8, "deit_small": 4, "deit_base": 1, "t2t_vit_14": 4}}
BATCH["cuda"] = {"deit_tiny": 256, "deit_small": 256, "deit_base": 128, "t2t_vit_14": 256}
CACHE = 240e6  # bytes: four times the last-level cache of a large GPU
# Scores go over all weights, whatever the structure; what keeps everything is not packed.
OPS = [("group_scores", "forward", 1.0), *(("prox_shrink", "forward", keep) for keep in KEEPS)]
OPS += [("gather", direction, keep) for direction in ("forward", "backward") for keep in KEEPS[1:]]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["attention", "mlp"])
@pytest.mark.parametrize("model", layer_variants.SHAPES)
def test_layer(benchmark, session, model, op, direction, keep):
    if session.quick and (model != "deit_tiny" or keep not in (1.0, 0.5)):
        pytest.skip("--quick measures DeiT-T at keep 1 and 0.5 only")
    batch = BATCH[session.device.type][model]
    if session.quick:
        batch = min(batch, 32)
    shape = layer_variants.SHAPES[model]
    variants = list(layer_variants.VARIANTS)
    # What compiling dense gives does not depend on the kept fraction, and it takes its time.
    often = session.on_gpu or model == "deit_tiny" or keep == 0.5
    if session.options.no_compile or not often:
        variants.remove("compiled")
    x_bytes = batch * shape.tokens * shape.dim * session.dtype.itemsize
    inputs = max(2, round(CACHE / x_bytes)) if session.on_gpu else 1
    backward, inputs = direction == "backward", min(inputs, 8)
    made = layer_variants.layer(
        op, shape, keep, batch, session.device, session.dtype, backward, inputs, variants
    )
    for variant, reason in made.left:
        session.leave_out(variant, reason)
    rounds = 15 if session.on_gpu else 5
    timings = session.time(benchmark, made.calls, min(inputs, 8), rounds, replay=True)
    session.add(
        benchmark,
        Group(
            suite="kernels",
            model=model,
            what=f"{op} {direction}",
            dtype=session.dtype,
            batch=batch,
            keep=keep,
            device=session.device,
            timings=timings,
            works=made.works,
            backends=made.backends,
            error=made.error,
            images=False,
        ),
    )


@pytest.mark.parametrize(("op", "direction", "keep"), OPS)
@pytest.mark.parametrize("model", layer_variants.SHAPES)
def test_op(benchmark, session, model, op, direction, keep):
    if session.quick and (model != "deit_tiny" or keep not in (1.0, 0.5)):
        pytest.skip("--quick measures DeiT-T at keep 1 and 0.5 only")
    if not session.on_gpu and model != "deit_tiny" and op != "group_scores" and keep != 0.5:
        pytest.skip("no GPU (--device cuda): larger ops at every fraction would pass eight minutes on a CPU")
    shape = layer_variants.SHAPES[model]
    dtype = session.dtype if op == "gather" else torch.float32
    x_bytes = 4 * shape.depth * shape.dim * (4 * shape.heads * shape.head_dim + 2 * shape.hidden)
    inputs = max(1, min(8, round(CACHE / x_bytes)))
    made = op_variants.op(op, shape, keep, session.device, dtype, direction == "backward", inputs)
    for variant, reason in made.left:
        session.leave_out(variant, reason)
    timings = session.time(benchmark, made.calls, inputs, 15 if session.on_gpu else 5, replay=True)
    session.add(
        benchmark,
        Group(
            suite="kernels",
            model=model,
            what=f"{op} {direction}" if op == "gather" else op,
            dtype=dtype,
            batch=0,
            keep=keep,
            device=session.device,
            timings=timings,
            works=made.works,
            backends=made.backends,
            error=made.error,
            images=False,
        ),
    )
