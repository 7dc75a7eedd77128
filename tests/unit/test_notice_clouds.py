"""The clouds' notices, from small servers on loopback that answer as the vendors document."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from crcli.errors import UsageError
from crcli.notice import Notices, Source, Surroundings, Urgency
from crcli.notice import azure as azure_module
from crcli.notice.aws import AwsSpot
from crcli.notice.azure import AzureEvents
from crcli.notice.gcp import MAINTENANCE, PREEMPTED, GcpKey
from crcli.notice.metadata import Answer, Metadata, ServiceSilent, epoch_of
from tests.support.metadata_servers import TOKEN, Aws, Azure, Gcp, Service
from tests.support.notices import ENOUGH_S, Reported, next_of, watching

ROOT = Path(__file__).parents[2]
EVERY_S = 0.01
SOON, LATER = "2026-11-26T02:00:00Z", "2026-11-26T02:02:00Z"
SOON_HTTP = "Thu, 26 Nov 2026 02:00:00 GMT"


def aws(service: Service, reported: Reported) -> list[Source]:
    """The source that asks this service."""
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}
    return [AwsSpot(Surroundings(None, environ, reported), EVERY_S)]


def gcp(service: Service, reported: Reported) -> list[Source]:
    """Both sources that ask this service."""
    here = Surroundings(None, {"GCE_METADATA_HOST": f"127.0.0.1:{service.port}"}, reported)
    keys = (("preempted", PREEMPTED), ("maintenance-event", MAINTENANCE))
    return [GcpKey(key, meanings, here, EVERY_S) for key, meanings in keys]


def azure(service: Service, reported: Reported) -> list[Source]:
    """The source that asks this service."""
    environ = {"CRCLI_AZURE_METADATA_ENDPOINT": service.url}
    return [AzureEvents(Surroundings(None, environ, reported), EVERY_S)]


Cloud = tuple[Service, Callable[[Service, Reported], list[Source]], Callable[[Any], None]]
CLOUDS: dict[str, Callable[[], Cloud]] = {
    "aws": lambda: (Aws(), aws, lambda service: service.interrupt(LATER)),
    "gcp": lambda: (Gcp(), gcp, lambda service: service.set("preempted", "TRUE")),
    "azure": lambda: (Azure(), azure, lambda service: service.schedule("A", "Preempt")),
}


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> Cloud:
    """A service of each cloud, how to watch it, and how it takes the machine away."""
    return CLOUDS[request.param]()


# --- what holds for all of them ----------------------------------------------------------------------------


def test_a_machine_that_stays_gives_no_notice(cloud: Cloud) -> None:
    """A service that is asked time and again and has nothing to say leaves the job alone."""
    service, sources, _ = cloud
    reported = Reported()
    with service.serving(), watching(*sources(service, reported)) as notices:
        if not isinstance(service, Gcp):
            service.wait_for(lambda request: request.method == "GET", 6)
        else:  # who holds its answers back
            service.wait_for(lambda request: request.query["last_etag"] != "0", 2)
        assert notices.get(0) is None
    assert reported == []


def test_a_machine_that_goes_away_gives_one_notice(cloud: Cloud) -> None:
    """The notice comes while the job runs, and is not repeated although the service repeats itself."""
    service, sources, take_away = cloud
    with service.serving(), watching(*sources(service, Reported())) as notices:
        assert notices.get(0.05) is None
        take_away(service)
        notice = next_of(notices)
        assert notice.urgency is Urgency.LEAVE and notice.deadline is not None
        if not isinstance(service, Gcp):
            service.wait_for(lambda request: request.method == "GET", 4)
        assert notices.get(0.05) is None


def test_a_notice_that_is_there_already_is_told(cloud: Cloud) -> None:
    """A job that starts on a machine that is being taken away learns of it."""
    service, sources, take_away = cloud
    take_away(service)
    with service.serving(), watching(*sources(service, Reported())) as notices:
        assert next_of(notices).urgency is Urgency.LEAVE


GARBAGE = {
    "error 500": (500, {}, b"oops"),
    "error 503": (503, {"Retry-After": "60"}, b""),
    "not JSON": (200, {}, b"<html>please log in</html>"),
    "a list": (200, {}, b"[1, 2]"),
    "nested": (200, {}, b"[" * 100000),
    "an object": (200, {}, b'{"action": "none", "Events": 7}'),
    "too long": (200, {}, b"x" * 300000),
    "not text": (200, {}, bytes(range(256))),
    "elsewhere": (302, {"Location": "http://192.0.2.1/"}, b""),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_errors_and_garbage_are_asked_again(cloud: Cloud, reply: Any) -> None:
    """A service that answers nonsense is no notice; it is reported once, and heard when it recovers."""
    service, sources, take_away = cloud
    service.broken = reply
    reported = Reported()
    with service.serving(), watching(*sources(service, reported)) as notices:
        assert reported.wait().name == "notice-silent"
        service.wait_for(lambda request: True, 8)  # goes on asking, and does not complain again
        assert notices.get(0) is None
        service.broken = None
        take_away(service)
        assert next_of(notices).urgency is Urgency.LEAVE
    names = [finding.evidence["source"] for finding in reported]
    assert len(names) <= (2 if isinstance(service, Gcp) else 1)


def test_a_service_that_appears_late_is_heard(cloud: Cloud) -> None:
    """Where nobody listens yet, the source tries on."""
    service, sources, take_away = cloud
    with socket.socket() as reserved:  # bound and not listening: a connection is refused
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        service.port = reserved.getsockname()[1]
        reported = Reported()
        with watching(*sources(service, reported)) as notices:
            assert "refused" in reported.wait().message
            reserved.close()
            take_away(service)
            with service.serving(service.port):
                assert next_of(notices).urgency is Urgency.LEAVE


def test_a_service_that_never_answers_does_not_hold_anybody(cloud: Cloud) -> None:
    """A server that takes connections and says nothing: entering and leaving go on, no notice is made up."""
    service, sources, _ = cloud
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(8)
        service.port = mute.getsockname()[1]
        with watching(*sources(service, Reported())) as notices:
            mute.accept()[0].recv(1)  # it asks, and waits
            assert notices.get(0) is None
        for thread in threading.enumerate():
            if thread.name.startswith("notice-"):
                thread.join(ENOUGH_S)
                assert not thread.is_alive()


@pytest.mark.parametrize("part", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_half_an_answer_is_none(cloud: Cloud, part: bytes) -> None:
    """A connection that breaks in the middle of an answer is a service that did not answer."""
    service, sources, _ = cloud
    done = threading.Event()

    def serve(listening: socket.socket) -> None:
        while not done.is_set():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(part)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        service.port = listening.getsockname()[1]
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        reported = Reported()
        with watching(*sources(service, reported)) as notices:
            assert reported.wait().name == "notice-silent"
            assert notices.get(0) is None
        done.set()
        socket.create_connection(listening.getsockname()).close()
        thread.join(ENOUGH_S)


def test_all_of_them_at_once() -> None:
    """Several sources watch beside each other, and each is heard."""
    with ExitStack() as stack:
        sources: list[Source] = []
        actions = []
        for make in CLOUDS.values():
            service, sources_of, take_away = make()
            stack.enter_context(service.serving())
            sources += sources_of(service, Reported())
            actions.append((take_away, service))
        notices = stack.enter_context(watching(*sources))
        for take_away, service in actions:
            take_away(service)
        assert {next_of(notices).source for _ in actions} == {"aws", "gcp", "azure"}


# --- time --------------------------------------------------------------------------------------------------


def answered(date: str | None, at: float = 1000.0) -> Answer:
    """An answer with this Date, whose first byte came at this monotonic time."""
    return Answer(200, b"{}", {} if date is None else {"Date": date}, at)


def test_the_service_s_clock_counts_not_ours() -> None:
    """Two minutes by the service's clock are two minutes, however wrong ours is; less the second cut off."""
    assert answered(SOON_HTTP).deadline(LATER) == 1000 + 120 - 1
    assert answered(SOON_HTTP).deadline("Thu, 26 Nov 2026 02:02:00 GMT") == 1000 + 120 - 1
    assert answered(SOON_HTTP).deadline("2026-11-26T03:02:00+01:00") == 1000 + 120 - 1


