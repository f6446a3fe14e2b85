"""How models of every class that can be saved are made again."""

from uvc.io.arguments import MAKERS as PLAIN
from uvc.io.naflex import NAFLEX

MAKERS = {**PLAIN, **{maker.make.__name__: maker for maker in (NAFLEX,)}}
