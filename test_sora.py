"""python -m pytest -q

The references are slow, dense and in float64: the formulas as they are printed, one matrix after the other.
"""
import ast
import base64
import codecs
import copy
import hashlib
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
import types
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sora
from sora import (
    GPT,
    METHODS,
    DoRALinear,
    GPTConfig,
    LoRALinear,
    SORALinear,
    adapt,
    adapted_layers,
    adapter_state_dict,
    disabled,
    load_adapter,
    merge,
    rotation,
    save_as_peft,
    svd_entropy,
    unmerge,
)

torch.set_num_threads(1)  # the products are too small to share, and on a busy machine threads wait for each other

ALL = pytest.mark.parametrize("method", ["lora", "dora", "prediag", "sora"])
CASES = ["lora", "dora", "prediag", "sora", "sora, first order"]
EACH = pytest.mark.parametrize("case", CASES)
WAYS = pytest.mark.parametrize("way", ["by_weight", "by_outputs"])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=2, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed)).to(dtype)


def filled(layer, scale=1.0):
    for p in layer.parameters():
        nn.init.normal_(p, std=scale, generator=rng())
    return layer


def linear(n_in=7, n_out=5, bias=True, dtype=torch.float64):
    return filled(nn.Linear(n_in, n_out, bias)).to(dtype)


def conv1d(n_in, n_out):
    """transformers' linear layer, whose weight is (in, out)"""
    utils = pytest.importorskip("transformers.pytorch_utils")
    return filled(utils.Conv1D(n_out, n_in)).double()


def layer_of(case, base, r=3, alpha=5):
    torch.manual_seed(0)  # of A and C
    method, _, first_order = case.partition(", ")
    options = {"r_p": min(r, 2), "exact": not first_order} if method == "sora" else {}
    return METHODS[method](base, r, alpha, **options)


def trained(module, scale=0.5, seed=1):
    """Give every trained parameter a random value, as if training had happened."""
    g = rng(seed)
    for p in ours(module).values():
        p.data += scale * torch.randn(p.shape, generator=g).to(p)
    return module


def ours(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def tiny_gpt(seed=0, **shape):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8} | shape))
    model.transformer.ln_f.bias.data += 4e-7  # where float16 has few digits
    return model


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=rng(seed))


def same(a, b):
    """Two dictionaries of tensors, to the last bit"""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- The formulas


def dense(method, W, p, s, exact=True):
    """W' by the book: dense, one matrix after the other."""
    BA = s * p["B"] @ p["A"]
    if method == "lora":
        return W + BA
    if method == "dora":
        return torch.diag(p["m"] / (W + BA).norm(dim=1).detach()) @ (W + BA)
    D = torch.diag(p["d"])
    if method == "prediag":
        return D @ W + BA
    R = turn(p["C"], p["E"], exact)
    return R @ (D @ W + BA)


def turn(C, E, exact=True):
    """R by the book"""
    t = min(1, 1 / (C.norm() + E.norm() + 1e-6))
    S = t * (E @ C.T - C @ E.T)
    I = torch.eye(len(S), dtype=S.dtype)
    if exact:
        return torch.linalg.solve(I - S / 2, I + S / 2)
    return I + S


def dense_of(layer, W0, p):
    told = layer.options
    return dense(told["method"], W0, p, told["alpha"] / told["r"], told.get("exact", True))


def results(call, x, parameters, dy):
    """{name: value} of the output, and of the gradients of x and of the parameters"""
    leaves = {"x": x} | parameters
    for leaf in leaves.values():
        leaf.grad = None
    y = call(x)
    y.backward(dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_near(found, wanted, digits=1e-10):
    """Each to so many digits of its largest entry, or of the largest of all where it has cancelled"""
    most = max(b.abs().max() for b in wanted.values())
    for name, b in wanted.items():
        size = b.abs().max()
        if size < 1e-9 * most:
            size = most
        error = (found[name] - b).abs().max() / size
        assert error <= digits, f"{name} is off by {error:.0e}"


def assert_by_the_book(layer, W0):
    """Values and gradients, both ways, and W' of a float64 layer; returns what is right"""
    x = randn(2, 3, layer.in_features).requires_grad_()
    dy = randn(2, 3, layer.out_features, seed=3)
    p = {name: q.detach().clone().requires_grad_() for name, q in ours(layer).items()}
    wanted = results(lambda x: F.linear(x, dense_of(layer, W0, p), layer.bias), x, p, dy)  # never conditions the bias
    for way in (layer.by_weight, layer.by_outputs):
        assert_near(results(way, x, ours(layer), dy), wanted)

    W = dense_of(layer, W0, p).detach()
    assert_near({"W'": layer.merged_weight(), "W' - W0": layer.delta()}, {"W'": W, "W' - W0": W - W0})
    assert layer.weight.shape == layer.W0.shape
    assert not layer.delta().requires_grad
    assert not layer.merged_weight().requires_grad
    return wanted


BASES = {
    "7 to 5": linear, "5 to 9, no bias": partial(linear, 5, 9, bias=False), "6 to 6": partial(linear, 6, 6),
    "Conv1D": partial(conv1d, 5, 9), "square Conv1D": partial(conv1d, 6, 6),
}


@EACH
@pytest.mark.parametrize("base", BASES)
def test_values_gradients_and_merged_weight_equal_the_dense_formula(case, base):
    W0, base = base, BASES[base]()
    W0 = base.weight.T if "Conv1D" in W0 else base.weight
    layer = trained(layer_of(case, base))
    wanted = assert_by_the_book(layer, W0)
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted.values())  # or it would hardly be tested
    n_out, n_in = W0.shape
    beyond_lora = {"lora": 0, "dora": n_out, "prediag": n_out, "sora": n_out + 2 * 2 * n_out}
    assert sum(p.numel() for p in ours(layer).values()) == 3 * (n_in + n_out) + beyond_lora[layer.options["method"]]


def rows_of_zeros(layer):
    layer.W0[::2] = 0


def diagonal_through_0(layer):
    diagonal = getattr(layer, "d", layer.B[:, 0])
    diagonal[:3] = torch.tensor([0, 1e-3, -1e-2])


def multiply(names, factor, layer):
    for p in [getattr(layer, name) for name in names if hasattr(layer, name)]:
        p.mul_(factor)


SHAPES = {  # in, out, r
    "rank 1": (7, 5, 1), "rank out": (7, 5, 5), "rank in": (5, 9, 5), "in 1": (1, 6, 1), "out 1": (6, 1, 1),
    "1 by 1": (1, 1, 1), "out below 2 r_p": (4, 3, 2),
}
CHANGES = {
    "rows of zeros": rows_of_zeros, "d through 0": diagonal_through_0, "C = E = 0": partial(multiply, "CE", 0),
    "small C, E": partial(multiply, "CE", 1e-2), "huge C, E": partial(multiply, "CE", 1e4),
    "huge E": partial(multiply, "E", 1e4), "huge B": partial(multiply, "B", 1e4),
    "huge B, C, E": partial(multiply, "BCE", 1e3),
}


@EACH
@pytest.mark.parametrize("edge", [*SHAPES, *CHANGES])
def test_edges_equal_the_dense_formula(case, edge):
    n_in, n_out, r = SHAPES.get(edge, (7, 9, 3))
    layer = trained(layer_of(case, linear(n_in, n_out), r))
    if edge in CHANGES:
        with torch.no_grad():
            CHANGES[edge](layer)
    assert_by_the_book(layer, layer.W0)


@ALL
def test_initial_values(method):
    torch.manual_seed(0)
    layer = METHODS[method](linear(400, 100, dtype=torch.float32))
    assert adapt(nn.Sequential(linear(400, 100)), method)[0].options == layer.options
    default = {"method": method, "r": 16, "alpha": 32.0, "dropout": 0.0}
    assert 0.95 < layer.A.abs().max() * 400**0.5 < 1
    assert not layer.B.any()
    if method in ("prediag", "sora"):
        assert torch.equal(layer.d, torch.ones(100))
    if method == "sora":
        default |= {"r_p": 4, "exact": True}
        assert 0.95 < layer.C.abs().max() * 100**0.5 < 1
        assert torch.equal(layer.C, layer.E)
    assert layer.options == default
    assert f"400, 100, {default}" in str(layer)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_new_layer_is_its_base_to_the_last_bit_and_all_but_A_can_move(case, dtype):
    base = linear(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):  # which must not round what is made
        layer = layer_of(case, base)
    assert torch.equal(layer.weight, base.weight)
    assert not layer.delta().any()
    moves = {"lora": "B", "dora": "Bm", "prediag": "Bd", "sora": "BdCE"}[layer.options["method"]]  # A waits for B
    for way in (layer.by_weight, layer.by_outputs):
        layer.zero_grad()
        way(randn(4, 7, dtype=dtype)).square().sum().backward()
        assert {name for name, p in ours(layer).items() if p.grad.any()} == {*moves}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", ["7 to 5", "5 to 9, no bias"])
def test_lora_and_dora_equal_those_of_peft(method, base):
    peft = pytest.importorskip("peft")
    base = BASES[base]()
    layer = trained(METHODS[method](copy.deepcopy(base), 3, 5))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=method == "dora")
    model = peft.get_peft_model(nn.Sequential(base), config)
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    theirs = {name: model.base_model.model[0].get_parameter(names[name]) for name in ours(layer)}
    for name, p in theirs.items():
        p.data.copy_(layer.get_parameter(name))
    x, dy = randn(4, layer.in_features).requires_grad_(), randn(4, layer.out_features)
    assert_near(results(layer, x, ours(layer), dy), results(model, x, theirs, dy))


