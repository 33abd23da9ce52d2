"""Exact match of a vision-language model's greedy answers on the endless tasks of
scripts/common/tasks.

    python scripts/eval/eval_vlm.py --url http://127.0.0.1:30000 --output dense.json
    python scripts/eval/eval_vlm.py --url http://127.0.0.1:30000 --compare dense.json --require 90
    python scripts/eval/eval_vlm.py --model scripts/models/reader-qwen2.5-vl --pictures 30

Asks a live SGLang server, or a checkpoint in this process (transformers). A chat is one picture and
--turns questions, one after another; the model's own earlier answers stay in the chat, wrong ones
too. A turn is right when answer and truth are the same text, up to blanks at both ends. The
pictures were never seen in training: the default ones are the fixed held-out set, --seed draws
others.

Prints a table per family, answer length, turn and kind of question; --compare puts an earlier
result on the same pictures beside it. Standard errors take the turns of one picture as one cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import openai
from openai import AsyncOpenAI
from safetensors import SafetensorError
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from chats import connect
from pictures import data_url
from routing import routing_headers
from tasks import FAMILIES, HELD_OUT_SEED, Picture, make_picture

# What the client raises of a connection, and what an answer of another shape leads to.
MALFORMED = (openai.OpenAIError, AttributeError, IndexError, TypeError)
SEED_STRIDE = 10**6  # the most pictures of one --seed
# Answer lengths in tokens; the trained models write one character a token.
LENGTH_CLASSES = ((1, 1), (2, 9), (10, 29), (30, None))


class EvalError(RuntimeError):
    """The evaluation could not be done. The message names what failed, where, and what to do."""


@dataclass(frozen=True)
class Record:
    """One turn; `answer` as the model wrote it."""

    family: str
    seed: int
    turn: int
    kind: str
    question: str
    truth: str
    answer: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.family, self.seed, self.turn

    @property
    def is_right(self) -> bool:
        return self.answer.strip() == self.truth.strip()


@dataclass(frozen=True)
class Rate:
    """Of `number` turns `right` were right; `standard_error` of the share."""

    number: int
    right: int
    standard_error: float

    @property
    def share(self) -> float:
        return self.right / self.number

    @classmethod
    def of(cls, outcomes: list[tuple[tuple[str, int], bool]]) -> Rate:
        """`outcomes`: (picture, right) of each turn. Linearised ratio estimator over pictures."""
        number, right = len(outcomes), sum(hit for _, hit in outcomes)
        residuals: dict[tuple[str, int], float] = {}
        for picture, hit in outcomes:
            residuals[picture] = residuals.get(picture, 0.0) + hit - right / number
        clusters = len(residuals)
        variance = sum(value**2 for value in residuals.values()) * clusters / max(1, clusters - 1)
        return cls(number, right, math.sqrt(variance) / number)


class Backend(Protocol):
    """A model that answers chats in the OpenAI form."""

    def image_part(self, picture: Picture) -> dict: ...

    async def complete(self, messages: list[dict], chat: str) -> str:
        """The answer; EvalError if there is none. `chat` is the name of the chat, the same in all
        its turns."""


class ServerBackend:
    def __init__(self, client: AsyncOpenAI, model: str, max_tokens: int) -> None:
        self._client, self._model, self._max_tokens = client, model, max_tokens

    def image_part(self, picture: Picture) -> dict:
        return {"type": "image_url", "image_url": {"url": data_url(picture.image)}}

    async def complete(self, messages: list[dict], chat: str) -> str:
        try:
            reply = await self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                max_tokens=self._max_tokens,
                temperature=0,
                extra_headers=routing_headers(chat),
            )
            return reply.choices[0].message.content or ""
        except openai.APIStatusError as error:
            raise EvalError(f"HTTP {error.status_code}: {error.response.text[:500]}") from error
        except MALFORMED as error:
            raise EvalError(f"{type(error).__name__}: {error}; see the server's log") from error


class LocalBackend:
    """The checkpoint in this process, greedy, one chat at a time."""

    def __init__(self, directory: Path, dtype: str, device: str, max_tokens: int) -> None:
        # Seconds that only this backend has to wait.
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._torch, self._max_tokens = torch, max_tokens
        self._processor = AutoProcessor.from_pretrained(directory)
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=getattr(torch, dtype))
        self._model = model.to(device).eval()

    def image_part(self, picture: Picture) -> dict:
        return {"type": "image", "image": picture.image}

    async def complete(self, messages: list[dict], chat: str) -> str:
        images = [
            part["image"]
            for m in messages
            if m["role"] == "user"
            for part in m["content"]
            if "image" in part
        ]
        text = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        inputs = self._processor(text=[text], images=images, return_tensors="pt").to(
            self._model.device
        )
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, do_sample=False, max_new_tokens=self._max_tokens)
        new_ids = ids[0, inputs["input_ids"].shape[1] :]
        return self._processor.tokenizer.decode(
            new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


async def hold_chat(backend: Backend, picture: Picture) -> list[Record]:
    messages: list[dict] = []
    records = []
    for turn, question in enumerate(picture.questions, 1):
        parts = [backend.image_part(picture)] if turn == 1 else []
        messages.append(
            {"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}
        )
        try:
            answer = await backend.complete(messages, f"{picture.family} {picture.seed}")
        except EvalError as error:
            where = f"family {picture.family}, seed {picture.seed}, turn {turn}"
            raise EvalError(f"no answer for {where}: {error}") from error
        messages.append({"role": "assistant", "content": answer})
        records.append(
            Record(
                picture.family,
                picture.seed,
                turn,
                question.kind,
                question.text,
                question.answer,
                answer,
            )
        )
    return records


async def hold_chats(
    backend: Backend, arguments: argparse.Namespace, concurrency: int
) -> list[Record]:
    """All chats, `concurrency` at a time; the records in the order of the pictures."""
    first = first_seed(arguments)
    waiting = iter(
        [(family, first + i) for i in range(arguments.pictures) for family in arguments.families]
    )
    records: list[Record] = []
    with tqdm(total=arguments.pictures * len(arguments.families), unit="picture") as progress:

        async def work() -> None:
            for family, seed in waiting:
                picture = make_picture(family, seed, questions=arguments.turns)
                records.extend(await hold_chat(backend, picture))
                progress.update()

        tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return sorted(records, key=lambda record: record.key)


def first_seed(arguments: argparse.Namespace) -> int:
    return HELD_OUT_SEED + arguments.seed * SEED_STRIDE


async def find_model(client: AsyncOpenAI, url: str) -> str:
    """The first model that the server lists."""
    listing = f"{url}/v1/models"
    try:
        return (await client.models.list()).data[0].id
    except openai.APIStatusError as error:
        raise EvalError(
            f"{listing} answered HTTP {error.status_code}; is this an SGLang server?"
        ) from error
    except openai.APIConnectionError as error:
        remedy = "start a server with scripts/serve.sh, or set --url"
        raise EvalError(f"no answer from {listing} ({error.__cause__}); {remedy}") from error
    except MALFORMED as error:
        raise EvalError(f"{listing} lists no model; is this an SGLang server?") from error


async def server_flags(client: AsyncOpenAI, url: str) -> dict | None:
    """What the server says of RotateK, and whatever else decides about numbers; None if it says
    nothing."""
    try:
        info = await client.get(f"{url}/server_info", cast_to=object)
    except openai.OpenAIError:
        return None
    if not isinstance(info, dict):
        return None
    kept = (
        "model_path",
        "dtype",
        "attention_backend",
        "native_llava_next",
        "chunked_prefill_size",
        "max_total_tokens",
    )
    flags = {name: value for name, value in info.items() if "rotatek" in name or name in kept}
    states = info.get("internal_states") or [{}]
    return {"enable_rotatek": False} | flags | {"rotatek_state": states[0].get("rotatek")}


async def evaluate_server(arguments: argparse.Namespace) -> tuple[list[Record], str, dict | None]:
    """Records, model id, server flags."""
    async with connect(arguments.url, arguments.timeout) as client:
        model = await find_model(client, arguments.url)
        backend = ServerBackend(client, model, arguments.max_tokens)
        records = await hold_chats(backend, arguments, arguments.concurrency)
        # After the run: its counters then tell how much of it was rotated.
        return records, model, await server_flags(client, arguments.url)


def evaluate_checkpoint(arguments: argparse.Namespace) -> tuple[list[Record], str, None]:
    try:
        backend = LocalBackend(
            arguments.model, arguments.dtype, arguments.device, arguments.max_tokens
        )
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise EvalError(
            f"transformers cannot load {arguments.model} on {arguments.device}: {error}"
        ) from error
    return asyncio.run(hold_chats(backend, arguments, concurrency=1)), str(arguments.model), None


def length_class(tokens: int) -> str:
    for low, high in LENGTH_CLASSES:
        if high is None:
            return f"{low}+"
        if tokens <= high:
            return f"{low}-{high}" if low < high else str(low)
    raise AssertionError("the last class has no end")


def group_names(record: Record) -> list[tuple[str, str]]:
    """The (section, group) pairs of the report to which a turn belongs."""
    length = length_class(len(record.truth))
    return [
        ("family", record.family),
        ("family", "all"),
        ("answer length", length),
        ("family and answer length", f"{record.family}, {length}"),
        ("turn", str(record.turn)),
        ("kind", f"{record.family}/{record.kind}"),
    ]


def summarise(
    records: list[Record], wrong: set[tuple[str, int, int]]
) -> dict[str, dict[str, Rate]]:
    """Section -> group -> rate, with the turns in `wrong` taken as wrong and all others as
    right."""
    outcomes: dict[str, dict[str, list[tuple[tuple[str, int], bool]]]] = {}
    for record in records:
        for section, group in group_names(record):
            groups = outcomes.setdefault(section, {})
            groups.setdefault(group, []).append(
                ((record.family, record.seed), record.key not in wrong)
            )
    return {
        section: {group: Rate.of(groups[group]) for group in sorted(groups, key=group_order)}
        for section, groups in outcomes.items()
    }


def group_order(group: str) -> list[str | int]:
    """Sort key: numbers within a name by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", group)]


