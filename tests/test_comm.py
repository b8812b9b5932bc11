"""Communication without a launcher: who a process is, where it meets others, what it sets."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from support import require_ranks
from threads import ThreadCommunicator, run_ranks

from harness import environment
from harness.comm import SoloCommunicator, open_communicator
from harness.comm.base import device_of_rank
from harness.comm.rendezvous import HorovodrunChannel, Meeting, meet, meet_through
from harness.comm.staged import StagedCommunicator
from harness.comm.topology import Place, Topology
from harness.errors import LaunchError, RankFailure
from harness.schema import Comm

LAUNCHERS = {
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "6",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "horovodrun": {
        "HOROVOD_RANK": "5",
        "HOROVOD_SIZE": "6",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
    },
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    },
    "by hand": {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    "torchrun in mpirun": {
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_SIZE": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    },
    "mpirun with a left-over RANK": {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "6",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "RANK": "0",
        "WORLD_SIZE": "1",
    },
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, and no variable that a test sets stays."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in list(os.environ):
        if name.startswith(("OMPI_", "HOROVOD_", "MASTER_", "HARNESS_", "PMI", "TORCHELASTIC")):
            del os.environ[name]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_numbers_its_ranks(launcher: str) -> None:
    os.environ.update(LAUNCHERS[launcher])
    assert environment.launched_rank() == 5
    assert environment.launched_world_size() == environment.promised_world_size() == 6
    assert environment.launched_local_rank() == 1
    assert environment.launched_local_size() == 2


def test_a_promise_of_harness_run_counts_more_than_the_launcher_s() -> None:
    os.environ.update(LAUNCHERS["mpirun"], HARNESS_WORLD_SIZE="7")
    assert environment.promised_world_size() == 7
    assert environment.launched_world_size() == 6


# Settings


def test_settings_name_only_what_the_configuration_sets() -> None:
    assert environment.communication_settings(Comm()) == {}
    settings = Comm(cycle_ms=0.05, fusion_mb=0.5, yield_when_idle=False)
    assert environment.communication_settings(settings) == {
        "HOROVOD_CYCLE_TIME": "0.05",
        "HOROVOD_FUSION_THRESHOLD": "524288",
        "OMPI_MCA_mpi_yield_when_idle": "0",
    }
    assert environment.communication_settings(Comm(fusion_mb=0.0)) == {
        "HOROVOD_FUSION_THRESHOLD": "0"
    }


@pytest.mark.parametrize(
    ("ranks", "threads", "cores", "gives_way"),
    [(2, 1, 2, True), (2, 1, 3, False), (2, 2, 4, True), (1, 1, 1, True), (1, 1, 2, False)],
)
def test_ranks_that_share_cores_give_way(
    ranks: int, threads: int, cores: int, gives_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_ranks()
    from harness.comm.horovod import settle

    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = str(ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    settle(Comm())
    assert os.environ.get(environment.YIELD) == ("1" if gives_way else None)


def test_a_key_beats_the_user_s_variable_and_that_the_default() -> None:
    require_ranks()
    from harness.comm.horovod import settle

    os.environ.update(HOROVOD_CYCLE_TIME="3", HOROVOD_FUSION_THRESHOLD="77")
    settle(Comm(cycle_ms=2.0))
    assert os.environ["HOROVOD_CYCLE_TIME"] == "2"
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "77"
    del os.environ["HOROVOD_FUSION_THRESHOLD"]
    settle(Comm())
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "0"


# Devices


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = [device_of_rank(rank, carries_gpus=True) for rank in range(4)]
    assert found == [torch.device("cuda", index) for index in range(4)]
    with pytest.raises(LaunchError, match="rank 4 of this host has no GPU: 4 are visible"):
        device_of_rank(4, carries_gpus=True)


def test_ranks_that_share_gpus_take_them_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [device_of_rank(rank, carries_gpus=True, sharing=2).index for rank in range(4)]
    assert found == [0, 0, 1, 1]
    with pytest.raises(LaunchError, match="start at most 4 ranks on a host"):
        device_of_rank(4, carries_gpus=True, sharing=2)


class Elsewhere(StagedCommunicator):
    """Takes every tensor for one on a GPU."""

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


def test_staged_collectives_bring_their_results_back() -> None:
    def act(comm: ThreadCommunicator) -> tuple[list[float], list[float], str]:
        staged = Elsewhere(comm)
        summed = torch.full((3,), float(comm.rank + 1))
        first = staged.allreduce_async(summed, "a")
        staged.wait(first)
        sent = torch.tensor([7.0 if comm.rank == 0 else 0.0])
        staged.broadcast(sent, "b")
        assert (staged.rank, staged.size) == (comm.rank, comm.size)
        return summed.tolist(), sent.tolist(), staged.kind

    for summed, sent, kind in run_ranks(3, act):
        assert (summed, sent) == ([6.0] * 3, [7.0])
        assert kind.endswith("-staged")


def test_a_gpu_that_the_launcher_chose_is_the_first_one_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of_rank(3, carries_gpus=True) == torch.device("cuda", 0)


@pytest.mark.parametrize(("gpus", "carries"), [(0, True), (0, False), (4, False)])
def test_without_a_way_between_gpus_a_rank_is_on_the_cpu(
    gpus: int, carries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_of_rank(9, carries_gpus=carries) == torch.device("cpu")


# Topology


def place(rank: int, local_rank: int, host: str) -> Place:
    return Place(rank, local_rank, host, 8, 4, rank + 1, "cpu")


def test_hosts_come_with_their_ranks_in_order() -> None:
    # as mpirun -map-by node deals them out
    topology = Topology((place(0, 0, "b"), place(1, 0, "a"), place(2, 1, "b")))
    assert [(host, [p.rank for p in places]) for host, places in topology.by_host().items()] == [
        ("b", [0, 2]),
        ("a", [1]),
    ]
    assert topology.as_list()[0] == {
        "host": "b",
        "cores": 8,
        "ranks": [0, 2],
        "local_ranks": [0, 1],
        "usable_cores": [4, 4],
        "threads": [1, 3],
        "devices": ["cpu", "cpu"],
    }


def test_a_single_process_is_its_own_topology() -> None:
    (host,) = SoloCommunicator().topology.as_list()
    assert (host["host"], host["ranks"]) == (environment.host(), [0])
    assert host["usable_cores"] == [len(os.sched_getaffinity(0))]
    assert host["threads"] == [torch.get_num_threads()]


# Who is alone


@pytest.mark.parametrize("backend", ["horovod", "torch", "solo"])
def test_without_a_launcher_a_process_is_alone(backend: str) -> None:
    assert open_communicator(Comm.model_validate({"backend": backend})).kind == "solo"


def test_solo_ranks_in_a_launch_of_several_are_refused() -> None:
    os.environ.update(LAUNCHERS["mpirun"])
    with pytest.raises(LaunchError, match="solo is one process, but 6 ranks were started"):
        open_communicator("solo")


# Meeting


class Told:
    """A channel between threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.message = b""
        self.said = threading.Event()

    def of(self, rank: int) -> OneOfTold:
        return OneOfTold(rank, self)


