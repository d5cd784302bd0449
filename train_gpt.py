"""Fine-tune a GPT with each method in turn and print loss, speed and the spectrum of the update side by side.

    python train_gpt.py                                    the shipped base on Shakespeare, 3 minutes on two cores
    python train_gpt.py --methods lora,sora --seeds 3      means and differences to LoRA, with their errors
    python train_gpt.py --methods lora:r=21,sora:lr=5e-3   settings of a row's own
    python train_gpt.py --init gpt2                        OpenAI's weights, downloaded once; meant for a GPU
    python train_gpt.py --init scratch --methods full --data data/austen.txt      pre-train a base

All methods start from the same base, see the same batches and are measured on the same validation windows. Times are
medians over steps taken in turn (lora dora lora dora ...), so that a busy machine slows all methods alike.
"""
import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts a text into words

import sora

HERE = os.path.dirname(os.path.abspath(__file__))
WARM_UP, TIMED = 2, 15  # rounds of the speed measurement: not counted, counted
WINDOWS = 512  # at most so many validation windows
POINTS, FLOOR = 8, 1e-4  # a spectrum is drawn by so many of its σ, over the largest, from FLOOR to 1
LIVE = sys.stdout.isatty()
UPDATES = 100 if LIVE else 5  # of the progress of each training run


# ---- Two more methods, as controls: the cells that the paper's table of placement and kind leaves empty


class PostDiagLinear(sora.PreDiagLinear):
    """W' = diag(d) (W0 + sBA): a diagonal after the update, as in DoRA, but learned without a norm"""

    method = "postdiag"
    before = sora.LoRALinear.before

    def after(self, y):
        return sora.scaled(y, self.d)


class RotationLinear(sora.SORALinear):
    """W' = R (W0 + sBA): SORA without its diagonal"""

    method = "rotation"
    before = sora.LoRALinear.before

    def __init__(self, linear, r=16, alpha=32, r_p=4, exact=True):
        super().__init__(linear, r, alpha, r_p, exact)
        self.d.requires_grad_(False)  # it stays 1


sora.METHODS |= {"postdiag": PostDiagLinear, "rotation": RotationLinear}
METHODS = ["full", *sora.METHODS, "frozen", "peft-lora", "peft-dora"]


# ---- The story


def main():
    args = arguments()
    base, vocabulary = load_base(args)
    data, windows = load_data(args, vocabulary)
    loss = evaluate(base, windows, args)
    if not math.isfinite(loss):
        fail(f"--init {args.init}: its validation loss is {loss}: choose another base, or --dtype float32")
    announce(args, base, data, windows, loss)
    show_sample("(base)", base, windows, vocabulary, args)

    start = "(random)" if args.random_weights else "(base)"
    results = {start: [{"loss": loss}]}
    try:
        speed = measure_speed(base, data, args)
        for run in runs(args):
            results[run.name] = []
            for seed in range(args.seeds):
                row, model = fine_tune(base, run, seed, data, windows)
                row |= speed[run.name]
                results[run.name].append(row)
                write_row(row, run)
                change = f"{row['start']:.4f} -> {row['loss']:.4f}"
                say(f"{run.name:9} seed {seed}  validation loss {change}, {row['note']}")
                if math.isfinite(row["loss"]):
                    show_sample(run.name, model, windows, vocabulary, args)
                del model  # or it would be held while the next one trains
    finally:  # what has finished, also after Ctrl-C or where a method fails
        print_table(results)
        print_differences(results)
        print_correlations(results)
        if args.markdown:
            print_markdown(results)


