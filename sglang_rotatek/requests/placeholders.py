"""The placeholders of a prompt, which pictures, videos and audio clips fill: what is wrong with
them, before the scheduler sees the request. An error here is a ValueError, which the host answers
with HTTP 400 and its text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Span = tuple[int, int]


@dataclass(frozen=True)
class Medium:
    """What the host's processor made of one picture, video or audio clip."""

    kind: str  # image, video, audio
    # First and last position of its tokens in the prompt; None: one placeholder, which the model
    # expands later.
    spans: list[Span] | None


def as_plain_text(
    text: str, placeholders: Collection[str], patterns: Sequence[re.Pattern] = ()
) -> str:
    """``text`` with a space behind the first character of each placeholder, so that it stands for
    itself: ``<image>`` becomes ``< image>``. ``patterns`` match placeholders that are spelled in
    several ways."""
    if placeholders:
        longest_first = sorted(placeholders, key=len, reverse=True)
        patterns = (re.compile("|".join(map(re.escape, longest_first))), *patterns)
    for pattern in patterns:
        text = pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)
    return text


def runs_of(input_ids: Sequence[int], token_id: int) -> list[Span]:
    """First and last position of every maximal run of ``token_id``."""
    found = np.flatnonzero(np.asarray(input_ids, dtype=np.int64) == token_id)
    if len(found) == 0:
        return []
    cuts = np.flatnonzero(np.diff(found) > 1)
    firsts, lasts = found[np.r_[0, cuts + 1]], found[np.r_[cuts, -1]]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def with_single_placeholders(input_ids: list[int], token_id: int, pictures: int) -> list[int]:
    """A prompt whose pictures are expanded already, one run of ``token_id`` each, with one token a
    picture instead, as the host's processors take it. Any other prompt is returned as it is."""
    runs = runs_of(input_ids, token_id)
    if len(runs) != pictures or all(first == last for first, last in runs):
        return input_ids
    kept, start = [], 0
    for first, last in runs:
        kept += input_ids[start : first + 1]
        start = last + 1
    return kept + input_ids[start:]


def check_lengths(given: Sequence[Span], made: Sequence[Span]) -> None:
    """ValueError unless the expanded runs that a client sent are as long as those that its pictures
    make."""
    for number, (ours, theirs) in enumerate(zip(made, given, strict=True), 1):
        needed, found = ours[1] - ours[0] + 1, theirs[1] - theirs[0] + 1
        if needed != found:
            raise ValueError(
                f"picture {number} makes {needed} tokens, but the prompt has {found} image tokens "
                f"for it: send one image token a picture, or {needed}."
            )


def check_token_ids(input_ids: Sequence[int], vocab_size: int) -> None:
    """ValueError for an id that the embedding table, which does not look, has no row for."""
    for token_id in (min(input_ids, default=0), max(input_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"input_ids holds {token_id}, but the model knows the ids 0 to {vocab_size - 1}: "
                "use its tokenizer."
            )


def check_numbers(found: Mapping[str, int], given: Mapping[str, int]) -> None:
    """ValueError for a kind of which the prompt has more placeholders (``found``, by kind) than
    inputs were given."""
    for kind, number in found.items():
        if number > given[kind]:
            raise ValueError(
                f"the prompt has {number} {kind} placeholder(s) for {given[kind]} {kind} input(s): "
                "each takes one, and text that quotes a placeholder must not be sent as raw "
                "prompt text."
            )


def check_media(media: Sequence[Medium], given: Mapping[str, int]) -> None:
    """ValueError unless everything that the client gave (``given``: kind -> number) came out of the
    processor, which leaves out silently what the model does not take or the prompt has no
    placeholder for."""
    for kind, number in given.items():
        items = [medium for medium in media if medium.kind == kind]
        found = max(len(items), sum(len(medium.spans or ()) for medium in items))
        # How many items a video or audio clip makes is the model's affair.
        if found < number if kind == "image" else number and not found:
            raise ValueError(
                f"got {number} {kind} input(s), but the prompt or the model has a place for "
                f"{found}: give one {kind} placeholder for each in the text, or send none if the "
                f"model takes no {kind} input."
            )


def check_placeholders(
    input_ids: Sequence[int], media: Sequence[Medium], token_ids: Mapping[str, int]
) -> None:
    """ValueError unless each placeholder token (kind -> id in ``token_ids``) belongs to a medium,
    and each medium that is not expanded yet has one."""
    covered = np.zeros(len(input_ids), dtype=bool)
    for medium in media:
        for first, last in medium.spans or ():
            covered[first : last + 1] = True
    ids = np.asarray(input_ids, dtype=np.int64)
    for kind, token_id in token_ids.items():
        without_place = sum(medium.spans is None for medium in media if medium.kind == kind)
        left_over = int(((ids == token_id) & ~covered).sum())
        if left_over != without_place:
            raise ValueError(
                f"the prompt has {left_over - without_place:+d} {kind} placeholder token(s) "
                f"against what was sent: each takes one {kind}, and text that quotes a placeholder "
                "must not be sent as raw prompt text."
            )


def check_boundaries(
    input_ids: Sequence[int], media: Sequence[Medium], start_id: int, end_id: int
) -> None:
    """ValueError for a token that begins (``start_id``) or ends (``end_id``) a medium where none
    is."""
    spans = [span for medium in media for span in medium.spans or ()]
    begun, ended = {first - 1 for first, _ in spans}, {last + 1 for _, last in spans}
    for token_id, expected in ((start_id, begun), (end_id, ended)):
        for first, last in runs_of(input_ids, token_id):
            if not set(range(first, last + 1)) <= expected:
                raise ValueError(
                    f"the prompt has token {token_id}, which begins or ends a picture, at position "
                    f"{first}, where none is: text that quotes such a token must not be sent as "
                    "raw prompt text."
                )