def test_the_rows_of_dora_have_the_norms_m_and_rows_of_zeros_stay():
    base = linear(40, 30)
    nn.init.zeros_(base.weight.data[2])
    layer = DoRALinear(base, 8)
    assert torch.equal(layer.weight, base.weight)
    assert layer.m[2] == 1e-6
    layer(torch.ones(1, 40, dtype=torch.float64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in ours(layer).values())
    trained(layer).m.data[::2] *= -1
    assert_close(layer.merged_weight().norm(dim=1), layer.m.abs())


def test_rotation_by_hand():
    """t = 1/2 and S = ((0, −1/2), (1/2, 0)): Cayley turns the plane by 2 arctan 1/4."""
    C, E = torch.eye(2).split(1, dim=1)
    for exact, R in [(True, [[15 / 17, -8 / 17], [8 / 17, 15 / 17]]), (False, [[1, -0.5], [0.5, 1]])]:
        K, V = rotation(C, E, exact)
        assert_close(torch.eye(2) + K @ V.T, torch.tensor(R), rtol=0, atol=1e-6)


@pytest.mark.parametrize("apart", [0.001, 1, 30])
@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("n_out", [64, 500])
def test_the_rotation_is_orthogonal_in_float32(n_out, size, apart):
    """C and E of the usual size and a hundred times that, near each other, as at the start, and far apart"""
    C = size * SORALinear(linear(8, n_out, dtype=torch.float32), 2).C.detach()
    E = C + apart * C.std() * randn(n_out, 4, dtype=torch.float32)
    K, V = rotation(C, E)
    I = torch.eye(n_out, dtype=torch.float64)
    R = I + K.double() @ V.double().T
    assert (R.T @ R - I).abs().max() < 1e-6
    assert (R - turn(C.double(), E.double())).abs().max() < 1e-5
    assert (R - I).norm() > 1e-4


@pytest.mark.parametrize("size", [0.5, 0.999, 1.001, 3, 1000])
@pytest.mark.parametrize("n_out", [2, 3, 9])  # with two below 2 r_p
def test_C_and_E_are_scaled_once_their_norms_add_up_to_more_than_1(n_out, size):
    C, E = randn(2, n_out, 2)
    C, E = (size * p / (C.norm() + E.norm()) for p in (C, E))
    K, V = rotation(C, E, exact=False)
    S = (E @ C.T - C @ E.T) / max(1, size + 1e-6)
    assert_close(K @ V.T, S, rtol=1e-10, atol=1e-10)
    K, V = rotation(C, E)
    assert_close(torch.eye(n_out) + K @ V.T, turn(C, E), rtol=1e-9, atol=1e-9)


def test_the_first_order_rotation_only_stretches():
    K, V = rotation(*randn(2, 6, 2), exact=False)
    stretches = torch.linalg.svdvals(torch.eye(6) + K @ V.T)
    assert stretches.min() > 1 - 1e-12
    assert stretches.max() > 1.01


@pytest.mark.parametrize("sigma, energy, flat", [
    ([1, 1, 1, 1], 1, 1), ([5, 0, 0, 0], 0, 0), ([3, 3, 0, 0], 0.5, 0.5), ([2, 1, 0, 0], 0.36096, 0.45915)])
def test_entropies_of_known_spectra(sigma, energy, flat):
    U, V = torch.linalg.qr(randn(6, 4))[0], torch.linalg.qr(randn(4, 4))[0]
    sigma = torch.tensor(sigma, dtype=torch.float64)
    matrix = U @ torch.diag(sigma) @ V
    for spread in (sigma, matrix, 1e-30 * matrix.T.float()):
        assert svd_entropy(spread) == svd_entropy(spread, 2) == pytest.approx(energy, abs=1e-5)
        assert svd_entropy(spread, 1) == pytest.approx(flat, abs=1e-5)


def test_the_entropy_of_nothing_or_of_one_value_is_nan():
    assert math.isnan(svd_entropy(torch.zeros(3, 4)))
    assert math.isnan(svd_entropy(torch.ones(1, 4)))


# ---- The plumbing


def tiny_state():
    return adapter_state_dict(trained(adapt(tiny_gpt(), r=2)))


def assert_untouched(model, base):
    """The model is what `base` is, and no part of it is frozen that is not there."""
    assert same(model.state_dict(), base.state_dict())
    assert ours(model).keys() == ours(base).keys()


@ALL
def test_training_changes_the_adapter_alone_and_merging_is_exact(method):
    base, batch = tiny_gpt().eval(), tokens(4, 8)
    model = adapt(copy.deepcopy(base), method, r=2)
    assert_close(model(batch), base(batch))
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # in the first, A waits for B
        model(batch, batch).backward()
        for p in ours(model).values():
            p.data -= p.grad
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {*ours(model)}

    y = model(batch)
    assert (y - base(batch)).abs().max() > 1e-2
    assert merge(model) is model
    assert_close(model(batch), y)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any(m.training for m in model.modules())
    assert not ours(model)
    once = copy.deepcopy(model.state_dict())
    assert same(merge(model).state_dict(), once)


def test_targets_match_whole_dotted_parts():
    def adapted(targets):
        model = adapt(tiny_gpt(), "lora", r=2, targets=targets)
        return [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]

    assert len(adapted(None)) == 8
    assert adapted(["mlp.c_proj"]) == adapted("mlp.c_proj") == [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]
    assert len(adapted(["c_proj", "mlp.c_proj", "c_fc"])) == 6


ERRORS = {
    "'lore': choose one of lora, dora, prediag, sora": {"method": "lore", "r": 2},
    r"'proj' matches none of .* parts: \['c_attn', 'c_fc', 'c_proj'": {"targets": ["c_fc", "proj"]},
    "none inside, in targets, not in train": {"targets": []}, "'head' matches none of": {"r": 2, "train": "head"},
    "dropout.* but got 1.5": {"r": 2, "dropout": 1.5},
    r"'transformer.h.0.attn.c_attn': 'r=9 is outside 1\.\.8'": {"r": 9},
    r"r=0 is outside 1\.\.8": {"r": 0}, r"r=2.5 is outside 1\.\.8": {"r": 2.5}, "r_p=0": {"r": 2, "r_p": 0},
    "alpha=0": {"r": 2, "alpha": 0}, "alpha=nan": {"r": 2, "alpha": math.nan}, "alpha=inf": {"r": 2, "alpha": math.inf},
}


@pytest.mark.parametrize("text", ERRORS)
def test_what_cannot_be_is_refused_and_changes_nothing(text):
    model = tiny_gpt()
    with pytest.raises(ValueError, match=text):
        adapt(model, **ERRORS[text])
    assert_untouched(model, tiny_gpt())


def test_what_asks_for_an_adapted_model_or_for_another_says_so():
    with pytest.raises(ValueError, match="has no adapter"):
        adapter_state_dict(tiny_gpt())
    with pytest.raises(ValueError, match="not adapted"):
        unmerge(tiny_gpt())
    with pytest.raises(ValueError, match="Conv2d.* cannot be adapted: it is Conv2d, no nn.Linear"):
        LoRALinear(nn.Conv2d(1, 1, 1))
    for lone in (nn.Linear(8, 8), tiny_gpt().transformer.wte):
        with pytest.raises(ValueError, match="none inside, in targets, not in train"):
            adapt(lone)
    model = tiny_gpt()
    adapt(model.transformer.h[0], r=2)
    with pytest.raises(ValueError, match="adapted already: unmerge or merge it first"):
        adapt(model, r=2)


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    """It inherits all it does."""


def with_weight(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    return layer


def hooked(hook):
    layer = nn.Linear(4, 4)
    getattr(layer, f"register_{hook}")(print)
    return layer


def patched():
    layer = nn.Linear(4, 4)
    layer.forward = partial(layer.forward)
    return layer


UNFIT = {  # what is made, and why it is left
    "pruned": (lambda: prune.identity(nn.Linear(4, 4), "weight"), "hooks"),
    "patched": (patched, "a forward of its own"), "subclass": (partial(Twice, 4, 4), "a forward of its own"),
    "parametrized": (lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity()),
                     "made of other parameters"),
    "small": (partial(nn.Linear, 4, 1), r"r=2 is outside 1\.\.1"),
}
for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
    UNFIT[hook] = partial(hooked, hook), "hooks"
for dtype in (torch.int8, torch.float8_e5m2):
    UNFIT[str(dtype)] = partial(with_weight, dtype), f"quantised, {dtype}"


@pytest.mark.parametrize("kind", UNFIT)
def test_what_an_adapter_would_not_do_is_refused_if_asked_for_and_else_left_with_a_warning(kind):
    make, reason = UNFIT[kind]
    unfit = make()
    model = nn.Sequential(nn.Linear(4, 4), unfit)
    with pytest.raises(ValueError, match=f"{{'1': '[^']*{reason}"):
        adapt(model, r=2, targets=["0", "1"])
    assert type(model[0]) is nn.Linear
    with pytest.warns(UserWarning, match=f"{{'1': '[^']*{reason}") as told:
        adapt(model, r=2)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert type(model[0]) is SORALinear
    assert model[1] is unfit


class Experts(nn.Module):
    """Matrices that are no layers; a single one may be a class token"""

    in_features, out_features = 4, 4

    def __init__(self, number=2):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(number, 4, 4))


def test_experts_are_named_and_what_only_looks_like_a_linear_layer_is_not():
    token = Experts(1)
    others = [nn.Bilinear(4, 4, 4), nn.Conv1d(4, 4, 2), token]
    others[0].in_features = others[0].out_features = 4
    model = nn.Sequential(nn.Linear(4, 4), *others, nn.Sequential(Experts()))
    with pytest.raises(ValueError, match="{'4.0': 'it is Experts, no nn.Linear'}"):
        adapt(model, r=2, targets="4.0")
    with pytest.warns(UserWarning, match="{'4.0': 'it is Experts, no nn.Linear'}$"):
        adapt(model, r=2)
    assert [*model[1:4]] == others


@pytest.mark.parametrize("give_back", [merge, unmerge])
def test_a_subclass_is_given_back_with_the_hooks_that_were_put_there_meanwhile(give_back):
    base = Named(4, 4).eval()
    base.note = "kept"
    model = adapt(nn.Sequential(base), r=2)
    assert not model[0].training
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append("called"))
    give_back(model.train())
    assert type(model[0]) is Named
    assert model[0].note == "kept"
    assert model[0].training
    model(torch.ones(4))
    handle.remove()
    model(torch.ones(4))
    assert seen == ["called"]


