"""`make bench-gpu` without a GPU: what is missing is said per stage, and one failure stops no other stage."""

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.py"


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    yield module
    signal.signal(signal.SIGINT, before)


def test_a_dry_run_says_what_is_missing_in_a_line_per_stage(tmp_path):
    empty = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"], capture_output=True, text=True, env=empty
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 1 and not run.stderr
    names = [re.split("  +| missing| would", line)[0] for line in lines]
    assert names[:4] == ["machine", "build", "self-check", "peers"]
    assert len(names) == len(set(names)) == 6
    missing = {name: line for name, line in zip(names, lines, strict=True) if "missing: " in line}
    assert "no C++ compiler" in missing["build"]
    assert "nvidia-smi is not on the PATH" in missing["models"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--rest"], capture_output=True, text=True, env=empty
    )
    rest = run.stdout.splitlines()
    assert len(rest) == 6 and any("ncu is not" in line for line in rest) and not set(rest) & set(lines)
    assert list(tmp_path.iterdir()) == []


def stage(gpu, name, code, limit_s=30, **options):
    return gpu.Stage(name, limit_s, (), (sys.executable, "-c", code), **options)


def results(out):
    with (out / "stages.csv").open() as file:
        return {row["stage"]: row["result"] for row in csv.DictReader(file)}


def test_a_failing_stage_is_named_and_the_others_go_on(gpu, tmp_path, capsys):
    chosen = [
        stage(gpu, "first", "print('one')"),
        stage(gpu, "second", "raise SystemExit('this went wrong')"),
        stage(gpu, "third", "print('3 tests FAILED here')", wrong="FAILED"),
        stage(gpu, "fourth", "print('four')"),
    ]
    assert gpu.run_all(chosen, tmp_path, dict(os.environ)) == 1
    found = results(tmp_path)
    assert found == {
        "first": "ok",
        "second": "exit code 1: this went wrong",
        "third": "3 tests FAILED here",
        "fourth": "ok",
    }
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: second, third"
    assert "four" in (tmp_path / "log.txt").read_text()


def test_a_stage_is_stopped_at_its_limit_and_may_still_write_what_it_has(gpu, tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('writ' 'ten')"
    start = time.monotonic()
    chosen = [stage(gpu, "endless", code, limit_s=3), stage(gpu, "next", "print('next')")]
    assert gpu.run_all(chosen, tmp_path, dict(os.environ)) == 1
    assert time.monotonic() - start < 25
    assert results(tmp_path) == {"endless": "stopped at its limit of 3 s", "next": "ok"}
    assert "written" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_stage_behind(tmp_path, sign):
    python, pid = tmp_path / "python", tmp_path / "pid"  # what every stage is run by: it waits
    python.write_text(f"#!/bin/sh\necho $$ > {pid}.new && mv {pid}.new {pid}\nexec sleep 60\n")
    python.chmod(0o755)
    program = f"import runpy, sys; sys.argv[1:] = ['--out', {str(tmp_path)!r}]; "
    program += f"sys.executable = {str(python)!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    while not pid.exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(sign)
    assert run.communicate(timeout=60)[1].startswith("stopped; ") and run.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_an_optional_tool_that_is_missing_is_no_failure(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = gpu.Stage("tool", 5, ("ncu",), ("ncu",), optional=True)
    needed = gpu.Stage("needed", 5, ("compute-sanitizer",), ("x",))
    assert gpu.run_all([lacking], tmp_path, {}) == 0
    assert results(tmp_path) == {"tool": "left out: ncu is not on the PATH"}
    assert gpu.run_all([needed], tmp_path, {}) == 1


def test_all_stages_fit_into_nine_minutes(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_S", gpu.GRACE_S + 4)
    assert gpu.run_all([stage(gpu, "late", "print(1)")], tmp_path, dict(os.environ)) == 1
    assert "are over" in results(tmp_path)["late"]
    waves = {}
    for each in gpu.stages(tmp_path, tmp_path):
        waves.setdefault((each.rest, each.wave), []).append(each.limit_s)
    for rest in (False, True):
        assert sum(max(limits) for (of, _), limits in waves.items() if of == rest) <= 9 * 60 - 12


def test_stages_of_one_wave_run_at_once_and_the_next_wave_after_them(gpu, tmp_path):
    code = "import os, pathlib, sys, time; here = pathlib.Path(sys.argv[1]); (here / sys.argv[2]).touch(); "
    wait = "\nwhile not (here / sys.argv[3]).exists(): time.sleep(0.05)"

    def waits(name, other, wave):
        command = (sys.executable, "-c", code + wait, str(tmp_path), name, other)
        return gpu.Stage(name, 60, (), command, wave=wave)

    after = stage(gpu, "after", f"import os; assert os.path.exists({str(tmp_path / 'b')!r})", wave=1)
    chosen = [waits("a", "b", 0), waits("b", "a", 0), after]
    assert gpu.run_all(chosen, tmp_path, dict(os.environ)) == 0
    assert set(results(tmp_path).values()) == {"ok"} and list(results(tmp_path))[-1] == "after"


def test_peers_are_judged_and_timed_in_one_table(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "peers.py"), "--device", "cpu", "--out", str(tmp_path)]
    command += ["--images", "1", "--heads", "2", "--tokens", "20", "--dims", "16", "--rounds", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    with (tmp_path / "peers.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert run.returncode == 0 and {"uvc cuda-host", "sdpa math", "flash_attn"} <= set(rows), run.stderr
    assert float(rows["uvc cuda-host"]["backward_ms"]) > 0 and not rows["uvc cuda-host"]["left"]
    assert rows["sdpa cudnn"]["left"] and len(run.stdout.splitlines()) == len(rows) + 2


def test_an_unknown_stage_is_one_line():
    run = subprocess.run([sys.executable, str(SCRIPT), "--only", "tets"], capture_output=True, text=True)
    assert run.returncode == 2 and "tets: no such stage" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("there", [True, False])
def test_the_suite_runs_side_by_side_where_xdist_is_installed(there, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if there else None)
    suites = [s for s in gpu.stages(tmp_path, tmp_path) if "tests/kernels" in s.command]
    assert len(suites) == 1 and ("-n" in suites[0].command) == there
