"""Run-time checks of jaxunet's annotations, shapes included, while the tests run."""

from beartype import BeartypeConf, beartype

# An int is a fine float, as PEP 484 says.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
