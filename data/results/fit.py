# SPDX-License-Identifier: MIT
"""When to choose which: python data/results/fit.py

One layer of each method, all of about one size, is fitted to targets W* that are made in the methods' own forms. Prints
what is left of ‖W0 − W*‖, as a Markdown table: mean ± standard deviation over five seeds.
"""
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from sora import METHODS, rotation

RANKS = {"lora": 6, "dora": 5, "prediag": 5, "sora": 1}  # 704 parameters, LoRA 768
TARGETS = ["W0 + BA", "diag(d) W0", "R W0", "R diag(d) W0"]


def wanted(W0):
    """{target: W*}"""
    n = len(W0)
    B, A = torch.randn(n, 5).to(W0), torch.randn(5, n).to(W0)
    d = 1 + 0.3 * torch.randn(n, 1).to(W0)
    C, E = torch.randn(2, n, 4).to(W0) / n**0.5
    K, V = rotation(C, E)
    R = torch.eye(n).to(W0) + K @ V.T
    return {"W0 + BA": W0 + B @ A / n, "diag(d) W0": d * W0, "R W0": R @ W0, "R diag(d) W0": R @ (d * W0)}


def misfit(target, method, seed):
    """‖W' − W*‖ / ‖W0 − W*‖ of the W' nearest to the target W*"""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(64, 64, bias=False).double()
    W0 = linear.weight.detach()
    W = wanted(W0)[target]
    layer = METHODS[method](linear, r=RANKS[method], alpha=RANKS[method])
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=300, line_search_fn="strong_wolfe", tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        loss = (layer.weight - W).square().sum() / (W0 - W).square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    return loss().item() ** 0.5


def main():
    print("| target |", " | ".join(f"{method}, r = {r}" for method, r in RANKS.items()), "|")
    print("|---" * (1 + len(RANKS)) + "|")
    for target in TARGETS:
        cells = [target]
        for method in RANKS:
            misfits = [misfit(target, method, seed) for seed in range(5)]
            cells.append(f"{statistics.fmean(misfits):.3f} ± {statistics.stdev(misfits):.3f}")
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
