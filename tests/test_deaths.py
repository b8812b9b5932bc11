"""What launchers say when a rank dies or a host is lost, in the words of real ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.deaths import Death, first_death, lost_host, rank_tag

# Seen with Open MPI 4.1.8
SIGNAL = """\
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).
--------------------------------------------------------------------------
"""
EXIT = """\
--------------------------------------------------------------------------
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[18222,1],1]
  Exit code:    2
--------------------------------------------------------------------------
"""
ABORT = """\
--------------------------------------------------------------------------
MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
with errorcode 3.

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
You may or may not see output from other processes, depending on
exactly when Open MPI kills them.
--------------------------------------------------------------------------
"""
# Seen with Open MPI 5.0.11
SIGNAL_5 = """\
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 6129 on node vm exited on
signal 9 (Killed).
--------------------------------------------------------------------------
"""
EXIT_5 = """\
--------------------------------------------------------------------------
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-6214@1,1]
   Exit code:    3
--------------------------------------------------------------------------
"""
# As Open MPI 5 documents it
IMPROPERLY = """\
prterun has exited due to process rank 2 with PID 1705216 on node nid003032 exiting
improperly. There are three reasons this could occur:
"""
# Seen with horovodrun 0.28.1
GLOO = """\
Process 1 exit with status code 137.
Terminating remaining workers after failure of Process 1.
Process 0 exit with status code 143.
Traceback (most recent call last):
"""
# Seen with MPICH 5.0.2: rank 1 of two has had a segmentation fault
HYDRA = """\

