"""Options of `pytest bench/`, one session of measuring, and the table that is printed last."""

import os

# Spinning OpenMP threads distort timings on shared machines; this must stand before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import time
from pathlib import Path

import pytest
import torch

from uvc import environment
from uvc.bench import ceilings as ceilings_module
from uvc.bench import table
from uvc.bench.rows import Group, Row, append, make_rows
from uvc.bench.timing import Round

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def pytest_addoption(parser):
    group = parser.getgroup("uvc bench")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--quick", action="store_true", help="few shapes and rounds: does everything run?")
    group.addoption("--dtype", help="float32 (default on the CPU), bfloat16 (on a GPU) or float16")
    group.addoption("--threads", type=int, default=1, help="CPU threads of torch")
    group.addoption("--rounds", type=int, help="samples of each variant")
    group.addoption("--clock", choices=CLOCKS, default="wall", help="process: steadier on a shared machine")
    group.addoption("--results", type=Path, default=RESULTS, help="the folder of the CSV files")
    group.addoption("--no-results", action="store_true", help="write no CSV")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")


def pytest_configure(config):
    config.stash[SESSION] = Session(config.option)


def pytest_collection_modifyitems(config, items):
    # A slow machine is measured, not given up. The plugin need not be there.
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))


SESSION = pytest.StashKey["Session"]()


class Session:
    """What all benchmarks of one run share: device, dtype, ceilings, rows, and what was left out and why."""

    def __init__(self, options) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.written: dict[Path, None] = {}
        self.left: dict[str, str] = {}
        self.ceilings: ceilings_module.Ceilings | None = None
        self.device = torch.device(options.device)
        self.quick = options.quick
        on_gpu = self.device.type == "cuda"
        self.dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
        self.clock = CLOCKS[options.clock]

    @property
    def on_gpu(self) -> bool:
        """Whether the real sizes are measured."""
        return self.device.type == "cuda"

    def look_up(self) -> None:
        """Measure the ceilings, or whether they are higher than what was seen so far."""
        if self.ceilings is None:
            self.ceilings = ceilings_module.measure(self.device, self.dtype)
        else:
            again = ceilings_module.measure(self.device, self.dtype, brief=True)
            self.ceilings = self.ceilings.raised(again)

    def leave_out(self, what: str, why: str) -> None:
        """Named in the end."""
        self.left.setdefault(what, why)

    def time(self, benchmark, calls, inputs=1, rounds=7, replay=False):
        """The timings of `calls`, interleaved; pytest-benchmark times the rounds."""
        rounds = self.options.rounds or (3 if self.quick else rounds)
        times = Round(calls, self.device, inputs, self.clock, replay)
        for name, note in times.notes.items():
            self.leave_out(f"graph replay of {name}", note)
        benchmark.pedantic(times.run, rounds=rounds, iterations=1)
        return times.timings()

    def add(self, benchmark, group: Group) -> None:
        """Rows for the table, and at once for the CSV: a run that is cut short leaves what it measured."""
        self.look_up()
        rows = make_rows(group, self.ceilings)
        self.rows += rows
        if not self.options.no_results:
            self.written |= dict.fromkeys(append(self.options.results, rows))
        benchmark.extra_info |= {variant: timing.ms for variant, timing in group.timings.items()}


@pytest.fixture(scope="session")
def session(request):
    options = request.config.option
    session = request.config.stash[SESSION]
    if session.on_gpu and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no GPU here; leave the option out to measure the CPU", 2)
    before = torch.get_num_threads()
    if session.on_gpu:
        torch.cuda.set_stream(torch.cuda.Stream(session.device))
    else:
        torch.set_num_threads(options.threads)
    yield session
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    # The outermost wrapper: what it prints follows the line that counts the tests.
    result = yield
    measured, config = session.config.stash[SESSION], session.config
    rows = measured.rows
    if not rows and not measured.left:
        return result
    out = [f"rows added to {path}" for path in measured.written]
    out += [f"left out: {what}: {why}" for what, why in sorted(measured.left.items())]
    if rows:
        c = measured.ceilings
        out.append(
            f"ceilings of {environment.device_name(measured.device)}: {c.gflop_per_s:,.0f} GFLOP/s in "
            f"{rows[0].dtype}, {c.gbyte_per_s:,.1f} GB/s copied"
        )
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    for line in [*out, *table.lines(rows)]:
        terminal.write_line(line)
    return result
