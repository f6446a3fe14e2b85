"""Structures: what they may say, JSON, how they are drawn, and how models take them and give them back."""

import copy
import json
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import small_vit, structures

import uvc
from uvc.structure import BlockStructure, Structure

H, K, F, L = 4, 6, 40, 3  # of small_vit


def indices(size: int):
    return st.sets(st.integers(0, size - 1)).map(lambda s: tuple(sorted(s)))


@st.composite
def any_structure(draw):
    blocks = []
    for _ in range(L):
        heads = draw(indices(H))
        dims = [[draw(indices(K)) for _ in heads] for _ in range(2)]
        blocks.append(
            BlockStructure(draw(st.booleans()), draw(st.booleans()), heads, *dims, draw(indices(F)))
        )
    return Structure(tuple(blocks))


@settings(max_examples=30, deadline=None)
@given(any_structure())
def test_json_and_a_model_both_give_a_structure_back(structure):
    assert Structure.from_json(structure.to_json()) == structure
    assert hash(Structure.from_json(structure.to_json())) == hash(structure)
    assert uvc.structure_of(uvc.apply_structure(small_vit(), structure)) == structure


def test_a_head_without_v_dims_is_dropped():
    block = BlockStructure(True, True, (0, 2), ((1,), (3,)), ((), (5,)), (0,))
    assert (block.heads, block.qk_dims, block.v_dims) == ((2,), ((3,),), ((5,),))


GOOD = dict(attn=True, mlp=True, heads=(0, 2), qk_dims=((0,), (1, 3)), v_dims=((2,), (4,)), neurons=(7, 8))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (dict(attn=1), "attn must be true or false, got 1"),
        (dict(heads=(2, 0)), "heads must ascend without repeats, got 2 before 0"),
        (dict(neurons=(7, 7)), "neurons must ascend without repeats, got 7 before 7"),
        (dict(neurons=(-1, 7)), "neurons must not be negative, got -1"),
        (dict(neurons=(1.0,)), "neurons must be a list of integers"),
        (dict(neurons=(True,)), "neurons must be a list of integers"),
        (dict(neurons="12"), "neurons must be a list of integers"),
        (dict(v_dims=((2,),)), "v_dims must have one entry for each of the 2 kept heads"),
        (dict(qk_dims=((0,), (3, 1))), "qk_dims of head 2 must ascend without repeats"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_faulty_block_is_one_clear_line(fault, says):
    with pytest.raises(ValueError, match=says) as caught:
        BlockStructure(**{**GOOD, **fault})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", 'one key "blocks"'),
        ('{"blocks": [], "more": 1}', 'one key "blocks"'),
        ('{"blocks": [{}]}', r"blocks\[0\] of the structure must have exactly the keys"),
        (
            json.dumps({"blocks": [{**GOOD, "neurons": [3, 1]}]}),
            r"blocks\[0\] of the structure: neurons must ascend",
        ),
    ],
)
def test_faulty_json_is_one_clear_line(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        Structure.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (dict(heads=(0, 4)), "heads of block 1 keeps index 4, the model has only 4"),
        (dict(neurons=(40,)), "neurons of block 1 keeps index 40, the model has only 40"),
        (dict(v_dims=((2,), (6,))), "v_dims of head 2 of block 1 keeps index 6, the model has only 6"),
        (dict(qk_dims=((6,), ())), "qk_dims of head 0 of block 1 keeps index 6, the model has only 6"),
    ],
    ids=["heads", "neurons", "v dims", "q/k dims"],
)
def test_a_structure_too_large_for_the_model_changes_nothing(fault, says):
    good = BlockStructure(**GOOD)
    model = small_vit()
    with pytest.raises(ValueError, match=says):
        uvc.apply_structure(model, Structure((good, BlockStructure(**{**GOOD, **fault}), good)))
    assert not any(isinstance(module, uvc.UVCAttention) for module in model.modules())


def test_a_structure_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="the structure has 1 blocks, the model 3"):
        uvc.apply_structure(small_vit(), Structure((BlockStructure(**GOOD),)))


