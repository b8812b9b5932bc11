"""Batch norm over real ranks, and loss scaling beside it, while gradients are under way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.environment import communication_settings
from harness.schema import Comm
from launch import horovodrun, mpirun
from launch.execute import child_environment
from launch.spec import Host, LaunchSpec

pytestmark = [pytest.mark.usefixtures("ranks_available"), pytest.mark.slow]

RANKS = 3

JOB = """
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from harness.comm import open_communicator
from harness.comm.solo import SoloCommunicator
from harness.precision import Precision
from harness.reducer import GradientReducer
from harness.syncbn import convert

backend, folder = sys.argv[1:]
torch.set_num_threads(1)
comm = open_communicator(backend)


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU()]


def network():
    torch.manual_seed(0)
    return nn.Sequential(*block(2, 8), *block(8, 8), *block(8, 8), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def train(model, comm, shares, precision):
    '''12 updates of two micro-batches; ``shares`` gives this rank's part of each.'''
    compute = Precision(precision, comm.device)
    reducer = GradientReducer(model, comm, "none", bucket_bytes=600)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for update in range(12):
        generator = torch.Generator().manual_seed(update)
        # In the second micro-batch a rank has one sample, and another none.
        sizes = [(4, 4, 4), (3, 1, 0)]
        images = torch.randn(16, 2, 6, 6, generator=generator)
        labels = (images.mean((2, 3)) @ torch.tensor([[9.0, -9, 0], [0, 9, -9]])).argmax(1)
        reducer.start(2, loss_scale=compute.loss_scale(16, 12))
        total = torch.zeros(())
        for micro, (x, y) in enumerate(zip(images.split([12, 4]), labels.split([12, 4]))):
            x, y = shares(x, sizes[micro]), shares(y, sizes[micro])
            with compute.autocast():
                logits = model(x)
            loss = functional.cross_entropy(logits.float(), y, reduction="sum") / 16
            reducer.backward(loss)
            total += loss.detach()
        reduced = reducer.finish([float(total)])
        compute.adapt(reduced.finite)
        if reduced.finite:
            optimizer.step()
        losses.append(reduced.extras[0])
    return {"model": model.state_dict(), "losses": losses, "scale": compute.scale}


def share(whole, sizes):
    return whole.split(sizes)[comm.rank]


found = {
    "together": train(convert(network(), comm), comm, share, "fp32"),
    "alone": train(network(), SoloCommunicator(), lambda whole, sizes: whole, "fp32"),
    "fp16": train(convert(network(), comm), comm, share, "fp16"),
}
torch.save(found, Path(folder, f"{comm.rank}.pt"))
comm.close()
"""


def launch(launcher: str, script: Path, *arguments: str) -> None:
    """Run a script on all ranks, as the harness starts them."""
    spec = LaunchSpec(
        ranks=RANKS,
        hosts=(Host("localhost", RANKS),),
        command=(sys.executable, str(script), *arguments),
        environment={"OMP_NUM_THREADS": "1", **communication_settings(Comm())},
        controller="gloo" if launcher == "horovodrun-gloo" else "mpi",
        as_root=os.geteuid() == 0,
    )
    words = mpirun.arguments(spec) if launcher == "mpirun" else horovodrun.arguments(spec)
    done = subprocess.run(
        words,
        env=child_environment(spec),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative one of a parameter or buffer."""
    return max(
        float((ours[name] - theirs[name]).double().norm() / (1e-3 + theirs[name].double().norm()))
        for name in theirs
    )


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [("mpirun", "horovod"), ("horovodrun-gloo", "horovod"), ("mpirun", "torch")],
)
def test_three_ranks_with_unequal_batches_train_as_one_with_the_whole(
    launcher: str, backend: str, tmp_path: Path
) -> None:
    """Weights, running statistics and losses, with several buckets under way; and in fp16, where
    the loss is scaled, all ranks stay equal."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    launch(launcher, script, backend, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    together, alone = found[0]["together"], found[0]["alone"]
    assert distance(together["model"], alone["model"]) < 1e-4
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert found[0]["fp16"]["losses"][0] == pytest.approx(alone["losses"][0], rel=0.01)
    assert found[0]["fp16"]["scale"] > 1
    for key in ("together", "fp16"):
        first = found[0][key]
        assert first["losses"][-1] < 0.8 * first["losses"][0], "it should have learnt something"
        for other in found[1:]:
            assert other[key]["losses"] == first["losses"]
            assert other[key]["scale"] == first["scale"]
            for name, value in other[key]["model"].items():
                assert torch.equal(value, first["model"][name]), name
