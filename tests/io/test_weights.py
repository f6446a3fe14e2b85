"""Weights as people have them: read, renamed, resampled and checked, or refused in one line, whole."""

import argparse
import json
import re
import sys
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import uvc

# Of two models in float32 that sum in another order; outputs are of the order of 1.
CLOSE = dict(rtol=1e-5, atol=2e-5)
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=5)


def lively(model, seed=1):
    """The model with values that show where each of them ends up, biases and positions too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + ("norm" in name) * ("weight" in name))
    return model.eval()


def vit(name="vit_tiny_patch16_224", seed=None, **options):
    model = timm.create_model(name, **{**SMALL, **options})
    return model.eval() if seed is None else lively(model, seed)


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


def quietly(model, path):
    """`load_weights`, which must have nothing to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uvc.load_weights(model, path) == ()
    return model


def same(model, weights):
    found = model.state_dict()
    assert list(found) == list(weights)
    return all(torch.equal(found[name], weights[name]) for name in weights)


# What training programs make of a state_dict.
WRAPS = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "epoch": 3, "args": argparse.Namespace(lr=0.1, model="vit")},
    "state_dict": lambda w: {"state_dict": w, "arch": "vit", "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda w: {"model_state_dict": w, "loss": torch.tensor(0.3)},
    "nested": lambda w: {"model": {"state_dict": OrderedDict(w)}},
    "data parallel": lambda w: {f"module.{k}": v for k, v in w.items()},
    "compiled": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "compiled in data parallel": lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
    "data parallel in compiled, wrapped": lambda w: {
        "state_dict": {f"_orig_mod.module.{k}": v for k, v in w.items()}
    },
    "backbone with the head beside it": lambda w: {
        k if k.startswith("head") else f"module.backbone.{k}": v for k, v in w.items()
    },
    "encoder": lambda w: {f"encoder.{k}": v for k, v in w.items()},
    "lightning": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "global_step": 7},
    "a part of a model and one stray prefix": lambda w: {
        f"module.{k}" if k == "head.bias" else k: v for k, v in w.items()
    },
}


