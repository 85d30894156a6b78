"""Run in a process of its own, by `test_identity.py`: texts of a real vLLM engine, as one line of JSON.

Takes one argument, a JSON object: `model`, `engine` (more options of vLLM's `LLM`), `jobs` (lists of prompts, each
run as one batch), `max_tokens`, and optionally `schema` (structured output), `abort_after` (steps after which every
third request is aborted).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


def run(job: dict[str, Any], engine: Any, prompts: list[str], params: Any) -> dict[str, Any]:
    """Token ids by prompt; those of aborted requests are what they had."""
    texts: dict[str, Any] = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == job.get("abort_after"):
            aborted = [str(i) for i in range(len(prompts)) if i % 3 == 2]
            engine.abort_request(aborted)
            for name in aborted:
                texts.pop(name, None)
    return texts


def main(job: dict[str, Any]) -> None:
    """Run the jobs."""
    llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=512, seed=0, **job["engine"])
    structured = None
    if "schema" in job:
        from vllm.sampling_params import StructuredOutputsParams

        structured = StructuredOutputsParams(json=job["schema"])
    params = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        structured_outputs=structured,
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    engine = llm.llm_engine
    texts = [run(job, engine, prompts, params) for prompts in job["jobs"]]
    scheduler = engine.engine_core.engine_core.scheduler
    about: dict[str, Any] = {"scheduler": [base.__name__ for base in type(scheduler).__mro__]}
    controller = getattr(scheduler, "_controller", None)
    if controller is not None:
        scheduler._meter.flush()
        from prometheus_client import REGISTRY

        samples = [s for m in REGISTRY.collect() if m.name.startswith("paceline:") for s in m.samples]
        about["counts"] = {
            f"{s.name}{s.labels.get('length', '')}": s.value for s in samples if not s.name.endswith("_created")
        }
        about["errors"] = scheduler._errors
        about["left"] = len(scheduler._known) + len(controller.estimates.requests._known)
        about["warm"] = controller.warm
    print("RESULT" + json.dumps({"texts": texts, "about": about}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
