"""What the results say: the goals, and a table for README. Figures are medians over the rounds made."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

ROUNDS = ("weights-1", "weights-2", "weights-3")
COLD = ("weights-cold",)

ROWS = {
    "dump until durable (s)": (("crcli_dump", "dump_s"), ("plain_dump", "durable_s")),
    "restore until it makes its next step (s)": (
        ("crcli_restore", "first_step_s"),
        ("plain_restore", "first_step_s"),
    ),
    "image (MiB)": (("crcli_dump", "image_bytes"), ("plain_dump", "image_bytes")),
}
"""Each row's figure with crcli, and with the plain sequence."""

RESTORE_FASTER, IMAGE_SMALLER, IMAGE_SHARE = 2.0, 5.0, 0.10


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals whose figures were taken: `value`, what it is to reach, and whether it did."""
    found = []
    for title, names in (("warm", ROUNDS), ("cold", COLD)):
        rounds = _rounds(results, names)
        for name, value, bound, at_least in _goals(rounds):
            met = value >= bound if at_least else value <= bound
            found.append(
                {
                    "goal": f"{name} ({title})",
                    "value": value,
                    "bound": bound,
                    "met": met,
                    "rounds": len(rounds),
                }
            )
    return found


def _goals(rounds: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, bool]]:
    if not rounds:
        return
    middle = {row: _middle(rounds, row) for row in ROWS}
    faster = _ratio(middle["restore until it makes its next step (s)"])
    smaller = _ratio(middle["image (MiB)"])
    dump = _ratio(middle["dump until durable (s)"])
    share = median(one["crcli_dump"]["image_bytes"] / _gpu_bytes(one) for one in rounds)
    yield "restore: plain sequence / crcli", faster, RESTORE_FASTER, True
    yield "image: plain sequence / crcli", smaller, IMAGE_SMALLER, True
    yield "image / GPU memory in use", share, IMAGE_SHARE, False
    yield "dump: plain sequence / crcli", dump, 1.0, True


def as_markdown(results: dict[str, Any]) -> str:
    """What was tried and what came of it, then the figures beside the plain sequence's."""
    return "\n".join([*_head(results), "", *_outcomes(results), "", *_figures(results)]).strip()


def _head(results: dict[str, Any]) -> Iterator[str]:
    cuda = results.get("probe", {}).get("cuda", {})
    asked = ", ".join(results.get("gpus", "").splitlines())  # older results have it from the probe only
    names = ", ".join(one["name"] for one in cuda.get("devices", [])) or "no GPU"
    version = cuda.get("driver_version", 0)
    driver = f"driver {_driver(results)} (CUDA {version // 1000}.{version % 1000 // 10})"
    packages = ", ".join(f"{name} {number}" for name, number in results.get("packages", {}).items() if number)
    if results.get("not_a_result"):
        yield f"**Not a result**: {results['not_a_result']}."
        yield ""
    yield (
        f"{names + ', ' + driver if cuda else asked or 'no GPU, no driver'}, Linux {results.get('kernel')}, "
        f"CRIU {str(results.get('criu', '')).removeprefix('Version: ')}, "
        f"{packages}; {results.get('began', '')[:10]}."
    )
    if results.get("stopped"):
        yield f"Stopped: {results['stopped']}."


def _driver(results: dict[str, Any]) -> str:
    lines = results.get("probe", {}).get("nvidia", {}).get("version", "").splitlines()
    words = lines[0].split() if lines else []
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _outcomes(results: dict[str, Any]) -> Iterator[str]:
    yield "| Dumped, killed, restored | Outcome | The same afterwards |"
    yield "|---|---|---|"
    for name, found in results.get("scenarios", {}).items():
        why = found.get("why", "").splitlines()[0] if found.get("why") else ""
        same = found.get("figures", {}).get("same", why)
        yield f"| {found.get('title', name)} | {found['outcome']} | {same} |"


def _figures(results: dict[str, Any]) -> Iterator[str]:
    for title, names in (("page cache warm", ROUNDS), ("page cache dropped before each restore", COLD)):
        rounds = _rounds(results, names)
        if not rounds:
            continue
        sizes = results["sizes"]
        used = median(_gpu_bytes(one) for one in rounds)
        yield (
            f"| {_gib(sizes['weights_bytes'])} of weights, {_gib(sizes['cache_bytes'])} of empty cache, "
            f"{_gib(used)} of GPU memory in use; {title}; medians of {len(rounds)} "
            "| plain sequence | crcli | ratio |"
        )
        yield "|---|---:|---:|---:|"
        for row in ROWS:
            by_crcli, plainly = _middle(rounds, row)
            unit = 2**20 if "MiB" in row else 1
            yield f"| {row} | {plainly / unit:.3g} | {by_crcli / unit:.3g} | {plainly / by_crcli:.2g} |"
        share = median(one["crcli_dump"]["image_bytes"] / _gpu_bytes(one) for one in rounds)
        yield f"| image, of the GPU memory in use | – | {100 * share:.2g} % | – |"
        yield ""


def _rounds(results: dict[str, Any], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The figures of those rounds that were made whole."""
    made = (results.get("scenarios", {}).get(name, {}) for name in names)
    return [one["figures"] for one in made if one.get("outcome") == "passed"]


def _middle(rounds: list[dict[str, Any]], row: str) -> tuple[float, float]:
    (ours, figure), (theirs, other) = ROWS[row]
    return median(one[ours][figure] for one in rounds), median(one[theirs][other] for one in rounds)


def _gpu_bytes(figures: dict[str, Any]) -> float:
    """GPU memory in use at the dump: by crcli's account where NVML tells it, else by the program's."""
    told = (figures["crcli_dump"].get("gpu") or {}).get("memory_bytes")
    return float(told or figures["gpu_bytes"])


def _ratio(pair: tuple[float, float]) -> float:
    by_crcli, plainly = pair
    return plainly / by_crcli


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
