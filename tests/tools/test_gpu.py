"""``make gpu``, with stages that need no GPU: order, resuming, failures, the page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peft_kernels import cli
from peft_kernels._library import HAS_TRITON, OPS
from peft_kernels.tools import devices

sys.path.insert(0, str(Path(__file__).parents[2] / "python" / "tools"))

import _card
import _stages
import gpu
from _stages import Stage

CARD = {"name": "NVIDIA H100 PCIe", "architecture": "sm_90", "cores": 114, "driver": "580.1"}
MADE = {"card": CARD, "commit": "0123456789ab", "torch": "2.13.0", "peft_kernels": "0.1.0"}


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Three, of which the second one breaks; each notes that it ran."""
    log = tmp_path / "log"

    def stage(name: str, code: str, bad=lambda found: 0, minutes=1.0) -> Stage:
        note = f"open({str(log)!r}, 'a').write('{name} ');"
        return Stage(name, (sys.executable, "-c", note + code), _stages._printed, bad, minutes)

    found = [
        stage("verify", 'print(\'{"bad": 0, "rows": []}\')', lambda found: found["bad"]),
        stage("tests", "raise SystemExit('Fatal: the GPU is gone')"),
        stage("tune", "print('{\"measurements\": []}')"),
    ]
    monkeypatch.setattr(_card, "STAGES", tuple(found))
    return SimpleNamespace(stages=found, stage=stage, ran=lambda: log.read_text().split())


def measured(folder: Path, stages: list[Stage], **options) -> tuple[dict[str, str], int]:
    made = options.pop("made_with", MADE)
    outcomes = gpu.measure(folder, stages, made, say=lambda text: None, **options)
    return {outcome.stage: outcome.became for outcome in outcomes}, gpu.exit_code(outcomes)


def test_a_stage_that_breaks_stops_no_other(stages, tmp_path):
    became, code = measured(tmp_path / "card", stages.stages)
    assert became == {"verify": "done", "tests": "broken", "tune": "done"} and code == 1
    record = json.loads((tmp_path / "card/tests.json").read_text())
    assert record["exit"] == 1 and record["said"] == ["Fatal: the GPU is gone"]
    page = (tmp_path / "card/README.md").read_text()
    assert "# NVIDIA H100 PCIe" in page
    assert "| tests | broken, exit code 1: Fatal: the GPU is gone |" in page


def test_what_is_finished_is_not_run_again(stages, tmp_path):
    measured(tmp_path / "card", stages.stages)
    became, _ = measured(tmp_path / "card", stages.stages)
    assert became == {"verify": "kept", "tests": "broken", "tune": "kept"}
    assert stages.ran() == ["verify", "tests", "tune", "tests"]


@pytest.mark.parametrize(
    "options",
    [
        {"fresh": True},
        {"made_with": MADE | {"commit": "ba9876543210"}},
        {"made_with": MADE | {"torch": "2.14.0"}},
        {"made_with": MADE | {"card": CARD | {"driver": "590.2"}}},
    ],
    ids=["fresh", "another commit", "another torch", "another driver"],
)
def test_what_is_of_something_else_is_run_again(stages, tmp_path, options):
    measured(tmp_path / "card", stages.stages)
    became, _ = measured(tmp_path / "card", stages.stages, **options)
    assert became == {"verify": "done", "tests": "broken", "tune": "done"}


def test_a_file_that_is_cut_off_is_made_again(stages, tmp_path):
    measured(tmp_path / "card", stages.stages)
    (tmp_path / "card/verify.json").write_text('{"stage": "ver')
    became, _ = measured(tmp_path / "card", stages.stages[:1])
    assert became == {"verify": "done"}
    assert not list((tmp_path / "card").glob(".*"))


