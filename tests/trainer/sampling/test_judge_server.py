"""A judge behind HTTP, against a real server in this process: answers, both orders, failures, the key."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from chat_server import Server, chat_server
from patience import patient
from pydantic import ValidationError

from madpo.trainer.config.generate import EndpointConfig, JudgeConfig
from madpo.trainer.sampling import judge_server
from madpo.trainer.sampling.judge_server import Endpoint, fill, read_number, read_verdict, win_rates
from madpo.trainer.sampling.judges import check_judge


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with chat_server() as server:
        yield server


def endpoint(server: Server, **settings: Any) -> Endpoint:
    defaults = {"url": server.url, "model": "judge-1", "retry_wait": 0.01, "max_retries": 2}
    return Endpoint(EndpointConfig(**{**defaults, **settings}))


def test_scores_come_back_in_the_shape_of_the_completions(server):
    server.answer = lambda question, before: question.partition("=>")[2]
    judge = endpoint(
        server, template="{prompt} {x} => {completion}", parameters={"temperature": 0.5, "seed": 1}
    )
    conversation = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]
    answers = [[{"role": "assistant", "content": "7.5"}]]
    scores = judge(["p {completion}", conversation], [["1", " 2", "-3"], answers])
    assert scores == [[1.0, 2.0, -3.0], [7.5]]
    assert set(server.questions) == {
        "p {completion} {x} => 1",  # what stands in a prompt is not filled in
        "p {completion} {x} =>  2",
        "p {completion} {x} => -3",
        "user: hi\n\nuser: you {x} => assistant: 7.5",
    }
    request = server.requests[0]
    assert (request["model"], request["temperature"], request["seed"]) == ("judge-1", 0.5, 1)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "failure", [(500, "oops"), (429, "slow down"), (200, "{broken"), (200, '{"choices": []}'), "no number"]
)
def test_a_failure_that_passes_is_tried_again(server, failure):
    server.answer = lambda question, before: failure if before < 2 else "4"
    assert endpoint(server)(["p"], [["a"]]) == [[4.0]]
    assert len(server.questions) == 3


def test_a_server_that_keeps_failing_is_an_error(server):
    server.answer = lambda question, before: (503, "down for good") if "bad" in question else "4"
    with pytest.raises(ValueError, match=r"failed 3 times, last with: 503 .*: down for good; what is judged"):
        endpoint(server)(["p"], [["good", "bad"]])


def test_a_server_that_is_not_there_is_an_error(server):
    with pytest.raises(ValueError, match=r"failed 2 times, last with: .*refused"):
        endpoint(server, url="http://127.0.0.1:9/v1", max_retries=1)(["p"], [["a"]])


def test_a_slow_server_is_not_waited_for(server):
    gate = threading.Event()
    server.answer = lambda question, before: "4" if before else str(gate.wait(5))
    assert endpoint(server, timeout=0.3)(["p"], [["a"]]) == [[4.0]]
    gate.set()


def test_a_reply_that_cannot_be_read_is_no_score(server):
    server.answer = lambda question, before: "I would rather not" if "bad" in question else "4"
    assert endpoint(server)(["p"], [["good", "bad"]]) == [[4.0, None]]


def test_a_refusal_ends_at_once_and_does_not_tell_the_key(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    server.answer = lambda question, before: (401, "Incorrect key sk-very-secret")
    with pytest.raises(ValueError, match=r"answers 401 .*: Incorrect key \*\*\*") as caught:
        endpoint(server, api_key_env="JUDGE_KEY")(["p"], [["a"]])
    assert len(server.questions) == 1
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "very-secret" not in "".join(traceback.format_exception(caught.value))


def test_secrets_in_url_and_parameters_reach_the_server_and_no_message(server):
    server.answer = lambda question, before: (401, "who is sk-very-secret, pa/ss?\n\x1b[1mno")
    url = server.url.replace("://", "://user:pa%2Fss@") + "?api-version=sk-very-secret"
    judge = endpoint(server, url=url, parameters={"api_key": "sk-very-secret"})
    with pytest.raises(ValueError, match=r"answers 401 ") as caught:
        judge(["p"], [["a"]])
    assert server.headers[0]["Authorization"] == "Basic dXNlcjpwYS9zcw=="
    assert server.paths == ["/v1/chat/completions?api-version=sk-very-secret"]
    assert server.requests[0]["api_key"] == "sk-very-secret"
    text = str(caught.value)
    assert "very-secret" not in text and "pa%2Fss" not in text and text.isprintable()


def test_a_page_that_repeats_the_key_is_no_reply_and_does_not_tell_it(server, monkeypatch):
    """As the debugging page of a proxy does, with status 200."""
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    server.answer = lambda question, before: (200, "<html>Authorization: Bearer sk-very-secret\n\x1b[1m")
    with pytest.raises(
        ValueError, match=r"no chat completion: '<html>Authorization: Bearer \*\*\*"
    ) as caught:
        endpoint(server, api_key_env="JUDGE_KEY")(["p"], [["a"]])
    assert "very-secret" not in "".join(traceback.format_exception(caught.value))


def test_a_masked_key_is_asked_for_before_the_work():
    judge = JudgeConfig(endpoint=EndpointConfig(url="http://x/v1", model="m", parameters={"api_key": "***"}))
    with pytest.raises(ValueError, match=r"endpoint.parameters.api_key: was masked .*; give it again"):
        check_judge(judge)


def test_a_key_in_place_of_the_name_of_its_variable_is_not_repeated():
    with pytest.raises(ValidationError, match="api_key_env: names an environment variable") as caught:
        EndpointConfig(url="http://x/v1", model="m", api_key_env="sk-very-secret")
    assert "very-secret" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 401 No\r\n\r\n"])
def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(before):
    """Each read is in time, and the reply never ends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(before)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        judge = Endpoint(EndpointConfig(url=url, model="m", timeout=0.2, max_retries=0))
        with pytest.raises(ValueError, match=r"TimeoutError: (timed out|the reply did)|answers 401 No"):
            judge(["p"], [["a"]])
        thread.join(patient(5))
        assert not thread.is_alive()


