"""How long does `import gaussnet` take, beyond importing torch, and does it load what it does not depend on?

    python benchmarks/import_time.py [--repeats 15]

The median over processes. No module of an optional dependency may be among those that it loads.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from typing import Any

from results import Record, parser

IMPORT = """
import json, sys, time

def modules():
    return {name.partition(".")[0] for name in sys.modules}

began = time.perf_counter()
import torch
between, before = time.perf_counter(), modules()
import gaussnet
print(json.dumps([between - began, time.perf_counter() - between, sorted(modules() - before)]))
"""


def optional_modules() -> set[str]:
    """Top-level modules of the packages that gaussnet names in its extras alone."""
    needed, optional = set[str](), set[str]()
    for line in requires("gaussnet") or []:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        (optional if "extra ==" in line else needed).add(name)
    return {
        module
        for module, packages in packages_distributions().items()
        if set(packages) & (optional - needed) and not module.startswith("_")
    }


def main() -> None:
    """Prints the median."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=15)
    record = Record(made.parse_args())
    runs: list[Any] = []
    for _ in range(record.options.repeats + 1):  # the first one warms up
        run = subprocess.run([sys.executable, "-c", IMPORT], stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(run.stdout))
    torch_seconds, seconds = (statistics.median(run[part] for run in runs[1:]) for part in (0, 1))
    loaded = set(runs[0][2])
    record.text(f"`import torch` takes {torch_seconds:.2f} s, then `import gaussnet` {seconds:.2f} s.")
    record.text(f"Beside torch's it loads {', '.join(sorted(name for name in loaded if name[0] != '_'))}.")
    unwanted = sorted(loaded & optional_modules())
    assert not unwanted, f"import gaussnet loads optional dependencies: {', '.join(unwanted)}"
    record.number("`import gaussnet`, beyond torch", seconds, "<= 0.3", unit="s", headline=True)
    record.close()


if __name__ == "__main__":
    main()
