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

where s = alpha / r is a number and ‖·‖row takes the norm of each row.

What makes one choice better? The paper's yardstick is how evenly the update W' − W0 is spread over its directions: the
entropy of its singular values (`svd_entropy`). Full fine-tuning changes a weight a little in every direction, LoRA in r
directions only; DoRA's entropy is higher than LoRA's, as (diag(g) − I) W0 is not of low rank, and this, the paper
holds, is why DoRA does better. Why before? Placed after, a diagonal rescales BA too, and DoRA's depends on BA through
its norm; placed before, d calibrates W0 and leaves BA alone. Why rotate? A diagonal only stretches each output feature,
a rotation mixes them; and it may stand after, as it keeps the lengths of the sum's columns and their angles.

The file rests on one identity. Each of the four is a diagonal times W0 plus a product of low rank k, and we call
g (out,), U (out, k) and V (k, in) its factors:

    W' = diag(g) W0 + U V        so that        y = W'x + b = g ⊙ (W0 x) + U (V x) + b

where x ⊙ y is the elementwise product. This is plain for the first three: multiply out the brackets. For SORA, write
the rotation as R = I + K Pᵀ, with K and P (out, 2 r_p) made of C and E (see `cayley`); on M = diag(d) W0 + sBA it is

    R M = M + K (Pᵀ M) = diag(d) W0 + (sB) A + K (Pᵀ M) = diag(d) W0 + [ sB , K ] [ A ; Pᵀ M ]

with [ x , y ] side by side and [ x ; y ] one above the other. So

    method     g                       U             V                                 k
    LoRA       1                       sB            A                                 r
    DoRA       m / ‖W0 + sBA‖row       g ⊙ sB        A                                 r
    Pre-Diag   d                       sB            A                                 r
    SORA       d                       [ sB , K ]    [ A ; Pᵀ(diag(d) W0 + sBA) ]      r + 2 r_p

and one layer holds all that follows (forward, delta, merged_weight): a method is its extra parameters and a few lines
that return (g, U, V). In a hurry, read `DiagonalPlusLowRank.forward`, each class's `factors` and `cayley`.

Glossary
    here            in the formulas                                               in the authors' code
    weight          W0 (out, in), frozen                                          base_layer.weight
    A, B            A (r, in), B (out, r): the low-rank pair                      lora_A, lora_B
    r, alpha, s     rank of B A; s = alpha / r scales it                          r, lora_alpha, scaling
    m               m (out,): DoRA's magnitude, the norm of each row of W'        -
    d               d (out,): the diagonal that calibrates W0                     lora_Diag
    C, E, r_p       C, E (out, r_p): the pair that spans the rotation             lora_C, lora_D
    P, K            P, K (out, 2 r_p), made of C and E: R = I + K Pᵀ              -

Use
    from sora import adapt, adapter_state_dict, load_adapter, merge
    adapt(model, "sora", r=16, alpha=32, r_p=4)            # freezes model, replaces its nn.Linear layers in place
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)    # tune lr; decay would pull d to 0, not to 1
    ...                                                    # your training loop
    torch.save(adapter_state_dict(model), "sora.pt")       # only what was trained
    load_adapter(fresh_model, torch.load("sora.pt"))       # on the same base, in another process
    merge(model)                                           # plain layers again, no cost at inference

Not in it: dropout on the adapter path, convolutions and embeddings, quantised bases, several adapters at once. Refused
are the parts of nn.MultiheadAttention and nn.TransformerEncoderLayer, for these read `.weight` and call no layer.