def fine_tune(base, run, seed, data, windows):
    """Train a copy of the base as one row says, with one seed. Returns the row's numbers and the model."""
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    model, forward, optimizer = set_up(base, run, seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start = evaluate(forward, windows, run)
    row = {"method": run.name, "seed": seed, "trainable": trainable, "start": start, "curve": []}

    losses = []  # they stay on the device, so that nothing waits for it
    every = math.ceil(run.steps / max(1, run.curve))
    for step, batch in enumerate(batches(data, seed, run), 1):
        losses.append(train_step(model, forward, optimizer, batch, learning_rate(step, run), run))
        if step % max(1, run.steps // UPDATES) == 0:
            loss = losses[-1].item()
            progress = f"step {step:>5} of {run.steps}"
            say(f"{run.name:9} seed {seed}  {progress}  loss {loss:.3f}", live=True)
            if not math.isfinite(loss):
                break
        if run.curve and step % every == 0 and not run.method.startswith("peft-"):
            loss = torch.stack(losses[-every:]).mean().item()
            row["curve"].append({"step": step, "loss": loss} | spectrum(base, model))

    row["loss"] = evaluate(forward, windows, run)
    if run.device.type == "cuda":
        row["memory"] = torch.cuda.max_memory_allocated(run.device) / 2**20
    if not math.isfinite(row["loss"]):
        bad = [i for i, loss in enumerate(losses, 1) if not loss.isfinite()]
        row["diverged"] = min(bad, default=run.steps)
        row["note"] = f"diverged at step {row['diverged']}: choose a lower rate than --lr {run.method}={run.lr:g}"
    elif run.random_weights or run.method.startswith("peft-"):
        row["note"] = "only measured: neither saved nor merged"
    else:
        row |= spectrum(base, model)
        saved = save_run(model, seed, run)
        row["merged"] = evaluate(sora.merge(model), windows, run)
        row["note"] = f"merged {row['merged']:.4f}{saved}"
    return row, model


def train_step(model, forward, optimizer, batch, rate, run):
    """One optimiser step on a batch (B, T + 1). Returns its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(forward, batch, run)
    if run.even:
        (loss + run.even * unevenness(model)).backward()
    else:
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def unevenness(model):
    """Mean over the layers of r Σσ⁴ / (Σσ²)² − 1, with the singular values σ of B A: 0 where all are equal, r − 1 where
    one is all there is, and -1, with no gradient, where B = 0."""
    found = []
    for layer in model.modules():
        if isinstance(layer, sora.LoRALinear):
            G = (layer.A @ layer.A.T) @ (layer.B.T @ layer.B)  # (r, r), with the eigenvalues σ²
            fourth = (G * G.T).sum()  # tr G G = Σσ⁴
            energy = G.trace() ** 2 + 1e-12  # (Σσ²)², and not 0 where B is
            found.append(layer.options["r"] * fourth / energy - 1)
    return torch.stack(found).mean()


def learning_rate(step, run):
    """A linear warm-up over the first twentieth of the steps, and a cosine from the peak down to a tenth of it."""
    warm_up = min(1, step / max(1, run.steps // 20))
    cosine = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / run.steps)
    return run.lr * warm_up * cosine


def set_up(base, run, seed):
    """Returns (model, forward, optimizer): forward is the model, compiled where that is asked for."""
    torch.manual_seed(seed)
    model = prepare(base, run)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim == 1]  # d and m, biases, ...: weight decay may draw A, B, C, E to 0
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    forward = model
    if run.compile:
        torch._dynamo.config.recompile_limit = 1000  # peft's DoRA, with graph breaks, fills a cache that all share
        forward = torch.compile(model, fullgraph=not run.method.startswith("peft-"))
    return model, forward, optimizer


def prepare(base, run):
    """A copy of the base with an adapter. What the method leaves as it is, it shares with the base."""
    if run.method == "full":
        return copy.deepcopy(base).requires_grad_(True)

    model = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})  # which deepcopy takes as copied already
    if run.method == "frozen":  # without anything to train there would be no backward pass to measure
        model.transformer.wpe = copy.deepcopy(base.transformer.wpe).requires_grad_(True)
    elif run.method.startswith("peft-"):  # as that library does it, on the same layers
        from peft import LoraConfig, inject_adapter_in_model
        dora = run.method == "peft-dora"
        layers = run.targets or ["c_attn", "c_proj", "c_fc"]
        config = LoraConfig(r=run.r, lora_alpha=run.alpha, use_dora=dora, target_modules=layers)
        inject_adapter_in_model(config, model)
    else:
        options = {}
        if issubclass(sora.METHODS[run.method], sora.SORALinear):
            options = {"r_p": run.r_p, "exact": run.exact}
        sora.adapt(model, run.method, run.r, run.alpha, run.targets, **options)
    return model


def batches(data, seed, run):
    """For each step (B, T + 1) tokens, drawn by a generator of their own: the same for all methods."""
    sequences = data.unfold(0, run.block_size + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(sequences), (run.steps, run.batch_size), generator=generator)
    for batch in starts.to(run.device):
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
    """For each row the median time of a training step, the rows taking turns."""
    ready = [(run, *set_up(base, run, 0)) for run in runs(args)]
    seconds = torch.zeros(WARM_UP + TIMED, len(ready))
    batch = next(batches(data, 0, args))
    for i in range(len(seconds)):
        if LIVE or i == 0:
            say(f"measuring speed: {len(seconds) - i} rounds, one step of each method in turn", live=True)
        for j, (run, model, forward, optimizer) in enumerate(ready):
            begun = time.perf_counter()
            train_step(model, forward, optimizer, batch, 0.0, run).item()  # rate 0; item waits for the device
            seconds[i, j] = time.perf_counter() - begun

    medians = seconds[WARM_UP:].median(0).values
    minutes = medians.sum() * args.steps * args.seeds / 60
    say(f"training takes, without evaluation, about {minutes:.1f} minutes")
    speed, frozen = {}, math.nan
    for (run, *_), median in zip(ready, medians.tolist()):
        speed[run.name] = {"ms": 1e3 * median}
        if run.method == "frozen":
            frozen = 1e3 * median
    for row in speed.values():
        row["relative"] = row["ms"] / frozen
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
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError, AssertionError) as error:
        fail(f"{flag}: {error!s:.500}")


def number(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def count(text):
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a whole number above 0 and below 1,000,000,000")
    return int(text)


def zero_or_one(text):
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return text == "1"


SETTINGS = {"r": count, "alpha": number, "r_p": count, "exact": zero_or_one, "lr": number, "even": number}


def methods(text):
    """[{"name": "lora:r=21", "method": "lora", "r": 21}, ...] of "lora:r=21,...": the rows of the table."""
    rows = []
    for name in dict.fromkeys(text.split(",")):
        method, *settings = name.split(":")
        known_method(method)
        row = {"name": name, "method": method}
        keys = settings_of(method)
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in keys or key in row:
                known = "=,".join(keys)
                raise argparse.ArgumentTypeError(f"{setting!r} is no setting of {method}: choose from {known}=, once")
            row[key] = SETTINGS[key](value)
        rows.append(row)
    return rows


def settings_of(method):
    if method not in sora.METHODS:
        return ["lr"]
    if issubclass(sora.METHODS[method], sora.SORALinear):
        return list(SETTINGS)
    return ["r", "alpha", "lr", "even"]


def known_method(name):
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"unknown method {name!r}: choose from {','.join(METHODS)}")
    if name.startswith("peft-") and not find_spec("peft"):
        raise argparse.ArgumentTypeError(f"{name!r} needs the package peft: pip install peft")


def rates(text):
    """{method: rate} of "1e-2,full=2e-3": the rate of a part without a name is for all methods."""
    told = {}
    for part in text.split(","):
        name, equals, rate = part.rpartition("=")
        if equals:
            known_method(name)
        if name in told:
            raise argparse.ArgumentTypeError(f"{part!r} gives a rate again: say each once, with a point for decimals")
        told[name] = number(rate)
    if "" in told:
        return dict.fromkeys(METHODS, told.pop("")) | told
    return told


def runs(args):
    """For each row of the table all its settings: those of the flags, and over them its own."""
    for row in args.methods:
        settings = vars(args) | {"lr": args.lr[row["method"]], "even": 0} | row
        yield argparse.Namespace(**settings)


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: fail(f"{message} (--help lists all flags)")
    flag = p.add_argument
    flag("--init", default=os.path.relpath(f"{HERE}/data/base.pt"),
         help=f"a checkpoint, 'scratch', or one of {','.join(GPT2)}, which bring defaults of their own")
    flag("--random-weights", action="store_true", help="gpt2's shape without its weights, to measure speed")
    flag("--n-layer", type=count, default=6, help="layers, with --init scratch")
    flag("--n-head", type=count, default=4, help="heads, with --init scratch")
    flag("--n-embd", type=count, default=128, help="width, with --init scratch")
    flag("--data", default=os.path.relpath(f"{HERE}/data/shakespeare.txt"), help="text; its last tenth validates")
    flag("--tuning", action="store_true", help="validate on the tenth before that, on which no method trains either")
    flag("--methods", type=methods, help=f"rows of the table, of {','.join(METHODS)}: full trains all, frozen the "
         f"positional embedding alone, for × frozen; with own settings ({', '.join(SETTINGS)}) as in lora:r=21; "
         "even=0.1 adds 0.1 times the unevenness of B A's singular values to the loss")
    flag("--targets", nargs="+", metavar="NAME", help="layers to adapt, by the ends of their names: c_attn mlp.c_proj")
    flag("--r", type=count, default=16, help="rank of the low-rank pair")
    flag("--alpha", type=number, default=32.0, help="the pair is scaled by alpha / r")
    flag("--r-p", type=count, default=4, help="rank of the pair that spans SORA's rotation")
    flag("--exact", action=argparse.BooleanOptionalAction, default=True,
         help="SORA's rotation; --no-exact is the authors' first-order one")
    flag("--steps", type=count, default=120, help="optimiser steps per method")
    flag("--batch-size", type=count, default=16, help="sequences per step")
    flag("--block-size", type=count, default=128, help="tokens per sequence")
    flag("--lr", type=rates, default="1e-2,full=2.8e-3,frozen=2e-3", help="peak learning rate, for all or by method")
    flag("--seeds", type=count, default=1, help="runs per row: more than one gives errors and differences to LoRA")
    flag("--device", default=str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
         help="cpu, cuda, cuda:1, mps, ...")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
         help="of the matrix products: auto is bfloat16 on CUDA, else float32")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the models")
    flag("--save", metavar="DIR", help="for what is trained: adapters, or of full and frozen the model")
    flag("--json", metavar="FILE", help="to which each row is appended as a line, with all settings")
    flag("--sample", type=count, metavar="N", default=0, help="tokens of text by the base and by each tuned model")
    flag("--curve", type=count, metavar="N", default=0, help="record the spectrum at most so often in training")
    flag("--markdown", action="store_true", help="print the table once more, and charts, as a code host renders them")

    told = p.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0]
    equal = told.r + round((1 + 2 * told.r_p) * 9 / 16)  # LoRA of SORA's size: in a GPT, out is 9/16 of in + out
    p.set_defaults(methods=f"full,lora,lora:r={equal},dora,prediag,sora", sha256={})  # of the files, once read
    if told.init in GPT2:
        gpu = torch.accelerator.is_available()
        p.set_defaults(block_size=1024, batch_size=16 if gpu else 1, steps=200, lr="2e-4,full=3e-5",
                       compile=torch.cuda.is_available())  # as LoRA's authors and nanoGPT tune GPT-2
    args = p.parse_args()
    args.lr = rates(p.get_default("lr")) | args.lr
    with blame(f"--device {args.device}"):
        args.device = torch.zeros(1, device=args.device).nonzero().device  # nonzero, for "meta" cannot compute
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device.type == "cuda" else "float32"
    with blame(f"--save {args.save}, --json {args.json}"):  # now, for it is too late when the work is done
        if args.save:
            os.makedirs(args.save, exist_ok=True)
            tempfile.TemporaryFile(dir=args.save).close()
        if args.json:
            open(args.json, "a").close()
    return args


def digest(path):
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never come, a device never end
        raise OSError("Is a directory, a pipe or a device: give the path of a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    whole = sum(run.method in ("full", "frozen") for run in runs(args))  # others save no more than an adapter
    size = sum(p.nbytes for p in base.parameters()) * max(1, whole * args.seeds)
    if args.save and shutil.disk_usage(args.save).free < size:
        fail(f"--save {args.save}: it may take {size:,} bytes, more than are free there")
    for run in runs(args):
        if run.method != "full":
            with blame(f"--methods {run.name}"):  # a dry run: what does not fit this base shall not show later
                prepare(base, run)
    return base, vocabulary


def make_base(args):
    torch.manual_seed(0)
    if args.random_weights and args.init not in GPT2:
        raise ValueError(f"--random-weights is for {', '.join(GPT2)}")
    if args.random_weights:
        return sora.GPT(sora.GPTConfig(1024, 50257, *SHAPES[args.init]))
    if args.init == "scratch":
        return sora.GPT(sora.GPTConfig(args.block_size, 2048, args.n_layer, args.n_head, args.n_embd))
    if args.init not in GPT2:
        args.sha256[args.init] = digest(args.init)
    return load_gpt(args.init)


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
        args.sha256[args.data] = digest(args.data)
        with open(args.data, encoding="utf-8") as file:
            ids = vocabulary.encode_to_numpy(file.read(), disallowed_special=())
        if len(ids) < least:
            raise ValueError(f"too short: it has {len(ids)} tokens, --block-size {args.block_size} needs {least}")
    tokens = torch.from_numpy(ids.astype("int64")).to(args.device)
    n = len(tokens)
    data, tuning, final = tokens.tensor_split([n * 8 // 10, n * 9 // 10])
    held_out = tuning if args.tuning else final

    windows = held_out.unfold(0, args.block_size + 1, args.block_size)  # (N, T + 1), each token predicted once
    n = min(WINDOWS, len(windows))
    if n > args.batch_size:
        n -= n % args.batch_size
    return data, windows[torch.linspace(0, len(windows) - 1, n).long()]


def save_run(model, seed, run):
    """Where --save is given: the adapter, or the whole model. Returns what to say of it."""
    if not run.save:
        return ""
    name = run.name.replace(":", "-")  # which not every system takes in a file's name
    if run.seeds > 1:
        name += f"-{seed}"
    path = os.path.join(run.save, f"{name}.pt")
    with blame(f"--save {run.save}"):
        if run.method in sora.METHODS:
            save(sora.adapter_state_dict(model), path)
        else:
            save_gpt(model, path)
    return f", saved as {path}"


def write_row(row, run):
    """Where --json is given: one more line, whole as soon as the row is there. NaN, which JSON lacks, becomes null."""
    if not run.json:
        return
    settings = vars(run) | {"torch": torch.__version__, "python": sys.version}
    line = json.dumps(row | {"settings": settings}, default=str)
    finite = json.loads(line, parse_constant=lambda name: None)
    with blame(f"--json {run.json}"), open(run.json, "a") as file:
        file.write(json.dumps(finite) + "\n")


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
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
STORED_IN_OUT = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # by GPT-2
CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def load_gpt(name_or_path):
    """A GPT in float32 on the CPU: a name in GPT2, downloaded once; or a path to GPT-2's layout (.safetensors, perhaps
    with a config.json beside it), to nanoGPT's ckpt.pt or to what save_gpt wrote. No code from a file is ever run.
    Raises OSError (the file cannot be had), ValueError (it is none of these), RuntimeError (tensors are amiss)."""
    path = Path(name_or_path)
    if name_or_path in GPT2:
        path = download(name_or_path)
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
    if digest(path) != sha256:
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

    told = {"activation_function": "gelu_new", "n_head": wte.shape[1] // 64}
    if beside.exists():
        told |= json.loads(beside.read_text())
    n_layer = len({name.split(".")[2] for name in state if ".h." in name})
    gelu = {"gelu_new": "tanh", "gelu": "none"}[told["activation_function"]]
    return sora.GPTConfig(len(wpe), len(wte), n_layer, told["n_head"], wte.shape[1], gelu), state


def of_nanogpt(file):
    """(config, state) of nanoGPT's layout, which is ours, with the exact GELU; perhaps with a prefix or masks, perhaps
    without biases; or of what save_gpt wrote."""
    told = {"gelu": "none"} | file.get("model_args", file.get("config"))
    state = {}
    for name, p in file["model"].items():
        name = name.removeprefix("_orig_mod.")
        if not name.endswith(".attn.bias"):  # a causal mask
            state[name] = p.float()
        if told.get("bias") is False and name.startswith(("transformer.h.", "transformer.ln_f")):
            state[name.removesuffix("weight") + "bias"] = torch.zeros(len(p))
    fields = {field.name for field in dataclasses.fields(sora.GPTConfig)}
    return sora.GPTConfig(**{key: value for key, value in told.items() if key in fields}), state


def save(state, path):
    """torch.save under a temporary name, then a move: a half-written file never stands under `path`."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def save_gpt(model, path):
    save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, path)


