"""The run config: its keys, what they build, and what is judged at the door."""
