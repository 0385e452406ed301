"""``python -m pos2d`` is the command line."""

from pos2d.commands.main import main

if __name__ == "__main__":
    main()
