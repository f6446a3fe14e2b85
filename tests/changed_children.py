"""Changes to the children of a layer, as users make them, and small models that have them."""

import torch
import torch.nn.functional as F
from oracle import MODELS, structures
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import uvc
from uvc.structure import Structure

X = (2, 3, 16, 16)


class LoRA(nn.Module):
    """As adapters are made: the base's sizes, weight and bias, and a forward pass that adds to it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.a = nn.Parameter(torch.randn(3, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 3, dtype=base.weight.dtype))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Doubled(torch.Tensor):
    """A weight with a product of its own, as quantised and distributed tensors have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * found.as_subclass(torch.Tensor) if func is F.linear else found


class PerToken(nn.Module):
    """An activation with a weight for every neuron."""

    def __init__(self, width: int):
        super().__init__()
        self.slope = nn.Parameter(torch.rand(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


def linears(block: nn.Module) -> list[tuple[nn.Module, str]]:
    halves = (block.attn, block.mlp)
    return [(half, n) for half in halves for n, m in half.named_children() if isinstance(m, nn.Linear)]


def wrap(make):
    def change(block):
        for half, name in linears(block):
            setattr(half, name, make(getattr(half, name)))

    return change


def scaled(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Scaled
    return linear


def own_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x, of=linear: F.linear(x, of.weight, of.bias).tanh()
    return linear


def doubled(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Doubled))
    return linear


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, inputs, out: out.sin())
    return linear


def pre_hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.7,))
    return linear


def back_hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    return linear


def inner_norms(block: nn.Module) -> None:
    block.attn.q_norm, block.attn.k_norm, block.attn.norm = nn.LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(24)
    block.mlp.norm = nn.LayerNorm(block.mlp.fc2.in_features)
    block.double()


def gate(block: nn.Module) -> None:
    block.attn.gate = nn.Linear(24, 24).double()


def act(block: nn.Module) -> None:
    block.mlp.act = PerToken(block.mlp.fc2.in_features)


def hooked_act(block: nn.Module) -> None:
    block.mlp.act.register_forward_hook(lambda module, inputs, out: out + 1)
    block.attn.q_norm.register_forward_hook(lambda module, inputs, out: out * 2)


def probabilities(block: nn.Module) -> None:
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: out * out)


CHANGES = {
    "adapters": wrap(LoRA),
    "subclasses": wrap(scaled),
    "forward functions of their own": wrap(own_forward),
    "weights of another tensor class": wrap(doubled),
    "forward hooks": wrap(hooked),
    "forward pre-hooks": wrap(pre_hooked),
    "backward hooks": wrap(back_hooked),
    "prune": wrap(lambda m: prune.l1_unstructured(m, "weight", 0.4)),
    "weight_norm by hook": wrap(lambda m: nn.utils.weight_norm(m)),
    "weight_norm as parametrization": wrap(lambda m: parametrizations.weight_norm(m)),
    "spectral_norm": wrap(lambda m: nn.utils.spectral_norm(m).eval()),
    "inner norms": inner_norms,
    "a gate": gate,
    "an activation with weights": act,
    "hooks on what has no weights": hooked_act,
    "a hook on the attention map": probabilities,
}
SAME_OUTPUT = ("backward hooks", "weight_norm by hook", "weight_norm as parametrization")


def removed_by_hooks(model: nn.Module, structure: Structure) -> nn.Module:
    """A timm model in which hooks zero what `structure` removes, before the children that would read it."""
    for block, kept in zip(model.blocks, structure.blocks, strict=True):
        H, K = block.attn.num_heads, block.attn.head_dim
        qk, v, neurons = torch.zeros(H, 1, K), torch.zeros(H, K), torch.zeros(block.mlp.fc2.in_features)
        for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
            qk[head, 0, list(qk_dims)] = 1
            v[head, list(v_dims)] = 1
        neurons[list(kept.neurons)] = 1
        block.attn.q_norm.register_forward_hook(lambda m, i, out, mask=qk: out * mask)
        # First of all pre-hooks, as others change what the child reads, not what it is given.
        for child, mask in ((block.attn.proj, v.flatten()), (block.mlp.fc2, neurons)):
            child.register_forward_pre_hook(lambda m, i, mask=mask: (i[0] * mask,), prepend=True)
    return model


def changed(change, name: str = "vit") -> nn.Module:
    torch.manual_seed(2)
    model = MODELS[name]().double().eval()
    for block in model.blocks:
        change(block)
    return model.requires_grad_()


def pruned_then_changed(change, name: str = "vit") -> nn.Module:
    torch.manual_seed(2)
    model = MODELS[name]().double().eval()
    uvc.apply_structure(model, structures(model)["random at keep 0.5"])
    for block in model.blocks:
        change(block)
    return model.requires_grad_()
