"""Schemathesis on the OpenAPI document: valid and invalid data for every operation; the answers fit it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_tools import Running, serving

pytest.importorskip("schemathesis")

import hypothesis
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi_checks

EXAMPLES = 60
SEED = 20261
CHECKS = [
    not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    """Short answers, so that time goes into requests; room for every sample that a request may ask for."""
    with serving(engine={"max_model_len": 32, "speculation": "none"}, max_queued_requests=5000, max_n=4) as running:
        yield running


def _operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(path, method.upper()) for path, item in document["paths"].items() for method in item]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_openapi(tiny: Running, mode: GenerationMode) -> None:
    """No 5xx, only documented statuses, content types and bodies; invalid data is refused with a 4xx."""
    with tiny.client() as client:
        document = client.get("/openapi.json").json()
        operations = _operations(document)
        assert len(operations) >= 10
        schema = schemathesis.openapi.from_dict(document)
        for path, method, varies in operations:
            statuses = _try(schema[path][method], client, mode) if varies or mode is GenerationMode.POSITIVE else None
            assert statuses is None or sum(statuses.values()) >= (EXAMPLES if varies else 1), path
            if mode is GenerationMode.POSITIVE and path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
                assert statuses is not None
                assert statuses[200] >= 3, "too few valid requests were answered to say anything"
    tiny.wait_idle()


def test_every_reference_of_the_document_resolves(tiny: Running) -> None:
    """Generators of clients stumble over the first one that does not."""
    with tiny.client() as client:
        text = client.get("/openapi.json").text
    document = json.loads(text)
    references = set(re.findall(r'"\$ref":\s*"([^"]+)"', text))
    assert len(references) > 20
    for reference in references:
        head, _, name = reference.rpartition("/")
        assert head == "#/components/schemas", reference
        assert name in document["components"]["schemas"], reference


def _operations(document: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Path, method, and whether there is a body to vary; a path's own text is varied in valid data only."""
    return [
        (path, method.upper(), "requestBody" in operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def _try(operation: Any, client: httpx.Client, mode: GenerationMode) -> Counter[int]:
    """Run one operation; how often there was each status."""
    checks = [*CHECKS, *([openapi_checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]
    statuses: Counter[int] = Counter()

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call_and_validate(base_url=str(client.base_url), checks=checks)
        statuses[response.status_code] += 1

    run()
    return statuses
