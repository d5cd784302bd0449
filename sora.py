# SPDX-License-Identifier: MIT
"""LoRA, DoRA, Pre-Diag and SORA in one file, with a GPT to try them on. It needs torch and nothing else; copy it.

"Calibrating and Rotating: A Unified Framework for Weight Conditioning in PEFT" (Chang et al., AAAI 2026) looks at an
adapter as a *conditioning matrix* applied to the weight W0 (out, in) of a frozen linear layer, and asks two things of
it: is it placed before or after the low-rank update B A is added, and what kind of matrix is it?

    method     W'                                           conditioning                       trained
    LoRA       W0 + sBA                                     none                               A B
    DoRA       diag(g) (W0 + sBA), g = m / ‖W0 + sBA‖row    after: diagonal                    A B m
    Pre-Diag   diag(d) W0 + sBA                             before: diagonal                   A B d
    SORA       R (diag(d) W0 + sBA), RᵀR = I                before: diagonal, after: rotation  A B d C E

where s = alpha / r is a number and ‖·‖row takes the norm of each row. The whole file rests on one identity: each of the
four is a diagonal times W0 plus a low-rank product, of what we call its factors d⁺ (out,), B⁺ (out, k), A⁺ (k, in),
with k = r, for SORA r + 2 r_p:

    W' = diag(d⁺) W0 + B⁺ A⁺      so that      y = W'x + b = d⁺ ⊙ (W0 x) + B⁺ (A⁺ x) + b

One layer holds all that follows from it (forward, delta, merged_weight). A method is its extra parameters and a few
lines that return (d⁺, B⁺, A⁺): in a hurry, read `DiagonalPlusLowRank.forward` and each class's `factors`.

Glossary
    here            in the formulas                                               in the authors' code
    weight          W0 (out, in), frozen                                          base_layer.weight
    A, B            A (r, in), B (out, r): the low-rank pair                      lora_A, lora_B
    r, alpha, s     rank of B A; s = alpha / r scales it                          r, lora_alpha, scaling
    m, g            m (out,): DoRA's magnitude, one per row of W'; g scales to it -
    d               d (out,): the diagonal that calibrates W0                     lora_Diag
    C, E, r_p       C, E (out, r_p): the pair that spans the rotation             lora_C, lora_D
    P, K            (out, 2 r_p), made of C and E: R = I + K Pᵀ is the rotation   -

Use
    from sora import adapt, adapter_state_dict, load_adapter, merge
    adapt(model, "sora", r=16, alpha=32, r_p=4)            # freezes model, replaces its nn.Linear layers in place
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ...                                                    # your training loop; decay would pull d to 0, not to 1
    torch.save(adapter_state_dict(model), "sora.pt")       # only what was trained
    load_adapter(fresh_model, torch.load("sora.pt"))       # on the same base, in another process
    merge(model)                                           # plain layers again, no cost at inference

Not in it: dropout on the adapter path, convolutions and embeddings, quantised bases, several adapters at once, and the
parts of nn.MultiheadAttention and nn.TransformerEncoderLayer, which read `.weight` and call no layer: they are refused.

References: LoRA, Hu et al. 2021, arXiv 2106.09685; DoRA, Liu et al. 2024, arXiv 2402.09353; Pre-Diag and SORA, Chang et
al. 2025, arXiv 2511.00051, code in MaeChd/SORA, peft/tuners/sora/layer.py; entropy, Roy & Vetterli 2007 (p = σ/Σσ) and
Alter et al. 2000 (p = σ²/Σσ²); GPT-2, Radford et al. 2019, with the layout and names of Karpathy's nanoGPT.
"""
import ctypes
import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---- The method: one layer, four ways to fill it

KINDS = ("<class 'torch.nn.modules.linear.Linear'>", "<class 'transformers.pytorch_utils.Conv1D'>")  # can be adapted
MANY = 512  # tokens from which OneProduct wins: measured forward and backward on two CPU cores, at widths 128 to 3072


