"""What a launcher leaves out is said in one line."""

import pytest

from uvc import cli, environment
from uvc.training import processes


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_meeting_point_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, capsys, missing
):
    monkeypatch.setattr(processes, "_started", None)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert environment.launched() == 2
    assert cli.run(["compress", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"uvc: {missing}: it is not set, though 2 processes are to find one another")
    assert shown.count("\n") == 1 and not (tmp_path / "out").exists()
