"""python -m pytest -q

The references are slow, dense and in float64: the formulas as they are printed, one matrix after the other.
"""
import copy
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sora
import train_gpt
from sora import (
    GPT,
    DoRALinear,
    GPTConfig,
    LoRALinear,
    PreDiagLinear,
    SORALinear,
    adapt,
    adapter_state_dict,
    load_adapter,
    merge,
    rotation,
    save,
    unmerge,
)

HERE = Path(__file__).parent
METHODS = {cls.method: cls for cls in (LoRALinear, DoRALinear, PreDiagLinear, SORALinear)}  # without train_gpt's own
ALL = pytest.mark.parametrize("method", METHODS)
DIAGONAL = {"dora": "m", "prediag": "d", "sora": "d"}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(n_in=7, n_out=5, bias=True, dtype=torch.float64, seed=0):
    layer = nn.Linear(n_in, n_out, bias, dtype=dtype)
    for p in layer.parameters():
        nn.init.normal_(p, generator=rng(seed))
    return layer


def trained(module, scale=0.5, seed=1):
    """Give every trained parameter a random value, as if training had happened."""
    g = rng(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g).to(p) * scale)
    return module


def tiny_gpt(seed=0, **shape):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8} | shape))


def tokens(*shape, vocabulary=11, seed=0):
    return torch.randint(vocabulary, shape, generator=rng(seed))


def dense(method, W, p, s, exact=True):
    """W' by the book: dense, one matrix after the other."""
    BA = s * p["B"] @ p["A"]
    if method == "lora":
        return W + BA
    if method == "dora":
        return torch.diag(p["m"] / (W + BA).norm(dim=1).detach()) @ (W + BA)
    calibrated = torch.diag(p["d"]) @ W + BA
    if method == "prediag":
        return calibrated
    C, E = p["C"], p["E"]
    S = min(1, 1 / (C.norm() + E.norm() + 1e-6)) * (E @ C.T - C @ E.T)
    I = torch.eye(len(S), dtype=S.dtype)
    return (torch.linalg.solve(I - S / 2, I + S / 2) if exact else I + S) @ calibrated


CASES = [(m, True) for m in METHODS] + [("sora", False)]
FORMS = pytest.mark.parametrize("many", [1, 10**9], ids=["one_product", "plain"])  # tokens from which W' is built


# ------------------------------------------------------------------------------------------------ against the formulas


@FORMS
@pytest.mark.parametrize("method, exact", CASES)
@pytest.mark.parametrize("n_in, n_out, bias, batch", [(7, 5, True, (4,)), (5, 9, False, (2, 3)), (6, 6, True, (2, 3))])
def test_outputs_gradients_and_merged_weight_equal_the_dense_formula(method, exact, n_in, n_out, bias, batch, many,
                                                                     monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    base = linear(n_in, n_out, bias)
    layer = trained(METHODS[method](base, r=3, alpha=5, r_p=2, exact=exact))
    x = torch.randn(*batch, n_in, dtype=torch.float64, generator=rng(2), requires_grad=True)
    dy = torch.randn(*batch, n_out, dtype=torch.float64, generator=rng(3))
    p = {name: q.detach().clone().requires_grad_() for name, q in layer.named_parameters() if q.requires_grad}
    W = dense(method, base.weight.detach(), p, 5 / 3, exact)

    y, expected = layer(x), F.linear(x, W, base.bias)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(y, [x, *(layer.get_parameter(name) for name in p)], dy)
    wanted = torch.autograd.grad(expected, [x, *p.values()], dy)
    for name, a, b in zip(["x", *p], found, wanted):
        assert b.abs().max() > 1e-3, f"the gradient of {name} is hardly tested"
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"d{name}: {text}")
    torch.testing.assert_close(layer.merged_weight(), W.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.delta(), W.detach() - base.weight.detach(), rtol=1e-10, atol=1e-10)

    count = 3 * (n_in + n_out) + {"lora": 0, "dora": n_out, "prediag": n_out, "sora": n_out + 2 * 2 * n_out}[method]
    assert sum(q.numel() for q in layer.parameters() if q.requires_grad) == count


@ALL
def test_initial_values(method):
    torch.manual_seed(0)
    layer = METHODS[method](linear(400, 100, dtype=torch.float32))
    assert 0.95 < layer.A.abs().max() * 400**0.5 < 1
    assert not layer.B.any()
    assert (layer.r, layer.s, layer.r_p, layer.exact) == (16, 2, 4, True)
    if method == "dora":
        torch.testing.assert_close(layer.m, layer.weight.norm(dim=1))
    if method in ("prediag", "sora"):
        assert torch.equal(layer.d, torch.ones(100))
    if method == "sora":
        assert 0.95 < layer.C.abs().max() * 100**0.5 < 1
        assert torch.equal(layer.C, layer.E)
        assert layer.C.shape == (100, 4)


@ALL
def test_the_largest_rank_is_the_smaller_side(method):
    layer = trained(METHODS[method](linear(7, 5), r=5))
    assert layer.B.shape == (5, 5)
    assert layer(torch.ones(7, dtype=torch.float64)).shape == (5,)


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
def test_identity_at_the_start(method, dtype, exact):
    base = linear(7, 5, dtype=dtype)
    layer = METHODS[method](base, r=3, exact=exact)
    x = torch.randn(4, 7, generator=rng()).to(dtype)
    assert torch.equal(layer.merged_weight(), base.weight)
    assert not layer.delta().any()
    torch.testing.assert_close(layer(x), base(x), rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    layer(x).square().sum().backward()
    moves = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert moves == {"lora": {*"B"}, "dora": {*"Bm"}, "prediag": {*"Bd"}, "sora": {*"BdCE"}}[method]  # A waits for B


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("n_in, n_out, bias", [(7, 5, True), (5, 9, False), (6, 6, True)])
def test_equals_peft(method, n_in, n_out, bias):
    peft = pytest.importorskip("peft")
    base = linear(n_in, n_out, bias)
    layer = trained(METHODS[method](copy.deepcopy(base), r=3, alpha=5))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=method == "dora")
    model = peft.get_peft_model(nn.Sequential(base), config)
    theirs = model.base_model.model[0]
    pairs = {"A": theirs.lora_A["default"].weight, "B": theirs.lora_B["default"].weight}
    if method == "dora":
        pairs["m"] = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, q in pairs.items():
            q.copy_(layer.get_parameter(name))
    x = torch.randn(2, 3, n_in, dtype=torch.float64, generator=rng(2))
    dy = torch.randn(2, 3, n_out, dtype=torch.float64, generator=rng(3))
    mine = [layer(x), *torch.autograd.grad(layer(x), [layer.get_parameter(name) for name in pairs], dy)]
    for a, b in zip(mine, [model(x), *torch.autograd.grad(model(x), list(pairs.values()), dy)]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@ALL
def test_the_bias_is_never_conditioned(method):
    layer = trained(METHODS[method](linear(), r=3))
    torch.testing.assert_close(layer(torch.zeros(1, 7, dtype=torch.float64))[0], layer.bias, rtol=0, atol=0)


def test_dora_row_norms_are_m():
    layer = trained(DoRALinear(linear(40, 30, dtype=torch.float32), r=8))
    with torch.no_grad():
        layer.m[::2] *= -1
    torch.testing.assert_close(layer.merged_weight().norm(dim=1), layer.m.abs(), rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5, 1e-7, 0])
def test_dora_where_the_update_cancels_a_row(left, dtype, many, monkeypatch):
    """Of a row of W0 + sBA only a part is left: right as far as the digits go, and never larger than m allows."""
    monkeypatch.setattr(sora, "MANY", many)
    layer = DoRALinear(linear(32, 24, dtype=dtype), r=4)
    with torch.no_grad():
        layer.A[0], layer.B[3, 0] = layer.weight[3], (left - 1) / layer.s
    x, b = torch.randn(600, 32, generator=rng(1)).to(dtype), layer.bias.double()
    M = layer.weight.double() + layer.s * layer.B.double() @ layer.A.double()
    direction = M[3] / M[3].norm() if left else torch.zeros(32).double()
    expected = (x.double() @ direction) * layer.m[3].double() + b[3]
    found, eps = layer(x)[:, 3].double(), torch.finfo(dtype).eps
    assert (found - expected).norm() < min(2, 100 * eps / (left + eps)) * layer.m[3] * x.double().norm() / 32**0.5
    assert layer.merged_weight()[3].double().norm() < 1.01 * layer.m[3]
    layer(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.A, layer.B, layer.m))


