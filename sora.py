# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this project
"""LoRA, DoRA, Pre-Diag and SORA in one file, with a GPT to try them on. It needs Python 3.11 or newer, torch 2.6 or
newer, and nothing else: copy it into your project.

LoRA trains sBA, a matrix of low rank r, beside a frozen weight W0 (out, in): A (r, in), B (out, r), s = alpha / r.
"Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT" (Chang et al., AAAI 2026) adds a
*conditioning* matrix, which multiplies from the left and so acts on the output features. Two choices make a method: is
it applied before sBA is added or after, and what kind of matrix is it?

    W' = after(before(W0) + sBA)

    method      before     after      W'                       trained      parameters beyond LoRA's
    LoRA        -          -          W0 + sBA                 A B          0
    DoRA        -          diag(g)    diag(g) (W0 + sBA)       A B m        out
    Pre-Diag    diag(d)    -          diag(d) W0 + sBA         A B d        out
    SORA        diag(d)    R          R (diag(d) W0 + sBA)     A B d C E    out + 2 r_p out

    DoRA's g = m / ‖W0 + sBA‖row, where ‖·‖row is the norm of each row. SORA's R is a rotation, RᵀR = I, made of two
    thin matrices C and E (out, r_p). At the start B = 0, d = 1, m = ‖W0‖row, and E = C, which makes R = I: W' = W0.

SORA stands for Skewed Orthogonal Rotation Adaptation: R is made of a skew matrix (see `rotation`).

What makes one choice better? The paper's yardstick is how evenly the update W' − W0 is spread over its directions: the
entropy of its singular values (`svd_entropy`). Full fine-tuning changes a weight a little in every direction, LoRA in r
directions only. A diagonal changes every direction, as (diag(d) − I) W0 is not of low rank; this, the paper holds, is
why DoRA beats LoRA. Why before? DoRA's diagonal, after the sum, rescales BA too and depends on it through the norm; d
calibrates W0 alone, at less cost. Why rotate? A diagonal can only stretch each output feature; a rotation mixes them,
and keeps the length of the output. (The yardstick hardly sees this: with M = diag(d) W0 + sBA, what R adds to the
update, (R − I) M, has rank 2 r_p at most.)

One observation makes the code short. Since (R M) x = R (M x), to condition the weight W0 or its outputs W0 x is the
same, and W0 itself is nothing but its outputs, for the columns of the identity. So one function,
`LoRALinear.conditioned`, gives both W'x and W', and a method is a line or two. The formulas are for one column x; the
code holds many of them as the rows of an array, so that A x is written F.linear(x, A).

Glossary
    here            in the formulas                                              in the authors' code
    W0              W0 (out, in), frozen                                         base_layer.weight
    A, B            A (r, in), B (out, r): the low-rank pair                     lora_A, lora_B
    r, alpha, s     rank of BA; s = alpha / r scales it                          r, lora_alpha, scaling
    m               m (out,): DoRA's magnitude, ± the norm of each row of W'     -
    d               d (out,): the diagonal that calibrates W0                    lora_Diag
    C, E            C, E (out, r_p): the pair that makes the rotation            lora_C, lora_D
    r_p             the columns of C and of E: R − I has rank 2 r_p at most
    x, y, h         rows: the input x (n, in), y (n, out) on its way from W0 x to W'x, and h = A x (n, r)

Use
    from sora import adapt, adapter_state_dict, load_adapter, merge
    adapt(model, "sora", r=16, alpha=32, r_p=4)            # freezes model, replaces its nn.Linear layers in place
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)    # tune lr; decay would pull d to 0, not to 1
    ...                                                    # your training loop
    torch.save(adapter_state_dict(model), "sora.pt")       # only what was trained
    load_adapter(fresh_model, torch.load("sora.pt"))       # on the same base, in another process
    merge(model)                                           # plain layers again, no cost at inference

Not in it: convolutions and embeddings, experts, quantised bases, several adapters at once.

References: LoRA, Hu et al. 2021, arXiv 2106.09685; DoRA, Liu et al. 2024, arXiv 2402.09353; Pre-Diag and SORA, Chang et
al. 2025, arXiv 2511.00051, code in MaeChd/SORA, peft/tuners/sora/layer.py; entropy, Roy & Vetterli 2007 (p = σ/Σσ) and
Alter et al. 2000 (p = σ²/Σσ²); GPT-2, Radford et al. 2019, with the layout and names of Karpathy's nanoGPT.
"""
import copy
import json
import math
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ======== The method: one layer, what four methods make of it, and the two kinds of conditioning


