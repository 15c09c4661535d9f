"""`python -m megamoe`: the command line, where the `megamoe` script is not on the path."""

from megamoe.cli import main

raise SystemExit(main())
