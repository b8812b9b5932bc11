"""Comparing weights between real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import sys
import torch
from harness.comm import open_communicator
from harness.consistency import Divergence, check_equal
from harness.models import build_model

comm = open_communicator("horovod")
model = build_model("lenet5", 10, (1, 28, 28), seed=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
check_equal(model, optimizer, comm, 1)
names = [name for name, _ in model.named_parameters()]
with torch.no_grad():
    if comm.rank == 2:
        list(model.parameters())[3].view(-1).view(torch.int32)[0] ^= 1
try:
    check_equal(model, optimizer, comm, 2)
except Divergence as error:
    text = str(error).replace(names[3], "THE FOURTH")
    sys.stdout.write(f"rank {comm.rank}: {text.partition('. ')[0]}\\n")
comm.close()
"""


@pytest.mark.slow
@pytest.mark.parallel(3)
def test_one_bit_on_one_of_three_ranks_is_found_by_all(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "3", "-bind-to", "none"]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(
        [*launch, sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank ")) == [
        f"rank {rank}: after update 2 the weights differ between ranks: first in THE FOURTH, "
        "where rank 2 differs from the other 2"
        for rank in range(3)
    ]
