"""What a user freezes gets no gradient, no optimiser state, and is neither changed nor pruned."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import uvc
from uvc.config import Config, SolverConfig
from uvc.training.compress import compress, train_teacher
from uvc.training.freezing import freeze, matched, train_mode
from uvc.training.logger import RunLog
from uvc.training.trainer import Trainer

CONFIG = dict(
    teacher_epochs=2,
    warmup_epochs=1,
    search_epochs=10,
    post_epochs=1,
    learning_rate=1e-2,
    ema_decay=0.5,
    solver=SolverConfig(every=1, anneal=(0.05, 0.3)),
)


def small_vit():
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2.0
    )


def batches(count):
    generator = torch.Generator().manual_seed(count)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("pos_embed",), {"pos_embed"}),
        (("patch_embed",), {"patch_embed.proj.weight", "patch_embed.proj.bias"}),
        (("blocks.[01].attn.proj.bias",), {"blocks.0.attn.proj.bias", "blocks.1.attn.proj.bias"}),
        (("norm", "cls_*"), {"norm.weight", "norm.bias", "cls_token"}),
        (
            ("blocks.1.mlp.fc?",),
            {f"blocks.1.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
        ),
        (("*.qkv.weight",), {f"blocks.{i}.attn.qkv.weight" for i in range(3)}),
        ((), set()),
    ],
)
def test_a_pattern_names_parameters_or_modules_around_them(patterns, names):
    model = small_vit()
    held = {id(p) for p in matched(model, patterns)}
    assert {name for name, p in model.named_parameters() if id(p) in held} == names


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            ("blcoks.0",),
            "freeze: 'blcoks.0' matches no parameter or module of the model; near are blocks.0, ",
        ),
        (("pos_embed", "layer.*"), "freeze: 'layer.*' matches no parameter"),
        (("blocks.3",), "near are blocks."),
        (("",), "freeze: '' matches no parameter"),
        (("*",), "freeze: * leaves nothing to train"),
        (("blocks", "norm", "head", "[cp]*"), "leaves nothing to train"),
    ],
)
def test_a_pattern_without_a_match_is_refused_before_any_training(patterns, says):
    model = small_vit()
    with pytest.raises(ValueError) as error:
        compress(model, batches(2), batches(1), 0.5, config=Config(**CONFIG, freeze=patterns))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert all(p.requires_grad for p in model.parameters())


def test_a_text_in_place_of_a_list_of_patterns_is_refused():
    with pytest.raises(ValueError, match="freeze: 'blocks'; it must be a list"):
        Config(freeze="blocks")


def test_a_budget_out_of_reach_leaves_the_model_trainable():
    model = small_vit()
    with pytest.raises(ValueError, match="leaves frozen blocks alone"):
        compress(model, batches(2), batches(1), 0.5, config=Config(**CONFIG, freeze=("blocks.*",)))
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_frozen_is_neither_trained_nor_pruned(monkeypatch):
    made = []
    make = Trainer.optimizer
    monkeypatch.setattr(Trainer, "optimizer", lambda *a: made.append(make(*a)) or made[-1])
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    frozen = {"patch_embed", "blocks.0", "blocks.2.mlp"}
    config = Config(**CONFIG, freeze=("patch_embed", "blocks.0.*", "blocks.2.mlp"))
    result = compress(model, batches(4), batches(1), 0.7, config=config)
    inside = {n: p for n, p in model.named_parameters() if any(n.startswith(f"{part}.") for part in frozen)}
    assert len(inside) == 18
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in inside.items())
    assert not torch.equal(model.blocks[1].mlp.fc1.weight, before["blocks.1.mlp.fc1.weight"])
    assert len(made) == 2 and not {p for o in made for p in o.state} & set(inside.values())
    dense = uvc.Structure.dense(model).blocks
    assert result.structure.blocks[0] == dense[0] and result.structure.blocks[2].neurons == dense[2].neurons
    assert result.structure.blocks[1] != dense[1]
    assert result.cost.macs <= 0.7 * result.dense_cost.macs


def test_a_teacher_is_trained_around_what_is_frozen():
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    train_teacher(model, batches(3), batches(1), Config(**CONFIG, freeze=("blocks", "*_embed")), RunLog(None))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_frozen_batch_norms_keep_their_statistics():
    model = nn.ModuleDict(
        {"stem": nn.BatchNorm1d(3), "norm": nn.BatchNorm1d(3), "fixed": nn.BatchNorm1d(3, affine=False)}
    )
    freeze(model, ("stem",))
    train_mode(model.eval())
    assert [m.training for m in model.values()] == [False, True, True]
    assert model.training
