"""`python -m texttok_cli`: what torchrun and accelerate launch start."""

from texttok_cli.main import main

main()
