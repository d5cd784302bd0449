# SPDX-License-Identifier: MIT
"""Fine-tune a GPT with each method side by side and print loss, speed and the spectrum of the update.

    python train_gpt.py                                     the shipped base on Shakespeare, some minutes on two cores
    python train_gpt.py --methods lora,sora --seeds 3       means, and differences to LoRA with their errors
    python train_gpt.py --methods lora:r=21,sora:lr=5e-3    a row's own r, alpha, dropout, lr, for SORA r_p and exact
    python train_gpt.py --init gpt2                         OpenAI's weights, downloaded once; meant for a GPU
    python train_gpt.py --init 6x4x128 --methods full --data data/austen.txt --save out     pre-train a base

All methods train in lockstep: of each step there is one batch, and each method takes its step on it in turn. So they
see the same text, and a machine that is busy for a while slows all of them alike. Ctrl-C ends the training: each row is
judged where it stands, and the table printed; a second Ctrl-C ends at once.
"""
import argparse
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts a text into words

import sora

DATA = Path(__file__).resolve().parent / "data"
WARM_UP = 3  # steps that the median time leaves out
WINDOWS = 256  # at most so many validation windows
POINTS, FLOOR = 33, 1e-4  # a spectrum is kept as so many of its σ, evenly spread, over the largest, none below FLOOR
STEPS = {"small": 80, "large": 200}  # of a small model, and of one as wide as GPT-2
# learning rates, of a large model as LoRA's authors and nanoGPT tune it
RATES = {"small": {"full": 2.8e-3, "frozen": 2e-3, "adapter": 1e-2}, "large": {"full": 3e-5, "adapter": 2e-4}}
LIVE = getattr(sys.stdout, "isatty", bool)()  # a notebook's stdout need not have it


# ---- The story


def main():
    args = arguments()
    base = load_base(args)
    data, _, windows = load_data(args, base.config.vocab_size)
    start = evaluate(base, windows, args)
    announce(args, base, data, windows, start)
    rows = []
    try:
        for seed in range(args.seeds):
            if not args.stopped:
                train(base, seed, data, windows, args, rows)
    finally:  # what has finished, also where a row fails
        print_table(rows, start)


def train(base, seed, data, windows, args, rows):
    """All methods in lockstep, with one seed. Appends the numbers of each to rows. Ctrl-C ends the training alone."""
    runs = [Run(base, row, seed, args) for row in args.rows]
    try:
        for step, batch in enumerate(batches(data, seed, args), 1):
            for run in runs:
                run.step(batch, step)
            report(step, seed, runs, args)
    except KeyboardInterrupt:
        args.stopped = True
        say("\nstopped: each row is judged where it stands; Ctrl-C again ends at once")
    for run in runs:
        rows.append(run.finish(base, windows))
        write_row(rows[-1], args)


def batches(data, seed, args):
    """For each step (B, T + 1) tokens, drawn by a generator of their own."""
    sequences = data.unfold(0, args.block_size + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(sequences), (args.steps, args.batch_size), generator=generator)
    for batch in starts.to(args.device):
        yield sequences[batch]


