"""`python -m minipaged` is the command line."""

from minipaged.cli import main

main()
