"""`python -m sdcli` is the same as the `sdcli` command."""

from sdcli.cli.app import main

if __name__ == "__main__":
    main()
