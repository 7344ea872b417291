"""The served schema against the server, by schemathesis: but for one check, as no schema says that a
conversation must end with a question, fit into the model, and name tokens and files that there are."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving import make_adapters, running


@pytest.fixture(scope="module")
def served_schema(tiny_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("office")
    adapters = make_adapters(tiny_folder, place / "adapters", ("one",))
    options = {"jobs": place / "jobs", "adapter_root": place / "adapters", "queue": 2000, "answer_s": 5}
    with running(tiny_folder, adapters, **options) as server:
        yield schemathesis.openapi.from_url(f"{server.root}/openapi.json")


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mode",
    [pytest.param(GenerationMode.POSITIVE, marks=pytest.mark.slow), GenerationMode.NEGATIVE],
    ids=["allowed", "not allowed"],
)
def test_every_route_does_as_its_schema_says(served_schema, count, mode):
    served, problems = 0, []
    for found in served_schema.get_all_operations():
        operation = found.ok()
        served += 1

        @hypothesis.settings(
            max_examples=count, deadline=None, suppress_health_check=[*hypothesis.HealthCheck]
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        try:
            check()
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # a route to which nothing can be sent that is wrong
        except (
            BaseExceptionGroup,
            schemathesis.errors.SchemathesisError,
            hypothesis.errors.HypothesisException,
        ) as error:
            problems.append(f"{operation.label}: {error!r:.2000}")
    assert not problems, "\n\n".join(problems)
    assert served > 20
