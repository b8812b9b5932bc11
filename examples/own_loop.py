"""A loop of one's own around the harness's pieces: the batch grows, on any number of ranks.

    python examples/own_loop.py runs/own-loop
    horovodrun -np 2 python examples/own_loop.py runs/own-loop     # goes on if it was cut off

torchvision's ResNet-18 on scikit-learn's digits, enlarged to 3 × 32 × 32.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from harness import api


def main(directory: str) -> None:
    torch.manual_seed(0)  # the same weights on all ranks
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:320, None] / 16
    images = functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    model = api.import_tolerantly("torchvision.models").resnet18(num_classes=10)

    comm = api.open_communicator("horovod")  # one process where no launcher has started more
    reducer = api.GradientReducer(model, comm, summation="exact")
    sampler = api.GlobalBatchSampler(len(images), seed=0, micro_batch=32)
    optimizer = api.LARS(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    growth = api.Geometric(64, factor=2, every=api.Duration.parse("1ep"))
    rates = api.RateSchedule(base=2.0, base_batch=64, power=1.0, momentum=0.9)
    updates = api.Updates(len(images), growth, rates, duration="2ep")
    checkpoints = api.Checkpoints(
        directory, comm, model=model, optimizer=optimizer, reducer=reducer, updates=updates
    )
    checkpoints.restore()
    for update in updates:
        api.set_rates(optimizer, update.lr, update.momentum)
        reducer.start(sampler.count(update.size, comm.size, comm.rank))
        total = 0.0
        for micro in sampler.micro_batches(update.seen, update.size, comm.size, comm.rank):
            logits = model(images[micro.samples])
            loss = functional.cross_entropy(logits, labels[micro.samples], reduction="sum")
            reducer.backward(loss / update.size)
            total += float(loss.detach())
        reduced = reducer.finish([total])  # .grad is the mean over the samples of all ranks
        if reduced.finite:
            optimizer.step()
        if comm.rank == 0:
            mean = reduced.extras[0] / update.size
            print(f"update {update.number}: batch {update.size}, loss {mean:.4f}", flush=True)
        if update.number % 3 == 0:
            checkpoints.save(update.number)
    checkpoints.save(updates.clock.updates)
    comm.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: own_loop.py DIR, where its checkpoints go and are found again")
    main(sys.argv[1])