@ALL
def test_layers_whose_weight_is_read_are_adapted_too(method):
    """nn.MultiheadAttention and, in eval, nn.TransformerEncoderLayer call no layer: they read its weight."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
    trained(adapt(model, method, r=2))
    assert isinstance(model.self_attn.out_proj, METHODS[method])
    merged = merge(copy.deepcopy(model))
    x, dy = randn(3, 5, 8, dtype=torch.float32).requires_grad_(), randn(3, 5, 8, seed=3, dtype=torch.float32)
    for training in (True, False):
        model.train(training)
        found = results(model, x, ours(model), dy)
        assert_near(found, results(merged.train(training), x, {}, dy), 1e-5)
        assert all(gradient.any() for gradient in found.values())
        with torch.no_grad():
            assert_close(model(x), merged(x))


def test_a_shared_layer_stays_shared():
    def two():
        shared = linear()
        return nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": linear()})

    model = trained(adapt(two(), r=2, targets="b.0"))
    state, given_back = adapter_state_dict(model), unmerge(copy.deepcopy(model))
    loaded = load_adapter(two(), state)
    assert torch.equal(loaded["a"].weight, model["a"].weight)
    for each in (model, given_back, loaded, merge(copy.deepcopy(model))):
        assert each["a"] is each["b"][0]
    assert {name[0] for name in ours(adapt(two(), "lora", r=2, train="b.0"))} == {"a", "c"}


def test_a_tied_head_is_left_alone_unless_asked_for_and_then_shares_its_memory():
    model = adapt(tiny_gpt(), r=2)
    assert type(model.lm_head) is nn.Linear
    model = trained(adapt(merge(model), r=2, targets=["lm_head"]))
    for each in (model, copy.deepcopy(model)):
        assert each.lm_head.W0 is each.transformer.wte.weight


@ALL
@pytest.mark.parametrize("base", [linear, partial(conv1d, 5, 9), partial(linear, dtype=torch.bfloat16)])
def test_merging_keeps_the_weight_as_it_is_read_and_unmerging_gives_the_base_back(method, base):
    base = base()
    model = nn.Sequential(copy.deepcopy(base))
    W0, bias = model[0].weight, model[0].bias
    trained(adapt(model, method, r=2))
    merged = merge(copy.deepcopy(model))[0]
    assert torch.equal(merged.weight, model[0].weight)
    assert merged.weight.is_contiguous()
    assert unmerge(model) is model
    assert type(model[0]) is type(merged) is type(base)
    assert model[0].weight is W0
    assert model[0].bias is bias
    assert same(model[0].state_dict(), base.state_dict())
    assert not ours(model)


@ALL
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_travels_alone(method, dtype, tmp_path):
    """Onto a base, also one that was cast, and (None) onto a model adapted alike"""
    options = {"r_p": np.int64(4), "exact": np.bool_(True)} if method == "sora" else {}
    targets = ["attn.c_proj", "c_fc"]
    model = trained(adapt(tiny_gpt(), method, r=np.int64(2), alpha=np.float64(5), targets=targets, **options))
    held = adapter_state_dict(model)
    torch.save(held, tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    if dtype is None:
        fresh = adapt(tiny_gpt(), method, r=2, alpha=5, targets=targets)
    else:
        fresh = tiny_gpt().to(dtype)
    assert load_adapter(fresh, state) is fresh
    assert {*ours(fresh)} == {*ours(model)} == {*state["trained"]}
    assert same({name: p.float() for name, p in ours(fresh).items()}, ours(model))
    if dtype in (None, torch.float32):
        assert torch.equal(fresh(tokens(3, 8)), model(tokens(3, 8)))
    trained(model)  # which what was saved does not follow
    assert same(held["trained"], state["trained"])


A = "transformer.h.0.mlp.c_fc.A"


def scaled_gpt(factor):
    model = tiny_gpt()
    for p in model.parameters():
        p.data *= factor
    return model


def with_norm():
    state = tiny_state()
    state["layers"]["transformer.ln_f"] = state["layers"]["transformer.h.0.mlp.c_fc"]
    return state


MODELS = {
    "wte.weight is not that of the training: load": partial(scaled_gpt, 1.006),
    "wte.weight .*adapt's train.*check=False": partial(tiny_gpt, 1), "wte.weight is not": linear,
    "h.0.attn.c_attn: the adapter has .*'r': 2.* the model .*'r': 3": lambda: adapt(tiny_gpt(), r=3),
    "missing, unknown": lambda: adapt(tiny_gpt(), r=2, targets="c_fc"),
}
TENSORS = {
    f"another shape.*{A}": {A: torch.ones(1)}, "unknown.*'x'": {"x": torch.ones(1)},
    f"not finite.*{A}": {A: torch.full((2, 8), math.nan)},
}
STATES = {
    f"missing.*{A}": lambda: tiny_state() | {"trained": {}}, "no adapter_state_dict": lambda: tiny_gpt().state_dict(),
    "it is LayerNorm, no nn.Linear": with_norm,
}


@pytest.mark.parametrize("text", [*MODELS, *TENSORS, *STATES])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(text):
    model, state = MODELS.get(text, tiny_gpt)(), STATES.get(text, tiny_state)()
    if text in TENSORS:
        state["trained"] |= TENSORS[text]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        load_adapter(model, state)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("dtype, update, lossy", [
    (torch.bfloat16, 0.001, True), (torch.bfloat16, 0.01, False), (torch.float16, 0.001, False)])
def test_merging_warns_where_over_half_of_the_update_is_rounded_off(dtype, update, lossy, recwarn):
    model = adapt(nn.Sequential(linear(dtype=dtype), linear(5, 5, dtype=dtype)), "prediag", r=2)
    model[0].d.data += update  # the other has no update to lose
    merge(model)
    told = [str(warning.message) for warning in recwarn if "rounds off" in str(warning.message)]
    assert len(told) == lossy
    assert not lossy or told[0].startswith(f"0: {dtype} rounds off over half")
    assert {warning.filename for warning in recwarn} <= {__file__}


class Classifier(nn.Module):
    """A body, a layer that nothing calls, and a head that each process draws anew. `module` is no wrapper's."""

    def __init__(self, seed=0, n=8):
        super().__init__()
        self.module, self.norm, self.unused = filled(nn.Linear(n, n)), nn.LayerNorm(n), filled(nn.Linear(n, n))
        self.scale = nn.ParameterDict({"A": torch.ones(1)})  # named as an adapter's
        torch.manual_seed(seed)
        self.classifier = nn.Linear(n, 3)

    def forward(self, x):
        return self.scale["A"] * self.classifier(self.norm(self.module(x)))


def test_what_is_trained_beside_the_adapter_travels_with_it(tmp_path):
    model = adapt(Classifier(), r=2, targets=["module", "classifier"], train="classifier")
    model.norm.requires_grad_(True)
    model.module.bias.requires_grad_(True)
    trained(model)
    model.module.A.requires_grad_(False)
    assert type(model.classifier) is nn.Linear
    names = {*ours(model), "module.A"}
    assert {"classifier.weight", "norm.bias", "module.bias", "module.E"} < names
    torch.save(adapter_state_dict(model), tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=True)
    assert not state["trained"]["module.E"].requires_grad
    for fresh in (Classifier(1), adapt(Classifier(2), r=2, targets="module")):
        load_adapter(fresh, state)
        x = randn(4, 8, dtype=torch.float32)
        assert torch.equal(fresh(x), model(x))
        assert {*ours(fresh)} == {*state["trained"]} == names
    with pytest.warns(UserWarning, match="no parameter of the adapter requires a gradient") as told:
        adapter_state_dict(model.requires_grad_(False))
    assert told[0].filename == __file__


@pytest.mark.parametrize("targets", [None, "module"])
def test_a_head_that_was_adapted_or_left_needs_the_base_that_drew_it_or_no_check(targets):
    state = adapter_state_dict(trained(adapt(Classifier(), r=2, targets=targets)))
    with pytest.raises(ValueError, match="classifier.weight is not that of the training.*adapt's train.*check=False"):
        load_adapter(Classifier(1), state)
    loaded = load_adapter(Classifier(1), state, check=False)
    assert same(adapter_state_dict(loaded)["trained"], state["trained"])


@pytest.mark.parametrize("ask", [adapter_state_dict, merge])
def test_a_layer_that_training_never_reached_is_named(ask, recwarn):
    model = adapt(Classifier(), r=2)
    model(torch.ones(1, 8)).sum().backward()
    for p in ours(model).values():
        if p.grad is not None:
            p.data += p.grad
    ask(model)
    told = recwarn.pop()
    assert str(told.message).endswith(": ['unused']")
    assert told.filename == __file__


def test_layers_may_be_adapted_in_several_ways():
    base = tiny_gpt()
    model = copy.deepcopy(base)
    adapt(model.transformer.h[0], "dora", r=2)
    adapt(model.transformer.h[1], r=3, targets="c_fc", r_p=1, exact=False)
    state = adapter_state_dict(trained(model))
    assert torch.equal(load_adapter(base, state)(tokens(2, 8)), model(tokens(2, 8)))
    with pytest.raises(ValueError, match="peft wants one rank, alpha, dropout and method"):
        save_as_peft(model, "nowhere")


WRAPPERS = {
    "compile": torch.compile, "DataParallel": nn.DataParallel, "AveragedModel": AveragedModel,
    "two": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_unwrapped(wrapper):
    wrap, model = WRAPPERS[wrapper], trained(adapt(Classifier(), "lora", r=2))
    state, wrapped = adapter_state_dict(model), wrap(model)
    assert same(adapter_state_dict(wrapped)["trained"], state["trained"])
    base = Classifier()
    fresh = wrap(base)
    assert load_adapter(fresh, state) is fresh
    inner, = [m for m in fresh.modules() if isinstance(m, Classifier)]
    assert same(adapter_state_dict(inner)["trained"], state["trained"])
    with disabled(fresh):
        assert_close(inner(torch.ones(8)), Classifier()(torch.ones(8)))
    assert merge(fresh) is fresh
    assert_close(inner.module.weight, model.module.weight)
    assert adapt(fresh, r=2) is fresh
    assert isinstance(inner.module, SORALinear)


@ALL
def test_a_disabled_adapter_leaves_the_base_and_what_is_trained_beside(method):
    model, base = trained(adapt(Classifier(), method, r=2, train="classifier")), Classifier()
    base.classifier.load_state_dict(model.classifier.state_dict())
    for n in (3, 600):  # by outputs, by weight
        x = randn(n, 8, dtype=torch.float32)
        y = model(x)
        with disabled(model) as same_model:
            with pytest.raises(KeyError), disabled(model):
                raise KeyError
            assert same_model is model
            assert_close(model(x), base(x))
            assert torch.equal(model.module.weight, base.module.weight)
        assert not y.allclose(base(x))
        assert torch.equal(model(x), y)


@ALL
def test_dropout_is_for_the_low_rank_path_in_training_alone(method):
    model = trained(adapt(nn.Sequential(linear()), method, r=2, dropout=0.5))
    layer, x = model[0], randn(600, 7)
    assert_close(model.eval()(x), merge(copy.deepcopy(model))(x))
    model.train()
    torch.manual_seed(0)
    y, again = model(x), model(x)
    assert not y.allclose(again)
    torch.manual_seed(0)
    dropped = F.linear(x, layer.W0), F.linear(F.dropout(x, 0.5), layer.A)
    assert_close(y, layer.conditioned(*dropped) + layer.bias)


def test_the_output_head_is_left_alone_unless_asked_for():
    model = Classifier()
    model.get_output_embeddings = lambda: model.classifier
    adapt(nn.ModuleDict({"inner": model}), r=2)
    assert type(model.classifier) is nn.Linear
    assert type(adapt(unmerge(model), r=2, targets="classifier").classifier) is SORALinear


ASKED = {  # what peft has no word for
    "module.d": lambda: adapt(Classifier(), "prediag", r=2), "module.[dCE]": lambda: adapt(Classifier(), r=2),
    "classifier.weight": lambda: adapt(Classifier(), "lora", r=2, train="classifier"),
    "scale.A": lambda: adapt(Classifier(), "lora", r=2, train="scale"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_peft_does_not_know_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"not {name}: merge\(model\) and save"):
        save_as_peft(ASKED[name](), tmp_path / "folder")
    assert not [*tmp_path.iterdir()]


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1)
    return filled(transformers.LlamaForCausalLM(config).eval(), 0.3)


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0,
                                     embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None, **options)
    return filled(transformers.GPT2LMHeadModel(config).eval(), 0.3)