@pytest.mark.parametrize("date", [None, "", "yesterday"])
def test_without_the_service_s_clock_ours_counts(date: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not say what time it is leaves us our own clock."""
    monkeypatch.setattr(time, "time", lambda: epoch_of(SOON))
    assert answered(date).deadline(LATER) == 1000 + 120


@pytest.mark.parametrize("when", ["", "None", "soon", "99999-01-01", "2026-13-45T99:00:00Z"])
def test_a_time_that_is_none_is_no_deadline(when: str) -> None:
    """What cannot be read as a time is not guessed at."""
    assert answered(SOON_HTTP).deadline(when) is None


@pytest.mark.parametrize("skew_s", [-36000, 36000])
def test_a_clock_that_is_hours_off_moves_no_deadline(skew_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our clock ten hours before or behind, the time that is left is what the service says."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew_s)
    service = Aws()
    service.date = SOON_HTTP
    service.interrupt(LATER)
    with service.serving():
        before = time.monotonic()
        with watching(*aws(service, Reported())) as notices:
            deadline = next_of(notices).deadline
        after = time.monotonic()
    assert deadline is not None
    assert before + 119 <= deadline <= after + 119


# --- AWS ---------------------------------------------------------------------------------------------------


def test_aws_a_rebalance_recommendation_is_a_risk() -> None:
    """The instance goes on; an interruption that follows is told beside it."""
    service = Aws()
    service.recommend(SOON)
    with service.serving(), watching(*aws(service, Reported())) as notices:
        notice = next_of(notices)
        assert (notice.urgency, notice.deadline) == (Urgency.RISK, None)
        service.interrupt(LATER, "stop")
        notice = next_of(notices)
        assert notice.urgency is Urgency.LEAVE and "stop" in notice.reason


def test_aws_an_interruption_comes_before_a_recommendation() -> None:
    """When both are there at once, the one that matters is told first."""
    service = Aws()
    service.recommend(SOON)
    service.interrupt(LATER)
    with service.serving(), watching(*aws(service, Reported())) as notices:
        assert [next_of(notices).urgency for _ in range(2)] == [Urgency.LEAVE, Urgency.RISK]


def test_aws_an_interruption_without_a_time_is_one() -> None:
    """What is known is told: the action, and no deadline."""
    service = Aws()
    service.items["spot/instance-action"] = '{"action": "hibernate"}'
    with service.serving(), watching(*aws(service, Reported())) as notices:
        notice = next_of(notices)
    assert "hibernate" in notice.reason and notice.deadline is None


def test_aws_a_token_is_asked_for_once_and_again_when_refused() -> None:
    """One PUT serves many questions; a token that was forgotten is replaced without a word."""
    service = Aws()
    reported = Reported()
    with service.serving(), watching(*aws(service, reported)) as notices:
        service.wait_for(lambda request: request.method == "GET", 6)
        assert [request.method for request in service.asked].count("PUT") == 1
        service.valid.clear()
        service.interrupt(LATER)
        assert next_of(notices).urgency is Urgency.LEAVE
    assert [request.method for request in service.asked].count("PUT") == 2
    assert reported == []


def test_aws_version_1_is_asked_without_a_token() -> None:
    """Where there are no tokens, questions bear none."""
    service = Aws(tokens=False)
    service.interrupt(LATER)
    with service.serving(), watching(*aws(service, Reported())) as notices:
        assert next_of(notices).urgency is Urgency.LEAVE
    assert not any(TOKEN in request.headers for request in service.asked if request.method == "GET")


# --- Google ------------------------------------------------------------------------------------------------


def test_gcp_maintenance_that_moves_the_vm_is_a_risk_each_time() -> None:
    """A live migration is a risk, and so is the next one; being stopped for maintenance is the end."""
    service = Gcp()
    with service.serving(), watching(*gcp(service, Reported())) as notices:
        for value, urgency in (
            ("MIGRATE_ON_HOST_MAINTENANCE", Urgency.RISK),
            ("MIGRATE_ON_HOST_MAINTENANCE", Urgency.RISK),
            ("TERMINATE_ON_HOST_MAINTENANCE", Urgency.LEAVE),
        ):
            service.set("maintenance-event", value)
            assert next_of(notices).urgency is urgency
            service.set("maintenance-event", "NONE")
            none = service.etag("maintenance-event")
            service.wait_for(lambda request, none=none: request.query["last_etag"] == none)


def test_gcp_a_service_that_does_not_wait_is_heard() -> None:
    """A proxy that answers at once, whatever was asked, only costs more questions."""
    service = Gcp()
    service.waits = False
    with service.serving(), watching(*gcp(service, Reported())) as notices:
        service.wait_for(lambda request: request.query["last_etag"] != "0", 4)
        assert notices.get(0) is None
        service.set("preempted", "TRUE")
        assert next_of(notices).reason == "the VM is preempted"


def test_gcp_an_unknown_word_is_no_notice() -> None:
    """A value that the documentation does not have means nothing to us, and is no error either."""
    service = Gcp()
    service.keys["maintenance-event"] = "RESHELVED"
    reported = Reported()
    with service.serving(), watching(*gcp(service, reported)) as notices:
        service.wait_for(lambda request: request.query["last_etag"] != "0", 2)
        assert notices.get(0) is None
    assert reported == []


def test_gcp_an_answer_of_another_server_is_none() -> None:
    """Something else at that address, which does not say that it is Google's, is not believed."""
    service = Gcp()
    service.broken = (200, {}, b"TRUE")
    reported = Reported()
    with service.serving(), watching(*gcp(service, reported)) as notices:
        assert "not Google's" in reported.wait().message
        assert notices.get(0) is None


# --- Azure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Reboot", "Redeploy", "Freeze"])
def test_azure_each_kind_of_event(kind: str) -> None:
    """All kinds end the VM's memory but Freeze, after which it goes on; each says when at the earliest."""
    service = Azure()
    service.date = "Thu, 22 Jul 2021 04:35:17 GMT"
    service.schedule("A", kind)
    before = time.monotonic()
    with service.serving(), watching(*azure(service, Reported())) as notices:
        notice = next_of(notices)
        assert notice.urgency is (Urgency.RISK if kind == "Freeze" else Urgency.LEAVE)
        assert kind in notice.reason
        assert notice.deadline is not None
        assert before + 899 <= notice.deadline <= time.monotonic() + 899


def test_azure_an_event_is_acknowledged_when_the_job_is_saved() -> None:
    """Not before: then it would happen at once. After it, by a POST of its id."""
    service = Azure()
    service.schedule("A-1", "Preempt")
    with service.serving(), watching(*azure(service, Reported())) as notices:
        notice = next_of(notices)
        service.wait_for(lambda request: True, 3)
        assert service.started == []
        notice.on_saved()
        assert service.started == ["A-1"]
        notice.on_saved()
    assert service.started == ["A-1"]
    assert notices.findings == []


def test_azure_an_event_is_acknowledged_after_leaving_too() -> None:
    """Whoever saves the job may have left the notices by then."""
    service = Azure()
    service.schedule("A-1", "Preempt")
    with service.serving():
        with watching(*azure(service, Reported())) as notices:
            notice = next_of(notices)
        notice.on_saved()
    assert service.started == ["A-1"]


def test_azure_an_acknowledgement_that_fails_is_a_finding() -> None:
    """The job is saved whatever the service thinks of it."""
    service = Azure()
    service.schedule("A-1", "Preempt")
    with service.serving(), watching(*azure(service, Reported())) as notices:
        notice = next_of(notices)
        service.broken = (500, {}, b"")
        notice.on_saved()
    assert [finding.name for finding in notices.findings] == ["notice-unanswered"]
    assert "500" in notices.findings[0].message


def test_azure_the_last_job_on_a_vm_acknowledges() -> None:
    """An event that one job's image sets free would take the others away unsaved."""
    service = Azure()
    service.schedule("A-1", "Preempt")
    with service.serving(), ExitStack() as stack:
        jobs = [stack.enter_context(watching(*azure(service, Reported()))) for _ in range(3)]
        told = [next_of(job) for job in jobs]
        for notice in told[:2]:
            notice.on_saved()
            assert service.started == []
        told[2].on_saved()
    assert service.started == ["A-1"]


def test_azure_a_job_that_was_killed_is_not_waited_for() -> None:
    """Who is dead holds no lock."""
    hold = (
        "import sys; from crcli.notice.azure import _Unsaved; one = _Unsaved(sys.argv[1]); one.enter();"
        "print('held', flush=True); sys.stdin.read()"
    )
    service = Azure()
    service.schedule("A-1", "Preempt")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ExitStack() as stack:
        stack.enter_context(service.serving())
        lock = f"{azure_module.LOCKS}/azure-127.0.0.1:{service.port}.lock"
        command = [sys.executable, "-c", hold, lock]
        other = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with watching(*azure(service, Reported())) as first, watching(*azure(service, Reported())) as second:
            told = [next_of(first), next_of(second)]
            told[0].on_saved()
            other.kill()
            other.wait(ENOUGH_S)
            told[1].on_saved()
    assert service.started == ["A-1"]


def test_azure_without_a_place_for_a_lock_nothing_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether others are unsaved cannot be known then; the event happens when it was to."""
    monkeypatch.setattr(azure_module, "LOCKS", "/proc/no/lock")
    service = Azure()
    service.schedule("A-1", "Preempt")
    with service.serving(), watching(*azure(service, Reported())) as notices:
        next_of(notices).on_saved()
    assert service.started == [] and notices.findings == []


def test_azure_a_pod_acknowledges_nothing() -> None:
    """It does not know the other pods of its VM."""
    service = Azure()
    service.schedule("A-1", "Preempt")
    with service.serving():
        environ = {"CRCLI_AZURE_METADATA_ENDPOINT": service.url, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        with watching(AzureEvents(Surroundings(None, environ), EVERY_S)) as notices:
            next_of(notices).on_saved()
    assert service.started == []


@pytest.mark.parametrize("others", [["other"], [], None, "vm-1x"])
def test_azure_events_of_others_are_none_of_ours(others: Any) -> None:
    """An availability set's events come to all of its VMs."""
    service = Azure()
    service.schedule("A", "Preempt", Resources=others)
    service.schedule("B", "Surprise")
    service.events += [None, 7, {"EventType": "Preempt"}]
    with service.serving(), watching(*azure(service, Reported())) as notices:
        service.wait_for(lambda request: "scheduledevents" in request.path, 4)
        assert notices.get(0) is None


@pytest.mark.parametrize(
    "event",
    [{"Resources": ["other", "VM-1"]}, {"EventStatus": "Started", "NotBefore": ""}],
    ids=["shared", "begun"],
)
def test_azure_what_is_not_ours_alone_is_told_and_not_acknowledged(event: dict[str, Any]) -> None:
    """An event of several VMs is not started for all of them by one; one that has begun needs no start."""
    service = Azure()
    service.schedule("A", "Reboot", **event)
    with service.serving(), watching(*azure(service, Reported())) as notices:
        notice = next_of(notices)
        notice.on_saved()
    assert notice.urgency is Urgency.LEAVE
    assert service.started == []


# --- asking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["", "https://127.0.0.1", "127.0.0.1:80", "http://", "http://x:port", "ftp://x"]
)
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    """A variable that does not hold a URL is named."""
    with pytest.raises(UsageError, match="AN_ENDPOINT must be an http"):
        Metadata(endpoint, "AN_ENDPOINT")


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment would send the question, and a token, out of this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    service = Azure()
    with service.serving():
        assert Metadata(service.url).ask("/metadata/x").status == 400


