"""What bench_kernels.py measures: model shapes, batches of chats, their slots and buffers, and the bytes they read."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from sglang_rotatek.kernels import reference
from sglang_rotatek.kernels.reference import CompressedPools, LayerPools, split_rows
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.layout import KVShape

DEVICE = "cuda"
DTYPE = torch.bfloat16
HEAD_DIM = 128
SM_SCALE = HEAD_DIM**-0.5
TOLERANCE = 2e-2  # norm of the error of one output row against its norm; bf16 rounding gives about 4e-3


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


def read_bytes(model: Model, requests: list[Request], rank: int | None = None, new_tokens: int = 0) -> int:
    """Bytes that one launch must read: every row once. ``rank`` None: all rows at full width."""
    rows = RowFormat(rank or HEAD_DIM, 16, 16)
    kv = KVShape(1, model.num_kv_heads, HEAD_DIM, HEAD_DIM, rows, DTYPE.itemsize, DTYPE.itemsize)
    images = [tokens for request in requests for tokens in request.images]
    text = sum(request.text for request in requests) + new_tokens * len(requests)
    bases = kv.basis_bytes * len(images) if rank else 0
    return text * kv.text_row_bytes + sum(images) * kv.visual_row_bytes + bases


def compress_bytes(model: Model, images: int, tokens: int, rank: int) -> int:
    """Keys read once at full width; z and bases written. Values pass by."""
    requests = [Request((tokens,), 0)] * images
    values = images * tokens * model.num_kv_heads * HEAD_DIM * DTYPE.itemsize
    return read_bytes(model, requests) + read_bytes(model, requests, rank) - 2 * values


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
    requests += [Request(tuple(rng.choices((576, 1225), k=rng.randint(2, 4))), rng.randint(128, 1024)) for _ in range(8)]
    rng.shuffle(requests)
    return requests


def extend_cases(quick: bool) -> list[tuple[list[Request], int]]:
    if quick:
        return [([Request((2880,), 256)], 128)]
    cases = [([Request((2880,), 256)] * batch, new) for batch in (1, 8) for new in (32, 128, 512)]
    return [*cases, ([Request((), 0)], 3000)]


class Slots(NamedTuple):
    """``rows[i]``: slots [n] int64 of request i in token order; slot ids as in sglang_rotatek/layout.py."""

    rows: list[torch.Tensor]
    text_slots: int
    slot_to_basis: torch.Tensor


def assign_slots(requests: list[Request], new_tokens: int = 0, seed: int = 0) -> Slots:
    """Text slots scattered over a pool with 20 % to spare, each image's slots consecutive and the images in random
    order with small gaps; image i has basis i. A request's text lies before, between and after its images."""
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
    """A batch on the device, and random K and V of ``sets`` layers, which share the slots as a model's layers do.

    ``new_tokens`` 0 is a decode step: one query a request, over all its slots. Otherwise the last ``new_tokens`` of
    each request are the chunk, already stored for the peers; ``kv_*`` and ``seq_lens`` count them too, ``prefix_*`` not.
    """

    def __init__(self, model: Model, requests: list[Request], sets: int, new_tokens: int = 0) -> None:
        self.model, self.sets, self.size, self.new_tokens = model, sets, len(requests), new_tokens
        self.slots = assign_slots(requests, new_tokens)
        rows = [row.to(DEVICE) for row in self.slots.rows]
        prefix = [row[: len(row) - new_tokens] for row in rows]
        self.kv_indices, self.prefix_indices = torch.cat(rows), torch.cat(prefix)
        self.seq_lens, self.kv_indptr = lens_and_indptr(rows)
        self.prefix_lens, self.prefix_indptr = lens_and_indptr(prefix)
        self.qo_indptr = torch.arange(self.size + 1, dtype=torch.int32, device=DEVICE) * (new_tokens or 1)
        self.requests = torch.arange(self.size, device=DEVICE)  # rows of req_to_token
        self.max_len = max(map(len, rows))
        self.req_to_token = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int()
        slots = 1 + self.slots.text_slots + len(self.slots.slot_to_basis)
        self.k, self.v = (random_bf16(sets, slots, model.num_kv_heads, HEAD_DIM) for _ in "kv")
        self.q = random_bf16(sets, int(self.qo_indptr[-1]), model.num_qo_heads, HEAD_DIM)
        if new_tokens:
            chunk = torch.cat([row[len(row) - new_tokens :] for row in rows])
            self.k_new, self.v_new = self.k[:, chunk], self.v[:, chunk]
        self._rotated: dict[int, list[LayerPools]] = {}
        self._stacked: dict[int, CompressedPools] = {}

    def full_width_pools(self) -> list[LayerPools]:
        """The peers' view, for the reference: every slot is a text slot."""
        empty = self.k.new_empty(0, self.model.num_kv_heads, HEAD_DIM)
        no_basis = torch.empty(0, dtype=torch.int32, device=DEVICE)
        return [LayerPools(k, v, empty, empty, empty, empty, no_basis) for k, v in zip(self.k, self.v)]

    def stacked_pools(self, rank: int) -> CompressedPools:
        """What ``rotated_pools`` are views of."""
        self.rotated_pools(rank)
        return self._stacked[rank]

    def rotated_pools(self, rank: int) -> list[LayerPools]:
        if rank not in self._rotated:
            heads, first_visual = self.model.num_kv_heads, 1 + self.slots.text_slots
            slot_to_basis = self.slots.slot_to_basis.to(DEVICE)
            bases = 1 + int(slot_to_basis.max())
            # Key and Value of a row lie side by side, as on a server.
            k_text, v_text = split_rows(
                self.k.new_empty(self.sets, first_visual * heads * 2 * HEAD_DIM), heads, HEAD_DIM, HEAD_DIM
            )
            z, v_visual = split_rows(
                random_bf16(self.sets, len(slot_to_basis) * heads * (rank + HEAD_DIM)), heads, rank, HEAD_DIM
            )
            k_text.copy_(self.k[:, :first_visual])
            v_text.copy_(self.v[:, :first_visual])
            v_visual.copy_(self.v[:, first_visual:])
            query_map = random_bf16(self.sets, bases, heads, HEAD_DIM, rank) * SM_SCALE  # columns of about length 1
            mean = torch.randn(self.sets, bases, heads, HEAD_DIM, device=DEVICE)
            self._stacked[rank] = CompressedPools(z, query_map, mean, first_visual)
            self._rotated[rank] = [
                LayerPools(*layer, slot_to_basis) for layer in zip(k_text, v_text, z, v_visual, query_map, mean)
            ]
        return self._rotated[rank]

    def check(self, name: str, pools: list[LayerPools], layer: int, out: torch.Tensor) -> None:
        """Compare a few requests of ``out`` with the reference."""
        for i in sorted({0, self.size // 2, self.size - 1}):
            rows = slice(int(self.qo_indptr[i]), int(self.qo_indptr[i + 1]))
            q, slots = self.q[layer, rows], self.slots.rows[i].to(DEVICE)
            if self.new_tokens:
                slots = slots[: -self.new_tokens]
                own = (self.k_new[layer, rows], self.v_new[layer, rows])
                expected = reference.extend(q, *own, pools[layer], [0, len(q)], [0, len(slots)], slots, SM_SCALE)
            else:
                expected = reference.decode(q, pools[layer], [0, len(slots)], slots, SM_SCALE)
            compare(f"{name}, layer {layer}, request {i} of {self.size}", out.view_as(self.q[layer])[rows], expected)


def lens_and_indptr(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=DEVICE)
    return lens, torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))


def random_bf16(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=DTYPE, device=DEVICE)


def compare(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises ValueError if a row of ``actual`` is off by more than ``tolerance`` of its norm, or holds a NaN."""
    actual, expected = actual.float(), expected.float()
    worst = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).max().item()
    if not worst <= tolerance:
        raise ValueError(f"{name}: relative error {worst:.3g} against the reference, allowed {tolerance:g}")


def image_keys(sets: int, tokens: int, heads: int) -> torch.Tensor:
    """Keys [sets, tokens, H, D] with a large mean and a spectrum that falls like a power law, as images' Keys do."""
    scale = (1 + torch.arange(HEAD_DIM, device=DEVICE)) ** -0.7
    rotation = torch.linalg.qr(torch.randn(heads, HEAD_DIM, HEAD_DIM, device=DEVICE)).Q
    mean = 3 * torch.randn(heads, HEAD_DIM, device=DEVICE)
    keys = torch.empty(sets, tokens, heads, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    for layer in keys:
        layer.copy_(torch.einsum("nhd,hde->nhe", torch.randn(layer.shape, device=DEVICE) * scale, rotation) + mean)
    return keys
