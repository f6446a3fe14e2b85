"""Measuring: what `pytest bench/` and `uvc bench` share.

``timing`` takes interleaved times, ``ceilings`` what the machine can do at best, ``roofline`` counts what a
shape must do at least; ``variants`` builds the models that are compared, ``layer_variants`` single layers of
them, ``op_variants`` single ops, ``models`` their ``steps``; ``rows`` holds one result and its CSV, ``table``
prints, ``figure`` draws, ``quick`` is the two-minute run, ``regression`` compares with a saved CSV or another
commit, which ``worker`` serves.
"""