def picture_set(arguments: argparse.Namespace) -> dict:
    return {
        "families": arguments.families,
        "first_seed": first_seed(arguments),
        "per_family": arguments.pictures,
        "turns": arguments.turns,
    }


def digest(records: list[Record]) -> str:
    """Of all questions and truths: tells when scripts/common/tasks was changed between two
    results."""
    asked = [[*record.key, record.question, record.truth] for record in records]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def make_report(
    arguments: argparse.Namespace, records: list[Record], model: str, server: dict | None
) -> dict:
    wrong = [record for record in records if not record.is_right]
    rates = summarise(records, {record.key for record in wrong})
    return {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "model": model,
        "server": server,
        "pictures": picture_set(arguments) | {"digest": digest(records)},
        "rates": {
            section: {
                group: {
                    "number": rate.number,
                    "right": rate.right,
                    "exact_match_percent": round(100 * rate.share, 2),
                    "standard_error_percent": round(100 * rate.standard_error, 2),
                }
                for group, rate in groups.items()
            }
            for section, groups in rates.items()
        },
        "wrong": [asdict(record) for record in wrong],
    }


def wrong_keys(report: dict) -> set[tuple[str, int, int]]:
    return {(entry["family"], entry["seed"], entry["turn"]) for entry in report["wrong"]}


