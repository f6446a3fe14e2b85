"""`python -m uvc` is the console script `uvc`."""

from uvc.cli import main

main()