References: LoRA, Hu et al. 2021, arXiv 2106.09685; DoRA, Liu et al. 2024, arXiv 2402.09353; Pre-Diag and SORA, Chang et
al. 2025, arXiv 2511.00051, code in MaeChd/SORA, peft/tuners/sora/layer.py; entropy, Roy & Vetterli 2007 (p = σ/Σσ) and
Alter et al. 2000 (p = σ²/Σσ²); GPT-2, Radford et al. 2019, with the layout and names of Karpathy's nanoGPT.
"""
import hashlib
import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

# ======== The method: one layer, four ways to fill it, and the rotation


class DiagonalPlusLowRank(nn.Module):
    """A frozen linear layer, conditioned: y = g ⊙ (W0 x) + U (V x) + b. Each method says what its g, U and V are.

    linear     the nn.Linear to adapt: it stays as it is, its memory is shared, not copied
    r, alpha   rank of the low-rank pair, 1 ≤ r ≤ min(in, out), and its scale s = alpha / r
    r_p        for SORA: rank of each of C and E, at least 1
    exact      for SORA: the exact rotation, or the authors' first-order one

    x (..., in) -> y (..., out), in the dtype that nn.Linear gives. The adapter is float32, under autocast and after
    `.to(bfloat16)` too, and float64 on a float64 base. The bias is never conditioned. Raises ValueError for a rank out
    of range, TypeError for a layer that cannot be adapted (see `weight_and_bias`).
    """

    def __init__(self, linear: nn.Linear, r: int = 16, alpha: float = 32, r_p: int = 4, exact: bool = True):
        super().__init__()
        weight, bias = weight_and_bias(linear)
        self.kind = type(linear)  # which merging gives back
        self.out_features, self.in_features = weight.shape
        if not 1 <= r <= min(weight.shape):
            raise ValueError(f"r={r} is outside 1..{min(weight.shape)}: choose another r, or not {linear}")
        self.r, self.alpha, self.s = r, alpha, alpha / r
        self.r_p, self.exact = r_p, exact

        self.weight = nn.Parameter(weight, requires_grad=False)  # W0 (out, in)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)  # b (out,)
        self.create_parameters()
        self.train(linear.training)

    def create_parameters(self):
        """A and B, to which a method adds its own: such that W' = W0 at the start, yet gradients are not all zero."""
        self.A = self.new_parameter(self.r, self.in_features)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear starts
        self.B = self.new_parameter(self.out_features, self.r)  # zeros

    def new_parameter(self, *shape):
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # with bfloat16's 8 bits training would stall
        return nn.Parameter(self.weight.new_zeros(shape, dtype=wide))

    def factors(self):
        """(g, U, V): (out,) or None for ones, (out, k), (k, in). Here: no conditioning, W' = W0 + sBA."""
        return None, self.s * self.B, self.A

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = g ⊙ (W0 x) + U (V x) + b, in the last six lines. With many tokens, as in most training, `OneProduct`
        computes the same y in less time. Skip that and the helpers for now: the next section explains them."""
        x = as_autocast_would(input)  # (..., in)
        with full_precision(self.weight):
            g, U, V = self.factors()
        if one_product_pays(self, x):
            return OneProduct.apply(x, self.weight, self.bias, g, U, V)

        U, V = U.to(x.dtype), V.to(x.dtype)  # but not g: in bfloat16 1.001 would be 1
        Wx = F.linear(x, self.weight)  # (..., out)
        UVx = F.linear(F.linear(x, V), U, self.bias)  # (..., out), plus b
        if g is None:
            return Wx + UVx
        return (g * Wx + UVx).to(Wx.dtype)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """W' − W0 (out, in) in the adapter's dtype, put together without forming W' and its rounding."""
        with full_precision(self.weight):
            g, U, V = self.factors()
            if g is None:
                return U @ V
            return (g - 1)[:, None] * self.weight + U @ V

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W' (out, in), in W0's dtype; bit for bit W0 until something is trained. (Where W0 is cast later,
        DoRA's m stays as it was, and g is only about 1.)"""
        return (self.weight + self.delta()).to(self.weight.dtype)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, r={self.r}"

    def _apply(self, fn, recurse=True):  # what .to(), .cuda(), .half(), ... call
        return super()._apply(lambda p: spared(self, p, fn(p)), recurse)


class LoRALinear(DiagonalPlusLowRank):
    """LoRA (Hu et al. 2021):    W' = W0 + sBA

    A   (r, in)    kaiming_uniform(a=√5)    trained
    B   (out, r)   0                        trained
    Parameters: r (in + out). No conditioning: this is the shared layer as it stands.
    """

    method = "lora"


class DoRALinear(DiagonalPlusLowRank):
    """DoRA in matrix form (Liu et al. 2024; Chang et al. 2025):    W' = diag(g) (W0 + sBA),  g = m / ‖W0 + sBA‖row

    A, B           as in LoRA                     trained
    m   (out,)     ‖W0‖row                        trained
    Parameters: r (in + out) + out. Row i of W' has norm |m_i|, unless sBA cancels row i of W0 almost wholly: g never
    divides by less than eps ‖W0‖row, with the eps of W0's dtype, so that W' stays bounded.
    ‖·‖row is one Euclidean norm per output row, and a constant to the gradient (DoRA paper, section 4.3). W0 + sBA is
    formed for it, for a moment in each pass: ‖W0‖² + 2⟨W0, sBA⟩ + ‖sBA‖² would spare that, but loses twice the digits.
    """

    method = "dora"

    def create_parameters(self):
        super().create_parameters()
        norms = self.row_norms(self.B)  # (out,): of W0, as B is 0
        self.least = nn.Buffer((norms * torch.finfo(self.weight.dtype).eps).clamp_min(1e-19), persistent=False)
        self.m = nn.Parameter(torch.maximum(norms, self.least))  # so g = 1 at the start, also on a row of zeros

    @torch.no_grad()
    def row_norms(self, sB):
        """‖W0 + sBA‖row (out,)"""
        return torch.linalg.vector_norm(torch.addmm(self.weight.to(sB.dtype), sB, self.A), dim=1)

    def factors(self):
        sB = self.s * self.B
        g = self.m / torch.maximum(self.row_norms(sB), self.least)  # (out,)
        return g, g[:, None] * sB, self.A


class PreDiagLinear(DiagonalPlusLowRank):
    """Pre-Diag (Chang et al. 2025):    W' = diag(d) W0 + sBA

    A, B           as in LoRA    trained
    d   (out,)     1             trained
    Parameters: r (in + out) + out. The authors' layer scales the bias by d too; here only the weight is conditioned.
    """

    method = "prediag"

    def create_parameters(self):
        super().create_parameters()
        self.d = self.new_parameter(self.out_features)  # 1-D, like a bias: mostly spared from weight decay
        nn.init.ones_(self.d)

    def factors(self):
        return self.d, self.s * self.B, self.A


class SORALinear(PreDiagLinear):
    """SORA (Chang et al. 2025):    W' = R (diag(d) W0 + sBA),  R orthogonal

    A, B, d               as in Pre-Diag                                            trained
    C   (out, r_p)        kaiming_uniform(a=√5, mode="fan_out"), within ±1/√out     trained
    E   (out, r_p)        a copy of C: R = I, yet both have a gradient              trained
    Parameters: r (in + out) + out + 2 r_p out. R is that of `cayley`, the factors are derived at the top of the file.
    A token costs what it costs Pre-Diag at rank r + 2 r_p; the factors come once a pass, however many tokens there are.

    Where we differ from the authors' layer, on purpose:
    - theirs is R = I + S, S skew (see `cayley`): RᵀR = I + SᵀS, so norms can only grow; exact=False gives it;
    - theirs scales and rotates the bias too, and leaves I out of the merged weight: a fresh adapter merges to zero.
    """

    method = "sora"

    def create_parameters(self):
        super().create_parameters()
        if self.r_p < 1:
            raise ValueError(f"r_p={self.r_p} is below 1: choose a larger one")
        self.C = self.new_parameter(self.out_features, self.r_p)
        nn.init.kaiming_uniform_(self.C, a=math.sqrt(5), mode="fan_out")
        self.E = nn.Parameter(self.C.detach().clone())

    def factors(self):
        sB = self.s * self.B
        K, P = rotation(self.C, self.E, self.exact)  # (out, 2 r_p) each, by `cayley`
        Pd = (self.d[:, None] * P).to(self.weight.dtype)  # diag(d) P, so that a bfloat16 W0 is not copied to a wide one
        PW = (Pd.T @ self.weight).to(P.dtype)  # (2 r_p, in): Pᵀ diag(d) W0
        PM = torch.addmm(PW, P.T @ sB, self.A)  # (2 r_p, in): Pᵀ (diag(d) W0 + sBA)

        U = torch.cat([sB, K], 1)  # (out, r + 2 r_p)
        V = torch.cat([self.A, PM])  # (r + 2 r_p, in)
        return self.d, U, V


METHODS = {cls.method: cls for cls in (LoRALinear, DoRALinear, PreDiagLinear, SORALinear)}


def cayley(C: torch.Tensor, E: torch.Tensor, exact: bool = True) -> tuple:
    """(K, P, X⁻¹, (‖C‖, ‖E‖), 1/t) of the rotation R = I + K Pᵀ, K and P (out, 2 r_p), that C and E (out, r_p) span.

    S = t (E Cᵀ − C Eᵀ) is skew (Sᵀ = −S), with t = min(1, 1 / (‖C‖ + ‖E‖ + 1e-6)), of Frobenius norms. t is the
    authors': without it S grows as the square of C and E, with it only linearly once they are large; S is not bounded.
    R is the Cayley transform of S,

        R = (I − S/2)⁻¹ (I + S/2)        (= I + S + S²/2 + ... for small S)

    which is orthogonal for every skew S (and I − S/2 can be inverted, as the eigenvalues of S are imaginary). The
    authors' layer stops after S; exact=False gives theirs.

    S has rank 2 r_p at most, and so the only inverse needed is that small. Let P = [E − C , C] (why not [E , C] is said
    below) and Q = t (0 I; −I 0), so that Q⁻¹ = J/t with J = (0 −I; I 0). Then S = P Q Pᵀ, for

        P (0 I; −I 0) Pᵀ = (E − C) Cᵀ − C (E − C)ᵀ = E Cᵀ − C Eᵀ

    Let X = Q⁻¹ − PᵀP/2 = J/t − PᵀP/2, (2 r_p, 2 r_p). Then P Q X = P − P Q (PᵀP)/2 = (I − S/2) P; multiplied by
    (I − S/2)⁻¹ from the left and by X⁻¹, which exists, see below, from the right, this says (I − S/2)⁻¹ P Q = P X⁻¹.
    As I + S/2 = (I − S/2) + S,

        R = I + (I − S/2)⁻¹ S = I + (I − S/2)⁻¹ P Q Pᵀ = I + P X⁻¹ Pᵀ        so        K = P X⁻¹

    X can be inverted: if X v = 0, then 0 = vᵀX v = −‖P v‖²/2, as vᵀJ v = 0; so P v = 0, and J v/t = X v + PᵀP v/2 = 0,
    so v = 0. And R is orthogonal: RᵀR = I + P (X⁻¹ + X⁻ᵀ + X⁻ᵀ PᵀP X⁻¹) Pᵀ = I + P X⁻ᵀ (Xᵀ + X + PᵀP) X⁻¹ Pᵀ = I, as
    Jᵀ = −J. (For the authors' I + S it is X = Q⁻¹, since then K = P Q.)

    P = [E , C] would give the same S, but at the start, where E = C, K Pᵀ = 0 up to rounding only. Ours starts as
    P = [0 , C] and X = (0 −I/t; I/t −CᵀC/2). Its upper left is 0, so pivoting swaps the block rows; it is triangular
    then, and no rounding touches a 0. So X⁻¹ = (Z tI; −tI 0) with some Z, K = [−tC , 0], K Pᵀ = 0, W' = W0 to the bit.
    """
    P = torch.cat([E - C, C], 1)  # (out, 2 r_p)
    wide = P if P.device.type == "mps" else P.double()  # RᵀR = I for large C, E needs float64, which mps lacks
    I = torch.eye(P.shape[1], dtype=wide.dtype, device=P.device)
    r_p = C.shape[1]
    J = torch.cat([-I[r_p:], I[:r_p]])  # (2 r_p, 2 r_p)

    norms = torch.linalg.vector_norm(torch.stack([C, E]), dim=(1, 2))  # (2,)
    one_over_t = F.threshold(norms.sum() + 1e-6, 1, 1)  # that is max(1, ‖C‖ + ‖E‖ + 1e-6)
    X = J * one_over_t
    if exact:
        X = torch.addmm(X, wide.T, wide, alpha=-0.5)  # J/t − PᵀP/2
    inverse, _ = torch.linalg.inv_ex(X)  # unlike inv, it does not wait for the GPU to check it
    return (wide @ inverse).to(P.dtype), P, inverse, norms, one_over_t


# ======== The right digits, and the same numbers for less time: nothing in this section changes the formulas


def device_of(x):
    """The kind of device to tell autocast, which knows no meta."""
    return "cpu" if x.is_meta else x.device.type


def as_autocast_would(x):
    """x, cast once where under autocast each product would cast it anew. (Autocast leaves float64 alone.)"""
    if torch.is_autocast_enabled(device_of(x)) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_of(x)))
    return x