class DiagonalPlusLowRank(nn.Module):
    """A frozen linear layer, conditioned: y = d⁺ ⊙ (W0 x) + B⁺ (A⁺ x) + b. The methods below say what d⁺, B⁺, A⁺ are.

    linear     the nn.Linear, or Conv1D of transformers, to adapt: it stays as it is, its memory is shared, not copied
    r, alpha   rank of the low-rank pair, 1 ≤ r ≤ min(in, out), and its scale s = alpha / r
    r_p        for SORA: rank of each of C and E, at least 1
    exact      for SORA: the exact rotation, or the authors' first-order one

    x (..., in) -> y (..., out), in the dtype that nn.Linear gives. The adapter is float32, under autocast and after
    `.to(bfloat16)` too, and float64 on a float64 base. The bias is never conditioned. Raises ValueError for a rank out
    of range, TypeError for any other layer, quantised ones included.
    """

    def __init__(self, linear: nn.Linear, r: int = 16, alpha: float = 32, r_p: int = 4, exact: bool = True):
        super().__init__()
        kind, hooks = type(linear), linear._forward_hooks or linear._forward_pre_hooks  # as of pruning, weight norm
        if str(kind) not in KINDS or hooks or not linear.weight.is_floating_point() or linear.weight.itemsize == 1:
            raise TypeError(f"{linear} is no plain floating-point nn.Linear without hooks: choose other targets")
        if not 1 <= r <= min(linear.weight.shape):
            raise ValueError(f"r={r} is outside 1..{min(linear.weight.shape)}: choose another r, or not {linear}")
        if r_p < 1:
            raise ValueError(f"r_p={r_p} is below 1: choose a larger one")
        self.kind, self.r, self.alpha, self.r_p, self.exact, self.s = kind, r, alpha, r_p, exact, alpha / r
        self.weight = nn.Parameter(linear.weight if kind is nn.Linear else linear.weight.T, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias, requires_grad=False)  # (out,) or None
        self.out_features, self.in_features = self.weight.shape  # W0 (out, in)
        A = self.weight.new_empty(r, self.in_features, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        self.A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))  # (r, in)
        self.B = nn.Parameter(A.new_zeros(self.out_features, r))  # (out, r), zero: W' = W0 at the start
        self.train(linear.training)

    def factors(self):
        """(d⁺, B⁺, A⁺): (out,) or None for ones, (out, k), (k, in). Here: no conditioning, W' = W0 + sBA."""
        return None, self.s * self.B, self.A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which it leaves alone
        x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x  # once, for two products
        same = self.A.dtype == self.weight.dtype and (autocast or x.dtype == self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the norms, the rotation and W' need the digits
            d, B, A = self.factors()
            if same and x.numel() >= MANY * self.in_features and not self.weight.requires_grad:
                return OneProduct.apply(x, self.weight, self.bias, d, B, A)  # the same as below, at a lower price
        low = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype), self.bias)  # (..., out)
        y = F.linear(x, self.weight)  # (..., out)
        return low + y if d is None else (y * d).add_(low).to(y.dtype)  # d stays wide: in bfloat16 1.001 would be 1

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """W' − W0 (out, in) in the adapter's dtype, put together without forming W' and its rounding."""
        with torch.autocast(self.weight.device.type, enabled=False):
            d, B, A = self.factors()
            return B @ A if d is None else (d - 1)[:, None] * self.weight + B @ A

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W' (out, in), in W0's dtype; bit for bit W0 as long as nothing has been trained."""
        return (self.weight + self.delta()).to(self.weight.dtype)

    def plain(self, weight: torch.Tensor, keep: bool = False) -> nn.Module:
        """A frozen layer of the kind that was adapted, with this weight (out, in) and b; with keep it holds W0 too."""
        linear = self.kind is nn.Linear
        with torch.device("meta"):
            layer = self.kind(*weight.shape[::-1 if linear else 1])
        layer.weight, layer.bias = nn.Parameter(weight if linear else weight.T.contiguous()), self.bias
        if keep:
            layer.register_buffer("W0", self.plain(self.weight).weight.detach(), persistent=False)
        return layer.train(self.training).requires_grad_(False)

    def _apply(self, fn, recurse=True):
        """What `.to()` runs. `.to(bfloat16)` casts W0 and b alone: with 8 bits of mantissa training would stall."""
        base = {id(self.weight), id(self.bias)}
        return super()._apply(lambda p: fn(p) if id(p) in base or fn(p).itemsize >= 4 else p.to(fn(p).device), recurse)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, r={self.r}, alpha={self.alpha}"


class LoRALinear(DiagonalPlusLowRank):
    """LoRA (Hu et al. 2021):    W' = W0 + sBA

    A   (r, in)    kaiming_uniform(a=√5)    trained
    B   (out, r)   0                        trained
    Parameters: r (in + out). No conditioning: this is the shared layer as it stands.
    """


class DoRALinear(DiagonalPlusLowRank):
    """DoRA in matrix form (Liu et al. 2024; Chang et al. 2025):    W' = diag(g) (W0 + sBA),  g = m / ‖W0 + sBA‖row

    A, B           as in LoRA                     trained
    m   (out,)     ‖W0‖row                        trained
    w2  (out,)     ‖W0‖²row                       a buffer
    Parameters: r (in + out) + out. Row i of W' has norm |m_i|, unless that of W0 + sBA is zero.
    ‖·‖row is one Euclidean norm per output row, and a constant to the gradient (DoRA paper, section 4.3). Where the
    usual code forms the matrix B A (out, in) for it in each pass, here it comes from
        ‖W0 + sBA‖²row = ‖W0‖²row + rowsum(sB ⊙ (2 W0 Aᵀ + sB A Aᵀ))
    which loses digits where sBA all but cancels W0.
    """

    def __init__(self, linear: nn.Linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        norm = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.A.dtype)  # (out,)
        self.m = nn.Parameter(norm)
        self.register_buffer("w2", norm.square())

    def factors(self):
        _, sB, A = super().factors()
        with torch.no_grad():
            WA = F.linear(self.weight, A.to(self.weight.dtype)).to(A.dtype)  # (out, r): W0 Aᵀ
            norm2 = self.w2 + (sB * torch.addmm(WA, sB, A @ A.T, beta=2)).sum(1)  # (out,)
        g = self.m / norm2.clamp_min(torch.finfo(norm2.dtype).tiny).sqrt()  # (out,), finite also for a row of zeros
        return g, g[:, None] * sB, A


class PreDiagLinear(DiagonalPlusLowRank):
    """Pre-Diag (Chang et al. 2025):    W' = diag(d) W0 + sBA

    A, B           as in LoRA    trained
    d   (out,)     1             trained
    Parameters: r (in + out) + out. The authors' layer scales the bias by d too; here only the weight is conditioned.
    """

    def __init__(self, linear: nn.Linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        self.d = nn.Parameter(self.A.new_ones(self.out_features))  # 1-D: no weight decay where that goes by dimension

    def factors(self):
        _, sB, A = super().factors()
        return self.d, sB, A


class SORALinear(PreDiagLinear):
    """SORA (Chang et al. 2025):    W' = R (diag(d) W0 + sBA),  R orthogonal

    A, B, d               as in Pre-Diag                                            trained
    C   (out, r_p)        kaiming_uniform(a=√5, mode="fan_out")                     trained
    E   (out, r_p)        a copy of C: R = I, yet neither has a gradient of zero    trained
    Parameters: r (in + out) + out + 2 r_p out. R = I + K Pᵀ (see `rotation`), so that
        W' = diag(d) W0 + [sB, K] [A ; Pᵀ (diag(d) W0 + sBA)]
    is of the same form again. A token costs what it costs Pre-Diag at rank r + 2 r_p; K and Pᵀ W0 come once per pass.

    Where we differ from the authors' layer, on purpose:
    - theirs is R = I + S, only first-order orthogonal: RᵀR = I − S², so norms can only grow (exact=False gives it);
    - theirs scales and rotates the bias too, and leaves I out of the merged weight: a fresh adapter merges to zero.
    """

    def __init__(self, linear: nn.Linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        C = nn.init.kaiming_uniform_(self.A.new_empty(self.out_features, self.r_p), a=math.sqrt(5), mode="fan_out")
        self.C, self.E = nn.Parameter(C), nn.Parameter(C.clone())

    def factors(self):
        d, sB, A = super().factors()
        K, P = rotation(self.C, self.E, self.exact)  # (out, 2 r_p) each
        PW = ((d[:, None] * P).T.to(self.weight.dtype) @ self.weight).to(A.dtype) + (P.T @ sB) @ A  # (2 r_p, in)
        return d, torch.cat([sB, K], 1), torch.cat([A, PW])  # (out,), (out, r + 2 r_p), (r + 2 r_p, in)


def rotation(C: torch.Tensor, E: torch.Tensor, exact: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, P), both (out, 2 r_p), of the rotation R = I + K Pᵀ that the pair C, E (out, r_p) spans.

    S = t (E Cᵀ − C Eᵀ) is skew (Sᵀ = −S); t = min(1, 1 / (‖C‖ + ‖E‖ + 1e-6)), of Frobenius norms, slows its growth.
    With P = [E − C, C] and J = (0 −I; I 0), whose inverse is −J, S = t P J⁻¹ Pᵀ: C Cᵀ cancels, and S is 0 where E = C.
    Cayley's transform of S is a low-rank change of I (push P through the inverse), with X only 2r_p × 2r_p:

        R = (I − S/2)⁻¹ (I + S/2) = I + (I − S/2)⁻¹ S = I + P X⁻¹ Pᵀ      with X = J/t − PᵀP/2,  so K = P X⁻¹

    It is orthogonal, RᵀR = I + P X⁻ᵀ (X + Xᵀ + PᵀP) X⁻¹ Pᵀ = I, as Jᵀ = −J. And X is never singular: X v = 0 means
    0 = vᵀX v = −‖P v‖²/2, so P v = 0, so J v = 0, so v = 0. exact=False is the authors' R = I + S, that is X = J/t.
    """
    P = torch.cat([E - C, C], 1)  # (out, 2 r_p)
    wide = P.double() if P.device.type != "mps" else P  # in float32 R could lose two digits, or more
    I, r_p = torch.eye(P.shape[1], dtype=wide.dtype, device=P.device), C.shape[1]
    J = torch.cat([-I[r_p:], I[:r_p]])  # (2 r_p, 2 r_p)
    X = J * (C.norm() + E.norm() + 1e-6).clamp(min=1)  # J / t
    X = X - wide.T @ wide / 2 if exact else X
    return torch.linalg.solve_ex(X, wide, left=False)[0].to(P.dtype), P  # solve would wait for the GPU to check it


