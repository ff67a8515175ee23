"""The rounds as a run: what lasts, what ends it, and another strategy's loop around it."""
