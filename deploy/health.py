"""Exit with 0 if a SuperLink or SuperNode says it is well: ``health.py URL [CA_FILE]``."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Sequence
from http import HTTPStatus
from urllib.error import URLError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener


def main(argv: Sequence[str]) -> int:
    """Ask ``argv[0]``, trusting the CA in the file ``argv[1]``, and return the exit code."""
    url, *authority = argv
    context = ssl.create_default_context(cafile=authority[0] if authority else None)
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=5) as reply:
            return 0 if reply.status == HTTPStatus.OK else 1
    except (URLError, TimeoutError, OSError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