class OneProduct(torch.autograd.Function):
    """The same y = W'x + b for many tokens: W' is built first, so that x meets one matrix and y is written once.

    The backward pass forms no gradient of W' (out, in). x, y have a row a token; d, B, A stand for d⁺, B⁺, A⁺:
        dx = dy W'      db = colsum(dy)      dB = dyᵀ (x Aᵀ)      dA = (dy B)ᵀ x
        d ⊙ dd = colsum(dy ⊙ y) − rowsum(B ⊙ dB) − b ⊙ db
    The last is Euler's identity, as y_i is linear in (d_i, B_i, b_i). It saves W0 x, but costs dd digits where d W0 x
    is a small part of y, leaves dd at 0 where |d| < 1e-6, and has no second derivative. W' is built twice, not kept;
    under autocast it is rounded as any weight is. On a bfloat16 base that rounding would undo small updates: not there.
    """

    @staticmethod
    def forward(ctx, x, W0, bias, d, B, A):
        W = _weight(W0, d, B, A).to(x.dtype)
        y = F.linear(x, W, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, W0, bias, d, B, A, None if d is None else y)
        return y if d is None else torch.ops.aten._lazy_clone(y)  # copied once someone changes it in place, if ever

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, W0, bias, d, B, A, y = ctx.saved_tensors
        dx = dy @ _weight(W0, d, B, A).to(dy.dtype) if ctx.needs_input_grad[0] else None
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)  # (N, out), (N, in)
        dB = (F.linear(x, A.to(x.dtype)).T @ dy).T  # (out, k)
        dA = (dy @ B.to(dy.dtype)).T @ x  # (k, in)
        db = dy.sum(0, dtype=B.dtype) if bias is not None and (d is not None or bias.requires_grad) else None  # (out,)
        if d is None:
            return dx, None, db, None, dB, dA
        dd = (dy * y.flatten(0, -2)).sum(0, dtype=B.dtype) - (B * dB).sum(1) - (0 if bias is None else bias * db)
        return dx, None, db, dd / d.where(d.abs() > 1e-6, math.inf), dB, dA


