"""A judge behind an OpenAI-compatible server, asked for scores or for the better of two completions."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BufferedReader, RawIOBase
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from madpo.trainer.config.generate import EndpointConfig
from madpo.trainer.errors import UserError
from madpo.trainer.formats.numbers import LARGEST
from madpo.trainer.formats.text_groups import Text
from madpo.trainer.masking import MASK, masked_keys, secrets_in

SCORE_QUESTION = """\
Rate the response to the prompt below for helpfulness, correctness and style, from 1 (useless) to 10 \
(could not be better). Answer with the number alone.

[Prompt]
{prompt}

[Response]
{completion}
"""
PAIRWISE_QUESTION = """\
Which of two responses to the prompt below is better? Judge helpfulness, correctness and style; length and \
order must not matter. Answer with A, B or tie, and nothing else.

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}
"""
LONGEST_WAIT = 60.0  # seconds between two attempts
MOST_BYTES = 10_000_000
"""The largest reply that is read."""

Answer = TypeVar("Answer")


class _Patient(RawIOBase):
    """What a server sends, until the time for the whole reply is over: a socket's own timeout is one of each
    read, and a server that sends a byte now and then would never meet it."""

    def __init__(self, sock: socket.socket, raw: RawIOBase, end: float) -> None:
        self._socket, self._raw, self._end = sock, raw, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if (left := self._end - time.monotonic()) <= 0:
            raise TimeoutError("the reply did not end in time")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Connection(HTTPConnection):
    """A connection whose timeout is one of the whole reply."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        end = time.monotonic() + (self.timeout or 0.0)

        def reply(sock: socket.socket, *args: Any, **options: Any) -> HTTPResponse:
            response: Any = HTTPResponse(sock, *args, **options)
            response.fp = BufferedReader(_Patient(sock, response.fp.detach(), end))
            return response

        self.response_class: Any = reply


