"""Secrets by name, in URLs and in messages; what is no secret stays; a masked tree says what it lacks."""

from __future__ import annotations

import pytest

from madpo.trainer.config.effects import keys
from madpo.trainer.config.strict_yaml import masked_override
from madpo.trainer.errors import UserError
from madpo.trainer.masking import masked, masked_keys, masked_text, names_secret, secrets_in

SECRET = "s3cr3t-5entinel"
TREE = {
    "url": f"https://user:{SECRET}@host:8000/v1?api_key={SECRET}&x={SECRET}#t={SECRET}",
    "parameters": {"apiKey": SECRET, "X-Auth-Token": SECRET, "temperature": 0, "max_tokens": 5},
    "extra_headers": {"X-Tenant": SECRET, "list": [SECRET, {"deep": SECRET}]},
    "wandb": {"api_key": None, "password": 12345, "token": True},
    "pairs": [{"client_secret": SECRET}],
}


def test_every_secret_of_a_tree_is_masked_and_nothing_else():
    shown = masked(TREE)
    assert SECRET not in repr(shown) and "12345" not in repr(shown)
    assert shown["url"] == "https://***@host:8000/v1?api_key=***&x=***#t=***"
    assert shown["parameters"] == {
        "apiKey": "***",
        "X-Auth-Token": "***",
        "temperature": 0,
        "max_tokens": 5,
    }
    assert shown["wandb"] == {"api_key": None, "password": "***", "token": True}
    assert masked(shown) == shown
    assert set(secrets_in(TREE)) == {f"user:{SECRET}", SECRET, "12345"}
    assert list(masked_keys(TREE)) == []
    assert sorted(set(masked_keys(shown))) == [
        *("extra_headers.X-Tenant", "extra_headers.list", "extra_headers.list.deep", "pairs.client_secret"),
        *("parameters.X-Auth-Token", "parameters.apiKey", "url", "wandb.password"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "APIKey",
        "x-api-key",
        "HF_TOKEN",
        "authorization",
        "Password",
        "auth_token",
        "client_secret",
        "headers",
        "key",
    ],
)
def test_names_of_secrets(name):
    assert names_secret(name)


def test_names_that_are_none():
    ours = {name.rpartition(".")[2] for name in keys()}
    others = "max_tokens pad_token eos_token num_key_value_heads api_key_env token_type key_path tokens 7"
    assert [name for name in (*ours, *others.split()) if names_secret(name)] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"got 'user:{SECRET}@host/v1'", "got '***@host/v1'"),
        (f"override 'a.b={{api_key: {SECRET}, t: 1'", "override 'a.b={api_key: ***, t: 1'"),
        (f"{{'t': 0, 'api_key': '{SECRET}'}}", "{'t': 0, 'api_key': ***}"),
        (f'{{"Authorization": "Bearer {SECRET}"}}', '{"Authorization": ***}'),
        (f"a.b.api_key={SECRET}: no", "a.b.api_key=*** no"),
        (f"sent Bearer {SECRET}", "sent Bearer ***"),
        ("no variable hf_abcdefghij0123456789", "no variable ***"),
    ],
)
def test_messages(text, shown):
    assert masked_text(text) == str(UserError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "override 'x': write section.key=value, as in optim.lr=2e-6",
        "endpoint.api_key: unknown key, did you mean api_key_env?",
        "data/train.jsonl:3: messages[1]: expected an object, got {'role': 'user'}",
        "https://huggingface.co/meta-llama/Llama-3.2-1B cannot be reached",
        "/runs/sk-learn/step:12 with bos_token=<s>",
    ],
)
def test_messages_without_a_secret_stay(text):
    assert masked_text(text) == text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("optim.lr=1e-6", "optim.lr=1e-6"),
        ("a.url=http://u:p@h/v1", 'a.url="http://***@h/v1"'),
        ("a.parameters={api_key: abc, n: 1}", 'a.parameters={"api_key": "***", "n": 1}'),
        ("a.headers.X-Tenant=abc", 'a.headers.X-Tenant="***"'),
        ("a.password={broken", "a.password=***"),
    ],
)
def test_overrides(given, shown):
    assert masked_override(given) == shown
