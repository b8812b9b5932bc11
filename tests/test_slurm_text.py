"""Batch jobs as text: golden scripts, quoting that nothing escapes, and what bash makes of them."""

from __future__ import annotations

import difflib
import itertools
import os
import signal
import string
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, require, tool

from harness.config import load_config
from harness.data_sizes import train_size
from harness.errors import ConfigError, LaunchError
from harness.schedule.plan import build_plan
from harness.schema import Config
from launch.containers import container_command, container_srun_options
from launch.slurm import (
    TEMPLATES,
    BatchJob,
    Place,
    chain,
    gather,
    idle_gpus,
    job_title,
    limit_seconds,
    nodes_for,
    options_of,
    render,
    sbatch_command,
    sbatch_quote,
    split_words,
)

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
GOLDEN = ROOT / "tests" / "golden" / "slurm"
PLACE = Place(Path("/scratch/runs/digits"), Path("/scratch"), "/opt/harness/bin/python")
ACCEPT = "HARNESS_ACCEPT"


def configured(*overrides: str) -> Config:
    return load_config(DEMO, overrides)


# Golden scripts

FULL = (
    "name=digits, full",
    "ranks={start: 2, max: 8, per_node: 2, threads: 3}",
    "slurm={account: vision, partition: gpu, qos: high, constraint: a100&nvlink, time: 1-12:00:00, "
    "gpus_per_node: 'a100:2', memory: 64G, exclusive: true, mail_user: me@example.org, "
    "mail_type: [END, REQUEUE], signal: USR1, warning: 300, modules: [gcc/12, cuda/12.4], "
    "setup: env/setup.sh, options: {comment: 'two words', exclude: 'n[1-2]', contiguous: true}}",
    'launch={launcher: mpirun, environment: {NCCL_DEBUG: INFO, NOTE: "it\'s two\\nlines"}}',
)
GROWING = "batch={growth: {policy: noise}, initial: 128}"
POINTS = ("0000-lr.base=0.1", "0001-lr.base=0.2")
SWEEP = BatchJob("sweep", "sweep", 2, 1, points=POINTS, limit=4)
CASES: dict[str, tuple[tuple[str, ...], BatchJob | None]] = {
    "single": ((), None),
    "grows-by-measurement": (("ranks={start: 2, max: 4, per_node: 2}", GROWING), None),
    "chain": (("ranks={start: 2, max: 8, per_node: 2}",), None),
    "full": (FULL, None),
    "no-requeue": (("slurm={requeue: false, signal: TERM}",), None),
    "apptainer": (("slurm.container={runtime: apptainer, image: a.sif}",), None),
    "other-ranks": ((), BatchJob("job-0", "job", 3, 2, keep_ranks=True)),
    "sweep": (("slurm.modules=[gcc/12]",), SWEEP),
    "scaling": (("ranks.per_node=2",), BatchJob("nodes-2", "scaling", 4, 2, point="nodes-2")),
    "gather": (FULL, gather([SWEEP], POINTS)),
    "probe": (FULL, BatchJob("probe", "probe", 8, 4)),
}


def scripts(case: str) -> dict[str, str]:
    overrides, job = CASES[case]
    config = configured(*overrides)
    plan = build_plan(config, train_size(config.data))
    jobs = chain(config, plan) if job is None else [job]
    return {f"{case}-{one.name}.sbatch": render(config, one, PLACE) for one in jobs}


@pytest.mark.parametrize("case", CASES)
def test_golden_scripts(case: str) -> None:
    for name, text in scripts(case).items():
        path = GOLDEN / name
        if os.environ.get(ACCEPT):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        diff = difflib.unified_diff(
            before.splitlines(), text.splitlines(), name, "now", lineterm=""
        )
        told = "\n".join(diff)
        assert before == text, (
            f"{told}\nif that is right: {ACCEPT}=1 python -m pytest tests/test_slurm_text.py"
        )


def test_no_golden_script_is_left_over() -> None:
    expected = {name for case in CASES for name in scripts(case)}
    assert {path.name for path in GOLDEN.iterdir()} == expected


def test_every_template_has_a_golden_script() -> None:
    """And all of them are where an installation has them too."""
    kinds = {job.kind if job else "job" for _, job in CASES.values()}
    names = {f"{kind}.sbatch.j2" for kind in kinds} | {"common.j2"}
    assert {path.name for path in TEMPLATES.iterdir()} == names
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert TEMPLATES.name in settings["packages"]["find"]["include"]
    assert settings["package-data"][TEMPLATES.name] == ["*.j2"]


