"""A restore, once it is known what is asked for: call pipeline.restore, show its report."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from crcli.config import choose_store, weights_folders
from crcli.image.names import parse_image
from crcli.pipeline.stages import RestoreOptions

if TYPE_CHECKING:
    from crcli.pipeline.stages import RestoreReport


def options_of(image: str, store: str | None, endpoint_url: str | None, **others: Any) -> RestoreOptions:
    """What is asked for, with what the environment and the configuration file say about where images are."""
    url, _ = parse_image(image)
    chosen = choose_store(url or store, endpoint_url)
    return RestoreOptions(
        image, chosen.url, endpoint_url=chosen.endpoint_url, weights_folders=weights_folders(), **others
    )


def bring_back(options: RestoreOptions, *, wait: bool, as_json: bool) -> int:
    """Have the tree back, and its report shown; return the exit code, with `wait` that of the tree."""
    from crcli.pipeline import own_limits  # noqa: F401  # it says so where the thread leaves imports no room
    from crcli.pipeline.opening import Opening

    # Lazily the memory is fetched by a process of its own, which is forked before there are threads.
    opening = None if options.lazy else Opening(options)
    from crcli.pipeline import restore as story
    from crcli.pipeline.interrupts import answer_first
    from crcli.ui import reports
    from crcli.ui.progress import showing

    answer_first()
    with ExitStack() as shown:
        progress = shown.enter_context(showing(as_json))

        def running(report: RestoreReport) -> None:
            shown.close()  # the terminal is the tree's from now on
            reports.show_restore(report, as_json)

        if wait:
            return story.restore_and_wait(options, progress, running, opening)
        running(story.restore(options, progress, opening))
    return 0
