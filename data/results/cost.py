# SPDX-License-Identifier: MIT
"""What a step costs: pip install peft && python data/results/cost.py --shape gpt2

A GPT of this shape with random weights is trained with each method, with peft's layers, frozen and in full. All take
their steps in turn, in one process, in three rounds; with --compile as train_gpt.py compiles them, but peft's DoRA in
pieces. On CUDA, if not compiled, each has been alone before, for its peak of memory. After each round a line for each
row is appended to cost.jsonl beside this script; tables.py prints the tables.
"""
import argparse
import functools
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import peft
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import sora
import train_gpt

SHAPES = {  # and the sequences of a batch
    "small": (sora.GPTConfig(128, 2048, n_layer=6, n_head=4, n_embd=128), 16),  # as data/base.pt
    "gpt2": (sora.GPTConfig(), 16),
    "gpt2-xl": (sora.GPTConfig(n_layer=48, n_head=25, n_embd=1600), 4),
}
ROUNDS = 3


def peft_layer(linear, r, alpha, use_dora):
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], use_dora=use_dora)
    return peft.inject_adapter_in_model(config, torch.nn.Sequential(linear))[0]


for name, use_dora in {"peft-lora": False, "peft-dora": True}.items():
    sora.METHODS[name] = functools.partial(peft_layer, use_dora=use_dora)


def main():
    args = arguments()
    rows = [{"name": name, "method": name, "r": 16, "alpha": 32, "lr": 1e-4} for name in ["frozen", *args.methods]]
    peaks = [peak(row, args) for row in rows]
    base = new_base(args)
    runs = [train_gpt.Run(base, row, 0, args) for row in rows]
    for run in runs:
        if args.compile and run.name == "peft-dora":
            run.forward = torch.compile(run.model, mode="reduce-overhead")  # it is no full graph
        try:
            take_turns([run], train_gpt.WARM_UP, args)
        except RuntimeError as error:  # one that does not compile must not cost the others
            run.lost = f"{error!r:.200}"
    for _ in range(ROUNDS):
        for run, memory, ms in zip(runs, peaks, take_turns(runs, args.steps, args)):
            write(run, memory, ms, args)


def new_base(args):
    torch.manual_seed(0)
    with args.device:
        return sora.GPT(args.config).requires_grad_(False)


def peak(row, args):
    """MiB on the card where nothing else is there; None where it cannot be told"""
    if args.device.type != "cuda" or args.compile:
        return None
    run = train_gpt.Run(new_base(args), row, 0, args)
    gc.collect()
    take_turns([run], 1, args)  # which makes the optimiser's state
    torch.cuda.reset_peak_memory_stats()
    take_turns([run], 1, args)
    return None if run.lost else torch.cuda.max_memory_allocated() / 2**20


def take_turns(runs, steps, args):
    """The median ms of each; None for a run that is lost"""
    shape = args.batch_size, args.config.block_size + 1
    for number in range(1, steps + 1):
        batch = torch.randint(args.config.vocab_size, shape, device=args.device)
        for run in runs:
            run.step(batch, number)
    return [None if run.lost else 1e3 * statistics.median(run.seconds[-steps:]) for run in runs]


def write(run, memory, ms, args):
    row = {
        "call": args.call,
        "shape": args.shape,
        "way": "compiled" if args.compile else "eager",
        "name": run.name,
        "trained": None if run.lost else sum(p.numel() for p in run.trained),
        "ms": ms,
        "peak_MiB": memory,
        "note": run.lost,
        "device": args.chip,
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
    with open(HERE / "cost.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(run.name, ms, memory, run.lost, flush=True)


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    flag = p.add_argument
    flag("--shape", choices=SHAPES, default="small")
    flag("--compile", action="store_true")
    flag("--steps", type=int, default=15, help="of each round (15)")
    flag("--methods", type=lambda text: text.split(","), default=["full", *sora.METHODS], help="beside frozen (all)")
    args = p.parse_args()
    args.config, args.batch_size = SHAPES[args.shape]
    args.targets, args.call = None, time.ctime()
    args.device, args.dtype = torch.device("cpu"), "float32"
    args.chip = f"{torch.get_num_threads()} threads of a CPU"
    if torch.cuda.is_available():
        args.device, args.dtype, args.chip = torch.device("cuda"), "bfloat16", torch.cuda.get_device_name()
    return args


if __name__ == "__main__":
    main()