@pytest.mark.parametrize("case", CASES)
def test_shellcheck_finds_nothing(case: str) -> None:
    check_shell(*scripts(case).values())


# "Expressions do not expand in single quotes", and the like: which is what the quotes are for.
NOT_EXPANDED = "--exclude=SC2016,SC1003"


def check_shell(*texts: str) -> None:
    shellcheck = tool("shellcheck")
    require(shellcheck, "shellcheck is not installed")
    for text in texts:
        for words in (["bash", "-n"], [str(shellcheck), NOT_EXPANDED, "-"]):
            done = subprocess.run(
                words, input=text, capture_output=True, text=True, check=False, errors="replace"
            )
            assert (done.returncode, done.stdout + done.stderr) == (0, ""), text


# What sbatch reads


def read_directive(line: str) -> list[str]:
    """Words of a #SBATCH line as sbatch takes them apart: a backslash escapes everywhere, also in
    single quotes, and # begins a comment outside of quotes at the beginning of a word."""
    words: list[str] = []
    word, quote, escaped = None, "", False
    for sign in line.removeprefix("#SBATCH"):
        if escaped:
            word, escaped = (word or "") + sign, False
        elif sign == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if sign == quote else ((word or "") + sign, quote)
        elif sign in "\"'":
            word, quote = word or "", sign
        elif sign.isspace():
            words += [] if word is None else [word]
            word = None
        elif sign == "#" and word is None:
            break
        else:
            word = (word or "") + sign
    return words + ([] if word is None else [word])


lines = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\x85"),
    min_size=1,
    max_size=30,
)
nasty = st.lists(
    st.sampled_from([*"'\"\\#$`!~%=;&|<>()*?[]{} ", "--", "a", "é", "$(touch canary)"]),
    min_size=1,
    max_size=8,
).map("".join)


@given(lines | nasty)
def test_sbatch_reads_what_was_meant(value: str) -> None:
    assert read_directive(f"#SBATCH --comment={sbatch_quote(value)}") == [f"--comment={value}"]


@pytest.mark.slow
def test_a_real_sbatch_reads_what_was_meant(tmp_path: Path) -> None:
    from slurmbed import SlurmBed, require_slurm

    require_slurm()
    values = ["a b", "a#b", "#x", 'say "x"', "it's", "back\\slash", "end\\", "\\\\", "$(x) `y`",
              " both ", "-x", "hetjob", "é ü", "'\"\\ #", "a;b|c&d<e>(f)!"]  # fmt: skip
    with SlurmBed(1, folder=tmp_path) as slurm:
        for value in values:
            text = f"#!/bin/bash\n#SBATCH --comment={sbatch_quote(value)}\ntrue\n"
            number = slurm.submit(text, "--hold")
            told = slurm.run(["scontrol", "-o", "show", "job", number]).stdout
            assert f" Comment={value} " in told


@given(
    st.dictionaries(st.from_regex(r"x[a-z0-9-]{0,8}", fullmatch=True), lines | nasty | st.none())
)
def test_every_option_stands_in_the_script_once(options: dict[str, str | None]) -> None:
    config = configured()
    config = config.model_copy(
        update={"slurm": config.slurm.model_copy(update={"options": options})}
    )
    (job,) = chain(config, build_plan(config, train_size(config.data)))
    text = render(config, job, PLACE)
    directives = [line for line in text.split("\n") if line.startswith("#SBATCH")]
    read = [read_directive(line) for line in directives]
    meant = options_of(config, job, PLACE)
    assert read == [[f"--{n}" if v is None else f"--{n}={v}"] for n, v in meant.items()]
    assert options.items() <= meant.items()


def test_options_of_the_user_beat_those_of_the_sections() -> None:
    config = configured("slurm={partition: a, time: 10, options: {partition: b, time: 20}}")
    options = options_of(config, BatchJob("job-0", "job", 2, 1), PLACE)
    assert (options["partition"], options["time"]) == ("b", "20")