===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 14810 RUNNING AT n2
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Segmentation fault (signal 11)
This typically refers to a problem with your application.
Please see the FAQ page for debugging suggestions
"""
# Seen with srun 22.05.8, --kill-on-bad-exit=1
SRUN = """\
srun: error: n1: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=3.0
srun: error: n1: task 0: Terminated
srun: error: n2: task 2: Terminated
srun: error: n3: task 3: Terminated
srun: Force Terminated StepId=3.0
"""
SRUN_LOST = """\
salloc: error: Node failure on n3
srun: error: Node failure on n3
srun: error: n1: task 0: Killed
srun: launch/slurm: _step_signal: Terminating StepId=4.0
srun: error: n2: task 1: Killed
srun: Force Terminated StepId=4.0
"""
# Seen with torchrun of torch 2.13
TORCHRUN = """\
W1121 14:18:49.625000 6490 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process \
6555 closing signal SIGTERM
E1121 14:18:49.626000 6490 torch/distributed/elastic/multiprocessing/api.py:1002] failed \
(exitcode: -9) local_rank: 1 (pid: 6556) of binary: python3
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
======================================================
python3 FAILED
------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_14:18:49
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 6555)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 6555
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_14:18:49
  host      : vm
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 6556)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 6556
======================================================
"""


@pytest.mark.parametrize(
    ("output", "death"),
    [
        (SIGNAL, Death(1, signal=9, host="vm")),
        (SIGNAL.replace("rank 1", "rank 1023").replace("9 (Killed)", "11 (Segmentation fault)"),
         Death(1023, signal=11, host="vm")),
        (SIGNAL.replace("node vm", "node gpu-7.x"), Death(1, signal=9, host="gpu-7.x")),
        (EXIT, Death(1, exit_code=2)),
        (EXIT.replace("2\n", "75\n"), Death(1, exit_code=75)),
        (EXIT.replace("2\n", "137\n"), Death(1, signal=9)),
        (EXIT.replace("2\n", "255\n"), Death(1, exit_code=255)),
        (EXIT.replace("2\n", "128\n"), Death(1, exit_code=128)),
        (ABORT, Death(1, exit_code=3)),
        (ABORT.replace("with errorcode 3", "  Proc: [[9,1],1]\n  Errorcode: 4"),
         Death(1, exit_code=4)),
        (SIGNAL_5, Death(1, signal=9, host="vm")),
        (EXIT_5, Death(1, exit_code=3)),
        (EXIT_5.replace("-vm-", "-gpu-7.x-"), Death(1, exit_code=3)),
        (IMPROPERLY, Death(2, host="nid003032")),
        (GLOO, Death(1, signal=9)),
        (GLOO.replace("137", "75"), Death(1, exit_code=75)),
        (GLOO.replace("137", "1"), Death(1, exit_code=1)),
        (HYDRA, Death(None, signal=11, host="n2")),
        (HYDRA.partition("YOUR APPLICATION T")[0], Death(None, exit_code=9, host="n2")),
        (HYDRA.partition("YOUR APPLICATION T")[0].replace("CODE: 9", "CODE: 139"),
         Death(None, signal=11, host="n2")),
        (SRUN, Death(1, signal=9, host="n1")),
        (SRUN.replace("Killed", "Segmentation fault"), Death(1, signal=11, host="n1")),
        (SRUN.replace("Killed", "Bus error (core dumped)"), Death(1, signal=7, host="n1")),
        (SRUN.replace("Killed", "Out Of Memory"),
         Death(1, signal=9, host="n1", out_of_memory=True)),
        (SRUN.replace("Killed", "Exited with exit code 75"), Death(1, exit_code=75, host="n1")),
        (SRUN.replace("Killed", "Exited with exit code 137"), Death(1, signal=9, host="n1")),
        (SRUN.replace("task 1:", "tasks 3-5,7:"), Death(3, signal=9, host="n1")),
        (SRUN.replace("n1: task 1", "n[1-2]: tasks 1,4"), Death(1, signal=9)),
        (TORCHRUN, Death(1, signal=9, host="vm")),
        (TORCHRUN.replace("-9 (pid: 6556)  (SIGKILL)", "3 (pid: 6556)"),
         Death(1, exit_code=3, host="vm")),
        (EXIT + SIGNAL, Death(1, exit_code=2)),
        (SIGNAL.replace("rank 1 ", "rank 4 ") + EXIT, Death(4, signal=9, host="vm")),
        ("some line\n" * 50 + GLOO, Death(1, signal=9)),
        ("", None),
        ("ssh: Could not resolve hostname node9: Name or service not known\n", None),
        ("process rank 1 is fine\nProcess 1 exits\n", None),
        ("srun: error: n1: task 1: Unable to open file\n", None),
        ("srun: error: Unable to create step for job 5: More processors requested\n", None),
    ],
)  # fmt: skip
def test_the_first_death(output: str, death: Death | None) -> None:
    assert first_death(output) == death


DEATHS = (SIGNAL, EXIT, ABORT, SIGNAL_5, EXIT_5, IMPROPERLY, GLOO, HYDRA, SRUN, TORCHRUN)


@given(st.text(max_size=200), st.sampled_from(DEATHS))
def test_any_output_is_read(output: str, death: str) -> None:
    first_death(output + death[: len(death) // 2])
    lost_host(output + SRUN_LOST[:20])
    assert first_death(output + "\n" + death) is not None


@given(st.sampled_from(DEATHS), st.sampled_from(DEATHS))
def test_of_two_deaths_the_earlier_is_told(one: str, other: str) -> None:
    assert first_death(one + other) == first_death(one)


@given(st.integers(0, 10**5), st.integers(1, 255))
def test_launchers_agree_on_what_an_exit_code_means(rank: int, code: int) -> None:
    told = {
        first_death(EXIT.replace(",1],1]", f",1],{rank}]").replace("2\n", f"{code}\n")),
        first_death(f"Process {rank} exit with status code {code}.\n"),
        first_death(EXIT_5.replace("@1,1]", f"@1,{rank}]").replace("3\n", f"{code}\n")),
    }
    assert len(told) == 1
    (death,) = told
    assert death is not None
    assert death.rank == rank
    assert (death.exit_code is None) == (death.signal is not None) == (128 < code <= 192)


# Lost hosts

# Seen with Open MPI 4.1.8, and with PRRTE's words with 5.0.11
DAEMON = """\
--------------------------------------------------------------------------
ORTE has lost communication with a remote daemon.

  HNP daemon   : [[27407,0],0] on node n1
  Remote daemon: [[27407,0],1] on node n2

This is usually due to either a failure of the TCP network
connection to the node, or possibly an internal failure of
the daemon itself. We cannot recover from this failure, and
therefore will terminate the job.
--------------------------------------------------------------------------
"""
DAEMON_5 = DAEMON.replace("ORTE", "PRTE").replace("[[27407,0],", "[prterun-n1-1918870@0,")
# Seen with Open MPI 5.0.11
SILENT = """\
A daemon failed to report back after being spawned. This could
be due to several factors, including inability to find the
daemon executable, or the executable was unable to find its
required supporting libraries. In some cases, the daemon was
able to execute, but was unable to complete a TCP connection
back to prterun:

  Local host:    vm
  Remote host:   n2
  Daemon exit status: 255
