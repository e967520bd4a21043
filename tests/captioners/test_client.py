"""The client against a real server on this machine, which also misbehaves."""

import base64
import io
import json
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import Handler, Served, fails, raw, says

from texttok_cli.captioners import client
from texttok_cli.captioners.base import CaptionFailed
from texttok_cli.captioners.client import KEY_VARIABLE, ChatClient
from texttok_cli.captioners.prompts import load_prompt
from texttok_cli.errors import BackendError

Run = Callable[..., Any]
Draw = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("fast")
KEY = "sk-very-secret"


def ask(endpoint: Served, **options: float) -> str:
    return ChatClient(endpoint.url, "m", **options).complete("hello", max_tokens=7).text


def test_what_is_sent(endpoint: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert ask(endpoint) == "a red square"
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {"model": "m", "max_tokens": 7, "messages": [{"role": "user", "content": "hello"}]}


def test_no_key_is_sent_that_was_not_meant_for_it(endpoint: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(endpoint)
    assert "Authorization" not in endpoint.requests[0]["headers"]


@pytest.mark.parametrize(
    "misbehaviour",
    [
        fails(429),
        fails(500, "oops"),
        fails(503),
        raw(b'{"choices": [{"mess'),
        raw(b'{"choices": []}'),
        raw(b"[1, 2]"),
        raw(b'{"choices": [{"message"', length=500),  # the connection is cut within the body
        lambda handler, number: handler.connection.shutdown(socket.SHUT_RDWR),  # or before the answer
        says("  "),
    ],
    ids=["429", "500", "503", "broken JSON", "no choice", "no object", "cut body", "cut connection", "empty"],
)
def test_what_may_pass_is_tried_again(misbehaviour: object, endpoint: Served) -> None:
    endpoint.plan = [misbehaviour, misbehaviour, says("at last")]  # type: ignore[list-item]
    assert ask(endpoint, retries=2) == "at last"
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("misbehaviour", "said"),
    [
        (fails(500, "oops"), "HTTP 500: oops (3 tries)"),
        (raw(b"{"), "an answer that is not a chat completion, or was cut short"),
        (says(""), "an empty answer"),
    ],
)
def test_what_does_not_pass_is_a_failure_of_this_image(misbehaviour: object, said: str, endpoint: Served) -> None:
    endpoint.plan = [misbehaviour]  # type: ignore[list-item]
    with pytest.raises(CaptionFailed) as err:
        ask(endpoint, retries=2)
    assert said in str(err.value) and len(endpoint.requests) == 3


def test_a_slow_answer_ends_at_the_timeout(endpoint: Served) -> None:
    endpoint.plan = [lambda handler, number: time.sleep(3), says("quick")]
    begin = time.monotonic()
    assert ask(endpoint, timeout=0.2) == "quick"
    assert time.monotonic() - begin < 2


def trickles(status: int, begin: bytes) -> Callable[[Handler, int], None]:
    """Every further byte comes within the socket's timeout; the whole answer does not."""

    def answer(handler: Handler, number: int) -> None:
        handler.send(status, begin, length=1000)
        for _ in range(40):
            handler.wfile.write(b"!")
            handler.wfile.flush()
            time.sleep(0.1)

    return answer


def test_an_answer_that_trickles_ends_at_the_timeout_too(endpoint: Served) -> None:
    endpoint.plan = [trickles(200, b""), says("quick")]
    begin = time.monotonic()
    assert ask(endpoint, timeout=0.3) == "quick"
    assert time.monotonic() - begin < 2


def test_what_an_error_says_ends_at_the_timeout_too(endpoint: Served) -> None:
    endpoint.plan = [trickles(400, b"no")]
    begin = time.monotonic()
    with pytest.raises(CaptionFailed, match="HTTP 400: no!"):
        ask(endpoint, timeout=0.3)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"Retry-After": "1"}, 1),
        (503, {"Retry-After": "1"}, 1),
        (429, {"retry-after-ms": "600"}, 0.6),
        (429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "700ms"}, 0.7),
    ],
)
def test_what_the_endpoint_asks_for_is_waited(status: int, headers: dict[str, str], wait: float, endpoint: Served) -> None:
    endpoint.plan = [fails(status, headers=headers), says("now")]
    begin = time.monotonic()
    assert ask(endpoint) == "now"
    assert wait <= time.monotonic() - begin < wait + 1.5


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "0"},
        {"Retry-After": formatdate(0, usegmt=True)},
        {"retry-after-ms": "5"},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "0s"},
    ],
)
def test_who_asks_for_less_than_the_back_off_gets_the_back_off(
    headers: dict[str, str], endpoint: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.4)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.4)
    endpoint.plan = [fails(429, headers=headers), says("now")]
    begin = time.monotonic()
    assert ask(endpoint) == "now"
    assert 0.2 <= time.monotonic() - begin < 2


