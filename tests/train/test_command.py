"""Test how commands end: interrupted, without a reader, with closed or full outputs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from main_job import QUICK, SCRIPT
from repository import ROOT

from amp_plugin import command
from amp_plugin.command import run_command
from amp_plugin.interrupts import leave_while_importing
from amp_plugin.train import job
from amp_plugin.train.progress import EpochLine

JOB = [*QUICK, "--train_images", "20", "--num_train_epochs", "2"]


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def interrupted(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        job.run([*JOB, *map(str, arguments)])
    assert left.value.code == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "where", ["with_recipe", "parse", "check_trackers", "make_task", "RecipeTrainer", "write_config"]
)
def test_an_interruption_before_the_training_is_one_line(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, where, interrupt)
    assert interrupted(capsys, "--output_dir", tmp_path) == "interrupted"


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_training_tells_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = EpochLine.on_step_end

    def second(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step(self, args, state, control, **kwargs)
        if state.global_step == 2:
            interrupt()

    monkeypatch.setattr(EpochLine, "on_step_end", second)
    given = ["--output_dir", str(tmp_path)]
    assert "stopped at step 2, with no checkpoint to continue from" in interrupted(capsys, *given)
    said = interrupted(capsys, *given, "--save_strategy", "epoch")
    assert f"stopped at step 2; this continues after {tmp_path / 'checkpoint-1'}: python " in said
    assert said.endswith(f"--output_dir {tmp_path} --save_strategy epoch --resume_from_checkpoint last")
    monkeypatch.setattr(EpochLine, "on_step_end", step)
    monkeypatch.setattr("amp_plugin.train.results.write_record", interrupt)
    resume = [*given, "--save_strategy", "epoch", "--resume_from_checkpoint", "last"]
    assert interrupted(capsys, *resume) == f"interrupted: the training was over; what is saved of it is in {tmp_path}"
    assert (tmp_path / "model.safetensors").is_file()


# A torch that is found before the real one, and sends Ctrl-C as it is imported.
TORCH = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored in the background
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize(
    "words",
    [
        *(["-m", "amp_plugin.train"], ["-m", "amp_plugin.flatness", "run"], ["-m", "amp_plugin.hub", "run", "ann/run"]),
        [str(SCRIPT)],
    ],
)
def test_an_interruption_of_the_imports_is_one_line(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", START, sys.executable, *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
    second = subprocess.run(
        command, env={**variables, "LOCAL_RANK": "1"}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (second.returncode, second.stderr) == (130, "")


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("program", ["-c", "train.py", "", "-m"])
def test_programs_of_others_are_interrupted_as_they_like(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "unittest"])
    leave_while_importing()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_command_can_be_interrupted_once_and_then_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "amp_plugin.train"])
    leave_while_importing()
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)

    def main() -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        interrupt()

    with pytest.raises(SystemExit) as ended:
        run_command(main, ())
    assert (ended.value.code, left) == (130, [])
    signal.raise_signal(signal.SIGINT)
    assert left == [130]


def test_a_command_in_the_background_is_not_interrupted() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            run_command(interrupt, ())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_of_several_leaves_the_line_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run_command(interrupt, ())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ended", [True, False])
def test_a_mistake_is_told_by_the_first_process_or_where_it_has_none(
    ended: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What sys.exit is given is printed; a launcher whose first process has failed ends the others."""

    class EndedByLauncher(BaseException):
        pass

    def wait(seconds: float) -> None:
        if ended:
            raise EndedByLauncher

    monkeypatch.setattr("amp_plugin.command.time.sleep", wait)
    job_of_rank = [*JOB, "--num_train_epochs", "0"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EndedByLauncher if ended else SystemExit) as left:
        job.run(job_of_rank)
    assert ended or str(left.value.code).startswith("error: --num_train_epochs must be above 0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match=r"^error: --num_train_epochs must be above 0"):
        job.run(job_of_rank)
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("main", [lambda: None, lambda: 1, interrupt])
def test_no_process_waits_where_there_is_nothing_to_tell(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amp_plugin.command.time.sleep", lambda _: pytest.fail("waits"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with contextlib.suppress(SystemExit):
        run_command(main, ())


def test_a_cache_that_cannot_be_written_names_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".cache" / "huggingface"))

    with pytest.raises(SystemExit, match=r"^error: .*huggingface: Permission denied; .* set HF_HOME") as left:
        run_command(main, ())
    assert "\n" not in str(left.value.code)


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("odd"), SystemExit("error: wrong")])
def test_a_mistake_is_the_exit_code(error: BaseException) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=r"^error: "):
        run_command(main, (ValueError,))


def test_an_error_that_is_no_mistake_keeps_its_traceback() -> None:
    def main() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_command(main, (ValueError,))


# The package itself, which imports torch, is left out, so the processes below start fast.
LINES = f"""
import pathlib, sys, types
sys.modules["amp_plugin"] = types.ModuleType("amp_plugin")
sys.modules["amp_plugin"].__path__ = [{str(Path(command.__file__).parent)!r}]
from amp_plugin.command import run_command
def main():
    for _ in range(int(sys.argv[1])):
        print("a line", flush=True)
        print("a figure", file=sys.stderr)
    pathlib.Path("done").write_text("done")
run_command(main, ())
"""


def lines_of(shell: str, folder: Path) -> tuple[int, list[str]]:
    """Run the script as a shell's ``"$@"``; return its exit code and what it wrote where nothing was closed."""
    given = ["bash", "-c", shell, "bash", sys.executable, "-c", LINES, "20000"]
    done = subprocess.run(given, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert (folder / "done").read_text() == "done", "the work was done"
    return done.returncode, [line for line in done.stderr.splitlines() if line != "a figure"]


def test_a_reader_that_goes_ends_no_work(tmp_path: Path) -> None:
    code, lines = lines_of('"$@" | head -1; exit ${PIPESTATUS[0]}', tmp_path)
    assert code == 141
    assert lines == ["the output cannot be written any more (Broken pipe); the work goes on"]
    code, lines = lines_of('"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}', tmp_path)
    assert (code, lines) == (141, [])


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_outputs_that_are_closed_from_the_start_are_none(redirected: str, tmp_path: Path) -> None:
    assert lines_of(f'"$@" {redirected}', tmp_path) == (0, [])
    assert (tmp_path / "done").read_text() == "done", "no output went into a file"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_below_the_output_ends_no_work(tmp_path: Path) -> None:
    code, lines = lines_of('"$@" > /dev/full', tmp_path)
    assert code == 1
    assert lines == ["the output cannot be written any more (No space left on device); the work goes on"]


def test_what_is_left_to_print_at_the_end_is_dropped_silently(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    output = command.Output(writing)
    output.at_work = False
    assert output.write(b"the help") == 8
    assert output.error == errno.EPIPE
    assert capfd.readouterr().err == ""
    os.close(writing)
