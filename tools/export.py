"""See `retnet_jax/programs/export.py`, or --help."""

from retnet_jax.programs.export import main

if __name__ == "__main__":
    main()
