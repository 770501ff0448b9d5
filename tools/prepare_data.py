"""See `retnet_jax/programs/prepare_data.py`, or --help."""

from retnet_jax.programs.prepare_data import main

if __name__ == "__main__":
    main()
