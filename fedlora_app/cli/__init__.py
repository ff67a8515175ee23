"""The command ``fedlora``: one file a subcommand, which imports what it needs when called."""