# ---- What is printed

COLUMNS = {  # title: the number of a row, its format
    "trainable": ("trainable", ",.0f"), "val loss": ("loss", ".3f"), "ms/step": ("ms", ".1f"),
    "× frozen": ("relative", ".2f"), "peak MiB": ("memory", ",.0f"),
}
UPDATE = {"‖dW‖": "change", "H(σ²)": "entropy2", "H(σ)": "entropy1"}
COLUMNS |= {title: (key, ".3f") for title, key in UPDATE.items()}
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
    lr = ", ".join(f"{run.name} {run.lr:g}" for run in runs(args))
    say(f"device    {args.device}, {device}, torch {torch.__version__}, {args.dtype}{compiled}")
    say(f"base      {args.init}: {base.config}")
    say(f"data      {args.data}: {len(data):,} training tokens, {len(windows)} validation windows of {args.block_size}")
    batch = f"{args.batch_size} x {args.block_size} tokens"
    say(f"training  {args.seeds} seed(s), {args.steps} steps of {batch}, lr {lr}")
    say(f"start     validation loss {loss:.4f}, the base's: every method starts there\n")


def print_table(results):
    """Aligned columns of means over the seeds, and what they mean."""
    say()
    for line in zip(*map(aligned, columns_of(results))):
        say("  ".join(line).rstrip())
    say(LEGEND)