def full_precision(x):
    """Computing in the tensors' own dtypes, also under autocast: the norms and the rotation need the digits."""
    return torch.autocast(device_of(x), enabled=False)


def spared(layer, p, cast):
    """cast, which `.to()` makes of a layer's tensor p; but only W0 and b may get narrower than float32."""
    if cast.itemsize < 4 and p is not layer.weight and p is not layer.bias:
        return p.to(cast.device)
    return cast


MANY = 512  # tokens from which OneProduct wins: measured forward and backward on two CPU cores, at widths 128 to 3072


def one_product_pays(layer, x):
    """For many tokens, and a frozen W0 in the adapter's dtype: in bfloat16, W0 plus a small update would round back
    to W0 in every entry. (Where autocast rounds a float32 W', some go the other way, and the mean survives.)"""
    many = x.numel() >= MANY * layer.in_features
    wide_base = layer.weight.dtype == layer.A.dtype
    same_dtype = x.dtype == layer.weight.dtype or torch.is_autocast_enabled(device_of(x))
    transformed = torch._C._are_functorch_transforms_active()  # by torch.func, which refuses a Function like OneProduct
    return many and wide_base and same_dtype and not layer.weight.requires_grad and not transformed


class OneProduct(torch.autograd.Function):
    """The same y = W'x + b for many tokens: W' is built first, so that x meets one matrix and y is written once.

    Autograd alone would then form dW' = dyᵀ x (out, in), as much work again as y itself. Here (N tokens, a row each)

        dx = dy W'      db = colsum(dy)      dU = dyᵀ (x Vᵀ)      dV = (dy U)ᵀ x

    and dg comes from Euler's identity: y_i is linear in (g_i, U_i, b_i), so y_i = g_i ∂y_i/∂g_i + U_i ∂y_i/∂U_i +
    b_i ∂y_i/∂b_i; times dy_i, the loss's gradient, and summed over the tokens,

        colsum(dy ⊙ y) = g ⊙ dg + rowsum(U ⊙ dU) + b ⊙ db

    That needs y as it was, loses digits where g W0 x is a small part of y, and fades to 0 where |g| is near 10 eps
    (`near_0`). Under autocast, which has few digits, when compiling, and where y was changed in place, dW' is formed
    after all: dg = rowsum(dW' ⊙ W0), dU = dW' Vᵀ, dV = Uᵀ dW'. A change is told by autograd's version counter, which
    y.detach() shares; y.data is y's memory with another counter, so that it may be read even so. What passes y's
    counter by, as y.data.add_(1), spoils dg. For second derivatives set sora.MANY = math.inf.
    """

    @staticmethod
    def forward(ctx, x, W0, b, g, U, V):
        with full_precision(x):
            W = W0 if g is None else g[:, None] * W0
            W = torch.addmm(W, U, V).to(x.dtype)  # (out, in)
            y = F.linear(x, W, None if b is None else b.to(x.dtype)).detach()  # else a view, not to be changed in place

        kept = None
        no_counts = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
        if g is not None and x.dtype == g.dtype and not no_counts:
            kept = y.data
            ctx.before = y._version
            ctx.counter = y.detach()
            ctx.counter.data = y.new_empty(0)  # it shall count the changes, and not hold y's memory
        ctx.save_for_backward(x, W, W0, b, g, U, V, kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, W, W0, b, g, U, V, y = ctx.saved_tensors
        dx = db = dg = None
        if ctx.needs_input_grad[0]:
            dx = dy @ W  # (..., in)

        x, dy = x.flatten(0, -2), dy.flatten(0, -2)  # (N, in), (N, out)
        if b is not None and (y is not None or b.requires_grad):  # Euler's identity needs it, trained or not
            db = dy.sum(0)  # (out,)

        if g is not None and (y is None or ctx.counter._version > ctx.before):
            dW = (dy.T @ x).to(g.dtype)  # (out, in)
            return dx, None, db, (dW * W0).sum(1), dW @ V.T, U.T @ dW

        dU = dy.T @ F.linear(x, V.to(x.dtype))  # (out, k)
        dV = (dy @ U.to(dy.dtype)).T @ x  # (k, in)
        if g is not None:
            g_dg = (dy * y.flatten(0, -2)).sum(0) - (U * dU).sum(1)
            if b is not None:
                g_dg = g_dg - b * db
            near_0 = 10 * torch.finfo(g.dtype).eps
            dg = g_dg / (g + near_0**2 / g)  # that is g_dg g / (g² + near_0²)
        return dx, None, db, dg, dU, dV


def rotation(C: torch.Tensor, E: torch.Tensor, exact: bool = True) -> tuple:
    """(K, P) of the rotation R = I + K Pᵀ: see `cayley`."""
    if exact and not torch._C._are_functorch_transforms_active():
        return QuickCayley.apply(C, E)
    return cayley(C, E, exact)[:2]


class QuickCayley(torch.autograd.Function):
    """The same K and P, and their gradient in fewer operations: of K = P X⁻¹ and X = J/t − PᵀP/2, with Y = dK X⁻ᵀ and
    H = KᵀY = (H₁₁ H₁₂; H₂₁ H₂₂), it is dX = −H, so d(1/t) = Σ J ⊙ dX = tr(H₁₂ − H₂₁), and to dP, what reaches P
    directly, come Y + P (H + Hᵀ)/2."""

    @staticmethod
    def forward(ctx, C, E):
        K, P, *rest = cayley(C, E)
        ctx.save_for_backward(C, E, K, P, *rest)
        return K, P

    @staticmethod
    def backward(ctx, dK, dP):
        C, E, *found = ctx.saved_tensors
        r_p = C.shape[1]
        with full_precision(C):
            if torch.is_grad_enabled():  # for second derivatives, found as functions of C and E
                found = cayley(C, E)
            K, P, inverse, norms, one_over_t = found
            Y = dK @ inverse.T.to(dK.dtype)  # (out, 2 r_p)
            H = K.T @ Y  # (2 r_p, 2 r_p)
            dP = torch.addmm(dP + Y, P, H + H.T, alpha=0.5)
        d_sum = (H[:r_p, r_p:] - H[r_p:, :r_p]).trace() * (one_over_t > 1)  # by ‖C‖ + ‖E‖, in 1/t if above 1
        by_C, by_E = d_sum / norms.clamp_min(1e-30)  # where a norm is 0, so is what this multiplies
        dC = dP[:, r_p:] - dP[:, :r_p]  # as P = [E − C , C]
        return torch.addcmul(dC, by_C, C), torch.addcmul(dP[:, :r_p], by_E, E)


# ======== The plumbing: attach, merge, save, load

OPTIONS = {"method": str, "r": int, "alpha": float, "r_p": int, "exact": bool}
STATE = OPTIONS | {"alpha": (int, float), "targets": list, "fingerprint": str, "trained": dict}


def adapt(model: nn.Module, method: str = "sora", r: int = 16, alpha: float = 32, r_p: int = 4, targets=None,
          exact: bool = True) -> nn.Module:
    """Freeze `model` and replace its target linear layers, in place; returns the model.

    method    one of METHODS: "lora", "dora", "prediag", "sora"; for r, alpha, r_p, exact see DiagonalPlusLowRank
    targets   None: every linear layer but those that share their weight with an embedding (a tied head). Else names or
              endings of names, matched on whole dotted parts: ["c_attn", "mlp.c_proj"]
    A layer of several names stays shared, and is meant by the first. Load the base's weights first: DoRA needs them.
    Raises ValueError (an unknown method, a target that matches nothing, a rank out of range, a model that is adapted
    already) or TypeError (a target that cannot be adapted, say a quantised one), before anything is changed.
    """
    adapted = _adapted(model)
    if adapted:
        raise ValueError(f"the model is adapted already, in {len(adapted)} layers: merge it first")
    layers = _new_layers(model, _target_names(model, targets), method, r=r, alpha=alpha, r_p=r_p, exact=exact)
    return _replace(model.requires_grad_(False), layers)


def _adapted(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DiagonalPlusLowRank)}


