"""How many examples a property is given that costs more than others."""

from hypothesis import settings


def at_most(number):
    """So many examples, or fewer where the profile wants fewer of everything."""
    return settings(max_examples=min(number, settings.default.max_examples))