def columns_of(results):
    """[title, cell, ...] of each column, without those that are empty."""
    table = [["method", *COLUMNS, "spectrum"]]
    for name, rows in results.items():
        if rows:
            cells = [cell(rows, key, form) for key, form in COLUMNS.values()]
            table.append([name, *cells, sparkline(rows)])
    return [column for column in zip(*table) if set(column[1:]) - {"-", ""}]


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
    diverged = [str(row["diverged"]) for row in rows if "diverged" in row]
    if diverged:
        return f"diverged at step {', '.join(diverged)}"
    bars = ""
    for log in means([row["spectrum"] for row in rows if "spectrum" in row]):
        bars += " ▁▂▃▄▅▆▇█"[round(8 - 8 * log / math.log10(FLOOR))]
    return bars


def print_differences(results):
    """To LoRA, seed by seed: what a seed does to both rows alike cancels."""
    lora = results.get("lora", [])
    if len(lora) < 2:
        return
    say("\nval loss less lora's of the same seed: mean ± standard error, and ≈ where it is below two standard errors")
    for name, rows in results.items():
        differences = [row["loss"] - other["loss"] for row, other in zip(rows, lora)]
        if name != "lora" and len(differences) > 1:
            say(f"{name:18} {mean_and_error(differences)}")


def mean_and_error(differences):
    mean = statistics.fmean(differences)
    if not math.isfinite(mean):
        return "-"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    text = f"{mean:+.3f} ± {error:.3f}"
    if abs(mean) < 2 * error:
        text += " ≈"
    return text