@ALL
@FORMS
@pytest.mark.parametrize("autocast", [False, True])
def test_inference_mode(method, autocast, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    layer, x = trained(METHODS[method](linear(dtype=torch.float32), r=3), 0.1), torch.randn(2, 4, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer(x)
        with torch.inference_mode():
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("method", ["dora", "prediag", "sora"])
def test_a_diagonal_near_0_has_its_gradient_under_autocast(method, monkeypatch):
    """Few digits are no ground for Euler's identity, which divides by the diagonal."""
    layer = trained(METHODS[method](linear(64, 48, dtype=torch.float32), r=8), 0.1)
    x, dy = (torch.randn(600, n, generator=rng(n)) for n in (64, 48))
    name = DIAGONAL[method]
    with torch.no_grad():
        layer.get_parameter(name)[:6] = torch.tensor([0, 1e-6, -1e-4, 1e-3, 1e-2, -1e-1])
    exact = run_in(copy.deepcopy(layer).double(), x.double(), dy, 10**9)[name]
    with torch.autocast("cpu", torch.bfloat16):
        one = run_in(layer, x, dy, 1)[name].double()
    torch.testing.assert_close(one, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_dora_keeps_a_row_of_zeros():
    base = linear()
    with torch.no_grad():
        base.weight[2] = 0
    layer = DoRALinear(base, r=3)
    layer(torch.ones(1, 7, dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.merged_weight(), base.weight)
    assert all(p.grad.isfinite().all() for p in (layer.B, layer.m))


def run_in(layer, x, dy, many):
    """Output and all gradients, by one form or the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sora, "MANY", many)
        x = x.detach().requires_grad_()
        y = layer(x)
        return {"y": y.detach()} | dict(zip(["x", *(name for name, p in layer.named_parameters() if p.requires_grad)],
                torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy.to(y.dtype))))


def test_one_product_is_for_512_tokens_and_more():
    layer = LoRALinear(linear(), r=2)
    for shape, many in [((511,), False), ((512,), True), ((2, 255), False), ((2, 256), True)]:
        y = layer(torch.randn(*shape, layer.in_features, dtype=torch.float64, generator=rng()))
        assert ("OneProduct" in y.grad_fn.name()) == many


@pytest.mark.parametrize("method", ["prediag", "sora"])
def test_one_product_near_d_of_zero(method):
    layer = trained(METHODS[method](linear(64, 48, dtype=torch.float32), r=8), scale=0.1)
    x, dy = (torch.randn(600, n, generator=rng(n)) for n in (64, 48))
    with torch.no_grad():
        eps = 10 * torch.finfo(torch.float32).eps  # where the gradient has faded to a half
        layer.d[:8] = torch.tensor([0, 1e-9, -1e-7, eps, -eps, 1e-3, -1e-2, 0.1])
    one, plain = (run_in(layer, x, dy, many) for many in (1, 10**9))
    largest = plain["d"].abs().max().item()
    assert one["d"].abs().max() < 2 * largest
    assert method == "sora" or one["d"][:3].abs().max() < 1e-2 * largest
    torch.testing.assert_close(one["d"][5:], plain["d"][5:], rtol=1e-2, atol=1e-3 * largest)


@ALL
@FORMS
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_changed_in_place(method, bias, many, monkeypatch):
    """As after nn.Linear: x = layer(x); x += residual."""
    monkeypatch.setattr(sora, "MANY", many)
    layer = trained(METHODS[method](linear(bias=bias), r=3))
    weights = [p for p in layer.parameters() if p.requires_grad]
    for shape in ((4, 7), (2, 3, 7), (2, 1, 3, 7)):
        x = torch.randn(shape, dtype=torch.float64, generator=rng())
        expected = torch.autograd.grad((layer(x) * 2 + 1).relu().square().sum(), weights)
        for a, b in zip(torch.autograd.grad(layer(x).mul_(2).add_(1).relu_().square().sum(), weights), expected):
            torch.testing.assert_close(a, b)


@ALL
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_output_may_be_changed_in_place_under_checkpointing(method, use_reentrant, monkeypatch):
    layer, x = trained(METHODS[method](linear(), r=3)), torch.randn(4, 7, dtype=torch.float64, generator=rng())

    def block(x):
        y = layer(x)
        y += 1
        return y.square()

    leaves = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    monkeypatch.setattr(sora, "MANY", 10**9)
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    monkeypatch.setattr(sora, "MANY", 1)
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for leaf, gradient in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["prediag", "sora"])
def test_threads_may_change_disjoint_rows_of_the_output(method):
    layer = trained(METHODS[method](linear(48, 64), r=3))
    x = torch.randn(2048, 48, dtype=torch.float64, generator=rng())
    found = {}
    for many in (512, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sora, "MANY", many)
            y = layer(x)
            assert y.grad_fn.name().startswith("OneProduct") == (many == 512)

        def work(i, y=y):
            with torch.no_grad():  # which holds for one thread
                for _ in range(200):
                    y[i::4].add_(0.01)

        before = y.detach().clone()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        torch.testing.assert_close(y.detach(), before + 2)
        y.square().sum().backward()
        found[many] = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        layer.zero_grad()
    for name, gradient in found[10**9].items():
        torch.testing.assert_close(found[512][name], gradient, rtol=1e-10, atol=1e-8)


@ALL
@FORMS
def test_an_output_that_nobody_holds_is_freed(method, many, monkeypatch):
    """Where what is saved for the backward pass is packed away, as by save_on_cpu, the graph holds no memory of y."""
    monkeypatch.setattr(sora, "MANY", many)
    layer = trained(METHODS[method](linear(), r=3))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: None):
        y = layer(torch.randn(4, 7, dtype=torch.float64, generator=rng()))
    graph, memory = y.grad_fn, StorageWeakRef(y.untyped_storage())
    assert not memory.expired()
    del y
    assert memory.expired()
    assert graph is not None


@pytest.mark.parametrize("train_weight", [True, False])
def test_what_else_is_trained_has_its_gradient_too(train_weight):
    layer = trained(sora.DoRALinear(linear(), r=3))
    layer.bias.requires_grad_(True)
    layer.weight.requires_grad_(train_weight)
    x, dy = (torch.randn(4, n, dtype=torch.float64, generator=rng(n)) for n in (7, 5))
    one, plain = (run_in(layer, x, dy, many) for many in (1, 10**9))
    assert ("weight" in one) == train_weight
    assert "bias" in one
    for name, value in plain.items():
        torch.testing.assert_close(one[name], value, rtol=1e-10, atol=1e-10)


def kept_for_backward(layer, x):
    """Bytes that the backward pass of one layer will need, of x and beyond x and the layer's parameters."""
    owned = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)  # alive, so that no memory is counted twice
        assert y.requires_grad
    return sum(kept.values())


@ALL
def test_one_product_keeps_no_more_for_the_backward_pass(method, monkeypatch):
    layer, x = trained(METHODS[method](linear(40, 30, dtype=torch.float32), r=3)), torch.randn(600, 40)
    kept = []
    for many in (1, 10**9):
        monkeypatch.setattr(sora, "MANY", many)
        kept.append(kept_for_backward(layer, x))
    assert 0 < kept[0] <= kept[1]


@ALL
@pytest.mark.parametrize("n", [600, 2000])
def test_memory_of_a_layer_by_the_formula(method, n):
    """In float32: x, W', y where there is a diagonal, and what the factors keep, which is the same for any n."""
    n_in, n_out, r, r_p = 40, 30, 3, 2
    layer, x = trained(METHODS[method](linear(n_in, n_out, dtype=torch.float32), r=r, r_p=r_p)), torch.randn(n, n_in)
    numbers = n * n_in + n_in * n_out
    factors = r * n_out
    if method != "lora":
        numbers += n * n_out
        factors = (4 * r + 20 * r_p) * (n_in + n_out) + 10 * n_out + 1000
    assert 4 * numbers <= kept_for_backward(layer, x) <= 4 * (numbers + factors)


class Operations(TorchDispatchMode):
    """Counts what a GPU would get as a kernel: not views, not allocations."""

    FREE = """view _unsafe_view t transpose permute expand detach alias slice select unsqueeze squeeze split
    split_with_sizes as_strided unbind reshape empty empty_like new_empty empty_strided new_empty_strided""".split()

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(layer, dtype):
    """The operations of a forward and of a backward pass of 1,024 tokens, under autocast unless x is narrow."""
    x = torch.randn(1024, 64, requires_grad=True, dtype=dtype)
    with Operations() as forward, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = layer(x)
    dy = torch.ones_like(y)
    with Operations() as backward:
        y.backward(dy)
    return forward.names, backward.names


LAUNCHES = {  # at most so many: of a float32 base under autocast, of a bfloat16 base
    "frozen": (6, 2), "lora": (17, 16), "prediag": (16, 24), "dora": (26, 35), "sora": (65, 77),
    "peft-lora": (20, 17), "peft-dora": (48, 40)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    """python -m pytest -q -s -k launches prints them."""
    counts = []
    for dtype, most in zip((torch.float32, torch.bfloat16), LAUNCHES[name]):
        base = linear(64, 96, dtype=dtype).requires_grad_(False)
        if name == "frozen":
            layer = base
        elif name.startswith("peft-"):
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"], use_dora=name == "peft-dora")
            layer = peft.get_peft_model(nn.Sequential(base), config)
        else:
            layer = METHODS[name](base, r=16, r_p=4)
        forward, backward = launches(layer, dtype)
        assert not [op for op in backward if "solve" in op or "inv" in op or "lu" in op.split("_")], backward
        counts.append(f"{len(forward):4} + {len(backward):2} = {len(forward) + len(backward):3}")
        assert name.startswith("peft-") or len(forward) + len(backward) <= most + 3  # other versions of torch
    print(f"\n{name:9} float32 base under autocast {counts[0]}    bfloat16 base {counts[1]}", end="")


@pytest.mark.parametrize("method", ["full", "frozen", *METHODS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_never_waits_for_the_device(method, dtype, monkeypatch):
    run = row_of(method, "--r", "2", "--dtype", dtype, "--device", "cpu")
    model, forward, optimizer = train_gpt.set_up(tiny_gpt().requires_grad_(False), run, 0)
    monkeypatch.setattr(sora, "MANY", 1)
    with Operations() as step:
        train_gpt.train_step(model, forward, optimizer, tokens(4, 9), 1e-3, run)
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "item",
             "_linalg_check_errors", "bincount", "argwhere"}
    assert len(step.names) > 50
    assert not waits & set(step.names)


@ALL
def test_forward_forms_a_dense_update_for_the_norm_of_dora_alone(method):
    layer = trained(METHODS[method](linear(11, 13), r=3, r_p=2))
    shapes, W0 = [], layer.weight.untyped_storage().data_ptr()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != W0:  # a view of W0 costs nothing
                shapes.append(tuple(out.shape))
            return out

    with Watch():
        layer(torch.randn(4, 11, dtype=torch.float64))
    assert (4, 13) in shapes
    assert bool({(11, 13), (13, 11)} & set(shapes)) == (method == "dora")


# --------------------------------------------------------------------------------------------------------- the rotation


def test_rotation_by_hand():
    """C = (1, 0)ᵀ and E = (0, 1)ᵀ: t = 1/2, S = ((0, −1/2), (1/2, 0)), and Cayley turns the plane by 2 arctan 1/4."""
    C, E = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    K, P = rotation(C, E)
    R = torch.eye(2) + K @ P.T
    torch.testing.assert_close(R, torch.tensor([[15.0, -8.0], [8.0, 15.0]]) / 17, rtol=0, atol=1e-6)
    assert math.degrees(math.atan2(R[1, 0], R[0, 0])) == pytest.approx(2 * math.degrees(math.atan(1 / 4)), abs=1e-4)
    K, P = rotation(C, E, exact=False)
    torch.testing.assert_close(torch.eye(2) + K @ P.T, torch.tensor([[1.0, -0.5], [0.5, 1.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size, apart, n_out, r_p", [*product([0, 1, 100], [1e-3, 1, None], [8, 64, 500], [1, 4])])
def test_rotation_is_orthogonal(size, apart, n_out, r_p):
    """In float32: E near its start (C), away from it, unrelated to it; C and E of usual size and a hundred times it."""
    layer = SORALinear(linear(8, n_out, dtype=torch.float32), r=2, r_p=r_p)
    noise = torch.randn(n_out, r_p, generator=rng()) * layer.C.std()
    C = layer.C.detach() * size
    E = size * noise if apart is None else C + size * apart * noise
    K, P = (f.double() for f in rotation(C, E))
    I = torch.eye(n_out, dtype=torch.float64)
    R = I + K @ P.T
    assert (R.T @ R - I).abs().max() < 1e-6
    assert not size or (R - I).norm() > (1e-4 if apart == 1e-3 else 1e-1)


@pytest.mark.parametrize("size", [0.5, 0.999, 1.001, 1.5, 3])
def test_small_C_and_E_are_not_scaled(size):
    """t = 1 up to ‖C‖ + ‖E‖ = 1."""
    C, E = torch.randn(2, 5, 2, dtype=torch.float64, generator=rng())
    C, E = size * C / (C.norm() + E.norm()), size * E / (C.norm() + E.norm())
    S, I = (E @ C.T - C @ E.T) / max(1, size + 1e-6), torch.eye(5, dtype=torch.float64)
    for exact, R in [(True, torch.linalg.solve(I - S / 2, I + S / 2)), (False, I + S)]:
        K, P = rotation(C, E, exact)
        torch.testing.assert_close(I + K @ P.T, R, rtol=1e-12, atol=1e-12)


def test_the_first_order_rotation_only_stretches():
    C, E = torch.randn(2, 6, 2, dtype=torch.float64, generator=rng())
    K, P = rotation(C, E, exact=False)
    S, I = K @ P.T, torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(S.T, -S)
    torch.testing.assert_close((I + S).T @ (I + S), I - S @ S)
    assert torch.linalg.svdvals(I + S).min() > 1 - 1e-12
    assert torch.linalg.svdvals(I + S).max() > 1.01


@pytest.mark.parametrize("of_C, of_E", [(0.1, 0.2), (0.9, 0.2), (3, 5), (0, 0.5), (0, 4), (4, 0), (0, 0)])
def test_gradient_of_the_rotation(of_C, of_E):
    """Written by hand in QuickCayley: against autograd through the dense R, and against differences, twice over."""
    C, E = torch.randn(2, 5, 2, dtype=torch.float64, generator=rng())
    C, E = (of_C * C / C.norm()).requires_grad_(), (of_E * E / E.norm()).requires_grad_()
    G, I = torch.randn(5, 5, dtype=torch.float64, generator=rng()), torch.eye(5, dtype=torch.float64)
    S = (E @ C.T - C @ E.T) / (C.norm() + E.norm() + 1e-6).clamp(min=1)
    K, P = rotation(C, E)
    assert type(K.grad_fn).__name__ == "QuickCayleyBackward"
    wanted = torch.autograd.grad((G * torch.linalg.solve(I - S / 2, I + S / 2)).sum(), (C, E))
    found = torch.autograd.grad((G * (I + K @ P.T)).sum(), (C, E))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    for i in (0, 1):  # K and P, each for itself
        found, wanted = (torch.autograd.grad(f(C, E)[i].sin().sum(), (C, E)) for f in (rotation, sora.cayley))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    if of_C and of_E:  # a norm has no derivative at 0
        fixed = E.detach()
        for f, leaves in [(rotation, (C, E)), (lambda C: rotation(C, fixed), C), (lambda C: rotation(C, C.sin()), C)]:
            assert torch.autograd.gradcheck(f, leaves)
            assert torch.autograd.gradgradcheck(f, leaves)


def test_gradient_of_the_rotation_in_float32_also_in_a_backward_pass_under_autocast():
    C, E = torch.randn(2, 16, 4, generator=rng()).requires_grad_().unbind()
    found = rotation(C, E)
    dK, dP = (torch.randn(16, 8, generator=rng(i)) for i in (1, 2))
    wanted = torch.autograd.grad(found, (C, E), (dK, dP), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(found, (C, E), (dK, dP))
    assert all(torch.equal(a, b) for a, b in zip(again, wanted))
    for a, b in zip(wanted, torch.autograd.grad(rotation(C.double(), E.double()), (C, E), (dK.double(), dP.double()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the spectrum


def test_entropies_of_known_spectra():
    def entropy(*p):
        return -sum(q * math.log(q) for q in p) / math.log(4)

    spectra = {(1, 1, 1, 1): (1, 1), (5, 0, 0, 0): (0, 0), (3, 3, 0, 0): (0.5, 0.5)}
    spectra[2, 1, 0, 0] = entropy(0.8, 0.2), entropy(2 / 3, 1 / 3)
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=rng()))[0]
    P = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=rng()))[0][:, :4]
    for sigma, (energy, flat) in spectra.items():
        sigma = torch.tensor(sigma, dtype=torch.float64)
        for matrix in (sigma, Q @ torch.diag(sigma) @ P.T, 1e-30 * (P @ torch.diag(sigma) @ Q).float()):
            assert sora.svd_entropy(matrix) == sora.svd_entropy(matrix, 2) == pytest.approx(energy, abs=1e-5)
            assert sora.svd_entropy(matrix, 1) == pytest.approx(flat, abs=1e-5)
    assert math.isnan(sora.svd_entropy(torch.zeros(3, 4)))
    assert math.isnan(sora.svd_entropy(torch.ones(1, 4)))


# --------------------------------------------------------------------------------------------------------- the plumbing


def train(model, steps=3, batch=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if batch is None:
        batch = tokens(4, 9)
    for _ in range(steps):
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@ALL
def test_training_changes_the_adapter_alone_and_merging_is_exact(method):
    base = tiny_gpt()
    model = adapt(copy.deepcopy(base), method, r=2, r_p=2)
    x = tokens(3, 8)
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    before = copy.deepcopy(model.state_dict())
    train(model)
    names = {"lora": "AB", "dora": "ABm", "prediag": "ABd", "sora": "ABdCE"}[method]
    for name, tensor in model.state_dict().items():
        ours = name.rpartition(".")[2] in [*names]
        assert torch.equal(tensor, before[name]) != ours, name
        if not ours:
            assert torch.equal(tensor, base.state_dict()[name]), name
    after = copy.deepcopy(model.state_dict())
    model.train().eval()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())

    y = model(x)
    assert (y - base(x)).abs().max() > 1e-2
    assert not any(m.training for m in adapt(copy.deepcopy(base).eval(), method, r=2).modules())
    assert merge(model) is model
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {nn.Linear}
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert not any(m.training or p.requires_grad for m in model.modules() for p in m.parameters())
    once = copy.deepcopy(model.state_dict())
    merge(model)
    assert once.keys() == base.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def test_targets_match_whole_dotted_parts():
    def adapted(targets):
        return [name for name, m in adapt(tiny_gpt(), "lora", r=2, targets=targets).named_modules() if hasattr(m, "A")]

    assert len(adapted(None)) == 8
    assert not any("lm_head" in name for name in adapted(None))
    assert adapted(["mlp.c_proj"]) == adapted("mlp.c_proj") == [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]
    assert adapted(["transformer.h.1.attn.c_attn"]) == ["transformer.h.1.attn.c_attn"]
    assert len(adapted(["c_proj", "mlp.c_proj", "c_fc"])) == 6
    with pytest.raises(ValueError, match=r"\['proj', 'attn'\] match nothing: choose among \['c_attn', 'c_fc', "):
        adapted(["c_fc", "proj", "attn"])


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_errors_name_what_exists_and_change_nothing():
    model = tiny_gpt()
    before = model.state_dict().keys()
    for error, text, options in [
        (ValueError, "unknown method 'lore': choose one of lora, dora, prediag, sora", {"method": "lore"}),
        (ValueError, r"h.0.attn.c_attn: r=9 is outside 1\.\.8: choose another r, or not Linear\(in", {"r": 9}),
        (ValueError, r"r=0 is outside 1\.\.8", {"r": 0}),
        (ValueError, "r_p=0 is below 1", {"r": 2, "r_p": 0}),
        (ValueError, r"targets \['proj'\] match nothing: choose among \['c_attn', 'c_fc'", {"targets": "proj"}),
        (ValueError, r"targets \[\] match nothing: choose among \['c_attn', 'c_fc'", {"targets": []}),
    ]:
        with pytest.raises(error, match=text):
            adapt(model, **options)
        assert model.state_dict().keys() == before
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"targets \['every nn.Linear'\] match nothing: choose among \[\]"):
        adapt(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(TypeError, match="0.out_proj: NonDynamicallyQuantizableLinear.* is no plain"):
        adapt(nn.Sequential(nn.MultiheadAttention(8, 2)), r=2)
    with pytest.raises(TypeError, match="0.linear1 cannot be adapted"):
        adapt(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), r=2, targets=["linear1"])
    with pytest.raises(TypeError, match="0: Linear.* is no plain floating-point nn.Linear without hooks"):
        adapt(nn.Sequential(prune.identity(nn.Linear(4, 4), "weight")), r=2)
    with pytest.raises(TypeError, match="0: DynamicQuantized.* is no plain floating-point nn.Linear without hooks"):
        adapt(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 4)), r=2)
    with pytest.raises(TypeError, match="0: Linear.* is no plain floating-point nn.Linear"):
        quantised = nn.Linear(4, 4)
        quantised.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        adapt(nn.Sequential(quantised), r=2)
    adapt(model, "dora", r=2, r_p=2)
    with pytest.raises(ValueError, match="adapted already, in 8 layers: merge it first"):
        adapt(model, "sora", r=2)
    with pytest.raises(ValueError, match=r"adapters of 0 kinds, \[\]: one is needed"):
        adapter_state_dict(tiny_gpt())
    model = tiny_gpt()
    adapt(model.transformer.h[0], "lora", r=2, alpha=8)
    adapt(model.transformer.h[1], "lora", r=2, alpha=64)
    with pytest.raises(ValueError, match="adapters of 2 kinds, .*lora.*: one is needed"):
        adapter_state_dict(model)
    with pytest.raises(TypeError, match="0: Linear.* is no plain"):
        adapt(nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)), r=2)


@pytest.mark.parametrize("spoil", [
    lambda layer: layer.register_forward_hook(print), lambda layer: layer.register_forward_pre_hook(print),
    lambda layer: layer.register_full_backward_hook(print), lambda layer: layer.register_full_backward_pre_hook(print),
    lambda layer: setattr(layer, "forward", layer.forward),
], ids=["forward", "forward_pre", "backward", "backward_pre", "patched"])
def test_what_an_adapter_would_not_do_is_refused(spoil):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapt(copy.deepcopy(model), r=2)
    spoil(model[1])
    with pytest.raises(TypeError, match="1: Linear.* is no plain floating-point nn.Linear without hooks"):
        adapt(model, r=2)
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)


@ALL
def test_an_adapted_layer_is_called_as_nn_linear_is(method):
    base, x = linear(), torch.randn(4, 7, dtype=torch.float64, generator=rng())
    layer = METHODS[method](base, r=2, r_p=2)
    torch.testing.assert_close(layer(input=x), base(input=x))
    assert torch.equal(layer(input=x), layer(x))


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(4, 4)
    model = adapt(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), r=2)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], SORALinear)
    state = adapter_state_dict(trained(model))
    assert torch.equal(merge(model)["a"].weight, model["b"][0].weight)
    assert model["a"] is model["b"][0]
    fresh = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert torch.equal(merge(load_adapter(fresh, state))["a"].weight, model["a"].weight)


@ALL
def test_an_adapter_travels_alone(method, tmp_path):
    base, x = tiny_gpt(), tokens(3, 8)
    model = trained(adapt(copy.deepcopy(base), method, r=2, r_p=3, alpha=5, targets=["attn.c_proj", "c_fc"]))
    sora.save(adapter_state_dict(model), tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]
    state, held = torch.load(tmp_path / "a.pt", weights_only=True), adapter_state_dict(model.requires_grad_(False))
    assert {key: state[key] for key in ("method", "r", "alpha", "r_p", "exact")} == {
        "method": method, "r": 2, "alpha": 5, "r_p": 3, "exact": True}
    assert torch.equal(load_adapter(copy.deepcopy(base), state)(x), model(x))  # on a plain base
    again = adapt(copy.deepcopy(base), method, r=2, r_p=3, alpha=5, targets=["attn.c_proj", "c_fc"])
    assert torch.equal(load_adapter(again, state)(x), model(x))  # on an adapted one
    load_adapter(copy.deepcopy(base).bfloat16(), state)  # the same base, cast
    trained(model.transformer.h[0].mlp.c_fc.requires_grad_(True))
    assert held["trained"].keys() == state["trained"].keys()  # frozen or not, and whatever becomes of the model
    assert all(torch.equal(held["trained"][name], tensor) for name, tensor in state["trained"].items())

    A = "transformer.h.0.mlp.c_fc.A"
    for trained_state in ({}, state["trained"] | {A: torch.zeros(1)}, state["trained"] | {"x": torch.zeros(1)}):
        with pytest.raises(ValueError, match=f"missing, unknown or of another shape: .*({A}|x)"):
            load_adapter(base, state | {"trained": trained_state})
    with pytest.raises(ValueError, match="no adapter_state_dict"):
        load_adapter(base, base.state_dict())
    assert type(base.transformer.h[0].mlp.c_fc) is nn.Linear
    assert base.transformer.h[0].mlp.c_fc.weight.requires_grad

    for wrong, text in [(tiny_gpt(seed=1), "W0 differ from those the adapter was trained on"),
                        (adapt(tiny_gpt(), method, r=3, r_p=3), "r=2, the model r=3"),
                        (adapt(tiny_gpt(), "lora" if method != "lora" else "dora", r=2), f"method={method}"),
                        (nn.Linear(2, 2), "layers that the model has not: 'transformer.h.0.attn")]:
        before = copy.deepcopy(wrong.state_dict())
        with pytest.raises(ValueError, match=text):
            load_adapter(wrong, state)
        assert wrong.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in wrong.state_dict().items())


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_gives_the_base_back(method, dtype):
    base, x = tiny_gpt().to(dtype), tokens(3, 8)
    for model in (trained(adapt(copy.deepcopy(base), method, r=2)),
                  merge(trained(adapt(copy.deepcopy(base), method, r=2)), keep=True)):
        assert (model(x) - base(x)).abs().max() > 1e-2
        assert not any("W0" in name for name in model.state_dict())
        assert unmerge(model) is model
        assert torch.equal(model(x), base(x))
        assert model.state_dict().keys() == base.state_dict().keys()
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(ValueError, match=r"the model holds no W0: .* merge\(model, keep=True\)"):
            unmerge(model)
    with pytest.raises(ValueError, match="the model holds no W0"):
        unmerge(merge(adapt(model, method, r=2)))
    model.register_buffer("W0", torch.ones(1))  # somebody else's
    with pytest.raises(ValueError, match="the model holds no W0"):
        unmerge(model)


