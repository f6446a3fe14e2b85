"""Blocks of several attentions and MLPs: each pair has an entry of its own, and timm counts the blocks."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from oracle import absent, error, gradient_error, gradients, images, small_vit, structures
from served import made
from timm.layers import Attention
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

import uvc
from uvc.app.block_times import block_times
from uvc.app.forms import choose
from uvc.config import Config
from uvc.costs import count_macs
from uvc.layers import blocks_of, named_blocks
from uvc.structure import Structure
from uvc.training import compiling
from uvc.training.multiples import measure
from uvc.training.reduction import Reduction


def things(**changes) -> nn.Module:
    return small_vit(block_fn=ParallelThingsBlock, init_values=0.5, **changes).eval()


def halved(model: nn.Module) -> nn.Module:
    return uvc.apply_structure(model, Structure.random(model, 0.5, seed=1))


def test_a_structure_has_an_entry_for_each_pair_and_timm_counts_its_own_blocks():
    plain, x = things(), torch.randn(2, 3, 16, 16)
    keys = list(plain.state_dict())
    assert len(Structure.dense(plain).blocks) == len(uvc.families(plain)) == 6
    converted = uvc.convert(copy.deepcopy(plain))
    assert list(named_blocks(converted))[:3] == ["blocks.0[0]", "blocks.0[1]", "blocks.1[0]"]
    assert list(converted.state_dict()) == keys
    assert all(isinstance(block, ParallelThingsBlock) for block in converted.blocks)
    how = dict(indices=[0, 2], output_fmt="NLC", norm=True)
    expected = plain.forward_intermediates(x, **how)
    assert all(map(torch.equal, converted.forward_intermediates(x, **how)[1], expected[1]))
    small = uvc.compact(halved(converted))
    for model in (converted, small):
        assert len(model.blocks) == len(model.feature_info) == 3 and len(blocks_of(model)) == 6
        for block in (0, 1):
            (found,) = model.get_intermediate_layers(x, n=[block])
            assert found.shape == (2, 16, 24)
    for mine, aim in zip(
        small.forward_intermediates(x, **how)[1], converted.forward_intermediates(x, **how)[1], strict=True
    ):
        assert error(mine, aim) < 1e-5
    assert [list(block.record.heads) for block in blocks_of(small)] == [
        list(block.heads) for block in uvc.structure_of(converted).blocks
    ]


@pytest.mark.parametrize("mask", ["bool", "one per head", "causal"])
def test_attention_masks_reach_every_attention(mask):
    masks = {
        "bool": dict(attn_mask=torch.rand(17, 17).tril() > 0),
        "one per head": dict(attn_mask=torch.randn(1, 4, 17, 17)),
        "causal": dict(is_causal=True),
    }[mask]
    plain, x = things(), torch.randn(2, 17, 24)
    block = copy.deepcopy(plain).blocks[0]
    converted = uvc.convert(copy.deepcopy(plain))
    assert torch.equal(converted.blocks[0](x, **masks), block(x, **masks))
    structure = structures(plain)["random at keep 0.5"]
    pruned = uvc.apply_structure(converted, structure)
    with torch.no_grad():
        for attn, ffn, kept in zip(block.attns, block.ffns, structure.blocks[:2], strict=True):
            q, v, neurons = torch.zeros(72), torch.zeros(24), torch.zeros(40)
            q[24:] = 1
            for head, qk, dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
                q[[6 * head + d for d in qk]] = 1
                v[[6 * head + d for d in dims]] = 1
            neurons[list(kept.neurons)] = 1
            attn.attn.qkv.weight *= q[:, None]
            attn.attn.qkv.bias *= q
            attn.attn.proj.weight *= v
            ffn.mlp.fc2.weight *= neurons
    truth = block(x, **masks)
    assert error(pruned.blocks[0](x, **masks), truth) < 1e-5
    assert error(uvc.compact(pruned).blocks[0](x, **masks), truth) < 1e-5


def test_tokens_cannot_be_dropped():
    model = things()
    for given in (model, uvc.convert(copy.deepcopy(model))):
        structure = Structure.dense(given).with_tokens(given, 0.5)
        with pytest.raises(ValueError, match="tokens: several attentions of a ParallelThingsBlock"):
            uvc.apply_structure(given, structure)


class OwnAttention(Attention):
    pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("attns.1", "attn", OwnAttention(24, 4)), r"blocks\.1\[1\]\.attn is a OwnAttention"),
        (("ffns.0.mlp", "fc1", nn.Conv2d(24, 40, 1)), r"blocks\.1\[0\]\.mlp\.fc1 is a Conv2d"),
        (("", "forward", lambda x: x), r"blocks\.1 has a forward of its own"),
        (("ffns.1.mlp", "forward", lambda x: x), r"blocks\.1\[1\]\.mlp has a forward of its own"),
    ],
    ids=["attention", "MLP", "the forward of a block", "the forward of an MLP"],
)
def test_a_part_that_is_not_served_is_named_and_the_model_stays(change, says):
    model, (path, name, value) = things(), change
    setattr(model.blocks[1].get_submodule(path), name, value)
    for call in (uvc.convert, uvc.cost, uvc.compact):
        with pytest.raises(ValueError, match=says):
            call(model)
    assert type(model.blocks[0]) is ParallelThingsBlock and type(model.blocks[0].attns[0].attn) is Attention


def test_children_that_are_more_than_linear_layers_are_called_and_hooks_on_a_half_run():
    model, calls = things().double(), []
    structure, x = Structure.random(model, 0.5, seed=2), images(model, dtype=torch.float64)
    for block in model.blocks:
        block.attns[1].attn.proj.register_forward_hook(lambda module, inputs, out: out * 1.5)
        block.attns[0].register_forward_hook(lambda *_: calls.append(1))
    truth = absent(model, structure)(x)
    calls.clear()
    pruned = uvc.apply_structure(copy.deepcopy(model), structure)
    with pytest.warns(UserWarning, match="proj has hooks"):
        assert error(pruned(x), truth) < 1e-10
    assert len(calls) == 3
    with pytest.raises(
        ValueError, match=r"blocks\.0\[0\]: what holds its norm and its attention or MLP has hooks"
    ):
        uvc.compact(pruned)
    for block in pruned.blocks:
        block.attns[0]._forward_hooks.clear()
    with pytest.raises(ValueError, match=r"blocks\.0\[1\]\.attn\.proj has hooks"):
        uvc.compact(pruned)


def test_hooks_on_blocks_attention_and_mlp_go_along_when_compacted():
    model, calls = halved(things()), []
    block = model.blocks[2]
    for module in (block, block.attns[1].attn, block.ffns[0].mlp):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    uvc.compact(model)(torch.randn(1, 3, 16, 16))
    assert calls == ["CompactAttention", "CompactMlp", "CompactThingsBlock"]


def test_what_took_a_childs_place_is_seen():
    model = uvc.convert(things())
    attn = copy.deepcopy(model.blocks[0].attns[1].attn)
    model.blocks[0].attns[1].attn = attn
    assert blocks_of(model)[1].attn is attn
    assert not uvc.apply_structure(model, Structure.random(model, 0.5)).blocks[0].attns[1].attn.is_dense


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("compacted", [False, True], ids=["pruned", "compacted"])
def test_a_copy_computes_and_keeps_the_same_and_shares_nothing(how, compacted):
    model = halved(things())
    blocks_of(model)[3].set_skip(True, False)
    model = uvc.compact(model) if compacted else model
    again, x = how(model), torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x))
    assert uvc.structure_of(again) == uvc.structure_of(model) and uvc.cost(again) == uvc.cost(model)
    mine = {id(module) for entry in blocks_of(again) for module in entry.modules()}
    assert mine <= {id(m) for m in again.modules()} | set(map(id, blocks_of(again)))
    if not compacted:
        before = model(x)
        uvc.apply_structure(again, Structure.dense(again))
        assert torch.equal(model(x), before) and not torch.equal(again(x), before)


def test_gates_multiply_the_branches_of_their_own_pair():
    model = things().double()
    x = images(model, dtype=torch.float64)
    pruned = uvc.convert(copy.deepcopy(model))
    gates = torch.rand(6, 2, dtype=torch.float64)
    for entry, (attn, mlp) in zip(blocks_of(pruned), gates, strict=True):
        entry.set_gates(attn, mlp)
    for block, (first, second) in zip(model.blocks, gates.view(3, 2, 2), strict=True):
        for j, (attn, mlp) in enumerate((first, second)):
            block.attns[j].ls.gamma.data *= attn
            block.ffns[j].ls.gamma.data *= mlp
    assert error(pruned(x), model(x)) < 1e-12


def test_more_than_two_at_once_are_pruned_and_not_saved(tmp_path):
    model = small_vit(block_fn=partial(ParallelThingsBlock, num_parallel=3), depth=2).double()
    x = images(model, dtype=torch.float64)
    structure = structures(model)["halves skipped in turn"]
    truth = absent(model, structure)(x)
    expected = gradients(model, truth)
    pruned = uvc.apply_structure(copy.deepcopy(model), structure)
    out, small = pruned(x), uvc.compact(pruned)
    assert error(out, truth) < 1e-10 and error(small(x), truth) < 1e-10
    assert gradient_error(gradients(pruned, out), expected) < 1e-9
    assert uvc.cost(pruned).macs == count_macs(small, x[:1])
    for saved in (pruned, small):
        with pytest.raises(ValueError, match=r"cannot save: blocks\.0 has num_parallel 3, timm makes 2"):
            uvc.save(saved, tmp_path)


def test_a_wrapper_of_ones_own_is_served():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = things()

        def forward(self, x):
            return self.backbone(x)

    wrapper, x = halved(Wrapper()), torch.randn(2, 3, 16, 16)
    small = uvc.compact(wrapper)
    assert error(small(x), wrapper(x)) < 1e-5
    assert uvc.structure_of(small) == uvc.structure_of(wrapper)
    assert uvc.cost(wrapper).macs == count_macs(small, x[:1])


def test_blocks_are_timed_shared_out_and_compiled_as_timm_calls_them():
    model = halved(things())
    small, x = uvc.compact(model), torch.randn(1, 3, 16, 16)
    found = block_times({"dense": things(), "small": small}, x, seconds=0.0)
    assert all(len(rows) == 6 and min(map(min, rows)) > 0 for rows in found.values())
    choice = choose(small, rounds=3)
    assert len(choice.blocks) == 6 and error(choice.model(x), small(x)) < 1e-5
    assert measure(model).dims_curve
    reduction = Reduction(model, 1)
    assert {reduction._block_of[p] for p in model.blocks[1].parameters()} == {1}
    expected = model(x)
    with compiling.Compiled(model, "eager").step():
        assert error(model(x), expected) < 1e-6
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_compressing_meets_the_budget_and_the_folder_gives_the_model_again(tmp_path):
    model = things()
    data = torch.utils.data.TensorDataset(images(model, 16), torch.randint(5, (16,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    config = replace(Config(), warmup_epochs=1, search_epochs=4, post_epochs=1)
    result = uvc.compress(model, loader, loader, budget=0.5, config=config, out=tmp_path)
    assert 0.47 < result.cost.macs / result.dense_cost.macs <= 0.5
    loaded, x = uvc.load(tmp_path), images(model)
    assert error(loaded(x), result.model(x)) < 1e-5 and uvc.cost(loaded) == result.cost


def test_the_published_model_has_36_entries():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_18x2_224")
    assert len(uvc.Structure.dense(model).blocks) == 36
    cost = uvc.cost(uvc.convert(model))
    assert cost.params == sum(p.numel() for p in model.parameters()) and len(cost.blocks) == 36


def test_kinds_of_attention_and_mlp_are_those_of_other_blocks():
    assert uvc.families(made("parallel things, q/k norms"))[0]["qk"] == 0
