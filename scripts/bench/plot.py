"""Draw the figures of scripts/results from the files there, in one style.

python scripts/bench/plot.py                               # all
python scripts/bench/plot.py fidelity.png server.png       # some
python scripts/bench/plot.py --output OUT                  # elsewhere
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import plot_figure
from bench_records import rows_with_populations
from figures import answers, attention, pruned, serving
from kernel_records import read_csv

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Figure:
    """``draw`` takes the paths of ``files``, which lie in scripts/results, and that of the PNG."""

    files: tuple[str, ...]
    draw: Callable[[Sequence[Path], Path], object]


def documents(files: Sequence[Path]) -> list[dict]:
    return [json.loads(file.read_text()) for file in files]


FIGURES = {
    "fidelity.png": Figure(
        ("fidelity-qwen2.5-vl.json", "fidelity-llava-next.json", "fidelity-smollm2-135m.json"),
        lambda files, png: answers.draw(documents(files), png),
    ),
    "kernels.png": Figure(
        ("kernels.csv",), lambda files, png: attention.draw(*read_csv(files[0]), png)
    ),
    "pruning.png": Figure(
        ("pruning-qwen2.5-vl.json", "pruning-llava-next.json"),
        lambda files, png: pruned.draw(documents(files), png, "divprune"),
    ),
    "server.png": Figure(
        ("server.csv",),
        lambda files, png: serving.draw_bars(rows_with_populations(files[0]), png),
    ),
    "server-population.png": Figure(
        ("server.csv", "server-population-4x.csv"),
        lambda files, png: serving.draw_population(rows_with_populations(files[0]), png),
    ),
    "slabs.png": Figure((), lambda _, png: plot_figure.draw(png)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)} (default: all)")
    add("--output", type=Path, default=RESULTS, help="the folder (default %(default)s)")
    options = parser.parse_args()
    for name in options.names or FIGURES:
        if name not in FIGURES:
            parser.error(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    for name in options.names or FIGURES:
        figure = FIGURES[name]
        figure.draw([RESULTS / file for file in figure.files], options.output / name)
        print(f"wrote {options.output / name}")


if __name__ == "__main__":
    main()
