"""metrics.jsonl survives interruptions, and the figures of speed are what a clock says."""

import json
import math

import pytest

from kontext_jax.terminal import duration
from kontext_jax.training import metrics


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def log_steps(folder, after_step, steps, tensorboard=False):
    log = metrics.MetricLog(folder, after_step, tensorboard=tensorboard)
    for step in steps:
        log.write("train", step, {"loss": 1 / step, "skipped": step - step})
    log.close()


def test_lines_beyond_the_restored_step_are_written_once(tmp_path):
    log_steps(tmp_path, 0, range(1, 6))
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 6, "kind": "tr')  # killed while writing
    log_steps(tmp_path, 3, range(4, 8))
    lines = metrics.read(tmp_path / metrics.FILE)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[4] == {"step": 5, "kind": "train", "loss": 0.2, "skipped": 0}


def test_what_is_no_number_is_written_as_null(tmp_path):
    log = metrics.MetricLog(tmp_path, tensorboard=False)
    log.write("train", 1, {"loss": math.nan, "grad_norm": math.inf})
    log.close()
    assert json.loads((tmp_path / metrics.FILE).read_text())["loss"] is None


def test_tensorboard_gets_event_files(tmp_path):
    log_steps(tmp_path, 0, [1], tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_files_of_a_run_in_a_bucket_are_copied_there_and_back(tmp_path):
    run = tmp_path / "run"
    files = metrics.RunFiles(run, copy=True)
    assert files.local != run
    log_steps(files.local, 0, range(1, 4))
    files.close()
    again = metrics.RunFiles(run, copy=True)
    log_steps(again.local, 2, range(3, 6))
    again.close()
    lines = metrics.read(tmp_path / "run" / metrics.FILE)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_speed_leaves_out_pauses():
    clock = Clock()
    speed = metrics.Speed(peak_flops=100.0, clock=clock)
    assert speed.figures() == {}
    with speed.measure("evaluate"), speed.measure("compile"):
        clock.now += 50
    for _ in range(4):
        with speed.wait_for_data():
            clock.now += 1
        clock.now += 4
        speed.count(images=8, tokens=400, flops=250.0)
    assert speed.figures() == {
        "step_time_s": 5.0,
        "images_per_s": 1.6,
        "tokens_per_s": 80.0,
        "data_wait": 0.2,
        "mfu": 0.5,
    }
    assert speed.seconds == {"compile": 50.0, "evaluate": 50.0}
    assert speed.figures() == {}


def test_no_mfu_where_the_devices_peak_is_unknown():
    clock = Clock()
    speed = metrics.Speed(peak_flops=None, clock=clock)
    clock.now += 1
    speed.count(1, 1, 1.0)
    assert "mfu" not in speed.figures()


def test_progress_prints_now_and_then_and_at_the_end():
    clock, lines = Clock(), []
    progress = metrics.Progress(100, 40, lines.append, every_s=10, terminal=False, clock=clock)
    for step in range(41, 101):
        clock.now += 3
        progress.update(step, 0.5, {"images_per_s": 1.25, "mfu": 0.412, "step_time_s": 3.0})
    assert len(lines) == 15
    assert lines[0] == "step 44/100 · loss 0.5000 · 1.25 images/s · MFU 41.2% · 2 min 48 s left"
    assert lines[-1] == "step 100/100 · loss 0.5000 · 1.25 images/s · MFU 41.2%"


def test_on_a_terminal_the_line_lives(capsys):
    progress = metrics.Progress(10, 0, print, terminal=True)
    progress.update(4, 0.25, {"images_per_s": 1234.0})
    print("another line")
    progress.close()
    out = capsys.readouterr().out
    assert "step 4/10 · loss 0.2500 · 1,234 images/s" in out and "another line" in out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (3723, "1 h 2 min"), (90061, "1 d 1 h"), (86400, "1 d")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