@ALL
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_transformers(make, method, tmp_path):
    base, x = make(), tokens(3, 8)
    y = base(x).logits
    model = adapt(copy.deepcopy(base), method, r=2)
    assert not any(type(m).__name__ == "Conv1D" for m in model.modules())
    assert type(model.lm_head) is nn.Linear  # that of GPT-2 is tied, that of Llama is not
    assert_close(model(x).logits, y)

    trained(model, 0.1)
    some = model.get_input_embeddings().weight.requires_grad_()
    plain = results(lambda _: model(x, use_cache=False).logits, some, ours(model), y)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_near(results(lambda _: model(x, use_cache=False).logits, some, ours(model), y), plain, 1e-4)
    model.eval()
    merge(model).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert_close(type(base).from_pretrained(tmp_path)(x).logits, plain["y"], rtol=1e-4, atol=1e-4)


SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
         "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
ARCHITECTURES = {  # what they are to show: the class, its settings, and what the warning says of it, if it warns
    "weights that are read (WavLM)": ("WavLMModel", {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3),
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0}, None),
    "weights that are read (Mamba)": ("MambaForCausalLM", {"time_step_rank": 4, "state_size": 4}, None),
    "experts (Mixtral)": ("MixtralForCausalLM", {"num_key_value_heads": 1, "num_local_experts": 3},
                          "'model.layers.0.mlp.experts': 'it is MixtralExperts, no nn.Linear'}"),
    "a router (Llama 4)": ("Llama4ForCausalLM", {"num_key_value_heads": 1, "head_dim": 4, "num_local_experts": 3,
        "intermediate_size_mlp": 12}, "'model.layers.0.feed_forward.router': 'it has a forward of its own'"),
    "a narrow layer (ESM)": ("EsmForMaskedLM", {"mask_token_id": 2}, r"regression': 'r=2 is outside 1.+1'}"),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*(scan|mamba|kernel)")
def test_every_layer_of_an_architecture_learns_or_is_named(case, recwarn):
    transformers = pytest.importorskip("transformers")
    name, settings, text = ARCHITECTURES[case]
    model = getattr(transformers, name)
    torch.manual_seed(0)
    model = model(model.config_class(**SMALL | settings)).eval()
    recwarn.clear()
    adapt(model, r=2)
    told = [str(warning.message) for warning in recwarn if "cannot be adapted" in str(warning.message)]
    assert len(told) == (text is not None)
    assert not text or re.search(text, told[0])

    x = tokens(2, 8) if model.main_input_name == "input_ids" else randn(2, 200, dtype=torch.float32)
    model(x)[0].square().sum().backward()
    assert all(layer.B.grad.any() for layer in adapted_layers(model).values())
    y = trained(model, 0.1)(x)[0]
    assert_close(merge(model)(x)[0], y, rtol=1e-4, atol=1e-4)


def test_a_model_of_odd_layers_alone_is_refused():
    transformers = pytest.importorskip("transformers")
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL))
    with pytest.raises(ValueError, match="dense_h_to_4h': 'it has a forward of its own'"):
        adapt(falcon, r=2)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.filterwarnings("error:.*(key|fan_in)")
def test_peft_reads_what_is_saved_for_it(make, method, tmp_path):
    peft = pytest.importorskip("peft")
    base, x = make(), tokens(3, 8)
    model = trained(adapt(copy.deepcopy(base), method, r=2, alpha=5, dropout=0.5), 0.1)
    save_as_peft(model, tmp_path / "new" / "folder")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "new" / "folder")
    assert_close(theirs(x).logits, model(x).logits)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 5, 0.5)


def test_a_name_may_begin_with_W0_and_an_older_file_is_not_read_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, x = nn.Sequential(linear()), randn(7)
    base.W0_ = linear(5)
    model = trained(adapt(copy.deepcopy(base), "lora", r=2))
    assert_close(load_adapter(copy.deepcopy(base), adapter_state_dict(model))(x), model(x))
    (tmp_path / "adapter_model.safetensors").touch()
    save_as_peft(model, tmp_path)
    assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_adapted_model_that_is_saved_whole_lacks_its_weights_and_says_so(make, tmp_path):
    model = adapt(make(), r=2)
    model.save_pretrained(tmp_path)
    _, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {f"{name}.weight" for name in adapted_layers(model)} <= {*told["missing_keys"]}


@ALL
@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_gets_every_gradient(method, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    model, x = trained(adapt(tiny_gpt(), method, r=2)), tokens(4, 8)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second would miss what had no gradient in the first
        parallel(x, x).backward()
    assert same(adapter_state_dict(parallel)["trained"], adapter_state_dict(model)["trained"])
    del parallel  # or, as the last to hold the group, it may wait for ever for a thread that waits for Python
    torch.distributed.destroy_process_group()
    assert all(p.grad.any() for p in ours(model).values())


# ---- Autograd, compile, dtypes


def squared_slope(call, x, parameters):
    """A number made of first derivatives, whose derivatives are second ones"""
    slopes = torch.autograd.grad(call(x).sin().sum(), [x, *parameters.values()], create_graph=True)
    return sum(slope.square().sum() for slope in slopes)


@ALL
@WAYS
def test_derivatives_of_every_kind(method, way):
    layer = trained(layer_of(method, linear()))
    call, x, dy = getattr(layer, way), randn(4, 7).requires_grad_(), randn(4, 5, seed=3)
    p = {name: q.detach().clone().requires_grad_() for name, q in ours(layer).items()}

    def book(x):
        return F.linear(x, dense_of(layer, layer.W0, p), layer.bias)

    wanted = results(lambda x: (2 * book(x)).relu(), x, p, dy)
    assert_near(results(lambda x: call(x).mul_(2).relu_(), x, ours(layer), dy), wanted)
    for use_reentrant in (True, False):
        again = partial(checkpoint, lambda x: (2 * call(x)).relu(), use_reentrant=use_reentrant)
        assert_near(results(again, x, ours(layer), dy), wanted)
    second = results(lambda x: squared_slope(call, x, ours(layer)), x, ours(layer), None)
    assert_near(second, results(lambda x: squared_slope(book, x, p), x, p, None))

    layer.forward, y = call, call(x)
    assert_close(torch.func.jvp(layer, (x,), (x,))[1], y - layer.bias)

    def loss(p, x):
        return torch.func.functional_call(layer, p, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x)
    whole = results(layer, x, ours(layer), 2 * y)
    assert_near({name: gradient.sum(0) for name, gradient in each.items()}, {name: whole[name] for name in p})
    with ThreadPoolExecutor(4) as pool:
        every = pool.map(lambda row: torch.autograd.grad(loss(ours(layer), row), layer.B)[0], x.detach())
    assert_close(sum(every), whole["B"])


@ALL
def test_copies_do_the_same(method):
    model, x = trained(adapt(tiny_gpt(), method, r=2), 0.1), tokens(3, 8)
    loaded = adapt(tiny_gpt(seed=1), method, r=2)
    loaded.load_state_dict(model.state_dict())
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, average):
        assert torch.equal(each(x), model(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tiny_gpt().state_dict())


INPUTS = {
    "one axis": randn(7), "no token": randn(2, 0, 7), "expanded": randn(7).expand(6, 7), "transposed": randn(7, 6).T,
    "two axes": randn(3, 2, 7).transpose(0, 1),
}


@ALL
@WAYS
@pytest.mark.parametrize("form", INPUTS)
def test_inputs_of_every_form(method, way, form):
    layer, x = trained(layer_of(method, linear())), INPUTS[form].requires_grad_()
    outputs = F.linear(x, layer.merged_weight(), layer.bias), getattr(layer, way)(x)
    assert_close(*outputs)
    assert_close(*[torch.autograd.grad(y.square().sum(), x) for y in outputs])


@pytest.mark.parametrize("device, widest", [("cpu", 512), ("meta", 2048)])  # what is no CPU counts as a GPU
def test_forward_goes_by_weight_where_many_tokens_meet_a_narrow_layer(device, widest, monkeypatch):
    monkeypatch.setattr(LoRALinear, "by_weight", lambda self, x: "by weight")
    monkeypatch.setattr(LoRALinear, "by_outputs", lambda self, x: "by outputs")
    for n_in, shape, way in [(widest, (2, 256), "by weight"), (widest, (511,), "by outputs"),
                             (widest + 1, (512,), "by outputs")]:
        layer = LoRALinear(nn.Linear(n_in, 2, device=device), 1)
        assert layer(torch.empty(*shape, n_in, device=device)) == way


@ALL
@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_have_the_dtype_of_nn_linear_and_its_digits(method, way, dtype, autocast):
    base = linear(64, 48, dtype=dtype)
    layer, x = trained(layer_of(method, base), 0.1), randn(100, 64, dtype=dtype)
    exact = copy.deepcopy(layer).double().by_weight(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = getattr(layer, way)(x), base(x)
        with torch.inference_mode():
            assert torch.equal(getattr(layer, way)(x), y)
    assert y.dtype == expected.dtype
    assert (y - exact).norm() < 2 * torch.finfo(y.dtype).eps * exact.norm()
    y.sum().backward()
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.grad.dtype for p in ours(layer).values()} == {adapter}
    narrow = getattr(layer.bfloat16(), way)(x.bfloat16())  # not advised, but it has to run
    assert (narrow - exact).norm() < 0.05 * exact.norm()


@ALL
def test_weights_and_rotations_are_the_same_under_autocast(method):
    layer = trained(layer_of(method, linear(64, 48, dtype=torch.float32)))
    C, E = randn(2, 48, 2, dtype=torch.float32)
    pairs = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pairs.append([layer.weight, layer.delta(), layer.merged_weight(), *rotation(C, E)])
    assert all(torch.equal(a, b) for a, b in zip(*pairs))


@ALL
@WAYS
@pytest.mark.parametrize("size, least", [(0.03, 0.98), (0.003, 0.92)])
def test_a_small_update_arrives_on_a_bfloat16_base(method, way, size, least):
    base, x = linear(256, 192, dtype=torch.bfloat16), randn(500, 256, dtype=torch.bfloat16)
    layer = layer_of(method, base)
    p = layer.get_parameter({"lora": "B", "dora": "m", "prediag": "d", "sora": "E"}[method])
    step = 1e-3 * randn(*p.shape)
    p.data += step
    p.data += step * (size * base.weight.norm() / layer.delta().norm() - 1)
    update = F.linear(x.double(), copy.deepcopy(layer).double().delta())
    arrived = (getattr(layer, way)(x) - base(x).double()) * update
    assert least < arrived.sum() / update.square().sum() < 1.03


@ALL
def test_shapes_are_had_on_the_meta_device(method):
    layer = layer_of(method, nn.Linear(7, 5, device="meta"))
    x = torch.empty(3, 7, device="meta")
    assert layer.by_weight(x).shape == layer.by_outputs(x).shape == (3, 5)
    assert layer.delta().is_meta


@ALL
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break_and_twice_at_most(method):
    torch.compiler.reset()
    model = trained(adapt(nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 6)), method, r=2)).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (4, 512):
        x, dy = randn(n, 6, dtype=torch.float32).requires_grad_(), randn(n, 6, seed=3, dtype=torch.float32)
        assert_near(results(compiled, x, ours(model), dy), results(model, x, ours(model), dy), 1e-5)
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for n in (7, 5, 200, 300):
        compiled(torch.randn(n, 2, 6)).sum().backward()
    assert graphs["unique_graphs"] == 2  # by outputs, and from 512 tokens on by weight