def _weight(W0, d, B, A):
    return torch.addmm(W0 if d is None else d[:, None] * W0, B, A)  # (out, in)


METHODS = {"lora": LoRALinear, "dora": DoRALinear, "prediag": PreDiagLinear, "sora": SORALinear}
for method, layer in METHODS.items():  # so that a layer can say which it is
    layer.method = method
OPTIONS = ("method", "r", "alpha", "r_p", "exact")

# ---- The plumbing: attach, merge, save, load


def adapt(model: nn.Module, method: str = "sora", r: int = 16, alpha: float = 32, r_p: int = 4, targets=None,
          exact: bool = True) -> nn.Module:
    """Freeze `model` and replace its target linear layers, in place; returns the model.

    method    one of METHODS: "lora", "dora", "prediag", "sora"; for r, alpha, r_p, exact see DiagonalPlusLowRank
    targets   None: every linear layer but those that share their weight with an embedding (a tied head). Else names or
              endings of names, matched on whole dotted parts: ["c_attn", "mlp.c_proj"]
    A layer that stands under several names stays shared. Load the base's weights first: DoRA starts from their norms.
    Raises ValueError (an unknown method, a target that matches nothing, a rank out of range, a model that is adapted
    already) or TypeError (a target that cannot be adapted, say a quantised one), before anything is changed.
    """
    if adapted := [layer.method for layer in _adapted(model).values()]:
        raise ValueError(f"the model is adapted already, with {adapted[0]} in {len(adapted)} layers: merge it first")
    linears = {name: m for name, m in model.named_modules()
               if name and (hasattr(m, "in_features") and hasattr(m, "out_features") or str(type(m)) in KINDS)}
    if targets is None:
        tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        found = {"every nn.Linear": [n for n, m in linears.items() if id(getattr(m, "weight", None)) not in tied]}
    else:
        targets = [targets] if isinstance(targets, str) else targets
        found = {target: [name for name in linears if f".{name}".endswith(f".{target}")] for target in targets}
    if (missing := [target for target, names in found.items() if not names]) or not found:
        exist = sorted({name.rpartition(".")[2] for name in linears}) or ["no nn.Linear inside"]
        raise ValueError(f"targets match nothing: {', '.join(missing)}; the model has {', '.join(exist)}")
    layers = _layers(model, dict.fromkeys(sum(found.values(), [])), method, r=r, alpha=alpha, r_p=r_p, exact=exact)
    return _replace(model.requires_grad_(False), layers)


