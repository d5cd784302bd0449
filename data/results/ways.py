# SPDX-License-Identifier: MIT
"""When does it pay to build W'? python data/results/ways.py

Forward and backward of one layer by weight, over the same by outputs, in turn: medians for each width and number of
tokens n, below 1 where W' pays.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import sora


def seconds(way, x):
    begun = time.perf_counter()
    way(x).sum().backward()
    return time.perf_counter() - begun


print("width     n  " + "  ".join(f"{method:>7}" for method in sora.METHODS))
for width in (128, 256, 512, 768, 1024):
    for n in (128, 512, 2048):
        ratios = []
        for cls in sora.METHODS.values():
            layer, x = cls(nn.Linear(width, width)), torch.randn(n, width, requires_grad=True)
            pairs = [(seconds(layer.by_weight, x), seconds(layer.by_outputs, x)) for _ in range(14)][3:]
            by_weight, by_outputs = map(statistics.median, zip(*pairs))
            ratios.append(by_weight / by_outputs)
        print(f"{width:5} {n:5}  " + "  ".join(f"{ratio:7.2f}" for ratio in ratios))
