"""What a run leaves behind: records, tables, pictures and a page."""
