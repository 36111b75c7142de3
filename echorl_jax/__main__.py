"""``python -m echorl_jax CMD`` is ``echorl CMD``."""

from echorl_jax.cli import main

if __name__ == "__main__":
    main()