def test_a_date_to_wait_for(endpoint: Served) -> None:
    endpoint.plan = [lambda handler, number: handler.send(429, b"", {"Retry-After": formatdate(time.time() + 2, usegmt=True)}), says("now")]
    begin = time.monotonic()
    assert ask(endpoint) == "now"
    assert 0.9 < time.monotonic() - begin < 4  # a date has whole seconds


def test_an_exhausted_limit_holds_the_next_request_back(endpoint: Served) -> None:
    used_up = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0.5s", "x-ratelimit-remaining-requests": "9"}
    endpoint.plan = [says("one", headers=used_up), says("two")]
    chat = ChatClient(endpoint.url, "m")
    begin = time.monotonic()
    assert [chat.complete("a", max_tokens=1).text, chat.complete("b", max_tokens=1).text] == ["one", "two"]
    assert 0.5 <= time.monotonic() - begin < 2


def test_a_wait_of_hours_ends_the_run(endpoint: Served) -> None:
    endpoint.plan = [fails(429, headers={"Retry-After": "7200"})]
    with pytest.raises(BackendError, match=r"asks us to wait 7,200 s; rerun the same command"):
        ask(endpoint)


@pytest.mark.parametrize(
    ("text", "seconds"), [("6m0s", 360), ("1h2m3.5s", 3723.5), ("120ms", 0.12), ("2m", 120), ("soon", None), ("", None)]
)
def test_durations(text: str, seconds: float | None) -> None:
    from email.message import Message

    headers = Message()
    headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-reset-requests"] = "0", text
    assert client._seconds_until_reset(headers) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("status", [401, 402, 403, 404, 302])
def test_what_would_fail_for_every_image_ends_the_run_and_names_no_key(
    status: int, endpoint: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    endpoint.plan = [fails(status, f"Incorrect API key provided: {KEY}\nsee the manual", {"Location": f"{endpoint.url}/elsewhere"})]
    with pytest.raises(BackendError) as err:
        ask(endpoint)
    assert KEY not in str(err.value) and "***" in str(err.value) and "\n" not in str(err.value)
    assert len(endpoint.requests) == 1  # nor was the redirection followed


def test_an_account_without_credit_ends_the_run_as_waiting_brings_none(endpoint: Served) -> None:
    said = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
    endpoint.plan = [fails(429, json.dumps({"error": said}))]
    with pytest.raises(BackendError, match=r"no credit is left \(HTTP 429: .*You exceeded your current quota"):
        ask(endpoint)
    assert len(endpoint.requests) == 1


def test_the_limit_of_tokens_is_sent_under_the_name_that_the_endpoint_knows(endpoint: Served) -> None:
    """OpenAI's reasoning models refuse the name that all others know; retries are not spent on it, and it is asked once."""
    other = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def strict(handler: Handler, number: int) -> None:
        known = "max_tokens" not in endpoint.requests[number]["body"]
        (says("a red square") if known else fails(400, json.dumps({"error": {"message": other}})))(handler, number)

    endpoint.plan = [strict]
    chat = ChatClient(endpoint.url, "m", retries=0)
    assert [chat.complete("hello", max_tokens=7).text for _ in range(2)] == ["a red square"] * 2
    first, *others = (request["body"] for request in endpoint.requests)
    assert first["max_tokens"] == 7
    assert [(body.get("max_tokens"), body["max_completion_tokens"]) for body in others] == [(None, 7)] * 2
    endpoint.plan = [fails(400, other)]
    with pytest.raises(CaptionFailed, match="HTTP 400"):
        chat.complete("hello", max_tokens=7)
    assert len(endpoint.requests) == 4


def test_one_refused_image_is_not_asked_for_again(endpoint: Served) -> None:
    endpoint.plan = [fails(400, "image too strange")]
    with pytest.raises(CaptionFailed, match="HTTP 400: image too strange"):
        ask(endpoint)
    endpoint.plan = [fails(400), says("", reason="length")]
    with pytest.raises(CaptionFailed, match="no answer within the token limit; raise --max-tokens"):
        ask(endpoint)
    endpoint.plan = [says("", reason="content_filter")]
    with pytest.raises(CaptionFailed, match="content filter"):
        ask(endpoint)
    assert len(endpoint.requests) == 3


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BackendError, match=r"no connection \(Connection refused\) \(2 tries\)"):
        ChatClient(f"http://127.0.0.1:{port}/v1", "m", retries=1).complete("a", max_tokens=1)


