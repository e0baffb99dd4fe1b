"""python -m megafish, for launchers that start modules."""

from megafish.cli import main

main()
