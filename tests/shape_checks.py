"""The checker of signatures that tests/conftest.py puts on functions with shapes."""

from beartype import BeartypeConf, beartype

# An int is a float, as it is for pyright.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
