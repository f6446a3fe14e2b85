"""Weights that do not fit, or are none: one line, and nothing is loaded."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from weights_of_others import of_transformers, same, vit

import uvc


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
