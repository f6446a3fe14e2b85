"""The balanced basis of heads: the function stays, and the first dims are worth most."""

import pytest
import timm
import torch

import uvc
from uvc.config import SolverConfig
from uvc.solver import PublishedSearch, Search
from uvc.solver.head_basis import balance_heads, balancing


def small(qkv_bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    shape = dict(img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=5, qkv_bias=qkv_bias)
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return uvc.convert(model.to(dtype)).eval()


def test_the_function_stays():
    for bias in (True, False):
        model, images = small(bias), torch.randn(3, 3, 32, 32, dtype=torch.float64)
        with torch.no_grad():
            before, weight = model(images), model.blocks[0].attn.qkv.weight.clone()
            balance_heads(model)
            assert (model.blocks[0].attn.qkv.weight - weight).abs().max() > 0.1
            torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)


def test_the_first_dims_are_the_best_approximation_of_their_rank():
    model = small(qkv_bias=False)
    attn = model.blocks[1].attn
    products = []
    for _ in range(2):
        q, k, v = attn.qkv.weight.detach().view(3, 3, 8, 24)
        columns = attn.proj.weight.detach().view(24, 3, 8).movedim(0, -1)
        products.append(((q, k), (v, columns)))
        balance_heads(model)
    for (left, right), (new_left, new_right) in zip(*products, strict=True):
        singular = torch.linalg.svdvals(left.mT @ right)[:, :8]
        for r in (1, 3, 7):
            rest = left.mT @ right - new_left[:, :r].mT @ new_right[:, :r]
            tail = singular[:, r:].square().sum(1).sqrt()
            torch.testing.assert_close(torch.linalg.matrix_norm(rest), tail, rtol=1e-4, atol=0)


def test_both_sides_get_the_same_diagonal_gram_matrix_in_descending_order():
    x, y = torch.randn(2, 4, 8, 24, dtype=torch.float64)
    a, inverse = balancing(x @ x.mT, y @ y.mT)
    torch.testing.assert_close(a @ inverse, torch.eye(8, dtype=torch.float64).expand(4, 8, 8))
    left, right = a @ x @ x.mT @ a.mT, inverse.mT @ y @ y.mT @ inverse
    values = left.diagonal(dim1=1, dim2=2)
    assert (values.diff(dim=1) <= 0).all()
    for gram in (left, right):
        torch.testing.assert_close(gram, torch.diag_embed(values), rtol=1e-3, atol=1e-3)


def test_dims_and_whole_heads_of_no_weight_are_no_fault():
    model, images = small(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        attn = model.blocks[0].attn
        attn.qkv.weight[:8], attn.qkv.bias[:8] = 0.0, 0.0  # all of q of head 0
        attn.qkv.weight[24 + 3] = 0.0  # a row of k
        attn.proj.weight[:, 8:16] = 0.0  # head 1 is not read
        before = model(images)
        balance_heads(model)
        torch.testing.assert_close(model(images), before, rtol=1e-7, atol=1e-7)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_search_balances_unless_told_not_to_and_the_published_one_never_does():
    weight = small().blocks[0].attn.qkv.weight
    for method, config, moves in (
        (Search, SolverConfig(), True),
        (Search, SolverConfig(balance=False), False),
        (PublishedSearch, SolverConfig(), False),
    ):
        model = small()
        method.prepare(model, config)
        assert torch.equal(model.blocks[0].attn.qkv.weight, weight) != moves


@pytest.mark.parametrize("frozen", [False, True], ids=["pruned", "frozen"])
def test_what_is_pruned_already_or_frozen_is_left_alone(frozen):
    model = small()
    if frozen:
        for block in model.blocks:
            block.attn.proj.weight.requires_grad_(False)
    else:
        uvc.apply_structure(model, uvc.Structure.random(model, keep=0.5, seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    balance_heads(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
