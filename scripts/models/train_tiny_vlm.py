"""Train the small vision-language models of scripts/models on the endless tasks of
scripts/common/tasks.

    python scripts/models/train_tiny_vlm.py --backbone qwen2_5_vl --out runs/qwen --steps 40000
    python scripts/models/train_tiny_vlm.py --backbone llava_next --out runs/llava --steps 40000
    python scripts/models/train_tiny_vlm.py --backbone qwen2_5_vl --out runs/qwen-pruned --init
    runs/qwen --prune 0.2 --steps 4000

Needs one CUDA GPU and torch and transformers alone. A run that is started again with the same --out
goes on where its last state was saved. --out gets the checkpoint (Hugging Face layout),
training.json (what was measured), loss.png and state.pt.

A row of a batch is a picture and a chat about it, as many turns as fit; the loss is on the answers.
Since the generator knows what it drew, linear heads on the visual tokens also learn to name the
characters and shapes under each (dropped at the end): without that help reading does not start
within hours.

With --prune a batch keeps a random share of its visual tokens (pruned_reader.py): a stage that goes
on from a reader.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import vlm_models
from pruned_reader import SELECTORS, PrunedReader
from tasks import FAMILIES, HELD_OUT_SEED, NUM_THINGS, SIZE_WEIGHTS, SIZES, make_picture
from tasks.canvas import CHARACTERS
from vlm_models import READERS, Reader, load_weights, save_checkpoint

LOG_EVERY = 100
# Seeds of the fixed held-out set, apart from those of training and of scripts/eval/eval_vlm.py.
VALIDATION_SEED = HELD_OUT_SEED // 2
VALIDATION_SHARE = 0.35  # of the visual tokens, where training pruned them


@dataclass(frozen=True)
class Plan:
    """What a batch is made of, as a function of its number alone, so that a run can be resumed."""

    seed: int
    steps: int
    batch_size: int
    text_length: int
    easy_part: float  # share of the steps over which pictures grow from level 0.2 to 1
    square_part: float  # share of the steps with the smallest picture size alone
    least_share: float = 1.0  # of a batch's visual tokens

    def level(self, step: int) -> float:
        return min(1.0, 0.2 + 0.8 * step / max(1.0, self.easy_part * self.steps))

    def size(self, step: int) -> tuple[int, int]:
        if step < self.square_part * self.steps:
            return SIZES[0]
        return random.Random(f"size {self.seed} {step}").choices(SIZES, SIZE_WEIGHTS)[0]

    def pruned(self, reader: Reader, step: int) -> Reader | PrunedReader:
        """``reader`` with a random share of the visual tokens, chosen in one of two ways."""
        if self.least_share == 1:
            return reader
        draws = random.Random(f"share {self.seed} {step}")
        return PrunedReader(
            reader, draws.uniform(self.least_share, 1), draws.choice(sorted(SELECTORS))
        )

    def rows(self, size: tuple[int, int]) -> int:
        """Fewer large pictures to a batch, so that batches are about as large."""
        return max(1, round(self.batch_size * SIZES[0][0] * SIZES[0][1] / (size[0] * size[1])))


class Batches(IterableDataset):
    """Batches of `plan` from step `start` on, in order when the DataLoader takes turns among its
    workers."""

    def __init__(self, reader: Reader, plan: Plan, start: int) -> None:
        self.tokenizer, self.chat, self.plan, self.start = (
            reader.tokenizer,
            reader.chat,
            plan,
            start,
        )

    def __iter__(self) -> Iterator[dict]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.start + first, self.plan.steps, stride):
            yield self.batch(step)

    def batch(self, step: int) -> dict:
        size = self.plan.size(step)
        rows = [
            (family, self.plan.seed * self.plan.steps * 1000 + step * 1000 + row)
            for row, family in zip(
                range(self.plan.rows(size)), list(FAMILIES) * self.plan.batch_size, strict=False
            )
        ]
        return self.collate(rows, size, self.plan.level(step))

    def collate(self, rows: list[tuple[str, int]], size: tuple[int, int], level: float) -> dict:
        """`answers` numbers the answer that a token belongs to (0: none); kinds[i] is the kind of
        answer i + 1."""
        length = self.plan.text_length
        batch = {
            "pictures": np.empty((len(rows), size[1], size[0], 3), np.uint8),
            "glyphs": np.empty((len(rows), size[1] // 28, size[0] // 14), np.uint8),
            "things": np.empty((len(rows), size[1] // 28, size[0] // 28), np.uint8),
            "ids": np.zeros((len(rows), length), np.int64),
            "answers": np.zeros((len(rows), length), np.int64),
        }
        kinds: list[tuple[str, str, int]] = []
        for row, (family, seed) in enumerate(rows):
            picture = make_picture(family, seed, size, questions=8, level=level)
            batch["pictures"][row] = np.asarray(picture.image)
            batch["glyphs"][row], batch["things"][row] = picture.glyphs, picture.things
            at = 0
            pieces = self.chat([(question.text, question.answer) for question in picture.questions])
            for question, (asked, answered) in zip(picture.questions, pieces, strict=True):
                asked_ids, answer_ids = (
                    self.tokenizer.encode(asked),
                    self.tokenizer.encode(answered),
                )
                end = at + len(asked_ids) + len(answer_ids)
                if end > length:
                    if at:
                        break
                    raise ValueError(
                        f"{question} takes {end} tokens, more than --text-length {length}"
                    )
                batch["ids"][row, at:end] = asked_ids + answer_ids
                kinds.append((family, question.kind, len(answer_ids) - 1))
                batch["answers"][row, end - len(answer_ids) : end] = len(kinds)
                at = end
        return {name: torch.from_numpy(array) for name, array in batch.items()} | {"kinds": kinds}


class Losses(torch.nn.Module):
    """The loss of a batch, and which answers were right."""

    def __init__(self) -> None:
        super().__init__()
        self.glyph_head = torch.nn.Linear(vlm_models.HIDDEN_SIZE, 2 * len(CHARACTERS))
        self.thing_head = torch.nn.Linear(vlm_models.HIDDEN_SIZE, NUM_THINGS)
        # Most of a picture is empty paper.
        weights = torch.ones(max(len(CHARACTERS), NUM_THINGS))
        weights[0] = 0.05
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self, reader: Reader, batch: dict
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss, its parts, and per answer whether greedy decoding would give it exactly
        [answers] bool."""
        logits, squares = reader.forward(batch["pictures"], batch["ids"])
        glyphs, things = batch["glyphs"].long().flatten(), batch["things"].long().flatten()
        glyph_logits = self.glyph_head(squares.float()).view(-1, len(CHARACTERS))
        thing_logits = self.thing_head(squares.float()).view(-1, NUM_THINGS)
        parts = {
            "glyphs": F.cross_entropy(glyph_logits, glyphs, self.class_weights[: len(CHARACTERS)]),
            "things": F.cross_entropy(thing_logits, things, self.class_weights[:NUM_THINGS]),
        }
        target, answers = batch["ids"][:, 1:].flatten(), batch["answers"][:, 1:].flatten()
        predicted = logits[:, :-1].float().flatten(0, 1)
        token_loss = F.cross_entropy(predicted, target, reduction="none")
        count = len(batch["kinds"]) + 1
        lengths = torch.zeros(count, device=target.device).index_add_(
            0, answers, torch.ones_like(token_loss)
        )
        # Between one vote per token and one per answer: a one-token count matters as much as a few
        # lines of text.
        weights = torch.where(answers > 0, lengths[answers].rsqrt(), 0)
        parts["answers"] = (token_loss * weights).sum() / weights.sum()
        with torch.no_grad():
            wrong = (predicted.argmax(-1) != target).float()
            right = torch.zeros(count, device=target.device).index_add_(0, answers, wrong)[1:] == 0
            shown = (glyphs > 0).float()
            parts["glyphs read"] = (
                (glyph_logits.argmax(-1) == glyphs).float() * shown
            ).sum() / shown.sum()
        loss = parts["answers"] + 0.3 * parts["glyphs"] + 0.3 * parts["things"]
        return loss, {name: part.detach() for name, part in parts.items()}, right


