"""How close answers stay to exact when the Keys and Values of an image are stored in fewer bytes, arm by arm.

    python scripts/fidelity.py scripts/models/reader-qwen2.5-vl --pictures 60 --output fidelity.json
    python scripts/fidelity.py MODEL --arms full fp8 16+h4/int4 --pictures 200
    python scripts/fidelity.py --plot fidelity-qwen.json fidelity-llava.json     # draws bytes against KL

In this process, with any Hugging Face checkpoint of Qwen2.5-VL or LLaVA-NeXT, in fp32. Compress before the question: the
prompt up to the end of its picture is prefilled exactly, then the picture's Keys and Values of every layer are replaced by
what the arm would read back, and three questions with their true answers follow (teacher-forced). An answer is right when
each of its tokens is the arg-max. KL is that of the arm's next-token distribution from the full one, a token of the
answers. Bytes are of one image token and KV head, Key and Value, bases left out; bf16 at full width is the first arm.

Arms are KEY/VALUE. Keys: full, fp8 (e4m3, scale 1, as stock's flag), int4 (a step a token), kivi4 (a step a channel),
had4 (centred, turned by Hadamard, a step a token), rank R (the paper's rows, PCA), A+hB (coded rows: kernels/coded.py).
Values: full, fp8, int4, int2.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tasks import FAMILIES, HELD_OUT_SEED, Picture, make_picture
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from sglang_rotatek.basis import pca
from sglang_rotatek.kernels import coded
from sglang_rotatek.kernels.coded import CodedFormat

ARMS = (
    "full", "fp8/fp8", "int4/int4", "kivi4/int4", "had4/int4", "rank32", "rank64",
    "16+h4/int4", "16+h4", "16+h2/int4", "16+h2/int2",
)  # fmt: skip
LONG_ANSWER = 30  # tokens
Code = Callable[[torch.Tensor], torch.Tensor]  # of one layer and picture: [n, H, D] fp32 -> what is read back


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(coded.FP8).float()


def per_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    return coded.dequantise(coded.quantise(x, bits), bits)


def per_channel(x: torch.Tensor, bits: int) -> torch.Tensor:
    """KIVI's Keys: a step a channel, over all tokens of the picture."""
    low, high = x.amin(0), x.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return ((x - low) / step).round() * step + low


def centred_hadamard(x: torch.Tensor, bits: int) -> torch.Tensor:
    mean, turn = x.mean(0), coded.hadamard(x.shape[-1], x.device)
    return per_token((x - mean) @ turn, bits) @ turn + mean


def low_rank(x: torch.Tensor, rank: int) -> torch.Tensor:
    vectors, _, mean = pca.fit(x, x, rank)
    z = torch.einsum("nhd,hdr->nhr", x - mean, vectors).bfloat16().float()
    return torch.einsum("nhr,hdr->nhd", z, vectors) + mean


def coded_keys(x: torch.Tensor, form: CodedFormat) -> torch.Tensor:
    basis = coded.fit(x, form.head_channels)
    return coded.decode_keys(coded.encode_keys(x, basis, form), basis, form)


@dataclass(frozen=True)
class Arm:
    """``key`` and ``value``: what the arm reads back; ``bytes`` of a token and head."""

    name: str
    key: Code
    value: Code
    bytes: float


def make_arm(name: str, head_dim: int) -> Arm:
    """Raises ValueError for a name that is no arm."""
    key, _, value = name.partition("/")
    key_code, key_bytes = key_arm(key, head_dim)
    values: dict[str, tuple[Code, float]] = {
        "": (lambda v: v, 2 * head_dim),
        "full": (lambda v: v, 2 * head_dim),
        "fp8": (fp8, head_dim),
        "int4": (lambda v: per_token(v, 4), CodedFormat(value_bits=4).value_bytes(head_dim)),
        "int2": (lambda v: per_token(v, 2), CodedFormat(value_bits=2).value_bytes(head_dim)),
    }
    if value not in values:
        raise ValueError(f"Values of the arm {name!r} must be one of {', '.join(filter(None, values))}, got {value!r}")
    value_code, value_bytes = values[value]
    return Arm(name, key_code, value_code, key_bytes + value_bytes)