def _target_names(model, targets):
    """The names of the linear layers that targets mean, each once; for `targets` see adapt."""
    linears = {name: m for name, m in model.named_modules() if name and looks_linear(m)}
    if targets is None:
        tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        untied = [name for name, m in linears.items() if id(getattr(m, "weight", None)) not in tied]
        found = {"every nn.Linear": untied}
    else:
        if isinstance(targets, str):
            targets = [targets]
        found = {}
        for target in targets:
            found[target] = [name for name in linears if f".{name}".endswith(f".{target}")]

    missing = [target for target, names in found.items() if not names]
    if missing or not found:
        exist = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"targets {missing} match nothing: choose among {exist}")
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _new_layers(model, names, method, **options):
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
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in substitutes:
            model.set_submodule(name, substitutes[module])
    return model


def merge(model: nn.Module, keep: bool = False) -> nn.Module:
    """Turn every adapted layer, if any, into the plain, frozen one it was, with weight W' and the same bias, in place.
    Nothing is merged unasked, in train() or eval(). keep=True holds W0 too, for `unmerge`. W' has W0's dtype: bfloat16
    loses 50, 17, 3 % of an update of 0.3, 1, 5 % of ‖W0‖, float16 an eighth of that. Warns where over half is lost."""
    for name in list(_adapted(model)):  # one by one, so that W0 goes before the next W' comes
        layer = model.get_submodule(name)
        delta, weight = layer.delta(), layer.merged_weight()
        lost = weight - layer.weight - delta
        if lost.norm() > delta.norm() / 2:
            warnings.warn(f"{weight.dtype} rounds off over half of an update: merge model.float(), say", stacklevel=2)
        merged = plain_layer(layer, weight)
        if keep:
            W0 = plain_layer(layer, layer.weight).weight.detach()  # oriented as its kind has it
            merged.register_buffer("W0_before_merge", W0, persistent=False)
        _replace(model, {name: merged})
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base back bit for bit, in place, its adapter dropped: of an adapted model, or after merge(keep=True).
    Raises ValueError where there is no W0 to give back."""
    layers = _adapted(model)
    merged = [m for m in model.modules() if "W0_before_merge" in m._buffers]
    if not layers and not merged:
        raise ValueError("the model holds no W0: unmerge one that is adapted, or merged by merge(model, keep=True)")
    for linear in merged:
        linear.weight = nn.Parameter(linear.W0_before_merge, requires_grad=False)
        del linear.W0_before_merge
    return _replace(model, {name: plain_layer(layer, layer.weight) for name, layer in layers.items()})


def adapter_state_dict(model: nn.Module) -> dict:
    """The adapter's parameters (copies, on the CPU) and what load_adapter needs: method, r, alpha, r_p, exact, the
    names of the layers in targets, and a fingerprint of their W0. What else was trained, a new head say, is not in it.
    Raises ValueError for no adapter or several kinds."""
    return _state(_adapted(model))


def _state(layers):
    kinds = {tuple(plain(getattr(layer, key)) for key, plain in OPTIONS.items()) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"the model has adapters of {len(kinds)} kinds, {[*kinds]}: one is needed, see adapt")
    trained = {name: p.detach().to("cpu", copy=True) for name, p in _trained(layers).items()}
    rest = {"targets": list(layers), "trained": trained, "fingerprint": _fingerprint(layers)}
    return dict(zip(OPTIONS, kinds.pop())) | rest


def _trained(layers):
    """{name: parameter} of all that is trained."""
    found = {}
    for name, layer in layers.items():
        for key, p in layer.named_parameters():
            if key not in ("weight", "bias"):
                found[f"{name}.{key}"] = p
    return found


def _fingerprint(layers):
    """Of their W0, as bfloat16: the same for a base that was cast to that (though not to float16)."""
    digest = hashlib.sha256()
    for layer in layers.values():
        content = bytearray(2 * layer.weight.numel())
        torch.frombuffer(content, dtype=torch.bfloat16).copy_(layer.weight.detach().flatten())
        digest.update(content)
    return digest.hexdigest()[:16]


def load_adapter(model: nn.Module, state: dict) -> nn.Module:
    """Put an adapter_state_dict on `model`, in place: on a plain base, which it adapts, or on a model adapted alike.

    Raises, before anything is changed, TypeError for a layer that is no linear one, ValueError where `state` is not
    whole and finite, a layer is missing, or the model is adapted in another way or has other W0 (as bfloat16)."""
    if not isinstance(state, dict):
        raise TypeError("this is no adapter_state_dict: save that of an adapted model")
    wrong = [key for key, kind in STATE.items() if not isinstance(state.get(key), kind)]
    if wrong:
        raise ValueError(f"this is no adapter_state_dict, by its {', '.join(wrong)}: save that of an adapted model")
    missing = {*map(repr, state["targets"])} - {*map(repr, dict(model.named_modules()))}
    if missing:
        raise ValueError(f"the adapter is for layers that the model has not: {', '.join(sorted(missing))}")

    adapted = _adapted(model)
    layers = adapted or _new_layers(model, state["targets"], **{key: state[key] for key in OPTIONS})
    mine = _state(layers)
    for key in (*OPTIONS, "targets"):
        if mine[key] != state[key]:
            raise ValueError(f"the adapter has {key}={state[key]}, the model {key}={mine[key]}: they must be alike")
    if mine["fingerprint"] != state["fingerprint"]:
        raise ValueError("W0 differ from those the adapter was trained on (compared as bfloat16): load it on that base")
    given, wanted = state["trained"], _trained(layers)
    odd = [str(name) for name in given | wanted if not _fits(given.get(name), wanted.get(name))]
    if odd:
        raise ValueError(f"these tensors are not finite, missing, unknown or of another shape: {', '.join(odd)}")

    for name, p in wanted.items():
        p.data.copy_(given[name])
    if adapted:
        return model
    return _replace(model.requires_grad_(False), layers)


def _fits(given, wanted):
    tensors = isinstance(given, torch.Tensor) and isinstance(wanted, torch.Tensor)
    return tensors and given.shape == wanted.shape and given.is_floating_point() and given.isfinite().all()


# The rare cases: what is linear but no nn.Linear, and what would fail silently

CONV1D = "<class 'transformers.pytorch_utils.Conv1D'>"  # a linear layer whose weight is stored (in, out)


def looks_linear(module):
    """By its attributes, so that a quantised layer is refused by name instead of being passed over."""
    return hasattr(module, "in_features") or str(type(module)) == CONV1D


def weight_and_bias(module):
    """W0 (out, in) and b (out,) or None, of an nn.Linear or a Conv1D of transformers. Raises TypeError for all that is
    no plain one: other classes, quantised or float8 weights, hooks (pruning, weight norm), a `forward` of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    conv1d = str(type(module)) == CONV1D
    touched = hooks or module._buffers or "forward" in vars(module)  # by pruning, weight norm, merge(keep=True), ...
    plain = (conv1d or type(module) is nn.Linear) and not touched
    if not plain or not module.weight.is_floating_point() or module.weight.itemsize == 1:
        raise TypeError(f"{module} is no plain floating-point nn.Linear without hooks: choose other targets")
    return module.weight.T if conv1d else module.weight, module.bias