def read_earlier(path: Path, pictures: dict) -> dict:
    """The result at `path`; EvalError unless it is of the same pictures."""
    try:
        earlier = json.loads(path.read_text())
        got = {name: earlier["pictures"][name] for name in pictures}
        wrong_keys(earlier)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"--compare {path} is no --output of this program ({type(error).__name__}: {error})"
        ) from error
    if got != pictures:
        raise EvalError(
            f"--compare {path} is of other pictures: expected {pictures}, got {got}; "
            "give the same --families, --seed, --pictures and --turns"
        )
    return earlier


def name_of(report: dict) -> str:
    server = report["server"]
    if server is None:
        return report["model"]
    if not server.get("enable_rotatek"):
        return f"{report['model']}, rotatek off"
    return f"{report['model']}, rotatek on (key bits {server.get('rotatek_key_bits')})"


def print_report(
    report: dict, records: list[Record], earlier: dict | None, earlier_path: Path | None
) -> None:
    """The table; with `earlier` also its share, the difference, and the turns that only one of the
    two got right."""
    wrong = wrong_keys(report)
    header = ["by", "", "turns", "exact %", "s.e."] + (
        ["earlier %", "s.e.", "change", "lost", "gained"] if earlier else []
    )
    rows = []
    earlier_wrong = wrong_keys(earlier) if earlier else set()
    before = summarise(records, earlier_wrong)
    lost, gained = wrong - earlier_wrong, earlier_wrong - wrong
    for section, groups in summarise(records, wrong).items():
        for group, rate in groups.items():
            row = [
                section if group == next(iter(groups)) else "",
                group,
                str(rate.number),
                f"{100 * rate.share:.2f}",
                f"{100 * rate.standard_error:.2f}",
            ]
            if earlier:
                old = before[section][group]
                keys = {record.key for record in records if (section, group) in group_names(record)}
                row += [f"{100 * old.share:.2f}", f"{100 * old.standard_error:.2f}"]
                row += [
                    f"{100 * (rate.share - old.share):+.2f}",
                    str(len(keys & lost)),
                    str(len(keys & gained)),
                ]
            rows.append(row)
    alignments = ["left", "left", *["right"] * (len(header) - 2)]
    print(tabulate(rows, header, "plain", disable_numparse=True, colalign=alignments))
    print(f"this result: {name_of(report)}")
    if earlier:
        print(
            f"earlier: {name_of(earlier)} ({earlier_path}); lost: right there, wrong here; gained: "
            "the other way"
        )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(
            f"{text} is below 0: those pictures may have been trained on"
        )
    return value


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a live server, with or without /v1")
    where.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a checkpoint in the Hugging Face layout, run here",
    )
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default=dtypes[0], help="with --model (default %(default)s)")
    add("--device", default="cpu", help="with --model (default %(default)s)")
    add(
        "--concurrency",
        type=positive,
        default=8,
        help="chats at a time, with --url (default %(default)s)",
    )
    add(
        "--timeout",
        type=positive,
        default=600,
        help="seconds for one answer, with --url (default %(default)s)",
    )
    add(
        "--max-tokens", type=positive, default=256, help="answer length limit (default %(default)s)"
    )
    add(
        "--pictures",
        type=positive,
        default=170,
        metavar="N",
        help="of each family (default %(default)s)",
    )
    add(
        "--turns",
        type=positive,
        default=3,
        help="questions about each picture (default %(default)s)",
    )
    add(
        "--families",
        nargs="+",
        choices=sorted(FAMILIES),
        default=list(FAMILIES),
        help="(default: all)",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        help="0: the fixed held-out set, else other pictures (default %(default)s)",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="where the result goes (default: only the table)",
    )
    add(
        "--compare", type=Path, metavar="FILE.json", help="an earlier --output on the same pictures"
    )
    add(
        "--require",
        type=float,
        metavar="PERCENT",
        help="exit 1 if the exact match of any family is below",
    )
    arguments = parser.parse_args(argv)
    if arguments.pictures > SEED_STRIDE:
        parser.error(f"--pictures is {arguments.pictures}, expected {SEED_STRIDE} at most")
    # In a fixed order, each once: results of the same families compare.
    arguments.families = [family for family in FAMILIES if family in arguments.families]
    arguments.url = arguments.url and arguments.url.rstrip("/").removesuffix("/v1")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """The exit code."""
    earlier = read_earlier(arguments.compare, picture_set(arguments)) if arguments.compare else None
    if arguments.output:
        # Before the run: a path that cannot be written should not cost one.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.touch()
    evaluate = (lambda a: asyncio.run(evaluate_server(a))) if arguments.url else evaluate_checkpoint
    records, model, server = evaluate(arguments)
    report = make_report(arguments, records, model, server)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if earlier and earlier["pictures"].get("digest") != report["pictures"]["digest"]:
        raise EvalError(
            f"--compare {arguments.compare} was asked other questions about the same seeds: "
            "scripts/common/tasks differs between the two; make it again"
        )
    print_report(report, records, earlier, arguments.compare)
    shares = {
        name: report["rates"]["family"][name]["exact_match_percent"] for name in arguments.families
    }
    short = [name for name, share in shares.items() if share < (arguments.require or 0)]
    if short:
        print(f"below the required {arguments.require:g} %: {', '.join(short)}", file=sys.stderr)
    return int(bool(short))


def main() -> None:
    try:
        sys.exit(run(parse_arguments()))
    except (EvalError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
