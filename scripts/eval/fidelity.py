"""How close answers stay to exact when Keys and Values of an image are stored in fewer bytes.

    python scripts/eval/fidelity.py scripts/models/reader-qwen2.5-vl --pictures 60 --output q.json
    python scripts/eval/fidelity.py MODEL --arms full fp8 16+h4/int4 --protocol D --pictures 200
    python scripts/eval/fidelity.py --text-model DIR --texts A.txt B.md --output text.json
    python scripts/eval/fidelity.py --plot q.json llava.json             # draws bytes against KL

In this process, in fp32, with any Hugging Face checkpoint of Qwen2.5-VL or LLaVA-NeXT, or a causal
language model. A prompt is prefilled exactly; then the picture's Keys and Values of every layer are
replaced by what the arm would read back, and what follows the prompt is read (teacher-forced).

  B  compress before the question: the prompt ends with its picture, three questions with their true
     answers follow
  C  cross-question: the prompt ends with the first question, whose tokens are the last queries that
     paper, think and spark look at; the later questions are judged
  D  long answers: the prompt is one question, and what follows is what the model itself says with
     full Keys and Values, greedily. --question asks for more than the picture's own questions do

Of a text, the first --prefix tokens are coded as one segment, and the next --scored are read.

An answer is right when each of its tokens is the arg-max. KL is that of the arm's next-token
distribution from the full one. Errors are standard errors, over pictures or texts. Bytes are of one
image token and KV head, Key and Value, bases left out; the first arm is full width. The arms, as
KEY/VALUE, are told in fidelity_arms.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from fidelity_arms import ARMS, Arm, make_arm
from fidelity_models import Checkpoint, Model, TextModel, Trial
from tasks import HELD_OUT_SEED

LONG_ANSWER = 30  # tokens


def ratio(pairs: list[tuple[float, int]]) -> tuple[float | None, float | None]:
    """Sum of the first by sum of the second, and its standard error: a pair is one cluster, and
    one alone tells no error."""
    total = sum(count for _, count in pairs)
    if not total:
        return None, None
    mean = sum(amount for amount, _ in pairs) / total
    if len(pairs) == 1:
        return mean, None
    spread = sum((amount - mean * count) ** 2 for amount, count in pairs)
    return mean, math.sqrt(spread * len(pairs) / (len(pairs) - 1)) / total


@dataclass
class Result:
    """Sums of one arm. ``kl_of`` and ``right_of``: KL and judged tokens, right answers and answers
    of each trial."""

    bytes: float
    kl_of: list[tuple[float, int]] = field(default_factory=list)
    right_of: list[tuple[int, int]] = field(default_factory=list)
    same_top: int = 0
    long: int = 0
    long_right: int = 0

    def summary(self) -> dict[str, float | None]:
        tokens = sum(count for _, count in self.kl_of)
        kl, kl_error = ratio(self.kl_of)
        right, right_error = ratio([(100 * right, count) for right, count in self.right_of])
        return {
            "bytes": self.bytes,
            "answers": sum(count for _, count in self.right_of),
            "exact_match": right,
            "standard_error": right_error,
            "tokens": tokens,
            "kl_per_token": kl,
            "kl_standard_error": kl_error,
            "same_top_token": 100 * self.same_top / tokens if tokens else None,
            "long_answers": self.long,
            "long_exact_match": 100 * self.long_right / self.long if self.long else None,
        }


@torch.inference_mode()
def evaluate(model: Model, arms: list[Arm], trials: Iterable[Trial]) -> dict[str, Result]:
    """Every arm on the same trials. The first arm must be full: the others are compared with it."""
    results = {arm.name: Result(arm.bytes) for arm in arms}
    for trial in trials:
        codes: dict = {}
        full: list[torch.Tensor] = []
        for arm in arms:
            cache = read_back(trial, arm, codes)
            logits = model.continue_from(cache, trial.ids, trial.start)
            record(results[arm.name], logits, trial, full)
    return results


def read_back(trial: Trial, arm: Arm, codes: dict) -> DynamicCache:
    """The trial's cache as the arm reads it. ``codes`` keeps what arms of one trial share."""
    cache = DynamicCache()
    first, end = trial.coded
    key_name, _, value_name = arm.name.partition("/")
    for layer, (keys, values) in enumerate(trial.exact):
        parts = []
        for name, tensor, code in (
            ("key " + key_name, keys, lambda k: arm.key(k, trial.queries[layer])),
            ("value " + value_name, values, arm.value),
        ):
            tensor = tensor.clone()
            of_segment = tensor[0, :, first:end]
            if (name, layer) not in codes:
                codes[name, layer] = code(of_segment.transpose(0, 1).float()).transpose(0, 1)
            of_segment.copy_(codes[name, layer])
            parts.append(tensor)
        cache.update(*parts, layer)
    return cache


