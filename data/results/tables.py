# SPDX-License-Identifier: MIT
"""The tables and pictures of this folder: python data/results/tables.py

Prints Markdown tables of rates.jsonl, main.jsonl, controls.jsonl, smol.jsonl and cost.jsonl beside this script, as far
as they are there, and draws spectra.svg and losses.svg. It needs matplotlib.
"""
import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
UPDATE = {"change": "‖dW‖", "entropy2": "H(σ²)", "entropy1": "H(σ)"}
COMPARED = ["trained", "val loss", "less lora", "less lora:r=21"]
GREY = "#7a7f87"  # can be read on white and on black, as can the colours
COLORS = {
    "full": GREY,
    "lora": "#e8710a",
    "lora:r=21": "#a8800f",
    "dora": "#e0457b",
    "prediag": "#2f9e44",
    "sora": "#3f7fe0",
}
LABELS = {"lora": (-28, 5), "prediag": (6, -9)}  # where another would be in the way: in points, off the line's end
STYLE = dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GREY)
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "sora"}


def main():
    rates, main, controls = map(read, ["rates", "main", "controls"])
    print_rates(rates)
    print_rows("main", main, main)
    print_rows("controls", controls, main | controls)
    if main:
        print_correlations(main)
        print_correlations(main | controls)
        draw("spectra.svg", spectra, main)
        draw("losses.svg", losses, main)
    for title, rows in read_smol().items():
        best = print_smol_rates(title, rows)
        print_smol(title, rows, best)
    for found in read_cost().values():
        print_cost(found)


def rows_of(experiment):
    path = HERE / f"{experiment}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.split("\n")[:-1]  # what follows the last end of a line is still being written
    return [*map(json.loads, lines)]


def read(experiment):
    """{name: [row of seed 0, row of seed 1, ...]}"""
    rows, found, seeds = rows_of(experiment), {}, 0
    for row in rows:
        if not row["note"].startswith("stopped"):  # by Ctrl-C
            found.setdefault(row["name"], []).append(row)
        seeds = row["settings"]["seeds"]
    print(f"{experiment}.jsonl: {len(rows)} rows, of {len(found)} methods × {seeds} seeds")
    return found


def read_smol():
    """{task, steps, size of a batch and device: [row, ...]}: what may be compared"""
    found = {}
    for row in rows_of("smol"):
        title = f"{row['task']}, {row['steps']} × {row['batch']} × {row['length']}, {row['device']}"
        found.setdefault(title, []).append(row)
    return found


def read_cost():
    """{a call: {name: [a row of each round]}}: what took turns"""
    found = {}
    for row in rows_of("cost"):
        found.setdefault(row["call"], {}).setdefault(row["name"], []).append(row)
    return found


# ---- Numbers


def numbers(rows, key):
    """One of each seed; nan where a row has none: it has diverged, or trains no layer"""
    return np.array([row.get(key) for row in rows], float)


def mean(rows, key, form=".3f"):
    return f"{numbers(rows, key).mean():{form}}"


def loss_of(rows):
    return f"{mean(rows, 'loss')} ± {numbers(rows, 'loss').std(ddof=1):.3f}"


def less(rows, others):
    """The loss less that of others, seed by seed: mean ± standard error, and ≈ where it is below two of them"""
    theirs = {row["seed"]: row for row in others}
    values = numbers(rows, "loss") - numbers([theirs.get(row["seed"], {}) for row in rows], "loss")
    difference, error = values.mean(), standard_error(values)
    near = " ≈" if abs(difference) < 2 * error else ""
    return f"{difference:+.3f} ± {error:.3f}{near}"


def standard_error(values):
    return values.std(ddof=1) / len(values) ** 0.5


def compared(rows, known):
    known = {"lora": [], "lora:r=21": []} | known
    losses = loss_of(rows), less(rows, known["lora"]), less(rows, known["lora:r=21"])
    return [mean(rows, "trained", ",.0f"), *losses]


def ranks(adapters, key):
    """Of all runs, less the mean of each seed"""
    values = np.array([*zip(*[numbers(rows, key) for rows in adapters])])  # (seeds, adapters)
    values -= values.mean(axis=1, keepdims=True)
    return values.argsort(axis=None).argsort()


# ---- Tables


def print_line(*cells):
    print(re.sub(r"\+?nan( ± nan)?", "-", f"| {' | '.join(cells)} |"))


def print_head(*titles):
    print()
    print_line(*titles)
    print_line(*["---"] * len(titles))


def print_rates(found):
    """Methods × rates"""
    grids, head = {}, []
    for name, rows in found.items():
        method, _, rate = name.partition(":lr=")
        grids.setdefault(method, {})[rate] = rows
    for method, grid in grids.items():
        if head != [*grid]:
            head = [*grid]
            print_head("rates", *head)
        cells = [loss_of(rows) for rows in grid.values()]
        best = cells.index(min(cells))  # as texts: all have one digit before the point
        cells[best] = f"**{cells[best]}**"
        print_line(method, *cells)