def test_an_endpoint_may_have_a_prefix() -> None:
    """A proxy may serve the metadata below a path of its own."""
    service = Azure()
    with service.serving():
        Metadata(f"{service.url}/a/b/").ask("/metadata/x")
    assert service.asked[0].path == "/a/b/metadata/x"


def test_an_answer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that comes byte by byte does not hold the source for ever."""
    monkeypatch.setattr("crcli.notice.metadata.ANSWER_S", 0.3)

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            try:
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.01)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        with pytest.raises(ServiceSilent, match="too slow"):
            Metadata(f"http://127.0.0.1:{listening.getsockname()[1]}").ask("/")
        thread.join(ENOUGH_S)


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test speaks to anything but loopback, or leaves a lock on this machine."""
    monkeypatch.setattr(azure_module, "LOCKS", str(tmp_path / "run"))
    real = socket.create_connection

    def only_loopback(address: tuple[str, int], *arguments: Any, **named: Any) -> socket.socket:
        assert address[0] in ("127.0.0.1", "localhost"), address
        return real(address, *arguments, **named)

    monkeypatch.setattr(socket, "create_connection", only_loopback)
    yield


def test_the_usual_address_is_link_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an override each cloud's service is asked at an address that no router forwards."""
    from ipaddress import ip_address

    asked: list[str] = []

    def note(address: tuple[str, int], *arguments: Any, **named: Any) -> socket.socket:
        asked.append(address[0])
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", note)
    with Notices(["aws", "gcp", "azure"], environ={}) as notices:
        assert notices.get(0.1) is None
    assert len(asked) >= 4 and all(ip_address(address).is_link_local for address in asked)
