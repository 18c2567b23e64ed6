"""`python -m llama` : la même chose que la commande `llama`."""

from llama.cli import main

if __name__ == "__main__":
    main()
