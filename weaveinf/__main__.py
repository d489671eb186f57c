"""`python -m weaveinf` is `weaveinf`; torchrun starts it this way."""

from weaveinf.cli import main

main()