class LoRALinear(nn.Module):
    """LoRA (Hu et al. 2021):    W' = W0 + sBA

    A   (r, in)    kaiming_uniform(a=√5), as nn.Linear starts    trained
    B   (out, r)   0, so that W' = W0 at the start               trained
    Parameters: r (in + out). The other methods override `start`, and `before` or `after` or both.

    linear     the layer to adapt: it becomes frozen, its memory is shared, not copied
    r, alpha   rank of BA, 1 ≤ r ≤ min(in, out), and its scale s = alpha / r
    dropout    in training, the probability that an entry of A's input is set to 0; `weight` knows nothing of it
    options    the method's own: arguments of its `start`

    x (..., in) -> y (..., out), in the dtype that nn.Linear gives. The adapter is float32 on a 16-bit base, as training
    would stall with bfloat16's few digits. The bias is never conditioned. Raises ValueError for a layer, r or alpha
    that will not do (`why_not`).
    """

    def __init__(self, linear: nn.Linear, r: int = 16, alpha: float = 32, dropout: float = 0.0, **options):
        super().__init__()
        reason = why_not(linear, r, alpha)
        if reason:
            raise ValueError(f"{linear} cannot be adapted: {reason}")
        self.fan_in_fan_out = isinstance(linear, conv1d())
        self.template = without_tensors(linear)
        self.dropout = nn.Dropout(dropout)
        self.train(linear.training)

        names = {cls: name for name, cls in METHODS.items()}
        self.options = {"method": names.get(type(self)), "r": int(r), "alpha": float(alpha),
                        "dropout": float(dropout), **options}
        self.s = alpha / r
        self.enabled = True  # not so within `disabled`
        self.W0 = linear.weight
        self.bias = linear.bias
        self.out_features, self.in_features = self.oriented(self.W0).shape
        self.A = nn.init.kaiming_uniform_(self.zeros(r, self.in_features), a=5**0.5)
        self.B = self.zeros(self.out_features, r)
        self.start(**options)
        linear.requires_grad_(False)

    def start(self):
        """What the method trains beside A and B, so that W' = W0"""

    def zeros(self, *shape):
        return nn.Parameter(wide(self.W0.new_zeros(shape)))

    def before(self, y):
        return y  # (n, out)

    def after(self, y):
        return y  # (n, out)

    def conditioned(self, y, h):
        """after(before(y) + s B h), that is W'x (n, out), of y = W0 x (n, out) and h = A x (n, r)"""
        if not self.enabled:
            return y
        with no_autocast(y):
            y = torch.addmm(self.before(y), h, self.B.T.to(y.dtype), alpha=self.s)
            return self.after(y)

    def wide_weight(self):
        """W' (out, in), before it is rounded: the rows of x are those of the identity, so y = W0ᵀ and h = Aᵀ"""
        return self.conditioned(wide(self.oriented(self.W0).T), wide(self.A.T)).T

    @property
    def weight(self) -> torch.Tensor:
        """W' as the adapted layer stored its weight, in W0's dtype, with gradients; computed anew at each reading. So a
        module that reads layer.weight, without calling the layer, gets the adapted one."""
        return self.oriented(self.wide_weight()).to(self.W0.dtype)

    def by_weight(self, x):
        """W'x + b, after W' is made"""
        return F.linear(x, self.oriented(self.weight), self.bias)

    def by_outputs(self, x):
        """W'x + b, without making W'"""
        rows = x.reshape(-1, self.in_features)  # (n, in)
        y = F.linear(rows, self.oriented(self.W0))  # (n, out)
        h = F.linear(self.dropout(rows), self.A.to(x.dtype))  # (n, r)
        y = self.conditioned(y, h)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Both ways give the same, up to rounding. By weight costs the making of W', whatever n is, and dW', one product
        # more, in the backward pass; by outputs costs some passes over (n, out). So W' pays where many tokens meet a
        # narrow layer: on two CPU cores it takes 0.60 to 0.84 of by_outputs' time for n = 2048 and in = out = 128, but
        # 1.15 to 1.40 for in = out = 1024. With dropout there is no W': A and W0 see different inputs.
        many = input.numel() // self.in_features >= 512
        narrow = self.in_features <= (512 if input.is_cpu else 2048)
        drops = self.training and self.dropout.p
        if many and narrow and not drops:
            return self.by_weight(input)
        return self.by_outputs(input)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """W' − W0 (out, in), in the adapter's dtype, before W' is rounded to W0's."""
        return self.wide_weight() - self.oriented(self.W0)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W' (out, in) in W0's dtype; bit for bit W0 until something is trained."""
        return self.oriented(self.weight)

    def oriented(self, W):
        """(out, in) of a weight as the adapted layer stores it, and back: only transformers' Conv1D has (in, out)"""
        return W.T if self.fan_in_fan_out else W

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.options}"