@pytest.mark.parametrize("converted", [False, True], ids=["timm", "converted"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_stands_around_weights_is_taken_off(wrap, converted, tmp_path):
    weights = vit(seed=1).state_dict()
    torch.save(WRAPS[wrap](weights), tmp_path / "w.pth")
    model = vit(seed=2)
    model = uvc.convert(model) if converted else model
    assert same(quietly(model, tmp_path / "w.pth"), weights)


@pytest.mark.parametrize("file", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.safetensors", "old.pth", "w.txt"])
def test_a_file_is_told_by_its_bytes_and_not_by_its_name(file, tmp_path):
    weights = vit(seed=1).state_dict()
    if file.endswith("safetensors"):
        save_file(weights, tmp_path / file)
    else:
        new = not file.startswith("old")
        torch.save(weights, tmp_path / file, _use_new_zipfile_serialization=new)
    assert same(quietly(vit(seed=2), str(tmp_path / file)), weights)


def make_folder(kind, model, folder):
    weights = model.state_dict()
    if kind == "uvc.save":
        uvc.save(model, folder)
        return
    folder.mkdir()
    if kind == "model.safetensors":
        save_file(weights, folder / kind)
    elif kind == "pytorch_model.bin":
        torch.save(weights, folder / kind)
    else:
        halves = list(weights)[::2], list(weights)[1::2]
        names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            save_file({key: weights[key] for key in half}, folder / name)
        where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize(
    "kind", ["uvc.save", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_a_folder_is_as_good_as_its_file(kind, tmp_path):
    saved = vit(seed=1)
    make_folder(kind, saved, tmp_path / "folder")
    assert same(quietly(vit(seed=2), tmp_path / "folder"), saved.state_dict())


@pytest.mark.parametrize("name", ["uvc_vit_digits", "uvc_vit_digits_distilled", "t2t_vit_14"])
def test_models_of_this_library_load_too(name, tmp_path):
    sizes = {"depth": 1} if "t2t" in name else {}
    saved = lively(timm.create_model(name, **sizes))
    torch.save({"state_dict_ema": {f"module.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "w")
    assert same(quietly(timm.create_model(name, **sizes), tmp_path / "w"), saved.state_dict())


def test_a_compacted_and_a_pruned_model_take_their_own_weights_back(tmp_path):
    model = uvc.convert(vit(seed=1))
    uvc.apply_structure(model, uvc.Structure.random(model, 0.5, seed=1))
    for saved in (model, uvc.compact(model)):
        uvc.save(saved, tmp_path / type(saved.blocks[0]).__name__)
        other = lively(uvc.load(tmp_path / type(saved.blocks[0]).__name__), seed=3)
        assert same(quietly(other, tmp_path / type(saved.blocks[0]).__name__), saved.state_dict())
        with pytest.raises(ValueError, match=r"pruned model.*uvc\.load"):
            uvc.load_weights(vit(), tmp_path / type(saved.blocks[0]).__name__)


def test_a_compiled_or_wrapped_model_takes_weights(tmp_path):
    weights = vit(seed=1).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    model = vit(seed=2)
    quietly(nn.DataParallel(torch.compile(model)), tmp_path / "w.safetensors")
    assert same(model, weights)


def test_a_model_without_memory_gets_its_weights_and_not_views_of_the_file(tmp_path):
    weights = vit(seed=1).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    with torch.device("meta"):
        model = vit()
    quietly(model, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(bytes((tmp_path / "w.pth").stat().st_size))
    assert same(model, weights)


@pytest.mark.parametrize("its", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mine", [torch.float32, torch.bfloat16], ids=str)
def test_weights_become_the_models_dtype(its, mine, tmp_path):
    weights = {name: t.to(its) for name, t in vit(seed=1).state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = quietly(vit(seed=2).to(mine), tmp_path / "w.safetensors")
    assert same(model, {name: t.to(mine) for name, t in weights.items()})


# Of transformers: its model, and what timm calls the same.
def of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    sizes |= dict(layer_norm_eps=1e-6, num_labels=5)
    wide = dict(intermediate_size=48)
    dinov2 = dict(mlp_ratio=2, layerscale_value=0.5)
    t, dino = transformers, dict(init_values=1.0, num_classes=0)
    kinds = {
        "ViT": (t.ViTForImageClassification, t.ViTConfig(**sizes, **wide), vit),
        "ViT without biases of qkv": (
            t.ViTForImageClassification,
            t.ViTConfig(**sizes, **wide, qkv_bias=False),
            lambda: vit(qkv_bias=False),
        ),
        "DeiT with its teacher's head": (
            t.DeiTForImageClassificationWithTeacher,
            t.DeiTConfig(**sizes, **wide),
            lambda: vit("deit_tiny_distilled_patch16_224"),
        ),
        "DINOv2": (
            t.Dinov2Model,
            t.Dinov2Config(**sizes, **dinov2),
            lambda: vit("vit_small_patch14_dinov2", **dino),
        ),
        "DINOv2 with registers": (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**sizes, **dinov2),
            lambda: vit("vit_small_patch14_reg4_dinov2", **dino),
        ),
        "DINOv2 giant": (
            t.Dinov2Model,
            t.Dinov2Config(**sizes, **dinov2, use_swiglu_ffn=True),
            lambda: vit("vit_giant_patch14_dinov2", **dino | {"mlp_ratio": 64.5 / 24}),
        ),
        "ViT-MAE": (
            t.ViTMAEModel,
            t.ViTMAEConfig(**sizes, **wide, mask_ratio=0.0),
            lambda: vit("vit_base_patch16_224.mae", num_classes=0),
        ),
    }
    make, config, mine = kinds[kind]
    return lively(make(config)), mine()


KINDS = ["ViT", "ViT without biases of qkv", "DeiT with its teacher's head", "DINOv2"]
KINDS += ["DINOv2 with registers", "DINOv2 giant", "ViT-MAE"]


@pytest.mark.parametrize("as_file", ["folder", "state_dict"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*not used")
def test_a_model_of_transformers_computes_the_same(kind, as_file, tmp_path):
    theirs, mine = of_transformers(kind)
    path = tmp_path / "saved"
    # The names inside a folder are those of older versions.
    theirs.save_pretrained(path) if as_file == "folder" else torch.save(theirs.state_dict(), path)
    assert uvc.load_weights(mine, path) == ()
    with torch.no_grad():
        out = theirs(images())
        logits = getattr(out, "logits", None)
        if logits is not None:
            torch.testing.assert_close(mine(images()), logits, **CLOSE)
        elif kind == "ViT-MAE":  # in an order of its own
            back = out.ids_restore[..., None].expand(-1, -1, 24)
            states = torch.cat(
                [out.last_hidden_state[:, :1], out.last_hidden_state[:, 1:].gather(1, back)], 1
            )
            torch.testing.assert_close(mine.forward_features(images()), states, **CLOSE)
        else:
            torch.testing.assert_close(mine.forward_features(images()), out.last_hidden_state, **CLOSE)


def test_a_model_of_transformers_with_other_heads_is_refused(tmp_path):
    theirs, _ = of_transformers("ViT")
    theirs.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="2 heads per block, the model 3; make the model with num_heads=2"):
        uvc.load_weights(vit(num_heads=3), tmp_path / "saved")


@pytest.mark.parametrize("older", [False, True], ids=["names of today", "names of old files"])
def test_a_model_of_torchvision_computes_the_same(older, tmp_path):
    from torchvision.models import VisionTransformer

    theirs = lively(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5))
    weights = theirs.state_dict()
    if older:
        weights = {
            re.sub(r"mlp\.([03])\.", lambda m: f"mlp.linear_{1 + int(m[1]) // 3}.", name): value
            for name, value in weights.items()
        }
    torch.save(weights, tmp_path / "vit.pth")
    mine = quietly(vit(), tmp_path / "vit.pth")
    with torch.no_grad():
        torch.testing.assert_close(mine(images()), theirs(images()), **CLOSE)


def test_a_classifier_over_another_layer_is_left_and_said(tmp_path):
    from torchvision.models import VisionTransformer

    theirs = lively(VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5, representation_size=24))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    with pytest.warns(UserWarning, match="head.weight, head.bias stay as they were"):
        assert uvc.load_weights(vit(), tmp_path / "vit.pth") == ("head.weight", "head.bias")


def test_a_teacher_of_dino_is_taken_and_its_projection_left(tmp_path):
    weights = vit(seed=1, num_classes=0).state_dict()
    other = vit(seed=2, num_classes=0).state_dict()
    part = {f"backbone.{name}": t for name, t in weights.items()} | {"head.mlp.0.weight": torch.ones(3, 3)}
    student = {f"module.backbone.{name}": t for name, t in other.items()}
    saved = {"student": student, "teacher": part, "epoch": 1, "args": argparse.Namespace(arch="vit")}
    torch.save(saved, tmp_path / "dino.pth")
    model = vit(seed=3)
    head = model.head.weight.clone()
    with pytest.warns(UserWarning) as said:
        assert uvc.load_weights(model, tmp_path / "dino.pth") == ("head.weight", "head.bias")
    assert len(said) == 1 and "the file has none" in str(said[0].message)
    assert "not used: 1 (head.mlp.0.weight)" in str(said[0].message)
    assert torch.equal(model.head.weight, head)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in weights.items())


def test_of_student_and_teacher_in_one_dict_the_teacher_is_taken(tmp_path):
    teacher, student = (vit(seed=i, num_classes=0).state_dict() for i in (1, 2))
    both = {f"student.backbone.{name}": t for name, t in student.items()}
    both |= {f"teacher.backbone.{name}": t for name, t in teacher.items()}
    torch.save({"model": both | {"teacher.dino_head.w": torch.ones(2)}}, tmp_path / "w.pth")
    model = vit(num_classes=0)
    with pytest.warns(UserWarning, match="not used"):
        uvc.load_weights(model, tmp_path / "w.pth")
    assert same(model, teacher)


def test_averaged_weights_come_before_the_last_ones_and_it_is_said(tmp_path):
    mean, last = vit(seed=1).state_dict(), vit(seed=2).state_dict()
    torch.save({"model": last, "model_ema": mean}, tmp_path / "w.pth")
    model = vit()
    with pytest.warns(UserWarning, match="those of 'model_ema'; 'model' not used"):
        uvc.load_weights(model, tmp_path / "w.pth")
    assert same(model, mean)


def test_a_decoder_of_mae_is_not_used(tmp_path):
    weights = vit(seed=1, num_classes=0).state_dict()
    rest = {"mask_token": torch.ones(1, 1, 8), "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8)}
    rest["decoder_pos_embed"] = torch.ones(1, 17, 8)
    torch.save({"model": weights | rest}, tmp_path / "mae.pth")
    model = vit(num_classes=0)
    with pytest.warns(UserWarning, match="not used: 3 "):
        uvc.load_weights(model, tmp_path / "mae.pth")
    assert same(model, weights)


def test_layer_scale_under_the_published_names_of_deit3(tmp_path):
    saved = vit("deit3_small_patch16_224", seed=1)
    names = {n: re.sub(r"ls([12])\.gamma", r"gamma_\1", n) for n in saved.state_dict()}
    torch.save({"model": {names[n]: t for n, t in saved.state_dict().items()}}, tmp_path / "deit3.pth")
    assert same(quietly(vit("deit3_small_patch16_224"), tmp_path / "deit3.pth"), saved.state_dict())


@pytest.mark.parametrize("size", [48, (16, 48)], ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_positions_are_resampled_by_timm_to_the_size_of_the_model_and_it_is_said(name, size, tmp_path):
    saved = vit(name, seed=1)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = vit(name, img_size=size)
    with pytest.warns(UserWarning, match="adapted by timm: pos_embed"):
        assert uvc.load_weights(model, tmp_path / "w.pth") == ()
    grid, tokens = model.patch_embed.grid_size, model.num_prefix_tokens
    expected = resample_abs_pos_embed(saved.pos_embed.detach(), grid, num_prefix_tokens=tokens)
    assert torch.equal(model.pos_embed, expected)


def test_a_saved_folder_of_wide_images_keeps_its_positions(tmp_path):
    # 2 x 8 patches are as many as 4 x 4, the grid of the square size that timm knows for this name.
    saved = vit(seed=1, img_size=(16, 64))
    saved.pretrained_cfg["input_size"] = (3, 32, 32)
    uvc.save(saved, tmp_path / "wide")
    assert same(quietly(vit(img_size=(16, 64)), tmp_path / "wide"), saved.state_dict())


def test_colour_weights_go_into_a_grey_model_as_timm_does_it(tmp_path):
    saved = vit(seed=1)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = vit(in_chans=1)
    with pytest.warns(UserWarning, match="adapted by timm: patch_embed.proj.weight"):
        uvc.load_weights(model, tmp_path / "w.pth")
    grey = images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(model(grey), saved(grey.expand(-1, 3, -1, -1)), **CLOSE)


def test_a_classifier_for_other_classes_is_left_and_said_once(tmp_path):
    saved = vit("deit_tiny_distilled_patch16_224", seed=1, num_classes=7)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = vit("deit_tiny_distilled_patch16_224")
    before = model.head.weight.clone(), model.head_dist.weight.clone()
    with pytest.warns(UserWarning) as said:
        left = uvc.load_weights(model, tmp_path / "w.pth")
    assert left == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    assert len(said) == 1 and "[7, 24], not [5, 24]" in str(said[0].message)
    assert torch.equal(model.head.weight, before[0]) and torch.equal(model.head_dist.weight, before[1])
    assert torch.equal(model.blocks[1].mlp.fc2.weight, saved.blocks[1].mlp.fc2.weight)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return sys.exit, ("code was run",)


def changed(**changes):
    """The weights of the model with some of them put in, or, where None, taken out."""
    weights = {**vit(seed=1).state_dict(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {name: value for name, value in weights.items() if value is not None}


def text(words):
    return lambda path: path.write_text(words)


def torn(path):
    torch.save(changed(), path)
    path.write_bytes(path.read_bytes()[:-9000])


def torn_safetensors(path):
    save_file(changed(), path)
    path.write_bytes(path.read_bytes()[:-100])


def script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def saved(value):
    return lambda path: torch.save(value() if callable(value) else value, path)


def of_fewer_values():
    return changed(pos_embed=torch.zeros(1).expand(1 << 40))


# fmt: off
FAULTS = {
    "no such file": (lambda path: None, "does not exist"),
    "an empty folder": (lambda path: path.mkdir(), "holds no weights; name a file, or a folder"),
    "an empty file": (text(""), "is empty"),
    "a text": (text("weights, honestly"), "neither a safetensors file nor one of torch.save"),
    "a pointer of Git LFS": (text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "a page of the web": (text("<!DOCTYPE html><html>404</html>"), "a page of the web"),
    "a file cut short": (torn, "no whole file of torch.save"),
    "a safetensors file cut short": (torn_safetensors, "no whole safetensors file"),
    "a pickle with code": (saved(lambda: {"model": changed(), "hook": Trap()}), "objects: 1 (sys.exit)"),
    "a whole model": (saved(lambda: vit()), "Python objects: "),
    "a program": (script, "TorchScript"),
    "a list": (saved([1, 2]), "holds a list, no weights by name"),
    "no weights": (saved({"epoch": 3, "optimizer": {}}), "holds a dict of epoch, optimizer, no weights"),
    "a missing tensor": (saved(lambda: changed(cls_token=None)), "lacks 1 (cls_token) of the model's"),
    "many missing tensors": (
        saved(lambda: {"cls_token": torch.ones(1, 1, 24)}),
        "lacks 29 (pos_embed, patch_embed.proj.weight, patch_embed.proj.bias, ...)",
    ),
    "an unknown tensor": (saved(lambda: changed(gate=torch.ones(3))), "has 1 (gate) that the model does not"),
    "another shape": (
        saved(lambda: changed(blocks__0__mlp__fc1__weight=torch.ones(47, 24))),
        "has 1 (blocks.0.mlp.fc1.weight [47, 24] for [48, 24]) of other shapes",
    ),
    "a head without its bias": (saved(lambda: changed(head__bias=None)), "lacks 1 (head.bias)"),
    "another model": (saved(lambda: vit(depth=3).state_dict()), "has 12 (blocks.2.norm1.weight, "),
    "a distilled model": (
        saved(lambda: vit("deit_tiny_distilled_patch16_224").state_dict()),
        "has 1 (dist_token) that the model does not know; has 1 (pos_embed [1, 18, 24] for [1, 17, 24])",
    ),
    "nan": (saved(lambda: changed(norm__bias=torch.full((24,), torch.nan))), "norm.bias holds values"),
    "infinity in qkv": (
        saved(lambda: changed(blocks__1__attn__qkv__bias=torch.full((72,), torch.inf))),
        "blocks.1.attn.qkv.bias holds values that are NaN or infinite in float32",
    ),
    "integers": (
        saved(lambda: changed(cls_token=torch.ones(1, 1, 24, dtype=torch.int8))),
        "cls_token is int8 where the model has float32",
    ),
    "a sparse tensor": (
        saved(lambda: changed(cls_token=torch.ones(1, 1, 24).to_sparse())), "cls_token is sparse",
    ),
    "a tensor without values": (
        saved(lambda: changed(cls_token=torch.empty(1, 1, 24, device="meta"))), "cls_token has no values",
    ),
    "a shape larger than the file": (saved(of_fewer_values), "pos_embed has the shape [1099511627776] but"),
    "two weights of one name": (
        saved(lambda: changed(**{"module.cls_token": torch.ones(1, 1, 24)})), "save the weights of one model",
    ),
}
# fmt: on


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line_and_nothing_is_loaded(fault, tmp_path):
    write, says = FAULTS[fault]
    write(tmp_path / "w.pth")
    model = vit(seed=2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        uvc.load_weights(model, tmp_path / "w.pth")
    said = str(error.value)
    assert says in said and str(tmp_path / "w.pth") in said and "\n" not in said and ";" in said
    assert same(model, before)


def test_a_value_too_large_for_half_is_named(tmp_path):
    torch.save(changed(norm__weight=torch.full((24,), 7e4)), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"norm\.weight holds values that are NaN or infinite in float16"):
        uvc.load_weights(vit().half(), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["../w.safetensors", "none.safetensors", "/etc/passwd"])
def test_an_index_names_only_files_beside_it(name, tmp_path):
    (tmp_path / "folder").mkdir()
    save_file(changed(), tmp_path / "w.safetensors")
    index = {"weight_map": {key: name for key in load_file(tmp_path / "w.safetensors")}}
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not beside it"):
        uvc.load_weights(vit(), tmp_path / "folder")


def test_parts_of_qkv_that_are_missing_are_named(tmp_path):
    theirs, mine = of_transformers("ViT")
    weights = theirs.state_dict()
    del weights["vit.layers.1.attention.k_proj.weight"]
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"of blocks\.1\.attn\.qkv\.weight, 2 of 3 parts are there"):
        uvc.load_weights(mine, tmp_path / "w.pth")
