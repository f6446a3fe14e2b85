"""A machine without some packages: lines that go before a program, and make these impossible to import."""

from collections.abc import Sequence

HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {packages} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def hide(packages: Sequence[str]) -> str:
    """The lines for these packages."""
    return HIDE.format(packages=tuple(packages))
