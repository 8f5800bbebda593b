"""`python -m twotower.cli`: the same as the `twotower` command."""

from twotower.cli.main import main

if __name__ == "__main__":
    main()