def print_correlations(results):
    """Do the numbers of an update go with its loss? Over all runs of adapters, less the mean of each seed."""
    seeds = max(map(len, results.values()))
    adapted = []
    for name, rows in results.items():
        if len([row for row in rows if "entropy1" in row]) == seeds and not name.startswith("full"):
            adapted.append(rows)
    if len(adapted) < 3 or seeds < 2:
        return
    runs_of_adapters = f"{len(adapted) * seeds} runs of adapters"
    say(f"\nrank correlation with val loss over {runs_of_adapters}, less their mean over the same seed")
    for title, key in UPDATE.items():
        pair = torch.tensor([[[row[key], row["loss"]] for row in rows] for rows in adapted])  # (methods, seeds, 2)
        pair = (pair - pair.mean(0)).flatten(0, 1)
        ranks = pair.argsort(0).argsort(0).double()
        correlation = torch.corrcoef(ranks.T)[0, 1].item()
        say(f"{title:18} {correlation:+.2f}")


# ---- What a code host renders: a table of Markdown, charts of Mermaid

COLOURS = {"blue": "#1f77b4", "orange": "#ff7f0e", "green": "#2ca02c", "red": "#d62728", "purple": "#9467bd",
           "brown": "#8c564b", "pink": "#e377c2", "grey": "#7f7f7f"}


