"""See `retnet_jax/programs/evaluate.py`, or --help."""

from retnet_jax.programs.evaluate import main

if __name__ == "__main__":
    main()