@ALL
def test_train_save_load_merge_reload(method, tmp_path):
    base, x = tiny_gpt(), tokens(3, 8)
    model = train(adapt(copy.deepcopy(base), method, r=2, r_p=2), steps=10)
    expected = model(x)
    assert (expected - base(x)).abs().max() > 1e-2
    save(adapter_state_dict(model), tmp_path / "adapter.pt")
    loaded = load_adapter(copy.deepcopy(base), torch.load(tmp_path / "adapter.pt", weights_only=True))
    for refused in (loaded.checkpoint, loaded.gpt2_state_dict):
        with pytest.raises(ValueError, match=r"adapted: merge\(model\) first, or save adapter_state_dict"):
            refused()
    save(merge(loaded).checkpoint(), tmp_path / "merged.pt")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "merged.pt")(x), expected, rtol=1e-4, atol=1e-4)
    save(loaded.gpt2_state_dict(), tmp_path / "gpt2.pt")
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "gpt2.pt")(x), expected, rtol=1e-4, atol=1e-4)


PARALLEL = [("lora", 1), ("dora", 10**9), ("prediag", 10**9), ("sora", 1)]  # some in one form, some in the other


def joined_gradients(rank, path):
    """What one of two processes does: half of the batch, under DistributedDataParallel, and with every parameter cut in
    two by FSDP2."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    batch = tokens(4, 9)[2 * rank:2 * rank + 2]
    for method, many in PARALLEL:
        sora.MANY = many
        model = trained(adapt(tiny_gpt(), method, r=2, r_p=2), scale=0.1)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(batch[:, :-1], batch[:, 1:]).backward()
        joined = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

        model = trained(adapt(tiny_gpt(), method, r=2, r_p=2), scale=0.1)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(batch[:, :-1], batch[:, 1:]).backward()
        sharded = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        if rank == 0:
            torch.save((joined, sharded, adapter_state_dict(model)), f"{path}/{method}")
    Path(path, f"done-{rank}").touch()
    while not Path(path, f"done-{1 - rank}").exists():  # or the one that is done first would hang up on the other
        time.sleep(0.01)
    os._exit(0)  # gloo's own way out sometimes aborts, with everything done


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_and_fully_sharded(tmp_path):
    """What is sharded is saved with each module.unshard() before."""
    torch.multiprocessing.spawn(joined_gradients, (str(tmp_path),), nprocs=2)
    for method, _ in PARALLEL:
        model, batch = trained(adapt(tiny_gpt(), method, r=2, r_p=2), scale=0.1), tokens(4, 9)
        model(batch[:, :-1], batch[:, 1:]).backward()
        joined, sharded, state = torch.load(tmp_path / method)
        for gradients in (joined, sharded):
            assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
            for name, gradient in gradients.items():
                torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
        assert str(state) == str(adapter_state_dict(model))


# ----------------------------------------------------------------------------------------------- models of transformers


def llama(size=8):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=11, hidden_size=size, intermediate_size=12, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
                                      bos_token_id=None, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(**{"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2,
                                        "bos_token_id": None, "eos_token_id": None} | options)
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.3, generator=rng(len(name)))
    return model


@ALL
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_transformers(make, method, tmp_path):
    base, x = make(), tokens(3, 8)
    model, y = adapt(copy.deepcopy(base), method, r=1, r_p=2), base(x).logits
    torch.testing.assert_close(model(x).logits, y, rtol=1e-5, atol=1e-5)
    assert not any(type(m).__name__ == "Conv1D" for m in model.modules())
    tied = base.lm_head.weight is base.get_input_embeddings().weight
    assert hasattr(model.lm_head, "A") != tied == (make is gpt2)
    model(x, labels=x).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())

    trained(model, 0.1).zero_grad()
    model(x, labels=x).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(x, labels=x, use_cache=False).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)
    model.gradient_checkpointing_disable()
    model.eval()

    expected, state = model(x).logits, adapter_state_dict(model)
    assert (expected - y).abs().max() > 1e-3
    assert torch.equal(load_adapter(copy.deepcopy(base), state)(x).logits, expected)
    narrow = load_adapter(copy.deepcopy(base).bfloat16(), state)
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}
    assert (narrow(x).logits.float() - expected).abs().mean() < 0.05
    merge(model, keep=True).save_pretrained(tmp_path)
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(type(base).from_pretrained(tmp_path)(x).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(unmerge(model)(x).logits, y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_transformers_compile(make):
    torch.compiler.reset()
    model, x = trained(adapt(make(), "sora", r=1, r_p=2), 0.1), tokens(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, use_cache=False).logits, model(x).logits, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- plain modules


@ALL
@FORMS
def test_deepcopy_state_dict_and_checkpointing(method, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    model, x = trained(adapt(tiny_gpt(), method, r=2, r_p=2)), tokens(3, 8)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    other = adapt(tiny_gpt(seed=1), method, r=2, r_p=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    layer = model.transformer.h[0].attn.c_attn
    h = torch.randn(3, 8, generator=rng(), requires_grad=True)
    leaves = [h, *(p for p in layer.parameters() if p.requires_grad)]
    plain = torch.autograd.grad(layer(h).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(checkpoint(layer, h, use_reentrant=False).square().sum(), leaves), plain):
        assert torch.equal(a, b)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_small_diagonal_survives_bfloat16(base):
    """d = 1.002 rounds to 1 in bfloat16, and on a bfloat16 base so would most of W'; its effect must not."""
    layer = sora.PreDiagLinear(linear(256, 64, dtype=base), r=4)
    x = torch.randn(8192, 256, generator=rng()).to(base)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        before, y = layer(x).double(), F.linear(x, layer.weight).double()
        nn.init.constant_(layer.d, 1.002)
        slope = ((layer(x).double() - before) * y).sum() / (y * y).sum()  # what d - 1 seems to be
    assert abs(slope - 0.002) < 1e-4


@ALL
@FORMS
def test_second_derivatives_are_right_or_refused(method, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    layer, x = trained(METHODS[method](linear(), r=2, r_p=2)), torch.randn(4, 7, dtype=torch.float64, generator=rng())
    gradients = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    if many == 1:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradients[0].square().sum().backward()
    else:  # y = W'x + b, of which ‖y‖² has the gradient 2 W'ᵀ y, and its square norm the gradient 2 H 2 W'ᵀ y
        W = layer.merged_weight()
        second, = torch.autograd.grad(gradients[0].square().sum(), x)
        torch.testing.assert_close(second, 2 * gradients[0] @ (2 * W.T @ W))


@ALL
@FORMS
def test_autocast_leaves_float64_alone(method, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    base = linear()
    layer, x = METHODS[method](base, r=2, r_p=2), torch.randn(4, 7, dtype=torch.float64, generator=rng())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), base(x))


@ALL
def test_one_product_under_autocast_is_as_exact_as_the_plain_form(method):
    layer = trained(METHODS[method](linear(256, 192, dtype=torch.float32), r=8), scale=0.02)
    x, dy = (torch.randn(4096, n, generator=rng(n)).bfloat16() for n in (256, 192))
    exact = run_in(copy.deepcopy(layer).double(), x.double(), dy, 10**9)
    with torch.autocast("cpu", torch.bfloat16):
        one, plain = (run_in(layer, x.float(), dy, many) for many in (1, 10**9))
    assert one["y"].dtype == plain["y"].dtype == torch.bfloat16
    assert one["B"].dtype == torch.float32
    assert not torch.equal(one["y"], plain["y"])
    for name, value in exact.items():
        errors = [(form[name].double() - value).norm() / value.norm() for form in (one, plain)]
        assert errors[0] < 2 * errors[1] < 0.02, f"{name}: {errors}"


@pytest.mark.parametrize("method", ["dora", "prediag", "sora"])
def test_a_large_bias_leaves_the_gradient_of_the_diagonal_right(method):
    """Under autocast the bias is rounded before it is added, and Euler's identity has to take off what was added."""
    base = linear(256, 256, dtype=torch.float32)
    with torch.no_grad():
        base.weight.div_(16)
        base.bias.mul_(3)
    layer = METHODS[method](base, r=8)
    x, t = (torch.randn(4096, 256, generator=rng(i)) for i in (1, 2))
    dy = (1 + t).bfloat16()  # of one sign on the whole, so that the errors of a bias add up over the tokens
    exact = run_in(copy.deepcopy(layer).double(), x.double(), dy, 10**9)
    with torch.autocast("cpu", torch.bfloat16):
        one = run_in(layer, x, dy, 1)
    name = DIAGONAL[method]
    assert (one[name].double() - exact[name]).norm() < 0.03 * exact[name].norm()


@ALL
def test_the_update_has_all_its_digits_under_autocast(method):
    layer = trained(METHODS[method](linear(dtype=torch.float32), r=3))
    with torch.autocast("cpu", torch.bfloat16):
        delta, merged = layer.delta(), layer.merged_weight()
    assert torch.equal(delta, layer.delta())
    assert torch.equal(merged, layer.merged_weight())


@pytest.mark.parametrize("shape", [(7, 3), (7, 2, 3), (7, 2, 2, 3)])
def test_only_a_change_by_others_counts_as_one(shape):
    """Some inputs make F.linear add the bias in place; that alone must not cost the slower gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sora, "MANY", 1)
        y = sora.PreDiagLinear(linear(), r=3)(torch.randn(shape, dtype=torch.float64).movedim(0, -1))
        node = y.grad_fn
        assert node.counter._version == node.before
        y.add_(1)
        assert node.counter._version > node.before
        assert not node.counter.numel()


@ALL
def test_dtypes(method):
    """The adapter stays float32 on a bfloat16 base, under autocast, after .to(bfloat16); results are near float32's."""
    wide = trained(adapt(tiny_gpt(), method, r=2, r_p=2), scale=0.1)
    x, ours = tokens(3, 8), [name for name, p in wide.named_parameters() if p.requires_grad]
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    assert narrow.transformer.wte.weight.dtype == narrow.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert all(torch.equal(narrow.state_dict()[name], wide.state_dict()[name]) for name in ours)
    assert all(torch.equal(narrow.get_buffer(name), buffer) for name, buffer in wide.named_buffers())
    assert adapt(tiny_gpt().bfloat16(), method, r=2, r_p=2).transformer.h[0].mlp.c_fc.A.dtype == torch.float32
    layer = wide.transformer.h[0].mlp.c_fc
    seen, expected, factors = [], layer.factors(), layer.factors
    layer.factors = lambda: seen.append(factors()) or seen[-1]
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, 8))
        layer.delta()
    del layer.factors
    assert len(seen) == 2
    assert all(torch.equal(a, b) for s in seen for a, b in zip(s, expected) if b is not None)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide.transformer.h[0].mlp.c_fc(torch.randn(3, 8)).dtype == torch.bfloat16
        mixed = wide(x)
    for y in (narrow(x), mixed):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), wide(x), rtol=0.05, atol=0.05)
        y.float().square().mean().backward()
    assert all(m.get_parameter(name).grad.dtype == torch.float32 for m in (narrow, wide) for name in ours)
    double = copy.deepcopy(wide).double()
    assert double.transformer.h[0].mlp.c_fc.A.dtype == torch.float64
    assert double.float().transformer.h[0].mlp.c_fc.A.dtype == torch.float32
    assert wide.to("meta").transformer.h[0].mlp.c_fc.A.is_meta


@ALL
@FORMS
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break(method, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    torch.compiler.reset()
    model, batch = trained(adapt(tiny_gpt(), method, r=2, r_p=2), scale=0.1), tokens(3, 9)
    model(batch[:, :-1], batch[:, 1:]).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(batch[:, :-1], batch[:, 1:]).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
    if method == "sora" and many == 1:  # it does what the others do, and more
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(model, fullgraph=True, backend="aot_eager")(batch[:, :-1], batch[:, 1:]).backward()


@ALL
@FORMS
@pytest.mark.filterwarnings("ignore")
def test_compiles_once_for_training_evaluation_and_a_smaller_batch(method, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    model = adapt(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), method, r=2, r_p=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for training in (True, False):
        model.train(training)
        for n in (7, 7, 5):
            compiled(torch.randn(n, 3, 16)).sum().backward()
    assert graphs["unique_graphs"] == 1


# ------------------------------------------------------------------------- trust: nothing lost, nothing silently wrong


def rows_of_zeros(layer):
    layer.weight[::2] = 0


def through_0(layer):
    diagonal = getattr(layer, "d", layer.B[:, 0])
    diagonal[:3] = torch.tensor([0, 1e-3, -1e-2])


def no_rotation(layer):
    for p in (getattr(layer, name) for name in "CE" if hasattr(layer, name)):
        p.zero_()


def huge(factor, *names):
    def change(layer):
        for p in (getattr(layer, name) for name in names if hasattr(layer, name)):
            p.mul_(factor)
    return change


EDGES = {  # in, out, r, what is done to the trained layer
    "rank 1": (7, 5, 1, None), "rank out": (7, 5, 5, None), "rank in": (5, 9, 5, None),
    "in 1": (1, 6, 1, None), "out 1": (6, 1, 1, None), "1 by 1": (1, 1, 1, None),
    "rows of zeros": (7, 5, 3, rows_of_zeros), "d through 0": (7, 5, 3, through_0), "C, E 0": (7, 5, 3, no_rotation),
    "C, E 1e3": (7, 9, 3, huge(1e3, "C", "E")), "C, E 1e4": (7, 9, 3, huge(1e4, "C", "E")),
    "E 1e4": (7, 9, 3, huge(1e4, "E")), "B 1e4": (7, 9, 3, huge(1e4, "B")),
    "B, C, E 1e3": (7, 9, 3, huge(1e3, "B", "C", "E")),
}
DIGITS = {  # dtype of the base, under autocast: the largest error, relative to the size of each result
    (torch.float64, False): 1e-10, (torch.float32, False): 5e-3, (torch.float16, False): 0.02,
    (torch.bfloat16, False): 0.1, (torch.float32, True): 0.1,
}


@FORMS
@pytest.mark.parametrize("dtype, autocast", DIGITS, ids=str)
def test_edges_equal_the_dense_formula(dtype, autocast, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    torch.manual_seed(0)  # of A and C
    narrow = autocast or dtype.itemsize == 2
    tried = worst = 0
    for (edge, (n_in, n_out, r, change)), (method, exact) in product(EDGES.items(), CASES):
        if narrow and "1e" in edge:
            continue  # a rotation by nearly 180° takes more digits
        layer = trained(METHODS[method](linear(n_in, n_out, dtype=dtype), r=r, alpha=2 * r, r_p=2, exact=exact), 0.3)
        with torch.no_grad():
            if change:
                change(layer)
        x = torch.randn(16, n_in, generator=rng(2)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        dy = torch.randn(16, n_out, generator=rng(3)).to(y.dtype)

        p = {name: q.detach().double().requires_grad_() for name, q in layer.named_parameters() if q.requires_grad}
        W0, x64 = layer.weight.detach().double(), x.detach().double().requires_grad_()
        W = dense(method, W0, p, layer.s, exact)
        expected = F.linear(x64, W, layer.bias.double())
        found = torch.autograd.grad(y, [x, *(layer.get_parameter(name) for name in p)], dy)
        wanted = torch.autograd.grad(expected, [x64, *p.values()], dy.double())
        pairs = dict(zip(["y", *(f"d{name}" for name in ["x", *p])], zip([y, *found], [expected, *wanted])))
        if not autocast:
            pairs |= {"W'": (layer.merged_weight(), W), "W' - W0": (layer.delta(), W - W0)}
        if many == 1 and not narrow and method in ("prediag", "sora"):
            pairs["dd"] = [grad[p["d"] != 0] for grad in pairs["dd"]]  # where Euler's identity has no say
        most = max(grad.abs().max() for grad in wanted)
        for name, (a, b) in pairs.items():
            size = max(b.abs().max(), W0.abs().max()) if name == "W' - W0" else b.abs().max()
            if size < (0.1 if narrow else 1e-9) * most:  # a gradient that has cancelled, as C's and E's where out is 1
                size = most
            error = (a.double() - b).abs().max() / size
            worst = max(worst, error.item())
            assert error < DIGITS[dtype, autocast], f"{method}, {edge}: {name} is off by {error:.0e}"
        tried += 1
    print(f"{tried} layers, the largest error is {worst:.0e}")


INPUTS = {
    "transposed": lambda x: x.T.contiguous().T, "every second": lambda x: x.repeat(2, 2)[::2, :7],
    "expanded": lambda x: x[:1].expand(6, 7), "two batch axes": lambda x: x.view(2, 3, 7).transpose(0, 1),
    "one axis": lambda x: x[0], "one token": lambda x: x[:1], "no token": lambda x: x[:0],
    "no token in two": lambda x: x.view(2, 3, 7)[:, :0], "four axes": lambda x: x.view(1, 2, 3, 7),
    "an offset": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(6, 7), "conjugate": lambda x: x.conj(),
}


@ALL
@FORMS
def test_inputs_of_every_form_and_layout(method, many, monkeypatch):
    """Against the merged layer: values, gradients, with and without requires_grad, grad mode or not."""
    monkeypatch.setattr(sora, "MANY", many)
    layer = trained(METHODS[method](linear(), r=3, r_p=2))
    W, ours = layer.merged_weight(), [p for p in layer.parameters() if p.requires_grad]
    for name, make in INPUTS.items():
        if name == "one axis" and many == 1:
            continue  # a single token is never many
        x = make(torch.randn(6, 7, generator=rng(2))).double() if name == "an offset" else make(
            torch.randn(6, 7, dtype=torch.float64, generator=rng(2)))
        expected = F.linear(x, W, layer.bias)
        wanted = torch.autograd.grad(F.linear(q := x.detach().requires_grad_(), W, layer.bias).square().sum(), q)[0]
        frozen = torch.autograd.grad(layer(x).square().sum(), ours)
        leaf = x.detach().requires_grad_()
        dx, *moving = torch.autograd.grad(layer(leaf).square().sum(), [leaf, *ours])
        assert layer(x).shape == expected.shape, name
        torch.testing.assert_close(layer(x), expected, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(dx, wanted, msg=lambda text, name=name: f"{name}: {text}")
        for a, b in zip(frozen, moving):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
            assert x.numel() or not a.any()
        with torch.no_grad():
            assert torch.equal(layer(x), layer(leaf))
            assert not layer(leaf).requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(layer(x.clone()), expected)


@ALL
@FORMS
def test_the_transforms_of_torch_func(method, many, monkeypatch):
    """They refuse a Function such as OneProduct, and so get the plain form however many tokens there are."""
    monkeypatch.setattr(sora, "MANY", many)
    layer, other = (trained(METHODS[method](linear(), r=3, r_p=2), seed=i) for i in (1, 2))
    x, v = (torch.randn(4, 7, dtype=torch.float64, generator=rng(i)) for i in (1, 2))
    y, W = layer(x).detach(), layer.merged_weight()
    p = {name: q.detach() for name, q in layer.named_parameters() if q.requires_grad}

    def loss(p, x):
        return torch.func.functional_call(layer, p, (x,)).square().sum()

    torch.testing.assert_close(loss(p, x), y.square().sum())
    torch.testing.assert_close(torch.func.vmap(layer)(x), y)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (v,))[1], F.linear(v, W))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), W)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), W)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x)
    whole = torch.func.grad(loss)(p, x)
    for name, gradient in whole.items():
        wanted = torch.autograd.grad(layer(x).square().sum(), layer.get_parameter(name))[0]
        torch.testing.assert_close(gradient, wanted)
        torch.testing.assert_close(each[name].sum(0), wanted)
    stacked = torch.func.stack_module_state([layer, other])
    both = torch.func.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (x,)))(*stacked)
    torch.testing.assert_close(both, torch.stack([layer(x), other(x)]))


