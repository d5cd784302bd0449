"""Fine-tune a GPT with each method in turn and print loss, speed and the spectrum of the update side by side.

    python train_gpt.py                                    the shipped base on Shakespeare, 2 minutes on two cores
    python train_gpt.py --methods lora,sora --seeds 3      mean ± standard deviation over three seeds
    python train_gpt.py --init gpt2                        OpenAI's weights, downloaded once; meant for a GPU
    python train_gpt.py --init scratch --methods full --data data/austen.txt      pre-train a base

All methods start from the same base, see the same batches and are measured on the same validation windows. Times are
medians over steps taken in turn (lora dora lora dora ...), so that a busy machine slows all methods alike.
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
from contextlib import contextmanager
from importlib.util import find_spec

import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts a text into words

import sora

HERE = os.path.dirname(os.path.abspath(__file__))
METHODS = ["full", *sora.METHODS, "frozen", "peft-lora", "peft-dora"]
WARM_UP, TIMED = 2, 15  # rounds of the speed measurement: not counted, counted
WINDOWS = 512  # at most so many validation windows
POINTS, FLOOR = 8, 1e-4  # a spectrum is drawn by so many of its σ, over the largest, from FLOOR to 1
LIVE = sys.stdout.isatty()
UPDATES = 100 if LIVE else 5  # of the progress of each training run


# ---- The story


def main():
    args = arguments()
    base, vocabulary = load_base(args)
    data, windows = load_data(args, vocabulary)
    loss = evaluate(base, windows, args)
    announce(args, base, data, windows, loss)
    show_sample("(base)", base, windows, vocabulary, args)

    results = {"(random)" if args.random_weights else "(base)": [{"loss": loss}]}
    try:
        speed = measure_speed(base, data, args)
        for method in args.methods:
            results[method] = []
            for seed in range(args.seeds):
                row, model = fine_tune(base, method, seed, data, windows, args)
                row |= speed[method]
                results[method].append(row)
                write_row(row, args)
                say(f"{method:9} seed {seed}  validation loss {row['start']:.4f} -> {row['loss']:.4f}, {row['note']}")
                if math.isfinite(row["loss"]):
                    show_sample(method, model, windows, vocabulary, args)
                del model  # or it would be held while the next one trains
    finally:  # what has finished, also after Ctrl-C or where a method fails
        print_table(results)


def fine_tune(base, method, seed, data, windows, args):
    """Train a copy of the base with one method and one seed. Returns a row of the table and the model."""
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    model, forward, optimizer = set_up(base, method, seed, args)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = {"method": method, "seed": seed, "trainable": trainable, "start": evaluate(forward, windows, args)}

    for step, batch in enumerate(batches(data, seed, args), 1):
        loss = train_step(forward, optimizer, batch, learning_rate(step, args.lr[method], args), args)
        if step % max(1, args.steps // UPDATES) == 0:
            say(f"{method:9} seed {seed}  step {step:>5} of {args.steps}  loss {loss.item():.3f}", live=True)

    row["loss"] = evaluate(forward, windows, args)
    if args.device.type == "cuda":
        row["memory"] = torch.cuda.max_memory_allocated(args.device) / 2**20
    if not math.isfinite(row["loss"]):
        row["note"] = f"diverged: choose a lower rate than --lr {method}={args.lr[method]:g}"
    elif method.startswith("peft-"):
        row["note"] = "only measured: neither saved nor merged"
    else:
        row |= spectrum(base, model)
        saved = save(model, method, seed, args)
        row["merged"] = evaluate(sora.merge(model), windows, args)
        row["note"] = f"merged {row['merged']:.4f}{saved}"
    return row, model


def train_step(model, optimizer, batch, rate, args):
    """One optimiser step on a batch (B, T + 1); its loss stays on the device, so that nothing waits for it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch, args)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def learning_rate(step, peak, args):
    """A linear warm-up over the first twentieth of the steps, and a cosine from the peak down to a tenth of it."""
    warm_up = min(1, step / max(1, args.steps // 20))
    cosine = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / args.steps)
    return peak * warm_up * cosine


def set_up(base, method, seed, args):
    """Returns (model, forward, optimizer): forward is the model, compiled where that is asked for."""
    torch.manual_seed(seed)
    model = prepare(base, method, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim == 1]  # d and m, biases, ...: A, B, C, E may be drawn to 0, these not
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    forward = model
    if args.compile:
        torch._dynamo.config.recompile_limit = 1000  # peft's DoRA, with graph breaks, fills a cache that all share
        forward = torch.compile(model, fullgraph=not method.startswith("peft-"))
    return model, forward, optimizer


def prepare(base, method, args):
    """A copy of the base with an adapter. What the method leaves as it is, it shares with the base."""
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)

    model = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})  # which deepcopy takes as copied already
    if method == "frozen":  # without anything to train there would be no backward pass to measure
        model.transformer.wpe = copy.deepcopy(base.transformer.wpe).requires_grad_(True)
    elif method.startswith("peft-"):  # as that library does it, on the same layers
        from peft import LoraConfig, inject_adapter_in_model
        config = LoraConfig(r=args.r, lora_alpha=args.alpha, use_dora=method == "peft-dora",
                            target_modules=args.targets or ["c_attn", "c_proj", "c_fc"])
        inject_adapter_in_model(config, model)
    else:
        sora.adapt(model, method, args.r, args.alpha, args.r_p, args.targets, args.exact)
    return model


