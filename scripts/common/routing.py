"""The header by which SGLang's router keeps a chat on the server that has cached its pictures."""

from __future__ import annotations

import hashlib

ROUTING_KEY_HEADER = "X-SMG-Routing-Key"


def routing_headers(chat: str) -> dict[str, str]:
    """HTTP headers for every request of one chat, so that `--policy manual` of the router sends
    them all to one server.

    `chat`: any name of the chat that stays the same over its turns and that other chats do not
    have. Chats with one name share a server; naming chats after their picture makes those about the
    same picture share its cache. A server without a router in front ignores the header. ValueError
    for an empty name, which would tie all chats together.
    """
    if not chat:
        raise ValueError(
            "the name of a chat is empty; expected text that tells it from other chats, such as an "
            "id"
        )
    # A digest is short and fit for a header, whatever the name is.
    return {ROUTING_KEY_HEADER: hashlib.sha256(chat.encode()).hexdigest()[:32]}
