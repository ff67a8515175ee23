"""What of Flower is not public but needed, each with its reason."""

from __future__ import annotations


def is_transport_error(error: Exception) -> bool:
    """Tell whether Flower's grid failed to reach its SuperLink, rather than to read a reply.

    The grid raises what its HTTP client raises, and has no class of its own for it. A reply too
    large for a response is one that cannot be read.
    """
    if isinstance(error, OSError):
        return True
    import httpx  # Flower's own client

    if isinstance(error, httpx.HTTPStatusError):
        return bool(error.response.status_code != httpx.codes.REQUEST_ENTITY_TOO_LARGE)
    return isinstance(error, httpx.HTTPError)