def batches(data, seed, args):
    """For each step (B, T + 1) tokens, drawn by a generator of their own: the same for all methods."""
    sequences = data.unfold(0, args.block_size + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(sequences), (args.steps, args.batch_size), generator=generator)
    for batch in starts.to(args.device):
        yield sequences[batch]


# ---- Measuring


def loss_of(model, batch, args):
    """Mean loss in nats per token of a batch (B, T + 1)."""
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return model(batch[:, :-1], batch[:, 1:])


def evaluate(model, windows, args):
    """Mean loss over windows (N, T + 1). A compiled model keeps gradients on, for it is compiled anew without them."""
    total = 0
    with torch.set_grad_enabled(args.compile):
        for batch in windows.split(args.batch_size):
            total += loss_of(model, batch, args).item() * len(batch)
    return total / len(windows)


def measure_speed(base, data, args):
    """For each method the median time of a training step, the methods taking turns."""
    runs = {method: set_up(base, method, 0, args) for method in args.methods}
    times = {method: [] for method in runs}
    batch = next(batches(data, 0, args))
    for i in range(WARM_UP + TIMED):
        if LIVE or i == 0:
            say(f"measuring speed: {WARM_UP + TIMED - i} rounds, one step of each method in turn", live=True)
        for method, (_, model, optimizer) in runs.items():
            begun = time.perf_counter()
            train_step(model, optimizer, batch, 0.0, args).item()  # rate 0; item waits for the device
            times[method].append(time.perf_counter() - begun)

    medians = {method: statistics.median(seconds[WARM_UP:]) for method, seconds in times.items()}
    say(f"training takes, without evaluation, about {sum(medians.values()) * args.steps * args.seeds / 60:.1f} minutes")
    speed = {}
    for method, median in medians.items():
        speed[method] = {"ms": 1e3 * median, "relative": median / medians.get("frozen", math.nan)}
    return speed


def spectrum(base, model):
    """Means over the layers that changed: ‖dW‖/‖W0‖, both entropies of dW, log10(σ / largest σ) at POINTS places."""
    rows = []
    for name, linear in base.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        layer = model.get_submodule(name)
        if hasattr(layer, "delta"):
            delta = layer.delta()
        elif linear is base.lm_head:  # most often the embedding
            continue
        else:
            delta = layer.weight.detach() - linear.weight
        change = (delta.norm() / linear.weight.norm()).item()
        if change > 0:
            sigma = torch.linalg.svdvals(delta.cpu())
            points = sigma[torch.linspace(0, len(sigma) - 1, POINTS).long()]
            logs = (points / sigma[0]).clamp_min(FLOOR).log10()
            rows.append([change, sora.svd_entropy(sigma, 2), sora.svd_entropy(sigma, 1), *logs.tolist()])
    if not rows:
        return {"change": 0.0}
    change, entropy2, entropy1, *logs = torch.tensor(rows).mean(0).tolist()
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
        fail(f"{flag}: {error}")


def number(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def count(text):
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def methods(text):
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}: choose from {','.join(METHODS)}")
        if name.startswith("peft-") and not find_spec("peft"):
            raise argparse.ArgumentTypeError(f"{name!r} needs the package peft: pip install peft")
    return names