@pytest.mark.parametrize("other", ["", "{", "[]", '[{"shape": "5x7x9"}]', '{"op": "adapter"}'])
def test_a_file_of_something_else_is_not_on_the_page(stages, tmp_path, other):
    measured(tmp_path / "card", stages.stages)
    (tmp_path / "card/verify.json").write_text(other)
    became, _ = measured(tmp_path / "card", stages.stages[2:])
    assert became == {"tune": "kept"}
    page = (tmp_path / "card/README.md").read_text()
    assert "| tune | done |" in page and "| verify" not in page
    assert measured(tmp_path / "card", stages.stages[:1])[0] == {"verify": "done"}


def test_what_a_stage_says_need_not_be_text(stages, tmp_path):
    code = "import sys; sys.stderr.buffer.write(b'gone \\xff'); sys.exit(1)"
    assert measured(tmp_path / "card", [stages.stage("tune", code)])[0] == {"tune": "broken"}
    assert json.loads((tmp_path / "card/tune.json").read_text())["said"] == ["gone \ufffd"]


def test_what_is_wrong_counts_when_it_is_kept_as_well(stages, tmp_path, monkeypatch):
    code = 'print(\'{"bad": 2, "rows": []}\')'
    wrong = [stages.stage("verify", code, lambda found: found["bad"])]
    monkeypatch.setattr(_card, "STAGES", tuple(wrong))
    assert measured(tmp_path / "card", wrong) == ({"verify": "done"}, 1)
    assert measured(tmp_path / "card", wrong) == ({"verify": "kept"}, 1)
    assert "| verify | done, 2 wrong |" in (tmp_path / "card/README.md").read_text()


def test_all_well_is_exit_code_0(stages, tmp_path):
    assert measured(tmp_path / "card", stages.stages[:1]) == ({"verify": "done"}, 0)


def test_a_stage_that_hangs_is_ended(stages, tmp_path):
    hanging = [stages.stage("tune", "import time; time.sleep(60)", minutes=0.02)]
    assert measured(tmp_path / "card", hanging)[0] == {"tune": "broken"}
    record = json.loads((tmp_path / "card/tune.json").read_text())
    assert "timed out" in record["said"][-1] and record["exit"] is None


def test_what_a_stage_that_hangs_has_started_is_ended_too(stages, tmp_path):
    """`verify` has processes of its own, which would compute beside what is timed next."""
    beats = tmp_path / "beats"
    beat = f"import time\nwhile True:\n open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {beat!r}])"
    measured(tmp_path / "card", [stages.stage("tune", code, minutes=0.04)])
    before = beats.read_text()
    time.sleep(0.5)
    assert before and beats.read_text() == before


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "folder"),
    [
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("Tesla T4", "tesla-t4"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "nvidia-a100-sxm4-80gb-mig-1g-10gb"),
        ("AMD Instinct MI300X/../..", "amd-instinct-mi300x"),
    ],
)
def test_the_folder_has_the_cards_name(card, folder):
    assert _card.folder_name(card) == folder