def test_thoughts_are_no_part_of_a_caption(endpoint: Served) -> None:
    """As served without a reasoning parser; some templates hold the opening mark, so that only the closing one is written."""
    endpoint.plan = [says(f"{begin}A square, red?\n</think>\n\na red square") for begin in ("<think>\n", "")] + [says("a <b> red square")]
    assert [ask(endpoint) for _ in range(3)] == ["a red square", "a red square", "a <b> red square"]
    for text in ("<think>\nA square", "A square, red?</think>\n"):
        endpoint.plan = [says(text, reason="length")]
        with pytest.raises(CaptionFailed, match="only thoughts within the token limit; raise --max-tokens"):
            ask(endpoint)


def test_huge_answers_are_not_read(endpoint: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1000)
    endpoint.plan = [raw(b" " * 200_000)]
    with pytest.raises(CaptionFailed, match="over 1,000 bytes"):
        ask(endpoint)


def test_parts_and_the_limit_of_tokens(endpoint: Served) -> None:
    endpoint.plan = [raw(b'{"choices": [{"message": {"content": [{"text": "a "}, {"text": "b"}]}, "finish_reason": "length"}]}')]
    written = ChatClient(endpoint.url, "m").complete("x", max_tokens=1)
    assert (written.text, written.complete) == ("a b", False)
    endpoint.plan = [raw(b'{"choices": [{"message": {"content": [{"text": null}, "x", {"text": ["y"]}, {"text": "b"}]}}]}')]
    assert ask(endpoint) == "b"


def test_half_a_character_is_a_failure_of_this_image(endpoint: Served) -> None:
    """In a captions.jsonl it would make the whole file unreadable."""
    endpoint.plan = [raw(b'{"choices": [{"message": {"content": "a \\ud83d"}}]}')]
    with pytest.raises(CaptionFailed, match="not Unicode text"):
        ask(endpoint)


@pytest.mark.parametrize("date", ["1 Jan 99999999999 00:00:00 GMT", "Mon, 01 Jan 2020 00:00:00 +99999999999999999999", "soon"])
def test_a_date_that_is_none_is_no_wait(date: str, endpoint: Served) -> None:
    endpoint.plan = [fails(503, headers={"Retry-After": date}), says("again")]
    assert ask(endpoint) == "again"


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://h/v1", "http://", "https://me:secret@h/v1", "http://h/v1?key=secret"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(BackendError, match="--endpoint") as err:
        ChatClient(address, "m")
    assert "secret" not in str(err.value)


def test_a_key_with_a_line_break_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\nX-Other: 1")
    with pytest.raises(BackendError) as err:
        ChatClient("http://h/v1", "m")
    assert KEY_VARIABLE in str(err.value) and KEY not in str(err.value)


def test_images_through_the_command(endpoint: Served, texttok: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images, several at a time, one of them refused: sent as a picture of theirs with the prompt, retried on the next run."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for i in range(6):
        draw(tmp_path / "photos" / f"{i}.png", seed=i, size=(2000, 1000) if i == 0 else (32, 32))
    endpoint.plan = [says("a picture of something"), fails(400, "no"), says("a picture, cut", reason="length")]
    out = tmp_path / "c.jsonl"
    args = ("caption", tmp_path / "photos", "--captioner", "endpoint", "--endpoint", endpoint.url, "--model", "some/model", "-o", out)
    run = texttok(*args, "--concurrency", 3, "--max-words", 25, "--json", "--quiet")
    summary = json.loads(run.out)
    assert run.code == 1 and (summary["captions"], summary["failed"], summary["cut"]) == (5, 1, 4)
    assert run.err.startswith("failed ") and "HTTP 400: no" in run.err and KEY not in run.err + run.out + out.read_text()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    prompt = load_prompt("caption", max_words=25)
    assert {(row["backend"], row["model"], row["prompt_sha256"]) for row in rows} == {("endpoint", "some/model", prompt.sha256)}
    sizes = []
    for request in endpoint.requests:
        text, image = request["body"]["messages"][0]["content"]
        assert text["text"] == prompt.text and request["body"]["max_tokens"] == 100
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sorted(sizes) == [(32, 32)] * 5 + [(1024, 512)]
    run = texttok(*args, "--max-words", 25, "--json", "--quiet")
    assert run.code == 0 and json.loads(run.out)["already_there"] == 5 and len(endpoint.requests) == 7
