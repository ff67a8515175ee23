"""``python -m fedlora_app.config``."""

import sys
from pathlib import Path

from fedlora_app.config.keys import markdown_table, toml_section, write

if __name__ == "__main__":
    if "--write" in sys.argv:
        write(Path.cwd())
    else:
        print(toml_section() if "--toml" in sys.argv else markdown_table())