def rates(text):
    """{method: rate} of "1e-2,full=2e-3": the rate of a part without a name is for all methods."""
    for_all, by_method = {}, {}
    for part in text.split(","):
        name, _, rate = part.rpartition("=")
        if name:
            methods(name)
            by_method[name] = number(rate)
        else:
            for_all = dict.fromkeys(METHODS, number(rate))
    return for_all | by_method


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = complain
    flag = p.add_argument
    flag("--init", default=os.path.relpath(f"{HERE}/data/base.pt"),
         help=f"a checkpoint, 'scratch', or one of {','.join(sora.GPT2)}, which bring defaults of their own")
    flag("--random-weights", action="store_true", help="gpt2's shape without its weights, to measure speed")
    flag("--n-layer", type=count, default=6, help="layers, with --init scratch")
    flag("--n-head", type=count, default=4, help="heads, with --init scratch")
    flag("--n-embd", type=count, default=128, help="width, with --init scratch")
    flag("--data", default=os.path.relpath(f"{HERE}/data/shakespeare.txt"), help="text; its last tenth validates")
    flag("--methods", type=methods, default="full,lora,dora,prediag,sora",
         help=f"of {','.join(METHODS)}: full trains all, frozen the positional embedding alone, for × frozen")
    flag("--targets", nargs="+", metavar="NAME", help="layers to adapt, by the ends of their names: c_attn mlp.c_proj")
    flag("--r", type=count, default=16, help="rank of the low-rank pair")
    flag("--alpha", type=number, default=32.0, help="the pair is scaled by alpha / r")
    flag("--r-p", type=count, default=4, help="rank of the pair that spans SORA's rotation")
    flag("--exact", action=argparse.BooleanOptionalAction, default=True,
         help="SORA's rotation; --no-exact is the authors' first-order one")
    flag("--steps", type=count, default=120, help="optimiser steps per method")
    flag("--batch-size", type=count, default=16, help="sequences per step")
    flag("--block-size", type=count, default=128, help="tokens per sequence")
    flag("--lr", type=rates, default="1e-2,full=2e-3,frozen=2e-3", help="peak learning rate, for all or by method")
    flag("--seeds", type=count, default=1, help="runs per method: more than one gives mean ± standard deviation")
    flag("--device", default=str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
         help="cpu, cuda, cuda:1, mps, ...")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
         help="of the matrix products: auto is bfloat16 on CUDA, else float32")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the models")
    flag("--save", metavar="DIR", default=None, help="for what is trained: adapters, or of full and frozen the model")
    flag("--json", metavar="FILE", default=None, help="to which each row is appended as a line, with all settings")
    flag("--sample", type=count, metavar="N", default=0, help="tokens of text by the base and by each tuned model")

    if p.parse_known_args()[0].init in sora.GPT2:
        gpu = torch.accelerator.is_available()
        p.set_defaults(block_size=1024, batch_size=16 if gpu else 1, steps=200, lr="2e-4,full=3e-5",
                       compile=torch.cuda.is_available())  # as LoRA's authors and nanoGPT tune GPT-2
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


def complain(message):
    fail(f"{message} (--help lists all flags)")


# ---- What is read and written


def load_base(args):
    """The model to start from, frozen, and its vocabulary."""
    with blame(f"--init {args.init}"):
        base = make_base(args)
        vocabulary = load_vocabulary(base.config.vocab_size)
        if base.config.vocab_size < vocabulary.n_vocab or base.config.block_size < args.block_size:
            raise ValueError(f"{base.config} is too small for {vocabulary.n_vocab} tokens, "
                             f"--block-size {args.block_size}")
    base.to(args.device).requires_grad_(False)
    for method in args.methods:
        if method in sora.METHODS:
            with blame(f"--methods {method}"):  # a dry run: what does not fit this base shall not show later
                prepare(base, method, args)
    return base, vocabulary


def make_base(args):
    torch.manual_seed(0)
    if args.random_weights and args.init not in sora.GPT2:
        raise ValueError(f"--random-weights is for {', '.join(sora.GPT2)}")
    if args.random_weights:
        return sora.GPT(sora.GPTConfig(1024, 50257, *sora.GPT2[args.init][:3]))
    if args.init == "scratch":
        return sora.GPT(sora.GPTConfig(args.block_size, 2048, args.n_layer, args.n_head, args.n_embd))
    return sora.GPT.from_pretrained(args.init)


