"""Milliseconds of each block: every part of every block, in whole passes; the models stay as they are."""

import time

import torch
from oracle import small_vit, structures

import uvc
from uvc.app.block_times import block_times


def test_parts_of_blocks_take_what_they_take_and_skipped_ones_nothing():
    dense = small_vit().train()
    pruned = uvc.apply_structure(small_vit(), structures(dense)["halves skipped in turn"])
    small = uvc.compact(pruned)
    slow = dense.blocks[1].mlp.register_forward_hook(lambda *_: time.sleep(0.01))
    found = block_times({"teacher": dense, "compressed": small}, torch.randn(1, 3, 16, 16), seconds=0.0)
    assert dense.training and set(found) == {"teacher", "compressed"}
    assert found["teacher"][1][1] >= 10.0 and min(min(block) for block in found["teacher"]) > 0
    for (attn, mlp, _), kept in zip(found["compressed"], uvc.structure_of(small).blocks, strict=True):
        assert (attn > 0) == kept.attn and (mlp > 0) == kept.mlp
    slow.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*dense.modules(), *small.modules()))