@pytest.mark.parametrize(
    ("keys", "time"),
    [
        ("{partition: a}", None),
        ("{time: 20, constraint: a100}", "20"),
        ("{time: '1-0', constraint: a100}", "30:00"),
        ("{time: '1-0', options: {time: 60}}", "60"),
    ],
)
def test_a_report_asks_for_no_more_than_it_needs(keys: str, time: str | None) -> None:
    config = configured(f"slurm={keys}")
    options = options_of(config, gather([], ["p0"]), PLACE)
    assert (options.get("time"), options.get("constraint")) == (time, None)
    assert not {"gpus-per-node", "mem", "signal", "exclusive"} & set(options)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("ranks.start=1",), None),
        (("slurm.gpus_per_node=2", "ranks={start: 2, per_node: 2}"), None),
        (("slurm.gpus_per_node='a100:4'", "ranks={start: 2, max: 8, per_node: 2}"), "keep 2 of"),
        (("slurm.gpus_per_node=2", "launch.ranks_per_gpu=2", "ranks={start: 1, max: 2}"),
         "2 ranks on a node with launch.ranks_per_gpu = 2 keep 1 of them busy"),
    ],
)  # fmt: skip
def test_gpus_that_no_rank_uses_are_told(overrides: tuple[str, ...], told: str | None) -> None:
    said = idle_gpus(configured(*overrides))
    assert said is None if told is None else told in (said or "")


def test_a_percent_sign_in_a_path_is_not_a_pattern() -> None:
    place = Place(Path("/r/50%j"), Path("/r"), "python")
    options = options_of(configured(), BatchJob("job-0", "job", 2, 1), place)
    assert options["output"] == "/r/50%%j/slurm/%x-%j.out"


@given(st.text(max_size=80))
def test_titles_are_plain(name: str) -> None:
    title = job_title(name)
    assert title
    assert set(title) <= {*string.ascii_letters, *string.digits, *"._-"}
    assert not title.startswith(("-", "."))
    assert job_title(title) == title or len(title) == 60


# What a shell makes of it

STUB = r"""#!/bin/bash
# Stands for the interpreter: writes down its words, and does what $STUB says.
printf '%s\0' "$@" >> "$OUT/words"; printf '\0' >> "$OUT/words"
env -0 > "$OUT/environment"
if [[ $2 == launch.job ]]; then exit "${STUB_JOB:-0}"; fi
eval "${STUB:-exit 0}"
"""
MODULE = '() {  printf \'%s\\0\' "$@" >> "$OUT/modules"\n}'


class Scratch:
    """A folder with stubs in which a script runs, and what it has done there."""

    def __init__(self, folder: Path, run_name: str = "run") -> None:
        self.cwd = folder / "cwd"
        self.out = folder / "out"
        self.run = folder / run_name
        self.python = folder / "bin dir" / "python"
        for path in (self.cwd, self.out, self.run / "slurm", self.python.parent):
            path.mkdir(parents=True, exist_ok=True)
        self.python.write_text(STUB)
        self.python.chmod(0o755)
        self.place = Place(self.run, self.cwd, str(self.python))
        self.environment = {
            "PATH": os.environ["PATH"],
            "OUT": str(self.out),
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "1",
            "BASH_FUNC_module%%": MODULE,
        }

    def start(self, text: str, **environment: str) -> subprocess.Popen[bytes]:
        script = self.out / "script"
        script.write_text(text, encoding="utf-8")
        return subprocess.Popen(
            ["bash", str(script)], cwd=self.cwd, env=self.environment | environment
        )

    def finish(self, text: str, **environment: str) -> int:
        return self.start(text, **environment).wait(timeout=120)

    def calls(self) -> list[list[str]]:
        words = (self.out / "words").read_bytes().decode().split("\0\0")
        return [call.split("\0") for call in words if call]

    def modules(self) -> list[str]:
        path = self.out / "modules"
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else []

    def variables(self) -> dict[str, str]:
        pairs = (self.out / "environment").read_bytes().decode().split("\0")[:-1]
        return dict(pair.split("=", 1) for pair in pairs)

    @property
    def mark(self) -> Path:
        return self.run / "slurm" / "warned-7"


HOSTILE = [
    "$(touch canary)",
    "`touch canary`",
    "; touch canary #",
    "'; touch canary; '",
    '"; touch canary; "',
    "${x:=y} $HOME",
    "a  b\tc",
    "-x --run",
    "# comment",
    "back\\slash\\",
    "*?[a-z]{1,2}",
    "!history ~ && ||",
    "é ß 漢",
]
with_newlines = [*HOSTILE, "two\nlines", "\ntouch canary\n", "a\r\nb", "#!/bin/bash\n#SBATCH -x"]