def plain_layer(layer, weight):
    """A frozen layer of the kind that was adapted, with this weight (out, in) and the same bias."""
    with torch.device("meta"):
        if layer.kind is nn.Linear:
            plain = nn.Linear(layer.in_features, layer.out_features)
        else:
            plain = layer.kind(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
    plain.weight = nn.Parameter(weight)
    plain.bias = layer.bias
    vars(plain).update({key: value for key, value in vars(layer).items() if "hook" in key})  # put there since
    return plain.train(layer.training).requires_grad_(False)


# ======== The spectrum of an update: how evenly are its singular values spread?


def svd_entropy(matrix: torch.Tensor, power: float = 2) -> float:
    """H = −Σ p ln p / ln min(out, in) in [0, 1], with p = σ^power / Σ σ^power over the singular values σ of `matrix`.

    0: one direction carries everything. 1: all singular values are equal. power=2 is the entropy of the energy (Alter
    et al. 2000) and hardly sees a long flat tail; power=1 (Roy & Vetterli 2007) counts the tail in full. At rank r both
    are at most ln r / ln min(out, in). `matrix` may also be its singular values (1-D). nan for zeros or a single value.
    """
    sigma = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if sigma.ndim == 2:
        sigma = torch.linalg.svdvals(sigma)
    p = (sigma / sigma.max()).double() ** power
    p = p / p.sum()
    return (torch.special.entr(p).sum() / math.log(len(sigma))).item()


# ======== All above stands alone and may be copied without the rest. Below: a GPT to try it on, as nanoGPT lays it out


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
        n = config.n_embd
        self.n_head, self.gelu = config.n_head, config.gelu
        self.ln_1 = nn.LayerNorm(n)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(n, 3 * n), "c_proj": nn.Linear(n, n)})
        self.ln_2 = nn.LayerNorm(n)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n, 4 * n), "c_proj": nn.Linear(4 * n, n)})

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, C / n_head) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, C / n_head)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.attn.c_proj(y)

        h = self.mlp.c_fc(self.ln_2(x))  # (B, T, 4 C)
        return x + self.mlp.c_proj(F.gelu(h, approximate=self.gelu))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): tokens (B, T) -> logits (B, T, vocab), or, given targets (B, T), their mean loss."""

    CHUNK = 2**26  # at most so many logits at a time

    def __init__(self, config: GPTConfig):
        super().__init__()
        if not isinstance(config.n_head, int) or config.n_head < 1 or config.n_embd % config.n_head:
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
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the residual stream adds up the outputs of 2 n_layer of these
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the context of {self.config.block_size}")
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[:T]  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)  # (B, T, C)

        if targets is None:
            return self.lm_head(x)  # (B, T, vocab)
        return self.loss(x.flatten(0, 1), targets.flatten())

    def loss(self, x, targets):
        """Mean cross-entropy in nats, of x (N, C) and targets (N,), of which -100 does not count. More logits than
        CHUNK are made in chunks, and anew in the backward pass: all at once would take more memory than the model."""
        n = self.CHUNK // self.config.vocab_size
        if len(x) <= n:
            return F.cross_entropy(self.lm_head(x), targets)
        chunks = zip(x.split(n), targets.split(n))
        losses = [recompute(self.summed_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return sum(losses) / (targets != -100).sum()

    def summed_loss(self, x, targets):
        return F.cross_entropy(self.lm_head(x), targets, reduction="sum")

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, n: int, temperature: float = 1.0,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Append n sampled tokens: (B, T) -> (B, T + n). Nothing is cached, so each token costs a full pass."""
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size:])[:, -1]  # (B, vocab)
            p = (logits / temperature).float().softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], 1)
        return tokens

    def checkpoint(self) -> dict:
        """What from_pretrained reads, to be saved by `save`. Raises ValueError while an adapter is attached."""
        if _adapted(self):
            raise ValueError("the model is adapted: merge(model) first, or save adapter_state_dict(model)")
        return {"config": asdict(self.config), "model": self.state_dict()}

    def gpt2_state_dict(self) -> dict:
        """The weights with GPT-2's names and orientation, as from_pretrained and transformers read them (the latter as
        pytorch_model.bin beside a config.json). Raises ValueError while an adapter is attached."""
        return _transpose_conv1d(self.checkpoint()["model"])

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> "GPT":
        """A GPT in float32 on the CPU, of one of these. No code from a file is ever run.

        - a name in GPT2: OpenAI's weights, downloaded once and compared with their sha256 each time
        - a path to GPT-2's layout, .safetensors or a saved gpt2_state_dict; the config.json beside it tells n_head and
          the GELU, without one heads are 64 wide and the GELU is the tanh form, as in GPT-2
        - a path to nanoGPT's ckpt.pt, with the exact GELU, and zeros for biases it lacks; or to a saved `checkpoint()`
        Raises OSError (the file cannot be had), ValueError (it is none of these), RuntimeError (a list of all tensors
        that are missing, unknown or of another shape).
        """
        path = Path(_download(name_or_path) if name_or_path in GPT2 else name_or_path)
        try:
            config, state = _read_checkpoint(path)
            if config.n_layer > len(state):
                raise ValueError(f"n_layer={config.n_layer}, with {len(state)} tensors")
            with torch.device("meta"):
                model = cls(config)
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except Exception as error:
            raise ValueError(f"{path} is no checkpoint of GPT-2, nanoGPT or this GPT: {error!r:.100}") from error
        model.load_state_dict(state, assign=True)
        if torch.equal(model.lm_head.weight, model.transformer.wte.weight):  # else the head was adapted and merged
            model.lm_head.weight = model.transformer.wte.weight
        return model