def key_arm(key: str, head_dim: int) -> tuple[Code, float]:
    if key == "full":
        return lambda k: k, 2 * head_dim
    if key == "fp8":
        return fp8, head_dim
    if key == "int4":
        return lambda k: per_token(k, 4), head_dim / 2 + 4
    if key == "kivi4":
        return lambda k: per_channel(k, 4), head_dim / 2
    if key == "had4":
        return lambda k: centred_hadamard(k, 4), head_dim / 2 + 4
    if match := re.fullmatch(r"rank(\d+)", key):
        rank = int(match[1])
        return lambda k: low_rank(k, rank), 2 * rank
    if match := re.fullmatch(r"(\d+)\+h(\d)", key):
        form = CodedFormat(int(match[1]), int(match[2]))
        return lambda k: coded_keys(k, form), form.key_bytes(head_dim)
    raise ValueError(f"Keys of an arm must be full, fp8, int4, kivi4, had4, rankR or A+hB, got {key!r}")


class Checkpoint:
    """A Qwen2.5-VL or LLaVA-NeXT checkpoint, and its prompts."""

    def __init__(self, path: str | Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).to(self.device).eval()
        config = self.model.config
        self.image_token = getattr(config, "image_token_id", None) or config.image_token_index
        self.has_mrope = hasattr(self.model.model, "rope_deltas")
        text = config.get_text_config()
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def render(self, picture: Picture) -> tuple[dict, list[tuple[int, int]]]:
        """Model inputs of the picture's whole chat, and where each answer's tokens are in it."""
        messages = []
        for number, question in enumerate(picture.questions):
            content = [{"type": "image"}] if number == 0 else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        text = self.processor.apply_chat_template(messages, tokenize=False)
        inputs = self.processor(text=[text], images=[picture.image], return_tensors="pt").to(self.device)
        num_tokens, spans = inputs["input_ids"].shape[1], []
        for turn, question in enumerate(picture.questions):
            before = self.processor.apply_chat_template(
                messages[: 2 * turn + 1], tokenize=False, add_generation_prompt=True
            )
            answer_end = len(before) + len(question.answer)
            assert text.startswith(before) and text[len(before) : answer_end] == question.answer
            behind = len(self.tokenizer.encode(text[answer_end:], add_special_tokens=False))
            length = len(self.tokenizer.encode(question.answer, add_special_tokens=False))
            spans.append((num_tokens - behind - length, num_tokens - behind))
        return inputs, spans

    def prefill(self, inputs: dict) -> tuple[DynamicCache, int, int]:
        """The cache of the prompt up to the end of its picture, and the picture's positions."""
        is_image = (inputs["input_ids"][0] == self.image_token).nonzero()
        first, end = int(is_image[0]), int(is_image[-1]) + 1
        length = inputs["input_ids"].shape[1]
        cut = {
            name: value[:, :end] if value.ndim == 2 and value.shape[1] == length else value
            for name, value in inputs.items()
        }
        return self.model(**cut, use_cache=True).past_key_values, first, end

    def continue_from(self, cache: DynamicCache, inputs: dict, start: int) -> torch.Tensor:
        """Logits [tokens from ``start`` on, vocabulary] fp32."""
        ids = inputs["input_ids"]
        positions = torch.arange(start, ids.shape[1], device=self.device)[None]
        if self.has_mrope:
            positions = (positions + int(self.model.model.rope_deltas.view(-1)[0])).expand(3, 1, -1)
        hidden = self.model.model.language_model(
            input_ids=ids[:, start:], past_key_values=cache, position_ids=positions, use_cache=True
        ).last_hidden_state
        return self.model.lm_head(hidden)[0].float()


