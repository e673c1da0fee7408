"""The fair queue: bounded, fair, and a client that leaves frees its place."""

import asyncio
import threading

import pytest

from chatapp.server.fair_queue import Busy, Client, FairQueue


class Gate:
    """Work that yields its name when it begins, and ends when the gate opens or it is cancelled."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.open = threading.Event()

    def work(self, name: str):
        def run(cancel: threading.Event):
            self.order.append(name)
            yield name
            while not (self.open.wait(0.005) or cancel.is_set()):
                pass

        return run


async def drained(job) -> list:
    return [item async for item in job]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 30))


def order_of(clients: list[Client]) -> list[str]:
    """The order in which the queue serves jobs of these clients; they join one by one while another job runs."""

    async def scenario():
        queue, gate = FairQueue(), Gate()
        first = queue.join(Client("first"), gate.work("first"))
        jobs = [queue.join(client, gate.work(f"{client.address}{client.session}")) for client in clients]
        gate.open.set()
        await asyncio.gather(*(drained(job) for job in [first, *jobs]))
        return gate.order[1:]

    return run(scenario())


def test_one_client_is_served_in_the_order_of_arrival():
    async def scenario():
        queue, gate = FairQueue(), Gate()
        gate.open.set()
        jobs = [queue.join(Client("a"), gate.work(str(i))) for i in range(10)]
        assert [await drained(job) for job in jobs] == [[str(i)] for i in range(10)]
        while queue.waiting or queue.running:
            await asyncio.sleep(0.01)

    run(scenario())


def test_clients_take_turns_however_many_jobs_one_has():
    assert order_of([Client("a")] * 4 + [Client("b"), Client("c")]) == ["a", "b", "c", "a", "a", "a"]


def test_an_address_with_many_sessions_has_no_more_turns_than_another():
    sessions = [Client("a", str(i)) for i in range(3)]
    assert order_of([*sessions, sessions[0], Client("b"), Client("b")]) == ["a0", "b", "a1", "b", "a2", "a0"]


def test_newcomers_do_not_pass_clients_that_wait_longer():
    async def scenario():
        queue, order, permits = FairQueue(), [], threading.Semaphore(0)

        def work(name: str):
            def run(cancel: threading.Event):
                order.append(name)
                permits.acquire()
                yield name

            return run

        jobs = [queue.join(Client("a"), work("a")) for _ in range(3)]
        for i in range(3):  # one newcomer before each turn
            jobs.append(queue.join(Client(f"b{i}"), work(f"b{i}")))
            permits.release()
            while len(order) < i + 2:
                await asyncio.sleep(0.005)
        permits.release(len(jobs))
        await asyncio.gather(*(drained(job) for job in jobs))
        return order

    assert run(scenario()) == ["a", "b0", "a", "b1", "b2", "a"]


def test_a_full_queue_refuses_and_says_when_to_retry():
    async def scenario():
        queue, gate = FairQueue(places=2), Gate()
        jobs = [queue.join(Client(name), gate.work(name)) for name in "abc"]
        with pytest.raises(Busy) as busy:
            queue.join(Client("d"), gate.work("d"))
        assert 1 <= busy.value.retry_after <= 60
        assert queue.waiting == 2
        gate.open.set()
        await asyncio.gather(*(drained(job) for job in jobs))

    run(scenario())


def test_a_client_that_fills_the_queue_loses_a_place_to_a_newcomer():
    async def scenario():
        queue, gate = FairQueue(places=4), Gate()
        greedy = [queue.join(Client("greedy"), gate.work(str(i))) for i in range(5)]
        newcomer = queue.join(Client("new"), gate.work("new"))
        with pytest.raises(Busy):
            await drained(greedy[-1])  # the newest place
        with pytest.raises(Busy):
            queue.join(Client("greedy"), gate.work("more"))
        gate.open.set()
        await asyncio.gather(*(drained(job) for job in [*greedy[:-1], newcomer]))
        return gate.order

    assert run(scenario()) == ["0", "new", "1", "2", "3"]


def test_nobody_waits_longer_than_the_patience():
    async def scenario():
        queue, gate = FairQueue(patience=0.1), Gate()
        first = queue.join(Client("a"), gate.work("a"))
        with pytest.raises(Busy):
            await drained(queue.join(Client("b"), gate.work("b")))
        gate.open.set()
        assert await drained(first) == ["a"]
        assert gate.order == ["a"]

    run(scenario())


def test_a_client_that_leaves_frees_its_place_and_the_model():
    async def scenario():
        queue, gate = FairQueue(), Gate()
        async with queue.join(Client("a"), gate.work("a")) as running:
            await anext(aiter(running))
            async with queue.join(Client("b"), gate.work("b")) as waiting:
                assert (queue.running, queue.waiting, waiting.ahead) == (1, 1, 1)
            assert queue.waiting == 0
        # The gate stays closed: only leaving ends the work.
        last = queue.join(Client("c"), gate.work("c"))
        await anext(aiter(last))
        assert gate.order == ["a", "c"]
        last.leave()
        while queue.running:
            await asyncio.sleep(0.01)
        assert queue._served == {}  # nothing is kept of clients that left

    run(scenario())


def test_a_cancelled_reader_frees_the_model():
    async def scenario():
        queue, gate = FairQueue(), Gate()

        async def read():
            async with queue.join(Client("a"), gate.work("a")) as job:
                await drained(job)

        reader = asyncio.create_task(read())
        while not gate.order:
            await asyncio.sleep(0.01)
        reader.cancel()
        while queue.running:
            await asyncio.sleep(0.01)

    run(scenario())


def test_failing_work_fails_its_own_job_alone():
    async def scenario():
        queue, gate = FairQueue(), Gate()
        gate.open.set()

        def broken(cancel):
            yield 1
            raise ValueError("broken")

        job, other = queue.join(Client("a"), broken), queue.join(Client("a"), gate.work("b"))
        got = []
        with pytest.raises(ValueError, match="broken"):
            async for item in job:
                got.append(item)
        assert got == [1]
        assert await drained(other) == ["b"]

    run(scenario())


def test_batches_hold_what_came_meanwhile():
    async def scenario():
        queue = FairQueue()
        job = queue.join(Client("a"), lambda cancel: iter(range(1000)))
        batches = [batch async for batch in job.batches(every=0.02)]
        assert sum(batches, []) == list(range(1000))
        assert len(batches) < 100

    run(scenario())


def test_several_run_at_once_and_the_next_begins_when_one_ends():
    async def scenario():
        queue, gates = FairQueue(places=1, at_once=2), {name: Gate() for name in "abc"}
        jobs = {name: queue.join(Client(name), gate.work(name)) for name, gate in gates.items()}
        assert (queue.running, queue.waiting, jobs["c"].ahead) == (2, 1, 2)
        with pytest.raises(Busy):
            queue.join(Client("d"), gates["a"].work("d"))
        for name in "ab":
            assert await anext(aiter(jobs[name])) == name  # both have begun
        gates["b"].open.set()
        assert await anext(aiter(jobs["c"])) == "c"
        assert (queue.running, queue.waiting) == (2, 0)
        queue.close()  # cancels what runs: the gates of a and c stay closed
        while queue.running:
            await asyncio.sleep(0.01)

    run(scenario())