def print_markdown(results):
    """The table and, of what was trained, charts of losses, spectra and (with --curve) of the way there."""
    lines = list(zip(*columns_of(results)))
    lines.insert(1, ["---"] * len(lines[0]))
    say()
    for line in lines:
        say(f"| {' | '.join(line)} |")

    trained = {}
    for name, rows in results.items():
        if rows and all("spectrum" in row for row in rows):
            trained[name] = rows
    if not trained:
        return
    chart_of_losses(trained)
    spectra = {name: means([row["spectrum"] for row in rows]) for name, rows in trained.items()}
    chart_of_lines("log of σ over the largest σ, from the largest to the smallest", range(1, POINTS + 1), spectra)
    charts_over_steps(trained)


def chart_of_losses(trained):
    losses = []
    for rows in trained.values():
        losses.append([row["loss"] for row in rows])
    marks = []
    for kind, of in [("bar", statistics.fmean), ("line", min), ("line", max)]:
        marks.append((kind, [of(values) for values in losses]))
    chart("val loss: the mean, and as lines the lowest and the highest of all seeds", trained, marks)


def charts_over_steps(trained):
    rows = next(iter(trained.values()))
    steps = [point["step"] for point in rows[0]["curve"]]
    if not steps:
        return
    for title, key in UPDATE.items():
        lines = {}
        for name, rows in trained.items():
            curves = []
            for row in rows:
                curves.append([point[key] for point in row["curve"]])
            lines[name] = means(curves)
        chart_of_lines(f"{title} over the steps", steps, lines)


