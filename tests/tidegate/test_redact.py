"""Secrets are hidden wherever they stand, and nothing else is."""

from __future__ import annotations

import json
import shlex
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.config import ConfigError
from tidegate.redact import is_secret_name, redact, redact_command, redact_values
from tidegate.train.job import Job

SECRET = st.text(string.ascii_uppercase, min_size=8, max_size=20)
"""Of letters that do not occur in the text around it."""
SPECIAL = st.text(string.punctuation.replace("/", ""), max_size=4)
TEXT = st.text(string.ascii_lowercase + string.digits + " .,;:()[]{}'\"\n", max_size=20)
NAMES = st.sampled_from(
    [
        "password",
        "track.password",
        "HF_TOKEN",
        "hub-token",
        "secret",
        "aws_secret_access_key",
        "X-Amz-Signature",
        "apiKey",
    ]
)
SCHEMES = st.sampled_from(["http", "https", "postgresql", "mysql+pymysql", "s3", "ftp", "ray"])
fuzzed = settings(derandomize=True, database=None, deadline=None, max_examples=300)


@st.composite
def places(draw: st.DrawFn) -> tuple[str, str]:
    """A secret, and a string without spaces around it that holds it in one of the places where secrets stand."""
    secret = draw(SECRET)
    in_uri = draw(SPECIAL) + secret + draw(SPECIAL)
    escaped = quote(in_uri, safe="")
    name, scheme = draw(NAMES), draw(SCHEMES)
    place = draw(
        st.sampled_from(
            [
                f"{scheme}://me:{in_uri}@host:5000/path",
                f"{scheme}://:{escaped}@host",
                f"https://{secret}@host/path",
                f"https://host/path?a=b&{name}={escaped}&c=d",
                f"{name}={secret}",
                f"{name}={in_uri.replace('&', '')}",
                json.dumps({name: in_uri, "x": 1}, separators=(",", ":")),
                f"Bearer {secret}",
                f"Authorization: Basic {secret}",
                f"{name.rpartition('.')[2]}: {secret}",
            ]
        )
    )
    return secret, place


@fuzzed
@given(places(), TEXT, TEXT)
def test_no_secret_is_left_in_any_text(found: tuple[str, str], before: str, after: str) -> None:
    secret, place = found
    shown = redact(f"{before} {place} {after}")
    assert secret not in shown
    assert "***" in shown
    assert redact(shown) == shown


@fuzzed
@given(places(), TEXT, NAMES)
def test_no_secret_is_left_in_any_document_or_command(found: tuple[str, str], text: str, name: str) -> None:
    secret, place = found
    document = {
        "a": [1, {"uri": place, name: [f"{text} {secret}"]}, None],
        "text": text.replace(":", "").replace("=", ""),
    }
    shown = redact_values(document)
    assert secret not in json.dumps(shown)
    assert shown["text"] == document["text"]
    assert shown["a"][0] == 1
    assert redact_values(shown) == shown
    command = redact_command(
        ["tidegate", "train", "job.yaml", "--set", f"{name}={text} {secret}", f"--x={place}", place]
    )
    assert secret not in shlex.join(command)
    assert command[:4] == ("tidegate", "train", "job.yaml", "--set")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://127.0.0.1:5000/#/experiments/1/runs/ab@c",
        "sqlite:////home/me@work/.tidegate/mlflow/mlflow.db",
        "s3://bucket/folder@2/step_00000100-3f9a1c2e",
        "abfs://container@account.dfs.core.windows.net/run",
        "ssh://git@host/repository",
        "ray://head:10001",
        "train.tokens=6144 data.tokenizer.path=tokenizer.json per_token=3 flops_per_token: 12",
        "14.2 MFLOP a token; 12 steps of 512 tokens",
        "job.yaml: track.password: unknown field",
        "basic training, design=3, keys=4, key=value",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    assert redact_command(shlex.split(text)) == tuple(shlex.split(text))


def test_what_is_left_is_of_use() -> None:
    assert redact("https://a:b@c/d http://e/f:g@h") == "https://a:***@c/d http://e/f:g@h"
    assert redact("{'password': 'a b', 'x': 1}") == "{'password': '***', 'x': 1}"
    assert redact("s3://b/k?X-Amz-Signature=0f&v=1") == "s3://b/k?X-Amz-Signature=***&v=1"


def test_no_field_of_a_job_has_the_name_of_a_secret() -> None:
    def names(schema: Any) -> Iterator[str]:
        if isinstance(schema, dict):
            yield from schema.get("properties", {})
        for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            yield from names(part)

    found = set(names(Job.model_json_schema()))
    assert {"tokens", "tokenizer", "tracking_uri"} <= found
    assert not list(filter(is_secret_name, found)), "redact.py would hide its value"


def test_an_error_hides_what_it_was_told() -> None:
    assert str(ConfigError("--address ray://me:hunter2@head: no answer")) == "--address ray://me:***@head: no answer"
