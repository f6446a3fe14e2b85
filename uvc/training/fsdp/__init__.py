"""Several processes that hold a part of the model each: FSDP2, and checkpoints written in parts."""