class Run:
    """A row of the table with one seed: its model, its optimiser, what it has shown so far."""

    def __init__(self, base, row, seed, args):
        self.name, self.row, self.seed, self.args = row["name"], row, seed, args
        self.losses, self.seconds, self.lost = [], [], ""
        torch.manual_seed(seed)
        self.model = self.forward = prepare(base, row, args)
        if args.compile:
            self.forward = compiled(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, batch, step):
        """A step, unless the row is lost: it has diverged, or memory ran out."""
        if self.lost:
            return
        begun = time.perf_counter()
        try:
            loss = self.update(batch, learning_rate(step, self.row["lr"], self.args.steps))
        except (RuntimeError, MemoryError) as error:
            if not re.search("MemoryError|out of memory|alloc", repr(error)):  # as the kinds of machines say it
                raise
            self.lost = f"out of memory at step {step}: lower --batch-size or --block-size"
            self.model = self.forward = self.trained = self.optimizer = None  # for the others
            return
        self.seconds.append(time.perf_counter() - begun)
        self.losses.append(loss)
        self.lose_if_not_finite(loss, step)

    def update(self, batch, rate):
        """One optimiser step on a batch (B, T + 1). Returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(self.forward, batch, self.args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # a number, as a graph's output is overwritten; and it waits for the device

    def finish(self, base, windows):
        """The row's numbers: its settings, loss, speed, and the spectrum of its update."""
        ms = 1e3 * statistics.median(self.seconds[WARM_UP:] or [math.nan])
        found = self.row | {"seed": self.seed, "ms": ms, "train": self.losses, "loss": math.nan}
        if not self.lost:
            found["loss"] = evaluate(self.model, windows, self.args)
            self.lose_if_not_finite(found["loss"], len(self.losses))
        if self.lost:
            say(f"{self.name:9} seed {self.seed}  {self.lost}")
            return found | {"note": self.lost}

        found["note"] = f"stopped at step {len(self.losses)}" if self.args.stopped else ""
        found["trained"] = sum(p.numel() for p in self.trained)
        found |= spectrum(base, self.model)
        saved = save(self)
        found["merged"] = evaluate(sora.merge(self.model), windows, self.args)
        losses = f"validation loss {found['loss']:.4f}, merged {found['merged']:.4f}"
        say(f"{self.name:9} seed {self.seed}  {losses}{saved} {found['note']}".rstrip())
        return found

    def lose_if_not_finite(self, loss, step):
        if not math.isfinite(loss):
            self.lost = f"diverged at step {step}: lower its lr={self.row['lr']:g}"


def learning_rate(step, peak, steps):
    """A linear warm-up over the first twentieth of the steps, and a cosine from the peak down to a tenth of it."""
    warm_up = min(1, step / max(1, steps // 20))
    return peak * warm_up * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps))


def prepare(base, row, args):
    """A copy of the base that trains what the row says. What it leaves as it is, it shares with the base."""
    if row["method"] == "full":
        return copy.deepcopy(base).requires_grad_(True)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # the memo says: copied already
    if row["method"] == "frozen":  # all but its positional embedding, or there were no backward pass to compare with
        model.transformer.wpe = copy.deepcopy(base.transformer.wpe).requires_grad_(True)
        return model
    options = {key: row[key] for key in row if key in SETTINGS and key != "lr"}
    return sora.adapt(model, row["method"], targets=args.targets, **options)


def compiled(model):
    """On CUDA in graphs (reduce-overhead), which spare the processor the issuing of operations."""
    torch._dynamo.config.cache_size_limit = 64  # all rows compile the same lines; torch 2.6 has no recompile_limit
    return torch.compile(model, fullgraph=True, mode="reduce-overhead")


# ---- Measuring


def loss_of(model, batch, args):
    """Mean loss in nats per token of a batch (B, T + 1)."""
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return model(batch[:, :-1], batch[:, 1:])


@torch.no_grad()
def evaluate(model, windows, args):
    """Mean loss over windows (N, T + 1)."""
    total = 0
    for batch in windows.split(args.batch_size):
        total += loss_of(model, batch, args).item() * len(batch)
    return total / len(windows)


def spectrum(base, model):
    """Means over the layers that changed: ‖dW‖/‖W0‖, both entropies of dW, log10(σ / largest σ) at POINTS places."""
    found = []
    for name, linear in base.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        layer = model.get_submodule(name)
        if isinstance(layer, sora.LoRALinear):
            delta = layer.delta()
        elif linear is base.lm_head:  # the embedding too, whose update is no linear layer's
            continue
        else:
            delta = layer.weight.detach() - linear.weight
        change = delta.norm() / linear.weight.norm()
        if change > 0:
            sigma = torch.linalg.svdvals(delta if delta.is_cuda else delta.cpu())
            points = sigma[torch.linspace(0, len(sigma) - 1, POINTS).long()] / sigma[0]
            logs = points.clamp_min(FLOOR).log10().tolist()
            found.append([change.item(), sora.svd_entropy(sigma, 2), sora.svd_entropy(sigma, 1), *logs])
    if not found:
        return {}
    change, entropy2, entropy1, *logs = map(statistics.fmean, zip(*found))
    return {"change": change, "entropy2": entropy2, "entropy1": entropy1, "spectrum": logs}


# ---- What is asked for