class DoRALinear(LoRALinear):
    """DoRA in matrix form (Liu et al. 2024; Chang et al. 2025):    W' = diag(g) (W0 + sBA),  g = m / ‖W0 + sBA‖row

    A, B           as in LoRA                              trained
    m   (out,)     ‖W0‖row, so that g = 1 at the start     trained
    Parameters: r (in + out) + out. Row i of W' has norm |m_i|. ‖·‖row is one Euclidean norm per output row, and a
    constant to the gradient (DoRA paper, section 4.3). W0 + sBA is formed for it, for a moment in each pass:
    ‖W0‖² + 2⟨W0, sBA⟩ + ‖sBA‖² would spare that, but is inexact where sBA nearly cancels W0.
    """

    def start(self):
        self.m = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self):
        W0 = wide(self.oriented(self.W0))
        with no_autocast(W0):
            W = torch.addmm(W0, wide(self.B), wide(self.A), alpha=self.s)
        return torch.linalg.vector_norm(W, dim=1).clamp(min=1e-6)  # a row of zeros must not divide by 0

    def after(self, y):
        return scaled(y, self.m / self.row_norms())


class PreDiagLinear(LoRALinear):
    """Pre-Diag (Chang et al. 2025):    W' = diag(d) W0 + sBA

    A, B           as in LoRA                     trained
    d   (out,)     1, so that diag(d) W0 = W0     trained
    Parameters: r (in + out) + out. The authors' layer scales the bias by d too; here only the weight is conditioned.
    """

    def start(self):
        self.d = nn.init.ones_(self.zeros(self.out_features))

    def before(self, y):
        return scaled(y, self.d)


class SORALinear(PreDiagLinear):
    """SORA (Chang et al. 2025):    W' = R (diag(d) W0 + sBA),  RᵀR = I

    A, B, d               as in Pre-Diag                                            trained
    C   (out, r_p)        kaiming_uniform(a=√5, mode="fan_out"), within ±1/√out     trained
    E   (out, r_p)        a copy of C: R = I, yet both have a gradient              trained
    Parameters: r (in + out) + out + 2 r_p out. R = I + K Vᵀ, with K and V (out, 2 r_p) made of C and E (`rotation`).

    r_p     columns of C and of E, at least 1 (else ValueError)
    exact   the exact rotation, or the authors' first-order one

    Where we differ from the authors' layer, on purpose:
    - theirs is R = I + S, S skew (`rotation`): RᵀR = I − S², so norms can only grow; exact=False gives it;
    - theirs scales and rotates the bias too, and merges S in place of R: a fresh adapter merges to a weight of 0.
    """

    def start(self, r_p: int = 4, exact: bool = True):
        if r_p < 1:
            raise ValueError(f"r_p={r_p} is below 1: choose a larger one")
        super().start()
        self.options |= {"r_p": int(r_p), "exact": bool(exact)}
        self.C = nn.init.kaiming_uniform_(self.zeros(self.out_features, r_p), a=5**0.5, mode="fan_out")
        self.E = nn.Parameter(self.C.detach().clone())

    def after(self, y):
        return rotated(y, *rotation(self.C, self.E, self.options["exact"]))


METHODS = {"lora": LoRALinear, "dora": DoRALinear, "prediag": PreDiagLinear, "sora": SORALinear}


def scaled(y, g):
    """diag(g) y for each row of y (n, out); the product in g's float32, for in bfloat16 a g of 1.003 would be 1"""
    return (y * g).to(y.dtype)


def rotated(y, K, V):
    """R y = y + K (Vᵀ y) for each row of y (n, out)"""
    return torch.addmm(y, y @ V.to(y.dtype), K.T.to(y.dtype))