def test_a_card_without_a_name_is_refused():
    with pytest.raises(ValueError, match="must have letters or digits; got ' / '"):
        _card.folder_name(" / ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"there is none: torch {torch.__version__}" in err
    assert not list(tmp_path.iterdir())


def test_with_a_gpu_it_measures_into_the_cards_folder(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(_stages, "STAGES", tuple(stages.stages))
    for name, value in (("why_none", ""), ("name", CARD["name"]), ("made_with", MADE)):
        monkeypatch.setattr(_card, name, lambda value=value: value)
    assert gpu.main(["--only", "verify", "tune"]) == 0
    files = {path.name for path in (tmp_path / "nvidia-h100-pcie").iterdir()}
    assert files == {"verify.json", "tune.json", "README.md"}
    assert "nvidia-h100-pcie; commit that folder and send it" in capsys.readouterr().out


def git(folder: Path, *arguments: str) -> None:
    own = ("-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder))
    subprocess.run(["git", *own, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """One of a file, a.py."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(_card, "ROOT", tmp_path)
    monkeypatch.setattr(_card._results, "RESULTS", tmp_path / "benchmarks/results")
    return tmp_path


def test_the_source_is_told_apart_by_what_is_changed(checkout):
    clean = _card._commit()
    (checkout / "benchmarks/results/a.json").write_text("a result")
    assert _card._commit() == clean and len(clean) == 12
    (checkout / "a.py").write_text("2")
    changed = _card._commit()
    (checkout / "new.py").write_text("3")
    assert len({clean, changed, _card._commit()}) == 3


def test_whatever_lies_in_the_checkout_is_a_change(checkout):
    """Bytes that are no text, names that git would quote, links to nowhere, other checkouts."""
    found = [_card._commit()]
    (checkout / "a.py").write_bytes(b"\xe9\n")
    found.append(_card._commit())
    (checkout / "weights.bin").write_bytes(b"\xff\xfe\x00")
    found.append(_card._commit())
    (checkout / "ä b\n.txt").touch()
    found.append(_card._commit())
    (checkout / "link").symlink_to("nowhere")
    found.append(_card._commit())
    git(checkout, "init", "-q", "other")
    (checkout / "other/file").touch()
    found.append(_card._commit())
    assert len(set(found)) == len(found)


def without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    return "git, which is not installed"


def without_a_checkout(checkout, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    shutil.rmtree(checkout / ".git")
    return "git, which says: fatal: not a git repository"


@pytest.mark.parametrize("lacking", [without_git, without_a_checkout])
def test_without_git_it_says_so_and_leaves_nothing(checkout, monkeypatch, capsys, lacking):
    says = lacking(checkout, monkeypatch)
    folder = checkout / "benchmarks/results"
    monkeypatch.setattr(gpu, "RESULTS", folder)
    monkeypatch.setattr(_card, "card", lambda device: CARD)
    for name, value in (("why_none", ""), ("name", CARD["name"])):
        monkeypatch.setattr(_card, name, lambda value=value: value)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
    assert not list(folder.iterdir())


# ---- the stages --------------------------------------------------------------------------------


def test_the_stages_are_the_most_valuable_first_and_have_every_op():
    names = [stage.name for stage in _stages.STAGES]
    assert names[:3] == ["verify", "tests", "tune"]
    assert sorted(names[3:]) == sorted(f"bench-{op}" for op in OPS)


def test_the_commands_of_the_stages_are_those_that_there_are():
    parsed = 0
    for stage in _stages.STAGES:
        if "peft_kernels.cli" in stage.command:
            options = cli._parser().parse_args(stage.command[3:])
            assert options.json and options.device == "cuda"
            parsed += 1
    assert parsed == len(OPS) + 1


def test_kernels_are_compiled_in_a_stage(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in _stages.environment()
    assert _stages.environment()["PYTHONPATH"] == str(_stages.ROOT)


def junit(tmp_path, source: str) -> dict:
    (tmp_path / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    report = f"--junitxml={tmp_path}/tests.xml"
    options = {"cwd": tmp_path, "capture_output": True, "check": False}
    subprocess.run([*command, report, "--rootdir", str(tmp_path), "test_it.py"], **options)
    return _stages._junit(tmp_path, "")


def test_the_suites_report_is_read(tmp_path):
    found = junit(
        tmp_path,
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False, 'a | reason'\n"
        "@pytest.mark.skip\n"
        "def test_left(): pass\n",
    )
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)
    assert list(found["failed"]) == ["test_it::test_wrong"]
    assert "a | reason" in found["failed"]["test_it::test_wrong"]


def test_a_suite_of_which_nothing_ran_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="no test ran"):
        junit(tmp_path, "import pytest\n@pytest.mark.skip\ndef test_left(): pass\n")


@pytest.mark.skipif(not HAS_TRITON, reason="tune needs triton")
def test_the_shapes_of_three_models_are_tuned(monkeypatch, capsys):
    import tune_models

    shapes = list(tune_models.shapes())
    assert len(shapes) == len(set(shapes)) == 11 * len(tune_models.ROWS)
    assert shapes[0] == (4096, 4096, 4096, 16) and shapes[-1][0] == 1
    asked = []

    def tune(shapes, dtypes, *, weights, console):
        asked.append((len(shapes), len(dtypes), weights))
        return []

    monkeypatch.setattr(tune_models.tune, "tune", tune)
    tune_models.main()
    assert asked == [(44, 2, ("",)), (44, 1, ("nf4",))]
    assert json.loads(capsys.readouterr().out) == {"measurements": []}  # and no path of the user's


# ---- the page ----------------------------------------------------------------------------------


def printed(capsys, *command: str) -> dict:
    cli.main(command)
    return json.loads(capsys.readouterr().out)


def test_the_page_is_of_what_the_commands_print(tmp_path, capsys):
    """Of real documents, that were made on this CPU; tune's is as it prints it."""
    small = ("--shapes", "5x7x9", "--rounds", "2", "--seconds", "0", "--out", str(tmp_path / "out"))
    found = {
        "verify": printed(capsys, "verify", "--device", "cpu", "--json", "--op", "prompt_lookup"),
        "tests": {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": {"a::b": "x|y"}},
        "tune": {"measurements": [{"bucket": "fwd m1", "milliseconds": {"i": 2.0}, "best": "i"}]},
        "bench-lora_linear": printed(capsys, "bench", "lora_linear", "--json", *small),
    }
    found["bench-lora_linear"]["card"] = {"name": "a card", "sm_mhz": "1755", "celsius": None}
    folder = tmp_path / "card"
    folder.mkdir()
    for stage in _stages.STAGES:
        if stage.name in found:
            record = {"stage": stage.name, "made_with": MADE, "exit": 0, "seconds": 1.5}
            text = json.dumps(record | {"found": found[stage.name]})
            (folder / stage.file).write_text(text)
    page = _card.page(folder)
    assert "| commit | 0123456789ab |" in page and "| tests | done, 1 wrong | 2 |" in page
    assert "| prompt_lookup | 9 | 0 | 0 | 6 |" in page
    assert "| a::b | x/y |" in page and "| fwd m1 | 2.0000 | i |" in page
    assert "At the end: sm_mhz 1755." in page
    assert "## lora_linear" in page and "| 5x7x9 |" in page
    rows = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert rows and min(rows) > 2


# ---- what the driver says ----------------------------------------------------------------------

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 PCIe", major=9, minor=0, multi_processor_count=114, total_memory=80 << 30,
    uuid="1-2-3",
)  # fmt: skip


@pytest.fixture
def driver(monkeypatch):
    """A card, and what its nvidia-smi prints; None where there is none."""
    says = SimpleNamespace(text="", asked=[])

    def run(command, **options):
        says.asked.append(command)
        return SimpleNamespace(stdout=says.text)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        devices.shutil, "which", lambda name: None if says.text is None else "/bin/nvidia-smi"
    )
    monkeypatch.setattr(devices.subprocess, "run", run)
    return says


def test_the_card_and_its_clocks_are_named(driver):
    driver.text = "580.65.06, 1755, 1755, 1593, 1593, 350.00, [N/A]\n"
    found = devices.card(torch.device("cuda"))
    assert found["name"] == "NVIDIA H100 PCIe" and found["architecture"] == "sm_90"
    assert (found["cores"], found["driver"], found["sm_mhz"]) == (114, "580.65.06", "1755")
    assert found["celsius"] is None
    assert "GPU-1-2-3" in driver.asked[0]


@pytest.mark.parametrize("text", [None, "No devices were found", ""])
def test_what_the_driver_does_not_tell_is_none(driver, text):
    driver.text = text
    found = devices.card(torch.device("cuda"))
    assert found["driver"] is None and found["sm_mhz"] is None and found["cores"] == 114
