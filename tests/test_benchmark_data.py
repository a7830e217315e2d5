"""What the benchmark of the data counts; no time is compared with another."""

import hashlib
import multiprocessing
import threading
import time

from mm_lightning.benchmark_data import settled_cpu_seconds

SECONDS = 0.5


def work() -> None:
    """Without the GIL, as decord decodes."""
    while time.process_time() < SECONDS:
        hashlib.sha256(bytes(10_000_000))


def wait_for_a_thread(ended) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ended.wait()


def test_a_process_is_settled_when_its_threads_are():
    """Its first thread sleeps meanwhile."""
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    process = context.Process(target=wait_for_a_thread, args=(ended,))
    process.start()
    time.sleep(0.1)
    try:
        spent = settled_cpu_seconds([process.pid]) - time.process_time()
        assert spent >= SECONDS - 0.05  # the clock of the system ticks
    finally:
        ended.set()
        process.join()
