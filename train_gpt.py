"""Fine-tune a GPT with each method in turn and print loss, speed and the spectrum of the update side by side.

    python train_gpt.py                                    the shipped base on Shakespeare, 2 minutes on two cores
    python train_gpt.py --methods lora,sora --seeds 3      mean ± standard deviation over three seeds
    python train_gpt.py --init gpt2                        OpenAI's weights, downloaded once; meant for a GPU
    python train_gpt.py --init scratch --methods full --data data/austen.txt      pre-train a base

All methods start from the same base, see the same batches and are measured on the same validation windows. Times are
medians over steps taken in turn (A B C A B C ...), so that a busy machine slows all methods alike.
"""
import argparse
import copy
import json
import math
import os
import shutil
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec

import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts a text into words

import sora

HERE = os.path.dirname(os.path.abspath(__file__))
VOCABULARY = "cd379c37f6fc73a34f0572770d490c90ada3ec8b7a3d3e11b1df9fe2b9d1e2fd"  # sha256 of data/gpt2-2048.tiktoken
METHODS = ["full", *sora.METHODS, "frozen", "peft-lora", "peft-dora"]
GPT2 = {"block_size": 1024, "batch_size": 16 if torch.accelerator.is_available() else 1, "steps": 200,
        "lr": "2e-4,full=3e-5", "compile": torch.cuda.is_available()}  # as LoRA's authors and nanoGPT tune GPT-2
WARM_UP, TIMED = 2, 15  # rounds of the speed measurement: not counted, counted
WINDOWS = 512  # at most so many validation windows
POINTS, FLOOR = 16, 1e-4  # a spectrum: POINTS of its σ over the largest σ, cut off at FLOOR
LIVE, WIDTH = sys.stdout.isatty(), shutil.get_terminal_size(fallback=(120, 24)).columns


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
        fail(f"{flag}: {error}")


