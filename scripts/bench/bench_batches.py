"""What bench_kernels.py measures: model shapes, batches of chats, their slots and buffers, and the
bytes they read."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import torch

from sglang_rotatek.kernels import coded, reference
from sglang_rotatek.kernels.coded import FP8
from sglang_rotatek.kernels.pools import CompressedPools, LayerPools, VisualRows, split_rows
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.layout import KVShape

DEVICE = "cuda"
DTYPE = torch.bfloat16
HEAD_DIM = 128
SM_SCALE = HEAD_DIM**-0.5
# Norm of the error of one output row against its norm; bf16 rounding gives about 4e-3.
TOLERANCE = 2e-2


class Model(NamedTuple):
    num_qo_heads: int
    num_kv_heads: int
    num_layers: int
    context_len: int


MODELS = {"qwen2.5-vl-7b": Model(28, 4, 28, 128000), "llava-next-8b": Model(32, 8, 32, 8192)}


class Request(NamedTuple):
    """Cached context of one request: tokens of each image, and text tokens in all."""

    images: tuple[int, ...]
    text: int


class Storage(NamedTuple):
    """How a kernel's KV lies in memory. ``rows``: of image tokens, None: like text; ``text``: dtype
    of text rows."""

    rows: RowFormat | None = None
    text: torch.dtype = DTYPE

    @classmethod
    def parse(cls, name: str) -> Storage:
        """bf16 or fp8 (all tokens at full width); r32: 32 coordinates in bf16; k4v8: Keys' residual
        in 4 bits, Values in 8; either with -fp8 behind it: text rows in FP8. Raises ValueError."""
        if not (match := re.fullmatch(r"(bf16|fp8)|(?:r(\d+)|k(\d)v(\d+))(-fp8)?", name)):
            raise ValueError(
                f"no storage {name}; known: r32, k4v4, k2v4, k4v8, ..., also with -fp8 behind"
            )
        full, rank, key_bits, value_bits, text = match.groups()
        if full:
            return cls(None, FP8 if full == "fp8" else DTYPE)
        rows = (
            RowFormat(int(rank), 16, 16) if rank else RowFormat(16, int(key_bits), int(value_bits))
        )
        return cls(rows, FP8 if text else DTYPE)

    def __str__(self) -> str:
        rows, is_fp8 = self.rows, self.text == FP8
        if rows is None:
            return "fp8" if is_fp8 else "bf16"
        return (
            f"k{rows.key_bits}v{rows.value_bits}" if rows.has_residual else f"r{rows.rank}"
        ) + "-fp8" * is_fp8


BF16 = Storage()


def read_bytes(
    model: Model, requests: list[Request], storage: Storage = BF16, new_tokens: int = 0
) -> int:
    """Bytes that one launch must read: every row once."""
    rows = storage.rows or RowFormat(HEAD_DIM, 16, 16)
    kv = KVShape(
        1, model.num_kv_heads, HEAD_DIM, HEAD_DIM, rows, storage.text.itemsize, DTYPE.itemsize
    )
    images = [tokens for request in requests for tokens in request.images]
    text = sum(request.text for request in requests) + new_tokens * len(requests)
    if storage.rows is None:
        return (text + sum(images)) * kv.text_row_bytes
    return (
        text * kv.text_row_bytes + sum(images) * kv.visual_row_bytes + kv.basis_bytes * len(images)
    )


def compress_bytes(model: Model, images: int, tokens: int, storage: Storage) -> int:
    """Keys read once at full width; z, residual and bases written. Values pass by."""
    requests, rows = [Request((tokens,), 0)] * images, storage.rows
    values = (
        rows.code_bytes(HEAD_DIM, DTYPE.itemsize) + rows.steps_bytes // 2 * rows.has_value_codes
    )
    heads = images * tokens * model.num_kv_heads
    return heads * HEAD_DIM * DTYPE.itemsize + read_bytes(model, requests, storage) - heads * values


def decode_cases(quick: bool) -> list[list[Request]]:
    contexts = [((2880,), 256), ((), 1024)]
    if not quick:
        contexts = [((576,), 256), ((1225,), 256), *contexts, ((), 3136)]
    batches = (1, 32) if quick else (1, 8, 32, 64, 128)
    return [[Request(*context)] * batch for context in contexts for batch in batches]


def plan_cases(quick: bool) -> list[list[Request]]:
    """Batches of one image, the mixed one, and 8 requests of 32k and of 128k tokens, nearly all in
    images or in text."""
    cases = [requests for requests in decode_cases(quick) if requests[0].images == (2880,)]
    cases.append(mixed_requests())
    for tokens in (32 << 10, 128 << 10):
        images = tokens // 3000
        cases += [
            [Request((2880,) * images, tokens - 2880 * images)] * 8,
            [Request((), tokens)] * 8,
        ]
    return cases


def mixed_requests(seed: int = 0) -> list[Request]:
    """64 requests: short and long text chats, chats about one image and about several."""
    rng = random.Random(seed)
    requests = [Request((), rng.randint(48, 512)) for _ in range(24)]
    requests += [Request((), rng.randint(2048, 6000)) for _ in range(8)]
    requests += [Request((rng.choice((576, 1225, 2880)),), rng.randint(64, 512)) for _ in range(24)]
    requests += [
        Request(tuple(rng.choices((576, 1225), k=rng.randint(2, 4))), rng.randint(128, 1024))
        for _ in range(8)
    ]
    rng.shuffle(requests)
    return requests


def extend_cases(quick: bool) -> list[tuple[list[Request], int]]:
    if quick:
        return [([Request((2880,), 256)], 128)]
    cases = [([Request((2880,), 256)] * batch, new) for batch in (1, 8) for new in (32, 128, 512)]
    return [*cases, ([Request((), 0)], 3000)]


class Slots(NamedTuple):
    """``rows[i]``: slots [n] int64 of request i in token order; slot ids as in
    sglang_rotatek/layout.py."""

    rows: list[torch.Tensor]
    text_slots: int
    slot_to_basis: torch.Tensor


def assign_slots(requests: list[Request], new_tokens: int = 0, seed: int = 0) -> Slots:
    """Text slots scattered over a pool with 20 % to spare, each image's slots consecutive and the
    images in random order with small gaps; image i has basis i. A request's text lies before,
    between and after its images."""
    rng = torch.Generator().manual_seed(seed)
    num_text = sum(request.text + new_tokens for request in requests)
    text_slots = num_text + num_text // 4 + 1
    text = 1 + torch.randperm(text_slots, generator=rng)[:num_text]
    sizes = [tokens for request in requests for tokens in request.images]
    slot_to_basis = torch.zeros(sum(sizes) + 16 * (len(sizes) + 1), dtype=torch.int32)
    images, end = [torch.empty(0)] * len(sizes), 0
    for image in torch.randperm(len(sizes), generator=rng).tolist():
        start = end + int(torch.randint(16, (), generator=rng))
        end = start + sizes[image]
        slot_to_basis[start:end] = image
        images[image] = 1 + text_slots + torch.arange(start, end)
    rows, image = [], 0
    for request in requests:
        part = request.text // (len(request.images) + 1)
        pieces = []
        for _ in request.images:
            pieces += [text[:part], images[image]]
            text, image = text[part:], image + 1
        rest = request.text - part * len(request.images) + new_tokens
        rows.append(torch.cat([*pieces, text[:rest]]))
        text = text[rest:]
    return Slots(rows, text_slots, slot_to_basis)


class Batch:
    """A batch on the device, and random K and V of ``sets`` layers, which share the slots as a
    model's layers do.

    ``new_tokens`` 0 is a decode step: one query a request, over all its slots. Otherwise the last
    ``new_tokens`` of each request are the chunk, already stored for the peers; ``kv_*`` and
    ``seq_lens`` count them too, ``prefix_*`` not.
    """

    def __init__(
        self, model: Model, requests: list[Request], sets: int, new_tokens: int = 0
    ) -> None:
        self.model, self.sets, self.size, self.new_tokens = model, sets, len(requests), new_tokens
        self.slots = assign_slots(requests, new_tokens)
        rows = [row.to(DEVICE) for row in self.slots.rows]
        prefix = [row[: len(row) - new_tokens] for row in rows]
        self.kv_indices, self.prefix_indices = torch.cat(rows), torch.cat(prefix)
        self.seq_lens, self.kv_indptr = lens_and_indptr(rows)
        self.prefix_lens, self.prefix_indptr = lens_and_indptr(prefix)
        self.qo_indptr = torch.arange(self.size + 1, dtype=torch.int32, device=DEVICE) * (
            new_tokens or 1
        )
        self.requests = torch.arange(self.size, device=DEVICE)  # rows of req_to_token
        self.max_len = max(map(len, rows))
        self.req_to_token = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int()
        slots = 1 + self.slots.text_slots + len(self.slots.slot_to_basis)
        self.k, self.v = (random_bf16(sets, slots, model.num_kv_heads, HEAD_DIM) for _ in "kv")
        self.q = random_bf16(sets, int(self.qo_indptr[-1]), model.num_qo_heads, HEAD_DIM)
        if new_tokens:
            chunk = torch.cat([row[len(row) - new_tokens :] for row in rows])
            self.k_new, self.v_new = self.k[:, chunk], self.v[:, chunk]
        self._pools: dict[Storage, list[LayerPools]] = {}
        self._stacked: dict[Storage, CompressedPools] = {}

    def pools(self, storage: Storage) -> list[LayerPools]:
        """Of every layer. At full width, the peers' view, every slot is a text slot."""
        if storage not in self._pools:
            make = self._full_width_pools if storage.rows is None else self._rotated_pools
            self._pools[storage] = make(storage)
        return self._pools[storage]

    def stacked_pools(self, storage: Storage) -> CompressedPools:
        """What ``pools`` of image rows are views of."""
        self.pools(storage)
        return self._stacked[storage]

    def _full_width_pools(self, storage: Storage) -> list[LayerPools]:
        k, v = (x.to(storage.text) for x in (self.k, self.v))
        empty = self.k.new_empty(0, self.model.num_kv_heads, HEAD_DIM)
        no_basis = torch.empty(0, dtype=torch.int32, device=DEVICE)
        return [
            LayerPools(*layer, empty, empty, empty, empty, no_basis)
            for layer in zip(k, v, strict=True)
        ]

    def _rotated_pools(self, storage: Storage) -> list[LayerPools]:
        rows, heads, first_visual = storage.rows, self.model.num_kv_heads, 1 + self.slots.text_slots
        slot_to_basis = self.slots.slot_to_basis.to(DEVICE)
        num_rows, bases = len(slot_to_basis), 1 + int(slot_to_basis.max())
        # Key and Value of a row lie side by side, as on a server.
        size = self.sets, first_visual * heads * 2 * HEAD_DIM
        texts = split_rows(
            torch.empty(size, dtype=storage.text, device=DEVICE), heads, HEAD_DIM, HEAD_DIM
        )
        for stored, exact in zip(texts, (self.k, self.v), strict=True):
            stored.copy_(exact[:, :first_visual])
        # Any byte is a code; whatever is a number is drawn below.
        row_bytes = heads * rows.row_bytes(HEAD_DIM, HEAD_DIM, DTYPE.itemsize)
        memory = torch.randint(
            256, (self.sets, num_rows * row_bytes), dtype=torch.uint8, device=DEVICE
        )
        visual = VisualRows.view(memory, rows, heads, HEAD_DIM, HEAD_DIM, DTYPE)
        # Columns of about length 1.
        query_map = random_bf16(self.sets, bases, heads, HEAD_DIM, rows.rank) * SM_SCALE
        if rows.has_residual:
            query_map /= 64  # of coordinates up to 127
        else:
            visual.z.copy_(torch.randn_like(visual.z))
        if not rows.has_value_codes:
            visual.values.copy_(self.v[:, first_visual:])
        if visual.steps is not None:
            step = coded.to_step_code(torch.tensor(0.2)).to(DEVICE)
            visual.steps[..., ::2] = step + torch.randint_like(visual.steps[..., ::2], 16)
            visual.steps[..., 1::2] = torch.randint_like(visual.steps[..., 1::2], 100, 150)
        mean = torch.randn(self.sets, bases, heads, HEAD_DIM, device=DEVICE)
        self._stacked[storage] = CompressedPools(
            visual.z, query_map, mean, first_visual, visual.residual, visual.steps
        )
        layers = zip(
            *(
                x if x is not None else [None] * self.sets
                for x in (*texts, *visual, query_map, mean)
            ),
            strict=True,
        )
        return [
            LayerPools(k, v, z, values, of_layer, centre, slot_to_basis, residual, steps)
            for k, v, z, values, residual, steps, of_layer, centre in layers
        ]

    def check(
        self,
        name: str,
        pools: list[LayerPools],
        layer: int,
        out: torch.Tensor,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Compare a few requests of ``out`` with the reference."""
        for i in sorted({0, self.size // 2, self.size - 1}):
            rows = slice(int(self.qo_indptr[i]), int(self.qo_indptr[i + 1]))
            q, slots = self.q[layer, rows], self.slots.rows[i].to(DEVICE)
            if self.new_tokens:
                slots = slots[: -self.new_tokens]
                own = (self.k_new[layer, rows], self.v_new[layer, rows])
                expected = reference.extend(
                    q, *own, pools[layer], [0, len(q)], [0, len(slots)], slots, SM_SCALE
                )
            else:
                expected = reference.decode(q, pools[layer], [0, len(slots)], slots, SM_SCALE)
            of_request = out.view_as(self.q[layer])[rows]
            compare(
                f"{name}, layer {layer}, request {i} of {self.size}",
                of_request,
                expected,
                tolerance,
            )


def lens_and_indptr(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=DEVICE)
    return lens, torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))


def random_bf16(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=DTYPE, device=DEVICE)


def compare(
    name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> None:
    """Raises ValueError if a row of ``actual`` is off by more than ``tolerance`` of its norm, or
    holds a NaN."""
    actual, expected = actual.float(), expected.float()
    worst = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).max().item()
    if not worst <= tolerance:
        raise ValueError(
            f"{name}: relative error {worst:.3g} against the reference, allowed {tolerance:g}"
        )


def image_keys(sets: int, tokens: int, heads: int) -> torch.Tensor:
    """Keys [sets, tokens, H, D] with a large mean and a spectrum that falls like a power law, as
    images' Keys do."""
    scale = (1 + torch.arange(HEAD_DIM, device=DEVICE)) ** -0.7
    rotation = torch.linalg.qr(torch.randn(heads, HEAD_DIM, HEAD_DIM, device=DEVICE)).Q
    mean = 3 * torch.randn(heads, HEAD_DIM, device=DEVICE)
    keys = torch.empty(sets, tokens, heads, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    for layer in keys:
        layer.copy_(
            torch.einsum("nhd,hde->nhe", torch.randn(layer.shape, device=DEVICE) * scale, rotation)
            + mean
        )
    return keys
