"""Attention with rotary positions and a bias of the scores: accuracy, gradients, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
import uvc_kernels
from accuracy import DTYPES, check, random, with_gradients
from timm.layers import apply_rot_embed_cat
from uvc_kernels import Positions, turn_of

HEADS, DIMS, WIDTH = 3, 8, 24
LAYOUTS = ("neighbours", "halves")
op = torch.ops.uvc_kernels.attention_with_positions.default
backward = torch.ops.uvc_kernels.attention_with_positions_backward.default


def pairs_of(layout: str, dims: int = DIMS) -> torch.Tensor:
    """The dims that are turned together [K / 2, 2]."""
    every = torch.arange(dims)
    return every.view(2, -1).T if layout == "halves" else every.view(-1, 2)


def partner_of(layout: str, dims: int = DIMS) -> torch.Tensor:
    pairs, partner = pairs_of(layout, dims), torch.empty(dims, dtype=torch.int64)
    partner[pairs] = pairs.flip(1)
    return partner


def kept_of(layout: str, keep: float = 0.5, heads: int = HEADS, dims: int = DIMS) -> uvc_kernels.KeptHeads:
    """Whole pairs of q/k dims, other v dims; the first kept head has no q/k dim, the second is removed."""
    pairs, qk = pairs_of(layout, dims), torch.zeros(heads, dims, dtype=torch.bool)
    for head in range(1, heads):
        for pair in pairs[torch.rand(len(pairs)) < keep].tolist():
            qk[head, pair] = True
    qk[-1, pairs[0]] = True
    v = torch.rand(heads, dims) < keep
    v[:, 0] = True
    v[1 % heads] = heads == 1
    return uvc_kernels.kept_heads(qk, v)


def rope_of(tokens: int, layout: str, dims: int = DIMS, leading: tuple[int, ...] = ()) -> torch.Tensor:
    """Sine and cosine [.., N, 2K] as timm has them: the same for both dims of a pair."""
    angles = torch.randn(*leading, tokens, dims // 2, dtype=torch.float64)
    spread = (lambda t: t.repeat_interleave(2, -1)) if layout == "neighbours" else (lambda t: t.tile(2))
    return torch.cat([spread(angles.sin()), spread(angles.cos())], -1)


def inputs(tokens: int, batch: int = 2) -> list[torch.Tensor]:
    A = HEADS * DIMS
    x, qkv, proj = random(batch, tokens, WIDTH), random(3 * A, WIDTH), random(WIDTH, A)
    return [x, qkv * 0.3, random(3 * A), proj, random(WIDTH)]


def turned(layout: str, tokens: int, prefix: int = 2, leading: tuple[int, ...] = ()) -> Positions:
    partner = partner_of(layout)
    sine, cosine = rope_of(tokens - prefix, layout, leading=leading).chunk(2, -1)
    return Positions(turn_of(sine, cosine, partner, prefix), partner)


def attend(kept, positions, scale=0.25):
    def run(*tensors):
        given = positions._replace(bias=tensors[5]) if len(tensors) > 5 else positions
        return uvc_kernels.attention_with_positions(*tensors[:5], kept, scale, given)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [3, 7, 16, 33, 73])
def test_outputs_and_gradients_are_as_exact_as_those_of_plain_torch(tokens, layout, dtype):
    kept, positions = kept_of(layout), turned(layout, tokens)
    check(attend(kept, positions), inputs(tokens), dtype)
    bias = random(2, len(kept.v_offsets) - 1, tokens, tokens)
    check(attend(kept, positions), [*inputs(tokens, batch=4), bias], dtype)


@pytest.mark.parametrize("heads", ["one bias for all heads", "a bias of each kept head"])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_a_bias_alone_gets_its_gradient_summed_over_the_images_that_share_it(images, heads):
    kept = kept_of("halves")
    bias = random(images, 1 if "all" in heads else len(kept.v_offsets) - 1, 19, 19)
    check(attend(kept, Positions()), [*inputs(19, batch=4), bias], torch.float32)
    assert torch.autograd.gradcheck(attend(kept, Positions()), [*inputs(4, batch=4), bias[..., :4, :4]])


@pytest.mark.parametrize("leading", [(), (HEADS,), (2, 1), (2, HEADS)], ids=str)
def test_tables_may_differ_by_image_and_by_head(leading):
    check(attend(kept_of("neighbours"), turned("neighbours", 19, leading=leading)), inputs(19), torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_attention_with_rotary_positions_is_timms(layout):
    x, qkv, qkv_bias, proj, proj_bias = (t.detach() for t in inputs(17))
    rope, bias = rope_of(16, layout), torch.randn(1, HEADS, 17, 17, dtype=torch.float64)
    q, k, v = F.linear(x, qkv, qkv_bias).view(2, 17, 3, HEADS, DIMS).permute(2, 0, 3, 1, 4)
    half = layout == "halves"
    q, k = (torch.cat([t[:, :, :1], apply_rot_embed_cat(t[:, :, 1:], rope, half)], 2) for t in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=0.25).transpose(1, 2).reshape(2, 17, -1)
    whole = torch.ones(HEADS, DIMS, dtype=torch.bool)
    partner = partner_of(layout)
    positions = Positions(turn_of(*rope.chunk(2, -1), partner, 1), partner, bias)
    found = attend(uvc_kernels.kept_heads(whole, whole), positions)(x, qkv, qkv_bias, proj, proj_bias)
    torch.testing.assert_close(found, F.linear(out, proj, proj_bias), rtol=1e-12, atol=1e-12)


def test_the_number_of_threads_does_not_change_a_bit():
    kept, positions = kept_of("halves", keep=0.8), turned("halves", 63)
    tensors = [t.detach().float() for t in (*inputs(63, batch=4), random(2, len(kept.v_offsets) - 1, 63, 63))]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, qkv, heads, stats = op(*tensors, *kept[1:5], *positions[:2], 0.25)
        saved = qkv, heads, stats
        given = (*tensors[:4], tensors[5], *kept[1:5], *positions[:2])
        results.append((heads, stats, backward(out, *given, 0.25, *saved, 32)[5]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck_passes(recompute):
    kept, positions = kept_of("halves"), turned("halves", 5)
    leaves = [t.detach().requires_grad_() for t in (*inputs(5), random(1, len(kept.v_offsets) - 1, 5, 5))]
    given = (*kept[1:5], positions.turn, positions.partner)
    torch.library.opcheck(op, (*leaves, *given, 0.5, recompute))
    tensors = [t.detach() for t in leaves]
    out, *saved = op(*tensors, *given, 0.5, recompute)
    for needs in (0b111111, 0b101001):
        tensors_but = (*tensors[:4], tensors[5])
        torch.library.opcheck(backward, (torch.ones_like(out), *tensors_but, *given, 0.5, *saved, needs))


def test_without_kept_heads_the_bias_of_the_output_is_left():
    none = torch.zeros(HEADS, DIMS, dtype=torch.bool)
    kept, tensors = uvc_kernels.kept_heads(none, none), inputs(5)
    bias = random(1, 0, 5, 5)
    found = with_gradients(attend(kept, turned("halves", 5)), [*tensors, bias])
    assert torch.equal(found[0], tensors[4].expand(2, 5, WIDTH)) and found[6].shape == bias.shape
    assert not any(t.count_nonzero() for t in found[1:5])


def test_what_does_not_fit_is_refused():
    kept, tensors = kept_of("halves"), inputs(5)
    positions = turned("halves", 5)
    torn = torch.zeros(HEADS, DIMS, dtype=torch.bool)
    torn[0, 1] = True
    with pytest.raises(RuntimeError, match="kept without the one that it is turned with"):
        attend(uvc_kernels.kept_heads(torn, torn), positions)(*tensors)
    with pytest.raises(ValueError, match=r"turn must be \[2, I, G, 8, 16\], got \(2, 1, 1, 8, 32\)"):
        attend(kept, turned("halves", 20))(*tensors)
    with pytest.raises(ValueError, match=r"bias must be \[a divisor of 2, heads, 5, 5\], got \(3, 1, 5, 5\)"):
        attend(kept, Positions())(*tensors, torch.zeros(3, 1, 5, 5))
    with pytest.raises(ValueError, match=r"turn must be \[2, I, G, 8, 16\], got \(2, 3, 1, 8, 16\)"):
        attend(kept, turned("halves", 5, leading=(3, 1)))(*tensors)
    with pytest.raises(ValueError, match=r"turn comes with partner \[8\], got None"):
        attend(kept, positions._replace(partner=None))(*tensors)
    with pytest.raises(ValueError, match=r"bias must be \[a divisor of 2, heads, 5, 5\], got \(1, 4, 5, 5\)"):
        attend(kept, Positions())(*tensors, torch.zeros(1, 4, 5, 5))