def rotation(C: torch.Tensor, E: torch.Tensor, exact: bool = True) -> tuple:
    """K and V, each (out, 2 r_p), of the rotation R = I + K Vᵀ that C and E (out, r_p) make; in float32 at least.

    S = t (E Cᵀ − C Eᵀ), with a number t (below), is skew: Sᵀ = −S. So its eigenvalues λ are imaginary, 1 − λ/2 is never
    0, and I − S/2 is invertible. The Cayley transform R = (I − S/2)⁻¹ (I + S/2) is orthogonal, as I − S/2 and I + S/2
    commute and each is the other's transpose. As I + S/2 = (I − S/2) + S, R = I + (I − S/2)⁻¹ S.

    To invert a matrix of 2 r_p rows only, let V = [C, E − C], Q = t (0 −I; I 0), with blocks r_p wide, and
    X = Q⁻¹ − VᵀV/2. Multiplied out,

        S = V Q Vᵀ
        (I − S/2) V = V − V Q VᵀV/2 = V Q X,    so    (I − S/2)⁻¹ V Q = V X⁻¹
        R = I + (I − S/2)⁻¹ V Q Vᵀ = I + V X⁻¹ Vᵀ = I + K Vᵀ,    K = V X⁻¹

    t = min(1, 1 / (‖C‖ + ‖E‖ + 1e-6)), of Frobenius norms, is the authors': a large S grows as C and E do, not as their
    product. Their R stops at I + S (exact=False, K = V Q), the transform's first order. At the start E = C, so
    V = [C, 0], K = [0, −tC] and K Vᵀ = 0: R = I, to the last bit.
    """
    C = wide(C)
    E = wide(E)
    with no_autocast(C):
        V = torch.cat([C, E - C], 1)  # (out, 2 r_p)
        one_over_t = (C.norm() + E.norm() + 1e-6).clamp(min=1)

        upper, lower = torch.eye(V.shape[1], dtype=V.dtype, device=V.device).chunk(2)  # (I 0) and (0 I)
        X = one_over_t * torch.cat([lower, -upper])  # Q⁻¹ = (0 I; −I 0) / t, (2 r_p, 2 r_p)
        if exact:
            X = torch.addmm(X, V.T, V, alpha=-0.5)  # Q⁻¹ − VᵀV/2
        inverse, _ = torch.linalg.inv_ex(X)  # det Q det X = det(I − S/2) ≠ 0; inv would wait for the GPU to see it
        return V @ inverse, V


