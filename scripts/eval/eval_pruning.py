"""What fewer image tokens cost, and narrower ones, at equal bytes.

    python scripts/eval/eval_pruning.py scripts/models/reader-qwen2.5-vl --output qwen.json
    python scripts/eval/eval_pruning.py MODEL --budgets .5 .35 --formats full 16+z4/z4
    python scripts/eval/pruning_report.py qwen.json llava.json --png pruning.png  # tables, plot

In this process, in fp32, with any Hugging Face checkpoint of Qwen2.5-VL or LLaVA-NeXT; no server. A
budget is the KV bytes of an image as a share of those in stock's cache in bf16: slabs and bases
count (pruning_budget.py). An arm is a format of rows and a selector, and keeps as many tokens as
fit the budget: ``full`` prunes tokens alone, the selector ``all`` narrows rows alone (where a
budget holds all tokens), the others do both. FastV and PyramidDrop drop tokens inside the language
model (in_llm_pruners.py): their bytes are those of all layers, the choice is made anew for each
question, or, as ``reused``, once by the first.

The picture is stored before its three questions are asked, one after the other with the true
answers between them (protocol B of fidelity.py); an answer is right when each of its tokens is the
arg-max. Recall is the share of the squares under an answer's characters whose tokens stay, where
the answer is written in the picture. Errors are standard errors over pictures. Positions and tiles
are the server's: Qwen keeps the ids of the whole prompt, LLaVA-NeXT counts anew and chooses within
each tile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from fidelity_arms import make_arm
from fidelity_models import Checkpoint
from in_llm_pruners import read_with_stages, stages_of
from pruned_prompts import Chat, is_right, make_chat, read_answers
from pruning_budget import FULL, Budget, row_format
from pruning_choice import RANDOM_SEEDS, Chooser, answer_squares, recalls
from pruning_report import Reading, arm_name, summary, table
from tasks import FAMILIES, HELD_OUT_SEED, Picture, make_picture
from visionzip_scores import TowerScores

ALL, SMALLER, RANDOM, VISIONZIP = "all", "smaller", "random", "visionzip"
BUDGETS = (0.65, 0.50, 0.35, 0.28, 0.22, 0.15)
FORMATS = (FULL, "rank64", "rank32", "rank16", "16+z4/z4", "16+z2/z2")
SELECTORS = ("divprune", "residual", "uniform", VISIONZIP, "oracle", RANDOM, SMALLER, ALL)
JOINT_SELECTORS = ("divprune", "residual", "uniform", VISIONZIP, "oracle", ALL)
IN_LLM = ("fastv1", "fastv2", "pyramiddrop")


@dataclass(frozen=True)
class Plan:
    """``selectors`` choose full-width rows, ``joint_selectors`` those of the other ``formats``.
    ``batch``: choices that are read at a time."""

    budgets: tuple[float, ...] = BUDGETS
    formats: tuple[str, ...] = FORMATS
    selectors: tuple[str, ...] = SELECTORS
    joint_selectors: tuple[str, ...] = JOINT_SELECTORS
    in_llm: tuple[str, ...] = IN_LLM
    batch: int = 16

    def selectors_of(self, form: str) -> list[str]:
        """One name a choice."""
        names = self.selectors if form == FULL else self.joint_selectors
        seeds = [f"{RANDOM} {seed}" for seed in range(RANDOM_SEEDS)]
        return [one for name in names for one in (seeds if name == RANDOM else [name])]


class Evaluation:
    """``readings``: those of all pictures so far, by arm and budget."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._checkpoint, self._plan = checkpoint, plan
        self._budget = Budget(checkpoint)
        is_asked = VISIONZIP in (*plan.selectors, *plan.joint_selectors)
        self._tower = TowerScores(checkpoint) if is_asked else None
        self._formats = {
            form: make_arm(form, checkpoint.head_dim) if form != FULL else None
            for form in plan.formats
        }
        self.readings: dict[str, dict[float, list[Reading]]] = defaultdict(
            lambda: defaultdict(list)
        )

    @torch.inference_mode()
    def add(self, picture: Picture) -> None:
        """Every arm about one more picture."""
        chat = make_chat(self._checkpoint, picture)
        chooser = Chooser(self._checkpoint, picture, chat, self._tower)
        squares = [answer_squares(picture, question.answer) for question in picture.questions]
        of_picture: dict[tuple[str, float], list[Reading]] = defaultdict(list)
        for form, budgets, quotas in self._sizes(chat):
            for selector, reading in self._read(chat, chooser, squares, form, quotas):
                for budget in budgets:
                    of_picture[arm_name(form, selector.split()[0]), budget].append(reading)
        for form, budget, reading in self._read_smaller(chat, chooser):
            of_picture[arm_name(form, SMALLER), budget].append(reading)
        for name in self._plan.in_llm:
            for budget in self._plan.budgets:
                for kind, reading in self._read_in_llm(name, budget, chat, squares):
                    of_picture[kind, budget].append(reading)
        for (arm, budget), readings in of_picture.items():
            self.readings[arm][budget].append(Reading.mean(picture.family, readings))

    def _sizes(self, chat: Chat) -> Iterator[tuple[str, list[float], tuple[int, ...]]]:
        """Format, budgets and quotas of what is read of a chat; budgets of the same quotas are one.
        That of 1 is of all tokens at full width."""
        total = chat.tokens.num_tokens
        yield FULL, [1.0], chat.tokens.quotas(total)
        for form in self._plan.formats:
            budgets = defaultdict(list)
            for budget in self._plan.budgets:
                quotas = chat.tokens.quotas(self._budget.most_tokens(form, budget, total))
                if quotas is not None:
                    budgets[quotas].append(budget)
            for quotas, same in budgets.items():
                yield form, same, quotas

    def _read(
        self, chat: Chat, chooser: Chooser, squares: list, form: str, quotas: tuple[int, ...]
    ) -> Iterator[tuple[str, Reading]]:
        """Selectors and readings of one format and size. Where all tokens stay, one choice is all
        of them."""
        total, count = chat.tokens.num_tokens, sum(quotas) + len(chat.tokens.fixed)
        names = [name for name in self._plan.selectors_of(form) if name not in (ALL, SMALLER)]
        chosen = [chooser.choose(name, quotas) for name in names]
        if count == total:
            names = [*names, ALL]
            chosen = [(torch.arange(total, device=chat.embeds.device), chat.image_embeds)]
        right, recall = [], []
        for first in range(0, len(chosen), self._plan.batch):
            kept, features = (
                torch.stack(each)
                for each in zip(*chosen[first : first + self._plan.batch], strict=True)
            )
            logits = read_answers(self._checkpoint, chat, kept, features, self._formats[form])
            right += is_right(chat, logits).float().tolist()
            recall += [recalls(chat, tokens, squares) for tokens in kept]
        sizes = (
            count,
            self._budget.share(form, count, total),
            self._budget.ideal_share(form, count, total),
        )
        for number, name in enumerate(names):
            of_choice = number if len(chosen) == len(names) else 0
            yield name, Reading(right[of_choice], recall[of_choice], *sizes)

    def _read_smaller(self, chat: Chat, chooser: Chooser) -> Iterator[tuple[str, float, Reading]]:
        total = chat.tokens.num_tokens
        for form in self._plan.formats:
            if SMALLER not in self._plan.selectors_of(form):
                continue
            read: dict[int, Reading] = {}
            for budget in self._plan.budgets:
                other = chooser.smaller(self._budget.most_tokens(form, budget, total))
                if other is None:
                    continue
                count = other.tokens.num_tokens
                if count not in read:
                    every = torch.arange(count, device=other.embeds.device)[None]
                    logits = read_answers(
                        self._checkpoint,
                        other,
                        every,
                        other.image_embeds[None],
                        self._formats[form],
                    )
                    right = is_right(other, logits)[0].float().tolist()
                    sizes = (
                        count,
                        self._budget.share(form, count, total),
                        self._budget.ideal_share(form, count, total),
                    )
                    read[count] = Reading(right, [None] * len(right), *sizes)
                yield form, budget, read[count]

    def _read_in_llm(
        self, name: str, budget: float, chat: Chat, squares: list
    ) -> Iterator[tuple[str, Reading]]:
        """With a choice for each question, and with the first one's for all."""
        total, layers = chat.tokens.num_tokens, self._checkpoint.num_layers
        stages = stages_of(name, budget, layers, total)
        if stages is None:
            return
        judges = [low - 1 for low, _ in chat.answers]
        logits, kept = read_with_stages(self._checkpoint, chat, stages, judges)
        right = is_right(chat, logits).float()
        recall = [recalls(chat, tokens, squares) for tokens in kept]
        share = stages.bytes(layers, total)
        sizes = kept.shape[1], share, share
        turns = range(len(judges))
        yield (
            name,
            Reading(right.diagonal().tolist(), [recall[turn][turn] for turn in turns], *sizes),
        )
        yield f"{name} reused", Reading(right[0].tolist(), recall[0], *sizes)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="a checkpoint's directory or name")
    add("--pictures", type=int, default=100, help="of all families in turn (default %(default)s)")
    add("--seed", type=int, default=HELD_OUT_SEED)
    add(
        "--budgets",
        type=float,
        nargs="+",
        default=BUDGETS,
        help="shares of stock's bytes (default %(default)s)",
    )
    add(
        "--formats",
        nargs="+",
        default=FORMATS,
        help=f"of rows: {FULL}, rankR, A+zB/zV (default %(default)s)",
    )
    add("--selectors", nargs="*", default=SELECTORS, choices=SELECTORS, help="of full-width rows")
    add(
        "--joint-selectors",
        nargs="*",
        default=JOINT_SELECTORS,
        choices=SELECTORS,
        help="of the other formats",
    )
    add(
        "--in-llm",
        nargs="*",
        default=IN_LLM,
        help="fastvK with the first layer of fewer tokens, pyramiddrop",
    )
    add(
        "--batch",
        type=int,
        default=16,
        help="choices that are read at a time (default %(default)s)",
    )
    add(
        "--seconds",
        type=float,
        help="begin no picture after so long, so that what was read is written",
    )
    add("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args(arguments)
    if not all(0 < budget < 1 for budget in args.budgets):
        parser.error(f"--budgets must be between 0 and 1, got {args.budgets}")
    try:
        for form in set(args.formats) - {FULL}:
            row_format(form)
    except ValueError as error:
        parser.error(str(error))
    for name in args.in_llm:
        if name != "pyramiddrop" and not (
            name.startswith("fastv") and name[5:].isdigit() and int(name[5:])
        ):
            parser.error(
                f"--in-llm takes pyramiddrop and fastvK with K of 1 and more, got {name!r}"
            )
    return args


def main() -> None:
    args = parse()
    start = time.monotonic()
    checkpoint = Checkpoint(args.model)
    lists = ("budgets", "formats", "selectors", "joint_selectors", "in_llm")
    evaluation = Evaluation(
        checkpoint, Plan(*(tuple(getattr(args, name)) for name in lists), args.batch)
    )
    families, count = list(FAMILIES), 0
    for number in tqdm(range(args.pictures), file=sys.stderr, disable=None):
        if args.seconds and time.monotonic() - start > args.seconds:
            break
        evaluation.add(make_picture(families[number % len(families)], args.seed + number))
        count += 1
    document = {
        "model": checkpoint.name,
        "pictures": count,
        "seed": args.seed,
        "families": [families[number % len(families)] for number in range(count)],
        "device": checkpoint.device,
        "seconds": round(time.monotonic() - start),
        "arms": summary(evaluation.readings),
    }
    if args.output:
        args.output.write_text(json.dumps(document) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