def fail(message):
    print(f"train_gpt.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def blame(flag):
    """Turn an error into one line about this flag, and exit code 2."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        fail(f"{flag}: {error!s:.500}")


def positive(kind):
    """The type of a flag: a number of this kind, above 0"""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 10**9:
            raise argparse.ArgumentTypeError(f"{text!r:.50} is no {kind.__name__} above 0 and below 1e9")
        return value
    return parse


COUNT, NUMBER = positive(int), positive(float)
SETTINGS = {"r": COUNT, "alpha": NUMBER, "dropout": NUMBER, "r_p": COUNT, "exact": ["0", "1"].index, "lr": NUMBER}


def methods(text):
    """[{"name": "lora:r=21", "method": "lora", "r": 21}, ...] of "lora:r=21,...": the rows of the table."""
    rows = []
    for name in dict.fromkeys(text.split(",")):
        method, *settings = name.split(":")
        known = ["full", "frozen", *sora.METHODS]
        if method not in known:
            raise argparse.ArgumentTypeError(f"unknown method {method!r}: choose from {','.join(known)}")
        row = {"name": name, "method": method}
        keys = ["lr"]
        if method in sora.METHODS:
            _, *own = inspect.signature(sora.METHODS[method].start).parameters
            keys = ["r", "alpha", "dropout", *own, "lr"]
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in keys:
                raise argparse.ArgumentTypeError(f"{setting!r} is no setting of {method}: choose from {keys}")
            row[key] = SETTINGS[key](value)
        rows.append(row)
    return rows


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[1], usage="python train_gpt.py [flags]",
                                allow_abbrev=False, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                                    prog, max_help_position=34, width=120))
    p.error = lambda message: fail(f"{message} (--help lists all flags)")
    flag = p.add_argument
    flag("--init", default=DATA / "base.pt", help=f"a checkpoint, one of {','.join(GPT2)}, or a new one as 6x4x128")
    flag("--data", default=DATA / "shakespeare.txt", help="a text: 80 %% trains, the last 10 %% validates")
    flag("--methods", type=methods, dest="rows", help="the table's rows: full,lora:r=21,sora:r_p=2:exact=0,dora,...")
    flag("--targets", nargs="+", metavar="NAME", help="layers to adapt, by the ends of their names: c_attn mlp.c_proj")
    flag("--r", type=COUNT, default=16, help="rank of the low-rank pair (16)")
    flag("--alpha", type=NUMBER, default=32.0, help="the pair is scaled by alpha / r (32)")
    flag("--lr", type=NUMBER, help="peak learning rate of all rows (of each method its own)")
    flag("--steps", type=COUNT, help="optimiser steps (80, of a model of GPT-2's width 200)")
    flag("--batch-size", type=COUNT, default=16, help="sequences a step (16)")
    flag("--block-size", type=COUNT, help="tokens a sequence (the model's context, at most 1024)")
    flag("--seeds", type=COUNT, default=1, help="runs of each row: more than one gives errors (1)")
    flag("--device", help="cpu, cuda, cuda:1, mps (a GPU where there is one)")
    flag("--dtype", choices=["float32", "bfloat16"], help="of the products (on CUDA bfloat16, else float32)")
    flag("--compile", action="store_true", help="torch.compile, on CUDA with graphs: the first steps take long")
    flag("--save", metavar="DIR", help="for what is trained: adapters, or of full and frozen the model")
    flag("--json", metavar="FILE", help="to which each row is appended as a line, with all settings")
    args = p.parse_args()
    args.stopped = False
    equal = args.r + 5  # in a GPT, at which LoRA has the size of SORA
    args.rows = args.rows or methods(f"full,lora,lora:r={equal},dora,prediag,sora")
    found = "cpu"
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
    with blame(f"--device {args.device}"):
        args.device = torch.device(args.device or found)
        torch.zeros(1, device=args.device).item()  # "meta" cannot do this
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    with blame(f"--save {args.save}, --json {args.json}"):  # now, for it is too late when the work is done
        if args.save:
            os.makedirs(args.save, exist_ok=True)
        if args.json:
            open(args.json, "a").close()
    return args


# ---- What is read and written


def load_base(args):
    """The model to start from, frozen; and, now that its size is known, the defaults that go with it."""
    with blame(f"--init {args.init}"):
        base = load_gpt(args.init).requires_grad_(False)
        size = "large" if base.config.n_embd >= 768 else "small"
        args.steps = args.steps or STEPS[size]
        args.block_size = args.block_size or min(1024, base.config.block_size)
        if base.config.vocab_size < 256:
            raise ValueError(f"its vocabulary of {base.config.vocab_size} tokens is not GPT-2's")
        if args.block_size > base.config.block_size:
            raise ValueError(f"its context is {base.config.block_size} tokens: ask for a smaller --block-size")
    for row in args.rows:
        row.setdefault("lr", args.lr or RATES[size].get(row["method"], RATES[size]["adapter"]))
        if row["method"] in sora.METHODS:
            row.setdefault("r", args.r)
            row.setdefault("alpha", args.alpha)
        if row["method"] != "full":
            with blame(f"--methods {row['name']}"):  # a dry run, before anything is printed
                prepare(base, row, args)
    return base.to(args.device)


def load_data(args, vocab_size):
    """The tokens to train on, and two sets of windows (N, T + 1): to tune on, and to validate on."""
    vocabulary = load_vocabulary(vocab_size)
    least = 10 * (args.block_size + 1)
    with blame(f"--data {args.data}"), open(args.data, encoding="utf-8") as file:
        ids = vocabulary.encode_to_numpy(file.read(), allowed_special="all", disallowed_special=())
        if len(ids) < least:
            raise ValueError(f"too short: it has {len(ids)} tokens, --block-size {args.block_size} needs {least}")
    tokens = torch.from_numpy(ids.astype("int64")).to(args.device)
    n = len(tokens)
    data, tuning, final = tokens.tensor_split([n * 8 // 10, n * 9 // 10])
    return data, windows_of(tuning, args), windows_of(final, args)


def windows_of(tokens, args):
    """(N, T + 1), each token predicted once; at most WINDOWS, evenly spread"""
    windows = tokens.unfold(0, args.block_size + 1, args.block_size)
    return windows[torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).long()]


def load_vocabulary(size):
    """GPT-2's tokens, as many as the model has; its <|endoftext|> is one of them where the model has that"""
    ranks = load_tiktoken_bpe(str(DATA / "gpt2.tiktoken"), VOCABULARY)
    special = {"<|endoftext|>": len(ranks)} if size > len(ranks) else {}
    ranks = {token: rank for token, rank in ranks.items() if rank < size}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


VOCABULARY = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # sha256, as tiktoken itself pins it


def save(run):
    """Where --save is given: the adapter, or the whole model. Returns what to say of it."""
    if not run.args.save:
        return ""
    if run.row["method"] in sora.METHODS:
        state = sora.adapter_state_dict(run.model)
    else:
        state = {"config": dataclasses.asdict(run.model.config), "model": run.model.state_dict()}
    name = run.name.replace(":", "-")  # which not every system takes in a file's name
    path = os.path.join(run.args.save, f"{name}-{run.seed}.pt")
    with blame(f"--save {run.args.save}"):
        torch.save(state, f"{path}.{os.getpid()}.tmp")  # then a move: a half-written file never stands there
        os.replace(f"{path}.{os.getpid()}.tmp", path)
    return f", saved as {path}"


def write_row(row, args):
    """Where --json is given: a line, with all settings. NaN, which JSON lacks, becomes null."""
    if not args.json:
        return
    settings = vars(args) | {"rows": None, "torch": torch.__version__, "python": sys.version}
    line = json.dumps(row | {"settings": settings}, default=str)
    line = json.dumps(json.loads(line, parse_constant=lambda name: None))
    with blame(f"--json {args.json}"), open(args.json, "a") as file:
        file.write(f"{line}\n")


# ---- What is printed

COLUMNS = {  # title: the number of a row, its format
    "trained": ("trained", ",.0f"),
    "val loss": ("loss", ".3f"),
    "less lora": ("less", "+.3f"),
    "ms/step": ("ms", ".0f"),
    "×": ("ratio", ".2f"),
    "‖dW‖": ("change", ".3f"),
    "H(σ²)": ("entropy2", ".3f"),
    "H(σ)": ("entropy1", ".3f"),
}
LEGEND = f"""
val loss   in nats per token, over the same windows for all; ± is the standard error over the seeds
less lora  val loss less that of the row lora, seed by seed; ≈ where it is below two standard errors. Of
           one seed no error is known, and a difference may be luck: --seeds 5 tells
ms/step    the median of the training steps, the rows taking turns; ×: over that of the row named there
‖dW‖       ‖dW‖ / ‖W0‖ of the update dW = W' - W0; from here on means over the layers that changed
H(σ²)      entropy of p = σ²/Σσ² over ln min(out, in), σ the singular values of dW; 1 is uniform. It
           shows how many directions carry the energy, and hardly sees a long flat tail
H(σ)       the same of p = σ/Σσ: it counts the tail in full, so that a small diagonal raises it much
spectrum   log σ from the largest to the smallest, blank below {FLOOR:g} of the largest"""


def say(text="", live=False):
    """Print a line. On a terminal the next line takes the place of a live one."""
    end = "\n"
    if LIVE:
        if live:
            text = text[:shutil.get_terminal_size().columns - 1]
            end = ""
        text = f"\r\x1b[K{text}"
    print(text, end=end, flush=True)


def announce(args, base, data, windows, start):
    device = f"{torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    rates = ", ".join(f"{row['name']} {row['lr']:g}" for row in args.rows)
    say(f"device    {args.device}, {device}, torch {torch.__version__}, {args.dtype}")
    say(f"base      {args.init}: {base.config}")
    say(f"data      {args.data}: {len(data):,} training tokens, {len(windows)} validation windows of {args.block_size}")
    batch = f"{args.batch_size} x {args.block_size} tokens"
    say(f"training  {args.seeds} seed(s), {args.steps} steps of {batch}, lr {rates}")
    say(f"start     validation loss {start:.4f}, the base's: every method starts there\n")


def report(step, seed, runs, args):
    """All losses side by side: as they fall on a terminal, now and then into a pipe."""
    if LIVE or step % max(1, args.steps // 5) == 0:
        losses = "  ".join(f"{run.name} {run.losses[-1]:.3f}" for run in runs if run.losses)
        say(f"seed {seed}  step {step} of {args.steps}  {losses}", live=True)


def print_table(rows, start):
    """Aligned columns of means over the seeds, and what they mean."""
    groups = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    if not groups:
        return
    reference = "frozen" if "frozen" in groups else rows[0]["name"]
    table = [["method", *COLUMNS, "spectrum", ""], ["(base)", "-", f"{start:.3f}", *"------", "", ""]]
    for name, group in groups.items():
        for row, other in zip(group, groups[reference]):
            row["ratio"] = row["ms"] / other["ms"]
        for row, other in zip(group, groups.get("lora", [])):  # what a seed does to both rows alike cancels
            row["less"] = row["loss"] - other["loss"]
        cells = [cell(group, key, form) for key, form in COLUMNS.values()]
        notes = {row["note"]: None for row in group if row["note"]}
        table.append([name, *cells, sparkline(group), "; ".join(notes)])

    table[0][table[0].index("×")] = f"× {reference}"
    columns = [column for column in zip(*table) if set(column[1:]) - {"-", ""}]
    say()
    for line in zip(*map(aligned, columns)):
        say("  ".join(line).rstrip())
    say(LEGEND)


def aligned(column):
    width = max(map(len, column))
    if column[0] in ("method", "spectrum"):
        return [text.ljust(width) for text in column]
    return [text.rjust(width) for text in column]


def cell(group, key, form):
    """The mean over the seeds, of losses with its standard error"""
    values = [row.get(key, math.nan) for row in group]
    if not all(map(math.isfinite, values)):
        return "-"
    mean = statistics.fmean(values)
    text = f"{mean:{form}}"
    if len(values) > 1 and key in ("loss", "less"):
        error = statistics.stdev(values) / math.sqrt(len(values))
        text += f" ± {error:.3f}"
        if key == "less":
            text += " ≈" if abs(mean) < 2 * error else "  "
    return text


def sparkline(group):
    """Eight bars of the mean spectrum: log σ, from log FLOOR, drawn as a blank, to the largest."""
    spectra = [row["spectrum"] for row in group if "spectrum" in row]
    means = [statistics.fmean(logs) for logs in zip(*spectra)]
    if not means:
        return ""
    logs = [means[i * (POINTS - 1) // 7] for i in range(8)]
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 - 8 * log / math.log10(FLOOR))] for log in logs)


# ---- Checkpoints: GPT-2's released weights, nanoGPT's, our own

GPT2 = {  # the revision at huggingface.co/openai-community, and the sha256 of its model.safetensors
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
STORED_IN_OUT = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # by GPT-2
CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}


def load_gpt(name):
    """A GPT in float32 on the CPU. `name` is one in GPT2, downloaded once; or a path to GPT-2's layout (.safetensors,
    perhaps with a config.json beside it), to nanoGPT's ckpt.pt or to what --save wrote for full; or 6x4x128, layers x
    heads x width, for random weights. No code from a file is ever run. Raises OSError (the file cannot be had),
    ValueError (it is none of these), RuntimeError (tensors are amiss)."""
    shape = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)x([1-9]\d{0,4})", str(name))
    if shape:
        torch.manual_seed(0)
        return sora.GPT(sora.GPTConfig(128, 2048, *map(int, shape.groups())))
    path = download(name) if name in GPT2 else Path(name)
    try:
        if path.suffix == ".safetensors":
            config, state = of_gpt2(read_safetensors(path), path.with_name("config.json"))
        else:
            config, state = of_nanogpt(torch.load(path, "cpu", weights_only=True))
        with torch.device("meta"):
            model = sora.GPT(config)
    except OSError:
        raise
    except Exception as error:  # there are as many kinds as ways to be another file
        raise ValueError(f"{path} is no checkpoint of GPT-2, nanoGPT or this GPT: {error!r:.100}") from error
    model.load_state_dict(state, assign=True)
    if torch.equal(model.lm_head.weight, model.transformer.wte.weight):  # else the head was adapted and merged
        model.lm_head.weight = model.transformer.wte.weight
    return model


