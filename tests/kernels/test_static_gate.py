"""The static gate: what it reads of machine code, how it models, and that a worse kernel fails."""

import pytest
from uvc_kernels import _dispatch
from uvc_kernels.compile_check import cuda, static

CODE = """
/*0100*/ LDSM.16.M88.4 R4, [R2] ;
/*0110*/ HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
/*0120*/ @P1 HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
/*0130*/ MUFU.EX2 R1, R2 ;
/*0140*/ STS [R1], R2 ;
/*0150*/ @!P0 BRA 0x100 ;
/*0160*/ IADD3 R1, R2, R3, R4 ;
/*0170*/ @P0 BRA 0x160 ;
"""
FACT = static.Fact("forward", 197, 64, 168, 0, 53248, 128, 3, 4.0, 1.0, 264, 3400, 40.0, 80.0, "13.0.88")


def test_the_innermost_loops_that_multiply_are_counted():
    assert static.loops(CODE) == [static.Loop(2, 1, 0, 1, 1, 6)]


def test_of_a_loop_that_is_compiled_twice_the_shorter_counts():
    longer = (
        CODE.replace("/*0130*/", "/*0128*/ NOP ;\n/*0130*/").replace("0x1", "0x11").replace("/*01", "/*11")
    )
    assert static.loops(CODE + longer) == static.loops(CODE)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (168, 128, 53248, 3),
        (144, 224, 53248, 1),
        (128, 416, 173056, 1),
        (32, 1024, 0, 2),
        (255, 128, 1024, 2),
    ],
)
def test_blocks_share_a_processor_as_registers_memory_and_threads_allow(registers, threads, shared, blocks):
    assert static.blocks_per_processor(registers, threads, shared) == blocks


def test_the_model_is_the_longest_resource_at_best_and_their_sum_at_worst():
    loop = static.Loop(multiplies=8, matrices=2, loads=0, stores=0, special=0, all=16)
    launch = static.Launch(matrices=200, turns=800, blocks=1, threads=128, shared=0, busiest=50)
    best, worst = static.model([loop], launch, bytes_moved=0)
    tensor, issued, shared = 800 * static.MMA, 1600 * static.ISSUE, 800
    ns = 1e9 / static.CLOCK / static.PROCESSORS
    assert best == pytest.approx(tensor * ns) and tensor > shared > issued
    assert worst == pytest.approx((tensor + issued + shared) * ns)
    # five equal warps on four schedulers take as long as eight
    uneven, _ = static.model([loop], launch._replace(busiest=80), bytes_moved=0)
    assert uneven == pytest.approx(1.6 * best)
    assert static.model([loop], launch, int(1e9))[0] == pytest.approx(1e18 / static.BANDWIDTH)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("registers", 176),
        ("shared", 60000),
        ("blocks_per_processor", 2),
        ("multiplies_per_load", 2.0),
        ("turns_per_matrix", 2.0),
        ("shared_cycles", 3700),
        ("ns_best", 41.0),
        ("ns_worst", 90.0),
    ],
)
def test_a_worse_kernel_is_named_with_both_figures(name, value):
    (line,) = static.worse([FACT._replace(**{name: value})], [FACT])
    assert line == f"forward 197 64: {name} was {getattr(FACT, name)} and is {value}"


def test_what_spills_fails_whatever_is_stored():
    spilling = FACT._replace(spilled=8)
    assert static.worse([spilling], [spilling]) == ["forward 197 64: spills 8 bytes"]


def test_an_equal_or_better_kernel_passes_and_an_unknown_one_does_not():
    better = FACT._replace(registers=100, blocks_per_processor=4, ns_best=20.0)
    assert static.worse([FACT, better], [FACT]) == []
    assert "not in the stored table" in static.worse([FACT._replace(dims=32)], [FACT])[0]


def test_the_stored_table_has_every_case_and_no_bank_conflict():
    stored = static.read()
    assert {fact[1:3] for fact in stored} == set(static.CASES) and len(stored) == 2 * len(static.CASES)
    assert all(fact.turns_per_matrix == 1.0 for fact in stored)


@pytest.mark.skipif(_dispatch.extension_error is not None, reason="the extension is not built")
@pytest.mark.parametrize(("tokens", "dims"), static.CASES)
def test_the_host_build_meets_no_bank_twice_and_asks_for_what_is_stored(tokens, dims):
    stored = {fact.kernel.split()[0]: fact for fact in static.read() if fact[1:3] == (tokens, dims)}
    for way, launch in static.launches(tokens, dims).items():
        assert launch.turns == 4 * launch.matrices
        assert (launch.shared, launch.threads) == (stored[way].shared, stored[way].threads)


def test_without_nvcc_the_gate_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "_nvcc", lambda: None)
    assert static.main([]) == 2 and "no nvcc was found" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
@pytest.mark.timeout(900)
def test_no_kernel_is_worse_than_stored():
    assert static.main([]) == 0
