"""Models in stages by the command line, on digits: compressed, read back, and what is refused of them."""

import pytest
from cli_runs import summary
from oracle import needs_whole_naflex

import uvc
from uvc import cli

SHORT = "--data digits --budget 0.6 --teacher-epochs 1 --warmup-epochs 0 --search-epochs 2 --post-epochs 1"
WINDOWS = [
    "img_size=16",
    "patch_size=2",
    "window_size=4",
    "embed_dim=12",
    "depths=[1, 1]",
    "num_heads=[2, 2]",
]
MODELS = {
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "swinv2_cr_tiny_ns_224": WINDOWS,
    "hiera_tiny_224": ["img_size=[32, 32]", "embed_dim=8", "num_heads=1", "stages=[1, 1, 1, 1]"],
}


def command(name: str, out, *more: str) -> list[str]:
    words = [word for text in ("in_chans=1", *MODELS[name]) for word in ("--model-arg", text)]
    return [
        "compress",
        "--model",
        name,
        *words,
        *SHORT.split(),
        "--batch-size",
        "256",
        "--quiet",
        *more,
        "--out",
        out,
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:UVC")
def test_a_model_in_stages_is_compressed_by_the_command_line_and_read_back(name, tmp_path):
    needs_whole_naflex()  # these classes grew their arguments in the same versions
    out = tmp_path / "out"
    assert cli.run(command(name, str(out))) == 0
    figures, small = summary(out), uvc.load(out)
    assert figures["macs_ratio"] <= 0.6 and uvc.cost(small).macs == figures["final_macs"]
    assert len({len(block.neurons) for block in uvc.structure_of(small).blocks}) > 1


def test_a_budget_of_latency_is_refused_in_one_line_before_training(tmp_path, capsys):
    needs_whole_naflex()
    name = "swin_tiny_patch4_window7_224"
    assert cli.run(command(name, str(tmp_path / "out"), "--metric", "latency")) == 2
    assert "latency table: the model has several stages, of which each needs its own; budget macs" in (
        capsys.readouterr().err
    )
