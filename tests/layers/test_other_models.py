"""What models of transformers and torchvision say; test_every_class.py has what they share with timm's."""

import pytest
import torch
from other_models import MODELS, SIZES, images, made

import uvc
from uvc.layers import blocks_of

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("name", MODELS)
def test_blocks_stay_instances_of_their_classes(name):
    model = made(name)
    classes = [type(block) for block in blocks_of(model)]
    uvc.convert(model)
    assert all(isinstance(block, cls) for block, cls in zip(blocks_of(model), classes, strict=True))
    model(images(model))


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
    model, calls = uvc.convert(made("torchvision")), []
    x = images(model)
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