def test_a_reply_without_an_end_is_not_read(server, monkeypatch):
    monkeypatch.setattr(judge_server, "MOST_BYTES", 1000)
    server.answer = lambda question, before: "x" * 1000
    with pytest.raises(ValueError, match=r"last with: a reply of more than 1,000 bytes"):
        endpoint(server, max_retries=0)(["p"], [["a"]])


def test_a_reply_that_is_nested_without_an_end_is_no_completion(server):
    server.answer = lambda question, before: (200, "[" * 100_000)
    with pytest.raises(ValueError, match=r"a reply that is no chat completion"):
        endpoint(server, max_retries=0)(["p"], [["a"]])


def test_the_key_follows_no_redirect(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    server.answer = lambda question, before: (302, server.url + "/elsewhere")
    with pytest.raises(ValueError, match="answers 302"):
        endpoint(server, api_key_env="JUDGE_KEY")(["p"], [["a"]])
    assert len(server.questions) == 1


def test_a_key_that_is_not_set_is_seen_before_the_work(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = JudgeConfig(endpoint=EndpointConfig(url="http://x/v1", model="m", api_key_env="JUDGE_KEY"))
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY is not set"):
        check_judge(judge)


def test_two_are_compared_in_both_orders(server):
    """By length: the longer wins. A judge that takes whichever comes first has no preference."""

    def longer(question: str, before: int) -> str:
        first, second = question.split("|")[1:]
        return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "[[B]]"

    server.answer = longer
    judge = endpoint(server, mode="pairwise", template="{prompt}|{first}|{second}")
    assert judge(["p", "q"], [["aaa", "b", "cc"], ["d", "e"]]) == [[1.0, 0.0, 0.5], [0.5, 0.5]]
    assert {"p|aaa|b", "p|b|aaa"} < set(server.questions) and len(server.questions) == 6 + 2
    server.answer = lambda question, before: "A"
    assert judge(["p"], [["aaa", "b"]]) == [[0.5, 0.5]]
    server.answer = lambda question, before: "B" if question.startswith("p|b") else "A"
    assert judge(["p"], [["aaa", "b"]]) == [[1.0, 0.0]]


def test_questions_are_asked_at_once(server):
    """Four at a time meet at a barrier that only four can pass."""
    meeting = threading.Barrier(4, timeout=patient(10))
    server.answer = lambda question, before: str(meeting.wait() * 0 + 1)
    assert endpoint(server, concurrency=4)(["p"] * 2, [["a", "b"], ["c", "d"]]) == [[1.0, 1.0]] * 2


def test_what_is_read_as_a_number():
    assert [read_number(x) for x in ("7", " 8.5\n", "Score: -2", '{"score": 3}', '{"score": "3"}')] == [
        *(7.0, 8.5, -2.0, 3.0),
        3.0,
    ]
    not_finite = ('{"score": NaN}', '{"score": 1e999}', '{"score": -Infinity}', "9" * 400)
    assert [read_number(x) for x in (*not_finite, f'{{"score": {"9" * 400}}}', "[" * 9999)] == [None] * 6
    assert [read_number(x) for x in ("", "none", "7/10", "between 3 and 4", '{"score": true}')] == [None] * 5


def test_what_is_read_as_a_verdict():
    assert [read_verdict(x) for x in ("A", "[[b]]", "**Tie**.", '{"winner": "A"}')] == [1.0, 0.0, 0.5, 1.0]
    assert [read_verdict(x) for x in ("", "A or B", "Neither", '{"winner": 1}')] == [None] * 4


def test_win_rates_by_hand():
    verdicts = {(0, 1): 1.0, (1, 0): 0.0, (0, 2): 0.5, (2, 0): 0.5, (1, 2): 1.0, (2, 1): None}
    assert win_rates(3, verdicts) == [0.75, 0.0, 0.5]
    assert win_rates(2, {(0, 1): None, (1, 0): 0.0}) == [None, None]


def test_a_template_is_filled_once():
    assert fill("{a} {b} {c} {}", a="{b}", b="x\\1") == "{b} x\\1 {c} {}"
