"""Models of transformers and torchvision, made from configs, are served as timm's are."""

import copy

import pytest
import torch
from oracle import error, gradient_error, gradients, stored, structures
from torch import Tensor, nn
from torch.func import functional_call

import uvc
from uvc.costs import count_macs
from uvc.layers import blocks_of, named_blocks
from uvc.structure import Structure

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

SIZES = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=36,
    image_size=16,
    patch_size=4,
)
FREE = {"heads": 1, "qk": 1, "v": 1, "neurons": 1}
MODELS = {
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit classifier": ("ViTForImageClassification", "ViTConfig", dict(num_labels=5)),
    "deit": ("DeiTModel", "DeiTConfig", dict(hidden_act="gelu_new")),
    "dinov2": ("Dinov2Model", "Dinov2Config", dict(mlp_ratio=2)),
    "dinov2 giant": ("Dinov2Model", "Dinov2Config", dict(mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", dict(num_register_tokens=2)),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", dict(hidden_act="quick_gelu")),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "torchvision": None,
}


TRIED = ("random at keep 0.5", "halves skipped in turn", "no heads", "no neurons", "a head without q/k dims")


class Outputs(nn.Module):
    """All outputs of a model in one tensor, so that the truth's functions can read it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out if isinstance(out, Tensor) else torch.cat([t.flatten(1) for t in out.to_tuple()], dim=1)


def made(name: str) -> nn.Module:
    """A small model in evaluation, all its weights random, of float64."""
    torch.manual_seed(5)
    if MODELS[name] is None:
        model = torchvision.models.VisionTransformer(16, 4, 2, 3, 24, 36, num_classes=5)
    else:
        cls, config, own = MODELS[name]
        model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES, **own))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, dtype=torch.float64)


def absent(model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
    """The outputs of their own model without the contributions that `structure` removes."""
    parameters, handles = dict(model.named_parameters()), []
    for (name, block), kept in zip(named_blocks(model).items(), structure.blocks, strict=True):
        children = dict(block.named_modules())
        first = next(n for n in ("attention", "self_attn", "self_attention") if n in children)
        out = next(n for n in ("o_proj", "out_proj") if n in children[first]._modules)
        second = next(n for n in ("fc2", "down_proj", "3") if n in children["mlp"]._modules)
        A = children[f"{first}.{out}"].in_features
        q, v = torch.zeros(A), torch.zeros(A)
        for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
            q[[head * A // 3 + d for d in qk_dims]] = 1
            v[[head * A // 3 + d for d in v_dims]] = 1
        neurons = torch.zeros(children[f"mlp.{second}"].in_features)
        neurons[list(kept.neurons)] = 1
        whole = torch.cat([q, torch.ones(2 * A)])
        masks = {f"{first}.q_proj.weight": q[:, None], f"{first}.q_proj.bias": q}
        masks |= {f"{first}.in_proj_weight": whole[:, None], f"{first}.in_proj_bias": whole}
        for part, mask in {**masks, f"{first}.{out}.weight": v, f"mlp.{second}.weight": neurons}.items():
            if (path := f"{name}.{part}") in parameters:
                parameters[path] = parameters[path] * mask.double()
        for runs, half in ((kept.attn, first), (kept.mlp, "mlp")):
            if not runs:
                handles.append(children[half].register_forward_hook(_nothing))
    out = functional_call(Outputs(model), {f"model.{n}": p for n, p in parameters.items()}, (x,))
    for handle in handles:
        handle.remove()
    return out


def _nothing(module: nn.Module, inputs: tuple, out: Tensor | tuple) -> Tensor | tuple:
    return out * 0.0 if isinstance(out, Tensor) else (out[0] * 0.0, *out[1:])


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_theirs_bit_for_bit(name):
    model, x = made(name), images()
    before, keys = Outputs(model)(x), list(model.state_dict())
    classes = [type(block) for block in blocks_of(model)]
    assert torch.equal(Outputs(uvc.convert(model))(x), before)
    assert list(model.state_dict()) == keys
    assert all(isinstance(block, cls) for block, cls in zip(blocks_of(model), classes, strict=True))
    qk = 2 if name == "dinov3" else 1
    assert uvc.families(model) == [{**FREE, "qk": qk, "halves": ("attn", "mlp")}] * 2
    model.train()
    torch.manual_seed(1)
    trained = Outputs(model)(x)
    model.eval()
    assert trained.shape == before.shape


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Seen")
def test_what_is_pruned_compacted_saved_and_loaded_is_theirs_with_contributions_absent(name, tmp_path):
    model, x = made(name), images()
    drawn = structures(model)
    for i, kind in enumerate(TRIED):
        structure = drawn[kind]
        truth = absent(model, structure, x)
        expected = gradients(model, truth)
        pruned = uvc.apply_structure(copy.deepcopy(model), structure)
        out = Outputs(pruned)(x)
        assert uvc.structure_of(pruned) == structure
        assert error(out, truth) < 1e-10, kind
        assert gradient_error(gradients(pruned, out), expected) < 1e-9, kind
        small, cost = uvc.compact(pruned), uvc.cost(pruned)
        assert error(Outputs(small)(x), truth) < 1e-10, kind
        assert cost.macs == count_macs(small, x[:1]), kind
        assert cost.params == sum(p.numel() for p in small.parameters()), kind
        if i < 1:
            for saved in (small, pruned):
                uvc.save(saved, tmp_path)
                loaded = uvc.load(tmp_path)
                assert stored(loaded) == stored(saved)
                assert error(Outputs(loaded)(x), truth) < 1e-10


def test_a_model_of_text_and_images_is_refused_with_what_to_give():
    text = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=text)
    with pytest.raises(
        ValueError, match=r"the model is a CLIPModel of modeling_clip, .*give its vision_model"
    ):
        uvc.convert(transformers.CLIPModel(config))


@pytest.mark.filterwarnings("ignore:Seen")
def test_hooks_on_a_module_run_while_it_is_whole_and_their_end_is_said_once_it_is_pruned(monkeypatch):
    monkeypatch.setattr("uvc_kernels.warn_once.said", set())
    model, x, calls = uvc.convert(made("torchvision")), images(), []
    block = blocks_of(model)[0]
    block.self_attention.register_forward_hook(lambda *_: calls.append("attention"))
    block.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    model(x)
    assert calls == ["attention", "mlp"]
    v = torch.ones(3, 8, dtype=torch.bool)
    v[1] = False
    block.attn.set_kept(None, v)
    with pytest.warns(UserWarning, match="MultiheadAttention: it has hooks, which are not run while parts"):
        model(x)
    assert calls == ["attention", "mlp", "mlp"]
