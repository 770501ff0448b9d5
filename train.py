"""See `retnet_jax/programs/train.py`, or --help."""

from retnet_jax.programs.train import main

if __name__ == "__main__":
    main()