class _SecureConnection(_Connection, HTTPSConnection):
    """Such a connection over TLS."""


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _NoRedirect(HTTPRedirectHandler):
    """Refuses redirects, which would take the key to another server."""

    def redirect_request(self, *_args: Any, **_options: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """A judge that asks the server of the section `generate.judge.endpoint`."""

    settings: EndpointConfig

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]
    ) -> list[list[float | None]]:
        """Scores in the shape of `completions`; None where no attempt gave a readable reply.

        Raises UserError for a server that refuses, or that fails in all attempts.
        """
        prompt_texts = [_as_text(prompt) for prompt in prompts]
        texts = [[_as_text(completion) for completion in of_prompt] for of_prompt in completions]
        if self.settings.mode == "score":
            return self._rate(prompt_texts, texts)
        return self._compare(prompt_texts, texts)

    def _rate(self, prompts: list[str], completions: list[list[str]]) -> list[list[float | None]]:
        template = self.settings.template or SCORE_QUESTION
        questions = [
            fill(template, prompt=prompt, completion=completion)
            for prompt, of_prompt in zip(prompts, completions, strict=True)
            for completion in of_prompt
        ]
        answers = iter(self._ask_all(questions, read_number))
        return [[next(answers) for _ in of_prompt] for of_prompt in completions]

    def _compare(self, prompts: list[str], completions: list[list[str]]) -> list[list[float | None]]:
        """For each completion, the share of the prompt's other completions that it beats. A tie is half a
        win, and so is a verdict that changes with the order of the two."""
        template = self.settings.template or PAIRWISE_QUESTION
        questions = [
            fill(template, prompt=prompt, first=of_prompt[i], second=of_prompt[j])
            for prompt, of_prompt in zip(prompts, completions, strict=True)
            for i, j in itertools.permutations(range(len(of_prompt)), 2)
        ]
        answers = iter(self._ask_all(questions, read_verdict))
        scores = []
        for of_prompt in completions:
            orders = itertools.permutations(range(len(of_prompt)), 2)
            scores.append(win_rates(len(of_prompt), {order: next(answers) for order in orders}))
        return scores

    def _ask_all(self, questions: list[str], read: Callable[[str], Answer | None]) -> list[Answer | None]:
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = [pool.submit(self._ask, question, read) for question in questions]
            try:
                return [future.result() for future in futures]
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, question: str, read: Callable[[str], Answer | None]) -> Answer | None:
        """One answer, with retries; None if the server replied and no reply could be read."""
        problem = ""
        for attempt in range(self.settings.max_retries + 1):
            if attempt:
                time.sleep(min(self.settings.retry_wait * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                reply = self._post(question)
            except _Transient as error:
                problem = str(error)
                continue
            problem = ""
            if (answer := read(reply)) is not None:
                return answer
        if problem:
            raise UserError(
                f"generate.judge.endpoint: {self.settings.url} failed {self.settings.max_retries + 1} times, "
                f"last with: {problem}; what is judged so far is kept, run the command again to go on"
            )
        return None

    def _post(self, question: str) -> str:
        """The text of one reply. Raises _Transient for failures worth a retry, UserError for others."""
        settings, key = self.settings, api_key(self.settings)
        body = {
            **settings.parameters,
            "model": settings.model,
            "messages": [{"role": "user", "content": question}],
        }
        address, authorization = _address(settings.url, key)
        headers = {"Content-Type": "application/json", **authorization}
        request = Request(address, json.dumps(body).encode(), headers, method="POST")
        try:
            opener = build_opener(_Http, _Https, _NoRedirect)
            with opener.open(request, timeout=settings.timeout) as response:
                raw = response.read(MOST_BYTES + 1)
        except HTTPError as error:
            said = self._without_secrets(f"{error.code} {error.reason}: {_said(error)}", key)
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Transient(said) from None
            raise UserError(f"generate.judge.endpoint: {settings.url} answers {said}") from None
        except (OSError, HTTPException) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from None
        if len(raw) > MOST_BYTES:
            raise _Transient(f"a reply of more than {MOST_BYTES:,} bytes")
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            said = self._without_secrets(_on_one_line(raw[:1000].decode("utf-8", "replace")), key)
            raise _Transient(f"a reply that is no chat completion: {said[:200]!r}") from None
        return content if isinstance(content, str) else ""

    def _without_secrets(self, said: str, key: str | None) -> str:
        """What a server said, which may repeat what it was sent."""
        for secret in sorted({key or "", *secrets_in(self.settings.model_dump())}, key=len, reverse=True):
            said = said.replace(secret, MASK) if len(secret) > 3 else said
        return said


class _Transient(Exception):
    """A failure that may be over at the next attempt."""


def _address(url: str, key: str | None) -> tuple[str, dict[str, str]]:
    """The address that questions go to, and the header that says who asks: with the key, or else with the
    user and the password in the URL."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/") + "/chat/completions"
    address = urlunsplit(parts._replace(netloc=host, path=path, fragment=""))
    if key:
        return address, {"Authorization": f"Bearer {key}"}
    login = base64.b64encode(unquote(user).encode()).decode()
    return address, {"Authorization": f"Basic {login}"} if user else {}


def _said(error: HTTPError) -> str:
    """The beginning of a refusal, on one line."""
    try:
        with error:
            return _on_one_line(error.read(500).decode("utf-8", "replace"))
    except (OSError, HTTPException):  # it did not end in time
        return ""


def _on_one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def api_key(settings: EndpointConfig) -> str | None:
    """The key, if one is configured. Raises UserError if its environment variable is not set, and for a
    secret that was masked when the config was written."""
    if lost := next(masked_keys(settings.model_dump()), None):
        raise UserError(
            f"generate.judge.endpoint.{lost}: was masked when this config was written; give it again, or put "
            "the key into an environment variable and name that in api_key_env"
        )
    if settings.api_key_env is None:
        return None
    if not (key := os.environ.get(settings.api_key_env)):
        raise UserError(
            f"generate.judge.endpoint.api_key_env: the environment variable {settings.api_key_env} is not set"
        )
    return key


def fill(template: str, **values: str) -> str:
    """The template with its fields filled in. Other braces, and braces in values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def read_number(reply: str) -> float | None:
    """The score in a reply: `score` of a JSON object, or the only number in the text; else None, as for a
    number that is not finite, or too large for float32."""
    value = _field(reply, "score")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value)
    numbers = re.findall(r"[-+]?\d+(?:\.\d+)?", reply)
    return _finite(float(numbers[0])) if len(numbers) == 1 else None


def _finite(number: float) -> float | None:
    return float(number) if abs(number) <= LARGEST else None


def read_verdict(reply: str) -> float | None:
    """The first response's part of a win: 1 for A, 0 for B, 1/2 for a tie. The verdict is `winner` of a JSON
    object, or the only word of the reply; anything else gives None."""
    value = _field(reply, "winner")
    word = re.fullmatch(r"\W*(A|B|tie)\W*", value if isinstance(value, str) else reply, re.IGNORECASE)
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[word[1].lower()] if word else None


def win_rates(count: int, verdicts: dict[tuple[int, int], float | None]) -> list[float | None]:
    """(count,) the mean win of each against the others, from verdicts on (first, second) in both orders.

    Two orders that disagree make a tie. A comparison without a verdict in one of them does not count.
    """
    wins: list[list[float]] = [[] for _ in range(count)]
    for (first, second), verdict in verdicts.items():
        swapped = verdicts[second, first]
        if verdict is not None and swapped is not None:
            wins[first].append(verdict if verdict == 1 - swapped else 0.5)
    return [sum(each) / len(each) if each else None for each in wins]


def _field(reply: str, name: str) -> Any:
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    return value.get(name) if isinstance(value, dict) else None


def _as_text(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)
