"""Several threads that do the same again and again, side by side."""

import threading


def run_together(seconds, *works):
    """Calls each of ``works`` repeatedly in a thread of its own, and raises what any of them raised."""
    stop, failures = threading.Event(), []

    def guarded(work):
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
