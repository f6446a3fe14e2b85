"""A finished run, which tests look at and copy from."""

import pytest
import torch
from cli_runs import SHORT

from uvc import cli


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run on digits, from the command line, under the conditions of every test."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UVC_MEASURE", "0")
        torch.set_num_threads(1)
        assert cli.run(["compress", "--out", str(folder), "--seed", "3", *SHORT]) == 0
    return folder