def wide(x):
    """x in float32 at least: norms, W' and the rotation need the digits, and inv_ex knows no bfloat16"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x):
    """Here each product is in the dtype of its factors"""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # autocast knows no meta device


# ======== The plumbing: attach, merge, save, load


def adapt(model: nn.Module, method: str = "sora", r: int = 16, alpha: float = 32, targets=None, train=(),
          **options) -> nn.Module:
    """Freeze `model` and replace its target linear layers, in place; returns the model.

    method    one of METHODS: "lora", "dora", "prediag", "sora"; for r, alpha and options see its class
    targets   None: every linear layer (nn.Linear, transformers' Conv1D) but the output head: what shares its weight
              with an embedding, or is a get_output_embeddings() of transformers. What cannot be adapted stays as it
              is, and one warning names it, experts (3-D parameters) too.
              Else names or endings of names, matched on whole dotted parts: ["c_attn", "mlp.c_proj"]
    train     names, matched alike, of modules to train whole, in their own dtype, without an adapter: ["classifier"],
              a new head
    A layer of several names stays shared. Load, cast and move the base first: DoRA's m depends on W0, and .to() casts
    an adapter like everything else. Raises ValueError, before anything is changed, for an unknown method, names
    that match nothing, targets that cannot be adapted, or a model that is adapted already.
    """
    if adapted_layers(model):
        raise ValueError("the model is adapted already: unmerge or merge it first")
    chosen = linear_layers(model)
    beside = matched(dict(model.named_modules(remove_duplicate=False)), train)
    kept = {p for module in beside.values() for p in module.parameters()}
    if targets is None:
        kept |= output_head(model)
    else:
        chosen = matched(chosen, targets)
    chosen = {name: m for name, m in chosen.items() if kept.isdisjoint(m.parameters())}

    left = {name: reason for name, m in chosen.items() if (reason := why_not(m, r, alpha))}
    if len(left) == len(chosen) or left and targets is not None:
        raise ValueError(f"these layers cannot be adapted: {left or 'there are none inside, in targets, not in train'}")
    if left:
        warnings.warn(f"these layers cannot be adapted and stay as they are: {left}", stacklevel=2)

    layers = {name: new_layer(m, method, r=r, alpha=alpha, **options) for name, m in chosen.items() if name not in left}
    replace(model.requires_grad_(False), layers)
    for module in beside.values():
        module.requires_grad_(True)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Turn every adapted layer, if any, into the plain, frozen one it was, with weight W' and the same bias, in place.
    Nothing is merged unasked, in train() or eval(). W' is rounded to W0's dtype: that to bfloat16 loses 50 / 17 /
    3 % of an update of 0.3 / 1 / 5 % of ‖W0‖, float16 an eighth of that. Warns where over half is lost, and where
    training never reached a layer."""
    layers = adapted_layers(model)
    warn_of_untrained(layers)
    for name, layer in layers.items():
        delta = layer.delta()
        weight = layer.merged_weight()
        lost = delta - (weight - layer.oriented(layer.W0))
        if lost.norm() > delta.norm() / 2:
            warnings.warn(f"{name}: {weight.dtype} rounds off over half of the update: merge model.float(), say",
                          stacklevel=2)
        # one by one, so that W0 goes before the next W' comes
        replace(model, {name: plain_layer(layer, nn.Parameter(layer.oriented(weight).contiguous()))})
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Drop the adapter, in place: plain, frozen layers with the base's W0. Raises ValueError where there is none."""
    layers = {name: plain_layer(layer, layer.W0) for name, layer in adapted_layers(model).items()}
    if not layers:
        raise ValueError("the model is not adapted: it holds no W0 to give back")
    return replace(model, layers)


@contextmanager
def disabled(model: nn.Module):
    """`with disabled(model):` the adapted layers compute W0 x + b, at no extra memory: the base, as DPO and KL need it
    for reference, but for what is trained beside the adapter. Do not merge or copy the model in there."""
    layers = [layer for layer in adapted_layers(model).values() if layer.enabled]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def adapter_state_dict(model: nn.Module) -> dict:
    """All that is trained (copies, on the CPU): the adapter's parameters, and whatever else requires a gradient. Beside
    them what load_adapter needs: the options of each layer, and sixteen entries of each parameter that is frozen, by
    which the base is known again. Buffers are not in it, such as the statistics of a BatchNorm, which move in train()
    even if it is frozen. Raises ValueError for no adapter; warns where training never reached a layer, or nothing of
    the adapter is trained.
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapter: adapt it first, and save before you merge")
    warn_of_untrained(layers)
    adapter = adapter_parameters(layers)
    if not any(p.requires_grad for p in adapter.values()):
        warnings.warn("no parameter of the adapter requires a gradient: is this what you trained?", stacklevel=2)
    parameters = named_as_in_the_base(model)
    trained = adapter | {name: p for name, p in parameters.items() if p.requires_grad}
    return {
        "layers": {name: layer.options for name, layer in layers.items()},
        "base": {name: sample(p) for name, p in parameters.items() if name not in trained},
        "trained": {name: p.detach().to("cpu", copy=True) for name, p in trained.items()},
    }


def load_adapter(model: nn.Module, state: dict, check: bool = True) -> nn.Module:
    """Put an adapter_state_dict on `model`, in place: on a plain base, which it adapts (and so moves torch's random
    state), or on a model adapted alike.

    Raises ValueError, before any number is changed, where `state` is not whole and finite, the model is adapted in
    another way, or is not the base of the training: one of the sixteen entries of a frozen parameter is off by more
    than 0.5 %. (Casting to 16 bits moves them by 0.4 % at most.) check=False leaves this comparison out.
    """
    if {*state} != {"layers", "base", "trained"}:
        raise ValueError("this is no adapter_state_dict: save that of an adapted model")
    inner = unwrapped(model)
    parameters = named_as_in_the_base(inner)
    for name, expected in (state["base"] if check else {}).items():
        known = name in parameters and torch.allclose(sample(parameters[name]), expected.cpu(), rtol=0.005, atol=1e-7)
        if not known:
            raise ValueError(f"{name} is not that of the training: load the same base; a layer that each process draws "
                             "at random is lost: name it in adapt's train next time; check=False loads all the same")

    adapted = adapted_layers(inner)
    layers = adapted or {name: new_layer(inner.get_submodule(name), **told) for name, told in state["layers"].items()}
    for name, layer in layers.items():
        told = state["layers"].get(name)
        if layer.options != told:
            raise ValueError(f"{name}: the adapter has {told}, the model {layer.options}: they must be alike")
    given = state["trained"]
    adapter = adapter_parameters(layers)
    wanted = parameters | adapter
    odd = (adapter.keys() - given or shapes(given) - shapes(wanted)
           or {name for name, p in given.items() if not p.isfinite().all()})
    if odd:
        raise ValueError(f"these tensors are missing, unknown, of another shape or not finite: {sorted(odd)}")
    if not adapted:
        replace(inner.requires_grad_(False), layers)
    for name, p in given.items():
        wanted[name].data.copy_(p)
        if name not in adapter:
            wanted[name].requires_grad_(True)
    return model


def save_as_peft(model: nn.Module, folder: str):
    """Write the adapter into `folder`, over one that is there, as PeftModel.from_pretrained(base, folder) reads it.
    LoRA and DoRA only: raises ValueError for what peft does not know, and for what is trained beside the adapter. Merge
    instead where peft adapts less: of a layer with several names only the first, and nothing where a module reads the
    layer's weight, as nn.TransformerEncoderLayer does."""
    state = adapter_state_dict(model)
    options, *others = {str(options): options for options in state["layers"].values()}.values()
    if others:
        raise ValueError(f"peft wants one rank, alpha, dropout and method, not {options} and {others}: merge(model)")
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
    tensors = {}
    for name, p in state["trained"].items():
        layer, _, key = name.rpartition(".")
        if layer not in state["layers"] or key not in names:
            raise ValueError(f"only LoRA and DoRA are written, not {name}: merge(model) and save the whole model")
        tensors[f"base_model.model.{layer}.{names[key]}"] = p
    config = {
        "peft_type": "LORA",
        "use_dora": options["method"] == "dora",
        "r": options["r"],
        "lora_alpha": options["alpha"],
        "lora_dropout": options["dropout"],
        "target_modules": [*state["layers"]],
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapted_layers(model).values()),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(tensors, Path(folder, "adapter_model.bin"))
    Path(folder, "adapter_model.safetensors").unlink(missing_ok=True)  # an older one, which peft would read instead
    Path(folder, "adapter_config.json").write_text(json.dumps(config))


# What these share


def unwrapped(model):
    """The model inside torch.compile, DataParallel, DistributedDataParallel or AveragedModel"""
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel", "AveragedModel"):
        [model] = model.children()
    return model


def adapted_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linear_layers(model):
    """{name: module} of the linear layers inside, and of what holds experts: 3-D parameters"""
    found = {}
    for name, m in model.named_modules(remove_duplicate=False):
        linear = isinstance(m, (nn.Linear, conv1d()))
        experts = any(p.ndim == 3 and len(p) > 1 for p in m.parameters(recurse=False))
        if name and (linear or experts and not type(m).__module__.startswith("torch.")):
            found[name] = m
    return found


def output_head(model):
    """The parameters of what models of transformers call their head, and of embeddings, which a tied head shares"""
    heads = [getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules()]
    return {p for m in model.modules() if m in heads or isinstance(m, nn.Embedding) for p in m.parameters()}


def matched(modules, endings):
    """{name: module} of those whose name ends, in whole dotted parts, in one of `endings`"""
    found = {}
    for ending in [endings] if isinstance(endings, str) else endings:
        hits = {name: m for name, m in modules.items() if f".{name}".endswith(f".{ending}")}
        if not hits:
            exist = sorted({name.rpartition(".")[2] for name in modules})
            raise ValueError(f"{ending!r} matches none of the layers inside, in whole dotted parts: {exist}")
        found |= hits
    return found


def new_layer(linear, method, **options):
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[method](linear, **options)


def replace(model, layers):
    """Put {name: layer} in place of what has these names, under every name that it has."""
    substitutes = {model.get_submodule(name): layer for name, layer in layers.items()}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module in substitutes:
            model.set_submodule(name, substitutes[module])
    return model


def warn_of_untrained(layers):
    untrained = [name for name, layer in layers.items() if not layer.B.any()]
    if untrained:
        warnings.warn(f"training never reached, B is 0 (is the optimizer older than the adapter?): {untrained}",
                      stacklevel=3)


def adapter_parameters(layers):
    """{name: parameter} of A, B, d, ..."""
    return {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()
            if key not in ("W0", "bias")}


def named_as_in_the_base(model):
    return {re.sub(r"\.W0$", ".weight", name): p for name, p in model.named_parameters()}


def shapes(tensors):
    return {(name, p.shape) for name, p in tensors.items()}


def sample(p):
    """Sixteen entries, evenly spread"""
    index = torch.arange(16) * (p.numel() - 1) // 15
    return p.reshape(-1)[index].float().cpu()


# The rare cases: what is linear but no nn.Linear, and what would fail silently


def conv1d():
    """transformers' Conv1D, a linear layer that stores its weight (in, out); where nobody has imported it, (), of which
    nothing is an instance"""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())


