"""Questions to the trained models."""

from __future__ import annotations

import asyncio

from eval_vlm import Record, evaluate_server, parse_arguments


def ask(url: str, pictures: int, concurrency: int) -> dict[tuple, Record]:
    """Three turns each about some pictures of each family."""
    flags = ["--concurrency", str(concurrency), "--pictures", str(pictures), "--turns", "3"]
    records, *_ = asyncio.run(evaluate_server(parse_arguments(["--url", url, *flags])))
    return {record.key: record for record in records}
