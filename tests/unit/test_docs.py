"""README and FORMAT.md say what is: commands, options, codes, numbers, files and records are compared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crcli import config, errors, notify
from crcli.app import COMMANDS, build_app
from crcli.guard.names import BLOCKERS
from crcli.image import catalog, claims, container, gc, lease, names, packs, session, tables
from crcli.image.manifest import StoredFile
from crcli.memory import blocks, chunking, classify, intake, replay
from crcli.memory.blocks import BLOCK_PAGES
from crcli.memory.extents import PAGE
from crcli.pipeline import stages
from crcli.pipeline.check import CheckReport
from crcli.pipeline.plan import OutsideLink
from crcli.pipeline.stages import DumpReport, RestoreReport
from crcli.process import evidence
from crcli.records import fields_of
from crcli.store import cache as cache_of_host
from crcli.store.s3 import uploads

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "crcli" / "image" / "FORMAT.md").read_text()
DOCUMENTS = {"README.md": README, "crcli/image/FORMAT.md": FORMAT}
README_FLAT, FORMAT_FLAT = (" ".join(text.split()) for text in DOCUMENTS.values())
"""The documents on one line each, so that a phrase is found however it is wrapped."""


@cache
def options_of(command: str) -> set[str]:
    """Every option of a command, --help included; of `crcli` itself where the name is empty."""
    app = build_app()
    found = app.get_command(None, command) if command else app
    return {option for parameter in found.params for option in parameter.opts} | {"--help"}


def code_of(text: str) -> list[str]:
    """What a document shows as code: lines of blocks, and spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line for block in blocks for line in block.splitlines()] + spans


def calls(text: str) -> list[tuple[str, list[str]]]:
    """Every call of crcli that a document shows: the command, and its options."""
    found = []
    for line in code_of(text):
        for call in re.finditer(r"(?<![\w/.-])(?:\S*/)?crcli (?!import )([a-z]+)([^#;)]*)", line):
            found.append((call[1], re.findall(r"(?<!\S)\[?(--[a-z-]+)", call[2])))
    return found


def planned(text: str) -> str:
    """The section that names what is not there yet."""
    return text.partition("## Limits")[2]


