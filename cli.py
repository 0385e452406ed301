"""The command line of a checkout: ``python cli.py`` is the same program as the installed ``pos2d``."""

from pos2d.commands.main import cli, main

__all__ = ["cli", "main"]

if __name__ == "__main__":
    main()
