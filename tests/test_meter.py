"""Forward and backward images, time and memory, counted from outside."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.modules import module

from molehunt import meter as metering
from molehunt.meter import Meter
from molehunt.networks import anatomy, build, capture, features, tail

SHAPE, CLASSES = (1, 16, 16), 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = build("wrn_16_1", SHAPE, CLASSES, rng=torch.Generator().manual_seed(0)).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def hooked() -> bool:
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def counted(do: Callable[[], object]) -> tuple[int, int]:
    with Meter(SHAPE, CLASSES) as meter:
        do()
    assert not hooked()
    return meter.forward, meter.backward


def pictures(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_counts_images_not_calls(model: nn.Module) -> None:
    assert counted(lambda: [model(pictures(n)) for n in (1, 2, 3)]) == (6, 0)


def test_counts_gradients_that_came_back(model: nn.Module) -> None:
    def once() -> None:
        x = pictures(3).requires_grad_()
        model(x).sum().backward()
        model(x)  # forward only
        torch.autograd.grad(model(x)[:, 0].sum(), x)

    assert counted(once) == (9, 6)


def test_a_graph_that_is_used_twice_counts_twice(model: nn.Module) -> None:
    def twice() -> None:
        x = pictures(3).requires_grad_()
        logits = model(x)
        for k in range(2):
            torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)

    assert counted(twice) == (3, 6)


def test_a_repair_that_trains_a_copy_counts() -> None:
    def train() -> None:
        copy = build("wrn_16_1", SHAPE, CLASSES, rng=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(copy(pictures(5)), torch.zeros(5, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    assert counted(train) == (10, 10)


def test_per_sample_gradients_count_every_sample(model: nn.Module) -> None:
    weights = {k: v.detach() for k, v in model.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, w, (x[None],))
        return out.logsumexp(1).sum()

    assert counted(lambda: vmap(grad(loss), in_dims=(None, 0))(weights, pictures(7))) == (7, 7)


def test_networks_side_by_side_count_each() -> None:
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES)) for _ in range(3)]
    weights, buffers = stack_module_state(networks)

    def one(w: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(networks[0], (w, b), (x,))
        return out

    assert counted(lambda: vmap(one, in_dims=(0, 0, None))(weights, buffers, pictures(5))) == (15, 0)


def test_parts_of_a_network_do_not_count(model: nn.Module) -> None:
    parts = anatomy(model, pictures(1))

    def look() -> None:
        kept = capture(model, parts.block, pictures(4))
        features(model, parts.head, pictures(2))
        tail(model, parts.block, kept, pictures(1))
        model.get_submodule("trunk")(model.get_submodule("normalize")(pictures(4)))

    assert counted(look) == (6, 0)


class Stop(Exception):
    pass


def test_a_pass_stopped_half_way_counts_whole_and_confuses_nothing(model: nn.Module) -> None:
    def stop(*_: object) -> None:
        raise Stop

    def partial() -> None:
        handle = model.get_submodule("trunk").register_forward_hook(stop)
        with pytest.raises(Stop):
            model(pictures(4))
        handle.remove()
        model(pictures(3))

    assert counted(partial) == (7, 0)


def test_hooks_are_gone_after_an_error(model: nn.Module) -> None:
    meter = Meter(SHAPE, CLASSES)

    def fail() -> None:
        with meter:
            model(pictures(2))
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert not hooked()
    model(pictures(2))
    assert meter.cost().forward == 2


def test_meters_in_two_threads_count_their_own(model: nn.Module) -> None:
    counts: dict[int, int] = {}
    barrier = threading.Barrier(2)

    def work(count: int) -> None:
        with Meter(SHAPE, CLASSES) as meter:
            barrier.wait()
            for _ in range(20):
                model(pictures(count))
            barrier.wait()
        counts[count] = meter.forward

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {1: 20, 2: 40}


def test_seconds_stop_with_the_block() -> None:
    with Meter(SHAPE, CLASSES) as meter:
        time.sleep(0.02)
        assert meter.cost().seconds >= 0.02
    seconds = meter.cost().seconds
    time.sleep(0.02)
    assert meter.cost().seconds == seconds
    assert 0.02 <= seconds < 30


def test_peak_memory_is_of_this_block() -> None:
    big = 200 * 2**20
    with Meter(SHAPE, CLASSES) as before:
        pass
    with Meter(SHAPE, CLASSES) as meter:
        _ = torch.ones(big, dtype=torch.uint8)
        del _
    with Meter(SHAPE, CLASSES) as after:
        pass
    base = before.cost().peak_bytes
    assert 0.9 * big < meter.cost().peak_bytes - base < 1.5 * big
    assert after.cost().peak_bytes - base < 0.5 * big


def test_peak_memory_without_proc_is_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = metering.peak_bytes()
    monkeypatch.setattr(metering, "_STATUS", metering._STATUS / "missing")
    assert metering.peak_bytes() >= 0.98 * exact > 2**20  # the kernel counts the last few pages late