class OneOfTold:
    def __init__(self, rank: int, told: Told) -> None:
        self.rank, self.size, self._told = rank, told.size, told

    def share(self, message: bytes) -> bytes:
        if self.rank == 0:
            self._told.message = message
            self._told.said.set()
        assert self._told.said.wait(60)
        return self._told.message


def come(told: Told, ranks: list[int], patience: float) -> list[Meeting | Exception]:
    def one(rank: int) -> Meeting | Exception:
        try:
            return meet_through(told.of(rank), patience)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_ranks_meet_at_a_store_of_rank_0() -> None:
    met = come(Told(3), [0, 1, 2], 60)
    assert all(isinstance(one, Meeting) for one in met), met
    first, *others = [one for one in met if isinstance(one, Meeting)]
    first.store.set("word", "x")
    assert [one.store.get("word") for one in others] == [b"x", b"x"]
    assert [(one.rank, one.size) for one in [first, *others]] == [(0, 3), (1, 3), (2, 3)]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_user_s_choice_of_an_interface_stays() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth7"
    come(Told(2), [0, 1], 60)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_ranks_that_do_not_come_are_named() -> None:
    for error in come(Told(4), [0, 2], 1):
        assert isinstance(error, RankFailure)
        assert str(error) == "2 of 4 ranks have not come within 1 s: rank 1, 3"


def test_an_address_that_nobody_answers_is_told() -> None:
    told = Told(2)
    told.message = json.dumps({"host": "elsewhere", "port": 9, "addresses": ["127.0.0.1"]}).encode()
    told.said.set()
    (error,) = come(told, [1], 0)
    assert isinstance(error, RankFailure)
    assert "rank 0 on elsewhere listens on port 9" in str(error)
    assert "at none of 127.0.0.1" in str(error)


@pytest.fixture
def store() -> Iterator[tuple[str, int]]:
    """A key-value store that speaks as horovodrun's does."""
    content: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200 if self.path in content else 404, content.get(self.path, b""))

        def do_PUT(self) -> None:
            content[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, b"")

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "127.0.0.1", server.server_port
        server.shutdown()
        thread.join()


def test_horovodrun_s_store_carries_the_address(store: tuple[str, int]) -> None:
    os.environ.update(LAUNCHERS["horovodrun"])
    follower = HorovodrunChannel(*store, patience=60)
    os.environ["HOROVOD_RANK"] = "0"
    first = HorovodrunChannel(*store, patience=60)
    assert (first.rank, follower.rank, follower.size) == (0, 5, 6)
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(follower.share, b"")
        assert first.share(b"here") == b"here"
        assert heard.result(60) == b"here"


def test_a_silent_rank_0_ends_the_wait(store: tuple[str, int]) -> None:
    os.environ.update(LAUNCHERS["horovodrun"])
    with pytest.raises(RankFailure, match=r"rank 0 has not said within 0\.2 s"):
        HorovodrunChannel(*store, patience=0.2).share(b"")


def test_a_store_that_is_gone_is_told() -> None:
    os.environ.update(LAUNCHERS["horovodrun"])
    with pytest.raises(RankFailure, match="horovodrun's store at http://127"):
        HorovodrunChannel("127.0.0.1", 9, patience=60).share(b"")


def test_a_rank_that_never_comes_to_master_addr_is_told() -> None:
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    with pytest.raises(RankFailure, match="the 2 ranks have not met at MASTER_ADDR = 127"):
        meet(1)


def test_there_must_be_some_way_to_rank_0() -> None:
    os.environ.update(RANK="1", WORLD_SIZE="2")
    with pytest.raises(LaunchError, match="cannot find rank 0: start with mpirun, horovodrun or"):
        meet(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    del os.environ["WORLD_SIZE"]
    with pytest.raises(LaunchError, match="set RANK and WORLD_SIZE too"):
        meet(1)
