"""Studies: arms, settings and seeds, their tables and pictures."""
