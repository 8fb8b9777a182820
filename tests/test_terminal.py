"""What commands draw and tell while they work, and the word that was probably meant."""

import io
import subprocess
import sys

import pytest
import rich.console

from kontext_jax.terminal import Progress, did_you_mean, nearest_words, size_text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal(width=80):
    """A console that takes its stream for a terminal, and the stream."""
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=True, width=width, height=20)
    return console, stream


def test_a_line_is_told_now_and_then():
    clock, lines = Clock(), []
    with Progress(100, lines.append, terminal=False, every_s=10, clock=clock) as progress:
        for done in range(1, 101):
            clock.now = float(done)
            progress.update(
                done, lambda done=done: f"{done}, {progress.time_left(done)}", is_last=done == 100
            )
    assert lines[0] == "10, 1 min 30 s left" and lines[-1] == "100, 0 s left"
    assert len(lines) == 10


def test_quiet_shows_nothing_and_makes_no_line():
    console, stream = terminal()
    lines = []
    with Progress(1, lines.append, quiet=True, console=console) as progress:
        progress.update(1, lambda: pytest.fail("made a line"), is_last=True)
    assert not lines and not stream.getvalue()


@pytest.mark.parametrize("keep", [False, True])
def test_a_bar_stands_below_what_is_printed_and_goes(keep):
    console, stream = terminal()
    with Progress(4, console=console, keep=keep, clock=(clock := Clock())) as progress:
        for done in range(5):
            clock.now = float(done)
            progress.update(done, lambda done=done: f"made {done} [of] 4")
            console.print(f"printed {done}", highlight=False)
    shown = stream.getvalue()
    assert shown.index("printed 1") < shown.rindex("made 1 [of] 4")
    assert ("\x1b[2K" in shown[shown.rindex("made 4 [of] 4") :]) == (not keep)  # erased
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_an_error_ends_the_bar():
    console, stream = terminal()
    with pytest.raises(RuntimeError), Progress(4, console=console) as progress:
        progress.update(1, lambda: "one")
        raise RuntimeError
    assert "\x1b[?25h" in stream.getvalue()


@pytest.mark.parametrize("length", [20, 50, 70, 77])
def test_the_text_has_room_before_the_bar(length):
    console, stream = terminal(80)
    text = "x" * length
    with Progress(4, console=console, clock=Clock()) as progress:
        progress.update(1, lambda: text)
    assert text in stream.getvalue()


def test_a_bar_is_not_drawn_too_often():
    console, stream = terminal()
    with Progress(10_000, console=console, clock=(clock := Clock())) as progress:
        for done in range(10_000):
            clock.now = done / 10_000
            progress.update(done, lambda done=done: f"at {done:,} ")
    assert stream.getvalue().count("at ") < 15


def test_the_nearest_word_is_found_by_spelling_last_word_and_initials():
    assert did_you_mean("eulr", ("euler", "renoise")) == " (did you mean euler?)"
    assert did_you_mean("optimizer.lr", ("seed", "optimizer.learning_rate"), "; {}") == (
        "; optimizer.learning_rate"
    )
    assert did_you_mean("zzz", ("euler", "renoise")) == did_you_mean("a", ()) == ""
    assert nearest_words("img", ("txt/q", "img/q", "img/k"), count=2, least=0.3) == [
        "img/q",
        "img/k",
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (4.2e6, "4.2 MB"), (1.5e15, "1,500 TB")]
)
def test_bytes_are_told_in_three_digits(count, text):
    assert size_text(count) == text


def test_importing_it_is_light():
    program = (
        "import sys, kontext_jax.terminal; "
        "print(sorted({'rich', 'jax', 'numpy', 'etils'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
