"""See `retnet_jax/programs/generate.py`, or --help."""

from retnet_jax.programs.generate import main

if __name__ == "__main__":
    main()