def kept_for_backward(layer, call, x):
    """Bytes that the backward pass will need beyond x and the parameters"""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters()]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)  # alive, so that no memory is counted twice
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in owned)


@ALL
def test_by_weight_keeps_for_the_backward_pass_what_grows_with_no_number_of_tokens(method):
    layer = trained(layer_of(method, linear(100, 100, dtype=torch.float32)))
    W0 = layer.W0.nbytes
    matrices = {"lora": 1, "dora": 2, "prediag": 1, "sora": 2}[method]  # W', and before a diagonal or R after it
    for n in (600, 2000):
        x = randn(n, 100, dtype=torch.float32).requires_grad_()
        kept = kept_for_backward(layer, layer.by_weight, x)
        assert matrices * W0 <= kept < (matrices + 0.2) * W0


class Operations(TorchDispatchMode):
    """Notes what a GPU would get as a kernel: not views, not allocations."""

    FREE = """view _unsafe_view t transpose permute expand detach alias slice select unsqueeze squeeze split unbind
    split_with_sizes as_strided reshape empty empty_like new_empty empty_strided new_empty_strided
    promote_types""".split()

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method, most", [
    ("lora", (13, 24)), ("prediag", (16, 32)), ("dora", (22, 37)), ("sora", (66, 88))])
def test_a_step_under_autocast_issues_few_operations_and_waits_for_none(method, most):
    layer = METHODS[method](linear(64, 96, dtype=torch.float32), 16)
    for call, count in zip((layer.by_weight, layer.by_outputs), most):
        x = torch.randn(1024, 64, requires_grad=True)
        with Operations() as forward, torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        with Operations() as backward:
            y.backward(y.detach())
        names = forward.names + backward.names
        assert not {"_local_scalar_dense", "nonzero", "equal", "_linalg_check_errors", "masked_select"} & {*names}
        assert not [name for name in backward.names if "inv" in name or "solve" in name]
        assert count / 2 < len(names) <= count + 3  # other versions of torch


# ---- The GPT


def test_the_gpt_is_causal_and_has_its_limits():
    model, x = tiny_gpt(), tokens(2, 8)
    changed = x.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    moved = (model(x) != model(changed)).any(2).any(0)
    assert moved.tolist() == 5 * [False] + 3 * [True]
    with pytest.raises(ValueError, match="n_embd=8 is not a multiple of n_head=3"):
        tiny_gpt(n_head=3)


def test_initial_values_of_the_gpt():
    model = tiny_gpt(n_embd=256, n_layer=8)
    assert model.lm_head.weight is model.transformer.wte.weight
    block = model.transformer.h[1].mlp
    assert block.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.c_proj.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert not block.c_fc.bias.any()


@pytest.mark.parametrize("name, gelu", [("gelu_new", "tanh"), ("gelu", "none")])
def test_the_gpt_equals_that_of_transformers(name, gelu):
    theirs, mine, x = gpt2(activation_function=name), tiny_gpt(gelu=gelu), tokens(3, 8)
    for key, p in theirs.state_dict().items():
        mine.get_parameter(key).data.copy_(p.T if "c_" in key and p.ndim == 2 else p)  # a Conv1D's is (in, out)
    logits = theirs(x).logits
    assert_close(mine(x), logits, rtol=0, atol=1e-4)
    assert_close(mine(x, x), F.cross_entropy(logits.view(24, 11), x.view(24)), rtol=0, atol=1e-4)


@ALL
def test_the_upper_part_stands_alone(method, monkeypatch):
    source = Path(sora.__file__).read_text(encoding="utf-8")
    source = re.split("^# ======== All above stands alone", source, flags=re.MULTILINE)[0]
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)  # nor does it need transformers
    upper = types.ModuleType("upper")
    exec(source, vars(upper))
    below = vars(sora).keys() - vars(upper).keys()
    assert {"GPT", "GPTConfig", "Block"} <= below
    assert not below & {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}

    base, x = nn.Sequential(linear(6, 7), linear(7, 5)), randn(4, 6)
    model = trained(upper.adapt(copy.deepcopy(base), method, r=2))
    y = model(x)
    again = upper.load_adapter(copy.deepcopy(base), upper.adapter_state_dict(model))
    assert_close(upper.merge(model)(x), y)
    assert torch.equal(again(x), y)
    assert torch.equal(upper.unmerge(again)(x), base(x))


# ---- The script: train_gpt.py, the files it reads, the data. What stands above may be copied with sora.py alone

import train_gpt
from train_gpt import load_gpt

HERE = Path(__file__).resolve().parent
SCRIPT = Path(train_gpt.__file__).resolve()
DATA = SCRIPT.parent / "data"
TINY = "--init base.pt --data text.txt --device cpu --block-size 8 --batch-size 4 --steps 4 --r 2"
ROWS = ["full", "frozen", "lora", "lora:r=3", "dora", "prediag", "sora"]
VOCABULARY = cache(train_gpt.load_vocabulary)
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
EVERY = f"--methods {','.join(ROWS)} --seeds 2"


def small_gpt(**shape):
    """The smallest that can read a text: the first 256 tokens are the bytes"""
    return tiny_gpt(**{"vocab_size": 300, "block_size": 16, "n_embd": 16} | shape)


def save_gpt(model, path):
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, path)


