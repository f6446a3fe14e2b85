"""What every class of attention, MLP, block and model that is served promises, on a small model."""

import copy

import pytest
import torch
from oracle import error, gradient_error, gradients, stored, structures
from served import EXAMPLES, OFFERED

import uvc
from uvc.costs import count_macs
from uvc.layers import blocks_of
from uvc.layers.block_kinds import BLOCKS
from uvc.layers.kinds import ATTENTIONS, MLPS, MODELS
from uvc.layers.other_blocks import LAYOUTS


def test_a_class_that_is_served_has_a_small_model_here():
    seen, lacking = set(), []
    for name, example in EXAMPLES.items():
        try:
            model = example.make()
        except pytest.skip.Exception as reason:
            if "timm" in str(reason):
                lacking.append(name)
            continue
        kinds = {type(module) for module in model.modules()}
        seen |= kinds | {(kind.__module__.partition(".")[0], kind.__name__) for kind in kinds}
    served = {*ATTENTIONS, *MLPS, *BLOCKS, *MODELS}
    packages = {kind[0] for kind in seen if isinstance(kind, tuple)}
    served |= {layout for layout in LAYOUTS if layout[0] in packages}
    if lacking and not served <= seen:
        pytest.skip(f"this timm cannot make: {', '.join(lacking)}")
    assert served <= seen, f"no example of {served - seen}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_converted_model_is_the_dense_one_bit_for_bit(name):
    example = EXAMPLES[name]
    model = example.make()
    x, keys = example.images(model), list(model.state_dict())
    expected = example.read(model, x)
    torch.manual_seed(0)  # tables of some positions drop
    trained = example.read(copy.deepcopy(model).train(), x)
    assert torch.equal(example.read(uvc.convert(model), x), expected)
    torch.manual_seed(0)
    assert torch.equal(example.read(copy.deepcopy(model).train(), x), trained)
    assert list(model.state_dict()) == keys
    if name in OFFERED:
        offered = {**OFFERED[name], "halves": ("attn", "mlp")}
        assert uvc.families(model) == [offered] * len(blocks_of(model))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:(UVC|Seen)")
def test_outputs_gradients_costs_and_files_are_those_of_dense_with_contributions_absent(name, tmp_path):
    example = EXAMPLES[name]
    model = example.make().double()
    x = example.images(model).double()
    try:
        example.read(model, x)
    except RuntimeError as error_of_timm:
        if name == "mixed rotary positions":
            pytest.skip(f"this timm turns by mixed positions in float32 alone: {error_of_timm}")
        raise
    for i, (kind, structure) in enumerate(structures(model).items()):
        truth = example.absent(model, structure, x)
        expected = gradients(model, truth)
        pruned = uvc.apply_structure(copy.deepcopy(model), structure)
        out = example.read(pruned, x)
        assert uvc.structure_of(pruned) == structure
        assert error(out, truth) < 1e-10, kind
        assert gradient_error(gradients(pruned, out), expected) < 1e-9, kind
        small, cost = uvc.compact(pruned), uvc.cost(pruned)
        assert error(example.read(small, x), truth) < 1e-10, kind
        assert cost.macs == count_macs(small, x[:1]), kind
        assert cost.params == sum(p.numel() for p in small.parameters()), kind
        if example.saved and i < 2:
            for saved in (small, pruned):
                uvc.save(saved, tmp_path)
                loaded = uvc.load(tmp_path)
                assert stored(loaded) == stored(saved)
                assert error(example.read(loaded, x), truth) < 1e-10


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:(UVC|Seen)")
def test_in_float32_outputs_and_all_gradients_are_within_1e_5_of_those_in_float64(name):
    example = EXAMPLES[name]
    model = example.make()
    x, exact = example.images(model), copy.deepcopy(model).double()
    try:
        example.read(exact, x.double())
    except RuntimeError:  # as above
        exact = model
    for kind in ("random at keep 0.5", "halves skipped in turn"):
        structure = structures(model)[kind]
        truth = example.absent(exact, structure, x.to(next(exact.parameters())))
        expected = gradients(exact, truth)
        pruned = uvc.apply_structure(copy.deepcopy(model), structure)
        out = example.read(pruned, x)
        assert error(out.to(truth), truth) < 1e-5, kind
        found = gradients(pruned, out)
        found = {n: grad.to(expected[n]) for n, grad in found.items()}
        assert gradient_error(found, expected) < 1e-5, kind
        assert error(example.read(uvc.compact(pruned), x).to(truth), truth) < 1e-5, kind
