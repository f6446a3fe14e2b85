"""Models on disk: bit for bit the same after a round trip, and one clear line for whatever is wrong."""

import hashlib
import json
import os
import struct
import warnings

import pytest
import timm
import torch
from oracle import MODELS, TOLERANCE, error, images, small_vit, stored, structures
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed

import uvc
import uvc.models
from uvc.compaction import forms_of, in_form
from uvc.io.card import CARD, PICTURE
from uvc.io.serialization import CONFIG, WEIGHTS, describe, rebuild
from uvc.layers import FORMS
from uvc.structure import Structure


def hybrid(name: str, **changes) -> torch.nn.Module:
    """A model that only timm's own function for its name can rebuild."""
    return timm.create_model(name, depth=2, num_classes=5, **changes)


MORE = {
    "digits": lambda: timm.create_model("uvc_vit_digits", img_size=16, in_chans=3),
    "clip style": lambda: small_vit(pre_norm=True, act_layer="quick_gelu", norm_layer=torch.nn.LayerNorm),
    "prefix tokens pooled": lambda: small_vit(reg_tokens=2, global_pool="avg", pool_include_prefix=True),
    "no classes, no final norm": lambda: small_vit(num_classes=0, final_norm=False),
    "every dropout": lambda: small_vit(
        drop_rate=0.1,
        pos_drop_rate=0.1,
        patch_drop_rate=0.2,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.3,
    ),
    "hybrid": lambda: hybrid("vit_tiny_r_s16_p8_224", img_size=128),
    "hybrid of another stem": lambda: hybrid("vit_base_mci_224", img_size=32),
    "norm in the stem": lambda: hybrid("aimv2_large_patch14_224", img_size=28),
    "rms norm, odd ratio": lambda: small_vit(
        norm_layer="rmsnorm", mlp_ratio=2.3, fc_norm=True, pos_embed="none"
    ),
}


def pruned(model: torch.nn.Module, case: str = "random at keep 0.5") -> torch.nn.Module:
    return uvc.apply_structure(model, structures(model)[case]).eval()