def ask(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", f"train_gpt.py {TINY} {flags}".split())


def asked(monkeypatch, flags=""):
    """The arguments and the base that these flags mean"""
    ask(monkeypatch, flags)
    args = train_gpt.arguments()
    return args, train_gpt.load_base(args)


def rows_of(path="rows"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def each(key, rows):
    return [row[key] for row in rows]


def table_of(printed):
    """{name: cells} of the last table printed"""
    table = printed[printed.rindex("\nmethod  "):].strip().split("\n\n")[0]
    lines = [re.split("  +", line) for line in table.splitlines()]
    return {name: cells for name, *cells in lines}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the program, in a folder with a tiny base and a short text, and returns its rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "WINDOWS", 8)
    monkeypatch.setattr(train_gpt, "load_vocabulary", VOCABULARY)
    save_gpt(trained(small_gpt(), 0.1), "base.pt")
    Path("text.txt").write_text((DATA / "shakespeare.txt").read_text(encoding="utf-8")[:9999])

    def main(flags):
        Path("rows").unlink(missing_ok=True)
        ask(monkeypatch, f"--json rows {flags}")
        train_gpt.main()
        return rows_of()

    return main


@pytest.fixture
def program(script, monkeypatch):
    """Runs the file as a program, within this process, and returns its exit code."""
    monkeypatch.setattr(os, "_exit", sys.exit)

    def main(flags, path=SCRIPT):
        ask(monkeypatch, flags)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    return main


# ---- From end to end


def test_all_methods_train_save_and_are_judged(script, capsys):
    rows = script(f"{EVERY} --steps 12 --save out")
    table = table_of(capsys.readouterr().out)
    assert list(table) == ["method", "(base)", *ROWS]
    assert each("name", rows) == 2 * ROWS
    assert each("seed", rows) == 7 * [0] + 7 * [1]
    assert each("trained", rows) == 2 * [11648, 256, 1024, 1536, 1024 + 288, 1024 + 288, 1024 + 9 * 288]
    assert each("merged", rows) == pytest.approx(each("loss", rows), abs=1e-5)
    assert max(each("loss", rows)) < float(table["(base)"][1]) - 0.001
    assert len(os.listdir("out")) == 14


def test_what_is_saved_gives_the_same_loss_when_it_is_loaded(script, monkeypatch):
    rows = script("--methods full,sora --save out")
    args, base = asked(monkeypatch)
    full, adapter = load_gpt("out/full-0.pt"), torch.load("out/sora-0.pt", weights_only=True)
    windows = train_gpt.load_data(args, 300)[2]
    losses = [train_gpt.evaluate(model, windows, args) for model in (full, load_adapter(base, adapter))]
    assert losses == pytest.approx(each("loss", rows), abs=1e-6)


def test_the_same_command_gives_the_same_numbers(script):
    flags = "--methods full,lora,sora --seeds 2"
    first = script(flags)
    torch.rand(3)  # what was drawn before does not matter
    again = script(flags)
    assert each("merged", first) == each("merged", again)
    assert len({*each("merged", first)}) == 6


def test_all_rows_of_a_seed_see_the_same_batches_and_start_alike(script, monkeypatch):
    seen, update = defaultdict(set), train_gpt.Run.update

    def note(run, batch, rate):
        loss = update(run, batch, rate)
        seen[run.seed, len(run.losses)].add(str(batch))
        return loss

    monkeypatch.setattr(train_gpt.Run, "update", note)
    rows = script(EVERY)
    assert list(map(len, seen.values())) == [1] * 8  # one batch of each step of each seed
    assert len(set.union(*seen.values())) == 8
    first = [row["train"][0] for row in rows]
    assert first == pytest.approx(7 * first[:1] + 7 * first[7:8], abs=1e-5)


def test_the_spectrum_is_that_of_the_update(script, monkeypatch):
    args, base = asked(monkeypatch, "--methods lora --targets h.0.mlp.c_fc --r 5")
    model = trained(train_gpt.prepare(base, args.rows[0], args))
    layer = model.transformer.h[0].mlp.c_fc
    found, sigma = train_gpt.spectrum(base, model), torch.linalg.svdvals(layer.s * layer.B @ layer.A).detach()
    assert found["entropy1"] == pytest.approx(svd_entropy(sigma, 1), rel=1e-4)
    assert found["change"] == pytest.approx(float(sigma.norm() / layer.W0.norm()), rel=1e-4)


def invented(name, losses, ms, **more):
    return [{"name": name, "seed": seed, "loss": loss, "ms": ms, "note": ""} | more for seed, loss in enumerate(losses)]


def test_the_table_is_computed_seed_by_seed(capsys):
    lora, sora, dora = [2.0, 4.0, 6.0], [1.0, 3.0, 5.1], [2.0, 3.0, 6.1]
    falling = [-i / 16 for i in range(train_gpt.POINTS)]
    rows = invented("full", [1, math.nan, 1], 30, note="lost") + invented("lora", lora, 20, trained=1234)
    rows += invented("sora", sora, 60, spectrum=falling) + invented("dora", dora, 10)
    train_gpt.print_table(rows, 7.0)  # sora less lora is -1, -1, -0.9, and dora less lora 0, -1, 0.1
    assert table_of(capsys.readouterr().out) == {
        "method": ["trained", "val loss", "less lora", "ms/step", "× full", "spectrum"],
        "(base)": ["-", "7.000", "-", "-", "-"],
        "full": ["-", "-", "-", "30", "1.00", "lost"],
        "lora": ["1,234", "4.000 ± 1.155", "+0.000 ± 0.000", "20", "0.67"],
        "sora": ["-", "3.033 ± 1.184", "-0.967 ± 0.033", "60", "2.00", "██▇▆▆▅▅▄"],
        "dora": ["-", "3.700 ± 1.234", "-0.300 ± 0.351 ≈", "10", "0.33"],
    }
    train_gpt.print_table(rows + invented("frozen", lora, 15), 7.0)
    assert table_of(capsys.readouterr().out)["sora"][4] == "4.00"


@pytest.mark.parametrize("name", ROWS)
def test_what_is_frozen_is_shared_with_the_base_and_left_alone(name, script, monkeypatch):
    args, base = asked(monkeypatch, f"--methods {name}")
    theirs, before = {p.data_ptr() for p in base.parameters()}, copy.deepcopy(base.state_dict())
    run = train_gpt.Run(base, args.rows[0], 0, args)
    mine, start = ours(run.model), copy.deepcopy(ours(run.model))
    for key, p in run.model.named_parameters():
        assert (p.data_ptr() in theirs) == (key not in mine) <= (name != "full")

    for _ in range(2):  # A has no gradient in the first step
        run.update(tokens(4, 9), 1e-2)
    assert same(base.state_dict(), before)
    assert not any(torch.equal(p, start[key]) for key, p in mine.items())


# ---- What goes wrong in a row


def at(monkeypatch, act, name, step, seed=0):
    """act(run) before this step of this row; what it returns, if anything, is taken for the loss"""
    update = train_gpt.Run.update

    def disturbed(run, batch, rate):
        changed = None
        if (run.name, run.seed, len(run.losses) + 1) == (name, seed, step):
            changed = act(run)
        loss = update(run, batch, rate)
        return changed or loss

    monkeypatch.setattr(train_gpt.Run, "update", disturbed)


def throw(error, *_):
    raise error


def spoil_gradient(run):
    run.trained[0].register_hook(lambda gradient: gradient * math.nan)


SPENT = "out of memory at step 3: lower --batch-size or --block-size"
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")
LOSSES = {  # what happens, at which step, and what is said
    "nan": (lambda run: math.nan, 3, "diverged at step 3: lower its lr=0.01"),
    "nan when judged": (spoil_gradient, 4, "diverged at step 4: lower its lr=0.01"),
    "CUDA's memory": (partial(throw, CUDA), 3, SPENT), "the CPU's": (partial(throw, CPU), 3, SPENT),
    "Python's": (partial(throw, MemoryError()), 3, SPENT),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_row_that_fails_stops_alone_and_says_at_which_step(case, script, monkeypatch, capsys):
    act, step, note = LOSSES[case]
    flags = "--methods frozen,lora,full"
    undisturbed = script(flags)
    at(monkeypatch, act, "lora", step)
    rows = script(flags)
    cells = table_of(capsys.readouterr().out)["lora"]
    assert [cells[1], cells[-1]] == ["-", note]
    assert len(rows[1]["train"]) == step - (note == SPENT)
    assert rows[1]["loss"] is None
    assert each("loss", rows[::2]) == each("loss", undisturbed[::2])


DEFECTS = [RuntimeError("a defect"), RuntimeError("CUDA error: an illegal memory access was encountered")]


@pytest.mark.parametrize("error", DEFECTS, ids=str)
def test_any_other_error_is_raised_after_the_table_of_finished_seeds(error, script, monkeypatch, capsys):
    at(monkeypatch, partial(throw, error), "lora", 2, seed=1)
    with pytest.raises(type(error)) as raised:
        script("--methods frozen,lora --seeds 3")
    assert raised.value is error
    assert "lora" in table_of(capsys.readouterr().out)


def test_ctrl_c_judges_each_row_where_it_stands(script, monkeypatch, capsys):
    at(monkeypatch, partial(throw, KeyboardInterrupt()), "lora", 3, seed=1)
    rows = script("--methods frozen,lora,full --seeds 3")
    assert each("note", rows) == ["", "", "", "stopped at step 3", "stopped at step 2", "stopped at step 2"]
    assert each("merged", rows) == pytest.approx(each("loss", rows), abs=1e-5)
    assert table_of(capsys.readouterr().out)["lora"][-1] == "stopped at step 2"


def test_a_second_ctrl_c_ends_all_after_the_table_of_finished_seeds(script, monkeypatch, capsys):
    def twice(run):
        monkeypatch.setattr(train_gpt, "spectrum", partial(throw, KeyboardInterrupt()))
        raise KeyboardInterrupt

    at(monkeypatch, twice, "lora", 3, seed=1)
    with pytest.raises(KeyboardInterrupt):
        script("--methods frozen,lora --seeds 3")
    assert each("seed", rows_of()) == [0, 0]
    assert "lora" in table_of(capsys.readouterr().out)


def test_ctrl_c_outside_the_training_has_exit_code_130(program, monkeypatch, capsys):
    monkeypatch.setattr(torch, "from_numpy", partial(throw, KeyboardInterrupt()))
    assert program("--methods lora") == 130
    assert not capsys.readouterr().err


# ---- What is asked for


def test_rows_have_settings_of_their_own(script, monkeypatch):
    rows = "lora,lora:r=3:lr=5e-4,sora:exact=0:r_p=1:alpha=8:dropout=0.2,full:lr=1"
    args, base = asked(monkeypatch, f"--methods {rows} --lr 3e-3 --targets c_attn")
    assert each("lr", args.rows) == [3e-3, 5e-4, 3e-3, 1]
    for row, r in zip(args.rows, (2, 3, 2)):
        layers = adapted_layers(train_gpt.prepare(base, row, args))
        assert [*layers] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
        options = layers["transformer.h.0.attn.c_attn"].options
        assert options["r"] == r
    assert options == {"method": "sora", "r": 2, "alpha": 8, "dropout": 0.2, "r_p": 1, "exact": False}


WIDE = {"n_layer": 1, "n_head": 12, "n_embd": 768, "block_size": 2048}
DEFAULTS = {  # the shape of the base, flags: steps, batch, block, rates of full, frozen and sora
    "small": ({}, "", (80, 16, 16, 2.8e-3, 2e-3, 1e-2)),
    "as wide as GPT-2": (WIDE, "", (200, 16, 1024, 3e-5, 2e-4, 2e-4)),
    "asked": (WIDE, "--steps 7 --batch-size 3 --block-size 9 --lr 1", (7, 3, 9, 1, 1, 1)),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_defaults_go_with_the_size_of_the_model(case, monkeypatch):
    shape, flags, wanted = DEFAULTS[case]
    monkeypatch.setattr(sys, "argv", f"train_gpt.py --methods full,frozen,sora {flags}".split())
    monkeypatch.setattr(train_gpt, "load_gpt", lambda name: small_gpt(**shape))
    args = train_gpt.arguments()
    train_gpt.load_base(args)
    assert (args.steps, args.batch_size, args.block_size, *each("lr", args.rows)) == wanted



MISTAKES = r"""
--stesp 3                        unrecognized arguments: --stesp 3
--step 3                         unrecognized arguments: --step 3
--methods lora,sorra             argument --methods: unknown method 'sorra': choose from full,frozen,lora,dora,prediag
--methods lora,                  argument --methods: unknown method '': choose
--methods lora:r_p=2             argument --methods: 'r_p=2' is no setting of lora: choose from \['r', 'alpha', 'dr
--methods full:r=2               argument --methods: 'r=2' is no setting of full: choose from \['lr'\]
--methods sora:exact=2           argument --methods: .*'sora:exact=2'
--methods lora:r                 argument --methods: '' is no int above 0
--r 0                            argument --r: '0' is no int above 0
--steps many                     argument --steps: 'many' is no int above 0
--seeds 1.5                      argument --seeds: '1.5' is no int above 0
--lr nan                         argument --lr: 'nan' is no float above 0
--lr inf                         argument --lr: 'inf' is no float above 0 and below 1e9
--alpha -1                       argument --alpha: '-1' is no float above 0
--dtype float16                  argument --dtype: invalid choice: 'float16'
--device tpu                     --device tpu: .*one of cpu, cuda
--data nowhere.txt               --data nowhere.txt: .*No such file or directory
--data short.txt                 --data short.txt: too short: it has \d+ tokens, --block-size 8 needs 90
--data binary.txt                --data binary.txt: 'utf-8' codec can't decode
--init nowhere.pt                --init nowhere.pt: .*No such file or directory
--init short.txt                 --init short.txt: short.txt is no checkpoint of GPT-2, nanoGPT or this GPT
--init .                         --init .: .*Is a directory
--init 1x3x16                    --init 1x3x16: n_embd=16 is not a multiple of n_head=3
--init 1x0x16                    --init 1x0x16: .
--init letters.pt                --init letters.pt: .
--block-size 17                  --init base.pt: its context is 16 tokens: ask for a smaller --block-size
--json .                         .*--json .: .*Is a directory
--save short.txt/x               .*--save short.txt/x.*: .*Not a directory
--methods lora --r 17            --methods lora: .*r=17 is outside 1\.\.16
--methods lora --targets no      --methods lora: 'no' matches none of the layers inside, in whole dotted parts: 
"""  # flags, and the message they bring, as a regular expression


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines(), ids=lambda line: line.split("  ")[0])
def test_a_mistake_is_answered_in_one_line(mistake, script, capsys):
    flags, message = re.split("  +", mistake)
    Path("short.txt").write_text("Too short.")
    Path("binary.txt").write_bytes(b"\xff")
    save_gpt(small_gpt(vocab_size=65), "letters.pt")  # as nanoGPT's model of characters
    with pytest.raises(SystemExit) as stop:
        script(flags)
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert re.fullmatch(f"train_gpt.py: {message}.*\n", error), error
    assert not out


@pytest.mark.filterwarnings("ignore")
def test_compiled_rows_have_the_losses_of_plain_ones(script, monkeypatch):
    flags = "--methods full,frozen,lora,dora,prediag,sora,sora:exact=0 --steps 2 --init 1x2x16"
    plain = script(flags)
    compile, marks, graphs = torch.compile, [], torch._dynamo.utils.counters["stats"]

    def eager(model, fullgraph, mode):
        assert fullgraph
        return compile(model, fullgraph=True, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    graphs.clear()
    rows = script(f"{flags} --compile")
    assert [graphs["unique_graphs"], len(marks)] == [7, 2 * 7]
    assert_close(torch.tensor(each("train", rows)), torch.tensor(each("train", plain)))



# ---- Where it is run


class Screen(io.StringIO):
    def isatty(self):
        return True


STDOUTS = {"a notebook": SimpleNamespace(write=io.StringIO().write, flush=dict), "none": None,
           "ASCII": io.TextIOWrapper(io.BytesIO(), "ascii"), "a terminal": Screen()}


@pytest.mark.parametrize("case", STDOUTS)
def test_it_prints_to_whatever_there_is(case, program, monkeypatch):
    monkeypatch.setattr(sys, "stdout", STDOUTS[case])
    assert program("--methods lora --json rows") == 0
    assert each("name", rows_of()) == ["lora"]
    if case == "a terminal":
        assert "\r\x1b[Kseed 0  step 3 of 4" in STDOUTS[case].getvalue()


@FORKS
def test_a_reader_that_has_enough_ends_it_in_silence(script, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    ask(monkeypatch, "")
    if not os.fork():
        sys.stdout = os.fdopen(writer, "w")
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            os._exit(9)  # not reached, or Python would flush once more at its end, and complain
    assert os.wait()[1] == 0
    assert not capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_told_in_a_sentence(program, monkeypatch, capsys):
    with open("/dev/full", "wb", 0) as disk:
        monkeypatch.setattr(sys, "stdout", codecs.getwriter("utf-8")(disk))
        assert program("--methods lora") == 2
    sentence = "train_gpt.py: the output cannot be written: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == sentence


def test_it_finds_its_data_through_a_symbolic_link(program, capsys):
    os.mkdir("elsewhere")
    os.symlink(SCRIPT, "elsewhere/tune.py")
    assert program("--methods lora", "elsewhere/tune.py") == 0
    assert "lora" in table_of(capsys.readouterr().out)


def test_data_may_lie_on_another_drive(script, monkeypatch):
    another = ValueError("path is on mount 'D:', start on mount 'C:'")  # as on Windows
    monkeypatch.setattr(os.path, "relpath", partial(throw, another))
    assert script(f"--methods lora --data {Path('text.txt').resolve()} --save out")


def saving(number):
    """What `save` asks of a run, with this number for its weights"""
    model = small_gpt(n_embd=64)
    nn.init.constant_(model.transformer.wte.weight, number)
    args = SimpleNamespace(save=".")
    return SimpleNamespace(name="full", seed=0, row={"method": "full"}, args=args, model=model)


@FORKS
def test_those_who_save_at_once_leave_one_whole_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [saving(number) for number in range(4)]
    train_gpt.save(runs[0])
    for run in runs:
        if not os.fork():
            for _ in range(20):
                train_gpt.save(run)
            os._exit(0)
    for _ in range(40):
        weight = load_gpt("full-0.pt").transformer.wte.weight
        assert (weight == weight[0, 0]).all()
    assert [os.wait()[1] for _ in runs] == [0] * 4
    assert os.listdir() == ["full-0.pt"]


def test_a_save_that_fails_halfway_leaves_the_old_file(script, monkeypatch, capsys):
    script("--methods lora --save .")

    def half(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit):
        script("--methods lora --save .")
    assert capsys.readouterr().err == "train_gpt.py: --save .: [Errno 28] No space left on device\n"
    assert torch.load("lora-0.pt")


# ---- Files of other people


def one_head():
    """Without a config.json heads are 64 wide."""
    return tiny_gpt(n_embd=64, n_head=1)


def as_gpt2(model):
    """The state as GPT-2's file has it"""
    state = model.transformer.state_dict()
    for name in state:
        if name.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[name] = state[name].T.contiguous()
    return state


def write_safetensors(path, state):
    pytest.importorskip("safetensors.torch").save_file(state, path)


@pytest.mark.parametrize("act, gelu", [("gelu_new", "tanh"), ("gelu", "none")])
@pytest.mark.parametrize("prefix", ["", "transformer.", None])
def test_equals_gpt2_of_transformers(act, gelu, prefix, tmp_path):
    theirs, x = gpt2(activation_function=act), tokens(3, 8)
    theirs.save_pretrained(tmp_path)
    if prefix is not None:  # as older versions wrote it, with masks
        state = theirs.transformer.state_dict()
        state |= {"h.1.attn.bias": torch.ones(3, dtype=torch.bool), "h.1.attn.masked_bias": torch.zeros(1)}
        write_safetensors(tmp_path / "model.safetensors", {prefix + name: p for name, p in state.items()})
    model = load_gpt(tmp_path / "model.safetensors")
    assert_close(model(x), theirs(x).logits, rtol=0, atol=1e-4)
    assert model.config == GPTConfig(8, 11, 2, 2, 8, gelu)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_files_are_read_as_float32(dtype, tmp_path):
    model = one_head().to(dtype)
    write_safetensors(tmp_path / "a.safetensors", as_gpt2(model))
    again = load_gpt(tmp_path / "a.safetensors")
    assert again.lm_head.weight.dtype == torch.float32
    assert same(again.state_dict(), model.float().state_dict())


@pytest.mark.parametrize("bias, masks", [(True, True), (False, False), (False, True)])
def test_nanogpt(bias, masks, tmp_path):
    """Its ckpt.pt: names after _orig_mod., the exact GELU, perhaps no biases; written with an old torch, masks"""
    model, state = filled(tiny_gpt(gelu="none"), 0.3), {}
    for name, p in model.state_dict().items():
        p *= bias or not name.endswith("bias")
        if p.any():
            state[f"_orig_mod.{name}"] = p
    if masks:
        state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    told = asdict(model.config) | {"bias": bias, "dropout": 0.0}
    del told["gelu"]
    torch.save({"model": state, "model_args": told, "config": {"dataset": "x"}}, tmp_path / "ckpt.pt")
    assert_close(load_gpt(tmp_path / "ckpt.pt")(tokens(3, 8)), model(tokens(3, 8)))


class Code:
    """What, unpickled, makes a folder"""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


def bad_files():
    """{name: content} of what is no checkpoint"""
    write_safetensors("whole.safetensors", as_gpt2(one_head()))
    assert load_gpt("whole.safetensors")
    whole = Path("whole.safetensors").read_bytes()
    files = {"cut.safetensors": whole[:-3], "head.safetensors": whole[:50], "long.safetensors": b"\xff" * 20}
    files |= {"text.safetensors": b"hello", "none.safetensors": b"", "text.pt": b"hello"}
    files |= {"code.pt": {"config": {}, "model": Code()}}
    return files | {"adapter.pt": adapter_state_dict(adapt(tiny_gpt(), r=2)), "heads.safetensors": whole}


def test_bad_files_are_refused_in_one_sentence_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in bad_files().items():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            torch.save(content, name)
        if name == "heads.safetensors":
            Path("config.json").write_text('{"n_head": 3}')
        with pytest.raises(ValueError, match=f"^{name} is no checkpoint of GPT-2, nanoGPT or this GPT: .*$"):
            load_gpt(name)
    assert not Path("it ran").exists()


def test_tensors_that_are_amiss_are_named(tmp_path):
    state = as_gpt2(one_head()) | {"h.0.attn.c_proj.bias": torch.zeros(3), "h.1.extra": torch.zeros(1)}
    del state["h.1.mlp.c_fc.weight"]
    write_safetensors(tmp_path / "a.safetensors", state)
    message = r"(?s)Missing.*h.1.mlp.c_fc.weight.*Unexpected.*h.1.extra.*size mismatch.*h.0.attn.c_proj.bias"
    with pytest.raises(RuntimeError, match=message):
        load_gpt(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", train_gpt.GPT2)
def test_gpt2_is_downloaded_once_over_https_in_one_revision(name, tmp_path, monkeypatch):
    asked = []

    def download(url, path, sha256):
        asked.extend([url, sha256, path])
        write_safetensors(path, as_gpt2(one_head()))

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match=f"{name}/model.safetensors has another sha256 than .*: delete it, or give"):
        load_gpt(name)
    revision, sha256 = train_gpt.GPT2[name]
    content = asked.pop().read_bytes()
    monkeypatch.setitem(train_gpt.GPT2, name, (revision, hashlib.sha256(content).hexdigest()))
    assert same(load_gpt(name).state_dict(), one_head().state_dict())
    url = f"https://huggingface.co/openai-community/{name}/resolve/{revision}/model.safetensors"
    assert asked == [url, sha256]
    assert re.fullmatch("[0-9a-f]{40}", revision)


def test_a_dead_network_gives_one_sentence_that_says_where_to_put_the_file(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "_hub_dir", "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", partial(throw, OSError("the line is dead")))
    with pytest.raises(SystemExit):
        script("--init gpt2")
    place = "put https://huggingface.co/.*/model.safetensors at hub.checkpoints.gpt2.model.safetensors"
    sentence = f"train_gpt.py: --init gpt2: gpt2 cannot be downloaded .the line is dead.: {place}\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)


# ---- The data


@pytest.mark.parametrize("size, merges", [(50304, 50256), (50257, 50256), (2048, 2048)])
def test_the_vocabulary_is_gpt2s_as_far_as_the_model_has_it(size, merges):
    content = (DATA / "gpt2.tiktoken").read_bytes()
    assert hashlib.sha256(content).hexdigest() == train_gpt.VOCABULARY
    vocabulary = train_gpt.load_vocabulary(size)
    text = "A text: don't ½ 你好\n\n  <|endoftext|>\t"
    ids = vocabulary.encode(text, allowed_special="all")
    assert vocabulary.decode(ids) == text
    assert (50256 in ids) == (size > 50256)
    assert vocabulary.n_vocab == min(size, 50257)
    pieces = [base64.b64encode(vocabulary.decode_single_token_bytes(i)) for i in range(merges)]
    assert pieces == content.split()[:2 * merges:2]


def test_what_is_tuned_on_is_neither_trained_on_nor_judged_by(script, monkeypatch):
    monkeypatch.setattr(train_gpt, "WINDOWS", 256)
    args, _ = asked(monkeypatch, "--batch-size 1")
    data, *held_out = train_gpt.load_data(args, 300)
    ids = train_gpt.load_vocabulary(300).encode_ordinary(Path("text.txt").read_text())
    assert data.tolist() == ids[:len(ids) * 8 // 10]
    for windows, tenth in zip(held_out, (8, 9)):
        part = ids[len(ids) * tenth // 10:len(ids) * (tenth + 1) // 10]
        assert windows.tolist() == [part[i:i + 9] for i in range(0, len(part) - 8, 8)]  # each predicted once



def test_the_data_is_what_its_readme_says():
    lines = (DATA / "README.md").read_text(encoding="utf-8").splitlines()
    listed = {line.split()[1]: line.split("`")[-2] for line in lines if line.endswith("` |")}
    files = [path for path in DATA.glob("*.*") if path.suffix != ".md"]
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@torch.no_grad()
def test_the_shipped_base_has_learned_austen():
    vocabulary = train_gpt.load_vocabulary(2048)
    text = torch.tensor(vocabulary.encode_ordinary((DATA / "austen.txt").read_text(encoding="utf-8")))
    windows = text[len(text) * 95 // 100:].unfold(0, 129, 128)[:234]  # (234, 129)
    base = load_gpt(DATA / "base.pt")
    losses = [base(batch[:, :-1], batch[:, 1:]).item() for batch in windows.split(39)]
    assert statistics.fmean(losses) < 3.20


def test_the_shipped_base_asks_no_network(script, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_vocabulary", VOCABULARY.__wrapped__)
    for place, name in [(socket.socket, "connect"), (socket, "getaddrinfo")]:
        monkeypatch.setattr(place, name, partial(throw, RuntimeError("the network is asked")))
    with pytest.raises(RuntimeError, match="asked"):
        urllib.request.urlopen("http://example.org")
    assert script(f"--init {DATA / 'base.pt'} --methods lora --steps 1")


# ---- data/results/run.py


@pytest.fixture
def record(script, monkeypatch):
    """Its names, with an experiment of two rows and two seeds, of four steps"""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sora, "METHODS", dict(METHODS))
    monkeypatch.setitem(train_gpt.STEPS, "small", 4)
    monkeypatch.setattr(train_gpt, "load_gpt", lambda name: small_gpt())
    names = runpy.run_path(str(DATA / "results/run.py"))
    tiny = {"tiny": (["lora", "postdiag:lr=1e-3"], 2, False)}
    names["run"].__globals__.update(names, HERE=Path(), EXPERIMENTS=tiny)
    return names


CONTROLS = {
    "postdiag": lambda p, W0, BA: torch.diag(p["d"]) @ (W0 + BA),
    "rotation": lambda p, W0, BA: turn(p["C"], p["E"]) @ (W0 + BA),
    "prerotation": lambda p, W0, BA: turn(p["C"], p["E"]) @ W0 + BA,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_equal_the_dense_formula(name, record, monkeypatch):
    def formula(method, W0, p, s, exact):
        return CONTROLS[method](p, W0, s * p["B"] @ p["A"])

    monkeypatch.setitem(globals(), "dense", formula)
    layer = trained(record["CONTROLS"][name](linear(), r=3))
    assert_by_the_book(layer, layer.W0)


def test_an_experiment_resumes_where_it_was_stopped(record, monkeypatch):
    with monkeypatch.context() as once:
        at(once, partial(throw, KeyboardInterrupt()), "lora", 3, seed=1)
        record["run"]("tiny")
    before = rows_of("tiny.jsonl")
    record["run"]("tiny")
    assert rows_of("tiny.jsonl")[:2] == before[:2]
    whole = [(row["seed"], row["name"]) for row in rows_of("tiny.jsonl") if len(row["train"]) == 4]
    assert whole == [(0, "lora"), (0, "postdiag:lr=1e-3"), (1, "lora"), (1, "postdiag:lr=1e-3")]


def test_an_experiment_prints_its_table_where_a_row_diverges(record, monkeypatch, capsys):
    at(monkeypatch, lambda run: math.nan, "lora", 3)
    record["run"]("tiny")
    assert table_of(capsys.readouterr().out)["lora"][-1] == "diverged at step 3: lower its lr=0.01"


# ---- README


def readme(title):
    """The piece of Python that begins with this comment"""
    pieces = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    piece, = [piece for piece in pieces if piece.startswith(f"# {title}\n")]
    return piece


def test_the_code_in_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 32), "v_proj": nn.Linear(32, 16)})
    fresh = copy.deepcopy(model)
    exec(readme("use"), {"model": model, "another_copy_of_the_base": fresh})
    assert type(model["q_proj"]) is type(fresh["k_proj"]) is nn.Linear
    assert type(fresh["v_proj"]) is SORALinear


def cook(title, **names):
    """What a recipe of README leaves behind, with these names to start from"""
    names = vars(sora) | names
    exec(readme(f"recipe: {title}"), names)
    return SimpleNamespace(**names)


def test_recipe_of_a_new_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cook("a new head", model=Classifier(n=16), same_base_with_another_head=Classifier(1, n=16))
    assert same(ours(found.same_base_with_another_head), ours(found.model))
    assert "classifier.weight" in ours(found.model)


def roberta():
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**SMALL | {"hidden_size": 16, "intermediate_size": 24}, num_labels=3,
                                        max_position_embeddings=20)
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config)


def labelled():
    return [{"input_ids": x, "labels": x[0] % 3} for x in tokens(16, 8)]


@pytest.mark.filterwarnings("ignore")
def test_recipe_of_the_trainer(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    found = cook("transformers.Trainer", model=roberta(), data=labelled(), **{
        name: getattr(transformers, name) for name in ("Trainer", "TrainingArguments")})
    x = tokens(4, 8)
    fresh = load_adapter(roberta(), torch.load("adapter.pt")).eval()
    assert all(layer.B.any() for layer in adapted_layers(fresh).values())
    assert_close(fresh(x).logits, found.model.eval()(x).logits)
    assert_close(roberta().from_pretrained("tuned")(x).logits, found.model(x).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_resumes(tmp_path):
    """Stopped after two steps of four, and gone on with, as if it had not been"""
    transformers = pytest.importorskip("transformers")

    def train(steps, **options):
        model = adapt(roberta(), r=2, train="classifier.out_proj")
        settings = transformers.TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, learning_rate=1e-2,
                                                  lr_scheduler_type="constant", weight_decay=0.0)
        transformers.Trainer(model, settings, train_dataset=labelled()).train(**options)
        return adapter_state_dict(model)["trained"]

    whole, _ = train(4), shutil.rmtree(tmp_path)
    part = train(2)
    assert not same(part, whole)
    assert same(train(4, resume_from_checkpoint=True), whole)


def test_recipe_of_a_reference():
    model, x = trained(adapt(nn.Sequential(linear()), r=2)), randn(4, 7)
    kl = cook("the base as reference, for DPO or KL", torch=torch, F=F, model=model, x=x).kl
    policy, reference = model(x).log_softmax(-1), linear()(x).log_softmax(-1)
    assert_close(kl, (policy.exp() * (policy - reference)).sum(1).mean())


def test_recipe_of_lora_plus():
    model = adapt(tiny_gpt(), r=2)
    rates = {id(p): group["lr"] for group in cook("LoRA+, a higher rate for B", model=model).optimizer.param_groups
             for p in group["params"]}
    wanted = {id(p): 32e-4 if name.endswith(".B") else 2e-4 for name, p in ours(model).items()}
    assert rates == pytest.approx(wanted)


def test_recipe_of_rslora():
    assert cook("rsLoRA, s = a / √r", model=nn.Sequential(nn.Linear(64, 64))).model[0].s == 4 / 8


def test_recipe_of_accumulation():
    model, x, y = trained(adapt(nn.Sequential(linear()), r=2)), randn(8, 7), randn(8, 5)
    once = copy.deepcopy(model)
    batches = [*zip(x.split(2), y.split(2), strict=True)]
    cook("accumulation and clipping", model=model, trained=[*ours(model).values()], batches=batches,
         optimizer=torch.optim.SGD(model.parameters(), lr=1), loss_of=F.mse_loss)
    F.mse_loss(once(x), y).backward()
    assert nn.utils.clip_grad_norm_(once.parameters(), 1.0) > 1
    torch.optim.SGD(once.parameters(), lr=1).step()
    assert_close(ours(model), ours(once))


def test_recipe_of_an_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(adapt(Classifier(), r=2))
    average = cook("a moving average", model=model, AveragedModel=AveragedModel,
                   get_ema_multi_avg_fn=get_ema_multi_avg_fn).average
    before = adapter_state_dict(model)["trained"]
    average.update_parameters(trained(model))
    mean = {name: 0.99 * p + 0.01 * ours(model)[name] for name, p in before.items()}
    assert_close(adapter_state_dict(average)["trained"], mean)
    assert same(torch.load("average.pt")["trained"], before)


def test_recipe_of_serving(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = trained(adapt(gpt2(), "lora", r=2), 0.1), tokens(2, 8)
    y = model(x).logits
    cook("serving", model=model)
    assert_close(type(model).from_pretrained("tuned")(x).logits, y, rtol=1e-4, atol=1e-4)
    assert Path("folder/adapter_config.json").exists()


def test_readme_adds_a_method(monkeypatch):
    monkeypatch.setattr(sora, "METHODS", dict(METHODS))
    exec(readme("a method"), {})

    class WithOption(sora.METHODS["postdiag"]):
        def start(self, option):
            super().start()

    sora.METHODS["mine"] = WithOption
    model = trained(adapt(nn.Sequential(linear()), "mine", r=2, option=3))
    layer, again = model[0], load_adapter(nn.Sequential(linear()), adapter_state_dict(model))[0]
    assert_close(layer.merged_weight(), layer.d[:, None] * (layer.W0 + layer.s * layer.B @ layer.A))
    assert torch.equal(again.weight, layer.weight)
    assert again.options["option"] == 3


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_every_command_in_readme_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python train_gpt\.py([^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= 5
    for flags in commands:
        given = subprocess.run(["bash", "-c", f"printf '%s\\n' {flags}"], capture_output=True, text=True, check=True)
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *given.stdout.split()])
        assert train_gpt.arguments().rows