class MasterWeights:
    """AdamW on float32 copies of bfloat16 parameters: what is trained is what is served."""

    def __init__(
        self, modules: list[torch.nn.Module], learning_rate: float, weight_decay: float
    ) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        decay = [m for m in self.masters if m.dim() > 1]
        rest = [m for m in self.masters if m.dim() <= 1]
        groups = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        fused = self.masters[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=fused
        )

    def step(self, learning_rate: float) -> torch.Tensor:
        """One step at `learning_rate`; returns the gradient's norm before it is clipped to 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        used = [
            (m, p) for m, p in zip(self.masters, self.parameters, strict=True) if p.grad is not None
        ]
        for master, parameter in used:
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_([m for m, _ in used], 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([p for _, p in used], [m for m, _ in used])
        return norm


def learning_rate_at(step: int, arguments: argparse.Namespace) -> float:
    """Warm up, hold, then fall linearly to zero."""
    warm = min(1.0, (step + 1) / arguments.warmup_steps)
    left = (arguments.steps - step) / (arguments.decay_part * arguments.steps)
    return arguments.learning_rate * min(warm, left, 1.0)


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


class Tally:
    """Exact matches per (family, kind) and per (family, length class)."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def add(self, kinds: list[tuple[str, str, int]], right: torch.Tensor) -> None:
        for (family, kind, length), hit in zip(kinds, right.tolist(), strict=True):
            for name in (family, f"{family}/{kind}") + (
                (f"{family}, 30 tokens and more",) if length >= 30 else ()
            ):
                count = self.counts.setdefault(name, [0, 0])
                count[0] += hit
                count[1] += 1

    def rates(self) -> dict[str, float]:
        return {name: round(hits / asked, 4) for name, (hits, asked) in sorted(self.counts.items())}


