"""Tables, differences and the plot of what eval_pruning.py measured.

    python scripts/eval/pruning_report.py q.json                              # answers by budget
    python scripts/eval/pruning_report.py q.json --of documents --markdown    # of results/README.md
    python scripts/eval/pruning_report.py q.json --against "full divprune"    # of the same pictures
    python scripts/eval/pruning_report.py q.json llava.json --png pruning.png # bytes, exact match

``--of`` takes all, a family, "turn 1", ..., recall, or "readable": the answers of which every
square stayed. ``--arms`` takes some arms alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from fidelity import ratio
from tabulate import tabulate

ALL = "all"
WHOLE = "1"  # the budget of all tokens at full width


def arm_name(form: str, selector: str) -> str:
    return f"{form} {selector}"


@dataclass(frozen=True)
class Reading:
    """Of one picture and arm: whether each answer was right, the share of its squares that stayed
    (None where the answer is not written in the picture), tokens kept, and bytes as shares of
    stock's, with bases and without."""

    right: list[float]
    recall: list[float | None]
    kept: float
    share: float
    ideal_share: float
    family: str = ""

    @classmethod
    def mean(cls, family: str, readings: list[Reading]) -> Reading:
        """Of an arm's choices of one picture."""
        count = len(readings)
        columns = zip(*(reading.recall for reading in readings), strict=True)
        return cls(
            [
                sum(column) / count
                for column in zip(*(reading.right for reading in readings), strict=True)
            ],
            [None if None in column else sum(column) / count for column in columns],
            *(
                sum(getattr(one, name) for one in readings) / count
                for name in ("kept", "share", "ideal_share")
            ),
            family,
        )


def summary(readings: dict[str, dict[float, list[Reading]]]) -> dict[str, dict[str, dict]]:
    """By arm and budget, for JSON. ``right`` and ``asked`` of each picture, in order, are what
    differences are made of."""
    return {
        arm: {
            f"{budget:g}": summary_of(found)
            for budget, found in sorted(of_arm.items(), reverse=True)
        }
        for arm, of_arm in readings.items()
    }


def summary_of(readings: list[Reading]) -> dict:
    """Each of the measures is [mean in %, standard error, answers]; pictures are clusters."""
    turns = max(len(reading.right) for reading in readings)
    groups = {ALL: [(sum(one.right), len(one.right)) for one in readings]}
    for family in dict.fromkeys(one.family for one in readings):
        groups[family] = [
            (sum(one.right), len(one.right)) for one in readings if one.family == family
        ]
    for turn in range(turns):
        groups[f"turn {turn + 1}"] = [
            (one.right[turn], 1) for one in readings if len(one.right) > turn
        ]
    known = [[each for each in one.recall if each is not None] for one in readings]
    groups["recall"] = [(sum(each), len(each)) for each in known if each]
    whole = [
        [right for right, recall in zip(one.right, one.recall, strict=True) if recall == 1]
        for one in readings
    ]
    groups["readable"] = [(sum(each), len(each)) for each in whole if each]
    means = {
        name: sum(getattr(one, name) for one in readings) / len(readings)
        for name in ("kept", "share", "ideal_share")
    }
    return {
        **{name: round(mean, 4) for name, mean in means.items()},
        **{name: measure(pairs) for name, pairs in groups.items()},
        "right": [round(sum(one.right), 3) for one in readings],
        "asked": [len(one.right) for one in readings],
    }


def measure(pairs: list[tuple[float, int]]) -> list[float | None]:
    mean, error = ratio([(100 * amount, count) for amount, count in pairs])
    return [
        *(None if value is None else round(value, 3) for value in (mean, error)),
        sum(count for _, count in pairs),
    ]


def difference(cell: dict, other: dict, families: list[str], of: str) -> list[float | None] | None:
    """Of all answers or those of a family, on the same pictures; None where one has not read them
    all."""
    if not len(cell["asked"]) == len(other["asked"]) == len(families):
        return None
    columns = zip(families, cell["right"], other["right"], cell["asked"], strict=True)
    return measure(
        [(mine - its, asked) for family, mine, its, asked in columns if of in (ALL, family)]
    )


def table(
    document: dict,
    of: str = ALL,
    against: str | None = None,
    arms: Iterable[str] | None = None,
    markdown: bool = False,
) -> str:
    """One arm a row and one budget a column, of those pictures that it reaches; a cell of fewer is
    left out."""
    found = document["arms"]
    budgets = sorted(
        {budget for of_arm in found.values() for budget in of_arm if budget != WHOLE},
        key=float,
        reverse=True,
    )
    whole = found.get("full all", {}).get(WHOLE)
    rows = []
    if whole and against is None:
        rows.append(["all tokens, full width", text_of(whole[of]), *[""] * (len(budgets) - 1)])
    for arm in arms or found:
        cells = []
        for budget in budgets:
            cell = found[arm].get(budget)
            if cell is None or len(cell["asked"]) < document["pictures"]:
                cells.append("")
            elif against is None:
                cells.append(text_of(cell.get(of)))
            else:
                other = found[against].get(budget)
                cells.append(
                    text_of(difference(cell, other, document["families"], of), sign="+")
                    if other
                    else ""
                )
        if any(cells):
            rows.append([arm, *cells])
    head = f"{document['model']}, {document['pictures']} pictures, {of}" + (
        f", against {against}" if against else ""
    )
    header = ["arm", *budgets]
    if markdown:
        return f"{head}\n\n{tabulate(rows, header, 'github', disable_numparse=True)}"
    return f"{head}\n{tabulate(rows, header, 'plain', disable_numparse=True, stralign='right')}"


def text_of(found: list[float | None] | None, sign: str = "") -> str:
    if found is None or found[0] is None:
        return ""
    mean, error, _ = found
    return f"{mean:{sign}.1f}" if error is None else f"{mean:{sign}.1f} ± {error:.1f}"


def plot(documents: list[dict], output: Path, selector: str) -> None:
    """Bytes against exact match, a row a document."""
    from figures import pruned

    pruned.draw(documents, output, selector)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="JSON", help="what eval_pruning.py wrote")
    add("--of", default=ALL, help="measure of the table (default %(default)s)")
    add("--against", metavar="ARM", help="print differences from this arm instead, of all answers")
    add("--arms", nargs="+", metavar="ARM", help="print these alone")
    add("--markdown", action="store_true")
    add("--png", type=Path, help="draw bytes against exact match here")
    add("--selector", default="divprune", help="of the plot's narrow rows (default %(default)s)")
    args = parser.parse_args()
    documents = [json.loads(file.read_text()) for file in args.files]
    for document in documents:
        unknown = [
            arm
            for arm in (args.against, *(args.arms or []))
            if arm is not None and arm not in document["arms"]
        ]
        if unknown:
            parser.error(
                f"{document['model']} has no arm {unknown[0]!r}; "
                f"it has {', '.join(document['arms'])}"
            )
        if args.against and args.of not in (ALL, *document["families"]):
            parser.error(
                f"--against compares all answers or those of a family, got --of {args.of!r}"
            )
        print(table(document, args.of, args.against, args.arms, args.markdown), end="\n\n")
    if args.png:
        plot(documents, args.png, args.selector)


if __name__ == "__main__":
    main()
