"""What checks the annotations of the package while testing; pyproject.toml names it."""

from beartype import BeartypeConf, beartype

# Python's typing lets an int stand where a float is asked for (PEP 484), and YAML writes 10 for 10.0; beartype alone does not.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