def _layers(model, names, method, **options):
    """{name: adapted layer} for the linear layers of those names; the model stays as it is."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    layers = {}
    for name in names:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise TypeError(f"{name} cannot be adapted, for nn.TransformerEncoderLayer does not call it in eval()")
        try:
            layers[name] = METHODS[method](model.get_submodule(name), **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return layers


def _replace(model, layers):
    """Put {name: layer} in place of what has these names, also where that stands under further names."""
    substitutes = {model.get_submodule(name): layer for name, layer in layers.items()}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module in substitutes:
            model.set_submodule(name, substitutes[module])
    return model


def _adapted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DiagonalPlusLowRank)}


def merge(model: nn.Module, keep: bool = False) -> nn.Module:
    """Turn every adapted layer, if any, into the plain, frozen one it was, with weight W' and the same bias, in place.
    Nothing is merged unasked, in train() or eval(). keep=True holds W0 for `unmerge`, and so the memory of the adapted
    weights a second time."""
    return _replace(model, {name: layer.plain(layer.merged_weight(), keep) for name, layer in _adapted(model).items()})


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base back bit for bit, in place, its adapter dropped: of an adapted model, or after merge(keep=True).
    Raises ValueError where there is no W0 to give back."""
    layers, kept = _adapted(model), [m for m in model.modules() if "W0" in m._buffers]
    if not layers and not kept:
        raise ValueError("the model holds no W0: unmerge one that is adapted, or merged by merge(model, keep=True)")
    for linear in kept:
        linear.weight = nn.Parameter(linear.W0, requires_grad=False)
        del linear.W0
    return _replace(model, {name: layer.plain(layer.weight) for name, layer in layers.items()})