@dataclass
class Result:
    """Sums over answers. ``right_of``: right answers and answers of each picture, the clusters of the standard error."""

    bytes: float
    tokens: int = 0
    kl: float = 0.0
    same_top: int = 0
    long: int = 0
    long_right: int = 0
    right_of: list[tuple[int, int]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        answers, right = sum(n for _, n in self.right_of), sum(r for r, _ in self.right_of)
        share, pictures = right / answers, len(self.right_of)
        spread = sum((r - share * n) ** 2 for r, n in self.right_of)
        error = math.sqrt(spread * pictures / max(1, pictures - 1)) / answers
        return {
            "bytes": self.bytes,
            "answers": answers,
            "exact_match": 100 * share,
            "standard_error": 100 * error,
            "kl_per_token": self.kl / self.tokens,
            "same_top_token": 100 * self.same_top / self.tokens,
            "long_answers": self.long,
            "long_exact_match": 100 * self.long_right / self.long if self.long else math.nan,
        }


@torch.inference_mode()
def evaluate(checkpoint: Checkpoint, arms: list[Arm], pictures: int, seed: int) -> dict[str, Result]:
    """Every arm on the same pictures. The first arm must be full: it is what the others are compared with."""
    results = {arm.name: Result(arm.bytes) for arm in arms}
    families = list(FAMILIES)
    for number in tqdm(range(pictures), desc="pictures", file=sys.stderr, disable=None):
        picture = make_picture(families[number % len(families)], seed + number)
        inputs, spans = checkpoint.render(picture)
        cache, first, end = checkpoint.prefill(inputs)
        exact = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        full: list[torch.Tensor] = []
        for arm in arms:
            read_back = DynamicCache()
            for index, (keys, values) in enumerate(exact):
                keys, values = keys.clone(), values.clone()
                for tensor, code in ((keys, arm.key), (values, arm.value)):
                    of_picture = tensor[0, :, first:end]
                    of_picture.copy_(code(of_picture.transpose(0, 1).float()).transpose(0, 1))
                read_back.update(keys, values, index)
            logits = checkpoint.continue_from(read_back, inputs, end)
            record(results[arm.name], logits, inputs["input_ids"][0], spans, end, full, is_first=arm is arms[0])
    return results


def record(result: Result, logits, ids, spans, start: int, full: list[torch.Tensor], *, is_first: bool) -> None:
    right = 0
    for turn, (low, high) in enumerate(spans):
        logprobs = logits[low - 1 - start : high - 1 - start].log_softmax(-1)
        if is_first:
            full.append(logprobs)
        is_right = bool((logprobs.argmax(-1) == ids[low:high]).all())
        result.tokens += high - low
        result.kl += float((full[turn].exp() * (full[turn] - logprobs)).sum())
        result.same_top += int((logprobs.argmax(-1) == full[turn].argmax(-1)).sum())
        right += is_right
        if high - low >= LONG_ANSWER:
            result.long += 1
            result.long_right += is_right
    result.right_of.append((right, len(spans)))


def table(summaries: dict[str, dict[str, float]]) -> str:
    rows = [f"{'Key/Value':14} {'bytes':>6} {'x':>5} {'EM %':>7} {'+-':>5} {'KL a token':>11} {'top-1 %':>8} {'long EM %':>9}"]
    full_bytes = next(iter(summaries.values()))["bytes"]
    for name, s in summaries.items():
        rows.append(
            f"{name:14} {s['bytes']:6.0f} {full_bytes / s['bytes']:5.2f} {s['exact_match']:7.2f} {s['standard_error']:5.2f} "
            f"{s['kl_per_token']:11.1e} {s['same_top_token']:8.2f} {s['long_exact_match']:9.1f}"
        )
    return "\n".join(rows)


def plot(files: list[Path], output: Path) -> None:
    """Bytes of an image token against KL, a panel a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(files), figsize=(6 * len(files), 4.5), squeeze=False, sharey=True)
    for axis, file in zip(axes[0], files):
        document = json.loads(file.read_text())
        for name, summary in list(document["arms"].items())[1:]:
            point = summary["bytes"], max(summary["kl_per_token"], 1e-6)
            colour = "tab:orange" if name.startswith("fp8") else "tab:blue" if "+h" in name else "tab:gray"
            axis.scatter(*point, color=colour)
            axis.annotate(name, point, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.set(yscale="log", xlabel="bytes of an image token and KV head", title=document["model"])
    axes[0][0].set_ylabel("KL of an answer token from full Keys and Values")
    figure.tight_layout()
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint's directory or name")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="KEY/VALUE")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="JSON", help="draw these results and end")
    parser.add_argument("--png", type=Path, default=Path("fidelity.png"), help="of --plot")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, args.png)
        return
    if not args.model:
        parser.error("a model is needed, or --plot")
    checkpoint = Checkpoint(args.model)
    names = args.arms if args.arms[0] == "full" else ["full", *args.arms]
    try:
        arms = [make_arm(name, checkpoint.head_dim) for name in names]
    except ValueError as error:
        parser.error(str(error))
    start = time.monotonic()
    results = evaluate(checkpoint, arms, args.pictures, args.seed)
    summaries = {name: result.summary() for name, result in results.items()}
    print(table(summaries))
    if args.output:
        document = {
            "model": Path(args.model).name,
            "pictures": args.pictures,
            "seed": args.seed,
            "device": checkpoint.device,
            "seconds": round(time.monotonic() - start),
            "arms": summaries,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