# ======== Files: GPT-2's released weights, other people's checkpoints, our own

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
STORED_IN_OUT = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # by GPT-2
CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def _download(name):
    """The path of GPT-2's model.safetensors, downloaded unless it is there already, its sha256 compared each time."""
    revision, sha256 = GPT2[name][3:]
    path = Path(torch.hub.get_dir(), "checkpoints", name, "model.safetensors")
    url = f"https://huggingface.co/openai-community/{name}/resolve/{revision}/model.safetensors"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256)  # moved there once it is whole
        except (OSError, RuntimeError) as error:
            raise OSError(f"{name} cannot be downloaded ({error}): put {url} at {path}") from error
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, not {sha256}: delete it, or give its path as that of any file")
    return path


def _read_checkpoint(path):
    """The GPTConfig and the state dict, in our layout, of a checkpoint file."""
    if path.suffix == ".safetensors":
        file = _safetensors(path)
    else:
        file = torch.load(path, "cpu", weights_only=True)
    if "model" in file:
        return _of_nanogpt(file.get("model_args") or file["config"], file["model"])
    return _of_gpt2(file, path.with_name("config.json"))


def _safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes for the length of a JSON header, the header, the raw tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))  # whatever length it claims
        start = file.tell()
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)[start:]  # mapped, not read
    header.pop("__metadata__", None)
    offsets = sorted(entry["data_offsets"] for entry in header.values())
    begins, ends = zip(*offsets)
    if [*begins, len(raw)] != [0, *ends]:
        raise ValueError("the tensors do not follow one another from the first byte to the last")
    state = {}
    for name, entry in header.items():
        content = raw[slice(*entry["data_offsets"])].clone()
        state[name] = content.view(CODES[entry["dtype"]]).view(entry["shape"])
    return state