@ALL
def test_pickled_copied_and_averaged(method):
    model, x = trained(adapt(tiny_gpt(), method, r=2, r_p=2), 0.1), tokens(3, 8)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    assert str(adapter_state_dict(again)) == str(adapter_state_dict(model))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(trained(model, 0.1, seed=2))
    for name, p in model.named_parameters():
        mean = (again.get_parameter(name) + p) / 2
        torch.testing.assert_close(average.module.get_parameter(name), mean)
    y = average(x)
    torch.testing.assert_close(merge(average.module)(x), y, rtol=1e-4, atol=1e-4)


def with_update_of(ratio, method, dtype):
    """A layer (in a model), trained so that ‖W' − W0‖ = ratio ‖W0‖."""
    base = nn.Linear(256, 192, bias=False)
    nn.init.normal_(base.weight, std=0.02, generator=rng())
    layer = METHODS[method](base.to(dtype), r=8)
    start = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
    end = {name: p.detach().clone() for name, p in trained(layer, 0.05).named_parameters() if p.requires_grad}
    low, high = 0, 100
    for _ in range(50):
        middle = (low + high) / 2
        with torch.no_grad():
            for name, p in start.items():
                layer.get_parameter(name).copy_(p.lerp(end[name], middle))
        too_much = layer.delta().norm() > ratio * layer.weight.float().norm()
        if too_much:
            high = middle
        else:
            low = middle
    return nn.Sequential(layer)


@ALL
def test_merging_into_16_bits_says_what_it_loses(method, recwarn):
    warnings.simplefilter("always")
    print()
    for dtype, ratio, low, high in [
        (torch.bfloat16, 0.001, 0.75, 1.1), (torch.bfloat16, 0.003, 0.45, 0.65),
        (torch.bfloat16, 0.004, 0.3, 0.48), (torch.bfloat16, 0.01, 0.15, 0.19),
        (torch.bfloat16, 0.05, 0.03, 0.04), (torch.bfloat16, 0.5, 0, 0.005), (torch.float16, 0.0001, 0.75, 1.1),
        (torch.float16, 0.01, 0.018, 0.024), (torch.float16, 0.05, 0.003, 0.006), (torch.float16, 0.5, 0, 0.0006),
    ]:
        model = with_update_of(ratio, method, dtype)
        W0, delta, wide = model[0].weight.double(), model[0].delta().double(), copy.deepcopy(model).float()
        recwarn.clear()
        lost = (merge(model)[0].weight.double() - W0 - delta).norm() / delta.norm()
        print(f"{method:8} {str(dtype)[6:]:8} {ratio:6.2%} {lost:7.2%}", end="")
        assert low <= lost <= high
        told = f"{dtype} rounds off over half of an update: merge model.float(), say"
        assert [str(w.message) for w in recwarn] == [told] * (lost > 0.5)

        recwarn.clear()
        assert torch.equal(wide[0].weight.double(), W0)
        delta = wide[0].delta().double()
        kept = (merge(wide)[0].weight.double() - W0 - delta).norm() / delta.norm()
        print(f", after float() {kept:.0e}")
        assert wide[0].weight.dtype == torch.float32
        assert kept < 1e-3 * lost
        assert not len(recwarn)
    merge(adapt(nn.Sequential(nn.Linear(8, 8).bfloat16()), method, r=2))
    assert not len(recwarn)  # nothing trained, nothing lost


@ALL
@FORMS
def test_on_the_meta_device(method, many, monkeypatch):
    """Shapes and dtypes are had; what needs values is refused in a sentence, and changes nothing."""
    monkeypatch.setattr(sora, "MANY", many)
    with torch.device("meta"):
        base, x = tiny_gpt(), torch.zeros(3, 8, dtype=torch.int64)
    real = trained(adapt(tiny_gpt(), method, r=2, r_p=2))
    model = adapt(base, method, r=2, r_p=2)
    assert model(x).shape == (3, 8, 11)
    assert model(x).is_meta
    model(x).sum().backward()
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.B.grad.shape == layer.B.shape
    assert layer.delta().shape == layer.merged_weight().shape == (32, 8)
    for refused in (merge, adapter_state_dict, lambda model: load_adapter(model, adapter_state_dict(real))):
        with pytest.raises(RuntimeError, match="meta tensor") as error:
            refused(model)
        assert "\n" not in str(error.value)
        assert type(model.transformer.h[0].mlp.c_fc) is METHODS[method]
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    for name, buffer in real.named_buffers():
        model.get_buffer(name).copy_(buffer)  # which are in no state_dict
    assert torch.equal(model(tokens(3, 8)), real(tokens(3, 8)))


def odd_states(state):
    trained_state = state["trained"]
    last = list(trained_state)[-1]
    yield from [[1], None, "sora", 3, {}, trained_state, [state], torch.ones(2)]
    for value in (math.nan, math.inf, -math.inf):
        spoiled = trained_state[last].clone()
        spoiled.view(-1)[0] = value
        yield state | {"trained": trained_state | {last: spoiled}}
    p = trained_state[last]
    for value in (p.to(torch.complex64), p.to(torch.int64), p > 0, p.numpy(), p.tolist(), None, "x", 1.0, p[:1],
                  p[None]):
        yield state | {"trained": trained_state | {last: value}}
    numbers = [None, "2", 2.5, 0, -1, math.nan, np.int64(3), np.float64(3), 10**30, 1j, [2], torch.tensor([2, 2]),
               np.array([2, 2])]
    for key, values in {
        "r": numbers, "r_p": numbers[:-1], "alpha": ["32", None, math.nan, 1j, [32], np.array([1, 2]), torch.ones(2)],
        "exact": [None, 1, "yes", "False", torch.ones(2), np.array([1, 0])],
        "targets": [None, 3, "0", b"0", [0, 1], [["0"], ["1"]], [None], [], ["0", "0"], ["2"], {"0", "1"}, ("0", "1")],
        "trained": [None, [1], "x", {}, set(), {3: torch.ones(1)}, torch.ones(2)],
        "method": ["lore", "", None, 3, ["sora"], b"sora", SORALinear],
        "fingerprint": [None, 3, "", "0" * 16, b"0" * 16, np.array(["a", "b"])],
    }.items():
        for value in values:
            yield state | {key: value}
        yield {k: v for k, v in state.items() if k != key}


def test_odd_states_are_refused_and_change_nothing():
    base = nn.Sequential(linear(dtype=torch.float32), nn.Linear(5, 6))
    state = adapter_state_dict(trained(adapt(copy.deepcopy(base), "sora", r=2, r_p=2)))
    tried = 0
    for odd in odd_states(state):
        for model in (copy.deepcopy(base), trained(adapt(copy.deepcopy(base), "sora", r=2, r_p=2), seed=3)):
            before, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
            if isinstance(odd, dict) and type(odd.get("r_p")) is int and odd["r_p"] > 2:
                continue  # memory for that is asked for first
            with pytest.raises(ValueError if isinstance(odd, dict) else (ValueError, TypeError)) as error:
                load_adapter(model, odd)
            assert "\n" not in str(error.value) and len(str(error.value)) < 400, error.value
            assert model.state_dict().keys() == before.keys()
            assert grads == [p.requires_grad for p in model.parameters()]
            assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
            tried += 1
    print(f"{tried} odd states")
    with pytest.raises(ValueError, match="no adapter_state_dict, by its r, targets: save that of an adapted model"):
        load_adapter(base, state | {"r": "2", "targets": "0"})
    with pytest.raises(ValueError, match="layers that the model has not: 3"):
        load_adapter(base, state | {"targets": ["0", 3]})
    with pytest.raises(ValueError, match=r"not finite, missing, unknown or of another shape: 0\.B$"):
        load_adapter(base, state | {"trained": state["trained"] | {"0.B": torch.full((5, 2), math.nan)}})
    narrow = copy.deepcopy(base).half().float()
    with pytest.raises(ValueError, match=r"W0 differ from those the adapter was trained on \(compared as bfloat16\)"):
        load_adapter(narrow, state)
    assert type(narrow[0]) is nn.Linear
    load_adapter(base, state | {"trained": {name: p.half() for name, p in state["trained"].items()}})