def number(text, kind=float):
    with suppress(ValueError):
        if 0 < (value := kind(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number above 0")


def methods(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}: choose from {','.join(METHODS)}")
    if "peft" in text and not find_spec("peft"):
        raise argparse.ArgumentTypeError(f"{text!r} needs the package peft: pip install peft")
    return list(dict.fromkeys(names))


def rates(text):
    """{method: rate} of "1e-2,full=2e-3": the rate of a part without a name is for all methods."""
    parts = sorted((part.rpartition("=") for part in text.split(",")), key=lambda part: part[0] != "")
    return {method: number(rate) for name, _, rate in parts for method in (methods(name) if name else METHODS)}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count = p.add_argument, partial(number, kind=int)
    add("--init", default=os.path.relpath(f"{HERE}/data/base.pt"),
        help=f"a checkpoint, 'scratch', or one of {','.join(sora.GPT2)}, which bring defaults of their own")
    add("--random-weights", action="store_true", help="gpt2's shape without its weights, to measure speed")
    add("--no-check", action="store_true", help="load gpt2's file without comparing its sha256")
    add("--n-layer", type=count, default=6, help="layers, with --init scratch")
    add("--n-head", type=count, default=4, help="heads, with --init scratch")
    add("--n-embd", type=count, default=128, help="width, with --init scratch")
    add("--data", default=os.path.relpath(f"{HERE}/data/shakespeare.txt"), help="text; its last tenth validates")
    add("--methods", type=methods, default="full,lora,dora,prediag,sora",
        help=f"of {','.join(METHODS)}: full trains every parameter, frozen only the positional embedding")
    add("--steps", type=count, default=120, help="optimiser steps per method")
    add("--batch-size", type=count, default=16, help="sequences per step")
    add("--block-size", type=count, default=128, help="tokens per sequence")
    add("--lr", type=rates, default="1e-2,full=2e-3,frozen=2e-3", help="peak learning rate, for all or by method")
    add("--r", type=count, default=16, help="rank of the low-rank pair")
    add("--alpha", type=number, default=32.0, help="the pair is scaled by alpha / r")
    add("--r-p", type=count, default=4, help="rank of the pair that spans SORA's rotation")
    add("--seeds", type=count, default=1, help="runs per method: more than one gives mean ± standard deviation")
    add("--device", default=str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        help="cpu, cuda, cuda:1, mps, ...")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the matrix products: auto is bfloat16 on CUDA, else float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the models")
    add("--save", metavar="DIR", default=None, help="for what is trained: adapters, of full and frozen the whole model")
    add("--json", metavar="FILE", default=None, help="for all rows and settings")
    add("--sample", type=count, metavar="N", default=0, help="tokens of text by the base and by each tuned model")
    p.error = lambda message: fail(f"{message} (--help lists all flags)")
    if p.parse_known_args()[0].init in sora.GPT2:
        p.set_defaults(**GPT2)
    args = p.parse_args()
    args.lr = rates(p.get_default("lr")) | args.lr
    with blame(f"--device {args.device}"):
        args.device = torch.zeros(1, device=args.device).device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.type == "cuda" else "float32"
    with blame(f"--save {args.save}, --json {args.json}"):  # now, for it is too late when the work is done
        os.makedirs(args.save or ".", exist_ok=True)
        open(args.json or os.devnull, "a").close()
    return args


def load_base(args):
    """The base, its vocabulary, and what is special about them."""
    torch.manual_seed(0)
    if args.random_weights and args.init not in sora.GPT2:
        raise ValueError(f"--random-weights is for {', '.join(sora.GPT2)}")
    if args.random_weights:
        base = sora.GPT(sora.GPTConfig(1024, 50257, *sora.GPT2[args.init][:3]))
    elif args.init == "scratch":
        base = sora.GPT(sora.GPTConfig(args.block_size, 2048, args.n_layer, args.n_head, args.n_embd))
    else:
        base = sora.GPT.from_pretrained(args.init, check=not args.no_check)
    note = ", random weights (only speed means something)" * args.random_weights
    ranks = load_tiktoken_bpe(f"{HERE}/data/gpt2-2048.tiktoken", VOCABULARY)
    vocabulary = tiktoken.Encoding("gpt2-2048", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    if base.config.vocab_size >= 50257:
        try:
            vocabulary = tiktoken.get_encoding("gpt2")
        except OSError:
            note += ", text cut by the first 2,048 tokens of its vocabulary (offline): losses are higher than they are"
    if base.config.vocab_size < vocabulary.n_vocab or base.config.block_size < args.block_size:
        raise ValueError(f"{base.config} is too small for {vocabulary.n_vocab} tokens, --block-size {args.block_size}")
    return base.to(args.device), vocabulary, note


def load_data(args, vocabulary):
    """The tokens to train on, and windows (N, T + 1) to validate on, in whole batches where there are so many."""
    with open(args.data, encoding="utf-8") as file:
        tokens = torch.from_numpy(vocabulary.encode_to_numpy(file.read(), disallowed_special=()).astype("int64"))
    if len(tokens) < (least := 10 * (args.block_size + 1)):
        raise ValueError(f"too short: it has {len(tokens)} tokens, --block-size {args.block_size} needs {least}")
    data, held_out = tokens.to(args.device).tensor_split([len(tokens) * 9 // 10])
    windows = held_out.unfold(0, args.block_size + 1, args.block_size)  # (N, T + 1), each token predicted once
    n = min(WINDOWS, len(windows))
    return data, windows[torch.linspace(0, len(windows) - 1, n - n % args.batch_size or n).long()]


# ---- Training and measuring
class Run:
    """A copy of the base made ready for one method, with its optimiser."""

    def __init__(self, base, method, seed, args):
        self.args, self.model = args, copy.deepcopy(base)
        torch.manual_seed(seed)
        if method in sora.METHODS:
            sora.adapt(self.model, method, args.r, args.alpha, args.r_p)
        elif method.startswith("peft-"):  # as that library does it, on the same layers
            from peft import LoraConfig, inject_adapter_in_model
            inject_adapter_in_model(LoraConfig(r=args.r, lora_alpha=args.alpha, use_dora=method == "peft-dora",
                                               target_modules=["c_attn", "c_proj", "c_fc"]), self.model)
        elif method == "frozen":
            self.model.requires_grad_(False).transformer.wpe.requires_grad_(True)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
                module.to(getattr(torch, args.dtype))  # once, not at every use; our layers build W' from float32
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in self.trained if (p.ndim > 1) == matrix], "weight_decay": 0.1 * matrix}
                  for matrix in (True, False)]  # no decay for biases, LayerNorms, d and m
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.forward = self.model
        if args.compile:
            torch._dynamo.config.recompile_limit = 1000  # peft's DoRA, in pieces, fills the cache that all share
            self.forward = torch.compile(self.model, fullgraph=not method.startswith("peft-"))

    def step(self, batch, rate):
        """One optimiser step on a batch (B, T + 1); its loss stays on the device, so that nothing waits for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.forward, batch, self.args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def loss_of(model, batch, args):
    """Mean loss in nats per token of a batch (B, T + 1)."""
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return model(batch[:, :-1], batch[:, 1:])


def evaluate(model, windows, args):
    """The same over windows (N, T + 1). A compiled model keeps gradients on, for it is compiled anew without them."""
    with torch.set_grad_enabled(args.compile):
        return sum(loss_of(model, w, args).item() * len(w) for w in windows.split(args.batch_size)) / len(windows)


def sample(model, windows, args):
    """The first sixteen tokens of the validation set and args.sample more, where some are asked for."""
    generator = torch.Generator(args.device).manual_seed(0)
    return args.sample and model.generate(windows[:1, :16], args.sample, 0.8, generator)[0].tolist()


def batches(data, seed, args):
    """For each step (B, T + 1) tokens, drawn by a generator of their own: the same for all methods."""
    sequences, generator = data.unfold(0, args.block_size + 1, 1), torch.Generator().manual_seed(seed)
    for starts in torch.randint(len(sequences), (args.steps, args.batch_size), generator=generator).to(args.device):
        yield sequences[starts]


def measure_speed(runs, data, args):
    """For each method the median time of a training step, the methods taking turns."""
    times, batch = {method: [] for method in runs}, next(batches(data, 0, args))
    for i in range(WARM_UP + TIMED):
        if LIVE or i == 0:
            say(f"measuring speed: {WARM_UP + TIMED - i} rounds, one step of each method in turn"
                + ", the first to compile them" * args.compile, live=True)
        for method, run in runs.items():
            start = time.perf_counter()
            run.step(batch, 0.0).item()  # waits for the device
            times[method].append(time.perf_counter() - start)
    medians = {method: statistics.median(t[WARM_UP:]) for method, t in times.items()}
    return {method: {"ms": 1e3 * s, "speed": batch[:, 1:].numel() / s, "relative": s / medians.get("frozen", math.nan)}
            for method, s in medians.items()}


def spectrum(base, model):
    """Means over the linear layers: ‖dW‖/‖W0‖, both entropies of dW and its log10(σ / largest σ) at POINTS points."""
    rows = []
    for name, linear in base.named_modules():
        if isinstance(linear, torch.nn.Linear) and linear is not base.lm_head:
            layer = model.get_submodule(name)
            W = layer.weight.detach()
            delta = layer.delta() if hasattr(layer, "delta") else (W - linear.weight.to(W.dtype)).float()
            sigma = torch.linalg.svdvals(delta.cpu())
            points = (sigma / sigma[0]).clamp_min(FLOOR).log10()[torch.linspace(0, len(sigma) - 1, POINTS).long()]
            change = delta.norm() / linear.weight.norm()
            rows.append([change.item(), sora.svd_entropy(sigma, 2), sora.svd_entropy(sigma, 1), *points.tolist()])
    change, energy, plain, *points = map(statistics.fmean, zip(*rows))
    return {"change": change, "entropy2": energy, "entropy1": plain, "spectrum": points}


def train(base, method, seed, data, windows, args):
    """Fine-tune with one method and one seed, measure, save, merge; returns the numbers."""
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run, n = Run(base, method, seed, args), args.steps
    name, trainable = f"{method:8} seed {seed}", sum(p.numel() for p in run.trained)
    result = {"method": method, "seed": seed, "trainable": trainable, "start": evaluate(run.forward, windows, args),
              "share": 100 * trainable / sum(p.numel() for p in base.parameters())}
    begun = time.perf_counter()
    for i, batch in enumerate(batches(data, seed, args), 1):
        share = min(1, i / max(1, n // 20)) * (0.55 + 0.45 * math.cos(math.pi * (i - 1) / n))
        loss = run.step(batch, args.lr[method] * share)  # a linear warm-up over a twentieth, a cosine down to a tenth
        if i % max(1, n // (100 if LIVE else 5)) == 0:
            left = round((time.perf_counter() - begun) / i * (n - i))
            say(f"{name}  step {i:>5} of {n}  loss {loss.item():.3f}  {left // 60}:{left % 60:02} left", live=True)
    result["memory"] = torch.cuda.max_memory_allocated() / 2**20 or math.nan  # nan without CUDA: no column
    result |= {"loss": evaluate(run.forward, windows, args), "note": ""}
    if not math.isfinite(result["loss"]):
        result["note"] = f"diverged: choose a lower rate than --lr {method}={args.lr[method]:g}"
    elif method.startswith("peft-"):
        result["note"] = "only measured: neither saved nor merged"
    else:
        result |= spectrum(base, run.model)
        if args.save:
            path = os.path.join(args.save, f"{method}-{seed}.pt" if args.seeds > 1 else f"{method}.pt")
            sora.save(sora.adapter_state_dict(run.model) if method in sora.METHODS else run.model.checkpoint(), path)
            result["note"] = f", saved as {path}"
        result["merged"] = evaluate(sora.merge(run.model), windows, args)
        result["note"] = f"merged {result['merged']:.4f}{result['note']}"
        result["text"] = sample(run.model.float(), windows, args)
    return result


# ---- What is printed
COLUMNS = {"trainable": ("trainable", ",.0f"), "%": ("share", ".2f"), "val loss": ("loss", ".3f"),
           "merged": ("merged", ".3f"), "ms/step": ("ms", ".1f"), "× frozen": ("relative", ".2f"),
           "tok/s": ("speed", ",.0f"), "peak MB": ("memory", ",.0f"), "‖dW‖/‖W0‖": ("change", ".3f"),
           "H(σ²)": ("entropy2", ".3f"), "H(σ)": ("entropy1", ".3f")}
LEGEND = f"""
val loss in nats per token, merged: as plain layers. ms/step: median of {TIMED} steps, methods taking turns.
H(σ²), H(σ): entropy of the singular values of dW = W' - W0 over ln min(out, in), of p = σ²/Σσ² and p = σ/Σσ; 1 is
uniform. H(σ²) shows how many directions carry the energy and hardly sees a long flat tail; H(σ) counts the tail in
full, so a small diagonal on a low-rank update raises it much. spectrum: log σ, blank below {FLOOR:g} of the largest."""


def say(text="", live=False):
    """Print a line. On a terminal the next line takes the place of a live one."""
    if LIVE:
        text = "\r\x1b[K" + (text[:WIDTH - 1] if live else text)
    print(text, end="" if LIVE and live else "\n", flush=True)


def mean(rows, key, form):
    values = [row.get(key, math.nan) for row in rows]
    if math.isnan(sum(values)):
        return "-"
    spread = f" ± {statistics.stdev(values):{form}}" if key == "loss" and len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def sparkline(rows):
    """A bar for each point of the mean spectrum: log σ, from log FLOOR, drawn as a blank, to the largest."""
    means = map(statistics.fmean, zip(*(row.get("spectrum", []) for row in rows)))
    return "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * (1 - log / math.log10(FLOOR)) - 0.1)] for log in means if log == log)


def print_table(results):
    """Aligned columns of means over the seeds; what does not fit the terminal follows below, beside the names again."""
    columns = [["method", *results], *([title, *(mean(rows, *form) for rows in results.values())]
               for title, form in COLUMNS.items()), ["spectrum", *map(sparkline, results.values())]]
    blocks = [[]]
    for column in [column for column in columns if {*column[1:]} - {"-", ""}]:  # without empty ones
        side = "<" if column[0] in ("method", "spectrum") else ">"
        cells = [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        if len("  ".join(other[0] for other in [*blocks[-1], cells])) > WIDTH:
            blocks.append([blocks[0][0]])
        blocks[-1].append(cells)
    for block in blocks:
        say("\n" + "\n".join("  ".join(line).rstrip() for line in zip(*block)))


def main():
    sys.stdout.reconfigure(errors="replace")  # where the encoding has no ‖ or no bars, the run should not end for that
    args = arguments()
    with blame(f"--init {args.init}"):
        base, vocabulary, note = load_base(args)
    with blame(f"--data {args.data}"):
        data, windows = load_data(args, vocabulary)
    with blame(f"--r {args.r}"):
        runs = {method: Run(base, method, 0, args) for method in args.methods}
    label, loss = "(random)" if args.random_weights else "(base)", evaluate(base, windows, args)
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(f"device    {args.device}, {device}, torch {torch.__version__}, {args.dtype}" + ", compiled" * args.compile)
    say(f"base      {args.init}: {', '.join(f'{key} {value}' for key, value in vars(base.config).items())}{note}")
    say(f"data      {args.data}: {len(data):,} training tokens, {len(windows)} validation windows of {args.block_size}")
    say(f"training  {args.steps} steps of {args.batch_size} x {args.block_size} tokens, {args.seeds} seed(s), AdamW at "
        + ", ".join(f"{method} {args.lr[method]:g}" for method in args.methods))
    say(f"start     validation loss {loss:.4f}, the base's: every adapter starts as the identity\n")
    results = {label: [{"trainable": 0, "share": 0.0, "loss": loss, "text": sample(base, windows, args)}]}
    try:
        speed = measure_speed(runs, data, args)
        runs.clear()
        minutes = sum(speed[method]["ms"] for method in args.methods) * args.steps * args.seeds / 6e4
        say(f"training takes about {minutes:.1f} minutes")
        for method in args.methods:
            for seed in range(args.seeds):
                result = train(base, method, seed, data, windows, args) | speed[method]
                results[method] = results.get(method, []) + [result]  # first, for an interrupt after its line
                say(f"{method:8} seed {seed}  validation loss {result['start']:.4f} -> {result['loss']:.4f}, "
                    + result["note"])
    finally:  # what has finished, also after Ctrl-C or where a method fails
        if args.json:  # under a temporary name first, and without NaN, which is no JSON
            report = {"settings": vars(args) | {"torch": torch.__version__}, "results": results}
            report = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
            with open(f"{args.json}.tmp", "w") as file:
                json.dump(report, file, indent=1)
            os.replace(f"{args.json}.tmp", args.json)
        print_table(results)
        say(LEGEND)
    for method, rows in results.items():
        if rows[0].get("text"):
            say(f"\n--- {method}\n{vocabulary.decode(rows[0]['text'])}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("\ninterrupted")
        sys.exit(130)