def means(lists):
    return [statistics.fmean(values) for values in zip(*lists)]


def chart_of_lines(title, x, lines):
    """A line for each name. Such charts have no legend: the text above names the colours."""
    legend = ", ".join(f"{name} {colour}" for name, colour in zip(lines, cycle(COLOURS)))
    say(f"\n{title}: {legend}")
    marks = [("line", values) for values in lines.values()]
    chart(title, x, marks)


def chart(title, x, marks):
    """marks: ("bar" or "line", values over x)."""
    labels = ", ".join(f'"{label}"' for label in x)
    palette = ", ".join(COLOURS.values())
    say("\n```mermaid")
    say(f'%%{{init: {{"themeVariables": {{"xyChart": {{"plotColorPalette": "{palette}"}}}}}}}}%%')
    say("xychart-beta")
    say(f'    title "{title}"')
    say(f"    x-axis [{labels}]")
    for kind, values in marks:
        numbers = ", ".join(f"{value:.4g}" for value in values)
        say(f"    {kind} [{numbers}]")
    say("```")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where the encoding has no ‖ or no bars, the run should not end for that
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C from here on would print a traceback
        say("\ninterrupted")
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{error!r}".lower():
            raise
        fail(f"out of memory: lower --batch-size or --block-size, or ask for fewer --methods at once ({error!s:.100})")