def test_options_of_numpy_are_saved_as_plain_numbers(tmp_path):
    """torch.load(weights_only=True) reads no others: the file would be lost to whoever loads it so."""
    base = nn.Sequential(linear())
    model = trained(adapt(copy.deepcopy(base), "sora", r=np.int64(2), alpha=np.float64(8), r_p=np.int32(2),
                          exact=np.bool_(True)))
    save(adapter_state_dict(model), tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert [type(state[key]) for key in sora.OPTIONS] == [str, int, float, int, bool]
    assert torch.equal(load_adapter(base, state)[0].delta(), model[0].delta())


@ALL
def test_hooks_outlive_the_merge(method):
    for give_back in (merge, partial(merge, keep=True), unmerge):
        model, seen = adapt(nn.Sequential(linear()), method, r=2), []

        def note(what, *args, seen=seen):
            seen.append(what)

        handles = [model[0].register_forward_hook(partial(note, "after"), with_kwargs=True),
                   model[0].register_forward_pre_hook(partial(note, "before")),
                   model[0].register_full_backward_hook(partial(note, "backward"))]
        model = give_back(model)
        assert type(model[0]) is nn.Linear
        model(torch.ones(2, 7, dtype=torch.float64, requires_grad=True)).sum().backward()
        assert seen == ["before", "after", "backward"]
        for handle in handles:
            handle.remove()
        model(torch.ones(2, 7, dtype=torch.float64))
        assert len(seen) == 3


class Runs:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def hostile_safetensors(whole):
    """(what, content) of files that are to be refused, of a whole one."""
    length = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:8 + length]), whole[8 + length:]
    names = [name for name in header if name != "__metadata__"]

    def file(header, body=body, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    for n in (0, 1, 7, 8, 9, length // 2, length + 7, length + 8, len(whole) - 1,
              *range(20, len(whole), len(whole) // 20)):
        yield f"cut at {n}", whole[:n]
    for tail in (b"\0", bytes(4), body):
        yield f"{len(tail)} bytes more", whole + tail
    for n in (0, 1, 2, length - 1, length + 1, length + 9, len(whole), 2**31, 2**32, 10**10, 2**40, 2**60, 2**63,
              2**64 - 1):
        yield f"a header of {n}", file(header, length=n)
    for foreign in (b"PK\3\4" + bytes(99), b"\x7fELF" * 9, b"\x89PNG\r\n", b"{}", b"null", b"<html></html>" * 99,
                    b"\x80\x02}q\x00.", bytes(1000), b"\xff" * 1000, "ü".encode("latin1") * 50):
        yield f"foreign {foreign[:8]}", foreign
        yield f"foreign header {foreign[:8]}", file(foreign)
    for odd in ([], 3, "x", None, True, {}, {"__metadata__": {}}, [header], {"a": 3}, {"a": []}, {"a": None}):
        yield f"header {odd!r:.30}", file(odd)
    for depth in (10**3, 10**5):
        for a, b in (("[", "]"), ('{"a":', "}")):
            yield f"depth {depth}", file((a * depth + "1" + b * depth).encode())
            yield f"unclosed depth {depth}", file((a * depth).encode())

    first, second = names[0], names[-1]
    begin, end = header[second]["data_offsets"]
    size = end - begin
    shape = header[second]["shape"]
    for value in ([begin - 4, end], [begin, end - 4], [begin + 4, end], [begin, end + 4], [end, begin], [-size, end],
                  [begin - len(body), end - len(body)], [0, 10**10], [begin, 10**10], [0, 2**70], [begin, begin],
                  [float(begin), float(end)], [begin + 0.5, end], [str(begin), str(end)], [begin], [begin, end, end],
                  [], None, {}, 3, "ab", [None, None], [[begin], [end]], [math.nan, end], [-math.inf, math.inf],
                  header[first]["data_offsets"], [0, len(body)]):
        yield f"offsets {value}", file(header | {second: header[second] | {"data_offsets": value}})
    for value in ("F64", "I32", "f32", "F8_E4M3", "U8", "F16", "BOOL", "", None, 3, [], {}, "float32", "Q4"):
        yield f"dtype {value}", file(header | {second: header[second] | {"dtype": value}})
    for value in ([3], [*shape, 2], [2 * n for n in shape], [-n for n in shape], [10**10], [10**5] * 4, [2**62] * 3,
                  [0], [float(n) for n in shape], [str(n) for n in shape], None, {}, "8", 3.5, [None], [shape],
                  [math.nan]):
        yield f"shape {value}", file(header | {second: header[second] | {"shape": value}})
    for key in ("dtype", "shape", "data_offsets"):
        yield f"no {key}", file(header | {second: {k: v for k, v in header[second].items() if k != key}})
    extra = {"dtype": "F32", "shape": [1], "data_offsets": [len(body) + 4, len(body) + 8]}
    yield "a hole", file(header | {"extra": extra}, body + bytes(8))
    text = json.dumps(header).encode()
    twice = json.dumps({second: header[second] | {"data_offsets": [len(body), len(body) + size]}}).encode()
    yield "a name twice", file(text[:-1] + b", " + twice[1:], body + bytes(size))
    huge_file = {"wte.weight": {"dtype": "F32", "shape": [10**6, 2500], "data_offsets": [0, 10**10]},
                 "wpe.weight": {"dtype": "F32", "shape": [8, 2500], "data_offsets": [10**10, 10**10 + 80000]}}
    yield "10 GB in 1 kB", file(huge_file, bytes(500))


def hostile_pickles(checkpoint):
    """(what, object or bytes) of files that are to be refused, of a checkpoint()."""
    config, state = checkpoint["config"], checkpoint["model"]
    for odd in (None, 3, "x", [], {}, [checkpoint], torch.ones(3), {"model": 3, "config": config}, {"model": {}},
                {"model": {}, "config": {}}, {"model": {}, "config": config}, {"model": [1], "config": config},
                {"model": {3: torch.ones(1)}, "config": config}, {"model": state}, {"model": state, "config": [1]},
                {"model": state | {"lm_head.weight": 3}, "config": config}, {"wte.weight": torch.ones(3)},
                {"model": dict.fromkeys(state, "x"), "config": config}, {3: torch.ones(1)}, {"a": torch.ones(1)},
                {"wte.weight": torch.ones(3, 64), "wpe.weight": torch.ones(3)}):
        yield f"object {odd!r:.20}", odd
    for key, values in {"n_head": HEADS, "n_layer": (-1, 2, 1.5, "1", None, 10**12, 10**30, math.nan, math.inf),
                        "n_embd": (0, -8, 9, 10**12, "8", None, 10**30),
                        "vocab_size": (0, -1, 10**12, 10**30, None, 2.5),
                        "block_size": (-8, 0, 10**12, None, "8"), "surprise": (1,)}.items():
        for value in values:
            yield f"{key}={value}", {"model": state, "config": config | {key: value}}
    for made in (Runs(os.mkdir, "harm"), Runs(eval, "__import__('os').mkdir('harm')"),
                 Runs(exec, "import os; os.mkdir('harm')"), Runs(Path.mkdir, Path("harm"))):
        yield "code", {"model": made, "config": config}
        yield "bare code", pickle.dumps(made)
        yield "protocol 0", pickle.dumps(made, 0)
    yield "GLOBAL", b"cos\nmkdir\n(S'harm'\ntR."


HEADS = (0, -1, -8, 3, 16, 10**12, 10**30, "2", "", None, [2], {}, 2.0, 1.5, math.nan, math.inf, -math.inf)


@pytest.mark.filterwarnings("ignore")
def test_hostile_files_are_refused_without_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = tiny_gpt(n_layer=1)
    write_safetensors(tmp_path / "whole.safetensors", whole.gpt2_state_dict())
    content = (tmp_path / "whole.safetensors").read_bytes()
    good = {"n_head": 2, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
    Path("config.json").write_text(json.dumps(good))
    x, tried = tokens(3, 8), []
    assert torch.equal(GPT.from_pretrained("whole.safetensors")(x), whole(x))

    def refused(what, path):
        tracemalloc.reset_peak()
        with pytest.raises((OSError, ValueError, RuntimeError)) as error:
            GPT.from_pretrained(path)
            print(f"accepted: {what}")
        one_line = "\n" not in str(error.value) and str(path) in str(error.value)
        assert one_line or "Error(s) in loading state_dict for GPT" in str(error.value), f"{what}: {error.value}"
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20, what
        tried.append(what)

    tracemalloc.start()
    try:
        for what, bytes_ in hostile_safetensors(content):
            Path("a.safetensors").write_bytes(bytes_)
            refused(what, "a.safetensors")
        for what, thing in hostile_pickles(whole.checkpoint()):
            if isinstance(thing, bytes):
                Path("a.pt").write_bytes(thing)
            else:
                torch.save(thing, "a.pt")
            refused(what, "a.pt")

        save(whole.checkpoint(), "whole.pt")
        saved = Path("whole.pt").read_bytes()
        for n in range(0, len(saved), len(saved) // 30):
            Path("a.pt").write_bytes(saved[:n])
            refused(f"pt cut at {n}", "a.pt")
        Path("a.safetensors").write_bytes(saved)
        refused("a .pt by the name of .safetensors", "a.safetensors")
        Path("a.pt").write_bytes(content)
        refused("a .safetensors by the name of .pt", "a.pt")
        Path("folder.pt").mkdir()
        refused("a folder", "folder.pt")

        for value in HEADS:
            Path("config.json").write_text(json.dumps({"n_head": value}))
            refused(f"config.json n_head={value}", "whole.safetensors")
        for text in ("", "[]", "null", "3", '"x"', "{", "[" * 10**5, '{"n_head": }', "\xff", '{"n_head": 2}}',
                     "[[1, 2, 3]]",
                     *(f'{{"n_head": 2, "activation_function": {act}}}' for act in ("null", "3", "[]", '"relu"')),
                     '{"n_head": 2, "layer_norm_epsilon": 1e-6}', '{"n_head": 2, "scale_attn_weights": false}',
                     '{"n_head": 2, "scale_attn_by_inverse_layer_idx": true}'):
            Path("config.json").write_text(text, encoding="latin1")
            refused(f"config.json {text:.30}", "whole.safetensors")
        Path("config.json").write_text(json.dumps(good))

        spoiled = random.Random(0)
        for _ in range(150):  # one byte of the header: refused, or it says the same
            changed = bytearray(content)
            changed[spoiled.randrange(8, 8 + int.from_bytes(content[:8], "little"))] = spoiled.randrange(256)
            Path("a.safetensors").write_bytes(changed)
            try:
                model = GPT.from_pretrained("a.safetensors")
            except (OSError, ValueError, RuntimeError):
                pass
            else:
                assert torch.equal(model(x), whole(x))
            tried.append("a byte")
    finally:
        tracemalloc.stop()
    save(copy.deepcopy(whole).bfloat16().checkpoint(), "narrow.pt")
    assert {p.dtype for p in GPT.from_pretrained("narrow.pt").parameters()} == {torch.float32}
    assert not Path("harm").exists()
    assert torch.equal(GPT.from_pretrained("whole.safetensors")(x), whole(x))
    print(f"{len(tried)} hostile files")
    assert len(tried) > 350


# ------------------------------------------------------------------------------------------ the upper part of the file


SOURCE = (HERE / "sora.py").read_text(encoding="utf-8")
UPPER, LOWER = re.split("^(?=# ======== All above stands alone)", SOURCE, flags=re.MULTILINE)


def names_in(code):
    """All global names and attributes that a code object, and those inside, may ask for."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
    return found


@pytest.fixture
def upper(monkeypatch):
    module = types.ModuleType("sora")
    monkeypatch.setitem(sys.modules, "sora", module)
    exec(compile(UPPER, "upper.py", "exec"), vars(module))
    return module


def test_the_upper_part_asks_for_nothing_below(upper):
    below = vars(sora).keys() - vars(upper).keys()
    assert {"GPT", "GPTConfig", "Block", "GPT2", "save"} <= below
    assert not below & names_in(compile(UPPER, "upper.py", "exec"))
    assert {"adapt", "merge", "load_adapter", "svd_entropy", "rotation"} <= names_in(compile(UPPER, "upper.py", "exec"))


@ALL
@FORMS
def test_the_upper_part_stands_alone(method, many, upper, monkeypatch):
    monkeypatch.setattr(upper, "MANY", many)
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5)), torch.randn(4, 6, generator=rng())
    model = upper.adapt(copy.deepcopy(base), method, r=2, r_p=2, targets=["0", "2"])
    torch.testing.assert_close(model(x), base(x))
    model(x).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    y, state = trained(model)(x), upper.adapter_state_dict(model)
    assert type(model[0]) is upper.METHODS[method]
    assert not isinstance(model[0], sora.DiagonalPlusLowRank)
    assert 0 < upper.svd_entropy(model[0].delta()) < 1
    assert torch.equal(upper.load_adapter(copy.deepcopy(base), state)(x), y)
    torch.testing.assert_close(upper.merge(model, keep=True)(x), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(upper.unmerge(model)(x), base(x))
    with pytest.raises(ValueError, match="unknown method"):
        upper.adapt(model, "none")
    with pytest.raises(TypeError, match="does not call it in eval"):
        upper.adapt(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), r=2, targets=["linear1"])


# -------------------------------------------------------------------------------------------------------------- the GPT


def test_gpt_is_causal():
    model, x = tiny_gpt().double(), tokens(2, 8)
    changed = x.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().amax((0, 2)).min() > 0


def test_gpt_by_hand():
    """One block, written out: attention is softmax(QKᵀ/√d + mask) V, head by head."""
    model, x = trained(tiny_gpt(n_layer=1)).double(), tokens(1, 8)
    state = {name.replace("transformer.", ""): p.detach() for name, p in model.named_parameters()}

    def norm(h, name):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    def affine(h, name):
        return h @ state[f"h.0.{name}.weight"].T + state[f"h.0.{name}.bias"]

    h = state["wte.weight"][x[0]] + state["wpe.weight"]
    qkv, heads = affine(norm(h, "h.0.ln_1"), "attn.c_attn"), []
    for i in range(2):
        q, k, v = (qkv[:, 8 * j + 4 * i: 8 * j + 4 * i + 4] for j in range(3))
        scores = q @ k.T / 2 + torch.full((8, 8), -math.inf).triu(1)
        heads.append(scores.softmax(-1) @ v)
    h = h + affine(torch.cat(heads, 1), "attn.c_proj")
    u = affine(norm(h, "h.0.ln_2"), "mlp.c_fc")
    h = h + affine(u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))), "mlp.c_proj")
    torch.testing.assert_close(model(x)[0], norm(h, "ln_f") @ state["wte.weight"].T)


def test_gpt_ties_its_head_generates_and_saves(tmp_path):
    model, x = tiny_gpt(), tokens(2, 3)
    assert model.lm_head.weight is model.transformer.wte.weight
    adapt(model, r=2)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight
    merge(model)
    a, b = (model.generate(x, 10, generator=rng(5)) for _ in range(2))
    assert a.shape == (2, 13)
    assert torch.equal(a, b)
    assert torch.equal(a[:, :3], x)
    assert torch.equal(model.generate(x, 1, temperature=1e-6)[:, -1], model(x)[:, -1].argmax(-1))
    with pytest.raises(ValueError, match="9 tokens are more than the context of 8"):
        model(tokens(1, 9))
    sora.save(model.half().checkpoint(), tmp_path / "base.pt")
    again = GPT.from_pretrained(tmp_path / "base.pt")
    assert os.listdir(tmp_path) == ["base.pt"]
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again.transformer.wte.weight, model.float().transformer.wte.weight)
    sora.save(merge(trained(adapt(again, "lora", r=2, targets=["lm_head"]))).checkpoint(), tmp_path / "untied.pt")
    assert torch.equal(GPT.from_pretrained(tmp_path / "untied.pt")(x), again(x))
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is no checkpoint"):
        GPT.from_pretrained(tmp_path / "other.pt")


@pytest.mark.parametrize("chunk, kept_whole", [(11 * 5, False), (11 * 31, False), (11 * 32, True), (11 * 100, True)])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_loss_keeps_logits_only_where_they_fit_in_a_chunk(chunk, kept_whole, dtype, near, monkeypatch):
    monkeypatch.setattr(GPT, "CHUNK", chunk)
    model, x, kept = tiny_gpt().to(dtype), tokens(4, 9), []
    weights = [*model.parameters()]
    targets = x[:, 1:].masked_fill(x[:, 1:] == 3, -100)  # F.cross_entropy leaves these out
    expected = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), targets.flatten())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = model(x[:, :-1], targets)
    assert kept
    assert any(shape[-1:] == (11,) for shape in kept) == kept_whole
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :-1], targets), expected, rtol=near, atol=0)
    wanted, losses = torch.autograd.grad(expected * 3, weights), [loss]
    if dtype == torch.float32:
        losses.append(torch.compile(model, fullgraph=True, backend="aot_eager")(x[:, :-1], targets))
    for found in losses:
        torch.testing.assert_close(found, expected, rtol=near, atol=0)
        for a, b in zip(torch.autograd.grad(found * 3, weights), wanted):
            assert (a - b).norm() <= near * b.norm()
    adapt(model, "lora", r=2, targets=["lm_head"])
    torch.testing.assert_close(model(x[:, :-1], targets), expected, rtol=near, atol=0)


# ----------------------------------------------------------------------------------------------- files of other people


def write_safetensors(path, state, metadata=True):
    """An independent writer of the format."""
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    header, body = {"__metadata__": {"format": "pt"}} if metadata else {}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("act, heads", [("gelu_new", 2), ("gelu", 4)])
def test_equals_gpt2_of_transformers(prefix, act, heads, tmp_path):
    theirs, x = gpt2(activation_function=act, n_head=heads), tokens(3, 8)
    theirs.config.save_pretrained(tmp_path)
    state = {prefix + name.removeprefix("transformer."): p for name, p in theirs.transformer.state_dict().items()}
    state |= {f"{prefix}h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() for i in range(2)}
    write_safetensors(tmp_path / "any.safetensors", state)
    model = GPT.from_pretrained(tmp_path / "any.safetensors")
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=1e-4)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config == GPTConfig(8, 11, 2, heads, 8, {"gelu_new": "tanh", "gelu": "none"}[act])
    with torch.no_grad():  # the square weight is not symmetric, so that its orientation shows
        model.transformer.h[0].attn.c_proj.weight.copy_(model.transformer.h[0].attn.c_proj.weight.T.clone())
    assert (model(x) - theirs(x).logits).abs().max() > 1e-2


def test_merged_weights_are_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, x = gpt2(), tokens(3, 8)
    theirs.save_pretrained(tmp_path)  # their writer of the format
    model = merge(trained(adapt(GPT.from_pretrained(tmp_path / "model.safetensors"), "sora", r=2), 0.1))
    assert (model(x) - theirs(x).logits).abs().max() > 1e-2
    (tmp_path / "model.safetensors").unlink()
    save(model.gpt2_state_dict(), tmp_path / "pytorch_model.bin")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x).logits, model(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(GPT.from_pretrained(tmp_path / "pytorch_model.bin")(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_safetensors(dtype, tmp_path):
    model, x = tiny_gpt(n_embd=64, n_head=1).to(dtype), tokens(3, 8)  # without a config.json heads are 64 wide
    state = {"h.0.attn.bias": torch.ones(1, dtype=torch.bool)} | model.gpt2_state_dict()  # an odd number of bytes first
    write_safetensors(tmp_path / "a.safetensors", state, metadata=False)
    again = GPT.from_pretrained(str(tmp_path / "a.safetensors"))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again(x), model.float()(x))


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias, tmp_path):
    """What nanoGPT writes: model_args, _orig_mod., a padded vocabulary, the exact GELU, perhaps no biases."""
    theirs, x = gpt2(activation_function="gelu", vocab_size=64), tokens(3, 8)
    if not bias:
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p.mul_(not name.endswith("bias"))
    state = {"_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    for name, p in theirs.state_dict().items():
        if bias or not name.endswith("bias"):
            state[f"_orig_mod.{name}"] = p.T if name.endswith(sora.STORED_IN_OUT) else p
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": bias, "vocab_size": 64, "dropout": 0}
    torch.save({"model": state, "model_args": arguments, "iter_num": 5, "config": {"dataset": "x"},
                "best_val_loss": torch.tensor(1.0)}, tmp_path / "ckpt.pt")
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=1e-4)
    assert model.config.vocab_size == 64
    assert all(p.requires_grad for p in model.parameters())


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_bad_files_are_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tiny_gpt(n_embd=64, n_head=1).gpt2_state_dict()
    state.pop("lm_head.weight")
    changed = state | {"transformer.h.0.attn.c_proj.bias": torch.zeros(3), "transformer.h.1.extra": torch.zeros(1)}
    changed.pop("transformer.h.1.mlp.c_fc.weight")
    write_safetensors(tmp_path / "changed.safetensors", changed)
    with pytest.raises(RuntimeError) as error:
        GPT.from_pretrained("changed.safetensors")
    for name in ("Missing.*h.1.mlp.c_fc.weight", "Unexpected.*h.1.extra", "size mismatch.*h.0.attn.c_proj.bias"):
        assert re.search(name, str(error.value))
    write_safetensors(tmp_path / "whole.safetensors", state)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    torch.save({"config": {"n_layer": 1}, "model": Harmful()}, "code.pt")
    torch.save(nn.Linear(2, 2), "module.pt")
    torch.save({"a": torch.zeros(1)}, "other.pt")
    write_safetensors(tmp_path / "narrow.safetensors", tiny_gpt().gpt2_state_dict())
    for name, content in {"cut.safetensors": whole[:-3], "head.safetensors": whole[:50], "text.safetensors": b"hello",
                          "none.safetensors": b"", "long.safetensors": b"\xff" * 20, "text.pt": b"hello"}.items():
        Path(name).write_bytes(content)
    for path in [*Path().glob("*.pt"), *Path().glob("[chtnl]*[!d].safetensors"), Path("narrow.safetensors")]:
        with pytest.raises(ValueError, match=f"{path} is no checkpoint of GPT-2, nanoGPT or this GPT: .") as error:
            GPT.from_pretrained(path)
        assert "\n" not in str(error.value)
    assert not Path("harm").exists()
    with pytest.raises(OSError, match="nowhere.safetensors"):
        GPT.from_pretrained("nowhere.safetensors")


def test_gpt2_is_downloaded_once_and_compared(tmp_path, monkeypatch):
    state, x = tiny_gpt(n_embd=64, n_head=1), tokens(3, 8)
    write_safetensors(tmp_path / "source", {n: p for n, p in state.gpt2_state_dict().items() if "lm_head" not in n})
    content = (tmp_path / "source").read_bytes()
    cache = tmp_path / "hub/checkpoints/gpt2"
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    asked = []

    class Answer(io.BytesIO):
        def info(self):
            return http.client.HTTPMessage()

        def read(self, n=-1):
            chunk = super().read(n)
            if cut and not chunk:
                raise ConnectionResetError("the line is dead")
            return chunk

    def urlopen(request, *args, **kwargs):
        asked.append(getattr(request, "full_url", request))
        return Answer(content[:cut])

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    cut = 1000
    with pytest.raises(OSError, match=f"gpt2 cannot be .* .the line is dead.: put https://.* at {cache}/model.safe"):
        GPT.from_pretrained("gpt2")
    assert os.listdir(cache) == []
    cut = None
    with pytest.raises(OSError, match="gpt2 cannot be downloaded .invalid hash value"):
        GPT.from_pretrained("gpt2")
    assert os.listdir(cache) == []
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(sora.GPT2, "gpt2", (*sora.GPT2["gpt2"][:4], digest))
    again = GPT.from_pretrained("gpt2")
    assert torch.equal(again(x), state(x))
    assert len(asked) == 3
    assert len({*asked}) == 1
    assert asked[0] == ("https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
                        "model.safetensors")
    (cache / "model.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="gpt2/model.safetensors has sha256 .*: delete it, or give its path"):
        GPT.from_pretrained("gpt2")
    assert len(asked) == 3  # once more for each that failed, never for what is there


# --------------------------------------------------------------------------------------------------------- train_gpt.py


TINY = "--init scratch --n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --steps 3 --r 2".split()


ALONE = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads that wait for each other crawl where others run too


def run(*flags, **options):
    command = [sys.executable, HERE / "train_gpt.py", *TINY, *map(str, flags)]
    return subprocess.run(command, capture_output=True, check=False, text=True, encoding="utf-8", **options)


def parsed(*flags):
    """train_gpt's arguments, as TINY and these flags give them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gpt.py", *TINY, *map(str, flags)])
        return train_gpt.arguments()


def row_of(methods, *flags):
    """The settings of the first row of these methods."""
    return next(train_gpt.runs(parsed("--methods", methods, *flags)))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def samples(printed):
    """[(name, text)] of what --sample prints."""
    return re.findall(r"^--- (\S+)\n(.*?)\n---$", printed, re.MULTILINE | re.DOTALL)


def test_train_gpt_from_end_to_end(tmp_path):
    made = run("--methods", "full", "--save", "base", "--lr", "1e-2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    names = ["full", *METHODS, "frozen"]
    flags = "--init base/full.pt --steps 20 --seeds 2 --sample 5 --save out --json out/all.json --lr 1e-2,full=2e-3"
    done = run(*flags.split(), "--methods", ",".join(names), cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = rows_of(tmp_path / "out/all.json")
    assert [(row["method"], row["seed"]) for row in rows] == [*product(names, [0, 1])]
    start = float(re.search(r"\nstart +validation loss ([\d.]+), the base's", done.stdout)[1])
    sizes = dict(zip(names, [16 * 2048 + 16 * 8 + 3312, 512, 656, 656, 1808, 128]))
    for row in rows:
        assert row["settings"]["lr"] == (2e-3 if row["method"] == "full" else 1e-2)
        assert row["start"] == pytest.approx(start, abs=1e-4)
        assert row["merged"] == pytest.approx(row["loss"], abs=1e-3)
        assert row["ms"] > 0
        assert row["relative"] > 0
        assert row["trainable"] == sizes[row["method"]]
        if row["method"] == "frozen":
            assert row["change"] == 0
            assert "entropy2" not in row
        else:
            assert row["loss"] < row["start"]
            assert row["change"] > 0
            assert row["spectrum"][0] > -1
            assert 0 < row["entropy2"] < row["entropy1"] < 1
    table = next(part for part in done.stdout.split("\n\n") if part.startswith("method")).splitlines()
    assert [line.split()[0] for line in table] == ["method", "(base)", *names]
    for name in ("val loss", "× frozen", "H(σ²)", "spectrum", " ± "):
        assert name in done.stdout
    drawn = samples(done.stdout)
    assert [name for name, _ in drawn] == ["(base)"] + [name for name in names for _ in (0, 1)]
    vocabulary = train_gpt.load_vocabulary(2048)
    windows = train_gpt.load_data(parsed(), vocabulary)[1]
    for _, text in drawn:
        assert text.removeprefix(vocabulary.decode(windows[0].tolist())) not in ("", text)

    base = GPT.from_pretrained(tmp_path / "base/full.pt")
    load_adapter(base, torch.load(tmp_path / "out/sora-1.pt", weights_only=True))
    assert isinstance(base.transformer.h[0].attn.c_attn, SORALinear)
    assert sorted(os.listdir(tmp_path / "out")) == sorted([f"{n}-{i}.pt" for n in names for i in (0, 1)] + ["all.json"])


MISTAKES = r"""
--data nowhere.txt               --data nowhere.txt: .*No such file or directory
--data short.txt                 --data short.txt: too short: it has \d+ tokens, --block-size 8 needs 90
--data binary.txt                --data binary.txt: 'utf-8' codec can't decode
--methods lora,sorra             argument --methods: unknown method 'sorra': choose from full,lora,dora,prediag
--r 17                           --methods lora: transformer\.h\.0\.attn\.c_attn: r=17 is outside 1\.\.16: choose
--targets nothing                --methods lora: targets \['nothing'\] match nothing: choose among \['c_attn'
--r 0                            argument --r: '0' is not a whole number above 0
--steps many                     argument --steps: 'many' is not a whole number above 0
--lr sora=fast                   argument --lr: 'fast' is not a number above 0
--lr nan                         argument --lr: 'nan' is not a number above 0
--alpha -1                       argument --alpha: '-1' is not a number above 0
--random-weights                 --init scratch: --random-weights is for gpt2, gpt2-medium, gpt2-large, gpt2-xl
--lr loro=1                      argument --lr: unknown method 'loro'
--n-head 3                       --init scratch: n_embd=16 is not a multiple of n_head=3
--init nowhere.pt                --init nowhere.pt: .*No such file or directory
--init short.txt                 --init short.txt: short.txt is no checkpoint of GPT-2, nanoGPT or this GPT
--init empty.txt                 --init empty.txt: empty.txt is no checkpoint of GPT-2, nanoGPT or this GPT
--init .                         --init .: .*Is a directory
--json .                         .*--json .: .*Is a directory
--init small.pt                  --init small.pt: GPTConfig\(.*vocab_size=11, .* is too small for 2048 tokens
--init large.pt --block-size 9   --init large.pt: .*block_size=8, .*too small for .*block-size 9
--device tpu                     --device tpu: .*Expected one of cpu, cuda
--stesp 3                        unrecognized arguments: --stesp 3
--save short.txt/x               .*--save short.txt/x, .*Not a directory
"""  # flags, and the message they bring, as a regular expression


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_train_gpt_says_what_is_wrong_in_one_line(mistake, tmp_path, monkeypatch, capsys):
    flags, message = re.split("  +", mistake)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    sora.save(tiny_gpt().checkpoint(), tmp_path / "small.pt")
    sora.save(tiny_gpt(vocab_size=2048).checkpoint(), tmp_path / "large.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        train_gpt.main()
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert not out
    assert error.count("\n") == 1
    assert re.match(f"train_gpt.py: {message}", error), error


def test_train_gpt_with_gpt2_offline(tmp_path):
    """Without the file one line says where to put it; with one put there, it trains."""
    dead = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    options = {"cwd": tmp_path, "env": os.environ | dead | {"TORCH_HOME": "home", "TIKTOKEN_CACHE_DIR": "vocabulary"}}
    (tmp_path / "text.txt").write_text((HERE / "data/shakespeare.txt").read_text(encoding="utf-8")[:9999])
    small = "--block-size 16 --batch-size 1 --steps 2 --methods sora --data text.txt --init gpt2".split()
    done = run(*small, **options)
    line = r"train_gpt.py: --init gpt2: gpt2 cannot be downloaded \(.*\): put https\S+ at (\S+)\n"
    said = re.fullmatch(line, done.stderr)
    assert done.returncode == 2 and not done.stdout and said, done.stderr
    state = tiny_gpt(vocab_size=50257, block_size=1024, n_embd=64, n_head=1).gpt2_state_dict()
    write_safetensors(tmp_path / said[1], {name: p for name, p in state.items() if "lm_head" not in name})
    refused = run(*small, **options)
    assert refused.returncode == 2
    assert "sha256" in refused.stderr
    assert refused.stderr.count("\n") == 1
    done = run(*small, "--init", said[1], "--sample", "20", **options)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "vocab_size=50257" in done.stdout
    assert "first 2,048 tokens" in done.stdout
    assert "\nsora " in done.stdout


def test_train_gpt_compares_with_peft(tmp_path, monkeypatch, capsys):
    if not train_gpt.find_spec("peft"):
        done = run("--methods", "peft-lora")
        assert done.returncode == 2
        assert "needs the package peft: pip install peft" in done.stderr
        return
    names = ["lora", "dora", "peft-lora", "peft-dora"]
    flags = "--methods", ",".join(names), "--json", str(tmp_path / "all.json"), "--curve", "2"
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
    train_gpt.main()
    rows = {row["method"]: row for row in rows_of(tmp_path / "all.json")}
    for mine, theirs in zip(names[:2], names[2:]):
        assert rows[mine]["trainable"] == rows[theirs]["trainable"]
        assert rows[mine]["start"] == pytest.approx(rows[theirs]["start"], abs=1e-4)
        assert rows[theirs]["loss"] < rows[theirs]["start"]
        assert rows[theirs]["ms"] > 0
        assert rows[mine]["curve"]
        assert not rows[theirs]["curve"]  # whose update is not known
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, "--methods", "peft-lora", "--targets", "nope"])
    with pytest.raises(SystemExit) as stop:
        train_gpt.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("train_gpt.py: --methods peft-lora: ")
    assert error.count("\n") == 1


EACH = pytest.mark.parametrize("method", [name for name in train_gpt.METHODS
                                          if train_gpt.find_spec("peft") or not name.startswith("peft-")])


def frozen_gpt():
    """A base to train from, far enough from its start that no bias is zero."""
    return trained(tiny_gpt(n_embd=32, block_size=128, vocab_size=64), 0.1).requires_grad_(False)


@EACH
def test_every_method_starts_at_the_base_in_bfloat16(method):
    args = row_of(method, "--dtype", "bfloat16", "--device", "cpu", "--block-size", 128)
    base, windows = frozen_gpt(), tokens(8, 129, vocabulary=64)
    expected = train_gpt.evaluate(base, windows, args)
    _, forward, _ = train_gpt.set_up(base, args, 0)
    assert train_gpt.evaluate(forward, windows, args) == expected
    assert expected != train_gpt.evaluate(base, windows, parsed("--dtype", "float32"))
    few = windows[:, :9]  # for so few tokens W' is not built, and y is rounded once more
    expected = train_gpt.evaluate(base, few, args)
    assert train_gpt.evaluate(forward, few, args) == pytest.approx(expected, abs=1e-2)


def storages(model):
    return {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}


@EACH
def test_what_is_frozen_is_shared_with_the_base_and_left_alone(method):
    run, base = row_of(method, "--device", "cpu"), frozen_gpt()
    model, forward, optimizer = train_gpt.set_up(base, run, 0)
    state, adapted = copy.deepcopy(base.state_dict()), []
    for name, layer in base.named_modules():
        if method != "full" and isinstance(layer, (nn.Linear, nn.Embedding)):
            mine = model.get_submodule(name)
            W0 = getattr(mine, "base_layer", mine).weight
            own = (method, name) == ("frozen", "transformer.wpe")
            assert (W0.data_ptr() == layer.weight.data_ptr()) != own, name
            adapted += [name] * (type(mine) is not type(layer))
    assert len(adapted) == (0 if method in ("full", "frozen") else 8)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad}
    assert mine
    assert not mine & storages(base)
    if method == "full":
        assert mine == storages(model)
        assert len(mine) == len(storages(base))

    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # A has no gradient in the first step
        train_gpt.train_step(model, forward, optimizer, tokens(4, 129, vocabulary=64), 1e-2, run)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert all(torch.equal(p, state[name]) for name, p in base.state_dict().items())
    if method == "frozen":
        assert before.keys() == {"transformer.wpe.weight"}


def test_an_adapted_head_is_measured_too():
    base = tiny_gpt()
    model = trained(adapt(copy.deepcopy(base), "lora", r=2, targets=["lm_head"]))
    expected = model.lm_head.delta().norm() / base.lm_head.weight.norm()
    assert train_gpt.spectrum(base, model)["change"] == pytest.approx(expected.item(), rel=1e-5)
    assert train_gpt.spectrum(base, copy.deepcopy(base)) == {"change": 0.0}


@pytest.mark.parametrize("method", ["sora", "lora", "peft-lora"])
def test_exact_and_targets_reach_the_layers(method):
    if method.startswith("peft-"):
        pytest.importorskip("peft")
    run, base = row_of(method, "--no-exact", "--targets", "c_attn", "mlp.c_proj"), tiny_gpt().requires_grad_(False)
    model = train_gpt.prepare(base, run)
    layers = {name: model.get_submodule(name) for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    adapted = {name for name, layer in layers.items() if type(layer) is not nn.Linear}
    assert adapted == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_proj")}
    if method == "sora":
        assert not any(layers[name].exact for name in adapted)
        exact = train_gpt.prepare(base, row_of("sora:exact=1", "--no-exact"))
        assert [m.exact for m in exact.modules() if isinstance(m, SORALinear)] == [True] * 8


def test_rows_have_settings_of_their_own():
    args = parsed("--methods", "lora,lora:r=3:lr=5e-4,sora:exact=0:r_p=1,full:lr=1", "--lr", "1e-2,lora=3e-3")
    rows = {run.name: run for run in train_gpt.runs(args)}
    assert [(run.method, run.r, run.r_p, run.exact, run.lr) for run in rows.values()] == [
        ("lora", 2, 4, True, 3e-3), ("lora", 3, 4, True, 5e-4), ("sora", 2, 1, False, 1e-2), ("full", 2, 4, True, 1)]
    base = tiny_gpt().requires_grad_(False)
    model = train_gpt.prepare(base, rows["sora:exact=0:r_p=1"])
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.r, layer.r_p, layer.exact) == (2, 1, False)


def test_a_default_row_is_lora_of_the_size_of_sora(monkeypatch):
    base = GPT.from_pretrained(HERE / "data/base.pt").requires_grad_(False)
    for flags, r in [([], 21), (["--r", "4", "--r-p", "1"], 6), (["--r", "1", "--r-p", "12"], 15)]:
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *flags])
        rows = {run.name: run for run in train_gpt.runs(train_gpt.arguments())}
        assert list(rows) == ["full", "lora", f"lora:r={r}", "dora", "prediag", "sora"]
        sizes = []
        for name in (f"lora:r={r}", "sora"):
            model = train_gpt.prepare(base, rows[name])
            sizes.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        a_rank = sum(sum(layer.weight.shape) for layer in model.modules() if hasattr(layer, "A"))
        assert abs(sizes[0] - sizes[1]) <= a_rank / 2


@FORMS
@pytest.mark.parametrize("name", ["postdiag", "rotation"])
def test_the_controls_equal_the_dense_formula(name, many, monkeypatch):
    monkeypatch.setattr(sora, "MANY", many)
    layer = trained(sora.METHODS[name](linear(), r=3, r_p=2))
    x = torch.randn(4, 7, dtype=torch.float64, generator=rng())
    p = {key: q.detach().clone().requires_grad_() for key, q in layer.named_parameters() if q.requires_grad}
    assert p.keys() == ({"A", "B", "d"} if name == "postdiag" else {"A", "B", "C", "E"})
    if name == "postdiag":
        W = torch.diag(p["d"]) @ dense("lora", layer.weight, p, layer.s)
    else:
        W = dense("sora", layer.weight, p | {"d": torch.ones(5, dtype=torch.float64)}, layer.s)
    y, expected = layer(x), F.linear(x, W, layer.bias)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [layer.get_parameter(key) for key in p])
    wanted = torch.autograd.grad(expected.square().sum(), list(p.values()))
    torch.testing.assert_close(found, wanted)


def test_unevenness():
    model = trained(adapt(nn.Sequential(linear(), linear(5, 6)), "lora", r=3))
    expected = []
    for layer in model:
        sigma = torch.linalg.svdvals(layer.B @ layer.A)[:3]
        expected.append(3 * (sigma**4).sum() / (sigma**2).sum() ** 2 - 1)
    torch.testing.assert_close(train_gpt.unevenness(model), torch.stack(expected).mean())
    fresh = adapt(nn.Sequential(linear()), "lora", r=3)
    train_gpt.unevenness(fresh).backward()
    assert not fresh[0].B.grad.any()  # neither is it nan

    base, losses = frozen_gpt(), {}
    for name in ("lora", "lora:even=10"):
        run = row_of(name, "--r", "4", "--steps", 40)
        model, forward, optimizer = train_gpt.set_up(base, run, 0)
        for _ in range(40):
            train_gpt.train_step(model, forward, optimizer, tokens(4, 9, vocabulary=64), 1e-2, run)
        losses[name] = train_gpt.unevenness(model).item()
    assert losses["lora:even=10"] < losses["lora"] / 2


def results_of(**losses):
    """{name: rows} as fine_tune gives them, of the losses of seeds 0, 1, ..."""
    results = {"(base)": [{"loss": 5.0}]}
    for name, values in losses.items():
        rows = []
        for seed, loss in enumerate(values):
            point = {"change": loss / 10, "entropy2": 0.1 * seed, "entropy1": 1 / loss, "spectrum": [0.0, -1.0, -2.0]}
            rows.append({"method": name, "seed": seed, "loss": loss, "trainable": 9, **point,
                         "curve": [{"step": 5, "loss": 9.0, **point}, {"step": 10, "loss": 8.0, **point}]})
        results[name] = rows
    return results


def test_differences_are_taken_seed_by_seed(capsys):
    results = results_of(lora=[2, 4, 6], sora=[1, 2, 6], dora=[2, 3, 5.9], full=[1, math.nan, 1], prediag=[1])
    train_gpt.print_differences(results)
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"{'sora':18} -1.000 ± 0.577 ≈", f"{'dora':18} -0.367 ± 0.318 ≈", f"{'full':18} -"]
    train_gpt.print_differences(results_of(lora=[2, 4, 6], sora=[1, 3, 5.1]))
    assert capsys.readouterr().out.endswith(" -0.967 ± 0.033\n")
    for too_few in (results_of(lora=[2], sora=[1]), results_of(sora=[1, 2])):
        train_gpt.print_differences(too_few)
    assert not capsys.readouterr().out


def test_rank_correlations(capsys):
    results = results_of(lora=[2.1, 4.3, 6.5], sora=[1, 2, 6], dora=[2, 3.5, 5.9], full=[0.1, 0.2, 0.3])
    train_gpt.print_correlations(results)  # full is no adapter
    printed = capsys.readouterr().out.splitlines()
    assert "over 9 runs of adapters" in printed[1]
    loss = torch.tensor([[2.1, 4.3, 6.5], [1, 2, 6], [2, 3.5, 5.9]])
    ranks = []
    for values in (loss, 1 / loss):
        centred = (values - values.mean(0)).flatten().tolist()
        ranks.append([sorted(centred).index(value) for value in centred])
    a, b = torch.tensor(ranks).double() - 4
    assert printed[2].split() == ["‖dW‖", "+1.00"]
    assert printed[4].split() == ["H(σ)", f"{(a @ b / (a @ a)).item():+.2f}"]
    train_gpt.print_correlations(results_of(lora=[1, 2], sora=[2, 3]))
    train_gpt.print_correlations(results_of(lora=[1], sora=[2], dora=[3]))
    assert not capsys.readouterr().out


def test_markdown(capsys):
    results = results_of(lora=[2, 4, 6], sora=[1, 2, 6]) | {"frozen": [{"loss": 4.0}], "dora": []}
    train_gpt.print_markdown(results)
    table, *parts = capsys.readouterr().out.strip().split("\n\n")
    charts, legends = [part for part in parts if "```" in part], [part for part in parts if "```" not in part]
    assert len(legends) == 4
    assert all(legend.endswith(": lora blue, sora orange") for legend in legends)
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    assert [row[0].strip() for row in rows] == ["method", "---", "(base)", "lora", "sora", "frozen"]
    assert len({len(row) for row in rows}) == 1
    assert rows[3][2].strip() == "4.000 ± 2.000"
    assert len(charts) == 5
    for chart, n in zip(charts, [2, train_gpt.POINTS, 2, 2, 2]):
        first, init, kind, title, x, *marks, last = chart.splitlines()
        assert (first, kind, last) == ("```mermaid", "xychart-beta", "```")
        assert json.loads(init[9:-3])["themeVariables"]
        assert len(json.loads(x.removeprefix("    x-axis "))) == n
        assert title.startswith('    title "')
        assert title.endswith('"')
        for mark in marks:
            assert re.fullmatch(r" +(bar|line) \[.*\]", mark)
            assert mark.count(",") < n
    assert charts[0].splitlines()[5:8] == ["    bar [4, 3]", "    line [2, 1]", "    line [6, 6]"]
    train_gpt.print_markdown({"(base)": [{"loss": 4.0}]})
    assert "mermaid" not in capsys.readouterr().out

    names = [f"lora:r={r}" for r in range(1, 11)]  # more than there are colours
    train_gpt.print_markdown(results_of(**{name: [2, 3] for name in names}))
    legend = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("H(σ) over"))
    assert re.findall(r"(\S+) (\w+)(?:, |$)", legend.split(": ", 1)[1])[7:] == [
        ("lora:r=8", "grey"), ("lora:r=9", "blue"), ("lora:r=10", "orange")]


