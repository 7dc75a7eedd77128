"""How work on a store is left when a signal ends it: the store is given up, so that nothing is waited for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor

    from crcli.store.base import Store


@contextmanager
def left_by_signals(*stores: Store) -> Iterator[None]:
    """What a signal's exception ends in the block gives these stores up, before anybody cleans up in them."""
    try:
        yield
    except BaseException as error:
        if is_of_a_signal(error):
            for store in stores:
                store.give_up()
        raise


@contextmanager
def asking(count: int, name: str, *stores: Store) -> Iterator[ThreadPoolExecutor]:
    """So many threads that ask these stores. They have ended after the block, and begin nothing more when it
    is left early; a signal leaves it without their answers."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count, name) as threads, left_by_signals(*stores):
        try:
            yield threads
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def is_of_a_signal(error: BaseException | None) -> bool:
    """Whether somebody wants the work to end, rather than that it has failed."""
    return error is not None and not isinstance(error, (Exception, GeneratorExit))