def hostile(text: str) -> str:
    return text.replace("\t", " ")


@pytest.mark.parametrize("text", with_newlines, ids=range(len(with_newlines)))
def test_variables_and_names_reach_the_run_as_they_are(text: str, tmp_path: Path) -> None:
    config = configured()
    launch = config.launch.model_copy(update={"environment": {"NOTE": text}})
    config = config.model_copy(update={"name": text, "launch": launch})
    scratch = Scratch(tmp_path)
    job = BatchJob("job-0", "job", 2, 1)
    script = render(config, job, scratch.place)
    assert scratch.finish(script) == 0
    assert scratch.variables()["NOTE"] == text
    assert list(scratch.cwd.iterdir()) == []
    check_shell(script)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("kind", ["job", "sweep", "scaling", "gather", "probe"])
def test_paths_and_modules_reach_their_commands_as_they_are(
    kind: str, text: str, tmp_path: Path
) -> None:
    text = hostile(text).replace("\\", "")
    scratch = Scratch(tmp_path, f"r {text}".replace("/", "-"))
    (scratch.cwd / f"s {text}").write_text('echo read > "$OUT/setup"\n')
    config = configured()
    slurm = config.slurm.model_copy(
        update={
            "modules": [f"m {text}"],
            "setup": f"s {text}",
            "options": {"comment": text, "exclude": f"a {text}"},
        }
    )
    config = config.model_copy(update={"slurm": slurm})
    points = ("p0", f"p {text}")
    job = BatchJob(kind, kind, 2, 1, points=points, point=points[1] if kind == "scaling" else None)
    own = scratch.run / points[1] if kind in ("sweep", "scaling", "gather") else scratch.run
    (own / "slurm").mkdir(parents=True, exist_ok=True)
    (own / "config.yaml").touch()
    script = render(config, job, scratch.place)
    assert scratch.finish(script) == 0
    run = ["run", f"{own}/slurm/config.yaml", "--run-dir", str(own), "--go-on"]
    meant = {
        "gather": ["report", str(own), "-o", f"{scratch.run}/report"],
        "probe": ["probe", "--ranks", "2", "-o", str(own)],
    }.get(kind, run)
    assert scratch.calls() == [["-m", "harness", *meant]]
    assert scratch.modules() == ["load", f"m {text}"]
    assert (scratch.out / "setup").read_text() == "read\n"
    assert [path.name for path in scratch.cwd.iterdir()] == [f"s {text}"]
    check_shell(script)


