# SPDX-License-Identifier: MIT
"""Do adapters train in CUDA graphs as they do without? On an NVIDIA GPU: python data/results/graphs.py

GPT-2's smallest shape with random weights, 8 x 128 tokens in bfloat16, 50 steps of each method: eager, the whole model
compiled, each block compiled. It prints how far the losses are apart, the wait for the first step, the median step.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import train_gpt

WAYS = ("eager", "whole", "blocks")


def main():
    sys.argv[1:1] = ["--init", "12x12x768", "--batch-size", "8", "--steps", "50", "--block-size", "128"]
    args = train_gpt.arguments()
    base = train_gpt.load_base(args)
    data, _, _ = train_gpt.load_data(args, base.config.vocab_size)
    for row in args.rows:
        losses = {way: train(base, row, way, data, args) for way in WAYS}
        for way in WAYS[1:]:
            apart = max(abs(a - b) for a, b in zip(losses["eager"], losses[way]))
            print(f"{row['name']:9} {way:6} at most {apart:.4f} from eager", flush=True)


def train(base, row, way, data, args):
    torch.compiler.reset()
    args.compile = way == "whole"
    run = train_gpt.Run(base, row, 0, args)
    if way == "blocks":
        torch._dynamo.config.cache_size_limit = 64
        for block in run.model.transformer.h:
            block.compile(fullgraph=True, mode="reduce-overhead" if args.device.type == "cuda" else "default")
    begun = time.perf_counter()
    for step, batch in enumerate(train_gpt.batches(data, 0, args), 1):
        run.step(batch, step)
        if step == 1:
            wait = time.perf_counter() - begun
    ms = 1e3 * statistics.median(run.seconds[10:])
    print(f"{row['name']:9} {way:6} first step {wait:6.1f} s, then {ms:6.1f} ms", flush=True)
    return run.losses


if __name__ == "__main__":
    main()