def validate(
    reader: Reader | PrunedReader, losses: Losses, plan: Plan, pictures: int
) -> dict[str, float]:
    """Exact match on a fixed set that training never draws: `pictures` of every family."""
    device = losses.class_weights.device
    batches, tally = Batches(reader, plan, 0), Tally()
    for size in SIZES:
        share = max(1, pictures * SIZE_WEIGHTS[SIZES.index(size)] // sum(SIZE_WEIGHTS))
        rows = [(family, VALIDATION_SEED + index) for index in range(share) for family in FAMILIES]
        for start in range(0, len(rows), plan.rows(size)):
            batch = batches.collate(rows[start : start + plan.rows(size)], size, level=1.0)
            with torch.no_grad():
                _, _, right = losses(reader, to_device(batch, device))
            tally.add(batch["kinds"], right)
    return tally.rates()


def plot(history: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    steps = [entry["step"] for entry in history]
    for name in ("answers", "glyphs", "things"):
        left.plot(steps, [entry[name] for entry in history], label=name)
    left.set(xlabel="step", ylabel="cross-entropy", yscale="log", title="loss")
    for family in FAMILIES:
        right.plot(steps, [entry["exact match"].get(family, 0) for entry in history], label=family)
    right.set(
        xlabel="step",
        ylabel="exact match on the batches (never seen before)",
        ylim=(0, 1),
        title="answers",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def train(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.allow_cpu:
        raise SystemExit(
            "error: no CUDA GPU here, and training takes one; --allow-cpu is for trying the script "
            "out"
        )
    if (arguments.seed + 1) * arguments.steps * 1000 > VALIDATION_SEED:
        raise SystemExit(
            f"error: --seed {arguments.seed} with --steps {arguments.steps} would draw pictures of "
            f"the held-out set; their product must stay below {VALIDATION_SEED // 1000}"
        )
    if not 0 < arguments.prune <= 1:
        raise SystemExit(f"error: --prune must be in (0, 1], got {arguments.prune}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    reader = READERS[arguments.backbone].build().to(device, torch.bfloat16)
    if arguments.init:
        load_weights(reader, arguments.init)
    losses = Losses().to(device)
    weights = MasterWeights([reader.model, losses], arguments.learning_rate, arguments.weight_decay)
    plan = Plan(
        arguments.seed,
        arguments.steps,
        arguments.batch_size,
        arguments.text_length,
        arguments.easy_part,
        arguments.square_part,
        arguments.prune,
    )
    state_path = arguments.out / "state.pt"
    step, seconds, history = 0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["backbone"] != arguments.backbone:
            raise SystemExit(
                f"error: {state_path} is of {state['backbone']}, not {arguments.backbone}; give "
                "another --out"
            )
        with torch.no_grad():
            for parameter, master, saved in zip(
                weights.parameters, weights.masters, state["masters"], strict=True
            ):
                master.copy_(saved)
                parameter.copy_(saved)
        weights.optimizer.load_state_dict(state["optimizer"])
        step, seconds, history = state["step"], state["seconds"], state["history"]
        print(f"resumed {state_path} at step {step}", flush=True)
    if device.type == "cuda" and not arguments.eager:
        torch._dynamo.config.cache_size_limit = 64
        torch._dynamo.config.automatic_dynamic_shapes = False
        # Pruned batches have any number of tokens.
        vlm_models.decoder_layer = torch.compile(
            vlm_models.decoder_layer, dynamic=arguments.prune < 1 or None
        )
        vlm_models.vision_block = torch.compile(vlm_models.vision_block)

    def save() -> None:
        state = {
            "backbone": arguments.backbone,
            "masters": [master.detach() for master in weights.masters],
            "optimizer": weights.optimizer.state_dict(),
            "step": step,
            "seconds": seconds + time.monotonic() - began,
            "history": history,
        }
        torch.save(state, state_path.with_suffix(".new"))
        state_path.with_suffix(".new").replace(state_path)
        save_checkpoint(reader, arguments.out)
        if history:
            plot(history, arguments.out / "loss.png")

    loader = DataLoader(
        Batches(reader, plan, step),
        batch_size=None,
        num_workers=arguments.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if arguments.workers else None,
    )
    began = saved = time.monotonic()
    tally, sums, waited = Tally(), {}, 0.0
    pending: list[tuple[list, torch.Tensor]] = []
    fetched = time.monotonic()
    for batch in tqdm(loader, total=arguments.steps, initial=step, unit="step", mininterval=10):
        waited += time.monotonic() - fetched
        loss, parts, right = losses(plan.pruned(reader, step), to_device(batch, device))
        loss.backward()
        rate = learning_rate_at(step, arguments)
        norm = weights.step(rate)
        step += 1
        for name, part in (parts | {"gradient norm": norm}).items():
            sums[name] = sums.get(name, 0) + part
        pending.append((batch["kinds"], right))
        if step % LOG_EVERY == 0 or step == arguments.steps:
            count = len(pending)
            for kinds, hits in pending:
                tally.add(kinds, hits)
            entry = {
                "step": step,
                "seconds": round(seconds + time.monotonic() - began, 1),
                "learning rate": rate,
            }
            entry |= {"level": round(plan.level(step), 3), "waited": round(waited, 2)}
            entry |= {name: round((total / count).item(), 5) for name, total in sums.items()}
            entry["exact match"] = tally.rates()
            history.append(entry)
            print(json.dumps(entry), flush=True)
            if not np.isfinite(entry["answers"]):
                raise SystemExit(
                    f"error: the loss is {entry['answers']} at step {step}; lower --learning-rate"
                )
            tally, sums, waited, pending = Tally(), {}, 0.0, []
        if time.monotonic() - saved > arguments.save_every:
            save()
            saved = time.monotonic()
        fetched = time.monotonic()
    exact_match = validate(reader, losses, plan, arguments.validation_pictures)
    pruned = {}
    if arguments.prune < 1:
        few = PrunedReader(reader, VALIDATION_SHARE, "farthest")
        found = validate(few, losses, plan, arguments.validation_pictures)
        pruned = {f"the same with {VALIDATION_SHARE:.0%} of the visual tokens": found}
    save()
    summary = {
        "arguments": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in reader.model.parameters()),
        "minutes": round((seconds + time.monotonic() - began) / 60, 1),
        "held-out exact match, answers before given": exact_match,
        **pruned,
        "history": history[:: max(1, len(history) // 50)],
    }
    (arguments.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        json.dumps({"exact match": exact_match, **pruned}, indent=1)
        if pruned
        else json.dumps(exact_match, indent=1)
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backbone", choices=sorted(READERS), required=True)
    add(
        "--out",
        type=Path,
        required=True,
        help="directory for the checkpoint and the state to resume from",
    )
    add(
        "--init",
        type=Path,
        help="start from the weights of this checkpoint directory instead of from random ones",
    )
    add("--steps", type=int, default=40000, help="(default %(default)s)")
    add(
        "--batch-size",
        type=int,
        default=96,
        help="pictures of 672 x 672 px a step (default %(default)s)",
    )
    add(
        "--text-length",
        type=int,
        default=256,
        help="tokens after the picture (default %(default)s)",
    )
    add("--learning-rate", type=float, default=1e-3, help="(default %(default)s)")
    add("--warmup-steps", type=int, default=500, help="(default %(default)s)")
    add(
        "--decay-part",
        type=float,
        default=0.3,
        help="share of the steps with a falling rate (default %(default)s)",
    )
    add("--weight-decay", type=float, default=0.05, help="(default %(default)s)")
    add(
        "--easy-part",
        type=float,
        default=0.25,
        help="share of the steps with easier pictures (default %(default)s)",
    )
    add(
        "--square-part",
        type=float,
        default=0.5,
        help="share of the steps with 672 px pictures alone (default %(default)s)",
    )
    add(
        "--prune",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="keep SHARE to all of a batch's visual tokens, drawn anew",
    )
    add("--seed", type=int, default=1, help="of the weights and the pictures (default %(default)s)")
    add(
        "--workers", type=int, default=14, help="processes that draw pictures (default %(default)s)"
    )
    add(
        "--save-every",
        type=float,
        default=240,
        help="seconds between saved states (default %(default)s)",
    )
    add(
        "--validation-pictures",
        type=int,
        default=300,
        help="of each family, at the end (default %(default)s)",
    )
    add("--eager", action="store_true", help="without torch.compile")
    add(
        "--allow-cpu",
        action="store_true",
        help="run without a GPU, thousands of times too slow to learn anything",
    )
    return parser.parse_args(arguments)


def main() -> None:
    train(parse())


if __name__ == "__main__":
    main()