def load_vocabulary(size):
    """GPT-2's, where the model has it and the network gives it, else its first 2,048 tokens, which are shipped."""
    if size >= 50257:
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError:
            say("offline: the text is cut by the first 2,048 tokens of GPT-2's vocabulary, losses are higher for it")
    sha256 = "cd379c37f6fc73a34f0572770d490c90ada3ec8b7a3d3e11b1df9fe2b9d1e2fd"
    ranks = load_tiktoken_bpe(f"{HERE}/data/gpt2-2048.tiktoken", sha256)
    return tiktoken.Encoding("gpt2-2048", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def load_data(args, vocabulary):
    """The tokens to train on, and windows (N, T + 1) to validate on, in whole batches where there are so many."""
    least = 10 * (args.block_size + 1)
    with blame(f"--data {args.data}"):
        with open(args.data, encoding="utf-8") as file:
            ids = vocabulary.encode_to_numpy(file.read(), disallowed_special=())
        if len(ids) < least:
            raise ValueError(f"too short: it has {len(ids)} tokens, --block-size {args.block_size} needs {least}")
    tokens = torch.from_numpy(ids.astype("int64")).to(args.device)
    data, held_out = tokens.tensor_split([len(tokens) * 9 // 10])

    windows = held_out.unfold(0, args.block_size + 1, args.block_size)  # (N, T + 1), each token predicted once
    n = min(WINDOWS, len(windows))
    if n > args.batch_size:
        n -= n % args.batch_size
    return data, windows[torch.linspace(0, len(windows) - 1, n).long()]


def save(model, method, seed, args):
    """Where --save is given: the adapter, or the whole model. Returns what to say of it."""
    if not args.save:
        return ""
    name = f"{method}-{seed}.pt" if args.seeds > 1 else f"{method}.pt"
    path = os.path.join(args.save, name)
    if method in sora.METHODS:
        sora.save(sora.adapter_state_dict(model), path)
    else:
        sora.save(model.checkpoint(), path)
    return f", saved as {path}"


def write_row(row, args):
    """Where --json is given: one more line, whole as soon as the row is there. NaN, which JSON lacks, becomes null."""
    if args.json:
        row = row | {"settings": vars(args) | {"torch": torch.__version__}}
        line = json.dumps(row, default=str)
        line = json.dumps(json.loads(line, parse_constant=nothing))
        with open(args.json, "a") as file:
            file.write(line + "\n")


def nothing(constant):
    return None


# ---- What is printed

COLUMNS = {  # title: the number of a row, its format
    "trainable": ("trainable", ",.0f"), "val loss": ("loss", ".3f"), "ms/step": ("ms", ".1f"),
    "× frozen": ("relative", ".2f"), "peak MiB": ("memory", ",.0f"), "‖dW‖": ("change", ".3f"),
    "H(σ²)": ("entropy2", ".3f"), "H(σ)": ("entropy1", ".3f"),
}
LEGEND = f"""
trainable  how many parameters are trained
val loss   in nats per token, over the same windows for all
ms/step    a whole training step, the median of {TIMED}, the methods taking turns
× frozen   the same over that of a model that trains nothing but its positional embedding
peak MiB   of the device's memory, while the method trained
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


def show_sample(name, model, windows, vocabulary, args):
    """The first sixteen tokens of the validation set and args.sample more, where some are asked for."""
    if args.sample:
        generator = torch.Generator(args.device).manual_seed(0)
        tokens = model.generate(windows[:1, :16], args.sample, 0.8, generator)[0]
        text = vocabulary.decode(tokens[tokens < vocabulary.n_vocab].tolist())
        say(f"--- {name}\n{text}\n---")


def announce(args, base, data, windows, loss):
    device = f"{torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    compiled = ", compiled: the first steps take long" if args.compile else ""
    lr = ", ".join(f"{method} {args.lr[method]:g}" for method in args.methods)
    say(f"device    {args.device}, {device}, torch {torch.__version__}, {args.dtype}{compiled}")
    say(f"base      {args.init}: {base.config}")
    say(f"data      {args.data}: {len(data):,} training tokens, {len(windows)} validation windows of {args.block_size}")
    say(f"training  {args.seeds} seed(s), {args.steps} steps of {args.batch_size} x {args.block_size} tokens, lr {lr}")
    say(f"start     validation loss {loss:.4f}, the base's: every method starts there\n")


def print_table(results):
    """Aligned columns of means over the seeds, without those that are empty, and what they mean."""
    table = [["method", *COLUMNS, "spectrum"]]
    for method, rows in results.items():
        if rows:
            cells = [cell(rows, key, form) for key, form in COLUMNS.values()]
            table.append([method, *cells, sparkline(rows)])
    columns = [column for column in zip(*table) if set(column[1:]) - {"-", ""}]
    say()
    for line in zip(*map(aligned, columns)):
        say("  ".join(line).rstrip())
    say(LEGEND)


def aligned(column):
    width = max(map(len, column))
    if column[0] in ("method", "spectrum"):
        return [cell.ljust(width) for cell in column]
    return [cell.rjust(width) for cell in column]


def cell(rows, key, form):
    values = [row.get(key, math.nan) for row in rows]
    if not all(map(math.isfinite, values)):
        return "-"
    text = f"{statistics.fmean(values):{form}}"
    if key == "loss" and len(values) > 1:
        text += f" ± {statistics.stdev(values):{form}}"
    return text


def sparkline(rows):
    """A bar for each point of the mean spectrum: log σ, from log FLOOR, drawn as a blank, to the largest."""
    spectra = [row["spectrum"] for row in rows if "spectrum" in row]
    bars = ""
    for logs in zip(*spectra):
        height = 8 - 8 * statistics.fmean(logs) / math.log10(FLOOR)
        bars += " ▁▂▃▄▅▆▇█"[round(height)]
    return bars


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where the encoding has no ‖ or no bars, the run should not end for that
    try:
        main()
    except KeyboardInterrupt:
        say("\ninterrupted")
        sys.exit(130)