def adapter_state_dict(model: nn.Module) -> dict:
    """What was trained (copies, on the CPU) and what load_adapter needs: method, r, alpha, r_p, exact, the names of the
    layers in targets, and a fingerprint of their W0. Raises ValueError for no adapter or several kinds."""
    return _state(_adapted(model))


def _state(layers):
    kinds = {tuple(getattr(layer, key) for key in OPTIONS) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"the model has adapters of {len(kinds)} kinds, {kinds or 'none'}: one is needed, see adapt")
    digest = hashlib.sha256()
    for layer in layers.values():
        weight = layer.weight.detach().to("cpu", torch.bfloat16).contiguous()  # the same for a base cast to bfloat16
        digest.update((ctypes.c_char * weight.nbytes).from_address(weight.data_ptr()))  # its bytes, without numpy
    trained = {f"{name}.{key}": p.detach().to("cpu", copy=True) for name, layer in layers.items()
               for key, p in layer.named_parameters() if key not in ("weight", "bias")}
    return dict(zip(OPTIONS, *kinds), targets=[*layers], trained=trained, fingerprint=digest.hexdigest()[:16])


def load_adapter(model: nn.Module, state: dict) -> nn.Module:
    """Put an adapter_state_dict on `model`, in place: on a plain base, which it adapts, or on a model adapted alike.

    Raises, before anything is changed, TypeError for a layer that is no linear one, ValueError where `state` is not
    whole, a layer is missing, or the model is adapted in another way or has other W0 (compared as bfloat16)."""
    if not {*OPTIONS, "targets", "fingerprint", "trained"} <= state.keys():
        raise ValueError("this is no adapter_state_dict: save that of an adapted model")
    if missing := [name for name in state["targets"] if name not in dict(model.named_modules())]:
        raise ValueError(f"the adapter is for layers that the model has not: {', '.join(missing)}")
    layers = _adapted(model) or _layers(model, state["targets"], **{key: state[key] for key in OPTIONS})
    mine = _state(layers)
    for key in (*OPTIONS, "targets", "fingerprint"):
        if mine[key] != state[key]:
            raise ValueError(f"the adapter has {key}={state[key]}, the model {key}={mine[key]}: take another base")
    shapes, given = ({name: p.shape for name, p in s["trained"].items()} for s in (mine, state))
    if odd := [name for name in shapes | given if shapes.get(name) != given.get(name)]:
        raise ValueError(f"the adapter's tensors are missing, unknown or of another shape: {', '.join(odd)}")
    for name, tensor in state["trained"].items():
        layer, _, key = name.rpartition(".")
        layers[layer].get_parameter(key).data.copy_(tensor)
    return model if _adapted(model) else _replace(model.requires_grad_(False), layers)


# ---- The spectrum of an update: how evenly are its singular values spread?


def svd_entropy(matrix: torch.Tensor, power: float = 2) -> float:
    """H = −Σ p ln p / ln min(out, in) in [0, 1], with p = σ^power / Σ σ^power over the singular values σ of `matrix`.

    0: one direction carries everything. 1: all singular values are equal. power=2 is the entropy of the energy (Alter
    et al. 2000) and hardly sees a long flat tail; power=1 (Roy & Vetterli 2007) counts the tail in full. At rank r both
    are at most ln r / ln min(out, in). `matrix` may also be its singular values (1-D). nan for zeros or a single value.
    """
    return math.log(effective_rank(matrix, power)) / math.log(n) if (n := min(matrix.shape)) > 1 else math.nan


def effective_rank(matrix: torch.Tensor, power: float = 1) -> float:
    """exp(−Σ p ln p) in [1, min(out, in)]: how many equal singular values would have this entropy (Roy & Vetterli)."""
    return torch.special.entr(_shares(matrix, power)).sum().exp().item()


def stable_rank(matrix: torch.Tensor) -> float:
    """Σσ² / max σ² in [1, min(out, in)], the squared Frobenius norm over the squared spectral norm."""
    return 1 / _shares(matrix, 2).max().item()