def record(result: Result, logits: torch.Tensor, trial: Trial, full: list[torch.Tensor]) -> None:
    """``full``: log-probabilities of each span with full Keys and Values; filled by the first."""
    kl, tokens, right, is_first = 0.0, 0, 0, not full
    for number, (low, high) in enumerate(trial.spans):
        truth = trial.ids[low:high]
        logprobs = logits[low - 1 - trial.start : high - 1 - trial.start].log_softmax(-1)
        if is_first:
            full.append(logprobs)
        exact = full[number]
        tokens += high - low
        kl += float((exact.exp() * (exact - logprobs)).sum())
        result.same_top += int((logprobs.argmax(-1) == exact.argmax(-1)).sum())
        if trial.has_answers:
            is_right = bool((logprobs.argmax(-1) == truth).all())
            right += is_right
            if high - low >= LONG_ANSWER:
                result.long += 1
                result.long_right += is_right
    result.kl_of.append((kl, tokens))
    result.right_of.append((right, len(trial.spans) if trial.has_answers else 0))


COLUMNS = (  # of the table: heading, key and format
    ("bytes", "bytes", ".0f"),
    ("EM %", "exact_match", ".2f"),
    ("+-", "standard_error", ".2f"),
    ("KL a token", "kl_per_token", ".2e"),
    ("+-", "kl_standard_error", ".0e"),
    ("top-1 %", "same_top_token", ".2f"),
    ("long EM %", "long_exact_match", ".1f"),
)


def table(summaries: dict[str, dict[str, float | None]]) -> str:
    header = ["Key/Value", *(heading for heading, _, _ in COLUMNS), "x"]
    full_bytes = next(iter(summaries.values()))["bytes"]
    rows = []
    for name, summary in summaries.items():
        cells = (
            "-" if summary[key] is None else f"{summary[key]:{form}}" for _, key, form in COLUMNS
        )
        rows.append([name, *cells, f"{full_bytes / summary['bytes']:.2f}"])
    alignments = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, "plain", disable_numparse=True, colalign=alignments)


def plot(files: list[Path], output: Path) -> None:
    """Bytes of an image token against KL, a panel a file."""
    from figures import answers

    answers.draw([json.loads(file.read_text()) for file in files], output)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a checkpoint's directory or name")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="KEY/VALUE")
    parser.add_argument("--protocol", choices=["B", "C", "D"], default="B")
    parser.add_argument("--question", default="", help="of protocol D, not the picture's own")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--text-model", metavar="DIR", help="a causal model; needs --texts")
    parser.add_argument("--texts", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of a text that are coded")
    parser.add_argument("--scored", type=int, default=256, help="tokens of a text that are read")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="JSON", help="draw these and end")
    parser.add_argument("--png", type=Path, default=Path("fidelity.png"), help="of --plot")
    args = parser.parse_args(arguments)
    if not args.plot and bool(args.model) == bool(args.text_model):
        parser.error("one of MODEL, --text-model and --plot is needed")
    if bool(args.text_model) != bool(args.texts):
        parser.error("--text-model and --texts need each other")
    if args.question and args.protocol != "D":
        parser.error("--question is of --protocol D")
    args.arms = args.arms if args.arms[0] == "full" else ["full", *args.arms]
    try:
        for name in args.arms:
            make_arm(name, head_dim=128)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse()
    if args.plot:
        plot(args.plot, args.png)
        return
    start = time.monotonic()
    if args.text_model:
        model = TextModel(args.text_model)
        trials = model.trials(args.texts, args.prefix, args.scored)
        count, what = len(args.texts), {"texts": [file.name for file in args.texts]}
        what |= {"prefix": args.prefix, "scored": args.scored}
    else:
        model = Checkpoint(args.model)
        trials = model.trials(args.protocol, args.pictures, args.seed, args.question)
        count, what = args.pictures, {"pictures": args.pictures, "seed": args.seed}
        what |= {"protocol": args.protocol, "question": args.question or None}
    arms = [make_arm(name, model.head_dim) for name in args.arms]
    results = evaluate(model, arms, tqdm(trials, total=count, file=sys.stderr, disable=None))
    summaries = {name: result.summary() for name, result in results.items()}
    print(table(summaries))
    if args.output:
        document = {
            "model": model.name,
            **what,
            "head_dim": model.head_dim,
            "device": model.device,
            "seconds": round(time.monotonic() - start),
            "arms": summaries,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
