"""How models of every class that can be saved are made again."""

from uvc.io.arguments import MAKERS as PLAIN
from uvc.io.encoders import ENCODERS
from uvc.io.hiera import HIERA
from uvc.io.hieradet import HIERADET
from uvc.io.naflex import NAFLEX
from uvc.io.others import OTHERS
from uvc.io.sam import SAM
from uvc.io.swin import SWIN

MAKERS = {
    **PLAIN,
    **{maker.make.__name__: maker for maker in (NAFLEX, *SWIN, HIERA, HIERADET, SAM, *ENCODERS)},
    **OTHERS,
}