def _shares(matrix, power):
    """p, in float64; nan for a matrix of zeros."""
    sigma = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    sigma = sigma if sigma.ndim == 1 else torch.linalg.svdvals(sigma)
    p = (sigma / sigma.max()).double() ** power
    return p / p.sum()


# ======== Above: the method. Below: a GPT to try it on, in nanoGPT's layout and with its names


@dataclass
class GPTConfig:
    """GPT-2's smallest model. block_size: the longest context in tokens; gelu: F.gelu's approximation, tanh or none."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    gelu: str = "tanh"


class Block(nn.Module):
    """x (B, T, C) -> (B, T, C): causal attention, then a perceptron, each of a LayerNorm of x and added to x."""

    def __init__(self, config):
        super().__init__()
        n, self.n_head, self.gelu = config.n_embd, config.n_head, config.gelu
        self.ln_1, self.ln_2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(n, 3 * n), "c_proj": nn.Linear(n, n)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n, 4 * n), "c_proj": nn.Linear(4 * n, n)})

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, C / n_head) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, C / n_head)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.gelu))  # (B, T, C)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the logits x Wᵀ: x (N, C), W (vocab, C), targets (N,), of which -100 does not count.

    The logits are made n tokens at a time, and never kept, for at 50,257 a token they would take more memory than the
    rest of the model: while they are there the forward pass makes the gradient, softmax(logits) − onehot(targets), too.
    """

    @staticmethod
    def forward(ctx, x, W, targets, n):
        dx, dW = torch.empty_like(x), torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        keep = (targets != -100)[:, None].to(x.dtype)  # (N, 1)
        loss, count = 0, keep.count_nonzero()
        for x_, dx_, t, k in zip(x.split(n), dx.split(n), targets.split(n), keep.split(n)):
            p = F.linear(x_, W).log_softmax(-1)  # (n, vocab)
            loss = loss + F.nll_loss(p, t, reduction="sum")
            if any(ctx.needs_input_grad):
                p.exp_()[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1
                dx_.copy_(k * (p @ W))
            if dW is not None:
                dW += p.T @ (k * x_)
        ctx.save_for_backward(dx, dW, count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dW, count = ctx.saved_tensors
        return dx * dloss / count, None if dW is None else dW * dloss / count, None, None


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): tokens (B, T) -> logits (B, T, vocab), or, given targets (B, T), their mean loss."""

    CHUNK = 2**26  # logits at a time, in the loss

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        for name, p in self.named_parameters():  # as GPT-2: less where the residual stream adds up 2 n_layer outputs
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer if name.endswith("c_proj.weight") else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the context of {self.config.block_size}")
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[:tokens.shape[1]]  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)  # (B, T, C)
        if targets is not None and type(self.lm_head) is nn.Linear:
            W = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
            return HeadLoss.apply(x.flatten(0, 1), W, targets.flatten(), max(1, self.CHUNK // len(W)))
        logits = self.lm_head(x)  # (B, T, vocab)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, n: int, temperature: float = 1.0,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Append n sampled tokens: (B, T) -> (B, T + n). Nothing is cached, so each token costs a full pass."""
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size:])[:, -1] / temperature  # (B, vocab)
            drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat([tokens, drawn], 1)
        return tokens

    def checkpoint(self) -> dict:
        """What from_pretrained reads, to be saved by `save`. Raises ValueError while an adapter is attached."""
        if _adapted(self):
            raise ValueError("the model is adapted: merge(model) first, or save adapter_state_dict(model)")
        return {"config": asdict(self.config), "model": self.state_dict()}

    def gpt2_state_dict(self) -> dict:
        """The weights with GPT-2's names and orientation, as from_pretrained and transformers read them (the latter as
        pytorch_model.bin beside a config.json). Raises ValueError while an adapter is attached."""
        state = self.checkpoint()["model"]
        return {name: p.T.contiguous() if name.endswith(CONV1D) else p for name, p in state.items()}

    @classmethod
    def from_pretrained(cls, name_or_path: str, check: bool = True) -> "GPT":
        """A GPT in float32 on the CPU, of one of these. No code from a file is ever run.

        - a name in GPT2: OpenAI's weights, downloaded once and compared with their sha256 each time, unless check=False
        - a path to GPT-2's layout, .safetensors or a saved gpt2_state_dict; the config.json beside it tells n_head and
          the GELU, without one heads are 64 wide and the GELU is the tanh form, as in GPT-2
        - nanoGPT's ckpt.pt, with the exact GELU, and zeros for biases it lacks; or a saved `checkpoint()`
        Raises OSError (the file cannot be had), ValueError (it is none of these), RuntimeError (a list of all tensors
        that are missing, unknown or of another shape).
        """
        path = Path(_download(name_or_path, check) if name_or_path in GPT2 else name_or_path)
        path.open().close()  # an OSError where that cannot be done
        try:
            file = _safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            config, state = _config_and_state(file, path.with_name("config.json"))
        except Exception as error:
            raise ValueError(f"{path} is no checkpoint of GPT-2, nanoGPT or this GPT: {error!r:.100}") from error
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict({name: p.float() for name, p in state.items()}, assign=True)
        if torch.equal(model.lm_head.weight, model.transformer.wte.weight):  # else the head was adapted and merged
            model.lm_head.weight = model.transformer.wte.weight
        return model


