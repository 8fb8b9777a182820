"""`python -m kontext_jax.data.check`: what is wrong with data, before any device time."""

import json
import re

import pytest
from data_helpers import broken_folder, pairs, picture, png, write_folder, write_records

from kontext_jax.data import check


def run(capsys, *arguments) -> tuple[int, str]:
    status = check.main([*map(str, arguments), "--resolution", "64"])
    return status, capsys.readouterr().out


def test_good_data_passes(tmp_path, capsys):
    data = write_folder(tmp_path / "data", pairs(10))
    status, out = run(capsys, data, "--batch_size", 4)
    assert status == 0
    assert "an epoch has 2.5 steps at batch size 4" in out
    assert "64×64 ← 64×64" in out and "██" in out
    assert "everything is in order" in out


def test_everything_that_is_wrong_is_listed(tmp_path, capsys):
    data = broken_folder(tmp_path / "data")
    (data / "left_over.png").write_bytes(png(picture(0, 32, 32)))
    arguments = (data, "--json", "--largest_aspect_mismatch", "1.5", "--batch_size", "4")
    status, out = run(capsys, *arguments)
    report = json.loads(out)
    assert status == 1 and not report["ok"]
    assert {reason: len(found) for reason, found in report["bad"].items()} == {
        "missing reference": 1,
        "no text": 1,
        "unreadable picture": 2,  # also the one that only decoding shows
        "no reference": 1,
        "mismatched aspect ratios": 1,
    }
    assert report["unlisted_files"] == ["4_context0.png", "left_over.png"]
    assert (report["samples"], report["used"]) == (12, 6)
    assert sum(kind["examples"] for kind in report["kinds"]) == 6
    assert report["steps_per_epoch"] == 1.5
    rare = [kind for kind in report["kinds"] if kind["examples"] == 1]
    assert rare and all(kind["epochs_per_batch"] == 4 for kind in rare)
    status, out = run(capsys, *(argument for argument in arguments if argument != "--json"))
    assert status == 1
    assert "pictures that no sample names: 2" in out and "not in order" in out
    assert "fills a batch in 4 epochs" in out
    assert "data/2.png: its text is empty" in out


def test_quick_reads_headers_alone(tmp_path, capsys):
    data = broken_folder(tmp_path / "data")
    _, out = run(capsys, data, "--json", "--quick")
    assert len(json.loads(out)["bad"]["unreadable picture"]) == 1


def test_ids_that_occur_twice_are_found(tmp_path, capsys):
    samples = pairs(2)
    paths = [write_records(tmp_path / name, samples) for name in ("a", "b")]
    status, out = run(capsys, *paths, "--json")
    assert status == 1
    assert json.loads(out)["duplicate_ids"] == {"0/0": 2, "1/0": 2}


def test_captions_are_told_from_pairs(tmp_path, capsys):
    data = write_folder(tmp_path / "data", pairs(4), [(png(picture(1, 64, 64)), "a dog")])
    assert run(capsys, data)[0] == 1
    status, out = run(capsys, data, "--fraction_with_references", "0.5")
    assert status == 0 and "64×64 " in out
    status, out = run(capsys, data, "--fraction_with_references", "0", "--json")
    assert status == 0
    assert len(json.loads(out)["not_used"]["left out: has references"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resoluton", "64"], "unknown option --resoluton; did you mean --resolution"),
        (["--target_column", "filename"], "no column filename.*did you mean file_name"),
        (["--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_an_option_that_cannot_be_ends_it_with_status_2(tmp_path, capsys, arguments, message):
    data = write_folder(tmp_path / "data", pairs(1))
    try:
        status = check.main([str(data), *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_are_described_by_the_config(capsys):
    with pytest.raises(SystemExit):
        check.main(["--help-all"])
    out = " ".join(capsys.readouterr().out.split())
    for option in check._options():
        assert f"--{option.name.replace('_', '-')} " in out
    assert "largest ratio of the aspect ratios of target and reference" in out
