"""Benchmarks of torch_convlab against torch: `python bench/run.py conv --suite resnet50`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import algorithms
import conv
import families
import measure
import memory
import model
import norm
import overhead
import pool

# What `all` runs, in under 25 minutes on 2 cores. Results of each go to results/.
ALL = (
    "families --threads 2 --rounds 5 --seconds 0.01",
    "families --threads 1 --rounds 3 --seconds 0.01",
    "families --dtype bfloat16 --threads 2 --rounds 3 --seconds 0.01",
    "conv --suite resnet50 --batch 8 --rounds 5 --threads 2",
    "conv --suite mobilenet_v2 --rounds 5 --threads 2",
    "conv --suite timm --sample 100 --rounds 3 --seconds 0.005 --threads 2",
    "algorithms --rounds 3 --seconds 0.004 --threads 2",
    "norm --rounds 5 --threads 2",
    "pool --rounds 5 --threads 2",
    "overhead --threads 1",
    "model --name resnet50 --mode infer --batch 1 --rounds 7 --budget 150 --threads 2",
    "model --name mobilenet_v2 --mode infer --batch 1 --budget 150 --threads 2",
    "model --name vgg16 --mode infer --batch 1 --rounds 5 --without compile --threads 2",
    "model --name resnet50 --mode train --batch 8 --rounds 5 --without compile --threads 2",
    "model --name lenet5 --mode train --batch 64 --without compile --threads 2",
)
VERBS = {
    "algorithms": algorithms, "conv": conv, "families": families, "memory": memory, "model": model, "norm": norm,
    "overhead": overhead, "pool": pool,
}  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, module in VERBS.items():
        module.add_arguments(verbs.add_parser(name, help=module.__doc__.splitlines()[0]))
    verbs.add_parser("all", help="every benchmark whose figures the documentation states")
    for verb in verbs.choices.values():
        verb.add_argument("--threads", type=int, default=torch.get_num_threads())
        verb.add_argument("--rounds", type=int, default=9, help="turns of every contender (default 9)")
        verb.add_argument("--seconds", type=float, default=0.02, help="length of one turn (default 0.02)")
        verb.add_argument("--json", nargs="?", const="", metavar="FILE", help="write results, by default to results/")
    options = parser.parse_args()
    if options.verb == "all":
        return max(_run(line) for line in ALL)
    torch.set_num_threads(options.threads)

    console = Console(width=150 if not sys.stdout.isatty() else None, highlight=False)
    result = VERBS[options.verb].run(options, progress=lambda text: print(text, file=sys.stderr, flush=True))
    table = Table(*result.columns, box=None, header_style="bold")
    for row in result.rows:
        table.add_row(*row)
    console.print(table)
    for line in result.summary:
        print(line)
    if options.json is not None:
        environment = measure.environment()
        kind = environment["instruction_set"]
        if kind == "avx512":
            kind = "amx" if environment["multiplies_tiles"] else "zen4" if environment["halves_avx512"] else ""
        kind = f"-{kind}" if kind else ""
        path = Path(options.json) if options.json else RESULTS / f"{result.name}-{options.threads}t{kind}.json"
        path.write_text(json.dumps({"environment": environment, **result.data}, indent=1) + "\n")
        print(f"wrote {path}")
    return 1 if result.failed else 0


def _run(line: str) -> int:
    print(f"== {line}", flush=True)
    return subprocess.run([sys.executable, __file__, *line.split(), "--json"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
