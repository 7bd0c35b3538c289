"""The command line from a checkout: `python cli.py --help`."""

from pyrovae.cli import main

if __name__ == "__main__":
    main()