def print_rows(title, found, known):
    """Losses are compared with all known rows, as a seed means the same batches everywhere; times within a table"""
    print_head(title, *COMPARED, "ms/step", "× frozen", *UPDATE.values())
    frozen = numbers(found.get("frozen", [{}]), "ms").mean()
    for name, rows in found.items():
        print_line(
            name,
            *compared(rows, known),
            mean(rows, "ms", ".0f"),
            f"{numbers(rows, 'ms').mean() / frozen:.2f}",
            *[mean(rows, key) for key in UPDATE],
        )


def print_smol_rates(title, rows):
    """Methods × rates, on the tuning split. Returns {method: its best rate}"""
    grids, best = {}, {}
    for row in rows:
        if row["split"] == "tuning":
            grids.setdefault(row["name"], {})[row["lr"]] = row["loss"] or math.inf  # it has diverged
    rates = sorted({rate for grid in grids.values() for rate in grid})
    print_head(title, *map("{:g}".format, rates))
    for name, grid in grids.items():
        best[name] = min(grid, key=grid.get)
        cells = {rate: f"{loss:.3f}" for rate, loss in grid.items()}
        cells[best[name]] = f"**{cells[best[name]]}**"
        print_line(name, *[cells.get(rate, "") for rate in rates])
    return best


def print_smol(title, rows, best):
    """Each method at its best rate, on the final split"""
    final = [row for row in rows if row["split"] == "final" and row["lr"] == best[row["name"]]]
    found = {name: [row for row in final if row["name"] == name] for name in best}
    print_head(title, "seeds", *COMPARED, "exact", "ms/step", *UPDATE.values())
    print_line("(base)", "", "", mean(final[:1], "start_loss"), "", "", mean(final[:1], "start_exact"), *[""] * 4)
    for name, seeds in found.items():
        if seeds:
            updates = [mean(seeds, key) for key in UPDATE]
            exact, ms = mean(seeds, "exact"), mean(seeds, "ms", ".0f")
            print_line(name, str(len(seeds)), *compared(seeds, found), exact, ms, *updates)


def print_cost(found):
    """Medians over the rounds; × frozen is taken in each round, and its least and most follow"""
    told = found["frozen"][0]
    title = f"{told['shape']}, {told['way']}, {told['device']}"
    print_head(title, "trained", "ms/step", "× frozen", "in three rounds", "peak MiB")
    for name, rows in found.items():
        ratios = numbers(rows, "ms") / numbers(found["frozen"], "ms")
        ms, ratio, least, most = np.median(numbers(rows, "ms")), np.median(ratios), ratios.min(), ratios.max()
        cells = f"{ms:.1f}", f"{ratio:.2f}", f"{least:.2f} to {most:.2f}", mean(rows, "peak_MiB", ",.0f")
        print_line(name, mean(rows, "trained", ",.0f"), *cells)


def print_correlations(found):
    """Spearman's"""
    adapters = [rows for name, rows in found.items() if name not in ("frozen", "full")]
    loss = ranks(adapters, "loss")
    values = [np.corrcoef(loss, ranks(adapters, key))[0, 1] for key in UPDATE]
    print_head("rank correlation with val loss", *UPDATE.values())
    print_line(f"{len(adapters)} adapters", *map("{:+.2f}".format, values))


# ---- Pictures


def draw(name, picture, found):
    """The same rows give the same bytes"""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        picture(figure.subplots(), found)
        draft = HERE / f"{name}.tmp"
        figure.savefig(draft, format="svg", transparent=True, metadata={"Date": None})
    draft.replace(HERE / name)


def spectra(axes, found):
    """Means over the seeds"""
    for name, color in COLORS.items():
        logs = np.mean([row["spectrum"] for row in found[name]], axis=0)
        x, y = np.linspace(0, 1, logs.size), 10**logs
        axes.semilogy(x, y, color=color)
        end = y.argmin()
        offset = LABELS.get(name, (6, 5))
        axes.annotate(name, (x[end], y[end]), offset, textcoords="offset points", color=color, annotation_clip=False)
    axes.set(xlabel="fraction of the singular values", ylabel="σ / σ₁", ylim=(1.1e-4, 1))


def losses(axes, found):
    """Means over the seeds and their standard errors; frozen is far off"""
    for name, color in COLORS.items():
        values = numbers(found[name], "loss")
        axes.errorbar(values.mean(), name, xerr=standard_error(values), fmt="o", capsize=4, color=color)
    axes.invert_yaxis()
    axes.set_xlabel("val loss ± standard error over the seeds")


if __name__ == "__main__":
    main()
