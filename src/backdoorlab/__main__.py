"""``python -m backdoorlab`` is the command line."""

from backdoorlab.cli.main import run

raise SystemExit(run())