def test_what_is_tuned_on_is_neither_trained_on_nor_judged_by():
    vocabulary = train_gpt.load_vocabulary(2048)
    flags = "--data", HERE / "data/shakespeare.txt", "--block-size", 128
    data, final = train_gpt.load_data(parsed(*flags), vocabulary)
    again, tuning = train_gpt.load_data(parsed(*flags, "--tuning"), vocabulary)
    text = torch.tensor(vocabulary.encode_ordinary((HERE / "data/shakespeare.txt").read_text(encoding="utf-8")))
    n = len(text)
    assert torch.equal(data, again)
    assert torch.equal(data, text[:n * 8 // 10])
    assert torch.equal(tuning[0], text[n * 8 // 10:][:129])
    assert torch.equal(final[0], text[n * 9 // 10:][:129])
    assert not any(torch.equal(a, b) for a in final for b in tuning)


def test_the_way_there_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--methods full,sora,frozen --steps 10 --curve 5 --markdown --seeds 2 --json all.json".split()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
    train_gpt.main()
    for row in rows_of("all.json"):
        assert [point["step"] for point in row["curve"]] == [2, 4, 6, 8, 10]
        assert all(math.isfinite(point["loss"]) for point in row["curve"])
        assert row["curve"][-1]["change"] == row["change"]
        assert row["curve"][-1].get("entropy1") == row.get("entropy1")
    assert capsys.readouterr().out.count("```mermaid") == 5


@pytest.mark.filterwarnings("ignore")
def test_train_gpt_compiles_each_method_once(monkeypatch, capsys):
    """For the speed measurement, for training and evaluation, and for each seed."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names = ["full", *METHODS, "frozen"]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *"--compile --seeds 2 --methods".split(), ",".join(names)])
    train_gpt.main()
    assert ", compiled: the first steps take long\n" in capsys.readouterr().out
    assert counters["unique_graphs"] == len(names)


def test_random_weights_are_only_measured(small, monkeypatch, capsys):
    monkeypatch.setitem(sora.GPT2, "gpt2", (1, 2, 16))
    small(*"--random-weights --init gpt2 --block-size 8 --steps 1 --methods sora --save . --json all.json".split())
    row, = rows_of("all.json")
    assert row["note"] == "only measured: neither saved nor merged"
    assert not {"change", "spectrum", "merged"} & row.keys()
    assert not list(Path().glob("*.pt"))
    assert "\nsora " in capsys.readouterr().out


def test_a_frozen_row_with_a_rate_of_its_own_is_compared_with(small, capsys):
    small("--methods", "frozen:lr=1e-3,lora")
    assert re.search(r"^frozen:lr=1e-3 .* 1\.00  ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
def test_train_gpt_compiles_as_many_methods_as_there_are(monkeypatch, capsys):
    """peft's DoRA is compiled in pieces, which fills the cache that all methods share."""
    pytest.importorskip("peft")
    torch.compiler.reset()
    monkeypatch.setattr(train_gpt, "TIMED", 1)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = "--compile --n-layer 2 --steps 1 --methods lora,dora,prediag,sora,peft-dora".split()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
    train_gpt.main()
    assert "\npeft-dora " in capsys.readouterr().out


def test_train_gpt_in_bfloat16(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--dtype bfloat16 --device cpu --methods full,sora,frozen --sample 5 --json all.json".split()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
    train_gpt.main()
    rows, printed = rows_of("all.json"), capsys.readouterr().out
    assert "bfloat16\n" in printed
    assert [row["method"] for row in rows] == ["full", "sora", "frozen"]
    assert [name for name, _ in samples(printed)] == ["(base)", "full", "sora", "frozen"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["merged"], abs=0.01)


def test_gpt2_changes_the_defaults(monkeypatch):
    for flags, expected in [([], (120, 128, 1e-2, 2.8e-3)), (["--init", "gpt2-xl"], (200, 1024, 2e-4, 3e-5)),
                            (["--init", "gpt2", "--steps", "7", "--lr", "full=1"], (7, 1024, 2e-4, 1))]:
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *flags])
        args = train_gpt.arguments()
        assert (args.steps, args.block_size, args.lr["sora"], args.lr["full"]) == expected


def test_train_gpt_ends_with_its_table_whatever_happens(tmp_path):
    """A method that diverges, with two seeds, on a terminal without ‖ and bars."""
    flags = "--sample 3 --methods full,lora --lr 1e-2,full=1e30 --seeds 2 --json all.json".split()
    done = run(*flags, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "diverged at step 2: choose a lower rate than --lr full=1e+30" in done.stdout
    assert re.search(r"\nfull +[\d,]+ +- +[\d.]+ +- +- +- +diverged at step 2, 2\n", done.stdout)
    assert re.search(r"\nlora .* \? 0", done.stdout)
    assert re.search(r"\nfull +-\n", done.stdout)
    assert [row["loss"] is None for row in rows_of(tmp_path / "all.json")] == [True, True, False, False]


def test_each_row_is_appended_as_a_line_of_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("all.json").write_text('{"of": "an earlier run"}\n')
    flags = "--device cpu --methods full,lora --lr 1e-2,full=1e30 --no-exact --json all.json".split()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
    train_gpt.main()
    assert "NaN" not in Path("all.json").read_text()
    earlier, full, lora = rows_of("all.json")
    assert earlier == {"of": "an earlier run"}
    assert full["loss"] is None
    assert "diverged" in full["note"]
    assert math.isfinite(lora["loss"])
    for row, name in [(full, "full"), (lora, "lora")]:
        settings = row["settings"]
        assert row["method"] == name
        assert row["seed"] == 0
        assert row["start"] > 0
        assert row["ms"] > 0
        assert settings["lr"] == {"full": 1e30, "lora": 1e-2}[name]
        assert settings["r"] == 2
        assert settings["torch"] == torch.__version__
        assert settings["device"] == "cpu"
        assert settings["exact"] is False
        assert settings.keys() >= vars(train_gpt.arguments()).keys() - {"methods"}


def test_the_table_of_a_large_model_fits_and_is_explained(capsys):
    row = {"loss": 2.7, "trainable": 1_557_611_200, "ms": 1234.5, "relative": 1.23, "memory": 123456.0, "change": 0.123,
           "entropy2": 0.456, "entropy1": 0.789, "spectrum": [-0.5 * i for i in range(train_gpt.POINTS)]}
    results = {name: [row, row | {"loss": 2.71}] for name in ("full", "lora", "peft-dora")}
    train_gpt.print_table({"(base)": [{"loss": 2.7}]} | results | {"sora": []})
    table, legend = capsys.readouterr().out.strip().split("\n\n")
    head, base, *rows = table.splitlines()
    assert re.split("  +", head) == ["method", *train_gpt.COLUMNS, "spectrum"]
    assert len(rows) == 3
    assert re.search("2.705 ± 0.007 .* 123,456 .* █", rows[0])
    assert base.split()[:3] == ["(base)", "-", "2.700"]
    for title in [*train_gpt.COLUMNS, "spectrum"]:
        assert re.search(f"^{re.escape(title)}  ", legend, re.MULTILINE), title
    assert max(map(len, table.splitlines())) <= 100
    assert max(map(len, legend.splitlines())) <= 100


def test_the_second_gpu_is_asked_where_it_is_meant(monkeypatch, capsys):
    asked = {}
    for name, answer in [("get_device_name", "the second GPU"), ("reset_peak_memory_stats", None),
                         ("max_memory_allocated", 3 * 2**20)]:
        def record(device=None, name=name, answer=answer):
            asked[name] = device
            return answer
        monkeypatch.setattr(torch.cuda, name, record)
    args, base = parsed("--device", "cpu", "--methods", "lora"), tiny_gpt().requires_grad_(False)
    args.device = torch.device("cuda:1")
    train_gpt.announce(args, base, tokens(99), tokens(4, 9), 2.5)
    assert re.search("^device +cuda:1, the second GPU, torch", capsys.readouterr().out)

    monkeypatch.setattr(train_gpt, "evaluate", lambda *_: 2.5)  # what would need the device
    monkeypatch.setattr(train_gpt, "batches", lambda *_: [])
    row, _ = train_gpt.fine_tune(base, next(train_gpt.runs(args)), 0, tokens(99), tokens(4, 9))
    assert row["memory"] == 3
    assert asked.keys() == {"get_device_name", "reset_peak_memory_stats", "max_memory_allocated"}
    assert {*asked.values()} == {args.device}


def test_every_flag_has_help_and_a_default():
    done = run("--help")
    flags = re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)
    assert {"--init", "--lr", "--json", "--r-p", "--compile"} <= set(flags)
    assert len(flags) == 26
    assert " ".join(done.stdout.split()).count("(default: ") == len(flags)
    assert "full,lora,lora:r=7,dora" in "".join(done.stdout.split())


# ------------------------------------------------------------------------------------------ machines and users that err


MEGABYTES = 2**20


def wrong_values():
    """{flag: values that it does not take}, each a text or a list of texts."""
    counts = ["", " ", "0", "-1", "1.5", "nan", "inf", "1e400", "many", "²", "٠", "½", "1_000", "+3", " 3", "0x10",
              "1e3", "10" * 40, str(10**9), str(2**63), "9" * 5000, "3,4", "--"]
    numbers = ["", " ", "0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "many", "²", "0x1p3", "1,5", "--"]
    wrong = dict.fromkeys("r r-p steps batch-size block-size seeds sample curve n-layer n-head n-embd".split(), counts)
    settings = {"r": ["10000", *counts], "r_p": counts, "alpha": numbers, "lr": numbers, "even": numbers,
                "exact": ["", "2", "yes", "True", "²"]}
    rows = [f"sora:{key}={value}" for key, values in settings.items() for value in values]
    rows += ["", ",", "lora,", ",lora", "lora:", "lora:r", "lora::r=2", ":r=2", "lora:=2", "lora:R=2", "lora: r=2",
             "lora :r=2", "lora:r=2:r=3", "lora:r=2:", "peft-lora:even=1", "full:even=1", "frozen:even=1",
             "full:exact=1", "lora:exact=0", "dora:r_p=2", "postdiag:r_p=2", "sora:r-p=2", "lora:steps=3",
             "lora:name=x", "lora:method=sora", "LoRA", "lora lora", "lora;sora", "sorra:r=2", "lora\nsora",
             "lora,sorra", "lora=1e-3"]
    rates = [",", "=", "=1", "sora=", "sora==1", "sora=1=2", "1e-3,", ",1e-3", "sora", "sora=1,,", "SORA=1", " sora=1",
             "sora=1,loro=1", "lora:r=2=1", *numbers, *(f"sora={value}" for value in numbers if value != "1,5")]
    layers = [[], "", "nothing", ["c_attn", "nothing"], "c_attn,c_proj", ".", ".c_attn", "wte", "ln_1", "h", "c_",
              "C_ATTN", "transformer.h.0.attn.c_attn.", "*", "\n", "²"]
    devices = ["", "tpu", "cuda:99", "cpu:-1", "meta", "hpu", "privateuseone", "vulkan", " cpu", "CPU", "cuda:x", "0",
               "\n"]
    return wrong | {"alpha": numbers, "methods": rows, "lr": rates, "targets": layers, "device": devices,
                    "dtype": ["", "float16", "bf16", "float64", "Float32", "32"]}


def wrong_paths():
    """{flag: paths that it does not take}, and the files that stand there, in this folder."""
    os.mkdir("folder")
    os.mkfifo("pipe")
    os.mkfifo("pipe.safetensors")
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    os.symlink("/dev/zero", "zero.safetensors")
    texts = {"empty": b"", "one": b"a", "binary": bytes(range(256)), "latin": "Käse ".encode("latin-1") * 500,
             "utf16": ("hello " * 500).encode("utf-16")}
    for name, content in texts.items():
        Path(name).write_bytes(content)

    save(tiny_gpt(vocab_size=2048).checkpoint(), "whole.pt")
    whole = Path("whole.pt").read_bytes()
    headers = {"no": b"", "short": (5).to_bytes(8, "little") + b"{}", "huge": b"\xff" * 8 + b"{}",
               "far": (2**40).to_bytes(8, "little") + b"{}", "list": (2).to_bytes(8, "little") + b"[]", "torch": whole}
    files = {f"{name}.safetensors": content for name, content in headers.items()}
    files |= {"half.pt": whole[:len(whole) // 2], "almost.pt": whole[:-1], "text.pt": b"hello\n" * 100,
              "zeros.pt": bytes(5000), "flipped.pt": bytes(255 - b for b in whole[:300]) + whole[300:],
              "code.pkl": pickle.dumps(Code())}
    for name, content in files.items():
        Path(name).write_bytes(content)

    base = torch.load("whole.pt", weights_only=True)
    objects = {"code": {"model": Code(), "config": {}}, "module": tiny_gpt(), "tensor": torch.zeros(3), "array": [1],
               "dict": {}, "wrong": {"model": 1, "config": 2}, "nothing": {"model": {}, "config": {}},
               "words": base | {"model": dict.fromkeys(base["model"], "x")},
               "sparse": base | {"model": {name: p.to_sparse() for name, p in base["model"].items()}},
               "nan": base | {"model": {name: p * math.nan for name, p in base["model"].items()}},
               "adapter": adapter_state_dict(adapt(tiny_gpt(), r=2))}
    for key, value in {"n_embd": -16, "n_head": 0, "block_size": 10**12, "n_layer": "1", "more": 1}.items():
        objects[f"{key}-config"] = base | {"config": base["config"] | {key: value}}
    for name, content in objects.items():
        torch.save(content, f"{name}.pt")

    nowhere = ["", " ", "nowhere", "folder", "one/x", "pipe", "/dev/null", "/dev/zero", "/dev/urandom", "loop",
               "dangling", "a\0b", "x" * 300, "x/" * 3000, "/proc/self/mem"]
    bases = [*files, *(f"{name}.pt" for name in objects), "pipe.safetensors", "zero.safetensors", "GPT2", "gpt2 ",
             "Scratch"]
    return {"data": [*nowhere, *texts, "whole.pt"], "init": [*nowhere, *texts, *bases],
            "save": ["one", "one/x", "pipe", "pipe/x", "/proc/x", "/dev/null", "/dev/null/x", "loop", "dangling",
                     "a\0b", "x" * 300],
            "json": ["folder", ".", "/", "one/x", "nowhere/x", "/proc/x", "/dev/null/x", "loop", "a\0b", "x" * 300]}


class Code:
    """What, unpickled, makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.filterwarnings("ignore")
def test_train_gpt_answers_whatever_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    """Also where two flags are wrong at once; within seconds, without a trace, before anything is printed."""
    monkeypatch.chdir(tmp_path)
    cases = []
    for flag, values in (wrong_values() | wrong_paths()).items():
        for value in values:
            cases.append([f"--{flag}", *([value] if isinstance(value, str) else value)])
    for one, other in zip(random.Random(0).sample(cases, 100), random.Random(1).sample(cases, 100)):
        cases.append([*one, *other])
    for line in ["--exact=1", "--no-exact=0", "--compile=yes", "--tuning=1", "--markdown x", "--no-tuning", "-r 3",
                 "--", "x", "-x", "--stepss 3", "--step 3", "--r= 3", "--rp 2", "--r_p 2", "--sample 0", "--r 2 3",
                 "--help=1", "--n-head 3", "--random-weights", "--random-weights --init whole.pt",
                 "--init whole.pt --block-size 9", "--r 17", "--block-size 999999", "--n-embd 1",
                 *(f"--{flag}" for flag in wrong_values())]:
        cases.append(line.split())

    def too_long(*_):
        pytest.fail(f"{flags}: no answer within 5 seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8000 * MEGABYTES, limits[1]))  # what is read without end ends here
    try:
        for flags in cases:
            signal.alarm(5)
            monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
            code = "none, for it trained"
            try:
                train_gpt.main()
            except SystemExit as stop:
                code = stop.code
            out, error = capsys.readouterr()
            assert code == 2 and not out and error.count("\n") == 1, (flags, code, out, error)
            assert error.startswith("train_gpt.py: ") and len(error) < 700 + 2 * len("".join(flags)), (flags, error)
            assert "Traceback" not in error and "/torch/" not in error, (flags, error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert not Path("it ran").exists()
    print(f"{len(cases)} cases")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """main(*flags), here and now, of a tiny model and a short text, the speed measured in one round."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "TIMED", 1)
    short_text()

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *SHORT, *map(str, flags)])
        train_gpt.main()

    return main


SHORT = "--device cpu --data text.txt".split()


def short_text():
    Path("text.txt").write_text((HERE / "data/shakespeare.txt").read_text(encoding="utf-8")[:9999])


def table_of(printed):
    """{name: line} of the table."""
    lines = printed[printed.rindex("\nmethod "):].strip().split("\n\n")[0].splitlines()
    return {line.split()[0]: line for line in lines}


SPENT = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."), MemoryError(),
         RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
         RuntimeError("[enforce fail at alloc_cpu.cpp:83] . DefaultCPUAllocator: not enough memory: you tried to ...")]


@pytest.mark.parametrize("error", [*SPENT, RuntimeError("a defect")], ids=["cuda", "python", "cpu", "windows", "other"])
def test_where_memory_ends_what_has_finished_is_printed_and_one_line_helps(error, small, monkeypatch, capsys):
    """The second of two rows runs out of it. An error of another kind is shown as it is, after the table."""
    monkeypatch.setattr(sora, "METHODS", dict(sora.METHODS))  # which the file, run once more, changes
    rest = iter(range(2 * 17 + 3 + 1))  # two rows measured, one trained, a step of the second

    def clip_grad_norm_(*_):
        if next(rest, None) is None:
            raise error

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *SHORT, "--methods", "frozen,lora", "--json", "rows"])
    with pytest.raises(SystemExit if error in SPENT else RuntimeError) as stop:
        runpy.run_path(str(HERE / "train_gpt.py"), run_name="__main__")
    out, said = capsys.readouterr()
    assert table_of(out).keys() == {"method", "(base)", "frozen"}
    assert [row["method"] for row in rows_of("rows")] == ["frozen"]
    if error in SPENT:
        line = r"train_gpt.py: out of memory: lower --batch-size or --block-size, or ask for fewer --methods .*\n"
        assert stop.value.code == 2 and re.fullmatch(line, said), said
    else:
        assert stop.value is error
        assert not said


def test_a_row_that_diverges_stops_alone_and_tells_its_step(small, monkeypatch, capsys):
    """Where its loss is not finite, or, as a gradient was not, that of the step after."""
    learning_rate, loss_of, steps = train_gpt.learning_rate, train_gpt.loss_of, 12
    at = None  # the step of training and the row; none while the speed is measured

    def noted(step, run):
        nonlocal at
        at = (run.name, step)
        return learning_rate(step, run)

    def spoilt(model, batch, run):
        loss = loss_of(model, batch, run)
        if not torch.is_grad_enabled() or at != ("lora", wrong_step):
            return loss
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss
        return loss * float(kind)

    monkeypatch.setattr(train_gpt, "learning_rate", noted)
    monkeypatch.setattr(train_gpt, "loss_of", spoilt)
    flags = f"--methods frozen,lora,full --steps {steps} --curve 6 --sample 1 --json".split()
    cases, losses = [("nan", 0), ("inf", 5), *product(["nan", "gradient"], [1, 12])], set()
    for kind, wrong_step in cases:  # at step 0 nothing is wrong
        at, path = None, f"{kind}{wrong_step}.jsonl"
        small(*flags, path)
        printed = capsys.readouterr().out
        rows = {row["method"]: row for row in rows_of(path)}
        assert list(rows) == ["frozen", "lora", "full"]
        losses.add((rows["frozen"]["loss"], rows["full"]["loss"]))
        assert {name for name, row in rows.items() if "diverged" in row} == ({"lora"} if wrong_step else set())
        whole = [name for name in rows if rows[name]["loss"] is not None]
        assert [name for name, _ in samples(printed)] == ["(base)", *whole]
        if wrong_step:
            told = min(wrong_step + (kind == "gradient"), steps)
            assert rows["lora"]["diverged"] == told
            assert rows["lora"]["loss"] is None
            assert f"diverged at step {told}: choose a lower rate than --lr lora=0.01" in printed
            assert table_of(printed)["lora"].endswith(f" diverged at step {told}")
            assert printed.count("diverged at step") == 2  # in its own line and in the table
    assert len(losses) == 1
    assert math.isfinite(sum(*losses))
    print(f"{len(cases)} cases")


def test_a_full_disk_is_told_before_anything_is_trained(small, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "train_step", lambda *_: pytest.fail("trained"))
    usage = shutil.disk_usage(".")
    model = 4 * sum(p.numel() for p in train_gpt.make_base(parsed("--device", "cpu")).parameters())
    for methods, seeds, models in [("lora,sora", 3, 1), ("full,lora", 1, 1), ("full,frozen,full:lr=1,lora", 2, 6)]:
        too_full = usage._replace(free=models * model - 1)
        monkeypatch.setattr(shutil, "disk_usage", {"out": too_full}.get)
        with pytest.raises(SystemExit) as stop:
            small("--save", "out", "--methods", methods, "--seeds", seeds)
        out, error = capsys.readouterr()
        assert stop.value.code == 2
        assert not out
        told = f"it may take {models * model:,} bytes, more than are free there"
        assert error == f"train_gpt.py: --save out: {told}\n"


def test_rows_stay_where_the_disk_fills_up(small, monkeypatch, capsys):
    def full(state, path):
        if "lora" in path:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(sora, "save", full)
    for flags in ("--save out", "--json /dev/full"):
        with pytest.raises(SystemExit) as stop:
            small(*flags.split(), "--methods", "full,lora")
        out, error = capsys.readouterr()
        assert stop.value.code == 2
        assert table_of(out).keys() == {"method", "(base)", "full"}
        assert error == f"train_gpt.py: {flags}: [Errno 28] No space left on device\n"
    assert os.listdir("out") == ["full.pt"]


# ---- Processes that are killed: each a fork of one that has imported everything and trained nothing


def alone(function, folder):
    """What the function of this file prints that runs in a process of its own, in this folder. (An optimiser would
    import _dynamo, for a second in each fork.)"""
    command = f"""import torch, torch._dynamo, {Path(__file__).stem} as tests
torch.set_num_threads(1)
tests.{function.__name__}()"""
    env = ALONE | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", command], cwd=folder, env=env, capture_output=True, check=False,
                          text=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def begin(act, printed):
    """The id of a fork that does this and prints to that file."""
    process = os.fork()
    if process:
        return process
    file = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    act()
    sys.exit()


def await_text(text, path, process):
    """Wait until it is printed, or until the process has ended."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if Path(path).exists() and text in Path(path).read_text(encoding="utf-8"):
            return
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)
    raise TimeoutError(f"{text!r} is not printed: {Path(path).read_text()}")


def kill(process):
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it ended before it was killed"


def killed_saves():
    """A state of 1 MB, all of one number, is saved again and again, the number rising; 40 times that is ended."""
    moments, last, left = random.Random(0), 0, 0
    save({"x": torch.zeros(2**18)}, "state.pt")

    def count_on():
        for number in range(last + 1, 10**6):
            save({"x": torch.full((2**18,), number)}, "state.pt")

    for _ in range(40):
        before = os.stat("state.pt").st_mtime_ns
        process = begin(count_on, "printed")
        while os.stat("state.pt").st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        kill(process)
        x = torch.load("state.pt", weights_only=True)["x"]
        assert len(x) == 2**18
        assert (x == x[0]).all()
        assert x[0] >= last
        last = x[0].item()
        left += Path("state.pt.tmp").exists()
    assert last >= 40
    print(f"40 cases: {last:.0f} saves, {left} ended halfway")


def killed_runs():
    """30 times train_gpt is ended, all runs saving to the same folder and writing to the same file."""
    train_gpt.TIMED, train_gpt.WINDOWS, moments = 1, 8, random.Random(0)
    short_text()
    announced_rows = 0
    for i in range(1, 31):
        names = "full,sora" if i % 2 else "sora,full"
        flags = ["--methods", names, *"--steps 1 --seeds 999 --save out --json rows --alpha".split(), str(i)]
        sys.argv = ["train_gpt.py", *TINY, *SHORT, *flags]
        process = begin(train_gpt.main, f"printed-{i}")
        if i % 5:
            await_text("seed 2  validation loss", f"printed-{i}", process)
        time.sleep(moments.uniform(0, 0.1 if i % 5 else 0.3))
        kill(process)

        text = Path("rows").read_text() if Path("rows").exists() else ""
        rows = [json.loads(line) for line in text.splitlines()]  # each whole
        written = {(row["method"], row["seed"]) for row in rows if row["settings"]["alpha"] == i}
        announced = re.findall(r"^(\w+) +seed (\d+)  validation loss .* saved as (\S+)\n",
                               Path(f"printed-{i}").read_text(), re.MULTILINE)
        assert text[-1:] in ("", "\n")
        assert written >= {(name, int(seed)) for name, seed, _ in announced}
        assert all(Path(path).exists() for _, _, path in announced)
        announced_rows += len(announced)
    files = sorted(Path("out").glob("*"))
    for path in files:
        if path.suffix == ".tmp":
            continue
        saved = torch.load(path, weights_only=True)
        if path.name.startswith("full"):
            GPT.from_pretrained(path)
        else:
            load_adapter(train_gpt.make_base(parsed()), saved)
    assert announced_rows >= 60
    assert len(files) > 3
    print(f"30 cases: {announced_rows} rows, {len(files)} files")


def interrupted_runs():
    """Ctrl-C once, and twice at once."""
    short_text()
    moments = random.Random(0)
    sys.argv = ["train_gpt.py", *TINY, *SHORT, *"--methods frozen,lora --steps 20 --seeds 99".split()]

    def act():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
        runpy.run_path(str(HERE / "train_gpt.py"), run_name="__main__")

    for i in range(4):
        printed = f"printed-{i}"
        process = begin(act, printed)
        await_text("seed 0  validation loss", printed, process)
        for _ in range(9):  # one that comes while a destructor runs is lost, to Python
            os.kill(process, signal.SIGINT)
            if i % 2:
                time.sleep(moments.uniform(0, 0.01))
                os.kill(process, signal.SIGINT)
            if ended_within(5, process):
                break
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        text = Path(printed).read_text(encoding="utf-8")
        assert code == 130 and "Traceback" not in text and "Exception" not in text, (i, code, text[-2000:])
        if i % 2 == 0:
            assert table_of(text).keys() == {"method", "(base)", "frozen"}
            assert text.endswith("\ninterrupted\n")
    print("4 cases")


def ended_within(seconds, process):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.01)
    return False


def each_in_its_folder():
    for act in (killed_saves, killed_runs, interrupted_runs):
        os.mkdir(act.__name__)
        os.chdir(act.__name__)
        act()
        os.chdir("..")


def test_whatever_is_killed_leaves_whole_files_and_ctrl_c_the_table(tmp_path):
    print(alone(each_in_its_folder, tmp_path))


# ---- What can be repeated and checked


def test_a_run_can_be_repeated_to_the_last_digit(small):
    names = [name for name in train_gpt.METHODS if not name.startswith("peft-")]
    runs = []
    for i in (1, 2):
        torch.rand(i)  # what was drawn before does not matter
        small("--methods", ",".join([*names, "sora:even=0.01"]), *"--seeds 2 --curve 3 --json".split(), f"{i}.jsonl")
        rows = rows_of(f"{i}.jsonl")
        for row in rows:
            del row["ms"], row["relative"], row["settings"]
        runs.append(rows)
    assert len(runs[0]) == 2 * (len(names) + 1)
    assert runs[0] == runs[1]
    assert all(len(row["curve"]) == 3 for row in runs[0])
    assert len({row["loss"] for row in runs[0]}) == len(runs[0]), "rows that do not differ tell nothing"


def test_rows_tell_of_what_they_were_made(small):
    """The versions, and the digests of the files that are read: not of one that happens to be called scratch."""
    Path("scratch").write_text("no base")
    save(tiny_gpt(vocab_size=2048).checkpoint(), "base.pt")
    for base, files in [("scratch", ["text.txt"]), ("base.pt", ["text.txt", "base.pt"])]:
        small("--methods", "lora,sora", "--json", f"{base}.jsonl", "--init", base)
        digests = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files}
        settings = [row["settings"] for row in rows_of(f"{base}.jsonl")]
        assert len(settings) == 2
        for row in settings:
            assert row["sha256"] == digests
            assert row["torch"] == torch.__version__
            assert row["python"] == sys.version


def test_the_shipped_base_needs_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short_text()
    for place, name in [(socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"),
                        (socket, "create_connection")]:
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("the network is asked"))
    flags = "--methods full,sora --steps 1 --batch-size 2 --block-size 32 --sample 2 --save out --json rows".split()
    monkeypatch.setattr(train_gpt, "TIMED", 1)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *SHORT, *flags])
    train_gpt.main()
    assert table_of(capsys.readouterr().out).keys() == {"method", "(base)", "full", "sora"}
    with pytest.raises(pytest.fail.Exception, match="asked"):
        http.client.HTTPSConnection("example.org").connect()


@pytest.mark.parametrize("name", sora.GPT2)
def test_gpt2_is_asked_for_over_https_and_in_one_revision(name, tmp_path, monkeypatch):
    asked = []

    def download(url, path, sha256):
        asked.append((url, sha256))
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match="cannot be downloaded"):
        GPT.from_pretrained(name)
    [(url, sha256)] = asked
    assert re.fullmatch(rf"https://huggingface\.co/openai-community/{name}/resolve/[0-9a-f]{{40}}/model\.safetensors",
                        url)
    assert re.fullmatch("[0-9a-f]{64}", sha256)


# ------------------------------------------------------------------------------------------------------------- the data


def test_data_is_what_its_readme_says():
    text = (HERE / "data/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\S+) \|.*`(\w{64})` \|$", text, re.MULTILINE)
    assert len(listed) == 4
    for name, digest in listed:
        assert hashlib.sha256((HERE / "data" / name).read_bytes()).hexdigest() == digest, name


def test_shipped_base():
    vocabulary = train_gpt.load_vocabulary(2048)
    text = torch.tensor(vocabulary.encode_ordinary((HERE / "data/austen.txt").read_text(encoding="utf-8")))
    windows = text[len(text) * 95 // 100:].unfold(0, 129, 128)[:234]  # (234, 129)
    base = GPT.from_pretrained(HERE / "data/base.pt")
    with torch.no_grad():
        losses = [base(w[:, :-1], w[:, 1:]).item() for w in windows.split(39)]
    assert len(losses) * 39 == len(windows)
    assert sum(losses) / len(losses) < 3.20
    assert (HERE / "data/base.pt").stat().st_size < 3.1e6
    assert sum(p.numel() for p in base.parameters()) == 1_468_416


def readme(i):
    """The i-th piece of Python in README."""
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)[i]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_every_command_in_readme_is_understood(tmp_path, monkeypatch):
    """Those in code and those within a text, as bash hands them on."""
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    indented = re.findall(r"^    .*?(python train_gpt\.py[^#\n]*)", text, re.MULTILINE)
    commands = indented + re.findall(r"`(python train_gpt\.py[^`]*)`", text)
    for command in commands:
        flags = command.replace("\n", " ").removeprefix("python train_gpt.py")
        given = subprocess.run(["bash", "-c", f"printf '%s\\n' {flags}"], capture_output=True, text=True, check=True)
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *given.stdout.split()])
        if "--help" not in flags and (train_gpt.find_spec("peft") or "peft-" not in flags):
            train_gpt.arguments()
    assert len(commands) >= 15
    print(f"{len(commands)} commands")


def test_the_rows_are_read_as_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--methods lora,sora --save out --json out/rows.jsonl".split()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *TINY, *flags])
    train_gpt.main()
    names = {}
    exec(readme(0), names)
    assert [row["method"] for row in names["rows"]] == ["lora", "sora"]


def test_the_code_in_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 32), "v_proj": nn.Linear(32, 16)})
    fresh = copy.deepcopy(model)
    exec(readme(1), {"model": model, "another_copy_of_the_base": fresh})
    assert type(model["q_proj"]) is type(fresh["k_proj"]) is nn.Linear
    assert type(fresh["v_proj"]) is SORALinear


def test_readme_adds_a_method_as_train_gpt_does(monkeypatch):
    code = readme(3)
    assert code.split("\n\n\n")[0] in (HERE / "train_gpt.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sora, "METHODS", dict(METHODS))
    exec(code, {"sora": sora})
    layer = trained(adapt(nn.Sequential(linear()), "postdiag", r=2)[0])
    torch.testing.assert_close(layer.merged_weight(), layer.d[:, None] * (layer.weight + layer.s * layer.B @ layer.A))


def test_readme_tells_when_to_choose_which(capsys):
    code = readme(4).replace('("W0 + BA", "diag(d) W0", "R W0", "R diag(d) W0")', '("R diag(d) W0",)')
    exec(code.replace("range(5)", "range(2)").replace("max_iter=300", "max_iter=60"), {})
    misfits = {line.split()[-4]: float(line.split()[-3]) for line in capsys.readouterr().out.splitlines()}
    assert misfits["sora"] < 0.05 < misfits["dora"] < 0.2
    assert misfits["lora"] > 0.6


@pytest.mark.parametrize("make", [lambda: llama(16), gpt2])
def test_readme_fine_tunes_a_model_of_transformers(make, tmp_path, monkeypatch):
    base, batch = make(), tokens(4, 8)
    monkeypatch.chdir(tmp_path)
    base.save_pretrained("base")
    exec(readme(2), {"name": "base", "batches": [batch] * 100})
    tuned = type(base).from_pretrained("tuned")
    assert tuned(batch, labels=batch).loss < base(batch, labels=batch).loss - 0.02