"""
UNROUTED = """\
A process or daemon was unable to complete a TCP connection
to another process:
  Local host:    n1
  Remote host:   n2
This is usually caused by a firewall on the remote host.
"""


@pytest.mark.parametrize(
    ("output", "host"),
    [
        (DAEMON, "n2"),
        (DAEMON_5, "n2"),
        (DAEMON.replace("node n2", "node 10.0.0.2"), "10.0.0.2"),
        (SILENT, "n2"),
        (UNROUTED, "n2"),
        ("ssh: connect to host n2 port 22: Connection refused\n", "n2"),
        ("ssh: connect to host 127.0.0.9 port 22: No route to host\n" + DAEMON, "127.0.0.9"),
        ("ssh: Could not resolve hostname n2.x: Name or service not known\n", "n2.x"),
        ("Timeout, server n2 not responding.\n", "n2"),
        ("Connection closed by 10.0.0.2 port 22\n", "10.0.0.2"),
        ("Connection reset by 10.0.0.2 port 22\n", "10.0.0.2"),
        ("Connection to n2 closed by remote host.\n", "n2"),
        ("root@n2: Permission denied (publickey,password).\n", "n2"),
        ("ssh not successful for host n2:\nHost key verification failed.\n", "n2"),
        (SRUN_LOST, "n3"),
        ("srun: error: Nodes n[2-3] are still not ready\n", "n2"),
        ("slurmctld: error: Nodes n[08-12],x are not responding\n", "n08"),
        ("srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection "
         "failure\n", "n2"),
        ("srun: error: Nodes n[2- are not responding\n", None),
        ("ORTE was unable to reliably start one or more daemons.\n", None),
        (SRUN, None), (SIGNAL, None), (HYDRA, None), (TORCHRUN, None), ("", None),
    ],
)  # fmt: skip
def test_the_lost_host(output: str, host: str | None) -> None:
    assert lost_host(output) == host


def test_ranks_that_a_lost_host_has_taken_along_have_not_died_by_themselves() -> None:
    assert first_death(SRUN_LOST) is None
    assert first_death(DAEMON_5 + IMPROPERLY) is None
    assert first_death(SRUN + SRUN_LOST) == Death(1, signal=9, host="n1")


# Labels


@pytest.mark.parametrize(
    ("launcher", "mpi", "line", "rank", "text"),
    [
        ("mpirun", "openmpi4", "[1,12]<stdout>:out 1\n", "12", "out 1"),
        ("mpirun", "openmpi4", "[1,1]<stdout>:out[1,1]<stdout>: 1\n", "1", "out1"),
        ("mpirun", "openmpi5", "[1,0]<stderr>: err 0\n", "0", "err 0"),
        ("horovodrun", "openmpi4", "[3]<stderr>:Killed\n", "3", "Killed"),
        ("mpirun", "mpich", "[3] out 3 of [4] all\n", "3", "out 3 of [4] all"),
        ("srun", "openmpi4", " 9: out: 3\n", "9", "out: 3"),
        ("srun", "openmpi4", "10: 11: x\n", "10", "11: x"),
    ],
)
def test_labels_are_told_apart_from_what_a_rank_prints(
    launcher: str, mpi: str, line: str, rank: str, text: str
) -> None:
    tag = rank_tag(launcher, mpi)
    assert tag is not None
    assert tag.findall(line)[0] == rank
    assert tag.sub("", line).rstrip() == text


@pytest.mark.parametrize(
    ("launcher", "mpi"),
    [
        ("mpirun", "openmpi4"),
        ("mpirun", "openmpi5"),
        ("mpirun", "mpich"),
        ("horovodrun", "openmpi4"),
        ("srun", "openmpi4"),
    ],
)
def test_a_launcher_s_own_words_have_no_label(launcher: str, mpi: str) -> None:
    tag = rank_tag(launcher, mpi)
    assert tag is not None
    for output in (*DEATHS, DAEMON, DAEMON_5, SILENT, SRUN_LOST):
        assert not [line for line in output.splitlines() if tag.search(line)]


def test_local_ranks_have_no_labels() -> None:
    assert rank_tag("local") is None
