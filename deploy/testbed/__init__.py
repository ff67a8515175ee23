"""Real SuperNodes in network namespaces, each behind a link of its own rate. Linux, as root."""
