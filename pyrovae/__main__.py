"""`python -m pyrovae`."""

from pyrovae.cli.group import main

if __name__ == "__main__":
    main()