@pytest.mark.filterwarnings("ignore:UVC")
@pytest.mark.parametrize("compacted", [True, False], ids=["compacted", "full size"])
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_a_loaded_model_is_the_saved_one(name, compacted, tmp_path):
    model = pruned({**MODELS, **MORE}[name]())
    model = uvc.compact(model) if compacted else model
    uvc.save(model, tmp_path)
    loaded = uvc.load(tmp_path)
    x = images(model)
    assert stored(loaded) == stored(model)
    assert error(loaded(x), model(x)) < TOLERANCE[x.dtype]
    assert uvc.structure_of(loaded) == uvc.structure_of(model)
    assert uvc.cost(loaded) == uvc.cost(model)
    assert not any(module.training for module in loaded.modules())
    assert [(n, p.shape, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in model.named_parameters()
    ]
    torch.manual_seed(5)
    dropped = model.train()(x)
    torch.manual_seed(5)
    assert error(loaded.train()(x), dropped) < TOLERANCE[x.dtype]


def test_the_form_of_heads_survives(tmp_path):
    model = pruned(small_vit())
    small = uvc.compact(model, ["padded", "grouped", "padded"])
    uvc.save(small, tmp_path)
    loaded, x = uvc.load(tmp_path), images(model)
    assert stored(loaded) == stored(small) and forms_of(loaded) == ("padded", "grouped", "padded")
    assert error(loaded(x), model(x)) < TOLERANCE[x.dtype]
    config = json.loads((tmp_path / CONFIG).read_text())
    with pytest.raises(ValueError, match="form must be one of grouped, padded"):
        rebuild({**config, "form": ["padded"]})


def test_a_form_changes_no_weight_in_a_file(tmp_path):
    model = pruned(small_vit())
    for form in FORMS:
        uvc.save(uvc.compact(model, form), tmp_path / form)
    one, other = (load_file(tmp_path / form / WEIGHTS) for form in FORMS)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_the_format_that_stored_the_zeros_of_padded_heads_loads(tmp_path):
    model = pruned(small_vit())
    forms = ["padded", "grouped", "padded"]
    config = json.dumps({**describe(uvc.compact(model, forms)), "format": "uvc-4"})
    (tmp_path / CONFIG).write_text(config)
    tensors = in_form(uvc.compact(model), forms, ("attn",)).state_dict()
    save_file(tensors, tmp_path / WEIGHTS, {"config": hashlib.sha256(config.encode()).hexdigest()})
    loaded, x = uvc.load(tmp_path), images(model)
    assert stored(loaded) == stored(uvc.compact(model, forms)) and forms_of(loaded) == tuple(forms)
    assert error(loaded(x), model(x)) < TOLERANCE[x.dtype]


def test_a_folder_of_the_format_before_forms_is_grouped():
    config = describe(uvc.compact(pruned(small_vit())))
    old = {**config, "format": "uvc-3"}
    del old["form"]
    assert forms_of(rebuild(old)[1]) == ("grouped",) * 3


@pytest.mark.parametrize("case", structures(small_vit()))
def test_any_structure_survives(case, tmp_path):
    small = uvc.compact(pruned(small_vit(init_values=0.1), case))
    uvc.save(small, tmp_path)
    loaded = uvc.load(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert stored(loaded) == stored(small)
    assert error(loaded(x), small(x)) < TOLERANCE[x.dtype]
    assert uvc.structure_of(loaded) == uvc.structure_of(small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_stays(dtype, tmp_path):
    small = uvc.compact(pruned(small_vit())).to(dtype)
    uvc.save(small, tmp_path)
    assert {p.dtype for p in uvc.load(tmp_path).parameters()} == {dtype}


def test_a_new_head_is_saved_with_its_classes(tmp_path):
    small = uvc.compact(pruned(small_vit()))
    small.reset_classifier(7)
    uvc.save(small, tmp_path)
    assert uvc.load(tmp_path).num_classes == 7


def test_the_folder_holds_plain_files_without_pickle(tmp_path):
    uvc.save(uvc.compact(pruned(small_vit())), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS, PICTURE]
    assert json.loads((folder / CONFIG).read_text())["class"] == "VisionTransformer"
    assert load_file(folder / WEIGHTS).keys() == uvc.load(folder).state_dict().keys()


def own_patch_embed() -> torch.nn.Module:
    class OwnPatchEmbed(PatchEmbed):
        pass

    return small_vit(embed_layer=OwnPatchEmbed)


def with_eps() -> torch.nn.Module:
    model = small_vit()
    model.blocks[1].norm2.eps = 0.1
    return model


class OwnTransformer(timm.models.vision_transformer.VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (own_patch_embed, "patch_embed is a OwnPatchEmbed where timm makes a PatchEmbed"),
        (with_eps, r"blocks\.1\.norm2 has eps 0\.1, timm makes 1e-06"),
        (lambda: small_vit(act_layer=torch.nn.Hardtanh), r"blocks\.0\.mlp\.act is a Hardtanh"),
        (lambda: small_vit(OwnTransformer), "cannot save a OwnTransformer"),
    ],
    ids=["embedding", "setting", "activation", "class"],
)
@pytest.mark.parametrize("compacted", [True, False], ids=["compacted", "full size"])
def test_what_cannot_be_rebuilt_is_refused_before_anything_is_written(make, says, compacted, tmp_path):
    model = uvc.compact(make()) if compacted else make()
    with pytest.raises(ValueError, match=says):
        uvc.save(model, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("mlp.act", r"blocks\.1\.mlp\.act is a Hardswish where timm makes a GELU"),
        ("norm1", r"blocks\.1\.norm1 is a Identity where timm makes a LayerNorm"),
        ("attn.proj", r"blocks\.1\.attn\.proj has out_features 23"),
    ],
)
def test_a_change_to_a_compacted_block_is_refused_and_not_forgotten(part, says, tmp_path):
    new = {
        "mlp.act": torch.nn.Hardswish(),
        "norm1": torch.nn.Identity(),
        "attn.proj": torch.nn.Linear(24, 23),
    }
    model = uvc.compact(small_vit())
    model.blocks[1].set_submodule(part, new[part])
    with pytest.raises(ValueError, match=says):
        uvc.save(model, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("compacted", [True, False], ids=["compacted", "full size"])
def test_weights_that_two_layers_share_are_saved_for_both(compacted, tmp_path):
    model = pruned(small_vit())
    model = uvc.compact(model) if compacted else model
    model.blocks[2].norm1 = model.blocks[0].norm1
    flat = torch.arange(48.0)
    model.norm.weight.data, model.norm.bias.data = flat[:24], flat[24:]  # views of one memory
    uvc.save(model, tmp_path)
    assert stored(uvc.load(tmp_path)) == stored(model)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(uvc.load(tmp_path)(x), model(x))


@pytest.mark.parametrize("compacted", [True, False], ids=["compacted", "full size"])
def test_hooks_and_forwards_that_are_not_saved_are_said(compacted, tmp_path):
    model = uvc.compact(small_vit()) if compacted else uvc.convert(small_vit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uvc.save(model, tmp_path)
    model.head.register_forward_hook(lambda module, args, out: 2 * out)
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    with pytest.warns(UserWarning, match="are not saved: the model, head, 2 in all"):
        uvc.save(model, tmp_path)


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write a model: .*file"):
        uvc.save(small_vit(), tmp_path / "file")


def test_a_failed_save_leaves_the_old_model_whole(tmp_path, monkeypatch):
    old = uvc.compact(pruned(small_vit()))
    uvc.save(old, tmp_path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        uvc.save(uvc.compact(pruned(small_vit(), "no heads")), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CARD, CONFIG, WEIGHTS, PICTURE]
    assert uvc.structure_of(uvc.load(tmp_path)) == uvc.structure_of(old)


def edit(change) -> callable:
    def apply(folder):
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


def cut(name: str, size: int) -> callable:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def resave(change) -> callable:
    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def huge_header(folder) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


FAULTS = {
    "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "empty weights": (cut(WEIGHTS, 0), WEIGHTS),
    "truncated header": (cut(WEIGHTS, 100), WEIGHTS),
    "truncated weights": (cut(WEIGHTS, -1), WEIGHTS),
    "a header of absurd size": (huge_header, WEIGHTS),
    "truncated config": (cut(CONFIG, 300), CONFIG),
    "config of another kind": (lambda f: (f / CONFIG).write_text("[1, 2]"), CONFIG),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), CONFIG),
    "unknown field": (edit(lambda c: c.update(code="import os")), "fields"),
    "unknown format": (edit(lambda c: c.update(format="uvc-9")), "format must be 'uvc-5', got 'uvc-9'"),
    "unknown class": (edit(lambda c: c.update({"class": "os.system"})), "class must be one of"),
    "a list for a class": (edit(lambda c: c.update({"class": ["x"]})), CONFIG),
    "unknown norm": (edit(lambda c: c["norm"].update(name="eval")), "norm must be one of"),
    "unknown mlp": (edit(lambda c: c.update(mlp="os.system")), "mlp must be one of"),
    "an address for an architecture": (
        edit(lambda c: c.update(architecture="hf-hub:someone/something")),
        "architecture must be a model of timm, got 'hf-hub:someone/something'",
    ),
    "an architecture of another kind": (edit(lambda c: c.update(architecture="resnet18")), CONFIG),
    "unknown activation": (edit(lambda c: c.update(activation="exec")), "activation must be one of"),
    "unknown argument": (
        edit(lambda c: c["arguments"].update(embed_layer="x")),
        "unknown argument embed_layer",
    ),
    "missing argument": (edit(lambda c: c["arguments"].pop("embed_dim")), "missing argument embed_dim"),
    "argument of a wrong type": (edit(lambda c: c["arguments"].update(embed_dim="wide")), CONFIG),
    "width that does not fit the weights": (edit(lambda c: c["arguments"].update(embed_dim=48)), WEIGHTS),
    "a width of terabytes": (edit(lambda c: c["arguments"].update(embed_dim=4 * 10**9)), "model"),
    "structure out of range": (
        edit(lambda c: c["structure"]["blocks"][0].update(neurons=[999])),
        "index 999",
    ),
    "structure of another model": (edit(lambda c: c["structure"]["blocks"][0].update(neurons=[1])), WEIGHTS),
    "config of another save": (
        edit(lambda c: c["arguments"].update(drop_rate=0.5)),
        r"with another config\.json",
    ),
    "missing tensor": (resave(lambda t: t.pop("head.bias")), "lacks head.bias"),
    "unknown tensor": (resave(lambda t: t.update(extra=torch.zeros(2))), "unknown tensor extra"),
    "integer tensor": (
        resave(lambda t: t.update({"head.bias": torch.zeros(5, dtype=torch.int32)})),
        "head.bias as I32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_one_clear_line(fault, tmp_path):
    uvc.save(uvc.compact(pruned(small_vit())), tmp_path)
    damage, says = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        uvc.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_config_of_the_first_format_is_still_read():
    model = pruned(small_vit())
    config = describe(model)
    first = {key: value for key, value in config.items() if key not in ("architecture", "mlp")}
    structure, rebuilt = rebuild({**first, "format": "uvc-1"})
    assert structure == uvc.structure_of(model)
    assert list(rebuilt.state_dict()) == list(model.state_dict())


def test_files_of_two_saves_are_not_taken_for_one_model(tmp_path):
    full = pruned(small_vit())
    uvc.save(full, tmp_path / "a")
    uvc.save(uvc.apply_structure(full, Structure.random(full, 0.3)), tmp_path / "b")
    os.replace(tmp_path / "a" / CONFIG, tmp_path / "b" / CONFIG)
    with pytest.raises(ValueError, match=r"was saved with another config\.json"):
        uvc.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224"])
def test_a_swin_of_a_timm_that_does_not_keep_its_windows_is_refused_in_one_line(name, tmp_path):
    stages = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    model = uvc.convert(timm.create_model(name, img_size=32, window_size=4, num_classes=2, **stages))
    if hasattr(model, "_ref_window_sizes"):
        del model._ref_window_sizes
    with pytest.raises(ValueError, match="a Swin is made again with timm 1"):
        uvc.save(model, tmp_path / "swin")
    assert not (tmp_path / "swin").exists()