# ---- Files: GPT-2's released weights, other people's checkpoints, our own

GPT2 = {  # n_layer, n_head, n_embd, the revision at huggingface.co/openai-community, the sha256 of model.safetensors
    "gpt2": (12, 12, 768, "607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": (24, 16, 1024, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": (36, 20, 1280, "32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": (48, 25, 1600, "15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (in, out) in GPT-2
CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def _download(name, check):
    """The path of a model.safetensors of GPT-2, downloaded unless it is there, and the one that was released."""
    revision, sha256 = GPT2[name][3:]
    path = Path(torch.hub.get_dir(), "checkpoints", name, "model.safetensors")
    url = f"https://huggingface.co/openai-community/{name}/resolve/{revision}/model.safetensors"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256 if check else None)  # moved there once it is whole
        except (OSError, RuntimeError) as error:
            raise OSError(f"{name} cannot be downloaded ({error}): put {url} at {path}") from error
    with open(path, "rb") as file:
        if check and (found := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            raise ValueError(f"{path} has sha256 {found}, not {sha256}: delete it, or pass check=False (--no-check)")
    return path


def _safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes for the length of a JSON header, the header, the raw tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)[start:]  # mapped, not read
    return {name: raw[slice(*entry["data_offsets"])].clone().view(CODES[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


def _config_and_state(file, beside):
    """The GPTConfig and the state dict, in our layout, of what a checkpoint file holds."""
    if "model" in file:  # nanoGPT, with the exact GELU, or this GPT, whose config says which
        config, state = {"gelu": "none"} | (file.get("model_args") or file["config"]), file["model"]
    else:  # GPT-2
        state = {name: p.T.contiguous() if name.endswith(CONV1D) else p for name, p in file.items()}
        state = {f"transformer.{name.removeprefix('transformer.')}": p for name, p in state.items()}
        (vocab_size, n_embd), block_size = state["transformer.wte.weight"].shape, len(state["transformer.wpe.weight"])
        state["lm_head.weight"] = state.pop("transformer.lm_head.weight", state["transformer.wte.weight"])
        told = {} if n_embd % 64 else {"n_head": n_embd // 64}
        told |= json.loads(beside.read_text()) if beside.exists() else {}
        config = {"block_size": block_size, "vocab_size": vocab_size, "n_embd": n_embd, "n_head": told["n_head"],
                  "n_layer": len({name.split(".")[2] for name in state if ".h." in name}),
                  "gelu": {"gelu_new": "tanh", "gelu": "none"}[told.get("activation_function", "gelu_new")]}
    masks = (".attn.bias", ".attn.masked_bias")  # causal ones, which some files hold
    state = {name.removeprefix("_orig_mod."): p for name, p in state.items() if not name.endswith(masks)}
    if not config.get("bias", True):  # nanoGPT can do without
        biased = [name for name in state if name.startswith(("transformer.h.", "transformer.ln_f"))]
        state |= {f"{name.removesuffix('weight')}bias": torch.zeros(len(state[name])) for name in biased}
    return GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}), state


def save(state: dict, path: str):
    """torch.save under a temporary name, then a move: a half-written file never stands under `path`."""
    torch.save(state, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)