def why_not(linear, r, alpha):
    """The reason why a layer cannot be adapted, or None. All it does has to be W0 x + b."""
    if not isinstance(linear, (nn.Linear, conv1d())):
        return f"it is {type(linear).__name__}, no nn.Linear"
    if any(hooks_of(linear).values()):
        return "it has hooks"
    known = nn.Linear.forward, getattr(conv1d(), "forward", nn.Linear.forward)
    if getattr(linear.forward, "__func__", None) not in known:
        return "it has a forward of its own"
    if {*linear._parameters} != {"weight", "bias"}:
        return "its weight is made of other parameters"
    if not linear.weight.is_floating_point() or linear.weight.itemsize == 1:
        return f"its weight is quantised, {linear.weight.dtype}"
    if r not in range(1, 1 + min(linear.weight.shape)):
        return f"r={r!r} is outside 1..{min(linear.weight.shape)}"
    if not 0 < alpha < math.inf:
        return f"alpha={alpha} is no number above 0"


def hooks_of(module):
    return {key: value for key, value in vars(module).items() if "hook" in key}


def without_tensors(linear):
    """[a copy of the layer without its parameters], from which merging makes the plain layer: the memo tells deepcopy
    that the copy of each parameter is None. In a list, or it would be a submodule of the adapted layer."""
    return [copy.deepcopy(linear, {id(p): None for p in linear.parameters()})]


