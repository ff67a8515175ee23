"""Rows: read, labelled, shared out."""