@given(lines | nasty)
@settings(max_examples=25)
def test_no_line_of_text_ends_its_quotes(text: str) -> None:
    """A word of each place where text of a user stands is taken apart by bash itself."""
    config = configured()
    config = config.model_copy(
        update={
            "slurm": config.slurm.model_copy(update={"modules": [f"m{text}"]}),
            "launch": config.launch.model_copy(update={"environment": {"NOTE": text}}),
        }
    )
    script = render(config, BatchJob("job-0", "job", 2, 1), PLACE)
    begin = script.index("\nmodule load")
    end = script.index('\n"${harness[@]}" run')
    shown = 'module() { printf "%s\\0" "$@"; }\n' + script[begin:end]
    shown += '\nprintf "%s\\0" "${harness[@]}"\n'
    done = subprocess.run(
        ["bash", "-uc", shown], capture_output=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    words = done.stdout.decode().split("\0")[:-1]
    assert words == ["load", f"m{text}", "env", f"NOTE={text}", PLACE.python, "-m", "harness"]


@pytest.mark.parametrize(("code", "called"), [(0, 1), (1, 1), (2, 1), (75, 2), (143, 1), (137, 1)])
def test_only_a_run_that_stopped_early_asks_how_to_go_on(
    code: int, called: int, tmp_path: Path
) -> None:
    scratch = Scratch(tmp_path)
    text = render(configured(), BatchJob("job-0", "job", 2, 1), scratch.place)
    assert scratch.finish(text, STUB=f"exit {code}", STUB_JOB="3") == (3 if called == 2 else code)
    assert len(scratch.calls()) == called
    assert (
        scratch.calls()[called - 1 :][: called - 1]
        == [["-m", "launch.job", str(scratch.run)]][: called - 1]
    )


def test_a_member_of_a_series_names_its_series(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    (scratch.run / "nodes-1" / "slurm").mkdir(parents=True)
    job = BatchJob("nodes-1", "scaling", 2, 1, point="nodes-1")
    text = render(configured(), job, scratch.place)
    assert scratch.finish(text, STUB="exit 75") == 0
    words = ["-m", "launch.job", f"{scratch.run}/nodes-1", "--base", str(scratch.run)]
    assert scratch.calls()[1] == words


WAITS = """
count=0
trap 'count=$((count + 1)); touch "$OUT/asked-$count"' TERM
touch "$OUT/started"
until [[ -e $OUT/go ]]; do sleep 0.02; done
exit "$((count > 0 ? 75 : 9))"
"""


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the script has ended"
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_waited_out(number: signal.Signals, tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    scratch.mark.touch()  # of an earlier attempt
    text = render(configured(), BatchJob("job-0", "job", 2, 1), scratch.place)
    process = scratch.start(text, STUB=WAITS, STUB_JOB="4")
    wait_for(scratch.out / "started", process)
    assert not scratch.mark.exists()
    process.send_signal(number)
    wait_for(scratch.out / "asked-1", process)
    process.send_signal(number)  # such as of a limit after a preemption
    wait_for(scratch.out / "asked-2", process)
    assert scratch.mark.exists()
    (scratch.out / "go").touch()
    assert process.wait(timeout=60) == 4
    assert [call[1] for call in scratch.calls()] == ["harness", "launch.job"]


def test_a_run_that_the_user_has_stopped_leaves_no_mark(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    text = render(configured(), BatchJob("job-0", "job", 2, 1), scratch.place)
    process = scratch.start(text, STUB=WAITS)
    wait_for(scratch.out / "started", process)
    (scratch.run / "stop").touch()
    process.send_signal(signal.SIGUSR2)
    wait_for(scratch.out / "asked-1", process)
    (scratch.out / "go").touch()
    assert process.wait(timeout=60) == 0
    assert not scratch.mark.exists()


def test_a_run_that_ends_well_after_a_warning_is_done(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    text = render(configured(), BatchJob("job-0", "job", 2, 1), scratch.place)
    process = scratch.start(text, STUB=WAITS.replace("75", "0"), STUB_JOB="4")
    wait_for(scratch.out / "started", process)
    process.send_signal(signal.SIGUSR2)
    wait_for(scratch.out / "asked-1", process)
    (scratch.out / "go").touch()
    assert process.wait(timeout=60) == 0
    assert len(scratch.calls()) == 1


def test_a_run_that_a_warning_kills_while_it_starts_is_one_that_stopped(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    text = render(configured(), BatchJob("job-0", "job", 2, 1), scratch.place)
    stub = 'touch "$OUT/started"; while :; do sleep 0.02; done'
    process = scratch.start(text, STUB=stub, STUB_JOB="4")
    wait_for(scratch.out / "started", process)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 4


def test_a_warning_while_a_job_prepares_itself_is_not_lost(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    (scratch.cwd / "env.sh").write_text("kill -USR2 $$\n")
    config = configured("slurm.setup=env.sh")
    text = render(config, BatchJob("job-0", "job", 2, 1), scratch.place)
    assert scratch.finish(text, STUB="while :; do sleep 0.02; done", STUB_JOB="4") == 4
    assert scratch.mark.exists()


def test_a_report_is_made_of_the_runs_that_have_begun(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    job = gather([], ["p0", "p1", "p2"])
    text = render(configured(), job, scratch.place)
    assert scratch.finish(text) == 1
    for name in ("p0", "p2"):
        (scratch.run / name).mkdir()
        (scratch.run / name / "config.yaml").touch()
    assert scratch.finish(text) == 0
    runs = [f"{scratch.run}/{name}" for name in ("p0", "p2")]
    assert scratch.calls() == [["-m", "harness", "report", *runs, "-o", f"{scratch.run}/report"]]


# What is refused


@pytest.mark.parametrize(
    ("overrides", "place", "message"),
    [
        ((), Place(Path("/a\nb"), Path("/"), "p"), "the run directory /a.nb has characters"),
        ((), Place(Path("/a"), Path("/b\x07"), "p"), "the working directory /b.x07 has characters"),
        ((), Place(Path("/a"), Path("/"), "p\x1b"), "the interpreter p.x1b has characters"),
        ((), Place(Path("/a\udcff"), Path("/"), "p"), "the run directory .* do not print"),
        ((), Place(Path("/a\\b"), Path("/"), "p"), "reads a backslash"),
        (("slurm.time=2",), PLACE, "a time limit of 120 s leaves nothing before the warning"),
        (("slurm={time: 60, options: {time: '1:59'}}",), PLACE, "a time limit of 119 s"),
        (("slurm.modules=['-q']",), PLACE, "-q is an option, not a module"),
        (
            ("launch.launcher=local", "ranks={start: 2, max: 4, per_node: 2}"),
            PLACE,
            "local is one node",
        ),
        (
            ("slurm.container={runtime: pyxis, image: a}", "launch.launcher=mpirun"),
            PLACE,
            "pyxis needs launch.launcher = srun",
        ),
        (("slurm.container={runtime: apptainer, image: '-a'}",), PLACE, "an option, not an image"),
        (
            ("slurm.container={runtime: pyxis, image: a, mounts: ['/a,/b']}",),
            PLACE,
            "/a,/b has a ','",
        ),
        (
            ("slurm.container={runtime: apptainer, image: a}",),
            Place(Path("/a:b"), Path("/"), "p"),
            "/a:b cannot be mounted",
        ),
    ],
    ids=itertools.count(),
)
def test_what_cannot_stand_in_a_script_is_refused(
    overrides: tuple[str, ...], place: Place, message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        render(configured(*overrides), BatchJob("job-0", "job", 2, 1), place)


# Jobs


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", None),
        ("UNLIMITED", None),
        ("1-2-3", None),
        ("30", 1800),
        ("30:10", 1810),
        ("2:30:10", 9010),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:10", 95410),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


@given(st.integers(1, 4096), st.integers(1, 128))
def test_nodes_are_just_enough(ranks: int, per_node: int) -> None:
    config = configured()
    config = config.model_copy(
        update={"ranks": config.ranks.model_copy(update={"per_node": per_node})}
    )
    nodes = nodes_for(config, ranks)
    assert (nodes - 1) * per_node < ranks <= nodes * per_node


@pytest.mark.parametrize(
    ("overrides", "ranks", "nodes"),
    [
        (("slurm.gpus_per_node=4",), 4, 1),
        (("slurm.gpus_per_node='a100:2'",), 3, "set ranks.per_node=2"),
        (("slurm.gpus_per_node=2", "launch.ranks_per_gpu=2"), 4, 1),
        (("slurm.gpus_per_node=2", "ranks={start: 2, per_node: 2}"), 5, 3),
        (("slurm.gpus_per_node=2", "ranks={start: 2, per_node: 4}"), 2, 1),
        (("slurm.gpus_per_node=2", "ranks={start: 2, per_node: 4}"), 3, "ranks.per_node=2"),
    ],
)
def test_ranks_fit_the_gpus_of_a_node(
    overrides: tuple[str, ...], ranks: int, nodes: int | str
) -> None:
    config = configured(*overrides)
    if isinstance(nodes, str):
        with pytest.raises(LaunchError, match=nodes):
            nodes_for(config, ranks)
    else:
        assert nodes_for(config, ranks) == nodes


@given(st.integers(1, 2), st.integers(1, 32), st.integers(1, 4), st.none() | st.integers(1, 40))
def test_a_chain_has_a_job_for_each_number_of_ranks(
    start: int, ceiling: int, per_node: int, first: int | None
) -> None:
    ranks = f"ranks={{start: {start}, max: {max(start, ceiling)}, per_node: {per_node}}}"
    config = configured(ranks)
    plan = build_plan(config, train_size(config.data))
    jobs = chain(config, plan, first)
    assert jobs[0].ranks == (first or start)
    assert [job.ranks for job in jobs] == sorted({job.ranks for job in jobs})
    assert [job.after for job in jobs] == [(), *((job.name,) for job in jobs[:-1])]
    planned = [row["ranks"] for row in plan.as_dict()["segments"]]
    assert [job.ranks for job in jobs[1:]] == [n for n in planned if n > jobs[0].ranks]
    assert all(job.nodes == -(-job.ranks // per_node) for job in jobs)


def test_growth_by_measurement_begins_with_one_job() -> None:
    config = configured("ranks={start: 2, max: 8, per_node: 2}", GROWING)
    (job,) = chain(config, build_plan(config, train_size(config.data)))
    assert (job.ranks, job.nodes) == (2, 1)


def test_dependencies() -> None:
    job = BatchJob("job-1", "job", 2, 1)
    assert sbatch_command(job, "s", []) == ["sbatch", "--parsable", "s"]
    assert sbatch_command(job, "s", ["5"]) == [
        "sbatch", "--parsable", "--dependency=afterok:5", "--kill-on-invalid-dep=yes", "s",
    ]  # fmt: skip
    assert sbatch_command(gather([job], []), "s", ["5", "6"])[2] == "--dependency=afterany:5:6"


# Words of the command line

OWN = frozenset({"run-dir", "dry-run", "help"})


@pytest.mark.parametrize(
    ("words", "mine", "theirs"),
    [
        (["c.yaml", "a=b", "--dry-run"], ["c.yaml", "a=b", "--dry-run"], []),
        (["c", "--time", "30", "a=b"], ["c", "a=b"], ["--time=30"]),
        (["c", "--time=30", "--run-dir", "d"], ["c", "--run-dir", "d"], ["--time=30"]),
        (["c", "--hold", "a=b"], ["c", "a=b"], ["--hold"]),
        (["c", "--exclusive", "--run-dir=d"], ["c", "--run-dir=d"], ["--exclusive"]),
        (["c", "--nice", "a=b"], ["c", "a=b"], ["--nice"]),
        (["c", "--new-flag", "--dry-run"], ["c", "--dry-run"], ["--new-flag"]),
        (["c", "--new-flag"], ["c"], ["--new-flag"]),
        (["c", "-p", "x"], ["c", "x"], ["-p"]),
        (["-h"], ["-h"], []),
    ],
)
def test_words_are_the_harness_s_or_sbatch_s(
    words: list[str], mine: list[str], theirs: list[str]
) -> None:
    assert split_words(words, OWN) == (mine, theirs)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_no_word_is_lost(words: list[str]) -> None:
    mine, theirs = split_words(words, OWN)
    assert sum(map(len, mine + theirs)) >= sum(map(len, words))
    assert all(word.startswith("-") for word in theirs)


# Containers

COMMAND = ["/venv/bin/python", "-m", "harness", "train", "/r/slurm/config.yaml"]


def test_without_a_container_the_command_stays() -> None:
    assert container_command(configured(), COMMAND, Path("/r")) == COMMAND
    assert container_srun_options(configured(), Path("/r")) == []


def test_apptainer_wraps_the_command() -> None:
    config = configured(
        "slurm.container={runtime: apptainer, image: a.sif, mounts: [/scratch, '/a:/b:ro'], "
        "options: [--nv]}"
    )
    assert container_srun_options(config, Path("/r")) == []
    assert container_command(config, COMMAND, Path("/r")) == [
        "apptainer", "exec", "--bind", "/r:/r", "--bind", "/scratch:/scratch", "--bind", "/a:/b:ro",
        "--nv", "a.sif", "python3", *COMMAND[1:],
    ]  # fmt: skip


def test_pyxis_is_srun_s_business() -> None:
    config = configured(
        "slurm.container={runtime: pyxis, image: 'nvcr.io#x', python: /py, mounts: [/scratch], "
        "options: [--container-writable]}"
    )
    assert container_command(config, COMMAND, Path("/r")) == ["/py", *COMMAND[1:]]
    assert container_srun_options(config, Path("/r")) == [
        "--container-image=nvcr.io#x",
        "--container-mounts=/r:/r,/scratch:/scratch",
        "--container-writable",
    ]


def test_data_are_mounted_where_they_are() -> None:
    config = load_config(
        ROOT / "configs" / "adabatch" / "cifar100-resnet20-adaptive-1024.yaml",
        ("data.root=/data/c", "slurm.container={runtime: apptainer, image: a}"),
    )
    assert "/data/c:/data/c" in container_command(config, COMMAND, Path("/r"))


def test_control_characters_do_not_pass_the_schema() -> None:
    for key in ("partition", "modules", "setup", "options.comment"):
        value = '["a\\nb"]' if key == "modules" else '"a\\nb"'
        with pytest.raises(ConfigError, match="one printable line"):
            configured(f"slurm.{key}={value}")
