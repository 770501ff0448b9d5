"""See `retnet_jax/programs/prepare_corpus.py`, or --help."""

from retnet_jax.programs.prepare_corpus import main

if __name__ == "__main__":
    main()