def keys_in(path: str, function: str) -> set[str]:
    """The keys of the dictionaries that a function writes down, read from its source."""
    tree = ast.parse((ROOT / path).read_text())
    found = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function
    )
    return {
        key.value
        for node in ast.walk(found)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def in_words(text: str) -> set[str]:
    """Every word that a document shows as code by itself."""
    return {span for span in code_of(text) if re.fullmatch(r"\w+", span)}


def test_the_table_of_exit_codes_is_the_generated_one() -> None:
    """README holds, word for word, what `python -m crcli.errors` prints."""
    command = [sys.executable, "-m", "crcli.errors"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    assert printed == errors.exit_code_table() + "\n"
    assert f"\n{printed}\n" in README


def test_every_exit_code_of_an_error_is_in_the_table() -> None:
    """No error ends crcli with a code that the table does not have."""
    classes = [errors.CrcliError]
    for one in classes:
        classes += one.__subclasses__()
    codes = {one.exit_code for one in classes if isinstance(one.exit_code, int)}
    assert codes | {0, 11, 12} == set(errors.EXIT_CODES)


def test_every_command_is_in_readme() -> None:
    """A command that README does not show has been forgotten."""
    assert set(COMMANDS) == {command for command, _ in calls(README.replace(planned(README), ""))}


def test_the_commands_that_readme_shows_exist() -> None:
    """Each command and each option in an example or a sentence is one that crcli takes."""
    for command, options in calls(README):
        if command not in COMMANDS:
            assert f"`crcli {command}`" in planned(README), f"there is no crcli {command}"
            continue
        unknown = set(options) - options_of(command)
        assert not unknown, f"crcli {command} has no {unknown}"


def test_the_options_that_readme_names_exist() -> None:
    """An option that stands by itself belongs to some command."""
    known = set().union(*map(options_of, ["", *COMMANDS]))
    named = {word for span in code_of(README) for word in re.findall(r"(?<!\S)--[a-z][a-z-]+", span)}
    assert named <= known, f"no command has {named - known}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_files_that_a_document_names_exist(name: str) -> None:
    """Paths below crcli/, scripts/, tests/ and plugins/, and the targets of links, are there."""
    text, here = DOCUMENTS[name], (ROOT / name).parent
    spans = [
        span for span in code_of(text) if re.fullmatch(r"(?:\./)?(?:crcli|scripts|tests|plugins)/\S+", span)
    ]
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    missing = [span for span in spans if not (ROOT / span).exists()]
    missing += [link for link in links if not (here / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_headings_that_a_document_links_to_exist(name: str) -> None:
    """A link within the page leads somewhere."""
    headings = re.findall(r"^#+ (.+)$", DOCUMENTS[name], re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", DOCUMENTS[name])) <= anchors


def test_the_tree_in_readme_is_the_tree() -> None:
    """Every room of the house is named, none that is not there, and nothing else."""
    block = re.search(r"^```\ncrcli/\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    inside: set[str] = set()
    outside: set[str] = set()
    for line in block[1].splitlines():
        shown = re.match(r"( *)(\w+/|(?:\w+\.py(?: +|$))+)", line)
        assert shown is not None, line
        (inside if shown[1] else outside).update(shown[2].split())
    package = ROOT / "crcli"
    there = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    there |= {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert inside == there
    assert outside == {"plugins/", "scripts/", "tests/", "vagrant/"}


def test_readme_names_the_fields_of_reports() -> None:
    """The fields of --json, in their order."""
    for command, report in (("dump", DumpReport), ("restore", RestoreReport), ("check", CheckReport)):
        listed = re.search(rf"`{command} --json`: ((?:`\w+`\s*)+)\.", README)
        assert listed is not None
        assert re.findall(r"\w+", listed[1]) == list(fields_of(report))


@pytest.mark.parametrize(
    ("phrase", "size"),
    [
        ("(16 blocks of 4 MiB) | 64 MiB", intake.BLOCK_COUNT * BLOCK_PAGES * PAGE),
        ("| pages that the trial needs | 64 MiB", intake._KEEP_PAGES * PAGE),
        (
            "(8 of 8 MiB), and one for each object that is open | 64 MiB",
            uploads.PARTS_IN_FLIGHT * uploads.PART_SIZE,
        ),
        ("before the tree can take them | 256 MiB", replay.AHEAD_BYTES),
        ("cache of S3 (more is not kept) | 32 MiB", cache_of_host.WAITING_BYTES),
        ("| 32 MiB, and 96 MiB more until a restored tree runs", cache_of_host.PUT_OFF_BYTES),
        ("packs of up to about 64 MiB", packs.PACK_BYTES),
    ],
)
def test_the_sizes_in_readme_are_those_of_the_code(phrase: str, size: int) -> None:
    """What README says of memory is what the constants say."""
    assert phrase in README_FLAT
    mebibytes = re.findall(r"(\d+) MiB", phrase)[-1]
    assert int(mebibytes) << 20 == size


def test_the_limits_on_files_are_those_of_the_code() -> None:
    """What travels, and up to which size."""
    assert f"open for writing up to {evidence.WRITTEN_LIMIT >> 20} MiB" in README_FLAT
    assert f"read up to {evidence.MEMORY_LIMIT >> 30} GiB" in README_FLAT


def test_the_defaults_in_readme_are_those_of_the_code() -> None:
    """The store that is used when none is named, and what gc spares."""
    assert f"`{config.DEFAULT_STORE}`" in README
    assert "younger than an hour" in README_FLAT and gc.GRACE_S == 3600
    assert f"{config.DEFAULT_CACHE}/objects: up to 16 GiB or a tenth of the free disk" in README_FLAT
    assert (cache_of_host.DEFAULT_MOST_BYTES, cache_of_host.DEFAULT_SHARE) == (16 << 30, 10)
    assert all(f"`{option}`" in README for option in ("endpoint_url", "region", "profile", "sse"))


def test_the_times_for_programs_are_those_of_the_code() -> None:
    """How long a dump waits for callbacks, and when a program takes it for over."""
    section = " ".join(README.partition("## For programs")[2].partition("\n## ")[0].split())
    assert "up to 2 s" in section and stages.NOTIFY_WAIT_S == 2
    assert "`on_resume` comes 10 s later" in section and notify.SILENCE_S == 10
    source = (ROOT / "crcli" / "pipeline" / "dump.py").read_text()
    assert "less than 10 s left" in section and "_NO_TIME_TO_TELL_S = 10.0\n" in source
    assert all(f"notify.{name}(" in section for name in notify.__all__)


def test_the_findings_in_readme_exist() -> None:
    """Each name of a finding that README gives is one that the code can make."""
    folders = (ROOT / "crcli" / "process", ROOT / "crcli" / "gpu")
    source = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    table = README.partition("## What can be dumped")[2].partition("## Requirements")[0]
    for name in re.findall(
        r"`([a-z]+-[a-z-]+|io-uring|traced|tun|device|userfaultfd|uninterruptible)`", table
    ):
        assert f'"{name}"' in source, name


def test_the_findings_about_gpus_are_in_readme() -> None:
    """Each name that a dump can give a finding about GPUs, in the section on what can be dumped."""
    source = (ROOT / "crcli" / "gpu" / "preflight.py").read_text()
    section = README.partition("## What can be dumped")[2].partition("## Requirements")[0]
    named = set(re.findall(r'(?:blocker|note)\(\s*"([a-z-]+)"', source))
    assert len(named) > 15
    assert named - {"gpu"} <= set(re.findall(r"`(gpu-[a-z-]+)`", section))


def test_the_findings_of_the_guard_are_in_readme() -> None:
    """Each name that a guard can give a finding stands in the two tables, those of blockers in the first."""
    source = "".join(path.read_text() for path in (ROOT / "crcli" / "guard").glob("*.py"))
    named = set(re.findall(r'(?:blocker|change|note)\(\s*"([a-z-]+)"', source)) | {
        "users-unknown",
        "groups-unknown",
    }
    refused, _, said = README.partition("**Does it fit here?**")[2].partition("| Said, and restored")
    tables = [set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", text)) for text in (refused, said.split("\n\n")[0])]
    assert set(BLOCKERS) <= tables[0]
    assert named - set(BLOCKERS) == tables[1]


def test_the_budget_for_hashes_in_readme_is_that_of_the_code() -> None:
    """How much is read for hashes, and how long."""
    source = (ROOT / "crcli" / "pipeline" / "hashing.py").read_text()
    assert "256 MiB of them and for a second" in README_FLAT
    assert "BUDGET_BYTES = 256 << 20\n" in source and "BUDGET_S = 1.0\n" in source


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_no_place_of_ours(name: str) -> None:
    """No address but CRIU's and an example's, and no path of a machine that this was made on."""
    text = DOCUMENTS[name]
    hosts = set(re.findall(r"https?://([\w.-]+)", text))
    assert hosts <= {"criu.org", "s3.example.com"}
    assert not re.search(r"/work/|/tmp/|/home/|\d+\.\d+\.\d+\.\d+", text)


@pytest.mark.parametrize(
    "layout",
    [
        container._HEADER,
        container._ENTRY,
        tables._CHUNK,
        tables._SPACE,
        tables._EXTENT,
        tables._GROUP,
        tables._MIXED,
        tables._MIXED_PART,
        tables._REFERENCE,
        tables._PIECE,
    ],
    ids=lambda layout: layout.format,
)
def test_format_has_the_layout_of_every_record(layout: Any) -> None:
    """The struct of each record stands in FORMAT.md as the code has it, with its size in the offsets."""
    assert f"`{layout.format}`" in FORMAT
    assert layout.size in (16, 20, 36, 40, 56, 64)


def test_format_has_the_constants() -> None:
    """Magics, limits, keys and times are those of the code."""
    for magic in (container.MAGIC, packs.PACK_MAGIC):
        assert f"`{magic.hex(' ')}`" in FORMAT_FLAT
    assert FORMAT.startswith(f"# The image format, version {container.VERSION}\n")
    assert container._PEEK == 64 << 10 and "the first 64 KiB" in FORMAT_FLAT
    assert container._RAW_LIMIT == 4 << 30 and "at most 4 GiB" in FORMAT_FLAT
    assert packs.BLOB_BYTES == 1 << 20 and "pieces of files, of 1 MiB" in FORMAT_FLAT
    assert packs.PACK_BYTES == 64 << 20 and "past 64 MiB" in FORMAT_FLAT
    assert (packs.FIRST_PACK_BYTES, packs.FIRST_PACKS) == (7 << 20, 4)
    assert "the first four of a dump past 7 MiB" in FORMAT_FLAT
    assert packs._FAMILY == 4 and "The first 4 bytes of PACK" in FORMAT_FLAT
    assert chunking.CHUNK_PAGES == 64 and "at most 64 (256 KiB)" in FORMAT_FLAT
    assert blocks.GROUP_PAGES == 16 and "for each 16 pages" in FORMAT_FLAT
    assert (session.HEARTBEAT_S, session.LAPSED_AFTER_S, session.STALE_AFTER_S) == (60, 600, 900)
    assert "every 60 s" in FORMAT_FLAT and "for 600 s" in FORMAT_FLAT and "for 900 s" in FORMAT_FLAT
    prefixes = (names.IMAGES, names.INDEXES, names.PACKS, names.SESSIONS, names.WEIGHTS, names.LEASES)
    for prefix in (*prefixes, names.COLLECTIONS):
        assert f"`{prefix}" in FORMAT_FLAT
    for pattern in (names._NAME, names._ID):
        assert f"`{pattern.pattern.removesuffix(chr(92) + 'Z')}`" in FORMAT_FLAT
    assert catalog._time_of("20260131T235959123-0a1b2c") == 1769903999.0


def test_the_times_of_leases_are_those_of_the_code() -> None:
    """For how long a lease is good, how often it is renewed, and what its object says."""
    assert (claims.TTL_S, lease.RENEWALS, lease.MARGIN, lease.SETTLE_S) == (30, 5, 1 / 6, 2)
    assert "(30 s where it has none)" in FORMAT_FLAT and "renewed it for 30 s" in README_FLAT
    assert "five times in `ttl_s`" in FORMAT_FLAT and "up to 6 s" in README_FLAT
    assert "a sixth of `ttl_s`" in FORMAT_FLAT
    assert "waits for 2 s" in FORMAT_FLAT and "waits there for 2 s" in README_FLAT
    assert lease._KEPT_S == 3600 and "an hour after they were superseded" in FORMAT_FLAT
    written = keys_in("crcli/image/lease.py", "__init__") | keys_in("crcli/image/lease.py", "_text")
    assert written | keys_in("crcli/image/owner.py", "describe_owner") | {"released"} <= in_words(FORMAT)


def test_format_has_every_field_of_a_manifest() -> None:
    """What a dump writes into the JSON head is described, and so is what a file and a link consist of."""
    written = keys_in("crcli/pipeline/dump.py", "_meta")
    written |= keys_in("crcli/pipeline/facts.py", "describe_host")
    written |= keys_in("crcli/pipeline/facts.py", "describe_tree")
    written |= keys_in("crcli/criu/skeleton.py", "named_files")
    written |= keys_in("crcli/pipeline/hashing.py", "_hash_of")
    written |= keys_in("crcli/pipeline/hashing.py", "describe_mounts")
    written |= set(StoredFile("", 0, ()).as_json()) | set(fields_of(OutsideLink))
    written |= {"name", "id", "skeleton", "files", *fields_of(classify.MemoryCounts)}
    assert written <= in_words(FORMAT), written - in_words(FORMAT)


def test_format_has_every_role_of_a_file() -> None:
    """Why files travel: the words that the code writes."""
    source = (ROOT / "crcli" / "pipeline" / "capture.py").read_text()
    assert set(re.findall(r'Wanted\([^"]*"(\w+)"\)', source)) <= in_words(FORMAT)
