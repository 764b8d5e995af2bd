"""Memory of large results: reused, never more than was used at one time or 32 MiB, else an ordinary tensor's."""

import gc
import io
import os
import random
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import torch_convlab
import torch_convlab.functional as ours
from torch_convlab import _C, backends

MEGABYTE = 1 << 20
ALWAYS_KEPT = 32 * MEGABYTE


@pytest.fixture(autouse=True)
def reusing():
    gc.collect()
    with backends.flags(reuse_memory=True):
        backends.release_memory()
        yield
    gc.collect()


def result(bytes: int) -> torch.Tensor:
    """A result of ours that takes so many bytes."""
    return ours.avg_pool1d(torch.ones(1, 1, bytes // 4), 1)


def account() -> dict[str, int]:
    found = _C.result_memory()
    assert found["used"] + found["kept"] <= max(found["most_used"], ALWAYS_KEPT)
    return found


def test_results_take_the_memory_of_those_before():
    before = account()
    first = result(MEGABYTE)
    assert account()["used"] == before["used"] + MEGABYTE
    place = first.data_ptr()
    del first
    assert account()["used"] == before["used"] and account()["kept"] == MEGABYTE
    second = result(MEGABYTE - 1000)
    assert second.data_ptr() == place
    assert torch.equal(second, torch.ones_like(second))
    del second
    much_less = result(MEGABYTE // 2)  # would waste half of it
    assert much_less.data_ptr() != place


def test_small_results_are_torchs_own():
    before = account()
    small = result(4096)
    assert account() == before and small.numel() == 1024


def test_kept_and_used_memory_never_exceed_the_most_used():
    generator, alive = random.Random(0), []
    most = 0
    for _ in range(300):
        if alive and generator.random() < 0.5:
            alive.pop(generator.randrange(len(alive)))
        else:
            alive.append(result(generator.randrange(MEGABYTE, 16 * MEGABYTE)))
        found = account()  # asserts it
        most = max(most, found["used"])
        assert found["most_used"] >= most
    assert most > 2 * ALWAYS_KEPT
    data = sum(tensor.nbytes for tensor in alive)
    assert data <= account()["used"] <= data * 8 / 7 + len(alive) * 65536
    alive.clear()
    backends.release_memory()
    assert account() == {"used": account()["used"], "kept": 0, "most_used": account()["used"]}


def test_a_small_model_keeps_blocks_of_every_size():
    sizes = [MEGABYTE * size for size in (5, 2, 3, 1, 4, 2)]
    places = []
    for _ in range(2):
        for size in sizes:  # never two at a time
            tensor = result(size)
            places.append(tensor.data_ptr())
            del tensor
    assert places[: len(sizes)] == places[len(sizes) :]
    assert account()["kept"] == MEGABYTE * (5 + 2 + 3 + 1 + 4)
    large = result(ALWAYS_KEPT)
    assert account()["kept"] == 0
    del large


def test_switched_off():
    keeper = result(MEGABYTE)
    del keeper
    assert account()["kept"] > 0
    with backends.flags(reuse_memory=False):
        assert not backends.reuse_memory and account()["kept"] == 0
        one = result(MEGABYTE)
        del one
        assert account()["kept"] == 0
    assert backends.reuse_memory


def test_a_view_keeps_the_memory():
    view = result(MEGABYTE)[..., 5:10]
    others = [result(MEGABYTE) for _ in range(3)]
    for other in others:
        other.zero_()
    assert torch.equal(view, torch.ones_like(view))


def test_what_tensors_can_do():
    tensor = result(MEGABYTE).squeeze()
    tensor.resize_(2 * MEGABYTE).fill_(2)
    assert tensor.sum() == 4 * MEGABYTE
    shared = result(MEGABYTE).squeeze()
    shared.share_memory_()
    assert shared.is_shared() and shared.sum() == MEGABYTE // 4
    file = io.BytesIO()
    torch.save(result(MEGABYTE), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).sum() == MEGABYTE // 4
    lazy = result(MEGABYTE)
    copy = lazy._lazy_clone()
    copy.zero_()
    assert lazy.sum() == MEGABYTE // 4 and copy.sum() == 0
    array = result(MEGABYTE).numpy()
    gc.collect()
    assert array.sum() == MEGABYTE // 4


def test_the_profiler_counts_it():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        tensor = result(MEGABYTE)
        del tensor
        tensor = result(MEGABYTE)  # reused
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes.count(MEGABYTE) == 4 and sizes.count(-MEGABYTE) == 3  # two results and their inputs of the same size
    assert tensor.numel() == MEGABYTE // 4


def test_threads_and_forks():
    """Threads take and give back at the same time; a process forked meanwhile can go on."""
    stop, failures = threading.Event(), []

    def work(value):
        while not stop.is_set():
            found = ours.avg_pool1d(torch.full((1, 1, 65536), float(value)), 1)
            if not torch.equal(found, torch.full_like(found, value)):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(3)]
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for thread in threads:
            thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if result(MEGABYTE).sum() == MEGABYTE // 4 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(count)
    assert not failures


def test_training_step_uses_no_new_memory_the_second_time():
    torch.manual_seed(0)
    model = torch_convlab.nn.Conv2d(8, 64, 3, padding=1)
    input = torch.randn(2, 8, 64, 64)

    def step():
        model.zero_grad()
        ours.max_pool2d(model(input), 2).sum().backward()

    step()
    most = account()["most_used"]
    places = {tuple(sorted(account().items()))}
    for _ in range(3):
        step()
        places.add(tuple(sorted(account().items())))
    assert account()["most_used"] == most and len(places) == 1
