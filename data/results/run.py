# SPDX-License-Identifier: MIT
"""The experiments of this folder: python data/results/run.py main controls rates

Each appends its rows to NAME.jsonl beside this script, seed by seed; what stands there already is not run again.
"""
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import sora
import train_gpt

# Controls: the cells that the paper's table of placement and kind leaves empty


class PostDiagLinear(sora.PreDiagLinear):
    """W' = diag(d) (W0 + sBA): a diagonal after the update, DoRA without its norm"""

    before = sora.LoRALinear.before

    def after(self, y):
        return sora.scaled(y, self.d)


class RotationLinear(sora.SORALinear):
    """W' = R (W0 + sBA): SORA without its diagonal"""

    before = sora.LoRALinear.before

    def start(self, r_p=4, exact=True):
        super().start(r_p, exact)
        self.d.requires_grad_(False)  # which nothing reads


class PreRotationLinear(RotationLinear):
    """W' = R W0 + sBA: a rotation before the update"""

    before = sora.SORALinear.after
    after = sora.LoRALinear.after


CONTROLS = {"postdiag": PostDiagLinear, "rotation": RotationLinear, "prerotation": PreRotationLinear}
sora.METHODS |= CONTROLS

ADAPTERS = ["lora", "lora:r=21", "dora", "prediag", "sora"]
RATES = {"full": ["2e-3", "2.8e-3", "4e-3"]} | {name: ["7e-3", "1e-2", "1.4e-2"] for name in ADAPTERS}
EXPERIMENTS = {  # the rows, the seeds, and whether the tuning tenth of the text judges, or the last
    "main": (["frozen", "full", "lora", "lora:r=21", "dora", "prediag", "sora"], 5, False),
    "controls": (["lora", "postdiag", "rotation", "prerotation"], 5, False),
    "rates": ([f"{name}:lr={lr}" for name, rates in RATES.items() for lr in rates], 3, True),
}


def run(experiment):
    methods, seeds, tuning = EXPERIMENTS[experiment]
    path = HERE / f"{experiment}.jsonl"
    sys.argv = ["train_gpt.py", "--methods", ",".join(methods), "--seeds", str(seeds), "--json", str(path)]
    args = train_gpt.arguments()
    base = train_gpt.load_base(args)
    data, *held_out = train_gpt.load_data(args, base.config.vocab_size)
    windows = held_out[0] if tuning else held_out[1]
    args.judged_by = "tuning" if tuning else "final"
    start = train_gpt.evaluate(base, windows, args)
    done = {(row["name"], row["seed"]) for row in rows_of(path)}
    rows = args.rows
    for seed in range(seeds):
        args.rows = [row for row in rows if (row["name"], seed) not in done]
        if args.rows and not args.stopped:
            print(f"{experiment}, seed {seed}")
            train_gpt.train(base, seed, data, windows, args, [])
    train_gpt.print_table(rows_of(path), start)
    return args.stopped


def rows_of(path):
    """The rows that stand there, but for those that Ctrl-C stopped; null, as JSON has no NaN, is nan again"""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    whole = [row for row in rows if not row["note"].startswith("stopped")]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in whole]


if __name__ == "__main__":
    for name in sys.argv[1:] or EXPERIMENTS:
        if run(name):
            break
