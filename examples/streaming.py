"""Print an answer as it comes, accepted draft tokens in brackets. Run: python examples/streaming.py"""

from paceline import LLM, SamplingParams

with LLM("smollm2-135m", speculation="ngram+recycling") as llm:
    messages = [{"role": "user", "content": "Repeat this: 6 apples, 12 eggs, 2 loaves of bread, 3 pears."}]
    for chunk in llm.stream(messages, SamplingParams(temperature=0.0, max_tokens=64)):
        for piece, drafter in zip(chunk.pieces, chunk.drafters, strict=True):
            print(f"[{piece}]" if drafter else piece, end="", flush=True)
        if chunk.generation is not None:
            print(f"\naccepted draft tokens by drafter: {dict(chunk.generation.stats.accepted_by)}")