def plain_layer(layer, weight):
    """A frozen layer of the class that was adapted, with this weight, the same bias, and hooks put there since"""
    plain = copy.deepcopy(layer.template[0])
    plain.weight = weight
    plain.bias = layer.bias
    vars(plain).update(hooks_of(layer))
    return plain.train(layer.training).requires_grad_(False)


# ======== The spectrum of an update: how evenly are its singular values spread?


def svd_entropy(matrix: torch.Tensor, power: float = 2) -> float:
    """H = −Σ p ln p / ln min(out, in) in [0, 1], with p = σ^power / Σ σ^power over the singular values σ of `matrix`.

    0: one direction carries everything. 1: all singular values are equal. power=2 is the entropy of the energy (Alter
    et al. 2000) and hardly sees a long flat tail; power=1 (Roy & Vetterli 2007) counts the tail in full. At rank r both
    are at most ln r / ln min(out, in). `matrix` may also be its singular values (1-D). nan for zeros or a single value.
    """
    sigma = wide(matrix.detach())
    if sigma.ndim == 2:
        sigma = torch.linalg.svdvals(sigma)
    p = (sigma / sigma.max()).double() ** power
    p = p / p.sum()
    return (torch.special.entr(p).sum() / math.log(len(sigma))).item()


# ======== All above stands alone and may be copied without the rest. Below: a GPT to try it on, as nanoGPT lays it out.
# In shapes B is the batch, T the tokens, C the channels


@dataclass
class GPTConfig:
    """GPT-2's smallest model. block_size: the longest context in tokens; gelu: F.gelu's approximation, tanh or none."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    gelu: str = "tanh"


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.n_head = config.n_head
        self.c_attn = nn.Linear(n, 3 * n)
        self.c_proj = nn.Linear(n, n)

    def forward(self, x):
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, n_head, C / n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, C / n_head) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, C / n_head)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.c_fc = nn.Linear(n, 4 * n)
        self.gelu = nn.GELU(config.gelu)
        self.c_proj = nn.Linear(4 * n, n)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): tokens (B, T) -> logits (B, T, vocab), or, given targets (B, T), their mean loss."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        n = config.n_embd
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, n),
            "wpe": nn.Embedding(config.block_size, n),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(n),
        })
        self.lm_head = nn.Linear(n, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied

        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            if name.endswith("c_proj.weight"):  # the residual stream adds up the outputs of 2 n_layer of these
                p.data /= math.sqrt(2 * config.n_layer)
            if name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[:tokens.shape[1]]  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
