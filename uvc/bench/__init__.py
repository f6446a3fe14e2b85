"""Measuring: what `pytest bench/` and `uvc bench` share.

``measure`` takes interleaved times, ``ceilings`` what the machine can do at best, ``work`` counts what a
shape must do at least; ``ways`` builds the models that are compared, ``layer_ways`` single layers of them,
``models`` their ``steps``; ``rows`` holds one result and its CSV, ``table`` prints, ``figure`` draws,
``quick`` is the two-minute run, ``regression`` compares with a saved CSV or another commit, which ``worker``
serves.
"""