@pytest.mark.parametrize("keep", [0.0, 0.04, 0.3, 0.5, 0.97, 1.0])
def test_random_keeps_exactly_the_fraction_of_every_block(keep):
    structure = Structure.random(small_vit(), keep, seed=1)
    for block in structure.blocks:
        assert block.attn and block.mlp
        assert len(block.neurons) == round(keep * F)
        assert sum(map(len, block.v_dims)) == round(keep * H * K)
        # q/k dims lie in kept heads only, and there is room for all of them.
        assert sum(map(len, block.qk_dims)) == round(keep * H * K)


def test_random_is_ragged_repeatable_and_leaves_torch_alone():
    model = timm.create_model("deit_tiny_patch16_224", depth=6)
    state = torch.get_rng_state()
    structure = Structure.random(model, 0.5, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert structure == Structure.random(model, 0.5, seed=0) != Structure.random(model, 0.5, seed=1)
    heads = [len(block.heads) for block in structure.blocks]
    assert set(heads) == {2, 3}
    assert any(a != b for block in structure.blocks for a, b in pairwise(map(len, block.v_dims)))
    assert all(block.qk_dims != block.v_dims for block in structure.blocks)


def test_uniform_keeps_the_first_units_of_each_family():
    structure = Structure.uniform(small_vit(), heads=0.5, head_dims=0.5, neurons=0.1, blocks=0.67)
    dims = ((0, 1, 2), (0, 1, 2))
    assert structure.blocks[0] == BlockStructure(True, True, (0, 1), dims, dims, (0, 1, 2, 3))
    assert [block.attn for block in structure.blocks] == [block.mlp for block in structure.blocks]
    assert [block.attn for block in structure.blocks] == [True, True, False]
    assert structure.blocks[2].neurons == (0, 1, 2, 3)


def test_dense_keeps_everything():
    model = small_vit()
    assert Structure.dense(model) == Structure.random(model, 1.0) == Structure.uniform(model)
    assert uvc.structure_of(model) == Structure.dense(model)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(value):
    with pytest.raises(ValueError, match="keep must be a fraction between 0 and 1"):
        Structure.random(small_vit(), value)
    with pytest.raises(ValueError, match="neurons must be a fraction between 0 and 1"):
        Structure.uniform(small_vit(), neurons=value)


def test_timm_drop_in_converted_and_compacted_models_agree_on_structures():
    plain = small_vit()
    drop_in = small_vit(attn_layer=uvc.UVCAttention, mlp_layer=uvc.UVCMlp)
    converted = uvc.convert(copy.deepcopy(plain))
    drawn = [Structure.random(model, 0.5, seed=2) for model in (plain, drop_in, converted)]
    assert drawn[0] == drawn[1] == drawn[2]
    for model in (plain, drop_in, converted):
        assert uvc.structure_of(model) == Structure.dense(model)
        uvc.apply_structure(model, drawn[0])
        assert uvc.structure_of(model) == uvc.structure_of(uvc.compact(model)) == drawn[0]


def test_a_structure_can_be_taken_back():
    model, x = small_vit().eval(), torch.randn(2, 3, 16, 16)
    dense = model(x)
    for case in structures(model).values():
        uvc.apply_structure(model, case)
    assert not torch.equal(model(x), dense)
    uvc.apply_structure(model, Structure.dense(model))
    assert torch.equal(model(x), dense)


def test_skipped_halves_keep_their_groups_on_record():
    model = small_vit()
    skipped = structures(model)["every block skipped"]
    assert uvc.structure_of(uvc.apply_structure(model, skipped)) == skipped
    assert skipped.blocks[0].neurons == Structure.random(model, 0.5, seed=3).blocks[0].neurons


def test_a_compacted_model_takes_no_new_structure():
    small = uvc.compact(small_vit())
    with pytest.raises(ValueError, match="the model is compacted"):
        uvc.apply_structure(small, Structure.dense(small))