def _of_gpt2(file, beside):
    """GPT-2's layout: names without "transformer." perhaps, Conv1D's orientation, causal masks, a tied head."""
    state = {}
    for name, p in _transpose_conv1d(file).items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
            state[f"transformer.{name.removeprefix('transformer.')}"] = p.float()
    wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight", wte)

    told = {"activation_function": "gelu_new", "n_head": wte.shape[1] // 64}
    if beside.exists():
        told.update(json.loads(beside.read_text()))
    ours = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "layer_norm_epsilon": 1e-5}
    for key, value in ours.items():
        if told.get(key, value) != value:
            raise ValueError(f"{beside} has {key}={told[key]}: this GPT has {value}")
    n_layer = len({name.split(".")[2] for name in state if ".h." in name})
    gelu = {"gelu_new": "tanh", "gelu": "none"}[told["activation_function"]]
    return GPTConfig(len(wpe), len(wte), n_layer, told["n_head"], wte.shape[1], gelu), state


def _transpose_conv1d(state):
    return {name: p.T.contiguous() if name.endswith(STORED_IN_OUT) else p for name, p in state.items()}


def _of_nanogpt(told, saved):
    """nanoGPT's layout, which is ours, with the exact GELU; perhaps with a prefix or masks, perhaps without biases."""
    state = {}
    for name, p in saved.items():
        if not name.endswith(".attn.bias"):  # a causal mask
            state[name.removeprefix("_orig_mod.")] = p.float()
    told = {"gelu": "none", "bias": True, "dropout": 0.0} | told
    if not told["bias"]:
        for name in list(state):
            if name.startswith(("transformer.h.", "transformer.ln_f")):
                state[name.removesuffix("weight") + "bias"] = torch.zeros(len(state[name]))
    del told["bias"], told["dropout"]
    return GPTConfig(**told), state


def save(state: dict, path: str):
    """torch.save under a temporary name, then a move: a half-written file never stands under `path`."""
    torch.save(state, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)
