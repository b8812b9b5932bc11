"""Checkpoints of a loop of one's own: whole, verified, and clear about what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import api
from harness.comm import SoloCommunicator
from harness.comm.together import AllLeave
from harness.errors import CheckpointError


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, api.LARS(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    reducer: api.GradientReducer,
    at: Sequence[int],
) -> None:
    for number in at:
        images = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        reducer.start(1)
        reducer.backward(model(images).square().mean())
        reducer.finish()
        optimizer.step()


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    comm = SoloCommunicator()
    torch.manual_seed(0)
    model, optimizer = model_and_optimizer()
    reducer = api.GradientReducer(model, comm, compression="fp16_feedback")
    saving = api.Checkpoints(
        tmp_path / "deep" / "run", comm, model=model, optimizer=optimizer, reducer=reducer
    )
    assert not saving.restore()
    train(model, optimizer, reducer, range(3))
    saving.save(3)
    train(model, optimizer, reducer, range(3, 6))

    torch.manual_seed(1)
    other, optimizer = model_and_optimizer()
    reducer = api.GradientReducer(other, comm, compression="fp16_feedback")
    going_on = api.Checkpoints(
        tmp_path / "deep" / "run", comm, model=other, optimizer=optimizer, reducer=reducer
    )
    assert going_on.restore()
    train(other, optimizer, reducer, range(3, 6))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_so_many_stay_and_the_newest_valid_one_wins(tmp_path: Path) -> None:
    model, _ = model_and_optimizer()
    saving = api.Checkpoints(tmp_path, SoloCommunicator(), keep=2, model=model)
    with torch.no_grad():
        for update in (1, 2, 3):
            model.get_parameter("0.bias").fill_(update)
            saving.save(update)
        model.get_parameter("0.bias").fill_(9)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["update-00000002.pt", "update-00000003.pt"]
    (tmp_path / names[1]).write_bytes(b"PK\x03\x04 damaged")
    with pytest.warns(UserWarning, match=r"update-00000003\.pt is passed over"):
        assert saving.restore()
    assert model.get_parameter("0.bias").tolist() == [2.0] * 4


def test_what_does_not_fit_is_an_error_of_one_message(tmp_path: Path) -> None:
    comm = SoloCommunicator()
    model, optimizer = model_and_optimizer()
    api.Checkpoints(tmp_path, comm, model=model).save(1)
    with pytest.raises(AllLeave, match="it has no part optimizer") as caught:
        api.Checkpoints(tmp_path, comm, model=model, optimizer=optimizer).restore()
    assert isinstance(caught.value.mine, CheckpointError)
    (tmp_path / "update-00000001.pt").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(AllLeave, match="no check"):
        api.Checkpoints(tmp_path, comm, model=model).restore()
    with pytest.raises(ValueError, match="name the parts"):
        api.Checkpoints(tmp_path, comm)


def test_files_are_plain_dictionaries(tmp_path: Path) -> None:
    model, _ = model_and_optimizer()
    api.Checkpoints(tmp_path, SoloCommunicator(), model=model).save(7)
    state: dict[str, Any] = torch.load(tmp_path / "update-00000007.pt", weights_only=True)
    assert state["model"].keys() == model.state_dict().keys()


def test_every_name_is_there() -> None:
    assert [name for name in api.__all__ if not hasattr(api, name)] == []