def download(name):
    """The path of GPT-2's model.safetensors, downloaded unless it is there already, its sha256 compared each time."""
    revision, sha256 = GPT2[name]
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
        raise ValueError(f"{path} has another sha256 than {sha256}: delete it, or give its path as that of any file")
    return path


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes for the length of a JSON header, the header, the raw tensors."""
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)  # mapped, not read
    start = 8 + int.from_bytes(bytes(raw[:8]), "little")
    header = json.loads(bytes(raw[8:start]))
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        content = raw[start + begin:start + end].clone()
        state[name] = content.view(CODES[entry["dtype"]]).view(entry["shape"])
    return state


def of_gpt2(file, beside):
    """(config, state) of GPT-2's layout: names without "transformer." perhaps, Conv1D's orientation, causal masks."""
    state = {}
    for name, p in file.items():
        if name.endswith(STORED_IN_OUT):
            p = p.T.contiguous()
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
            state[f"transformer.{name.removeprefix('transformer.')}"] = p.float()
    wte, wpe = state["transformer.wte.weight"], state["transformer.wpe.weight"]
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight", wte)

    told = {"activation_function": "gelu_new", "n_head": wte.shape[1] // 64}  # GPT-2's heads are 64 wide
    if beside.exists():
        told |= json.loads(beside.read_text())
    n_layer = len({name.split(".")[2] for name in state if ".h." in name})
    gelu = {"gelu_new": "tanh", "gelu": "none"}[told["activation_function"]]
    return sora.GPTConfig(len(wpe), len(wte), n_layer, told["n_head"], wte.shape[1], gelu), state


def of_nanogpt(file):
    """(config, state) of nanoGPT's layout, which is ours, with the exact GELU; perhaps with a prefix or masks, perhaps
    without biases; or of what --save wrote."""
    told = {"gelu": "none"} | (file.get("model_args") or file["config"])
    state = {}
    for name, p in file["model"].items():
        name = name.removeprefix("_orig_mod.")
        if name.endswith(".attn.bias"):  # a causal mask
            continue
        state[name] = p.float()
        if told.get("bias") is False and name.startswith(("transformer.h.", "transformer.ln_f")):
            state[name.removesuffix("weight") + "bias"] = torch.zeros(len(p))
    fields = {field.name for field in dataclasses.fields(sora.GPTConfig)}
    return sora.GPTConfig(**{key: value for key, value in told.items() if key in fields}), state


if __name__ == "__main__":
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # ‖, say; a notebook has no such call
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, head say, has enough
        os._exit(0)  # Python would flush once more, and complain
    except OSError as error:
        print(f"train_gpt.py: the output cannot be written: {error}", file=sys.stderr)
        os._exit(2)
